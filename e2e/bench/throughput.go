package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	fileSize  = 64 << 20 // what is written to, over and over
	blockSize = 4 << 10
	chunkSize = 1 << 20
)

// pattern is one way to write.
type pattern struct {
	name           string
	direct, random bool
	bytes          int // in one turn
}

var patterns = []pattern{
	{"write, sequential, O_DIRECT", true, false, 32 << 20},
	{"write, sequential, fsync", false, false, 32 << 20},
	{"write, random 4k, O_DIRECT", true, true, 2 << 20},
	{"write, random 4k, fsync", false, true, 4 << 20},
}

// throughput measures writing to a volume beside writing to the same kind of loop
// file mounted by hand.
func (r *run) throughput(ctx context.Context, h *host) (err error) {
	v, b := &volume{host: h, name: r.next(), id: mountID()}, r.area.bare(r.next())
	if err := all(
		func() error { return h.create(ctx, v.name) },
		func() error { return v.mount(ctx) },
		b.create,
		func() error { return b.first(ctx) },
	); err != nil {
		return err
	}
	ours, err := newTarget(v.mountpoint)
	if err != nil {
		return err
	}
	bare, err := newTarget(b.target)
	if err != nil {
		return errors.Join(err, ours.close())
	}
	// Both get their blocks piece by piece, and so alike.
	for at := 0; at < fileSize && err == nil; at += 8 << 20 {
		err = errors.Join(ours.fill(at, 8<<20), bare.fill(at, 8<<20))
	}
	if err == nil {
		err = r.turns(ctx, 60, 40*time.Second, func(turn int) error {
			for _, p := range patterns {
				seed := rand.Uint64()
				if err := byTurns(turn, func() error {
					return r.rates.write(p.name, ours, p, seed)
				}, func() error {
					return r.rates.write("bare "+p.name, bare, p, seed)
				}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := errors.Join(err, ours.close(), bare.close()); err != nil {
		return err
	}
	return errors.Join(each(ctx, v.unmount, v.free), b.down(), b.remove())
}

// write notes down the rate of one turn, in MiB a second.
func (r rates) write(name string, t *target, p pattern, seed uint64) error {
	start := time.Now()
	if err := t.write(p, seed); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r[name] = append(r[name], float64(p.bytes)/(1<<20)/time.Since(start).Seconds())
	return nil
}

// target is a file to write to.
type target struct {
	direct, buffered *os.File
	data             []byte
}

func newTarget(dir string) (*target, error) {
	path := filepath.Join(dir, "bench")
	buffered, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	direct, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, errors.Join(err, buffered.Close())
	}
	// O_DIRECT wants aligned memory.
	data := make([]byte, chunkSize+blockSize)
	data = data[int(-uintptr(unsafe.Pointer(&data[0]))%blockSize):][:chunkSize]
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // any bytes will do
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	return &target{direct: direct, buffered: buffered, data: data}, nil
}

func (t *target) close() error { return errors.Join(t.direct.Close(), t.buffered.Close()) }

func (t *target) fill(at, n int) error {
	for end := at + n; at < end; at += chunkSize {
		if _, err := t.direct.WriteAt(t.data, int64(at)); err != nil {
			return err
		}
	}
	return t.direct.Sync()
}

// write writes p.bytes; equal seeds give equal places.
func (t *target) write(p pattern, seed uint64) error {
	file, size := t.buffered, chunkSize
	if p.direct {
		file = t.direct
	}
	if p.random {
		size = blockSize
	}
	places := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // no secrets
	at := places.IntN((fileSize-p.bytes)/size+1) * size
	for done := 0; done < p.bytes; done += size {
		if p.random {
			at = places.IntN(fileSize/size) * size
		}
		if _, err := file.WriteAt(t.data[:size], int64(at)); err != nil {
			return err
		}
		at += size
	}
	if p.direct {
		return nil
	}
	return file.Sync()
}
