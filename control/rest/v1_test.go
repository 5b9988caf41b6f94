package rest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// The cases of the original's own tests, under their names. What is not the same as there
// is in the table of differences in docs/api.md.

const (
	datasetsPath = "/v1/configuration/datasets"
	statePath    = "/v1/state/datasets"
	leasesPath   = "/v1/configuration/leases"
)

func (s *service) want(method, path, body string, status int, answer string, header ...string) reply {
	s.t.Helper()
	got := s.ask(method, path, body, header...)
	if got.status != status || got.body != answer {
		s.t.Errorf("%s %s %s:\n%d %s, want\n%d %s", method, path, body, got.status, got.body, status, answer)
	}
	if kind := got.header.Get("Content-Type"); kind != "application/json" {
		s.t.Errorf("%s %s: content type %q", method, path, kind)
	}
	return got
}

// mismatch is the answer to a body that does not match the schema.
func mismatch(errors ...string) string {
	data, _ := json.Marshal(map[string]any{"description": "The provided JSON doesn't match the required schema.", "errors": errors})
	text := string(data)
	for escaped, plain := range map[string]string{`\u003c`: "<", `\u003e`: ">", `\u0026`: "&"} {
		text = strings.ReplaceAll(text, escaped, plain)
	}
	return text
}

const uuid4 = `^[A-Fa-f0-9]{8}-[A-Fa-f0-9]{4}-4[A-Fa-f0-9]{3}-[89abAB][A-Fa-f0-9]{3}-[A-Fa-f0-9]{12}$`

func TestVersion(t *testing.T) {
	t.Run("version", func(t *testing.T) {
		serve(t).want("GET", "/v1/version", "", 200, `{"flocker":"2.0.0"}`)
	})
}

