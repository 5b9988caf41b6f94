package control_test

import (
	"io"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/api"
)

// The client asks for what the plugin serves, also with names that need quoting.
func TestClientChanges(t *testing.T) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	f := &fake{}
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: control.New(f, f, "v1", logrus.NewEntry(log))}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	defer func() {
		_ = server.Close()
		<-served
	}()
	c, ctx, by := &api.Client{Socket: socket}, t.Context(), api.By{By: "anna@b"}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	v, err := c.Create(ctx, api.Creation{Name: "db", By: "anna@b"})
	if ok(err); v.Name != "db" || v.Placement != "b" || v.PlacementError != "it rains" {
		t.Errorf("created %+v", v)
	}
	ok(c.Remove(ctx, "d/b", by))
	where := "b"
	m, err := c.Move(ctx, "db", api.Movement{Host: &where, By: "anna@b"})
	if ok(err); m != (api.Moved{Volume: "db", Host: "b", Node: "n/2"}) {
		t.Errorf("moved %+v", m)
	}
	ok(c.Cordon(ctx, "n/2", by))
	ok(c.Uncordon(ctx, "b", by))
	d, err := c.Drain(ctx, "b", by)
	if ok(err); len(d.Released) != 1 || len(d.Busy) != 2 || d.Busy[0].Containers[0] != "web" {
		t.Errorf("drained %+v", d)
	}
	ok(c.RemoveNode(ctx, "b", by))
	want := []string{
		"create {db  map[] map[] false anna@b}", "remove d/b by anna@b", `move db to "b" by anna@b`, "cordon n/2 by anna@b: true",
		"cordon b by anna@b: false", "drain b by anna@b", "remove node b by anna@b",
	}
	if !reflect.DeepEqual(f.calls, want) {
		t.Errorf("the driver saw %q, want %q", f.calls, want)
	}
}
