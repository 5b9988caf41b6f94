// Package model checks the ownership protocol by trying everything: it explores
// every state that two or three nodes, etcd, the storage, Docker and an operator can
// get into over one volume, with a bounded number of faults, and looks for one in
// which a promise is broken.
//
// It is not the code, but made to be compared with it: each step is named as in the
// code, and says which function it stands for. docs/model.md says what is modelled
// and how to read a counterexample.
//
//	state.go     what there is, and how it is told from another state
//	model.go     the variants, and how steps are put together
//	node.go      what a node's plugin does
//	world.go     what everybody else does, and what goes wrong
//	check.go     the search
//	variants.go  what is checked
package model

// Class is what the storage does against a node that is no longer the owner.
type Class uint8

// The classes of backends.Class; F1 twice, by whether an attachment has an id.
const (
	F0      Class = iota // nothing, and attachments end with the host's boot
	F3                   // nothing, and attachments outlive it
	F1                   // it attaches to one node at a time, and detaches by id
	F1NoIDs              // the same, by volume and node alone
	F2                   // it cuts off a node up to a token; many may attach
)

// byHand says that only somebody's word cuts a node off.
func (v *Variant) byHand() bool { return v.Class == F0 || v.Class == F3 }

// exclusive says that the storage attaches the volume to one node at a time.
func (v *Variant) exclusive() bool { return v.Class == F1 || v.Class == F1NoIDs }

// Fault is something that goes wrong.
type Fault uint8

// The faults, each with a budget of its own.
const (
	AgentCrash Fault = iota // the plugin is killed; its containers run on
	NodeCrash               // power off
	Partition               // no way to etcd; the storage is still in reach
	LeaseLoss               // etcd revokes a lease for no reason
	LateCall                // a call to the storage whose caller gives up: it takes effect at any later time, or never
	LateWrite               // the same for a transaction of etcd
	WrongWord               // the operator declares a node dead that runs
	faults
)

// Faults is how many of each may happen in one run, at most 3.
type Faults [faults]uint8

// Break is a rule of the protocol that a variant does without.
type Break uint32

// The rules of reference 2.9, and from NoRetake on those of this code.
const (
	LeaseBound        Break = 1 << iota // own/<vid> is on the owner's lease
	AutoTakeover                        // F0: a silent node is taken over from
	SelfFence                           // with it: a node without etcd stops its containers, at some time
	LazyUnmount                         // umount -l counts as closed
	BlindRestart                        // a new process trusts the journal without asking etcd
	StealingAttach                      // Attach takes the volume away from another node
	NoIntent                            // a detach is not in the journal
	AdoptOld                            // an attachment of an older token is used
	UncheckedFence                      // the fence is called without a look at the token
	LateLookup                          // the fence cuts off whoever is attached when it arrives
	FireAndForget                       // a detach counts as done when it is sent
	NoOwnHorizon                        // no wait after an own detach of unknown outcome
	NoTakerHorizon                      // no wait after the fence of a process that died
	NoRetake                            // no new token after a release of unknown outcome
	NoGiveUp                            // a node that was declared dead registers as it is
	OldBoot                             // an ownership of an older boot is taken up as it is
	LateAdopt                           // a new process takes up an attachment that nothing is mounted on
	NoFence                             // SETTLE without the fence
	FenceTaker                          // a takeover of a takeover cuts off the taker
	ForgetLate                          // that a call may be late is not on disk, once the volume is not the node's
	UnmarkedSweep                       // nor that of a leftover beside what the node owns
	NoRefence                           // an owner whose Attach another node blocks does not cut that off
	UnrecordedRefence                   // F1NoIDs: it does, but without a record as a takeover has one
	FormerOnly                          // it does, but only to whom its own takeover has cut off before
	UnmarkedFormat                      // a mount does not wait until the format is recorded
	BlindFormat                         // mkfs runs without a look at what is on the disk
)

// Variant is one way to run the protocol.
type Variant struct {
	Class  Class
	Nodes  int // 2 or 3
	Faults Faults
	Breaks Break
	// Format begins with a volume that was never formatted.
	Format bool
	// Patient is for WrongWord: nobody takes anything over before the node that
	// was declared dead in error has registered again.
	Patient bool
}

