package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/teststore"
)

// server is the storage system. Each volume has a lock of its own.
type server struct {
	dir  string
	host string // the IP address that data is served on

	mu      sync.Mutex
	volumes map[string]*volume // by reference; those that were deleted, too
	faults  []*suffering

	data dataFaults
}

// newServer takes up what an earlier one has left in dir, data servers included.
func newServer(dir string, listening net.Addr) (*server, error) {
	if _, err := exec.LookPath("nbdkit"); err != nil {
		return nil, fmt.Errorf("%w; `make deps` installs it", err)
	}
	host, _, err := net.SplitHostPort(listening.String())
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	s := &server{dir: dir, host: host, volumes: map[string]*volume{}}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if err := s.entry(e.Name()).load(); err != nil {
			return nil, err
		}
	}
	return s, s.adopt()
}

// adopt takes over the data servers that run already, and ends those of no grant.
func (s *server) adopt() error {
	found, err := findSessions(s.dir)
	if err != nil {
		return err
	}
	for _, se := range found {
		v := s.entry(se.ref)
		granted := -1
		if v.record != nil {
			granted = slices.IndexFunc(v.record.Grants, func(g teststore.Grant) bool { return g.ID == se.grant })
		}
		if granted < 0 || v.sessions[se.grant] != nil {
			if err := se.end(); err != nil {
				return err
			}
			continue
		}
		se.initiator = v.record.Grants[granted].Initiator
		v.sessions[se.grant] = se
	}
	return nil
}

// entry returns what there is, or was, or will be, of a volume.
func (s *server) entry(ref string) *volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[ref]
	if v == nil {
		v = &volume{dir: filepath.Join(s.dir, ref), sessions: map[string]*session{}}
		s.volumes[ref] = v
	}
	return v
}

func (s *server) entries() []*volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*volume
	for _, v := range s.volumes {
		all = append(all, v)
	}
	return all
}

func (s *server) operations() map[string]operation {
	return map[string]operation{
		teststore.OpCreate: s.suffer(teststore.OpCreate, s.create),
		teststore.OpDelete: s.suffer(teststore.OpDelete, s.locked((*volume).remove)),
		teststore.OpGet:    s.suffer(teststore.OpGet, s.locked((*volume).get)),
		teststore.OpList:   s.suffer(teststore.OpList, s.list),
		teststore.OpResize: s.suffer(teststore.OpResize, s.locked((*volume).resize)),
		teststore.OpAttach: s.suffer(teststore.OpAttach, s.locked((*volume).attach)),
		teststore.OpDetach: s.suffer(teststore.OpDetach, s.detach),
		teststore.OpFence:  s.suffer(teststore.OpFence, s.locked((*volume).fence)),
		teststore.OpLogin:  s.login,
		teststore.OpGrants: s.grants,
		teststore.OpFaults: s.setFaults,
	}
}

// locked finds a volume that has to be there and does something to it with its
// lock. A caller that does not wait any more does not stop it.
func (s *server) locked(do func(*volume, teststore.Request) (teststore.Reply, error)) operation {
	return func(_ context.Context, req teststore.Request) (teststore.Reply, error) {
		v := s.entry(req.Ref)
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.record == nil || (req.Cluster != "" && req.Cluster != v.record.Cluster) {
			return teststore.Reply{}, fmt.Errorf("volume %s: %w", req.Ref, backends.ErrNotFound)
		}
		return do(v, req)
	}
}

func (s *server) create(_ context.Context, req teststore.Request) (teststore.Reply, error) {
	if req.Ref != filepath.Base(req.Ref) || strings.HasPrefix(req.Ref, ".") {
		return teststore.Reply{}, fmt.Errorf("reference %q: %w", req.Ref, backends.ErrInvalid)
	}
	v := s.entry(req.Ref)
	v.mu.Lock()
	defer v.mu.Unlock()
	want := teststore.Volume{
		Ref: req.Ref, ID: req.Volume, Cluster: req.Cluster, Name: req.Name,
		Size: roundUp(req.Size), Exclusive: req.Exclusive,
	}
	if v.record == nil {
		if err := v.make(want); err != nil {
			return teststore.Reply{}, err
		}
	}
	if is := v.record.Volume; is.Size != want.Size || is.Cluster != want.Cluster {
		return teststore.Reply{}, fmt.Errorf("there is one with this id, %d bytes large, of cluster %s: %w", is.Size, is.Cluster, backends.ErrExists)
	}
	return teststore.Reply{Volumes: []teststore.Volume{v.record.Volume}}, nil
}

