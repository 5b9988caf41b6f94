//go:build e2e

package e2e_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestEtcdAway takes etcd's majority away. What is mounted keeps working, Docker
// keeps its records, and nothing is decided without etcd: no volume is mounted,
// removed, or replaced by a local one.
func TestEtcdAway(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		ctx := t.Context()
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, contested)
		one, two := c.Hosts[0], c.Hosts[1]
		w := work(t, one, "worker", "used")
		stopped := work(t, one, "stopped", "stopped")
		two.Run(t, "volume", "create", "-d", "flocker", "-o", "size=128M", "-o", "fs=btrfs", "--label", "keep=me", "known")
		sh(t, two, "known", "echo before >/data/note")
		two.Run(t, "volume", "ls") // so that it knows the others
		within(t, 30*time.Second, "host1 knows the volume as well", func() error {
			one.Run(t, "volume", "ls")
			_, err := one.Docker(ctx, "volume", "inspect", "known")
			return err
		})
		record := two.Run(t, "volume", "inspect", "--format", "{{.Driver}} {{json .Options}} {{json .Labels}}", "known")
		if want := `flocker:latest {"fs":"btrfs","size":"128M"} {"keep":"me"}`; record != want {
			t.Fatalf("Docker has recorded %s, want %s", record, want)
		}

		for _, member := range []int{1, 2} {
			if err := c.KillEtcd(ctx, member); err != nil {
				t.Fatal(err)
			}
		}
		const unsure = "ownership cannot be checked"
		const keeps = "what is mounted keeps working, retry when etcd answers"

		t.Run("look", func(t *testing.T) {
			for _, h := range c.Hosts {
				if got, want := volumes(t, h), []string{"known", "stopped", "used"}; !slices.Equal(got, want) {
					t.Errorf("%s lists %v, want %v", h.Name, got, want)
				}
			}
			if got := status(t, one, "used"); got["state"] != "mounted" || got["owner"] != "host1" || got["stale"] != nil {
				t.Errorf("status where it is mounted: %v", got)
			}
			if got := status(t, two, "used"); got["state"] != "unknown" || got["owner"] != nil || got["stale"] != true {
				t.Errorf("status on the other host: %v, want it unknown and stale", got)
			}
			w.wantWriting(t)
		})
		t.Run("no local volume", func(t *testing.T) {
			// Neither where Docker has a record of it nor where it has none.
			for _, h := range c.Hosts {
				text := refused(t, h, unsure, "run", "--rm", "-v", "known:/x", "busybox", "true")
				if !strings.Contains(text, "volume known: "+unsure) || !strings.Contains(text, keeps) {
					t.Errorf("docker run -v on %s says %q", h.Name, text)
				}
				if got := h.Run(t, "volume", "inspect", "--format", "{{.Driver}}", "known"); got != "flocker:latest" {
					t.Errorf("on %s its driver is %s now", h.Name, got)
				}
				if got := volumes(t, h, "driver=local"); len(got) > 0 {
					t.Errorf("%s has local volumes %v", h.Name, got)
				}
			}
		})
		t.Run("rm", func(t *testing.T) {
			text := refused(t, two, unsure, "volume", "rm", "known")
			if !strings.Contains(text, "the volume was not removed") {
				t.Errorf("docker volume rm says %q", text)
			}
			refused(t, two, unsure, "volume", "rm", "-f", "known")
		})
		t.Run("stop", func(t *testing.T) {
			began := time.Now()
			one.Run(t, "exec", "stopped", "true")
			one.Run(t, "stop", "stopped")
			one.Run(t, "rm", "stopped")
			if took := time.Since(began); took > 15*time.Second {
				t.Errorf("stop and rm took %v", took)
			}
			if got := status(t, one, "stopped"); got["mounts"] != nil {
				t.Errorf("status of the stopped container's volume: %v", got)
			}
		})
		t.Run("docker restarts", func(t *testing.T) {
			if err := two.StopDockerd(ctx); err != nil {
				t.Fatal(err)
			}
			if err := two.StartDockerd(ctx); err != nil {
				t.Fatal(err)
			}
			if err := two.KillDockerd(ctx); err != nil {
				t.Fatal(err)
			}
			if err := two.StartDockerd(ctx); err != nil {
				t.Fatal(err)
			}
			// rm -f has made Docker forget its own record of it, and nothing else.
			if got, want := two.Run(t, "volume", "inspect", "--format", "{{.Driver}} {{.Status.filesystem}} {{.Status.stale}}", "known"), "flocker:latest btrfs true"; got != want {
				t.Errorf("after two restarts: %s, want %s", got, want)
			}
			w.wantWriting(t)
			refused(t, two, unsure, volumeRun("", "known", "--rm")...)
		})

		w.wantWriting(t)
		for _, member := range []int{1, 2} {
			if err := c.StartEtcd(ctx, member); err != nil {
				t.Fatal(err)
			}
		}
		c.wantMoves(t, stopped, two, 30*time.Second)
		w.wantInUse(t, two)
		one.Run(t, "stop", w.name)
		c.wantMoves(t, w, two, 30*time.Second)
		if got := sh(t, one, "known", "cat /data/note"); got != "before" {
			t.Errorf("host1 reads %q", got)
		}
		w.remove(t)
		two.Run(t, "volume", "rm", "known", "stopped")
		c.wantClean(t)
		c.wantIdle(t)
	})
}
