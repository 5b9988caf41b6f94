package history

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A Violation is a broken promise.
type Violation struct {
	// Check is the check that found it.
	Check string
	// Volume is empty if it is about none.
	Volume string
	// Text says what was seen, with the records it is seen in.
	Text string
}

func (v Violation) String() string {
	if v.Volume == "" {
		return v.Check + ": " + v.Text
	}
	return fmt.Sprintf("%s: volume %s: %s", v.Check, v.Volume, v.Text)
}

// A Change is a change of a volume's owner, from etcd's history.
type Change struct {
	Volume string
	// Token is the revision of the change: the new owner's token.
	Token int64
	// At is when the change was asked for: the former owner has let go before, and
	// the new one begins later. It is 0 if nothing tells.
	At time.Duration
	// Node is the new owner; empty if there is none.
	Node string
	// Pending is a takeover that is recorded, but whose former owner may not be cut
	// off yet.
	Pending bool
	// Forced is the end of such a takeover.
	Forced bool
}

// A PowerCut is a host switched off with what its kernel had not written out.
type PowerCut struct {
	Node string
	At   time.Duration
}

// byVolume sorts by volume and then by opening.
func byVolume(all []*Incarnation) map[string][]*Incarnation {
	volumes := map[string][]*Incarnation{}
	for _, i := range all {
		volumes[i.Volume] = append(volumes[i.Volume], i)
	}
	for _, of := range volumes {
		slices.SortFunc(of, func(a, b *Incarnation) int { return cmp.Compare(a.Open, b.Open) })
	}
	return volumes
}

// span is when an incarnation could certainly write: from its open to the last
// record that certainly reached the volume. What an Unsynced or Mapped writer wrote
// after it may have been cut off proves nothing, because the kernel takes it and
// loses it: cut is the first moment of that.
func (i *Incarnation) span(cut time.Duration) (end time.Duration, ok bool) {
	for _, w := range slices.Backward(i.Writes) {
		if i.Kind == Synced || cut == 0 || w.At < cut {
			return w.At, true
		}
	}
	return 0, false
}

// cutAt is the first recorded takeover of the volume from the node after a moment;
// 0 if there is none.
func cutAt(changes []Change, volume, node string, after time.Duration) time.Duration {
	owner := ""
	for _, c := range changes {
		if c.Volume != volume {
			continue
		}
		if c.Pending && owner == node && c.At >= after {
			return c.At
		}
		if !c.Pending {
			owner = c.Node
		}
	}
	return 0
}

// Overlaps finds nodes that could write one volume at the same time: one was about
// to open it before the last write of another one. The changes are sorted by token.
func Overlaps(all []*Incarnation, changes []Change) []Violation {
	var found []Violation
	for volume, of := range sorted(byVolume(all)) {
		for n, a := range of {
			end, ok := a.span(cutAt(changes, volume, a.Node, a.Open))
			if !ok {
				continue
			}
			for _, b := range of[n+1:] {
				if b.Open >= end {
					break
				}
				bEnd, ok := b.span(cutAt(changes, volume, b.Node, b.Open))
				if !ok || a.Node == b.Node {
					continue
				}
				found = append(found, Violation{"intervals", volume, fmt.Sprintf(
					"%s on %s wrote from %v to %v, and %s on %s from %v to %v; both could for %v",
					a.ID, a.Node, a.Open, end, b.ID, b.Node, b.Open, bEnd, min(end, bEnd)-b.Open)})
			}
		}
	}
	return found
}

// Unowned finds writers on nodes that did not own the volume all the time, and
// tokens that do not rise. The changes are sorted by token.
func Unowned(all []*Incarnation, changes []Change) []Violation {
	var found []Violation
	volumes := map[string][]Change{}
	for _, c := range changes {
		of := volumes[c.Volume]
		if n := len(of); n > 0 && c.Token <= of[n-1].Token {
			found = append(found, Violation{"ownership", c.Volume, fmt.Sprintf("token %d comes after token %d", c.Token, of[n-1].Token)})
		}
		volumes[c.Volume] = append(of, c)
	}
	for volume, of := range sorted(byVolume(all)) {
		owned := tenures(volumes[volume])
		for _, i := range of {
			end, ok := i.span(cutAt(changes, volume, i.Node, i.Open))
			if !ok {
				continue
			}
			if text := unowned(i, end, owned); text != "" {
				found = append(found, Violation{"ownership", volume, fmt.Sprintf("%s on %s wrote from %v to %v, but %s", i.ID, i.Node, i.Open, end, text)})
			}
		}
	}
	return found
}

// A tenure is the time a node owns a volume.
type tenure struct {
	node     string // empty: nobody owns it
	token    int64
	from, to time.Duration
}

