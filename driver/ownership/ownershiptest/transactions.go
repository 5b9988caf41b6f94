package ownershiptest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

func create(r *rig) {
	a, b := r.node("a"), r.node("b")
	want := ownership.Volume{
		ID: uuid.NewString(), Name: "db", Backend: "loopback", Size: 42, FS: "xfs", Mode: 0o700,
		Options: map[string]string{"k": "v"}, Labels: map[string]string{"l": ""}, Formatted: true, Phase: ownership.PhaseReady,
	}
	v, created, err := a.Create(r.Context(), want)
	r.ok(err)
	if !created || v.Phase != ownership.PhaseCreating || v.Formatted || v.Revision == 0 || v.Created.IsZero() {
		r.Fatalf("created %v: %+v", created, v)
	}
	view, err := b.Lookup(r.Context(), "db")
	r.ok(err)
	if got, want := fmt.Sprintf("%+v", view.Volume), fmt.Sprintf("%+v", v); got != want {
		r.Errorf("stored as\n%s, want\n%s", got, want)
	}
	again := want
	again.ID = uuid.NewString()
	got, created, err := b.Create(r.Context(), again)
	r.ok(err)
	if created || got.ID != v.ID || got.Revision != v.Revision {
		r.Errorf("created %v again: %+v", created, got)
	}
	if got := len(r.keys("vol", "")); got != 1 {
		r.Errorf("%d volumes", got)
	}
	taken := want
	taken.Name = "other"
	taken.ID = v.ID
	_, _, err = b.Create(r.Context(), taken)
	r.is(err, ownership.ErrConflict)
	_, _, err = b.Create(r.Context(), ownership.Volume{ID: "a/b", Name: "x"})
	r.says(err, `id "a/b" or name "x" cannot be used`)
	_, err = a.Lookup(r.Context(), "nix")
	r.is(err, ownership.ErrNotFound)
	r.says(err, "no such volume: nix")
}

func createTwentyNodes(r *rig) {
	nodes := r.nodes(20)
	var (
		mu      sync.Mutex
		created int
		ids     = map[string]bool{}
	)
	together(nodes, func(i int, n *node) {
		v, mine, err := n.Create(r.Context(), ownership.Volume{ID: uuid.NewString(), Name: "db", Size: int64(i)})
		if err != nil {
			r.Error(err)
			return
		}
		v.Ref = "ref-" + v.ID
		if v, err = n.Ready(r.Context(), v); err != nil || v.Phase != ownership.PhaseReady {
			r.Errorf("Ready: %v %+v", err, v)
		}
		mu.Lock()
		defer mu.Unlock()
		ids[v.ID] = true
		if mine {
			created++
		}
	})
	if created != 1 || len(ids) != 1 || len(r.keys("vol", "")) != 1 || len(r.keys("name", "")) != 1 {
		r.Errorf("%d created, ids %v, %d volumes, %d names; want one each", created, ids, len(r.keys("vol", "")), len(r.keys("name", "")))
	}
	together(nodes, func(_ int, n *node) {
		view, err := n.Lookup(r.Context(), "db")
		if err == nil {
			_, err = n.Delete(r.Context(), view.Volume, 0)
		}
		if err != nil && !errors.Is(err, ownership.ErrNotFound) {
			r.Error(err)
		}
	})
	_, err := nodes[0].Lookup(r.Context(), "db")
	r.is(err, ownership.ErrNotFound)
}

func createAmbiguous(r *rig) {
	n := r.node("a")
	for name, fault := range ambiguous {
		n.once(fault)
		v, created, err := n.Create(r.Context(), ownership.Volume{ID: uuid.NewString(), Name: name})
		r.ok(err)
		if !created {
			r.Errorf("%s: not created", name)
		}
		n.once(fault)
		v.Ref = "x"
		v, err = n.Ready(r.Context(), v)
		r.ok(err)
		n.once(fault)
		v.Labels = map[string]string{"a": "b"}
		v, err = n.Update(r.Context(), v)
		r.ok(err)
		view, err := n.View(r.Context(), v.ID)
		r.ok(err)
		if view.Volume.Revision != v.Revision || view.Volume.Labels["a"] != "b" {
			r.Errorf("%s: stored %+v, returned %+v", name, view.Volume, v)
		}
	}
}

func ready(r *rig) {
	a, b := r.node("a"), r.node("b")
	v, _, err := a.Create(r.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v", Size: 1})
	r.ok(err)
	v.Ref, v.Size = "ref", 512
	first, err := a.Ready(r.Context(), v)
	r.ok(err)
	if first.Phase != ownership.PhaseReady || first.Ref != "ref" || first.Size != 512 || first.Revision <= v.Revision {
		r.Errorf("ready is %+v", first)
	}
	second, err := b.Ready(r.Context(), v)
	r.ok(err)
	if second.Revision != first.Revision {
		r.Error("a second Ready wrote again")
	}
	v.Ref = "other"
	_, err = b.Ready(r.Context(), v)
	r.is(err, ownership.ErrConflict)
	tombstone, err := a.Delete(r.Context(), first, 0)
	r.ok(err)
	_, err = b.Ready(r.Context(), v)
	r.is(err, ownership.ErrNotFound)
	r.says(err, "volume v is being deleted")
	r.ok(a.Purge(r.Context(), tombstone))
	_, err = b.Ready(r.Context(), v)
	r.is(err, ownership.ErrNotFound)
	v.Revision = 0
	_, err = b.Ready(r.Context(), v)
	r.is(err, ownership.ErrConflict)
	if got := len(r.keys("vol", "")); got != 0 {
		r.Error("Ready brought a deleted volume back")
	}
}

func update(r *rig) {
	nodes := r.nodes(4)
	v := nodes[0].volume("v")
	var won, lost int
	var mu sync.Mutex
	together(nodes, func(_ int, n *node) {
		mine := v
		mine.Reason = n.Node().ID
		_, err := n.Update(r.Context(), mine)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			won++
		case errors.Is(err, ownership.ErrConflict):
			lost++
		default:
			r.Error(err)
		}
	})
	if won != 1 || lost != 3 {
		r.Errorf("%d won and %d lost, want 1 and 3", won, lost)
	}
	v.Phase = ownership.PhaseDeleting
	if _, err := nodes[0].Update(r.Context(), v); err == nil {
		r.Error("Update made a tombstone")
	}
}

