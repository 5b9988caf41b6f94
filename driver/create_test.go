package driver_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Of several nodes that are to make the same new volume at once, one does.
func TestCreateNew(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		req := driver.CreateRequest{Name: "db", ID: uuid.NewString(), New: true}
		nodes := []*node{c.nodes["a"], c.nodes["b"], c.nodes["a"], c.nodes["b"]}
		errs := make([]error, len(nodes))
		var all sync.WaitGroup
		for i, n := range nodes {
			all.Go(func() { _, errs[i] = n.CreateVolume(t.Context(), req) })
		}
		all.Wait()
		if made := len(errs) - len(slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err == nil })); made != 1 {
			t.Errorf("%d have made it: %v", made, errs)
		}
		for _, err := range errs {
			if err == nil {
				continue
			}
			wantError(t, err, "volume db, of the id "+req.ID+", has been made already")
			if e, ok := errors.AsType[*ownership.TakenError](err); !ok || e.By != req.ID || !errors.Is(err, ownership.ErrConflict) {
				t.Errorf("%T %v", err, err)
			}
		}
		req.ID = uuid.NewString()
		_, err := c.nodes["b"].CreateVolume(t.Context(), req)
		wantError(t, err, "the name db is in use by another volume (id "+c.view("db").Volume.ID+")")
	})
}

// A volume whose host is killed while it makes it is shown on the others as what it is, and can
// be removed there, or used, which finishes it.
func TestHalfMade(t *testing.T) {
	for _, stored := range []bool{false, true} { // the storage has it already
		for _, end := range []string{"remove", "move", "mount"} {
			t.Run(fmt.Sprintf("%s stored=%v", end, stored), func(t *testing.T) {
				inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
					a, b := c.nodes["a"], c.nodes["b"]
					req := driver.CreateRequest{Name: "db", ID: uuid.NewString(), New: true}
					a.killedAt("Create", stored, func() { _, _ = a.CreateVolume(t.Context(), req) })
					c.settle(time.Hour)
					want := map[string]any{
						"id": req.ID, "backend": "memory", "size": "1GiB", "filesystem": "ext4", "state": "creating",
						"detail": "if the host that makes it was stopped, the next mount finishes it, and it can be removed",
					}
					if got := b.status("db"); !maps.Equal(got, want) {
						t.Errorf("it is %v, want %v", got, want)
					}
					if all, _ := b.Survey(t.Context()); len(all) != 1 || !maps.Equal(all[0].Status, want) {
						t.Errorf("among all it is %+v, want %v", all, want)
					}
					switch end {
					case "remove":
						if err := b.RemoveVolume(t.Context(), "db", req.ID); err != nil {
							t.Fatal(err)
						}
						c.settle(time.Minute)
						if all, _ := b.Survey(t.Context()); len(all) != 0 {
							t.Errorf("afterwards there are %+v", all)
						}
						if left, err := c.storage.Node(b.id.ID).List(t.Context()); err != nil || len(left) != 0 {
							t.Errorf("in the storage there are %+v, %v", left, err)
						}
						c.wantNothing()
					case "move":
						b.move("db", "b")
						c.settle(time.Minute)
						c.wantPlaced("db", "b")
					case "mount":
						b.mount("db", "id1")
					}
				})
			})
		}
	}
}

// said are the audit lines of a volume: what was done on which host, and by whom.
func (c *cluster) said(vid string) (lines []string) {
	c.t.Helper()
	res, err := c.etcd.Txn(c.t.Context(), ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: "/flocker/v1/ev/", Prefix: true}}})
	if err != nil {
		c.t.Fatal(err)
	}
	kvs := res.Results[0].KVs
	slices.SortFunc(kvs, func(a, b ownership.KV) int { return cmp.Compare(a.ModRevision, b.ModRevision) })
	for _, kv := range kvs {
		var line struct{ What, Volume, Host, By string }
		if err := json.Unmarshal(kv.Value, &line); err != nil {
			c.t.Fatal(err)
		}
		if line.Volume == vid {
			lines = append(lines, line.Host+": "+line.What+" by "+line.By)
		}
	}
	return lines
}

// Who wanted a volume is said also of what came of it.
func TestBy(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		v, err := a.CreateVolume(t.Context(), driver.CreateRequest{Name: "db", By: "user-anna"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Move(t.Context(), "db", "b", "user-bob"); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Minute)
		c.wantPlaced("db", "b")
		if _, err := a.Move(t.Context(), "db", "", "user-bob"); err != nil {
			t.Fatal(err)
		}
		c.settle(time.Hour)
		if err := b.RemoveVolume(ownership.By(t.Context(), "user-eve"), "db", ""); err != nil {
			t.Fatal(err)
		}
		want := []string{
			"a: create by user-anna", "a: ready by user-anna", "a: place by user-bob", "b: claim by user-bob", "b: formatted by user-bob",
			"a: place nowhere by user-bob", "b: release by ", "b: delete by user-eve", "b: purge by user-eve",
		}
		if got := c.said(v.Definition.ID); !slices.Equal(got, want) {
			t.Errorf("it is said\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
}

// Of a placement and a drain, it is said who wanted what hosts ask each other for.
func TestByOfRequests(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1") // in use, or the owner might let go before it is asked
		a.docker.set("db", "web")
		a.move("db", "b")
		c.settle(time.Minute)
		a.docker.set("db")
		a.unmount("db", "id1")
		c.settle(time.Minute)
		c.wantPlaced("db", "b")
		b.mount("db", "id2")
		b.docker.set("db", "web")
		if _, err := a.Drain(ownership.By(t.Context(), "ann@ops"), "b", "ann@ops"); err != nil {
			t.Fatal(err)
		}
		lines := c.said(c.view("db").Volume.ID)
		for _, want := range []string{"b: request by eve@ops", "a: request by ann@ops"} {
			if !slices.Contains(lines, want) {
				t.Errorf("it is said\n%s\nwithout %s", strings.Join(lines, "\n"), want)
			}
		}
	})
}
