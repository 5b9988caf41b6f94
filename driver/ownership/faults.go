package ownership

import (
	"context"
	"errors"
	"sync"
	"time"
)

// A Fault is what happens to one call. The zero value is nothing unusual.
type Fault struct {
	// Latency passes before the call is delivered.
	Latency time.Duration
	// ReplyLatency passes between its delivery and the answer.
	ReplyLatency time.Duration
	// Refused: the call is not delivered and fails at once.
	Refused bool
	// Hang: the call is not delivered and fails when its context ends.
	Hang bool
	// DropReply: the call is delivered, and fails as if it had not been.
	DropReply bool
	// Twice: the call is delivered two times; the caller sees the second answer.
	Twice bool
	// Late: the call fails at once and is delivered that much later.
	Late time.Duration
}

// ErrInjected is what a call fails with that a Fault made fail.
var ErrInjected = errors.New("fault injected")

// Faults is a Store that passes calls on to another one with faults, for tests:
// one node's bad connection.
type Faults struct {
	store Store

	mu     sync.Mutex
	inject func(call string) Fault
	cut    chan struct{} // closed to end the watches there are
}

var _ Store = (*Faults)(nil)

// NewFaults passes everything on as it is, to begin with.
func NewFaults(store Store) *Faults { return &Faults{store: store, cut: make(chan struct{})} }

// Inject has f decide about each call from now on; nil is no faults. A call is
// "read" (a transaction without writes), "txn", "grant", "keepalive", "revoke" or
// "watch".
func (f *Faults) Inject(decide func(call string) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inject = decide
}

// Partition cuts the connection off, or heals it: all calls hang, and the
// watches there are end.
func (f *Faults) Partition(off bool) {
	if !off {
		f.Inject(nil)
		return
	}
	f.Inject(func(string) Fault { return Fault{Hang: true} })
	f.CutWatches()
}

// CutWatches ends the watches there are with an error.
func (f *Faults) CutWatches() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.cut)
	f.cut = make(chan struct{})
}

// deliver runs call as its fault has it.
func deliver[T any](ctx context.Context, f *Faults, name string, call func(context.Context) (T, error)) (T, error) {
	var none T
	f.mu.Lock()
	inject := f.inject
	f.mu.Unlock()
	var fault Fault
	if inject != nil {
		fault = inject(name)
	}
	if err := pass(ctx, fault.Latency); err != nil {
		return none, err
	}
	switch {
	case fault.Refused:
		return none, ErrInjected
	case fault.Hang:
		<-ctx.Done()
		return none, ctx.Err()
	case fault.Late > 0:
		late := context.WithoutCancel(ctx)
		time.AfterFunc(fault.Late, func() { _, _ = call(late) })
		return none, ErrInjected
	}
	v, err := call(ctx)
	if fault.Twice {
		v, err = call(ctx)
	}
	if late := pass(ctx, fault.ReplyLatency); late != nil {
		return none, late
	}
	if fault.DropReply {
		return none, ErrInjected
	}
	return v, err
}

// pass waits, unless ctx ends before.
func pass(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Txn is Store's.
func (f *Faults) Txn(ctx context.Context, txn Txn) (TxnResult, error) {
	name := "read"
	if txn.writes() {
		name = "txn"
	}
	return deliver(ctx, f, name, func(ctx context.Context) (TxnResult, error) { return f.store.Txn(ctx, txn) })
}

// Grant is Store's.
func (f *Faults) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	type grant struct {
		lease int64
		ttl   time.Duration
	}
	g, err := deliver(ctx, f, "grant", func(ctx context.Context) (grant, error) {
		lease, granted, err := f.store.Grant(ctx, ttl)
		return grant{lease, granted}, err
	})
	return g.lease, g.ttl, err
}

// KeepAliveOnce is Store's.
func (f *Faults) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, int64, error) {
	type renewal struct {
		ttl      time.Duration
		revision int64
	}
	r, err := deliver(ctx, f, "keepalive", func(ctx context.Context) (renewal, error) {
		ttl, revision, err := f.store.KeepAliveOnce(ctx, lease)
		return renewal{ttl, revision}, err
	})
	return r.ttl, r.revision, err
}

// Revoke is Store's.
func (f *Faults) Revoke(ctx context.Context, lease int64) error {
	_, err := deliver(ctx, f, "revoke", func(ctx context.Context) (struct{}, error) { return struct{}{}, f.store.Revoke(ctx, lease) })
	return err
}

// Watch is Store's.
func (f *Faults) Watch(ctx context.Context, key string, prefix bool, from int64) <-chan WatchResult {
	out := make(chan WatchResult)
	f.mu.Lock()
	cut := f.cut
	f.mu.Unlock()
	go func() {
		defer close(out)
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		send := func(r WatchResult) bool {
			select {
			case out <- r:
				return r.Err == nil
			case <-ctx.Done():
				return false
			}
		}
		events, err := deliver(ctx, f, "watch", func(context.Context) (<-chan WatchResult, error) {
			return f.store.Watch(inner, key, prefix, from), nil
		})
		if err != nil {
			send(WatchResult{Err: err})
			return
		}
		for {
			select {
			case r, ok := <-events:
				if !ok || !send(r) {
					return
				}
			case <-cut:
				send(WatchResult{Err: ErrInjected})
				return
			}
		}
	}()
	return out
}

// Close is Store's.
func (f *Faults) Close() error { return f.store.Close() }
