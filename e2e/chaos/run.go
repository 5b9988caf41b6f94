package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// image is the image of the writer.
const image = "chaos-writer"

// run is one run.
type run struct {
	options

	began time.Time
	plans []*plan

	rig *rig.Rig
	// hosts are those that are broken. The manager of their Swarm is left alone: it is
	// no part of Flocker, and without one nothing would move.
	hosts     []*rig.Host
	manager   *rig.Host
	store     *rig.TestStore // nil if it is not used
	endpoints []string       // of etcd
	volumes   []*volume
	witness   *witness
	writer    string // the writer's program

	// others are the volumes that come and go beside the workload.
	others others

	mu sync.Mutex
	// broken is what is broken now.
	broken []*injected

	// What happened.
	injected   []*injected
	cuts       []history.PowerCut
	violations []history.Violation
	notes      []string
	rounds     int // after which everything wrote again
	declared   int // hosts that the operator declared dead
	reinstated int // volumes that the operator reinstated
	clean      int // filesystems that were checked at the end
}

// A volume is one of the workload, with a service of its name that writes to it.
type volume struct {
	name    string
	kind    history.Kind
	fs      string
	size    string
	backend string
}

// injected is a fault that was injected.
type injected struct {
	*fault

	at, repaired time.Duration // as history.Now gives it
	what         string        // whom it hit
	host         *rig.Host     // nil if none
	volume       string        // empty if none
	undo         func(context.Context) error
	missed       bool // it hit nothing
}

// workload is what is written to, on the storages given.
func workload(names []string) []*volume {
	all := []*volume{
		{name: "synced1", kind: history.Synced, fs: "ext4", size: "256M"},
		{name: "synced2", kind: history.Synced, fs: "ext4", size: "256M"},
		{name: "synced3", kind: history.Synced, fs: "xfs", size: "512M"},
		{name: "mapped", kind: history.Mapped, fs: "ext4", size: "64M"},
		{name: "unsynced", kind: history.Unsynced, fs: "xfs", size: "512M"},
		{name: "synced4", kind: history.Synced, fs: "ext4", size: "256M"},
	}
	for n, v := range all {
		v.backend = names[n%len(names)]
		if v.fs == "xfs" && backendOf(v).fences {
			// The hosts have one kernel. It does not mount an xfs of which it has a mount
			// already: here, the one of the host that was cut off.
			v.fs = "ext4"
		}
	}
	return all
}

// hasTestStore says whether one of the storages is the test storage.
func (o options) hasTestStore() bool { return strings.Contains(o.backend, "teststore") }

