package openstack

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Nova is the backend of a node that is a server of Nova's.
type Nova struct {
	*cinder
	kernel kernel
	guest  guest

	addresses func() ([]net.IP, error) // this host's

	// Guarded by cinder.mu:

	server string
	lives  map[string]string // of Xen's disks that are known to be volumes, by volume
}

var (
	_ backends.Backend    = (*Nova)(nil)
	_ backends.Fencer     = (*Nova)(nil)
	_ backends.Identifier = (*Nova)(nil)
	_ backends.Resizer    = (*Nova)(nil)
)

// Properties implements backends.Backend.
func (b *Nova) Properties() backends.Properties {
	p := b.properties(backends.ClassExclusive)
	p.LateCalls = b.cfg.LateCalls
	p.FenceTime = 5 * time.Minute // Nova lets a server shut down by itself first
	return p
}

// Identity implements backends.Identifier: the UUID of this server.
func (b *Nova) Identity(ctx context.Context) (string, error) {
	if b.cfg.ServerID != "" {
		return b.cfg.ServerID, nil
	}
	b.mu.Lock()
	id := b.server
	b.mu.Unlock()
	if id != "" {
		return id, nil
	}
	id, err := b.guest.serverID(ctx)
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.server = id
	return id, nil
}

// Attach implements backends.Backend.
func (b *Nova) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := b.attach(ctx, req)
	if err != nil {
		return backends.Attachment{}, fmt.Errorf("attach volume: %w", err)
	}
	return att, nil
}

func (b *Nova) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	none := backends.Attachment{}
	server, err := b.Identity(ctx)
	if err != nil {
		return none, err
	}
	if req.Token < 0 {
		return none, fmt.Errorf("token %d is negative: %w", req.Token, backends.ErrInvalid)
	}
	if b.cfg.XenDisks {
		if err := b.isHere(ctx, server); err != nil {
			return none, err
		}
	}
	// Asked twice at once, Nova may attach a volume twice to one server, and Cinder then
	// has it attaching for ever.
	unlock, err := b.locks.lock(ctx, req.Ref)
	if err != nil {
		return none, err
	}
	defer unlock()
	a := attaching{b: b, server: server, req: req}
	defer a.end()
	if err := b.pace.Until(ctx, b.pace.settle, "volume "+req.Ref+" is being attached", func() (bool, error) { return a.step(ctx) }); err != nil {
		return none, err
	}
	return a.device(ctx)
}

// attaching is an Attach under way.
type attaching struct {
	b      *Nova
	server string
	req    backends.AttachRequest

	noted, changed, finished, accepted bool

	refused error // what Nova said to the last try
	tries   int

	// Of Xen: the disks that were there before, what Nova calls the volume's, and its size.
	before []device
	named  string
	size   int64
}

func (a *attaching) end() {
	if a.changed && !a.finished {
		a.b.seen.doubt()
	}
}

// step looks at the volume, and does what is next.
func (a *attaching) step(ctx context.Context) (done bool, err error) {
	v, err := a.b.find(ctx, a.req.Ref)
	if err != nil {
		return false, err
	}
	if err := v.mayBe(a.req); err != nil {
		return false, err
	}
	atts, err := a.b.attached(ctx, v.id)
	if err != nil {
		return false, err
	}
	for _, att := range atts {
		if att.hidden {
			return false, nil
		}
		if att.Instance != a.server {
			return false, v.attachedError(att.of(v))
		}
		h, ok := v.tokens[a.server]
		switch {
		case v.status == "detaching":
			return false, nil // an earlier detach ends first
		case !ok || h.token != a.req.Token:
			return false, v.attachedError(a.server)
		case v.status == "in-use" && att.Status == "attached":
			a.size = v.Size
			return true, nil
		}
	}
	if err := v.broken(); err != nil {
		return false, err
	}
	switch {
	case len(atts) > 0 || v.status != "available":
		return false, nil
	case a.accepted:
		return false, fmt.Errorf("%s has accepted to attach volume %s to server %s, and then gave it up; "+
			"its compute host's log says why (openstack server event list): %w", compute, v.id, a.server, backends.ErrUnavailable)
	case a.tries >= 4 && a.refused != nil:
		return false, a.refused
	}
	return false, a.send(ctx, v)
}

