package driver_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// hold is the one of these tests' nodes.
const hold = 3 * time.Second

// fencing storage: its three shapes.
var (
	exclusive = backends.Properties{Class: backends.ClassExclusive, ExclusiveAttach: true}
	fenced    = backends.Properties{Class: backends.ClassFenced}
	nameless  = backends.Properties{Class: backends.ClassExclusive, ExclusiveAttach: true, LateCalls: 60 * time.Second}
)

// onFencingStorage runs a test on each shape of storage that can cut a node off.
func onFencingStorage(t *testing.T, names []string, test func(t *testing.T, c *cluster)) {
	t.Helper()
	for name, props := range map[string]backends.Properties{"F1": exclusive, "F2": fenced, "F1 without ids": nameless} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, names, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
				c.use(props)
				test(t, c)
			})
		})
	}
}

// use gives the cluster another storage system.
func (c *cluster) use(props backends.Properties) {
	c.storage = backendtest.NewMemory(props)
	c.watchStorage()
	for _, n := range c.nodes {
		n.restart()
	}
}

// watchStorage joins the storage system to the kernels: a device that is cut off
// fails there, and nobody may cut off the owner.
func (c *cluster) watchStorage() {
	byID := func(id string) *node {
		for _, n := range c.nodes {
			if n.id.ID == id {
				return n
			}
		}
		return nil
	}
	c.storage.SetHosts(backendtest.Hosts{
		InUse: func(id, device string) bool { return byID(id).kernel.InUse(device) },
		Rightful: func(att backends.Attachment) bool {
			owner, ok := c.owner(att.Volume)
			return ok && owner.Node == att.Node && owner.Token == att.Token
		},
		Attached: func(att backends.Attachment) { c.disks.SetCut(att.Device, byID(att.Node).name, false) },
		Pulled:   func(att backends.Attachment) { c.disks.SetCut(att.Device, byID(att.Node).name, true) },
	})
}

// owner reads own/<vid>.
func (c *cluster) owner(vid string) (o ownership.Owner, ok bool) {
	for _, kv := range c.etcd.Keys("") {
		if strings.HasSuffix(kv.Key, "/own/"+vid) {
			if err := json.Unmarshal(kv.Value, &o); err != nil {
				c.t.Error(err)
			}
			o.Token = kv.ModRevision
			return o, true
		}
	}
	return o, false
}

// put writes a key of etcd as no node does.
func (c *cluster) put(key string, value any) {
	data, err := json.Marshal(value)
	if err == nil {
		_, err = c.etcd.Txn(context.Background(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: key, Value: data}}})
	}
	if err != nil {
		c.t.Error(err)
	}
}

// write is a container on the node that writes and syncs.
func (n *node) write(name string) error {
	n.c.t.Helper()
	return n.kernel.Write(n.c.device(name))
}

func (n *node) mustWrite(name string) {
	n.c.t.Helper()
	if err := n.write(name); err != nil {
		n.c.t.Errorf("write on %s: %v", n.name, err)
	}
}

// partition cuts a node off from etcd, or heals that.
func (n *node) partition(cut bool) { n.etcd.Partition(cut) }

// The host of a container dies. Somebody mounts the volume elsewhere right away:
// it waits for the lease to end and for the hold, and no longer.
func TestTakeOverFromDeadHost(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.mustWrite("db")
		before := a.status("db")["token"].(int64)
		a.kill()
		died := time.Now()
		b.mount("db", "id2")
		if took := time.Since(died); took < hold || took > 10*time.Second+hold+2*time.Second {
			t.Errorf("taken over after %v, want the lease's 10s, the hold's %v, and at most 2s", took, hold)
		}
		b.mustWrite("db")
		if err := a.write("db"); err == nil {
			t.Error("the former owner can still write")
		}
		s := b.status("db")
		if s["state"] != "mounted" || s["owner"] != "b" || s["token"].(int64) <= before {
			t.Errorf("status %v, want mounted on b under a token above %d", s, before)
		}
	})
}

