package rest

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// openapi is the description of v2 for programs; a test compares it with what is below.
//
//go:embed openapi.json
var openapi []byte

var v2 = []route{
	{http.MethodGet, "/v2/openapi.json", (*API).v2Description},
	{http.MethodGet, "/v2/version", (*API).v2Version},
	{http.MethodGet, "/v2/volumes", (*API).v2Volumes},
	{http.MethodPost, "/v2/volumes", (*API).v2Create},
	{http.MethodGet, "/v2/volumes/{name}", (*API).v2Volume},
	{http.MethodDelete, "/v2/volumes/{name}", (*API).v2Delete},
	{http.MethodPost, "/v2/volumes/{name}/move", (*API).v2Move},
	{http.MethodGet, "/v2/volumes/{name}/wait", (*API).v2Wait},
	{http.MethodGet, "/v2/nodes", (*API).v2Nodes},
	{http.MethodGet, "/v2/nodes/{host}", (*API).v2Node},
	{http.MethodDelete, "/v2/nodes/{host}", (*API).v2RemoveNode},
	{http.MethodPost, "/v2/nodes/{host}/cordon", (*API).v2Cordon},
	{http.MethodPost, "/v2/nodes/{host}/uncordon", (*API).v2Uncordon},
	{http.MethodPost, "/v2/nodes/{host}/drain", (*API).v2Drain},
	{http.MethodGet, "/v2/events", (*API).v2Events},
}

// problem is the body of an error: RFC 9457.
type problem struct {
	Type   string   `json:"type"`
	Title  string   `json:"title"`
	Status int      `json:"status"`
	Detail string   `json:"detail"`
	Errors []string `json:"errors,omitempty"`
	// Volume is how it is now, where it was waited for in vain.
	Volume *volume `json:"volume,omitempty"`
	// Next is from where on there are events.
	Next *int64 `json:"next,omitempty"`
}

func problemOf(e *refusal) problem {
	p := problem{Type: "about:blank", Title: http.StatusText(e.status), Status: e.status, Detail: e.text, Errors: e.errors}
	switch body := e.body.(type) {
	case *volume:
		p.Volume = body
	case int64:
		p.Next = &body
	}
	return p
}

type version struct {
	Version string `json:"version"`
}

type volume struct {
	Name       string            `json:"name"`
	ID         string            `json:"id"`
	State      string            `json:"state"`
	Detail     string            `json:"detail,omitempty"`
	Owner      *owner            `json:"owner,omitempty"`
	Placement  *placement        `json:"placement,omitempty"`
	Mounted    *mounted          `json:"mounted,omitempty"`
	Lease      *leased           `json:"lease,omitempty"`
	Waiting    []string          `json:"waiting,omitempty"` // hosts
	Bytes      int64             `json:"bytes"`
	Filesystem string            `json:"filesystem"`
	Backend    string            `json:"backend"`
	Profile    string            `json:"profile,omitempty"`
	Options    map[string]string `json:"options,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`
}

type owner struct {
	Node  string `json:"node"`
	Host  string `json:"host"`
	Live  bool   `json:"live"`
	Token int64  `json:"token"`
}

type placement struct {
	Node string    `json:"node"`
	Host string    `json:"host"`
	By   string    `json:"by"`
	At   time.Time `json:"at"`
}

type mounted struct {
	Node  string    `json:"node"`
	Path  string    `json:"path"`
	Since time.Time `json:"since"`
}

type leased struct {
	Node    string     `json:"node"`
	By      string     `json:"by"`
	Expires *time.Time `json:"expires,omitempty"`
}

type volumes struct {
	Volumes []volume `json:"volumes"`
	// Next is for after=, if there are more.
	Next     string  `json:"next,omitempty"`
	Revision int64   `json:"revision"`
	Stale    float64 `json:"stale_seconds,omitempty"`
}

type member struct {
	ID      string `json:"id"`
	Host    string `json:"host"`
	Address string `json:"address,omitempty"`
	Boot    string `json:"boot"`
	State   string `json:"state"`
	Volumes int    `json:"volumes"` // that it owns
}

