//go:build e2e

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestMove is about volumes that hosts compete for: moves, refusals, a dead
// owner, and many calls at once.
func TestMove(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		c := newCluster(t, rig.Config{Hosts: 3, Engine: engine}, contested)
		moves := 10
		if engine == rig.Debian {
			moves = 100
		}
		t.Run("moves", func(t *testing.T) { c.testMoves(t, moves) })
		t.Run("busy", c.testBusy)
		// A lost Unmount is noticed a minute after the Mount: what happens in between
		// does not concern this volume.
		c.Hosts[0].Run(t, volumeRun("doomed", "lost", "-d")...)
		t.Run("created at once", c.testCreatedAtOnce)
		t.Run("twenty at once", c.testTwenty)
		t.Run("owner dies", func(t *testing.T) { c.testOwnerDies(t, "doomed", "lost") })
		c.wantClean(t)
		c.wantIdle(t)
	})
}

// testMoves moves a volume from host to host. Each container checks everything
// that was written before, and writes more.
func (c *cluster) testMoves(t *testing.T, moves int) {
	const script = `
		cd /data
		if [ $0 -gt 0 ]; then
			[ "$(sha256sum <sums)" = "$1" ] && sha256sum -c sums >/tmp/out 2>&1 || { cat sums /tmp/out; exit 1; }
		fi
		[ $(ls | grep -c ^part) = $0 ] || { ls; exit 1; }
		head -c $((20000 + $0 * 1000)) /dev/urandom >part$0
		sha256sum part* >sums
		sha256sum <sums`
	c.Hosts[0].Run(t, "volume", "create", "-d", "flocker", "-o", "size=256M", "nomad")
	var runs []time.Duration
	sum, at := "", 0
	for i := range moves + 1 {
		began := time.Now()
		sum = c.Hosts[at].Run(t, volumeRun("", "nomad", "--rm", "busybox", "sh", "-c", script, fmt.Sprint(i), sum)...)
		runs = append(runs, time.Since(began))
		at = (at + 1 + i/3%2) % len(c.Hosts) // three forth, three back
	}
	for what, took := range map[string][]time.Duration{"docker run": runs, "the plugin's Mount": c.mountsTook(t, "nomad", moves+1)} {
		slices.Sort(took)
		t.Logf("%d moves, %s: p50 %v, p95 %v, longest %v", moves, what,
			took[len(took)/2], took[len(took)*95/100], took[len(took)-1])
	}
	c.assertFree(t, time.Minute, "nomad")
	c.wantIdle(t)
	c.Hosts[1].Run(t, "volume", "rm", "nomad")
}

var tookMount = regexp.MustCompile(`op=mount took=([0-9.]+m?s) volume=(\w+)`)

// mountsTook returns, from the plugins' logs, how long each of so many Mounts of a
// volume took.
func (c *cluster) mountsTook(t *testing.T, volume string, count int) []time.Duration {
	t.Helper()
	var took []time.Duration
	within(t, 30*time.Second, "the Mounts are in the logs", func() error {
		took = nil
		for _, h := range c.Hosts {
			log, err := os.ReadFile(logFile(h))
			if err != nil {
				return err
			}
			for _, m := range tookMount.FindAllStringSubmatch(string(log), -1) {
				if d, err := time.ParseDuration(m[1]); err == nil && m[2] == volume {
					took = append(took, d)
				}
			}
		}
		if len(took) != count {
			return fmt.Errorf("there are %d, want %d", len(took), count)
		}
		return nil
	})
	return took
}

// testBusy mounts what another host's container uses: refused, or granted if the
// container stops in time.
func (c *cluster) testBusy(t *testing.T) {
	one, two := c.Hosts[0], c.Hosts[1]
	one.Run(t, volumeRun("web", "busy", "-d")...)
	within(t, 30*time.Second, "the plugin knows the container", func() error {
		if got := status(t, one, "busy"); fmt.Sprint(got["containers"]) != "[web]" {
			return fmt.Errorf("status %v", got)
		}
		return nil
	})
	began := time.Now()
	text := refused(t, two, "volume busy is in use on host host1 by container web; waited ", volumeRun("other", "busy")...)
	if want := regexp.MustCompile(`waited [5-9]s for it to stop; stop what uses it there and retry`); !want.MatchString(text) {
		t.Errorf("a mount on host2 says %q, want a match of %s", text, want)
	}
	if took := time.Since(began); took < busyWait {
		t.Errorf("refused after %v, want to be after %v", took, busyWait)
	}
	if got := status(t, two, "busy"); got["owner"] != "host1" || got["state"] != "owned" || got["waiting"] != nil {
		t.Errorf("status on host2 is %v, want owned by host1 and nobody waiting", got)
	}
	two.Run(t, "rm", "other")
	refused(t, two, "volume busy is in use on host host1 by container web", "volume", "rm", "busy")
	// The test of what is left sees what there is.
	held := strings.Join(c.held(t), "\n")
	for _, want := range []string{"mount on host1: ", "mount in the plugin on host1: ", "mountpoint on host1: ", "loop device ", "etcd key own/", "journal record on host1: "} {
		if !strings.Contains(held, want) {
			t.Errorf("of a volume in use is held:\n%s\nwant %s", held, want)
		}
	}
	// What was refused has left the container and its data alone.
	if got := one.Run(t, "exec", "web", "sh", "-c", "echo still here >/data/note; cat /data/note"); got != "still here" {
		t.Errorf("the container reads %q", got)
	}

	// Now it stops while the other host waits.
	type result struct {
		out string
		err error
	}
	waited := make(chan result, 1)
	go func() {
		out, err := two.Docker(t.Context(), volumeRun("", "busy", "--rm", "busybox", "cat", "/data/note")...)
		waited <- result{out, err}
	}()
	within(t, busyWait, "host1 shows who waits", func() error {
		if got := status(t, one, "busy"); fmt.Sprint(got["waiting"]) != "[host2]" {
			return fmt.Errorf("status %v", got)
		}
		return nil
	})
	one.Run(t, "stop", "-t", "0", "web")
	if got := <-waited; got.err != nil || got.out != "still here" {
		t.Errorf("the one that waited got %q, %v", got.out, got.err)
	}
	one.Run(t, "rm", "web")
	c.assertFree(t, 30*time.Second, "busy")
	one.Run(t, "volume", "rm", "busy")
}

