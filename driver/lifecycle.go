package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

const (
	// undoTimeout bounds the undo of a failed Mount. It runs after the caller may
	// have gone, so it has a deadline of its own.
	undoTimeout = 30 * time.Second
	// settle is how long after a Mount's reply its container may not be seen yet,
	// neither by the kernel nor by Docker (safety: Docker bind-mounts later).
	settle = 60 * time.Second
	// backendPatience is how long a mount goes on asking a storage system that does
	// not answer. Docker's own patience is longer.
	backendPatience = 30 * time.Second
)

// target is where a volume's filesystem is mounted; containers get its DataDir.
func (d *Driver) target(ds *dataset) string {
	return filepath.Join(d.cfg.MountRoot, ds.id)
}

func (d *Driver) mountpoint(vid string) string {
	return filepath.Join(d.cfg.MountRoot, vid, mount.DataDir)
}

// mount brings the volume up as far as it is not and counts the caller, who is Docker
// unless the purpose is placing. The
// straight line: claim, attach, mount. What this call did is undone if it fails,
// or if the caller has gone: Docker sends no Unmount for a Mount it did not see
// succeed. The dataset's lock is held.
func (d *Driver) mount(ctx context.Context, ds *dataset, purpose, id string) (err error) {
	if ds.lost != "" {
		return fmt.Errorf("volume %s cannot be mounted here: %s", ds.vol.Name, ds.lost)
	}
	var undo undoStack
	defer func() {
		if err != nil {
			err = undo.run(ctx, err)
			d.tidySoon(ds)
		}
	}()

	if err := d.usable(ctx, ds); err != nil {
		return err
	}
	if err := d.look(ctx, ds); err != nil {
		return err
	}
	up, err := d.isMounted(ds)
	if err != nil {
		return err
	}
	if !up {
		if err := d.closeStray(ctx, ds); err != nil {
			return err
		}
		if err := d.dropDoubtful(ctx, ds); err != nil {
			return err
		}
		if err := d.usable(ctx, ds); err != nil { // its device may have failed
			return err
		}
		if err := d.own(ctx, ds, purpose, &undo); err != nil {
			return err
		}
		if err := d.attach(ctx, ds, &undo); err != nil {
			return err
		}
		if err := d.stillOwned(ctx, ds); err != nil { // attaching may take long
			return err
		}
		// A Mount that a killed process did not finish may be in the journal, and
		// nobody undoes it. What nobody has open nobody uses.
		if ds.refs.total() > 0 && d.cfg.Mounter.Close(ctx, ds.att.Device) == nil {
			clear(ds.refs)
		}
		ds.written = nil // from now on there may be more
	}

	counted := ds.record(d.cfg.Node.Boot)
	if purpose == mounting {
		counted.Refs.add(id, d.epoch.Load(), time.Now())
	}
	saved := d.save(counted)
	if !up {
		if err := d.mountFilesystem(ctx, ds, &undo); err != nil {
			// What was saved is a reference too many, and goes with the next save.
			return errors.Join(err, saved())
		}
	}
	if purpose == mounting {
		kept, had := ds.refs[id]
		ds.refs[id] = counted.Refs[id]
		undo.push("forget the mount", func(context.Context) error {
			if delete(ds.refs, id); had {
				ds.refs[id] = kept
			}
			return d.journal.save(ds.record(d.cfg.Node.Boot))
		})
	}
	if err := saved(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("the caller has gone: %w", context.Cause(ctx))
	}
	return nil
}

// usable refuses a quarantined volume, by what etcd says now.
func (d *Driver) usable(ctx context.Context, ds *dataset) error {
	if ds.vol.Phase != ownership.PhaseQuarantined {
		return nil
	}
	view, err := d.cfg.Map.View(ctx, ds.id)
	if err == nil && view.Volume.Phase == ownership.PhaseQuarantined {
		err = &ownership.PhaseError{Volume: view.Volume}
	}
	if err != nil {
		return d.explain(ds.vol.Name, err)
	}
	ds.vol = view.Volume
	return nil
}

// isMounted asks the mount table whether the volume is mounted from the device
// this node attached. A managed plugin that was disabled by force has lost its
// mounts while containers keep theirs.
func (d *Driver) isMounted(ds *dataset) (bool, error) {
	if !ds.mounted {
		return false, nil
	}
	device, err := d.cfg.Mounter.Mounted(d.target(ds))
	if err != nil {
		return false, err
	}
	ds.mounted = device != ""
	if ds.mounted && (ds.att == nil || device != ds.att.Device) {
		return false, fmt.Errorf("volume %s: %s is mounted where it should be; unmount it and retry", ds.vol.Name, device)
	}
	return ds.mounted, nil
}

