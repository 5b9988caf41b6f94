package openstack_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/openstack"
)

// full is real Keystone, Placement, Nova and Cinder. The hypervisor is Nova's imitation of one,
// whose servers have no kernel: what they would see is pretended from what Cinder says.
type full struct {
	*stack
	t        *testing.T
	keystone string // URL
	compute  string // URL of Nova
	admin    string // a token
	project  string // the hosts'
	cluster  string
	sys      string

	computeHost daemon
}

const (
	adminPassword = "of the administrator"
	userPassword  = "of Flocker's user"
)

func TestRealNova(t *testing.T) {
	f := &full{stack: newStack(t), t: t, cluster: uuid.NewString()}
	f.sys = f.mkdir("sys")
	f.startKeystone()
	f.startNova()
	servers := f.boot(2)
	ended := make(chan struct{})
	var pretending sync.WaitGroup
	pretending.Go(func() { f.pretend(servers, ended) })
	t.Cleanup(func() { close(ended); pretending.Wait() })

	a, b := f.node("node-a", servers[0], nil), f.node("node-b", servers[1], nil)
	vol := f.create(a)
	attach := func(b *openstack.Nova, token int64) (backends.Attachment, error) {
		return b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
	}
	mustAttach := func(b *openstack.Nova, token int64) backends.Attachment {
		t.Helper()
		att, err := attach(b, token)
		if err != nil {
			t.Fatal(err)
		}
		return att
	}

	t.Run("life of a volume", func(t *testing.T) {
		started := time.Now()
		att := mustAttach(a, 10)
		t.Logf("attach took %s", time.Since(started))
		if again := mustAttach(a, 10); again != att {
			t.Errorf("got %v, then %v", att, again)
		}
		if atts, err := f.node("node-a", servers[0], nil).Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
			t.Errorf("got %v, %v; want %v", atts, err, att)
		}
		_, err := attach(b, 11)
		holder, ok := errors.AsType[*backends.AttachedError](err)
		if !ok || holder.Node != "node-a" || holder.Token != 10 {
			t.Errorf("got %v", err)
		}
		want(t, a.Delete(t.Context(), vol.Ref), backends.ErrInUse, "attached to node-a")
		wrong := att
		wrong.Node = "node-b"
		if err := b.Detach(t.Context(), wrong); err != nil {
			t.Error(err)
		}
		started = time.Now()
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		t.Logf("detach took %s", time.Since(started))
		for range 2 {
			if err := a.Detach(t.Context(), att); err != nil {
				t.Error(err)
			}
		}
		if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 0 {
			t.Errorf("got %v, %v", atts, err)
		}
		if size, err := a.Resize(t.Context(), vol.Ref, 2<<30); err != nil || size != 2<<30 {
			t.Errorf("got %d, %v", size, err)
		}
	})

	t.Run("one of two wins", func(t *testing.T) {
		for round := range int64(5) {
			var atts [2]backends.Attachment
			var errs [2]error
			var wg sync.WaitGroup
			for i, b := range []*openstack.Nova{a, b} {
				wg.Go(func() { atts[i], errs[i] = attach(b, 20+2*round+int64(i)) })
			}
			wg.Wait()
			winner := 0
			if errs[0] != nil {
				winner = 1
			}
			if errs[winner] != nil || errs[1-winner] == nil {
				t.Fatalf("got %v and %v", errs[0], errs[1])
			}
			if _, ok := errors.AsType[*backends.AttachedError](errs[1-winner]); !ok {
				t.Errorf("the loser got %v", errs[1-winner])
			}
			if err := []*openstack.Nova{a, b}[winner].Detach(t.Context(), atts[winner]); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("many calls of one node", func(t *testing.T) {
		var wg sync.WaitGroup
		var errs [8]error
		for i := range errs {
			wg.Go(func() { _, errs[i] = attach(a, 40) })
		}
		wg.Wait()
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
		if err := b.Detach(t.Context(), mustAttach(a, 40)); err != nil { // as from a dead node
			t.Error(err)
		}
	})

	request := func(token int64) backends.FenceRequest {
		return backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "node-a", Identity: servers[0], Token: token}
	}
	t.Run("fence", func(t *testing.T) {
		mustAttach(a, 50)
		for _, token := range []int64{49, 50, 50} {
			evidence, err := b.Fence(t.Context(), request(token))
			t.Logf("token %d: %s, %v", token, evidence, err)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := attach(b, 51); (err == nil) != (token == 50) {
				t.Errorf("after the fence of token %d: %v", token, err)
			}
		}
		if err := b.Detach(t.Context(), mustAttach(b, 51)); err != nil {
			t.Error(err)
		}
	})

	t.Run("fence of a server that is off", func(t *testing.T) {
		mustAttach(a, 60)
		f.must(f.authenticate("flocker", userPassword, "shop"), http.MethodPost, f.compute+"/servers/"+servers[0]+"/action", map[string]any{"os-stop": nil}, nil)
		f.awaitStatus(servers[0], "SHUTOFF")
		evidence, err := b.Fence(t.Context(), request(60))
		if err != nil || !strings.Contains(evidence, "is SHUTOFF, power state 4") {
			t.Errorf("got %q, %v", evidence, err)
		}
		if err := b.Detach(t.Context(), mustAttach(b, 61)); err != nil {
			t.Error(err)
		}
		f.must(f.admin, http.MethodPost, f.compute+"/servers/"+servers[0]+"/action", map[string]any{"os-start": nil}, nil)
		f.awaitStatus(servers[0], "ACTIVE")
	})

	// The compute host is too slow to take the disk away within the grace.
	t.Run("fence stops the server", func(t *testing.T) {
		mustAttach(a, 65)
		f.computeHost.pause(true)
		impatient := f.node("node-b", servers[1], nil)
		impatient.Grace(2 * time.Second)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for bound := time.Now().Add(10 * time.Minute); f.task(servers[0]) != "powering-off" && time.Now().Before(bound); {
				time.Sleep(200 * time.Millisecond)
			}
			f.computeHost.pause(false)
		}()
		evidence, err := impatient.Fence(t.Context(), request(65))
		<-ended
		if err != nil || !strings.Contains(evidence, "is SHUTOFF, power state 4") {
			t.Errorf("got %q, %v", evidence, err)
		}
		if err := b.Detach(t.Context(), mustAttach(b, 66)); err != nil {
			t.Error(err)
		}
		f.must(f.admin, http.MethodPost, f.compute+"/servers/"+servers[0]+"/action", map[string]any{"os-start": nil}, nil)
		f.awaitStatus(servers[0], "ACTIVE")
	})

	t.Run("fence with the compute host down", func(t *testing.T) {
		mustAttach(a, 70)
		f.computeHost.stop()
		f.await("Nova sees that its compute host is down", 10*time.Minute, func() bool { return f.service() == "down" })
		_, err := b.Fence(t.Context(), request(70))
		want(t, err, backends.ErrUnavailable, "Nova does not reach the compute host of server "+servers[0], "allow_admin_fence")
		admin := f.node("node-b", servers[1], func(cfg *openstack.Config) {
			cfg.Username, cfg.AllowAdminFence = "admin", true
			cfg.PasswordFile = f.file("admin-secret", adminPassword, 0o600)
		})
		_, err = admin.Fence(t.Context(), request(70))
		want(t, err, backends.ErrUnavailable, "compute host node1 is down for Nova, but was not forced down", "openstack compute service set --down node1 nova-compute")
		f.must(f.admin, http.MethodPut, f.compute+"/os-services/"+f.serviceID(), map[string]any{"forced_down": true}, nil)
		evidence, err := admin.Fence(t.Context(), request(70))
		t.Logf("%s, %v", evidence, err)
		if err != nil || !strings.Contains(evidence, "an administrator has forced compute host node1 down in Nova") {
			t.Errorf("got %q, %v", evidence, err)
		}
		if err := b.Delete(t.Context(), vol.Ref); err != nil {
			t.Error(err)
		}
	})
}

