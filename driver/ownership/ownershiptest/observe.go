package ownershiptest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// observer is one that runs, on a connection of its own.
func (r *rig) observer() (*ownership.Observer, *node) {
	r.Helper()
	n := r.node("observer")
	o := ownership.NewObserver(n.Map)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := o.Run(ctx); !errors.Is(err, context.Canceled) {
			r.Errorf("Run of the observer ended with %v", err)
		}
	}()
	r.Cleanup(func() {
		cancel()
		<-done
	})
	return o, n
}

const patient = 30 * time.Second

func (r *rig) patience() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	r.Cleanup(cancel)
	return ctx
}

// sees waits until the observer says what etcd does.
func (r *rig) sees(o *ownership.Observer, m *node) *ownership.State {
	r.Helper()
	_, err := o.Wait(r.patience(), 0)
	r.ok(err)
	var s *ownership.State
	diff := ""
	for end := time.Now().Add(patient); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s, _, _ = o.State()
		if diff = r.compare(s, m); diff == "" {
			return s
		}
	}
	r.Fatal(diff)
	return nil
}

// compare returns what a State has that etcd has not, or the other way round.
func (r *rig) compare(s *ownership.State, m *node) string {
	views, err := m.List(r.Context())
	r.ok(err)
	shown := slices.DeleteFunc(slices.Clone(s.Views), func(v ownership.View) bool { return v.Volume.Phase == ownership.PhaseDeleting })
	if len(shown)+len(views) > 0 && !reflect.DeepEqual(shown, views) {
		return fmt.Sprintf("observed at %d:\n%+v\nwant\n%+v", s.Revision, shown, views)
	}
	nodes, err := m.Nodes(r.Context())
	r.ok(err)
	if len(nodes)+len(s.Nodes) > 0 && !reflect.DeepEqual(s.Nodes, nodes) {
		return fmt.Sprintf("observed at %d:\n%+v\nwant\n%+v", s.Revision, s.Nodes, nodes)
	}
	return ""
}

