package ownership

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// fuzz checks a decoder: no value makes it panic, an error names the key, and
// what it accepts it accepts again after a round trip.
func fuzz[T any](f *testing.F, key string, decode func(KV) (T, error), seeds ...string) {
	f.Helper()
	for _, seed := range append(seeds, "", "null", "{}", "[]", `"x"`, "{", `{"id":1}`, "\xff") {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		kv := KV{Key: key, Value: value, CreateRevision: 3, ModRevision: 7, Lease: 5}
		v, err := decode(kv)
		if err != nil {
			b, ok := errors.AsType[*BrokenError](err)
			if !ok || b.Key != key {
				t.Fatalf("%q: got error %v, want a BrokenError about %s", value, err, key)
			}
			if !reflect.ValueOf(v).IsZero() {
				t.Fatalf("%q: got %+v with an error", value, v)
			}
			return
		}
		if !json.Valid(value) {
			t.Fatalf("%q is not JSON and was accepted", value)
		}
		kv.Value = encode(v)
		again, err := decode(kv)
		if err != nil {
			t.Fatalf("%q: its own encoding %q: %v", value, kv.Value, err)
		}
		if got, want := encode(again), encode(v); string(got) != string(want) {
			t.Fatalf("%q: got %s after a round trip, want %s", value, got, want)
		}
	})
}

func FuzzVolume(f *testing.F) {
	fuzz(f, "/p/v1/vol/v", func(kv KV) (Volume, error) {
		v, err := decodeVolume(kv)
		if err == nil && (v.ID != "v" || v.Name == "" || v.Size < 0 || v.Phase == "" || v.Revision != 7) {
			return v, errors.New("accepted a volume that is none")
		}
		return v, err
	}, `{"id":"v","name":"n","size":1,"phase":"ready","formatted":true,"created":"2026-01-02T03:04:05Z","options":{"a":"b"}}`,
		`{"id":"v","name":"n","phase":"strange"}`, `{"id":"w","name":"n","phase":"ready"}`, `{"id":"v","name":"n","phase":"ready","future":[1]}`)
}

func FuzzOwner(f *testing.F) {
	fuzz(f, "/p/v1/own/v", func(kv KV) (Owner, error) {
		o, err := decodeOwner(kv)
		if err == nil && (o.Volume != "v" || o.Node == "" || o.Token != 7 || o.Pending != nil && (o.Pending.Node == "" || o.Pending.Token <= 0)) {
			return o, errors.New("accepted an owner that is none")
		}
		return o, err
	}, `{"volume":"v","node":"a","host":"h","boot":"b","op":"o","pending":{"node":"x","boot":"y","token":5}}`, `{"volume":"v"}`, `{"node":"a"}`,
		`{"volume":"v","node":"a","unclean":true,"pending":{"node":"x","host":"h","boot":"y","token":5,"identities":{"ebs":"i-1"},"grounds":"silent"}}`,
		`{"volume":"v","node":"a","pending":{}}`, `{"volume":"v","node":"a","pending":{"node":"x","token":-1}}`)
}

func FuzzRequest(f *testing.F) {
	fuzz(f, "/p/v1/req/a/v/b", func(kv KV) (Request, error) {
		r, err := decodeRequest(kv)
		if err == nil && (r.Owner != "a" || r.Volume != "v" || r.Node != "b" || r.Revision != 3 || r.Lease != 5) {
			return r, errors.New("accepted a request that is none")
		}
		return r, err
	}, `{"volume":"v","owner":"a","node":"b","since":"2026-01-02T03:04:05Z","purpose":"mount"}`, `{"volume":"v","owner":"b","node":"a"}`)
}

func FuzzReply(f *testing.F) {
	fuzz(f, "/p/v1/rep/b/v", decodeReply, `{"volume":"v","node":"a","busy":true,"containers":["x"]}`, `{"volume":"w"}`)
}

func FuzzNode(f *testing.F) {
	fuzz(f, "/p/v1/node/a", decodeNode, `{"id":"a","state":"removed"}`, `{"id":"b"}`, `{"id":"a","identities":{"ebs":"i-1","":""}}`, `{"id":"a","identities":[]}`)
}

func FuzzAlive(f *testing.F) {
	fuzz(f, "/p/v1/live/a", decodeAlive, `{"id":"a","boot":"b","session":"s","op":"o"}`, `{"op":"o"}`)
}

func FuzzName(f *testing.F) {
	fuzz(f, "/p/v1/name/n", decodeName, `{"volume":"v","op":"o"}`, `{"volume":"a/b"}`)
}

func FuzzDeath(f *testing.F) {
	fuzz(f, "/p/v1/fence/a/b", func(kv KV) (Death, error) {
		d, err := decodeDeath(kv)
		if err == nil && (d.Node != "a" || d.Boot != "b" || d.Revision != 7) {
			return d, errors.New("accepted a death that is none")
		}
		return d, err
	}, `{"node":"a","host":"h","boot":"b","method":"operator","evidence":"off","by":"root","at":"2026-01-02T03:04:05Z","forced":true}`,
		`{"node":"a"}`, `{"node":"b","boot":"a"}`, `{"node":"a","boot":"b","at":1}`)
}

func FuzzMeta(f *testing.F) {
	fuzz(f, "/p/v1/meta", decodeMeta, `{"cluster":"c","gen":1,"schema":1}`, `{"cluster":"c","schema":2}`)
}

func FuzzCatalog(f *testing.F) {
	fuzz(f, "/p/v1/csi/san/v", func(kv KV) (entry, error) {
		e, err := decodeEntry(kv)
		if err == nil && (!json.Valid(e.Value) || string(e.Value) == "null") {
			return e, errors.New("accepted a value that is none")
		}
		return e, err
	}, `{"op":"o","value":{"name":"db","cluster":"c","asked":1,"holder":{"node":"a","identity":"i","token":3}}}`,
		`{"op":"o"}`, `{"value":null}`, `{"value":"x"}`, `{"op":1,"value":{}}`)
}

// Values of an older version, and of a newer one, are understood; a damaged one
// names its key.
func TestOtherVersions(t *testing.T) {
	want := func(name string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, want)
		}
	}
	kv := func(key, value string) KV { return KV{Key: key, Value: []byte(value), ModRevision: 7} }
	o, err := decodeOwner(kv("/own/v", `{"volume":"v","node":"a","host":"h","boot":"b","op":"o","from":"x","clean":true}`))
	want("older owner", o, Owner{Volume: "v", Node: "a", Host: "h", Boot: "b", Op: "o", From: "x", Clean: true, Token: 7}, err)
	o, err = decodeOwner(kv("/own/v", `{"volume":"v","node":"a","pending":{"node":"x","boot":"y","token":5,"attachment":"att-1"}}`))
	want("older takeover", o, Owner{Volume: "v", Node: "a", Token: 7, Pending: &Pending{Node: "x", Boot: "y", Token: 5}}, err)
	o, err = decodeOwner(kv("/own/v", `{"volume":"v","node":"a","future":{},"pending":{"node":"x","token":5,"grounds":"voted out","future":1}}`))
	want("newer takeover", o, Owner{Volume: "v", Node: "a", Token: 7, Pending: &Pending{Node: "x", Token: 5, Grounds: "voted out"}}, err)
	n, err := decodeNode(kv("/node/a", `{"id":"a","host":"h","boot":"b"}`))
	want("older node", n, Node{ID: "a", Host: "h", Boot: "b"}, err)
	n, err = decodeNode(kv("/node/a", `{"id":"a","future":[{}],"identities":{"x":"y"}}`))
	want("newer node", n, Node{ID: "a", Identities: map[string]string{"x": "y"}}, err)
	d, err := decodeDeath(kv("/fence/a/b", `{"node":"a","boot":"b"}`))
	want("older death", d, Death{Node: "a", Boot: "b", Revision: 7}, err)
	d, err = decodeDeath(kv("/fence/a/b", `{"node":"a","boot":"b","forced":true,"future":null}`))
	want("newer death", d, Death{Node: "a", Boot: "b", Forced: true, Revision: 7}, err)
	m, err := decodeMeta(kv("/meta", `{"cluster":"c","gen":4,"schema":1,"future":""}`))
	want("newer meta", m, meta{Cluster: "c", Gen: 4, Schema: 1, revision: 7}, err)

	for key, decode := range map[string]func(KV) error{
		"/own/v":       func(kv KV) error { _, err := decodeOwner(kv); return err },
		"/vol/v":       func(kv KV) error { _, err := decodeVolume(kv); return err },
		"/node/a":      func(kv KV) error { _, err := decodeNode(kv); return err },
		"/live/a":      func(kv KV) error { _, err := decodeAlive(kv); return err },
		"/fence/a/b":   func(kv KV) error { _, err := decodeDeath(kv); return err },
		"/name/n":      func(kv KV) error { _, err := decodeName(kv); return err },
		"/req/a/v/b":   func(kv KV) error { _, err := decodeRequest(kv); return err },
		"/rep/a/v":     func(kv KV) error { _, err := decodeReply(kv); return err },
		"/meta":        func(kv KV) error { _, err := decodeMeta(kv); return err },
		"/not/a/thing": func(kv KV) error { _, err := decodeDeath(kv); return err },
	} {
		for _, value := range []string{"", "{", `{"volume":1}`, "[]", `{"volume":"another","id":"another","node":"another"}`} {
			err := decode(kv(key, value))
			if b, ok := errors.AsType[*BrokenError](err); !ok || b.Key != key {
				if key == "/name/n" && strings.Contains(value, "another") {
					continue // any volume may have that name
				}
				t.Errorf("%s=%s: got error %v, want a BrokenError about it", key, value, err)
			}
		}
	}
}
