package openstack_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// onCeph is a Cinder without Keystone and Nova, whose volumes are on Ceph.
type onCeph struct {
	*openstacktest.Server
	ceph *openstack.FakeCeph
}

func newOnCeph(t backendtest.T, delay time.Duration) *onCeph {
	t.Helper()
	c := &onCeph{ceph: openstack.NewFakeCeph(t.TempDir())}
	c.Server = openstacktest.New(openstacktest.Config{NoAuth: true, Delay: delay, RBD: "volumes"}, c.ceph)
	t.Cleanup(c.Close)
	return c
}

func (c *onCeph) node(cluster, node string) *openstack.CephConnector {
	return c.ceph.Node(openstack.Config{
		Attach: "connector", CinderURL: c.CinderURL(), ProjectID: openstacktest.Project, CephUser: "flocker", CephMonitors: []string{"192.0.2.1"},
	}, openstack.Self{Node: node, Cluster: cluster})
}

func TestCephContract(t *testing.T) {
	t.Parallel()
	for name, delay := range map[string]time.Duration{"at once": 0, "states take a time": 2 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backendtest.Run(t, backendtest.Config{
				New: func(t backendtest.T) backendtest.Storage {
					c := newOnCeph(t, delay)
					return backendtest.Storage{
						Node: func(cluster, node string) backends.Backend { return c.node(cluster, node) },
						Open: func(node, path string, _ bool) (backendtest.Device, error) {
							d, err := c.ceph.Open(node, path)
							if err != nil {
								return nil, err
							}
							return d, nil
						},
						Down: func(down bool) {
							if c.SetFaults(); down {
								c.SetFaults(openstacktest.Fault{Status: 503, Text: "The server is currently unavailable."})
							}
						},
					}
				},
				Many: 20, Timeout: 2 * time.Minute,
			})
		})
	}
}

// cephVolume is a volume that node a has attached under token 10.
type cephVolume struct {
	*onCeph
	t    *testing.T
	a, b *openstack.CephConnector
	vol  backends.Volume
	att  backends.Attachment
}

func newCephVolume(t *testing.T) *cephVolume {
	t.Helper()
	v := &cephVolume{onCeph: newOnCeph(t, 0), t: t}
	cluster := uuid.NewString()
	v.a, v.b = v.node(cluster, "node-a"), v.node(cluster, "node-b")
	var err error
	if v.vol, err = v.a.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	v.att = v.mustAttach(v.a, 10)
	return v
}

func (v *cephVolume) attach(b *openstack.CephConnector, token int64) (backends.Attachment, error) {
	return b.Attach(v.t.Context(), backends.AttachRequest{Ref: v.vol.Ref, Volume: v.vol.ID, Token: token})
}

func (v *cephVolume) mustAttach(b *openstack.CephConnector, token int64) backends.Attachment {
	v.t.Helper()
	att, err := v.attach(b, token)
	if err != nil {
		v.t.Fatal(err)
	}
	return att
}

func (v *cephVolume) fence(token int64) (string, error) {
	return v.b.Fence(v.t.Context(), backends.FenceRequest{Ref: v.vol.Ref, Volume: v.vol.ID, Node: "node-a", Token: token})
}

// clients returns the clients of Ceph that are noted for the volume.
func (v *cephVolume) clients() (found []string) {
	for key, value := range v.Metadata(v.vol.Ref) {
		if strings.HasPrefix(key, "flocker_client_") {
			found = append(found, strings.Fields(value)[1])
		}
	}
	return found
}

// wantHeldByA demands that node b does not get the volume.
func (v *cephVolume) wantHeldByA() {
	v.t.Helper()
	_, err := v.attach(v.b, 11)
	holder, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || holder.Node != "node-a" || holder.Token != 10 {
		v.t.Errorf("node-b got %v, want it to be attached to node-a under token 10", err)
	}
}

