package ownership

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// schema is the version of the keys and values. A node refuses to work with a
// cluster that has a higher one.
const schema = 1

// meta is the value of the key meta.
type meta struct {
	Cluster string `json:"cluster"`
	// Gen is raised by an operator who restores etcd from a backup, so that
	// (gen, token) never goes back.
	Gen    int64 `json:"gen"`
	Schema int   `json:"schema"`
	// By is who accepted this generation, and At when.
	By string     `json:"by,omitempty"`
	At *time.Time `json:"at,omitempty"`

	revision int64
}

// alive is the value of live/<nid>.
type alive struct {
	Node
	Op string `json:"op"`
}

// nameValue is the value of name/<name>.
type nameValue struct {
	Volume string `json:"volume"`
	Op     string `json:"op"`
}

// auditLine is the value of ev/<hour>/<nid>/<n>.
type auditLine struct {
	At     time.Time `json:"at"`
	What   string    `json:"what"`
	Volume string    `json:"volume,omitempty"`
	Name   string    `json:"name,omitempty"` // of a volume that is no longer there
	Node   string    `json:"node"`
	Host   string    `json:"host"`
	From   string    `json:"from,omitempty"`
	To     string    `json:"to,omitempty"`
	Token  int64     `json:"token,omitempty"`
	Detail string    `json:"detail,omitempty"`
	By     string    `json:"by,omitempty"` // who wanted it
	Op     string    `json:"op"`
}

// encode cannot fail: the types above hold nothing that JSON does not.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return b
}

// decode reads a value, and has check look at what matters in it. Fields that
// are not known are skipped: a newer node may have written them.
func decode[T any](kv KV, check func(*T) error) (T, error) {
	var v T
	err := json.Unmarshal(kv.Value, &v)
	if err == nil {
		err = check(&v)
	}
	if err != nil {
		var zero T
		return zero, &BrokenError{Key: kv.Key, Err: err}
	}
	return v, nil
}

// last is the part of a key after its last slash.
func last(key string) string { return key[strings.LastIndexByte(key, '/')+1:] }

func decodeVolume(kv KV) (Volume, error) {
	return decode(kv, func(v *Volume) error {
		switch {
		case v.ID != last(kv.Key):
			return fmt.Errorf("id is %q", v.ID)
		case v.Name == "":
			return errors.New("name is missing")
		case v.Size < 0:
			return fmt.Errorf("size is %d", v.Size)
		}
		switch v.Phase {
		case PhaseCreating, PhaseReady, PhaseDeleting, PhaseQuarantined:
		default:
			return fmt.Errorf("phase is %q", v.Phase)
		}
		v.Revision = kv.ModRevision
		return nil
	})
}

func decodeOwner(kv KV) (Owner, error) {
	return decode(kv, func(o *Owner) error {
		switch {
		case o.Volume != last(kv.Key):
			return fmt.Errorf("volume is %q", o.Volume)
		case o.Node == "":
			return errors.New("node is missing")
		case o.Pending != nil && (o.Pending.Node == "" || o.Pending.Token <= 0):
			return errors.New("whom its takeover is from is missing")
		}
		o.Token = kv.ModRevision
		return nil
	})
}

func decodeName(kv KV) (nameValue, error) {
	return decode(kv, func(n *nameValue) error {
		if !validID(n.Volume) {
			return fmt.Errorf("volume is %q", n.Volume)
		}
		return nil
	})
}

// decodeRequest takes who asks whom for what from the key, which has the last
// word.
func decodeRequest(kv KV) (Request, error) {
	return decode(kv, func(r *Request) error {
		parts := strings.Split(kv.Key, "/")
		if len(parts) < 3 {
			return errors.New("key is too short")
		}
		parts = parts[len(parts)-3:]
		if r.Owner != parts[0] || r.Volume != parts[1] || r.Node != parts[2] {
			return errors.New("owner, volume and node are not those of the key")
		}
		r.Revision, r.Lease = kv.CreateRevision, kv.Lease
		return nil
	})
}

func decodeReply(kv KV) (Reply, error) {
	return decode(kv, func(r *Reply) error {
		if r.Volume != last(kv.Key) {
			return fmt.Errorf("volume is %q", r.Volume)
		}
		return nil
	})
}

func decodeNode(kv KV) (Node, error) {
	return decode(kv, func(n *Node) error {
		if n.ID != last(kv.Key) {
			return fmt.Errorf("id is %q", n.ID)
		}
		return nil
	})
}

func decodeAlive(kv KV) (alive, error) {
	return decode(kv, func(a *alive) error {
		if a.ID != last(kv.Key) {
			return fmt.Errorf("id is %q", a.ID)
		}
		return nil
	})
}

func decodeDeath(kv KV) (Death, error) {
	return decode(kv, func(d *Death) error {
		nid := last(strings.TrimSuffix(kv.Key, "/"+last(kv.Key)))
		if d.Boot != last(kv.Key) || d.Node != nid {
			return errors.New("node and boot are not those of the key")
		}
		d.Revision = kv.ModRevision
		return nil
	})
}

func decodeMeta(kv KV) (meta, error) {
	return decode(kv, func(m *meta) error {
		switch {
		case m.Cluster == "":
			return errors.New("cluster is missing")
		case m.Schema > schema:
			return fmt.Errorf("schema %d is newer than this version of Flocker understands (%d): update Flocker on this host", m.Schema, schema)
		}
		m.revision = kv.ModRevision
		return nil
	})
}

// validID says whether s can be a part of a key.
func validID(s string) bool { return s != "" && len(s) <= 128 && !strings.ContainsAny(s, "/\x00") }
