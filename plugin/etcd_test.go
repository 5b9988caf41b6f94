package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
)

func testLog(t *testing.T) *logrus.Entry {
	log := logrus.New()
	log.SetOutput(t.Output())
	return logrus.NewEntry(log)
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// dial returns a client of the etcd at endpoint, and a context for its calls.
func dial(t *testing.T, endpoint string) (*clientv3.Client, context.Context) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(func() {
		cancel()
		_ = client.Close()
	})
	return client, ctx
}

// The data of the etcd inside the plugin can be restored as docs/operations.md says.
func TestEtcdRestored(t *testing.T) {
	dir, address := t.TempDir(), freeAddress(t)
	data := filepath.Join(dir, "member-data")
	run := func(use func(ctx context.Context, client *clientv3.Client)) {
		t.Helper()
		endpoint, stop, err := startEtcd(t.Context(), etcdConfig{Dir: dir, Listen: address, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		client, ctx := dial(t, endpoint)
		use(ctx, client)
	}
	put := func(value string) func(context.Context, *clientv3.Client) {
		return func(ctx context.Context, client *clientv3.Client) {
			if _, err := client.Put(ctx, "k", value); err != nil {
				t.Error(err)
			}
		}
	}
	run(put("then"))
	backup := filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	run(put("later"))

	if err := os.Rename(data, filepath.Join(dir, "before")); err != nil {
		t.Fatal(err)
	}
	err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath:  filepath.Join(backup, "member-data", "member", "snap", "db"),
		SkipHashCheck: true, OutputDataDir: data, Name: "flocker",
		InitialCluster: "flocker=http://127.0.0.1:24380", PeerURLs: []string{"http://127.0.0.1:24380"}, InitialClusterToken: "etcd-cluster",
		RevisionBump: 1_000_000_000, MarkCompacted: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	run(func(ctx context.Context, client *clientv3.Client) {
		res, err := client.Get(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		if len(res.Kvs) != 1 || string(res.Kvs[0].Value) != "then" || res.Header.GetRevision() <= 1_000_000_000 {
			t.Errorf("restored as %v", res)
		}
		put("again")(ctx, client)
	})
	run(func(ctx context.Context, client *clientv3.Client) {
		if res, err := client.Get(ctx, "k"); err != nil || len(res.Kvs) != 1 || string(res.Kvs[0].Value) != "again" {
			t.Errorf("what was written after the restore is %v, %v", res, err)
		}
	})
}

// What the etcd inside the plugin was told is there after it was started again,
// also when it then listens elsewhere.
func TestEtcdKeepsData(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "etcd")
	for i, want := range []string{"", "0", "1"} {
		address := freeAddress(t)
		endpoint, stop, err := startEtcd(t.Context(), etcdConfig{Dir: dir, Listen: address, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		if endpoint != "http://"+address {
			t.Errorf("got endpoint %s, want http://%s", endpoint, address)
		}
		client, ctx := dial(t, endpoint)
		res, err := client.Get(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, kv := range res.Kvs {
			got = string(kv.Value)
		}
		if got != want {
			t.Errorf("start %d: got %q, want %q", i, got, want)
		}
		if _, err := client.Put(ctx, "k", string(rune('0'+i))); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			_, _, err := startEtcd(t.Context(), etcdConfig{Dir: dir, Listen: freeAddress(t), Log: testLog(t)})
			if err == nil || !strings.HasSuffix(err.Error(), "lock its directory "+dir+": another process uses it") {
				t.Errorf("a second one on the same directory: %v", err)
			}
		}
		stop()
	}
}

// Where no address is set nobody but the plugin reaches its etcd, not even on this host.
func TestEtcdAlone(t *testing.T) {
	var inside *clientv3.Client
	before := listeners(t)
	endpoint, stop, err := startEtcd(t.Context(), etcdConfig{Dir: t.TempDir(), Log: testLog(t), Ready: func(c *clientv3.Client) { inside = c }})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if endpoint != "this host" {
		t.Errorf("got endpoint %s", endpoint)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := inside.Put(ctx, "k", "v"); err != nil {
		t.Error(err)
	}
	if now := listeners(t); now != before {
		t.Errorf("the process listens on %d sockets, before on %d", now, before)
	}
}

// listeners is on how many sockets this process listens.
func listeners(t *testing.T) (n int) {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range open {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		if listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN); err == nil && listens == 1 {
			n++
		}
	}
	return n
}

func TestEtcdListensOnAll(t *testing.T) {
	_, port, _ := net.SplitHostPort(freeAddress(t))
	endpoint, stop, err := startEtcd(t.Context(), etcdConfig{Dir: t.TempDir(), Listen: ":" + port, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if want := "http://127.0.0.1:" + port; endpoint != want {
		t.Errorf("got endpoint %s, want %s", endpoint, want)
	}
	client, ctx := dial(t, endpoint)
	if _, err := client.Put(ctx, "k", "v"); err != nil {
		t.Error(err)
	}
}

func TestEtcdRefusals(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := t.TempDir()
	if err := os.MkdirAll(filepath.Join(damaged, "member-data", "member", "snap"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(damaged, "member-data", "member", "snap", "db"), []byte(strings.Repeat("x", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, dir, listen, want string }{
		{"port taken", t.TempDir(), taken.Addr().String(), "start etcd: cannot listen on " + taken.Addr().String() + "; free it, or set FLOCKER_ETCD_LISTEN to another address: "},
		{"no port", t.TempDir(), "localhost", `start etcd: address "localhost" is not of the form host:port`},
		{"not a directory", filepath.Join(file, "etcd"), "", "start etcd: make its directory: "},
		{"damaged data", damaged, freeAddress(t), "start etcd in " + damaged + ": failed to open database: invalid database; repair or restore its data, then start the plugin again"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Twice: the first attempt must not be in the way of the next.
			for range 2 {
				start := time.Now()
				_, stop, err := startEtcd(t.Context(), etcdConfig{Dir: c.dir, Listen: c.listen, Log: testLog(t)})
				if err == nil {
					stop()
					t.Fatal("it started")
				}
				if !strings.HasPrefix(err.Error(), c.want) {
					t.Errorf("got error %q, want it to begin with %q", err, c.want)
				}
				if took := time.Since(start); took > 15*time.Second {
					t.Errorf("it took %v", took)
				}
			}
		})
	}
}

func TestEtcdStartCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	if _, _, err := startEtcd(ctx, etcdConfig{Dir: dir, Listen: freeAddress(t), Log: testLog(t)}); err == nil {
		t.Error("it started")
	}
	// It ends by itself, and lets go of its directory.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		unlock, err := lockEtcdDir(dir)
		if err == nil {
			unlock()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
