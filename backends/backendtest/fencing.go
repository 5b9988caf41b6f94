package backendtest

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// fencer returns a node's backend as a Fencer, or ends the case.
func (e *env) fencer(short string) backends.Fencer {
	e.Helper()
	f, ok := backends.As[backends.Fencer](e.node(short))
	if !ok {
		e.Skipf("class %s cannot cut a node off", e.props.Class)
	}
	return f
}

// identity returns what a node would have registered; empty if the backend has none.
func (e *env) identity(short string) string {
	e.Helper()
	i, ok := backends.As[backends.Identifier](e.node(short))
	if !ok {
		return ""
	}
	identity, err := i.Identity(e.ctx())
	if err != nil {
		e.Fatalf("identity: %v", err)
	}
	return identity
}

// cut returns the request that cuts a node off from a volume.
func (e *env) cut(short string, vol backends.Volume, token int64) backends.FenceRequest {
	e.Helper()
	return backends.FenceRequest{
		Ref: vol.Ref, Volume: vol.ID, Node: e.nodeName(short), Identity: e.identity(short), Token: token,
	}
}

// fence makes one node cut another off.
func (e *env) fence(by string, req backends.FenceRequest) {
	e.Helper()
	evidence, err := e.fencer(by).Fence(e.ctx(), req)
	if err != nil {
		e.Fatalf("fence: %v", err)
	}
	if evidence == "" || len(evidence) > 500 || strings.ContainsFunc(evidence, unicode.IsControl) {
		e.Errorf("fence: %q is no evidence for an audit line", evidence)
	}
}

// takeOver is what a node does with a volume whose owner is silent. Of class F1 it
// also does it when the cut node's last Attach came first.
func (e *env) takeOver(by string, req backends.FenceRequest, vol backends.Volume, token int64) backends.Attachment {
	e.Helper()
	for range 100 {
		e.fence(by, req)
		att, err := e.node(by).Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
		if err == nil {
			return att
		}
		attached, ok := errors.AsType[*backends.AttachedError](err)
		if !ok || (attached.Node != "" && (attached.Node != req.Node || attached.Token > req.Token)) {
			e.Fatalf("attach after the fence: %v", err)
		}
	}
	e.Fatalf("%s cannot be cut off: it attaches the volume again and again", req.Node)
	return backends.Attachment{}
}

// wantCut demands that nothing can be read or made durable through a device any
// more. Each of these must end: a process that hangs cannot be ended either.
func (e *env) wantCut(device Device, vol backends.Volume) {
	e.Helper()
	// Where nothing was read or written before, so that no cache has it.
	offset := vol.Size/4/4096*4096 + rand.Int64N(vol.Size/8/4096)*4096
	for what, f := range map[string]func() error{
		"read": func() error {
			_, err := device.ReadAt(make([]byte, 4096), offset)
			return err
		},
		"write": func() error {
			if _, err := device.WriteAt([]byte("written after the fence"), 0); err != nil {
				return err
			}
			return device.Sync()
		},
	} {
		done := make(chan error, 1)
		go func() { done <- f() }()
		select {
		case err := <-done:
			if err == nil {
				e.Errorf("a %s of the node that is cut off has succeeded", what)
			}
		case <-time.After(e.cfg.Timeout):
			e.Fatalf("a %s of the node that is cut off hangs", what)
		}
	}
}

// wantGone demands that a node has neither the attachment nor the data any more.
func (e *env) wantGone(short string, att backends.Attachment, vol backends.Volume) {
	e.Helper()
	e.wantAttached(e.node(short))
	e.wantNoData(att, vol)
}

func classOfFencer(e *env) {
	class := e.props.Class
	want := class == backends.ClassExclusive || class == backends.ClassFenced
	if _, is := backends.As[backends.Fencer](e.node("a")); is != want {
		e.Errorf("class %s: the backend is a Fencer: %t, want %t", class, is, want)
	}
	if e.props.LateCalls < 0 {
		e.Errorf("calls take effect %s late", e.props.LateCalls)
	}
}

func identityIsTheNodes(e *env) {
	if _, ok := backends.As[backends.Identifier](e.node("a")); !ok {
		e.Skipf("the storage system has no name for a node")
	}
	a := e.identity("a")
	if a == "" || strings.ContainsFunc(a, unicode.IsControl) {
		e.Errorf("identity %q is none", a)
	}
	vol := e.create(e.node("a"))
	e.attach(e.node("a"), vol, 10)
	for range 3 { // each of another instance, as after a restart
		if again := e.identity("a"); again != a {
			e.Errorf("identity %q the next time, %q the first", again, a)
		}
	}
	if b := e.identity("b"); b == a {
		e.Errorf("two nodes have the identity %q", a)
	}
}

