package ownershiptest

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

func declareDead(r *rig) {
	a, b := r.join30(named("a")), r.node("b")
	v := a.volume("v")
	a.claim(v.ID)
	said := ownership.Death{Method: "operator", Evidence: "its plug is out", By: "root on host-b", At: time.Now().Add(-time.Minute)}
	_, err := b.DeclareDead(r.Context(), "host-a", said)
	if live, ok := errors.AsType[*ownership.LiveError](err); !ok || live.Host != "host-a" {
		r.Fatalf("got error %v, want a LiveError about host-a", err)
	}
	r.says(err, "host host-a is live, so nothing was changed: switch it off, wait until it is no longer live, and try again; or force it")
	if got := r.keys("fence", ""); len(got) != 0 {
		r.Fatalf("a live node is declared dead: %s", got[0].Key)
	}
	if d, err := b.Died(r.Context(), "a", "boot-a"); d != nil || err != nil {
		r.Errorf("died is %v, %v before the declaration", d, err)
	}
	a.dies()

	for _, host := range []string{"", "nix", "host-"} {
		_, err = b.DeclareDead(r.Context(), host, said)
		r.says(err, `no host "`+host+`" is known; there are: host-a, host-b`)
	}
	twin := identity("a2")
	twin.Host = "host-a"
	r.join30(twin).dies()
	_, err = b.DeclareDead(r.Context(), "host-a", said)
	r.says(err, "2 nodes have the host name host-a; say which one by its id: a, a2")
	r.is(err, ownership.ErrConflict)
	other := said
	other.Boot = "boot-a-2"
	_, err = b.DeclareDead(r.Context(), "a", other)
	r.is(err, ownership.ErrConflict)

	d, err := b.DeclareDead(r.Context(), "a", said)
	r.ok(err)
	want := said
	want.Node, want.Host, want.Boot, want.At, want.Revision = "a", "host-a", "boot-a", said.At.UTC(), d.Revision
	if d.Revision == 0 || !d.At.Equal(want.At) {
		r.Errorf("declared %+v, want %+v", d, want)
	}
	died, err := b.Died(r.Context(), "a", "boot-a")
	r.ok(err)
	if died == nil || !died.At.Equal(want.At) {
		r.Fatalf("died is %+v, want %+v", died, want)
	}
	died.At, d.At = want.At, want.At
	if !reflect.DeepEqual(*died, want) || !reflect.DeepEqual(d, want) {
		r.Errorf("died is %+v and was returned as %+v, want %+v", died, d, want)
	}
	if line := r.line("declared dead", ""); line["to"] != "a" || line["by"] != "root on host-b" || !strings.Contains(line["detail"].(string), "by root on host-b (its plug is out)") {
		r.Errorf("audit line is %v", line)
	}
	if d, err := b.Died(r.Context(), "a", "boot-a-2"); d != nil || err != nil {
		r.Errorf("another boot is dead as well: %v, %v", d, err)
	}
	if d, err := b.Died(r.Context(), "", ""); d != nil || err != nil {
		r.Errorf("nobody is dead: %v, %v", d, err)
	}

	// Said again, the first stays; only force changes it.
	said.Evidence = "again"
	again, err := b.DeclareDead(r.Context(), "a", said)
	r.ok(err)
	if again.Revision != d.Revision || again.Evidence != "its plug is out" {
		r.Errorf("declared again as %+v", again)
	}
	said.Forced = true
	forced, err := b.DeclareDead(r.Context(), "a", said)
	r.ok(err)
	if !forced.Forced || forced.Revision <= d.Revision {
		r.Errorf("forced as %+v", forced)
	}
	said.Forced = false
	again, err = b.DeclareDead(r.Context(), "a", said)
	r.ok(err)
	if !again.Forced {
		r.Error("a forced declaration was taken back")
	}

	nodes, err := b.Nodes(r.Context())
	r.ok(err)
	if len(nodes) != 3 || nodes[0].ID != "a" || nodes[1].ID != "a2" || nodes[2].ID != "b" {
		r.Fatalf("nodes are %+v, want a, a2, b", nodes)
	}
	if n := nodes[0]; n.Live || n.Owned != 1 || n.Death == nil || n.Death.Revision != forced.Revision || n.Host != "host-a" || n.Identities["ebs"] != "i-a" {
		r.Errorf("the dead node is %+v", n)
	}
	if n := nodes[2]; !n.Live || n.Owned != 0 || n.Death != nil {
		r.Errorf("the live node is %+v", n)
	}
	// What is damaged spoils nothing else, and decides nothing.
	r.put(`{`, "node", "a2")
	r.put(`{"node":"a","boot":"another"}`, "fence", "a", "boot-a")
	r.put(`{}`, "own", v.ID)
	nodes, err = b.Nodes(r.Context())
	r.ok(err)
	if len(nodes) != 2 || nodes[0].Death != nil || nodes[0].Owned != 0 {
		r.Errorf("nodes are %+v", nodes)
	}
	_, err = b.Died(r.Context(), "a", "boot-a")
	if _, ok := errors.AsType[*ownership.BrokenError](err); !ok {
		r.Errorf("got error %v, want a BrokenError", err)
	}
}

