package openstack_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// key is how a user of Rackspace's logs in.
func (c *cloud) key() openstack.Config {
	return openstack.Config{Auth: "rackspace", AuthURL: c.URL + "/v2.0", Username: openstacktest.User, APIKeyFile: c.secret, Region: openstacktest.RackspaceRegion}
}

// rackspace is a node there.
func (c *cloud) rackspace(cluster, node string, change func(*openstack.Config)) *openstack.Rackspace {
	b := c.with(cluster, node, func(cfg *openstack.Config) {
		id := cfg.ServerID
		*cfg = c.key()
		cfg.RunDir = filepath.Join(c.dir, "run", node)
		if cfg.ServerID = id; change != nil {
			change(cfg)
		}
	}).(*openstack.Rackspace)
	openstack.Novas(b).Addresses("127.0.0.1", "fe80::1", c.Address(c.server(node)))
	return b
}

// rented is a cloud of Rackspace's with a volume and two nodes.
type rented struct {
	*stored
	a, b *openstack.Rackspace
}

func newRented(t *testing.T, cfg config) *rented {
	t.Helper()
	cfg.Rackspace = true
	r := &rented{stored: &stored{cloud: newCloud(t, cfg), t: t, cluster: uuid.NewString()}}
	r.a, r.b = r.rackspace(r.cluster, "node-a", nil), r.rackspace(r.cluster, "node-b", nil)
	vol, err := r.a.Create(t.Context(), r.request())
	if err != nil {
		t.Fatal(err)
	}
	r.vol = vol
	return r
}

func (r *rented) request() backends.CreateRequest {
	req := r.stored.request()
	req.Size = 75 << 30
	return req
}

func TestRackspaceContract(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]struct {
		bus   string
		delay time.Duration
	}{
		"disks with serial numbers": {"vd", 0},
		"Xen":                       {"xvd", 3 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backendtest.Run(t, backendtest.Config{
				New: func(t backendtest.T) backendtest.Storage {
					c := newCloud(t, openstacktest.Config{Rackspace: true, Delay: how.delay})
					c.bus = how.bus
					return backendtest.Storage{
						Node: func(cluster, node string) backends.Backend {
							return c.rackspace(cluster, node, func(cfg *openstack.Config) { cfg.XenDisks = how.bus == "xvd" })
						}, Open: c.open,
						Down: func(down bool) {
							if c.SetFaults(); down {
								c.SetFaults(openstacktest.Fault{Status: 503, Text: "The server is currently unavailable."})
							}
						},
					}
				},
				Many: 60, Timeout: 2 * time.Minute, // and see TestRackspaceListIsFull
			})
		})
	}
}

func TestRackspaceProperties(t *testing.T) {
	t.Parallel()
	b, err := openstack.New(openstack.Config{Auth: "rackspace", Username: "u", APIKeyFile: "/k", Region: "DFW"}, openstack.Self{Node: "n", Cluster: "c"})
	if err != nil {
		t.Fatal(err)
	}
	if p := b.Properties(); p.MinSize != 75<<30 || p.Class != backends.ClassExclusive {
		t.Errorf("got %+v", p)
	}
	if _, grows := backends.As[backends.Resizer](b); grows {
		t.Error("it says that it can grow volumes")
	}
	if _, fences := backends.As[backends.Fencer](b); !fences {
		t.Error("it does not fence")
	}
	if _, known := backends.As[backends.Identifier](b); !known {
		t.Error("it has no name for a host")
	}
}

