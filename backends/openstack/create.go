package openstack

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Create implements backends.Backend.
//
// Cinder makes a volume for each request, also for one that is repeated or arrives
// late. So a volume counts only when it is marked ready; and Create returns one only if
// it is the first, by its id, of all that carry the dataset's id. Whoever has made a
// volume marks it if then no other is ready and it is the first, and deletes it if
// another is ready. That these are two steps does no harm: whoever made a volume that
// is the first looks for a ready one after having made it, and whoever returns a ready
// one looks for a smaller one after it was marked; one of the two sees the other.
//
// What then is not ready was made by a call that was cut short, or by one that will see the
// ready one. Nobody has it, or gets it any more, and so it is deleted: here, and by Delete.
func (b *cinder) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	v, err := b.create(ctx, req)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	return v.Volume, nil
}

func (b *cinder) create(ctx context.Context, req backends.CreateRequest) (*volume, error) {
	if req.ID == "" || strings.Contains(req.ID, "'") || req.Size <= 0 || req.Cluster != b.self.Cluster {
		return nil, fmt.Errorf("an id, a size and this cluster are needed: %w", backends.ErrInvalid)
	}
	kind, err := b.cfg.kind(req.Profile, req.Options)
	if err != nil {
		return nil, err
	}
	// In this process a dataset is made by one call at a time, which so knows for sure
	// that a volume the process has made is not another call's.
	unlock, err := b.locks.lock(ctx, "dataset "+req.ID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	c := creating{b: b, req: req, kind: kind, size: (req.Size + gib - 1) / gib}
	err = b.pace.Until(ctx, b.pace.settle, "it is being created", func() (bool, error) { return c.step(ctx) })
	return c.made, err
}

// creating is a Create under way.
type creating struct {
	b     *cinder
	req   backends.CreateRequest
	kind  Profile
	size  int64
	fresh time.Time // when this call's volume was last seen to be too new for others to take it for left behind
	made  *volume
}

func (c *creating) step(ctx context.Context) (done bool, err error) {
	asked := time.Now()
	all, err := c.b.list(ctx, keyDataset, c.req.ID)
	if err != nil {
		return false, err
	}
	all = slices.DeleteFunc(all, func(v *volume) bool { return v.gone() || v.Cluster != c.req.Cluster })
	slices.SortFunc(all, func(x, y *volume) int { return strings.Compare(x.id, y.id) })
	if len(all) == 0 {
		return false, c.post(ctx)
	}
	first, ready := all[0], slices.ContainsFunc(all, func(v *volume) bool { return v.ready })
	for _, v := range all {
		switch {
		case v.ready && v.Size != c.size*gib:
			return false, fmt.Errorf("there is one with %s, %s: %w", backends.Size(v.Size), v.id, backends.ErrExists)
		case v.status == "error" && !v.ready: // of no use to anybody
			return false, c.failed(ctx, v)
		case v.maker == c.b.maker && v != first && ready && (!v.ready || first.ready),
			v.maker == c.b.maker && v == first && ready && !first.ready:
			return false, c.b.drop(ctx, v.id)
		}
	}
	switch {
	case first.ready:
		// What this does not get done, Delete does.
		_ = c.b.sweep(ctx, all)
		c.made = first
		return true, nil
	case first.maker != c.b.maker:
		return false, c.b.abandoned(ctx, first, asked)
	case first.status != "available":
		c.fresh = time.Now()
		return false, nil
	case time.Since(c.fresh) > c.b.pace.orphan/2:
		// It is an earlier call's, or Cinder was slow: another node may be deleting it.
		return false, c.b.drop(ctx, first.id)
	}
	marking, cancel := context.WithDeadline(ctx, c.fresh.Add(c.b.pace.orphan*3/4)) // no mark comes late
	defer cancel()
	err = c.b.note(marking, first.id, keyReady, c.b.self.Node)
	if is(err, http.StatusNotFound) && c.b.cfg.rackspace() {
		return false, c.b.fixed(ctx, first.id)
	}
	if is(err, http.StatusNotFound) || unanswered(err) && ctx.Err() == nil {
		return false, nil // the list says what has come of it
	}
	return false, err
}

// post asks Cinder for a volume.
func (c *creating) post(ctx context.Context) error {
	name := "name"
	if c.b.cfg.rackspace() {
		name = "display_name"
	}
	volume := map[string]any{
		name: c.req.Name, "size": c.size,
		"metadata": map[string]string{keyCluster: c.req.Cluster, keyDataset: c.req.ID, keyMaker: c.b.maker},
	}
	if c.kind.VolumeType != "" {
		volume["volume_type"] = c.kind.VolumeType
	}
	if c.kind.Zone != "" {
		volume["availability_zone"] = c.kind.Zone
	}
	err := c.b.send(ctx, request{to: volumes, method: http.MethodPost, path: "volumes", body: map[string]any{"volume": volume}})
	c.fresh = time.Now()
	switch {
	case unanswered(err) && ctx.Err() == nil:
		return nil // the list says what has come of it
	case says(err, "Invalid volume type") || is(err, http.StatusNotFound):
		return fmt.Errorf("%w; use another volume_type (openstack volume type list): %w", err, backends.ErrInvalid)
	case says(err, "vailability zone"):
		return fmt.Errorf("%w; use another zone (openstack availability zone list --volume): %w", err, backends.ErrInvalid)
	}
	return err
}

// failed ends with a volume that Cinder could not make, and says why if Cinder does.
func (c *creating) failed(ctx context.Context, v *volume) error {
	var got struct {
		Messages []struct {
			Text string `json:"user_message"`
		} `json:"messages"`
	}
	why := "Cinder says no more than \"error\"; an administrator finds the reason in the logs of cinder-scheduler and cinder-volume"
	query := url.Values{"resource_uuid": {v.id}}
	if c.b.get(ctx, volumes, "messages?"+query.Encode(), &got) == nil && len(got.Messages) > 0 {
		why = fmt.Sprintf("Cinder says %q", got.Messages[0].Text)
	}
	if err := c.b.drop(ctx, v.id); err != nil {
		return err
	}
	if v.maker != c.b.maker {
		return nil // another node's, or an earlier process's
	}
	return fmt.Errorf("%s could not make it: %s: %w", volumes, why, backends.ErrUnavailable)
}

// abandoned deletes a volume that another process has made and does not mark, because
// its call was cancelled or its host is dead.
func (b *cinder) abandoned(ctx context.Context, v *volume, asked time.Time) error {
	if v.status != "available" || !b.late(v.id, asked) {
		return nil
	}
	return b.drop(ctx, v.id)
}

// sweep deletes those of a dataset's volumes that never were anybody's. One that is being made
// cannot be deleted yet.
func (b *cinder) sweep(ctx context.Context, all []*volume) error {
	var errs error
	for _, v := range all {
		used := v.ready || len(v.keys)+len(v.clients)+len(v.cuts) > 0
		if !used && (v.status == "available" || v.status == "error") {
			errs = errors.Join(errs, b.drop(ctx, v.id))
		}
	}
	return errs
}

// drop deletes a volume that never was anybody's.
func (b *cinder) drop(ctx context.Context, id string) error {
	err := b.send(ctx, request{to: volumes, method: http.MethodDelete, path: "volumes/" + id})
	if is(err, http.StatusNotFound, http.StatusBadRequest) {
		return nil // it is in a state in which it cannot be, or somebody else did it
	}
	return err
}

// Delete implements backends.Backend.
func (b *cinder) Delete(ctx context.Context, ref string) error {
	if err := b.delete(ctx, ref); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	return nil
}

func (b *cinder) delete(ctx context.Context, ref string) error {
	sent, tries := false, 0
	var refused error
	return b.pace.Until(ctx, b.pace.settle, "volume "+ref+" is being deleted", func() (bool, error) {
		if sent {
			v, err := b.look(ctx, ref)
			if err == nil && v != nil {
				err = v.broken()
			}
			return err == nil && v == nil, err
		}
		v, err := b.find(ctx, ref)
		if err != nil {
			return false, err
		}
		atts, err := b.attached(ctx, ref)
		if err != nil {
			return false, err
		}
		switch {
		case len(atts) > 0 && atts[0].hidden:
			return false, nil
		case len(atts) > 0:
			return false, v.attachedError(atts[0].of(v))
		case tries >= 3 && refused != nil:
			return false, refused
		case v.status != "available" && !strings.HasPrefix(v.status, "error"):
			return false, nil // it is being detached
		}
		// First, as nobody knows of them when this one has gone.
		if tries == 0 {
			all, err := b.list(ctx, keyDataset, v.ID)
			if err != nil {
				return false, err
			}
			all = slices.DeleteFunc(all, func(other *volume) bool { return other.id == ref || other.Cluster != v.Cluster })
			if err := b.sweep(ctx, all); err != nil {
				return false, err
			}
		}
		tries++
		err = b.send(ctx, request{to: volumes, method: http.MethodDelete, path: "volumes/" + ref})
		switch {
		case is(err, http.StatusBadRequest): // its state has changed meanwhile, or there are snapshots of it
			refused = fmt.Errorf("%w; it may have snapshots: %w", err, backends.ErrInUse)
			return false, nil
		case is(err, http.StatusNotFound):
			return false, nil
		}
		sent = err == nil
		return false, err
	})
}

// of is what a volume's metadata calls the attachment.
func (a attachment) of(v *volume) string {
	if _, ok := v.tokens[a.ID]; ok {
		return a.ID
	}
	return a.Instance
}

// Get implements backends.Backend.
func (b *cinder) Get(ctx context.Context, ref string) (backends.Volume, error) {
	v, err := b.find(ctx, ref)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("get volume: %w", err)
	}
	return v.Volume, nil
}