type nodes struct {
	Nodes    []member `json:"nodes"`
	Revision int64    `json:"revision"`
	Stale    float64  `json:"stale_seconds,omitempty"`
}

type creation struct {
	Name    string            `json:"name"`
	ID      string            `json:"id"`
	Host    string            `json:"host"`
	Options map[string]string `json:"options"`
	Labels  map[string]string `json:"labels"`
}

type destination struct {
	Host *string `json:"host"`
}

type drained struct {
	Released []string `json:"released"`
	Moving   []string `json:"moving"`
	Busy     []busy   `json:"busy"`
}

type busy struct {
	Name       string   `json:"name"`
	Containers []string `json:"containers"`
	Detail     string   `json:"detail,omitempty"`
}

func (a *API) v2Description(r *http.Request) (answer, error) {
	_, err := query(r)
	return ok(openapi), err
}

func (a *API) v2Version(r *http.Request) (answer, error) {
	_, err := query(r)
	return ok(version{a.Version}), err
}

// The states of a volume that the map has no words for.
const (
	stateMounted = "mounted"
	stateGone    = "gone" // only to wait for
)

func volumeOf(v *ownership.View) volume {
	d := v.Volume
	shown := volume{
		Name: d.Name, ID: d.ID, Bytes: d.Size, Filesystem: d.FS, Backend: d.Backend,
		Profile: d.Profile, Options: d.Options, Labels: d.Labels, Created: d.Created,
	}
	shown.State, shown.Detail = v.State()
	if o := v.Owner; o != nil {
		shown.Owner = &owner{o.Node, o.Host, v.OwnerLive, o.Token}
	}
	if p := present(v); p != nil {
		shown.Mounted = &mounted{p.Node, p.Path, p.Since}
		if shown.State == ownership.StateOwned {
			shown.State = stateMounted
		}
	}
	if p := v.Placement; p != nil {
		shown.Placement = &placement{p.Node, p.Host, p.By, p.At}
	}
	if l := v.Lease; l != nil {
		shown.Lease = &leased{l.Node, l.By, l.Expires}
	}
	for _, w := range v.Waiting {
		shown.Waiting = append(shown.Waiting, w.Host)
	}
	return shown
}

const (
	pageSize = 100
	maxPage  = 1000
)

func (a *API) v2Volumes(r *http.Request) (answer, error) {
	q, err := query(r, "limit", "after", "label")
	if err != nil {
		return answer{}, err
	}
	limit, err := number(q, "limit", pageSize, 1, maxPage)
	if err != nil {
		return answer{}, err
	}
	labels := map[string]string{}
	for _, label := range q["label"] {
		key, value, ok := strings.Cut(label, "=")
		if !ok || key == "" {
			return answer{}, badRequest("label=%s is not of the form label=KEY=VALUE.", label)
		}
		labels[key] = value
	}
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	page := volumes{Volumes: []volume{}, Revision: s.Revision, Stale: staleness(header)}
	first := 0
	if after := q.Get("after"); after != "" {
		first, _ = slices.BinarySearchFunc(s.Views, after, func(v ownership.View, name string) int {
			return cmp.Or(strings.Compare(v.Volume.Name, name), -1) // after all of that name
		})
	}
	for i := first; i < len(s.Views); i++ {
		v := &s.Views[i]
		if !hasLabels(v.Volume.Labels, labels) {
			continue
		}
		// Two of a name are on one page: one of them is being deleted.
		if n := len(page.Volumes); n >= limit && page.Volumes[n-1].Name != v.Volume.Name {
			page.Next = page.Volumes[n-1].Name
			break
		}
		page.Volumes = append(page.Volumes, volumeOf(v))
	}
	return answer{status: http.StatusOK, body: page, header: header}, nil
}

func hasLabels(have, want map[string]string) bool {
	for key, value := range want {
		if got, ok := have[key]; !ok || got != value {
			return false
		}
	}
	return true
}

func (a *API) v2Volume(r *http.Request) (answer, error) {
	if _, err := query(r); err != nil {
		return answer{}, err
	}
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	v := byName(s, r.PathValue("name"))
	if v == nil {
		return answer{}, noVolume(r.PathValue("name"))
	}
	return answer{status: http.StatusOK, body: volumeOf(v), header: header}, nil
}

