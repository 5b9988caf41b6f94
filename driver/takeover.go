package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Taking a volume over from an owner that is dead: record, fence, observe, commit.
//
//	grounds   may it be taken at all, by the storage's class, and since when is
//	          the owner silent
//	Seize     the record: this node is the owner, pending the fence (etcd)
//	Fence     the storage cuts the former owner off and says so
//	Settle    the commit, under a new token; only then is the volume attached
//
// Between Seize and Settle the volume is neither used nor given away. Whoever
// finds it so goes on with the fence: this process after a failure, the next one
// of this host after a crash, another host once this one is silent.

// fenceTimeout bounds one call of a Fencer that needs no more.
const fenceTimeout = 30 * time.Second

// fenceTime bounds one call of a volume's Fencer.
func (d *Driver) fenceTime(vol ownership.Volume) time.Duration {
	if backend, err := d.backendOf(vol); err == nil {
		return cmp.Or(backend.Properties().FenceTime, fenceTimeout)
	}
	return fenceTimeout
}

// takeOver takes a volume from an owner that is not heard from. again says to
// claim anew: the owner changed, or is back. The dataset's lock is held.
func (d *Driver) takeOver(ctx context.Context, ds *dataset, held *ownership.HeldError, w wish) (again bool, err error) {
	grounds, err := d.grounds(ctx, held, w.purpose)
	if errors.Is(err, ownership.ErrConflict) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	owner, vol, err := d.cfg.Map.Seize(ctx, held.Owner, grounds)
	switch {
	case errors.Is(err, ownership.ErrConflict):
		return true, nil
	case err != nil:
		d.suspect(ds, err)
		return false, d.explain(held.Volume.Name, err)
	}
	d.log.WithField("volume", vol.Name).Warnf("taking it over from host %s (%s)", owner.Pending.Host, grounds)
	ds.vol = vol
	late := ds.late
	if d.note(ds, owner); held.Owner.Pending == nil {
		ds.late = late // nobody has begun with the fence
	}
	return false, d.finishTakeover(ctx, ds)
}

// grounds decides whether a volume may be taken from its silent owner, and waits
// until it may. ErrConflict: the owner is back, or has changed.
func (d *Driver) grounds(ctx context.Context, held *ownership.HeldError, purpose string) (ownership.Grounds, error) {
	owner := held.Owner
	if owner.Pending != nil {
		// Its owner died while it was taking the volume over, and never attached it:
		// what the first takeover was founded on still holds.
		return ownership.GroundsSilent, d.awaitSilence(ctx, held)
	}
	backend, err := d.backendOf(held.Volume)
	if err != nil {
		return "", err
	}
	byHand := fmt.Sprintf("make sure host %s is switched off, then type: %s", owner.Host, confirmCommand(owner.Host))
	death, err := d.cfg.Map.Died(ctx, owner.Node, owner.Boot)
	switch {
	case err != nil:
		return "", d.explain(held.Volume.Name, err)
	case death != nil:
		return ownership.GroundsConfirmed, d.awaitGivenUp(ctx, held, backend, *death)
	case purpose == removing:
		way := "mount the volume on another host first, which takes it over"
		if !canFence(backend) {
			way = byHand
		}
		return "", d.deadOwner(held, "it may be in use there, so it was not removed: bring host "+owner.Host+" back; or "+way)
	case canFence(backend):
		if err := d.awaitSilence(ctx, held); err != nil {
			return "", err
		}
		if err := d.cfg.Map.Storm(); err != nil { // the others may have fallen silent a little later
			return "", d.deadOwner(held, err.Error())
		}
		return ownership.GroundsSilent, nil
	}
	rebooted, err := d.rebooted(ctx, owner)
	if err != nil {
		return "", d.explain(held.Volume.Name, err)
	}
	if rebooted {
		return ownership.GroundsRebooted, d.awaitSilence(ctx, held)
	}
	return "", d.deadOwner(held, held.Volume.Backend+" cannot cut it off, so nothing was changed: "+byHand)
}

// giveUpTime is how long a host has to give up what it has open, after it was declared
// dead although it may be live; and the hold on top of that.
const giveUpTime = 30 * time.Second

