package robustness

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Short times make much happen in seconds.
const (
	nodeTTL = time.Second // etcd's elections here allow for no less
	renew   = 200 * time.Millisecond
	timeout = 500 * time.Millisecond
)

// agent is a node of the product, as far as its ownership goes.
type agent struct {
	id     string
	number int
	store  ownership.Store
	prefix string

	mu    sync.Mutex
	m     *ownership.Map
	boots int
	stop  func() // ends the Run of m
}

// startAgent begins a node that runs until the test ends.
func startAgent(t *testing.T, number int, store ownership.Store, prefix string) *agent {
	t.Helper()
	a := &agent{id: string(rune('a' + number)), number: number, store: store, prefix: prefix}
	a.restart(true)
	t.Cleanup(func() { a.stop() })
	return a
}

// restart is the process of the node being started again, perhaps with its host:
// the old one still does for a moment what it had begun.
func (a *agent) restart(host bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	config := ownership.Config{
		Prefix: a.prefix, TTL: nodeTTL, Renew: renew, Timeout: timeout,
		// Giving up what it has takes a while.
		Condemned: func(ctx context.Context, _ ownership.Death) error {
			hold(ctx, rand.N(400*time.Millisecond))
			return ctx.Err()
		},
	}
	if host {
		a.boots++
	}
	if a.m != nil {
		config.Seen = a.m.Seen()
		time.AfterFunc(200*time.Millisecond, a.stop)
	}
	m := ownership.New(a.store, ownership.Node{ID: a.id, Host: "host " + a.id, Boot: fmt.Sprint("boot", a.boots)}, config)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = m.Run(ctx)
	}()
	a.m, a.stop = m, func() {
		cancel()
		<-ended
	}
}

// now is the node's present process.
func (a *agent) now() *ownership.Map {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.m
}

// live waits until the node is live.
func (a *agent) live(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := a.now().Live()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// world is some nodes that fight for some volumes.
type world struct {
	seed    uint64
	prefix  string
	agents  []*agent
	volumes []string
	history *history
	log     *log
	store   ownership.Store // the test's own
}

// newWorld registers a node for each store, and makes volumes.
func newWorld(t *testing.T, seed uint64, prefix string, volumes int, own ownership.Store, stores ...ownership.Store) *world {
	t.Helper()
	w := &world{seed: seed, prefix: prefix, history: newHistory(prefix), store: own}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// It goes on after the calls, which may be late.
	var err error
	if w.log, err = follow(t.Context(), own, w.history); err != nil {
		t.Fatal(err)
	}
	for i, s := range stores {
		w.agents = append(w.agents, startAgent(t, i, tap{Store: s, prefix: w.history.prefix}, prefix))
	}
	for _, a := range w.agents {
		if err := a.now().Registered(ctx); err != nil {
			t.Fatal(err)
		}
	}
	m := w.agents[0].now()
	for i := range volumes {
		v, _, err := m.Create(ctx, ownership.Volume{ID: fmt.Sprint("v", i), Name: fmt.Sprint("volume", i), Backend: "fake"})
		if err == nil {
			v.Ref = v.ID
			v, err = m.Ready(ctx, v)
		}
		if err != nil {
			t.Fatal(err)
		}
		w.volumes = append(w.volumes, v.ID)
	}
	return w
}

// fight has every node want, use and give up every volume until ctx ends, or there
// is enough of all. pause is the longest that one does nothing.
func (w *world) fight(ctx context.Context, pause time.Duration) {
	var wg sync.WaitGroup
	for _, a := range w.agents {
		for i, v := range w.volumes {
			f := &fighter{
				world: w, agent: a, volume: v,
				random: rand.New(rand.NewPCG(w.seed, uint64(a.number*100+i))),
			}
			wg.Go(func() {
				for ctx.Err() == nil && !w.history.full(v) {
					f.step(ctx)
					f.pause(ctx, pause)
				}
			})
		}
	}
	wg.Wait()
}

// fighter is what a node does about one volume, one thing at a time. Like a
// process that has no better memory it also uses tokens that it had before.
type fighter struct {
	*world

	agent  *agent
	volume string
	random *rand.Rand

	mine   *ownership.Owner    // as far as it knows
	unsure bool                // a call about it had an unknown outcome
	old    []ownership.Owner   // what it was
	others []ownership.Owner   // the owners it was told of
	asked  []ownership.Request // that were made to it
}

// pause waits for a random time.
func (f *fighter) pause(ctx context.Context, most time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(f.random.Int64N(int64(most)))):
	}
}

// call makes a call of the model, now and then one that is given up soon.
func (f *fighter) call(ctx context.Context, in input, do func(context.Context, *ownership.Map) (output, error)) (output, error) {
	limit := 4 * timeout
	if f.random.IntN(12) == 0 {
		limit = time.Duration(f.random.Int64N(int64(15 * time.Millisecond)))
	}
	// What was begun is not broken off at the end of the fight, only bounded.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	in.Volume, in.Node = f.volume, f.agent.id
	m := f.agent.now()
	return f.history.record(ctx, f.agent.number, in, func(ctx context.Context) (output, error) { return do(ctx, m) })
}

