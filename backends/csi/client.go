package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/flocker-plugin/flocker/backends"
)

// client talks to one driver.
type client struct {
	cfg              Config
	controller, node *peer

	mu    sync.Mutex
	facts *facts
	asked time.Time
}

// peer is one socket of the driver.
type peer struct {
	endpoint string
	conn     *grpc.ClientConn
	refused  atomic.Pointer[error] // why the last try to connect failed; nil: it did not
}

// facts are what a driver says about itself.
type facts struct {
	name       string
	plugin     map[csi.PluginCapability_Service_Type]bool
	expansion  map[csi.PluginCapability_VolumeExpansion_Type]bool
	controller map[csi.ControllerServiceCapability_RPC_Type]bool
	node       map[csi.NodeServiceCapability_RPC_Type]bool
	self       *csi.NodeGetInfoResponse // nil: the driver has no name for a node
}

// factsAge is after which time a driver is asked about itself again: it may have been
// upgraded.
const factsAge = time.Minute

// socket returns the path of an endpoint, empty if it is none.
func socket(endpoint string) string {
	path := strings.TrimPrefix(endpoint, "unix://")
	if !filepath.IsAbs(path) {
		return ""
	}
	return path
}

func newClient(cfg Config) (*client, error) {
	c := &client{cfg: cfg}
	var err error
	if c.controller, err = newPeer(cfg.Controller); err != nil {
		return nil, err
	}
	if c.node = c.controller; cfg.Node != cfg.Controller {
		c.node, err = newPeer(cfg.Node)
	}
	return c, err
}

func newPeer(endpoint string) (*peer, error) {
	path := socket(endpoint)
	p := &peer{endpoint: endpoint}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err != nil {
			p.refused.Store(&err)
		} else {
			p.refused.Store(nil)
		}
		return conn, err
	}
	conn, err := grpc.NewClient("passthrough:///csi",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket of this host
		grpc.WithContextDialer(dial),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDisableRetry()) // what is asked again is decided here
	if err != nil {
		return nil, fmt.Errorf("%s: %w", endpoint, err)
	}
	p.conn = conn
	return p, nil
}

func (c *client) close() error {
	err := c.controller.conn.Close()
	if c.node != c.controller {
		err = errors.Join(err, c.node.conn.Close())
	}
	return err
}

// method is one of CSI's calls, as the generated clients have them.
type method[Q, R any] func(ctx context.Context, req Q, opts ...grpc.CallOption) (R, error)

// dialPatience is how long a driver is given to come back when it was not asked
// anything yet, such as while it is being upgraded. Callers have patience of their own.
const dialPatience = 300 * time.Millisecond

// call asks a driver until the answer is definite or ctx ends. A call that was not
// answered is in progress, not failed: the same call is made again, which goes on with
// it or tells how it ended (the CSI specification, "Timeouts").
func call[Q, R any](ctx context.Context, c *client, p *peer, name string, m method[Q, R], req Q) (R, error) {
	reply, _, err := insist(ctx, c, p, name, m, req)
	return reply, err
}

// insist is call. unheard says that an earlier one of the calls got no answer: the driver
// may have given it to the storage, where it takes effect after the one that was answered.
func insist[Q, R any](ctx context.Context, c *client, p *peer, name string, m method[Q, R], req Q) (reply R, unheard bool, err error) {
	var none R
	var last error
	sent := false
	started := time.Now()
	for pause := newPause(); ; {
		if err := ctx.Err(); err != nil {
			return none, unheard, unanswered(name, err, last)
		}
		if p.refused.Load() != nil {
			p.conn.ResetConnectBackoff() // when to ask again is decided here
		}
		bounded, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
		reply, err := m(bounded, req)
		cancel()
		if err == nil {
			return reply, unheard, nil
		}
		last = c.explain(name, err)
		refused := p.refused.Load()
		switch code := status.Code(err); {
		case code == codes.Unavailable && refused != nil:
			last = sentence(backends.ErrUnavailable, "%s: the CSI driver's socket %s does not answer: %w; is the driver running on this host?",
				name, p.endpoint, *refused)
			if !sent && time.Since(started) > dialPatience {
				return none, unheard, last
			}
		case code == codes.DeadlineExceeded || code == codes.Aborted || code == codes.Unavailable || code == codes.Canceled:
			sent = true
			unheard = unheard || code != codes.Aborted
		default:
			return none, unheard, last
		}
		if err := pause.wait(ctx); err != nil {
			return none, unheard, unanswered(name, err, last)
		}
	}
}

