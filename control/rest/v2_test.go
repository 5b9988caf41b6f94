package rest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// errorsWithStatus are what a driver fails with.
var errorsWithStatus = map[error]struct {
	status int
	text   string
}{
	fmt.Errorf("%w: etcd is away", ownership.ErrUnavailable):                                                    {503, "ownership cannot be checked: etcd is away."},
	fmt.Errorf("asking: %w", context.DeadlineExceeded):                                                          {503, "asking: context deadline exceeded."},
	fmt.Errorf("%w: db", ownership.ErrNotFound):                                                                 {404, ""},
	fmt.Errorf("%w", ownership.ErrConflict):                                                                     {409, "changed by another node."},
	&driver.InvalidError{Err: errors.New("size 1 is too small")}:                                                {400, "size 1 is too small."},
	&ownership.HeldError{Owner: ownership.Owner{Host: "beta"}}:                                                  {409, "is owned by host beta"},
	&ownership.PhaseError{Volume: ownership.Volume{Name: "db", Phase: ownership.PhaseQuarantined, Reason: "r"}}: {409, "volume db is quarantined: r."},
	errors.New("the storage has burnt down"):                                                                    {500, "the storage has burnt down."},
}

func problem(status int, detail string) string {
	return fmt.Sprintf(`{"type":"about:blank","title":"%s","status":%d,"detail":%s}`, http.StatusText(status), status, quoted(detail))
}

