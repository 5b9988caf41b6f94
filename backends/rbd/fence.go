package rbd

import (
	"context"
	"fmt"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// Fence implements backends.Fencer. It writes down that the node is cut off, and then
// looks for its claim; Attach does it the other way round, so one of them sees the other.
func (b *Backend) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	evidence, err := b.fence(ctx, req)
	if err != nil {
		return "", fmt.Errorf("cut %s off from volume %s: %w", req.Node, req.Volume, err)
	}
	return evidence, nil
}

func (b *Backend) fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	v, err := b.find(ctx, req.Ref)
	if err != nil {
		return "", err
	}
	if v.ID != req.Volume || req.Node == "" || req.Token < 0 {
		return "", fmt.Errorf("%s is volume %s, and the request names node %q and token %d: %w", req.Ref, v.ID, req.Node, req.Token, backends.ErrInvalid)
	}
	if _, err := b.rados(ctx, v.image, "setomapval", v.image.Name, cutKey(req.Node, req.Token), "1"); err != nil {
		return "", err
	}
	h, ok, err := b.holder(ctx, v.image)
	switch {
	case err != nil:
		return "", err
	case !ok || h.deletes:
		return fmt.Sprintf("nobody has a claim to %s, and %s gets none up to token %d", v.image.Spec(), req.Node, req.Token), nil
	case h.node != req.Node:
		return fmt.Sprintf("the claim to %s is another host's, and %s gets none up to token %d", v.image.Spec(), req.Node, req.Token), nil
	case h.token > req.Token:
		return fmt.Sprintf("the claim to %s is of the younger token %d", v.image.Spec(), h.token), nil
	}
	return b.cut(ctx, v.image, h)
}

// cut cuts the client of a claim off, sees that it is, and removes the claim.
func (b *Backend) cut(ctx context.Context, image rbdmap.Image, h holder) (string, error) {
	if _, err := image.Cut(ctx, h.address); err != nil {
		return "", err
	}
	if err := b.drop(ctx, image, h); err != nil {
		return "", err
	}
	return fmt.Sprintf("client %s of %s is on the blocklist, and no watcher of %s any more", h.address, h.node, image.Spec()), nil
}