// The owner has been dead for long when somebody mounts the volume: nothing is
// left to wait for.
func TestTakeOverFromLongDeadHostIsFast(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		c.settle(time.Minute)
		start := time.Now()
		b.mount("db", "id2")
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("took %v, want at most 2s", took)
		}
	})
}

// A host loses etcd, and its container runs on. Another host takes the volume over;
// the storage cuts the first one off, which stops what it has when it is back.
func TestTakeOverFromPartitionedHost(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		release := a.kernel.Hold(c.device("db"))
		a.docker.onKill = func(string) { release() }
		a.partition(true)
		c.settle(20 * time.Second)
		a.mustWrite("db") // nobody wants it, so nothing happens
		b.mount("db", "id2")
		if err := a.write("db"); err == nil {
			t.Error("the partitioned host can still write")
		}
		b.mustWrite("db")
		a.partition(false)
		c.settle(10 * time.Second)
		if got := a.docker.killed(); !slices.Equal(got, []string{"web"}) {
			t.Errorf("killed %v, want web", got)
		}
		if m := a.kernel.Mounts(); len(m) > 0 {
			t.Errorf("a has mounted %v, want nothing", m)
		}
		b.mustWrite("db")
		// And back again.
		b.unmount("db", "id2")
		a.mount("db", "id3")
		a.mustWrite("db")
	})
}

// The order in which a loser lets go: nothing more reaches the device before
// anything else is tried.
func TestLoserShutsDownBeforeItKills(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		var order []string
		a.mounter.SetHook(func(call, _ string) error {
			if call == mount.CallShutdown || call == mount.CallUnmount {
				order = append(order, call)
			}
			return nil
		})
		a.docker.onKill = func(string) { order = append(order, "kill") }
		a.partition(true)
		b.mount("db", "id2")
		a.partition(false)
		c.settle(20 * time.Second)
		if want := []string{mount.CallShutdown, "kill", mount.CallUnmount}; !slices.Equal(order, want) {
			t.Errorf("did %v, want %v", order, want)
		}
	})
}

// Nothing is taken from a host that is back within the hold.
func TestHostIsBackWithinTheHold(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		c.cfg = func(cfg *driver.Config) { cfg.Hold = 10 * time.Second }
		c.nodes["b"].restart()
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		a.partition(true)
		go func() {
			for b.status("db")["state"] != "owner not responding" {
				time.Sleep(100 * time.Millisecond)
			}
			a.partition(false)
		}()
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a by container web")
		a.mustWrite("db")
	})
}

// A node that does not reach etcd itself has seen nobody's silence.
func TestTakerWithoutEtcdTakesNothing(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		b.partition(true)
		a.partition(true)
		c.settle(time.Minute)
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db: ownership cannot be checked")
		a.partition(false)
		b.partition(false)
		c.settle(10 * time.Second)
		a.mustWrite("db")
	})
}

func TestDeadHostOnStorageThatCannotFence(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		_, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "none"})
		var live *ownership.LiveError
		if !errors.As(err, &live) {
			t.Errorf("confirmed a live host dead: %v", err)
		}
		a.kill()
		c.settle(30 * time.Second)
		_, err = b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is owned by host a, which has not been heard from for ",
			"memory cannot cut it off, so nothing was changed: make sure host a is switched off, then type: docker flocker node confirm-dead a")
		if s := b.status("db"); s["state"] != "owner not responding" {
			t.Errorf("state %v, want owner not responding", s["state"])
		}
		wantError(t, b.Remove(t.Context(), "db"), "volume db is owned by host a, which has not been heard from for ",
			"it may be in use there, so it was not removed: bring host a back; or make sure host a is switched off, then type: docker flocker node confirm-dead a")

		a.kernel.Reboot() // it is switched off
		c.storage.Reboot(a.id.ID)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "pulled the plug"}); err != nil {
			t.Fatal(err)
		}
		b.mount("db", "id2")
		b.mustWrite("db")

		// It comes back, as another boot: nothing is held against it.
		a.id.Boot = "boot-2"
		a.start()
		c.settle(5 * time.Second)
		b.unmount("db", "id2")
		a.mount("db", "id3")
	})
}