func quoted(s string) string { return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"` }

func vol(name, id, rest string) string {
	return `{"name":"` + name + `","id":"` + id + `",` + rest + `,"bytes":10737418240,"filesystem":"ext4","backend":"loopback","created":"2026-11-22T12:00:00Z"}`
}

const mountedOnAlpha = `"state":"mounted","owner":{"node":"` + alpha + `","host":"alpha","live":true,"token":7},` +
	`"placement":{"node":"` + alpha + `","host":"alpha","by":"user-anna","at":"0001-01-01T00:00:00Z"},` +
	`"mounted":{"node":"` + alpha + `","path":"/flocker/mnt/` + id1 + `/data","since":"0001-01-01T00:00:00Z"}`

func TestV2(t *testing.T) {
	for _, c := range []struct {
		name               string
		method, path, body string
		status             int
		answer             string
		call               string // the last one
	}{
		{"version", "GET", "/v2/version", "", 200, `{"version":"2.0.0"}`, ""},
		{"a volume", "GET", "/v2/volumes/db", "", 200, vol("db", id1, `"state":"free"`), ""},
		{"no volume", "GET", "/v2/volumes/web", "", 404, problem(404, `There is no volume \"web\".`), ""},
		{"a misspelt parameter", "GET", "/v2/volumes?lable=a", "", 400, problem(400, "There is no parameter lable here; there are: limit, after, label."), ""},
		{"a parameter of the version", "GET", "/v2/version?v=1", "", 400, problem(400, "There is no parameter v here; there are: none."), ""},
		{"a parameter of the description", "GET", "/v2/openapi.json?v=1", "", 400, problem(400, "There is no parameter v here; there are: none."), ""},
		{"a parameter of a node", "GET", "/v2/nodes/alpha?v=1", "", 400, problem(400, "There is no parameter v here; there are: none."), ""},
		{"a parameter of a body", "POST", "/v2/volumes/db/move?host=beta", `{"host":""}`, 400, problem(400, "There is no parameter host here; there are: none."), ""},
		{"a parameter twice", "GET", "/v2/volumes?limit=1&limit=2", "", 400, problem(400, "limit is given 2 times: give it once."), ""},
		{"a limit", "GET", "/v2/volumes?limit=1001", "", 400, problem(400, "limit=1001 is not a number from 1 to 1000."), ""},
		{"half a label", "GET", "/v2/volumes?label=a", "", 400, problem(400, "label=a is not of the form label=KEY=VALUE."), ""},
		{
			"create", "POST", "/v2/volumes", `{"name":"web","id":"` + id2 + `","options":{"size":"1"},"labels":{"a":"b"}}`, 201,
			`{"name":"web","id":"` + id2 + `","state":"free","bytes":1,"filesystem":"ext4","backend":"loopback","labels":{"a":"b"},"created":"2026-11-22T12:00:00Z"}`,
			"create web map[size:1] map[a:b] by user-anna",
		},
		{"create twice", "POST", "/v2/volumes", `{"name":"db"}`, 409, problem(409, "There is a volume db already."), ""},
		{"create with an id in use", "POST", "/v2/volumes", `{"name":"web","id":"` + strings.ToUpper(id1) + `"}`, 409, problem(409, "Id "+id1+" is in use, or was."), ""},
		{"create with a bad id", "POST", "/v2/volumes", `{"name":"web","id":"1"}`, 400, problem(400, `Id \"1\" is not a UUID of version 4: leave it out, and one is made.`), ""},
		{"create with a path", "POST", "/v2/volumes", `{"name":"../etc"}`, 400, problem(400, `Volume name \"../etc\" is not valid: use 1 to 128 letters, digits, _ . and -, beginning with a letter or digit.`), ""},
		{"create on no host", "POST", "/v2/volumes", `{"name":"web","host":"gamma"}`, 404, problem(404, `no host \"gamma\" is known; there are: alpha, beta.`), ""},
		{"an unknown field", "POST", "/v2/volumes", `{"name":"web","sise":1}`, 400, problem(400, `The request body is not what it should be: json: unknown field \"sise\".`), ""},
		{"more than a body", "POST", "/v2/volumes", `{"name":"web"}{}`, 400, problem(400, `The request body goes on after its JSON object.`), ""},
		{"move", "POST", "/v2/volumes/db/move", `{"host":"alpha"}`, 200, vol("db", id1, mountedOnAlpha), `move db to "alpha" by user-anna`},
		{"move nowhere", "POST", "/v2/volumes/db/move", `{"host":""}`, 200, vol("db", id1, `"state":"free"`), `move db to "" by user-anna`},
		{"move without a host", "POST", "/v2/volumes/db/move", ``, 400, problem(400, `host is missing: say which, or \"\" for none.`), ""},
		{"move to no host", "POST", "/v2/volumes/db/move", `{"host":"gamma"}`, 404, problem(404, `no host \"gamma\" is known; there are: alpha, beta.`), ""},
		{"move of nothing", "POST", "/v2/volumes/web/move", `{"host":"alpha"}`, 404, problem(404, `There is no volume \"web\".`), ""},
		{"delete", "DELETE", "/v2/volumes/db", "", 204, "", "remove db by user-anna"},
		{"delete that one", "DELETE", "/v2/volumes/db?id=" + id1, "", 204, "", "remove db by user-anna"},
		{"delete that one, in capitals", "DELETE", "/v2/volumes/db?id=" + strings.ToUpper(id1), "", 204, "", "remove db by user-anna"},
		{"delete another one", "DELETE", "/v2/volumes/db?id=" + id2, "", 404, problem(404, `There is no volume \"db\".`), ""},
		{"delete nothing", "DELETE", "/v2/volumes/web", "", 404, problem(404, `There is no volume \"web\".`), ""},
		{"wait for what it is", "GET", "/v2/volumes/db/wait?state=free", "", 200, vol("db", id1, `"state":"free"`), ""},
		{"wait in vain", "GET", "/v2/volumes/db/wait?state=mounted&timeout=50ms", "", 504, strings.TrimSuffix(problem(504, "Volume db is not mounted within 50ms: it is free."), "}") +
			`,"volume":` + vol("db", id1, `"state":"free"`) + `}`, ""},
		{"wait for nothing", "GET", "/v2/volumes/web/wait?state=mounted", "", 404, problem(404, `There is no volume \"web\".`), ""},
		{"wait for what is gone", "GET", "/v2/volumes/web/wait?state=gone", "", 204, "", ""},
		{"wait for no state", "GET", "/v2/volumes/db/wait?state=happy", "", 400, problem(400, "state=happy cannot be waited for: use one of free, owned, mounted, gone."), ""},
		{"wait for free on a host", "GET", "/v2/volumes/db/wait?state=free&host=alpha", "", 400, problem(400, "A volume that is free is on no host: leave host= out."), ""},
		{"wait for ever", "GET", "/v2/volumes/db/wait?state=mounted&timeout=1h", "", 400, problem(400, "timeout=1h is not a time such as 30s, of at most 1m40s."), ""},
		{"nodes", "GET", "/v2/nodes", "", 200, `{"nodes":[{"id":"` + alpha + `","host":"alpha","address":"10.0.0.1","boot":"boot-of-alpha","state":"live","volumes":0},` +
			`{"id":"` + beta + `","host":"beta","address":"10.0.0.2","boot":"boot-of-beta","state":"live","volumes":0}],"revision":101}`, ""},
		{"a node", "GET", "/v2/nodes/" + beta, "", 200, `{"id":"` + beta + `","host":"beta","address":"10.0.0.2","boot":"boot-of-beta","state":"live","volumes":0}`, ""},
		{"no node", "GET", "/v2/nodes/gamma", "", 404, problem(404, `no host \"gamma\" is known; there are: alpha, beta.`), ""},
		{"cordon", "POST", "/v2/nodes/beta/cordon", "", 200, `{"id":"` + beta + `","host":"beta","address":"10.0.0.2","boot":"boot-of-beta","state":"cordoned","volumes":0}`, "cordon " + beta + " true by user-anna"},
		{"uncordon", "POST", "/v2/nodes/beta/uncordon", "{}", 200, `{"id":"` + beta + `","host":"beta","address":"10.0.0.2","boot":"boot-of-beta","state":"live","volumes":0}`, "cordon " + beta + " false by user-anna"},
		{"cordon, and what else", "POST", "/v2/nodes/beta/cordon", `{"force":true}`, 400, problem(400, `The request body is not what it should be: json: unknown field \"force\".`), ""},
		{"drain", "POST", "/v2/nodes/beta/drain", "", 200, `{"released":["a"],"moving":[],"busy":[{"name":"b","containers":["web"]}]}`, "drain " + beta + " by user-anna"},
		{"remove a node", "DELETE", "/v2/nodes/beta", "", 204, "", "remove node " + beta + " by user-anna"},
		{"remove no node", "DELETE", "/v2/nodes/gamma", "", 404, problem(404, `no host \"gamma\" is known; there are: alpha, beta.`), ""},
		{"remove a node, and what else", "DELETE", "/v2/nodes/beta?force=true", "", 400, problem(400, "There is no parameter force here; there are: none."), ""},
		{"drain nobody", "POST", "/v2/nodes/gamma/drain", "", 404, problem(404, `no host \"gamma\" is known; there are: alpha, beta.`), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t)
			s.add("db", id1)
			got := s.ask(c.method, c.path, c.body)
			want := strings.ReplaceAll(c.answer, `\\"`, `\"`)
			if got.status != c.status || got.body != want {
				t.Errorf("%d %s, want\n%d %s", got.status, got.body, c.status, want)
			}
			kind := "application/json"
			if c.status >= 400 {
				kind = "application/problem+json"
			}
			if got.status != 204 && got.header.Get("Content-Type") != kind {
				t.Errorf("content type %q, want %q", got.header.Get("Content-Type"), kind)
			}
			calls := s.asks()
			if c.call == "" && len(calls) > 0 || c.call != "" && (len(calls) == 0 || calls[len(calls)-1] != c.call) {
				t.Errorf("the driver was asked for %q, want %q", calls, c.call)
			}
			if got.status == 201 && got.header.Get("Location") != "/v2/volumes/web" {
				t.Errorf("Location: %s", got.header.Get("Location"))
			}
			s.documented(c.method, c.path, got)
		})
	}
}

