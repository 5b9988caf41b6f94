//go:build e2e

package e2e_test

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestSwarm is about services with volumes, in a Swarm of three hosts.
func TestSwarm(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		c := newCluster(t, rig.Config{Hosts: 3, Engine: engine}, contested)
		if err := c.Swarm(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Run("readme", c.testSwarmReadme)
		t.Run("update", c.testSwarmUpdate)
		t.Run("volume per replica", c.testSwarmTemplate)
		t.Run("node reboots", c.testSwarmReboot)
		c.wantClean(t)
		c.wantIdle(t)
	})
}

// testSwarmReadme types the lines of the README: a service, and then a node is
// drained.
func (c *cluster) testSwarmReadme(t *testing.T) {
	manager := c.Hosts[0]
	lines := readmeLines(t, "### Swarm")
	if len(lines) != 2 {
		t.Fatalf("the README has the lines %q, want two", lines)
	}
	typed(t, manager, lines[0])
	task := c.running(t, "db")[0]
	if got := status(t, manager, "db"); got["size"] != "1GiB" || got["owner"] != task.h.Name {
		t.Errorf("status %v, want 1GiB, owned by %s", got, task.h.Name)
	}
	within(t, 30*time.Second, "the service writes", func() error { return task.has(t, `^.+\n.+$`) })
	before := task.sh(t, "cat /data/log")

	typed(t, manager, lines[1])
	if got := manager.Run(t, "node", "inspect", "--format", "{{.Spec.Availability}}", task.h.Name); got != "drain" {
		t.Errorf("%s is %s, want it drained", task.h.Name, got)
	}
	var moved swarmTask
	within(t, time.Minute, "the task runs elsewhere", func() error {
		if moved = c.running(t, "db")[0]; moved.h == task.h {
			return fmt.Errorf("it is still on %s", moved.h.Name)
		}
		return nil
	})
	within(t, 30*time.Second, "it goes on writing where the other one stopped", func() error {
		return moved.has(t, "^"+regexp.QuoteMeta(before)+`\n.+\n`)
	})
	manager.Run(t, "service", "rm", "db")
	manager.Run(t, "node", "update", "--availability", "active", task.h.Name)
	c.removeWhenIdle(t, "db")
}

// testSwarmUpdate updates a service, stop-first as is the default, and then wants
// two replicas of it, for which one volume is not enough.
func (c *cluster) testSwarmUpdate(t *testing.T) {
	manager := c.Hosts[0]
	manager.Run(t, "service", "create", "--name", "app", "--replicas-max-per-node", "1", "--restart-delay", "1s",
		"--mount", "type=volume,source=app,target=/data,volume-driver=flocker,volume-opt=size=96M", "busybox", "sh", "-c", writer)
	first := c.running(t, "app")[0]
	if got := status(t, manager, "app"); got["size"] != "96MiB" {
		t.Errorf("status %v, want the size of the volume-opt", got)
	}
	last := 0
	for _, option := range []string{"--force", "--constraint-add=node.hostname!=%s"} {
		// Swarm leaves a task that meets the new constraint where it is: the
		// constraint is against the host of the moment.
		update := strings.ReplaceAll(option, "%s", first.h.Name)
		within(t, 30*time.Second, "it writes", func() error { return first.has(t, `\n.*\n`) })
		last = first.count(t)
		manager.Run(t, "service", "update", update, "app")
		again := c.running(t, "app")[0]
		if again.container == first.container {
			t.Fatalf("after %s the task is the same, %s", update, again.container)
		}
		t.Logf("update %s: from %s to %s", update, first.h.Name, again.h.Name)
		if got := again.count(t); got < last {
			t.Errorf("the new task sees %d numbers, want at least %d", got, last)
		}
		first = again
	}

	manager.Run(t, "service", "scale", "--detach", "app=2")
	want := fmt.Sprintf("VolumeDriver.Mount: volume app is in use on host %s by container %s; waited ", first.h.Name, first.name)
	within(t, time.Minute, "the second replica is refused", func() error {
		errors := manager.Run(t, "service", "ps", "app", "--no-trunc", "--format", "{{.Error}}")
		if !strings.Contains(errors, want) {
			return fmt.Errorf("service ps shows the errors %q, want %q", errors, want)
		}
		return nil
	})
	if got := c.running(t, "app"); len(got) != 1 || got[0].container != first.container {
		t.Errorf("running are %v, want the first replica alone", got)
	}
	last = first.count(t)
	within(t, 30*time.Second, "the first replica goes on", func() error {
		if n := first.count(t); n <= last {
			return fmt.Errorf("%d numbers", n)
		}
		return nil
	})
	manager.Run(t, "service", "rm", "app")
	c.removeWhenIdle(t, "app")
}

