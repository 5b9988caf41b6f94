package rbd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// attached is a device of this node, by its label: <id>,<token>,<reference>.
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

// locals returns what is attached here. It asks the kernel alone.
func (b *Backend) locals() ([]attached, error) {
	devices, err := b.attacher.Devices()
	if err != nil {
		return nil, err
	}
	var found []attached
	for _, d := range devices {
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

// Attachments implements backends.Backend.
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
	v, err := b.find(ctx, req.Ref)
	if err != nil {
		return none, err
	}
	if v.ID != req.Volume || req.Token < 0 {
		return none, fmt.Errorf("%s is not volume %s, or token %d is negative: %w", req.Ref, req.Volume, req.Token, backends.ErrInvalid)
	}
	unlock, err := b.lock(ctx, v.ID)
	if err != nil {
		return none, err
	}
	defer unlock()
	a, ok, err := b.local(req.Ref)
	switch {
	case err != nil:
		return none, err
	case ok && a.token != req.Token:
		return none, &backends.AttachedError{Volume: v.ID, Node: b.self.Node, Token: a.token}
	case ok:
		served, err := b.attacher.Served(a.device.Label)
		if err == nil {
			err = b.notCut(ctx, v, req.Token)
		}
		if err == nil && !served { // its program has died
			_, err = b.attacher.Unmap(ctx, a.device.Label)
		}
		if err != nil {
			return none, err
		}
		if served {
			return b.attachment(a), nil
		}
	}
	for started := time.Now(); ; {
		if err := b.unclaimed(ctx, v); err != nil {
			return none, err
		}
		a, err := b.connect(ctx, v, req.Token)
		switch {
		case errors.Is(err, errClaimed):
			continue
		case !errors.Is(err, errHalfGone) || time.Since(started) > watchTimeout:
			return b.attachment(a), err
		}
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return none, err
		}
	}
}

// unclaimed returns when there is no claim to a volume, or says whose there is.
func (b *Backend) unclaimed(ctx context.Context, v *volume) error {
	for started := time.Now(); ; {
		h, ok, err := b.holder(ctx, v.image)
		switch {
		case err != nil || !ok:
			return err
		case h.deletes:
			if _, err := b.find(ctx, v.Ref); err != nil {
				return err // it is gone
			}
			if time.Since(started) > watchTimeout {
				return fmt.Errorf("%s is being deleted by %s: %w", v.image.Spec(), h.node, backends.ErrInUse)
			}
			if err := sleep(ctx, 250*time.Millisecond); err != nil {
				return err
			}
		case h.node != b.self.Node:
			return &backends.AttachedError{Volume: v.ID, Node: h.node, Token: h.token}
		default:
			// Nothing here has it: its client died, perhaps with the host, and something
			// it has sent may be on its way.
			if _, err := b.cut(ctx, v, h); err != nil {
				return err
			}
		}
	}
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
		_, err := b.find(ctx, v.Ref)
		if err == nil {
			err = b.notCut(ctx, v, token)
		}
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
func (b *Backend) notCut(ctx context.Context, v *volume, token int64) error {
	most, err := b.cutUpTo(ctx, v.image, b.self.Node)
	if err == nil && most >= token {
		err = fmt.Errorf("this host was cut off from %s under ownership token %d, and this one is %d: %w", v.image.Spec(), most, token, backends.ErrInUse)
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
