//go:build e2e

package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestRig proves what the other tests stand on: several real Docker hosts in a
// Swarm, an etcd cluster they reach, an image, the plugin enabled on each, hosts
// that can be cut off and switched off, and nothing left of all that afterwards.
func TestRig(t *testing.T) {
	for _, engine := range []rig.Engine{rig.Debian, rig.Current} {
		t.Run(string(engine), func(t *testing.T) {
			before := machineState(t)
			var dir string
			t.Run("hosts", func(t *testing.T) {
				r := rig.New(t, rig.Config{Hosts: 3, Engine: engine})
				dir = r.Dir
				testHosts(t, r, engine)
			})
			if _, err := os.Stat(dir); dir != "" && !os.IsNotExist(err) {
				t.Errorf("the rig's directory %s is still there", dir)
			}
			checkNothingLeft(t, before)
		})
	}
}

func testHosts(t *testing.T, r *rig.Rig, engine rig.Engine) {
	ctx := t.Context()
	step := stopwatch(t)
	if err := r.Swarm(ctx); err != nil {
		t.Fatal(err)
	}
	step("swarm joined")
	if err := r.ImportImage(ctx); err != nil {
		t.Fatal(err)
	}
	step("image imported")
	endpoints, err := r.Etcd(ctx)
	if err != nil {
		t.Fatal(err)
	}
	step("etcd up")

	first := r.Hosts[0]
	if got := len(strings.Fields(first.Run(t, "node", "ls", "--format", "{{.Hostname}}"))); got != 3 {
		t.Errorf("the Swarm has %d nodes, want 3", got)
	}
	for _, h := range r.Hosts {
		if err := h.InstallPlugin(ctx, map[string]string{"FLOCKER_ETCD_ENDPOINTS": strings.Join(endpoints, ",")}); err != nil {
			t.Fatal(err)
		}
		step("plugin enabled on " + h.Name)
		if got, want := h.Run(t, "plugin", "ls", "--format", "{{.Name}} {{.Enabled}}"), "flocker:latest true"; got != want {
			t.Errorf("plugin ls on %s: %q, want %q", h.Name, got, want)
		}
		if got := h.Run(t, "run", "--rm", "--hostname", "inside", "busybox", "hostname"); got != "inside" {
			t.Errorf("docker run on %s printed %q, want %q", h.Name, got, "inside")
		}
		version := h.Run(t, "version", "--format", "{{.Server.APIVersion}}")
		if old := version == "1.41"; old != (engine == rig.Debian) {
			t.Errorf("%s speaks API %s, which is not that of engine %s", h.Name, version, engine)
		}
		// Each host has an /etc, a /run and a /var/lib of its own, and one shared directory.
		if got, err := h.Exec(ctx, "sh", "-c", "cat /etc/hostname && ls /run/docker.sock && touch /var/lib/flocker/loopback/"+h.Name); err != nil || got != h.Name+"\n/run/docker.sock" {
			t.Errorf("inside %s: %q, %v", h.Name, got, err)
		}
		step("docker run on " + h.Name)
	}
	if got, err := first.Exec(ctx, "ls", "/var/lib/flocker/loopback"); err != nil || got != "host1\nhost2\nhost3" {
		t.Errorf("shared directory: %q, %v", got, err)
	}

	pid, err := first.PluginPID()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.KillPlugin(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Docker starts the plugin again", func() bool {
		again, err := first.PluginPID()
		return err == nil && again != pid
	})
	step("plugin killed")

	if err := first.KillDockerd(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Docker(ctx, "ps"); err == nil {
		t.Error("Docker answers after it was killed")
	}
	if err := first.StartDockerd(ctx); err != nil {
		t.Fatal(err)
	}
	step("dockerd killed and started")

	ping := func(from, to *rig.Host) error {
		_, err := from.Exec(ctx, "busybox", "ping", "-c", "1", "-W", "1", to.Addr)
		return err
	}
	second, third := r.Hosts[1], r.Hosts[2]
	if err := ping(first, third); err != nil {
		t.Errorf("host3 before it is cut off: %v", err)
	}
	if err := third.Partition(ctx); err != nil {
		t.Fatal(err)
	}
	if ping(first, third) == nil {
		t.Error("host3 answers while it is cut off")
	}
	if err := third.Heal(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "host3 answers when it is back", func() bool { return ping(first, third) == nil })

	if err := second.Pause(); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Second)
	if _, err := second.Docker(short, "ps"); err == nil {
		t.Error("host2 answers while it is paused")
	}
	cancel()
	if err := second.Resume(); err != nil {
		t.Fatal(err)
	}
	second.Run(t, "ps")

	second.Run(t, "volume", "create", "-d", "flocker", "-o", "size=32M", "held")
	second.Run(t, "run", "-d", "--name", "sleeper", "-v", "held:/held", "busybox", "sleep", "600")
	if got := attachedLoops(t, r); len(got) != 1 {
		t.Errorf("loop devices with a volume mounted: %q, want one", got)
	}
	step("host cut off, and paused")
	if err := second.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if got := attachedLoops(t, r); len(got) != 0 {
		t.Errorf("loop devices after a power cut: %q, want none", got)
	}
	step("host killed")
	if err := second.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if got := second.Run(t, "ps", "-a", "--format", "{{.Names}} {{.State}}"); got != "sleeper exited" {
		t.Errorf("after a power cut: %q, want %q", got, "sleeper exited")
	}
	step("host booted")

	if err := r.KillEtcd(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.StartEtcd(ctx, 0); err != nil {
		t.Fatal(err)
	}
	step("etcd member killed and started")
}

