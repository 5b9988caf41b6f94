package rest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// v1 is the original's API. docs/api.md says where it differs.
var v1 = []route{
	{http.MethodGet, "/v1/version", (*API).v1Version},
	{http.MethodGet, "/v1/configuration/datasets", (*API).v1Configuration},
	{http.MethodPost, "/v1/configuration/datasets", (*API).v1Create},
	{http.MethodPost, "/v1/configuration/datasets/{id}", (*API).v1Update},
	{http.MethodDelete, "/v1/configuration/datasets/{id}", (*API).v1Delete},
	{http.MethodGet, "/v1/state/datasets", (*API).v1State},
	{http.MethodGet, "/v1/configuration/leases", (*API).v1Leases},
	{http.MethodPost, "/v1/configuration/leases", (*API).v1Acquire},
	{http.MethodDelete, "/v1/configuration/leases/{id}", (*API).v1Release},
	{http.MethodGet, "/v1/state/nodes", (*API).v1Nodes},
	{http.MethodGet, "/v1/state/nodes/by_era/{era}", (*API).v1NodeByEra},
	{http.MethodGet, "/v1/configuration/containers", (*API).v1NoContainers},
	{http.MethodGet, "/v1/state/containers", (*API).v1NoContainers},
	{http.MethodPost, "/v1/configuration/containers", (*API).v1ContainersGone},
	{http.MethodPost, "/v1/configuration/containers/{name}", (*API).v1ContainersGone},
	{http.MethodDelete, "/v1/configuration/containers/{name}", (*API).v1ContainersGone},
	{http.MethodPost, "/v1/configuration/_compose", (*API).v1ContainersGone},
}

// The texts of the original.
const (
	idTaken      = "The provided dataset_id is already in use."
	notFound     = "Dataset not found."
	deletedText  = "The dataset has been deleted."
	notInCluster = "The provided primary node is not part of the cluster."
	leaseHeld    = "Lease already held."
	leaseUnknown = "Lease not found."
	eraUnknown   = "No node found with given era."
)

const (
	tagHeader   = "X-Configuration-Tag"
	matchHeader = "X-If-Configuration-Matches"
	nameKey     = "name"
	profileKey  = "clusterhq:flocker:profile"
	// maxLease is what a time.Duration can hold, and more than anybody needs.
	maxLease = 100 * 365 * 24 * time.Hour
)

// nowhere is the primary of a dataset that is to be at no node: clients expect one.
var nowhere = uuid.Nil.String()

// failure is the body of an error.
type failure struct {
	Description string   `json:"description"`
	Errors      []string `json:"errors,omitempty"`
}

// dataset is one in the configuration.
type dataset struct {
	ID          string            `json:"dataset_id"`
	Primary     string            `json:"primary"`
	Deleted     bool              `json:"deleted"`
	Metadata    map[string]string `json:"metadata"`
	MaximumSize int64             `json:"maximum_size,omitempty"`
}

// manifestation is a dataset in the state: with a primary where it is mounted.
type manifestation struct {
	ID          string `json:"dataset_id"`
	MaximumSize int64  `json:"maximum_size,omitempty"`
	Primary     string `json:"primary,omitempty"`
	Path        string `json:"path,omitempty"`
}

type lease struct {
	ID      string   `json:"dataset_id"`
	Node    string   `json:"node_uuid"`
	Expires *float64 `json:"expires"` // in so many seconds; nil: never
}

type node struct {
	ID   string `json:"uuid"`
	Host string `json:"host"`
}

func (a *API) v1Version(*http.Request) (answer, error) {
	return ok(map[string]string{"flocker": a.Version}), nil
}

// rendered is what v1 says of one State. It is made once, however many ask.
type rendered struct {
	of            *ownership.State
	configuration func() []byte
	tag           func() string
	state         func() []byte
}

// render is without I/O. A State that is not asked about costs nothing.
func (a *API) render(s *ownership.State) *rendered {
	old := a.rendered.Load()
	if old != nil && old.of == s {
		return old
	}
	r := &rendered{of: s}
	r.configuration = sync.OnceValue(func() []byte { return configurationOf(s) })
	r.state = sync.OnceValue(func() []byte { return stateOf(s) })
	r.tag = sync.OnceValue(func() string {
		sum := sha256.Sum256(r.configuration())
		return hex.EncodeToString(sum[:16])
	})
	if !a.rendered.CompareAndSwap(old, r) {
		if other := a.rendered.Load(); other.of == s {
			return other
		}
	}
	return r
}

