package backendtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
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
			stop := e.storage.Faults[name](n)
			l := life{e, fmt.Sprintf("%s, request %d", name, n), map[string]backends.Backend{}}
			l.run()
			if !stop() {
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
	fault     string
	processes map[string]backends.Backend // by the node's short name
}

func (l life) on(short string) backends.Backend {
	if l.processes[short] == nil {
		l.processes[short] = l.node(short)
	}
	return l.processes[short]
}

// again makes a call until it succeeds. It may fail with nothing but that it got no answer,
// and not for ever.
func (l life) again(what string, call func(ctx context.Context) error) {
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

func (l life) attach(short string, vol backends.Volume, token int64) backends.Attachment {
	l.Helper()
	att := backends.Attachment{}
	l.again("attach", func(ctx context.Context) (err error) {
		att, err = l.on(short).Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
		return err
	})
	l.attached(short, att)
	return att
}

// attached demands that exactly these attachments are the node's.
func (l life) attached(short string, want ...backends.Attachment) {
	l.Helper()
	l.again("attachments", func(ctx context.Context) error {
		got, err := l.on(short).Attachments(ctx)
		if err == nil && !slices.Equal(got, want) {
			l.Errorf("%s: attachments: got %+v, want %+v", l.fault, got, want)
		}
		return err
	})
}

func (l life) detach(short string, att backends.Attachment) {
	l.Helper()
	l.again("detach", func(ctx context.Context) error { return l.on(short).Detach(ctx, att) })
	l.attached(short)
}

// listed demands that exactly these volumes exist.
func (l life) listed(want ...backends.Volume) {
	l.Helper()
	l.again("list", func(ctx context.Context) error {
		got, err := l.on("a").List(ctx)
		if err == nil && !slices.Equal(got, want) {
			l.Errorf("%s: list: got %s, want %s", l.fault, brief(got), brief(want))
		}
		return err
	})
}

func (l life) run() {
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

// takeOver cuts node b off, which has the volume open, and lets node a have it for a while.
func (l life) takeOver(att backends.Attachment, vol backends.Volume) {
	device := l.open(att, false)
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: att.Node, Token: att.Token}
	l.again("identity", func(ctx context.Context) (err error) {
		if b, ok := backends.As[backends.Identifier](l.on("b")); ok {
			req.Identity, err = b.Identity(ctx)
		}
		return err
	})
	l.again("fence", func(ctx context.Context) error {
		f, _ := backends.As[backends.Fencer](l.on("a"))
		_, err := f.Fence(ctx, req)
		return err
	})
	l.wantCut(device, vol)
	_ = device.Close()
	taken := l.attach("a", vol, att.Token+1)
	l.verify(taken, vol)
	l.detach("a", taken)
}