func TestCephFence(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	was := v.clients()
	if len(was) != 1 || len(v.ceph.Blocklist()) != 0 {
		t.Fatalf("clients %q, blocklist %q", was, v.ceph.Blocklist())
	}
	v.wantHeldByA()
	writer, err := v.ceph.Open("node-a", v.att.Device)
	must(err)
	if _, err := writer.WriteAt([]byte("before"), 0); err != nil {
		t.Fatal(err)
	}
	if evidence, err := v.fence(9); err != nil || !strings.Contains(evidence, "under the younger token 10 only") || len(v.ceph.Blocklist()) != 0 {
		t.Errorf("got %q, %v; blocklist %q", evidence, err, v.ceph.Blocklist())
	}
	evidence, err := v.fence(10)
	if want := "client " + was[0] + " of node-a is on the blocklist, and no watcher of volumes/volume-" + v.vol.Ref + " any more"; err != nil || evidence != want {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if _, err := writer.WriteAt([]byte("after"), 0); err == nil {
		t.Error("a write of the host that was cut off has succeeded")
	}
	_, err = v.attach(v.a, 10)
	want(t, err, backends.ErrInUse, "this host was cut off from volume "+v.vol.Ref+" under ownership token 10, and this one is 10")
	// It is still shown, under its old token, and can be given up.
	if atts, err := v.node(v.vol.Cluster, "node-a").Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != v.att {
		t.Errorf("got %v, %v; want %v", atts, err, v.att)
	}
	must(writer.Close())
	taken := v.mustAttach(v.b, 11)
	if err := v.a.Detach(t.Context(), v.att); err != nil {
		t.Error(err)
	}
	if clients := v.clients(); len(clients) != 1 || clients[0] == was[0] {
		t.Errorf("clients %q", clients)
	}
	if err := v.b.Detach(t.Context(), taken); err != nil {
		t.Error(err)
	}
	if list := v.ceph.Blocklist(); !slices.Equal(list, was) {
		t.Errorf("the blocklist is %q, want %q: a client that was closed is not on it", list, was)
	}
	v.mustAttach(v.a, 12)
}

// A fence comes while the host that is cut off attaches. Until its client is noted the
// fence cannot see it, and it gets no device; from then on it is cut off.
func TestCephFenceMeanwhile(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	for i, noted := range []bool{false, true} {
		token := int64(20 + 10*i)
		if atts, err := v.a.Attachments(t.Context()); err != nil || len(atts) > 1 {
			t.Fatalf("got %v, %v", atts, err)
		} else if len(atts) == 1 {
			if err := v.a.Detach(t.Context(), atts[0]); err != nil {
				t.Fatal(err)
			}
		}
		made, listed := v.ceph.Made(), len(v.ceph.Blocklist())
		fence := func() {
			if _, err := v.fence(token); err != nil {
				t.Error(err)
			}
		}
		if noted {
			v.ceph.Meanwhile(nil, fence)
		} else {
			v.ceph.Meanwhile(fence, nil)
		}
		_, err := v.attach(v.a, token)
		want(t, err, backends.ErrInUse, fmt.Sprintf("this host was cut off from volume %s under ownership token %d, and this one is %[2]d", v.vol.Ref, token))
		v.ceph.Meanwhile(nil, nil)
		if noted {
			made, listed = made+1, listed+1
		}
		if v.ceph.Made() != made || len(v.ceph.Blocklist()) != listed {
			t.Errorf("token %d: %d devices, blocklist %q; want %d and %d", token, v.ceph.Made(), v.ceph.Blocklist(), made, listed)
		}
		if atts, err := v.a.Attachments(t.Context()); err != nil || len(atts) > 0 {
			t.Errorf("token %d: left attached: %v, %v", token, atts, err)
		}
		if err := v.b.Detach(t.Context(), v.mustAttach(v.b, token+1)); err != nil {
			t.Error(err)
		}
	}
}

// Another client is noted while a host attaches, whatever Cinder's attachments say.
func TestCephTwoClients(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	if err := v.a.Detach(t.Context(), v.att); err != nil {
		t.Fatal(err)
	}
	made := v.ceph.Made()
	v.ceph.Meanwhile(func() {
		v.Do(func(s *openstacktest.Server) {
			s.Note(v.vol.Ref, "flocker_client_x", "12 192.0.2.8:0/1 volumes/x node-b")
		})
	}, nil)
	_, err := v.attach(v.a, 11)
	holder, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || holder.Node != "node-b" || holder.Token != 12 {
		t.Errorf("got %v", err)
	}
	if clients := v.clients(); v.ceph.Made() != made || len(clients) != 1 || clients[0] != "192.0.2.8:0/1" {
		t.Errorf("%d devices, want %d; clients %q", v.ceph.Made(), made, clients)
	}
}

// A host whose client is not noted any more was cut off, whoever did it.
func TestCephNoteIsGone(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	for key := range v.Metadata(v.vol.Ref) {
		if strings.HasPrefix(key, "flocker_client_") {
			v.Do(func(s *openstacktest.Server) { s.Note(v.vol.Ref, key, "") })
		}
	}
	_, err := v.attach(v.a, 10)
	want(t, err, backends.ErrInUse, "this host was cut off from volume "+v.vol.Ref+", and has still its device")
}

// Cinder's attachment is deleted by somebody else: its host may still write.
func TestCephAttachmentDeleted(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	v.Do(func(s *openstacktest.Server) { s.Detach(v.vol.Ref) })
	v.wantHeldByA()
	_, err := v.attach(v.a, 10)
	want(t, err, backends.ErrInUse, "this host was cut off from volume "+v.vol.Ref+", and has still its device "+v.att.Device)
	was := v.clients()
	if _, err := v.fence(10); err != nil || !slices.Equal(v.ceph.Blocklist(), was) {
		t.Errorf("got %v, blocklist %q, want %q", err, v.ceph.Blocklist(), was)
	}
	v.mustAttach(v.b, 11)
}

// A fence whose effect is not seen is none, and nobody gets the volume.
func TestCephFenceFails(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	for _, fail := range []string{"blocklist add", "blocklist ls", "rbd status"} {
		v.ceph.Fail(fail)
		_, err := v.fence(10)
		want(t, err, backends.ErrUnavailable, "cut node-a off from volume "+v.vol.ID, "Connection timed out")
		v.ceph.Fail("")
		v.wantHeldByA()
	}
	v = newCephVolume(t)
	v.ceph.Hide(true)
	_, err := v.fence(10)
	want(t, err, backends.ErrUnavailable, "the blocklist does not show client "+v.clients()[0])
	v.wantHeldByA()
	v.ceph.Hide(false)
	v.SetFaults(fault{Call: "DELETE attachments", Status: 503, Text: "The server is currently unavailable."})
	if _, err := v.fence(10); !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	v.wantHeldByA() // Cinder says so
	v.SetFaults()
	if _, err := v.fence(10); err != nil {
		t.Error(err)
	}
	v.mustAttach(v.b, 11)
}

// A client that has died, with its host or alone, is cut off before there is another:
// something that it has sent may be on its way.
func TestCephClientDied(t *testing.T) {
	t.Parallel()
	for name, programs := range map[string]bool{"host": false, "program": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := newCephVolume(t)
			was := v.clients()
			v.ceph.Reboot("node-a", programs)
			a := v.node(v.vol.Cluster, "node-a")
			atts, err := a.Attachments(t.Context())
			if err != nil || len(atts) != 1 || atts[0].Token != 10 || (atts[0].Device == "") == programs {
				t.Fatalf("got %+v, %v", atts, err)
			}
			v.wantHeldByA()
			again, err := v.attach(a, 10)
			if err != nil || again.Device == v.att.Device || !slices.Equal(v.ceph.Blocklist(), was) {
				t.Errorf("got %v, %v; blocklist %q, want %q", again, err, v.ceph.Blocklist(), was)
			}
			v.ceph.Reboot("node-a", programs)
			was = append(was, v.clients()...)
			if err := a.Detach(t.Context(), again); err != nil || !slices.Equal(v.ceph.Blocklist(), was) {
				t.Errorf("got %v; blocklist %q, want %q", err, v.ceph.Blocklist(), was)
			}
			v.mustAttach(v.b, 11)
		})
	}
}