func claim(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o, got, err := a.Claim(r.Context(), v.ID)
	r.ok(err)
	if o.Node != "a" || o.Host != "host-a" || o.Boot != "boot-a" || o.Volume != v.ID || o.Clean || o.From != "" || o.Pending != nil {
		r.Errorf("owner is %+v", o)
	}
	if got.Revision != v.Revision || got.Ref != v.Ref {
		r.Errorf("volume is %+v, want %+v", got, v)
	}
	kv := r.keys("own", v.ID)[0]
	if kv.ModRevision != o.Token || kv.Lease != 0 {
		r.Errorf("own key has revision %d and lease %d, want %d and none", kv.ModRevision, kv.Lease, o.Token)
	}
	r.ok(a.Check(r.Context(), v.ID, o.Token))
	_, _, err = b.Claim(r.Context(), v.ID)
	r.held(err, "a", true)
	r.says(err, "volume v is owned by host host-a")
	if held, _ := errors.AsType[*ownership.HeldError](err); held.Owner.Token != o.Token || held.Volume.Name != "v" {
		r.Errorf("held is %+v", held)
	}
	_, _, err = a.Claim(r.Context(), v.ID)
	r.held(err, "a", true)
	lines := len(r.keys("ev", ""))
	_, _, err = b.Claim(r.Context(), uuid.NewString())
	r.is(err, ownership.ErrNotFound)
	if got := len(r.keys("ev", "")); got != lines {
		r.Error("a claim of no volume went on record")
	}
	_, _, err = b.Claim(r.Context(), "")
	r.is(err, ownership.ErrNotFound)

	r.ok(a.Release(r.Context(), v.ID, o.Token))
	next := b.claim(v.ID)
	if next.Token <= o.Token {
		r.Errorf("token %d after %d", next.Token, o.Token)
	}
	r.is(a.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
	r.says(a.Check(r.Context(), v.ID, o.Token), "no longer the owner")
	r.is(b.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
}

func claimPhases(r *rig) {
	n := r.node("a")
	v, _, err := n.Create(r.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v"})
	r.ok(err)
	refused := func(want string, class error) {
		r.Helper()
		_, _, err := n.Claim(r.Context(), v.ID)
		r.says(err, want)
		if _, ok := errors.AsType[*ownership.PhaseError](err); !ok {
			r.Errorf("got %T, want a PhaseError", err)
		}
		if class != nil {
			r.is(err, class)
		}
		r.ownedBy(v.ID, "", 0)
	}
	refused("volume v is still being created", nil)
	v.Phase, v.Reason = ownership.PhaseQuarantined, "two writers"
	v, err = n.Update(r.Context(), v)
	r.ok(err)
	refused("volume v is quarantined: two writers", nil)
	v.Ref = "ref"
	v, err = n.Ready(r.Context(), v)
	r.ok(err)
	v, err = n.Delete(r.Context(), v, 0)
	r.ok(err)
	refused("volume v is being deleted", ownership.ErrNotFound)
	r.ok(n.Purge(r.Context(), v))
	_, _, err = n.Claim(r.Context(), v.ID)
	r.is(err, ownership.ErrNotFound)
	if got := len(r.keys("own", "")); got != 0 {
		r.Errorf("%d own keys are left", got)
	}
}

func claimRace(r *rig) {
	nodes := r.nodes(8)
	v := nodes[0].volume("v")
	for range 10 {
		var (
			mu      sync.Mutex
			winners []ownership.Owner
		)
		together(nodes, func(_ int, n *node) {
			o, _, err := n.Claim(r.Context(), v.ID)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, o)
			} else if _, ok := errors.AsType[*ownership.HeldError](err); !ok {
				r.Error(err)
			}
		})
		if len(winners) != 1 {
			r.Fatalf("winners are %+v, want one", winners)
		}
		r.ownedBy(v.ID, winners[0].Node, winners[0].Token)
		for _, n := range nodes {
			if n.Node().ID == winners[0].Node {
				r.ok(n.Release(r.Context(), v.ID, winners[0].Token))
			}
		}
	}
}

func claimAmbiguous(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := b.volume(name)
		before := len(r.keys("ev", ""))
		a.once(fault)
		o, got, err := a.Claim(r.Context(), v.ID)
		r.ok(err)
		r.ownedBy(v.ID, "a", o.Token)
		if got.ID != v.ID {
			r.Errorf("%s: volume is %+v", name, got)
		}
		if lines := len(r.keys("ev", "")) - before; lines != 1 {
			r.Errorf("%s: %d audit lines for one claim", name, lines)
		}
		a.once(fault)
		r.ok(a.Release(r.Context(), v.ID, o.Token))
		r.ownedBy(v.ID, "", 0)

		theirs := b.claim(v.ID)
		a.once(fault)
		_, _, err = a.Claim(r.Context(), v.ID)
		r.held(err, "b", true)
		r.ownedBy(v.ID, "b", theirs.Token)
	}
}

