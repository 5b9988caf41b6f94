package main

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// documentedCluster is the one of docs/cli.md's examples, seen from its host alpha.
func documentedCluster() *fake {
	alpha := status("1a8a6d0e-6a53-4f5c-b0a1-0f2f7f0f6f3e", "alpha", "9f3c1a2b-0000-4000-8000-000000000000")
	beta := status("5b0c3a52-12c7-4a6f-8a43-9a1f5b7e2c11", "beta", "77d02e41-0000-4000-8000-000000000000")
	gamma := status("c2f4b1de-93ab-4f0e-9d55-3f6f0f1f8a20", "gamma", "0c4e9a77-0000-4000-8000-000000000000")
	alpha.Address, beta.Address = "10.0.0.1", "10.0.0.2"
	alpha.Live, alpha.Owned, beta.Owned = true, 2, 1
	gamma.Death = &ownership.Death{Host: "gamma"}
	volume := func(name, id, backend, fs string, size int64, state map[string]any) driver.Volume {
		return driver.Volume{
			Name: name, CreatedAt: time.Date(2026, 11, 20, 9, 30, 0, 0, time.UTC), Status: state,
			Definition: ownership.Volume{ID: id, Backend: backend, FS: fs, Size: size},
		}
	}
	db := volume("db", "0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55", "loopback", "ext4", 10<<30, map[string]any{
		"state": "mounted", "owner": "alpha", "token": int64(4711), "mounts": 1, "containers": []string{"postgres"},
	})
	db.Mountpoint = "/flocker/mnt/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55/data"
	db.Definition.Labels = map[string]string{"team": "blue"}
	return &fake{
		nodes: []ownership.NodeStatus{alpha, beta, gamma},
		backends: []driver.BackendStatus{
			{Properties: backends.Properties{Name: "loopback", Type: "loopback", Class: "F0", Options: []backends.Option{{Name: "preallocate"}}}, Default: true},
			{Properties: backends.Properties{Name: "san", Type: "csi", Class: "F1", Profiles: []string{"fast", "slow"}}, Err: errors.New(
				"list volumes: Probe: the CSI driver's socket unix:///host/run/csi/csi.sock does not answer: dial unix /host/run/csi/csi.sock: connect: no such file or directory; is the driver running on this host?")},
		},
		volumes: []driver.Volume{
			db,
			volume("logs", "64c1f9d2-0d1b-4b0e-9a3f-0b6d2f1c7a11", "loopback", "ext4", 500<<20, map[string]any{"state": "owner not responding", "owner": "beta", "detail": "host beta has not been heard from"}),
			volume("scratch", "a07e33d9-5f7c-4f0b-8c52-9a1d5e3b2f42", "san", "xfs", 1536<<20, map[string]any{"state": "free"}),
			volume("www", "d9b4c6e8-7a21-4d55-b1f3-2c8e6a0f9b73", "san", "xfs", 2<<30, map[string]any{"state": "quarantined", "owner": "alpha", "detail": "the kernel has noted errors in its filesystem"}),
		},
	}
}

// What stands in docs/cli.md is what is printed.
func TestDocs(t *testing.T) {
	version = "v0.1.0"
	defer func() { version = "development" }()
	socket := serve(t, documentedCluster())
	for heading, code := range map[string]int{
		"docker flocker ls": 0, "docker flocker inspect": 0, "docker flocker status": 3, "docker flocker version": 0,
		"docker flocker node ls": 0, "docker flocker backend ls": 0,
	} {
		for _, e := range documented(t, heading) {
			want(t, strings.Join(e.args, " "), command(t, socket, "", e.args...), result{code, e.out, ""})
			if heading == "docker flocker backend ls" {
				continue // an error is as long as it is
			}
			for line := range strings.Lines(e.out) {
				if n := utf8.RuneCountInString(line); n > columns+1 && e.args[len(e.args)-1] != "json" {
					t.Errorf("%s: %d columns: %s", e.args, n, line)
				}
			}
		}
	}
}

