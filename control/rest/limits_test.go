package rest_test

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// get sends a request as anna with HTTP/1.1, of which nobody need read the answer.
func (s *service) get(path, accept string) *tls.Conn {
	s.t.Helper()
	conn := s.dial()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: alpha\r\nAccept: %s\r\n\r\n", path, accept); err != nil {
		s.t.Fatal(err)
	}
	return conn
}

// until asks again and again.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// Beyond the limit of streams a client is told so, and whoever does not read what it is sent
// makes room in the end.
func TestStreamLimit(t *testing.T) {
	rest.Set(t, rest.MaxStreams, 1)
	rest.Set(t, rest.Reader, time.Second)
	s := serve(t)
	conn := s.get("/v2/events", "text/event-stream")
	if line, err := bufio.NewReaderSize(conn, 16).ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	client := s.client("anna")
	another := func() reply {
		got, err := begin(t, client, s.url("/v2/events"))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	want := problem(503, "1 clients are following the events of this host already: try again later, or at another host.")
	if got := another(); got.status != 503 || got.body != want || got.header.Get("Retry-After") != "5" {
		t.Errorf("%d %s, want %s", got.status, got.body, want)
	}
	detail := strings.Repeat("x", 1<<20)
	for range 30 { // more than there is room for on the way
		s.change("", "", "", func(st *ownership.State) {
			s.events = append(s.events, ownership.Event{Revision: st.Revision, What: "create", Node: alpha, Detail: detail})
		})
	}
	until(t, "whoever does not read keeps his stream", func() bool { return another().status == 200 })
}

// begin asks for a stream and takes no more of it than the beginning.
func begin(t *testing.T, client *http.Client, url string) (reply, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		return reply{}, err
	}
	req.Header.Set("Accept", "text/event-stream")
	resp, err := client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	got := reply{status: resp.StatusCode, header: resp.Header}
	if got.status != http.StatusOK {
		data, err := io.ReadAll(resp.Body)
		got.body = strings.TrimSuffix(string(data), "\n")
		return got, err
	}
	return got, nil
}

// A stream in which nothing happens shows that it lives.
func TestPing(t *testing.T) {
	rest.Set(t, rest.Ping, 50*time.Millisecond)
	s := serve(t)
	live := s.stream(t, "/v2/events")
	for range 3 {
		if got := live.block(); len(got) != 1 || got[0] != ": " {
			t.Errorf("it says %q", got)
		}
	}
	s.change("create", "db", "", func(*ownership.State) {})
	for {
		got := live.block()
		if len(got) == 3 && got[1] == "event: create" {
			break
		}
		if len(got) != 1 || got[0] != ": " {
			t.Fatalf("it says %q", got)
		}
	}
}

// A stream ends where events cannot be told any more, so that the client comes back.
func TestStreamEnds(t *testing.T) {
	s := serve(t)
	live := s.stream(t, "/v2/events")
	s.change("", "", "", func(*ownership.State) { s.told = errors.New("etcd has burnt down") })
	if line, err := live.in.ReadString('\n'); !errors.Is(err, io.EOF) {
		t.Errorf("it goes on with %q, %v", line, err)
	}
}

// A client that asks for what is to come gets nothing of before.
func TestStreamFromLater(t *testing.T) {
	s := serve(t)
	live := s.stream(t, "/v2/events?after=1000")
	s.change("early", "", "", func(*ownership.State) {})
	s.change("", "", "", func(st *ownership.State) { st.Revision = 2000 })
	s.change("late", "", "", func(*ownership.State) {})
	if got := live.block(); len(got) != 3 || got[1] != "event: late" {
		t.Errorf("the first is %q", got)
	}
}

// A defect in the middle of an answer cuts it off: nobody is to take half of it for all.
func TestPanicInStream(t *testing.T) {
	s := serve(t)
	live := s.stream(t, "/v2/events")
	s.change("", "", "", func(*ownership.State) { s.broken = true })
	if line, err := live.in.ReadString('\n'); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("it ends with %q, %v", line, err)
	}
	until(t, "it is not in the log", func() bool { return strings.Contains(s.log.String(), "no such event") })
}

// Whoever does not take an answer is cut off.
func TestAnswerNotTaken(t *testing.T) {
	rest.Set(t, rest.MaxConnections, 1)
	rest.Set(t, rest.WriteLimit, time.Second)
	s := serve(t)
	s.change("", "", "", func(s *ownership.State) { s.Views = many(50_000) })
	conn := s.get(datasetsPath, "*/*")
	if line, err := bufio.NewReaderSize(conn, 16).ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	client := s.client("anna")
	client.Timeout = long
	if got := do(t, client, "GET", s.url("/v1/version"), ""); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// A connection on which nothing more comes is closed.
func TestIdle(t *testing.T) {
	rest.Set(t, rest.Idle, 100*time.Millisecond)
	s := serve(t)
	conn := s.get("/v1/version", "*/*")
	_ = conn.SetDeadline(time.Now().Add(long))
	if got, err := io.ReadAll(conn); err != nil || !strings.Contains(string(got), `{"flocker":"2.0.0"}`) {
		t.Errorf("%q, %v", got, err)
	}
}

// A change that does not end is answered in the end.
func TestPatience(t *testing.T) {
	rest.Set(t, rest.Patience, 100*time.Millisecond)
	s := serve(t)
	s.add("db", id1)
	s.endless = true
	if got := s.ask("POST", "/v2/volumes", `{"name":"web"}`); got.status != 503 || got.body != problem(503, "context deadline exceeded.") {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// Nothing that is under way keeps the process from its end.
func TestStopWhileSomethingHangs(t *testing.T) {
	rest.Set(t, rest.Grace, 100*time.Millisecond)
	s := serve(t)
	s.add("db", id1)
	s.hang = make(chan struct{})
	defer func() {
		close(s.hang)
		until(t, "it goes on for ever", func() bool { return strings.Contains(s.log.String(), "method=DELETE") })
	}()
	go func() { _, _ = send(t, s.client("anna"), "DELETE", s.url("/v2/volumes/db"), "") }()
	until(t, "it was not asked", func() bool { return s.hanging.Load() > 0 })
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
}

// Connections that have gone are not kept, and nothing of a server is left when it has ended.
func TestNothingIsLeft(t *testing.T) {
	var known rest.Clients
	conn := tls.Client(nil, nil)
	known.Note(conn, http.StateActive)
	known.Note(conn, http.StateIdle)
	if n := known.Len(); n != 1 {
		t.Errorf("%d are known, of one", n)
	}
	known.Note(conn, http.StateClosed)
	if n := known.Len(); n != 0 {
		t.Errorf("%d are known, and none is there", n)
	}

	s := serve(t)
	s.ask("GET", "/v1/version", "")
	s.stop()
	if err := <-s.stopped; err != nil {
		t.Error(err)
	}
	s.stopped <- nil
	until(t, "the round of certificates goes on", func() bool {
		stacks := make([]byte, 16<<20)
		return !strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "rest.Serve.func")
	})
}
