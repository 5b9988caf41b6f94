package ownership_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// exchangeable is a store that can be replaced by another one, as an operator does
// it who restores etcd.
type exchangeable struct {
	ownership.Store
	now   atomic.Pointer[ownership.Memory]
	stale atomic.Int64 // how much lower the next transaction's revision is
}

func (e *exchangeable) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	res, err := e.now.Load().Txn(ctx, txn)
	res.Revision -= e.stale.Swap(0)
	return res, err
}

func (e *exchangeable) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	return e.now.Load().Grant(ctx, ttl)
}

func (e *exchangeable) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, error) {
	return e.now.Load().KeepAliveOnce(ctx, lease)
}

func (e *exchangeable) Revoke(ctx context.Context, lease int64) error {
	return e.now.Load().Revoke(ctx, lease)
}

func (e *exchangeable) Watch(ctx context.Context, key string, prefix bool, from int64) <-chan ownership.WatchResult {
	return e.now.Load().Watch(ctx, key, prefix, from)
}

func run(t *testing.T, store ownership.Store, seen ownership.Seen) (m *ownership.Map, stop func()) {
	t.Helper()
	began := time.Now()
	m = ownership.New(store, ownership.Node{ID: "a", Host: "host-a", Boot: "boot-a"}, ownership.Config{
		Now: func() time.Duration { return time.Since(began) }, Seen: seen,
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return m, func() {
		cancel()
		<-done
	}
}

// copyOf makes an etcd with the same keys at other revisions, the leases with them,
// as a backup has them.
func copyOf(t *testing.T, mem *ownership.Memory) *ownership.Memory {
	t.Helper()
	older := ownership.NewMemory()
	var granted int64
	for _, kv := range mem.Keys("/") {
		for granted < kv.Lease {
			granted, _, _ = older.Grant(t.Context(), time.Hour)
		}
		if _, err := older.Txn(t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: kv.Key, Value: kv.Value, Lease: kv.Lease}}}); err != nil {
			t.Fatal(err)
		}
	}
	return older
}

// An etcd that is put back under a running node is noticed although the lease is
// there, and stays refused when its revision has caught up, in this life of the
// node and in the next.
func TestPutBackWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &exchangeable{}
		first := ownership.NewMemory()
		store.now.Store(first)
		m, stop := run(t, store, ownership.Seen{})
		if err := m.Registered(t.Context()); err != nil {
			t.Fatal(err)
		}
		create := func(m *ownership.Map, name string) error {
			_, _, err := m.Create(t.Context(), ownership.Volume{ID: name, Name: name})
			return err
		}
		if err := create(m, "v"); err != nil {
			t.Fatal(err)
		}
		backup := copyOf(t, first)
		for range 50 {
			if err := m.Withdraw(t.Context(), ownership.Owner{Volume: "v", Node: "b"}); err != nil {
				t.Fatal(err)
			}
			comeBack(t, first, "b", 0)
		}
		if _, err := m.List(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := m.Seen()

		store.now.Store(backup)
		time.Sleep(70 * time.Second) // nothing is asked but by the node itself
		refused := func(m *ownership.Map, want string) {
			t.Helper()
			for what, err := range map[string]error{"Live": m.Live(), "Create": create(m, "new")} {
				if !errors.Is(err, ownership.ErrUnavailable) || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: got error %v, want it to say %q", what, err, want)
				}
			}
			if err := m.Unsafe(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("Unsafe is %v, want it to say %q", err, want)
			}
			if got := m.Seen(); !got.Older || got.Revision != before.Revision || got.Cluster != before.Cluster {
				t.Errorf("seen is %+v, want %+v and older", got, before)
			}
		}
		refused(m, "it has been put back to an older state; restore a newer backup")
		for range 100 {
			comeBack(t, backup, "b", 0)
		}
		time.Sleep(10 * time.Second)
		const caughtUp = "etcd was put back to an older state, which has gone on since"
		refused(m, caughtUp)
		stop()
		m, stop = run(t, store, m.Seen())
		time.Sleep(10 * time.Second)
		refused(m, caughtUp)

		if gen, err := m.AcceptRestore(t.Context()); gen != 2 || err != nil {
			t.Fatalf("accepted as generation %d, %v", gen, err)
		}
		time.Sleep(5 * time.Second)
		if err := m.Live(); err != nil {
			t.Error(err)
		}
		if err := create(m, "new"); err != nil {
			t.Error(err)
		}
		if got := m.Seen(); got.Older || got.Gen != 2 {
			t.Errorf("seen is %+v", got)
		}
		stop()
	})
}

// One answer that is older than the one before it, or newer than it can be, makes a
// node look again, and no more.
func TestStaleAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &exchangeable{}
		store.now.Store(ownership.NewMemory())
		m, stop := run(t, store, ownership.Seen{})
		defer stop()
		if err := m.Registered(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for stale, want := range map[int64]string{1: "it has been put back to an older state; ", -1_000_000_000: "with its revision raised; "} {
			store.stale.Store(stale)
			_, err := m.List(t.Context())
			if !errors.Is(err, ownership.ErrUnavailable) || !strings.Contains(err.Error(), want) {
				t.Errorf("got error %v of a stale answer, want it to say %q", err, want)
			}
			if err := m.Live(); err == nil || m.Unsafe() == nil {
				t.Error("a stale answer made no difference")
			}
			time.Sleep(3 * time.Second)
			if err := m.Live(); err != nil || m.Unsafe() != nil || m.Seen().Older {
				t.Errorf("after it: %v, %v, %+v", err, m.Unsafe(), m.Seen())
			}
			if _, err := m.List(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}
