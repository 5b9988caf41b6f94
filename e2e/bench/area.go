package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// area is the directory of a run, with all that is made in it.
type area struct {
	dir     string
	lock    *os.File // held while the run lives
	bareDir string   // files and mounts made by hand
	shared  string   // the loopback directory of all plugins
	hosts   []*host
	helpers []*exec.Cmd
}

const areaPrefix = "flocker-bench-"

// newArea makes the directory of a run, and removes those of killed ones.
func newArea(ctx context.Context, parent string) (*area, error) {
	parent, err := filepath.EvalSymlinks(parent)
	if err != nil {
		return nil, err
	}
	if err := sweep(ctx, parent); err != nil {
		return nil, fmt.Errorf("clean up after an earlier run: %w", err)
	}
	dir, err := os.MkdirTemp(parent, areaPrefix)
	if err != nil {
		return nil, err
	}
	a := &area{dir: dir, bareDir: filepath.Join(dir, "bare"), shared: filepath.Join(dir, "volumes")}
	if a.lock, err = lockArea(dir); err != nil {
		return nil, err
	}
	return a, errors.Join(os.Mkdir(a.bareDir, 0o700), os.Mkdir(a.shared, 0o700))
}

func lockArea(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// sweep removes what killed runs have left. Their plugins were killed with them.
func sweep(ctx context.Context, parent string) error {
	dirs, err := filepath.Glob(filepath.Join(parent, areaPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		lock, err := lockArea(dir)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // it still runs
		}
		if err != nil {
			return err
		}
		old := &area{dir: dir, lock: lock}
		if err := old.remove(ctx); err != nil {
			return err
		}
	}
	return nil
}

// remove ends the processes of a run and takes down all that is mounted, attached
// and written in its directory.
func (a *area) remove(ctx context.Context) error {
	for _, h := range a.hosts {
		h.stop(ctx)
	}
	for _, h := range a.helpers {
		_ = h.Process.Kill()
		_ = h.Wait()
	}
	if err := unmountBelow(ctx, a.dir); err != nil {
		return err
	}
	if err := detachBelow(ctx, a.dir); err != nil {
		return err
	}
	targets, err := filepath.Glob(filepath.Join(a.dir, "*", "mnt", "*"))
	if err != nil {
		return err
	}
	for _, target := range targets {
		if err := mutable(target); err != nil {
			return fmt.Errorf("make %s removable: %w", target, err)
		}
	}
	mounted, err := mountsBelow(a.dir)
	if err != nil || len(mounted) > 0 {
		return errors.Join(err, fmt.Errorf("still mounted: %v", mounted))
	}
	//nolint:forbidigo // the run's own directory, and nothing is mounted in it
	return errors.Join(os.RemoveAll(a.dir), a.lock.Close())
}

// mountsBelow returns what is mounted below a directory, oldest first.
func mountsBelow(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			found = append(found, fields[4])
		}
	}
	return found, nil
}

func unmountBelow(ctx context.Context, dir string) error {
	for {
		mounted, err := mountsBelow(dir)
		if err != nil || len(mounted) == 0 {
			return err
		}
		for i := range mounted {
			target := mounted[len(mounted)-1-i]
			if err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
				err = fmt.Errorf("unmount %s: %w", target, err)
				break
			}
		}
		if err != nil && !wait(ctx) {
			return err
		}
	}
}

// detachBelow detaches the loop devices whose files are below a directory.
func detachBelow(ctx context.Context, dir string) error {
	for {
		paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			return err
		}
		var left []string
		for _, path := range paths {
			ours := func() bool {
				file, err := os.ReadFile(path)
				return err == nil && strings.HasPrefix(string(file), dir+"/")
			}
			if !ours() {
				continue
			}
			device := "/dev/" + strings.Split(path, "/")[3]
			loop, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if errors.Is(err, unix.ENXIO) { // it is going
				left = append(left, device)
				continue
			}
			if err != nil {
				return fmt.Errorf("open %s: %w", device, err)
			}
			// While it is open it cannot become somebody else's.
			if ours() {
				left = append(left, device)
				err = unix.IoctlSetInt(loop, unix.LOOP_CLR_FD, 0)
			}
			if err := errors.Join(err, unix.Close(loop)); err != nil && !errors.Is(err, unix.ENXIO) {
				return fmt.Errorf("detach %s: %w", device, err)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if !wait(ctx) {
			return fmt.Errorf("detach %v: %w", left, context.Cause(ctx))
		}
	}
}

// mutable takes the flag from a directory that the plugin has made immutable.
func mutable(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	var flags int32
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_GETFLAGS, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return nil // a filesystem without flags
	}
	flags &^= immutable
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_SETFLAGS, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return errno
	}
	return nil
}

// wait lets a moment pass. False if ctx ended.
func wait(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(10 * time.Millisecond):
		return true
	}
}