func TestCreateDataset(t *testing.T) {
	type test struct {
		name, body string
		before     func(s *service)
		header     func(s *service) []string
		status     int
		answer     string
		calls      []string
	}
	// Words longer than they may be, and as long.
	long256, long257 := strings.Repeat("é", 256), strings.Repeat("é", 257)
	many := map[string]string{}
	for i := range 17 {
		many[fmt.Sprint("k", i)] = "v"
	}
	seventeen, _ := json.Marshal(many)
	for _, c := range []test{
		{name: "wrong_schema", body: `{"primary":"` + alpha + `","junk":"garbage"}`, status: 400, answer: mismatch("Additional properties are not allowed ('junk' was unexpected)")},
		{name: "wrong_schema, more of it", body: `{"a":1,"b":2,"dataset_id":"x","maximum_size":67108865,"deleted":0}`, status: 400, answer: mismatch(
			"'x' does not match '"+uuid4+"'", "0 is not of type 'boolean'", "67108865 is not a multiple of 1024",
			"Additional properties are not allowed ('a', 'b' were unexpected)", "'primary' is a required property")},
		{name: "wrong_schema, an array", body: `[]`, status: 400, answer: mismatch("[] is not of type 'object'")},
		{name: "wrong_schema, size", body: `{"primary":"` + alpha + `","maximum_size":1024}`, status: 400, answer: mismatch("1024 is less than the minimum of 67108864")},
		{name: "wrong_schema, negative size", body: `{"primary":"` + alpha + `","maximum_size":-67108864}`, status: 400, answer: mismatch("-67108864 is less than the minimum of 67108864")},
		{name: "wrong_schema, size in words", body: `{"primary":"` + alpha + `","maximum_size":"67108864"}`, status: 400, answer: mismatch("'67108864' is not of type 'integer', 'null'")},
		{name: "wrong_schema, size in parts", body: `{"primary":"` + alpha + `","maximum_size":67108864.5}`, status: 400, answer: mismatch("67108864.5 is not of type 'integer', 'null'")},
		{name: "wrong_schema, size beyond all", body: `{"primary":"` + alpha + `","maximum_size":99999999999999999999}`, status: 400, answer: mismatch("99999999999999999999 is greater than the maximum of 9223372036854775807")},
		{name: "wrong_schema, metadata", body: `{"primary":"` + alpha + `","metadata":{"a":1,"b":null,"c":"` + long257 + `"}}`, status: 400, answer: mismatch(
			"1 is not of type 'string'", "None is not of type 'string'", "'"+strings.ToValidUTF8(("'" + long257)[:400], "")[1:]+"… is too long")},
		{name: "wrong_schema, key of metadata", body: `{"primary":"` + alpha + `","metadata":{"":"x"}}`, status: 400, answer: mismatch("Additional properties are not allowed ('' was unexpected)")},
		{name: "wrong_schema, too much metadata", body: `{"primary":"` + alpha + `","metadata":` + string(seventeen) + `}`, status: 400, answer: mismatch(string(seventeen) + " has too many properties")},
		{name: "malformedRequest", body: `{"primary":`, status: 400, answer: `{"description":"The request body could not be decoded according to the value of the\nContent-Type header."}`},
		{name: "malformedRequest, more than one", body: `{"primary":"` + alpha + `"} {}`, status: 400, answer: `{"description":"The request body could not be decoded according to the value of the\nContent-Type header."}`},
		{name: "noBodyPOST", body: ``, status: 400, answer: `{"description":"The request body could not be decoded according to the value of the\nContent-Type header."}`},
		{name: "missing_primary", body: `{}`, status: 400, answer: mismatch("'primary' is a required property")},
		{
			name: "dataset_id_collision_different_node", before: func(s *service) { s.add("db", id1) },
			body: `{"primary":"` + beta + `","dataset_id":"` + id1 + `"}`, status: 409, answer: `{"description":"The provided dataset_id is already in use."}`,
		},
		{
			name: "dataset_id_collision_same_node", before: func(s *service) { s.add("db", id1) },
			body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `"}`, status: 409, answer: `{"description":"The provided dataset_id is already in use."}`,
		},
		{
			name: "dataset_id_collision_different_case", before: func(s *service) { s.add("db", id1) },
			body: `{"primary":"` + alpha + `","dataset_id":"` + strings.ToUpper(id1) + `"}`, status: 409, answer: `{"description":"The provided dataset_id is already in use."}`,
		},
		{
			name: "dataset_id_collision with a deleted one", before: func(s *service) {
				s.add("db", id1)
				if err := s.RemoveVolume(s.t.Context(), "db", id1); err != nil {
					s.t.Fatal(err)
				}
				s.calls = nil
			},
			body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `"}`, status: 409, answer: `{"description":"The provided dataset_id is already in use."}`,
		},
		{
			name: "unknown_primary_node", body: `{"primary":"` + id2 + `","dataset_id":"` + id1 + `"}`,
			status: 400, answer: `{"description":"The provided primary node is not part of the cluster."}`,
		},
		{
			name: "minimal_create_dataset", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `"}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "create_ignores_other_nodes", before: func(s *service) { s.add("other", id2) }, body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `"}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "ids in capitals", body: `{"primary":"` + strings.ToUpper(alpha) + `","dataset_id":"` + strings.ToUpper(id1) + `","deleted":false}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "create_with_metadata", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","metadata":{"name":"postgres","x":"` + long256 + `","clusterhq:flocker:profile":"gold"}}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{"clusterhq:flocker:profile":"gold","name":"postgres","x":"` + long256 + `"},"maximum_size":10737418240}`,
			calls: []string{
				"create postgres map[profile:gold] map[clusterhq:flocker:profile:gold name:postgres x:" + long256 + "] by user-anna",
				`move postgres to "` + alpha + `" by user-anna`,
			},
		},
		{
			name: "create_with_metadata, a name that Docker cannot have", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","metadata":{"name":"my data"}}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{"name":"my data"},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[name:my data] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "create_with_metadata, a name in use", before: func(s *service) { s.add("db", id2) }, body: `{"primary":"` + alpha + `","metadata":{"name":"db"}}`,
			status: 409, answer: `{"description":"The name \"db\" is in use by dataset ` + id2 + `."}`,
		},
		{
			name: "create_with_maximum_size", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","maximum_size":67108864}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":67108864}`,
			calls: []string{"create " + id1 + " map[size:67108864] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "create_with_maximum_size_null", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `","maximum_size":null}`,
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			name: "if_matches_success", body: `{"primary":"` + alpha + `","dataset_id":"` + id1 + `"}`,
			header: func(s *service) []string {
				return []string{"X-If-Configuration-Matches", "0123", "X-If-Configuration-Matches", s.tag()}
			},
			status: 201, answer: `{"dataset_id":"` + id1 + `","primary":"` + alpha + `","deleted":false,"metadata":{},"maximum_size":10737418240}`,
			calls: []string{"create " + id1 + " map[] map[] by user-anna", "move " + id1 + ` to "` + alpha + `" by user-anna`},
		},
		{
			// Before the schema is looked at.
			name: "if_matches_failure", body: `{}`, header: func(*service) []string { return []string{"X-If-Configuration-Matches", "0123"} },
			status: 412, answer: `{"description":"Tag doesn't match. Required: 0123, current: TAG"}`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t)
			if c.before != nil {
				c.before(s)
			}
			var header []string
			if c.header != nil {
				header = c.header(s)
			}
			s.want("POST", datasetsPath, c.body, c.status, strings.ReplaceAll(c.answer, "TAG", s.tag()), header...)
			if calls := s.asks(); !slices.Equal(calls, c.calls) {
				t.Errorf("the driver was asked for %q, want %q", calls, c.calls)
			}
			if c.status == 201 {
				// Whoever polls the state finds it the first time.
				if got := s.ask("GET", statePath, ""); !strings.Contains(got.body, id1) {
					t.Errorf("it is not in the state: %s", got.body)
				}
			}
		})
	}
	t.Run("create_generates_different_dataset_ids", func(t *testing.T) {
		s := serve(t)
		ids := map[string]bool{}
		for range 3 {
			got := s.ask("POST", datasetsPath, `{"primary":"`+alpha+`"}`)
			var d struct {
				ID string `json:"dataset_id"`
			}
			got.decode(t, &d)
			if got.status != 201 || !regexp.MustCompile(uuid4).MatchString(d.ID) || ids[d.ID] {
				t.Errorf("%d %s after %v", got.status, got.body, ids)
			}
			ids[d.ID] = true
		}
	})
	t.Run("another host has made it meanwhile", func(t *testing.T) {
		s := serve(t)
		s.err = fmt.Errorf("volume db exists: %w", ownership.ErrConflict)
		s.want("POST", datasetsPath, `{"primary":"`+alpha+`","metadata":{"name":"db"}}`, 409, `{"description":"volume db exists: changed by another node."}`)
	})
}

// tag is that of the present configuration.
func (s *service) tag() string {
	s.t.Helper()
	got := s.ask("GET", datasetsPath, "")
	tag := got.header.Get("X-Configuration-Tag")
	if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(tag) {
		s.t.Errorf("the tag is %q", tag)
	}
	return tag
}

func row(id, primary string, deleted bool, metadata string) string {
	return fmt.Sprintf(`{"dataset_id":"%s","primary":"%s","deleted":%v,"metadata":%s,"maximum_size":10737418240}`, id, primary, deleted, metadata)
}

func TestUpdateDatasetGeneral(t *testing.T) {
	t.Run("unknown_dataset", func(t *testing.T) {
		serve(t).want("POST", datasetsPath+"/"+id1, `{"primary":"`+alpha+`"}`, 404, `{"description":"Dataset not found."}`)
	})
	t.Run("nothing to update", func(t *testing.T) {
		s := serve(t)
		s.add("db", id1)
		s.want("POST", datasetsPath+"/"+id1, `{}`, 200, row(id1, "00000000-0000-0000-0000-000000000000", false, `{"name":"db"}`))
		if calls := s.asks(); len(calls) > 0 {
			t.Errorf("the driver was asked for %q", calls)
		}
	})
	t.Run("only the primary", func(t *testing.T) {
		s := serve(t)
		s.add("db", id1)
		s.want("POST", datasetsPath+"/"+id1, `{"maximum_size":67108864}`, 400, mismatch("Additional properties are not allowed ('maximum_size' was unexpected)"))
	})
}

func TestUpdatePrimaryDataset(t *testing.T) {
	for _, c := range []struct {
		name, body, match string
		status            int
		answer            string
		moved             string // where to
	}{
		{"change_primary_to_unconfigured_node", `{"primary":"` + beta + `"}`, "", 200, row(id1, beta, false, `{"name":"db"}`), beta},
		{"unknown_primary_node", `{"primary":"` + id2 + `"}`, "", 400, `{"description":"The provided primary node is not part of the cluster."}`, ""},
		{"change_primary_to_configured_node", `{"primary":"` + strings.ToUpper(beta) + `"}`, "", 200, row(id1, beta, false, `{"name":"db"}`), beta},
		{"primary_unchanged", `{"primary":"` + alpha + `"}`, "", 200, row(id1, alpha, false, `{"name":"db"}`), alpha},
		{"primary_invalid", `{"primary":"192.0.2.1"}`, "", 400, mismatch("'192.0.2.1' does not match '" + uuid4 + "'"), ""},
		{"primary_invalid, none", `{"primary":null}`, "", 400, mismatch("None is not of type 'string'"), ""},
		{"if_matches_success", `{"primary":"` + beta + `"}`, "TAG", 200, row(id1, beta, false, `{"name":"db"}`), beta},
		{"if_matches_failure", `{"primary":"` + beta + `"}`, "feed", 412, `{"description":"Tag doesn't match. Required: feed, current: TAG"}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t)
			s.add("db", id1)
			if _, err := s.MoveVolume(t.Context(), "db", id1, alpha, ""); err != nil {
				t.Fatal(err)
			}
			s.calls = nil
			tag := s.tag()
			var header []string
			if c.match != "" {
				header = []string{"X-If-Configuration-Matches", strings.ReplaceAll(c.match, "TAG", tag)}
			}
			s.want("POST", datasetsPath+"/"+strings.ToUpper(id1), c.body, c.status, strings.ReplaceAll(c.answer, "TAG", tag), header...)
			var calls []string
			if c.moved != "" {
				calls = []string{`move db to "` + c.moved + `" by user-anna`}
			}
			if got := s.asks(); !slices.Equal(got, calls) {
				t.Errorf("the driver was asked for %q, want %q", got, calls)
			}
			if c.moved != "" {
				s.want("GET", datasetsPath, "", 200, "["+row(id1, c.moved, false, `{"name":"db"}`)+"]")
			}
		})
	}
}

