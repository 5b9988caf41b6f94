package model

import (
	"maps"
	"math/rand/v2"
	"testing"
)

// A state stands for all that have its key: whatever can be done in one of them can
// be done in the others, and leads to states that have one key again. So nothing is
// missed by looking at one.
func TestKey(t *testing.T) {
	for _, class := range []Class{F0, F3, F1, F1NoIDs, F2} {
		for seed := range uint64(60) {
			v := Variant{Class: class, Nodes: 3, Format: seed%2 == 0, Faults: Faults{1, 1, 1, 1, 1, 1, 1}}
			random := rand.New(rand.NewPCG(seed, uint64(class)))
			s := v.start()
			for range 60 {
				copied := s
				key, _ := copied.key()
				ahead := v.ahead(s)
				if !maps.Equal(ahead, v.ahead(key.unpack())) {
					t.Fatalf("class %d, seed %d: %+v\ncan do other things than %+v", class, seed, s, key.unpack())
				}
				for _, p := range renamings {
					other := s.rename(p)
					if got, _ := other.key(); got != key || !maps.Equal(ahead, v.ahead(s.rename(p))) {
						t.Fatalf("class %d, seed %d: %+v\nis not the same as %+v", class, seed, s, s.rename(p))
					}
				}
				moves := v.moves(&s, nil)
				s = moves[random.IntN(len(moves))].to
			}
		}
	}
}

// outcome is a move up to renaming.
type outcome struct {
	step *step
	note string
	kind kind
	to   key
}

// ahead counts what can be done in a state.
func (v *Variant) ahead(s state) map[outcome]int {
	all := map[outcome]int{}
	for _, m := range v.moves(&s, nil) {
		k, _ := m.to.key()
		all[outcome{m.step, m.note, m.kind, k}]++
	}
	return all
}

// rename returns the state with its nodes renamed.
func (s *state) rename(p names) state {
	r := *s
	for i, n := range s.n {
		if n.aims() {
			n.target = p[n.target]
		}
		n.former = p.one(n.former)
		r.n[p[i]] = n
	}
	r.owner, r.pend = p.one(s.owner), p.one(s.pend)
	if s.slot.kind != noWrite {
		r.slot.by = p[s.slot.by]
	}
	if s.slot.kind == handOver || s.slot.kind == refence {
		r.slot.to = p[s.slot.to]
	}
	for i, o := range s.orphans {
		if o.kind != noCall {
			r.orphans[i].by, r.orphans[i].node = p[o.by], p[o.node]
		}
	}
	return r
}
