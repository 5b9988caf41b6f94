package openstack_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

type (
	config = openstacktest.Config
	fault  = openstacktest.Fault
	server = openstacktest.Server
)

// stored is a cloud with a volume and two nodes.
type stored struct {
	*cloud
	t       *testing.T
	cluster string
	a, b    *openstack.Nova
	vol     backends.Volume
}

func newStored(t *testing.T, cfg config) *stored {
	t.Helper()
	s := &stored{cloud: newCloud(t, cfg), t: t, cluster: uuid.NewString()}
	s.a, s.b = s.backend(s.cluster, "node-a"), s.backend(s.cluster, "node-b")
	s.vol = s.create(s.a)
	return s
}

func (s *stored) request() backends.CreateRequest {
	return backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: s.cluster, Size: 1 << 30}
}

func (s *stored) create(b backends.Backend) backends.Volume {
	s.t.Helper()
	vol, err := b.Create(s.t.Context(), s.request())
	if err != nil {
		s.t.Fatal(err)
	}
	return vol
}

// again returns a new process of a node, with other settings.
func (s *stored) again(node string, change func(*openstack.Config)) *openstack.Nova {
	s.cfg = change
	defer func() { s.cfg = nil }()
	return s.backend(s.cluster, node)
}

func (s *stored) attach(b backends.Backend, token int64) (backends.Attachment, error) {
	return b.Attach(s.t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: token})
}

func (s *stored) mustAttach(b backends.Backend, token int64) backends.Attachment {
	s.t.Helper()
	att, err := s.attach(b, token)
	if err != nil {
		s.t.Fatal(err)
	}
	return att
}

func (s *stored) fence(b *openstack.Nova, token int64) (string, error) {
	return b.Fence(s.t.Context(), backends.FenceRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Node: "node-a", Identity: s.server("node-a"), Token: token})
}

// want demands an error of a class that says what to do, and never the secret.
func want(t *testing.T, err, class error, texts ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("got %v, want %v", err, class)
	}
	for _, other := range []error{backends.ErrNotFound, backends.ErrInvalid, backends.ErrExists} {
		if errors.Is(class, backends.ErrUnavailable) && errors.Is(err, other) {
			t.Errorf("%v matches %v as well", err, other)
		}
	}
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want it to say %q", err, text)
		}
	}
	if err != nil && strings.Contains(err.Error(), openstacktest.Secret) {
		t.Errorf("the secret is in %v", err)
	}
}

func (s *stored) wantAttached(status string, servers ...string) {
	s.t.Helper()
	if st, on := s.Attached(s.vol.Ref); st != status || strings.Join(on, " ") != strings.Join(servers, " ") {
		s.t.Errorf("it is %s, attached to %q; want %s, %q", st, on, status, servers)
	}
}

