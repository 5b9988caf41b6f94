package ownership

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// An Event is an audit line: what was changed, who did it and where. Each is written in
// the same transaction as the change, so Revision is that of both. A claim, hand over,
// takeover or retake begins a tenure, whose token is its Revision; Token is the one that
// it ended, or under which it was done.
type Event struct {
	Revision int64
	At       time.Time // by the clock of Host
	What     string
	Volume   string // its id
	Name     string // empty if nobody knows it any more
	Node     string // who did it
	Host     string
	// From and To are nodes: whom it was taken or requested from, who got it, or whom
	// it is about.
	From, FromHost string
	To, ToHost     string
	Token          int64
	Detail         string
	By             string // who wanted it: an operator, or docker
}

// GoneError says that events which were asked for are no longer kept, or may not be.
type GoneError struct {
	// Before is the revision of the first event that is surely followed by all others.
	Before int64
}

func (e *GoneError) Error() string {
	return fmt.Sprintf("events before revision %d are gone: they are kept for %d days", e.Before, int(auditKept.Hours()/24))
}

// SlowError ends a Follow whose reader does not keep up.
type SlowError struct {
	// After is what to give to the next Follow.
	After int64
}

func (e *SlowError) Error() string {
	return fmt.Sprintf("these events were not read as fast as they came: go on after revision %d", e.After)
}

const (
	// recent is how many events are kept in memory, and up to twice as many.
	recent = 10_000
	// page is how many are read from etcd at once: for each page it looks at all it has.
	page = 5_000
)

func (m *Map) lineKey(parts ...string) string { return m.key(append([]string{"ev"}, parts...)...) }

// hour is the part of an audit line's key that says when it was written.
func hour(t time.Time) string { return t.UTC().Format("2006010215") }

func decodeLine(kv KV) (Event, error) {
	line, err := decode(kv, func(l *auditLine) error {
		if l.What == "" {
			return errors.New("what happened is missing")
		}
		return nil
	})
	return Event{
		Revision: kv.ModRevision, At: line.At, What: line.What, Volume: line.Volume, Name: line.Name, Node: line.Node, Host: line.Host,
		From: line.From, To: line.To, Token: line.Token, Detail: line.Detail, By: line.By,
	}, err
}

// named gives an event the names that the mirror knows.
func (r *mirror) named(e Event) Event {
	if o := r.volumes[e.Volume]; e.Name == "" && o != nil && o.volume != nil {
		e.Name = o.volume.Name
	}
	if g, ok := r.gone[e.Volume]; e.Name == "" && ok {
		e.Name = g.Volume.Name
	}
	for id, host := range map[string]*string{e.Node: &e.Host, e.From: &e.FromHost, e.To: &e.ToHost} {
		if n, ok := r.nodes[id]; ok && *host == "" {
			*host = n.Host
		}
	}
	return e
}

// remember keeps a new event in memory.
func (o *Observer) remember(kv KV) {
	e, err := decodeLine(kv)
	if err != nil {
		o.m.broken(err)
		return
	}
	if o.events = append(o.events, o.mirror.named(e)); len(o.events) < 2*recent {
		return
	}
	cut := len(o.events) - recent
	for o.events[cut].Revision == o.events[cut-1].Revision {
		cut--
	}
	o.base = o.events[cut-1].Revision
	o.events = slices.Clone(o.events[cut:])
}

// Since returns what to give to Events or Follow as after, for everything that has
// happened since t.
func (o *Observer) Since(ctx context.Context, t time.Time) (after int64, err error) {
	first, now, err := o.m.firstLine(ctx, t)
	if first == 0 {
		first = now + 1
	}
	return first - 1, err
}

// firstLine returns the lowest revision of the audit lines of t's hour and the ones after
// it, by the clocks of those who wrote them: all that was written since is not before it.
// 0 if there are none; now is etcd's revision.
func (m *Map) firstLine(ctx context.Context, t time.Time) (first, now int64, err error) {
	if oldest := time.Now().Add(-auditKept - 48*time.Hour); t.Before(oldest) {
		t = oldest
	}
	var reads []Op
	for end := time.Now().Add(2 * time.Hour); t.Before(end); t = t.Add(time.Hour) {
		op := getPrefix(m.lineKey(hour(t), ""))
		op.Limit = 1
		reads = append(reads, op)
	}
	for some := range slices.Chunk(reads, 100) {
		res, err := m.read(ctx, some...)
		if err != nil {
			return 0, 0, err
		}
		now = res.Revision
		for i := range some {
			if kv := res.kv(i); kv != nil && (first == 0 || kv.ModRevision < first) {
				first = kv.ModRevision
			}
		}
	}
	return first, now, nil
}

