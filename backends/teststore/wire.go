package teststore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// The test storage has two interfaces: the server's, over TCP, and the one of the
// initiator on each host, on a unix socket. Both are HTTP: POST /<operation> with a
// Request, answered with a Reply.

// Operations of the server. The first eight are those that a backend asks for; with
// a Cluster, volumes of other clusters are not there for them.
const (
	OpCreate = "create" // Ref, Volume, Cluster, Name, Size, Exclusive
	OpDelete = "delete" // Ref
	OpGet    = "get"    // Ref
	OpList   = "list"
	OpResize = "resize" // Ref, Size
	OpAttach = "attach" // Ref, Node, Initiator, Token
	OpDetach = "detach" // Ref, Node, Token; Grant if it is known
	OpFence  = "fence"  // Ref, Initiator, Token

	OpLogin  = "login"  // Ref, Grant, Sequence: by an initiator
	OpGrants = "grants" // Initiator; all if it is empty
	OpFaults = "faults" // Faults, DataFaults: the ones from now on
)

// Operations of the initiator.
const (
	OpIdentity = "identity"
	// OpConnect makes a device for a grant, OpDisconnect removes it and gives the
	// grant back. OpDevices compares the devices with the grants first: one whose
	// grant is gone gives I/O errors from then on, and is removed unless somebody has
	// it open; a grant without a device gets one.
	OpConnect    = "connect"    // Grants: the one
	OpDisconnect = "disconnect" // Ref, Node, Token; Grant if it is known
	OpDevices    = "devices"
)

// Request is what is asked of the server or an initiator. Which fields count
// depends on the operation.
type Request struct {
	// Caller is the initiator of the host that asks, for faults.
	Caller string `json:",omitempty"`

	Ref       string `json:",omitempty"`
	Volume    string `json:",omitempty"` // the dataset's UUID
	Cluster   string `json:",omitempty"`
	Name      string `json:",omitempty"`
	Size      int64  `json:",omitempty"`
	Exclusive bool   `json:",omitempty"`

	Node      string `json:",omitempty"`
	Initiator string `json:",omitempty"`
	Token     int64  `json:",omitempty"`
	Grant     string `json:",omitempty"` // a Grant's ID
	// Sequence is larger in every login of an initiator: a login that comes late
	// must not end the session of a later one.
	Sequence int64 `json:",omitempty"`

	Grants     []Grant     `json:",omitempty"`
	Faults     []Fault     `json:",omitempty"`
	DataFaults []DataFault `json:",omitempty"`
}

// Reply is the answer to a Request.
type Reply struct {
	Volumes  []Volume `json:",omitempty"`
	Grants   []Grant  `json:",omitempty"`
	Devices  []Device `json:",omitempty"`
	Evidence string   `json:",omitempty"`
	// Address is host:port of a session's data server.
	Address string `json:",omitempty"`
	// Suffered is how many calls have suffered each of the faults before.
	Suffered []int `json:",omitempty"`
	// Identity and Server are the name and the server of an initiator.
	Identity string `json:",omitempty"`
	Server   string `json:",omitempty"`
}

// Volume is a volume as the server keeps it.
type Volume struct {
	Ref       string
	ID        string
	Cluster   string
	Name      string
	Size      int64
	Exclusive bool // one grant at a time
}

// Grant is the server's permission for one initiator to use a volume under one
// token. IDs are never used again.
type Grant struct {
	ID        string
	Ref       string
	Node      string
	Initiator string
	Token     int64
	Size      int64 `json:",omitempty"` // the volume's, at the time of the answer
}

// Device is a block device that an initiator has made for a grant.
type Device struct {
	Grant string
	Ref   string
	Token int64
	Path  string
}

// FilePrefix is what the names of the files begin with that an initiator's loop
// devices are on, as in /sys/block/loopN/loop/backing_file. The loop devices of all
// hosts on one kernel are one set, and the names of initiators are rather long.
func FilePrefix(initiator string) string {
	sum := sha256.Sum256([]byte(initiator))
	return "teststore." + hex.EncodeToString(sum[:6]) + "."
}