func TestLogin(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	clouds := filepath.Join(t.TempDir(), "clouds.yaml")
	must(os.WriteFile(clouds, []byte(`clouds:
  shop:
    auth: {auth_url: "`+s.URL+`/v3", username: flocker, user_domain_name: Default, password: "`+openstacktest.Secret+`", project_name: shop, project_domain_name: Sales}
    region_name: RegionOne
`), 0o600))
	s.cfg = func(cfg *openstack.Config) {
		*cfg = openstack.Config{Cloud: "shop", CloudsFile: clouds, ServerID: cfg.ServerID}
	}
	if _, err := s.backend(s.cluster, "node-a").Get(t.Context(), s.vol.Ref); err != nil {
		t.Errorf("with clouds.yaml: %v", err)
	}
	s.cfg = func(cfg *openstack.Config) {
		*cfg = openstack.Config{
			AuthURL: s.URL, ApplicationCredentialID: openstacktest.AppID, ApplicationCredentialSecretFile: s.secret, ServerID: cfg.ServerID,
		}
	}
	if _, err := s.backend(s.cluster, "node-a").Get(t.Context(), s.vol.Ref); err != nil {
		t.Errorf("with an application credential: %v", err)
	}
	for _, c := range []struct {
		change func(cfg *openstack.Config)
		says   string
	}{
		{func(cfg *openstack.Config) { cfg.UserDomain = "Other" }, "refuses the credentials"},
		{func(cfg *openstack.Config) { cfg.ProjectID = strings.Repeat("0", 32) }, "check the user, its domain, the project and the file with the secret"},
		{func(cfg *openstack.Config) { cfg.PasswordFile = "/nonexistent" }, "read the secret: open /nonexistent"},
		{func(cfg *openstack.Config) { cfg.PasswordFile = "/dev/null" }, "/dev/null is empty"},
		{func(cfg *openstack.Config) { cfg.AuthURL = s.URL + "/nothing" }, "Keystone at " + s.URL + "/nothing"},
		{func(cfg *openstack.Config) { cfg.AuthURL = "http://127.0.0.1:1/v3" }, "Keystone at http://127.0.0.1:1/v3 does not answer"},
		{func(cfg *openstack.Config) { cfg.Region = "Moon" }, `no block storage of version 3 (Cinder) with interface public in region "Moon"; check region and interface`},
		{func(cfg *openstack.Config) { cfg.Interface = "internal" }, "with interface internal"},
		{func(cfg *openstack.Config) { cfg.CAFile = s.secret }, "has no certificate"},
	} {
		_, err := s.again("node-a", c.change).List(t.Context())
		want(t, err, backends.ErrUnavailable, "list volumes", c.says)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	good := openstack.Config{AuthURL: "https://keystone.example:5000/v3", Username: "u", UserDomain: "Default", PasswordFile: "/f", ProjectID: openstacktest.Project}
	self := openstack.Self{Node: "n", Cluster: "c"}
	if _, err := openstack.New(good, self); err != nil {
		t.Error(err)
	}
	for text, change := range map[string]func(*openstack.Config){
		"attach is \"scsi\"; use nova or connector":             func(c *openstack.Config) { c.Attach = "scsi" },
		"set one of cloud, username":                            func(c *openstack.Config) { c.Username = "" },
		"set one of cloud, username,":                           func(c *openstack.Config) { c.Cloud = "x" },
		"clouds_file without cloud":                             func(c *openstack.Config) { c.CloudsFile = "/x" },
		"username needs password_file and user_domain":          func(c *openstack.Config) { c.UserDomain = "" },
		"username needs project_id, or project_name":            func(c *openstack.Config) { c.ProjectID = "" },
		"application_credential_secret_file":                    func(c *openstack.Config) { c.Username, c.ApplicationCredentialID = "", "x" },
		"auth_url \"keystone:5000\" is no URL":                  func(c *openstack.Config) { c.AuthURL = "keystone:5000" },
		"cinder_url needs a URL like":                           func(c *openstack.Config) { c.Username, c.CinderURL = "", "cinder" },
		"needs attach: connector":                               func(c *openstack.Config) { c.Username, c.CinderURL = "", "http://c:8776/v3" },
		"interface is \"any\"; use public":                      func(c *openstack.Config) { c.Interface = "any" },
		"server_id \"web-1\" is no UUID":                        func(c *openstack.Config) { c.ServerID = "web-1" },
		"late_calls must not be negative":                       func(c *openstack.Config) { c.LateCalls = -1 },
		"attach: connector needs one of shares":                 func(c *openstack.Config) { c.Attach = "connector" },
		"shares, ceph_user and iscsi are for attach: connector": func(c *openstack.Config) { c.Shares = map[string]string{"a:/b": "/c"} },
		"ceph_monitors and ceph_attach need ceph_user":          func(c *openstack.Config) { c.CephAttach = "fuse" },
		"iscsi_initiator and iscsi_attach need iscsi: true": func(c *openstack.Config) {
			c.Attach, c.CephUser, c.ISCSIInitiator = "connector", "x", "iqn.2026-11.x:a"
		},
		"run_dir needs ceph_user or iscsi": func(c *openstack.Config) { c.RunDir = "/run/x" },
		"one of shares, which say where the NFS shares of Cinder are mounted here, ceph_user and iscsi: true": func(c *openstack.Config) {
			c.Attach, c.CephUser, c.ISCSI = "connector", "x", true
		},
		"iscsi_attach: \"nbd\" is no way to attach an iSCSI unit": func(c *openstack.Config) {
			c.Attach, c.ISCSI, c.ISCSIInitiator, c.ISCSIAttach = "connector", true, "iqn.2026-11.x:a", "nbd"
		},
		"\"host1\" is no name of an iSCSI initiator": func(c *openstack.Config) { c.Attach, c.ISCSI, c.ISCSIInitiator = "connector", true, "host1" },
		"ceph_user needs ceph_conf or ceph_monitors": func(c *openstack.Config) { c.Attach, c.CephUser = "connector", "flocker" },
		"without \"client.\"":                        func(c *openstack.Config) { c.Attach, c.CephUser, c.CephConf = "connector", "client.x", "/c" },
		"ceph_keyring_file \"k\" must be an absolute path": func(c *openstack.Config) {
			c.Attach, c.CephUser, c.CephConf, c.CephKeyringFile = "connector", "x", "/c", "k"
		},
		"attach: \"iscsi\" is no way to attach an image": func(c *openstack.Config) {
			c.Attach, c.CephUser, c.CephConf, c.CephAttach = "connector", "x", "/c", "iscsi"
		},
		"which is no absolute path":                          func(c *openstack.Config) { c.Attach, c.Shares = "connector", map[string]string{"a:/b": "c"} },
		"keep_servers, allow_admin_fence and grow_attached ": func(c *openstack.Config) { c.Attach, c.KeepServers = "connector", true },
	} {
		cfg := good
		change(&cfg)
		_, err := openstack.New(cfg, self)
		want(t, err, backends.ErrInvalid, "openstack: ", text)
	}
}

// 1,200 volumes are three pages, between which somebody deletes the last of a page.
func TestPages(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	ids := map[string]bool{s.vol.Ref: true}
	s.Do(func(c *server) {
		for range 1200 {
			ids[c.Add(s.cluster, uuid.NewString(), true)] = true
			c.Add(uuid.NewString(), uuid.NewString(), true)
		}
	})
	for range 2 {
		all, err := s.a.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]bool{}
		for _, v := range all {
			found[v.Ref] = true
		}
		if !maps.Equal(found, ids) || len(all) != len(ids) {
			t.Fatalf("%d volumes are listed, want %d", len(all), len(ids))
		}
		s.SetFaults(fault{Call: "GET volumes/detail?marker", Times: 1, Status: 404, Text: "Volume could not be found."})
	}
}

