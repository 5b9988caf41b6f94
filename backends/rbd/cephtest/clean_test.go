package cephtest_test

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

// What a test has left that was killed goes; a cluster that another one is just starting
// does not.
func TestSweep(t *testing.T) {
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		owner string
		age   time.Duration
		stays bool
	}{
		"just being started":          {stays: true},
		"and its owner being written": {owner: " ", stays: true},
		"started":                     {owner: strconv.Itoa(os.Getpid()), age: time.Hour, stays: true},
		"its owner has ended":         {owner: strconv.Itoa(ended.Process.Pid)},
		"nobody's":                    {age: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("/tmp", strings.TrimPrefix(cephtest.Prefix, "/tmp/")) //nolint:usetesting // where Sweep looks
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			if c.owner != "" {
				if err := os.WriteFile(dir+"/owner", []byte(strings.TrimSpace(c.owner)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now().Add(-c.age)
			if err := os.Chtimes(dir, began, began); err != nil {
				t.Fatal(err)
			}
			cephtest.Sweep()
			if _, err := os.Stat(dir); (err == nil) != c.stays {
				t.Errorf("after a sweep: %v; it stays: %t", err, c.stays)
			}
		})
	}
}
