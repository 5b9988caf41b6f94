package ownership_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

const livePrefix = "/flocker/v1/live/"

// others makes nodes live by their keys alone, and returns what makes one lapse.
func others(t *testing.T, mem *ownership.Memory, count int) (lapse func(i int)) {
	t.Helper()
	leases := make([]int64, count)
	for i := range leases {
		lease, _, err := mem.Grant(t.Context(), 24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		leases[i] = lease
		comeBack(t, mem, fmt.Sprint("n", i), lease)
	}
	return func(i int) { mem.Expire(leases[i]) }
}

func comeBack(t *testing.T, mem *ownership.Memory, id string, lease int64) {
	t.Helper()
	if _, err := mem.Txn(t.Context(), ownership.Txn{Then: []ownership.Op{{
		Kind: ownership.OpPut, Key: livePrefix + id, Value: fmt.Appendf(nil, `{"id":%q}`, id), Lease: lease,
	}}}); err != nil {
		t.Fatal(err)
	}
}

// bed is a node on memory that watches another one lapse.
type bed struct {
	t      *testing.T
	mem    *ownership.Memory
	m      *ownership.Map
	faults *ownership.Faults
	asleep *atomic.Int64
}

func TestSilence(t *testing.T) {
	for _, c := range []struct {
		name        string
		happens     func(bed) // since the other one lapsed
		least, most time.Duration
		not         bool
	}{
		{name: "nothing", happens: func(bed) {}},
		{name: "time passes", least: 7 * time.Second, most: 7 * time.Second, happens: func(bed) {
			time.Sleep(7 * time.Second)
		}},
		{name: "much time passes", least: time.Hour, most: time.Hour, happens: func(bed) {
			time.Sleep(time.Hour)
		}},
		{name: "back", not: true, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			comeBack(b.t, b.mem, "n0", 0)
		}},
		{name: "back and gone again", least: 2 * time.Second, most: 2 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			lease, _, _ := b.mem.Grant(b.t.Context(), time.Hour)
			comeBack(b.t, b.mem, "n0", lease)
			b.mem.Expire(lease)
			time.Sleep(2 * time.Second)
		}},
		{name: "the watch breaks", least: 1900 * time.Millisecond, most: 2 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.CutWatches()
			time.Sleep(2 * time.Second)
		}},
		{name: "the watch stays away", not: true, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "watch"} })
			b.faults.CutWatches()
			time.Sleep(5 * time.Second)
		}},
		{name: "the watch hangs", not: true, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Hang: call == "watch"} })
			b.faults.CutWatches()
			time.Sleep(5 * time.Second)
		}},
		{name: "the watch hung for a while", most: 5 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Hang: call == "watch"} })
			b.faults.CutWatches()
			time.Sleep(5 * time.Second)
			b.faults.Inject(nil)
			time.Sleep(5 * time.Second)
		}},
		{name: "the list cannot be read", not: true, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "read"} })
			b.faults.CutWatches()
			time.Sleep(5 * time.Second)
		}},
		{name: "cut off", not: true, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Partition(true)
			time.Sleep(5 * time.Second)
		}},
		{name: "cut off for a while", most: 5 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.faults.Partition(true)
			time.Sleep(time.Minute)
			b.faults.Partition(false)
			time.Sleep(5 * time.Second)
		}},
		{name: "the lease is not valid", not: true, happens: func(b bed) {
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "keepalive"} })
			time.Sleep(9 * time.Second)
		}},
		{name: "the lease was not valid", most: 5 * time.Second, happens: func(b bed) {
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "keepalive"} })
			time.Sleep(9 * time.Second)
			b.faults.Inject(nil)
			time.Sleep(5 * time.Second)
		}},
		{name: "the lease is a new one", most: 5 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.mem.Expire(b.mem.Keys(livePrefix + "a")[0].Lease)
			time.Sleep(5 * time.Second)
		}},
		{name: "this host slept", most: 5 * time.Second, happens: func(b bed) {
			time.Sleep(7 * time.Second)
			b.asleep.Add(int64(time.Minute))
			time.Sleep(5 * time.Second)
		}},
		{name: "a renewal is late, but not too late", least: 20 * time.Second, most: 20 * time.Second, happens: func(b bed) {
			time.Sleep(5 * time.Second)
			b.faults.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "keepalive"} })
			time.Sleep(3 * time.Second)
			b.faults.Inject(nil)
			time.Sleep(12 * time.Second)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := bed{t: t, mem: ownership.NewMemory()}
				lapse := others(t, b.mem, 20)
				b.m, b.faults, b.asleep = start(t, b.mem, "a")
				time.Sleep(5 * time.Second)
				if _, ok := b.m.Silence("n0"); ok {
					t.Error("n0 is live and silent")
				}
				lapse(0)
				synctest.Wait()
				c.happens(b)
				synctest.Wait()
				silent, ok := b.m.Silence("n0")
				if ok == c.not || silent < c.least || silent > c.most {
					t.Errorf("silent for %v, %v; want %v, between %v and %v", silent, ok, !c.not, c.least, c.most)
				}
			})
		})
	}
}