// A claim whose every answer was lost shows up in Owned.
func claimLate(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	a.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			return ownership.Fault{Late: 200 * time.Millisecond}
		}
		return ownership.Fault{}
	})
	_, _, err := a.Claim(r.Context(), v.ID)
	r.is(err, ownership.ErrUnavailable)
	a.bad.Inject(nil)
	r.eventually("the late claim", func() bool { return r.owner(v.ID) != nil })
	time.Sleep(500 * time.Millisecond) // the other sends land, without effect
	owned, err := a.Owned(r.Context())
	r.ok(err)
	if len(owned) != 1 || owned[0].Volume != v.ID || owned[0].Token == 0 {
		r.Fatalf("owned is %+v", owned)
	}
	r.ok(a.Release(r.Context(), v.ID, owned[0].Token))
	b.claim(v.ID)
}

func claimWithoutLease(r *rig) {
	b := r.node("b")
	w := b.volume("w")
	theirs := b.claim(w.ID)
	// A lease is worth nothing without the key on it.
	c := r.node("c")
	c.stop()
	r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: r.key("live", "c")}}})
	r.is(c.Request(r.Context(), theirs, "mount"), ownership.ErrUnavailable)
	if got := r.keys("req", ""); len(got) != 0 {
		r.Error("a node that is not registered could ask for a volume")
	}

	n := r.node("a")
	v := n.volume("v")
	n.stop()
	r.ok(r.store.Revoke(r.Context(), r.keys("live", "a")[0].Lease))
	r.ok(n.Live()) // it does not know yet
	_, _, err := n.Claim(r.Context(), v.ID)
	r.is(err, ownership.ErrUnavailable)
	r.says(err, "this node's lease in etcd is gone; it is registering again")
	r.ownedBy(v.ID, "", 0)
	r.is(n.Live(), ownership.ErrUnavailable)
}

func tokenFixed(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true}))
	v, err := a.Formatted(r.Context(), v.ID, o.Token, v)
	r.ok(err)
	_, err = b.Update(r.Context(), v)
	r.ok(err)
	r.ok(b.Withdraw(r.Context(), o))
	b.volume("w")
	r.ok(a.Check(r.Context(), v.ID, o.Token))
	r.ownedBy(v.ID, "a", o.Token)
}

func release(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	r.is(a.Release(r.Context(), v.ID, o.Token-1), ownership.ErrLost)
	r.ownedBy(v.ID, "a", o.Token)
	r.ok(a.Release(r.Context(), v.ID, o.Token))
	r.ownedBy(v.ID, "", 0)
	r.ok(a.Release(r.Context(), v.ID, o.Token))
	theirs := b.claim(v.ID)
	r.is(a.Release(r.Context(), v.ID, o.Token), ownership.ErrLost)
	r.ownedBy(v.ID, "b", theirs.Token)
}

// Giving up access is always safe, so it needs no lease.
func releaseAfterLeaseLoss(r *rig) {
	n := r.node("a")
	v := n.volume("v")
	o := n.claim(v.ID)
	n.stop()
	r.ok(r.store.Revoke(r.Context(), r.keys("live", "a")[0].Lease))
	r.ok(n.Release(r.Context(), v.ID, o.Token))
	r.ownedBy(v.ID, "", 0)
}

