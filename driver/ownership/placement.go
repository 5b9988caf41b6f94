package ownership

import (
	"errors"
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

func (m *Map) placement(vid string) string { return m.key("place", vid) }
func (m *Map) presence(vid string) string    { return m.key("at", vid) }
func (m *Map) leaseOf(vid string) string { return m.key("lease", vid) }

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
