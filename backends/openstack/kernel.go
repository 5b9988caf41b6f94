package openstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// kernel is what this host's kernel knows of Cinder's volumes.
type kernel struct{ disk.Kernel }

// device is a block device that a hypervisor shows for a Cinder volume.
type device struct {
	name string // vdb
	// serial is the volume's id, or how much of it fits: 20 characters of virtio.
	serial string
	// life tells this device from an earlier one of the same name.
	life string
	// xen is a disk of Xen, which has a place instead of a serial number: see xen.go.
	xen   bool
	place int
}

// of says that the device is a volume's.
func (d device) of(id string) bool { return !d.xen && strings.HasPrefix(id, d.serial) }

var (
	// Not nvme0c0n1, a path to a disk with multipath, which has no node in /dev.
	diskForm   = regexp.MustCompile(`^(vd[a-z]+|sd[a-z]+|nvme[0-9]+n[0-9]+)$`)
	serialForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f-]{1,17}$`)
)

// devices returns every disk whose serial number is that of a Cinder volume.
func (k kernel) devices() ([]device, error) {
	disks, err := os.ReadDir(filepath.Join(k.Sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []device
	for _, entry := range disks {
		d := device{name: entry.Name()}
		if !diskForm.MatchString(d.name) {
			continue
		}
		if d.serial, err = k.serial(d.name); err == nil && d.serial == "" {
			continue // another kind of disk, or gone
		}
		if err == nil {
			d.life, err = k.Life(d.name)
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
func (k kernel) serial(name string) (string, error) {
	attrs := []string{"serial", "device/serial"} // of virtio, and of NVMe
	if strings.HasPrefix(name, "sd") {
		attrs = []string{"device/vpd_pg80"}
	}
	for _, attr := range attrs {
		text, err := k.Attr(name, attr)
		if err != nil {
			return "", err
		}
		if attr == "device/vpd_pg80" && len(text) > 4 {
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
	path, err := k.Path(d.name)
	if err != nil {
		return "", err
	}
	if d.xen {
		if life, err := k.Life(d.name); err != nil || life != d.life {
			return "", fmt.Errorf("%s is another disk by now", path)
		}
		return path, nil
	}
	if serial, err := k.serial(d.name); err != nil || serial != d.serial {
		return "", fmt.Errorf("%s is not %s any more", path, d.serial)
	}
	return path, nil
}

// size is how many bytes a disk has.
func (k kernel) size(name string) (int64, error) {
	text, err := k.Attr(name, "size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(text, 10, 64)
	return sectors * 512, err
}

// glanced is what claimed says when somebody who merely looks at a device, as udev and
// losetup do, has had the time to close it.
func glanced(ctx context.Context, claimed func(path string) error, path string) error {
	for looks := 1; ; looks++ { // counted, as a busy machine is slow to close things
		err := claimed(path)
		if !errors.Is(err, backends.ErrInUse) || looks > 25 {
			return err
		}
		if err := poll.Sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// hasXen says that this host has disks of Xen.
func (k kernel) hasXen() bool {
	found, _ := filepath.Glob(filepath.Join(k.Sysfs, "block", "xvd*"))
	return len(found) > 0
}
