package backendtest_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

func storage(m *backendtest.Memory) backendtest.Storage {
	return backendtest.Storage{
		Node: m.NodeIn,
		Open: func(node, device string, _ bool) (backendtest.Device, error) { return m.Open(node, device) },
		Down: func(down bool) {
			m.Inject(func(backendtest.Call) backendtest.Fault { return backendtest.Fault{Refused: down} })
		},
		Faults: map[string]func(n int) func() bool{
			"refused":     once(m, backendtest.Fault{Refused: true}),
			"answer lost": once(m, backendtest.Fault{DropReply: true}),
		},
	}
}

// once makes one call suffer a fault.
func once(m *backendtest.Memory, fault backendtest.Fault) func(n int) func() bool {
	return func(n int) func() bool {
		var calls atomic.Int64
		m.Inject(func(backendtest.Call) backendtest.Fault {
			if calls.Add(1) == int64(n)+1 {
				return fault
			}
			return backendtest.Fault{}
		})
		return func() bool {
			m.Inject(nil)
			return calls.Load() > int64(n)
		}
	}
}

// A call that is never answered is given up, and made again.
func TestMemoryIsSilent(t *testing.T) {
	backendtest.RunCase(t, "every request fails", backendtest.Config{Timeout: time.Second, New: func(backendtest.T) backendtest.Storage {
		m := backendtest.NewMemory(backends.Properties{})
		s := storage(m)
		s.Faults = map[string]func(n int) func() bool{"silent": once(m, backendtest.Fault{Hang: true})}
		return s
	}})
}

func TestMemory(t *testing.T) {
	for name, props := range map[string]backends.Properties{
		"F1":           {},
		"F1 nameless":  nameless,
		"F0":           {Class: backends.ClassNone, AllocationUnit: 1},
		"F0 exclusive": {Class: backends.ClassNone, ExclusiveAttach: true},
		"F2":           {Class: backends.ClassFenced},
		"F2 exclusive": {Class: backends.ClassFenced, ExclusiveAttach: true},
		"F3":           {Class: backends.ClassNodeFence},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, backendtest.Config{
				New: func(backendtest.T) backendtest.Storage { return storage(backendtest.NewMemory(props)) },
			})
		})
	}
}

func TestMemoryFaults(t *testing.T) {
	m := backendtest.NewMemory(backends.Properties{})
	b := m.Node("a")
	req := backends.CreateRequest{ID: "id", Size: 1}
	broken := errors.New("broken")
	m.SetFault(func(_ context.Context, call backendtest.Call) error {
		if call.Method == "Create" && call.Node == "a" && call.Volume == "id" && call.Done {
			return broken
		}
		return nil
	})
	if _, err := b.Create(t.Context(), req); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
	m.SetFault(nil)
	vols, err := b.List(t.Context())
	if err != nil || len(vols) != 1 {
		t.Errorf("got %v, %v; want the volume whose reply was lost", vols, err)
	}
	if got := m.Calls(); got["Create"] != 1 || got["List"] != 1 || got["Delete"] != 0 {
		t.Errorf("got %v", got)
	}
}

func TestMemoryReboot(t *testing.T) {
	for class, want := range map[backends.Class]int{backends.ClassNone: 0, backends.ClassExclusive: 1, backends.ClassFenced: 0} {
		m := backendtest.NewMemory(backends.Properties{Class: class})
		b := m.Node("a")
		vol, err := b.Create(t.Context(), backends.CreateRequest{ID: "id", Size: 1})
		if err != nil {
			t.Fatal(err)
		}
		att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: "id", Token: 1})
		if err != nil {
			t.Fatal(err)
		}
		device, err := m.Open("a", att.Device)
		if err != nil {
			t.Fatal(err)
		}
		m.Reboot("a")
		if got := len(m.Attached("id")); got != want {
			t.Errorf("class %s: got %d attachments after a reboot, want %d", class, got, want)
		}
		if got := m.Accessible("a", att.Device); got != (want == 1) {
			t.Errorf("class %s: accessible after a reboot: %t", class, got)
		}
		if _, err := device.WriteAt([]byte("x"), 0); err == nil {
			t.Errorf("class %s: a write of before the reboot has come through", class)
		}
	}
}

// stored is a volume in a Memory, and its nodes' backends.
type stored struct {
	*backendtest.Memory
	t    *testing.T
	a, b backends.Backend
	vol  backends.Volume
}

