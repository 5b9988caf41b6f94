package teststore_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/e2e/apart"
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

var built string // a directory, with what build has made

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "teststore")
	if err != nil {
		return "", err
	}
	built = dir
	path := filepath.Join(dir, "teststore")
	out, err := exec.Command("go", "build", "-o", path, "../../e2e/teststore").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
})

func TestMain(m *testing.M) {
	code := apart.Main(m)
	if built != "" {
		_ = os.RemoveAll(built)
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
	// An address of its own: on that of everybody the port would be another's while the
	// server is down.
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)))
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
	for range 6000 {
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
	for range 3000 {
		if left = s.processes("nbdkit", "nbdfuse"); len(left) == 0 && len(s.loops()) == 0 {
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
			t.Parallel() // they mostly wait
			backendtest.Run(t, backendtest.Config{
				Many: 100,
				New: func(t backendtest.T) backendtest.Storage {
					s := newStorage(t)
					return backendtest.Storage{
						Node: func(cluster, node string) backends.Backend { return s.node(fenced, cluster, node) },
						Open: s.open,
						Down: s.down,
					}
				},
			})
		})
	}
}

// open opens a device on a node. What the initiators of the others have made is not
// there, although all nodes have the kernel in common, and so the numbers.
func (s *storage) open(node, path string, exclusive bool) (backendtest.Device, error) {
	name, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "loop/backing_file"))
	if err != nil {
		return nil, err
	}
	if !strings.Contains(string(name), teststore.FilePrefix(filepath.Join(s.dir, node))) {
		return nil, fmt.Errorf("%s is not a device of %s", path, node)
	}
	flags := os.O_RDWR
	if exclusive {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().Type() != os.ModeDevice {
		err = fmt.Errorf("%s is no block device", path)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return device{f}, nil
}

type device struct{ *os.File }

func (d device) Size() (int64, error) { return d.Seek(0, io.SeekEnd) }

// fixture is a storage with a volume.
type fixture struct {
	*storage
	t    *testing.T
	a, b *teststore.Store
	vol  backends.Volume
}

func newFixture(t *testing.T, fenced bool) fixture {
	t.Helper()
	needRoot(t)
	s := newStorage(t)
	f := fixture{storage: s, t: t, a: s.node(fenced, "", "a"), b: s.node(fenced, "", "b")}
	vol, err := f.a.Create(t.Context(), f.request())
	if err != nil {
		t.Fatal(err)
	}
	f.vol = vol
	t.Cleanup(func() { // a failed test, too, leaves nothing attached
		for _, node := range []*teststore.Store{f.a, f.b} {
			atts, err := node.Attachments(context.Background())
			for _, att := range atts {
				err = errors.Join(err, node.Detach(context.Background(), att))
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	return f
}

func (f fixture) request() backends.CreateRequest {
	return backends.CreateRequest{ID: uuid.NewString(), Name: "db", Size: 16 << 20}
}

func (f fixture) attachRequest(token int64) backends.AttachRequest {
	return backends.AttachRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Token: token}
}

func (f fixture) attach(s *teststore.Store, token int64) backends.Attachment {
	f.t.Helper()
	att, err := s.Attach(f.t.Context(), f.attachRequest(token))
	if err != nil {
		f.t.Fatal(err)
	}
	return att
}

func (f fixture) detach(s *teststore.Store, att backends.Attachment) {
	f.t.Helper()
	if err := s.Detach(f.t.Context(), att); err != nil {
		f.t.Fatal(err)
	}
}

// fence cuts a off up to a token.
func (f fixture) fence(token int64) {
	f.t.Helper()
	identity, err := f.a.Identity(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	req := backends.FenceRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Node: "a", Identity: identity, Token: token}
	if _, err := f.b.Fence(f.t.Context(), req); err != nil {
		f.t.Fatal(err)
	}
}

// call asks the server itself.
func (f fixture) call(op string, req teststore.Request) teststore.Reply {
	f.t.Helper()
	reply, err := f.peer().Call(f.t.Context(), op, req)
	if err != nil {
		f.t.Fatalf("%s: %v", op, err)
	}
	return reply
}

func (f fixture) grants() []teststore.Grant {
	f.t.Helper()
	return f.call(teststore.OpGrants, teststore.Request{}).Grants
}

func (f fixture) setFaults(faults ...teststore.Fault) (suffered []int) {
	f.t.Helper()
	return f.call(teststore.OpFaults, teststore.Request{Faults: faults}).Suffered
}

func (f fixture) setDataFaults(faults ...teststore.DataFault) {
	f.t.Helper()
	f.call(teststore.OpFaults, teststore.Request{DataFaults: faults})
}

// data is the volume's data at the server.
func (f fixture) data() []byte {
	f.t.Helper()
	file, err := os.Open(filepath.Join(f.dir, "volumes", f.vol.Ref, "data"))
	if err != nil {
		f.t.Fatal(err)
	}
	defer file.Close()
	data := make([]byte, f.vol.Size)
	if _, err := io.ReadFull(file, data); err != nil {
		f.t.Fatal(err)
	}
	return data
}

// writer writes to a device, around all caches and as fast as it can, until it is
// told that it cannot.
type writer struct {
	t      *testing.T
	writes atomic.Int64
	failed chan struct{}
}

func startWriter(t *testing.T, att backends.Attachment) *writer {
	t.Helper()
	device, err := os.OpenFile(att.Device, os.O_RDWR|unix.O_DIRECT|unix.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{t: t, failed: make(chan struct{})}
	go func() {
		defer device.Close()
		defer close(w.failed)
		memory, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			t.Error(err)
			return
		}
		for n := 0; err == nil; n++ {
			memory[n%len(memory)]++
			if _, err = device.WriteAt(memory, int64(n%16)<<20); err == nil {
				w.writes.Add(1)
			}
		}
		if !errors.Is(err, unix.EIO) {
			t.Errorf("write: got %v, want an I/O error", err)
		}
	}()
	t.Cleanup(func() { <-w.failed })
	return w
}

func (w *writer) more() {
	w.t.Helper()
	before := w.writes.Load()
	w.wait("the writer goes on", func() bool { return w.writes.Load() > before+5 })
}

func (w *writer) stuck() {
	w.t.Helper()
	w.wait("the writer gets no answer", func() bool {
		before := w.writes.Load()
		time.Sleep(200 * time.Millisecond)
		return w.writes.Load() == before
	})
	select {
	case <-w.failed:
		w.t.Error("the writer has failed, want it to wait")
	default:
	}
}

// end waits until it has failed.
func (w *writer) end() {
	w.t.Helper()
	began := time.Now()
	select {
	case <-w.failed:
		w.t.Logf("I/O failed after %s", time.Since(began).Round(time.Millisecond))
	case <-time.After(time.Minute):
		w.t.Fatal("I/O hangs, want it to fail")
	}
}

func (w *writer) wait(what string, so func() bool) {
	w.t.Helper()
	for range 6000 {
		if so() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.t.Fatalf("it is not so that %s", what)
}

// TestNothingLate writes as hard as it can while the host is cut off: what the
// volume has when Fence returns it has for good, and no data server is left, whatever
// state it was in.
func TestNothingLate(t *testing.T) {
	for name, fault := range map[string]teststore.DataFault{
		"healthy": {Ref: "no such"}, "slow": {Slow: 10 * time.Millisecond}, "hanging": {Hang: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, true)
			for token := range int64(3) {
				w := startWriter(t, f.attach(f.a, 2*token+1))
				w.more()
				f.setDataFaults(fault)
				if fault.Hang {
					w.stuck()
				}
				f.fence(2*token + 1)
				if left := f.processes("nbdkit", "sh"); len(left) > 0 {
					t.Errorf("processes %v are left", left)
				}
				before := f.data()
				f.setDataFaults()
				w.end()
				time.Sleep(50 * time.Millisecond)
				if !bytes.Equal(f.data(), before) {
					t.Error("the volume was written to after the fence")
				}
				if bytes.Equal(before, make([]byte, len(before))) {
					t.Error("the volume was never written to")
				}
			}
		})
	}
}

// TestFenceSeesTheEnd puts the data on a disk that hangs, so that the data server
// cannot be killed while it writes. As long as it is there, Fence must not say that
// the host is cut off.
func TestFenceSeesTheEnd(t *testing.T) {
	f := newFixture(t, false)
	disk := f.moveToSlowDisk()
	w := startWriter(t, f.attach(f.a, 1))
	w.more()
	if err := disk.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	w.stuck()
	req := backends.FenceRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Node: "a", Token: 1}
	var err error
	if req.Identity, err = f.a.Identity(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		evidence, err := f.b.Fence(t.Context(), req)
		if want := "was killed and has not ended"; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("fence: got %q, %v; want ErrUnavailable with %q", evidence, err, want)
		}
		if _, err := f.b.Attach(t.Context(), f.attachRequest(2)); !errors.Is(err, backends.ErrInUse) {
			t.Errorf("attach on another node: got %v, want ErrInUse", err)
		}
	}
	if err := disk.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	f.fence(1)
	w.end()
	f.detach(f.b, f.attach(f.b, 2))
}

// moveToSlowDisk moves the volume's data to a disk of its own, and returns the
// process that serves it.
func (f fixture) moveToSlowDisk() *os.Process {
	f.t.Helper()
	runtime.LockOSThread() // nbdkit ends with the thread that has started it
	socket, mountpoint := filepath.Join(f.dir, "disk.sock"), filepath.Join(f.dir, "disk")
	if err := os.Mkdir(mountpoint, 0o755); err != nil {
		f.t.Fatal(err)
	}
	start := func(args ...string) *os.Process {
		cmd := exec.Command(args[0], args[1:]...)
		if err := cmd.Start(); err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			_ = unix.Unmount(mountpoint, unix.MNT_DETACH)
		})
		return cmd.Process
	}
	disk := start("nbdkit", "--foreground", "-U", socket, "memory", fmt.Sprint(f.vol.Size))
	f.ready(func(context.Context) error { _, err := os.Stat(socket); return err })
	start("nbdfuse", filepath.Join(mountpoint, "disk"), "nbd+unix:///?socket="+socket)
	f.ready(func(context.Context) error { _, err := os.Stat(filepath.Join(mountpoint, "disk")); return err })
	data := filepath.Join(f.dir, "volumes", f.vol.Ref, "data")
	if err := errors.Join(os.Remove(data), os.Symlink(filepath.Join(mountpoint, "disk"), data)); err != nil {
		f.t.Fatal(err)
	}
	return disk
}

