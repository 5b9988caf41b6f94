package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// restore takes up what an earlier process of this host left, from the journal
// and the kernel alone: enough to answer Get, Path and Unmount, and Mount of what
// is mounted. Whether this node still owns it is for confirm to ask etcd.
func (d *Driver) restore(ctx context.Context) {
	known, err := d.journal.loadKnown()
	if err != nil {
		d.log.Errorf("%v; volumes of other hosts are unknown until etcd answers", err)
	}
	for _, vol := range known {
		d.remember(vol)
	}
	records, broken := d.journal.load()
	for _, err := range broken {
		d.log.Error(err)
	}
	for _, r := range records {
		ds, done := d.hold(r.ID)
		if ds.acquire(ctx) == nil {
			d.restoreRecord(ctx, ds, r)
			ds.unlock()
		}
		done()
	}
}

func (d *Driver) restoreRecord(ctx context.Context, ds *dataset, r record) {
	ds.token = r.Token
	if vol, ok := d.recall(r.Name); ok && vol.ID == r.ID {
		ds.vol = vol
	} else {
		ds.vol = ownership.Volume{ID: r.ID, Name: r.Name, Backend: r.Backend}
	}
	// A new boot voids the Mount calls: their containers are gone.
	ds.refs = refs{}
	if r.Boot == d.cfg.Node.Boot && r.Refs != nil {
		ds.refs = r.Refs
	}
	ds.written = nil
	if r.Boot == d.cfg.Node.Boot && r.Written {
		ds.written = r.Attachment
	}
	// Also one of an earlier boot: the storage may do it at any time.
	ds.detaching = r.Detaching
	if r.Detaching || r.Late {
		d.mayBeLate(ds)
	}
	if r.Token == 0 {
		d.forgetLate(ds)
		return
	}
	ds.oldBoot = r.Boot != d.cfg.Node.Boot
	if err := d.findAttachment(ctx, ds); err != nil {
		d.log.WithField("volume", r.Name).Warn(err)
	}
	// When Docker stops a plugin by force it takes its mounts away, and the bare
	// directories stay.
	if device, err := d.cfg.Mounter.Mounted(d.target(ds)); err == nil && device == "" {
		if err := d.cfg.Mounter.Unmount(ctx, d.target(ds)); err != nil {
			d.log.WithField("volume", r.Name).Debug(err)
		}
	}
}

// look makes sure that what there is of a volume on this node is known.
func (d *Driver) look(ctx context.Context, ds *dataset) error {
	if !ds.unseen {
		return nil
	}
	if ds.vol.Backend == "" { // taken up while etcd was away
		view, err := d.cfg.Map.View(ctx, ds.id)
		if err != nil {
			return d.explain(ds.vol.Name, err)
		}
		ds.vol = view.Volume
	}
	return d.findAttachment(ctx, ds)
}

// findAttachment asks the backend and the mount table what there is of a volume
// under the token it is owned by.
func (d *Driver) findAttachment(ctx context.Context, ds *dataset) error {
	ds.unseen = true
	backend, err := d.backendOf(ds.vol)
	if err != nil {
		return err
	}
	attachments, err := backend.Attachments(ctx)
	if err != nil {
		return fmt.Errorf("list attachments: %w", err)
	}
	ds.att, ds.closed = nil, false
	for _, att := range attachments {
		if att.Volume == ds.id && att.Token == ds.token {
			ds.att = &att
		}
	}
	device, err := d.cfg.Mounter.Mounted(d.target(ds))
	if err != nil {
		return err
	}
	ds.mounted = device != "" && ds.att != nil && device == ds.att.Device
	if ds.stray = ""; !ds.mounted {
		ds.stray = device
	}
	// Unless it is mounted, whoever had the token may have begun to release it. An
	// attachment proves nothing: it may be the effect of a call that came late.
	ds.doubt = !ds.mounted || ds.oldBoot || ds.detaching
	ds.detaching = (ds.detaching || ds.oldBoot) && ds.att != nil
	ds.unseen = false
	return nil
}

