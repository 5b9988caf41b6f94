package driver_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
)

// A host whose name its storage does not tell takes no volume there: nobody could
// fence it. It asks again, and the volume stays where it is meanwhile.
func TestBackendThatDoesNotSayWhoThisHostIs(t *testing.T) {
	onFencingStorage(t, twoNodes, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		b.create("db", nil)
		var up atomic.Bool
		c.storage.Inject(func(call backendtest.Call) backendtest.Fault {
			return backendtest.Fault{Refused: !up.Load() && call.Method == "Identity" && call.Node == a.id.ID}
		})
		started := time.Now()
		_, err := a.Mount(t.Context(), "db", "id1")
		wantError(t, err, "volume db: ", "unavailable")
		if took := time.Since(started); took < 30*time.Second || took > 35*time.Second {
			t.Errorf("refused after %v, want 30s", took)
		}
		if s := b.status("db"); s["state"] != "free" {
			t.Errorf("status %v, want free", s)
		}
		done := make(chan error, 1)
		go func() { _, err := a.Mount(context.Background(), "db", "id1"); done <- err }()
		c.settle(5 * time.Second)
		up.Store(true)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		a.mustWrite("db")
		a.kill()
		b.mount("db", "id2") // a is fenced by that name
		if err := a.write("db"); err == nil {
			t.Error("the former owner can still write")
		}
	})
}

// two gives each node a second storage system, gold, beside memory.
func two(gold *backendtest.Memory, without ...string) func(cfg *driver.Config) {
	return func(cfg *driver.Config) {
		cfg.Hold = hold
		if len(without) == 0 || cfg.Node.Host != without[0] {
			cfg.Backends = maps.Clone(cfg.Backends)
			cfg.Backends["gold"] = gold.Node(cfg.Node.ID)
		}
	}
}

// A storage system that hangs keeps nobody waiting who does not want it.
func TestBackendThatHangsTakesNoOtherDown(t *testing.T) {
	gold := backendtest.NewMemory(backends.Properties{Name: "gold", Class: backends.ClassNone})
	inCluster(t, oneNode, two(gold), func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		for _, name := range []string{"g1", "g2"} {
			a.create(name, map[string]string{"backend": "gold"})
		}
		gold.Inject(func(call backendtest.Call) backendtest.Fault {
			return backendtest.Fault{Hang: call.Method == "Delete"}
		})
		for _, name := range []string{"g1", "g2"} {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if err := a.Remove(ctx, name); err != nil {
				t.Error(err)
			}
			cancel()
		}
		// The periodic look still finds that nothing uses a volume any more.
		a.mount("db", "id1")
		c.settle(10 * time.Minute)
		if s := a.status("db"); s["state"] != "free" {
			t.Errorf("status %v, want free: its Unmount was lost long ago", s)
		}
		gold.Inject(nil)
		c.settle(10 * time.Minute)
		if vols, err := gold.Node(a.id.ID).List(t.Context()); err != nil || len(vols) > 0 {
			t.Errorf("left in the storage that is back: %v, %v", vols, err)
		}
		if keys := c.etcd.Keys("/flocker/v1/vol/"); len(keys) != 1 {
			t.Errorf("%d volumes in etcd, want db alone", len(keys))
		}
	})
}

// A process that starts does not wait for a storage system that hangs.
func TestBackendThatHangsAtTheStart(t *testing.T) {
	gold := backendtest.NewMemory(backends.Properties{Name: "gold", Class: backends.ClassNone})
	inCluster(t, oneNode, two(gold), func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		gold.Inject(func(backendtest.Call) backendtest.Fault { return backendtest.Fault{Hang: true} })
		a.restart()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := a.Mount(ctx, "db", "id1"); err != nil {
			t.Error(err)
		}
		a.docker.set("db", "web")
		var states []string
		for _, b := range a.Backends(t.Context()) {
			states = append(states, fmt.Sprint(b.Name, " ", b.Type, " ", b.Class, " ", b.Default, " ", b.Err != nil))
		}
		if want := []string{"gold gold F0 false true", "memory memory F0 true false"}; !slices.Equal(states, want) {
			t.Errorf("backends are %q, want %q", states, want)
		}
	})
}

// A volume is on the backend it was made on, also for a host that does not have that.
func TestBackendMissingHere(t *testing.T) {
	gold := backendtest.NewMemory(backends.Properties{Name: "gold", Class: backends.ClassNone})
	inCluster(t, twoNodes, two(gold, "b"), func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", map[string]string{"backend": "gold"})
		const want = "volume db is on backend gold, which this host's backends.yaml does not have: " +
			"add it there as on the other hosts, and restart the plugin; backends here: memory"
		if _, err := b.Mount(t.Context(), "db", "id1"); err == nil || err.Error() != want {
			t.Errorf("mount: got %v, want %s", err, want)
		}
		if s := b.status("db"); s["backend"] != "gold" || s["state"] != "free" {
			t.Errorf("status %v, want free on gold", s)
		}
		a.mount("db", "id2")
		if err := b.Remove(t.Context(), "db"); err == nil || err.Error() != want {
			t.Errorf("remove: got %v, want %s", err, want)
		}
		if err := b.Create(t.Context(), "other", map[string]string{"backend": "gold"}); err == nil ||
			!strings.Contains(err.Error(), `there is no backend "gold" on host b; backends here: memory`) {
			t.Errorf("create: got %v", err)
		}
	})
}
