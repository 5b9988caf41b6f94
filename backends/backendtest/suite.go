package backendtest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// T is what a case needs of a *testing.T. It is an interface so that the suite
// itself can be tested: a backend with a defect must fail.
type T interface {
	Helper()
	Name() string
	Context() context.Context
	TempDir() string
	Cleanup(f func())
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Failed() bool
}

// Storage is one storage system, as several nodes of several clusters see it.
type Storage struct {
	// Node returns a new instance of the backend, as after a restart of the node's
	// process.
	Node func(cluster, node string) backends.Backend
	// Open opens a device on a node, exclusively as a mount does if exclusive is
	// set. Nil: it is a block device of this machine.
	Open func(node, device string, exclusive bool) (Device, error)
	// Down makes the storage system answer nobody, and answer again. It is called
	// while no call is under way. Nil: it cannot be done.
	Down func(down bool)
	// Faults are what may happen to a request to the storage system, by name. Each makes
	// the next request but n suffer it, once, and returns a function that takes it back and
	// says whether there was such a request. Nil: it cannot be done.
	Faults map[string]func(n int) (stop func() bool)
	// Late is for how long a request that has suffered one of them may yet take effect.
	Late time.Duration
}

// Config says how to run the suite for a backend.
type Config struct {
	// New returns the storage system for one case. It may be the same one each
	// time: a case leaves nothing behind.
	New func(t T) Storage
	// Size is the size of the volumes in bytes, 0 for 16 MiB or the least the
	// backend allows.
	Size int64
	// Many is how many volumes to make where the test wants many. 0 for 1,200;
	// fewer where volumes cost time or money.
	Many int
	// Timeout bounds every call; 0 for 30 s.
	Timeout time.Duration
}

// NeedRoot skips a test that needs root without it, or fails it if the environment
// variable REQUIRE, a comma-separated list, has root.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	if os.Getuid() == 0 {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
		tb.Fatal("needs root, and REQUIRE says that it is there")
	}
	tb.Skip("needs root")
}

// Run runs every case of the contract as a subtest.
func Run(t *testing.T, cfg Config) {
	for _, c := range Cases() {
		t.Run(c.Name, func(t *testing.T) { c.Run(t, cfg) })
	}
}

// RunCase runs one case of the contract, for a storage that differs from that of Run.
func RunCase(t T, name string, cfg Config) {
	t.Helper()
	for _, c := range Cases() {
		if c.Name == name {
			c.Run(t, cfg)
			return
		}
	}
	t.Fatalf("there is no case %q", name)
}

// Case is one case of the contract.
type Case struct {
	Name string
	run  func(e *env)
}

// Run runs the case, and checks that it left nothing behind.
func (c Case) Run(t T, cfg Config) {
	t.Helper()
	e := &env{T: t, storage: cfg.New(t), cfg: cfg, cluster: uuid.NewString(), nodes: map[string]string{}}
	if e.cfg.Timeout == 0 {
		e.cfg.Timeout = 30 * time.Second
	}
	e.props = e.node("a").Properties()
	if e.size = cfg.Size; e.size == 0 {
		e.size = e.round(max(16<<20, e.props.MinSize))
	}
	// Also after a failed case, whose volumes would be in the way of the next.
	t.Cleanup(e.sweep)
	c.run(e)
}

// env is what a case works with.
type env struct {
	T
	storage Storage
	cfg     Config
	props   backends.Properties
	cluster string
	size    int64

	mu       sync.Mutex
	nodes    map[string]string // short name to node
	clusters []string          // besides cluster
	opened   []Device
}

// node returns a new instance of the backend of a node, which has a short name in
// the case and a unique one in the storage system.
func (e *env) node(short string) backends.Backend {
	return e.storage.Node(e.cluster, e.nodeName(short))
}

func (e *env) nodeName(short string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.nodes[short] == "" {
		e.nodes[short] = short + "-" + uuid.NewString()
	}
	return e.nodes[short]
}

// ctx bounds one call.
func (e *env) ctx() context.Context {
	ctx, cancel := context.WithTimeout(e.Context(), e.cfg.Timeout)
	e.Cleanup(cancel)
	return ctx
}

