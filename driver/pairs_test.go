package driver_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
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

var everyPair = flag.Bool("pairs", false, "TestKilledOnBothSides kills at every pair of steps, not at some of them")

// Both hosts of a move or of a takeover are killed, each before, in, or after a step
// of its own: a write to etcd, a call that changes something in the storage or the
// kernel, the journal. They start again in any order. Containers write all the time:
// never two at once, what they were told is written is read by the next one, and in
// the end nothing is left and the volume can be mounted on both. Each seed is one
// pair of steps for each, or every second, kind of storage and cause.
//
//	go test ./driver -run TestKilledOnBothSides/F1,move -seed 17 -seeds 1
func TestKilledOnBothSides(t *testing.T) {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm") // syncing to a disk takes most of the time
	}
	var kinds []fall
	for _, storage := range []string{"F0", "F1", "F1 without ids", "F2"} {
		for _, scene := range []string{"move", "partition", "dead", "off"} {
			if storage != "F0" || scene == "move" || scene == "off" {
				kinds = append(kinds, fall{storage: storage, scene: scene})
			}
		}
	}
	for i, f := range kinds {
		t.Run(f.storage+","+f.scene, func(t *testing.T) {
			if *everyPair {
				f.everyPair(t)
				return
			}
			f.at = [2]int{never, never}
			a, b := f.run(t)
			for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
				if *seeds > 1 && (seed+i)%2 == 0 {
					continue // the other half, so that it takes half the time
				}
				r := rand.New(rand.NewPCG(uint64(seed), uint64(i)))
				// One that comes again after a kill takes more steps than one that does not.
				f.at = [2]int{r.IntN(len(a) + 3), r.IntN(len(b) + 3)}
				f.vary(r)
				t.Run(f.String(), func(t *testing.T) { f.run(t) })
			}
		})
	}
}

// fall is one run: what happens, and at which step each side is killed meanwhile.
type fall struct {
	storage, scene, order string
	at                    [2]int
	power                 [2]bool       // the whole host, not the process alone
	pace                  time.Duration // of each step of the new owner
	late                  time.Duration // of a call that was on its way when its process was killed
	again                 bool          // Docker starts the former owner's container again
}

// never is a step that is not reached.
const never = 1 << 20

// The orders of starting again.
const (
	atOnce      = "at once"
	formerOwner = "the former owner first"
	newOwner    = "the new owner first"
)

func (f *fall) String() string {
	kill := map[bool]string{false: "kill", true: "power"}
	return fmt.Sprintf("%s,%s=%d,%s=%d,pace=%s,late=%s,again=%t", f.order, kill[f.power[0]], f.at[0], kill[f.power[1]], f.at[1], f.pace, f.late, f.again)
}

// vary chooses by chance what is not worth trying with every pair.
func (f *fall) vary(r *rand.Rand) {
	f.order = []string{atOnce, formerOwner, newOwner}[r.IntN(3)]
	f.power = [2]bool{r.IntN(3) == 0, r.IntN(3) == 0}
	f.pace = []time.Duration{0, 0, 300 * time.Millisecond, time.Second}[r.IntN(4)]
	f.late = []time.Duration{time.Second, 5 * time.Second, 15 * time.Second, 50 * time.Second}[r.IntN(4)]
	f.again = r.IntN(2) == 0
}

// everyPair runs every pair of steps: those of a side depend on where the other one
// was killed, so it goes on until there is no such step.
func (f *fall) everyPair(t *testing.T) {
	leftOut := make([]string, 40) // the steps of a run that -run leaves out
	f.at = [2]int{}
	for former := true; former; f.at = [2]int{f.at[0] + 1, 0} {
		former = false
		for next := true; next; f.at[1]++ {
			f.vary(rand.New(rand.NewPCG(uint64(*firstSeed), uint64(f.at[0]<<10+f.at[1]))))
			a, b := leftOut, leftOut
			t.Run(f.String(), func(t *testing.T) { a, b = f.run(t) })
			former, next = former || f.at[0] < len(a), f.at[1] < len(b)
		}
	}
}