// TestHangingDevice demands that nobody who merely looks has to wait for a data
// server that hangs.
func TestHangingDevice(t *testing.T) {
	f := newFixture(t, false)
	att := f.attach(f.a, 1)
	w := startWriter(t, att)
	w.more()
	f.setDataFaults(teststore.DataFault{Hang: true})
	w.stuck()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if atts, err := f.a.Attachments(ctx); err != nil || !slices.Contains(atts, att) {
		t.Errorf("attachments: %v, %v; want %v", atts, err, att)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	// It has to wait, and comes to nothing also later.
	if err := f.a.Detach(ctx, att); !errors.Is(err, backends.ErrInUse) && ctx.Err() == nil {
		t.Errorf("detach: got %v, want ErrInUse", err)
	}
	device, err := os.Open(att.Device)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.IoctlLoopGetStatus64(int(device.Fd())); err != nil { // as losetup asks
		t.Error(err)
	}
	_ = device.Close()
	f.setDataFaults(teststore.DataFault{Slow: time.Millisecond})
	w.more()
	f.setDataFaults()
	w.more()
	// Other volumes and other hosts were never meant.
	for _, fault := range []teststore.DataFault{{Ref: "no such", Break: true}, {Initiator: "no such", Break: true}} {
		f.setDataFaults(fault)
		w.more()
	}
	f.setDataFaults(teststore.DataFault{Ref: f.vol.Ref, Break: true})
	w.end()
	f.setDataFaults()
	// The grant is still there; a new device works.
	if again := f.attach(f.a, 1); again != att {
		t.Errorf("got %v, want %v", again, att)
	}
	f.detach(f.a, att)
	w = startWriter(t, f.attach(f.a, 1))
	w.more()
	f.fence(1)
	w.end()
}

// TestRestart kills the server: the data goes on, and what was granted and refused
// is so afterwards.
func TestRestart(t *testing.T) {
	f := newFixture(t, false)
	f.fence(5)
	att := f.attach(f.a, 6)
	w := startWriter(t, att)
	w.more()
	f.down(true)
	w.more()
	if atts, err := f.a.Attachments(t.Context()); err != nil || !slices.Contains(atts, att) {
		t.Errorf("attachments without the server: %v, %v; want %v", atts, err, att)
	}
	f.down(false)
	w.more()
	if again := f.attach(f.a, 6); again != att {
		t.Errorf("got %v after the restart, %v before", again, att)
	}
	if _, err := f.b.Attach(t.Context(), f.attachRequest(7)); !errors.Is(err, backends.ErrInUse) {
		t.Errorf("attach on another node: got %v, want ErrInUse", err)
	}
	f.fence(6)
	w.end()
	f.down(true)
	f.down(false)
	if _, err := f.a.Attach(t.Context(), f.attachRequest(6)); err == nil || !strings.Contains(err.Error(), "was cut off") {
		t.Errorf("attach under a token that was cut off before the restart: got %v", err)
	}

	// A data server whose grant did not become durable is not left to anybody.
	w = startWriter(t, f.attach(f.a, 8))
	w.more()
	f.down(true)
	record := filepath.Join(f.dir, "volumes", f.vol.Ref, "record.json")
	data, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	id := f.onlyGrant(data)
	if err := os.WriteFile(record, bytes.ReplaceAll(data, []byte(id), []byte("another")), 0o644); err != nil {
		t.Fatal(err)
	}
	f.down(false)
	w.end()
	f.call(teststore.OpDetach, teststore.Request{Ref: f.vol.Ref, Node: "a", Token: 8, Grant: "another"})
}

// onlyGrant returns the ID of the one grant in a record.
func (f fixture) onlyGrant(record []byte) string {
	f.t.Helper()
	var r struct{ Grants []teststore.Grant }
	if err := json.Unmarshal(record, &r); err != nil || len(r.Grants) != 1 {
		f.t.Fatalf("%s: %v; want one grant", record, err)
	}
	return r.Grants[0].ID
}

// TestLateLogin sends a login again that was overtaken by another.
func TestLateLogin(t *testing.T) {
	f := newFixture(t, false)
	w := startWriter(t, f.attach(f.a, 1))
	grant := f.grants()[0].ID
	login := teststore.Request{Ref: f.vol.Ref, Grant: grant, Sequence: 1}
	if reply, err := f.peer().Call(t.Context(), teststore.OpLogin, login); !errors.Is(err, backends.ErrInvalid) {
		t.Errorf("login: got %+v, %v; want ErrInvalid", reply, err)
	}
	w.more()
	login.Sequence = time.Now().UnixNano()
	f.call(teststore.OpLogin, login)
	w.end()
	login.Grant = "none"
	if reply, err := f.peer().Call(t.Context(), teststore.OpLogin, login); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("login without a grant: got %+v, %v; want ErrNotFound", reply, err)
	}
}

