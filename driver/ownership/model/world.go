package model

// owns says that etcd names node i under the token it believes in. The value does not
// change under one token, so the process knows as well whether it is pending.
func (s *state) owns(i uint8) bool {
	return s.owner == i+1 && s.n[i].token != 0 && s.n[i].token == s.token
}

// rightful says that a container runs on the volume where it should.
func (s *state) rightful(i uint8) bool {
	n := &s.n[i]
	return n.alive && n.run && n.fs != 0 && s.owns(i) && s.pend == 0
}

// canWrite says that a node has the disk open, and that it works.
func (v *Variant) canWrite(s *state, i int) bool {
	n := &s.n[i]
	open := n.fs
	if n.fresh { // by mkfs
		open = n.token
	}
	return n.alive && open != 0 && (v.byHand() || n.att == open && open > n.cut)
}

// commit does a transaction of etcd if its compares hold.
func (v *Variant) commit(s *state, w write) (ok bool) {
	live := s.n[w.by].live
	if w.kind == claim {
		if ok = s.owner == 0 && live; ok {
			s.grant(w.by, w.boot)
		}
		return ok
	}
	if s.owner == 0 || s.token != w.token {
		return false
	}
	switch w.kind {
	case retake:
		if ok = live; ok {
			s.token, s.ownBoot = s.young(), w.boot
		}
	case settle:
		if ok = live; ok {
			s.token, s.ownBoot, s.pend, s.pendToken = s.young(), w.boot, 0, 0
		}
	case release:
		s.free()
		ok = true
	case handOver:
		if s.n[w.to].live { // the request is on its lease
			s.grant(w.to, w.boot)
		} else {
			s.free()
		}
		ok = true
	case seize:
		if ok = live && v.grounds(s); ok {
			target, token := s.owner, s.token
			if s.pend != 0 && !v.has(FenceTaker) {
				target, token = s.pend, s.pendToken
			}
			s.grant(w.by, w.boot)
			s.pend, s.pendToken = target, token
		}
	case refence:
		if ok = live; ok {
			all := s.young()
			s.grant(w.by, w.boot)
			s.token, s.pend, s.pendToken = all+1, w.to+1, all
		}
	case record:
		s.formatted, ok = true, true
	case claim, noWrite:
	}
	return ok
}

// grant puts own/<vid>, and free deletes it.
func (s *state) grant(i, boot uint8) {
	token := s.young()
	s.free()
	s.owner, s.token, s.ownBoot = i+1, token, boot
}

func (s *state) free() { s.owner, s.token, s.ownBoot, s.pend, s.pendToken = 0, 0, 0, 0, 0 }

// grounds says whether the volume may be taken from its owner: Seize's compares, and
// before them driver.grounds, by which storage that cuts nobody off needs to know
// that the owner's boot is over. A taker that has not settled has nothing open, so
// that its silence is enough.
func (v *Variant) grounds(s *state) bool {
	from := &s.n[s.owner-1]
	confirmed := from.dead != 0 && from.dead-1 == s.ownBoot
	switch {
	case v.Patient && from.alive && from.condemned() && !from.back:
		return false
	case from.live:
		return confirmed && from.forced && from.reg == s.ownBoot
	case !v.byHand(), v.has(AutoTakeover):
		return true
	}
	return confirmed || s.pend != 0 || from.reg != s.ownBoot
}

// attach is what the storage does with an Attach.
func (v *Variant) attach(s *state, i, token uint8) (attached bool) {
	n := &s.n[i]
	switch {
	case n.att == token:
		return true
	case n.att != 0:
		return v.has(AdoptOld)
	case v.Class == F2 && token <= n.cut:
		return false
	}
	for j := range s.n {
		switch {
		case !v.exclusive() || s.n[j].att == 0:
		case v.has(StealingAttach):
			v.pull(s, uint8(j))
		default:
			return false
		}
	}
	n.att = token
	return true
}

// detach is what the storage does with a Detach, which names the attachment by its id
// or, without ids, whatever the node has.
func (v *Variant) detach(s *state, call orphan) {
	if s.n[call.node].att == call.token || v.Class == F1NoIDs {
		v.pull(s, call.node)
	}
}

// fence is what the storage does with a Fence, and whether it is seen to have worked.
func (v *Variant) fence(s *state, target, token uint8) (cut bool) {
	n := &s.n[target]
	switch {
	case v.has(LateLookup):
		for i := range s.n {
			v.pull(s, uint8(i))
		}
	case v.Class == F2:
		if n.fs <= token && n.fs > n.cut && s.rightful(target) {
			s.broken = DevicePulled
		}
		n.cut = max(n.cut, token)
		return true
	case v.Class == F1NoIDs, n.att <= token:
		v.pull(s, target)
	}
	return n.att == 0 || n.att > token
}

// pull ends the attachment of a node, in use or not. Where nothing is cut off, what is
// mounted stays so.
func (v *Variant) pull(s *state, i uint8) {
	n := &s.n[i]
	if !v.byHand() && n.att != 0 && n.att == n.fs && s.rightful(i) {
		s.broken = DevicePulled
	}
	n.att = 0
}