// node returns the backend of a server, which is an ordinary user of its project.
func (f *full) node(node, server string, change func(*openstack.Config)) *openstack.Nova {
	cfg := openstack.Config{
		AuthURL: f.keystone, Username: "flocker", UserDomain: "Default", PasswordFile: f.file("secret", userPassword, 0o600),
		ProjectName: "shop", ProjectDomain: "Default", Region: "RegionOne", ServerID: server,
	}
	if change != nil {
		change(&cfg)
	}
	made, err := openstack.New(cfg, openstack.Self{Node: node, Cluster: f.cluster})
	if err != nil {
		f.t.Fatal(err)
	}
	openstack.Patient(made)
	b := made.(*openstack.Nova)
	b.Kernel(filepath.Join(f.sys, server), func(string) error { return nil })
	return b
}

func (f *full) create(b backends.Backend) backends.Volume {
	f.t.Helper()
	var vol backends.Volume
	f.await("the volume", 10*time.Minute, func() bool {
		var err error
		if vol, err = b.Create(f.t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: f.cluster, Size: 1 << 30}); err != nil {
			f.t.Log(err)
		}
		return err == nil
	})
	return vol
}

// pretend shows servers the disks that Cinder says they have.
func (f *full) pretend(servers []string, ended <-chan struct{}) {
	for _, server := range servers {
		must(os.MkdirAll(filepath.Join(f.sys, server, "block"), 0o755))
	}
	for count := 0; ; {
		for _, server := range servers {
			var got struct {
				Attachments []struct {
					Status, Instance string
					Volume           string `json:"volume_id"`
				}
			}
			status, _, _ := f.call(f.admin, http.MethodGet, f.cinder+"/"+f.project+"/attachments?all_tenants=1", nil, &got)
			if status != http.StatusOK {
				continue
			}
			shown := map[string]string{}
			dirs, err := filepath.Glob(filepath.Join(f.sys, server, "block", "*"))
			must(err)
			for _, dir := range dirs {
				serial, err := os.ReadFile(filepath.Join(dir, "serial"))
				must(err)
				shown[string(serial)] = dir
			}
			for _, on := range got.Attachments {
				if on.Instance != server || on.Status != "attached" {
					continue
				}
				serial := on.Volume[:20]
				if shown[serial] != "" {
					delete(shown, serial)
					continue
				}
				count++
				name := fmt.Sprintf("vd%c%c", 'a'+count/26%26, 'a'+count%26)
				made := filepath.Join(f.sys, name)
				must(os.MkdirAll(made, 0o755))
				must(os.WriteFile(filepath.Join(made, "serial"), []byte(serial), 0o644))
				must(os.WriteFile(filepath.Join(made, "dev"), fmt.Appendf(nil, "252:%d", count), 0o644))
				must(os.Rename(made, filepath.Join(f.sys, server, "block", name)))
			}
			for _, dir := range shown { // gone
				must(os.Rename(dir, filepath.Join(f.sys, "gone")))
				must(os.RemoveAll(filepath.Join(f.sys, "gone")))
			}
		}
		select {
		case <-ended:
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// auth is how a service logs in.
func (f *full) auth(section string) string {
	return fmt.Sprintf(`[%s]
auth_type = password
auth_url = %s
www_authenticate_uri = %s
project_name = service
project_domain_name = Default
user_domain_name = Default
username = svc
password = svc
region_name = RegionOne
service_token_roles = service
service_token_roles_required = true
send_service_user_token = true
`, section, f.keystone, f.keystone)
}

func readFile(path string) string {
	text, err := os.ReadFile(path)
	must(err)
	return string(text)
}

func (f *full) startKeystone() {
	f.t.Helper()
	port := freePort(f.t)
	f.keystone = fmt.Sprintf("http://127.0.0.1:%d/v3", port)
	f.mkdir("fernet")
	f.mkdir("credential")
	conf := f.file("keystone.conf", fmt.Sprintf(`[DEFAULT]
[database]
connection = %s
[token]
provider = fernet
[fernet_tokens]
key_repository = %s/
[credential]
key_repository = %s/
`, f.database("keystone"), f.path("fernet"), f.path("credential")), 0o644)
	manage := func(args ...string) {
		f.t.Helper()
		f.run(nil, "keystone-manage", append([]string{"--config-file", conf}, args...)...)
	}
	manage("db_sync")
	manage("fernet_setup", "--keystone-user", "root", "--keystone-group", "root")
	manage("credential_setup", "--keystone-user", "root", "--keystone-group", "root")
	manage("bootstrap", "--bootstrap-password", adminPassword, "--bootstrap-public-url", f.keystone, "--bootstrap-internal-url", f.keystone,
		"--bootstrap-admin-url", f.keystone, "--bootstrap-region-id", "RegionOne")
	f.daemon("keystone", []string{"OS_KEYSTONE_CONFIG_FILES=" + conf}, "keystone-wsgi-public", "--host", "127.0.0.1", "--port", fmt.Sprint(port))
	f.await("Keystone", 10*time.Minute, f.listens(port))
	f.admin = f.authenticate("admin", adminPassword, "admin")
	domain := "default"
	project := func(name string) string {
		var got struct{ Project struct{ ID string } }
		f.must(f.admin, http.MethodPost, f.keystone+"/projects", map[string]any{"project": map[string]any{"name": name, "domain_id": domain}}, &got)
		return got.Project.ID
	}
	user := func(name, password string, project string, roles ...string) {
		var got struct{ User struct{ ID string } }
		f.must(f.admin, http.MethodPost, f.keystone+"/users", map[string]any{"user": map[string]any{"name": name, "password": password, "domain_id": domain}}, &got)
		for _, role := range roles {
			f.must(f.admin, http.MethodPut, f.keystone+"/projects/"+project+"/users/"+got.User.ID+"/roles/"+f.role(role), nil, nil)
		}
	}
	f.project = project("shop")
	service := project("service")
	user("svc", "svc", service, "admin", "service")
	user("flocker", userPassword, f.project, "member")
	// Cinder's URLs name the project that a token has to be of.
	f.must(f.admin, http.MethodPut, f.keystone+"/projects/"+f.project+"/users/"+f.user("admin")+"/roles/"+f.role("admin"), nil, nil)
	f.admin = f.authenticate("admin", adminPassword, "shop")
}

// role returns a role's id, and makes it if need be.
func (f *full) role(name string) string {
	f.t.Helper()
	var all struct{ Roles []struct{ ID string } }
	f.must(f.admin, http.MethodGet, f.keystone+"/roles?name="+name, nil, &all)
	if len(all.Roles) > 0 {
		return all.Roles[0].ID
	}
	var made struct{ Role struct{ ID string } }
	f.must(f.admin, http.MethodPost, f.keystone+"/roles", map[string]any{"role": map[string]any{"name": name}}, &made)
	return made.Role.ID
}

func (f *full) user(name string) string {
	f.t.Helper()
	var all struct{ Users []struct{ ID string } }
	f.must(f.admin, http.MethodGet, f.keystone+"/users?name="+name, nil, &all)
	return all.Users[0].ID
}

// authenticate returns a token.
func (f *full) authenticate(user, password, project string) string {
	f.t.Helper()
	domain := map[string]any{"id": "default"}
	status, header, text := f.call("", http.MethodPost, f.keystone+"/auth/tokens", map[string]any{"auth": map[string]any{
		"identity": map[string]any{"methods": []string{"password"}, "password": map[string]any{"user": map[string]any{"name": user, "password": password, "domain": domain}}},
		"scope":    map[string]any{"project": map[string]any{"name": project, "domain": domain}},
	}}, nil)
	if status != http.StatusCreated {
		f.t.Fatalf("log in as %s: %d: %s", user, status, text)
	}
	return header.Get("X-Subject-Token")
}

// catalog names a service in Keystone.
func (f *full) catalog(kind, url string) {
	f.t.Helper()
	var got struct{ Service struct{ ID string } }
	f.must(f.admin, http.MethodPost, f.keystone+"/services", map[string]any{"service": map[string]any{"type": kind, "name": kind}}, &got)
	for _, face := range []string{"public", "internal", "admin"} {
		f.must(f.admin, http.MethodPost, f.keystone+"/endpoints", map[string]any{"endpoint": map[string]any{
			"service_id": got.Service.ID, "interface": face, "url": url, "region_id": "RegionOne",
		}}, nil)
	}
}

func (f *full) startNova() {
	f.t.Helper()
	export := f.mkdir("export")
	f.startCinder(f.onNFS(export), "auth_strategy = keystone\n[database]\nconnection = "+f.database("cinder")+"\n"+
		f.auth("keystone_authtoken")+f.auth("nova")+"interface = public\n"+f.auth("service_user"))
	f.catalog("volumev3", f.cinder+"/%(project_id)s")

	place := freePort(f.t)
	f.mkdir("placement")
	f.file("placement/placement.conf", "[DEFAULT]\n[api]\nauth_strategy = keystone\n[placement_database]\nconnection = "+f.database("placement")+"\n"+
		f.auth("keystone_authtoken"), 0o644)
	f.run(nil, "placement-manage", "--config-file", f.path("placement/placement.conf"), "db", "sync")
	f.daemon("placement", []string{"OS_PLACEMENT_CONFIG_DIR=" + f.path("placement")}, "placement-api", "--host", "127.0.0.1", "--port", fmt.Sprint(place))
	f.await("Placement", 10*time.Minute, f.listens(place))
	f.catalog("placement", fmt.Sprintf("http://127.0.0.1:%d", place))

	// Nova asks Neutron when it shows a server.
	neutron := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"ports":[],"security_groups":[],"networks":[],"extensions":[],"floatingips":[],"quota":{"port":-1,"security_group":-1},"versions":[{"id":"v2.0","status":"CURRENT"}]}`))
	}))
	f.t.Cleanup(neutron.Close)
	f.catalog("network", neutron.URL)

	port := freePort(f.t)
	f.mkdir("nova")
	cell := f.database("nova")
	cell0 := f.database("nova_cell0")
	conf := f.file("nova.conf", fmt.Sprintf(`[DEFAULT]
my_ip = 127.0.0.1
host = node1
state_path = %s
transport_url = %s
compute_driver = fake.FakeDriver
osapi_compute_listen = 127.0.0.1
osapi_compute_listen_port = %d
osapi_compute_workers = 1
enabled_apis = osapi_compute
block_device_allocate_retries = 30
service_down_time = 60
report_interval = 5
[api]
auth_strategy = keystone
[api_database]
connection = %s
[database]
connection = %s
[conductor]
workers = 1
[scheduler]
workers = 1
discover_hosts_in_cells_interval = 5
[oslo_concurrency]
lock_path = %s/lock
[vnc]
enabled = false
[glance]
api_servers = http://127.0.0.1:1
%s%s%s%s%s
`, f.mkdir("nova"), f.rabbit, port, f.database("nova_api"), cell, f.path("nova"),
		f.auth("keystone_authtoken"), f.auth("service_user"), f.auth("placement"), f.auth("neutron"),
		f.auth("cinder")+"os_region_name = RegionOne\ncatalog_info = volumev3::publicURL\n"), 0o644)
	manage := func(args ...string) {
		f.t.Helper()
		f.run(nil, "nova-manage", append([]string{"--config-file", conf}, args...)...)
	}
	manage("api_db", "sync")
	manage("cell_v2", "map_cell0", "--database_connection", cell0)
	manage("cell_v2", "create_cell", "--name=cell1", "--transport-url", f.rabbit, "--database_connection", cell)
	manage("db", "sync")
	f.daemon("nova-conductor", nil, "nova-conductor", "--config-file", conf)
	f.daemon("nova-scheduler", nil, "nova-scheduler", "--config-file", conf)
	f.computeHost = f.daemon("nova-compute", nil, "nova-compute", "--config-file", conf)
	f.daemon("nova-api", nil, "nova-api", "--config-file", conf)
	f.await("Nova", 10*time.Minute, f.listens(port))
	f.compute = fmt.Sprintf("http://127.0.0.1:%d/v2.1", port)
	f.catalog("compute", f.compute)
	f.awaitCinder(f.admin, f.project)
	f.await("Nova's compute host", 10*time.Minute, func() bool { return f.service() == "up" })
	manage("cell_v2", "discover_hosts")
}

// service returns the state of the compute host.
func (f *full) service() string {
	state, _ := f.computeService()
	return state
}

func (f *full) serviceID() string {
	_, id := f.computeService()
	return id
}

func (f *full) computeService() (state, id string) {
	var got struct{ Services []struct{ ID, State string } }
	f.call(f.admin, http.MethodGet, f.compute+"/os-services?binary=nova-compute", nil, &got)
	if len(got.Services) == 0 {
		return "", ""
	}
	return got.Services[0].State, got.Services[0].ID
}

// task is what a server is about to do.
func (f *full) task(server string) string {
	var got struct {
		Server struct {
			Task string `json:"OS-EXT-STS:task_state"`
		}
	}
	f.call(f.admin, http.MethodGet, f.compute+"/servers/"+server, nil, &got)
	return got.Server.Task
}

func (f *full) awaitStatus(server, status string) {
	f.t.Helper()
	f.await("server "+server+" is "+status, 10*time.Minute, func() bool {
		var got struct {
			Server struct {
				Status string
				Fault  any
			}
		}
		f.call(f.admin, http.MethodGet, f.compute+"/servers/"+server, nil, &got)
		if got.Server.Status == "ERROR" {
			f.t.Fatalf("server %s has failed: %v", server, got.Server.Fault)
		}
		return got.Server.Status == status
	})
}

// boot makes servers, from volumes.
func (f *full) boot(count int) (servers []string) {
	f.t.Helper()
	f.must(f.admin, http.MethodPost, f.compute+"/flavors", map[string]any{"flavor": map[string]any{
		"id": "1", "name": "small", "ram": 64, "vcpus": 1, "disk": 1,
	}}, nil)
	user := f.authenticate("flocker", userPassword, "shop")
	volumes := f.cinder + "/" + f.project + "/volumes"
	for i := range count {
		var root struct{ Volume struct{ ID string } }
		f.must(user, http.MethodPost, volumes, map[string]any{"volume": map[string]any{"name": "root", "size": 1}}, &root)
		f.await("the root disk", 10*time.Minute, func() bool {
			var got struct{ Volume struct{ Status string } }
			f.must(user, http.MethodGet, volumes+"/"+root.Volume.ID, nil, &got)
			if got.Volume.Status == "error" { // the scheduler has not heard of the storage yet
				f.must(user, http.MethodPost, volumes, map[string]any{"volume": map[string]any{"name": "root", "size": 1}}, &root)
			}
			return got.Volume.Status == "available"
		})
		f.must(user, http.MethodPost, volumes+"/"+root.Volume.ID+"/action", map[string]any{"os-set_bootable": map[string]any{"bootable": true}}, nil)
		var server struct{ Server struct{ ID string } }
		f.must(user, http.MethodPost, f.compute+"/servers", map[string]any{"server": map[string]any{
			"name": fmt.Sprintf("host-%d", i), "flavorRef": "1", "networks": "none", "block_device_mapping_v2": []any{map[string]any{
				"boot_index": 0, "source_type": "volume", "destination_type": "volume", "uuid": root.Volume.ID,
			}},
		}}, &server)
		f.awaitStatus(server.Server.ID, "ACTIVE")
		servers = append(servers, server.Server.ID)
	}
	return servers
}
