package rbd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// TestFaults moves a volume between three hosts, and takes it over from hosts that go on
// writing, while calls of Ceph's programs are lost, not answered, or carried out late. What
// was acknowledged is there for the next owner, and nobody else can write.
func TestFaults(t *testing.T) {
	t.Parallel()
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 1))
			c := newFake(t)
			cluster, id := uuid.NewString(), uuid.NewString()
			nodes := []string{"a", "b", "c"}
			vol, err := c.node(cluster, "a").Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: cluster, Size: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			var calls atomic.Int64
			c.fault = func(string, []string) fault {
				calls.Add(1)
				if rand.N(10) == 0 {
					return fault(rand.N(int(faultEnds)))
				}
				return heard
			}
			s := &story{T: t, c: c, cluster: cluster, vol: vol}
			s.owner, s.token = "a", 1
			s.att = s.attach()
			for range 60 {
				s.check()
				next := nodes[random.IntN(len(nodes))]
				if random.IntN(2) == 0 {
					s.detach()
				} else {
					s.cutOff(next)
				}
				s.owner, s.token = next, s.token+1
				s.att = s.attach()
			}
			t.Logf("%d calls", calls.Load())
		})
	}
}

// TestEveryCallFails: each call of a volume's life fails in each way, or its process is killed.
// Nothing is left of the volume in the end, unless that comes when it is gone.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	type suffered struct {
		fault
		late time.Duration
	}
	for name, f := range map[string]suffered{
		"refused":                 {fault: refused},
		"lost":                    {fault: lost},
		"no answer":               {fault: silent},
		"answer lost":             {fault: unheard},
		"half an answer":          {fault: half},
		"carried out soon":        {dawdles, 35 * time.Millisecond},
		"carried out later":       {dawdles, 150 * time.Millisecond},
		"carried out late":        {dawdles, 350 * time.Millisecond},
		"carried out much later":  {dawdles, time.Second},
		"process killed":          {fault: killed},
		"process killed after it": {fault: killedAfter},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				backendtest.RunCase(t, "every request fails", backendtest.Config{Size: 1 << 20, Timeout: 20 * time.Second, New: func(t backendtest.T) backendtest.Storage {
					c := newFake(t)
					c.pace, c.late = 10*time.Millisecond, f.late
					s := c.storage()
					s.Faults = map[string]func(n int) func() bool{name: c.nth(f.fault)}
					t.Cleanup(func() {
						if c.mu.Lock(); f.late == 0 && len(c.images)+len(c.objects) > 0 {
							t.Errorf("left behind: %v, %v", c.images, c.objects)
						}
						c.mu.Unlock()
					})
					return s
				}})
			})
		})
	}
}

// story is a volume and its owner; what the driver does with a backend.
type story struct {
	*testing.T
	c       *fakeCeph
	cluster string
	vol     backends.Volume
	owner   string
	token   int64
	att     backends.Attachment
	last    uint64
	cut     []cutDevice
}

type cutDevice struct {
	node   string
	device backendtest.Device
	att    backends.Attachment
}

// again makes a call until it is heard.
func (s *story) again(what string, call func(ctx context.Context) error) {
	s.Helper()
	for range 200 {
		ctx, cancel := context.WithTimeout(s.Context(), 5*time.Second)
		err := call(ctx)
		cancel()
		if err == nil {
			return
		}
		if !errors.Is(err, backends.ErrUnavailable) {
			s.Fatalf("%s: %v", what, err)
		}
	}
	s.Fatalf("%s: not heard", what)
}

func (s *story) fence(by, node string, token int64) {
	s.Helper()
	s.again("fence", func(ctx context.Context) error {
		fencer, _ := backends.As[backends.Fencer](s.c.node(s.cluster, by))
		_, err := fencer.Fence(ctx, backends.FenceRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Node: node, Token: token})
		return err
	})
}

// attach makes way for the present owner, as the driver does.
func (s *story) attach() (att backends.Attachment) {
	s.Helper()
	s.again("attach", func(ctx context.Context) (err error) {
		att, err = s.c.node(s.cluster, s.owner).Attach(ctx, backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: s.token})
		var other *backends.AttachedError
		if errors.As(err, &other) {
			if other.Token >= s.token {
				return fmt.Errorf("a claim of the future: %w", other)
			}
			if other.Node == s.owner {
				s.dropAll(s.owner)
			} else {
				s.fence(s.owner, other.Node, other.Token)
			}
			return backends.ErrUnavailable
		}
		return err
	})
	return att
}

// dropAll ends what a host has from before.
func (s *story) dropAll(node string) {
	s.Helper()
	for _, cut := range s.cut {
		if cut.node == node {
			_ = cut.device.Close() // it may be closed
		}
	}
	b := s.c.node(s.cluster, node)
	atts, err := b.Attachments(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, att := range atts {
		s.again("detach", func(ctx context.Context) error { return b.Detach(ctx, att) })
	}
}

func (s *story) detach() {
	s.Helper()
	s.again("detach", func(ctx context.Context) error { return s.c.node(s.cluster, s.owner).Detach(ctx, s.att) })
}

// cutOff has another host cut the owner off, which has the device open and does not know.
func (s *story) cutOff(by string) {
	s.Helper()
	device, err := s.c.open(s.owner, s.att.Device, false)
	if err != nil {
		s.Fatal(err)
	}
	s.cut = append(s.cut, cutDevice{s.owner, device, s.att})
	s.fence(by, s.owner, s.token)
}

// check demands that the owner reads what was acknowledged and can write, and nobody
// else.
func (s *story) check() {
	s.Helper()
	for _, cut := range s.cut {
		if _, err := cut.device.WriteAt([]byte("written after the fence"), 0); err == nil {
			s.Fatalf("%s writes under token %d, and %s is the owner with %d", cut.node, cut.att.Token, s.owner, s.token)
		}
		// Nor does it get the volume again.
		att, err := s.c.node(s.cluster, cut.node).Attach(s.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: cut.att.Token})
		if err == nil {
			s.Fatalf("%s has got %+v after it was cut off", cut.node, att)
		}
	}
	for len(s.cut) > 3 {
		_ = s.cut[0].device.Close() // it may be closed
		s.cut = s.cut[1:]
	}
	device, err := s.c.open(s.owner, s.att.Device, false)
	if err != nil {
		s.Fatal(err)
	}
	defer device.Close()
	buf := make([]byte, 8)
	if _, err := device.ReadAt(buf, 0); err != nil || binary.LittleEndian.Uint64(buf) != s.last {
		s.Fatalf("%s reads %d, %v; want %d", s.owner, binary.LittleEndian.Uint64(buf), err, s.last)
	}
	s.last++
	binary.LittleEndian.PutUint64(buf, s.last)
	if _, err := device.WriteAt(buf, 0); err != nil {
		s.Fatalf("%s cannot write: %v", s.owner, err)
	}
}
