package openstack

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Connector is the backend of a node that is no server of Nova's: it has Cinder make an
// attachment for this host, and makes the device itself.
type Connector struct {
	*cinder
	storage storage
}

var _ backends.Backend = (*Connector)(nil)

// storage makes block devices of what Cinder tells where it is.
type storage interface {
	// lock keeps other processes of this host from the devices of a volume.
	lock(ctx context.Context, volume string) (unlock func(), err error)
	// devices returns what was made on this host, by the state of the kernel.
	devices(ctx context.Context) ([]block, error)
	// connect makes a device, or returns the one there is.
	connect(ctx context.Context, to connection) (block, error)
	// served says whether a device can still do anything.
	served(b block) (bool, error)
	// disconnect removes a device. clean says that nothing sent through it can arrive later.
	disconnect(ctx context.Context, b block, pace pace) (clean bool, err error)
}

// settler is a storage through which something may still arrive of a device that has gone.
type settler interface {
	// settle returns when that cannot happen any more; nil if there is nothing of the
	// connection on this host.
	settle(ctx context.Context, to connection) error
}

// connector is a storage of which Cinder has to know who this host is.
type connector interface {
	connector() map[string]any
}

// cutter is a storage that can cut a client off. It returns when that is seen.
type cutter interface {
	cut(ctx context.Context, c client) error
}

// connection is what a device is to be made of.
type connection struct {
	volume, attachment, dataset string
	token                       int64
	info                        map[string]any
	// allow is told how the storage knows this connection, before the device can be used.
	allow func(address, image string) error
}

// block is a device that was made here.
type block struct {
	path, volume string
	life         string // tells it from an earlier one of the same name
	// What the device itself knows of its attachment; empty is nothing.
	attachment, dataset string
	token               int64
}

// device returns the device of a volume, if there is one.
func (b *Connector) device(ctx context.Context, id string) (block, bool, error) {
	all, err := b.storage.devices(ctx)
	i := slices.IndexFunc(all, func(d block) bool { return d.volume == id })
	if err != nil || i < 0 {
		return block{}, false, err
	}
	return all[i], true, nil
}

// Properties implements backends.Backend. Cinder keeps books and lets one host at a time
// attach a volume, but what it does when an attachment is deleted cuts nobody off from a
// file on NFS.
func (b *Connector) Properties() backends.Properties {
	return b.properties(backends.ClassNone)
}

// Attach implements backends.Backend.
func (b *Connector) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := b.attach(ctx, req)
	if err != nil {
		return backends.Attachment{}, fmt.Errorf("attach volume: %w", err)
	}
	return att, nil
}

func (b *Connector) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	none := backends.Attachment{}
	if req.Token < 0 {
		return none, fmt.Errorf("token %d is negative: %w", req.Token, backends.ErrInvalid)
	}
	unlock, err := b.locks.lock(ctx, req.Ref)
	if err != nil {
		return none, err
	}
	defer unlock()
	free, err := b.storage.lock(ctx, req.Ref)
	if err != nil {
		return none, err
	}
	defer free()
	a := connecting{b: b, req: req}
	if err := b.pace.Until(ctx, b.pace.settle, "volume "+req.Ref+" is being attached", func() (bool, error) { return a.step(ctx) }); err != nil {
		if a.changed {
			b.seen.doubt()
		}
		return none, errors.Join(err, a.undo(ctx))
	}
	return a.att, nil
}

// connecting is an Attach under way.
type connecting struct {
	b       *Connector
	req     backends.AttachRequest
	att     backends.Attachment
	changed bool
	refused error
	tries   int
	looked  time.Time // when the volume was last asked for

	client string // the key under which this call's client is noted
	made   block  // its device
}

// undo removes the device of a client that was made for nothing, as when this host was
// cut off meanwhile.
func (c *connecting) undo(ctx context.Context) error {
	if c.made.attachment == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	clean, err := c.b.storage.disconnect(ctx, c.made, c.b.pace)
	if err != nil || !clean {
		return err // its note stays: whoever comes next cuts it off first
	}
	return c.b.unnote(ctx, c.req.Ref, c.client)
}

