package ownership

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// A State is everything the map says at one revision. It is shared by all who ask: nobody
// may change anything in it.
type State struct {
	Revision int64
	// Views are those of all volumes, by name, also of those that are being created or
	// deleted. What is broken in etcd is left out.
	Views []View
	Nodes []NodeStatus // by host
	Gone  []Gone       // by name
	// Time is when etcd reported the last change in it.
	Time time.Time
}

func decodeGone(kv KV) (Gone, error) {
	return decode(kv, func(g *Gone) error {
		if g.Volume.ID != last(kv.Key) {
			return fmt.Errorf("id is %q", g.Volume.ID)
		}
		return nil
	})
}

// A mirror is what the keys of the map say, decoded.
type mirror struct {
	m        *Map
	revision int64
	at       time.Time

	volumes map[string]*observed // by id
	sorted  []*observed          // those that are shown, by name and id
	nodes   map[string]Node
	live    map[string]bool
	deaths  map[string]Death // by key
	gone    map[string]Gone
	owned   map[string]int // how many volumes each node owns

	// What was made of it last, and what of that is no longer true.
	views      []View
	newViews   bool
	others     State // Nodes and Gone
	newOthers  bool
	goneSorted []Gone
}

// observed is what there is of one volume.
type observed struct {
	id        string
	volume    *Volume
	owner     *Owner
	noOwner   bool // own/<vid> is broken: it is not known to be free
	requests  map[string]Request
	placement *Placement
	presence  *Presence
	lease     *Lease

	shown bool
	view  View
}

func (o *observed) ownedBy() string {
	if o.owner == nil {
		return ""
	}
	return o.owner.Node
}

func newMirror(m *Map) *mirror {
	return &mirror{
		m: m, volumes: map[string]*observed{}, nodes: map[string]Node{}, live: map[string]bool{},
		deaths: map[string]Death{}, gone: map[string]Gone{}, owned: map[string]int{}, newViews: true, newOthers: true,
	}
}

// mirrored are the prefixes of the keys that a mirror is made of.
func (m *Map) mirrored() []string {
	return []string{
		m.node(""), m.live(""), m.key("fence", ""), m.key("gone", ""), m.vol(""), m.own(""), m.key("req", ""),
		m.placement(""), m.presence(""), m.leaseOf(""),
	}
}

// kind takes a key apart.
func (m *Map) kind(key string) (kind, rest string) {
	kind, rest, _ = strings.Cut(strings.TrimPrefix(key, m.root), "/")
	return kind, rest
}

// put takes over one key. A value that is broken is logged, and is as if it were not there.
func (r *mirror) put(kv KV) {
	kind, id := r.m.kind(kv.Key)
	switch kind {
	case "node":
		if v := readable(r.m, &kv, decodeNode); v != nil {
			r.nodes[id] = *v
		} else {
			delete(r.nodes, id)
		}
		r.newOthers = true
	case "live":
		r.setLive(id, true)
	case "fence":
		if v := readable(r.m, &kv, decodeDeath); v != nil {
			r.deaths[kv.Key] = *v
		} else {
			delete(r.deaths, kv.Key)
		}
		r.newOthers = true
	case "gone":
		if v := readable(r.m, &kv, decodeGone); v != nil {
			r.gone[id] = *v
			r.newOthers, r.goneSorted = true, nil
		}
	case "vol":
		r.change(id, func(o *observed) { o.volume = readable(r.m, &kv, decodeVolume) })
	case "own":
		r.change(id, func(o *observed) {
			o.owner = readable(r.m, &kv, decodeOwner)
			o.noOwner = o.owner == nil
		})
	case "req":
		if v := readable(r.m, &kv, decodeRequest); v != nil {
			r.change(v.Volume, func(o *observed) {
				if o.requests == nil {
					o.requests = map[string]Request{}
				}
				o.requests[kv.Key] = *v
			})
		}
	case "place":
		r.change(id, func(o *observed) { o.placement = readable(r.m, &kv, decodePlacement) })
	case "at":
		r.change(id, func(o *observed) { o.presence = readable(r.m, &kv, decodePresence) })
	case "lease":
		r.change(id, func(o *observed) { o.lease = readable(r.m, &kv, decodeLease) })
	}
}

