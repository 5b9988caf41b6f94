package robustness

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// save is a backup of etcd.
func (c *cluster) save(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	file := filepath.Join(t.TempDir(), "backup")
	config := clientv3.Config{Endpoints: c.direct[0].Endpoints(), Logger: zap.NewNop()}
	if _, err := snapshot.NewV3(zap.NewNop()).Save(ctx, config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// restore replaces etcd by a backup, as an operator does it with etcdutl; bump is
// --bump-revision with --mark-compacted.
func (c *cluster) restore(t *testing.T, file string, bump uint64) {
	t.Helper()
	for _, m := range c.members {
		m.kill()
	}
	for _, m := range c.members {
		m.config.Data = filepath.Join(t.TempDir(), "data")
		err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
			SnapshotPath: file, Name: m.name, OutputDataDir: m.config.Data,
			PeerURLs: []string{m.config.Peer}, InitialCluster: m.config.Cluster, InitialClusterToken: "etcd-cluster",
			RevisionBump: bump, MarkCompacted: bump > 0,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.start(); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.wait(60 * time.Second); err != nil {
		t.Fatal(err)
	}
}

// TestRestore puts etcd back to a backup under running nodes.
func TestRestore(t *testing.T) {
	if testing.Short() {
		t.Skip("takes many seconds")
	}
	c := startCluster(t)
	var stores []ownership.Store
	for range 2 {
		addresses, _ := c.endpoints(t)
		stores = append(stores, connect(t, addresses))
	}
	addresses, _ := c.endpoints(t)
	w := newWorld(t, 0, "/restore", 3, connect(t, addresses), stores...)
	a, b := w.agents[0], w.agents[1]
	ctx := t.Context()
	must := func(o ownership.Owner, _ ownership.Volume, err error) ownership.Owner {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	owners := func() string {
		t.Helper()
		res, err := c.any.Get(ctx, w.history.prefix, clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, kv := range res.Kvs {
			fmt.Fprintf(&b, "%s %s %d\n", kv.Key, written(kv.Value).Node, kv.ModRevision)
		}
		return b.String()
	}
	allLive := func() {
		t.Helper()
		for _, a := range w.agents {
			if err := a.live(20 * time.Second); err != nil {
				t.Fatal(err)
			}
		}
	}

	first := must(a.now().Claim(ctx, "v0"))
	backup, then := c.save(t), owners()
	if err := a.now().Release(ctx, "v0", first.Token); err != nil {
		t.Fatal(err)
	}
	moved := must(b.now().Claim(ctx, "v0"))
	later := must(a.now().Claim(ctx, "v1"))

	t.Run("older", func(t *testing.T) {
		c.restore(t, backup, 0)
		const again = "restore it once more, with: etcdutl snapshot restore --bump-revision 1000000000 --mark-compacted; then type"
		const want = "restore a newer backup; or, if there is none, stop every container that uses a volume, " + again + ": docker flocker cluster accept-restore"
		notice(t, w, want)
		for _, a := range w.agents {
			_, err := a.now().AcceptRestore(ctx, "ann@ops")
			if err == nil || !strings.HasSuffix(err.Error(), "tokens that were given before would be given again; "+again+" this again") {
				t.Errorf("node %s accepts tokens that may be given twice: %v", a.id, err)
			}
		}
		refuse := func(when string) {
			t.Helper()
			for what, err := range map[string]error{
				"claim":   errorOf(a.now().Claim(ctx, "v2")),
				"release": a.now().Release(ctx, "v1", later.Token),
				"retake":  errorOf(b.now().Retake(ctx, moved)),
				"check":   b.now().Check(ctx, "v0", moved.Token),
				"view":    func() error { _, err := a.now().View(ctx, "v0"); return err }(),
			} {
				if !errors.Is(err, ownership.ErrUnavailable) {
					t.Errorf("%s %s: got error %v", what, when, err)
				}
			}
			if now := owners(); now != then {
				t.Errorf("%s, etcd has\n%sinstead of\n%s", when, now, then)
			}
		}
		refuse("at the old revision")
		for _, a := range w.agents {
			if !a.now().Seen().Older {
				t.Errorf("node %s does not remember it", a.id)
			}
		}
		// Others write to this etcd, so that soon its revision is no longer low.
		for {
			res, err := c.any.Put(ctx, "/others", "")
			if err != nil {
				t.Fatal(err)
			}
			if res.Header.GetRevision() > a.now().Seen().Revision+10 && res.Header.GetRevision() > b.now().Seen().Revision+10 {
				break
			}
		}
		refuse("when its revision has caught up")
		a.restart(false)
		time.Sleep(4 * renew)
		refuse("by a new process")
		if err := a.now().Unsafe(); err == nil {
			t.Error("a new process finds nothing wrong")
		}

		if gen, err := b.now().AcceptRestore(ctx, "ann@ops"); gen != 2 || err != nil {
			t.Fatal(gen, err)
		}
		allLive()
		if err := b.now().Check(ctx, "v0", moved.Token); !errors.Is(err, ownership.ErrLost) {
			t.Errorf("what was claimed after the backup: got error %v", err)
		}
		if err := a.now().Check(ctx, "v0", first.Token); err != nil {
			t.Errorf("what was owned at the time of the backup: got error %v", err)
		}
		must(a.now().Claim(ctx, "v2"))
	})

	t.Run("with a bump", func(t *testing.T) {
		backup := c.save(t)
		later := must(a.now().Claim(ctx, "v1"))
		watch, cancel := context.WithCancel(ctx)
		defer cancel()
		wake := b.now().WatchVolume(watch, "v1")
		const bump = 1_000_000_000
		c.restore(t, backup, bump)
		const want = "with its revision raised; restore a newer backup; or, if there is none, stop every container that uses a volume, and type: docker flocker cluster accept-restore"
		a.restart(false) // it compares with what it has kept
		notice(t, w, want)
		for _, a := range w.agents {
			err := a.now().Check(ctx, "v1", later.Token) // it is in no backup, and a container may use it
			if !errors.Is(err, ownership.ErrUnavailable) {
				t.Errorf("node %s got error %v", a.id, err)
			}
		}
		if gen, err := b.now().AcceptRestore(ctx, "ann@ops"); err != nil {
			t.Fatal(gen, err)
		}
		allLive()
		if err := a.now().Check(ctx, "v1", later.Token); !errors.Is(err, ownership.ErrLost) {
			t.Errorf("what was claimed after the backup: got error %v", err)
		}
		if o := must(b.now().Claim(ctx, "v1")); o.Token < bump {
			t.Errorf("the new token %d may have been given before", o.Token)
		}
		for {
			select {
			case <-wake:
				if view, err := b.now().View(ctx, "v1"); err == nil && view.Owner != nil && view.Owner.Token > bump {
					return
				}
			case <-time.After(20 * time.Second):
				t.Fatal("who waits is not woken up")
			}
		}
	})
}

// notice demands that all nodes refuse etcd before long, though nobody asks them
// anything.
func notice(t *testing.T, w *world, want string) {
	t.Helper()
	end := time.Now().Add(10 * time.Second) // they have to find the new members, too
	for _, a := range w.agents {
		for ; a.now().Unsafe() == nil || !a.now().Seen().Older; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("node %s has not noticed that etcd was restored", a.id)
			}
		}
		if err := a.now().Unsafe(); !strings.HasSuffix(err.Error(), want) {
			t.Errorf("node %s says of etcd: %v", a.id, err)
		}
	}
}

func errorOf(_ ownership.Owner, _ ownership.Volume, err error) error { return err }