func (v *Variant) has(b Break) bool { return v.Breaks&b != 0 }

// The promises.
const (
	TwoWriters   = "two nodes can write"
	DevicePulled = "the device is pulled from the rightful owner's container"
	DataLost     = "acknowledged data is lost"
	Stuck        = "a node that wants the volume cannot get it any more"
)

// kind says who makes a step, for liveness.
type kind uint8

const (
	fate    kind = iota // time, the storage and etcd
	effort              // a node by itself, or Docker on it
	wish                // somebody wants the volume on the node move.who
	repair              // a process is started, a connection heals
	boot                // a host is switched on
	declare             // an operator's confirmation of what is true
	fault
)

// step names what happens, and the code it stands for.
type step struct{ name, code string }

// move is one step from one state to the next.
type move struct {
	step *step
	node int8
	peer int8 // the other node of the step, or -1
	kind kind
	who  int8   // of a wish
	note string // what else happens
	to   state
}

// moves appends every step that can be made from s to out. It is the protocol.
func (v *Variant) moves(s *state, out []move) []move {
	g := &generator{v: v, s: s, out: out}
	for i := range s.n {
		g.me, g.n = uint8(i), &s.n[i]
		g.lease()
		g.transactions()
		g.takeover()
		g.storage()
		g.docker()
		g.faults()
	}
	g.late()
	for k := len(out); k < len(g.out); k++ {
		v.forget(&g.out[k].to)
	}
	return g.out
}

// start is the state before anything has happened.
func (v *Variant) start() state {
	s := state{formatted: !v.Format, left: v.Faults}
	for i := range s.n {
		if i < v.Nodes {
			s.n[i] = node{alive: true, agent: true, conn: true, live: true}
		} else {
			s.n[i].absent = true
		}
	}
	return s
}

// generator makes the moves from one state.
type generator struct {
	v   *Variant
	s   *state
	me  uint8
	n   *node // me, as it is
	out []move
}

// add makes a move of the present node. Its outcome, and the node in it, are for the
// caller to change, until the next move is added.
func (g *generator) add(st *step, k kind) (*state, *node) {
	g.out = append(g.out, move{step: st, node: int8(g.me), peer: -1, who: int8(g.me), kind: k, to: *g.s})
	t := &g.last().to
	return t, &t.n[g.me]
}

// toward is add with the other node of the step.
func (g *generator) toward(peer uint8, st *step, k kind) (*state, *node) {
	t, n := g.add(st, k)
	g.last().peer = int8(peer)
	return t, n
}

// spend is add with a fault.
func (g *generator) spend(f Fault, st *step, note string) (*state, *node) {
	t, n := g.add(st, fault)
	g.last().note = note
	t.left[f]--
	return t, n
}

func (g *generator) last() *move { return &g.out[len(g.out)-1] }

// up says that the process runs, and online that it reaches etcd.
func (g *generator) up() bool     { return g.n.alive && g.n.agent }
func (g *generator) online() bool { return g.up() && g.n.conn }

// try makes the two outcomes of a transaction that its sender can see: the answer,
// and none. answered changes the node by the answer, unsure without one. A claim may
// be sent in vain, and arrive when it is not.
func (g *generator) try(st *step, w write, answered func(t *state, n *node), unsure func(n *node)) {
	w.by = g.me
	k, peer, who := effort, int8(-1), int8(g.me)
	switch w.kind {
	case claim:
		k = wish
	case seize:
		k, peer = wish, int8(g.s.owner)-1
	case handOver:
		k, peer, who = wish, int8(w.to), int8(w.to)
	case refence:
		peer = int8(w.to)
	case noWrite, retake, release, settle, record:
	}
	t, n := g.add(st, k)
	g.last().peer, g.last().who = peer, who
	ok := g.v.commit(t, w)
	if ok {
		answered(t, n)
	} else {
		g.out = g.out[:len(g.out)-1]
	}
	if (ok || w.kind == claim) && g.s.left[LateWrite] > 0 && g.s.slot.kind == noWrite {
		t, n := g.spend(LateWrite, st, "NO ANSWER")
		g.last().peer = peer
		t.slot = w
		if unsure != nil {
			unsure(n)
		}
	}
}