// awaitGivenUp waits for an owner that was declared dead by force, where nothing but
// its own doing ends its writes. It takes the declaration back when it has given up
// everything: ErrConflict then. One that has not for giveUpTime and the hold, since
// this node came to know of the declaration, hangs, and the operator is believed.
func (d *Driver) awaitGivenUp(ctx context.Context, held *ownership.HeldError, backend backends.Backend, death ownership.Death) error {
	owner := held.Owner
	if !death.Forced || canFence(backend) {
		return nil
	}
	if rebooted, err := d.rebooted(ctx, owner); rebooted || err != nil {
		return err
	}
	patience := giveUpTime + d.cfg.Hold
	since := d.forcedSince(death)
	for {
		if silent, ok := d.cfg.Map.Silence(owner.Node); ok && silent >= patience {
			return nil // it was off before anybody said so
		}
		wait := patience - time.Since(since)
		if wait <= 0 {
			d.log.WithField("volume", held.Volume.Name).Errorf("host %s has not said for %s that it has given up what it has", owner.Host, patience)
			return nil
		}
		sleep(ctx, min(wait, poll/2))
		view, unseen := d.cfg.Map.View(ctx, held.Volume.ID)
		now, err := d.cfg.Map.Died(ctx, owner.Node, owner.Boot)
		switch err = errors.Join(unseen, err); {
		case ctx.Err() != nil:
			return d.deadOwner(held, fmt.Sprintf("it was declared dead by force, and has not yet said that it has given up its volumes; "+
				"without that it is taken over in %s; retry", max((patience-time.Since(since)).Round(time.Second), time.Second)))
		case err != nil:
			return d.explain(held.Volume.Name, err)
		case view.Owner == nil, view.Owner.Token != owner.Token, now == nil && view.OwnerLive:
			return fmt.Errorf("volume %s: %w", held.Volume.Name, ownership.ErrConflict)
		}
	}
}

// forcedSince returns when this node came to know of a declaration. The time in it is
// another host's.
func (d *Driver) forcedSince(death ownership.Death) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.forced[death.Revision]; !ok {
		d.forced[death.Revision] = time.Now()
	}
	return d.forced[death.Revision]
}

// condemned says that a live owner was declared dead by force: it is to give up all it
// has, and may be past answering.
func (d *Driver) condemned(ctx context.Context, owner ownership.Owner) bool {
	death, err := d.cfg.Map.Died(ctx, owner.Node, owner.Boot)
	if err != nil || death == nil || !death.Forced {
		return false
	}
	rebooted, err := d.rebooted(ctx, owner)
	return err == nil && !rebooted
}

// canFence says that the storage itself can keep a host from writing a volume.
func canFence(backend backends.Backend) bool {
	class := backend.Properties().Class
	return class == backends.ClassExclusive || class == backends.ClassFenced
}

// confirmCommand is what an operator types to say that a host is dead.
func confirmCommand(host string) string { return "docker flocker node confirm-dead " + host }

// rebooted says that the owner's host has registered under a newer boot than the
// one it took the volume in: what that one had mounted is gone.
func (d *Driver) rebooted(ctx context.Context, owner ownership.Owner) (bool, error) {
	nodes, err := d.cfg.Map.Nodes(ctx)
	if err != nil {
		return false, err
	}
	for _, n := range nodes {
		if n.ID == owner.Node {
			return n.Boot != owner.Boot, nil
		}
	}
	return false, nil
}

// awaitSilence waits until the owner has been silent for the hold, as seen by this
// node without a gap. ErrConflict if it is heard from.
func (d *Driver) awaitSilence(ctx context.Context, held *ownership.HeldError) error {
	started := time.Now()
	for {
		if err := d.cfg.Map.Live(); err != nil {
			return d.explain(held.Volume.Name, err)
		}
		silent, ok := d.cfg.Map.Silence(held.Owner.Node)
		if ok && silent >= d.cfg.Hold {
			return nil
		}
		wait := 100 * time.Millisecond // until the watch has seen it too, or it is back
		if ok {
			wait = min(d.cfg.Hold-silent, poll)
		} else if time.Since(started) > poll {
			return fmt.Errorf("volume %s: %w", held.Volume.Name, ownership.ErrConflict)
		}
		if !sleep(ctx, wait) {
			return d.deadOwner(held, fmt.Sprintf("it is taken over when host %s has been silent for %s; retry", held.Owner.Host, d.cfg.Hold))
		}
	}
}

// deadOwner says that a volume's owner is not heard from, and what comes of it.
func (d *Driver) deadOwner(held *ownership.HeldError, what string) error {
	since := ""
	if silent, ok := d.cfg.Map.Silence(held.Owner.Node); ok && silent >= time.Second {
		since = " for " + silent.Truncate(time.Second).String()
	}
	return fmt.Errorf("%w%s; %s", held, since, what)
}

