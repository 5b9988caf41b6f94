// Package cephtest runs a Ceph cluster for tests: a monitor and an OSD, Debian's own
// programs, on loopback and below one directory, without systemd.
package cephtest

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
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Cluster is a running cluster.
type Cluster struct {
	// Dir has everything of it. Conf is its ceph.conf.
	Dir, Conf string
	// Keyring is the file with the key of client.flocker, which may what the
	// documentation says.
	Keyring string
	// Monitors are the monitor's addresses.
	Monitors string

	place   Place
	daemons map[string]*daemon
}

// Pool is the pool for volumes; Empty one of which client.flocker may not use anything.
const (
	Pool  = "volumes"
	Empty = "other"
)

type daemon struct {
	process *os.Process
	ended   chan struct{}
}

// Prefix is what the directories of clusters begin with. It is short: sockets are below.
const Prefix = "/tmp/flocker-ceph-"

// Place is where a cluster runs, if not on loopback.
type Place struct {
	// Addr is the address of its daemons.
	Addr string
	// Enter is a command that runs what follows it where that address is.
	Enter []string
}

// Start starts a cluster on loopback, which takes about ten seconds.
func Start(ctx context.Context) (*Cluster, error) {
	return StartAt(ctx, Place{Addr: "127.0.0.1"})
}

// StartAt starts a cluster somewhere.
func StartAt(ctx context.Context, place Place) (c *Cluster, err error) {
	dir, err := os.MkdirTemp("/tmp", strings.TrimPrefix(Prefix, "/tmp/"))
	if err != nil {
		return nil, err
	}
	c = &Cluster{
		Dir: dir, Conf: dir + "/ceph.conf", Keyring: dir + "/flocker.keyring", place: place, daemons: map[string]*daemon{},
	}
	defer func() { //nolint:contextcheck // it is cleaned up whatever ctx says
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, c.Logs())
			c.Stop()
		}
	}()
	if err := os.WriteFile(dir+"/owner", []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return c, err
	}
	fsid := uuid.NewString()
	if err := c.configure(ctx, fsid); err != nil {
		return c, err
	}
	if err := c.monitor(ctx, fsid); err != nil {
		return c, err
	}
	if err := c.osd(ctx); err != nil {
		return c, err
	}
	for _, pool := range []string{Pool, Empty} {
		for _, args := range [][]string{
			{"ceph", "osd", "pool", "create", pool, "8"},
			{"rbd", "pool", "init", pool},
		} {
			if _, err := c.Run(ctx, args...); err != nil {
				return c, err
			}
		}
	}
	if _, err := c.Run(ctx, "rbd", "namespace", "create", Pool+"/spaced"); err != nil {
		return c, err
	}
	key, err := c.Run(ctx, "ceph", "auth", "get-or-create", "client.flocker", "mon", "profile rbd", "osd", "profile rbd pool="+Pool)
	if err != nil {
		return c, err
	}
	return c, os.WriteFile(c.Keyring, []byte(key), 0o600)
}