// own makes this node the owner, if it is not.
func (d *Driver) own(ctx context.Context, ds *dataset, purpose string, undo *undoStack) error {
	if err := d.finishTakeover(ctx, ds); err != nil {
		return err
	}
	if ds.token != 0 && ds.doubt {
		if err := d.retake(ctx, ds); err != nil && !errors.Is(err, ownership.ErrLost) {
			return d.explain(ds.vol.Name, err)
		}
	}
	if ds.token == 0 {
		undo.push("release ownership", func(ctx context.Context) error {
			if ds.pending != nil {
				return nil // tidy goes on with the takeover, and releases it then
			}
			return d.letGo(ctx, ds)
		})
		term := d.cfg.Map.Term() // before, so that a claim is never ascribed to a later one
		if err := d.claim(ctx, ds, purpose); err != nil {
			return err
		}
		ds.verified = term
		return nil
	}
	if err := d.stillOwned(ctx, ds); err != nil { // kept from before, lingering
		return err
	}
	if ds.vol.Revision == 0 { // from the disk, and perhaps older than the format
		view, err := d.cfg.Map.View(ctx, ds.id)
		if err != nil {
			return d.explain(ds.vol.Name, err)
		}
		ds.vol = view.Volume
	}
	return nil
}

// stillOwned asks whether the token is current. Within the term in which that was
// found before, nobody can have taken the volume.
func (d *Driver) stillOwned(ctx context.Context, ds *dataset) error {
	if err := d.cfg.Map.Live(); err != nil {
		return d.explain(ds.vol.Name, err)
	}
	term := d.cfg.Map.Term()
	if term != 0 && ds.verified == term {
		return nil
	}
	if err := d.cfg.Map.Check(ctx, ds.id, ds.token); err != nil {
		return d.explain(ds.vol.Name, err)
	}
	ds.verified = term
	return nil
}

// retake renews the token, so that a release of the old one that is still on its
// way fails. If the old one is no longer current, this node owns nothing.
func (d *Driver) retake(ctx context.Context, ds *dataset) error {
	term := d.cfg.Map.Term()
	owner, vol, err := d.cfg.Map.Retake(ctx, ownership.Owner{Volume: ds.id, Node: d.cfg.Node.ID, Token: ds.token})
	if errors.Is(err, ownership.ErrLost) || errors.Is(err, ownership.ErrNotFound) {
		d.disown(ds)
		return ownership.ErrLost
	}
	if err != nil {
		return err
	}
	ds.vol, ds.token, ds.verified, ds.doubt, ds.oldBoot = vol, owner.Token, term, false, false
	return nil
}

// dropDoubtful gives up an attachment that must not be used: its detach was begun, or
// a release of its token may be on its way.
//
// It is kept if containers have it open, as after `docker plugin disable -f`, which
// takes our mounts away and leaves theirs. A process releases a token only after it
// has proved the device closed, seen it detached and written a record without Mount
// calls; and one that did not see the release succeed mounts nothing under that token
// any more. So a device that is open, with a Mount call in the record, was never
// released. That it is open does not suffice: anybody may look at a new device.
func (d *Driver) dropDoubtful(ctx context.Context, ds *dataset) error {
	if ds.att == nil || !ds.doubt && !ds.detaching {
		return nil
	}
	sure := ds.detaching || ds.oldBoot
	err := d.detach(ctx, ds)
	if errors.Is(err, mount.ErrBusy) && !sure && ds.refs.total() > 0 {
		ds.doubt = false
		return nil
	}
	return err
}

// disown notes that this node does not own the volume any more.
func (d *Driver) disown(ds *dataset) {
	ds.token, ds.verified, ds.doubt, ds.unseen, ds.attempts = 0, 0, false, false, 0
	ds.pending, ds.fault, ds.oldBoot, ds.present = nil, "", false, presence{}
	clear(ds.refs)
	if time.Now().Before(ds.late) {
		if err := d.journal.save(ds.record(d.cfg.Node.Boot)); err != nil {
			d.log.WithField("volume", ds.vol.Name).Warn(err)
		}
	}
	d.forgetLate(ds)
}

