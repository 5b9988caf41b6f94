package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// A placement (ownership.Placement) is where an operator wants a volume. It is a wish: its
// node mounts the volume as a Mount of Docker's would, by the same code, and does not
// count it as used. As long as the placement names this node, tidy leaves what is
// mounted alone; a request of another node finds the volume idle, as far as the
// placement goes. What was taken away meanwhile is mounted again by the next look.

const (
	// placeRound is about how often a node compares what it has with the placements.
	placeRound = 10 * time.Second
	// placeTime bounds one try to follow a placement, a takeover included.
	placeTime = 2 * time.Minute
	// placeAtOnce is how many are followed at the same time.
	placeAtOnce = 16
	// busyRound is how often at the least a busy owner is asked again. It costs whoever
	// uses the volume a write-back; the end of the use is seen without.
	busyRound = 5 * time.Minute
)

// keeper is one volume on its way to where its placement says.
type keeper struct {
	wake     chan struct{} // capacity 1: the placement has changed
	revision int64         // of the placement that is being followed; 0 for none
	fault    string        // of the last try
}

// presence is the tenure and the registration in which a node has said that it has a
// volume mounted.
type presence struct {
	token, term int64
	// leaving says that it is not placed here any more, and was mounted still: in use,
	// perhaps. What was said is taken back with the ownership.
	leaving bool
}

// Move says on which host a volume is to be, given by its name or its node's id; "" is
// nowhere. It is recorded, and comes about by itself: the answer does not wait for it.
func (d *Driver) Move(ctx context.Context, name, host, by string) (ownership.Placement, error) {
	return d.MoveVolume(ctx, name, "", host, by)
}

// MoveVolume is Move for who means the volume of one id: if the volume of that name is
// another one by now, the error is an ErrNotFound. "" is any.
func (d *Driver) MoveVolume(ctx context.Context, name, id, host, by string) (ownership.Placement, error) {
	view, err := d.cfg.Map.Lookup(ctx, name)
	if err != nil {
		return ownership.Placement{}, d.explain(name, err)
	}
	if err := meant(view.Volume, id); err != nil {
		return ownership.Placement{}, err
	}
	var p ownership.Placement
	if host == "" {
		err = d.cfg.Map.Unplace(ctx, view.Volume.ID, by)
	} else {
		p, err = d.cfg.Map.Place(ctx, view.Volume.ID, host, by)
	}
	if err != nil {
		return ownership.Placement{}, d.explain(name, err)
	}
	return p, nil
}

// placement returns where a volume is wanted, as this node has read it.
func (d *Driver) placement(vid string) (p ownership.Placement, here bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p = d.placements[vid]
	return p, p.Node == d.cfg.Node.ID
}

// placedHere says that this node is to keep a volume mounted.
func (d *Driver) placedHere(vid string) bool {
	_, here := d.placement(vid)
	return here
}

// misplaced is why a volume that is wanted here is not, or "".
func (d *Driver) misplaced(vid string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k := d.keepers[vid]; k != nil {
		return k.fault
	}
	return ""
}

