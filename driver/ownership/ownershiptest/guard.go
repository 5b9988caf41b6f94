package ownershiptest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// lapse ends a node's lease, as if etcd had been away for long.
func (r *rig) lapse(id string) {
	r.Helper()
	for _, kv := range r.keys("live", id) {
		r.ok(r.store.Revoke(r.Context(), kv.Lease))
	}
}

// state is every key but the audit lines, with its revision.
func (r *rig) state() string {
	r.Helper()
	var b strings.Builder
	for _, kv := range r.keys("") {
		if !strings.HasPrefix(kv.Key, r.key("ev")) {
			fmt.Fprintf(&b, "%s@%d %s\n", kv.Key, kv.ModRevision, kv.Value)
		}
	}
	return b.String()
}

// What an etcd says that is not this cluster, or an older state of it, is not
// read, and nothing is written into it.
func unsafe(r *rig) {
	a, dead := r.node("a"), r.node("dead")
	ctx := r.Context()
	creating, _, err := a.Create(ctx, ownership.Volume{ID: uuid.NewString(), Name: "creating"})
	r.ok(err)
	free, owned, wanted := a.volume("free"), a.volume("owned"), a.volume("wanted")
	handed, silent, pending := a.volume("handed"), a.volume("silent"), a.volume("pending")
	o, h := a.claim(owned.ID), a.claim(handed.ID)
	lost, taken := dead.claim(silent.ID), dead.claim(pending.ID)
	b := r.node("b")
	theirs := b.claim(wanted.ID)
	req := b.ask(h, a)
	r.ok(a.Request(ctx, theirs, "mount"))
	quarantined := a.volume("quarantined")
	quarantined.Phase = ownership.PhaseQuarantined
	quarantined, err = a.Update(ctx, quarantined)
	r.ok(err)
	tombstone, err := a.Delete(ctx, a.volume("tombstone"), 0)
	r.ok(err)
	dead.dies()
	p := a.seize(taken, ownership.GroundsSilent)
	b.stop()
	r.ok(a.Unsafe())

	calls := map[string]func() error{
		"Create": func() error {
			_, _, err := a.Create(ctx, ownership.Volume{ID: uuid.NewString(), Name: "new"})
			return err
		},
		"Ready":       func() error { _, err := a.Ready(ctx, creating); return err },
		"Update":      func() error { _, err := a.Update(ctx, free); return err },
		"Formatted":   func() error { _, err := a.Formatted(ctx, owned.ID, o.Token, owned); return err },
		"Quarantine":  func() error { _, err := a.Quarantine(ctx, owned, o.Token, "x"); return err },
		"Reinstate":   func() error { _, err := a.Reinstate(ctx, quarantined.ID, "ann@ops"); return err },
		"Delete":      func() error { _, err := a.Delete(ctx, free, 0); return err },
		"Purge":       func() error { return a.Purge(ctx, tombstone) },
		"Claim":       func() error { _, _, err := a.Claim(ctx, free.ID); return err },
		"Retake":      func() error { _, _, err := a.Retake(ctx, o); return err },
		"Release":     func() error { return a.Release(ctx, owned.ID, o.Token) },
		"HandOver":    func() error { _, err := a.HandOver(ctx, handed.ID, h.Token, req); return err },
		"Request":     func() error { return a.Request(ctx, theirs, "mount") },
		"Withdraw":    func() error { return a.Withdraw(ctx, theirs) },
		"Reply":       func() error { return a.Reply(ctx, req, ownership.Reply{Busy: true}) },
		"Seize":       func() error { _, _, err := a.Seize(ctx, lost, ownership.GroundsSilent); return err },
		"Settle":      func() error { _, _, err := a.Settle(ctx, p, "x"); return err },
		"DeclareDead": func() error { _, err := a.DeclareDead(ctx, "dead", ownership.Death{}); return err },
		// And what is read there is not believed.
		"Lookup": func() error { _, err := a.Lookup(ctx, "nix"); return err },
		"View":   func() error { _, err := a.View(ctx, "nix"); return err },
		"List":   func() error { _, err := a.List(ctx); return err },
		"Owned":  func() error { _, err := a.Owned(ctx); return err },
		"Check":  func() error { return a.Check(ctx, owned.ID, 1) },
		"Died":   func() error { _, err := a.Died(ctx, "dead", "boot-dead"); return err },
		"Nodes":  func() error { _, err := a.Nodes(ctx); return err },
	}
	seen := a.Seen()
	meta := string(r.keys("meta")[0].Value)
	for meta, want := range map[string]string{
		fmt.Sprintf(`{"cluster":%q,"gen":0,"schema":1}`, seen.Cluster): "is at generation 0 and was at 1 before: etcd has been put back to an older state; restore a newer backup; or, if there is none, stop every container that uses a volume, and type: docker flocker cluster accept-restore",
		`{"cluster":"other","gen":9,"schema":1}`:                       "etcd has cluster other under",
		`{"gen":1}`:                                                    "is broken: cluster is missing",
	} {
		r.put(meta, "meta")
		r.lapse("a")
		r.eventually("the refusal", func() bool { return a.Unsafe() != nil && contains(a.Unsafe(), want) })
		r.is(a.Live(), ownership.ErrUnavailable)
		before := r.state()
		for _, name := range slices.Sorted(maps.Keys(calls)) {
			err := calls[name]()
			if err == nil || !contains(err, want) {
				r.Errorf("%s: got error %v, want it to say %q", name, err, want)
				continue
			}
			r.is(err, ownership.ErrUnavailable)
		}
		if after := r.state(); after != before {
			r.Fatalf("an etcd that is refused had\n%sand has\n%s", before, after)
		}
	}
	// The generation that it was at is not proof that all is as it was.
	r.put(meta, "meta")
	r.eventually("the refusal", func() bool { return contains(a.Unsafe(), "which has gone on since") })
	_, err = a.AcceptRestore(ctx, "ann@ops")
	r.ok(err)
	r.eventually("registering again", func() bool { return a.Live() == nil })
	r.ok(a.Unsafe())
	r.ok(a.Release(ctx, owned.ID, o.Token))
}