func newStored(t *testing.T, props backends.Properties) *stored {
	t.Helper()
	m := backendtest.NewMemory(props)
	s := &stored{Memory: m, t: t, a: m.Node("a"), b: m.Node("b")}
	vol, err := s.a.Create(t.Context(), backends.CreateRequest{ID: "id", Size: 1})
	if err != nil {
		t.Fatal(err)
	}
	s.vol = vol
	return s
}

func (s *stored) attach(b backends.Backend, token int64) (backends.Attachment, error) {
	return b.Attach(s.t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: token})
}

// use attaches the volume and has it open.
func (s *stored) use(b backends.Backend, token int64) (backends.Attachment, backendtest.Device) {
	s.t.Helper()
	att, err := s.attach(b, token)
	if err != nil {
		s.t.Fatal(err)
	}
	device, err := s.Open(att.Node, att.Device)
	if err != nil {
		s.t.Fatal(err)
	}
	return att, device
}

func (s *stored) fence(ctx context.Context, node string, token int64) error {
	fencer, ok := backends.As[backends.Fencer](s.b)
	if !ok {
		s.t.Fatal("no fencer")
	}
	_, err := fencer.Fence(ctx, backends.FenceRequest{
		Ref: s.vol.Ref, Volume: s.vol.ID, Node: node, Identity: "host-" + node, Token: token,
	})
	return err
}

func writable(device backendtest.Device) bool {
	_, err := device.WriteAt([]byte("x"), 0)
	return err == nil
}

// once injects a fault into the first call of a method.
func (s *stored) once(method string, fault backendtest.Fault) {
	done := false
	s.Inject(func(call backendtest.Call) backendtest.Fault {
		if call.Method != method || done {
			return backendtest.Fault{}
		}
		done = true
		return fault
	})
}

var nameless = backends.Properties{LateCalls: time.Minute}

// A late call without an id takes the attachment that is there when it arrives; one
// with an id does not.
func TestMemoryLateCalls(t *testing.T) {
	for name, call := range map[string]func(s *stored, ctx context.Context, att backends.Attachment) error{
		"Detach": func(s *stored, ctx context.Context, att backends.Attachment) error { return s.a.Detach(ctx, att) },
		"Fence": func(s *stored, ctx context.Context, att backends.Attachment) error {
			return s.fence(ctx, "a", att.Token)
		},
	} {
		for ids, props := range map[string]backends.Properties{"with ids": {}, "without": nameless} {
			t.Run(name+" "+ids, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newStored(t, props)
					s.SetHosts(backendtest.Hosts{Rightful: func(att backends.Attachment) bool { return att.Token == 2 }})
					old, err := s.attach(s.a, 1)
					if err != nil {
						t.Fatal(err)
					}
					s.once(name, backendtest.Fault{Late: 50 * time.Second})
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					if err := call(s, ctx, old); !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("got %v, want the context's end", err)
					}
					if err := s.a.Detach(t.Context(), old); err != nil {
						t.Fatal(err)
					}
					_, device := s.use(s.a, 2)
					time.Sleep(time.Minute)
					synctest.Wait()
					harmless := props.LateCalls == 0
					if got := writable(device); got != harmless {
						t.Errorf("the new attachment works: %t", got)
					}
					if got := len(s.Violations()); (got == 0) != harmless {
						t.Errorf("got violations %q", s.Violations())
					}
				})
			})
		}
	}
}

