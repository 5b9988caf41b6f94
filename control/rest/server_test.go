package rest_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Who may do what is in the certificate.
func TestRoles(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	const toHost = `is the certificate of a host, which may not use this API: use one made with docker flocker ca user.`
	for _, c := range []struct {
		holder, method, path string
		want                 int
		text                 string
	}{
		{"anna", "GET", "/v1/version", 200, ""},
		{"rita", "GET", "/v1/version", 200, ""},
		{"rita", "HEAD", "/v1/version", 200, ""},
		{"rita", "GET", "/v2/volumes", 200, ""},
		{"rita", "DELETE", "/v1/configuration/datasets/" + id1, 403, `{"description":"reader-rita may look at everything and change nothing: use a certificate made with docker flocker ca user."}`},
		{"rita", "POST", "/v2/nodes/alpha/drain", 403, `"status":403,"detail":"reader-rita may look at everything and change nothing`},
		{"alpha/node", "GET", "/v1/version", 403, `{"description":"node-alpha ` + toHost + `"}`},
		{"alpha/node", "GET", "/v1/nothing", 403, `{"description":"node-alpha ` + toHost + `"}`},
		{"alpha/node", "DELETE", "/v2/volumes/db", 403, toHost},
	} {
		got := do(t, s.client(c.holder), c.method, s.url(c.path), "")
		if got.status != c.want || !strings.Contains(got.body, c.text) {
			t.Errorf("%s as %s: %d %s, want %d %s", c.method+" "+c.path, c.holder, got.status, got.body, c.want, c.text)
		}
	}
	if calls := s.asks(); len(calls) > 0 {
		t.Errorf("the driver was asked for %q", calls)
	}
	if log := s.log.String(); !strings.Contains(log, "by=reader-rita") || !strings.Contains(log, "status=403") {
		t.Errorf("the log does not say who was refused:\n%s", log)
	}
}

// A certificate that is missing, expired, of another cluster or for another purpose gets
// nowhere.
func TestStrangers(t *testing.T) {
	s := serveWith(t, authority(t))
	other := authority(t)
	// Expired: made with a lifetime that is over when it is used.
	a, err := certs.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.User("eve", certs.User, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond) // certificates count in seconds
	pair := func(dir, holder string) []tls.Certificate {
		f := files(dir, holder)
		p, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{p}
	}
	for who, c := range map[string]struct {
		certificates []tls.Certificate
		want         string
	}{
		"nobody":          {nil, "tls: certificate required"},
		"another cluster": {pair(other, "anna"), "tls: unknown certificate authority"},
		"expired":         {pair(s.dir, "eve"), "tls: expired certificate"},
		"a server":        {pair(s.dir, "alpha/control-service"), "tls: bad certificate"},
	} {
		client := &http.Client{Timeout: long, Transport: &http.Transport{TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true,
			// Whatever authorities the server names.
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if c.certificates == nil {
					return &tls.Certificate{}, nil
				}
				return &c.certificates[0], nil
			},
		}}}
		_, err := send(t, client, "GET", s.url("/v1/version"), "")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", who, err, c.want)
		}
		client.CloseIdleConnections()
	}
	if calls := s.asks(); len(calls) > 0 {
		t.Errorf("the driver was asked for %q", calls)
	}
}

