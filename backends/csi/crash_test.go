package csi_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
)

// killAt runs f, which ends at the n-th step of the backend as if its process had been
// killed there, and says at which. Empty: f has come to its end.
func killAt(b backends.Backend, n int, f func()) (step string) {
	steps := 0
	csi.SetStep(b, func(name string) {
		if steps++; steps == n {
			step = name
			runtime.Goexit()
		}
	})
	defer csi.SetStep(b, func(string) {})
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
	return step
}

// ways are what may happen after a process was killed in the middle of an attach or
// detach under token 1 on node a. Each ends with node b having had the volume.
var ways = map[string]func(t *testing.T, s *storage, vol backends.Volume, detaching bool){
	"the next process repeats it": func(t *testing.T, s *storage, vol backends.Volume, detaching bool) {
		a := s.node(cluster, "a")
		att := backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 1}
		if !detaching {
			att = attach(t, a, vol, 1)
			if again := attach(t, a, vol, 1); again != att {
				t.Errorf("got %+v, and then %+v", att, again)
			}
			if atts, err := a.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
				t.Errorf("attachments: got %+v, %v; want %+v", atts, err, att)
			}
		}
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		move(t, s, vol)
	},
	"the next process takes down what it finds": func(t *testing.T, s *storage, vol backends.Volume, _ bool) {
		sweep(t, s, vol)
		move(t, s, vol)
	},
	"the next process attaches under a new token": func(t *testing.T, s *storage, vol backends.Volume, _ bool) {
		a := s.node(cluster, "a")
		att, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
		if attached, ok := errors.AsType[*backends.AttachedError](err); ok && attached.Token == 1 && attached.Node == "a" {
			sweep(t, s, vol)
			att, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		move(t, s, vol)
	},
	"the host has been started anew": func(t *testing.T, s *storage, vol backends.Volume, _ bool) {
		age(t, s, vol, 1)
		sweep(t, s, vol)
		move(t, s, vol)
	},
}

// sweep detaches what is found. Nothing is published to a node that does not know it.
func sweep(t *testing.T, s *storage, vol backends.Volume) {
	t.Helper()
	a := s.node(cluster, "a")
	atts, err := a.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if published := s.Published(vol.ID); len(published) > 0 && len(atts) == 0 {
		t.Errorf("published to %v, and not found", published)
	}
	for _, att := range atts {
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
	}
	if atts, err = a.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("attachments: got %+v, %v", atts, err)
	}
}

// move gives a volume to node b, as the driver does.
func move(t *testing.T, s *storage, vol backends.Volume) {
	t.Helper()
	b := s.node(cluster, "b")
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 3})
	attached, ok := errors.AsType[*backends.AttachedError](err)
	if f, fences := b.(backends.Fencer); ok && fences && attached.Node == "a" && attached.Token == 1 {
		// Only the note of it was left.
		if published := s.Published(vol.ID); len(published) > 0 {
			t.Errorf("published to %v", published)
		}
		if _, err := f.Fence(t.Context(), backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}); err != nil {
			t.Fatal(err)
		}
		att, err = b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 3})
	}
	if err != nil {
		t.Fatal(err)
	}
	down(t, b, vol, att)
}

func TestKilledAtEveryStep(t *testing.T) {
	backendtest.NeedRoot(t)
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStorage(t, kind.opts, kind.cfg)
			for way, goOn := range ways {
				for _, detaching := range []bool{false, true} {
					killed := 0
					for n := 1; ; n++ {
						a := s.node(cluster, "a")
						vol, err := a.Create(t.Context(), request(cluster))
						if err != nil {
							t.Fatal(err)
						}
						var att backends.Attachment
						if detaching {
							att = attach(t, a, vol, 1)
						}
						step := killAt(a, n, func() {
							if detaching {
								_ = a.Detach(t.Context(), att)
							} else {
								_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
							}
						})
						t.Logf("killed after %q (detaching: %t); %s", step, detaching, way)
						goOn(t, s, vol, detaching)
						if t.Failed() {
							t.Fatalf("killed after %q (detaching: %t); %s", step, detaching, way)
						}
						if step == "" {
							break
						}
						killed++
					}
					if killed < 2 {
						t.Errorf("%s: only %d steps", way, killed)
					}
				}
			}
		})
	}
}

