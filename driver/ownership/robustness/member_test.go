package robustness

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// memberEnv makes the test binary a member of etcd instead.
const memberEnv = "FLOCKER_ROBUSTNESS_MEMBER"

// The sockets of a member, in its directory: no other process can take them
// while it is dead.
const (
	peerSocket   = "peer:0"
	clientSocket = "client:0"
)

// memberConfig is what a member's process is told.
type memberConfig struct {
	Name    string
	Data    string // directory
	Cluster string // name=URL of every member
	Peer    string // the URL at which the others reach it
}

// runMember is an etcd until it is killed, or the test's process has ended.
func runMember(config string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
	var cfg memberConfig
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		fail(err)
	}
	peer, err := url.Parse(cfg.Peer)
	if err != nil {
		fail(err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	_ = os.Remove(clientSocket) // of a member that was killed
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = cfg.Name, cfg.Data, cfg.Cluster
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{{Scheme: "unix", Host: peerSocket}}, []url.URL{*peer}
	c.ListenClientUrls = []url.URL{{Scheme: "unix", Host: clientSocket}}
	c.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: cfg.Name + ":2379"}} // nobody uses it
	c.EnableGRPCGateway = false
	// Killing a process loses nothing that the kernel has; the disk is none of the
	// test's business.
	c.UnsafeNoFsync = true
	c.TickMs, c.ElectionMs = 50, 500
	c.LogLevel, c.LogOutputs = "error", []string{"stderr"}
	server, err := embed.StartEtcd(c)
	if err != nil {
		fail(err)
	}
	fail(<-server.Err())
}

// member is one of etcd's, in a process of its own.
type member struct {
	name string
	dir  string

	mu      sync.Mutex
	config  memberConfig
	process *exec.Cmd // nil while it is dead
	stdin   io.Closer
}

// start starts it, unless it runs.
func (m *member) start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process != nil {
		return nil
	}
	config, err := json.Marshal(m.config)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(m.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(self)
	cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, log, log
	cmd.Env = append(os.Environ(), memberEnv+"="+string(config), "GOMAXPROCS=2")
	// In a group of its own it is woken up and ended by the kernel if the test's
	// process dies while it is stopped.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if m.stdin, err = cmd.StdinPipe(); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.process = cmd
	return nil
}

// kill ends it as a power cut would, unless it is dead.
func (m *member) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process == nil {
		return
	}
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
	_ = m.stdin.Close()
	m.process = nil
}

// signal sends it SIGSTOP or SIGCONT, unless it is dead.
func (m *member) signal(s syscall.Signal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process != nil {
		_ = m.process.Process.Signal(s)
	}
}

// TestMembersEnd makes sure that a stopped member does not outlive the process
// of a test that is killed.
func TestMembersEnd(t *testing.T) {
	if os.Getenv("FLOCKER_ROBUSTNESS_ABANDON") != "" {
		m := &member{name: "m", dir: t.TempDir()}
		m.config = memberConfig{Name: "m", Data: m.dir, Cluster: "m=http://127.0.0.1:1", Peer: "http://127.0.0.1:1"}
		if err := m.start(); err != nil {
			t.Fatal(err)
		}
		m.signal(syscall.SIGSTOP)
		fmt.Println(m.process.Process.Pid)
		select {}
	}
	if testing.Short() {
		t.Skip("starts processes")
	}
	parent := exec.Command(os.Args[0], "-test.run=^TestMembersEnd$")
	parent.Env = append(os.Environ(), "FLOCKER_ROBUSTNESS_ABANDON=1", "TMPDIR="+t.TempDir())
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err = fmt.Fscan(out, &pid)
	_ = parent.Process.Kill()
	_ = parent.Wait()
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if syscall.Kill(pid, 0) != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	t.Error("the stopped member outlives the test")
}
