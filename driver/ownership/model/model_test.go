package model

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"text/tabwriter"
)

var (
	budget = flag.Int("budget", 2, "how many faults with three nodes; one more with two")
	limit  = flag.Int("limit", 30_000_000, "how many states one search may find; a million take about 0.1 GB")
)

// The promises hold in every variant of the protocol that is meant to be used, and
// every state there is was looked at.
func TestPromised(t *testing.T) {
	n := *budget
	if underRace {
		n = 1 // it is ten times slower, and there is one goroutine a search
	}
	table(t, Promised(n))
}

// A protocol that does without one of the rules is caught: otherwise the model would
// prove nothing.
func TestBroken(t *testing.T) { table(t, Broken()) }

// table runs the checks, two at a time on two cores, and prints a line for each.
func table(t *testing.T, checks []Check) {
	results := make([]Result, len(checks))
	t.Run("check", func(t *testing.T) {
		for i, c := range checks {
			t.Run(c.Name, func(t *testing.T) {
				t.Parallel()
				r := c.Run(*limit)
				results[i] = r
				switch trace := strings.Join(r.Trace, "\n"); {
				case r.Broken != c.Wants && c.Wants != "":
					t.Errorf("not caught, though it breaks a rule: found %q, want %q", r.Broken, c.Wants)
				case r.Broken != c.Wants:
					t.Errorf("%s:\n%s", r.Broken, trace)
				case c.Wants == "" && !r.Exhausted:
					t.Errorf("stopped after %d states; there are more", r.States)
				case c.Wants != "":
					t.Logf("%s:\n%s", r.Broken, trace)
				}
			})
		}
	})
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nvariant\truns\tstates\tmoves\tdepth\ttime\tresult")
	for i, c := range checks {
		r := results[i]
		if r.States == 0 {
			continue // not asked for
		}
		result := "every promise holds, exhausted"
		switch {
		case r.Broken != "":
			result = fmt.Sprintf("%s, %d steps", r.Broken, len(r.Trace))
		case !r.Exhausted:
			result = "no promise broken so far, NOT EXHAUSTED"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%.1fs\t%s\n", c.Name, len(c.Runs), r.States, r.Moves, r.Depth, r.Took.Seconds(), result)
	}
	w.Flush()
	t.Log(b.String())
}