func TestV2States(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	for want, with := range map[string]func(v *ownership.View){
		"owned": func(v *ownership.View) { v.Owner, v.OwnerLive = &ownership.Owner{Node: alpha, Host: "alpha"}, true },
		"owner not responding": func(v *ownership.View) {
			v.Owner, v.OwnerLive = &ownership.Owner{Node: alpha, Host: "alpha"}, false
		},
		"being taken over": func(v *ownership.View) {
			v.Owner = &ownership.Owner{Node: alpha, Host: "alpha", Pending: &ownership.Pending{Host: "beta"}}
		},
		"quarantined": func(v *ownership.View) { v.Volume.Phase, v.Volume.Reason = ownership.PhaseQuarantined, "torn" },
		"deleting":    func(v *ownership.View) { v.Volume.Phase = ownership.PhaseDeleting },
	} {
		s.view("db", func(v *ownership.View) {
			*v = ownership.View{Volume: v.Volume}
			v.Volume.Phase, v.Volume.Reason = ownership.PhaseReady, ""
			with(v)
		})
		if got := s.ask("GET", "/v2/volumes", ""); !strings.Contains(got.body, `"state":"`+want+`"`) {
			t.Errorf("%s, want %s", got.body, want)
		}
	}
}

func TestV2List(t *testing.T) {
	s := serve(t)
	for i := range 5 {
		s.add(fmt.Sprint("v", i), "")
	}
	s.view("v1", func(v *ownership.View) { v.Volume.Labels = map[string]string{"team": "a", "env": "test"} })
	s.view("v3", func(v *ownership.View) { v.Volume.Labels = map[string]string{"team": "a"} })
	type page struct {
		Volumes  []struct{ Name string }
		Next     string
		Revision int64
	}
	for query, want := range map[string]struct {
		names string
		next  string
	}{
		"":                                 {"v0 v1 v2 v3 v4", ""},
		"?limit=2":                         {"v0 v1", "v1"},
		"?limit=2&after=v1":                {"v2 v3", "v3"},
		"?limit=2&after=v3":                {"v4", ""},
		"?limit=5":                         {"v0 v1 v2 v3 v4", ""},
		"?after=v11":                       {"v2 v3 v4", ""}, // which there is none of
		"?after=z":                         {"", ""},
		"?label=team%3Da":                  {"v1 v3", ""},
		"?label=team%3Da&limit=1":          {"v1", "v1"},
		"?label=team%3Da&label=env%3Dtest": {"v1", ""},
		"?label=team%3Db":                  {"", ""},
		"?label=team%3D":                   {"", ""},
	} {
		got := s.ask("GET", "/v2/volumes"+query, "")
		var p page
		got.decode(t, &p)
		names := []string{}
		for _, v := range p.Volumes {
			names = append(names, v.Name)
		}
		if got.status != 200 || strings.Join(names, " ") != want.names || p.Next != want.next || p.Revision != s.state.Revision {
			t.Errorf("%s: %d %s, want %s", query, got.status, got.body, want)
		}
		s.documented("GET", "/v2/volumes", got)
	}
}

