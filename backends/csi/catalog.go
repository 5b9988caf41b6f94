package csi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// A Catalog is what the cluster remembers of a backend's volumes. CSI needs one: a
// driver keeps no tags, so it cannot say which of its volumes are whose, nor under
// which token a node has one. Every method is one transaction on a store that all nodes
// of the cluster share, such as etcd; an error means that the outcome is not known.
type Catalog interface {
	// Load returns what is stored of a volume, and its revision: nil and 0 for nothing.
	Load(ctx context.Context, volume string) (value []byte, revision int64, err error)
	// Store replaces it if its revision is still this one, and says whether it was.
	// Nothing is of revision 0; a nil value removes it.
	Store(ctx context.Context, volume string, value []byte, revision int64) (stored bool, err error)
	// List returns what is stored of every volume.
	List(ctx context.Context) (map[string][]byte, error)
}

// entry is what is stored of a volume.
type entry struct {
	Name    string `json:"name"`
	Cluster string `json:"cluster"`
	// Parameters are those of the profile, when the volume was asked for: only the same
	// call again tells what has become of the first.
	Parameters map[string]string `json:"parameters,omitempty"`
	// Asked is the size the volume was created with, Size what it has.
	Asked int64 `json:"asked"`
	Size  int64 `json:"size,omitempty"`
	// Ref is empty until the driver has made the volume, or was never heard of about it.
	Ref string `json:"ref,omitempty"`
	// Where is where the volume was to be reachable from, so that each try asks the same.
	Where map[string]string `json:"where,omitempty"`
	// Deleting: a Create that is still under way must not bring it back.
	Deleting bool `json:"deleting,omitempty"`
	// Grow: a node has to be told of the size when the volume is attached next.
	Grow bool `json:"grow,omitempty"`
	// Holder is whom the volume is published to; with Fences only.
	Holder *holder `json:"holder,omitempty"`
	// Fenced is up to which token each node was cut off, and what it was known by.
	Fenced map[string]holder `json:"fenced,omitempty"`
	// Late has a mark for each node whose next publication an earlier call may still hit:
	// one that got no answer, or whose caller was killed before it could tell.
	Late map[string]string `json:"late,omitempty"`
}

// marked is an entry with another mark of a node's; none if it is empty.
func (e *entry) marked(node, mark string) *entry {
	next := *e
	next.Late = maps.Clone(e.Late)
	if mark == "" {
		delete(next.Late, node)
		return &next
	}
	if next.Late == nil {
		next.Late = map[string]string{}
	}
	next.Late[node] = mark
	return &next
}

// holder is a node that has, or had, a volume published to it under a token. Identity
// is the driver's name for the node.
type holder struct {
	Node     string `json:"node"`
	Identity string `json:"identity"`
	Token    int64  `json:"token"`
}

func (b *Backend) load(ctx context.Context, volume string) (*entry, int64, error) {
	value, revision, err := b.self.Catalog.Load(ctx, volume)
	if err != nil {
		return nil, 0, catalogError(ctx, err)
	}
	if revision == 0 {
		return nil, 0, nil
	}
	e, err := decode(volume, value)
	return e, revision, err
}

func decode(volume string, value []byte) (*entry, error) {
	var e entry
	if err := json.Unmarshal(value, &e); err != nil {
		return nil, sentence(backends.ErrUnavailable, "what the cluster remembers of volume %s cannot be read: %w", volume, err)
	}
	return &e, nil
}

// store is Catalog.Store; e nil removes the entry.
func (b *Backend) store(ctx context.Context, volume string, e *entry, revision int64) (bool, error) {
	var value []byte
	if e != nil {
		var err error
		if value, err = json.Marshal(e); err != nil {
			return false, err
		}
	}
	stored, err := b.self.Catalog.Store(ctx, volume, value, revision)
	if err != nil {
		return false, catalogError(ctx, err)
	}
	return stored, nil
}

func catalogError(ctx context.Context, err error) error {
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w (%w)", ctx.Err(), err)
	}
	return sentence(backends.ErrUnavailable, "the cluster's record of CSI volumes: %w", err)
}

// update changes a volume's entry in one go. change gets nil if there is none; it
// returns what there is to be, nil for nothing, or the very same pointer for no change.
func (b *Backend) update(ctx context.Context, volume string, change func(e *entry) (*entry, error)) error {
	for pause := newPause(); ; {
		e, revision, err := b.load(ctx, volume)
		if err != nil {
			return err
		}
		next, err := change(e)
		if err != nil || next == e {
			return err
		}
		stored, err := b.store(ctx, volume, next, revision)
		if err != nil || stored {
			return err
		}
		if err := pause.wait(ctx); err != nil {
			return err
		}
	}
}

// unasked makes calls that end something of this node's which no Detach was asked for. The
// driver's journal does not know of them, so the catalog does before they are sent: if this
// process is killed in the middle, the next one's Attach says that they may come late. If
// one got no answer, this Attach does.
func (b *Backend) unasked(ctx context.Context, volume string, end func() (late bool, err error)) error {
	mark := uuid.NewString()
	earlier := "" // then it stays, whatever comes of these
	err := b.update(ctx, volume, func(e *entry) (*entry, error) {
		if e == nil {
			return nil, nil
		}
		if earlier = e.Late[b.self.Node]; earlier != "" {
			return e, nil
		}
		return e.marked(b.self.Node, mark), nil
	})
	if err != nil {
		return err
	}
	b.step("marked")
	late, err := end()
	switch {
	case late:
		b.told.Store(volume, cmp.Or(earlier, mark))
	case earlier == "":
		err = errors.Join(err, b.update(ctx, volume, func(e *entry) (*entry, error) {
			if e == nil || e.Late[b.self.Node] != mark {
				return e, nil
			}
			return e.marked(b.self.Node, ""), nil
		}))
	}
	return heard(late, err)
}
