// Package links keeps notes, and files, in a directory that hosts share. A note is
// JSON in the text of a symbolic link. Making one is a single step on any filesystem, also
// where hosts do not share locks: one of them succeeds, and nobody sees a part of it.
package links

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
)

// Mark is the name of a link whose text says which directory it is. An administrator makes
// it; where it is not, the directory is not mounted.
const Mark = ".flocker-share"

// Dir is a directory, as one host sees it.
type Dir struct {
	Path string

	locks sync.Map // by subject
}

// Do makes a call about what ref names, which has one call at a time. ref is <mark>/<id>, or
// /<id> for whatever the mark is; the call gets it with the mark. An error of the filesystem
// is ErrUnavailable. The call is given up with ctx: a file server may keep it waiting for ever.
func Do[T any](ctx context.Context, d *Dir, what, ref string, call func(ref string) (T, error)) (T, error) {
	var none, result T
	mark, id, _ := strings.Cut(ref, "/")
	err := ctx.Err()
	if err == nil {
		err = loop.Bounded(ctx, time.Minute, d.Path, func() error {
			lock, _ := d.locks.LoadOrStore(id, &sync.Mutex{})
			lock.(*sync.Mutex).Lock()
			defer lock.(*sync.Mutex).Unlock()
			here, err := os.Readlink(filepath.Join(d.Path, Mark))
			switch {
			case err != nil:
				return fmt.Errorf("is %s mounted? If it is a new one, type: ln -s $(uuidgen) %[1]s/%s: %w", d.Path, Mark, err)
			case mark != "" && mark != here:
				return fmt.Errorf("%s is in the shared directory %s, and %s is %s: %w", id, mark, d.Path, here, backends.ErrUnavailable)
			case ctx.Err() != nil: // nobody waits for it any more
				return ctx.Err()
			}
			result, err = call(here + "/" + id)
			return err
		})
	}
	switch {
	case err == nil:
		return result, nil
	case errors.As(err, new(*fs.PathError)), errors.As(err, new(*os.LinkError)):
		err = backends.Classify(backends.ErrUnavailable, err)
	}
	return none, fmt.Errorf("%s: %w", what, err)
}

// Make makes a note, unless there is one of that name, and returns which there is then.
func Make[T any](d *Dir, name string, note T) (is T, err error) {
	text, err := json.Marshal(note)
	for err == nil {
		err = os.Symlink(string(text), filepath.Join(d.Path, name))
		if err == nil {
			return note, d.sync()
		}
		if !errors.Is(err, fs.ErrExist) {
			break
		}
		if is, err = Read[T](d, name); !errors.Is(err, backends.ErrNotFound) {
			break
		}
		time.Sleep(time.Millisecond) // it was removed meanwhile
		err = nil
	}
	return is, err
}

// Read returns a note. ErrNotFound if there is none.
func Read[T any](d *Dir, name string) (note T, err error) {
	text, err := os.Readlink(filepath.Join(d.Path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return note, fmt.Errorf("%s: %w", name, backends.ErrNotFound)
	}
	if err != nil {
		return note, err
	}
	if err := json.Unmarshal([]byte(text), &note); err != nil {
		return note, backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s is damaged: %w", filepath.Join(d.Path, name), err))
	}
	return note, nil
}

// Find returns the notes whose names begin and end like that.
func Find[T any](d *Dir, prefix, suffix string) (found []T, err error) {
	entries, err := os.ReadDir(d.Path)
	for _, entry := range entries {
		if name := entry.Name(); strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) {
			note, err := Read[T](d, name)
			switch {
			case err == nil:
				found = append(found, note)
			case !errors.Is(err, backends.ErrNotFound): // it was removed meanwhile
				return nil, err
			}
		}
	}
	return found, err
}

// Remove removes notes, and other files, which all begin with name.
func (d *Dir) Remove(name string, endings ...string) error {
	for _, ending := range endings {
		if err := os.Remove(filepath.Join(d.Path, name+ending)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return d.sync()
}

// File makes a file as large as this, unless it is.
func (d *Dir) File(name string, size int64) error {
	f, err := os.OpenFile(filepath.Join(d.Path, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() < size {
		err = f.Truncate(size)
	}
	return errors.Join(err, f.Sync(), f.Close(), d.sync())
}

// Device returns the path of a file and, if it has one on this host, its loop device.
func (d *Dir) Device(ctx context.Context, name string) (path string, device loop.Device, err error) {
	dir, err := filepath.EvalSymlinks(d.Path)
	if err != nil {
		return "", device, err
	}
	path = filepath.Join(dir, name)
	devices, err := loop.In(ctx, dir)
	for _, device := range devices {
		if device.Name() == name && !device.Deleted() {
			return path, device, nil
		}
	}
	return path, device, err
}

// sync makes what was done last.
func (d *Dir) sync() error {
	dir, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
