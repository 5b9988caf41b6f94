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
	lane   lane
	faults []*fault
	weight int
}

// A lane is a list of faults that come one after the other. Those of different lanes
// come at the same time.
type lane int

const (
	// hosts takes whole hosts away, one at a time.
	hosts lane = iota
	// parts breaks programs and connections of the hosts that are there.
	parts
	etcds
	storages
	lanes
)

// A step is one fault.
type step struct {
	*fault

	// pick chooses whom it hits.
	pick uint64
	// hold is how long it lasts.
	hold time.Duration
	// rest is how long its lane is calm after it.
	rest time.Duration
}

// newPlans are one for each lane that has any of the faults named, or of all that
// there can be with the test storage or without it.
func newPlans(seed uint64, names []string, testStore bool) (plans []*plan, err error) {
	for _, name := range names {
		if !slices.ContainsFunc(faults, func(f *fault) bool { return f.name == name }) {
			return nil, fmt.Errorf("there is no fault %q; -list shows them", name)
		}
	}
	for l := range lanes {
		p := &plan{random: rand.New(rand.NewPCG(seed, uint64(l)+2)), lane: l}
		for _, f := range faults {
			if f.lane() == l && (testStore || !f.storage) && (len(names) == 0 || slices.Contains(names, f.name)) {
				p.faults = append(p.faults, f)
				p.weight += f.weight
			}
		}
		if p.weight > 0 {
			plans = append(plans, p)
		}
	}
	if len(plans) == 0 {
		return nil, errors.New("none of these faults is possible without the test storage")
	}
	return plans, nil
}

// rests is how long a lane is calm at most. With each new leader of etcd the dead live
// longer, and nothing would ever be taken over.
var rests = [lanes]time.Duration{hosts: 2 * time.Second, parts: 2 * time.Second, etcds: 12 * time.Second, storages: 5 * time.Second}

func (p *plan) next() step {
	s := step{fault: p.faults[0], pick: p.random.Uint64()}
	n := p.random.IntN(p.weight)
	for _, s.fault = range p.faults {
		if n -= s.weight; n < 0 {
			break
		}
	}
	s.hold = s.least + time.Duration(p.random.Int64N(int64(s.most-s.least)+1))
	s.rest = time.Duration(p.random.Int64N(int64(rests[p.lane])))
	return s
}
