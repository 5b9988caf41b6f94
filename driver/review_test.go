package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

// failing makes calls of one method of the storage fail, on one node.
func (c *cluster) failing(n *node, method string) {
	c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
		return when(call.Node == n.id.ID && call.Method == method, errors.New("the storage does not answer"))
	})
}

// A process that starts while the storage cannot be asked does not know what is
// attached here. It must not take that for nothing: containers may run on it.
func TestStorageThatDoesNotAnswerAtStartFreesNothing(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, a *node){
		"old references":  func(_ *testing.T, a *node) { a.docker.setDown(true) },
		"damaged journal": func(t *testing.T, a *node) { damageJournal(t, a.stateDir) },
		"docker lists no container": func(_ *testing.T, a *node) {
			a.docker.set("db")
		},
	} {
		t.Run(name, func(t *testing.T) {
			inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
				a, b := c.nodes["a"], c.nodes["b"]
				a.create("db", nil)
				a.mount("db", "id1")
				release := a.kernel.Hold(c.device("db"))
				a.kill()
				prepare(t, a)
				c.failing(a, "Attachments")
				a.start()
				c.settle(5 * time.Second)
				_, err := b.Mount(t.Context(), "db", "id2")
				wantError(t, err, "in use on host a")
				c.storage.SetFault(nil)
				c.settle(2 * time.Minute)
				_, err = b.Mount(t.Context(), "db", "id2")
				wantError(t, err, "in use on host a")
				wantError(t, b.Remove(t.Context(), "db"), "in use on host a")
				release()
				c.settle(time.Minute)
				b.mount("db", "id2")
				b.unmount("db", "id2")
				c.settle(time.Minute)
				c.wantNothingButBroken()
			})
		})
	}
}

// A detach that was begun may happen long after the reboot of the host that asked
// for it: it is finished before the volume is used again.
func TestBegunDetachIsFinishedAfterAReboot(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		c.storage = backendtest.NewMemory(memoryExclusive)
		a := c.nodes["a"]
		a.restart()
		a.create("db", nil)
		a.mount("db", "id1")
		c.failing(a, "Detach")
		a.unmount("db", "id1")
		c.settle(6 * time.Second) // the linger is over
		a.kill()
		a.kernel.Reboot()
		c.storage.Reboot(a.id.ID)
		a.id.Boot = "boot-2"
		var detached atomic.Bool
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Done && call.Method == "Detach" {
				detached.Store(true)
			}
			return nil
		})
		c.settle(15 * time.Second) // the key of the last boot ends
		a.start()
		a.mount("db", "id2")
		if !detached.Load() {
			t.Error("the attachment was used while its detach may still happen")
		}
	})
}

var memoryExclusive = backends.Properties{Class: backends.ClassExclusive}

// Mounts that come before the start is over wait for it side by side, each no
// longer than its caller does.
func TestMountsWhileStarting(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		c.settle(2 * time.Second)
		a.kill()
		a.startPartitioned()
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				limit := time.Duration(i+1) * 15 * time.Second
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				start := time.Now()
				_, err := a.Mount(ctx, "db", fmt.Sprint(i))
				wantError(t, err, "volume db: ownership cannot be checked", "not compared with etcd yet")
				if took, want := time.Since(start), min(limit, 20*time.Second); took != want {
					t.Errorf("waited %v, want %v", took, want)
				}
			})
		}
		wg.Wait()
	})
}

// A volume is removed by one node while another one makes its storage: the storage
// goes, and the volume is made anew.
func TestRemovalWhileTheStorageIsMade(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Create" && !call.Done {
				c.storage.SetFault(nil)
				return b.Remove(t.Context(), "db")
			}
			return nil
		})
		a.create("db", nil)
		c.settle(time.Second)
		vols, err := c.storage.Node(a.id.ID).List(t.Context())
		if err != nil || len(vols) != 1 || vols[0].ID != a.status("db")["id"] {
			t.Errorf("the storage has %v (%v), want the volume alone", vols, err)
		}
	})
}

// A request may have arrived although its sender was told that it had not. It is
// taken back: the owner would hand over to a node that does not wait.
func TestRequestWithAnUnknownOutcomeIsWithdrawn(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		writes := 0
		b.etcd.Inject(func(call string) ownership.Fault {
			if call == "txn" {
				writes++ // the claim, the request's three tries, what follows
			}
			return ownership.Fault{DropReply: call == "txn" && 2 <= writes && writes <= 4}
		})
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db: ownership cannot be checked")
		b.etcd.Inject(nil)
		a.unmount("db", "id1")
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A volume that was handed to a node which could not say that it waits no more is
// given back by itself.
func TestVolumeOfNobodyIsGivenBack(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		time.AfterFunc(4*time.Second, func() {
			b.etcd.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "txn"} })
		})
		_, err := b.Mount(ctx, "db", "id2")
		wantError(t, err, "withdraw the request")
		c.settle(3 * time.Minute)
		b.etcd.Inject(nil)
		a.unmount("db", "id1")
		c.settle(6 * time.Minute)
		c.wantNothing()
	})
}

