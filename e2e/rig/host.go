package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A Host is one Docker host.
type Host struct {
	// Name is its host name: host1, host2, …
	Name string
	// Addr is its address on the rig's network.
	Addr string
	// Dir is its directory: logs, and lib/, which is its /var/lib.
	Dir string
	// Socket is Docker's API socket, as seen from outside.
	Socket string

	r          *Rig
	m          *machine
	link       string // the switch's end of its cable
	dockerd    *process
	containerd *process
	initiator  *process // of the test storage
	plugin     *process // the plugin as a service of the host
	service    []string // and its settings; nil if there is none
}

func (r *Rig) newHost(n int) *Host {
	h := &Host{
		Name: fmt.Sprintf("host%d", n),
		Addr: fmt.Sprintf(hostNet, hostFirst+n-1),
		link: fmt.Sprintf("port%d", n),
		r:    r,
	}
	h.Dir = filepath.Join(r.Dir, h.Name)
	h.Socket = filepath.Join(h.Dir, "docker.sock")
	h.m = &machine{name: h.Name, dir: h.Dir, shared: r.Shared}
	return h
}

// Boot switches the host on: network, containerd, dockerd. What is on its disk is
// as it was when it was switched off.
func (h *Host) Boot(ctx context.Context) error {
	if err := h.m.boot(ctx); err != nil {
		return err
	}
	if err := h.plugIn(ctx); err != nil {
		return err
	}
	if h.r.store != nil {
		if err := h.StartInitiator(ctx); err != nil {
			return err
		}
	}
	if h.service != nil {
		if err := h.startPlugin(ctx); err != nil {
			return err
		}
	}
	if err := h.startContainerd(ctx); err != nil {
		return err
	}
	return h.StartDockerd(ctx)
}

// plugIn connects the host to the bridge.
func (h *Host) plugIn(ctx context.Context) error {
	pid := fmt.Sprint(h.m.pid)
	// After a power cut the kernel takes its time to remove the old cable; mostly
	// there is none.
	_ = h.r.sw.inNet(ctx, "ip", "link", "del", h.link)
	for _, args := range [][]string{
		{"ip", "link", "add", h.link, "type", "veth", "peer", "name", "eth0", "netns", pid},
		{"ip", "link", "set", h.link, "master", "br0", "up"},
	} {
		if err := h.r.sw.inNet(ctx, args...); err != nil {
			return fmt.Errorf("connect %s: %w", h.Name, err)
		}
	}
	for _, args := range [][]string{
		{"ip", "addr", "add", h.Addr + "/24", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
	} {
		if err := h.m.inNet(ctx, args...); err != nil {
			return fmt.Errorf("connect %s: %w", h.Name, err)
		}
	}
	return nil
}

// path is the PATH of the host's daemons. Engine 29 needs its own runc.
func (h *Host) path() string {
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if h.r.cfg.Engine == Current {
		path = cacheBin() + ":" + path
	}
	return "PATH=" + path
}

// containerdConfig leaves out what Docker does not use, above all Kubernetes'
// interface, which takes seconds to start.
const containerdConfig = `version = 2
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]
[debug]
  level = "warn"
`

// startContainerd starts containerd apart from dockerd, whose own would die with
// it.
func (h *Host) startContainerd(ctx context.Context) error {
	config := filepath.Join(h.Dir, "containerd.toml")
	if err := os.WriteFile(config, []byte(containerdConfig), 0o644); err != nil {
		return err
	}
	p, err := h.m.start(ctx, "containerd", []string{h.path()}, "containerd", "--config", config)
	if err != nil {
		return err
	}
	h.containerd = p
	return h.wait(ctx, p, func() error {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", h.m.pid))
		return err
	})
}

// StartDockerd starts Docker and waits until its API answers.
func (h *Host) StartDockerd(ctx context.Context) error {
	dockerd := "/usr/sbin/dockerd"
	if h.r.cfg.Engine == Current {
		dockerd = filepath.Join(cacheBin(), "dockerd")
	}
	args := []string{
		dockerd,
		"--host", "unix:///run/docker.sock", "--host", "unix://" + h.Socket,
		"--containerd", "/run/containerd/containerd.sock",
	}
	if h.r.cfg.Engine == Debian {
		// Its default is lower, which root may not set on every machine.
		args = append(args, "--oom-score-adjust", "0")
	}
	if h.r.cfg.LiveRestore {
		args = append(args, "--live-restore")
	}
	args = append(args, h.r.cfg.DockerdArgs...)
	// A killed one leaves it, and another process may have the number by now.
	if _, err := h.m.exec(ctx, "rm", "-f", "/run/docker.pid"); err != nil {
		return err
	}
	p, err := h.m.start(ctx, "dockerd", []string{h.path()}, args...)
	if err != nil {
		return err
	}
	h.dockerd = p
	return h.wait(ctx, p, func() error { return h.ping(ctx) })
}

// wait waits until a daemon is ready.
func (h *Host) wait(ctx context.Context, p *process, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("start %s on %s: it ended: %w\n%s", p.name, h.Name, p.err, tail(p.log, 20))
		case <-ctx.Done():
			return fmt.Errorf("start %s on %s: %w: %w\n%s", p.name, h.Name, context.Cause(ctx), err, tail(p.log, 20))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (h *Host) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", h.Socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("docker answers %s", resp.Status)
	}
	return nil
}

