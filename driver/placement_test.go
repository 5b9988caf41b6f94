package driver_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

func (n *node) move(name, host string) {
	n.c.t.Helper()
	if _, err := n.Move(n.c.t.Context(), name, host, "eve@ops"); err != nil {
		n.c.t.Fatalf("move %s to %s: %v", name, host, err)
	}
}

// view is what etcd says of a volume.
func (c *cluster) view(name string) ownership.View {
	c.t.Helper()
	m := ownership.New(c.etcd, ownership.Node{ID: "nobody", Host: "nobody", Boot: "none"}, ownership.Config{})
	v, err := m.Lookup(c.t.Context(), name)
	if err != nil {
		c.t.Fatal(err)
	}
	return v
}

// wantPlaced demands that a volume is mounted on its placement's node, which is said so,
// or that it is placed nowhere.
func (c *cluster) wantPlaced(name, host string) {
	c.t.Helper()
	v := c.view(name)
	switch {
	case host == "":
		if v.Placement != nil || v.Presence != nil {
			c.t.Fatalf("placed %+v, present %+v, want nothing of it", v.Placement, v.Presence)
		}
		return
	case v.Placement == nil || v.Placement.Host != host:
		c.t.Fatalf("placed %+v, want %s", v.Placement, host)
	case v.Presence == nil:
		c.t.Fatalf("%s is not said to be mounted; status on %s: %v", name, host, c.nodes[host].status(name))
	}
	n := c.nodes[host]
	if v.Presence.Node != n.id.ID || v.Owner == nil || v.Owner.Node != n.id.ID || v.Presence.Token != v.Owner.Token {
		c.t.Fatalf("present %+v, owned by %+v, want %s", v.Presence, v.Owner, host)
	}
	s := n.status(name)
	if s["state"] != "mounted" || s["placement"] != host || s["placement_error"] != nil || s["containers"] != nil {
		c.t.Fatalf("status on %s is %v", host, s)
	}
	if path, err := n.Path(c.t.Context(), name); err != nil || path != v.Presence.Path || path == "" {
		c.t.Fatalf("path is %q (%v), and said to be %q", path, err, v.Presence.Path)
	}
	for other, o := range c.nodes {
		if m := o.kernel.Mounts(); other != host && len(m) > 0 {
			c.t.Fatalf("%s has mounted %v", other, m)
		}
	}
}

// placedOnB makes a volume db that is placed on node b, and mounted there.
func (c *cluster) placedOnB() (a, b *node) {
	c.t.Helper()
	a, b = c.nodes["a"], c.nodes["b"]
	a.create("db", nil)
	a.move("db", "b")
	c.settle(time.Second)
	c.wantPlaced("db", "b")
	return a, b
}

func TestPlacement(t *testing.T) {
	for name, props := range map[string]backends.Properties{"F0": {Class: backends.ClassNone, CheapAttach: true}, "F1": exclusive, "F2": fenced, "F1 without ids": nameless} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				c.use(props)
				a, b := c.nodes["a"], c.nodes["b"]
				a.create("db", nil)
				p, err := a.Move(t.Context(), "db", "b", "eve@ops")
				if err != nil || p.Host != "b" || p.By != "eve@ops" {
					t.Fatalf("move: %+v, %v", p, err)
				}
				c.settle(time.Second)
				c.wantPlaced("db", "b")
				if s := b.status("db"); s["mounts"] != 0 {
					t.Errorf("status %v, want no container's mount", s)
				}
				b.mustWrite("db")
				c.settle(time.Hour) // it is idle, and stays
				c.wantPlaced("db", "b")
				b.move("db", a.id.ID)
				c.settle(time.Second)
				c.wantPlaced("db", "a")
				a.mustWrite("db")
				b.move("db", "")
				c.settle(10 * time.Second)
				c.wantPlaced("db", "")
				c.wantNothing()
				if n := c.disks.Formats(c.device("db")); n != 1 {
					t.Errorf("formatted %d times, want once", n)
				}
			})
		})
	}
}

// Who means one volume does not place another that has its name by now.
func TestMoveVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		first, err := a.Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Fatal(err)
		}
		a.create("db", nil)
		second, err := a.Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range []string{"b", ""} {
			_, err = a.MoveVolume(t.Context(), "db", first.Definition.ID, host, "eve@ops")
			if !errors.Is(err, ownership.ErrNotFound) {
				t.Errorf("to %q: %v, want ErrNotFound", host, err)
			}
			wantError(t, err, "no such volume: the one named db has the id "+second.Definition.ID+", not "+first.Definition.ID)
		}
		if p := c.view("db").Placement; p != nil {
			t.Errorf("it is placed: %+v", p)
		}
		if p, err := a.MoveVolume(t.Context(), "db", second.Definition.ID, "b", "eve@ops"); err != nil || p.Host != "b" {
			t.Errorf("that one: %+v, %v", p, err)
		}
	})
}

