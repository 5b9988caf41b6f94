package rbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

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
	return b.cut(ctx, v, h)
}

// blocklisted is for how long a client is put on the blocklist: longer than any host sleeps
// and wakes up again with something to write. Ceph's own hour is not enough for that, and a
// year of it must be left.
const (
	year        = 365 * 24 * time.Hour
	blocklisted = 5 * year
)

// cut cuts the client of a claim off, sees that it is, and removes the claim.
func (b *Backend) cut(ctx context.Context, v *volume, h holder) (string, error) {
	_, err := b.ceph.Run(ctx, "ceph", "osd", "blocklist", "add", h.address, strconv.Itoa(int(blocklisted.Seconds())))
	if err != nil {
		return "", err
	}
	// As text: what it prints as JSON is none in Ceph 16.
	list, err := b.ceph.Run(ctx, "ceph", "osd", "blocklist", "ls")
	if err != nil {
		return "", err
	}
	until, ok := listed(string(list), h.address)
	switch {
	case !ok:
		return "", fmt.Errorf("the blocklist does not show client %s, which was added to it: %w", h.address, backends.ErrUnavailable)
	case time.Until(until) < year:
		// Ceph leaves an entry as it is that was there before.
		return "", fmt.Errorf("client %s is on the blocklist until %s only, put there by somebody else, such as who has made a snapshot; "+
			"it is tried again then, or at once after: ceph osd blocklist rm %[1]s: %[3]w", h.address, until.Format(time.RFC3339), backends.ErrUnavailable)
	}
	for started := time.Now(); ; {
		watchers, err := v.image.Watchers(ctx)
		if errors.Is(err, backends.ErrNotFound) {
			break
		}
		if err != nil {
			return "", err
		}
		if !slices.ContainsFunc(watchers, func(w rbdmap.Watcher) bool { return w.Address == h.address }) {
			break
		}
		if time.Since(started) > watchTimeout {
			return "", fmt.Errorf("client %s is on the blocklist, and watches %s still: %w", h.address, v.image.Spec(), backends.ErrUnavailable)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return "", err
		}
	}
	if err := b.drop(ctx, v.image, h); err != nil {
		return "", err
	}
	return fmt.Sprintf("client %s of %s is on the blocklist, and no watcher of %s any more", h.address, h.node, v.image.Spec()), nil
}

// listed returns until when a client is on a blocklist, which has a line for each with the
// address and that time first.
func listed(list, address string) (until time.Time, ok bool) {
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == address {
			until, err := time.Parse("2006-01-02T15:04:05-0700", fields[1])
			return until, err == nil
		}
	}
	return time.Time{}, false
}