func TestRackspaceSettings(t *testing.T) {
	t.Parallel()
	for text, change := range map[string]func(*openstack.Config){
		`auth is "rack"; use keystone or rackspace`:               func(c *openstack.Config) { c.Auth = "rack" },
		"api_key_file and xen_disks are for auth":                 func(c *openstack.Config) { c.Auth = "" },
		"needs username, api_key_file and region, such as DFW":    func(c *openstack.Config) { c.Region = "" },
		"auth: rackspace needs username, api_key_file":            func(c *openstack.Config) { c.APIKeyFile = "" },
		"leave it out, or write it like https://identity.api.rac": func(c *openstack.Config) { c.AuthURL = "identity" },
		"auth: rackspace needs attach: nova":                      func(c *openstack.Config) { c.Attach = "connector" },
		"password_file is nothing for auth: rackspace":            func(c *openstack.Config) { c.PasswordFile = "/p" },
		"grow_attached is nothing for auth: rackspace":            func(c *openstack.Config) { c.GrowAttached = true },
		"allow_admin_fence is nothing for auth: rackspace":        func(c *openstack.Config) { c.AllowAdminFence = true },
		"with auth: rackspace use public or internal":             func(c *openstack.Config) { c.Interface = "admin" },
		`server_id "web-1" is no UUID`:                            func(c *openstack.Config) { c.ServerID = "web-1" },
	} {
		cfg := openstack.Config{Auth: "rackspace", Username: "u", APIKeyFile: "/k", Region: "DFW"}
		change(&cfg)
		_, err := openstack.New(cfg, openstack.Self{Node: "n", Cluster: "c"})
		want(t, err, backends.ErrInvalid, "openstack: ", text)
	}
}

func TestRackspaceLogin(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	wrong := r.dir + "/wrong"
	must(os.WriteFile(wrong, []byte("0123456789abcdef0123456789abcdef\n"), 0o600))
	for _, c := range []struct {
		change func(cfg *openstack.Config)
		says   string
	}{
		{func(cfg *openstack.Config) { cfg.APIKeyFile = wrong }, `refuses the credentials (401 "Unable to authenticate user with credentials provided"): check username and the file with the key`},
		{func(cfg *openstack.Config) { cfg.Username = "nobody" }, "Rackspace's identity service at " + r.URL + "/v2.0 refuses the credentials"},
		{func(cfg *openstack.Config) { cfg.APIKeyFile = "/nonexistent" }, "read the secret: open /nonexistent"},
		{func(cfg *openstack.Config) { cfg.APIKeyFile = "/dev/null" }, "/dev/null is empty"},
		{func(cfg *openstack.Config) { cfg.AuthURL = r.URL + "/v3" }, `says 404 "Resource Not Found": check auth_url`},
		{func(cfg *openstack.Config) { cfg.AuthURL = "http://127.0.0.1:1/v2.0" }, "Rackspace's identity service at http://127.0.0.1:1/v2.0 does not answer"},
		{
			func(cfg *openstack.Config) { cfg.Region = "Moon" },
			`catalog has no cloudBlockStorage with interface public in region "Moon", but in DFW, ORD; check region and interface`,
		},
		{func(cfg *openstack.Config) { cfg.Interface = "internal" }, `with interface internal in region "DFW", but nowhere`},
		{func(cfg *openstack.Config) { cfg.CAFile = r.secret }, "has no certificate"},
	} {
		_, err := r.rackspace(r.cluster, "node-a", c.change).List(t.Context())
		want(t, err, backends.ErrUnavailable, "list volumes", c.says)
		if err != nil && strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("the key is in %v", err)
		}
	}
}

// The key is changed while a process runs, and its token ends.
func TestRackspaceKeyIsChanged(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	r.Expire()
	if _, err := r.a.Get(t.Context(), r.vol.Ref); err != nil {
		t.Errorf("the token has expired: %v", err)
	}
	right, err := os.ReadFile(r.secret)
	must(err)
	must(os.WriteFile(r.secret, []byte("old\n"), 0o600))
	r.Expire()
	logins := r.Calls()["POST tokens"]
	_, err = r.a.Get(t.Context(), r.vol.Ref)
	want(t, err, backends.ErrUnavailable, "the login has expired, and Rackspace's identity service does not renew it: check the credentials")
	if n := r.Calls()["POST tokens"] - logins; n != 1 {
		t.Errorf("a wrong key was tried %d times", n)
	}
	must(os.WriteFile(r.secret, right, 0o600))
	if _, err := r.a.Get(t.Context(), r.vol.Ref); err != nil {
		t.Errorf("the file has the right key again: %v", err)
	}
}

