// Package teststore is the backend of the test storage, a network block storage
// that Flocker's tests run: a server that can cut a host off, and an initiator on
// each host that makes block devices (both are e2e/teststore). The released plugin
// does not have it.
//
// It can be of either class. Exclusive (F1): the server lets one host attach a
// volume at a time. Fenced (F2): it lets any number. In both, Fence has the server
// end what serves the host's data, wait for that end, and refuse the host from then
// on.
package teststore

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// Config is what a Store is made from.
type Config struct {
	// Fenced makes the class F2; otherwise it is F1. Each sees its own volumes only.
	Fenced bool
	// Socket is the unix socket of this host's initiator, which knows the server.
	Socket string
	// Node is the identity of this host.
	Node string
	// Cluster is the UUID of the Flocker cluster. Volumes of another one are not
	// seen. Empty: every volume is.
	Cluster string
	// Dial makes the connections to the server; nil is the usual way.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Store is the backend of one node.
type Store struct {
	cfg       Config
	initiator Peer
}

// New returns the backend of one node. It asks nobody yet.
func New(cfg Config) *Store { return &Store{cfg: cfg, initiator: Initiator(cfg.Socket)} }

// Unit is what sizes are rounded up to, and the smallest size. MaxSize is the
// largest, in bytes.
const (
	Unit    = int64(1 << 20)
	MaxSize = int64(1 << 40)
)

// Properties implements backends.Backend.
func (s *Store) Properties() backends.Properties {
	p := backends.Properties{
		Name: "teststore", Class: backends.ClassExclusive, ExclusiveAttach: true,
		AllocationUnit: Unit, MinSize: Unit, MaxSize: MaxSize,
	}
	if s.cfg.Fenced {
		p.Name, p.Class, p.ExclusiveAttach = "teststore-fenced", backends.ClassFenced, false
	}
	return p
}

// The references of the two classes begin differently, so that neither takes the
// other's volumes and devices for its own.
const (
	exclusivePrefix = "ts-"
	fencedPrefix    = "tf-"
)

func (s *Store) prefix() string {
	if s.cfg.Fenced {
		return fencedPrefix
	}
	return exclusivePrefix
}

// volume returns the dataset's UUID of a reference.
func (s *Store) volume(ref string) (string, error) {
	id, ok := strings.CutPrefix(ref, s.prefix())
	if parsed, err := uuid.Parse(id); !ok || err != nil || parsed.String() != id {
		return "", fmt.Errorf("volume reference %q is not of the backend %s: %w", ref, s.Properties().Name, backends.ErrInvalid)
	}
	return id, nil
}

// server asks the server, whose address the initiator knows.
func (s *Store) server(ctx context.Context, op string, req Request) (Reply, error) {
	self, err := s.initiator.Call(ctx, OpIdentity, Request{})
	if err != nil {
		return Reply{}, err
	}
	req.Caller = self.Identity
	if op == OpAttach {
		req.Initiator = self.Identity
	}
	if op != OpCreate {
		req.Cluster = s.cfg.Cluster
	}
	return Server(self.Server, s.cfg.Dial).Call(ctx, op, req)
}

// Identity implements backends.Identifier: the name of this host's initiator.
func (s *Store) Identity(ctx context.Context) (string, error) {
	self, err := s.initiator.Call(ctx, OpIdentity, Request{})
	return self.Identity, wrap("ask for the name of the initiator", err)
}

// Create implements backends.Backend.
func (s *Store) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	vol, err := s.create(ctx, req)
	return vol, wrap("create volume "+req.Name, err)
}

func (s *Store) create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	switch _, err := s.volume(s.prefix() + req.ID); {
	case err != nil:
		return backends.Volume{}, err
	case req.Size <= 0 || req.Size > MaxSize:
		return backends.Volume{}, fmt.Errorf("no volume can have %d bytes: %w", req.Size, backends.ErrInvalid)
	case s.cfg.Cluster != "" && req.Cluster != s.cfg.Cluster:
		return backends.Volume{}, fmt.Errorf("cluster %s is not this one: %w", req.Cluster, backends.ErrInvalid)
	}
	reply, err := s.server(ctx, OpCreate, Request{
		Ref: s.prefix() + req.ID, Volume: req.ID, Cluster: req.Cluster, Name: req.Name,
		Size: req.Size, Exclusive: !s.cfg.Fenced,
	})
	if err != nil {
		return backends.Volume{}, err
	}
	return reply.Volumes[0].backend(), nil
}

func (v Volume) backend() backends.Volume {
	return backends.Volume{Ref: v.Ref, ID: v.ID, Cluster: v.Cluster, Name: v.Name, Size: v.Size}
}

// Delete implements backends.Backend.
func (s *Store) Delete(ctx context.Context, ref string) error {
	_, err := s.volume(ref)
	if err == nil {
		_, err = s.server(ctx, OpDelete, Request{Ref: ref})
	}
	return wrap("delete volume", err)
}

// Get implements backends.Backend.
func (s *Store) Get(ctx context.Context, ref string) (backends.Volume, error) {
	vol, err := s.get(ctx, ref)
	return vol, wrap("get volume", err)
}

