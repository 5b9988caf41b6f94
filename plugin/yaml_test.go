package main

import (
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/rbd"
)

const sample = `# two CSI drivers and EBS
gold:
  type: csi
  endpoint: unix:///host/run/csi/gold.sock
  driver: csi.example.com
  parameters: {type: ssd, iops: 3000}
  profiles:
    fast: {type: nvme}
  secret_files: {password: /var/lib/flocker/gold}
  call_secret_files:
    expand: {}
  fences: true
  late_calls: 90s
  min_size: 1GiB
  max_size: 16TiB
silver: {type: csi, endpoint: "unix:///host/run/csi/silver.sock"}
aws:
  type: ebs
  region: eu-central-1
  default: {volume_type: gp3, iops: 4000}
  profiles:
    fast: {volume_type: io2, iops: 20000}
  keep_instances: true
  calls_per_second: 2.5
disk: {type: loopback, dir: /srv/disk, preallocate: true}
cloud:
  type: openstack
  auth_url: https://keystone.example:5000/v3
  application_credential_id: 21dced0fd20347869b93710d2b98aae0
  application_credential_secret_file: /var/lib/flocker/cloud
  profiles:
    fast: {volume_type: ssd}
  late_calls: 2m
cinder:
  type: openstack
  attach: connector
  cinder_url: http://cinder.example:8776/v3
  project_id: 6f70656e737461636b20342065766572
  ceph_user: flocker
  ceph_monitors: [192.0.2.1]
  ceph_keyring_file: /var/lib/flocker/ceph
ceph:
  type: rbd
  monitors: [192.0.2.1, "[v2:192.0.2.2:3300,v1:192.0.2.2:6789]"]
  keyring_file: /var/lib/flocker/ceph
  pool: volumes
  profiles:
    cheap: {data_pool: coded, features: [layering, exclusive-lock], object_size: 8MiB}
  attach: fuse
`

