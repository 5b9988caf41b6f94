package backendtest_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// recorder is a T that keeps to itself what a case says.
type recorder struct {
	t *testing.T

	mu       sync.Mutex
	messages []string
	cleanups []func()
}

func (r *recorder) Helper()                  {}
func (r *recorder) Name() string             { return r.t.Name() }
func (r *recorder) Context() context.Context { return r.t.Context() }
func (r *recorder) TempDir() string          { return r.t.TempDir() }
func (r *recorder) Logf(string, ...any)      {}
func (r *recorder) Skipf(string, ...any)     { runtime.Goexit() }

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.messages) > 0
}

// record runs one case and returns what it complained about.
func record(t *testing.T, c backendtest.Case, cfg backendtest.Config) []string {
	t.Helper()
	r := &recorder{t: t}
	run := func(f func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			f()
		}()
		<-done
	}
	run(func() { c.Run(r, cfg) })
	for _, f := range slices.Backward(r.cleanups) {
		run(f)
	}
	return r.messages
}

// backend is a node's backend of which some methods are replaced; each gets the
// sound backend to work with.
type backend struct {
	backends.Backend // the sound one
	m                *backendtest.Memory
	cluster, node    string

	properties  func(b *backend) backends.Properties
	create      func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error)
	remove      func(b *backend, ctx context.Context, ref string) error
	get         func(b *backend, ctx context.Context, ref string) (backends.Volume, error)
	list        func(b *backend, ctx context.Context) ([]backends.Volume, error)
	attach      func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error)
	detach      func(b *backend, ctx context.Context, att backends.Attachment) error
	attachments func(b *backend, ctx context.Context) ([]backends.Attachment, error)
	resize      func(b *backend, ctx context.Context, ref string, size int64) (int64, error)
	fence       func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error)
	identity    func(b *backend, ctx context.Context) (string, error)

	*notes

	mu   sync.Mutex
	atts []backends.Attachment
}

// notes are what the backends of all nodes know.
type notes struct {
	fenced sync.Map // by note
	mu     sync.Mutex
}

type note struct{ volume, node string }

func (b *backend) Properties() backends.Properties {
	if b.properties != nil {
		return b.properties(b)
	}
	return b.Backend.Properties()
}

func (b *backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	if b.create != nil {
		return b.create(b, ctx, req)
	}
	return b.Backend.Create(ctx, req)
}

func (b *backend) Delete(ctx context.Context, ref string) error {
	if b.remove != nil {
		return b.remove(b, ctx, ref)
	}
	return b.Backend.Delete(ctx, ref)
}

func (b *backend) Get(ctx context.Context, ref string) (backends.Volume, error) {
	if b.get != nil {
		return b.get(b, ctx, ref)
	}
	return b.Backend.Get(ctx, ref)
}

func (b *backend) List(ctx context.Context) ([]backends.Volume, error) {
	if b.list != nil {
		return b.list(b, ctx)
	}
	return b.Backend.List(ctx)
}

func (b *backend) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	if b.attach != nil {
		return b.attach(b, ctx, req)
	}
	return b.Backend.Attach(ctx, req)
}

func (b *backend) Detach(ctx context.Context, att backends.Attachment) error {
	if b.detach != nil {
		return b.detach(b, ctx, att)
	}
	return b.Backend.Detach(ctx, att)
}

func (b *backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	if b.attachments != nil {
		return b.attachments(b, ctx)
	}
	return b.Backend.Attachments(ctx)
}

func (b *backend) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	if b.resize != nil {
		return b.resize(b, ctx, ref, size)
	}
	return b.Backend.(backends.Resizer).Resize(ctx, ref, size)
}

// fencing is a backend that is a Fencer as well.
type fencing struct{ *backend }

func (b fencing) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	if b.fence != nil {
		return b.fence(b.backend, ctx, req)
	}
	return b.sound(ctx, req)
}

func (b fencing) Identity(ctx context.Context) (string, error) {
	if b.identity != nil {
		return b.identity(b.backend, ctx)
	}
	return b.Backend.(backends.Identifier).Identity(ctx)
}

// sound is the Fence of the sound backend.
func (b *backend) sound(ctx context.Context, req backends.FenceRequest) (string, error) {
	return b.Backend.(backends.Fencer).Fence(ctx, req)
}

// cut makes the sound backend cut off whoever has an attachment.
func (b *backend) cut(ctx context.Context, att backends.Attachment) {
	_, _ = b.sound(ctx, backends.FenceRequest{
		Ref: att.Ref, Volume: att.Volume, Node: att.Node, Identity: "host-" + att.Node, Token: att.Token,
	})
}

// later makes b do something to a volume that was fenced once, some time after its
// next Attach.
func (b *backend) later(do func(b *backend, ctx context.Context, att backends.Attachment)) {
	b.fence = func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
		b.fenced.Store(note{req.Volume, ""}, true)
		b.fenced.Store(note{req.Volume, req.Node}, true)
		return b.sound(ctx, req)
	}
	b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
		att, err := b.Backend.Attach(ctx, req)
		if _, ok := b.fenced.Load(note{req.Volume, ""}); ok && err == nil {
			time.AfterFunc(10*time.Millisecond, func() { do(b, context.WithoutCancel(ctx), att) })
		}
		return att, err
	}
}