// Events returns what has happened after a revision, the oldest first, at most limit of
// it (and at most 5000), and the revision to go on after: once nothing is left, that is
// the last one that is known of. After 0 is all that is kept. *GoneError if what is asked
// for may not be kept any more. It waits until etcd answers, or ctx ends.
func (o *Observer) Events(ctx context.Context, after int64, limit int) (events []Event, next int64, err error) {
	defer o.enter()()
	limit = max(1, min(limit, page))
	if err := o.following(ctx); err != nil {
		return nil, 0, err
	}
	if events, next, ok := o.inMemory(after, limit); ok {
		return events, next, nil
	}
	if after > 0 {
		first, now, err := o.m.firstLine(ctx, time.Now().Add(-auditKept))
		if first == 0 {
			first = now + 1
		}
		if err == nil && after < first-1 {
			err = &GoneError{Before: first}
		}
		if err != nil {
			return nil, 0, err
		}
	}
	return o.inEtcd(ctx, after, limit)
}

// inMemory is Events, unless what is asked for is from before what is in memory.
func (o *Observer) inMemory(after int64, limit int) (events []Event, next int64, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mirror == nil || after < o.base {
		return nil, 0, false
	}
	i, _ := slices.BinarySearchFunc(o.events, after+1, func(e Event, revision int64) int { return int(e.Revision - revision) })
	events = o.events[i:]
	if len(events) <= limit {
		return slices.Clone(events), max(after, o.mirror.revision), true
	}
	for limit < len(events) && events[limit-1].Revision == events[limit].Revision {
		limit++ // what happened together stays together
	}
	return slices.Clone(events[:limit]), events[limit-1].Revision, true
}

func (o *Observer) inEtcd(ctx context.Context, after int64, limit int) (events []Event, next int64, err error) {
	lines := getPrefix(o.m.lineKey(""))
	for lines.After, lines.Limit = after, limit; ; lines.Limit *= 2 {
		res, err := o.m.read(ctx, lines)
		if err != nil {
			return nil, 0, err
		}
		kvs, next := res.Results[0].KVs, max(after, res.Revision)
		if len(kvs) == lines.Limit { // there may be more, also of the last revision
			end := kvs[len(kvs)-1].ModRevision
			kvs = kvs[:slices.IndexFunc(kvs, func(kv KV) bool { return kv.ModRevision == end })]
			next = end - 1
			if len(kvs) == 0 {
				continue
			}
		}
		for _, kv := range kvs {
			if e, err := decodeLine(kv); err != nil {
				o.m.broken(err)
			} else {
				events = append(events, e)
			}
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		for i, e := range events {
			events[i] = o.mirror.named(e)
		}
		return events, next, nil
	}
}

// dropped says whether events after a revision were in memory, and are no longer because
// there were too many.
func (o *Observer) dropped(after int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return after >= o.first && after < o.base
}

// A Followed is an event, or the end of a Follow.
type Followed struct {
	Event
	Err error
}

// Follow returns what has happened after a revision, as Events does, and then what
// happens, until ctx ends. It delays nobody: a reader that is so slow that what it has not
// read is no longer in memory gets a *SlowError. After an error the channel is closed.
// While etcd is away it waits.
func (o *Observer) Follow(ctx context.Context, after int64) <-chan Followed {
	out := make(chan Followed)
	leave := o.enter()
	go func() {
		defer leave()
		defer close(out)
		send := func(f Followed) bool {
			select {
			case out <- f:
				return true
			case <-ctx.Done():
				return false
			}
		}
		for caughtUp := false; ; {
			changed := o.changes()
			events, next, ok := o.inMemory(after, page)
			var err error
			switch {
			case ok:
				caughtUp = true
			case caughtUp && o.dropped(after):
				err = &SlowError{After: after}
			default:
				events, next, err = o.Events(ctx, after, page)
			}
			if err != nil {
				send(Followed{Err: err})
				return
			}
			for _, e := range events {
				if !send(Followed{Event: e}) {
					return
				}
			}
			after = next
			if len(events) > 0 || !ok {
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
