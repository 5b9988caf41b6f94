//go:build e2e

package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	flocker "github.com/clusterhq/flocker-go"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestFlockerGo has three hosts with certificates of docker flocker ca, and at their REST
// APIs the original's client for Go, as Kubernetes had it; hosts are killed under it.
func TestFlockerGo(t *testing.T) {
	plugin, err := rig.TestStorePlugin()
	if err != nil {
		t.Fatal(err)
	}
	step := stopwatch(t)
	a := &apiTest{cluster: newCluster(t, rig.Config{Hosts: 3, Engine: rig.Current, Plugin: plugin, Secure: true}, map[string]string{
		"FLOCKER_BACKEND": "teststore", "FLOCKER_NODE_TTL": "4s", "FLOCKER_NODE_RENEW": "1s",
	}), ids: map[*rig.Host]string{}}
	a.ready(t)
	step("the API is served")
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"every call", a.testCalls},
		{"Kubernetes", a.testKubernetes},
		{"another host is killed", a.testOtherKilled},
		{"the host that is asked is killed", a.testAskedKilled},
		{"the plugin that is asked is killed", a.testPluginKilled},
	} {
		if !t.Run(test.name, test.run) {
			return // what follows would not know how the hosts are
		}
		step(test.name)
	}
	a.wantClean(t)
	step("all is clean")
}

// An apiTest has the ids of its hosts.
type apiTest struct {
	*cluster

	ids map[*rig.Host]string
}

