package ownershiptest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// named is an identity by which storage systems know the node, too.
func named(id string) ownership.Node {
	n := identity(id)
	n.Identities = map[string]string{"rbd": "10.0.0." + id, "ebs": "i-" + id}
	return n
}

// restarted is the same node after its host was restarted.
func restarted(id string) ownership.Node {
	n := named(id)
	n.Boot += "-2"
	return n
}

// join30 starts a node with a long lease and waits until it is registered.
func (r *rig) join30(id ownership.Node) *node {
	r.Helper()
	n := r.join(id, ownership.Config{TTL: 30 * time.Second, Renew: 2500 * time.Millisecond})
	n.registered()
	return n
}

// dies ends the process, and its lease as well.
func (n *node) dies() {
	n.r.Helper()
	n.stop()
	n.r.ok(n.Leave(n.r.Context()))
}

func (n *node) seize(o ownership.Owner, grounds ownership.Grounds) ownership.Owner {
	n.r.Helper()
	got, _, err := n.Seize(n.r.Context(), o, grounds)
	n.r.ok(err)
	return got
}

// meanwhile does something between what the next write of a node was decided by
// and the write.
func (n *node) meanwhile(f func()) {
	var once sync.Once
	n.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			once.Do(f)
		}
		return ownership.Fault{}
	})
}

// stays demands that a volume still has that owner under that token.
func (r *rig) stays(o ownership.Owner) {
	r.Helper()
	r.ownedBy(o.Volume, o.Node, o.Token)
}

// line returns the only audit line of that kind about a volume.
func (r *rig) line(what, vid string) map[string]any {
	r.Helper()
	var found []map[string]any
	for _, kv := range r.keys("ev", "") {
		var line map[string]any
		r.ok(json.Unmarshal(kv.Value, &line))
		if line["what"] == what && (vid == "" || line["volume"] == vid) {
			found = append(found, line)
		}
	}
	if len(found) != 1 {
		r.Fatalf("audit lines %q are %v, want one", what, found)
	}
	return found[0]
}

func seize(r *rig) {
	a, b := r.join30(named("a")), r.join30(named("b"))
	if live := string(r.keys("live", "a")[0].Value); strings.Contains(live, "i-a") {
		r.Errorf("every node's watch is told the identities: %s", live)
	}
	v := a.volume("v")
	o := a.claim(v.ID)
	_, _, err := b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrConflict)
	r.says(err, "host host-a is live: changed by another node")
	r.stays(o)
	a.dies()

	for _, token := range []int64{o.Token - 1, o.Token + 1, 0} {
		stale := o
		stale.Token = token
		_, _, err := b.Seize(r.Context(), stale, ownership.GroundsSilent)
		r.is(err, ownership.ErrConflict)
	}
	_, _, err = b.Seize(r.Context(), o, "boredom")
	r.says(err, `"boredom" are no grounds`)
	r.stays(o)

	p, got, err := b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.ok(err)
	want := &ownership.Pending{
		Node: "a", Host: "host-a", Boot: "boot-a", Token: o.Token,
		Identities: named("a").Identities, Grounds: ownership.GroundsSilent,
	}
	if got.ID != v.ID || p.Node != "b" || p.Host != "host-b" || p.Boot != "boot-b" || p.Unclean || p.Clean || p.Token <= o.Token || !reflect.DeepEqual(p.Pending, want) {
		r.Errorf("seized as %+v with pending %+v, want pending %+v", p, p.Pending, want)
	}
	if now := r.owner(v.ID); !reflect.DeepEqual(*now, p) {
		r.Errorf("recorded %+v, returned %+v", now, p)
	}
	if line := r.line("take over", v.ID); line["from"] != "a" || line["node"] != "b" || line["token"] != float64(o.Token) || line["detail"] != "silent: host host-a" {
		r.Errorf("audit line is %v", line)
	}
	r.is(a.Release(r.Context(), v.ID, o.Token), ownership.ErrLost)
	r.is(a.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
	_, _, err = b.Seize(r.Context(), p, ownership.GroundsSilent)
	r.says(err, "this node owns it")

	s, got, err := b.Settle(r.Context(), p, "detached i-a from it")
	r.ok(err)
	if got.ID != v.ID || s.Pending != nil || !s.Unclean || s.Clean || s.From != "" || s.Node != "b" || s.Boot != "boot-b" || s.Token <= p.Token {
		r.Errorf("settled as %+v", s)
	}
	if now := r.owner(v.ID); !reflect.DeepEqual(*now, s) {
		r.Errorf("recorded %+v, returned %+v", now, s)
	}
	if line := r.line("fenced", v.ID); line["from"] != "a" || line["detail"] != "detached i-a from it" || line["token"] != float64(p.Token) {
		r.Errorf("audit line is %v", line)
	}
	_, _, err = b.Settle(r.Context(), p, "again")
	r.is(err, ownership.ErrLost)
	_, _, err = b.Settle(r.Context(), s, "what is settled")
	r.is(err, ownership.ErrLost)
	r.stays(s)

	// It is unclean until somebody has closed it.
	again, _, err := b.Retake(r.Context(), ownership.Owner{Volume: v.ID, Node: "b", Token: s.Token})
	r.ok(err)
	if !again.Unclean || !r.owner(v.ID).Unclean {
		r.Errorf("retaken as %+v, want it unclean", again)
	}
	r.ok(b.Release(r.Context(), v.ID, again.Token))
	if o := b.claim(v.ID); o.Unclean {
		r.Error("unclean after it was released")
	}
}

