package driver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// poll is how often a wait looks by itself: watches only wake it.
const poll = 2 * time.Second

// wish is why a volume is claimed.
type wish struct {
	purpose string
	started time.Time
}

// The purposes of a wish.
const (
	mounting = "mount"
	removing = "remove"
	placing  = "placement"
	draining = "drain" // a request that hands over to nobody
)

// claim makes this node the owner of a volume: at once if it is free, by asking
// its owner otherwise. It waits for an owner whose containers use the volume for
// the configured time, and for one that is about to let go until ctx ends. The
// dataset's lock is held.
func (d *Driver) claim(ctx context.Context, ds *dataset, purpose string) error {
	if purpose != removing {
		if err := d.cordoned(ds.vol.Name); err != nil {
			return err
		}
	}
	if err := d.ready(ctx, ds.vol); err != nil {
		return err
	}
	w := wish{purpose, time.Now()}
	for {
		owner, vol, err := d.cfg.Map.Claim(ctx, ds.id)
		if err == nil {
			ds.vol = vol
			return d.owned(ctx, ds, owner)
		}
		held, ok := errors.AsType[*ownership.HeldError](err)
		if ok && held.Volume.Phase != ownership.PhaseReady {
			// Owned, perhaps by this node's own claim whose outcome was unknown, but not
			// to be used.
			err, ok = &ownership.PhaseError{Volume: held.Volume}, false
		}
		if phase, ok := errors.AsType[*ownership.PhaseError](err); ok && phase.Volume.Phase == ownership.PhaseCreating {
			// Its creator did not finish, or has not yet: whoever is first.
			if _, err := d.finishCreate(ctx, phase.Volume); err != nil {
				return err
			}
			continue
		}
		if !ok {
			d.suspect(ds, err)
			return d.explain(ds.vol.Name, err)
		}
		ds.vol = held.Volume
		if held.Owner.Node == d.cfg.Node.ID {
			if err := d.takeUp(ctx, ds, held.Owner); !errors.Is(err, ownership.ErrLost) {
				return err
			}
			continue
		}
		next := d.ask
		if !held.Live {
			next = d.takeOver
		}
		again, err := next(ctx, ds, held, w)
		if err != nil || !again {
			return err
		}
		// What this node saw and what etcd says may differ for a moment.
		if !sleep(ctx, jitter(10*time.Millisecond)) {
			return d.explain(ds.vol.Name, ownership.ErrUnavailable)
		}
	}
}

// ready refuses to claim what could not be attached here, or be fenced here.
func (d *Driver) ready(ctx context.Context, vol ownership.Volume) error {
	if vol.Backend == "" {
		return nil // not known yet
	}
	if _, err := d.backendOf(vol); err != nil {
		return err
	}
	if d.cfg.Ready == nil {
		return nil
	}
	for started, wait := time.Now(), 200*time.Millisecond; ; wait = min(2*wait, poll) {
		err := d.cfg.Ready(ctx, vol.Backend)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, backends.ErrUnavailable) || time.Since(started) > backendPatience || !sleep(ctx, jitter(wait)):
			return fmt.Errorf("volume %s: %w", vol.Name, err)
		}
	}
}

// takeUp continues an ownership of this node that this process knows nothing of:
// with its attachment if there is one, else under a new token.
func (d *Driver) takeUp(ctx context.Context, ds *dataset, owner ownership.Owner) error {
	if d.note(ds, owner); ds.pending != nil {
		return d.finishTakeover(ctx, ds)
	}
	if err := d.findAttachment(ctx, ds); err != nil {
		return err
	}
	if err := d.dropDoubtful(ctx, ds); err != nil {
		return err
	}
	if ds.att != nil {
		return d.owned(ctx, ds, owner)
	}
	return d.retake(ctx, ds)
}

// owned notes an ownership that begins here, and finishes it if it is a takeover.
func (d *Driver) owned(ctx context.Context, ds *dataset, owner ownership.Owner) error {
	if d.note(ds, owner); ds.pending != nil {
		return d.finishTakeover(ctx, ds)
	}
	if ds.oldBoot {
		return d.retake(ctx, ds) // the record must not say that a restart has freed it
	}
	ds.doubt = false
	return nil
}

// note takes over what etcd says of this node's ownership.
func (d *Driver) note(ds *dataset, owner ownership.Owner) {
	ds.token, ds.verified, ds.pending = owner.Token, 0, owner.Pending
	ds.oldBoot = owner.Boot != d.cfg.Node.Boot
	if ds.pending != nil {
		d.mayBeLate(ds) // the fence an earlier process of this host died with
	}
}

