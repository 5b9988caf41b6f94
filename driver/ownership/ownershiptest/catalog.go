package ownershiptest

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

func catalog(r *rig) {
	a, b := r.node("a").Catalog("san"), r.node("b").Catalog("san")
	other := r.node("c").Catalog("san2")
	load := func(c *ownership.Catalog, volume string) (string, int64) {
		r.Helper()
		value, revision, err := c.Load(r.Context(), volume)
		r.ok(err)
		return string(value), revision
	}
	store := func(c *ownership.Catalog, volume, value string, revision int64, want bool) {
		r.Helper()
		var data []byte
		if value != "" {
			data = []byte(value)
		}
		if stored, err := c.Store(r.Context(), volume, data, revision); err != nil || stored != want {
			r.Fatalf("store %s at revision %d: got %v, %v, want %v", value, revision, stored, err, want)
		}
	}
	if value, revision := load(a, "v"); value != "" || revision != 0 {
		r.Fatalf("nothing is %s of revision %d", value, revision)
	}
	store(a, "v", `{"size":1}`, 7, false)
	store(a, "v", `{"size":1}`, 0, true)
	store(b, "v", `{"size":2}`, 0, false)
	value, first := load(b, "v")
	if value != `{"size":1}` || first == 0 {
		r.Fatalf("got %s of revision %d", value, first)
	}
	if got := r.keys("csi"); len(got) != 1 || got[0].Key != r.key("csi", "san", "v") || got[0].Lease != 0 {
		r.Errorf("keys are %+v", got)
	}
	store(b, "v", `{"size":2}`, first, true)
	store(a, "v", `{"size":3}`, first, false)
	store(a, "v", "", first, false)
	store(a, "w", `[1]`, 0, true)
	store(other, "v", `"other"`, 0, true)
	all, err := a.List(r.Context())
	r.ok(err)
	if got := fmt.Sprintf("%s", slices.Sorted(maps.Keys(all))); got != "[v w]" || string(all["v"]) != `{"size":2}` || string(all["w"]) != "[1]" {
		r.Errorf("list is %s", all)
	}
	value, second := load(a, "v")
	if value != `{"size":2}` || second <= first {
		r.Fatalf("got %s of revision %d", value, second)
	}
	store(a, "v", "", second, true)
	if value, revision := load(b, "v"); value != "" || revision != 0 {
		r.Fatalf("what was removed is %s of revision %d", value, revision)
	}
	if value, _ := load(other, "v"); value != `"other"` {
		r.Errorf("another backend's is %s", value)
	}

	for _, volume := range []string{"", "a/b"} {
		_, _, err := a.Load(r.Context(), volume)
		r.says(err, "names no volume")
		_, err = a.Store(r.Context(), volume, []byte("1"), 0)
		r.says(err, "names no volume")
	}
	_, err = a.Store(r.Context(), "v", []byte("{"), 0)
	r.says(err, "what is to be stored of volume v is not JSON")
}

func catalogAmbiguous(r *rig) {
	n := r.node("a")
	c := n.Catalog("san")
	for name, fault := range ambiguous {
		n.once(fault)
		if stored, err := c.Store(r.Context(), name, []byte("1"), 0); err != nil || !stored {
			r.Fatalf("%s: store: got %v, %v", name, stored, err)
		}
		_, revision, err := c.Load(r.Context(), name)
		r.ok(err)
		n.once(fault)
		if stored, err := c.Store(r.Context(), name, []byte("2"), revision); err != nil || !stored {
			r.Fatalf("%s: store again: got %v, %v", name, stored, err)
		}
		value, revision, err := c.Load(r.Context(), name)
		r.ok(err)
		if string(value) != "2" {
			r.Errorf("%s: got %s", name, value)
		}
		n.once(fault)
		if stored, err := c.Store(r.Context(), name, nil, revision); err != nil || !stored {
			r.Fatalf("%s: remove: got %v, %v", name, stored, err)
		}
	}
	// Another's change between the two sends is not this one's.
	n.followed(func() {
		n.bad.Inject(nil)
		_, revision, err := c.Load(r.Context(), "v")
		if stored, failed := c.Store(r.Context(), "v", []byte("3"), revision); !stored || failed != nil || err != nil {
			r.Errorf("the other's: %v, %v, %v", stored, failed, err)
		}
	})
	if stored, err := c.Store(r.Context(), "v", []byte("1"), 0); stored || err != nil {
		r.Errorf("overtaken: got %v, %v", stored, err)
	}
	n.bad.Inject(func(string) ownership.Fault { return ownership.Fault{Refused: true} })
	_, err := c.Store(r.Context(), "v", []byte("1"), 0)
	r.is(err, ownership.ErrUnavailable)
	_, _, err = c.Load(r.Context(), "v")
	r.is(err, ownership.ErrUnavailable)
	_, err = c.List(r.Context())
	r.is(err, ownership.ErrUnavailable)
}

func catalogBroken(r *rig) {
	c := r.node("a").Catalog("san")
	for _, value := range []string{"", "{", "[]", `{}`, `{"op":"x","value":null}`, `"x"`} {
		r.put(value, "csi", "san", "v")
		_, _, one := c.Load(r.Context(), "v")
		_, all := c.List(r.Context())
		for _, err := range []error{one, all} {
			if b, ok := errors.AsType[*ownership.BrokenError](err); !ok || b.Key != r.key("csi", "san", "v") {
				r.Errorf("%s: got %v, want a BrokenError about the key", value, err)
			}
		}
		// What cannot be read is not overwritten by chance.
		if stored, err := c.Store(r.Context(), "v", []byte("1"), 0); stored || err != nil {
			r.Errorf("%s: store: got %v, %v", value, stored, err)
		}
	}
	r.put(`{"op":"x","value":{"a":1},"future":[]}`, "csi", "san", "v")
	if value, _, err := c.Load(r.Context(), "v"); err != nil || string(value) != `{"a":1}` {
		r.Errorf("a newer version's: got %s, %v", value, err)
	}
}
