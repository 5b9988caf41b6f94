package driver_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

var (
	firstSeed = flag.Int("seed", 1, "the first seed of TestRandom")
	seeds     = flag.Int("seeds", 12, "how many seeds TestRandom runs")
)

// Three nodes do what users, Docker and bad luck make them do, at random: the
// rules that must always hold are checked all the time, and in the end, when
// everything is healed and stopped, nothing is left and every volume can be
// mounted everywhere. A seed decides what is done; the order in which goroutines
// run is not its own, so a failing seed may need a few runs to fail again:
//
//	go test ./driver -run TestRandom -seed 17 -seeds 1 -count 20
func TestRandom(t *testing.T) {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm") // syncing to a disk takes most of the time
	}
	for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			inCluster(t, []string{"a", "b", "c"}, nil, func(t *testing.T, c *cluster) {
				w := newWorld(t, c, uint64(seed))
				for range 250 {
					w.step()
					if w.check(); t.Failed() {
						break
					}
				}
				w.end()
				if t.Failed() {
					t.Logf("seed %d did:\n%s", seed, strings.Join(w.done, "\n"))
				}
			})
		})
	}
}

// world is a cluster that things happen to.
type world struct {
	t     *testing.T
	c     *cluster
	dir   string
	hosts []*host
	props backends.Properties
	busy  chan struct{} // as many calls of Docker as are in flight

	mu   sync.Mutex
	rand *rand.Rand
	done []string
	// deleted is storage that was deleted; a slow Create may have made it again.
	deleted map[string]bool
}

// host is a node with the containers it runs.
type host struct {
	*node
	w          *world
	containers []*container
	off        bool
	oldIDs     map[string][]string // mount ids whose Unmount Docker never sent, by volume
	lives      int
	boots      int
	process    *process
	etcdMode   atomic.Int32
	storage    atomic.Int32 // percent of calls that fail
	kernelMode atomic.Int32 // percent
	slow       atomic.Int32 // most milliseconds a call takes
}

type container struct {
	id, name, volume, vid string
	release               func()
	busy                  bool
}

// process is one life of the plugin. What a dead one still does has no effect.
type process struct{ dead atomic.Bool }

func (p *process) exitIfDead() {
	if p.dead.Load() {
		runtime.Goexit()
	}
}

const (
	etcdFine = iota
	etcdLossy
	etcdAway
)

func newWorld(t *testing.T, c *cluster, seed uint64) *world {
	w := &world{
		t: t, c: c, dir: filepath.Dir(c.nodes["a"].stateDir), busy: make(chan struct{}, 8),
		rand: rand.New(rand.NewPCG(seed, seed)), deleted: map[string]bool{},
	}
	// Each kind of storage in turn; all but the first linger.
	if kinds := []backends.Properties{exclusive, fenced, nameless, {Class: backends.ClassNodeFence, ExclusiveAttach: true}}; seed%5 > 0 {
		w.props = kinds[seed%5-1]
		c.storage = backendtest.NewMemory(w.props)
	}
	c.watchStorage()
	for _, name := range []string{"a", "b", "c"} {
		w.hosts = append(w.hosts, &host{node: c.nodes[name], w: w, oldIDs: map[string][]string{}})
	}
	c.storage.Inject(w.late)
	c.cfg = func(cfg *driver.Config) {
		for _, h := range w.hosts {
			if h.name == cfg.Node.Host {
				h.live(cfg)
			}
		}
	}
	for _, h := range w.hosts {
		h.kill()
		h.start()
	}
	return w
}

