// Package loop makes a block device of a file: one that a program shows through FUSE, for
// kernels without a driver of their own for a storage, or one on a filesystem that hosts share.
//
// Such a file answers only as long as its program, or its server, does. So what there is
// comes from sysfs, and all that may wait for a file is bounded.
package loop

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Device is a loop device that has a file.
type Device struct {
	// Path is that of the device, /dev/loop3.
	Path string
	// File is the path of its file, as the kernel sees it.
	File string
}

// deleted is what the kernel adds to the path of a file that was deleted.
const deleted = " (deleted)"

// Name is the name of the file in its directory.
func (d Device) Name() string { return strings.TrimSuffix(filepath.Base(d.File), deleted) }

// Deleted says that the file has no name any more. Another may have it.
func (d Device) Deleted() bool { return strings.HasSuffix(d.File, deleted) }

// Devices returns the loop devices whose files are below a directory.
func Devices(dir string) ([]Device, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, unavailable(fmt.Errorf("find loop devices: %w", err))
	}
	var found []Device
	for _, entry := range entries {
		number, ok := strings.CutPrefix(entry.Name(), "loop")
		if _, err := strconv.Atoi(number); err != nil || !ok {
			continue
		}
		file, err := backing("/dev/" + entry.Name())
		if err != nil {
			return nil, unavailable(fmt.Errorf("find loop devices: %w", err))
		}
		if strings.HasPrefix(file, strings.TrimSuffix(dir, "/")+"/") {
			found = append(found, Device{Path: "/dev/" + entry.Name(), File: file})
		}
	}
	return found, nil
}

// In returns the loop devices whose files are, or were until they were deleted, in a directory.
//
// Once the mount namespace has ended in which a device was made, as with a container, the
// kernel shows only the end of what the file's path was in it. Other directories may have a
// file of that name, so the kernel is asked whether it is this one.
func In(ctx context.Context, dir string) ([]Device, error) {
	var found []Device
	err := Bounded(ctx, 30*time.Second, dir, func() error {
		dir, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return err
		}
		all, err := Devices("/")
		if err != nil {
			return err
		}
		for _, d := range all {
			path, shown := filepath.Join(dir, d.Name()), strings.TrimSuffix(d.File, deleted)
			here := path == shown || d.Deleted() && strings.HasSuffix(path, shown)
			if !here && strings.HasSuffix(path, shown) {
				if here, err = d.has(path); err != nil {
					return err
				}
			}
			if here {
				found = append(found, d)
			}
		}
		return nil
	})
	if err != nil {
		return nil, unavailable(fmt.Errorf("find loop devices of %s: %w", dir, err))
	}
	return found, nil
}

// has says whether this is the device's file, whatever path the kernel shows.
func (d Device) has(path string) (bool, error) {
	var file unix.Stat_t
	err := unix.Stat(path, &file)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	f, err := open(d.Path, os.O_RDONLY)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) {
		return false, nil // it has gone
	}
	if err != nil {
		return false, err
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	err = errors.Join(os.NewSyscallError("LOOP_GET_STATUS64", err), f.Close())
	if errors.Is(err, unix.ENXIO) {
		return false, nil // it has no file any more
	}
	return err == nil && info.Device == uint64(file.Dev) && info.Inode == file.Ino, err
}

// backing returns the file of a device; empty if it has none.
func backing(device string) (string, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	return strings.TrimSuffix(string(text), "\n"), err
}

// attempts bounds how often another device is tried: other programs take free ones, too.
const attempts = 50

// Attach makes a loop device of a file.
func Attach(ctx context.Context, file string) (Device, error) {
	d := Device{File: file}
	err := Bounded(ctx, 30*time.Second, file, func() error {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		d.Path, err = configure(f)
		return err
	})
	if err != nil {
		return Device{}, unavailable(fmt.Errorf("make a loop device of %s: %w", file, err))
	}
	return d, nil
}

func configure(f *os.File) (string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("this host has no usable loop devices; load the loop module (modprobe loop) "+
			"and let this process use /dev/loop*: %w", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO}}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(f.Name()))
	for try := 0; ; try++ {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		path := "/dev/loop" + strconv.Itoa(number)
		dev, err := open(path, os.O_RDWR)
		if err == nil {
			if err = unix.IoctlLoopConfigure(int(dev.Fd()), &config); err == nil {
				// "Read-only" outlives the file of a former user.
				err = os.NewSyscallError("BLKROSET", unix.IoctlSetPointerInt(int(dev.Fd()), unix.BLKROSET, 0))
				return path, errors.Join(err, dev.Close())
			}
			_ = dev.Close()
			err = &os.PathError{Op: "LOOP_CONFIGURE", Path: path, Err: err}
		}
		taken := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT)
		if !taken || try >= attempts {
			return "", err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
}

