package ebs

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// known is what EC2 has said of a device, which does not change during its life.
type known struct {
	ours bool
	att  backends.Attachment
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
	c, err := b.connect(ctx)
	if err != nil {
		return none, err
	}
	id, err := c.id(req.Ref)
	if err != nil {
		return none, err
	}
	if req.Token < 0 {
		return none, fmt.Errorf("token %d is negative: %w", req.Token, backends.ErrInvalid)
	}
	a := attaching{b: b, c: c, id: id, req: req}
	defer a.end()
	if err := b.pace.Until(ctx, b.pace.settle, "volume "+id+" is being attached", func() (bool, error) { return a.step(ctx) }); err != nil {
		return none, err
	}
	return a.device(ctx)
}

// attaching is an Attach under way.
type attaching struct {
	b    *Backend
	c    *conn
	id   string
	req  backends.AttachRequest
	is   attached
	name string

	tagged, changed, finished bool

	sent, refused time.Time // since when EC2 has accepted, or refused; zero is not
}

func (a *attaching) end() {
	a.b.mu.Lock()
	defer a.b.mu.Unlock()
	delete(a.b.names, a.name)
	if a.changed && !a.finished {
		a.b.calls++ // Attachments asks EC2 what has come of it
	}
}

// step looks at the volume, and does what is next.
func (a *attaching) step(ctx context.Context) (done bool, err error) {
	v, err := a.b.find(ctx, a.c, a.id)
	if err != nil {
		return false, err
	}
	switch {
	case v.ID != a.req.Volume:
		return false, fmt.Errorf("%s is volume %s, not %s: %w", a.id, v.ID, a.req.Volume, backends.ErrInvalid)
	case v.zone != a.c.zone:
		return false, fmt.Errorf("%s is in zone %s and this host in %s, and EBS attaches within a zone only: "+
			"run the container on a host in %s, or make a copy in %s from a snapshot: %w", a.id, v.zone, a.c.zone, v.zone, a.c.zone, backends.ErrInvalid)
	case v.multi:
		return false, fmt.Errorf("%s has multi-attach enabled, so that EBS would not keep a second host from writing: %w", a.id, backends.ErrInvalid)
	case v.state == types.VolumeStateError:
		return false, fmt.Errorf("%s is in EC2's state %q: %w", a.id, v.state, backends.ErrUnavailable)
	}
	here, ok := v.on(a.c.instance)
	if ok {
		return a.attachedHere(v, here)
	}
	if len(v.attached) > 0 {
		return false, a.elsewhere(v)
	}
	switch {
	case v.state != types.VolumeStateAvailable:
		return false, nil
	case !a.sent.IsZero() && time.Since(a.sent) < a.b.pace.lag:
		return false, nil // EC2 does not show it yet
	case !a.refused.IsZero() && time.Since(a.refused) > 2*a.b.pace.lag:
		return false, &backends.AttachedError{Volume: v.ID}
	}
	return false, a.send(ctx, v)
}

// attachedHere decides about an attachment to this instance.
func (a *attaching) attachedHere(v *volume, here attached) (done bool, err error) {
	h, tagged := v.tokens[a.c.instance]
	settling := a.changed && time.Since(a.sent) < a.b.pace.lag
	switch {
	case here.state == types.VolumeAttachmentStateDetaching, here.state == types.VolumeAttachmentStateBusy && !a.changed:
		return false, nil // an earlier detach ends first
	case (!tagged || h.token != a.req.Token) && settling:
		return false, nil
	case !tagged || h.token != a.req.Token:
		return false, v.attachedError(a.c.instance)
	}
	a.is = here
	return here.state == types.VolumeAttachmentStateAttached, nil
}

// elsewhere says who has the volume; the tag may be shown later than the attachment.
func (a *attaching) elsewhere(v *volume) error {
	other := v.attached[0].instance
	if _, ok := v.tokens[other]; !ok && (a.refused.IsZero() || time.Since(a.refused) < a.b.pace.lag) {
		if a.refused.IsZero() {
			a.refused = time.Now()
		}
		return nil
	}
	return v.attachedError(other)
}

