package driver

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Get returns one volume. ErrNotFound only if the cluster's records say so:
// Docker takes any other error for the same and drops its own record. While etcd
// is away a known volume is answered from the cache, and the question for an
// unknown one is held until ctx ends.
func (d *Driver) Get(ctx context.Context, name string) (Volume, error) {
	if ValidName(name) != nil {
		return Volume{}, ownership.ErrNotFound // it cannot exist
	}
	if ds := d.byName(name); ds != nil {
		// Nobody else can have changed it, and Docker skips an Unmount whose Get
		// fails. What is merely owned may be on its way to another node.
		if here := ds.snapshot.Load(); here.attached || here.mounted || here.pending != "" {
			return d.describe(ownership.View{Volume: here.vol}, here, false), nil
		}
	}
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		vol, known := d.recall(name)
		if known && d.etcdSilent() {
			return d.describe(ownership.View{Volume: vol}, nil, true), nil
		}
		view, err := d.lookup(ctx, name)
		switch {
		case err == nil:
			d.remember(view.Volume)
			return d.describe(view, nil, false), nil
		case errors.Is(err, ownership.ErrNotFound):
			d.forget(name)
			return Volume{}, err
		case known:
			return d.describe(ownership.View{Volume: vol}, nil, true), nil
		}
		if !sleep(ctx, jitter(wait)) {
			return Volume{}, d.explain(name, ownership.ErrUnavailable)
		}
	}
}

// lookupPatience bounds how long a Get or List waits for etcd before the cache
// answers.
const lookupPatience = time.Second

func (d *Driver) lookup(ctx context.Context, name string) (ownership.View, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupPatience)
	defer cancel()
	vol, _ := d.recall(name)
	view, err := d.cfg.Map.LookupKnown(ctx, name, vol.ID)
	d.noteSilence(err)
	return view, err
}

// noteSilence remembers that etcd does not answer, so that for the next second
// nobody waits for it who has something cached.
func (d *Driver) noteSilence(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.silent = time.Time{}
	if errors.Is(err, ownership.ErrUnavailable) {
		d.silent = time.Now()
	}
}

func (d *Driver) etcdSilent() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Since(d.silent) < time.Second
}