// An attachment is another one each time, though node and token are the same.
func TestMemoryDetachByID(t *testing.T) {
	for _, props := range []backends.Properties{{}, nameless} {
		s := newStored(t, props)
		old, err := s.attach(s.a, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := s.a.Detach(t.Context(), old); err != nil {
				t.Fatal(err)
			}
			if _, err := s.attach(s.a, 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.a.Detach(t.Context(), old); err != nil {
			t.Fatal(err)
		}
		if got, want := len(s.Attached("id")) == 1, props.LateCalls == 0; got != want {
			t.Errorf("LateCalls %s: the second attachment is there: %t, want %t", props.LateCalls, got, want)
		}
	}
}

// Another node's attachment can be taken away with Detach in class F1 alone.
func TestMemoryDetachElsewhere(t *testing.T) {
	for class, want := range map[backends.Class]error{
		backends.ClassNone: backends.ErrInvalid, backends.ClassExclusive: nil, backends.ClassFenced: backends.ErrInvalid,
	} {
		s := newStored(t, backends.Properties{Class: class})
		att, device := s.use(s.a, 1)
		if err := s.b.Detach(t.Context(), att); !errors.Is(err, want) {
			t.Errorf("class %s: got %v, want %v", class, err, want)
		}
		if got := writable(device); got != (want != nil) {
			t.Errorf("class %s: the device works: %t", class, got)
		}
	}
}

func TestMemoryFenceNeedsIdentity(t *testing.T) {
	s := newStored(t, backends.Properties{Class: backends.ClassFenced})
	_, err := s.b.(backends.Fencer).Fence(t.Context(), backends.FenceRequest{Ref: s.vol.Ref, Volume: "id", Node: "a", Token: 1})
	if want := "fence volume id: the storage system's name of a is not known: invalid"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// With LateCalls nothing comes later than that, and calls of class F0 never are.
func TestMemoryLateIsBounded(t *testing.T) {
	for class, want := range map[backends.Class]time.Duration{backends.ClassExclusive: time.Minute, backends.ClassNone: time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			s := newStored(t, backends.Properties{Class: class, LateCalls: time.Minute})
			s.once("Attach", backendtest.Fault{Late: time.Hour, Again: time.Hour})
			began := time.Now()
			att, err := s.attach(s.a, 1)
			if took := time.Since(began); err != nil || took != want {
				t.Errorf("class %s: %v after %s, want %s", class, err, took, want)
			}
			if err := s.a.Detach(t.Context(), att); err != nil {
				t.Fatal(err)
			}
			if class == backends.ClassNone { // whose caller has gone: never sent
				s.once("Attach", backendtest.Fault{Late: time.Hour})
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := s.a.Attach(ctx, backends.AttachRequest{Ref: s.vol.Ref, Volume: "id", Token: 1}); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v, want the context's end", err)
				}
			}
			time.Sleep(2 * time.Hour)
			synctest.Wait()
			if got := s.Attached("id"); len(got) > 0 {
				t.Errorf("class %s: got %v", class, got)
			}
		})
	}
}

func TestMemoryInject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStored(t, backends.Properties{})
		for _, test := range []struct {
			fault backendtest.Fault
			want  error
			has   int // attachments at once, and after a minute
			later int
		}{
			{backendtest.Fault{Refused: true}, backends.ErrUnavailable, 0, 0},
			{backendtest.Fault{Hang: true}, context.DeadlineExceeded, 0, 0},
			{backendtest.Fault{Latency: 2 * time.Second}, context.DeadlineExceeded, 0, 0},
			{backendtest.Fault{DropReply: true}, backends.ErrUnavailable, 1, 1},
			{backendtest.Fault{Late: 2 * time.Second}, context.DeadlineExceeded, 0, 1},
			{backendtest.Fault{Latency: time.Second / 4, Late: time.Second / 4}, nil, 1, 1},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			s.once("Attach", test.fault)
			if _, err := s.a.Attach(ctx, backends.AttachRequest{Ref: s.vol.Ref, Volume: "id", Token: 1}); !errors.Is(err, test.want) {
				t.Errorf("%+v: got %v, want %v", test.fault, err, test.want)
			}
			cancel()
			if got := s.Attached("id"); len(got) != test.has {
				t.Errorf("%+v: got %v", test.fault, got)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			got := s.Attached("id")
			if len(got) != test.later {
				t.Errorf("%+v: got %v later", test.fault, got)
			}
			for _, att := range got {
				if err := s.a.Detach(t.Context(), att); err != nil {
					t.Fatal(err)
				}
			}
		}
		// A duplicate: the attachment is back after it was given up.
		s.once("Attach", backendtest.Fault{Again: time.Second})
		att, err := s.attach(s.a, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := s.Attached("id"); len(got) != 1 || got[0].ID == att.ID {
			t.Errorf("got %v, want a duplicate of %v", got, att)
		}
	})
}