func fenceCutsOff(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	device := e.open(att, true)
	e.fence("b", e.cut("a", vol, 10))
	e.wantCut(device, vol)
	taken := e.attach(b, vol, 11)
	e.wantAttached(b, taken)
	e.verify(taken, vol)
	e.wantCut(device, vol)
	e.verify(taken, vol)
	// What was in flight on the cut node does not arrive when it gives up either.
	_ = device.Close()
	e.verify(taken, vol)
}

func fencedNodeDetaches(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	vol, other := e.create(a), e.create(a)
	for _, opened := range []bool{false, true} {
		for i, vol := range []backends.Volume{vol, other} { // before the taker attaches, and after
			token := int64(10)
			if opened {
				token = 20
			}
			att := e.attach(a, vol, token)
			if !opened {
				e.write(att, vol)
			}
			var device Device
			if opened {
				device = e.open(att, true)
			}
			e.fence("b", e.cut("a", vol, token))
			var taken backends.Attachment
			if i == 1 {
				taken = e.attach(b, vol, token+1)
			}
			if opened {
				if err := a.Detach(e.ctx(), att); err != nil && !errors.Is(err, backends.ErrInUse) {
					e.Errorf("detach while open, after the fence: got %v, want ErrInUse or nothing", err)
				}
				_ = device.Close()
			}
			for range 2 {
				if err := a.Detach(e.ctx(), att); err != nil {
					e.Errorf("detach on the node that is cut off: %v", err)
				}
			}
			e.wantGone("a", att, vol)
			if i == 0 {
				taken = e.attach(b, vol, token+1)
			}
			e.wantAttached(b, taken)
			e.verify(taken, vol)
			e.detach(b, taken)
		}
	}
}

func fencedVolumeIsDeleted(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.fence("b", e.cut("a", vol, 10))
	taken := e.attach(b, vol, 11)
	if err := b.Delete(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrInUse) {
		e.Errorf("delete while the taker has it: got %v, want ErrInUse", err)
	}
	e.detach(b, taken)
	e.remove(b, vol)
	e.detach(a, att) // a long time later
	e.wantAttached(a)
}

func fenceAgain(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	e.write(e.attach(a, vol, 10), vol)
	req := e.cut("a", vol, 10)
	for range 3 {
		e.fence("b", req)
	}
	e.fence("c", req)
	taken := e.attach(b, vol, 11)
	for _, by := range []string{"c", "b", "a"} { // one whose answer was lost
		e.fence(by, req)
	}
	e.wantAttached(b, taken)
	e.verify(taken, vol)
	e.write(taken, vol)
}

func fenceSparesTheYounger(e *env) {
	e.fencer("b")
	a := e.node("a")
	vol := e.create(a)
	att := e.attach(a, vol, 20)
	device := e.open(att, false)
	for _, token := range []int64{1, 19} {
		e.fence("b", e.cut("a", vol, token))
		e.wantAttached(a, att)
		e.write(att, vol)
		e.verify(att, vol)
		if again := e.attach(a, vol, 20); again != att {
			e.Errorf("got %+v after the fence of an older token, %+v before", again, att)
		}
	}
	e.fence("b", e.cut("a", vol, 25)) // and every older one
	e.wantCut(device, vol)
}

func fenceSparesOthers(e *env) {
	e.fencer("b")
	a, c := e.node("a"), e.node("c")
	vol, second, third := e.create(a), e.create(a), e.create(a)
	att := e.attach(a, vol, 10)
	mine, theirs := e.attach(a, second, 10), e.attach(c, third, 10)
	spared := map[backends.Attachment]backends.Volume{mine: second, theirs: third}
	if !e.props.ExclusiveAttach {
		spared[e.attach(c, vol, 9)] = vol
	}
	for att, vol := range spared {
		e.write(att, vol)
	}
	e.fence("b", e.cut("b", vol, 99))
	e.fence("b", e.cut("d", vol, 99))
	device := e.open(att, false)
	e.write(att, vol)
	e.fence("b", e.cut("a", vol, 10))
	e.wantCut(device, vol)
	for att, vol := range spared {
		e.write(att, vol)
		e.verify(att, vol)
	}
	if again := e.attach(a, second, 10); again != mine {
		e.Errorf("got %+v after the fence for another volume, %+v before", again, mine)
	}
}

