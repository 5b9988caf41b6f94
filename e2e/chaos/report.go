package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	outages        map[string][]time.Duration // by fault
	// tookOver is from a host's fault until its volume had another owner, and fences
	// what of that was the fence and the commit.
	tookOver, fences []time.Duration
	// moved is how long nothing was written at a planned move.
	moved      []time.Duration
	violations []history.Violation
	notes      []string
	kept       string
}

// check runs every check.
func (r *run) check(ctx context.Context) (*report, error) {
	p := &report{run: r, notes: r.notes}
	p.engine, _ = r.rig.Hosts[0].Docker(ctx, "version", "--format", "{{.Server.Version}}")
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
	changes, err := changesFrom(events, time.Now().Add(-history.Now()))
	if err != nil {
		return nil, err
	}
	p.count(all, changes)
	p.tookOver, p.fences = takeovers(changes, r.injected)
	p.moved = history.Moves(all)

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
	p.outages = attribute(history.Outages(all, outage), r.injected)
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
	for _, h := range r.rig.Hosts {
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

// takeovers says how long it took from the last fault of a host until its volume had
// another owner, and how long of that the former owner's fence and the commit took.
func takeovers(changes []history.Change, faults []*injected) (all, fences []time.Duration) {
	owner, seized := map[string]string{}, map[string]time.Duration{}
	for _, c := range changes {
		switch {
		case c.Pending:
			seized[c.Volume] = c.At
			continue
		case c.Forced && c.At != 0:
			fences = append(fences, c.At-seized[c.Volume])
			for _, f := range slices.Backward(faults) {
				if f.where == onHost && f.host.Name == owner[c.Volume] && f.at <= seized[c.Volume] {
					all = append(all, c.At-f.at)
					break
				}
			}
		}
		owner[c.Volume] = c.Node
	}
	return all, fences
}

// lag is how long before a fault an outage it causes may seem to begin, and for how
// long after its repair one may begin: Swarm may take that long to notice.
const (
	lagBefore = 1 * time.Second
	lagAfter  = 40 * time.Second
)

// attribute says how long it took from a fault until writing went on. An outage is
// the last fault's that hit its host or volume, or else the last one's at all.
func attribute(outages []history.Outage, faults []*injected) map[string][]time.Duration {
	took := map[string][]time.Duration{}
	for _, o := range outages {
		var because *injected
		mine := false
		for _, f := range faults {
			if f.at > o.Begin+lagBefore || f.repaired != 0 && f.repaired+lagAfter < o.Begin {
				continue
			}
			hit := f.volume == o.Volume || f.where == onHost && f.host.Name == o.Node
			if hit || !mine {
				because, mine = f, hit
			}
		}
		name, from := "no fault", o.Begin
		if because != nil {
			name, from = because.name, max(because.at, o.Begin)
		}
		took[name] = append(took[name], o.End-from)
	}
	return took
}

// found says whether one of the violations is of a check.
func (p *report) found(check string) bool {
	return slices.ContainsFunc(p.violations, func(v history.Violation) bool { return v.Check == check })
}

// markdown is the report.
func (p *report) markdown() string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	r := p.run
	say("# Chaos")
	say("")
	say("%s, seed %d, %v of faults on three hosts with Docker Engine %s, storage %s.", r.began.UTC().Format(time.DateOnly), r.seed, r.time, p.engine, r.backend)
	if len(r.settings) > 0 {
		say("Settings: %v.", r.settings)
	}
	say("")
	if n := len(p.violations); n == 0 {
		say("**No violation.**")
	} else {
		say("**%d violations.** Logs and histories are in %s.", n, cmp.Or(p.kept, "no place"))
		say("")
		for _, v := range p.violations {
			say("* %s", strings.ReplaceAll(v.String(), "\n", "\n  "))
		}
	}
	say("")
	say("| what | count |")
	say("| --- | --- |")
	say("| faults | %d |", len(r.injected))
	say("| writers that ran | %d |", p.incarnations)
	say("| records acknowledged after fsync | %d |", p.acknowledged)
	say("| of them verified at the end | %d |", p.verified)
	say("| records written without a sync | %d |", p.unsynced)
	say("| attempts that found no space | %d |", p.full)
	say("| planned moves to another host | %d |", p.moves)
	say("| takeovers from a dead host | %d |", p.takeovers)
	say("| hosts that the operator declared dead | %d |", r.declared)
	if p.unknownTimes > 0 {
		say("| changes of owners whose time is not in etcd | %d |", p.unknownTimes)
	}
	say("| other volumes: commands, of which failed | %d, %d |", r.others.done, r.others.failed)
	say("| the slowest of them: %s | %v |", r.others.what, r.others.slowest.Round(time.Millisecond))
	say("")
	say("Time from a fault to writing again, where writing stopped for more than %v:", outage)
	say("")
	say("| fault | injected | writing stopped | p50 | p95 | longest |")
	say("| --- | --- | --- | --- | --- | --- |")
	var every []time.Duration
	line := func(name string, injected int, took []time.Duration) {
		if len(took) == 0 {
			say("| %s | %d | 0 | | | |", name, injected)
			return
		}
		p50, p95, longest := percentiles(took)
		say("| %s | %d | %d | %.1f s | %.1f s | %.1f s |", name, injected, len(took), p50, p95, longest)
	}
	for _, f := range append(slices.Clone(faults), &fault{name: "no fault"}) {
		injected := 0
		for _, i := range r.injected {
			if i.name == f.name {
				injected++
			}
		}
		took := p.outages[f.name]
		every = append(every, took...)
		if injected > 0 || len(took) > 0 {
			line(f.name, injected, took)
		}
	}
	line("all", len(r.injected), every)
	say("")
	say("| how long | count | p50 | p95 | longest |")
	say("| --- | --- | --- | --- | --- |")
	for _, l := range []struct {
		what string
		took []time.Duration
	}{
		{"nothing was written when a service moved as planned, containers included", p.moved},
		{"from a host's fault until its volume had another owner, Swarm's part included", p.tookOver},
		{"the fence and the commit of that", p.fences},
	} {
		if len(l.took) == 0 {
			say("| %s | 0 | | | |", l.what)
			continue
		}
		p50, p95, longest := percentiles(l.took)
		say("| %s | %d | %.2f s | %.2f s | %.2f s |", l.what, len(l.took), p50, p95, longest)
	}
	if len(p.notes) > 0 {
		say("")
		say("Notes:")
		say("")
		for _, n := range p.notes {
			say("* %s", strings.ReplaceAll(n, "\n", "\n  "))
		}
	}
	return b.String()
}

// percentiles are in seconds. There is at least one.
func percentiles(took []time.Duration) (p50, p95, longest float64) {
	slices.Sort(took)
	at := func(percent int) float64 { return took[(len(took)-1)*percent/100].Seconds() }
	return at(50), at(95), at(100)
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