// send writes the token, and asks EC2 to attach the volume.
func (a *attaching) send(ctx context.Context, v *volume) error {
	if !a.tagged {
		if err := a.writeToken(ctx, v); err != nil {
			return err
		}
		a.tagged = true
	}
	if err := a.pickName(ctx, false); err != nil {
		return err
	}
	a.changed = true
	_, err := a.c.ec2.AttachVolume(ctx, &ec2.AttachVolumeInput{VolumeId: &a.id, InstanceId: &a.c.instance, Device: &a.name})
	switch {
	case err == nil:
		a.sent = time.Now()
		return nil
	case is(err, "VolumeInUse", "IncorrectState", "InvalidVolume.NotFound"):
		if a.refused.IsZero() {
			a.refused = time.Now()
		}
		return nil // read it again
	case is(err, "InvalidParameterValue") && strings.Contains(err.Error(), "in use"):
		return a.pickName(ctx, true)
	case is(err, "AttachmentLimitExceeded"):
		return a.c.limit(ctx)
	}
	return a.c.explain(ctx, err, "AttachVolume")
}

// mostTokens is how many tokens are kept on a volume; EC2 allows 50 tags.
const mostTokens = 16

// writeToken makes the tag that says under which token this instance attaches the
// volume from now on. Tokens only grow; a greater one is from before etcd was restored.
func (a *attaching) writeToken(ctx context.Context, v *volume) error {
	var old []types.Tag
	slices.SortFunc(v.tags, func(x, y attachTag) int { return int(min(max(x.token-y.token, -1), 1)) })
	for i, t := range v.tags {
		if t.instance == a.c.instance && t.token > a.req.Token || len(v.tags) > mostTokens && i < len(v.tags)-mostTokens/2 && t.token < a.req.Token {
			old = append(old, types.Tag{Key: &t.key})
		}
	}
	if len(old) > 0 {
		if _, err := a.c.ec2.DeleteTags(ctx, &ec2.DeleteTagsInput{Resources: []string{a.id}, Tags: old}); err != nil && !is(err, "InvalidVolume.NotFound") {
			return a.c.explain(ctx, err, "DeleteTags")
		}
	}
	key := fmt.Sprintf("%s%s:%d", tagAttached, a.c.instance, a.req.Token)
	_, err := a.c.ec2.CreateTags(ctx, &ec2.CreateTagsInput{Resources: []string{a.id}, Tags: []types.Tag{tag(key, a.b.self.Node)}})
	if is(err, "InvalidVolume.NotFound") {
		return nil // AttachVolume says so, too
	}
	return a.c.explain(ctx, err, "CreateTags")
}

// pickName chooses a device name, which says nothing on most instances but has to be
// free. Only after a collision is it worth asking EC2 which are.
func (a *attaching) pickName(ctx context.Context, collided bool) error {
	if a.name != "" && !collided {
		return nil
	}
	used := map[string]bool{}
	if collided {
		all, err := a.b.list(ctx, a.c, filter("attachment.instance-id", a.c.instance))
		if err != nil {
			return err
		}
		for _, v := range all {
			if on, ok := v.on(a.c.instance); ok {
				used[on.device] = true
			}
		}
		used[a.name] = true // whatever it is in use for
	}
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(a.id))
	const letters = 26
	a.b.mu.Lock()
	defer a.b.mu.Unlock()
	delete(a.b.names, a.name)
	for i := range uint32(4 * letters) {
		n := (hash.Sum32() + i) % (4 * letters)
		name := fmt.Sprintf("/dev/xvd%c%c", 'a'+(n/letters+1)%4, 'a'+n%letters)
		if !used[name] && !a.b.names[name] {
			a.name, a.b.names[name] = name, true
			return nil
		}
	}
	return fmt.Errorf("instance %s has no device name left: stop containers here: %w", a.c.instance, backends.ErrUnavailable)
}

// limit says how many volumes this instance can have.
func (c *conn) limit(ctx context.Context) error {
	kind, most := "", ""
	if out, err := c.ec2.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{c.instance}}); err == nil && len(out.Reservations) > 0 && len(out.Reservations[0].Instances) > 0 {
		kind = string(out.Reservations[0].Instances[0].InstanceType)
		out, err := c.ec2.DescribeInstanceTypes(ctx, &ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{types.InstanceType(kind)}})
		if err == nil && len(out.InstanceTypes) > 0 && out.InstanceTypes[0].EbsInfo != nil {
			info := out.InstanceTypes[0].EbsInfo
			if n := aws.ToInt32(info.MaximumEbsAttachments); n > 0 {
				most = fmt.Sprintf(", which are %d", n)
			}
			if info.AttachmentLimitType == types.AttachmentLimitTypeShared {
				most += ", network interfaces included"
			}
		}
	}
	return fmt.Errorf("instance %s (%s) has as many volumes as its type can%s: stop containers here, run them on another host, or use a larger instance type: %w",
		c.instance, kind, most, backends.ErrUnavailable)
}

