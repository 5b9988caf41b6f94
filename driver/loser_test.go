package driver_test

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// A Mount is under way when its host is declared dead: what it was about to make is
// given up too, or it is refused.
func TestMountInFlightOfCondemnedHost(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		b.create("db", map[string]string{"fs": "xfs"})
		b.mount("db", "id0")
		b.unmount("db", "id0")
		c.settle(time.Minute)
		a.create("other", nil)
		a.mount("other", "id0")
		release := a.kernel.Hold(c.device("other")) // Docker hangs for a while
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Attach" && call.Node == a.id.ID {
				f.Latency = 30 * time.Second
			}
			return f
		})
		done := make(chan error, 1)
		go func() { _, err := a.Mount(context.Background(), "db", "id1"); done <- err }()
		c.settle(time.Second)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs", Forced: true}); err != nil {
			t.Fatal(err)
		}
		c.settle(5 * time.Second)
		b.mount("db", "id2")
		release() // a is back
		if err := <-done; err == nil {
			t.Error("the host that gave everything up has mounted the volume")
		}
		t.Logf("a has mounted %v; %v", a.kernel.Mounts(), c.disks.Violations())
		c.settle(time.Minute)
	})
}

// As above, without force: the host had only lost etcd.
func TestMountInFlightOfPartitionedHost(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		b.create("db", map[string]string{"fs": "xfs"})
		b.mount("db", "id0")
		b.unmount("db", "id0")
		c.settle(time.Minute)
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Attach" && call.Node == a.id.ID {
				f.Latency = 60 * time.Second
			}
			return f
		})
		done := make(chan error, 1)
		go func() { _, err := a.Mount(context.Background(), "db", "id1"); done <- err }()
		c.settle(time.Second)
		a.partition(true)
		c.settle(20 * time.Second)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "it hangs"}); err != nil {
			t.Fatal(err)
		}
		b.mount("db", "id2")
		a.partition(false)
		c.settle(10 * time.Second)
		if s, _ := b.Nodes(t.Context()); len(s) > 0 {
			t.Logf("nodes %+v", s)
		}
		if err := <-done; err == nil {
			t.Error("the host that gave everything up has mounted the volume")
		}
		c.settle(time.Minute)
	})
}

// Storage without attachment ids: a detach with an unknown outcome is waited for,
// also if the volume was lost meanwhile.
func TestLateDetachOfALostVolume(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(nameless)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		first := true
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Detach" && call.Node == a.id.ID && first {
				first = false
				f.DropReply, f.Again = true, 55*time.Second
			}
			return f
		})
		a.partition(true)
		a.unmount("db", "id1")
		c.settle(7 * time.Second)
		t.Logf("detach sent: %v", !first)
		b.mount("db", "id2")
		a.partition(false)
		c.settle(5 * time.Second)
		b.unmount("db", "id2")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id3"); err != nil {
			t.Fatal(err)
		}
		a.docker.set("db", "web")
		for range 60 {
			if err := a.write("db"); err != nil {
				t.Fatalf("the owner was cut off by its own late detach: %v", err)
			}
			time.Sleep(time.Second)
		}
	})
}

// The taker's process ends between commit and attach, and the dead owner's attach
// arrives then.
func TestLateAttachAfterTheTakerRestarted(t *testing.T) {
	inCluster(t, []string{"a", "b", "c"}, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(exclusive)
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Attach" && call.Node == a.id.ID {
				f.Late = 40 * time.Second
			}
			return f
		})
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && call.Node == a.id.ID && call.Done {
				runtime.Goexit() // nobody is there any more
			}
			return nil
		})
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second)
			defer cancel()
			_, _ = a.Mount(ctx, "db", "id1")
		}()
		c.settle(time.Second)
		a.partition(true)
		go a.kill()
		c.settle(15 * time.Second)
		b.killedAt("Attach", false, func() { _, _ = b.Mount(context.Background(), "db", "id2") })
		c.settle(60 * time.Second)
		var err error
		o, owned := c.owner(b.status("db")["id"].(string))
		t.Log(o, owned, c.storage.Attached(b.status("db")["id"].(string)), c.storage.Calls())
		for range 30 { // an hour
			for _, name := range []string{"b", "c"} {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
				_, err = c.nodes[name].Mount(ctx, "db", "id3")
				cancel()
				if err == nil {
					return
				}
			}
			c.settle(2 * time.Minute)
		}
		t.Errorf("nobody can mount it, for an hour: %v", err)
	})
}

// An Attach that nobody waits for any more takes effect after its volume was given
// back. The device is found and given up within two minutes, also by the next process.
func TestLateAttachIsGivenUp(t *testing.T) {
	for name, restart := range map[string]bool{"same process": false, "next process": true} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				c.use(fenced)
				a := c.nodes["a"]
				a.create("db", nil)
				c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
					if call.Method == "Attach" {
						f.Late = 40 * time.Second
					}
					return f
				})
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if _, err := a.Mount(ctx, "db", "id1"); err == nil {
					t.Fatal("it was mounted")
				}
				if restart {
					a.restart()
				}
				c.settle(95 * time.Second) // the look at the whole map is not due yet
				if n := c.storage.Calls()["Detach"]; n < 2 {
					t.Errorf("detached %d times; the second time should be after the late attach", n)
				}
				c.wantNothing()
			})
		})
	}
}

// halfway is a storage with an attachment that has no device, as one that failed in
// the middle.
type halfway struct {
	backends.Backend

	att atomic.Pointer[backends.Attachment]
}

func (h *halfway) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	all, err := h.Backend.Attachments(ctx)
	if att := h.att.Load(); att != nil {
		all = append(all, *att)
	}
	return all, err
}

