package rbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// attached is a device of this node, by its label: <id>,<token>,<reference>. One without a
// path was begun by an Attach that is under way, or whose process was killed.
type attached struct {
	id     string
	token  int64
	ref    string
	device rbdmap.Device
}

func label(id string, token int64, ref string) string {
	return id + "," + strconv.FormatInt(token, 10) + "," + ref
}

func parseLabel(text string) (a attached, ok bool) {
	parts := strings.SplitN(text, ",", 3)
	if len(parts) != 3 {
		return attached{}, false
	}
	token, err := strconv.ParseInt(parts[1], 10, 64)
	a = attached{id: parts[0], token: token, ref: parts[2]}
	return a, err == nil && datasetOf(a.ref) != "" && label(a.id, a.token, a.ref) == text
}

func (b *Backend) attachment(a attached) backends.Attachment {
	return backends.Attachment{
		ID: a.id, Ref: a.ref, Volume: datasetOf(a.ref), Node: b.self.Node, Token: a.token, Device: a.device.Path,
	}
}

// locals returns what is attached here, or was begun to be. It asks the kernel alone.
func (b *Backend) locals() ([]attached, error) {
	begun, err := b.attacher.Begun()
	if err != nil {
		return nil, err
	}
	devices, err := b.attacher.Devices()
	if err != nil {
		return nil, err
	}
	// One that has come to its end between the two is there twice.
	begun = slices.DeleteFunc(begun, func(d rbdmap.Device) bool {
		return slices.ContainsFunc(devices, func(made rbdmap.Device) bool { return made.Label == d.Label })
	})
	var found []attached
	for _, d := range append(devices, begun...) {
		if a, ok := parseLabel(d.Label); ok {
			a.device = d
			found = append(found, a)
		}
	}
	return found, nil
}

// local returns what a volume has here.
func (b *Backend) local(ref string) (attached, bool, error) {
	all, err := b.locals()
	for _, a := range all {
		if a.ref == ref {
			return a, true, nil
		}
	}
	return attached{}, false, err
}

// Attachments implements backends.Backend. What was begun has no device; its Detach undoes
// it.
func (b *Backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	all, err := b.locals()
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var atts []backends.Attachment
	for _, a := range all {
		atts = append(atts, b.attachment(a))
	}
	return atts, nil
}

// lock keeps other calls of this node, of another process too, from a volume's devices.
func (b *Backend) lock(ctx context.Context, dataset string) (unlock func(), err error) {
	return rbdmap.Lock(ctx, b.dir, dataset)
}

// Attach implements backends.Backend.
func (b *Backend) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := b.attach(ctx, req)
	if err != nil {
		return backends.Attachment{}, fmt.Errorf("attach volume: %w", err)
	}
	return att, nil
}

func (b *Backend) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	none := backends.Attachment{}
	image, err := b.named(ctx, req.Ref)
	if err != nil {
		return none, err
	}
	if datasetOf(req.Ref) != req.Volume || req.Token < 0 {
		return none, fmt.Errorf("%s is not volume %s, or token %d is negative: %w", req.Ref, req.Volume, req.Token, backends.ErrInvalid)
	}
	unlock, err := b.lock(ctx, req.Volume)
	if err != nil {
		return none, err
	}
	defer unlock()
	a, ok, err := b.local(req.Ref)
	switch {
	case err != nil:
		return none, err
	case ok && a.token != req.Token:
		return none, &backends.AttachedError{Volume: req.Volume, Node: b.self.Node, Token: a.token}
	case ok:
		served, err := b.served(ctx, image, a)
		if err != nil {
			return none, err
		}
		if served {
			return b.attachment(a), nil
		}
	}
	var v *volume
	var h holder
	held := false
	err = together(
		func() (err error) { v, err = b.find(ctx, req.Ref); return err },
		func() (err error) { h, held, err = b.holder(ctx, image); return err },
	)
	if err != nil {
		return none, err
	}
	for started := time.Now(); ; h, held, err = b.holder(ctx, image) {
		if err == nil {
			err = b.unclaimed(ctx, v, h, held)
		}
		if err != nil {
			return none, err
		}
		a, err := b.connect(ctx, v, req.Token)
		switch {
		case errors.Is(err, errClaimed):
			continue
		case !errors.Is(err, errHalfGone) || time.Since(started) > watchTimeout:
			return b.attachment(a), err
		}
		if err := poll.Sleep(ctx, 250*time.Millisecond); err != nil {
			return none, err
		}
	}
}

