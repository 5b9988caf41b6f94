package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

const (
	containerID = "4d1e0123456789abcdef0123456789abcdef0123456789abcdef0123456789ab"
	bodyLost    = "request body lost in Docker's retry (moby#39331); please retry the command"
)

// fakeVerbs notes what reaches it, as "Verb name id", and answers what it is told.
type fakeVerbs struct {
	mu    sync.Mutex
	calls []string
	// hook, if set, runs in each verb; its error is the verb's.
	hook    func(ctx context.Context, verb, name string) error
	options map[string]string
	volume  driver.Volume
	volumes []driver.Volume
}

func (f *fakeVerbs) call(ctx context.Context, verb, name string, more ...string) error {
	f.mu.Lock()
	if by := ownership.Wanted(ctx); by != "docker" && verb != "Activated" {
		more = append(more, "by "+by)
	}
	f.calls = append(f.calls, strings.Join(append([]string{verb, name}, more...), " "))
	f.mu.Unlock()
	if f.hook != nil {
		return f.hook(ctx, verb, name)
	}
	return nil
}

func (f *fakeVerbs) seen() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.calls, ", ")
}

func (f *fakeVerbs) Create(ctx context.Context, name string, options map[string]string) error {
	f.options = options
	return f.call(ctx, "Create", name)
}

func (f *fakeVerbs) Remove(ctx context.Context, name string) error {
	return f.call(ctx, "Remove", name)
}

func (f *fakeVerbs) Mount(ctx context.Context, name, id string) (string, error) {
	return "/flocker/mnt/" + name, f.call(ctx, "Mount", name, id)
}

func (f *fakeVerbs) Unmount(ctx context.Context, name, id string) error {
	return f.call(ctx, "Unmount", name, id)
}

func (f *fakeVerbs) Path(ctx context.Context, name string) (string, error) {
	return "/flocker/mnt/" + name, f.call(ctx, "Path", name)
}

func (f *fakeVerbs) Get(ctx context.Context, name string) (driver.Volume, error) {
	return f.volume, f.call(ctx, "Get", name)
}

func (f *fakeVerbs) List(ctx context.Context) ([]driver.Volume, error) {
	return f.volumes, f.call(ctx, "List", "")
}
func (f *fakeVerbs) Activated() { f.call(context.Background(), "Activated", "") } //nolint:errcheck // it returns none

// pipes is a listener in memory.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
		return client, nil
	case <-p.closed:
		return nil, errors.New("connection refused")
	}
}

// rig is a server on a socket in memory, with what it logs.
type rig struct {
	*server
	verbs  *fakeVerbs
	l      *pipes
	client *http.Client
	stop   func() // drain, and wait for its end

	out, errout *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newRig(tb testing.TB, f *fakeVerbs) *rig {
	tb.Helper()
	r := &rig{verbs: f, l: newPipes(), out: &lockedBuffer{}, errout: &lockedBuffer{}}
	r.server = newServer(100*time.Second, newLog(r.out, logrus.DebugLevel), r.errout)
	if f != nil {
		r.use(f)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.serve(ctx, r.l) }()
	transport := &http.Transport{DialContext: r.l.dial}
	r.client = &http.Client{Transport: transport}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Errorf("serve: %v", err)
		}
		transport.CloseIdleConnections()
	})
	tb.Cleanup(r.stop)
	return r
}

// post sends what Docker sends and returns the status and the body.
func (r *rig) post(tb testing.TB, path, body string) (int, string) {
	tb.Helper()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://plugin.moby.localhost"+path, strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.docker.plugins.v1.2+json")
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	if ct := resp.Header.Get("Content-Type"); ct != "application/vnd.docker.plugins.v1.2+json" {
		tb.Errorf("%s: content type %q", path, ct)
	}
	return resp.StatusCode, strings.TrimSuffix(string(got), "\n")
}

