package rest_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// The nodes of most tests, and ids that nobody has.
const (
	alpha = "a0000000-0000-4000-8000-00000000000a"
	beta  = "b0000000-0000-4000-8000-00000000000b"
	id1   = "11111111-1111-4111-8111-11111111111f"
	id2   = "22222222-2222-4222-8222-222222222222"

	// long is what nothing takes, on a machine that has very much else to do.
	long = 60 * time.Second
)

// cluster is a driver and what is seen of it, in memory: a placement is mounted at once,
// unless the volume is held.
type cluster struct {
	mu      sync.Mutex
	state   *ownership.State
	events  []ownership.Event
	base    int64 // events up to it are gone
	changed chan struct{}
	unknown bool // nothing was ever heard
	stale   time.Duration
	err     error           // of all changes
	placing error           // of what names a node
	panics  string          // in all changes
	first   *string         // the id of a volume of the name that is created, which another host makes first
	held    map[string]bool // volumes that are in use where they are
	calls   []string
	waits   int // calls of Wait
	// hang, if set, has all changes wait for it; told is why events cannot be told, and
	// broken has that panic.
	hang    chan struct{}
	hanging atomic.Int64
	burden  bool // what is deleted is not gone from the storage yet
	endless bool // a new volume is made until nobody waits for it
	told    error
	broken  bool
	// late is how long it takes until a change is seen, and seen what is seen until then.
	late time.Duration
	seen *ownership.State
}

func newCluster() *cluster {
	c := &cluster{changed: make(chan struct{}), held: map[string]bool{}, state: &ownership.State{Revision: 100}}
	for i, id := range []string{alpha, beta} {
		host := []string{"alpha", "beta"}[i]
		c.state.Nodes = append(c.state.Nodes, ownership.NodeStatus{Live: true, Node: ownership.Node{
			ID: id, Host: host, Boot: "boot-of-" + host, Address: fmt.Sprintf("10.0.0.%d", i+1),
		}})
	}
	return c
}

// change makes a new State, and an event if it is told what happened.
func (c *cluster) change(what, volume, by string, with func(s *ownership.State)) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := &ownership.State{Revision: c.state.Revision + 1, Time: time.Now(), Views: slices.Clone(c.state.Views), Nodes: slices.Clone(c.state.Nodes), Gone: slices.Clone(c.state.Gone)}
	with(next)
	slices.SortFunc(next.Views, func(a, b ownership.View) int { return strings.Compare(a.Volume.Name, b.Volume.Name) })
	if c.late > 0 {
		if c.seen == nil {
			c.seen = c.state
		}
		time.AfterFunc(c.late, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.seen != nil && next.Revision > c.seen.Revision {
				c.seen = next
				close(c.changed)
				c.changed = make(chan struct{})
			}
		})
	}
	c.state = next
	if what != "" {
		c.events = append(c.events, ownership.Event{Revision: next.Revision, At: time.Now(), What: what, Name: volume, Node: alpha, Host: "alpha", By: by})
	}
	if c.late == 0 {
		close(c.changed)
		c.changed = make(chan struct{})
	}
	return next.Revision
}

func (c *cluster) view(name string, with func(v *ownership.View)) int64 {
	return c.change("", "", "", func(s *ownership.State) {
		for i := range s.Views {
			if s.Views[i].Volume.Name == name {
				with(&s.Views[i])
			}
		}
	})
}

// mount is what a node does about a placement.
func (c *cluster) mount(name string) {
	c.view(name, func(v *ownership.View) {
		if v.Placement == nil {
			v.Owner, v.Presence = nil, nil
			return
		}
		node := v.Placement.Node
		v.Owner, v.OwnerLive = &ownership.Owner{Volume: v.Volume.ID, Node: node, Host: v.Placement.Host, Token: 7}, true
		v.Presence = &ownership.Presence{Volume: v.Volume.ID, Node: node, Token: 7, Path: "/flocker/mnt/" + v.Volume.ID + "/data"}
	})
}

// asked notes a call, which may be to fail.
func (c *cluster) asked(format string, args ...any) error {
	if c.hang != nil {
		c.hanging.Add(1)
		<-c.hang
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, fmt.Sprintf(format, args...))
	if c.panics != "" {
		panic(c.panics)
	}
	return c.err
}

func (c *cluster) asks() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.calls)
}

func (c *cluster) CreateVolume(ctx context.Context, r driver.CreateRequest) (driver.Volume, error) {
	if c.endless {
		<-ctx.Done()
		return driver.Volume{}, ctx.Err()
	}
	if err := c.asked("create %s %v %v by %s", r.Name, r.Options, r.Labels, r.By); err != nil {
		return driver.Volume{}, err
	}
	if r.ID == "" {
		r.ID = uuid.NewString()
	}
	vol := ownership.Volume{
		ID: r.ID, Name: r.Name, Backend: "loopback", FS: "ext4", Size: 10 << 30, Labels: r.Labels, Profile: r.Options["profile"],
		Phase: ownership.PhaseReady, Created: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC),
	}
	if size := r.Options["size"]; size != "" {
		_, _ = fmt.Sscan(size, &vol.Size)
	}
	if c.first != nil { // another host, just before
		vol := vol
		vol.ID = *c.first
		c.change("create", vol.Name, "", func(s *ownership.State) { s.Views = append(s.Views, ownership.View{Volume: vol}) })
		if r.New {
			return driver.Volume{}, &ownership.TakenError{Name: vol.Name, ID: r.ID, By: vol.ID}
		}
	}
	vol.Revision = c.change("create", vol.Name, r.By, func(s *ownership.State) {
		vol.Revision = s.Revision
		s.Views = append(s.Views, ownership.View{Volume: vol})
	})
	return driver.Volume{Name: vol.Name, Definition: vol}, nil
}

