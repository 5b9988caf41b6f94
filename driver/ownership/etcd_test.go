package ownership_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"github.com/flocker-plugin/flocker/driver/ownership"
	"github.com/flocker-plugin/flocker/driver/ownership/ownershiptest"
)

// startEtcd runs a real etcd in this process until the test ends, and returns
// its address.
func startEtcd(tb testing.TB, dir string) string {
	tb.Helper()
	_, endpoint := startServer(tb, dir)
	return endpoint
}

func startServer(tb testing.TB, dir string) (*etcdserver.EtcdServer, string) {
	tb.Helper()
	_, isBenchmark := tb.(*testing.B)
	cfg := embed.NewConfig()
	cfg.UnsafeNoFsync = !isBenchmark // the tests' own disk is none of their business
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.LogLevel, cfg.LogOutputs = "panic", []string{filepath.Join(dir, "log")}
	// Short elections let leases be as short as a second.
	cfg.TickMs, cfg.ElectionMs = 20, 200
	client, peer := freeURL(tb), freeURL(tb)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		tb.Fatal(err)
	case <-time.After(2 * time.Minute):
		tb.Fatal("etcd is not ready after two minutes")
	}
	return server.Server, client.Host
}

// freeURL has an address of its own: on that of everybody the port would be free for others.
func freeURL(tb testing.TB) url.URL {
	tb.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return url.URL{Scheme: "http", Host: l.Addr().String()}
}

func connect(tb testing.TB, endpoint string) *ownership.Etcd {
	tb.Helper()
	store, err := ownership.NewEtcd(ownership.EtcdConfig{Endpoints: []string{endpoint}})
	if err != nil {
		tb.Fatal(err)
	}
	return store
}

func TestEtcd(t *testing.T) {
	endpoint := startEtcd(t, t.TempDir())
	testEtcd(t, endpoint, func() ownership.Store { return connect(t, endpoint) })
}

// An etcd in the same process, reached without a socket.
func TestEtcdInside(t *testing.T) {
	server, endpoint := startServer(t, t.TempDir())
	testEtcd(t, endpoint, func() ownership.Store {
		store, err := ownership.NewEtcd(ownership.EtcdConfig{
			Endpoints: []string{endpoint},
			Dial:      func(context.Context) (*clientv3.Client, error) { return v3client.New(server), nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		return store
	})
}

func testEtcd(t *testing.T, endpoint string, connect func() ownership.Store) {
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	// One compaction forgets the history of every case; watches and reads at a
	// revision have to cope with that anyway.
	compact := func(revision int64) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := raw.Compact(ctx, revision); err != nil {
			t.Error(err)
		}
	}
	var mu sync.Mutex
	count := 0
	// The cases run in parallel; the group ends before etcd does.
	t.Run("Suite", func(t *testing.T) {
		ownershiptest.Run(t, ownershiptest.Config{New: func(*testing.T) ownershiptest.Cluster {
			mu.Lock()
			defer mu.Unlock()
			count++
			return ownershiptest.Cluster{
				Prefix:  fmt.Sprintf("/test%d", count),
				Connect: connect,
				Compact: compact,
			}
		}})
	})
}

// proxy passes TCP connections on, until it is told to swallow the next answer.
type proxy struct {
	listener net.Listener
	to       string

	mu      sync.Mutex
	swallow bool
	cut     int // how many answers were swallowed
}

func startProxy(tb testing.TB, to string) *proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &proxy{listener: l, to: to}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(client) })
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return p
}

func (p *proxy) serve(client net.Conn) {
	defer func() { _ = client.Close() }()
	server, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	go func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	}()
	buf := make([]byte, 1<<16)
	for {
		n, err := server.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		swallow := p.swallow
		if swallow {
			p.swallow = false
			p.cut++
		}
		p.mu.Unlock()
		if swallow {
			// The request has reached etcd. Its answer, which may be what was just
			// read or is about to come, never reaches the client.
			time.Sleep(100 * time.Millisecond)
			return
		}
		if _, err := client.Write(buf[:n]); err != nil {
			return
		}
	}
}

// lose makes the proxy swallow the next answer, and returns a function that says
// whether it did.
func (p *proxy) lose() func() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swallow = true
	before := p.cut
	return func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.cut == before+1 && !p.swallow
	}
}