// on is the sound backend of another node.
func (b *backend) on(node string) backends.Backend { return b.m.NodeIn(b.cluster, node) }

// rip takes every attachment of a volume away, in use or not.
func (b *backend) rip(ctx context.Context, volume string) {
	for _, att := range b.m.Attached(volume) {
		_ = b.on("robber").Detach(ctx, att)
	}
}

// A defect is a mistake somebody could make in a backend.
type defect struct {
	name string
	// notice is part of the complaint that the suite must make.
	notice string
	props  backends.Properties
	// many is Config.Many, 0 for few.
	many int
	// timeout is Config.Timeout, 0 for 5 s.
	timeout time.Duration
	// requests makes each of the storage system's requests fail, which takes long.
	requests bool
	// misfit makes the backend a Fencer where its class says that it is none, and
	// the other way round.
	misfit bool
	// device replaces a device that was opened.
	device func(d backendtest.Device) backendtest.Device
	break_ func(b *backend) //nolint:revive // "break" is a keyword
}

var (
	f0 = backends.Properties{Class: backends.ClassNone, ExclusiveAttach: true}
	f2 = backends.Properties{Class: backends.ClassFenced}
	// noting is what a noter is.
	noting = backends.Properties{Class: backends.ClassFenced, ExclusiveAttach: true}
)

