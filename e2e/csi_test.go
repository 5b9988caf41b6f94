//go:build e2e

package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/csi/csitest"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestCSI has two storage systems at once on real hosts: a CSI driver, which puts its
// devices into the host's mount namespace, where the managed plugin has to see them, and
// loopback. Whichever is down, the other works.
func TestCSI(t *testing.T) {
	r := rig.New(t, rig.Config{Hosts: 2})
	san := csiDriver(t, r)
	c := &cluster{Rig: r}
	if err := c.ImportImage(t.Context()); err != nil {
		t.Fatal(err)
	}
	endpoints, err := c.Etcd(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range c.Hosts {
		if err := h.InstallPlugin(t.Context(), map[string]string{
			"FLOCKER_ETCD_ENDPOINTS": strings.Join(endpoints, ","), "FLOCKER_DEFAULT_SIZE": "64M", "FLOCKER_BACKEND": "san", "FLOCKER_LOG_LEVEL": "debug",
		}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "profile=fast", "db")
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "backend=loopback", "plain")
	if s := status(t, b, "db"); s["backend"] != "san" || s["profile"] != "fast" {
		t.Errorf("db is %v, want it on san", s)
	}
	want := "BACKEND         TYPE       CLASS   STATE     PROFILES   OPTIONS\n" +
		"loopback        loopback   F0      answers   -          preallocate\n" +
		"san (default)   csi        F1      answers   fast       -\n"
	if got := a.Run(t, "flocker", "backend", "ls"); strings.TrimSpace(got) != strings.TrimSpace(want) {
		t.Errorf("backend ls prints\n%s\nwant\n%s", got, want)
	}

	// To and fro, each host adding a line.
	for i, h := range []*rig.Host{a, b, a, b} {
		if got := strings.Fields(sh(t, h, "db", "hostname >>/data/log; cat /data/log")); len(got) != i+1 {
			t.Fatalf("on %s the log has %q, want %d lines", h.Name, got, i+1)
		}
	}
	if published := san.Published(id(t, a, "db")); len(published) > 1 || len(published) == 1 && published[0] != csitest.NodeID(b.Name) {
		t.Errorf("published to %q, want %s or nobody", published, b.Name)
	}
	refusedWhileUsed(t, a, b)

	// The driver is killed under a container that writes.
	writer := strings.TrimSpace(b.Run(t, "run", "-d", "--mount", on("db"), "busybox", "sh", "-c", "while :; do date >/data/now && sync; sleep 0.2; done"))
	if err := san.Down(true); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*rig.Host{a, b} {
		sh(t, h, "plain", "hostname >>/data/log")
	}
	if err := b.KillPlugin(t.Context()); err != nil { // a new one finds the driver gone
		t.Fatal(err)
	}
	if got := sh(t, b, "plain", "cat /data/log"); len(strings.Fields(got)) != 2 {
		t.Errorf("plain has %q, want two lines", got)
	}
	refused(t, a, "the CSI driver's socket unix:///var/lib/flocker/csi.sock does not answer", "volume", "create", "-d", "flocker", "other")
	if got := a.Run(t, "flocker", "backend", "ls"); !strings.Contains(got, "san (default)   csi        F1      does not answer") {
		t.Errorf("backend ls prints\n%s", got)
	}
	before := b.Run(t, "exec", writer, "cat", "/data/now")
	time.Sleep(1500 * time.Millisecond)
	if now := b.Run(t, "exec", writer, "cat", "/data/now"); now == before {
		t.Error("the container does not write any more")
	}

	// And is back.
	if err := san.Down(false); err != nil {
		t.Fatal(err)
	}
	b.Run(t, "rm", "-f", writer)
	if got := strings.Fields(sh(t, a, "db", "hostname >>/data/log; cat /data/log")); len(got) != 5 {
		t.Errorf("in the end the log has %q, want 5 lines", got)
	}
	for _, name := range []string{"db", "plain"} {
		a.Run(t, "volume", "rm", name)
	}
	eventually(t, "nothing is left at the storage", func() bool {
		all, used := san.Volumes()
		return all == 0 && used == 0
	})
}

// refusedWhileUsed has a container use db on one host while the other wants it.
func refusedWhileUsed(t *testing.T, a, b *rig.Host) {
	t.Helper()
	user := strings.TrimSpace(a.Run(t, "run", "-d", "--name", "user", "--mount", on("db"), "busybox", "sleep", "600"))
	defer a.Run(t, "rm", "-f", user)
	refused(t, b, "volume db is in use on host "+a.Name+" by container user", "run", "--rm", "--mount", on("db"), "busybox", "true")
}

// csiDriver starts a strict CSI driver for the hosts of a rig, with a socket on each
// host's disk, and names it in their backends.yaml. Its devices are bind mounts in the
// hosts' mount namespaces, below /var/lib, which is shared there as under systemd.
func csiDriver(t *testing.T, r *rig.Rig) *csitest.Driver {
	t.Helper()
	dir := filepath.Join(r.Dir, "csi")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	opts := csitest.Options{Publish: true, Cuts: true, Stage: true, Shown: true, GetVolume: true, ListVolumes: true, Elsewhere: map[string]csitest.Elsewhere{}}
	for _, h := range r.Hosts {
		if out, err := h.Exec(t.Context(), "mount", "--make-rshared", "/var/lib"); err != nil {
			t.Fatal(err, out)
		}
		opts.Elsewhere[h.Name] = csitest.Elsewhere{
			Socket: filepath.Join(h.Dir, "lib", "flocker", "csi.sock"),
			Path:   func(path string) string { return filepath.Join(h.Dir, strings.TrimPrefix(path, "/var")) },
			Run: func(args ...string) error {
				_, err := h.Exec(t.Context(), args...)
				return err
			},
		}
		file := filepath.Join(h.Dir, "lib", "flocker", "backends.yaml")
		text := "san: {type: csi, endpoint: 'unix:///var/lib/flocker/csi.sock', fences: true, late_calls: 5s, profiles: {fast: {}}}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	san := csitest.New(dir, opts)
	t.Cleanup(func() {
		for _, violation := range san.Violations() {
			t.Errorf("against the CSI specification: %s", violation)
		}
		if err := san.Close(); err != nil {
			t.Errorf("close the storage: %v", err)
		}
	})
	for _, h := range r.Hosts {
		if _, err := san.Node(h.Name); err != nil {
			t.Fatal(err)
		}
	}
	return san
}

// id is the id of a volume.
func id(t *testing.T, h *rig.Host, volume string) string {
	t.Helper()
	return fmt.Sprint(status(t, h, volume)["id"])
}