// configure writes the cluster's ceph.conf. The grace of heartbeats bounds for how long an
// OSD may serve reads that hears nothing of others; one that is alone, and was stopped for
// longer, would take minutes to find out that there are none.
func (c *Cluster) configure(ctx context.Context, fsid string) error {
	ports := []any{c.place.Addr}
	for range 2 {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	c.Monitors = fmt.Sprintf("[v2:%[1]s:%[2]d,v1:%[1]s:%[3]d]", ports...)
	for _, sub := range []string{"mon", "osd", "run", "log"} {
		if err := os.Mkdir(filepath.Join(c.Dir, sub), 0o700); err != nil {
			return err
		}
	}
	text := fmt.Sprintf(`[global]
fsid = %s
mon_host = %s
mon_initial_members = a
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_heartbeat_grace = 3600
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_data_avail_crit = 1
mon_data_avail_warn = 1
public_addr = %[4]s
cluster_addr = %[4]s
run_dir = %[3]s/run
log_file = %[3]s/log/$name.log
mon_data = %[3]s/mon
osd_data = %[3]s/osd
osd_objectstore = bluestore
bluestore_block_size = 8589934592
osd_memory_target = 939524096
[mon]
admin_socket = %[3]s/run/$name.asok
[osd]
admin_socket = %[3]s/run/$name.asok
[client.admin]
keyring = %[3]s/admin.keyring
log_file = /dev/null
[client.flocker]
log_file = /dev/null
`, fsid, c.Monitors, c.Dir, c.place.Addr)
	return os.WriteFile(c.Conf, []byte(text), 0o600)
}

func (c *Cluster) monitor(ctx context.Context, fsid string) error {
	admin, mon, monmap := c.Dir+"/admin.keyring", c.Dir+"/mon.keyring", c.Dir+"/monmap"
	for _, args := range [][]string{
		{"ceph-authtool", "--create-keyring", mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"},
		{"ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"},
		{"ceph-authtool", mon, "--import-keyring", admin},
		{"monmaptool", "--create", "--addv", "a", c.Monitors, "--fsid", fsid, monmap},
		{"ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", mon},
	} {
		if _, err := c.Run(ctx, args...); err != nil {
			return err
		}
	}
	if err := c.start("ceph-mon", "-i", "a"); err != nil {
		return err
	}
	_, err := c.Run(ctx, "ceph", "mon", "stat")
	return err
}

func (c *Cluster) osd(ctx context.Context) error {
	secret, err := c.Run(ctx, "ceph-authtool", "--gen-print-key")
	if err != nil {
		return err
	}
	secret = strings.TrimSpace(secret)
	id, secrets := uuid.NewString(), c.Dir+"/secrets.json"
	if err := os.WriteFile(secrets, fmt.Appendf(nil, `{"cephx_secret": %q}`, secret), 0o600); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"ceph", "osd", "new", id, "-i", secrets},
		{"ceph-authtool", "--create-keyring", c.Dir + "/osd/keyring", "--name", "osd.0", "--add-key", secret},
		{"ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", id},
	} {
		if _, err := c.Run(ctx, args...); err != nil {
			return err
		}
	}
	return c.start("ceph-osd", "-i", "0")
}

// Run runs one of Ceph's programs as the administrator, and returns what it prints.
func (c *Cluster) Run(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	line := slices.Concat(c.place.Enter, args[:1])
	if args[0] != "ceph-authtool" && args[0] != "monmaptool" {
		line = append(line, "--conf", c.Conf)
	}
	line = append(line, args[1:]...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	var errs strings.Builder
	cmd.Stderr = &errs
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), errors.Join(err, ctx.Err()), errs.String())
	}
	return string(out), nil
}

// start starts a daemon, which does not outlive this process.
func (c *Cluster) start(program string, args ...string) error {
	started := make(chan error, 1)
	d := &daemon{ended: make(chan struct{})}
	go func() {
		// The kernel takes the death of this thread for that of the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		line := slices.Concat(c.place.Enter, []string{program, "--conf", c.Conf, "-f"}, args)
		cmd := exec.Command(line[0], line[1:]...) //nolint:noctx // it outlives the call
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		d.process = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // its log says why
		}
		close(d.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	c.daemons[program] = d
	return nil
}

// Pause stops the daemons, so that the cluster answers nobody, or lets them go on.
func (c *Cluster) Pause(paused bool) {
	signal := syscall.SIGCONT
	if paused {
		signal = syscall.SIGSTOP
	}
	for _, d := range c.daemons {
		_ = d.process.Signal(signal) // it may have ended, which shows soon
	}
}

// Logs returns the ends of the daemons' logs.
func (c *Cluster) Logs() string {
	var b strings.Builder
	logs, err := filepath.Glob(c.Dir + "/log/*.log")
	if err != nil {
		return err.Error()
	}
	for _, log := range logs {
		text, err := os.ReadFile(log)
		if err != nil {
			continue
		}
		fmt.Fprintf(&b, "%s ends with\n%s\n", log, text[max(0, len(text)-3000):])
	}
	return b.String()
}

// Stop ends the cluster, and removes its data.
func (c *Cluster) Stop() {
	for _, d := range c.daemons {
		_ = d.process.Kill() // it may have ended
		select {
		case <-d.ended:
		case <-time.After(10 * time.Second):
		}
	}
	Clean(c.Dir)
}

// NeedCeph skips a test without Ceph's programs, or fails it if REQUIRE has ceph.
func NeedCeph(tb testing.TB) {
	tb.Helper()
	for _, program := range []string{"ceph-mon", "ceph-osd", "ceph", "rbd", "rados", "qemu-storage-daemon"} {
		if _, err := exec.LookPath(program); err == nil {
			continue
		}
		for required := range strings.SplitSeq(os.Getenv("REQUIRE"), ",") {
			if required == "ceph" {
				tb.Fatalf("needs the program %s, and REQUIRE says that it is there", program)
			}
		}
		tb.Skipf("needs the program %s: make test-ceph", program)
	}
}