func TestMoveRefused(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		_, err := a.Move(t.Context(), "db", "c", "eve@ops")
		wantError(t, err, `volume db: no host "c" is known; there are: a, b`)
		_, err = a.Move(t.Context(), "dbs", "b", "eve@ops")
		wantError(t, err, "no such volume: dbs; create it with")
		if err := a.Cordon(t.Context(), "b", "eve@ops", true); err != nil {
			t.Fatal(err)
		}
		_, err = a.Move(t.Context(), "db", "b", "eve@ops")
		wantError(t, err, "volume db: host b is cordoned: choose another host, or type: docker flocker node uncordon b")
		b.kill()
		err = a.RemoveNode(t.Context(), "b", "eve@ops")
		wantError(t, err, "host b is live, so it was not removed")
		c.settle(20 * time.Second)
		if err := a.RemoveNode(t.Context(), "b", "eve@ops"); err != nil {
			t.Fatal(err)
		}
		_, err = a.Move(t.Context(), "db", "b", "eve@ops")
		wantError(t, err, "volume db: host b is marked removed in the cluster: choose another host")
		a.partition(true)
		_, err = a.Move(t.Context(), "db", "a", "eve@ops")
		wantError(t, err, "ownership cannot be checked")
		a.partition(false)
		c.wantPlaced("db", "")
	})
}

// A placement elsewhere takes nothing from a container, and comes about when it ends.
func TestPlacementWaitsForContainer(t *testing.T) {
	for name, props := range map[string]backends.Properties{"F0": {Class: backends.ClassNone, CheapAttach: true}, "F1": exclusive} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				c.use(props)
				a, b := c.nodes["a"], c.nodes["b"]
				a.create("db", nil)
				a.mount("db", "id1")
				a.docker.set("db", "web")
				release := a.kernel.Hold(c.device("db"))
				a.mounter.ResetCalls()
				a.move("db", "b")
				c.settle(2 * time.Second) // it does not wait as a container does
				if got := fmt.Sprint(b.status("db")["placement_error"]); !strings.Contains(got, "volume db is in use on host a by container web") {
					t.Errorf("the error is %q at once", got)
				}
				c.settle(time.Hour)
				if s := a.status("db"); s["state"] != "mounted" || s["placement"] != "b" {
					t.Errorf("status on a is %v", s)
				}
				if slices.ContainsFunc(a.mounter.Calls(), func(call mount.FakeCall) bool { return call.Name == mount.CallUnmount }) {
					t.Error("it was taken from under its container, to see whether that uses it")
				}
				if got, want := b.status("db")["placement_error"], "volume db is in use on host a by container web; it comes here when that ends"; got != want {
					t.Errorf("the error is %q, want %q", got, want)
				}
				a.mustWrite("db")
				a.docker.set("db")
				release()
				a.unmount("db", "id1")
				c.settle(2 * time.Second)
				c.wantPlaced("db", "b")
			})
		})
	}
}

// A container is started on another host than the placement's, where nothing uses it.
func TestDockerMovesPlacement(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		began := time.Now()
		a.mount("db", "id1")
		if took := time.Since(began); took > time.Second {
			t.Errorf("an idle volume took %v", took)
		}
		a.docker.set("db", "web")
		p := c.view("db").Placement
		if p == nil || p.Host != "a" || p.By != "docker on host a" {
			t.Errorf("placed %+v, want a", p)
		}
		c.settle(time.Hour)
		if s := a.status("db"); s["state"] != "mounted" || s["mounts"] != 1 || fmt.Sprint(s["containers"]) != "[web]" {
			t.Errorf("status on a is %v", s)
		}
		if s := b.status("db"); s["state"] != "owned" || s["placement_error"] != nil || s["waiting"] != nil {
			t.Errorf("status on b is %v: it still wants it", s)
		}
		// The container ends, and the placement keeps it here.
		a.docker.set("db")
		a.unmount("db", "id1")
		c.settle(time.Hour)
		c.wantPlaced("db", "a")
	})
}