func observe(r *rig) {
	a, b := r.node("a"), r.node("b")
	before := a.volume("before")
	o, m := r.observer()
	if s, _, ok := o.State(); ok {
		r.Errorf("known before etcd was asked: %+v", s)
	}
	s := r.sees(o, m)
	if len(s.Views) != 1 || s.Views[0].Volume.Name != "before" || len(s.Nodes) != 3 {
		r.Fatalf("state is %+v", s)
	}

	v := a.volume("v")
	own := a.claim(v.ID)
	b.ask(own, a)
	now := r.sees(o, m)
	if now.Revision <= s.Revision || len(s.Views) != 1 {
		r.Errorf("state of revision %d has become %+v", s.Revision, s)
	}
	if got := now.Views[1]; got.Owner == nil || got.Owner.Token != own.Token || !got.OwnerLive || len(got.Waiting) != 1 {
		r.Errorf("v is %+v", got)
	}
	req, err := a.Waiting(r.Context())
	r.ok(err)
	_, err = a.HandOver(r.Context(), v.ID, own.Token, req[0])
	r.ok(err)
	s, err = o.Wait(r.patience(), now.Revision)
	r.ok(err)
	if s.Revision <= now.Revision {
		r.Errorf("waited for a revision after %d, got %d", now.Revision, s.Revision)
	}
	r.sees(o, m)

	r.put("nonsense", "own", before.ID)
	if s = r.sees(o, m); len(s.Views) != 1 {
		r.Errorf("a volume whose owner cannot be known is shown: %+v", s.Views)
	}
	r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: r.key("own", before.ID)}}})
	tombstone, err := a.Delete(r.Context(), before, 0)
	r.ok(err)
	r.until(o, "a tombstone", func(s *ownership.State) bool {
		return len(s.Views) == 2 && s.Views[0].Volume.Phase == ownership.PhaseDeleting
	})
	r.ok(a.Purge(r.Context(), tombstone))
	r.until(o, "only v", func(s *ownership.State) bool { return len(s.Views) == 1 && s.Views[0].Volume.Name == "v" })

	// Placements, presences and leases, by their keys alone.
	token := r.owner(v.ID).Token
	r.put(fmt.Sprintf(`{"volume":%q,"node":"b","host":"host-b","by":"ann@ops"}`, v.ID), "place", v.ID)
	r.put(fmt.Sprintf(`{"volume":%q,"node":"b","token":%d,"path":"/p"}`, v.ID, token), "at", v.ID)
	r.put(fmt.Sprintf(`{"volume":%q,"node":"b"}`, v.ID), "lease", v.ID)
	r.put(fmt.Sprintf(`{"volume":{"id":%q,"name":"before"},"node":"a"}`, before.ID), "gone", before.ID)
	r.until(o, "placed and there", func(s *ownership.State) bool {
		v := s.Views[0]
		return v.Placement != nil && v.Placement.By == "ann@ops" && v.Presence != nil && v.Presence.Path == "/p" && v.Lease != nil &&
			len(s.Gone) == 1 && s.Gone[0].Volume.Name == "before" && s.Gone[0].Node == "a"
	})
	r.ok(b.Release(r.Context(), v.ID, token))
	r.until(o, "no longer there", func(s *ownership.State) bool { return s.Views[0].Presence == nil && s.Views[0].Placement != nil })
	r.txn(ownership.Txn{Then: []ownership.Op{
		{Kind: ownership.OpDelete, Key: r.key("place", v.ID)}, {Kind: ownership.OpDelete, Key: r.key("lease", v.ID)}, {Kind: ownership.OpDelete, Key: r.key("gone", before.ID)},
	}})
	r.until(o, "nowhere", func(s *ownership.State) bool {
		return s.Views[0].Placement == nil && s.Views[0].Lease == nil && len(s.Gone) == 0
	})

	own = a.claim(v.ID)
	a.dies()
	r.until(o, "a dead owner", func(s *ownership.State) bool { return s.Views[0].Owner != nil && !s.Views[0].OwnerLive })
	_, err = b.DeclareDead(r.Context(), "host-a", ownership.Death{By: "ann@ops"})
	r.ok(err)
	r.sees(o, m)
	_ = b.seize(own, ownership.GroundsConfirmed)
	r.sees(o, m)
}

// until waits until the observer says something.
func (r *rig) until(o *ownership.Observer, what string, is func(*ownership.State) bool) {
	r.Helper()
	var s *ownership.State
	for end := time.Now().Add(patient); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s, _, _ = o.State(); s != nil && is(s) {
			return
		}
	}
	r.Fatalf("%s was not observed; the state is %+v", what, s)
}

// Whatever happens to its connection, an observer ends up with what there is, and its
// followers get each event once.
func observeFaults(r *rig) {
	a := r.node("a")
	o, m := r.observer()
	first := r.sees(o, m)
	follow, stop := context.WithCancel(r.patience())
	defer stop()
	followed := o.Follow(follow, first.Revision)
	var made []string
	for name, fault := range map[string]func(){
		"watch lost": m.bad.CutWatches,
		"compacted":  func() { r.cluster.Compact(first.Revision); m.bad.CutWatches() },
		"partition":  func() { m.bad.Partition(true) },
		"no reads": func() {
			m.bad.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "read"} })
			m.bad.CutWatches()
		},
		"slow": func() {
			m.bad.Inject(func(string) ownership.Fault {
				return ownership.Fault{Latency: 50 * time.Millisecond, ReplyLatency: 50 * time.Millisecond}
			})
			m.bad.CutWatches()
		},
	} {
		fault()
		name = strings.ReplaceAll(name, " ", "-")
		a.volume(name)
		made = append(made, name)
		if name == "partition" || name == "no-reads" {
			r.eventually(name+": stale", func() bool { _, stale, ok := o.State(); return ok && stale > 0 })
			ctx, cancel := context.WithTimeout(r.Context(), 50*time.Millisecond)
			if _, err := o.Wait(ctx, 0); !errors.Is(err, ownership.ErrUnavailable) {
				r.Errorf("%s: waited, and got %v", name, err)
			}
			cancel()
		}
		m.bad.Partition(false)
		r.sees(o, m)
		r.eventually(name+": followed again", func() bool { _, stale, ok := o.State(); return ok && stale == 0 })
	}
	want := map[string]int{}
	for _, name := range made {
		want["create "+name], want["ready "+name] = 1, 1
	}
	for len(want) > 0 {
		f, ok := <-followed
		if !ok || f.Err != nil {
			r.Fatalf("follow ended with %v, and still wanted %v", f.Err, want)
		}
		got := f.What + " " + f.Name
		if want[got] == 0 && f.What != "register" {
			r.Errorf("event %+v came twice, or without cause", f.Event)
		}
		delete(want, got)
	}
}