func TestDeleteDataset(t *testing.T) {
	path := datasetsPath + "/" + id1
	deleted := row(id1, alpha, true, `{"name":"db"}`)
	prepare := func(t *testing.T) *service {
		t.Helper()
		s := serve(t)
		s.add("db", id1)
		if _, err := s.MoveVolume(t.Context(), "db", id1, alpha, ""); err != nil {
			t.Fatal(err)
		}
		s.calls = nil
		return s
	}
	t.Run("unknown_dataset", func(t *testing.T) {
		serve(t).want("DELETE", path, "", 404, `{"description":"Dataset not found."}`)
	})
	t.Run("delete", func(t *testing.T) {
		s := prepare(t)
		s.want("DELETE", path, "", 200, deleted)
		s.want("GET", datasetsPath, "", 200, "["+deleted+"]")
		s.want("GET", statePath, "", 200, "[]")
	})
	t.Run("delete_idempotent", func(t *testing.T) {
		s := prepare(t)
		s.want("DELETE", path, "", 200, deleted)
		s.want("DELETE", path, "", 200, deleted)
		if calls, want := s.asks(), []string{"remove db by user-anna"}; !slices.Equal(calls, want) {
			t.Errorf("the driver was asked for %q, want %q", calls, want)
		}
	})
	t.Run("update_deleted", func(t *testing.T) {
		s := prepare(t)
		s.want("DELETE", path, "", 200, deleted)
		s.want("POST", path, `{"primary":"`+beta+`"}`, 405, `{"description":"The dataset has been deleted."}`)
	})
	t.Run("update of one that is being deleted", func(t *testing.T) {
		s := prepare(t)
		s.view("db", func(v *ownership.View) { v.Volume.Phase = ownership.PhaseDeleting })
		s.want("POST", path, `{"primary":"`+beta+`"}`, 405, `{"description":"The dataset has been deleted."}`)
		s.want("DELETE", path, "", 200, deleted)
		s.want("GET", datasetsPath, "", 200, "["+deleted+"]")
		s.want("GET", statePath, "", 200, "[]")
	})
	t.Run("if_matches_success", func(t *testing.T) {
		s := prepare(t)
		s.want("DELETE", path, "", 200, deleted, "X-If-Configuration-Matches", s.tag())
	})
	t.Run("if_matches_failure", func(t *testing.T) {
		s := prepare(t)
		s.want("DELETE", path, "", 412, `{"description":"Tag doesn't match. Required: feed, current: `+s.tag()+`"}`, "X-If-Configuration-Matches", "feed")
		if calls := s.asks(); len(calls) > 0 {
			t.Errorf("the driver was asked for %q", calls)
		}
	})
	t.Run("in use", func(t *testing.T) {
		s := prepare(t)
		s.err = &ownership.BusyError{Volume: "db", Reply: ownership.Reply{Host: "alpha", Busy: true, Containers: []string{"web"}}}
		s.want("DELETE", path, "", 409, `{"description":"volume db is in use on host alpha by container web."}`)
	})
	t.Run("another one has its name by now", func(t *testing.T) {
		s := prepare(t)
		// The state is not told.
		s.RemoveOnly("db")
		s.want("DELETE", path, "", 200, deleted)
		if calls, want := s.asks(), []string{"remove db by user-anna"}; !slices.Equal(calls, want) {
			t.Errorf("the driver was asked for %q, want %q", calls, want)
		}
	})
}

