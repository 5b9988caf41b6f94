package robustness

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The calls that the model knows.
const (
	claim    = "claim"
	release  = "release"
	retake   = "retake"
	handOver = "hand over"
	seize    = "seize"
	settle   = "settle"
	check    = "check"
	read     = "read"
)

// input is what a node asked for.
type input struct {
	Call   string
	Volume string
	Node   string
	Token  int64  // the one it names
	Other  string // the node handed over to or seized from
}

// outcome is what the node was told, or what is known of it later.
type outcome int

const (
	// done: it was, with the new token.
	done outcome = iota
	// freed: the volume is nobody's, by this call or before it.
	freed
	// seen: the volume is Holder's, with that token; of nobody if Holder is empty.
	seen
	// notMine: it is not the node's.
	notMine
	// lost: the token named is not the volume's.
	lost
	// perhaps: a release that was done, or was not.
	perhaps
	// unknown: nothing is known.
	unknown
	// refused: nothing was done, and nothing is told about the volume.
	refused
)

// output is what came of a call.
type output struct {
	Outcome outcome
	Token   int64
	Holder  string // of seen
	Pending bool   // of seen
	// Own is the token of what the call has itself done, although it was told
	// otherwise: it cannot have been told by that very token.
	Own int64
}

// state is what the model knows about a volume. Its token stays when it is freed:
// it may only grow.
type state struct {
	Holder  string
	Token   int64
	Pending bool
}

// model is the map from datasets to owners, as one thing in one place would do
// it. Volumes have nothing to do with each other.
var model = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		index := map[string]int{}
		var parts [][]porcupine.Operation
		for _, op := range history {
			v := op.Input.(input).Volume
			if _, ok := index[v]; !ok {
				index[v] = len(parts)
				parts = append(parts, nil)
			}
			parts[index[v]] = append(parts[index[v]], op)
		}
		return parts
	},
	Init: func() any { return state{} },
	Step: func(s, in, out any) (bool, any) { return step(s.(state), in.(input), out.(output)) },
	DescribeOperation: func(in, out any) string {
		return describe(in.(input), out.(output))
	},
	DescribeState: func(s any) string {
		now := s.(state)
		switch {
		case now.Holder == "":
			return fmt.Sprintf("free (last token %d)", now.Token)
		case now.Pending:
			return fmt.Sprintf("%s takes it over (token %d)", now.Holder, now.Token)
		}
		return fmt.Sprintf("%s (token %d)", now.Holder, now.Token)
	},
}

// step says whether a call can have had that outcome in state s, and what is then.
func step(s state, in input, out output) (bool, state) {
	current := s.Holder != "" && s.Token == in.Token
	if out.Own != 0 && s.Holder != "" && s.Token == out.Own {
		return false, s
	}
	switch out.Outcome {
	case done:
		if in.Call == check {
			return current && s.Holder == in.Node, s
		}
		next := state{Holder: in.Node, Token: out.Token}
		ok := current && s.Holder == in.Node
		switch in.Call {
		case claim:
			ok = s.Holder == ""
		case retake:
			next.Pending = s.Pending
		case handOver:
			next.Holder = in.Other
		case seize:
			// It may also find what it has done before.
			if next.Pending = true; s == next {
				return true, s
			}
			ok = current && s.Holder == in.Other
		case settle:
			ok = ok && s.Pending
		default:
			return false, s
		}
		return ok && out.Token > s.Token, next
	case freed:
		return s.Holder == "" || current && s.Holder == in.Node, state{Token: s.Token}
	case perhaps:
		if current && s.Holder == in.Node {
			return true, state{Token: s.Token}
		}
		return true, s
	case seen:
		if out.Holder == "" {
			return s.Holder == "", s
		}
		return s == state{Holder: out.Holder, Token: out.Token, Pending: out.Pending}, s
	case notMine:
		return s.Holder != in.Node, s
	case lost:
		// Of a volume that is free, these two say so.
		if in.Call == release || in.Call == handOver {
			return s.Holder != "" && !current, s
		}
		return !current, s
	case unknown, refused:
	}
	return false, s
}

func describe(in input, out output) string {
	text := in.Node + ": " + in.Call
	if in.Token != 0 {
		text += fmt.Sprint(" ", in.Token)
	}
	switch in.Call {
	case handOver:
		text += " to " + in.Other
	case seize:
		text += " from " + in.Other
	}
	switch out.Outcome {
	case done:
		return fmt.Sprintf("%s: token %d", text, out.Token)
	case freed:
		return text + ": free"
	case seen:
		if out.Holder == "" {
			return text + ": nobody's"
		}
		if out.Pending {
			return fmt.Sprintf("%s: %s takes it over, token %d", text, out.Holder, out.Token)
		}
		return fmt.Sprintf("%s: %s's, token %d", text, out.Holder, out.Token)
	case notMine:
		return text + ": not mine"
	case lost:
		return text + ": lost"
	case perhaps:
		return text + ": perhaps"
	case unknown:
		return text + ": unknown"
	case refused:
		return text + ": refused"
	}
	return text
}