// TestRigKilled kills a process that runs a rig, and sees the rig go with it.
func TestRigKilled(t *testing.T) {
	if os.Getenv("RIG_CHILD") != "" {
		r := rig.New(t, rig.Config{Logf: func(string, ...any) {}})
		if err := r.ImportImage(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := r.Hosts[0].InstallPlugin(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		r.Hosts[0].Run(t, "volume", "create", "-d", "flocker", "-o", "size=32M", "data")
		r.Hosts[0].Run(t, "run", "-d", "-v", "data:/data", "busybox", "sleep", "600")
		fmt.Println(r.Dir)
		time.Sleep(time.Minute)
		return
	}
	rig.Require(t, "root", "docker")
	before := machineState(t)
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRigKilled$")
	child.Env = append(os.Environ(), "RIG_CHILD=1")
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	dir, err := bufio.NewReader(out).ReadString('\n')
	dir = strings.TrimSpace(dir)
	if _, statErr := os.Stat(dir); err != nil || statErr != nil {
		t.Fatalf("the child says %q, %v, %v", dir, err, statErr)
	}
	for _, kind := range []string{"process", "loop", "rig", "cgroup"} {
		if !slices.ContainsFunc(difference(machineState(t), before), func(s string) bool { return strings.HasPrefix(s, "+ "+kind+" ") }) {
			t.Errorf("no %s of a running rig is seen", kind)
		}
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	eventually(t, "the rig's processes end with the one that started it", func() bool {
		return !slices.ContainsFunc(machineState(t), func(s string) bool {
			return strings.HasPrefix(s, "process ") && strings.Contains(s, dir)
		})
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := rig.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the rig's directory %s is still there", dir)
	}
	checkNothingLeft(t, before)
}

// checkNothingLeft compares the machine with what it was like before. Where another
// rig runs besides, nobody could tell whose something is.
func checkNothingLeft(t *testing.T, before []string) {
	t.Helper()
	after := machineState(t)
	if slices.ContainsFunc(slices.Concat(before, after), func(s string) bool { return strings.HasPrefix(s, "rig ") }) {
		t.Log("another rig runs on this machine: not looking for what is left")
		return
	}
	if got, want := after, before; !slices.Equal(got, want) {
		t.Errorf("left on the machine:\n%s", strings.Join(difference(got, want), "\n"))
	}
}

// attachedLoops returns the loop devices that have a file of the shared directory.
func attachedLoops(t *testing.T, r *rig.Rig) []string {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(r.Shared, "*", "*.img"))
	if err != nil {
		t.Fatal(err)
	}
	var attached []string
	for _, image := range images {
		out, err := exec.CommandContext(t.Context(), "losetup", "-j", image).Output()
		if err != nil {
			t.Fatal(err)
		}
		attached = append(attached, strings.FieldsFunc(string(out), func(c rune) bool { return c == '\n' })...)
	}
	return attached
}

// machineState lists what a rig could leave behind: processes, mounts, network
// links, loop devices of a rig, control groups, directories.
func machineState(t *testing.T) []string {
	t.Helper()
	var state []string
	for what, command := range map[string]string{
		"process": `ps -e -o args= | grep -E 'flocker-rig/rig|^tini -- sleep infinity' | grep -v grep | cut -c1-150`,
		"mount":   `cut -d' ' -f5 /proc/self/mountinfo`,
		"link":    `ip -o link | cut -d: -f2 | cut -d@ -f1`,
		"netns":   `ls /run/netns`,
		"loop":    `cat /sys/block/loop*/loop/backing_file | grep ^/var/lib/flocker/`,
		"cgroup":  `find /sys/fs/cgroup -type d -regextype posix-egrep -regex '.*/[0-9a-f]{64}'`,
		"rig":     `ls -d /var/tmp/flocker-rig/rig*`,
	} {
		out, _ := exec.CommandContext(t.Context(), "sh", "-c", command).Output()
		for line := range strings.Lines(string(out)) {
			state = append(state, what+" "+strings.TrimSpace(line))
		}
	}
	slices.Sort(state)
	return state
}

// difference returns what is in got and not in want, and the other way round.
func difference(got, want []string) []string {
	var d []string
	for _, s := range got {
		if !slices.Contains(want, s) {
			d = append(d, "+ "+s)
		}
	}
	for _, s := range want {
		if !slices.Contains(got, s) {
			d = append(d, "- "+s)
		}
	}
	return d
}

// stopwatch returns a function that logs how long the step before took.
func stopwatch(t *testing.T) func(step string) {
	began := time.Now()
	return func(step string) {
		t.Helper()
		t.Logf("%6.2f s  %s", time.Since(began).Seconds(), step)
		began = time.Now()
	}
}

// eventually waits for up to half a minute until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !so(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 30 s it is not so that %s", what)
		}
	}
}
