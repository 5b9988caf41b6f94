package model

import (
	"fmt"
	"math/bits"
	"strings"
)

// nodes is how many nodes there are at most.
const nodes = 3

// doing is what a node's driver does while it holds the volume's lock.
type doing uint8

const (
	nothing doing = iota
	attaching
	seized // about to fence, without another look: only if UncheckedFence
	fencing
	fenced // the fence was seen to have worked; not settled yet
)

// node is one node as far as the volume goes. Tokens are ranks: 0 is none, and a
// larger one is younger.
type node struct {
	absent             bool // there is no such node
	alive, agent, conn bool // power, the plugin's process, its way to etcd
	live               bool // live/<nid> is there

	want bool // a Mount is under way here, and has a token
	run  bool // a container runs on it, and writes

	token  uint8 // dataset.token
	held   bool  // dataset.att is not nil
	doubt  bool  // dataset.doubt
	intent bool  // dataset.detaching, which is in the journal
	late   bool  // dataset.late: an own call may still take effect
	lost   bool  // dataset.lost
	fresh  bool  // formatted by this Mount, not recorded yet
	known  bool  // dataset.vol.Formatted

	fs     uint8 // the attachment the kernel has the filesystem open on
	att    uint8 // the attachment the storage has for this node
	cut    uint8 // F2: the youngest token on the blocklist for this node
	boot   uint8 // this boot of the host
	reg    uint8 // node/<nid>.boot
	dead   uint8 // 1 + the boot in fence/<nid>/<boot>; 0 is none
	back   bool  // it has registered although it was declared dead
	forced bool  // it was declared dead while live

	doing  doing
	call   uint8 // the token the outstanding call names
	target uint8 // of a fence
	former uint8 // dataset.former: 1 + the node that this takeover has cut off; only if FormerOnly
}

// writeKind is a transaction on own/<vid>.
type writeKind uint8

const (
	noWrite writeKind = iota
	claim
	retake
	release
	handOver
	seize
	refence // a SEIZE from itself
	settle
	record // FORMATTED
)

// write is one transaction: what it compares and what it puts.
type write struct {
	kind  writeKind
	by    uint8
	token uint8 // what mod(own) must be
	to    uint8 // of a hand-over or refence
	boot  uint8 // what it puts
}

// callKind is a call to the storage that nobody waits for any more.
type callKind uint8

const (
	noCall callKind = iota
	attachCall
	detachCall
	fenceCall
)

// orphan is such a call: by whom, about whose attachment, and what token it names.
type orphan struct {
	kind            callKind
	by, node, token uint8
}

// state is everything there is.
type state struct {
	n [nodes]node

	// own/<vid>: owner is 1 + the node, 0 if the key is not there.
	owner, token, ownBoot uint8
	pend                  uint8 // 1 + the node a takeover has to cut off; 0 is none
	pendToken             uint8

	slot      write     // a write to etcd whose sender has given up
	orphans   [4]orphan // calls to the storage whose senders have
	formatted bool      // vol/<vid>.formatted
	acked     bool      // the disk holds data somebody was told is safe
	left      Faults

	broken string // the invariant that the step to here broke; not part of the key
}

// key is a state in a form in which two that differ only in the names of the nodes
// or in the numbers of tokens and boots are equal.
type key [5]uint64

// packer collects bits.
type packer struct {
	word uint64
	n    uint
}

func (p *packer) put(v uint8, width uint) {
	if v>>width != 0 {
		panic("more tokens or boots at once than there is room for: give fewer faults")
	}
	p.word |= uint64(v) << p.n
	p.n += width
}

func (p *packer) flag(b bool) {
	if b {
		p.word |= 1 << p.n
	}
	p.n++
}

func (p *packer) get(width uint) uint8 {
	v := uint8(p.word & (1<<width - 1))
	p.word >>= width
	return v
}

func (p *packer) bool() bool { return p.get(1) == 1 }