// RemoveOnly makes RemoveVolume fail as it does when the volume of that name is another.
func (c *cluster) RemoveOnly(name string) { c.err = fmt.Errorf("%w: %s", ownership.ErrNotFound, name) }

func TestGetDatasetConfiguration(t *testing.T) {
	t.Run("empty", func(t *testing.T) { serve(t).want("GET", datasetsPath, "", 200, "[]") })
	t.Run("tag", func(t *testing.T) {
		s, other := serve(t), serve(t)
		first := s.tag()
		s.add("db", id1)
		second := s.tag()
		if first == second {
			t.Error("a volume more, and the tag is the same")
		}
		// What is no configuration is not in it: where the volume is.
		s.view("db", func(v *ownership.View) { v.Lease = &ownership.Lease{Volume: id1, Node: alpha} })
		if got := s.tag(); got != second {
			t.Error("the tag changes with a lease")
		}
		// Every host makes the same of the same configuration.
		other.change("", "", "", func(*ownership.State) {})
		other.add("db", id1)
		if got := other.tag(); got != second {
			t.Errorf("the tag is %s on one host and %s on another", second, got)
		}
	})
	t.Run("one_dataset", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`"}`)
		s.want("GET", datasetsPath, "", 200, "["+row(id1, alpha, false, `{}`)+"]")
	})
	t.Run("dataset_with_other_properties", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`","maximum_size":67108864,"metadata":{"b":"2","a":"1"}}`)
		s.want("GET", datasetsPath, "", 200, `[{"dataset_id":"`+id1+`","primary":"`+alpha+`","deleted":false,"metadata":{"a":"1","b":"2"},"maximum_size":67108864}]`)
	})
	t.Run("several_nodes", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`"}`)
		s.ask("POST", datasetsPath, `{"primary":"`+beta+`","dataset_id":"`+id2+`"}`)
		s.want("GET", datasetsPath, "", 200, "["+row(id1, alpha, false, `{}`)+","+row(id2, beta, false, `{}`)+"]")
	})
	t.Run("several_datasets, made by Docker", func(t *testing.T) {
		s := serve(t)
		s.add("web", id1)
		s.add("db", id2)
		s.view("db", func(v *ownership.View) {
			v.Owner = &ownership.Owner{Node: beta, Token: 3}
			v.Volume.Profile, v.Volume.Labels = "gold", map[string]string{"name": "not this", "team": "a"}
		})
		s.want("GET", datasetsPath, "", 200, "["+row(id1, "00000000-0000-0000-0000-000000000000", false, `{"name":"web"}`)+","+
			row(id2, beta, false, `{"clusterhq:flocker:profile":"gold","name":"db","team":"a"}`)+"]")
	})
}

