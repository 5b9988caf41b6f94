package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/flocker-plugin/flocker/backends"
)

// capability is how a volume is used: as a block device, by one node at a time.
func capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func (b *Backend) controller() csi.ControllerClient {
	return csi.NewControllerClient(b.client.controller.conn)
}

func (b *Backend) nodeClient() csi.NodeClient { return csi.NewNodeClient(b.client.node.conn) }

// Create implements backends.Backend.
func (b *Backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	vol, err := b.create(ctx, req)
	return vol, wrap("create volume "+req.Name, err)
}

func (b *Backend) create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	var none backends.Volume
	parsed, err := uuid.Parse(req.ID)
	size := b.roundUp(req.Size)
	switch {
	case ctx.Err() != nil:
		return none, ctx.Err()
	case err != nil || parsed.String() != req.ID:
		return none, fmt.Errorf("id %q is no UUID: %w", req.ID, backends.ErrInvalid)
	case !b.ours(req.Cluster):
		return none, fmt.Errorf("cluster %s is not this one: %w", req.Cluster, backends.ErrInvalid)
	case req.Size <= 0 || (b.cfg.MaxSize > 0 && size > int64(b.cfg.MaxSize)):
		return none, fmt.Errorf("no volume can have %d bytes: %w", req.Size, backends.ErrInvalid)
	}
	parameters, err := b.parameters(req.Profile)
	if err != nil {
		return none, err
	}
	f, err := b.ready(ctx)
	if err != nil {
		return none, err
	}
	intent := &entry{Name: req.Name, Cluster: req.Cluster, Parameters: parameters, Asked: size}
	if f.plugin[csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS] {
		intent.Where = f.self.GetAccessibleTopology().GetSegments()
	}
	// Remembered before the driver hears of it: it keeps no tags to find it by.
	var e *entry
	mine := false
	err = b.update(ctx, req.ID, func(is *entry) (*entry, error) {
		if e, mine = is, is == nil; mine {
			e = intent
		}
		return e, nil
	})
	switch {
	case err != nil:
		return none, err
	case e.Deleting:
		return none, sentence(backends.ErrUnavailable, "the volume is just being deleted")
	case size != e.Asked && size != e.Size:
		return none, fmt.Errorf("there is one with %s: %w", backends.Size(max(e.Asked, e.Size)), backends.ErrExists)
	case e.Ref != "":
		return b.get(ctx, e.Ref)
	}
	b.step("remembered")
	made, err := b.make(ctx, req.ID, e)
	if err != nil {
		if mine && notMade(err) {
			err = errors.Join(err, b.forget(ctx, req.ID, ""))
		}
		return none, err
	}
	b.step("made")
	return b.settle(ctx, req, made)
}

// notMade says that a driver's answer to CreateVolume means that there is no volume: of
// one it has made before it would have told.
func notMade(err error) bool {
	switch code(err) {
	case codes.InvalidArgument, codes.OutOfRange, codes.Unimplemented, codes.ResourceExhausted, codes.PermissionDenied, codes.Unauthenticated:
		return true
	default:
		return false
	}
}

// make has the driver make a volume, or tell about the one it made before.
func (b *Backend) make(ctx context.Context, id string, e *entry) (*csi.Volume, error) {
	secrets, err := b.client.secrets("create")
	if err != nil {
		return nil, err
	}
	req := &csi.CreateVolumeRequest{
		Name: b.cfg.VolumePrefix + id, CapacityRange: &csi.CapacityRange{RequiredBytes: e.Asked},
		VolumeCapabilities: []*csi.VolumeCapability{capability()}, Parameters: e.Parameters, Secrets: secrets,
	}
	if len(e.Where) > 0 {
		here := []*csi.Topology{{Segments: e.Where}}
		req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: here, Preferred: here}
	}
	reply, err := call(ctx, b.client, b.client.controller, "CreateVolume", b.controller().CreateVolume, req)
	if c := code(err); c == codes.InvalidArgument || c == codes.Unimplemented {
		err = fmt.Errorf("%w, or it has no raw block volumes, which are needed here", err)
	}
	if err != nil {
		return nil, err
	}
	made := reply.GetVolume()
	switch size := made.GetCapacityBytes(); {
	case made.GetVolumeId() == "":
		return nil, sentence(backends.ErrUnavailable, "the CSI driver has made a volume and given it no volume_id")
	case size != 0 && size < e.Asked:
		return nil, sentence(backends.ErrUnavailable, "the CSI driver has made a volume of %d bytes, asked for were %d; set allocation_unit and min_size to what it can make", size, e.Asked)
	case size == 0:
		made.CapacityBytes = e.Asked
	}
	return made, nil
}

