// Package openstacktest is a strict imitation of the parts of Keystone, Cinder and Nova
// that package openstack uses, for tests: a server on a real socket, with tokens that
// expire, states that take their time, pages, quotas, throttling, and conflicts as
// OpenStack says them.
package openstacktest

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Config says how the server behaves. The zero value is at once and unlimited.
type Config struct {
	// Delay is how long each change of a state takes.
	Delay time.Duration
	// Quota is how many volumes there may be; 0 is any number.
	Quota int
	// Burst and Rate are the bucket of calls; Rate 0 is no bucket.
	Burst, Rate float64
	// Old makes it an OpenStack of before Cinder's API version 3.44.
	Old bool
	// NoAuth is a Cinder without Keystone.
	NoAuth bool
	// Disks is how many volumes a server can have; 0 is any number.
	Disks int
	// Share is the NFS share that volumes are on.
	Share string
	// Rackspace makes it Rackspace's first cloud, see rackspace.go.
	Rackspace bool
	// RBD is the pool of Ceph that volumes are in, if they are not on Share.
	RBD string
}

// What is known to the server.
const (
	Project = "6f70656e737461636b20342065766572"
	Region  = "RegionOne"
	User    = "flocker"
	Admin   = "admin"
	Secret  = "correct horse"
	AppID   = "21dced0fd20347869b93710d2b98aae0"
	Zone    = "nova"
	Type    = "fast"
)

// Guest is what a server's operating system, and the storage, see and do. It is called
// with the imitation locked, and must not call it.
type Guest interface {
	// Plug shows a volume to a server, Unplug takes it away.
	Plug(server, volume string, gib int)
	Unplug(server, volume string)
	// Holds says that the server does not let go of a volume.
	Holds(server, volume string) bool
	// Stored says how large a volume is from now on; 0: it is deleted.
	Stored(volume string, gib int)
}

// Exporter is a Guest whose storage has to be told which hosts may have a volume, as with
// iSCSI. It is called with the imitation locked, and must not call it.
type Exporter interface {
	// Export lets a host have a volume, and returns how; Unexport takes it away.
	Export(volume, attachment string, connector map[string]any) (info map[string]any)
	Unexport(volume, attachment string)
}

// Fault happens to calls whose method and path contain Call; empty is all of them, but
// those of Keystone. The first that fits is the one a call suffers.
type Fault struct {
	Call  string
	After int // so many calls are spared before
	Times int // 0 is all
	// Status and Text refuse the call, without effect.
	Status     int
	Text       string
	RetryAfter int
	// Hang answers nothing until the caller has gone, without effect.
	Hang bool
	// Drop closes the connection after the call has had its effect, Half in the middle of
	// the answer, and Slow holds the answer back.
	Drop, Half bool
	Slow       time.Duration
}

// Server is the imitation. URL is that of Keystone, without /v3.
type Server struct {
	*httptest.Server
	cfg   Config
	guest Guest

	mu       sync.Mutex
	volumes  map[string]*volume
	servers  map[string]*server
	atts     map[string]*attachment
	forced   map[string]bool // compute hosts that an administrator has forced down
	down     map[string]bool // compute hosts that do not answer
	messages map[string]string
	broken   string // why volumes cannot be made
	fixed    bool   // no volume's metadata changes
	info     map[string]any
	tokens   map[string]string
	faults   []*Fault
	calls    map[string]int
	bucket   float64
	filled   time.Time
	number   int
	salt     uint64 // makes this imitation's ids its own
	closed   chan struct{}
	noXen    bool
	names    map[string]map[string]string // of devices, by server and volume
}

type volume struct {
	id, name, status, kind, zone string
	gib                          int
	multi                        bool
	metadata                     map[string]string
	snapshots                    int
	shown                        string // the status that somebody was told last
}

type attachment struct {
	id, volume, instance, status string
	info                         map[string]any
}

type server struct {
	id, host, status, task string
	power                  int
	locked                 bool
	disks                  map[string]bool // its block device mappings, by volume
	address                string
}

// Xen is a Guest on Xen, which gives a disk the name that Nova has chosen.
type Xen interface {
	// Place says so before Plug.
	Place(server, volume, device string)
}

