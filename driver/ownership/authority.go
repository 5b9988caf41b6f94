package ownership

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Claim makes this node the owner of a free volume, in one round trip.
// *HeldError says who owns it otherwise; that may be this node, if an earlier
// process left it or somebody handed it over. ErrNotFound if there is no such
// volume, *PhaseError if it is not ready.
func (m *Map) Claim(ctx context.Context, vid string) (Owner, Volume, error) {
	if !validID(vid) {
		return Owner{}, Volume{}, noSuch(vid)
	}
	lease, err := m.valid()
	if err != nil {
		return Owner{}, Volume{}, err
	}
	o := Owner{Volume: vid, Node: m.me.ID, Host: m.me.Host, Boot: m.me.Boot, Op: newOp()}
	res, err := m.write(ctx, Txn{
		If: []Cmp{none(m.own(vid)), has(m.vol(vid)), onLease(m.live(m.me.ID), lease)},
		Then: append([]Op{put(m.own(vid), encode(o)), get(m.vol(vid))},
			m.audit(ctx, auditLine{What: "claim", Volume: vid, Op: o.Op})...),
		Else: []Op{get(m.own(vid)), get(m.vol(vid))},
	})
	if err != nil {
		return Owner{}, Volume{}, err
	}
	own, vol := res.kv(0), res.kv(1)
	switch {
	case res.Succeeded:
		o.Token = res.Revision
	case carries(own, o.Op, decodeOwner, ownerOp):
		o.Token = own.ModRevision
	case vol == nil:
		return Owner{}, Volume{}, noSuch(vid)
	case own == nil:
		return Owner{}, Volume{}, m.lost() // no other compare can have failed
	default:
		return Owner{}, Volume{}, m.heldBy(ctx, *own, *vol)
	}
	v, err := usable(vid, vol)
	if err != nil {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*m.cfg.Timeout)
		defer cancel()
		return Owner{}, Volume{}, errors.Join(err, m.Release(back, vid, o.Token))
	}
	return o, v, nil
}

func (m *Map) heldBy(ctx context.Context, own, vol KV) error {
	v, err := decodeVolume(vol)
	if err != nil {
		return err
	}
	owner, err := decodeOwner(own)
	if err != nil {
		return err
	}
	return m.held(ctx, v, owner)
}

// usable decodes a volume and demands that it is ready.
func usable(vid string, kv *KV) (Volume, error) {
	if kv == nil {
		return Volume{}, noSuch(vid)
	}
	v, err := decodeVolume(*kv)
	if err == nil && v.Phase != PhaseReady {
		err = &PhaseError{Volume: v}
	}
	return v, err
}

// Retake makes this node the owner again of what it owns already, under a new
// token: any write of the old token that is still on its way then fails. It is
// the way back for a volume that was given up with an unknown outcome, or left
// by an earlier process. ErrLost if the token is no longer current; a takeover
// that is not settled is refused. The volume MUST NOT be attached under the old
// token any more.
func (m *Map) Retake(ctx context.Context, owner Owner) (Owner, Volume, error) {
	vid, token := owner.Volume, owner.Token
	if token <= 0 || owner.Node != m.me.ID || !validID(vid) {
		return Owner{}, Volume{}, lostToken(vid)
	}
	if err := m.Live(); err != nil {
		return Owner{}, Volume{}, err
	}
	// The caller may know no more than the token; what it stands for never changes.
	res, err := m.read(ctx, get(m.own(vid)))
	if err != nil {
		return Owner{}, Volume{}, err
	}
	if revisionOf(res.kv(0)) != token {
		return Owner{}, Volume{}, lostToken(vid)
	}
	o, err := decodeOwner(*res.kv(0))
	switch {
	case err != nil:
		return Owner{}, Volume{}, err
	case o.Node != m.me.ID:
		return Owner{}, Volume{}, lostToken(vid)
	case o.Pending != nil:
		return Owner{}, Volume{}, fmt.Errorf("retake volume %s: its takeover from host %s is not finished", vid, o.Pending.Host)
	}
	o.Host, o.Boot, o.From, o.Clean = m.me.Host, m.me.Boot, "", false
	return m.renewOwn(ctx, token, o, auditLine{What: "retake"})
}

