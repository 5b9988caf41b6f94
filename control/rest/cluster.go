package rest

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Driver is what is asked for changes; *driver.Driver is one.
type Driver interface {
	CreateVolume(ctx context.Context, c driver.CreateRequest) (driver.Volume, error)
	// RemoveVolume is refused, with an ownership.ErrNotFound, if the volume of that name
	// has another id by now.
	RemoveVolume(ctx context.Context, name, id string) error
	// MoveVolume records on which host a volume is to be, given by name or node id; "" for
	// none. It is refused as RemoveVolume is.
	MoveVolume(ctx context.Context, name, id, host, by string) (ownership.Placement, error)
	// Cordon keeps new volumes off a host, or stops doing so; Drain releases what it has
	// idle, too.
	Cordon(ctx context.Context, host, by string, on bool) error
	Drain(ctx context.Context, host, by string) (driver.Drained, error)
	// RemoveNode is refused while the host is live, or owns volumes.
	RemoveNode(ctx context.Context, host, by string) error
}

// Leases are those of v1; *ownership.Map has them.
type Leases interface {
	Lease(ctx context.Context, vid, node string, ttl *time.Duration, by string) (lease ownership.Lease, created bool, err error)
	Unlease(ctx context.Context, vid, by string) (ownership.Lease, error)
}

// Cluster is what is asked how things are, from memory; *ownership.Observer is one.
type Cluster interface {
	// State is what was last heard, and for how long etcd has not been heard from; 0
	// while it is followed. ok is false if it was never heard from.
	State() (s *ownership.State, stale time.Duration, ok bool)
	// Wait returns the first State after a revision.
	Wait(ctx context.Context, after int64) (*ownership.State, error)
	// Events are the audit lines after a revision, oldest first, and from where to go on.
	// *ownership.GoneError if they are not kept any more. Those of one revision come
	// together.
	Events(ctx context.Context, after int64, limit int) (events []ownership.Event, next int64, err error)
}

// byID finds a volume that is not gone.
func byID(s *ownership.State, id string) *ownership.View {
	if i := slices.IndexFunc(s.Views, func(v ownership.View) bool { return v.Volume.ID == id }); i >= 0 {
		return &s.Views[i]
	}
	return nil
}

// byName finds one whose name is not free for another.
func byName(s *ownership.State, name string) *ownership.View {
	i, ok := slices.BinarySearchFunc(s.Views, name, func(v ownership.View, name string) int { return strings.Compare(v.Volume.Name, name) })
	for ; ok && i < len(s.Views) && s.Views[i].Volume.Name == name; i++ { // one that is being deleted may have the name, too
		if s.Views[i].Volume.Phase != ownership.PhaseDeleting {
			return &s.Views[i]
		}
	}
	return nil
}

// taken says why there can be no new volume of that name and id, or nil.
func taken(s *ownership.State, name, id string) error {
	if byID(s, id) != nil || gone(s, id) != nil {
		return &ownership.TakenError{Name: name, ID: id}
	}
	if other := byName(s, name); other != nil {
		return &ownership.TakenError{Name: name, ID: id, By: other.Volume.ID}
	}
	return nil
}

func gone(s *ownership.State, id string) *ownership.Gone {
	if i := slices.IndexFunc(s.Gone, func(g ownership.Gone) bool { return g.Volume.ID == id }); i >= 0 {
		return &s.Gone[i]
	}
	return nil
}

// nodeOf finds a node in service, or cordoned, by its id or, if that is one node's alone, by
// its host name. The errors are those of the map.
func nodeOf(s *ownership.State, host string) (*ownership.NodeStatus, error) {
	var named *ownership.NodeStatus
	var known, ids []string
	for i := range s.Nodes {
		n := &s.Nodes[i]
		if n.State == ownership.Removed {
			continue
		}
		if n.ID == host {
			return n, nil
		}
		if known = append(known, n.Host); n.Host == host {
			named, ids = n, append(ids, n.ID)
		}
	}
	switch len(ids) {
	case 0:
		slices.Sort(known)
		return nil, &ownership.NoHostError{Host: host, Known: slices.Compact(known)}
	case 1:
		return named, nil
	}
	return nil, &ownership.AmbiguousError{Host: host, IDs: ids}
}

// mayGet refuses a host that gets nothing.
func mayGet(s *ownership.State, host string) error {
	n, err := nodeOf(s, host)
	if err == nil && n.State == ownership.Cordoned {
		err = &ownership.NodeStateError{Node: n.Node}
	}
	return err
}

// present is where a volume is mounted; nil if that is nowhere, or not known.
func present(v *ownership.View) *ownership.Presence {
	if v.Presence != nil && v.Owner != nil && v.Owner.Pending == nil && v.Presence.Node == v.Owner.Node && v.Presence.Token == v.Owner.Token {
		return v.Presence
	}
	return nil
}
