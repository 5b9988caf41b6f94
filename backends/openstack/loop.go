package openstack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
)

// loops makes block devices of the files that Cinder's NFS volumes are.
type loops struct {
	shares map[string]string // where a share is mounted here
}

var idInName = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// devices returns the loop devices whose file is on one of the shares, whoever has made
// them.
func (l loops) devices(ctx context.Context) ([]block, error) {
	all, err := l.all(ctx)
	var found []block
	for _, d := range all {
		if b, ok := d.block(); ok {
			found = append(found, b)
		}
	}
	return found, err
}

// loopDevice is a loop device with a volume's file.
type loopDevice struct {
	loop.Device
	volume string
}

func (l loops) all(ctx context.Context) ([]loopDevice, error) {
	var found []loopDevice
	for _, dir := range l.shares {
		devices, err := loop.In(ctx, dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the share is not mounted here
		}
		if err != nil {
			return nil, err
		}
		for _, d := range devices {
			is := loopDevice{d, idInName.FindString(d.Name())}
			if is.volume != "" && !slices.Contains(found, is) { // a share may have two names
				found = append(found, is)
			}
		}
	}
	return found, nil
}

// block is the device for a Connector; not ok if it has gone.
func (d loopDevice) block() (b block, ok bool) {
	info, err := os.Stat("/sys/block/" + filepath.Base(d.Path) + "/loop") // made anew with each file
	if err != nil {
		return block{}, false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return block{}, false
	}
	return block{path: d.Path, volume: d.volume, life: fmt.Sprintf("%s:%d:%s", d.Path, stat.Ino, d.Name())}, true
}

// connect makes a loop device of the file that Cinder names.
func (l loops) connect(ctx context.Context, to connection) (block, error) {
	file, err := l.file(ctx, to.volume, to.info)
	if err != nil {
		return block{}, err
	}
	d, ok, err := l.of(ctx, to.volume, file)
	if err == nil && !ok {
		d.volume = to.volume
		d.Device, err = loop.Attach(ctx, file)
	}
	if err != nil {
		return block{}, err
	}
	b, ok := d.block()
	if !ok {
		return block{}, fmt.Errorf("%s has lost its file %s: %w", d.Path, file, backends.ErrUnavailable)
	}
	return b, nil
}

// of returns the loop device of a volume's file, if there is one. It is an error if one has
// another file of that volume.
func (l loops) of(ctx context.Context, volume, file string) (loopDevice, bool, error) {
	here, err := loop.In(ctx, filepath.Dir(file))
	if err != nil {
		return loopDevice{}, false, err
	}
	all, err := l.all(ctx)
	var found loopDevice
	for _, d := range all {
		switch {
		case d.volume != volume:
		case slices.Contains(here, d.Device) && d.Name() == filepath.Base(file) && !d.Deleted():
			found = d
		default:
			return d, false, fmt.Errorf("%s has %s, and Cinder says %s: %w", d.Path, d.File, file, backends.ErrInUse)
		}
	}
	return found, found.Path != "", err
}

// file returns the path on this host of the file that Cinder names.
func (l loops) file(ctx context.Context, id string, info map[string]any) (string, error) {
	if err := of(id, info, "nfs"); err != nil {
		return "", err
	}
	share, name, format := text(info, "export"), text(info, "name"), text(info, "format")
	dir, ok := l.shares[share]
	switch {
	case !ok:
		return "", fmt.Errorf("volume %s is on share %q, and the setting shares does not say where that is mounted here: %w", id, share, backends.ErrInvalid)
	case format != "" && format != "raw":
		return "", fmt.Errorf("volume %s is a file of format %s, as after a snapshot; only raw ones can be attached: %w", id, format, backends.ErrInvalid)
	case name != filepath.Base(name) || idInName.FindString(name) != id:
		return "", fmt.Errorf("volume %s has the file name %q, which is not made of its id (Cinder's volume_name_template): %w", id, name, backends.ErrInvalid)
	}
	answer := make(chan string, 1)
	err := loop.Bounded(ctx, 30*time.Second, "share "+share, func() error {
		at, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return fmt.Errorf("share %s is not mounted here: %w; %w", share, err, backends.ErrUnavailable)
		}
		path := filepath.Join(at, name)
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("volume %s is not to be seen on this host; is share %s mounted at %s? %w; %w", id, share, at, err, backends.ErrUnavailable)
		}
		answer <- path
		return nil
	})
	if err != nil {
		return "", err
	}
	return <-answer, nil
}

// of is an error if a volume is on another kind of storage than this host is set up for.
func of(id string, info map[string]any, kind string) error {
	if is := text(info, "driver_volume_type"); is != kind {
		return fmt.Errorf("%s has volume %s on a storage of kind %q, and this host is set up to attach %s: set volume_type to a type of that kind, "+
			"or use attach: nova: %w", volumes, id, is, kind, backends.ErrInvalid)
	}
	return nil
}

// text is a value of what Cinder says of a connection.
func text(info map[string]any, key string) string {
	s, _ := info[key].(string)
	return s
}

// lock implements storage: one process at a time makes loop devices of a host.
func (l loops) lock(context.Context, string) (unlock func(), err error) { return func() {}, nil }

// served implements storage.
func (l loops) served(block) (bool, error) { return true, nil }

// disconnect removes a volume's loop device.
func (l loops) disconnect(ctx context.Context, b block, pace pace) (clean bool, err error) {
	all, err := l.all(ctx)
	for _, d := range all {
		if d.volume == b.volume && err == nil {
			err = d.Detach(ctx, pace.device, func() {})
		}
	}
	return err == nil, err
}