func seizeAmbiguous(r *rig) {
	b := r.node("b")
	for name, fault := range ambiguous {
		a := r.node("a")
		v := a.volume(name)
		o := a.claim(v.ID)
		a.dies()
		b.once(fault)
		p := b.seize(o, ownership.GroundsSilent)
		r.stays(p)
		b.once(fault)
		s, _, err := b.Settle(r.Context(), p, "seen")
		r.ok(err)
		r.stays(s)
		for _, what := range []string{"take over", "fenced"} {
			if line := r.line(what, v.ID); line["from"] != "a" {
				r.Errorf("%s: audit line is %v", name, line)
			}
		}
	}
}

// A takeover whose every answer was lost is found by the next attempt, and by no
// other node.
func seizeLate(r *rig) {
	a, b := r.node("a"), r.node("b")
	c := r.join30(ownership.Node{ID: "c", Host: "host-c", Boot: "boot-b"}) // a namespace on the same host
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	b.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			return ownership.Fault{Late: 200 * time.Millisecond}
		}
		return ownership.Fault{}
	})
	_, _, err := b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrUnavailable)
	b.bad.Inject(nil)
	r.eventually("the late takeover", func() bool { return r.owner(v.ID).Node == "b" })
	p := *r.owner(v.ID)
	_, _, err = c.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrConflict)
	got := b.seize(o, ownership.GroundsSilent)
	if !reflect.DeepEqual(got, p) {
		r.Errorf("found %+v, want %+v", got, p)
	}
	r.stays(p)
	// What is settled is not a takeover any more.
	s, _, err := b.Settle(r.Context(), p, "seen")
	r.ok(err)
	_, _, err = b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrConflict)
	r.stays(s)
}

func seizeRace(r *rig) {
	nodes := r.nodes(6)
	for i := range 8 {
		a := r.node("a")
		v := a.volume(fmt.Sprint("v", i))
		o := a.claim(v.ID)
		a.dies()
		var (
			mu      sync.Mutex
			winners []ownership.Owner
		)
		together(nodes, func(_ int, n *node) {
			p, _, err := n.Seize(r.Context(), o, ownership.GroundsSilent)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, p)
			} else if !errors.Is(err, ownership.ErrConflict) {
				r.Error(err)
			}
		})
		if len(winners) != 1 {
			r.Fatalf("winners are %+v, want one", winners)
		}
		r.stays(winners[0])
	}
}

