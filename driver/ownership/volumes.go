package ownership

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

func noSuch(name string) error { return fmt.Errorf("%w: %s", ErrNotFound, name) }

func lostToken(vid string) error { return fmt.Errorf("volume %s: %w", vid, ErrLost) }

func changed(vid string) error { return fmt.Errorf("volume %s: %w", vid, ErrConflict) }

func volumeOp(v Volume) string { return v.Op }

func ownerOp(o Owner) string { return o.Op }

// Lookup returns the volume with that name. ErrNotFound if there is none.
func (m *Map) Lookup(ctx context.Context, name string) (View, error) {
	for try := 1; ; try++ {
		res, err := m.read(ctx, get(m.name(name)))
		if err != nil {
			return View{}, err
		}
		kv := res.kv(0)
		if kv == nil || name == "" {
			return View{}, noSuch(name)
		}
		entry, err := decodeName(*kv)
		if err != nil {
			return View{}, err
		}
		view, err := m.View(ctx, entry.Volume)
		switch {
		case err == nil && view.Volume.Phase != PhaseDeleting:
			return view, nil
		case err != nil && !errors.Is(err, ErrNotFound):
			return View{}, err
		case try == tries:
			return View{}, noSuch(name)
		}
		// Deleted between the two reads; there may be a new one of the same name.
	}
}

// LookupKnown is Lookup for a caller who believes that the volume's ID is vid: it
// takes one round trip less where that is right.
func (m *Map) LookupKnown(ctx context.Context, name, vid string) (View, error) {
	if !validID(vid) || name == "" {
		return m.Lookup(ctx, name)
	}
	res, err := m.read(ctx, append(m.viewed(vid), get(m.name(name)))...)
	if err != nil {
		return View{}, err
	}
	if res.kv(0) == nil || !carries(res.kv(5), vid, decodeName, func(n nameValue) string { return n.Volume }) {
		return m.Lookup(ctx, name)
	}
	view, err := m.complete(ctx, res)
	if errors.Is(err, ErrCompacted) || err == nil && view.Volume.Phase == PhaseDeleting {
		return m.Lookup(ctx, name)
	}
	return view, err
}

// View returns the volume with that ID, whatever its phase. ErrNotFound if there
// is none.
func (m *Map) View(ctx context.Context, vid string) (View, error) {
	for try := 1; ; try++ {
		view, err := m.view(ctx, vid)
		if err == nil || !errors.Is(err, ErrCompacted) || try == tries {
			return view, err
		}
	}
}

func (m *Map) view(ctx context.Context, vid string) (View, error) {
	if !validID(vid) {
		return View{}, noSuch(vid)
	}
	res, err := m.read(ctx, m.viewed(vid)...)
	if err != nil {
		return View{}, err
	}
	if res.kv(0) == nil {
		return View{}, noSuch(vid)
	}
	return m.complete(ctx, res)
}

// viewed gets what complete needs.
func (m *Map) viewed(vid string) []Op {
	return append([]Op{get(m.vol(vid)), get(m.own(vid))}, m.standing(vid)...)
}

// complete makes a View of what was read of a volume, as of that revision.
func (m *Map) complete(ctx context.Context, read TxnResult) (view View, err error) {
	if view.Volume, err = decodeVolume(*read.kv(0)); err != nil {
		return view, err
	}
	defer func() {
		if err == nil {
			m.stand(&view, read.kv(2), read.kv(3), read.kv(4))
		}
	}()
	own := read.kv(1)
	if own == nil {
		return view, nil
	}
	owner, err := decodeOwner(*own)
	if err != nil {
		return View{}, err
	}
	view.Owner = &owner
	live, waiting := get(m.live(owner.Node)), getPrefix(m.req(owner.Node, owner.Volume, ""))
	live.Revision, waiting.Revision = read.Revision, read.Revision
	res, err := m.read(ctx, live, waiting)
	if err != nil {
		return View{}, err
	}
	view.OwnerLive = res.kv(0) != nil
	view.Waiting = m.requests(res.Results[1].KVs)
	return view, nil
}

