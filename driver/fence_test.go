package driver_test

import (
	"context"
	"fmt"
	"io/fs"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
)

// onSlowlyFencingStorage runs a test on storage that needs some time to cut a host off,
// such as until it has switched it off, and that would make whoever gives up wait.
func onSlowlyFencingStorage(t *testing.T, takes time.Duration, test func(t *testing.T, c *cluster)) {
	t.Helper()
	slow := nameless
	slow.FenceTime = 3 * time.Minute
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		c.use(slow)
		c.storage.Inject(func(call backendtest.Call) (f backendtest.Fault) {
			if call.Method == "Fence" {
				f.Latency = takes
			}
			return f
		})
		test(t, c)
	})
}

// A fence has the time that it needs.
func TestSlowFence(t *testing.T) {
	onSlowlyFencingStorage(t, 45*time.Second, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		died := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		if _, err := b.Mount(ctx, "db", "id2"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(died); took > 10*time.Second+hold+47*time.Second {
			t.Errorf("taken over after %v", took)
		}
	})
}

// One that takes longer than a Mount may is finished without it.
func TestFenceSlowerThanAMount(t *testing.T) {
	onSlowlyFencingStorage(t, 150*time.Second, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		_, err := b.Mount(ctx, "db", "id2")
		wantError(t, err, "volume db: host a, which owned it, could not be cut off from it", "it is tried again")
		c.settle(5 * time.Minute)
		if s := b.status("db"); s["state"] == "being taken over" {
			t.Fatalf("status %v: the takeover was not finished", s)
		}
		soon, stop := context.WithTimeout(t.Context(), 5*time.Second)
		defer stop()
		if _, err := b.Mount(soon, "db", "id3"); err != nil {
			t.Error(err)
		}
		if err := a.write("db"); err == nil {
			t.Error("the former owner can still write")
		}
	})
}

// The device of a lost volume may be gone altogether: then nobody has it open, and its
// loser is done with it.
func TestLoserWithoutADevice(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.partition(true)
		b.mount("db", "id2")
		a.mounter.SetHook(func(call, device string) error {
			if call == mount.CallClose {
				return &fs.PathError{Op: "open", Path: device, Err: fs.ErrNotExist}
			}
			return nil
		})
		a.partition(false)
		c.settle(time.Minute)
		if s := a.status("db"); s["state"] != "owned" || s["owner"] != "b" {
			t.Errorf("status on the loser %v, want owned by b", s)
		}
		if mounts := a.kernel.Mounts(); len(mounts) > 0 {
			t.Errorf("the loser has mounted %v", mounts)
		}
		b.unmount("db", "id2")
		c.settle(3 * time.Minute)
		a.mounter.SetHook(nil)
		a.mount("db", "id3")
	})
}

// Of an owner's device that is gone nobody knows whether it took everything: the volume
// is not given away as if it had.
func TestOwnerWithoutADevice(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.mounter.SetHook(func(call, device string) error {
			if call == mount.CallClose {
				return fmt.Errorf("close %s: %w", device, fs.ErrNotExist)
			}
			return nil
		})
		wantError(t, a.Unmount(t.Context(), "db", "id1"), "close volume db: ", "file does not exist")
		c.settle(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := b.Mount(ctx, "db", "id2"); err == nil {
			t.Error("given away")
		}
	})
}
