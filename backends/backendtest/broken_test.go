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

	mu   sync.Mutex
	atts []backends.Attachment
}

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
	many   int
	break_ func(b *backend) //nolint:revive // "break" is a keyword
}

var f0 = backends.Properties{Class: backends.ClassNone, ExclusiveAttach: true}

func defects() []defect {
	return []defect{
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
	}
}

// complaints runs the suite on a backend with a defect, and returns what each
// case said that did.
func complaints(t *testing.T, d defect) map[string][]string {
	t.Helper()
	cfg := backendtest.Config{Timeout: 5 * time.Second, Many: d.many, New: func(backendtest.T) backendtest.Storage {
		m := backendtest.NewMemory(d.props)
		s := storage(m)
		s.Node = func(cluster, node string) backends.Backend {
			b := &backend{Backend: m.NodeIn(cluster, node), m: m, cluster: cluster, node: node}
			d.break_(b)
			return b
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
	for _, props := range []backends.Properties{{}, f0, {Class: backends.ClassNone}} {
		if said := complaints(t, defect{props: props, many: 20, break_: func(*backend) {}}); len(said) > 0 {
			t.Errorf("class %s: %q", props.Class, said)
		}
	}
}
