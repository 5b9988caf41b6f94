package driver_test

import (
	"context"
	"errors"
	"fmt"
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

var (
	oneNode  = []string{"a"}
	twoNodes = []string{"a", "b"}
)

func TestMountGoesDownTheLineAndUnmountUp(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", map[string]string{"size": "2G", "label.team": "blue", "uid": "999"})
		path := a.mount("db", "id1")
		if want := filepath.Join(a.stateDir, "mnt", a.status("db")["id"].(string), "data"); path != want {
			t.Errorf("mountpoint %s, want %s", path, want)
		}
		s := a.status("db")
		for key, want := range map[string]any{
			"state": "mounted", "owner": "a", "size": "2GiB", "filesystem": "ext4", "backend": "memory", "mounts": 1,
		} {
			if s[key] != want {
				t.Errorf("status %s = %v, want %v", key, s[key], want)
			}
		}
		if got := c.disks.DataOwner(c.device("db")).UID; got != 999 {
			t.Errorf("the directory belongs to %d, want 999", got)
		}
		if again := a.mount("db", "id2"); again != path {
			t.Errorf("second mount %s, want %s", again, path)
		}
		a.unmount("db", "id1")
		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("state %v after one of two unmounts, want mounted", s["state"])
		}
		a.unmount("db", "id2")
		c.settle(time.Second)
		c.wantNothing()
		if n := c.disks.Formats(c.device("db")); n != 1 {
			t.Errorf("formatted %d times, want once", n)
		}
		a.mount("db", "id3")
		if n := c.disks.Formats(c.device("db")); n != 1 {
			t.Errorf("formatted %d times after a second life, want once", n)
		}
	})
}

// A volume that is mounted needs nothing of etcd and the storage for one more
// container.
func TestRepeatedMountIsLocal(t *testing.T) {
	inCluster(t, oneNode, nil, func(_ *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.etcd.Inject(func(string) ownership.Fault { return ownership.Fault{Refused: true} })
		c.storage.SetFault(func(context.Context, backendtest.Call) error { return errors.New("no storage") })
		a.mount("db", "id2")
		a.unmount("db", "id2")
	})
}

func TestLinger(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Reconcile = time.Second }, func(t *testing.T, c *cluster) {
		c.storage = backendtest.NewMemory(backends.Properties{})
		for _, n := range c.nodes {
			n.restart()
		}
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.unmount("db", "id1")
		c.settle(4 * time.Second)
		if m := a.kernel.Mounts(); len(m) > 0 {
			t.Errorf("mounted while lingering: %v", m)
		}
		if s := a.status("db"); s["state"] != "attached" {
			t.Errorf("state %v 4 s after the unmount, want attached", s["state"])
		}
		c.settle(2 * time.Second)
		c.wantNothing()

		a.mount("db", "id2")
		a.unmount("db", "id2")
		start := time.Now()
		b.mount("db", "id3")
		if took := time.Since(start); took > time.Second {
			t.Errorf("a lingering volume took %v to move, want at once", took)
		}
	})
}

// Docker sends no Unmount for a Mount that failed, so whatever a failed Mount did
// must be undone by us, for a failure at every step.
func TestFailedMountLeavesNothing(t *testing.T) {
	boom := errors.New("boom")
	steps := map[string]func(a *node){
		"attach": func(a *node) {
			a.c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
				return when(call.Method == "Attach" && !call.Done, boom)
			})
		},
		"attach, reply lost": func(a *node) {
			a.c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
				return when(call.Method == "Attach" && call.Done, boom)
			})
		},
		"format": func(a *node) {
			a.mounter.SetHook(func(call, _ string) error { return when(call == mount.CallFormat, boom) })
		},
		"format, then killed": func(a *node) {
			a.mounter.SetAfter(func(call, _ string) error { return when(call == mount.CallFormat, boom) })
		},
		"mount": func(a *node) {
			a.mounter.SetHook(func(call, _ string) error { return when(call == mount.CallMount, boom) })
		},
	}
	for name, inject := range steps {
		t.Run(name, func(t *testing.T) {
			inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
				a := c.nodes["a"]
				a.create("db", nil)
				inject(a)
				_, err := a.Mount(t.Context(), "db", "id1")
				wantError(t, err, "boom", "volume db")
				c.storage.SetFault(nil)
				a.mounter.SetHook(nil)
				a.mounter.SetAfter(nil)
				c.settle(0)
				c.wantNothing()
				a.mount("db", "id1")
			})
		})
	}
}

func when(condition bool, err error) error {
	if condition {
		return err
	}
	return nil
}

// A caller that goes away while Mount is at work never sends an Unmount.
func TestMountOfACallerThatWentAwayIsUndone(t *testing.T) {
	for _, step := range []string{mount.CallFormat, mount.CallMount} {
		t.Run(step, func(t *testing.T) {
			inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
				a := c.nodes["a"]
				a.create("db", nil)
				ctx, cancel := context.WithCancel(t.Context())
				a.mounter.SetAfter(func(call, _ string) error {
					if call == step {
						cancel()
					}
					return nil
				})
				if _, err := a.Mount(ctx, "db", "id1"); err == nil {
					t.Fatal("Mount succeeded for a caller that has gone")
				}
				a.mounter.SetAfter(nil)
				c.settle(0)
				c.wantNothing()
			})
		})
	}
}