// A wait ends when the volume gets there, and is not fooled by another of its name.
func TestV2Wait(t *testing.T) {
	s := serve(t)
	for _, c := range []struct {
		query  string
		change func()
		status int
	}{
		{"state=mounted&host=beta", func() { _, _ = s.MoveVolume(t.Context(), "db", id1, "beta", "") }, 200},
		{"state=owned&host=" + beta, func() { _, _ = s.MoveVolume(t.Context(), "db", id1, "beta", "") }, 200},
		{"state=gone", func() { _ = s.RemoveVolume(t.Context(), "db", id1) }, 204},
		{"state=mounted", func() { _ = s.RemoveVolume(t.Context(), "db", id1) }, 404},
		{"state=gone", func() {
			s.change("", "", "", func(st *ownership.State) { st.Views[0].Volume.ID = id2 })
		}, 204},
		{"state=mounted", func() {
			s.change("", "", "", func(st *ownership.State) { st.Views[0].Volume.ID = id2 })
		}, 404},
	} {
		s.change("", "", "", func(st *ownership.State) { st.Views = nil })
		s.add("db", id1)
		done, before := make(chan reply, 1), s.waited()
		go func() {
			got, _ := send(t, s.client("anna"), "GET", s.url("/v2/volumes/db/wait?timeout=60s&"+c.query), "")
			done <- got
		}()
		for s.waited() == before {
			select {
			case got := <-done:
				t.Fatalf("%s: at once %d %s", c.query, got.status, got.body)
			case <-time.After(time.Millisecond):
			}
		}
		c.change()
		select {
		case got := <-done:
			if got.status != c.status {
				t.Errorf("%s: %d %s, want %d", c.query, got.status, got.body, c.status)
			}
		case <-time.After(2 * long):
			t.Errorf("%s: no answer", c.query)
		}
	}
}

// What a volume is not is not waited for as if it were.
func TestV2WaitInVain(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	for _, c := range []struct {
		query string
		live  bool
		state string
	}{
		{"state=mounted", true, "owned"},
		{"state=free", true, "owned"},
		{"state=owned&host=beta", true, "owned"},
		{"state=owned", false, "owner not responding"},
	} {
		s.view("db", func(v *ownership.View) {
			v.Owner, v.OwnerLive = &ownership.Owner{Volume: id1, Node: alpha, Host: "alpha", Token: 7}, c.live
		})
		got := s.ask("GET", "/v2/volumes/db/wait?timeout=50ms&"+c.query, "")
		if got.status != 504 || !strings.Contains(got.body, "within 50ms: it is "+c.state+".") {
			t.Errorf("%s: %d %s, want 504, it is %s", c.query, got.status, got.body, c.state)
		}
	}
}

// A stream of events, as it comes over the line.
type stream struct {
	t    *testing.T
	in   *bufio.Reader
	stop func()
}