// What the owner does between the decision and the record of it counts.
func seizeMeanwhile(r *rig) {
	b, other := r.node("b"), r.node("other")
	for id, c := range map[string]struct {
		grounds ownership.Grounds
		then    func(id string, o ownership.Owner)
		want    string
	}{
		"back":           {ownership.GroundsSilent, func(id string, _ ownership.Owner) { r.join30(named(id)) }, "is live"},
		"back-restarted": {ownership.GroundsSilent, func(id string, _ ownership.Owner) { r.join30(restarted(id)) }, "is live"},
		"back-just-now": {ownership.GroundsSilent, func(id string, _ ownership.Owner) {
			r.put(`{"id":"`+id+`"}`, "live", id)
		}, "is live"},
		"taken": {ownership.GroundsSilent, func(_ string, o ownership.Owner) { other.seize(o, ownership.GroundsSilent) }, "changed by another node"},
		"retaken": {ownership.GroundsSilent, func(id string, o ownership.Owner) {
			_, _, err := r.join30(named(id)).Retake(r.Context(), o)
			r.ok(err)
		}, "changed by another node"},
		"released": {ownership.GroundsSilent, func(id string, o ownership.Owner) {
			a := r.join30(named(id))
			r.ok(a.Release(r.Context(), o.Volume, o.Token))
			a.dies()
		}, "changed by another node"},
		"acquitted": {ownership.GroundsConfirmed, func(id string, _ ownership.Owner) {
			a := r.join(named(id), ownership.Config{TTL: 30 * time.Second, Condemned: func(context.Context, ownership.Death) error { return nil }})
			a.registered()
			a.dies()
		}, "is not declared dead any more"},
		"acquitted-just-now": {ownership.GroundsConfirmed, func(id string, _ ownership.Owner) {
			r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: r.key("fence", id, "boot-"+id)}}})
		}, "is not declared dead any more"},
	} {
		a := r.join30(named(id))
		v := a.volume(id)
		o := a.claim(v.ID)
		a.dies()
		if c.grounds == ownership.GroundsConfirmed {
			_, err := b.DeclareDead(r.Context(), id, ownership.Death{})
			r.ok(err)
		}
		b.meanwhile(func() { c.then(id, o) })
		_, _, err := b.Seize(r.Context(), o, c.grounds)
		b.bad.Inject(nil)
		r.is(err, ownership.ErrConflict)
		r.says(err, c.want)
		if now := r.owner(v.ID); now != nil && now.Node == "b" {
			r.Errorf("%s: taken over", id)
		}
	}
}

// Who was back and has gone again is to be fenced by the names it had last.
func seizeIdentities(r *rig) {
	a, b := r.join30(named("a")), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	b.meanwhile(func() {
		next := named("a")
		next.Identities = map[string]string{"ebs": "i-other"}
		r.join30(next).dies()
	})
	p := b.seize(o, ownership.GroundsSilent)
	if got := p.Pending.Identities; len(got) != 2 || got["ebs"] != "i-other" || got["rbd"] != "10.0.0.a" {
		r.Errorf("identities are %v, want those of the last registration, and of the one before what that did not know", got)
	}
}

