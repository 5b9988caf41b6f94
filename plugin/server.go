package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-plugins-helpers/volume"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Docker gives Create 120 s, Mount 120 s and everything else 60 s. Ours end
// before, so that the user reads our sentence and not Docker's.
const (
	createDeadline = 100 * time.Second
	otherDeadline  = 50 * time.Second
)

// A managed plugin is killed ten seconds after SIGTERM. Reads that are held end
// after drainReads; changes get drainGrace to finish, and what is then left of
// drainLimit to undo.
const (
	drainReads = 2 * time.Second
	drainGrace = 6 * time.Second
	drainLimit = 8 * time.Second
	// controlGrace is for operators' answers that are being written.
	controlGrace = 200 * time.Millisecond
)

const (
	maxBody     = 1 << 20
	ioLimit     = 10 * time.Second // to read a body, to write a reply
	contentType = "application/vnd.docker.plugins.v1.2+json"
	shortID     = 12 // of a mount id's 64 digits, in the log
)

// verbs is the volume driver behind the socket.
type verbs interface {
	Create(ctx context.Context, name string, options map[string]string) error
	Remove(ctx context.Context, name string) error
	Mount(ctx context.Context, name, id string) (mountpoint string, err error)
	Unmount(ctx context.Context, name, id string) error
	Path(ctx context.Context, name string) (mountpoint string, err error)
	Get(ctx context.Context, name string) (driver.Volume, error)
	List(ctx context.Context) ([]driver.Volume, error)
	// Activated says that Docker has greeted us: it has been restarted.
	Activated()
}

// server speaks Docker's volume plugin protocol. It answers Activate and
// Capabilities from the first moment, and the rest once it has a driver.
type server struct {
	log    *logrus.Entry
	stderr io.Writer // stacks of panics
	// mountDeadline is how long one Mount may take.
	mountDeadline time.Duration

	verbs verbs
	ready chan struct{} // closed when verbs is set

	drained context.Context // reads end with it
	drain   context.CancelFunc
}

func newServer(mountDeadline time.Duration, log *logrus.Entry, stderr io.Writer) *server {
	s := &server{log: log, stderr: stderr, mountDeadline: mountDeadline, ready: make(chan struct{})}
	s.drained, s.drain = context.WithCancel(context.Background())
	return s
}

// use gives the server its driver. It is called once.
func (s *server) use(v verbs) {
	s.verbs = v
	close(s.ready)
}

// serve answers requests from l until ctx is done. Then it accepts no more, lets
// the calls in flight finish for drainLimit at most, and returns nil. Mounts are
// left alone: containers go on using them. l is closed.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	calls, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	h := &http.Server{
		Handler: s,
		// No ReadTimeout: it would also close idle connections, and one that closes
		// when Docker is about to use it loses a call.
		ReadHeaderTimeout: ioLimit,
		ErrorLog:          stdlog.New(logWriter{s.log}, "", 0),
		BaseContext:       func(net.Listener) context.Context { return calls },
	}
	failed := make(chan error, 1)
	go func() { failed <- h.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve requests: %w", err)
	case <-ctx.Done():
	}
	endReads := time.AfterFunc(drainReads, s.drain)
	defer endReads.Stop()
	giveUp := time.AfterFunc(drainGrace, func() { cancel(errStopping) })
	defer giveUp.Stop()
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer stop()
	if err := h.Shutdown(end); err != nil {
		s.log.WithField("err", err).Warn("calls still in flight are abandoned")
		_ = h.Close() // there is nobody to tell
	}
	return nil
}

// A call is one request on its way through the server.
type call struct {
	endpoint
	ctx   context.Context
	body  []byte
	verbs verbs
	// volume and id are for the log.
	volume, id string
	// undo takes back what the call did, should its reply reach nobody.
	undo func(ctx context.Context) error
}