func TestTokenExpiresMidFlight(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Delay: 5 * time.Millisecond})
	ended := make(chan struct{})
	calls := func() (n int) {
		for _, times := range s.Calls() {
			n += times
		}
		return n
	}
	go func() {
		defer close(ended)
		for range 5 {
			for before := calls(); calls() < before+20 && t.Context().Err() == nil; {
				time.Sleep(time.Millisecond)
			}
			s.Expire()
		}
	}()
	for token := int64(0); ; token++ {
		if err := s.a.Detach(t.Context(), s.mustAttach(s.a, token)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ended:
		default:
			continue
		}
		break
	}
	// Not any more: the password was changed.
	s.SetFaults(fault{Call: "auth/tokens", Status: 401, Text: "The request you have made requires authentication."})
	s.Expire()
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrUnavailable, "the login has expired, and Keystone does not renew it: check the credentials")
	// And then in the settings as well: no restart is needed.
	s.SetFaults()
	s.mustAttach(s.a, 10)
}

func TestOldCinder(t *testing.T) {
	t.Parallel()
	c := newCloud(t, config{Old: true})
	_, err := c.backend(uuid.NewString(), "node-a").List(t.Context())
	want(t, err, backends.ErrUnavailable, "Cinder answers GET volumes/detail with 406", "older than API version 3.44")
}

func TestQuota(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Quota: 1})
	req := s.request()
	_, err := s.a.Create(t.Context(), req)
	want(t, err, backends.ErrUnavailable, "create volume db", "exceeded for quota 'volumes'", "remove volumes, or ask for a larger quota")
	if calls := s.Calls(); calls["POST volumes"] != 2 {
		t.Errorf("it was asked %d times for two volumes: a quota is no throttling", calls["POST volumes"])
	}
	if err := s.a.Delete(t.Context(), s.vol.Ref); err != nil {
		t.Fatal(err)
	}
	if _, err := s.a.Create(t.Context(), req); err != nil {
		t.Error(err)
	}
}

func TestCreateFails(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Delay: time.Millisecond})
	s.Do(func(c *server) { c.Break("schedule allocate volume: Could not find any available weighted backend.") })
	req := s.request()
	_, err := s.a.Create(t.Context(), req)
	want(t, err, backends.ErrUnavailable, "Cinder could not make it", "Could not find any available weighted backend.")
	s.Do(func(c *server) { c.Break("") })
	if _, err := s.b.Create(t.Context(), req); err != nil {
		t.Error(err)
	}
	if all := s.Volumes(); len(all) != 2 {
		t.Errorf("there are %q", all)
	}
	s.a = s.again("node-a", func(cfg *openstack.Config) {
		cfg.Profiles = map[string]openstack.Profile{"gold": {VolumeType: openstacktest.Type}, "far": {Zone: "moon"}}
	})
	for profile, text := range map[string]string{
		"far": "Availability zone 'moon' is invalid", "lead": `there is no profile "lead"; the setting profiles has: far, gold`,
	} {
		req := s.request()
		req.Profile = profile
		_, err = s.a.Create(t.Context(), req)
		want(t, err, backends.ErrInvalid, text)
	}
	req = s.request()
	req.Profile = "gold"
	if _, err := s.a.Create(t.Context(), req); err != nil {
		t.Error(err)
	}
	req = s.request()
	req.Profile, req.Options = "gold", map[string]string{"volume_type": "nosuch"}
	_, err = s.a.Create(t.Context(), req)
	want(t, err, backends.ErrInvalid, "Volume type with name nosuch could not be found", "use another volume_type")
}

