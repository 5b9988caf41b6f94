package iscsi_test

import (
	"testing"

	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
)

// TestClosing has lines of /proc/net/tcp and tcp6.
func TestClosing(t *testing.T) {
	t.Parallel()
	const (
		head  = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
		four  = "   0: 0100007F:D2F0 070200C0:0CBC "
		six   = "   0: 00000000000000000000000001000000:D2F0 B80D0120000000000000000001000000:0CBC "
		mixed = "   0: 0000000000000000FFFF00000100007F:D2F0 0000000000000000FFFF0000070200C0:0CBC "
		rest  = " 00000000:00000000 00:00000000 00000000     0        0 0 1\n"
	)
	for _, test := range []struct {
		line, portal string
		want         bool
	}{
		{four + "04", "192.0.2.7:3260", true},
		{four + "09", "192.0.2.7:3260", true},
		{four + "0B", "192.0.2.7:3260", true},
		{four + "01", "192.0.2.7:3260", false}, // of a device that is in use
		{four + "05", "192.0.2.7:3260", false},
		{four + "06", "192.0.2.7:3260", false},
		{four + "04", "192.0.2.7:3261", false},
		{four + "04", "192.0.2.8:3260", false},
		{four + "04", "storage.example:3260", true},
		{six + "04", "[2001:db8::1]:3260", true},
		{six + "04", "[2001:db8::2]:3260", false},
		{mixed + "04", "192.0.2.7:3260", true},
		{mixed + "04", "[::ffff:192.0.2.7]:3260", true},
	} {
		if got := iscsi.Closing(head+test.line+rest, test.portal); got != test.want {
			t.Errorf("%s and %s: got %t", test.line, test.portal, got)
		}
	}
}