// step looks at the volume, and does what is next.
func (c *connecting) step(ctx context.Context) (done bool, err error) {
	c.looked = time.Now()
	v, err := c.b.find(ctx, c.req.Ref)
	if err != nil {
		return false, err
	}
	if err := errors.Join(v.mayBe(c.req), v.cutOff(c.b.self.Node, c.req.Token)); err != nil {
		return false, err
	}
	atts, err := c.b.attached(ctx, v.id)
	if err != nil {
		return false, err
	}
	here, ok, err := c.present(ctx, v, atts)
	if !ok || err != nil {
		return false, err
	}
	for _, a := range atts {
		if done, err := c.judge(ctx, v, a, here); done || err != nil {
			return done, err
		}
	}
	if err := v.broken(); err != nil {
		return false, err
	}
	switch {
	case len(atts) > 0 || v.status != "available":
		return false, nil
	case c.tries >= 4 && c.refused != nil:
		return false, c.refused
	}
	return false, c.reserve(ctx, v)
}

// present says whether this host has a device that may be used. ok is false if something
// had to be cleared away first.
func (c *connecting) present(ctx context.Context, v *volume, atts []attachment) (here, ok bool, err error) {
	for _, other := range v.clients {
		if other.node != c.b.self.Node {
			return false, false, &backends.AttachedError{Volume: v.ID, Node: other.node, Token: other.token}
		}
	}
	d, here, err := c.b.device(ctx, v.id)
	if err != nil || here && d.attachment == "" {
		return here, true, err
	}
	if here {
		served, err := c.b.storage.served(d)
		switch {
		case d.token != c.req.Token:
			return false, false, &backends.AttachedError{Volume: v.ID, Node: c.b.self.Node, Token: d.token}
		case err != nil:
			return false, false, err
		case !served: // its program has died
			_, err := c.b.storage.disconnect(ctx, d, c.b.pace)
			return false, false, err
		case !slices.ContainsFunc(atts, func(a attachment) bool { return a.ID == d.attachment }), c.b.fences() && len(v.of(d.attachment)) == 0:
			return false, false, fmt.Errorf("this host was cut off from volume %s, and has still its device %s: %w", v.id, d.path, backends.ErrInUse)
		}
	}
	for _, old := range v.clients {
		if here && old.attachment == d.attachment {
			continue
		}
		// Of this host before it was started anew, or of a call that was cut short.
		if err := c.b.end(ctx, v.id, old, false); err != nil {
			return false, false, err
		}
		ok = true
	}
	return here, !ok, nil
}

// judge decides about an attachment that Cinder has.
func (c *connecting) judge(ctx context.Context, v *volume, a attachment, here bool) (done bool, err error) {
	h, ok := v.tokens[a.ID]
	switch {
	case !ok && a.Instance == "" && a.Status == "reserved":
		// Whoever made it notes its token before using it, or has died.
		if c.b.late(a.ID, c.looked) {
			return false, c.b.free(ctx, a.ID)
		}
		return false, nil
	case !ok:
		return false, v.attachedError(a.Instance)
	case h.node != c.b.self.Node && c.b.fences():
		return false, v.attachedError(a.ID)
	case h.node != c.b.self.Node:
		return false, fmt.Errorf("%w; if that host is off for good, type: cinder attachment-delete %s", v.attachedError(a.ID), a.ID)
	case here && h.token != c.req.Token:
		return false, v.attachedError(a.ID)
	case h.token != c.req.Token:
		// Of this host before it was started anew, or of a call that was cut short.
		return false, c.b.giveUp(ctx, v, a.ID)
	}
	c.changed = true
	return c.connect(ctx, v, a)
}

// reserve has Cinder make an attachment, which nobody can use before its token is noted.
func (c *connecting) reserve(ctx context.Context, v *volume) error {
	for _, k := range v.keys {
		if err := c.b.unnote(ctx, v.id, k.key); err != nil { // of attachments that are gone
			return err
		}
	}
	c.changed = true
	c.tries++
	var got struct {
		Attachment attachment `json:"attachment"`
	}
	// Another node that sees it without a token for so long takes it for left behind.
	bound := time.Now().Add(c.b.pace.orphan / 2)
	// gophercloud's own call would send an empty instance_uuid, which is not none.
	err := c.b.send(ctx, request{
		to: volumes, method: http.MethodPost, path: "attachments", into: &got,
		body: map[string]any{"attachment": map[string]any{"volume_uuid": v.id}},
	})
	switch {
	case is(err, http.StatusBadRequest, http.StatusConflict, http.StatusNotFound): // the volume's state: read it again
		c.refused = fmt.Errorf("%w: %w", err, backends.ErrUnavailable)
		return nil
	case unanswered(err) && ctx.Err() == nil:
		c.refused = err
		return nil
	case err != nil:
		return err
	}
	noting, cancel := context.WithDeadline(ctx, bound)
	defer cancel()
	err = c.b.note(noting, v.id, keyAttachment+got.Attachment.ID, fmt.Sprintf("%d %s", c.req.Token, c.b.self.Node))
	if err == nil {
		return nil
	}
	freeing, done := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer done()
	err = errors.Join(err, c.b.free(freeing, got.Attachment.ID))
	if unanswered(err) && ctx.Err() == nil && noting.Err() != nil {
		c.refused = err
		return nil // with a new one
	}
	return err
}