// settle remembers what was made, unless somebody else has, or has deleted it.
func (b *Backend) settle(ctx context.Context, req backends.CreateRequest, made *csi.Volume) (backends.Volume, error) {
	f, err := b.ready(ctx)
	if err != nil {
		return backends.Volume{}, err
	}
	r := reference{
		Volume: req.ID, Cluster: req.Cluster, Name: req.Name, Driver: f.name, ID: made.GetVolumeId(),
		Context: made.GetVolumeContext(), Where: segments(made.GetAccessibleTopology()), Size: made.GetCapacityBytes(),
	}
	ref, size, gone := r.String(), r.Size, false
	err = b.update(ctx, req.ID, func(is *entry) (*entry, error) {
		if gone = is == nil || is.Deleting; gone {
			return is, nil
		}
		if is.Ref != "" {
			ref, size = is.Ref, is.Size
			return is, nil
		}
		next := *is
		next.Ref, next.Size = ref, size
		return &next, nil
	})
	if err != nil {
		return backends.Volume{}, err
	}
	kept, err := b.reference(ref)
	switch {
	case err != nil:
		return backends.Volume{}, err
	case gone:
		return backends.Volume{}, errors.Join(sentence(backends.ErrUnavailable, "the volume was deleted while it was made"), b.destroy(ctx, r.ID))
	case kept.ID != r.ID:
		// It may be the same one by another name: nothing is deleted on a guess.
		return backends.Volume{}, sentence(backends.ErrUnavailable, "the CSI driver has made two volumes by the name %s%s: %s is used; look at %s and delete it at the storage",
			b.cfg.VolumePrefix, req.ID, kept.ID, r.ID)
	}
	return kept.volume(ref, size), nil
}

// destroy has the driver delete a volume.
func (b *Backend) destroy(ctx context.Context, id string) error {
	secrets, err := b.client.secrets("delete")
	if err != nil {
		return err
	}
	_, err = call(ctx, b.client, b.client.controller, "DeleteVolume", b.controller().DeleteVolume,
		&csi.DeleteVolumeRequest{VolumeId: id, Secrets: secrets})
	if code(err) == codes.NotFound {
		err = nil
	}
	return err
}

// forget removes what is remembered of a volume, if it still has this reference.
func (b *Backend) forget(ctx context.Context, volume, ref string) error {
	return b.update(ctx, volume, func(is *entry) (*entry, error) {
		if is != nil && is.Ref == ref {
			return nil, nil
		}
		return is, nil
	})
}

// Delete implements backends.Backend.
func (b *Backend) Delete(ctx context.Context, ref string) error {
	return wrap("delete volume", b.remove(ctx, ref))
}

func (b *Backend) remove(ctx context.Context, ref string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r, err := b.find(ref)
	if err != nil {
		return err
	}
	unlock, err := b.lock(ctx, r.Volume)
	if err != nil {
		return err
	}
	defer unlock()
	places, err := b.places(r.Volume)
	if err != nil {
		return err
	}
	for _, p := range places {
		if b.shown(ctx, p) {
			return &backends.AttachedError{Volume: r.Volume, Node: b.self.Node, Token: p.token}
		}
	}
	f, err := b.ready(ctx)
	if err != nil {
		return err
	}
	// From here on nobody begins to attach it, nor brings it back.
	var was *entry
	err = b.update(ctx, r.Volume, func(is *entry) (*entry, error) {
		if was = is; is == nil || is.Deleting {
			return is, nil
		}
		next := *is
		next.Deleting = true
		return &next, nil
	})
	if err != nil {
		return err
	}
	err = b.removeMarked(ctx, f, r, was)
	if errors.Is(err, backends.ErrInUse) {
		err = errors.Join(err, b.update(ctx, r.Volume, func(is *entry) (*entry, error) {
			if is == nil || !is.Deleting {
				return is, nil
			}
			next := *is
			next.Deleting = false
			return &next, nil
		}))
	}
	return err
}

