package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// hold is FLOCKER_HOLD's default: all settings are the defaults here.
const hold = 3 * time.Second

// takeovers kills the host on which services write, and measures what follows: real
// Docker hosts in a Swarm with its defaults, the managed plugin with its defaults, on
// storage that can cut a host off.
type takeovers struct {
	rig       *rig.Rig
	writers   []*writer
	machine   string   // it is done on
	witnesses string   // directory of the writers' witness files
	endpoints []string // of etcd
	times     samples
	failed    int // Mounts that came to nothing and were repeated
	loads     []float64

	mu    sync.Mutex
	ended map[string]time.Time // when a host's lease was seen to end, by node id
	lines map[*rig.Host][]logLine
}

// A logLine is a line of a plugin's log, and when it was seen: dockerd's own times
// are in whole seconds.
type logLine struct {
	at   time.Time
	text string
}

// A writer writes and syncs records on one volume, on one host, and goes on elsewhere
// when that is killed.
type writer struct {
	name, title, backend string
	// swarm says that Swarm starts it again; otherwise it is started at once.
	swarm bool
	// A volume of the same storage that is none of Flocker's.
	spare, spareID string
}

func newWriters() []*writer {
	return []*writer{
		{name: "serviceF1", title: "Swarm, F1", backend: "teststore", swarm: true},
		{name: "serviceF2", title: "Swarm, F2", backend: "teststore-fenced", swarm: true},
		{name: "plainF1", title: "`docker run` at once, F1", backend: "teststore"},
		{name: "plainF2", title: "`docker run` at once, F2", backend: "teststore-fenced"},
	}
}

// measureTakeovers kills a host that many times.
func measureTakeovers(ctx context.Context, engine rig.Engine, kills int) (_ *takeovers, err error) {
	plugin, err := rig.TestStorePlugin()
	if err != nil {
		return nil, err
	}
	t := &takeovers{writers: newWriters(), ended: map[string]time.Time{}, lines: map[*rig.Host][]logLine{}}
	t.rig, err = rig.Start(ctx, rig.Config{Hosts: 3, Engine: engine, Plugin: plugin})
	if err != nil {
		return nil, err
	}
	t.machine = fmt.Sprintf("%s Docker %s.", machine(t.rig.Dir), engine)
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, t.rig.Logs(15))
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, t.rig.Close(ctx))
	}()
	progress("a Swarm is started")
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	watch, stop := context.WithCancel(ctx)
	defer stop()
	store, err := t.watch(watch)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	for _, h := range t.rig.Hosts {
		go t.follow(watch, h)
	}
	for n := range kills {
		if err := t.kill(ctx, n); err != nil {
			return nil, fmt.Errorf("kill %d: %w", n+1, err)
		}
	}
	return t, nil
}

const writerImage = "writer"

// start starts the Swarm and the services. Its manager is the first host, which is
// never killed.
func (t *takeovers) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Minute, errors.New("not done after 5 minutes"))
	defer cancel()
	t.witnesses = filepath.Join(t.rig.Dir, "witness")
	program := filepath.Join(t.rig.Dir, writerImage)
	if err := errors.Join(os.Mkdir(t.witnesses, 0o755), build(ctx, program, "e2e/chaos/writer")); err != nil {
		return err
	}
	if err := t.rig.ImportProgram(ctx, writerImage, program); err != nil {
		return err
	}
	var err error
	if t.endpoints, err = t.rig.Etcd(ctx); err != nil {
		return err
	}
	if _, err := t.rig.TestStore(ctx); err != nil {
		return err
	}
	settings := map[string]string{"FLOCKER_ETCD_ENDPOINTS": strings.Join(t.endpoints, ","), "FLOCKER_BACKEND": "teststore"}
	if err := errors.Join(t.rig.InstallPlugin(ctx, settings), t.rig.Swarm(ctx)); err != nil {
		return err
	}
	for _, h := range t.rig.Hosts {
		if err := t.up(ctx, h); err != nil {
			return err
		}
	}
	// Swarm spreads services over its hosts when they are made, and leaves them where
	// they are later.
	manager, other := t.rig.Hosts[0], t.rig.Hosts[2].Name
	if _, err := manager.Docker(ctx, "node", "update", "--availability", "drain", other); err != nil {
		return err
	}
	for _, w := range t.writers {
		w.spareID = uuid.NewString()
		volume, err := manager.StoreBackend(w.fenced()).Create(ctx, backends.CreateRequest{ID: w.spareID, Name: "spare", Size: writerSize})
		if err != nil {
			return err
		}
		w.spare = volume.Ref
		if !w.swarm {
			continue
		}
		args := slices.Concat([]string{
			"service", "create", "--quiet", "--no-resolve-image", "--name", w.name,
			"--constraint", "node.role==worker", "--env", "NODE={{.Node.Hostname}}",
		}, t.mounts(w), w.command())
		if _, err := manager.Docker(ctx, args...); err != nil {
			return err
		}
	}
	_, err = manager.Docker(ctx, "node", "update", "--availability", "active", other)
	return err
}

