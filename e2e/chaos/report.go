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
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// report is what a run has come to.
type report struct {
	run *run

	engine                 string
	incarnations           int
	acknowledged, verified int
	// unsynced is what was written without a sync; tried is how often a full
	// filesystem was met.
	unsynced, full int
	moves, claims  int
	takeovers      int
	unknownTimes   int
	// outages is by fault and then by the class of the storage.
	outages    map[string]samples
	takenOver  []takeover
	moved      samples
	violations []history.Violation
	notes      []string
	kept       string
}

// samples are times by the class of the storage.
type samples map[string][]time.Duration

// class is that of a volume's storage.
func (r *run) class(volume string) string {
	for _, v := range r.volumes {
		if v.name == volume {
			return backendOf(v).class
		}
	}
	return "" // one that comes and goes
}

// check runs every check.
func (r *run) check(ctx context.Context) (*report, error) {
	p := &report{run: r, notes: r.notes}
	p.engine, _ = r.hosts[0].Docker(ctx, "version", "--format", "{{.Server.Version}}")
	if r.engine == rig.Current {
		p.engine = string(r.engine) // one that `make engine` has built does not know its version
	}
	all, err := r.witness.incarnations()
	if err != nil {
		return nil, err
	}
	events, err := r.events(ctx)
	if err != nil {
		return nil, err
	}
	bootTime := time.Now().Add(-history.Now())
	changes, err := changesFrom(events, bootTime)
	if err != nil {
		return nil, err
	}
	mounts, err := r.mounts(bootTime)
	if err != nil {
		return nil, err
	}
	p.count(all, changes)
	p.takenOver = takeovers(changes, r.injected, mounts)
	p.moved = samples{}
	for volume, took := range history.Moves(all) {
		p.moved[r.class(volume)] = append(p.moved[r.class(volume)], took...)
	}

	p.violations = r.violations
	add := func(found ...history.Violation) { p.violations = append(p.violations, found...) }
	add(history.Overlaps(all, changes)...)
	add(history.Unowned(all, changes)...)
	add(history.Flushed(all, changes, r.cuts)...)
	add(history.Pulled(all, changes, r.cuts)...)
	for _, v := range r.volumes {
		if v.kind != history.Synced {
			continue
		}
		log, err := r.readFinal(v)
		if err != nil {
			add(history.Violation{Check: "data", Volume: v.name, Text: err.Error()})
			continue
		}
		verified, found := history.Data(v.name, log, all)
		p.verified += verified
		add(found...)
	}
	add(r.panics()...)
	p.outages = attribute(history.Outages(all, outage), r.injected, r.class)
	return p, nil
}

// outage is how long nothing may be written to a volume before it counts as one.
const outage = time.Second

func (p *report) count(all []*history.Incarnation, changes []history.Change) {
	for _, i := range all {
		p.full += i.Full
		if len(i.Writes) > 0 {
			p.incarnations++
		}
		if i.Kind == history.Synced {
			p.acknowledged += len(i.Writes)
		} else {
			p.unsynced += len(i.Writes)
		}
	}
	last := map[string]string{}
	for _, c := range changes {
		if c.At == 0 {
			p.unknownTimes++
		}
		if c.Node == "" || c.Pending {
			continue
		}
		before := last[c.Volume]
		last[c.Volume] = c.Node
		switch p.claims++; {
		case c.Forced:
			p.takeovers++
		case before != "" && before != c.Node:
			p.moves++
		}
	}
}

// panics finds the ends of plugins that nobody killed.
func (r *run) panics() (found []history.Violation) {
	for _, h := range r.hosts {
		log, err := os.ReadFile(filepath.Join(h.Dir, "dockerd.log"))
		if err != nil {
			found = append(found, history.Violation{Check: "plugin", Text: err.Error()})
		}
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, " plugin=") && (strings.Contains(line, "panic:") || strings.Contains(line, "fatal error:") || strings.Contains(line, "DATA RACE")) {
				found = append(found, history.Violation{Check: "plugin", Text: h.Name + ": " + strings.TrimSpace(line)})
			}
		}
	}
	return found
}