func TestDatasetsState(t *testing.T) {
	t.Run("empty", func(t *testing.T) { serve(t).want("GET", statePath, "", 200, "[]") })
	t.Run("nonmanifest_listed", func(t *testing.T) {
		s := serve(t)
		s.add("db", id1)
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240}]`)
	})
	t.Run("one_dataset", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`"}`)
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240,"primary":"`+alpha+`","path":"/flocker/mnt/`+id1+`/data"}]`)
	})
	t.Run("nonmanifest_and_manifest", func(t *testing.T) {
		s := serve(t)
		s.held["web"] = true
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`","metadata":{"name":"db"}}`)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id2+`","metadata":{"name":"web"}}`)
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240,"primary":"`+alpha+`","path":"/flocker/mnt/`+id1+`/data"},{"dataset_id":"`+id2+`","maximum_size":10737418240}]`)
	})
	t.Run("two_datasets", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`"}`)
		s.ask("POST", datasetsPath, `{"primary":"`+beta+`","dataset_id":"`+id2+`"}`)
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240,"primary":"`+alpha+`","path":"/flocker/mnt/`+id1+`/data"},{"dataset_id":"`+id2+`","maximum_size":10737418240,"primary":"`+beta+`","path":"/flocker/mnt/`+id2+`/data"}]`)
	})
	t.Run("a presence of another tenure is none", func(t *testing.T) {
		s := serve(t)
		s.ask("POST", datasetsPath, `{"primary":"`+alpha+`","dataset_id":"`+id1+`","metadata":{"name":"db"}}`)
		for what, with := range map[string]func(v *ownership.View){
			"token": func(v *ownership.View) { v.Owner = &ownership.Owner{Node: alpha, Token: 8} },
			"node":  func(v *ownership.View) { v.Owner = &ownership.Owner{Node: beta, Token: 7} },
			"free":  func(v *ownership.View) { v.Owner = nil },
			"pending": func(v *ownership.View) {
				v.Owner = &ownership.Owner{Node: alpha, Token: 7, Pending: &ownership.Pending{Node: beta}}
			},
		} {
			s.mount("db")
			s.view("db", with)
			if got := s.ask("GET", statePath, ""); strings.Contains(got.body, "primary") {
				t.Errorf("%s: %s", what, got.body)
			}
		}
	})
	t.Run("mounted by Docker, until somebody wants it there", func(t *testing.T) {
		s := serve(t)
		s.add("db", id1)
		s.view("db", func(v *ownership.View) {
			v.Owner, v.OwnerLive = &ownership.Owner{Node: alpha, Host: "alpha", Token: 7}, true
		})
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240}]`)
		if got := s.ask("GET", datasetsPath, ""); !strings.Contains(got.body, `"primary":"`+alpha+`"`) {
			t.Errorf("the configuration: %s", got.body)
		}
		s.ask("POST", datasetsPath+"/"+id1, `{"primary":"`+alpha+`"}`)
		s.want("GET", statePath, "", 200, `[{"dataset_id":"`+id1+`","maximum_size":10737418240,"primary":"`+alpha+`","path":"/flocker/mnt/`+id1+`/data"}]`)
	})
	t.Run("one that is being made", func(t *testing.T) {
		s := serve(t)
		s.add("db", id1)
		s.view("db", func(v *ownership.View) { v.Volume.Phase = ownership.PhaseCreating })
		s.want("GET", statePath, "", 200, "[]")
	})
}