// A Mount that fails leaves the volume where it was placed, with that.
func TestFailedMountLeavesPlacement(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.move("db", "b")
		c.settle(time.Second)
		a.mounter.SetHook(func(call, _ string) error { return when(call == mount.CallMount, errors.New("boom")) })
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "boom")
		c.settle(20 * time.Second)
		c.wantPlaced("db", "b")
	})
}

// Somebody whom nobody knows of has the filesystem open: it is mounted again at once, and
// what asked for it is told.
func TestPlacedVolumeIsOpenOutsideDocker(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.BusyWait = 5 * time.Second }, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		release := b.kernel.Hold(c.device("db"))
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "volume db is in use on host b", "busy")
		c.wantPlaced("db", "b")
		err = a.Remove(t.Context(), "db")
		wantError(t, err, "volume db is in use on host b")
		c.wantPlaced("db", "b")
		a.move("db", "a")
		c.settle(time.Minute)
		if len(b.kernel.Mounts()) != 1 {
			t.Error("it is not mounted on b any more, where it is open")
		}
		b.mustWrite("db")
		release()
		c.settle(6 * time.Minute)
		c.wantPlaced("db", "a")
	})
}

func TestPlacementKilledAtEveryStep(t *testing.T) {
	steps := []string{"Attach", mount.CallFormat, mount.CallMount, mount.CallUnmount, mount.CallClose, "Detach", "txn"}
	for _, step := range steps {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s after=%v", step, after), func(t *testing.T) {
				inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
					c.use(exclusive)
					a, b := c.nodes["a"], c.nodes["b"]
					b.create("db", nil)
					a.killedAt(step, after, func() {
						b.move("db", "a")
						time.Sleep(time.Second)
						b.move("db", "")
						time.Sleep(10 * time.Second)
					})
					b.move("db", "b")
					c.settle(5 * time.Minute)
					c.wantPlaced("db", "b")
					b.mustWrite("db")
					if n := c.disks.Formats(c.device("db")); n != 1 {
						t.Errorf("formatted %d times, want once", n)
					}
					// And once more with something on it, that is to come from b.
					a.killedAt(step, after, func() {
						b.move("db", "a")
						time.Sleep(time.Second)
					})
					c.settle(5 * time.Minute)
					c.wantPlaced("db", "a")
				})
			})
		}
	}
}

// A process that starts again finds its volume mounted, and leaves it so.
func TestPlacementAfterRestart(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("logs", nil)
		a.move("logs", "b")
		c.settle(time.Second)
		token := c.view("logs").Owner.Token
		var mu sync.Mutex
		var calls []string
		b.kill()
		b.start()
		b.mounter.SetHook(func(call, _ string) error {
			mu.Lock()
			defer mu.Unlock()
			calls = append(calls, call)
			return nil
		})
		c.settle(time.Minute)
		c.wantPlaced("logs", "b")
		if now := c.view("logs").Owner.Token; now != token {
			t.Errorf("token %d, was %d", now, token)
		}
		mu.Lock()
		defer mu.Unlock()
		if slices.Contains(calls, mount.CallUnmount) || slices.Contains(calls, mount.CallMount) {
			t.Errorf("a restart did %v", calls)
		}
	})
}

func TestPlacementAfterReboot(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		_, b := c.placedOnB()
		before := c.view("db").Owner.Token
		b.kill()
		b.kernel.Reboot()
		c.storage.Reboot(b.id.ID)
		b.id.Boot = "boot-2"
		c.settle(20 * time.Second) // the lease of before
		b.start()
		c.settle(3 * time.Minute)
		c.wantPlaced("db", "b")
		if now := c.view("db").Owner.Token; now <= before {
			t.Errorf("token %d after the restart, %d before; want a new one", now, before)
		}
		b.mustWrite("db")
	})
}

// The node of a placement dies. Where nothing can cut it off, nobody takes its volume,
// whoever is to have it, before an operator says that it is dead.
func TestPlacementOfDeadHost(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.kill()
		c.settle(time.Hour)
		if v := c.view("db"); v.Owner == nil || v.Owner.Node != b.id.ID || v.Presence != nil || v.Placement.Host != "b" {
			t.Errorf("after its host's death: %+v", v)
		}
		a.move("db", "a")
		c.settle(time.Hour)
		if v := c.view("db"); v.Owner == nil || v.Owner.Node != b.id.ID {
			t.Errorf("a placement took it from a host that may write: %+v", v.Owner)
		}
		if got := fmt.Sprint(a.status("db")["placement_error"]); !strings.Contains(got, "make sure host b is switched off, then type: docker flocker node confirm-dead b") {
			t.Errorf("the error is %q", got)
		}
		b.kernel.Reboot() // it is off
		if _, err := a.ConfirmDead(t.Context(), "b", ownership.Death{Method: "operator", By: "eve@ops"}); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Minute)
		c.wantPlaced("db", "a")
	})
}