func retake(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	for name, fault := range ambiguous {
		a.once(fault)
		next, got, err := a.Retake(r.Context(), o)
		r.ok(err)
		if next.Token <= o.Token || next.Node != "a" || got.ID != v.ID {
			r.Errorf("%s: retaken as %+v", name, next)
		}
		r.ownedBy(v.ID, "a", next.Token)
		r.is(a.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
		r.is(a.Release(r.Context(), v.ID, o.Token), ownership.ErrLost)
		o = next
	}
	_, _, err := b.Retake(r.Context(), o)
	r.is(err, ownership.ErrLost)
	req := b.ask(o, a)
	if handed, err := a.HandOver(r.Context(), v.ID, o.Token, req); err != nil || !handed {
		r.Fatal(handed, err)
	}
	_, _, err = a.Retake(r.Context(), o)
	r.is(err, ownership.ErrLost)
	theirs, _, err := b.Retake(r.Context(), *r.owner(v.ID))
	r.ok(err)
	if theirs.Clean || theirs.From != "" {
		r.Errorf("what was retaken is called clean: %+v", theirs)
	}
}

func request(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	if req.Owner != "a" || req.Node != "b" || req.Host != "host-b" || req.Boot != "boot-b" || req.Purpose != "mount" || req.Since.IsZero() || req.Lease == 0 {
		r.Errorf("request is %+v", req)
	}
	if _, replied, err := b.Replied(r.Context(), v.ID); replied || err != nil {
		r.Errorf("replied %v, %v before a reply", replied, err)
	}
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true, Containers: []string{"web", "db"}}))
	reply, replied, err := b.Replied(r.Context(), v.ID)
	r.ok(err)
	if !replied || !reply.Busy || len(reply.Containers) != 2 || reply.Node != "a" || reply.Host != "host-a" || reply.Volume != v.ID {
		r.Errorf("reply is %v, %+v", replied, reply)
	}
	view, err := b.View(r.Context(), v.ID)
	r.ok(err)
	if len(view.Waiting) != 1 || view.Waiting[0].Node != "b" || !view.OwnerLive {
		r.Errorf("view is %+v", view)
	}

	// Said again, it keeps its place and its answer; wished anew, it has none.
	again := b.ask(o, a)
	if again.Revision != req.Revision {
		r.Error("a request said again lost its place")
	}
	if _, replied, _ := b.Replied(r.Context(), v.ID); !replied {
		r.Error("a request said again lost its answer")
	}
	r.ok(b.Withdraw(r.Context(), o))
	for _, kind := range []string{"req", "rep"} {
		if got := r.keys(kind, ""); len(got) != 0 {
			r.Errorf("after Withdraw there is %s", got[0].Key)
		}
	}
	r.ok(b.Withdraw(r.Context(), o))
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true}))
	if got := r.keys("rep", ""); len(got) != 0 {
		r.Error("a reply to nobody is kept")
	}

	r.says(a.Request(r.Context(), o, "mount"), "this node owns it")
	r.ok(a.Release(r.Context(), v.ID, o.Token))
	r.is(b.Request(r.Context(), o, "mount"), ownership.ErrConflict)
	if got := r.keys("req", ""); len(got) != 0 {
		r.Error("a refused request is kept")
	}
}

func requestOrder(r *rig) {
	nodes := r.nodes(4)
	a := nodes[0]
	v := a.volume("v")
	o := a.claim(v.ID)
	for _, i := range []int{3, 1, 2, 3} { // 3 says it again
		r.ok(nodes[i].Request(r.Context(), o, "mount"))
	}
	waiting, err := a.Waiting(r.Context())
	r.ok(err)
	view, err := a.View(r.Context(), v.ID)
	r.ok(err)
	for _, got := range [][]ownership.Request{waiting, view.Waiting} {
		if len(got) != 3 || got[0].Node != "n3" || got[1].Node != "n1" || got[2].Node != "n2" {
			r.Errorf("waiting are %+v, want n3, n1, n2", got)
		}
	}
}

func requestLeaseEnds(r *rig) {
	a, b := r.node("a"), r.nodeTTL("b", 10*ttl)
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true}))
	b.stop()
	r.eventually("the end of request and reply", func() bool { return len(r.keys("req", "")) == 0 && len(r.keys("rep", "")) == 0 })
	handed, err := a.HandOver(r.Context(), v.ID, o.Token, req)
	r.ok(err)
	if handed {
		r.Error("handed over to a node that is gone")
	}
	r.ownedBy(v.ID, "", 0)
}

func handOver(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true}))
	if _, err := a.HandOver(r.Context(), v.ID, o.Token-1, req); !errors.Is(err, ownership.ErrLost) {
		r.Errorf("with a stale token: %v", err)
	}
	r.ownedBy(v.ID, "a", o.Token)
	handed, err := a.HandOver(r.Context(), v.ID, o.Token, req)
	r.ok(err)
	if !handed {
		r.Fatal("released rather than handed over")
	}
	got := r.owner(v.ID)
	if got.Node != "b" || got.Host != "host-b" || got.Boot != "boot-b" || got.From != "a" || !got.Clean || got.Token <= o.Token {
		r.Errorf("owner is %+v", got)
	}
	if left := append(r.keys("req", ""), r.keys("rep", "")...); len(left) != 0 {
		r.Errorf("left behind: %s", left[0].Key)
	}
	r.is(a.Check(r.Context(), v.ID, o.Token), ownership.ErrLost)
	if _, err := a.HandOver(r.Context(), v.ID, o.Token, req); !errors.Is(err, ownership.ErrLost) {
		r.Errorf("a second time: %v", err)
	}
	r.ok(b.Check(r.Context(), v.ID, got.Token))
	owned, err := b.Owned(r.Context())
	r.ok(err)
	if len(owned) != 1 || owned[0].Token != got.Token {
		r.Errorf("owned is %+v", owned)
	}
}

func handOverWithdrawn(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := a.volume(name)
		o := a.claim(v.ID)
		req := b.ask(o, a)
		r.ok(b.Withdraw(r.Context(), o))
		a.once(fault)
		handed, err := a.HandOver(r.Context(), v.ID, o.Token, req)
		r.ok(err)
		if handed {
			r.Errorf("%s: handed over to a node that no longer wants it", name)
		}
		r.ownedBy(v.ID, "", 0)
	}
}

func handOverAmbiguous(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := a.volume(name)
		o := a.claim(v.ID)
		req := b.ask(o, a)
		a.once(fault)
		handed, err := a.HandOver(r.Context(), v.ID, o.Token, req)
		r.ok(err)
		if !handed {
			r.Errorf("%s: not handed over", name)
		}
		r.ownedBy(v.ID, "b", 0)
	}
}