// client is flocker-go as user anna, who asks a host, and takes another one for her own.
func (a *apiTest) client(t *testing.T, asked, own *rig.Host) *flocker.Client {
	t.Helper()
	in := func(file string) string { return filepath.Join(a.Certs, file) }
	c, err := flocker.NewClient(asked.Addr, 4523, own.Addr, in("cluster.crt"), in("anna.key"), in("anna.crt"))
	if err != nil {
		t.Fatal(err)
	}
	c.Transport.(*http.Transport).DialContext = a.Dial
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// ready waits until every host's API knows every host by its address.
func (a *apiTest) ready(t *testing.T) {
	t.Helper()
	for _, h := range a.Hosts {
		c := a.client(t, h, h)
		within(t, time.Minute, h.Name+"'s API knows all hosts", func() error {
			nodes, err := c.ListNodes()
			if err == nil && len(nodes) != len(a.Hosts) {
				err = fmt.Errorf("it knows %v", nodes)
			}
			for _, h := range a.Hosts {
				at := slices.IndexFunc(nodes, func(n flocker.NodeState) bool { return n.Host == h.Addr })
				if err == nil && at < 0 {
					return fmt.Errorf("it knows %v, and not %s", nodes, h.Addr)
				} else if err == nil {
					a.ids[h] = nodes[at].UUID
				}
			}
			return err
		})
	}
}

// arrived waits until the state has the dataset at a host, and returns its path there.
func (a *apiTest) arrived(t *testing.T, c *flocker.Client, id string, h *rig.Host) (path string) {
	t.Helper()
	// As long as Kubernetes waited.
	within(t, 2*time.Minute, "the dataset is at "+h.Name, func() error {
		state, err := c.GetDatasetState(id)
		if err == nil && state.Primary != a.ids[h] {
			err = fmt.Errorf("it is %+v", state)
		}
		if err == nil {
			path = state.Path
		}
		return err
	})
	return path
}

// removed deletes a dataset and waits until every host has heard of it.
func (a *apiTest) removed(t *testing.T, id string) {
	t.Helper()
	for i, h := range a.Hosts {
		c := a.client(t, h, h)
		if i == 0 {
			within(t, 30*time.Second, "dataset "+id+" can be deleted", func() error { return c.DeleteDataset(id) })
		}
		within(t, 30*time.Second, "dataset "+id+" is gone at "+h.Name, func() error {
			if state, err := c.GetDatasetState(id); err == nil {
				return fmt.Errorf("it is %+v", state)
			} else if err.Error() != "State not found by Dataset ID" {
				return err
			}
			return nil
		})
	}
}

// pod runs a shell command in a container that has a directory of the host as its /data,
// which is how Kubernetes gave a dataset to a container.
func pod(t *testing.T, h *rig.Host, path, script string) string {
	t.Helper()
	return h.Run(t, "run", "--rm", "--mount", "type=bind,src="+path+",dst=/data", "busybox", "sh", "-c", script)
}

// testCalls makes each of flocker-go's calls, at each host.
func (a *apiTest) testCalls(t *testing.T) {
	for i, h := range a.Hosts {
		next, name := a.Hosts[(i+1)%len(a.Hosts)], fmt.Sprintf("db%d", i)
		c := a.client(t, h, h)
		if id, err := c.GetPrimaryUUID(); id != a.ids[h] || err != nil {
			t.Errorf("GetPrimaryUUID: %s, %v, want %s", id, err, a.ids[h])
		}
		began := time.Now()
		// No primary: here.
		made, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Metadata: map[string]string{"name": name}})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: CreateDataset took %v", h.Name, time.Since(began))
		if made.MaximumSize != "67108864" {
			t.Errorf("CreateDataset: %+v", made)
		}
		for _, again := range []flocker.CreateDatasetOptions{
			{MaximumSize: 64 << 20, Metadata: map[string]string{"name": name}},
			{MaximumSize: 64 << 20, DatasetID: made.DatasetID},
		} {
			if _, err := a.client(t, next, next).CreateDataset(&again); err == nil || err.Error() != "The volume already exists" {
				t.Errorf("CreateDataset once more: %v", err)
			}
		}
		if id, err := c.GetDatasetID(name); id != made.DatasetID || err != nil {
			t.Errorf("GetDatasetID: %s, %v, want %s", id, err, made.DatasetID)
		}
		pod(t, h, a.arrived(t, c, made.DatasetID, h), "echo "+h.Name+" >/data/from")
		if state, err := c.UpdatePrimaryForDataset(a.ids[next], made.DatasetID); err != nil || state.Primary != a.ids[next] || state.DatasetID != made.DatasetID {
			t.Errorf("UpdatePrimaryForDataset: %+v, %v", state, err)
		}
		if got := pod(t, next, a.arrived(t, c, made.DatasetID, next), "cat /data/from"); got != h.Name {
			t.Errorf("what %s wrote is %q on %s", h.Name, got, next.Name)
		}
		if i == 0 { // it is a volume of Docker, too
			if got := sh(t, next, name, "cat /data/from"); got != h.Name {
				t.Errorf("what %s wrote is %q in volume %s on %s", h.Name, got, name, next.Name)
			}
		}
		within(t, 30*time.Second, "the dataset can be deleted", func() error { return c.DeleteDataset(made.DatasetID) })
		if _, err := c.GetDatasetID(name); err == nil || err.Error() != "Configuration not found by Name" {
			t.Errorf("GetDatasetID of one that is deleted: %v", err)
		}
		a.removed(t, made.DatasetID)
	}
}