// Where the storage can cut it off, a new placement takes it over as a Mount would; and
// not without one.
func TestPlacementTakesOver(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.mustWrite("db")
		b.partition(true) // it lives, and writes on
		c.settle(time.Hour)
		b.mustWrite("db")
		if v := c.view("db"); v.Owner == nil || v.Owner.Node != b.id.ID {
			t.Fatalf("owner is %+v", v.Owner)
		}
		a.move("db", "a")
		c.settle(3 * time.Minute)
		if err := b.write("db"); err == nil {
			t.Error("the former owner can still write")
		}
		a.mustWrite("db")
		b.partition(false)
		c.settle(3 * time.Minute)
		c.wantPlaced("db", "a")
		a.mustWrite("db")
	})
}

// While etcd is away nothing changes, and nothing has to be done when it is back.
func TestPlacementWithoutEtcd(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.mount("db", "id1")
		b.partition(true)
		c.settle(time.Minute)
		if v := c.view("db"); v.Presence != nil {
			t.Errorf("present %+v, without a lease", v.Presence)
		}
		b.unmount("db", "id1")
		c.settle(10 * time.Minute)
		b.mustWrite("db")
		if s := b.status("db"); s["state"] != "mounted" {
			t.Errorf("status %v", s)
		}
		a.move("db", "a")
		c.settle(time.Minute)
		b.mustWrite("db")
		b.partition(false)
		c.settle(2 * time.Minute)
		c.wantPlaced("db", "a")
	})
}

func TestRemovePlacedVolume(t *testing.T) {
	for _, from := range twoNodes {
		t.Run("from "+from, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				b, n := c.nodes["b"], c.nodes[from]
				n.create("db", nil)
				n.move("db", "b")
				c.settle(time.Second)
				b.mount("db", "id1")
				b.docker.set("db", "web")
				release := b.kernel.Hold(c.device("db"))
				c.settle(2 * time.Minute)
				wantError(t, n.Remove(t.Context(), "db"), "volume db is in use on host b")
				if v := c.view("db"); v.Placement == nil || v.Presence == nil || v.Placement.Host != "b" {
					t.Fatalf("after a refusal: %+v", v)
				}
				b.docker.set("db")
				release()
				b.unmount("db", "id1")
				c.settle(time.Minute)
				c.wantPlaced("db", "b")
				if err := n.Remove(t.Context(), "db"); err != nil {
					t.Fatal(err)
				}
				c.settle(time.Hour)
				c.wantNothing()
				for _, kv := range c.etcd.Keys("") {
					if strings.Contains(kv.Key, "/place/") || strings.Contains(kv.Key, "/at/") || strings.Contains(kv.Key, "/vol/") {
						t.Errorf("left: %s = %s", kv.Key, kv.Value)
					}
				}
			})
		})
	}
}

func TestPlacedByTwoOperators(t *testing.T) {
	inCluster(t, []string{"a", "b", "c"}, nil, func(t *testing.T, c *cluster) {
		c.nodes["a"].create("db", nil)
		var wg sync.WaitGroup
		for name, n := range c.nodes {
			for range 10 {
				wg.Go(func() {
					if _, err := n.Move(t.Context(), "db", name, name); err != nil && !errors.Is(err, ownership.ErrConflict) {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		c.settle(5 * time.Minute)
		c.wantPlaced("db", c.view("db").Placement.Host)
	})
}

func TestPlacementOfQuarantinedVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.kernel.SetNoted(c.device("db"), "ext4 has counted 3 errors")
		c.settle(2 * time.Minute)
		b.mustWrite("db") // what runs goes on
		if v := c.view("db"); v.Volume.Phase != ownership.PhaseQuarantined || v.Presence == nil {
			t.Fatalf("it is %+v", v)
		}
		_, err := a.Move(t.Context(), "db", "a", "eve@ops")
		wantError(t, err, "volume db is quarantined", "docker flocker volume reinstate db")
		b.kernel.SetNoted(c.device("db"), "")
		a.move("db", "")
		c.settle(time.Minute)
		c.wantNothing()
		if err := a.Reinstate(t.Context(), "db", "eve@ops"); err != nil {
			t.Fatal(err)
		}
		a.move("db", "a")
		c.settle(time.Minute)
		c.wantPlaced("db", "a")
	})
}

// What fails is tried again, and shown until it works.
func TestPlacementIsTriedAgain(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		tries := 0
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && !call.Done {
				tries++
				return errors.New("the storage is tired")
			}
			return nil
		})
		a.move("db", "b")
		c.settle(10 * time.Minute)
		if got := fmt.Sprint(b.status("db")["placement_error"]); !strings.Contains(got, "the storage is tired") {
			t.Errorf("the error is %q", got)
		}
		if tries < 10 || tries > 60 {
			t.Errorf("tried %d times in 10 minutes", tries)
		}
		c.storage.SetFault(nil)
		c.settle(time.Minute)
		c.wantPlaced("db", "b")
	})
}