func TestParseBackends(t *testing.T) {
	got, err := parseBackends("f", []byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	want := []configured{
		{"gold", "csi", "f", 2, &csi.Config{
			Endpoint: "unix:///host/run/csi/gold.sock", Driver: "csi.example.com",
			Parameters:  map[string]string{"type": "ssd", "iops": "3000"},
			Profiles:    map[string]map[string]string{"fast": {"type": "nvme"}},
			SecretFiles: map[string]string{"password": "/var/lib/flocker/gold"}, CallSecretFiles: map[string]map[string]string{"expand": {}},
			Fences: true, LateCalls: 90 * time.Second, MinSize: backends.GiB, MaxSize: 16 * backends.TiB,
		}},
		{"silver", "csi", "f", 16, &csi.Config{Endpoint: "unix:///host/run/csi/silver.sock"}},
		{"aws", "ebs", "f", 17, &ebs.Config{
			Region: "eu-central-1", Default: ebs.Profile{Type: "gp3", IOPS: 4000},
			Profiles: map[string]ebs.Profile{"fast": {Type: "io2", IOPS: 20000}}, KeepInstances: true, CallsPerSecond: 2.5,
		}},
		{"disk", "loopback", "f", 25, &directory{"/srv/disk", true}},
		{"cloud", "openstack", "f", 26, &openstack.Config{
			AuthURL: "https://keystone.example:5000/v3", ApplicationCredentialID: "21dced0fd20347869b93710d2b98aae0",
			ApplicationCredentialSecretFile: "/var/lib/flocker/cloud", Profiles: map[string]openstack.Profile{"fast": {VolumeType: "ssd"}},
			LateCalls: 2 * time.Minute,
		}},
		{"cinder", "openstack", "f", 34, &openstack.Config{
			Attach: "connector", CinderURL: "http://cinder.example:8776/v3", ProjectID: "6f70656e737461636b20342065766572",
			CephUser: "flocker", CephMonitors: []string{"192.0.2.1"}, CephKeyringFile: "/var/lib/flocker/ceph",
		}},
		{"ceph", "rbd", "f", 42, &rbd.Config{
			Monitors: []string{"192.0.2.1", "[v2:192.0.2.2:3300,v1:192.0.2.2:6789]"}, KeyringFile: "/var/lib/flocker/ceph", Pool: "volumes",
			Profiles: map[string]rbd.Profile{"cheap": {DataPool: "coded", Features: []string{"layering", "exclusive-lock"}, ObjectSize: 8 * backends.MiB}},
			Attach:   "fuse",
		}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
	for _, empty := range []string{"", "# nothing\n", "---\n"} {
		if got, err := parseBackends("f", []byte(empty)); err != nil && empty != "---\n" || len(got) > 0 {
			t.Errorf("%q: got %v, %v", empty, got, err)
		}
	}
}

func TestParseBackendsRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"gold":                                   "f, line 1: here belong names of backends, each with a colon after it",
		"[gold]":                                 "f, line 1: here belong names of backends, each with a colon after it",
		"gold:\n\ttype: csi":                     "f: line 2: found character that cannot start any token",
		"gold: {type: csi":                       "f: line 1: did not find expected ',' or '}'",
		"gold:\n":                                "f, line 1: backend gold: here belong settings, such as type: csi, each with a colon after it",
		"gold: {}":                               "f, line 1: backend gold: it has no type; use csi, ebs, loopback, openstack, rbd, share",
		"\ngold:\n  region: x":                   "f, line 3: backend gold: it has no type; use csi, ebs, loopback, openstack, rbd, share",
		"gold:\n  type: cinder":                  `f, line 2: backend gold: unknown type "cinder"; use csi, ebs, loopback, openstack, rbd, share`,
		"gold: {type: [csi]}":                    `f, line 1: backend gold: unknown type ""; use csi, ebs, loopback, openstack, rbd, share`,
		"Gold: {type: ebs}":                      `f, line 1: "Gold": a backend's name is 1 to 20 small letters, digits and dashes, and begins with a letter`,
		"a/b: {type: ebs}":                       `f, line 1: "a/b": a backend's name is 1 to 20 small letters, digits and dashes, and begins with a letter`,
		"a: {type: ebs}\nb: {type: ebs}\na: {}":  "f, line 3: a is there twice, first in line 1",
		"a: {type: ebs, zone: x, zone: y}":       "f, line 1: backend a: zone is there twice, first in line 1",
		"a:\n  type: csi\n  endpont: x":          "f, line 3: backend a: unknown key endpont; did you mean endpoint?",
		"a:\n  type: loopback\n  colour: x":      "f, line 3: backend a: unknown key colour; valid: dir, preallocate",
		"a:\n  type: csi\n  name: x":             "f, line 3: backend a: unknown key name; the name is what stands before the colon, with the settings below it",
		"a: {type: ebs, default: {iop: 1}}":      "f, line 1: backend a: unknown key default.iop; did you mean iops?",
		"a: {type: ebs, profiles: {x: {io: 1}}}": "f, line 1: backend a: unknown key profiles.x.io; valid: iops, iops_per_gib, throughput, volume_type",
		"a: {type: ebs, late_calls: 60}":         `f, line 1: backend a: late_calls: "60" is not valid; use a time such as 500ms, 10s or 5m`,
		"a: {type: ebs, late_calls: -1s}":        `f, line 1: backend a: late_calls: "-1s" is not valid; use a time such as 500ms, 10s or 5m`,
		"a: {type: ebs, encrypted: yes}":         `f, line 1: backend a: encrypted: "yes" is not valid; use true or false`,
		"a: {type: ebs, default: {iops: x}}":     `f, line 1: backend a: default.iops: "x" is not valid; use a whole number`,
		"a: {type: ebs, calls_per_second: .nan}": `f, line 1: backend a: calls_per_second: ".nan" is not valid; use a number`,
		"a: {type: csi, min_size: 5}":            "f, line 1: backend a: min_size: size 5 has no unit; 5 means 5 bytes; write 5G",
		"a: {type: ebs, region: }":               "f, line 1: backend a: region has no value: give it one, or remove it",
		"a: {type: ebs, region: [x]}":            "f, line 1: backend a: region: here belongs a single value",
		"a: {type: ebs, default: x}":             "f, line 1: backend a: default: here belong settings, each with a colon after it",
		"a: &x {type: ebs}\nb: *x":               "f, line 2: backend b: here belong settings, such as type: csi, each with a colon after it; write it out, without & and *",
		"a: &x {type: ebs}\nb:\n  <<: *x":        "f, line 3: backend b: a key is one word; write everything out, without & * and <<",
		"a: &x {type: ebs, <<: *x}":              "f, line 1: backend a: a key is one word; write everything out, without & * and <<",
		"a: {type: ebs}\n---\nb: {type: ebs}":    "f, line 2: a second document begins (---): put all backends into one",
		"a: {type: ebs, x: 1, y: 2}\nb: 3":       "f, line 1: backend a: unknown key x; valid: calls_per_second, credentials_file, credentials_profile, default, encrypted, endpoint, instance_id, keep_instances, kms_key_id, late_calls, profiles, region, zone (and 2 more)",
		strings.Repeat("#", 1<<20+1):             "f: it is larger than 1 MiB",
	} {
		got, err := parseBackends("f", []byte(text))
		if err == nil || !strings.HasPrefix(err.Error(), want) || got != nil {
			t.Errorf("%.60q:\ngot  %v\nwant %s", text, err, want)
		}
	}
}

// Whatever a Config has can be set in the file.
func TestKinds(t *testing.T) {
	var settable func(path string, of reflect.Type)
	settable = func(path string, of reflect.Type) {
		if reflect.PointerTo(of).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			return
		}
		switch of.Kind() {
		case reflect.String, reflect.Bool, reflect.Int, reflect.Int32, reflect.Int64, reflect.Float64:
		case reflect.Pointer, reflect.Slice:
			settable(path+"[]", of.Elem())
		case reflect.Map:
			if of.Key().Kind() != reflect.String {
				t.Errorf("%s: the keys of its map are of type %s", path, of.Key())
			}
			settable(path+".KEY", of.Elem())
		case reflect.Struct:
			for f := range of.Fields() {
				key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
				if key == "" {
					t.Errorf("%s.%s has no key in the file; a yaml tag gives it one, or - none", path, f.Name)
				}
				settable(path+"."+key, f.Type)
			}
		default:
			t.Errorf("%s is a %s, which the file cannot have", path, of)
		}
	}
	for name, k := range kinds {
		settable(name, reflect.TypeOf(k.config()).Elem())
		if k.secrets(k.config()) == nil && name != "loopback" && name != "share" {
			t.Errorf("%s: no key can have a secret", name)
		}
	}
}

