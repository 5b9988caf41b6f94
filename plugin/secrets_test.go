package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// The secrets of backends are in no answer to Docker, no log, no file but their own, and
// not in etcd; also if they are wrong, and a driver repeats them.
func TestSecretsStaySecret(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "root", "needs root")
	}
	t.Parallel()
	const right, wrong, cloud = "hunter2-of-the-driver", "letmein-of-the-driver", "hunter2-of-the-cloud"
	driver, socket := san(t, map[string]string{"password": right})
	if err := driver.Down(false); err != nil {
		t.Fatal(err)
	}
	dir, secrets, etcd := t.TempDir(), t.TempDir(), freeAddress(t)
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nova, rack := openstacktest.New(openstacktest.Config{}, nil), openstacktest.New(openstacktest.Config{Rackspace: true}, nil)
	defer nova.Close()
	defer rack.Close()
	login := filepath.Join(secrets, "login")
	write(login, openstacktest.Secret+"\n")
	password, credentials := filepath.Join(secrets, "password"), filepath.Join(secrets, "credentials")
	write(password, right+"\n")
	write(credentials, "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = "+cloud+"\naws_session_token = "+cloud+"-token\n")
	write(filepath.Join(dir, "backends.yaml"), fmt.Sprintf(`
san: {type: csi, endpoint: %q, fences: true, secret_files: {password: %q}}
aws: {type: ebs, region: eu-central-1, zone: eu-central-1a, instance_id: i-0123456789abcdef0, endpoint: "http://127.0.0.1:1", credentials_file: %q}
nova: {type: openstack, auth_url: %q, username: %q, user_domain: Default, password_file: %q, project_id: %q, server_id: %q}
app: {type: openstack, auth_url: %q, application_credential_id: %q, application_credential_secret_file: %q, server_id: %q}
rack: {type: openstack, auth: rackspace, auth_url: %q, region: %q, username: %q, api_key_file: %q, server_id: %q}
`, socket, password, credentials,
		nova.URL+"/v3", openstacktest.User, login, openstacktest.Project, nova.AddServer("compute"),
		nova.URL+"/v3", openstacktest.AppID, login, nova.AddServer("compute"),
		rack.URL+"/v2.0", openstacktest.RackspaceRegion, openstacktest.User, login, rack.AddServer("compute")))
	p := plugin(t.Context(), dir, "FLOCKER_ETCD_LISTEN="+etcd, "FLOCKER_LOG_LEVEL=debug").begin(t)

	seen := map[string]string{}
	say := func(path, body string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		answer, err := p.post(ctx, path, body)
		if err != nil {
			t.Fatal(err)
		}
		seen[path+" "+body] = answer
		return answer
	}
	p.says(t, 3*starting, "/VolumeDriver.Create", `{"Name":"db","Opts":{"size":"20M","backend":"san"}}`, "{}")
	if got := say("/VolumeDriver.Mount", `{"Name":"db","ID":"x"}`); !strings.Contains(got, "Mountpoint") {
		t.Fatal(got)
	}
	say("/VolumeDriver.Get", `{"Name":"db"}`)
	say("/VolumeDriver.List", "{}")
	say("/VolumeDriver.Create", `{"Name":"v","Opts":{"help":"","backend":"san"}}`)
	if got := say("/VolumeDriver.Create", `{"Name":"cloud","Opts":{"size":"1G","backend":"aws"}}`); !strings.Contains(got, "EC2 in eu-central-1") {
		t.Errorf("got %s", got)
	}
	for name, server := range map[string]*openstacktest.Server{"nova": nova, "app": nova, "rack": rack} {
		create := `{"Name":"of-` + name + `","Opts":{"size":"100G","backend":"` + name + `"}}`
		server.SetFaults(openstacktest.Fault{Call: "tokens", Status: 400, Text: "Invalid input for field 'secret': '" + openstacktest.Secret + "' is too short"})
		server.Expire()
		p.says(t, starting, "/VolumeDriver.Create", create, "'secret': '***' is too short")
		server.SetFaults()
		p.says(t, 3*starting, "/VolumeDriver.Create", create, "{}")
		say("/VolumeDriver.Get", `{"Name":"of-`+name+`"}`)
		server.Expire()
		p.await(t, time.Minute, "/VolumeDriver.Remove", `{"Name":"of-`+name+`"}`, "{}")
	}
	write(password, wrong)
	if got := say("/VolumeDriver.Create", `{"Name":"other","Opts":{"size":"20M","backend":"san"}}`); !strings.Contains(got, "***") {
		t.Errorf("got %s", got)
	}
	write(password, right)
	p.says(t, starting, "/VolumeDriver.Unmount", `{"Name":"db","ID":"x"}`, "{}")
	p.await(t, 30*time.Second, "/VolumeDriver.Remove", `{"Name":"db"}`, "{}")

	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + etcd}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	all, err := client.Get(t.Context(), "", clientv3.WithPrefix())
	if err != nil || len(all.Kvs) == 0 {
		t.Fatalf("etcd: %v, %v", all, err)
	}
	for _, kv := range all.Kvs {
		seen["etcd: "+string(kv.Key)] = string(kv.Value)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if all, _ := driver.Volumes(); all == 0 {
			break
		}
	}
	p.stop(t)
	seen["stdout"], seen["stderr"] = p.out.String(), p.errout.String()
	if !strings.Contains(seen["stdout"]+seen["stderr"], "debug") {
		t.Error("the log has no details")
	}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error { // etcd's files, too
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		seen[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range seen {
		for _, secret := range []string{right, wrong, cloud, openstacktest.Secret} {
			if strings.Contains(text, secret) {
				t.Errorf("%s is in %s", secret, where)
			}
		}
	}
}