// mayBe says why a volume is not one to be attached.
func (v *volume) mayBe(req backends.AttachRequest) error {
	switch {
	case v.ID != req.Volume:
		return fmt.Errorf("%s is volume %s, not %s: %w", v.id, v.ID, req.Volume, backends.ErrInvalid)
	case v.multi:
		return fmt.Errorf("volume %s is of a type with multiattach, so that Cinder would not keep a second host from writing: %w", v.id, backends.ErrInvalid)
	}
	return nil
}

// send notes the token, and asks Nova to attach the volume.
func (a *attaching) send(ctx context.Context, v *volume) error {
	if !a.noted {
		if err := a.b.noteToken(ctx, v, a.server, a.req.Token); err != nil {
			return err
		}
		a.noted = true
	}
	if err := a.foresee(); err != nil {
		return err
	}
	a.changed = true
	a.tries++
	err := a.b.cinder.send(ctx, request{
		to: compute, method: http.MethodPost, path: "servers/" + a.server + "/os-volume_attachments",
		body: map[string]any{"volumeAttachment": map[string]any{"volumeId": v.id}},
	})
	switch {
	case err == nil:
		a.accepted = true
	case is(err, http.StatusBadRequest, http.StatusConflict): // the volume's state, or the server's
		a.refused = fmt.Errorf("%w: %w", err, backends.ErrUnavailable)
		if says(err, "availability zone") {
			return fmt.Errorf("%w; this cloud attaches volumes within a zone only: set zone for new ones: %w", err, backends.ErrInvalid)
		}
	case is(err, http.StatusForbidden) && says(err, "maximum"):
		return fmt.Errorf("%w; server %s has as many disks as it can: stop containers here, or run them on another host: %w", err, a.server, backends.ErrUnavailable)
	case is(err, http.StatusNotFound) && says(err, "instance"):
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s has no server %s in this project; check server_id and the project (%s)", compute, a.server, err.Error()))
	case is(err, http.StatusNotFound), unanswered(err) && ctx.Err() == nil:
		a.refused = err // it may have been carried out: read it again
	default:
		return err
	}
	return nil
}

// mostTokens is how many tokens are kept in a volume's metadata.
const mostTokens = 16

// noteToken says under which token a server attaches the volume from now on. Tokens
// only grow; a greater one is from before etcd was restored.
func (b *Nova) noteToken(ctx context.Context, v *volume, server string, token int64) error {
	slices.SortFunc(v.keys, func(x, y tokenKey) int { return int(min(max(x.token-y.token, -1), 1)) })
	for i, k := range v.keys {
		if k.of == server && k.token > token || len(v.keys) > mostTokens && i < len(v.keys)-mostTokens/2 && k.token < token {
			if err := b.unnote(ctx, v.id, k.key); err != nil {
				return err
			}
		}
	}
	err := b.note(ctx, v.id, fmt.Sprintf("%s%s_%d", keyAttached, server, token), b.self.Node)
	if is(err, http.StatusNotFound) {
		return nil // the volume was deleted, which the next look says
	}
	return err
}

// device waits until the kernel shows the volume.
func (a *attaching) device(ctx context.Context) (backends.Attachment, error) {
	for started := time.Now(); ; {
		late := time.Since(started) > a.b.pace.device
		d, ok, why, err := a.shown(ctx)
		if err != nil {
			return backends.Attachment{}, err
		}
		if ok {
			path, err := a.b.kernel.path(d)
			if err == nil {
				err = loop.Bounded(ctx, a.b.pace.device, path, func() error { return a.b.kernel.Opens(path) })
			}
			if err == nil {
				att := backends.Attachment{Ref: a.req.Ref, Volume: a.req.Volume, Node: a.b.self.Node, Token: a.req.Token, Device: path}
				a.finished = true
				a.b.seen.add(d.life, att)
				return att, nil
			}
			if late {
				return backends.Attachment{}, backends.Classify(backends.ErrUnavailable, err)
			}
		}
		if late {
			return backends.Attachment{}, fmt.Errorf("%s says that volume %s is attached to this server, %s, but within %s the kernel has shown no disk "+
				"that says it is this one; %s: %w", compute, a.req.Ref, a.server, a.b.pace.device, why, backends.ErrUnavailable)
		}
		if err := poll.Sleep(ctx, a.b.pace.First/5); err != nil {
			return backends.Attachment{}, fmt.Errorf("the device of %s has not appeared yet: %w", a.req.Ref, err)
		}
	}
}

