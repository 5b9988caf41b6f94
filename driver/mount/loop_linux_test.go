package mount_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// need skips a test that lacks what it needs, and fails it where the environment
// variable REQUIRE says that it must not be skipped.
func need(tb testing.TB, what string, ok bool, why string) {
	tb.Helper()
	switch {
	case ok:
	case slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), what):
		tb.Fatalf("REQUIRE=%s: %s", what, why)
	default:
		tb.Skip(why)
	}
}

func needRoot(tb testing.TB) {
	tb.Helper()
	need(tb, "root", os.Geteuid() == 0, "needs root")
	_, err := os.Stat("/dev/loop-control")
	need(tb, "root", err == nil, "needs /dev/loop-control")
}

// newFile returns a sparse file.
func newFile(tb testing.TB, size int64) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		tb.Fatal(err)
	}
	return path
}

// attach is the bare system calls.
func attach(tb testing.TB, file string) (device string) {
	tb.Helper()
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer control.Close()
	for range 50 { // others take free devices at the same time
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.LOOP_CTL_GET_FREE, 0)
		if errno != 0 {
			tb.Fatalf("find a free loop device: %v", errno)
		}
		device = fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		config := unix.LoopConfig{Fd: uint32(backing.Fd())}
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.LOOP_CONFIGURE, uintptr(unsafe.Pointer(&config)))
		dev.Close()
		if errno == 0 {
			return device
		}
		if !errors.Is(errno, unix.EBUSY) {
			tb.Fatalf("configure %s: %v", device, errno)
		}
	}
	tb.Fatal("no free loop device")
	return ""
}

// backing returns the file behind a loop device, "" if there is none.
func backing(device string) string {
	b, _ := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
	return strings.TrimSpace(string(b))
}

func detach(tb testing.TB, device, file string) {
	tb.Helper()
	if err := clearLoop(device); err != nil {
		tb.Errorf("detach %s: %v", device, err)
	}
	for range 3000 { // somebody who looks at all devices may have it open
		if backing(device) != file {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Errorf("%s is still attached to %s: something leaked", device, file)
}

func clearLoop(device string) error {
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.LOOP_CLR_FD, 0); errno != 0 {
		return errno
	}
	return nil
}

// grow makes a loop device larger.
func grow(tb testing.TB, device, file string, size int64) {
	tb.Helper()
	if err := os.Truncate(file, size); err != nil {
		tb.Fatal(err)
	}
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer dev.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.LOOP_SET_CAPACITY, 0); errno != 0 {
		tb.Fatal(errno)
	}
}