func (c *cluster) RemoveVolume(ctx context.Context, name, id string) error {
	if err := c.asked("remove %s by %s", name, ownership.Wanted(ctx)); err != nil {
		return err
	}
	err := fmt.Errorf("%w: %s", ownership.ErrNotFound, name)
	c.change("delete", name, "", func(s *ownership.State) {
		if i := slices.IndexFunc(s.Views, func(v ownership.View) bool { return v.Volume.ID == id }); i >= 0 && c.burden {
			s.Views[i].Volume.Phase = ownership.PhaseDeleting
		}
		s.Views = slices.DeleteFunc(s.Views, func(v ownership.View) bool {
			if v.Volume.Name != name || v.Volume.ID != id {
				return false
			}
			gone := ownership.Gone{Volume: v.Volume}
			if v.Placement != nil {
				gone.Node = v.Placement.Node
			}
			s.Gone, err = append(s.Gone, gone), nil
			return !c.burden
		})
	})
	return err
}

func (c *cluster) MoveVolume(_ context.Context, name, id, host, by string) (p ownership.Placement, err error) {
	if c.placing != nil {
		return p, c.placing
	}
	if err := c.asked("move %s to %q by %s", name, host, by); err != nil {
		return p, err
	}
	revision := c.view(name, func(v *ownership.View) {
		switch {
		case v.Volume.ID != id:
			err = fmt.Errorf("%w: %s", ownership.ErrNotFound, name)
			return
		case host == "":
			v.Placement = nil
			return
		}
		p = ownership.Placement{Volume: v.Volume.ID, Node: host, Host: "alpha", By: by}
		if host == beta || host == "beta" {
			p.Node, p.Host = beta, "beta"
		} else {
			p.Node = alpha
		}
		v.Placement = &p
	})
	c.mu.Lock()
	held := c.held[name]
	c.mu.Unlock()
	if !held {
		c.mount(name)
	}
	p.Revision = revision
	return p, err
}

func (c *cluster) Lease(_ context.Context, vid, node string, ttl *time.Duration, by string) (l ownership.Lease, created bool, err error) {
	if c.placing != nil {
		return l, false, c.placing
	}
	if err := c.asked("lease to %s by %s", node, by); err != nil {
		return l, false, err
	}
	l = ownership.Lease{Volume: vid, Node: node, By: by}
	if ttl != nil {
		ends := time.Now().Add(*ttl)
		l.Expires = &ends
	}
	c.change("", "", "", func(s *ownership.State) {
		for i := range s.Views {
			v := &s.Views[i]
			switch {
			case v.Volume.ID != vid:
			case v.Lease != nil && v.Lease.Node != node:
				err = &ownership.LeasedError{Lease: *v.Lease}
			default:
				created = v.Lease == nil
				l.Revision = s.Revision
				v.Lease = new(l)
			}
		}
	})
	return l, created, err
}

func (c *cluster) Unlease(_ context.Context, vid, by string) (l ownership.Lease, err error) {
	if err := c.asked("release by %s", by); err != nil {
		return l, err
	}
	err = ownership.ErrNoLease
	c.change("", "", "", func(s *ownership.State) {
		for i := range s.Views {
			if v := &s.Views[i]; v.Volume.ID == vid && v.Lease != nil {
				l, err, v.Lease = *v.Lease, nil, nil
			}
		}
	})
	return l, err
}

func (c *cluster) Cordon(_ context.Context, host, by string, on bool) error {
	if c.placing != nil {
		return c.placing
	}
	if err := c.asked("cordon %s %v by %s", host, on, by); err != nil {
		return err
	}
	c.change("", "", "", func(s *ownership.State) {
		for i := range s.Nodes {
			if s.Nodes[i].ID == host {
				s.Nodes[i].State = map[bool]string{true: "cordoned"}[on]
			}
		}
	})
	return nil
}

func (c *cluster) Drain(_ context.Context, host, by string) (driver.Drained, error) {
	return driver.Drained{Released: []string{"a"}, Busy: []driver.BusyVolume{{Name: "b", Containers: []string{"web"}}}}, c.asked("drain %s by %s", host, by)
}

func (c *cluster) RemoveNode(_ context.Context, host, by string) error {
	if err := c.asked("remove node %s by %s", host, by); err != nil {
		return err
	}
	c.change("", "", "", func(s *ownership.State) {
		for i := range s.Nodes {
			if s.Nodes[i].ID == host {
				s.Nodes[i].State, s.Nodes[i].Live = ownership.Removed, false
			}
		}
	})
	return nil
}

