// Package history is what is recorded of writers on volumes, and the checks of it.
//
// A writer is one process that writes numbered records to one volume on one node.
// Beside the volume, where no fault reaches, it keeps a witness file: a line before
// it opens the volume's file, one for each record that is written, one when it ends.
// Whatever happened to hosts and storage, the witness files together with what is
// on the volumes at the end show whether two nodes wrote one volume, and whether
// anything that was acknowledged is missing. The checks are pure functions.
package history

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time since the machine's boot, the one clock of all hosts of a rig.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("read CLOCK_BOOTTIME: " + err.Error()) // since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

// A Record is what writers write to volumes.
type Record struct {
	// Seq counts the records of a volume from 1, whoever wrote them.
	Seq uint64
	// Volume is the volume it was written to: on another one it is foreign.
	Volume string
	// Node and Incarnation say who wrote it.
	Node, Incarnation string
}

// RecordSize is the size of a record on a volume, in bytes. It divides a page, so
// that no record is half in one and half in another.
const RecordSize = 512

// Encode returns the record as RecordSize bytes, one line of text.
func (r Record) Encode() []byte {
	text := fmt.Sprintf("%d %s %s %s", r.Seq, r.Volume, r.Node, r.Incarnation)
	b := fmt.Appendf(nil, "%s %08x", text, crc32.ChecksumIEEE([]byte(text)))
	if len(b) >= RecordSize {
		panic("the record is too long: " + text)
	}
	b = append(b, bytes.Repeat([]byte(" "), RecordSize-1-len(b))...)
	return append(b, '\n')
}

// Decode is the reverse of Encode.
func Decode(b []byte) (Record, error) {
	if len(b) != RecordSize || b[RecordSize-1] != '\n' {
		return Record{}, errors.New("it is not a whole record")
	}
	line := strings.TrimRight(string(b[:RecordSize-1]), " ")
	end := max(0, strings.LastIndexByte(line, ' '))
	text, sum := line[:end], strings.TrimPrefix(line[end:], " ")
	fields := strings.Split(text, " ")
	if len(fields) != 4 || sum != fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(text))) {
		return Record{}, fmt.Errorf("it is damaged: %.100q", line)
	}
	seq, err := strconv.ParseUint(fields[0], 10, 64)
	if err != nil {
		return Record{}, fmt.Errorf("it is damaged: %w", err)
	}
	return Record{Seq: seq, Volume: fields[1], Node: fields[2], Incarnation: fields[3]}, nil
}
