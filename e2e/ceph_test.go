//go:build e2e

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestCeph moves volumes in a real Ceph between Docker hosts, planned and not: the plugin
// as a service of each host, the image shown through FUSE. Ceph is on the hosts' network.
func TestCeph(t *testing.T) {
	if !slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "ceph") {
		t.Skip("many minutes: make test-ceph-hosts")
	}
	cephtest.NeedCeph(t)
	cephtest.Sweep()
	step := stopwatch(t)
	r := rig.New(t, rig.Config{Hosts: 3})
	ceph := startCeph(t, r)
	step("Ceph and the hosts are up")
	c := &cluster{Rig: r}
	if err := c.ImportImage(t.Context()); err != nil {
		t.Fatal(err)
	}
	var err error
	if c.endpoints, err = c.Etcd(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, h := range c.Hosts {
		backend := fmt.Sprintf("ceph: {type: rbd, monitors: ['%s'], keyring_file: %s, pool: %s, attach: fuse}\n", ceph.Monitors, ceph.Keyring, cephtest.Pool)
		if err := os.WriteFile(filepath.Join(h.Dir, "lib", "flocker", "backends.yaml"), []byte(backend), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.RunPlugin(t.Context(), map[string]string{
			"FLOCKER_BACKEND":        "ceph",
			"FLOCKER_BUSY_WAIT":      busyWait.String(),
			"FLOCKER_DEFAULT_SIZE":   "64M",
			"FLOCKER_ETCD_ENDPOINTS": strings.Join(c.endpoints, ","),
			"FLOCKER_LOG_LEVEL":      "debug",
			"FLOCKER_RECONCILE":      "2s",
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Swarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	step("the cluster is up")

	t.Run("moves", func(t *testing.T) { c.testMoves(t, 100) })
	step("a hundred moves")
	t.Run("drain", c.testSwarmReadme)
	step("a node was drained")
	p := &policy{cluster: c}
	t.Run("plugin killed", p.testServiceKilled)
	t.Run("owner cut off from etcd", func(t *testing.T) { p.testNoEtcd(t, c.Hosts[0], "cut", "ceph") })
	t.Run("owner paused", func(t *testing.T) { p.testPaused(t, c.Hosts[1], "paused", "ceph") })
	step("owners that are silent and go on")
	t.Run("owner killed", func(t *testing.T) { p.testKilled(t, c.Hosts[1], "doomed") })
	step("an owner that is killed")
	c.wantClean(t)
	c.wantIdle(t)
	c.wantNothingInCeph(t, ceph)
}

// startCeph starts a Ceph cluster on the rig's network.
func startCeph(t *testing.T, r *rig.Rig) *cephtest.Cluster {
	t.Helper()
	addr, enter, err := r.Serve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	ceph, err := cephtest.StartAt(ctx, cephtest.Place{Addr: addr, Enter: enter})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ceph.Stop)
	return ceph
}

// testServiceKilled kills the plugin under a container: what serves the device goes on,
// and so does the container.
func (p *policy) testServiceKilled(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	p.create(t, one, "served", "ceph")
	r := startRival(t, one, "customer", "served")
	for range 2 {
		if err := one.KillPlugin(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.wantWriting(t)
	}
	if got := wantState(t, one, "served", "mounted"); got["owner"] != one.Name {
		t.Errorf("status: %v, want it mounted by %s", got, one.Name)
	}
	wantHistory(t, one, "served", r)
	one.Run(t, "rm", "-f", r.name)
	wantHistory(t, two, "served", r)
	two.Run(t, "volume", "rm", "served")
}

// testKilled cuts the power of a host that writes. Another one takes its volume over with
// all that was durable, and it can have it back.
func (p *policy) testKilled(t *testing.T, owner *rig.Host, volume string) {
	ctx, taker := t.Context(), p.Hosts[2]
	p.create(t, owner, volume, "ceph")
	was := startRival(t, owner, "victim", volume)
	was.wantWriting(t)
	if err := owner.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	is := takesOver(t, taker, "survivor", volume)
	wantLogged(t, taker, volume, "taken over from host "+owner.Name)
	wantHistory(t, taker, volume, was, is)
	if err := owner.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	owner.Run(t, "rm", "-f", was.name)
	is.wantWriting(t)
	is.said(t)
	taker.Run(t, "rm", "-f", is.name)
	wantHistory(t, owner, volume, was, is)
	owner.Run(t, "volume", "rm", volume)
}

// wantNothingInCeph waits until neither Ceph nor a host has anything of a volume.
func (c *cluster) wantNothingInCeph(t *testing.T, ceph *cephtest.Cluster) {
	t.Helper()
	within(t, 30*time.Second, "nothing is left", func() error {
		for _, args := range [][]string{{"rbd", "ls", cephtest.Pool}, {"rados", "--pool", cephtest.Pool, "ls"}} {
			out, err := ceph.Run(t.Context(), args...)
			if err != nil {
				return err
			}
			if strings.Contains(out, "flocker-") {
				return fmt.Errorf("%s shows\n%s", strings.Join(args, " "), out)
			}
		}
		for _, h := range c.Hosts {
			out, err := h.Exec(t.Context(), "sh", "-c", "pgrep -fl ^qemu-storage-daemon; ls -d /run/flocker/rbd/*/m-* 2>/dev/null; true")
			if err != nil || out != "" {
				return fmt.Errorf("%s has\n%s %w", h.Name, out, err)
			}
		}
		return nil
	})
}