// An endpoint is one of the protocol's calls.
type endpoint struct {
	op string
	// handle does the call. Its reply becomes the answer's JSON.
	handle   func(*call) (reply any, err error)
	deadline time.Duration
	// constant endpoints need neither a driver nor a body.
	constant bool
	// change is logged at INFO, and may finish in a drain.
	change bool
	// lookup says that Docker reads every error as "there is no such volume" and
	// forgets all it knows of it. Where we do not know, the connection is cut
	// instead: Docker reads that as "not known".
	lookup bool
}

func (s *server) endpoint(r *http.Request) (endpoint, error) {
	var e endpoint
	switch r.URL.Path {
	case "/Plugin.Activate":
		e = endpoint{op: "activate", handle: s.activate, constant: true}
	case "/VolumeDriver.Capabilities":
		e = endpoint{op: "capabilities", handle: handleCapabilities, constant: true}
	case "/VolumeDriver.Create":
		e = endpoint{op: "create", handle: handleCreate, deadline: createDeadline, change: true}
	case "/VolumeDriver.Remove":
		e = endpoint{op: "remove", handle: handleRemove, deadline: otherDeadline, change: true}
	case "/VolumeDriver.Mount":
		e = endpoint{op: "mount", handle: handleMount, deadline: s.mountDeadline, change: true}
	case "/VolumeDriver.Unmount":
		e = endpoint{op: "unmount", handle: handleUnmount, deadline: otherDeadline, change: true}
	case "/VolumeDriver.Path":
		e = endpoint{op: "path", handle: handlePath, deadline: otherDeadline}
	case "/VolumeDriver.Get":
		e = endpoint{op: "get", handle: handleGet, deadline: otherDeadline, lookup: true}
	case "/VolumeDriver.List":
		e = endpoint{op: "list", handle: handleList, deadline: otherDeadline}
	default:
		return e, &requestError{http.StatusNotFound, fmt.Sprintf("no such endpoint: %q", r.URL.Path)}
	}
	if r.Method != http.MethodPost {
		return e, &requestError{http.StatusMethodNotAllowed, fmt.Sprintf("%s takes POST, not %q", r.URL.Path, r.Method)}
	}
	return e, nil
}

func (s *server) activate(*call) (any, error) {
	select {
	case <-s.ready:
		s.verbs.Activated()
	default: // a driver that is not there yet has nothing to forget
	}
	return struct{ Implements []string }{[]string{"VolumeDriver"}}, nil
}

func handleCapabilities(*call) (any, error) {
	return volume.CapabilitiesResponse{Capabilities: volume.Capability{Scope: "global"}}, nil
}

func handleCreate(c *call) (any, error) {
	var req volume.CreateRequest
	if err := c.decode(&req, &req.Name); err != nil {
		return nil, err
	}
	return struct{}{}, c.verbs.Create(c.ctx, req.Name, req.Options)
}

func handleRemove(c *call) (any, error) {
	var req volume.RemoveRequest
	if err := c.decode(&req, &req.Name); err != nil {
		return nil, err
	}
	return struct{}{}, c.verbs.Remove(c.ctx, req.Name)
}

func handleMount(c *call) (any, error) {
	var req volume.MountRequest
	if err := c.decode(&req, &req.Name, &req.ID); err != nil {
		return nil, err
	}
	mountpoint, err := c.verbs.Mount(c.ctx, req.Name, req.ID)
	if err != nil {
		return nil, err // and the driver has undone it
	}
	c.undo = func(ctx context.Context) error { return c.verbs.Unmount(ctx, req.Name, req.ID) }
	return volume.MountResponse{Mountpoint: mountpoint}, nil
}

func handleUnmount(c *call) (any, error) {
	var req volume.UnmountRequest
	if err := c.decode(&req, &req.Name, &req.ID); err != nil {
		return nil, err
	}
	return struct{}{}, c.verbs.Unmount(c.ctx, req.Name, req.ID)
}

func handlePath(c *call) (any, error) {
	var req volume.PathRequest
	if err := c.decode(&req, &req.Name); err != nil {
		return nil, err
	}
	mountpoint, err := c.verbs.Path(c.ctx, req.Name)
	return volume.PathResponse{Mountpoint: mountpoint}, err
}