// One that waits for its next try notices that the placement has changed.
func TestPlacementChangesWhileItIsTried(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		c.failing(b, "Attach")
		a.move("db", "b")
		c.settle(10 * time.Minute)
		if b.status("db")["placement_error"] == nil {
			t.Fatal("it has not failed")
		}
		c.storage.SetFault(nil)
		a.move("db", "")
		c.settle(time.Second)
		if got := b.status("db")["placement_error"]; got != nil {
			t.Errorf("placed nowhere, the error is %q", got)
		}
		a.move("db", "b")
		c.settle(time.Second)
		c.wantPlaced("db", "b")
	})
}

func TestLeaseIsUse(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.BusyWait = 0 }, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		m := ownership.New(c.etcd, ownership.Node{ID: "api", Host: "api", Boot: "none"}, ownership.Config{})
		ttl := time.Hour
		l, _, err := m.Lease(t.Context(), c.view("db").Volume.ID, "b", &ttl, "eve@ops")
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "volume db is in use on host b (leased until "+l.Expires.UTC().Format(time.RFC3339)+")")
		for _, n := range c.nodes {
			wantError(t, n.Remove(t.Context(), "db"), "volume db was not removed: ", "is leased to node "+b.id.ID, "give the lease back first")
		}
		drained, err := a.Drain(t.Context(), "b", "eve@ops")
		if err != nil || len(drained.Busy) != 1 || drained.Busy[0].Name != "db" || !strings.Contains(drained.Busy[0].Detail, "leased until") {
			t.Errorf("drained %+v, %v", drained, err)
		}
		a.move("db", "a")
		c.settle(30 * time.Minute)
		if v := c.view("db"); len(b.kernel.Mounts()) != 1 || v.Presence == nil || v.Presence.Node != b.id.ID {
			t.Errorf("it is not mounted where it is leased, or not said to be: %+v", v.Presence)
		}
		c.settle(40 * time.Minute) // and it ends
		c.wantPlaced("db", "a")
		// A lease is no reason to mount.
		if _, _, err = m.Lease(t.Context(), c.view("db").Volume.ID, "b", nil, "eve@ops"); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Minute)
		c.wantPlaced("db", "a")
		a.move("db", "")
		c.settle(time.Minute)
		c.wantNothing()
	})
}

// The last container of a leased volume ends: it stays here, also when another host asks.
func TestLeaseKeepsAVolumeAfterItsContainer(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.BusyWait = 0 }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		m := ownership.New(c.etcd, ownership.Node{ID: "api", Host: "api", Boot: "none"}, ownership.Config{})
		vid := c.view("db").Volume.ID
		if _, _, err := m.Lease(t.Context(), vid, "a", nil, "eve@ops"); err != nil {
			t.Fatal(err)
		}
		a.unmount("db", "id1")
		c.settle(time.Hour)
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a (leased until it is given back)")
		if _, err := m.Unlease(t.Context(), vid, "eve@ops"); err != nil {
			t.Fatal(err)
		}
		b.mount("db", "id3")
	})
}

func TestCordon(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		for _, name := range []string{"db", "logs", "kept"} {
			a.create(name, nil)
		}
		b.mount("kept", "id1")
		b.docker.set("kept", "web")
		if err := a.Cordon(t.Context(), "b", "eve@ops", true); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Second)
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db: host b is cordoned: docker flocker node uncordon b, or start the container on another host")
		b.mount("kept", "id3") // what it has goes on
		b.restart()
		_, err = b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db: host b is cordoned")
		if err := b.Remove(t.Context(), "logs"); err != nil {
			t.Errorf("remove: %v", err)
		}
		if err := a.Cordon(t.Context(), "b", "eve@ops", false); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Second)
		b.mount("db", "id2")
	})
}

