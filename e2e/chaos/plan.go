package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// A plan is an endless list of steps that follows from its seed alone. What they hit
// depends on the run: a host is chosen by what it does at that moment.
type plan struct {
	random *rand.Rand
	faults []*fault
	weight int
}

// A step is one fault.
type step struct {
	*fault

	// pick chooses whom it hits.
	pick uint64
	// hold is how long it lasts.
	hold time.Duration
	// overlaps says that the next fault comes before this one is over.
	overlaps bool
	// settles says that everything must write again before the next one.
	settles bool
	// rest is how long it is calm after it.
	rest time.Duration
}

// newPlan is one of the faults named, or of all that there can be with the test
// storage or without it.
func newPlan(seed uint64, names []string, testStore bool) (*plan, error) {
	p := &plan{random: rand.New(rand.NewPCG(seed, 0))}
	for _, f := range faults {
		if (testStore || !f.storage) && (len(names) == 0 || slices.Contains(names, f.name)) {
			p.faults = append(p.faults, f)
			p.weight += f.weight
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(faults, func(f *fault) bool { return f.name == name }) {
			return nil, fmt.Errorf("there is no fault %q; -list shows them", name)
		}
	}
	if p.weight == 0 {
		return nil, errors.New("none of these faults is possible without the test storage")
	}
	return p, nil
}

func (p *plan) next() step {
	s := step{fault: p.faults[0], pick: p.random.Uint64()}
	n := p.random.IntN(p.weight)
	for _, s.fault = range p.faults {
		if n -= s.weight; n < 0 {
			break
		}
	}
	s.hold = s.least + time.Duration(p.random.Int64N(int64(s.most-s.least)+1))
	s.overlaps = p.random.IntN(4) == 0
	s.settles = p.random.IntN(3) > 0
	s.rest = time.Duration(p.random.Int64N(int64(3 * time.Second)))
	return s
}
