package ownership

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"
)

// Config sets up a Map. The zero value is usable.
type Config struct {
	// Prefix is what every key begins with. Default "/flocker".
	Prefix string
	// TTL is how long a node that is not heard from counts as live. Default 10 s.
	TTL time.Duration
	// Renew is the time between renewals. Default 2.5 s.
	Renew time.Duration
	// Timeout bounds one try of one call. Default 2 s. A read takes at most this
	// long, a write two times.
	Timeout time.Duration
	// Now is a clock that does not stop when the machine sleeps. Default
	// CLOCK_BOOTTIME.
	Now func() time.Duration
	// Healthy, if set, is asked before each renewal: a process that no longer works
	// must not go on looking alive.
	Healthy func() error
	// Condemned is called, before this node registers, if it was declared dead: other
	// nodes may already have what it owned. When it returns nil, everything this node
	// had open MUST be given up; on an error it is called again. Without it such a
	// node does not register.
	Condemned func(ctx context.Context, death Death) error
	// Seen is what Map.Seen returned in the last life of this node, if that is
	// known. With it, an etcd that was emptied or put back to an older state is
	// noticed, and refused.
	Seen Seen
	// Keep, if set, gets what Map.Seen returns when more than the revision of it has
	// changed: a process that ends before it is kept would forget what it refuses.
	Keep func(Seen)
	// Log gets what no caller is told. Default: nowhere.
	Log *logrus.Entry
}

// Seen is how far a node has followed which cluster.
type Seen struct {
	Cluster  string `json:"cluster"`
	Gen      int64  `json:"gen"`
	Revision int64  `json:"revision"`
	// At is when etcd was last at Revision or beyond, in Unix seconds.
	At int64 `json:"at,omitempty"`
	// Older says that etcd was seen at a lower revision since. What it says of this
	// generation is not believed any more, not even when its revision has caught up.
	Older bool `json:"older,omitempty"`
}

// Map is one node's view of the map from datasets to owners. All its methods may
// be called at any time and together; those that take authority need Run.
//
// A method that fails with ErrUnavailable may have had its effect, or have it
// later. That is harmless for Claim (the volume shows up in Owned), but after
// Release, HandOver or Delete the volume must be regarded as given up until the
// same call, or Retake, succeeds: Check proves nothing about a write that is
// still on its way.
//
// While this etcd is refused, see Unsafe, nothing is read or written:
// ErrUnavailable says why.
type Map struct {
	store Store
	me    Node
	cfg   Config
	root  string
	log   *logrus.Entry

	registered    chan struct{} // closed at the first registration
	registrations chan struct{}
	poke          chan struct{} // makes the liveness loop look at once
	revision      atomic.Int64  // the highest one seen
	at            atomic.Int64  // Seen.At
	peers         peers

	mu     sync.Mutex
	meta   meta
	older  bool  // Seen.Older
	unsafe error // why this etcd is refused
	lease  int64
	since  time.Duration // the lease has been valid without a gap since
	until  time.Duration // the lease is valid before
	why    error         // why it is not
	state  string        // Node.State, as last seen
	bucket bucket
	lines  int // audit lines written

	// volumes are those of the last List, by key: decoding a thousand takes longer
	// than reading them.
	volumes atomic.Pointer[map[string]Volume]

	identities map[string]string // Node.Identities, as far as known; guarded by mu
}

// bucket is the lease of the audit lines written within an hour, or within a day
// while there are none: an idle node does not ask for one an hour.
type bucket struct {
	lease   int64
	granted time.Time
	lines   int // Map.lines at that time
}

// stale says that the next lines are to have a lease of their own.
func (b bucket) stale(lines int) bool {
	age := time.Since(b.granted)
	return b.lease == 0 || age >= 24*time.Hour || age >= time.Hour && lines > b.lines
}

// auditKept is how long audit lines are kept at least; a day more at most.
const auditKept = 7 * 24 * time.Hour

