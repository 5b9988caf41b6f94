package ownership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// A Catalog is what a storage backend has the cluster remember, a value for each
// volume, where its storage system cannot: v1/csi/<backend>/<volume>. Each of its
// methods is one transaction.
type Catalog struct {
	m       *Map
	backend string
}

// Catalog returns that of a backend.
func (m *Map) Catalog(backend string) *Catalog { return &Catalog{m, backend} }

// entry is the value of csi/<backend>/<volume>.
type entry struct {
	Op string `json:"op"`
	// Value is the backend's own.
	Value json.RawMessage `json:"value"`
}

func (c *Catalog) key(volume string) string { return c.m.key("csi", c.backend, volume) }

// Load returns what is stored of a volume, and its revision: nil and 0 for nothing.
func (c *Catalog) Load(ctx context.Context, volume string) (value []byte, revision int64, err error) {
	if !validID(volume) {
		return nil, 0, fmt.Errorf("%q names no volume", volume)
	}
	res, err := c.m.read(ctx, get(c.key(volume)))
	if err != nil || res.kv(0) == nil {
		return nil, 0, err
	}
	e, err := decodeEntry(*res.kv(0))
	if err != nil {
		return nil, 0, err
	}
	return e.Value, res.kv(0).ModRevision, nil
}

// Store replaces it with a JSON value if its revision is still this one, and says
// whether it was. Nothing is of revision 0; a nil value removes it. After an error it
// may have been stored, or be stored later.
func (c *Catalog) Store(ctx context.Context, volume string, value []byte, revision int64) (stored bool, err error) {
	switch {
	case !validID(volume):
		return false, fmt.Errorf("%q names no volume", volume)
	case value != nil && !json.Valid(value):
		return false, fmt.Errorf("what is to be stored of volume %s is not JSON", volume)
	}
	key, op := c.key(volume), newOp()
	txn := Txn{If: []Cmp{mod(key, revision)}, Else: []Op{get(key)}}
	if value == nil {
		txn.Then = []Op{del(key)}
	} else {
		txn.Then = []Op{put(key, encode(entry{op, value}))}
	}
	res, err := c.m.write(ctx, txn)
	switch {
	case err != nil:
		return false, err
	case res.Succeeded, value == nil && res.kv(0) == nil:
		return true, nil
	}
	return value != nil && carries(res.kv(0), op, decodeEntry, func(e entry) string { return e.Op }), nil
}

// List returns what is stored of every volume. One that cannot be read fails it.
func (c *Catalog) List(ctx context.Context) (map[string][]byte, error) {
	res, err := c.m.read(ctx, getPrefix(c.key("")))
	if err != nil {
		return nil, err
	}
	all := make(map[string][]byte, len(res.Results[0].KVs))
	for _, kv := range res.Results[0].KVs {
		e, err := decodeEntry(kv)
		if err != nil {
			return nil, err
		}
		all[last(kv.Key)] = e.Value
	}
	return all, nil
}

func decodeEntry(kv KV) (entry, error) {
	return decode(kv, func(e *entry) error {
		if len(e.Value) == 0 || string(e.Value) == "null" {
			return errors.New("value is missing")
		}
		return nil
	})
}