// A node that knows its cluster does nothing in etcd before it has compared.
func unsafeBeforehand(r *rig) {
	a := r.node("a")
	v := a.volume("v")
	o := a.claim(v.ID)
	b := ownership.New(r.store, identity("a"), ownership.Config{Prefix: r.cluster.Prefix, Seen: a.Seen()})
	err := b.Release(r.Context(), v.ID, o.Token)
	r.is(err, ownership.ErrUnavailable)
	r.says(err, "this node has not registered in etcd yet")
	r.stays(o)
}

// An operator accepts the older state on one node, and all come back.
func acceptRestore(r *rig) {
	first := r.node("a")
	v := first.volume("v")
	seen := first.Seen()
	first.dies()
	far := seen
	far.Revision += 1_000_000_000
	refused := func(id string, seen ownership.Seen, want string) *node {
		n := r.join(identity(id), ownership.Config{TTL: 30 * time.Second, Renew: time.Second, Seen: seen})
		r.eventually("the refusal", func() bool { return n.Unsafe() != nil && contains(n.Unsafe(), want) })
		if !n.Seen().Older || n.Seen().Revision != seen.Revision {
			r.Errorf("seen is %+v", n.Seen())
		}
		return n
	}
	// A token that node was given may be given again here, so there is only one way.
	const again = "restore it once more, with: etcdutl snapshot restore --bump-revision 2000000000 --mark-compacted; then type"
	e := refused("e", far, fmt.Sprintf(" and was at %d before: it has been put back to an older state; restore a newer backup; "+
		"or, if there is none, stop every container that uses a volume, %s: docker flocker cluster accept-restore", far.Revision, again))
	before := r.state()
	_, err := e.AcceptRestore(r.Context(), "ann@ops")
	r.says(err, fmt.Sprintf(" and this host has seen %d, so nothing was changed: tokens that were given before would be given again; %s this again", far.Revision, again))
	if after := r.state(); after != before {
		r.Fatalf("etcd had\n%sand has\n%s", before, after)
	}

	seen.Older = true // its revision has gone on since
	a, b := refused("a", seen, "which has gone on since"), refused("b", seen, "which has gone on since")
	healthy := r.node("c")
	gen, err := a.AcceptRestore(r.Context(), "ann@ops")
	r.ok(err)
	if gen != 2 {
		r.Errorf("generation is %d, want 2", gen)
	}
	accepted := r.keys("meta")[0].ModRevision
	var meta map[string]any
	r.ok(json.Unmarshal(r.keys("meta")[0].Value, &meta))
	if at, err := time.Parse(time.RFC3339, fmt.Sprint(meta["at"])); meta["by"] != "ann@ops" || err != nil || time.Since(at) > time.Minute {
		r.Errorf("generation 2 is recorded as %v", meta)
	}
	for _, n := range []*node{a, b} {
		n.registered()
		r.ok(n.Unsafe())
		r.ok(n.Live())
		if got := n.Seen(); got.Gen != 2 || got.Older || got.Revision < accepted {
			r.Errorf("seen is %+v", got)
		}
	}
	o := b.claim(v.ID)
	r.ok(b.Release(r.Context(), v.ID, o.Token))
	if line := r.line("accept restore", ""); line["by"] != "ann@ops" {
		r.Errorf("audit line is %v", line)
	}
	// That others have accepted it makes it no better for who has seen more.
	accepting := fmt.Sprintf("an etcd that was put back to an older state was accepted at revision %d, and this host has seen ", accepted)
	r.eventually("the refusal", func() bool {
		return contains(e.Unsafe(), fmt.Sprint(accepting, far.Revision)) && contains(e.Unsafe(), again)
	})
	e.stop()
	seen.Revision = accepted
	refused("e", seen, fmt.Sprint(accepting, accepted))

	// A node that was content finds out as well, and so does one that still sees
	// more than everybody else did.
	for name, fault := range ambiguous {
		r.eventually("its registration", func() bool { return healthy.Live() == nil })
		healthy.once(fault)
		gen++
		got, err := healthy.AcceptRestore(r.Context(), "ann@ops")
		r.ok(err)
		if got != gen {
			r.Errorf("%s: generation is %d, want %d", name, got, gen)
		}
		r.eventually("registering again", func() bool { return healthy.Seen().Gen == gen })
	}
	more := b.Seen()
	more.Gen = 40
	d := refused("d", more, "was at 40 before")
	gen, err = d.AcceptRestore(r.Context(), "ann@ops")
	r.ok(err)
	if gen != 41 {
		r.Errorf("generation is %d, want 41", gen)
	}
	d.registered()
}