// New makes a node's view over a store. Node needs ID, Host and Boot; it gets a
// session if it has none. New does no I/O.
func New(store Store, node Node, cfg Config) *Map {
	cfg.Prefix = "/" + strings.Trim(cmp.Or(cfg.Prefix, "flocker"), "/")
	cfg.TTL = cmp.Or(cfg.TTL, 10*time.Second)
	cfg.Renew = cmp.Or(cfg.Renew, cfg.TTL/4)
	cfg.Timeout = cmp.Or(cfg.Timeout, 2*time.Second)
	if cfg.Now == nil {
		cfg.Now = bootTime
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = logrus.NewEntry(silent)
	}
	node.Session = cmp.Or(node.Session, uuid.NewString())
	m := &Map{
		store: store, me: node, cfg: cfg, root: cfg.Prefix + "/v1/", log: cfg.Log,
		registered: make(chan struct{}), registrations: make(chan struct{}, 1), poke: make(chan struct{}, 1),
		why:   errors.New("this node has not registered in etcd yet"),
		older: cfg.Seen.Older, identities: maps.Clone(node.Identities),
	}
	m.peers.ended = make(chan registration, 64)
	m.revision.Store(cfg.Seen.Revision)
	m.at.Store(cfg.Seen.At)
	return m
}

// Node is who this node is.
func (m *Map) Node() Node { return m.me }

// Cluster is the cluster's UUID, empty before the first registration.
func (m *Map) Cluster() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.meta.Cluster
}

// Seen is what to keep for Config.Seen of this node's next life.
func (m *Map) Seen() Seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.meta.Cluster == "" {
		seen := m.cfg.Seen
		seen.Older = m.older
		return seen
	}
	return Seen{Cluster: m.meta.Cluster, Gen: m.meta.Gen, Revision: m.revision.Load(), At: m.at.Load(), Older: m.older}
}

func (m *Map) key(parts ...string) string { return m.root + strings.Join(parts, "/") }
func (m *Map) own(vid string) string      { return m.key("own", vid) }
func (m *Map) vol(vid string) string      { return m.key("vol", vid) }
func (m *Map) name(name string) string    { return m.key("name", name) }
func (m *Map) live(nid string) string     { return m.key("live", nid) }

func (m *Map) node(nid string) string { return m.key("node", nid) }

func (m *Map) fence(nid, boot string) string     { return m.key("fence", nid, boot) }
func (m *Map) req(owner, vid, nid string) string { return m.key("req", owner, vid, nid) }
func (m *Map) rep(nid, vid string) string        { return m.key("rep", nid, vid) }

func newOp() string { return uuid.NewString() }

// tries is how often one call is sent when sends fail faster than they time out.
const tries = 3

// read returns the state of keys at one revision.
func (m *Map) read(ctx context.Context, ops ...Op) (TxnResult, error) {
	return m.send(ctx, Txn{Then: ops}, m.cfg.Timeout)
}

// write runs a transaction that changes something.
//
// After an error it is sent again, unchanged. Its compares make sure that only
// one of the sends has an effect, and its Else branch reads the key back: the
// caller MUST look for its operation id there before it takes a failed compare
// for a refusal.
func (m *Map) write(ctx context.Context, txn Txn) (TxnResult, error) {
	return m.send(ctx, txn, 2*m.cfg.Timeout)
}

// send is exchange with an etcd that this node trusts.
func (m *Map) send(ctx context.Context, txn Txn, budget time.Duration) (TxnResult, error) {
	if err := m.trusted(); err != nil {
		return TxnResult{}, err
	}
	before := m.revision.Load()
	res, err := m.exchange(ctx, txn, budget)
	switch {
	case err != nil:
		return TxnResult{}, err
	case res.Revision < before:
		return TxnResult{}, m.distrust(putBack(res.Revision, before))
	case m.leaps(res.Revision, m.revision.Load()):
		return TxnResult{}, m.distrust(leapt(res.Revision, before))
	}
	m.observe(res.Revision)
	return res, nil
}