// The bodies are byte for byte what Docker sends.
func TestVerbs(t *testing.T) {
	created := time.Date(2026, 1, 2, 4, 4, 5, 6, time.FixedZone("", 3600))
	volumes := []driver.Volume{
		{Name: "v1", Mountpoint: "/flocker/mnt/v1", CreatedAt: created, Status: map[string]any{"size": "10GiB"}},
		{Name: "v2"},
	}
	down := errors.New("ownership cannot be checked: <etcd> is away")
	notFound := fmt.Errorf("volume v1: %w", ownership.ErrNotFound)
	tests := []struct {
		name, path, body string
		err              error
		volumes          []driver.Volume
		status           int
		want, calls      string
	}{
		{name: "activate", path: "/Plugin.Activate", status: 200, want: `{"Implements":["VolumeDriver"]}`, calls: "Activated "},
		{name: "capabilities", path: "/VolumeDriver.Capabilities", body: "{}\n", status: 200, want: `{"Capabilities":{"Scope":"global"}}`},
		{name: "capabilities again", path: "/VolumeDriver.Capabilities", status: 200, want: `{"Capabilities":{"Scope":"global"}}`},
		{name: "create", path: "/VolumeDriver.Create", body: `{"Name":"v1","Opts":{"size":"10"}}` + "\n", status: 200, want: `{}`, calls: "Create v1"},
		{name: "create without options", path: "/VolumeDriver.Create", body: `{"Name":"v1","Opts":null}` + "\n", status: 200, want: `{}`, calls: "Create v1"},
		{name: "create fails", path: "/VolumeDriver.Create", body: `{"Name":"v1","Opts":null}` + "\n", err: down, status: 500, want: `{"Err":"ownership cannot be checked: <etcd> is away"}`, calls: "Create v1"},
		{name: "remove", path: "/VolumeDriver.Remove", body: `{"Name":"v1"}` + "\n", status: 200, want: `{}`, calls: "Remove v1"},
		{name: "remove fails", path: "/VolumeDriver.Remove", body: `{"Name":"v1"}` + "\n", err: down, status: 500, want: `{"Err":"ownership cannot be checked: <etcd> is away"}`, calls: "Remove v1"},
		{name: "mount", path: "/VolumeDriver.Mount", body: `{"Name":"v1","ID":"` + containerID + `"}` + "\n", status: 200, want: `{"Mountpoint":"/flocker/mnt/v1"}`, calls: "Mount v1 " + containerID},
		{name: "mount fails", path: "/VolumeDriver.Mount", body: `{"Name":"v1","ID":"` + containerID + `"}` + "\n", err: down, status: 500, want: `{"Err":"ownership cannot be checked: <etcd> is away"}`, calls: "Mount v1 " + containerID},
		{name: "unmount", path: "/VolumeDriver.Unmount", body: `{"Name":"v1","ID":"` + containerID + `"}` + "\n", status: 200, want: `{}`, calls: "Unmount v1 " + containerID},
		{name: "unmount fails", path: "/VolumeDriver.Unmount", body: `{"Name":"v1","ID":"` + containerID + `"}` + "\n", err: errors.New(""), status: 500, want: `{"Err":"unknown error"}`, calls: "Unmount v1 " + containerID},
		{name: "path", path: "/VolumeDriver.Path", body: `{"Name":"v1"}` + "\n", status: 200, want: `{"Mountpoint":"/flocker/mnt/v1"}`, calls: "Path v1"},
		{name: "get", path: "/VolumeDriver.Get", body: `{"Name":"v1"}` + "\n", volumes: volumes, status: 200, want: `{"Volume":{"Name":"v1","Mountpoint":"/flocker/mnt/v1","CreatedAt":"2026-01-02T03:04:05Z","Status":{"size":"10GiB"}}}`, calls: "Get v1"},
		{name: "get echoes the name", path: "/VolumeDriver.Get", body: `{"Name":"V1"}` + "\n", volumes: volumes[1:], status: 200, want: `{"Volume":{"Name":"V1"}}`, calls: "Get V1"},
		{name: "get of none", path: "/VolumeDriver.Get", body: `{"Name":"v1"}` + "\n", err: notFound, status: 500, want: `{"Err":"volume v1: no such volume"}`, calls: "Get v1"},
		{name: "get of a bad name", path: "/VolumeDriver.Get", body: `{"Name":"a b"}` + "\n", err: fmt.Errorf("bad name: %w", backends.ErrInvalid), status: 500, want: `{"Err":"bad name: invalid"}`, calls: "Get a b"},
		{name: "list", path: "/VolumeDriver.List", body: "{}\n", volumes: volumes, status: 200, want: `{"Volumes":[{"Name":"v1","Mountpoint":"/flocker/mnt/v1","CreatedAt":"2026-01-02T03:04:05Z"},{"Name":"v2"}]}`, calls: "List "},
		{name: "list of none", path: "/VolumeDriver.List", body: "{}\n", status: 200, want: `{"Volumes":[]}`, calls: "List "},
		{name: "list without its body", path: "/VolumeDriver.List", status: 200, want: `{"Volumes":[]}`, calls: "List "},
		{name: "list fails", path: "/VolumeDriver.List", body: "{}\n", err: down, status: 500, want: `{"Err":"ownership cannot be checked: <etcd> is away"}`, calls: "List "},
		{name: "unknown fields", path: "/VolumeDriver.Remove", body: `{"Force":[{"a":1,"a":{}}],"name":"v1"}`, status: 400, want: `{"Err":"request body: a is there twice"}`},
		{name: "unknown fields", path: "/VolumeDriver.Remove", body: `{"Force":[{"a":1,"b":{"a":[]}},"a"],"name":"v1"}`, status: 200, want: `{}`, calls: "Remove v1"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := &fakeVerbs{volumes: test.volumes, hook: func(context.Context, string, string) error { return test.err }}
			if len(test.volumes) > 0 {
				f.volume = test.volumes[0]
			}
			r := newRig(t, f)
			status, got := r.post(t, test.path, test.body)
			if status != test.status || got != test.want {
				t.Errorf("got %d %s, want %d %s", status, got, test.status, test.want)
			}
			if calls := f.seen(); calls != test.calls {
				t.Errorf("driver saw %q, want %q", calls, test.calls)
			}
		})
	}
}

