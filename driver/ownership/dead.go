package ownership

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// Death declares that a node, as of one boot, is dead: the value of
// fence/<nid>/<boot>. It says nothing about the same node after its next start.
type Death struct {
	Node string `json:"node"`
	Host string `json:"host"`
	Boot string `json:"boot"`
	// Method is how that is known, such as "operator"; Evidence what was seen, and By
	// who says so.
	Method   string    `json:"method,omitempty"`
	Evidence string    `json:"evidence,omitempty"`
	By       string    `json:"by,omitempty"`
	At       time.Time `json:"at"`
	// Forced says that the node may be live: it is to give up all it has.
	Forced bool `json:"forced,omitempty"`

	// Revision is the key's mod revision.
	Revision int64 `json:"-"`
}

func (d Death) String() string {
	s := fmt.Sprintf("host %s was declared dead at %s", d.Host, d.At.UTC().Format(time.RFC3339))
	if d.By != "" {
		s += " by " + d.By
	}
	if d.Evidence != "" {
		s += " (" + d.Evidence + ")"
	}
	return s
}

// LiveError says that a node cannot be declared dead, because it is live.
type LiveError struct {
	Host string
}

func (e *LiveError) Error() string {
	return fmt.Sprintf("host %s is live, so nothing was changed: switch it off, wait until it is no longer live, and try again; "+
		"or force it, which makes host %s give up all its volumes, under the containers that use them", e.Host, e.Host)
}

// NodeStatus is what the map says about one node.
type NodeStatus struct {
	Node
	// Live says that its liveness key is there.
	Live bool
	// Death is its declaration of death under its present boot, if there is one.
	Death *Death
	// Owned is how many volumes it owns.
	Owned int
}

// Nodes returns every node that has ever registered, by host.
func (m *Map) Nodes(ctx context.Context) ([]NodeStatus, error) {
	res, err := m.read(ctx, getPrefix(m.node("")), getPrefix(m.live("")), getPrefix(m.own("")), getPrefix(m.key("fence", "")))
	if err != nil {
		return nil, err
	}
	live := map[string]bool{}
	for _, kv := range res.Results[1].KVs {
		live[last(kv.Key)] = true
	}
	owned := map[string]int{}
	for _, kv := range res.Results[2].KVs {
		if o, err := decodeOwner(kv); err != nil {
			m.broken(err)
		} else {
			owned[o.Node]++
		}
	}
	deaths := map[string]*Death{}
	for _, kv := range res.Results[3].KVs {
		if d, err := decodeDeath(kv); err != nil {
			m.broken(err)
		} else {
			deaths[kv.Key] = &d
		}
	}
	var nodes []NodeStatus
	for _, n := range m.decodeNodes(res.Results[0].KVs) {
		nodes = append(nodes, NodeStatus{Node: n, Live: live[n.ID], Death: deaths[m.fence(n.ID, n.Boot)], Owned: owned[n.ID]})
	}
	slices.SortFunc(nodes, func(a, b NodeStatus) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.ID, b.ID))
	})
	return nodes, nil
}

