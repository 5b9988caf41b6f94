package loopback_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/loopback"
)

func TestContract(t *testing.T) {
	backendtest.NeedRoot(t)
	for name, preallocate := range map[string]bool{"sparse": false, "preallocated": true} {
		t.Run(name, func(t *testing.T) {
			cfg := backendtest.Config{New: func(t backendtest.T) backendtest.Storage {
				dir := t.TempDir()
				return backendtest.Storage{Node: func(cluster, node string) backends.Backend {
					return loopback.New(loopback.Config{Dir: dir, Cluster: cluster, Node: node, Preallocate: preallocate})
				}}
			}}
			if preallocate {
				cfg.Size, cfg.Many = 4<<20, 10
			}
			backendtest.Run(t, cfg)
		})
	}
}

// fixture is a directory and a volume in it.
type fixture struct {
	*loopback.Loopback
	dir string
	vol backends.Volume
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	backendtest.NeedRoot(t)
	f := fixture{dir: t.TempDir()}
	f.Loopback = f.node("a")
	f.vol = f.create(t)
	t.Cleanup(func() {
		// Whatever a failed test has left attached.
		for _, node := range []string{"a", "b"} {
			atts, err := f.node(node).Attachments(context.Background())
			for _, att := range atts {
				err = errors.Join(err, f.node(node).Detach(context.Background(), att))
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	return f
}

func (f fixture) node(name string) *loopback.Loopback {
	return loopback.New(loopback.Config{Dir: f.dir, Node: name + f.dir})
}

func (f fixture) create(t *testing.T) backends.Volume {
	t.Helper()
	vol, err := f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return vol
}

func (f fixture) attach(t *testing.T, token int64) backends.Attachment {
	t.Helper()
	att, err := f.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return att
}

func (f fixture) detach(t *testing.T, att backends.Attachment) {
	t.Helper()
	if err := f.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
}

// wantError demands a class and a text, in which <…> stand for what differs.
func (f fixture) wantError(t *testing.T, err, class error, want string) {
	t.Helper()
	identity, _, _ := strings.Cut(f.vol.Ref, "/")
	got := strings.NewReplacer(f.dir, "<dir>", f.vol.ID, "<volume>", identity, "<identity>").Replace(fmt.Sprint(err))
	if got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
	if !errors.Is(err, class) {
		t.Errorf("%v is not %v", err, class)
	}
}

// files are the names in the directory without its marker.
func (f fixture) files(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		if entry.Name() != ".flocker-loopback" {
			names = append(names, entry.Name())
		}
	}
	return names
}

func TestDirectoryVanishes(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	away := f.dir + ".away"
	if err := os.Rename(f.dir, away); err != nil {
		t.Fatal(err)
	}
	const vanished = "loopback directory <dir> has vanished: its volumes (<identity>) are not there; is its disk mounted?"
	_, err := f.Get(t.Context(), f.vol.Ref)
	f.wantError(t, err, backends.ErrUnavailable, vanished)
	_, err = f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "new", Size: 1})
	f.wantError(t, err, backends.ErrUnavailable, "create volume new: "+vanished)
	_, err = f.List(t.Context())
	f.wantError(t, err, backends.ErrUnavailable, vanished)
	_, err = f.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: 1})
	f.wantError(t, err, backends.ErrUnavailable, "attach volume: "+vanished)
	f.wantError(t, f.Delete(t.Context(), f.vol.Ref), backends.ErrUnavailable, "delete: "+vanished)

	// After a restart nothing is known of it.
	_, err = f.node("a").List(t.Context())
	f.wantError(t, err, backends.ErrUnavailable, "loopback directory: stat <dir>: no such file or directory")

	// What is attached can still be found and detached.
	if atts, err := f.node("a").Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
		t.Errorf("got %v, %v; want %v", atts, err, att)
	}
	f.detach(t, att)

	// An empty directory in its place, as where a disk is no longer mounted.
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err = f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "new", Size: 1})
	f.wantError(t, err, backends.ErrUnavailable, "create volume new: "+vanished)
	if names := f.files(t); len(names) > 0 {
		t.Errorf("%q was made in the wrong place", names)
	}
	if err := errors.Join(os.Remove(f.dir), os.Rename(away, f.dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Get(t.Context(), f.vol.Ref); err != nil {
		t.Error(err)
	}
}

func TestAnotherDirectory(t *testing.T) {
	f := newFixture(t)
	other := newFixture(t)
	identity, _, _ := strings.Cut(other.vol.Ref, "/")
	_, err := other.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: 1})
	f.wantError(t, err, backends.ErrUnavailable, "attach volume: volume <volume> lives in another loopback directory (<identity>) than "+
		other.dir+" on this host ("+identity+"); share the directory between hosts or use the host it was made on")
	empty := loopback.New(loopback.Config{Dir: t.TempDir(), Node: "a"})
	if _, err := empty.Get(t.Context(), f.vol.Ref); !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	// The disk with the directory is exchanged under a running process.
	if err := os.WriteFile(filepath.Join(f.dir, ".flocker-loopback"), []byte(identity+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = f.Get(t.Context(), f.vol.Ref)
	f.wantError(t, err, backends.ErrUnavailable, "loopback directory <dir> is not the one it was (<identity>, now "+identity+"); is the right disk mounted?")
}

func TestBadRequests(t *testing.T) {
	f := newFixture(t)
	_, err := f.Get(t.Context(), "vol-123")
	f.wantError(t, err, backends.ErrInvalid, `volume reference "vol-123" is not of the loopback backend: invalid`)
	_, err = f.Create(t.Context(), backends.CreateRequest{ID: "../../etc", Name: "x", Size: 1})
	f.wantError(t, err, backends.ErrInvalid, `create volume: "../../etc" is no UUID: invalid`)
	_, err = f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "x", Size: -1})
	f.wantError(t, err, backends.ErrInvalid, `create volume x: no volume can have -1 bytes: invalid`)
	_, err = f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "x", Size: 1, Options: map[string]string{"thick": "yes"}})
	f.wantError(t, err, backends.ErrInvalid, `unknown option thick; valid options: preallocate`)
	huge, err := f.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "x", Size: 1 << 60})
	if err == nil {
		err = f.Delete(t.Context(), huge.Ref) // some filesystems take it
	} else if errors.Is(err, backends.ErrInvalid) && strings.Contains(err.Error(), "allows no file as large") {
		err = nil
	}
	if err != nil {
		t.Errorf("got %v", err)
	}
	elsewhere := f.attach(t, 1)
	elsewhere.Node = "b"
	f.wantError(t, f.Detach(t.Context(), elsewhere), backends.ErrInvalid,
		"detach volume <volume>: loop devices of b can only be detached there: invalid")
	if names := f.files(t); !slices.Equal(names, []string{f.vol.ID}) {
		t.Errorf("%q has been left", names)
	}
}