// live makes everything a new process does pass through the faults of its host.
func (h *host) live(cfg *driver.Config) {
	w, p := h.w, &process{}
	h.process = p
	cfg.MountRoot = filepath.Join(w.dir, h.name+"-mnt")
	cfg.BusyWait, cfg.Hold = 10*time.Second, hold
	h.docker.mu.Lock()
	h.docker.onKill = h.killed
	h.docker.mu.Unlock()
	fake := cfg.Mounter.(*mount.Fake)
	fake.SetDelay(func(string, string) time.Duration { return w.upTo(&h.slow) })
	fake.SetHook(func(call, _ string) error {
		p.exitIfDead()
		return when(call != mount.CallMounted && w.chance(&h.kernelMode), errors.New("the kernel refuses "+call))
	})
	fake.SetAfter(func(call, _ string) error {
		p.exitIfDead()
		// A Mount that fails leaves nothing mounted, so that is not one of these.
		return when((call == mount.CallFormat || call == mount.CallClose) && w.chance(&h.kernelMode), errors.New("the kernel lost "+call))
	})
	h.etcd.Inject(func(string) ownership.Fault {
		p.exitIfDead()
		switch n := w.intN(100); {
		case h.etcdMode.Load() == etcdAway:
			return ownership.Fault{Hang: true}
		case h.etcdMode.Load() == etcdFine:
			return ownership.Fault{Latency: w.upTo(&h.slow) / 100}
		case n < 10:
			return ownership.Fault{DropReply: true}
		case n < 15:
			return ownership.Fault{Twice: true}
		case n < 20:
			return ownership.Fault{Late: time.Duration(w.intN(20_000)) * time.Millisecond}
		case n < 25:
			return ownership.Fault{Refused: true}
		case n < 28:
			return ownership.Fault{Hang: true}
		}
		return ownership.Fault{Latency: time.Duration(w.intN(500)) * time.Millisecond}
	})
	storage := &faulty{cfg.Backends["memory"], h, p}
	cfg.Backends["memory"] = storage
	if fencer, ok := backends.As[backends.Fencer](storage.Backend); ok {
		cfg.Backends["memory"] = &faultyFencer{storage, fencer}
	}
}

// late is what the storage system makes of a call: while some host has trouble with
// it, calls take effect late, twice, or without an answer. One that names no
// attachment is not sent twice: nobody could tell a duplicate of a call that has been
// answered, so such a backend must not let its client repeat calls. An Attach is late
// so often that it gets in the way of later owners.
func (w *world) late(call backendtest.Call) (f backendtest.Fault) {
	if !slices.ContainsFunc(w.hosts, func(h *host) bool { return h.storage.Load() > 0 }) {
		return f
	}
	switch n := w.intN(100); {
	case n < 5, n >= 60 && call.Method == "Attach":
		f.Late = time.Duration(w.intN(50_000)) * time.Millisecond
	case n < 8 && w.props.LateCalls == 0:
		f.Again = time.Duration(w.intN(50_000)) * time.Millisecond
	case n < 12:
		f.DropReply = true
	}
	return f
}

// killed is the end of the containers of a volume this host has lost. Docker sends
// their Unmounts, or not.
func (h *host) killed(volume string) {
	h.w.log("%s: containers of %s are killed", h.name, volume)
	for _, c := range h.using(volume) {
		h.remove(c)
		if h.w.intN(2) > 0 {
			h.do(50*time.Second, "unmount "+volume+" "+c.id, func(ctx context.Context, d *driver.Driver) error {
				return d.Unmount(ctx, volume, c.id)
			})
		}
	}
}

func (h *host) using(volume string) (using []*container) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for _, c := range h.containers {
		if c.volume == volume {
			using = append(using, c)
		}
	}
	return using
}

// faulty is the storage as one process sees it.
type faulty struct {
	backends.Backend
	h *host
	p *process
}

func (f *faulty) call(ctx context.Context, name string, do func() error) error {
	f.p.exitIfDead()
	fails := func() bool { return f.h.w.chance(&f.h.storage) }
	select {
	case <-time.After(f.h.w.upTo(&f.h.slow)):
	case <-ctx.Done():
	}
	if fails() {
		return fmt.Errorf("the storage refuses %s", name)
	}
	// A call on its way when its process dies still arrives now and then.
	if f.p.dead.Load() && (name == "create" || f.h.w.intN(2) == 0) {
		runtime.Goexit()
	}
	err := do()
	f.p.exitIfDead()
	if err == nil && fails() {
		return fmt.Errorf("the storage's answer to %s was lost", name)
	}
	return err
}

func (f *faulty) Create(ctx context.Context, req backends.CreateRequest) (v backends.Volume, err error) {
	err = f.call(ctx, "create", func() error { v, err = f.Backend.Create(ctx, req); return err })
	return v, err
}