// What calls that nobody knows of have left does not count, and is deleted.
func TestCreateAfterAbandonedOnes(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	for s.vol.Ref < "4" || s.vol.Ref > "c" {
		s.vol = s.create(s.a)
	}
	kept := s.Volumes()
	s.Do(func(c *server) {
		smaller, larger := 0, 0
		for smaller == 0 || larger == 0 {
			if c.Add(s.cluster, s.vol.ID, false) < s.vol.Ref {
				smaller++
			} else {
				larger++
			}
		}
	})
	if all, err := s.b.List(t.Context()); err != nil || len(all) != len(kept) || !slices.Contains(all, s.vol) {
		t.Errorf("got %v, %v", all, err)
	}
	again, err := s.b.Create(t.Context(), backends.CreateRequest{ID: s.vol.ID, Name: "db", Cluster: s.cluster, Size: 1 << 30})
	if err != nil || again != s.vol {
		t.Errorf("got %v, %v; want %v", again, err, s.vol)
	}
	if all := s.Volumes(); !slices.Equal(all, kept) {
		t.Errorf("there are %q, want %q", all, kept)
	}
}

// What calls that nobody knows of have left goes before the volume, and nothing else does.
func TestDeleteAfterAbandonedOnes(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	var left, kept []string
	s.Do(func(c *server) {
		for range 3 {
			left = append(left, c.Add(s.cluster, s.vol.ID, false))
		}
		used := c.Add(s.cluster, s.vol.ID, false)
		c.Note(used, "flocker_attached_"+uuid.NewString()+"_7", "node-c")
		kept = []string{used, c.Add(s.cluster, s.vol.ID, true), c.Add(uuid.NewString(), s.vol.ID, false), c.Add(s.cluster, uuid.NewString(), false)}
	})
	s.SetFaults(fault{Call: "DELETE volumes/*", After: 1, Times: 1, Status: 403, Text: "Policy doesn't allow volume:delete to be performed."})
	err := s.a.Delete(t.Context(), s.vol.Ref)
	want(t, err, backends.ErrUnavailable, "delete volume", "volume:delete", "needs a role")
	if _, err := s.a.Get(t.Context(), s.vol.Ref); err != nil {
		t.Errorf("it has gone before the others: %v", err)
	}
	s.SetFaults()
	if err := s.a.Delete(t.Context(), s.vol.Ref); err != nil {
		t.Fatal(err)
	}
	slices.Sort(kept)
	if all := s.Volumes(); !slices.Equal(all, kept) {
		t.Errorf("there are %q, want %q; to be deleted were %q", all, kept, left)
	}
}

// A process that asks whose the host's disks are, and is not told everything, asks about the rest.
func TestAttachmentsAreAskedOnce(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.mustAttach(s.a, 10)
	for range 2 {
		s.vol = s.create(s.a)
		s.mustAttach(s.a, 10)
	}
	a := s.again("node-a", nil)
	s.SetFaults(fault{Call: "GET volumes/*", After: 2, Status: 503})
	_, err := a.Attachments(t.Context())
	want(t, err, backends.ErrUnavailable, "list attachments", "Cinder itself has failed")
	s.SetFaults()
	before := s.Calls()["GET volumes/*"]
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 3 {
		t.Errorf("got %v, %v", atts, err)
	}
	if looks := s.Calls()["GET volumes/*"] - before; looks != 1 {
		t.Errorf("it was asked about %d volumes, want 1", looks)
	}
}