// run returns the steps that each side came to.
func (f *fall) run(t *testing.T) (a, b []string) {
	t.Helper()
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
		p := newPair(t, c, f)
		p.play()
		p.end()
		a, b = p.a.steps, p.b.steps
		if t.Failed() {
			t.Logf("the former owner:\n\t%s", strings.Join(a, "\n\t"))
			t.Logf("the new owner:\n\t%s", strings.Join(b, "\n\t"))
		}
	})
	return a, b
}

// pair is the two hosts between which a volume moves.
type pair struct {
	t    *testing.T
	c    *cluster
	f    *fall
	a, b *side // the former owner and the new one
	died chan *side
	todo chan func()
	back func() // the former owner is back

	runs <-chan struct{} // is closed when the former owner's container runs again, or cannot

	vid, device string

	mu      sync.Mutex
	armed   bool
	written byte  // the last record that is on the disk
	token   int64 // of the last mount
}

// side is a host.
type side struct {
	*node
	p       *pair
	at      int
	power   bool
	process *process
	ctx     context.Context // of the process
	exit    context.CancelFunc
	calls   sync.WaitGroup
	lives   int
	sending atomic.Bool // the next call to the storage is late

	// With p.mu.
	steps     []string
	took      map[string]int
	journal   map[string][]byte // as it was at the step before
	container func()            // ends it; nil if there is none
	mountID   string            // its
}

func newPair(t *testing.T, c *cluster, f *fall) *pair {
	p := &pair{t: t, c: c, f: f, died: make(chan *side, 2), todo: make(chan func(), 2), back: func() {}}
	p.a = &side{node: c.nodes["a"], p: p, at: f.at[0], power: f.power[0], took: map[string]int{}}
	p.b = &side{node: c.nodes["b"], p: p, at: f.at[1], power: f.power[1], took: map[string]int{}}
	for _, s := range p.sides() {
		s.ctx, s.exit = context.WithCancel(context.Background())
		s.docker.onKill = func(string) { s.stop() }
	}
	c.store = func(n *node) ownership.Store {
		s := p.side(n.id.ID)
		s.process = &process{}
		return &steppedStore{n.etcd, s, s.process}
	}
	hold := c.cfg
	c.cfg = func(cfg *driver.Config) {
		hold(cfg)
		p.side(cfg.Node.ID).stepped(cfg)
	}
	c.use(map[string]backends.Properties{
		"F0": {Class: backends.ClassNone, CheapAttach: true}, "F1": exclusive, "F1 without ids": nameless, "F2": fenced,
	}[f.storage])
	c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
		s := p.side(call.Node)
		switch call.Method {
		case "Attach", "Detach", "Fence":
			if call.Done {
				s.step(s.process, "after "+call.Method)
				break
			}
			s.step(s.process, "before "+call.Method)
			if p.f.storage != "F0" {
				s.sending.Store(s.step(s.process, sending+call.Method))
			}
		default:
			s.process.exitIfDead()
		}
		return nil
	})
	c.storage.Inject(func(call backendtest.Call) (fault backendtest.Fault) {
		if p.side(call.Node).sending.Swap(false) {
			fault.Late = f.late
		}
		return fault
	})
	return p
}

// sending begins the name of a step at which a call has been sent, and takes effect
// when the process that sent it is dead.
const sending = "sending "

func (p *pair) sides() []*side { return []*side{p.a, p.b} }

func (p *pair) side(id string) *side {
	if id == p.a.id.ID {
		return p.a
	}
	return p.b
}

// unwritten ends the name of a step at which the journal is still to be written.
const unwritten = ", journal unwritten"