func TestCreateOptions(t *testing.T) {
	f := &fakeVerbs{}
	newRig(t, f).post(t, "/VolumeDriver.Create", `{"Name":"v1","Opts":{"size":"10G","label.a":"b"}}`)
	if len(f.options) != 2 || f.options["size"] != "10G" || f.options["label.a"] != "b" {
		t.Errorf("got %v", f.options)
	}
}

var named = []string{"Create", "Remove", "Mount", "Unmount", "Path", "Get"}

func TestBadRequests(t *testing.T) {
	const mount = "/VolumeDriver.Mount"
	tests := []struct {
		name, path, body string
		status           int
		want             string
	}{
		{"empty", mount, "", 400, bodyLost},
		{"blank", mount, "\n", 400, "request body is not JSON: unexpected end of JSON input"},
		{"garbage", mount, "hello", 400, "request body is not JSON: invalid character 'h' looking for beginning of value"},
		{"cut off", mount, `{"Name":"v1"`, 400, "request body is not JSON: unexpected end of JSON input"},
		{"trailing", mount, `{"Name":"v1","ID":"1"} {}`, 400, "request body is not JSON: invalid character '{' after top-level value"},
		{"null", mount, "null", 400, "request body: Name is missing"},
		{"array", mount, "[]", 400, "request body: must be an object, not array"},
		{"text", mount, `"v1"`, 400, "request body: must be an object, not string"},
		{"no name", mount, `{"ID":"1"}`, 400, "request body: Name is missing"},
		{"no id", mount, `{"Name":"v1"}`, 400, "request body: ID is missing"},
		{"name is a number", mount, `{"Name":1,"ID":"1"}`, 400, "request body: Name must be a string, not number"},
		{"id is an object", mount, `{"Name":"v1","ID":{}}`, 400, "request body: ID must be a string, not object"},
		{"name twice", mount, `{"Name":"v1","ID":"1","Name":"v2"}`, 400, "request body: Name is there twice"},
		{"name twice in another case", mount, `{"Name":"v1","ID":"1","nAME":"v2"}`, 400, "request body: nAME is there twice"},
		{"options are a list", "/VolumeDriver.Create", `{"Name":"v1","Opts":["size"]}`, 400, "request body: Opts must be an object, not array"},
		{"option is a number", "/VolumeDriver.Create", `{"Name":"v1","Opts":{"size":10}}`, 400, "request body: the values of Opts must be strings, not number"},
		{"option twice", "/VolumeDriver.Create", `{"Name":"v1","Opts":{"size":"1G","size":"2G"}}`, 400, "request body: size is there twice"},
		{"get of garbage", "/VolumeDriver.Get", "hello", 400, "request body is not JSON: invalid character 'h' looking for beginning of value"},
		{"huge", mount, `{"Name":"` + strings.Repeat("a", maxBody) + `"}`, 413, "request body is larger than 1 MiB"},
		{"unknown endpoint", "/VolumeDriver.Frobnicate", "{}", 404, `no such endpoint: "/VolumeDriver.Frobnicate"`},
		{"no endpoint", "/", "{}", 404, `no such endpoint: "/"`},
		{"endpoint not clean", "//VolumeDriver.List", "{}", 404, `no such endpoint: "//VolumeDriver.List"`},
	}
	f := &fakeVerbs{}
	r := newRig(t, f)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			want, err := encode(map[string]string{"Err": test.want})
			if err != nil {
				t.Fatal(err)
			}
			if status, got := r.post(t, test.path, test.body); status != test.status || got+"\n" != string(want) {
				t.Errorf("got %d %s, want %d %s", status, got, test.status, want)
			}
		})
	}
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete, "BREW"} {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://x/VolumeDriver.Remove", strings.NewReader(`{"Name":"v1"}`))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := r.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := fmt.Sprintf(`{"Err":"/VolumeDriver.Remove takes POST, not \"%s\""}`+"\n", method)
		if resp.StatusCode != 405 || string(body) != want || resp.Header.Get("Allow") != "POST" {
			t.Errorf("%s: got %d %s, want 405 %s", method, resp.StatusCode, body, want)
		}
	}
	if calls := f.seen(); calls != "" {
		t.Errorf("driver saw %q", calls)
	}
}