// Another node may be deleting what was left behind a while ago, so a volume is made
// anew: when a call was cancelled before it could mark the volume, and when a late
// request of a dead node comes first.
func TestCreateAnew(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Delay: 100 * time.Millisecond})
	made := func(n int) (ids []string) {
		t.Helper()
		for bound := time.Now().Add(2 * time.Minute); len(ids) < n; time.Sleep(time.Millisecond) {
			if ids = s.Volumes(); time.Now().After(bound) {
				t.Fatalf("there are %q, want %d", ids, n)
			}
		}
		return ids
	}
	req := s.request()
	s.SetFaults(fault{Call: "metadata", Hang: true})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { _, err := s.a.Create(ctx, req); ended <- err }()
	left := made(2)
	for s.Calls()["POST volumes/*/metadata"] < 2 && t.Context().Err() == nil {
		time.Sleep(time.Millisecond)
	}
	cancel()
	want(t, <-ended, context.Canceled)
	s.SetFaults()
	vol, err := s.a.Create(t.Context(), req)
	if err != nil || slices.Contains(left, vol.Ref) {
		t.Errorf("got %v, %v; there were %q", vol, err, left)
	}

	req = s.request()
	var late []string
	go func() {
		var err error
		vol, err = s.b.Create(t.Context(), req)
		ended <- err
	}()
	made(3)
	s.Do(func(c *server) {
		for range 4 { // of which some have smaller ids
			late = append(late, c.Add(s.cluster, req.ID, false))
		}
	})
	if err := <-ended; err != nil || slices.Contains(late, vol.Ref) {
		t.Errorf("got %v, %v; late ones are %q", vol, err, late)
	}
}

// Many processes of many nodes make one volume, while answers are lost.
func TestCreateAtOnceWithLostAnswers(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Delay: 2 * time.Millisecond})
	for range 5 {
		req := s.request()
		s.SetFaults(fault{Call: "POST volumes", Times: 2, Drop: true}, fault{Call: "POST volumes", Times: 2, Half: true}, fault{Call: "metadata", Times: 2, Drop: true})
		vols, errs := make([]backends.Volume, 6), make([]error, 6)
		var wg sync.WaitGroup
		for i := range vols {
			b := s.backend(s.cluster, fmt.Sprintf("node-%d", i%4))
			wg.Go(func() {
				for range 20 { // as the driver does
					if vols[i], errs[i] = b.Create(t.Context(), req); errs[i] == nil {
						return
					}
				}
			})
		}
		wg.Wait()
		for i, vol := range vols {
			if errs[i] != nil || vol != vols[0] {
				t.Fatalf("got %v, %v; want %v", vol, errs[i], vols[0])
			}
		}
	}
}

func TestThrottling(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Burst: 5, Rate: 200})
	for token := range int64(5) {
		if err := s.a.Detach(t.Context(), s.mustAttach(s.a, token)); err != nil {
			t.Fatal(err)
		}
	}
	// As old ones say it.
	s.SetFaults(fault{Call: "os-volume_attachments", Times: 2, Status: 413, Text: "This request was rate-limited."})
	s.mustAttach(s.a, 10)
	s.SetFaults(fault{Status: 429, Text: "Too many requests"})
	_, err := s.a.Get(t.Context(), s.vol.Ref)
	want(t, err, backends.ErrUnavailable, "429", "it grants fewer calls; it is tried again")
}

func TestUnanswered(t *testing.T) {
	t.Parallel()
	for _, f := range []fault{{Drop: true}, {Half: true}, {Status: 500, Text: "Unexpected API Error."}, {Status: 503}, {Status: 504}} {
		for _, call := range []string{"GET volumes/*", "GET attachments", "POST volumes/*/metadata", "POST servers/*/os-volume_attachments"} {
			s := newStored(t, config{Delay: time.Millisecond})
			f.Call, f.Times = call, 1
			s.SetFaults(f)
			att := s.mustAttach(s.a, 10)
			if again := s.mustAttach(s.a, 10); again != att {
				t.Errorf("got %+v, then %+v", att, again)
			}
			s.wantAttached("in-use", s.server("node-a"))
		}
	}
}

// A lost answer of a detach is no success, although it was carried out: the call may
// come once more.
func TestDetachUnanswered(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	att := s.mustAttach(s.a, 10)
	s.SetFaults(fault{Call: "DELETE servers/*/os-volume_attachments", Drop: true})
	err := s.a.Detach(t.Context(), att)
	want(t, err, backends.ErrUnavailable, "Nova does not answer DELETE servers/")
	if calls := s.Calls(); calls["DELETE servers/*/os-volume_attachments/*"] != 1 {
		t.Errorf("it was sent %d times, want 1", calls["DELETE servers/*/os-volume_attachments/*"])
	}
	s.SetFaults()
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

func TestSilence(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	att := s.mustAttach(s.a, 10)
	if _, err := s.a.Attachments(t.Context()); err != nil { // a process asks once
		t.Fatal(err)
	}
	if _, err := s.b.Get(t.Context(), s.vol.Ref); err != nil { // it has logged in
		t.Fatal(err)
	}
	s.SetFaults(fault{Hang: true})
	bounded, cancel := context.WithCancel(t.Context())
	asked := s.Calls()["GET volumes/*"]
	go func() {
		defer cancel()
		for s.Calls()["GET volumes/*"] == asked && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
	}()
	_, err := s.b.Get(bounded, s.vol.Ref)
	want(t, err, backends.ErrUnavailable, "get volume: Cinder has not answered GET volumes/"+s.vol.Ref+" in time")
	// What is attached is known without OpenStack.
	before := s.Calls()
	if atts, err := s.a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("got %v, %v", atts, err)
	}
	if after := s.Calls(); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("Attachments has asked: %v, before %v", after, before)
	}
}

