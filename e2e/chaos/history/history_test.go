package history_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

const second = time.Second

func TestRecord(t *testing.T) {
	r := history.Record{Seq: 7, Volume: "db", Node: "host1", Incarnation: "host1-abc"}
	b := r.Encode()
	if len(b) != history.RecordSize {
		t.Fatalf("it is %d bytes long", len(b))
	}
	if got, err := history.Decode(b); got != r || err != nil {
		t.Errorf("decoded: %v, %v", got, err)
	}
	for n := range b {
		damaged := slices.Clone(b)
		damaged[n] ^= 1
		if got, err := history.Decode(damaged); err == nil {
			t.Errorf("with bit 0 of byte %d turned over it is %v", n, got)
		}
	}
	for _, b := range [][]byte{nil, b[1:], make([]byte, history.RecordSize), bytes.Repeat([]byte(" "), history.RecordSize)} {
		if got, err := history.Decode(b); err == nil {
			t.Errorf("%.20q is %v", b, got)
		}
	}
}

func TestAdd(t *testing.T) {
	var data []byte
	for _, l := range []history.Line{
		{What: history.Open, At: 1, Volume: "db", Node: "host1", Incarnation: "x", Kind: history.Synced},
		{What: history.FoundLine, At: 2, Found: &history.Found{First: 1, Last: 4}},
		{What: history.Wrote, At: 3, Seq: 5},
		{What: history.Full, At: 4, Seq: 6},
		{What: history.Wrote, At: 5, Seq: 6},
		{What: history.Cut, At: 6, Error: "EIO"},
	} {
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		data = append(append(data, b...), '\n')
	}
	for size := range 9 { // whatever the pieces it comes in
		var i history.Incarnation
		for piece := range slices.Chunk(data, 1+size*size) {
			if err := i.Add(piece); err != nil {
				t.Fatal(err)
			}
		}
		if i.ID != "x" || i.Volume != "db" || i.Node != "host1" || i.Kind != history.Synced || i.Open != 1 || i.Found.Last != 4 ||
			!slices.Equal(i.Writes, []history.Write{{Seq: 5, At: 3}, {Seq: 6, At: 5}}) || i.Full != 1 || i.Cut != "EIO" || i.CutAt != 6 || i.Closed != 0 {
			t.Errorf("in pieces of %d bytes it is read as %+v", 1+size*size, i)
		}
	}
}

// life is an incarnation of volume db that writes the records first to last, one a
// second from a second after its open on.
func life(node string, open time.Duration, first, last uint64) *history.Incarnation {
	i := &history.Incarnation{
		ID: fmt.Sprintf("%s-%d", node, open/second), Volume: "db", Node: node, Kind: history.Synced,
		Open: open, Found: &history.Found{First: min(1, first-1), Last: first - 1},
	}
	for seq := first; seq <= last; seq++ {
		i.Writes = append(i.Writes, history.Write{Seq: seq, At: open + time.Duration(seq-first+1)*second})
	}
	return i
}

func with(i *history.Incarnation, change func(*history.Incarnation)) *history.Incarnation {
	change(i)
	return i
}

func unsynced(i *history.Incarnation) { i.Kind = history.Unsynced }

// change is one of volume db's owners.
func change(token int64, at time.Duration, node string) history.Change {
	return history.Change{Volume: "db", Token: token, At: at, Node: node}
}

func pending(c history.Change) history.Change { c.Pending = true; return c }
func forced(c history.Change) history.Change  { c.Forced = true; return c }

// want compares violations with what their texts must contain, in this order.
func want(t *testing.T, got []history.Violation, texts ...string) {
	t.Helper()
	ok := len(got) == len(texts)
	for n := range min(len(got), len(texts)) {
		ok = ok && strings.Contains(got[n].String(), texts[n])
	}
	if !ok {
		t.Errorf("found are %q, want %q", got, texts)
	}
}