// An operator confirms the death of a host that only had no etcd. Nothing can keep
// it from writing until it is back; then it gives up everything before it counts
// as a member again.
func TestCondemnedHostGivesUp(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		a.partition(true)
		c.settle(20 * time.Second)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "a mistake"}); err != nil {
			t.Fatal(err)
		}
		a.partition(false)
		c.settle(20 * time.Second)
		if got := a.docker.killed(); !slices.Equal(got, []string{"web"}) {
			t.Errorf("killed %v, want web", got)
		}
		if m := a.kernel.Mounts(); len(m) > 0 {
			t.Errorf("a has mounted %v, want nothing", m)
		}
		c.settle(time.Minute)
		c.wantNothing()
		b.mount("db", "id2")
	})
}

// A forced confirmation of a live host makes it give up at once.
func TestForcedConfirmation(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		c.settle(10 * time.Second)
		if m := a.kernel.Mounts(); len(m) > 0 {
			t.Errorf("a has mounted %v, want nothing", m)
		}
		b.mount("db", "id2")
		c.settle(time.Minute)
		b.unmount("db", "id2")
		a.mount("db", "id3")
	})
}

// A live host that was declared dead by force takes its time to give up. Where nothing
// cuts it off, its volume is not taken before it is done.
func TestForcedHostIsWaitedFor(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.mounter.SetDelay(func(call, _ string) time.Duration {
			if call == mount.CallShutdown {
				return 20 * time.Second
			}
			return 0
		})
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		b.mount("db", "id2")
		if took := time.Since(began); took < 20*time.Second || took > 25*time.Second {
			t.Errorf("mounted after %v, want as soon as the other host has given up, after 20s", took)
		}
		b.mustWrite("db")
	})
}

// One filesystem that does not shut down keeps no other from being shut down.
func TestForcedHostGivesUpSideBySide(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		for _, name := range []string{"one", "two", "three"} {
			a.create(name, nil)
			a.mount(name, "id1")
		}
		a.mounter.SetDelay(func(call, _ string) time.Duration {
			if call == mount.CallShutdown {
				return 8 * time.Second
			}
			return 0
		})
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		c.settle(15 * time.Second)
		if m := a.kernel.Mounts(); len(m) > 0 {
			t.Errorf("15s later it has mounted %v, want nothing", m)
		}
	})
}

// It cannot give up what it has: in the end the operator is believed.
func TestForcedHostThatDoesNotGiveUp(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		release := a.kernel.Hold(c.device("db"))
		a.docker.setDown(true)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Second)
		began := time.Now()
		soon, cancel := context.WithTimeout(t.Context(), 13*time.Second)
		defer cancel()
		_, err := b.Mount(soon, "db", "id2")
		wantError(t, err, "volume db is owned by host a, which has not been heard from for 14s; it was declared dead by force, "+
			"and has not yet said that it has given up its volumes; without that it is taken over in 20s; retry")
		b.mount("db", "id2")
		if took := time.Since(began); took < 32*time.Second || took > 36*time.Second {
			t.Errorf("mounted after %v, want 33s", took)
		}
		b.mustWrite("db")
		release()
		c.settle(time.Minute)
		b.mustWrite("db")
	})
}

// It hangs so that it keeps its lease and answers nobody.
func TestForcedHostThatLooksLive(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		a.kernel.Reboot()
		c.settle(20 * time.Second)
		for _, kv := range c.etcd.Keys("") {
			if strings.HasSuffix(kv.Key, "/live/"+b.id.ID) {
				c.put(strings.TrimSuffix(kv.Key, b.id.ID)+a.id.ID, a.id)
			}
		}
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := b.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < 33*time.Second || took > 40*time.Second {
			t.Errorf("mounted after %v, want about 35s", took)
		}
		b.mustWrite("db")
	})
}