func (f *faulty) Delete(ctx context.Context, ref string) error {
	return f.call(ctx, "delete", func() error {
		err := f.Backend.Delete(ctx, ref)
		f.h.w.mu.Lock()
		defer f.h.w.mu.Unlock()
		f.h.w.deleted[ref] = f.h.w.deleted[ref] || err == nil
		return err
	})
}

func (f *faulty) List(ctx context.Context) (v []backends.Volume, err error) {
	err = f.call(ctx, "list", func() error { v, err = f.Backend.List(ctx); return err })
	return v, err
}

func (f *faulty) Attach(ctx context.Context, req backends.AttachRequest) (a backends.Attachment, err error) {
	err = f.call(ctx, "attach", func() error { a, err = f.Backend.Attach(ctx, req); return err })
	return a, err
}

func (f *faulty) Detach(ctx context.Context, a backends.Attachment) error {
	return f.call(ctx, "detach", func() error {
		if f.h.kernel.InUse(a.Device) && slices.Contains(f.h.attached(), a) {
			return backends.ErrInUse
		}
		return f.Backend.Detach(ctx, a)
	})
}

func (f *faulty) Attachments(ctx context.Context) (a []backends.Attachment, err error) {
	err = f.call(ctx, "attachments", func() error { a, err = f.Backend.Attachments(ctx); return err })
	return a, err
}

// faultyFencer is a faulty of storage that can cut hosts off.
type faultyFencer struct {
	*faulty
	fencer backends.Fencer
}

func (f *faultyFencer) Fence(ctx context.Context, req backends.FenceRequest) (evidence string, err error) {
	err = f.call(ctx, "fence", func() error { evidence, err = f.fencer.Fence(ctx, req); return err })
	return evidence, err
}

func (h *host) attached() []backends.Attachment {
	atts, err := h.c.storage.Node(h.id.ID).Attachments(context.Background())
	if err != nil {
		h.w.t.Error(err)
	}
	return atts
}

func (w *world) intN(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rand.IntN(n)
}

func (w *world) chance(percent *atomic.Int32) bool { return w.intN(100) < int(percent.Load()) }

func (w *world) upTo(ms *atomic.Int32) time.Duration {
	return time.Duration(w.intN(int(ms.Load())+1)) * time.Millisecond
}

func (w *world) log(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = append(w.done, fmt.Sprintf("%s ", time.Now().Format("01-02 15:04:05.000"))+fmt.Sprintf(format, args...))
}

// do makes a call of Docker's, which the process that serves it does not outlive.
func (h *host) do(limit time.Duration, what string, f func(ctx context.Context, d *driver.Driver) error) {
	w, d := h.w, h.Driver
	select {
	case w.busy <- struct{}{}:
	default:
		return // busy enough
	}
	go func() {
		defer func() { <-w.busy }()
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		w.log("%s: %s", h.name, what)
		err := f(ctx, d)
		w.log("%s: %s: %v", h.name, what, err)
	}()
}

