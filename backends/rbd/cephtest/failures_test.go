package cephtest_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/rbd"
)

func TestMessages(t *testing.T) {
	w := newWorld(t)
	wrongKey := filepath.Join(t.TempDir(), "keyring")
	if err := os.WriteFile(wrongKey, []byte("[client.flocker]\n\tkey = AQBAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(*rbd.Config)
		wants  []string
	}{
		"wrong key":   {func(c *rbd.Config) { c.KeyringFile = wrongKey }, []string{"does not accept the key of client.flocker", "keyring_file"}},
		"no key":      {func(c *rbd.Config) { c.KeyringFile = "/nonexistent" }, []string{"there is no key of client.flocker", "keyring_file"}},
		"wrong user":  {func(c *rbd.Config) { c.User = "nobody" }, []string{"client.nobody"}},
		"no pool":     {func(c *rbd.Config) { c.Pool = "nopool" }, []string{"no such pool or namespace"}},
		"other pool":  {func(c *rbd.Config) { c.Pool = "other" }, []string{"client.flocker may not do this", "profile rbd"}},
		"unreachable": {func(c *rbd.Config) { c.Monitors = []string{"127.0.0.1:1"} }, []string{"is the cluster up, and can this host reach it?"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(w.ceph)
			test.change(&cfg)
			b := host(t, cfg, w.cluster, "a")
			began := time.Now()
			_, err := b.List(t.Context())
			wantError(t, err, backends.ErrUnavailable, test.wants...)
			if errors.Is(err, backends.ErrNotFound) {
				t.Errorf("%v is taken for not found", err)
			}
			if took := time.Since(began); took > 90*time.Second {
				t.Errorf("it took %s", took)
			}
			_, err = b.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Cluster: w.cluster, Size: mib})
			wantError(t, err, backends.ErrUnavailable, test.wants...)
			t.Log(err)
		})
	}
}

// TestOpenElsewhere: an image that somebody outside of Flocker has open is not removed.
func TestOpenElsewhere(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	other := exec.CommandContext(ctx, "qemu-storage-daemon", "--blockdev",
		"driver=rbd,node-name=n,pool=volumes,image=flocker-"+w.vol.ID+",user=admin,conf="+w.ceph.Conf)
	other.Cancel = func() error { return other.Process.Signal(os.Interrupt) }
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = other.Wait() // it is interrupted
	}()
	t.Cleanup(func() { cancel(); <-ended })
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		out, err := w.ceph.Run(t.Context(), "rbd", "status", "volumes/flocker-"+w.vol.ID)
		if err != nil || time.Since(began) > time.Minute {
			t.Fatalf("the image is not open: %s, %v", out, err)
		}
		if strings.Contains(out, "watcher=") {
			break
		}
	}
	err := w.a.Delete(t.Context(), w.vol.Ref)
	wantError(t, err, backends.ErrInUse, "by none of Flocker's hosts")
	t.Log(err)
	cancel()
	<-ended
	// The refused removal has left nothing in the way.
	att := w.attach(w.a, 10)
	if err := w.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// TestGone: an image that was removed behind our back.
func TestGone(t *testing.T) {
	w := newWorld(t)
	if _, err := w.ceph.Run(t.Context(), "rbd", "rm", "--no-progress", "volumes/flocker-"+w.vol.ID); err != nil {
		t.Fatal(err)
	}
	_, err := w.a.Attach(t.Context(), backends.AttachRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Token: 1})
	wantError(t, err, backends.ErrNotFound, "it was deleted, or never made")
	vols, err := w.a.List(t.Context())
	if err != nil || len(vols) != 0 {
		t.Errorf("list: %+v, %v", vols, err)
	}
}

// TestSnapshots: what somebody has made of a volume by hand is not removed.
func TestSnapshots(t *testing.T) {
	w := newWorld(t)
	spec := "volumes/flocker-" + w.vol.ID
	if _, err := w.ceph.Run(t.Context(), "rbd", "snap", "create", "--no-progress", spec+"@mine"); err != nil {
		t.Fatal(err)
	}
	wantError(t, w.a.Delete(t.Context(), w.vol.Ref), backends.ErrInUse, "has snapshots", "rbd snap purge")
	vols, err := w.a.List(t.Context())
	if err != nil || len(vols) != 1 {
		t.Errorf("list: %+v, %v", vols, err)
	}
	if _, err := w.ceph.Run(t.Context(), "rbd", "snap", "purge", "--no-progress", spec); err != nil {
		t.Fatal(err)
	}
}

