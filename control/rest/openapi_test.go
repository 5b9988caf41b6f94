package rest_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/control/rest"
)

type description struct {
	Paths map[string]map[string]struct {
		Parameters []struct {
			Name, In string
		}
		RequestBody *struct {
			Content map[string]struct{ Schema schema }
		}
		Responses map[string]struct {
			Content map[string]struct{ Schema schema }
		}
	}
	Components struct{ Schemas map[string]schema }
}

type schema struct {
	Ref                  string `json:"$ref"`
	Type                 string
	Enum                 []string
	Properties           map[string]schema
	Required             []string
	Items                *schema
	AdditionalProperties any
}

func described(t testing.TB) (d description) {
	t.Helper()
	data, err := os.ReadFile("openapi.json")
	if err == nil {
		err = json.Unmarshal(data, &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Every request of v2 is described, and no other.
func TestDescribedRequests(t *testing.T) {
	d := described(t)
	var have []string
	for path, methods := range d.Paths {
		for method, op := range methods {
			have = append(have, strings.ToUpper(method)+" "+path)
			for _, status := range []string{"403", "500"} {
				if _, ok := op.Responses[status]; !ok {
					t.Errorf("%s %s can be answered with %s", method, path, status)
				}
			}
			for segment := range strings.SplitSeq(path, "/") {
				if name := strings.Trim(segment, "{}"); name != segment && !slices.ContainsFunc(op.Parameters, func(p struct{ Name, In string }) bool { return p.Name == name && p.In == "path" }) {
					t.Errorf("%s %s: %s is not described", method, path, name)
				}
			}
		}
	}
	slices.Sort(have)
	want := rest.V2Requests()
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("described are\n%s\nand there are\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	got := serve(t).ask("GET", "/v2/openapi.json", "")
	data, err := os.ReadFile("openapi.json")
	if err != nil || got.body != strings.TrimSuffix(string(data), "\n") {
		t.Errorf("what is served is another description (%v)", err)
	}
}

// Every field that is sent or taken is described with its type, and no other.
func TestDescribedFields(t *testing.T) {
	d := described(t)
	types := rest.V2Types()
	if have, want := slices.Sorted(maps.Keys(d.Components.Schemas)), slices.Sorted(maps.Keys(types)); !slices.Equal(have, want) {
		t.Fatalf("described are %q, and there are %q", have, want)
	}
	for name, typ := range types {
		s := d.Components.Schemas[name]
		fields := map[string]string{}
		var required []string
		for f := range typ.Fields() {
			tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields[tag] = kindOf(f.Type)
			if options == "" {
				required = append(required, tag)
			}
		}
		described := map[string]string{}
		for field, s := range s.Properties {
			described[field] = strings.TrimPrefix(s.Ref, "#/components/schemas/") + s.Type
		}
		if !maps.Equal(fields, described) {
			t.Errorf("%s is described as %v, and is %v", name, described, fields)
		}
		if name == "creation" { // what is taken need not all be there
			required = []string{"name"}
		}
		slices.Sort(required)
		if have := slices.Sorted(slices.Values(s.Required)); !slices.Equal(have, required) {
			t.Errorf("%s has always %q, and is described with %q", name, required, have)
		}
	}
}

func kindOf(t reflect.Type) string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.String() == "time.Time", t.Kind() == reflect.String:
		return "string"
	case t.Kind() == reflect.Struct:
		return t.Name()
	case t.Kind() == reflect.Slice:
		return "array"
	case t.Kind() == reflect.Map:
		return "object"
	case t.Kind() == reflect.Bool:
		return "boolean"
	case t.Kind() == reflect.Float64:
		return "number"
	}
	return "integer"
}

// documented complains if the description has no such answer.
func (s *service) documented(method, path string, got reply) {
	s.t.Helper()
	d := described(s.t)
	path, _, _ = strings.Cut(path, "?")
	for pattern, methods := range d.Paths {
		if !matches(pattern, path) {
			continue
		}
		op, ok := methods[strings.ToLower(method)]
		if !ok {
			continue
		}
		response, ok := op.Responses[fmt.Sprint(got.status)]
		if !ok {
			s.t.Errorf("%s %s answers %d, which is not described", method, pattern, got.status)
			return
		}
		kind := got.header.Get("Content-Type")
		content, ok := response.Content[kind]
		if got.status == 204 {
			return
		}
		if !ok {
			s.t.Errorf("%s %s answers %d with %s, which is not described", method, pattern, got.status, kind)
			return
		}
		var body any
		got.decode(s.t, &body)
		if wrong := d.check(content.Schema, body, "body"); wrong != "" {
			s.t.Errorf("%s %s answers %d with %s", method, pattern, got.status, wrong)
		}
		return
	}
	s.t.Errorf("%s %s is not described", method, path)
}

func matches(pattern, path string) bool {
	a, b := strings.Split(pattern, "/"), strings.Split(path, "/")
	return slices.EqualFunc(a, b, func(p, s string) bool { return p == s || strings.HasPrefix(p, "{") })
}

// check says what of a value is not as described.
func (d description) check(s schema, value any, where string) string {
	if s.Ref != "" {
		s = d.Components.Schemas[strings.TrimPrefix(s.Ref, "#/components/schemas/")]
	}
	kind := "object"
	switch v := value.(type) {
	case string:
		kind = "string"
		if len(s.Enum) > 0 && !slices.Contains(s.Enum, v) {
			return fmt.Sprintf("%s %q", where, v)
		}
	case float64:
		kind = "number"
		if s.Type == "integer" && v == float64(int64(v)) {
			kind = "integer"
		}
	case bool:
		kind = "boolean"
	case []any:
		kind = "array"
		for i, item := range v {
			if wrong := d.check(*s.Items, item, fmt.Sprintf("%s[%d]", where, i)); wrong != "" {
				return wrong
			}
		}
	case map[string]any:
		for name, item := range v {
			field, ok := s.Properties[name]
			if !ok && s.AdditionalProperties == false {
				return where + "." + name + ", which is not described"
			}
			if wrong := d.check(field, item, where+"."+name); ok && wrong != "" {
				return wrong
			}
		}
		for _, name := range s.Required {
			if _, ok := v[name]; !ok {
				return where + " without " + name
			}
		}
	}
	if kind != s.Type {
		return fmt.Sprintf("%s of type %s, not %s", where, kind, s.Type)
	}
	return ""
}