// Many hosts fall silent at once: that is the network, or etcd.
func TestManySilentHosts(t *testing.T) {
	onFencingStorage(t, []string{"a", "b", "c", "d", "e"}, func(t *testing.T, c *cluster) {
		e := c.nodes["e"]
		c.nodes["a"].create("db", nil)
		c.nodes["a"].mount("db", "id1")
		c.nodes["a"].docker.set("db", "web")
		c.settle(time.Minute) // the restart of the processes is not one
		// The owner is the first, and a Mount waits for its end already.
		c.nodes["a"].partition(true)
		time.AfterFunc(2500*time.Millisecond, func() {
			for _, name := range []string{"b", "c", "d"} {
				c.nodes[name].partition(true)
			}
		})
		_, err := e.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is owned by host a, which has not been heard from", "4 of 5 hosts were no longer heard from within one minute",
			"so nothing is taken over from them", "docker flocker node confirm-dead HOST")
		c.nodes["a"].mustWrite("db")
		if _, err := e.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it burns"}); err != nil {
			t.Fatal(err)
		}
		e.mount("db", "id3")
	})
}

// The fence cannot be verified: the volume stays where no node can use it, and the
// fence is tried until it works. Another host goes on if the taker dies too.
func TestFenceFails(t *testing.T) {
	for _, ending := range []string{"the storage is back", "the taker dies"} {
		t.Run(ending, func(t *testing.T) {
			onFencingStorage(t, []string{"a", "b", "c"}, func(t *testing.T, c *cluster) {
				a, b, third := c.nodes["a"], c.nodes["b"], c.nodes["c"]
				a.create("db", nil)
				a.mount("db", "id1")
				a.kill()
				var up atomic.Bool
				c.storage.Inject(func(call backendtest.Call) backendtest.Fault {
					return backendtest.Fault{Refused: !up.Load() && call.Method == "Fence"}
				})
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
				defer cancel()
				_, err := b.Mount(ctx, "db", "id2")
				wantError(t, err, "volume db: host a, which owned it, could not be cut off from it", "it is tried again")
				if s := b.status("db"); s["state"] != "being taken over" {
					t.Errorf("status %v, want being taken over", s)
				}
				if s := third.status("db"); s["state"] != "being taken over" || s["detail"] != "from host a" {
					t.Errorf("status elsewhere %v, want being taken over from host a", s)
				}
				soon, stop := context.WithTimeout(t.Context(), 100*time.Second)
				defer stop()
				if _, err := third.Mount(soon, "db", "id3"); err == nil ||
					!strings.Contains(err.Error(), "could not be cut off") && !strings.Contains(err.Error(), "may still take effect for ") {
					t.Errorf("mounted elsewhere: %v, want what hinders the takeover", err)
				}
				if ending == "the taker dies" {
					b.kill()
				}
				up.Store(true)
				for start := time.Now(); ; time.Sleep(time.Second) {
					ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
					_, err := third.Mount(ctx, "db", "id4")
					cancel()
					if err == nil {
						break
					}
					if time.Since(start) > 5*time.Minute {
						t.Fatal(err)
					}
				}
				third.mustWrite("db")
				if err := a.write("db"); err == nil {
					t.Error("the former owner can still write")
				}
			})
		})
	}
}

