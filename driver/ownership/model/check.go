package model

import (
	"fmt"
	"hash/maphash"
	"slices"
	"time"
)

// Result is what came of a search.
type Result struct {
	States, Moves int
	// Depth is how many steps the state is away that is farthest from the start.
	Depth     int
	Exhausted bool
	// Broken is the promise that does not hold, and Trace the shortest way there.
	Broken string
	Trace  []string
	Took   time.Duration
}

// Check explores every state that can be reached from the start, breadth first, until
// a promise is broken or there are more than limit states. If none is, it looks for
// states from which a node cannot get the volume any more.
func (v *Variant) Check(limit int) (r Result) {
	began := time.Now()
	defer func() { r.Took = time.Since(began) }()
	g := newGraph()
	first := v.start()
	k, _ := first.key()
	g.add(k, none)
	var moves []move
	layer := 0 // the last state of the present depth
	for at := 0; at < g.count; at++ {
		if at > layer {
			r.Depth++
			layer = g.count - 1
		}
		s := g.keys.at(at).unpack()
		g.begin(v.served(&s), s.healthy())
		moves = v.moves(&s, moves[:0])
		for i := range moves {
			m := &moves[i]
			if r.Broken = v.broken(&m.to); r.Broken != "" {
				r.States, r.Trace = g.count, v.trace(g, at, m)
				return r
			}
			k, names := m.to.key()
			to := g.add(k, uint32(at))
			if who, ok := v.counts(&s, m); ok {
				g.edges.push(link(to, names, who))
			}
		}
		r.Moves += len(moves)
		if r.States = g.count; r.States > min(limit, most) {
			return r
		}
	}
	r.Exhausted = true
	if at, found := g.stuck(); found {
		r.Broken, r.Trace = Stuck, v.trace(g, at, nil)
	}
	return r
}

// broken returns the promise that is broken in s, or was on the way to it.
func (v *Variant) broken(s *state) string {
	writers := 0
	for i := range s.n {
		if v.canWrite(s, i) {
			writers++
		}
	}
	if writers > 1 {
		return TwoWriters
	}
	return s.broken
}

// counts says whether a move from s is one that liveness may rely on, and if so for
// whom alone: who is 1 + a node, or 0 for every node. Nothing is expected of a host
// that is off, whose plugin does not run, or that does not reach etcd. Where the
// storage cuts nobody off, an operator confirms that a host is dead, and one that
// runs is expected to come back.
func (v *Variant) counts(s *state, m *move) (who uint8, ok bool) {
	switch m.kind {
	case fate:
		return 0, true
	case effort:
		return 0, v.byHand() || s.healthy()>>m.node&1 == 1
	case wish:
		return uint8(m.who) + 1, true
	case declare, repair:
		return 0, v.byHand()
	case boot, fault:
	}
	return 0, false
}

// healthy is the set of nodes that could use the volume, as bits.
func (s *state) healthy() (set uint8) {
	for i := range s.n {
		if n := &s.n[i]; n.alive && n.agent && n.conn {
			set |= 1 << i
		}
	}
	return set
}

// served is the set of healthy nodes that have the volume mounted and may use it.
func (v *Variant) served(s *state) (set uint8) {
	for i := range s.n {
		if v.canWrite(s, i) && s.owns(uint8(i)) && s.pend == 0 && !s.n[i].lost {
			set |= 1 << i
		}
	}
	return set & s.healthy()
}

// trace tells the way to state at, and on by the move last if there is one. The graph
// knows states up to renaming only, so the way is gone again, with one set of names.
func (v *Variant) trace(g *graph, at int, last *move) (lines []string) {
	var way []int
	for ; at != none; at = int(g.parents.at(at)) {
		way = append(way, at)
	}
	slices.Reverse(way)
	s := v.start()
	to := func(want key, broken string) {
		for _, m := range v.moves(&s, nil) {
			copied := m.to
			if k, _ := copied.key(); k == want && v.broken(&m.to) == broken {
				s = m.to
				lines = append(lines, fmt.Sprintf("%2d  %-58s  %-34s  %s", len(lines)+1, &m, m.step.code, &s))
				return
			}
		}
		panic("the way to a state cannot be gone again")
	}
	for _, next := range way[1:] {
		to(g.keys.at(next), "")
	}
	if last != nil {
		copied := last.to
		k, _ := copied.key()
		to(k, v.broken(&last.to))
	}
	return lines
}