// step lets something happen, and some time pass.
func (w *world) step() {
	h := w.hosts[w.intN(len(w.hosts))]
	if h.off {
		w.whileOff(h)
		return
	}
	volume := []string{"v1", "v2"}[w.intN(2)]
	switch n := w.intN(100); {
	case n < 12:
		h.do(100*time.Second, "create "+volume, func(ctx context.Context, d *driver.Driver) error {
			return d.Create(ctx, volume, nil)
		})
	case n < 40:
		h.run(volume)
	case n < 58:
		h.stopOne(w.intN(10) > 0)
	case n < 64:
		h.copy(volume)
	case n < 69:
		h.do(50*time.Second, "remove "+volume, func(ctx context.Context, d *driver.Driver) error {
			return d.Remove(ctx, volume)
		})
	case n < 73:
		h.do(50*time.Second, "list", func(ctx context.Context, d *driver.Driver) error {
			_, err := d.List(ctx)
			return err
		})
	case n < 77:
		h.crash("plugin killed", func() {})
	case n < 79:
		h.crash("plugin disabled by force", func() { h.kernel.DisablePlugin()() })
	case n < 80:
		h.crash("reboot", h.reboot)
	case n < 81:
		h.die("power cut")
		h.reboot()
		h.off = true
	case n < 83:
		w.log("%s: dockerd killed", h.name)
		h.loseContainers()
	case n < 86:
		h.etcdMode.Store(int32(w.intN(3)))
		if h.etcdMode.Load() == etcdAway {
			h.etcd.CutWatches()
		}
		w.log("%s: etcd mode %d", h.name, h.etcdMode.Load())
	case n < 90:
		h.storage.Store([]int32{0, 0, 10, 30, 100}[w.intN(5)])
		h.kernelMode.Store([]int32{0, 0, 0, 10, 30}[w.intN(5)])
		h.slow.Store([]int32{0, 100, 2_000, 40_000}[w.intN(4)])
		w.log("%s: storage fails %d%%, kernel %d%%, calls take up to %d ms", h.name, h.storage.Load(), h.kernelMode.Load(), h.slow.Load())
	case n < 92:
		down := w.intN(2) == 0
		w.log("%s: docker does not answer: %v", h.name, down)
		h.docker.setDown(down)
	case n < 95:
		w.healHost(h)
	case n < 98:
		where := []string{"a", "b", "c", ""}[w.intN(4)]
		h.do(20*time.Second, "place "+volume+" on "+where, func(ctx context.Context, d *driver.Driver) error {
			_, err := d.Move(ctx, volume, where, h.name)
			return err
		})
	default:
		w.log("two minutes pass")
		time.Sleep(2 * time.Minute)
	}
	if w.intN(3) > 0 {
		time.Sleep(time.Duration(w.intN(4_000)) * time.Millisecond)
	}
}

// reboot is what a restart of the host does to what is not the plugin.
func (h *host) reboot() {
	h.loseContainers()
	h.kernel.Reboot()
	h.c.storage.Reboot(h.id.ID)
	h.boots++
	h.id.Boot = fmt.Sprintf("boot-%d", h.boots)
}

// whileOff lets something happen to a host that is switched off: it is switched
// on, or an operator says that it is off, which is true.
func (w *world) whileOff(h *host) {
	switch w.intN(4) {
	case 0:
		w.log("%s: switched on", h.name)
		w.healHost(h) // or it may never get rid of what it has to give up
		h.wake()
	case 1:
		for _, other := range w.hosts {
			if other.off {
				continue
			}
			other.do(10*time.Second, "confirm that "+h.name+" is dead", func(ctx context.Context, d *driver.Driver) error {
				_, err := d.ConfirmDead(ctx, h.name, ownership.Death{By: "op", Evidence: "it is off"})
				return err
			})
			return
		}
	default:
		time.Sleep(10 * time.Second)
	}
}

func (w *world) healHost(h *host) {
	w.log("%s: healed", h.name)
	h.etcdMode.Store(etcdFine)
	h.storage.Store(0)
	h.kernelMode.Store(0)
	h.slow.Store(0)
	h.docker.setDown(false)
}

// run is `docker run -v volume:/data`. Who calls may lose patience.
func (h *host) run(volume string) {
	w := h.w
	id := fmt.Sprintf("id-%s-%d", h.name, w.intN(1_000_000))
	if old := h.oldIDs[volume]; len(old) > 0 && w.intN(2) == 0 {
		id, h.oldIDs[volume] = old[0], old[1:]
	}
	limit := 100 * time.Second
	if w.intN(4) == 0 {
		limit = time.Duration(w.intN(20_000)) * time.Millisecond
	}
	p := h.process
	h.do(limit, "mount "+volume+" "+id, func(ctx context.Context, d *driver.Driver) error {
		path, err := d.Mount(ctx, volume, id)
		if err != nil {
			return err
		}
		if ctx.Err() != nil { // as the server does for a reply that reaches nobody
			back, cancel := context.WithTimeout(context.Background(), 50*time.Second)
			defer cancel()
			return errors.Join(errors.New("nobody waits"), d.Unmount(back, volume, id))
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if p.dead.Load() {
			return errors.New("the answer was lost")
		}
		vid := filepath.Base(filepath.Dir(path))
		device := h.kernel.Mounts()[filepath.Dir(path)]
		if device == "" && w.owner(vid) != h.name {
			return errors.New("lost since")
		}
		if device == "" {
			w.t.Errorf("%s: Mount of %s said %s, where nothing is mounted", h.name, volume, path)
			return nil
		}
		h.containers = append(h.containers, &container{
			id: id, name: "c-" + id, volume: volume, vid: vid, release: h.kernel.Hold(device),
		})
		h.tellDocker()
		return nil
	})
}

// tellDocker needs w.mu.
func (h *host) tellDocker() {
	for _, volume := range []string{"v1", "v2"} {
		var names []string
		for _, c := range h.containers {
			if c.volume == volume {
				names = append(names, c.name)
			}
		}
		h.docker.set(volume, names...)
	}
}

// pick returns a container that nothing is done with, and marks it.
func (h *host) pick() *container {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for _, c := range h.containers {
		if !c.busy {
			c.busy = true
			return c
		}
	}
	return nil
}

func (h *host) remove(c *container) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if i := slices.Index(h.containers, c); i >= 0 {
		h.containers = slices.Delete(h.containers, i, i+1)
		c.release()
		h.tellDocker()
	}
}

