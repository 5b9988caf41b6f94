package ownership_test

import (
	"context"
	"errors"
	"fmt"
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
	bump  atomic.Int64 // how much higher all are than Memory's
	lag   atomic.Int64 // how much lower those of renewals are
	calls atomic.Int64 // how many transactions there were
}

func (e *exchangeable) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	e.calls.Add(1)
	res, err := e.now.Load().Txn(ctx, txn)
	res.Revision += e.bump.Load() - e.stale.Swap(0)
	return res, err
}

func (e *exchangeable) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	return e.now.Load().Grant(ctx, ttl)
}

func (e *exchangeable) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, int64, error) {
	ttl, revision, err := e.now.Load().KeepAliveOnce(ctx, lease)
	return ttl, revision + e.bump.Load() - e.lag.Load(), err
}

func (e *exchangeable) Revoke(ctx context.Context, lease int64) error {
	return e.now.Load().Revoke(ctx, lease)
}

func (e *exchangeable) Watch(ctx context.Context, key string, prefix bool, from int64) <-chan ownership.WatchResult {
	return e.now.Load().Watch(ctx, key, prefix, from)
}

// It returns what the process has kept on its disk as well, which is good after stop.
func run(t *testing.T, store ownership.Store, seen ownership.Seen) (m *ownership.Map, stop func() ownership.Seen) {
	t.Helper()
	kept := seen
	began := time.Now()
	m = ownership.New(store, ownership.Node{ID: "a", Host: "host-a", Boot: "boot-a"}, ownership.Config{
		Now: func() time.Duration { return time.Since(began) }, Seen: seen, Keep: func(seen ownership.Seen) { kept = seen },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return m, func() ownership.Seen {
		cancel()
		<-done
		return kept
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
		time.Sleep(3 * time.Second) // nothing is asked but by the node itself
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
		// Killed, it has not been asked any more what to keep.
		kept := stop()
		if kept.Revision > before.Revision || !kept.Older {
			t.Errorf("kept is %+v, want %+v or less, and older", kept, before)
		}
		before = kept
		m, stop = run(t, store, kept)
		time.Sleep(10 * time.Second)
		refused(m, caughtUp)

		if gen, err := m.AcceptRestore(t.Context(), "ann@ops"); gen != 2 || err != nil {
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
		if kept := stop(); kept.Older || kept.Gen != 2 {
			t.Errorf("kept is %+v", kept)
		}
	})
}

// A revision that was raised is noticed by who has nothing to ask, and by the next
// process; etcd may have been used by others in the meantime.
func TestRaised(t *testing.T) {
	const want = "with its revision raised; restore a newer backup"
	for _, c := range []struct {
		off    time.Duration // 0: the process runs on
		by     int64
		raised bool
	}{
		{0, 1_000_000_000, true},
		{0, 50_000_000, false},
		{time.Minute, 1_000_000_000, true},
		{7 * 24 * time.Hour, 1_000_000_000, true},
		{7 * 24 * time.Hour, 600_000_000, false},
		{time.Hour, 100_000_000, false},
		{30 * 24 * time.Hour, 1_000_000_000, false}, // nobody can tell
	} {
		t.Run(fmt.Sprint(c.off, c.by), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &exchangeable{}
				store.now.Store(ownership.NewMemory())
				m, stop := run(t, store, ownership.Seen{})
				time.Sleep(time.Second)
				if c.off > 0 {
					stop()
					time.Sleep(c.off)
				}
				store.bump.Store(c.by)
				if c.off > 0 {
					m, stop = run(t, store, m.Seen())
				}
				time.Sleep(3 * time.Second)
				if err := m.Unsafe(); (err != nil) != c.raised || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("unsafe is %v, want %q: %v", err, want, c.raised)
				}
				if kept := stop(); kept.Older != c.raised {
					t.Errorf("kept is %+v", kept)
				}
			})
		})
	}
}

// A renewal asks nothing else as long as etcd is as it was, and a member of it that
// lags behind is no reason to refuse it.
func TestRenewalRevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &exchangeable{}
		store.now.Store(ownership.NewMemory())
		m, stop := run(t, store, ownership.Seen{})
		defer stop()
		time.Sleep(time.Second)
		calls := store.calls.Load()
		comeBack(t, store.now.Load(), "b", 0)
		now := m.Seen().Revision
		time.Sleep(20 * time.Second)
		if got := store.calls.Load(); got != calls {
			t.Errorf("%d transactions by itself", got-calls)
		}
		if got := m.Seen().Revision; got <= now {
			t.Errorf("it has seen revision %d after %d, which was not the last", got, now)
		}
		store.lag.Store(1)
		time.Sleep(20 * time.Second)
		if store.calls.Load() == calls {
			t.Error("it has not looked")
		}
		if err := errors.Join(m.Live(), m.Unsafe()); err != nil || m.Seen().Older {
			t.Errorf("a member that lags behind is refused: %v", err)
		}
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