// aims says that target and call are those of a fence.
func (n *node) aims() bool { return n.doing == seized || n.doing == fencing }

// Where in a node's word it refers to other nodes.
const targetShift, formerShift = 48, 50

// pack is one node without the nodes it refers to.
func (n *node) pack() uint64 {
	var p packer
	p.flag(n.absent)
	p.flag(n.alive)
	p.flag(n.agent)
	p.flag(n.conn)
	p.flag(n.live)
	p.flag(n.want)
	p.flag(n.run)
	p.flag(n.held)
	p.flag(n.doubt)
	p.flag(n.intent)
	p.flag(n.late)
	p.flag(n.lost)
	p.flag(n.fresh)
	p.flag(n.known)
	p.flag(n.back)
	p.flag(n.forced)
	p.put(uint8(n.doing), 3)
	p.put(n.boot, 2)
	p.put(n.reg, 2)
	p.put(n.dead, 3)
	p.put(n.token, 4)
	p.put(n.fs, 4)
	p.put(n.att, 4)
	p.put(n.cut, 4)
	p.put(n.call, 4)
	return p.word
}

func unpackNode(w uint64) node {
	p := packer{word: w}
	return node{
		absent: p.bool(), alive: p.bool(), agent: p.bool(), conn: p.bool(), live: p.bool(),
		want: p.bool(), run: p.bool(), held: p.bool(), doubt: p.bool(), intent: p.bool(),
		late: p.bool(), lost: p.bool(), fresh: p.bool(), known: p.bool(), back: p.bool(), forced: p.bool(),
		doing: doing(p.get(3)), boot: p.get(2), reg: p.get(2), dead: p.get(3),
		token: p.get(4), fs: p.get(4), att: p.get(4), cut: p.get(4), call: p.get(4),
		target: uint8(w >> targetShift & 3), former: uint8(w >> formerShift & 3),
	}
}

// names is a renaming of the nodes: names[i] is the new number of node i.
type names [nodes]uint8

// one renames a reference that is 1 + a node, or 0.
func (p names) one(ref uint8) uint8 {
	if ref == 0 {
		return 0
	}
	return 1 + p[ref-1]
}

// renamed packs a renumbered state with its nodes renamed.
func (s *state) renamed(p names, packed *[nodes]uint64) (k key) {
	for i := range s.n {
		w := packed[i]
		if s.n[i].aims() {
			w |= uint64(p[s.n[i].target]) << targetShift
		}
		w |= uint64(p.one(s.n[i].former)) << formerShift
		k[p[i]] = w
	}
	var g packer
	g.put(p.one(s.owner), 2)
	g.put(s.token, 4)
	g.put(s.ownBoot, 2)
	g.put(p.one(s.pend), 2)
	g.put(s.pendToken, 4)
	g.put(uint8(s.slot.kind), 4)
	if s.slot.kind != noWrite {
		g.put(p[s.slot.by], 2)
		g.put(s.slot.token, 4)
		to := uint8(0)
		if s.slot.kind == handOver || s.slot.kind == refence {
			to = p[s.slot.to]
		}
		g.put(to, 2)
		g.put(s.slot.boot, 2)
	} else {
		g.n += 10
	}
	g.flag(s.formatted)
	g.flag(s.acked)
	for _, b := range s.left {
		g.put(b, 2)
	}
	k[3] = g.word

	var calls [len(s.orphans)]uint64
	for i, o := range s.orphans {
		if o.kind == noCall {
			continue
		}
		w := uint64(o.kind) | uint64(p[o.by])<<2 | uint64(p[o.node])<<4 | uint64(o.token)<<6
		for j := range i + 1 { // insert, the largest first
			if w > calls[j] {
				w, calls[j] = calls[j], w
			}
		}
	}
	for i, w := range calls {
		k[4] |= w << (10 * i)
	}
	return k
}

