package csi_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	detachAll(t, a)
}

// detachAll detaches what a look finds.
func detachAll(t *testing.T, a backends.Backend) {
	t.Helper()
	atts, err := a.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
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

const unheard = "the CSI driver has let go of the volume, but did not answer at first; that call may still take effect"

// unheardOnce is no answer to the first call of a method.
func unheardOnce(method string) func(csitest.Call) csitest.Fault {
	var once sync.Once
	return func(call csitest.Call) (fault csitest.Fault) {
		if call.Method == method {
			once.Do(func() { fault.HangAfter = true })
		}
		return fault
	}
}

// A call for a detach that got no answer may come late, also if the next one is answered:
// the driver has to know, which then lets some time pass before the volume is attached again.
func TestUnheard(t *testing.T) {
	for kind, cfg := range map[string]csi.Config{"fences": {Fences: true}, "exclusive": {Exclusive: true}} {
		for _, method := range []string{"NodeUnpublishVolume", "NodeUnstageVolume", "ControllerUnpublishVolume"} {
			t.Run(kind+" "+method, func(t *testing.T) {
				cfg.CallTimeout = time.Second
				s, cluster, vol := newVolume(t, kinds[kind].opts, cfg)
				s.Inject(unheardOnce(method))
				a := s.node(cluster, "a")
				att := attach(t, a, vol, 1)
				err := a.Detach(t.Context(), att)
				wantText(t, err, backends.ErrUnavailable, "detach volume "+vol.ID+": "+unheard)
				wantText(t, err, backends.ErrLate, "")
				if err := a.Detach(t.Context(), att); err != nil {
					t.Error(err)
				}
				down(t, a, vol)
			})
		}
	}
}

// The same, of what an Attach that fails has made itself: whether the driver answers in
// the end or not.
func TestAttachUnheard(t *testing.T) {
	for _, answered := range []bool{true, false} {
		for _, method := range []string{"NodeUnpublishVolume", "NodeUnstageVolume", "ControllerUnpublishVolume"} {
			t.Run(fmt.Sprintf("%s answered=%t", method, answered), func(t *testing.T) {
				s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true, CallTimeout: time.Second})
				a := s.node(cluster, "a")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var failed, hung bool
				s.Inject(func(call csitest.Call) (fault csitest.Fault) {
					switch {
					case call.Method == "NodePublishVolume" && !failed:
						failed, fault.After = true, codes.Internal
					case call.Method == method && !hung:
						hung, fault.HangAfter = true, true
						if !answered {
							cancel()
						}
					}
					return fault
				})
				req := backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1}
				_, err := a.Attach(ctx, req)
				wantText(t, err, backends.ErrLate, "NodePublishVolume was done, by wish of the test")
				wantText(t, err, backends.ErrUnavailable, "")
				down(t, a, vol, attach(t, a, vol, 1))
			})
		}
	}
}

// What is left of an attachment that was cut off is taken down by a look at what there is,
// and one of these calls got no answer: the next Attach says so.
func TestTidyUnheard(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true, CallTimeout: time.Second / 2})
	a := s.node(cluster, "a")
	attach(t, a, vol, 1)
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
	if _, err := s.node(cluster, "b").(backends.Fencer).Fence(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	s.Inject(unheardOnce("NodeUnstageVolume"))
	for range 2 {
		if atts, err := a.Attachments(t.Context()); err != nil || len(atts) > 0 {
			t.Errorf("attachments: got %+v, %v", atts, err)
		}
	}
	_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
	wantText(t, err, backends.ErrLate, "attach volume: "+unheard)
	down(t, a, vol, attach(t, a, vol, 2))
}

// A call that cut a node off may come late, too: the node that has the volume next does
// not care, and the one that was cut off does, when it gets the volume again.
func TestFenceUnheard(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true, CallTimeout: time.Second})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	old := attach(t, a, vol, 1)
	s.Inject(unheardOnce("ControllerUnpublishVolume"))
	req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
	for range 2 { // the second time, all is answered
		if _, err := b.(backends.Fencer).Fence(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Detach(t.Context(), attach(t, b, vol, 2)); err != nil {
		t.Error(err)
	}
	if err := a.Detach(t.Context(), old); err != nil {
		t.Error(err)
	}
	_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 3})
	wantText(t, err, backends.ErrLate, "attach volume: "+unheard)
	wantText(t, err, backends.ErrUnavailable, "")
	down(t, a, vol, attach(t, a, vol, 3))
}