// An undo that fails keeps what is below it, and is tried again.
func TestUndoThatFailsIsFinishedLater(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mounter.SetHook(func(call, _ string) error { return when(call == mount.CallFormat, errors.New("boom")) })
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			return when(call.Method == "Detach", errors.New("detach is stuck"))
		})
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "boom", "undo: detach", "detach is stuck")
		if s := a.status("db"); s["state"] != "attached" || s["owner"] != "a" {
			t.Errorf("status %v, want attached and owned: mounted => attached => owned", s)
		}
		c.storage.SetFault(nil)
		a.mounter.SetHook(nil)
		c.settle(time.Minute)
		c.wantNothing()
	})
}

// docker cp on a running container sends Mount and Unmount with that container's
// own ID (moby#37314).
func TestCopyFromARunningContainer(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.mount("db", "id1")
		a.unmount("db", "id1")
		if s := a.status("db"); s["state"] != "mounted" {
			t.Fatalf("state %v after docker cp, want mounted", s["state"])
		}
		a.unmount("db", "id1")
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A killed dockerd sends no Unmount, and then Mounts with the old ID again.
func TestOldMountIDAfterACrash(t *testing.T) {
	inCluster(t, oneNode, nil, func(_ *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.restart()
		a.mount("db", "id1")
		a.unmount("db", "id1")
		c.settle(time.Second)
		c.wantNothing()
	})
}

func TestActivateBeginsANewEpoch(t *testing.T) {
	inCluster(t, oneNode, nil, func(_ *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.Activated()
		a.mount("db", "id1")
		a.unmount("db", "id1")
		c.settle(time.Second)
		c.wantNothing()
	})
}

// Unmounts get lost; when Docker lists no container and the device can be opened
// exclusively, the reference was a leak.
func TestLostUnmountIsNoticed(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		release := a.kernel.Hold(c.device("db"))
		c.settle(5 * time.Minute)
		if s := a.status("db"); s["state"] != "mounted" {
			t.Fatalf("state %v while a container runs, want mounted", s["state"])
		}
		// Docker forgot the container, yet it still runs: the kernel knows.
		a.docker.set("db")
		c.settle(5 * time.Minute)
		if s := a.status("db"); s["state"] != "mounted" {
			t.Fatalf("state %v while the kernel says busy, want mounted", s["state"])
		}
		release()
		c.settle(5 * time.Minute)
		c.wantNothing()
	})
}

// With Docker unreachable the references of this epoch count, however old.
func TestReferencesCountWhileDockerIsAway(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		c.settle(10 * time.Second)
		a.docker.setDown(true)
		c.settle(10 * time.Minute)
		if s := a.status("db"); s["state"] != "mounted" {
			t.Fatalf("state %v, want mounted", s["state"])
		}
		// What Docker said last is better than nothing.
		_, err := c.nodes["b"].Mount(t.Context(), "db", "id2")
		wantError(t, err, "in use on host a by container web")
	})
}

// umount returns 0 while a container's namespace goes on writing; only the
// exclusive open tells.
func TestUnmountedButStillOpenStays(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		release := a.kernel.Hold(c.device("db"))
		a.unmount("db", "id1")
		if s := a.status("db"); s["state"] != "mounted" || s["owner"] != "a" {
			t.Fatalf("status %v, want mounted on a: a container still has it", s)
		}
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a", "waited 30s")
		release()
		b.mount("db", "id2")
	})
}

// docker plugin disable -f takes the plugin's mounts away and leaves those of
// containers (moby#34603).
func TestPluginDisabledByForce(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		releaseContainer := a.kernel.Hold(c.device("db"))
		a.kill()
		a.kernel.DisablePlugin()()
		a.start()
		c.settle(time.Minute)
		if s := a.status("db"); s["owner"] != "a" || s["state"] != "attached" {
			t.Fatalf("status %v, want attached on a", s)
		}
		_, err := b.Mount(t.Context(), "db", "idb")
		wantError(t, err, "in use on host a")
		// docker cp on the running container works again.
		a.mount("db", "id1")
		a.unmount("db", "id1")
		releaseContainer()
		a.unmount("db", "id1")
		c.settle(2 * time.Minute)
		c.wantNothing()
		b.mount("db", "idb")
	})
}

func TestMoveOfAFreeAndAnIdleVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		for i := range 20 {
			from, to := a, b
			if i%2 == 1 {
				from, to = b, a
			}
			from.mount("db", "id")
			from.unmount("db", "id") // and at once, while it is being let go:
			to.mount("db", "id")
			to.unmount("db", "id")
		}
		c.settle(time.Second)
		c.wantNothing()
		if n := c.disks.Formats(c.device("db")); n != 1 {
			t.Errorf("formatted %d times, want once", n)
		}
	})
}

