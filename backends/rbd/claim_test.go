package rbd_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

const fakeCluster = "0fb1a3c2-7d0e-4c55-9a53-7e4ab7a0e9d1"

// attached returns a cluster whose host a has a volume under token 10.
func attached(t *testing.T) (*fakeCeph, backends.Volume, backends.Attachment) {
	t.Helper()
	c := newFake(t)
	vol, err := c.node(fakeCluster, "a").Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: fakeCluster, Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	att, err := c.attach(t, "a", vol, 10)
	if err != nil {
		t.Fatal(err)
	}
	return c, vol, att
}

func (c *fakeCeph) attach(t *testing.T, node string, vol backends.Volume, token int64) (backends.Attachment, error) {
	t.Helper()
	return c.node(fakeCluster, node).Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
}

func (c *fakeCeph) object(vol backends.Volume) *fakeObject { return c.objects["flocker-"+vol.ID] }

// client returns the one that serves a volume's device on a host.
func (c *fakeCeph) client(node string) *fakeDevice {
	for _, d := range c.hosts[fakeCluster+node].devices {
		return d
	}
	return nil
}

// TestHostComesBack: a host has died with a volume attached, and attaches it again. What
// its old client had sent may still be on its way: it is cut off first.
func TestHostComesBack(t *testing.T) {
	t.Parallel()
	c, vol, _ := attached(t)
	old := c.client("a").client
	clear(c.hosts[fakeCluster+"a"].devices)
	if _, err := c.attach(t, "a", vol, 11); err != nil {
		t.Fatal(err)
	}
	if !c.blocklist[old] {
		t.Errorf("the client %s from before is not on the blocklist", old)
	}
	if now := c.client("a").client; c.blocklist[now] {
		t.Errorf("the client %s is on the blocklist", now)
	}
}

// TestKilledClient: a client that was killed has not been heard by the cluster. Its claim
// stays until it is on the blocklist.
func TestKilledClient(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	d := c.client("a")
	d.killed = true
	if err := c.node(fakeCluster, "a").Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	_, err := c.attach(t, "b", vol, 11)
	var other *backends.AttachedError
	if !errors.As(err, &other) || other.Node != "a" || other.Token != 10 {
		t.Fatalf("got %v, want that a may still have it under token 10", err)
	}
	fencer, _ := backends.As[backends.Fencer](c.node(fakeCluster, "b"))
	evidence, err := fencer.Fence(t.Context(), backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 10})
	if want := "client " + d.client + " of a is on the blocklist, and no watcher of volumes/flocker-" + vol.ID + " any more"; err != nil || evidence != want {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if _, err := c.attach(t, "b", vol, 11); err != nil {
		t.Error(err)
	}
}

// TestBlocklistedBefore: Ceph does not extend what somebody else has put on the blocklist for
// an hour. A host that is paused for longer would write again.
func TestBlocklistedBefore(t *testing.T) {
	t.Parallel()
	c, vol, _ := attached(t)
	d := c.client("a")
	c.blocklist[d.client], c.briefly = true, map[string]bool{d.client: true}
	fencer, _ := backends.As[backends.Fencer](c.node(fakeCluster, "b"))
	fence := func() (string, error) {
		return fencer.Fence(t.Context(), backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 10})
	}
	evidence, err := fence()
	if want := "; it is tried again then, or at once after: ceph osd blocklist rm " + d.client; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if c.object(vol).locker == "" {
		t.Error("the claim is gone")
	}
	c.briefly = nil // Ceph has forgotten it, and it is put there anew
	if _, err := fence(); err != nil {
		t.Error(err)
	}
}

// TestDeadProgram: a device whose program has died is made anew, and not handed out.
func TestDeadProgram(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	d := c.client("a")
	d.killed = true
	again, err := c.attach(t, "a", vol, 10)
	if err != nil || again.ID == att.ID || again.Device == att.Device {
		t.Errorf("got %+v, %v; want another device than %+v", again, err, att)
	}
	if !c.blocklist[d.client] {
		t.Errorf("the client %s from before is not on the blocklist", d.client)
	}
}

// TestDetachLeavesOthersClaim: an operator has given the volume to somebody else by hand.
func TestDetachLeavesOthersClaim(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	o := c.object(vol)
	o.cookie, o.locker = "attach 0123456789ab 12 192.0.2.77:0/1 z", "client.999"
	if err := c.node(fakeCluster, "a").Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if o.locker != "client.999" {
		t.Error("the claim of somebody else is gone")
	}
}

