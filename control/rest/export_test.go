package rest

import (
	"reflect"
	"testing"
)

// SetMaxConnections lets fewer clients in for the time of a test.
func SetMaxConnections(t testing.TB, n int) {
	was := maxConnections
	t.Cleanup(func() { maxConnections = was })
	maxConnections = n
}

// V2Requests are all of v2: "GET /v2/volumes".
func V2Requests() (all []string) {
	for _, r := range v2 {
		all = append(all, r.method+" "+r.path)
	}
	return all
}

// V2Types are what is sent and taken in v2, by their names in the description.
func V2Types() map[string]reflect.Type {
	all := map[string]reflect.Type{}
	for _, v := range []any{
		version{},
		volume{},
		volumes{},
		owner{},
		placement{},
		mounted{},
		leased{},
		member{},
		nodes{},
		creation{},
		destination{},
		drained{},
		busy{},
		event{},
		events{},
		problem{},
	} {
		t := reflect.TypeOf(v)
		all[t.Name()] = t
	}
	return all
}