// testSwarmTemplate gives each replica a volume of its own.
func (c *cluster) testSwarmTemplate(t *testing.T) {
	manager := c.Hosts[0]
	manager.Run(t, "service", "create", "--name", "shards", "--replicas", "3", "--env", "SLOT={{.Task.Slot}}",
		"--mount", "type=volume,source=data-{{.Task.Slot}},target=/data,volume-driver=flocker", "busybox",
		"sh", "-c", "echo $SLOT >/data/slot; trap exit TERM; while :; do sleep 0.1; done")
	if got := len(c.running(t, "shards")); got != 3 {
		t.Errorf("%d tasks run, want 3", got)
	}
	for _, h := range c.Hosts {
		if got, want := volumes(t, h), []string{"data-1", "data-2", "data-3"}; !slices.Equal(got, want) {
			t.Errorf("%s lists %v, want %v", h.Name, got, want)
		}
	}
	manager.Run(t, "service", "rm", "shards")
	for i, h := range c.Hosts {
		volume := fmt.Sprintf("data-%d", i+1)
		c.assertFree(t, 30*time.Second, volume)
		if got := sh(t, h, volume, "cat /data/slot"); got != fmt.Sprint(i+1) {
			t.Errorf("volume %s was written by replica %q", volume, got)
		}
		c.removeWhenIdle(t, volume)
	}
}

// testSwarmReboot cuts the power of the node that runs a task. Swarm starts the
// task elsewhere, where it is refused its volume until the node is back.
func (c *cluster) testSwarmReboot(t *testing.T) {
	manager := c.Hosts[0]
	manager.Run(t, "service", "create", "--name", "db", "--constraint", "node.hostname!=host1", "--restart-delay", "1s",
		"--mount", "type=volume,source=db,target=/data,volume-driver=flocker", "busybox", "sh", "-c", writer)
	first := c.running(t, "db")[0]
	within(t, 30*time.Second, "it writes", func() error { return first.has(t, `\n.*\n`) })
	last := first.count(t)
	if err := first.h.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("volume db is owned by host %s, which has not been heard from", first.h.Name)
	within(t, time.Minute, "the task is refused elsewhere", func() error {
		errors := manager.Run(t, "service", "ps", "db", "--no-trunc", "--format", "{{.Error}}")
		if !strings.Contains(errors, want) {
			return fmt.Errorf("service ps shows the errors %q, want %q", errors, want)
		}
		return nil
	})
	if err := first.h.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	var again swarmTask
	within(t, 90*time.Second, "the task has its volume again", func() error {
		for _, again = range c.running(t, "db") {
			if again.container != first.container {
				return nil
			}
		}
		return fmt.Errorf("running is %v", again)
	})
	t.Logf("rebooted: from %s to %s", first.h.Name, again.h.Name)
	if got := again.count(t); got < last {
		t.Errorf("the new task sees %d numbers, want at least %d", got, last)
	}
	manager.Run(t, "service", "rm", "db")
	c.removeWhenIdle(t, "db")
}

// A swarmTask is a running task of a service.
type swarmTask struct {
	h               *rig.Host
	container, name string
}

// running waits for at least one running task of a service and returns all.
func (c *cluster) running(t *testing.T, service string) []swarmTask {
	t.Helper()
	var tasks []swarmTask
	within(t, time.Minute, "service "+service+" runs", func() error {
		tasks = nil
		for _, h := range c.Hosts {
			out := h.Run(t, "ps", "--no-trunc", "--filter", "label=com.docker.swarm.service.name="+service, "--format", "{{.ID}} {{.Names}}")
			for line := range strings.Lines(out) {
				id, name, _ := strings.Cut(strings.TrimSpace(line), " ")
				tasks = append(tasks, swarmTask{h, id, name})
			}
		}
		if len(tasks) == 0 {
			return fmt.Errorf("its tasks: %s", c.Hosts[0].Run(t, "service", "ps", service, "--no-trunc", "--format", "{{.Name}} {{.CurrentState}} {{.Error}}"))
		}
		return nil
	})
	return tasks
}

func (s swarmTask) sh(t *testing.T, script string) string {
	t.Helper()
	return s.h.Run(t, "exec", s.container, "sh", "-c", script)
}

// has says whether what the task has written matches.
func (s swarmTask) has(t *testing.T, pattern string) error {
	t.Helper()
	log := s.sh(t, "cat /data/log; true")
	if !regexp.MustCompile(`(?s)` + pattern).MatchString(log) {
		return fmt.Errorf("the log on %s is %q, want a match of %s", s.h.Name, log, pattern)
	}
	return nil
}

// count returns how many numbers are on the volume, with no gap.
func (s swarmTask) count(t *testing.T) int {
	t.Helper()
	out := s.sh(t, `awk '$1 != NR { print "line", NR, "is", $0; exit 1 } END { print NR }' /data/log`)
	n, err := strconv.Atoi(out)
	if err != nil {
		t.Fatalf("the log on %s is damaged: %s", s.h.Name, out)
	}
	return n
}

// removeWhenIdle removes a volume when the containers of its service are gone.
func (c *cluster) removeWhenIdle(t *testing.T, volume string) {
	t.Helper()
	within(t, 30*time.Second, "volume "+volume+" can be removed", func() error {
		var err error
		for _, h := range c.Hosts { // each Docker has its own record of it
			_, failed := h.Docker(t.Context(), "volume", "rm", "-f", volume)
			if failed != nil {
				err = failed
			}
		}
		return err
	})
}