func TestOverlaps(t *testing.T) {
	takeover := []history.Change{change(1, 0, "a"), pending(change(5, 14*second, "b")), forced(change(6, 15*second, "b"))}
	for _, c := range []struct {
		name    string
		all     []*history.Incarnation
		changes []history.Change
		want    []string
	}{
		{name: "one after the other", all: []*history.Incarnation{life("b", 20*second, 5, 9), life("a", 10*second, 1, 4)}},
		{name: "another volume", all: []*history.Incarnation{
			life("a", 10*second, 1, 9), with(life("b", 15*second, 1, 4), func(i *history.Incarnation) { i.Volume = "other" }),
		}},
		{name: "two containers of one node", all: []*history.Incarnation{life("a", 10*second, 1, 9), life("a", 15*second, 1, 4)}},
		{
			name: "opened before the last write", all: []*history.Incarnation{life("a", 10*second, 1, 9), life("b", 18*second, 9, 12)},
			want: []string{"volume db: a-10 on a wrote from 10s to 19s, and b-18 on b from 18s to 22s; both could for 1s"},
		},
		{
			name: "one within the other", all: []*history.Incarnation{life("a", 10*second, 1, 9), life("b", 12*second, 2, 3)},
			want: []string{"both could for 2s"},
		},
		{name: "not with the next one, but the one after", all: []*history.Incarnation{
			life("a", 10*second, 1, 9), life("a", 12*second, 2, 3), life("b", 15*second, 9, 12),
		}, want: []string{"b-15 on b"}},
		{name: "it never wrote", all: []*history.Incarnation{life("a", 10*second, 1, 9), life("b", 15*second, 1, 0)}},
		{
			name: "acknowledged after a takeover", changes: takeover, all: []*history.Incarnation{life("a", 10*second, 1, 9), life("b", 16*second, 9, 12)},
			want: []string{"both could for 3s"},
		},
		{
			name: "into the cache after a takeover", changes: takeover,
			all: []*history.Incarnation{with(life("a", 10*second, 1, 9), unsynced), with(life("b", 16*second, 9, 12), unsynced)},
		},
		{
			name: "into the cache, but it was no takeover", changes: []history.Change{change(1, 0, "a"), change(6, 15*second, "b")},
			all:  []*history.Incarnation{with(life("a", 10*second, 1, 9), unsynced), with(life("b", 16*second, 9, 12), unsynced)},
			want: []string{"both could for 3s"},
		},
		{
			name: "into the cache of the one that took over", changes: takeover,
			all:  []*history.Incarnation{with(life("b", 16*second, 1, 9), unsynced), with(life("c", 18*second, 9, 12), unsynced)},
			want: []string{"both could for 4s"},
		},
	} {
		t.Run(c.name, func(t *testing.T) { want(t, history.Overlaps(c.all, c.changes), c.want...) })
	}
}

func TestUnowned(t *testing.T) {
	a := []*history.Incarnation{life("a", 10*second, 1, 5)} // until 15 s
	for _, c := range []struct {
		name    string
		all     []*history.Incarnation
		changes []history.Change
		want    []string
	}{
		{name: "owned all the time", all: a, changes: []history.Change{change(1, 9*second, "a"), change(5, 16*second, "")}},
		{name: "still owned", all: a, changes: []history.Change{change(1, 9*second, "a")}},
		{name: "owned under two tokens", all: a, changes: []history.Change{change(1, 9*second, "a"), change(3, 12*second, "a"), change(5, 16*second, "b")}},
		{name: "never owned", all: a, want: []string{"volume db: a-10 on a wrote from 10s to 15s, but nobody owned it at first (token 0)"}},
		{name: "owned by another one", all: a, changes: []history.Change{change(1, 9*second, "b")}, want: []string{"b owned it at first (token 1)"}},
		{name: "owned too late", all: a, changes: []history.Change{change(2, 11*second, "a")}, want: []string{"nobody owned it at first"}},
		{
			name: "released too early", all: a, changes: []history.Change{change(1, 9*second, "a"), change(2, 14*second, "")},
			want: []string{"it owned it until 14s only (token 1)"},
		},
		{
			name: "released for a moment", all: a, changes: []history.Change{change(1, 9*second, "a"), change(2, 12*second, ""), change(3, 13*second, "a")},
			want: []string{"it owned it until 12s only (token 1)"},
		},
		{
			name: "before a takeover is complete", all: a,
			changes: []history.Change{change(1, 9*second, "a"), pending(change(2, 12*second, "b")), forced(change(3, 16*second, "b"))},
		},
		{
			name: "after a takeover is complete", all: a,
			changes: []history.Change{change(1, 9*second, "a"), pending(change(2, 12*second, "b")), forced(change(3, 13*second, "b"))},
			want:    []string{"it owned it until 13s only"},
		},
		{
			name: "before its own takeover is complete", all: []*history.Incarnation{life("b", 10*second, 1, 5)},
			changes: []history.Change{change(1, 5*second, "a"), pending(change(2, 9*second, "b")), forced(change(3, 11*second, "b"))},
			want:    []string{"a owned it at first (token 1)"},
		},
		{name: "at a time that is not known", all: a, changes: []history.Change{change(1, 0, "a"), change(2, 0, ""), change(3, 20*second, "b")}},
		{
			name: "at a time between known ones", all: a,
			changes: []history.Change{change(1, 9*second, "a"), change(2, 0, ""), change(3, 13*second, "b")},
			want:    []string{"it owned it until 13s only"},
		},
		{name: "tokens", changes: []history.Change{change(2, 9*second, "a"), change(2, 10*second, "b")}, want: []string{"token 2 comes after token 2"}},
	} {
		t.Run(c.name, func(t *testing.T) { want(t, history.Unowned(c.all, c.changes), c.want...) })
	}
}