func events(r *rig) {
	a, b := r.node("a"), r.node("b")
	v := a.volume("v")
	own := a.claim(v.ID)
	o, m := r.observer()
	var all []ownership.Event
	read := func(after int64, limit int) (got []ownership.Event) {
		r.Helper()
		for {
			some, next, err := o.Events(r.patience(), after, limit)
			r.ok(err)
			if len(some) > limit+1 {
				r.Errorf("got %d events, asked for %d", len(some), limit)
			}
			if got = append(got, some...); len(some) == 0 {
				return got
			}
			after = next
		}
	}
	words := func(events []ownership.Event) (words []string) {
		for _, e := range events {
			words = append(words, e.What+" "+e.Host)
		}
		return words
	}
	for _, limit := range []int{1000, 1, 2} { // from etcd
		all = read(0, limit)
		want := []string{"register host-a", "register host-b", "create host-a", "ready host-a", "claim host-a", "register host-observer"}
		if !slices.Equal(words(all), want) {
			r.Errorf("events, %d at a time, are %q, want %q", limit, words(all), want)
		}
	}
	if e := all[4]; e.Revision != own.Token || e.Volume != v.ID || e.Name != "v" || e.Node != "a" || time.Since(e.At) > time.Hour {
		r.Errorf("the claim is %+v", e)
	}
	req := b.ask(own, a)
	r.ok(a.Reply(r.Context(), req, ownership.Reply{Busy: true, Containers: []string{"web", "db"}, Detail: "it is stuck"}))
	_, err := a.HandOver(r.Context(), v.ID, own.Token, req)
	r.ok(err)
	r.sees(o, m)
	var more []ownership.Event
	for _, limit := range []int{1000, 1} { // from memory
		if more = read(all[5].Revision, limit); !slices.Equal(words(more), []string{"request host-b", "refuse host-a", "hand over host-a"}) {
			r.Fatalf("events, %d at a time, are %q", limit, words(more))
		}
	}
	if e := more[0]; e.From != "a" || e.FromHost != "host-a" || e.Name != "v" || e.Detail != "to mount" {
		r.Errorf("the request is %+v", e)
	}
	if e := more[1]; e.To != "b" || e.ToHost != "host-b" || e.Detail != "in use by containers web, db (it is stuck)" {
		r.Errorf("the refusal is %+v", e)
	}
	if e := more[2]; e.ToHost != "host-b" || e.Token != own.Token || e.Revision != r.owner(v.ID).Token {
		r.Errorf("the hand over is %+v", e)
	}
	if got := read(0, 1000); len(got) != 9 {
		r.Errorf("all events are %q", words(got))
	}
	if got := read(all[3].Revision, 1000); len(got) != 5 { // those before are in etcd only
		r.Errorf("events after %d are %q", all[3].Revision, words(got))
	}

	// By time.
	after, err := o.Since(r.patience(), time.Now().Add(-time.Minute))
	r.ok(err)
	if after != all[0].Revision-1 {
		r.Errorf("what happened within a minute is after %d, want %d", after, all[0].Revision-1)
	}
	// Which is longer ago than anything is kept.
	if old, err := o.Since(r.patience(), time.Time{}); err != nil || old != after {
		r.Errorf("what has ever happened is after %d %v, want %d", old, err, after)
	}
	after, err = o.Since(r.patience(), time.Now().Add(2*time.Hour))
	r.ok(err)
	if got := read(after, 1000); len(got) > 0 {
		r.Errorf("two hours from now are %q", words(got))
	}

	// What is no longer kept is said, not left out.
	for _, kv := range r.keys("ev", "") {
		if kv.ModRevision <= own.Token {
			r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: kv.Key}}})
		}
	}
	_, _, err = o.Events(r.patience(), all[2].Revision, 10)
	gone, ok := errors.AsType[*ownership.GoneError](err)
	if !ok || gone.Before != all[5].Revision {
		r.Errorf("events that are gone: %v", err)
	}
	r.says(err, fmt.Sprintf("events before revision %d are gone: they are kept for 7 days", all[5].Revision))
	if f := <-o.Follow(r.patience(), all[2].Revision); f.Err == nil || f.Err.Error() != err.Error() {
		r.Errorf("following events that are gone: %+v", f)
	}
	if got := read(0, 1000); len(got) != 4 {
		r.Errorf("what is left is %q", words(got))
	}
}

