// Package driver decides: it is the eight verbs of a Docker volume driver on top
// of ownership, a storage backend and the mount system calls.
//
// Mount goes down one straight line and Unmount comes back up it:
//
//	claim the volume (etcd)  →  attach it (storage)  →  mount it (kernel)
//
// The invariant is mounted ⇒ attached ⇒ owned. Each step of Mount pushes its
// undo; Unmount undoes each arrow only after the one before it, and stops at the
// first failure.
package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Volume is what Docker is told about a volume.
type Volume struct {
	Name string
	// Mountpoint is "" where the volume is not mounted on this host.
	Mountpoint string
	CreatedAt  time.Time
	// Status is shown by `docker volume inspect`.
	Status map[string]any
	// Definition is what the cluster wants of it; only Get and Survey tell.
	Definition ownership.Volume
}

// Container is a container that uses a volume.
type Container struct {
	ID, Name, State string
	// Source is the directory on the host that it has as the volume, if Docker says.
	Source string
}

// Docker is what the driver asks the Docker Engine, in the background only and
// as a hint: from inside a verb the Engine may be waiting for us.
type Docker interface {
	// Using returns the containers of this host that are running, paused or
	// restarting and have a volume of this name, within two seconds.
	Using(ctx context.Context, volume string) ([]Container, error)
	// Kill kills those containers of them that have the volume from a directory with
	// vid in its path, and returns the names of those it killed. Docker does not
	// restart them.
	Kill(ctx context.Context, volume, vid string) (killed []string, err error)
}

// Config is what a Driver is made of. Durations of zero are really zero.
type Config struct {
	Node ownership.Node
	Map  *ownership.Map
	// Backends by name; Backend is the default one's name.
	Backends map[string]backends.Backend
	Backend  string
	// Ready, if set, is asked before this node becomes the owner of a volume of a backend:
	// whoever owns one may have to be fenced by its name at the storage.
	Ready   func(ctx context.Context, backend string) error
	Mounter mount.Mounter
	Docker  Docker // nil: the Engine is not asked
	Log     *logrus.Entry

	// StateDir holds the journal; it must be on the host and survive the plugin.
	StateDir string
	// MountRoot is the directory below which volumes are mounted. It must be the
	// managed plugin's propagated mount, or shared with the host.
	MountRoot string
	// HostPath is where the host has what is mounted at a path below MountRoot, for others
	// to be told; "" as long as that is not known. nil: there.
	HostPath func(path string) string

	DefaultSize backends.Size
	DefaultFS   string
	// Linger is how long an idle volume stays attached and owned, unless another
	// node asks for it or the backend attaches cheaply.
	Linger time.Duration
	// BusyWait is how long a Mount waits for another node's containers to stop.
	BusyWait time.Duration
	// Hold is how long a node must have been silent before its volumes are taken over
	// from it, counted from the end of its lease.
	Hold time.Duration
	// Reconcile is the time between two looks at the whole state, about.
	Reconcile time.Duration
}

// Driver is one node's volume driver.
type Driver struct {
	cfg     Config
	log     *logrus.Entry
	journal *journal
	epoch   atomic.Int64
	started time.Time
	beaten  atomic.Int64 // when beat last ran, in nanoseconds since started

	// confirmed is closed when what was restored at start was compared with etcd.
	confirmed chan struct{}
	ctx       context.Context // of the background work
	stop      context.CancelFunc
	work      sync.WaitGroup

	// mu guards the maps and is never held across I/O.
	mu        sync.Mutex
	datasets  map[string]*dataset // by id: what is here, and what is being worked on
	known     map[string]ownership.Volume
	dirty     bool // known is newer than the journal's copy
	waiting   map[string][]ownership.Request
	answering map[string]bool      // volumes whose waiting nodes are being answered
	suspects  map[string]time.Time // volumes whose claim had an unknown outcome
	forced    map[int64]time.Time  // declarations of death by force, by revision: since when they are known
	unlearned map[string]int       // volumes whose containers are not known yet: how often to ask Docker
	silent    time.Time            // when etcd last failed to answer a Get
	strays    time.Time            // until when an Attach nobody waits for may take effect

	placements map[string]ownership.Placement // by volume, as last heard of
	placedAt   int64                          // the revision of that
	keepers    map[string]*keeper             // volumes on the way to where they are placed
	rejoined   chan struct{}                  // wakes keepPlaced after a registration
}