// The taker is killed before and after every step of its takeover, and starts
// again: the takeover is finished, by the same rules.
func TestTakerKilledAtEveryStep(t *testing.T) {
	for _, step := range []string{"Fence", "Attach", mount.CallMount} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s after=%t", step, after), func(t *testing.T) {
				onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
					a, b := c.nodes["a"], c.nodes["b"]
					a.create("db", nil)
					a.mount("db", "id1")
					a.kill()
					c.settle(20 * time.Second)
					b.killedAt(step, after, func() { _, _ = b.Mount(context.Background(), "db", "id2") })
					again, stop := context.WithTimeout(t.Context(), 5*time.Minute)
					defer stop()
					if _, err := b.Mount(again, "db", "id3"); err != nil {
						t.Fatal(err)
					}
					b.mustWrite("db")
					if err := a.write("db"); err == nil {
						t.Error("the former owner can still write")
					}
				})
			})
		}
	}
}

// A host restarts and the storage keeps its attachment, as clouds do: the
// attachment of the old boot is not adopted.
func TestAttachmentOfAnOlderBoot(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		before := a.status("db")["token"].(int64)
		a.kill()
		a.kernel.Reboot()
		c.storage.Reboot(a.id.ID)
		a.id.Boot = "boot-2"
		a.start()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		if after := a.status("db")["token"].(int64); after <= before {
			t.Errorf("token %d after the restart, %d before; want a new one", after, before)
		}
		a.mustWrite("db")
	})
}

// The owner died while its attach was on its way to the storage, which lets one node
// attach: it arrives after the fence and before the attach of the one who takes over.
func TestAttachThatArrivesAfterTheFence(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(exclusive)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		var arrived atomic.Bool
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			switch {
			case call.Method == "Attach" && call.Node == a.id.ID:
				f.Late = 20 * time.Second
			case call.Method == "Attach" && !arrived.Swap(true):
				f.Latency = 20 * time.Second
			}
			return f
		})
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && call.Node == a.id.ID && call.Done {
				runtime.Goexit() // nobody is there any more
			}
			return nil
		})
		go func() { _, _ = a.Mount(context.Background(), "db", "id1") }()
		c.settle(time.Second)
		a.kill()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		if _, err := b.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		b.mustWrite("db")
		if n := c.storage.Calls()["Fence"]; n != 2 {
			t.Errorf("fenced %d times, want twice", n)
		}
	})
}

// A volume whose data is in doubt is taken out of service until a person says so.
func TestQuarantine(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		device := c.device("db")
		a.kernel.SetNoted(device, "ext4 has counted 3 errors")
		c.settle(time.Minute)
		for _, n := range []*node{a, b} {
			if s := n.status("db"); s["state"] != "quarantined" || !strings.Contains(fmt.Sprint(s["detail"]), "ext4 has counted 3 errors") {
				t.Errorf("status on %s %v, want quarantined for the kernel's reason", n.name, s)
			}
		}
		a.mustWrite("db") // what runs goes on
		_, err := a.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is quarantined: ", "ext4 has counted 3 errors", "when it is seen to, type: docker flocker volume reinstate db")
		a.unmount("db", "id1")
		c.settle(20 * time.Second)
		c.wantNothing()
		_, err = b.Mount(t.Context(), "db", "id3")
		wantError(t, err, "volume db is quarantined: ", "docker flocker volume reinstate db")

		if err := b.Reinstate(t.Context(), "db", "ann@ops"); err != nil {
			t.Fatal(err)
		}
		b.mount("db", "id4")
		err = b.Reinstate(t.Context(), "db", "ann@ops")
		wantError(t, err, "volume db is not quarantined (it is ready), so nothing was changed")
		if !errors.Is(err, ownership.ErrConflict) {
			t.Errorf("%v is no ErrConflict, as which it is the operator's mistake", err)
		}
	})
}

// The device of an owner fails for good: what it did not take is lost, and the
// volume is given away only as one whose data is in doubt.
func TestQuarantineOfLastWrites(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		c.disks.SetCut(c.device("db"), "a", true)
		if err := a.Unmount(t.Context(), "db", "id1"); !errors.Is(err, mount.ErrUnwritten) {
			t.Errorf("unmount: %v, want that the last writes may be lost", err)
		}
		c.settle(time.Minute)
		c.wantNothing()
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is quarantined: ", "last writes may be lost", "docker flocker volume reinstate db")
	})
}