// testOwnerDies cuts the power of the host whose container uses a volume.
func (c *cluster) testOwnerDies(t *testing.T, container, volume string) {
	ctx := t.Context()
	one, two := c.Hosts[0], c.Hosts[1]
	one.Run(t, "exec", container, "sh", "-c", "echo survives | dd of=/data/note conv=fsync 2>/dev/null")
	if err := one.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	const (
		dead = "volume lost is owned by host host1, which has not been heard from"
		want = "; loopback cannot cut it off, so nothing was changed: make sure host host1 is switched off, " +
			"then type: docker flocker node confirm-dead host1"
	)
	within(t, 30*time.Second, "the owner counts as dead", func() error {
		if got := status(t, two, volume); got["state"] != "owner not responding" || got["owner"] != "host1" {
			return fmt.Errorf("status %v", got)
		}
		return nil
	})
	if got := refused(t, two, want, volumeRun("", volume, "--rm")...); !strings.Contains(got, dead) {
		t.Errorf("refused with %q, want %q", got, dead)
	}
	refused(t, two, "it may be in use there, so it was not removed: bring host host1 back; or make sure host host1 is switched off", "volume", "rm", volume)
	if err := one.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	within(t, 90*time.Second, "the volume moves when its host is back", func() error {
		got, err := two.Docker(ctx, volumeRun("", volume, "--rm", "busybox", "cat", "/data/note")...)
		if err == nil && got != "survives" {
			t.Fatalf("host2 reads %q, want %q", got, "survives")
		}
		return err
	})
	// And back under the container that had it.
	one.Run(t, "start", container)
	if got := one.Run(t, "exec", container, "cat", "/data/note"); got != "survives" {
		t.Errorf("the first container reads %q", got)
	}
	one.Run(t, "rm", "-f", container)
	c.assertFree(t, 30*time.Second, volume)
	one.Run(t, "volume", "rm", volume)
}

// testCreatedAtOnce has all hosts create one name at the same time, and create
// and remove it.
func (c *cluster) testCreatedAtOnce(t *testing.T) {
	create := func(size int) []string {
		return []string{"volume", "create", "-d", "flocker", "-o", fmt.Sprintf("size=%dM", size), "twin"}
	}
	for range 5 {
		for _, err := range c.each(t, func(int) []string { return create(64) }) {
			if err != nil {
				t.Errorf("a creation: %v", err)
			}
		}
		if got := len(c.etcdKeys(t, "name/twin")); got != 1 {
			t.Fatalf("%d volumes are recorded, want 1: %v", got, c.etcdKeys(t, "name/twin"))
		}
		// And all remove it at once.
		for _, err := range c.each(t, func(int) []string { return []string{"volume", "rm", "twin"} }) {
			if err != nil && !strings.Contains(err.Error(), "no such volume") {
				t.Errorf("a removal: %v", err)
			}
		}
		if got := c.etcdKeys(t, "name/twin"); len(got) > 0 {
			t.Fatalf("after the removals: %v", got)
		}
	}
	// One of those that want different sizes gets it.
	won := 0
	for _, err := range c.each(t, func(i int) []string { return create(64 * (i + 1)) }) {
		if err == nil {
			won++
		} else if !regexp.MustCompile(`volume twin exists with other options: size is (64|128|192)MiB, not (64|128|192)MiB; remove it first, or leave these options out`).MatchString(err.Error()) {
			t.Errorf("a loser is told: %v", err)
		}
	}
	// Docker asks the plugin before it creates, and takes what there is already.
	if won < 1 || len(c.etcdKeys(t, "name/twin")) != 1 {
		t.Errorf("%d creations succeeded, and there are %v", won, c.etcdKeys(t, "name/twin"))
	}
	c.Hosts[2].Run(t, "volume", "rm", "twin")
}