func (k key) unpack() (s state) {
	for i := range s.n {
		s.n[i] = unpackNode(k[i])
	}
	g := packer{word: k[3]}
	s.owner, s.token, s.ownBoot, s.pend, s.pendToken = g.get(2), g.get(4), g.get(2), g.get(2), g.get(4)
	s.slot = write{kind: writeKind(g.get(4)), by: g.get(2), token: g.get(4), to: g.get(2), boot: g.get(2)}
	s.formatted, s.acked = g.bool(), g.bool()
	for i := range s.left {
		s.left[i] = g.get(2)
	}
	for i := range s.orphans {
		w := k[4] >> (10 * i)
		s.orphans[i] = orphan{kind: callKind(w & 3), by: uint8(w >> 2 & 3), node: uint8(w >> 4 & 3), token: uint8(w >> 6 & 15)}
	}
	return s
}

// young returns a token younger than all there are.
func (s *state) young() uint8 {
	most := max(s.token, s.pendToken, s.slot.token)
	for i := range s.n {
		n := &s.n[i]
		most = max(most, n.token, n.fs, n.att, n.cut, n.call)
	}
	for i := range s.orphans {
		most = max(most, s.orphans[i].token)
	}
	return most + 1
}

// renumberTokens gives the tokens of each node the smallest numbers that keep their
// order. Those of different nodes are never compared, except that a new token is
// younger than all. Of the tokens that only name a leftover attachment, it is enough
// to know which others they are older than.
func (s *state) renumberTokens() {
	var ranks [nodes][32]uint8
	for i := range s.n {
		n, me := &s.n[i], uint8(i)
		kept, rest := uint32(1)<<n.token|1<<n.fs|1<<n.cut, uint32(1)<<n.att
		if n.doing == attaching {
			rest |= 1 << n.call
		}
		if s.owner == me+1 {
			kept |= 1<<s.token | 1<<s.slot.token
		}
		if s.pend == me+1 {
			kept |= 1 << s.pendToken
		}
		for j := range s.n {
			if m := &s.n[j]; m.aims() && m.target == me {
				kept |= 1 << m.call
			}
		}
		for _, o := range s.orphans {
			switch {
			case o.node != me:
			case o.kind == attachCall:
				rest |= 1 << o.token
			default:
				kept |= 1 << o.token
			}
		}
		rank, leftover := uint8(0), false
		for used := (kept | rest) &^ 1; used != 0; used &= used - 1 {
			t := bits.TrailingZeros32(used)
			if one := kept>>t&1 == 0; !one || !leftover {
				rank++
				leftover = one
			}
			ranks[i][t] = rank
		}
	}
	for i := range s.n {
		n := &s.n[i]
		n.token, n.fs, n.att, n.cut = ranks[i][n.token], ranks[i][n.fs], ranks[i][n.att], ranks[i][n.cut]
		if n.aims() {
			n.call = ranks[n.target][n.call]
		} else {
			n.call = ranks[i][n.call]
		}
	}
	if s.owner != 0 {
		s.token, s.slot.token = ranks[s.owner-1][s.token], ranks[s.owner-1][s.slot.token]
	}
	if s.pend != 0 {
		s.pendToken = ranks[s.pend-1][s.pendToken]
	}
	for i := range s.orphans {
		o := &s.orphans[i]
		o.token = ranks[o.node][o.token]
	}
}

// renumberBoots does the same for each node's boots.
func (s *state) renumberBoots() {
	for i := range s.n {
		n := &s.n[i]
		me := uint8(i)
		own, slot := s.owner == me+1, s.bootOfSlot() == i
		used := uint8(1)<<n.boot | 1<<n.reg
		if n.dead != 0 {
			used |= 1 << (n.dead - 1)
		}
		if own {
			used |= 1 << s.ownBoot
		}
		if slot {
			used |= 1 << s.slot.boot
		}
		rank := func(b uint8) uint8 { return uint8(bits.OnesCount8(used & (1<<b - 1))) }
		n.boot, n.reg = rank(n.boot), rank(n.reg)
		if n.dead != 0 {
			n.dead = 1 + rank(n.dead-1)
		}
		if own {
			s.ownBoot = rank(s.ownBoot)
		}
		if slot {
			s.slot.boot = rank(s.slot.boot)
		}
	}
}