// New makes a Driver and takes up what an earlier process left on this host. It
// does not use the network. Run must be called for it to do its background work.
func New(cfg Config) (*Driver, error) {
	if _, ok := cfg.Backends[cfg.Backend]; !ok {
		return nil, fmt.Errorf("unknown backend %q; valid: %s", cfg.Backend,
			strings.Join(slices.Sorted(maps.Keys(cfg.Backends)), ", "))
	}
	if err := os.MkdirAll(cfg.MountRoot, 0o755); err != nil {
		return nil, fmt.Errorf("make the mount root: %w", err)
	}
	j, err := openJournal(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	epoch, err := j.nextEpoch()
	if err != nil {
		j.close()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	d := &Driver{
		cfg: cfg, log: cfg.Log, journal: j,
		started:   time.Now(),
		confirmed: make(chan struct{}), ctx: ctx, stop: stop,
		datasets: map[string]*dataset{}, known: map[string]ownership.Volume{},
		waiting: map[string][]ownership.Request{}, answering: map[string]bool{}, suspects: map[string]time.Time{}, unlearned: map[string]int{},
		forced: map[int64]time.Time{}, placements: map[string]ownership.Placement{}, keepers: map[string]*keeper{}, rejoined: make(chan struct{}, 1),
		strays: time.Now().Add(strayTime), // of the process before
	}
	d.epoch.Store(epoch)
	d.restore(ctx)
	return d, nil
}

// Run does the background work until ctx ends: it answers other nodes' requests
// and reconciles. It leaves everything mounted, for containers go on running and
// the next process takes it up.
func (d *Driver) Run(ctx context.Context) error {
	d.background(d.serve)
	d.background(d.reconcile)
	d.background(d.rejoin)
	d.background(d.keepPlaced)
	d.background(d.beat)
	d.background(d.keepKnown)
	if d.cfg.Docker != nil {
		d.background(d.learn)
	}
	<-ctx.Done()
	d.mu.Lock()
	d.stop()
	d.mu.Unlock()
	d.work.Wait()
	d.saveKnown()
	d.saveSeen()
	d.journal.close()
	return context.Cause(ctx)
}

// beat shows that this process works: its goroutines run and its map's lock is
// free.
func (d *Driver) beat(ctx context.Context) {
	for ok := true; ok; ok = sleep(ctx, time.Second) {
		d.mu.Lock()
		d.beaten.Store(int64(time.Since(d.started)))
		d.mu.Unlock()
	}
}

// Healthy is an error if this process does not work any more: then it must not go
// on looking alive to the other nodes.
func (d *Driver) Healthy() error {
	if stuck := time.Since(d.started) - time.Duration(d.beaten.Load()); stuck > 5*time.Second {
		return fmt.Errorf("the driver has done nothing for %s", stuck.Round(time.Second))
	}
	return nil
}

// background runs f, unless the driver has stopped; its context ends with it.
func (d *Driver) background(f func(context.Context)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() == nil {
		d.work.Go(func() { f(d.ctx) })
	}
}

// Activated notes that Docker has started anew: references from before may be
// left over.
func (d *Driver) Activated() {
	epoch, err := d.journal.nextEpoch()
	if err != nil {
		d.log.Warn(err)
		epoch = d.epoch.Load() + 1
	}
	d.epoch.Store(epoch)
}

// Mount makes a volume available below the mount root and returns the path. id is
// Docker's name for this use of it.
func (d *Driver) Mount(ctx context.Context, name, id string) (string, error) {
	if err := ValidName(name); err != nil {
		return "", err
	}
	vol, err := d.find(ctx, name)
	if err != nil {
		return "", err
	}
	err = d.mountVolume(ctx, vol, id)
	if errors.Is(err, ownership.ErrNotFound) {
		// The cache was older than a removal on another node, and perhaps a new
		// volume of that name.
		d.forget(name)
		if vol, err = d.find(ctx, name); err != nil {
			return "", err
		}
		err = d.mountVolume(ctx, vol, id)
	}
	if err != nil {
		return "", err
	}
	return d.mountpoint(vol.ID), nil
}

func (d *Driver) mountVolume(ctx context.Context, vol ownership.Volume, id string) error {
	ds, done := d.hold(vol.ID)
	defer done()
	if err := d.acquireConfirmed(ctx, ds, vol.Name); err != nil {
		return err
	}
	defer ds.unlock()
	if ds.idle() {
		ds.vol = vol // the claim reads it anew
	}
	claims := ds.token == 0
	if err := d.mount(ctx, ds, mounting, id); err != nil {
		return err
	}
	if claims {
		d.placeHere(ctx, ds)
	}
	d.learnSoon(ds)
	return nil
}

// acquireConfirmed takes the lock for a Mount. One that needs more than what is
// mounted waits for the start to be over, without the lock, which that needs.
func (d *Driver) acquireConfirmed(ctx context.Context, ds *dataset, name string) error {
	select {
	case <-d.confirmed:
		if d.cfg.Map.Live() == nil {
			return ds.acquire(ctx)
		}
	default:
	}
	if err := ds.acquire(ctx); err != nil {
		return err
	}
	up, err := d.isMounted(ds)
	if up && err == nil {
		return nil
	}
	ds.unlock()
	if err == nil {
		err = d.awaitStart(ctx)
	}
	if err != nil {
		return d.explain(name, err)
	}
	return ds.acquire(ctx)
}

// awaitRegistration waits for this node's first registration, before which nothing
// that etcd says is believed.
func (d *Driver) awaitRegistration(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, registrationWait)
	defer cancel()
	return d.cfg.Map.Registered(ctx)
}

// registrationWait bounds how long a Create or Remove waits for the registration of
// a process that has just started. Docker may give a call no more than a few seconds.
const registrationWait = 3 * time.Second

// awaitStart waits for the first comparison with etcd, until which leftovers are
// not told from the living, and for this node's first registration, without which
// it may claim nothing.
func (d *Driver) awaitStart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, confirmWait)
	defer cancel()
	select {
	case <-d.confirmed:
		return d.cfg.Map.Registered(ctx)
	case <-ctx.Done():
		return fmt.Errorf("%w: what is here was not compared with etcd yet since this plugin started", ownership.ErrUnavailable)
	}
}