func TestLeases(t *testing.T) {
	body := func(id, node, expires string) string {
		return fmt.Sprintf(`{"dataset_id":"%s","node_uuid":"%s","expires":%s}`, id, node, expires)
	}
	prepare := func(t *testing.T) *service {
		t.Helper()
		s := serve(t)
		s.add("db", id1)
		s.add("web", id2)
		return s
	}
	left := func(t *testing.T, r reply) float64 {
		t.Helper()
		var l struct {
			Expires *float64 `json:"expires"`
		}
		r.decode(t, &l)
		if l.Expires == nil {
			t.Fatalf("it does not end: %s", r.body)
		}
		return *l.Expires
	}
	t.Run("get", func(t *testing.T) {
		s := prepare(t)
		s.want("GET", leasesPath, "", 200, "[]")
		s.ask("POST", leasesPath, body(id1, alpha, "null"))
		s.want("GET", leasesPath, "", 200, "["+body0(id1, alpha)+"]")
		s.view("db", func(v *ownership.View) {
			v.Lease = &ownership.Lease{Volume: id1, Node: alpha, Expires: new(time.Now().Add(-time.Second))}
		})
		s.want("GET", leasesPath, "", 200, "[]")
	})
	t.Run("delete_existing", func(t *testing.T) {
		s := prepare(t)
		s.ask("POST", leasesPath, body(id1, alpha, "null"))
		s.want("DELETE", leasesPath+"/"+strings.ToUpper(id1), "", 200, body0(id1, alpha))
		s.want("GET", leasesPath, "", 200, "[]")
	})
	t.Run("delete_non_existent", func(t *testing.T) {
		prepare(t).want("DELETE", leasesPath+"/"+id1, "", 404, `{"description":"Lease not found."}`)
	})
	t.Run("acquire_no_expiration", func(t *testing.T) {
		prepare(t).want("POST", leasesPath, body(id1, alpha, "null"), 201, body0(id1, alpha))
	})
	t.Run("acquire_with_expiration", func(t *testing.T) {
		s := prepare(t)
		got := s.ask("POST", leasesPath, body(id1, alpha, "600.5"))
		if seconds := left(t, got); got.status != 201 || seconds > 600.5 || seconds < 600.5-long.Seconds() {
			t.Errorf("%d %s", got.status, got.body)
		}
	})
	t.Run("acquire_already_exists_different_node", func(t *testing.T) {
		s := prepare(t)
		s.ask("POST", leasesPath, body(id1, alpha, "null"))
		s.want("POST", leasesPath, body(id1, beta, "null"), 409, `{"description":"Lease already held."}`)
		s.want("POST", leasesPath, body(id2, beta, "null"), 201, body0(id2, beta))
	})
	t.Run("renew", func(t *testing.T) {
		s := prepare(t)
		s.want("POST", leasesPath, body(id1, alpha, "null"), 201, body0(id1, alpha))
		got := s.ask("POST", leasesPath, body(id1, alpha, "600"))
		if seconds := left(t, got); got.status != 200 || seconds > 600 {
			t.Errorf("%d %s", got.status, got.body)
		}
	})
	for name, c := range map[string]struct {
		body   string
		status int
		answer string
	}{
		"no such dataset": {body("33333333-3333-4333-8333-333333333333", alpha, "null"), 404, `{"description":"Dataset not found."}`},
		"no such node":    {body(id1, id2, "null"), 400, `{"description":"The provided primary node is not part of the cluster."}`},
		"nothing":         {`{}`, 400, mismatch("'dataset_id' is a required property", "'node_uuid' is a required property", "'expires' is a required property")},
		"short":           {body("x", alpha, `"x"`), 400, mismatch("'x' is too short", "'x' is not of type 'number', 'null'")},
		"long":            {body(id1+"x", alpha, "1e300"), 400, mismatch("'"+id1+"x' is too long", "1e300 is greater than the maximum of 3153600000")},
		"no time":         {body(id1, alpha, "0"), 400, mismatch("0 is less than or equal to the minimum of 0")},
	} {
		t.Run(name, func(t *testing.T) { prepare(t).want("POST", leasesPath, c.body, c.status, c.answer) })
	}
}

func body0(id, node string) string {
	return fmt.Sprintf(`{"dataset_id":"%s","node_uuid":"%s","expires":null}`, id, node)
}

