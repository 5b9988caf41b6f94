package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// createTries is how often a Create begins anew when its volume vanishes under it.
const createTries = 10

// A CreateRequest is what a volume is to be.
type CreateRequest struct {
	Name string
	// ID is a UUID that no volume has had; "" is one of the driver's choice.
	ID string
	// Options are those of docker volume create.
	Options map[string]string
	// Labels are further ones, of any name.
	Labels map[string]string
	// New refuses a volume that there is already, though it be the same: of several nodes
	// that ask at once, one makes it, and the others get an *ownership.TakenError.
	New bool
	By  string
}

// InvalidError says what is wrong with a request.
type InvalidError struct {
	Err error
}

func (e *InvalidError) Error() string { return e.Err.Error() }

func (e *InvalidError) Unwrap() error { return e.Err }

// maxLabels is how long the labels of a volume may be, all together: every host reads
// them with every list.
const maxLabels = 16 << 10

// Create makes a volume for Docker.
func (d *Driver) Create(ctx context.Context, name string, options map[string]string) error {
	_, err := d.CreateVolume(ctx, CreateRequest{Name: name, Options: options})
	return err
}

// CreateVolume makes a volume, once in the cluster however many nodes ask for it. A
// volume of that name, and of that id if one is given, that has every option given is fine.
func (d *Driver) CreateVolume(ctx context.Context, req CreateRequest) (Volume, error) {
	vol, err := d.requested(req)
	if err != nil {
		return Volume{}, &InvalidError{err}
	}
	if err := d.awaitRegistration(ctx); err != nil {
		return Volume{}, d.explain(req.Name, err)
	}
	if vol, err = d.create(ownership.By(ctx, req.By), vol, req); err != nil {
		return Volume{}, err
	}
	return d.describe(ownership.View{Volume: vol}, nil, false), nil
}

// requested makes a volume of a request, or says what is wrong with it.
func (d *Driver) requested(req CreateRequest) (ownership.Volume, error) {
	vol, err := d.parse(req.Name, req.Options)
	if err != nil {
		return vol, err
	}
	if req.ID != "" {
		if id, err := uuid.Parse(req.ID); err != nil || id.String() != req.ID || id == uuid.Nil {
			return vol, fmt.Errorf("volume id %.40q is not valid: use a UUID in lower case, such as %s", req.ID, vol.ID)
		}
		vol.ID = req.ID
	}
	if len(req.Labels) > 0 {
		vol.Labels = maps.Clone(vol.Labels)
		if vol.Labels == nil {
			vol.Labels = map[string]string{}
		}
		maps.Copy(vol.Labels, req.Labels)
	}
	size := 0
	for key, value := range vol.Labels {
		size += len(key) + len(value)
	}
	if size > maxLabels {
		return vol, fmt.Errorf("the labels of volume %s are %s long; the most is %s", req.Name, backends.Size(size), backends.Size(maxLabels))
	}
	return vol, nil
}

func (d *Driver) create(ctx context.Context, vol ownership.Volume, req CreateRequest) (ownership.Volume, error) {
	for try := 1; ; try++ {
		stored, created, err := d.cfg.Map.Create(ctx, vol)
		if err != nil {
			return stored, d.explain(vol.Name, err)
		}
		if !created {
			if req.New || req.ID != "" && stored.ID != req.ID {
				return stored, &ownership.TakenError{Name: vol.Name, ID: vol.ID, By: stored.ID}
			}
			if err := d.sameOptions(stored, vol, req.Options); err != nil {
				return stored, err
			}
		}
		if stored.Phase == ownership.PhaseCreating {
			stored, err = d.finishCreate(ctx, stored)
		}
		switch {
		case err == nil:
			d.remember(stored)
			return stored, nil
		case errors.Is(err, ownership.ErrNotFound) && req.ID == "" && try < createTries && sleep(ctx, jitter(10*time.Millisecond)):
			// Removed in that moment; or the node that recorded it could not make its
			// storage, and undid that. An id is not used twice.
			vol.ID = uuid.NewString()
		case created:
			return stored, d.undoCreate(ctx, stored, err)
		default:
			return stored, err
		}
	}
}