// learn takes what a call told into account.
func (f *fighter) learn(err error, owner *ownership.Owner) {
	switch {
	case err == nil, errors.Is(err, ownership.ErrLost):
		if f.mine != nil {
			f.old = append(f.old, *f.mine)
		}
		f.mine, f.unsure = owner, false
	case errors.Is(err, ownership.ErrUnavailable):
		f.unsure = true
	}
}

func (f *fighter) step(ctx context.Context) {
	n := f.random.IntN(100)
	switch {
	case n < 10 && len(f.old) > 0:
		f.stale(ctx)
	case n < 18 || f.unsure:
		f.read(ctx)
	case f.mine == nil && n < 85:
		f.claim(ctx)
	case f.mine == nil:
		f.owned(ctx)
	case f.mine.Pending != nil:
		f.settle(ctx, *f.mine)
	case n < 40:
		f.check(ctx, f.mine.Token)
	case n < 50:
		f.release(ctx, f.mine.Token)
	case n < 60:
		f.retake(ctx, *f.mine)
	default:
		f.serve(ctx, f.mine.Token)
	}
}

// stale repeats something with a token that is past.
func (f *fighter) stale(ctx context.Context) {
	o := f.old[f.random.IntN(len(f.old))]
	mine, unsure := f.mine, f.unsure
	switch n := f.random.IntN(5); {
	case o.Pending != nil:
		f.settle(ctx, o)
	case n == 0:
		f.release(ctx, o.Token)
	case n == 1:
		f.check(ctx, o.Token)
	case n == 2:
		f.retake(ctx, o)
	case n == 3:
		f.serve(ctx, o.Token)
	case len(f.others) > 0:
		f.seize(ctx, f.others[f.random.IntN(len(f.others))])
	}
	// None of it has changed what the node has, if all is well.
	f.mine, f.unsure = mine, unsure
}

func (f *fighter) read(ctx context.Context) {
	var owner *ownership.Owner
	_, err := f.call(ctx, input{Call: read}, func(ctx context.Context, m *ownership.Map) (output, error) {
		view, err := m.View(ctx, f.volume)
		owner = view.Owner
		return sees(owner), err
	})
	if err != nil {
		return
	}
	if owner == nil || owner.Node != f.agent.id {
		owner = nil
	} else if f.unsure {
		f.adopt(ctx, *owner)
		return
	}
	f.learn(nil, owner)
}

// owned is read, as a node does it that has just started.
func (f *fighter) owned(ctx context.Context) {
	var owner *ownership.Owner
	_, err := f.call(ctx, input{Call: read}, func(ctx context.Context, m *ownership.Map) (output, error) {
		all, err := m.Owned(ctx)
		for _, o := range all {
			if o.Volume == f.volume {
				owner = &o
				return sees(owner), err
			}
		}
		return output{Outcome: notMine}, err
	})
	if err == nil && owner != nil {
		f.adopt(ctx, *owner)
	}
}

// adopt takes a token that the node has for sure: what it gave up before may still
// be on its way.
func (f *fighter) adopt(ctx context.Context, owner ownership.Owner) {
	if owner.Pending != nil {
		f.settle(ctx, owner)
		return
	}
	f.retake(ctx, owner)
}

func (f *fighter) claim(ctx context.Context) {
	var owner ownership.Owner
	_, err := f.call(ctx, input{Call: claim}, func(ctx context.Context, m *ownership.Map) (output, error) {
		var err error
		owner, _, err = m.Claim(ctx, f.volume)
		return output{Token: owner.Token}, err
	})
	var held *ownership.HeldError
	if errors.As(err, &held) && held.Owner.Node != f.agent.id {
		f.others = append(f.others, held.Owner)
	}
	switch {
	case err == nil:
		f.learn(nil, &owner)
	case !errors.As(err, &held):
		f.learn(err, nil)
	case held.Owner.Node == f.agent.id:
		f.adopt(ctx, held.Owner)
	case held.Live && f.random.IntN(5) > 0: // otherwise it has to be refused
		f.ask(ctx, held.Owner)
	default:
		f.seize(ctx, held.Owner)
	}
}

// ask requests the volume, and waits a while.
func (f *fighter) ask(ctx context.Context, owner ownership.Owner) {
	m := f.agent.now()
	ctx, cancel := context.WithTimeout(ctx, 4*timeout)
	defer cancel()
	defer func() {
		if f.random.IntN(4) > 0 { // a node that died does not withdraw
			_ = m.Withdraw(context.WithoutCancel(ctx), owner)
		}
	}()
	wake := m.WatchVolume(ctx, f.volume)
	if m.Request(ctx, owner, "mount") != nil {
		return
	}
	wait := time.After(time.Duration(f.random.Int64N(int64(250 * time.Millisecond))))
	for {
		select {
		case <-wake:
			f.read(ctx)
			if f.mine != nil {
				return
			}
			f.pause(ctx, 50*time.Millisecond)
		case <-wait:
			return
		case <-ctx.Done():
			return
		}
	}
}

