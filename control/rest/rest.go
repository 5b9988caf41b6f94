// Package rest is the HTTP API that every host serves to users: under /v1 that of the
// original Flocker, for the clients that exist, and under /v2 one of our own. It decides
// nothing. What it shows is what this host has last heard from etcd, read from memory;
// what it changes, the driver does.
//
// Who asks is in the certificate, which is verified before any of this runs.
package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

const (
	// ioLimit is for a client to send its request.
	ioLimit = 10 * time.Second
	// maxBody is more than the metadata that is allowed, as long as JSON can make it.
	maxBody = 256 << 10
	// retryAfter is what a client is told to wait while etcd is away.
	retryAfter = 5 * time.Second
)

// These are shorter in tests.
var (
	// writeLimit is for a client to take the answer: a hundred thousand volumes are some
	// megabytes.
	writeLimit = time.Minute
	// patience bounds a change: what Docker gives a Mount.
	patience = 110 * time.Second
	// settle bounds how long an answer waits until what it changed is seen here, so that
	// whoever asks next sees it. The change is made, whether it is seen or not.
	settle = 2 * time.Second
	// freshness bounds how long an answer waits for etcd before memory has to do.
	freshness = time.Second
	// maxStreams bounds the connections that stay open for events.
	maxStreams = 256
)

// API answers the requests.
type API struct {
	Config
	mux      *http.ServeMux
	rendered atomic.Pointer[rendered]
	streams  chan struct{}
	// patient is until when nobody waits for etcd, in Unix nanoseconds.
	patient atomic.Int64
}

// Config is what an API is made of.
type Config struct {
	Driver  Driver
	Leases  Leases
	Cluster Cluster
	Version string
	Log     *logrus.Entry
}

// A route is one request there is.
type route struct {
	method, path string
	do           func(a *API, r *http.Request) (answer, error)
}

// An answer is what is sent if there is no error.
type answer struct {
	status int
	body   any // marshalled, unless it is a []byte; nil for none
	header http.Header
	// stream, if set, writes the answer itself, for as long as the request lives.
	stream func(w http.ResponseWriter, r *http.Request) error
}

func ok(body any) answer { return answer{status: http.StatusOK, body: body} }

// New makes an API.
func New(cfg Config) *API {
	a := &API{Config: cfg, mux: http.NewServeMux(), streams: make(chan struct{}, maxStreams)}
	byPath := map[string][]route{}
	for _, r := range slices.Concat(v1, v2) {
		byPath[r.path] = append(byPath[r.path], r)
	}
	for path, routes := range byPath {
		a.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { a.dispatch(w, r, routes) })
	}
	a.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.fail(w, r, &refusal{status: http.StatusNotFound, text: fmt.Sprintf("There is no request for %s: docs/api.md lists those there are.", r.URL.Path)})
	})
	return a
}

// ServeHTTP answers one request of somebody whose certificate was verified.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(start.Add(ioLimit)) // a recorder in a test has none
	_ = rc.SetWriteDeadline(start.Add(patience + writeLimit))
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	counted := &counter{ResponseWriter: w}
	peer, err := peerOf(r)
	defer func() {
		if thrown := recover(); thrown != nil && thrown != http.ErrAbortHandler { //nolint:errorlint // it is compared as net/http does
			incident := uuid.NewString()
			a.Log.WithFields(logrus.Fields{"incident": incident, "path": r.URL.Path, "err": thrown, "stack": string(debug.Stack())}).Error("a request failed in a way it must not")
			if counted.status == 0 {
				a.broken(counted, r, incident)
			} else {
				panic(http.ErrAbortHandler) // the client is not to take half an answer for a whole one
			}
		}
		a.logged(r, peer, counted, time.Since(start))
	}()
	if err != nil {
		a.fail(counted, r, err)
		return
	}
	name := string(peer.Role) + "-" + peer.Name
	r = r.WithContext(ownership.By(context.WithValue(r.Context(), caller{}, name), name))
	if err := allowed(peer, r.Method); err != nil {
		a.fail(counted, r, err)
		return
	}
	a.mux.ServeHTTP(counted, r)
}

// caller is the key of who asks, in a request's context.
type caller struct{}

func by(ctx context.Context) string {
	name, _ := ctx.Value(caller{}).(string)
	return name
}