func handleGet(c *call) (any, error) {
	var req volume.GetRequest
	if err := c.decode(&req, &req.Name); err != nil {
		return nil, err
	}
	v, err := c.verbs.Get(c.ctx, req.Name)
	v.Name = req.Name // Docker calls the volume by the answer's name from then on
	return volume.GetResponse{Volume: wire(v)}, err
}

func handleList(c *call) (any, error) {
	all, err := c.verbs.List(c.ctx)
	// An empty list is not null, and nothing in it is: that kills dockerd.
	reply := volume.ListResponse{Volumes: make([]*volume.Volume, len(all))}
	for i, v := range all {
		v.Status = nil // shown for a single volume only
		reply.Volumes[i] = wire(v)
	}
	return reply, err
}

func wire(v driver.Volume) *volume.Volume {
	w := &volume.Volume{Name: v.Name, Mountpoint: v.Mountpoint, Status: v.Status}
	if !v.CreatedAt.IsZero() {
		// One time in another form makes Docker drop the whole answer.
		w.CreatedAt = v.CreatedAt.UTC().Format(time.RFC3339)
	}
	return w
}

// A requestError is a request that is wrong by itself; the driver never sees it.
type requestError struct {
	status int
	text   string
}

func (e *requestError) Error() string { return e.text }

func badRequest(format string, args ...any) error {
	return &requestError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// errBodyLost is what Docker's client makes of a call whose connection broke: it
// sends the call again without the body, which it has used up.
var errBodyLost = badRequest("request body lost in Docker's retry (moby#39331); please retry the command")

// ServeHTTP answers one request. What goes wrong becomes JSON with an Err.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	e, err := s.endpoint(r)
	if err != nil {
		s.log.WithField("err", err).Warn("refused")
		w.Header().Set("Allow", http.MethodPost)
		send(w, nil, err) //nolint:errcheck // who sends such requests may miss the answer
		return
	}
	caller := ownership.By(r.Context(), "docker")
	c := &call{endpoint: e}
	var cancel context.CancelFunc
	c.ctx, cancel = s.callContext(caller, e)
	defer cancel()

	body, err := s.run(c, w, r)
	if caller.Err() != nil && c.undo != nil {
		err = fmt.Errorf("nobody waits for the answer: %w", context.Cause(caller))
	}
	if err != nil {
		s.rollBack(caller, c, err)
	}
	if e.lookup && err != nil && !definite(err) {
		s.logCall(c, start, err)
		panic(http.ErrAbortHandler)
	}
	if lost := send(w, body, err); lost != nil {
		lost = fmt.Errorf("write reply: %w", lost)
		s.rollBack(caller, c, lost)
		err = errors.Join(err, lost)
	}
	s.logCall(c, start, err)
}

// callContext ends when the caller goes away, when the time for the call is over,
// and, for a call that changes nothing, soon after the server began to drain.
func (s *server) callContext(caller context.Context, e endpoint) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(caller)
	stops := []func(){func() { cancel(nil) }}
	if e.deadline > 0 {
		timeout, stop := context.WithTimeoutCause(ctx, e.deadline, fmt.Errorf("not done within %v", e.deadline))
		ctx, stops = timeout, append(stops, stop)
	}
	if !e.change {
		stop := context.AfterFunc(s.drained, func() { cancel(errStopping) })
		stops = append(stops, func() { stop() })
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
	}
}

var errStopping = errors.New("flocker is stopping")

// definite says that an error of a look-up means that there is no such volume.
func definite(err error) bool {
	if e, ok := errors.AsType[*requestError](err); ok {
		return e.status == http.StatusBadRequest && !errors.Is(err, errBodyLost)
	}
	return errors.Is(err, ownership.ErrNotFound) || errors.Is(err, backends.ErrInvalid)
}

