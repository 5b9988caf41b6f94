//go:build e2e

package main

import (
	"context"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// A whole run, with one kill: every piece is measured, and they are in order.
func TestTakeover(t *testing.T) {
	rig.Require(t, "root", "docker")
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	run, err := measureTakeovers(ctx, rig.Debian, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(run.markdown())
	for _, w := range run.writers {
		for _, what := range []string{writesAgain, leaseEnds, mountComes, ours, attach, attachAlone, starts, firstRecord} {
			if run.times.p(w.title+what, 50) <= 0 {
				t.Errorf("%s: %s was not measured", w.title, what)
			}
		}
		if took := run.times.p(w.title+writesAgain, 50); took < hold+5*time.Second {
			t.Errorf("%s: writing again after %v, before the host could count as dead", w.title, took)
		}
		if all := run.times.p(w.title+writesAgain, 50); all < run.times.p(w.title+leaseEnds, 50)+hold+run.times.p(w.title+ours, 50) {
			t.Errorf("%s: the pieces are longer than the whole", w.title)
		}
	}
}