// A hand-over that is still on its way cannot take back what was retaken.
func handOverLate(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	a.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			return ownership.Fault{Late: 3 * time.Second}
		}
		return ownership.Fault{}
	})
	_, err := a.HandOver(r.Context(), v.ID, o.Token, req)
	r.is(err, ownership.ErrUnavailable)
	a.bad.Inject(nil)
	r.ok(a.Check(r.Context(), v.ID, o.Token)) // which is why Check proves nothing here
	next, _, err := a.Retake(r.Context(), o)
	r.ok(err)
	time.Sleep(4 * time.Second)
	r.ownedBy(v.ID, "a", next.Token)
	r.ok(a.Check(r.Context(), v.ID, next.Token))
}

func handOverWithdrawRace(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	for range 40 {
		o := a.claim(v.ID)
		req := b.ask(o, a)
		var handed bool
		together([]*node{a, b}, func(i int, n *node) {
			var err error
			if i == 0 {
				handed, err = n.HandOver(r.Context(), v.ID, o.Token, req)
			} else {
				err = n.Withdraw(r.Context(), o)
			}
			if err != nil {
				r.Error(err)
			}
		})
		now := r.owner(v.ID)
		switch {
		case handed && now != nil && now.Node == "b":
			r.ok(b.Release(r.Context(), v.ID, now.Token))
		case !handed && now == nil:
		default:
			r.Fatalf("handed over %v, owner is %+v", handed, now)
		}
		if got := r.keys("req", ""); len(got) != 0 {
			r.Fatalf("a request is left: %s", got[0].Key)
		}
	}
}

// Of a write whose answer was lost, what others have made of it since is no proof
// that it was done, or was not: its operation id is.
func followed(r *rig) {
	a, b := r.node("a"), r.node("b")
	ctx := r.Context()
	owned := func(name string) (ownership.Volume, ownership.Owner) {
		v := a.volume(name)
		return v, a.claim(v.ID)
	}
	let := func(n *node, vid string) {
		if err := n.Release(ctx, vid, r.owner(vid).Token); err != nil {
			r.Error(err)
		}
	}

	// The new owner has let go, and has it under another token.
	v, o := owned("handed")
	req := b.ask(o, a)
	a.followed(func() { let(b, v.ID); b.claim(v.ID) })
	handed, err := a.HandOver(ctx, v.ID, o.Token, req)
	r.is(err, ownership.ErrLost)
	if handed {
		r.Error("a claim is taken for the hand-over")
	}
	r.ownedBy(v.ID, "b", 0)
	// It has let go.
	v, o = owned("handed, released")
	req = b.ask(o, a)
	a.followed(func() { let(b, v.ID) })
	handed, err = a.HandOver(ctx, v.ID, o.Token, req)
	r.ok(err)
	if handed {
		r.Error("handed over to nobody")
	}
	r.ownedBy(v.ID, "", 0)

	// This node has it, by another call.
	v = a.volume("claimed")
	a.followed(func() { let(a, v.ID); a.claim(v.ID) })
	_, _, err = a.Claim(ctx, v.ID)
	r.held(err, "a", true)
	v, o = owned("retaken")
	a.followed(func() {
		if _, _, err := a.Retake(ctx, *r.owner(v.ID)); err != nil {
			r.Error(err)
		}
	})
	_, _, err = a.Retake(ctx, o)
	r.is(err, ownership.ErrLost)

	// The token is gone, and what was done under it stays done.
	v, o = owned("formatted")
	a.followed(func() { let(a, v.ID) })
	v, err = a.Formatted(ctx, v.ID, o.Token, v)
	r.ok(err)
	if !v.Formatted {
		r.Error("not formatted")
	}
	v, o = owned("quarantined")
	a.followed(func() { let(a, v.ID) })
	v, err = a.Quarantine(ctx, v, o.Token, "why")
	r.ok(err)
	if v.Phase != ownership.PhaseQuarantined {
		r.Errorf("it is %s", v.Phase)
	}
}

func formatted(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := a.volume(name)
		o := a.claim(v.ID)
		if _, err := a.Formatted(r.Context(), v.ID, o.Token-1, v); !errors.Is(err, ownership.ErrLost) {
			r.Errorf("with a stale token: %v", err)
		}
		labelled := v
		labelled.Labels = map[string]string{"by": "b"}
		labelled, err := b.Update(r.Context(), labelled)
		r.ok(err)
		a.once(fault)
		got, err := a.Formatted(r.Context(), v.ID, o.Token, v)
		r.ok(err)
		if !got.Formatted || got.Labels["by"] != "b" || got.Revision <= labelled.Revision {
			r.Errorf("%s: formatted is %+v", name, got)
		}
		again, err := a.Formatted(r.Context(), v.ID, o.Token, v)
		r.ok(err)
		if again.Revision != got.Revision {
			r.Errorf("%s: written again", name)
		}
		r.ok(a.Release(r.Context(), v.ID, o.Token))
		if _, err := a.Formatted(r.Context(), v.ID, o.Token, v); !errors.Is(err, ownership.ErrLost) {
			r.Errorf("after Release: %v", err)
		}
	}
}