// A list that may not be all is none: what it lacks would be taken for deleted, or made again.
func TestRackspaceListIsFull(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	r.Do(func(s *server) {
		for range openstacktest.LimitV1 - 2 {
			s.Add(uuid.NewString(), uuid.NewString(), true) // somebody else's
		}
	})
	all, err := r.a.List(t.Context())
	if err != nil || len(all) != 1 || all[0] != r.vol {
		t.Fatalf("got %v, %v; want %v", all, err, r.vol)
	}
	r.Do(func(s *server) { s.Add(uuid.NewString(), uuid.NewString(), true) })
	_, err = r.a.List(t.Context())
	want(t, err, backends.ErrUnavailable, "list volumes", "Cinder lists 1000 volumes, which is as many as its old API ever lists", "use another account or region")
	before := len(r.Volumes())
	_, err = r.a.Create(t.Context(), r.request())
	want(t, err, backends.ErrUnavailable, "create volume db", "others may be missing")
	if after := len(r.Volumes()); after != before {
		t.Errorf("there are %d volumes, before %d", after, before)
	}
}

func TestRackspaceRefusals(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	req := r.request()
	req.Size = 10 << 30 // the driver would not
	_, err := r.a.Create(t.Context(), req)
	want(t, err, backends.ErrInvalid, "'size' parameter must be between 75 and 1024")
	r.Do(func(s *server) { s.Fix() })
	before := len(r.Volumes())
	_, err = r.a.Create(t.Context(), r.request())
	want(t, err, backends.ErrUnavailable, "Cinder does not let anybody add to the metadata of a volume", "it cannot be used with this service")
	if after := len(r.Volumes()); after != before {
		t.Errorf("there are %d volumes, before %d", after, before)
	}
}

// While a volume is on its way to a server version 1 does not say which, and nobody may
// take it for one that nobody has.
func TestRackspaceUnderWay(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	node := r.server("node-a")
	r.Do(func(s *server) { s.Status(r.vol.Ref, "attaching") }) // for a server that nobody knows
	fence := func() error {
		_, err := r.b.Fence(t.Context(), backends.FenceRequest{Ref: r.vol.Ref, Volume: r.vol.ID, Node: "node-a", Identity: node, Token: 10})
		return err
	}
	want(t, fence(), backends.ErrUnavailable, "Cinder says that volume "+r.vol.Ref+" is attaching, and not of which server; it is asked again")
	err := r.a.Detach(t.Context(), backends.Attachment{Ref: r.vol.Ref, Volume: r.vol.ID, Node: "node-a", Token: 10})
	want(t, err, backends.ErrUnavailable, "is attaching, and not of which server")
	r.Do(func(s *server) { s.Status(r.vol.Ref, "available") })
	if err := fence(); err != nil {
		t.Error(err)
	}
	att, err := r.a.Attach(t.Context(), backends.AttachRequest{Ref: r.vol.Ref, Volume: r.vol.ID, Token: 10})
	if err != nil {
		t.Fatal(err)
	}
	// Nova has it on the server, and Cinder shows nothing yet.
	r.Do(func(s *server) { s.Hide(r.vol.Ref, "attaching") })
	_, err = r.b.Attach(t.Context(), backends.AttachRequest{Ref: r.vol.Ref, Volume: r.vol.ID, Token: 11})
	if e, ok := errors.AsType[*backends.AttachedError](err); !ok || e.Node != "node-a" || e.Token != 10 {
		t.Errorf("got %v", err)
	}
	r.Do(func(s *server) { s.Hide(r.vol.Ref, "in-use") })
	if err := fence(); err != nil {
		t.Error(err)
	}
	r.wantAttached("available")
	if err := r.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// Nobody of Rackspace's users is an administrator.
func TestRackspaceFenceWithComputeHostDown(t *testing.T) {
	t.Parallel()
	r := newRented(t, config{})
	att, err := r.attach(r.a, 10)
	must(err)
	r.Do(func(s *server) { s.Host("compute-of-node-a", true, true) })
	fence := backends.FenceRequest{Ref: r.vol.Ref, Volume: r.vol.ID, Node: "node-a", Identity: r.server("node-a"), Token: 10}
	_, err = r.b.Fence(t.Context(), fence)
	want(t, err, backends.ErrUnavailable, "Nova does not reach the compute host of server "+fence.Identity, "ask Rackspace's support to make sure that the server does not run")
	r.wantAttached("in-use", fence.Identity)
	r.Do(func(s *server) { s.Host("compute-of-node-a", false, false) })
	if _, err = r.b.Fence(t.Context(), fence); err != nil {
		t.Error(err)
	}
	if err := r.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}