// remove takes over that a key is gone.
func (r *mirror) remove(key string) {
	kind, id := r.m.kind(key)
	switch kind {
	case "node":
		delete(r.nodes, id)
		r.newOthers = true
	case "live":
		r.setLive(id, false)
	case "fence":
		delete(r.deaths, key)
		r.newOthers = true
	case "gone":
		delete(r.gone, id)
		r.newOthers, r.goneSorted = true, nil
	case "vol":
		r.change(id, func(o *observed) { o.volume = nil })
	case "own":
		r.change(id, func(o *observed) { o.owner, o.noOwner = nil, false })
	case "req":
		if parts := strings.Split(id, "/"); len(parts) == 3 {
			r.change(parts[1], func(o *observed) { delete(o.requests, key) })
		}
	case "place":
		r.change(id, func(o *observed) { o.placement = nil })
	case "at":
		r.change(id, func(o *observed) { o.presence = nil })
	case "lease":
		r.change(id, func(o *observed) { o.lease = nil })
	}
}

func (r *mirror) setLive(node string, live bool) {
	if r.live[node] == live {
		return
	}
	r.live[node] = live
	if !live {
		delete(r.live, node)
	}
	r.newOthers = true
	for _, o := range r.sorted {
		if o.owner != nil && o.owner.Node == node {
			r.change(o.id, func(*observed) {})
		}
	}
}

// change does what has changed of one volume.
func (r *mirror) change(id string, with func(*observed)) {
	o := r.volumes[id]
	if o == nil {
		o = &observed{id: id}
		r.volumes[id] = o
	}
	former := o.ownedBy()
	with(o)
	if now := o.ownedBy(); now != former {
		r.owned[former]--
		r.owned[now]++
		r.newOthers = true
	}
	shown := o.volume != nil && !o.noOwner
	switch {
	case shown:
		o.view = r.viewOf(o)
		if !o.shown {
			i, _ := r.find(o)
			r.sorted = slices.Insert(r.sorted, i, o)
		}
	case o.shown:
		if i, found := r.find(o); found {
			r.sorted = slices.Delete(r.sorted, i, i+1)
		}
	}
	if o.shown || shown {
		r.newViews = true
	}
	if o.shown = shown; o.volume == nil && o.owner == nil && !o.noOwner && len(o.requests) == 0 && o.placement == nil && o.presence == nil && o.lease == nil {
		delete(r.volumes, id)
	}
}

// find returns the place of a volume among those that are shown. A volume keeps its name.
func (r *mirror) find(o *observed) (int, bool) {
	return slices.BinarySearchFunc(r.sorted, o, func(a, b *observed) int {
		return cmp.Or(cmp.Compare(a.view.Volume.Name, b.view.Volume.Name), cmp.Compare(a.id, b.id))
	})
}

func (r *mirror) viewOf(o *observed) View {
	view := View{Volume: *o.volume, Owner: o.owner, Placement: o.placement, Lease: o.lease}
	if o.owner == nil {
		return view
	}
	view.OwnerLive = r.live[o.owner.Node]
	for _, req := range o.requests {
		if req.Owner == o.owner.Node {
			view.Waiting = append(view.Waiting, req)
		}
	}
	slices.SortFunc(view.Waiting, func(a, b Request) int { return cmp.Compare(a.Revision, b.Revision) })
	if o.presence != nil && o.presence.Token == o.owner.Token && o.presence.Node == o.owner.Node {
		view.Presence = o.presence
	}
	return view
}

// state makes a State of it. What has not changed since the last one is the same memory.
func (r *mirror) state() *State {
	if r.newViews {
		r.views = make([]View, len(r.sorted))
		for i, o := range r.sorted {
			r.views[i] = o.view
		}
		r.newViews = false
	}
	if r.newOthers {
		r.others.Nodes = make([]NodeStatus, 0, len(r.nodes))
		for _, n := range r.nodes {
			s := NodeStatus{Node: n, Live: r.live[n.ID], Owned: r.owned[n.ID]}
			if d, ok := r.deaths[r.m.fence(n.ID, n.Boot)]; ok {
				s.Death = &d
			}
			r.others.Nodes = append(r.others.Nodes, s)
		}
		slices.SortFunc(r.others.Nodes, func(a, b NodeStatus) int {
			return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.ID, b.ID))
		})
		if r.goneSorted == nil {
			r.goneSorted = slices.SortedFunc(maps.Values(r.gone), func(a, b Gone) int {
				return cmp.Or(cmp.Compare(a.Volume.Name, b.Volume.Name), cmp.Compare(a.Volume.ID, b.Volume.ID))
			})
		}
		r.others.Gone, r.newOthers = r.goneSorted, false
	}
	return &State{Revision: r.revision, Views: r.views, Nodes: r.others.Nodes, Gone: r.others.Gone, Time: r.at}
}