// connect makes the device of this call's attachment, and completes that.
func (c *connecting) connect(ctx context.Context, v *volume, a attachment) (done bool, err error) {
	var got struct {
		Attachment attachment `json:"attachment"`
	}
	if err := c.b.get(ctx, volumes, "attachments/"+a.ID, &got); err != nil {
		return false, again(err)
	}
	if text(got.Attachment.Info, "driver_volume_type") == "" { // it says other things before
		err := c.b.send(ctx, request{
			to: volumes, method: http.MethodPut, path: "attachments/" + a.ID, into: &got,
			body: map[string]any{"attachment": map[string]any{"connector": c.b.thisHost()}},
		})
		if err != nil {
			return false, again(err)
		}
	}
	if mode := text(got.Attachment.Info, "access_mode"); mode != "" && mode != "rw" {
		return false, fmt.Errorf("%s lets this host have volume %s only %q: %w", volumes, v.id, mode, backends.ErrInvalid)
	}
	if encrypted, _ := got.Attachment.Info["encrypted"].(bool); encrypted {
		return false, fmt.Errorf("volume %s is of an encrypted type, which only Nova can attach: use another volume_type: %w", v.id, backends.ErrInvalid)
	}
	d, err := c.b.storage.connect(ctx, connection{
		volume: v.id, attachment: a.ID, dataset: v.ID, token: c.req.Token, info: got.Attachment.Info,
		allow: func(address, image string) error {
			return c.allow(ctx, v, client{attachment: a.ID, holder: holder{c.b.self.Node, c.req.Token}, address: address, image: image})
		},
	})
	if err == nil && c.client != "" {
		c.made = d
	}
	if errors.Is(err, backends.ErrNotFound) {
		if _, gone := c.b.find(ctx, v.id); gone != nil {
			return false, gone
		}
		// As text alone: Cinder has the volume.
		err = fmt.Errorf("%s: %w", err.Error(), backends.ErrUnavailable)
	}
	if err != nil {
		return false, err
	}
	if got.Attachment.Status != "attached" {
		err := c.b.send(ctx, request{
			to: volumes, method: http.MethodPost, path: "attachments/" + a.ID + "/action", body: map[string]any{"os-complete": nil},
		})
		if err != nil {
			return false, again(err)
		}
	}
	if v.status != "in-use" {
		return false, nil
	}
	c.att = backends.Attachment{ID: a.ID, Ref: v.Ref, Volume: v.ID, Node: c.b.self.Node, Token: c.req.Token, Device: d.path}
	c.b.seen.add(d.life, c.att)
	return true, nil
}

// allow notes which client of the storage this connection is, and then looks whether it
// was cut off, or another is there. Who cuts it off, and who connects, notes that first
// and looks then; so one of two sees the other.
func (c *connecting) allow(ctx context.Context, v *volume, mine client) error {
	mine.key = fmt.Sprintf("%s%s_%s", keyClient, mine.attachment, hex.EncodeToString([]byte(mine.address)))
	if err := c.b.note(ctx, v.id, mine.key, mine.text()); err != nil {
		return err
	}
	err := c.allowed(ctx, v.id, mine)
	if err == nil {
		c.client = mine.key
	} else {
		// The client has had no device, so nothing can come of it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		err = errors.Join(err, c.b.unnote(ctx, v.id, mine.key))
	}
	return err
}

func (c *connecting) allowed(ctx context.Context, id string, mine client) error {
	v, err := c.b.find(ctx, id)
	if err != nil {
		return err
	}
	if err := v.cutOff(c.b.self.Node, c.req.Token); err != nil {
		return err
	}
	for _, other := range v.clients {
		if other.key != mine.key {
			return &backends.AttachedError{Volume: v.ID, Node: other.node, Token: other.token}
		}
	}
	atts, err := c.b.attached(ctx, id)
	if err == nil && !slices.ContainsFunc(atts, func(a attachment) bool { return a.ID == mine.attachment }) {
		err = fmt.Errorf("the attachment %s of volume %s was deleted by somebody else: %w", mine.attachment, id, backends.ErrInUse)
	}
	return err
}