func unanswered(name string, ended, last error) error {
	if last == nil {
		return fmt.Errorf("%s: %w", name, ended)
	}
	return sentence(backends.ErrUnavailable, "%s: %w; the last answer was: %w", name, ended, last)
}

// rpcError is what a driver answered.
type rpcError struct {
	code  codes.Code
	class error
	text  string
}

func (e *rpcError) Error() string { return e.text }
func (e *rpcError) Unwrap() error { return e.class }

// code returns the driver's answer in an error; OK if there is none in it.
func code(err error) codes.Code {
	if e, ok := errors.AsType[*rpcError](err); ok {
		return e.code
	}
	return codes.OK
}

// explain puts a driver's answer into one of the contract's classes, and says what
// can be done.
func (c *client) explain(name string, err error) error {
	s := status.Convert(err)
	e := &rpcError{code: s.Code(), class: backends.ErrUnavailable}
	advice := ""
	switch s.Code() {
	case codes.NotFound:
		e.class = backends.ErrNotFound
	case codes.AlreadyExists:
		e.class = backends.ErrExists
	case codes.InvalidArgument, codes.OutOfRange:
		e.class, advice = backends.ErrInvalid, "check the size, and the parameters of the profile"
	case codes.FailedPrecondition:
		e.class = backends.ErrInUse
	case codes.Unimplemented:
		e.class, advice = backends.ErrInvalid, "this driver cannot do it"
	case codes.ResourceExhausted:
		advice = "free some room at the storage, or detach volumes of this host, and retry"
	case codes.PermissionDenied, codes.Unauthenticated:
		advice = "check the files of secret_files and what the storage allows this user"
	case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted, codes.Canceled:
		advice = "it may still be in progress"
	default:
		advice = "the driver's log says more"
	}
	e.text = fmt.Sprintf("%s: the CSI driver says %q (%s)", name, c.clean(s.Message()), s.Code())
	if advice != "" {
		e.text += "; " + advice
	}
	return e
}

// clean makes a driver's text fit for a log: short, printable, and without secrets,
// should it repeat them.
func (c *client) clean(text string) string {
	for _, files := range append(slices.Collect(maps.Values(c.cfg.CallSecretFiles)), c.cfg.SecretFiles) {
		for _, path := range files {
			if secret, err := readSecret(path); err == nil && len(secret) > 2 {
				text = strings.ReplaceAll(text, secret, "***")
			}
		}
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:500], "") + "…"
	}
	return text
}

// secrets reads the secrets of a call. They are read each time: files change, and what
// is not kept does not leak.
func (c *client) secrets(call string) (map[string]string, error) {
	files, ok := c.cfg.CallSecretFiles[call]
	if !ok {
		files = c.cfg.SecretFiles
	}
	secrets := make(map[string]string, len(files))
	for key, path := range files {
		text, err := readSecret(path)
		if err != nil {
			return nil, sentence(backends.ErrUnavailable, "secret %s of the CSI driver: %w", key, err)
		}
		secrets[key] = text
	}
	return secrets, nil
}

func readSecret(path string) (string, error) {
	text, err := os.ReadFile(path)
	return strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r"), err
}