// testKubernetes has a persistent volume that follows its pod: the provisioner makes it,
// and the kubelet of the node of the pod fetches it, while it is in use elsewhere at first.
func (a *apiTest) testKubernetes(t *testing.T) {
	first, second, third := a.Hosts[0], a.Hosts[1], a.Hosts[2]
	provisioner := a.client(t, third, third)
	nodes, err := provisioner.ListNodes()
	if err != nil || !slices.ContainsFunc(nodes, func(n flocker.NodeState) bool { return n.UUID == a.ids[first] }) {
		t.Fatalf("%v, %v", nodes, err)
	}
	made, err := provisioner.CreateDataset(&flocker.CreateDatasetOptions{
		MaximumSize: 64 << 20, Primary: a.ids[first], Metadata: map[string]string{"type": "k8s-dynamic-prov", "pvc": "pvc-1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	// setUp is what a kubelet does before the pod: it asks its own host.
	setUp := func(h *rig.Host) (path string, mounted bool) {
		t.Helper()
		kubelet := a.client(t, h, h)
		state, err := kubelet.GetDatasetState(made.DatasetID)
		if err != nil {
			t.Fatal(err)
		}
		mine, err := kubelet.GetPrimaryUUID()
		if err != nil {
			t.Fatal(err)
		}
		if state.Primary == mine {
			return state.Path, true
		}
		if _, err := kubelet.UpdatePrimaryForDataset(mine, made.DatasetID); err != nil {
			t.Fatal(err)
		}
		return "", false
	}
	path, mounted := setUp(first)
	if !mounted {
		path = a.arrived(t, a.client(t, first, first), made.DatasetID, first)
	}
	first.Run(t, "run", "-d", "--name", "pod", "--mount", "type=bind,src="+path+",dst=/data", "busybox",
		"sh", "-c", "trap exit TERM; echo acknowledged >/data/record && sync && touch /written; sleep 600 & wait")
	eventually(t, "the pod has written", func() bool {
		_, err := first.Docker(t.Context(), "exec", "pod", "test", "-e", "/written")
		return err == nil
	})

	// The pod is to be on another node, and still runs on this one.
	if _, mounted := setUp(second); mounted {
		t.Fatal("the second node has it already")
	}
	asked := time.Now()
	for time.Since(asked) < 3*time.Second {
		state, err := a.client(t, second, second).GetDatasetState(made.DatasetID)
		if err != nil || state.Primary != a.ids[first] || state.Path != path {
			t.Fatalf("while the pod uses it: %+v, %v", state, err)
		}
		time.Sleep(300 * time.Millisecond)
	}
	if err := provisioner.DeleteDataset(made.DatasetID); err == nil || err.Error() != "Expected: {1,2}xx deleting the dataset "+made.DatasetID+", got: 409" {
		t.Errorf("DeleteDataset of what a pod uses: %v", err)
	}
	if got := first.Run(t, "exec", "pod", "sh", "-c", "echo more >>/data/record && sync && cat /data/record"); got != "acknowledged\nmore" {
		t.Errorf("the pod reads %q", got)
	}
	first.Run(t, "rm", "-f", "pod")
	path = a.arrived(t, a.client(t, second, second), made.DatasetID, second)
	if _, mounted := setUp(second); !mounted {
		t.Error("the second node has it, and is asked to fetch it")
	}
	if got := pod(t, second, path, "cat /data/record"); got != "acknowledged\nmore" {
		t.Errorf("on the second node the pod reads %q", got)
	}
	a.removed(t, made.DatasetID)
}

// A hook does something as soon as a dataset was made, which is when CreateDataset begins
// to look for it in the state.
type hook struct {
	http.RoundTripper
	made func()
}

func (k hook) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := k.RoundTripper.RoundTrip(req)
	if err != nil || req.Method != http.MethodPost {
		return resp, err
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body = io.NopCloser(bytes.NewReader(body))
	k.made()
	return resp, err
}

// testOtherKilled kills a host that has a dataset while another dataset is made elsewhere.
// Neither the one nor the other is lost.
func (a *apiTest) testOtherKilled(t *testing.T) {
	first, second, victim := a.Hosts[0], a.Hosts[1], a.Hosts[2]
	c := a.client(t, first, first)
	held, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Primary: a.ids[victim], Metadata: map[string]string{"name": "held"}})
	if err != nil {
		t.Fatal(err)
	}
	pod(t, victim, a.arrived(t, c, held.DatasetID, victim), "echo acknowledged >/data/record && sync")

	killing := a.client(t, first, first)
	killing.Transport = hook{killing.Transport, func() {
		if err := victim.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	made := []string{held.DatasetID}
	for i, c := range []*flocker.Client{killing, c, a.client(t, second, second)} {
		state, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Primary: a.ids[second], Metadata: map[string]string{"name": fmt.Sprintf("new%d", i)}})
		if err != nil {
			t.Fatalf("CreateDataset number %d: %v", i, err)
		}
		made = append(made, state.DatasetID)
	}
	for _, id := range made[1:] {
		a.arrived(t, c, id, second)
	}
	if _, err := c.UpdatePrimaryForDataset(a.ids[first], held.DatasetID); err != nil {
		t.Fatal(err)
	}
	if got := pod(t, first, a.arrived(t, c, held.DatasetID, first), "cat /data/record"); got != "acknowledged" {
		t.Errorf("what the killed host wrote is %q", got)
	}
	if err := victim.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.ready(t)
	for _, id := range made {
		a.removed(t, id)
	}
}

// once is what has to be so of a name after its creation failed, and was repeated at
// another host: there is one dataset of it, which is where it is to be and can be used.
func (a *apiTest) once(t *testing.T, asked, primary *rig.Host, name string) (id string) {
	t.Helper()
	c := a.client(t, asked, asked)
	// As Kubernetes did, which repeats what has failed.
	within(t, 2*time.Minute, name+" is made, or there", func() error {
		_, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Primary: a.ids[primary], Metadata: map[string]string{"name": name}})
		if err != nil && err.Error() != "The volume already exists" {
			return err
		}
		if id, err = c.GetDatasetID(name); err != nil {
			return err
		}
		if _, err = c.UpdatePrimaryForDataset(a.ids[primary], id); err != nil {
			return err
		}
		return nil
	})
	if got := pod(t, primary, a.arrived(t, c, id, primary), "echo acknowledged >/data/record && sync && cat /data/record"); got != "acknowledged" {
		t.Errorf("%s: %q", name, got)
	}
	resp, err := c.Get("https://" + asked.Addr + ":4523/v1/configuration/datasets")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var present int
	for row := range strings.SplitSeq(string(all), "},{") {
		if strings.Contains(row, `"name":"`+name+`"`) && !strings.Contains(row, `"deleted":true`) {
			present++
		}
	}
	if present != 1 {
		t.Errorf("%d datasets have the name %s: %s", present, name, all)
	}
	return id
}