func (c *cluster) State() (*ownership.State, time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.seen, c.state), c.stale, !c.unknown
}

func (c *cluster) waited() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.waits
}

func (c *cluster) Wait(ctx context.Context, after int64) (*ownership.State, error) {
	c.mu.Lock()
	c.waits++
	c.mu.Unlock()
	for {
		c.mu.Lock()
		s, changed, whole := cmp.Or(c.seen, c.state), c.changed, c.stale == 0 && !c.unknown
		c.mu.Unlock()
		if whole && s.Revision > after {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (c *cluster) Events(_ context.Context, after int64, limit int) (some []ownership.Event, next int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		panic("no such event")
	}
	if c.told != nil {
		return nil, 0, c.told
	}
	if after < c.base {
		return nil, 0, &ownership.GoneError{Before: c.base + 1}
	}
	next = c.state.Revision
	for _, e := range c.events {
		if e.Revision <= after {
			continue
		}
		if some = append(some, e); len(some) == limit {
			return some, e.Revision, nil
		}
	}
	return some, next, nil
}

// A service is an API that is served, with the certificates of all roles: the users anna
// and, who only reads, rita, and the host alpha.
type service struct {
	*cluster
	t       testing.TB
	dir     string
	address string
	log     *logs
	stop    func()
	stopped chan error
}

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

const year = 365 * 24 * time.Hour

// shared are the certificates of most tests: making them takes longer than most tests do.
var shared string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "certificates")
	if err != nil {
		panic(err)
	}
	shared = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// once makes the shared certificates.
var once sync.Once

// authority makes certificates of its own.
func authority(t testing.TB) (dir string) {
	t.Helper()
	dir = t.TempDir()
	certify(t, dir)
	return dir
}

func certify(t testing.TB, dir string) {
	t.Helper()
	if err := certs.Init(dir, "prod", certs.Lifetime); err != nil {
		t.Fatal(err)
	}
	a, err := certs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Node(certs.Host{Name: "alpha"}, year); err != nil {
		t.Fatal(err)
	}
	for name, role := range map[string]certs.Role{"anna": certs.User, "rita": certs.Reader} {
		if _, err := a.User(name, role, year); err != nil {
			t.Fatal(err)
		}
	}
}

func files(dir, holder string) certs.Files {
	path := filepath.Join(dir, holder)
	return certs.Files{CA: filepath.Join(dir, certs.CAFile), Cert: path + ".crt", Key: path + ".key"}
}

func load(t testing.TB, f certs.Files) *certs.Credentials {
	t.Helper()
	c, err := certs.Load(f, func(err error) { t.Errorf("warned of %v", err) })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func serve(t testing.TB) *service {
	t.Helper()
	once.Do(func() { certify(t, shared) })
	return serveWith(t, shared)
}

func serveWith(t testing.TB, dir string) *service {
	t.Helper()
	c := newCluster()
	s := &service{cluster: c, t: t, dir: dir, log: &logs{}, stopped: make(chan error, 1)}
	log := logrus.New()
	log.SetOutput(s.log)
	log.SetLevel(logrus.InfoLevel)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	creds, err := certs.Load(files(s.dir, "alpha/control-service"), func(err error) { log.Warn(err) })
	if err != nil {
		t.Fatal(err)
	}
	api := rest.New(rest.Config{Driver: c, Leases: c, Cluster: c, Version: "2.0.0", Log: logrus.NewEntry(log)})
	done := make(chan struct{})
	go func() {
		s.stopped <- rest.Serve(ctx, l, creds, api, logrus.NewEntry(log))
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(long):
			t.Error("the server does not stop")
		}
	})
	return s
}

// client is that of a holder of a certificate. It speaks HTTP/2, unless it is told to not.
func (s *service) client(holder string, http1 ...bool) *http.Client {
	tr := &http.Transport{TLSClientConfig: load(s.t, files(s.dir, holder)).Client(), ForceAttemptHTTP2: len(http1) == 0}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * long}
}

// A reply is what was answered.
type reply struct {
	status int
	header http.Header
	body   string
}

// decode reads the body as JSON.
func (r reply) decode(t testing.TB, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.body), into); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
}

func do(t testing.TB, client *http.Client, method, url, body string, header ...string) reply {
	t.Helper()
	r, err := send(t, client, method, url, body, header...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func send(t testing.TB, client *http.Client, method, url, body string, header ...string) (reply, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, strings.TrimSuffix(string(data), "\n")}, err
}

// ask sends a request as anna.
func (s *service) ask(method, path, body string, header ...string) reply {
	s.t.Helper()
	return do(s.t, s.client("anna"), method, s.url(path), body, header...)
}

func (s *service) url(path string) string { return "https://" + s.address + path }

// add makes a volume as Docker does.
func (s *service) add(name, id string) {
	s.t.Helper()
	if _, err := s.CreateVolume(s.t.Context(), driver.CreateRequest{Name: name, ID: id}); err != nil {
		s.t.Fatal(err)
	}
	s.calls = nil
}