var (
	stepWant   = &step{"docker run", "driver.Mount"}
	stepAgain  = &step{"docker run, on what is mounted", "driver.Mount"}
	stepStop   = &step{"the container stops", "Docker"}
	stepGiveUp = &step{"the Mount fails, or its caller has gone", "driver.mount"}
)

// docker is what users and Docker do. docker run on a node that has no token is part
// of CLAIM, SEIZE and HANDOVER.
func (g *generator) docker() {
	n := g.n
	if n.alive && n.run {
		_, n := g.add(stepStop, effort)
		n.run = false
	}
	if !g.up() || n.doing != nothing {
		return
	}
	has := n.token != 0 && !n.lost
	if has && n.fs != 0 && !n.run {
		t, n := g.add(stepAgain, wish)
		n.run, t.acked = true, g.v.Format
	}
	if has && n.fs == 0 && !n.want {
		_, n := g.add(stepWant, wish)
		n.want = true
	}
	if n.want {
		_, n := g.add(stepGiveUp, effort)
		n.want, n.fresh = false, false
	}
}

var (
	stepAgentCrash = &step{"AGENT CRASH", ""}
	stepNodeCrash  = &step{"NODE CRASH", ""}
	stepPartition  = &step{"PARTITION", ""}
	stepLeaseLoss  = &step{"LEASE LOSS", "etcd"}
	stepTimeout    = &step{"CALL TIMES OUT", "driver.mayBeLate"}
	stepWrongWord  = &step{"DECLARED DEAD, though it runs", "ownership.DeclareDead"}
	stepDead       = &step{"declared dead, and it is", "ownership.DeclareDead"}
	stepRestart    = &step{"the plugin starts", "driver.restore"}
	stepBoot       = &step{"the node boots", "driver.restore"}
	stepHeal       = &step{"the partition heals", ""}
	stepSelfFence  = &step{"stops its containers for want of etcd", ""}
)

// faults is what goes wrong, and what is repaired.
func (g *generator) faults() {
	s, n, v := g.s, g.n, g.v
	if g.up() && s.left[AgentCrash] > 0 {
		t, _ := g.spend(AgentCrash, stepAgentCrash, "")
		v.crash(t, g.me, false)
	}
	if n.alive && s.left[NodeCrash] > 0 {
		t, _ := g.spend(NodeCrash, stepNodeCrash, "")
		v.crash(t, g.me, true)
	}
	if n.alive && n.conn && s.left[Partition] > 0 {
		_, n := g.spend(Partition, stepPartition, "")
		n.conn = false
	}
	if g.online() && n.live && s.left[LeaseLoss] > 0 {
		t, _ := g.spend(LeaseLoss, stepLeaseLoss, "")
		t.expire(v, g.me)
	}
	if s.left[LateCall] > 0 && !v.byHand() && (n.doing == attaching || n.doing == fencing) {
		t, m := g.spend(LateCall, stepTimeout, "")
		t.abandon(g.me)
		if n.doing == attaching {
			m.held, m.intent = true, true // a detach follows
		} else {
			m.mayBeLate(v, !v.has(NoTakerHorizon))
		}
	}
	if s.left[WrongWord] > 0 && n.alive && n.dead == 0 && n.reg == n.boot {
		_, n := g.spend(WrongWord, stepWrongWord, "")
		n.dead, n.back, n.forced = 1+n.reg, false, n.live
	}
	over := !n.alive || n.reg != n.boot
	if v.byHand() && over && n.dead == 0 && !n.live && s.owner == g.me+1 && s.ownBoot == n.reg {
		_, n := g.add(stepDead, declare)
		n.dead, n.forced = 1+n.reg, false
	}
	if v.has(SelfFence) && g.up() && !n.conn && n.run {
		_, n := g.add(stepSelfFence, effort)
		n.run, n.fs = false, 0
	}
	if n.alive && !n.agent {
		t, _ := g.add(stepRestart, repair)
		v.restart(t, g.me)
	}
	if !n.alive && !n.live && !n.absent {
		t, n := g.add(stepBoot, boot)
		n.alive, n.boot = true, 1+max(n.boot, n.reg)
		v.restart(t, g.me)
	}
	if !n.conn && !n.absent {
		_, n := g.add(stepHeal, repair)
		n.conn = true
	}
}

// orphan leaves a call without anybody who waits for it.
func (s *state) orphan(o orphan) {
	for k := range s.orphans {
		if s.orphans[k].kind == noCall {
			s.orphans[k] = o
			return
		}
	}
	panic("more late calls than there is room for: give fewer faults")
}

// abandon does so with what a node is waiting for.
func (s *state) abandon(i uint8) {
	n := &s.n[i]
	switch n.doing {
	case attaching:
		s.orphan(orphan{kind: attachCall, by: i, node: i, token: n.call})
	case fencing:
		s.orphan(orphan{kind: fenceCall, by: i, node: n.target, token: n.call})
	case nothing, seized, fenced:
	}
	n.doing, n.call, n.target = nothing, 0, 0
}