// confirmWait bounds how long a Mount waits for the start to be over.
const confirmWait = 20 * time.Second

// find returns the volume of a name: what is owned here or known, else what etcd
// says.
func (d *Driver) find(ctx context.Context, name string) (ownership.Volume, error) {
	if local := d.byName(name); local != nil {
		return local.snapshot.Load().vol, nil
	}
	if vol, ok := d.recall(name); ok {
		return vol, nil
	}
	view, err := d.cfg.Map.Lookup(ctx, name)
	if err != nil {
		return ownership.Volume{}, d.explain(name, err)
	}
	d.remember(view.Volume)
	return view.Volume, nil
}

// Unmount takes back one Mount. It is idempotent, and fails only where the data
// could not be written back; Docker ignores that, and so the driver tries again
// by itself.
func (d *Driver) Unmount(ctx context.Context, name, id string) error {
	local := d.byName(name)
	if local == nil {
		return nil
	}
	if local.snapshot.Load().lost != "" {
		return nil // Docker may be waiting for us with the very kill that lose is waiting for
	}
	ds, done := d.hold(local.id)
	defer done()
	if err := ds.acquire(ctx); err != nil {
		return err
	}
	defer ds.unlock()
	if ds.token == 0 {
		return nil
	}
	ds.refs.drop(id)
	log := d.log.WithField("volume", name)
	save := func() {
		if err := d.journal.save(ds.record(d.cfg.Node.Boot)); err != nil {
			log.Warn(err)
		}
	}
	if ds.refs.total() > 0 || d.placedHere(ds.id) {
		save()
		return nil
	}
	// Closing flushes the disk, which would wait for what was just written there.
	err := d.closeFilesystem(ctx, ds)
	switch {
	case err == nil && d.linger(ds) == 0:
		// The detach that follows at once writes the record.
		d.tidySoon(ds)
		return nil
	case err == nil:
		save()
		d.tidySoon(ds)
		return nil
	}
	save()
	d.retry(ds)
	if errors.Is(err, mount.ErrBusy) {
		log.Infof("still open: %v", err)
		return nil
	}
	return err
}

// save writes a record to the journal, during what the caller does until it asks how
// that went. It must ask before the next save.
func (d *Driver) save(r record) (saved func() error) {
	done := make(chan error, 1)
	go func() { done <- d.journal.save(r) }()
	return func() error { return <-done }
}

// Path returns where a volume is mounted on this host, or "".
func (d *Driver) Path(ctx context.Context, name string) (string, error) {
	v, err := d.Get(ctx, name)
	return v.Mountpoint, err
}

