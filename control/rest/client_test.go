package rest_test

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	flocker "github.com/clusterhq/flocker-go"

	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// flockerGo is the original's client for Go, as Kubernetes had it, on a host of that
// address.
func (s *service) flockerGo(clientIP string) *flocker.Client {
	s.t.Helper()
	host, text, _ := net.SplitHostPort(s.address)
	port, err := strconv.Atoi(text)
	if err != nil {
		s.t.Fatal(err)
	}
	f := files(s.dir, "anna")
	c, err := flocker.NewClient(host, port, clientIP, f.CA, f.Key, f.Cert)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// Every call of flocker-go, over TLS.
func TestFlockerGo(t *testing.T) {
	s := serve(t)
	c := s.flockerGo("10.0.0.2")

	nodes, err := c.ListNodes()
	if want := []flocker.NodeState{{UUID: alpha, Host: "10.0.0.1"}, {UUID: beta, Host: "10.0.0.2"}}; err != nil || fmt.Sprint(nodes) != fmt.Sprint(want) {
		t.Errorf("ListNodes: %v, %v, want %v", nodes, err, want)
	}
	if id, err := c.GetPrimaryUUID(); id != beta || err != nil {
		t.Errorf("GetPrimaryUUID: %s, %v, want %s", id, err, beta)
	}
	if _, err := s.flockerGo("10.0.0.3").GetPrimaryUUID(); err == nil || !strings.HasPrefix(err.Error(), "No node found with IP '10.0.0.3'") {
		t.Errorf("GetPrimaryUUID of a host that is none: %v", err)
	}

	// It is in the state at the first look, or this takes 5 s and more.
	begin := time.Now()
	state, err := c.CreateDataset(&flocker.CreateDatasetOptions{Metadata: map[string]string{"name": "db"}})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("CreateDataset took %v", took)
	}
	if state.Primary != beta || state.Path != "/flocker/mnt/"+state.DatasetID+"/data" || state.MaximumSize != "107374182400" {
		t.Errorf("CreateDataset: %+v", state)
	}
	if calls := s.asks(); len(calls) != 2 || !strings.HasPrefix(calls[0], "create db map[size:107374182400] map[name:db]") {
		t.Errorf("the driver was asked for %q", calls)
	}
	for _, options := range []flocker.CreateDatasetOptions{
		{Primary: alpha, Metadata: map[string]string{"name": "db"}},
		{Primary: alpha, DatasetID: state.DatasetID},
	} {
		if _, err := c.CreateDataset(&options); err == nil || err.Error() != "The volume already exists" {
			t.Errorf("CreateDataset once more: %v", err)
		}
	}
	if _, err := c.CreateDataset(&flocker.CreateDatasetOptions{Primary: alpha, MaximumSize: 1000}); err == nil || err.Error() != "Expected: {1,2}xx creating the volume, got: 400" {
		t.Errorf("CreateDataset of a bad size: %v", err)
	}

	if id, err := c.GetDatasetID("db"); id != state.DatasetID || err != nil {
		t.Errorf("GetDatasetID: %s, %v", id, err)
	}
	if _, err := c.GetDatasetID("web"); err == nil || err.Error() != "Configuration not found by Name" {
		t.Errorf("GetDatasetID of none: %v", err)
	}
	if got, err := c.GetDatasetState(state.DatasetID); err != nil || *got != *state {
		t.Errorf("GetDatasetState: %+v, %v, want %+v", got, err, state)
	}
	if _, err := c.GetDatasetState(id1); err == nil || err.Error() != "State not found by Dataset ID" {
		t.Errorf("GetDatasetState of none: %v", err)
	}
	if got, err := c.UpdatePrimaryForDataset(alpha, state.DatasetID); err != nil || got.Primary != alpha || got.DatasetID != state.DatasetID {
		t.Errorf("UpdatePrimaryForDataset: %+v, %v", got, err)
	}
	if _, err := c.UpdatePrimaryForDataset(alpha, id1); err == nil || err.Error() != "It was impossible to update the dataset" {
		t.Errorf("UpdatePrimaryForDataset of none: %v", err)
	}
	if err := c.DeleteDataset(state.DatasetID); err != nil {
		t.Errorf("DeleteDataset: %v", err)
	}
	if err := c.DeleteDataset(id1); err == nil || err.Error() != "Expected: {1,2}xx deleting the dataset "+id1+", got: 404" {
		t.Errorf("DeleteDataset of none: %v", err)
	}
	if _, err := c.GetDatasetID("db"); err == nil || err.Error() != "Configuration not found by Name" {
		t.Errorf("GetDatasetID of a deleted one: %v", err)
	}
	// The name is free again.
	if _, err := c.CreateDataset(&flocker.CreateDatasetOptions{Primary: alpha, Metadata: map[string]string{"name": "db"}}); err != nil {
		t.Errorf("CreateDataset under a name that is free: %v", err)
	}
}

