package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/flocker-plugin/flocker/backends"
)

// deviceBound is how long the kernel may take to show, or to drop, a device after the
// driver has said that it is done.
const deviceBound = 10 * time.Second

// Attach implements backends.Backend.
func (b *Backend) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := b.attach(ctx, req)
	return att, wrap("attach volume", err)
}

func (b *Backend) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	var none backends.Attachment
	if err := ctx.Err(); err != nil {
		return none, err
	}
	r, err := b.findAs(req.Ref, req.Volume, req.Token)
	if err != nil {
		return none, err
	}
	unlock, err := b.lock(ctx, r.Volume)
	if err != nil {
		return none, err
	}
	defer unlock()
	f, err := b.ready(ctx)
	if err != nil {
		return none, err
	}
	if r.Driver != f.name {
		return none, sentence(backends.ErrInvalid, "volume %s is of the CSI driver %s, and %s is the driver %s", r.Volume, r.Driver, b.cfg.Node, f.name)
	}
	p, err := b.makeWay(ctx, f, r, req)
	if err != nil {
		return none, err
	}
	if here := f.self.GetAccessibleTopology().GetSegments(); !r.reachable(here) {
		return none, sentence(backends.ErrInvalid, "volume %s can be reached from %s, and this host is in %s", r.Volume, labels(r.Where), cmp.Or(label(here), "no place that the CSI driver knows"))
	}
	if err := b.room(f, r); err != nil {
		return none, err
	}
	e, err := b.claim(ctx, f, r, req)
	if err != nil {
		return none, b.abandon(ctx, f, r, p, err)
	}
	if p.live() {
		return b.attachment(p)
	}
	if p.record.Ref == "" {
		p.record = record{Ref: req.Ref, Boot: p.boot}
		if err := p.make(); err != nil {
			return none, sentence(backends.ErrUnavailable, "%w", err)
		}
	}
	b.step("placed")
	if err := b.publish(ctx, f, r, e, &p, req); err != nil {
		return none, b.abandon(ctx, f, r, p, err)
	}
	return b.attachment(p)
}

// makeWay returns the place for an attachment. What is left of one of another token is
// its owner's to detach, unless nothing of it is seen any more.
func (b *Backend) makeWay(ctx context.Context, f *facts, r reference, req backends.AttachRequest) (place, error) {
	places, err := b.places(r.Volume)
	if err != nil {
		return place{}, err
	}
	p := b.placeOf(r.Volume, req.Token)
	if p.boot, err = bootID(); err != nil {
		return place{}, sentence(backends.ErrUnavailable, "%w", err)
	}
	for _, other := range places {
		switch {
		case other.token == req.Token && (other.record.Going || other.record.Boot != other.boot || (other.whole() && !other.live())):
			// Its end has begun, or it is of an earlier boot, whose device nodes may be
			// other disks by now; or its disk was taken away. Begin anew.
			if err := b.giveUp(ctx, f, r, other); err != nil {
				return place{}, err
			}
		case other.token == req.Token:
			p = other
		case b.shown(ctx, other):
			return place{}, &backends.AttachedError{Volume: r.Volume, Node: b.self.Node, Token: other.token}
		default:
			if err := b.giveUp(ctx, f, r, other); err != nil {
				return place{}, err
			}
		}
	}
	return p, nil
}

// room refuses a volume too many.
func (b *Backend) room(f *facts, r reference) error {
	limit := f.self.GetMaxVolumesPerNode()
	if limit <= 0 || !f.publishes() {
		return nil
	}
	places, err := b.places("")
	if err != nil {
		return err
	}
	others := int64(0)
	for _, p := range places {
		if p.volume != r.Volume {
			others++
		}
	}
	if others >= limit {
		return sentence(backends.ErrUnavailable, "this host has %d volumes of the CSI driver %s, which allows no more; "+
			"stop containers that use some of them, or use another host", others, f.name)
	}
	return nil
}

