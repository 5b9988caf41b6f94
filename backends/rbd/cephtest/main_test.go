package cephtest_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/rbd"
	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

var (
	startOnce sync.Once
	running   *cephtest.Cluster
	errStart  error
)

func TestMain(m *testing.M) {
	if os.Getenv("FLOCKER_CEPH_CHILD") != "" {
		os.Exit(child())
	}
	cephtest.Sweep()
	code := m.Run()
	if running != nil {
		running.Stop()
	}
	os.Exit(code)
}

// cluster returns the cluster of all tests.
func cluster(t *testing.T) *cephtest.Cluster {
	t.Helper()
	backendtest.NeedRoot(t)
	cephtest.NeedCeph(t)
	startOnce.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		began := time.Now()
		running, errStart = cephtest.Start(ctx)
		t.Logf("the cluster has started in %s", time.Since(began))
	})
	if errStart != nil {
		t.Fatal(errStart)
	}
	return running
}

// config is what an operator would write.
func config(c *cephtest.Cluster) rbd.Config {
	return rbd.Config{
		Monitors: []string{c.Monitors}, KeyringFile: c.Keyring, Pool: cephtest.Pool, Attach: "fuse", RunDir: c.Dir + "/r",
	}
}

// host is one of a test: a backend, and what makes it again.
func host(t *testing.T, cfg rbd.Config, clusterID, node string) *rbd.Backend {
	t.Helper()
	b, err := rbd.New(cfg, rbd.Self{Node: node, Cluster: clusterID})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// world is a volume and two hosts.
type world struct {
	*testing.T
	ceph    *cephtest.Cluster
	cluster string
	a, b    *rbd.Backend
	vol     backends.Volume
}

const mib = int64(1 << 20)

func newWorld(t *testing.T) *world {
	t.Helper()
	c := cluster(t)
	w := &world{T: t, ceph: c, cluster: uuid.NewString()}
	w.a, w.b = host(t, config(c), w.cluster, "a"), host(t, config(c), w.cluster, "b")
	id := uuid.NewString()
	vol, err := w.a.Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: w.cluster, Size: 64 * mib})
	if err != nil {
		t.Fatal(err)
	}
	w.vol = vol
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		for _, b := range []*rbd.Backend{w.a, w.b} {
			atts, err := b.Attachments(ctx)
			if err != nil {
				t.Error(err)
			}
			for _, att := range atts {
				if err := b.Detach(ctx, att); err != nil {
					t.Error(err)
				}
			}
		}
		if err := w.a.Delete(ctx, vol.Ref); err != nil && !errors.Is(err, backends.ErrNotFound) {
			t.Error(err)
		}
		left, _ := filepath.Glob(c.Dir + "/r/*/m-*")
		if len(left) > 0 {
			t.Errorf("left behind: %s", left)
		}
	})
	return w
}

func (w *world) attach(b *rbd.Backend, token int64) backends.Attachment {
	w.Helper()
	att, err := b.Attach(w.Context(), backends.AttachRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Token: token})
	if err != nil {
		w.Fatal(err)
	}
	return att
}

func (w *world) fence(b *rbd.Backend, node string, token int64) string {
	w.Helper()
	evidence, err := b.Fence(w.Context(), backends.FenceRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Node: node, Token: token})
	if err != nil {
		w.Fatal(err)
	}
	return evidence
}

// wantError demands an error of a class, and parts of its text.
func wantError(t *testing.T, err, class error, parts ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("got %v, want an error that is %q", err, class)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %q, want it to say %q", err, part)
		}
	}
}