// renewOwn replaces what this node owns under token by o.
func (m *Map) renewOwn(ctx context.Context, token int64, o Owner, line auditLine) (Owner, Volume, error) {
	vid := o.Volume
	lease, err := m.valid()
	if err != nil {
		return Owner{}, Volume{}, err
	}
	o.Op = newOp()
	line.Volume, line.Token, line.Op = vid, token, o.Op
	res, err := m.write(ctx, Txn{
		If:   []Cmp{mod(m.own(vid), token), has(m.vol(vid)), onLease(m.live(m.me.ID), lease)},
		Then: append([]Op{put(m.own(vid), encode(o)), get(m.vol(vid))}, m.audit(ctx, line)...),
		Else: []Op{get(m.own(vid)), get(m.vol(vid))},
	})
	if err != nil {
		return Owner{}, Volume{}, err
	}
	own, vol := res.kv(0), res.kv(1)
	switch {
	case res.Succeeded:
		o.Token = res.Revision
	case carries(own, o.Op, decodeOwner, ownerOp):
		o.Token = own.ModRevision
	case revisionOf(own) != token:
		return Owner{}, Volume{}, lostToken(vid)
	case vol == nil:
		return Owner{}, Volume{}, noSuch(vid)
	default:
		return Owner{}, Volume{}, m.lost()
	}
	v, err := decodeVolume(*vol)
	return o, v, err
}

// Request asks the live owner for a volume. It may be repeated, and keeps its
// place in the queue then. It ends with this node's lease, so a waiting node
// repeats it now and then; and Withdraw MUST follow in the end, whatever came of
// it. ErrConflict if the owner has changed, *HeldError if it is not live.
func (m *Map) Request(ctx context.Context, owner Owner, purpose string) error {
	vid := owner.Volume
	if !validID(vid) || !validID(owner.Node) || owner.Token <= 0 {
		return changed(vid)
	}
	if owner.Node == m.me.ID {
		return fmt.Errorf("request volume %s: this node owns it", vid)
	}
	lease, err := m.valid()
	if err != nil {
		return err
	}
	key, rep := m.req(owner.Node, vid, m.me.ID), m.rep(m.me.ID, vid)
	r := Request{
		Volume: vid, Owner: owner.Node, Node: m.me.ID, Host: m.me.Host, Boot: m.me.Boot,
		Since: time.Now().UTC(), Op: newOp(), Purpose: purpose,
	}
	res, err := m.write(ctx, Txn{
		If: []Cmp{mod(m.own(vid), owner.Token), has(m.live(owner.Node)), onLease(m.live(m.me.ID), lease)},
		Then: []Op{
			putOn(lease, key, encode(r)),
			// An answer to an earlier wish says nothing about this one. A wish that is repeated
			// is no news.
			nest(Txn{If: []Cmp{none(key)}, Then: append([]Op{del(rep)},
				m.audit(ctx, auditLine{What: "request", Volume: vid, From: owner.Node, Token: owner.Token, Detail: "to " + purpose, Op: r.Op})...)}),
		},
		Else: []Op{get(m.own(vid)), get(m.vol(vid)), get(m.live(owner.Node))},
	})
	switch {
	case err != nil:
		return err
	case res.Succeeded:
		return nil
	case revisionOf(res.kv(0)) != owner.Token:
		return changed(vid)
	case res.kv(2) != nil:
		return m.lost()
	}
	v := Volume{ID: vid, Name: vid}
	if kv := res.kv(1); kv != nil {
		if v, err = decodeVolume(*kv); err != nil {
			return err
		}
	}
	return &HeldError{Volume: v, Owner: owner}
}

// Withdraw takes a Request back, and the reply with it.
func (m *Map) Withdraw(ctx context.Context, owner Owner) error {
	if !validID(owner.Volume) || !validID(owner.Node) {
		return nil
	}
	_, err := m.write(ctx, Txn{Then: []Op{
		del(m.req(owner.Node, owner.Volume, m.me.ID)),
		del(m.rep(m.me.ID, owner.Volume)),
	}})
	return err
}

// Waiting returns the requests to this node, oldest first.
func (m *Map) Waiting(ctx context.Context) ([]Request, error) {
	res, err := m.read(ctx, getPrefix(m.key("req", m.me.ID, "")))
	if err != nil {
		return nil, err
	}
	return m.requests(res.Results[0].KVs), nil
}

// Asked returns this node's own requests, to whomever.
func (m *Map) Asked(ctx context.Context) ([]Request, error) {
	res, err := m.read(ctx, getPrefix(m.key("req", "")))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(m.requests(res.Results[0].KVs), func(r Request) bool { return r.Node != m.me.ID }), nil
}

