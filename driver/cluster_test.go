package driver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// cluster is some nodes with real drivers over an etcd, a storage system and
// kernels in memory, in one synctest bubble.
type cluster struct {
	t       *testing.T
	etcd    *ownership.Memory
	storage *backendtest.Memory
	disks   *mount.FakeDisks
	nodes   map[string]*node
	cfg     func(*driver.Config)
	// store, if not nil, is put between a new process and its connection to etcd.
	store func(*node) ownership.Store
}

// node is a host: what survives the plugin's process, and the process.
type node struct {
	*driver.Driver
	c        *cluster
	name     string
	id       ownership.Node
	stateDir string
	kernel   *mount.FakeKernel
	docker   *fakeDocker

	mounter *mount.Fake
	etcd    *ownership.Faults
	stop    func()
}

// inCluster runs a test with the named nodes.
func inCluster(t *testing.T, names []string, cfg func(*driver.Config), test func(t *testing.T, c *cluster)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{
			t: t, etcd: ownership.NewMemory(), disks: mount.NewFakeDisks(), nodes: map[string]*node{}, cfg: cfg,
			// F0 as loopback is, so that only ownership keeps nodes apart.
			storage: backendtest.NewMemory(backends.Properties{Class: backends.ClassNone, CheapAttach: true}),
		}
		for i, name := range names {
			kernel := mount.NewFakeKernel(name, c.disks, func(device string) (string, bool) {
				return device, strings.HasPrefix(device, backendtest.DevicePrefix)
			})
			c.nodes[name] = &node{
				c: c, name: name, stateDir: filepath.Join(dir, name), kernel: kernel, docker: &fakeDocker{},
				id: ownership.Node{ID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i+1), Host: name, Boot: "boot-1"},
			}
			c.nodes[name].start()
		}
		defer func() {
			for _, n := range c.nodes {
				n.kill()
			}
			if v := c.disks.Violations(); len(v) > 0 {
				t.Errorf("two writers: %v", v)
			}
			if v := c.storage.Violations(); len(v) > 0 {
				t.Errorf("the owner was cut off: %v", v)
			}
		}()
		test(t, c)
	})
}

// start starts the node's plugin process and waits until it is registered.
func (n *node) start() {
	n.c.t.Helper()
	n.startWith(n.c.t.Context(), false)
}

func (n *node) startWith(registered context.Context, partitioned bool) {
	n.c.t.Helper()
	began := time.Now()
	n.etcd = n.c.etcd.Client()
	n.etcd.Partition(partitioned)
	n.mounter = mount.NewFake(n.kernel)
	log := logrus.New()
	log.SetOutput(io.Discard)
	if testing.Verbose() {
		log.SetOutput(n.c.t.Output())
		log.SetLevel(logrus.DebugLevel)
	}
	id := n.id
	id.Session = fmt.Sprint(time.Now().UnixNano())
	seen, err := driver.LoadSeen(n.stateDir)
	if err != nil {
		n.c.t.Fatal(err)
	}
	store := ownership.Store(n.etcd)
	if n.c.store != nil {
		store = n.c.store(n)
	}
	var d *driver.Driver
	m := ownership.New(store, id, ownership.Config{
		Seen:      seen,
		Condemned: func(ctx context.Context, death ownership.Death) error { return d.GiveUp(ctx, death) },
		Healthy:   func() error { return d.Healthy() },
		Keep:      func(seen ownership.Seen) { d.KeepSeen(seen) },
		Now:       func() time.Duration { return time.Since(began) }, Log: log.WithField("node", n.name),
	})
	cfg := driver.Config{
		Node: id, Map: m, Mounter: n.mounter, Docker: n.docker, Log: log.WithField("node", n.name),
		Backends: map[string]backends.Backend{"memory": n.c.storage.Node(id.ID)}, Backend: "memory",
		StateDir: n.stateDir, MountRoot: filepath.Join(n.stateDir, "mnt"), DefaultSize: 1 << 30, DefaultFS: "ext4",
		Linger: 5 * time.Second, BusyWait: 30 * time.Second, Reconcile: 30 * time.Second,
		Ready: func(ctx context.Context, backend string) error {
			known, ok := backends.As[backends.Identifier](n.c.storage.Node(id.ID))
			if !ok {
				return nil
			}
			name, err := known.Identity(ctx)
			if err != nil {
				return err
			}
			return m.Identified(ctx, backend, name)
		},
	}
	if n.c.cfg != nil {
		n.c.cfg(&cfg)
	}
	if d, err = driver.New(cfg); err != nil {
		n.c.t.Fatal(err)
	}
	n.Driver = d
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	wg.Go(func() { _ = d.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		_ = n.etcd.Close()
	})
	soon, giveUp := context.WithTimeout(registered, 10*time.Minute)
	defer giveUp()
	if err := m.Registered(soon); err != nil && registered.Err() == nil {
		n.c.t.Fatal(err)
	}
	synctest.Wait()
}

// kill ends the process, leaving mounts, attachments and keys as they are.
func (n *node) kill() { n.stop() }

// restart is a crash of the process and Docker's immediate restart of it.
func (n *node) restart() {
	n.kill()
	n.start()
}

