package driver_test

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// Survey says of each volume what Get says, and needs no storage for that; without
// etcd it says what is remembered.
func TestSurvey(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("here", map[string]string{"size": "2G", "label.team": "blue"})
		a.create("free", nil)
		b.create("there", nil)
		a.mount("here", "id1")
		b.mount("there", "id2")
		c.settle(10 * time.Second) // the storage is asked again after half a minute
		c.storage.SetFault(func(_ context.Context, call backendtest.Call) error {
			t.Errorf("the storage was asked to %s", call.Method)
			return errors.New("no storage")
		})
		look := func(wantStale bool, states map[string]string) {
			t.Helper()
			volumes, stale := a.Survey(t.Context())
			if stale != wantStale || len(volumes) != len(states) {
				t.Errorf("%d volumes, stale %v, want %d, %v", len(volumes), stale, len(states), wantStale)
			}
			last := ""
			for _, v := range volumes {
				if v.Name < last {
					t.Errorf("%s comes after %s", v.Name, last)
				}
				last = v.Name
				if v.Status["state"] != states[v.Name] {
					t.Errorf("%s is %v, want %s", v.Name, v.Status["state"], states[v.Name])
				}
				if got, err := a.Get(t.Context(), v.Name); err != nil || !reflect.DeepEqual(got, v) {
					t.Errorf("Get says %+v (%v), Survey %+v", got, err, v)
				}
				if v.Definition.Name != v.Name || v.Name == "here" && (v.Definition.Size != 2<<30 || v.Definition.Labels["team"] != "blue" || v.Mountpoint == "") {
					t.Errorf("%s: %+v", v.Name, v)
				}
			}
		}
		look(false, map[string]string{"here": "mounted", "free": "free", "there": "owned"})
		a.etcd.Partition(true)
		for range 20 { // what is remembered has no order
			look(true, map[string]string{"here": "mounted", "free": "unknown", "there": "unknown"})
		}
		a.etcd.Partition(false)
		c.storage.SetFault(nil)
		a.unmount("here", "id1")
		b.unmount("there", "id2")
	})
}
