package model

var (
	stepRegister  = &step{"REGISTER", "ownership.register"}
	stepCondemned = &step{"gives up what it has open: it was declared dead", "driver.GiveUp"}
	stepLapse     = &step{"lets its lease go: it was declared dead", "ownership.Run"}
	stepExpire    = &step{"lease expires", "etcd"}
)

// lease is who counts as live.
func (g *generator) lease() {
	n := g.n
	if g.online() && !n.live {
		switch {
		case !n.condemned(), g.v.has(NoGiveUp):
			_, n := g.add(stepRegister, effort)
			n.live, n.reg, n.back = true, n.boot, n.condemned()
		case n.doing == attaching || n.doing == fencing: // it waits for that first
		case n.token != 0 || n.fs != 0 || n.run:
			_, n := g.add(stepCondemned, effort)
			n.lose()
		default:
			_, n := g.add(stepRegister, effort)
			n.live, n.reg, n.dead = true, n.boot, 0
		}
	}
	if g.online() && n.live && n.condemned() && !g.v.has(NoGiveUp) {
		t, _ := g.add(stepLapse, effort)
		t.expire(g.v, g.me)
	}
	if n.live && !g.online() {
		t, _ := g.add(stepExpire, fate)
		t.expire(g.v, g.me)
	}
}

// condemned says that this boot of a node was declared dead.
func (n *node) condemned() bool { return n.dead != 0 && n.dead-1 == n.boot }

// expire ends what is on a node's lease, and what its transactions compare.
func (s *state) expire(v *Variant, i uint8) {
	s.n[i].live = false
	s.endLate(i)
	if v.has(LeaseBound) && s.owner == i+1 {
		s.free()
	}
}

// endLate drops a late write that compares a lease of node i which is over.
func (s *state) endLate(i uint8) {
	switch s.slot.kind {
	case claim, retake, seize, refence, settle:
		if s.slot.by == i {
			s.slot = write{}
		}
	case noWrite, release, handOver, record:
	}
}

var (
	stepClaim    = &step{"CLAIM", "ownership.Claim"}
	stepTakeUp   = &step{"takes up what etcd says is its own", "driver.takeUp, adopt, confirmVolume"}
	stepRetake   = &step{"RETAKE", "ownership.Retake"}
	stepHandOver = &step{"HANDOVER", "ownership.Request, HandOver"}
	stepRelease  = &step{"RELEASE", "ownership.Release"}
	stepLose     = &step{"sees that it is not the owner any more", "driver.recheck, lose"}
	stepRecord   = &step{"FORMATTED", "ownership.Formatted"}
)

// transactions are those by which a volume moves between healthy nodes. A request is
// part of HANDOVER: whoever is live may have made one, and may not want it any more.
func (g *generator) transactions() {
	s, n, v := g.s, g.n, g.v
	if !g.online() {
		return
	}
	idle := n.doing == nothing
	if n.token == 0 && idle {
		if n.live {
			g.try(stepClaim, write{kind: claim, boot: n.boot}, begun, nil)
		}
		if s.owner == g.me+1 {
			t, n := g.add(stepTakeUp, effort)
			n.takeUp(v, t)
		}
	}
	if n.token != 0 && !s.owns(g.me) && !n.lost && n.doing != attaching && n.doing != fencing {
		_, n := g.add(stepLose, effort)
		n.lose()
	}
	if !s.owns(g.me) || !idle || s.pend != 0 {
		return
	}
	if n.want && n.doubt && !n.held && n.live && !v.has(NoRetake) {
		g.try(stepRetake, write{kind: retake, token: n.token, boot: n.boot}, owned, nil)
	}
	if n.fresh {
		g.try(stepRecord, write{kind: record, token: n.token}, func(_ *state, n *node) {
			n.fresh, n.known = false, true
		}, func(n *node) {
			n.fresh, n.known = false, v.has(UnmarkedFormat)
		})
	}
	closed := n.fs == 0 || v.has(LazyUnmount)
	if n.want || n.held || !closed || n.late || n.lost {
		return
	}
	gone := func(_ *state, n *node) { n.disown() }
	unsure := func(n *node) { n.doubt = true }
	g.try(stepRelease, write{kind: release, token: n.token}, gone, unsure)
	for j := range s.n {
		if to := &s.n[j]; uint8(j) != g.me && to.live && to.token == 0 {
			g.try(stepHandOver, write{kind: handOver, token: n.token, to: uint8(j), boot: to.boot}, gone, unsure)
		}
	}
}