func defects() []defect {
	return append(slices.Concat(fencingDefects(), silences()), []defect{
		{name: "create makes another volume each time", notice: "the next time", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				id := req.ID
				req.ID = uuid.NewString()
				vol, err := b.Backend.Create(ctx, req)
				vol.ID = id
				return vol, err
			}
		}},
		{name: "create ignores another size", notice: "want ErrExists", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				vol, err := b.Backend.Create(ctx, req)
				if errors.Is(err, backends.ErrExists) {
					return b.Backend.Get(ctx, "m-"+req.ID)
				}
				return vol, err
			}
		}},
		{name: "create replaces the volume", notice: "checksum", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				atts := b.m.Attached(req.ID)
				b.rip(ctx, req.ID)
				_ = b.Backend.Delete(ctx, "m-"+req.ID)
				vol, err := b.Backend.Create(ctx, req)
				for _, att := range atts {
					_, _ = b.on(att.Node).Attach(ctx, backends.AttachRequest{Ref: att.Ref, Volume: att.Volume, Token: att.Token})
				}
				return vol, err
			}
		}},
		{name: "create tells the size asked for", notice: "asked for", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				vol, err := b.Backend.Create(ctx, req)
				vol.Size = req.Size
				return vol, err
			}
		}},
		{name: "create makes too small a volume", notice: "asked for", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				size := req.Size
				req.Size = size / 2
				vol, err := b.Backend.Create(ctx, req)
				vol.Size = size
				return vol, err
			}
		}},
		{name: "create loses the name", notice: "got {Ref:", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				req.Name = ""
				return b.Backend.Create(ctx, req)
			}
		}},
		{name: "create refuses long names", notice: "create \"nnn", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				if len(req.Name) > 63 {
					return backends.Volume{}, backends.ErrInvalid
				}
				return b.Backend.Create(ctx, req)
			}
		}},
		{name: "create leaves an orphan when cancelled", notice: "list: got", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				time.Sleep(time.Millisecond)
				if ctx.Err() != nil {
					orphan := req
					orphan.ID = uuid.NewString()
					_, _ = b.Backend.Create(context.WithoutCancel(ctx), orphan)
				}
				return b.Backend.Create(ctx, req)
			}
		}},
		{name: "create looks first and makes then", notice: "another", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				vols, err := b.Backend.List(ctx)
				if err != nil {
					return backends.Volume{}, err
				}
				for _, vol := range vols {
					if strings.HasPrefix(vol.Name, req.ID) {
						vol.ID, vol.Name = req.ID, req.Name
						return vol, nil
					}
				}
				time.Sleep(time.Millisecond)
				asked := req
				asked.ID, asked.Name = uuid.NewString(), req.ID
				vol, err := b.Backend.Create(ctx, asked)
				vol.ID, vol.Name = req.ID, req.Name
				return vol, err
			}
		}},
		{name: "delete of an unknown volume succeeds", notice: "want ErrNotFound", break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				if err := b.Backend.Delete(ctx, ref); !errors.Is(err, backends.ErrNotFound) {
					return err
				}
				return nil
			}
		}},
		{name: "delete takes an attached volume", notice: "want ErrInUse", break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				if vol, err := b.Backend.Get(ctx, ref); err == nil {
					b.rip(ctx, vol.ID)
				}
				return b.Backend.Delete(ctx, ref)
			}
		}},
		{name: "delete sees only this node's attachments", notice: "delete on another node", props: f0, break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				vol, err := b.Backend.Get(ctx, ref)
				if err != nil {
					return err
				}
				for _, att := range b.m.Attached(vol.ID) {
					if att.Node != b.node {
						_ = b.on(att.Node).Detach(ctx, att)
					}
				}
				return b.Backend.Delete(ctx, ref)
			}
		}},
		{name: "delete does nothing", notice: "list: got", break_: func(b *backend) {
			b.remove = func(*backend, context.Context, string) error { return nil }
		}},
		{name: "get of an unknown volume succeeds", notice: "want ErrNotFound", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				vol, err := b.Backend.Get(ctx, ref)
				if errors.Is(err, backends.ErrNotFound) {
					return backends.Volume{}, nil
				}
				return vol, err
			}
		}},
		{name: "get says that it is unavailable where there is none", notice: "want ErrNotFound", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				vol, err := b.Backend.Get(ctx, ref)
				if errors.Is(err, backends.ErrNotFound) {
					return vol, backends.ErrUnavailable
				}
				return vol, err
			}
		}},
		{name: "get loses the tags", notice: "get: got", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				vol, err := b.Backend.Get(ctx, ref)
				vol.Cluster = ""
				return vol, err
			}
		}},
		{name: "get reads other clusters", notice: "want ErrNotFound", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				return b.m.Node(b.node).Get(ctx, ref)
			}
		}},
		{name: "delete reaches other clusters", notice: "want ErrNotFound", break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error { return b.m.Node(b.node).Delete(ctx, ref) }
		}},
		{name: "attach reaches other clusters", notice: "want ErrNotFound", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				return b.m.Node(b.node).Attach(ctx, req)
			}
		}},
		{name: "list shows other clusters", notice: "list: got", break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) { return b.m.Node(b.node).List(ctx) }
		}},
		{name: "list stops after a page", notice: "list: got 1000", many: 1200, break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) {
				vols, err := b.Backend.List(ctx)
				return vols[:min(len(vols), 1000)], err
			}
		}},
		{name: "list shows attached volumes only", notice: "list: got", break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) {
				vols, err := b.Backend.List(ctx)
				return slices.DeleteFunc(vols, func(vol backends.Volume) bool { return len(b.m.Attached(vol.ID)) == 0 }), err
			}
		}},
		{name: "list hides attached volumes", notice: "list: got", break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) {
				vols, err := b.Backend.List(ctx)
				return slices.DeleteFunc(vols, func(vol backends.Volume) bool { return len(b.m.Attached(vol.ID)) > 0 }), err
			}
		}},
		{name: "attach steals from another node", notice: "want an *AttachedError", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				for _, att := range b.m.Attached(req.Volume) {
					if att.Node != b.node {
						b.rip(ctx, req.Volume)
					}
				}
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach adopts an older token's attachment", notice: "want an *AttachedError", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if attached, ok := errors.AsType[*backends.AttachedError](err); ok && attached.Node == b.node && attached.Token < req.Token {
					att = b.m.Attached(req.Volume)[0]
					att.Token = req.Token
					return att, nil
				}
				return att, err
			}
		}},
		{name: "attach replaces another token's attachment", notice: "want an *AttachedError", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				for _, att := range b.m.Attached(req.Volume) {
					if att.Node == b.node && att.Token != req.Token {
						b.rip(ctx, req.Volume)
					}
				}
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach fails the second time", notice: "attach: volume", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				if atts := b.m.Attached(req.Volume); len(atts) > 0 && atts[0].Node == b.node {
					return backends.Attachment{}, &backends.AttachedError{Volume: req.Volume, Node: b.node, Token: atts[0].Token}
				}
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach looks first and attaches then", notice: "at once", props: backends.Properties{Class: backends.ClassNone}, break_: func(b *backend) {
			b.properties = func(b *backend) backends.Properties {
				p := b.Backend.Properties()
				p.ExclusiveAttach = true
				return p
			}
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				for _, att := range b.m.Attached(req.Volume) {
					if att.Node != b.node {
						return backends.Attachment{}, &backends.AttachedError{Volume: req.Volume, Node: att.Node, Token: att.Token}
					}
				}
				time.Sleep(time.Millisecond)
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach anywhere though exclusive is declared", notice: "want an *AttachedError", props: backends.Properties{Class: backends.ClassNone}, break_: func(b *backend) {
			b.properties = func(b *backend) backends.Properties {
				p := b.Backend.Properties()
				p.ExclusiveAttach = true
				return p
			}
		}},
		{name: "attach does not say who has it", notice: "want an *AttachedError", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if errors.Is(err, backends.ErrInUse) {
					err = backends.ErrInUse
				}
				return att, err
			}
		}},
		{name: "attach says the wrong node has it", notice: "want volume", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if attached, ok := errors.AsType[*backends.AttachedError](err); ok {
					attached.Node = b.node + "?"
				}
				return att, err
			}
		}},
		{name: "attach of an unknown volume succeeds", notice: "want ErrNotFound", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if errors.Is(err, backends.ErrNotFound) {
					return backends.Attachment{Ref: req.Ref, Volume: req.Volume, Node: b.node, Token: req.Token, Device: "/dev/null"}, nil
				}
				return att, err
			}
		}},
		{name: "attach believes the caller about the ref", notice: "want ErrInvalid", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				vol, err := b.Backend.Get(ctx, req.Ref)
				if err != nil {
					return backends.Attachment{}, err
				}
				req.Volume = vol.ID
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach returns another volume's device", notice: "checksum", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				others, _ := b.Backend.Attachments(ctx)
				att, err := b.Backend.Attach(ctx, req)
				for _, other := range others {
					if err == nil && other.Volume != req.Volume {
						att.Device = other.Device
					}
				}
				return att, err
			}
			b.attachments = nil
		}},
		{name: "attach returns before the device is there", notice: "no such device", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				att.Device += "x"
				return att, err
			}
		}},
		{name: "attach leaves out the token", notice: "with token 10", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				att.Token = 0
				return att, err
			}
		}},
		{name: "detach takes whatever node has it", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				for _, is := range b.m.Attached(att.Volume) {
					att.Node = is.Node
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach takes whatever token has it", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				for _, is := range b.m.Attached(att.Volume) {
					att = is
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach takes a younger token's attachment", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				for _, is := range b.m.Attached(att.Volume) {
					if is.Node == att.Node && is.Token > att.Token {
						att = is
					}
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach takes an open device", notice: "want ErrInUse", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				return b.on("robber").Detach(ctx, att)
			}
		}},
		{name: "detach refuses an open device and detaches it later", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				err := b.Backend.Detach(ctx, att)
				if errors.Is(err, backends.ErrInUse) {
					b.rip(ctx, att.Volume)
				}
				return err
			}
		}},
		{name: "detach does nothing", notice: "left behind", break_: func(b *backend) {
			b.detach = func(*backend, context.Context, backends.Attachment) error { return nil }
		}},
		{name: "detach fails the second time", notice: "detach: not found", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if len(b.m.Attached(att.Volume)) == 0 {
					return backends.ErrNotFound
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach loses data", notice: "checksum", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if device, err := b.m.Open(att.Node, att.Device); err == nil {
					_, _ = device.WriteAt(make([]byte, 512), 0)
					_ = device.Close()
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach cannot reach a dead node", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if att.Node != b.node {
					return nil
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "attachments are those of this process", notice: "attachments: got", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if err == nil {
					b.mu.Lock()
					defer b.mu.Unlock()
					b.atts = append(b.atts, att)
				}
				return att, err
			}
			b.attachments = func(b *backend, ctx context.Context) ([]backends.Attachment, error) {
				b.mu.Lock()
				defer b.mu.Unlock()
				is, err := b.Backend.Attachments(ctx)
				return slices.DeleteFunc(is, func(att backends.Attachment) bool { return !slices.Contains(b.atts, att) }), err
			}
		}},
		{name: "attachments are those of every node", notice: "attachments: got", break_: func(b *backend) {
			b.attachments = func(b *backend, ctx context.Context) ([]backends.Attachment, error) {
				var atts []backends.Attachment
				vols, err := b.Backend.List(ctx)
				for _, vol := range vols {
					atts = append(atts, b.m.Attached(vol.ID)...)
				}
				return atts, err
			}
		}},
		{name: "attachments swap their devices", notice: "attachments: got", break_: func(b *backend) {
			b.attachments = func(b *backend, ctx context.Context) ([]backends.Attachment, error) {
				atts, err := b.Backend.Attachments(ctx)
				if len(atts) > 1 {
					atts[0].Device, atts[1].Device = atts[1].Device, atts[0].Device
				}
				return atts, err
			}
		}},
		{name: "attachments fail silently", notice: "attachments: got", break_: func(b *backend) {
			b.attachments = func(*backend, context.Context) ([]backends.Attachment, error) { return nil, nil }
		}},
		{name: "resize does nothing", notice: "resize to", break_: func(b *backend) {
			b.resize = func(_ *backend, _ context.Context, _ string, size int64) (int64, error) { return size, nil }
		}},
		{name: "resize does not round", notice: "resize to", break_: func(b *backend) {
			b.resize = func(b *backend, ctx context.Context, ref string, size int64) (int64, error) {
				_, err := b.Backend.(backends.Resizer).Resize(ctx, ref, size)
				return size, err
			}
		}},
		{name: "class F1 without exclusive attach", notice: "means ExclusiveAttach", break_: func(b *backend) {
			b.properties = func(b *backend) backends.Properties {
				p := b.Backend.Properties()
				p.ExclusiveAttach = false
				return p
			}
		}},
		{name: "no name, no class, no unit", notice: "no class", break_: func(b *backend) {
			b.properties = func(*backend) backends.Properties { return backends.Properties{} }
		}},
		{name: "create ignores cancellation", notice: "create with a cancelled context", break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				return b.Backend.Create(context.WithoutCancel(ctx), req)
			}
		}},
		{name: "delete ignores cancellation", notice: "delete with a cancelled context", break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				return b.Backend.Delete(context.WithoutCancel(ctx), ref)
			}
		}},
		{name: "get ignores cancellation", notice: "get with a cancelled context", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				return b.Backend.Get(context.WithoutCancel(ctx), ref)
			}
		}},
		{name: "list ignores cancellation", notice: "list with a cancelled context", break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) {
				return b.Backend.List(context.WithoutCancel(ctx))
			}
		}},
		{name: "attach ignores cancellation", notice: "attach with a cancelled context", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				return b.Backend.Attach(context.WithoutCancel(ctx), req)
			}
		}},
		{name: "detach ignores cancellation", notice: "detach with a cancelled context", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				return b.Backend.Detach(context.WithoutCancel(ctx), att)
			}
		}},
		{name: "attachments ignores cancellation", notice: "attachments with a cancelled context", break_: func(b *backend) {
			b.attachments = func(b *backend, ctx context.Context) ([]backends.Attachment, error) {
				return b.Backend.Attachments(context.WithoutCancel(ctx))
			}
		}},
	}...)
}