// A name that is learnt later is in the record before Identified returns, and stays
// there, whatever its process, or the next one, comes to know.
func identified(r *rig) {
	a, b := r.node("a"), r.node("b")
	names := func() map[string]string {
		r.Helper()
		all, err := b.Nodes(r.Context())
		r.ok(err)
		return all[0].Identities
	}
	r.ok(a.Identified(r.Context(), "ebs", "i-1"))
	if got := names(); len(got) != 1 || got["ebs"] != "i-1" {
		r.Fatalf("names are %v", got)
	}
	before := r.keys("node", "a")[0].ModRevision
	r.ok(a.Identified(r.Context(), "ebs", "i-1"))
	if now := r.keys("node", "a")[0].ModRevision; now != before {
		r.Error("what is there already was written again")
	}
	for what, fault := range ambiguous {
		a.once(fault)
		r.ok(a.Identified(r.Context(), "san", what))
		if got := names(); len(got) != 2 || got["san"] != what {
			r.Errorf("%s: names are %v", what, got)
		}
	}
	a.followed(func() { r.put(`{"id":"a","host":"host-a","boot":"boot-a","identities":{"x":"y"}}`, "node", "a") })
	r.ok(a.Identified(r.Context(), "san", "later"))
	if got := names(); len(got) != 2 || got["san"] != "later" || got["x"] != "y" {
		r.Errorf("written meanwhile: names are %v", got)
	}
	a.bad.Inject(nil)

	// What this process knows is in each of its registrations, and what it does not know
	// stays from before.
	r.put(`{"id":"a","host":"host-a","boot":"boot-a","identities":{"x":"z"}}`, "node", "a")
	r.ok(r.store.Revoke(r.Context(), r.keys("live", "a")[0].Lease))
	r.eventually("the next registration", func() bool { return len(names()) == 3 })
	if got := names(); got["ebs"] != "i-1" || got["san"] != "later" || got["x"] != "z" {
		r.Errorf("registered again: names are %v", got)
	}
	a.dies()
	r.is(a.Identified(r.Context(), "san", "later"), ownership.ErrUnavailable)
	r.join30(identity("a"))
	if got := names(); len(got) != 3 {
		r.Errorf("the next process: names are %v", got)
	}
	// Of a live node's name there is no second one, such as by settings that were copied.
	r.says(b.Identified(r.Context(), "ebs", "i-1"), `backend ebs knows both this host and host host-a by the name "i-1"`)
	if all, err := b.Nodes(r.Context()); err != nil || all[1].Identities != nil {
		r.Errorf("nodes are %+v, %v", all, err)
	}
	r.ok(b.Identified(r.Context(), "other", "i-1"))
	v := b.volume("v")
	c := r.node("c")
	o := c.claim(v.ID)
	r.ok(c.Identified(r.Context(), "ebs", "i-c"))
	c.dies()
	if p := b.seize(o, ownership.GroundsSilent); p.Pending.Identities["ebs"] != "i-c" {
		r.Errorf("to be fenced by %v", p.Pending.Identities)
	}
}

// A node learns its cluster before it registers.
func joins(r *rig) {
	m := ownership.New(r.store, identity("a"), ownership.Config{Prefix: r.cluster.Prefix})
	cluster, err := m.Join(r.Context())
	r.ok(err)
	if cluster == "" || len(r.keys("live", "")) != 0 {
		r.Fatalf("joined cluster %q", cluster)
	}
	if got := r.node("b").Cluster(); got != cluster {
		r.Errorf("the next one is in %s, not %s", got, cluster)
	}
	known := ownership.New(ownership.NewMemory().Client(), identity("c"), ownership.Config{Seen: ownership.Seen{Cluster: "known"}})
	if got, err := known.Join(r.Context()); err != nil || got != "known" {
		r.Errorf("one that knows its cluster: got %s, %v", got, err)
	}
	broken := ownership.NewMemory().Client()
	broken.Inject(func(string) ownership.Fault { return ownership.Fault{Refused: true} })
	_, err = ownership.New(broken, identity("d"), ownership.Config{}).Join(r.Context())
	r.is(err, ownership.ErrUnavailable)
}

func seizeRebooted(r *rig) {
	a, b := r.join30(named("a")), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	refused := func(want string) {
		r.Helper()
		_, _, err := b.Seize(r.Context(), o, ownership.GroundsRebooted)
		r.is(err, ownership.ErrConflict)
		r.says(err, want)
		r.stays(o)
	}
	refused("host host-a was not restarted")
	guessed := o
	guessed.Boot = "boot-guessed"
	_, _, err := b.Seize(r.Context(), guessed, ownership.GroundsRebooted)
	r.is(err, ownership.ErrConflict)
	r.stays(o)
	next := r.join30(restarted("a"))
	refused("host host-a is live")
	next.dies()
	p := b.seize(o, ownership.GroundsRebooted)
	if p.Pending.Grounds != ownership.GroundsRebooted || p.Pending.Boot != "boot-a" {
		r.Errorf("pending is %+v", p.Pending)
	}
	_, _, err = b.Settle(r.Context(), p, "restarted")
	r.ok(err)
}