// owned notes an ownership that this process has just been given.
func owned(t *state, n *node) {
	n.token, n.doubt, n.known, n.doing = t.token, false, t.formatted, nothing
}

// begun is owned, for a Mount.
func begun(t *state, n *node) {
	owned(t, n)
	n.want = true
}

// takeUp continues an ownership that this process knows nothing of.
func (n *node) takeUp(v *Variant, t *state) {
	n.token, n.known = t.token, t.formatted
	if t.pend != 0 {
		n.mayBeLate(v, !v.has(NoTakerHorizon))
		return
	}
	n.find(v, t.ownBoot)
}

// find is driver.findAttachment: what there is of an ownership of boot. Without a
// mount on it, an attachment may be the effect of a late call, and the token may be on
// its way to be released: both are given up.
func (n *node) find(v *Variant, boot uint8) {
	n.held = n.att == n.token
	n.doubt = !n.held || n.intent || boot != n.boot && !v.has(OldBoot) || n.fs == 0 && !v.has(LateAdopt)
	n.intent = (n.intent || n.doubt) && n.held
}

// mayBeLate notes that a call to the storage may still take effect. It matters where
// a call cannot be told from a newer one.
func (n *node) mayBeLate(v *Variant, rule bool) {
	if v.Class == F1NoIDs && rule {
		n.late = true
	}
}

// lose takes down what a node has open, without its containers' consent. The storage
// detaches next.
func (n *node) lose() {
	n.run, n.fs, n.doing, n.call, n.target, n.fresh = false, 0, nothing, 0, 0, false
	if n.lost = true; !n.held {
		n.detached()
	}
}

// detached is what a node knows after it has seen its attachment gone.
func (n *node) detached() {
	n.held, n.intent = false, false
	if n.lost {
		n.disown()
	}
}

// disown forgets what goes with the token.
func (n *node) disown() {
	n.token, n.doing, n.former = 0, nothing, 0
	n.want, n.held, n.doubt, n.intent, n.lost, n.fresh, n.known = false, false, false, false, false, false, false
}

var (
	stepSeize      = &step{"SEIZE", "ownership.Seize"}
	stepFence      = &step{"calls Fence", "driver.fence"}
	stepFenceWorks = &step{"Fence has cut it off", "backends.Fencer"}
	stepFenceFails = &step{"Fence has not cut it off", "backends.Fencer"}
	stepByHand     = &step{"needs no fence: that boot is over", "driver.fencedByHand"}
	stepSettle     = &step{"SETTLE", "ownership.Settle"}
	stepRefence    = &step{"SEIZE from itself, to cut off who is in the way", ""}
)