// KillDockerd kills Docker as a crash does. containerd, the containers and the
// plugin go on.
func (h *Host) KillDockerd(ctx context.Context) error { return h.dockerd.stop(ctx, syscall.SIGKILL) }

// StopDockerd stops Docker as its service manager does.
func (h *Host) StopDockerd(ctx context.Context) error { return h.dockerd.stop(ctx, syscall.SIGTERM) }

// Kill switches the host off as a power cut does: nothing of it runs any more,
// nothing is mounted, its loop devices are gone. Boot switches it on again.
func (h *Host) Kill(ctx context.Context) error {
	if err := h.m.off(ctx); err != nil {
		return err
	}
	mine, err := loopMarks(h.Dir)
	if err != nil {
		return err
	}
	return detach(ctx, mine.of)
}

// Pause stops every process of the host, containers included, where they are.
// The network stays up: connections are accepted, and nobody answers.
func (h *Host) Pause() error { return h.m.signalAll(syscall.SIGSTOP) }

// Resume lets a paused host go on.
func (h *Host) Resume() error { return h.m.signalAll(syscall.SIGCONT) }

// Partition pulls the host's network cable: packets are lost, connections stay.
func (h *Host) Partition(ctx context.Context) error {
	return h.r.sw.inNet(ctx, "ip", "link", "set", h.link, "down")
}

// Cut loses every packet between the host and "etcd" or the "storage", which is the test
// storage and what was started with Serve. The rest of its network stays as it is.
func (h *Host) Cut(ctx context.Context, from string) error {
	addrs := map[string][]string{"storage": {storeAddr, serviceAddr}}
	for i := range etcdMembers {
		addrs["etcd"] = append(addrs["etcd"], etcdAddr(i))
	}
	if addrs[from] == nil {
		return fmt.Errorf("cut %s: from etcd or from storage, not from %q", h.Name, from)
	}
	return h.m.inNet(ctx, append([]string{"sh", "-ec", `
		if iptables -w -N cut 2>/dev/null; then
			iptables -w -I INPUT -j cut
			iptables -w -I OUTPUT -j cut
		fi
		for addr; do
			iptables -w -A cut -s $addr -j DROP
			iptables -w -A cut -d $addr -j DROP
		done`, "sh"}, addrs[from]...)...)
}

// Heal plugs the host's network cable in again, and undoes every Cut.
func (h *Host) Heal(ctx context.Context) error {
	if err := h.m.inNet(ctx, "sh", "-c", "! iptables -w -n -L cut >/dev/null 2>&1 || iptables -w -F cut"); err != nil {
		return err
	}
	return h.r.sw.inNet(ctx, "ip", "link", "set", h.link, "up")
}

// Docker runs the docker command against the host and returns what it printed.
// The error has its standard error.
func (h *Host) Docker(ctx context.Context, args ...string) (string, error) {
	out, err := output(h.Command(ctx, "docker", args...), "docker "+strings.Join(args, " "))
	if err != nil {
		err = fmt.Errorf("%s: %w", h.Name, err)
	}
	return out, err
}

// Command is a command outside of the host whose environment leads the docker
// command, and what calls it, to the host's Docker: see Env.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "DOCKER_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, h.Env()...)
	return cmd
}

// Env leads the docker command, typed outside of the host, to the host's Docker,
// and docker flocker to its plugin.
func (h *Host) Env() []string {
	return []string{
		"DOCKER_HOST=unix://" + h.Socket,
		"DOCKER_CONFIG=" + filepath.Join(h.r.Dir, "cli"),
		"FLOCKER_CONTROL=" + filepath.Join(h.Dir, "lib", "flocker", "control.sock"),
	}
}

// Run is Docker for tests: a failure ends the test.
func (h *Host) Run(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := h.Docker(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Exec runs a command inside the host, beside its daemons, and returns what it
// printed.
func (h *Host) Exec(ctx context.Context, args ...string) (string, error) {
	out, err := h.m.exec(ctx, args...)
	if err != nil {
		err = fmt.Errorf("%s: %w", h.Name, err)
	}
	return out, err
}

// cacheBin is where `make engine` puts what it builds.
func cacheBin() string {
	if dir := os.Getenv("RIG_BIN"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/root/.cache"
	}
	return filepath.Join(dir, "flocker", "bin")
}

// currentEngine says what is missing to run Current.
func currentEngine() error {
	for _, name := range []string{"dockerd", "runc", "docker-proxy"} {
		if _, err := os.Stat(filepath.Join(cacheBin(), name)); err != nil {
			return errors.New("this test needs Docker Engine 29; `make engine` builds it")
		}
	}
	return nil
}
