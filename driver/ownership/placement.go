package ownership

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Placement is where an operator wants a volume, whether a container uses it or not:
// the value of place/<vid>. Its node keeps the volume mounted; another one gets it when
// the placement changes and nothing uses it any more. It gives no authority: own/<vid> does.
type Placement struct {
	Volume string    `json:"volume"`
	Node   string    `json:"node"`
	Host   string    `json:"host"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
	Op     string    `json:"op"`

	// Revision is the key's mod revision.
	Revision int64 `json:"-"`
}

// A Presence says that a node has a volume with a placement mounted: the value of
// at/<vid>, on the node's lease. It is true only with the token of own/<vid>.
type Presence struct {
	Volume string    `json:"volume"`
	Node   string    `json:"node"`
	Token  int64     `json:"token"`
	Path   string    `json:"path"` // what a container would get, on that host
	Since  time.Time `json:"since"`
	Op     string    `json:"op"`
}

// A Lease keeps a volume where it is mounted until it is given back or ends, as in the
// REST API of the original: the value of lease/<vid>. It gives no authority, and is no
// reason to mount. If it ends by itself, the key is on a lease of etcd of that length.
type Lease struct {
	Volume  string     `json:"volume"`
	Node    string     `json:"node"`
	Expires *time.Time `json:"expires,omitempty"` // nil: never
	By      string     `json:"by"`
	Op      string     `json:"op"`

	// Revision is the key's mod revision.
	Revision int64 `json:"-"`
}

// Gone is what is remembered of a deleted volume for as long as of an audit line: the
// value of gone/<vid>.
type Gone struct {
	Volume Volume `json:"volume"`
	// Node is the one that it was placed on last, if any.
	Node string    `json:"node,omitempty"`
	At   time.Time `json:"at"`
}

// ErrNoLease is given for a volume of which nobody has a lease.
var ErrNoLease = errors.New("there is no lease of the volume")

// LeasedError says who has the lease of a volume.
type LeasedError struct {
	Lease Lease
}

func (e *LeasedError) Error() string {
	return fmt.Sprintf("volume %s is leased to node %s %s", e.Lease.Volume, e.Lease.Node, e.Lease.Until())
}

// Until says when a lease ends.
func (l Lease) Until() string {
	if l.Expires == nil {
		return "until it is given back"
	}
	return "until " + l.Expires.UTC().Format(time.RFC3339)
}

// Place says that a volume is to be on a host, given by its name or its node's id. by is
// who wants it. Said already, it stays as it is. *PhaseError if the volume is
// quarantined, or deleted; *NoHostError, *AmbiguousError or *NodeStateError if the host is
// unknown, one of several, or cordoned or removed.
func (m *Map) Place(ctx context.Context, vid, host, by string) (Placement, error) {
	if !validID(vid) {
		return Placement{}, noSuch(vid)
	}
	for try := 1; ; try++ {
		node, revision, err := m.find(ctx, host)
		if err == nil {
			err = node.serves()
		}
		if err != nil {
			return Placement{}, err
		}
		res, err := m.read(ctx, get(m.vol(vid)), get(m.placement(vid)))
		if err != nil {
			return Placement{}, err
		}
		v, err := usable(vid, res.kv(0))
		if err != nil && v.Phase != PhaseCreating {
			return Placement{}, err
		}
		from := ""
		if kv := res.kv(1); kv != nil {
			// One that cannot be read is replaced.
			if was, err := decodePlacement(*kv); err == nil && was.Node == node.ID {
				return was, nil // perhaps by an earlier send
			} else if err == nil {
				from = was.Node
			}
		}
		p, placed, err := m.place(ctx, node, revisionOf(res.kv(1)), from, vid, by,
			mod(m.node(node.ID), revision), mod(m.vol(vid), v.Revision))
		switch {
		case err != nil, placed:
			return p, err
		case try == tries:
			return Placement{}, changed(vid)
		}
	}
}

// PlaceHere replaces a placement by one on this node: ErrConflict if it is not the
// present one any more.
func (m *Map) PlaceHere(ctx context.Context, was Placement, by string) (Placement, error) {
	if !validID(was.Volume) || was.Revision <= 0 {
		return Placement{}, changed(was.Volume)
	}
	p, placed, err := m.place(ctx, m.me, was.Revision, was.Node, was.Volume, by)
	if err == nil && !placed {
		err = changed(was.Volume)
	}
	return p, err
}

// place replaces the placement of that revision, 0 for none.
func (m *Map) place(ctx context.Context, node Node, revision int64, from, vid, by string, also ...Cmp) (p Placement, placed bool, err error) {
	p = Placement{Volume: vid, Node: node.ID, Host: node.Host, By: by, At: time.Now().UTC(), Op: newOp()}
	key := m.placement(vid)
	res, err := m.write(ctx, Txn{
		If: append(also, mod(key, revision)),
		Then: append([]Op{put(key, encode(p))},
			m.audit(ctx, auditLine{What: "place", Volume: vid, From: from, To: node.ID, By: by, Op: p.Op})...),
		Else: []Op{get(key)},
	})
	switch {
	case err != nil:
		return Placement{}, false, err
	case res.Succeeded:
		p.Revision = res.Revision
		return p, true, nil
	case carries(res.kv(0), p.Op, decodePlacement, func(p Placement) string { return p.Op }):
		p.Revision = res.kv(0).ModRevision
		return p, true, nil
	}
	return Placement{}, false, nil
}

// serves is an error for a node that is to get nothing more.
func (n Node) serves() error {
	if n.State == "" {
		return nil
	}
	return &NodeStateError{n}
}

// Unplace takes a placement away. nil if there is none.
func (m *Map) Unplace(ctx context.Context, vid, by string) error {
	if !validID(vid) {
		return nil
	}
	return m.unplace(ctx, vid, by, has(m.placement(vid)))
}

func (m *Map) unplace(ctx context.Context, vid, by string, still Cmp) error {
	_, err := m.write(ctx, Txn{
		If: []Cmp{still},
		Then: append([]Op{del(m.placement(vid))},
			m.audit(ctx, auditLine{What: "place nowhere", Volume: vid, By: by, Op: newOp()})...),
	})
	return err
}

// Vacate takes all placements on a node away, and returns them.
func (m *Map) Vacate(ctx context.Context, nid, by string) ([]Placement, error) {
	all, err := m.Placed(ctx, nid)
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if err := m.unplace(ctx, p.Volume, by, mod(m.placement(p.Volume), p.Revision)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Placed returns the placements on a node, or all with "", by volume.
func (m *Map) Placed(ctx context.Context, nid string) ([]Placement, error) {
	all, _, err := m.Placements(ctx)
	return slices.DeleteFunc(all, func(p Placement) bool { return nid != "" && p.Node != nid }), err
}

// Placements returns all placements, and the revision of etcd at which they were so.
func (m *Map) Placements(ctx context.Context) (all []Placement, revision int64, err error) {
	res, err := m.read(ctx, getPrefix(m.placement("")))
	if err != nil {
		return nil, 0, err
	}
	for _, kv := range res.Results[0].KVs {
		p, err := decodePlacement(kv)
		if err != nil {
			m.broken(err)
		} else {
			all = append(all, p)
		}
	}
	return all, res.Revision, nil
}

// PlacementChanges are what has happened to placements since the last ones.
type PlacementChanges struct {
	// Begins says that what happened before is not known. Whoever lists the placements now
	// misses nothing.
	Begins bool
	// Changed are in order; without a Node the volume is placed nowhere. Revision is that
	// of the change.
	Changed []Placement
}

// FollowPlacements tells what happens to placements until ctx ends. The channel is never
// closed.
func (m *Map) FollowPlacements(ctx context.Context) <-chan PlacementChanges {
	changes := make(chan PlacementChanges)
	go m.followEach(ctx, m.placement(""), true, func(begins bool, events []KeyEvent) {
		c := PlacementChanges{Begins: begins}
		for _, ev := range events {
			p, err := Placement{}, error(nil)
			if !ev.Deleted {
				p, err = decodePlacement(ev.KV)
			}
			if err != nil {
				m.broken(err)
			}
			if err != nil || ev.Deleted {
				p = Placement{Volume: last(ev.KV.Key), Revision: ev.KV.ModRevision}
			}
			c.Changed = append(c.Changed, p)
		}
		select {
		case changes <- c:
		case <-ctx.Done():
		}
	})
	return changes
}

// WatchOwner wakes up when the owner of a volume changes, in the manner of WatchVolume.
func (m *Map) WatchOwner(ctx context.Context, vid string) <-chan struct{} {
	wake := make(chan struct{}, 1)
	go m.follow(ctx, m.own(vid), false, wake)
	return wake
}

// Present says that this node has a volume mounted at a path, under its token. It is so
// until Absent, or until the token or the registration is over. ErrLost if the token is
// not current.
func (m *Map) Present(ctx context.Context, vid string, token int64, path string) error {
	if token <= 0 || !validID(vid) {
		return lostToken(vid)
	}
	lease, err := m.valid()
	if err != nil {
		return err
	}
	p := Presence{Volume: vid, Node: m.me.ID, Token: token, Path: path, Since: time.Now().UTC(), Op: newOp()}
	res, err := m.write(ctx, Txn{
		If:   []Cmp{mod(m.own(vid), token), onLease(m.live(m.me.ID), lease)},
		Then: []Op{putOn(lease, m.presence(vid), encode(p))},
		Else: []Op{get(m.own(vid))},
	})
	switch {
	case err != nil:
		return err
	case res.Succeeded:
		return nil
	case revisionOf(res.kv(0)) != token:
		return lostToken(vid)
	}
	return m.lost()
}

// Absent takes back what Present said.
func (m *Map) Absent(ctx context.Context, vid string) error {
	lease, err := m.valid()
	if err != nil || !validID(vid) {
		return err // what is on a lease of before goes with it
	}
	_, err = m.write(ctx, Txn{
		If:   []Cmp{onLease(m.presence(vid), lease)},
		Then: []Op{del(m.presence(vid))},
	})
	return err
}

// Lease keeps a volume on a node, given by its host's name or its id, for ttl; nil is
// until Unlease. created says that it is a new one, and not one of that node that was
// renewed. *LeasedError if another node has it.
func (m *Map) Lease(ctx context.Context, vid, node string, ttl *time.Duration, by string) (l Lease, created bool, err error) {
	if !validID(vid) {
		return Lease{}, false, noSuch(vid)
	}
	n, _, err := m.find(ctx, node)
	if err != nil {
		return Lease{}, false, err
	}
	l = Lease{Volume: vid, Node: n.ID, By: by, Op: newOp()}
	var on int64
	if ttl != nil {
		if *ttl <= 0 {
			return Lease{}, false, fmt.Errorf("a lease of %s is none", *ttl)
		}
		granted := *ttl
		if on, granted, err = m.grant(ctx, granted); err != nil {
			return Lease{}, false, unavailable(err)
		}
		ends := time.Now().Add(granted).UTC()
		l.Expires = &ends
		defer func() {
			if err != nil && !errors.Is(err, ErrUnavailable) { // else the key may be on it
				m.revoke(ctx, on)
			}
		}()
	}
	key := m.leaseOf(vid)
	for try := 1; ; try++ {
		res, err := m.read(ctx, get(m.vol(vid)), get(key))
		if err != nil {
			return Lease{}, false, err
		}
		if _, err := usable(vid, res.kv(0)); errors.Is(err, ErrNotFound) {
			return Lease{}, false, err
		}
		was := res.kv(1)
		if was != nil {
			has, err := decodeLease(*was)
			switch {
			case err != nil:
				return Lease{}, false, err
			case has.Op == l.Op: // an earlier send
				return has, created, nil
			case has.Node != l.Node:
				return Lease{}, false, &LeasedError{has}
			}
		}
		created = was == nil
		what := "renew lease"
		if created {
			what = "lease"
		}
		res, err = m.write(ctx, Txn{
			If: []Cmp{mod(key, revisionOf(was)), mod(m.vol(vid), revisionOf(res.kv(0)))},
			Then: append([]Op{putOn(on, key, encode(l))},
				m.audit(ctx, auditLine{What: what, Volume: vid, To: l.Node, Detail: l.Until(), By: by, Op: l.Op})...),
			Else: []Op{get(key)},
		})
		if err != nil {
			return Lease{}, false, err
		}
		done := res.Succeeded
		if l.Revision = res.Revision; !done && carries(res.kv(0), l.Op, decodeLease, func(l Lease) string { return l.Op }) {
			done, l.Revision = true, res.kv(0).ModRevision
		}
		switch {
		case done:
			if was != nil && was.Lease != 0 {
				m.revoke(ctx, was.Lease) // the key is on it no more
			}
			return l, created, nil
		case try == tries:
			return Lease{}, false, changed(vid)
		}
	}
}

// Unlease gives a lease back, and returns it. ErrNoLease if there is none.
func (m *Map) Unlease(ctx context.Context, vid, by string) (Lease, error) {
	if !validID(vid) {
		return Lease{}, noSuch(vid)
	}
	key := m.leaseOf(vid)
	for try := 1; ; try++ {
		was, err := m.Leased(ctx, vid)
		if err != nil {
			return Lease{}, err
		}
		if was == nil {
			return Lease{}, fmt.Errorf("volume %s: %w", vid, ErrNoLease)
		}
		res, err := m.write(ctx, Txn{
			If: []Cmp{mod(key, was.Revision)},
			Then: append([]Op{del(key)},
				m.audit(ctx, auditLine{What: "give lease back", Volume: vid, From: was.Node, By: by, Op: newOp()})...),
			Else: []Op{get(key)},
		})
		switch {
		case err != nil:
			return Lease{}, err
		case res.Succeeded, res.kv(0) == nil: // by an earlier send, or it has just ended
			return *was, nil
		case try == tries:
			return Lease{}, changed(vid)
		}
	}
}

// Leased returns the lease of a volume, or nil.
func (m *Map) Leased(ctx context.Context, vid string) (*Lease, error) {
	if !validID(vid) {
		return nil, nil
	}
	res, err := m.read(ctx, get(m.leaseOf(vid)))
	if err != nil || res.kv(0) == nil {
		return nil, err
	}
	l, err := decodeLease(*res.kv(0))
	if err != nil {
		return nil, err
	}
	return &l, nil
}

// The states of a node that is to get nothing more.
const (
	Cordoned = "cordoned"
	Removed  = "removed"
)

// SetNodeState cordons a node, given by its host's name or its id, or puts it back into
// service with "". *NoHostError, *AmbiguousError, or *NodeStateError if it was removed.
func (m *Map) SetNodeState(ctx context.Context, host, state, by string) (Node, error) {
	if state != "" && state != Cordoned {
		return Node{}, fmt.Errorf("%q is no state for a host", state)
	}
	what := cmp.Or(state, "uncordoned")
	return m.setState(ctx, host, state, auditLine{What: what, By: by}, func(n Node) error {
		if n.State != "" && n.State != Cordoned {
			return n.serves()
		}
		return nil
	})
}

// RemoveNode marks a node, given by its host's name or its id, as one that does not come
// back, and takes the placements on it away. Refused while it is live or owns volumes.
func (m *Map) RemoveNode(ctx context.Context, host, by string) (Node, error) {
	n, err := m.setState(ctx, host, Removed, auditLine{What: Removed, By: by}, func(n Node) error { return m.removable(ctx, n) },
		func(n Node) Cmp { return none(m.live(n.ID)) })
	if err == nil {
		_, err = m.Vacate(ctx, n.ID, by)
	}
	return n, err
}

func (m *Map) removable(ctx context.Context, n Node) error {
	res, err := m.read(ctx, get(m.live(n.ID)), getPrefix(m.own("")), getPrefix(m.vol("")))
	if err != nil {
		return err
	}
	if res.kv(0) != nil {
		return refused("host %s is live, so it was not removed: drain it, remove its plugin, and wait until it is no longer live", n.Host)
	}
	var owned []string
	names := map[string]string{}
	for _, v := range m.decodeVolumes(res.Results[2].KVs) {
		names[v.ID] = v.Name
	}
	for _, kv := range res.Results[1].KVs {
		o, err := decodeOwner(kv)
		if err != nil {
			return err // it may be this node's
		}
		if o.Node == n.ID || o.Pending != nil && o.Pending.Node == n.ID {
			owned = append(owned, cmp.Or(names[o.Volume], o.Volume))
		}
	}
	if len(owned) == 0 {
		return nil
	}
	slices.Sort(owned)
	return refused("host %s still owns volumes, so it was not removed: %s; mount them on another host first", n.Host, list(owned))
}

// list is some of the names, for people.
func list(names []string) string {
	const most = 10
	if more := len(names) - most; more > 0 {
		names = append(slices.Clone(names[:most]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

// setState changes a node's state, if that may be.
func (m *Map) setState(ctx context.Context, host, state string, line auditLine, may func(Node) error, also ...func(Node) Cmp) (Node, error) {
	for try := 1; ; try++ {
		n, revision, err := m.find(ctx, host)
		if err != nil || n.State == state {
			return n, err // perhaps by an earlier send
		}
		if err := may(n); err != nil {
			return Node{}, err
		}
		n.State = state
		txn := Txn{If: []Cmp{mod(m.node(n.ID), revision)}}
		for _, c := range also {
			txn.If = append(txn.If, c(n))
		}
		line.To, line.Op = n.ID, newOp()
		txn.Then = append([]Op{put(m.node(n.ID), encode(n))}, m.audit(ctx, line)...)
		res, err := m.write(ctx, txn)
		switch {
		case err != nil:
			return Node{}, err
		case res.Succeeded:
			return n, nil
		case try == tries:
			return Node{}, fmt.Errorf("host %s: %w", n.Host, ErrConflict)
		}
		// It has registered meanwhile; or an earlier send of this was first.
	}
}

func (m *Map) placement(vid string) string { return m.key("place", vid) }
func (m *Map) presence(vid string) string  { return m.key("at", vid) }
func (m *Map) leaseOf(vid string) string   { return m.key("lease", vid) }

// standing gets what View says beside who owns a volume.
func (m *Map) standing(vid string) []Op {
	return []Op{get(m.placement(vid)), get(m.presence(vid)), get(m.leaseOf(vid))}
}

// stand adds it to a View. What cannot be read is left out: nothing is decided by it.
func (m *Map) stand(view *View, placement, presence, lease *KV) {
	view.Placement = readable(m, placement, decodePlacement)
	view.Lease = readable(m, lease, decodeLease)
	if at := readable(m, presence, decodePresence); at != nil && view.Owner != nil && at.Token == view.Owner.Token {
		view.Presence = at
	}
}

func readable[T any](m *Map, kv *KV, decode func(KV) (T, error)) *T {
	if kv == nil {
		return nil
	}
	v, err := decode(*kv)
	if err != nil {
		m.broken(err)
		return nil
	}
	return &v
}

// byVolume returns what a get found, by the last part of the key.
func byVolume(res OpResult) map[string]*KV {
	all := make(map[string]*KV, len(res.KVs))
	for i := range res.KVs {
		all[last(res.KVs[i].Key)] = &res.KVs[i]
	}
	return all
}

func decodePlacement(kv KV) (Placement, error) {
	return decode(kv, func(p *Placement) error {
		if p.Volume != last(kv.Key) || !validID(p.Node) {
			return errors.New("volume or node is missing")
		}
		p.Revision = kv.ModRevision
		return nil
	})
}

func decodePresence(kv KV) (Presence, error) {
	return decode(kv, func(p *Presence) error {
		if p.Volume != last(kv.Key) || !validID(p.Node) {
			return errors.New("volume or node is missing")
		}
		return nil
	})
}

func decodeLease(kv KV) (Lease, error) {
	return decode(kv, func(l *Lease) error {
		if l.Volume != last(kv.Key) || !validID(l.Node) {
			return errors.New("volume or node is missing")
		}
		l.Revision = kv.ModRevision
		return nil
	})
}