func TestMoveOfABusyVolume(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web", "backup")

		start := time.Now()
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a by containers backup, web", "waited 30s", "retry")
		if took := time.Since(start); took < 30*time.Second || took > 33*time.Second {
			t.Errorf("waited %v, want 30 s", took)
		}
		c.settle(0)
		for _, kv := range c.etcd.Keys("") {
			if strings.Contains(kv.Key, "/req/") {
				t.Errorf("the request was left: %s", kv.Key)
			}
		}

		// Let go within the wait: the waiting Mount gets it.
		var wg sync.WaitGroup
		wg.Go(func() { b.mount("db", "id2") })
		c.settle(10 * time.Second)
		if s := a.status("db"); fmt.Sprint(s["waiting"]) != "[b]" {
			t.Errorf("waiting %v, want [b]", s["waiting"])
		}
		a.docker.set("db")
		a.unmount("db", "id1")
		start = time.Now()
		wg.Wait()
		if took := time.Since(start); took > time.Second {
			t.Errorf("it took %v after the unmount, want at once", took)
		}
		if s := b.status("db"); s["owner"] != "b" || s["state"] != "mounted" {
			t.Errorf("status %v, want mounted on b", s)
		}
	})
}

func TestBusyWaitOfZeroRefusesAtOnce(t *testing.T) {
	inCluster(t, twoNodes, func(c *driver.Config) { c.BusyWait = 0 }, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		start := time.Now()
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a", "stop what uses it there")
		if took := time.Since(start); took > time.Second {
			t.Errorf("refused after %v, want at once", took)
		}
	})
}

// The caller of a waiting Mount goes away: its request goes too, and the volume
// is not left with a node that has no use for it.
func TestCallerGoesAwayWhileWaiting(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := b.Mount(ctx, "db", "id2")
		wantError(t, err, "volume db")
		a.unmount("db", "id1")
		c.settle(time.Second)
		c.wantNothing()
	})
}

func TestOwnerIsDead(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		c.settle(30 * time.Second)
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is owned by host a, which has not been heard from", "docker flocker node confirm-dead a")
		if s := b.status("db"); s["state"] != "owner not responding" {
			t.Errorf("state %v, want owner not responding", s["state"])
		}
		wantError(t, b.Remove(t.Context(), "db"), "has not been heard from")
		// It comes back, with nothing that uses the volume.
		a.kernel.Reboot()
		c.storage.Reboot(a.id.ID)
		a.id.Boot = "boot-2"
		a.start()
		c.settle(5 * time.Second)
		b.mount("db", "id2")
	})
}

// Who means one volume does not remove another that has its name by now.
func TestRemoveVolume(t *testing.T) {
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
		gone := first.Definition.ID
		if err := a.RemoveVolume(t.Context(), "db", gone); !errors.Is(err, ownership.ErrNotFound) {
			t.Errorf("one that is gone: %v, want ErrNotFound", err)
		}
		a.create("db", nil)
		second, err := c.nodes["b"].Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range c.nodes {
			err := n.RemoveVolume(t.Context(), "db", gone)
			if !errors.Is(err, ownership.ErrNotFound) {
				t.Errorf("another one: %v, want ErrNotFound", err)
			}
			wantError(t, err, "no such volume: the one named db has the id "+second.Definition.ID+", not "+gone)
			if _, err := n.Get(t.Context(), "db"); err != nil {
				t.Errorf("Get: %v", err)
			}
		}
		if err := a.RemoveVolume(t.Context(), "db", second.Definition.ID); err != nil {
			t.Errorf("that one: %v", err)
		}
	})
}

func TestRemove(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		c.settle(5 * time.Second)
		wantError(t, a.Remove(t.Context(), "db"), "volume db is in use on host a by container web")
		start := time.Now()
		wantError(t, b.Remove(t.Context(), "db"), "volume db is in use on host a by container web")
		if took := time.Since(start); took > time.Second {
			t.Errorf("refused after %v, want at once", took)
		}
		a.docker.set("db")
		a.unmount("db", "id1")
		if err := b.Remove(t.Context(), "db"); err != nil {
			t.Fatal(err)
		}
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Errorf("second removal: %v, want none", err)
		}
		if _, err := a.Get(t.Context(), "db"); !errors.Is(err, ownership.ErrNotFound) {
			t.Errorf("Get after removal: %v, want ErrNotFound", err)
		}
		vols, err := c.storage.Node(a.id.ID).List(t.Context())
		if err != nil || len(vols) != 0 {
			t.Errorf("storage has %v (%v), want nothing", vols, err)
		}
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A volume that was removed and made again elsewhere is another volume, whatever
// this node's cache says.
func TestNameUsedAgainOnAnotherNode(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		old := b.status("db")["id"]
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Fatal(err)
		}
		_, err := b.Mount(t.Context(), "db", "id1")
		wantError(t, err, "no such volume: db", "docker volume create -d flocker db")
		a.create("db", nil)
		path := b.mount("db", "id1")
		if strings.Contains(path, old.(string)) {
			t.Errorf("mounted the removed volume's id at %s", path)
		}
	})
}