// TestEtcdAnswerLost cuts the connection after etcd got a request and before the
// client got the answer, for each transaction.
func TestEtcdAnswerLost(t *testing.T) {
	endpoint := startEtcd(t, t.TempDir())
	p := startProxy(t, endpoint)
	join := func(id, at string) *ownership.Map {
		store := connect(t, at)
		m := ownership.New(store, ownership.Node{ID: id, Host: "host-" + id, Boot: "boot"}, ownership.Config{TTL: 60 * time.Second, Renew: 30 * time.Second})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			<-done
			_ = store.Close()
		})
		limit, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		if err := m.Registered(limit); err != nil {
			t.Fatal(err)
		}
		return m
	}
	a, b := join("a", p.listener.Addr().String()), join("b", endpoint)
	ctx := t.Context()
	lossy := func(what string, call func() error) {
		t.Helper()
		lost := p.lose()
		if err := call(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if !lost() {
			t.Errorf("%s: no answer was lost", what)
		}
	}
	var (
		v       ownership.Volume
		o       ownership.Owner
		created bool
		err     error
	)
	lossy("create", func() error {
		v, created, err = a.Create(ctx, ownership.Volume{ID: uuid.NewString(), Name: "v"})
		return err
	})
	if !created {
		t.Error("not created")
	}
	v.Ref = "ref"
	lossy("ready", func() error { v, err = a.Ready(ctx, v); return err })
	lossy("claim", func() error { o, _, err = a.Claim(ctx, v.ID); return err })
	lossy("formatted", func() error { v, err = a.Formatted(ctx, v.ID, o.Token, v); return err })
	lossy("check", func() error { return a.Check(ctx, v.ID, o.Token) })
	lossy("retake", func() error { o, _, err = a.Retake(ctx, o); return err })
	lossy("release", func() error { return a.Release(ctx, v.ID, o.Token) })
	theirs, _, err := b.Claim(ctx, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	lossy("request", func() error { return a.Request(ctx, theirs, "mount") })
	waiting, err := b.Waiting(ctx)
	if err != nil || len(waiting) != 1 {
		t.Fatal(waiting, err)
	}
	if _, err := b.HandOver(ctx, v.ID, theirs.Token, waiting[0]); err != nil {
		t.Fatal(err)
	}
	view, err := a.Lookup(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Request(ctx, *view.Owner, "mount"); err != nil {
		t.Fatal(err)
	}
	if waiting, err = a.Waiting(ctx); err != nil || len(waiting) != 1 {
		t.Fatal(waiting, err)
	}
	lossy("reply", func() error { return a.Reply(ctx, waiting[0], ownership.Reply{Busy: true}) })
	if _, replied, err := b.Replied(ctx, v.ID); !replied || err != nil {
		t.Errorf("replied %v, %v", replied, err)
	}
	lossy("hand over", func() error {
		handed, err := a.HandOver(ctx, v.ID, view.Owner.Token, waiting[0])
		if !handed {
			t.Error("not handed over")
		}
		return err
	})
	view, err = b.Lookup(ctx, "v")
	if err != nil || view.Owner == nil || view.Owner.Node != "b" {
		t.Fatalf("view is %+v, %v", view, err)
	}
	if err := b.Release(ctx, v.ID, view.Owner.Token); err != nil {
		t.Fatal(err)
	}
	dead, _, err := b.Claim(ctx, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	dead.Node = "c"
	value, err := json.Marshal(dead)
	if err != nil {
		t.Fatal(err)
	}
	direct := connect(t, endpoint)
	defer func() { _ = direct.Close() }()
	res, err := direct.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: "/flocker/v1/own/" + v.ID, Value: value}}})
	if err != nil {
		t.Fatal(err)
	}
	dead.Token = res.Revision
	lossy("seize", func() error { o, _, err = a.Seize(ctx, dead, ownership.GroundsSilent); return err })
	lossy("settle", func() error { o, _, err = a.Settle(ctx, o, "seen"); return err })
	lossy("quarantine", func() error { v, err = a.Quarantine(ctx, view.Volume, o.Token, "why"); return err })
	lossy("reinstate", func() error { v, err = a.Reinstate(ctx, v.ID, "ann@ops"); return err })
	if err := a.Release(ctx, v.ID, o.Token); err != nil {
		t.Fatal(err)
	}
	lossy("delete", func() error { v, err = a.Delete(ctx, v, 0); return err })
	lossy("purge", func() error { return a.Purge(ctx, v) })
}

func TestEtcdConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  ownership.EtcdConfig
		want string
	}{
		{"no endpoints", ownership.EtcdConfig{}, "no etcd endpoints are set"},
		{"no such CA", ownership.EtcdConfig{Endpoints: []string{"a:1"}, CAFile: "/nix"}, "read etcd CA file: open /nix: no such file or directory"},
		{"no CA in it", ownership.EtcdConfig{Endpoints: []string{"a:1"}, CAFile: "/dev/null"}, "etcd CA file /dev/null has no certificate in it"},
		{"no key", ownership.EtcdConfig{Endpoints: []string{"a:1"}, CertFile: "/dev/null"}, "etcd needs both a certificate file and a key file, or neither"},
		{"bad key", ownership.EtcdConfig{Endpoints: []string{"a:1"}, CertFile: "/dev/null", KeyFile: "/dev/null"}, "read etcd client certificate: tls: failed to find any PEM data in certificate input"},
		{"no password", ownership.EtcdConfig{Endpoints: []string{"a:1"}, User: "u"}, "etcd needs both a user and a password file, or neither"},
		{"no such password", ownership.EtcdConfig{Endpoints: []string{"a:1"}, User: "u", PasswordFile: "/nix"}, "read etcd password: open /nix: no such file or directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ownership.NewEtcd(c.cfg); err == nil || err.Error() != c.want {
				t.Errorf("got error %v, want %s", err, c.want)
			}
		})
	}
}