// List returns every volume that is not being deleted, sorted by name, all at
// one revision. A broken value is logged and its volume left out.
func (m *Map) List(ctx context.Context) ([]View, error) {
	res, err := m.read(ctx, getPrefix(m.vol("")), getPrefix(m.own("")), getPrefix(m.live("")), getPrefix(m.key("req", "")),
		getPrefix(m.placement("")), getPrefix(m.presence("")), getPrefix(m.leaseOf("")))
	if err != nil {
		return nil, err
	}
	placements, presences, leases := byVolume(res.Results[4]), byVolume(res.Results[5]), byVolume(res.Results[6])
	live := make(map[string]bool, len(res.Results[2].KVs))
	for _, kv := range res.Results[2].KVs {
		live[last(kv.Key)] = true
	}
	broken := map[string]bool{}
	owners := make(map[string]*Owner, len(res.Results[1].KVs))
	for _, kv := range res.Results[1].KVs {
		owner, err := decodeOwner(kv)
		if err != nil {
			m.broken(err)
			broken[last(kv.Key)] = true // not known to be free
			continue
		}
		owners[owner.Volume] = &owner
	}
	waiting := map[string][]Request{}
	for _, r := range m.requests(res.Results[3].KVs) {
		if o := owners[r.Volume]; o != nil && o.Node == r.Owner {
			waiting[r.Volume] = append(waiting[r.Volume], r)
		}
	}
	views := make([]View, 0, len(res.Results[0].KVs))
	for _, v := range m.decodeVolumes(res.Results[0].KVs) {
		if v.Phase == PhaseDeleting || broken[v.ID] {
			continue
		}
		view := View{Volume: v, Owner: owners[v.ID], Waiting: waiting[v.ID]}
		view.OwnerLive = view.Owner != nil && live[view.Owner.Node]
		m.stand(&view, placements[v.ID], presences[v.ID], leases[v.ID])
		views = append(views, view)
	}
	slices.SortFunc(views, func(a, b View) int { return cmp.Compare(a.Volume.Name, b.Volume.Name) })
	return views, nil
}

// decodeVolumes decodes what has changed since the last List, and leaves out what
// is broken.
func (m *Map) decodeVolumes(kvs []KV) []Volume {
	var known map[string]Volume
	if p := m.volumes.Load(); p != nil {
		known = *p
	}
	next := make(map[string]Volume, len(kvs))
	volumes := make([]Volume, 0, len(kvs))
	for _, kv := range kvs {
		v, ok := known[kv.Key]
		if !ok || v.Revision != kv.ModRevision {
			var err error
			if v, err = decodeVolume(kv); err != nil {
				m.broken(err)
				continue
			}
		}
		next[kv.Key] = v
		// The caller may change what it gets.
		v.Options, v.Labels = maps.Clone(v.Options), maps.Clone(v.Labels)
		volumes = append(volumes, v)
	}
	m.volumes.Store(&next)
	return volumes
}

// Owned returns what this node owns, also what earlier processes of it left and
// what was handed over to it meanwhile.
func (m *Map) Owned(ctx context.Context) ([]Owner, error) {
	res, err := m.read(ctx, getPrefix(m.own("")))
	if err != nil {
		return nil, err
	}
	var owned []Owner
	for _, kv := range res.Results[0].KVs {
		owner, err := decodeOwner(kv)
		switch {
		case err != nil:
			m.broken(err)
		case owner.Node == m.me.ID:
			owned = append(owned, owner)
		}
	}
	return owned, nil
}

// Deleting returns the tombstones: volumes whose storage is still to be deleted.
func (m *Map) Deleting(ctx context.Context) ([]Volume, error) {
	res, err := m.read(ctx, getPrefix(m.vol("")))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(m.decodeVolumes(res.Results[0].KVs), func(v Volume) bool {
		return v.Phase != PhaseDeleting
	}), nil
}

func (m *Map) broken(err error) { m.log.WithError(err).Warn("etcd value skipped") }

// requests decodes requests, oldest first.
func (m *Map) requests(kvs []KV) []Request {
	var rs []Request
	for _, kv := range kvs {
		r, err := decodeRequest(kv)
		if err != nil {
			m.broken(err)
			continue
		}
		rs = append(rs, r)
	}
	slices.SortFunc(rs, func(a, b Request) int { return cmp.Compare(a.Revision, b.Revision) })
	return rs
}

