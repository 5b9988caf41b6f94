package rest

import (
	"net"
	"net/http"
	"reflect"
	"testing"
)

// The limits that tests change.
var (
	WriteLimit       = &writeLimit
	Patience         = &patience
	Settle           = &settle
	Freshness        = &freshness
	MaxStreams       = &maxStreams
	Ping             = &ping
	Reader           = &reader
	MaxConnections   = &maxConnections
	CertificateRound = &certificateRound
	Idle             = &idle
	Grace            = &grace
)

// Set changes a limit for the time of a test.
func Set[T any](t testing.TB, limit *T, to T) {
	was := *limit
	t.Cleanup(func() { *limit = was })
	*limit = to
}

// Clients are those that Serve knows of.
type Clients struct{ clients }

// Note is told of a connection.
func (c *Clients) Note(conn net.Conn, state http.ConnState) { c.note(conn, state) }

// Len is how many there are.
func (c *Clients) Len() int { return len(c.all) }

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