// locked does something to a volume in the background, with its lock: within a
// minute, waiting for the lock included, or not at all. A takeover that is to be
// finished has the time of its fence besides.
func (d *Driver) locked(ctx context.Context, vid string, do func(context.Context, *dataset)) {
	ds, done := d.hold(vid)
	defer done()
	deadline := time.Now().Add(time.Minute)
	soon, giveUp := context.WithDeadline(ctx, deadline)
	defer giveUp()
	if ds.acquire(soon) != nil {
		return
	}
	defer ds.unlock()
	if ds.pending != nil {
		deadline = deadline.Add(d.fenceTime(ds.vol))
	}
	bounded, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	do(bounded, ds)
}

// confirm compares what this node believes to own with etcd, once etcd answers.
func (d *Driver) confirm(ctx context.Context) error {
	owned, err := d.cfg.Map.Owned(ctx)
	if err != nil {
		return err
	}
	tokens := make(map[string]int64, len(owned))
	for _, o := range owned {
		tokens[o.Volume] = o.Token
	}
	for _, ds := range d.local() {
		if _, ok := tokens[ds.id]; !ok {
			tokens[ds.id] = 0
		}
	}
	d.several(ctx, slices.Collect(maps.Keys(tokens)), func(ctx context.Context, vid string) { d.locked(ctx, vid, d.confirmVolume) })
	d.sweep(ctx, tokens)
	return nil
}

// several does something to volumes, some at a time: I/O to a device that has gone
// may hang for ever, which must not hold up the others.
func (d *Driver) several(ctx context.Context, vids []string, do func(ctx context.Context, vid string)) {
	slots := make(chan struct{}, 8)
	var work sync.WaitGroup
	defer work.Wait()
	for _, vid := range vids {
		select {
		case slots <- struct{}{}:
			work.Go(func() {
				defer func() { <-slots }()
				do(ctx, vid)
			})
		case <-ctx.Done():
			return
		}
	}
}

// sweepPatience is how long a sweep is waited for: a storage that does not answer is
// no reason not to begin with the others' volumes.
const sweepPatience = time.Second

// sweep drops the attachments that no ownership speaks of, such as one a process
// that was killed had asked for. tokens are what etcd says this node owns.
func (d *Driver) sweep(ctx context.Context, tokens map[string]int64) {
	patience, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	swept := make(chan struct{}, len(d.cfg.Backends))
	for name, backend := range d.cfg.Backends {
		d.background(func(ctx context.Context) {
			d.sweepBackend(ctx, name, backend, tokens)
			swept <- struct{}{}
		})
	}
	for range d.cfg.Backends {
		select {
		case <-swept:
		case <-patience.Done():
			return
		}
	}
}

func (d *Driver) sweepBackend(ctx context.Context, name string, backend backends.Backend, tokens map[string]int64) {
	bounded, cancel := context.WithTimeout(ctx, time.Minute)
	attachments, err := backend.Attachments(bounded)
	cancel()
	if err != nil {
		d.log.Warnf("list attachments of %s: %v", name, err)
		return
	}
	for _, att := range attachments {
		if token, ok := tokens[att.Volume]; ok && token == att.Token || d.owns(att) {
			continue
		}
		d.locked(ctx, att.Volume, func(ctx context.Context, ds *dataset) { d.dropForeign(ctx, ds, name, backend, att) })
	}
}

// owns says, without the lock, that an attachment is of a volume's present token.
func (d *Driver) owns(att backends.Attachment) bool {
	ds, done := d.hold(att.Volume)
	defer done()
	return ds.snapshot.Load().token == att.Token
}

// dropForeign detaches an attachment that belongs to no present ownership. One that
// is in use is lost to its users: whoever owns the volume may be writing it.
func (d *Driver) dropForeign(ctx context.Context, ds *dataset, name string, backend backends.Backend, att backends.Attachment) {
	if ds.token == att.Token {
		return // taken meanwhile, or to be confirmed as lost
	}
	log := d.log.WithField("volume", att.Volume)
	if now, err := backend.Attachments(ctx); err != nil || !slices.Contains(now, att) {
		return
	}
	if !ds.idle() { // a leftover beside what this node has now
		var open error
		if att.Device != "" { // without one, Detach will look
			open = d.cfg.Mounter.Close(ctx, att.Device)
		}
		if open != nil && !errors.Is(open, mount.ErrUnwritten) {
			log.Errorf("%s is attached under token %d, which is over, and in use: %v", att.Device, att.Token, open)
		} else if err := d.mark(ds, func() error { return backend.Detach(ctx, att) }); err != nil {
			log.Warnf("detach what is left from token %d: %v", att.Token, err)
		}
		return
	}
	view, err := d.cfg.Map.View(ctx, ds.id)
	switch {
	case errors.Is(err, ownership.ErrNotFound):
		view.Volume = ownership.Volume{ID: ds.id, Name: ds.id}
	case err != nil:
		return
	case view.Owner != nil && view.Owner.Node == d.cfg.Node.ID && view.Owner.Token == att.Token:
		return // it has just become this node's
	}
	ds.vol = view.Volume
	d.loseForeign(ctx, ds, name, att)
	if ds.lost != "" {
		d.retry(ds)
	}
}