// attach makes the volume's device appear, under the present token. Attachments
// of an older token are dropped, never adopted.
func (d *Driver) attach(ctx context.Context, ds *dataset, undo *undoStack) error {
	if ds.att != nil {
		return nil
	}
	backend, err := d.backendOf(ds.vol)
	if err != nil {
		return err
	}
	if err := d.awaitLate(ctx, ds); err != nil {
		return err
	}
	// Pushed before the call: one that fails may have attached all the same.
	undo.push("detach", func(ctx context.Context) error { return d.detach(ctx, ds) })
	ds.att = &backends.Attachment{Ref: ds.vol.Ref, Volume: ds.id, Node: d.cfg.Node.ID, Token: ds.token}
	for started, wait := time.Now(), 200*time.Millisecond; ; wait = min(2*wait, poll) {
		att, err := d.attachOnce(ctx, backend, ds)
		if err == nil {
			ds.att, ds.closed, ds.written = &att, false, nil
			return nil
		}
		d.expectStray()
		if !errors.Is(err, backends.ErrUnavailable) || time.Since(started) > backendPatience || !sleep(ctx, jitter(wait)) {
			return err
		}
		if late := d.awaitLate(ctx, ds); late != nil { // what was in the way may go late
			return errors.Join(err, late)
		}
		if lost := d.stillOwned(ctx, ds); lost != nil {
			return errors.Join(err, lost)
		}
	}
}

// attachOnce attaches a volume under the present token, also if an attachment of an
// older one is in the way.
func (d *Driver) attachOnce(ctx context.Context, backend backends.Backend, ds *dataset) (backends.Attachment, error) {
	att, err := d.tryAttach(ctx, backend, ds)
	if other, ok := errors.AsType[*backends.AttachedError](err); ok {
		again, failed := d.makeWay(ctx, backend, ds, other)
		if failed != nil {
			return backends.Attachment{}, failed
		}
		if again {
			if failed := d.awaitLate(ctx, ds); failed != nil {
				return backends.Attachment{}, failed
			}
			att, err = d.tryAttach(ctx, backend, ds)
		}
	}
	if err != nil {
		return backends.Attachment{}, couldNot("attach", ds.vol, err)
	}
	return att, nil
}

// tryAttach is one call of Attach. What it has ended itself may have been ended by a call
// that comes late, and then hits what the next one attaches.
func (d *Driver) tryAttach(ctx context.Context, backend backends.Backend, ds *dataset) (backends.Attachment, error) {
	att, err := backend.Attach(ctx, backends.AttachRequest{Ref: ds.vol.Ref, Volume: ds.id, Token: ds.token})
	if errors.Is(err, backends.ErrLate) {
		d.mayBeLate(ds)
		if unsaved := d.journal.save(ds.record(d.cfg.Node.Boot)); unsaved != nil {
			err = errors.Join(err, unsaved)
		}
	}
	return att, err
}

// makeWay ends an attachment of an older token that is in the way: of this node, or
// of another one where the storage can cut that off. Whoever owned it before is not
// its owner now; its attach arrived late.
func (d *Driver) makeWay(ctx context.Context, backend backends.Backend, ds *dataset, other *backends.AttachedError) (bool, error) {
	if other.Node == d.cfg.Node.ID && other.Token != ds.token {
		return true, d.dropStale(ctx, backend, ds)
	}
	return d.refence(ctx, backend, ds, other)
}

// dropStale detaches what this node attached under older tokens.
func (d *Driver) dropStale(ctx context.Context, backend backends.Backend, ds *dataset) error {
	attachments, err := backend.Attachments(ctx)
	if err != nil {
		return fmt.Errorf("list attachments: %w", err)
	}
	for _, att := range attachments {
		if att.Volume != ds.id || att.Token == ds.token {
			continue
		}
		if err := d.mark(ds, func() error { return backend.Detach(ctx, att) }); err != nil {
			return fmt.Errorf("detach volume %s, left attached from before: %w", ds.vol.Name, err)
		}
	}
	return nil
}

// mountFilesystem formats the device exactly once, by record, and mounts it.
func (d *Driver) mountFilesystem(ctx context.Context, ds *dataset, undo *undoStack) error {
	if !ds.vol.Formatted {
		err := d.cfg.Mounter.Format(ctx, mount.FormatSpec{
			Device: ds.att.Device, FS: ds.vol.FS, UUID: ds.id, Label: ds.vol.Name, Options: ds.vol.Mkfs,
			Guard: d.guarded(ds),
		})
		if err != nil {
			return fmt.Errorf("format volume %s: %w", ds.vol.Name, err)
		}
		vol, err := d.cfg.Map.Formatted(ctx, ds.id, ds.token, ds.vol)
		if err != nil {
			return d.explain(ds.vol.Name, err)
		}
		ds.vol = vol
		d.remember(vol)
	}
	return d.mountFormatted(ctx, ds, undo)
}