func (s *service) stream(t *testing.T, path string, header ...string) *stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*long)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "GET", s.url(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := s.client("rita").Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || kind != "text/event-stream" {
		t.Fatalf("%d %s", resp.StatusCode, kind)
	}
	out := &stream{t, bufio.NewReader(resp.Body), cancel}
	if got := out.block(); len(got) != 1 || !strings.HasPrefix(got[0], ": the events after revision ") {
		t.Fatalf("it begins with %q", got)
	}
	return out
}

// block reads up to the next empty line.
func (s *stream) block() (lines []string) {
	s.t.Helper()
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			s.t.Fatalf("after %q: %v", lines, err)
		}
		if line = strings.TrimSuffix(line, "\n"); line == "" {
			return lines
		}
		lines = append(lines, line)
	}
}

func TestEvents(t *testing.T) {
	s := serve(t)
	s.add("old", id2)
	before := s.state.Revision
	live := s.stream(t, "/v2/events")
	s.add("db", id1)
	first := live.block()
	if len(first) != 3 || first[0] != fmt.Sprintf("id: %d", before+1) || first[1] != "event: create" ||
		!strings.HasPrefix(first[2], `data: {"revision":`+fmt.Sprint(before+1)+`,"at":"`) || !strings.HasSuffix(first[2], `","what":"create","volume":"db","node":"`+alpha+`","host":"alpha"}`) {
		t.Errorf("the first event is %q", first)
	}
	if err := s.RemoveVolume(t.Context(), "db", id1); err != nil {
		t.Fatal(err)
	}
	second := live.block()
	if second[1] != "event: delete" {
		t.Errorf("the second event is %q", second)
	}
	// Whoever was cut off goes on where he was; the header of the browser wins.
	live.stop()
	last := strings.TrimPrefix(first[0], "id: ")
	if got := s.stream(t, "/v2/events?after=0", "Last-Event-ID", last).block(); !slices.Equal(got, second) {
		t.Errorf("after %s comes %q, want %q", last, got, second)
	}
	if got := s.stream(t, "/v2/events?after="+last).block(); !slices.Equal(got, second) {
		t.Errorf("after=%s: %q, want %q", last, got, second)
	}
	// And as pages.
	for path, want := range map[string][]string{
		"/v2/events":                                  {"create", "create", "delete"},
		"/v2/events?limit=1":                          {"create"},
		"/v2/events?after=" + last:                    {"delete"},
		"/v2/events?limit=5&after=" + fmt.Sprint(1e6): nil,
	} {
		got := s.ask("GET", strings.ReplaceAll(path, "1e+06", "1000000"), "")
		var page struct {
			Events []struct{ What string }
			Next   int64
		}
		got.decode(t, &page)
		var whats []string
		for _, e := range page.Events {
			whats = append(whats, e.What)
		}
		if got.status != 200 || !slices.Equal(whats, want) || page.Next <= 0 {
			t.Errorf("%s: %d %s, want %q", path, got.status, got.body, want)
		}
		s.documented("GET", "/v2/events", got)
	}
	// The header of a stream is no page's.
	got := s.ask("GET", "/v2/events?limit=1", "", "Last-Event-ID", last)
	if !strings.Contains(got.body, `"volume":"old"`) {
		t.Errorf("a page with Last-Event-ID is %s", got.body)
	}
	got = s.ask("GET", "/v2/events?after=x", "")
	if want := problem(400, "after=x is not a revision, as the events have."); got.status != 400 || got.body != want {
		t.Errorf("%d %s, want %s", got.status, got.body, want)
	}
}

// Two audit lines of one revision: whoever is cut off between them gets both again.
func TestEventsOfOneRevision(t *testing.T) {
	s := serve(t)
	live := s.stream(t, "/v2/events")
	s.change("", "", "", func(st *ownership.State) {
		for _, what := range []string{"one", "two"} {
			s.events = append(s.events, ownership.Event{Revision: st.Revision, What: what, Node: alpha})
		}
	})
	if got := live.block(); len(got) != 2 || got[0] != "event: one" {
		t.Errorf("the first is %q", got)
	}
	if got := live.block(); len(got) != 3 || got[0] != fmt.Sprintf("id: %d", s.state.Revision) || got[1] != "event: two" {
		t.Errorf("the second is %q", got)
	}
}