// The same with a create and a delete.
func TestKilledCreateAndDelete(t *testing.T) {
	s := newStorage(t, csitest.Options{GetVolume: true}, csi.Config{})
	for _, deleting := range []bool{false, true} {
		for _, again := range []bool{false, true} {
			for n := 1; ; n++ {
				a, req := s.node(cluster, "a"), request(cluster)
				var vol backends.Volume
				var err error
				if deleting {
					if vol, err = a.Create(t.Context(), req); err != nil {
						t.Fatal(err)
					}
				}
				step := killAt(a, n, func() {
					if deleting {
						_ = a.Delete(t.Context(), vol.Ref)
					} else {
						_, _ = a.Create(t.Context(), req)
					}
				})
				switch {
				case again && deleting:
					if err := s.node(cluster, "b").Delete(t.Context(), vol.Ref); err != nil && !errors.Is(err, backends.ErrNotFound) {
						t.Errorf("killed after %q: %v", step, err)
					}
				case again:
					if vol, err = s.node(cluster, "b").Create(t.Context(), req); err != nil {
						t.Errorf("killed after %q: %v", step, err)
					} else if err := s.node(cluster, "a").Delete(t.Context(), vol.Ref); err != nil {
						t.Errorf("killed after %q: %v", step, err)
					}
				default:
					cleanUp(t, s, cluster) // finds it by its id alone
				}
				if all, _ := s.Volumes(); all > 0 || t.Failed() {
					t.Fatalf("killed after %q (deleting: %t, again: %t): there are %d volumes", step, deleting, again, all)
				}
				if step == "" {
					break
				}
			}
		}
	}
}

// Whoever takes a volume over is killed at every step, and another goes on.
func TestTakerKilledAtEveryStep(t *testing.T) {
	backendtest.NeedRoot(t)
	s := newStorage(t, kinds["fences"].opts, csi.Config{Fences: true})
	for n := 1; ; n++ {
		a, b, c := s.node(cluster, "a"), s.node(cluster, "b"), s.node(cluster, "c")
		vol, err := a.Create(t.Context(), request(cluster))
		if err != nil {
			t.Fatal(err)
		}
		att := attach(t, a, vol, 1)
		req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
		step := killAt(b, n, func() { _, _ = b.(backends.Fencer).Fence(t.Context(), req) })
		evidence, err := c.(backends.Fencer).Fence(t.Context(), req)
		want := "the CSI driver strict.csitest.flocker unpublished volume " + vol.ID + " from id-of-a; it shows it published to no host"
		if err != nil || evidence != want {
			t.Fatalf("killed after %q: got %q, %v", step, evidence, err)
		}
		taken := attach(t, c, vol, 3)
		if published := s.Published(vol.ID); !slices.Equal(published, []string{csitest.NodeID("c")}) {
			t.Errorf("killed after %q: published to %v", step, published)
		}
		if err := a.Detach(t.Context(), att); err != nil {
			t.Errorf("killed after %q: %v", step, err)
		}
		down(t, c, vol, taken)
		if t.Failed() || step == "" {
			break
		}
	}
}

// What the fence cannot see is no evidence.
func TestFenceUnseen(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	att := attach(t, a, vol, 1)
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
	for _, code := range []codes.Code{codes.Internal, codes.InvalidArgument, codes.PermissionDenied} {
		s.Inject(func(call csitest.Call) csitest.Fault {
			if call.Method == "ControllerUnpublishVolume" {
				return csitest.Fault{Before: code}
			}
			return csitest.Fault{}
		})
		evidence, err := b.(backends.Fencer).Fence(t.Context(), req)
		wantText(t, err, backends.ErrUnavailable, "cut a off from volume "+vol.ID+": ControllerUnpublishVolume: the CSI driver says")
		if evidence != "" {
			t.Errorf("evidence %q", evidence)
		}
	}
	// It says yes, and does nothing.
	s.Inject(nil)
	s.Ignore("ControllerUnpublishVolume", true)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := b.(backends.Fencer).Fence(ctx, req)
	wantText(t, err, backends.ErrUnavailable, "the CSI driver still shows volume "+vol.ID+" published to id-of-a")
	s.Ignore("ControllerUnpublishVolume", false)
	if _, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2}); !errors.Is(err, backends.ErrInUse) {
		t.Errorf("attach after a fence that failed: %v", err)
	}
	down(t, a, vol, att)
}