// lag is how long before a fault an outage it causes may seem to begin, and for how
// long after its repair one may begin: Swarm may take that long to notice.
const (
	lagBefore = 1 * time.Second
	lagAfter  = 40 * time.Second
)

// noFault is what an outage without a fault is attributed to.
const noFault = "no fault"

// attribute says how long it took from a fault until writing went on. An outage is
// the last fault's that hit its host or volume, or else the last one's at all.
func attribute(outages []history.Outage, faults []*injected, class func(volume string) string) map[string]samples {
	took := map[string]samples{}
	for _, o := range outages {
		var because *injected
		mine := false
		for _, f := range faults {
			if f.at > o.Begin+lagBefore || f.repaired+lagAfter < o.Begin || f.missed {
				continue
			}
			hit := f.volume == o.Volume || f.where == onHost && f.host.Name == o.Node
			if hit || !mine {
				because, mine = f, hit
			}
		}
		name, from := noFault, o.Begin
		if because != nil {
			name, from = because.name, max(because.at, o.Begin)
		}
		if took[name] == nil {
			took[name] = samples{}
		}
		took[name][class(o.Volume)] = append(took[name][class(o.Volume)], o.End-from)
	}
	return took
}

// found says whether one of the violations is of a check.
func (p *report) found(check string) bool {
	return slices.ContainsFunc(p.violations, func(v history.Violation) bool { return v.Check == check })
}

// command repeats the run.
func (r *run) command() string {
	args := []string{fmt.Sprint("-seed ", r.seed)}
	if r.engine != rig.Debian {
		args = append(args, "-engine", string(r.engine))
	}
	if r.backend != bothBackends {
		args = append(args, "-backend", r.backend)
	}
	if len(r.only) > 0 {
		args = append(args, "-only", strconv.Quote(strings.Join(r.only, ",")))
	}
	if r.sabotage {
		args = append(args, "-sabotage")
	}
	for _, name := range slices.Sorted(maps.Keys(r.settings)) {
		args = append(args, "-set", name+"="+r.settings[name])
	}
	return fmt.Sprintf("make chaos TIME=%s ARGS='%s'", short(r.time), strings.Join(args, " "))
}