// devices returns the disks of this host that may be volumes.
func (b *Nova) devices() ([]device, error) {
	devices, err := b.kernel.devices()
	if err != nil || !b.cfg.XenDisks {
		return devices, err
	}
	xen, err := b.kernel.xenDisks()
	return append(devices, xen...), err
}

// disk returns the device that a volume has here, if it is known to have one.
func (b *Nova) disk(id string) (device, bool, error) {
	devices, err := b.devices()
	if err != nil {
		return device{}, false, err
	}
	xen := b.xenLife(id)
	i := slices.IndexFunc(devices, func(d device) bool { return d.of(id) || d.life == xen })
	if i < 0 {
		return device{}, false, nil
	}
	return devices[i], true, nil
}

// shown returns the disk that says it is the volume, or is proven to be. why says what
// has kept one from that.
func (a *attaching) shown(ctx context.Context) (d device, ok bool, why string, err error) {
	devices, err := a.b.kernel.devices()
	if err != nil {
		return d, false, "", err
	}
	if i := slices.IndexFunc(devices, func(d device) bool { return d.of(a.req.Ref) }); i >= 0 {
		return devices[i], true, "", nil
	}
	if a.b.cfg.XenDisks {
		return a.xen(ctx)
	}
	why = "look at `lsblk -o NAME,SERIAL`, whether server_id is right, and at the kernel's log"
	if a.b.kernel.hasXen() {
		why = "this server runs on Xen, whose disks do not say which volume they are, and xen_disks is not set"
	}
	return d, false, why, nil
}

// Attachments implements backends.Backend. It shows the disks of the kernel. OpenStack,
// which knows their tokens, is asked about a disk once in its life, and after calls of
// this process whose outcome is not known; so never when nothing happens.
func (b *Nova) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	atts, err := b.attachments(ctx)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return atts, nil
}

func (b *Nova) attachments(ctx context.Context) ([]backends.Attachment, error) {
	if ctx.Err() != nil {
		return nil, backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
	}
	devices, err := b.devices()
	if err != nil {
		return nil, err
	}
	var lives []string
	for _, d := range devices {
		lives = append(lives, d.life)
	}
	return b.seen.attachments(lives, func(lives map[string]known) (bare []backends.Attachment, pending bool, err error) {
		return b.askAll(ctx, devices, lives)
	})
}

// askAll completes what is known of the devices, as far as it gets, and returns those
// attachments that Nova has and the kernel has not.
func (b *Nova) askAll(ctx context.Context, devices []device, lives map[string]known) (bare []backends.Attachment, pending bool, err error) {
	server, err := b.Identity(ctx)
	if err != nil {
		return nil, false, err
	}
	if slices.ContainsFunc(devices, func(d device) bool { return d.xen }) {
		if err := b.isHere(ctx, server); err != nil {
			return nil, false, err
		}
	}
	var got struct {
		Attachments []novaAttachment `json:"volumeAttachments"`
	}
	if err := b.get(ctx, compute, "servers/"+server+"/os-volume_attachments", &got); err != nil {
		if is(err, http.StatusNotFound) {
			err = backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s has no server %s in this project; check server_id and the project (%s)", compute, server, err.Error()))
		}
		return nil, false, err
	}
	named := map[int]bool{} // the devices
	for _, on := range got.Attachments {
		i := slices.IndexFunc(devices, on.is)
		named[i] = true
		if i >= 0 {
			if _, ok := lives[devices[i].life]; ok {
				continue
			}
		}
		v, err := b.look(ctx, on.Volume)
		if err != nil {
			return nil, false, err
		}
		if v == nil || v.Cluster != b.self.Cluster || v.ID == "" {
			if i >= 0 {
				lives[devices[i].life] = known{}
			}
			continue
		}
		if i >= 0 && devices[i].xen {
			d, ok, err := b.xenOf(devices, on.Device, v)
			if err != nil {
				return nil, false, err
			}
			if ok = ok && v.status == "in-use"; ok {
				if ok, err = b.xenKnown(v.id, d); err != nil {
					return nil, false, err
				}
			}
			if ok {
				b.xenVolume(v.id, d)
			} else {
				i = -1 // the volume is not there yet, or any more; or the disk is another's
			}
		}
		h := v.tokens[server]
		att := backends.Attachment{Ref: v.Ref, Volume: v.ID, Node: b.self.Node, Token: h.token}
		if h.node != "" {
			att.Node = h.node
		}
		if i < 0 && att.Node != b.self.Node {
			continue // on a host that has this one's server_id; or of a node that this host was
		}
		if i < 0 {
			pending = true
			on, err := b.on(ctx, v.id, server) // Nova forgets a volume last
			if err != nil {
				return nil, false, err
			}
			if on {
				bare = append(bare, att)
			}
			continue
		}
		if att.Device, err = b.kernel.path(devices[i]); err != nil {
			return nil, false, err
		}
		lives[devices[i].life] = known{true, att}
	}
	for i, d := range devices { // the disks that the server was made with
		if _, ok := lives[d.life]; d.xen && !named[i] && !ok {
			lives[d.life] = known{}
		}
	}
	return bare, pending, nil
}