// While etcd is away, a client that waits for its new dataset is not led to delete it: to
// do so it takes one answer that it cannot read.
func TestFlockerGoWithoutEtcd(t *testing.T) {
	s := serve(t)
	c := s.flockerGo("10.0.0.1")
	state, err := c.CreateDataset(&flocker.CreateDatasetOptions{Metadata: map[string]string{"name": "db"}})
	if err != nil {
		t.Fatal(err)
	}
	s.stale, s.err = time.Minute, fmt.Errorf("%w: etcd does not answer", ownership.ErrUnavailable)
	if got, err := c.GetDatasetState(state.DatasetID); err != nil || *got != *state {
		t.Errorf("GetDatasetState: %+v, %v", got, err)
	}
	if _, err := c.CreateDataset(&flocker.CreateDatasetOptions{Metadata: map[string]string{"name": "web"}}); err == nil || err.Error() != "Expected: {1,2}xx creating the volume, got: 503" {
		t.Errorf("CreateDataset: %v", err)
	}
	if calls := strings.Join(s.asks(), "\n"); strings.Contains(calls, "remove") {
		t.Errorf("the driver was asked for:\n%s", calls)
	}
}

// What Kubernetes did, on a host where the dataset is not, with one that is busy at first.
func TestKubernetes(t *testing.T) {
	s := serve(t)
	provisioner := s.flockerGo("10.0.0.1")
	nodes, err := provisioner.ListNodes()
	if err != nil {
		t.Fatal(err)
	}
	made, err := provisioner.CreateDataset(&flocker.CreateDatasetOptions{
		MaximumSize: 1 << 30, Primary: nodes[0].UUID, Metadata: map[string]string{"type": "k8s-dynamic-prov", "pvc": "pvc-1"},
	})
	if err != nil {
		t.Fatal(err)
	}

	kubelet := s.flockerGo("10.0.0.2")
	state, err := kubelet.GetDatasetState(made.DatasetID)
	if err != nil || state.Primary != alpha {
		t.Fatalf("%+v, %v", state, err)
	}
	mine, err := kubelet.GetPrimaryUUID()
	if err != nil {
		t.Fatal(err)
	}
	name := made.DatasetID // there was none in the metadata
	s.mu.Lock()
	s.held[name] = true
	s.mu.Unlock()
	if _, err := kubelet.UpdatePrimaryForDataset(mine, made.DatasetID); err != nil {
		t.Fatal(err)
	}
	// In use on alpha, so it stays there, and the state does not pretend otherwise.
	if state, err = kubelet.GetDatasetState(made.DatasetID); err != nil || state.Primary != alpha {
		t.Errorf("while it is in use: %+v, %v", state, err)
	}
	s.view(name, func(v *ownership.View) { v.Presence, v.Owner = nil, nil }) // let go, on its way
	if state, err = kubelet.GetDatasetState(made.DatasetID); err != nil || state.Primary != "" || state.Path != "" {
		t.Errorf("on its way: %+v, %v", state, err)
	}
	s.mount(name)
	if state, err = kubelet.GetDatasetState(made.DatasetID); err != nil || state.Primary != beta {
		t.Errorf("there: %+v, %v", state, err)
	}
	if err := provisioner.DeleteDataset(made.DatasetID); err != nil {
		t.Error(err)
	}
	if _, err := kubelet.GetDatasetState(made.DatasetID); err == nil {
		t.Error("it is still in the state")
	}
}

var _ rest.Driver = (*cluster)(nil)