// noter makes a backend that notes who has a volume, for storage that any number of nodes can
// have a volume of. A note goes with a Detach that was heard, and else with a Fence. The zero
// value is sound.
type noter struct {
	keeps  bool                                                          // a Detach leaves each note
	lazy   bool                                                          // the first Fence leaves a note of what is not attached any more
	blames func(who *backends.AttachedError, req backends.AttachRequest) // changes whom an Attach names
}

func (n noter) wrap(b *backend) {
	of := func(volume string) (who note, att backends.Attachment) {
		who = note{volume, "who has it"}
		if noted, ok := b.fenced.Load(who); ok {
			att = noted.(backends.Attachment)
		}
		return who, att
	}
	b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
		b.notes.mu.Lock()
		defer b.notes.mu.Unlock()
		who, had := of(req.Volume)
		if had.Node != "" && had.Node != b.node {
			if _, err := b.Backend.Get(ctx, req.Ref); err != nil {
				return backends.Attachment{}, err
			}
			other := &backends.AttachedError{Volume: had.Volume, Node: had.Node, Token: had.Token}
			if n.blames != nil {
				n.blames(other, req)
			}
			return backends.Attachment{}, other
		}
		att, err := b.Backend.Attach(ctx, req)
		if err == nil {
			b.fenced.Store(who, att)
		}
		return att, err
	}
	b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
		b.notes.mu.Lock()
		defer b.notes.mu.Unlock()
		has := func() bool { return slices.Contains(b.m.Attached(att.Volume), att) }
		had := has()
		err := b.Backend.Detach(ctx, att)
		who, _ := of(att.Volume)
		switch {
		case err == nil && had && !n.keeps:
			b.fenced.CompareAndDelete(who, att)
		case errors.Is(err, backends.ErrUnavailable) && had && !has():
			return nil // it is gone from the node, and nobody has heard it
		}
		return err
	}
	b.fence = func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
		b.notes.mu.Lock()
		defer b.notes.mu.Unlock()
		who, att := of(req.Volume)
		has := slices.Contains(b.m.Attached(req.Volume), att)
		evidence, err := b.sound(ctx, req)
		if err != nil || att.Node != req.Node || att.Token > req.Token {
			return evidence, err
		}
		if _, again := b.fenced.Swap(note{req.Volume, "fenced"}, true); has || again || !n.lazy {
			b.fenced.Delete(who)
		}
		return evidence, err
	}
}