// cleanUps bring node a to where it takes down what no Detach was asked for, by a call of
// the one process or the next. Then it attaches the volume under this token.
var cleanUps = map[string]func(t *testing.T, s *storage, vol backends.Volume) (cleanUp func(a backends.Backend), token int64){
	"an attach that fails": func(t *testing.T, _ *storage, vol backends.Volume) (func(backends.Backend), int64) {
		return func(a backends.Backend) {
			_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
			wantText(t, err, backends.ErrUnavailable, "NodePublishVolume was done, by wish of the test")
		}, 1
	},
	"an attach after half a detach": func(t *testing.T, s *storage, vol backends.Volume) (func(backends.Backend), int64) {
		a := s.node(cluster, "a")
		att := attach(t, a, vol, 1)
		killAt(a, 1, func() { _ = a.Detach(t.Context(), att) })
		return func(a backends.Backend) {
			_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
		}, 1
	},
	"an attach after one of which only the publication is left": func(t *testing.T, s *storage, vol backends.Volume) (func(backends.Backend), int64) {
		if s.cfg.Fences {
			a := s.node(cluster, "a")
			killAt(a, 3, func() { _, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1}) })
			forgetPlace(t, s, vol, 1)
		}
		return func(a backends.Backend) {
			_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
		}, 2
	},
	"a look at what was cut off": func(t *testing.T, s *storage, vol backends.Volume) (func(backends.Backend), int64) {
		attach(t, s.node(cluster, "a"), vol, 1)
		if f, ok := s.node(cluster, "b").(backends.Fencer); ok {
			req := backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: csitest.NodeID("a"), Token: 1}
			if _, err := f.Fence(t.Context(), req); err != nil {
				t.Fatal(err)
			}
		}
		return func(a backends.Backend) { _, _ = a.Attachments(t.Context()) }, 2
	},
}

// forgetPlace removes what node a has on disk of an attachment that was begun.
func forgetPlace(t *testing.T, s *storage, vol backends.Volume, token int64) {
	t.Helper()
	place := filepath.Join(s.dirs["a"], "csi", strings.ReplaceAll(vol.ID, "-", "")+"."+strconv.FormatInt(token, 36))
	for _, path := range []string{"record", "stage", ""} {
		if err := os.Remove(filepath.Join(place, path)); err != nil {
			t.Fatal(err)
		}
	}
}

// attachLater is attach as the driver does it: what is in the way is detached, and where an
// earlier call may come late it asks again when none can. late makes such calls come.
func attachLater(t *testing.T, a backends.Backend, vol backends.Volume, token int64, late func()) backends.Attachment {
	t.Helper()
	req := backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token}
	att, err := a.Attach(t.Context(), req)
	if _, ok := errors.AsType[*backends.AttachedError](err); ok {
		detachAll(t, a)
		att, err = a.Attach(t.Context(), req)
	}
	if errors.Is(err, backends.ErrLate) {
		wantText(t, err, backends.ErrUnavailable, "attach volume: "+unheard)
		late()
		att, err = a.Attach(t.Context(), req)
	}
	if err != nil {
		t.Fatal(err)
	}
	return att
}

// A process is killed while it takes down what no Detach was asked for. A call for that comes
// late, and hits nothing that the next process has attached.
func TestKilledInCleanUp(t *testing.T) {
	backendtest.NeedRoot(t)
	for _, name := range []string{"fences", "fences without staging", "exclusive"} {
		for _, method := range []string{"NodeUnpublishVolume", "NodeUnstageVolume", "ControllerUnpublishVolume"} {
			if method == "NodeUnstageVolume" && !kinds[name].opts.Stage {
				continue
			}
			t.Run(name+" "+method, func(t *testing.T) {
				t.Parallel()
				s := newStorage(t, kinds[name].opts, kinds[name].cfg)
				for what, begin := range cleanUps {
					for n, step := 1, "?"; step != ""; n++ {
						for _, swept := range []bool{false, true} {
							vol, err := s.node(cluster, "a").Create(t.Context(), request(cluster))
							if err != nil {
								t.Fatal(err)
							}
							cleanUp, token := begin(t, s, vol)
							queue := make(chan struct{})
							late := sync.OnceFunc(func() {
								close(queue)
								s.Settle()
							})
							t.Cleanup(late)
							var failed, queued sync.Once
							s.Inject(func(call csitest.Call) (fault csitest.Fault) {
								switch {
								case call.Method == method:
									queued.Do(func() { fault.Queued = queue })
								case call.Method == "NodePublishVolume" && what == "an attach that fails":
									failed.Do(func() { fault.After = codes.Internal })
								}
								return fault
							})
							a := s.node(cluster, "a")
							step = killAt(a, n, func() { cleanUp(a) })
							t.Logf("%s was killed after %q (swept: %t)", what, step, swept)
							s.Inject(nil)
							a = s.node(cluster, "a")
							if swept {
								detachAll(t, a)
							}
							att := attachLater(t, a, vol, token, late)
							late()
							if atts, err := a.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
								t.Errorf("attachments: got %+v, %v; want %+v", atts, err, att)
							}
							if err := readSome(att.Device); err != nil {
								t.Errorf("the device was taken away: %v", err)
							}
							down(t, a, vol, att)
							if t.Failed() {
								t.Fatalf("%s was killed after %q (swept: %t)", what, step, swept)
							}
						}
					}
				}
			})
		}
	}
}

// readSome reads from a device, and not what the kernel has kept of it.
func readSome(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	_, err = f.ReadAt(make([]byte, 4096), 4<<20)
	return err
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
