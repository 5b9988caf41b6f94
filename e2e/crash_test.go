//go:build e2e

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestCrash kills, stops and disables what is around running containers. Their
// I/O goes on, and afterwards their volumes can move.
func TestCrash(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, contested)
		one := c.Hosts[0]
		// All at the beginning: a lost Unmount is noticed a minute after its Mount.
		once := work(t, one, "once", "once")
		always := work(t, one, "always", "always", "--restart", "always")
		orphan := work(t, one, "orphan", "orphan")
		wrecked := work(t, one, "wrecked", "wrecked")
		t.Run("plugin killed", func(t *testing.T) { c.testPluginKilled(t, wrecked) })
		t.Run("plugin disabled", func(t *testing.T) { c.testPluginDisabled(t, orphan) })
		t.Run("dockerd killed", func(t *testing.T) { c.testDockerdKilled(t, once, always) })
		t.Run("dockerd stopped", func(t *testing.T) { c.testDockerdStopped(t, always) })
		c.wantClean(t)
		c.wantIdle(t)
	})
}

// testPluginKilled kills the plugin's process under a running container.
func (c *cluster) testPluginKilled(t *testing.T, w *worker) {
	before, err := w.h.PluginPID()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.h.KillPlugin(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantWriting(t)
	within(t, 30*time.Second, "Docker starts the plugin again", func() error {
		now, err := w.h.PluginPID()
		if err == nil && now == before {
			err = fmt.Errorf("it is process %d still", now)
		}
		return err
	})
	if got := status(t, w.h, w.volume); got["state"] != "mounted" || got["owner"] != w.h.Name {
		t.Errorf("status after the kill: %v, want mounted by %s", got, w.h.Name)
	}
	w.wantInUse(t, c.Hosts[1])
	w.h.Run(t, "stop", w.name)
	c.wantMoves(t, w, c.Hosts[1], 0)
	c.wantMoves(t, w, w.h, 0)
	w.remove(t)
}

// testPluginDisabled disables the plugin by force under a running container, which
// unmounts its volumes everywhere but in the container.
func (c *cluster) testPluginDisabled(t *testing.T, w *worker) {
	w.h.Run(t, "plugin", "disable", "-f", rig.PluginName)
	w.wantWriting(t)
	w.h.Run(t, "plugin", "enable", "--timeout", "0", rig.PluginName)
	w.wantWriting(t)
	// docker cp mounts and unmounts in the name of the running container.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("copied in\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.h.Run(t, "cp", filepath.Join(dir, "in"), w.name+":/data/in")
	w.h.Run(t, "cp", w.name+":/data/log", filepath.Join(dir, "out"))
	if out, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || !strings.HasPrefix(string(out), "1\n2\n") {
		t.Errorf("docker cp from the container gives %q, %v", out, err)
	}
	if got := w.h.Run(t, "exec", w.name, "cat", "/data/in"); got != "copied in" {
		t.Errorf("the container reads %q of what docker cp copied in", got)
	}
	w.wantWriting(t)
	w.wantInUse(t, c.Hosts[1])
	w.h.Run(t, "stop", w.name)
	c.wantMoves(t, w, c.Hosts[1], 0)
	w.remove(t)
}

// testDockerdKilled kills Docker under containers with and without a restart
// policy. When it starts it kills them, without an Unmount.
func (c *cluster) testDockerdKilled(t *testing.T, once, always *worker) {
	one, two := once.h, c.Hosts[1]
	before, err := one.PluginPID()
	if err != nil {
		t.Fatal(err)
	}
	killed, err := os.Stat(logFile(one))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() { // the rig shows the end of the log only
			log, _ := os.ReadFile(logFile(one))
			t.Logf("the log of %s from the kill on:\n%s", one.Name, log[killed.Size():])
		}
	}()
	if err := one.KillDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	once.wantWriting(t)
	always.wantWriting(t)
	if now, err := one.PluginPID(); err != nil || now != before {
		t.Errorf("the plugin was process %d and is %d, %v, when dockerd was killed", before, now, err)
	}
	once.wantInUse(t, two) // by whom, nobody can say now
	if err := one.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now, err := one.PluginPID(); err != nil || now == before {
		t.Errorf("the plugin is process %d still, %v, when dockerd has started", now, err)
	}
	always.wantBack(t)
	if got := one.Run(t, "ps", "-a", "--filter", "name=once", "--format", "{{.State}}"); got != "exited" {
		t.Errorf("the container without a restart policy is %q, want it exited", got)
	}
	one.Run(t, "rm", "once")
	c.wantMoves(t, once, two, 90*time.Second)
	always.wantInUse(t, two)
	always.wantWriting(t)
	two.Run(t, "volume", "rm", once.volume)
}

// testDockerdStopped stops Docker as for a maintenance of the host: containers
// stop, the plugin stops, and the volumes are free for other hosts meanwhile.
func (c *cluster) testDockerdStopped(t *testing.T, w *worker) {
	if err := w.h.StopDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pid, err := w.h.PluginPID(); err == nil {
		t.Errorf("the plugin runs, as process %d, when dockerd has stopped", pid)
	}
	c.wantMoves(t, w, c.Hosts[1], 0)
	if err := w.h.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantBack(t)
	w.h.Run(t, "stop", w.name)
	c.wantMoves(t, w, c.Hosts[1], 0)
	w.remove(t)
}