// testTwenty makes, uses and removes twenty volumes on three hosts at once.
func (c *cluster) testTwenty(t *testing.T) {
	const n = 20
	all := func(what string, args func(i int) []string) {
		t.Helper()
		began := time.Now()
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				_, errs[i] = c.Hosts[(i+len(what))%len(c.Hosts)].Docker(ctx, args(i)...)
			})
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		t.Logf("%d times %s: %v", n, what, time.Since(began).Round(time.Millisecond))
	}
	name := func(i int) string { return fmt.Sprintf("crowd%d", i) }
	all("create", func(i int) []string {
		return []string{"volume", "create", "-d", "flocker", "-o", "size=32M", name(i)}
	})
	script := func(i int) string { return fmt.Sprintf("echo %d >>/data/n; [ $(sort -u /data/n) = %d ]", i, i) }
	all("run", func(i int) []string { return volumeRun("", name(i), "--rm", "busybox", "sh", "-c", script(i)) })
	// Each on another host than before: every one moves.
	all("move", func(i int) []string {
		return volumeRun("", name(i), "--rm", "busybox", "sh", "-c", script(i)+"; [ $(wc -l </data/n) = 2 ]")
	})
	all("remove", func(i int) []string { return []string{"volume", "rm", name(i)} })
	for _, h := range c.Hosts {
		if got := volumes(t, h); !slices.Equal(got, []string{"lost"}) {
			t.Errorf("%s lists %v", h.Name, got)
		}
	}
}

// busyWait is how long a mount waits for another host's containers, here.
const busyWait = 5 * time.Second

// contested are the plugin's settings of these tests.
var contested = map[string]string{
	"FLOCKER_BUSY_WAIT": busyWait.String(),
	"FLOCKER_RECONCILE": "2s",
}

// volumeRun is a docker run with a volume at /data. Without further arguments the
// container sleeps until it is stopped, at once; with a name it keeps it.
func volumeRun(name, volume string, args ...string) []string {
	run := []string{"run", "--mount", "type=volume,volume-driver=flocker,dst=/data,src=" + volume}
	if name != "" {
		run = append(run, "--name", name)
	}
	run = append(run, args...)
	if !slices.Contains(args, "busybox") {
		run = append(run, "busybox", "sh", "-c", "trap exit TERM; while :; do sleep 0.1; done")
	}
	return run
}

// each runs a docker command on every host at the same time.
func (c *cluster) each(t *testing.T, args func(i int) []string) []error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	errs := make([]error, len(c.Hosts))
	var wg sync.WaitGroup
	for i, h := range c.Hosts {
		wg.Go(func() { _, errs[i] = h.Docker(ctx, args(i)...) })
	}
	wg.Wait()
	return errs
}

// within waits for up to limit until so returns nil.
func within(t *testing.T, limit time.Duration, what string, so func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		err := so()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v it is not so that %s: %v", limit, what, err)
		}
	}
}

// assertFree waits until no host owns the volume.
func (c *cluster) assertFree(t *testing.T, limit time.Duration, volume string) {
	t.Helper()
	within(t, limit, "volume "+volume+" is free", func() error {
		if got := status(t, c.Hosts[len(c.Hosts)-1], volume); got["state"] != "free" {
			return fmt.Errorf("status %v", got)
		}
		return nil
	})
}

// wantIdle waits until no host has anything of a volume: no ownership, request or
// reply in etcd, no loop device, mount, journal record or process of the plugin.
func (c *cluster) wantIdle(t *testing.T) {
	t.Helper()
	within(t, 30*time.Second, "nothing is held", func() error {
		if held := c.held(t); len(held) > 0 {
			return fmt.Errorf("held:\n%s", strings.Join(held, "\n"))
		}
		return nil
	})
}

func (c *cluster) held(t *testing.T) []string {
	t.Helper()
	var held []string
	for _, what := range c.leftovers(t) {
		if !strings.HasPrefix(what, "volume ") && !strings.HasPrefix(what, "etcd key vol/") &&
			!strings.HasPrefix(what, "etcd key name/") && !strings.HasPrefix(what, "file ") && !strings.HasPrefix(what, "container ") {
			held = append(held, what)
		}
	}
	for _, key := range c.etcdKeys(t, "rep/") {
		held = append(held, "etcd key "+key)
	}
	for _, h := range c.Hosts {
		records, _ := filepath.Glob(filepath.Join(h.Dir, "lib", "flocker", "volumes", "*"))
		for _, record := range records {
			held = append(held, "journal record on "+h.Name+": "+filepath.Base(record))
		}
		processes, err := h.Exec(t.Context(), "sh", "-c", "pgrep -lx flocker-plugin; pgrep -lP $(pgrep -ox flocker-plugin); true")
		if lines := strings.Split(processes, "\n"); len(lines) != 1 || err != nil {
			held = append(held, fmt.Sprintf("processes on %s: %q %v", h.Name, lines, err))
		}
	}
	return held
}