// run reads the body, waits for the driver, does the call and encodes its reply.
// A panic becomes an error: net/http would cut the connection, and Docker would
// send the call again, without its body.
func (s *server) run(c *call, w http.ResponseWriter, r *http.Request) (body []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(s.stderr, "panic in %s of volume %q: %v\n%s", c.op, c.volume, p, debug.Stack())
			body, err = nil, fmt.Errorf("internal error in %s: %v (the stack is in the plugin's log)", c.op, p)
		}
	}()
	if c.body, err = readBody(w, r); err != nil {
		return nil, err
	}
	if !c.constant {
		select {
		case <-s.ready:
			c.verbs = s.verbs
		case <-c.ctx.Done():
			return nil, fmt.Errorf("flocker is still starting: %w", context.Cause(c.ctx))
		}
	}
	reply, err := c.handle(c)
	if err != nil {
		return nil, err
	}
	return encode(reply)
}

// rollBack undoes a Mount whose reply Docker does not get: it will never send the
// Unmount. A call is undone once.
func (s *server) rollBack(ctx context.Context, c *call, why error) {
	undo := c.undo
	if undo == nil {
		return
	}
	c.undo = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), otherDeadline)
	defer cancel()
	log := s.log.WithFields(logrus.Fields{"op": "rollback", "volume": c.volume, "mount_id": c.id, "why": why})
	if err := undo(ctx); err != nil {
		log.WithField("err", err).Error("not undone")
		return
	}
	log.Warn("undone")
}

// logCall writes the one line about a call.
func (s *server) logCall(c *call, start time.Time, err error) {
	log := s.log.WithField("op", c.op)
	if c.volume != "" {
		log = log.WithField("volume", c.volume)
	}
	if c.id != "" {
		log = log.WithField("mount_id", c.id)
	}
	log = log.WithField("took", fmt.Sprintf("%.2fms", time.Since(start).Seconds()*1000))
	switch {
	case err != nil && errors.Is(err, ownership.ErrNotFound) && !c.change:
		log.WithField("err", err).Debug("done") // Docker asks before each Create
	case err != nil:
		log.WithField("err", err).Warn("failed")
	case c.change:
		log.Info("done")
	default:
		log.Debug("done")
	}
}

// readBody reads the body to its end, which is also what makes net/http notice
// when the client goes away.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	rc := http.NewResponseController(w)
	// At the end of the body net/http takes it away again.
	if err := rc.SetReadDeadline(time.Now().Add(ioLimit)); err != nil {
		return nil, badRequest("read request body: %v", err)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, &requestError{http.StatusRequestEntityTooLarge, "request body is larger than 1 MiB"}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, &requestError{http.StatusRequestTimeout, fmt.Sprintf("request body did not come within %v", ioLimit)}
	}
	if err != nil {
		return nil, badRequest("read request body: %v", err)
	}
	return body, nil
}

func encode(reply any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // people read these texts
	if err := enc.Encode(reply); err != nil {
		return nil, fmt.Errorf("encode reply: %w", err)
	}
	return b.Bytes(), nil
}

// send answers with body, or with err if there is one, and returns nil when all
// of it has left this process.
func send(w http.ResponseWriter, body []byte, err error) error {
	status := http.StatusOK
	if err != nil {
		status = http.StatusInternalServerError
		if e, ok := errors.AsType[*requestError](err); ok {
			status = e.status
		}
		text := err.Error()
		if text == "" {
			text = "unknown error" // an empty Err is success
		}
		if body, err = encode(volume.NewErrorResponse(text)); err != nil {
			return err
		}
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	rc := http.NewResponseController(w)
	// net/http takes it away again after the reply.
	if err := rc.SetWriteDeadline(time.Now().Add(ioLimit)); err != nil {
		return err
	}
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil {
		return err
	}
	return rc.Flush()
}

// decode reads the body into req and checks that the required fields have a
// value: the volume's name and, where there are two, the mount id.
func (c *call) decode(req any, required ...*string) error {
	if len(c.body) == 0 {
		return errBodyLost
	}
	err := json.Unmarshal(c.body, req)
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return badRequest("request body: %s", wrongType(e))
	}
	if err != nil {
		return badRequest("request body is not JSON: %v", err)
	}
	if key, ok := repeated(c.body); ok {
		return badRequest("request body: %s is there twice", key)
	}
	for i, value := range required {
		if *value == "" {
			return badRequest("request body: %s is missing", [...]string{"Name", "ID"}[i])
		}
	}
	c.volume = *required[0]
	if len(required) > 1 {
		c.id = (*required[1])[:min(shortID, len(*required[1]))]
	}
	return nil
}

