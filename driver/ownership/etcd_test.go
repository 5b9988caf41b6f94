package ownership_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/flocker-plugin/flocker/driver/ownership"
	"github.com/flocker-plugin/flocker/driver/ownership/ownershiptest"
)

// startEtcd runs a real etcd in this process until the test ends, and returns
// its address.
func startEtcd(tb testing.TB, dir string) string {
	tb.Helper()
	cfg := embed.NewConfig()
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
	case <-time.After(30 * time.Second):
		tb.Fatal("etcd is not ready after 30s")
	}
	return client.Host
}

func freeURL(tb testing.TB) url.URL {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
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
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	// One compaction forgets the history of every case; watches and reads at a
	// revision have to cope with that anyway.
	compact := func(revision int64) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := raw.Compact(ctx, revision); err != nil {
			t.Error(err)
		}
	}
	var mu sync.Mutex
	count := 0
	// The cases run in parallel; the group ends before etcd does.
	t.Run("Suite", func(t *testing.T) {
		ownershiptest.Run(t, ownershiptest.Config{New: func(t *testing.T) ownershiptest.Cluster {
			mu.Lock()
			defer mu.Unlock()
			count++
			return ownershiptest.Cluster{
				Prefix:  fmt.Sprintf("/test%d", count),
				Connect: func() ownership.Store { return connect(t, endpoint) },
				Compact: compact,
			}
		}})
	})
}