// written is the file of a volume that these have written to, in this order.
func written(all ...*history.Incarnation) []byte {
	var b []byte
	for _, i := range all {
		for _, w := range i.Writes {
			b = append(b[:(w.Seq-1)*history.RecordSize], history.Record{Seq: w.Seq, Volume: i.Volume, Node: i.Node, Incarnation: i.ID}.Encode()...)
		}
	}
	return b
}

func TestData(t *testing.T) {
	a, b := life("a", 10*second, 1, 5), life("b", 20*second, 6, 9)
	all := []*history.Incarnation{b, a} // in no order
	good := written(a, b)
	record := func(n int) []byte { return good[(n-1)*history.RecordSize : n*history.RecordSize] }
	for _, c := range []struct {
		name     string
		content  []byte
		all      []*history.Incarnation
		verified int
		want     []string
	}{
		{name: "all there", content: good, all: all, verified: 9},
		{name: "more than was acknowledged", content: written(a, life("b", 20*second, 6, 12)), all: all, verified: 9},
		{name: "and a part of one more", content: append(slices.Clone(good), record(3)[:100]...), all: all, verified: 9},
		{name: "and one damaged that was not acknowledged", content: append(slices.Clone(good), make([]byte, history.RecordSize)...), all: all, verified: 9},
		{name: "nothing there", all: []*history.Incarnation{a}, want: []string{
			"record 1, acknowledged by a-10 on a at 11s, is missing; in its place is nothing good", "4 more of the 5 records acknowledged by a-10 on a are missing",
		}},
		{name: "the last one missing", content: good[:8*history.RecordSize], all: all, verified: 8, want: []string{"record 9, acknowledged by b-20"}},
		{
			name: "one damaged", content: slices.Concat(record(1), make([]byte, history.RecordSize), good[2*history.RecordSize:]), all: all, verified: 8,
			want: []string{"record 2: it is not a whole record", "record 2, acknowledged by a-10 on a at 12s, is missing; in its place is nothing good"},
		},
		{
			name: "out of order", content: slices.Concat(record(2), record(1), good[2*history.RecordSize:]), all: all, verified: 7,
			want: []string{"record 1: it is number 2", "record 2: it is number 1", "record 1, ack", "1 more of"},
		},
		{
			name: "overwritten", content: written(life("a", 10*second, 1, 4), life("b", 20*second, 5, 9)), all: all, verified: 8,
			want: []string{"record 5, acknowledged by a-10 on a at 15s, is missing; in its place is one of b-20 on b"},
		},
		{
			name: "of nobody", content: written(a, life("c", 20*second, 6, 6)), all: []*history.Incarnation{a}, verified: 5,
			want: []string{"record 6 is of c-20 on c, which is in no witness file"},
		},
		{
			name: "by turns", content: written(life("a", 10*second, 1, 1), life("b", 11*second, 2, 2), life("a", 10*second, 3, 3)),
			all: []*history.Incarnation{
				with(life("a", 10*second, 1, 1), func(i *history.Incarnation) { i.Writes = append(i.Writes, history.Write{Seq: 3, At: 13 * second}) }),
				life("b", 11*second, 2, 2),
			}, verified: 3,
			want: []string{"record 3 is of a-10 on a, after one of b-11 on b, which opened the volume later"},
		},
		{
			name: "of another volume", content: written(with(life("a", 10*second, 1, 5), func(i *history.Incarnation) { i.Volume = "other" })),
			all: []*history.Incarnation{a}, want: []string{"record 1, ack", "4 more"},
		},
		{
			name: "found damaged when it was opened", content: good, verified: 9,
			all:  []*history.Incarnation{a, with(life("b", 20*second, 6, 9), func(i *history.Incarnation) { i.Found.Bad = []string{"record 3: it is damaged"} })},
			want: []string{"b-20 on b found at 20s: record 3: it is damaged"},
		},
		{name: "acknowledged backwards", content: good[:5*history.RecordSize], verified: 5, all: []*history.Incarnation{
			with(life("a", 10*second, 1, 5), func(i *history.Incarnation) { i.Writes[1], i.Writes[2] = i.Writes[2], i.Writes[1] }),
		}, want: []string{"wrote record 2 after record 3"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			log, err := history.ScanLog("db", bytes.NewReader(c.content))
			if err != nil {
				t.Fatal(err)
			}
			verified, found := history.Data("db", log, c.all)
			if verified != c.verified {
				t.Errorf("%d are verified, want %d", verified, c.verified)
			}
			want(t, found, c.want...)
		})
	}
}

