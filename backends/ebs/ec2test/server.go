// Package ec2test is a strict imitation of the part of EC2's API that package ebs
// uses, for tests: a server on a real socket, with client tokens, states that take
// their time, zones, pages, limits, throttling, and an answer that may be old.
package ec2test

import (
	"fmt"
	"maps"
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
	// Delay is how long a volume is creating, attaching, detaching and deleting, and
	// an instance starting and stopping.
	Delay time.Duration
	// Lag is how old the answers of Describe calls are.
	Lag time.Duration
	// Burst and Rate are the bucket of calls; Rate 0 is no bucket.
	Burst, Rate float64
	// Quota is how many GiB there may be; 0 is any number.
	Quota int
	// Key is the access key id that is known.
	Key string
}

// Guest is what an instance's operating system sees and does. It is called with the
// server locked, and must not call it.
type Guest interface {
	// Plug shows a volume, Unplug takes it away.
	Plug(instance, volume, device string, gib int)
	Unplug(instance, volume string)
	// Holds says that the instance does not let go of a volume.
	Holds(instance, volume string) bool
	// Obeys says that the instance stops when it is asked to, without force.
	Obeys(instance string) bool
}

// Fault happens to calls of an action; empty is all of them. The first that fits is
// the one a call suffers.
type Fault struct {
	Action string
	After  int // so many calls are spared before
	Times  int // 0 is all
	// Code and Status refuse the call, without effect.
	Code   string
	Status int
	// Hang answers nothing until the caller has gone, without effect.
	Hang bool
	// Drop closes the connection after the call has had its effect; Half does so in the
	// middle of the answer, and Slow holds the answer back.
	Drop, Half bool
	Slow       time.Duration
	// Late passes before the call has its effect, whether or not the caller is still there.
	Late time.Duration
}

// Server is the imitation. Its URL is that of the API.
type Server struct {
	*httptest.Server
	cfg   Config
	guest Guest

	mu        sync.Mutex
	volumes   map[string]*volume
	gone      map[string]*volume // deleted, and still shown
	instances map[string]*instance
	tokens    map[string]created
	faults    []*Fault
	forbidden []string
	heedless  bool
	calls     map[string]int
	throttled int
	bucket    float64
	filled    time.Time
	number    int
	closed    chan struct{}
}

type created struct{ volume, params string }

type volume struct {
	id, zone, state, kind string
	gib, iops, throughput int
	encrypted             bool
	tags                  map[string]string
	attachment            *attachment
	made                  time.Time
	history               []snapshot
}

type attachment struct{ instance, device, state string }

// snapshot is what Describe says of a volume from a time on; nil tags: it is gone.
type snapshot struct {
	since time.Time
	is    volume
	gone  bool
}

type instance struct {
	id, zone, state, kind string
	limit                 int
}

// New starts a server; Close ends it. guest may be nil.
func New(cfg Config, guest Guest) *Server {
	s := &Server{
		cfg: cfg, guest: guest, volumes: map[string]*volume{}, gone: map[string]*volume{}, instances: map[string]*instance{}, tokens: map[string]created{},
		calls: map[string]int{}, bucket: cfg.Burst, filled: time.Now(), closed: make(chan struct{}),
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

// AddInstance makes a running instance that can have so many volumes.
func (s *Server) AddInstance(zone string, limit int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number++
	id := fmt.Sprintf("i-%017x", s.number)
	s.instances[id] = &instance{id: id, zone: zone, state: "running", kind: "m5.large", limit: limit}
	return id
}

// Forbid has the policy allow all but these actions.
func (s *Server) Forbid(actions ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forbidden = actions
}

// IgnoreDryRun has calls that were only asked about carried out, as other clouds may do.
func (s *Server) IgnoreDryRun() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heedless = true
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

// SetRate fills the bucket, and changes how fast it is filled from now on.
func (s *Server) SetRate(rate float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cfg.Rate, s.bucket, s.filled = rate, s.cfg.Burst, time.Now()
}

// Calls returns how often each action was called, and how many calls were throttled.
func (s *Server) Calls() (calls map[string]int, throttled int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls), s.throttled
}

// State returns an instance's state.
func (s *Server) State(instance string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.instances[instance].state
}

// Attached returns where a volume is attached, and how.
func (s *Server) Attached(volume string) (instance, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[volume]; v != nil && v.attachment != nil {
		return v.attachment.instance, v.attachment.state
	}
	return "", ""
}

// Volumes returns the ids of all volumes.
func (s *Server) Volumes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.volumes))
}

// Change has somebody else call the API, such as an administrator.
func (s *Server) Change(action string, params map[string]string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.do(action, params)
	if err != nil {
		return err
	}
	return nil
}

// noted keeps what a volume is from now on.
func (s *Server) noted(v *volume) {
	is := *v
	is.history, is.tags = nil, maps.Clone(v.tags)
	if v.attachment != nil {
		a := *v.attachment
		is.attachment = &a
	}
	_, there := s.volumes[v.id]
	v.history = append(v.history, snapshot{time.Now(), is, !there})
}