// Fault is something that goes wrong with calls of the operations that a backend
// asks for. The first fault that fits a call is the one it suffers.
type Fault struct {
	// Op, Caller and Ref choose the calls; empty is every one.
	Op     string `json:",omitempty"`
	Caller string `json:",omitempty"`
	Ref    string `json:",omitempty"`
	// Times is how many calls suffer it; 0 is all.
	Times int `json:",omitempty"`

	// Refuse answers 503, and nothing is done.
	Refuse bool `json:",omitempty"`
	// Before and After are waited for before the call takes effect, and between
	// that and the reply. A caller who does not wait does not stop it.
	Before time.Duration `json:",omitempty"`
	After  time.Duration `json:",omitempty"`
	// Drop closes the connection instead of replying.
	Drop bool `json:",omitempty"`
	// HangUp closes it at once: with Before, the call takes effect when nobody
	// waits for it any more.
	HangUp bool `json:",omitempty"`
}

// DataFault is something that goes wrong with the data of grants, present and
// future, as long as it is set.
type DataFault struct {
	// Initiator and Ref choose the grants; empty is every one.
	Initiator string `json:",omitempty"`
	Ref       string `json:",omitempty"`
	// Hang leaves every read and write unanswered.
	Hang bool `json:",omitempty"`
	// Slow answers reads and writes only every so often.
	Slow time.Duration `json:",omitempty"`
	// Break ends the data servers as a crash does: I/O errors on the host, while the
	// grants stay.
	Break bool `json:",omitempty"`
}

// failure is how an error travels.
type failure struct {
	Text     string
	Class    string                  `json:",omitempty"`
	Attached *backends.AttachedError `json:",omitempty"`
}

var classes = map[string]error{
	"not found":   backends.ErrNotFound,
	"exists":      backends.ErrExists,
	"invalid":     backends.ErrInvalid,
	"in use":      backends.ErrInUse,
	"unavailable": backends.ErrUnavailable,
}

// WriteError answers a request with err.
func WriteError(w http.ResponseWriter, err error) {
	f := failure{Text: err.Error()}
	for name, class := range classes {
		if errors.Is(err, class) {
			f.Class = name
		}
	}
	if attached, ok := errors.AsType[*backends.AttachedError](err); ok {
		f.Attached = attached
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	_ = json.NewEncoder(w).Encode(f) // the caller sees that it is cut short
}

// err makes an error of what WriteError has written.
func (f failure) err() error {
	if f.Attached != nil {
		return f.Attached
	}
	if class := classes[f.Class]; class != nil {
		return backends.Classify(class, errors.New(f.Text))
	}
	return errors.New(f.Text)
}

// Peer is a server or an initiator as a client sees it.
type Peer struct {
	url    string
	what   string // in errors
	client *http.Client
}

// Server is the server at a URL; dial, if not nil, makes the connections.
func Server(url string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) Peer {
	return Peer{url, "the test storage at " + url, httpClient(dial)}
}

// Initiator is the initiator on a unix socket.
func Initiator(socket string) Peer {
	return Peer{"http://initiator", "the initiator at " + socket, httpClient(func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	})}
}

// httpClient is a client that makes a new connection for each call: one that a
// partition has broken would hold up the next call.
func httpClient(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
}

// Call asks for an operation. It is ErrUnavailable if there is no answer, and then
// it may have been done, or be done later.
func (p Peer) Call(ctx context.Context, op string, req Request) (Reply, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return Reply{}, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+"/"+op, bytes.NewReader(body))
	if err != nil {
		return Reply{}, err
	}
	resp, err := p.client.Do(r)
	if err != nil {
		return Reply{}, p.unavailable(ctx, err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return Reply{}, p.unavailable(ctx, err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		var reply Reply
		if err := json.Unmarshal(body, &reply); err != nil {
			return Reply{}, p.unavailable(ctx, err)
		}
		return reply, nil
	case http.StatusUnprocessableEntity:
		var f failure
		if err := json.Unmarshal(body, &f); err != nil {
			return Reply{}, p.unavailable(ctx, err)
		}
		return Reply{}, f.err()
	}
	return Reply{}, p.unavailable(ctx, errors.New(resp.Status))
}

func (p Peer) unavailable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s does not answer: %w", p.what, err))
}
