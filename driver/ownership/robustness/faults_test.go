package robustness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// storm is a world on a real etcd, with what can be done to it.
type storm struct {
	*world
	*cluster

	links  [][]*link // of each node, to each member
	random *rand.Rand
}

// roll is a number below n.
func (s *storm) roll(n int) int { return s.random.IntN(n) }

// lasting is a time between two others.
func (s *storm) lasting(least, most time.Duration) time.Duration {
	return least + time.Duration(s.random.Int64N(int64(most-least)))
}

// hold waits, unless ctx ends before.
func hold(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// victims are some members, the leader often among them; all of them rarely.
func (s *storm) victims(ctx context.Context) []int {
	first := s.roll(size)
	if s.roll(2) == 0 {
		first = s.leader(ctx)
	}
	switch s.roll(6) {
	case 0:
		return []int{first, (first + 1) % size} // no majority
	case 1:
		return []int{first, (first + 1) % size, (first + 2) % size}
	}
	return []int{first}
}

// fault does one bad thing, and undoes it.
type fault struct {
	name string
	do   func(ctx context.Context, s *storm)
}

var faults = []fault{
	{"killed", func(ctx context.Context, s *storm) {
		victims := s.victims(ctx)
		for _, i := range victims {
			s.members[i].kill()
		}
		hold(ctx, s.lasting(0, 1200*time.Millisecond))
		for _, i := range victims {
			_ = s.members[i].start() // heal tells
		}
		hold(ctx, s.lasting(500*time.Millisecond, 1500*time.Millisecond))
	}},
	{"paused", func(ctx context.Context, s *storm) {
		victims := s.victims(ctx)
		for _, i := range victims {
			s.members[i].signal(syscall.SIGSTOP)
		}
		hold(ctx, s.lasting(100*time.Millisecond, 1500*time.Millisecond))
		for _, i := range victims {
			s.members[i].signal(syscall.SIGCONT)
		}
	}},
	{"members cut off", func(ctx context.Context, s *storm) {
		// The nodes still reach it.
		i := s.victims(ctx)[0]
		s.isolate(i, []traffic{{cut: true}, {stall: true}}[s.roll(2)])
		hold(ctx, s.lasting(300*time.Millisecond, 2*time.Second))
		s.isolate(i, traffic{})
	}},
	{"nodes cut off", func(ctx context.Context, s *storm) {
		// Sometimes for longer than its lease.
		s.disturb(ctx, s.lasting(200*time.Millisecond, 4*nodeTTL), traffic{cut: true}, traffic{stall: true})
	}},
	{"answers dropped", func(ctx context.Context, s *storm) {
		s.disturb(ctx, s.lasting(20*time.Millisecond, 600*time.Millisecond), traffic{mute: true})
	}},
	{"slow", func(ctx context.Context, s *storm) {
		d := s.lasting(5*time.Millisecond, 150*time.Millisecond)
		if s.roll(3) == 0 {
			s.isolate(s.roll(size), traffic{delay: d})
		}
		s.disturb(ctx, s.lasting(200*time.Millisecond, time.Second), traffic{delay: d})
		for i := range size {
			s.isolate(i, traffic{})
		}
	}},
	{"compacted", func(ctx context.Context, s *storm) {
		// Behind the watches of nodes that cannot follow.
		s.disturb(ctx, s.lasting(100*time.Millisecond, 400*time.Millisecond), traffic{cut: true})
		try, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, _ = s.any.Compact(try, s.log.revision()) // compacted there already is fine
	}},
	{"leader moved", func(ctx context.Context, s *storm) {
		_ = s.moveLeader(ctx, s.roll(size))
		hold(ctx, s.lasting(0, 300*time.Millisecond))
	}},
	{"leases revoked", func(ctx context.Context, s *storm) {
		try, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		res, err := s.any.Get(try, s.prefix+"/v1/live/", clientv3.WithPrefix())
		if err == nil && len(res.Kvs) > 0 {
			_, _ = s.any.Revoke(try, clientv3.LeaseID(res.Kvs[s.roll(len(res.Kvs))].Lease))
		}
		hold(ctx, s.lasting(0, 500*time.Millisecond))
	}},
	{"no space", func(ctx context.Context, s *storm) {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		_ = s.alarm(try, s.roll(size))
		hold(ctx, s.lasting(100*time.Millisecond, time.Second))
		try, cancel = context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_ = s.disarm(try)
	}},
	{"nodes restarted", func(_ context.Context, s *storm) {
		s.agents[s.roll(len(s.agents))].restart(s.roll(3) == 0)
	}},
	{"declared dead", func(ctx context.Context, s *storm) {
		// It is cut off, and may be live all the same; it learns of it later.
		i := s.roll(len(s.agents))
		for _, l := range s.links[i] {
			l.set(traffic{stall: true})
		}
		if s.roll(2) == 0 {
			hold(ctx, nodeTTL+nodeTTL/2)
		}
		try, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		by := s.agents[(i+1)%len(s.agents)].now()
		_, _ = by.DeclareDead(try, s.agents[i].id, ownership.Death{Forced: s.roll(2) == 0})
		hold(ctx, s.lasting(0, nodeTTL))
		for _, l := range s.links[i] {
			l.set(traffic{})
		}
	}},
}

// disturb does one of these to the links of a node, or to some of them.
func (s *storm) disturb(ctx context.Context, d time.Duration, what ...traffic) {
	links := s.links[s.roll(len(s.links))]
	if s.roll(3) == 0 {
		i := s.roll(len(links))
		links = links[i : i+1]
	}
	t := what[s.roll(len(what))]
	for _, l := range links {
		l.set(t)
	}
	hold(ctx, d)
	for _, l := range links {
		l.set(traffic{})
	}
}

// rage does bad things until ctx ends.
func (s *storm) rage(ctx context.Context, faults []fault) {
	for {
		hold(ctx, s.lasting(50*time.Millisecond, 400*time.Millisecond))
		if ctx.Err() != nil {
			return
		}
		f := faults[s.roll(len(faults))]
		from := s.history.now()
		f.do(ctx, s)
		s.history.fault(f.name, from)
	}
}

// round is how long a history lasts at most.
const round = 6 * time.Second

func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	seed := chosenSeed(t)
	c := startCluster(t)
	total, ran := map[string]int{}, 0
	run := func(name string, faults ...[]fault) {
		t.Run(name, func(t *testing.T) {
			ran++
			end := time.Now().Add(*flagTime)
			for i := uint64(0); !t.Failed() && time.Until(end) > time.Second; i++ {
				t.Run(fmt.Sprint(i), func(t *testing.T) {
					for what, n := range runStorm(t, c, seed+i, min(time.Until(end), round), faults...) {
						total[what] += n
					}
				})
			}
		})
	}
	for _, f := range faults {
		run(f.name, []fault{f})
	}
	run("everything", faults, faults)
	t.Logf("altogether %v", total)
	for _, what := range []string{claim, release, retake, handOver, seize, settle, check, "unknown"} {
		if total[what] == 0 && ran == len(faults)+1 {
			t.Errorf("%q never happened", what)
		}
	}
	t.Run("woken up", func(t *testing.T) { testWokenUp(t, c) })
	t.Run("minority", func(t *testing.T) { testMinority(t, c) })
	t.Run("register", func(t *testing.T) { testRegister(t, c) })
}

