// Package csitest is a CSI driver for tests: strict, and on request slow, lossy and
// ambiguous. It serves real sockets, its volumes are files, and its devices are loop
// devices, so it needs root. It is no part of the plugin.
//
// Strict: whatever the CSI specification lets a driver refuse it refuses, what it lets
// it tell once it tells once, and it takes note of calls in an order that the
// specification forbids (Violations).
package csitest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Name is what the driver says it is.
const Name = "strict.csitest.flocker"

// Options say what kind of driver it is.
type Options struct {
	// Publish: it has ControllerPublishVolume, and publishes to one node at a time.
	Publish bool
	// Cuts: unpublishing a volume at the controller cuts what the node has open, too.
	Cuts bool
	// Stage: it has NodeStageVolume, which makes the device.
	Stage bool
	// Shown: it tells to which nodes a volume is published.
	Shown bool
	// GetVolume and ListVolumes: it has these calls.
	GetVolume, ListVolumes bool
	// Offline: it grows no volume that is published. Otherwise a node must be told.
	Offline bool
	// Lazy: the devices of a volume that has grown are as small as before until a node
	// was told.
	Lazy bool
	// NoExpand: it grows nothing.
	NoExpand bool
	// Forgetful: it makes another volume each time it is asked for one.
	Forgetful bool
	// Mknod: the device at the target path is a node of its own, not a bind mount.
	Mknod bool
	// MountOnly: it puts a directory at the target path whatever is asked for.
	MountOnly bool
	// Unit is what sizes are rounded up to; 0 is 1 MiB.
	Unit int64
	// MaxVolumes is how many volumes a node may have; 0 is any number. Untold: the node
	// does not say so beforehand.
	MaxVolumes int64
	Untold     bool
	// Zones gives the topology of each node; nil: there is none.
	Zones map[string]string
	// Secrets are demanded in every call that takes some.
	Secrets map[string]string
	// Page is how many volumes are listed at a time; 0 is 100.
	Page int
	// Elsewhere are the nodes that have a mount namespace of their own.
	Elsewhere map[string]Elsewhere
}

// Elsewhere is a node with another mount namespace than the driver's, by the same /dev.
type Elsewhere struct {
	// Socket is where the driver serves the node.
	Socket string
	// Path is where a path of the node is to be found here.
	Path func(path string) string
	// Run runs a command in the node's namespace.
	Run func(args ...string) error
}

// Fault is what happens to one call.
type Fault struct {
	// Delay passes before the call is looked at.
	Delay time.Duration
	// Before is answered instead of doing anything; After instead of the true answer.
	Before, After codes.Code
	// Hang: there is no answer, before anything was done, or after.
	Hang, HangAfter bool
	// Late: the caller is told DEADLINE_EXCEEDED, and the call, under way meanwhile, is
	// done this much later.
	Late time.Duration
	// Queued: the caller is told DEADLINE_EXCEEDED, and the storage does it when this is
	// closed, whatever else it has done meanwhile.
	Queued <-chan struct{}
	// Half: the connection ends in the middle of the answer.
	Half bool
}

// Call is one call, as Inject's function sees it.
type Call struct {
	Method string // such as NodeStageVolume
	Node   string // the node whose socket it came to
}

// Driver is the storage system, and the driver on each node.
type Driver struct {
	opts Options
	dir  string

	mu         sync.Mutex
	volumes    map[string]*volume // by id
	busy       map[string]bool    // volumes and names with a call under way
	nodes      map[string]*node
	inject     func(Call) Fault
	calls      map[string]int
	spent      time.Duration
	violations []string
	ignored    map[string]bool // methods
	down       bool
	late       sync.WaitGroup
}

type volume struct {
	id, name   string
	size       int64
	shown      int64 // the devices' size, if Lazy
	context    map[string]string
	parameters map[string]string
	zone       string
	published  map[string]map[string]string // by node: its publish_context
	staged     map[string]*staged           // by node
}

// staged is a volume's device on a node.
type staged struct {
	path    string // the staging directory; empty without staging
	loop    *loop
	targets map[string]bool
}

type node struct {
	name   string
	server *grpc.Server
	socket string
	halve  atomic.Bool // what is sent next
}