func noVolume(name string) error {
	return &refusal{status: http.StatusNotFound, text: fmt.Sprintf("There is no volume %q.", name)}
}

func (a *API) v2Create(r *http.Request) (answer, error) {
	var body creation
	if err := strict(r, &body); err != nil {
		return answer{}, err
	}
	if driver.ValidName(body.Name) != nil {
		return answer{}, badRequest("Volume name %q is not valid: use 1 to 128 letters, digits, _ . and -, beginning with a letter or digit.", body.Name)
	}
	if body.ID != "" && !uuid4Form.MatchString(body.ID) {
		return answer{}, badRequest("Id %q is not a UUID of version 4: leave it out, and one is made.", body.ID)
	}
	s, _, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	c := driver.CreateRequest{
		Name: body.Name, ID: cmp.Or(strings.ToLower(body.ID), uuid.NewString()),
		Options: body.Options, Labels: body.Labels, By: by(r.Context()), New: true,
	}
	if err := taken(s, c.Name, c.ID); err != nil {
		return answer{}, v2Taken(err)
	}
	if body.Host != "" {
		if err := mayGet(s, body.Host); err != nil {
			return answer{}, err
		}
	}
	v, unplaced, err := a.create(r.Context(), c, body.Host)
	if err != nil {
		return answer{}, v2Taken(err)
	}
	shown := a.now(v)
	if unplaced != nil && shown.Placement == nil {
		shown.Detail = "it is to be on no host yet: " + unplaced.Error()
	}
	return answer{
		status: http.StatusCreated, body: shown,
		header: http.Header{"Location": {"/v2/volumes/" + url.PathEscape(shown.Name)}},
	}, nil
}

// v2Taken is an error of a create, with its text if its name or id is taken.
func v2Taken(err error) error {
	e, ok := errors.AsType[*ownership.TakenError](err)
	switch {
	case !ok:
		return err
	case e.By == "", e.By == e.ID:
		return &refusal{status: http.StatusConflict, text: fmt.Sprintf("Id %s is in use, or was.", e.ID)}
	}
	return &refusal{status: http.StatusConflict, text: fmt.Sprintf("There is a volume %s already.", e.Name)}
}

// now is a volume as it is seen after a change, or, before that is seen, as it was
// answered.
func (a *API) now(v *ownership.View) volume {
	if s, _, ok := a.Cluster.State(); ok {
		if seen := byID(s, v.Volume.ID); seen != nil && seen.Volume.Revision >= v.Volume.Revision {
			return volumeOf(seen)
		}
	}
	return volumeOf(v)
}

func (a *API) v2Delete(r *http.Request) (answer, error) {
	q, err := query(r, "id")
	if err != nil {
		return answer{}, err
	}
	s, _, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	v := byName(s, r.PathValue("name"))
	if v == nil || q.Get("id") != "" && !strings.EqualFold(q.Get("id"), v.Volume.ID) {
		return answer{}, noVolume(r.PathValue("name"))
	}
	switch err := a.Driver.RemoveVolume(r.Context(), v.Volume.Name, v.Volume.ID); {
	case errors.Is(err, ownership.ErrNotFound):
		return answer{}, noVolume(v.Volume.Name)
	case err != nil:
		return answer{}, err
	}
	a.seenGone(r.Context(), v.Volume.ID)
	return answer{status: http.StatusNoContent}, nil
}

