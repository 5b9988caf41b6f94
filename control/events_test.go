package control_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// observed is an Admin of a node in a cluster in memory, in which volumes a and b were
// created and a was claimed.
func observed(t *testing.T) (h http.Handler, m *ownership.Map, claimed ownership.Owner) {
	t.Helper()
	m = ownership.New(ownership.NewMemory(), ownership.Node{ID: "n1", Host: "alpha", Boot: "boot"}, ownership.Config{})
	o := ownership.NewObserver(m)
	ctx, cancel := context.WithCancel(context.Background())
	var runs sync.WaitGroup
	runs.Go(func() { _ = m.Run(ctx) })
	runs.Go(func() { _ = o.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		runs.Wait()
	})
	if err := m.Registered(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		v, _, err := m.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: name})
		if err == nil {
			v, err = m.Ready(t.Context(), v)
		}
		if err == nil && name == "a" {
			claimed, _, err = m.Claim(t.Context(), v.ID)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return quiet(o), m, claimed
}

func quiet(o control.Observer) http.Handler {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return control.New(&fake{}, &fake{}, "v1", logrus.NewEntry(log)).Observe(o)
}

func TestEvents(t *testing.T) {
	h, _, claimed := observed(t)
	get := func(query string) (int, string, api.Events) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/events?"+query, nil))
		var answer api.Events
		var failure api.Failure
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		_ = json.Unmarshal(w.Body.Bytes(), &failure)
		return w.Code, failure.Error, answer
	}
	past := url.QueryEscape(time.Now().Add(-time.Hour).Format(time.RFC3339))
	future := url.QueryEscape(time.Now().Add(time.Hour).Format(time.RFC3339))
	claim := fmt.Sprint(claimed.Token)
	for _, c := range []struct{ query, want string }{
		{"", "register create:a ready:a claim:a create:b ready:b"},
		{"since=1h", "register create:a ready:a claim:a create:b ready:b"},
		{"since=" + past, "register create:a ready:a claim:a create:b ready:b"},
		{"since=" + future, ""},
		{"volume=a", "create:a ready:a claim:a"},
		{"volume=" + claimed.Volume, "create:a ready:a claim:a"},
		{"volume=c", ""},
		{"after=" + claim, "create:b ready:b"},
		{"after=0&limit=2", "register create:a …"},
		{"after=0&limit=2&volume=b", "create:b ready:b"},
		{"after=0&limit=1&volume=b", "create:b …"},
		{"after=1000000&follow=false", ""},
	} {
		code, _, answer := get(c.query)
		var words []string
		for _, e := range answer.Events {
			words = append(words, strings.TrimSuffix(e.What+":"+e.Volume, ":"))
		}
		if answer.More {
			words = append(words, "…")
		}
		if got := strings.Join(words, " "); code != http.StatusOK || got != c.want {
			t.Errorf("%s: %d %q, want %q", c.query, code, got, c.want)
		}
	}
	// What one answer has not is in the next ones.
	var all []api.Event
	for next, more := int64(0), true; more; {
		code, text, answer := get(fmt.Sprintf("limit=1&after=%d", next))
		if code != http.StatusOK {
			t.Fatal(text)
		}
		all, next, more = append(all, answer.Events...), answer.Next, answer.More
	}
	if len(all) != 6 {
		t.Errorf("one by one there are %d events", len(all))
	}
	if e := all[3]; e.Host != "alpha" || e.Node != "n1" || e.Revision != claimed.Token || e.ID != claimed.Volume || time.Since(e.At) > time.Hour {
		t.Errorf("the claim is %+v", e)
	}
	for query, want := range map[string]string{
		"folow=true":           `the request's "folow" is not known: there are after, since, volume, limit and follow`,
		"follow=1":             "follow is true or false",
		"after=1&since=1h":     "after and since do not go together",
		"after=-1":             `after is a revision of etcd, and "-1" is none`,
		"since=yesterday":      `since is a duration such as 90m or 24h, or a time such as 2026-11-20T09:30:00Z, and "yesterday" is neither`,
		"since=-1h":            `since is a duration such as 90m or 24h, or a time such as 2026-11-20T09:30:00Z, and "-1h" is neither`,
		"limit=0":              "limit is a number from 1 to 5000, and not for what is followed",
		"limit=5001":           "limit is a number from 1 to 5000, and not for what is followed",
		"limit=1&follow=true":  "limit is a number from 1 to 5000, and not for what is followed",
		"follow=true&after=x":  `after is a revision of etcd, and "x" is none`,
		"follow=true&since=x":  `since is a duration such as 90m or 24h, or a time such as 2026-11-20T09:30:00Z, and "x" is neither`,
		"follow=true&host=abc": `the request's "host" is not known: there are after, since, volume, limit and follow`,
	} {
		if code, got, _ := get(query); code != http.StatusBadRequest || got != want {
			t.Errorf("%s: %d %q, want %q", query, code, got, want)
		}
	}
}