// publish goes through the steps of an attach, each of which may have been done before.
func (b *Backend) publish(ctx context.Context, f *facts, r reference, e *entry, p *place, req backends.AttachRequest) error {
	var published map[string]string
	if f.publishes() {
		secrets, err := b.client.secrets("publish")
		if err != nil {
			return err
		}
		reply, err := call(ctx, b.client, b.client.controller, "ControllerPublishVolume", b.controller().ControllerPublishVolume,
			&csi.ControllerPublishVolumeRequest{
				VolumeId: r.ID, NodeId: f.self.GetNodeId(), VolumeCapability: capability(), Secrets: secrets, VolumeContext: r.Context,
			})
		if err != nil {
			return b.elsewhere(ctx, f, r, err)
		}
		published = reply.GetPublishContext()
		b.step("published at the controller")
		// It may have taken long.
		if err := b.stillHeld(ctx, f, r, req.Token); err != nil {
			return err
		}
	}
	if f.stages() {
		secrets, err := b.client.secrets("stage")
		if err != nil {
			return err
		}
		_, err = call(ctx, b.client, b.client.node, "NodeStageVolume", b.nodeClient().NodeStageVolume, &csi.NodeStageVolumeRequest{
			VolumeId: r.ID, PublishContext: published, StagingTargetPath: p.stage(),
			VolumeCapability: capability(), Secrets: secrets, VolumeContext: r.Context,
		})
		if err != nil {
			return err
		}
		b.step("staged")
	}
	secrets, err := b.client.secrets("node_publish")
	if err != nil {
		return err
	}
	_, err = call(ctx, b.client, b.client.node, "NodePublishVolume", b.nodeClient().NodePublishVolume, &csi.NodePublishVolumeRequest{
		VolumeId: r.ID, PublishContext: published, StagingTargetPath: b.stageOf(f, *p), TargetPath: p.device(),
		VolumeCapability: capability(), Secrets: secrets, VolumeContext: r.Context,
	})
	if err != nil {
		return err
	}
	b.step("published")
	d, err := b.appear(ctx, f, r, *p)
	if err != nil {
		return err
	}
	p.record.Disk = &d
	if e != nil && e.Grow && d.size() < e.Size {
		if err := b.grow(ctx, *p, e.Size); err != nil {
			return err
		}
	}
	if err := p.save(); err != nil {
		return sentence(backends.ErrUnavailable, "%w", err)
	}
	return nil
}

func (b *Backend) stageOf(f *facts, p place) string {
	if !f.stages() {
		return ""
	}
	return p.stage()
}

// appear returns the disk at a place, once it is there, and refuses one that cannot be
// the volume's.
func (b *Backend) appear(ctx context.Context, f *facts, r reference, p place) (disk, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceBound)
	defer cancel()
	for pause := newPause(); ; {
		d, err := diskAt(p.device())
		if err == nil && d.size() > 0 {
			return d, b.identify(d, r, p)
		}
		if err == nil {
			err = errors.New("it has no medium")
		}
		if errors.Is(err, backends.ErrInvalid) {
			return disk{}, err
		}
		// Whoever cuts this node off may be quicker.
		if lost := b.stillHeld(ctx, f, r, p.token); lost != nil {
			return disk{}, lost
		}
		if ended := pause.wait(ctx); ended != nil {
			return disk{}, sentence(backends.ErrUnavailable, "the CSI driver says that volume %s is at %s, and no device is seen there: %w (%w); "+
				"if the driver runs in a container, what it mounts below %s must be seen here: see docs/backends/csi.md", r.Volume, p.device(), err, ended, b.self.Dir)
		}
	}
}

// identify refuses a disk that is too small, cannot be written, or is another volume's.
// That it has the volume's filesystem is for whoever mounts it to see.
func (b *Backend) identify(d disk, r reference, p place) error {
	switch size := d.size(); {
	case size < r.Size:
		return sentence(backends.ErrUnavailable, "the device at %s has %d bytes, and volume %s has %d: it is another one", p.device(), size, r.Volume, r.Size)
	case d.readOnly():
		return sentence(backends.ErrUnavailable, "the device at %s is read-only; see the CSI driver's log", p.device())
	}
	all, err := b.places("")
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.dir != p.dir && other.record.Disk != nil && *other.record.Disk == d && other.record.Boot == p.boot {
			return sentence(backends.ErrUnavailable, "the device at %s is volume %s, not volume %s; see the CSI driver's log", p.device(), other.volume, r.Volume)
		}
	}
	return nil
}