func (b *Backend) removeMarked(ctx context.Context, f *facts, r reference, was *entry) error {
	recorded := r.String()
	if r.ID == "" { // from List, of a volume whose making was not heard of
		if was == nil {
			return fmt.Errorf("volume %s: %w", r.Volume, backends.ErrNotFound)
		}
		recorded = was.Ref
		if was.Ref == "" {
			made, err := b.make(ctx, r.Volume, was) // the only way to learn its id
			if err != nil && (!notMade(err) || errors.Is(err, backends.ErrUnavailable) && code(err) != codes.ResourceExhausted) {
				return err
			}
			r.ID = made.GetVolumeId()
		} else if known, err := b.reference(was.Ref); err != nil {
			return err
		} else {
			r = known
		}
	} else if was != nil {
		recorded = was.Ref
	}
	if r.ID != "" {
		is, err := b.ask(ctx, f, r)
		if errors.Is(err, backends.ErrNotFound) {
			return errors.Join(err, b.forget(ctx, r.Volume, recorded))
		}
		if err != nil {
			return err
		}
		if f.shows() && len(is.published) > 0 {
			// A note alone that somebody has it is not enough: a process may have been killed
			// before it went on, or long after.
			if was != nil && was.Holder != nil {
				return &backends.AttachedError{Volume: r.Volume, Node: was.Holder.Node, Token: was.Holder.Token}
			}
			return sentence(backends.ErrInUse, "volume %s is published to %s", r.Volume, is.nodes())
		}
		b.step("deleting")
		if err := b.destroy(ctx, r.ID); err != nil {
			return err
		}
	}
	b.step("deleted")
	return b.forget(ctx, r.Volume, recorded)
}

// Get implements backends.Backend.
func (b *Backend) Get(ctx context.Context, ref string) (backends.Volume, error) {
	if err := ctx.Err(); err != nil {
		return backends.Volume{}, wrap("get volume", err)
	}
	vol, err := b.get(ctx, ref)
	return vol, wrap("get volume", err)
}

func (b *Backend) get(ctx context.Context, ref string) (backends.Volume, error) {
	r, err := b.find(ref)
	if err != nil {
		return backends.Volume{}, err
	}
	f, err := b.ready(ctx)
	if err != nil {
		return backends.Volume{}, err
	}
	if r.ID == "" {
		return backends.Volume{}, fmt.Errorf("volume %s: %w", r.Volume, backends.ErrNotFound)
	}
	is, err := b.ask(ctx, f, r)
	if err != nil {
		return backends.Volume{}, err
	}
	e, _, err := b.load(ctx, r.Volume)
	if err != nil {
		return backends.Volume{}, err
	}
	return r.volume(ref, is.sizeOr(e, r)), nil
}

// state is what the driver shows of a volume.
type state struct {
	size      int64    // 0 if it does not tell
	published []string // node ids; only if facts.shows
}

// published leaves out the empty name that some drivers give for no node.
func published(nodes []string) []string {
	return slices.DeleteFunc(nodes, func(node string) bool { return node == "" })
}

func (s state) nodes() string { return fmt.Sprintf("%.200q", s.published) }

func (s state) sizeOr(e *entry, r reference) int64 {
	switch {
	case s.size > 0:
		return s.size
	case e != nil && e.Size > 0:
		return e.Size
	}
	return r.Size
}

