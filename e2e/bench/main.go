// Command bench measures how fast Flocker is, beside the bare system calls that do
// the same and beside Docker's built-in local driver, and prints a table in
// Markdown. It needs root.
//
// Everything that is compared is done by turns in one run, so that what else the
// machine does hits all alike. The numbers of Flocker are those of the real binary
// through its real socket, with the etcd inside.
//
// With -takeover it does something else: it kills a Docker host again and again, and
// measures how long its volumes are not written to. With -ceph it measures what Flocker
// adds to a real Ceph.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

func main() {
	o := options{volumes: 1000, share: 1, limit: fullLimit}
	quick := flag.Bool("quick", false, "fewer repetitions: half a minute instead of two")
	strict := flag.Bool("strict", false, "end with 1 if a target is missed")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "`directory` to work below; its disk is what is measured")
	flag.StringVar(&o.plugin, "plugin", "", "the plugin's `binary`; built from this source if not given")
	write := flag.String("write", "", "Markdown `file` whose part between the marks (<!-- bench -->, <!-- takeover --> or <!-- ceph -->, and <!-- end of … -->) is replaced")
	kills := flag.Int("takeover", 0, "instead, kill a Docker host so `many` times and measure how long its volumes are not written to")
	rounds := flag.Int("ceph", 0, "instead, start a Ceph cluster and mount volumes in it so `many` times")
	engine := flag.String("engine", string(rig.Debian), "with -takeover: Docker's version, 20.10 or 29")
	flag.Parse()
	if *quick {
		o.share, o.limit = 6, quickLimit
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	name := "bench"
	var r table
	var err error
	switch {
	case *kills > 0:
		name = "takeover"
		r, err = measureTakeovers(ctx, rig.Engine(*engine), *kills)
	case *rounds > 0:
		name = "ceph"
		r, err = measureCeph(ctx, o, *rounds)
	default:
		r, err = bench(ctx, o)
	}
	stop()
	if err == nil {
		fmt.Print(r.markdown())
		if *write != "" {
			err = replace(*write, name, r.markdown())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	if missed := r.missed(); *strict && missed > 0 {
		fmt.Fprintf(os.Stderr, "bench: %d targets are missed\n", missed)
		os.Exit(1)
	}
}

// table is what a run found out.
type table interface {
	markdown() string
	missed() int
}

type options struct {
	dir, plugin string
	// share is what part of the usual repetitions is made: 1 is all of them.
	share int
	limit time.Duration
	// volumes is how many there are for List and for memory.
	volumes int
}

// A run on a quiet machine takes two minutes, a quick one half a minute. One that has
// not ended by then hangs.
const (
	fullLimit    = 220 * time.Second
	quickLimit   = 100 * time.Second
	cleanupLimit = 20 * time.Second
)

// run is one run of the benchmark.
type run struct {
	options

	area  *area // where it works
	times samples
	// Volumes and files are numbered.
	count int
	// local is Docker's local driver, nil where it could not be built.
	local *local

	store *ownership.Etcd
	rates rates

	report report
}

// bench makes one run and cleans up behind it.
func bench(ctx context.Context, o options) (_ *report, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("root is needed to mount")
	}
	r := &run{options: o, rates: rates{}}
	if r.area, err = newArea(ctx, o.dir); err != nil {
		return nil, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		if failed := r.area.remove(clean); failed != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", failed))
		}
	}()
	if r.plugin == "" {
		if r.plugin, err = buildPlugin(ctx, r.area.dir); err != nil {
			return nil, err
		}
	}
	if r.local, err = startLocal(ctx, r.area); err != nil {
		r.report.note("Docker's local driver is left out: %v.", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("not done after %v", o.limit))
	defer cancel()
	if err := r.measure(ctx); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return &r.report, nil
}

// measure does all of it.
func (r *run) measure(ctx context.Context) error {
	etcd, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	a, err := r.area.start(ctx, r.plugin, "a", "FLOCKER_ETCD_LISTEN="+etcd)
	if err != nil {
		return err
	}
	if r.store, err = ownership.NewEtcd(ownership.EtcdConfig{Endpoints: []string{etcd}}); err != nil {
		return err
	}
	defer r.store.Close()
	for _, part := range []struct {
		what string
		do   func(context.Context, *host) error
	}{{"one caller", r.one}, {"many callers", r.sixteen}, {"writing", r.throughput}} {
		progress("measuring: " + part.what)
		if err := part.do(ctx, a); err != nil {
			return fmt.Errorf("%s: %w%s", part.what, err, a.lastWords())
		}
	}
	b, err := r.area.start(ctx, r.plugin, "b", "FLOCKER_ETCD_ENDPOINTS="+etcd)
	if err != nil {
		return err
	}
	progress("measuring: two hosts")
	if err := errors.Join(r.memory(ctx, b), r.move(ctx, a, b)); err != nil {
		return fmt.Errorf("two hosts: %w%s%s", err, a.lastWords(), b.lastWords())
	}
	r.report.machine = machine(r.area.dir)
	r.tabulate()
	return nil
}

func progress(what string) {
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format(time.TimeOnly), what)
}

const atLeast = 2

// turns calls f until it was called n times, but no longer than limit: a slow
// machine measures less often. It is called twice at least.
func (r *run) turns(ctx context.Context, n int, limit time.Duration, f func(turn int) error) error {
	n, limit = max(n/r.share, atLeast), limit/time.Duration(r.share)
	end := time.Now().Add(limit)
	for turn := range n {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if turn >= atLeast && time.Now().After(end) {
			break
		}
		if err := f(turn); err != nil {
			return err
		}
	}
	return nil
}

// part is how many of n calls many callers make in a shorter run: two each at least.
func (r *run) part(n int) int { return max(n/r.share, min(n, 2*callers)) }

// byTurns calls both, the first one first in every other turn.
func byTurns(turn int, ours, other func() error) error {
	if turn%2 == 1 {
		ours, other = other, ours
	}
	if err := ours(); err != nil {
		return err
	}
	return other()
}

// next returns a new name.
func (r *run) next() string {
	r.count++
	return fmt.Sprintf("bench%05d", r.count)
}