func (a *API) v2Move(r *http.Request) (answer, error) {
	var body destination
	if err := strict(r, &body); err != nil {
		return answer{}, err
	}
	if body.Host == nil {
		return answer{}, badRequest(`host is missing: say which, or "" for none.`)
	}
	s, _, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	v := byName(s, r.PathValue("name"))
	if v == nil {
		return answer{}, noVolume(r.PathValue("name"))
	}
	if *body.Host != "" {
		if err := mayGet(s, *body.Host); err != nil {
			return answer{}, err
		}
	}
	placed, err := a.Driver.MoveVolume(r.Context(), v.Volume.Name, v.Volume.ID, *body.Host, by(r.Context()))
	switch {
	case errors.Is(err, ownership.ErrNotFound):
		return answer{}, noVolume(v.Volume.Name)
	case err != nil:
		return answer{}, err
	}
	if *body.Host == "" {
		a.seen(r.Context(), func(s *ownership.State) bool { v := byID(s, v.Volume.ID); return v == nil || v.Placement == nil })
	} else {
		a.seenRevision(r.Context(), placed.Revision)
	}
	return ok(a.now(v)), nil
}

// v2Wait answers when a volume is in a state, or says at the deadline how it is.
func (a *API) v2Wait(r *http.Request) (answer, error) {
	q, err := query(r, "state", "host", "timeout")
	if err != nil {
		return answer{}, err
	}
	want, host, name := q.Get("state"), q.Get("host"), r.PathValue("name")
	states := []string{ownership.StateFree, ownership.StateOwned, stateMounted, stateGone}
	if !slices.Contains(states, want) {
		return answer{}, badRequest("state=%s cannot be waited for: use one of %s.", want, strings.Join(states, ", "))
	}
	if host != "" && (want == ownership.StateFree || want == stateGone) {
		return answer{}, badRequest("A volume that is %s is on no host: leave host= out.", want)
	}
	timeout := 30 * time.Second
	if text := q.Get("timeout"); text != "" {
		if timeout, err = time.ParseDuration(text); err != nil || timeout <= 0 || timeout > maxWait {
			return answer{}, badRequest("timeout=%s is not a time such as 30s, of at most %v.", text, maxWait)
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	for id := ""; ; {
		v := byName(s, name)
		switch {
		case v == nil && id == "" && want != stateGone:
			return answer{}, noVolume(name)
		case v == nil || id != "" && v.Volume.ID != id: // another one of that name is not the one that is waited for
			if want == stateGone {
				return answer{status: http.StatusNoContent, header: header}, nil
			}
			return answer{}, noVolume(name)
		}
		id = v.Volume.ID
		now := volumeOf(v)
		if isIn(now, want, host) {
			return answer{status: http.StatusOK, body: now, header: header}, nil
		}
		next, err := a.Cluster.Wait(ctx, s.Revision)
		switch {
		case err == nil:
			s = next
		case errors.Is(ctx.Err(), context.Canceled): // or the client has gone away
			return answer{}, &refusal{status: http.StatusServiceUnavailable, text: "The plugin ends on this host: ask another one."}
		default:
			return answer{}, &refusal{
				status: http.StatusGatewayTimeout, body: &now,
				text: fmt.Sprintf("Volume %s is not %s within %v: it is %s.", name, want, timeout, now.State),
			}
		}
	}
}

// maxWait leaves a moment for the answer, within patience.
const maxWait = 100 * time.Second

// isIn says whether a volume is in a state, on a host if one is named. What is mounted is
// owned, too.
func isIn(v volume, state, host string) bool {
	on := host == "" || v.Owner != nil && (v.Owner.Host == host || v.Owner.Node == host)
	return on && (v.State == state || state == ownership.StateOwned && v.State == stateMounted)
}

func memberOf(n *ownership.NodeStatus) member {
	m := member{ID: n.ID, Host: n.Host, Address: n.Address, Boot: n.Boot, State: "live", Volumes: n.Owned}
	switch {
	case n.State == ownership.Removed:
		m.State = n.State
	case n.Death != nil:
		m.State = "declared dead"
	case !n.Live:
		m.State = "silent"
	case n.State != "":
		m.State = n.State
	}
	return m
}

func (a *API) v2Nodes(r *http.Request) (answer, error) {
	if _, err := query(r); err != nil {
		return answer{}, err
	}
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	all := nodes{Nodes: make([]member, len(s.Nodes)), Revision: s.Revision, Stale: staleness(header)}
	for i := range s.Nodes {
		all.Nodes[i] = memberOf(&s.Nodes[i])
	}
	return answer{status: http.StatusOK, body: all, header: header}, nil
}

// host is the node that a request names.
func (a *API) host(r *http.Request) (*ownership.NodeStatus, http.Header, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return nil, nil, err
	}
	n, err := nodeOf(s, r.PathValue("host"))
	return n, header, err
}

func (a *API) v2Node(r *http.Request) (answer, error) {
	if _, err := query(r); err != nil {
		return answer{}, err
	}
	n, header, err := a.host(r)
	if err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK, body: memberOf(n), header: header}, nil
}