// stopOne stops a container. Docker sends no Unmount for a volume that Get does
// not know, and none at all if told is false.
func (h *host) stopOne(told bool) {
	c := h.pick()
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	if _, err := h.Get(ctx, c.volume); errors.Is(err, ownership.ErrNotFound) && h.w.owner(c.vid) == h.name {
		h.w.t.Errorf("%s: Get says that %s is gone, while a container uses it", h.name, c.volume)
	}
	h.remove(c)
	if !told {
		h.w.log("%s: stopped %s, unmount lost", h.name, c.id)
		h.oldIDs[c.volume] = append(h.oldIDs[c.volume], c.id)
		return
	}
	h.do(50*time.Second, "unmount "+c.volume+" "+c.id, func(ctx context.Context, d *driver.Driver) error {
		return d.Unmount(ctx, c.volume, c.id)
	})
}

// copy is `docker cp`, with a running container's own id if there is one.
func (h *host) copy(volume string) {
	id := fmt.Sprintf("cp-%d", h.w.intN(1_000_000))
	c := h.pick()
	if c != nil {
		id, volume = c.id, c.volume
	}
	h.do(100*time.Second, "copy "+volume+" "+id, func(ctx context.Context, d *driver.Driver) error {
		defer func() {
			h.w.mu.Lock()
			defer h.w.mu.Unlock()
			if c != nil {
				c.busy = false
			}
		}()
		if _, err := d.Mount(ctx, volume, id); err != nil {
			return err
		}
		back, cancel := context.WithTimeout(context.Background(), 50*time.Second)
		defer cancel()
		return d.Unmount(back, volume, id)
	})
}

// loseContainers ends all containers without an Unmount.
func (h *host) loseContainers() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for _, c := range h.containers {
		c.release()
		h.oldIDs[c.volume] = append(h.oldIDs[c.volume], c.id)
	}
	h.containers = nil
	h.tellDocker()
}

// crash ends the plugin's process where it is, and starts it again.
func (h *host) crash(what string, then func()) {
	h.die(what)
	then()
	h.wake()
}

// die ends the process. What its goroutines still write goes to a directory nobody
// reads any more.
func (h *host) die(what string) {
	h.w.log("%s: %s", h.name, what)
	h.w.mu.Lock()
	h.process.dead.Store(true)
	h.w.mu.Unlock()
	h.lives++
	next := filepath.Join(h.w.dir, fmt.Sprintf("%s-%d", h.name, h.lives))
	copyState(h.w.t, h.stateDir, next)
	h.stateDir = next
	h.kill()
}

// wake starts a process.
func (h *host) wake() {
	h.off = false
	mode := h.etcdMode.Swap(etcdFine) // or it does not start
	h.start()
	h.etcdMode.Store(mode)
}