// The device of an idle volume fails, and the process that had closed it is killed
// before it has given it away: nothing was left to write, and so nothing is in doubt.
func TestQuarantineSparesAClosedDevice(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.unmount("db", "id1")
		c.disks.SetCut(c.device("db"), "a", true)
		a.restart()
		c.settle(time.Minute)
		c.wantNothing()
		b.mount("db", "id2")
		b.unmount("db", "id2")

		// Mounted again, there is no telling what became of the last writes.
		b.mount("db", "id3")
		device := c.device("db")
		b.kill()
		b.kernel.DisablePlugin()()
		c.disks.SetCut(device, "b", true)
		b.start()
		c.settle(time.Minute)
		_, err := b.Mount(t.Context(), "db", "id4")
		wantError(t, err, "volume db is quarantined: ", "last writes may be lost")
	})
}

// The device carries another filesystem than the volume's.
func TestQuarantineOfAWrongFilesystem(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.unmount("db", "id1")
		c.settle(20 * time.Second)
		c.disks.SetFilesystem(c.device("db"), "ext4", "another-uuid")
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is quarantined: ", "docker flocker volume reinstate db")
		if s := a.status("db"); s["state"] != "quarantined" {
			t.Errorf("status %v, want quarantined", s)
		}
		c.settle(time.Minute)
		c.wantNothing()
	})
}

// Storage that names an attachment by volume and node: a detach whose outcome is
// unknown is waited for, or it would hit the next attachment.
func TestLateDetachIsWaitedFor(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		late := true
		c.storage.Inject(func(call backendtest.Call) backendtest.Fault {
			if call.Method != "Detach" || !late {
				return backendtest.Fault{}
			}
			late = false
			return backendtest.Fault{Late: 50 * time.Second}
		})
		a.docker.set("db", "web")
		a.unmount("db", "id1")
		c.settle(40 * time.Second) // the first detach has failed, the second not
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		for range 70 {
			a.mustWrite("db")
			time.Sleep(time.Second)
		}
		if v := c.storage.Violations(); len(v) > 0 {
			t.Error(v)
		}
	})
}

// An attach that came late is there when the process starts again, and a release that
// comes still later is on its way: the attachment is not used, nor is its token.
func TestAttachmentOfAReleasedTokenIsNotUsed(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Attach" {
				f.Late = 40 * time.Second
			}
			return f
		})
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && call.Done {
				runtime.Goexit() // nobody is there any more
			}
			return nil
		})
		go func() { _, _ = a.Mount(context.Background(), "db", "id1") }()
		c.settle(time.Second)
		a.restart() // and it has nothing attached, so that it lets go
		a.etcd.Inject(func(call string) (f ownership.Fault) {
			if call == "txn" {
				f.Late = 150 * time.Second
			}
			return f
		})
		c.settle(10 * time.Second)
		a.kill()
		c.settle(40 * time.Second)
		c.storage.Inject(nil)
		c.storage.SetFault(nil)
		a.start()
		again, stop := context.WithTimeout(t.Context(), 100*time.Second)
		defer stop()
		if _, err := a.Mount(again, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		c.settle(3 * time.Minute)
		a.mustWrite("db")
		_, err := b.Mount(t.Context(), "db", "id3")
		wantError(t, err, "volume db is in use on host a by container web")
	})
}

// Containers that were mounted when the plugin was disabled by force have the device
// open: nothing was released, and they keep attachment and token.
func TestPluginDisabledByForceKeepsTheAttachment(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		token := a.status("db")["token"]
		release := a.kernel.Hold(c.device("db"))
		a.kill()
		a.kernel.DisablePlugin()()
		a.start()
		a.mount("db", "id2")
		if now := a.status("db")["token"]; now != token {
			t.Errorf("token %v, want %v still: a container uses it", now, token)
		}
		a.mustWrite("db")
		a.unmount("db", "id2")
		a.unmount("db", "id1")
		release()
		c.settle(2 * time.Minute)
		c.wantNothing()
	})
}