func TestDrain(t *testing.T) {
	for _, from := range twoNodes {
		t.Run("from "+from, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				c.use(exclusive)
				a, b := c.nodes["a"], c.nodes["b"]
				for _, name := range []string{"placed", "used", "open", "lingering", "other"} {
					a.create(name, nil)
				}
				a.move("placed", "b")
				a.move("other", "a")
				b.mount("used", "id1")
				b.docker.set("used", "web", "cron")
				b.mount("open", "id2")
				release := b.kernel.Hold(c.device("open"))
				b.unmount("open", "id2")
				c.settle(time.Minute)
				b.mount("lingering", "id3")
				b.unmount("lingering", "id3")
				got, err := c.nodes[from].Drain(t.Context(), "b", "eve@ops")
				if err != nil {
					t.Fatal(err)
				}
				if fmt.Sprint(got.Released) != "[lingering placed]" || len(got.Moving) != 0 {
					t.Errorf("drained %+v", got)
				}
				if len(got.Busy) != 2 || got.Busy[0].Name != "open" || !strings.Contains(got.Busy[0].Detail, "busy") ||
					got.Busy[1].Name != "used" || fmt.Sprint(got.Busy[1].Containers) != "[cron web]" || got.Busy[1].Detail != "" {
					t.Errorf("busy are %+v", got.Busy)
				}
				for _, n := range c.nodes {
					if asked := n.status("used")["waiting"]; asked != nil {
						t.Errorf("%s still sees %v wait", n.name, asked)
					}
				}
				_, err = b.Mount(t.Context(), "placed", "id4")
				wantError(t, err, "host b is cordoned")
				for _, name := range []string{"placed", "lingering"} { // and who asked has not got them
					if v := c.view(name); v.Placement != nil || v.Owner != nil {
						t.Errorf("%s is %+v", name, v)
					}
				}
				if c.view("other").Presence == nil {
					t.Error("the other host lost what it had")
				}
				release()
				b.docker.set("used")
				b.unmount("used", "id1")
				c.settle(time.Minute)
				if got, err = c.nodes[from].Drain(t.Context(), "b", "eve@ops"); err != nil || len(got.Busy)+len(got.Moving)+len(got.Released) != 0 {
					t.Errorf("drained again: %+v, %v", got, err)
				}
			})
		})
	}
}

func TestDrainDeadHost(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.kill()
		c.settle(20 * time.Second)
		_, err := a.Drain(t.Context(), "b", "eve@ops")
		wantError(t, err, "host b has not been heard from: it is cordoned now, and still owns db; if it is switched off, type: docker flocker node confirm-dead b")
		if v := c.view("db"); v.Owner == nil || v.Placement != nil {
			t.Errorf("it is %+v", v)
		}
	})
}

func TestCreateVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		id := uuid.NewString()
		req := driver.CreateRequest{
			Name: "db", ID: id, By: "eve@ops",
			Options: map[string]string{"size": "2G", "label.team": "blue"}, Labels: map[string]string{"metadata.owner of it": "eve"},
		}
		for _, n := range []*node{a, b, a} { // the same again is fine
			v, err := n.CreateVolume(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			d := v.Definition
			if v.Name != "db" || d.ID != id || d.Size != 2<<30 || d.Labels["team"] != "blue" || d.Labels["metadata.owner of it"] != "eve" || d.Phase != ownership.PhaseReady {
				t.Errorf("created %+v", d)
			}
		}
		a.mount("db", "id1")
		if _, uuid := c.disks.Filesystem(c.device("db")); uuid != id {
			t.Errorf("its filesystem is %s", uuid)
		}
		refused := func(want string, change func(*driver.CreateRequest)) {
			t.Helper()
			r := req
			change(&r)
			_, err := b.CreateVolume(t.Context(), r)
			wantError(t, err, want)
		}
		other := uuid.NewString()
		refused("the name db is in use by another volume (id "+id+"): choose another name, or remove that one first", func(r *driver.CreateRequest) { r.ID = other })
		refused("id "+id+" belongs to another volume, or did", func(r *driver.CreateRequest) { r.Name = "dbs" })
		refused("volume db exists with other options: size is 2GiB, not 3GiB", func(r *driver.CreateRequest) { r.Options = map[string]string{"size": "3G"} })
		refused(`volume id "7" is not valid: use a UUID in lower case, such as `, func(r *driver.CreateRequest) { r.ID = "7" })
		refused(`is not valid: use a UUID in lower case`, func(r *driver.CreateRequest) { r.ID = strings.ToUpper(other) })
		refused("the labels of volume db are 20KiB long; the most is 16KiB", func(r *driver.CreateRequest) {
			r.Labels, r.Options = map[string]string{"": strings.Repeat("x", 20<<10)}, nil
		})
		// One that could not be made may be asked for again, with its id; one that was removed not.
		c.failing(b, "Create")
		r := driver.CreateRequest{Name: "new", ID: other}
		if _, err := b.CreateVolume(t.Context(), r); err == nil {
			t.Fatal("created without storage")
		}
		c.storage.SetFault(nil)
		if _, err := b.CreateVolume(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if err := b.Remove(t.Context(), "new"); err != nil {
			t.Fatal(err)
		}
		_, err := b.CreateVolume(t.Context(), r)
		wantError(t, err, "id "+other+" belongs to another volume, or did")
		if !errors.Is(err, ownership.ErrConflict) {
			t.Errorf("%v is no conflict", err)
		}
	})
}