// staleAttach is an Attach of a cut-off node that arrives late. It may succeed in
// class F1 as long as nobody else has attached the volume.
func (e *env) staleAttach(vol backends.Volume, token int64, taken bool) (backends.Attachment, bool) {
	e.Helper()
	a := e.node("a")
	att, err := a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
	switch {
	case err == nil && e.props.Class == backends.ClassExclusive && !taken:
		return att, true
	case err == nil:
		e.Errorf("the cut-off node has attached the volume again with token %d", token)
	case !errors.Is(err, backends.ErrInUse):
		e.Errorf("attach with the token that is cut off: got %v, want ErrInUse", err)
	}
	return att, false
}

func fencePreventsAttach(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	for _, before := range []bool{false, true} { // was it ever attached with this token?
		vol := e.create(a)
		att := e.attach(b, vol, 1)
		e.write(att, vol)
		e.detach(b, att)
		if before {
			e.detach(a, e.attach(a, vol, 10))
		}
		req := e.cut("a", vol, 10)
		e.fence("b", req)
		e.fence("c", e.cut("a", vol, 5)) // which takes nothing back
		for _, token := range []int64{10, 9} {
			stale, ok := e.staleAttach(vol, token, false)
			if !ok {
				continue
			}
			device := e.open(stale, false)
			_, err := b.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
			e.wantAttachedError(err, vol, e.nodeName("a"), token)
			e.fence("b", req)
			e.wantCut(device, vol)
			_ = device.Close()
			e.detach(a, stale)
		}
		taken := e.attach(b, vol, 11)
		for _, token := range []int64{10, 9} {
			e.staleAttach(vol, token, true)
		}
		e.wantAttached(a)
		e.wantAttached(b, taken)
		e.verify(taken, vol)
		e.detach(b, taken)
		// The node itself is as good as any other, once it owns the volume again.
		back := e.attach(a, vol, 12)
		e.verify(back, vol)
		e.fence("b", req)
		e.write(back, vol)
		e.detach(a, back)
	}
}

func fenceNothingLater(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	vol, back := e.create(a), e.create(a)
	old := map[string]backends.Attachment{vol.ID: e.attach(a, vol, 10), back.ID: e.attach(a, back, 10)}
	e.fence("b", e.cut("a", vol, 10))
	e.fence("b", e.cut("a", back, 10))
	e.detach(a, old[back.ID])
	taken, own := e.attach(b, vol, 11), e.attach(a, back, 12)
	for range 5 {
		e.write(taken, vol)
		e.write(own, back)
		time.Sleep(20 * time.Millisecond)
	}
	e.verify(taken, vol)
	e.verify(own, back)
	e.wantAttached(b, taken)
}

func fenceUnknown(e *env) {
	f := e.fencer("b")
	a, gone := e.node("a"), e.unknown()
	evidence, err := f.Fence(e.ctx(), e.cut("a", gone, 10))
	if !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("fence: got %q, %v; want ErrNotFound", evidence, err)
	}
	vol, other := e.create(a), e.create(a)
	att, att2 := e.attach(a, vol, 10), e.attach(a, other, 10)
	req := e.cut("a", vol, 10)
	req.Volume = other.ID
	if evidence, err = f.Fence(e.ctx(), req); !errors.Is(err, backends.ErrInvalid) {
		e.Errorf("fence %s as volume %s: got %q, %v; want ErrInvalid", vol.Ref, other.ID, evidence, err)
	}
	e.write(att, vol)
	e.write(att2, other)
	e.verify(att, vol)
	e.verify(att2, other)
}

func fenceAnotherCluster(e *env) {
	f := e.fencer("b")
	other := uuid.NewString()
	e.clusters = append(e.clusters, other)
	theirs := e.storage.Node(other, e.nodeName("a"))
	req := e.request()
	req.Cluster = other
	vol, err := theirs.Create(e.ctx(), req)
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	att := e.attach(theirs, vol, 10)
	evidence, err := f.Fence(e.ctx(), e.cut("a", vol, 10))
	if !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("fence: got %q, %v; want ErrNotFound", evidence, err)
	}
	e.write(att, vol)
	e.verify(att, vol)
}

// unheard says that err is what a call fails with that got no answer.
func unheard(ctx context.Context, err error) bool {
	return errors.Is(err, backends.ErrUnavailable) || (ctx.Err() != nil && errors.Is(err, ctx.Err()))
}

func fenceCancelled(e *env) {
	f := e.fencer("b")
	a := e.node("a")
	for round := range 10 {
		vol := e.create(a)
		device := e.open(e.attach(a, vol, 10), false)
		req := e.cut("a", vol, 10)
		ctx, cancel := context.WithTimeout(e.ctx(), rand.N(2*time.Millisecond))
		if round == 0 {
			cancel()
		}
		_, err := f.Fence(ctx, req)
		switch {
		case err != nil && !unheard(ctx, err):
			e.Errorf("fence: %v", err)
		case err == nil && round == 0:
			e.Errorf("fence with a cancelled context: got no error, want context.Canceled or ErrUnavailable")
		case err == nil:
			e.wantCut(device, vol)
		}
		cancel()
		e.fence("b", req)
		e.wantCut(device, vol)
	}
}