func roundUp(size int64) int64 {
	return (size + teststore.Unit - 1) / teststore.Unit * teststore.Unit
}

func (s *server) list(_ context.Context, req teststore.Request) (teststore.Reply, error) {
	var reply teststore.Reply
	for _, v := range s.entries() {
		v.mu.Lock()
		if v.record != nil && (req.Cluster == "" || req.Cluster == v.record.Cluster) {
			reply.Volumes = append(reply.Volumes, v.record.Volume)
		}
		v.mu.Unlock()
	}
	return reply, nil
}

// detach is fine with a volume that is gone.
func (s *server) detach(ctx context.Context, req teststore.Request) (teststore.Reply, error) {
	req.Cluster = ""
	reply, err := s.locked((*volume).detach)(ctx, req)
	if errors.Is(err, backends.ErrNotFound) {
		return teststore.Reply{}, nil
	}
	return reply, err
}

// login gives a grant a new data server, in place of the one it has.
func (s *server) login(ctx context.Context, req teststore.Request) (teststore.Reply, error) {
	return s.locked(func(v *volume, req teststore.Request) (teststore.Reply, error) {
		se, err := v.login(req, s.host)
		if err != nil {
			return teststore.Reply{}, err
		}
		s.data.apply(se)
		return teststore.Reply{Address: se.address}, nil
	})(ctx, req)
}

// grants lists those of an initiator.
func (s *server) grants(_ context.Context, req teststore.Request) (teststore.Reply, error) {
	var reply teststore.Reply
	for _, v := range s.entries() {
		v.mu.Lock()
		if v.record != nil {
			for _, g := range v.record.Grants {
				if req.Initiator == "" || g.Initiator == req.Initiator {
					reply.Grants = append(reply.Grants, v.grant(g))
				}
			}
		}
		v.mu.Unlock()
	}
	return reply, nil
}

// newID names a grant, in a way that fits into a file name.
func newID() string { return strings.ToLower(rand.Text()[:12]) }

var (
	// errRefused is answered as a server that is overloaded does, errDropped not at
	// all.
	errRefused = errors.New("the storage system is busy; try again later")
	errDropped = errors.New("the reply is dropped")
)

// suffering is a fault and how many calls have suffered it.
type suffering struct {
	teststore.Fault
	calls int
}

// suffer makes an operation suffer the fault that fits it.
func (s *server) suffer(op string, do operation) operation {
	return func(ctx context.Context, req teststore.Request) (teststore.Reply, error) {
		f := s.fault(op, req)
		if f.Refuse {
			return teststore.Reply{}, errRefused
		}
		run := func() (teststore.Reply, error) {
			time.Sleep(f.Before)
			reply, err := do(ctx, req)
			time.Sleep(f.After)
			return reply, err
		}
		if f.HangUp {
			go run() //nolint:errcheck // nobody waits for the reply: that is the fault
			return teststore.Reply{}, errDropped
		}
		reply, err := run()
		if f.Drop {
			return teststore.Reply{}, errDropped
		}
		return reply, err
	}
}

// fault returns the fault a call suffers; a zero one is none.
func (s *server) fault(op string, req teststore.Request) teststore.Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if (f.Op == "" || f.Op == op) && (f.Caller == "" || f.Caller == req.Caller) && (f.Ref == "" || f.Ref == req.Ref) &&
			(f.Times == 0 || f.calls < f.Times) {
			f.calls++
			return f.Fault
		}
	}
	return teststore.Fault{}
}

// setFaults replaces the faults, and says how many calls suffered each of the old
// ones.
func (s *server) setFaults(_ context.Context, req teststore.Request) (reply teststore.Reply, err error) {
	s.mu.Lock()
	for _, f := range s.faults {
		reply.Suffered = append(reply.Suffered, f.calls)
	}
	s.faults = nil
	for _, f := range req.Faults {
		s.faults = append(s.faults, &suffering{Fault: f})
	}
	s.mu.Unlock()

	s.data.set(req.DataFaults)
	for _, v := range s.entries() {
		v.mu.Lock()
		for _, se := range v.sessions {
			s.data.apply(se)
		}
		v.mu.Unlock()
	}
	return reply, nil
}
