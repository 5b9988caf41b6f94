package ownershiptest

import (
	"context"
	"encoding/json"
	"errors"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

func register(r *rig) {
	nodes := r.nodes(5)
	for _, n := range nodes {
		r.ok(n.Live())
		if got, want := n.Cluster(), nodes[0].Cluster(); got == "" || got != want {
			r.Errorf("node %s is in cluster %q, want %q", n.Node().ID, got, want)
		}
	}
	for _, prefix := range []string{"live", "node"} {
		if got := len(r.keys(prefix, "")); got != 5 {
			r.Errorf("got %d keys under %s, want 5", got, prefix)
		}
	}
	for _, kv := range r.keys("") {
		may := kv.Key == r.key("live", path.Base(kv.Key)) || strings.HasPrefix(kv.Key, r.key("ev", ""))
		if onLease := kv.Lease != 0; onLease != may {
			r.Errorf("key %s: on a lease is %v", kv.Key, onLease)
		}
	}
	nodes[0].stop()
	if got := len(r.keys("live", "n0")); got != 1 {
		r.Error("the liveness key went when Run ended; it is to stay for a process that starts again")
	}
	r.ok(nodes[0].Leave(r.Context()))
	if got := len(r.keys("live", "n0")); got != 0 {
		r.Error("the liveness key is still there after Leave")
	}
	r.is(nodes[0].Live(), ownership.ErrUnavailable)
	r.says(nodes[0].Live(), "ownership cannot be checked: this node has left")
}

// A process that starts again is the same live node at once, and the one before
// it, should it still run, is not any more.
func registerRestarted(r *rig) {
	former, other := r.node("a"), r.node("b")
	v, w := former.volume("v"), former.volume("w")
	o := former.claim(v.ID)
	theirs := other.claim(w.ID)
	r.ok(former.Request(r.Context(), theirs, "mount"))

	start := time.Now()
	next := r.join(identity("a"), ownership.Config{TTL: 30 * time.Second, Renew: time.Second})
	next.registered()
	if took := time.Since(start); took > 20*time.Second {
		r.Errorf("registering again took %v", took)
	}
	r.ok(next.Check(r.Context(), v.ID, o.Token))
	if got := r.keys("req", ""); len(got) != 0 {
		r.Errorf("the former process's request is still there: %s", got[0].Key)
	}
	if _, _, err := former.Claim(r.Context(), v.ID); err == nil {
		r.Error("the former process could claim")
	}
	r.says(former.Request(r.Context(), theirs, "mount"), "ownership cannot be checked")
	r.eventually("the former process's notice", func() bool {
		err := former.Live()
		return err != nil && errors.Is(err, ownership.ErrUnavailable) && contains(err, "another Flocker process on host host-a has taken over as node a")
	})
	r.ok(next.Live())
	_, _, err := next.Claim(r.Context(), v.ID)
	r.held(err, "a", true)
	r.ok(next.Release(r.Context(), v.ID, o.Token))
	next.claim(v.ID)
}

func contains(err error, text string) bool { return strings.Contains(err.Error(), text) }

// The same node id with another boot is another machine, or this one before its
// restart; only time can tell.
func registerCopy(r *rig) {
	first := r.nodeTTL("a", 10*ttl)
	clone := identity("a")
	clone.Host, clone.Boot = "host-clone", "another-boot"
	second := r.join(clone, ownership.Config{TTL: ttl})
	r.eventually("the refusal", func() bool { return contains(second.Live(), "is in use by host") })
	ctx, cancel := context.WithTimeout(r.Context(), 500*time.Millisecond)
	defer cancel()
	err := second.Registered(ctx)
	r.is(err, ownership.ErrUnavailable)
	r.says(err, "node id a is in use by host host-a (boot boot-a): if this host has just been restarted, wait 1s; if it is a copy of that host, give it a node id of its own")
	r.ok(first.Live())

	first.stop()
	r.eventually("the registration of the other one", func() bool { return second.Live() == nil })
}

func registerRemoved(r *rig) {
	r.put(`{"id":"a","host":"host-a","boot":"x","state":"removed"}`, "node", "a")
	n := r.join(identity("a"), ownership.Config{})
	r.eventually("the refusal", func() bool { return contains(n.Live(), "is marked removed") })
	ctx, cancel := context.WithTimeout(r.Context(), 300*time.Millisecond)
	defer cancel()
	r.says(n.Registered(ctx), "ownership cannot be checked: node a (host host-a) is marked removed in the cluster")

	r.put(`{"id":"a","host":"host-a","boot":"x","state":"cordoned"}`, "node", "a")
	n.registered()
	var kept ownership.Node
	r.ok(json.Unmarshal(r.keys("node", "a")[0].Value, &kept))
	if kept.State != "cordoned" || kept.Boot != "boot-a" || kept.Session != "" {
		r.Errorf("registering made of the node %+v", kept)
	}
}

// A lease that etcd has revoked wrongly costs a registration and nothing else.
func registerLeaseRevoked(r *rig) {
	n := r.nodeTTL("a", 10*ttl)
	v := n.volume("v")
	o := n.claim(v.ID)
	for range 2 {
		before := r.keys("live", "a")[0].Lease
		r.ok(r.store.Revoke(r.Context(), before))
		r.eventually("registering again", func() bool {
			now := r.keys("live", "a")
			return len(now) == 1 && now[0].Lease != before && n.Live() == nil
		})
	}
	r.ok(n.Check(r.Context(), v.ID, o.Token))
	n.claim(n.volume("w").ID)
}

// Another process that registers as this node at the same time is not this one.
func registerMeanwhile(r *rig) {
	first := r.node("a")
	first.stop()
	other := strings.Replace(string(r.keys("live", "a")[0].Value), first.Node().Session, "another", 1)
	store := r.cluster.Connect()
	r.Cleanup(func() { _ = store.Close() })
	bad := ownership.NewFaults(store)
	var once sync.Once
	bad.Inject(func(call string) ownership.Fault {
		if call == "txn" { // the first that may write is the registration
			once.Do(func() { r.put(other, "live", "a") })
		}
		return ownership.Fault{}
	})
	m := ownership.New(bad, identity("a"), ownership.Config{Prefix: r.cluster.Prefix, TTL: 30 * time.Second, Timeout: 3 * time.Second, Seen: first.Seen()})
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	limit, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	r.ok(m.Registered(limit))
	if live := r.keys("live", "a")[0]; live.Lease != m.Term() {
		r.Errorf("registered with lease %d, and live is %s on lease %d", m.Term(), live.Value, live.Lease)
	}
	cancel()
	<-done
}

func registerAmbiguous(r *rig) {
	for name, fault := range ambiguous {
		id := identity("n" + name)
		store := ownership.NewFaults(r.cluster.Connect())
		defer func() { _ = store.Close() }()
		var count atomic.Int32
		store.Inject(func(call string) ownership.Fault {
			// The first write is meta, the second the registration.
			if call == "txn" && count.Add(1) == 2 {
				return fault
			}
			return ownership.Fault{}
		})
		m := ownership.New(store, id, ownership.Config{Prefix: r.cluster.Prefix, TTL: 30 * time.Second})
		ctx, cancel := context.WithCancel(r.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		limit, stop := context.WithTimeout(ctx, time.Minute)
		if err := m.Registered(limit); err != nil {
			r.Errorf("%s: %v", name, err)
		}
		stop()
		if node := r.keys("node", id.ID)[0]; node.Version != 1 {
			r.Errorf("%s: registered %d times", name, node.Version)
		}
		if got := len(r.keys("live", id.ID)); got != 1 {
			r.Errorf("%s: %d liveness keys", name, got)
		}
		r.ok(m.Live())
		cancel()
		<-done
	}
}

// An etcd that is not the one this node knew, or an older state of it, is
// refused.
func registerOtherCluster(r *rig) {
	refused := func(seen ownership.Seen, want string) {
		r.Helper()
		n := r.join(identity("b"), ownership.Config{Seen: seen})
		r.eventually("the refusal", func() bool { return contains(n.Live(), want) })
		r.is(n.Live(), ownership.ErrUnavailable)
		n.stop()
	}
	refused(ownership.Seen{Cluster: "old", Gen: 1}, "but this node belongs to cluster old: check the endpoints and the prefix, or restore etcd's data")
	if got := r.keys(""); len(got) != 0 {
		r.Fatalf("a node that knows another cluster made %s", got[0].Key)
	}
	a := r.node("a")
	seen := a.Seen()
	if seen.Cluster != a.Cluster() || seen.Gen != 1 || seen.Revision == 0 {
		r.Fatalf("seen is %+v", seen)
	}
	refused(ownership.Seen{Cluster: "old", Gen: 1}, "but this node belongs to cluster old: check the endpoints and the prefix")
	refused(ownership.Seen{Cluster: seen.Cluster, Gen: 2}, "is at generation 1 and was at 2 before")
	refused(ownership.Seen{Cluster: seen.Cluster, Gen: 1, Revision: seen.Revision + 1_000_000_000}, "it has been put back to an older state")
	r.join(identity("b"), ownership.Config{Seen: seen}).registered()

	r.put(`{"cluster":"x","gen":1,"schema":2}`, "meta")
	n := r.join(identity("c"), ownership.Config{})
	r.eventually("the refusal", func() bool { return contains(n.Live(), "schema 2 is newer") })
	ctx, cancel := context.WithTimeout(r.Context(), 300*time.Millisecond)
	defer cancel()
	r.says(n.Registered(ctx), "schema 2 is newer than this version of Flocker understands (1): update Flocker on this host")
}

func unhealthy(r *rig) {
	var sick atomic.Bool
	n := r.join(identity("a"), ownership.Config{Healthy: func() error {
		if sick.Load() {
			return errors.New("the worker has not moved for 5s")
		}
		return nil
	}})
	n.registered()
	sick.Store(true)
	r.eventually("the end of the lease", func() bool { return len(r.keys("live", "a")) == 0 })
	r.is(n.Live(), ownership.ErrUnavailable)
	r.says(n.Live(), "the worker has not moved for 5s")
	sick.Store(false)
	r.eventually("registering again", func() bool { return n.Live() == nil && len(r.keys("live", "a")) == 1 })
}

func outage(r *rig) {
	n := r.join(identity("a"), ownership.Config{TTL: 6 * ttl, Timeout: time.Second})
	n.registered()
	v, free := n.volume("v"), n.volume("free")
	o := n.claim(v.ID)
	n.bad.Partition(true)

	for name, call := range map[string]func(context.Context) error{
		"Lookup":  func(ctx context.Context) error { _, err := n.Lookup(ctx, "v"); return err },
		"List":    func(ctx context.Context) error { _, err := n.List(ctx); return err },
		"Claim":   func(ctx context.Context) error { _, _, err := n.Claim(ctx, free.ID); return err },
		"Release": func(ctx context.Context) error { return n.Release(ctx, v.ID, o.Token) },
		"Check":   func(ctx context.Context) error { return n.Check(ctx, v.ID, o.Token) },
	} {
		start := time.Now()
		err := call(r.Context())
		r.is(err, ownership.ErrUnavailable)
		r.says(err, "ownership cannot be checked: ")
		if took := time.Since(start); took > 10*time.Second {
			r.Errorf("%s took %v", name, took)
		}
		ctx, cancel := context.WithTimeout(r.Context(), 50*time.Millisecond)
		start = time.Now()
		r.is(call(ctx), ownership.ErrUnavailable)
		if took := time.Since(start); took > 10*time.Second {
			r.Errorf("%s took %v of a context of 50ms", name, took)
		}
		cancel()
	}
	r.eventually("the end of the lease's validity", func() bool { return n.Live() != nil })
	r.is(n.Live(), ownership.ErrUnavailable)
	r.says(n.Live(), "this node's lease could not be renewed")
	start := time.Now()
	_, _, err := n.Claim(r.Context(), free.ID)
	r.is(err, ownership.ErrUnavailable)
	if took := time.Since(start); took > 10*time.Second {
		r.Errorf("Claim without a valid lease took %v", took)
	}
	r.eventually("the end of the lease", func() bool { return len(r.keys("live", "a")) == 0 })

	n.bad.Partition(false)
	r.eventually("registering again", func() bool { return n.Live() == nil })
	r.ok(n.Check(r.Context(), v.ID, o.Token))
	n.claim(free.ID)
	r.ok(n.Release(r.Context(), v.ID, o.Token))
}

// What a dead node owns stays its own, and whoever wants it is told so.
func ownerDies(r *rig) {
	a, b := r.nodeTTL("a", 10*ttl), r.node("b")
	v := a.volume("v")
	o := a.claim(v.ID)
	a.stop()
	r.eventually("the end of the lease", func() bool {
		view, err := b.View(r.Context(), v.ID)
		r.ok(err)
		return !view.OwnerLive
	})
	r.ownedBy(v.ID, "a", o.Token)
	_, _, err := b.Claim(r.Context(), v.ID)
	r.held(err, "a", false)
	r.says(err, "volume v is owned by host host-a, which has not been heard from")
	err = b.Request(r.Context(), o, "mount")
	r.held(err, "a", false)
	r.says(err, "volume v is owned by host host-a, which has not been heard from")
	_, err = b.Delete(r.Context(), v, 0)
	r.held(err, "a", false)
}