// finishTakeover fences the former owner of a volume that this node has seized,
// and commits. It is repeated until it succeeds.
func (d *Driver) finishTakeover(ctx context.Context, ds *dataset) (err error) {
	if ds.pending == nil {
		return nil
	}
	from := *ds.pending
	defer func() {
		if err != nil {
			ds.fault = err.Error()
			ds.publish()
		}
	}()
	if err := d.awaitLate(ctx, ds); err != nil {
		return err
	}
	evidence, err := d.fence(ctx, ds, from)
	if err != nil {
		return err
	}
	owner, vol, err := d.cfg.Map.Settle(ctx, ownership.Owner{Volume: ds.id, Node: d.cfg.Node.ID, Token: ds.token, Pending: &from}, evidence)
	if errors.Is(err, ownership.ErrLost) {
		d.disown(ds)
	}
	if err != nil {
		return d.explain(ds.vol.Name, err)
	}
	ds.vol, ds.token, ds.pending, ds.fault = vol, owner.Token, nil, ""
	d.log.WithField("volume", vol.Name).Warnf("taken over from host %s (token %d), which was cut off: %s", from.Host, from.Token, evidence)
	return nil
}

// fence cuts the former owner off, and returns what was seen of that.
func (d *Driver) fence(ctx context.Context, ds *dataset, from ownership.Pending) (evidence string, err error) {
	backend, err := d.backendOf(ds.vol)
	if err != nil {
		return "", err
	}
	fencer, ok := backends.As[backends.Fencer](backend)
	if !ok {
		return d.fencedByHand(ctx, ds, from)
	}
	// A fence that is sent late must not be this node's any more.
	if err := d.cfg.Map.Check(ctx, ds.id, ds.token); err != nil {
		if errors.Is(err, ownership.ErrLost) {
			d.disown(ds)
		}
		return "", d.explain(ds.vol.Name, err)
	}
	bounded, cancel := context.WithTimeout(ctx, d.fenceTime(ds.vol))
	defer cancel()
	evidence, err = fencer.Fence(bounded, backends.FenceRequest{
		Ref: ds.vol.Ref, Volume: ds.id, Node: from.Node, Identity: from.Identities[ds.vol.Backend], Token: from.Token,
	})
	if err != nil {
		d.mayBeLate(ds)
		return "", fmt.Errorf("volume %s: host %s, which owned it, could not be cut off from it: %w; it is tried again",
			ds.vol.Name, from.Host, err)
	}
	return evidence, nil
}

// refence cuts off a node whose attach, of an older token, has arrived since it was
// cut off or had let go. False if the attachment is none of that kind.
func (d *Driver) refence(ctx context.Context, backend backends.Backend, ds *dataset, other *backends.AttachedError) (bool, error) {
	if !canFence(backend) || other.Node == "" || other.Token >= ds.token {
		return false, nil
	}
	nodes, err := d.cfg.Map.Nodes(ctx)
	if err != nil {
		return false, d.explain(ds.vol.Name, err)
	}
	from := ownership.Pending{Node: other.Node, Host: other.Node, Token: other.Token}
	for _, n := range nodes {
		if n.ID == other.Node {
			from.Host, from.Identities = n.Host, n.Identities
		}
	}
	d.log.WithField("volume", ds.vol.Name).Warnf("cutting off host %s, which has it attached under token %d", from.Host, from.Token)
	err = d.mark(ds, func() error {
		_, err := d.fence(ctx, ds, from)
		return err
	})
	return true, err
}

// fencedByHand is the fence of storage that has none: the operator's word that the
// former owner is dead, or that its host has been started anew.
func (d *Driver) fencedByHand(ctx context.Context, ds *dataset, from ownership.Pending) (evidence string, err error) {
	switch from.Grounds {
	case ownership.GroundsRebooted:
		return "host " + from.Host + " has been started anew", nil
	case ownership.GroundsConfirmed:
		return "an operator declared host " + from.Host + " dead", nil
	case ownership.GroundsSilent:
	}
	death, err := d.cfg.Map.Died(ctx, from.Node, from.Boot)
	switch {
	case err != nil:
		return "", d.explain(ds.vol.Name, err)
	case death == nil:
		return "", fmt.Errorf("volume %s: %s cannot cut host %s off; if that host is dead, type: %s",
			ds.vol.Name, ds.vol.Backend, from.Host, confirmCommand(from.Host))
	}
	return death.By + " declared it dead: " + death.Evidence, nil
}

