package ownership

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"
)

// peers is what this node has itself seen of who is live.
type peers struct {
	mu sync.Mutex
	// whole says that the watch is unbroken, and since from when on.
	whole bool
	since time.Duration
	// live are the live nodes, as far as they have been seen, each with the revision of
	// its registration; kept when the watch breaks, so that it shows who has lapsed
	// meanwhile.
	live map[string]int64
	// lapsed is when a node was last seen to lapse, as long as anything depends on it.
	lapsed map[string]time.Duration
	// ended are the registrations that were seen to end, to be told once.
	ended chan registration
}

// registration is one of a node, by its revision.
type registration struct {
	node     string
	revision int64
}

// The breaker: when so many nodes lapse within a window, it is more likely that
// etcd or the network is at fault.
const (
	stormWindow  = 60 * time.Second
	stormNodes   = 3
	stormPercent = 30
)

// StormError says that so many nodes lapsed at once that nothing should be taken
// over from them.
type StormError struct {
	// Lapsed is how many lapsed within a minute, and Of how many were live.
	Lapsed, Of int
}

func (e *StormError) Error() string {
	return fmt.Sprintf("%d of %d hosts were no longer heard from within one minute, which is more likely the fault of etcd or of the network, "+
		"so nothing is taken over from them: check both; if hosts are really off, type for each: docker flocker node confirm-dead HOST", e.Lapsed, e.Of)
}

// Silence is for how long this node has seen another one not being live, in
// unbroken contact with etcd: while its own lease was valid and its watch whole. A
// gap in either begins the count anew. ok is false while the node is live, or if
// there is no contact. Silence proves nothing about what the node does.
func (m *Map) Silence(node string) (silent time.Duration, ok bool) {
	if m.Live() != nil {
		return 0, false
	}
	m.mu.Lock()
	since := m.since
	m.mu.Unlock()
	p := &m.peers
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.whole || p.live[node] != 0 {
		return 0, false
	}
	return max(0, m.cfg.Now()-max(since, p.since, p.lapsed[node])), true
}

// Storm is a *StormError if more than 3 nodes, and more than 30 % of those that
// were live, lapsed within the last minute; whether or not they are back. nil
// otherwise.
func (m *Map) Storm() error {
	now := m.cfg.Now()
	p := &m.peers
	p.mu.Lock()
	defer p.mu.Unlock()
	storm := &StormError{Of: len(p.live)}
	for node, at := range p.lapsed {
		if now-at >= stormWindow {
			continue
		}
		storm.Lapsed++
		if p.live[node] == 0 {
			storm.Of++
		}
	}
	if storm.Lapsed <= stormNodes || 100*storm.Lapsed <= stormPercent*storm.Of {
		return nil
	}
	return storm
}

// list takes over a list of the live nodes.
func (p *peers) list(kvs []KV, now time.Duration) {
	live := make(map[string]int64, len(kvs))
	for _, kv := range kvs {
		live[last(kv.Key)] = kv.ModRevision
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for node := range p.live {
		if live[node] == 0 {
			p.lapse(node, now)
		}
	}
	p.live = live
	if !p.whole {
		p.whole, p.since = true, now
	}
}

// see takes over one change.
func (p *peers) see(ev KeyEvent, now time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	node := last(ev.KV.Key)
	if !ev.Deleted {
		p.live[node] = ev.KV.ModRevision
		return
	}
	if p.live[node] != 0 {
		p.lapse(node, now)
	}
	delete(p.live, node)
}

func (p *peers) lapse(node string, now time.Duration) {
	if p.lapsed == nil {
		p.lapsed = map[string]time.Duration{}
	}
	p.lapsed[node] = now
	maps.DeleteFunc(p.lapsed, func(node string, at time.Duration) bool {
		return now-at >= stormWindow && (p.live[node] != 0 || at <= p.since)
	})
	select {
	case p.ended <- registration{node, p.live[node]}:
	default: // others may have seen it, too
	}
}

func (p *peers) broke() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.whole = false
}

// watchPeers follows who is live until ctx ends.
func (m *Map) watchPeers(ctx context.Context) {
	wait := backoff{first: 50 * time.Millisecond, most: m.cfg.Timeout}
	for {
		if m.followPeers(ctx) {
			wait.next = 0
		}
		m.peers.broke()
		if !wait.sleep(ctx) {
			return
		}
	}
}

// followPeers follows one watch of the liveness keys to its end. True if it was
// whole for a time.
func (m *Map) followPeers(ctx context.Context) (whole bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begins := time.AfterFunc(m.cfg.Timeout, cancel)
	defer begins.Stop()
	again := time.NewTicker(recheck)
	defer again.Stop()
	changes := m.store.Watch(ctx, m.live(""), true, 0)
	for list := true; ; {
		var events []KeyEvent
		select {
		case res, ok := <-changes:
			if !ok || res.Err != nil {
				return whole
			}
			begins.Stop()
			events = res.Events
		case <-again.C:
			list = true
		}
		if list {
			// After the watch has begun: nothing can happen in between unseen. What is
			// reported although it is in the list does no harm.
			res, err := m.read(ctx, getPrefix(m.live("")))
			if err != nil {
				return whole
			}
			m.peers.list(res.Results[0].KVs, m.cfg.Now())
			list, whole = false, true
		}
		for _, ev := range events {
			m.peers.see(ev, m.cfg.Now())
		}
	}
}

// tellTries is how often this node tries to tell that another one is silent.
const tellTries = 10

// tellEnds writes an audit line for each registration that was seen to end.
func (m *Map) tellEnds(ctx context.Context) {
	for {
		select {
		case r := <-m.peers.ended:
			wait := backoff{first: m.cfg.Renew / 4, most: m.cfg.Timeout}
			for range tellTries {
				if !wait.sleep(ctx) || m.tellEnd(ctx, r) == nil {
					break
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// tellEnd writes that a node is silent, unless it is back. All nodes see it: the line has a
// key of which there is only one, so that the first to come writes it.
func (m *Map) tellEnd(ctx context.Context, r registration) error {
	if err := m.Live(); err != nil {
		return err
	}
	now, name := time.Now(), fmt.Sprintf("silent-%d", r.revision)
	txn := Txn{
		If:   []Cmp{none(m.live(r.node))},
		Then: m.audit(ctx, auditLine{What: "silent", To: r.node, Op: newOp()}),
	}
	reads := []Op{get(m.live(r.node))}
	for _, at := range []time.Time{now.Add(-time.Hour), now, now.Add(time.Hour)} { // by the clocks of others
		key := m.lineKey(hour(at), r.node, name)
		txn.If, reads = append(txn.If, none(key)), append(reads, get(key))
	}
	res, err := m.read(ctx, reads...) // which costs etcd less
	for i := range reads {
		if err != nil || res.kv(i) != nil {
			return err
		}
	}
	if len(txn.Then) > 0 {
		txn.Then[0].Key = m.lineKey(hour(now), r.node, name)
		_, err = m.write(ctx, txn)
	}
	return err
}
