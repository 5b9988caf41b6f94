package ownership

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// An Observer keeps the map in memory, for those who look often: it lists the keys once
// and then follows what changes. It decides nothing, and nothing may be decided on what it
// says, which is always of a moment ago.
//
// It asks nothing of etcd before somebody asks it, and stops some minutes after the last
// one has.
type Observer struct {
	m *Map

	wake  chan struct{}
	users atomic.Int64 // that wait or follow
	asked atomic.Int64 // when it was asked last, in Unix nanoseconds

	mu     sync.Mutex
	mirror *mirror // nil before the first list
	whole  bool    // nothing can have happened unseen
	why    error   // why it is not
	// heard is when etcd reported last; once the watch is broken, until when the mirror
	// was true.
	heard   time.Time
	changed chan struct{} // closed and replaced when something has been reported

	state   *State
	version *mirror // that state was made of
	made    time.Time

	events      []Event // all after base
	first, base int64   // first is what base was in the beginning
}

const (
	// batch is how old a State may be: of ten thousand volumes, one takes a while to make.
	batch = 20 * time.Millisecond
	// idle is for how long it goes on when nobody asks.
	idle = 5 * time.Minute
	// again is how often everything is listed anew: watches have lost events.
	again = 10 * time.Minute
)

// NewObserver makes one. It needs Run, and the Map its own.
func NewObserver(m *Map) *Observer {
	return &Observer{m: m, wake: make(chan struct{}, 1), changed: make(chan struct{}), why: errors.New("etcd has not been asked yet")}
}

// enter says that somebody asks; what it returns, that he has his answer.
func (o *Observer) enter() (leave func()) {
	o.users.Add(1)
	o.ask()
	return func() {
		o.ask()
		o.users.Add(-1)
	}
}

func (o *Observer) ask() {
	o.asked.Store(time.Now().UnixNano())
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *Observer) idle() bool {
	return o.users.Load() == 0 && time.Now().UnixNano()-o.asked.Load() >= int64(idle)
}

// State returns what is known, at most 20 ms old while etcd answers, without asking it.
// stale is for how long etcd has not been heard from, 0 if it is followed. ok is false as
// long as nothing is known; the first call, and one that comes minutes after the last one,
// makes that begin, see Wait.
func (o *Observer) State() (s *State, stale time.Duration, ok bool) {
	o.ask()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mirror == nil {
		return nil, 0, false
	}
	return o.publish(), o.stale(), true
}

// publish returns a State, the last one if it is not old.
func (o *Observer) publish() *State {
	now := time.Now()
	old := o.version != o.mirror || o.state.Revision < o.mirror.revision
	if old && (o.version != o.mirror || now.Sub(o.made) >= batch) {
		o.state, o.version, o.made = o.mirror.state(), o.mirror, now
	}
	return o.state
}

func (o *Observer) stale() time.Duration {
	heard := o.heard
	if o.whole {
		// The watch may not have noticed yet: a node's renewals do.
		if at := time.Unix(o.m.at.Load(), 0); at.After(heard) {
			heard = at
		}
		if time.Since(heard) < max(o.m.cfg.TTL, 2*time.Second) && o.m.trusted() == nil {
			return 0
		}
	}
	return max(time.Since(heard), time.Millisecond)
}

// Wait waits until etcd is followed and a State is later than a revision, and returns it.
// 0 is any.
func (o *Observer) Wait(ctx context.Context, after int64) (*State, error) {
	defer o.enter()()
	for {
		o.mu.Lock()
		changed, wait := o.changed, time.Duration(0)
		if o.whole && o.mirror.revision > after {
			if s := o.publish(); s.Revision > after {
				o.mu.Unlock()
				return s, nil
			}
			wait = max(time.Millisecond, batch-time.Since(o.made))
		}
		o.mu.Unlock()
		if err := o.await(ctx, changed, wait); err != nil {
			return nil, err
		}
	}
}

// await waits for a change, or for some time if that is not 0.
func (o *Observer) await(ctx context.Context, changed <-chan struct{}, wait time.Duration) error {
	var passed <-chan time.Time
	if wait != 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		changed, passed = nil, timer.C
	}
	select {
	case <-changed:
	case <-passed:
	case <-ctx.Done():
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.whole && o.why != nil {
			return unavailable(o.why)
		}
		return context.Cause(ctx)
	}
	return nil
}