// Old clients, and people with nc.
func TestRawHTTP(t *testing.T) {
	r := newRig(t, &fakeVerbs{})
	for _, request := range []string{
		"POST /VolumeDriver.Path HTTP/1.0\r\nContent-Length: 13\r\n\r\n{\"Name\":\"v1\"}",
		"POST /VolumeDriver.Path HTTP/1.1\r\nHost: \r\nContent-Length: 13\r\n\r\n{\"Name\":\"v1\"}", // dockerd 20.10
		"POST /VolumeDriver.Path HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{\"Name\":\"v1\"}\r\n0\r\n\r\n",
	} {
		conn, err := r.l.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(conn, request) //nolint:errcheck // the answer tells
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := `{"Mountpoint":"/flocker/mnt/v1"}` + "\n"; err != nil || string(body) != want {
			t.Errorf("%q: got %s, %v, want %s", request, body, err, want)
		}
		conn.Close()
	}
}

func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeVerbs{}
		r := newRig(t, f)
		conn, err := r.l.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(conn, "POST /VolumeDriver.Path HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{\"Name\"") //nolint:errcheck // the answer tells
		start := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := `{"Err":"request body did not come within 10s"}` + "\n"; err != nil || resp.StatusCode != 408 || string(body) != want || time.Since(start) != ioLimit {
			t.Errorf("got %d %s, %v, after %v, want %s", resp.StatusCode, body, err, time.Since(start), want)
		}
		conn.Close()
		r.stop()
		if calls := f.seen(); calls != "" {
			t.Errorf("driver saw %q", calls)
		}
	})
}