// fences says that the storage can cut a client off.
func (b *Connector) fences() bool {
	_, ok := b.storage.(cutter)
	return ok
}

// end removes the note of a client, after having cut it off if it was not closed cleanly.
func (b *Connector) end(ctx context.Context, volume string, c client, clean bool) error {
	if !clean {
		storage, ok := b.storage.(cutter)
		if !ok {
			return fmt.Errorf("volume %s was attached to %s as %s, which this host is not set up to cut off: %w", volume, c.node, c.image, backends.ErrUnavailable)
		}
		if err := storage.cut(ctx, c); err != nil {
			return err
		}
	}
	return b.unnote(ctx, volume, c.key)
}

// again is nil for an answer after which the volume is looked at again: the attachment
// is gone, or somebody else is changing it.
func again(err error) error {
	if is(err, http.StatusNotFound, http.StatusConflict, http.StatusBadRequest) {
		return nil
	}
	return err
}

// thisHost is what Cinder is told of this host.
func (b *Connector) thisHost() map[string]any {
	name, _ := os.Hostname()
	host := map[string]any{
		"host": name, "os_type": "linux", "platform": runtime.GOARCH, "multipath": false, "do_local_attach": false,
		"mode": "rw", "mountpoint": "/dev/flocker",
	}
	if s, ok := b.storage.(connector); ok {
		maps.Copy(host, s.connector())
	}
	return host
}

// late says that something which somebody ought to complete is seen for too long. asked is
// when it was asked whether it is complete: the answer may be old.
func (b *cinder) late(id string, asked time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	since, seen := b.idle[id]
	switch {
	case !seen:
		b.idle[id] = time.Now()
	case asked.Sub(since) > b.pace.orphan:
		delete(b.idle, id)
		return true
	}
	return false
}

// free deletes an attachment.
func (b *cinder) free(ctx context.Context, id string) error {
	err := b.send(ctx, request{to: volumes, method: http.MethodDelete, path: "attachments/" + id})
	if is(err, http.StatusNotFound) {
		return nil
	}
	return err
}

// release deletes an attachment, sees it gone, and forgets its token.
func (b *cinder) release(ctx context.Context, volume, id string) error {
	if err := b.free(ctx, id); err != nil {
		return err
	}
	err := b.pace.Until(ctx, b.pace.settle, "attachment "+id+" is being deleted", func() (bool, error) {
		atts, err := b.attached(ctx, volume)
		return err == nil && !slices.ContainsFunc(atts, func(a attachment) bool { return a.ID == id }), err
	})
	if err != nil {
		return err
	}
	return b.unnote(ctx, volume, keyAttachment+id)
}

// Detach implements backends.Backend.
func (b *Connector) Detach(ctx context.Context, att backends.Attachment) error {
	if err := b.detach(ctx, att); err != nil {
		return fmt.Errorf("detach volume %s: %w", att.Volume, err)
	}
	return nil
}

func (b *Connector) detach(ctx context.Context, att backends.Attachment) error {
	if !uuidForm.MatchString(att.Ref) {
		return fmt.Errorf("%q is no reference to a Cinder volume: %w", att.Ref, backends.ErrInvalid)
	}
	unlock, err := b.locks.lock(ctx, att.Ref)
	if err != nil {
		return err
	}
	defer unlock()
	free, err := b.storage.lock(ctx, att.Ref)
	if err != nil {
		return err
	}
	defer free()
	v, err := b.look(ctx, att.Ref)
	if err != nil {
		return err
	}
	id, another := "", false
	if v != nil && v.Cluster != b.self.Cluster {
		v = nil
	}
	if v != nil {
		if v.ID != att.Volume {
			return fmt.Errorf("%s is volume %s: %w", v.id, v.ID, backends.ErrInvalid)
		}
		atts, err := b.attached(ctx, v.id)
		if err != nil {
			return err
		}
		for _, a := range atts {
			switch h := v.tokens[a.ID]; {
			case h.node == att.Node && h.token == att.Token:
				id = a.ID
			case h.node == b.self.Node:
				another = true
			}
		}
	}
	switch {
	case att.Node != b.self.Node && id != "" && b.fences():
		return fmt.Errorf("devices of %s can only be detached there: %w", att.Node, backends.ErrInvalid)
	case att.Node != b.self.Node && id != "":
		return fmt.Errorf("node %s has it attached, and only its host can detach it; if that is off for good, type: cinder attachment-delete %s: %w",
			att.Node, id, backends.ErrInvalid)
	case att.Node != b.self.Node:
		return nil
	}
	d, ok, err := b.device(ctx, att.Ref)
	switch {
	case err != nil:
		return err
	case ok && d.attachment == "" && another && id == "", ok && d.attachment != "" && d.token != att.Token:
		ok = false // another attachment has the device
	}
	clean := false
	if ok {
		if clean, err = b.storage.disconnect(ctx, d, b.pace); err != nil {
			return err
		}
	}
	if v == nil {
		return nil
	}
	if err := b.finish(ctx, v, att, id, clean, d.attachment); err != nil {
		b.seen.doubt()
		return err
	}
	return nil
}

