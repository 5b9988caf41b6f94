package openstack_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// standalone is a real Cinder without Keystone and Nova.
type standalone struct {
	*stack
	*share
}

func (c *standalone) node(cluster, node string) backends.Backend {
	b, err := openstack.New(openstack.Config{
		Attach: "connector", CinderURL: c.cinder, ProjectID: openstacktest.Project,
		Shares: map[string]string{"127.0.0.1:" + c.share.dir: c.mount(node)},
	}, openstack.Self{Node: node, Cluster: cluster})
	must(err)
	openstack.Patient(b)
	return b
}

func TestRealCinder(t *testing.T) {
	s := newStack(t)
	export := s.mkdir("export")
	s.startCinderAlone(s.onNFS(export))
	const token = "admin:" + openstacktest.Project
	c := &standalone{stack: s, share: newShare(t, export)}

	// The first volume waits until the scheduler has heard of the storage.
	cluster := uuid.NewString()
	a := c.node(cluster, "node-a")
	var vol backends.Volume
	s.await("the first volume", 2*time.Minute, func() bool {
		var err error
		if vol, err = a.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30}); err != nil {
			t.Log(err)
		}
		return err == nil
	})

	t.Run("messages", func(t *testing.T) {
		request := func(change func(*backends.CreateRequest)) error {
			req := backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30}
			change(&req)
			_, err := a.Create(t.Context(), req)
			return err
		}
		err := request(func(r *backends.CreateRequest) { r.Options = map[string]string{"volume_type": "nosuch"} })
		want(t, err, backends.ErrInvalid, "404", "nosuch", "use another volume_type")
		quota := func(volumes int) {
			s.must(token, http.MethodPut, s.cinder+"/"+openstacktest.Project+"/os-quota-sets/"+openstacktest.Project,
				map[string]any{"quota_set": map[string]any{"volumes": volumes}}, nil)
		}
		quota(1)
		err = request(func(*backends.CreateRequest) {})
		want(t, err, backends.ErrUnavailable, "413", "VolumeLimitExceeded", "quota 'volumes'", "ask for a larger quota")
		quota(1000)
		err = request(func(r *backends.CreateRequest) { r.Size = 1 << 50 })
		want(t, err, backends.ErrUnavailable, "413", "gigabytes", "ask for a larger quota")
		_, err = a.Get(t.Context(), uuid.NewString())
		want(t, err, backends.ErrNotFound, "Cinder has no volume")
		// A snapshot is in the way of a delete, and makes the file one of another format.
		var snap struct{ Snapshot struct{ ID string } }
		s.must(token, http.MethodPost, s.cinder+"/"+openstacktest.Project+"/snapshots",
			map[string]any{"snapshot": map[string]any{"volume_id": vol.Ref, "name": "before"}}, &snap)
		s.await("the snapshot", time.Minute, func() bool {
			var got struct{ Snapshot struct{ Status string } }
			s.must(token, http.MethodGet, s.cinder+"/"+openstacktest.Project+"/snapshots/"+snap.Snapshot.ID, nil, &got)
			return got.Snapshot.Status == "available"
		})
		want(t, a.Delete(t.Context(), vol.Ref), backends.ErrInUse, "have snapshots")
		_, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 9})
		want(t, err, backends.ErrInvalid, "format qcow2, as after a snapshot")
		if err := a.Detach(t.Context(), backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "node-a", Token: 9}); err != nil {
			t.Error(err)
		}
	})

	t.Run("contract", func(t *testing.T) {
		backendtest.Run(t, backendtest.Config{
			New:  func(backendtest.T) backendtest.Storage { return backendtest.Storage{Node: c.node} },
			Many: 20, Timeout: 2 * time.Minute,
		})
	})
}