// crash leaves what is in the journal, in the kernel and at the storage. A call to the
// node's own kernel ends with it, and where nothing is cut off all are such.
func (v *Variant) crash(s *state, i uint8, power bool) {
	n := &s.n[i]
	if v.has(ForgetLate) && n.token == 0 {
		n.late = false
	}
	n.mayBeLate(v, n.intent && !v.has(NoOwnHorizon))
	if n.doing == attaching && (v.byHand() || v.Class == F2 && power) {
		n.doing, n.call = nothing, 0
	}
	s.abandon(i)
	if power {
		n.alive, n.run, n.fs = false, false, 0
	}
	if power && (v.Class == F0 || v.Class == F2) {
		n.att = 0
		for k := range s.orphans {
			if o := &s.orphans[k]; o.by == i && o.kind != fenceCall {
				*o = orphan{}
			}
		}
	}
	if n.fs == 0 && !n.intent && !v.has(BlindRestart) {
		n.token = 0
	}
	n.agent, n.want, n.held, n.doubt, n.lost, n.fresh, n.known, n.former = false, false, false, false, false, false, false, 0
}

// restart is a new process: the journal, the mount table and the storage's answer are
// all it has.
func (v *Variant) restart(s *state, i uint8) {
	n := &s.n[i]
	n.agent = true
	s.endLate(i)
	if n.token == 0 {
		n.intent = false
		return
	}
	n.known = s.formatted // as it is when the token is checked
	if n.find(v, n.boot); v.has(BlindRestart) {
		n.doubt, n.intent = false, false
	}
}

var (
	stepLateCalls = map[callKind]*step{
		attachCall: {"a late Attach takes effect", "backends.Backend"},
		detachCall: {"a late Detach takes effect", "backends.Backend"},
		fenceCall:  {"a late Fence takes effect", "backends.Fencer"},
	}
	stepLostCall  = &step{"a late call is lost", "backends.Backend"}
	stepLateWrite = &step{"the late transaction arrives", "etcd"}
	stepLostWrite = &step{"the late transaction is lost", "etcd"}
)

// late is what arrives after its sender has given up, or does not.
func (g *generator) late() {
	s, v := g.s, g.v
	for k, o := range s.orphans {
		if o.kind == noCall {
			continue
		}
		g.me = o.node
		t, _ := g.add(stepLateCalls[o.kind], fate)
		t.orphans[k] = orphan{}
		switch o.kind {
		case attachCall:
			v.attach(t, o.node, o.token)
		case detachCall:
			v.detach(t, o)
		case fenceCall:
			v.fence(t, o.node, o.token)
		case noCall:
		}
		t, _ = g.add(stepLostCall, fate)
		t.orphans[k] = orphan{}
	}
	if s.slot.kind == noWrite {
		return
	}
	g.me = s.slot.by
	t, _ := g.add(stepLateWrite, fate)
	t.slot = write{}
	if !v.commit(t, s.slot) {
		g.out = g.out[:len(g.out)-1]
	}
	t, _ = g.add(stepLostWrite, fate)
	t.slot = write{}
}

// forget drops what can have no effect any more, so that fewer states differ.
func (v *Variant) forget(s *state) {
	if s.slot.kind != noWrite && s.slot.kind != claim && s.slot.token != s.token {
		s.slot = write{}
	}
	for k := range s.orphans {
		o := &s.orphans[k]
		n := &s.n[o.node]
		switch o.kind {
		case attachCall:
			if v.Class == F2 && o.token <= n.cut {
				*o = orphan{}
			}
		case detachCall:
			if v.Class != F1NoIDs && n.att != o.token {
				*o = orphan{} // the id is gone for good
			}
		case fenceCall:
			if v.Class == F1NoIDs || v.has(LateLookup) {
				o.token = 0 // it hits whatever there is
			} else if !s.knows(o.node, o.token) {
				*o = orphan{}
			}
		case noCall:
		}
	}
	for i := range s.n {
		n := &s.n[i]
		if n.dead != 0 && !n.condemned() && (s.owner != uint8(i)+1 || s.ownBoot != n.dead-1) {
			n.dead = 0 // a declaration of a boot nobody speaks of any more
		}
		if n.dead == 0 {
			n.back, n.forced = false, false
		}
		if !v.byHand() && n.dead == 0 && s.left[WrongWord] == 0 {
			n.reg = n.boot // nobody asks
		}
		if n.late && n.alive && n.agent && n.doing != attaching && n.doing != fencing && !s.mayLand(uint8(i)) {
			n.late = false // driver.awaitLate: it has waited long enough
		}
		if n.cut != 0 && !s.knows(uint8(i), n.cut) {
			n.cut = 0
		}
	}
}

// knows says whether node i may still come to use a token that is this one or older.
func (s *state) knows(i, token uint8) bool {
	n := &s.n[i]
	for _, t := range [...]uint8{n.token, n.att, n.fs} {
		if t != 0 && t <= token {
			return true
		}
	}
	for _, o := range s.orphans {
		if o.kind == attachCall && o.node == i && o.token <= token {
			return true
		}
	}
	return n.doing == attaching && n.call <= token || s.owner == i+1 && s.token <= token
}