func FuzzBackendsFile(f *testing.F) {
	for _, seed := range []string{sample, "a: {type: ebs}", "a: &x [*x]", "<<: 1", "a: !!binary x", "? [a]\n: b", "a: {type: csi, parameters: {a: [b]}}", "\xff", "a: {type: ebs, type: csi}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := parseBackends("f", text)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f, line ") && !strings.HasPrefix(err.Error(), "f: ") || strings.Contains(err.Error(), "panic") {
				t.Fatalf("%q: the error does not say where: %v", text, err)
			}
			return
		}
		for _, c := range all {
			if !backendName.MatchString(c.name) || kinds[c.kind].config == nil || c.config == nil || c.line == 0 {
				t.Fatalf("%q: got %+v", text, c)
			}
			_ = c.check()
		}
	})
}

// The file is looked for in two places, and checked as a whole before anything starts.
func TestLoadBackends(t *testing.T) {
	etcBackends = filepath.Join(t.TempDir(), "etc.yaml")
	t.Cleanup(func() { etcBackends = "/etc/flocker/backends.yaml" })
	state := t.TempDir()
	inState := filepath.Join(state, "backends.yaml")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	load := func(environ ...string) string {
		t.Helper()
		s, _, err := settingsFrom(append([]string{"FLOCKER_HOSTNAME=a", "FLOCKER_STATE_DIR=" + state}, environ...))
		if err != nil {
			t.Fatal(err)
		}
		all, err := loadBackends(s)
		if err != nil {
			return err.Error()
		}
		names := []string{}
		for _, c := range all {
			names = append(names, c.name)
		}
		return fmt.Sprint(names)
	}
	is := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("\ngot  %s\nwant %s", got, want)
		}
	}
	is(load(), "[]")
	is(load("FLOCKER_BACKEND=aws"), `setting FLOCKER_BACKEND: unknown backend "aws"; valid: loopback; a file `+etcBackends+` can name more`)
	write(inState, "aws: {type: ebs}")
	is(load(), "[aws]")
	is(load("FLOCKER_BACKEND=aws"), "[aws]")
	is(load("FLOCKER_BACKEND=gold"), `setting FLOCKER_BACKEND: unknown backend "gold"; valid: aws, loopback; `+inState+` can name more`)
	write(etcBackends, "etc: {type: ebs}")
	is(load(), "there are both "+etcBackends+" and "+inState+": remove one, or name one with FLOCKER_BACKENDS")
	is(load("FLOCKER_BACKENDS="+inState), "[aws]")
	is(load("FLOCKER_BACKENDS="+state+"/none"), "setting FLOCKER_BACKENDS: open "+state+"/none: no such file or directory")
	if err := os.Remove(inState); err != nil {
		t.Fatal(err)
	}
	is(load(), "[etc]")
	for text, want := range map[string]string{
		"loopback: {type: loopback, dir: /x}": "line 1: backend loopback is there without it, with settings of its own (FLOCKER_…): use another name",
		"a: {type: csi}":                      "line 1: backend a: endpoint is missing: the driver's socket, such as unix:///run/csi/csi.sock",
		"a: {type: csi, endpoint: 'unix:///x', mode: mount, max_size: 1G, min_size: 2G}": "line 1: backend a: mode mount: a volume has to be a block device here; " +
			"drivers that have filesystems only cannot be used yet; max_size 1GiB is less than min_size 2GiB",
		"\na: {type: ebs, region: mars}":                                      `line 2: backend a: region "mars" is none; write it like eu-central-1`,
		"a: {type: rbd, pool: p}":                                             "line 1: backend a: conf or monitors is needed: the path of a ceph.conf, or the monitors' addresses",
		"a: {type: openstack, auth: rackspace}":                               "line 1: backend a: auth: rackspace needs username, api_key_file and region, such as DFW",
		"a: {type: loopback}":                                                 "line 1: backend a: dir is missing: the absolute path of the directory of its files",
		"a: {type: loopback, dir: " + state + "/loopback/}":                   "line 1: backend a: dir " + state + "/loopback is that of backend loopback",
		"a: {type: loopback, dir: /x}\nb: {type: loopback, dir: /y/../x}":     "line 2: backend b: dir /x is that of backend a",
		"a: {type: share}":                                                    "line 1: backend a: dir is missing: the absolute path of a directory that the hosts share",
		"a: {type: loopback, dir: /x}\nb: {type: share, dir: /x/}":            "line 2: backend b: dir /x is that of backend a",
		"a: {type: csi, endpoint: 'unix:///x', secret_files: {user: secret}}": "line 1: backend a: secret_files: user is not the absolute path of a file",
	} {
		write(etcBackends, text)
		is(load(), etcBackends+", "+want)
	}
}