func TestNovaGivesUp(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Disks: 1})
	other := s.create(s.a)
	if _, err := s.a.Attach(t.Context(), backends.AttachRequest{Ref: other.Ref, Volume: other.ID, Token: 1}); err != nil {
		t.Fatal(err)
	}
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrUnavailable, "maximum allowed number of disk devices (1)", "has as many disks as it can: stop containers here")
	s.wantAttached("available")
	_, err = s.attach(s.again("node-b", func(cfg *openstack.Config) { cfg.ServerID = uuid.NewString() }), 10)
	want(t, err, backends.ErrUnavailable, "Nova has no server", "check server_id and the project")
	s.Do(func(c *server) { c.Host("compute-of-node-b", true, false) })
	_, err = s.attach(s.b, 10)
	want(t, err, backends.ErrUnavailable, "409", "Service is unavailable at this time")
}

func TestRefusedVolumes(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.Do(func(c *server) { c.Multi(s.vol.Ref) })
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrInvalid, "of a type with multiattach")
	other := s.create(s.a)
	s.vol = other
	for _, status := range []string{"error_extending", "maintenance"} {
		s.Do(func(c *server) { c.Status(other.Ref, status) })
		_, err = s.attach(s.a, 10)
		want(t, err, backends.ErrUnavailable, fmt.Sprintf("in Cinder's state %q", status), "openstack volume set --state")
	}
	s.Do(func(c *server) { c.Status(other.Ref, "available"); c.Snapshots(other.Ref, 1) })
	err = s.a.Delete(t.Context(), other.Ref)
	want(t, err, backends.ErrInUse, "have snapshots", "it may have snapshots")
	s.Do(func(c *server) { c.Remove(other.Ref) })
	_, err = s.attach(s.a, 10)
	want(t, err, backends.ErrNotFound, "Cinder has no volume "+other.Ref)
}

// Where the storage cannot grow an attached volume, Cinder leaves it in a state out of
// which only an administrator gets it.
func TestGrowAttached(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	att := s.mustAttach(s.a, 10)
	s.a = s.again("node-a", func(cfg *openstack.Config) { cfg.GrowAttached = false })
	_, err := s.a.Resize(t.Context(), s.vol.Ref, 2<<30)
	want(t, err, backends.ErrInUse, "grow volume", "grow_attached is not set", "NFS cannot")
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if size, err := s.a.Resize(t.Context(), s.vol.Ref, 2<<30); err != nil || size != 2<<30 {
		t.Errorf("got %d, %v", size, err)
	}
}

// The kernel shows a disk a moment before it can be opened.
func TestDeviceOpensLate(t *testing.T) {
	s := newStored(t, config{})
	var opens atomic.Int32
	s.a.SetOpens(func(path string) error {
		if opens.Add(1) < 4 {
			return &os.PathError{Op: "open", Path: path, Err: syscall.ENXIO}
		}
		return nil
	})
	s.mustAttach(s.a, 10)
	if n := opens.Load(); n != 4 {
		t.Errorf("it was opened %d times, want 4", n)
	}
}

func TestDevices(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	for _, bus := range []string{"sd", "nvme", "vd"} {
		s.mu.Lock()
		s.bus = bus
		s.mu.Unlock()
		att := s.mustAttach(s.a, 10)
		if !strings.HasPrefix(att.Device, "/dev/"+bus) {
			t.Errorf("got %s", att.Device)
		}
		if device, err := s.open("node-a", att.Device, false); err != nil {
			t.Error(err)
		} else {
			must(device.Close())
		}
		if atts, err := s.again("node-a", nil).Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
			t.Errorf("got %v, %v; want %v", atts, err, att)
		}
		if err := s.a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
	}
	node := s.server("node-a")
	s.mu.Lock()
	s.serial[node] = "1fae06f2-8dcc-4b5b-8"
	s.mu.Unlock()
	s.a.Shown(50 * time.Millisecond)
	_, err := s.attach(s.a, 20)
	want(t, err, backends.ErrUnavailable, "Nova says that volume "+s.vol.Ref+" is attached to this server", "no disk that says it is this one", "lsblk")
	// This process and a new one see it, without a device.
	var atts []backends.Attachment
	for _, b := range []*openstack.Nova{s.again("node-a", nil), s.a, s.a} {
		if atts, err = b.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0].Token != 20 || atts[0].Device != "" {
			t.Fatalf("got %+v, %v", atts, err)
		}
	}
	if err := s.a.Detach(t.Context(), atts[0]); err != nil {
		t.Fatal(err)
	}
	s.wantAttached("available")
	s.mu.Lock()
	clear(s.serial)
	s.mu.Unlock()
	// The node in /dev is another device's.
	s.a.SetNode("8:0")
	_, err = s.attach(s.a, 21)
	want(t, err, backends.ErrUnavailable, "is device 8:0, and the kernel's vd", "are not this kernel's")
}