// TestFaults is about calls that fail, are lost, or take effect late.
func TestFaults(t *testing.T) {
	f := newFixture(t, false)
	wantGrants := func(want int) {
		t.Helper()
		if got := f.grants(); len(got) != want {
			t.Errorf("there are %d grants, want %d: %+v", len(got), want, got)
		}
	}
	attach := func(limit time.Duration) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		_, err := f.a.Attach(ctx, f.attachRequest(1))
		return err
	}
	awaitGrants := func(want int) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); len(f.grants()) != want && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		wantGrants(want)
	}
	wantUnavailable := func(err error) {
		t.Helper()
		if !errors.Is(err, backends.ErrUnavailable) {
			t.Errorf("got %v, want ErrUnavailable", err)
		}
	}
	gone := func() {
		t.Helper()
		f.setFaults()
		f.detach(f.a, f.attach(f.a, 1))
		wantGrants(0)
	}

	f.setFaults(teststore.Fault{Op: teststore.OpAttach, Refuse: true, Times: 1})
	wantUnavailable(attach(time.Minute))
	wantGrants(0)
	if err := attach(time.Minute); err != nil {
		t.Errorf("the second attach fails, too: %v", err)
	}
	if got := f.setFaults(); !slices.Equal(got, []int{1}) {
		t.Errorf("%v calls have suffered, want [1]", got)
	}
	gone()

	f.setFaults(teststore.Fault{Op: teststore.OpAttach, Drop: true})
	wantUnavailable(attach(time.Minute))
	wantGrants(1)
	gone()

	f.setFaults(teststore.Fault{Op: teststore.OpAttach, Before: 4 * time.Second})
	began := time.Now()
	wantUnavailable(attach(time.Second))
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the caller waited %s, want 1s", took)
	}
	wantGrants(0)
	awaitGrants(1)
	gone()

	f.setFaults(teststore.Fault{Op: teststore.OpAttach, HangUp: true, Before: 2 * time.Second})
	wantUnavailable(attach(time.Minute))
	wantGrants(0)
	awaitGrants(1)
	gone()

	f.setFaults(teststore.Fault{Op: teststore.OpAttach, After: 2 * time.Second})
	wantUnavailable(attach(time.Second))
	awaitGrants(1)
	gone()

	// A detach that is lost, through the initiator; then one that comes late, and
	// finds the attachment of a younger token.
	old := f.attach(f.a, 1)
	f.setFaults(teststore.Fault{Op: teststore.OpDetach, Drop: true, Times: 1}, teststore.Fault{Op: teststore.OpDetach, HangUp: true, Before: 2 * time.Second, Times: 1})
	wantUnavailable(f.a.Detach(t.Context(), old))
	wantGrants(0)
	wantUnavailable(f.a.Detach(t.Context(), old))
	young := f.attach(f.a, 2)
	time.Sleep(3 * time.Second)
	wantGrants(1)
	f.detach(f.a, young)
	// The same token attached once more is another attachment.
	young = f.attach(f.a, 1)
	f.detach(f.b, old)
	f.detach(f.a, old)
	wantGrants(1)
	f.detach(f.a, young)

	// Only what it is meant for.
	identity, err := f.b.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.setFaults(teststore.Fault{Caller: identity, Refuse: true}, teststore.Fault{Ref: f.vol.Ref, Op: teststore.OpResize, Refuse: true})
	if _, err := f.a.List(t.Context()); err != nil {
		t.Error(err)
	}
	_, err = f.b.List(t.Context())
	wantUnavailable(err)
	_, err = f.a.Resize(t.Context(), f.vol.Ref, 32<<20)
	wantUnavailable(err)
	other, err := f.a.Create(t.Context(), f.request())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.a.Resize(t.Context(), other.Ref, 32<<20); err != nil {
		t.Error(err)
	}
	if got := f.setFaults(); !slices.Equal(got, []int{1, 1}) {
		t.Errorf("%v calls have suffered, want [1 1]", got)
	}
}