// Docker keeps a connection for hours, and a call on one that is just closing is
// sent again without its body.
func TestIdleConnectionStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, &fakeVerbs{})
		dials := 0
		r.client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			dials++
			return r.l.dial(ctx, network, address)
		}
		for range 3 {
			if status, got := r.post(t, "/VolumeDriver.List", "{}"); status != 200 {
				t.Errorf("got %d %s", status, got)
			}
			time.Sleep(24 * time.Hour)
		}
		if dials != 1 {
			t.Errorf("got %d connections, want 1", dials)
		}
		r.stop()
	})
}

// Docker takes every answer of Get that is not a volume for "there is none", and
// forgets the volume. A cut connection it takes for "not known".
func TestGetThatDoesNotKnow(t *testing.T) {
	tests := []struct {
		name, body string
		hook       func(ctx context.Context, verb, name string) error
	}{
		{"error", `{"Name":"v1"}`, func(context.Context, string, string) error { return ownership.ErrUnavailable }},
		{"panic", `{"Name":"v1"}`, func(context.Context, string, string) error { panic("oops") }},
		{"body lost in a retry", ``, nil},
		{"status that is no JSON", `{"Name":"v1"}`, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := &fakeVerbs{hook: test.hook, volume: driver.Volume{Status: map[string]any{"bad": make(chan int)}}}
			if status, got := newRig(t, f).post(t, "/VolumeDriver.Get", test.body); status != 0 || !strings.HasSuffix(got, "EOF") {
				t.Errorf("got %d %s, want a cut connection", status, got)
			}
		})
	}
	t.Run("held too long", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			r := newRig(t, &fakeVerbs{hook: hold})
			if status, got := r.post(t, "/VolumeDriver.Get", `{"Name":"v1"}`); status != 0 || !strings.HasSuffix(got, "EOF") {
				t.Errorf("got %d %s, want a cut connection", status, got)
			}
			if took := time.Since(start); took != otherDeadline {
				t.Errorf("held for %v, want %v", took, otherDeadline)
			}
			r.stop()
		})
	})
}

// hold waits for the end of its context, as a verb does that waits for etcd.
func hold(ctx context.Context, _, _ string) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestDeadlines(t *testing.T) {
	for verb, want := range map[string]time.Duration{
		"Create": 100 * time.Second, "Mount": 100 * time.Second,
		"Remove": 50 * time.Second, "Unmount": 50 * time.Second, "Path": 50 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			r := newRig(t, &fakeVerbs{hook: hold})
			_, got := r.post(t, "/VolumeDriver."+verb, `{"Name":"v1","ID":"1"}`)
			if took := time.Since(start); took != want || !strings.Contains(got, "not done within") {
				t.Errorf("%s: got %s after %v, want an error after %v", verb, got, took, want)
			}
			r.stop()
		})
	}
}

func TestPanic(t *testing.T) {
	f := &fakeVerbs{hook: func(context.Context, string, string) error { panic("oops") }}
	r := newRig(t, f)
	for _, verb := range []string{"Create", "Remove", "Mount", "Unmount", "Path", "List"} {
		status, got := r.post(t, "/VolumeDriver."+verb, `{"Name":"v1","ID":"1"}`)
		if want := fmt.Sprintf(`{"Err":"internal error in %s: oops (the stack is in the plugin's log)"}`, strings.ToLower(verb)); status != 500 || got != want {
			t.Errorf("%s: got %d %s, want 500 %s", verb, status, got, want)
		}
	}
	if stack := r.errout.String(); !strings.Contains(stack, `panic in mount of volume "v1": oops`) || !strings.Contains(stack, "server_test.go:") {
		t.Errorf("no stack on stderr: %s", stack)
	}
}