// guarded says that the volume's filesystem gets a protection of its own against a
// second host, as an alarm: where nothing but the protocol keeps one from writing.
func (d *Driver) guarded(ds *dataset) bool {
	backend, err := d.backendOf(ds.vol)
	return err != nil || !canFence(backend)
}

// mountFormatted mounts what has its filesystem.
func (d *Driver) mountFormatted(ctx context.Context, ds *dataset, undo *undoStack) error {
	warnings, err := d.cfg.Mounter.Mount(ctx, mount.Spec{
		Device: ds.att.Device, FS: ds.vol.FS, UUID: ds.id, Options: ds.vol.Mount, Target: d.target(ds),
	}, mount.Owner{UID: ds.vol.UID, GID: ds.vol.GID, Mode: fileMode(ds.vol.Mode)})
	for _, w := range warnings {
		d.log.WithField("volume", ds.vol.Name).Warn(w)
	}
	if err != nil {
		err = fmt.Errorf("mount volume %s: %w", ds.vol.Name, err)
		if errors.Is(err, mount.ErrIdentity) || errors.Is(err, mount.ErrDamaged) || errors.Is(err, mount.ErrMultiMount) {
			err = d.quarantine(ctx, ds, err)
		}
		return err
	}
	ds.mounted, ds.closed, ds.written = true, false, nil
	undo.push("unmount", func(ctx context.Context) error { return d.unmountFilesystem(ctx, ds) })
	return nil
}

// letGo takes the volume down as far as it can be: unmount, prove it closed,
// detach, then hand it over or release it. It stops at the first failure, with
// the state as it then is, and is called again by tidy. The dataset's lock is
// held, and nothing refers to the volume.
func (d *Driver) letGo(ctx context.Context, ds *dataset) error {
	if err := d.closeFilesystem(ctx, ds); err != nil {
		return err
	}
	if err := d.detach(ctx, ds); err != nil {
		return err
	}
	return d.release(ctx, ds)
}

// closeFilesystem unmounts and proves that nobody else has the filesystem. If
// somebody has, it mounts it again: a container still runs on it, of which Docker
// told us the end or forgot to tell us the beginning.
func (d *Driver) closeFilesystem(ctx context.Context, ds *dataset) error {
	if err := d.look(ctx, ds); err != nil {
		return err
	}
	if err := d.closeStray(ctx, ds); err != nil {
		return err
	}
	if ds.att == nil || ds.closed {
		return nil
	}
	if ds.att.Device == "" { // an attach that failed; detach will look
		return nil
	}
	// A Mount that failed half-way is in the table only.
	device, err := d.cfg.Mounter.Mounted(d.target(ds))
	if err != nil {
		return err
	}
	wasMounted := ds.mounted
	ds.mounted = ds.mounted || device == ds.att.Device
	if err := d.unmountFilesystem(ctx, ds); err != nil {
		return err
	}
	if err = d.close(ctx, ds); err == nil {
		return nil
	}
	if wasMounted && ds.lost == "" {
		again, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		var keep undoStack
		if remount := d.mountFormatted(again, ds, &keep); remount != nil {
			return errors.Join(err, fmt.Errorf("mount it again: %w", remount))
		}
	}
	return err
}

// closeStray takes down what is mounted from a device that is not attached any
// more. Nothing written to that can arrive.
func (d *Driver) closeStray(ctx context.Context, ds *dataset) error {
	if ds.stray == "" {
		return nil
	}
	if err := d.cfg.Mounter.Unmount(ctx, d.target(ds)); err != nil && !errors.Is(err, mount.ErrUnwritten) {
		return fmt.Errorf("unmount volume %s: %w", ds.vol.Name, err)
	}
	err := d.cfg.Mounter.Close(ctx, ds.stray)
	if err != nil && !errors.Is(err, mount.ErrUnwritten) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("close volume %s: %w", ds.vol.Name, err)
	}
	ds.stray = ""
	return nil
}