// exchange sends a transaction and, should that fail, sends it again.
func (m *Map) exchange(ctx context.Context, txn Txn, budget time.Duration) (TxnResult, error) {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	wait := backoff{first: 25 * time.Millisecond, most: 250 * time.Millisecond}
	for try := 1; ; try++ {
		res, err := m.try(ctx, txn)
		switch {
		case err == nil:
			return res, nil
		case errors.Is(err, ErrLease) && m.dropBucket(&txn):
			// Without the audit line rather than not at all.
			continue
		case errors.Is(err, ErrLease), errors.Is(err, ErrCompacted):
			return TxnResult{}, unavailable(err)
		case try >= tries && !errors.Is(err, ErrNoLeader), !wait.sleep(ctx):
			return TxnResult{}, unavailable(err)
		}
	}
}

func (m *Map) try(ctx context.Context, txn Txn) (TxnResult, error) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	return m.store.Txn(ctx, txn)
}

func (m *Map) observe(revision int64) {
	m.at.Store(time.Now().Unix())
	for {
		old := m.revision.Load()
		if revision <= old || m.revision.CompareAndSwap(old, revision) {
			return
		}
	}
}

func unavailable(err error) error {
	if errors.Is(err, ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// backoff doubles from first to most, with jitter.
type backoff struct {
	first, most time.Duration
	next        time.Duration
}

// sleep waits for the next interval. False if ctx ended before.
func (b *backoff) sleep(ctx context.Context) bool {
	b.next = min(max(b.first, 2*b.next), b.most)
	t := time.NewTimer(b.next/2 + rand.N(b.next/2+1))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// asker is the key of who wants what is done, in a context.
type asker struct{}

// By has the audit lines of what is done with the context say who wants it, where they do
// not say so already.
func By(ctx context.Context, by string) context.Context {
	if by == "" {
		return ctx
	}
	return context.WithValue(ctx, asker{}, by)
}

// Wanted says who wants what is done with a context; "" for nobody.
func Wanted(ctx context.Context) string {
	by, _ := ctx.Value(asker{}).(string)
	return by
}

// audit is the line that goes into the transaction of a change, or nothing while
// there is no lease for it.
func (m *Map) audit(ctx context.Context, line auditLine) []Op {
	line.By = cmp.Or(line.By, Wanted(ctx))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bucket.lease == 0 {
		return nil
	}
	m.lines++
	line.At, line.Node, line.Host = time.Now().UTC(), m.me.ID, m.me.Host
	n := fmt.Sprintf("%.8s-%06d", m.me.Session, m.lines)
	return []Op{putOn(m.bucket.lease, m.lineKey(hour(line.At), m.me.ID, n), encode(line))}
}

// remember keeps what a deleted volume was, for as long as an audit line.
func (m *Map) remember(v Volume, placement *Placement) []Op {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bucket.lease == 0 {
		return nil
	}
	gone := Gone{Volume: v, At: time.Now().UTC()}
	if placement != nil {
		gone.Node = placement.Node
	}
	return []Op{putOn(m.bucket.lease, m.key("gone", v.ID), encode(gone))}
}

// dropBucket forgets the lease of the audit lines, and removes what is on it from txn.
// False if there are none.
func (m *Map) dropBucket(txn *Txn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	isLine := func(op Op) bool {
		return op.Kind == OpPut && (strings.HasPrefix(op.Key, m.key("ev", "")) || strings.HasPrefix(op.Key, m.key("gone", "")))
	}
	var strip func(ops []Op) ([]Op, bool)
	strip = func(ops []Op) ([]Op, bool) {
		kept := slices.DeleteFunc(slices.Clone(ops), isLine)
		found := len(kept) < len(ops)
		for i, op := range kept {
			if op.Kind != OpTxn {
				continue
			}
			nested := *op.Txn
			var a, b bool
			nested.Then, a = strip(nested.Then)
			nested.Else, b = strip(nested.Else)
			kept[i].Txn = &nested
			found = found || a || b
		}
		return kept, found
	}
	var a, b bool
	txn.Then, a = strip(txn.Then)
	txn.Else, b = strip(txn.Else)
	if a || b {
		m.bucket = bucket{}
	}
	return a || b
}