// takeover is FORCE-1, the fence, and FORCE-2.
func (g *generator) takeover() {
	s, n, v := g.s, g.n, g.v
	mine, idle := s.owns(g.me), n.doing == nothing
	if g.online() && n.live && n.token == 0 && idle && s.owner != 0 && s.owner != g.me+1 {
		stacked := s.pend != 0
		g.try(stepSeize, write{kind: seize, token: s.token, boot: n.boot}, func(t *state, n *node) {
			begun(t, n)
			n.mayBeLate(v, stacked && !v.has(NoTakerHorizon))
			if v.has(UncheckedFence) {
				n.doing, n.target, n.call = seized, t.pend-1, t.pendToken
			}
		}, nil)
	}
	switch {
	case n.doing == seized && g.up():
		_, n := g.toward(n.target, stepFence, effort)
		n.doing = fencing
	case !g.online() || !idle || !mine || s.pend == 0:
	case v.byHand():
		_, n := g.toward(s.pend-1, stepByHand, effort)
		n.doing = fenced
	default:
		_, n := g.toward(s.pend-1, stepFence, effort)
		n.doing, n.target, n.call = fencing, s.pend-1, s.pendToken
	}
	if n.doing == fencing {
		t, m := g.toward(n.target, stepFenceWorks, fate)
		cut := v.fence(t, n.target, n.call)
		m.doing, m.target, m.call = nothing, 0, 0
		switch {
		case !cut:
			g.last().step = stepFenceFails
		case s.pend != 0:
			m.doing = fenced
		}
	}
	if g.online() && mine && s.pend != 0 && n.live && !n.late && (n.doing == fenced || idle && v.has(NoFence)) {
		g.try(stepSettle, write{kind: settle, token: n.token, boot: n.boot}, func(t *state, n *node) {
			owned(t, n)
			if v.has(FormerOnly) {
				n.former = s.pend
			}
		}, nil)
	}
	if g.online() && mine && s.pend == 0 && n.live && idle && n.want && !n.held && v.exclusive() && !v.has(NoRefence) {
		g.refence()
	}
}

// refence is for an owner whose Attach is refused because a node that does not own the
// volume has it: a call of that node came late. Where a late fence could hit a newer
// attachment, it needs the record of a takeover, for whoever comes after this node.
func (g *generator) refence() {
	recorded := g.v.Class == F1NoIDs && !g.v.has(UnrecordedRefence)
	for j := range g.s.n {
		switch j := uint8(j); {
		case j == g.me || g.s.n[j].att == 0:
		case g.v.has(FormerOnly) && g.n.former != j+1:
		case recorded:
			g.try(stepRefence, write{kind: refence, token: g.n.token, to: j, boot: g.n.boot}, owned, nil)
		default:
			_, n := g.toward(j, stepFence, effort)
			n.doing, n.target, n.call = fencing, j, g.s.young()
		}
	}
}

// mayLand says whether a call that node i has to wait for is outstanding: one of its
// own that ends an attachment, and in a takeover anybody's against the same node.
func (s *state) mayLand(i uint8) bool {
	target := uint8(nodes)
	if s.owner == i+1 && s.pend != 0 {
		target = s.pend - 1
	}
	for _, o := range s.orphans {
		if (o.kind == detachCall || o.kind == fenceCall) && (o.by == i || o.node == target) {
			return true
		}
	}
	for j := range s.n {
		if uint8(j) != i && s.n[j].doing == fencing && s.n[j].target == target {
			return true
		}
	}
	return false
}

var (
	stepAttach   = &step{"calls Attach", "driver.attach"}
	stepAttached = &step{"Attach takes effect", "backends.Backend"}
	stepRefused  = &step{"Attach is refused", "backends.AttachedError"}
	stepDetach   = &step{"calls Detach", "driver.detach"}
	stepSweep    = &step{"calls Detach for a leftover", "driver.dropStale, dropForeign"}
	stepGone     = &step{"calls Detach", "driver.detach"}
	stepFormat   = &step{"mkfs, unless it is there", "mount.Format"}
	stepMount    = &step{"mounts it, and the container starts", "driver.mountFormatted"}
	stepClose    = &step{"unmounts it, and proves it closed", "driver.closeFilesystem"}
)

