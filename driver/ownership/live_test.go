package ownership_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// start runs a node on memory, in a bubble, with a clock that can be pushed.
func start(t *testing.T, mem *ownership.Memory, id string) (*ownership.Map, *ownership.Faults, *atomic.Int64) {
	t.Helper()
	faults := mem.Client()
	began := time.Now()
	asleep := &atomic.Int64{}
	m := ownership.New(faults, ownership.Node{ID: id, Host: "host-" + id, Boot: "boot-" + id}, ownership.Config{
		Now: func() time.Duration { return time.Since(began) + time.Duration(asleep.Load()) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	})
	if err := m.Registered(t.Context()); err != nil {
		t.Fatal(err)
	}
	synctest.Wait() // its watches have begun
	return m, faults, asleep
}

// A node knows that it may count as dead before anybody else can think so,
// whenever it is cut off and however slow its last renewal was.
func TestLiveEndsBeforeTheLease(t *testing.T) {
	for _, latency := range []ownership.Fault{{}, {Latency: 500 * time.Millisecond}, {Latency: 1900 * time.Millisecond}, {ReplyLatency: 1900 * time.Millisecond}} {
		for cut := time.Duration(0); cut < 3*time.Second; cut += 300 * time.Millisecond {
			synctest.Test(t, func(t *testing.T) {
				mem := ownership.NewMemory()
				m, faults, _ := start(t, mem, "a")
				faults.Inject(func(string) ownership.Fault { return latency })
				time.Sleep(20*time.Second + cut)
				if err := m.Live(); err != nil {
					t.Fatalf("%+v: %v", latency, err)
				}
				faults.Partition(true)
				began := time.Now()
				var notLive, gone time.Duration
				for notLive == 0 || gone == 0 {
					time.Sleep(10 * time.Millisecond)
					since := time.Since(began)
					if notLive == 0 && m.Live() != nil {
						notLive = since
					}
					if gone == 0 && len(mem.Keys("/flocker/v1/live/")) == 0 {
						gone = since
					}
					if since > time.Minute {
						t.Fatalf("%+v: not live after %v, key gone after %v", latency, notLive, gone)
					}
				}
				if gone-notLive < time.Second {
					t.Errorf("%+v, cut off at %v: not live after %v, but the key was gone after %v", latency, cut, notLive, gone)
				}
				faults.Partition(false)
				time.Sleep(5 * time.Second)
				if err := m.Live(); err != nil {
					t.Errorf("5s after the partition: %v", err)
				}
			})
		}
	}
}

// A host that slept does not believe its lease, although no time has passed for
// its timers.
func TestLiveEndsInSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		m, _, asleep := start(t, mem, "a")
		if err := m.Live(); err != nil {
			t.Fatal(err)
		}
		asleep.Add(int64(time.Hour))
		err := m.Live()
		if !errors.Is(err, ownership.ErrUnavailable) || !strings.Contains(err.Error(), "this node's lease was not renewed in time") {
			t.Errorf("after an hour asleep: %v", err)
		}
		if _, _, err := m.Claim(t.Context(), "v"); !errors.Is(err, ownership.ErrUnavailable) {
			t.Errorf("claim: %v", err)
		}
		time.Sleep(3 * time.Second)
		if err := m.Live(); err != nil {
			t.Errorf("after the next renewal: %v", err)
		}
	})
}

// Renewals that fail now and then, and one that is slow, cost nothing.
func TestLiveThroughTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		m, faults, _ := start(t, mem, "a")
		lease := mem.Keys("/flocker/v1/live/a")[0].Lease
		var calls atomic.Int32
		faults.Inject(func(call string) ownership.Fault {
			if call != "keepalive" {
				return ownership.Fault{}
			}
			return []ownership.Fault{{Refused: true}, {DropReply: true}, {}, {Hang: true}, {Latency: time.Second}}[calls.Add(1)%5]
		})
		for range 600 {
			time.Sleep(100 * time.Millisecond)
			if err := m.Live(); err != nil {
				t.Fatal(err)
			}
		}
		if got := mem.Keys("/flocker/v1/live/a"); len(got) != 1 || got[0].Lease != lease {
			t.Errorf("the lease has changed: %+v", got)
		}
		if calls.Load() < 20 {
			t.Errorf("only %d renewals in a minute", calls.Load())
		}
	})
}

// The audit lines of each hour have a lease of their own.
func TestAuditLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := ownership.NewMemory()
		m, _, _ := start(t, mem, "a")
		time.Sleep(time.Minute) // off the full hour
		for i := range 5 {
			for _, name := range []string{"a", "b"} {
				if _, _, err := m.Create(t.Context(), ownership.Volume{ID: name + string(rune('0'+i)), Name: name + string(rune('0'+i))}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Hour)
		}
		leases := map[int64]int{}
		for _, kv := range mem.Keys("/flocker/v1/ev/") {
			leases[kv.Lease]++
		}
		if len(leases) != 5 || leases[0] != 0 {
			t.Errorf("lines by lease are %v, want 2 on each of 5", leases)
		}
		for lease := range leases {
			if ttl, _, err := mem.KeepAliveOnce(t.Context(), lease); ttl != 8*24*time.Hour {
				t.Errorf("lines are kept for %v, %v; want a week and a day", ttl, err)
			}
		}
	})
}