// List implements backends.Backend.
func (b *cinder) List(ctx context.Context) ([]backends.Volume, error) {
	all, err := b.list(ctx, keyCluster, b.self.Cluster)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var vols []backends.Volume
	for _, v := range all {
		if v.ready && !v.gone() && v.ID != "" {
			vols = append(vols, v.Volume)
		}
	}
	return vols, nil
}

// resize grows a volume, if it is smaller, and returns its size.
func (b *cinder) resize(ctx context.Context, ref string, size int64) (have int64, err error) {
	sent := false
	err = b.pace.Until(ctx, b.pace.settle, "volume "+ref+" is being grown", func() (bool, error) {
		v, err := b.find(ctx, ref)
		if err != nil {
			return false, err
		}
		if err := v.broken(); err != nil {
			return false, err
		}
		have = v.Size
		switch {
		case v.status == "extending":
			return false, nil
		case v.Size >= size:
			return true, nil
		case v.status == "in-use" && !b.cfg.GrowAttached:
			return false, fmt.Errorf("volume %s is attached, and grow_attached is not set: stop its containers, so that it is detached, "+
				"or set it if the storage below Cinder can (Ceph can, NFS cannot): %w", ref, backends.ErrInUse)
		case v.status != "in-use" && v.status != "available":
			return false, nil
		case sent:
			return false, fmt.Errorf("%s was asked to grow volume %s, and has not: %w", volumes, ref, backends.ErrUnavailable)
		}
		err = b.send(ctx, request{
			to: volumes, method: http.MethodPost, path: "volumes/" + ref + "/action",
			body: map[string]any{"os-extend": map[string]any{"new_size": size / gib}},
		})
		if is(err, http.StatusBadRequest) { // its state has changed meanwhile
			return false, nil
		}
		sent = err == nil
		return false, err
	})
	return have, err
}