// Certificates are exchanged under a running server.
func TestReload(t *testing.T) {
	s := serveWith(t, authority(t))
	next := authority(t)
	client := func() *http.Client {
		return &http.Client{Timeout: long, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: load(t, files(next, "anna")).Client()}}
	}
	if _, err := send(t, client(), "GET", s.url("/v1/version"), ""); err == nil {
		t.Fatal("another cluster's certificate is taken")
	}
	for _, file := range []string{certs.CAFile, "alpha/" + certs.ServerFile, "alpha/" + certs.ServerKey} {
		data, err := os.ReadFile(filepath.Join(next, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(s.dir, file), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := do(t, client(), "GET", s.url("/v1/version"), ""); got.status != 200 {
		t.Errorf("with the new certificates: %d %s", got.status, got.body)
	}
}

// Whoever is connected goes on as long as his authority is in the file, and no longer.
func TestReplacedAuthority(t *testing.T) {
	rest.Set(t, rest.CertificateRound, 20*time.Millisecond)
	s := serveWith(t, authority(t))
	next := authority(t)
	file := filepath.Join(s.dir, certs.CAFile)
	read := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	write := func(data []byte) {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old, replaced := read(file), read(filepath.Join(next, certs.CAFile))
	stream := s.stream(t, "/v2/events")
	conn := s.dial()
	ask := func() error {
		if _, err := fmt.Fprintf(conn, "GET /v1/version HTTP/1.1\r\nHost: alpha\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
		}
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	write(append(slices.Clip(old), replaced...))
	time.Sleep(time.Second) // many rounds
	s.change("create", "db", "", func(*ownership.State) {})
	if got := stream.block(); len(got) < 2 || got[1] != "event: create" {
		t.Errorf("with both authorities the stream has %q", got)
	}
	if err := ask(); err != nil {
		t.Errorf("with both authorities: %v", err)
	}

	// The host's own certificate has to be of the new one, too; until then the old file goes on.
	for _, name := range []string{"alpha/" + certs.ServerFile, "alpha/" + certs.ServerKey} {
		if err := os.WriteFile(filepath.Join(s.dir, name), read(filepath.Join(next, name)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(replaced)
	if line, err := stream.in.ReadString('\n'); err == nil {
		t.Errorf("the stream goes on with %q", line)
	}
	for end := time.Now().Add(long); ask() == nil; time.Sleep(10 * time.Millisecond) { // they end one after the other
		if time.Now().After(end) {
			t.Fatal("the connection goes on")
		}
	}
	if text := s.log.String(); !strings.Contains(text, "a connection ends: its certificate is not good any more") {
		t.Errorf("logged %s", text)
	}
}

// dial opens a connection as anna, with HTTP/1.1.
func (s *service) dial() *tls.Conn {
	s.t.Helper()
	conf := load(s.t, files(s.dir, "anna")).Client()
	conf.NextProtos = []string{"http/1.1"}
	raw, err := new(net.Dialer).DialContext(s.t.Context(), "tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	_ = raw.SetDeadline(time.Now().Add(2 * long))
	conn := tls.Client(raw, conf)
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// A client that is slow, or silent, does not hold a connection for ever. The limits are
// 10 s, so the clients are slow side by side.
func TestSlowClients(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for 10 s")
	}
	s := serve(t)
	s.add("db", id1)
	begin := time.Now()
	var all sync.WaitGroup
	defer all.Wait()
	over := func(what string, conn io.Reader, want string) {
		all.Go(func() {
			got, err := io.ReadAll(conn)
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
				t.Errorf("%s: still connected after %v", what, time.Since(begin))
			}
			if !strings.Contains(string(got), want) {
				t.Errorf("%s: %q, want %q", what, got, want)
			}
		})
	}
	raw, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(2 * long))
	over("one that says nothing", raw, "")
	half := s.dial()
	fmt.Fprintf(half, "GET /v1/version HTTP/1.1\r\nHost: x\r\nX-Slow: ")
	over("half a header", half, "")
	body := s.dial()
	fmt.Fprintf(body, "POST /v1/configuration/datasets/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", id1)
	over("half a body", body, `{"description":"The request body did not come within 10s."}`)
	all.Go(func() {
		slow, in := io.Pipe()
		defer in.Close()
		req, err := http.NewRequestWithContext(t.Context(), "POST", s.url("/v2/volumes"), slow)
		if err != nil {
			t.Error(err)
			return
		}
		resp, err := s.client("anna").Do(req)
		if err != nil {
			t.Errorf("half a body, HTTP/2: %v", err)
			return
		}
		defer resp.Body.Close()
		if got, _ := io.ReadAll(resp.Body); resp.StatusCode != 408 {
			t.Errorf("half a body, HTTP/2: %d %s", resp.StatusCode, got)
		}
	})
	// The others are served meanwhile.
	if got := s.ask("GET", "/v1/version", ""); got.status != 200 {
		t.Errorf("a client beside slow ones: %d %s", got.status, got.body)
	}
}

func TestLimits(t *testing.T) {
	s := serve(t)
	body := `{"primary":"` + strings.Repeat("x", 300<<10) + `"}`
	for _, http1 := range [][]bool{nil, {true}} {
		got := do(t, s.client("anna", http1...), "POST", s.url("/v1/configuration/datasets"), body)
		if want := `{"description":"The request body is larger than 256 KiB."}`; got.status != 413 || got.body != want {
			t.Errorf("a large body: %d %s, want 413 %s", got.status, got.body, want)
		}
	}
	got, err := send(t, s.client("anna", true), "GET", s.url("/v1/version"), "", "X-Long", strings.Repeat("x", 64<<10))
	if err == nil && got.status != 431 {
		t.Errorf("a long header: %d %s, want 431", got.status, got.body)
	}
}

// Beyond the limit of connections a client waits for another to go.
func TestConnectionLimit(t *testing.T) {
	rest.Set(t, rest.MaxConnections, 2)
	s := serve(t)
	clients := []*http.Client{s.client("anna"), s.client("anna"), s.client("anna")}
	for _, client := range clients[:2] {
		if got := do(t, client, "GET", s.url("/v1/version"), ""); got.status != 200 {
			t.Fatalf("%d %s", got.status, got.body)
		}
	}
	third := make(chan error, 1)
	go func() {
		_, err := send(t, clients[2], "GET", s.url("/v1/version"), "")
		third <- err
	}()
	select {
	case err := <-third:
		t.Fatalf("a third client is served: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	clients[0].CloseIdleConnections()
	if err := <-third; err != nil {
		t.Errorf("a client that has gone makes no room: %v", err)
	}
}

// A defect costs one answer, not the process; the client gets a number to ask after.
func TestPanic(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.panics = "no such thing"
	got := s.ask("DELETE", "/v1/configuration/datasets/"+id1, "")
	var incident string
	got.decode(t, &incident)
	if log := s.log.String(); got.status != 500 || len(incident) != 36 || !strings.Contains(log, "incident="+incident) || !strings.Contains(log, "no such thing") {
		t.Errorf("%d %s, and the log:\n%s", got.status, got.body, log)
	}
	got = s.ask("DELETE", "/v2/volumes/db", "")
	if got.status != 500 || got.header.Get("Content-Type") != "application/problem+json" || !strings.Contains(got.body, "This is a defect of Flocker: the plugin's log has more about incident ") {
		t.Errorf("v2: %d %s", got.status, got.body)
	}
	s.panics = ""
	if got := s.ask("DELETE", "/v2/volumes/db", ""); got.status != 204 {
		t.Errorf("afterwards: %d %s", got.status, got.body)
	}
}

func TestUnknown(t *testing.T) {
	s := serve(t)
	for _, c := range []struct {
		method, path string
		status       int
		allow, body  string
	}{
		{"GET", "/", 404, "", `{"description":"There is no request for /: docs/api.md lists those there are."}`},
		{"GET", "/v1/nothing", 404, "", `{"description":"There is no request for /v1/nothing: docs/api.md lists those there are."}`},
		{"PUT", "/v1/version", 405, "GET", `{"description":"PUT is not possible here: use GET."}`},
		{"PATCH", "/v1/configuration/datasets/" + id1, 405, "POST, DELETE", `{"description":"PATCH is not possible here: use POST or DELETE."}`},
		{"GET", "/v2/nothing", 404, "", `{"type":"about:blank","title":"Not Found","status":404,"detail":"There is no request for /v2/nothing: docs/api.md lists those there are."}`},
		{"DELETE", "/v2/volumes", 405, "GET, POST", `{"type":"about:blank","title":"Method Not Allowed","status":405,"detail":"DELETE is not possible here: use GET or POST."}`},
		{"GET", "/v2/volumes/%2e%2e%2fetc%2fpasswd", 404, "", `{"type":"about:blank","title":"Not Found","status":404,"detail":"There is no volume \"../etc/passwd\"."}`},
	} {
		got := s.ask(c.method, c.path, "")
		if got.status != c.status || got.body != c.body || got.header.Get("Allow") != c.allow {
			t.Errorf("%s %s: %d %s (Allow: %s), want %d %s (%s)", c.method, c.path, got.status, got.body, got.header.Get("Allow"), c.status, c.body, c.allow)
		}
	}
}

// When the process ends, an answer that is being made is still sent, and a stream ends.
func TestStop(t *testing.T) {
	rest.Set(t, rest.Grace, 2*long) // nobody who can be told is cut off
	s := serve(t)
	s.add("db", id1)
	waiting, before := make(chan reply, 1), s.waited()
	go func() {
		got, _ := send(t, s.client("anna"), "GET", s.url("/v2/volumes/db/wait?state=mounted&timeout=60s"), "")
		waiting <- got
	}()
	stream, err := http.NewRequestWithContext(t.Context(), "GET", s.url("/v2/events"), nil)
	if err != nil {
		t.Fatal(err)
	}
	stream.Header.Set("Accept", "text/event-stream")
	resp, err := s.client("anna").Do(stream)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	until(t, "they do not wait", func() bool { return s.waited() >= before+2 }) // the stream does, too
	begin := time.Now()
	s.stop()
	select {
	case err := <-s.stopped:
		if err != nil {
			t.Error(err)
		}
		s.stopped <- err
	case <-time.After(long):
		t.Fatal("it does not end")
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it ends after %v", took)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	select {
	case got := <-waiting:
		if want := problem(503, "The plugin ends on this host: ask another one."); got.status != 503 || got.body != want || got.header.Get("Retry-After") != "5" {
			t.Errorf("a client that waits is told %d %s, want %s", got.status, got.body, want)
		}
	case <-time.After(long):
		t.Error("a client still waits")
	}
}

// What is logged says who wanted what, and has nothing of what was sent.
func TestRequestLog(t *testing.T) {
	s := serve(t)
	s.ask("POST", "/v1/configuration/datasets", `{"primary":"`+alpha+`","metadata":{"name":"db","password":"hush"}}`, "Authorization", "Bearer hush")
	s.ask("GET", "/v1/state/datasets", "")
	log := s.log.String()
	if !strings.Contains(log, "by=user-anna") || !strings.Contains(log, "method=POST") || !strings.Contains(log, "status=201") {
		t.Errorf("a change is not logged:\n%s", log)
	}
	if strings.Contains(log, "hush") {
		t.Errorf("what is nobody's business is logged:\n%s", log)
	}
	if strings.Contains(log, "state/datasets") {
		t.Errorf("every look is logged:\n%s", log)
	}
}

// Errors of the driver have a status that says what to do about them.
func TestErrors(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	for err, want := range errorsWithStatus {
		s.err = err
		got := s.ask("DELETE", "/v1/configuration/datasets/"+id1, "")
		if want.status == 404 { // somebody else has removed it
			want.status = 200
			want.text = `"deleted":true`
		}
		if got.status != want.status || !strings.Contains(got.body, want.text) || (got.status == 503) != (got.header.Get("Retry-After") == "5") {
			t.Errorf("v1, %v: %d %s (Retry-After: %s), want %d %s", err, got.status, got.body, got.header.Get("Retry-After"), want.status, want.text)
		}
	}
	statuses := slices.Collect(maps.Values(errorsWithStatus))
	if len(statuses) < 5 {
		t.Error("too few errors are tried")
	}
}

// A reader of the log level does not cost anything: that of the server is info.
func TestDebugLog(t *testing.T) {
	out := &logs{}
	log := logrus.New()
	log.SetOutput(out)
	log.SetLevel(logrus.DebugLevel)
	c := newCluster()
	once.Do(func() { certify(t, shared) })
	dir := shared
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = rest.Serve(ctx, l, load(t, files(dir, "alpha/control-service")), rest.New(rest.Config{Driver: c, Leases: c, Cluster: c, Version: "2.0.0", Log: logrus.NewEntry(log)}), logrus.NewEntry(log))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: load(t, files(dir, "anna")).Client()}}
	do(t, client, "GET", "https://"+l.Addr().String()+"/v1/version", "")
	cancel()
	<-done
	if !strings.Contains(out.String(), "path=/v1/version") {
		t.Errorf("looks are not logged for whoever debugs:\n%s", out)
	}
}
