package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// fake is a driver and a map of owners that answer what they are told.
type fake struct {
	nodes   []ownership.NodeStatus
	silence map[string]time.Duration
	views   []ownership.View
	// backends are those of the host.
	backends []driver.BackendStatus
	host     driver.Host
	servers  []ownership.Server
	volumes  []driver.Volume
	stale    bool
	live     error
	// err is what a change ends with; the other two are what the questions do.
	err, nodesErr, listErr error
	wait                   bool // until the request's context is done

	// calls are what the driver was asked to change.
	calls []string
	death ownership.Death // the last that was asked for
}

func (f *fake) do(ctx context.Context, format string, args ...any) error {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	if f.wait {
		<-ctx.Done()
		return fmt.Errorf("%w: %w", ownership.ErrUnavailable, context.Cause(ctx))
	}
	return f.err
}

func (f *fake) Nodes(context.Context) ([]ownership.NodeStatus, error) { return f.nodes, f.nodesErr }

func (f *fake) ConfirmDead(ctx context.Context, host string, d ownership.Death) (ownership.Death, error) {
	f.death = d
	d.Node, d.Host, d.Boot = "n1", "a", "9f3c1a2b-0000-4000-8000-000000000000"
	return d, f.do(ctx, "confirm-dead %s", host)
}

func (f *fake) Reinstate(ctx context.Context, name, by string) error {
	return f.do(ctx, "reinstate %s by %s", name, by)
}

func (f *fake) AcceptRestore(ctx context.Context, by string) (int64, error) {
	return 3, f.do(ctx, "accept-restore by %s", by)
}

func (f *fake) CreateVolume(ctx context.Context, req driver.CreateRequest) (driver.Volume, error) {
	v := driver.Volume{Name: req.Name, Definition: ownership.Volume{ID: req.ID, Labels: req.Labels}, Status: map[string]any{"state": "free", "placement": "b", "placement_error": "it rains"}}
	return v, f.do(ctx, "create %v", req)
}

func (f *fake) Remove(ctx context.Context, name string) error {
	return f.do(ctx, "remove %s by %s", name, ownership.Wanted(ctx))
}

func (f *fake) Move(ctx context.Context, name, host, by string) (ownership.Placement, error) {
	return ownership.Placement{Node: "n/2", Host: host}, f.do(ctx, "move %s to %q by %s", name, host, by)
}

func (f *fake) Cordon(ctx context.Context, host, by string, on bool) error {
	return f.do(ctx, "cordon %s by %s: %v", host, by, on)
}

func (f *fake) Drain(ctx context.Context, host, by string) (driver.Drained, error) {
	return driver.Drained{Released: []string{"db"}, Busy: []driver.BusyVolume{{Name: "www", Containers: []string{"web"}}, {Name: "log", Detail: "leased"}}},
		f.do(ctx, "drain %s by %s", host, by)
}

func (f *fake) RemoveNode(ctx context.Context, host, by string) error {
	return f.do(ctx, "remove node %s by %s", host, by)
}

func (f *fake) List(context.Context) ([]ownership.View, error) { return f.views, f.listErr }

func (f *fake) Survey(context.Context) ([]driver.Volume, bool) { return f.volumes, f.stale }

func (f *fake) Get(ctx context.Context, name string) (driver.Volume, error) {
	for _, v := range f.volumes {
		if v.Name == name {
			return v, nil
		}
	}
	if f.wait {
		return driver.Volume{}, f.do(ctx, "get %s", name)
	}
	return driver.Volume{}, ownership.ErrNotFound
}

func (f *fake) Node() ownership.Node { return ownership.Node{ID: "n1", Host: "a"} }

func (f *fake) Cluster() string { return "c1" }

func (f *fake) Live() error { return f.live }

func (f *fake) Backends(context.Context) []driver.BackendStatus { return f.backends }

func (f *fake) Host(context.Context) driver.Host { return f.host }

func (f *fake) Servers(context.Context) []ownership.Server { return f.servers }

func (f *fake) Silence(node string) (time.Duration, bool) {
	silent, ok := f.silence[node]
	return silent, ok
}