// abandon gives up what an attach has done that failed for good. If its caller has gone
// it stays, to be found.
func (b *Backend) abandon(ctx context.Context, f *facts, r reference, p place, cause error) error {
	if ctx.Err() != nil || p.record.Ref == "" || p.live() {
		return cause
	}
	return errors.Join(cause, b.giveUp(ctx, f, r, p))
}

func (b *Backend) attachment(p place) (backends.Attachment, error) {
	att := backends.Attachment{Ref: p.record.Ref, Volume: p.volume, Node: b.self.Node, Token: p.token}
	if !p.whole() {
		return att, nil
	}
	var err error
	if att.Device, err = p.record.Disk.path(); err != nil {
		err = sentence(backends.ErrUnavailable, "%w", err)
	}
	return att, err
}

// Detach implements backends.Backend.
func (b *Backend) Detach(ctx context.Context, att backends.Attachment) error {
	return wrap("detach volume "+att.Volume, b.detach(ctx, att))
}

func (b *Backend) detach(ctx context.Context, att backends.Attachment) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r, err := b.findAs(att.Ref, att.Volume, att.Token)
	if err != nil {
		return err
	}
	if att.Node != b.self.Node {
		return b.detachThere(ctx, r, att)
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
	i := slices.IndexFunc(places, func(p place) bool { return p.token == att.Token })
	if i < 0 && !b.cfg.Fences {
		return nil
	}
	f, err := b.ready(ctx)
	if err != nil {
		return err
	}
	if i < 0 {
		return heard(b.letGo(ctx, f, r, att.Token))
	}
	return b.undo(ctx, f, r, places[i])
}

// detachThere is Detach of another node's attachment.
func (b *Backend) detachThere(ctx context.Context, r reference, att backends.Attachment) error {
	if !b.cfg.Fences {
		return fmt.Errorf("it can only be detached on %s: %w", att.Node, backends.ErrInvalid)
	}
	f, err := b.ready(ctx)
	if err != nil {
		return err
	}
	e, _, err := b.load(ctx, r.Volume)
	if err != nil || e == nil || e.Holder == nil || e.Holder.Node != att.Node || e.Holder.Token != att.Token {
		return err
	}
	_, err = b.cut(ctx, f, r, *e.Holder)
	return err
}

// undo takes an attachment down, in CSI's order, from wherever it was left. It is down
// when it says unheard; but a call for that may still hit this node's next attachment.
func (b *Backend) undo(ctx context.Context, f *facts, r reference, p place) error {
	late, err := b.takeDown(ctx, f, r, p)
	return heard(late, err)
}

// giveUp is undo of what no Detach was asked for.
func (b *Backend) giveUp(ctx context.Context, f *facts, r reference, p place) error {
	return b.unasked(ctx, r.Volume, func() (bool, error) { return b.takeDown(ctx, f, r, p) })
}

func (b *Backend) takeDown(ctx context.Context, f *facts, r reference, p place) (late bool, err error) {
	if err := b.unused(ctx, p); err != nil {
		return false, err
	}
	had := p.record.Disk
	if !p.record.Going {
		p.record.Going = true
		if err := p.save(); err != nil {
			return false, sentence(backends.ErrUnavailable, "%w", err)
		}
	}
	b.step("going")
	_, late, err = insist(ctx, b.client, b.client.node, "NodeUnpublishVolume", b.nodeClient().NodeUnpublishVolume,
		&csi.NodeUnpublishVolumeRequest{VolumeId: r.ID, TargetPath: p.device()})
	if err != nil && (code(err) != codes.NotFound || !absent(p)) {
		return late, err
	}
	b.step("unpublished")
	if f.stages() {
		_, unstage, err := insist(ctx, b.client, b.client.node, "NodeUnstageVolume", b.nodeClient().NodeUnstageVolume,
			&csi.NodeUnstageVolumeRequest{VolumeId: r.ID, StagingTargetPath: p.stage()})
		late = late || unstage
		if err != nil && (code(err) != codes.NotFound || !absent(p)) {
			return late, err
		}
		b.step("unstaged")
	}
	unpublish, err := b.letGo(ctx, f, r, p.token)
	late = late || unpublish
	if err != nil {
		return late, err
	}
	if had != nil && p.record.Boot == p.boot {
		if err := b.vanish(ctx, f, *had); err != nil {
			return late, err
		}
	}
	return late, p.remove()
}