func wrongType(e *json.UnmarshalTypeError) string {
	switch {
	case e.Field == "":
		return "must be an object, not " + e.Value
	case e.Type.Kind() == reflect.Map:
		return e.Field + " must be an object, not " + e.Value
	case e.Field == "Opts" || strings.HasPrefix(e.Field, "Opts."):
		return "the values of Opts must be strings, not " + e.Value
	default:
		return e.Field + " must be a string, not " + e.Value
	}
}

// repeated returns a key that is in an object of the body twice: the last one
// would win, and whoever let the request pass may have read the first. body is
// valid JSON.
func repeated(body []byte) (key string, found bool) {
	type object struct {
		keys map[string]bool // nil for an array
		key  bool            // a key comes next
	}
	var open []object
	dec := json.NewDecoder(bytes.NewReader(body))
	for {
		tok, err := dec.Token()
		if err != nil {
			return "", false
		}
		top := len(open) - 1
		if tok == json.Delim('}') || tok == json.Delim(']') {
			open = open[:top]
			continue
		}
		if top >= 0 && open[top].keys != nil {
			if key, ok := tok.(string); ok && open[top].key {
				folded := key
				if top == 0 { // field names are matched in any case
					folded = strings.ToLower(strings.ToUpper(key))
				}
				if open[top].keys[folded] {
					return key, true
				}
				open[top].keys[folded], open[top].key = true, false
				continue
			}
			open[top].key = true
		}
		switch tok {
		case json.Delim('{'):
			open = append(open, object{keys: map[string]bool{}, key: true})
		case json.Delim('['):
			open = append(open, object{})
		}
	}
}

// serveControl answers an operator's requests on a socket of its own until ctx is
// done. Without it volumes are served all the same: a failure is logged and tried
// again.
func serveControl(ctx context.Context, path string, h http.Handler, log *logrus.Entry) {
	// An error is ctx's end.
	_, _ = persist(ctx, log, "control socket", func() (struct{}, error) {
		l, err := listen(ctx, path)
		if err != nil {
			return struct{}{}, err
		}
		srv := &http.Server{
			Handler:           h,
			ReadHeaderTimeout: ioLimit,
			IdleTimeout:       ioLimit,
			ErrorLog:          stdlog.New(logWriter{log}, "", 0),
			BaseContext:       func(net.Listener) context.Context { return ctx },
		}
		closed := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(closed)
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), controlGrace)
			defer cancel()
			if srv.Shutdown(end) != nil {
				_ = srv.Close() // there is nobody to tell
			}
		})
		err = srv.Serve(l)
		if !stop() {
			<-closed
			return struct{}{}, nil
		}
		return struct{}{}, errors.Join(err, srv.Close())
	})
}

// listen makes the socket file, and its directory, for root alone. It takes the
// place of a file that a killed process left. Closing the listener removes it.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect socket: %w", err), l.Close())
	}
	return l, nil
}

// probe connects to a unix socket; nil if somebody listens on it.
func probe(ctx context.Context, socket string) error {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	_ = conn.Close()
	return nil
}

// removeStale removes a socket file that nobody listens on.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is not a socket: remove it", path)
	}
	err = probe(ctx, path)
	if err == nil {
		return fmt.Errorf("another process listens on %s: only one Flocker may run on a host", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("probe socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
