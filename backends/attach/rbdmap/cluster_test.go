package rbdmap_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// TestFailures has what the programs of Ceph 16.2.15 have really printed.
func TestFailures(t *testing.T) {
	for name, test := range map[string]struct {
		program, printed string
		code             int
		class            error
		want             string
	}{
		"no key, no monitor": {
			"rbd", `2026-11-22T09:08:31.030+0000 7f5080c57380 -1 auth: unable to find a keyring on /nonexistent: (2) No such file or directory
2026-11-22T09:08:31.030+0000 7f5080c57380 -1 AuthRegistry(0x56107790b9f8) no keyring found at /nonexistent, disabling cephx
2026-11-22T09:08:34.034+0000 7f5080c57380  0 monclient(hunting): authenticate timed out after 3
rbd: couldn't connect to the cluster!
`, 110, backends.ErrUnavailable,
			"rbd: couldn't connect to the cluster!; there is no key of client.flocker: check user, conf and keyring_file",
		},
		"no monitor": {
			"rbd", `2026-11-22T09:08:40.114+0000 7f5665caa380  0 monclient(hunting): authenticate timed out after 3
rbd: couldn't connect to the cluster!
`, 110, backends.ErrUnavailable,
			"rbd: couldn't connect to the cluster!; no monitor has answered: is the cluster up, and can this host reach it? check conf and monitors",
		},
		"no monitor for rados": {
			"rados", `2026-11-22T09:09:08.274+0000 7f48484d5d00  0 monclient(hunting): authenticate timed out after 3
couldn't connect to cluster: (110) Connection timed out
`, 1, backends.ErrUnavailable,
			"rados: couldn't connect to cluster: (110) Connection timed out; no monitor has answered: is the cluster up, and can this host reach it? check conf and monitors",
		},
		"no monitor for ceph": {"ceph", "timed out\n", 1, backends.ErrUnavailable, "ceph: timed out; no monitor has answered: is the cluster up, and can this host reach it? check conf and monitors"},
		"no right": {"rbd", `2026-11-22T09:21:31.030+0000 7f5080c57380 -1 librbd: list: error listing image in directory: (1) Operation not permitted
rbd: create error: (1) Operation not permitted
`, 1, backends.ErrUnavailable, "rbd: create error: (1) Operation not permitted; client.flocker may not do this: give it mon 'profile rbd' and osd 'profile rbd pool=…'"},
		"no pool": {"rbd", "rbd: error opening pool 'nopool': (2) No such file or directory\n", 2, backends.ErrUnavailable, "rbd: error opening pool 'nopool': (2) No such file or directory; the cluster has no such pool or namespace: create it, or check pool and namespace"},
		"no image": {"qemu-storage-daemon", `qemu-storage-daemon: --blockdev {"cache":{"direct":true},"driver":"rbd","image":"i","node-name":"image"}: error reading header from i: No such file or directory
`, 1, backends.ErrNotFound, "qemu-storage-daemon: error reading header from i: No such file or directory"},
		"nothing said": {"rbd", "", 1, backends.ErrUnavailable, "rbd: it ended with 1 and said nothing"},
	} {
		err := rbdmap.Cluster{User: "flocker"}.Fail(test.program, test.code, test.printed)
		if err.Error() != test.want {
			t.Errorf("%s: got\n%s, want\n%s", name, err, test.want)
		}
		for _, class := range []error{backends.ErrUnavailable, backends.ErrNotFound, backends.ErrExists, backends.ErrInUse, backends.ErrInvalid} {
			if errors.Is(err, class) != (class == test.class) { //nolint:errorlint // it is this very one
				t.Errorf("%s: it is %q: %t", name, class, class != test.class) //nolint:errorlint // it is this very one
			}
		}
	}
}

