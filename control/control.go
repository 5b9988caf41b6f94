// Package control is what an operator asks of the plugin beside Docker: which
// nodes and volumes there are and how they are, that a node is dead, that a volume may be used again, that
// a restored etcd is the right one. It serves the requests of control/api; it
// decides nothing, but asks the driver, and sees to it that what is dangerous was
// typed twice.
//
// Whoever reaches it may do everything, so it belongs on a socket of root's.
package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Driver is what is asked to decide; *driver.Driver is one.
type Driver interface {
	Nodes(ctx context.Context) ([]ownership.NodeStatus, error)
	// ConfirmDead records that a host, given by name or by its node's id, is dead.
	// It is refused with an *ownership.LiveError while the host is live, unless
	// Forced.
	ConfirmDead(ctx context.Context, host string, d ownership.Death) (ownership.Death, error)
	Reinstate(ctx context.Context, name, by string) error
	AcceptRestore(ctx context.Context, by string) (gen int64, err error)
	CreateVolume(ctx context.Context, req driver.CreateRequest) (driver.Volume, error)
	Remove(ctx context.Context, name string) error
	// Move records on which host a volume is to be; "" is nowhere.
	Move(ctx context.Context, name, host, by string) (ownership.Placement, error)
	Cordon(ctx context.Context, host, by string, on bool) error
	// Drain takes no longer than 15 s, and may be asked again.
	Drain(ctx context.Context, host, by string) (driver.Drained, error)
	RemoveNode(ctx context.Context, host, by string) error
	// Survey returns all volumes, stale ones if etcd does not answer; Get one. They do
	// not ask the storage.
	Survey(ctx context.Context) (volumes []driver.Volume, stale bool)
	Get(ctx context.Context, name string) (driver.Volume, error)
	// Backends asks each backend of this host whether it answers.
	Backends(ctx context.Context) []driver.BackendStatus
	// Host looks at this host; it changes nothing.
	Host(ctx context.Context) driver.Host
}

// Owners is what is asked who has what; *ownership.Map is one.
type Owners interface {
	List(ctx context.Context) ([]ownership.View, error)
	Silence(node string) (silent time.Duration, ok bool)
	// Node is this host's, and Live an error if it cannot use etcd now.
	Node() ownership.Node
	Live() error
	Cluster() string
	// Servers asks each etcd server how it is.
	Servers(ctx context.Context) []ownership.Server
}

const (
	// deadline of a request; before api.Patience, so that the operator reads our
	// sentence.
	deadline = 20 * time.Second
	// listing bounds what an answer waits for the names of volumes: they are
	// welcome, not needed.
	listing  = 5 * time.Second
	ioLimit  = 10 * time.Second // to read a body, to write an answer
	maxBody  = 64 << 10
	maxText  = 1000 // bytes of because and by
	unstated = "an operator said so"
)

// Admin serves the requests of control/api.
type Admin struct {
	driver  Driver
	owners  Owners
	version string
	log     *logrus.Entry
	mux     *http.ServeMux
	// certificates are those that are in use on this host.
	certificates func() []certs.Expiry
}

// New makes an Admin of the plugin of this version. Every change that is asked for
// is logged, done or not.
func New(d Driver, owners Owners, version string, log *logrus.Entry) *Admin {
	a := &Admin{
		driver: d, owners: owners, version: version, log: log, mux: http.NewServeMux(),
		certificates: func() []certs.Expiry { return nil },
	}
	a.handle("GET /v1/version", a.about)
	a.handle("GET /v1/status", a.status)
	a.handle("GET /v1/volumes", a.volumes)
	a.handle("GET /v1/volumes/{name}", a.volume)
	a.handle("GET /v1/nodes", a.nodes)
	a.handle("GET /v1/backends", a.backends)
	a.handle("GET /v1/host", a.host)
	a.handle("POST /v1/nodes/{host}/confirm-dead", a.confirmDead)
	a.handle("POST /v1/volumes/{name}/reinstate", a.reinstate)
	a.handle("POST /v1/cluster/accept-restore", a.acceptRestore)
	a.handle("POST /v1/volumes", a.create)
	a.handle("DELETE /v1/volumes/{name}", a.remove)
	a.handle("POST /v1/volumes/{name}/move", a.move)
	a.handle("POST /v1/nodes/{host}/cordon", a.cordon)
	a.handle("POST /v1/nodes/{host}/uncordon", a.uncordon)
	a.handle("POST /v1/nodes/{host}/drain", a.drain)
	a.handle("DELETE /v1/nodes/{host}", a.removeNode)
	a.handle("/", func(_ context.Context, r *http.Request) (any, error) {
		return nil, &refusal{http.StatusNotFound, fmt.Sprintf("there is no request %s %s: is docker-flocker newer than the plugin?", r.Method, r.URL.Path)}
	})
	return a
}