// stepped makes what a new process does to the kernel a step.
func (s *side) stepped(cfg *driver.Config) {
	cfg.MountRoot = filepath.Join(filepath.Dir(s.stateDir), s.name+"-mnt")
	process, fake := s.process, cfg.Mounter.(*mount.Fake)
	fake.SetHook(func(call, _ string) error {
		switch call {
		case mount.CallMounted, mount.CallHealth:
			process.exitIfDead()
			return nil
		case mount.CallMount: // the journal is written meanwhile
			s.step(process, "before mount"+unwritten)
			time.Sleep(time.Nanosecond)
		}
		s.step(process, "before "+call)
		return nil
	})
	fake.SetAfter(func(call, _ string) error {
		switch call {
		case mount.CallMounted, mount.CallHealth:
			process.exitIfDead()
			return nil
		case mount.CallMount:
			s.mounted()
			s.step(process, "after mount"+unwritten)
		}
		s.step(process, "after "+call)
		return nil
	})
}

// steppedStore makes what a process writes to etcd a step.
type steppedStore struct {
	ownership.Store
	s       *side
	process *process
}

func (e *steppedStore) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	e.process.exitIfDead()
	what := ""
	for _, op := range txn.Then {
		if kind := strings.Split(op.Key, "/"); what == "" && op.Kind != ownership.OpGet && len(kind) > 3 {
			what = map[bool]string{true: "delete ", false: "put "}[op.Kind == ownership.OpDelete] + kind[3]
		}
	}
	if what == "" {
		return e.Store.Txn(ctx, txn)
	}
	e.s.step(e.process, "before "+what)
	if e.s.step(e.process, sending+what) {
		time.AfterFunc(min(e.s.p.f.late, 20*time.Second), func() { _, _ = e.Store.Txn(context.WithoutCancel(ctx), txn) })
		runtime.Goexit()
	}
	res, err := e.Store.Txn(ctx, txn)
	if what == "put own" && res.Succeeded && e.s == e.s.p.b {
		select {
		case e.s.p.todo <- e.s.p.back:
		default: // it is back
		}
	}
	e.s.step(e.process, "after "+what)
	return res, err
}

func (e *steppedStore) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, int64, error) {
	e.process.exitIfDead()
	return e.Store.KeepAliveOnce(ctx, lease)
}

func (e *steppedStore) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	e.process.exitIfDead()
	return e.Store.Grant(ctx, ttl)
}

// step is a moment at which a process may be killed. The goroutine that comes there
// ends then, and each other one of the process with its next call. Sent says that it
// ends when it has sent that call.
func (s *side) step(process *process, what string) (sent bool) {
	p := s.p
	process.exitIfDead()
	if s == p.b && strings.HasPrefix(what, "before ") {
		time.Sleep(p.f.pace)
		process.exitIfDead()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.write()
	if !p.armed || s.took[what] == 3 { // what is repeated is the same
		return false
	}
	s.took[what]++
	s.steps = append(s.steps, fmt.Sprintf("%s %d.%s", time.Now().Format("04:05.000"), len(s.steps), what))
	if len(s.steps)-1 != s.at {
		s.journal = s.records()
		return false
	}
	process.dead.Store(true)
	s.lives++
	next := filepath.Join(filepath.Dir(s.stateDir), fmt.Sprintf("%s-%d", s.name, s.lives))
	copyState(p.t, s.stateDir, next)
	s.stateDir = next
	if strings.HasSuffix(what, unwritten) {
		s.restoreRecords()
	}
	if s.power {
		s.reboot()
	}
	end := s.exit // of the calls of Docker's that this process serves
	bury := func() { end(); p.died <- s }
	if strings.HasPrefix(what, sending) {
		time.AfterFunc(time.Millisecond, bury)
		return true
	}
	bury()
	runtime.Goexit()
	return false
}

func (s *side) records() map[string][]byte {
	records := map[string][]byte{}
	files, _ := filepath.Glob(filepath.Join(s.stateDir, "volumes", "*.json"))
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil {
			records[filepath.Base(f)] = data
		}
	}
	return records
}

func (s *side) restoreRecords() {
	dir := filepath.Join(s.stateDir, "volumes")
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	for name, data := range s.journal {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
	}
	if err != nil {
		s.p.t.Error(err)
	}
}

// reboot needs p.mu.
func (s *side) reboot() {
	if s.container != nil {
		s.docker.set("db")
	}
	s.container = nil
	s.kernel.Reboot()
	s.c.storage.Reboot(s.id.ID)
	s.id.Boot += "+"
}