// finishCreate makes the storage of a volume that is recorded, by whichever node
// gets here: the dataset's id is the idempotency key.
func (d *Driver) finishCreate(ctx context.Context, vol ownership.Volume) (ownership.Volume, error) {
	backend, err := d.backendOf(vol)
	if err != nil {
		return vol, err
	}
	made, err := backend.Create(ctx, backends.CreateRequest{
		ID: vol.ID, Name: vol.Name, Cluster: d.cfg.Map.Cluster(),
		Size: vol.Size, Profile: vol.Profile, Options: vol.Options,
	})
	if err != nil {
		return vol, couldNot("create", vol, err)
	}
	ready := vol
	ready.Ref, ready.Size = made.Ref, made.Size
	if ready, err = d.cfg.Map.Ready(ctx, ready); errors.Is(err, ownership.ErrNotFound) {
		// Removed meanwhile, perhaps by somebody who saw no storage yet. Its id is not
		// used again.
		d.background(func(ctx context.Context) { d.discard(ctx, backend, vol.Name, made.Ref) })
	}
	if err != nil {
		return vol, d.explain(vol.Name, err)
	}
	return ready, nil
}

// couldNot says what a backend was to do with a volume, as backends do themselves, by the
// names that they know it by: once is enough.
func couldNot(what string, vol ownership.Volume, err error) error {
	what += " volume"
	text := err.Error()
	for _, said := range []string{what + " " + vol.Name + ": ", what + " " + vol.ID + ": ", what + ": "} {
		text = strings.TrimPrefix(text, said)
	}
	return backends.Classify(err, fmt.Errorf("%s %s: %s", what, vol.Name, text))
}

// discard deletes storage that is no volume's, until it is gone.
func (d *Driver) discard(ctx context.Context, backend backends.Backend, name, ref string) {
	for wait := time.Second; ; wait = min(2*wait, 5*time.Minute) {
		bounded, cancel := context.WithTimeout(ctx, undoTimeout)
		err := backend.Delete(bounded, ref)
		cancel()
		if err == nil || errors.Is(err, backends.ErrNotFound) {
			return
		}
		d.log.WithField("volume", name).Warnf("its storage %s is left, and no volume's any more: %v", ref, err)
		if !sleep(ctx, jitter(wait)) {
			return
		}
	}
}

// undoCreate removes a volume whose storage could not be made, unless another
// node succeeded meanwhile.
func (d *Driver) undoCreate(ctx context.Context, vol ownership.Volume, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	tombstone, err := d.cfg.Map.Delete(ctx, vol, 0)
	if errors.Is(err, ownership.ErrConflict) {
		return cause
	}
	if err == nil {
		err = d.destroy(ctx, tombstone)
	}
	if err != nil {
		return errors.Join(cause, fmt.Errorf("undo: %w", err))
	}
	return cause
}

// destroy removes the storage behind a tombstone and then the tombstone.
func (d *Driver) destroy(ctx context.Context, tombstone ownership.Volume) error {
	backend, err := d.backendOf(tombstone)
	if err != nil {
		return err
	}
	ref := tombstone.Ref
	if ref == "" {
		// Recorded, but its storage was never confirmed: there may be some.
		volumes, err := backend.List(ctx)
		if err != nil {
			return err
		}
		for _, v := range volumes {
			if v.ID == tombstone.ID {
				ref = v.Ref
			}
		}
	}
	if ref != "" {
		if err := backend.Delete(ctx, ref); err != nil && !errors.Is(err, backends.ErrNotFound) {
			return err
		}
	}
	return d.cfg.Map.Purge(ctx, tombstone)
}

// Remove destroys a volume and its data, unless it is in use on any node. A
// volume that does not exist is removed already.
func (d *Driver) Remove(ctx context.Context, name string) error {
	return d.RemoveVolume(ctx, name, "")
}