// short is a duration without its zeros: 1h, and not 1h0m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// markdown is the report.
func (p *report) markdown() string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	r := p.run
	var classes []string // of the storages that were used
	describe := map[string]string{}
	for name := range strings.SplitSeq(r.backend, ",") {
		c := backends[name].class
		classes = append(classes, c)
		describe[c] = fmt.Sprintf("%s (`%s`)", c, name)
	}
	slices.Sort(classes)
	faulty, missed := 0, 0
	injected := map[string]int{}
	for _, i := range r.injected {
		switch {
		case i.missed && i.planned:
			continue
		case i.missed:
			missed++
			continue
		case !i.planned:
			faulty++
		}
		injected[i.name]++
	}

	say("# Chaos")
	say("")
	say("What came of one run of `%s` on %s, with Docker Engine %s. The program that broke things wrote this page; nothing in it is typed in.",
		r.command(), r.began.UTC().Format(time.DateOnly), p.engine)
	say("")
	say("Three Docker hosts make a Swarm, with an etcd of three members and storage of the classes %s beside them, all on one machine, in namespaces of their own. %d services write numbered records to a volume each, one every %v, while at random hosts lose their power or their network, programs are killed and stopped, and etcd and the storage fail: up to four things are broken at a time, one of them a whole host. Every other minute or so all is repaired, and all services have to write again within %s. At the end every acknowledged record is looked for on its volume, the filesystems are checked, and it is compared who wrote when with who was the owner in etcd.",
		strings.Join(describeAll(classes, describe), ", "), len(r.volumes), r.every, short(r.settle))
	say("")
	say("The seed repeats the order of the faults. Whom each hits depends on what the hosts do at that moment. [Testing](testing.md) has what chaos checks, and what else there is.")
	say("")
	if n := len(p.violations); n == 0 {
		say("**%d faults, no violation.**", faulty)
	} else {
		say("**%d faults, %d violations.** Logs and histories are in %s.", faulty, n, cmp.Or(p.kept, "no place"))
		say("")
		for _, v := range p.violations {
			say("* %s", strings.ReplaceAll(v.String(), "\n", "\n  "))
		}
	}
	say("")
	say("| what | count |")
	say("| --- | --- |")
	say("| faults | %d |", faulty)
	say("| times that everything wrote again with nothing broken | %d |", r.rounds)
	say("| planned moves to another host | %d |", p.moves)
	say("| takeovers from a dead or cut-off host | %d |", p.takeovers)
	say("| hosts that the operator declared dead | %d |", r.declared)
	say("| volumes quarantined because their device failed with the last writes, and reinstated | %d |", r.reinstated)
	say("| writers that ran | %d |", p.incarnations)
	say("| records acknowledged after fsync | %d |", p.acknowledged)
	say("| of them verified at the end | %d |", p.verified)
	say("| records written without a sync | %d |", p.unsynced)
	say("| attempts that found no space | %d |", p.full)
	say("| filesystems checked at the end, of which clean | %d, %d |", len(r.volumes), r.clean)
	if p.unknownTimes > 0 {
		say("| changes of owners whose time is not in etcd | %d |", p.unknownTimes)
	}
	say("| commands on volumes that come and go meanwhile, of which refused or failed | %d, %d |", r.others.done, r.others.failed)
	say("| the slowest of them: %s | %.1f s |", r.others.what, r.others.slowest.Seconds())
	say("| violations | %d |", len(p.violations))
	say("")

	say("## From a fault to writing again")
	say("")
	say("How often writing to a volume stopped for more than %v, and how long it took from the fault until it went on: p50 / p95 / longest, in seconds. Writing that did not stop is not in it.", outage)
	if slices.Contains(classes, "F0") {
		say("F0 cannot cut a host off: its volumes wait until the host is back, or until an operator has declared it dead, which is done after every third loss of power.")
	}
	say("")
	say("| fault | injected | %s |", strings.Join(describeAll(classes, describe), " | "))
	say("| --- | --- |%s", strings.Repeat(" --- |", len(classes)))
	every := samples{}
	line := func(name, count string, s samples) {
		var cells []string
		for _, c := range classes {
			cells = append(cells, cell(s[c]))
		}
		say("| %s | %s | %s |", name, count, strings.Join(cells, " | "))
	}
	for _, planned := range []bool{false, true} {
		for _, f := range faults {
			took := p.outages[f.name]
			if f.planned != planned || injected[f.name] == 0 && len(took) == 0 {
				continue
			}
			name := f.name
			if planned {
				name += " (no fault)"
			}
			line(name, fmt.Sprint(injected[f.name]), took)
			for c, took := range took {
				every[c] = append(every[c], took...)
			}
		}
	}
	if took := p.outages[noFault]; len(took) > 0 {
		line("nothing of these", "", took)
	}
	line("**all**", fmt.Sprint(faulty), every)
	say("")
	if missed > 0 {
		say("%d more hit nothing, such as a container that had just ended, and are not counted.", missed)
		say("")
	}

	say("## Moves and takeovers")
	say("")
	say("p50 / p95 / longest, in seconds, containers included.")
	say("")
	say("| from … to … | %s |", strings.Join(describeAll(classes, describe), " | "))
	say("| --- |%s", strings.Repeat(" --- |", len(classes)))
	row := func(what string, took func(t takeover) (from, to time.Duration)) {
		s := samples{}
		for _, t := range p.takenOver {
			if from, to := took(t); from != 0 && to != 0 {
				c := r.class(t.volume)
				s[c] = append(s[c], max(0, to-from))
			}
		}
		var cells []string
		for _, c := range classes {
			cells = append(cells, cell(s[c]))
		}
		say("| %s | %s |", what, strings.Join(cells, " | "))
	}
	var cells []string
	for _, c := range classes {
		cells = append(cells, cell(p.moved[c]))
	}
	say("| planned move: the last record on one host to the first on another | %s |", strings.Join(cells, " | "))
	row("takeover: fault of the host to the new owner", func(t takeover) (time.Duration, time.Duration) { return t.fault, t.committed })
	row("… fault to Docker's Mount elsewhere", func(t takeover) (time.Duration, time.Duration) { return t.fault, t.asked })
	row("… fault to the takeover's begin: silent for long enough, and wanted", func(t takeover) (time.Duration, time.Duration) { return t.fault, t.recorded })
	row("… the fence and the commit", func(t takeover) (time.Duration, time.Duration) { return t.recorded, t.committed })
	row("… the commit to the Mount's answer", func(t takeover) (time.Duration, time.Duration) { return t.committed, t.answered })
	row("… that Mount in all, waiting included", func(t takeover) (time.Duration, time.Duration) { return t.asked, t.answered })
	say("")
	say("Docker asks as soon as Swarm has noticed; the Mount then waits in the plugin until the host counts as dead (`FLOCKER_NODE_TTL`, 10 s, since its last sign of life, and `FLOCKER_HOLD`, 3 s). What Docker logs is known to a second.")
	if len(p.notes) > 0 {
		say("")
		say("## Notes")
		say("")
		for _, n := range p.notes {
			say("* %s", strings.ReplaceAll(n, "\n", "\n  "))
		}
	}
	return b.String()
}

