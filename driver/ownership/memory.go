package ownership

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"
)

// Memory is an etcd in one process, for tests: revisions, leases, history,
// compaction and watches as etcd has them. Nodes reach it through Client, each
// with faults of its own. Its leases run on package time, so that it works in a
// testing/synctest bubble.
type Memory struct {
	mu        sync.Mutex
	revision  int64
	compacted int64
	keys      map[string][]version
	log       []KeyEvent
	changed   chan struct{} // closed and replaced at every change
	leases    map[int64]*memoryLease
	lastLease int64
}

// version is a key's state from a revision on.
type version struct {
	revision int64
	kv       KV
	deleted  bool
}

type memoryLease struct {
	ttl   time.Duration
	timer *time.Timer
	// until tells a timer that had already fired from one that a renewal beat.
	until time.Time
	keys  map[string]bool
}

// NewMemory makes an empty one.
func NewMemory() *Memory {
	return &Memory{
		revision: 1,
		keys:     map[string][]version{},
		changed:  make(chan struct{}),
		leases:   map[int64]*memoryLease{},
	}
}

var _ Store = (*Memory)(nil)

// Client makes a connection to it.
func (m *Memory) Client() *Faults { return NewFaults(m) }

// Compact forgets what was before revision.
func (m *Memory) Compact(revision int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if revision <= m.compacted || revision > m.revision {
		return
	}
	m.compacted = revision
	for key, versions := range m.keys {
		i := len(versions) - 1
		for i > 0 && versions[i].revision > revision {
			i--
		}
		if versions[i].deleted && versions[i].revision <= revision {
			i++
		}
		if i == len(versions) {
			delete(m.keys, key)
			continue
		}
		m.keys[key] = slices.Clone(versions[i:])
	}
	m.log = slices.Clone(m.log[m.since(revision):])
}

// Expire ends a lease now, as if its time were over.
func (m *Memory) Expire(lease int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.leases[lease]; l != nil {
		m.end(lease, l)
	}
}

// Keys returns every key there is with that prefix, sorted.
func (m *Memory) Keys(prefix string) []KV {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.read(prefix, true, m.revision)
}

// since is the index in the log of the first event at or after revision.
func (m *Memory) since(revision int64) int {
	return sort.Search(len(m.log), func(i int) bool { return m.log[i].KV.ModRevision >= revision })
}

func (m *Memory) read(key string, prefix bool, at int64) []KV {
	if !prefix {
		if kv, ok := m.at(key, at); ok {
			return []KV{kv}
		}
		return nil
	}
	var kvs []KV
	for k := range m.keys {
		if strings.HasPrefix(k, key) {
			if kv, ok := m.at(k, at); ok {
				kvs = append(kvs, kv)
			}
		}
	}
	slices.SortFunc(kvs, func(a, b KV) int { return cmp.Compare(a.Key, b.Key) })
	return kvs
}

func (m *Memory) at(key string, revision int64) (KV, bool) {
	for _, v := range slices.Backward(m.keys[key]) {
		if v.revision <= revision {
			return v.kv, !v.deleted
		}
	}
	return KV{}, false
}

// limited is what Limit leaves of what a get found.
func (op Op) limited(kvs []KV) []KV {
	if op.Limit == 0 {
		return kvs
	}
	kvs = slices.DeleteFunc(kvs, func(kv KV) bool { return kv.ModRevision <= op.After })
	slices.SortStableFunc(kvs, func(a, b KV) int { return cmp.Compare(a.ModRevision, b.ModRevision) })
	return kvs[:min(op.Limit, len(kvs))]
}

func (m *Memory) holds(c Cmp) bool {
	kvs := m.read(c.Key, c.Prefix, m.revision)
	if len(kvs) == 0 {
		kvs = []KV{{}}
	}
	for _, kv := range kvs {
		var got int64
		switch c.Target {
		case CreateRevision:
			got = kv.CreateRevision
		case ModRevision:
			got = kv.ModRevision
		case LeaseID:
			got = kv.Lease
		}
		if (got == c.Value) == c.Not {
			return false
		}
	}
	return true
}

// plan is a transaction with its branches chosen.
type plan struct {
	succeeded bool
	ops       []Op
	nested    []*plan // by index of ops
}

