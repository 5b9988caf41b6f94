package teststore_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/teststore"
)

func needRoot(tb testing.TB) {
	tb.Helper()
	var err error
	if os.Getuid() != 0 {
		err = errors.New("needs root")
	}
	for _, program := range []string{"nbdkit", "nbdfuse"} {
		if _, missing := exec.LookPath(program); missing != nil {
			err = fmt.Errorf("%w; `make deps` installs it", missing)
		}
	}
	if err == nil {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
		tb.Fatal(err)
	}
	tb.Skip(err)
}

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "teststore")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "teststore")
	out, err := exec.Command("go", "build", "-o", path, "../../e2e/teststore").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if program, err := build(); err == nil {
		_ = os.Remove(program)
		_ = os.Remove(filepath.Dir(program))
	}
	os.Exit(code)
}

// storage is a server and an initiator for each node, all on this machine.
type storage struct {
	t      backendtest.T
	dir    string
	addr   string
	server *exec.Cmd

	mu         sync.Mutex
	initiators map[string]*exec.Cmd // by node
}

// newStorage starts a server. At the end of the test nothing of it may be left.
func newStorage(t backendtest.T) *storage {
	t.Helper()
	// Short: the path of a unix socket may have 107 bytes.
	dir, err := os.MkdirTemp("/tmp", "ts")
	if err != nil {
		t.Fatalf("%v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("%v", err)
	}
	_ = l.Close()
	s := &storage{t: t, dir: dir, addr: l.Addr().String(), initiators: map[string]*exec.Cmd{}}
	t.Cleanup(s.close)
	s.startServer()
	return s
}

func (s *storage) startServer() {
	s.t.Helper()
	s.server = s.start("server", "-dir", filepath.Join(s.dir, "volumes"), "-listen", s.addr)
	s.ready(func(ctx context.Context) error {
		_, err := s.peer().Call(ctx, teststore.OpList, teststore.Request{})
		return err
	})
}

// down kills the server, as a crash does. The data goes on without it.
func (s *storage) down(down bool) {
	if up := s.server.ProcessState == nil; down && up {
		kill(s.server)
	} else if !down && !up {
		s.startServer()
	}
}

func (s *storage) peer() teststore.Peer { return teststore.Server("http://"+s.addr, nil) }

// node returns the backend of a node, whose initiator runs from then on.
func (s *storage) node(fenced bool, cluster, node string) *teststore.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.initiators[node] == nil {
		s.initiators[node] = s.startInitiator(node)
	}
	return teststore.New(teststore.Config{Fenced: fenced, Socket: s.socket(node), Node: node, Cluster: cluster})
}

func (s *storage) socket(node string) string { return filepath.Join(s.dir, node+".sock") }

func (s *storage) startInitiator(node string) *exec.Cmd {
	s.t.Helper()
	cmd := s.start("initiator", "-name", filepath.Join(s.dir, node), "-dir", filepath.Join(s.dir, "mnt"), "-socket", s.socket(node), "-server", "http://"+s.addr)
	s.ready(func(ctx context.Context) error {
		_, err := teststore.Initiator(s.socket(node)).Call(ctx, teststore.OpIdentity, teststore.Request{})
		return err
	})
	return cmd
}

func (s *storage) start(args ...string) *exec.Cmd {
	s.t.Helper()
	program, err := build()
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	// A file: what goes on without it must not keep us waiting for a pipe's end.
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("%v", err)
	}
	return cmd
}

func (s *storage) ready(ask func(context.Context) error) {
	s.t.Helper()
	var err error
	for range 500 {
		if err = ask(s.t.Context()); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.t.Fatalf("%v\n%s", err, s.log())
}

func (s *storage) log() string {
	log, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// close ends everything, and demands that there was nothing else.
func (s *storage) close() {
	// nbdfuse ends by itself, when the kernel has let go of the last device.
	var left []int
	for range 200 {
		if left = s.processes("nbdkit", "nbdfuse"); len(left) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, cmd := range s.initiators {
		kill(cmd)
	}
	kill(s.server)
	for _, pid := range left {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		s.t.Errorf("left behind: process %d: %s", pid, strings.ReplaceAll(string(cmdline), "\x00", " "))
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if loops := s.loops(); len(loops) > 0 {
		s.t.Errorf("left behind: %s", loops)
	}
	if s.t.Failed() {
		s.t.Logf("%s", s.log())
	}
	_ = os.RemoveAll(s.dir)
}

// processes returns those of some programs that have this storage's directory in
// their arguments.
func (s *storage) processes(programs ...string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		program, args, _ := strings.Cut(string(cmdline), "\x00")
		if err == nil && slices.Contains(programs, filepath.Base(program)) && strings.Contains(args, s.dir+"/") {
			var pid int
			_, _ = fmt.Sscan(filepath.Base(dir), &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

// loops returns the loop devices of this storage's initiators.
func (s *storage) loops() (devices []string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		name, err := os.ReadFile(file)
		for node := range s.initiators {
			if err == nil && strings.Contains(string(name), teststore.FilePrefix(filepath.Join(s.dir, node))) {
				devices = append(devices, strings.Split(file, "/")[3])
			}
		}
	}
	return devices
}

func TestContract(t *testing.T) {
	needRoot(t)
	for name, fenced := range map[string]bool{"exclusive": false, "fenced": true} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, backendtest.Config{
				Many: 100,
				New: func(t backendtest.T) backendtest.Storage {
					s := newStorage(t)
					return backendtest.Storage{
						Node: func(cluster, node string) backends.Backend { return s.node(fenced, cluster, node) },
						Down: s.down,
					}
				},
			})
		})
	}
}