// A node whose lease had ended says again what it has mounted.
func TestPresenceIsSaidAgain(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		_, b := c.placedOnB()
		b.partition(true)
		c.settle(time.Minute)
		if v := c.view("db"); v.Presence != nil {
			t.Errorf("present %+v, without a lease", v.Presence)
		}
		b.partition(false)
		c.settle(time.Minute)
		c.wantPlaced("db", "b")
	})
}

// What is placed elsewhere and used here is said to be here, until it is let go.
func TestPresenceWhileInUse(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.move("db", "a")
		c.settle(time.Second)
		c.wantPlaced("db", "a")
		closed := a.kernel.Hold(c.device("db"))
		for _, host := range []string{"b", "", "a", "b"} { // to and fro
			b.move("db", host)
			c.settle(time.Minute)
			v := c.view("db")
			if v.Presence == nil || v.Presence.Node != a.id.ID || v.Owner == nil || v.Presence.Token != v.Owner.Token {
				t.Errorf("placed on %q, and in use on a: present %+v, owned by %+v", host, v.Presence, v.Owner)
			}
		}
		closed()
		c.settle(10 * time.Minute)
		c.wantPlaced("db", "b")
		b.move("db", "")
		c.settle(time.Minute)
		c.wantPlaced("db", "")
		if v := c.view("db"); v.Owner != nil {
			t.Errorf("owned by %+v", v.Owner)
		}
	})
}

// Others are told where the host has what is mounted, once that is known.
func TestPresenceSaysTheHostsPath(t *testing.T) {
	var known atomic.Bool
	inCluster(t, twoNodes, func(cfg *driver.Config) {
		inside := cfg.MountRoot
		cfg.HostPath = func(path string) string {
			if !known.Load() {
				return ""
			}
			return "/host" + strings.TrimPrefix(path, inside)
		}
	}, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.move("db", "b")
		c.settle(time.Minute)
		if v := c.view("db"); v.Presence != nil {
			t.Errorf("present %+v, at an unknown path", v.Presence)
		}
		s := b.status("db")
		if s["state"] != "mounted" || s["placement_error"] != "volume db is mounted; where the host has it, Docker has not said yet" {
			t.Errorf("status on b: %v", s)
		}
		known.Store(true)
		c.settle(time.Minute)
		v := c.view("db")
		if v.Presence == nil || v.Presence.Path != "/host/"+v.Volume.ID+"/data" {
			t.Errorf("present %+v", v.Presence)
		}
		if s := b.status("db"); s["placement_error"] != nil {
			t.Errorf("status on b: %v", s)
		}
	})
}

// One more container where the volume is used already changes no decision.
func TestSecondContainerLeavesPlacement(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		a.move("db", "b")
		c.settle(time.Minute)
		a.mount("db", "id2")
		c.settle(time.Minute)
		if p := c.view("db").Placement; p == nil || p.Host != "b" {
			t.Errorf("placed %+v, want b", p)
		}
	})
}

// placeStore counts how often all placements are read, the answers to which take their
// time. With hold, each report of a change of them waits for a token.
type placeStore struct {
	ownership.Store
	reads *atomic.Int64
	takes time.Duration
	hold  chan struct{}
}

func (s *placeStore) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	res, err := s.Store.Txn(ctx, txn)
	for _, op := range txn.Then {
		if op.Kind == ownership.OpGet && strings.HasSuffix(op.Key, "/place/") {
			s.reads.Add(1)
			time.Sleep(s.takes)
		}
	}
	return res, err
}