// Backends say what they tried, each in its way, and so does the driver: the user reads it
// once.
func TestFailuresSayOnceWhatFailed(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		for _, said := range []string{"", "WHAT volume: ", "WHAT volume NAME: ", "WHAT volume ID: "} {
			fail := func(method, name string) {
				c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
					text := strings.NewReplacer("WHAT", strings.ToLower(method), "NAME", name, "ID", call.Volume).Replace(said)
					return when(call.Method == method, fmt.Errorf("%sno room: %w", text, backends.ErrInvalid))
				})
			}
			fail("Create", "new")
			if err := a.Create(t.Context(), "new", nil); !errors.Is(err, backends.ErrInvalid) || err.Error() != "create volume new: no room: invalid" {
				t.Errorf("create says %v", err)
			}
			fail("Attach", "db")
			if _, err := a.Mount(t.Context(), "db", "id1"); !errors.Is(err, backends.ErrInvalid) || err.Error() != "attach volume db: no room: invalid" {
				t.Errorf("mount says %v", err)
			}
		}
	})
}

// A mount outlasts a short failure of the storage, and says what is wrong in the end
// of a long one.
func TestMountWaitsForTheStorage(t *testing.T) {
	for _, c := range []struct {
		name string
		down time.Duration
		want string
	}{
		{"short", 20 * time.Second, ""},
		{"long", time.Hour, "attach volume db: attach: the storage system is down: unavailable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inCluster(t, oneNode, nil, func(t *testing.T, cl *cluster) {
				a := cl.nodes["a"]
				a.create("db", nil)
				up := time.Now().Add(c.down)
				calls := 0
				cl.storage.Inject(func(call backendtest.Call) backendtest.Fault {
					if call.Method == "Attach" {
						calls++
					}
					return backendtest.Fault{Refused: call.Method == "Attach" && time.Now().Before(up)}
				})
				began := time.Now()
				_, err := a.Mount(t.Context(), "db", "id1")
				took := time.Since(began)
				if c.want == "" && (err != nil || took > c.down+5*time.Second) {
					t.Errorf("mounted after %v: %v", took, err)
				} else if c.want != "" {
					wantError(t, err, c.want)
				}
				if took > 40*time.Second || calls < 5 || calls > 30 {
					t.Errorf("it asked %d times in %v", calls, took)
				}
			})
		})
	}
}

// A removal whose storage cannot be reached frees the name at once and is
// finished later.
func TestRemovalIsFinishedLater(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			return when(call.Method == "Delete", backends.ErrUnavailable)
		})
		if err := a.Remove(t.Context(), "db"); err != nil {
			t.Fatal(err)
		}
		a.create("db", nil)
		c.storage.SetFault(nil)
		c.settle(10 * time.Minute)
		vols, err := c.storage.Node(a.id.ID).List(t.Context())
		if err != nil || len(vols) != 1 {
			t.Errorf("storage has %v (%v), want the new volume alone", vols, err)
		}
		for _, kv := range c.etcd.Keys("") {
			if strings.Contains(kv.Key, "/vol/") && strings.Contains(string(kv.Value), `"deleting"`) {
				t.Errorf("tombstone left: %s", kv.Key)
			}
		}
	})
}

func TestCreateIsOnceInTheCluster(t *testing.T) {
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("n%02d", i))
	}
	inCluster(t, names, nil, func(t *testing.T, c *cluster) {
		var wg sync.WaitGroup
		for _, n := range c.nodes {
			wg.Go(func() { n.create("db", map[string]string{"size": "1G"}) })
		}
		wg.Wait()
		vols, err := c.storage.Node(c.nodes["n00"].id.ID).List(t.Context())
		if err != nil || len(vols) != 1 {
			t.Fatalf("storage has %v (%v), want one volume", vols, err)
		}
		for _, n := range c.nodes {
			wg.Go(func() {
				if err := n.Remove(t.Context(), "db"); err != nil {
					t.Errorf("remove on %s: %v", n.name, err)
				}
			})
		}
		wg.Wait()
		if vols, _ = c.storage.Node(c.nodes["n00"].id.ID).List(t.Context()); len(vols) != 0 {
			t.Errorf("storage has %v, want nothing", vols)
		}
		c.settle(time.Second)
		c.wantNothing()
	})
}