// readPlacements reads all of them: of a volume that is wanted elsewhere, a Mount here
// has to know.
func (d *Driver) readPlacements(ctx context.Context) error {
	all, revision, err := d.cfg.Map.Placements(ctx)
	if err != nil {
		return err
	}
	placements := make(map[string]ownership.Placement, len(all))
	for _, p := range all {
		placements[p.Volume] = p
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if revision >= d.placedAt { // what is known is of a later time otherwise
		d.placements, d.placedAt = placements, revision
	}
	return nil
}

// changePlacements takes over what has happened since they were read.
func (d *Driver) changePlacements(changed []ownership.Placement) {
	d.mu.Lock()
	defer d.mu.Unlock()
	since := d.placedAt
	for _, p := range changed {
		if p.Revision <= since || p.Revision <= d.placements[p.Volume].Revision {
			continue
		}
		if d.placedAt = p.Revision; p.Node == "" {
			delete(d.placements, p.Volume)
		} else {
			d.placements[p.Volume] = p
		}
	}
}

// keepPlaced brings the volumes of this node to where their placements say. It reads them
// all now and then only: there may be very many, and each node does so.
func (d *Driver) keepPlaced(ctx context.Context) {
	changes := d.cfg.Map.FollowPlacements(ctx)
	select {
	case <-d.confirmed:
	case <-ctx.Done():
		return
	}
	slots := make(chan struct{}, placeAtOnce)
	known, read := false, time.Time{}
	hear := func(c ownership.PlacementChanges) {
		if known = known && !c.Begins; known {
			d.changePlacements(c.Changed)
		}
	}
	for {
		if !known || time.Since(read) > refreshRounds*placeRound { // a watch may lose events
			err := d.readPlacements(ctx)
			if known, read = err == nil, time.Now(); err != nil {
				d.log.Debugf("placements: %v", err)
			}
		}
		d.keepAll(slots)
		select {
		case c := <-changes:
			hear(c)
			for more := time.After(20 * time.Millisecond); more != nil; { // there may be more of them
				select {
				case c := <-changes:
					hear(c)
				case <-more:
					more = nil
				}
			}
		case <-d.rejoined:
		case <-time.After(jitter(placeRound)):
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// keepAll has everything brought to its place that is not, without waiting for it.
func (d *Driver) keepAll(slots chan struct{}) {
	term := d.cfg.Map.Term()
	d.mu.Lock()
	defer d.mu.Unlock()
	for vid, k := range d.keepers {
		if k.revision == d.placements[vid].Revision {
			continue
		}
		select {
		case k.wake <- struct{}{}:
		default:
		}
	}
	for vid := range d.unsettled(term) {
		if d.keepers[vid] != nil || d.ctx.Err() != nil {
			continue
		}
		k := &keeper{wake: make(chan struct{}, 1)}
		d.keepers[vid] = k
		d.work.Go(func() { d.keep(d.ctx, vid, k, slots) })
	}
}

// unsettled are the volumes which are not as their placements say, as far as that is this
// node's doing; d.mu is held.
func (d *Driver) unsettled(term int64) map[string]bool {
	vids := map[string]bool{}
	for vid, p := range d.placements {
		if p.Node == d.cfg.Node.ID {
			vids[vid] = true
		}
	}
	for vid, ds := range d.datasets {
		s := ds.snapshot.Load()
		told := s.present.token != 0 && s.present.token == s.token
		if !vids[vid] {
			vids[vid] = told && (!s.present.leaving || !s.mounted)
		} else if s.mounted && s.lost == "" && told && !s.present.leaving && (s.present.term == term || term == 0) {
			vids[vid] = false
		}
	}
	maps.DeleteFunc(vids, func(_ string, unsettled bool) bool { return !unsettled })
	return vids
}

// keep follows the placement of one volume until that is done.
func (d *Driver) keep(ctx context.Context, vid string, k *keeper, slots chan struct{}) {
	watch, stop := context.WithCancel(ctx)
	defer stop()
	var moved <-chan struct{}
	for tries := 1; ; tries++ {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		d.mu.Lock()
		k.revision = d.placements[vid].Revision
		d.mu.Unlock()
		name, err := d.place(ctx, vid)
		<-slots
		var now string
		if err != nil {
			now = err.Error()
		}
		d.mu.Lock()
		before := k.fault
		k.fault = now
		done := err == nil && len(k.wake) == 0
		if done {
			delete(d.keepers, vid)
		}
		d.mu.Unlock()
		if done {
			return
		}
		if now != "" && now != before {
			d.log.WithField("volume", name).Warnf("placement: %s", now)
		}
		wait, ended := backOff(tries, d.cfg.Reconcile), (<-chan struct{})(nil)
		if _, busy := errors.AsType[*ownership.BusyError](err); busy {
			if moved == nil {
				moved = d.cfg.Map.WatchOwner(watch, vid)
			}
			wait, ended = backOff(tries, busyRound), moved
		}
		timer := time.NewTimer(jitter(wait))
		select {
		case <-k.wake:
			tries = 0
		case <-ended:
			sleep(ctx, jitter(100*time.Millisecond))
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// place is one try to follow the placement of one volume, which may be none of this node.
func (d *Driver) place(ctx context.Context, vid string) (name string, err error) {
	ds, done := d.hold(vid)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, placeTime)
	defer cancel()
	if err := ds.acquire(ctx); err != nil {
		return vid, err
	}
	defer ds.unlock()
	p, here := d.placement(vid)
	if !here {
		return ds.vol.Name, d.unplace(ctx, ds)
	}
	ctx = ownership.By(ctx, p.By)
	if ds.idle() {
		view, err := d.cfg.Map.View(ctx, vid)
		if err != nil {
			return vid, gone(d.explain(vid, err))
		}
		ds.vol = view.Volume
	}
	if err := d.mount(ctx, ds, placing, ""); err != nil {
		return ds.vol.Name, gone(err)
	}
	path := d.mountpoint(vid)
	if d.cfg.HostPath != nil {
		if path = d.cfg.HostPath(path); path == "" {
			return ds.vol.Name, fmt.Errorf("volume %s is mounted; where the host has it, Docker has not said yet", ds.vol.Name)
		}
	}
	term := d.cfg.Map.Term() // before, so that it is not ascribed to a later one
	if err := d.cfg.Map.Present(ctx, vid, ds.token, path); err != nil {
		return ds.vol.Name, d.explain(ds.vol.Name, err)
	}
	ds.present = presence{token: ds.token, term: term}
	return ds.vol.Name, nil
}

// gone passes over that a volume is deleted: so is its placement.
func gone(err error) error {
	if errors.Is(err, ownership.ErrNotFound) {
		return nil
	}
	return err
}

// unplace drops the use that a placement made of a volume. It is then let go like one
// whose last container has ended.
func (d *Driver) unplace(ctx context.Context, ds *dataset) error {
	if err := d.leased(ctx, ds); err != nil {
		return err
	}
	if ds.mounted {
		ds.present.leaving = true
	} else if ds.present.token != 0 {
		if err := d.cfg.Map.Absent(ctx, ds.id); err != nil {
			return d.explain(ds.vol.Name, err)
		}
		ds.present = presence{}
	}
	d.tidySoon(ds)
	return nil
}

// leased is an error while a lease keeps a volume on this node.
func (d *Driver) leased(ctx context.Context, ds *dataset) error {
	l, err := d.cfg.Map.Leased(ctx, ds.id)
	if err != nil || l == nil || l.Node != d.cfg.Node.ID {
		return err
	}
	return &ownership.LeasedError{Lease: *l}
}

// placeHere moves the placement of a volume that a container here has claimed from
// another node, so that the two do not take it from each other for ever.
func (d *Driver) placeHere(ctx context.Context, ds *dataset) {
	was, here := d.placement(ds.id)
	if was.Node == "" || here {
		return
	}
	log := d.log.WithField("volume", ds.vol.Name)
	p, err := d.cfg.Map.PlaceHere(ctx, was, "docker on host "+d.cfg.Node.Host)
	switch {
	case errors.Is(err, ownership.ErrConflict): // somebody has just decided otherwise
	case err != nil:
		log.Warnf("its placement is still on host %s: %v", was.Host, err)
	default:
		log.Infof("placed here, and no longer on host %s: a container here uses it", was.Host)
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.placements[ds.id].Revision < p.Revision {
			d.placements[ds.id] = p
		}
	}
}

// cordoned refuses to get anything more while this host is cordoned.
func (d *Driver) cordoned(name string) error {
	if !d.cfg.Map.Cordoned() {
		return nil
	}
	host := d.cfg.Node.Host
	return fmt.Errorf("volume %s: host %s is cordoned: docker flocker node uncordon %s, or start the container on another host", name, host, host)
}

// Cordon has a host, given by its name or its node's id, get no more volumes, or ends that.
// What it has mounted goes on.
func (d *Driver) Cordon(ctx context.Context, host, by string, on bool) error {
	state := ""
	if on {
		state = ownership.Cordoned
	}
	_, err := d.cfg.Map.SetNodeState(ctx, host, state, by)
	return err
}

// RemoveNode marks a host that does not come back. It must not be live, or own volumes.
func (d *Driver) RemoveNode(ctx context.Context, host, by string) error {
	_, err := d.cfg.Map.RemoveNode(ctx, host, by)
	return err
}

// Drained is what came of a Drain, by the volumes' names.
type Drained struct {
	// Released are free, or another host's, now; Moving are not yet. Nothing more need be
	// done for either.
	Released, Moving []string
	// Busy are in use.
	Busy []BusyVolume
}

// BusyVolume is a volume that its host does not let go.
type BusyVolume struct {
	Name       string
	Containers []string
	// Detail says more, where there is more to say.
	Detail string
}

// drainTime is how long a Drain waits for the host.
const drainTime = 15 * time.Second

// Drain cordons a host and has it let go of everything that nothing uses; placements on
// it are taken away. It may be asked again, until nothing is busy.
func (d *Driver) Drain(ctx context.Context, host, by string) (Drained, error) {
	node, err := d.cfg.Map.SetNodeState(ctx, host, ownership.Cordoned, by)
	if err != nil {
		return Drained{}, err
	}
	if _, err := d.cfg.Map.Vacate(ctx, node.ID, by); err != nil {
		return Drained{}, err
	}
	views, err := d.cfg.Map.List(ctx)
	if err != nil {
		return Drained{}, err
	}
	owned := map[string]ownership.View{}
	var silent []string
	for _, v := range views {
		if v.Owner != nil && v.Owner.Node == node.ID {
			owned[v.Volume.ID] = v
			if !v.OwnerLive {
				silent = append(silent, v.Volume.Name)
			}
		}
	}
	if len(silent) > 0 {
		return Drained{}, &ownership.RefusedError{Text: fmt.Sprintf("host %s has not been heard from: it is cordoned now, and still owns %s; if it is switched off, type: %s",
			node.Host, strings.Join(silent, ", "), confirmCommand(node.Host))}
	}
	bounded, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	var (
		mu      sync.Mutex
		drained Drained
		asked   = map[string]bool{}
	)
	d.several(bounded, slices.Collect(maps.Keys(owned)), func(ctx context.Context, vid string) {
		free, busy := d.drain(ctx, owned[vid])
		mu.Lock()
		defer mu.Unlock()
		name := owned[vid].Volume.Name
		if asked[vid] = true; free {
			drained.Released = append(drained.Released, name)
		} else if busy != nil {
			drained.Busy = append(drained.Busy, BusyVolume{Name: name, Containers: busy.Reply.Containers, Detail: busy.Reply.Detail})
		} else {
			drained.Moving = append(drained.Moving, name)
		}
	})
	for vid, v := range owned {
		if !asked[vid] { // there was no time for it
			drained.Moving = append(drained.Moving, v.Volume.Name)
		}
	}
	slices.Sort(drained.Released)
	slices.Sort(drained.Moving)
	slices.SortFunc(drained.Busy, func(a, b BusyVolume) int { return strings.Compare(a.Name, b.Name) })
	return drained, nil
}

// drain asks the owner of one volume to let go of it.
func (d *Driver) drain(ctx context.Context, view ownership.View) (free bool, busy *ownership.BusyError) {
	ds, done := d.hold(view.Volume.ID)
	defer done()
	if ds.acquire(ctx) != nil {
		return false, nil
	}
	defer ds.unlock()
	if view.Owner.Node == d.cfg.Node.ID {
		if ds.token == 0 {
			d.adopt(ctx, ds)
		}
		free, containers, err := d.giveWay(ctx, ds)
		if free {
			return true, nil
		}
		busy = &ownership.BusyError{Reply: ownership.Reply{Containers: containers}}
		if err != nil {
			busy.Reply.Detail = err.Error()
		}
		return false, busy
	}
	if ds.idle() {
		ds.vol = view.Volume
	}
	_, err := d.ask(ctx, ds, &ownership.HeldError{Volume: view.Volume, Owner: *view.Owner, Live: true}, wish{draining, time.Now()})
	d.tidySoon(ds) // it may have come here
	if busy, ok := errors.AsType[*ownership.BusyError](err); ok {
		return false, busy
	}
	if err != nil {
		return false, nil
	}
	now, err := d.cfg.Map.View(ctx, ds.id)
	if errors.Is(err, ownership.ErrNotFound) {
		return true, nil
	}
	return err == nil && (now.Owner == nil || now.Owner.Node != view.Owner.Node), nil
}