// explain turns what the map says into a sentence for the user.
func (d *Driver) explain(name string, err error) error {
	switch {
	case errors.Is(err, ownership.ErrNotFound):
		return fmt.Errorf("%w: %s; create it with: docker volume create -d flocker %s", ownership.ErrNotFound, name, name)
	case errors.Is(err, ownership.ErrUnavailable):
		return fmt.Errorf("volume %s: %w; what is mounted keeps working, retry when etcd answers", name, err)
	}
	if phase, ok := errors.AsType[*ownership.PhaseError](err); ok && phase.Volume.Phase == ownership.PhaseQuarantined {
		return fmt.Errorf("%w; when it is seen to, type: docker flocker volume reinstate %s", phase, name)
	}
	return fmt.Errorf("volume %s: %w", name, err)
}

func (d *Driver) backend(name string) (backends.Backend, error) {
	if b, ok := d.cfg.Backends[name]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("there is no backend %q on host %s; backends here: %s", name, d.cfg.Node.Host, d.backendNames())
}

// A BackendStatus is a backend of this host, as an operator is told about it.
type BackendStatus struct {
	backends.Properties

	Default bool
	// Err is why it cannot be used now.
	Err error
}

// backendPing is how long a backend may take to show that it answers.
const backendPing = 5 * time.Second

// Backends returns this host's backends by name, and asks each whether it answers.
func (d *Driver) Backends(ctx context.Context) []BackendStatus {
	names := slices.Sorted(maps.Keys(d.cfg.Backends))
	all := make([]BackendStatus, len(names))
	var asked sync.WaitGroup
	for i, name := range names {
		asked.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, backendPing)
			defer cancel()
			_, err := d.cfg.Backends[name].List(ctx)
			all[i] = BackendStatus{Properties: d.properties(name), Default: name == d.cfg.Backend, Err: err}
		})
	}
	asked.Wait()
	return all
}

// properties are a backend's, by the name it has here.
func (d *Driver) properties(name string) backends.Properties {
	p := d.cfg.Backends[name].Properties()
	p.Name, p.Type = name, cmp.Or(p.Type, p.Name)
	return p
}

func (d *Driver) backendNames() string {
	return strings.Join(slices.Sorted(maps.Keys(d.cfg.Backends)), ", ")
}

// backendOf returns a volume's backend.
func (d *Driver) backendOf(vol ownership.Volume) (backends.Backend, error) {
	if b, ok := d.cfg.Backends[vol.Backend]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("volume %s is on backend %s, which this host's backends.yaml does not have: add it there as on the other hosts, and restart the plugin; backends here: %s",
		vol.Name, vol.Backend, d.backendNames())
}

// hold returns the dataset of an id, and keeps it in memory until done.
func (d *Driver) hold(vid string) (ds *dataset, done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ds, ok := d.datasets[vid]
	if !ok {
		ds = newDataset(vid)
		d.datasets[vid] = ds
	}
	ds.users++
	return ds, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if ds.users--; ds.users > 0 {
			return
		}
		if s := ds.snapshot.Load(); s.idle() && s.late.IsZero() {
			delete(d.datasets, vid)
			if ds.timer != nil {
				ds.timer.Stop()
			}
		}
	}
}

// local returns the datasets that have something on this node.
func (d *Driver) local() []*dataset {
	d.mu.Lock()
	defer d.mu.Unlock()
	var local []*dataset
	for _, ds := range d.datasets {
		if s := ds.snapshot.Load(); !s.idle() {
			local = append(local, ds)
		}
	}
	return local
}

// byName returns the dataset of this name that has something on this node.
func (d *Driver) byName(name string) *dataset {
	d.mu.Lock()
	defer d.mu.Unlock()
	if vol, ok := d.known[name]; ok {
		if ds := d.datasets[vol.ID]; ds != nil && !ds.snapshot.Load().idle() && ds.snapshot.Load().vol.Name == name {
			return ds
		}
	}
	for _, ds := range d.datasets {
		if s := ds.snapshot.Load(); s.vol.Name == name && !s.idle() {
			return ds
		}
	}
	return nil
}

// schedule runs tidy on a volume after a delay; the latest call counts.
func (d *Driver) schedule(ds *dataset, delay time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ds.timer != nil {
		ds.timer.Stop()
	}
	ds.timer = time.AfterFunc(delay, func() {
		d.background(func(ctx context.Context) { d.locked(ctx, ds.id, d.tidy) })
	})
}
