package csi

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
)

// An entry may be of another version, or broken: it is understood, or its volume is
// named in the error.
func FuzzEntry(f *testing.F) {
	for _, seed := range []string{
		"", "null", "{}", "[]", `"x"`, `{"asked":"1"}`, `{"holder":{"token":1.5}}`, "\xff",
		`{"name":"db","cluster":"c","parameters":{"a":"b"},"asked":1,"size":2,"ref":"csi1-e30","grow":true,"future":[1],` +
			`"holder":{"node":"a","identity":"i","token":3},"fenced":{"b":{"node":"b","identity":"j","token":2}},"deleting":true}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		e, err := decode("v", value)
		if err != nil {
			if e != nil || !errors.Is(err, backends.ErrUnavailable) || !strings.HasPrefix(err.Error(), "what the cluster remembers of volume v cannot be read: ") {
				t.Fatalf("%q: got %v, %v", value, e, err)
			}
			return
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode("v", text)
		if err != nil {
			t.Fatalf("%q: its own encoding %q: %v", value, text, err)
		}
		if back, err := json.Marshal(again); err != nil || !reflect.DeepEqual(back, text) {
			t.Fatalf("%q: got %s after a round trip, want %s", value, back, text)
		}
	})
}

// A reference comes out of etcd, too.
func FuzzReference(f *testing.F) {
	for _, seed := range []string{"", "csi1-", "csi1-e30", "csi2-e30", "csi1-!", reference{Volume: "6c8e1b8c-7d5a-4f2e-9b39-0d5bd9f7f1aa", ID: "x"}.String()} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		r, err := (&Backend{}).reference(ref)
		if err != nil {
			if !errors.Is(err, backends.ErrInvalid) || !reflect.DeepEqual(r, reference{}) {
				t.Fatalf("%q: got %+v, %v", ref, r, err)
			}
			return
		}
		again, err := (&Backend{}).reference(r.String())
		if err != nil || again.String() != r.String() {
			t.Fatalf("%q: got %+v, %v after a round trip, want %+v", ref, again, err, r)
		}
	})
}