// List returns every volume of the cluster, without Status, which Docker would not
// show; or those this node remembers while etcd is away.
func (d *Driver) List(ctx context.Context) ([]Volume, error) {
	views, _ := d.views(ctx)
	local := d.snapshots()
	volumes := make([]Volume, 0, len(views))
	add := func(vol ownership.Volume, here *snapshot) {
		v := Volume{Name: vol.Name, CreatedAt: vol.Created}
		if here != nil && here.mounted {
			v.Mountpoint = d.mountpoint(vol.ID)
		}
		volumes = append(volumes, v)
	}
	for _, view := range views {
		if view.Volume.Phase == ownership.PhaseDeleting {
			continue
		}
		add(view.Volume, local[view.Volume.ID])
		delete(local, view.Volume.ID)
	}
	for _, s := range local { // mounted here, gone from the records
		add(s.vol, s)
	}
	slices.SortFunc(volumes, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	return volumes, nil
}

// views are every volume of the cluster; or, stale, those this node remembers.
func (d *Driver) views(ctx context.Context) (views []ownership.View, stale bool) {
	stale = d.etcdSilent()
	if !stale {
		bounded, cancel := context.WithTimeout(ctx, lookupPatience)
		defer cancel()
		var err error
		views, err = d.cfg.Map.List(bounded)
		d.noteSilence(err)
		stale = err != nil
	}
	if stale {
		for _, vol := range d.recallAll() {
			views = append(views, ownership.View{Volume: vol})
		}
	} else {
		d.rememberAll(views)
	}
	return views, stale
}

// snapshots are what is on this node, by the volume's id.
func (d *Driver) snapshots() map[string]*snapshot {
	local := map[string]*snapshot{}
	for _, ds := range d.local() {
		local[ds.id] = ds.snapshot.Load()
	}
	return local
}

// Survey returns every volume of the cluster as Get would, also those that are being
// made or deleted, by name. They are stale, what this node remembers, while etcd is
// away. The storage is not asked.
func (d *Driver) Survey(ctx context.Context) (volumes []Volume, stale bool) {
	views, stale := d.views(ctx)
	local := d.snapshots()
	volumes = make([]Volume, 0, len(views))
	for _, view := range views {
		here := local[view.Volume.ID]
		delete(local, view.Volume.ID)
		if here != nil && !here.attached && !here.mounted && here.pending == "" {
			here = nil // as for Get
		}
		volumes = append(volumes, d.describe(view, here, stale && here == nil))
	}
	for _, s := range local { // here, and gone from the records
		volumes = append(volumes, d.describe(ownership.View{Volume: s.vol}, s, false))
	}
	slices.SortFunc(volumes, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	return volumes, stale
}

// describe is what `docker volume inspect` shows. here is nil if there is nothing
// of the volume on this node.
func (d *Driver) describe(view ownership.View, here *snapshot, stale bool) Volume {
	vol := view.Volume
	status := map[string]any{
		"id":         vol.ID,
		"backend":    vol.Backend,
		"size":       backends.Size(vol.Size).String(),
		"filesystem": vol.FS,
	}
	var waiting []ownership.Request
	v := Volume{Name: vol.Name, CreatedAt: vol.Created, Status: status, Definition: vol}
	state, detail := view.State()
	switch {
	case here != nil:
		status["owner"], status["token"] = d.cfg.Node.Host, here.token
		waiting = d.waitingFor(vol.ID)
		if state, detail = here.state(); state == "mounted" {
			status["mounts"] = here.mounts
			v.Mountpoint = d.mountpoint(vol.ID)
		}
		if vol.Phase == ownership.PhaseQuarantined {
			state, detail = view.State()
		}
		if len(here.containers) > 0 {
			status["containers"] = here.containers
		}
	case stale && vol.Phase == ownership.PhaseReady:
		state = "unknown"
	case view.Owner != nil:
		status["owner"], status["token"] = view.Owner.Host, view.Owner.Token
		waiting = view.Waiting
	}
	status["state"] = state
	if stale {
		status["stale"] = true
	}
	if len(waiting) > 0 {
		hosts := make([]string, len(waiting))
		for i, r := range waiting {
			hosts[i] = r.Host
		}
		status["waiting"] = hosts
	}
	placed, _ := d.placement(vol.ID)
	for key, value := range map[string]string{
		"detail": detail, "mkfs": vol.Mkfs, "mount": vol.Mount, "profile": vol.Profile, "placement": placed.Host, "placement_error": d.misplaced(vol.ID),
	} {
		if value != "" {
			status[key] = value
		}
	}
	if len(vol.Labels) > 0 {
		status["labels"] = vol.Labels
	}
	return v
}

// state is that of a volume of which there is something on this node.
func (s *snapshot) state() (state, detail string) {
	switch {
	case s.lost != "":
		return "lost", s.lost
	case s.pending != "":
		return ownership.StateTaken, cmp.Or(s.fault, "from host "+s.pending)
	case s.mounted:
		return "mounted", ""
	case s.attached:
		return "attached", ""
	}
	return ownership.StateOwned, ""
}

// The cache of definitions, by name. It answers Docker while etcd is away, and
// saves a read before a claim.

func (d *Driver) remember(vol ownership.Volume) {
	if vol.Phase == ownership.PhaseDeleting || vol.Name == "" {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if old, ok := d.known[vol.Name]; !ok || old.ID != vol.ID || old.Revision != vol.Revision {
		d.known[vol.Name] = vol
		d.dirty = true
	}
}

func (d *Driver) rememberAll(views []ownership.View) {
	known := make(map[string]ownership.Volume, len(views))
	for _, v := range views {
		if v.Volume.Phase != ownership.PhaseDeleting {
			known[v.Volume.Name] = v.Volume
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	same := func(a, b ownership.Volume) bool { return a.ID == b.ID && a.Revision == b.Revision }
	if !maps.EqualFunc(d.known, known, same) {
		d.known, d.dirty = known, true
	}
}

func (d *Driver) forget(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.known[name]; ok {
		delete(d.known, name)
		d.dirty = true
	}
}

func (d *Driver) recall(name string) (ownership.Volume, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	vol, ok := d.known[name]
	return vol, ok
}

func (d *Driver) recallAll() []ownership.Volume {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.known))
}

// keepKnown writes the cache to disk a moment after it changed.
func (d *Driver) keepKnown(ctx context.Context) {
	for sleep(ctx, time.Second) {
		d.saveKnown()
	}
}

// saveSeen keeps how far this node has followed the cluster.
func (d *Driver) saveSeen() { d.KeepSeen(d.cfg.Map.Seen()) }

// KeepSeen is ownership.Config's Keep.
func (d *Driver) KeepSeen(seen ownership.Seen) {
	if seen.Cluster != "" {
		if err := d.journal.saveSeen(seen); err != nil {
			d.log.Warn(err)
		}
	}
}

func (d *Driver) saveKnown() {
	d.mu.Lock()
	dirty := d.dirty
	d.dirty = false
	d.mu.Unlock()
	if !dirty {
		return
	}
	if err := d.journal.saveKnown(d.recallAll()); err != nil {
		d.log.Warn(err)
		d.mu.Lock()
		d.dirty = true
		d.mu.Unlock()
	}
}