// RemoveVolume is Remove for who means the volume of one id: if the volume of that name
// is another one by now, or there is none, the error is an ErrNotFound. "" is any.
func (d *Driver) RemoveVolume(ctx context.Context, name, id string) error {
	if err := ValidName(name); err != nil {
		return &InvalidError{err}
	}
	for try := 1; ; try++ {
		err := d.awaitRegistration(ctx)
		if err == nil {
			err = d.removeOnce(ctx, name, id)
		}
		switch {
		case errors.Is(err, ownership.ErrNotFound) && id != "":
			return err
		case errors.Is(err, ownership.ErrNotFound):
			d.forget(name)
			return d.removeForgotten(ctx, name)
		case errors.Is(err, ownership.ErrConflict) && try < 3:
			continue // its record changed meanwhile: look again
		case errors.Is(err, ownership.ErrUnavailable):
			return fmt.Errorf("%w; the volume was not removed", err)
		default:
			return err
		}
	}
}

// meant is an ErrNotFound if a volume, found by its name, is not the one of an id. "" is any.
func meant(vol ownership.Volume, id string) error {
	if id == "" || vol.ID == id {
		return nil
	}
	return fmt.Errorf("%w: the one named %s has the id %s, not %s", ownership.ErrNotFound, vol.Name, vol.ID, id)
}

func (d *Driver) removeOnce(ctx context.Context, name, id string) error {
	known, _ := d.recall(name)
	view, err := d.cfg.Map.LookupKnown(ctx, name, known.ID)
	if err != nil {
		return d.explain(name, err)
	}
	if err := meant(view.Volume, id); err != nil {
		return err
	}
	ds, done := d.hold(view.Volume.ID)
	defer done()
	if err := ds.acquire(ctx); err != nil {
		return err
	}
	defer ds.unlock()
	if ds.lost != "" {
		return fmt.Errorf("volume %s cannot be removed: %s", name, ds.lost)
	}
	if ds.refs.total() > 0 && !d.doubtful(ds) {
		return inUseHere(name, d.cfg.Node.Host, ds.snapshot.Load().containers)
	}
	if view.Lease != nil {
		return fmt.Errorf("volume %s was not removed: %w; give the lease back first", name, &ownership.LeasedError{Lease: *view.Lease})
	}
	if view.Volume.Revision > ds.vol.Revision { // it was read before the lock was taken
		ds.vol = view.Volume
	}
	if view.Owner != nil && ds.token == 0 {
		if err := d.claim(ctx, ds, removing); err != nil {
			return err
		}
		if err := d.findAttachment(ctx, ds); err != nil {
			return err
		}
	}
	if err := d.finishTakeover(ctx, ds); err != nil {
		return err
	}
	if err := d.closeFilesystem(ctx, ds); err != nil {
		d.tidySoon(ds)
		if errors.Is(err, mount.ErrBusy) {
			return fmt.Errorf("%w: %w", inUseHere(name, d.cfg.Node.Host, nil), err)
		}
		return err
	}
	if err := d.detach(ctx, ds); err != nil {
		d.tidySoon(ds)
		return err
	}
	tombstone, err := d.cfg.Map.Delete(ctx, ds.vol, ds.token)
	if err != nil {
		ds.doubt = true
		d.tidySoon(ds)
		if held, ok := errors.AsType[*ownership.HeldError](err); ok {
			return fmt.Errorf("%w; it was not removed", held)
		}
		return d.explain(name, err)
	}
	d.disown(ds)
	d.forget(name)
	if err := d.destroy(ctx, tombstone); err != nil {
		// The name is free and nobody can mount it; reconcile tries again.
		d.log.WithField("volume", name).Warnf("removed, but its storage is not yet: %v", err)
	}
	return nil
}

// removeForgotten answers for a volume the cluster has no record of: removed
// already, unless this host has it still open.
func (d *Driver) removeForgotten(ctx context.Context, name string) error {
	local := d.byName(name)
	if local == nil {
		return nil
	}
	ds, done := d.hold(local.id)
	defer done()
	if err := ds.acquire(ctx); err != nil {
		return err
	}
	defer ds.unlock()
	if ds.att == nil && !ds.mounted && !ds.unseen {
		return nil
	}
	return fmt.Errorf("volume %s is gone from the cluster's records but still open on this host; stop its containers", name)
}

func inUseHere(name, host string, containers []string) error {
	return &ownership.BusyError{Volume: name, Reply: ownership.Reply{Host: host, Busy: true, Containers: containers}}
}
