package moby

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/volume/service"
	"github.com/docker/docker/volume/service/opts"
)

// withProxy starts a host whose etcd is on another one, behind a proxy.
func withProxy(t *testing.T, timeout time.Duration) (*host, *proxy) {
	t.Helper()
	s := newSite(t)
	s.newHost(30 * time.Second).plug()
	etcd := newProxy(t, s.etcd)
	h := s.newHost(timeout, "FLOCKER_ETCD_ENDPOINTS="+etcd.address(), "FLOCKER_NODE_TTL=3s", "FLOCKER_NODE_RENEW=500ms")
	h.plug()
	h.boot()
	return h, etcd
}

// etcd goes away under a host that knows the volumes: refused or silent.
func TestEtcdAway(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"cut", "stall"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			h, etcd := withProxy(t, 30*time.Second)
			ctx := t.Context()
			options, labels := map[string]string{"size": "20M"}, map[string]string{"k": "v"}
			for _, name := range []string{"idle", "busy"} {
				_, err := h.docker.Create(ctx, name, "flocker", opts.WithCreateOptions(options), opts.WithCreateLabels(labels))
				noError(t, err)
			}
			c, err := h.docker.newContainer("c", "busy", "flocker")
			noError(t, err)
			path, err := c.start()
			noError(t, err)

			etcd.set(mode)
			noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))
			for _, name := range []string{"idle", "busy"} {
				wantRecord(t, h.docker, name, options, labels)
			}
			lines, warnings := h.docker.ls(t)
			equal(t, "ls", strings.Join(lines, "; "), "flocker busy; flocker idle")
			equal(t, "warnings", strings.Join(warnings, "; "), "")
			wantError(t, h.docker.Remove(ctx, "idle"), "ownership cannot be checked", "the volume was not removed")

			// The daemon starts anew, and so does the plugin: it has a cache on disk.
			time.Sleep(1500 * time.Millisecond) // it is written within a second
			h.boot()
			noError(t, c.resume(h.docker))
			h.kill()
			h.start()
			h.boot()
			noError(t, c.resume(h.docker))
			for _, name := range []string{"idle", "busy"} {
				wantRecord(t, h.docker, name, options, labels)
				// run -v name:/x without a driver
				v, err := h.docker.Create(ctx, name, "")
				noError(t, err)
				equal(t, "driver of "+name, v.Driver, h.docker.plugins.Name())
			}
			// Not even by a daemon that has never heard of them.
			fresh := startDocker(t, filepath.Join(h.dir, "fresh"), newPluginStore(t, h.socket, h.timeout))
			for _, name := range []string{"idle", "busy"} {
				v, err := fresh.Create(ctx, name, "")
				noError(t, err)
				equal(t, "driver of "+name+", unknown to Docker", v.Driver, h.docker.plugins.Name())
			}
			equal(t, "local volumes", strings.Join(append(h.docker.localVolumes(t), fresh.localVolumes(t)...), " "), "")

			// docker cp from the running container, and its end.
			_, err = c.start()
			noError(t, err)
			noError(t, c.stop())
			start := time.Now()
			noError(t, c.stop())
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("unmount without etcd took %v; docker stop gives ten seconds", took)
			}
			idle, err := h.docker.newContainer("c2", "idle", "flocker")
			noError(t, err)
			_, err = idle.start()
			wantError(t, err, "ownership cannot be checked")

			etcd.set("")
			startSoon(t, idle)
			noError(t, idle.stop())
			noError(t, idle.rm())
			path = startSoon(t, c)
			got, err := os.ReadFile(filepath.Join(path, "f"))
			equal(t, "file after the outage", string(got), "data")
			noError(t, err)
			noError(t, c.stop())
			noError(t, c.rm())
			for _, name := range []string{"idle", "busy"} {
				noError(t, h.docker.Remove(ctx, name))
			}
		})
	}
}

// etcd is away and the plugin knows nothing: a Get must not look as if the volume
// were gone, for Docker forgets it then.
func TestEtcdAwayUnknown(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"cut", "stall"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			h, etcd := withProxy(t, 2*time.Second)
			options, labels := map[string]string{"size": "20M"}, map[string]string{"k": "v"}
			_, err := h.docker.Create(t.Context(), "v1", "flocker", opts.WithCreateOptions(options), opts.WithCreateLabels(labels))
			noError(t, err)
			h.kill()
			noError(t, os.Rename(filepath.Join(h.dir, "state"), filepath.Join(h.dir, "state.lost")))
			etcd.set(mode)
			h.start()
			h.boot() // Docker asks, runs into its timeout, and asks again without a body

			_, err = h.docker.Get(t.Context(), "v1")
			if _, ok := errors.AsType[net.Error](err); !ok || service.IsNotExist(err) {
				t.Errorf("get: got %v, want an error of the connection", err)
			}
			equal(t, "local volumes", len(h.docker.localVolumes(t)), 0)
			etcd.set("")
			eventually(t, time.Minute, func() error {
				_, err := h.docker.Get(t.Context(), "v1")
				return err
			})
			wantRecord(t, h.docker, "v1", options, labels)
			noError(t, h.docker.Remove(t.Context(), "v1"))
		})
	}
}

// A Create with the driver's name while etcd is away fails with a sentence.
func TestCreateWithoutEtcd(t *testing.T) {
	t.Parallel()
	h, etcd := withProxy(t, 5*time.Second)
	etcd.set("cut")
	_, err := h.docker.Create(t.Context(), "new", "flocker")
	wantError(t, err, "ownership cannot be checked", "retry when etcd answers")
	equal(t, "local volumes", len(h.docker.localVolumes(t)), 0)
	etcd.set("")
	eventually(t, time.Minute, func() error {
		_, err := h.docker.Create(t.Context(), "new", "flocker")
		return err
	})
	noError(t, h.docker.Remove(t.Context(), "new"))
}