func configurationOf(s *ownership.State) []byte {
	rows := make([]dataset, 0, len(s.Views)+len(s.Gone))
	for i := range s.Views {
		rows = append(rows, datasetOf(&s.Views[i]))
	}
	for i := range s.Gone {
		rows = append(rows, deletedOf(&s.Gone[i]))
	}
	// All hosts are to make the same tag of the same configuration.
	slices.SortFunc(rows, func(a, b dataset) int { return strings.Compare(a.ID, b.ID) })
	return control.Encode(rows)
}

func stateOf(s *ownership.State) []byte {
	rows := make([]manifestation, 0, len(s.Views))
	for i := range s.Views {
		v := &s.Views[i]
		if v.Volume.Phase == ownership.PhaseCreating || v.Volume.Phase == ownership.PhaseDeleting {
			continue // as the original: the agents have not made it yet, or have destroyed it
		}
		row := manifestation{ID: v.Volume.ID, MaximumSize: v.Volume.Size}
		if p := present(v); p != nil {
			row.Primary, row.Path = p.Node, p.Path
		}
		rows = append(rows, row)
	}
	return control.Encode(rows)
}

// datasetOf is what is wanted of a volume. Nobody may have said where it is to be; then
// that is where it is.
func datasetOf(v *ownership.View) dataset {
	d := dataset{
		ID: v.Volume.ID, Primary: nowhere, MaximumSize: v.Volume.Size,
		Deleted: v.Volume.Phase == ownership.PhaseDeleting, Metadata: metadataOf(v.Volume),
	}
	switch {
	case v.Placement != nil:
		d.Primary = v.Placement.Node
	case v.Owner != nil:
		d.Primary = v.Owner.Node
	}
	return d
}

func deletedOf(g *ownership.Gone) dataset {
	return dataset{
		ID: g.Volume.ID, Primary: cmp.Or(g.Node, nowhere), Deleted: true,
		Metadata: metadataOf(g.Volume), MaximumSize: g.Volume.Size,
	}
}

// metadataOf are a volume's labels, and its name if Docker or v2 gave it one.
func metadataOf(vol ownership.Volume) map[string]string {
	metadata := map[string]string{}
	maps.Copy(metadata, vol.Labels)
	if vol.Name != vol.ID {
		metadata[nameKey] = vol.Name
	}
	if vol.Profile != "" {
		metadata[profileKey] = vol.Profile
	}
	return metadata
}

func (a *API) v1Configuration(r *http.Request) (answer, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	all := a.render(s)
	header.Set(tagHeader, all.tag())
	return answer{status: http.StatusOK, body: all.configuration(), header: header}, nil
}

func (a *API) v1State(r *http.Request) (answer, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK, body: a.render(s).state(), header: header}, nil
}

// matching is the state that a change is made of. It refuses one that was asked for of
// another configuration than the present one.
func (a *API) matching(r *http.Request) (*ownership.State, error) {
	s, _, err := a.state(r.Context())
	if err != nil {
		return nil, err
	}
	wanted := r.Header.Values(matchHeader)
	if len(wanted) == 0 {
		return s, nil
	}
	tag := a.render(s).tag()
	if slices.Contains(wanted, tag) {
		return s, nil
	}
	return nil, &refusal{status: http.StatusPreconditionFailed, text: fmt.Sprintf("Tag doesn't match. Required: %s, current: %s", strings.Join(wanted, ", "), tag)}
}