// Exactly one of many nodes gets a free volume; the others are told who.
func TestOneWinnerOfManyMounts(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	inCluster(t, names, func(c *driver.Config) { c.BusyWait = 2 * time.Second }, func(t *testing.T, c *cluster) {
		c.nodes["a"].create("db", nil)
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for _, n := range c.nodes {
			wg.Go(func() {
				_, err := n.Mount(t.Context(), "db", "id-"+n.name)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won++
				} else {
					wantError(t, err, "volume db is in use on host")
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Errorf("%d nodes have it mounted, want 1", won)
		}
	})
}

func TestCreateRefusals(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", map[string]string{"size": "1G", "mode": "0750", "label.team": "blue"})
		for _, tc := range []struct {
			name    string
			options map[string]string
			want    []string
		}{
			{"a/b", nil, []string{`volume name "a/b" is not valid`, "letters, digits"}},
			{"..", nil, []string{`volume name ".." is not valid`}},
			{"", nil, []string{`volume name "" is not valid`}},
			{"-x", nil, []string{`"-x" is not valid`}},
			{strings.Repeat("x", 129), nil, []string{"is not valid", "1 to 128"}},
			{"v", map[string]string{"sise": "1G"}, []string{"unknown option sise", "did you mean size?", "valid options: backend, fs,"}},
			{"v", map[string]string{"size": "big"}, []string{"option size", `"big"`}},
			{"v", map[string]string{"size": "1k"}, []string{"too small", "least"}},
			{"v", map[string]string{"fs": "ntfs"}, []string{"option fs", "ext4, xfs"}},
			{"v", map[string]string{"fs": "xfs", "size": "20M"}, []string{"too small for xfs", "300MiB"}},
			{"v", map[string]string{"fs": "btrfs", "size": "48M"}, []string{"too small for btrfs", "109MiB"}},
			{"v", map[string]string{"mkfs": "-U random"}, []string{"option mkfs"}},
			{"v", map[string]string{"mount": "bind"}, []string{"option mount"}},
			{"v", map[string]string{"uid": "-1"}, []string{"option uid"}},
			{"v", map[string]string{"mode": "worldwide"}, []string{"option mode", "octal"}},
			{"v", map[string]string{"backend": "tape"}, []string{`there is no backend "tape" on host a; backends here: memory`}},
			{"v", map[string]string{"help": ""}, []string{"OPTION", "size", "1GiB", "label.KEY", "no volume was made"}},
			{"db", map[string]string{"size": "2G"}, []string{"volume db exists with other options: size is 1GiB, not 2GiB"}},
			{"db", map[string]string{"fs": "xfs", "label.team": "red"}, []string{"fs is ext4, not xfs", "label.team is blue, not red"}},
		} {
			t.Logf("create %q %v", tc.name, tc.options)
			wantError(t, a.Create(t.Context(), tc.name, tc.options), tc.want...)
		}
		// Equal or unmentioned options are the same volume, on any node.
		for _, options := range []map[string]string{nil, {"size": "1024M"}, {"mode": "750"}, {"label.team": "blue"}} {
			if err := b.Create(t.Context(), "db", options); err != nil {
				t.Errorf("create again with %v: %v", options, err)
			}
		}
		if vols, _ := a.List(t.Context()); len(vols) != 1 {
			t.Errorf("%d volumes after refusals, want 1", len(vols))
		}
	})
}

func TestCreateIsUndoneIfTheStorageFails(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		for _, done := range []bool{false, true} {
			c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
				return when(call.Method == "Create" && call.Done == done, errors.New("the disk is full"))
			})
			wantError(t, a.Create(t.Context(), "db", nil), "create volume db", "the disk is full")
			c.storage.SetFault(nil)
			vols, err := c.storage.Node(a.id.ID).List(t.Context())
			if err != nil || len(vols) != 0 {
				t.Errorf("storage has %v (%v), want nothing", vols, err)
			}
			if _, err := a.Get(t.Context(), "db"); !errors.Is(err, ownership.ErrNotFound) {
				t.Errorf("Get: %v, want ErrNotFound", err)
			}
		}
	})
}

// seen is what is in the node's seen.json.
func (n *node) seen() ownership.Seen {
	n.c.t.Helper()
	s, err := driver.LoadSeen(n.stateDir)
	if err != nil {
		n.c.t.Fatal(err)
	}
	return s
}

// An idle cluster is no reason to write, but now and then.
func TestSeenOfIdleCluster(t *testing.T) {
	inCluster(t, []string{"a"}, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		c.settle(time.Minute)
		before := a.seen()
		c.settle(7 * time.Minute)
		if got := a.seen(); got != before || got.Cluster == "" || got.At == 0 {
			t.Errorf("seen.json has %+v after %+v, though nothing happened", got, before)
		}
		c.settle(5 * time.Minute)
		if got := a.seen(); got.At <= before.At {
			t.Errorf("seen.json has %+v after %+v, of long ago", got, before)
		}
	})
}