// device is what Nova calls the volume on the server: a name that no other has.
func (s *Server) device(i *server, volume string) string {
	if s.names[i.id] == nil {
		s.names[i.id] = map[string]string{}
	}
	names := s.names[i.id]
	if names[volume] != "" {
		return names[volume]
	}
	prefix := "/dev/vd"
	if s.cfg.Rackspace && !s.noXen {
		prefix = "/dev/xvd"
	}
	for n := 1; ; n++ {
		letters := string(rune('a' + n%26))
		if n >= 26 {
			letters = string(rune('a'+n/26-1)) + letters
		}
		taken := false
		for other, name := range names {
			taken = taken || name == prefix+letters && i.disks[other]
		}
		if !taken {
			names[volume] = prefix + letters
			return names[volume]
		}
	}
}

// New starts a server; Close ends it. guest may be nil.
func New(cfg Config, guest Guest) *Server {
	s := &Server{
		cfg: cfg, guest: guest, volumes: map[string]*volume{}, servers: map[string]*server{}, atts: map[string]*attachment{},
		forced: map[string]bool{}, down: map[string]bool{}, messages: map[string]string{}, tokens: map[string]string{},
		calls: map[string]int{}, bucket: cfg.Burst, filled: time.Now(), salt: rand.Uint64N(1 << 47), closed: make(chan struct{}), names: map[string]map[string]string{},
	}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	s.Server.Config.SetKeepAlivesEnabled(false) // a test has many clients, and nobody closes them
	return s
}

// Close ends the server, and calls that hang.
func (s *Server) Close() {
	close(s.closed)
	s.Server.Close()
}

// CinderURL is that of Cinder, without the project.
func (s *Server) CinderURL() string { return s.URL + "/volume/v3" }

// ID returns a new UUID.
func (s *Server) id() string {
	s.number++
	// Spread, so that the order of ids is not that of making them; and no other imitation's.
	n := uint64(s.number) * 0x9e3779b97f4a7c15
	return fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", n>>32, n>>16&0xffff, n&0xfff, n>>12&0xfff, s.salt+uint64(s.number))
}

// AddServer makes a server that runs on a compute host.
func (s *Server) AddServer(host string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := &server{id: s.id(), host: host, status: "ACTIVE", power: 1, disks: map[string]bool{}}
	s.servers[i.id], i.address = i, fmt.Sprintf("10.9.%d.%d", len(s.servers)/250, 1+len(s.servers)%250)
	return i.id
}

// Address is that of a server.
func (s *Server) Address(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.servers[id].address
}

// SetFaults replaces the faults.
func (s *Server) SetFaults(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
	for _, f := range faults {
		s.faults = append(s.faults, &f)
	}
}

// Struck says that a fault which happens a number of times has happened as often.
func (s *Server) Struck() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.faults, func(f *Fault) bool { return f.Times < 0 })
}

// Calls returns how often each call was made, as "METHOD path" with ids as *.
func (s *Server) Calls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls)
}