func seizeConfirmed(r *rig) {
	a, b := r.join30(named("a")), r.node("b")
	v, w := a.volume("v"), a.volume("w")
	o, ow := a.claim(v.ID), a.claim(w.ID)
	refused := func(o ownership.Owner, want string) {
		r.Helper()
		_, _, err := b.Seize(r.Context(), o, ownership.GroundsConfirmed)
		r.is(err, ownership.ErrConflict)
		r.says(err, want)
		r.stays(o)
	}
	a.dies()
	refused(o, "host host-a is not declared dead any more")
	_, err := b.DeclareDead(r.Context(), "host-a", ownership.Death{})
	r.ok(err)
	// Only what is declared dead counts, and only if it is not live.
	r.put(`{"id":"a","boot":"boot-a"}`, "live", "a")
	refused(o, "host host-a is live")
	r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: r.key("live", "a")}}})
	p := b.seize(o, ownership.GroundsConfirmed)
	if p.Pending.Grounds != ownership.GroundsConfirmed {
		r.Errorf("pending is %+v", p.Pending)
	}

	// A forced declaration counts for a live node too, but not for its next boot.
	_, err = b.DeclareDead(r.Context(), "host-a", ownership.Death{Forced: true})
	r.ok(err)
	next := r.join30(restarted("a"))
	refused(ow, "host host-a is live")
	r.ok(next.Live())
	next.dies()
	r.put(`{"id":"a","host":"host-a","boot":"boot-a"}`, "node", "a")
	r.put(`{"id":"a","boot":"boot-a"}`, "live", "a")
	b.seize(ow, ownership.GroundsConfirmed)
}

// A taker dies before it has settled: the next one has the same to fence, and the
// one that was dead has lost it.
func seizePending(r *rig) {
	a, b, c := r.join30(named("a")), r.join30(named("b")), r.join30(named("c"))
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	p := b.seize(o, ownership.GroundsSilent)
	_, _, err := c.Seize(r.Context(), p, ownership.GroundsSilent)
	r.is(err, ownership.ErrConflict)
	b.dies()
	b = r.join30(restarted("b"))
	b.dies()

	q := c.seize(p, ownership.GroundsRebooted)
	if !reflect.DeepEqual(q.Pending, p.Pending) || q.Node != "c" || q.Token <= p.Token {
		r.Errorf("continued as %+v with pending %+v, want pending %+v", q, q.Pending, p.Pending)
	}
	b = r.join30(named("b"))
	_, _, err = b.Settle(r.Context(), p, "late")
	r.is(err, ownership.ErrLost)
	r.stays(q)

	// Whom it was taken from is back, and continues its own fencing.
	a = r.join30(named("a"))
	c.dies()
	mine := a.seize(q, ownership.GroundsSilent)
	if !reflect.DeepEqual(mine.Pending, p.Pending) {
		r.Errorf("continued with pending %+v, want %+v", mine.Pending, p.Pending)
	}
	// An earlier one of b's, which is over, is not taken for a success.
	_, _, err = b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrConflict)
	s, _, err := a.Settle(r.Context(), mine, "cut")
	r.ok(err)
	r.stays(s)
}