// That a host refuses etcd is on its disk at once: killed then, it must not believe
// that etcd when its revision has caught up.
func TestRefusalIsKept(t *testing.T) {
	never := func(cfg *driver.Config) { cfg.Reconcile = 24 * time.Hour }
	inCluster(t, []string{"a"}, never, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		before := a.seen()
		meta := c.etcd.Keys("/flocker/v1/meta")[0]
		older := fmt.Appendf(nil, `{"cluster":%q,"gen":0,"schema":1}`, before.Cluster)
		if _, err := c.etcd.Txn(t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: meta.Key, Value: older}}}); err != nil {
			t.Fatal(err)
		}
		c.settle(2 * time.Minute) // it looks once a minute
		if got := a.seen(); !got.Older || got.Gen != before.Gen || got.Cluster != before.Cluster {
			t.Errorf("seen.json has %+v after %+v, want it older", got, before)
		}
	})
}

func TestEtcdAway(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.create("free", nil)
		b.create("there", nil)
		a.mount("db", "id1")
		a.mount("db", "id2")
		a.docker.set("db", "web")
		c.settle(10 * time.Minute) // the periodic refresh tells a of b's volume
		a.etcd.Partition(true)
		c.settle(time.Minute)

		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("state of what is mounted: %v, want mounted", s["state"])
		}
		if s := a.status("there"); s["state"] != "unknown" || s["stale"] != true {
			t.Errorf("status of a known volume: %v, want unknown and stale", s)
		}
		vols, err := a.List(t.Context())
		if err != nil || len(vols) != 3 {
			t.Errorf("List: %d volumes (%v), want 3", len(vols), err)
		}
		// An error would mean "gone" to Docker, so the question is held.
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		defer cancel()
		start := time.Now()
		_, err = a.Get(ctx, "never-heard-of")
		if errors.Is(err, ownership.ErrNotFound) || time.Since(start) < 40*time.Second {
			t.Errorf("Get of an unknown name answered %v after %v, want it held", err, time.Since(start))
		}
		a.mount("db", "id3")
		a.unmount("db", "id3")
		_, err = a.Mount(t.Context(), "free", "id4")
		wantError(t, err, "volume free", "ownership cannot be checked")
		wantError(t, a.Create(t.Context(), "new", nil), "ownership cannot be checked")
		wantError(t, a.Remove(t.Context(), "free"), "ownership cannot be checked", "not removed")
		a.unmount("db", "id1")
		a.unmount("db", "id2")
		c.settle(time.Second)
		if m := a.kernel.Mounts(); len(m) != 0 {
			t.Errorf("mounted after the last unmount: %v", m)
		}
		a.etcd.Partition(false)
		c.settle(2 * time.Minute)
		c.wantNothing()
		b.mount("db", "id5")
	})
}

// A process that starts while etcd is away serves what is mounted, answers for
// what it knew, and takes nothing new.
func TestStartWhileEtcdIsAway(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.create("free", nil)
		a.mount("db", "id1")
		c.settle(2 * time.Second)
		a.kill()
		a.startPartitioned()
		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("state %v, want mounted", s["state"])
		}
		if s := a.status("free"); s["stale"] != true {
			t.Errorf("status %v, want stale", s)
		}
		a.mount("db", "id2")
		_, err := a.Mount(t.Context(), "free", "id3")
		wantError(t, err, "ownership cannot be checked")
		a.unmount("db", "id2")
		a.etcd.Partition(false)
		c.settle(time.Minute)
		a.mount("free", "id3")
		a.unmount("free", "id3")
		a.unmount("db", "id1")
		c.settle(time.Minute)
		c.wantNothing()
	})
}

// The process is killed before and after every call of a whole life of a volume;
// the next process brings the volume to rest, and another node can have it.
func TestKilledAtEveryStep(t *testing.T) {
	steps := []string{
		"Create", "Attach", mount.CallFormat, mount.CallMount, mount.CallUnmount, mount.CallClose, "Detach", "txn",
	}
	for _, step := range steps {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s after=%v", step, after), func(t *testing.T) {
				inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
					a, b := c.nodes["a"], c.nodes["b"]
					if step != "Create" {
						a.create("db", nil)
					}
					a.killedAt(step, after, func() {
						_ = a.Create(t.Context(), "db", nil)
						_, _ = a.Mount(t.Context(), "db", "id1")
						_ = a.Unmount(t.Context(), "db", "id1")
						time.Sleep(time.Second)
					})
					c.settle(5 * time.Minute)
					c.wantNothing()
					a.create("db", nil)
					b.mount("db", "id2")
					if n := c.disks.Formats(c.device("db")); n != 1 {
						t.Errorf("formatted %d times, want once", n)
					}
				})
			})
		}
	}
}

// A claim whose reply is lost is found again, by operation id; so is one that was lost each
// time it was sent, by the next Mount.
func TestLostRepliesOfEtcd(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		var calls atomic.Int64
		lossy := func(call string) ownership.Fault {
			n := calls.Add(1)
			return ownership.Fault{DropReply: call == "txn" && n%3 == 0, Twice: n%5 == 0}
		}
		a.etcd.Inject(lossy)
		b.etcd.Inject(lossy)
		a.create("db", nil)
		mount := func(n *node, id string) {
			for range 5 {
				_, err := n.Mount(t.Context(), "db", id)
				if err == nil {
					return
				}
				wantError(t, err, "ownership cannot be checked: fault injected; what is mounted keeps working, retry when etcd answers")
			}
			t.Fatalf("never mounted on %s", n.name)
		}
		for range 10 {
			mount(a, "id1")
			a.unmount("db", "id1")
			mount(b, "id2")
			b.unmount("db", "id2")
		}
		a.etcd.Inject(nil)
		b.etcd.Inject(nil)
		c.settle(5 * time.Minute)
		c.wantNothing()
	})
}