// mounted asserts that only the owner mounts, under a token that is not older than
// that of any mount before.
func (s *side) mounted() {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	owner, _ := p.c.owner(p.vid)
	if p.vid != "" && (owner.Node != s.id.ID || owner.Pending != nil || owner.Token < p.token) {
		p.t.Errorf("mounted on %s, while the owner is %+v, and the token was %d before", s.name, owner, p.token)
	}
	p.token = owner.Token
}

// write lets every container write a record and sync it; needs p.mu.
func (p *pair) write() {
	var writers []string
	for _, s := range p.sides() {
		if s.container == nil || s.kernel.Write(p.device) != nil {
			continue
		}
		err := s.onDisk(func(d backendtest.Device) error { _, err := d.WriteAt([]byte{p.written + 1}, 0); return err })
		switch {
		case err == nil:
			p.written++
			writers = append(writers, s.name)
		case s.kernel.Write(p.device) == nil: // it was not cut off in that moment
			p.t.Errorf("%s was told that it has written, which it has not: %v", s.name, err)
		}
	}
	if len(writers) > 1 {
		p.t.Errorf("two writers: %v", writers)
	}
}

// read asserts that the last record that was written is on the disk.
func (s *side) read() {
	got := []byte{0}
	if err := s.onDisk(func(d backendtest.Device) error { _, err := d.ReadAt(got, 0); return err }); err != nil {
		s.p.t.Errorf("read on %s: %v", s.name, err)
	}
	if got[0] != s.p.written {
		s.p.t.Errorf("%s reads record %d, want %d, which was acknowledged", s.name, got[0], s.p.written)
	}
}

func (s *side) onDisk(do func(backendtest.Device) error) error {
	disk, err := s.c.storage.Open(s.id.ID, s.p.device)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }()
	return do(disk)
}

// call is a call of Docker's, which ends with the process that serves it.
func (s *side) call(do func(ctx context.Context, d *driver.Driver)) (done <-chan struct{}) {
	ended := make(chan struct{})
	ctx, cancel := context.WithTimeout(s.ctx, 100*time.Second)
	d := s.Driver
	s.calls.Go(func() {
		defer close(ended)
		defer cancel()
		if ctx.Err() == nil {
			do(ctx, d)
		}
	})
	return ended
}

// run is `docker run -v db:/data`.
func (s *side) run(id string) (done <-chan struct{}) {
	process := s.process
	return s.call(func(ctx context.Context, d *driver.Driver) {
		_, err := d.Mount(ctx, "db", id)
		s.p.mu.Lock()
		defer s.p.mu.Unlock()
		if err != nil || process.dead.Load() {
			s.p.t.Logf("%s: mount: %v", s.name, err)
			return
		}
		s.container, s.mountID = s.kernel.Hold(s.p.device), id
		s.docker.set("db", "c-"+s.name)
		s.read()
		s.p.write()
	})
}

// stop ends the container.
func (s *side) stop() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.container != nil {
		s.container()
		s.container = nil
		s.docker.set("db")
	}
}

func (s *side) running() bool {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	return s.container != nil
}

// up starts a process if there is none.
func (s *side) up() {
	s.p.mu.Lock()
	dead := s.process.dead.Load()
	s.p.mu.Unlock()
	if !dead {
		return
	}
	s.exit()
	s.kill()
	s.calls.Wait()
	s.ctx, s.exit = context.WithCancel(context.Background())
	started := make(chan struct{})
	go func() { // which ends where it is killed
		defer close(started)
		s.startWith(s.ctx, false)
	}()
	<-started
}

// await waits for done, and meanwhile does what else is due.
func (p *pair) await(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case s := <-p.died:
			if p.f.order == atOnce {
				s.up()
				p.again(s)
			}
		case do := <-p.todo:
			do()
		}
	}
}

// again starts the former owner's container, once.
func (p *pair) again(s *side) {
	if s == p.a && p.f.again && !s.running() && p.runs == nil {
		p.runs = s.run("again")
	}
}