// What is no older state of this cluster cannot be accepted as one.
func acceptRestoreRefused(r *rig) {
	seen := ownership.Seen{Cluster: "mine", Gen: 3, Revision: 1}
	n := r.join(identity("a"), ownership.Config{Seen: seen})
	r.eventually("the refusal", func() bool { return n.Unsafe() != nil })
	_, err := n.AcceptRestore(r.Context(), "ann@ops")
	r.says(err, "so there is nothing to accept: restore etcd's data from a backup first")
	if got := r.keys(""); len(got) != 0 {
		r.Errorf("there is %s", got[0].Key)
	}
	r.put(`{"cluster":"other","gen":1,"schema":1}`, "meta")
	_, err = n.AcceptRestore(r.Context(), "ann@ops")
	r.says(err, "etcd has cluster other under")
	r.put(`{"cluster":"mine","gen":1,"schema":2}`, "meta")
	_, err = n.AcceptRestore(r.Context(), "ann@ops")
	r.says(err, "schema 2 is newer")
	ctx, cancel := context.WithTimeout(r.Context(), 100*time.Millisecond)
	defer cancel()
	n.bad.Partition(true)
	_, err = n.AcceptRestore(ctx, "ann@ops")
	r.is(err, ownership.ErrUnavailable)
	n.bad.Partition(false)
	r.put(`{"cluster":"mine","gen":1,"schema":1}`, "meta")
	gen, err := n.AcceptRestore(r.Context(), "ann@ops")
	r.ok(err)
	if gen != 4 {
		r.Errorf("generation is %d, want 4", gen)
	}
	n.registered()

	// Others have accepted, before this node knows of it and while it does the same.
	n.stop()
	r.put(`{"cluster":"mine","gen":9,"schema":1}`, "meta")
	gen, err = n.AcceptRestore(r.Context(), "ann@ops")
	r.ok(err)
	if gen != 10 {
		r.Errorf("generation is %d, want 10", gen)
	}
	n.meanwhile(func() { r.put(`{"cluster":"mine","gen":41,"schema":1}`, "meta") })
	gen, err = n.AcceptRestore(r.Context(), "ann@ops")
	r.ok(err)
	if meta := string(r.keys("meta")[0].Value); gen != 41 || meta != `{"cluster":"mine","gen":41,"schema":1}` {
		r.Errorf("generation is %d and in etcd %s, want 41", gen, meta)
	}
}
