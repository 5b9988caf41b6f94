package ownership_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// TestHistory makes Memory prove that it is like etcd: the same random calls, on
// both, must have the same results and the same history.
func TestHistory(t *testing.T) {
	endpoint := startEtcd(t, t.TempDir())
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	store := connect(t, endpoint)
	t.Cleanup(func() { _ = store.Close() })
	for run := range 10 {
		seed := rand.Uint64()
		if !t.Run(fmt.Sprint(run), func(t *testing.T) {
			mem := ownership.NewMemory()
			etcd := newHistory(t, store, func(revision int64) {
				if _, err := raw.Compact(t.Context(), revision); err != nil {
					t.Fatal(err)
				}
			})
			fake := newHistory(t, mem, mem.Compact)
			// The prefix keeps the runs on one etcd apart.
			etcd.prefix, fake.prefix = fmt.Sprintf("/%d/", run), fmt.Sprintf("/%d/", run)
			etcd.random, fake.random = rand.New(rand.NewPCG(seed, 0)), rand.New(rand.NewPCG(seed, 0))
			for step := range 120 {
				got, want := fake.step(), etcd.step()
				if got != want {
					t.Fatalf("seed %d, step %d: memory\n%s\netcd\n%s", seed, step, got, want)
				}
			}
			if got, want := fake.events(), etcd.events(); got != want {
				t.Fatalf("seed %d: memory has the history\n%s\netcd\n%s", seed, got, want)
			}
		}) {
			return
		}
	}
}

// history makes random calls and writes down what came of them, in numbers that
// do not depend on where the store began.
type history struct {
	t       *testing.T
	store   ownership.Store
	compact func(int64)
	random  *rand.Rand
	prefix  string

	base     int64 // the store's revision at the beginning
	revision int64
	kept     int64 // the compacted revision
	leases   []int64
}

func newHistory(t *testing.T, store ownership.Store, compact func(int64)) *history {
	t.Helper()
	res, err := store.Txn(t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: "/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return &history{t: t, store: store, compact: compact, base: res.Revision, revision: res.Revision, kept: res.Revision, leases: []int64{1 << 40}}
}

func (h *history) step() string {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	i := h.random.IntN(len(h.leases))
	switch h.random.IntN(20) {
	case 0:
		lease, ttl, err := h.store.Grant(ctx, 3600*time.Second)
		h.leases = append(h.leases, lease)
		return fmt.Sprint("grant ", ttl, err)
	case 1:
		err := h.store.Revoke(ctx, h.leases[i])
		return fmt.Sprintf("revoke %d: %s", i, class(err))
	case 2:
		ttl, revision, err := h.store.KeepAliveOnce(ctx, h.leases[i])
		return fmt.Sprintf("keepalive %d: %s at %d %s", i, ttl, max(0, revision-h.base), class(err))
	case 3:
		res, err := h.store.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: "/"}}})
		if err != nil {
			return err.Error()
		}
		if to := res.Revision - int64(h.random.IntN(8)); to > h.kept && to > h.base && h.random.IntN(3) == 0 {
			h.kept = to
			h.compact(to)
		}
		return fmt.Sprintf("at %d, kept %d", res.Revision-h.base, h.kept-h.base)
	}
	readOnly := h.random.IntN(3) == 0
	txn := h.txn(readOnly, 0)
	res, err := h.store.Txn(ctx, txn)
	if err != nil {
		return h.text(txn) + "\n  => " + class(err)
	}
	h.revision = res.Revision
	return h.text(txn) + "\n  => " + h.result(res)
}

func class(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, ownership.ErrLease):
		return "no lease"
	case errors.Is(err, ownership.ErrCompacted):
		return "compacted"
	case strings.Contains(err.Error(), "duplicate key"):
		return "duplicate"
	case strings.Contains(err.Error(), "future"):
		return "future"
	}
	return err.Error()
}

func (h *history) key() string { return h.prefix + string(rune('a'+h.random.IntN(5))) }

func (h *history) txn(readOnly bool, depth int) ownership.Txn {
	var txn ownership.Txn
	for range h.random.IntN(3) {
		c := ownership.Cmp{Key: h.key(), Not: h.random.IntN(2) == 0, Target: ownership.Target(h.random.IntN(3))}
		if h.random.IntN(5) == 0 {
			c.Key, c.Prefix = h.prefix, true
		}
		switch {
		case h.random.IntN(2) == 0:
		case c.Target == ownership.LeaseID:
			c.Value = h.leases[h.random.IntN(len(h.leases))]
		default:
			c.Value = max(h.base, h.revision-int64(h.random.IntN(10)))
		}
		txn.If = append(txn.If, c)
	}
	txn.Then, txn.Else = h.ops(readOnly, depth), h.ops(readOnly, depth)
	if len(txn.Then)+len(txn.Else) == 0 { // which is refused
		txn.Then = []ownership.Op{{Kind: ownership.OpGet, Key: h.key()}}
	}
	return txn
}