// Create makes v, with phase creating and not formatted, unless its name is
// taken: then the volume of that name is returned, and created is false. It
// needs v.ID and v.Name. *TakenError if the id is, or was, of another name.
//
// What was created is to be made by the backend, with v.ID as its idempotency
// key, and then reported by Ready. Any node that finds a volume in phase
// creating may do both.
func (m *Map) Create(ctx context.Context, v Volume) (stored Volume, created bool, err error) {
	if !validID(v.ID) || v.Name == "" || strings.ContainsAny(v.Name, "/\x00") {
		return Volume{}, false, fmt.Errorf("create volume: id %q or name %q cannot be used", v.ID, v.Name)
	}
	v.Phase, v.Formatted, v.Op, v.Ref, v.Reason = PhaseCreating, false, newOp(), "", ""
	if v.Created.IsZero() {
		v.Created = time.Now()
	}
	v.Created = v.Created.UTC().Round(0)
	for try := 1; ; try++ {
		res, err := m.write(ctx, Txn{
			If: []Cmp{none(m.name(v.Name)), none(m.vol(v.ID)), none(m.key("gone", v.ID))},
			Then: append([]Op{
				put(m.name(v.Name), encode(nameValue{Volume: v.ID, Op: v.Op})),
				put(m.vol(v.ID), encode(v)),
			}, m.audit(ctx, auditLine{What: "create", Volume: v.ID, Op: v.Op})...),
			Else: []Op{get(m.name(v.Name)), get(m.vol(v.ID))},
		})
		if err != nil {
			return Volume{}, false, err
		}
		if res.Succeeded {
			v.Revision = res.Revision
			return v, true, nil
		}
		if kv := res.kv(1); carries(kv, v.Op, decodeVolume, volumeOp) {
			stored, err := decodeVolume(*kv)
			return stored, true, err
		}
		if res.kv(0) == nil {
			return Volume{}, false, &TakenError{Name: v.Name, ID: v.ID}
		}
		view, err := m.Lookup(ctx, v.Name)
		if err == nil || !errors.Is(err, ErrNotFound) || try == tries {
			return view.Volume, false, err
		}
		// Deleted since; the name is free again.
	}
}

// Ready records that the backend has made v: its Ref and Size are v's. If
// somebody else has recorded the same, that is fine too. ErrConflict if v has
// changed otherwise, ErrNotFound if it is gone.
func (m *Map) Ready(ctx context.Context, v Volume) (Volume, error) {
	v.Phase = PhaseReady
	return m.putVolume(ctx, v, "ready", func(now Volume) bool {
		return now.Phase == PhaseReady && now.Ref == v.Ref
	})
}

// Update stores v if it has not changed since it was read, at v.Revision:
// ErrConflict if it has, ErrNotFound if it is gone. It MUST NOT change ID, Name
// or Formatted.
func (m *Map) Update(ctx context.Context, v Volume) (Volume, error) {
	if v.Phase == PhaseDeleting {
		return Volume{}, &PhaseError{Volume: v}
	}
	return m.putVolume(ctx, v, "update", func(Volume) bool { return false })
}

// putVolume is a CAS on v.Revision; what is its audit line, and same says that what is there is as good.
func (m *Map) putVolume(ctx context.Context, v Volume, what string, same func(Volume) bool) (Volume, error) {
	if !validID(v.ID) {
		return Volume{}, noSuch(v.ID)
	}
	if v.Revision <= 0 {
		return Volume{}, changed(v.ID) // 0 would compare equal to a volume that is gone
	}
	v.Op = newOp()
	res, err := m.write(ctx, Txn{
		If:   []Cmp{mod(m.vol(v.ID), v.Revision)},
		Then: append([]Op{put(m.vol(v.ID), encode(v))}, m.audit(ctx, auditLine{What: what, Volume: v.ID, Op: v.Op})...),
		Else: []Op{get(m.vol(v.ID))},
	})
	if err != nil {
		return Volume{}, err
	}
	if res.Succeeded {
		v.Revision = res.Revision
		return v, nil
	}
	if res.kv(0) == nil {
		return Volume{}, noSuch(v.Name)
	}
	now, err := decodeVolume(*res.kv(0))
	switch {
	case err != nil:
		return Volume{}, err
	case now.Op == v.Op, same(now):
		return now, nil
	case now.Phase == PhaseDeleting:
		return Volume{}, &PhaseError{Volume: now}
	}
	return Volume{}, changed(v.ID)
}

