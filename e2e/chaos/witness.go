package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

// witness reads the writers' witness files as they grow.
type witness struct {
	dir string

	mu    sync.Mutex
	files map[string]*witnessFile
}

type witnessFile struct {
	history.Incarnation

	read int64
}

// poll reads what is new.
func (w *witness) poll() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f := w.files[e.Name()]
		if f == nil {
			f = new(witnessFile)
			w.files[e.Name()] = f
		}
		if f.Closed != 0 || f.CutAt != 0 {
			continue
		}
		if err := f.readNew(filepath.Join(w.dir, e.Name())); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	return nil
}

func (f *witnessFile) readNew(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == f.read {
		return err
	}
	data := make([]byte, info.Size()-f.read)
	n, err := file.ReadAt(data, f.read)
	f.read += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return f.Add(data[:n])
}

// incarnations returns all there are. Nothing writes any more.
func (w *witness) incarnations() ([]*history.Incarnation, error) {
	if err := w.poll(); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*history.Incarnation
	for _, f := range w.files {
		if f.ID != "" { // else it was killed before its first line
			all = append(all, &f.Incarnation)
		}
	}
	return all, nil
}

// last is the last record written to a volume, and where; zero if there is none.
func (w *witness) last(volume string) (at time.Duration, node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.files {
		if write := f.LastWrite(); f.Volume == volume && write.At > at {
			at, node = write.At, f.Node
		}
	}
	return at, node
}