func TestFormats(t *testing.T) {
	socket := serve(t, documentedCluster())
	const usage = "See 'docker flocker ls --help'.\n"
	fields := "there are .Name, .ID, .State, .Detail, .Host, .Token, .Mountpoint, .Mounts, .Containers, .Waiting, .Placement, .PlacementError, .Bytes, .Filesystem, .Backend, .Profile, .Options, .Labels, .Created, .Stale\n"
	for _, test := range []struct {
		args []string
		want result
	}{
		{[]string{"ls", "-q"}, result{0, "db\nlogs\nscratch\nwww\n", ""}},
		{[]string{"ls", "--format", "{{.Name}}={{size .Bytes}}"}, result{0, "db=10GiB\nlogs=500MiB\nscratch=1.5GiB\nwww=2GiB\n", ""}},
		{[]string{"ls", "--format", `table {{.Name}}\t{{upper .State}}\t{{size .Bytes}}`}, result{0, "" +
			"NAME      STATE                  BYTES\n" +
			"db        MOUNTED                10GiB\n" +
			"logs      OWNER NOT RESPONDING   500MiB\n" +
			"scratch   FREE                   1.5GiB\n" +
			"www       QUARANTINED            2GiB\n", ""}},
		{[]string{"ls", "--format", "{{json .Labels}} {{join .Containers \",\"}} {{truncate .Name 3}} {{title .Backend}}{{pad .Host 1 0}}"}, result{0, "" +
			"{\"team\":\"blue\"} postgres db Loopback alpha\nnull  log Loopback beta\nnull  scr San \nnull  www San alpha\n", ""}},
		{[]string{"inspect", "db", "www", "--format", "{{.Name}} {{.Mountpoint}}"}, result{0, "db /flocker/mnt/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55/data\nwww \n", ""}},
		{[]string{"inspect", "none", "www", "nil", "--format", "{{.Name}}"}, result{1, "www\n", "there is no volume \"none\": docker flocker ls shows those there are\nthere is no volume \"nil\": docker flocker ls shows those there are\n"}},
		{[]string{"inspect", "none"}, result{1, "[]\n", "there is no volume \"none\": docker flocker ls shows those there are\n"}},
		{[]string{"inspect"}, result{2, "", "it takes at least one argument, NAME\nSee 'docker flocker inspect --help'.\n"}},
		{[]string{"node", "ls", "-q"}, result{0, "alpha\nbeta\ngamma\n", ""}},
		{[]string{"node", "ls", "--format", "{{.Host}} {{.Live}}"}, result{0, "alpha true\nbeta false\ngamma false\n", ""}},
		{[]string{"backend", "ls", "-q"}, result{0, "loopback\nsan\n", ""}},
		{[]string{"backend", "ls", "--format", "{{.Name}} {{.Default}}"}, result{0, "loopback true\nsan false\n", ""}},
		{[]string{"status", "--format", "{{index .Hosts \"live\"}} {{len .Attention}}"}, result{3, "1 2\n", ""}},
		{[]string{"version", "--format", "json"}, result{0, `{"client":"development","plugin":"v0.1.0","host":"alpha"}` + "\n", ""}},

		{[]string{"ls", "-q", "--format", "json"}, result{2, "", "--quiet and --format do not go together\n" + usage}},
		{[]string{"ls", "--format", "{{.Name"}, result{2, "", "--format cannot be understood: template: format:1: unclosed action\n" + usage}},
		{[]string{"ls", "--format", "{{.Nam}}"}, result{2, "", "--format cannot be used here: template: format:1:2: executing \"format\" at <.Nam>: can't evaluate field Nam in type api.Volume; " + fields + usage}},
	} {
		want(t, strings.Join(test.args, " "), command(t, socket, "", test.args...), test.want)
	}
	if got := command(t, socket, "", "ls", "--format", "json"); got.code != 0 || strings.Count(got.out, "\n") != 4 || !strings.HasPrefix(got.out, `{"name":"db","id":"0b9e6a1c`) {
		t.Errorf("ls as JSON: %+v", got)
	}
}