// Detach implements backends.Backend.
func (b *Nova) Detach(ctx context.Context, att backends.Attachment) error {
	if err := b.detach(ctx, att); err != nil {
		return fmt.Errorf("detach volume %s: %w", att.Volume, err)
	}
	return nil
}

func (b *Nova) detach(ctx context.Context, att backends.Attachment) error {
	if !uuidForm.MatchString(att.Ref) {
		return fmt.Errorf("%q is no reference to a Cinder volume: %w", att.Ref, backends.ErrInvalid)
	}
	self, err := b.Identity(ctx)
	if err != nil {
		return err
	}
	unlock, err := b.locks.lock(ctx, att.Ref)
	if err != nil {
		return err
	}
	defer unlock()
	v, err := b.look(ctx, att.Ref)
	if err != nil {
		return err
	}
	server := ""
	if v != nil && v.Cluster == b.self.Cluster {
		if v.ID != att.Volume {
			return fmt.Errorf("%s is volume %s: %w", v.id, v.ID, backends.ErrInvalid)
		}
		atts, err := b.attached(ctx, v.id)
		if err != nil {
			return err
		}
		here := false
		for _, a := range atts {
			if a.hidden {
				return hiddenError(v.id, a)
			}
			h, ok := v.tokens[a.Instance]
			if !ok && a.Instance == self {
				h.node = b.self.Node
			}
			here = here || a.Instance == self
			if a.Instance != "" && h.node == att.Node && h.token == att.Token {
				server = a.Instance
			}
		}
		if here && server == "" {
			return nil // another attachment has the device
		}
	}
	if server != "" && server != self {
		return b.pull(ctx, att.Ref, server, b.pace.settle)
	}
	if att.Node != b.self.Node && server == "" {
		return nil
	}
	if server != "" && b.cfg.XenDisks {
		if err := b.xenHere(ctx, server, v); err != nil {
			return err
		}
	}
	// Asked for while it is in use, the device would be pulled from its user.
	if err := b.unclaimed(ctx, att.Ref); err != nil {
		return err
	}
	if server != "" {
		if err := b.pull(ctx, att.Ref, server, b.pace.settle); err != nil {
			b.seen.doubt()
			return err
		}
	}
	err = b.pace.Until(ctx, b.pace.device, "the kernel still has the device of "+att.Ref, func() (bool, error) {
		_, ok, err := b.disk(att.Ref)
		if err == nil && ok {
			err = b.unclaimed(ctx, att.Ref)
		}
		return err == nil && !ok, err
	})
	if err == nil && b.cfg.XenDisks {
		_ = b.unnoteXen(att.Ref) // the next attach does, too
	}
	return err
}

// unclaimed is ErrInUse if somebody has the volume's device open.
func (b *Nova) unclaimed(ctx context.Context, id string) error {
	d, ok, err := b.disk(id)
	if err != nil || !ok {
		return err
	}
	return glanced(ctx, b.kernel.Claimed, b.kernel.Dev+"/"+d.name)
}

