package disk_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

func makeLoop(t *testing.T) loop.Device {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.Background(), time.Second, func() {}); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Whether a disk is in use is known although a process has a file open whose filesystem does not
// answer.
func TestClaimedBesideSilence(t *testing.T) {
	backendtest.NeedRoot(t)
	d, dir := makeLoop(t), t.TempDir()
	program, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0) // reads no request
	if err != nil {
		t.Fatal(err)
	}
	silent := filepath.Join(dir, "silent")
	if err := os.Mkdir(silent, 0o700); err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", program.Fd())
	if err := unix.Mount("silent", silent, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Fatal(err)
	}
	open, err := unix.Open(silent, unix.O_PATH|unix.O_CLOEXEC, 0)
	loop.Unmount(silent)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(open)
	defer program.Close() // which ends what still waits for it

	answer := make(chan error, 1)
	go func() { answer <- disk.Claimed(d.Path) }()
	select {
	case err := <-answer:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("it waits for the filesystem")
	}
}

// A character device that has the number of a disk is another thing.
func TestClaimedBesideACharacterDevice(t *testing.T) {
	backendtest.NeedRoot(t)
	d := makeLoop(t)
	var is unix.Stat_t
	if err := unix.Stat(d.Path, &is); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), "node")
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(is.Rdev)); err != nil {
		t.Fatal(err)
	}
	open, err := unix.Open(node, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(open)
	if err := disk.Claimed(d.Path); err != nil {
		t.Error(err)
	}
}

// A disk that cannot be opened any more, as one that is offline, is in use while somebody has
// it open from before.
func TestClaimedThoughGone(t *testing.T) {
	backendtest.NeedRoot(t)
	node := filepath.Join(t.TempDir(), "node")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(60, 1))); err != nil { // no driver's
		t.Fatal(err)
	}
	if _, err := os.Open(node); !errors.Is(err, unix.ENXIO) {
		t.Fatalf("open: got %v", err)
	}
	open, err := unix.Open(node, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("process %d has %s open: in use", os.Getpid(), node)
	if err := disk.Claimed(node); !errors.Is(err, backends.ErrInUse) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := unix.Close(open); err != nil {
		t.Fatal(err)
	}
	if err := disk.Claimed(node); err != nil {
		t.Error(err)
	}
}