// program puts a script first into PATH under the name of a program.
func program(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestRun: what a program is told, and that it does not wait for ever.
func TestRun(t *testing.T) {
	c := rbdmap.Cluster{Monitors: "192.0.2.1", User: "flocker", Keyring: "/k", Timeout: 500 * time.Millisecond}
	program(t, "rbd", `echo "$@" "[$CEPH_ARGS]"`)
	t.Setenv("CEPH_ARGS", "--id admin")
	out, err := c.Run(t.Context(), "rbd", "info", "p/i")
	want := "--conf /dev/null --id flocker --mon-host 192.0.2.1 --keyring /k --client-mount-timeout 10 --rados-mon-op-timeout 10 --rados-osd-op-timeout 10 info p/i []\n"
	if err != nil || string(out) != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
	// What serves a device waits for a cluster that does not answer.
	program(t, "rbd-nbd", `echo "$@"`)
	out, err = c.Run(t.Context(), "rbd-nbd", "map", "p/i")
	want = "--conf /dev/null --id flocker --mon-host 192.0.2.1 --keyring /k --client-mount-timeout 10 map p/i\n"
	if err != nil || string(out) != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
	program(t, "rbd", "sleep 60")
	began := time.Now()
	_, err = c.Run(t.Context(), "rbd", "info", "p/i")
	if want := "rbd info p/i: Ceph has not answered within 500ms; is the cluster up, and can this host reach it?: unavailable"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %q", err, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.Run(ctx, "rbd", "info", "p/i")
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("got %v, want a deadline that is exceeded", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	t.Setenv("PATH", t.TempDir())
	_, err = c.Run(t.Context(), "rbd", "info", "p/i")
	if !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), "the program rbd cannot be run") || !strings.Contains(err.Error(), "install Debian's package ceph-common") {
		t.Errorf("got %v", err)
	}
}

// TestFSID: a cluster is asked once who it is, and asked again if it has not said.
func TestFSID(t *testing.T) {
	asked := filepath.Join(t.TempDir(), "asked")
	ask := func(c rbdmap.Cluster, want string, calls int) {
		t.Helper()
		id, err := c.FSID(t.Context())
		if got := fmt.Sprintf("%s %v", id, err); !strings.Contains(got, want) {
			t.Errorf("got %s, want %q", got, want)
		}
		if lines, _ := os.ReadFile(asked); strings.Count(string(lines), "\n") != calls {
			t.Errorf("asked %d times, want %d:\n%s", strings.Count(string(lines), "\n"), calls, lines)
		}
	}
	a, b := rbdmap.Cluster{Monitors: "192.0.2.1", User: "fsid"}, rbdmap.Cluster{Monitors: "192.0.2.2", User: "fsid"}
	program(t, "ceph", "echo asked >>"+asked+"; echo timed out >&2; exit 1")
	ask(a, "no monitor has answered", 1)
	program(t, "ceph", "echo asked >>"+asked+`; echo '{"fsid":"none"}'`)
	ask(a, `ceph fsid has answered "none"`, 2)
	program(t, "ceph", "echo asked >>"+asked+`; echo '{"fsid":"aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"}'`)
	ask(a, "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa <nil>", 3)
	ask(a, "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa <nil>", 3)
	program(t, "ceph", "echo asked >>"+asked+`; echo '{"fsid":"bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"}'`)
	ask(b, "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb <nil>", 4)
	ask(a, "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa <nil>", 4)
}

// TestHostLacks: a host that can attach nothing says what is missing.
func TestHostLacks(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	a, err := rbdmap.New(rbdmap.Config{Dir: "/tmp/flocker-rbdmap-none", Method: rbdmap.FUSE})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Map(t.Context(), rbdmap.Image{Pool: "p", Name: "i"}, "label", nil)
	want := "this host cannot attach an RBD image: fuse needs the program rbd (package ceph-common), " +
		"the program qemu-storage-daemon (packages qemu-system-common and qemu-block-extra)"
	if !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(strings.ReplaceAll(strings.ReplaceAll(err.Error(), ", /dev/fuse", ""), ", /dev/loop-control", ""), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}