type fenceFunc = func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error)

// fencingDefects are the mistakes somebody could make in a Fencer. Most are worth a
// volume's data.
// silences are mistakes about calls that got no answer.
func silences() []defect {
	unanswered := func(err error) bool { return errors.Is(err, backends.ErrUnavailable) }
	return []defect{
		{name: "create that got no answer makes another volume", notice: "answer lost, request 0: list", requests: true, break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				vol, err := b.Backend.Create(ctx, req)
				if unanswered(err) {
					id := req.ID
					req.ID = uuid.NewString()
					vol, err = b.Backend.Create(ctx, req)
					vol.ID = id
				}
				return vol, err
			}
		}},
		{name: "attach takes no answer for success", notice: "request 3: attachments", requests: true, break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if unanswered(err) {
					return backends.Attachment{
						Ref: req.Ref, Volume: req.Volume, Node: b.node, Token: req.Token, Device: backendtest.DevicePrefix + req.Ref,
					}, nil
				}
				return att, err
			}
		}},
		{name: "detach takes no answer for success", notice: "refused, request 5: attachments", requests: true, break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if err := b.Backend.Detach(ctx, att); !unanswered(err) {
					return err
				}
				return nil
			}
		}},
		{name: "delete takes no answer for success", notice: ": list: got [{", requests: true, break_: func(b *backend) {
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				if err := b.Backend.Delete(ctx, ref); !unanswered(err) {
					return err
				}
				return nil
			}
		}},
		{name: "no answer means that nothing is attached", notice: "request 4: attachments", requests: true, break_: func(b *backend) {
			b.attachments = func(b *backend, ctx context.Context) ([]backends.Attachment, error) {
				if atts, err := b.Backend.Attachments(ctx); !unanswered(err) {
					return atts, err
				}
				return nil, nil
			}
		}},
		{name: "no answer means that there are no volumes", notice: "request 1: list", requests: true, break_: func(b *backend) {
			b.list = func(b *backend, ctx context.Context) ([]backends.Volume, error) {
				if vols, err := b.Backend.List(ctx); !unanswered(err) {
					return vols, err
				}
				return nil, nil
			}
		}},
		{name: "no answer means that there is no such volume", notice: "request 2: get: got", requests: true, break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				vol, err := b.Backend.Get(ctx, ref)
				if unanswered(err) {
					err = backends.ErrNotFound
				}
				return vol, err
			}
		}},
		{name: "fence takes no answer for success", notice: "of the node that is cut off has succeeded", requests: true, break_: func(b *backend) {
			b.fence = func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
				evidence, err := b.sound(ctx, req)
				if unanswered(err) {
					return "it was asked", nil
				}
				return evidence, err
			}
		}},
		{name: "class F1 names who has let go", notice: ": attach: got volume", requests: true, break_: noter{}.wrap},
		{name: "a note stays though its end was heard", notice: ": attach: got volume", requests: true, props: noting, break_: noter{keeps: true}.wrap},
		{name: "a fence leaves the note of what is not attached any more", notice: ": attach: got volume", requests: true, props: noting, break_: noter{lazy: true}.wrap},
		{name: "a note names the token of who asks", notice: ": attach: got volume", requests: true, props: noting, break_: noter{
			blames: func(who *backends.AttachedError, req backends.AttachRequest) { who.Token = req.Token },
		}.wrap},
		{name: "a note names nobody of the cluster", notice: ": attach: got volume", requests: true, props: noting, break_: noter{
			blames: func(who *backends.AttachedError, _ backends.AttachRequest) { who.Node = "nobody" },
		}.wrap},
		{name: "a note names another volume", notice: ": attach: got volume", requests: true, props: noting, break_: noter{
			blames: func(who *backends.AttachedError, _ backends.AttachRequest) { who.Volume = uuid.NewString() },
		}.wrap},
		{name: "a call fails for ever after no answer", notice: "create fails for ever", requests: true, break_: func(b *backend) {
			b.create = func(b *backend, ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
				if _, ok := b.fenced.Load(note{req.ID, "broken"}); ok {
					return backends.Volume{}, backends.ErrUnavailable
				}
				vol, err := b.Backend.Create(ctx, req)
				if unanswered(err) {
					b.fenced.Store(note{req.ID, "broken"}, true)
				}
				return vol, err
			}
		}},
	}
}

