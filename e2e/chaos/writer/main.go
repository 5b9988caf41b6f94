// Command writer writes numbered records to a volume, and tells a witness file
// outside of the volume what it is about to do and what it has done: see package
// history. It runs as the only process of a container.
//
// SIGTERM ends it in peace, SIGUSR1 has it fill the volume's filesystem for a while.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

func main() {
	var w writer
	flag.StringVar(&w.volume, "volume", "", "the volume's `name`")
	flag.StringVar(&w.node, "node", os.Getenv("NODE"), "the `name` of the node it runs on; from the environment variable NODE")
	flag.StringVar((*string)(&w.kind), "kind", string(history.Synced), "how to write: synced, unsynced or mapped")
	flag.StringVar(&w.dir, "dir", "/data", "`directory` of the volume")
	witness := flag.String("witness", "/witness", "`directory` of witness files")
	flag.DurationVar(&w.every, "every", 200*time.Millisecond, "`time` between two records")
	flag.DurationVar(&w.full, "full", 8*time.Second, "`time` for which the filesystem stays full")
	flag.StringVar(&w.copy, "copy", "", "copy what there is to this `file`, and end")
	flag.Parse()

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for s := range signals {
			if s == unix.SIGUSR1 {
				go w.fill(ctx)
			} else {
				cancel()
			}
		}
	}()
	if err := w.run(ctx, *witness); err != nil {
		fmt.Fprintln(os.Stderr, "writer:", err)
		os.Exit(1)
	}
}

type writer struct {
	volume, node string
	kind         history.Kind
	dir          string
	every, full  time.Duration
	copy         string

	id      string
	witness *os.File
}

// run writes until ctx ends, or until the first I/O error.
func (w *writer) run(ctx context.Context, witness string) (err error) {
	began := history.Now()
	w.id = fmt.Sprintf("%s-%x", w.node, int64(began))
	w.witness, err = os.OpenFile(filepath.Join(witness, w.volume+"."+w.id), os.O_CREATE|os.O_EXCL|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := w.tell(history.Line{What: history.Open, At: began, Volume: w.volume, Node: w.node, Incarnation: w.id, Kind: w.kind}); err != nil {
		return err
	}
	if err := w.write(ctx); err != nil {
		return errors.Join(err, w.tell(history.Line{What: history.Cut, At: history.Now(), Error: err.Error()}))
	}
	return w.tell(history.Line{What: history.Close, At: history.Now()})
}

// tell appends a line to the witness file.
func (w *writer) tell(l history.Line) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	_, err = w.witness.Write(append(b, '\n'))
	return err
}

func (w *writer) write(ctx context.Context) error {
	// Of a writer that was killed while it filled the filesystem.
	if err := os.Remove(w.filler()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(filepath.Join(w.dir, "log"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// Docker lets two containers of a host share a volume, such as an old task that
	// is ending and a new one. They take turns. Those of two hosts do not see each
	// other's locks.
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if !pause(ctx, 20*time.Millisecond) {
			return nil
		}
	}
	if w.copy != "" {
		return w.copyTo(f)
	}
	if w.kind == history.Mapped {
		return w.writeMapped(ctx, f)
	}
	return w.writeLog(ctx, f)
}

// copyTo copies the file out of the volume, after a look at it.
func (w *writer) copyTo(f *os.File) error {
	content, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	found := history.ScanSlots(w.volume, content)
	if w.kind != history.Mapped {
		log, err := history.ScanLog(w.volume, bytes.NewReader(content))
		if err != nil {
			return err
		}
		found = log.Found()
	}
	return errors.Join(w.found(found), os.WriteFile(w.copy, content, 0o644))
}

func (w *writer) found(found history.Found) error {
	return w.tell(history.Line{What: history.FoundLine, At: history.Now(), Found: &found})
}

// writeLog appends to the file.
func (w *writer) writeLog(ctx context.Context, f *os.File) error {
	log, err := history.ScanLog(w.volume, f)
	if err != nil {
		return err
	}
	found := log.Found()
	if err := w.found(found); err != nil {
		return err
	}
	if err := f.Truncate(log.Size); err != nil {
		return err
	}
	for seq := found.Last + 1; ; {
		_, err := f.WriteAt(w.record(seq), int64(seq-1)*history.RecordSize)
		if err == nil {
			err = w.leaf(seq)
		}
		if err == nil && w.kind == history.Synced {
			err = f.Sync()
		}
		switch {
		case errors.Is(err, unix.ENOSPC):
			// A part of it may be there.
			if err := f.Truncate(int64(seq-1) * history.RecordSize); err != nil {
				return err
			}
			if err := w.tell(history.Line{What: history.Full, At: history.Now(), Seq: seq}); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			if err := w.tell(history.Line{What: history.Wrote, At: history.Now(), Seq: seq}); err != nil {
				return err
			}
			seq++
		}
		if !pause(ctx, w.every) {
			return nil
		}
	}
}

// leaf replaces one of many small files, every now and then: two hosts that have the
// filesystem mounted touch different parts of its metadata then, which the other one
// does not expect.
func (w *writer) leaf(seq uint64) error {
	if seq%16 != 0 {
		return nil
	}
	path := filepath.Join(w.dir, w.id)
	if err := os.WriteFile(path, w.record(seq), 0o600); err != nil {
		return err
	}
	return os.Rename(path, filepath.Join(w.dir, fmt.Sprintf("leaf%d", rand.IntN(history.Leaves))))
}

// writeMapped writes to the slots of the file through a shared mapping.
func (w *writer) writeMapped(ctx context.Context, f *os.File) (err error) {
	const size = history.Slots * history.RecordSize
	if info, err := f.Stat(); err != nil {
		return err
	} else if info.Size() < size {
		// With its blocks: a store to a hole of a full filesystem is SIGBUS.
		if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(m) }()
	// A page that cannot be read is SIGBUS.
	debug.SetPanicOnFault(true)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("access the mapped file: %v", p)
		}
	}()
	found := history.ScanSlots(w.volume, m)
	if err := w.found(found); err != nil {
		return err
	}
	for seq := found.Last + 1; ; seq++ {
		slot := seq % history.Slots
		copy(m[slot*history.RecordSize:], w.record(seq))
		if err := w.tell(history.Line{What: history.Wrote, At: history.Now(), Seq: seq}); err != nil {
			return err
		}
		if !pause(ctx, w.every) {
			return nil
		}
	}
}

func (w *writer) record(seq uint64) []byte {
	return history.Record{Seq: seq, Volume: w.volume, Node: w.node, Incarnation: w.id}.Encode()
}

func (w *writer) filler() string { return filepath.Join(w.dir, "filler") }

// mostFilled bounds fill: should the directory be none of a volume, but of a host.
const mostFilled = 1 << 30

// fill takes the filesystem's space, all there is, and gives it back.
func (w *writer) fill(ctx context.Context) {
	f, err := os.OpenFile(w.filler(), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	end := int64(0)
	for size := int64(mostFilled / 2); size >= 4096 && end < mostFilled; {
		if unix.Fallocate(int(f.Fd()), 0, end, size) == nil {
			end += size
		} else {
			size /= 2
		}
	}
	pause(ctx, w.full)
	_ = os.Remove(w.filler())
}

// pause sleeps; false if ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