const writerSize = 256 << 20

func (w *writer) fenced() bool { return w.backend == "teststore-fenced" }

func (t *takeovers) mounts(w *writer) []string {
	return []string{
		"--mount", fmt.Sprintf("type=volume,src=%s,dst=/data,volume-driver=flocker,volume-opt=backend=%s,volume-opt=size=%d", w.name, w.backend, writerSize),
		"--mount", "type=bind,src=" + t.witnesses + ",dst=/witness",
	}
}

func (w *writer) command() []string {
	return []string{writerImage, "-volume", w.name, "-kind", string(history.Synced), "-every", "50ms"}
}

// run starts a writer that is none of Swarm's.
func (t *takeovers) run(ctx context.Context, w *writer, h *rig.Host) error {
	_, err := h.Docker(ctx, slices.Concat([]string{"run", "--detach", "--name", w.name, "--env", "NODE=" + h.Name}, t.mounts(w), w.command())...)
	return err
}

// watch notes when leases end, as somebody near etcd sees it.
func (t *takeovers) watch(ctx context.Context) (*clientv3.Client, error) {
	store, err := clientv3.New(clientv3.Config{
		Endpoints:   t.endpoints,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return t.rig.Dial(ctx, "tcp", addr) })},
	})
	if err != nil {
		return nil, err
	}
	const live = "/flocker/v1/live/"
	changes := store.Watch(ctx, live, clientv3.WithPrefix(), clientv3.WithFilterPut())
	go func() {
		for change := range changes {
			t.mu.Lock()
			for _, e := range change.Events {
				t.ended[strings.TrimPrefix(string(e.Kv.Key), live)] = time.Now()
			}
			t.mu.Unlock()
		}
	}()
	return store, nil
}

