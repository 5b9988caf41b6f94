package ownership_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// observer runs one until the test ends.
func observer(tb testing.TB, m *ownership.Map) *ownership.Observer {
	tb.Helper()
	o := ownership.NewObserver(m)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = o.Run(ctx)
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
	})
	return o
}

// counted counts a node's calls, but its renewals.
func counted(faults *ownership.Faults) (calls func() int) {
	var mu sync.Mutex
	n := 0
	faults.Inject(func(call string) ownership.Fault {
		mu.Lock()
		defer mu.Unlock()
		if call != "keepalive" {
			n++
		}
		return ownership.Fault{}
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		was := n
		n = 0
		return was
	}
}

// An observer whom nobody asks asks nothing of etcd.
func TestObserverIsLazy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		node, _, _ := start(t, mem, "a")
		faults := mem.Client()
		calls := counted(faults)
		// A map that does not run makes no calls of its own.
		o := observer(t, ownership.New(faults, ownership.Node{ID: "o", Host: "o", Boot: "o"}, ownership.Config{TTL: time.Minute}))
		idle := func(d time.Duration) int {
			time.Sleep(d)
			return calls()
		}
		if n := idle(time.Hour); n != 0 {
			t.Errorf("nobody asked, and etcd was asked %d times", n)
		}
		wait := func(after int64) *ownership.State {
			s, err := o.Wait(t.Context(), after)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		wait(0)
		if n := calls(); n != 2 {
			t.Errorf("to begin took %d calls", n)
		}
		for range 100 {
			wait(0)
			if _, stale, ok := o.State(); !ok || stale != 0 {
				t.Fatalf("State: %v %v", stale, ok)
			}
			if _, _, err := o.Events(t.Context(), 1<<40, 10); err != nil {
				t.Fatal(err)
			}
		}
		if n := calls(); n != 0 {
			t.Errorf("what was in memory took %d calls", n)
		}
		// One list of everything in ten minutes.
		ctx, stop := context.WithCancel(t.Context())
		followed := o.Follow(ctx, 1<<40)
		if n := idle(time.Hour); n < 5 || n > 6 {
			t.Errorf("an hour of following took %d calls", n)
		}
		stop()
		if _, ok := <-followed; ok {
			t.Error("something was followed")
		}
		time.Sleep(7 * time.Minute)
		calls()
		if n := idle(time.Hour); n != 0 {
			t.Errorf("nobody asks any more, and etcd was asked %d times", n)
		}
		// What it knew may be untrue by now, and is said to be so.
		if _, stale, ok := o.State(); !ok || stale < time.Hour {
			t.Errorf("after an hour: stale %v %v", stale, ok)
		}
		v, _, err := node.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v"})
		if err != nil {
			t.Fatal(err)
		}
		if s := wait(v.Revision - 1); len(s.Views) != 1 {
			t.Errorf("it has not begun anew: %+v", s)
		}
	})
}

// Without etcd, what was known is stale, and nobody waits longer than he wants.
func TestObserverCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		m, faults, _ := start(t, mem, "a")
		o := observer(t, m)
		faults.Partition(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, err := o.Wait(ctx, 0); !errors.Is(err, ownership.ErrUnavailable) || time.Since(began) != time.Minute {
			t.Errorf("waited %v, and got %v", time.Since(began), err)
		}
		if _, _, ok := o.State(); ok {
			t.Error("it knows what it was never told")
		}
		faults.Partition(false)
		if _, err := o.Wait(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		// A partition that breaks no watch is noticed all the same.
		faults.Inject(func(string) ownership.Fault { return ownership.Fault{Hang: true} })
		time.Sleep(time.Minute)
		if _, stale, ok := o.State(); !ok || stale < 45*time.Second || stale > time.Minute {
			t.Errorf("cut off for a minute: stale %v %v", stale, ok)
		}
	})
}

// Events that no watch reported are found by the next list.
func TestObserverLostEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		other, _, _ := start(t, mem, "a")
		o := observer(t, ownership.New(&deaf{Store: mem.Client()}, ownership.Node{ID: "c", Host: "c", Boot: "c"}, ownership.Config{}))
		s, err := o.Wait(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		followed := o.Follow(t.Context(), s.Revision)
		if _, _, err := other.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v"}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if f := <-followed; f.What != "create" || f.Name != "v" || time.Since(began) > 15*time.Minute {
			t.Errorf("after %v: %+v", time.Since(began), f)
		}
		if s, _, _ := o.State(); len(s.Views) != 1 {
			t.Errorf("views are %+v", s.Views)
		}
	})
}