// device waits until the kernel shows the volume.
func (a *attaching) device(ctx context.Context) (backends.Attachment, error) {
	for started := time.Now(); ; {
		devices, err := a.b.kernel.devices()
		if err != nil {
			return backends.Attachment{}, err
		}
		if d, ok := pick(devices, a.id, a.is.device); ok {
			path, err := a.b.kernel.path(d)
			if err == nil {
				err = loop.Bounded(ctx, a.b.pace.device, path, func() error { return a.b.kernel.Opens(path) })
			}
			if err == nil {
				att := backends.Attachment{Ref: a.req.Ref, Volume: a.req.Volume, Node: a.b.self.Node, Token: a.req.Token, Device: path}
				a.b.mu.Lock()
				a.finished, a.b.lives[d.life] = true, known{true, att}
				a.b.mu.Unlock()
				return att, nil
			}
			if time.Since(started) > a.b.pace.device {
				return backends.Attachment{}, backends.Classify(backends.ErrUnavailable, err)
			}
		}
		if time.Since(started) > a.b.pace.device {
			return backends.Attachment{}, fmt.Errorf("EC2 says that %s is attached to this instance as %s, but within %s the kernel has shown no device "+
				"that says it is %s; look at `lsblk -o NAME,SERIAL` and the kernel's log: %w", a.id, a.is.device, a.b.pace.device, a.id, backends.ErrUnavailable)
		}
		if err := poll.Sleep(ctx, a.b.pace.First/5); err != nil {
			return backends.Attachment{}, fmt.Errorf("the device of %s has not appeared yet: %w", a.id, err)
		}
	}
}

// pick returns a volume's device: by its own serial number or, only where the kernel
// shows one of the Xen hypervisor, by the name EC2 gave it.
func pick(devices []device, id, name string) (device, bool) {
	for _, d := range devices {
		if d.volume == id {
			return d, true
		}
	}
	for _, d := range devices {
		if base, ok := strings.CutPrefix(name, "/dev/"); ok && d.volume == "" && d.name == strings.Replace(base, "sd", "xvd", 1) {
			return d, true
		}
	}
	return device{}, false
}

// Attachments implements backends.Backend. It shows the devices of the kernel. EC2,
// which knows their tokens, is asked about a device once in its life, and after calls
// of this process whose outcome is not known; so never when nothing happens.
func (b *Backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	atts, err := b.attachments(ctx)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return atts, nil
}

