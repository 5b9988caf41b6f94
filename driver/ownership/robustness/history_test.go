package robustness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// perVolume is how many calls a history has of one volume: more take the checker
// too long.
const perVolume = 200

// history is what the nodes asked for and were told.
type history struct {
	prefix string // of the own keys
	begin  time.Time

	mu     sync.Mutex
	calls  []call
	counts map[string]int // by volume
	faults []porcupine.Annotation
}

// call is one of them.
type call struct {
	in       input
	out      output
	from, to int64
	client   int
	sent     *sent
	err      error
}

func newHistory(prefix string) *history {
	return &history{prefix: prefix + "/v1/own/", begin: time.Now(), counts: map[string]int{}}
}

func (h *history) now() int64 { return int64(time.Since(h.begin)) }

// full says whether there is enough of a volume.
func (h *history) full(volume string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.counts[volume] >= perVolume
}

// record makes a call and writes down what came of it. Without an error that is
// what do returns.
func (h *history) record(ctx context.Context, client int, in input, do func(context.Context) (output, error)) (output, error) {
	s := &sent{}
	from := h.now()
	out, err := do(context.WithValue(ctx, sentKey{}, s))
	to := h.now()
	if err != nil {
		out = told(err)
	}
	if !s.any && out.Outcome == unknown {
		return out, err // the node did not even ask
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[in.Volume]++
	h.calls = append(h.calls, call{in: in, out: out, from: from, to: to, client: client, sent: s, err: err})
	return out, err
}

// told is what an error says about the volume.
func told(err error) output {
	var held *ownership.HeldError
	switch {
	case errors.As(err, &held):
		return sees(&held.Owner)
	case errors.Is(err, ownership.ErrLost):
		return output{Outcome: lost}
	case errors.Is(err, ownership.ErrConflict):
		return output{Outcome: refused}
	}
	return output{Outcome: unknown}
}

func sees(o *ownership.Owner) output {
	if o == nil {
		return output{Outcome: seen}
	}
	return output{Outcome: seen, Holder: o.Node, Token: o.Token, Pending: o.Pending != nil}
}

// fault writes down that a fault lasted from then until now.
func (h *history) fault(what string, from int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, porcupine.Annotation{Tag: "faults", Description: what, Start: from, End: h.now()})
}

// sent is what a call sent to etcd.
type sent struct {
	any   bool
	ops   []string // the operation ids of what it would write to the own key
	times int      // transactions that would change the own key
}

type sentKey struct{}

// tap is a Store that notes what is sent.
type tap struct {
	ownership.Store

	prefix string
}

func (t tap) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	if s, ok := ctx.Value(sentKey{}).(*sent); ok {
		s.any = true
		for _, op := range txn.Then {
			switch {
			case !strings.HasPrefix(op.Key, t.prefix):
			case op.Kind == ownership.OpPut:
				s.ops = append(s.ops, written(op.Value).Op)
				s.times++
			case op.Kind == ownership.OpDelete:
				s.times++
			}
		}
	}
	return t.Store.Txn(ctx, txn)
}

func written(value []byte) ownership.Owner {
	var o ownership.Owner
	if err := json.Unmarshal(value, &o); err != nil {
		panic(fmt.Sprintf("own value %s: %v", value, err))
	}
	return o
}

// log is what etcd says has happened to the own keys. It tells of a call with an
// unknown outcome whether it took effect, and not later than when; what is told
// to the nodes is not believed because of it.
type log struct {
	mu      sync.Mutex
	next    int64                 // the revision to go on from
	done    map[string][]entry    // by operation id; of a claim there may be more than one
	ended   map[volumeToken]int64 // when the deletion of a tenure was seen
	tenures map[string]int64      // the token of a volume that is owned
	ends    chan struct{}
	err     error
}

// entry is that something was done, and when that was seen.
type entry struct {
	token int64
	seen  int64
}

type volumeToken struct {
	volume string
	token  int64
}

// follow writes the log until its end is reached.
func follow(ctx context.Context, store ownership.Store, h *history) (*log, error) {
	res, err := store.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: h.prefix + last}}})
	if err != nil {
		return nil, err
	}
	l := &log{next: res.Revision + 1, done: map[string][]entry{}, ended: map[volumeToken]int64{}, tenures: map[string]int64{}, ends: make(chan struct{})}
	go func() {
		defer close(l.ends)
		for ctx.Err() == nil {
			watch, cancel := context.WithCancel(ctx)
			for res := range store.Watch(watch, h.prefix, true, l.revision()+1) {
				if errors.Is(res.Err, ownership.ErrCompacted) {
					cancel()
					l.err = res.Err
					return
				}
				if l.add(res, h) {
					cancel()
					return
				}
			}
			cancel()
			time.Sleep(20 * time.Millisecond)
		}
		l.err = ctx.Err()
	}()
	return l, nil
}