// close proves that nobody has the device. What a device that has failed did not
// take is lost: of a lost volume it was never to arrive, and any other is
// quarantined before it is given away. One that was closed before, by a process that
// was killed then, had taken everything.
func (d *Driver) close(ctx context.Context, ds *dataset) error {
	err := d.cfg.Mounter.Close(ctx, ds.att.Device)
	switch {
	case err == nil:
		ds.written = ds.att
	case errors.Is(err, fs.ErrNotExist) && (ds.lost != "" || ds.allWritten()):
		err = nil // nobody has open what is not there
	case !errors.Is(err, mount.ErrUnwritten):
		ds.written = nil // whoever has it may write to it
	case ds.allWritten():
		d.log.WithField("volume", ds.vol.Name).Warnf("%v; it was closed before, with all that was written", err)
		err = nil
	default:
		if ds.lost == "" {
			err = d.quarantine(ctx, ds, err)
		}
		if ds.lost != "" || ds.vol.Phase == ownership.PhaseQuarantined {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("close volume %s: %w", ds.vol.Name, err)
	}
	ds.closed = true
	return nil
}

func (d *Driver) unmountFilesystem(ctx context.Context, ds *dataset) error {
	if !ds.mounted {
		return nil
	}
	err := d.cfg.Mounter.Unmount(ctx, d.target(ds))
	if err != nil && (ds.lost == "" || !errors.Is(err, mount.ErrUnwritten)) {
		return fmt.Errorf("unmount volume %s: %w", ds.vol.Name, err)
	}
	ds.mounted = false
	ds.publish()
	return nil
}

// detach drops the attachment, with the intent on disk first: a process that is
// killed here finishes this detach before it attaches anything again.
func (d *Driver) detach(ctx context.Context, ds *dataset) error {
	if ds.att == nil {
		return nil
	}
	backend, err := d.backendOf(ds.vol)
	if err != nil {
		return err
	}
	if !ds.closed && ds.att.Device != "" {
		if err := d.close(ctx, ds); err != nil {
			return err
		}
	}
	ds.detaching = true
	if err := d.journal.save(ds.record(d.cfg.Node.Boot)); err != nil {
		return err
	}
	if err := backend.Detach(ctx, *ds.att); err != nil && !errors.Is(err, backends.ErrNotFound) {
		d.mayBeLate(ds)
		return couldNot("detach", ds.vol, err)
	}
	ds.att, ds.closed, ds.detaching = nil, false, false
	ds.publish()
	return nil
}

// release gives the volume to the node that has waited longest, or frees it.
func (d *Driver) release(ctx context.Context, ds *dataset) error {
	if ds.token == 0 {
		return nil
	}
	if ds.att != nil || ds.unseen {
		return fmt.Errorf("release volume %s: it may still be attached here", ds.vol.Name)
	}
	if ds.pending != nil {
		return fmt.Errorf("release volume %s: its takeover is not finished", ds.vol.Name)
	}
	if err := d.awaitLate(ctx, ds); err != nil {
		return err
	}
	if ds.refs.total() > 0 { // stale ones; dropDoubtful goes by the record
		clear(ds.refs)
		if err := d.journal.save(ds.record(d.cfg.Node.Boot)); err != nil {
			return err
		}
	}
	var err error
	handed := false
	waiting := slices.DeleteFunc(slices.Clone(d.waitingFor(ds.id)), func(r ownership.Request) bool {
		return r.Purpose == draining // who asks does not want it
	})
	if len(waiting) > 0 {
		// HandOver frees the volume if the requester has gone meanwhile.
		handed, err = d.cfg.Map.HandOver(ctx, ds.id, ds.token, waiting[0])
		if handed {
			d.log.WithField("volume", ds.vol.Name).Infof("handed over to host %s", waiting[0].Host)
		}
	} else {
		err = d.cfg.Map.Release(ctx, ds.id, ds.token)
	}
	if err != nil && !errors.Is(err, ownership.ErrLost) {
		ds.doubt = true
		return fmt.Errorf("release volume %s: %w", ds.vol.Name, err)
	}
	d.disown(ds)
	return nil
}

// undoStack collects how to undo what was done. run goes from the newest to the
// oldest and stops at the first failure: what is mounted must stay attached, what
// is attached must stay owned.
type undoStack []undoStep

type undoStep struct {
	what string
	do   func(context.Context) error
}

func (u *undoStack) push(what string, do func(context.Context) error) {
	*u = append(*u, undoStep{what, do})
}

func (u *undoStack) run(ctx context.Context, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	for _, step := range slices.Backward(*u) {
		if err := step.do(ctx); err != nil {
			return errors.Join(cause, fmt.Errorf("undo: %s: %w", step.what, err))
		}
	}
	return cause
}