// loseForeign takes down an attachment that this process knew nothing of.
func (d *Driver) loseForeign(ctx context.Context, ds *dataset, backend string, att backends.Attachment) {
	device, err := d.cfg.Mounter.Mounted(d.target(ds))
	if err != nil {
		d.log.WithField("volume", ds.vol.Name).Error(err)
		return
	}
	ds.vol.Backend, ds.token, ds.att, ds.closed = backend, att.Token, &att, false
	ds.mounted = device != "" && device == att.Device
	if !ds.mounted && d.detach(ctx, ds) == nil { // nobody used it
		d.log.WithField("volume", ds.vol.Name).Infof("detached %s, left from token %d", att.Device, att.Token)
		d.disown(ds)
		return
	}
	d.lose(ctx, ds)
}

// confirmVolume settles one volume, by what etcd says now that its lock is held.
func (d *Driver) confirmVolume(ctx context.Context, ds *dataset) {
	term := d.cfg.Map.Term()
	view, err := d.cfg.Map.View(ctx, ds.id)
	if err != nil && !errors.Is(err, ownership.ErrNotFound) {
		return // tidy asks again before it does anything
	}
	token := int64(0)
	if view.Owner != nil && view.Owner.Node == d.cfg.Node.ID {
		token, ds.vol = view.Owner.Token, view.Volume
	}
	log := d.log.WithField("volume", ds.vol.Name)
	if ds.token != 0 && ds.token != token {
		log.Errorf("this host owned it under token %d, which is over; now it owns it under %d", ds.token, token)
		if d.lose(ctx, ds); ds.lost != "" {
			d.retry(ds)
			return
		}
	}
	if token != 0 && ds.token == 0 {
		if d.note(ds, *view.Owner); ds.pending == nil {
			ds.unseen = true
		}
	}
	if token != 0 {
		ds.verified = term
		if err := d.look(ctx, ds); err != nil {
			log.Warn(err)
		}
	}
	d.tidySoon(ds)
}

// tidy is one level-triggered look at one volume: it takes down what nothing
// refers to. It runs after the linger, after a failure with back-off, and from
// the periodic reconcile.
func (d *Driver) tidy(ctx context.Context, ds *dataset) {
	if ds.idle() {
		d.forgetLate(ds)
		return
	}
	log := d.log.WithField("volume", ds.vol.Name)
	if ds.lost != "" {
		d.lose(ctx, ds)
		if ds.lost != "" {
			d.retry(ds)
		}
		return
	}
	if wait := time.Until(ds.late); wait > 0 {
		d.schedule(ds, wait) // and the lock is free meanwhile
		return
	}
	if ds.pending != nil {
		if err := d.finishTakeover(ctx, ds); err != nil {
			log.Warn(err)
			d.retry(ds)
			return
		}
	}
	if ds.mounted && d.placedHere(ds.id) {
		return
	}
	if ds.refs.total() > 0 {
		// Trying costs whoever does use it a write-back, so not on a mere suspicion,
		// and not often.
		busy, told, _ := d.inUse(ctx, ds)
		if busy || !told || time.Since(ds.failed) < backOff(ds.attempts, 5*time.Minute) {
			return
		}
		log.Info("no container seems to use it any more; trying to close it")
	}
	if ds.verified == 0 {
		term := d.cfg.Map.Term()
		if err := d.cfg.Map.Check(ctx, ds.id, ds.token); err != nil {
			if errors.Is(err, ownership.ErrLost) {
				d.lose(ctx, ds)
			}
			d.retry(ds)
			return
		}
		ds.verified = term
	}
	if leased, ok := errors.AsType[*ownership.LeasedError](d.leased(ctx, ds)); ok {
		log.Debug(leased)
		d.schedule(ds, jitter(d.cfg.Reconcile))
		return
	}
	if err := d.letGo(ctx, ds); err != nil {
		log.Infof("not let go: %v", err)
		d.retry(ds)
	}
}

