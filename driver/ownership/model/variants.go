package model

// Check is one line of the table: variants that differ in their faults only.
type Check struct {
	Name string
	Runs []Variant
	// Wants is the promise that MUST be found broken; empty if none may be.
	Wants string
}

// Run checks one variant after the other and adds up what came of it, until one
// breaks a promise or has more than limit states.
func (c Check) Run(limit int) (sum Result) {
	sum.Exhausted = true
	for _, v := range c.Runs {
		r := v.Check(limit)
		sum.States += r.States
		sum.Moves += r.Moves
		sum.Took += r.Took
		sum.Depth = max(sum.Depth, r.Depth)
		sum.Exhausted = sum.Exhausted && r.Exhausted
		if sum.Broken, sum.Trace = r.Broken, r.Trace; r.Broken != "" || !r.Exhausted {
			break
		}
	}
	return sum
}

// Promised are the variants in which every promise must hold: three nodes with so
// many faults of whatever kinds, and two nodes with one more.
func Promised(n int) []Check {
	both := func(v Variant) []Variant {
		v.Nodes = 3
		runs := v.with(n)
		v.Nodes = 2
		return append(runs, v.with(n+1)...)
	}
	word := func(v Variant) []Variant {
		v.Nodes = 3
		runs := v.with(n - 1)
		for i := range runs {
			runs[i].Faults[WrongWord]++
		}
		return runs
	}
	two := func(v Variant) []Variant {
		v.Nodes = 2
		return v.with(n)
	}
	return []Check{
		{Name: "F0", Runs: both(Variant{Class: F0})},
		{Name: "F3", Runs: both(Variant{Class: F3})},
		{Name: "F1", Runs: both(Variant{Class: F1})},
		{Name: "F1 without attachment ids", Runs: both(Variant{Class: F1NoIDs})},
		{Name: "F2", Runs: both(Variant{Class: F2})},
		{Name: "F0, a new volume", Runs: two(Variant{Class: F0, Format: true})},
		{Name: "F1, a new volume", Runs: two(Variant{Class: F1, Format: true})},
		{Name: "F2, a new volume", Runs: two(Variant{Class: F2, Format: true})},
		{Name: "F1, the operator is wrong", Runs: word(Variant{Class: F1})},
		{Name: "F1, no ids, the operator is wrong", Runs: word(Variant{Class: F1NoIDs})},
		{Name: "F2, the operator is wrong", Runs: word(Variant{Class: F2})},
		{Name: "F0, the operator is wrong, and nobody acts on it", Runs: word(Variant{Class: F0, Patient: true})},
	}
}

// with returns the variant with every choice of n faults that it can have, but for
// WrongWord.
func (v Variant) with(n int) (runs []Variant) {
	var choose func(v Variant, from Fault, n int)
	choose = func(v Variant, from Fault, n int) {
		if n == 0 {
			runs = append(runs, v)
			return
		}
		for f := from; f < WrongWord; f++ {
			if f == LateCall && v.byHand() {
				continue
			}
			next := v
			if next.Faults[f]++; next.Faults[f] <= 3 {
				choose(next, f, n-1)
			}
		}
	}
	choose(v, AgentCrash, n)
	return runs
}

// Broken are variants that each do without a rule, or in the case of the last trust
// somebody they should not, and the promise that this breaks.
func Broken() []Check {
	bad := func(name, wants string, class Class, breaks Break, faults ...Fault) Check {
		v := Variant{Class: class, Nodes: 3, Breaks: breaks}
		for _, f := range faults {
			v.Faults[f]++
		}
		return Check{Name: name, Wants: wants, Runs: []Variant{v}}
	}
	two := func(c Check) Check {
		c.Runs[0].Nodes = 2
		return c
	}
	fresh := func(c Check) Check {
		c.Runs[0].Format = true
		return c
	}
	patient := func(c Check) Check {
		c.Runs[0].Patient = true
		return c
	}
	return []Check{
		bad("F0, ownership is on the node's lease", TwoWriters, F0, LeaseBound, LeaseLoss),
		bad("F0, a silent node is taken over from", TwoWriters, F0, AutoTakeover, Partition),
		bad("F0, the same, and a node without etcd stops containers", TwoWriters, F0, AutoTakeover|SelfFence, Partition),
		bad("F0, umount -l counts as closed", TwoWriters, F0, LazyUnmount),
		bad("F1, umount -l counts as closed", DevicePulled, F1, LazyUnmount),
		bad("F0, a new process trusts the journal without asking etcd", TwoWriters, F0, BlindRestart, NodeCrash),
		bad("F1, Attach steals", DevicePulled, F1, StealingAttach, Partition),
		bad("F1, a detach is not in the journal", DevicePulled, F1, NoIntent|LateAdopt, AgentCrash),
		bad("F1, an attachment of an older token is used", DevicePulled, F1, AdoptOld|LateAdopt, AgentCrash, LeaseLoss),
		bad("F1, the fence does not look at the token, and finds its target late", DevicePulled, F1, UncheckedFence|LateLookup, Partition, LeaseLoss),
		bad("F1, no ids, the fence does not look at the token", DevicePulled, F1NoIDs, UncheckedFence, Partition, LeaseLoss),
		bad("F1, no ids, a detach counts when it is sent", DevicePulled, F1NoIDs, FireAndForget),
		bad("F1, no ids, no horizon after an own detach", DevicePulled, F1NoIDs, NoOwnHorizon, LateCall),
		bad("F1, no ids, no horizon after a dead taker's fence", DevicePulled, F1NoIDs, NoTakerHorizon, Partition, LeaseLoss),

		bad("F0, no RETAKE after a release of unknown outcome", TwoWriters, F0, NoRetake, LateWrite),
		two(bad("F2, a new process uses an attachment nothing is mounted on", TwoWriters, F2, LateAdopt, AgentCrash, AgentCrash, LateWrite)),
		bad("F3, an ownership of an older boot is taken up as it is", TwoWriters, F3, OldBoot|LateAdopt, NodeCrash),
		bad("F2, SETTLE without the fence", TwoWriters, F2, NoFence, Partition),
		bad("F2, a takeover of a takeover fences the taker", TwoWriters, F2, FenceTaker, Partition, LeaseLoss),
		two(bad("F1, no ids, a late detach is forgotten with the volume", DevicePulled, F1NoIDs, ForgetLate, AgentCrash, LeaseLoss, LateCall)),
		bad("F1, no ids, the detach of a leftover is not remembered", DevicePulled, F1NoIDs, UnmarkedSweep, AgentCrash, LateCall),
		bad("F1, no ids, the second fence is not recorded", DevicePulled, F1NoIDs, UnrecordedRefence, AgentCrash, LateCall),
		bad("F1, who comes late after the fence is not fenced again", Stuck, F1, NoRefence, NodeCrash),
		bad("F1, he is, but by the taker alone", Stuck, F1, FormerOnly, NodeCrash),
		fresh(bad("F1, mkfs without a look at the disk", DataLost, F1, BlindFormat, LeaseLoss)),
		fresh(bad("F0, the same, mounted before FORMATTED is known to be done", DataLost, F0, BlindFormat|UnmarkedFormat, LateWrite)),
		patient(bad("F0, a node declared dead in error registers as it is", TwoWriters, F0, NoGiveUp, LeaseLoss, WrongWord)),
		bad("F0, the operator is wrong", TwoWriters, F0, 0, WrongWord),
	}
}
