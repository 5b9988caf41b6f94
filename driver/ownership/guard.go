package ownership

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// accept is the way on for an operator who has restored etcd on purpose.
const accept = "restore a newer backup; or, if there is none, stop every container that uses a volume, and type: docker flocker cluster accept-restore"

// restoreAgain is the way on where the revision is lower than this node has seen: the
// tokens in between would be given a second time, and to Check and Release one that
// was given before is as good as the new one. The number is enough for every backup.
func restoreAgain(before int64) string {
	const step = 1_000_000_000
	bump := (before + leap + step - 1) / step * step
	return fmt.Sprintf("restore it once more, with: etcdutl snapshot restore --bump-revision %d --mark-compacted", bump)
}

// Unsafe says why this node refuses the etcd it reaches: it has another cluster,
// or an older state of this one. Every call that reads or writes it is an
// ErrUnavailable until a registration succeeds; what is mounted stays. nil while
// nothing is known against it.
func (m *Map) Unsafe() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unsafe
}

// trusted is an ErrUnavailable unless etcd was found to have this node's cluster.
func (m *Map) trusted() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.unsafe != nil:
		return unavailable(m.unsafe)
	case m.meta.Cluster == "" && m.cfg.Seen.Cluster != "":
		return unavailable(m.why) // not compared yet
	}
	return nil
}

// distrust ends the term of registration; the next one finds out what etcd this
// is.
func (m *Map) distrust(err error) error {
	m.mu.Lock()
	m.unsafe, m.until, m.why = err, 0, err
	m.mu.Unlock()
	select {
	case m.poke <- struct{}{}:
	default:
	}
	return unavailable(err)
}

func putBack(revision, before int64) error {
	return fmt.Errorf("etcd is at revision %d and was at %d before: it has been put back to an older state; "+
		"restore a newer backup; or, if there is none, stop every container that uses a volume, %s; then type: docker flocker cluster accept-restore",
		revision, before, restoreAgain(before))
}

// The revision cannot go further than leap and pace together between two answers
// that a node gets, also where a life of its process ended between them: etcd makes
// some ten thousand a second for a while, and far less for days. A backup that is
// restored with --bump-revision leaps by a thousand million, and what it says is as
// old as without.
const (
	leap = 100_000_000
	pace = 1000 // a second
)

// leaps says whether etcd cannot have got from before, when it answered last, to
// revision.
func (m *Map) leaps(revision, before int64) bool {
	return revision-before > leap+pace*max(0, time.Now().Unix()-m.at.Load())
}

func leapt(revision, before int64) error {
	return fmt.Errorf("etcd is at revision %d and was at %d not long before: it has been put back to an older state, with its revision raised; %s", revision, before, accept)
}

// Join returns the cluster's UUID, which a node that was never part of it has to ask
// for, or makes, before it registers.
func (m *Map) Join(ctx context.Context) (cluster string, err error) {
	if known := m.Seen().Cluster; known != "" {
		return known, nil
	}
	if err := m.join(ctx); err != nil {
		return "", err
	}
	return m.Cluster(), nil
}

// join reads meta, or makes it, and refuses a cluster that is not the one this
// node knows.
func (m *Map) join(ctx context.Context) error {
	known := m.Seen()
	fresh := meta{Cluster: uuid.NewString(), Gen: 1, Schema: schema}
	txn := Txn{If: []Cmp{none(m.key("meta"))}, Else: []Op{get(m.key("meta"))}}
	if known.Cluster == "" {
		txn.Then = []Op{put(m.key("meta"), encode(fresh))}
	}
	res, err := m.exchange(ctx, txn, 2*m.cfg.Timeout)
	if err != nil {
		return err
	}
	fresh.revision = res.Revision
	found, err := m.judge(known, fresh, res)
	m.mu.Lock()
	if m.unsafe = err; err == nil {
		m.observe(res.Revision)
		m.older = m.older && found.Gen == known.Gen
		m.meta = found
	}
	m.mu.Unlock()
	if now := m.Seen(); m.cfg.Keep != nil && (now.Cluster != known.Cluster || now.Gen != known.Gen || now.Older != known.Older) {
		m.cfg.Keep(now)
	}
	return err
}