func describeAll(classes []string, describe map[string]string) (all []string) {
	for _, c := range classes {
		all = append(all, describe[c])
	}
	return all
}

// cell is how often and how long; empty for never.
func cell(took []time.Duration) string {
	if len(took) == 0 {
		return ""
	}
	p50, p95, longest := percentiles(took)
	return fmt.Sprintf("%d: %.1f / %.1f / %.1f", len(took), p50, p95, longest)
}

// percentiles are in seconds. There is at least one.
func percentiles(took []time.Duration) (p50, p95, longest float64) {
	slices.Sort(took)
	at := func(percent int) float64 { return took[(len(took)*percent+99)/100-1].Seconds() }
	return at(50), at(95), at(100)
}

// evidence is the end of each plugin's log, as far as it is about a volume with a
// violation; all of it, if there is none.
func (r *run) evidence() string {
	if r.rig == nil {
		return ""
	}
	var b strings.Builder
	for _, h := range r.hosts {
		log, err := os.ReadFile(filepath.Join(h.Dir, "dockerd.log"))
		if err != nil {
			fmt.Fprintln(&b, err)
		}
		fmt.Fprintf(&b, "the plugin on %s says at the end:\n", h.Name)
		for _, line := range lastLines(string(log), 20, r.violations) {
			fmt.Fprintln(&b, "  "+line)
		}
	}
	return b.String()
}

// lastLines are the last n of a plugin's lines in the log of dockerd that are of a
// level worth reading, and about a volume with a violation if there is one.
func lastLines(log string, n int, violations []history.Violation) (last []string) {
	for line := range strings.Lines(log) {
		line, _, ok := strings.Cut(line, " plugin=")
		if !ok || strings.Contains(line, "msg=\"level=debug ") {
			continue
		}
		about := func(v history.Violation) bool { return v.Volume == "" || strings.Contains(line, v.Volume) }
		if len(violations) == 0 || slices.ContainsFunc(violations, about) {
			last = append(last, line)
		}
	}
	return last[max(0, len(last)-n):]
}

// keepAll copies the logs and histories out of the rig, which is about to be removed.
func (r *run) keepAll(ctx context.Context) (dir string, err error) {
	if r.rig == nil {
		return "no place", nil
	}
	if dir = r.keep; dir == "" {
		dir, err = os.MkdirTemp("/var/tmp", "flocker-chaos-")
	} else {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var errs []error
	for _, pattern := range []string{"*/*.log", "witness", "final"} {
		found, _ := filepath.Glob(filepath.Join(r.rig.Dir, pattern))
		for _, path := range found {
			rel, _ := filepath.Rel(r.rig.Dir, path)
			to := filepath.Join(dir, strings.ReplaceAll(rel, "/", "-"))
			if out, err := exec.CommandContext(ctx, "cp", "-r", path, to).CombinedOutput(); err != nil {
				errs = append(errs, fmt.Errorf("keep %s: %w: %s", path, err, out))
			}
		}
	}
	return dir, errors.Join(errs...)
}