// shown is what Describe says of a volume now; nil if it says nothing.
func (s *Server) shown(v *volume) *volume {
	var is *volume
	for i := range v.history {
		if h := &v.history[i]; s.cfg.Lag == 0 || time.Since(h.since) >= s.cfg.Lag {
			if is = &h.is; h.gone {
				is = nil
			}
		}
	}
	return is
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
		do()
	})
}

// refusal is an error as EC2 says it.
type refusal struct {
	code, text string
	status     int
}

func (r *refusal) Error() string { return r.code + ": " + r.text }

func refuse(code, format string, args ...any) *refusal {
	return &refusal{code, fmt.Sprintf(format, args...), http.StatusBadRequest}
}

// take takes a token from the bucket.
func (s *Server) take() bool {
	if s.cfg.Rate == 0 {
		return true
	}
	now := time.Now()
	s.bucket = min(s.cfg.Burst, s.bucket+s.cfg.Rate*now.Sub(s.filled).Seconds())
	s.filled = now
	if s.bucket < 1 {
		s.throttled++
		return false
	}
	s.bucket--
	return true
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.Method != http.MethodPost {
		s.fail(w, refuse("InvalidRequest", "a POST with a form is needed"))
		return
	}
	params := map[string]string{}
	for key, values := range r.PostForm {
		params[key] = values[0]
	}
	action := params["Action"]
	s.mu.Lock()
	s.calls[action]++
	fault := Fault{}
	for _, f := range s.faults {
		if f.Action != "" && f.Action != action || f.Times < 0 {
			continue
		}
		if f.After > 0 {
			f.After--
			continue
		}
		if fault = *f; f.Times > 0 {
			if f.Times--; f.Times == 0 {
				f.Times = -1
			}
		}
		break
	}
	bad := s.authenticate(r)
	var answer any
	switch {
	case bad != nil:
	case fault.Hang:
		s.mu.Unlock()
		select {
		case <-r.Context().Done():
		case <-s.closed:
		}
		panic(http.ErrAbortHandler)
	case fault.Code != "":
		bad = refuse(fault.Code, "made to fail")
		if fault.Status != 0 {
			bad.status = fault.Status
		}
	case !s.take():
		bad = refuse("RequestLimitExceeded", "Request limit exceeded.")
		bad.status = http.StatusServiceUnavailable
	default:
		s.mu.Unlock()
		time.Sleep(fault.Late)
		s.mu.Lock()
		if bad = s.judge(action, params); bad == nil {
			answer, bad = s.do(action, params)
		}
	}
	s.mu.Unlock()
	time.Sleep(fault.Slow)
	switch {
	case fault.Drop:
		panic(http.ErrAbortHandler)
	case fault.Half && bad == nil:
		whole := httptest.NewRecorder()
		s.reply(whole, action, answer)
		w.Header().Set("Content-Length", strconv.Itoa(whole.Body.Len()))
		_, _ = w.Write(whole.Body.Bytes()[:whole.Body.Len()/2])
		panic(http.ErrAbortHandler)
	case bad != nil:
		s.fail(w, bad)
	default:
		s.reply(w, action, answer)
	}
}

// authenticate looks at who says to be asking. The signature itself is not checked.
func (s *Server) authenticate(r *http.Request) *refusal {
	auth := r.Header.Get("Authorization")
	if !strings.HasPrefix(auth, "AWS4-HMAC-SHA256 Credential=") || !strings.Contains(auth, "Signature=") {
		return refuse("MissingAuthenticationToken", "Request is missing Authentication Token")
	}
	if key, _, _ := strings.Cut(strings.TrimPrefix(auth, "AWS4-HMAC-SHA256 Credential="), "/"); s.cfg.Key != "" && key != s.cfg.Key {
		bad := refuse("AuthFailure", "AWS was not able to validate the provided access credentials")
		bad.status = http.StatusUnauthorized
		return bad
	}
	return nil
}

// judge refuses what the policy does not allow, and whatever was only asked about. What a
// question names has to be there.
func (s *Server) judge(action string, p map[string]string) *refusal {
	if slices.Contains(s.forbidden, action) {
		return &refusal{"UnauthorizedOperation", "You are not authorized to perform this operation.", http.StatusForbidden}
	}
	if p["DryRun"] != "true" || s.heedless {
		return nil
	}
	for _, id := range append(indexed(p, "ResourceId"), p["VolumeId"]) {
		if _, bad := s.volume(id); id != "" && bad != nil {
			return bad
		}
	}
	for _, id := range append(indexed(p, "InstanceId"), p["InstanceId"]) {
		if _, bad := s.instance(id); id != "" && bad != nil {
			return bad
		}
	}
	return &refusal{"DryRunOperation", "Request would have succeeded, but DryRun flag is set.", http.StatusPreconditionFailed}
}