func (a *API) v1Create(r *http.Request) (answer, error) {
	s, err := a.matching(r)
	if err != nil {
		return answer{}, err
	}
	var body struct {
		Primary     string            `json:"primary"`
		ID          string            `json:"dataset_id"`
		MaximumSize *int64            `json:"maximum_size"`
		Metadata    map[string]string `json:"metadata"`
		Deleted     bool              `json:"deleted"` // allowed, and without a meaning, as it was
	}
	if err := createSchema.decode(r, &body); err != nil {
		return answer{}, err
	}
	c := driver.CreateRequest{ID: strings.ToLower(body.ID), Labels: body.Metadata, Options: map[string]string{}, By: by(r.Context()), New: true}
	if c.ID == "" {
		c.ID = uuid.NewString()
	}
	if c.Name = body.Metadata[nameKey]; driver.ValidName(c.Name) != nil {
		c.Name = c.ID
	}
	if err := taken(s, c.Name, c.ID); err != nil {
		return answer{}, v1Taken(err)
	}
	primary := strings.ToLower(body.Primary)
	if err := mayGet(s, primary); err != nil {
		return answer{}, v1Node(err)
	}
	if body.MaximumSize != nil {
		c.Options["size"] = strconv.FormatInt(*body.MaximumSize, 10)
	}
	if profile := body.Metadata[profileKey]; profile != "" {
		c.Options["profile"] = profile
	}
	v, _, err := a.create(r.Context(), c, primary)
	if err != nil {
		return answer{}, v1Taken(err)
	}
	return answer{status: http.StatusCreated, body: datasetOf(v)}, nil
}

// v1Node is an error of a request that names a node, in the words of the original if it is
// about that.
func v1Node(err error) error {
	if is[*ownership.NoHostError](err) {
		return badRequest(notInCluster)
	}
	e, ok := errors.AsType[*ownership.NodeStateError](err)
	switch {
	case !ok:
		return err
	case e.Node.State == ownership.Cordoned:
		return badRequest("Host %s is cordoned: choose another node.", e.Node.Host)
	}
	return badRequest(notInCluster)
}

// v1Taken is an error of a create, in the words of the original if its name or id is taken.
func v1Taken(err error) error {
	e, ok := errors.AsType[*ownership.TakenError](err)
	switch {
	case !ok:
		return err
	case e.By == "", e.By == e.ID:
		return &refusal{status: http.StatusConflict, text: idTaken}
	}
	return &refusal{status: http.StatusConflict, text: fmt.Sprintf("The name %q is in use by dataset %s.", e.Name, e.By)}
}

// found is a dataset that is there, or the refusal for one that is not.
func found(s *ownership.State, r *http.Request) (*ownership.View, *ownership.Gone, error) {
	id := strings.ToLower(r.PathValue("id"))
	v, gone := byID(s, id), gone(s, id)
	if v == nil && gone == nil {
		return nil, nil, &refusal{status: http.StatusNotFound, text: notFound}
	}
	return v, gone, nil
}

func (a *API) v1Update(r *http.Request) (answer, error) {
	s, err := a.matching(r)
	if err != nil {
		return answer{}, err
	}
	var body struct {
		Primary string `json:"primary"`
	}
	if err := updateSchema.decode(r, &body); err != nil {
		return answer{}, err
	}
	v, _, err := found(s, r)
	if err != nil {
		return answer{}, err
	}
	if v == nil || v.Volume.Phase == ownership.PhaseDeleting {
		return answer{}, &refusal{status: http.StatusMethodNotAllowed, text: deletedText}
	}
	if body.Primary == "" {
		return ok(datasetOf(v)), nil
	}
	primary := strings.ToLower(body.Primary)
	if err := mayGet(s, primary); err != nil {
		return answer{}, v1Node(err)
	}
	placement, err := a.Driver.MoveVolume(r.Context(), v.Volume.Name, v.Volume.ID, primary, by(r.Context()))
	switch {
	case errors.Is(err, ownership.ErrNotFound):
		return answer{}, &refusal{status: http.StatusNotFound, text: notFound}
	case err != nil:
		return answer{}, v1Node(err)
	}
	a.seenRevision(r.Context(), placement.Revision)
	moved := *v
	moved.Placement = &placement
	return ok(datasetOf(&moved)), nil
}

func (a *API) v1Delete(r *http.Request) (answer, error) {
	s, err := a.matching(r)
	if err != nil {
		return answer{}, err
	}
	v, gone, err := found(s, r)
	switch {
	case err != nil:
		return answer{}, err
	case v == nil:
		return ok(deletedOf(gone)), nil
	}
	deleted := datasetOf(v)
	deleted.Deleted = true
	if v.Volume.Phase == ownership.PhaseDeleting {
		return ok(deleted), nil
	}
	// Not found: somebody was faster.
	if err := a.Driver.RemoveVolume(r.Context(), v.Volume.Name, v.Volume.ID); err != nil && !errors.Is(err, ownership.ErrNotFound) {
		return answer{}, err
	}
	a.seenGone(r.Context(), v.Volume.ID)
	return ok(deleted), nil
}