// Certificates has it know when the certificates of this host end.
func (a *Admin) Certificates(those func() []certs.Expiry) *Admin {
	a.certificates = those
	return a
}

// ServeHTTP answers one request, within 20 s.
func (a *Admin) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// A refusal is an error with the status it is answered with.
type refusal struct {
	status int
	text   string
}

func (e *refusal) Error() string { return e.text }

func badRequest(format string, args ...any) error {
	return &refusal{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

func (a *Admin) handle(pattern string, ask func(ctx context.Context, r *http.Request) (any, error)) {
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { a.answer(w, r, ask) })
}

// answer answers one request.
func (a *Admin) answer(w http.ResponseWriter, r *http.Request, ask func(ctx context.Context, r *http.Request) (any, error)) {
	ctx, cancel := context.WithTimeoutCause(r.Context(), deadline, fmt.Errorf("not done within %v", deadline))
	defer cancel()
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(ioLimit)) // a recorder in a test has none
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	got, err := ask(ctx, r)
	status := http.StatusOK
	if err != nil {
		status, got = statusOf(err), api.Failure{Error: err.Error()}
	}
	_ = rc.SetWriteDeadline(time.Now().Add(ioLimit))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(Encode(got)) // whoever has gone away may ask again
}

func statusOf(err error) int {
	if e, ok := errors.AsType[*refusal](err); ok {
		return e.status
	}
	return Status(err)
}

func (a *Admin) nodes(ctx context.Context, _ *http.Request) (any, error) {
	all, err := a.driver.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	answer := api.Nodes{Nodes: make([]api.Node, len(all))}
	for i, n := range all {
		answer.Nodes[i] = api.Node{ID: n.ID, Host: n.Host, Address: n.Address, Boot: n.Boot, State: n.State, Live: n.Live, Volumes: n.Owned}
		if silent, ok := a.owners.Silence(n.ID); ok && !n.Live {
			seconds := silent.Seconds()
			answer.Nodes[i].Silent = &seconds
		}
		if n.Death != nil {
			death := wire(*n.Death)
			answer.Nodes[i].Death = &death
		}
	}
	return answer, nil
}

func (a *Admin) backends(ctx context.Context, _ *http.Request) (any, error) {
	all := a.driver.Backends(ctx)
	answer := api.Backends{Backends: make([]api.Backend, len(all))}
	for i, b := range all {
		shown := api.Backend{Name: b.Name, Type: b.Type, Class: string(b.Class), Default: b.Default, Profiles: b.Profiles}
		for _, o := range b.Options {
			shown.Options = append(shown.Options, o.Name)
		}
		if b.Err != nil {
			shown.Error = b.Err.Error()
		}
		answer.Backends[i] = shown
	}
	return answer, nil
}

func (a *Admin) confirmDead(ctx context.Context, r *http.Request) (any, error) {
	host := r.PathValue("host")
	var body api.Confirmation
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if err := plain("because", body.Because); err != nil {
		return nil, err
	}
	if err := said(body.By, "declares the host dead"); err != nil {
		return nil, err
	}
	// It is looked at here and not only where it is typed, so that no script forces
	// by accident.
	if body.Force && body.Typed != host {
		return nil, badRequest("to force it, the host's name has to be typed a second time, and %q is not %q: docker flocker node confirm-dead %s --force --confirm %s",
			body.Typed, host, host, host)
	}
	if body.Because == "" {
		body.Because = unstated
	}
	if err := a.known(ctx, host); err != nil {
		return nil, err
	}
	death, err := a.driver.ConfirmDead(ctx, host, ownership.Death{
		Method: "operator", Evidence: body.Because, By: body.By, At: time.Now().UTC(), Forced: body.Force,
	})
	if live, ok := errors.AsType[*ownership.LiveError](err); ok {
		err = &refusal{http.StatusConflict, fmt.Sprintf("host %s answers (its lease in etcd is valid), so it is not dead: "+
			"stop the containers there, and other hosts can mount their volumes; "+
			"to force it nevertheless: docker flocker node confirm-dead %s --force", live.Host, host)}
	}
	a.changed("confirm-dead", err, logrus.Fields{"host": host, "by": body.By, "because": body.Because, "forced": body.Force})
	if err != nil {
		return nil, err
	}
	return api.Confirmed{Death: wire(death), Volumes: a.volumesOf(ctx, death.Node)}, nil
}