func deletes(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	stale := v
	v, err := a.Update(r.Context(), v)
	r.ok(err)
	_, err = a.Delete(r.Context(), stale, 0)
	r.is(err, ownership.ErrConflict)
	tombstone, err := a.Delete(r.Context(), v, 0)
	r.ok(err)
	if tombstone.Phase != ownership.PhaseDeleting || tombstone.Ref != v.Ref || tombstone.Revision <= v.Revision {
		r.Errorf("tombstone is %+v", tombstone)
	}
	same, err := b.Delete(r.Context(), v, 0)
	r.ok(err)
	if same.Revision != tombstone.Revision {
		r.Errorf("deleted again: %+v", same)
	}
	_, err = a.Lookup(r.Context(), "v")
	r.is(err, ownership.ErrNotFound)
	list, err := a.List(r.Context())
	r.ok(err)
	if len(list) != 0 {
		r.Errorf("listed: %+v", list)
	}
	deleting, err := b.Deleting(r.Context())
	r.ok(err)
	if len(deleting) != 1 || deleting[0].ID != v.ID {
		r.Errorf("deleting are %+v", deleting)
	}
	next := b.volume("v") // the name is free at once
	if next.ID == v.ID {
		r.Fatal("same id")
	}
	_, err = b.Delete(r.Context(), v, 0)
	r.ok(err)
	if view, err := b.Lookup(r.Context(), "v"); err != nil || view.Volume.ID != next.ID {
		r.Errorf("deleting a tombstone took the new volume's name: %v", err)
	}
	r.says(b.Purge(r.Context(), next), "it is not a tombstone")
	older := tombstone
	older.Revision--
	r.is(b.Purge(r.Context(), older), ownership.ErrConflict)
	r.ok(b.Purge(r.Context(), tombstone))
	r.ok(b.Purge(r.Context(), tombstone))
	_, err = b.Delete(r.Context(), v, 0)
	r.is(err, ownership.ErrNotFound)
	if got := len(r.keys("vol", "")); got != 1 {
		r.Errorf("%d volumes, want the new one", got)
	}
}

func deleteOwned(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	_, err := b.Delete(r.Context(), v, 0)
	r.held(err, "a", true)
	_, err = a.Delete(r.Context(), v, 0)
	r.held(err, "a", true)
	for _, token := range []int64{o.Token - 1, o.Token + 1} {
		_, err = a.Delete(r.Context(), v, token)
		r.is(err, ownership.ErrLost)
	}
	r.ok(a.Check(r.Context(), v.ID, o.Token))
	if _, err = a.Delete(r.Context(), v, o.Token); err != nil {
		r.Fatal(err)
	}
	if got := append(r.keys("own", ""), r.keys("name", "")...); len(got) != 0 {
		r.Errorf("left: %s", got[0].Key)
	}
	w := a.volume("w")
	_, err = a.Delete(r.Context(), w, o.Token)
	r.is(err, ownership.ErrLost)
}

func deleteAmbiguous(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		for _, owned := range []bool{false, true} {
			v := b.volume(fmt.Sprint(name, owned))
			var token int64
			if owned {
				token = a.claim(v.ID).Token
			}
			a.once(fault)
			tombstone, err := a.Delete(r.Context(), v, token)
			r.ok(err)
			r.ownedBy(v.ID, "", 0)
			a.once(fault)
			r.ok(a.Purge(r.Context(), tombstone))
		}
	}
	for _, kind := range []string{"own", "vol", "name"} {
		if got := r.keys(kind, ""); len(got) != 0 {
			r.Errorf("left: %s", got[0].Key)
		}
	}
}

func deleteClaimRace(r *rig) {
	a, b := r.node("a"), r.node("b")
	for i := range 40 {
		v := a.volume(fmt.Sprint("v", i))
		var claimed, deleted error
		together([]*node{a, b}, func(i int, n *node) {
			if rand.N(2) == 0 {
				time.Sleep(rand.N(300 * time.Microsecond))
			}
			if i == 0 {
				_, _, claimed = n.Claim(r.Context(), v.ID)
			} else {
				_, deleted = n.Delete(r.Context(), v, 0)
			}
		})
		switch {
		case claimed == nil && deleted != nil:
			r.held(deleted, "a", true)
			r.ownedBy(v.ID, "a", 0)
		case deleted == nil && claimed != nil:
			r.is(claimed, ownership.ErrNotFound)
			r.ownedBy(v.ID, "", 0)
		default:
			r.Fatalf("claimed with %v, deleted with %v", claimed, deleted)
		}
	}
}

// The decision is in the transaction: what happens between Delete's read and its
// write counts.
func deleteClaimedMeanwhile(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	var (
		once sync.Once
		o    ownership.Owner
	)
	b.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			once.Do(func() { o = a.claim(v.ID) })
		}
		return ownership.Fault{}
	})
	_, err := b.Delete(r.Context(), v, 0)
	r.held(err, "a", true)
	r.ownedBy(v.ID, "a", o.Token)
	view, err := a.Lookup(r.Context(), "v")
	r.ok(err)
	if view.Volume.Phase != ownership.PhaseReady {
		r.Errorf("an owned volume is %s", view.Volume.Phase)
	}
}

func deleteSnapshots(r *rig) {
	n := r.node("a")
	v := n.volume("v")
	r.put(`{}`, "snap", v.ID, "s1")
	_, err := n.Delete(r.Context(), v, 0)
	r.is(err, ownership.ErrConflict)
	if _, err := n.Lookup(r.Context(), "v"); err != nil {
		r.Error(err)
	}
}