func fencingDefects() []defect {
	bad := func(name, notice string, props backends.Properties, f fenceFunc) defect {
		return defect{name: "fence " + name, notice: notice, props: props, break_: func(b *backend) { b.fence = f }}
	}
	const seen = "nothing to see here"
	return []defect{
		{name: "class F1 without a fencer", notice: "is a Fencer: false", misfit: true, break_: func(*backend) {}},
		{name: "class F0 with a fencer", notice: "is a Fencer: true", misfit: true, props: f0, break_: func(b *backend) {
			b.fence = func(*backend, context.Context, backends.FenceRequest) (string, error) { return seen, nil }
			b.identity = func(b *backend, _ context.Context) (string, error) { return b.node, nil }
		}},
		{name: "calls take effect before they are sent", notice: "late", break_: func(b *backend) {
			b.properties = func(b *backend) backends.Properties {
				p := b.Backend.Properties()
				p.LateCalls = -time.Second
				return p
			}
		}},
		bad("does nothing", "has succeeded", f2, func(*backend, context.Context, backends.FenceRequest) (string, error) {
			return seen, nil
		}),
		bad("returns before the cut", "has succeeded", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			time.AfterFunc(5*time.Millisecond, func() { _, _ = b.sound(context.WithoutCancel(ctx), req) })
			return seen, nil
		}),
		bad("returns before the cut, of class F1", "has succeeded", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			time.AfterFunc(5*time.Millisecond, func() { _, _ = b.sound(context.WithoutCancel(ctx), req) })
			return seen, nil
		}),
		bad("cuts a younger token", "attachments: got", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			req.Token = 1 << 60
			return b.sound(ctx, req)
		}),
		bad("cuts a younger token, of class F2", "input/output error", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			req.Token = 1 << 60
			return b.sound(ctx, req)
		}),
		bad("cuts no older token", "has succeeded", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				if att.Node == req.Node && att.Token < req.Token {
					return seen, nil
				}
			}
			return b.sound(ctx, req)
		}),
		bad("looks up late whom to cut", "attachments: got", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				b.cut(ctx, att)
			}
			return seen, nil
		}),
		bad("cuts the node that calls it", "has succeeded", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			req.Node, req.Identity = b.node, "host-"+b.node
			return b.sound(ctx, req)
		}),
		bad("cuts every node", "input/output error", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				if att.Token <= req.Token {
					b.cut(ctx, att)
				}
			}
			return b.sound(ctx, req)
		}),
		bad("cuts every volume of the node", "input/output error", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			vols, _ := b.Backend.List(ctx)
			for _, vol := range vols {
				for _, att := range b.m.Attached(vol.ID) {
					if att.Node == req.Node && att.Token <= req.Token {
						b.cut(ctx, att)
					}
				}
			}
			return b.sound(ctx, req)
		}),
		bad("fails the second time", "fence: not found", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				if att.Node == req.Node {
					return b.sound(ctx, req)
				}
			}
			return "", backends.ErrNotFound
		}),
		bad("works on the node itself alone", "fence: unavailable", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			if b.node != req.Node {
				return "", backends.ErrUnavailable
			}
			return b.sound(ctx, req)
		}),
		bad("says that it is done when the storage system is down", "while the storage system is down", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			evidence, err := b.sound(ctx, req)
			if errors.Is(err, backends.ErrUnavailable) {
				return seen, nil
			}
			return evidence, err
		}),
		bad("says that it is done when it was cancelled", "with a cancelled context", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			evidence, err := b.sound(ctx, req)
			if errors.Is(err, context.Canceled) {
				return seen, nil
			}
			return evidence, err
		}),
		bad("ignores cancellation", "with a cancelled context", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			return b.sound(context.WithoutCancel(ctx), req)
		}),
		bad("hides that it was cancelled", "fence: odd", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			evidence, err := b.sound(ctx, req)
			if errors.Is(err, context.Canceled) {
				err = errors.New("odd")
			}
			return evidence, err
		}),
		{name: "fence takes the volume away again later", notice: "/dev/memory/", break_: func(b *backend) {
			b.later(func(b *backend, ctx context.Context, att backends.Attachment) { b.rip(ctx, att.Volume) })
		}},
		{name: "fence cuts the node again later, whatever its token", notice: "input/output error", props: f2, break_: func(b *backend) {
			b.later(func(b *backend, ctx context.Context, att backends.Attachment) {
				if _, ok := b.fenced.Load(note{att.Volume, att.Node}); ok {
					b.cut(ctx, att)
				}
			})
		}},
		bad("forgets who was not attached", "has attached the volume again", f2, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				if att.Node == req.Node {
					return b.sound(ctx, req)
				}
			}
			if _, err := b.Backend.Get(ctx, req.Ref); err != nil {
				return "", err
			}
			return seen, nil
		}),
		bad("loses data", "checksum", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			for _, att := range b.m.Attached(req.Volume) {
				if device, err := b.m.Open(att.Node, att.Device); err == nil {
					_, _ = device.WriteAt(make([]byte, 512), 0)
					_ = device.Close()
				}
			}
			return b.sound(ctx, req)
		}),
		bad("has seen nothing", "no evidence", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			_, err := b.sound(ctx, req)
			return "", err
		}),
		bad("of an unknown volume succeeds", "want ErrNotFound", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			evidence, err := b.sound(ctx, req)
			if errors.Is(err, backends.ErrNotFound) {
				return seen, nil
			}
			return evidence, err
		}),
		bad("reaches other clusters", "want ErrNotFound", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			return b.m.Node(b.node).(backends.Fencer).Fence(ctx, req)
		}),
		bad("believes the caller about the ref", "want ErrInvalid", backends.Properties{}, func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
			if vol, err := b.Backend.Get(ctx, req.Ref); err == nil {
				req.Volume = vol.ID
			}
			return b.sound(ctx, req)
		}),
		{name: "attach refuses a fenced node for ever", notice: "attach: in use", props: f2, break_: func(b *backend) {
			b.fence = func(b *backend, ctx context.Context, req backends.FenceRequest) (string, error) {
				b.fenced.Store(note{req.Volume, req.Node}, true)
				return b.sound(ctx, req)
			}
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				if _, ok := b.fenced.Load(note{req.Volume, b.node}); ok {
					return backends.Attachment{}, backends.ErrInUse
				}
				return b.Backend.Attach(ctx, req)
			}
		}},
		{name: "attach of a fenced token says that there is no volume", notice: "want ErrInUse", props: f2, break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if errors.Is(err, backends.ErrInUse) {
					err = backends.ErrNotFound
				}
				return att, err
			}
		}},
		{name: "attach of class F1 lets the cut node in beside the taker", notice: "has attached the volume again", break_: func(b *backend) {
			b.attach = func(b *backend, ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
				att, err := b.Backend.Attach(ctx, req)
				if attached, ok := errors.AsType[*backends.AttachedError](err); ok && attached.Token > req.Token {
					return b.m.Attached(req.Volume)[0], nil
				}
				return att, err
			}
		}},
		{name: "delete waits for a node that was cut off", notice: "delete: in use", props: f2, break_: func(b *backend) {
			b.later(func(*backend, context.Context, backends.Attachment) {})
			b.remove = func(b *backend, ctx context.Context, ref string) error {
				vol, err := b.Backend.Get(ctx, ref)
				if err != nil {
					return err
				}
				if _, ok := b.fenced.Load(note{vol.ID, ""}); ok {
					return backends.ErrInUse
				}
				return b.Backend.Delete(ctx, ref)
			}
		}},
		{name: "detach leaves a device that was cut off", notice: "attachments: got", props: f2, break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if !slices.Contains(b.m.Attached(att.Volume), att) {
					return nil
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach of a device that was cut off fails", notice: "detach on the node that is cut off", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if !slices.Contains(b.m.Attached(att.Volume), att) {
					return backends.ErrUnavailable
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "detach of a device that was cut off takes the taker's", notice: "attachments: got", break_: func(b *backend) {
			b.detach = func(b *backend, ctx context.Context, att backends.Attachment) error {
				if atts := b.m.Attached(att.Volume); len(atts) == 1 && atts[0].Token == att.Token+1 {
					att = atts[0]
				}
				return b.Backend.Detach(ctx, att)
			}
		}},
		{name: "a device that is cut off still reads", notice: "a read of the node", break_: func(*backend) {}, device: func(d backendtest.Device) backendtest.Device {
			return stillReads{d}
		}},
		{name: "a device that is cut off takes writes", notice: "a write of the node", break_: func(*backend) {}, device: func(d backendtest.Device) backendtest.Device {
			return stillWrites{d}
		}},
		{name: "a device that is cut off hangs", notice: "hangs", timeout: 500 * time.Millisecond, break_: func(*backend) {}, device: func(d backendtest.Device) backendtest.Device {
			return hangs{d}
		}},
		{name: "two nodes have one identity", notice: "two nodes have the identity", props: f2, break_: func(b *backend) {
			b.identity = func(*backend, context.Context) (string, error) { return "host", nil }
		}},
		{name: "identity changes", notice: "the next time", props: f2, break_: func(b *backend) {
			b.identity = func(*backend, context.Context) (string, error) { return uuid.NewString(), nil }
		}},
		{name: "identity is empty", notice: "is none", break_: func(b *backend) {
			b.identity = func(*backend, context.Context) (string, error) { return "", nil }
		}},
		{name: "identity is unknown", notice: "identity: unavailable", break_: func(b *backend) {
			b.identity = func(*backend, context.Context) (string, error) { return "", backends.ErrUnavailable }
		}},
		{name: "get says that there is none when the storage system is down", notice: "get while the storage system is down", break_: func(b *backend) {
			b.get = func(b *backend, ctx context.Context, ref string) (backends.Volume, error) {
				vol, err := b.Backend.Get(ctx, ref)
				if errors.Is(err, backends.ErrUnavailable) {
					err = backends.ErrNotFound
				}
				return vol, err
			}
		}},
	}
}