// Formatted records that the volume carries its filesystem, under this node's
// token: ErrLost if that is no longer current.
func (m *Map) Formatted(ctx context.Context, vid string, token int64, v Volume) (Volume, error) {
	if token <= 0 {
		return Volume{}, lostToken(vid)
	}
	if v.ID != vid || v.Revision <= 0 {
		return Volume{}, changed(vid)
	}
	for try := 1; ; try++ {
		v.Formatted, v.Op = true, newOp()
		res, err := m.write(ctx, Txn{
			If: []Cmp{mod(m.own(vid), token), mod(m.vol(vid), v.Revision)},
			Then: append([]Op{put(m.vol(vid), encode(v))},
				m.audit(ctx, auditLine{What: "formatted", Volume: vid, Token: token, Op: v.Op})...),
			Else: []Op{get(m.own(vid)), get(m.vol(vid))},
		})
		if err != nil {
			return Volume{}, err
		}
		if res.Succeeded {
			v.Revision = res.Revision
			return v, nil
		}
		if carries(res.kv(1), v.Op, decodeVolume, volumeOp) {
			return decodeVolume(*res.kv(1))
		}
		if revisionOf(res.kv(0)) != token {
			return Volume{}, lostToken(vid)
		}
		if res.kv(1) == nil {
			return Volume{}, noSuch(v.Name)
		}
		now, err := decodeVolume(*res.kv(1))
		switch {
		case err != nil:
			return Volume{}, err
		case now.Formatted: // by this node: the token was its own all the time
			return now, nil
		case try == tries:
			return Volume{}, changed(vid)
		}
		v = now // such as new labels; the filesystem is there all the same
	}
}

// Quarantine puts v aside, for a reason that users are told: nobody can claim it
// until Reinstate. This node must own it under token: ErrLost if that is no longer
// current. It still owns it then. What others have changed of v since v.Revision
// is kept.
func (m *Map) Quarantine(ctx context.Context, v Volume, token int64, reason string) (Volume, error) {
	if token <= 0 || !validID(v.ID) {
		return Volume{}, lostToken(v.ID)
	}
	if v.Revision <= 0 {
		return Volume{}, changed(v.ID)
	}
	for try := 1; ; try++ {
		v.Phase, v.Reason, v.Op = PhaseQuarantined, reason, newOp()
		res, err := m.write(ctx, Txn{
			If: []Cmp{mod(m.vol(v.ID), v.Revision), mod(m.own(v.ID), token)},
			Then: append([]Op{put(m.vol(v.ID), encode(v))},
				m.audit(ctx, auditLine{What: "quarantine", Volume: v.ID, Token: token, Detail: reason, Op: v.Op})...),
			Else: []Op{get(m.own(v.ID)), get(m.vol(v.ID))},
		})
		if err != nil {
			return Volume{}, err
		}
		if res.Succeeded {
			v.Revision = res.Revision
			return v, nil
		}
		if carries(res.kv(1), v.Op, decodeVolume, volumeOp) {
			return decodeVolume(*res.kv(1))
		}
		if revisionOf(res.kv(0)) != token {
			return Volume{}, lostToken(v.ID)
		}
		if res.kv(1) == nil {
			return Volume{}, noSuch(v.Name)
		}
		now, err := decodeVolume(*res.kv(1))
		switch {
		case err != nil:
			return Volume{}, err
		case now.Phase == PhaseQuarantined: // the first reason is the cause of the others
			return now, nil
		case try == tries:
			return Volume{}, changed(v.ID)
		}
		v = now
	}
}

// Reinstate makes a quarantined volume ready again. by is who wants it.
func (m *Map) Reinstate(ctx context.Context, vid, by string) (Volume, error) {
	if !validID(vid) {
		return Volume{}, noSuch(vid)
	}
	res, err := m.read(ctx, get(m.vol(vid)))
	if err != nil {
		return Volume{}, err
	}
	op := newOp()
	for try := 1; ; try++ {
		kv := res.kv(0)
		if kv == nil {
			return Volume{}, noSuch(vid)
		}
		v, err := decodeVolume(*kv)
		switch {
		case err != nil:
			return Volume{}, err
		case v.Op == op: // an earlier send
			return v, nil
		case v.Phase != PhaseQuarantined:
			return Volume{}, refused("volume %s is not quarantined (it is %s), so nothing was changed", v.Name, v.Phase)
		case try > tries:
			return Volume{}, changed(vid)
		}
		reason := v.Reason
		v.Phase, v.Reason, v.Op = PhaseReady, "", op
		res, err = m.write(ctx, Txn{
			If: []Cmp{mod(m.vol(vid), v.Revision)},
			Then: append([]Op{put(m.vol(vid), encode(v))},
				m.audit(ctx, auditLine{What: "reinstate", Volume: vid, Detail: "was quarantined: " + reason, By: by, Op: op})...),
			Else: []Op{get(m.vol(vid))},
		})
		if err != nil {
			return Volume{}, err
		}
		if res.Succeeded {
			v.Revision = res.Revision
			return v, nil
		}
	}
}