// TestLiveRestore stops and kills Docker where containers outlive it.
func TestLiveRestore(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine, LiveRestore: true}, contested)
		one, two := c.Hosts[0], c.Hosts[1]
		w := work(t, one, "survivor", "live")
		before, err := one.PluginPID()
		if err != nil {
			t.Fatal(err)
		}
		for _, how := range []struct {
			what string
			end  func(context.Context) error
		}{{"stopped", one.StopDockerd}, {"killed", one.KillDockerd}} {
			if err := how.end(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantWriting(t)
			if now, err := one.PluginPID(); err != nil || now != before {
				t.Errorf("the plugin was process %d and is %d, %v, when dockerd was %s", before, now, err, how.what)
			}
			w.wantInUse(t, two)
			if err := one.StartDockerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantWriting(t)
			if now, err := one.PluginPID(); err != nil || now != before {
				t.Errorf("the plugin was process %d and is %d, %v, when dockerd was %s and started", before, now, err, how.what)
			}
			one.Run(t, "exec", "survivor", "sh", "-c", "tail -n 1 /data/log")
			refused(t, one, "volume is in use", "volume", "rm", "live")
		}
		calls := callsOf(t, one)
		one.Run(t, "stop", "survivor")
		calls.want(t, "live", "unmount")
		c.wantMoves(t, w, two, 0)
		w.remove(t)
		c.wantClean(t)
		c.wantIdle(t)
	})
}

// A worker is a container that writes the numbers from 1 on to its volume, each
// one to the disk.
type worker struct {
	h            *rig.Host
	name, volume string
	pid          string // in its host
	seen         int    // how many numbers were seen on the volume
}

const writer = `trap exit TERM
	n=$(cat /data/log 2>/dev/null | wc -l)
	while :; do
		n=$((n + 1))
		echo $n | dd of=/data/log oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
		sleep 0.1
	done`

// work starts one, with more arguments for docker run.
func work(t *testing.T, h *rig.Host, name, volume string, args ...string) *worker {
	t.Helper()
	args = append(args, "-d", "busybox", "sh", "-c", writer)
	h.Run(t, volumeRun(name, volume, args...)...)
	w := &worker{h: h, name: name, volume: volume}
	w.wantBack(t)
	return w
}

// wantBack waits until Docker has (re)started it and it writes.
func (w *worker) wantBack(t *testing.T) {
	t.Helper()
	within(t, 30*time.Second, w.name+" runs", func() error {
		w.pid = w.h.Run(t, "inspect", "--format", "{{.State.Pid}}", w.name)
		if w.pid == "0" {
			return fmt.Errorf("it is %s", w.h.Run(t, "inspect", "--format", "{{json .State}}", w.name))
		}
		return nil
	})
	w.wantWriting(t)
}

// lines returns how many numbers it has written. Docker is not asked.
func (w *worker) lines(t *testing.T) (int, error) {
	t.Helper()
	out, err := w.h.Exec(t.Context(), "sh", "-c", "wc -l <"+filepath.Join("/proc", w.pid, "root", "data", "log"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(out)
}

// wantWriting waits until it has written three numbers more.
func (w *worker) wantWriting(t *testing.T) {
	t.Helper()
	first := -1
	within(t, 30*time.Second, w.name+" writes", func() error {
		n, err := w.lines(t)
		if err != nil {
			return err
		}
		if first < 0 {
			first = n
		}
		if w.seen = max(w.seen, n); n < first+3 {
			return fmt.Errorf("%d lines after %d", n, first)
		}
		return nil
	})
}

// wantInUse asserts that the other host is refused the volume, and told because of
// which container if Docker can say that.
func (w *worker) wantInUse(t *testing.T, other *rig.Host) {
	t.Helper()
	want := fmt.Sprintf("volume %s is in use on host %s", w.volume, w.h.Name)
	if _, err := w.h.Docker(t.Context(), "version"); err == nil {
		want += " by container " + w.name
	}
	refused(t, other, want, volumeRun("", w.volume, "--rm")...)
}

// wantMoves waits for up to limit until another host gets the volume, with every
// number that was seen on it and no gap.
func (c *cluster) wantMoves(t *testing.T, w *worker, to *rig.Host, limit time.Duration) {
	t.Helper()
	const check = `awk '$1 != NR { print "line", NR, "is", $0; exit 1 } END { print NR }' /data/log`
	within(t, limit, "volume "+w.volume+" moves to "+to.Name, func() error {
		out, err := to.Docker(t.Context(), volumeRun("", w.volume, "--rm", "busybox", "sh", "-c", check)...)
		if err != nil {
			return err
		}
		if n, err := strconv.Atoi(out); err != nil || n < w.seen {
			t.Fatalf("%s reads %q on volume %s, want at least %d", to.Name, out, w.volume, w.seen)
		}
		return nil
	})
}

// remove removes the container, which is stopped, and the volume.
func (w *worker) remove(t *testing.T) {
	t.Helper()
	w.h.Run(t, "rm", "-f", w.name)
	w.h.Run(t, "volume", "rm", w.volume)
}