func peerOf(r *http.Request) (certs.Peer, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return certs.Peer{}, &refusal{status: http.StatusForbidden, text: "There is no certificate of a user: docker flocker ca user makes one."}
	}
	peer, err := certs.PeerOf(r.TLS.VerifiedChains[0][0])
	if err != nil {
		return peer, &refusal{status: http.StatusForbidden, text: sentence(err.Error())}
	}
	return peer, nil
}

// allowed refuses what a role may not do.
func allowed(peer certs.Peer, method string) error {
	switch peer.Role {
	case certs.User:
		return nil
	case certs.Reader:
		if method == http.MethodGet || method == http.MethodHead {
			return nil
		}
		return &refusal{status: http.StatusForbidden, text: fmt.Sprintf("reader-%s may look at everything and change nothing: use a certificate made with docker flocker ca user.", peer.Name)}
	case certs.Node, certs.Server:
	}
	return &refusal{status: http.StatusForbidden, text: fmt.Sprintf("%s is the certificate of a host, which may not use this API: use one made with docker flocker ca user.", certName(peer))}
}

func certName(p certs.Peer) string {
	if p.Name == "" {
		return string(p.Role)
	}
	return string(p.Role) + "-" + p.Name
}

// dispatch finds the request among those of one path.
func (a *API) dispatch(w http.ResponseWriter, r *http.Request, routes []route) {
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	i := slices.IndexFunc(routes, func(r route) bool { return r.method == method })
	if i < 0 {
		var allow []string
		for _, r := range routes {
			allow = append(allow, r.method)
		}
		w.Header().Set("Allow", strings.Join(allow, ", "))
		a.fail(w, r, &refusal{status: http.StatusMethodNotAllowed, text: fmt.Sprintf("%s is not possible here: use %s.", r.Method, strings.Join(allow, " or "))})
		return
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), patience, fmt.Errorf("not done within %v", patience))
	defer cancel()
	got, err := routes[i].do(a, r.WithContext(ctx))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	maps.Copy(w.Header(), got.header)
	if got.stream != nil {
		if err := got.stream(w, r); err != nil {
			a.Log.WithFields(logrus.Fields{"path": r.URL.Path, "by": by(r.Context()), "err": err}).Debug("a stream ended")
		}
		return
	}
	a.send(w, got.status, "application/json", got.body)
}

func (a *API) send(w http.ResponseWriter, status int, kind string, body any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeLimit))
	if body == nil {
		w.WriteHeader(status)
		return
	}
	data, ready := body.([]byte)
	if !ready {
		data = control.Encode(body)
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	_, _ = w.Write(data) // whoever has gone away may ask again
}

// A refusal is an error with the status it is answered with.
type refusal struct {
	status int
	text   string
	errors []string // what is wrong with the body
	body   any      // what a problem of v2 has besides
}

func (e *refusal) Error() string { return e.text }

func badRequest(format string, args ...any) error {
	return &refusal{status: http.StatusBadRequest, text: fmt.Sprintf(format, args...)}
}

// explain says with which status an error is answered.
func explain(err error) *refusal {
	e, ok := errors.AsType[*refusal](err)
	switch {
	case !ok:
		return &refusal{status: control.Status(err), text: sentence(err.Error())}
	case err.Error() != e.text: // there is more to it
		e = &refusal{status: e.status, text: sentence(err.Error())}
	}
	return e
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// sentence makes one of an error's text.
func sentence(text string) string {
	if text == "" || strings.HasSuffix(text, ".") {
		return text
	}
	return text + "."
}

// fail answers with an error, in the form of the version that was asked.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := explain(err)
	if e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	}
	if e.status >= 500 && e.status != http.StatusServiceUnavailable && e.status != http.StatusGatewayTimeout {
		a.Log.WithFields(logrus.Fields{"path": r.URL.Path, "by": by(r.Context()), "err": err}).Warn("a request failed")
	}
	if strings.HasPrefix(r.URL.Path, "/v2/") {
		a.send(w, e.status, "application/problem+json", problemOf(e))
		return
	}
	a.send(w, e.status, "application/json", failure{e.text, e.errors})
}

// broken answers a request that panicked.
func (a *API) broken(w http.ResponseWriter, r *http.Request, incident string) {
	if strings.HasPrefix(r.URL.Path, "/v2/") {
		a.send(w, http.StatusInternalServerError, "application/problem+json", problemOf(&refusal{
			status: http.StatusInternalServerError, text: "This is a defect of Flocker: the plugin's log has more about incident " + incident + ".",
		}))
		return
	}
	a.send(w, http.StatusInternalServerError, "application/json", incident)
}