// A request that could not be withdrawn is withdrawn later, before its volume is
// handed to a node that does not wait for it.
func TestOldRequestIsWithdrawn(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		time.AfterFunc(4*time.Second, func() {
			b.etcd.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "txn"} })
		})
		_, err := b.Mount(ctx, "db", "id2")
		wantError(t, err, "withdraw the request")
		b.etcd.Inject(nil)
		c.settle(7 * time.Minute)
		for _, kv := range c.etcd.Keys("") {
			if strings.Contains(kv.Key, "/req/") {
				t.Errorf("the request was left: %s", kv.Key)
			}
		}
	})
}

// What a killed process had attached is detached also if the storage could not be
// asked about it at the start; or cut off, by who wants the volume.
func TestOrphanedAttachmentIsFoundLater(t *testing.T) {
	for _, wanted := range []bool{false, true} {
		inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
			c.storage = backendtest.NewMemory(memoryExclusive)
			a, b := c.nodes["a"], c.nodes["b"]
			a.restart()
			b.restart()
			a.create("db", nil)
			ref := strings.TrimPrefix(c.device("db"), backendtest.DevicePrefix)
			_, err := c.storage.Node(a.id.ID).Attach(t.Context(),
				backends.AttachRequest{Ref: ref, Volume: a.status("db")["id"].(string), Token: 1})
			if err != nil {
				t.Fatal(err)
			}
			c.failing(a, "Attachments")
			a.restart()
			c.settle(time.Second)
			c.storage.SetFault(nil)
			if wanted {
				b.mount("db", "id1")
				return
			}
			c.settle(7 * time.Minute)
			c.wantNothing()
		})
	}
}

// What Remove read before it got the volume's lock is older than what a Mount has
// recorded meanwhile: a volume that was formatted is not formatted again.
func TestRemoveThatFailsDoesNotForgetTheFormat(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		c.storage = backendtest.NewMemory(memoryExclusive)
		a := c.nodes["a"]
		a.restart()
		a.create("db", nil)
		attach := make(chan struct{})
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && !call.Done {
				<-attach
			}
			return when(call.Method == "Detach", errors.New("the storage does not answer"))
		})
		ctx, cancel := context.WithCancel(t.Context())
		a.mounter.SetAfter(func(call, _ string) error {
			if call == mount.CallMount {
				cancel() // the caller goes away
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := a.Mount(ctx, "db", "id1"); err == nil {
				t.Error("mounted for a caller that went away")
			}
		})
		synctest.Wait()
		wg.Go(func() { wantError(t, a.Remove(t.Context(), "db"), "the storage does not answer") })
		synctest.Wait()
		close(attach)
		wg.Wait()
		c.storage.SetFault(nil)
		a.mounter.SetAfter(nil)
		a.mounter.ResetCalls()
		a.mount("db", "id2")
		for _, call := range a.mounter.Calls() {
			if call.Name == mount.CallFormat {
				t.Errorf("%v of a volume that is formatted, by record", call)
			}
		}
	})
}

// The definitions on disk may be older than the last thing that a killed process
// did. What was mounted is mounted again without a thought of formatting it.
func TestOldDefinitionsOnDiskDoNotFormat(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		c.settle(2 * time.Second)
		known := filepath.Join(a.stateDir, "known.json")
		old, err := os.ReadFile(known)
		if err != nil || !strings.Contains(string(old), `"formatted":false`) {
			t.Fatalf("known.json is %s (%v)", old, err)
		}
		a.mount("db", "id1")
		defer a.kernel.Hold(c.device("db"))()
		a.kill()
		if err := os.WriteFile(known, old, 0o600); err != nil {
			t.Fatal(err)
		}
		a.startPartitioned()
		a.unmount("db", "id1") // Docker's mistake: a container still has it
		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("state %v, want mounted: a container still has it", s["state"])
		}
		for _, call := range a.mounter.Calls() {
			if call.Name == mount.CallFormat {
				t.Errorf("%v of a volume that is in use", call)
			}
		}
	})
}