func (h *halfway) Detach(ctx context.Context, att backends.Attachment) error {
	if half := h.att.Load(); half != nil && att == *half {
		h.att.Store(nil)
		return nil
	}
	return h.Backend.Detach(ctx, att)
}

// It is detached, and nobody's containers are killed for it.
func TestForeignAttachmentWithoutADevice(t *testing.T) {
	var storage *halfway
	inCluster(t, oneNode, func(cfg *driver.Config) {
		storage = &halfway{Backend: cfg.Backends["memory"]}
		cfg.Backends["memory"] = storage
	}, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.docker.set("db", "web")
		storage.att.Store(&backends.Attachment{ID: "1", Ref: "ref", Volume: a.status("db")["id"].(string), Node: a.id.ID, Token: 1})
		c.settle(2 * time.Minute)
		if storage.att.Load() != nil {
			t.Error("it is still attached")
		}
		if got := a.docker.killed(); len(got) > 0 {
			t.Errorf("killed %v", got)
		}
	})
}

// The same beside a volume that is in use: what has no device nobody can have open. The
// volume goes on.
func TestLeftoverWithoutADevice(t *testing.T) {
	var storage *halfway
	inCluster(t, oneNode, func(cfg *driver.Config) {
		storage = &halfway{Backend: cfg.Backends["memory"]}
		cfg.Backends["memory"] = storage
	}, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		defer a.kernel.Hold(c.device("db"))()
		storage.att.Store(&backends.Attachment{ID: "1", Ref: "ref", Volume: a.status("db")["id"].(string), Node: a.id.ID, Token: 1})
		c.settle(10 * time.Minute)
		if storage.att.Load() != nil {
			t.Error("it is still attached")
		}
		a.mustWrite("db")
		if s := a.status("db"); s["state"] != "mounted" || len(a.docker.killed()) > 0 {
			t.Errorf("status %v, killed %v", s, a.docker.killed())
		}
	})
}

// A host that was restarted asks again; the owner, whose reads hang, answers what it
// asked before. The volume is not taken from the restarted host as if it were not.
func TestHandOverNamesThePresentBoot(t *testing.T) {
	inCluster(t, []string{"a", "b", "c"}, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b, third := c.nodes["a"], c.nodes["b"], c.nodes["c"]
		b.create("db", map[string]string{"fs": "xfs"})
		b.mount("db", "id1")
		b.docker.set("db", "web")
		old, end := context.WithCancel(t.Context())
		go func() { _, _ = a.Mount(old, "db", "id2") }()
		c.settle(2 * time.Second)
		b.etcd.Inject(func(call string) ownership.Fault {
			return ownership.Fault{Hang: call == "read" || call == "watch"}
		})
		b.etcd.CutWatches()
		a.etcd.Partition(true)
		end()
		a.kill()
		c.settle(12 * time.Second)
		a.kernel.Reboot()
		c.storage.Reboot(a.id.ID)
		a.id.Boot = "boot-2"
		a.start()
		done := make(chan error, 1)
		go func() { _, err := a.Mount(context.Background(), "db", "id3"); done <- err }()
		c.settle(time.Second)
		b.docker.set("db")
		b.unmount("db", "id1")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		b.etcd.Inject(nil)
		a.docker.set("db", "web")
		a.mustWrite("db")
		vol := a.status("db")
		t.Log(vol)
		for _, kv := range c.etcd.Keys("") {
			t.Logf("%s = %s", kv.Key, kv.Value)
		}
		a.partition(true)
		c.settle(30 * time.Second)
		_, err := third.Mount(t.Context(), "db", "id4")
		t.Log(err, c.disks.Violations())
		if o, _ := c.owner(vol["id"].(string)); o.Node != a.id.ID {
			t.Error("taken from a running host on storage that cannot fence, without anybody's word")
		}
	})
}

// A condemned host whose journal was damaged gives up what it has all the same.
func TestCondemnedHostWithoutJournalGivesUp(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", map[string]string{"fs": "xfs"})
		a.mount("db", "id1")
		c.settle(time.Minute)
		a.docker.set("db", "web")
		release := a.kernel.Hold(c.device("db"))
		a.docker.onKill = func(string) { release() }
		a.partition(true)
		a.kill()
		damageJournal(t, a.stateDir)
		a.startPartitioned()
		c.settle(20 * time.Second)
		if _, err := b.ConfirmDead(t.Context(), "a", ownership.Death{By: "op", Evidence: "a mistake"}); err != nil {
			t.Fatal(err)
		}
		a.partition(false)
		c.settle(20 * time.Second)
		if len(a.docker.killed()) == 0 || a.write("db") == nil {
			t.Errorf("killed %v, want web; and a must not write any more", a.docker.killed())
		}
		b.mount("db", "id2")
		b.mustWrite("db")
	})
}

// A volume that was reinstated is put aside again when its last writes are lost.
func TestLastWritesLostAfterReinstate(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		a.kernel.SetNoted(c.device("db"), "ext4 has counted 3 errors")
		c.settle(time.Minute)
		if err := b.Reinstate(t.Context(), "db", "ann@ops"); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Minute)
		c.disks.SetCut(c.device("db"), "a", true)
		a.docker.set("db")
		if err := a.Unmount(t.Context(), "db", "id1"); !errors.Is(err, mount.ErrUnwritten) {
			t.Logf("unmount: %v", err)
		}
		c.settle(time.Minute)
		if _, err := b.Mount(t.Context(), "db", "id2"); err == nil {
			t.Error("given away as if nothing had been lost")
		} else {
			t.Log(err)
		}
	})
}

var _ = backends.ClassNone