// A watch has lost an event: the list finds out.
func TestSilenceEventLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		lapse := others(t, mem, 2)
		store := &deaf{Store: mem}
		began := time.Now()
		m := ownership.New(store, ownership.Node{ID: "a", Host: "host-a", Boot: "boot-a"}, ownership.Config{
			Now: func() time.Duration { return time.Since(began) },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		if err := m.Registered(ctx); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		lapse(0)
		// Declared dead as well, which it does not hear either.
		if _, err := mem.Txn(ctx, ownership.Txn{Then: []ownership.Op{{
			Kind: ownership.OpPut, Key: "/flocker/v1/fence/a/boot-a", Value: []byte(`{"node":"a","host":"host-a","boot":"boot-a","forced":true}`),
		}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if _, ok := m.Silence("n0"); ok {
			t.Error("the event was not lost")
		}
		if err := m.Live(); err != nil {
			t.Errorf("the declaration was not lost: %v", err)
		}
		time.Sleep(65 * time.Second)
		if err := m.Live(); err == nil {
			t.Error("the declaration is not noticed after a minute")
		}
		if _, ok := m.Silence("n0"); ok {
			t.Error("silence of another while this node is not live")
		}
		if _, err := mem.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpDelete, Key: "/flocker/v1/fence/a/boot-a"}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if silent, ok := m.Silence("n0"); !ok || silent == 0 {
			t.Errorf("n0 is silent for %v, %v after a list", silent, ok)
		}
		cancel()
		<-done
	})
}

// deaf is a store whose watches begin and then report nothing.
type deaf struct{ ownership.Store }

func (d *deaf) Watch(ctx context.Context, _ string, _ bool, _ int64) <-chan ownership.WatchResult {
	out := make(chan ownership.WatchResult, 1)
	out <- ownership.WatchResult{}
	go func() {
		<-ctx.Done()
		close(out)
	}()
	return out
}

func TestStorm(t *testing.T) {
	for _, c := range []struct {
		name          string
		others        int
		lapse         int
		apart         time.Duration
		away          bool // this node is cut off meanwhile
		back          bool // they come back
		lapsed, alive int  // as in the StormError; 0 is no storm
	}{
		{name: "3 of 4", others: 3, lapse: 3},
		{name: "4 of 5", others: 4, lapse: 4, lapsed: 4, alive: 5},
		{name: "4 of 13", others: 12, lapse: 4, lapsed: 4, alive: 13},
		{name: "4 of 14", others: 13, lapse: 4},
		{name: "6 of 20 is 30 %", others: 19, lapse: 6},
		{name: "7 of 20", others: 19, lapse: 7, lapsed: 7, alive: 20},
		{name: "within a minute", others: 9, lapse: 4, apart: 19 * time.Second, lapsed: 4, alive: 10},
		{name: "within more than a minute", others: 9, lapse: 4, apart: 20 * time.Second},
		{name: "back already", others: 9, lapse: 4, back: true, lapsed: 4, alive: 10},
		{name: "while cut off", others: 9, lapse: 4, away: true, lapsed: 4, alive: 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := ownership.NewMemory()
				lapse := others(t, mem, c.others)
				m, faults, _ := start(t, mem, "a")
				time.Sleep(2 * time.Minute)
				faults.Partition(c.away)
				for i := range c.lapse {
					if i > 0 {
						time.Sleep(c.apart)
					}
					lapse(i)
				}
				if c.back {
					synctest.Wait()
					for i := range c.lapse {
						comeBack(t, mem, fmt.Sprint("n", i), 0)
					}
				}
				if c.away {
					time.Sleep(4 * time.Second)
					faults.Partition(false)
					time.Sleep(3 * time.Second)
				}
				synctest.Wait()
				err := m.Storm()
				storm, ok := errors.AsType[*ownership.StormError](err)
				if c.lapsed == 0 {
					if err != nil {
						t.Errorf("got %v, want no storm", err)
					}
					return
				}
				if !ok || storm.Lapsed != c.lapsed || storm.Of != c.alive {
					t.Fatalf("got %+v, want %d of %d", err, c.lapsed, c.alive)
				}
				want := fmt.Sprintf("%d of %d hosts were no longer heard from within one minute, which is more likely the fault of etcd or of the network, "+
					"so nothing is taken over from them: check both; if hosts are really off, type for each: docker flocker node confirm-dead HOST", c.lapsed, c.alive)
				if err.Error() != want {
					t.Errorf("says %q, want %q", err, want)
				}
				time.Sleep(time.Minute)
				if err := m.Storm(); err != nil {
					t.Errorf("a minute later: %v", err)
				}
			})
		})
	}
}