// A device of an older token is dropped, not adopted.
func TestStaleAttachmentIsDropped(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		ref := strings.TrimPrefix(c.device("db"), backendtest.DevicePrefix)
		_, err := c.storage.Node(a.id.ID).Attach(t.Context(),
			backends.AttachRequest{Ref: ref, Volume: a.status("db")["id"].(string), Token: 1})
		if err != nil {
			t.Fatal(err)
		}
		a.mount("db", "id1")
		atts, err := c.storage.Node(a.id.ID).Attachments(t.Context())
		if err != nil || len(atts) != 1 || atts[0].Token == 1 {
			t.Errorf("attachments %v (%v), want one under the new token", atts, err)
		}
	})
}

// The journal on disk may be damaged; the kernel and etcd still know.
func TestDamagedJournal(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		release := a.kernel.Hold(c.device("db"))
		a.kill()
		damageJournal(t, a.stateDir)
		a.start()
		c.settle(time.Minute)
		if s := a.status("db"); s["owner"] != "a" || s["state"] != "mounted" {
			t.Fatalf("status %v, want mounted on a", s)
		}
		release()
		c.settle(5 * time.Minute)
		c.wantNothingButBroken()
	})
}

// Two processes with one identity would take each other's volumes for their own.
func TestOneProcessForAStateDirectory(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		_, err := driver.New(driver.Config{
			Backends: map[string]backends.Backend{"memory": c.storage.Node(a.id.ID)}, Backend: "memory",
			StateDir: a.stateDir, MountRoot: t.TempDir(),
		})
		wantError(t, err, "another Flocker process on this host uses the state directory", "FLOCKER_STATE_DIR")
	})
}

func TestUnmountOfTheUnknown(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.unmount("nothing", "id1")
		a.create("db", nil)
		a.unmount("db", "id1")
		a.mount("db", "id1")
		a.unmount("db", "other")
		if s := a.status("db"); s["state"] != "mounted" {
			t.Errorf("an unknown ID took the volume down: %v", s)
		}
	})
}

// After a crash of the plugin, what Docker does not tell is left alone, until
// somebody wants the volume: the exclusive open then decides.
func TestOldReferencesAreTriedOnDemandOnly(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		release := a.kernel.Hold(c.device("db"))
		a.docker.setDown(true)
		a.restart()
		a.mounter.ResetCalls()
		c.settle(10 * time.Minute)
		for _, call := range a.mounter.Calls() {
			if call.Name == mount.CallUnmount {
				t.Errorf("took a volume down on a mere suspicion: %v", call)
			}
		}
		wantError(t, a.Remove(t.Context(), "db"), "volume db is in use on host a")
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a")
		release()
		b.mount("db", "id2")
	})
}

// Get, List and Path of all volumes answer while one Mount hangs in the storage.
func TestNoGlobalLock(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("slow", nil)
		a.create("fast", nil)
		hang := make(chan struct{})
		slow := a.status("slow")["id"]
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			if call.Method == "Attach" && call.Volume == slow && !call.Done {
				<-hang
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { a.mount("slow", "id1") })
		synctest.Wait()
		start := time.Now()
		a.status("slow")
		if _, err := a.List(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := a.Path(t.Context(), "slow"); err != nil {
			t.Error(err)
		}
		a.mount("fast", "id2")
		if took := time.Since(start); took > 0 {
			t.Errorf("waited %v behind another volume's Mount", took)
		}
		close(hang)
		wg.Wait()
	})
}

// A release whose outcome is unknown may arrive late. The volume must not be used
// under its token again, or the late release frees it under a container.
func TestLateReleaseDoesNotFreeAVolumeInUse(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		a.etcd.Inject(func(call string) ownership.Fault {
			if call == "txn" {
				return ownership.Fault{Late: 20 * time.Second}
			}
			return ownership.Fault{}
		})
		a.unmount("db", "id1")
		c.settle(3 * time.Second)
		a.etcd.Inject(nil)
		a.mount("db", "id2")
		c.settle(time.Minute)
		_, err := b.Mount(t.Context(), "db", "id3")
		wantError(t, err, "volume db is in use on host a by container web")
	})
}

// A claim may arrive after its caller was told that etcd is away: nobody here
// wants the volume then, and it must not stay with this node for ever.
func TestLateClaimIsGivenBack(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.etcd.Inject(func(call string) ownership.Fault {
			if call == "txn" {
				return ownership.Fault{Late: 10 * time.Second}
			}
			return ownership.Fault{}
		})
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "ownership cannot be checked")
		a.etcd.Inject(nil)
		c.settle(2 * time.Minute)
		c.wantNothing()
		b.mount("db", "id2")
	})
}