// mayBeLate notes that a call which names the volume may still take effect.
func (d *Driver) mayBeLate(ds *dataset) {
	backend, err := d.backendOf(ds.vol)
	if err != nil || backend.Properties().LateCalls == 0 {
		return
	}
	ds.late = time.Now().Add(backend.Properties().LateCalls)
}

// mark makes a call that ends an attachment beside the one in the journal. Where that
// may come late, it is on disk before: also a process that starts after this one was
// killed in the middle waits until it can take no effect any more.
func (d *Driver) mark(ds *dataset, call func() error) error {
	before := ds.late
	if d.mayBeLate(ds); ds.late != before {
		if err := d.journal.save(ds.record(d.cfg.Node.Boot)); err != nil {
			ds.late = before
			return err
		}
	}
	if err := call(); err != nil {
		d.mayBeLate(ds)
		return err
	}
	ds.late = before // the storage has shown the effect; the record goes with the next save
	return nil
}

// forgetLate removes the record of a volume that is here no more, once no earlier call
// for it can take effect.
func (d *Driver) forgetLate(ds *dataset) {
	if wait := time.Until(ds.late); wait > 0 {
		d.schedule(ds, wait)
		return
	}
	ds.late = time.Time{}
	if err := d.journal.remove(ds.id); err != nil {
		d.log.WithField("volume", ds.vol.Name).Warn(err)
	}
}

// awaitLate waits until no earlier call can hit what is done next: where the
// storage knows an attachment by volume and node alone, a late detach or fence
// would hit the new one.
func (d *Driver) awaitLate(ctx context.Context, ds *dataset) error {
	if wait := time.Until(ds.late); wait > 0 && !sleep(ctx, wait) {
		return tooEarly(ds)
	}
	return nil
}

// tooEarly is nil, or says that an earlier call may still take effect.
func tooEarly(ds *dataset) error {
	wait := time.Until(ds.late)
	if wait <= 0 {
		return nil
	}
	return fmt.Errorf("volume %s: an earlier call to %s may still take effect for %s; retry then",
		ds.vol.Name, ds.vol.Backend, max(wait.Round(time.Second), time.Second))
}

// lose takes down what this node has of a volume it no longer owns, without its
// containers' consent: the storage may have cut this node off, or an operator has
// declared it dead, and the data is another host's now. The order is that of the
// safety rules: nothing more reaches the device, then the containers end, then it
// can be unmounted and detached. What still holds it blocks the volume here.
func (d *Driver) lose(ctx context.Context, ds *dataset) {
	log := d.log.WithField("volume", ds.vol.Name)
	if ds.lost == "" {
		log.Error("this host no longer owns it; what has it open here is stopped")
	}
	ds.lost, ds.pending = "this host no longer owns it, but has it still open; its containers are being stopped", nil
	ds.publish()
	if err := d.cfg.Mounter.Shutdown(ctx, d.target(ds)); err != nil {
		log.Errorf("no longer the owner: shut its filesystem down: %v", err)
	}
	if killed, err := d.killContainers(ctx, ds); err != nil {
		log.Errorf("no longer the owner: kill its containers: %v", err)
	} else if len(killed) > 0 {
		log.Warnf("no longer the owner: killed %s", strings.Join(killed, ", "))
	}
	if err := d.closeFilesystem(ctx, ds); err != nil {
		log.Errorf("no longer the owner: %v", err)
		return
	}
	if err := d.detach(ctx, ds); err != nil {
		log.Errorf("no longer the owner: %v", err)
		return
	}
	log.Warn("no longer the owner; unmounted and detached")
	ds.lost = ""
	d.disown(ds)
}

// killContainers kills what uses a lost volume.
func (d *Driver) killContainers(ctx context.Context, ds *dataset) ([]string, error) {
	if d.cfg.Docker == nil || ds.vol.Name == "" || ds.att == nil && ds.stray == "" {
		return nil, nil
	}
	return d.cfg.Docker.Kill(ctx, ds.vol.Name, ds.id)
}