// Events that are gone are said to be, with from where there are some.
func TestEventsGone(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.base = 100
	want := strings.TrimSuffix(problem(410, "events before revision 101 are gone: they are kept for 7 days."), "}") + `,"next":100}`
	for _, accept := range []string{"application/json", "text/event-stream"} {
		got := s.ask("GET", "/v2/events?after=50", "", "Accept", accept)
		if got.status != 410 || got.body != want {
			t.Errorf("%s: %d %s, want %s", accept, got.status, got.body, want)
		}
	}
	live := s.stream(t, "/v2/events?after=101")
	s.change("", "", "", func(*ownership.State) { s.base = 1000 })
	if got := live.block(); len(got) != 2 || got[0] != "event: lagging" || !strings.Contains(got[1], `"status":410,"detail":"events before revision 1001 are gone: they are kept for 7 days.","next":1000}`) {
		t.Errorf("a stream that is behind ends with %q", got)
	}
	if line, err := live.in.ReadString('\n'); err == nil {
		t.Errorf("it goes on with %q", line)
	}
}

// A client that goes away mid-stream leaves nothing behind, so that others can follow.
func TestEventClientsGo(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	client := s.client("rita")
	for i := range 300 { // more than may follow at a time
		ctx, cancel := context.WithTimeout(t.Context(), long)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url("/v2/events"), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "text/event-stream")
		resp, err := client.Do(req)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("client %d: %v, %v", i, resp, err)
		}
		cancel()
		_ = resp.Body.Close()
	}
}

// Of two hosts that make a volume at the same time, one is told that it has, and the other
// that there is one.
func TestCreateAtOnce(t *testing.T) {
	for _, c := range []struct{ path, body, first, answer string }{
		{datasetsPath, `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","metadata":{"name":"db"}}`, id1, `{"description":"The provided dataset_id is already in use."}`},
		{datasetsPath, `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","metadata":{"name":"db"}}`, id2, `{"description":"The name \"db\" is in use by dataset ` + id2 + `."}`},
		{"/v2/volumes", `{"name":"db","id":"` + id1 + `"}`, id1, problem(409, "Id "+id1+" is in use, or was.")},
		{"/v2/volumes", `{"name":"db","id":"` + id1 + `"}`, id2, problem(409, "There is a volume db already.")},
	} {
		s := serve(t)
		s.first = &c.first
		if got := s.ask("POST", c.path, c.body); got.status != 409 || got.body != c.answer {
			t.Errorf("%s: %d %s, want %s", c.body, got.status, got.body, c.answer)
		}
		if calls := strings.Join(s.asks(), ", "); strings.Contains(calls, "move") {
			t.Errorf("the driver was asked for %s", calls)
		}
	}
}