func (b *Backend) attachments(ctx context.Context) ([]backends.Attachment, error) {
	if ctx.Err() != nil {
		return nil, backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
	}
	devices, err := b.kernel.devices()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	calls, asks := b.calls, b.asked < b.calls
	lives := map[string]known{}
	for _, d := range devices {
		k, ok := b.lives[d.life]
		if asks = asks || !ok; ok {
			lives[d.life] = k
		}
	}
	b.mu.Unlock()
	var atts []backends.Attachment
	pending := false
	if asks {
		if atts, pending, err = b.askAll(ctx, devices, lives); err != nil {
			return nil, err
		}
	}
	for _, d := range devices {
		if k := lives[d.life]; k.ours {
			atts = append(atts, k.att)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lives = lives // devices that have gone are forgotten
	if asks && !pending {
		b.asked = max(b.asked, calls)
	}
	return atts, nil
}

// askAll completes what is known of the devices, and returns those attachments that
// EC2 has and the kernel has not.
func (b *Backend) askAll(ctx context.Context, devices []device, lives map[string]known) (bare []backends.Attachment, pending bool, err error) {
	c, err := b.connect(ctx)
	if err != nil {
		return nil, false, err
	}
	all, err := b.here(ctx, c)
	if err != nil {
		return nil, false, err
	}
	for _, v := range all {
		on, _ := v.on(c.instance)
		d, shown := pick(devices, v.id, on.device)
		h := v.tokens[c.instance]
		att := backends.Attachment{Ref: v.Ref, Volume: v.ID, Node: or(h.node, b.self.Node), Token: h.token}
		switch {
		case v.Cluster != b.self.Cluster || v.ID == "":
			if shown {
				lives[d.life] = known{}
			}
		case shown:
			if _, ok := lives[d.life]; ok {
				continue
			}
			if att.Device, err = b.kernel.path(d); err != nil {
				return nil, false, err
			}
			lives[d.life] = known{true, att}
		case att.Node != b.self.Node:
			// On a host that has this one's instance_id; or of a node that this host was.
		default:
			bare, pending = append(bare, att), true
		}
	}
	return bare, pending, nil
}

// here returns what EC2 has attached to this instance. It waits for the tokens, which
// may be shown later.
func (b *Backend) here(ctx context.Context, c *conn) (all []*volume, err error) {
	for started := time.Now(); ; {
		if all, err = b.list(ctx, c, filter("attachment.instance-id", c.instance)); err != nil {
			return nil, err
		}
		bare := slices.ContainsFunc(all, func(v *volume) bool {
			_, ok := v.tokens[c.instance]
			return v.Cluster == b.self.Cluster && !ok
		})
		if !bare || time.Since(started) > b.pace.lag {
			break
		}
		if err := poll.Sleep(ctx, b.pace.First); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(all, func(v *volume) bool {
		_, ok := v.on(c.instance)
		return !ok
	}), nil
}

// Detach implements backends.Backend.
func (b *Backend) Detach(ctx context.Context, att backends.Attachment) error {
	if err := b.detach(ctx, att); err != nil {
		return fmt.Errorf("detach volume %s: %w", att.Volume, err)
	}
	return nil
}

func (b *Backend) detach(ctx context.Context, att backends.Attachment) error {
	c, err := b.connect(ctx)
	if err != nil {
		return err
	}
	id, err := c.id(att.Ref)
	if err != nil {
		return err
	}
	v, err := b.look(ctx, c, id)
	if err != nil {
		return err
	}
	if v != nil && v.Cluster == b.self.Cluster && v.ID != att.Volume {
		return fmt.Errorf("%s is volume %s: %w", id, v.ID, backends.ErrInvalid)
	}
	instance := ""
	if v != nil && v.Cluster == b.self.Cluster {
		for _, on := range v.attached {
			h, ok := v.tokens[on.instance]
			for started := time.Now(); !ok && time.Since(started) < b.pace.lag; h, ok = v.tokens[on.instance] {
				if err := poll.Sleep(ctx, b.pace.First); err != nil {
					return err
				}
				if v, err = b.find(ctx, c, id); err != nil {
					return err
				}
			}
			node := h.node
			if !ok && on.instance == c.instance {
				node = b.self.Node
			}
			if node == att.Node && h.token == att.Token {
				instance = on.instance
			}
		}
		if _, here := v.on(c.instance); here && instance == "" {
			return nil // another attachment has the device
		}
	}
	if instance != "" && instance != c.instance {
		return b.pull(ctx, c, id, instance, b.pace.settle)
	}
	if att.Node != b.self.Node && instance == "" {
		return nil
	}
	// Asked for while it is in use, EC2 would do it whenever it is not any more.
	if err := b.unclaimed(id, att.Device); err != nil {
		return err
	}
	if instance != "" {
		if err := b.pull(ctx, c, id, instance, b.pace.settle); err != nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.calls++ // Attachments asks EC2 what has come of it
			return err
		}
	}
	return b.pace.Until(ctx, b.pace.device, "the kernel still has the device of "+id, func() (bool, error) {
		d, ok, err := b.ownDevice(id, att.Device)
		if err != nil || !ok {
			return err == nil, err
		}
		return false, b.kernel.Claimed(b.kernel.Dev + "/" + d.name)
	})
}

// ownDevice returns the device that a volume has here, if it has one.
func (b *Backend) ownDevice(id, path string) (device, bool, error) {
	devices, err := b.kernel.devices()
	if err != nil {
		return device{}, false, err
	}
	for _, d := range devices {
		b.mu.Lock()
		k := b.lives[d.life]
		b.mu.Unlock()
		if d.volume == id || d.volume == "" && k.ours && strings.HasSuffix(k.att.Ref, "/"+id) && k.att.Device == path {
			return d, true, nil
		}
	}
	return device{}, false, nil
}

// unclaimed is ErrInUse if somebody has the volume's device open.
func (b *Backend) unclaimed(id, path string) error {
	d, ok, err := b.ownDevice(id, path)
	if err != nil || !ok {
		return err
	}
	return b.kernel.Claimed(b.kernel.Dev + "/" + d.name)
}