const forever = time.Duration(math.MaxInt64)

// tenures are those of one volume. A moment that is not known is taken to be
// whenever it suits the node. A takeover that is pending ends no tenure: the former
// owner may not be cut off yet.
func tenures(changes []Change) []tenure {
	all := []tenure{{to: forever}}
	for n, c := range changes {
		last := &all[len(all)-1]
		if c.Pending || c.Node == last.node {
			continue
		}
		begin, end := c.At, c.At
		if c.At == 0 {
			begin, end = 0, forever
			for _, before := range changes[:n] {
				begin = max(begin, before.At)
			}
			for _, after := range changes[n+1:] {
				if after.At != 0 {
					end = min(end, after.At)
				}
			}
		}
		last.to = end
		all = append(all, tenure{node: c.Node, token: c.Token, from: begin, to: forever})
	}
	return all
}

// unowned says what is wrong with an incarnation that wrote until end.
func unowned(i *Incarnation, end time.Duration, all []tenure) string {
	var at tenure // when it was opened
	for _, t := range all {
		if t.node == i.Node && t.from <= i.Open && end <= t.to {
			return ""
		}
		if t.from <= i.Open && i.Open < t.to && (at.node != i.Node || at.token == 0) {
			at = t
		}
	}
	if at.node != i.Node {
		return fmt.Sprintf("%s owned it at first (token %d)", name(at.node), at.token)
	}
	return fmt.Sprintf("it owned it until %v only (token %d)", at.to, at.token)
}

func name(node string) string {
	if node == "" {
		return "nobody"
	}
	return node
}

// Data finds acknowledged records that are not on the volume, and records there
// that are damaged, out of order, foreign or nobody's. log is what was read at the
// end, all are the incarnations of Synced writers on the volume. It returns how many
// acknowledged records it has seen there.
func Data(volume string, log Log, all []*Incarnation) (verified int, found []Violation) {
	bad := func(format string, args ...any) {
		found = append(found, Violation{"data", volume, fmt.Sprintf(format, args...)})
	}
	for _, text := range log.Bad {
		bad("%s", text)
	}
	known := map[string]*Incarnation{}
	var of []*Incarnation
	for _, i := range all {
		if i.Volume == volume && i.Kind == Synced {
			of = append(of, i)
			known[i.ID] = i
		}
	}
	slices.SortFunc(of, func(a, b *Incarnation) int { return cmp.Compare(a.Open, b.Open) })
	for _, i := range of {
		if i.Found != nil && len(i.Found.Bad) > 0 {
			bad("%s on %s found at %v: %s", i.ID, i.Node, i.Open, strings.Join(i.Found.Bad, "; "))
		}
		missing := 0
		for n, w := range i.Writes {
			if n > 0 && w.Seq <= i.Writes[n-1].Seq {
				bad("%s on %s wrote record %d after record %d", i.ID, i.Node, w.Seq, i.Writes[n-1].Seq)
			}
			var there Record
			if w.Seq <= uint64(len(log.Records)) {
				there = log.Records[w.Seq-1]
			}
			if there.Incarnation == i.ID && there.Node == i.Node {
				verified++
				continue
			}
			if missing++; missing == 1 {
				instead := "nothing good"
				if there.Seq != 0 {
					instead = fmt.Sprintf("one of %s on %s", there.Incarnation, there.Node)
				}
				bad("record %d, acknowledged by %s on %s at %v, is missing; in its place is %s", w.Seq, i.ID, i.Node, w.At, instead)
			}
		}
		if missing > 1 {
			bad("%d more of the %d records acknowledged by %s on %s are missing", missing-1, len(i.Writes), i.ID, i.Node)
		}
	}
	var last *Incarnation
	for _, r := range log.Records {
		if r.Seq == 0 {
			continue
		}
		i := known[r.Incarnation]
		switch {
		case i == nil:
			bad("record %d is of %s on %s, which is in no witness file", r.Seq, r.Incarnation, r.Node)
		case last != nil && i != last && i.Open < last.Open:
			bad("record %d is of %s on %s, after one of %s on %s, which opened the volume later", r.Seq, i.ID, i.Node, last.ID, last.Node)
		}
		if i != nil {
			last = i
		}
		if len(found) > maxBad {
			break
		}
	}
	return verified, found
}

// Flushed finds what Unsynced and Mapped writers wrote and the next one on the
// volume did not find. Only a power cut, a forced takeover and an I/O error may take
// it away: not a planned move, and not the death of a process.
func Flushed(all []*Incarnation, changes []Change, cuts []PowerCut) (found []Violation) {
	for volume, of := range sorted(byVolume(all)) {
		var last *Incarnation
		for _, i := range of {
			if i.Kind == Synced || i.Found == nil {
				continue
			}
			if last != nil && !excused(last, i, changes, cuts) {
				if text := lost(last, i); text != "" {
					found = append(found, Violation{"planned moves", volume, text})
				}
			}
			if len(i.Writes) > 0 {
				last = i
			}
		}
	}
	return found
}