func (a *API) v2Cordon(r *http.Request) (answer, error)   { return a.cordon(r, true) }
func (a *API) v2Uncordon(r *http.Request) (answer, error) { return a.cordon(r, false) }

func (a *API) cordon(r *http.Request, on bool) (answer, error) {
	if err := strict(r, &struct{}{}); err != nil {
		return answer{}, err
	}
	n, _, err := a.host(r)
	if err != nil {
		return answer{}, err
	}
	if err := a.Driver.Cordon(r.Context(), n.ID, by(r.Context()), on); err != nil {
		return answer{}, err
	}
	cordoned := *n
	a.seen(r.Context(), func(s *ownership.State) bool {
		if now, err := nodeOf(s, n.ID); err == nil {
			cordoned = *now
		}
		return (cordoned.State == ownership.Cordoned) == on
	})
	return ok(memberOf(&cordoned)), nil
}

func (a *API) v2Drain(r *http.Request) (answer, error) {
	if err := strict(r, &struct{}{}); err != nil {
		return answer{}, err
	}
	n, _, err := a.host(r)
	if err != nil {
		return answer{}, err
	}
	d, err := a.Driver.Drain(r.Context(), n.ID, by(r.Context()))
	if err != nil {
		return answer{}, err
	}
	shown := drained{Released: list(d.Released), Moving: list(d.Moving), Busy: []busy{}}
	for _, b := range d.Busy {
		shown.Busy = append(shown.Busy, busy{b.Name, list(b.Containers), b.Detail})
	}
	return ok(shown), nil
}

// v2RemoveNode is for a host that does not come back.
func (a *API) v2RemoveNode(r *http.Request) (answer, error) {
	if _, err := query(r); err != nil {
		return answer{}, err
	}
	n, _, err := a.host(r)
	if err != nil {
		return answer{}, err
	}
	if err := a.Driver.RemoveNode(r.Context(), n.ID, by(r.Context())); err != nil {
		return answer{}, err
	}
	a.seen(r.Context(), func(s *ownership.State) bool {
		_, err := nodeOf(s, n.ID)
		return err != nil
	})
	return answer{status: http.StatusNoContent}, nil
}

// list is never null.
func list(names []string) []string {
	if names == nil {
		return []string{}
	}
	return names
}

func staleness(header http.Header) float64 {
	seconds, _ := strconv.ParseFloat(header.Get(staleHeader), 64) // 0 if there is none
	return seconds
}

// query are the parameters, of which there may be no others: one that is misspelt is not
// one that was left out.
func query(r *http.Request, known ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("What follows ? in the address cannot be read: %v.", err)
	}
	for name, values := range q {
		if !slices.Contains(known, name) {
			return nil, badRequest("There is no parameter %s here; there are: %s.", name, cmp.Or(strings.Join(known, ", "), "none"))
		}
		if len(values) > 1 && name != "label" {
			return nil, badRequest("%s is given %d times: give it once.", name, len(values))
		}
	}
	return q, nil
}

func number(q url.Values, name string, fallback, least, most int) (int, error) {
	text := q.Get(name)
	if text == "" {
		return fallback, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		return 0, badRequest("%s=%s is not a number from %d to %d.", name, text, least, most)
	}
	return n, nil
}

// strict reads a body that is one JSON object with fields that are known, or nothing. All that
// is asked for is in there: parameters there are none.
func strict(r *http.Request, into any) error {
	if _, err := query(r); err != nil {
		return err
	}
	data, err := read(r)
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(data)) == 0 {
		data = []byte("{}")
	}
	if err := control.Decode(data, into); err != nil {
		return badRequest("The request body %v.", err)
	}
	return nil
}
