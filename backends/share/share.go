// Package share keeps volumes as files in a directory that hosts share, and attaches them
// as loop devices. What else there is to know is in notes beside them:
//
//	.flocker-share                which directory this is
//	<cluster>.<volume>.volume     there is a volume
//	<cluster>.<volume>.held       who has it
//	<cluster>.<volume>.img        its data
package share

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/share/links"
)

// Config is what an operator sets.
type Config struct {
	Dir string `yaml:"dir"`
}

// Backend is the backend of one node.
type Backend struct {
	dir           links.Dir
	node, cluster string
}

// New returns the backend of a node in a cluster. It asks nobody yet.
func New(cfg Config, node, cluster string) (*Backend, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, errors.New("dir is missing: the absolute path of a directory that the hosts share")
	}
	return &Backend{dir: links.Dir{Path: filepath.Clean(cfg.Dir)}, node: node, cluster: cluster}, nil
}

// Properties implements backends.Backend. Nothing stops a host that has a volume: F0.
func (b *Backend) Properties() backends.Properties {
	return backends.Properties{
		Name: "share", Class: backends.ClassNone, ExclusiveAttach: true, CheapAttach: true,
		AllocationUnit: 1 << 20, MinSize: 1 << 20, MaxSize: 1 << 50,
	}
}

// name begins the names of a volume's files.
func (b *Backend) name(ref string) string { return b.cluster + "." + filepath.Base(ref) }

func (b *Backend) find(ref string) (backends.Volume, error) {
	return links.Read[backends.Volume](&b.dir, b.name(ref)+".volume")
}

// Create implements backends.Backend. The data is made by the first Attach.
func (b *Backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	return links.Do(ctx, &b.dir, "create volume "+req.Name, "/"+req.ID, func(ref string) (backends.Volume, error) {
		vol := backends.Volume{Ref: ref, ID: req.ID, Cluster: req.Cluster, Name: req.Name, Size: (req.Size + 1<<20 - 1) >> 20 << 20}
		is, err := links.Make(&b.dir, b.name(ref)+".volume", vol)
		if err == nil && is != vol {
			err = fmt.Errorf("there is one with %s: %w", backends.Size(is.Size), backends.ErrExists)
		}
		return vol, err
	})
}

// Get implements backends.Backend.
func (b *Backend) Get(ctx context.Context, ref string) (backends.Volume, error) {
	return links.Do(ctx, &b.dir, "get volume", ref, b.find)
}

// List implements backends.Backend.
func (b *Backend) List(ctx context.Context) ([]backends.Volume, error) {
	return links.Do(ctx, &b.dir, "list volumes", "", func(string) ([]backends.Volume, error) {
		return links.Find[backends.Volume](&b.dir, b.cluster+".", ".volume")
	})
}

// hold makes an attachment the volume's, or says which it has. An empty one deletes it.
func (b *Backend) hold(ref string, att backends.Attachment) error {
	held, err := links.Make(&b.dir, b.name(ref)+".held", att)
	if err != nil || held == att {
		return err
	}
	if held.Volume == "" {
		return fmt.Errorf("volume %s: %w", ref, backends.ErrNotFound)
	}
	return &backends.AttachedError{Volume: held.Volume, Node: held.Node, Token: held.Token}
}

// Delete implements backends.Backend. It finishes one that was cut short.
func (b *Backend) Delete(ctx context.Context, ref string) error {
	_, err := links.Do(ctx, &b.dir, "delete volume", ref, func(ref string) (backends.Volume, error) {
		vol, missing := b.find(ref)
		if err := b.hold(ref, backends.Attachment{}); err != nil {
			return vol, err
		}
		return vol, errors.Join(missing, b.dir.Remove(b.name(ref), ".volume", ".img", ".held"))
	})
	return err
}

// Attach implements backends.Backend.
func (b *Backend) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	return links.Do(ctx, &b.dir, "attach volume", req.Ref, func(ref string) (backends.Attachment, error) {
		att := backends.Attachment{Ref: ref, Volume: req.Volume, Node: b.node, Token: req.Token}
		if b.name(ref) != b.name(req.Volume) {
			return att, fmt.Errorf("%s is not volume %s: %w", ref, req.Volume, backends.ErrInvalid)
		}
		_, err := links.Read[backends.Attachment](&b.dir, b.name(ref)+".held")
		anew := errors.Is(err, backends.ErrNotFound)
		if anew || err == nil {
			err = b.hold(ref, att)
		}
		if anew && err == nil { // what is left if somebody has removed the note by hand
			if err = b.disconnect(ctx, ref); err != nil {
				err = errors.Join(err, b.dir.Remove(b.name(ref), ".held"))
			}
		}
		if err != nil {
			return att, err
		}
		vol, err := b.find(ref) // now that nobody can delete it
		if errors.Is(err, backends.ErrNotFound) {
			err = errors.Join(err, b.release(ctx, ref))
		}
		if err == nil {
			att.Device, err = b.connect(ctx, ref, vol.Size)
		}
		return att, err
	})
}

// connect makes the data a loop device, unless it is one, and disconnect undoes it.
func (b *Backend) connect(ctx context.Context, ref string, size int64) (string, error) {
	file, d, err := b.dir.Device(ctx, b.name(ref)+".img")
	if err != nil || d.Path != "" {
		return d.Path, err
	}
	if err = b.dir.File(b.name(ref)+".img", size); err == nil {
		d, err = loop.Attach(ctx, file)
	}
	return d.Path, err
}

func (b *Backend) disconnect(ctx context.Context, ref string) error {
	_, d, err := b.dir.Device(ctx, b.name(ref)+".img")
	if d.Path != "" && err == nil {
		err = d.Detach(ctx, 10*time.Second, func() {})
	}
	return err
}

// release undoes hold and connect.
func (b *Backend) release(ctx context.Context, ref string) error {
	if err := b.disconnect(ctx, ref); err != nil {
		return err
	}
	return b.dir.Remove(b.name(ref), ".held")
}

// Detach implements backends.Backend.
func (b *Backend) Detach(ctx context.Context, att backends.Attachment) error {
	_, err := links.Do(ctx, &b.dir, "detach volume "+att.Volume, att.Ref, func(ref string) (backends.Attachment, error) {
		held, err := links.Read[backends.Attachment](&b.dir, b.name(ref)+".held")
		switch {
		case errors.Is(err, backends.ErrNotFound) || err == nil && (held.Node != att.Node || held.Token != att.Token):
			err = nil // it is gone
		case err == nil && held.Node != b.node:
			err = fmt.Errorf("it can be done on %s alone: %w", held.Node, backends.ErrInvalid)
		case err == nil:
			err = b.release(ctx, ref)
		}
		return held, err
	})
	return err
}

// Attachments implements backends.Backend.
func (b *Backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	return links.Do(ctx, &b.dir, "list attachments", "", func(string) (mine []backends.Attachment, err error) {
		all, err := links.Find[backends.Attachment](&b.dir, b.cluster+".", ".held")
		for _, att := range all {
			if att.Node == b.node && err == nil {
				_, d, wrong := b.dir.Device(ctx, b.name(att.Ref)+".img")
				att.Device, err = d.Path, wrong
				mine = append(mine, att)
			}
		}
		return mine, err
	})
}