// retry schedules the next tidy, later each time.
func (d *Driver) retry(ds *dataset) {
	ds.attempts++
	ds.failed = time.Now()
	d.schedule(ds, jitter(backOff(ds.attempts, d.cfg.Reconcile)))
}

// backOff is how long to wait after so many failures: a second, doubled each time.
func backOff(attempts int, most time.Duration) time.Duration {
	if attempts == 0 {
		return 0
	}
	return min(time.Second<<min(attempts-1, 10), most)
}

// tidySoon schedules tidy for a volume nothing refers to.
func (d *Driver) tidySoon(ds *dataset) {
	if !ds.idle() && ds.refs.total() == 0 {
		linger := d.linger(ds)
		ds.lingers = time.Now().Add(linger)
		d.schedule(ds, linger)
	}
}

// linger is how long an idle volume stays: not at all if it is wanted elsewhere or the
// backend attaches cheaply.
func (d *Driver) linger(ds *dataset) time.Duration {
	if p, here := d.placement(ds.id); len(d.waitingFor(ds.id)) > 0 || p.Node != "" && !here || d.cfg.Map.Cordoned() {
		return 0
	}
	if backend, err := d.backendOf(ds.vol); err == nil && backend.Properties().CheapAttach {
		return 0
	}
	return d.cfg.Linger
}

// reconcile looks at everything this node has, periodically, once what was
// restored has been compared with etcd.
func (d *Driver) reconcile(ctx context.Context) {
	select {
	case <-d.confirmed:
	case <-ctx.Done():
		return
	}
	// I/O to a device that has gone may hang for ever: one volume of several then.
	slots := make(chan struct{}, 8)
	for round := 0; ; round++ {
		d.saveSeen()
		if round%refreshRounds == 0 {
			d.refresh(ctx)
			d.purge(ctx)
		}
		if !sleep(ctx, jitter(d.cfg.Reconcile)) {
			return
		}
		for _, ds := range d.local() {
			select {
			case slots <- struct{}{}:
				d.background(func(ctx context.Context) {
					defer func() { <-slots }()
					d.recheck(ctx, ds.id)
				})
			case <-time.After(time.Minute): // all hang
			case <-ctx.Done():
				return
			}
		}
		for _, vid := range d.suspected() {
			d.locked(ctx, vid, d.giveBack)
		}
		d.mu.Lock()
		strays := time.Now().Before(d.strays)
		d.mu.Unlock()
		if strays {
			d.sweep(ctx, nil)
		}
	}
}

// strayTime is for how long after an Attach of unknown outcome its effect is looked
// for in each round; later ones are found with the whole map.
const strayTime = 2 * time.Minute

// expectStray notes that an attachment may appear which nobody waits for.
func (d *Driver) expectStray() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.strays = time.Now().Add(strayTime)
}

// suspected returns the volumes whose claim had an unknown outcome. Those that
// are old enough for the claim to have arrived or been lost are forgotten after
// this look.
func (d *Driver) suspected() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	vids := slices.Collect(maps.Keys(d.suspects))
	maps.DeleteFunc(d.suspects, func(_ string, since time.Time) bool { return time.Since(since) > settle })
	return vids
}

// giveBack frees a volume that became this node's by a claim nobody waits for.
func (d *Driver) giveBack(ctx context.Context, ds *dataset) {
	if ds.token == 0 {
		d.adopt(ctx, ds)
		d.tidySoon(ds)
	}
}

// refreshRounds is every how many rounds a node reads the whole map: its cost
// grows with the cluster, and it serves only what is not asked for otherwise.
const refreshRounds = 10