// stillReads, stillWrites and hangs are devices which do not notice, or do not say,
// that they are cut off.
type (
	stillReads  struct{ backendtest.Device }
	stillWrites struct{ backendtest.Device }
	hangs       struct{ backendtest.Device }
)

func (d stillReads) ReadAt(p []byte, off int64) (int, error) {
	_, _ = d.Device.ReadAt(p, off)
	return len(p), nil
}

func (d stillWrites) WriteAt(p []byte, off int64) (int, error) {
	_, _ = d.Device.WriteAt(p, off)
	return len(p), nil
}

func (stillWrites) Sync() error { return nil }

func (d hangs) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Device.ReadAt(p, off)
	if err != nil {
		select {}
	}
	return n, err
}

// complaints runs the suite on a backend with a defect, and returns what each
// case said that did.
func complaints(t *testing.T, d defect) map[string][]string {
	t.Helper()
	if d.timeout == 0 {
		d.timeout = 5 * time.Second
	}
	cfg := backendtest.Config{Timeout: d.timeout, Many: d.many, New: func(backendtest.T) backendtest.Storage {
		m := backendtest.NewMemory(d.props)
		s, n := storage(m), &notes{}
		s.Node = func(cluster, node string) backends.Backend {
			b := &backend{Backend: m.NodeIn(cluster, node), m: m, cluster: cluster, node: node, notes: n}
			d.break_(b)
			if _, ok := b.Backend.(backends.Fencer); ok != d.misfit {
				return fencing{b}
			}
			return b
		}
		if !d.requests {
			s.Faults = nil
		}
		if d.device != nil {
			s.Open = func(node, device string, _ bool) (backendtest.Device, error) {
				opened, err := m.Open(node, device)
				if err != nil {
					return nil, err
				}
				return d.device(opened), nil
			}
		}
		return s
	}}
	said := map[string][]string{}
	for _, c := range backendtest.Cases() {
		if messages := record(t, c, cfg); len(messages) > 0 {
			said[c.Name] = messages
		}
	}
	return said
}