func (m *Memory) plan(t Txn) *plan {
	p := &plan{succeeded: true, ops: t.Then}
	for _, c := range t.If {
		if !m.holds(c) {
			p.succeeded, p.ops = false, t.Else
			break
		}
	}
	p.nested = make([]*plan, len(p.ops))
	for i, op := range p.ops {
		if op.Kind == OpTxn {
			p.nested[i] = m.plan(*op.Txn)
		}
	}
	return p
}

func (m *Memory) check(p *plan) error {
	for i, op := range p.ops {
		switch op.Kind {
		case OpGet:
			if op.Revision > m.revision {
				return fmt.Errorf("read %s: revision %d is in the future", op.Key, op.Revision)
			}
			if op.Revision > 0 && op.Revision < m.compacted {
				return fmt.Errorf("read %s: %w", op.Key, ErrCompacted)
			}
		case OpPut:
			if op.Lease != 0 && m.leases[op.Lease] == nil {
				return fmt.Errorf("put %s: %w", op.Key, ErrLease)
			}
		case OpTxn:
			if err := m.check(p.nested[i]); err != nil {
				return err
			}
		case OpDelete:
		}
	}
	return nil
}

// distinct refuses what etcd refuses: writing a key twice on one path. Deleting it
// twice is fine.
func distinct(ops []Op) (puts, dels map[string]bool, err error) {
	puts, dels = map[string]bool{}, map[string]bool{}
	for _, op := range ops {
		if op.Kind == OpDelete {
			dels[op.Key] = true
		}
	}
	for _, op := range ops {
		if op.Kind != OpTxn {
			continue
		}
		newPuts, newDels := map[string]bool{}, map[string]bool{}
		for _, branch := range [][]Op{op.Txn.Then, op.Txn.Else} {
			p, d, err := distinct(branch)
			if err != nil {
				return nil, nil, err
			}
			for key := range p {
				if puts[key] || dels[key] {
					return nil, nil, errDuplicate
				}
			}
			maps.Copy(newPuts, p)
			maps.Copy(newDels, d)
		}
		maps.Copy(puts, newPuts)
		maps.Copy(dels, newDels)
	}
	for _, op := range ops {
		if op.Kind != OpPut {
			continue
		}
		if puts[op.Key] || dels[op.Key] {
			return nil, nil, errDuplicate
		}
		puts[op.Key] = true
	}
	return puts, dels, nil
}

var errDuplicate = errors.New("duplicate key given in txn request")