// indexed returns the values of Name.1, Name.2 and so on.
func indexed(params map[string]string, name string) (values []string) {
	for i := 1; ; i++ {
		v, ok := params[name+"."+strconv.Itoa(i)]
		if !ok {
			return values
		}
		values = append(values, v)
	}
}

func number(params map[string]string, name string) int {
	n, _ := strconv.Atoi(params[name])
	return n
}

func (s *Server) volume(id string) (*volume, *refusal) {
	if v := s.volumes[id]; v != nil {
		return v, nil
	}
	return nil, refuse("InvalidVolume.NotFound", "The volume '%s' does not exist.", id)
}

func (s *Server) instance(id string) (*instance, *refusal) {
	if i := s.instances[id]; i != nil {
		return i, nil
	}
	return nil, refuse("InvalidInstanceID.NotFound", "The instance ID '%s' does not exist", id)
}

func (s *Server) do(action string, p map[string]string) (any, *refusal) {
	do, ok := map[string]func(map[string]string) (any, *refusal){
		"CreateVolume": s.createVolume, "DeleteVolume": s.deleteVolume, "DescribeVolumes": s.describeVolumes,
		"AttachVolume": s.attachVolume, "DetachVolume": s.detachVolume, "CreateTags": s.createTags, "DeleteTags": s.deleteTags,
		"DescribeInstances": s.describeInstances, "DescribeInstanceTypes": s.describeInstanceTypes,
		"StopInstances": s.stopInstances, "StartInstances": s.startInstances, "TerminateInstances": s.terminateInstances,
	}[action]
	if !ok {
		return nil, refuse("InvalidAction", "The action %s is not valid for this web service.", action)
	}
	return do(p)
}

func (s *Server) createVolume(p map[string]string) (any, *refusal) {
	token := p["ClientToken"]
	same := maps.Clone(p)
	delete(same, "ClientToken")
	params := fmt.Sprint(same)
	if c, ok := s.tokens[token]; ok && token != "" {
		if c.params != params {
			return nil, refuse("IdempotentParameterMismatch", "The request uses the same client token as a previous, but non-identical request.")
		}
		if v := s.volumes[c.volume]; v != nil {
			return volumeXML(v), nil
		}
		return volumeXML(&volume{id: c.volume, state: "creating", zone: p["AvailabilityZone"], gib: number(p, "Size"), kind: p["VolumeType"]}), nil
	}
	gib, total := number(p, "Size"), 0
	for _, v := range s.volumes {
		total += v.gib
	}
	switch {
	case p["AvailabilityZone"] == "":
		return nil, refuse("MissingParameter", "The request must contain the parameter AvailabilityZone")
	case gib < 1 || gib > 65536:
		return nil, refuse("InvalidParameterValue", "Volume of %dGiB is not in range", gib)
	case len(token) > 64:
		return nil, refuse("InvalidParameterValue", "the client token is too long")
	case s.cfg.Quota > 0 && total+gib > s.cfg.Quota:
		return nil, refuse("VolumeLimitExceeded", "Maximum volume storage exceeded.")
	}
	s.number++
	v := &volume{
		id: fmt.Sprintf("vol-%017x", s.number), zone: p["AvailabilityZone"], state: "creating", kind: p["VolumeType"], gib: gib,
		iops: number(p, "Iops"), throughput: number(p, "Throughput"), encrypted: p["Encrypted"] == "true", tags: map[string]string{}, made: time.Now(),
	}
	for i := 1; ; i++ {
		key, ok := p[fmt.Sprintf("TagSpecification.1.Tag.%d.Key", i)]
		if !ok {
			break
		}
		v.tags[key] = p[fmt.Sprintf("TagSpecification.1.Tag.%d.Value", i)]
	}
	s.volumes[v.id], s.tokens[token] = v, created{v.id, params}
	s.noted(v)
	answer := volumeXML(v)
	s.after(s.cfg.Delay, func() {
		if v.state == "creating" {
			v.state = "available"
			s.noted(v)
		}
	})
	return answer, nil
}

func (s *Server) deleteVolume(p map[string]string) (any, *refusal) {
	v, bad := s.volume(p["VolumeId"])
	switch {
	case bad != nil:
		return nil, bad
	case v.attachment != nil:
		return nil, refuse("VolumeInUse", "Volume %s is currently attached to %s", v.id, v.attachment.instance)
	case v.state != "available" && v.state != "error":
		return nil, refuse("IncorrectState", "The volume '%s' is '%s'", v.id, v.state)
	}
	v.state = "deleting"
	s.noted(v)
	s.after(s.cfg.Delay, func() {
		delete(s.volumes, v.id)
		s.gone[v.id] = v
		s.noted(v)
		s.after(s.cfg.Lag, func() { delete(s.gone, v.id) })
	})
	return done{true}, nil
}
