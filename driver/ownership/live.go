package ownership

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"
)

// errGone ends a term of registration: the lease, or the key on it, is gone.
var errGone = errors.New("this node's lease in etcd is gone; it is registering again")

// errDeclared is as errGone, for a node that was declared dead.
var errDeclared = errors.New("this node was declared dead; it gives up what it has before it registers again")

// Run keeps this node registered and live until ctx ends; it returns for no other
// reason. The liveness key is then left to expire, so that a process which starts
// again within the TTL is the same live node; Leave is for a node that does not
// come back.
//
// There MUST be one Run for a Map at a time.
func (m *Map) Run(ctx context.Context) error {
	var watches sync.WaitGroup
	defer watches.Wait()
	watches.Go(func() { m.watchPeers(ctx) })
	watches.Go(func() { m.tellEnds(ctx) })
	watches.Go(func() { m.follow(ctx, m.fence(m.me.ID, ""), true, m.poke) })
	watches.Go(func() { m.follow(ctx, m.node(m.me.ID), false, m.poke) })
	wait := backoff{first: min(100*time.Millisecond, m.cfg.Renew), most: m.cfg.Renew}
	said := ""
	for {
		err := m.register(ctx)
		if err == nil {
			m.log.WithField("node", m.me.ID).Info("registered in etcd")
			said, wait.next = "", 0
			err = m.renew(ctx)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		former := m.lapse(err)
		if errors.Is(err, errDeclared) && former != 0 {
			m.revoke(ctx, former) // nobody need wait for its end
		}
		if text := err.Error(); text != said {
			said = text
			m.log.WithError(err).Warn("not registered in etcd")
		}
		if !wait.sleep(ctx) {
			return context.Cause(ctx)
		}
	}
}

// Leave makes this node's liveness key go at once. After Run has ended.
func (m *Map) Leave(ctx context.Context) error {
	lease := m.lapse(errors.New("this node has left"))
	if lease == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	if err := m.store.Revoke(ctx, lease); err != nil && !errors.Is(err, ErrLease) {
		return unavailable(err)
	}
	return nil
}

// Live is nil while this node's lease is valid, which etcd need not be asked for.
// Otherwise it is an ErrUnavailable that says why.
func (m *Map) Live() error {
	_, err := m.valid()
	return err
}

// Term names the present registration: it is another one after each, and 0 while the
// lease is not valid. What was found in one term was nobody else's before it ended.
func (m *Map) Term() int64 {
	lease, err := m.valid()
	if err != nil {
		return 0
	}
	return lease
}

// Registered waits for the first registration. ErrUnavailable says what was in
// its way when ctx ended.
func (m *Map) Registered(ctx context.Context) error {
	select {
	case <-m.registered:
		return nil
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return unavailable(m.why)
}

// Cordoned says that this node is to get nothing more, as far as it has heard.
func (m *Map) Cordoned() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state == Cordoned
}

// Registrations wakes up after every registration, also the first one; wake-ups
// coalesce. Between the end of this node's lease and the next registration, others
// may have taken what it owns. Every call returns the same channel.
func (m *Map) Registrations() <-chan struct{} { return m.registrations }

// valid returns the lease, or why there is no valid one.
func (m *Map) valid() (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.lease == 0:
		return 0, unavailable(m.why)
	case m.cfg.Now() < m.until:
		return m.lease, nil
	case m.why != nil:
		return 0, unavailable(fmt.Errorf("this node's lease could not be renewed: %w", m.why))
	}
	return 0, unavailable(errors.New("this node's lease was not renewed in time"))
}

// lost is called when a transaction found that the lease is not what this node
// believed. The liveness loop then looks at once.
func (m *Map) lost() error {
	m.mu.Lock()
	m.until, m.why = 0, errGone
	m.mu.Unlock()
	select {
	case m.poke <- struct{}{}:
	default:
	}
	return unavailable(errGone)
}

// lapse ends the validity of the lease for good, and returns the lease.
func (m *Map) lapse(why error) (lease int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	lease = m.lease
	m.lease, m.until, m.why = 0, 0, why
	return lease
}