// storage is attach, format, mount, unmount and detach.
func (g *generator) storage() {
	s, n, v := g.s, g.n, g.v
	g.attach()
	if !g.up() || n.doing != nothing {
		return
	}
	doubt := n.doubt && !v.has(NoRetake)
	if n.token != 0 && !n.lost && n.want && n.held && !doubt && !n.intent && n.fs == 0 {
		there := n.att == n.token || v.has(AdoptOld) && n.att != 0
		switch {
		case !there || n.att <= n.cut: // the device has gone, or fails
		case n.known:
			t, n := g.add(stepMount, effort)
			n.fs, n.want, n.run, t.acked = n.att, false, true, v.Format
		case !n.fresh:
			t, n := g.add(stepFormat, effort)
			if n.fresh = true; t.acked && v.has(BlindFormat) {
				t.broken = DataLost
			}
		}
	}
	if n.fs != 0 && !n.run && !n.lost {
		_, n := g.add(stepClose, effort)
		n.fs = 0
	}
	closed := n.fs == 0 || v.has(LazyUnmount)
	switch {
	case n.token == 0 || !n.held || !closed || n.want && !n.lost && !n.intent:
	case n.att == n.token || v.has(AdoptOld):
		g.detach(stepDetach)
	default:
		_, n := g.add(stepGone, effort)
		g.last().note = "nothing is attached"
		n.detached()
	}
	mine := s.owner == g.me+1 && s.token == n.att || n.token == n.att
	if g.online() && n.att != 0 && n.att != n.fs && !mine && !v.has(AdoptOld) {
		g.detach(stepSweep)
	}
}

// attach calls Attach after a look at the token; any time may pass between the two,
// and before the effect.
func (g *generator) attach() {
	s, n, v := g.s, g.n, g.v
	doubt := n.doubt && !v.has(NoRetake)
	ready := g.up() && n.doing == nothing && n.token != 0 && !n.lost && n.want && !n.held && !doubt && !n.intent && !n.late && n.fs == 0
	checked := g.online() && s.owns(g.me) && s.pend == 0 || v.has(BlindRestart)
	if ready && checked && (n.att == 0 || n.att == n.token || v.has(AdoptOld)) {
		_, n := g.add(stepAttach, effort)
		n.doing, n.call = attaching, n.token
	}
	if n.doing == attaching {
		t, m := g.add(stepAttached, fate)
		if m.held = v.attach(t, g.me, n.call); !m.held {
			g.last().step = stepRefused
		}
		m.doing, m.call = nothing, 0
	}
}

// detach calls Detach for what is attached here, and waits for its effect. Until then
// nothing changes what this node knows, so that it is one step; unless the node does
// not live to see it, or gives up waiting.
func (g *generator) detach(st *step) {
	v, own := g.v, st == stepDetach
	kept := own || g.n.token == 0 || !v.has(UnmarkedSweep) // in the journal
	call := orphan{kind: detachCall, by: g.me, node: g.me, token: g.n.att}
	t, n := g.add(st, effort)
	if own && v.has(FireAndForget) {
		g.last().note = "it is sent"
		t.orphan(call)
	} else {
		g.last().note = "it takes effect"
		v.detach(t, call)
	}
	if own {
		n.detached()
	}
	if v.byHand() {
		return // the call is over when its process is
	}
	leave := func(t *state, n *node) {
		t.orphan(call)
		n.intent = n.intent || own && !v.has(NoIntent)
	}
	if g.s.left[LateCall] > 0 {
		t, n := g.spend(LateCall, stepTimeout, st.name)
		leave(t, n)
		n.mayBeLate(v, !v.has(NoOwnHorizon))
	}
	if g.s.left[AgentCrash] > 0 {
		t, n := g.spend(AgentCrash, stepAgentCrash, st.name)
		leave(t, n)
		v.crash(t, g.me, false)
		t.n[g.me].mayBeLate(v, kept && !own)
	}
	if g.s.left[NodeCrash] > 0 && v.Class != F2 {
		t, n := g.spend(NodeCrash, stepNodeCrash, st.name)
		leave(t, n)
		v.crash(t, g.me, true)
		t.n[g.me].mayBeLate(v, kept && !own)
	}
}