// ready returns what the driver says about itself, and refuses one that cannot be used.
func (b *Backend) ready(ctx context.Context) (*facts, error) {
	c := b.client
	c.mu.Lock()
	known := c.facts
	if time.Since(c.asked) > factsAge {
		known = nil
	}
	c.mu.Unlock()
	if known != nil {
		return known, ctx.Err()
	}
	f, err := c.discover(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.fits(f); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.facts, c.asked = f, time.Now()
	c.mu.Unlock()
	return f, nil
}

// probe asks both sockets whether the driver is ready.
func (c *client) probe(ctx context.Context) error {
	for _, p := range c.peers() {
		probed, err := call(ctx, c, p, "Probe", csi.NewIdentityClient(p.conn).Probe, &csi.ProbeRequest{})
		if err != nil {
			return err
		}
		if r := probed.GetReady(); r != nil && !r.GetValue() {
			return sentence(backends.ErrUnavailable, "the CSI driver at %s says that it is not ready yet", p.endpoint)
		}
	}
	return nil
}

func (c *client) peers() []*peer {
	if c.node == c.controller {
		return []*peer{c.controller}
	}
	return []*peer{c.controller, c.node}
}

func (c *client) discover(ctx context.Context) (*facts, error) {
	if err := c.probe(ctx); err != nil {
		return nil, err
	}
	f := &facts{
		plugin:     map[csi.PluginCapability_Service_Type]bool{},
		expansion:  map[csi.PluginCapability_VolumeExpansion_Type]bool{},
		controller: map[csi.ControllerServiceCapability_RPC_Type]bool{},
		node:       map[csi.NodeServiceCapability_RPC_Type]bool{},
	}
	for _, p := range c.peers() {
		identity := csi.NewIdentityClient(p.conn)
		info, err := call(ctx, c, p, "GetPluginInfo", identity.GetPluginInfo, &csi.GetPluginInfoRequest{})
		if err != nil {
			return nil, err
		}
		if want := cmp.Or(c.cfg.Driver, f.name); want != "" && info.GetName() != want {
			return nil, sentence(backends.ErrInvalid, "the CSI driver at %s is %q, not %q; check the endpoints", p.endpoint, info.GetName(), want)
		}
		f.name = info.GetName()
	}
	capabilities, err := call(ctx, c, c.controller, "GetPluginCapabilities",
		csi.NewIdentityClient(c.controller.conn).GetPluginCapabilities, &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		return nil, err
	}
	for _, capability := range capabilities.GetCapabilities() {
		f.plugin[capability.GetService().GetType()] = true
		f.expansion[capability.GetVolumeExpansion().GetType()] = true
	}
	if f.plugin[csi.PluginCapability_Service_CONTROLLER_SERVICE] {
		can, err := call(ctx, c, c.controller, "ControllerGetCapabilities",
			csi.NewControllerClient(c.controller.conn).ControllerGetCapabilities, &csi.ControllerGetCapabilitiesRequest{})
		if err != nil {
			return nil, err
		}
		for _, capability := range can.GetCapabilities() {
			f.controller[capability.GetRpc().GetType()] = true
		}
	}
	node := csi.NewNodeClient(c.node.conn)
	can, err := call(ctx, c, c.node, "NodeGetCapabilities", node.NodeGetCapabilities, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		return nil, err
	}
	for _, capability := range can.GetCapabilities() {
		f.node[capability.GetRpc().GetType()] = true
	}
	f.self, err = call(ctx, c, c.node, "NodeGetInfo", node.NodeGetInfo, &csi.NodeGetInfoRequest{})
	if code(err) == codes.Unimplemented {
		err = nil // a driver that publishes nothing at the controller need not have it
	}
	return f, err
}

func (f *facts) publishes() bool {
	return f.controller[csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME]
}

func (f *facts) stages() bool { return f.node[csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME] }

// shows says that the driver tells to which nodes a volume is published.
func (f *facts) shows() bool {
	return f.publishes() && f.controller[csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES] &&
		(f.controller[csi.ControllerServiceCapability_RPC_GET_VOLUME] || f.controller[csi.ControllerServiceCapability_RPC_LIST_VOLUMES])
}

// fits refuses a driver with which what this backend promises cannot be kept.
func (b *Backend) fits(f *facts) error {
	switch {
	case !f.controller[csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME]:
		return sentence(backends.ErrInvalid, "the CSI driver %s cannot create volumes (it lacks CREATE_DELETE_VOLUME), so it cannot be used", f.name)
	case f.publishes() && f.self.GetNodeId() == "":
		return sentence(backends.ErrInvalid, "the CSI driver %s has no name for this host (NodeGetInfo says no node_id); it may want settings of its own, or Kubernetes", f.name)
	case b.cfg.Fences && !f.publishes():
		return sentence(backends.ErrInvalid, "the CSI driver %s has no ControllerUnpublishVolume, so it cannot cut a host off; remove fences: true", f.name)
	case b.cfg.Fences && !f.shows():
		return sentence(backends.ErrInvalid, "the CSI driver %s does not show to which hosts a volume is published (LIST_VOLUMES_PUBLISHED_NODES), "+
			"so nobody could see that a host is cut off; remove fences: true", f.name)
	}
	return nil
}

// pause waits a little longer each time, with jitter.
type pause struct{ next time.Duration }

func newPause() *pause { return &pause{next: 10 * time.Millisecond} }

func (p *pause) wait(ctx context.Context) error {
	timer := time.NewTimer(p.next/2 + rand.N(p.next))
	defer timer.Stop()
	p.next = min(2*p.next, 5*time.Second)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
