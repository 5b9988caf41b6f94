// Package rig runs several real Docker hosts on one machine, for tests, the demo
// and the benchmark.
//
// Each host is a set of namespaces of its own: mount, network, process, host name
// and IPC. They are joined by a bridge in a network namespace of its own, so that
// neither the machine's network nor its firewall is touched. In each host run a
// containerd, a dockerd and, when asked for, Flocker as a managed plugin.
//
// Everything of a run is below one directory of /var/tmp/flocker-rig and inside
// the namespaces. The processes are bound to the one that started the rig: if
// that is killed, they are too, and the kernel takes the namespaces down; what it
// leaves (the directory, loop devices, control groups) the next Start or Sweep
// removes.
package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Engine is a version of Docker.
type Engine string

// The engines a rig can run.
const (
	// Debian is the engine of Debian 12's docker.io, 20.10.
	Debian Engine = "20.10"
	// Current is Docker Engine 29, made by `make engine`.
	Current Engine = "29"
)

// Config says what rig to start.
type Config struct {
	// Hosts is how many Docker hosts there are; 0 is one.
	Hosts int
	// Engine is what they run; empty is Debian.
	Engine Engine
	// LiveRestore lets containers outlive dockerd. Docker refuses to join a Swarm
	// with it.
	LiveRestore bool
	// Plugin is the directory of the plugin, with config.json and rootfs; empty is
	// what the environment variable RIG_PLUGIN says, or else build/plugin of this
	// source tree.
	Plugin string
	// Secure makes certificates for hosts and etcd, which then has TLS, and the user anna.
	Secure bool
	// DockerdArgs are more arguments for each dockerd.
	DockerdArgs []string
	// Logf gets notes about the rig's own doings; nil drops them.
	Logf func(format string, args ...any)
}

// A Rig is a running set of Docker hosts.
type Rig struct {
	// Hosts are host1, host2, …
	Hosts []*Host
	// Dir is the rig's directory; each host has one of its name in it, with the
	// logs and, in lib/, its /var/lib.
	Dir string
	// Shared is what every host sees as /var/lib/flocker/loopback.
	Shared string
	// Certs is the directory in which docker flocker ca has made certificates, if Secure.
	Certs string

	cfg  Config
	lock *os.File
	sw   *machine // holds the bridge and the etcd members
	etcd []*process
	// etcdProgram is the member's executable.
	etcdProgram string
	store       *TestStore
	plugin      pluginDir
}

// stateRoot is where the rigs of this machine are. It must not be on a tmpfs or
// an overlay, because Docker makes overlays on it.
const stateRoot = "/var/tmp/flocker-rig"

// The rig's network: RFC 2544's, which nothing else uses. It exists inside the
// rig's namespaces only, so that every rig can have the same one.
const (
	bridgeAddr = "198.18.0.1"
	hostNet    = "198.18.0.%d"
	etcdFirst  = 11
	storeAddr  = "198.18.0.21"
	// serviceAddr is that of what Serve is for.
	serviceAddr = "198.18.0.31"
	hostFirst   = 101
)

// New starts a rig for a test, which is skipped (or failed, see Require) where
// the machine cannot run one. When the test ends the rig is closed; when it has
// failed, the ends of all daemons' logs are printed before.
func New(t testing.TB, cfg Config) *Rig {
	t.Helper()
	Require(t, "root", "docker")
	if cfg.Engine == Current {
		require(t, "docker", currentEngine())
	}
	if cfg.Logf == nil {
		cfg.Logf = t.Logf
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	r, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(r.Logs(50))
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := r.Close(ctx); err != nil {
			t.Errorf("close the rig: %v", err)
		}
	})
	return r
}

// Require skips the test if the machine lacks one of root, docker and etcd, or
// fails it if the environment variable REQUIRE, a comma-separated list, names it.
func Require(t testing.TB, needs ...string) {
	t.Helper()
	for _, need := range needs {
		var err error
		switch need {
		case "root":
			if os.Geteuid() != 0 {
				err = errors.New("this test needs root")
			}
		case "docker":
			for _, name := range []string{"dockerd", "docker", "containerd", "tini", "unshare", "ip"} {
				if _, missing := exec.LookPath(name); missing != nil {
					err = fmt.Errorf("this test needs %s; `make deps` installs it", name)
				}
			}
		}
		require(t, need, err)
	}
}

func require(t testing.TB, need string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), need) {
		t.Fatal(err)
	}
	t.Skip(err)
}