// ask requests the volume from its live owner and waits. again says to claim
// anew: the owner changed. With neither again nor an error it is ours.
func (d *Driver) ask(ctx context.Context, ds *dataset, held *ownership.HeldError, w wish) (again bool, err error) {
	watch, stop := context.WithCancel(ctx)
	defer stop()
	changed := d.cfg.Map.WatchVolume(watch, ds.id)

	switch err := d.cfg.Map.Request(ctx, held.Owner, w.purpose); {
	case errors.Is(err, ownership.ErrConflict):
		_ = d.cfg.Map.Withdraw(ctx, held.Owner) // refresh gives back what it brings
		return true, nil
	case err != nil:
		if dead, ok := errors.AsType[*ownership.HeldError](err); ok && !dead.Live {
			err = nil // it ended in that moment
		} else {
			err = d.explain(ds.vol.Name, err)
		}
		return d.withdraw(ctx, ds, held.Owner, err) // it may have arrived all the same
	}
	d.log.WithField("volume", ds.vol.Name).Infof("asked host %s for it", held.Owner.Host)

	patience := time.NewTimer(max(0, d.cfg.BusyWait-time.Since(w.started)))
	defer patience.Stop()
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	impatient := d.cfg.BusyWait <= 0 || w.purpose != mounting
	for {
		view, err := d.cfg.Map.View(ctx, ds.id)
		switch {
		case err != nil && ctx.Err() == nil && errors.Is(err, ownership.ErrUnavailable):
			// Keep waiting: the request is still there, and so may be the answer.
		case err != nil && ctx.Err() == nil:
			return d.withdraw(ctx, ds, held.Owner, d.explain(ds.vol.Name, err))
		case err != nil: // the caller's time is over
		case view.Owner == nil:
			_ = d.cfg.Map.Withdraw(ctx, held.Owner)
			return true, nil
		case view.Owner.Node == d.cfg.Node.ID:
			ds.vol = view.Volume
			return false, d.owned(ctx, ds, *view.Owner)
		case view.Owner.Token != held.Owner.Token:
			_ = d.cfg.Map.Withdraw(ctx, held.Owner)
			return true, nil
		case !view.OwnerLive:
			return d.withdraw(ctx, ds, held.Owner, nil)
		}
		reply, replied, err := d.cfg.Map.Replied(ctx, ds.id)
		busy := err == nil && replied && reply.Node == held.Owner.Node && reply.Busy
		if busy && impatient {
			return d.withdraw(ctx, ds, held.Owner, d.busyError(ds, reply, w))
		}
		select {
		case <-changed:
		case <-ticker.C:
			// The request is on this node's lease, which may have ended meanwhile.
			if errors.Is(d.cfg.Map.Request(ctx, held.Owner, w.purpose), ownership.ErrConflict) {
				continue
			}
			if d.condemned(ctx, held.Owner) {
				if again, err := d.withdraw(ctx, ds, held.Owner, nil); err != nil || !again {
					return again, err
				}
				return d.takeOver(ctx, ds, held, w)
			}
		case <-patience.C:
			impatient = true
		case <-ctx.Done():
			if busy {
				return d.withdraw(ctx, ds, held.Owner, d.busyError(ds, reply, w))
			}
			return d.withdraw(ctx, ds, held.Owner, fmt.Errorf("volume %s is still moving here from host %s; retry: %w",
				ds.vol.Name, held.Owner.Host, context.Cause(ctx)))
		}
	}
}

// withdraw takes the request back and returns cause, unless the owner handed
// over in that moment: then the volume is ours after all. Without a cause the
// caller is to claim anew.
func (d *Driver) withdraw(ctx context.Context, ds *dataset, owner ownership.Owner, cause error) (again bool, err error) {
	gone := ctx.Err() != nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := d.cfg.Map.Withdraw(ctx, owner); err != nil {
		return false, errors.Join(cause, fmt.Errorf("withdraw the request: %w", err))
	}
	view, err := d.cfg.Map.View(ctx, ds.id)
	if err != nil || view.Owner == nil || view.Owner.Node != d.cfg.Node.ID {
		return cause == nil, cause
	}
	ds.vol = view.Volume
	if err := d.owned(ctx, ds, *view.Owner); err != nil {
		return false, errors.Join(cause, err)
	}
	if gone {
		return false, errors.Join(cause, d.release(ctx, ds))
	}
	return false, nil
}

func (d *Driver) busyError(ds *dataset, reply ownership.Reply, w wish) error {
	waited := time.Since(w.started).Round(time.Second)
	err := &ownership.BusyError{Volume: ds.vol.Name, Reply: reply, Waited: waited}
	if w.purpose == placing {
		return fmt.Errorf("%w; it comes here when that ends", err)
	}
	if waited < time.Second {
		return fmt.Errorf("%w; stop what uses it there and retry", err)
	}
	return fmt.Errorf("%w; waited %s for it to stop; stop what uses it there and retry", err, waited)
}

