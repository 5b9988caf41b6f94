package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/csi/csitest"
	"github.com/flocker-plugin/flocker/control/api"
)

// san starts a CSI driver that can cut hosts off, with real devices, and its socket. It
// demands secrets, if there are any. At the end of the test nothing of it may be left.
func san(t testing.TB, secrets map[string]string) (driver *csitest.Driver, socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "san") //nolint:usetesting // short: the path of a socket may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	driver = csitest.New(dir, csitest.Options{Publish: true, Cuts: true, Stage: true, Shown: true, GetVolume: true, ListVolumes: true, Secrets: secrets})
	t.Cleanup(func() {
		if all, used := driver.Volumes(); !t.Failed() && all > 0 {
			t.Errorf("left at the storage: %d volumes, %d in use", all, used)
		}
		for _, violation := range driver.Violations() {
			t.Errorf("against the CSI specification: %s", violation)
		}
		if err := driver.Close(); err != nil {
			t.Errorf("close the storage: %v", err)
		}
		if err := exec.Command("rm", "-r", "--one-file-system", dir).Run(); err != nil {
			t.Errorf("left behind: %v", err)
		}
	})
	if err := driver.Down(true); err != nil { // to begin with
		t.Fatal(err)
	}
	socket, err = driver.Node("a")
	if err != nil {
		t.Fatal(err)
	}
	return driver, socket
}

// says calls until the answer has some words in it, for limit at most; 0 is once.
func (p *process) says(t testing.TB, limit time.Duration, path, body string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), max(limit, createDeadline))
	defer cancel()
	for end := time.Now().Add(limit); ; {
		got, err := p.post(ctx, path, body)
		if err == nil && !slices.ContainsFunc(want, func(word string) bool { return !strings.Contains(got, word) }) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s %s: got %s, %v, want %q", path, body, got, err, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// mounts has a volume mounted and unmounted.
func (p *process) mounts(t testing.TB, limit time.Duration, name string) {
	t.Helper()
	body := `{"Name":"` + name + `","ID":"x"}`
	p.says(t, limit, "/VolumeDriver.Mount", body, `{"Mountpoint":"`)
	p.await(t, limit, "/VolumeDriver.Unmount", body, `{}`)
}

// A storage that is away, or whose settings are wrong, is nobody's business who uses
// another one; and it is used as soon as it is there.
func TestBackendDown(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "root", "needs root")
	}
	driver, socket := san(t, nil)
	dir, etcd := t.TempDir(), "FLOCKER_ETCD_LISTEN="+freeAddress(t)
	credentials := filepath.Join(dir, "credentials")
	for file, text := range map[string]string{
		credentials: "[default]\naws_access_key_id = x\naws_secret_access_key = y\n",
		filepath.Join(dir, "backends.yaml"): `
san: {type: csi, endpoint: "` + socket + `", fences: true, profiles: {fast: {}, slow: {}}}
aws:
  type: ebs
  region: eu-central-1
  zone: eu-central-1a
  instance_id: i-0123456789abcdef0
  endpoint: http://127.0.0.1:1
  credentials_file: ` + credentials + "\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	create := func(name, backend string) string {
		return fmt.Sprintf(`{"Name":%q,"Opts":{"size":"20M","backend":%q}}`, name, backend)
	}
	p := plugin(t.Context(), dir, etcd).begin(t)
	p.await(t, 3*starting, "/VolumeDriver.Create", `{"Name":"plain","Opts":{"size":"20M"}}`, `{}`)
	p.mounts(t, starting, "plain")

	// What is down says so.
	const away = "the CSI driver's socket"
	p.says(t, 0, "/VolumeDriver.Create", create("db", "san"), `{"Err":"create volume db: Probe: `+away, "is the driver running on this host?")
	p.says(t, 0, "/VolumeDriver.Create", create("db", "gold"), `there is no backend \"gold\"`, "backends here: aws, loopback, san")
	p.says(t, 0, "/VolumeDriver.Create", `{"Name":"v","Opts":{"help":"","backend":"san"}}`,
		`BACKEND   TYPE      CLASS  PROFILES              OPTIONS OF ITS OWN`, `aws       ebs       F1     bronze, gold, silver  volume_type, iops, throughput`,
		`loopback  loopback  F0     -                     preallocate`, `san       csi       F1     fast, slow            -`, "the options above are those of backend san")
	p.mounts(t, starting, "plain")

	// It comes back by itself.
	if err := driver.Down(false); err != nil {
		t.Fatal(err)
	}
	p.says(t, starting, "/VolumeDriver.Create", create("db", "san"), "{}")
	p.mounts(t, starting, "db")
	control := &api.Client{Socket: filepath.Join(dir, "control.sock")}
	all, err := control.Backends(t.Context())
	if err != nil || len(all) != 3 || all[0].Name != "aws" || !strings.Contains(all[0].Error, "list volumes: EC2 in eu-central-1 has not answered DescribeVolumes in time") ||
		!all[1].Default || all[1].Error != "" || all[2].Type != "csi" || all[2].Error != "" {
		t.Errorf("backends are %+v, %v", all, err)
	}

	// It goes away under a volume that is mounted, and a new process comes.
	p.says(t, starting, "/VolumeDriver.Mount", `{"Name":"db","ID":"y"}`, `{"Mountpoint":"`)
	if err := driver.Down(true); err != nil {
		t.Fatal(err)
	}
	p.mounts(t, starting, "plain")
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	p = plugin(t.Context(), dir, etcd).begin(t)
	p.mounts(t, 3*starting, "plain")
	p.says(t, starting, "/VolumeDriver.Get", `{"Name":"db"}`, `"backend":"san"`, `"state":"mounted"`)
	p.says(t, 0, "/VolumeDriver.Mount", `{"Name":"db","ID":"z"}`, `{"Mountpoint":"`) // it is mounted
	for _, id := range []string{"y", "z"} {
		p.await(t, starting, "/VolumeDriver.Unmount", `{"Name":"db","ID":"`+id+`"}`, `{}`)
	}
	if err := driver.Down(false); err != nil {
		t.Fatal(err)
	}
	p.mounts(t, 30*time.Second, "db")
	for _, name := range []string{"db", "plain"} { // and nothing is left behind
		p.await(t, 30*time.Second, "/VolumeDriver.Remove", `{"Name":"`+name+`"}`, `{}`)
	}

	// A secret that everybody can read.
	if err := os.Chmod(credentials, 0o644); err != nil { //nolint:gosec // that is the point
		t.Fatal(err)
	}
	p.says(t, 0, "/VolumeDriver.Create", `{"Name":"cloud","Opts":{"backend":"aws"}}`, "backend aws: credentials_file of "+dir+"/backends.yaml: "+credentials+" can be used by every user")
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if all, used := driver.Volumes(); all == 0 && used == 0 || time.Now().After(end) {
			break
		}
	}
	p.stop(t)
}

