// Command chaos breaks a Swarm of three Docker hosts in every way it knows, for as
// long as it is told to, while services write to volumes of Flocker, and then checks
// that no two hosts ever wrote one volume and that nothing acknowledged is missing.
// It ends with 1 if anything is. It needs root; `make chaos` prepares what it needs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

func main() {
	o := options{settings: map[string]string{}}
	flag.DurationVar(&o.time, "time", 10*time.Minute, "how long to inject faults")
	flag.Uint64Var(&o.seed, "seed", 0, "the faults and their order; 0: another one each time")
	flag.StringVar(&o.backend, "backend", "loopback", "storage of the volumes, by turns if there are several with commas: "+strings.Join(slices.Sorted(maps.Keys(backends)), ", ")+"; or both, which is the test storage of either class and loopback")
	flag.StringVar((*string)(&o.engine), "engine", string(rig.Debian), "Docker's version: 20.10 or 29")
	flag.StringVar(&o.report, "report", "", "Markdown `file` to write the report to")
	flag.StringVar(&o.keep, "keep", "", "`directory` for logs and histories, to be made; without it they are kept if there is a violation")
	flag.DurationVar(&o.every, "every", 200*time.Millisecond, "`time` between two records of a writer")
	flag.DurationVar(&o.settle, "settle", 3*time.Minute, "`time` within which everything has to write again when nothing is broken any more")
	flag.BoolVar(&o.sabotage, "sabotage", false, "mount a volume twice at the end, which must be found: the result is then the reverse")
	only := flag.String("only", "", "these `faults` only, separated by commas")
	list := flag.Bool("list", false, "list the faults, and end")
	flag.Func("set", "a setting of the plugin, as `NAME=VALUE`; may be repeated", func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("write NAME=VALUE")
		}
		o.settings[name] = value
		return nil
	})
	flag.Parse()
	if *list {
		for _, f := range faults {
			fmt.Printf("%-26s %s\n", f.name, f.help)
		}
		return
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	if o.backend == "both" {
		o.backend = bothBackends
	}
	if o.seed == 0 {
		o.seed = rand.Uint64N(1e6) + 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second interrupt ends it at once; the kernel then ends all of the rig.
	context.AfterFunc(ctx, stop)
	ok, err := chaos(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

type options struct {
	time, every, settle time.Duration
	seed                uint64
	backend             string
	engine              rig.Engine
	report, keep        string
	sabotage            bool
	only                []string
	settings            map[string]string
}

// chaos is the whole of it: a rig, the faults, the checks, the report. ok says that
// no promise was broken, or with sabotage that it was noticed.
func chaos(ctx context.Context, o options) (ok bool, err error) {
	r := &run{options: o, began: time.Now()}
	if r.plans, err = newPlans(o.seed, o.only, o.hasTestStore()); err != nil {
		return false, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		err = errors.Join(err, r.close(ctx))
	}()
	report, err := r.all(ctx)
	switch {
	case ctx.Err() != nil:
		return false, errors.New("interrupted")
	case err != nil:
		dir, keepErr := r.keepAll(ctx)
		return false, errors.Join(fmt.Errorf("%w\n%sseed %d; logs and histories are in %s", err, r.evidence(), r.seed, dir), keepErr)
	}
	if ok = len(report.violations) == 0; o.sabotage {
		ok = report.found("intervals") && report.found("data")
	}
	if len(report.violations) > 0 || o.keep != "" {
		if report.kept, err = r.keepAll(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "chaos:", err)
		}
	}
	if len(report.violations) > 0 {
		r.violations = report.violations
		fmt.Print("\n" + r.evidence())
	}
	text := report.markdown()
	fmt.Print("\n" + text)
	if o.report != "" {
		err = os.WriteFile(o.report, []byte(text), 0o644)
	}
	return ok, err
}

func (r *run) all(ctx context.Context) (*report, error) {
	for _, phase := range []func(context.Context) error{r.start, r.inject, r.finish} {
		if err := phase(ctx); err != nil {
			return nil, err
		}
	}
	return r.check(ctx)
}
