package iscsi

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// acknowledged waits until the other side has acknowledged all that was sent to a portal by programs
// that have ended. The kernel goes on to send it, also after another connection was made.
func acknowledged(ctx context.Context, portal string) error {
	what := "what an earlier connection to portal " + portal + " has sent is not acknowledged"
	return qsd.Wait(ctx, 30*time.Second, what, func() (bool, error) {
		for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
			text, _ := os.ReadFile(file) // there is none without IPv6
			if closing(string(text), portal) {
				return false, nil
			}
		}
		return true, nil
	})
}

// unacknowledged are the states of connections that were closed here, and not by the other
// side's word: FIN-WAIT-1, LAST-ACK and CLOSING.
var unacknowledged = []string{"04", "09", "0B"}

// closing says whether a table of the kernel's has such a connection to a portal.
func closing(table, portal string) bool {
	host, number, err := net.SplitHostPort(portal)
	if err != nil {
		return false
	}
	address, err := netip.ParseAddr(host)
	named := err != nil // by a name, which may mean several
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) < 4 || !slices.Contains(unacknowledged, fields[3]) {
			continue
		}
		to, port, _ := strings.Cut(fields[2], ":")
		n, err := strconv.ParseUint(port, 16, 16)
		if err != nil || fmt.Sprint(n) != number {
			continue
		}
		if remote, ok := parseKernel(to); named || !ok || remote == address.Unmap() {
			return true
		}
	}
	return false
}

// parseKernel reads an address as the kernel writes it: words of 32 bits, as they are in the
// memory of a machine.
func parseKernel(text string) (netip.Addr, bool) {
	b, err := hex.DecodeString(text)
	if err != nil {
		return netip.Addr{}, false
	}
	for word := range slices.Chunk(b, 4) {
		slices.Reverse(word) // all that Flocker runs on have the low byte first
	}
	address, ok := netip.AddrFromSlice(b)
	return address.Unmap(), ok
}