// ask asks the driver about one volume. ErrNotFound only if it said so.
func (b *Backend) ask(ctx context.Context, f *facts, r reference) (state, error) {
	switch {
	case f.controller[csi.ControllerServiceCapability_RPC_GET_VOLUME]:
		reply, err := call(ctx, b.client, b.client.controller, "ControllerGetVolume", b.controller().ControllerGetVolume,
			&csi.ControllerGetVolumeRequest{VolumeId: r.ID})
		if err == nil && reply.GetVolume().GetCapacityBytes() == 0 {
			// csi-driver-host-path says so of a volume that it does not have.
			err = b.confirm(ctx, r)
		}
		if err != nil {
			return state{}, wrap("volume "+r.Volume, err)
		}
		return state{reply.GetVolume().GetCapacityBytes(), published(reply.GetStatus().GetPublishedNodeIds())}, nil
	case f.controller[csi.ControllerServiceCapability_RPC_LIST_VOLUMES]:
		// A list misses volumes while others come and go. Whether one is there, another
		// call says for sure.
		for range 5 {
			all, err := b.listed(ctx)
			if err != nil {
				return state{}, err
			}
			if is, ok := all[r.ID]; ok {
				return is, nil
			}
			if err := b.confirm(ctx, r); err != nil {
				return state{}, err
			}
		}
		// Unless the driver says it of any volume, such as one that it has deleted.
		if e, _, err := b.load(ctx, r.Volume); err != nil || e == nil {
			return state{}, cmp.Or(err, fmt.Errorf("volume %s: %w", r.Volume, backends.ErrNotFound))
		}
		return state{}, sentence(backends.ErrUnavailable, "the CSI driver does not list volume %s, and says that it is there", r.Volume)
	}
	return state{}, b.confirm(ctx, r)
}

// confirm asks whether there is a volume, of a driver that says no more about it.
func (b *Backend) confirm(ctx context.Context, r reference) error {
	secrets, err := b.client.secrets("validate")
	if err != nil {
		return err
	}
	_, err = call(ctx, b.client, b.client.controller, "ValidateVolumeCapabilities", b.controller().ValidateVolumeCapabilities,
		&csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: r.ID, VolumeContext: r.Context, VolumeCapabilities: []*csi.VolumeCapability{capability()}, Secrets: secrets,
		})
	return wrap("volume "+r.Volume, err)
}

