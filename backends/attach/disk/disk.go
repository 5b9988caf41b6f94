// Package disk finds out about disks that a hypervisor shows this host: what their
// attributes are, which device node is which, and who has one open. It asks the kernel
// alone: udev and its links may not be there in a container, and may be old.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
)

// Kernel is where a host's kernel shows its disks.
type Kernel struct {
	Sysfs, Dev string // /sys and /dev, except in tests
	// Claimed says who has a device open; a test has devices of its own.
	Claimed func(path string) error
	// Node returns the number of the device that a path in Dev is, as sysfs writes it.
	Node func(path string) (string, error)
	// Opens is an error while a device cannot be opened: a disk is in sysfs and has its node
	// a moment before the kernel can open it, which is ENXIO until then.
	Opens func(path string) error
}

// Here is this host's.
func Here() Kernel {
	return Kernel{Sysfs: "/sys", Dev: "/dev", Claimed: Claimed, Node: number, Opens: opens}
}

// Gone says that err is what one sees of a device that has gone meanwhile.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

// Attr reads an attribute of a disk; empty if it is not there.
func (k Kernel) Attr(disk, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.Sysfs, "block", disk, name))
	if err != nil && !Gone(err) {
		return "", err
	}
	return strings.Trim(string(b), " \t\r\n"), nil
}

// Life tells a disk from an earlier one of the same name, by the number that sysfs gave
// its directory. Empty if it is gone.
func (k Kernel) Life(disk string) (string, error) {
	info, err := os.Stat(filepath.Join(k.Sysfs, "block", disk))
	if err != nil {
		if Gone(err) {
			err = nil
		}
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("%s has no number", disk)
	}
	number, err := k.Attr(disk, "dev")
	return fmt.Sprintf("%s:%s:%d", disk, number, stat.Ino), err
}

// Path returns the device node of a disk, after having made sure that it is of this disk.
// Which volume the disk is of has to be asked after that: both may have been replaced.
func (k Kernel) Path(disk string) (string, error) {
	path := filepath.Join(k.Dev, disk)
	number, err := k.Node(path)
	if err != nil {
		return "", err
	}
	want, err := k.Attr(disk, "dev")
	if err != nil {
		return "", err
	}
	if number != want {
		return "", fmt.Errorf("%s is device %s, and the kernel's %s is %s: the nodes in %s are not this kernel's", path, number, disk, want, k.Dev)
	}
	return path, nil
}

// number asks no file server and no program of FUSE, which may not answer.
func number(path string) (string, error) {
	var is unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &is)
	if err != nil {
		return "", &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if is.Mode&unix.S_IFMT != unix.S_IFBLK { // a character device may have the same number
		return "", fmt.Errorf("%s is no block device", path)
	}
	return fmt.Sprintf("%d:%d", is.Rdev_major, is.Rdev_minor), nil
}

func opens(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// Claimed is ErrInUse if a device is mounted, or open exclusively by anybody, or open
// by a process that is seen here.
func Claimed(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil && Gone(err):
		// A disk that is offline, too. The kernel looks for mounts and exclusive openers first;
		// others may have it open still.
	case err != nil:
		return fmt.Errorf("open %s: %w", path, err)
	default:
		if err := f.Close(); err != nil {
			return fmt.Errorf("close %s: %w", path, err)
		}
	}
	device, err := number(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	open, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return err
	}
	for _, fd := range open {
		if is, err := number(fd); err == nil && is == device {
			return fmt.Errorf("process %s has %s open: %w", strings.Split(fd, "/")[2], path, backends.ErrInUse)
		}
	}
	return nil
}