func TestFollow(t *testing.T) {
	h, m, claimed := observed(t)
	srv := httptest.NewServer(h)
	defer srv.Close()
	stream := func(query string) (status int, next func() api.EventLine, hangUp func()) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/v1/events?follow=true&"+query, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req) //nolint:bodyclose // by hangUp
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(resp.Body)
		return resp.StatusCode, func() (l api.EventLine) {
				t.Helper()
				data, err := lines.ReadBytes('\n')
				if err == nil {
					err = json.Unmarshal(data, &l)
				}
				if err != nil {
					t.Fatal(err)
				}
				return l
			}, func() {
				cancel()
				_ = resp.Body.Close()
			}
	}
	_, fresh, hangUp := stream("")
	defer hangUp()
	_, old, hangUp := stream("volume=a&since=1h")
	defer hangUp()
	if l := fresh(); l.Event != nil || l.Next < claimed.Token {
		t.Errorf("the first line is %+v", l)
	}
	if l := old(); l.Event != nil || l.Next >= claimed.Token {
		t.Errorf("the first line is %+v", l)
	}
	for _, want := range []string{"create", "ready", "claim"} {
		if l := old(); l.Event == nil || l.Event.What != want || l.Event.Volume != "a" || l.Next != l.Event.Revision {
			t.Errorf("want %s, got %+v", want, l)
		}
	}
	if err := m.Release(t.Context(), claimed.Volume, claimed.Token); err != nil {
		t.Fatal(err)
	}
	for _, l := range []api.EventLine{fresh(), old()} {
		if l.Event == nil || l.Event.What != "release" || l.Event.Token != claimed.Token {
			t.Errorf("want the release, got %+v", l.Event)
		}
	}
	// No more than 16, until one of them has gone.
	var others []func()
	for range 14 {
		status, next, hangUp := stream("")
		if next(); status != http.StatusOK {
			t.Fatalf("status %d", status)
		}
		others = append(others, hangUp)
		defer hangUp()
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/events?follow=true", nil))
	if want := `{"error":"16 others follow what happens on this host already: end one of them first"}` + "\n"; w.Code != http.StatusTooManyRequests || w.Body.String() != want {
		t.Errorf("the 17th: %d %s", w.Code, w.Body)
	}
	others[0]()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		status, _, hangUp := stream("")
		hangUp()
		if status == http.StatusOK {
			return
		}
		if time.Now().After(end) {
			t.Fatal("one has gone, and another one is still refused")
		}
	}
}

// endless is an Observer with as many events as are read.
type endless struct {
	control.Observer
	err   error
	every time.Duration
	sent  atomic.Int64
}

func (*endless) Wait(context.Context, int64) (*ownership.State, error) {
	return &ownership.State{Revision: 7}, nil
}

func (e *endless) Events(context.Context, int64, int) ([]ownership.Event, int64, error) {
	return nil, 0, e.err
}

func (e *endless) Follow(ctx context.Context, after int64) <-chan ownership.Followed {
	out := make(chan ownership.Followed)
	go func() {
		defer close(out)
		for {
			select {
			case <-time.After(e.every):
				after++
			case <-ctx.Done():
				return
			}
			select {
			case out <- ownership.Followed{Event: ownership.Event{Revision: after, What: "claim"}}:
				e.sent.Add(1)
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// stuck is a client that does not read what is sent after the first lines.
type stuck struct {
	http.ResponseWriter
	lines    int
	deadline time.Time
}

func (w *stuck) SetWriteDeadline(t time.Time) error {
	w.deadline = t
	return nil
}

func (w *stuck) SetReadDeadline(time.Time) error { return nil }

func (w *stuck) Write(b []byte) (int, error) {
	if w.lines--; w.lines >= 0 {
		return w.ResponseWriter.Write(b)
	}
	time.Sleep(time.Until(w.deadline))
	return 0, os.ErrDeadlineExceeded
}

func (w *stuck) FlushError() error { return nil }

func TestFollowerWhoDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &endless{every: time.Second}
		w := &stuck{ResponseWriter: httptest.NewRecorder(), lines: 5}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		began := time.Now()
		quiet(o).ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/v1/events?follow=true", nil))
		// Four events after the first line, one that is not read, and ten seconds of patience.
		if took := time.Since(began); took != 15*time.Second || o.sent.Load() != 5 {
			t.Errorf("dropped after %v, with %d events read", took, o.sent.Load())
		}
		cancel()
		synctest.Wait()
	})
}

// While nothing happens, lines say that the plugin is there.
func TestFollowQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &endless{every: 50 * time.Second}
		w := httptest.NewRecorder()
		ctx, cancel := context.WithTimeout(t.Context(), 70*time.Second)
		defer cancel()
		quiet(o).ServeHTTP(&stuck{ResponseWriter: w, lines: 100}, httptest.NewRequestWithContext(ctx, http.MethodGet, "/v1/events?follow=true", nil))
		event := `{"event":{"revision":8,"at":"0001-01-01T00:00:00Z","host":"","what":"claim","node":""},"next":8}`
		want := strings.Join([]string{`{"next":7}`, `{"next":7}`, `{"next":7}`, `{"next":7}`, event, `{"next":8}`, `{"next":8,"error":"the plugin ends"}`, ""}, "\n")
		if got := w.Body.String(); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
		if got := w.Header().Get("Content-Type"); got != "application/x-ndjson" {
			t.Errorf("content type %s", got)
		}
		synctest.Wait()
	})
}

// What cannot begin is an error, and no stream.
func TestFollowRefused(t *testing.T) {
	for want, err := range map[string]error{
		`410 {"error":"events before revision 12 are gone: they are kept for 7 days"}`: &ownership.GoneError{Before: 12},
		`503 {"error":"ownership cannot be checked: etcd is away"}`:                    fmt.Errorf("%w: etcd is away", ownership.ErrUnavailable),
		`500 {"error":"x"}`: errors.New("x"),
	} {
		h := quiet(&endless{err: err})
		for range 20 { // none is left to count as a follower
			for _, follow := range []string{"true", "false"} {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/events?after=3&follow="+follow, nil))
				if got := fmt.Sprintf("%d %s", w.Code, strings.TrimSpace(w.Body.String())); got != want {
					t.Fatalf("follow=%s: %s, want %s", follow, got, want)
				}
			}
		}
	}
}