func (m *Map) decodeNodes(kvs []KV) []Node {
	var nodes []Node
	for _, kv := range kvs {
		if n, err := decodeNode(kv); err != nil {
			m.broken(err)
		} else {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// Died returns the declaration that a node is dead as of that boot, or nil.
func (m *Map) Died(ctx context.Context, nid, boot string) (*Death, error) {
	if !validID(nid) || !validID(boot) {
		return nil, nil
	}
	res, err := m.read(ctx, get(m.fence(nid, boot)))
	if err != nil || res.kv(0) == nil {
		return nil, err
	}
	d, err := decodeDeath(*res.kv(0))
	if err != nil {
		return nil, err
	}
	return &d, nil
}

// DeclareDead records that a host is dead, under the boot id it registered with
// last: what it owns may then be taken over without a fence. Whoever calls it MUST
// know that the host does not write any more, and does not go on when it comes
// back. host is a host name, or a node id where that is not unambiguous. Of d,
// Method, Evidence, By, At and Forced are kept; a Boot is compared.
//
// *LiveError if the node is live, unless d.Forced: then it gives up what it has,
// but until it has seen that, two nodes may write a volume. Declared already, it
// stays as it is.
func (m *Map) DeclareDead(ctx context.Context, host string, d Death) (Death, error) {
	boot := d.Boot
	d.At = cmp.Or(d.At, time.Now()).UTC()
	for try := 1; ; try++ {
		node, revision, err := m.find(ctx, host)
		if err != nil {
			return Death{}, err
		}
		if boot != "" && boot != node.Boot || !validID(node.Boot) {
			return Death{}, fmt.Errorf("host %s has been restarted since: %w", node.Host, ErrConflict)
		}
		d.Node, d.Host, d.Boot = node.ID, node.Host, node.Boot
		key, live := m.fence(d.Node, d.Boot), m.live(d.Node)
		res, err := m.read(ctx, get(key), get(live))
		if err != nil {
			return Death{}, err
		}
		old := res.kv(0)
		if old != nil {
			is, err := decodeDeath(*old)
			if err != nil {
				return Death{}, err
			}
			if is.Forced || !d.Forced {
				return is, nil
			}
		}
		if res.kv(1) != nil && !d.Forced {
			return Death{}, &LiveError{Host: d.Host}
		}
		txn := Txn{
			If: []Cmp{mod(m.node(d.Node), revision), mod(key, revisionOf(old))},
			Then: append([]Op{put(key, encode(d))},
				m.audit(ctx, auditLine{What: "declared dead", To: d.Node, Detail: d.String(), By: d.By, Op: newOp()})...),
		}
		if !d.Forced {
			txn.If = append(txn.If, none(live))
		}
		if res, err = m.write(ctx, txn); err != nil {
			return Death{}, err
		}
		if res.Succeeded {
			d.Revision = res.Revision
			return d, nil
		}
		if try == tries {
			return Death{}, fmt.Errorf("declare host %s dead: %w", d.Host, ErrConflict)
		}
		// It has registered meanwhile, or is declared dead: by another, or by an earlier
		// send of this.
	}
}

// find returns the node with that id, or else the only one with that host name that was
// not removed, and its key's mod revision.
func (m *Map) find(ctx context.Context, host string) (Node, int64, error) {
	res, err := m.read(ctx, getPrefix(m.node("")))
	if err != nil {
		return Node{}, 0, err
	}
	revisions := map[string]int64{}
	for _, kv := range res.Results[0].KVs {
		revisions[last(kv.Key)] = kv.ModRevision
	}
	var found, removed []Node
	var ids, hosts []string
	for _, n := range m.decodeNodes(res.Results[0].KVs) {
		if n.ID == host {
			return n, revisions[n.ID], nil
		}
		if n.State == Removed {
			if n.Host == host {
				removed = append(removed, n)
			}
			continue
		}
		if n.Host == host {
			found, ids = append(found, n), append(ids, n.ID)
		}
		hosts = append(hosts, n.Host)
	}
	if len(found) == 0 {
		found = removed
	}
	switch len(found) {
	case 0:
		slices.Sort(hosts)
		return Node{}, 0, &NoHostError{host, slices.Compact(hosts)}
	case 1:
		return found[0], revisions[found[0].ID], nil
	}
	for _, n := range found[len(ids):] {
		ids = append(ids, n.ID)
	}
	return Node{}, 0, &AmbiguousError{host, ids}
}

// acquit has this node give up what it has, since it was declared dead, and then
// ends the declaration.
func (m *Map) acquit(ctx context.Context, declared KV) error {
	death, err := decodeDeath(declared)
	if err != nil {
		return err
	}
	if m.cfg.Condemned == nil {
		return fmt.Errorf("%s; it does not register again", death)
	}
	m.log.Warnf("%s: it gives up all its volumes", death)
	if err := m.cfg.Condemned(ctx, death); err != nil {
		return fmt.Errorf("%s, and has not yet given up its volumes: %w", death, err)
	}
	res, err := m.write(ctx, Txn{
		If:   []Cmp{mod(declared.Key, declared.ModRevision)},
		Then: append([]Op{del(declared.Key)}, m.audit(ctx, auditLine{What: "back", To: m.me.ID, Detail: death.String(), Op: newOp()})...),
		Else: []Op{get(declared.Key)},
	})
	if err == nil && !res.Succeeded && res.kv(0) != nil {
		err = unavailable(errDeclared) // once more
	}
	return err
}