// known are the nodes of most tests.
func known() []ownership.NodeStatus {
	return []ownership.NodeStatus{{Node: ownership.Node{ID: "n1", Host: "a"}}, {Node: ownership.Node{ID: "n/2", Host: "b"}}}
}

// ask sends one request and returns the status, the body and what was logged.
func ask(t *testing.T, f *fake, method, path, body string) (status int, answer, logged string) {
	t.Helper()
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	w := httptest.NewRecorder()
	req := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
	control.New(f, f, "v1", logrus.NewEntry(log)).ServeHTTP(w, req)
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("%s %s: content type %q", method, path, got)
	}
	return w.Code, strings.TrimSuffix(w.Body.String(), "\n"), strings.TrimSuffix(out.String(), "\n")
}

const unavailable = "ownership cannot be checked: <etcd> is away"

var errAway = fmt.Errorf("%w: <etcd> is away", ownership.ErrUnavailable)

func TestNodes(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f := &fake{
		nodes: []ownership.NodeStatus{
			{Node: ownership.Node{ID: "n1", Host: "a", Boot: "b1", Address: "10.0.0.1", Session: "secret"}, Live: true, Owned: 2},
			{Node: ownership.Node{ID: "n2", Host: "b", Boot: "b2", State: "cordoned"}, Owned: 1},
			{Node: ownership.Node{ID: "n3", Host: "c", Boot: "b3"}},
			{
				Node:  ownership.Node{ID: "n4", Host: "d", Boot: "b4"},
				Death: &ownership.Death{Node: "n4", Host: "d", Boot: "b4", Method: "operator", Evidence: "burnt", By: "anna@a", At: at, Forced: true},
			},
		},
		// Of a node that is live the last silence may still be remembered.
		silence: map[string]time.Duration{"n1": time.Second, "n2": 34500 * time.Millisecond},
	}
	status, got, logged := ask(t, f, "GET", "/v1/nodes", "")
	want := `{"nodes":[` +
		`{"id":"n1","host":"a","address":"10.0.0.1","boot":"b1","live":true,"volumes":2},` +
		`{"id":"n2","host":"b","boot":"b2","state":"cordoned","live":false,"silent_seconds":34.5,"volumes":1},` +
		`{"id":"n3","host":"c","boot":"b3","live":false,"volumes":0},` +
		`{"id":"n4","host":"d","boot":"b4","live":false,"volumes":0,"death":{"node":"n4","host":"d","boot":"b4","because":"burnt","by":"anna@a","at":"2026-01-02T03:04:05Z","forced":true}}]}`
	if status != 200 || got != want {
		t.Errorf("got %d %s, want 200 %s", status, got, want)
	}
	if logged != "" {
		t.Errorf("a question was logged: %s", logged)
	}
	if status, got, _ = ask(t, &fake{}, "GET", "/v1/nodes", ""); status != 200 || got != `{"nodes":[]}` {
		t.Errorf("no nodes: got %d %s", status, got)
	}
}

func TestBackends(t *testing.T) {
	all := make([]driver.BackendStatus, 2)
	all[0].Name, all[0].Type, all[0].Class, all[0].Profiles = "gold", "csi", "F1", []string{"fast", "slow"}
	all[0].Err = errors.New("the <socket> does not answer")
	all[1].Name, all[1].Type, all[1].Class, all[1].Default = "loopback", "loopback", "F0", true
	status, got, logged := ask(t, &fake{backends: all}, "GET", "/v1/backends", "")
	want := `{"backends":[{"name":"gold","type":"csi","class":"F1","profiles":["fast","slow"],"error":"the <socket> does not answer"},` +
		`{"name":"loopback","type":"loopback","class":"F0","default":true}]}`
	if status != 200 || got != want || logged != "" {
		t.Errorf("got %d %s %s, want 200 %s", status, got, logged, want)
	}
}