// A follower who does not read delays nobody, and is told from where to go on once what he
// has not read is no longer in memory. Nothing is lost on the way.
func TestSlowFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		m, _, _ := start(t, mem, "a")
		o := observer(t, m)
		s, err := o.Wait(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		v, _, err := m.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v"})
		if err != nil {
			t.Fatal(err)
		}
		if v, err = m.Ready(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		quick, slow := o.Follow(t.Context(), s.Revision), o.Follow(t.Context(), s.Revision)
		first := <-slow
		if first.What != "create" {
			t.Fatalf("the first event is %+v", first)
		}
		const turns = 10_500 // two events each
		wrong := make(chan string, 1)
		go func() {
			defer close(wrong)
			<-quick
			<-quick
			for i := range 2 * turns {
				if f := <-quick; f.What != []string{"claim", "release"}[i%2] {
					wrong <- fmt.Sprintf("event %d is %+v", i, f)
					return
				}
			}
		}()
		for range turns {
			own, _, err := m.Claim(t.Context(), v.ID)
			if err == nil {
				err = m.Release(t.Context(), v.ID, own.Token)
			}
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if text, is := <-wrong; is {
			t.Fatal(text)
		}
		seen, delivered := first.Revision, 1
		var end *ownership.SlowError
		for f := range slow {
			if f.Err != nil {
				if end, _ = errors.AsType[*ownership.SlowError](f.Err); end == nil {
					t.Fatal(f.Err)
				}
				break
			}
			seen = f.Revision
			delivered++
		}
		if end == nil || end.After < seen {
			t.Fatalf("read up to %d, and was told %v", seen, end)
		}
		if want := fmt.Sprintf("these events were not read as fast as they came: go on after revision %d", end.After); end.Error() != want {
			t.Errorf("the error is %q", end)
		}
		if _, _, err := m.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: "end"}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		rest := 0
		for f := range o.Follow(ctx, end.After) { // from etcd, and then from memory
			if f.Err != nil {
				t.Fatal(f.Err)
			}
			rest++
			if f.Name == "end" {
				break
			}
		}
		if want := 2 + 2*turns + 1; delivered+rest != want {
			t.Errorf("%d events, and %d after that, of %d", delivered, rest, want)
		}
		all, _, err := o.Events(t.Context(), s.Revision, 4)
		if err != nil || len(all) < 3 || !slices.Equal([]string{all[0].What, all[1].What, all[2].What}, []string{"create", "ready", "claim"}) {
			t.Errorf("the first events are %v %+v", err, all)
		}
	})
}

// From a change until a follower has it.
func BenchmarkFollow(b *testing.B) {
	stores := map[string]func(b *testing.B) func() ownership.Store{
		"memory": func(*testing.B) func() ownership.Store {
			mem := ownership.NewMemory()
			return func() ownership.Store { return mem.Client() }
		},
		"etcd": func(b *testing.B) func() ownership.Store {
			b.Helper()
			endpoint := startEtcd(b, b.TempDir())
			return func() ownership.Store { return connect(b, endpoint) }
		},
	}
	for name, open := range stores {
		b.Run(name, func(b *testing.B) {
			connect := open(b)
			var maps []*ownership.Map
			for _, id := range []string{"a", "b"} {
				store := connect()
				b.Cleanup(func() { _ = store.Close() })
				m := ownership.New(store, ownership.Node{ID: id, Host: id, Boot: "boot"}, ownership.Config{})
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error, 1)
				go func() { done <- m.Run(ctx) }()
				b.Cleanup(func() {
					cancel()
					<-done
				})
				if err := m.Registered(b.Context()); err != nil {
					b.Fatal(err)
				}
				maps = append(maps, m)
			}
			v, _, err := maps[0].Create(b.Context(), ownership.Volume{ID: uuid.NewString(), Name: "v"})
			if err == nil {
				_, err = maps[0].Ready(b.Context(), v)
			}
			if err != nil {
				b.Fatal(err)
			}
			o := observer(b, maps[1])
			s, err := o.Wait(b.Context(), 0)
			if err != nil {
				b.Fatal(err)
			}
			followed := o.Follow(b.Context(), s.Revision)
			var took []time.Duration
			for b.Loop() {
				own, _, err := maps[0].Claim(b.Context(), v.ID)
				if err != nil {
					b.Fatal(err)
				}
				<-followed
				begun := time.Now()
				if err := maps[0].Release(b.Context(), v.ID, own.Token); err != nil {
					b.Fatal(err)
				}
				if f := <-followed; f.Err != nil {
					b.Fatal(f.Err)
				}
				took = append(took, time.Since(begun)) // with the transaction
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}