func declareDeadAmbiguous(r *rig) {
	b := r.node("b")
	for name, fault := range ambiguous {
		id := identity(uuid.NewString())
		r.join30(id).dies()
		b.once(fault)
		d, err := b.DeclareDead(r.Context(), id.ID, ownership.Death{})
		r.ok(err)
		died, err := b.Died(r.Context(), id.ID, id.Boot)
		r.ok(err)
		if died == nil || died.Revision != d.Revision {
			r.Errorf("%s: died is %+v, returned %+v", name, died, d)
		}
	}
}

// A node that registers between the look at it and the declaration is not dead.
func declareDeadMeanwhile(r *rig) {
	a, b := r.node("a"), r.node("b")
	a.dies()
	refused := func() {
		r.Helper()
		_, err := b.DeclareDead(r.Context(), "a", ownership.Death{})
		if _, ok := errors.AsType[*ownership.LiveError](err); !ok {
			r.Errorf("got error %v, want a LiveError", err)
		}
	}
	b.meanwhile(func() { a = r.node("a") })
	refused()
	a.dies()
	b.meanwhile(func() { r.put(`{"id":"a"}`, "live", "a") })
	refused()
	r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: r.key("live", "a")}}})
	// Restarted since, it is the next boot that is declared; the old one is not.
	b.meanwhile(func() { r.join30(restarted("a")).dies() })
	d, err := b.DeclareDead(r.Context(), "a", ownership.Death{})
	r.ok(err)
	if d.Boot != "boot-a-2" || len(r.keys("fence", "")) != 1 {
		r.Errorf("declared %+v, there are %d declarations", d, len(r.keys("fence", "")))
	}
	// What another one says counts, too.
	r.node("c").dies()
	other := r.node("other")
	b.meanwhile(func() {
		_, err := other.DeclareDead(r.Context(), "c", ownership.Death{Forced: true, By: "other"})
		r.ok(err)
	})
	d, err = b.DeclareDead(r.Context(), "c", ownership.Death{By: "b"})
	r.ok(err)
	if !d.Forced || d.By != "other" {
		r.Errorf("declared %+v, want what the other one said", d)
	}
}

// condemned counts the calls of Config.Condemned, and fails them while told to.
type condemned struct {
	mu     sync.Mutex
	err    error
	deaths []ownership.Death
}

func (c *condemned) call(_ context.Context, d ownership.Death) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deaths = append(c.deaths, d)
	return c.err
}

func (c *condemned) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *condemned) calls() []ownership.Death {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deaths
}