// Reply answers a request, as long as it waits; otherwise it does nothing. The
// reply goes with the requester's lease.
func (m *Map) Reply(ctx context.Context, req Request, reply Reply) error {
	if req.Lease == 0 || !validID(req.Node) || !validID(req.Volume) {
		return nil
	}
	reply.Volume, reply.Node, reply.Host = req.Volume, m.me.ID, m.me.Host
	rep := m.rep(req.Node, req.Volume)
	txn := Txn{
		If:   []Cmp{onLease(m.req(m.me.ID, req.Volume, req.Node), req.Lease)},
		Then: []Op{putOn(req.Lease, rep, encode(reply))},
	}
	if reply.Busy { // of the answers to one request, the first
		txn.Then = append(txn.Then, nest(Txn{If: []Cmp{none(rep)}, Then: m.audit(ctx, auditLine{
			What: "refuse", Volume: req.Volume, To: req.Node, Detail: "in use" + reply.users(), Op: newOp(),
		})}))
	}
	_, err := m.write(ctx, txn)
	return err
}

// Replied returns the answer to this node's request for a volume, if there is
// one.
func (m *Map) Replied(ctx context.Context, vid string) (Reply, bool, error) {
	if !validID(vid) {
		return Reply{}, false, nil
	}
	res, err := m.read(ctx, get(m.rep(m.me.ID, vid)))
	if err != nil || res.kv(0) == nil {
		return Reply{}, false, err
	}
	reply, err := decodeReply(*res.kv(0))
	return reply, err == nil, err
}

// HandOver makes the requester the owner, or releases the volume if the request
// is gone; handed tells which. This node MUST have proven the volume closed and
// detached it. ErrLost if the token was no longer current. In all three cases
// the volume is no longer this node's; after any other error, that is unknown.
func (m *Map) HandOver(ctx context.Context, vid string, token int64, to Request) (handed bool, err error) {
	if token <= 0 || !validID(vid) || !validID(to.Node) {
		return false, lostToken(vid)
	}
	o := Owner{Volume: vid, Node: to.Node, Host: to.Host, Boot: to.Boot, Op: newOp(), From: m.me.ID, Clean: true}
	req := m.req(m.me.ID, vid, to.Node)
	line := auditLine{What: "hand over", Volume: vid, To: to.Node, Token: token, Op: o.Op}
	released := line
	released.What, released.To = "release", ""
	res, err := m.write(ctx, Txn{
		If: []Cmp{mod(m.own(vid), token), onLease(req, to.Lease)},
		Then: append([]Op{put(m.own(vid), encode(o)), del(m.presence(vid)), del(req), del(m.rep(to.Node, vid))},
			m.audit(ctx, line)...),
		Else: []Op{nest(Txn{
			If:   []Cmp{mod(m.own(vid), token)},
			Then: append([]Op{del(m.own(vid)), del(m.presence(vid))}, m.audit(ctx, released)...),
			Else: []Op{get(m.own(vid))},
		})},
	})
	if err != nil {
		return false, err
	}
	if res.Succeeded {
		return true, nil
	}
	now := *res.Results[0].Txn
	switch own := now.kv(0); {
	case now.Succeeded, own == nil: // gone: an earlier send of this release
		return false, nil
	case carries(own, o.Op, decodeOwner, ownerOp):
		return true, nil
	}
	return false, lostToken(vid)
}

// Release makes a volume free. This node MUST have proven it closed and detached
// it. nil if it is free already, ErrLost if it has another owner or token.
func (m *Map) Release(ctx context.Context, vid string, token int64) error {
	if token <= 0 || !validID(vid) {
		return lostToken(vid)
	}
	res, err := m.write(ctx, Txn{
		If: []Cmp{mod(m.own(vid), token)},
		Then: append([]Op{del(m.own(vid)), del(m.presence(vid))},
			m.audit(ctx, auditLine{What: "release", Volume: vid, Token: token, Op: newOp()})...),
		Else: []Op{get(m.own(vid))},
	})
	if err != nil {
		return err
	}
	if !res.Succeeded && res.kv(0) != nil {
		return lostToken(vid)
	}
	return nil
}

// Check is nil while the token is current, and ErrLost once it is not.
func (m *Map) Check(ctx context.Context, vid string, token int64) error {
	if token <= 0 || !validID(vid) {
		return lostToken(vid)
	}
	// etcd lets any member answer a transaction that does nothing, from a state that
	// may be old: hence the reads.
	read := []Op{get(m.own(vid))}
	res, err := m.send(ctx, Txn{If: []Cmp{mod(m.own(vid), token)}, Then: read, Else: read}, m.cfg.Timeout)
	if err != nil {
		return err
	}
	if !res.Succeeded {
		return lostToken(vid)
	}
	return nil
}