func (a *API) seenGone(ctx context.Context, id string) {
	a.seen(ctx, func(s *ownership.State) bool {
		v := byID(s, id)
		return v == nil || v.Volume.Phase == ownership.PhaseDeleting
	})
}

func (a *API) v1Leases(r *http.Request) (answer, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	rows := []lease{}
	for i := range s.Views {
		if l := s.Views[i].Lease; l != nil && (l.Expires == nil || time.Now().Before(*l.Expires)) {
			rows = append(rows, leaseOf(*l))
		}
	}
	return answer{status: http.StatusOK, body: rows, header: header}, nil
}

func leaseOf(l ownership.Lease) lease {
	row := lease{ID: l.Volume, Node: l.Node}
	if l.Expires != nil {
		left := max(0, math.Round(time.Until(*l.Expires).Seconds()*1000)/1000)
		row.Expires = &left
	}
	return row
}

func (a *API) v1Acquire(r *http.Request) (answer, error) {
	var body struct {
		ID      string      `json:"dataset_id"`
		Node    string      `json:"node_uuid"`
		Expires json.Number `json:"expires"`
	}
	if err := leaseSchema.decode(r, &body); err != nil {
		return answer{}, err
	}
	s, _, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	v := byID(s, strings.ToLower(body.ID))
	if v == nil || v.Volume.Phase == ownership.PhaseDeleting {
		return answer{}, &refusal{status: http.StatusNotFound, text: notFound}
	}
	if _, err := nodeOf(s, strings.ToLower(body.Node)); err != nil {
		return answer{}, v1Node(err)
	}
	var ttl *time.Duration
	if body.Expires != "" {
		seconds, _ := body.Expires.Float64() // the schema has seen to it
		ttl = new(time.Duration(seconds * float64(time.Second)))
	}
	l, created, err := a.Leases.Lease(r.Context(), v.Volume.ID, strings.ToLower(body.Node), ttl, by(r.Context()))
	switch {
	case is[*ownership.LeasedError](err):
		return answer{}, &refusal{status: http.StatusConflict, text: leaseHeld}
	case errors.Is(err, ownership.ErrNotFound):
		return answer{}, &refusal{status: http.StatusNotFound, text: notFound}
	case err != nil:
		return answer{}, v1Node(err)
	}
	a.seenRevision(r.Context(), l.Revision)
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	return answer{status: status, body: leaseOf(l)}, nil
}

func (a *API) v1Release(r *http.Request) (answer, error) {
	l, err := a.Leases.Unlease(r.Context(), strings.ToLower(r.PathValue("id")), by(r.Context()))
	switch {
	case errors.Is(err, ownership.ErrNoLease), errors.Is(err, ownership.ErrNotFound):
		return answer{}, &refusal{status: http.StatusNotFound, text: leaseUnknown}
	case err != nil:
		return answer{}, err
	}
	a.seen(r.Context(), func(s *ownership.State) bool {
		v := byID(s, l.Volume)
		return v == nil || v.Lease == nil || v.Lease.Revision != l.Revision
	})
	return ok(leaseOf(l)), nil
}

func (a *API) v1Nodes(r *http.Request) (answer, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	rows := []node{}
	for _, n := range s.Nodes {
		if n.Live && n.State != ownership.Removed {
			rows = append(rows, node{n.ID, cmp.Or(n.Address, n.Host)})
		}
	}
	return answer{status: http.StatusOK, body: rows, header: header}, nil
}

func (a *API) v1NodeByEra(r *http.Request) (answer, error) {
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	for _, n := range s.Nodes {
		if n.Live && n.State != ownership.Removed && strings.EqualFold(n.Boot, r.PathValue("era")) {
			return answer{status: http.StatusOK, body: map[string]string{"uuid": n.ID}, header: header}, nil
		}
	}
	return answer{}, &refusal{status: http.StatusNotFound, text: eraUnknown}
}

func (a *API) v1NoContainers(*http.Request) (answer, error) { return ok([]struct{}{}), nil }

func (a *API) v1ContainersGone(*http.Request) (answer, error) {
	return answer{}, &refusal{
		status: http.StatusGone,
		text:   "Flocker does not start containers any more: use docker run, Compose or Swarm with the volume driver flocker, and a dataset follows its container.",
	}
}