// A host that has gone or was cordoned since this one has heard of it is refused as if it had
// been known.
func TestHostsSince(t *testing.T) {
	nobody := fmt.Errorf("volume db: %w", &ownership.NoHostError{Host: beta, Known: []string{"alpha"}})
	cordoned := fmt.Errorf("volume db: %w", &ownership.NodeStateError{Node: ownership.Node{Host: "beta", State: ownership.Cordoned}})
	removed := fmt.Errorf("volume db: %w", &ownership.NodeStateError{Node: ownership.Node{Host: "beta", State: ownership.Removed}})
	twice := &ownership.AmbiguousError{Host: "beta", IDs: []string{"n1", "n2"}}
	v1 := func(text string) string { return `{"description":` + quoted(text) + `}` }
	const (
		primary = `{"primary":"` + beta + `"}`
		lease   = `{"dataset_id":"` + id1 + `","node_uuid":"` + beta + `","expires":null}`
	)
	for _, c := range []struct {
		path, body string
		err        error
		status     int
		answer     string
	}{
		{datasetsPath + "/" + id1, primary, nobody, 400, v1("The provided primary node is not part of the cluster.")},
		{datasetsPath + "/" + id1, primary, cordoned, 400, v1("Host beta is cordoned: choose another node.")},
		{datasetsPath + "/" + id1, primary, removed, 400, v1("The provided primary node is not part of the cluster.")},
		{leasesPath, lease, nobody, 400, v1("The provided primary node is not part of the cluster.")},
		{"/v2/volumes/db/move", `{"host":"beta"}`, nobody, 404, problem(404, `volume db: no host "`+beta+`" is known; there are: alpha.`)},
		{"/v2/volumes/db/move", `{"host":"beta"}`, twice, 409, problem(409, "2 nodes have the host name beta; say which one by its id: n1, n2.")},
		{"/v2/nodes/beta/cordon", "", &ownership.NodeStateError{Node: ownership.Node{Host: "beta", State: "lost"}}, 409, problem(409, "host beta is marked lost in the cluster: choose another host.")},
		{"/v2/nodes/beta/cordon", "", twice, 409, problem(409, "2 nodes have the host name beta; say which one by its id: n1, n2.")},
	} {
		s := serve(t)
		s.add("db", id1)
		s.placing = c.err
		if got := s.ask("POST", c.path, c.body); got.status != c.status || got.body != c.answer {
			t.Errorf("%s, %v:\n%d %s, want\n%d %s", c.path, c.err, got.status, got.body, c.status, c.answer)
		}
	}
	// Two of a name that this host knows of.
	s := serve(t)
	s.change("", "", "", func(st *ownership.State) { st.Nodes[1].Host = "alpha" })
	if got := s.ask("GET", "/v2/nodes/alpha", ""); got.status != 409 || got.body != problem(409, "2 nodes have the host name alpha; say which one by its id: "+alpha+", "+beta+".") {
		t.Errorf("%d %s", got.status, got.body)
	}
	if got := s.ask("GET", "/v2/nodes/"+beta, ""); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// A volume that was made is answered as made, also if by then its host gets nothing more, or
// etcd does not answer: who is refused thinks that there is none.
func TestMadeAndPlacedNowhere(t *testing.T) {
	for _, err := range []error{
		fmt.Errorf("volume web: %w", &ownership.NodeStateError{Node: ownership.Node{Host: "beta", State: ownership.Cordoned}}),
		fmt.Errorf("volume web: %w", &ownership.NoHostError{Host: beta}),
		fmt.Errorf("%w: etcd does not answer", ownership.ErrUnavailable),
	} {
		s := serve(t)
		s.placing = err
		s.want("POST", datasetsPath, `{"dataset_id":"`+id1+`","primary":"`+beta+`"}`, 201, row(id1, "00000000-0000-0000-0000-000000000000", false, `{}`))
		s.want("GET", datasetsPath, "", 200, "["+row(id1, "00000000-0000-0000-0000-000000000000", false, `{}`)+"]")
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240}]`)
		got := s.ask("POST", "/v2/volumes", `{"name":"web","id":"`+id2+`","host":"beta"}`)
		if want := vol("web", id2, `"state":"free","detail":"it is to be on no host yet: `+strings.ReplaceAll(err.Error(), `"`, `\"`)+`"`); got.status != 201 || got.body != want || got.header.Get("Location") != "/v2/volumes/web" {
			t.Errorf("%d %s (Location: %s), want %s", got.status, got.body, got.header.Get("Location"), want)
		}
		s.documented("POST", "/v2/volumes", got)
		if log := s.log.String(); strings.Count(log, "a volume was made, and is to be on no host yet") != 2 {
			t.Errorf("the log says\n%s", log)
		}
		// The client goes on from there.
		s.placing = nil
		s.want("POST", datasetsPath+"/"+id1, `{"primary":"`+alpha+`"}`, 200, row(id1, alpha, false, `{}`))
	}
}

// A volume whose host was killed while it made it is shown as what it is, and can be removed,
// or used, which finishes it.
func TestHalfMade(t *testing.T) {
	half := func(t *testing.T) *service {
		t.Helper()
		s := serve(t)
		s.add("db", id1)
		s.view("db", func(v *ownership.View) { v.Volume.Phase = ownership.PhaseCreating })
		return s
	}
	const nowhere = "00000000-0000-0000-0000-000000000000"
	t.Run("is shown", func(t *testing.T) {
		s := half(t)
		s.want("GET", datasetsPath, "", 200, "["+row(id1, nowhere, false, `{"name":"db"}`)+"]")
		s.want("GET", statePath, "", 200, "[]")
		want := vol("db", id1, `"state":"creating","detail":"if the host that makes it was stopped, the next mount finishes it, and it can be removed"`)
		if got := s.ask("GET", "/v2/volumes/db", ""); got.status != 200 || got.body != want {
			t.Errorf("%d %s, want %s", got.status, got.body, want)
		}
		if got := s.ask("GET", "/v2/volumes", ""); got.status != 200 || !strings.HasPrefix(got.body, `{"volumes":[`+want+`]`) {
			t.Errorf("%d %s, want %s", got.status, got.body, want)
		}
		if got := s.ask("GET", "/v2/volumes/db/wait?state=free&timeout=50ms", ""); got.status != 504 || !strings.Contains(got.body, "Volume db is not free within 50ms: it is creating.") {
			t.Errorf("%d %s", got.status, got.body)
		}
	})
	t.Run("is there", func(t *testing.T) {
		s := half(t)
		s.want("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`"}`, 409, `{"description":"The provided dataset_id is already in use."}`)
		s.want("POST", datasetsPath, `{"primary":"`+alpha+`","metadata":{"name":"db"}}`, 409, `{"description":"The name \"db\" is in use by dataset `+id1+`."}`)
	})
	t.Run("gets a primary", func(t *testing.T) {
		s := half(t)
		s.want("POST", datasetsPath+"/"+id1, `{"primary":"`+alpha+`"}`, 200, row(id1, alpha, false, `{"name":"db"}`))
	})
	for path, status := range map[string]int{datasetsPath + "/" + id1: 200, "/v2/volumes/db?id=" + id1: 204} {
		t.Run("DELETE "+path, func(t *testing.T) {
			s := half(t)
			if got := s.ask("DELETE", path, ""); got.status != status {
				t.Errorf("%d %s, want %d", got.status, got.body, status)
			}
			if calls := s.asks(); !slices.Equal(calls, []string{"remove db by user-anna"}) {
				t.Errorf("the driver was asked for %q", calls)
			}
		})
	}
}