// TestHalfMade: an image of which there is no more than its name is made anew.
func TestHalfMade(t *testing.T) {
	w := newWorld(t)
	id := uuid.NewString()
	for _, args := range [][]string{
		{"rbd", "create", "--size", "1M", "volumes/template"},
		{"rados", "-p", "volumes", "cp", "rbd_id.template", "rbd_id.flocker-" + id},
		{"rbd", "rm", "--no-progress", "volumes/template"},
	} {
		if _, err := w.ceph.Run(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	vol, err := w.a.Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: w.cluster, Size: mib})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.a.Delete(t.Context(), vol.Ref); err != nil {
		t.Fatal(err)
	}
}

// TestClusterHangs: the cluster answers nobody while a volume is detached. Nothing of it
// stays on the host, and when the cluster is back, the volume is elsewhere with its data.
func TestClusterHangs(t *testing.T) {
	w := newWorld(t)
	att := w.attach(w.a, 10)
	f, err := os.OpenFile(att.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := []byte("acknowledged")
	if _, err := f.WriteAt(append(data, make([]byte, 4096-len(data))...), mib); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	w.ceph.Pause(true)
	defer w.ceph.Pause(false)
	began := time.Now()
	err = w.a.Detach(t.Context(), att)
	t.Logf("detach without a cluster took %s: %v", time.Since(began), err)
	if err != nil {
		t.Error(err)
	}
	if pids := daemons(t, att.ID); len(pids) > 0 {
		t.Errorf("daemons %d are left", pids)
	}
	if atts, err := w.a.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("attachments: %+v, %v", atts, err)
	}
	w.ceph.Pause(false)
	_, err = w.b.Attach(t.Context(), backends.AttachRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Token: 11})
	var attached *backends.AttachedError
	if !errors.As(err, &attached) || attached.Node != "a" || attached.Token != 10 {
		t.Fatalf("got %v, want that it may still be attached to a", err)
	}
	w.fence(w.b, "a", 10)
	taken := w.attach(w.b, 11)
	got := make([]byte, len(data))
	f, err = os.Open(taken.Device)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(got, mib); err != nil || string(got) != string(data) {
		t.Errorf("got %q, %v", got, err)
	}
	_ = f.Close()
}

// TestNamespaceAndProfile: a volume in a namespace, of a kind of its own.
func TestNamespaceAndProfile(t *testing.T) {
	c := cluster(t)
	cfg := config(c)
	cfg.Namespace = "spaced"
	cfg.Profiles = map[string]rbd.Profile{"small": {Features: []string{"layering", "exclusive-lock"}, ObjectSize: backends.MiB}}
	id, b := uuid.NewString(), host(t, cfg, "any", "a")
	vol, err := b.Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: "any", Size: 8 * mib, Profile: "small"})
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Run(t.Context(), "rbd", "info", "volumes/spaced/flocker-"+id)
	if err != nil || !strings.Contains(out, "features: layering, exclusive-lock\n") || !strings.Contains(out, "order 20 (1 MiB objects)") {
		t.Errorf("the image is %s, %v", out, err)
	}
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: id, Token: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = host(t, config(c), "any", "a").Get(t.Context(), vol.Ref)
	wantError(t, err, backends.ErrInvalid, `the volume is volumes/spaced/flocker-`+id+`, and this host is set to the namespace ""`)
	if err := b.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	if err := b.Delete(t.Context(), vol.Ref); err != nil {
		t.Error(err)
	}
	if out, err = c.Run(t.Context(), "rados", "--pool", "volumes", "--namespace", "spaced", "ls"); err != nil || strings.Contains(out, id) {
		t.Errorf("left behind: %s, %v", out, err)
	}
}