func TestMemoryHosts(t *testing.T) {
	for _, class := range []backends.Class{backends.ClassExclusive, backends.ClassFenced} {
		s := newStored(t, backends.Properties{Class: class})
		var began, pulled []backends.Attachment
		mounted := true
		s.SetHosts(backendtest.Hosts{
			InUse: func(node, device string) bool {
				return node == "a" && device == backendtest.DevicePrefix+s.vol.Ref && mounted
			},
			Rightful: func(att backends.Attachment) bool { return att.Token == 1 },
			Attached: func(att backends.Attachment) { began = append(began, att) },
			Pulled:   func(att backends.Attachment) { pulled = append(pulled, att) },
		})
		att, err := s.attach(s.a, 1)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := s.attach(s.a, 1); err != nil || again != att || len(began) != 1 || began[0] != att {
			t.Errorf("class %s: attached %v, %v; heard of %v", class, again, err, began)
		}
		if err := s.a.Detach(t.Context(), att); !errors.Is(err, backends.ErrInUse) {
			t.Errorf("class %s: detach while mounted: got %v, want ErrInUse", class, err)
		}
		if !s.Accessible("a", att.Device) || s.Accessible("b", att.Device) {
			t.Errorf("class %s: the volume is accessible on a: %t, on b: %t", class, s.Accessible("a", att.Device), s.Accessible("b", att.Device))
		}
		if err := s.fence(t.Context(), "a", 1); err != nil {
			t.Fatal(err)
		}
		if s.Accessible("a", att.Device) || len(pulled) != 1 || pulled[0] != att {
			t.Errorf("class %s: accessible: %t, pulled %v", class, s.Accessible("a", att.Device), pulled)
		}
		want := "volume id was taken away from its owner a (token 1) while in use, by a Fence of b"
		if got := s.Violations(); len(got) != 1 || got[0] != want {
			t.Errorf("class %s: got %q, want %q", class, got, want)
		}
		mounted = false
		if err := s.a.Detach(t.Context(), att); err != nil {
			t.Errorf("class %s: %v", class, err)
		}
		// It is no violation to take it from somebody else,
		_, device := s.use(s.a, 2)
		if err := s.fence(t.Context(), "a", 2); err != nil || len(pulled) != 2 || len(s.Violations()) != 1 {
			t.Errorf("class %s: %v, pulled %v, violations %q", class, err, pulled, s.Violations())
		}
		_ = device.Close()
		s.Reboot("a")
		// nor from the owner while it is not in use,
		s.SetHosts(backendtest.Hosts{
			Rightful: func(backends.Attachment) bool { return true },
			Pulled:   func(att backends.Attachment) { pulled = append(pulled, att) },
		})
		if att, err = s.attach(s.a, 3); err != nil {
			t.Fatal(err)
		}
		if err := s.fence(t.Context(), "a", 3); err != nil || len(pulled) != 3 || len(s.Violations()) != 1 {
			t.Errorf("class %s: %v, pulled %v, violations %q", class, err, pulled, s.Violations())
		}
		// and a Detach is nothing to hear of.
		if err := s.a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		if att, err = s.attach(s.a, 4); err != nil {
			t.Fatal(err)
		}
		if err := s.a.Detach(t.Context(), att); err != nil || len(pulled) != 3 || len(s.Violations()) != 1 {
			t.Errorf("class %s: %v, pulled %v, violations %q", class, err, pulled, s.Violations())
		}
	}
}

// What a cut-off node may do later differs between the classes.
func TestMemoryStaleAttach(t *testing.T) {
	for class, refused := range map[backends.Class]bool{backends.ClassExclusive: false, backends.ClassFenced: true} {
		s := newStored(t, backends.Properties{Class: class})
		_, device := s.use(s.a, 5)
		if err := s.fence(t.Context(), "a", 7); err != nil {
			t.Fatal(err)
		}
		if writable(device) {
			t.Errorf("class %s: a write after the fence has come through", class)
		}
		for _, att := range s.Attached("id") {
			t.Errorf("class %s: got %v", class, att)
		}
		if err := device.Close(); err != nil {
			t.Fatal(err)
		}
		atts, err := s.a.Attachments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, att := range atts { // class F2: a device that fails
			if err := s.a.Detach(t.Context(), att); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.attach(s.a, 7); errors.Is(err, backends.ErrInUse) != refused {
			t.Errorf("class %s: attach with the fenced token: %v", class, err)
		}
		if refused {
			if _, err := s.attach(s.a, 8); err != nil {
				t.Errorf("class %s: attach with the next token: %v", class, err)
			}
		}
	}
}

func TestMemoryClasses(t *testing.T) {
	for class, want := range map[backends.Class]bool{
		backends.ClassNone: false, backends.ClassExclusive: true, backends.ClassFenced: true, backends.ClassNodeFence: false,
	} {
		b := backendtest.NewMemory(backends.Properties{Class: class}).Node("a")
		_, fencer := backends.As[backends.Fencer](b)
		_, identifier := backends.As[backends.Identifier](b)
		if fencer != want || identifier != want {
			t.Errorf("class %s: a Fencer: %t, an Identifier: %t", class, fencer, identifier)
		}
	}
}