// margin is how long before the lease's end this node stops relying on it.
func (m *Map) margin(ttl time.Duration) time.Duration { return ttl / 5 }

// register is REGISTER, after it has made sure that this is the cluster.
func (m *Map) register(ctx context.Context) error {
	if err := m.join(ctx); err != nil {
		return err
	}
	declared := m.fence(m.me.ID, m.me.Boot)
	reads := []Op{get(m.node(m.me.ID)), get(m.live(m.me.ID)), get(declared)}
	m.refreshBucket(ctx)
	state, err := m.read(ctx, reads...)
	if err == nil && state.kv(2) != nil {
		if err = m.acquit(ctx, *state.kv(2)); err == nil {
			state, err = m.read(ctx, reads...)
		}
	}
	if err != nil {
		return err
	}
	node := m.me
	node.Session = ""
	// A storage system that does not answer now knew this node by the name it knew it
	// by before.
	var known map[string]string
	if kv := state.kv(0); kv != nil {
		old, err := decodeNode(*kv)
		if err != nil {
			return err
		}
		if old.State == "lost" || old.State == Removed {
			return fmt.Errorf("node %s (host %s) is marked %s in the cluster", m.me.ID, old.Host, old.State)
		}
		node.State, known = old.State, old.Identities
	}
	m.mu.Lock()
	node.Identities = merge(known, m.identities)
	m.mu.Unlock()
	former := state.kv(1)
	if former != nil {
		if err := m.mayFollow(*former); err != nil {
			return err
		}
	}

	sent := m.cfg.Now()
	lease, ttl, err := m.grant(ctx, m.cfg.TTL)
	if err != nil {
		return unavailable(err)
	}
	self := alive{Node: m.me, Op: newOp()}
	self.Identities, self.Address = nil, "" // they are in the other key
	txn := Txn{
		If: []Cmp{
			mod(m.node(m.me.ID), revisionOf(state.kv(0))),
			mod(m.live(m.me.ID), revisionOf(former)),
			none(declared),
		},
		Then: append([]Op{put(m.node(m.me.ID), encode(node)), putOn(lease, m.live(m.me.ID), encode(self))},
			m.audit(ctx, auditLine{What: "register", Detail: "boot " + m.me.Boot, Op: self.Op})...),
		Else: []Op{get(m.live(m.me.ID)), get(declared)},
	}
	res, err := m.write(ctx, txn)
	switch {
	case err != nil, res.Succeeded, carries(res.kv(0), self.Op, decodeAlive, func(a alive) string { return a.Op }):
	case res.kv(1) != nil:
		err = unavailable(errDeclared)
	default:
		err = unavailable(errors.New("this node is being registered by another process"))
	}
	if err != nil {
		m.revoke(ctx, lease)
		return err
	}
	if former != nil && former.Lease != 0 && former.Lease != lease {
		// What the process before this one had on its lease, such as requests, ends
		// with it. If that process still runs, it learns that it is no longer the node.
		m.revoke(ctx, former.Lease)
	}
	m.volumes.Store(nil) // this may be another etcd, or another state of it
	m.mu.Lock()
	m.lease, m.until, m.why = lease, sent+ttl-m.margin(ttl), nil
	m.since, m.state = m.cfg.Now(), node.State
	m.mu.Unlock()
	select {
	case m.registrations <- struct{}{}:
	default:
	}
	select {
	case <-m.registered:
	default:
		close(m.registered)
	}
	return nil
}

// merge returns what either of two maps has, the second one going first.
func merge(a, b map[string]string) map[string]string {
	if len(a)+len(b) == 0 {
		return nil
	}
	all := make(map[string]string, len(a)+len(b))
	maps.Copy(all, a)
	maps.Copy(all, b)
	return all
}