func (m *move) String() string {
	text := fmt.Sprintf("%c  %s", 'A'+m.node, m.step.name)
	if m.peer >= 0 {
		text += fmt.Sprintf(" (%c)", 'A'+m.peer)
	}
	if m.note != "" {
		text += ": " + m.note
	}
	return text
}

const none = 1<<32 - 1

// graph is the states and, for liveness, the moves between them, compactly.
type graph struct {
	seed    maphash.Seed
	table   []uint32 // 1 + the number of a state, by hash
	count   int
	keys    chunks[key]
	parents chunks[uint32]
	edges   chunks[uint32] // links
	first   chunks[uint32] // where a state's edges begin
	goal    []uint8        // the nodes that have the volume, or can get it
	wants   []uint8        // the nodes that should be able to get it
}

func newGraph() *graph { return &graph{seed: maphash.MakeSeed(), table: make([]uint32, 1<<16)} }

// add returns the number of a state, which is new or not.
func (g *graph) add(k key, parent uint32) uint32 {
	if 2*g.count >= len(g.table) {
		g.grow()
	}
	mask := uint64(len(g.table) - 1)
	for h := maphash.Comparable(g.seed, k) & mask; ; h = (h + 1) & mask {
		switch at := g.table[h]; {
		case at == 0:
			g.keys.push(k)
			g.parents.push(parent)
			g.count++
			g.table[h] = uint32(g.count)
			return uint32(g.count - 1)
		case g.keys.at(int(at-1)) == k:
			return at - 1
		}
	}
}

func (g *graph) grow() {
	g.table = make([]uint32, 2*len(g.table))
	mask := uint64(len(g.table) - 1)
	for i := range g.count {
		h := maphash.Comparable(g.seed, g.keys.at(i)) & mask
		for g.table[h] != 0 {
			h = (h + 1) & mask
		}
		g.table[h] = uint32(i + 1)
	}
}

// begin starts the edges of the next state.
func (g *graph) begin(goal, wants uint8) {
	g.goal, g.wants = append(g.goal, goal), append(g.wants, wants)
	g.first.push(uint32(g.edges.n))
}

// renamings are the ways to rename three nodes, and seen[r] what a set of renamed
// nodes is by their former names.
var (
	renamings = [6]names{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	seen      = func() (t [6][8]uint8) {
		for r, p := range renamings {
			for set := range t[r] {
				for i := range nodes {
					t[r][set] |= uint8(set>>p[i]&1) << i
				}
			}
		}
		return t
	}()
)

// link packs an edge: its target, how the nodes are renamed on the way, and for
// whose wish it is.
func link(to uint32, p names, who uint8) uint32 {
	return to<<5 | uint32(slices.Index(renamings[:], p))<<2 | uint32(who)
}

// most is how many states a link can tell apart.
const most = 1 << 27

// stuck returns the first state in which a node could use the volume and cannot get
// it by any moves that count. Most ways on lead to states that were found later, so
// that going through them from the last to the first takes few rounds.
func (g *graph) stuck() (first int, found bool) {
	for changed := true; changed; {
		changed = false
		end := g.edges.n
		for i := g.count - 1; i >= 0; i-- {
			begin := int(g.first.at(i))
			set := g.goal[i]
			for e := begin; e < end && set != 7; e++ {
				l := g.edges.at(e)
				ahead := seen[l>>2&7][g.goal[l>>5]]
				if who := l & 3; who != 0 {
					ahead &= 1 << (who - 1)
				}
				set |= ahead
			}
			end = begin
			if set != g.goal[i] {
				g.goal[i], changed = set, true
			}
		}
	}
	for i := range g.count {
		if g.wants[i]&^g.goal[i] != 0 {
			return i, true
		}
	}
	return 0, false
}

const chunk = 1 << 16

// chunks is a list that never moves what it holds.
type chunks[T any] struct {
	parts [][]T
	n     int
}

func (c *chunks[T]) push(v T) {
	if c.n%chunk == 0 {
		c.parts = append(c.parts, make([]T, chunk))
	}
	c.parts[c.n/chunk][c.n%chunk] = v
	c.n++
}

func (c *chunks[T]) at(i int) T { return c.parts[i/chunk][i%chunk] }