// recheck asks etcd whether a volume is still this node's, looks for references
// whose Unmount was lost, and takes down what nothing refers to.
func (d *Driver) recheck(ctx context.Context, vid string) {
	ds, done := d.hold(vid)
	defer done()
	bounded, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	soon, giveUp := context.WithTimeout(bounded, poll)
	defer giveUp()
	if ds.acquire(soon) != nil {
		return // whoever has it may be stuck, which must not hold up the others
	}
	defer ds.unlock()
	if ds.token != 0 && errors.Is(d.cfg.Map.Check(bounded, vid, ds.token), ownership.ErrLost) {
		d.lose(bounded, ds)
	}
	d.checkHealth(bounded, ds)
	if ds.pending != nil {
		d.schedule(ds, 0) // with the time it may take
		return
	}
	if ds.refs.total() == 0 && ds.lost == "" && time.Now().Before(ds.lingers) {
		return
	}
	d.tidy(bounded, ds)
}

// checkHealth quarantines a volume whose filesystem the kernel has found errors
// in. Its containers go on with what still works.
func (d *Driver) checkHealth(ctx context.Context, ds *dataset) {
	if !ds.mounted || ds.token == 0 || ds.lost != "" {
		return
	}
	if ds.vol.Phase == ownership.PhaseQuarantined && d.usable(ctx, ds) != nil {
		return
	}
	if err := d.cfg.Mounter.Health(d.target(ds)); errors.Is(err, mount.ErrDamaged) {
		_ = d.quarantine(ctx, ds, err) // it has logged it
	}
}

// rejoin compares everything with etcd after each registration: the first is the
// start, and while this node was not heard from, others may have taken its volumes
// over.
func (d *Driver) rejoin(ctx context.Context) {
	registered := d.cfg.Map.Registrations()
	for first := true; ; first = false {
		select {
		case <-registered:
		case <-ctx.Done():
			return
		}
		for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			err := d.readPlacements(ctx) // before anything is let go
			if err == nil {
				err = d.confirm(ctx)
			}
			if err == nil {
				break
			}
			d.log.Debugf("reconcile: %v", err)
			if !sleep(ctx, jitter(wait)) {
				return
			}
		}
		if first {
			close(d.confirmed)
		}
		select {
		case d.rejoined <- struct{}{}:
		default:
		}
	}
}

// sleep waits, and says whether ctx is still alive.
func sleep(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// refresh reads every volume's definition, for the time when etcd is away. What
// this node owns without knowing it is given back, and what it asked for without
// waiting any more is withdrawn.
func (d *Driver) refresh(ctx context.Context) {
	views, err := d.cfg.Map.List(ctx)
	if err != nil {
		d.log.Debugf("refresh: %v", err)
		return
	}
	d.rememberAll(views)
	local, tokens := map[string]bool{}, map[string]int64{}
	for _, ds := range d.local() {
		local[ds.id] = true
	}
	for _, view := range views {
		if view.Owner == nil || view.Owner.Node != d.cfg.Node.ID {
			continue
		}
		tokens[view.Volume.ID] = view.Owner.Token
		if !local[view.Volume.ID] {
			d.locked(ctx, view.Volume.ID, d.giveBack)
		}
	}
	d.sweep(ctx, tokens)
	asked, err := d.cfg.Map.Asked(ctx)
	if err != nil {
		d.log.Debugf("refresh: %v", err)
	}
	for _, req := range asked {
		d.withdrawOld(ctx, req)
	}
}

// withdrawOld takes back a request that nobody here waits for: who waits has the
// dataset's lock.
func (d *Driver) withdrawOld(ctx context.Context, req ownership.Request) {
	ds, done := d.hold(req.Volume)
	defer done()
	soon, giveUp := context.WithTimeout(ctx, poll)
	defer giveUp()
	if ds.acquire(soon) != nil {
		return
	}
	defer ds.unlock()
	if err := d.cfg.Map.Withdraw(ctx, ownership.Owner{Volume: req.Volume, Node: req.Owner}); err != nil {
		d.log.Debugf("withdraw an old request: %v", err)
	}
}

// purge finishes removals: the storage behind a tombstone, then the tombstone.
func (d *Driver) purge(ctx context.Context) {
	tombstones, err := d.cfg.Map.Deleting(ctx)
	if err != nil {
		return
	}
	down := map[string]bool{} // backends that do not answer: one wait for each is enough
	for _, vol := range tombstones {
		if down[vol.Backend] {
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, undoTimeout)
		err := d.destroy(bounded, vol)
		cancel()
		if err != nil {
			d.log.WithField("volume", vol.Name).Debugf("remove its storage: %v", err)
			down[vol.Backend] = errors.Is(err, backends.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
		}
	}
}