// TestClaimOfNoImage: the volume is deleted between the start of a client and its claim.
func TestClaimOfNoImage(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	if err := c.node(fakeCluster, "a").Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	c.beforeClaim = func() {
		delete(c.images, "volumes/flocker-"+vol.ID)
		delete(c.objects, "flocker-"+vol.ID)
	}
	_, err := c.attach(t, "b", vol, 11)
	if !errors.Is(err, backends.ErrNotFound) || !strings.Contains(err.Error(), "it was deleted, or never made") {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if len(c.objects) > 0 {
		t.Errorf("left behind: %d objects", len(c.objects))
	}
}

// TestForeignLock: what Flocker has not written it does not remove.
func TestForeignLock(t *testing.T) {
	t.Parallel()
	c, vol, _ := attached(t)
	c.object(vol).cookie = "mine"
	_, err := c.attach(t, "b", vol, 11)
	if want := `the lock has the cookie "mine", which Flocker does not write`; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// TestOtherCephCluster: "not found" of another Ceph cluster would prove nothing.
func TestOtherCephCluster(t *testing.T) {
	t.Parallel()
	c, vol, _ := attached(t)
	ref := strings.Replace(vol.Ref, fakeFSID, "11111111-0894-4f1e-a635-d0aeaca0e993", 1)
	_, err := c.node(fakeCluster, "a").Get(t.Context(), ref)
	if want := "the volume is in the Ceph cluster 11111111-0894-4f1e-a635-d0aeaca0e993, and this host is set to " + fakeFSID; !errors.Is(err, backends.ErrInvalid) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// TestKilledAtEveryCall: the process of host a is killed before or after each call of an Attach
// or a Detach. What it leaves is seen, is no device, and is in nobody's way.
func TestKilledAtEveryCall(t *testing.T) {
	t.Parallel()
	for when, f := range map[string]fault{"before": killed, "after": killedAfter} {
		for what, token := range map[string]int64{"attach": 11, "detach": 10} {
			for does, undo := range map[string]func(h *left){
				"deleted here": func(h *left) {
					h.detach(func(att backends.Attachment) bool { return att.Device != "" })
					h.remove("a")
				},
				"detached": func(h *left) {
					h.detach(func(backends.Attachment) bool { return true })
					h.takeOver(true)
					h.remove("b")
				},
				"cut off": func(h *left) {
					h.fence()
					h.takeOver(false)
					h.detach(func(backends.Attachment) bool { return true })
					h.remove("b")
				},
				"attached again": func(h *left) {
					att, err := h.c.attach(h.T, "a", h.vol, token)
					if o := h.c.object(h.vol); err != nil || att.Device == "" || !strings.HasPrefix(o.cookie, "attach "+att.ID+" ") {
						h.Errorf("got %+v, %v; the lock is %+v", att, err, o)
					}
					h.detach(func(backends.Attachment) bool { return true })
					h.remove("a")
				},
			} {
				t.Run(what+", killed "+when+" a call, "+does, func(t *testing.T) {
					t.Parallel()
					n := 0
					for ; !t.Failed(); n++ {
						c, vol, att := attached(t)
						a := c.node(fakeCluster, "a")
						if what == "attach" {
							if err := a.Detach(t.Context(), att); err != nil {
								t.Fatal(err)
							}
						}
						struck := c.nth(f)(n)
						if what == "attach" {
							_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token}) // who is killed says nothing
						} else {
							_ = a.Detach(t.Context(), att)
						}
						if !struck() {
							break
						}
						undo(&left{t, c, vol, token})
						if devices := c.hosts[fakeCluster+"a"].devices; len(c.images)+len(c.objects)+len(devices) > 0 {
							t.Errorf("call %d: left behind: %v, %v, %v", n, c.images, c.objects, devices)
						}
					}
					if n < 3 {
						t.Errorf("there were %d calls", n)
					}
				})
			}
		}
	}
}

// left is what a process has left on host a that was killed.
type left struct {
	*testing.T
	c     *fakeCeph
	vol   backends.Volume
	token int64
}

// detach detaches what a has.
func (l *left) detach(which func(backends.Attachment) bool) {
	l.Helper()
	a := l.c.node(fakeCluster, "a")
	atts, err := a.Attachments(l.Context())
	if err != nil {
		l.Error(err)
	}
	for _, att := range atts {
		if att.Token != l.token || att.Volume != l.vol.ID {
			l.Errorf("a has %+v, want one of token %d", att, l.token)
		}
		if !which(att) {
			continue
		}
		if err := a.Detach(l.Context(), att); err != nil {
			l.Error(err)
		}
	}
}

func (l *left) remove(node string) {
	l.Helper()
	if err := l.c.node(fakeCluster, node).Delete(l.Context(), l.vol.Ref); err != nil {
		l.Error(err)
	}
}

// fence has b cut a off.
func (l *left) fence() {
	l.Helper()
	fencer, _ := backends.As[backends.Fencer](l.c.node(fakeCluster, "b"))
	_, err := fencer.Fence(l.Context(), backends.FenceRequest{Ref: l.vol.Ref, Volume: l.vol.ID, Node: "a", Token: l.token})
	if err != nil {
		l.Error(err)
	}
}

// takeOver lets b have the volume for a while. It may find a claim of a, if nobody has cut
// a off yet.
func (l *left) takeOver(claimed bool) {
	l.Helper()
	att, err := l.c.attach(l.T, "b", l.vol, 12)
	if other, ok := errors.AsType[*backends.AttachedError](err); ok && claimed && other.Node == "a" && other.Token == l.token {
		l.fence()
		att, err = l.c.attach(l.T, "b", l.vol, 12)
	}
	if err == nil {
		err = l.c.node(fakeCluster, "b").Detach(l.Context(), att)
	}
	if err != nil {
		l.Error(err)
	}
}

// TestDeleteOfLateClaim: a claim that comes when its host was cut off is in nobody's way. A
// younger one is.
func TestDeleteOfLateClaim(t *testing.T) {
	t.Parallel()
	for token, late := range map[string]bool{"9": true, "10": true, "11": false} {
		c, vol, _ := attached(t)
		l := &left{t, c, vol, 10}
		l.fence()
		const client = "192.0.2.77:0/1"
		c.object(vol).cookie, c.object(vol).locker = "attach 0123456789ab "+token+" "+client+" a", "client.999"
		c.images["volumes/flocker-"+vol.ID].watchers[client] = true
		err := c.node(fakeCluster, "b").Delete(t.Context(), vol.Ref)
		if _, attached := errors.AsType[*backends.AttachedError](err); attached == late || late && err != nil || c.blocklist[client] != late {
			t.Errorf("token %s: got %v; on the blocklist: %t", token, err, c.blocklist[client])
		}
	}
}

// TestDeleteOfRenamed: what has become of the image is not known, and its client writes.
func TestDeleteOfRenamed(t *testing.T) {
	t.Parallel()
	c, vol, _ := attached(t)
	delete(c.images, "volumes/flocker-"+vol.ID)
	if err := c.node(fakeCluster, "b").Delete(t.Context(), vol.Ref); !errors.Is(err, backends.ErrNotFound) || c.object(vol) == nil || c.object(vol).locker == "" {
		t.Errorf("got %v, want ErrNotFound; the lock is %+v", err, c.object(vol))
	}
}

// TestDeleteOfDeleted: a Delete has come no further than to remove the image. The next one
// removes the rest.
func TestDeleteOfDeleted(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	a := c.node(fakeCluster, "a")
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	fails := true
	c.fault = func(_ string, args []string) fault {
		if fails && slices.Contains(args, "rm") && slices.Contains(args, "flocker-"+vol.ID) {
			return lost
		}
		return heard
	}
	if err := c.node(uuid.NewString(), "a").Delete(t.Context(), vol.Ref); !errors.Is(err, backends.ErrNotFound) || c.object(vol) == nil {
		t.Errorf("another cluster's: got %v, want ErrNotFound; its object is %+v", err, c.object(vol))
	}
	for range 2 {
		if err := a.Delete(t.Context(), vol.Ref); !errors.Is(err, backends.ErrUnavailable) || errors.Is(err, backends.ErrNotFound) || c.object(vol) == nil {
			t.Errorf("got %v, want that it is not known to be gone", err)
		}
	}
	fails = false
	if err := a.Delete(t.Context(), vol.Ref); !errors.Is(err, backends.ErrNotFound) || c.object(vol) != nil {
		t.Errorf("got %v, want ErrNotFound; left behind: %+v", err, c.object(vol))
	}
}

// TestDeleteOfHalfMade: a Create has come no further than to make the image, and is given up.
// Until then it is nobody's; whoever finds it by its dataset removes it.
func TestDeleteOfHalfMade(t *testing.T) {
	t.Parallel()
	c := newFake(t)
	c.fault = func(_ string, args []string) fault {
		if slices.Contains(args, "image-meta") && slices.Contains(args, "set") {
			return lost
		}
		return heard
	}
	a, id := c.node(fakeCluster, "a"), uuid.NewString()
	_, err := a.Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: fakeCluster, Size: 1 << 20})
	if !errors.Is(err, backends.ErrUnavailable) || len(c.images) != 1 {
		t.Fatalf("got %v, and images %v", err, c.images)
	}
	found, err := a.List(t.Context())
	if err != nil || len(found) != 1 || found[0].ID != id || found[0].Cluster != "" {
		t.Fatalf("List: %+v, %v, want what is half made", found, err)
	}
	if _, err := a.Get(t.Context(), found[0].Ref); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("Get: %v, want ErrNotFound", err)
	}
	if err := a.Delete(t.Context(), found[0].Ref); err != nil || len(c.images)+len(c.objects) > 0 {
		t.Errorf("Delete: %v; left behind: %v, %v", err, c.images, c.objects)
	}
}