func TestNodesState(t *testing.T) {
	nodes := func(s *service) []ownership.NodeStatus { return s.state.Nodes }
	t.Run("empty", func(t *testing.T) {
		s := serve(t)
		s.change("", "", "", func(s *ownership.State) { s.Nodes = nil })
		s.want("GET", "/v1/state/nodes", "", 200, "[]")
	})
	t.Run("nodes", func(t *testing.T) {
		s := serve(t)
		all := `[{"uuid":"` + alpha + `","host":"10.0.0.1"},{"uuid":"` + beta + `","host":"10.0.0.2"}]`
		s.want("GET", "/v1/state/nodes", "", 200, all)
		s.change("", "", "", func(s *ownership.State) { s.Nodes[1].State = "cordoned" })
		s.want("GET", "/v1/state/nodes", "", 200, all)
		s.change("", "", "", func(s *ownership.State) { s.Nodes[1].Address = "" })
		s.want("GET", "/v1/state/nodes", "", 200, strings.ReplaceAll(all, "10.0.0.2", "beta"))
		s.change("", "", "", func(s *ownership.State) { s.Nodes[0].Live = false })
		s.want("GET", "/v1/state/nodes", "", 200, `[{"uuid":"`+beta+`","host":"beta"}]`)
		s.change("", "", "", func(s *ownership.State) { s.Nodes[0].Live, s.Nodes[0].State = true, ownership.Removed })
		s.want("GET", "/v1/state/nodes", "", 200, `[{"uuid":"`+beta+`","host":"beta"}]`)
		s.want("GET", "/v1/state/nodes/by_era/boot-of-alpha", "", 404, `{"description":"No node found with given era."}`)
		if len(nodes(s)) != 2 {
			t.Error("the test has lost a node")
		}
	})
}

func TestNodeByEra(t *testing.T) {
	s := serve(t)
	t.Run("known_era", func(*testing.T) {
		s.want("GET", "/v1/state/nodes/by_era/boot-of-beta", "", 200, `{"uuid":"`+beta+`"}`)
	})
	t.Run("unknown", func(*testing.T) {
		s.want("GET", "/v1/state/nodes/by_era/boot-of-nobody", "", 404, `{"description":"No node found with given era."}`)
	})
	t.Run("one that is not heard from", func(*testing.T) {
		s.change("", "", "", func(s *ownership.State) { s.Nodes[1].Live = false })
		s.want("GET", "/v1/state/nodes/by_era/boot-of-beta", "", 404, `{"description":"No node found with given era."}`)
	})
}

func TestContainers(t *testing.T) {
	s := serve(t)
	for _, path := range []string{"/v1/configuration/containers", "/v1/state/containers"} {
		s.want("GET", path, "", 200, "[]")
	}
	for _, c := range [][2]string{
		{"POST", "/v1/configuration/containers"},
		{"POST", "/v1/configuration/containers/web"},
		{"DELETE", "/v1/configuration/containers/web"},
		{"POST", "/v1/configuration/_compose"},
	} {
		s.want(c[0], c[1], `{}`, 410, `{"description":"Flocker does not start containers any more: use docker run, Compose or Swarm with the volume driver flocker, and a dataset follows its container."}`)
	}
}

// While etcd is away, looks are answered from memory, and say so; changes are refused.
func TestEtcdAway(t *testing.T) {
	s := serve(t)
	s.add("db", id1)
	s.stale, s.err = 90*time.Second, fmt.Errorf("%w: etcd does not answer", ownership.ErrUnavailable)
	for _, path := range []string{datasetsPath, statePath, leasesPath, "/v1/state/nodes", "/v1/state/nodes/by_era/boot-of-beta", "/v2/volumes", "/v2/volumes/db", "/v2/nodes", "/v2/nodes/alpha"} {
		if got := s.ask("GET", path, ""); got.status != 200 || got.header.Get("X-Flocker-Stale-Seconds") != "90.0" {
			t.Errorf("%s: %d, stale for %q s: %s", path, got.status, got.header.Get("X-Flocker-Stale-Seconds"), got.body)
		}
	}
	if got := s.ask("GET", "/v2/volumes", ""); !strings.Contains(got.body, `"stale_seconds":90`) {
		t.Errorf("the list does not say so: %s", got.body)
	}
	for _, c := range [][3]string{
		{"POST", datasetsPath, `{"primary":"` + alpha + `"}`},
		{"POST", datasetsPath + "/" + id1, `{"primary":"` + alpha + `"}`},
		{"DELETE", datasetsPath + "/" + id1, ""},
		{"POST", leasesPath, `{"dataset_id":"` + id1 + `","node_uuid":"` + alpha + `","expires":null}`},
		{"DELETE", leasesPath + "/" + id1, ""},
		{"POST", "/v2/volumes", `{"name":"web"}`},
		{"POST", "/v2/volumes/db/move", `{"host":"beta"}`},
		{"DELETE", "/v2/volumes/db", ""},
		{"POST", "/v2/nodes/alpha/cordon", ""},
		{"POST", "/v2/nodes/alpha/drain", ""},
	} {
		got := s.ask(c[0], c[1], c[2])
		if got.status != 503 || got.header.Get("Retry-After") != "5" || !strings.Contains(got.body, "ownership cannot be checked: etcd does not answer.") {
			t.Errorf("%s %s: %d %s (Retry-After: %s)", c[0], c[1], got.status, got.body, got.header.Get("Retry-After"))
		}
	}
}