func TestScanLog(t *testing.T) {
	good := written(life("a", 10*second, 1, 5))
	hole := slices.Clone(good)
	copy(hole[2*history.RecordSize:], make([]byte, 10))
	for _, c := range []struct {
		name        string
		content     []byte
		first, last uint64
		bad         int
		size        int64
	}{
		{name: "empty"},
		{name: "whole", content: good, first: 1, last: 5, size: 5 * history.RecordSize},
		{name: "torn", content: good[:len(good)-1], first: 1, last: 4, size: 4 * history.RecordSize},
		{name: "with a hole", content: hole, first: 4, last: 5, bad: 1, size: 5 * history.RecordSize},
		{name: "with zeros behind", content: append(slices.Clone(good), make([]byte, 2000)...), first: 1, last: 5, size: 5 * history.RecordSize},
	} {
		t.Run(c.name, func(t *testing.T) {
			log, err := history.ScanLog("db", bytes.NewReader(c.content))
			if err != nil {
				t.Fatal(err)
			}
			f := log.Found()
			if f.First != c.first || f.Last != c.last || len(f.Bad) != c.bad || log.Size != c.size {
				t.Errorf("found %+v, size %d, want %d to %d, %d bad, size %d", f, log.Size, c.first, c.last, c.bad, c.size)
			}
		})
	}
}

func TestScanSlots(t *testing.T) {
	content := make([]byte, history.Slots*history.RecordSize)
	put := func(seq uint64, volume string) {
		copy(content[seq%history.Slots*history.RecordSize:], history.Record{Seq: seq, Volume: volume, Node: "a", Incarnation: "x"}.Encode())
	}
	if f := history.ScanSlots("db", content); f.First != 0 || f.Last != 0 || len(f.Bad) > 0 {
		t.Errorf("of an empty file is found %+v", f)
	}
	for seq := range uint64(history.Slots + 10) {
		put(seq+1, "db")
	}
	if f := history.ScanSlots("db", content); f.First != 11 || f.Last != history.Slots+10 || len(f.Bad) > 0 {
		t.Errorf("of a full file is found %+v", f)
	}
	put(20, "other")
	if f := history.ScanSlots("db", content); f.First != 21 || len(f.Bad) != 1 {
		t.Errorf("of a file with a foreign record is found %+v", f)
	}
}

func TestFlushed(t *testing.T) {
	first := with(life("a", 10*second, 1, 5), unsynced)
	next := func(found uint64) *history.Incarnation {
		return with(life("b", 20*second, found+1, found+3), unsynced)
	}
	mapped := func(node string, open time.Duration, first, last uint64, found history.Found) *history.Incarnation {
		return with(life(node, open, first, last), func(i *history.Incarnation) { i.Kind, i.Found = history.Mapped, &found })
	}
	for _, c := range []struct {
		name    string
		all     []*history.Incarnation
		changes []history.Change
		cuts    []history.PowerCut
		want    []string
	}{
		{name: "all there", all: []*history.Incarnation{next(5), first}},
		{name: "more there than the witness knows", all: []*history.Incarnation{first, next(6)}},
		{
			name: "one missing", all: []*history.Incarnation{first, next(4)},
			want: []string{"planned moves: volume db: a-10 on a wrote records 1 to 5 until 15s, and b-20 on b found 1 to 4 at 20s"},
		},
		{
			name: "seen by one that did not write", all: []*history.Incarnation{first, with(next(5), func(i *history.Incarnation) { i.Writes = nil }), with(life("c", 30*second, 3, 4), unsynced)},
			want: []string{"c-30 on c found 1 to 2"},
		},
		{name: "one in between did not look", all: []*history.Incarnation{first, {Volume: "db", Kind: history.Unsynced, Open: 17 * second}, next(4)}, want: []string{"found 1 to 4"}},
		{name: "missing after a power cut", all: []*history.Incarnation{first, next(2)}, cuts: []history.PowerCut{{Node: "a", At: 15 * second}}},
		{name: "missing after a power cut elsewhere", all: []*history.Incarnation{first, next(2)}, cuts: []history.PowerCut{{Node: "b", At: 15 * second}}, want: []string{"found 1 to 2"}},
		{name: "missing before the power cut", all: []*history.Incarnation{first, next(2)}, cuts: []history.PowerCut{{Node: "a", At: 25 * second}}, want: []string{"found 1 to 2"}},
		{name: "missing after a takeover", all: []*history.Incarnation{first, next(2)}, changes: []history.Change{forced(change(4, 18*second, "b"))}},
		{name: "missing after a takeover before", all: []*history.Incarnation{first, next(2)}, changes: []history.Change{forced(change(4, 8*second, "a"))}, want: []string{"found 1 to 2"}},
		{name: "missing after an I/O error", all: []*history.Incarnation{with(life("a", 10*second, 1, 5), func(i *history.Incarnation) { i.Kind, i.Cut = history.Unsynced, "EIO" }), next(2)}},
		{name: "synced ones are the business of Data", all: []*history.Incarnation{life("a", 10*second, 1, 5), life("b", 20*second, 2, 3)}},
		{name: "a ring", all: []*history.Incarnation{mapped("a", 10*second, 1, 600, history.Found{}), mapped("b", 700*second, 601, 601, history.Found{First: 345, Last: 600})}},
		{name: "a ring with a slot half overwritten", all: []*history.Incarnation{mapped("a", 10*second, 1, 600, history.Found{}), mapped("b", 700*second, 601, 601, history.Found{First: 346, Last: 600})}},
		{
			name: "a ring with a hole", all: []*history.Incarnation{mapped("a", 10*second, 1, 600, history.Found{}), mapped("b", 700*second, 601, 601, history.Found{First: 347, Last: 600})},
			want: []string{"found 347 to 600"},
		},
	} {
		t.Run(c.name, func(t *testing.T) { want(t, history.Flushed(c.all, c.changes, c.cuts), c.want...) })
	}
}