func (p *pair) sleep(d time.Duration) {
	ctx, cancel := context.WithTimeout(p.t.Context(), d)
	defer cancel()
	p.await(ctx.Done())
}

// play lets the volume move until the new owner has it, with the deaths there are.
func (p *pair) play() {
	a, b := p.a, p.b
	a.create("db", nil)
	p.vid, p.device = a.status("db")["id"].(string), p.c.device("db")
	if p.await(a.run("id1")); !a.running() {
		p.t.Fatal("not mounted at the beginning")
	}
	p.sleep(20 * time.Second)
	p.begin()
	p.mu.Lock()
	p.armed = true
	p.mu.Unlock()

	p.await(b.run("id2"))
	if p.f.order == newOwner && !b.running() {
		b.up()
		p.await(b.run("id3"))
	}
	p.back()
	a.up()
	p.again(a)
	p.sleep(30 * time.Second)
	b.up()
	if p.runs != nil {
		p.await(p.runs)
		p.sleep(time.Minute)
	}
	p.mustRun(b, "id4")
	p.sleep(2 * time.Minute) // there may be steps that are still to come
	p.mu.Lock()
	p.armed = false
	p.mu.Unlock()
	a.up()
	b.up()
	p.sleep(30 * time.Second)
}

// begin is why the volume moves.
func (p *pair) begin() {
	a, b := p.a, p.b
	switch p.f.scene {
	case "move":
		time.AfterFunc(time.Second, func() {
			p.todo <- func() { p.stop(a, "id1") }
		})
		return
	case "partition":
		a.partition(true)
		p.back = sync.OnceFunc(func() { a.partition(false) })
	case "dead", "off":
		a.kill()
		a.process.dead.Store(true)
		p.back = sync.OnceFunc(a.up)
	}
	if p.f.scene == "off" {
		p.mu.Lock()
		a.reboot()
		p.mu.Unlock()
	}
	p.sleep(20 * time.Second)
	if p.f.storage == "F0" {
		if _, err := b.ConfirmDead(p.t.Context(), "a", ownership.Death{By: "op", Evidence: "it is off"}); err != nil {
			p.t.Fatal(err)
		}
	}
}

// stop is `docker stop`. Docker does not try again if the plugin is not there.
func (p *pair) stop(s *side, id string) {
	s.stop()
	s.call(func(ctx context.Context, d *driver.Driver) { _ = d.Unmount(ctx, "db", id) })
}

// mustRun runs a container, which may take several tries.
func (p *pair) mustRun(s *side, id string) {
	for start := time.Now(); !s.running(); p.sleep(5 * time.Second) {
		if time.Since(start) > 15*time.Minute {
			p.t.Fatalf("the volume cannot be mounted on %s", s.name)
		}
		for _, other := range p.sides() {
			other.up()
			if owner, _ := p.c.owner(p.vid); other.running() && owner.Node == other.id.ID { // it was back in time
				p.stop(other, other.mountID)
			}
		}
		p.await(s.run(id))
	}
}

// end asserts that nobody was hurt, and that nothing is left.
func (p *pair) end() {
	for _, s := range p.sides() {
		if owner, _ := p.c.owner(p.vid); s.running() && owner.Node != s.id.ID {
			p.t.Errorf("a container runs on %s, while the owner is %+v", s.name, owner)
		}
	}
	if p.a.running() {
		p.stop(p.a, p.a.mountID)
	}
	for _, s := range []*side{p.b, p.a, p.b} {
		p.mustRun(s, "last")
		p.mu.Lock()
		before := p.written
		if p.write(); p.written == before {
			p.t.Errorf("the container on %s cannot write", s.name)
		}
		p.mu.Unlock()
		s.stop()
		s.unmount("db", s.mountID)
	}
	p.c.settle(15 * time.Minute)
	p.c.wantNothing()
	if n := p.c.disks.Formats(p.device); n != 1 {
		p.t.Errorf("formatted %d times, want once", n)
	}
}
