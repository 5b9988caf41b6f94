package history

import (
	"errors"
	"fmt"
	"io"
)

// Log is what is in the file of a Synced or Unsynced writer.
type Log struct {
	// Records are by place: record n belongs at n-1. One that is bad is zero.
	Records []Record
	// Bad says what is wrong with records that have good ones after them.
	Bad []string
	// Size is where the last good record ends. What is behind was being written when
	// a writer was killed, and acknowledged to nobody.
	Size int64
}

// maxBad bounds Bad: beyond, more of them tell nothing.
const maxBad = 20

// ScanLog reads one.
func ScanLog(volume string, content io.Reader) (Log, error) {
	var l Log
	var all []string
	good := 0 // how many of all are before the last good record
	buf := make([]byte, RecordSize)
	for place := uint64(1); ; place++ {
		_, err := io.ReadFull(content, buf)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return Log{}, fmt.Errorf("read record %d: %w", place, err)
		}
		r, err := check(buf, volume, place)
		l.Records = append(l.Records, r)
		if err != nil {
			if len(all) < maxBad {
				all = append(all, fmt.Sprintf("record %d: %v", place, err))
			}
			continue
		}
		good = len(all)
		l.Size = int64(place) * RecordSize
	}
	l.Records = l.Records[:l.Size/RecordSize]
	l.Bad = all[:good]
	return l, nil
}

func check(b []byte, volume string, seq uint64) (Record, error) {
	r, err := Decode(b)
	switch {
	case err != nil:
		return Record{}, err
	case r.Volume != volume:
		return Record{}, fmt.Errorf("it is of volume %s", r.Volume)
	case r.Seq != seq:
		return Record{}, fmt.Errorf("it is number %d", r.Seq)
	}
	return r, nil
}

// Found is what a writer finds in it.
func (l Log) Found() Found {
	f := Found{Last: uint64(len(l.Records)), Bad: l.Bad}
	for f.First = f.Last; f.First > 1 && l.Records[f.First-2].Seq != 0; {
		f.First--
	}
	return f
}

// ScanSlots is what a Mapped writer finds in its file.
func ScanSlots(volume string, content []byte) Found {
	var f Found
	valid := map[uint64]bool{}
	for slot := 0; (slot+1)*RecordSize <= len(content); slot++ {
		r, err := Decode(content[slot*RecordSize : (slot+1)*RecordSize])
		switch {
		case err != nil: // empty, or being written when the writer was killed
		case r.Volume != volume || r.Seq%Slots != uint64(slot):
			f.Bad = append(f.Bad, fmt.Sprintf("slot %d: record %d of volume %s", slot, r.Seq, r.Volume))
		default:
			valid[r.Seq] = true
			f.Last = max(f.Last, r.Seq)
		}
	}
	for f.First = f.Last; f.First > 1 && valid[f.First-1]; {
		f.First--
	}
	return f
}