// TestDeleteOfStaleClaim: a host has died with a claim, and nobody wants the volume any more.
// Whoever deletes it may wait for less long than its client may come back in.
func TestDeleteOfStaleClaim(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		by    string
		wants []string
	}{
		"elsewhere": {"b", []string{"is no watcher of volumes/flocker-", "if it is none in 35s either, the next try"}},
		"here":      {"a", []string{""}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, vol, _ := attached(t)
				client := c.client("a").client
				clear(c.hosts[fakeCluster+"a"].devices)
				delete(c.images["volumes/flocker-"+vol.ID].watchers, client)
				b := c.node(fakeCluster, test.by)
				remove := func() error {
					ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
					defer cancel()
					return b.Delete(ctx, vol.Ref)
				}
				var said []string
				for range 3 {
					err := remove()
					if err == nil {
						said = append(said, "")
						break
					}
					if other, ok := errors.AsType[*backends.AttachedError](err); !ok || other.Node != "a" || other.Token != 10 || errors.Is(err, backends.ErrUnavailable) {
						t.Errorf("got %v, want that a has it under token 10", err)
					}
					said = append(said, err.Error())
					time.Sleep(30 * time.Second)
				}
				if all := strings.Join(said, "\n"); said[len(said)-1] != "" {
					t.Errorf("it was not deleted:\n%s", all)
				} else {
					for _, want := range test.wants {
						if !strings.Contains(all, want) {
							t.Errorf("got\n%s\nwant %q", all, want)
						}
					}
				}
				if !c.blocklist[client] {
					t.Errorf("the client %s is not on the blocklist", client)
				}
			})
		})
	}
}