// The file can be tried before a process is started with it, which refuses a wrong one.
func TestBackendsCommand(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "b.yaml")
	for text, want := range map[string]string{
		"aws: {type: ebs}\n":                                 "loopback\naws (ebs)\n",
		"aws: {type: ebs, x: 1}":                             "flocker-plugin: " + file + ", line 1: backend aws: unknown key x; valid: ",
		"aws: {type: ebs, credentials_file: " + dir + "/no}": "loopback\naws (ebs)\nflocker-plugin: backend aws: credentials_file of " + file + ": there is no file " + dir + "/no: make it, readable for root alone\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "backends")
		cmd.Env = []string{"RUN_PLUGIN=1", "FLOCKER_BACKENDS=" + file, "FLOCKER_STATE_DIR=" + dir}
		got, err := cmd.CombinedOutput()
		if !strings.HasPrefix(string(got), want) || (err == nil) != !strings.Contains(want, "flocker-plugin:") {
			t.Errorf("%s: got %s, %v, want %s", text, got, err, want)
		}
	}
	p := plugin(t.Context(), dir, "FLOCKER_BACKENDS="+file)
	if err := os.WriteFile(file, []byte("a: {type: tape}"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.begin(t)
	err := <-p.ended
	want := "flocker-plugin: " + file + `, line 1: backend a: unknown type "tape"; use csi, ebs, loopback, openstack, rbd, share` + "\n"
	if err == nil || err.Error() != "exit status 1" || p.errout.String() != want {
		t.Errorf("got %v and %s, want exit status 1 and %s", err, p.errout.String(), want)
	}
}