// halves is a node's listener, and its connections.
type (
	halves struct {
		net.Listener
		node *node
	}
	half struct {
		net.Conn
		node *node
	}
)

func (h halves) Accept() (net.Conn, error) {
	conn, err := h.Listener.Accept()
	return half{conn, h.node}, err
}

func (h half) Write(p []byte) (int, error) {
	if !h.node.halve.CompareAndSwap(true, false) {
		return h.Conn.Write(p)
	}
	n, err := h.Conn.Write(p[:len(p)/2])
	return n, errors.Join(err, h.Close(), net.ErrClosed)
}

// New returns a driver that keeps its volumes and sockets in a directory, which must
// have a short name.
func New(dir string, opts Options) *Driver {
	if opts.Unit == 0 {
		opts.Unit = 1 << 20
	}
	if opts.Page == 0 {
		opts.Page = 100
	}
	return &Driver{
		opts: opts, dir: dir, volumes: map[string]*volume{}, busy: map[string]bool{},
		nodes: map[string]*node{}, calls: map[string]int{}, ignored: map[string]bool{},
	}
}

// Inject makes every call ask f what is to happen to it.
func (d *Driver) Inject(f func(Call) Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.inject = f
}

// Ignore makes a method answer that all is well, and do nothing.
func (d *Driver) Ignore(method string, ignore bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ignored[method] = ignore
}

// Settle waits for all calls that come late.
func (d *Driver) Settle() { d.late.Wait() }

// Calls returns how often each method was called, and forgets it.
func (d *Driver) Calls() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = map[string]int{}
	return calls
}

// Spent returns how long the driver has worked on calls since it was asked last.
func (d *Driver) Spent() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	spent := d.spent
	d.spent = 0
	return spent
}

// Violations lists what the specification forbids a caller to do, and one did.
func (d *Driver) Violations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.violations)
}

func (d *Driver) violation(format string, args ...any) {
	d.violations = append(d.violations, fmt.Sprintf(format, args...))
}

// Volumes returns how many volumes there are, and how many of them are published
// somewhere or have a device.
func (d *Driver) Volumes() (all, used int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.volumes {
		if len(v.published) > 0 || len(v.staged) > 0 {
			used++
		}
	}
	return len(d.volumes), used
}

// Published returns the nodes to which a volume is published, of which the name ends in
// this text, sorted.
func (d *Driver) Published(name string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.volumes {
		if strings.HasSuffix(v.name, name) {
			return slices.Sorted(maps.Keys(v.published))
		}
	}
	return nil
}

// Node starts the driver on a node, if it does not run, and returns its endpoint.
func (d *Driver) Node(name string) (endpoint string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[name]
	if n == nil {
		n = &node{name: name, socket: filepath.Join(d.dir, fmt.Sprintf("%d.sock", len(d.nodes)))}
		if e, ok := d.opts.Elsewhere[name]; ok {
			n.socket = e.Socket
		}
		d.nodes[name] = n
	}
	if n.server == nil && !d.down {
		err = d.serve(n)
	}
	return "unix://" + n.socket, err
}

func (d *Driver) serve(n *node) error {
	_ = os.Remove(n.socket)
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", n.socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		return d.intercept(ctx, n, req, info.FullMethod, handler)
	}))
	sv := &service{d: d, node: n.name}
	csi.RegisterIdentityServer(s, sv)
	csi.RegisterControllerServer(s, sv)
	csi.RegisterNodeServer(s, sv)
	n.server = s
	go func() { _ = s.Serve(halves{l, n}) }() // until Stop
	return nil
}

// Down stops all of the driver's processes, or starts them again. Devices work on.
func (d *Driver) Down(down bool) error {
	d.mu.Lock()
	d.down = down
	var stop []*grpc.Server
	var err error
	for _, n := range d.nodes {
		if down && n.server != nil {
			stop = append(stop, n.server)
			n.server = nil
		}
		if !down && n.server == nil {
			err = errors.Join(err, d.serve(n))
		}
	}
	d.mu.Unlock()
	for _, s := range stop {
		s.Stop()
	}
	return err
}