func TestFenceStopsTheServer(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{Delay: 2 * time.Millisecond})
	s.mustAttach(s.a, 10)
	node := s.server("node-a")
	s.mu.Lock()
	s.holds[node] = true
	s.mu.Unlock()
	s.b.Grace(24 * time.Hour) // it is not waited for what Nova has given up
	evidence, err := s.fence(s.b, 10)
	if want := fmt.Sprintf("server %s is SHUTOFF, power state 4, and Cinder and Nova show volume %s detached from it", node, s.vol.Ref); err != nil || evidence != want {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if state := s.State(node); state != "SHUTOFF" {
		t.Errorf("the server is %s", state)
	}
	s.mustAttach(s.b, 11)
}

// A server that lets go is not stopped because Nova lets this host wait.
func TestFenceIsThrottled(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.mustAttach(s.a, 10)
	s.SetFaults(fault{Call: "DELETE servers/*/os-volume_attachments", Times: 4, Status: 429, Text: "Too many requests"})
	s.b.Grace(10 * time.Millisecond)
	node := s.server("node-a")
	evidence, err := s.fence(s.b, 10)
	if want := fmt.Sprintf("server %s has let go of volume %s, which Cinder and Nova show detached", node, s.vol.Ref); err != nil || evidence != want {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if state := s.State(node); state != "ACTIVE" {
		t.Errorf("the server is %s", state)
	}
}

func TestFenceMayNotStop(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.mustAttach(s.a, 10)
	node := s.server("node-a")
	s.mu.Lock()
	s.holds[node] = true
	s.mu.Unlock()
	b := s.again("node-b", func(cfg *openstack.Config) { cfg.KeepServers = true })
	b.Grace(50 * time.Millisecond)
	_, err := s.fence(b, 10)
	want(t, err, backends.ErrUnavailable, "has not let go of it yet", "it may still write, and keep_servers is set: stop server "+node+" by hand")
	s.b.Grace(50 * time.Millisecond)
	s.SetFaults(fault{Call: "POST servers/*/action", Status: 403, Text: "Policy doesn't allow os_compute_api:servers:stop to be performed."})
	_, err = s.fence(s.b, 10)
	want(t, err, backends.ErrUnavailable, "servers:stop", "the user of Flocker needs a role that may do this")
	s.SetFaults()
	s.Do(func(c *server) { c.Lock(node, true) })
	_, err = s.fence(s.b, 10)
	want(t, err, backends.ErrUnavailable, "is locked", "unlock it, or stop it by hand")
	s.Do(func(c *server) { c.Lock(node, false); c.Power(node, "PAUSED", 3) })
	_, err = s.fence(s.b, 10)
	want(t, err, backends.ErrUnavailable, "while it is in vm_state paused", "it is PAUSED: stop server "+node+" by hand")
	if _, err := s.attach(s.b, 11); !errors.Is(err, backends.ErrInUse) {
		t.Errorf("got %v", err)
	}
	for status := ""; status != "in-use"; status, _ = s.Attached(s.vol.Ref) { // Nova has given up
		time.Sleep(time.Millisecond)
	}
	s.Do(func(c *server) { c.Power(node, "SHUTOFF", 4) })
	evidence, err := s.fence(s.b, 10)
	if err != nil || !strings.Contains(evidence, "is SHUTOFF, power state 4") {
		t.Errorf("got %q, %v", evidence, err)
	}
	s.mustAttach(s.b, 11)
}

func TestFenceWithComputeHostDown(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.mustAttach(s.a, 10)
	node := s.server("node-a")
	s.Do(func(c *server) { c.Host("compute-of-node-a", true, false) })
	_, err := s.fence(s.b, 10)
	want(t, err, backends.ErrUnavailable, "Nova does not reach the compute host of server "+node, "nothing says that it does not write any more",
		"have an administrator evacuate or delete the server", "allow_admin_fence")
	_, err = s.fence(s.again("node-b", func(cfg *openstack.Config) { cfg.AllowAdminFence = true }), 10)
	want(t, err, backends.ErrUnavailable, "allow_admin_fence needs an administrator's credentials")
	admin := s.again("node-b", func(cfg *openstack.Config) { cfg.AllowAdminFence, cfg.Username = true, openstacktest.Admin })
	_, err = s.fence(admin, 10)
	want(t, err, backends.ErrUnavailable, "compute host compute-of-node-a is down for Nova, but was not forced down", "openstack compute service set --down compute-of-node-a nova-compute")
	s.wantAttached("in-use", node)
	s.Do(func(c *server) { c.Host("compute-of-node-a", true, true) })
	evidence, err := s.fence(admin, 10)
	if err != nil || !strings.Contains(evidence, "an administrator has forced compute host compute-of-node-a down") {
		t.Errorf("got %q, %v", evidence, err)
	}
	s.wantAttached("available")
	s.mustAttach(s.b, 11)
}

func TestFenceOfAForgottenServer(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	s.mustAttach(s.a, 10)
	node := s.server("node-a")
	s.Do(func(c *server) { c.Forget(node) })
	_, err := s.fence(s.b, 10)
	want(t, err, backends.ErrUnavailable, "Nova knows no server "+node+" any more", "openstack volume set --detached --state available")
	_, err = s.b.Fence(t.Context(), backends.FenceRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Node: "node-a", Token: 10})
	want(t, err, backends.ErrInvalid, `"" is no server of Nova's`)
}