func views(r *rig) {
	a, b := r.node("a"), r.node("b")
	z, m, c := a.volume("z"), b.volume("m"), a.volume("c")
	zo := a.claim(z.ID)
	mo := b.claim(m.ID)
	r.ok(b.Request(r.Context(), zo, "remove"))
	list, err := a.List(r.Context())
	r.ok(err)
	if len(list) != 3 || list[0].Volume.ID != c.ID || list[1].Volume.ID != m.ID || list[2].Volume.ID != z.ID {
		r.Fatalf("list is %+v, want c, m, z", list)
	}
	if list[0].Owner != nil || list[0].OwnerLive || list[0].Waiting != nil {
		r.Errorf("free volume is %+v", list[0])
	}
	if o := list[1].Owner; o == nil || o.Token != mo.Token || !list[1].OwnerLive {
		r.Errorf("owned volume is %+v", list[1])
	}
	if w := list[2].Waiting; len(w) != 1 || w[0].Node != "b" || w[0].Purpose != "remove" {
		r.Errorf("wanted volume is %+v", list[2])
	}
	for _, view := range list {
		one, err := b.Lookup(r.Context(), view.Volume.Name)
		r.ok(err)
		byID, err := b.View(r.Context(), view.Volume.ID)
		r.ok(err)
		for _, got := range []ownership.View{one, byID} {
			if (got.Owner == nil) != (view.Owner == nil) || got.OwnerLive != view.OwnerLive || len(got.Waiting) != len(view.Waiting) || got.Volume.Revision != view.Volume.Revision {
				r.Errorf("view is %+v, in the list it is %+v", got, view)
			}
		}
	}
	owned, err := a.Owned(r.Context())
	r.ok(err)
	if len(owned) != 1 || owned[0].Volume != z.ID || owned[0].Token != zo.Token {
		r.Errorf("owned is %+v", owned)
	}
	// What List returns is the caller's; what others change, it shows.
	c.Labels = map[string]string{"by": "b"}
	c, err = b.Update(r.Context(), c)
	r.ok(err)
	for range 2 {
		list, err = a.List(r.Context())
		r.ok(err)
		if got := list[0].Volume; got.Labels["by"] != "b" || got.Revision != c.Revision {
			r.Errorf("listed as %+v, want the labels and revision of %+v", got, c)
		}
		list[0].Volume.Labels["by"] = "me"
	}
	_, err = a.View(r.Context(), uuid.NewString())
	r.is(err, ownership.ErrNotFound)
	_, err = a.View(r.Context(), "")
	r.is(err, ownership.ErrNotFound)
	_, err = a.Lookup(r.Context(), "")
	r.is(err, ownership.ErrNotFound)
}

// A value that cannot be understood names its key, decides nothing, and spoils
// nothing else.
func broken(r *rig) {
	n := r.node("a")
	good, vol, own := n.volume("good"), n.volume("vol"), n.volume("own")
	r.put(`{"id":`, "vol", vol.ID)
	r.put(`[]`, "own", own.ID)
	r.put(`{"volume":""}`, "name", "odd")
	r.put(`nonsense`, "req", "a", good.ID, "b")
	n.claim(good.ID)

	list, err := n.List(r.Context())
	r.ok(err)
	if len(list) != 1 || list[0].Volume.ID != good.ID {
		r.Errorf("list is %+v, want the good one", list)
	}
	owned, err := n.Owned(r.Context())
	r.ok(err)
	if len(owned) != 1 {
		r.Errorf("owned is %+v", owned)
	}
	if waiting, err := n.Waiting(r.Context()); err != nil || len(waiting) != 0 {
		r.Errorf("waiting are %+v, %v", waiting, err)
	}
	names := func(err error, key string) {
		r.Helper()
		b, ok := errors.AsType[*ownership.BrokenError](err)
		if !ok || b.Key != key {
			r.Errorf("got %v, want a BrokenError about %s", err, key)
			return
		}
		r.says(err, "value of etcd key "+key+" is broken: ")
	}
	_, err = n.View(r.Context(), vol.ID)
	names(err, r.key("vol", vol.ID))
	_, _, err = n.Claim(r.Context(), vol.ID)
	names(err, r.key("vol", vol.ID))
	_, err = n.Delete(r.Context(), vol, 0)
	names(err, r.key("vol", vol.ID))
	_, err = n.View(r.Context(), own.ID)
	names(err, r.key("own", own.ID))
	_, _, err = n.Claim(r.Context(), own.ID)
	names(err, r.key("own", own.ID))
	_, err = n.Delete(r.Context(), own, 0)
	names(err, r.key("own", own.ID))
	_, err = n.Lookup(r.Context(), "odd")
	names(err, r.key("name", "odd"))
	if got := len(r.keys("own", vol.ID)); got != 0 {
		r.Error("a broken volume stays claimed")
	}
}

// A zero token or revision compares equal to an absent key in etcd; here it
// never does.
func noToken(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	req := b.ask(o, a)
	r.ok(a.Release(r.Context(), v.ID, o.Token))
	if _, err := a.HandOver(r.Context(), v.ID, 0, req); !errors.Is(err, ownership.ErrLost) {
		r.Errorf("HandOver: %v", err)
	}
	r.is(a.Check(r.Context(), v.ID, 0), ownership.ErrLost)
	r.is(a.Release(r.Context(), v.ID, 0), ownership.ErrLost)
	if _, err := a.Formatted(r.Context(), v.ID, 0, v); !errors.Is(err, ownership.ErrLost) {
		r.Errorf("Formatted: %v", err)
	}
	if _, _, err := a.Retake(r.Context(), ownership.Owner{Volume: v.ID, Node: "a"}); !errors.Is(err, ownership.ErrLost) {
		r.Errorf("Retake: %v", err)
	}
	r.is(b.Request(r.Context(), ownership.Owner{Volume: v.ID, Node: "a"}, "mount"), ownership.ErrConflict)
	r.ownedBy(v.ID, "", 0)
	v.Revision = 0
	if _, err := a.Update(r.Context(), v); !errors.Is(err, ownership.ErrConflict) {
		r.Errorf("Update: %v", err)
	}
}