// Close ends the driver, its devices included.
func (d *Driver) Close() error {
	err := d.Down(true)
	d.late.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.volumes {
		for node, s := range v.staged {
			for target := range s.targets {
				err = errors.Join(err, d.unplace(node, target))
			}
			err = errors.Join(err, s.loop.clear())
		}
		err = errors.Join(err, os.Remove(d.file(v.id)))
	}
	for _, n := range d.nodes {
		_ = os.Remove(n.socket) // the server has, mostly
	}
	return err
}

func (d *Driver) file(id string) string { return filepath.Join(d.dir, id+".img") }

// intercept counts a call and does to it what the test wants.
func (d *Driver) intercept(ctx context.Context, n *node, req any, full string, handler grpc.UnaryHandler) (any, error) {
	method := full[strings.LastIndex(full, "/")+1:]
	d.mu.Lock()
	d.calls[method]++
	inject, ignored := d.inject, d.ignored[method]
	d.mu.Unlock()
	if ignored {
		return &csi.ControllerUnpublishVolumeResponse{}, nil // as empty as any
	}
	var fault Fault
	if inject != nil {
		fault = inject(Call{Method: method, Node: n.name})
	}
	if fault.Delay > 0 {
		select {
		case <-time.After(fault.Delay):
		case <-ctx.Done():
		}
	}
	if fault.Hang {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if fault.Before != codes.OK {
		return nil, status.Errorf(fault.Before, "%s was not done, by wish of the test", method)
	}
	if fault.Late > 0 {
		begun := make(chan struct{})
		d.late.Go(func() {
			_, _ = d.handle(context.WithoutCancel(ctx), req, func(ctx context.Context, req any) (any, error) {
				close(begun)
				time.Sleep(fault.Late)
				return handler(ctx, req)
			})
		})
		select {
		case <-begun:
		case <-time.After(time.Millisecond): // refused: another call is under way
		}
		return nil, status.Errorf(codes.DeadlineExceeded, "%s takes long, by wish of the test", method)
	}
	if fault.Queued != nil {
		d.late.Go(func() {
			<-fault.Queued
			_, _ = handler(context.WithoutCancel(ctx), req)
		})
		return nil, status.Errorf(codes.DeadlineExceeded, "%s is left to the storage, by wish of the test", method)
	}
	// A driver does not notice that its caller has gone.
	started := time.Now()
	reply, err := d.handle(context.WithoutCancel(ctx), req, handler)
	d.mu.Lock()
	d.spent += time.Since(started)
	d.mu.Unlock()
	if fault.HangAfter {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	n.halve.Store(fault.Half)
	if fault.After != codes.OK {
		return nil, status.Errorf(fault.After, "%s was done, by wish of the test", method)
	}
	return reply, err
}

// handle refuses a second call about a volume while one is under way.
func (d *Driver) handle(ctx context.Context, req any, handler grpc.UnaryHandler) (any, error) {
	key := ""
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		key = r.GetVolumeId()
	}
	if r, ok := req.(*csi.CreateVolumeRequest); ok {
		key = r.GetName()
	}
	if r, ok := req.(interface{ GetNodeId() string }); ok { // publications to two nodes are two
		key += " " + r.GetNodeId()
	}
	if key == "" {
		return handler(ctx, req)
	}
	d.mu.Lock()
	if d.busy[key] {
		d.mu.Unlock()
		return nil, status.Errorf(codes.Aborted, "an operation on %s is pending", key)
	}
	d.busy[key] = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, key)
	}()
	return handler(ctx, req)
}

// service is the driver's services on one node.
type service struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	d    *Driver
	node string
}

// NodeID is the driver's name for a node.
func NodeID(node string) string { return "id-of-" + node }

func (s *service) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: Name, VendorVersion: "1"}, nil
}

func (s *service) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	r := &csi.GetPluginCapabilitiesResponse{}
	add := func(t csi.PluginCapability_Service_Type) {
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{
			Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: t}},
		})
	}
	add(csi.PluginCapability_Service_CONTROLLER_SERVICE)
	if s.d.opts.Zones != nil {
		add(csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS)
	}
	if !s.d.opts.NoExpand {
		t := csi.PluginCapability_VolumeExpansion_ONLINE
		if s.d.opts.Offline {
			t = csi.PluginCapability_VolumeExpansion_OFFLINE
		}
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{
			Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: t}},
		})
	}
	return r, nil
}