func TestWhoAmI(t *testing.T) {
	t.Parallel()
	id, dmi := uuid.NewString(), t.TempDir()
	meta := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"uuid":%q,"name":"web-1"}`, id) }))
	defer meta.Close()
	broken := httptest.NewServer(http.NotFoundHandler())
	defer broken.Close()
	c := newCloud(t, config{})
	none := func(context.Context) ([]byte, error) { return nil, errors.New("there is none") }
	identity := func(metadata string, drive func(context.Context) ([]byte, error)) (string, error) {
		c.cfg = func(cfg *openstack.Config) { cfg.ServerID = "" }
		b := c.backend(uuid.NewString(), "node-a")
		b.Guest(metadata, dmi, drive)
		return b.Identity(t.Context())
	}
	if got, err := identity(meta.URL, none); err != nil || got != id {
		t.Errorf("metadata service: got %q, %v", got, err)
	}
	if got, err := identity(broken.URL, func(context.Context) ([]byte, error) { return []byte(`{"uuid":"` + id + `"}`), nil }); err != nil || got != id {
		t.Errorf("config drive: got %q, %v", got, err)
	}
	_, err := identity(broken.URL, none)
	want(t, err, backends.ErrUnavailable, "this host does not know which server of Nova's it is", "404 Not Found", "there is none", "set server_id")
	_, err = identity(meta.URL+"/%zz", none)
	want(t, err, backends.ErrUnavailable, "set server_id")
	firmware := uuid.NewString()
	must(os.WriteFile(filepath.Join(dmi, "product_uuid"), []byte(strings.ToUpper(firmware)+"\n"), 0o600))
	must(os.WriteFile(filepath.Join(dmi, "product_name"), []byte("Standard PC (Q35)\n"), 0o600))
	if got, err := identity(meta.URL, none); err != nil || got != id {
		t.Errorf("the firmware of another machine counts: got %q, %v", got, err)
	}
	must(os.WriteFile(filepath.Join(dmi, "product_name"), []byte("OpenStack Compute\n"), 0o600))
	if got, err := identity(broken.URL, none); err != nil || got != firmware {
		t.Errorf("firmware: got %q, %v", got, err)
	}
}

// Settings were copied to another host with its server_id in them. What is attached to
// that server is none of the other host's, which would pull it from its user.
func TestServerIDOfAnotherHost(t *testing.T) {
	t.Parallel()
	s := newStored(t, config{})
	att := s.mustAttach(s.a, 5)
	twin := s.again("node-b", func(cfg *openstack.Config) { cfg.ServerID = s.server("node-a") })
	for range 2 {
		atts, err := twin.Attachments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range atts { // as the driver does with what it does not know
			t.Errorf("node-b shows %+v as attached to it", other)
			if err := twin.Detach(t.Context(), other); err != nil {
				t.Log(err)
			}
		}
	}
	s.wantAttached("in-use", s.server("node-a"))
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}