// A mount that failed half-way may be there: the mount table says so.
func TestMountThatFailedIsTakenDown(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mounter.SetAfter(func(call, _ string) error { return when(call == mount.CallMount, errors.New("boom")) })
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "mount volume db: boom")
		a.mounter.SetAfter(nil)
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A removal whose answer was lost is done when it is asked for again.
func TestRemoveAgainAfterALostAnswer(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		c.storage = backendtest.NewMemory(memoryExclusive)
		a := c.nodes["a"]
		a.restart()
		a.create("db", nil)
		a.mount("db", "id1")
		a.unmount("db", "id1")
		a.etcd.Inject(func(call string) ownership.Fault {
			return ownership.Fault{DropReply: call == "txn"}
		})
		wantError(t, a.Remove(t.Context(), "db"), "ownership cannot be checked")
		a.etcd.Inject(nil)
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Error(err)
		}
		c.settle(10 * time.Minute)
		c.wantNothing()
	})
}

// An etcd that was emptied, or put back to an older state, knows nothing of what
// this node has: nothing is gone, and nothing is taken, by its word.
func TestEtcdPutBack(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.create("other", nil)
		a.mount("db", "id1")
		defer a.kernel.Hold(c.device("db"))()
		c.settle(time.Minute)
		a.kill()
		c.etcd = ownership.NewMemory()
		a.startPartitioned()
		a.etcd.Partition(false)
		c.settle(time.Minute)
		for _, name := range []string{"db", "other"} {
			if v, err := a.Get(t.Context(), name); err != nil || v.Name != name {
				t.Errorf("Get %s: %v (%v), want it", name, v, err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := a.Get(ctx, "unheard-of"); errors.Is(err, ownership.ErrNotFound) {
			t.Errorf("Get of an unknown volume: %v, want that it is not known", err)
		}
		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("state %v, want mounted", s["state"])
		}
		wantError(t, a.Create(t.Context(), "new", nil), "ownership cannot be checked")
		_, err := a.Mount(t.Context(), "other", "id2")
		wantError(t, err, "ownership cannot be checked")
	})
}

// slowDocker answers after its time limit, as an Engine under load does.
type slowDocker struct{ driver.Docker }

func (s slowDocker) Using(ctx context.Context, volume string) ([]driver.Container, error) {
	time.Sleep(2 * time.Second)
	return s.Docker.Using(ctx, volume)
}

// Many nodes that ask for a volume do not keep its owner from letting go of it.
func TestManyRequestsDoNotStarveUnmount(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e", "f"}
	slow := func(cfg *driver.Config) { cfg.Docker = slowDocker{cfg.Docker} }
	inCluster(t, names, slow, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		var wg sync.WaitGroup
		for _, name := range names[1:] {
			wg.Go(func() { _, _ = c.nodes[name].Mount(t.Context(), "db", "id2") })
		}
		c.settle(20 * time.Second)
		a.docker.set("db")
		start := time.Now()
		a.unmount("db", "id1")
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("the unmount took %v", took)
		}
		wg.Wait()
	})
}

// A claim that is late may find a volume that is being deleted. It gets nothing by
// it, and leaves nothing.
func TestLateClaimOfARemovedVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		b.status("db")
		c.settle(2 * time.Second)
		b.etcd.Inject(func(call string) ownership.Fault {
			if call == "txn" {
				return ownership.Fault{Late: 10 * time.Second}
			}
			return ownership.Fault{}
		})
		_, err := b.Mount(t.Context(), "db", "id1")
		wantError(t, err, "ownership cannot be checked")
		b.etcd.Inject(nil)
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			return when(call.Method == "Delete", errors.New("the storage does not answer"))
		})
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Fatal(err)
		}
		c.settle(11 * time.Second) // the claim arrives at a tombstone
		_, err = b.Mount(t.Context(), "db", "id1")
		wantError(t, err, "no such volume: db")
		c.storage.SetFault(nil)
		c.settle(10 * time.Minute)
		c.wantNothing()
	})
}

// I/O to a device that has gone can hang for ever. That volume is lost to this
// host; the others are looked after all the same.
func TestHangingUnmountDoesNotStopReconciling(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		hang := make(chan struct{})
		for _, name := range []string{"v1", "v2", "v3"} {
			a.create(name, nil)
		}
		stuck := filepath.Dir(a.mount("v2", "id"))
		a.mounter.SetHook(func(call, arg string) error {
			if call == mount.CallUnmount && arg == stuck {
				<-hang
			}
			return nil
		})
		c.settle(5 * time.Minute) // Docker lists no container: the Unmount was lost
		a.mount("v1", "id")
		a.mount("v3", "id")
		c.settle(5 * time.Minute)
		if m := a.kernel.Mounts(); len(m) != 1 {
			t.Errorf("mounted %v, want only the one that hangs", m)
		}
		close(hang)
		c.settle(5 * time.Minute)
		c.wantNothing()
	})
}