func TestConfirmDead(t *testing.T) {
	owned := func(name, node string) ownership.View {
		return ownership.View{Volume: ownership.Volume{Name: name}, Owner: &ownership.Owner{Node: node}}
	}
	f := &fake{nodes: known(), views: []ownership.View{owned("db", "n1"), owned("logs", "n2"), {Volume: ownership.Volume{Name: "free"}}, owned("www", "n1")}}
	before := time.Now()
	status, got, logged := ask(t, f, "POST", "/v1/nodes/a/confirm-dead", `{"because":"<burnt>","by":"anna@b"}`)
	d := f.death
	if d.At.Before(before.Add(-time.Second)) || d.At.After(time.Now()) || d.At.Location() != time.UTC {
		t.Errorf("recorded at %v, want now, in UTC", d.At)
	}
	if d.Method != "operator" || d.Evidence != "<burnt>" || d.By != "anna@b" || d.Forced {
		t.Errorf("recorded %+v", d)
	}
	at := d.At.Format(time.RFC3339Nano)
	want := `{"death":{"node":"n1","host":"a","boot":"9f3c1a2b-0000-4000-8000-000000000000","because":"<burnt>","by":"anna@b","at":"` + at + `","forced":false},"volumes":["db","www"]}`
	if status != 200 || got != want {
		t.Errorf("got %d %s, want 200 %s", status, got, want)
	}
	if want := `level=info msg="done as an operator asked" because="<burnt>" by=anna@b forced=false host=a op=confirm-dead`; logged != want {
		t.Errorf("logged %s, want %s", logged, want)
	}

	// Forced, of an id with a slash in it, without a reason, and with nobody to list.
	f = &fake{nodes: known(), listErr: errAway}
	status, got, _ = ask(t, f, "POST", "/v1/nodes/n%2F2/confirm-dead", `{"by":"anna@b","force":true,"typed":"n/2"}`)
	if status != 200 || !strings.HasSuffix(got, `,"forced":true},"volumes":null}`) {
		t.Errorf("forced: got %d %s", status, got)
	}
	if len(f.calls) != 1 || f.calls[0] != "confirm-dead n/2" || !f.death.Forced || f.death.Evidence != "an operator said so" {
		t.Errorf("forced: driver saw %q, %+v", f.calls, f.death)
	}
	status, got, _ = ask(t, &fake{nodes: known()}, "POST", "/v1/nodes/a/confirm-dead", `{"by":"anna@b"}`)
	if status != 200 || !strings.HasSuffix(got, `,"volumes":[]}`) {
		t.Errorf("a host with no volumes: got %d %s", status, got)
	}
}

func TestChanges(t *testing.T) {
	f := &fake{}
	const by, done = `{"by":"anna@b"}`, `level=info msg="done as an operator asked" `
	for _, test := range []struct{ method, path, body, want, call, logged string }{
		{
			"POST", "/v1/volumes", `{"name":"db","id":"7","options":{"size":"1G"},"labels":{"a b":"c"},"by":"anna@b"}`,
			`{"name":"db","id":"7","state":"free","placement":"b","placement_error":"it rains","bytes":0,"filesystem":"","backend":"","labels":{"a b":"c"},"created":"0001-01-01T00:00:00Z"}`,
			"create {db 7 map[size:1G] map[a b:c] false anna@b}", done + "by=anna@b op=create volume=db",
		},
		{"DELETE", "/v1/volumes/db", by, "{}", "remove db by anna@b", done + "by=anna@b op=remove volume=db"},
		{
			"POST", "/v1/volumes/db/move", `{"host":"b","by":"anna@b"}`, `{"volume":"db","host":"b","node":"n/2"}`,
			`move db to "b" by anna@b`, done + "by=anna@b host=b op=move volume=db",
		},
		{
			"POST", "/v1/volumes/db/move", `{"host":"","by":"anna@b"}`, `{"volume":"db","host":"","node":"n/2"}`,
			`move db to "" by anna@b`, done + "by=anna@b host= op=move volume=db",
		},
		{"POST", "/v1/nodes/b/cordon", by, "{}", "cordon b by anna@b: true", done + "by=anna@b host=b op=cordon"},
		{"POST", "/v1/nodes/n%2F2/uncordon", by, "{}", "cordon n/2 by anna@b: false", done + "by=anna@b host=n/2 op=uncordon"},
		{
			"POST", "/v1/nodes/b/drain", by,
			`{"released":["db"],"moving":[],"busy":[{"volume":"www","containers":["web"]},{"volume":"log","detail":"leased"}]}`,
			"drain b by anna@b", done + "by=anna@b host=b op=drain",
		},
		{"DELETE", "/v1/nodes/b", by, "{}", "remove node b by anna@b", done + `by=anna@b host=b op="remove node"`},
		{
			"POST", "/v1/volumes/db/reinstate", `{"by":"anna@b"}`, `{"volume":"db"}`, "reinstate db by anna@b",
			`level=info msg="done as an operator asked" by=anna@b op=reinstate volume=db`,
		},
		{
			"POST", "/v1/cluster/accept-restore", `{"by":"anna@b","typed":"restored"}`, `{"generation":3}`, "accept-restore by anna@b",
			`level=info msg="done as an operator asked" by=anna@b generation=3 op=accept-restore`,
		},
	} {
		f.calls = nil
		status, got, logged := ask(t, f, test.method, test.path, test.body)
		if status != 200 || got != test.want {
			t.Errorf("%s: got %d %s, want 200 %s", test.path, status, got, test.want)
		}
		if len(f.calls) != 1 || f.calls[0] != test.call {
			t.Errorf("%s: driver saw %q, want %s", test.path, f.calls, test.call)
		}
		if logged != test.logged {
			t.Errorf("%s: logged %s, want %s", test.path, logged, test.logged)
		}
	}
}