// TestSuiteRejects runs the suite on backends with one defect each.
func TestSuiteRejects(t *testing.T) {
	for _, d := range defects() {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			if d.many == 0 {
				d.many = 20
			}
			said := complaints(t, d)
			t.Logf("rejected by %q", slices.Sorted(maps.Keys(said)))
			if len(said) == 0 {
				t.Fatal("the suite has accepted it")
			}
			for _, messages := range said {
				for _, message := range messages {
					if strings.Contains(message, d.notice) {
						return
					}
				}
			}
			t.Errorf("no complaint has %q: %q", d.notice, said)
		})
	}
}

// TestSuiteAccepts makes sure that it is the defects that are rejected.
func TestSuiteAccepts(t *testing.T) {
	sound := func(*backend) {}
	for name, d := range map[string]defect{
		"F1":           {break_: sound},
		"F1 nameless":  {props: nameless, break_: sound},
		"F0":           {props: backends.Properties{Class: backends.ClassNone}, break_: sound},
		"F0 exclusive": {props: f0, break_: sound},
		"F2":           {props: f2, break_: sound},
		"F2 noting":    {props: noting, break_: noter{}.wrap},
	} {
		d.many, d.requests = 20, true
		if said := complaints(t, d); len(said) > 0 {
			t.Errorf("%s: %q", name, said)
		}
	}
}
