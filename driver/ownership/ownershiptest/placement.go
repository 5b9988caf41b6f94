package ownershiptest

import (
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// placed is what View and List say about a volume.
func (r *rig) placed(n *node, vid string) ownership.View {
	r.Helper()
	view, err := n.View(r.Context(), vid)
	r.ok(err)
	known, err := n.LookupKnown(r.Context(), view.Volume.Name, vid)
	r.ok(err)
	all, err := n.List(r.Context())
	r.ok(err)
	i := slices.IndexFunc(all, func(v ownership.View) bool { return v.Volume.ID == vid })
	if i < 0 {
		r.Fatalf("volume %s is not listed", vid)
	}
	for what, other := range map[string]ownership.View{"LookupKnown": known, "List": all[i]} {
		if string(text(other)) != string(text(view)) {
			r.Errorf("%s says\n%s\nand View\n%s", what, text(other), text(view))
		}
	}
	return view
}

func text(v ownership.View) []byte {
	b, err := json.Marshal([]any{v.Placement, v.Presence, v.Lease})
	if err != nil {
		panic(err)
	}
	return b
}

func (r *rig) placedOn(n *node, vid, want string) {
	r.Helper()
	p := r.placed(n, vid).Placement
	if got := ""; p != nil {
		got = p.Node
		if got != want {
			r.Fatalf("placed on %s, want %q", got, want)
		}
	} else if want != "" {
		r.Fatalf("placed nowhere, want %s", want)
	}
}

// lines are what the audit lines of that kind say.
func (r *rig) lines(what string) (found []map[string]any) {
	r.Helper()
	for _, kv := range r.keys("ev", "") {
		line := map[string]any{}
		r.ok(json.Unmarshal(kv.Value, &line))
		if line["what"] == what {
			found = append(found, line)
		}
	}
	return found
}

func place(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	r.placedOn(b, v.ID, "")
	p, err := a.Place(r.Context(), v.ID, "host-b", "eve@x")
	r.ok(err)
	if p.Node != "b" || p.Host != "host-b" || p.By != "eve@x" || p.Revision == 0 || p.At.IsZero() {
		r.Errorf("placement is %+v", p)
	}
	r.placedOn(b, v.ID, "b")
	again, err := b.Place(r.Context(), v.ID, "b", "bob@y")
	r.ok(err)
	if again != p {
		r.Errorf("placed again: %+v, want %+v", again, p)
	}
	_, err = b.Place(r.Context(), v.ID, "a", "bob@y")
	r.ok(err)
	r.placedOn(a, v.ID, "a")
	if o := r.owner(v.ID); o != nil {
		r.Errorf("a placement made %+v the owner", o)
	}
	if got := r.lines("place"); len(got) != 2 || got[1]["from"] != "b" && got[0]["from"] != "b" || got[0]["by"] == got[1]["by"] {
		r.Errorf("audit lines are %v", got)
	}
	for node, want := range map[string]int{"a": 1, "b": 0, "": 1} {
		if all, err := b.Placed(r.Context(), node); err != nil || len(all) != want {
			r.Errorf("placed on %q: %v, %v, want %d", node, all, err, want)
		}
	}
	r.ok(b.Unplace(r.Context(), v.ID, "bob@y"))
	r.ok(b.Unplace(r.Context(), v.ID, "bob@y"))
	r.placedOn(a, v.ID, "")
	if got := r.lines("place nowhere"); len(got) != 1 || got[0]["by"] != "bob@y" {
		r.Errorf("audit lines are %v", got)
	}
	r.put("{", "place", v.ID)
	r.placedOn(a, v.ID, "") // what nobody can read
	_, err = a.Place(r.Context(), v.ID, "a", "eve@x")
	r.ok(err)
	r.placedOn(a, v.ID, "a")
}

func placeRefused(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	_, err := a.Place(r.Context(), v.ID, "nowhere", "eve@x")
	r.says(err, `no host "nowhere" is known; there are: host-a, host-b`)
	_, err = a.Place(r.Context(), "no-volume", "b", "eve@x")
	r.is(err, ownership.ErrNotFound)
	_, err = a.SetNodeState(r.Context(), "host-b", ownership.Cordoned, "eve@x")
	r.ok(err)
	_, err = a.Place(r.Context(), v.ID, "b", "eve@x")
	r.says(err, "host host-b is cordoned: choose another host, or type: docker flocker node uncordon host-b")
	r.ofState(err, "b", ownership.Cordoned)
	b.stop()
	r.ok(b.Leave(r.Context()))
	_, err = a.RemoveNode(r.Context(), "host-b", "eve@x")
	r.ok(err)
	_, err = a.Place(r.Context(), v.ID, "host-b", "eve@x")
	r.says(err, "host host-b is marked removed in the cluster: choose another host")
	r.ofState(err, "b", ownership.Removed)

	o := a.claim(v.ID)
	q, err := a.Quarantine(r.Context(), v, o.Token, "it smells")
	r.ok(err)
	_, err = a.Place(r.Context(), v.ID, "a", "eve@x")
	r.says(err, "volume v is quarantined: it smells")
	r.ok(a.Release(r.Context(), v.ID, o.Token))
	_, err = a.Delete(r.Context(), q, 0)
	r.ok(err)
	_, err = a.Place(r.Context(), v.ID, "a", "eve@x")
	r.is(err, ownership.ErrNotFound)
	if left := r.keys("place", ""); len(left) > 0 {
		r.Errorf("left: %v", left)
	}

	creating, _, err := a.Create(r.Context(), ownership.Volume{ID: "w", Name: "w", Backend: "memory", Size: 1 << 30, FS: "ext4"})
	r.ok(err)
	_, err = a.Place(r.Context(), creating.ID, "a", "eve@x")
	r.ok(err)
}

func placeAmbiguous(r *rig) {
	a, b := r.node("a"), r.node("b")
	for name, fault := range ambiguous {
		v := b.volume(name)
		a.once(fault)
		p, err := a.Place(r.Context(), v.ID, "a", "eve@x")
		r.ok(err)
		if now := r.placed(b, v.ID).Placement; now == nil || now.Revision != p.Revision || now.Op != p.Op {
			r.Errorf("%s: got %+v, and there is %+v", name, p, now)
		}
		b.once(fault)
		if p, err = b.PlaceHere(r.Context(), p, "docker"); err != nil {
			r.Fatalf("%s: %v", name, err)
		}
		r.placedOn(b, v.ID, "b")
		a.once(fault)
		r.ok(a.Unplace(r.Context(), v.ID, "eve@x"))
		r.placedOn(b, v.ID, "")
	}
	v := b.volume("outage")
	a.bad.Inject(func(string) ownership.Fault { return ownership.Fault{Refused: true} })
	_, err := a.Place(r.Context(), v.ID, "a", "eve@x")
	r.is(err, ownership.ErrUnavailable)
	r.is(a.Unplace(r.Context(), v.ID, "eve@x"), ownership.ErrUnavailable)
}

// ofState demands an error that is about the state of a node.
func (r *rig) ofState(err error, node, state string) {
	r.Helper()
	r.is(err, ownership.ErrConflict)
	if e, ok := errors.AsType[*ownership.NodeStateError](err); !ok || e.Node.ID != node || e.Node.State != state {
		r.Errorf("%T %v, want one of node %s that is %s", err, err, node, state)
	}
}

func placeTogether(r *rig) {
	nodes := r.nodes(4)
	v := nodes[0].volume("v")
	got := make([]ownership.Placement, len(nodes))
	together(nodes, func(i int, n *node) {
		var err error
		for {
			got[i], err = n.Place(r.Context(), v.ID, n.Node().ID, n.Node().ID)
			if !errors.Is(err, ownership.ErrConflict) {
				break
			}
		}
		if err != nil || got[i].Node != n.Node().ID {
			r.Errorf("%s: placed %+v, %v", n.Node().ID, got[i], err)
		}
	})
	now := r.placed(nodes[0], v.ID).Placement
	if now == nil {
		r.Fatal("placed nowhere")
	}
	for _, p := range got {
		if p.Revision > now.Revision || p.Node == now.Node && p != *now {
			r.Errorf("%+v is not the last one, which is %+v", p, now)
		}
	}
}

func placeHere(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	p, err := a.Place(r.Context(), v.ID, "a", "eve@x")
	r.ok(err)
	here, err := b.PlaceHere(r.Context(), p, "docker on host b")
	r.ok(err)
	if here.Node != "b" || here.Host != "host-b" || here.By != "docker on host b" {
		r.Errorf("placed %+v", here)
	}
	_, err = b.PlaceHere(r.Context(), p, "docker on host b")
	r.is(err, ownership.ErrConflict)
	r.ok(a.Unplace(r.Context(), v.ID, "eve@x"))
	_, err = b.PlaceHere(r.Context(), here, "docker on host b")
	r.is(err, ownership.ErrConflict)
	_, err = b.PlaceHere(r.Context(), ownership.Placement{Volume: v.ID}, "docker on host b")
	r.is(err, ownership.ErrConflict)
	r.placedOn(a, v.ID, "")
}

func placeWatched(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	changes, owner := b.FollowPlacements(r.Context()), b.WatchOwner(r.Context(), v.ID)
	hears := func(what string) ownership.PlacementChanges {
		r.Helper()
		select {
		case c := <-changes:
			return c
		case <-time.After(15 * time.Second):
			r.Fatalf("%s is not told", what)
		}
		return ownership.PlacementChanges{}
	}
	wakes := func(what string) {
		r.Helper()
		select {
		case <-owner:
		case <-time.After(15 * time.Second):
			r.Fatalf("no wake-up for %s", what)
		}
		for {
			select {
			case <-owner:
			case <-time.After(300 * time.Millisecond):
				return
			}
		}
	}
	if c := hears("the beginning"); !c.Begins || len(c.Changed) > 0 {
		r.Errorf("the beginning is %+v", c)
	}
	wakes("the beginning")
	p, err := a.Place(r.Context(), v.ID, "a", "eve@x")
	r.ok(err)
	if c := hears("a placement"); c.Begins || len(c.Changed) != 1 || c.Changed[0] != p {
		r.Errorf("heard %+v, want %+v", c, p)
	}
	all, revision, err := b.Placements(r.Context())
	if err != nil || len(all) != 1 || all[0] != p || revision < p.Revision {
		r.Errorf("listed %+v at %d, %v", all, revision, err)
	}
	r.ok(a.Unplace(r.Context(), v.ID, "eve@x"))
	if c := hears("its end"); c.Begins || len(c.Changed) != 1 || c.Changed[0] != (ownership.Placement{Volume: v.ID, Revision: c.Changed[0].Revision}) ||
		c.Changed[0].Revision <= revision {
		r.Errorf("heard %+v of its end", c)
	}
	o := a.claim(v.ID)
	wakes("a claim")
	r.ok(b.Request(r.Context(), o, "mount"))
	r.ok(b.Withdraw(r.Context(), o))
	select {
	case <-owner:
		r.Error("woken by a request of its own")
	case c := <-changes:
		r.Errorf("heard %+v, which is no placement's", c)
	case <-time.After(300 * time.Millisecond):
	}
	r.put("{", "place", v.ID)
	if c := hears("one that cannot be read"); len(c.Changed) != 1 || c.Changed[0].Node != "" {
		r.Errorf("heard %+v of one that cannot be read", c)
	}
}

func present(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	r.is(a.Present(r.Context(), v.ID, 7, "/mnt/v"), ownership.ErrLost)
	o := a.claim(v.ID)
	r.is(b.Present(r.Context(), v.ID, o.Token-1, "/mnt/v"), ownership.ErrLost)
	r.ok(a.Present(r.Context(), v.ID, o.Token, "/mnt/v"))
	p := r.placed(b, v.ID).Presence
	if p == nil || p.Node != "a" || p.Token != o.Token || p.Path != "/mnt/v" || p.Since.IsZero() {
		r.Fatalf("presence is %+v", p)
	}
	r.ok(b.Absent(r.Context(), v.ID)) // it is not b's
	if r.placed(b, v.ID).Presence == nil {
		r.Fatal("another node said that it is not here")
	}
	r.ok(a.Absent(r.Context(), v.ID))
	r.ok(a.Absent(r.Context(), v.ID))
	if p := r.placed(b, v.ID).Presence; p != nil {
		r.Fatalf("presence is %+v after Absent", p)
	}
	// It goes with the token, however that ends.
	for what, end := range map[string]func(ownership.Owner){
		"hand over": func(o ownership.Owner) {
			_, err := a.HandOver(r.Context(), v.ID, o.Token, b.ask(o, a))
			r.ok(err)
		},
		"withdrawn": func(o ownership.Owner) {
			req := b.ask(o, a)
			r.ok(b.Withdraw(r.Context(), o))
			_, err := a.HandOver(r.Context(), v.ID, o.Token, req)
			r.ok(err)
		},
		"release": func(o ownership.Owner) { r.ok(a.Release(r.Context(), v.ID, o.Token)) },
	} {
		o := r.owner(v.ID)
		if o == nil {
			made := a.claim(v.ID)
			o = &made
		}
		r.ok(a.Present(r.Context(), v.ID, o.Token, "/mnt/v"))
		end(*o)
		if left := r.keys("at", ""); len(left) > 0 {
			r.Errorf("%s: left %s", what, left[0].Value)
		}
		if now := r.owner(v.ID); now != nil {
			r.ok(b.Release(r.Context(), v.ID, now.Token))
		}
	}
	// A token that is over says nothing, nor does a node that is not live.
	o = a.claim(v.ID)
	r.ok(a.Present(r.Context(), v.ID, o.Token, "/mnt/v"))
	_, _, err := a.Retake(r.Context(), o)
	r.ok(err)
	if p := r.placed(b, v.ID).Presence; p != nil {
		r.Errorf("presence is %+v under an old token", p)
	}
	w := b.volume("w")
	o = b.claim(w.ID)
	r.ok(b.Present(r.Context(), w.ID, o.Token, "/mnt/w"))
	if r.placed(a, w.ID).Presence == nil {
		r.Error("it is not said to be there")
	}
	b.stop()
	r.ok(b.Leave(r.Context()))
	if p := r.placed(a, w.ID).Presence; p != nil {
		r.Errorf("presence is %+v without its node's lease", p)
	}
	r.is(b.Present(r.Context(), w.ID, o.Token, "/mnt/w"), ownership.ErrUnavailable)
}

func lease(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	_, err := a.Unlease(r.Context(), v.ID, "eve@x")
	r.is(err, ownership.ErrNoLease)
	long := time.Hour
	l, created, err := a.Lease(r.Context(), v.ID, "host-b", &long, "eve@x")
	r.ok(err)
	if !created || l.Node != "b" || l.Expires == nil || time.Until(*l.Expires) < 50*time.Minute || l.Revision == 0 {
		r.Errorf("lease is %+v, new %v", l, created)
	}
	if got := r.placed(a, v.ID).Lease; got == nil || got.Op != l.Op {
		r.Errorf("the view's is %+v", got)
	}
	_, _, err = b.Lease(r.Context(), v.ID, "a", nil, "bob@y")
	leased, ok := errors.AsType[*ownership.LeasedError](err)
	if !ok || leased.Lease.Node != "b" {
		r.Errorf("got %v, want a LeasedError", err)
	}
	r.says(err, "is leased to node b until 20")
	if got := r.keys("lease", v.ID); len(got) != 1 || got[0].Lease == 0 {
		r.Errorf("keys are %+v", got)
	}
	// A renewal replaces it, for ever here.
	l, created, err = b.Lease(r.Context(), v.ID, "b", nil, "bob@y")
	r.ok(err)
	if created || l.Expires != nil {
		r.Errorf("renewed lease is %+v, new %v", l, created)
	}
	if got := r.keys("lease", v.ID); len(got) != 1 || got[0].Lease != 0 {
		r.Errorf("keys are %+v", got)
	}
	back, err := a.Unlease(r.Context(), v.ID, "eve@x")
	r.ok(err)
	if back.Op != l.Op {
		r.Errorf("gave %+v back, want %+v", back, l)
	}
	if got, err := a.Leased(r.Context(), v.ID); got != nil || err != nil {
		r.Errorf("leased: %v, %v", got, err)
	}
	none := time.Duration(0)
	_, _, err = a.Lease(r.Context(), v.ID, "a", &none, "eve@x")
	r.says(err, "a lease of 0s is none")
	_, _, err = a.Lease(r.Context(), v.ID, "nobody", nil, "eve@x")
	r.says(err, `no host "nobody" is known`)
	_, _, err = a.Lease(r.Context(), "no-volume", "a", nil, "eve@x")
	r.is(err, ownership.ErrNotFound)
}

func leaseEnds(r *rig) {
	a := r.node("a")
	v := a.volume("v")
	short, long := ttl, time.Hour
	_, _, err := a.Lease(r.Context(), v.ID, "a", &short, "eve@x")
	r.ok(err)
	r.eventually("the end of the lease", func() bool {
		l, err := a.Leased(r.Context(), v.ID)
		r.ok(err)
		return l == nil
	})
	_, created, err := a.Lease(r.Context(), v.ID, "a", &short, "eve@x")
	r.ok(err)
	_, again, err := a.Lease(r.Context(), v.ID, "a", &long, "eve@x")
	r.ok(err)
	if !created || again {
		r.Errorf("new are %v and %v", created, again)
	}
	time.Sleep(4 * ttl)
	if l, err := a.Leased(r.Context(), v.ID); l == nil || err != nil {
		r.Errorf("a renewed lease is %v, %v after the time of the first", l, err)
	}
}

func leaseAmbiguous(r *rig) {
	a := r.node("a")
	long := time.Hour
	for name, fault := range ambiguous {
		v := a.volume(name)
		a.once(fault)
		l, created, err := a.Lease(r.Context(), v.ID, "a", &long, "eve@x")
		r.ok(err)
		if now := r.placed(a, v.ID).Lease; !created || now == nil || now.Op != l.Op || now.Revision != l.Revision {
			r.Errorf("%s: got %+v, new %v, and there is %+v", name, l, created, now)
		}
		a.once(fault)
		_, err = a.Unlease(r.Context(), v.ID, "eve@x")
		r.ok(err)
		if left := r.keys("lease", ""); len(left) > 0 {
			r.Errorf("%s: left %s", name, left[0].Value)
		}
	}
}

func cordon(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	state := func(want string) {
		r.Helper()
		nodes, err := a.Nodes(r.Context())
		r.ok(err)
		if nodes[1].ID != "b" || nodes[1].State != want || nodes[1].Address != "192.0.2.7" {
			r.Fatalf("node is %+v, want state %q", nodes[1], want)
		}
	}
	_, err := a.SetNodeState(r.Context(), "host-b", "tired", "eve@x")
	r.says(err, `"tired" is no state for a host`)
	for range 2 {
		n, err := a.SetNodeState(r.Context(), "host-b", ownership.Cordoned, "eve@x")
		r.ok(err)
		if n.ID != "b" || n.State != ownership.Cordoned {
			r.Errorf("node is %+v", n)
		}
	}
	state(ownership.Cordoned)
	r.eventually("the word that it is cordoned", b.Cordoned)
	if a.Cordoned() {
		r.Error("the other node believes that it is")
	}
	_, err = a.Place(r.Context(), v.ID, "b", "eve@x")
	r.says(err, "host host-b is cordoned")
	// It stays so when it registers anew, and takes no authority away.
	b.stop()
	b = r.node("b")
	state(ownership.Cordoned)
	if !b.Cordoned() {
		r.Error("forgotten by a new process")
	}
	b.claim(v.ID)
	_, err = a.SetNodeState(r.Context(), "b", "", "eve@x")
	r.ok(err)
	state("")
	r.eventually("the word that it is not", func() bool { return !b.Cordoned() })
	if got := r.lines("cordoned"); len(got) != 1 || got[0]["by"] != "eve@x" || got[0]["to"] != "b" {
		r.Errorf("audit lines are %v", got)
	}
	if got := r.lines("uncordoned"); len(got) != 1 {
		r.Errorf("audit lines are %v", got)
	}
}

func removeNode(r *rig) {
	a, b := r.node("a"), r.node("b")
	v, w := a.volume("v"), a.volume("w")
	o := b.claim(v.ID)
	_, err := a.Place(r.Context(), w.ID, "b", "eve@x")
	r.ok(err)
	_, err = a.Place(r.Context(), v.ID, "a", "eve@x")
	r.ok(err)
	_, err = a.RemoveNode(r.Context(), "host-b", "eve@x")
	r.says(err, "host host-b is live, so it was not removed")
	b.stop()
	r.ok(b.Leave(r.Context()))
	_, err = a.RemoveNode(r.Context(), "host-b", "eve@x")
	r.says(err, "host host-b still owns volumes, so it was not removed: v; mount them on another host first")
	r.is(err, ownership.ErrConflict)
	// Whom a takeover is still to cut off is still needed.
	seized, _, err := a.Seize(r.Context(), o, ownership.GroundsSilent)
	r.ok(err)
	_, err = a.RemoveNode(r.Context(), "host-b", "eve@x")
	r.says(err, "host host-b still owns volumes, so it was not removed: v")
	_, _, err = a.Settle(r.Context(), seized, "seen")
	r.ok(err)
	for range 2 {
		n, err := a.RemoveNode(r.Context(), "b", "eve@x")
		r.ok(err)
		if n.State != ownership.Removed {
			r.Errorf("node is %+v", n)
		}
	}
	r.placedOn(a, w.ID, "")
	r.placedOn(a, v.ID, "a")
	_, err = a.SetNodeState(r.Context(), "b", "", "eve@x")
	r.says(err, "host host-b is marked removed in the cluster")
	r.ofState(err, "b", ownership.Removed)
	// Another node of that name is another one.
	again := identity("b2")
	again.Host = "host-b"
	r.join(again, ownership.Config{TTL: 30 * time.Second}).registered()
	p, err := a.Place(r.Context(), w.ID, "host-b", "eve@x")
	r.ok(err)
	if p.Node != "b2" {
		r.Errorf("placed on %s, want b2", p.Node)
	}
}

func deletePlaced(r *rig) {
	a, b := r.node("a"), r.node("b")
	for _, owned := range []bool{false, true} {
		v := a.volume("v")
		var token int64
		if owned {
			token = a.claim(v.ID).Token
			r.ok(a.Present(r.Context(), v.ID, token, "/mnt/v"))
		}
		_, err := a.Place(r.Context(), v.ID, "b", "eve@x")
		r.ok(err)
		_, _, err = a.Lease(r.Context(), v.ID, "a", nil, "eve@x")
		r.ok(err)
		_, err = b.Delete(r.Context(), v, token+1)
		r.is(err, ownership.ErrLost)
		r.placedOn(b, v.ID, "b")
		_, err = a.Delete(r.Context(), v, token)
		r.ok(err)
		for _, kind := range []string{"place", "at", "lease"} {
			if left := r.keys(kind, ""); len(left) > 0 {
				r.Errorf("left: %s", left[0].Key)
			}
		}
		kvs := r.keys("gone", v.ID)
		var gone ownership.Gone
		if len(kvs) != 1 || kvs[0].Lease == 0 || json.Unmarshal(kvs[0].Value, &gone) != nil {
			r.Fatalf("remembered is %+v", kvs)
		}
		if gone.Volume.Name != "v" || gone.Volume.Size != v.Size || gone.Node != "b" || gone.At.IsZero() {
			r.Errorf("remembered is %+v", gone)
		}
	}
	v := a.volume("free")
	tombstone, err := a.Delete(r.Context(), v, 0)
	r.ok(err)
	r.ok(a.Purge(r.Context(), tombstone)) // nothing but this memory is left of it
	_, _, err = a.Create(r.Context(), ownership.Volume{ID: v.ID, Name: "other", Backend: "memory", Size: 1 << 30, FS: "ext4"})
	r.says(err, "id "+v.ID+" belongs to another volume, or did")
	r.is(err, ownership.ErrConflict)
	if got := len(r.keys("gone", "")); got != 3 {
		r.Errorf("%d volumes are remembered, want 3", got)
	}
	// Its lease is nothing to fail for.
	v = a.volume("last")
	bucket := r.keys("gone", "")[0].Lease
	a.stop()
	if err := r.store.Revoke(r.Context(), bucket); err != nil && !errors.Is(err, ownership.ErrLease) {
		r.Fatal(err)
	}
	_, err = a.Delete(r.Context(), v, 0)
	r.ok(err)
}