// served says whether a device of this node can be used. One of which the program has died,
// or that was begun and no more, is undone.
func (b *Backend) served(ctx context.Context, image rbdmap.Image, a attached) (served bool, err error) {
	if a.device.Path != "" {
		err := together(
			func() error { _, err := b.find(ctx, a.ref); return err },
			func() error { return b.notCut(ctx, image, a.token) },
		)
		if err != nil {
			return false, err
		}
		if served, err = b.attacher.Served(a.device.Label); served || err != nil {
			return served, err
		}
	}
	return false, b.undo(ctx, image, a)
}

// undo ends what this node has, and removes its claim.
func (b *Backend) undo(ctx context.Context, image rbdmap.Image, a attached) error {
	clean, err := b.attacher.Unmap(ctx, a.device.Label)
	if err != nil {
		return err
	}
	h, ok, err := b.holder(ctx, image)
	switch {
	case err != nil || !ok || h.id != a.id:
		return err
	case clean:
		return b.drop(ctx, image, h)
	}
	// Something it has sent may be on its way.
	_, err = b.cut(ctx, image, h)
	return err
}

// together makes calls at the same time that do not depend on each other. Its error is that
// of the first which has failed, in their order.
func together(calls ...func() error) error {
	errs := make([]error, len(calls))
	var all sync.WaitGroup
	for i, call := range calls {
		all.Go(func() { errs[i] = call() })
	}
	all.Wait()
	return cmp.Or(errs...)
}

// unclaimed returns when there is no claim to a volume any more, or says whose there is.
func (b *Backend) unclaimed(ctx context.Context, v *volume, h holder, held bool) error {
	for started := time.Now(); held; {
		switch {
		case h.deletes:
			if _, err := b.find(ctx, v.Ref); err != nil {
				return err // it is gone
			}
			if time.Since(started) > watchTimeout {
				return fmt.Errorf("%s is being deleted by %s: %w", v.image.Spec(), h.node, backends.ErrInUse)
			}
			if err := poll.Sleep(ctx, 250*time.Millisecond); err != nil {
				return err
			}
		case h.node != b.self.Node:
			return &backends.AttachedError{Volume: v.ID, Node: h.node, Token: h.token}
		default:
			// Nothing here has it: its client died, perhaps with the host, and something
			// it has sent may be on its way.
			if _, err := b.cut(ctx, v.image, h); err != nil {
				return err
			}
		}
		var err error
		if h, held, err = b.holder(ctx, v.image); err != nil {
			return err
		}
	}
	return nil
}

// errHalfGone: somebody is removing the image, or Ceph has lost a part of it.
var errHalfGone = fmt.Errorf("a part of the image is missing: %w", backends.ErrUnavailable)