// A plugin without etcd, and none at all.
func TestReadingWithoutEtcd(t *testing.T) {
	f := documentedCluster()
	f.away, f.live, f.stale = ownership.ErrUnavailable, errors.New("ownership cannot be checked: etcd is away"), true
	f.volumes = f.volumes[2:3]
	f.volumes[0].Status = map[string]any{"state": "unknown", "stale": true}
	f.nodes = nil
	socket := serve(t, f)
	want(t, "ls", command(t, socket, "", "ls"), result{
		0, "NAME      STATE     HOST   SIZE     BACKEND\nscratch   unknown   -      1.5GiB   san\n",
		"etcd does not answer: these are the volumes that this host remembers\n",
	})
	want(t, "status", command(t, socket, "", "status"), result{3, "" +
		"host      alpha\nplugin    v0.1.0\ncluster   7c0e3f5a-2f0b-4d57-9a39-60c3bb8d1f11\netcd      cannot be used\nhosts     not known\nvolumes   1: 1 unknown\n" +
		"\nneeds attention:\n* this host cannot use etcd, so nothing can be mounted anew here: ownership\n  cannot be checked: etcd is away\n", ""})

	gone := result{1, "", "no Flocker plugin answers on /nonexistent: is it enabled on this host? (docker plugin ls)\n"}
	for _, args := range []string{"ls", "ls -q", "status", "node ls --format json"} {
		want(t, args, command(t, "/nonexistent", "", strings.Fields(args)...), gone)
	}
	gone.out = "docker flocker   development\n"
	want(t, "version", command(t, "/nonexistent", "", "version"), gone)
	gone.out = "[]\n"
	want(t, "inspect", command(t, "/nonexistent", "", "inspect", "db"), gone)
}

// A table fits a terminal, whatever is in it, unless it is to be whole.
func TestWidth(t *testing.T) {
	f := documentedCluster()
	f.volumes[0].Name = strings.Repeat("0123456789abcdef", 4) // as Docker names anonymous ones
	f.nodes[1].Host = "a-host-with-a-long-name.in-a.domain.example.com"
	f.nodes[1].Live, f.nodes[1].Death, f.nodes[1].State = true, &ownership.Death{}, "cordoned"
	socket := serve(t, f)
	want(t, "ls", command(t, socket, "", "ls"), result{0, "" +
		"NAME                               STATE                 HOST   SIZE    BACKEND\n" +
		"0123456789abcdef0123456789abcdef…  mounted               alpha  10GiB   loopback\n" +
		"logs                               owner not responding  beta   500MiB  loopback\n" +
		"scratch                            free                  -      1.5GiB  san\n" +
		"www                                quarantined           alpha  2GiB    san\n", ""})
	for _, args := range []string{"ls", "node ls", "backend ls"} {
		got := command(t, socket, "", strings.Fields(args)...)
		for line := range strings.Lines(got.out) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 && !strings.HasPrefix(line, "san: ") {
				t.Errorf("%s: %d columns: %s", args, n, line)
			}
		}
	}
	if got := command(t, socket, "", "ls", "--no-trunc"); !strings.Contains(got.out, f.volumes[0].Name+"   mounted") {
		t.Errorf("ls --no-trunc:\n%s", got.out)
	}
	if got := command(t, socket, "", "ls", "-q"); !strings.Contains(got.out, f.volumes[0].Name+"\n") {
		t.Errorf("ls -q:\n%s", got.out)
	}
}

func TestSize(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0B", 1000: "1000B", 1024: "1KiB", 1536 << 20: "1.5GiB", 10 << 30: "10GiB", 10<<30 + 1: "10GiB", 1 << 40: "1TiB", 3000 << 40: "2.9PiB", -1: "-1B"} {
		if got := size(bytes); got != want {
			t.Errorf("%d: %s, want %s", bytes, got, want)
		}
	}
}

// An answer may be as long as that about a hundred thousand volumes.
func TestLongAnswer(t *testing.T) {
	socket := listen(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"volumes":[{"name":"db","detail":"%s"}]}`, strings.Repeat("x", 17<<20))
	}))
	want(t, "ls", command(t, socket, "", "ls", "-q"), result{0, "db\n", ""})
}