func (s *placeStore) Watch(ctx context.Context, key string, prefix bool, after int64) <-chan ownership.WatchResult {
	changes := s.Store.Watch(ctx, key, prefix, after)
	if s.hold == nil || !strings.HasSuffix(key, "/place/") {
		return changes
	}
	held := make(chan ownership.WatchResult)
	go func() {
		defer close(held)
		for res := range changes {
			if len(res.Events) > 0 {
				select {
				case <-s.hold:
				case <-ctx.Done():
				}
			}
			select {
			case held <- res:
			case <-ctx.Done():
			}
		}
	}()
	return held
}

// A node hears of changes, and does not read all placements for each: there may be ten
// thousand of them, and a hundred nodes.
func TestPlacementsAreNotReadForEachChange(t *testing.T) {
	inCluster(t, []string{"a", "b", "c"}, nil, func(t *testing.T, c *cluster) {
		var reads atomic.Int64
		c.store = func(n *node) ownership.Store { return &placeStore{n.etcd, &reads, 0, nil} }
		for _, n := range c.nodes {
			n.restart()
		}
		a := c.nodes["a"]
		a.create("db", nil)
		c.settle(time.Second)
		before := reads.Load()
		for i := range 30 {
			host := []string{"a", "b", "c"}[i%3]
			a.move("db", host)
			c.settle(time.Second)
			c.wantPlaced("db", host)
		}
		if n := reads.Load() - before; n > 3 {
			t.Errorf("all placements were read %d times for 30 changes", n)
		}
		before = reads.Load()
		c.settle(time.Hour)
		if n := reads.Load() - before; n < 3*30 || n > 3*50 {
			t.Errorf("all placements were read %d times in an hour, by three nodes; want about every 80 s", n)
		}
	})
}

// What a watch does not report is found by a look at all placements; and when it reports it
// after all, that changes nothing any more.
func TestPlacementThatIsHeardOfLate(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		hold := make(chan struct{})
		c.store = func(n *node) ownership.Store { return &placeStore{n.etcd, new(atomic.Int64), 0, hold} }
		a, b := c.nodes["a"], c.nodes["b"]
		b.restart()
		a.create("db", nil)
		c.settle(time.Second)
		a.move("db", "b")
		c.settle(2 * time.Minute)
		c.wantPlaced("db", "b")
		a.move("db", "a")
		c.settle(2 * time.Minute)
		c.wantPlaced("db", "a")
		token := c.view("db").Owner.Token
		hold <- struct{}{} // that it is placed on b
		c.settle(5 * time.Second)
		c.wantPlaced("db", "a")
		if now := c.view("db").Owner.Token; now != token {
			t.Errorf("token %d, was %d: it has been elsewhere", now, token)
		}
	})
}

// What is heard while all placements are read is newer than the answer.
func TestPlacementIsHeardOfWhileAllAreRead(t *testing.T) {
	inCluster(t, twoNodes, nil, func(_ *testing.T, c *cluster) {
		var reads atomic.Int64
		c.store = func(n *node) ownership.Store { return &placeStore{n.etcd, &reads, 2 * time.Second, nil} }
		a, b := c.nodes["a"], c.nodes["b"]
		b.restart()
		a.create("db", nil)
		c.settle(20 * time.Second)
		before := reads.Load()
		for _, kv := range c.etcd.Keys("") {
			if strings.HasSuffix(kv.Key, "/live/"+b.id.ID) {
				c.etcd.Expire(kv.Lease) // it registers anew, and reads
			}
		}
		for reads.Load() == before {
			time.Sleep(100 * time.Millisecond)
		}
		a.move("db", "b")
		c.settle(10 * time.Second)
		c.wantPlaced("db", "b")
	})
}

// A watch that was away reports nothing of what happened meanwhile, which is read as soon as it
// is back.
func TestPlacementWhileTheWatchIsAway(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.placedOnB()
		b.etcd.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "watch"} })
		b.etcd.CutWatches()
		c.settle(time.Second)
		a.move("db", "")
		c.settle(3 * time.Second)
		a.create("logs", nil)
		a.move("logs", "b")
		c.settle(3 * time.Second)
		b.etcd.Inject(nil)
		c.settle(15 * time.Second)
		c.wantPlaced("logs", "b")
		if v := c.view("db"); v.Owner != nil || v.Presence != nil {
			t.Errorf("db is %+v", v)
		}
	})
}
