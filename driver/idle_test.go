package driver_test

import (
	"context"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Nodes on which nothing happens ask the storage for nothing but, now and then, what
// is attached to them, and write to etcd nothing but their leases: with volumes
// that are mounted, that were let go after the linger, and that nobody ever used.
func TestIdleNodesAreQuiet(t *testing.T) {
	storages := map[string]backends.Properties{
		"F0": {Class: backends.ClassNone, CheapAttach: true}, "F1": exclusive, "F1 without ids": nameless, "F2": fenced,
	}
	for name, props := range storages {
		t.Run(name, func(t *testing.T) {
			inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Hold = hold }, func(t *testing.T, c *cluster) {
				var mu sync.Mutex
				writes := map[string]int{}
				c.store = func(n *node) ownership.Store {
					return &countedStore{n.etcd, func(call string) {
						mu.Lock()
						defer mu.Unlock()
						writes[call]++
					}}
				}
				c.use(props)
				a, b := c.nodes["a"], c.nodes["b"]
				for _, volume := range []string{"used", "moved", "left", "unused"} {
					a.create(volume, nil)
				}
				a.mount("used", "id1")
				a.docker.set("used", "web")
				defer a.kernel.Hold(c.device("used"))()
				a.mount("moved", "id2")
				a.unmount("moved", "id2")
				b.mount("moved", "id3")
				b.docker.set("moved", "web")
				b.mount("left", "id4")
				b.unmount("left", "id4")
				c.settle(15 * time.Minute)
				want := map[string]string{"used": "mounted", "moved": "owned", "left": "free", "unused": "free"}
				for volume, want := range want {
					if s := a.status(volume); s["state"] != want {
						t.Fatalf("%s is %v on a before the long wait, want %s", volume, s, want)
					}
				}

				revision, calls := c.revision(), c.storage.Calls()
				mu.Lock()
				clear(writes)
				mu.Unlock()
				const hours = 3
				c.settle(hours * time.Hour)
				if now := c.revision(); now != revision {
					t.Errorf("etcd's revision went from %d to %d", revision, now)
				}
				// A node renews every 2.5 s, and once gets a lease for the next audit lines,
				// which changes no key.
				mu.Lock()
				defer mu.Unlock()
				if maps.DeleteFunc(writes, func(call string, n int) bool {
					return call == "keepalive" && n <= 2*hours*3600*2/5+2 || call == "grant" && n <= 2
				}); len(writes) > 0 {
					t.Errorf("written to etcd: %v", writes)
				}
				asked := c.storage.Calls()
				maps.DeleteFunc(asked, func(call string, n int) bool {
					// Every ten looks, which are 22.5 s apart at least.
					return n == calls[call] || call == "Attachments" && n-calls[call] <= 2*hours*3600/225+2
				})
				for _, call := range slices.Sorted(maps.Keys(asked)) {
					t.Errorf("the storage was asked for %s %d times in %d hours", call, asked[call]-calls[call], hours)
				}
				a.mustWrite("used")
				b.mustWrite("moved")
			})
		})
	}
}

// revision is etcd's.
func (c *cluster) revision() int64 {
	c.t.Helper()
	res, err := c.etcd.Txn(c.t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: "/"}}})
	if err != nil {
		c.t.Fatal(err)
	}
	return res.Revision
}

// countedStore tells of everything that etcd would have to write down.
type countedStore struct {
	ownership.Store
	count func(call string)
}

func (s *countedStore) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	for _, op := range slices.Concat(txn.Then, txn.Else) {
		if op.Kind != ownership.OpGet {
			s.count("txn")
			break
		}
	}
	return s.Store.Txn(ctx, txn)
}

func (s *countedStore) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	s.count("grant")
	return s.Store.Grant(ctx, ttl)
}

func (s *countedStore) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, int64, error) {
	s.count("keepalive")
	return s.Store.KeepAliveOnce(ctx, lease)
}

func (s *countedStore) Revoke(ctx context.Context, lease int64) error {
	s.count("revoke")
	return s.Store.Revoke(ctx, lease)
}