// Expire makes all tokens expire.
func (s *Server) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Do changes things as an administrator or an accident would.
func (s *Server) Do(change func(s *Server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// The following are for Do.

// Status sets a volume's.
func (s *Server) Status(volume, status string) { s.volumes[volume].status = status }

// Multi gives a volume multiattach.
func (s *Server) Multi(volume string) { s.volumes[volume].multi = true }

// Snapshots gives a volume snapshots.
func (s *Server) Snapshots(volume string, n int) { s.volumes[volume].snapshots = n }

// Reserve makes an attachment that nobody completes.
func (s *Server) Reserve(volume string) (id string) {
	a := &attachment{id: s.id(), volume: volume, status: "reserved"}
	s.atts[a.id], s.volumes[volume].status = a, "reserved"
	return a.id
}

// Detach deletes a volume's attachments, as an administrator who knows better.
func (s *Server) Detach(volume string) {
	for _, a := range s.attachments(volume) {
		s.drop(a)
	}
	s.volumes[volume].status = "available"
}

// Note sets a key of a volume's metadata; empty removes it.
func (s *Server) Note(volume, key, value string) {
	all := maps.Clone(s.volumes[volume].metadata)
	if all[key] = value; value == "" {
		delete(all, key)
	}
	s.volumes[volume].metadata = all
}

// Remove removes a volume, whatever uses it.
func (s *Server) Remove(volume string) { delete(s.volumes, volume) }

// Add makes a volume, of a call of which nobody knows unless it is ready.
func (s *Server) Add(cluster, dataset string, ready bool) string {
	v := &volume{id: s.id(), status: "available", gib: 1, metadata: map[string]string{
		"flocker_cluster": cluster, "flocker_dataset": dataset, "flocker_maker": "nobody",
	}}
	if ready {
		v.metadata["flocker_ready"] = "node"
	}
	s.volumes[v.id] = v
	return v.id
}

// Break makes every new volume fail, and says why.
func (s *Server) Break(why string) { s.broken = why }

// Info is what hosts are told of where a volume is, from now on.
func (s *Server) Info(info map[string]any) { s.info = info }

// Power sets a server's state.
func (s *Server) Power(id, status string, power int) {
	s.servers[id].status, s.servers[id].power = status, power
}

// Lock locks a server, or unlocks it.
func (s *Server) Lock(id string, locked bool) { s.servers[id].locked = locked }

// Forget removes a server, and leaves what Cinder knows of it.
func (s *Server) Forget(id string) { delete(s.servers, id) }

// Host makes a compute host unreachable, and forced down by an administrator.
func (s *Server) Host(host string, down, forced bool) { s.down[host], s.forced[host] = down, forced }

// Attached returns a volume's status, and the servers or hosts that have attachments.
func (s *Server) Attached(volume string) (status string, on []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[volume]; v != nil {
		status = v.status
	}
	for _, a := range s.attachments(volume) {
		on = append(on, a.instance)
	}
	return status, on
}

// State returns a server's status.
func (s *Server) State(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.servers[id].status
}

// Volumes returns the ids of all volumes.
func (s *Server) Volumes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.volumes))
}

// Metadata returns the metadata of a volume.
func (s *Server) Metadata(volume string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.volumes[volume].metadata)
}

func (s *Server) attachments(volume string) (atts []*attachment) {
	for _, id := range slices.Sorted(maps.Keys(s.atts)) {
		if a := s.atts[id]; a.volume == volume || volume == "" {
			atts = append(atts, a)
		}
	}
	return atts
}

// drop removes an attachment.
func (s *Server) drop(a *attachment) {
	delete(s.atts, a.id)
	if e, ok := s.guest.(Exporter); ok {
		e.Unexport(a.volume, a.id)
	}
}

// after does something a while later, with the server locked.
func (s *Server) after(wait time.Duration, do func()) {
	if wait == 0 {
		do()
		return
	}
	time.AfterFunc(wait, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		select {
		case <-s.closed:
		default:
			do()
		}
	})
}

// refusal is an error as OpenStack says it.
type refusal struct {
	status     int
	text       string
	retryAfter int
}

func refuse(status int, format string, args ...any) *refusal {
	return &refusal{status: status, text: fmt.Sprintf(format, args...), retryAfter: -1}
}

// call is a request.
type call struct {
	*http.Request
	path  []string // after the service's own part
	body  map[string]json.RawMessage
	admin bool
}

// object decodes what the body has under a key, and knows nothing else.
func (c call) object(key string, into any) *refusal {
	raw, ok := c.body[key]
	if !ok {
		return refuse(http.StatusBadRequest, "Missing required element '%s' in request body.", key)
	}
	d := json.NewDecoder(strings.NewReader(string(raw)))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return refuse(http.StatusBadRequest, "Invalid input for field/attribute %s. %s", key, err)
	}
	return nil
}

func (s *Server) fault(name string) Fault {
	for _, f := range s.faults {
		if !strings.Contains(name, f.Call) || f.Times < 0 {
			continue
		}
		if f.After > 0 {
			f.After--
			continue
		}
		is := *f
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				f.Times = -1
			}
		}
		return is
	}
	return Fault{}
}