func TestRemoveNode(t *testing.T) {
	s := serve(t)
	for _, text := range []string{
		"host beta is live, so it was not removed: drain it, remove its plugin, and wait until it is no longer live",
		"host beta still owns volumes, so it was not removed: db; mount them on another host first",
	} {
		s.err = &ownership.RefusedError{Text: text}
		if got := s.ask("DELETE", "/v2/nodes/beta", ""); got.status != 409 || got.body != problem(409, text+".") {
			t.Errorf("%d %s", got.status, got.body)
		}
	}
	s.err = nil
	if got := s.ask("DELETE", "/v2/nodes/"+beta, ""); got.status != 204 {
		t.Errorf("%d %s", got.status, got.body)
	}
	// What asks next sees it.
	if got := s.ask("DELETE", "/v2/nodes/beta", ""); got.status != 404 || got.body != problem(404, `no host "beta" is known; there are: alpha.`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	if got := s.ask("GET", "/v2/nodes", ""); !strings.Contains(got.body, `"state":"removed"`) {
		t.Errorf("%s", got.body)
	}
}

// Whoever deletes what somebody else is just deleting is told that there is none.
func TestV2DeletedMeanwhile(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.RemoveOnly("db")
	if got := s.ask("DELETE", "/v2/volumes/db", ""); got.status != 404 || got.body != problem(404, `There is no volume "db".`) {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// What is being deleted has its name no more, and can not be leased.
func TestBeingDeleted(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.view("db", func(v *ownership.View) { v.Volume.Phase = ownership.PhaseDeleting })
	if got := s.ask("GET", "/v2/volumes/db", ""); got.status != 404 {
		t.Errorf("%d %s", got.status, got.body)
	}
	s.want("POST", leasesPath, `{"dataset_id":"`+id1+`","node_uuid":"`+alpha+`","expires":null}`, 404, `{"description":"Dataset not found."}`)
	if got := s.ask("POST", "/v2/volumes", `{"name":"db","id":"`+id2+`"}`); got.status != 201 {
		t.Errorf("%d %s", got.status, got.body)
	}
	if got := s.ask("GET", "/v2/volumes/db", ""); got.status != 200 || !strings.Contains(got.body, id2) {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// A cordoned host is given nothing.
func TestCordoned(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.change("", "", "", func(st *ownership.State) { st.Nodes[1].State = ownership.Cordoned })
	for _, c := range []struct {
		path, body string
		status     int
		answer     string
	}{
		{datasetsPath, `{"primary":"` + beta + `"}`, 400, `{"description":"Host beta is cordoned: choose another node."}`},
		{datasetsPath + "/" + id1, `{"primary":"` + beta + `"}`, 400, `{"description":"Host beta is cordoned: choose another node."}`},
		{"/v2/volumes", `{"name":"web","host":"beta"}`, 409, problem(409, "host beta is cordoned: choose another host, or type: docker flocker node uncordon beta.")},
		{"/v2/volumes/db/move", `{"host":"` + beta + `"}`, 409, problem(409, "host beta is cordoned: choose another host, or type: docker flocker node uncordon beta.")},
	} {
		if got := s.ask("POST", c.path, c.body); got.status != c.status || got.body != c.answer {
			t.Errorf("%s: %d %s, want %d %s", c.path, got.status, got.body, c.status, c.answer)
		}
	}
	if calls := s.asks(); len(calls) > 0 {
		t.Errorf("the driver was asked for %q", calls)
	}
}