// A note that is none of Flocker's says that there is a client, and not which.
func TestCephUnknownClient(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	if err := v.a.Detach(t.Context(), v.att); err != nil {
		t.Fatal(err)
	}
	v.Do(func(s *openstacktest.Server) {
		s.Note(v.vol.Ref, "flocker_client_x", "11 192.0.2.7:0/1 nowhere node-b")
	})
	_, err := v.attach(v.b, 12)
	want(t, err, backends.ErrUnavailable, "the note flocker_client_x does not say what Flocker writes", "ceph osd blocklist add")
	v.Do(func(s *openstacktest.Server) { s.Note(v.vol.Ref, "flocker_client_x", "x") })
	_, err = v.attach(v.b, 12)
	want(t, err, backends.ErrInUse, "attached")
	v.Do(func(s *openstacktest.Server) {
		s.Note(v.vol.Ref, "flocker_client_x", "11 192.0.2.7:0/1 volumes/volume-gone node-b")
	})
	_, err = v.attach(v.b, 12)
	want(t, err, backends.ErrUnavailable, "this Ceph cluster has no image volumes/volume-gone, so it may be another one")
}

func TestCephUnanswered(t *testing.T) {
	t.Parallel()
	for _, f := range []fault{{Drop: true}, {Half: true}, {Status: 503}} {
		for _, call := range []string{"POST attachments", "PUT attachments", "GET attachments", "POST attachments/*/action", "POST volumes/*/metadata", "DELETE attachments", "DELETE volumes/*/metadata"} {
			v := newCephVolume(t)
			f.Call, f.Times = call, 1
			v.SetFaults(f)
			att := v.att
			var err error
			for range 10 { // as the driver does
				if err = v.a.Detach(t.Context(), att); err == nil {
					break
				}
			}
			if err != nil {
				t.Fatalf("%s: %v", call, err)
			}
			for range 10 {
				if att, err = v.attach(v.a, 11); err == nil {
					break
				}
			}
			if err != nil {
				t.Fatalf("%s: %v", call, err)
			}
			if clients := v.clients(); len(clients) != 1 {
				t.Errorf("%s: clients %q", call, clients)
			}
			if err := v.a.Detach(t.Context(), att); err != nil {
				t.Errorf("%s: %v", call, err)
			}
			for key := range v.Metadata(v.vol.Ref) {
				if strings.HasPrefix(key, "flocker_client") || strings.HasPrefix(key, "flocker_attachment") {
					t.Errorf("%s: %s is left", call, key)
				}
			}
		}
	}
}