// Resize implements backends.Resizer. It returns when the kernel shows a disk of this
// host in the new size.
func (b *Nova) Resize(ctx context.Context, ref string, bytes int64) (int64, error) {
	have, err := b.resize(ctx, ref, (bytes+gib-1)/gib*gib)
	if err != nil {
		return 0, fmt.Errorf("grow volume: %w", err)
	}
	err = b.pace.Until(ctx, b.pace.device, "the kernel does not show the new size of volume "+ref, func() (bool, error) {
		d, ok, err := b.disk(ref)
		if err != nil || !ok {
			return err == nil, err
		}
		shown, err := b.kernel.size(d.name)
		return shown >= have, err
	})
	if err != nil {
		return 0, fmt.Errorf("grow volume: %w", err)
	}
	return have, nil
}

// stuck says that a server does not let go of a volume.
type stuck struct{ volume, server, status string }

func (s *stuck) Error() string {
	return fmt.Sprintf("Nova was asked to detach volume %s, and server %s has not let go of it yet (%s)", s.volume, s.server, s.status)
}

func (s *stuck) Is(target error) bool { return target == backends.ErrUnavailable }

// hostDown says that Nova does not reach a server's compute host.
type hostDown struct {
	server string
	err    error
}

func (h *hostDown) Error() string {
	return fmt.Sprintf("Nova does not reach the compute host of server %s, so nothing says that it does not write any more (%s)", h.server, h.err)
}

func (h *hostDown) Is(target error) bool { return target == backends.ErrUnavailable }

// pull detaches a volume from a server, and returns when Cinder and Nova show it
// detached. They do when the hypervisor has taken the disk away. limit is how long that may
// take, from when Nova has taken the call: that it throttles this host says nothing of the server.
func (b *Nova) pull(ctx context.Context, id, server string, limit time.Duration) error {
	path := "servers/" + server + "/os-volume_attachments/" + id
	var asked time.Time
	sent, detaching := false, false
	for wait := b.pace.First; ; wait = min(wait*3/2, b.pace.Most) {
		late := !asked.IsZero() && time.Since(asked) > limit // before the looks, which may be slow
		v, err := b.look(ctx, id)
		if err != nil {
			return err
		}
		if v == nil {
			return nil // deleted
		}
		atts, err := b.attached(ctx, id)
		if err != nil {
			return err
		}
		on := slices.IndexFunc(atts, func(a attachment) bool { return a.Instance == server })
		hidden := len(atts) == 1 && atts[0].hidden
		if on < 0 && !hidden {
			err := b.get(ctx, compute, path, nil)
			if is(err, http.StatusNotFound) {
				return nil
			}
			if err != nil {
				return err
			}
		}
		var refused error
		if on >= 0 && !sent && !detaching && v.status != "detaching" {
			err := b.cinder.send(ctx, request{to: compute, method: http.MethodDelete, path: path})
			switch {
			case err == nil:
				sent, asked, late = true, time.Now(), false
			case is(err, http.StatusConflict) && strings.Contains(strings.ToLower(err.Error()), "service is unavailable"):
				return &hostDown{server, err}
			case is(err, http.StatusNotFound): // the server, or its having the volume
				refused = fmt.Errorf("%s says that it is attached to server %s, of which Nova knows nothing; "+
					"an administrator has to get it free (openstack volume set --detached --state available %s): %w", volumes, server, id, backends.ErrUnavailable)
			case is(err, http.StatusBadRequest, http.StatusConflict):
				refused = fmt.Errorf("%w: %w", err, backends.ErrUnavailable)
			default:
				// Without an answer it may be carried out yet, and would hit a newer
				// attachment then: so this is no success, even if the volume is detached by now.
				return err
			}
		}
		if detaching = detaching || v.status == "detaching"; detaching && v.status == "in-use" {
			return &stuck{id, server, "Nova has given up"}
		}
		if late {
			if refused != nil {
				return refused
			}
			return &stuck{id, server, v.status}
		}
		if asked.IsZero() {
			asked = time.Now()
		}
		if err := poll.Sleep(ctx, poll.Jitter(wait)); err != nil {
			return fmt.Errorf("%w: %w", &stuck{id, server, v.status}, err)
		}
	}
}
