package iscsi_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi/iscsitest"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

const (
	host   = "iqn.2026-11.org.example:host1"
	target = "iqn.2010-10.org.openstack:volume-1fae06f2-8dcc-4b5b-8d8b-000000000001"
	user   = "q8yTnZ4x"
	secret = "o9bXvQ2kLmW7"
)

// rig is a target, and a host that can connect to it.
type rig struct {
	*testing.T
	*iscsitest.Server
	*iscsi.Program
	dir, file string
	lun       iscsi.LUN
}

func newRig(t *testing.T) *rig {
	t.Helper()
	backendtest.NeedRoot(t)
	iscsitest.Need(t)
	server, err := iscsitest.Start()
	must(t, err)
	t.Cleanup(server.Stop)
	dir, err := os.MkdirTemp("/tmp", "flocker-i-unit-") //nolint:usetesting // paths of sockets are short
	must(t, err)
	r := &rig{T: t, Server: server, dir: dir, file: filepath.Join(t.TempDir(), "unit"), lun: iscsi.LUN{
		Portals: []string{server.Portal}, Target: target, Number: iscsitest.Number, User: user, Secret: secret,
	}}
	r.Program = r.as(host)
	t.Cleanup(func() {
		devices, err := r.Devices(context.Background())
		for _, d := range devices {
			_, failed := r.Disconnect(context.Background(), d)
			err = errors.Join(err, failed)
		}
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	must(t, os.WriteFile(r.file, nil, 0o600))
	must(t, os.Truncate(r.file, 64<<20))
	must(t, server.Add(iscsitest.Target{Name: target, File: r.file, User: user, Secret: secret, Initiator: host}))
	return r
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// as is the host under another name.
func (r *rig) as(name string) *iscsi.Program {
	r.Helper()
	p, err := iscsi.NewProgram(iscsi.ProgramConfig{Dir: r.dir, Name: name})
	must(r, err)
	return p
}

func (r *rig) connect() iscsi.Device {
	r.Helper()
	d, err := r.Connect(r.Context(), r.lun)
	must(r, err)
	return d
}

// wants demands that these devices are there, and no others, nor any programs.
func (r *rig) wants(devices ...iscsi.Device) {
	r.Helper()
	got, err := r.Devices(r.Context())
	if err != nil || !slices.Equal(got, devices) {
		r.Errorf("connected: got %v, %v; want %v", got, err, devices)
	}
	if running := r.programs(); len(running) != len(devices) {
		r.Errorf("there are %d programs for %d devices", len(running), len(devices))
	}
	if left, _ := filepath.Glob(r.dir + "/m-*"); len(left) != len(devices) {
		r.Errorf("there are the directories %s for %d devices", left, len(devices))
	}
}

// programs returns the processes that have the directory in their command lines.
func (r *rig) programs() map[string]string {
	r.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(r, err)
	found := map[string]string{}
	for _, path := range lines {
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), r.dir+"/") {
			found[filepath.Dir(path)] = string(text)
		}
	}
	return found
}

// write writes to a device in the background, and says with what that has ended.
func write(t *testing.T, path string, data []byte, at int64) (ended chan error) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DSYNC|unix.O_EXCL, 0) // as a mount does
	must(t, err)
	ended = make(chan error, 1)
	go func() {
		_, err := f.WriteAt(data, at)
		ended <- errors.Join(err, f.Close())
	}()
	return ended
}

func finished(t *testing.T, ended chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(2 * time.Minute):
		t.Fatal("what was written still waits after two minutes")
		return nil
	}
}

func noise(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b) // never fails
	return b
}

// same demands that the unit's file has something.
func (r *rig) same(want []byte, at int64) {
	r.Helper()
	got, err := os.ReadFile(r.file)
	must(r, err)
	if !bytes.Equal(got[at:at+int64(len(want))], want) {
		r.Error("the unit does not have what was written to the device")
	}
}

