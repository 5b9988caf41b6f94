package ownership

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// peers is what this node has itself seen of who is live.
type peers struct {
	mu sync.Mutex
	// whole says that the watch is unbroken, and since from when on.
	whole bool
	since time.Duration
	// live are the live nodes, as far as they have been seen; kept when the watch
	// breaks, so that it shows who has lapsed meanwhile.
	live map[string]bool
	// lapsed is when a node was last seen to lapse.
	lapsed map[string]time.Duration
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
	if !p.whole || p.live[node] {
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
		if !p.live[node] {
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
	live := make(map[string]bool, len(kvs))
	for _, kv := range kvs {
		live[last(kv.Key)] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for node := range p.live {
		if !live[node] {
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
		p.live[node] = true
		return
	}
	if p.live[node] {
		p.lapse(node, now)
	}
	delete(p.live, node)
}

func (p *peers) lapse(node string, now time.Duration) {
	if p.lapsed == nil {
		p.lapsed = map[string]time.Duration{}
	}
	p.lapsed[node] = now
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