func TestFullDisk(t *testing.T) {
	f := newFixture(t)
	f.dir = t.TempDir()
	if err := unix.Mount("flocker-test", f.dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(f.dir, 0); err != nil {
			t.Error(err)
		}
	}()
	l := f.node("a")
	req := backends.CreateRequest{ID: uuid.NewString(), Name: "db", Size: 16 << 20, Options: map[string]string{"preallocate": "true"}}
	_, err := l.Create(t.Context(), req)
	f.wantError(t, err, backends.ErrUnavailable, "create volume db: no space left in loopback directory <dir>; 7MiB are free: reserve 16MiB: no space left on device")
	if names := f.files(t); len(names) > 0 {
		t.Errorf("%q has been left", names)
	}
	req.Size = 4 << 20
	vol, err := l.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := l.Resize(t.Context(), vol.Ref, 16<<20); !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("resize: got %d, %v; want ErrUnavailable", got, err)
	}
	if got, err := l.Get(t.Context(), vol.Ref); err != nil || got.Size != vol.Size {
		t.Errorf("got %+v, %v; want the size of before", got, err)
	}
	if got, err := l.Resize(t.Context(), vol.Ref, 6<<20); err != nil || got != 6<<20 {
		t.Errorf("resize: got %d, %v", got, err)
	}
	req.ID, req.Size, req.Options = uuid.NewString(), 1<<40, nil
	if _, err = l.Create(t.Context(), req); err != nil {
		t.Errorf("a sparse volume needs no space: %v", err)
	}
}

func TestNoLoopDevices(t *testing.T) {
	f := newFixture(t)
	loopback.SetControl(f.Loopback, "/dev/no-such-control")
	for range 2 {
		_, err := f.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: 1})
		f.wantError(t, err, backends.ErrUnavailable, "attach volume: this host has no usable loop devices; "+
			"load the loop module (modprobe loop) and let this process use /dev/loop*: open /dev/no-such-control: no such file or directory")
	}
	// It has let go of the volume.
	if err := f.Delete(t.Context(), f.vol.Ref); err != nil {
		t.Error(err)
	}
}