// What the driver refuses, and how that is answered.
func TestFailures(t *testing.T) {
	live := &ownership.LiveError{Host: "a"}
	const confirm, reinstate, accept = "/v1/nodes/a/confirm-dead", "/v1/volumes/db/reinstate", "/v1/cluster/accept-restore"
	for _, test := range []struct {
		path, body string
		err        error
		status     int
		want       string
	}{
		{confirm, `{"by":"anna@b"}`, errAway, 503, unavailable},
		{confirm, `{"by":"anna@b"}`, fmt.Errorf("declare host a dead: %w", live), 409, "host a answers (its lease in etcd is valid), so it is not dead: " +
			"stop the containers there, and other hosts can mount their volumes; to force it nevertheless: docker flocker node confirm-dead a --force"},
		{"/v1/nodes/n1/confirm-dead", `{"by":"anna@b"}`, live, 409, "host a answers (its lease in etcd is valid), so it is not dead: " +
			"stop the containers there, and other hosts can mount their volumes; to force it nevertheless: docker flocker node confirm-dead n1 --force"},
		{confirm, `{"by":"anna@b"}`, errors.New("the value of host a is broken"), 500, "the value of host a is broken"},
		{reinstate, `{"by":"anna@b"}`, fmt.Errorf("volume db: %w", ownership.ErrNotFound), 404, "volume db: no such volume"},
		{reinstate, `{"by":"anna@b"}`, fmt.Errorf("volume db: %w", ownership.ErrConflict), 409, "volume db: changed by another node"},
		{reinstate, `{"by":"anna@b"}`, errAway, 503, unavailable},
		{accept, `{"by":"anna@b","typed":"restored"}`, errAway, 503, unavailable},
		{"/v1/volumes", `{"name":"db","by":"anna@b"}`, &driver.InvalidError{Err: errors.New("size is odd")}, 400, "size is odd"},
		{"/v1/volumes", `{"name":"db","by":"anna@b"}`, &ownership.RefusedError{Text: "the name db is in use"}, 409, "the name db is in use"},
		{"/v1/volumes/db/move", `{"host":"c","by":"anna@b"}`, fmt.Errorf("volume db: %w", &ownership.NoHostError{Host: "c", Known: []string{"a", "b"}}), 404, `volume db: no host \"c\" is known; there are: a, b`},
		{"/v1/volumes/db/move", `{"host":"c","by":"anna@b"}`, fmt.Errorf("volume db: %w", &ownership.AmbiguousError{Host: "c", IDs: []string{"n1", "n2"}}), 409, `volume db: 2 nodes have the host name c; say which one by its id: n1, n2`},
		{"/v1/volumes/db/move", `{"host":"c","by":"anna@b"}`, fmt.Errorf("volume db: %w", &ownership.NodeStateError{Node: ownership.Node{Host: "c", State: "lost"}}), 409, `volume db: host c is marked lost in the cluster: choose another host`},
		{"/v1/volumes/db/move", `{"host":"c","by":"anna@b"}`, &ownership.PhaseError{Volume: ownership.Volume{Name: "db", Phase: ownership.PhaseQuarantined, Reason: "torn"}}, 409, "volume db is quarantined: torn"},
		{"/v1/nodes/c/cordon", `{"by":"anna@b"}`, &ownership.NoHostError{Host: "c", Known: []string{"a"}}, 404, `no host \"c\" is known; there are: a`},
		{"/v1/nodes/a/drain", `{"by":"anna@b"}`, &ownership.BusyError{Volume: "db", Reply: ownership.Reply{Host: "a"}}, 409, "volume db is in use on host a"},
		{"/v1/nodes/a/cordon", `{"by":"anna@b"}`, &ownership.LeasedError{Lease: ownership.Lease{Volume: "v1", Node: "n1"}}, 409, "volume v1 is leased to node n1 until it is given back"},
	} {
		f := &fake{nodes: known(), err: test.err}
		status, got, logged := ask(t, f, "POST", test.path, test.body)
		if want := `{"error":"` + test.want + `"}`; status != test.status || got != want {
			t.Errorf("%s %v:\ngot  %d %s\nwant %d %s", test.path, test.err, status, got, test.status, want)
		}
		if !strings.HasPrefix(logged, `level=warning msg="an operator's request failed"`) {
			t.Errorf("%s %v: logged %s", test.path, test.err, logged)
		}
	}
	for path, method := range map[string]string{"/v1/nodes": "GET", confirm: "POST"} {
		f := &fake{nodesErr: errAway}
		if status, got, _ := ask(t, f, method, path, `{"by":"anna@b"}`); status != 503 || got != `{"error":"`+unavailable+`"}` || len(f.calls) > 0 {
			t.Errorf("%s: got %d %s, driver saw %q", path, status, got, f.calls)
		}
	}
}