// TestErrors asserts what people read.
func TestErrors(t *testing.T) {
	f := newFixture(t, false)
	f.fence(3)
	_, err := f.a.Attach(t.Context(), f.attachRequest(3))
	if want := "was cut off from volume " + f.vol.ID + " under token 3, so token 3 is over"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want something with %q", err, want)
	}
	_, err = f.b.Fence(t.Context(), backends.FenceRequest{Ref: f.vol.Ref, Volume: f.vol.ID, Node: "a", Token: 1})
	if want := "an initiator has to be named"; !errors.Is(err, backends.ErrInvalid) || !strings.Contains(err.Error(), want) {
		t.Errorf("fence without an identity: got %v, want ErrInvalid with %q", err, want)
	}
	if _, err := f.a.Get(t.Context(), "tf-"+f.vol.ID); !errors.Is(err, backends.ErrInvalid) {
		t.Errorf("the other class's reference: got %v, want ErrInvalid", err)
	}
	fenced := f.node(true, "", "a")
	if vols, err := fenced.List(t.Context()); err != nil || len(vols) > 0 {
		t.Errorf("the other class lists %v, %v; want none", vols, err)
	}
	att := f.attach(f.a, 4)
	if atts, err := fenced.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("the other class has attached %v, %v; want none", atts, err)
	}
	f.detach(f.a, att)
	nobody := teststore.New(teststore.Config{Socket: filepath.Join(f.dir, "none.sock"), Node: "a"})
	_, err = nobody.List(t.Context())
	if want := "the initiator at " + filepath.Join(f.dir, "none.sock") + " does not answer"; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
		t.Errorf("without an initiator: got %v, want ErrUnavailable with %q", err, want)
	}
}