// open opens a loop device, and makes its node where nothing else does.
func open(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	text, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/dev")
	if err != nil {
		return nil, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("number of %s: %w", path, err)
	}
	err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return os.OpenFile(path, flags, 0)
}

// looks is how often a device may be found open, for half a second in all, to somebody who merely
// looks at it, as udev does. Counted, as a busy machine is slow to close things.
const looks = 12

// errBusy: somebody has the device open.
var errBusy = errors.New("open or mounted")

// Detach takes the file from the device and sees it gone; nil if it is gone already.
// ErrInUse, and it stays, if somebody has the device open or mounted. When nobody has,
// what it may still hold is written; if that takes longer than hang, stuck is called,
// which makes all I/O of the file fail.
func (d Device) Detach(ctx context.Context, hang time.Duration, stuck func()) error {
	for look, pause := 1, time.Millisecond; ; look, pause = look+1, min(2*pause, 100*time.Millisecond) {
		file, err := backing(d.Path)
		if err != nil {
			return unavailable(err)
		}
		if file != d.File {
			return nil
		}
		err = Bounded(ctx, hang+10*time.Second, d.Path, func() error { return d.release(hang, stuck) })
		switch {
		case err == nil:
			return d.gone(ctx)
		case !errors.Is(err, errBusy):
			return unavailable(fmt.Errorf("detach %s: %w", d.Path, err))
		case look >= looks:
			return fmt.Errorf("%s is open or mounted: %w", d.Path, backends.ErrInUse)
		}
		if err := poll.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// release lets go of the file if nobody else has the device open.
func (d Device) release(hang time.Duration, stuck func()) error {
	// Exclusively: fails while it is mounted, in whatever mount namespace.
	f, err := open(d.Path, os.O_RDWR|unix.O_EXCL)
	switch {
	case errors.Is(err, unix.EBUSY):
		return errBusy
	case errors.Is(err, unix.ENXIO):
		return nil // it is going already
	case err != nil:
		return err
	}
	timer := time.AfterFunc(hang, stuck)
	defer timer.Stop()
	err = d.clear(f)
	return errors.Join(err, f.Close())
}

func (d Device) clear(f *os.File) error {
	if file, err := backing(d.Path); err != nil || file != d.File {
		return err // another's by now
	}
	// Whoever mounted it has seen to what must not be lost. One that was cut off takes
	// nothing any more.
	_ = f.Sync()
	_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		return os.NewSyscallError("LOOP_CLR_FD", err)
	}
	// With another opener the kernel only takes a note to do it after the last one has
	// gone. Take that back: a volume that is in use stays attached.
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err == nil {
		info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopSetStatus64(int(f.Fd()), info)
	}
	if err != nil {
		return fmt.Errorf("%s is open, and the kernel will detach it when it is closed: %w", d.Path, err)
	}
	return errBusy
}

// gone waits until the kernel has let go of the file.
func (d Device) gone(ctx context.Context) error {
	for started := time.Now(); ; {
		file, err := backing(d.Path)
		if err == nil && file != d.File {
			return nil
		}
		if time.Since(started) > 5*time.Second {
			return errors.Join(fmt.Errorf("the kernel does not let go of %s: %w", d.Path, backends.ErrInUse), err)
		}
		if err := poll.Sleep(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}

// Grow waits until the file has at least this size, and makes the device as large.
func (d Device) Grow(ctx context.Context, size int64) error {
	err := Bounded(ctx, 30*time.Second, d.File, func() error {
		for started := time.Now(); ; {
			info, err := os.Stat(d.File) // the kernel remembers it for a second or so
			if err != nil {
				return err
			}
			if info.Size() >= size {
				break
			}
			if time.Since(started) > 10*time.Second {
				return fmt.Errorf("it has %d bytes, not %d", info.Size(), size)
			}
			time.Sleep(50 * time.Millisecond)
		}
		f, err := open(d.Path, os.O_RDWR)
		if err != nil {
			return err
		}
		err = os.NewSyscallError("LOOP_SET_CAPACITY", unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0))
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return unavailable(fmt.Errorf("grow %s: %w", d.Path, err))
	}
	return nil
}

// Size returns the size of the device in bytes.
func (d Device) Size() (int64, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path) + "/size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return sectors * 512, err
}

// Bounded makes a call that may wait for a program that does not answer, and gives it up
// after a time.
func Bounded(ctx context.Context, limit time.Duration, what string, call func() error) error {
	answer := make(chan error, 1)
	go func() { answer <- call() }()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return unavailable(fmt.Errorf("%s does not answer: %w", what, ctx.Err()))
	}
}

func unavailable(err error) error {
	if errors.Is(err, backends.ErrInUse) || errors.Is(err, backends.ErrUnavailable) {
		return err
	}
	return backends.Classify(backends.ErrUnavailable, err)
}
