package ownership

import (
	"context"
	"fmt"
	"maps"
)

// Seize takes a volume from an owner that is not live: it records this node as
// the owner, with whom to fence in Pending, and nothing more. The volume MUST NOT
// be attached before the fence was observed and Settle has returned. Only Volume
// and Token of from decide; its token is over afterwards.
//
// If the owner is itself in the middle of a takeover, grounds are what holds
// against the owner, and Pending is taken over from it as it is: whom it was to
// fence is still to be fenced, and it has itself never had the volume.
//
// ErrConflict if the owner has changed, is live, or the grounds do not hold any
// more. Repeated after an ErrUnavailable it finds a takeover that has happened.
// The volume may be in any phase.
func (m *Map) Seize(ctx context.Context, from Owner, grounds Grounds) (Owner, Volume, error) {
	vid := from.Volume
	if !validID(vid) || !validID(from.Node) || !validID(from.Boot) || from.Token <= 0 {
		return Owner{}, Volume{}, changed(vid)
	}
	if from.Node == m.me.ID {
		return Owner{}, Volume{}, fmt.Errorf("take over volume %s: this node owns it", vid)
	}
	lease, err := m.valid()
	if err != nil {
		return Owner{}, Volume{}, err
	}
	reads := []Op{
		get(m.own(vid)), get(m.vol(vid)), get(m.live(from.Node)), get(m.node(from.Node)),
		get(m.fence(from.Node, from.Boot)), get(m.live(m.me.ID)),
	}
	res, err := m.read(ctx, reads...)
	if err != nil {
		return Owner{}, Volume{}, err
	}
	for try := 1; ; try++ {
		if vol := res.kv(1); vol == nil {
			return Owner{}, Volume{}, noSuch(vid)
		} else if o, ours := m.seized(from, res.kv(0)); ours {
			v, err := decodeVolume(*vol)
			return o, v, err
		}
		if kv := res.kv(5); kv == nil || kv.Lease != lease {
			return Owner{}, Volume{}, m.lost()
		}
		pending, hold, err := m.grounds(from, grounds, res)
		if err != nil {
			return Owner{}, Volume{}, err
		}
		if try > tries {
			return Owner{}, Volume{}, changed(vid)
		}
		o := Owner{Volume: vid, Node: m.me.ID, Host: m.me.Host, Boot: m.me.Boot, Op: newOp(), Pending: pending}
		detail := fmt.Sprintf("%s: host %s", pending.Grounds, pending.Host)
		if pending.Node != from.Node {
			detail += fmt.Sprintf(", whose takeover node %s did not finish (%s)", from.Node, grounds)
		}
		res, err = m.write(ctx, Txn{
			If: append(hold, mod(m.own(vid), from.Token), has(m.vol(vid)), onLease(m.live(m.me.ID), lease)),
			Then: append([]Op{put(m.own(vid), encode(o)), get(m.vol(vid))},
				m.audit(ctx, auditLine{What: "take over", Volume: vid, From: pending.Node, Token: from.Token, Detail: detail, Op: o.Op})...),
			Else: reads,
		})
		if err != nil {
			return Owner{}, Volume{}, err
		}
		if res.Succeeded {
			o.Token = res.Revision
			v, err := decodeVolume(*res.kv(1))
			return o, v, err
		}
		// Judged again by what the Else branch read: this very takeover may be there.
	}
}

// target is whom to fence for a volume that is taken from an owner.
func target(from Owner) Pending {
	if from.Pending != nil {
		return *from.Pending
	}
	return Pending{Node: from.Node, Host: from.Host, Boot: from.Boot, Token: from.Token}
}

// seized says whether own is what a Seize by this process from that owner left:
// an earlier one may have been applied although it failed.
func (m *Map) seized(from Owner, own *KV) (Owner, bool) {
	if own == nil {
		return Owner{}, false
	}
	now, err := decodeOwner(*own)
	if err != nil || now.Node != m.me.ID || now.Boot != m.me.Boot || now.Pending == nil {
		return Owner{}, false
	}
	want := target(from)
	return now, now.Pending.Node == want.Node && now.Pending.Boot == want.Boot && now.Pending.Token == want.Token
}

// grounds returns whom to fence, and the compares by which the grounds still hold
// when the takeover is recorded.
func (m *Map) grounds(from Owner, grounds Grounds, res TxnResult) (*Pending, []Cmp, error) {
	own, live, entry, declared := res.kv(0), res.kv(2), res.kv(3), res.kv(4)
	gone := func(why string) (*Pending, []Cmp, error) {
		return nil, nil, fmt.Errorf("take over volume %s: host %s %s: %w", from.Volume, from.Host, why, ErrConflict)
	}
	if revisionOf(own) != from.Token {
		return nil, nil, changed(from.Volume)
	}
	now, err := decodeOwner(*own)
	if err != nil {
		return nil, nil, err
	}
	if now.Node != from.Node || now.Boot != from.Boot { // not what the token was read with
		return nil, nil, changed(from.Volume)
	}
	var node Node
	if entry != nil {
		if node, err = decodeNode(*entry); err != nil {
			return nil, nil, err
		}
	}
	// It is written at every registration: the owner has not been back meanwhile.
	hold := []Cmp{mod(m.node(from.Node), revisionOf(entry))}
	mayLive := false
	switch grounds {
	case GroundsSilent:
	case GroundsRebooted:
		if entry == nil || node.Boot == from.Boot {
			return gone("was not restarted")
		}
	case GroundsConfirmed:
		if declared == nil {
			return gone("is not declared dead any more")
		}
		death, err := decodeDeath(*declared)
		if err != nil {
			return nil, nil, err
		}
		hold = append(hold, mod(m.fence(from.Node, from.Boot), declared.ModRevision))
		// Of one that was restarted, it says nothing.
		mayLive = death.Forced && node.Boot == from.Boot
	default:
		return nil, nil, fmt.Errorf("take over volume %s: %q are no grounds", from.Volume, grounds)
	}
	if !mayLive {
		if live != nil {
			return gone("is live")
		}
		hold = append(hold, none(m.live(from.Node)))
	}
	pending := target(now)
	if now.Pending == nil {
		pending.Identities, pending.Grounds = maps.Clone(node.Identities), grounds
	}
	return &pending, hold, nil
}

// Settle ends a takeover: this node owns the volume for good, under a new token,
// and may attach it. It MUST have observed the fence of owner.Pending, of which
// evidence is what it saw, for the audit. ErrLost if the takeover is no longer
// this node's.
func (m *Map) Settle(ctx context.Context, owner Owner, evidence string) (Owner, Volume, error) {
	vid, token := owner.Volume, owner.Token
	if token <= 0 || owner.Node != m.me.ID || owner.Pending == nil || !validID(vid) {
		return Owner{}, Volume{}, lostToken(vid)
	}
	o := Owner{Volume: vid, Node: m.me.ID, Host: m.me.Host, Boot: m.me.Boot, Unclean: true}
	return m.renewOwn(ctx, token, o, auditLine{What: "fenced", From: owner.Pending.Node, Detail: evidence})
}