func sysfs(t *testing.T, att backends.Attachment, name string) string {
	t.Helper()
	text, err := os.ReadFile("/sys/block/" + filepath.Base(att.Device) + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func TestDirectIO(t *testing.T) {
	f := newFixture(t)
	want := "1"
	file, err := os.OpenFile(filepath.Join(f.dir, "probe"), os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		want = "0" // buffered is the fallback
	}
	_ = file.Close()
	att := f.attach(t, 1)
	if got := sysfs(t, att, "loop/dio"); got != want {
		t.Errorf("direct I/O is %s, want %s", got, want)
	}
	if got := sysfs(t, att, "queue/logical_block_size"); got != "512" && got != "4096" {
		t.Errorf("block size is %s", got)
	}
}

// TestReadOnlyDoesNotStick: the flag would stay with the device's number, and
// hit whichever volume gets it next.
func TestReadOnlyDoesNotStick(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	device, err := os.Open(att.Device)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(device.Fd()), unix.BLKROSET, 1); err != nil {
		t.Fatal(err)
	}
	if err := device.Close(); err != nil {
		t.Fatal(err)
	}
	// Detaching works too.
	f.detach(t, att)
	again := f.attach(t, 2)
	if again.Device != att.Device {
		t.Logf("another device: %s, %s", att.Device, again.Device)
	}
	if got := sysfs(t, again, "ro"); got != "0" {
		t.Errorf("%s is read-only", again.Device)
	}
}

func TestDetachLeavesAReplacedFile(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	identity, _, _ := strings.Cut(f.vol.Ref, "/")
	data := filepath.Join(f.dir, f.vol.ID, identity+".img")
	if err := os.Rename(data, data+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(data, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f.wantError(t, f.Detach(t.Context(), att), backends.ErrUnavailable,
		"detach volume <volume>: <dir>/<volume>/<identity>.img is not attached to "+att.Device+"; somebody has replaced the file")
	if err := os.Rename(data+".old", data); err != nil {
		t.Fatal(err)
	}
	f.detach(t, att)
}

func TestDetachOfAMountedVolume(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	if out, err := exec.Command("mkfs.ext4", "-q", att.Device).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	target := t.TempDir()
	if err := unix.Mount(att.Device, target, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	err := f.Detach(t.Context(), att)
	errFile := os.WriteFile(filepath.Join(target, "file"), []byte("data"), 0o600)
	if err := errors.Join(errFile, unix.Unmount(target, 0)); err != nil {
		t.Error(err)
	}
	f.wantError(t, err, backends.ErrInUse, "detach volume <volume>: "+att.Device+" is open or mounted: in use")
	f.detach(t, att)
}

// Somebody who looks at the device, and does not mount it, is waited for.
func TestDetachWaitsForALook(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	device, err := os.Open(att.Device)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*loopback.Settle, func() { _ = device.Close() })
	f.detach(t, att)
	if atts, err := f.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("got %v, %v; want nothing", atts, err)
	}
}

func TestNothingLeaks(t *testing.T) {
	f := newFixture(t)
	count := func() (fds, loops int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		atts, err := f.Attachments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), len(atts)
	}
	f.detach(t, f.attach(t, 1))
	fds, _ := count()
	for token := range int64(200) {
		f.detach(t, f.attach(t, token))
	}
	if gotFDs, gotLoops := count(); gotFDs != fds || gotLoops != 0 {
		t.Errorf("got %d file descriptors and %d attachments; want %d and 0", gotFDs, gotLoops, fds)
	}
	if err := f.Delete(t.Context(), f.vol.Ref); err != nil {
		t.Error(err)
	}
	if names := f.files(t); len(names) > 0 {
		t.Errorf("%q has been left", names)
	}
}

func TestSixteenCallers(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			// Half of them in another process, as far as the backend can tell.
			l := f.Loopback
			if i%2 == 1 {
				l = f.node("b")
			}
			for range 10 {
				vol, err := l.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Size: 1 << 20})
				if err != nil {
					t.Error(err)
					return
				}
				att, err := l.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(l.Detach(t.Context(), att), l.Delete(t.Context(), vol.Ref)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if names := f.files(t); !slices.Equal(names, []string{f.vol.ID}) {
		t.Errorf("%q has been left", names)
	}
}

// TestLookingWhileDetaching: a device that is losing its file cannot be opened,
// which is no reason to fail for those who look at all of them.
func TestLookingWhileDetaching(t *testing.T) {
	f := newFixture(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for token := range int64(200) {
			att, err := f.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: token})
			if err == nil {
				err = f.Detach(t.Context(), att)
			}
			if err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		select {
		case <-done:
			return
		default:
		}
		if _, err := f.node("b").Attachments(t.Context()); err != nil {
			t.Error(err)
			<-done
			return
		}
	}
}

// TestAttachRacesDelete lets a Delete finish after Attach has opened the file,
// and before it gets the lock.
func TestAttachRacesDelete(t *testing.T) {
	f := newFixture(t)
	identity, _, _ := strings.Cut(f.vol.Ref, "/")
	dir := filepath.Join(f.dir, f.vol.ID)
	for range 5 {
		held, err := os.Open(filepath.Join(dir, identity+".img"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() {
			_, err := f.Attach(t.Context(), backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: 1})
			done <- err
		}()
		time.Sleep(20 * time.Millisecond)
		err = errors.Join(os.Rename(dir, dir+".away"), held.Close())
		f.wantError(t, <-done, backends.ErrNotFound, "attach volume: volume <volume>: not found")
		if err := errors.Join(err, os.Rename(dir+".away", dir)); err != nil {
			t.Fatal(err)
		}
	}
}