func (s *service) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (s *service) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	o := s.d.opts
	r := &csi.ControllerGetCapabilitiesResponse{}
	for t, has := range map[csi.ControllerServiceCapability_RPC_Type]bool{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME:         true,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME:     o.Publish,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES:                 o.ListVolumes,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES: o.Shown,
		csi.ControllerServiceCapability_RPC_GET_VOLUME:                   o.GetVolume,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME:                !o.NoExpand,
	} {
		if has {
			r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{
				Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
			})
		}
	}
	return r, nil
}

func (s *service) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for t, has := range map[csi.NodeServiceCapability_RPC_Type]bool{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME: s.d.opts.Stage,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME:        !s.d.opts.NoExpand && !s.d.opts.Offline,
	} {
		if has {
			r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{
				Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
			})
		}
	}
	return r, nil
}

func (s *service) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	r := &csi.NodeGetInfoResponse{NodeId: NodeID(s.node)}
	if !s.d.opts.Untold {
		r.MaxVolumesPerNode = s.d.opts.MaxVolumes
	}
	if zone, ok := s.d.opts.Zones[s.node]; ok {
		r.AccessibleTopology = topology(zone)
	}
	return r, nil
}

func topology(zone string) *csi.Topology {
	return &csi.Topology{Segments: map[string]string{"csitest.flocker/zone": zone}}
}

// invalid is INVALID_ARGUMENT.
func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func missing(id string) error { return status.Errorf(codes.NotFound, "there is no volume %s", id) }

func (d *Driver) checkSecrets(got map[string]string) error {
	if len(d.opts.Secrets) > 0 && !maps.Equal(got, d.opts.Secrets) {
		// As careless drivers do.
		return status.Errorf(codes.Unauthenticated, "the secrets %v are wrong", got)
	}
	return nil
}

func (d *Driver) checkCapability(c *csi.VolumeCapability) error {
	switch {
	case c.GetAccessMode() == nil || (c.GetBlock() == nil && c.GetMount() == nil):
		return invalid("a volume capability is missing")
	case c.GetMount() != nil && !d.opts.MountOnly:
		return invalid("there are block volumes only")
	case c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:
		return invalid("a volume is for one writer on one node")
	}
	return nil
}

// find needs d.mu.
func (d *Driver) find(id string) (*volume, error) {
	if id == "" {
		return nil, invalid("the volume id is missing")
	}
	v := d.volumes[id]
	if v == nil {
		return nil, missing(id)
	}
	return v, nil
}

// findWith is find, for a call that has to come with the volume's context. csi-sanity
// leaves it out.
func (d *Driver) findWith(id string, context map[string]string) (*volume, error) {
	v, err := d.find(id)
	switch {
	case err != nil:
		return nil, err
	case context == nil:
		d.violation("a call about volume %s came without its context", v.name)
	case !maps.Equal(context, v.context):
		return nil, invalid("the volume context of %s is another one", id)
	}
	return v, nil
}