// meanwhile makes a call, and closes done after it. The case does not end before.
func (e *env) meanwhile(call func(ctx context.Context)) (done <-chan struct{}) {
	ctx, ended := e.ctx(), make(chan struct{})
	go func() {
		defer close(ended)
		call(ctx)
	}()
	e.Cleanup(func() { <-ended })
	return ended
}

// attachUntil attaches a volume on node b, which may be refused until done.
func (e *env) attachUntil(done <-chan struct{}, vol backends.Volume, token int64) backends.Attachment {
	e.Helper()
	for last := false; ; time.Sleep(100 * time.Microsecond) {
		select {
		case <-done:
			last = true
		default:
		}
		att, err := e.node("b").Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
		if err == nil {
			return att
		}
		if last || !errors.Is(err, backends.ErrInUse) {
			e.Fatalf("attach after the fence: %v", err)
		}
	}
}

func fenceRacesTheTaker(e *env) {
	other := e.fencer("c")
	a, b := e.node("a"), e.node("b")
	for range 20 {
		vol := e.create(a)
		device := e.open(e.attach(a, vol, 10), false)
		req := e.cut("a", vol, 10)
		var failed error
		done := e.meanwhile(func(ctx context.Context) { _, failed = other.Fence(ctx, req) })
		var taken backends.Attachment
		if e.props.Class == backends.ClassExclusive { // Attach itself waits for the cut
			taken = e.attachUntil(done, vol, 11)
		} else {
			taken = e.takeOver("b", req, vol, 11)
		}
		e.wantCut(device, vol)
		if <-done; failed != nil {
			e.Fatalf("fence: %v", failed)
		}
		e.wantAttached(b, taken)
		e.detach(b, taken)
	}
}

func fenceRacesAttach(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	for range 20 {
		vol := e.create(a)
		req := e.cut("a", vol, 10)
		var stale backends.Attachment
		var err error
		done := e.meanwhile(func(ctx context.Context) {
			stale, err = a.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
		})
		taken := e.takeOver("b", req, vol, 11)
		<-done
		e.wantAttached(b, taken)
		e.write(taken, vol)
		if err == nil {
			if device, err := e.tryOpen(stale, false); err == nil {
				e.wantCut(device, vol)
				_ = device.Close()
			}
			e.detach(a, stale)
		}
		e.wantAttached(a)
		e.verify(taken, vol)
		e.detach(b, taken)
	}
}

func fenceRacesDetach(e *env) {
	e.fencer("b")
	a, b := e.node("a"), e.node("b")
	for range 20 {
		vol := e.create(a)
		att := e.attach(a, vol, 10)
		e.write(att, vol)
		var err error
		done := e.meanwhile(func(ctx context.Context) { err = a.Detach(ctx, att) })
		e.fence("b", e.cut("a", vol, 10))
		<-done
		if err != nil {
			e.Errorf("detach: %v", err)
		}
		e.wantAttached(a)
		e.verify(e.attach(b, vol, 11), vol)
	}
}

func storageDown(e *env) {
	if e.storage.Down == nil {
		e.Skipf("the storage system cannot be made to fail")
	}
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	f, fences := backends.As[backends.Fencer](b)
	req := e.cut("a", vol, 10)
	calls := map[string]func(ctx context.Context) error{
		"get":    func(ctx context.Context) error { _, err := b.Get(ctx, vol.Ref); return err },
		"list":   func(ctx context.Context) error { _, err := b.List(ctx); return err },
		"delete": func(ctx context.Context) error { return b.Delete(ctx, vol.Ref) },
		"create": func(ctx context.Context) error { _, err := b.Create(ctx, e.request()); return err },
		"attach": func(ctx context.Context) error {
			_, err := b.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
			return err
		},
	}
	if fences {
		calls["fence"] = func(ctx context.Context) error { _, err := f.Fence(ctx, req); return err }
	}
	e.Cleanup(func() { e.storage.Down(false) }) // also after a case that ended early
	e.storage.Down(true)
	for name, call := range calls {
		ctx, cancel := context.WithTimeout(e.ctx(), e.cfg.Timeout/10)
		if err := call(ctx); !unheard(ctx, err) {
			e.Errorf("%s while the storage system is down: got %v, want ErrUnavailable", name, err)
		}
		cancel()
	}
	e.storage.Down(false)
	e.wantList(b, vol)
	if fences {
		e.verify(e.takeOver("b", req, vol, 11), vol)
	}
}