func TestPulled(t *testing.T) {
	cut := []*history.Incarnation{with(life("a", 10*second, 1, 5), func(i *history.Incarnation) { i.Cut, i.CutAt = "EIO", 16*second })}
	for _, c := range []struct {
		name    string
		changes []history.Change
		cuts    []history.PowerCut
		want    []string
	}{
		{name: "from the owner", changes: []history.Change{change(1, 5*second, "a")}, want: []string{"device: volume db: a-10 on a, the owner, got at 16s: EIO"}},
		{name: "taken over", changes: []history.Change{change(1, 5*second, "a"), pending(change(2, 14*second, "b"))}},
		{name: "taken over from another one", changes: []history.Change{change(1, 5*second, "c"), pending(change(2, 7*second, "a")), forced(change(3, 8*second, "a"))}, want: []string{"the owner, got"}},
		{name: "no longer the owner", changes: []history.Change{change(1, 5*second, "a"), change(2, 14*second, "b")}},
		{name: "power cut", changes: []history.Change{change(1, 5*second, "a")}, cuts: []history.PowerCut{{Node: "a", At: 15 * second}}},
		{name: "power cut elsewhere", changes: []history.Change{change(1, 5*second, "a")}, cuts: []history.PowerCut{{Node: "b", At: 15 * second}}, want: []string{"the owner, got"}},
	} {
		t.Run(c.name, func(t *testing.T) { want(t, history.Pulled(cut, c.changes, c.cuts), c.want...) })
	}
}

func TestOutages(t *testing.T) {
	all := []*history.Incarnation{life("b", 30*second, 6, 9), life("a", 10*second, 1, 5), with(life("c", 12*second, 1, 2), func(i *history.Incarnation) { i.Volume = "other" })}
	got := history.Outages(all, 2*second)
	if want := []history.Outage{{Volume: "db", Node: "a", Begin: 15 * second, End: 31 * second}}; !slices.Equal(got, want) {
		t.Errorf("outages are %v, want %v", got, want)
	}
	if got := history.Outages(all, 20*second); len(got) > 0 {
		t.Errorf("longer than 20 s are %v", got)
	}
}

func TestMoves(t *testing.T) {
	closed := func(i *history.Incarnation) { i.Closed = 1 }
	got := history.Moves([]*history.Incarnation{
		with(life("c", 40*second, 10, 12), closed),
		with(life("a", 10*second, 1, 5), closed),
		with(life("b", 18*second, 6, 5), closed), // did not write
		with(life("b", 20*second, 6, 9), closed),
		life("c", 28*second, 10, 12),
		with(life("b", 35*second, 13, 13), closed), // its predecessor was killed
		with(life("c", 50*second, 13, 14), closed),
	})
	if want := []time.Duration{6 * second, 5 * second, 5 * second}; len(got) != 1 || !slices.Equal(got["db"], want) {
		t.Errorf("moves took %v, want %v", got, want)
	}
}