func (h *history) ops(readOnly bool, depth int) []ownership.Op {
	var ops []ownership.Op
	for range h.random.IntN(4) {
		op := ownership.Op{Key: h.key()}
		switch n := h.random.IntN(8); {
		case n == 0 && depth < 2:
			nested := h.txn(readOnly, depth+1)
			op = ownership.Op{Kind: ownership.OpTxn, Txn: &nested}
		case n < 3 || readOnly:
			if op.Prefix = h.random.IntN(3) == 0; op.Prefix {
				op.Key = h.prefix
			}
			if readOnly && h.random.IntN(2) == 0 {
				// Not before the beginning: etcd keeps what was there.
				op.Revision = max(h.base, h.revision-int64(h.random.IntN(8))+1)
			}
		case n < 6:
			op.Kind, op.Value = ownership.OpPut, fmt.Append(nil, h.random.IntN(1000))
			if h.random.IntN(3) == 0 {
				op.Lease = h.leases[h.random.IntN(len(h.leases))]
			}
		default:
			op.Kind = ownership.OpDelete
		}
		ops = append(ops, op)
	}
	return ops
}

func (h *history) lease(id int64) string {
	for i, l := range h.leases {
		if l == id {
			return fmt.Sprint("L", i)
		}
	}
	return fmt.Sprint(id)
}

func (h *history) kv(kv ownership.KV) string {
	since := func(revision int64) int64 {
		if revision == 0 {
			return 0
		}
		return revision - h.base
	}
	return fmt.Sprintf("%s=%s c%d m%d v%d %s", kv.Key, kv.Value, since(kv.CreateRevision), since(kv.ModRevision), kv.Version, h.lease(kv.Lease))
}

func (h *history) text(txn ownership.Txn) string {
	var b strings.Builder
	b.WriteString("if")
	for _, c := range txn.If {
		value := fmt.Sprint(c.Value - h.base)
		if c.Value == 0 {
			value = "0"
		}
		if c.Target == ownership.LeaseID {
			value = h.lease(c.Value)
		}
		fmt.Fprintf(&b, " (%s%v target %d not %v %s)", c.Key, c.Prefix, c.Target, c.Not, value)
	}
	for i, ops := range [][]ownership.Op{txn.Then, txn.Else} {
		b.WriteString([]string{" then", " else"}[i])
		for _, op := range ops {
			if op.Kind == ownership.OpTxn {
				fmt.Fprintf(&b, " [%s]", h.text(*op.Txn))
				continue
			}
			revision := op.Revision
			if revision > 0 {
				revision -= h.base
			}
			fmt.Fprintf(&b, " (%d %s%v %s %s @%d)", op.Kind, op.Key, op.Prefix, op.Value, h.lease(op.Lease), revision)
		}
	}
	return b.String()
}

func (h *history) result(res ownership.TxnResult) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v at %d:", res.Succeeded, res.Revision-h.base)
	for _, r := range res.Results {
		fmt.Fprintf(&b, " (deleted %d", r.Deleted)
		for _, kv := range r.KVs {
			b.WriteString(" " + h.kv(kv))
		}
		if r.Txn != nil {
			// etcd fills in the revision of the outermost one only.
			r.Txn.Revision = res.Revision
			b.WriteString(" " + h.result(*r.Txn))
		}
		b.WriteString(")")
	}
	return b.String()
}

// events is what a watch from what is kept reports, up to a last change of its
// own. Revisions that changed nothing under the prefix are none of its business.
func (h *history) events() string {
	end := h.prefix + "~"
	if _, err := h.store.Txn(h.t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: end}}}); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	var b strings.Builder
	if h.kept > h.base+1 {
		for res := range h.store.Watch(ctx, h.prefix, true, h.kept-1) {
			fmt.Fprintf(&b, "from before: %s\n", class(res.Err))
			break
		}
	}
	for res := range h.store.Watch(ctx, h.prefix, true, h.kept+1) {
		if res.Err != nil {
			h.t.Fatal(res.Err)
		}
		for _, ev := range res.Events {
			fmt.Fprintf(&b, "%v %s\n", ev.Deleted, h.kv(ev.KV))
			if ev.KV.Key == end {
				return b.String()
			}
		}
	}
	h.t.Fatal("the watch ended before its time")
	return ""
}