// A device that is open without a Mount call in the record is not known to be this
// token's: it is not used until that is over.
func TestAttachmentOpenToSomebodyElse(t *testing.T) {
	onFencingStorage(t, oneNode, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.unmount("db", "id1") // and it lingers
		token := a.status("db")["token"].(int64)
		a.kill()
		release := a.kernel.Hold(c.device("db"))
		a.start()
		_, err := a.Mount(t.Context(), "db", "id2")
		wantError(t, err, "close volume db: ")
		release()
		a.mount("db", "id2")
		if now := a.status("db")["token"].(int64); now <= token {
			t.Errorf("token %d, want one above %d", now, token)
		}
	})
}

// A node that asks for a volume finds that it is taking it over itself, by a record of
// an earlier process, whose fence may still be on its way: it is waited for.
func TestOwnTakeoverIsFoundWhileAsking(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		vid := a.status("db")["id"].(string)
		recorded := time.Now().Add(5 * time.Second)
		time.AfterFunc(5*time.Second, func() {
			own, _ := c.owner(vid)
			record := ownership.Owner{Volume: vid, Node: b.id.ID, Host: "b", Boot: b.id.Boot, Pending: &ownership.Pending{
				Node: own.Node, Host: own.Host, Boot: own.Boot, Token: own.Token, Grounds: ownership.GroundsSilent,
			}}
			for _, kv := range c.etcd.Keys("") {
				if strings.HasSuffix(kv.Key, "/own/"+vid) {
					c.put(kv.Key, record)
				}
			}
		})
		var fencedAt time.Time
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Fence" && fencedAt.IsZero() {
				fencedAt = time.Now()
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		if _, err := b.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		if waited := fencedAt.Sub(recorded); waited < nameless.LateCalls {
			t.Errorf("fenced %v after the record was made, want at least %v", waited, nameless.LateCalls)
		}
	})
}

// again makes the next call of a method to the storage have its effect, and once more
// nearly as long afterwards as it may.
func (c *cluster) again(method string, unanswered bool) {
	var done atomic.Bool
	c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
		if call.Method == method && !done.Swap(true) {
			f.Again, f.DropReply = nameless.LateCalls-time.Second, unanswered
		}
		return f
	})
}

// attachBefore attaches a volume under the token of an ownership that is over.
func (n *node) attachBefore(name string) {
	n.c.t.Helper()
	vid := n.status(name)["id"].(string)
	_, err := n.c.storage.Node(n.id.ID).Attach(n.c.t.Context(), backends.AttachRequest{Ref: "m-" + vid, Volume: vid, Token: 1})
	if err != nil {
		n.c.t.Fatal(err)
	}
}

// That a call may come late is known also to a process that starts when the volume is
// not this node's any more, and takes it back.
func TestLateCallOutlivesTheOwnership(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		c.again("Detach", true)
		a.unmount("db", "id1")
		c.settle(6 * time.Second) // the linger is over, and the detach has failed
		a.partition(true)
		b.mount("db", "id2")
		a.partition(false)
		c.settle(5 * time.Second) // a has seen that it is not the owner
		if files, _ := filepath.Glob(filepath.Join(a.stateDir, "volumes", "*.json")); len(files) != 1 {
			t.Errorf("records %v, want one of the late detach", files)
		}
		a.restart()
		b.unmount("db", "id2")
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id3"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		c.settle(90 * time.Second)
		a.mustWrite("db")
		a.docker.set("db")
		a.unmount("db", "id3")
		c.settle(3 * time.Minute)
		c.wantNothing()
	})
}