// Requests that are wrong by themselves never reach the driver.
func TestRefused(t *testing.T) {
	const confirm, reinstate, accept = "/v1/nodes/a/confirm-dead", "/v1/volumes/db/reinstate", "/v1/cluster/accept-restore"
	long := strings.Repeat("x", 1001)
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", confirm, `{"by":"anna@b","force":true}`, 400, `to force it, the host's name has to be typed a second time, and "" is not "a": docker flocker node confirm-dead a --force --confirm a`},
		{"POST", confirm, `{"by":"anna@b","force":true,"typed":"A"}`, 400, `to force it, the host's name has to be typed a second time, and "A" is not "a": docker flocker node confirm-dead a --force --confirm a`},
		{"POST", confirm, `{}`, 400, "by is missing: say who declares the host dead"},
		{"POST", "/v1/nodes/c/confirm-dead", `{"by":"anna@b"}`, 404, `there is no host "c": docker flocker node ls shows those there are`},
		{"POST", "/v1/nodes/twin/confirm-dead", `{"by":"anna@b"}`, 409, `2 nodes have the host name twin: use the id of the one you mean, n3 or n4`},
		{"POST", confirm, `{"by":"` + long + `"}`, 400, "by is longer than 1000 bytes: shorten it"},
		{"POST", confirm, `{"because":"` + long + `"}`, 400, "because is longer than 1000 bytes: shorten it"},
		{"POST", confirm, `{"because":"a\nb"}`, 400, "because has line breaks or other control characters: leave them out"},
		{"POST", confirm, "", 400, "the request's body is not what it should be: EOF"},
		{"POST", confirm, "[]", 400, "the request's body is not what it should be: json: cannot unmarshal array into Go value of type api.Confirmation"},
		{"POST", confirm, `{"by":"anna@b","forced":true}`, 400, `the request's body is not what it should be: json: unknown field "forced"`},
		{"POST", confirm, `{"by":"anna@b"} {}`, 400, "the request's body goes on after its JSON object"},
		{"POST", confirm, `{"by":"` + strings.Repeat("x", 64<<10) + `"}`, 413, "the request's body is larger than 64 KiB"},
		{"POST", accept, `{}`, 400, `to accept what was restored, the word "restored" has to be typed, and "" is not it: docker flocker cluster accept-restore --confirm restored`},
		{"POST", accept, `{"typed":"yes"}`, 400, `to accept what was restored, the word "restored" has to be typed, and "yes" is not it: docker flocker cluster accept-restore --confirm restored`},
		{"POST", accept, `{"typed":"restored"}`, 400, "by is missing: say who accepts what was restored"},
		{"POST", accept, `{"typed":"restored","by":"a\nb"}`, 400, "by has line breaks or other control characters: leave them out"},
		{"POST", reinstate, `{}`, 400, "by is missing: say who reinstates the volume"},
		{"POST", "/v1/volumes", `{"name":"db"}`, 400, "by is missing: say who creates the volume"},
		{"DELETE", "/v1/volumes/db", `{}`, 400, "by is missing: say who removes the volume"},
		{"DELETE", "/v1/volumes/db", "", 400, "the request's body is not what it should be: EOF"},
		{"POST", "/v1/volumes/db/move", `{"host":"a"}`, 400, "by is missing: say who moves the volume"},
		{"POST", "/v1/volumes/db/move", `{"by":"anna@b"}`, 400, `host is missing: say where the volume is to be; "" is nowhere`},
		{"POST", "/v1/nodes/a/cordon", `{}`, 400, "by is missing: say who cordons the host"},
		{"POST", "/v1/nodes/a/uncordon", `{}`, 400, "by is missing: say who uncordons the host"},
		{"POST", "/v1/nodes/a/drain", `{}`, 400, "by is missing: say who drains the host"},
		{"DELETE", "/v1/nodes/a", `{}`, 400, "by is missing: say who removes the host"},
		{"POST", reinstate, "", 400, "the request's body is not what it should be: EOF"},
		{"GET", confirm, `{"by":"anna@b"}`, 404, "there is no request GET /v1/nodes/a/confirm-dead: is docker-flocker newer than the plugin?"},
		{"POST", "/v2/nodes", "", 404, "there is no request POST /v2/nodes: is docker-flocker newer than the plugin?"},
		{"GET", "/", "", 404, "there is no request GET /: is docker-flocker newer than the plugin?"},
	} {
		f := &fake{nodes: append(known(), ownership.NodeStatus{Node: ownership.Node{ID: "n3", Host: "twin"}}, ownership.NodeStatus{Node: ownership.Node{ID: "n4", Host: "twin"}})}
		status, got, logged := ask(t, f, test.method, test.path, test.body)
		want := `{"error":"` + strings.ReplaceAll(test.want, `"`, `\"`) + `"}`
		if status != test.status || got != want {
			t.Errorf("%s %.60s:\ngot  %d %s\nwant %d %s", test.path, test.body, status, got, test.status, want)
		}
		if len(f.calls) > 0 || logged != "" {
			t.Errorf("%s %.60s: driver saw %q, logged %s", test.path, test.body, f.calls, logged)
		}
	}
}