func TestProgram(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.wants()
	d := r.connect()
	r.wants(d)
	if again := r.connect(); again != d || !d.Is(r.lun) {
		t.Errorf("got %v, and then %v", d, again)
	}
	for _, line := range r.programs() {
		if strings.Contains(line, secret) {
			t.Errorf("the secret is in a command line: %q", line)
		}
	}
	out, err := exec.Command("grep", "-rlF", secret, r.dir).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Errorf("the secret is left in %s (%v)", out, err)
	}
	data := noise(1 << 20)
	must(t, finished(t, write(t, d.Path, data, 12<<20)))
	r.same(data, 12<<20)
	if served, err := r.Served(d); err != nil || !served {
		t.Errorf("got %t, %v", served, err)
	}
	f, err := os.Open(d.Path)
	must(t, err)
	if _, err = r.Disconnect(t.Context(), d); !errors.Is(err, backends.ErrInUse) {
		t.Errorf("got %v, want that it is in use", err)
	}
	must(t, f.Close())
	r.wants(d)
	if clean, err := r.Disconnect(t.Context(), d); err != nil || !clean {
		t.Errorf("got %t, %v", clean, err)
	}
	r.wants()
	if _, err := r.Disconnect(t.Context(), d); err != nil {
		t.Error(err)
	}
	// A device of the same path, which is another one.
	now := r.connect()
	if now.Life == d.Life {
		t.Errorf("both have the life %q", d.Life)
	}
	if _, err := r.Disconnect(t.Context(), d); err != nil {
		t.Error(err)
	}
	r.wants(now)
}

// TestProgramRefused: each reason why there is no device is said, and nothing is left.
func TestProgramRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	closed := "127.0.0.1:1"
	for name, test := range map[string]struct {
		change func(lun *iscsi.LUN)
		as     string
		class  error
		want   string
	}{
		"another secret": {
			func(lun *iscsi.LUN) { lun.Secret = "o9bXvQ2kLmW8" }, host, backends.ErrUnavailable,
			"Authentication failure(513); the target wants another user or secret of CHAP than this host was told",
		},
		"no secret": {
			func(lun *iscsi.LUN) { lun.User, lun.Secret = "", "" }, host, backends.ErrUnavailable,
			"Authentication failure(513); the target wants another user or secret of CHAP than this host was told",
		},
		"another host":    {func(*iscsi.LUN) {}, host + "0", backends.ErrNotFound, "Target not found(515); there is no such unit for this host"},
		"no such target":  {func(lun *iscsi.LUN) { lun.Target += "0" }, host, backends.ErrNotFound, "Target not found(515); there is no such unit for this host"},
		"no such number":  {func(lun *iscsi.LUN) { lun.Number++ }, host, backends.ErrNotFound, "LOGICAL_UNIT_NOT_SUPPORTED(0x2500); there is no such unit for this host"},
		"nobody is there": {func(lun *iscsi.LUN) { lun.Portals = []string{closed} }, host, backends.ErrUnavailable, "portal " + closed + ": iscsi_service failed"},
	} {
		lun := r.lun
		test.change(&lun)
		d, err := r.as(test.as).Connect(t.Context(), lun)
		if !errors.Is(err, test.class) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), lun.String()) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: got %v, %v; want %q", name, d, err, test.want)
		}
		r.wants()
	}
	// The unit is not there only if all say so.
	lun := r.lun
	lun.Target, lun.Portals = lun.Target+"0", []string{r.Portal, closed}
	if _, err := r.Connect(t.Context(), lun); errors.Is(err, backends.ErrNotFound) || !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), "; portal "+closed+": ") {
		t.Errorf("got %v", err)
	}
	// One of several ways is enough.
	r.lun.Portals = []string{closed, r.Portal}
	r.wants(r.connect())
}

// TestProgramHangs: the target does not answer. Each wait has an end, and what was not
// acknowledged is not taken for done.
func TestProgramHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	d := r.connect()
	must(t, r.Hang(true))
	t.Cleanup(func() { must(t, r.Hang(false)) })
	writing := write(t, d.Path, noise(1<<20), 0)
	select {
	case err := <-writing:
		t.Fatalf("the target does not answer, and writing to it has ended with %v", err)
	case <-time.After(time.Second):
	}
	kill(t, r)
	if err := finished(t, writing); err == nil {
		t.Error("what was not written is said to be")
	}
	if clean, err := r.Disconnect(t.Context(), d); err != nil || clean {
		t.Errorf("got %t, %v; want that it is gone, and not cleanly", clean, err)
	}
	r.wants()
	began := time.Now()
	if _, err := r.Connect(t.Context(), r.lun); !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), "qemu-storage-daemon has not opened LUN 1 of "+target) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 2*time.Minute {
		t.Errorf("that took %s", took)
	}
	r.wants()
}

// kill kills the programs of a host.
func kill(t *testing.T, r *rig) {
	t.Helper()
	for dir := range r.programs() {
		if p, err := os.FindProcess(number(filepath.Base(dir))); err == nil {
			_ = p.Kill() // it may have ended
		}
	}
}

func number(text string) (n int) {
	for _, c := range text {
		n = n*10 + int(c-'0')
	}
	return n
}