// take takes a call from the bucket.
func (s *Server) take() bool {
	if s.cfg.Rate == 0 {
		return true
	}
	now := time.Now()
	s.bucket = min(s.cfg.Burst, s.bucket+s.cfg.Rate*now.Sub(s.filled).Seconds())
	s.filled = now
	if s.bucket < 1 {
		return false
	}
	s.bucket--
	return true
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := call{Request: r, body: map[string]json.RawMessage{}}
	if r.ContentLength > 0 && json.NewDecoder(r.Body).Decode(&c.body) != nil {
		s.fail(w, refuse(http.StatusBadRequest, "Malformed request body"))
		return
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch known := parts[0] == "volume" || parts[0] == "compute"; {
	case !known && s.cfg.Rackspace:
		s.rackspace(w, c, parts)
		return
	case !known:
		s.identity(w, c, parts)
		return
	}
	volumes := parts[0] == "volume"
	if c.path = parts[2:]; volumes || s.cfg.Rackspace {
		if len(parts) < 4 || parts[2] != Project {
			s.fail(w, refuse(http.StatusBadRequest, "Malformed request url"))
			return
		}
		c.path = parts[3:]
	}
	var name []string
	for _, part := range c.path {
		if len(part) == 36 && strings.Count(part, "-") == 4 {
			part = "*"
		}
		name = append(name, part)
	}
	what := r.Method + " " + strings.Join(name, "/")
	if s.cfg.Rackspace && parts[1] != map[bool]string{true: "v1", false: "v2"}[volumes] {
		s.fail(w, refuse(http.StatusNotFound, "The resource could not be found."))
		return
	}
	s.mu.Lock()
	s.calls[what]++
	if r.URL.Query().Get("marker") != "" {
		what += "?marker"
	}
	fault := s.fault(what)
	answer, status, bad := any(nil), http.StatusOK, s.authenticate(&c)
	switch {
	case bad != nil:
	case fault.Hang:
		s.mu.Unlock()
		select {
		case <-r.Context().Done():
		case <-s.closed:
		}
		panic(http.ErrAbortHandler)
	case fault.Status != 0:
		bad = refuse(fault.Status, "%s", fault.Text)
		bad.retryAfter = fault.RetryAfter
	case !s.take():
		bad = refuse(http.StatusTooManyRequests, "Too many requests")
		bad.retryAfter = 0
	case s.cfg.Rackspace && (r.Header.Get("OpenStack-API-Version") != "" || r.Header.Get("X-OpenStack-Nova-API-Version") != ""):
		bad = refuse(http.StatusBadRequest, "There were no versions yet.")
	case volumes && s.cfg.Rackspace:
		answer, status, bad = s.cinderV1(c)
	case volumes && s.cfg.Old && r.Header.Get("OpenStack-API-Version") != "":
		bad = refuse(http.StatusNotAcceptable, "Version 3.44 is not supported by the API. Minimum is 3.0 and maximum is 3.27.")
	case volumes && r.Header.Get("OpenStack-API-Version") != "volume 3.44":
		bad = refuse(http.StatusNotFound, "The resource could not be found.") // attachments are newer than that
	case volumes:
		answer, status, bad = s.cinder(c)
	default:
		answer, status, bad = s.nova(c)
	}
	s.mu.Unlock()
	time.Sleep(fault.Slow)
	switch {
	case fault.Drop:
		panic(http.ErrAbortHandler)
	case bad != nil:
		s.fail(w, bad)
	default:
		s.reply(w, status, answer, fault.Half)
	}
}

func (s *Server) reply(w http.ResponseWriter, status int, answer any, half bool) {
	w.Header().Set("Content-Type", "application/json")
	if answer == nil {
		w.WriteHeader(status)
		return
	}
	text, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	if half {
		_, _ = w.Write(text[:len(text)/2])
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(text)
}

func (s *Server) fail(w http.ResponseWriter, bad *refusal) {
	kind, ok := map[int]string{
		http.StatusBadRequest: "badRequest", http.StatusUnauthorized: "unauthorized", http.StatusForbidden: "forbidden",
		http.StatusNotFound: "itemNotFound", http.StatusConflict: "conflictingRequest", http.StatusRequestEntityTooLarge: "overLimit",
		http.StatusTooManyRequests: "overLimit",
	}[bad.status]
	if !ok {
		kind = "computeFault"
	}
	if bad.retryAfter >= 0 {
		w.Header().Set("Retry-After", strconv.Itoa(bad.retryAfter))
	}
	s.reply(w, bad.status, map[string]any{kind: map[string]any{"code": bad.status, "message": bad.text}}, false)
}

// authenticate looks at the token.
func (s *Server) authenticate(c *call) *refusal {
	token := c.Header.Get("X-Auth-Token")
	if s.cfg.NoAuth {
		c.admin = true
		if token == "admin:"+Project {
			return nil
		}
		return refuse(http.StatusUnauthorized, "The request you have made requires authentication.")
	}
	user, ok := s.tokens[token]
	if !ok {
		return refuse(http.StatusUnauthorized, "The request you have made requires authentication.")
	}
	c.admin = user == Admin
	return nil
}

// identity is Keystone.
func (s *Server) identity(w http.ResponseWriter, c call, path []string) {
	v3 := map[string]any{"id": "v3.14", "status": "stable", "links": []map[string]string{{"rel": "self", "href": s.URL + "/v3/"}}}
	switch {
	case c.Method == http.MethodGet && path[0] == "":
		s.reply(w, http.StatusMultipleChoices, map[string]any{"versions": map[string]any{"values": []any{v3}}}, false)
		return
	case c.Method == http.MethodGet && len(path) == 1 && path[0] == "v3":
		s.reply(w, http.StatusOK, map[string]any{"version": v3}, false)
		return
	case c.Method != http.MethodPost || strings.Join(path, "/") != "v3/auth/tokens":
		s.fail(w, refuse(http.StatusNotFound, "(http://%s) The resource could not be found.", c.Host))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls["POST auth/tokens"]++
	if f := s.fault("POST auth/tokens"); f.Status != 0 {
		s.fail(w, refuse(f.Status, "%s", f.Text))
		return
	}
	var auth struct {
		Identity struct {
			Methods  []string
			Password struct {
				User struct {
					Name, Password string
					Domain         struct{ Name string }
				}
			}
			Credential struct{ ID, Secret string } `json:"application_credential"`
		}
		Scope struct {
			Project struct {
				ID, Name string
				Domain   struct{ Name string }
			}
		}
	}
	user := ""
	if json.Unmarshal(c.body["auth"], &auth) == nil && len(auth.Identity.Methods) == 1 {
		u, p := auth.Identity.Password.User, auth.Scope.Project
		inProject := p.ID == Project || p.Name == "shop" && p.Domain.Name == "Sales"
		switch {
		case auth.Identity.Methods[0] == "password" && (u.Name == User || u.Name == Admin) && u.Domain.Name == "Default" && u.Password == Secret && inProject:
			user = u.Name
		case auth.Identity.Methods[0] == "application_credential" && auth.Identity.Credential.ID == AppID && auth.Identity.Credential.Secret == Secret:
			user = User
		}
	}
	if user == "" {
		s.fail(w, refuse(http.StatusUnauthorized, "The request you have made requires authentication."))
		return
	}
	token := "gAAAAA" + s.id()
	s.tokens[token] = user
	endpoint := func(url string) []map[string]string {
		return []map[string]string{{"id": s.id(), "interface": "public", "region": Region, "region_id": Region, "url": url}}
	}
	w.Header().Set("X-Subject-Token", token)
	s.reply(w, http.StatusCreated, map[string]any{"token": map[string]any{
		"methods": auth.Identity.Methods, "expires_at": time.Now().Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000000Z"),
		"catalog": []map[string]any{
			{"type": "volumev3", "name": "cinderv3", "id": s.id(), "endpoints": endpoint(s.CinderURL() + "/" + Project)},
			{"type": "compute", "name": "nova", "id": s.id(), "endpoints": endpoint(s.URL + "/compute/v2.1")},
		},
	}}, false)
}