// say prints what happens, with the time since the beginning.
func (r *run) say(format string, args ...any) {
	fmt.Printf("%7.1fs  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// note is say for what belongs into the report.
func (r *run) note(format string, args ...any) {
	r.say(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// start starts the hosts, etcd, the storage, the plugin and the services.
func (r *run) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	names := strings.Split(r.backend, ",")
	cfg := rig.Config{Hosts: 4, Engine: r.engine, Logf: r.say}
	for _, name := range names {
		if _, ok := backends[name]; !ok {
			return fmt.Errorf("there is no storage %q", name)
		}
	}
	r.volumes = workload(names)
	var err error
	if r.hasTestStore() {
		if cfg.Plugin, err = rig.TestStorePlugin(); err != nil {
			return err
		}
	}
	if r.rig, err = rig.Start(ctx, cfg); err != nil {
		return err
	}
	r.manager, r.hosts = r.rig.Hosts[0], r.rig.Hosts[1:]
	r.witness = &witness{dir: filepath.Join(r.rig.Dir, "witness"), files: map[string]*witnessFile{}}
	if err := errors.Join(os.Mkdir(r.witness.dir, 0o755), os.Mkdir(r.final(""), 0o755)); err != nil {
		return err
	}
	if err := r.buildWriter(ctx); err != nil {
		return err
	}
	if err := r.rig.ImportProgram(ctx, image, r.writer); err != nil {
		return err
	}
	if r.endpoints, err = r.rig.Etcd(ctx); err != nil {
		return err
	}
	if r.hasTestStore() {
		if r.store, err = r.rig.TestStore(ctx); err != nil {
			return err
		}
	}
	settings := map[string]string{
		"FLOCKER_ETCD_ENDPOINTS": strings.Join(r.endpoints, ","),
		"FLOCKER_LOG_LEVEL":      "debug",
		"FLOCKER_BACKEND":        names[0],
	}
	maps.Copy(settings, r.settings)
	errs := make([]error, len(r.hosts))
	var wg sync.WaitGroup
	for n, h := range r.hosts {
		wg.Go(func() { errs[n] = h.InstallPlugin(ctx, settings) })
	}
	if wg.Wait(); errors.Join(errs...) != nil {
		return errors.Join(errs...)
	}
	if err := r.rig.Swarm(ctx); err != nil {
		return err
	}
	if _, err := r.manage(ctx, "node", "update", "--availability", "drain", r.manager.Name); err != nil {
		return err
	}
	// By default Swarm takes a host for dead after 15 s, later than Flocker does.
	if _, err := r.manage(ctx, "swarm", "update", "--dispatcher-heartbeat", "2s"); err != nil {
		return err
	}
	for _, v := range r.volumes {
		if err := r.serve(ctx, v); err != nil {
			return err
		}
	}
	r.say("%d services write, seed %d", len(r.volumes), r.seed)
	return r.writing(ctx, 2*time.Minute)
}

// final is a file in the directory for what is on the volumes at the end.
func (r *run) final(name string) string { return filepath.Join(r.rig.Dir, "final", name) }

func (r *run) buildWriter(ctx context.Context) error {
	r.writer = filepath.Join(r.rig.Dir, "writer")
	return buildWriter(ctx, r.writer)
}

// buildWriter builds the writer's program without libraries.
func buildWriter(ctx context.Context, path string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/flocker-plugin/flocker/e2e/chaos/writer")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the writer: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// serve creates the service of a volume.
func (r *run) serve(ctx context.Context, v *volume) error {
	_, err := r.manage(ctx, "service", "create", "--detach", "--quiet", "--no-resolve-image", "--name", v.name,
		"--restart-condition", "any", "--restart-delay", "1s", "--env", "NODE={{.Node.Hostname}}",
		"--mount", fmt.Sprintf("type=volume,src=%s,dst=/data,volume-driver=flocker,volume-opt=backend=%s,volume-opt=fs=%s,volume-opt=size=%s", v.name, v.backend, v.fs, v.size),
		"--mount", "type=bind,src="+r.witness.dir+",dst=/witness",
		image, "-volume", v.name, "-kind", string(v.kind), "-every", r.every.String())
	return err
}

// fresh is how old the last record of a volume may be for it to count as written to.
const fresh = 2 * time.Second

// writing waits until all volumes are being written to.
func (r *run) writing(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		if err := r.witness.poll(); err != nil {
			return err
		}
		var silent []string
		for _, v := range r.volumes {
			if at, _ := r.witness.last(v.name); history.Now()-at > fresh+2*r.every {
				silent = append(silent, v.name)
			}
		}
		if len(silent) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return &stuckError{silent, context.Cause(ctx)}
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// stuckError is what writing returns when not all are.
type stuckError struct {
	volumes []string
	err     error
}

func (e *stuckError) Error() string {
	return fmt.Sprintf("nothing is written to %s: %v", strings.Join(e.volumes, ", "), e.err)
}

func (e *stuckError) Unwrap() error { return e.err }

// inject injects faults until the time is over, and then repairs everything.
func (r *run) inject(ctx context.Context) error {
	noise, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { r.others.comeAndGo(noise, r) })
	wg.Go(func() { r.look(noise) })
	defer func() {
		stop()
		wg.Wait()
		for _, command := range r.others.hung {
			r.violate("availability", "", "%s did not end within %v", command, hangs)
		}
	}()
	for end := time.Now().Add(r.time); ; {
		if err := r.round(ctx, end); err != nil {
			return err
		}
		if err := r.settled(ctx); err != nil || r.violated() {
			return err
		}
		r.rounds++
		if time.Now().After(end) {
			break
		}
	}
	if r.sabotage {
		return r.doubleMount(ctx)
	}
	return nil
}

// A round is a few faults of the first lane there is, and what the others have time
// for meanwhile. After it nothing is broken.
func (r *run) round(ctx context.Context, end time.Time) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var over atomic.Bool
	var wg sync.WaitGroup
	for n, p := range r.plans {
		steps := math.MaxInt
		if n == 0 {
			steps = perRound[p.lane]
		}
		wg.Go(func() {
			for ; steps > 0 && !over.Load() && time.Now().Before(end) && !r.violated(); steps-- {
				if err := r.step(ctx, p.next()); err != nil {
					cancel(err)
				}
			}
			if n == 0 {
				over.Store(true)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// perRound is how many faults a round is long. Hosts stay away for long.
var perRound = [lanes]int{hosts: 2, parts: 8, etcds: 8, storages: 8}

func (r *run) violated() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.violations) > 0
}

// look reads the witness files as they grow.
func (r *run) look(ctx context.Context) {
	for sleep(ctx, 300*time.Millisecond) == nil {
		if err := r.witness.poll(); err != nil {
			r.say("read the witness files: %v", err)
		}
	}
}

// step injects one fault, and repairs it when it has lasted as long as it should.
func (r *run) step(ctx context.Context, s step) error {
	i := r.aim(s)
	if i == nil {
		// What is broken already is in the way.
		return sleep(ctx, 300*time.Millisecond)
	}
	lasting := ""
	if s.most > 0 {
		lasting = fmt.Sprintf(", for %v", s.hold.Round(100*time.Millisecond))
	}
	r.say("%s: %s%s", s.name, i.what, lasting)
	until := time.Now().Add(s.hold)
	err := s.inject(ctx, r, s, i)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		// Such as a kill of a container that has just ended by itself. What it may have
		// broken is repaired as usual.
		r.say("%s: %s: %v", s.name, i.what, err)
		i.missed = true
	}
	if i.undo != nil {
		if err := sleep(ctx, time.Until(until)); err != nil {
			return err
		}
		if err := r.try(ctx, "repair "+i.name+" of "+i.what, i.undo); err != nil {
			return err
		}
	}
	r.mu.Lock()
	i.repaired = history.Now()
	r.broken = slices.DeleteFunc(r.broken, func(b *injected) bool { return b == i })
	r.mu.Unlock()
	return sleep(ctx, s.rest)
}

// aim chooses whom a step hits, and notes it as broken; nil if there is nobody.
func (r *run) aim(s step) *injected {
	i := &injected{fault: s.fault}
	// The volumes, from a random one on: what is hit should be in use.
	first := int(s.pick % uint64(len(r.volumes)))
	volumes := slices.Concat(r.volumes[first:], r.volumes[:first])
	var at, writing []*rig.Host // where each is, and if it is being written to now
	for _, v := range volumes {
		h := r.hostOf(v)
		at = append(at, h)
		if last, _ := r.witness.last(v.name); history.Now()-last > fresh {
			h = nil
		}
		writing = append(writing, h)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch s.where {
	case onEtcd:
		i.what = cmp.Or(s.whom, fmt.Sprintf("member %d", s.pick%3+1))
	case onStorage:
		i.what = cmp.Or(s.whom, "all of it")
	case onHost:
		for _, h := range slices.Concat(writing, at, r.hosts) {
			if h != nil && r.canHit(s.fault, h) {
				i.host, i.what = h, h.Name
				break
			}
		}
		if i.host == nil {
			return nil
		}
	case onTask:
		for n, h := range writing {
			if h != nil && r.canHit(s.fault, h) {
				i.host, i.volume, i.what = h, volumes[n].name, volumes[n].name+" on "+h.Name
				break
			}
		}
		if i.host == nil {
			return nil
		}
	case onService:
		i.volume, i.what = volumes[0].name, volumes[0].name
		if i.host = at[0]; i.host != nil {
			i.what += " on " + i.host.Name
		}
	}
	i.at = history.Now()
	r.injected = append(r.injected, i)
	r.broken = append(r.broken, i)
	return i
}

// canHit says whether a host can have a fault beside those it has: a second one that
// lasts would be repaired with the first one, and who does not answer is not asked.
func (r *run) canHit(f *fault, h *rig.Host) bool {
	return !slices.ContainsFunc(r.broken, func(b *injected) bool {
		return b.host == h && b.where != onService && (f.most > 0 || b.deaf)
	})
}

// hostOf is the host that last wrote to a volume; nil if none has.
func (r *run) hostOf(v *volume) *rig.Host {
	_, node := r.witness.last(v.name)
	for _, h := range r.hosts {
		if h.Name == node {
			return h
		}
	}
	return nil
}

// isAway says whether a host does not take part in the Swarm.
func (r *run) isAway(h *rig.Host) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.broken, func(b *injected) bool { return b.away && b.host == h })
}

// try does something up to three times.
func (r *run) try(ctx context.Context, what string, f func(context.Context) error) error {
	var err error
	for range 3 {
		trying, cancel := context.WithTimeout(ctx, 90*time.Second)
		err = f(trying)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		r.note("%s: %v", what, err)
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// settled waits until everything writes again, and looks whether every host knows
// the volumes. That they do not is a violation, and not an error.
func (r *run) settled(ctx context.Context) error {
	var err error
	for limit := time.Now().Add(r.settle); time.Now().Before(limit); {
		if err = r.writing(ctx, min(time.Until(limit), patience)); err == nil || ctx.Err() != nil {
			break
		}
		if err := r.mendDocker(ctx); err != nil {
			return err
		}
		if err := r.reinstate(ctx); err != nil {
			return err
		}
	}
	if err != nil {
		stuck, ok := errors.AsType[*stuckError](err)
		if !ok || ctx.Err() != nil {
			return err
		}
		for _, v := range stuck.volumes {
			r.violate("availability", v, "nothing is written %v after the last fault was repaired; the tasks of its service:\n%s", r.settle, r.tasks(ctx, v))
		}
		return nil
	}
	for _, h := range r.hosts {
		if r.isAway(h) {
			continue
		}
		for _, v := range r.volumes {
			if err := inspect(ctx, h, v.name); err != nil && ctx.Err() == nil {
				r.violate("availability", v.name, "nothing is broken, and %v", err)
				return nil
			}
		}
	}
	return ctx.Err()
}

// reinstate is the operator, who sees to volumes whose device failed before it had
// taken everything. No acknowledged record is among what it did not take, which is
// looked at in the end. Any other reason for a quarantine is for nobody to overrule.
func (r *run) reinstate(ctx context.Context) error {
	for _, v := range r.volumes {
		for _, h := range r.hosts {
			if r.isAway(h) {
				continue
			}
			trying, cancel := context.WithTimeout(ctx, 20*time.Second)
			detail, err := h.Docker(trying, "volume", "inspect", "--format", "{{.Status.state}}: {{.Status.detail}}", v.name)
			if err == nil && strings.HasPrefix(detail, "quarantined: ") && strings.Contains(detail, mount.ErrUnwritten.Error()) {
				if _, err = h.Docker(trying, "flocker", "volume", "reinstate", v.name); err == nil {
					r.say("the operator reinstates %s, which was %s", v.name, detail)
					r.reinstated++
				}
			}
			cancel()
			if err == nil || ctx.Err() != nil {
				break // every host would say the same
			}
			r.note("look after volume %s on %s: %v", v.name, h.Name, err)
		}
	}
	return ctx.Err()
}

// inspect looks at a volume. It tries again for a minute: the plugin or Docker may
// just be starting.
func inspect(ctx context.Context, h *rig.Host, volume string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if _, err = h.Docker(ctx, "volume", "inspect", volume); err == nil || sleep(ctx, time.Second) != nil {
			return err
		}
	}
}

// patience is how long nothing may be written before it is looked whether Docker is to
// blame.
const patience = 20 * time.Second

// mendDocker starts the plugin again on hosts where Docker has lost sight of what it
// mounts, or has given it up.
//
// A dockerd that finds the plugin of a killed one running stops it, and starts it
// again as soon as its process has ended, while another of its goroutines unmounts
// everything below the plugin's directory (HandleExitEvent in moby's plugin manager).
// If that one is late, it takes away the mount through which the host sees what the new
// process mounts, and containers with volumes do not start any more. And a plugin that
// ends while Docker starts it is disabled.
func (r *run) mendDocker(ctx context.Context) error {
	for _, h := range r.hosts {
		if r.isAway(h) {
			continue
		}
		if err := r.mendDockerOf(ctx, h); err != nil && ctx.Err() == nil {
			r.note("look after Docker on %s: %v", h.Name, err)
		}
	}
	return ctx.Err()
}

func (r *run) mendDockerOf(ctx context.Context, h *rig.Host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	plugin := func(args ...string) (string, error) {
		return h.Docker(ctx, slices.Concat([]string{"plugin"}, args, []string{rig.PluginName})...)
	}
	enabled, err := plugin("inspect", "--format", "{{.Enabled}}")
	if err != nil {
		return err
	}
	mounted := false
	for range 3 { // in a moment if the plugin is just starting
		mounts, err := h.Exec(ctx, "cat", "/proc/self/mountinfo")
		if err != nil {
			return err
		}
		if mounted = strings.Contains(mounts, "/propagated-mount "); mounted || sleep(ctx, time.Second) != nil {
			break
		}
	}
	switch {
	case enabled == "false":
		r.note("Docker has disabled the plugin on %s, as it does if it ends while it is started; it is enabled", h.Name)
	case !mounted:
		r.note("Docker has unmounted the plugin's directory of volumes on %s, as it may after a kill; the plugin is disabled and enabled", h.Name)
		if _, err := plugin("disable", "-f"); err != nil {
			r.note("%v", err)
		}
	default:
		return nil
	}
	_, err = plugin("enable", "--timeout", "0")
	return err
}

// tasks is what Swarm says about a service.
func (r *run) tasks(ctx context.Context, service string) string {
	out, err := r.manage(ctx, "service", "ps", "--no-trunc", "--format", "{{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}} {{.Error}}", service)
	if err != nil {
		return err.Error()
	}
	return out
}

func (r *run) violate(check, volume, format string, args ...any) {
	v := history.Violation{Check: check, Volume: volume, Text: fmt.Sprintf(format, args...)}
	r.say("VIOLATION %s", v)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.violations = append(r.violations, v)
}

// manage runs a docker command on the manager of the Swarm. It tries again: a manager
// that is busy refuses an update that another one has overtaken.
func (r *run) manage(ctx context.Context, args ...string) (out string, err error) {
	for range 3 {
		trying, cancel := context.WithTimeout(ctx, 20*time.Second)
		out, err = r.manager.Docker(trying, args...)
		cancel()
		if err == nil || sleep(ctx, time.Second) != nil {
			break
		}
	}
	return out, err
}

// sleep returns early, with an error, if ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// close ends everything.
func (r *run) close(ctx context.Context) error {
	if r.rig == nil {
		return nil
	}
	return r.rig.Close(ctx)
}