// TestProgramHangsUnsynced: the target does not say any more whether it keeps what was written.
// Nobody has the device open, so it is given up, in a time that has an end.
func TestProgramHangsUnsynced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	d := r.connect()
	data := noise(1 << 20)
	out := exec.Command("dd", "of="+d.Path, "bs=1M", "oflag=direct", "conv=notrunc")
	out.Stdin = bytes.NewReader(data)
	must(t, out.Run())
	must(t, r.Hang(true))
	t.Cleanup(func() { must(t, r.Hang(false)) })
	began := time.Now()
	clean, err := r.Disconnect(t.Context(), d)
	if err != nil || clean {
		t.Errorf("got %t, %v; want that it is gone, and not cleanly", clean, err)
	}
	if took := time.Since(began); took > 2*time.Minute {
		t.Errorf("that took %s", took)
	}
	r.wants()
}

// TestProgramTargetDies: the target is killed in the middle of writing, and started again. The
// device does nothing more, and fails as soon as that is seen; another one has all that was
// acknowledged.
func TestProgramTargetDies(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	d := r.connect()
	before := noise(1 << 20)
	must(t, finished(t, write(t, d.Path, before, 50<<20)))
	writing := write(t, d.Path, noise(48<<20), 0)
	for started := time.Now(); ; time.Sleep(time.Millisecond) { // it has begun
		var stat syscall.Stat_t
		must(t, syscall.Stat(r.file, &stat))
		if stat.Blocks > 2048 {
			break
		}
		if time.Since(started) > time.Minute {
			t.Fatal("nothing gets to the unit")
		}
	}
	r.Kill()
	select {
	case err := <-writing:
		t.Errorf("the target was killed too late: writing has ended with %v", err)
	case <-time.After(time.Second):
	}
	must(t, r.Again())
	select {
	case err := <-writing:
		t.Errorf("it has made another session: writing has ended with %v", err)
	case <-time.After(10 * time.Second):
	}
	if got, err := r.Devices(t.Context()); err != nil || !slices.Equal(got, []iscsi.Device{d}) {
		t.Errorf("got %v, %v; want %v", got, err, d)
	}
	if err := finished(t, writing); err == nil {
		t.Error("what was not acknowledged is said to be written")
	}
	if served, err := r.Served(d); err != nil || served {
		t.Errorf("got %t, %v", served, err)
	}
	if clean, err := r.Disconnect(t.Context(), d); err != nil || clean {
		t.Errorf("got %t, %v; want that it is gone, and not cleanly", clean, err)
	}
	d = r.connect()
	r.same(before, 50<<20)
	must(t, finished(t, write(t, d.Path, before, 0)))
	r.same(before, 0)
}

// TestProgramDies: its program is killed; the device is seen, does nothing, and can be
// removed.
func TestProgramDies(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	d := r.connect()
	kill(t, r)
	for started := time.Now(); len(r.programs()) > 0; time.Sleep(time.Millisecond) {
		if time.Since(started) > time.Minute {
			t.Fatal("it does not end")
		}
	}
	if got, err := r.Devices(t.Context()); err != nil || !slices.Equal(got, []iscsi.Device{d}) {
		t.Errorf("got %v, %v; want %v", got, err, d)
	}
	if served, err := r.Served(d); err != nil || served {
		t.Errorf("got %t, %v", served, err)
	}
	if err := finished(t, write(t, d.Path, noise(4096), 0)); err == nil {
		t.Error("it can be written to")
	}
	if clean, err := r.Disconnect(t.Context(), d); err != nil || clean {
		t.Errorf("got %t, %v; want that it is gone, and not cleanly", clean, err)
	}
	r.wants()
}

// TestProgramBegun: a Connect was killed. What it has left is no device, and is no hindrance.
func TestProgramBegun(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	d := r.connect()
	dirs, err := filepath.Glob(r.dir + "/m-*")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dirs[0], "begun"), nil, 0o600))
	if got, err := r.Devices(t.Context()); err != nil || len(got) > 0 {
		t.Errorf("got %v, %v; want none", got, err)
	}
	now := r.connect()
	if now.Life == d.Life {
		t.Error("it is the one that was begun")
	}
	r.wants(now)
}

func TestNewProgram(t *testing.T) {
	t.Parallel()
	for _, cfg := range []iscsi.ProgramConfig{
		{}, {Dir: "run", Name: host}, {Dir: "/run/../x", Name: host}, {Dir: "/" + strings.Repeat("x", 70), Name: host}, {Dir: "/run/x", Name: "host1"},
	} {
		if _, err := iscsi.NewProgram(cfg); !errors.Is(err, backends.ErrInvalid) {
			t.Errorf("%+v: got %v, want ErrInvalid", cfg, err)
		}
	}
}