// during runs f while the step (as mount.Fake or the backend name it) kills the
// process that makes it, before or after its effect: the goroutine ends there,
// and so nothing of the driver's own undo runs.
func (n *node) killedAt(step string, after bool, f func()) {
	hook := func(call string) {
		if call == step {
			runtime.Goexit()
		}
	}
	if after {
		n.mounter.SetAfter(func(call, _ string) error { hook(call); return nil })
	} else {
		n.mounter.SetHook(func(call, _ string) error { hook(call); return nil })
	}
	n.c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
		if call.Done == after {
			hook(call.Method)
		}
		return nil
	})
	n.etcd.Inject(func(call string) ownership.Fault {
		if call == "txn" && step == "txn" && !after {
			runtime.Goexit()
		}
		return ownership.Fault{}
	})
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	<-done
	n.c.storage.SetFault(nil)
	n.mounter.SetHook(nil)
	n.mounter.SetAfter(nil)
	n.etcd.Inject(nil)
	n.restart()
}

func (n *node) create(name string, options map[string]string) {
	n.c.t.Helper()
	if err := n.Create(n.c.t.Context(), name, options); err != nil {
		n.c.t.Fatalf("create %s on %s: %v", name, n.name, err)
	}
}

func (n *node) mount(name, id string) string {
	n.c.t.Helper()
	path, err := n.Mount(n.c.t.Context(), name, id)
	if err != nil {
		n.c.t.Fatalf("mount %s on %s: %v", name, n.name, err)
	}
	return path
}

func (n *node) unmount(name, id string) {
	n.c.t.Helper()
	if err := n.Unmount(n.c.t.Context(), name, id); err != nil {
		n.c.t.Fatalf("unmount %s on %s: %v", name, n.name, err)
	}
}

// status is what Docker is told, after all that watches have brought so far.
func (n *node) status(name string) map[string]any {
	n.c.t.Helper()
	synctest.Wait()
	v, err := n.Get(n.c.t.Context(), name)
	if err != nil {
		n.c.t.Fatalf("get %s on %s: %v", name, n.name, err)
	}
	return v.Status
}

// settle lets everything in the background come to rest.
func (c *cluster) settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// wantNothing asserts that nothing of any volume is mounted, attached, owned or
// journalled.
func (c *cluster) wantNothing() {
	c.t.Helper()
	c.wantNothingButBroken()
	for name, n := range c.nodes {
		if files, _ := filepath.Glob(filepath.Join(n.stateDir, "volumes", "*")); len(files) > 0 {
			c.t.Errorf("%s has journal records %v", name, files)
		}
	}
}

// wantNothingButBroken allows for journal records that were set aside.
func (c *cluster) wantNothingButBroken() {
	c.t.Helper()
	for name, n := range c.nodes {
		if m := n.kernel.Mounts(); len(m) > 0 {
			c.t.Errorf("%s has mounted %v", name, m)
		}
		atts, err := c.storage.Node(n.id.ID).Attachments(c.t.Context())
		if err != nil || len(atts) > 0 {
			c.t.Errorf("%s has attached %v (%v)", name, atts, err)
		}
	}
	for _, kv := range c.etcd.Keys("") {
		for _, kind := range []string{"/own/", "/req/"} {
			if strings.Contains(kv.Key, kind) {
				c.t.Errorf("left in etcd: %s = %s", kv.Key, kv.Value)
			}
		}
	}
}

// device is the one device path a volume has on every node.
func (c *cluster) device(name string) string {
	for _, n := range c.nodes {
		vols, err := c.storage.Node(n.id.ID).List(c.t.Context())
		if err != nil {
			c.t.Fatal(err)
		}
		for _, v := range vols {
			if v.Name == name {
				return backendtest.DevicePrefix + v.Ref
			}
		}
	}
	c.t.Fatalf("no volume %s in the storage", name)
	return ""
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
}

// fakeDocker is the Engine's answer to "which containers use this volume".
type fakeDocker struct {
	mu   sync.Mutex
	uses map[string][]string
	down bool
	dead []string
	// onKill is what the kernel does when a volume's containers end.
	onKill func(volume string)
}

func (f *fakeDocker) set(volume string, containers ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.uses == nil {
		f.uses = map[string][]string{}
	}
	f.uses[volume] = containers
}

func (f *fakeDocker) setDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

func (f *fakeDocker) Using(_ context.Context, volume string) ([]driver.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return nil, errors.New("docker is down")
	}
	var list []driver.Container
	for _, name := range f.uses[volume] {
		list = append(list, driver.Container{Name: name, State: "running"})
	}
	return slices.Clone(list), nil
}

func (f *fakeDocker) Kill(_ context.Context, volume, _ string) ([]string, error) {
	f.mu.Lock()
	if f.down {
		f.mu.Unlock()
		return nil, errors.New("docker is down")
	}
	killed, onKill := f.uses[volume], f.onKill
	delete(f.uses, volume)
	f.dead = append(f.dead, killed...)
	f.mu.Unlock()
	if onKill != nil && len(killed) > 0 {
		onKill(volume)
	}
	return killed, nil
}

// killed returns the containers that were.
func (f *fakeDocker) killed() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.dead)
}

// startPartitioned starts the process while etcd does not answer.
func (n *node) startPartitioned() {
	n.c.t.Helper()
	n.startWith(canceled(), true)
}

func damageJournal(t *testing.T, stateDir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(stateDir, "volumes", "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no journal records to damage: %v %v", files, err)
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte(`{"version":1,"id":"`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