func (s *service) CreateVolume(_ context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case req.GetName() == "":
		return nil, invalid("the name is missing")
	case len(req.GetName()) > 128:
		return nil, invalid("the name has more than 128 bytes")
	case len(req.GetVolumeCapabilities()) == 0:
		return nil, invalid("the volume capabilities are missing")
	case d.opts.Zones == nil && req.GetAccessibilityRequirements() != nil:
		return nil, invalid("there is no topology")
	}
	for _, c := range req.GetVolumeCapabilities() {
		if err := d.checkCapability(c); err != nil {
			return nil, err
		}
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	for key, value := range req.GetParameters() {
		if key != "class" || (value != "gold" && value != "silver") {
			return nil, invalid("parameter %s=%s is not known", key, value)
		}
	}
	size := max(req.GetCapacityRange().GetRequiredBytes(), 1)
	size = (size + d.opts.Unit - 1) / d.opts.Unit * d.opts.Unit
	limit := req.GetCapacityRange().GetLimitBytes()
	if limit > 0 && size > limit || size > 1<<40 {
		return nil, status.Errorf(codes.OutOfRange, "no volume can have %d bytes", size)
	}
	zone := ""
	for _, t := range append(req.GetAccessibilityRequirements().GetPreferred(), req.GetAccessibilityRequirements().GetRequisite()...) {
		if zone == "" {
			zone = t.GetSegments()["csitest.flocker/zone"]
		}
	}
	for _, v := range d.volumes {
		if v.name != req.GetName() || d.opts.Forgetful {
			continue
		}
		if v.size < size || (limit > 0 && v.size > limit) || !maps.Equal(v.parameters, req.GetParameters()) || v.zone != zone {
			return nil, status.Errorf(codes.AlreadyExists, "there is a volume %s, and it is another one", v.name)
		}
		return &csi.CreateVolumeResponse{Volume: d.describe(v)}, nil
	}
	v := &volume{
		id: "vol-" + strings.ReplaceAll(uuid.NewString(), "-", ""), name: req.GetName(), size: size, shown: size, zone: zone,
		parameters: req.GetParameters(), published: map[string]map[string]string{}, staged: map[string]*staged{},
	}
	v.context = map[string]string{"key": uuid.NewString(), "odd": "a=b, \"c\"\tö"}
	if err := grow(d.file(v.id), size); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	d.volumes[v.id] = v
	return &csi.CreateVolumeResponse{Volume: d.describe(v)}, nil
}

func (d *Driver) describe(v *volume) *csi.Volume {
	is := &csi.Volume{VolumeId: v.id, CapacityBytes: v.size, VolumeContext: v.context}
	if v.zone != "" {
		is.AccessibleTopology = []*csi.Topology{topology(v.zone)}
	}
	return is
}

func (s *service) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	v := d.volumes[req.GetVolumeId()]
	if v == nil {
		return &csi.DeleteVolumeResponse{}, nil
	}
	if len(v.published) > 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "the volume is published to %v", slices.Sorted(maps.Keys(v.published)))
	}
	if !d.opts.Publish && len(v.staged) > 0 {
		return nil, status.Error(codes.FailedPrecondition, "the volume is in use")
	}
	if err := os.Remove(d.file(v.id)); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	for node, st := range v.staged { // cut off, and left
		if err := st.loop.clear(); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		for target := range st.targets {
			_ = d.unplace(node, target) // its node will be told that there is no such volume
		}
	}
	delete(d.volumes, v.id)
	return &csi.DeleteVolumeResponse{}, nil
}