// The process is killed in the middle of the detach of what an earlier one had attached
// under an older token: the next one waits until that cannot come late any more.
func TestDetachOfALeftoverIsRemembered(t *testing.T) {
	inCluster(t, oneNode, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a := c.nodes["a"]
		a.create("db", nil)
		a.attachBefore("db")
		c.again("Detach", false)
		a.killedAt("Detach", true, func() { _, _ = a.Mount(context.Background(), "db", "id1") })
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		c.settle(90 * time.Second)
		a.mustWrite("db")
	})
}

// The same, where the storage fails instead of the process: the mount goes on asking.
func TestDetachOfALeftoverIsWaitedFor(t *testing.T) {
	inCluster(t, oneNode, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a := c.nodes["a"]
		a.create("db", nil)
		a.attachBefore("db")
		c.again("Detach", true)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id1"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		c.settle(90 * time.Second)
		a.mustWrite("db")
	})
}

// An Attach that fails takes down what it has made, and a call of that may come late: it
// is waited for, also by a process that starts meanwhile.
func TestAttachThatCleansUpIsWaitedFor(t *testing.T) {
	for name, restarted := range map[string]bool{"tried again": false, "restarted": true} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, oneNode, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
				c.use(nameless)
				a := c.nodes["a"]
				a.create("db", nil)
				vid := a.status("db")["id"].(string)
				c.again("Detach", false)
				var attached atomic.Bool
				c.storage.SetFault(func(ctx context.Context, call backendtest.Call) error {
					if call.Method != "Attach" || !call.Done || attached.Swap(true) {
						return nil
					}
					err := c.storage.Node(a.id.ID).Detach(ctx, c.storage.Attached(vid)[0])
					return errors.Join(err, backends.Classify(backends.ErrLate, backends.Classify(backends.ErrUnavailable, errors.New("boom"))))
				})
				time.AfterFunc(time.Second, func() {
					if record, err := os.ReadFile(filepath.Join(a.stateDir, "volumes", vid+".json")); !strings.Contains(string(record), `"late":true`) {
						t.Errorf("the record is %s (%v), want one of the late call", record, err)
					}
				})
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
				defer cancel()
				if restarted {
					soon, giveUp := context.WithTimeout(ctx, 5*time.Second)
					defer giveUp()
					_, err := a.Mount(soon, "db", "id1")
					wantError(t, err, "boom", "an earlier call to memory may still take effect for 55s; retry then")
					a.restart()
				}
				if _, err := a.Mount(ctx, "db", "id2"); err != nil {
					t.Fatal(err)
				}
				a.docker.set("db", "web")
				c.settle(90 * time.Second)
				a.mustWrite("db")
			})
		})
	}
}

// The process is killed in the middle of the second fence, of a host whose attach came
// after the first one: that host gets the volume only when the fence cannot come late
// any more.
func TestSecondFenceIsRemembered(t *testing.T) {
	patient := func(cfg *driver.Config) { cfg.Hold, cfg.BusyWait = hold, 2*time.Minute }
	inCluster(t, twoNodes, patient, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.attachBefore("db")
		c.again("Fence", false)
		b.killedAt("Fence", true, func() { _, _ = b.Mount(context.Background(), "db", "id1") })
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		c.settle(90 * time.Second)
		a.mustWrite("db")
	})
}

// A process that hangs must not look alive.
func TestHealthy(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		c.settle(time.Minute)
		if err := a.Healthy(); err != nil {
			t.Error(err)
		}
		a.kill()
		time.Sleep(10 * time.Second)
		wantError(t, a.Healthy(), "the driver has done nothing for")
		synctest.Wait()
	})
}

func TestFailoverByClockIsRefused(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		wantError(t, a.Create(t.Context(), "db", map[string]string{"on-partition": "failover"}),
			"option on-partition: failover is refused on backend memory", "use keep")
		a.create("db", map[string]string{"on-partition": "keep"})
		c.use(exclusive)
		wantError(t, a.Create(t.Context(), "db2", map[string]string{"on-partition": "failover"}),
			"option on-partition: failover is not needed on backend memory")
	})
}