// GiveUp takes down everything this node has, because an operator has declared it
// dead: others may have it by now. An error says what is still open; it is called
// again then.
func (d *Driver) GiveUp(ctx context.Context, death ownership.Death) error {
	d.log.Errorf("this host was declared dead by %s at %s (%s): everything it has open is given up", death.By, death.At.Format(time.RFC3339), death.Evidence)
	var open []string
	lose := func(vids []string, what func(context.Context, *dataset)) {
		var (
			mu sync.Mutex
			wg sync.WaitGroup
		)
		for _, vid := range vids { // side by side: each may write until its filesystem is shut down
			wg.Go(func() {
				down, name := false, vid
				d.locked(ctx, vid, func(ctx context.Context, ds *dataset) {
					what(ctx, ds)
					down, name = ds.idle(), cmp.Or(ds.vol.Name, vid)
				})
				if !down {
					mu.Lock()
					defer mu.Unlock()
					open = append(open, name)
				}
			})
		}
		wg.Wait()
	}
	d.mu.Lock()
	all := slices.Collect(maps.Keys(d.datasets)) // also those of a Mount under way
	d.mu.Unlock()
	lose(all, func(ctx context.Context, ds *dataset) {
		if !ds.idle() {
			d.lose(ctx, ds)
		}
	})
	// And what no journal tells of.
	for name, backend := range d.cfg.Backends {
		bounded, cancel := context.WithTimeout(ctx, time.Minute)
		attachments, err := backend.Attachments(bounded)
		cancel()
		if err != nil {
			return fmt.Errorf("list attachments of %s: %w", name, err)
		}
		for _, att := range attachments {
			lose([]string{att.Volume}, func(ctx context.Context, ds *dataset) {
				if ds.idle() {
					ds.vol = d.knownByID(att.Volume)
					d.loseForeign(ctx, ds, name, att)
				}
			})
		}
	}
	if len(open) > 0 {
		slices.Sort(open)
		return fmt.Errorf("this host was declared dead by %s, and still has open: %s", death.By, strings.Join(slices.Compact(open), ", "))
	}
	return nil
}

// knownByID returns what this node remembers of a volume.
func (d *Driver) knownByID(vid string) ownership.Volume {
	for _, vol := range d.recallAll() {
		if vol.ID == vid {
			return vol
		}
	}
	return ownership.Volume{ID: vid}
}

// quarantine takes a volume out of service whose data is in doubt, until a person
// has looked at it.
func (d *Driver) quarantine(ctx context.Context, ds *dataset, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	vol, err := d.cfg.Map.Quarantine(ctx, ds.vol, ds.token, cause.Error())
	if err != nil {
		return errors.Join(cause, fmt.Errorf("quarantine: %w", err))
	}
	ds.vol = vol
	d.remember(vol)
	d.log.WithField("volume", vol.Name).Errorf("quarantined: %v", cause)
	return d.explain(vol.Name, &ownership.PhaseError{Volume: vol})
}

// Nodes returns the cluster's nodes.
func (d *Driver) Nodes(ctx context.Context) ([]ownership.NodeStatus, error) {
	return d.cfg.Map.Nodes(ctx)
}

// ConfirmDead records an operator's word that a host is dead. *ownership.LiveError
// if it answers, unless forced.
func (d *Driver) ConfirmDead(ctx context.Context, host string, death ownership.Death) (ownership.Death, error) {
	return d.cfg.Map.DeclareDead(ctx, host, death)
}

// NotQuarantinedError says that a volume cannot be taken out of quarantine, because
// it is in none. It matches ownership.ErrConflict.
type NotQuarantinedError struct {
	Volume ownership.Volume
}

func (e *NotQuarantinedError) Error() string {
	return fmt.Sprintf("volume %s is not quarantined (it is %s), so nothing was changed", e.Volume.Name, e.Volume.Phase)
}

// Is makes it an ErrConflict.
func (e *NotQuarantinedError) Is(target error) bool { return target == ownership.ErrConflict }

// Reinstate takes a volume out of quarantine. *NotQuarantinedError if it is in none.
func (d *Driver) Reinstate(ctx context.Context, name, by string) error {
	view, err := d.cfg.Map.Lookup(ctx, name)
	if err != nil {
		return d.explain(name, err)
	}
	if view.Volume.Phase != ownership.PhaseQuarantined {
		return &NotQuarantinedError{view.Volume}
	}
	vol, err := d.cfg.Map.Reinstate(ctx, view.Volume.ID, by)
	if err != nil {
		return err
	}
	d.remember(vol)
	return nil
}

// AcceptRestore says that etcd was restored from a backup on purpose, with no
// volume mounted anywhere.
func (d *Driver) AcceptRestore(ctx context.Context, by string) (gen int64, err error) {
	return d.cfg.Map.AcceptRestore(ctx, by)
}