// A takeover that is not settled can be neither retaken nor settled by another.
func seizeNotSettled(r *rig) {
	a, b, c := r.node("a"), r.node("b"), r.node("c")
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	p := b.seize(o, ownership.GroundsSilent)
	for _, known := range []ownership.Owner{p, {Volume: v.ID, Node: "b", Token: p.Token}} {
		_, _, err := b.Retake(r.Context(), known)
		r.says(err, "its takeover from host host-a is not finished")
	}
	_, _, err := c.Settle(r.Context(), p, "not mine")
	r.is(err, ownership.ErrLost)
	_, _, err = c.Retake(r.Context(), ownership.Owner{Volume: v.ID, Node: "c", Token: p.Token})
	r.is(err, ownership.ErrLost)
	older := p
	older.Token = o.Token
	_, _, err = b.Settle(r.Context(), older, "an older token")
	r.is(err, ownership.ErrLost)
	r.stays(p)
	owned, err := b.Owned(r.Context())
	r.ok(err)
	if len(owned) != 1 || owned[0].Pending == nil {
		r.Errorf("owned is %+v, want what is pending", owned)
	}
}

func seizeWithoutLease(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	a.dies()
	b.stop()
	revoke := func() { r.ok(r.store.Revoke(r.Context(), r.keys("live", "b")[0].Lease)) }
	b.meanwhile(revoke)
	r.ok(b.Live())
	_, _, err := b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrUnavailable)
	r.says(err, "this node's lease in etcd is gone")
	r.stays(o)
	_, _, err = b.Seize(r.Context(), o, ownership.GroundsSilent)
	r.is(err, ownership.ErrUnavailable)

	b = r.node("b")
	p := b.seize(o, ownership.GroundsSilent)
	b.stop()
	b.meanwhile(revoke)
	_, _, err = b.Settle(r.Context(), p, "seen")
	r.is(err, ownership.ErrUnavailable)
	r.stays(p)
}

func quarantine(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := a.volume(name)
		o := a.claim(v.ID)
		_, err := a.Reinstate(r.Context(), v.ID, "ann@ops")
		r.says(err, "volume "+name+" is not quarantined (it is ready), so nothing was changed")
		for _, token := range []int64{0, o.Token - 1, o.Token + 1} {
			_, err := a.Quarantine(r.Context(), v, token, "x")
			r.is(err, ownership.ErrLost)
		}
		labelled := v
		labelled.Labels = map[string]string{"by": "b"}
		_, err = b.Update(r.Context(), labelled)
		r.ok(err)
		a.once(fault)
		q, err := a.Quarantine(r.Context(), v, o.Token, "its filesystem is damaged")
		r.ok(err)
		if q.Phase != ownership.PhaseQuarantined || q.Reason != "its filesystem is damaged" || q.Labels["by"] != "b" || q.Ref != v.Ref {
			r.Errorf("%s: quarantined as %+v", name, q)
		}
		again, err := a.Quarantine(r.Context(), v, o.Token, "another reason")
		r.ok(err)
		if again.Revision != q.Revision || again.Reason != q.Reason {
			r.Errorf("%s: quarantined again as %+v", name, again)
		}
		r.stays(o)
		r.ok(a.Release(r.Context(), v.ID, o.Token))
		_, _, err = b.Claim(r.Context(), v.ID)
		r.says(err, "volume "+name+" is quarantined: its filesystem is damaged")
		_, err = a.Quarantine(r.Context(), q, o.Token, "x")
		r.is(err, ownership.ErrLost)

		b.once(fault)
		back, err := b.Reinstate(r.Context(), v.ID, "ann@ops")
		r.ok(err)
		if back.Phase != ownership.PhaseReady || back.Reason != "" || back.Ref != v.Ref || back.Labels["by"] != "b" || back.Revision <= q.Revision {
			r.Errorf("%s: reinstated as %+v", name, back)
		}
		if line := r.line("quarantine", v.ID); line["detail"] != "its filesystem is damaged" || line["token"] != float64(o.Token) {
			r.Errorf("audit line is %v", line)
		}
		if line := r.line("reinstate", v.ID); line["by"] != "ann@ops" {
			r.Errorf("audit line is %v", line)
		}
		b.claim(v.ID)
	}
	_, err := a.Reinstate(r.Context(), "nix", "ann@ops")
	r.is(err, ownership.ErrNotFound)
	_, err = a.Reinstate(r.Context(), "", "ann@ops")
	r.is(err, ownership.ErrNotFound)
}