// A secret that everybody can read, or nobody, makes its backend unusable until that is
// mended, and no other.
func TestSecretFiles(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	c := configured{name: "gold", kind: "csi", file: "/etc/b.yaml", config: &csi.Config{
		SecretFiles: map[string]string{"password": secret}, CallSecretFiles: map[string]map[string]string{"create": {"user": secret}},
	}}
	is := func(want string) {
		t.Helper()
		err := c.secrets()
		if want == "" {
			if err != nil {
				t.Error(err)
			}
			return
		}
		if want = "backend gold: call_secret_files.create.user of /etc/b.yaml: " + want; err == nil || err.Error() != want || !errors.Is(err, backends.ErrUnavailable) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	is("there is no file " + secret + ": make it, readable for root alone")
	for mode, want := range map[fs.FileMode]string{
		0o600: "", 0o640: "",
		0o644: secret + " can be used by every user of this host (its mode is 0644): type: chmod 600 " + secret,
		0o602: secret + " can be used by every user of this host (its mode is 0602): type: chmod 600 " + secret,
	} {
		if err := errors.Join(os.WriteFile(secret, []byte("x"), 0o600), os.Chmod(secret, mode)); err != nil {
			t.Fatal(err)
		}
		is(want)
	}
	rack := configured{name: "rack", kind: "openstack", file: "/etc/b.yaml", config: &openstack.Config{Auth: "rackspace", APIKeyFile: secret}}
	if err := os.Chmod(secret, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := rack.secrets(); err == nil || !strings.HasPrefix(err.Error(), "backend rack: api_key_file of /etc/b.yaml: "+secret+" can be used by every user") {
		t.Errorf("got %v", err)
	}
	if err := errors.Join(os.Remove(secret), os.Mkdir(secret, 0o700)); err != nil {
		t.Fatal(err)
	}
	is(secret + " is no file")
	aws := configured{name: "aws", kind: "ebs", config: &ebs.Config{}}
	if err := aws.secrets(); err != nil {
		t.Errorf("without a file: %v", err)
	}
}