// testAskedKilled switches off the host that is asked for a dataset, when it has said that
// it is made.
func (a *apiTest) testAskedKilled(t *testing.T) {
	first, victim := a.Hosts[0], a.Hosts[1]
	c := a.client(t, victim, victim)
	// A host without power does not answer at all, and flocker-go waits without end.
	c.Timeout = 5 * time.Second
	c.Transport = hook{c.Transport, func() {
		if err := victim.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	began := time.Now()
	_, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Primary: a.ids[first], Metadata: map[string]string{"name": "asked"}})
	if err == nil || !strings.HasPrefix(err.Error(), "Flocker API error during dataset creation (datasetID ") {
		t.Errorf("CreateDataset: %v", err)
	}
	took := time.Since(began)
	if took > time.Minute {
		t.Errorf("it took %v to fail", took)
	}
	t.Logf("after %v: %v", took, err)
	id := a.once(t, first, first, "asked")
	if err := victim.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.ready(t)
	a.removed(t, id)
}

// testPluginKilled kills the plugin that makes a dataset, at several moments. The client
// needs no time-out of its own.
func (a *apiTest) testPluginKilled(t *testing.T) {
	first, victim := a.Hosts[0], a.Hosts[1]
	var made []string
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 15 * time.Millisecond, 40 * time.Millisecond} {
		name := fmt.Sprintf("after%d", after.Milliseconds())
		c := a.client(t, victim, victim)
		if _, err := c.ListNodes(); err != nil { // there is a connection
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		began := time.Now()
		go func() {
			_, err := c.CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Primary: a.ids[first], Metadata: map[string]string{"name": name}})
			ended <- err
		}()
		time.Sleep(after)
		if err := victim.KillPlugin(t.Context()); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			t.Logf("killed after %v: CreateDataset took %v: %v", after, time.Since(began), err)
		case <-time.After(time.Minute):
			t.Fatalf("killed after %v: CreateDataset has not ended after a minute", after)
		}
		made = append(made, a.once(t, first, first, name))
		within(t, 2*time.Minute, victim.Name+"'s API answers again", func() error {
			_, err := c.ListNodes()
			if err != nil {
				// Docker disables for good what is killed while it starts it.
				if got, failed := victim.Docker(t.Context(), "plugin", "inspect", "--format", "{{.Enabled}}", "flocker"); failed == nil && got == "false" {
					_, _ = victim.Docker(t.Context(), "plugin", "enable", "--timeout", "0", "flocker")
				}
			}
			return err
		})
		a.ready(t)
	}
	for _, id := range made {
		a.removed(t, id)
	}
}