// logged notes a request: a change always, a look only for whoever debugs, since clients
// poll.
func (a *API) logged(r *http.Request, peer certs.Peer, w *counter, took time.Duration) {
	level := logrus.DebugLevel
	if r.Method != http.MethodGet && r.Method != http.MethodHead || w.status == http.StatusForbidden {
		level = logrus.InfoLevel
	}
	if a.Log.Logger.IsLevelEnabled(level) {
		a.Log.WithFields(logrus.Fields{
			"method": r.Method, "path": r.URL.Path, "status": w.status, "bytes": w.bytes,
			"by": certName(peer), "from": r.RemoteAddr, "took": took.Round(time.Microsecond).String(),
		}).Log(level, "request")
	}
}

// counter remembers what was answered.
type counter struct {
	http.ResponseWriter
	status int
	bytes  int
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(data []byte) (int, error) {
	if c.status == 0 {
		c.status = http.StatusOK
	}
	n, err := c.ResponseWriter.Write(data)
	c.bytes += n
	return n, err
}

// Unwrap is for http.ResponseController.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// read returns the body of a request. 413 and 408 are answered as what they are.
func read(r *http.Request) ([]byte, error) {
	data, err := io.ReadAll(r.Body)
	switch {
	case err == nil:
		return data, nil
	case is[*http.MaxBytesError](err):
		return nil, &refusal{status: http.StatusRequestEntityTooLarge, text: fmt.Sprintf("The request body is larger than %d KiB.", maxBody>>10)}
	}
	return nil, &refusal{status: http.StatusRequestTimeout, text: fmt.Sprintf("The request body did not come within %v.", ioLimit)}
}

// create makes a volume that is to be on a host, "" for none. Once it is made, that is what is
// answered: whoever is refused thinks that there is none, and to delete it again might hit what
// somebody has put on it by now. Why it is to be on no host yet, such as one that was
// cordoned in that moment, is in unplaced.
func (a *API) create(ctx context.Context, c driver.CreateRequest, host string) (v *ownership.View, unplaced, err error) {
	made, err := a.Driver.CreateVolume(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	v = &ownership.View{Volume: made.Definition}
	revision := v.Volume.Revision
	if host != "" {
		p, err := a.Driver.MoveVolume(ctx, v.Volume.Name, v.Volume.ID, host, c.By)
		if err != nil {
			a.Log.WithFields(logrus.Fields{"volume": v.Volume.Name, "host": host, "by": c.By, "err": err}).Warn("a volume was made, and is to be on no host yet")
			unplaced = err
		} else {
			v.Placement, revision = &p, max(revision, p.Revision)
		}
	}
	a.seenRevision(ctx, revision)
	return v, unplaced, nil
}

// state is the cluster as this host has last heard of it, and the header that says so
// if that was not just now.
func (a *API) state(ctx context.Context) (*ownership.State, http.Header, error) {
	s, stale, ok := a.Cluster.State()
	if (!ok || stale > 0) && time.Now().UnixNano() > a.patient.Load() {
		// Perhaps nobody has asked for some minutes. While etcd is away, one in a while
		// waits to see.
		bounded, cancel := context.WithTimeout(ctx, freshness)
		if _, err := a.Cluster.Wait(bounded, 0); err != nil {
			a.patient.Store(time.Now().Add(2 * freshness).UnixNano())
		}
		cancel()
		s, stale, ok = a.Cluster.State()
	}
	if !ok {
		return nil, nil, &refusal{status: http.StatusServiceUnavailable, text: "This host has not heard from etcd since it was started: try again, or ask another host."}
	}
	header := http.Header{}
	if stale > 0 {
		header.Set(staleHeader, strconv.FormatFloat(max(0.1, stale.Seconds()), 'f', 1, 64))
	}
	return s, header, nil
}

// staleHeader is for how many seconds etcd has not been heard from.
const staleHeader = "X-Flocker-Stale-Seconds"

// seen waits until a change is seen here.
func (a *API) seen(ctx context.Context, done func(*ownership.State) bool) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	s, _, ok := a.Cluster.State()
	for after := int64(0); ; {
		if ok {
			if done(s) {
				return
			}
			after = s.Revision
		}
		next, err := a.Cluster.Wait(ctx, after)
		if err != nil {
			return
		}
		s, ok = next, true
	}
}

func (a *API) seenRevision(ctx context.Context, revision int64) {
	a.seen(ctx, func(s *ownership.State) bool { return s.Revision >= revision })
}
