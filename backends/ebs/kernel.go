package ebs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/flocker-plugin/flocker/backends/attach/disk"
)

// kernel is what this host's kernel knows of EBS volumes.
type kernel struct{ disk.Kernel }

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
	// Not nvme0c0n1, a path to a disk with multipath, which has no node in /dev.
	nvmeDisk  = regexp.MustCompile(`^nvme[0-9]+n[0-9]+$`)
	xenDisk   = regexp.MustCompile(`^xvd[a-z]{1,2}$`)
	nvmeVol   = regexp.MustCompile(`^vol-?([0-9a-f]{8,17})$`)
	nvmeModel = "Amazon Elastic Block Store"
)

// devices returns every EBS volume that the kernel shows.
func (k kernel) devices() ([]device, error) {
	disks, err := os.ReadDir(filepath.Join(k.Sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []device
	for _, entry := range disks {
		d := device{name: entry.Name()}
		switch {
		case nvmeDisk.MatchString(d.name):
			if d.volume, err = k.serial(d.name); err == nil && d.volume == "" {
				continue // an instance store, or gone
			}
		case xenDisk.MatchString(d.name):
			var alias string
			if alias, err = k.Attr(d.name, "device/modalias"); err == nil && !strings.HasPrefix(alias, "xen:vbd") {
				continue
			}
		default:
			continue
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

// serial returns the id of the volume that an NVMe disk says it is; empty if it is
// none of EBS, or gone.
func (k kernel) serial(name string) (string, error) {
	model, err := k.Attr(name, "device/model")
	if err != nil || model != nvmeModel {
		return "", err
	}
	serial, err := k.Attr(name, "device/serial")
	if m := nvmeVol.FindStringSubmatch(serial); m != nil {
		return "vol-" + m[1], err
	}
	return "", err
}

// path returns the device node of a disk, after having made sure that it is of this
// disk, and that the disk is of this volume: both may have been replaced since.
func (k kernel) path(d device) (string, error) {
	path, err := k.Path(d.name)
	if err != nil {
		return "", err
	}
	if serial, err := k.serial(d.name); err != nil || serial != d.volume {
		return "", fmt.Errorf("%s is not %s any more", path, d.volume)
	}
	return path, nil
}
