package ownership

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"
)

// tenThousand is a mirror of as many volumes on a hundred nodes, and the keys of their
// owners.
func tenThousand(tb testing.TB) (r *mirror, owners []KV) {
	tb.Helper()
	const volumes, nodes = 10_000, 100
	m := New(NewMemory(), Node{ID: "me", Host: "me", Boot: "boot"}, Config{})
	r = newMirror(m)
	id := func(i int) string { return fmt.Sprintf("%08x-1111-4222-8333-444455556666", i) }
	put := func(key string, value any, revision int) KV {
		kv := KV{Key: key, Value: encode(value), ModRevision: int64(revision), CreateRevision: int64(revision)}
		r.put(kv)
		return kv
	}
	for i := range nodes {
		put(m.node(fmt.Sprint(i)), Node{ID: fmt.Sprint(i), Host: fmt.Sprint("host", i), Boot: "boot"}, i+1)
		put(m.live(fmt.Sprint(i)), alive{}, i+1)
	}
	for i := range volumes {
		put(m.vol(id(i)), Volume{
			ID: id(i), Name: fmt.Sprint("volume-", i), Backend: "loopback", Ref: id(i), Size: 1 << 30, FS: "ext4", Phase: PhaseReady, Formatted: true,
			Labels: map[string]string{"com.docker.compose.project": "shop", "com.docker.compose.volume": "db"}, Op: newOp(),
		}, i+1000)
		node := fmt.Sprint(i % nodes)
		owners = append(owners, put(m.own(id(i)), Owner{Volume: id(i), Node: node, Host: "host" + node, Boot: "boot", Op: newOp()}, i+20_000))
	}
	return r, owners
}

// A State that was handed out stays as it was, and shares what has not changed.
func TestStateIsKept(t *testing.T) {
	r, owners := tenThousand(t)
	r.revision = 40_000
	first := r.state()
	if len(first.Views) != 10_000 || !slices.IsSortedFunc(first.Views, func(a, b View) int { return slices.Compare([]byte(a.Volume.Name), []byte(b.Volume.Name)) }) {
		t.Fatalf("%d volumes, or not by name", len(first.Views))
	}
	r.revision++ // by a key that is not in it
	if next := r.state(); next.Revision != 40_001 || &next.Views[0] != &first.Views[0] || &next.Nodes[0] != &first.Nodes[0] {
		t.Error("everything was copied, and nothing had changed")
	}
	i := slices.IndexFunc(first.Views, func(v View) bool { return v.Volume.ID == last(owners[0].Key) })
	r.remove(owners[0].Key)
	next := r.state()
	if first.Views[i].Owner == nil || next.Views[i].Owner != nil {
		t.Errorf("the owner was %+v before it was removed, and is %+v", first.Views[i].Owner, next.Views[i].Owner)
	}
	owned := func(s *State) int {
		return s.Nodes[slices.IndexFunc(s.Nodes, func(n NodeStatus) bool { return n.ID == "0" })].Owned
	}
	if owned(first) != 100 || owned(next) != 99 {
		t.Errorf("node 0 owned %d volumes and then %d", owned(first), owned(next))
	}
	r.remove(r.m.live("1"))
	for i, v := range r.state().Views {
		if v.Owner != nil && v.OwnerLive != (v.Owner.Node != "1") {
			t.Fatalf("owner %s is live: %v", v.Owner.Node, v.OwnerLive)
		}
		if v := next.Views[i]; v.Owner != nil && !v.OwnerLive {
			t.Fatal("a State that was handed out has changed")
		}
	}
}

// What it costs to follow ten thousand volumes: to take over one change, and to make a
// State after it, which is done every 20 ms at most and only if somebody asks.
func BenchmarkObserver(b *testing.B) {
	r, owners := tenThousand(b)
	b.Run("change", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			r.put(owners[i%len(owners)])
		}
	})
	b.Run("state after a change", func(b *testing.B) {
		for b.Loop() {
			r.put(owners[0])
			r.state()
		}
	})
	b.Run("state without a change", func(b *testing.B) {
		for b.Loop() {
			r.state()
		}
	})
}

// When nodes lapsed is forgotten once nothing depends on it: not of one that is silent,
// nor within the breaker's window.
func TestLapsesAreForgotten(t *testing.T) {
	var p peers
	at := func(seconds int) time.Duration { return time.Duration(seconds) * time.Second }
	come := func(node string) { p.see(KeyEvent{KV: KV{Key: node, ModRevision: 1}}, 0) }
	gone := func(node string, seconds int) { p.see(KeyEvent{KV: KV{Key: node}, Deleted: true}, at(seconds)) }
	want := func(nodes ...string) {
		t.Helper()
		if got := slices.Sorted(maps.Keys(p.lapsed)); !slices.Equal(got, nodes) {
			t.Errorf("remembered are %v, want %v", got, nodes)
		}
	}
	p.list(nil, at(1))
	for _, node := range []string{"back", "silent", "third"} {
		come(node)
	}
	gone("back", 10)
	gone("silent", 10)
	come("back")
	gone("third", 69)
	want("back", "silent", "third") // within the window
	come("third")
	gone("third", 70)
	want("silent", "third")
	p.broke()
	p.list(nil, at(100)) // silence is counted from here; "back" is gone as well
	come("third")
	gone("third", 101)
	want("back", "third")
}