// An attachment that neither a record nor the cluster knows of is dropped at start,
// unless somebody has it open.
func TestOrphanedAttachment(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		ref := strings.TrimPrefix(c.device("db"), backendtest.DevicePrefix)
		_, err := c.storage.Node(a.id.ID).Attach(t.Context(),
			backends.AttachRequest{Ref: ref, Volume: a.status("db")["id"].(string), Token: 1})
		if err != nil {
			t.Fatal(err)
		}
		release := a.kernel.Hold(c.device("db"))
		a.restart()
		c.settle(time.Second)
		if got := c.storage.Attached(a.status("db")["id"].(string)); len(got) != 1 {
			t.Errorf("attachments %v, want the one that is open kept", got)
		}
		release()
		a.restart()
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A detach that was begun may still happen: it is finished before the attachment
// is used again, also by the next process.
func TestBegunDetachIsFinishedBeforeAttaching(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
				a := c.nodes["a"]
				a.create("db", nil)
				a.mount("db", "id1")
				var detached, attached atomic.Int64
				c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
					return when(call.Method == "Detach" && !call.Done, errors.New("no answer"))
				})
				a.unmount("db", "id1")
				c.settle(0)
				if restart {
					a.kill()
				}
				c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
					if call.Done && call.Method == "Detach" {
						detached.Add(1)
					}
					if call.Done && call.Method == "Attach" {
						attached.Add(1)
					}
					return nil
				})
				if restart {
					a.start()
				}
				a.mount("db", "id2")
				if detached.Load() != 1 || attached.Load() != 1 {
					t.Errorf("%d detaches and %d attaches, want one of each", detached.Load(), attached.Load())
				}
			})
		})
	}
}

// What the journal holds may come from another version, or be damaged.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"00000000-0000-4000-8000-000000000001","name":"db","token":7,"refs":{"a":{"count":1,"epoch":1}}}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		driver.DecodeRecord(t, data)
	})
}

// Docker starts a container after our reply to Mount, and may take its time.
func TestContainersStartedLateAreNamed(t *testing.T) {
	inCluster(t, []string{"a"}, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("v", nil)
		a.mount("v", "first")
		c.settle(3 * time.Second)
		a.docker.set("v", "web")
		c.settle(3 * time.Second)
		if got, want := fmt.Sprint(a.status("v")["containers"]), "[web]"; got != want {
			t.Errorf("containers %s, want %s", got, want)
		}
		a.mount("v", "second")
		c.settle(3 * time.Second)
		a.docker.set("v", "web", "worker")
		c.settle(3 * time.Second)
		if got, want := fmt.Sprint(a.status("v")["containers"]), "[web worker]"; got != want {
			t.Errorf("containers %s, want %s", got, want)
		}
	})
}

// A Mount that a killed process did not finish is in the journal, and Docker, which
// comes again with another ID, never undoes it.
func TestKilledInMountLeavesNoReference(t *testing.T) {
	inCluster(t, oneNode, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.killedAt(mount.CallMount, false, func() { _, _ = a.Mount(t.Context(), "db", "id1") })
		a.mount("db", "id2")
		a.unmount("db", "id2")
		c.settle(time.Second)
		c.wantNothing()
	})
}

// A container that starts with the host waits for the plugin's registration rather
// than fail.
func TestMountWaitsForTheRegistration(t *testing.T) {
	inCluster(t, oneNode, nil, func(_ *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		c.settle(2 * time.Second)
		a.kill()
		c.settle(time.Minute)
		a.startWith(canceled(), true)
		a.etcd.Inject(func(call string) ownership.Fault { return ownership.Fault{Refused: call == "grant"} })
		var wg sync.WaitGroup
		wg.Go(func() { a.mount("db", "id1") })
		c.settle(5 * time.Second)
		a.etcd.Inject(nil)
		wg.Wait()
	})
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// An ownership whose former owner is not known to be cut off is neither used nor
// given away.
func TestUnfinishedTakeoverIsLeftAlone(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		vid := a.status("db")["id"].(string)
		key := "/flocker/v1/own/" + vid
		value := fmt.Sprintf(`{"volume":%q,"node":%q,"host":"a","boot":"boot-1","op":"x","pending":{"node":"b","host":"b","boot":"boot-1","token":3}}`, vid, a.id.ID)
		_, err := c.etcd.Client().Txn(t.Context(), ownership.Txn{
			Then: []ownership.Op{{Kind: ownership.OpPut, Key: key, Value: []byte(value)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "volume db: memory cannot cut host b off; if that host is dead, type: docker flocker node confirm-dead b")
		a.restart()
		c.settle(10 * time.Minute)
		if kvs := c.etcd.Keys(key); len(kvs) != 1 || string(kvs[0].Value) != value {
			t.Errorf("the ownership is now %v", kvs)
		}
	})
}
