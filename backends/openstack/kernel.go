package openstack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// kernel is what this host's kernel knows of Cinder's volumes. It asks sysfs alone:
// udev and its links may not be there in a container, and may be old.
type kernel struct {
	sysfs, dev string // /sys and /dev, except in tests
	// claimed says who has a device open; a test has devices of its own.
	claimed func(path string) error
	// node returns the number of the device that a path in dev is, as sysfs writes it.
	node func(path string) (string, error)
}

// device is a block device that a hypervisor shows for a Cinder volume.
type device struct {
	name string // vdb
	// serial is the volume's id, or how much of it fits: 20 characters of virtio.
	serial string
	// life tells this device from an earlier one of the same name.
	life string
}

// of says that the device is a volume's.
func (d device) of(id string) bool { return strings.HasPrefix(id, d.serial) }

var (
	diskForm   = regexp.MustCompile(`^(vd[a-z]+|sd[a-z]+|nvme[0-9]+(c[0-9]+)?n[0-9]+)$`)
	serialForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f-]{1,17}$`)
)

// devices returns every disk whose serial number is that of a Cinder volume.
func (k kernel) devices() ([]device, error) {
	disks, err := os.ReadDir(filepath.Join(k.sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []device
	for _, disk := range disks {
		d := device{name: disk.Name()}
		if !diskForm.MatchString(d.name) {
			continue
		}
		if d.serial, err = k.serial(d.name); err == nil && d.serial == "" {
			continue // another kind of disk, or gone
		}
		if err == nil {
			d.life, err = life(k.sysfs, d.name)
		}
		if err != nil {
			return nil, fmt.Errorf("list block devices: %w", err)
		}
		if d.life != "" {
			found = append(found, d)
		}
	}
	return found, nil
}

// serial returns the serial number that a disk says it has, if a volume has such a
// one; empty also if the disk is gone.
func (k kernel) serial(disk string) (string, error) {
	names := []string{"serial", "device/serial"} // of virtio, and of NVMe
	if strings.HasPrefix(disk, "sd") {
		names = []string{"device/vpd_pg80"}
	}
	for _, name := range names {
		text, err := attr(k.sysfs, disk, name)
		if err != nil {
			return "", err
		}
		if name == "device/vpd_pg80" && len(text) > 4 {
			text = strings.TrimSpace(text[4:]) // after the page's header
		}
		if serialForm.MatchString(text) {
			return text, nil
		}
	}
	return "", nil
}

// path returns the device node of a disk, after having made sure that it is of this
// disk, and that the disk is of this volume: both may have been replaced since.
func (k kernel) path(d device) (string, error) {
	path := filepath.Join(k.dev, d.name)
	number, err := k.node(path)
	if err != nil {
		return "", err
	}
	want, err := attr(k.sysfs, d.name, "dev")
	if err != nil {
		return "", err
	}
	if number != want {
		return "", fmt.Errorf("%s is device %s, and the kernel's %s is %s: the nodes in %s are not this kernel's", path, number, d.name, want, k.dev)
	}
	if serial, err := k.serial(d.name); err != nil || serial != d.serial {
		return "", fmt.Errorf("%s is not %s any more", path, d.serial)
	}
	return path, nil
}

// size is how many bytes a disk has.
func size(sysfs, disk string) (int64, error) {
	text, err := attr(sysfs, disk, "size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(text, 10, 64)
	return sectors * 512, err
}

// vanished says that err is what one sees of a device that has gone meanwhile.
func vanished(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

// attr reads an attribute of a disk; empty if it is not there.
func attr(sysfs, disk, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysfs, "block", disk, name))
	if err != nil && !vanished(err) {
		return "", err
	}
	return strings.Trim(string(b), " \t\r\n"), nil
}

// life is the number that sysfs gave the disk's directory: another disk of the same
// name has another. Empty if it is gone.
func life(sysfs, disk string) (string, error) {
	info, err := os.Stat(filepath.Join(sysfs, "block", disk))
	if err != nil {
		if vanished(err) {
			err = nil
		}
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("%s has no number", disk)
	}
	number, err := attr(sysfs, disk, "dev")
	return fmt.Sprintf("%s:%s:%d", disk, number, stat.Ino), err
}

func deviceNumber(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeDevice == 0 {
		return "", fmt.Errorf("%s is no device", path)
	}
	rdev := uint64(stat.Rdev) //nolint:unconvert // it is 32 bits wide elsewhere
	major := rdev>>8&0xfff | rdev>>32&^uint64(0xfff)
	minor := rdev&0xff | rdev>>12&^uint64(0xff)
	return fmt.Sprintf("%d:%d", major, minor), nil
}

// glanced is what claimed says when somebody who merely looks at a device, as udev and
// losetup do, has had the time to close it.
func glanced(ctx context.Context, claimed func(path string) error, path string) error {
	for looks := 1; ; looks++ { // counted, as a busy machine is slow to close things
		err := claimed(path)
		if !errors.Is(err, backends.ErrInUse) || looks > 25 {
			return err
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// claimed is ErrInUse if a device is mounted, or open exclusively by anybody, or open
// by a process that is seen here.
func claimed(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
	case err != nil && vanished(err):
		return nil
	case err != nil:
		return fmt.Errorf("open %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", path, err)
	}
	number, err := deviceNumber(path)
	if err != nil {
		return err
	}
	open, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return err
	}
	for _, fd := range open {
		if is, err := deviceNumber(fd); err == nil && is == number {
			return fmt.Errorf("process %s has %s open: %w", strings.Split(fd, "/")[2], path, backends.ErrInUse)
		}
	}
	return nil
}