// judge compares the cluster there is with the one this node knows.
func (m *Map) judge(known Seen, fresh meta, res TxnResult) (meta, error) {
	if res.Succeeded {
		if known.Cluster != "" {
			return meta{}, fmt.Errorf("etcd knows no cluster under %s, but this node belongs to cluster %s: check the endpoints and the prefix, or restore etcd's data", m.cfg.Prefix, known.Cluster)
		}
		return fresh, nil
	}
	found, err := decodeMeta(*res.kv(0))
	switch {
	case err != nil:
		return meta{}, err
	case known.Cluster == "":
	case found.Cluster != known.Cluster:
		return meta{}, m.foreign(found, known)
	case found.Gen < known.Gen:
		m.setOlder() // a node that knows less may make the generation what it was
		return meta{}, fmt.Errorf("cluster %s is at generation %d and was at %d before: etcd has been put back to an older state; %s", found.Cluster, found.Gen, known.Gen, accept)
	case found.Gen > known.Gen && res.Revision >= known.Revision && (!known.Older || found.revision > known.Revision):
	case found.Gen > known.Gen:
		// On another node, that had not seen as much.
		m.setOlder()
		return meta{}, fmt.Errorf("an etcd that was put back to an older state was accepted at revision %d, and this host has seen %d; stop every container that uses a volume, %s; then type: docker flocker cluster accept-restore",
			found.revision, known.Revision, restoreAgain(known.Revision))
	case res.Revision < known.Revision:
		m.setOlder()
		return meta{}, putBack(res.Revision, known.Revision)
	case m.leaps(res.Revision, known.Revision):
		m.setOlder()
		return meta{}, leapt(res.Revision, known.Revision)
	case known.Older:
		return meta{}, fmt.Errorf("etcd was put back to an older state, which has gone on since (revision %d); %s", res.Revision, accept)
	}
	return found, nil
}

func (m *Map) setOlder() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.older = true
}

func (m *Map) foreign(found meta, known Seen) error {
	return fmt.Errorf("etcd has cluster %s under %s, but this node belongs to cluster %s: check the endpoints and the prefix", found.Cluster, m.cfg.Prefix, known.Cluster)
}

// AcceptRestore declares that etcd was put back to an older state on purpose: it
// raises the cluster's generation above every one this node has seen, and returns
// it. All nodes then register again by themselves. No container may use a volume
// meanwhile: what this older etcd says may have been untrue for a long time.
//
// It works while this node refuses etcd, but not for another cluster, an etcd
// without data, or one whose revision is below what this node has seen: tokens would
// be given a second time. by is who says so.
func (m *Map) AcceptRestore(ctx context.Context, by string) (gen int64, err error) {
	known, key := m.Seen(), m.key("meta")
	res, err := m.exchange(ctx, Txn{Then: []Op{get(key)}}, m.cfg.Timeout)
	if err != nil {
		return 0, err
	}
	kv := res.kv(0)
	if kv == nil {
		return 0, fmt.Errorf("etcd has no data of Flocker under %s, so there is nothing to accept: restore etcd's data from a backup first", m.cfg.Prefix)
	}
	next, err := decodeMeta(*kv)
	if err != nil {
		return 0, err
	}
	if known.Cluster != "" && next.Cluster != known.Cluster {
		return 0, m.foreign(next, known)
	}
	if res.Revision < known.Revision {
		return 0, fmt.Errorf("etcd is at revision %d and this host has seen %d, so nothing was changed: tokens that were given before would be given again; %s; then type this again",
			res.Revision, known.Revision, restoreAgain(known.Revision))
	}
	now := time.Now().UTC()
	next.Gen, next.By, next.At = max(next.Gen, known.Gen)+1, by, &now
	m.mu.Lock()
	m.bucket = bucket{} // its lease may not have been restored
	m.mu.Unlock()
	m.refreshBucket(ctx)
	res, err = m.exchange(ctx, Txn{
		If:   []Cmp{mod(key, kv.ModRevision)},
		Then: append([]Op{put(key, encode(next))}, m.audit(ctx, auditLine{What: "accept restore", Token: next.Gen, By: by, Op: newOp()})...),
		Else: []Op{get(key)},
	}, 2*m.cfg.Timeout)
	if err != nil {
		return 0, err
	}
	if !res.Succeeded {
		// An earlier send did it, or another node.
		if kv = res.kv(0); kv == nil {
			return 0, unavailable(errors.New("etcd's data is being replaced: try again"))
		}
		now, err := decodeMeta(*kv)
		if err != nil {
			return 0, err
		}
		if now.Cluster != next.Cluster || now.Gen < next.Gen {
			return 0, unavailable(errors.New("etcd's data is being replaced: try again"))
		}
		next.Gen = now.Gen
	}
	select {
	case m.poke <- struct{}{}:
	default:
	}
	return next.Gen, nil
}