// errUnheard says that all was answered in the end, and some of it not at first.
var errUnheard = sentence(backends.ErrUnavailable, "the CSI driver has let go of the volume, but did not answer at first; that call may still take effect")

// heard is the error of calls that end something. late says that one of them got no
// answer, whatever came of the next.
func heard(late bool, err error) error {
	if late {
		err = backends.Classify(backends.ErrLate, cmp.Or(err, errUnheard))
	}
	return err
}

// unused is an error while somebody has what is at a place open or mounted.
func (b *Backend) unused(ctx context.Context, p place) error {
	if p.record.Boot != p.boot {
		return nil // a device node of an earlier boot may be anything by now
	}
	if d := p.record.Disk; d != nil && d.there() {
		return d.closed(ctx)
	} else if d != nil {
		if d.mounted() {
			return fmt.Errorf("what was %s is gone, and still mounted: %w", p.device(), backends.ErrInUse)
		}
		return nil
	}
	// An attach that was interrupted before it noted the disk.
	d, err := diskAt(p.device())
	if err != nil {
		return nil //nolint:nilerr // nothing that could be open
	}
	return d.closed(ctx)
}

// absent says that there is no device at a place.
func absent(p place) bool {
	_, err := diskAt(p.device())
	return errors.Is(err, errNoDevice)
}