// Docker never sends an Unmount for a Mount whose answer it did not get.
func TestMountWhoseCallerGoesAway(t *testing.T) {
	started := make(chan struct{})
	f := &fakeVerbs{hook: func(ctx context.Context, verb, _ string) error {
		if verb == "Mount" {
			close(started)
			<-ctx.Done() // and mounts in spite of it
		} else if err := ctx.Err(); err != nil {
			t.Errorf("undo with an ended context: %v", err)
		}
		return nil
	}}
	r := newRig(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://x/VolumeDriver.Mount", strings.NewReader(`{"Name":"v1","ID":"`+containerID+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Do(req); !errors.Is(err, context.Canceled) { //nolint:bodyclose // there is none
		t.Fatalf("got %v", err)
	}
	r.stop()
	if got, want := f.seen(), "Mount v1 "+containerID+", Unmount v1 "+containerID; got != want {
		t.Errorf("driver saw %q, want %q", got, want)
	}
	if want := "op=rollback volume=v1 why=\"nobody waits for the answer: context canceled\""; !strings.Contains(r.out.String(), "mount_id=4d1e01234567") || !strings.Contains(r.out.String(), want) {
		t.Errorf("log: got %s, want %s in it", r.out, want)
	}
}

// brokenConn fails all writes once broken.
type brokenConn struct {
	net.Conn
	broken chan struct{}
}

func (c *brokenConn) Write(p []byte) (int, error) {
	select {
	case <-c.broken:
		return 0, errors.New("broken pipe")
	default:
		return c.Conn.Write(p)
	}
}

func TestMountWhoseReplyIsLost(t *testing.T) {
	conn := &brokenConn{broken: make(chan struct{})}
	f := &fakeVerbs{hook: func(_ context.Context, verb, _ string) error {
		if verb == "Mount" {
			close(conn.broken)
		}
		return nil
	}}
	r := newRig(t, f)
	client, serverEnd := net.Pipe()
	conn.Conn = serverEnd
	r.l.conns <- conn
	if _, err := io.WriteString(client, "POST /VolumeDriver.Mount HTTP/1.1\r\nHost: x\r\nContent-Length: 22\r\n\r\n{\"Name\":\"v1\",\"ID\":\"1\"}"); err != nil {
		t.Fatal(err)
	}
	if rest, _ := io.ReadAll(client); len(rest) > 0 {
		t.Errorf("got %q, want nothing", rest)
	}
	r.stop()
	if got, want := f.seen(), "Mount v1 1, Unmount v1 1"; got != want {
		t.Errorf("driver saw %q, want %q", got, want)
	}
	if want := `why="write reply: broken pipe"`; !strings.Contains(r.out.String(), want) {
		t.Errorf("log: got %s, want %s in it", r.out, want)
	}
}

// A failed Mount was undone by the driver, and must not be undone again: with
// `docker cp` the id is that of a running container.
func TestFailedMountIsNotUndone(t *testing.T) {
	f := &fakeVerbs{hook: func(context.Context, string, string) error { return errors.New("no") }}
	r := newRig(t, f)
	r.post(t, "/VolumeDriver.Mount", `{"Name":"v1","ID":"1"}`)
	r.stop()
	if got, want := f.seen(), "Mount v1 1"; got != want {
		t.Errorf("driver saw %q, want %q", got, want)
	}
}

// Until there is a driver, constants are answered and the rest waits for it.
func TestBeforeTheDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		for _, path := range []string{"/Plugin.Activate", "/VolumeDriver.Capabilities"} {
			if status, got := r.post(t, path, "{}"); status != 200 {
				t.Errorf("%s: got %d %s", path, status, got)
			}
		}
		f := &fakeVerbs{}
		time.AfterFunc(20*time.Second, func() { r.use(f) })
		start := time.Now()
		if status, got := r.post(t, "/VolumeDriver.List", "{}"); status != 200 || time.Since(start) != 20*time.Second {
			t.Errorf("got %d %s after %v", status, got, time.Since(start))
		}
		r.stop()
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		status, got := r.post(t, "/VolumeDriver.Remove", `{"Name":"v1"}`)
		if want := `{"Err":"flocker is still starting: not done within 50s"}`; status != 500 || got != want {
			t.Errorf("got %d %s, want %s", status, got, want)
		}
		r.stop()
	})
}