// Identified records by what name the storage system behind a backend knows this node:
// those need it who may have to fence the node. Nothing may be attached here before it
// is recorded. It stays until another one is. An error if a live node has the same name: a
// fence of one would hit the other.
func (m *Map) Identified(ctx context.Context, backend, identity string) error {
	if err := m.alone(ctx, backend, identity); err != nil {
		return err
	}
	m.mu.Lock()
	m.identities = merge(m.identities, map[string]string{backend: identity})
	m.mu.Unlock()
	for wait := (backoff{first: 10 * time.Millisecond, most: m.cfg.Timeout}); ; {
		lease, err := m.valid()
		if err != nil {
			return err
		}
		recorded, err := m.identify(ctx, lease, backend, identity)
		if err != nil {
			return err
		}
		if recorded {
			return m.alone(ctx, backend, identity) // of two at the same time, one sees the other
		}
		if !wait.sleep(ctx) {
			return unavailable(context.Cause(ctx))
		}
	}
}

// alone says whether a storage system knows a live node besides this one by this name.
func (m *Map) alone(ctx context.Context, backend, identity string) error {
	state, err := m.read(ctx, getPrefix(m.node("")), getPrefix(m.live("")))
	if err != nil {
		return err
	}
	live := map[string]bool{}
	for _, kv := range state.Results[1].KVs {
		live[last(kv.Key)] = true
	}
	for _, n := range m.decodeNodes(state.Results[0].KVs) {
		if n.ID != m.me.ID && live[n.ID] && n.Identities[backend] == identity {
			return fmt.Errorf("backend %s knows both this host and host %s by the name %q: a fence of one would hit the other; "+
				"each needs a name of its own, see the settings of the backend", backend, n.Host, identity)
		}
	}
	return nil
}

// identify is one try of Identified.
func (m *Map) identify(ctx context.Context, lease int64, backend, identity string) (recorded bool, err error) {
	state, err := m.read(ctx, get(m.node(m.me.ID)), get(m.live(m.me.ID)))
	if err != nil {
		return false, err
	}
	if live := state.kv(1); live == nil || live.Lease != lease {
		return false, m.lost()
	}
	kv := state.kv(0)
	if kv == nil {
		return false, m.lost()
	}
	node, err := decodeNode(*kv)
	if err != nil || node.Identities[backend] == identity {
		return err == nil, err
	}
	node.Identities = merge(node.Identities, map[string]string{backend: identity})
	key := m.node(m.me.ID)
	res, err := m.write(ctx, Txn{
		If:   []Cmp{mod(key, kv.ModRevision), onLease(m.live(m.me.ID), lease)},
		Then: []Op{put(key, encode(node))},
		Else: []Op{get(key)},
	})
	return res.Succeeded, err // if not, it is read again: a registration, or an earlier send of this, came first
}

func revisionOf(kv *KV) int64 {
	if kv == nil {
		return 0
	}
	return kv.ModRevision
}

// carries says whether the value of kv has that operation id.
func carries[T any](kv *KV, op string, decode func(KV) (T, error), opOf func(T) string) bool {
	if kv == nil {
		return false
	}
	v, err := decode(*kv)
	return err == nil && opOf(v) == op
}

// mayFollow decides whether this process may take the liveness key over from
// what has it now.
func (m *Map) mayFollow(kv KV) error {
	other, err := decodeAlive(kv)
	if err != nil {
		return err
	}
	switch {
	case other.Session == m.me.Session:
		return nil
	case other.Boot != m.me.Boot:
		return fmt.Errorf("node id %s is in use by host %s (boot %s): if this host has just been restarted, wait %s; if it is a copy of that host, give it a node id of its own",
			m.me.ID, other.Host, other.Boot, m.cfg.TTL)
	}
	select {
	case <-m.registered:
		// Two processes must not take the key from each other for ever: the one that
		// came last keeps it.
		return fmt.Errorf("another Flocker process on host %s has taken over as node %s", other.Host, m.me.ID)
	default:
		return nil
	}
}

// recheck is how often a node looks whether what it watches for has escaped it:
// watches have lost events.
const recheck = 60 * time.Second