// Start starts a rig. If it fails, nothing is left.
func Start(ctx context.Context, cfg Config) (_ *Rig, err error) {
	if cfg.Hosts == 0 {
		cfg.Hosts = 1
	}
	if cfg.Engine == "" {
		cfg.Engine = Debian
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	if err := Sweep(ctx); err != nil {
		cfg.Logf("%v", err)
	}
	r := &Rig{cfg: cfg}
	if err := r.makeDir(); err != nil {
		return nil, fmt.Errorf("start a rig: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start a rig: %w", err)
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			err = errors.Join(err, r.Close(ctx))
		}
	}()
	if err := r.startSwitch(ctx); err != nil {
		return nil, err
	}
	for i := range cfg.Hosts {
		r.Hosts = append(r.Hosts, r.newHost(i+1))
	}
	if cfg.Secure {
		if err := r.certify(ctx); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	if err := r.each(func(h *Host) error { return h.Boot(ctx) }); err != nil {
		return nil, err
	}
	cfg.Logf("%d hosts with engine %s up after %s", cfg.Hosts, cfg.Engine, time.Since(began).Round(10*time.Millisecond))
	return r, nil
}

// makeDir makes the rig's directory and locks it. The lock goes with the process,
// which is how Sweep knows the dead.
func (r *Rig) makeDir() error {
	if err := os.MkdirAll(stateRoot, 0o755); err != nil {
		return err
	}
	all, err := lockFile(filepath.Join(stateRoot, "lock"), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer all.Close()
	if r.Dir, err = os.MkdirTemp(stateRoot, "rig"); err != nil {
		return err
	}
	if r.lock, err = lockFile(filepath.Join(r.Dir, "lock"), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	r.Shared = filepath.Join(r.Dir, "shared")
	plugins := filepath.Join(r.Dir, "cli", "cli-plugins")
	return errors.Join(
		os.Chmod(r.Dir, 0o755),
		os.Mkdir(r.Shared, 0o755),
		os.MkdirAll(plugins, 0o755),
		// Dangling where `make engine` has not run: then `docker compose` is unknown.
		os.Symlink(filepath.Join(cacheBin(), "docker-compose"), filepath.Join(plugins, "docker-compose")),
	)
}

func lockFile(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// startSwitch boots the machine that holds the bridge.
func (r *Rig) startSwitch(ctx context.Context) error {
	r.sw = &machine{name: "switch", dir: filepath.Join(r.Dir, "switch"), shared: r.Shared}
	if err := r.sw.boot(ctx); err != nil {
		return err
	}
	// Without an address of its own the bridge has one of its ports', and another
	// when that host is switched off: the others would not find etcd for a while.
	_, err := r.sw.exec(ctx, "sh", "-euc", `
		ip link add br0 address 02:00:00:00:00:01 type bridge
		ip addr add $0/24 dev br0
		ip link set br0 up
		iptables -P FORWARD ACCEPT
		if [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ]; then
			echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables
		fi`, bridgeAddr)
	return err
}

// certify makes certificates as an operator does, with docker flocker ca, and puts the
// hosts' where the plugin looks for them.
func (r *Rig) certify(ctx context.Context) error {
	from, err := r.pluginSource()
	if err != nil {
		return err
	}
	r.Certs = filepath.Join(r.Dir, "certs")
	made := [][]string{{"init", "rig"}, {"user", "anna"}}
	for i := range etcdMembers {
		// etcd looks at the address from which another member connects, which is the
		// bridge's for all of them.
		made = append(made, []string{"node", etcdName(i), "--ip", etcdAddr(i), "--ip", bridgeAddr})
	}
	for _, h := range r.Hosts {
		made = append(made, []string{"node", h.Name, "--ip", h.Addr})
	}
	if err := os.Mkdir(r.Certs, 0o700); err != nil {
		return err
	}
	for _, args := range made {
		args = append([]string{"ca"}, append(args, "--dir", r.Certs)...)
		cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(from), "docker-flocker"), args...)
		if _, err := output(cmd, "docker flocker "+strings.Join(args, " ")); err != nil {
			return err
		}
	}
	for _, h := range r.Hosts {
		state := filepath.Join(h.Dir, "lib", "flocker")
		if err := os.MkdirAll(state, 0o755); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(r.Certs, h.Name), filepath.Join(state, "certs")); err != nil {
			return err
		}
	}
	return nil
}

// Close switches everything off and removes it. It may be called twice.
func (r *Rig) Close(ctx context.Context) error {
	var errs []error
	for _, m := range r.machines() {
		errs = append(errs, m.off(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if r.lock == nil {
		return nil
	}
	if err := removeDir(ctx, r.Dir); err != nil {
		return err
	}
	err := r.lock.Close()
	r.lock = nil
	return err
}

func (r *Rig) machines() []*machine {
	var all []*machine
	for _, h := range r.Hosts {
		all = append(all, h.m)
	}
	if r.sw != nil {
		all = append(all, r.sw)
	}
	return all
}

// each calls f for all hosts at the same time.
func (r *Rig) each(f func(*Host) error) error {
	errs := make([]error, len(r.Hosts))
	var wg sync.WaitGroup
	for i, h := range r.Hosts {
		wg.Go(func() { errs[i] = f(h) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// chatter are words of the lines that tell nobody anything in a daemon's log.
var chatter = []string{"module=grpc", "kernel parameter", "ignoring event", "loading plugin", "starting signal loop", "shim disconnected"}

// Logs returns the last lines of every daemon's log.
func (r *Rig) Logs(lines int) string {
	var b strings.Builder
	logs, _ := filepath.Glob(filepath.Join(r.Dir, "*", "*.log"))
	for _, log := range logs {
		rel, _ := filepath.Rel(r.Dir, log)
		fmt.Fprintf(&b, "--- %s\n%s\n", rel, tail(log, lines, chatter...))
	}
	return b.String()
}

// Swarm makes a Swarm of all hosts; the first one is its only manager.
func (r *Rig) Swarm(ctx context.Context) error {
	first := r.Hosts[0]
	if _, err := first.Docker(ctx, "swarm", "init", "--advertise-addr", first.Addr); err != nil {
		return err
	}
	token, err := first.Docker(ctx, "swarm", "join-token", "-q", "worker")
	if err != nil {
		return err
	}
	return r.each(func(h *Host) error {
		if h == first {
			return nil
		}
		_, err := h.Docker(ctx, "swarm", "join", "--advertise-addr", h.Addr, "--token", token, first.Addr+":2377")
		return err
	})
}

// Serve makes room on the rig's network for a storage system of the caller's: it has the
// address, if its programs are started with the command enter in front.
func (r *Rig) Serve(ctx context.Context) (addr string, enter []string, err error) {
	if _, err := r.sw.exec(ctx, "ip", "addr", "add", serviceAddr+"/24", "dev", "br0"); err != nil {
		return "", nil, fmt.Errorf("serve on the rig's network: %w", err)
	}
	return serviceAddr, []string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", r.sw.pid), "--"}, nil
}

// Dial connects to an address of the rig's network, which this process is not on.
// addr must be an IP address and port.
func (r *Rig) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", r.sw.pid))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	defer ns.Close()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine instead of going back
		// to the pool in the wrong namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			results <- result{err: err}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		results <- result{conn, err}
	}()
	got := <-results
	return got.conn, got.err
}

// Sweep removes what rigs of dead processes have left on this machine.
func Sweep(ctx context.Context) error {
	if _, err := os.Stat(stateRoot); err != nil {
		return nil
	}
	all, err := lockFile(filepath.Join(stateRoot, "lock"), unix.LOCK_EX)
	if err != nil {
		return fmt.Errorf("sweep old rigs: %w", err)
	}
	defer all.Close()
	dirs, err := filepath.Glob(filepath.Join(stateRoot, "rig*"))
	if err != nil {
		return fmt.Errorf("sweep old rigs: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		lock, err := lockFile(filepath.Join(dir, "lock"), unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue // somebody's, and in use
		}
		errs = append(errs, killInits(ctx, dir), removeDir(ctx, dir), lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep old rigs: %w", err)
	}
	return nil
}

// killInits switches off what still runs of a dead rig.
func killInits(ctx context.Context, dir string) error {
	marks, _ := filepath.Glob(filepath.Join(dir, "*", "init"))
	for _, mark := range marks {
		data, err := os.ReadFile(mark)
		if err != nil {
			return err
		}
		var pid int
		var started string
		if _, err := fmt.Sscan(string(data), &pid, &started); err != nil {
			continue // it was being written
		}
		for startTime(pid) == started {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			select {
			case <-ctx.Done():
				return fmt.Errorf("process %d does not end: %w", pid, context.Cause(ctx))
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// removeDir removes a rig's directory with the loop devices and control groups
// that belong to it. Nothing in it runs any more.
func removeDir(ctx context.Context, dir string) error {
	if err := detachLoops(ctx, dir); err != nil {
		return err
	}
	if err := removeCgroups(dir); err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), " "+dir+"/") {
		return fmt.Errorf("remove %s: something is mounted below it", dir)
	}
	remove := func() error {
		return os.RemoveAll(dir) //nolint:forbidigo // the rig's own directory, and nothing is mounted in it
	}
	if remove() == nil {
		return nil
	}
	// The plugin makes bare mountpoints immutable.
	_, chattrErr := output(exec.CommandContext(ctx, "chattr", "-R", "-f", "-i", dir), "chattr")
	if err := remove(); err != nil {
		return errors.Join(err, chattrErr)
	}
	return nil
}