// TestModel has histories that may happen, and others that must not.
func TestModel(t *testing.T) {
	const never = math.MaxInt64
	op := func(from, to int64, in input, out output) porcupine.Operation {
		in.Volume = "v"
		return porcupine.Operation{Input: in, Output: out, Call: from, Return: to}
	}
	a := func(call string, token int64) input { return input{Call: call, Node: "a", Token: token, Other: "b"} }
	b := func(call string, token int64) input { return input{Call: call, Node: "b", Token: token, Other: "a"} }
	tok := func(token int64) output { return output{Token: token} }
	is := func(o outcome) output { return output{Outcome: o} }
	holds := func(node string, token int64, pending bool) output {
		return output{Outcome: seen, Holder: node, Token: token, Pending: pending}
	}
	type ops = []porcupine.Operation
	for _, c := range []struct {
		name string
		ops  ops
		want bool
	}{
		{"claim, release, claim", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(release, 5), is(freed)), op(5, 6, b(claim, 0), tok(9))}, true},
		{"two owners", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(claim, 0), tok(9))}, false},
		{"two owners at the same time", ops{op(1, 4, a(claim, 0), tok(5)), op(2, 3, b(claim, 0), tok(9))}, false},
		{"token goes back", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(release, 5), is(freed)), op(5, 6, b(claim, 0), tok(4))}, false},
		{"token stays", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(retake, 5), tok(5))}, false},
		{"hand over", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(handOver, 5), tok(7)), op(5, 6, b(check, 7), is(done)), op(7, 8, a(check, 5), is(lost))}, true},
		{"old owner after a hand-over", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(handOver, 5), tok(7)), op(5, 6, a(check, 5), is(done))}, false},
		{"hand over by another", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(handOver, 5), tok(7))}, false},
		{"hand-over to a node that has gone", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(handOver, 5), is(freed)), op(5, 6, b(claim, 0), tok(7))}, true},
		{"late release of an old token", ops{op(1, 2, a(claim, 0), tok(5)), op(3, never, a(release, 5), is(perhaps)), op(4, 5, a(retake, 5), tok(6)), op(6, 7, a(check, 6), is(done))}, true},
		{"late release frees", ops{op(1, 2, a(claim, 0), tok(5)), op(3, never, a(release, 5), is(perhaps)), op(4, 5, a(check, 5), is(done)), op(6, 7, b(claim, 0), tok(7))}, true},
		{"late release frees the next tenure", ops{op(1, 2, a(claim, 0), tok(5)), op(3, never, a(release, 5), is(perhaps)), op(4, 5, a(retake, 5), tok(6)), op(6, 7, b(claim, 0), tok(7))}, false},
		{"late claim", ops{op(1, never, a(claim, 0), tok(5)), op(2, 3, b(read, 0), holds("", 0, false)), op(4, 5, b(claim, 0), holds("a", 5, false))}, true},
		{"claim that is refused by nobody", ops{op(1, 2, a(claim, 0), holds("b", 5, false))}, false},
		{"lost to itself", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 9, a(retake, 5), tok(6)), op(3, 9, a(retake, 5), output{Outcome: lost, Own: 6})}, false},
		{"lost after it was done", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 9, a(retake, 5), tok(6)), op(4, 8, b(seize, 6), tok(7)), op(3, 9, a(retake, 5), output{Outcome: lost, Own: 6})}, true},
		{"stale read", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(release, 5), is(freed)), op(5, 6, b(read, 0), holds("a", 5, false))}, false},
		{"read while it changes", ops{op(1, 4, a(claim, 0), tok(5)), op(2, 3, b(read, 0), holds("a", 5, false))}, true},
		{"not mine", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(read, 0), is(notMine))}, true},
		{"not mine, but it is", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(read, 0), is(notMine))}, false},
		{"takeover", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(seize, 5), tok(7)), op(5, 6, a(read, 0), holds("b", 7, true)), op(7, 8, b(settle, 7), tok(9)), op(9, 10, b(release, 9), is(freed))}, true},
		{"takeover that is found", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(seize, 5), tok(7)), op(5, 6, b(seize, 5), tok(7))}, true},
		{"takeover of what has moved", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(retake, 5), tok(6)), op(5, 6, b(seize, 5), tok(7))}, false},
		{"settled by the wrong node", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(seize, 5), tok(7)), op(5, 6, a(settle, 7), tok(9))}, false},
		{"settled without a takeover", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(settle, 5), tok(9))}, false},
		{"takeover of a takeover", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(seize, 5), tok(7)), op(5, 6, a(seize, 7), tok(8)), op(7, 8, b(settle, 7), is(lost))}, true},
		{"released by the old owner after a takeover", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, b(seize, 5), tok(7)), op(5, 6, a(release, 5), is(freed))}, false},
		{"nothing is lost from what is free", ops{op(1, 2, a(release, 5), is(lost))}, false},
		{"done, but not in the log", ops{op(1, 2, a(claim, 0), tok(5)), op(3, 4, a(handOver, 5), tok(0))}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			result, _ := porcupine.CheckOperationsVerbose(model, c.ops, 10*time.Second)
			if got := result == porcupine.Ok; got != c.want {
				t.Errorf("the checker says %s", result)
			}
		})
	}
}
