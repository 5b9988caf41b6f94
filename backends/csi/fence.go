package csi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	"github.com/flocker-plugin/flocker/backends"
)

// fencer is a Backend whose driver cuts access (Config.Fences).
type fencer struct{ *Backend }

var (
	_ backends.Fencer     = (*fencer)(nil)
	_ backends.Identifier = (*fencer)(nil)
	_ backends.Resizer    = (*Backend)(nil)
)

// Identity implements backends.Identifier: the driver's name for this node.
func (b *fencer) Identity(ctx context.Context) (string, error) {
	f, err := b.ready(ctx)
	if err != nil {
		return "", wrap("ask for the name of this host", err)
	}
	return f.self.GetNodeId(), nil
}

// claim notes that this node is about to have the volume, under this token. A driver
// knows nothing of tokens, so the cluster remembers them for it. Without Fences it only
// looks the volume up.
func (b *Backend) claim(ctx context.Context, f *facts, r reference, req backends.AttachRequest) (*entry, error) {
	me := &holder{Node: b.self.Node, Identity: f.self.GetNodeId(), Token: req.Token}
	bounded, cancel := context.WithTimeout(ctx, deviceBound)
	defer cancel()
	for pause, deleting := newPause(), false; ; deleting = true {
		e, err := b.tryClaim(ctx, f, r, req, me)
		if !errors.Is(err, errDeleting) && (!deleting || ctx.Err() == nil) {
			return e, err
		}
		if ended := pause.wait(bounded); ended != nil { // a Delete that is refused takes it back
			return nil, sentence(backends.ErrUnavailable, "volume %s: %w", r.Volume, errDeleting)
		}
	}
}

var (
	errDeleting = errors.New("it is just being deleted")
	errOlder    = sentence(backends.ErrUnavailable, "it is published to this host under an older token")
)

func (b *Backend) tryClaim(ctx context.Context, f *facts, r reference, req backends.AttachRequest, me *holder) (e *entry, err error) {
	var older *holder // this node, under a token that nothing is left of here: not to be adopted
	missing, claimed, mark := false, false, ""
	told, _ := b.told.Load(r.Volume)
	claim := func(is *entry) (*entry, error) {
		claimed, mark = false, ""
		if e, missing = is, is == nil; missing {
			return is, nil
		}
		cut, ok := is.Fenced[b.self.Node]
		switch held := is.Holder; {
		case is.Deleting:
			return is, errDeleting
		case !b.cfg.Fences:
		case ok && req.Token <= cut.Token: // also while it is being cut off, and still the holder
			return is, sentence(backends.ErrInUse, "volume %s was taken from this host, which is cut off from it up to token %d", r.Volume, cut.Token)
		case held != nil && held.Node != b.self.Node:
			return is, &backends.AttachedError{Volume: r.Volume, Node: held.Node, Token: held.Token}
		case held != nil && *held != *me && (older == nil || *held != *older):
			older = held
			return is, errOlder
		default:
			claimed = held == nil || *held != *me
		}
		if mark = is.Late[b.self.Node]; mark != "" && mark != told {
			return is, heard(true, nil)
		}
		if !claimed && mark == "" {
			return is, nil
		}
		e = is.marked(b.self.Node, "")
		if claimed {
			e.Holder = me
		}
		return e, nil
	}
	err = b.update(ctx, r.Volume, claim)
	if errors.Is(err, errOlder) {
		err = b.unasked(ctx, r.Volume, func() (bool, error) { return b.unpublish(ctx, f, r, older.Identity) })
		if err == nil {
			err = b.update(ctx, r.Volume, claim)
		}
	}
	if errors.Is(err, backends.ErrLate) && mark != "" {
		b.told.Store(r.Volume, mark)
	}
	if err != nil {
		return nil, err
	}
	if missing {
		if _, err := b.ask(ctx, f, r); err != nil {
			return nil, err
		}
		return nil, sentence(backends.ErrUnavailable, "the storage has volume %s, and the cluster's record of CSI volumes does not; it has lost an entry", r.Volume)
	}
	if claimed {
		b.step("claimed")
	}
	return e, nil
}

// stillHeld is an error if this node was cut off since it claimed the volume.
func (b *Backend) stillHeld(ctx context.Context, f *facts, r reference, token int64) error {
	if !b.cfg.Fences {
		return nil
	}
	e, _, err := b.load(ctx, r.Volume)
	if err != nil {
		return err
	}
	held := e != nil && e.Holder != nil && *e.Holder == holder{b.self.Node, f.self.GetNodeId(), token}
	if held {
		cut, ok := e.Fenced[b.self.Node]
		held = !ok || cut.Token < token
	}
	if !held {
		return sentence(backends.ErrInUse, "volume %s was taken from this host while it was being attached", r.Volume)
	}
	return nil
}

