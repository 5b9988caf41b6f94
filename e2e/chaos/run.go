package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// image is the image of the writer.
const image = "chaos-writer"

// run is one run.
type run struct {
	options

	began time.Time
	plan  *plan

	rig       *rig.Rig
	store     *rig.TestStore // nil if it is not used
	endpoints []string       // of etcd
	volumes   []*volume
	witness   *witness
	writer    string // the writer's program

	// broken is what is broken now, oldest first.
	broken []*injected
	// others are the volumes that come and go beside the workload.
	others others

	// What happened.
	injected   []*injected
	cuts       []history.PowerCut
	violations []history.Violation
	notes      []string
	declared   int // hosts that the operator declared dead
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

	at, repaired time.Duration // as history.Now gives it; repaired is 0 while it lasts
	what         string        // whom it hit
	host         *rig.Host     // nil if none
	volume       string        // empty if none
	undo         func(context.Context) error
	until        time.Time
}

// workload is what is written to, on the storages given.
func workload(backends []string) []*volume {
	all := []*volume{
		{name: "synced1", kind: history.Synced, fs: "ext4", size: "256M"},
		{name: "synced2", kind: history.Synced, fs: "ext4", size: "256M"},
		{name: "synced3", kind: history.Synced, fs: "xfs", size: "512M"},
		{name: "mapped", kind: history.Mapped, fs: "ext4", size: "64M"},
		{name: "unsynced", kind: history.Unsynced, fs: "ext4", size: "256M"},
	}
	for n, v := range all {
		v.backend = backends[n%len(backends)]
		if v.fs == "xfs" && storages[v.backend].fences {
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
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// start starts the hosts, etcd, the storage, the plugin and the services.
func (r *run) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	backends := strings.Split(r.backend, ",")
	cfg := rig.Config{Hosts: 3, Engine: r.engine, Logf: r.say}
	for _, b := range backends {
		if _, ok := storages[b]; !ok {
			return fmt.Errorf("there is no storage %q", b)
		}
	}
	r.volumes = workload(backends)
	var err error
	if r.hasTestStore() {
		if cfg.Plugin, err = rig.TestStorePlugin(); err != nil {
			return err
		}
	}
	if r.rig, err = rig.Start(ctx, cfg); err != nil {
		return err
	}
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
		"FLOCKER_BACKEND":        backends[0],
	}
	maps.Copy(settings, r.settings)
	if err := r.rig.InstallPlugin(ctx, settings); err != nil {
		return err
	}
	if err := r.rig.Swarm(ctx); err != nil {
		return err
	}
	// So that any one of them may be away.
	if _, err := r.rig.Hosts[0].Docker(ctx, "node", "promote", "host2", "host3"); err != nil {
		return err
	}
	// By default Swarm takes a host for dead after 15 s, later than Flocker does.
	if _, err := r.rig.Hosts[0].Docker(ctx, "swarm", "update", "--dispatcher-heartbeat", "2s"); err != nil {
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
	_, err := r.rig.Hosts[0].Docker(ctx, "service", "create", "--detach", "--quiet", "--no-resolve-image", "--name", v.name,
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
	for end := time.Now().Add(r.time); time.Now().Before(end) && len(r.violations) == 0; {
		if err := r.step(ctx, r.plan.next()); err != nil {
			return err
		}
	}
	if err := r.repairAll(ctx); err != nil {
		return err
	}
	if r.sabotage {
		return r.doubleMount(ctx)
	}
	return r.settled(ctx)
}

// look reads the witness files as they grow.
func (r *run) look(ctx context.Context) {
	for sleep(ctx, 300*time.Millisecond) == nil {
		if err := r.witness.poll(); err != nil {
			r.say("read the witness files: %v", err)
		}
	}
}

// step injects one fault, and repairs it unless it overlaps with the next one.
func (r *run) step(ctx context.Context, s step) error {
	i := &injected{fault: s.fault}
	if !r.aim(s, i) {
		// What is broken already is in the way.
		if err := r.repairAll(ctx); err != nil {
			return err
		}
		if !r.aim(s, i) {
			return sleep(ctx, time.Second)
		}
	}
	i.what = cmp.Or(s.whom, i.what)
	lasting := ""
	if s.most > 0 {
		lasting = fmt.Sprintf(", for %v", s.hold.Round(100*time.Millisecond))
	}
	r.say("%s: %s%s", s.name, i.what, lasting)
	i.at = history.Now()
	r.injected = append(r.injected, i)
	r.broken = append(r.broken, i)
	err := s.inject(ctx, r, s, i)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		// Such as a kill of a container that has just ended by itself. What it may have
		// broken is repaired as usual.
		r.say("%s: %s: %v", s.name, i.what, err)
	}
	if i.until = time.Now().Add(s.hold); i.undo == nil {
		i.repaired = history.Now()
		r.broken = slices.DeleteFunc(r.broken, func(b *injected) bool { return b == i })
	}
	if !s.overlaps {
		if err := r.repairAll(ctx); err != nil {
			return err
		}
		if s.settles {
			if err := r.settled(ctx); err != nil {
				return err
			}
		}
	}
	return sleep(ctx, s.rest)
}

// aim chooses whom a step hits. False if what is broken already is in the way: two
// hosts or members of etcd of three are a majority.
func (r *run) aim(s step, i *injected) bool {
	v := r.volumes[s.pick%uint64(len(r.volumes))]
	switch s.where {
	case onEtcd, onStorage:
		i.what = "all of it"
		if s.where == onEtcd {
			i.what = fmt.Sprintf("member %d", s.pick%3+1)
		}
		for _, b := range r.broken {
			if b.where == s.where {
				return false
			}
		}
	case onHost:
		if i.host = r.hostOf(v); i.host == nil {
			i.host = r.rig.Hosts[s.pick%uint64(len(r.rig.Hosts))]
		}
		i.what = i.host.Name
		for _, b := range r.broken {
			if b.where == onHost {
				return false
			}
		}
	case onTask:
		if i.host = r.hostOf(v); i.host == nil || r.isBroken(i.host) {
			return false
		}
		i.volume, i.what = v.name, v.name+" on "+i.host.Name
	case onService:
		i.volume, i.what = v.name, v.name
		if i.host = r.hostOf(v); i.host != nil {
			i.what += " on " + i.host.Name
		}
	}
	return true
}

// hostOf is the host that last wrote to a volume; nil if none has.
func (r *run) hostOf(v *volume) *rig.Host {
	_, node := r.witness.last(v.name)
	for _, h := range r.rig.Hosts {
		if h.Name == node {
			return h
		}
	}
	return nil
}

func (r *run) isBroken(h *rig.Host) bool {
	return slices.ContainsFunc(r.broken, func(b *injected) bool { return b.where == onHost && b.host == h })
}

// repairAll waits until each fault has lasted as long as it should, and repairs it.
func (r *run) repairAll(ctx context.Context) error {
	slices.SortStableFunc(r.broken, func(a, b *injected) int { return a.until.Compare(b.until) })
	for len(r.broken) > 0 {
		i := r.broken[0]
		if err := sleep(ctx, time.Until(i.until)); err != nil {
			return err
		}
		err := r.try(ctx, "repair "+i.name+" of "+i.what, i.undo)
		if err != nil {
			return err
		}
		i.repaired = history.Now()
		r.broken = r.broken[1:]
	}
	return nil
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
		if err = r.writing(ctx, min(time.Until(limit), 30*time.Second)); err == nil || ctx.Err() != nil {
			break
		}
		if err := r.mendDocker(ctx); err != nil {
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
	for _, h := range r.rig.Hosts {
		if r.isBroken(h) {
			continue
		}
		for _, v := range r.volumes {
			if err := inspect(ctx, h, v.name); err != nil && ctx.Err() == nil {
				r.violate("availability", v.name, "nothing is broken, and %v", err)
			}
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

// mendDocker starts the plugin again on hosts where Docker has lost sight of what it
// mounts.
//
// A dockerd that finds the plugin of a killed one running stops it, and starts it
// again as soon as its process has ended, while another of its goroutines unmounts
// everything below the plugin's directory (HandleExitEvent in moby's plugin manager).
// If that one is late, it takes away the mount through which the host sees what the new
// process mounts, and containers with volumes do not start any more.
func (r *run) mendDocker(ctx context.Context) error {
	for _, h := range r.rig.Hosts {
		if r.isBroken(h) {
			continue
		}
		if err := r.mendDockerOf(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) mendDockerOf(ctx context.Context, h *rig.Host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	mounts, err := h.Exec(ctx, "cat", "/proc/self/mountinfo")
	if err != nil || strings.Contains(mounts, "/propagated-mount ") {
		return err
	}
	r.note("Docker has unmounted the plugin's directory of volumes on %s, as it may after a kill; the plugin is disabled and enabled", h.Name)
	for _, args := range [][]string{{"disable", "-f"}, {"enable", "--timeout", "0"}} {
		if _, err := h.Docker(ctx, slices.Concat([]string{"plugin"}, args, []string{rig.PluginName})...); err != nil {
			r.note("%v", err) // what comes of it is seen
		}
	}
	return nil
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
	r.violations = append(r.violations, v)
}

// manage runs a docker command on a manager of the Swarm that is not broken. It tries
// again for a while: a Swarm that has lost its leader takes some seconds to elect one.
func (r *run) manage(ctx context.Context, args ...string) (out string, err error) {
	for range 5 {
		for _, h := range r.rig.Hosts {
			if r.isBroken(h) {
				continue
			}
			trying, cancel := context.WithTimeout(ctx, 30*time.Second)
			out, err = h.Docker(trying, args...)
			cancel()
			if err == nil || ctx.Err() != nil {
				return out, err
			}
		}
		if err := sleep(ctx, 2*time.Second); err != nil {
			return "", err
		}
	}
	return "", err
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