// A node that was declared dead and comes back gives up what it has before it
// counts as live.
func condemnedBack(r *rig) {
	a, b := r.node("a"), r.node("b")
	v, w := a.volume("v"), a.volume("w")
	o := a.claim(v.ID)
	kept := a.claim(w.ID)
	a.dies()
	d, err := b.DeclareDead(r.Context(), "host-a", ownership.Death{Evidence: "off", By: "root"})
	r.ok(err)
	p := b.seize(o, ownership.GroundsConfirmed)

	var c condemned
	c.fail(errors.New("volume v is still mounted"))
	a = r.join(identity("a"), ownership.Config{TTL: 30 * time.Second, Renew: 200 * time.Millisecond, Condemned: c.call})
	r.eventually("a third attempt", func() bool { return len(c.calls()) >= 3 })
	if len(r.keys("live", "a")) != 0 {
		r.Error("live although it has not given up its volumes")
	}
	r.is(a.Live(), ownership.ErrUnavailable)
	r.says(a.Live(), "host host-a was declared dead at ")
	r.says(a.Live(), " by root (off), and has not yet given up its volumes: volume v is still mounted")
	if got := c.calls()[0]; got.Revision != d.Revision || got.Evidence != "off" {
		r.Errorf("condemned by %+v, want %+v", got, d)
	}
	if died, err := b.Died(r.Context(), "a", "boot-a"); died == nil || err != nil {
		r.Errorf("the declaration ended early: %v, %v", died, err)
	}
	c.fail(nil)
	a.registered()
	r.ok(a.Live())
	if got := r.keys("fence", ""); len(got) != 0 {
		r.Errorf("the declaration is still there: %s", got[0].Key)
	}
	calls := len(c.calls())
	r.stays(p)
	r.ok(a.Check(r.Context(), w.ID, kept.Token))
	r.is(a.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
	_, _, err = a.Claim(r.Context(), v.ID)
	r.held(err, "b", true)
	time.Sleep(500 * time.Millisecond)
	if got := len(c.calls()); got != calls {
		r.Errorf("condemned %d times more after the end of it", got-calls)
	}
}

// Nobody to ask is no permission.
func condemnedNobody(r *rig) {
	a, b := r.node("a"), r.node("b")
	a.dies()
	_, err := b.DeclareDead(r.Context(), "host-a", ownership.Death{})
	r.ok(err)
	a = r.join(identity("a"), ownership.Config{})
	r.eventually("the refusal", func() bool { return contains(a.Live(), "was declared dead") })
	ctx, cancel := context.WithTimeout(r.Context(), 500*time.Millisecond)
	defer cancel()
	r.says(a.Registered(ctx), "host host-a was declared dead at ")
	r.says(a.Live(), "; it does not register again")
	if len(r.keys("live", "a")) != 0 || len(r.keys("fence", "a")) != 1 {
		r.Error("it has registered, or ended the declaration")
	}
	// The next boot is another matter: nothing of this one is open there.
	a.stop()
	r.join30(restarted("a"))
	if len(r.keys("fence", "a", "boot-a")) != 1 {
		r.Error("the declaration of the former boot has gone")
	}
}

// A declaration that comes between a node's look and its registration counts.
func condemnedMeanwhile(r *rig) {
	b := r.node("b")
	r.node("a").dies()
	var c condemned
	store := r.cluster.Connect()
	r.Cleanup(func() { _ = store.Close() })
	bad := ownership.NewFaults(store)
	var txns atomic.Int32
	bad.Inject(func(call string) ownership.Fault {
		if call == "txn" && txns.Add(1) == 1 { // the first that may write is the registration
			if _, err := b.DeclareDead(r.Context(), "a", ownership.Death{}); err != nil {
				r.Error(err)
			}
		}
		return ownership.Fault{}
	})
	m := ownership.New(bad, identity("a"), ownership.Config{Prefix: r.cluster.Prefix, TTL: 30 * time.Second, Condemned: c.call, Seen: b.Seen()})
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	limit, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	r.ok(m.Registered(limit))
	if got := len(c.calls()); got != 1 {
		r.Errorf("condemned %d times, want once", got)
	}
	cancel()
	<-done
}

// A forced declaration makes a live node lapse at once.
func condemnedLive(r *rig) {
	var c condemned
	a := r.join(identity("a"), ownership.Config{TTL: 60 * time.Second, Renew: 20 * time.Second, Condemned: c.call})
	a.registered()
	b := r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	<-a.Registrations()
	for i := range 2 {
		c.fail(errors.New("not yet"))
		if i == 1 {
			a.bad.CutWatches()
		}
		_, err := b.DeclareDead(r.Context(), "a", ownership.Death{Forced: true})
		r.ok(err)
		start := time.Now()
		calls := len(c.calls())
		r.eventually("the end of its lease", func() bool { return len(r.keys("live", "a")) == 0 && len(c.calls()) > calls })
		if took := time.Since(start); took > 15*time.Second {
			r.Errorf("it took %v", took)
		}
		r.is(a.Live(), ownership.ErrUnavailable)
		_, _, err = a.Claim(r.Context(), v.ID)
		r.is(err, ownership.ErrUnavailable)
		r.stays(o)
		c.fail(nil)
		select {
		case <-a.Registrations():
		case <-time.After(time.Minute):
			r.Fatal("not registered again")
		}
		r.ok(a.Live())
		if len(r.keys("fence", "")) != 0 {
			r.Error("the declaration is still there")
		}
	}
	r.ok(a.Check(r.Context(), v.ID, o.Token))
}

func registrations(r *rig) {
	n := r.nodeTTL("a", 30*time.Second)
	select {
	case <-n.Registrations():
	case <-time.After(time.Minute):
		r.Fatal("no wake-up after the first registration")
	}
	select {
	case <-n.Registrations():
		r.Fatal("a wake-up without a registration")
	case <-time.After(100 * time.Millisecond):
	}
	r.ok(r.store.Revoke(r.Context(), r.keys("live", "a")[0].Lease))
	select {
	case <-n.Registrations():
	case <-time.After(time.Minute):
		r.Fatal("no wake-up after the second registration")
	}
}

func silence(r *rig) {
	b := r.node("b")
	a := r.node("a")
	r.eventually("seeing that a is live", func() bool { _, ok := b.Silence("a"); return !ok })
	if _, ok := b.Silence("b"); ok {
		r.Error("silent itself")
	}
	time.Sleep(300 * time.Millisecond)
	start := time.Now()
	a.dies()
	r.eventually("noticing that a is gone", func() bool { _, ok := b.Silence("a"); return ok })
	time.Sleep(300 * time.Millisecond)
	silent, ok := b.Silence("a")
	if most := time.Since(start); !ok || silent < 300*time.Millisecond || silent > most {
		r.Errorf("silent for %v, %v; want between 300ms and %v", silent, ok, most)
	}
	// Who was never seen is silent since this node can see.
	if silent, ok := b.Silence("never"); !ok || silent < 600*time.Millisecond {
		r.Errorf("the unknown node is silent for %v, %v", silent, ok)
	}
	cut := time.Now()
	b.bad.CutWatches()
	r.eventually("the count from the beginning", func() bool {
		silent, ok := b.Silence("never")
		return ok && silent <= time.Since(cut)
	})
	r.node("a")
	r.eventually("seeing that a is back", func() bool { _, ok := b.Silence("a"); return !ok })
	r.ok(b.Storm())

	nodes := r.nodes(4)
	r.eventually("seeing the others", func() bool {
		for _, n := range nodes {
			if _, ok := b.Silence(n.Node().ID); ok {
				return false
			}
		}
		return true
	})
	for _, n := range nodes {
		n.dies()
	}
	r.eventually("the storm", func() bool { return b.Storm() != nil })
	// a lapsed as well.
	if storm, ok := errors.AsType[*ownership.StormError](b.Storm()); !ok || storm.Lapsed < 4 || storm.Of != 6 {
		r.Errorf("storm is %+v, want all but one of 6", b.Storm())
	}
}
