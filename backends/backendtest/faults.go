package backendtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// mostRequests is more than any storage system needs for the calls of a life.
const mostRequests = 500

// everyRequestFails lets each request of a volume's life suffer each fault, one at a time.
func everyRequestFails(e *env) {
	if e.storage.Faults == nil {
		e.Skipf("the requests to the storage system cannot be made to fail")
	}
	for _, name := range slices.Sorted(maps.Keys(e.storage.Faults)) {
		for n := range mostRequests {
			struck := sync.OnceValue(e.storage.Faults[name](n))
			l := life{env: e, fault: fmt.Sprintf("%s, request %d", name, n), struck: struck, processes: map[string]backends.Backend{}}
			l.run()
			if !struck() {
				break
			}
			if n == mostRequests-1 {
				e.Errorf("%s: there is no end of requests", name)
			}
			if e.Failed() {
				return
			}
		}
	}
}

// life is that of a volume which is made, moves, is taken over, and is deleted. When a call
// gets no answer, the processes of all nodes die, and others make it again.
type life struct {
	*env
	fault string
	// struck takes the fault back, and says whether a request has suffered it.
	struck    func() bool
	processes map[string]backends.Backend // by the node's short name
	had       []attachee
	settled   bool // see stale
}

// attachee is who was to have the volume, in the order of tokens.
type attachee struct {
	short string
	token int64
}

func (l *life) on(short string) backends.Backend {
	if l.processes[short] == nil {
		l.processes[short] = l.node(short)
	}
	return l.processes[short]
}

// again makes a call until it succeeds. It may fail with nothing but that it got no answer,
// and not for ever.
func (l *life) again(what string, call func(ctx context.Context) error) {
	l.Helper()
	limit := l.cfg.Timeout / 10
	for range 5 {
		ctx, cancel := context.WithTimeout(l.Context(), limit)
		err := call(ctx)
		heard := err != nil && !unheard(ctx, err)
		cancel()
		switch {
		case err == nil:
			return
		case heard:
			l.Fatalf("%s: %s: got %v, want ErrUnavailable", l.fault, what, err)
		}
		l.Logf("%s: %s: %v", l.fault, what, err)
		limit = l.cfg.Timeout
		clear(l.processes)
		// What nobody waits for any more may come yet, and hit what comes next.
		time.Sleep(l.storage.Late)
	}
	l.Fatalf("%s: %s fails for ever", l.fault, what)
}

func (l *life) attach(short string, vol backends.Volume, token int64) backends.Attachment {
	l.Helper()
	for {
		att, other := backends.Attachment{}, (*attachee)(nil)
		l.again("attach", func(ctx context.Context) (err error) {
			att, err = l.on(short).Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
			if other = l.stale(short, vol, err); other != nil {
				return nil
			}
			return err
		})
		if other == nil {
			l.had = append(l.had, attachee{short, token})
			l.attached(short, att)
			return att
		}
		l.cutOff(short, other.short, vol, other.token)
	}
}

// stale returns whose attachment keeps an Attach from the volume, if the next thing to do is
// to cut that one off, as the driver does. Of a node that has detached the volume this is so
// in class F2 alone, where the backend itself has noted who has it: of an end that was not
// heard nobody can tell whether it was one. Storage that gives a volume to one node at a time
// can. One fault leaves one such note, and none leaves none.
func (l *life) stale(short string, vol backends.Volume, err error) *attachee {
	other, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || l.props.Class != backends.ClassFenced || other.Volume != vol.ID || l.settled || !l.struck() {
		return nil
	}
	i := slices.IndexFunc(l.had, func(a attachee) bool {
		return a.short != short && l.nodeName(a.short) == other.Node && a.token == other.Token
	})
	if i < 0 {
		return nil
	}
	l.settled = true
	return &l.had[i]
}

// attached demands that exactly these attachments are the node's.
func (l *life) attached(short string, want ...backends.Attachment) {
	l.Helper()
	l.again("attachments", func(ctx context.Context) error {
		got, err := l.on(short).Attachments(ctx)
		if err == nil && !slices.Equal(got, want) {
			l.Errorf("%s: attachments: got %+v, want %+v", l.fault, got, want)
		}
		return err
	})
}

func (l *life) detach(short string, att backends.Attachment) {
	l.Helper()
	l.again("detach", func(ctx context.Context) error { return l.on(short).Detach(ctx, att) })
	l.attached(short)
}

// listed demands that exactly these volumes exist, besides what is half made, which may have
// come late.
func (l *life) listed(want ...backends.Volume) {
	l.Helper()
	l.again("list", func(ctx context.Context) error {
		got, err := l.on("a").List(ctx)
		got = slices.DeleteFunc(got, func(v backends.Volume) bool { return v.Cluster == "" })
		if err == nil && !slices.Equal(got, want) {
			l.Errorf("%s: list: got %s, want %s", l.fault, brief(got), brief(want))
		}
		return err
	})
}

func (l *life) run() {
	req, vol := l.request(), backends.Volume{}
	l.again("create", func(ctx context.Context) (err error) {
		vol, err = l.on("a").Create(ctx, req)
		return err
	})
	l.listed(vol)
	l.again("get", func(ctx context.Context) error {
		got, err := l.on("a").Get(ctx, vol.Ref)
		if err == nil && got != vol {
			l.Errorf("%s: get: got %+v, want %+v", l.fault, got, vol)
		}
		return err
	})

	att := l.attach("a", vol, 10)
	l.write(att, vol)
	l.detach("a", att)
	att = l.attach("b", vol, 11)
	l.verify(att, vol)
	if _, ok := backends.As[backends.Fencer](l.on("a")); ok {
		l.takeOver(att, vol)
	}
	l.detach("b", att)
	l.again("delete", func(ctx context.Context) error {
		if err := l.on("a").Delete(ctx, vol.Ref); !errors.Is(err, backends.ErrNotFound) {
			return err
		}
		return nil // an earlier try has done it, or a request that was sent again
	})
	l.listed()
}

// cutOff makes a node cut another one off.
func (l *life) cutOff(by, short string, vol backends.Volume, token int64) {
	l.Helper()
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: l.nodeName(short), Token: token}
	l.again("identity", func(ctx context.Context) (err error) {
		if b, ok := backends.As[backends.Identifier](l.on(short)); ok {
			req.Identity, err = b.Identity(ctx)
		}
		return err
	})
	l.again("fence", func(ctx context.Context) error {
		f, _ := backends.As[backends.Fencer](l.on(by))
		_, err := f.Fence(ctx, req)
		return err
	})
}

// takeOver cuts node b off, which has the volume open, and lets node a have it for a while.
func (l *life) takeOver(att backends.Attachment, vol backends.Volume) {
	device := l.open(att, false)
	l.cutOff("a", "b", vol, att.Token)
	l.wantCut(device, vol)
	_ = device.Close()
	taken := l.attach("a", vol, att.Token+1)
	l.verify(taken, vol)
	l.detach("a", taken)
}