// last is the name under the prefix that ends a log.
const last = "~"

// add says whether the end is reached.
func (l *log) add(res ownership.WatchResult, h *history) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ev := range res.Events {
		l.next = ev.KV.ModRevision + 1
		volume := strings.TrimPrefix(ev.KV.Key, h.prefix)
		switch {
		case volume == last:
			return true
		case ev.Deleted:
			l.ended[volumeToken{volume, l.tenures[volume]}] = h.now()
			delete(l.tenures, volume)
		default:
			op := written(ev.KV.Value).Op
			l.done[op] = append(l.done[op], entry{token: ev.KV.ModRevision, seen: h.now()})
			l.tenures[volume] = ev.KV.ModRevision
		}
	}
	return false
}

// revision is up to which everything is in the log.
func (l *log) revision() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next - 1
}

// end waits for everything that has happened until now.
func (l *log) end(ctx context.Context, store ownership.Store, h *history) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		_, err := store.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: h.prefix + last, Value: []byte("{}")}}})
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	select {
	case <-l.ends:
		return l.err
	case <-ctx.Done():
		return errors.New("the log of what happened has no end")
	}
}

// operations is the history for the checker. Of what the nodes were not told, the
// log says what happened: as etcd's own tests do it, and for the same reason: with
// too many calls that may have happened at any time the checker does not end.
func (h *history) operations(l *log) (ops []porcupine.Operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	alone := 100 // calls that do not end share no line of the picture
	for _, c := range h.calls {
		add := func(client int, out output, to int64) {
			ops = append(ops, porcupine.Operation{ClientId: client, Input: c.in, Output: out, Call: c.from, Return: max(to, c.from)})
		}
		later := func(out output, to int64) {
			alone++
			add(alone, out, to)
		}
		if c.out.Outcome == done && c.in.Call == handOver {
			// It is not told the new token. 0, if it is not in the log, is not one.
			for _, e := range l.effects(c) {
				c.out.Token = e.token
			}
		}
		for _, e := range l.effects(c) {
			// A claim that was sent twice may be done twice: the second time later, when
			// the volume is free again. Of the rest, the model allows one only.
			if c.out.Outcome == done && c.out.Token == e.token {
				continue
			}
			later(output{Token: e.token}, e.seen)
			if c.out.Outcome != done && c.out.Own == 0 {
				c.out.Own = e.token
			}
		}
		if (c.in.Call == release || c.in.Call == handOver) && (c.out.Outcome == unknown || c.sent.times > 1) {
			if at, ok := l.ended[volumeToken{c.in.Volume, c.in.Token}]; ok {
				later(output{Outcome: perhaps}, at)
			}
		}
		if c.out.Outcome != unknown && c.out.Outcome != refused {
			add(c.client, c.out, c.to)
		}
	}
	return ops
}

// effects are what a call has done to the own key.
func (l *log) effects(c call) (effects []entry) {
	for _, op := range slices.Compact(slices.Clone(c.sent.ops)) {
		effects = append(effects, l.done[op]...)
	}
	return effects
}

// verdict asks the checker. After a rejection, picture is a file that shows it.
func (h *history) verdict(l *log, name string) (result porcupine.CheckResult, picture string, err error) {
	ops := h.operations(l)
	result, info := porcupine.CheckOperationsVerbose(model, ops, 30*time.Second)
	if result == porcupine.Ok {
		return result, "", nil
	}
	info.AddAnnotations(h.faults)
	picture = filepath.Join(os.TempDir(), fmt.Sprintf("flocker-robustness-%s-%d.html", strings.ReplaceAll(name, "/", "-"), os.Getpid()))
	return result, picture, porcupine.VisualizePath(model, info, picture)
}

// check fails the test if the history is not one that one map in one place could
// have had.
func (h *history) check(t *testing.T, l *log) {
	t.Helper()
	switch result, picture, err := h.verdict(l, t.Name()); {
	case result == porcupine.Ok:
	case err != nil:
		t.Errorf("the checker says %s to the history; it cannot be drawn: %v", result, err)
	default:
		t.Errorf("the checker says %s to the history; open %s", result, picture)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.calls {
		if c.out.Outcome == unknown && !errors.Is(c.err, ownership.ErrUnavailable) {
			t.Errorf("%s: %v", describe(c.in, c.out), c.err)
		}
	}
}

// tally counts the calls by what came of them.
func (h *history) tally() map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := map[string]int{}
	for _, c := range h.calls {
		n["calls"]++
		switch c.out.Outcome {
		case unknown:
			n["unknown"]++
		case done, freed:
			n[c.in.Call]++
		case seen, notMine, lost, perhaps, refused:
		}
	}
	return n
}