func TestCephRefuses(t *testing.T) {
	t.Parallel()
	v := newCephVolume(t)
	if err := v.a.Detach(t.Context(), v.att); err != nil {
		t.Fatal(err)
	}
	for text, info := range map[string]map[string]any{
		"storage of kind \"nfs\", and this host is set up to attach rbd": {"driver_volume_type": "nfs"},
		"which is not made of its id (Cinder's volume_name_template)":    {"driver_volume_type": "rbd", "name": "volumes/other"},
		"is image \"volumes/a/b\"":                                       {"driver_volume_type": "rbd", "name": "volumes/a/b"},
		"error reading header from volume-" + v.vol.Ref:                  {"driver_volume_type": "rbd", "name": "elsewhere/volume-" + v.vol.Ref},
	} {
		v.Do(func(s *openstacktest.Server) { s.Info(info) })
		_, err := v.attach(v.a, 11)
		if err == nil || !strings.Contains(err.Error(), text) || errors.Is(err, backends.ErrNotFound) {
			t.Errorf("got %v, want it to say %q", err, text)
		}
		if err := v.a.Detach(t.Context(), backends.Attachment{Ref: v.vol.Ref, Volume: v.vol.ID, Node: "node-a", Token: 11}); err != nil {
			t.Fatal(err)
		}
	}
	if status, _ := v.Attached(v.vol.Ref); status != "available" {
		t.Errorf("it is %s", status)
	}
	if _, err := v.ceph.Open("node-a", v.att.Device); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