// following waits until etcd is followed.
func (o *Observer) following(ctx context.Context) error {
	for {
		o.mu.Lock()
		whole, changed := o.whole, o.changed
		o.mu.Unlock()
		if whole {
			return nil
		}
		if err := o.await(ctx, changed, 0); err != nil {
			return err
		}
	}
}

// changes returns a channel that is closed when etcd has reported something.
func (o *Observer) changes() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.changed
}

// tell wakes those up who wait.
func (o *Observer) tell() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// Run follows etcd while somebody asks, until ctx ends; it returns for no other reason.
func (o *Observer) Run(ctx context.Context) error {
	wait := backoff{first: 50 * time.Millisecond, most: o.m.cfg.Timeout}
	for {
		for o.idle() && ctx.Err() == nil {
			select {
			case <-o.wake:
			case <-ctx.Done():
			}
			wait.next = 0
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		whole, err := o.follow(ctx)
		o.broke(err)
		if whole {
			wait.next = 0
		}
		if err != nil && !wait.sleep(ctx) {
			return context.Cause(ctx)
		}
	}
}

// broke ends that the mirror is true.
func (o *Observer) broke(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.whole {
		o.heard = time.Now().Add(-o.stale())
	}
	if o.whole, o.why = false, err; err == nil {
		o.why = errors.New("etcd has not been asked yet")
	}
}

// follow follows one watch to its end, which is an error, or that nobody asks any more.
// True if the mirror was whole for a time.
func (o *Observer) follow(ctx context.Context) (whole bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begins := time.AfterFunc(o.m.cfg.Timeout, func() { cancel(errors.New("etcd does not report changes")) })
	defer begins.Stop()
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	changes := o.m.store.Watch(ctx, o.m.root, true, 0)
	listed := time.Time{}
	for {
		select {
		case res, ok := <-changes:
			switch {
			case !ok:
				return whole, context.Cause(ctx)
			case res.Err != nil:
				return whole, res.Err
			}
			begins.Stop()
			if !whole {
				// After the watch has begun, so that nothing happens in between unseen.
				if err := o.list(ctx); err != nil {
					return whole, err
				}
				listed, whole = time.Now(), true
			}
			o.apply(res)
		case <-minute.C:
			if o.idle() {
				return whole, nil
			}
			if err := o.m.trusted(); err != nil {
				return whole, err
			}
			if time.Since(listed) >= again {
				if err := o.list(ctx); err != nil {
					return whole, err
				}
				listed = time.Now()
			}
		}
	}
}

// list reads everything anew, and the events since the last time.
func (o *Observer) list(ctx context.Context) error {
	var reads []Op
	for _, prefix := range o.m.mirrored() {
		reads = append(reads, getPrefix(prefix))
	}
	o.mu.Lock()
	old := o.mirror
	o.mu.Unlock()
	if old != nil {
		lines := getPrefix(o.m.lineKey(""))
		lines.After, lines.Limit = old.revision, recent
		reads = append(reads, lines)
	}
	res, err := o.m.read(ctx, reads...)
	if err != nil {
		return err
	}
	fresh := newMirror(o.m)
	fresh.revision, fresh.at = res.Revision, time.Now()
	for i := range o.m.mirrored() {
		for _, kv := range res.Results[i].KVs {
			fresh.put(kv)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mirror = fresh; old == nil {
		o.first, o.base = fresh.revision, fresh.revision
	} else if lines := res.Results[len(reads)-1].KVs; len(lines) == recent {
		o.events, o.first, o.base = nil, fresh.revision, fresh.revision // they can be had from etcd
	} else {
		for _, kv := range lines {
			o.remember(kv)
		}
	}
	o.heard, o.whole, o.why = time.Now(), true, nil
	o.tell()
	return nil
}

// apply takes over what a watch reports.
func (o *Observer) apply(res WatchResult) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.heard = time.Now()
	lines := o.m.lineKey("")
	revision := o.mirror.revision
	for _, ev := range res.Events {
		switch {
		case ev.KV.ModRevision <= revision: // it is in the list
			continue
		case len(ev.KV.Key) > len(lines) && ev.KV.Key[:len(lines)] == lines:
			if !ev.Deleted {
				o.remember(ev.KV)
			}
		case ev.Deleted:
			o.mirror.remove(ev.KV.Key)
		default:
			o.mirror.put(ev.KV)
		}
		o.mirror.revision, o.mirror.at = ev.KV.ModRevision, o.heard
	}
	if len(res.Events) > 0 {
		o.tell()
	}
}