func TestDrain(t *testing.T) {
	tests := []struct {
		name, verb string
		takes      time.Duration // 0: until its context ends
		end        time.Duration
		want       string
		calls      string
	}{
		{"a change that ends in time", "Unmount", 3 * time.Second, 3 * time.Second, `200 {}`, "Unmount v1 1"},
		{"a change that waits", "Create", 0, drainGrace, `500 {"Err":"flocker is stopping"}`, "Create v1"},
		{"a mount that waits", "Mount", 0, drainGrace, `500 {"Err":"flocker is stopping"}`, "Mount v1 1"},
		{"a change that hears nothing", "Create", time.Minute, drainLimit, "0 EOF", "Create v1"},
		{"a read that ends in time", "List", time.Second, time.Second, `200 {"Volumes":[]}`, "List "},
		{"a held look-up", "Get", 0, drainReads, "0 EOF", "Get v1"},
		{"a list that waits", "List", 0, drainReads, `500 {"Err":"flocker is stopping"}`, "List "},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeVerbs{hook: func(ctx context.Context, _, _ string) error {
					if test.takes == 0 {
						return hold(ctx, "", "")
					}
					time.Sleep(test.takes)
					return nil
				}}
				r := newRig(t, f)
				got := make(chan string, 1)
				go func() {
					status, body := r.post(t, "/VolumeDriver."+test.verb, `{"Name":"v1","ID":"1"}`)
					got <- fmt.Sprint(status, " ", strings.TrimPrefix(body, fmt.Sprintf("Post %q: ", "http://plugin.moby.localhost/VolumeDriver."+test.verb)))
				}()
				synctest.Wait()
				start := time.Now()
				r.stop()
				// net/http looks for idle connections every half second.
				if took := time.Since(start); took < test.end || took > min(test.end+600*time.Millisecond, drainLimit) {
					t.Errorf("drained after %v, want %v", took, test.end)
				}
				if g := <-got; g != test.want {
					t.Errorf("got %s, want %s", g, test.want)
				}
				if _, err := r.l.dial(t.Context(), "", ""); err == nil {
					t.Error("still accepts connections")
				}
				if calls := f.seen(); calls != test.calls {
					t.Errorf("driver saw %q, want %q", calls, test.calls)
				}
				time.Sleep(test.takes)
			})
		})
	}
}

func TestLogLines(t *testing.T) {
	f := &fakeVerbs{}
	r := newRig(t, f)
	r.post(t, "/VolumeDriver.Mount", `{"Name":"v1","ID":"`+containerID+`"}`)
	r.post(t, "/VolumeDriver.List", `{}`)
	f.hook = func(context.Context, string, string) error { return errors.New("first\nsecond") }
	r.post(t, "/VolumeDriver.Remove", `{"Name":"v1"}`)
	f.hook = func(context.Context, string, string) error { return ownership.ErrNotFound }
	r.post(t, "/VolumeDriver.Get", `{"Name":"v2"}`)
	r.stop()
	var got []string
	for line := range strings.Lines(r.out.String()) {
		words := strings.Fields(line)
		for i, w := range words {
			if strings.HasPrefix(w, "took=") {
				words[i] = "took=…"
			}
		}
		got = append(got, strings.Join(words, " "))
	}
	want := []string{
		`level=info msg=done mount_id=4d1e01234567 op=mount took=… volume=v1`,
		`level=debug msg=done op=list took=…`,
		`level=warning msg=failed err="first\nsecond" op=remove took=… volume=v1`,
		`level=debug msg=done err="no such volume" op=get took=… volume=v2`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "flocker.sock")
	l, err := listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", info.Mode(), err)
	}
	if _, err = listen(t.Context(), path); err == nil || err.Error() != "another process listens on "+path+": only one Flocker may run on a host" {
		t.Errorf("second listener: got %v", err)
	}
	// A killed process leaves the file.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err = l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err = os.Stat(path); err != nil {
		t.Fatalf("no stale socket to begin with: %v", err)
	}
	if l, err = listen(t.Context(), path); err != nil {
		t.Fatalf("on a stale socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after close: got %v, want none", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), path); err == nil || err.Error() != path+" is there and is not a socket: remove it" {
		t.Errorf("on a file: got %v", err)
	}
}

