package ebs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/flocker-plugin/flocker/backends"
)

// kernel is what this host's kernel knows of EBS volumes. It asks sysfs alone: udev
// and its links may not be there in a container, and may be old.
type kernel struct {
	sysfs, dev string // /sys and /dev, except in tests
	// claimed says who has a device open; a test has devices of its own.
	claimed func(path string) error
	// node returns the number of the device that a path in dev is, as sysfs writes it.
	node func(path string) (string, error)
}

func newKernel() kernel {
	return kernel{sysfs: "/sys", dev: "/dev", claimed: claimed, node: deviceNumber}
}

// device is a block device of an EBS volume.
type device struct {
	name string // nvme1n1
	// volume is the volume's id by the device's own serial number; empty for one of
	// the Xen hypervisor, which has none.
	volume string
	// life tells this device from an earlier one of the same name.
	life string
}

var (
	nvmeDisk  = regexp.MustCompile(`^nvme[0-9]+(c[0-9]+)?n[0-9]+$`)
	xenDisk   = regexp.MustCompile(`^xvd[a-z]{1,2}$`)
	nvmeVol   = regexp.MustCompile(`^vol-?([0-9a-f]{8,17})$`)
	nvmeModel = "Amazon Elastic Block Store"
)

// devices returns every EBS volume that the kernel shows.
func (k kernel) devices() ([]device, error) {
	disks, err := os.ReadDir(filepath.Join(k.sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []device
	for _, disk := range disks {
		d := device{name: disk.Name()}
		switch {
		case nvmeDisk.MatchString(d.name):
			if d.volume, err = k.serial(d.name); err == nil && d.volume == "" {
				continue // an instance store, or gone
			}
		case xenDisk.MatchString(d.name):
			var alias string
			if alias, err = k.attr(d.name, "device/modalias"); err == nil && !strings.HasPrefix(alias, "xen:vbd") {
				continue
			}
		default:
			continue
		}
		if err == nil {
			d.life, err = k.life(d.name)
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

// gone says that err is what one sees of a device that has gone meanwhile.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

// attr reads an attribute of a disk; empty if it is not there.
func (k kernel) attr(disk, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.sysfs, "block", disk, name))
	if err != nil && !gone(err) {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// serial returns the id of the volume that an NVMe disk says it is; empty if it is
// none of EBS, or gone.
func (k kernel) serial(disk string) (string, error) {
	model, err := k.attr(disk, "device/model")
	if err != nil || model != nvmeModel {
		return "", err
	}
	serial, err := k.attr(disk, "device/serial")
	if m := nvmeVol.FindStringSubmatch(serial); m != nil {
		return "vol-" + m[1], err
	}
	return "", err
}

// life is the number that sysfs gave the disk's directory: another disk of the same
// name has another. Empty if it is gone.
func (k kernel) life(disk string) (string, error) {
	info, err := os.Stat(filepath.Join(k.sysfs, "block", disk))
	if err != nil {
		if gone(err) {
			err = nil
		}
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("%s has no number", disk)
	}
	number, err := k.attr(disk, "dev")
	return fmt.Sprintf("%s:%s:%d", disk, number, stat.Ino), err
}

// path returns the device node of a disk, after having made sure that it is of this
// disk, and that the disk is of this volume: both may have been replaced since.
func (k kernel) path(d device) (string, error) {
	path := filepath.Join(k.dev, d.name)
	number, err := k.node(path)
	if err != nil {
		return "", err
	}
	want, err := k.attr(d.name, "dev")
	if err != nil {
		return "", err
	}
	if number != want {
		return "", fmt.Errorf("%s is device %s, and the kernel's %s is %s: the nodes in %s are not this kernel's", path, number, d.name, want, k.dev)
	}
	if serial, err := k.serial(d.name); err != nil || serial != d.volume {
		return "", fmt.Errorf("%s is not %s any more", path, d.volume)
	}
	return path, nil
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

// claimed is ErrInUse if a device is mounted, or open exclusively by anybody, or
// open by a process that is seen here.
func claimed(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
	case err != nil && gone(err):
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
