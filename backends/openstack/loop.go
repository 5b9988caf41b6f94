package openstack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
)

// loops makes block devices of the files that Cinder's NFS volumes are.
type loops struct {
	shares map[string]string // where a share is mounted here
}

var idInName = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// devices returns the loop devices whose file is on one of the shares, whoever has made
// them.
func (l loops) devices() ([]block, error) {
	all, err := l.all()
	var found []block
	for _, d := range all {
		found = append(found, d.block)
	}
	return found, err
}

// loop is a loop device with a volume's file.
type loop struct {
	block
	file string
}

func (l loops) all() ([]loop, error) {
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []loop
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil && disk.Gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find loop devices: %w", err)
		}
		var d loop
		d.file = l.mine(strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), " (deleted)"))
		if d.volume = idInName.FindString(filepath.Base(d.file)); d.volume == "" {
			continue
		}
		info, err := os.Stat(filepath.Dir(name)) // made anew with each file
		if err != nil {
			continue
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil, fmt.Errorf("%s has no number", name)
		}
		d.path = "/dev/" + strings.Split(name, "/")[3]
		d.life = fmt.Sprintf("%s:%d:%s", d.path, stat.Ino, d.file)
		found = append(found, d)
	}
	return found, nil
}

// mine returns the path of a file that is on one of the shares, and "" for others. Once
// the mount namespace has ended in which the device was made, as with a container, the kernel shows
// only the end of what the path was in it.
func (l loops) mine(shown string) string {
	for _, dir := range l.shares {
		if at, err := filepath.EvalSymlinks(dir); err == nil {
			if file := filepath.Join(at, filepath.Base(shown)); strings.HasPrefix(shown, "/") && strings.HasSuffix(file, shown) {
				return file
			}
		}
	}
	return ""
}

// find returns the loop device of a volume, if there is one.
func (l loops) find(id string) (loop, bool, error) {
	all, err := l.all()
	i := slices.IndexFunc(all, func(d loop) bool { return d.volume == id })
	if err != nil || i < 0 {
		return loop{}, false, err
	}
	return all[i], true, nil
}

func (l loops) connect(ctx context.Context, to connection) (block, error) {
	d, err := l.attach(ctx, to.volume, to.info)
	return d.block, err
}

// attach makes a loop device of the file that Cinder names.
func (l loops) attach(ctx context.Context, id string, info map[string]any) (loop, error) {
	file, err := l.file(id, info)
	if err != nil {
		return loop{}, err
	}
	if d, ok, err := l.find(id); ok || err != nil {
		if ok && d.file != file {
			err = fmt.Errorf("%s has %s, and Cinder says %s: %w", d.path, d.file, file, backends.ErrInUse)
		}
		return d, err
	}
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", file).CombinedOutput()
	if err != nil {
		return loop{}, fmt.Errorf("make a loop device of %s: %w (%s): %w", file, err, strings.TrimSpace(string(out)), backends.ErrUnavailable)
	}
	d, ok, err := l.find(id)
	if err == nil && (!ok || d.path != strings.TrimSpace(string(out)) || d.file != file) {
		err = fmt.Errorf("losetup has made %s of %s, and the kernel says %s of %s: %w", strings.TrimSpace(string(out)), file, d.path, d.file, backends.ErrUnavailable)
	}
	return d, err
}

// file returns the path on this host of the file that Cinder names.
func (l loops) file(id string, info map[string]any) (string, error) {
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
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", fmt.Errorf("share %s is not mounted here: %w; %w", share, err, backends.ErrUnavailable)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("volume %s is not to be seen on this host; is share %s mounted at %s? %w; %w", id, share, dir, err, backends.ErrUnavailable)
	}
	return path, nil
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

// disconnect removes a volume's loop device. The kernel does it later if somebody has it
// open, which is no detach.
func (l loops) disconnect(ctx context.Context, b block, pace pace) (clean bool, err error) {
	for started, asked := time.Now(), false; ; {
		late := time.Since(started) > pace.device
		d, ok, err := l.find(b.volume)
		if err != nil || !ok {
			return err == nil, err
		}
		if err := glanced(ctx, disk.Claimed, d.path); err != nil {
			return false, err
		}
		if !asked {
			out, err := exec.CommandContext(ctx, "losetup", "--detach", d.path).CombinedOutput()
			if err != nil && ctx.Err() == nil {
				return false, fmt.Errorf("detach %s: %w (%s): %w", d.path, err, strings.TrimSpace(string(out)), backends.ErrUnavailable)
			}
			asked = true
		}
		if late {
			return false, fmt.Errorf("%s still has its file: %w", d.path, backends.ErrInUse)
		}
		if err := sleep(ctx, pace.first/5); err != nil {
			return false, err
		}
	}
}
