package driver_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/driver"
)

// Host tells what is of a volume of this node from what is not, and changes nothing.
func TestHost(t *testing.T) {
	inCluster(t, twoNodes, func(cfg *driver.Config) { cfg.Reconcile = time.Hour }, func(t *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", map[string]string{"fs": "xfs"})
		a.create("other", nil)
		a.mount("db", "id1")
		root := filepath.Join(a.stateDir, "mnt")
		db, err := a.Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		device, err := a.mounter.Mounted(filepath.Join(root, db.Definition.ID))
		if err != nil {
			t.Fatal(err)
		}
		want := driver.Host{
			MountRoot: root, Filesystems: []string{"ext4", "xfs"}, Silent: map[string]error{}, Forbidden: map[string][]string{}, Unjudged: map[string]error{},
			Mounts:  []driver.HostMount{{Path: filepath.Join(root, db.Definition.ID), Number: "0:1", Volume: "db"}},
			Devices: []driver.HostDevice{{Backend: "memory", Path: device, ID: db.Definition.ID, Token: db.Status["token"].(int64), Owned: true}},
		}
		is := func(what string) {
			t.Helper()
			if got := a.Host(t.Context()); !reflect.DeepEqual(got, want) {
				t.Errorf("%s:\ngot  %+v\nwant %+v", what, got, want)
			}
		}
		is("one is mounted")

		// An attach that nobody asked for, as one that came late.
		node := c.storage.Node(a.id.ID)
		all, err := node.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(v backends.Volume) bool { return v.Name == "other" })
		stray, err := node.Attach(t.Context(), backends.AttachRequest{Ref: all[i].Ref, Volume: all[i].ID, Token: 1})
		if err != nil {
			t.Fatal(err)
		}
		want.Devices = append(want.Devices, driver.HostDevice{Backend: "memory", Path: stray.Device, ID: all[i].ID, Token: 1})
		slices.SortFunc(want.Devices, func(x, y driver.HostDevice) int { return strings.Compare(x.Path, y.Path) })
		is("a device of nobody's")

		// Somebody unmounts it behind the plugin.
		if err := a.mounter.Unmount(t.Context(), filepath.Join(root, db.Definition.ID)); err != nil {
			t.Fatal(err)
		}
		want.Mounts, want.Unmounted = nil, []string{"db"}
		is("unmounted by hand")

		down := errors.New("the storage is down")
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error { return fmt.Errorf("%s: %w", call.Method, down) })
		got := a.Host(t.Context())
		if len(got.Devices) != 0 || !errors.Is(got.Silent["memory"], down) {
			t.Errorf("a backend that is down: %+v", got)
		}
		c.storage.SetFault(nil)
		if err := node.Detach(t.Context(), stray); err != nil {
			t.Fatal(err)
		}
		a.unmount("db", "id1")
	})
}

// bounded is storage that does not allow everything, or does not say.
type bounded struct {
	backends.Backend
	calls []string
	err   error
}

func (b *bounded) Unwrap() backends.Backend { return b.Backend }

func (b *bounded) Forbidden(ctx context.Context) ([]string, error) {
	if b.err == nil && b.calls == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return b.calls, b.err
}

func TestPermissions(t *testing.T) {
	down := errors.New("no answer")
	inCluster(t, twoNodes, func(cfg *driver.Config) {
		storage := cfg.Backends["memory"]
		cfg.Backends = map[string]backends.Backend{
			"memory": storage, "aws": &bounded{storage, []string{"ec2:StopInstances"}, nil}, "down": &bounded{storage, nil, down},
			"hung": &bounded{storage, nil, nil}, "all": &bounded{storage, []string{}, nil},
		}
	}, func(t *testing.T, c *cluster) {
		got := c.nodes["a"].Host(t.Context())
		if want := map[string][]string{"aws": {"ec2:StopInstances"}}; !reflect.DeepEqual(got.Forbidden, want) {
			t.Errorf("forbidden: got %v, want %v", got.Forbidden, want)
		}
		if want := map[string]error{"down": down, "hung": context.DeadlineExceeded}; !reflect.DeepEqual(got.Unjudged, want) {
			t.Errorf("unjudged: got %v, want %v", got.Unjudged, want)
		}
	})
}