func (s *Store) get(ctx context.Context, ref string) (backends.Volume, error) {
	if _, err := s.volume(ref); err != nil {
		return backends.Volume{}, err
	}
	reply, err := s.server(ctx, OpGet, Request{Ref: ref})
	if err != nil {
		return backends.Volume{}, err
	}
	return reply.Volumes[0].backend(), nil
}

// List implements backends.Backend.
func (s *Store) List(ctx context.Context) ([]backends.Volume, error) {
	reply, err := s.server(ctx, OpList, Request{})
	if err != nil {
		return nil, wrap("list volumes", err)
	}
	var vols []backends.Volume
	for _, vol := range reply.Volumes {
		if strings.HasPrefix(vol.Ref, s.prefix()) {
			vols = append(vols, vol.backend())
		}
	}
	return vols, nil
}

// Attach implements backends.Backend.
func (s *Store) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := s.attach(ctx, req)
	return att, wrap("attach volume", err)
}

func (s *Store) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	id, err := s.volume(req.Ref)
	if err != nil {
		return backends.Attachment{}, err
	}
	if id != req.Volume || req.Token < 0 {
		return backends.Attachment{}, fmt.Errorf("%s is not volume %s, or token %d is negative: %w", req.Ref, req.Volume, req.Token, backends.ErrInvalid)
	}
	// A device that has been cut off and is still open stays in the way: two devices
	// of one volume on one host are asking for trouble.
	reply, err := s.initiator.Call(ctx, OpDevices, Request{})
	if err != nil {
		return backends.Attachment{}, err
	}
	for _, d := range reply.Devices {
		if d.Ref == req.Ref && d.Token != req.Token {
			return backends.Attachment{}, &backends.AttachedError{Volume: id, Node: s.cfg.Node, Token: d.Token}
		}
	}
	if reply, err = s.server(ctx, OpAttach, Request{Ref: req.Ref, Node: s.cfg.Node, Token: req.Token}); err != nil {
		return backends.Attachment{}, err
	}
	if reply, err = s.initiator.Call(ctx, OpConnect, Request{Grants: reply.Grants}); err != nil {
		return backends.Attachment{}, err
	}
	return s.attachment(reply.Devices[0]), nil
}

func (s *Store) attachment(d Device) backends.Attachment {
	return backends.Attachment{
		ID: d.Grant, Ref: d.Ref, Volume: strings.TrimPrefix(d.Ref, s.prefix()),
		Node: s.cfg.Node, Token: d.Token, Device: d.Path,
	}
}

// Detach implements backends.Backend. From another host it ends what serves the
// data, as Fence does, and leaves a dead device there.
func (s *Store) Detach(ctx context.Context, att backends.Attachment) error {
	if id, err := s.volume(att.Ref); err != nil || id != att.Volume {
		return fmt.Errorf("detach volume %s: %q is not its reference: %w", att.Volume, att.Ref, backends.ErrInvalid)
	}
	req := Request{Ref: att.Ref, Node: att.Node, Token: att.Token, Grant: att.ID}
	var err error
	if att.Node == s.cfg.Node {
		_, err = s.initiator.Call(ctx, OpDisconnect, req)
	} else {
		_, err = s.server(ctx, OpDetach, req)
	}
	return wrap("detach volume "+att.Volume, err)
}

// Attachments implements backends.Backend: the devices of this host's kernel. One
// whose host has been cut off is there until nobody has it open.
func (s *Store) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	reply, err := s.initiator.Call(ctx, OpDevices, Request{})
	if err != nil {
		return nil, wrap("list attachments", err)
	}
	var atts []backends.Attachment
	for _, d := range reply.Devices {
		if strings.HasPrefix(d.Ref, s.prefix()) {
			atts = append(atts, s.attachment(d))
		}
	}
	return atts, nil
}

// Resize implements backends.Resizer. A device on another host has the new size
// within some seconds.
func (s *Store) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	size, err := s.resize(ctx, ref, size)
	return size, wrap("resize volume", err)
}

func (s *Store) resize(ctx context.Context, ref string, size int64) (int64, error) {
	if size < 0 || size > MaxSize {
		return 0, fmt.Errorf("no volume can have %d bytes: %w", size, backends.ErrInvalid)
	}
	if _, err := s.volume(ref); err != nil {
		return 0, err
	}
	reply, err := s.server(ctx, OpResize, Request{Ref: ref, Size: size})
	if err != nil {
		return 0, err
	}
	if _, err := s.initiator.Call(ctx, OpDevices, Request{}); err != nil {
		return 0, err
	}
	return reply.Volumes[0].Size, nil
}

// Fence implements backends.Fencer. It asks the server alone.
func (s *Store) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	if id, err := s.volume(req.Ref); err != nil || id != req.Volume {
		return "", fmt.Errorf("fence volume %s: %q is not its reference: %w", req.Volume, req.Ref, backends.ErrInvalid)
	}
	reply, err := s.server(ctx, OpFence, Request{Ref: req.Ref, Initiator: req.Identity, Token: req.Token})
	return reply.Evidence, wrap("cut "+req.Node+" off from volume "+req.Volume, err)
}

// wrap says what was tried, if it failed.
func wrap(what string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", what, err)
	}
	return err
}