// listed returns all volumes the driver lists, by volume_id.
func (b *Backend) listed(ctx context.Context) (map[string]state, error) {
	all := map[string]state{}
	for token, restarts := "", 0; ; {
		page := func(ctx context.Context, req *csi.ListVolumesRequest, opts ...grpc.CallOption) (*csi.ListVolumesResponse, error) {
			reply, err := b.controller().ListVolumes(ctx, req, opts...)
			if status.Code(err) == codes.Aborted && token != "" { // here it means that the token is stale
				err = status.Error(codes.OutOfRange, status.Convert(err).Message())
			}
			return reply, err
		}
		reply, err := call(ctx, b.client, b.client.controller, "ListVolumes", page, &csi.ListVolumesRequest{StartingToken: token})
		if code(err) == codes.OutOfRange && restarts < 5 {
			restarts++ // volumes came and went meanwhile
			clear(all)
			token = ""
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range reply.GetEntries() {
			all[e.GetVolume().GetVolumeId()] = state{e.GetVolume().GetCapacityBytes(), published(e.GetStatus().GetPublishedNodeIds())}
		}
		if token = reply.GetNextToken(); token == "" {
			return all, nil
		}
	}
}

// List implements backends.Backend: what the cluster remembers, as far as the driver
// has it.
func (b *Backend) List(ctx context.Context) ([]backends.Volume, error) {
	vols, err := b.list(ctx)
	return vols, wrap("list volumes", err)
}

func (b *Backend) list(ctx context.Context) ([]backends.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := b.ready(ctx)
	if err != nil {
		return nil, err
	}
	values, err := b.self.Catalog.List(ctx)
	if err != nil {
		return nil, catalogError(ctx, err)
	}
	var all map[string]state
	if f.controller[csi.ControllerServiceCapability_RPC_LIST_VOLUMES] {
		all, err = b.listed(ctx)
	} else {
		err = b.client.probe(ctx)
	}
	if err != nil {
		return nil, err
	}
	var vols []backends.Volume
	for id, value := range values {
		vol, err := b.listOne(ctx, f, id, value, all)
		if errors.Is(err, backends.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		vols = append(vols, vol)
	}
	return vols, nil
}

func (b *Backend) listOne(ctx context.Context, f *facts, id string, value []byte, all map[string]state) (backends.Volume, error) {
	e, err := decode(id, value)
	if err != nil {
		return backends.Volume{}, err
	}
	if !b.ours(e.Cluster) {
		return backends.Volume{}, backends.ErrNotFound
	}
	if e.Ref == "" {
		// It may have been made: Delete finds out.
		r := reference{Volume: id, Cluster: e.Cluster, Name: e.Name, Driver: f.name}
		return r.volume(r.String(), e.Asked), nil
	}
	r, err := b.find(e.Ref)
	if err != nil {
		return backends.Volume{}, err
	}
	is, ok := all[r.ID]
	if !ok && all != nil {
		if is, err = b.ask(ctx, f, r); err != nil {
			return backends.Volume{}, err
		}
	}
	return r.volume(e.Ref, is.sizeOr(e, r)), nil
}

// Resize implements backends.Resizer. A device on another node has the new size after
// its next attach.
func (b *Backend) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	size, err := b.resize(ctx, ref, size)
	return size, wrap("resize volume", err)
}

func (b *Backend) resize(ctx context.Context, ref string, size int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	vol, err := b.get(ctx, ref)
	if err != nil {
		return 0, err
	}
	wanted := b.roundUp(size)
	switch {
	case size < 0 || wanted < 0 || (b.cfg.MaxSize > 0 && size > int64(b.cfg.MaxSize)):
		return 0, fmt.Errorf("no volume can have %d bytes: %w", size, backends.ErrInvalid)
	case wanted <= vol.Size:
		return vol.Size, b.growHere(ctx, vol.ID)
	}
	f, err := b.ready(ctx)
	if err != nil {
		return 0, err
	}
	if !f.controller[csi.ControllerServiceCapability_RPC_EXPAND_VOLUME] {
		return 0, sentence(backends.ErrInvalid, "the CSI driver %s cannot grow volumes", f.name)
	}
	r, err := b.find(ref)
	if err != nil {
		return 0, err
	}
	unlock, err := b.lock(ctx, r.Volume)
	if err != nil {
		return 0, err
	}
	defer unlock()
	secrets, err := b.client.secrets("expand")
	if err != nil {
		return 0, err
	}
	// Noted first: a node that attaches it from now on looks whether it has to grow.
	grow := f.node[csi.NodeServiceCapability_RPC_EXPAND_VOLUME]
	if err := b.note(ctx, r.Volume, func(e *entry) { e.Grow = e.Grow || grow }); err != nil {
		return 0, err
	}
	reply, err := call(ctx, b.client, b.client.controller, "ControllerExpandVolume", b.controller().ControllerExpandVolume,
		&csi.ControllerExpandVolumeRequest{
			VolumeId: r.ID, CapacityRange: &csi.CapacityRange{RequiredBytes: wanted}, Secrets: secrets, VolumeCapability: capability(),
		})
	if code(err) == codes.FailedPrecondition && !f.expansion[csi.PluginCapability_VolumeExpansion_ONLINE] {
		err = fmt.Errorf("%w; this driver grows volumes only while they are attached nowhere: stop its containers, and retry", err)
	}
	if err != nil {
		return 0, err
	}
	now := max(reply.GetCapacityBytes(), wanted)
	if err := b.note(ctx, r.Volume, func(e *entry) { e.Size = max(e.Size, now) }); err != nil {
		return 0, err
	}
	b.step("grown")
	return now, b.growAttached(ctx, r.Volume, now)
}

// note changes an entry that is there.
func (b *Backend) note(ctx context.Context, volume string, change func(e *entry)) error {
	return b.update(ctx, volume, func(is *entry) (*entry, error) {
		if is == nil {
			return nil, nil
		}
		next := *is
		change(&next)
		return &next, nil
	})
}

// growHere is growAttached, with the lock.
func (b *Backend) growHere(ctx context.Context, volume string) error {
	unlock, err := b.lock(ctx, volume)
	if err != nil {
		return err
	}
	defer unlock()
	e, _, err := b.load(ctx, volume)
	if err != nil || e == nil || e.Size == 0 {
		return err
	}
	return b.growAttached(ctx, volume, e.Size)
}

// growAttached makes the device on this node, if there is one, as large as the volume.
func (b *Backend) growAttached(ctx context.Context, volume string, size int64) error {
	places, err := b.places(volume)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(places, func(p place) bool { return p.live() })
	if i < 0 {
		return nil
	}
	return b.grow(ctx, places[i], size)
}
