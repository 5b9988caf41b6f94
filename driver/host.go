package driver

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// A Host is what the driver sees of its host from where it runs, for whoever looks
// for what is wrong there.
type Host struct {
	MountRoot string
	// Filesystems are those of this cluster's volumes, and the one of new volumes.
	Filesystems []string
	// Lacks are the programs for them that are not there.
	Lacks []string
	// Docker is why the Engine does not say who uses a volume.
	Docker error
	// Mounts are those below MountRoot, and Devices what the backends have attached.
	Mounts  []HostMount
	Devices []HostDevice
	// Unmounted are the names of the volumes that ought to be mounted and are not.
	Unmounted []string
	// Silent are the backends that did not say what is attached, and why.
	Silent map[string]error
	// Forbidden is what the storage does not let the backends do, and Unjudged those that
	// did not say, and why.
	Forbidden map[string][]string
	Unjudged  map[string]error
	// Err is why the mount table could not be read.
	Err error
}

// A HostMount is something mounted below the mount root.
type HostMount struct {
	Path string
	// Number is the filesystem's, such as 7:3.
	Number string
	// Volume is the name of the volume it is known to be; empty if it is none.
	Volume string
}

// A HostDevice is a device that a backend has attached to this host.
type HostDevice struct {
	Backend, Path string
	ID            string // the volume's
	Token         int64
	// Owned says that this host has the volume under this token.
	Owned bool
}

// lookLimit bounds how long each backend may take to say what is attached.
const lookLimit = 5 * time.Second

// Host looks at the host. It changes nothing; what is just being mounted or unmounted
// may seem to belong to nobody.
func (d *Driver) Host(ctx context.Context) Host {
	h := Host{MountRoot: d.cfg.MountRoot, Silent: map[string]error{}, Forbidden: map[string][]string{}, Unjudged: map[string]error{}}
	kinds := map[string]bool{d.cfg.DefaultFS: true}
	for _, vol := range d.recallAll() {
		kinds[vol.FS] = true
	}
	h.Filesystems = slices.Sorted(maps.Keys(kinds))
	for _, fs := range h.Filesystems {
		h.Lacks = append(h.Lacks, d.cfg.Mounter.Lacks(fs)...)
	}
	if d.cfg.Docker != nil {
		_, h.Docker = d.cfg.Docker.Using(ctx, ".probe") // no volume has such a name
	}
	var asked sync.WaitGroup
	asked.Go(func() { d.permissions(ctx, h.Forbidden, h.Unjudged) })
	h.Devices = d.devices(ctx, h.Silent)
	asked.Wait()
	h.Mounts, h.Unmounted, h.Err = d.mounts()
	return h
}

func (d *Driver) mounts() (mounts []HostMount, missing []string, err error) {
	// Before the table: what is mounted between the two is in the table alone.
	local := d.snapshots()
	points, err := d.cfg.Mounter.Below(d.cfg.MountRoot)
	if err != nil {
		return nil, nil, fmt.Errorf("what is mounted here: %w", err)
	}
	seen := map[string]bool{}
	for _, p := range points {
		id := filepath.Base(p.Target)
		if strings.HasPrefix(id, ".") {
			continue // the probe of mount.IsCutOff
		}
		m := HostMount{Path: p.Target, Number: p.Number}
		if s := local[id]; s != nil && s.mounted && p.Target == filepath.Join(d.cfg.MountRoot, id) {
			m.Volume, seen[id] = s.vol.Name, true
		}
		mounts = append(mounts, m)
	}
	for id, s := range local {
		if s.mounted && !seen[id] {
			missing = append(missing, s.vol.Name)
		}
	}
	slices.Sort(missing)
	slices.SortFunc(mounts, func(a, b HostMount) int { return strings.Compare(a.Path, b.Path) })
	return mounts, missing, nil
}

// permissions asks those backends that can tell.
func (d *Driver) permissions(ctx context.Context, forbidden map[string][]string, unjudged map[string]error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	var (
		asked sync.WaitGroup
		mu    sync.Mutex
	)
	for name, backend := range d.cfg.Backends {
		permitted, ok := backends.As[backends.Permitted](backend)
		if !ok {
			continue
		}
		asked.Go(func() {
			calls, err := permitted.Forbidden(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				unjudged[name] = err
			}
			if len(calls) > 0 {
				forbidden[name] = calls
			}
		})
	}
	asked.Wait()
}

// devices asks all backends at once; those that do not answer are put into silent.
func (d *Driver) devices(ctx context.Context, silent map[string]error) (devices []HostDevice) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	var (
		asked sync.WaitGroup
		mu    sync.Mutex
	)
	for name, backend := range d.cfg.Backends {
		asked.Go(func() {
			attachments, err := backend.Attachments(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent[name] = err
			}
			for _, att := range attachments {
				devices = append(devices, HostDevice{Backend: name, Path: att.Device, ID: att.Volume, Token: att.Token, Owned: d.owns(att)})
			}
		})
	}
	asked.Wait()
	slices.SortFunc(devices, func(a, b HostDevice) int { return strings.Compare(a.Path, b.Path) })
	return devices
}