// connect makes a device of a volume. errClaimed if somebody else was faster.
func (b *Backend) connect(ctx context.Context, v *volume, token int64) (attached, error) {
	a := attached{id: newID(), token: token, ref: v.Ref}
	device, err := b.attacher.Map(ctx, v.image, label(a.id, token, v.Ref), func(client rbdmap.Client) error {
		c := claim{id: a.id, node: b.self.Node, token: token, address: client.Address}
		if err := b.claim(ctx, v.image, c); err != nil {
			return err
		}
		// Only now: who cuts this node off first writes that down, and then looks for a
		// claim; who deletes the volume removes the image before its own claim.
		err := together(
			func() error { _, err := b.find(ctx, v.Ref); return err },
			func() error { return b.notCut(ctx, v.image, token) },
		)
		if err != nil {
			// The client has had no device, so nothing can come of it.
			err = errors.Join(err, b.release(context.WithoutCancel(ctx), v.image, a.id))
			if errors.Is(err, backends.ErrNotFound) {
				err = errors.Join(err, b.forget(context.WithoutCancel(ctx), v.image))
			}
		}
		return err
	})
	if errors.Is(err, backends.ErrNotFound) && !errors.Is(err, errClaimed) {
		// The client did not find the image, or not all of it.
		if _, gone := b.find(ctx, v.Ref); gone != nil {
			return a, gone
		}
		// As text alone: it must not be taken for not found.
		return a, fmt.Errorf("%w: %s", errHalfGone, err.Error())
	}
	a.device = device
	return a, err
}

// notCut is ErrInUse if this node was cut off from the volume under the token.
func (b *Backend) notCut(ctx context.Context, image rbdmap.Image, token int64) error {
	most, err := b.cutUpTo(ctx, image, b.self.Node)
	if err == nil && most >= token {
		err = fmt.Errorf("this host was cut off from %s under ownership token %d, and this one is %d: %w", image.Spec(), most, token, backends.ErrInUse)
	}
	return err
}

// Detach implements backends.Backend.
func (b *Backend) Detach(ctx context.Context, att backends.Attachment) error {
	if err := b.detach(ctx, att); err != nil {
		return fmt.Errorf("detach volume %s: %w", att.Volume, err)
	}
	return nil
}

func (b *Backend) detach(ctx context.Context, att backends.Attachment) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch {
	case att.Volume == "" || datasetOf(att.Ref) != att.Volume:
		return fmt.Errorf("%q is not its reference: %w", att.Ref, backends.ErrInvalid)
	case att.Node != b.self.Node:
		return fmt.Errorf("devices of %s can only be detached there: %w", att.Node, backends.ErrInvalid)
	}
	unlock, err := b.lock(ctx, att.Volume)
	if err != nil {
		return err
	}
	defer unlock()
	a, ok, err := b.local(att.Ref)
	if err != nil || !ok || a.token != att.Token || (att.ID != "" && att.ID != a.id) {
		return err
	}
	clean, err := b.attacher.Unmap(ctx, a.device.Label)
	if err != nil || !clean {
		// Not clean: the claim stays, so that whoever comes next cuts the client off first.
		return err
	}
	parts := strings.Split(att.Ref, "/")
	// If it cannot be removed, whoever comes next finds a client that is gone.
	_ = b.release(ctx, b.image(parts[1], parts[len(parts)-1]), a.id)
	return nil
}

// clear undoes what is left on this host of an Attach whose process was killed.
func (b *Backend) clear(ctx context.Context, v *volume) error {
	begun := func() (attached, bool, error) {
		a, ok, err := b.local(v.Ref)
		return a, ok && a.device.Path == "", err
	}
	if _, ok, err := begun(); err != nil || !ok {
		return err
	}
	unlock, err := b.lock(ctx, v.ID)
	if err != nil {
		return err
	}
	defer unlock()
	a, ok, err := begun() // or it was under way
	if err != nil || !ok {
		return err
	}
	return b.undo(ctx, v.image, a)
}

// dead says that a claim of this node is of no device here any more, nor will be, as after
// a power cut.
func (b *Backend) dead(ctx context.Context, v *volume, h holder) (bool, error) {
	if h.node != b.self.Node {
		return false, nil
	}
	unlock, err := b.lock(ctx, v.ID) // an Attach may be under way
	if err != nil {
		return false, err
	}
	defer unlock()
	a, ok, err := b.local(v.Ref)
	return err == nil && (!ok || a.id != h.id), err
}