func (e *env) round(size int64) int64 {
	unit := max(e.props.AllocationUnit, 1)
	return (size + unit - 1) / unit * unit
}

func (e *env) request() backends.CreateRequest {
	id := uuid.NewString()
	return backends.CreateRequest{ID: id, Name: "test-" + id[:8], Cluster: e.cluster, Size: e.size}
}

func (e *env) create(b backends.Backend) backends.Volume {
	e.Helper()
	vol, err := b.Create(e.ctx(), e.request())
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	return vol
}

func (e *env) attach(b backends.Backend, vol backends.Volume, token int64) backends.Attachment {
	e.Helper()
	att, err := b.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
	if err != nil {
		e.Fatalf("attach: %v", err)
	}
	return att
}

func (e *env) detach(b backends.Backend, att backends.Attachment) {
	e.Helper()
	if err := b.Detach(e.ctx(), att); err != nil {
		e.Fatalf("detach: %v", err)
	}
}

func (e *env) remove(b backends.Backend, vol backends.Volume) {
	e.Helper()
	if err := b.Delete(e.ctx(), vol.Ref); err != nil {
		e.Fatalf("delete: %v", err)
	}
}

// list returns what the backend lists, sorted by ID.
func (e *env) list(b backends.Backend) []backends.Volume {
	e.Helper()
	vols, err := b.List(e.ctx())
	if err != nil {
		e.Fatalf("list: %v", err)
	}
	slices.SortFunc(vols, func(a, b backends.Volume) int { return strings.Compare(a.ID, b.ID) })
	return vols
}

// wantList demands that exactly these volumes exist.
func (e *env) wantList(b backends.Backend, want ...backends.Volume) {
	e.Helper()
	slices.SortFunc(want, func(a, b backends.Volume) int { return strings.Compare(a.ID, b.ID) })
	if got := e.list(b); !slices.Equal(got, want) {
		e.Errorf("list: got %s, want %s", brief(got), brief(want))
	}
}

// wantAttached demands that exactly these attachments are the node's.
func (e *env) wantAttached(b backends.Backend, want ...backends.Attachment) {
	e.Helper()
	got, err := b.Attachments(e.ctx())
	if err != nil {
		e.Fatalf("attachments: %v", err)
	}
	order := func(a, b backends.Attachment) int { return strings.Compare(a.Volume, b.Volume) }
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	if !slices.Equal(got, want) {
		e.Errorf("attachments: got %s, want %s", brief(got), brief(want))
	}
}

func brief[S any](all []S) string {
	if len(all) > 5 {
		return fmt.Sprintf("%d of them", len(all))
	}
	return fmt.Sprintf("%+v", all)
}

// sweep removes what the case has made, and demands that it can be.
func (e *env) sweep() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*e.cfg.Timeout)
	defer cancel()
	for _, device := range e.opened {
		_ = device.Close() // most are closed already
	}
	clusters := append(e.clusters, e.cluster)
	for short, name := range e.nodes {
		for _, cluster := range clusters {
			e.sweepNode(ctx, short, e.storage.Node(cluster, name))
		}
	}
	for _, cluster := range clusters {
		b := e.storage.Node(cluster, e.nodeName("a"))
		vols, err := b.List(ctx)
		if err != nil {
			e.Errorf("left behind: %v", err)
		}
		for _, vol := range vols {
			if err := b.Delete(ctx, vol.Ref); err != nil {
				e.Errorf("left behind: %v", err)
			}
		}
		if vols, err = b.List(ctx); err != nil || len(vols) > 0 {
			e.Errorf("left behind: %s, %v", brief(vols), err)
		}
	}
}

func (e *env) sweepNode(ctx context.Context, short string, b backends.Backend) {
	atts, err := b.Attachments(ctx)
	if err != nil {
		e.Errorf("left behind: attachments of %s: %v", short, err)
	}
	for _, att := range atts {
		if err := b.Detach(ctx, att); err != nil {
			e.Errorf("left behind: %v", err)
		}
	}
	if atts, err = b.Attachments(ctx); err != nil || len(atts) > 0 {
		e.Errorf("left behind: %s still has %s, %v", short, brief(atts), err)
	}
}

// parallel runs f n times at once.
func parallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}