// finish removes what is noted of an attachment of this node that has no device any more.
func (b *Connector) finish(ctx context.Context, v *volume, att backends.Attachment, id string, clean bool, closed string) error {
	for _, c := range v.clients {
		if c.node == att.Node && c.token == att.Token {
			if err := b.end(ctx, v.id, c, clean && c.attachment == closed); err != nil {
				return err
			}
		}
	}
	if id == "" {
		return nil
	}
	return b.giveUp(ctx, v, id)
}

// giveUp releases an attachment of this node that has no device, when nothing of it can arrive
// any more.
func (b *Connector) giveUp(ctx context.Context, v *volume, id string) error {
	if s, ok := b.storage.(settler); ok {
		var got struct {
			Attachment attachment `json:"attachment"`
		}
		err := b.get(ctx, volumes, "attachments/"+id, &got)
		if err == nil {
			err = s.settle(ctx, connection{volume: v.id, attachment: id, info: got.Attachment.Info})
		}
		if err != nil && !is(err, http.StatusNotFound) {
			return err
		}
	}
	return b.release(ctx, v.id, id)
}

// Attachments implements backends.Backend.
func (b *Connector) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	atts, err := b.attachments(ctx)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return atts, nil
}

func (b *Connector) attachments(ctx context.Context) ([]backends.Attachment, error) {
	if ctx.Err() != nil {
		return nil, backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
	}
	devices, err := b.storage.devices(ctx)
	if err != nil {
		return nil, err
	}
	var lives []string
	for _, d := range devices {
		lives = append(lives, d.life)
		if d.attachment != "" {
			b.seen.add(d.life, backends.Attachment{
				ID: d.attachment, Ref: d.volume, Volume: d.dataset, Node: b.self.Node, Token: d.token, Device: d.path,
			})
		}
	}
	return b.seen.attachments(lives, func(lives map[string]known) ([]backends.Attachment, bool, error) {
		return b.askAll(ctx, devices, lives)
	})
}

// askAll completes what is known of the devices, and returns the attachments of this
// node that have no device, such as those of before it was started anew.
func (b *Connector) askAll(ctx context.Context, devices []block, lives map[string]known) (bare []backends.Attachment, pending bool, err error) {
	all, err := b.list(ctx, keyCluster, b.self.Cluster)
	if err != nil {
		return nil, false, err
	}
	for _, v := range all {
		for _, c := range v.clients { // of attachments that Cinder has no more
			if c.node == b.self.Node && !slices.ContainsFunc(devices, func(d block) bool { return d.volume == v.id }) {
				bare, pending = append(bare, backends.Attachment{ID: c.attachment, Ref: v.Ref, Volume: v.ID, Node: c.node, Token: c.token}), true
			}
		}
		if !slices.ContainsFunc(v.keys, func(k tokenKey) bool { return k.node == b.self.Node }) {
			continue
		}
		atts, err := b.attached(ctx, v.id)
		if err != nil {
			return nil, false, err
		}
		for _, a := range atts {
			h := v.tokens[a.ID]
			if h.node != b.self.Node {
				continue
			}
			att := backends.Attachment{ID: a.ID, Ref: v.Ref, Volume: v.ID, Node: b.self.Node, Token: h.token}
			i := slices.IndexFunc(devices, func(d block) bool { return d.volume == v.id })
			if i < 0 {
				if !slices.Contains(bare, att) {
					bare = append(bare, att)
				}
				pending = true
				continue
			}
			if k := lives[devices[i].life]; !k.ours {
				att.Device = devices[i].path
				lives[devices[i].life] = known{true, att}
			}
		}
	}
	for _, d := range devices {
		if _, ok := lives[d.life]; !ok {
			lives[d.life] = known{} // none of this node's, now that all have been asked about
		}
	}
	return bare, pending, nil
}