func audit(r *rig) {
	a, b := r.node("a"), r.node("b") // register, register
	v := a.volume("v")               // create, ready
	o := a.claim(v.ID)               // claim
	req := b.ask(o, a)               // request
	r.ok(b.Request(r.Context(), o, "mount"))
	for range 2 { // refuse
		r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true, Containers: []string{"web"}}))
	}
	_, err := a.HandOver(r.Context(), v.ID, o.Token, req)
	r.ok(err)
	o = *r.owner(v.ID)
	v, err = b.Formatted(r.Context(), v.ID, o.Token, v)
	r.ok(err)
	o, _, err = b.Retake(r.Context(), o)
	r.ok(err)
	r.ok(b.Release(r.Context(), v.ID, o.Token))
	r.ok(b.Release(r.Context(), v.ID, o.Token)) // nothing happened
	v, err = b.Delete(r.Context(), v, 0)
	r.ok(err)
	r.ok(b.Purge(r.Context(), v))
	r.ok(b.Purge(r.Context(), v)) // nothing happened
	lines := r.keys("ev", "")
	slices.SortFunc(lines, func(a, b ownership.KV) int { return int(a.ModRevision - b.ModRevision) })
	var got []string
	for _, line := range lines {
		var l struct{ What, Host string }
		r.ok(json.Unmarshal(line.Value, &l))
		got = append(got, l.What+" "+l.Host)
	}
	want := []string{
		"register host-a", "register host-b", "create host-a", "ready host-a", "claim host-a", "request host-b", "refuse host-a",
		"hand over host-a", "formatted host-b", "retake host-b", "release host-b", "delete host-b", "purge host-b",
	}
	if !slices.Equal(got, want) {
		r.Errorf("audit lines are %q, want %q", got, want)
	}
	// The lease of the lines is not something to fail for. A renewal would get another.
	a.stop()
	b.stop()
	for _, line := range lines {
		if line.Lease == 0 {
			r.Fatalf("%s is on no lease", line.Key)
		}
		if err := r.store.Revoke(r.Context(), line.Lease); err != nil && !errors.Is(err, ownership.ErrLease) {
			r.Fatal(err)
		}
	}
	w := a.volume("w")
	o = a.claim(w.ID)
	_, err = a.HandOver(r.Context(), w.ID, o.Token, b.ask(o, a))
	r.ok(err)
	r.ok(b.Release(r.Context(), w.ID, r.owner(w.ID).Token))
	if got := len(r.keys("ev", "")); got != 0 {
		r.Errorf("got %d audit lines without a lease for them", got)
	}
}

func watch(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	wakes := map[string]<-chan struct{}{
		"b's volume":   b.WatchVolume(ctx, v.ID),
		"a's requests": a.WatchRequests(ctx),
	}
	wait := func(which, why string) {
		r.Helper()
		select {
		case <-wakes[which]:
		case <-time.After(time.Minute):
			r.Fatalf("no wake-up of %s after %s", which, why)
		}
	}
	// quiet drains wake-ups without a cause, such as those of beginning to watch.
	quiet := func() {
		for _, wake := range wakes {
			for idle := false; !idle; {
				select {
				case <-wake:
				case <-time.After(200 * time.Millisecond):
					idle = true
				}
			}
		}
	}
	move := func(when string) {
		r.Helper()
		o := a.claim(v.ID)
		wait("b's volume", "claim "+when)
		req := b.ask(o, a)
		wait("a's requests", "request "+when)
		r.ok(a.Reply(ctx, req, ownership.Reply{Busy: true}))
		wait("b's volume", "reply "+when)
		_, err := a.HandOver(ctx, v.ID, o.Token, req)
		r.ok(err)
		r.eventually("waking up for the hand-over "+when, func() bool {
			wait("b's volume", "hand-over "+when)
			return r.owner(v.ID).Node == "b"
		})
		r.ok(b.Release(ctx, v.ID, r.owner(v.ID).Token))
		quiet()
	}
	move("right after the call")
	quiet()
	move("when watching")
	for _, n := range []*node{a, b} {
		n.bad.CutWatches()
	}
	move("right after the watches broke")

	// Out of reach, with the history forgotten meanwhile.
	b.bad.Partition(true)
	o := a.claim(v.ID)
	quiet()
	r.cluster.Compact(o.Token)
	r.ok(a.Release(ctx, v.ID, o.Token))
	a.volume("another")
	b.bad.Partition(false)
	wait("b's volume", "an outage and a compaction")
	quiet()
	move("after an outage and a compaction")

	other := a.volume("other")
	quiet()
	a.claim(other.ID)
	for which, wake := range wakes {
		select {
		case <-wake:
			r.Errorf("%s woke up for another volume", which)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