func (s *service) ControllerPublishVolume(_ context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case req.GetVolumeId() == "" || req.GetNodeId() == "":
		return nil, invalid("the volume id or the node id is missing")
	case req.GetReadonly():
		return nil, invalid("volumes cannot be published for reading only")
	}
	if err := d.checkCapability(req.GetVolumeCapability()); err != nil {
		return nil, err
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	v, err := d.findWith(req.GetVolumeId(), req.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	name, ok := strings.CutPrefix(req.GetNodeId(), NodeID(""))
	if !ok || d.nodes[name] == nil {
		return nil, status.Errorf(codes.NotFound, "there is no node %s", req.GetNodeId())
	}
	if zone, ok := d.opts.Zones[name]; ok && v.zone != "" && v.zone != zone {
		return nil, invalid("volume %s is in %s", v.id, v.zone)
	}
	if context, ok := v.published[req.GetNodeId()]; ok {
		return &csi.ControllerPublishVolumeResponse{PublishContext: context}, nil
	}
	for other := range v.published {
		return nil, status.Errorf(codes.FailedPrecondition, "the volume is published to %s", other)
	}
	count := int64(0)
	for _, v := range d.volumes {
		if _, ok := v.published[req.GetNodeId()]; ok {
			count++
		}
	}
	if d.opts.MaxVolumes > 0 && count >= d.opts.MaxVolumes {
		return nil, status.Errorf(codes.ResourceExhausted, "%s has %d volumes", req.GetNodeId(), count)
	}
	// Never the same twice, and the same as long as it is published.
	v.published[req.GetNodeId()] = map[string]string{"publication": uuid.NewString()}
	return &csi.ControllerPublishVolumeResponse{PublishContext: v.published[req.GetNodeId()]}, nil
}

func (s *service) ControllerUnpublishVolume(_ context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	v := d.volumes[req.GetVolumeId()]
	if v == nil {
		return &csi.ControllerUnpublishVolumeResponse{}, nil
	}
	for id := range v.published {
		if req.GetNodeId() != "" && id != req.GetNodeId() {
			continue
		}
		node := strings.TrimPrefix(id, NodeID(""))
		if st := v.staged[node]; st != nil {
			if !d.opts.Cuts {
				d.violation("volume %s was unpublished from %s at the controller, and has a device there", v.name, node)
				return nil, status.Error(codes.FailedPrecondition, "the volume has a device on the node")
			}
			if err := st.loop.cut(); err != nil {
				return nil, status.Error(codes.Internal, err.Error())
			}
		}
		delete(v.published, id)
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (s *service) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("the volume id or the volume capabilities are missing")
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	if _, err := d.find(req.GetVolumeId()); err != nil {
		return nil, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		if err := d.checkCapability(c); err != nil {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
		}
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeCapabilities: req.GetVolumeCapabilities(), VolumeContext: req.GetVolumeContext(),
	}}, nil
}

func (s *service) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	d := s.d
	if !d.opts.ListVolumes {
		return nil, status.Error(codes.Unimplemented, "there is no list")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ids := slices.Sorted(maps.Keys(d.volumes))
	begin := 0
	if token := req.GetStartingToken(); token != "" {
		var err error
		if begin, err = strconv.Atoi(token); err != nil || begin < 0 || begin > len(ids) {
			return nil, status.Errorf(codes.Aborted, "token %q is stale", token)
		}
	}
	page := d.opts.Page
	if n := int(req.GetMaxEntries()); n > 0 {
		page = min(page, n)
	}
	r := &csi.ListVolumesResponse{}
	for _, id := range ids[begin:min(begin+page, len(ids))] {
		v := d.volumes[id]
		e := &csi.ListVolumesResponse_Entry{Volume: d.describe(v)}
		if d.opts.Shown {
			e.Status = &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: slices.Sorted(maps.Keys(v.published))}
		}
		r.Entries = append(r.Entries, e)
	}
	if begin+page < len(ids) {
		r.NextToken = strconv.Itoa(begin + page)
	}
	return r, nil
}

func (s *service) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	d := s.d
	if !d.opts.GetVolume {
		return nil, status.Error(codes.Unimplemented, "volumes cannot be looked at")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.find(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	r := &csi.ControllerGetVolumeResponse{Volume: d.describe(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}
	if d.opts.Shown {
		r.Status.PublishedNodeIds = slices.Sorted(maps.Keys(v.published))
	}
	return r, nil
}

func (s *service) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	d := s.d
	if d.opts.NoExpand {
		return nil, status.Error(codes.Unimplemented, "volumes do not grow")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetCapacityRange() == nil {
		return nil, invalid("the capacity range is missing")
	}
	if err := d.checkSecrets(req.GetSecrets()); err != nil {
		return nil, err
	}
	v, err := d.find(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	size := (req.GetCapacityRange().GetRequiredBytes() + d.opts.Unit - 1) / d.opts.Unit * d.opts.Unit
	if limit := req.GetCapacityRange().GetLimitBytes(); (limit > 0 && size > limit) || size > 1<<40 {
		return nil, status.Errorf(codes.OutOfRange, "no volume can have %d bytes", size)
	}
	if size > v.size {
		if d.opts.Offline && (len(v.published) > 0 || len(v.staged) > 0) {
			return nil, status.Error(codes.FailedPrecondition, "the volume is published")
		}
		if err := grow(d.file(v.id), size); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		v.size = size
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.size, NodeExpansionRequired: !d.opts.Offline}, nil
}

func grow(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// Forget removes all volumes, which must not be in use.
func (d *Driver) Forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id := range d.volumes {
		_ = os.Remove(d.file(id))
		delete(d.volumes, id)
	}
}
