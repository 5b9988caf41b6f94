package history

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// Kind is how a writer writes.
type Kind string

// The kinds of writers.
const (
	// Synced acknowledges a record after fsync: nothing may ever take it away.
	Synced Kind = "synced"
	// Unsynced never syncs, and Mapped writes through a shared mapping: what they
	// write is the kernel's to write out, by the time the volume is unmounted.
	Unsynced Kind = "unsynced"
	Mapped   Kind = "mapped"
)

// Slots is how many records the file of a Mapped writer has: record n is in slot n
// modulo Slots.
const Slots = 256

// Leaves is how many small files a Synced or Unsynced writer makes beside its own.
const Leaves = 512

// What a line of a witness file tells.
type What string

// The lines of a witness file.
const (
	// Open is the first: the writer is about to open the volume's file.
	Open What = "open"
	// FoundLine tells what was on the volume then.
	FoundLine What = "found"
	// Wrote is a record written: for a Synced writer, after fsync.
	Wrote What = "wrote"
	// Full is a record that found no space; it is tried again.
	Full What = "full"
	// Cut is the first I/O error, which is the writer's end.
	Cut What = "cut"
	// Close is a writer's end because it was told to.
	Close What = "close"
)

// A Line is one line of a witness file, as JSON.
type Line struct {
	What What `json:"what"`
	// At is when, as Now gives it: for Open before the open, for Wrote after the
	// write.
	At time.Duration `json:"at"`

	// Of Open.
	Volume      string `json:"volume,omitempty"`
	Node        string `json:"node,omitempty"`
	Incarnation string `json:"incarnation,omitempty"`
	Kind        Kind   `json:"kind,omitempty"`

	Seq   uint64 `json:"seq,omitempty"` // of Wrote and Full
	Found *Found `json:"found,omitempty"`
	Error string `json:"error,omitempty"` // of Cut
}

// Found is what a writer finds on its volume: the records First to Last without a
// gap, Last being the highest there is; 0 and 0 if there is none.
type Found struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// Bad are records that are damaged, foreign or out of their place, with good
	// ones after them.
	Bad []string `json:"bad,omitempty"`
}

// An Incarnation is one writer's life, read from its witness file.
type Incarnation struct {
	ID, Volume, Node string
	Kind             Kind
	// Open is when it was about to open the volume.
	Open time.Duration
	// Found is nil if it did not get that far.
	Found *Found
	// Writes are in the order in which they were made.
	Writes []Write
	// Full is how many attempts found no space.
	Full int
	// Cut is its first I/O error, and CutAt when. Closed is when it ended in peace.
	// All are zero for a writer that was killed.
	Cut    string
	CutAt  time.Duration
	Closed time.Duration

	rest []byte // of a line that is being written
}

// A Write is one record written.
type Write struct {
	Seq uint64
	At  time.Duration
}

// Add adds what was appended to the witness file.
func (i *Incarnation) Add(data []byte) error {
	i.rest = append(i.rest, data...)
	for {
		line, rest, whole := bytes.Cut(i.rest, []byte("\n"))
		if !whole {
			return nil
		}
		i.rest = rest
		var l Line
		if err := json.Unmarshal(line, &l); err != nil {
			return fmt.Errorf("read the witness line %q: %w", line, err)
		}
		i.add(l)
	}
}

func (i *Incarnation) add(l Line) {
	switch l.What {
	case Open:
		i.ID, i.Volume, i.Node, i.Kind, i.Open = l.Incarnation, l.Volume, l.Node, l.Kind, l.At
	case FoundLine:
		i.Found = l.Found
	case Wrote:
		i.Writes = append(i.Writes, Write{l.Seq, l.At})
	case Full:
		i.Full++
	case Cut:
		i.Cut, i.CutAt = l.Error, l.At
	case Close:
		i.Closed = l.At
	}
}

// LastWrite is the last record written; zero if there is none.
func (i *Incarnation) LastWrite() Write {
	if len(i.Writes) == 0 {
		return Write{}
	}
	return i.Writes[len(i.Writes)-1]
}