// The cluster's record is away, or loses replies, in the middle of everything.
func TestCatalogAway(t *testing.T) {
	backendtest.NeedRoot(t)
	for _, op := range []string{"load", "store", "list", "load done", "store done", "list done"} {
		for n := 1; ; n++ {
			s := newStorage(t, kinds["fences"].opts, csi.Config{Fences: true})
			if _, err := s.Node("b"); err != nil {
				t.Fatal(err)
			}
			calls := 0
			s.catalog(cluster).SetFault(func(now string) error {
				if now == op {
					calls++
					if calls == n {
						return errWanted
					}
				}
				return nil
			})
			err := life(t.Context(), s, cluster)
			s.catalog(cluster).SetFault(nil)
			cleanUp(t, s, cluster)
			s.finish()
			if err == nil {
				break
			}
			wantText(t, err, backends.ErrUnavailable, "the cluster's record of CSI volumes: ")
			if t.Failed() {
				t.Fatalf("%s %d", op, n)
			}
		}
	}
}

const unheard = "the CSI driver has unpublished the volume, but did not answer at first; that call may still take effect"

// unheardOnce is no answer to the first unpublish.
func unheardOnce() func(csitest.Call) csitest.Fault {
	var once sync.Once
	return func(call csitest.Call) (fault csitest.Fault) {
		if call.Method == "ControllerUnpublishVolume" {
			once.Do(func() { fault.HangAfter = true })
		}
		return fault
	}
}

// An unpublish that got no answer may come late, also if the next one is answered: the
// driver has to know, which then lets some time pass before the volume is attached again.
func TestUnpublishUnheard(t *testing.T) {
	for kind, cfg := range map[string]csi.Config{"fences": {Fences: true}, "exclusive": {Exclusive: true}} {
		t.Run(kind, func(t *testing.T) {
			cfg.CallTimeout = time.Second
			s, cluster, vol := newVolume(t, kinds[kind].opts, cfg)
			s.Inject(unheardOnce())
			a := s.node(cluster, "a")
			att := attach(t, a, vol, 1)
			wantText(t, a.Detach(t.Context(), att), backends.ErrUnavailable, "detach volume "+vol.ID+": "+unheard)
			if err := a.Detach(t.Context(), att); err != nil {
				t.Error(err)
			}
			down(t, a, vol)
		})
	}
}

// While a node is being cut off it gets nothing any more.
func TestAttachDuringFence(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	att := attach(t, a, vol, 1)
	asked := false
	csi.SetStep(b, func(step string) {
		if step == "noted" {
			asked = true
			_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
			wantText(t, err, backends.ErrInUse, "attach volume: volume "+vol.ID+" was taken from this host, which is cut off from it up to token 1")
		}
	})
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
	if _, err := b.(backends.Fencer).Fence(t.Context(), req); err != nil || !asked {
		t.Errorf("%v, asked: %v", err, asked)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	down(t, b, vol, attach(t, b, vol, 2))
}

// An attach that is overtaken by a fence is given back, and is refused from then on.
func TestAttachOvertakenByFence(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	csi.SetStep(a, func(step string) {
		if step != "claimed" {
			return
		}
		req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
		if _, err := b.(backends.Fencer).Fence(t.Context(), req); err != nil {
			t.Error(err)
		}
	})
	req := backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1}
	_, err := a.Attach(t.Context(), req)
	wantText(t, err, backends.ErrInUse, "attach volume: volume "+vol.ID+" was taken from this host while it was being attached")
	if published := s.Published(vol.ID); len(published) > 0 {
		t.Errorf("published to %v", published)
	}
	_, err = a.Attach(t.Context(), req)
	wantText(t, err, backends.ErrInUse, "attach volume: volume "+vol.ID+" was taken from this host, which is cut off from it up to token 1")
	down(t, b, vol, attach(t, b, vol, 2))
}