// TestDeleteWhileOpen: somebody else has the image open all the time. Also who has not the
// time to wait for its end is told who that is.
func TestDeleteWhileOpen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, vol, att := attached(t)
		a := c.node(fakeCluster, "a")
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		c.images["volumes/flocker-"+vol.ID].watchers["192.0.2.99:0/1"] = true
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		err := a.Delete(ctx, vol.Ref)
		if want := "is open on 192.0.2.99:0/1, by none of Flocker's hosts"; !errors.Is(err, backends.ErrInUse) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		if o := c.object(vol); o.locker != "" {
			t.Errorf("the claim %q is left", o.cookie)
		}
	})
}

// TestAttachAsksTogether: what does not depend on each other is asked at the same time, and
// who was cut off only when the claim is there.
func TestAttachAsksTogether(t *testing.T) {
	t.Parallel()
	c, vol, att := attached(t)
	if err := c.node(fakeCluster, "a").Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var order []string
	var pairs [2]sync.WaitGroup // before the claim, and after it
	pairs[0].Add(2)
	pairs[1].Add(2)
	c.before = func(program string, args []string) {
		call := program + " " + args[0]
		if program == "rados" {
			call = program + " " + strings.Join(args[4:6], " ")
		}
		if program == "ceph" || args[0] == "image-meta" { // asked once in a process
			return
		}
		mu.Lock()
		pair := &pairs[0]
		if slices.Contains(order, "rados lock get") {
			pair = &pairs[1]
		}
		order = append(order, call)
		mu.Unlock()
		if call == "rados lock get" {
			return
		}
		pair.Done()
		both := make(chan struct{})
		go func() { pair.Wait(); close(both) }()
		select {
		case <-both:
		case <-time.After(30 * time.Second):
			t.Errorf("%s is asked alone", call)
		}
	}
	if _, err := c.attach(t, "b", vol, 11); err != nil {
		t.Fatal(err)
	}
	if len(order) == 5 {
		slices.Sort(order[:2])
		slices.Sort(order[3:])
	}
	want := []string{"rados lock info", "rbd info", "rados lock get", "rados listomapkeys flocker-" + vol.ID, "rbd info"}
	if !slices.Equal(order, want) {
		t.Errorf("got  %s\nwant %s", order, want)
	}
}