// renew keeps the lease until the term of registration is over.
func (m *Map) renew(ctx context.Context) error {
	wait := backoff{first: m.cfg.Renew / 8, most: m.cfg.Renew}
	timer := time.NewTimer(m.cfg.Renew)
	defer timer.Stop()
	checked, check := m.cfg.Now(), false
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-m.poke:
			check = true
		case <-timer.C:
		}
		check = check || m.cfg.Now() >= checked+recheck
		over, err := m.renewOnce(ctx, check)
		if over {
			return err
		}
		if err == nil {
			if check {
				checked, check = m.cfg.Now(), false
			}
			wait.next = 0
			timer.Reset(m.cfg.Renew)
			continue
		}
		m.mu.Lock()
		m.why = err
		m.mu.Unlock()
		if !wait.sleep(ctx) {
			return context.Cause(ctx)
		}
		timer.Reset(0)
	}
}

// renewOnce renews the lease, and with check looks whether anything else ends the
// term; over says that it has ended.
func (m *Map) renewOnce(ctx context.Context, check bool) (over bool, err error) {
	if m.cfg.Healthy != nil {
		if err := m.cfg.Healthy(); err != nil {
			return false, err
		}
	}
	m.mu.Lock()
	lease, until := m.lease, m.until
	m.mu.Unlock()
	sent := m.cfg.Now()
	try, cancel := context.WithTimeout(ctx, min(m.cfg.Timeout, m.cfg.Renew))
	ttl, revision, err := m.store.KeepAliveOnce(try, lease)
	cancel()
	switch {
	case errors.Is(err, ErrLease):
		return true, errGone
	case err != nil:
		return false, err
	}
	before := m.revision.Load()
	if check || sent >= until || revision < before || m.leaps(revision, before) {
		// The lease lives, but others may have had cause to take the key from it; or it
		// lives in an etcd that was put back, unless it was a member that lags behind.
		if over, err := m.look(ctx, lease); err != nil {
			return over, err
		}
	} else {
		m.observe(revision)
	}
	m.mu.Lock()
	if now := m.cfg.Now(); now >= m.until {
		m.since = now // it was not valid for a while
	}
	m.until, m.why = sent+ttl-m.margin(ttl), nil
	m.mu.Unlock()
	m.refreshBucket(ctx)
	return false, nil
}

// look asks etcd whether this registration is still good.
func (m *Map) look(ctx context.Context, lease int64) (over bool, err error) {
	res, err := m.read(ctx, get(m.live(m.me.ID)), get(m.fence(m.me.ID, m.me.Boot)), get(m.key("meta")), get(m.node(m.me.ID)))
	if err != nil {
		return m.Unsafe() != nil, err
	}
	self := readable(m, res.kv(3), decodeNode)
	m.mu.Lock()
	if self != nil {
		m.state = self.State
	}
	generation := m.meta.revision
	m.mu.Unlock()
	switch {
	case res.kv(1) != nil:
		return true, errDeclared
	case res.kv(0) == nil, res.kv(0).Lease != lease:
		return true, errGone
	case revisionOf(res.kv(2)) != generation:
		return true, errors.New("the cluster's generation has changed; this node is registering again")
	}
	return false, nil
}

// refreshBucket gets a lease for the next audit lines if that is due, and it can.
func (m *Map) refreshBucket(ctx context.Context) {
	m.mu.Lock()
	stale := m.bucket.stale(m.lines)
	m.mu.Unlock()
	if !stale {
		return
	}
	now := time.Now()
	lease, _, err := m.grant(ctx, auditKept+24*time.Hour)
	if err != nil {
		m.log.WithError(err).Debug("no lease for audit lines")
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bucket = bucket{lease: lease, granted: now, lines: m.lines}
}

func (m *Map) grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	return m.store.Grant(ctx, ttl)
}

// revoke ends a lease that is of no more use; if it fails, time ends it.
func (m *Map) revoke(ctx context.Context, lease int64) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.cfg.Timeout)
	defer cancel()
	if err := m.store.Revoke(ctx, lease); err != nil && !errors.Is(err, ErrLease) {
		m.log.WithError(err).Debug("lease left to expire")
	}
}