// Keys in the order in which they were changed, from a revision on.
func changedAfter(r *rig) {
	var revisions []int64
	for i := range 20 {
		res := r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: r.key("x", fmt.Sprint((i*7)%15)), Value: []byte(uuid.NewString())}}})
		revisions = append(revisions, res.Revision)
	}
	// 0 to 4 of them were changed again by the last five.
	for _, c := range []struct {
		after int64
		limit int
		want  []int64
	}{
		{0, 100, revisions[5:]},
		{revisions[4], 3, revisions[5:8]},
		{revisions[9], 100, revisions[10:]},
		{revisions[19], 1, nil},
	} {
		res := r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: r.key("x", ""), Prefix: true, After: c.after, Limit: c.limit}}})
		var got []int64
		for _, kv := range res.Results[0].KVs {
			got = append(got, kv.ModRevision)
		}
		if !slices.Equal(got, c.want) {
			r.Errorf("at most %d after %d are %v, want %v", c.limit, c.after, got, c.want)
		}
	}
}

// That a node falls silent is one line, however many see it, each time.
func silentNodes(r *rig) {
	r.nodes(4)
	for times := 1; times <= 2; times++ {
		a := r.nodeTTL("a", 30*time.Second)
		a.dies()
		r.eventually("the line", func() bool { return len(r.lines("silent")) >= times })
		time.Sleep(2 * time.Second) // by now all have seen it
		lines := r.lines("silent")
		if len(lines) != times || lines[times-1]["to"] != "a" || lines[times-1]["node"] == "a" {
			r.Errorf("after %d times it is said %q", times, lines)
		}
	}
	for _, kv := range r.keys("ev", "") {
		if kv.Version != 1 {
			r.Errorf("%s was written %d times", kv.Value, kv.Version)
		}
	}
	if n := len(r.lines("register")); n != 6 {
		r.Errorf("%d registrations, want 4 and 2", n)
	}
	// A start of another process of the node is no silence.
	b := r.node("n0")
	time.Sleep(2 * time.Second)
	if lines := r.lines("silent"); len(lines) != 2 {
		r.Errorf("%s has registered anew: %q", b.Node().ID, lines)
	}
}

// Who wants what is done is in the context, unless it is said.
func by(r *rig) {
	a := r.node("a")
	ctx := ownership.By(r.Context(), "user-anna")
	v, _, err := a.Create(ctx, ownership.Volume{ID: uuid.NewString(), Name: "v"})
	r.ok(err)
	v, err = a.Ready(ownership.By(r.Context(), ""), v)
	r.ok(err)
	o, _, err := a.Claim(ctx, v.ID)
	r.ok(err)
	_, err = a.Place(ctx, v.ID, "a", "eve@x")
	r.ok(err)
	_, err = a.Delete(ctx, v, o.Token)
	r.ok(err)
	for what, want := range map[string]any{"create": "user-anna", "ready": nil, "claim": "user-anna", "place": "eve@x", "delete": "user-anna"} {
		lines := r.lines(what)
		if len(lines) != 1 || lines[0]["by"] != want {
			r.Errorf("%s is %q, want one by %v", what, lines, want)
		}
	}
}