// excused says whether something between two incarnations may take away what the
// first one wrote and nobody synced.
func excused(first, next *Incarnation, changes []Change, cuts []PowerCut) bool {
	if first.Cut != "" {
		return true
	}
	for _, c := range cuts {
		if c.Node == first.Node && c.At >= first.Open && c.At <= next.Open {
			return true
		}
	}
	for _, c := range changes {
		if c.Volume == first.Volume && c.Forced && c.At >= first.Open && c.At <= next.Open {
			return true
		}
	}
	return false
}

// lost says what of an incarnation's records the next one did not find.
func lost(first, next *Incarnation) string {
	from, to := first.Writes[0].Seq, first.LastWrite().Seq
	if first.Kind == Mapped && to > Slots-2 {
		// The ring holds no more, and one slot may have been half overwritten.
		from = max(from, to-(Slots-2))
	}
	if next.Found.Last >= to && next.Found.First <= from {
		return ""
	}
	return fmt.Sprintf("%s on %s wrote records %d to %d until %v, and %s on %s found %d to %d at %v, without a power cut, takeover or I/O error in between",
		first.ID, first.Node, from, to, first.LastWrite().At, next.ID, next.Node, next.Found.First, next.Found.Last, next.Open)
}

// Pulled finds writers whose volume failed under them while their node owned it: the
// device must not be taken from its owner. Only a power cut may do that, and a
// takeover that is under way.
func Pulled(all []*Incarnation, changes []Change, cuts []PowerCut) (found []Violation) {
	for _, i := range all {
		if i.Cut == "" {
			continue
		}
		excuse := cutAt(changes, i.Volume, i.Node, i.Open) != 0
		for _, c := range cuts {
			// A host may be off the moment before its writer notices.
			excuse = excuse || c.Node == i.Node && c.At >= i.Open && c.At <= i.CutAt
		}
		owned := slices.ContainsFunc(tenures(of(changes, i.Volume)), func(t tenure) bool {
			return t.node == i.Node && t.from <= i.CutAt && i.CutAt < t.to
		})
		if owned && !excuse {
			found = append(found, Violation{"device", i.Volume, fmt.Sprintf("%s on %s, the owner, got at %v: %s", i.ID, i.Node, i.CutAt, i.Cut)})
		}
	}
	return found
}

// of are the changes of one volume.
func of(changes []Change, volume string) []Change {
	return slices.DeleteFunc(slices.Clone(changes), func(c Change) bool { return c.Volume != volume })
}

// An Outage is a time in which nothing was written to a volume.
type Outage struct {
	Volume string
	// Node is where the last write before it was.
	Node string
	// Begin is the last write before it, End the first one after it; 0 if there is
	// none.
	Begin, End time.Duration
}

// Outages finds those that last longer than a threshold, in order.
func Outages(all []*Incarnation, threshold time.Duration) []Outage {
	var found []Outage
	for volume, of := range sorted(byVolume(all)) {
		var writes []Outage // each write as the begin of one
		for _, i := range of {
			for _, w := range i.Writes {
				writes = append(writes, Outage{Volume: volume, Node: i.Node, Begin: w.At})
			}
		}
		slices.SortFunc(writes, func(a, b Outage) int { return cmp.Compare(a.Begin, b.Begin) })
		for n, w := range writes {
			if n+1 < len(writes) {
				if w.End = writes[n+1].Begin; w.End-w.Begin > threshold {
					found = append(found, w)
				}
			}
		}
	}
	slices.SortStableFunc(found, func(a, b Outage) int { return cmp.Compare(a.Begin, b.Begin) })
	return found
}

// Moves says for each volume how long nothing was written when a writer ended in peace
// on one node and the next one began on another.
func Moves(all []*Incarnation) map[string][]time.Duration {
	took := map[string][]time.Duration{}
	for volume, of := range byVolume(all) {
		var last *Incarnation
		for _, i := range of {
			if len(i.Writes) == 0 {
				continue
			}
			if last != nil && last.Closed != 0 && last.Node != i.Node {
				took[volume] = append(took[volume], i.Writes[0].At-last.LastWrite().At)
			}
			last = i
		}
	}
	return took
}

// sorted goes through a map in the order of its keys.
func sorted[V any](m map[string]V) func(yield func(string, V) bool) {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return func(yield func(string, V) bool) {
		for _, k := range keys {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}