// kill kills the host that everything is written on, measures, and switches it on
// again.
func (t *takeovers) kill(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Minute, errors.New("not done after 5 minutes"))
	defer cancel()
	victim := t.rig.Hosts[1+n%2]
	if err := t.gather(ctx, victim); err != nil {
		return err
	}
	node, err := nodeID(victim)
	if err != nil {
		return err
	}
	// Heartbeats come every few seconds: any part of that time may have passed.
	if err := sleep(ctx, rand.N(6*time.Second)); err != nil {
		return err
	}
	killed, bootClock := time.Now(), history.Now()
	// First the cable: a host without power says goodbye to nobody.
	if err := errors.Join(victim.Partition(ctx), victim.Kill(ctx)); err != nil {
		return err
	}
	t.loads = append(t.loads, load())

	errs := make([]error, len(t.writers))
	takers := make([]*history.Incarnation, len(t.writers))
	var wg sync.WaitGroup
	for i, w := range t.writers {
		wg.Go(func() { takers[i], errs[i] = t.takeOver(ctx, w, victim, bootClock) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	t.mu.Lock()
	leaseEnd := t.ended[node]
	t.mu.Unlock()
	if leaseEnd.Before(killed) {
		return fmt.Errorf("the lease of %s was not seen to end", victim.Name)
	}
	for i, w := range t.writers {
		s := split{
			killed: killed, leaseEnd: leaseEnd,
			opened: killed.Add(takers[i].Open - bootClock), wrote: killed.Add(takers[i].Writes[0].At - bootClock),
		}
		taker := t.host(takers[i].Node)
		if s.calls, err = t.logged(ctx, taker, killed, w.name); err != nil {
			return err
		}
		if w.swarm {
			if s.task, err = t.taskMade(ctx, w, killed); err != nil {
				return err
			}
		}
		t.failed += s.failed
		s.note(&t.times, w.title)
		if err := t.attachAlone(ctx, w, taker, int64(n)); err != nil {
			return err
		}
		progress(fmt.Sprintf("kill %d, %s, %s → %s: writing again after %s s, ours %s s", n+1, w.title, victim.Name, taker.Name, seconds(s.wrote.Sub(killed)), seconds(s.ours())))
	}
	if err := victim.Boot(ctx); err != nil {
		return err
	}
	return t.up(ctx, victim)
}

// takeOver returns the writer's life on another host than the killed one, once it
// writes there. Nothing that was acknowledged may be missing.
func (t *takeovers) takeOver(ctx context.Context, w *writer, victim *rig.Host, killed time.Duration) (*history.Incarnation, error) {
	before, err := t.last(w)
	if err != nil {
		return nil, err
	}
	if !w.swarm {
		if err := t.run(ctx, w, t.rig.Hosts[0]); err != nil {
			return nil, err
		}
	}
	after, err := t.writes(ctx, w, func(host string) bool { return host != victim.Name }, killed)
	if err != nil {
		return nil, err
	}
	if last := before.LastWrite().Seq; after.Found.Last < last {
		return nil, fmt.Errorf("volume %s: record %d was acknowledged before the kill, and %d is the last there is after it", w.name, last, after.Found.Last)
	}
	return after, nil
}

// gather has all writers write on one host.
func (t *takeovers) gather(ctx context.Context, victim *rig.Host) error {
	for _, w := range t.writers {
		if w.swarm {
			continue // left by Swarm on the one worker there was, or put there by start
		}
		for _, h := range t.rig.Hosts {
			if _, err := h.Docker(ctx, "rm", "--force", w.name); err != nil && !strings.Contains(err.Error(), "No such container") {
				return err
			}
		}
		if err := t.run(ctx, w, victim); err != nil {
			return err
		}
	}
	since := history.Now()
	for _, w := range t.writers {
		if _, err := t.writes(ctx, w, func(h string) bool { return h == victim.Name }, since); err != nil {
			return err
		}
	}
	return t.forget()
}

// writes waits until a writer has written a record on one of some hosts since a time,
// and returns its life there.
func (t *takeovers) writes(ctx context.Context, w *writer, on func(host string) bool, since time.Duration) (*history.Incarnation, error) {
	for {
		last, err := t.last(w)
		if err != nil {
			return nil, err
		}
		if last != nil && on(last.Node) && last.LastWrite().At > since {
			return last, nil
		}
		if sleep(ctx, 100*time.Millisecond) != nil {
			return nil, fmt.Errorf("%s does not write: %w", w.name, context.Cause(ctx))
		}
	}
}

// forget removes the witness files of writers that are gone.
func (t *takeovers) forget() error {
	for _, w := range t.writers {
		last, err := t.last(w)
		if err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(t.witnesses, w.name+".*"))
		if err != nil {
			return err
		}
		for _, file := range files {
			if !strings.HasSuffix(file, "."+last.ID) {
				if err := os.Remove(file); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// last is the life of a writer with the newest record, nil if there is none.
func (t *takeovers) last(w *writer) (last *history.Incarnation, err error) {
	files, err := filepath.Glob(filepath.Join(t.witnesses, w.name+".*"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		i := new(history.Incarnation)
		if err := i.Add(text); err != nil {
			return nil, err
		}
		if len(i.Writes) > 0 && (last == nil || i.LastWrite().At > last.LastWrite().At) {
			last = i
		}
	}
	return last, nil
}

// up waits until a host is a member of everything.
func (t *takeovers) up(ctx context.Context, h *rig.Host) error {
	for {
		nodes, err := h.Docker(ctx, "flocker", "node", "ls")
		if err == nil && regexp.MustCompile(`(?m)^`+h.Name+`\b.*\blive\b`).MatchString(nodes) {
			var ready string
			if ready, err = t.rig.Hosts[0].Docker(ctx, "node", "inspect", "--format", "{{.Status.State}}", h.Name); err == nil && ready == "ready" {
				return nil
			}
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("%s is no member: %w %w\n%s", h.Name, context.Cause(ctx), err, nodes)
		}
	}
}

func (t *takeovers) host(name string) *rig.Host {
	i := slices.IndexFunc(t.rig.Hosts, func(h *rig.Host) bool { return h.Name == name })
	return t.rig.Hosts[i]
}

// nodeID is the host's name in etcd.
func nodeID(h *rig.Host) (string, error) {
	text, err := os.ReadFile(filepath.Join(h.Dir, "lib", "flocker", "node.json"))
	if err != nil {
		return "", err
	}
	var node struct{ ID string }
	if err := json.Unmarshal(text, &node); err != nil || node.ID == "" {
		return "", fmt.Errorf("node.json of %s has no id: %s", h.Name, text)
	}
	return node.ID, nil
}

// taskMade is when Swarm made the task that takes the place of the one on the killed
// host.
func (t *takeovers) taskMade(ctx context.Context, w *writer, killed time.Time) (made time.Time, err error) {
	manager := t.rig.Hosts[0]
	ids, err := manager.Docker(ctx, "service", "ps", "--quiet", "--no-trunc", w.name)
	if err != nil {
		return made, err
	}
	times, err := manager.Docker(ctx, append([]string{"inspect", "--type", "task", "--format", "{{json .CreatedAt}}"}, strings.Fields(ids)...)...)
	if err != nil {
		return made, err
	}
	for text := range strings.FieldsSeq(times) {
		var at time.Time
		if err := json.Unmarshal([]byte(text), &at); err != nil {
			return made, err
		}
		if at.After(killed) && (made.IsZero() || at.Before(made)) {
			made = at
		}
	}
	if made.IsZero() {
		err = fmt.Errorf("no task of %s was made by Swarm: %s", w.name, times)
	}
	return made, err
}

// attachAlone measures the storage's attach without anything else, on the host that
// has just done it.
func (t *takeovers) attachAlone(ctx context.Context, w *writer, h *rig.Host, token int64) error {
	store := h.StoreBackend(w.fenced())
	var att backends.Attachment
	err := t.times.took(w.title+attachAlone, func() (err error) {
		att, err = store.Attach(ctx, backends.AttachRequest{Ref: w.spare, Volume: w.spareID, Token: token})
		return err
	})
	if err != nil {
		return err
	}
	return store.Detach(ctx, att)
}

// follow reads what a plugin logs.
func (t *takeovers) follow(ctx context.Context, h *rig.Host) {
	log, err := os.Open(filepath.Join(h.Dir, "dockerd.log"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return
	}
	defer log.Close()
	lines := bufio.NewReader(log)
	begun := "" // a line that is being written
	for sleep(ctx, 5*time.Millisecond) == nil {
		now := time.Now()
		for {
			text, err := lines.ReadString('\n')
			begun += text
			if err != nil {
				break
			}
			t.mu.Lock()
			t.lines[h] = append(t.lines[h], logLine{now, begun})
			t.mu.Unlock()
			begun = ""
		}
	}
}

// calls are what a plugin's log tells of a takeover.
type calls struct {
	mounted time.Time // the first Mount came
	seized  time.Time // the silent owner's volume was recorded as this host's
	settled time.Time // the storage had cut it off, and that was committed
	replied time.Time // the Mount that succeeded
	failed  int       // Mounts before that one
}

var (
	mountLine = regexp.MustCompile(`msg=(done|failed) .*op=mount took=([0-9.]+ms) volume=(\w+)`)
	takeLine  = regexp.MustCompile(`msg=.*(taking it over|taken over) from host .* volume=(\w+)`)
)

// read adds a line, if it is about that volume.
func (c *calls) read(line logLine, volume string) {
	if take := takeLine.FindStringSubmatch(line.text); take != nil && take[2] == volume {
		if take[1] == "taken over" {
			c.settled = line.at
		} else {
			c.seized = line.at
		}
	}
	mount := mountLine.FindStringSubmatch(line.text)
	if mount == nil || mount[3] != volume || !c.replied.IsZero() {
		return
	}
	took, err := time.ParseDuration(mount[2])
	if err != nil {
		return
	}
	if c.mounted.IsZero() {
		c.mounted = line.at.Add(-took)
	}
	if mount[1] == "failed" {
		c.failed++
	} else {
		c.replied = line.at
	}
}

// logged waits until a host's log tells of a takeover from beginning to end.
func (t *takeovers) logged(ctx context.Context, h *rig.Host, since time.Time, volume string) (c calls, err error) {
	for c.replied.IsZero() || c.settled.IsZero() || c.seized.IsZero() {
		if sleep(ctx, 50*time.Millisecond) != nil {
			return c, fmt.Errorf("the log of %s does not tell of a takeover of %s: %w", h.Name, volume, context.Cause(ctx))
		}
		c = calls{}
		t.mu.Lock()
		for _, line := range t.lines[h] {
			if line.at.After(since) {
				c.read(line, volume)
			}
		}
		t.mu.Unlock()
	}
	return c, nil
}

// load is the machine's load.
func load() float64 {
	var load float64
	text, _ := os.ReadFile("/proc/loadavg")
	_, _ = fmt.Sscan(string(text), &load)
	return load
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// split is one takeover, in pieces.
type split struct {
	calls

	killed, leaseEnd time.Time
	task             time.Time // when Swarm made the new task; zero without Swarm
	opened, wrote    time.Time // by the new container
}

// due is the first moment at which a Mount could take the volume over.
func (s split) due() time.Time {
	due := s.leaseEnd.Add(hold)
	if s.mounted.After(due) {
		due = s.mounted
	}
	return due
}

func (s split) ours() time.Duration { return s.replied.Sub(s.due()) }

// The pieces, as the table names them.
const (
	writesAgain = "host killed → writing again on another host"
	leaseEnds   = "host killed → its lease has ended in etcd"
	swarmSees   = "host killed → Swarm has seen it, and makes a new task"
	mountComes  = "host killed → Docker calls Mount on another host"
	ours        = "**ours**: lease ended and hold over, and Mount called → Mount's reply"
	seize       = "of that, until the takeover is recorded"
	fence       = "of that, the storage's fence, and the commit"
	attach      = "of that, the storage's attach, and the filesystem's mount"
	attachAlone = "the storage's attach alone, without Flocker"
	starts      = "Mount's reply → the container runs"
	firstRecord = "the container runs → its first record is synced"
)

func (s split) note(times *samples, title string) {
	times.add(title+writesAgain, s.wrote.Sub(s.killed))
	times.add(title+leaseEnds, s.leaseEnd.Sub(s.killed))
	if !s.task.IsZero() {
		times.add(title+swarmSees, s.task.Sub(s.killed))
	}
	times.add(title+mountComes, s.mounted.Sub(s.killed))
	times.add(title+ours, s.ours())
	times.add(title+seize, s.seized.Sub(s.due()))
	times.add(title+fence, s.settled.Sub(s.seized))
	times.add(title+attach, s.replied.Sub(s.settled))
	times.add(title+starts, s.opened.Sub(s.replied))
	times.add(title+firstRecord, s.wrote.Sub(s.opened))
}

// markdown is the table.
func (t *takeovers) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s Load at the kills, p50 / p95 / max: %.1f / %.1f / %.1f.\n\n", t.machine, percentile(t.loads, 50), percentile(t.loads, 95), percentile(t.loads, 100))
	fmt.Fprintf(&b, "%d kills; seconds, p50 / p95 / max:\n\n| what |", len(t.loads))
	for _, w := range t.writers {
		fmt.Fprintf(&b, " %s |", w.title)
	}
	b.WriteString(" target, p95 | met |\n| --- |" + strings.Repeat(" --- |", len(t.writers)+2) + "\n")
	for _, what := range []string{writesAgain, leaseEnds, swarmSees, mountComes, ours, seize, fence, attach, attachAlone, starts, firstRecord} {
		fmt.Fprintf(&b, "| %s |", what)
		met, limit := true, takeoverTargets[what]
		for _, w := range t.writers {
			p95 := t.times.p(w.title+what, 95)
			if p95 == 0 {
				b.WriteString("  |")
				continue
			}
			fmt.Fprintf(&b, " %s / %s / %s |", seconds(t.times.p(w.title+what, 50)), seconds(p95), seconds(t.times.p(w.title+what, 100)))
			met = met && p95 <= limit
		}
		if limit == 0 {
			b.WriteString("  |  |\n")
			continue
		}
		fmt.Fprintf(&b, " ≤ %v | %s |\n", limit, yes(met))
	}
	fmt.Fprintf(&b, "\nMounts that failed and were repeated: %d. The storage is the test storage, which attaches and cuts off in no time; "+
		"Flocker, Docker and Swarm have their defaults. Swarm's manager is not the host that is killed.\n", t.failed)
	return b.String()
}

var takeoverTargets = map[string]time.Duration{writesAgain: 20 * time.Second, ours: 2 * time.Second}

func (t *takeovers) missed() int {
	n := 0
	for what, limit := range takeoverTargets {
		for _, w := range t.writers {
			if t.times.p(w.title+what, 95) > limit {
				n++
			}
		}
	}
	return n
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }
