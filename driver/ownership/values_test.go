package ownership

import (
	"encoding/json"
	"errors"
	"reflect"
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
		if err == nil && (o.Volume != "v" || o.Node == "" || o.Token != 7) {
			return o, errors.New("accepted an owner that is none")
		}
		return o, err
	}, `{"volume":"v","node":"a","host":"h","boot":"b","op":"o","pending":{"node":"x","boot":"y","token":5}}`, `{"volume":"v"}`, `{"node":"a"}`)
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
	fuzz(f, "/p/v1/node/a", decodeNode, `{"id":"a","state":"removed"}`, `{"id":"b"}`)
}

func FuzzAlive(f *testing.F) {
	fuzz(f, "/p/v1/live/a", decodeAlive, `{"id":"a","boot":"b","session":"s","op":"o"}`, `{"op":"o"}`)
}

func FuzzName(f *testing.F) {
	fuzz(f, "/p/v1/name/n", decodeName, `{"volume":"v","op":"o"}`, `{"volume":"a/b"}`)
}

func FuzzMeta(f *testing.F) {
	fuzz(f, "/p/v1/meta", decodeMeta, `{"cluster":"c","gen":1,"schema":1}`, `{"cluster":"c","schema":2}`)
}