func copyState(t *testing.T, from, to string) {
	for _, dir := range []string{"", "volumes"} {
		if err := os.MkdirAll(filepath.Join(to, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(filepath.Join(from, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() || e.Name() == "lock" || strings.HasPrefix(e.Name(), ".tmp-") {
				continue
			}
			data, err := os.ReadFile(filepath.Join(from, dir, e.Name()))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(to, dir, e.Name()), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// owner returns the host that owns a volume, by etcd.
func (w *world) owner(vid string) string {
	owner, _ := w.c.owner(vid)
	return owner.Host
}

// check asserts what holds at any moment: nobody's containers write a volume that
// is not their host's, no disk is formatted twice or used by two hosts, and no owner
// is cut off.
func (w *world) check() {
	if v := w.c.disks.Violations(); len(v) > 0 {
		w.t.Errorf("two writers: %v", v)
	}
	if v := w.c.storage.Violations(); len(v) > 0 {
		w.t.Errorf("an owner was cut off: %v", v)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range w.hosts {
		for _, c := range h.containers {
			owner, _ := w.c.owner(c.vid)
			taking := owner.Pending != nil && owner.Pending.Host == h.name // it may write until it is cut off
			if owner.Host != h.name && !taking && h.kernel.Write(backendtest.DevicePrefix+"m-"+c.vid) == nil {
				w.t.Errorf("container %s runs on %s with volume %s, which is owned by %q", c.name, h.name, c.vid, owner.Host)
			}
		}
	}
	for _, kv := range w.c.etcd.Keys("") {
		if i := strings.Index(kv.Key, "/vol/"); i >= 0 {
			device := backendtest.DevicePrefix + "m-" + kv.Key[i+len("/vol/"):]
			if n := w.c.disks.Formats(device); n > 1 {
				w.t.Errorf("%s was formatted %d times", device, n)
			}
		}
	}
}

// end heals and stops everything. Nothing may be left then, and every volume can
// be mounted on every node in turn.
func (w *world) end() {
	t, c := w.t, w.c
	w.log("the end begins")
	for _, h := range w.hosts {
		if w.healHost(h); h.off {
			h.wake()
		}
	}
	for len(w.busy) > 0 { // containers that are killed meanwhile are unmounted, too
		time.Sleep(time.Second)
	}
	c.settle(time.Minute)
	w.check()
	for _, h := range w.hosts {
		for target, device := range h.kernel.Mounts() {
			vid := filepath.Base(target)
			attached := slices.ContainsFunc(h.attached(), func(a backends.Attachment) bool { return a.Device == device && a.Volume == vid })
			if owner := w.owner(vid); !attached || owner != h.name {
				t.Errorf("%s is mounted on %s; attached there: %v; owner: %q", vid, h.name, attached, owner)
			}
		}
		h.loseContainers()
	}
	for _, name := range []string{"v1", "v2"} {
		if _, err := w.hosts[0].Move(t.Context(), name, "", "end"); err != nil && !errors.Is(err, ownership.ErrNotFound) {
			t.Error(err)
		}
	}
	c.settle(15 * time.Minute)
	if t.Failed() {
		return
	}
	c.wantNothing()
	for _, name := range []string{"v1", "v2"} {
		w.hosts[0].create(name, nil)
		for _, h := range w.hosts {
			h.mount(name, "last")
			h.unmount(name, "last")
		}
	}
	c.settle(15 * time.Minute)
	c.wantNothing()
	w.check()
	for _, kv := range c.etcd.Keys("") {
		if strings.Contains(kv.Key, "/vol/") && strings.Contains(string(kv.Value), `"deleting"`) {
			t.Errorf("tombstone left: %s", kv.Key)
		}
	}
	vols, err := c.storage.Node(w.hosts[0].id.ID).List(t.Context())
	if err != nil || len(vols) < 2 {
		t.Errorf("the storage has %v (%v), want two volumes", vols, err)
	}
	for _, v := range vols {
		// A storage that was made for a volume nobody wants any more may be left when
		// its maker died, but never one that held data.
		known := slices.ContainsFunc(c.etcd.Keys(""), func(kv ownership.KV) bool { return strings.HasSuffix(kv.Key, "/vol/"+v.ID) })
		if n := c.disks.Formats(backendtest.DevicePrefix + v.Ref); n > 0 && !known && !w.deleted[v.Ref] {
			t.Errorf("the storage of the removed volume %s was left", v.ID)
		}
	}
}