// A host that nobody has asked for some minutes does not follow etcd: the first who asks again
// waits a moment, and gets what is so now.
func TestHeardAgain(t *testing.T) {
	rest.Set(t, rest.Freshness, 2*long)
	s := serve(t)
	s.add("db", id1)
	s.stale = time.Hour
	before := s.waited()
	asked := make(chan reply, 1)
	go func() {
		got, _ := send(t, s.client("anna"), "GET", s.url(statePath), "")
		asked <- got
	}()
	until(t, "it does not wait for etcd", func() bool { return s.waited() > before })
	s.change("", "", "", func(st *ownership.State) { st.Views, s.stale = nil, 0 })
	if got := <-asked; got.status != 200 || got.body != "[]" || got.header.Get("X-Flocker-Stale-Seconds") != "" {
		t.Errorf("%d %s, stale for %q s", got.status, got.body, got.header.Get("X-Flocker-Stale-Seconds"))
	}
}

// A host that has never heard from etcd has nothing to say.
func TestNothingKnown(t *testing.T) {
	s := serve(t)
	s.unknown = true
	begin := time.Now()
	for range 20 {
		got := s.ask("GET", statePath, "")
		if got.status != 503 || got.header.Get("Retry-After") != "5" || got.body != `{"description":"This host has not heard from etcd since it was started: try again, or ask another host."}` {
			t.Fatalf("%d %s (Retry-After: %s)", got.status, got.body, got.header.Get("Retry-After"))
		}
	}
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("each of 20 requests waits for etcd: %v", took)
	}
	if got := s.ask("GET", "/v1/version", ""); got.status != http.StatusOK {
		t.Errorf("the version: %d", got.status)
	}
	// It is asked for the first time, or again after a while.
	go s.change("", "", "", func(*ownership.State) { s.unknown = false })
	deadline := time.Now().Add(long)
	for s.ask("GET", statePath, "").status != 200 {
		if time.Now().After(deadline) {
			t.Fatal("what is known by now is not told")
		}
	}
}

// All of a hundred thousand datasets, at once as v1 has it, and by pages.
func TestManyDatasets(t *testing.T) {
	s := serve(t)
	const n = 100_000
	s.change("", "", "", func(s *ownership.State) { s.Views = many(n) })
	for _, path := range []string{datasetsPath, statePath} {
		got := s.ask("GET", path, "")
		if rows := strings.Count(got.body, `{"dataset_id":`); got.status != 200 || rows != n || !json.Valid([]byte(got.body)) {
			t.Errorf("%s: %d, %d rows", path, got.status, rows)
		}
	}
	seen, after := 0, ""
	for {
		got := s.ask("GET", "/v2/volumes?limit=1000&after="+after, "")
		var page struct {
			Volumes []struct{ Name string }
			Next    string
		}
		got.decode(t, &page)
		for _, v := range page.Volumes {
			if want := fmt.Sprintf("volume-%06d", seen); v.Name != want {
				t.Fatalf("volume %d is %s", seen, v.Name)
			}
			seen++
		}
		if after = page.Next; after == "" {
			break
		}
	}
	if seen != n {
		t.Errorf("%d volumes by pages", seen)
	}
}

// many are that many volumes, every second one mounted.
func many(n int) []ownership.View {
	views := make([]ownership.View, n)
	for i := range views {
		id := fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
		name := fmt.Sprintf("volume-%06d", i)
		views[i].Volume = ownership.Volume{
			ID: id, Name: name, Size: 10 << 30, FS: "ext4", Backend: "loopback", Phase: ownership.PhaseReady,
			Labels: map[string]string{"name": name, "team": "a"},
		}
		if i%2 == 0 {
			views[i].Placement = &ownership.Placement{Volume: id, Node: alpha, Host: "alpha"}
			views[i].Owner, views[i].OwnerLive = &ownership.Owner{Volume: id, Node: alpha, Host: "alpha", Token: 7}, true
			views[i].Presence = &ownership.Presence{Volume: id, Node: alpha, Token: 7, Path: "/flocker/mnt/" + id + "/data"}
		}
	}
	return views
}
