package driver_test

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/driver"
)

// engine serves handler as a Docker Engine on a unix socket, which it returns.
func engine(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: handler}}
	s.Start()
	t.Cleanup(s.Close)
	return socket
}

func TestUsing(t *testing.T) {
	const id = "4d1e0123456789abcdef0123456789abcdef0123456789abcdef0123456789ab"
	socket := engine(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/_ping":
			w.Header().Set("Api-Version", "1.41")
		case "/v1.41/containers/json":
			var filter map[string]map[string]bool
			if err := json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filter); err != nil {
				t.Errorf("filters: %v", err)
			}
			if !filter["volume"]["db"] || len(filter["volume"]) != 1 {
				t.Errorf("volume filter: got %v, want db", filter["volume"])
			}
			for _, state := range []string{"running", "paused", "restarting"} {
				if !filter["status"][state] {
					t.Errorf("status filter: got %v, want %s in it", filter["status"], state)
				}
			}
			_, _ = w.Write([]byte(`[{"Id":"` + id + `","Names":["/other/link","/web"],"State":"running"},` +
				`{"Id":"` + id + `","Names":null,"State":"paused"}]`))
		default:
			t.Errorf("unexpected request %s", r.URL.Path)
			http.NotFound(w, r)
		}
	})
	got, err := driver.NewEngine(socket).Using(t.Context(), "db")
	if err != nil {
		t.Fatal(err)
	}
	want := []driver.Container{{ID: id, Name: "web", State: "running"}, {ID: id, Name: id[:12], State: "paused"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestRoot(t *testing.T) {
	socket := engine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", "1.41")
			return
		}
		if r.URL.Path != "/v1.41/info" {
			t.Errorf("unexpected request %s", r.URL.Path)
		}
		_, _ = w.Write([]byte(`{"DockerRootDir":"/srv/docker"}`))
	})
	if got, err := driver.NewEngine(socket).Root(t.Context()); got != "/srv/docker" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	none := filepath.Join(t.TempDir(), "none.sock")
	if _, err := driver.NewEngine(none).Root(t.Context()); err == nil || !strings.Contains(err.Error(), "ask Docker on "+none+" for its directory: ") {
		t.Errorf("got %v", err)
	}
}

func TestUsingWithoutDocker(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	_, err := driver.NewEngine(socket).Using(t.Context(), "db")
	if err == nil || !strings.Contains(err.Error(), "ask Docker on "+socket+" which containers use volume db: ") {
		t.Errorf("got %v", err)
	}
}

// An Engine that is starting accepts connections and does not answer.
func TestUsingSilentDocker(t *testing.T) {
	socket := engine(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	start := time.Now()
	_, err := driver.NewEngine(socket).Using(t.Context(), "db")
	if took := time.Since(start); err == nil || took > 30*time.Second {
		t.Errorf("got %v after %v, want an error after two seconds", err, took)
	}
}