// testWokenUp compacts what has happened while a waiting node was cut off: its
// watch cannot go on, but it must learn of it all the same.
func testWokenUp(t *testing.T, c *cluster) {
	addresses, _ := c.endpoints(t)
	cutOff, links := c.endpoints(t)
	w := newWorld(t, 0, "/woken-up", 1, connect(t, addresses), connect(t, addresses), connect(t, cutOff))
	ctx := t.Context()
	wake := w.agents[1].now().WatchVolume(ctx, "v0")
	hold(ctx, time.Second)
	for _, l := range links {
		l.set(traffic{cut: true})
	}
	if len(wake) > 0 {
		<-wake // it began
	}
	owner, _, err := w.agents[0].now().Claim(ctx, "v0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.any.Compact(ctx, owner.Token, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if len(wake) > 0 {
		t.Error("woken up while it was cut off")
	}
	for _, l := range links {
		l.set(traffic{})
	}
	select {
	case <-wake:
	case <-time.After(20 * time.Second):
		t.Error("not woken up")
	}
}

// runStorm is one history, with each list of faults going on at the same time.
func runStorm(t *testing.T, c *cluster, seed uint64, d time.Duration, faults ...[]fault) map[string]int {
	t.Helper()
	var links [][]*link
	var stores []ownership.Store
	for range 3 {
		addresses, l := c.endpoints(t)
		links, stores = append(links, l), append(stores, connect(t, addresses))
	}
	addresses, _ := c.endpoints(t)
	w := newWorld(t, seed, "/"+strings.ReplaceAll(t.Name(), "/", "-"), 4, connect(t, addresses), stores...)
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	var wg sync.WaitGroup
	for i, list := range faults {
		s := &storm{world: w, cluster: c, links: links, random: rand.New(rand.NewPCG(seed, uint64(1000+i)))}
		wg.Go(func() { s.rage(ctx, list) })
	}
	w.fight(ctx, 80*time.Millisecond)
	cancel()
	wg.Wait()
	if err := c.heal(); err != nil {
		t.Fatal(err)
	}
	w.settleDown(t)
	if err := w.log.end(t.Context(), w.store, w.history); err != nil {
		t.Fatal(err)
	}
	w.history.check(t, w.log)
	n := w.history.tally()
	t.Logf("%v", n)
	if n[claim] < 2 || n[handOver]+n[release] < 2 {
		t.Errorf("hardly anything happened: %v", n)
	}
	return n
}