// Delete takes v's name away and leaves a tombstone, to be ended by Purge when
// the backend has deleted the storage. With token 0 nobody may own the volume;
// otherwise this node must, with that token, and no longer does afterwards: it
// MUST have closed and detached it. *HeldError if it is owned, ErrLost if the
// token is not current, ErrConflict if v has changed since v.Revision. A volume
// that is being deleted already is returned as it is.
func (m *Map) Delete(ctx context.Context, v Volume, token int64) (Volume, error) {
	if !validID(v.ID) {
		return Volume{}, noSuch(v.Name)
	}
	reads := []Op{get(m.own(v.ID)), get(m.vol(v.ID)), get(m.name(v.Name)), get(m.placement(v.ID))}
	res, err := m.read(ctx, reads...)
	if err != nil {
		return Volume{}, err
	}
	for try := 1; ; try++ {
		now, err := m.deletable(ctx, v, token, res)
		if err != nil || now.Phase == PhaseDeleting {
			return now, err
		}
		now.Phase, now.Op = PhaseDeleting, newOp()
		txn := Txn{
			If: []Cmp{
				mod(m.own(v.ID), token), // 0: none
				nonePrefix(m.key("snap", v.ID, "")),
				mod(m.vol(v.ID), v.Revision),
				mod(m.name(v.Name), revisionOf(res.kv(2))),
			},
			Then: append([]Op{put(m.vol(v.ID), encode(now)), del(m.placement(v.ID)), del(m.presence(v.ID)), del(m.leaseOf(v.ID))},
				m.audit(ctx, auditLine{What: "delete", Volume: v.ID, Token: token, Op: now.Op})...),
			Else: reads,
		}
		if now.Ref != "" { // else it never was one, and its id may be used
			txn.Then = append(txn.Then, m.remember(now, readable(m, res.kv(3), decodePlacement))...)
		}
		if token != 0 {
			txn.Then = append(txn.Then, del(m.own(v.ID)))
		}
		if carries(res.kv(2), v.ID, decodeName, func(n nameValue) string { return n.Volume }) {
			txn.Then = append(txn.Then, del(m.name(v.Name)))
		}
		if res, err = m.write(ctx, txn); err != nil {
			return Volume{}, err
		}
		switch {
		case res.Succeeded:
			now.Revision = res.Revision
			return now, nil
		case try == tries:
			return Volume{}, changed(v.ID)
		}
		// Judged again from what the Else branch read: with our operation id in the
		// tombstone it has been done.
	}
}

// deletable says whether Delete may go on, from what it has read.
func (m *Map) deletable(ctx context.Context, v Volume, token int64, res TxnResult) (Volume, error) {
	if res.kv(1) == nil {
		return Volume{}, noSuch(v.Name)
	}
	now, err := decodeVolume(*res.kv(1))
	if err != nil {
		return Volume{}, err
	}
	if now.Phase == PhaseDeleting {
		return now, nil
	}
	if own := res.kv(0); revisionOf(own) != token {
		if token != 0 {
			return Volume{}, lostToken(v.ID)
		}
		owner, err := decodeOwner(*own)
		if err != nil {
			return Volume{}, err
		}
		return Volume{}, m.held(ctx, now, owner)
	}
	if now.Revision != v.Revision {
		return Volume{}, changed(v.ID)
	}
	return now, nil
}

// held makes the HeldError, or an error if it cannot be told whether the owner
// is live.
func (m *Map) held(ctx context.Context, v Volume, owner Owner) error {
	res, err := m.read(ctx, get(m.live(owner.Node)))
	if err != nil {
		return err
	}
	return &HeldError{Volume: v, Owner: owner, Live: res.kv(0) != nil}
}

// Purge ends a tombstone. nil if it is gone already.
func (m *Map) Purge(ctx context.Context, tombstone Volume) error {
	if tombstone.Phase != PhaseDeleting || tombstone.Revision <= 0 {
		return fmt.Errorf("purge volume %s: it is not a tombstone", tombstone.ID)
	}
	res, err := m.write(ctx, Txn{
		If: []Cmp{mod(m.vol(tombstone.ID), tombstone.Revision)},
		// A claim that was late may have found the tombstone, for which it gets nothing.
		Then: append([]Op{del(m.vol(tombstone.ID)), del(m.own(tombstone.ID))},
			m.audit(ctx, auditLine{What: "purge", Volume: tombstone.ID, Name: tombstone.Name, Op: newOp()})...),
		Else: []Op{get(m.vol(tombstone.ID))},
	})
	if err != nil {
		return err
	}
	if !res.Succeeded && res.kv(0) != nil {
		return changed(tombstone.ID)
	}
	return nil
}