// bootOfSlot is the node whose boot the late write speaks of, or -1.
func (s *state) bootOfSlot() int {
	switch s.slot.kind {
	case noWrite, release, record:
		return -1
	case handOver:
		return int(s.slot.to)
	default:
		return int(s.slot.by)
	}
}

// key renumbers the state and packs it: the nodes are put in an order by what they are, and
// where that leaves a choice, the smallest outcome is taken.
func (s *state) key() (key, names) {
	s.renumberTokens()
	s.renumberBoots()
	var packed, sign [nodes]uint64
	for i := range s.n {
		packed[i] = s.n[i].pack()
		sign[i] = packed[i] | s.roles(uint8(i))<<targetShift
	}
	var order names // order[rank] is the node
	for i := range order {
		order[i] = uint8(i)
	}
	for i := 1; i < nodes; i++ {
		for j := i; j > 0 && sign[order[j]] < sign[order[j-1]]; j-- {
			order[j], order[j-1] = order[j-1], order[j]
		}
	}
	a, b := sign[order[0]] == sign[order[1]], sign[order[1]] == sign[order[2]]
	name := order.inverse()
	best := s.renamed(name, &packed)
	try := func(x, y, z int) {
		p := names{order[x], order[y], order[z]}.inverse()
		if k := s.renamed(p, &packed); k.less(best) {
			best, name = k, p
		}
	}
	if a {
		try(1, 0, 2)
	}
	if b {
		try(0, 2, 1)
	}
	if a && b {
		try(1, 2, 0)
		try(2, 0, 1)
		try(2, 1, 0)
	}
	return best, name
}

func (p names) inverse() (q names) {
	for i, v := range p {
		q[v] = uint8(i)
	}
	return q
}

func (k key) less(l key) bool {
	for i := range k {
		if k[i] != l[i] {
			return k[i] < l[i]
		}
	}
	return false
}

// roles is what others say of a node, in 16 bits. Two nodes may have the same: they
// are then tried in both orders.
func (s *state) roles(i uint8) uint64 {
	var p packer
	p.flag(s.owner == i+1)
	p.flag(s.pend == i+1)
	p.flag(s.slot.kind != noWrite && s.slot.by == i)
	p.flag((s.slot.kind == handOver || s.slot.kind == refence) && s.slot.to == i)
	sum := uint64(0)
	for _, o := range s.orphans {
		if o.kind == noCall {
			continue
		}
		mix := uint64(o.kind)*31 + uint64(o.token)*7
		if o.by == i {
			sum += mix*5 + 1
		}
		if o.node == i {
			sum += mix*11 + 3
		}
	}
	return p.word | sum&0xfff<<4
}

// String shows who has what, for traces.
func (s *state) String() string {
	var b strings.Builder
	switch {
	case s.owner == 0:
		b.WriteString("free")
	case s.pend != 0:
		fmt.Fprintf(&b, "own=%c#%d, pending %c", 'A'+s.owner-1, s.token, 'A'+s.pend-1)
	default:
		fmt.Fprintf(&b, "own=%c#%d", 'A'+s.owner-1, s.token)
	}
	for i, n := range s.n {
		if n.token == 0 && n.att == 0 && n.fs == 0 {
			continue
		}
		fmt.Fprintf(&b, "  %c:", 'A'+i)
		for _, part := range []struct {
			name  string
			token uint8
		}{{"token", n.token}, {"attached", n.att}, {"mounted", n.fs}, {"cut", n.cut}} {
			if part.token != 0 {
				fmt.Fprintf(&b, " %s#%d", part.name, part.token)
			}
		}
		if n.run {
			b.WriteString(" running")
		}
	}
	return b.String()
}
