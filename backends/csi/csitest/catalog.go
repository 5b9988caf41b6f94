package csitest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"sync"
)

// Catalog is a csi.Catalog in memory.
type Catalog struct {
	mu       sync.Mutex
	values   map[string][]byte
	revs     map[string]int64
	revision int64
	fault    func(op string) error
}

// SetFault makes every call ask f, by the name of the method, before it does anything
// and again, with " done" at the end of the name, before it returns.
func (c *Catalog) SetFault(f func(op string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
}

func (c *Catalog) do(ctx context.Context, op string, f func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	fault := c.fault
	c.mu.Unlock()
	if fault != nil {
		if err := fault(op); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	c.mu.Lock()
	if c.values == nil {
		c.values, c.revs = map[string][]byte{}, map[string]int64{}
	}
	f()
	c.mu.Unlock()
	if fault != nil {
		return fault(op + " done")
	}
	return nil
}

// Load implements csi.Catalog.
func (c *Catalog) Load(ctx context.Context, volume string) (value []byte, revision int64, err error) {
	err = c.do(ctx, "load", func() { value, revision = bytes.Clone(c.values[volume]), c.revs[volume] })
	return value, revision, err
}

// Store implements csi.Catalog.
func (c *Catalog) Store(ctx context.Context, volume string, value []byte, revision int64) (stored bool, err error) {
	err = c.do(ctx, "store", func() {
		if stored = c.revs[volume] == revision; !stored {
			return
		}
		if value == nil {
			delete(c.values, volume)
			delete(c.revs, volume)
			return
		}
		c.revision++
		c.values[volume], c.revs[volume] = bytes.Clone(value), c.revision
	})
	return stored, err
}

// List implements csi.Catalog.
func (c *Catalog) List(ctx context.Context) (all map[string][]byte, err error) {
	err = c.do(ctx, "list", func() { all = maps.Clone(c.values) })
	return all, err
}