// A control socket that cannot be made is tried again, and goes with its requests
// when the plugin ends.
func TestServeControl(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "control.sock")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	hanging := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hang" {
			close(hanging)
			<-r.Context().Done()
		}
		fmt.Fprint(w, "answer")
	})
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	get := func(what string) (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://x"+what, nil)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	until := func(what string, so func() bool) {
		t.Helper()
		for range 6000 {
			if so() {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("after a minute it is not so that %s", what)
	}

	var out lockedBuffer
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		serveControl(ctx, path, h, newLog(&out, logrus.DebugLevel))
	}()
	want := `level=error msg="does not start; trying again" err="` + path + ` is there and is not a socket: remove it" part="control socket"`
	until("the failure is logged", func() bool { return strings.Contains(out.String(), want) })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	until("it answers", func() bool {
		got, err := get("/")
		return err == nil && got == "answer"
	})
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("the socket has mode %o, want 600", got)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := get("/hang")
		answered <- err
	}()
	<-hanging
	cancel()
	if err := <-answered; err != nil {
		t.Errorf("the request that hung: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after the end: got %v, want none", err)
	}
}

// FuzzBody sends any body to each verb that has one. Nothing of it may pass for
// success unless it is a request, and nothing that is not may reach the driver.
// The server's goroutines make minimizing slow: use -fuzzminimizetime=10x.
func FuzzBody(f *testing.F) {
	for verb := range named {
		for _, body := range []string{
			"", "{}", "null", "[]", `"v1"`, `{"Name":"v1","ID":"1"}`, `{"Name":"v1","Opts":null}`, `{"Name":"v1","Opts":{"size":"1G"}}`,
			`{"Name":1}`, `{"Name":"v1","ID":"1"}{}`, `{"name":"v1","NAME":"v2","ID":"1"}`, `{"Name":"v1","Opts":{"a":1}}`, `{"Name":"\ud800","ID":"\u0000"}`,
		} {
			f.Add(verb, []byte(body))
		}
	}
	verbs := &fakeVerbs{}
	r := newRig(f, verbs)
	f.Fuzz(func(t *testing.T, which int, body []byte) {
		verb := named[(which%len(named)+len(named))%len(named)]
		verbs.mu.Lock()
		verbs.calls = nil
		verbs.mu.Unlock()
		status, got := r.post(t, "/VolumeDriver."+verb, string(body))
		calls := verbs.seen()

		good := isObject(body, func(o struct{ Name string }) bool { return o.Name != "" })
		switch verb {
		case "Mount", "Unmount":
			good = good && isObject(body, func(o struct{ ID string }) bool { return o.ID != "" })
		case "Create":
			good = good && isObject[struct{ Opts map[string]string }](body, nil)
		}
		var reply struct{ Err string }
		switch err := json.Unmarshal([]byte(got), &reply); {
		case verb == "Get" && len(body) == 0:
			if status != 0 || calls != "" {
				t.Errorf("%s of nothing: got %d %s, driver saw %q", verb, status, got, calls)
			}
		case err != nil:
			t.Errorf("%s %q: answer %d %q is not JSON: %v", verb, body, status, got, err)
		case status == 200 && (!good || reply.Err != "" || calls == ""):
			t.Errorf("%s %q: got 200 %s, driver saw %q", verb, body, got, calls)
		case status != 200 && (reply.Err == "" || calls != ""):
			t.Errorf("%s %q: got %d %s, driver saw %q", verb, body, status, got, calls)
		}
		if stack := r.errout.String(); stack != "" {
			t.Fatal(stack)
		}
	})
}

func isObject[T any](body []byte, valid func(T) bool) bool {
	var o T
	return json.Unmarshal(body, &o) == nil && (valid == nil || valid(o))
}