// vanish waits until the kernel has dropped a disk. Drivers of local disks keep theirs;
// where a volume may be attached elsewhere next, it has to be gone.
func (b *Backend) vanish(ctx context.Context, f *facts, d disk) error {
	bound := deviceBound
	if !b.cfg.Fences {
		bound = time.Second
	}
	if !f.publishes() {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	for pause := newPause(); d.there() && d.size() > 0; {
		if err := pause.wait(bounded); err != nil {
			if ctx.Err() == nil && !b.cfg.Fences {
				return nil
			}
			return sentence(backends.ErrUnavailable, "the CSI driver has detached the volume, and its device %d:%d is still there: %w", d.Major, d.Minor, err)
		}
	}
	return nil
}

// letGo unpublishes a volume from this node at the controller.
func (b *Backend) letGo(ctx context.Context, f *facts, r reference, token int64) (late bool, err error) {
	if !f.publishes() {
		return false, nil
	}
	if !b.cfg.Fences {
		return b.unpublish(ctx, f, r, f.self.GetNodeId())
	}
	// A younger attachment of this node, or another node's, is none of its business. It
	// would have been cut off before that was made.
	e, _, err := b.load(ctx, r.Volume)
	if err != nil {
		return false, err
	}
	held := e == nil || e.Holder == nil || (e.Holder.Node == b.self.Node && e.Holder.Token == token)
	if e != nil && e.Holder != nil && e.Holder.Node == b.self.Node && !held {
		return false, nil
	}
	if late, err = b.unpublish(ctx, f, r, f.self.GetNodeId()); err != nil {
		return late, err
	}
	b.step("unpublished at the controller")
	return late, b.update(ctx, r.Volume, func(is *entry) (*entry, error) {
		if is == nil || is.Holder == nil || is.Holder.Node != b.self.Node || is.Holder.Token != token {
			return is, nil
		}
		next := *is
		next.Holder = nil
		return &next, nil
	})
}

// unpublish unpublishes a volume from a node at the controller. late says that an earlier
// call for it got no answer, and may still hit the node's next publication.
func (b *Backend) unpublish(ctx context.Context, f *facts, r reference, node string) (late bool, err error) {
	secrets, err := b.client.secrets("publish")
	if err != nil {
		return false, err
	}
	_, late, err = insist(ctx, b.client, b.client.controller, "ControllerUnpublishVolume", b.controller().ControllerUnpublishVolume,
		&csi.ControllerUnpublishVolumeRequest{VolumeId: r.ID, NodeId: node, Secrets: secrets})
	if code(err) == codes.NotFound {
		if _, asked := b.ask(ctx, f, r); errors.Is(asked, backends.ErrNotFound) {
			return false, nil // with the volume, its publications are gone
		}
	}
	return late, err
}

// Attachments implements backends.Backend. It asks the kernel alone. One that was begun,
// or whose end was, has no device; its Detach finishes it.
func (b *Backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	atts, err := b.attachments(ctx)
	return atts, wrap("list attachments", err)
}

func (b *Backend) attachments(ctx context.Context) ([]backends.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	places, err := b.places("")
	if err != nil {
		return nil, err
	}
	var atts []backends.Attachment
	for _, p := range places {
		r, err := b.reference(p.record.Ref)
		if err != nil || !b.ours(r.Cluster) {
			continue
		}
		if !b.shown(ctx, p) {
			b.tidy(ctx, r, p)
			continue
		}
		att := backends.Attachment{Ref: p.record.Ref, Volume: p.volume, Node: b.self.Node, Token: p.token}
		if p.live() || (p.whole() && p.record.Disk.there()) {
			if att.Device, err = p.record.Disk.path(); err != nil {
				return nil, sentence(backends.ErrUnavailable, "%w", err)
			}
		}
		atts = append(atts, att)
	}
	return atts, nil
}

// shown says that something at a place has to be detached by whoever has its token.
// With Fences, what has worked in this boot and is gone was cut off: it is nobody's any
// more, unless it is still open here.
func (b *Backend) shown(ctx context.Context, p place) bool {
	return !b.cfg.Fences || !p.whole() || p.live() || p.used(ctx)
}

// tidyBound is how long Attachments takes for what is nobody's any more.
const tidyBound = 2 * time.Second

// tidy takes down what is left of an attachment that was cut off. If it cannot be done
// now, the next Attachments or Attach tries again.
func (b *Backend) tidy(ctx context.Context, r reference, p place) {
	unlock, ok := b.tryLock(p.volume)
	if !ok {
		return
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(ctx, tidyBound)
	defer cancel()
	if p.read() != nil || b.shown(ctx, p) { // it has changed
		return
	}
	f, err := b.ready(ctx)
	if err == nil {
		_ = b.giveUp(ctx, f, r, p)
		b.told.Delete(p.volume) // the next Attach tells
	}
}

// grow tells the driver's node service that a volume has grown, and waits until its
// device has.
func (b *Backend) grow(ctx context.Context, p place, size int64) error {
	if p.record.Disk.size() >= size {
		return nil
	}
	f, err := b.ready(ctx)
	if err != nil {
		return err
	}
	r, err := b.reference(p.record.Ref)
	if err != nil {
		return err
	}
	if f.node[csi.NodeServiceCapability_RPC_EXPAND_VOLUME] {
		secrets, err := b.client.secrets("expand")
		if err != nil {
			return err
		}
		_, err = call(ctx, b.client, b.client.node, "NodeExpandVolume", b.nodeClient().NodeExpandVolume, &csi.NodeExpandVolumeRequest{
			VolumeId: r.ID, VolumePath: p.device(), StagingTargetPath: b.stageOf(f, p),
			CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: capability(), Secrets: secrets,
		})
		if err != nil {
			return err
		}
	}
	bounded, cancel := context.WithTimeout(ctx, deviceBound)
	defer cancel()
	for pause := newPause(); p.record.Disk.size() < size; {
		if err := pause.wait(bounded); err != nil {
			return sentence(backends.ErrUnavailable, "volume %s has %d bytes, and its device here still has %d; stop and start its containers, which attaches it anew: %w", r.Volume, size, p.record.Disk.size(), err)
		}
	}
	return nil
}
