package loop_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

func none() {}

func make8M(t *testing.T) (dir string, d loop.Device) {
	t.Helper()
	backendtest.NeedRoot(t)
	dir = t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.Background(), time.Second, none); err != nil {
			t.Error(err)
		}
	})
	return dir, d
}

func wantDevices(t *testing.T, dir string, want ...loop.Device) {
	t.Helper()
	got, err := loop.Devices(dir)
	if err != nil || len(got) != len(want) || (len(want) == 1 && got[0] != want[0]) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
}

func TestDevice(t *testing.T) {
	dir, d := make8M(t)
	wantDevices(t, dir, d)
	wantDevices(t, dir+"x")
	if size, err := d.Size(); err != nil || size != 8<<20 {
		t.Errorf("size %d, %v", size, err)
	}
	if err := os.Truncate(d.File, 12<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.Grow(t.Context(), 12<<20); err != nil {
		t.Error(err)
	}
	if size, err := d.Size(); err != nil || size != 12<<20 {
		t.Errorf("size %d, %v", size, err)
	}
	for range 2 {
		if err := d.Detach(t.Context(), time.Second, none); err != nil {
			t.Error(err)
		}
		wantDevices(t, dir)
	}
}

// TestOpen: a device that somebody has open stays, now and later.
func TestOpen(t *testing.T) {
	for _, flags := range []int{0, syscall.O_EXCL} {
		dir, d := make8M(t)
		f, err := os.OpenFile(d.Path, os.O_RDWR|flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Detach(t.Context(), time.Second, none); !errors.Is(err, backends.ErrInUse) {
			t.Errorf("got %v, want ErrInUse", err)
		}
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		_ = f.Close()
		time.Sleep(50 * time.Millisecond)
		wantDevices(t, dir, d)
	}
}

// TestAnothers: a device that has another file by now is not ours.
func TestAnothers(t *testing.T) {
	_, d := make8M(t)
	other := loop.Device{Path: d.Path, File: d.File + "-before"}
	if err := other.Detach(t.Context(), time.Second, none); err != nil {
		t.Error(err)
	}
	wantDevices(t, filepath.Dir(d.File), d)
}

// ended is a device whose path the kernel shows only the end of, as after a container has ended.
func ended(t *testing.T, dir string) loop.Device {
	t.Helper()
	out, err := exec.Command("unshare", "-m", "sh", "-e", "-c", `mount --bind "$1" "$1"; losetup --find --show "$1/file"`, "sh", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	d := loop.Device{Path: strings.TrimSpace(string(out)), File: "/file"}
	t.Cleanup(func() {
		if err := d.Detach(context.Background(), time.Second, none); err != nil {
			t.Error(err)
		}
	})
	shown, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path) + "/loop/backing_file")
	if err != nil || string(shown) != d.File+"\n" {
		t.Fatalf("the kernel shows %q, %v", shown, err)
	}
	return d
}

// TestIn: a device is of the directory that has its file, whatever the kernel shows of its path.
func TestIn(t *testing.T) {
	first, d := make8M(t)
	second, other := make8M(t)
	if err := other.Detach(t.Context(), time.Second, none); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(first, link); err != nil {
		t.Fatal(err)
	}
	wantIn := func(dir string, want ...loop.Device) {
		t.Helper()
		if got, err := loop.In(t.Context(), dir); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %+v, %v; want %+v", dir, got, err, want)
		}
	}
	wantIn(first, d)
	wantIn(link, d)
	wantIn(second)
	if err := d.Detach(t.Context(), time.Second, none); err != nil {
		t.Fatal(err)
	}
	d = ended(t, first)
	wantIn(first, d)
	wantIn(link, d)
	wantIn(second)
	if d.Name() != "file" || d.Deleted() {
		t.Errorf("name %s, deleted %t", d.Name(), d.Deleted())
	}
	if _, err := loop.In(t.Context(), filepath.Join(first, "none")); !errors.Is(err, os.ErrNotExist) || !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

// TestDeleted: a device is not of the file that has the name of its own by now.
func TestDeleted(t *testing.T) {
	dir, d := make8M(t)
	if err := os.Remove(d.File); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.File, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := loop.In(t.Context(), dir)
	if err != nil || len(got) != 1 || got[0].Path != d.Path || got[0].Name() != "file" || !got[0].Deleted() {
		t.Fatalf("got %+v, %v", got, err)
	}
	if err := got[0].Detach(t.Context(), time.Second, none); err != nil {
		t.Error(err)
	}
	wantDevices(t, dir)
}

// TestBounded: a call that does not come back is given up.
func TestBounded(t *testing.T) {
	forever := make(chan struct{})
	defer close(forever)
	err := loop.Bounded(t.Context(), 10*time.Millisecond, "the file", func() error { <-forever; return nil })
	if !errors.Is(err, backends.ErrUnavailable) || err.Error() != "the file does not answer: context deadline exceeded" {
		t.Errorf("got %v", err)
	}
}

func TestFUSEAt(t *testing.T) {
	if _, ok, err := loop.FUSEAt("/proc"); ok || err != nil {
		t.Errorf("/proc is FUSE's: %t, %v", ok, err)
	}
}
