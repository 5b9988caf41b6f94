package control_test

import (
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// some are a volume that is mounted here, with all there may be to it, and one that
// is free.
func some() []driver.Volume {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return []driver.Volume{{
		Name: "db", Mountpoint: "/flocker/mnt/1/data", CreatedAt: at,
		Status: map[string]any{
			"state": "mounted", "owner": "a", "token": int64(7), "mounts": 2, "containers": []string{"web", "job"},
			"waiting": []string{"b"}, "detail": "<all> is well",
		},
		Definition: ownership.Volume{
			ID: "1", Backend: "loopback", Size: 1 << 30, FS: "ext4", Mkfs: "-m 0", Mount: "noatime", Profile: "fast",
			Options: map[string]string{"preallocate": "true"}, Labels: map[string]string{"team": "blue"},
		},
	}, {
		Name: "free", CreatedAt: at, Status: map[string]any{"state": "free"},
		Definition: ownership.Volume{ID: "2", Backend: "san", Size: 5, FS: "xfs"},
	}}
}

const (
	wantDB = `{"name":"db","id":"1","state":"mounted","detail":"<all> is well","host":"a","token":7,"mountpoint":"/flocker/mnt/1/data","mounts":2,` +
		`"containers":["web","job"],"waiting":["b"],"bytes":1073741824,"filesystem":"ext4","backend":"loopback","profile":"fast",` +
		`"options":{"mkfs":"-m 0","mount":"noatime","preallocate":"true"},"labels":{"team":"blue"},"created":"2026-01-02T03:04:05Z"}`
	wantFree = `{"name":"free","id":"2","state":"free","bytes":5,"filesystem":"xfs","backend":"san","created":"2026-01-02T03:04:05Z"}`
)

func TestVolumes(t *testing.T) {
	stale := some()[1]
	stale.Status = map[string]any{"state": "unknown", "stale": true}
	for _, test := range []struct {
		f    *fake
		path string
		want string
	}{
		{&fake{volumes: some()}, "/v1/volumes", `200 {"volumes":[` + wantDB + `,` + wantFree + `]}`},
		{&fake{}, "/v1/volumes", `200 {"volumes":[]}`},
		{
			&fake{volumes: []driver.Volume{stale}, stale: true}, "/v1/volumes",
			`200 {"volumes":[{"name":"free","id":"2","state":"unknown","bytes":5,"filesystem":"xfs","backend":"san","created":"2026-01-02T03:04:05Z","stale":true}],"stale":true}`,
		},
		{&fake{volumes: some()}, "/v1/volumes/db", "200 " + wantDB},
		{&fake{volumes: some()}, "/v1/volumes/..%2Fdb", `404 {"error":"there is no volume \"../db\": docker flocker ls shows those there are"}`},
		{&fake{}, "/v1/version", `200 {"version":"v1","host":"a"}`},
	} {
		status, got, logged := ask(t, test.f, "GET", test.path, "")
		if got = fmt.Sprint(status, " ", got); got != test.want {
			t.Errorf("%s:\ngot  %s\nwant %s", test.path, got, test.want)
		}
		if logged != "" {
			t.Errorf("%s: a question was logged: %s", test.path, logged)
		}
	}
}

// A name that nobody knows is not waited for as long as Docker would.
func TestVolumeWhileEtcdIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		status, got, _ := ask(t, &fake{wait: true}, "GET", "/v1/volumes/db", "")
		if want := `{"error":"ownership cannot be checked: context deadline exceeded"}`; status != 503 || got != want {
			t.Errorf("got %d %s, want 503 %s", status, got, want)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func TestStatus(t *testing.T) {
	volume := func(name, state, detail string) driver.Volume {
		return driver.Volume{Name: name, Status: map[string]any{"state": state, "detail": detail}}
	}
	node := func(id, host string, live bool, death *ownership.Death) ownership.NodeStatus {
		return ownership.NodeStatus{Node: ownership.Node{ID: id, Host: host}, Live: live, Death: death}
	}
	gone := node("n9", "old", false, nil)
	gone.State = "removed"
	const head = `{"host":"a","node":"n1","version":"v1","cluster":"c1",`
	var many []driver.Volume
	made := time.Now().Add(-time.Hour).UTC().Truncate(time.Second)
	half, fresh := volume("half", "creating", ""), volume("fresh", "creating", "")
	half.CreatedAt, fresh.CreatedAt = made, time.Now()
	for i := range 30 {
		many = append(many, volume(fmt.Sprintf("v%02d", i), "lost", "x"))
	}
	for _, test := range []struct {
		what string
		f    *fake
		want string
	}{
		{
			"all is well", &fake{nodes: []ownership.NodeStatus{node("n1", "a", true, nil), node("n2", "b", false, &ownership.Death{}), gone}, volumes: some()},
			head + `"hosts":{"declared dead":1,"live":1,"removed":1},"volumes":{"free":1,"mounted":1},"attention":[]}`,
		},
		{
			"all that may be wrong", &fake{
				nodes: []ownership.NodeStatus{node("n1", "a", true, nil), node("n2", "b", false, nil), node("n3", "c", true, &ownership.Death{})},
				volumes: []driver.Volume{
					volume("bad", "quarantined", "the kernel has noted errors"), volume("taken", "lost", "taken by host b"),
					volume("soon", "being taken over", "from host b"), volume("far", "owner not responding", "host b has not been heard from"),
				},
			},
			head + `"hosts":{"giving up":1,"live":1,"silent":1},"volumes":{"being taken over":1,"lost":1,"owner not responding":1,"quarantined":1},"attention":[` +
				`"host b is silent: docker flocker node ls shows since when; if it is switched off, and its volumes are wanted, type: docker flocker node confirm-dead b",` +
				`"host c was declared dead and answers: it is giving up its volumes",` +
				`"volume bad is quarantined: the kernel has noted errors; when it is seen to, type: docker flocker volume reinstate bad",` +
				`"volume taken is lost: taken by host b","volume soon is being taken over: from host b"]}`,
		},
		{
			"one whose host was stopped while it made it", &fake{nodes: []ownership.NodeStatus{}, volumes: []driver.Volume{half, fresh}},
			head + `"hosts":{},"volumes":{"creating":2},"attention":["volume half is being made since ` + made.Format(time.RFC3339) +
				`: if the host that makes it was stopped, the next mount finishes it, or type: docker flocker rm half"]}`,
		},
		{
			"etcd is away", &fake{nodesErr: errAway, volumes: []driver.Volume{volume("db", "unknown", "")}, stale: true},
			head + `"etcd_error":"` + unavailable + `","hosts":null,"volumes":{"unknown":1},"attention":["this host cannot use etcd, so nothing can be mounted anew here: ` + unavailable + `"]}`,
		},
		{
			"etcd was put back", &fake{nodes: []ownership.NodeStatus{node("n1", "a", false, nil)}, live: errors.New("etcd was put back")},
			head + `"etcd_error":"etcd was put back","hosts":{"silent":1},"volumes":{},"attention":["this host cannot use etcd, so nothing can be mounted anew here: etcd was put back"]}`,
		},
	} {
		status, got, logged := ask(t, test.f, "GET", "/v1/status", "")
		if status != 200 || got != test.want || logged != "" {
			t.Errorf("%s:\ngot  %d %s %s\nwant 200 %s", test.what, status, got, logged, test.want)
		}
	}
	soon := certs.Expiry{File: "/certs/node.crt", At: time.Now().Add(time.Hour).UTC().Truncate(time.Second)}
	later := certs.Expiry{File: "/certs/cluster.crt", At: time.Now().Add(certs.Soon + time.Hour).UTC().Truncate(time.Second)}
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	f := &fake{nodes: []ownership.NodeStatus{}}
	a := control.New(f, f, "v1", logrus.NewEntry(silent)).Certificates(func() []certs.Expiry { return []certs.Expiry{later, soon} })
	for path, want := range map[string]string{
		"/v1/status": `"attention":["the certificate /certs/node.crt expires at ` + soon.At.Format(time.RFC3339) + `: make another with docker flocker ca: docs/cli.md, New certificates"]`,
		"/v1/host": `"certificates":[{"file":"/certs/cluster.crt","expires":"` + later.At.Format(time.RFC3339) + `"},` +
			`{"file":"/certs/node.crt","expires":"` + soon.At.Format(time.RFC3339) + `"}]`,
	} {
		w := httptest.NewRecorder()
		a.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %s, want %s", path, w.Body, want)
		}
	}
	_, got, _ := ask(t, &fake{nodes: []ownership.NodeStatus{}, volumes: many}, "GET", "/v1/status", "")
	if n := strings.Count(got, " is lost: x"); n != 20 || !strings.HasSuffix(got, `,"and 10 more"]}`) {
		t.Errorf("of 30 findings %d were told: %s", n, got)
	}
}

func TestHost(t *testing.T) {
	f := &fake{
		host: driver.Host{
			MountRoot: "/m", Filesystems: []string{"ext4"}, Lacks: []string{"e2fsck (package e2fsprogs)"}, Docker: errors.New("no Docker"),
			Mounts:  []driver.HostMount{{Path: "/m/1", Number: "7:1", Volume: "db"}, {Path: "/m/2", Number: "7:2"}},
			Devices: []driver.HostDevice{{Backend: "san", Path: "/dev/x", ID: "i", Token: 3, Owned: true}}, Unmounted: []string{"www"},
			Silent: map[string]error{"san": errors.New("no answer"), "ebs": errors.New("no credentials")}, Err: errors.New("no table"),
			Forbidden: map[string][]string{"ebs": {"ec2:DetachVolume", "ec2:StopInstances"}}, Unjudged: map[string]error{"aws": errors.New("too slow")},
		},
		servers: []ownership.Server{{Endpoint: "e1", Version: "3.6.1", Alarms: []string{"NOSPACE"}, Leaderless: true}, {Endpoint: "e2", Err: errors.New("refused")}},
	}
	const want = `{"mount_root":"/m","filesystems":["ext4"],"lacks":["e2fsck (package e2fsprogs)"],"docker_error":"no Docker",` +
		`"mounts":[{"path":"/m/1","number":"7:1","volume":"db"},{"path":"/m/2","number":"7:2"}],"mount_error":"no table","unmounted":["www"],` +
		`"devices":[{"backend":"san","path":"/dev/x","id":"i","token":3,"owned":true}],` +
		`"silent":[{"backend":"ebs","error":"no credentials"},{"backend":"san","error":"no answer"}],` +
		`"permissions":[{"backend":"ebs","forbidden":["ec2:DetachVolume","ec2:StopInstances"]},{"backend":"aws","error":"too slow"}],` +
		`"etcd":[{"endpoint":"e1","version":"3.6.1","alarms":["NOSPACE"],"leaderless":true},{"endpoint":"e2","error":"refused"}]}`
	if status, got, logged := ask(t, f, "GET", "/v1/host", ""); status != 200 || got != want || logged != "" {
		t.Errorf("got  %d %s %s\nwant 200 %s", status, got, logged, want)
	}
	const none = `{"mount_root":"","filesystems":null,"mounts":[],"devices":[],"etcd":[]}`
	if _, got, _ := ask(t, &fake{}, "GET", "/v1/host", ""); got != none {
		t.Errorf("nothing: %s", got)
	}
}