// An etcd that hangs does not hang the operator.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		status, got, _ := ask(t, &fake{wait: true}, "POST", "/v1/volumes/db/reinstate", `{"by":"anna@b"}`)
		if want := `{"error":"ownership cannot be checked: not done within 20s"}`; status != 503 || got != want {
			t.Errorf("got %d %s, want 503 %s", status, got, want)
		}
		if took := time.Since(start); took != 20*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// FuzzBody: nothing but a whole, known object gets to the driver, and every answer
// is JSON.
func FuzzBody(f *testing.F) {
	for _, body := range []string{"", "{}", "null", `{"by":"a"}`, `{"by":"a","force":true,"typed":"a"}`, `{"by":1}`, `{"by":"a"}x`, "\x00"} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		d := &fake{nodes: known()}
		status, got, _ := ask(t, d, http.MethodPost, "/v1/nodes/a/confirm-dead", body)
		if (status == 200) != (len(d.calls) == 1) {
			t.Errorf("%q: got %d %s, driver saw %q", body, status, got, d.calls)
		}
		var asked api.Confirmation
		if d.death.Forced && (json.Unmarshal([]byte(body), &asked) != nil || asked.Typed != "a") {
			t.Errorf("%q: forced, and the host was not typed", body)
		}
		if !strings.HasPrefix(got, `{"`) {
			t.Errorf("%q: got %d %s", body, status, got)
		}
	})
}
