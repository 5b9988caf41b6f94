package main

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

var update = flag.Bool("update", false, "write the settings to config.json and README.md")

func TestSettingsDefaults(t *testing.T) {
	got, warnings, err := settingsFrom([]string{"PATH=/bin", "FLOCKER_HOSTNAME=a", "FLOCKER_LINGER=", "FLOCKER_ETCD_DIR="})
	if err != nil || len(warnings) > 0 {
		t.Fatalf("got %v, %v", err, warnings)
	}
	want := settings{
		Socket: "/run/docker/plugins/flocker.sock", StateDir: "/var/lib/flocker", MountRoot: "/flocker/mnt",
		Hostname: "a", LogLevel: "info", EtcdPrefix: "flocker", EtcdDir: "/var/lib/flocker/etcd",
		Backend: "loopback", LoopbackDir: "/var/lib/flocker/loopback",
		DefaultSize: 10 * backends.GiB, DefaultFS: "ext4",
		NodeTTL: 10 * time.Second, NodeRenew: 2500 * time.Millisecond, Linger: 5 * time.Second,
		BusyWait: 30 * time.Second, MountDeadline: 100 * time.Second, Hold: 3 * time.Second, Reconcile: 30 * time.Second,
		APIListen: ":4523", DockerSocket: "/host/run/docker.sock",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
	if got, _, err = settingsFrom(nil); err != nil || got.Hostname == "" {
		t.Errorf("hostname: got %q, %v, want the system's", got.Hostname, err)
	}
}

func TestSettings(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	loose := filepath.Join(t.TempDir(), "loose")
	if err := os.WriteFile(loose, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	const private = " can be read by others than its owner (mode 0644): if nobody has, type: chmod 0600 "
	dir, absent := t.TempDir(), filepath.Join(t.TempDir(), "absent")
	if err := os.WriteFile(filepath.Join(dir, "cluster.crt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(address string) string {
		return "without certificates, whoever reaches " + address + " could change who has which volume: make them with docker flocker ca, " +
			"and put this host's into /var/lib/flocker/certs; or set FLOCKER_ETCD_INSECURE=true, if nobody else is on that network"
	}
	tests := []struct {
		env, want string // want "" is no error
	}{
		{"FLOCKER_API_LISTEN=10.0.0.1:443", ""},
		{"FLOCKER_API_LISTEN=off", ""},
		{"FLOCKER_API_LISTEN=4523", `setting FLOCKER_API_LISTEN: "4523" is not an address with a port, such as :4523 or 10.0.0.1:4523, nor off`},
		{"FLOCKER_BUSY_WAIT=0s", ""},
		{"FLOCKER_BUSY_WAIT=100s", ""},
		{"FLOCKER_LINGER=0s", ""},
		{"FLOCKER_ETCD_ENDPOINTS=http://a:2379,https://[::1]:2379, c:2379", ""},
		{"FLOCKER_ETCD_ENDPOINTS=https://a:2379/ FLOCKER_ETCD_CACERT=" + secret, ""},
		{"FLOCKER_ETCD_CERT=" + secret + " FLOCKER_ETCD_KEY=" + secret, ""},
		{"FLOCKER_ETCD_USER=u FLOCKER_ETCD_PASSWORD_FILE=" + secret, ""},
		{"FLOCKER_ETCD_LISTEN=10.0.0.1:2379 FLOCKER_ETCD_INSECURE=true", ""},
		{"FLOCKER_ETCD_LISTEN=10.0.0.1:2379 FLOCKER_CERTS=" + dir, ""},
		{"FLOCKER_ETCD_LISTEN=127.0.0.1:2379", ""},
		{"FLOCKER_ETCD_LISTEN=[::1]:2379", ""},
		{"FLOCKER_ETCD_LISTEN=localhost:2379", ""},

		{"FLOCKER_ADDRESS=alpha", `setting FLOCKER_ADDRESS: "alpha" is not an IP address`},
		{"FLOCKER_SOCKET=flocker.sock", `setting FLOCKER_SOCKET: "flocker.sock" is not an absolute path`},
		{"FLOCKER_MOUNT_ROOT=/..", `setting FLOCKER_MOUNT_ROOT: it cannot be /`},
		{"FLOCKER_LINGER=5", `setting FLOCKER_LINGER: "5" is not valid; use a time such as 500ms, 10s or 5m`},
		{"FLOCKER_DEFAULT_SIZE=10", `setting FLOCKER_DEFAULT_SIZE: "10" has no unit; 10 means 10 bytes; write 10G`},
		{"FLOCKER_DEFAULT_FS=zfs", `setting FLOCKER_DEFAULT_FS: "zfs" is not valid; use ext4, xfs or btrfs`},
		{"FLOCKER_LOG_LEVEL=loud", `setting FLOCKER_LOG_LEVEL: "loud" is not valid; use debug, info, warn or error`},
		{"FLOCKER_LOOPBACK_PREALLOCATE=perhaps", `setting FLOCKER_LOOPBACK_PREALLOCATE: "perhaps" is not valid; use true or false`},
		{"FLOCKER_NODE_TTL=3s FLOCKER_NODE_RENEW=1s", `setting FLOCKER_NODE_RENEW: 1s is not less than a third of FLOCKER_NODE_TTL, 3s`},
		{"FLOCKER_BUSY_WAIT=101s FLOCKER_MOUNT_DEADLINE=110s", `setting FLOCKER_BUSY_WAIT: 1m41s is too much; use 0s to 1m40s`},
		{"FLOCKER_BUSY_WAIT=30s FLOCKER_MOUNT_DEADLINE=20s", `setting FLOCKER_BUSY_WAIT: 30s is more than FLOCKER_MOUNT_DEADLINE, 20s`},
		{"FLOCKER_MOUNT_DEADLINE=120s", `setting FLOCKER_MOUNT_DEADLINE: 2m0s is too much; use 1s to 1m50s, for Docker gives up after 120s`},
		{"FLOCKER_ETCD_CERT=" + secret, `setting FLOCKER_ETCD_CERT: it goes together with FLOCKER_ETCD_KEY; set both or none`},
		{"FLOCKER_ETCD_USER=u", `setting FLOCKER_ETCD_USER: it goes together with FLOCKER_ETCD_PASSWORD_FILE; set both or none`},
		{"FLOCKER_ETCD_USER=u FLOCKER_ETCD_PASSWORD_FILE=" + absent, `setting FLOCKER_ETCD_PASSWORD_FILE: open ` + absent + `: no such file or directory`},
		{"FLOCKER_ETCD_CERT=" + loose + " FLOCKER_ETCD_KEY=" + loose, "setting FLOCKER_ETCD_KEY: " + loose + private + loose},
		{"FLOCKER_ETCD_USER=u FLOCKER_ETCD_PASSWORD_FILE=" + loose, "setting FLOCKER_ETCD_PASSWORD_FILE: " + loose + private + loose},
		{"FLOCKER_ETCD_CACERT=" + absent, `setting FLOCKER_ETCD_CACERT: open ` + absent + `: no such file or directory`},
		{"FLOCKER_ETCD_ENDPOINTS=etcd1", `setting FLOCKER_ETCD_ENDPOINTS: "etcd1" has no host and port; use an address such as https://etcd1:2379`},
		{"FLOCKER_ETCD_ENDPOINTS=ftp://etcd1:2379", `setting FLOCKER_ETCD_ENDPOINTS: "ftp://etcd1:2379" is not an address such as https://etcd1:2379`},
		{"FLOCKER_ETCD_ENDPOINTS=http://a:2379 FLOCKER_ETCD_CACERT=" + secret, `setting FLOCKER_ETCD_ENDPOINTS: http://a:2379 would be used without TLS in spite of FLOCKER_ETCD_CACERT or FLOCKER_ETCD_CERT; use https`},
		{"FLOCKER_ETCD_LISTEN=10.0.0.1", `setting FLOCKER_ETCD_LISTEN: "10.0.0.1" is not an address with a port, such as 10.0.0.1:2379`},
		{"FLOCKER_ETCD_LISTEN=:1 FLOCKER_ETCD_ENDPOINTS=a:1", `setting FLOCKER_ETCD_LISTEN: there is no etcd inside the plugin when FLOCKER_ETCD_ENDPOINTS is set; unset one`},
		{"FLOCKER_ETCD_LISTEN=10.0.0.1:2379", "setting FLOCKER_ETCD_LISTEN: " + open("10.0.0.1:2379")},
		{"FLOCKER_ETCD_LISTEN=:2379", "setting FLOCKER_ETCD_LISTEN: " + open(":2379")},
		{"FLOCKER_ETCD_LISTEN=alpha:2379", "setting FLOCKER_ETCD_LISTEN: " + open("alpha:2379")},
		{"FLOCKER_CERTS=certs", `setting FLOCKER_CERTS: "certs" is not an absolute path`},
		{"FLOCKER_CERTS=" + absent, "setting FLOCKER_CERTS: stat " + absent + "/cluster.crt: no such file or directory; docker flocker ca node makes a directory with it"},
		{"FLOCKER_ETCD_PREFIX=//", `setting FLOCKER_ETCD_PREFIX: use a word such as flocker, or several with / between`},
		{"FLOCKER_ETCD_CERT=" + secret + " FLOCKER_NODE_TTL=3s", `setting FLOCKER_ETCD_CERT: it goes together with FLOCKER_ETCD_KEY; set both or none; ` +
			`setting FLOCKER_NODE_RENEW: 2.5s is not less than a third of FLOCKER_NODE_TTL, 3s`},
	}
	for _, test := range tests {
		environ := strings.Split(strings.ReplaceAll(test.env, " FLOCKER_", "\nFLOCKER_"), "\n")
		_, _, err := settingsFrom(environ)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != test.want {
			t.Errorf("%s:\ngot  %s\nwant %s", test.env, got, test.want)
		}
	}
}

// Certificates are where they are in the original Flocker, or where a managed plugin
// sees them.
func TestCertsFound(t *testing.T) {
	before := etcFlocker
	defer func() { etcFlocker = before }()
	etc, state := t.TempDir(), t.TempDir()
	etcFlocker = etc
	find := func(want, problem string) {
		t.Helper()
		s, _, err := settingsFrom([]string{"FLOCKER_STATE_DIR=" + state})
		got := ""
		if err != nil {
			got = err.Error()
		}
		if s.Certs != want || got != problem {
			t.Errorf("got %q, %s, want %q, %s", s.Certs, got, want, problem)
		}
	}
	find("", "")
	certs := filepath.Join(state, "certs")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	find("", "")
	for _, dir := range []string{etc, certs} {
		if err := os.WriteFile(filepath.Join(dir, "cluster.crt"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if dir == etc {
			find(etc, "")
		}
	}
	find("", "setting FLOCKER_CERTS: there are both "+etc+"/cluster.crt and "+certs+"/cluster.crt: remove one, or name one with FLOCKER_CERTS")
	if err := os.Remove(filepath.Join(etc, "cluster.crt")); err != nil {
		t.Fatal(err)
	}
	find(certs, "")
}

// A host's own certificates are for etcd, too, unless others are named.
func TestCertsForEtcd(t *testing.T) {
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "ca")
	for _, file := range []string{filepath.Join(dir, "cluster.crt"), filepath.Join(dir, "node.crt"), filepath.Join(dir, "node.key"), other} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for env, want := range map[string][3]string{
		"FLOCKER_ETCD_ENDPOINTS=https://a:1,https://b:1":                  {dir + "/cluster.crt", dir + "/node.crt", dir + "/node.key"},
		"FLOCKER_ETCD_ENDPOINTS=http://a:1":                               {},
		"FLOCKER_ETCD_ENDPOINTS=a:1":                                      {},
		"FLOCKER_ETCD_ENDPOINTS=https://a:1 FLOCKER_ETCD_CACERT=" + other: {other},
		"FLOCKER_ETCD_LISTEN=10.0.0.1:1":                                  {},
	} {
		s, _, err := settingsFrom(append(strings.Fields(env), "FLOCKER_CERTS="+dir))
		if got := [3]string{s.EtcdCACert, s.EtcdCert, s.EtcdKey}; err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", env, got, err, want)
		}
	}
	_, _, err := settingsFrom([]string{"FLOCKER_CERTS=" + dir, "FLOCKER_ETCD_ENDPOINTS=https://a:1,http://b:1"})
	if want := "setting FLOCKER_ETCD_ENDPOINTS: http://b:1 would be used without TLS in spite of FLOCKER_ETCD_CACERT or FLOCKER_ETCD_CERT; use https"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestUnknownSettings(t *testing.T) {
	_, warnings, err := settingsFrom([]string{"FLOCKER_LOOPBACK_DIRECTORY=/x", "FLOCKER_BUSYWAIT=1s", "FLOCKER_FROBNICATION_INTERVAL=1", "FLOCKER_UNSET="})
	want := []string{
		"unknown setting FLOCKER_BUSYWAIT is ignored; did you mean FLOCKER_BUSY_WAIT?",
		"unknown setting FLOCKER_FROBNICATION_INTERVAL is ignored",
		"unknown setting FLOCKER_LOOPBACK_DIRECTORY is ignored; did you mean FLOCKER_LOOPBACK_DIR?",
	}
	if err != nil || !slices.Equal(warnings, want) {
		t.Errorf("got %q, %v, want %q", warnings, err, want)
	}
}

// config.json, README.md and the systemd unit say what the program does.
func TestSettingsInConfigJSON(t *testing.T) {
	const file = "../config.json"
	type variable struct {
		Name        string   `json:"name"`
		Description string   `json:"description"`
		Value       *string  `json:"value"`
		Settable    []string `json:"settable"`
	}
	var want []variable
	for _, o := range backends.Options[settings]() {
		want = append(want, variable{o.Name, description(o), &o.Default, []string{"value"}})
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		before, rest, ok := strings.Cut(string(data), `"env": [`)
		if !ok {
			t.Fatalf("%s has no env section", file)
		}
		dec := json.NewDecoder(strings.NewReader("[" + rest))
		var old json.RawMessage
		if err = dec.Decode(&old); err != nil {
			t.Fatalf("%s: env: %v", file, err)
		}
		after := rest[dec.InputOffset()-1:]
		var lines []string
		for _, v := range want {
			line, failed := encode(v)
			if failed != nil {
				t.Fatal(failed)
			}
			lines = append(lines, "    "+strings.TrimSpace(string(line)))
		}
		data = []byte(before + `"env": [` + "\n" + strings.Join(lines, ",\n") + "\n  ]" + after)
		if err = os.WriteFile(file, data, 0o644); err != nil { //nolint:gosec // everybody may read it
			t.Fatal(err)
		}
	}
	var config struct {
		Interface       struct{ Socket string }
		PropagatedMount string
		Mounts          []struct{ Name, Destination string }
		Env             []variable
	}
	if err = json.Unmarshal(data, &config); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if !reflect.DeepEqual(config.Env, want) {
		t.Errorf("%s: env differs from the settings; run go test ./plugin -update", file)
	}
	s, _, err := settingsFrom(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.Socket, "/run/docker/plugins/"+config.Interface.Socket; got != want {
		t.Errorf("socket: got %s, want %s", got, want)
	}
	if s.MountRoot != config.PropagatedMount && !strings.HasPrefix(s.MountRoot, config.PropagatedMount+"/") {
		t.Errorf("mount root %s is not below %s", s.MountRoot, config.PropagatedMount)
	}
	for name, path := range map[string]string{"state": s.StateDir, "run": s.DockerSocket} {
		if !slices.ContainsFunc(config.Mounts, func(m struct{ Name, Destination string }) bool {
			return m.Name == name && (path == m.Destination || strings.HasPrefix(path, m.Destination+"/"))
		}) {
			t.Errorf("no mount %s has %s in it", name, path)
		}
	}
}

func TestSettingsInReadme(t *testing.T) {
	const (
		file  = "../README.md"
		begin = "<!-- settings: written by go test ./plugin -update -->\n"
		end   = "<!-- end of settings -->"
	)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(data), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s: no %q with %q after it", file, begin, end)
	}
	want := "\n" + settingsTable() + "\n"
	if *update {
		got = want
		if err := os.WriteFile(file, []byte(before+begin+want+end+after), 0o644); err != nil { //nolint:gosec // everybody may read it
			t.Fatal(err)
		}
	}
	if got != want {
		t.Errorf("%s: the table of settings is not the program's; run go test ./plugin -update", file)
	}
}

func TestSettingsInUnit(t *testing.T) {
	data, err := os.ReadFile("flocker.service")
	if err != nil {
		t.Fatal(err)
	}
	var environ []string
	for line := range strings.Lines(string(data)) {
		if pair, ok := strings.CutPrefix(line, "Environment="); ok {
			environ = append(environ, strings.TrimSpace(pair))
		}
	}
	s, warnings, err := settingsFrom(environ)
	if err != nil || len(warnings) > 0 {
		t.Errorf("got %v, %v", err, warnings)
	}
	if s.MountRoot != "/var/lib/flocker/mnt" || s.DockerSocket != "/run/docker.sock" {
		t.Errorf("got mount root %s and Docker's socket %s", s.MountRoot, s.DockerSocket)
	}
}