// serve hands the volume to whoever asks for it, or has asked once.
func (f *fighter) serve(ctx context.Context, token int64) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	requests, err := f.agent.now().Waiting(ctx)
	if err != nil {
		return
	}
	for _, r := range requests {
		if r.Volume == f.volume {
			f.asked = append(f.asked, r)
			break
		}
	}
	if len(f.asked) > 0 {
		f.handOver(ctx, token, f.asked[len(f.asked)-1-f.random.IntN(min(2, len(f.asked)))])
	}
}

func (f *fighter) handOver(ctx context.Context, token int64, to ownership.Request) {
	_, err := f.call(ctx, input{Call: handOver, Token: token, Other: to.Node}, func(ctx context.Context, m *ownership.Map) (output, error) {
		handed, err := m.HandOver(ctx, f.volume, token, to)
		if !handed {
			return output{Outcome: freed}, err
		}
		return output{}, err
	})
	f.learn(err, nil)
}

func (f *fighter) release(ctx context.Context, token int64) {
	_, err := f.call(ctx, input{Call: release, Token: token}, func(ctx context.Context, m *ownership.Map) (output, error) {
		return output{Outcome: freed}, m.Release(ctx, f.volume, token)
	})
	f.learn(err, nil)
}

func (f *fighter) check(ctx context.Context, token int64) {
	_, err := f.call(ctx, input{Call: check, Token: token}, func(ctx context.Context, m *ownership.Map) (output, error) {
		return output{}, m.Check(ctx, f.volume, token)
	})
	if errors.Is(err, ownership.ErrLost) {
		f.learn(err, nil)
	}
}

func (f *fighter) retake(ctx context.Context, from ownership.Owner) {
	var owner ownership.Owner
	_, err := f.call(ctx, input{Call: retake, Token: from.Token}, func(ctx context.Context, m *ownership.Map) (output, error) {
		var err error
		owner, _, err = m.Retake(ctx, from)
		return output{Token: owner.Token}, err
	})
	f.learn(err, &owner)
	if errors.Is(err, ownership.ErrLost) {
		f.mine = nil
	}
}

// seize begins to take the volume over. How long its owner has been silent is for
// the caller to judge, and not what makes it safe.
func (f *fighter) seize(ctx context.Context, from ownership.Owner) {
	grounds := []ownership.Grounds{ownership.GroundsSilent, ownership.GroundsConfirmed, ownership.GroundsRebooted}[max(0, f.random.IntN(6)-3)]
	var owner ownership.Owner
	_, err := f.call(ctx, input{Call: seize, Token: from.Token, Other: from.Node}, func(ctx context.Context, m *ownership.Map) (output, error) {
		var err error
		owner, _, err = m.Seize(ctx, from, grounds)
		return output{Token: owner.Token}, err
	})
	if err == nil || errors.Is(err, ownership.ErrUnavailable) {
		f.learn(err, &owner)
	}
}

// settle ends a takeover, or a takeover that is another's by now.
func (f *fighter) settle(ctx context.Context, from ownership.Owner) {
	f.pause(ctx, 100*time.Millisecond) // the fence
	var owner ownership.Owner
	_, err := f.call(ctx, input{Call: settle, Token: from.Token}, func(ctx context.Context, m *ownership.Map) (output, error) {
		var err error
		owner, _, err = m.Settle(ctx, from, "seen")
		return output{Token: owner.Token}, err
	})
	f.learn(err, &owner)
	if errors.Is(err, ownership.ErrLost) {
		f.mine = nil
	}
}

// settleDown demands that, once all is well again, every volume can be had: its
// owner gives it up, and another node claims it.
func (w *world) settleDown(t *testing.T) {
	t.Helper()
	for _, a := range w.agents {
		if err := a.live(20 * time.Second); err != nil {
			t.Errorf("node %s is not live again: %v", a.id, err)
		}
	}
	for i, v := range w.volumes {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		f := &fighter{world: w, agent: w.agents[i%len(w.agents)], volume: v, random: rand.New(rand.NewPCG(0, 0))}
		if err := f.obtain(ctx); err != nil {
			t.Errorf("volume %s cannot be had by node %s again: %v", v, f.agent.id, err)
		}
		cancel()
	}
}

// obtain makes the owner give up its volume and claims it.
func (f *fighter) obtain(ctx context.Context) error {
	for {
		f.unsure = false
		view, err := f.agent.now().View(ctx, f.volume)
		if err == nil && view.Owner != nil && view.Owner.Node != f.agent.id {
			for _, a := range f.agents {
				if a.id == view.Owner.Node {
					owner := *f
					owner.agent = a
					if owner.mine = view.Owner; owner.mine.Pending != nil {
						owner.settle(ctx, *owner.mine)
					}
					if owner.mine != nil {
						owner.release(ctx, owner.mine.Token)
					}
				}
			}
		}
		if f.claim(ctx); f.mine != nil {
			return nil
		}
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		f.pause(ctx, 100*time.Millisecond)
	}
}