// known refuses what is not the name or the id of one node.
func (a *Admin) known(ctx context.Context, host string) error {
	nodes, err := a.driver.Nodes(ctx)
	if err != nil {
		return err
	}
	var ids []string
	for _, n := range nodes {
		switch host {
		case n.ID:
			return nil
		case n.Host:
			ids = append(ids, n.ID)
		}
	}
	switch len(ids) {
	case 0:
		return &refusal{http.StatusNotFound, fmt.Sprintf("there is no host %q: docker flocker node ls shows those there are", host)}
	case 1:
		return nil
	}
	return &refusal{http.StatusConflict, fmt.Sprintf("%d nodes have the host name %s: use the id of the one you mean, %s", len(ids), host, strings.Join(ids, " or "))}
}

// volumesOf are the names of the volumes a node owns; nil if nobody can tell.
func (a *Admin) volumesOf(ctx context.Context, node string) []string {
	ctx, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	views, err := a.owners.List(ctx)
	if err != nil {
		return nil
	}
	names := []string{}
	for _, v := range views {
		if v.Owner != nil && v.Owner.Node == node {
			names = append(names, v.Volume.Name)
		}
	}
	return names
}

func (a *Admin) reinstate(ctx context.Context, r *http.Request) (any, error) {
	name := r.PathValue("name")
	var body api.Reinstatement
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if err := said(body.By, "reinstates the volume"); err != nil {
		return nil, err
	}
	err := a.driver.Reinstate(ctx, name, body.By)
	a.changed("reinstate", err, logrus.Fields{"volume": name, "by": body.By})
	return api.Reinstated{Volume: name}, err
}

func (a *Admin) acceptRestore(ctx context.Context, r *http.Request) (any, error) {
	var body api.Acceptance
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Typed != api.Restored {
		return nil, badRequest("to accept what was restored, the word %q has to be typed, and %q is not it: docker flocker cluster accept-restore --confirm %s",
			api.Restored, body.Typed, api.Restored)
	}
	if err := said(body.By, "accepts what was restored"); err != nil {
		return nil, err
	}
	gen, err := a.driver.AcceptRestore(ctx, body.By)
	a.changed("accept-restore", err, logrus.Fields{"generation": gen, "by": body.By})
	return api.Accepted{Generation: gen}, err
}

func (a *Admin) changed(op string, err error, fields logrus.Fields) {
	log := a.log.WithField("op", op).WithFields(fields)
	if err != nil {
		log.WithField("err", err).Warn("an operator's request failed")
		return
	}
	log.Info("done as an operator asked")
}

// decode reads the body.
func decode(r *http.Request, body any) error {
	data, err := io.ReadAll(r.Body)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &refusal{http.StatusRequestEntityTooLarge, "the request's body is larger than 64 KiB"}
	}
	if err != nil {
		return badRequest("the request's body cannot be read: %v", err)
	}
	if err := Decode(data, body); err != nil {
		return badRequest("the request's body %v", err)
	}
	return nil
}

// said refuses a change that nobody wants to have asked for.
func said(by, does string) error {
	if by == "" {
		return badRequest("by is missing: say who %s", does)
	}
	return plain("by", by)
}

// plain refuses what would not fit on a line of a log or a table.
func plain(name, text string) error {
	if len(text) > maxText {
		return badRequest("%s is longer than %d bytes: shorten it", name, maxText)
	}
	if strings.ContainsFunc(text, unicode.IsControl) {
		return badRequest("%s has line breaks or other control characters: leave them out", name)
	}
	return nil
}

func wire(d ownership.Death) api.Death {
	return api.Death{Node: d.Node, Host: d.Host, Boot: d.Boot, Because: d.Evidence, By: d.By, At: d.At, Forced: d.Forced}
}