// Txn is Store's.
func (m *Memory) Txn(ctx context.Context, t Txn) (TxnResult, error) {
	if err := ctx.Err(); err != nil {
		return TxnResult{}, err
	}
	if len(t.Then)+len(t.Else) == 0 {
		return TxnResult{}, errNoOps
	}
	for _, branch := range [][]Op{t.Then, t.Else} {
		if len(branch) > 128 {
			return TxnResult{}, errors.New("too many operations in txn request")
		}
		if _, _, err := distinct(branch); err != nil {
			return TxnResult{}, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.plan(t)
	if err := m.check(p); err != nil {
		return TxnResult{}, err
	}
	revision := m.revision
	res := m.run(p, &revision)
	m.commit(revision)
	setRevision(&res, revision)
	return res, nil
}

func setRevision(res *TxnResult, revision int64) {
	res.Revision = revision
	for _, r := range res.Results {
		if r.Txn != nil {
			setRevision(r.Txn, revision)
		}
	}
}

// run does the operations; revision becomes the next one with the first change.
func (m *Memory) run(p *plan, revision *int64) TxnResult {
	res := TxnResult{Succeeded: p.succeeded, Results: make([]OpResult, len(p.ops))}
	for i, op := range p.ops {
		switch op.Kind {
		case OpGet:
			at := op.Revision
			if at == 0 {
				at = *revision
			}
			res.Results[i].KVs = op.limited(m.read(op.Key, op.Prefix, at))
		case OpPut:
			old, _ := m.at(op.Key, *revision)
			*revision = m.revision + 1
			m.unlease(old)
			kv := KV{
				Key: op.Key, Value: slices.Clone(op.Value), Lease: op.Lease,
				CreateRevision: old.CreateRevision, ModRevision: *revision, Version: old.Version + 1,
			}
			if kv.CreateRevision == 0 {
				kv.CreateRevision = *revision
			}
			if op.Lease != 0 {
				m.leases[op.Lease].keys[op.Key] = true
			}
			m.record(version{revision: *revision, kv: kv})
		case OpDelete:
			if old, ok := m.at(op.Key, *revision); ok {
				*revision = m.revision + 1
				m.unlease(old)
				m.remove(op.Key, *revision)
				res.Results[i].Deleted = 1
			}
		case OpTxn:
			nested := m.run(p.nested[i], revision)
			res.Results[i].Txn = &nested
		}
	}
	return res
}

func (m *Memory) unlease(kv KV) {
	if l := m.leases[kv.Lease]; l != nil {
		delete(l.keys, kv.Key)
	}
}

func (m *Memory) remove(key string, revision int64) {
	m.record(version{revision: revision, kv: KV{Key: key, ModRevision: revision}, deleted: true})
}

func (m *Memory) record(v version) {
	m.keys[v.kv.Key] = append(m.keys[v.kv.Key], v)
	m.log = append(m.log, KeyEvent{Deleted: v.deleted, KV: v.kv})
}

func (m *Memory) commit(revision int64) {
	if revision == m.revision {
		return
	}
	m.revision = revision
	close(m.changed)
	m.changed = make(chan struct{})
}

// Grant is Store's.
func (m *Memory) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastLease++
	id := m.lastLease
	// Leases are whole seconds, as in etcd.
	ttl = time.Duration(math.Ceil(ttl.Seconds())) * time.Second
	l := &memoryLease{ttl: ttl, keys: map[string]bool{}, until: time.Now().Add(ttl)}
	l.timer = time.AfterFunc(ttl, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.leases[id] == l && !time.Now().Before(l.until) {
			m.end(id, l)
		}
	})
	m.leases[id] = l
	return id, ttl, nil
}

// KeepAliveOnce is Store's.
func (m *Memory) KeepAliveOnce(ctx context.Context, id int64) (time.Duration, int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.leases[id]
	if l == nil {
		return 0, 0, ErrLease
	}
	l.until = time.Now().Add(l.ttl)
	l.timer.Reset(l.ttl)
	return l.ttl, m.revision, nil
}

// Revoke is Store's.
func (m *Memory) Revoke(ctx context.Context, id int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.leases[id]
	if l == nil {
		return ErrLease
	}
	m.end(id, l)
	return nil
}

// end deletes a lease and its keys, in one revision.
func (m *Memory) end(id int64, l *memoryLease) {
	l.timer.Stop()
	delete(m.leases, id)
	if len(l.keys) == 0 {
		return
	}
	keys := make([]string, 0, len(l.keys))
	for key := range l.keys {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		m.remove(key, m.revision+1)
	}
	m.commit(m.revision + 1)
}

// next returns the events of a watch from revision from on, the revision to go
// on from, and a channel that is closed at the next change.
func (m *Memory) next(key string, prefix bool, from int64) (events []KeyEvent, to int64, changed <-chan struct{}, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if from < m.compacted {
		return nil, 0, nil, ErrCompacted
	}
	for _, ev := range m.log[m.since(from):] {
		if ev.KV.Key == key || prefix && strings.HasPrefix(ev.KV.Key, key) {
			events = append(events, ev)
		}
	}
	return events, max(from, m.revision+1), m.changed, nil
}

// Watch is Store's.
func (m *Memory) Watch(ctx context.Context, key string, prefix bool, from int64) <-chan WatchResult {
	out := make(chan WatchResult)
	go func() {
		defer close(out)
		send := func(r WatchResult) bool {
			select {
			case out <- r:
				return true
			case <-ctx.Done():
				return false
			}
		}
		if from == 0 {
			m.mu.Lock()
			now := m.revision
			m.mu.Unlock()
			if from = now + 1; !send(WatchResult{Revision: now}) {
				return
			}
		}
		for {
			events, to, changed, err := m.next(key, prefix, from)
			if err != nil {
				send(WatchResult{Err: err})
				return
			}
			if len(events) > 0 && !send(WatchResult{Revision: to - 1, Events: events}) {
				return
			}
			from = to
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// Close does nothing: there is nothing to let go of.
func (m *Memory) Close() error { return nil }