// serve answers the other nodes' requests for volumes this node owns.
func (d *Driver) serve(ctx context.Context) {
	wake := d.cfg.Map.WatchRequests(ctx)
	for {
		waiting, err := d.cfg.Map.Waiting(ctx)
		if err == nil {
			d.setWaiting(waiting)
			for _, vid := range d.toAnswer() {
				d.background(func(ctx context.Context) { d.answer(ctx, vid) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-time.After(jitter(poll * 5)):
		}
	}
}

// answer lets go of a volume another node asks for, or says why not.
func (d *Driver) answer(ctx context.Context, vid string) {
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.answering, vid)
	}()
	ds, done := d.hold(vid)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if ds.acquire(ctx) != nil {
		return // a long operation holds it; the next look finds the request again
	}
	defer ds.unlock()
	waiting := d.waitingFor(vid)
	if len(waiting) == 0 {
		return
	}
	if ds.token == 0 {
		d.adopt(ctx, ds)
	}
	if ds.token == 0 {
		return
	}
	free, containers, err := d.giveWay(ctx, ds)
	if free {
		return
	}
	for _, req := range waiting {
		reply := ownership.Reply{Volume: vid, Busy: true, Containers: containers}
		if err != nil {
			reply.Detail = err.Error()
		}
		if err := d.cfg.Map.Reply(ctx, req, reply); err != nil {
			d.log.WithField("volume", ds.vol.Name).Warnf("answer host %s: %v", req.Host, err)
		}
	}
}

// giveWay lets go of a volume that somebody else asks for, unless it is in use; if so, by
// these containers, or err says why it could not. A placement is no use.
func (d *Driver) giveWay(ctx context.Context, ds *dataset) (free bool, containers []string, err error) {
	busy, _, containers := d.inUse(ctx, ds)
	if err = tooEarly(ds); err == nil {
		err = d.finishTakeover(ctx, ds)
	}
	switch {
	case err != nil:
		d.tidySoon(ds)
		return false, containers, err
	case ds.lost != "":
		return false, containers, errors.New(ds.lost)
	case busy:
		return false, containers, nil
	}
	if err := d.leased(ctx, ds); err != nil {
		if leased, ok := errors.AsType[*ownership.LeasedError](err); ok {
			err = errors.New("leased " + leased.Lease.Until())
		}
		return false, nil, err
	}
	if err = d.letGo(ctx, ds); err == nil {
		return true, nil, nil
	}
	d.log.WithField("volume", ds.vol.Name).Infof("cannot be handed over: %v", err)
	d.tidySoon(ds)
	if errors.Is(err, mount.ErrBusy) {
		// Its Mount is not counted any more, such as after a docker cp that
		// followed a crash of this process.
		if names, _ := d.askDocker(ctx, ds); len(names) > 0 {
			containers, err = names, nil
		}
	}
	return false, containers, err
}

// adopt takes up an ownership this process knows nothing of: etcd names this node,
// from a claim whose reply was lost or an earlier process.
func (d *Driver) adopt(ctx context.Context, ds *dataset) {
	view, err := d.cfg.Map.View(ctx, ds.id)
	if err != nil || view.Owner == nil || view.Owner.Node != d.cfg.Node.ID {
		return
	}
	ds.vol = view.Volume
	if d.note(ds, *view.Owner); ds.pending != nil {
		return // tidy finishes it
	}
	if err := d.findAttachment(ctx, ds); err != nil {
		d.log.WithField("volume", ds.vol.Name).Warn(err)
	}
}

// suspect remembers a volume whose claim had an unknown outcome: it may become
// this node's at any moment, without anybody here who wants it.
func (d *Driver) suspect(ds *dataset, err error) {
	if !errors.Is(err, ownership.ErrUnavailable) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suspects[ds.id] = time.Now()
}

// jitter returns about d, between three and five quarters of it.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d*3/4 + rand.N(d/2+1)
}

func (d *Driver) setWaiting(requests []ownership.Request) {
	waiting := map[string][]ownership.Request{}
	for _, r := range requests {
		waiting[r.Volume] = append(waiting[r.Volume], r)
	}
	for _, list := range waiting {
		slices.SortFunc(list, func(a, b ownership.Request) int { return int(a.Revision - b.Revision) })
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting = waiting
}

// waitingFor returns who waits for a volume of this node, oldest first.
func (d *Driver) waitingFor(vid string) []ownership.Request {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting[vid]
}

// toAnswer returns the volumes other nodes wait for, without those that are being
// answered: who asks asks again, and many answers would keep Unmount from the
// dataset's lock.
func (d *Driver) toAnswer() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var vids []string
	for vid := range d.waiting {
		if !d.answering[vid] {
			d.answering[vid] = true
			vids = append(vids, vid)
		}
	}
	return vids
}
