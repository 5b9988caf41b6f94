package rest_test

import (
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// changes are all that change something, with where to look for it and what is there then.
var changes = []struct {
	name, method, path, body string
	look                     string
	then, not                string
	of                       string // what was done before
}{
	{"v1 create", "POST", datasetsPath, `{"primary":"` + beta + `","dataset_id":"` + id2 + `"}`, datasetsPath, `{"dataset_id":"` + id2 + `","primary":"` + beta, "", ""},
	{"v1 update", "POST", datasetsPath + "/" + id1, `{"primary":"` + beta + `"}`, datasetsPath, `"primary":"` + beta, "", ""},
	{"v1 delete", "DELETE", datasetsPath + "/" + id1, "", statePath, "[]", id1, ""},
	{"v1 lease", "POST", leasesPath, `{"dataset_id":"` + id1 + `","node_uuid":"` + alpha + `","expires":null}`, leasesPath, id1, "", ""},
	{"v1 release", "DELETE", leasesPath + "/" + id1, "", leasesPath, "[]", id1, "lease"},
	{"v2 create", "POST", "/v2/volumes", `{"name":"web"}`, "/v2/volumes", `"name":"web"`, "", ""},
	{"v2 create on a host", "POST", "/v2/volumes", `{"name":"web","host":"beta"}`, "/v2/volumes/web", `"placement":{"node":"` + beta, "", ""},
	{"v2 move", "POST", "/v2/volumes/db/move", `{"host":"beta"}`, "/v2/volumes/db", `"placement":{"node":"` + beta, "", ""},
	{"v2 move to nowhere", "POST", "/v2/volumes/db/move", `{"host":""}`, "/v2/volumes/db", `"name":"db"`, "placement", "place"},
	{"v2 delete", "DELETE", "/v2/volumes/db", "", "/v2/volumes", `"volumes":[]`, id1, ""},
	{"v2 cordon", "POST", "/v2/nodes/beta/cordon", "", "/v2/nodes/beta", `"state":"cordoned"`, "", ""},
	{"v2 uncordon", "POST", "/v2/nodes/beta/uncordon", "", "/v2/nodes/beta", `"state":"live"`, "", "cordon"},
	{"v2 remove a node", "DELETE", "/v2/nodes/beta", "", "/v2/nodes", `"state":"removed"`, "", ""},
}

func (s *service) before(what string) {
	s.t.Helper()
	s.add("db", id1)
	s.view("db", func(v *ownership.View) {
		switch what {
		case "lease":
			v.Lease = &ownership.Lease{Volume: id1, Node: alpha, Revision: 7}
		case "place":
			v.Placement = &ownership.Placement{Volume: id1, Node: alpha, Host: "alpha"}
		}
	})
	if what == "cordon" {
		s.change("", "", "", func(st *ownership.State) { st.Nodes[1].State = ownership.Cordoned })
	}
}

// What was changed is seen by who asks the same host next, though this host hears of it later
// than etcd has it.
func TestSeenAfterwards(t *testing.T) {
	rest.Set(t, rest.Settle, 2*long)
	for _, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t)
			s.before(c.of)
			s.late = 300 * time.Millisecond
			if got := s.ask(c.method, c.path, c.body); got.status >= 300 {
				t.Fatalf("%d %s", got.status, got.body)
			}
			if got := s.ask("GET", c.look, ""); !strings.Contains(got.body, c.then) || c.not != "" && strings.Contains(got.body, c.not) {
				t.Errorf("afterwards %s is %d %s, want %s", c.look, got.status, got.body, c.then)
			}
		})
	}
}

// Deleted is what the storage has still to delete, too: nobody waits for that.
func TestTombstoneIsSeen(t *testing.T) {
	rest.Set(t, rest.Settle, long)
	for _, path := range []string{datasetsPath + "/" + id1, "/v2/volumes/db"} {
		s := serve(t)
		s.add("db", id1)
		s.burden = true
		begin := time.Now()
		if got := s.ask("DELETE", path, ""); got.status >= 300 || time.Since(begin) > long/2 {
			t.Errorf("%s: %d %s after %v", path, got.status, got.body, time.Since(begin))
		}
		s.want("GET", statePath, "", 200, "[]")
	}
}

// A change that is made is answered as made, though this host does not hear of it.
func TestNeverSeen(t *testing.T) {
	rest.Set(t, rest.Settle, 50*time.Millisecond)
	for _, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t)
			s.before(c.of)
			s.late = time.Hour
			begin := time.Now()
			got := s.ask(c.method, c.path, c.body)
			if took := time.Since(begin); got.status >= 300 || took > long {
				t.Errorf("%d %s, after %v", got.status, got.body, took)
			}
		})
	}
}