// elsewhere turns a driver's refusal into the contract's: who has the volume.
func (b *Backend) elsewhere(ctx context.Context, f *facts, r reference, err error) error {
	if code(err) != codes.FailedPrecondition {
		return err
	}
	other := &backends.AttachedError{Volume: r.Volume}
	if !b.cfg.Fences {
		return fmt.Errorf("%w (%w); if that host is switched off, detach it there with the storage's own tools", other, err)
	}
	is, asked := b.ask(ctx, f, r)
	e, _, loaded := b.load(ctx, r.Volume)
	if asked == nil && loaded == nil && e != nil {
		for _, node := range slices.Sorted(maps.Keys(e.Fenced)) {
			if was := e.Fenced[node]; slices.Contains(is.published, was.Identity) && was.Identity != f.self.GetNodeId() {
				other.Node, other.Token = was.Node, was.Token
			}
		}
	}
	return fmt.Errorf("%w (%w)", other, err)
}

// Fence implements backends.Fencer. It needs nothing of the node.
func (b *fencer) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	evidence, err := b.fence(ctx, req)
	return evidence, wrap("cut "+req.Node+" off from volume "+req.Volume, err)
}

func (b *fencer) fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	r, err := b.findAs(req.Ref, req.Volume, req.Token)
	if err != nil {
		return "", err
	}
	if req.Identity == "" {
		return "", fmt.Errorf("the CSI driver's name for %s is not known: %w", req.Node, backends.ErrInvalid)
	}
	f, err := b.ready(ctx)
	if err != nil {
		return "", err
	}
	if _, err := b.ask(ctx, f, r); err != nil {
		return "", err
	}
	e, _, err := b.load(ctx, r.Volume)
	if err != nil {
		return "", err
	}
	if e != nil && e.Holder != nil && e.Holder.Node == req.Node && e.Holder.Token > req.Token {
		return fmt.Sprintf("volume %s was given to %s again, under token %d", r.Volume, req.Node, e.Holder.Token), nil
	}
	return b.cut(ctx, f, r, holder{Node: req.Node, Identity: req.Identity, Token: req.Token})
}

// cut takes a volume from a node, under a token and older ones: it notes that, so that
// no attach of the node under way comes to its end; unpublishes the volume from the
// node; sees that it is; and only then gives up the note that the node has it.
func (b *Backend) cut(ctx context.Context, f *facts, r reference, from holder) (string, error) {
	younger, names := false, []string{from.Identity}
	err := b.update(ctx, r.Volume, func(is *entry) (*entry, error) {
		if is == nil {
			return nil, nil
		}
		if younger = is.Holder != nil && is.Holder.Node == from.Node && is.Holder.Token > from.Token; younger {
			return is, nil
		}
		if is.Holder != nil && is.Holder.Node == from.Node && is.Holder.Identity != from.Identity {
			names = []string{from.Identity, is.Holder.Identity} // it has another name now
		}
		if was, ok := is.Fenced[from.Node]; ok && was.Token >= from.Token {
			return is, nil
		}
		next := *is
		next.Fenced = maps.Clone(is.Fenced)
		if next.Fenced == nil {
			next.Fenced = map[string]holder{}
		}
		next.Fenced[from.Node] = from
		return &next, nil
	})
	if err != nil || younger {
		return fmt.Sprintf("volume %s was given to %s again, under a younger token", r.Volume, from.Node), err
	}
	b.step("noted")
	var is state
	late := false // which hits nobody, as long as the node is cut off
	for pause := newPause(); ; {
		for _, name := range names {
			unheard, err := b.unpublish(ctx, f, r, name)
			if late = late || unheard; err != nil {
				return "", unseen(err)
			}
		}
		b.step("cut")
		if is, err = b.ask(ctx, f, r); err != nil {
			return "", unseen(err)
		}
		if !slices.ContainsFunc(names, func(name string) bool { return slices.Contains(is.published, name) }) {
			break
		}
		// Not yet, or an attach of the node came in between.
		if err := pause.wait(ctx); err != nil {
			return "", sentence(backends.ErrUnavailable, "the CSI driver still shows volume %s published to %s: %w", r.Volume, strings.Join(names, " or "), err)
		}
	}
	b.step("seen")
	err = b.update(ctx, r.Volume, func(e *entry) (*entry, error) {
		holds := e != nil && e.Holder != nil && e.Holder.Node == from.Node && e.Holder.Token <= from.Token
		if e == nil || !holds && !late {
			return e, nil
		}
		next := *e
		if holds {
			next.Holder = nil
		}
		if late {
			return next.marked(from.Node, uuid.NewString()), nil
		}
		return &next, nil
	})
	published := "no host"
	if len(is.published) > 0 {
		published = is.nodes()
	}
	return fmt.Sprintf("the CSI driver %s unpublished volume %s from %.200s; it shows it published to %s", f.name, r.Volume, strings.Join(names, " and "), published), err
}

// unseen keeps the class of what a fence does not get to know: whatever the driver said,
// the node may or may not be cut off.
func unseen(err error) error {
	if errors.Is(err, backends.ErrNotFound) || errors.Is(err, backends.ErrUnavailable) {
		return err
	}
	return backends.Classify(backends.ErrUnavailable, err)
}