// Each server says how it is, whatever the others do.
func TestEtcdServers(t *testing.T) {
	server, endpoint := startServer(t, t.TempDir())
	nobody := freeURL(t).Host
	ask := func(cfg ownership.EtcdConfig) []ownership.Server {
		t.Helper()
		store, err := ownership.NewEtcd(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = store.Close() }()
		return ownership.New(store, ownership.Node{ID: "a"}, ownership.Config{}).Servers(t.Context())
	}
	for _, cfg := range []ownership.EtcdConfig{
		{Endpoints: []string{endpoint}},
		{Endpoints: []string{endpoint}, Dial: func(context.Context) (*clientv3.Client, error) { return v3client.New(server), nil }},
		{Endpoints: []string{endpoint, nobody}},
	} {
		start := time.Now()
		got := ask(cfg)
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("it took %v", took)
		}
		if len(got) != len(cfg.Endpoints) || got[0].Endpoint != endpoint || got[0].Err != nil || !strings.HasPrefix(got[0].Version, "3.") || got[0].Leaderless || got[0].Alarms != nil {
			t.Errorf("got %+v", got)
		}
		if len(got) == 2 && (got[1].Endpoint != nobody || got[1].Err == nil || got[1].Version != "") {
			t.Errorf("of nobody: %+v", got[1])
		}
	}
	if got := ownership.New(ownership.NewMemory().Client(), ownership.Node{ID: "a"}, ownership.Config{}).Servers(t.Context()); got != nil {
		t.Errorf("of a store in memory: %+v", got)
	}
}

// Nobody answers there; the error says who did not.
func TestEtcdAway(t *testing.T) {
	endpoint := freeURL(t).Host
	store := connect(t, endpoint)
	defer func() { _ = store.Close() }()
	m := ownership.New(store, ownership.Node{ID: "a"}, ownership.Config{Timeout: 300 * time.Millisecond})
	start := time.Now()
	_, err := m.List(t.Context())
	want := "ownership cannot be checked: etcd at " + endpoint + " does not answer: context deadline exceeded"
	if err == nil || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// BenchmarkEtcd measures on an etcd that writes to disk, with one caller.
func BenchmarkEtcd(b *testing.B) {
	endpoint := startEtcd(b, b.TempDir())
	store := connect(b, endpoint)
	defer func() { _ = store.Close() }()
	m := ownership.New(store, ownership.Node{ID: "a", Host: "host", Boot: "boot"}, ownership.Config{})
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	if err := m.Registered(ctx); err != nil {
		b.Fatal(err)
	}
	measure := func(b *testing.B, call func() error) {
		b.Helper()
		var took []time.Duration
		for b.Loop() {
			start := time.Now()
			if err := call(); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	}
	count := 0
	var v ownership.Volume
	create := func() error {
		var err error
		count++
		v, _, err = m.Create(ctx, ownership.Volume{ID: uuid.NewString(), Name: fmt.Sprint("volume", count), Backend: "loopback", Size: 1 << 30, FS: "ext4"})
		if err != nil {
			return err
		}
		v.Ref = v.ID
		v, err = m.Ready(ctx, v)
		return err
	}
	if err := create(); err != nil {
		b.Fatal(err)
	}
	b.Run("ClaimRelease", func(b *testing.B) {
		measure(b, func() error {
			o, _, err := m.Claim(ctx, v.ID)
			if err != nil {
				return err
			}
			return m.Release(ctx, v.ID, o.Token)
		})
	})
	b.Run("Lookup", func(b *testing.B) {
		measure(b, func() error { _, err := m.Lookup(ctx, "volume1"); return err })
	})
	b.Run("CreateReady", func(b *testing.B) { measure(b, create) })
	b.Run("List", func(b *testing.B) {
		listing := ownership.New(store, m.Node(), ownership.Config{Prefix: "/listing"})
		for i := range 1000 {
			v := ownership.Volume{ID: uuid.NewString(), Name: fmt.Sprint("volume", i), Backend: "loopback", Size: 1 << 30, FS: "ext4"}
			if _, _, err := listing.Create(ctx, v); err != nil {
				b.Fatal(err)
			}
		}
		measure(b, func() error {
			views, err := listing.List(ctx)
			if len(views) != 1000 {
				b.Errorf("%d volumes", len(views))
			}
			return err
		})
	})
}
