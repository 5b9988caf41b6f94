package openstack

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// answer is what a service says when it does not do what it was asked for.
type answer struct {
	service, call string
	status        int
	text, advice  string
	retryAfter    time.Duration
}

func (a *answer) Error() string {
	text := fmt.Sprintf("%s answers %s with %s", a.service, a.call, a.text)
	if a.advice != "" {
		text += "; " + a.advice
	}
	return text
}

// Is gives the answer a class of error. What a 404 or a conflict means, the caller
// knows better.
func (a *answer) Is(target error) bool {
	switch a.status {
	case http.StatusBadRequest:
		return target == backends.ErrInvalid
	case http.StatusNotFound:
		return target == backends.ErrNotFound
	}
	return target == backends.ErrUnavailable
}

// throttled says that the call was refused only for coming too soon. Cinder says also
// that a quota is exceeded with 413.
func (a *answer) throttled() bool {
	return a.status == http.StatusTooManyRequests || a.status == http.StatusRequestEntityTooLarge && !strings.Contains(strings.ToLower(a.text), "quota")
}

// is says that err is an answer with one of these codes.
func is(err error, codes ...int) bool {
	a, ok := errors.AsType[*answer](err)
	return ok && slices.Contains(codes, a.status)
}

// says says that err is an answer with a text.
func says(err error, text string) bool {
	a, ok := errors.AsType[*answer](err)
	return ok && strings.Contains(strings.ToLower(a.text), strings.ToLower(text))
}

// unanswered says that nobody knows whether the call has had, or will have, an effect.
func unanswered(err error) bool {
	if _, before := errors.AsType[*loginFailed](err); before {
		return false
	}
	a, ok := errors.AsType[*answer](err)
	return err != nil && (!ok || a.status >= 500)
}

// service is one of OpenStack's.
type service int

const (
	volumes service = iota
	compute
)

func (s service) String() string { return [...]string{"Cinder", "Nova"}[s] }

// request is a call.
type request struct {
	to         service
	method     string
	path       string
	body       any
	into       any
	newer      string // a version of Nova's API, where the first does not do
	throttling time.Duration
}

func (r request) String() string {
	path, _, _ := strings.Cut(r.path, "?")
	return r.method + " " + path
}

// send makes a call once, and again only if it was refused for the rate of calls, or for
// a token that had expired again.
func (b *cinder) send(ctx context.Context, r request) error {
	err := b.once(ctx, r)
	if is(err, http.StatusUnauthorized) {
		err = b.once(ctx, r)
	}
	for wait := b.pace.First; ; wait = min(2*wait, b.pace.Most) {
		a, ok := errors.AsType[*answer](err)
		if !ok || !a.throttled() || r.throttling > 4*b.pace.Most {
			return err
		}
		pause := wait/2 + rand.N(wait)
		if a.retryAfter > 0 {
			pause = min(a.retryAfter, 2*b.pace.Most) + rand.N(wait)
		}
		r.throttling += pause
		if poll.Sleep(ctx, pause) != nil {
			return err
		}
		err = b.once(ctx, r)
	}
}

// get asks, and asks again while there is no answer.
func (b *cinder) get(ctx context.Context, to service, path string, into any) error {
	return b.insist(ctx, request{to: to, method: http.MethodGet, path: path, into: into})
}

// insist makes a call again while there is no answer. It is for those that may be
// carried out more than once, and late.
func (b *cinder) insist(ctx context.Context, r request) error {
	for try, wait := 0, b.pace.First; ; try, wait = try+1, min(2*wait, b.pace.Most) {
		err := b.send(ctx, r)
		if !unanswered(err) || try == 3 || ctx.Err() != nil {
			return err
		}
		if poll.Sleep(ctx, wait/2+rand.N(wait)) != nil {
			return err
		}
	}
}

func (b *cinder) once(ctx context.Context, r request) error {
	c, err := b.connect(ctx)
	if err != nil {
		return err
	}
	client := c.volume
	if r.to == compute {
		client = c.compute
	}
	opts := &gophercloud.RequestOpts{
		OkCodes: []int{http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNoContent},
	}
	if r.body != nil {
		opts.JSONBody = r.body
	}
	if r.into != nil {
		opts.JSONResponse = r.into
	}
	if r.newer != "" {
		opts.MoreHeaders = map[string]string{"X-OpenStack-Nova-API-Version": r.newer}
	}
	_, err = client.Request(ctx, r.method, client.ServiceURL()+r.path, opts) //nolint:bodyclose // Request has closed it
	if err == nil {
		return nil
	}
	if ctx.Err() != nil { // in one of many wordings
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s has not answered %s in time: %w", r.to, r, context.Cause(ctx)))
	}
	if _, again := errors.AsType[*gophercloud.ErrUnableToReauthenticate](err); again {
		b.forget(c)
		return &loginFailed{fmt.Errorf("%s says that the login has expired, and %s does not renew it: check the credentials; "+
			"the files are read again: %w", r.to, b.cfg.keystone(), backends.ErrUnavailable)}
	}
	code, ok := errors.AsType[gophercloud.ErrUnexpectedResponseCode](err)
	if !ok {
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s does not answer %s: %w", r.to, r, bare(err)))
	}
	if code.Actual == http.StatusUnauthorized {
		b.forget(c)
	}
	return &answer{r.to.String(), r.String(), code.Actual, said(code), advice(r.to, code), retryAfter(code.ResponseHeader)}
}

// bare is an error of HTTP without its URL, which says nothing new.
func bare(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// said is what a service's answer says, in one line.
func said(code gophercloud.ErrUnexpectedResponseCode, secrets ...string) string {
	text := ""
	var body map[string]json.RawMessage
	if json.Unmarshal(code.Body, &body) == nil {
		for _, kind := range body {
			var fault struct {
				Message string `json:"message"`
			}
			if json.Unmarshal(kind, &fault) == nil && fault.Message != "" {
				text = fault.Message
			}
		}
	}
	for _, secret := range secrets {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "***")
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	if most := 300; len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	if text == "" {
		return fmt.Sprintf("%d %s", code.Actual, http.StatusText(code.Actual))
	}
	return fmt.Sprintf("%d %q", code.Actual, strings.TrimSuffix(text, "."))
}

func advice(to service, code gophercloud.ErrUnexpectedResponseCode) string {
	switch code.Actual {
	case http.StatusUnauthorized:
		return "check the credentials, and the clocks"
	case http.StatusForbidden:
		return "the user of Flocker needs a role that may do this, usually member of the project"
	case http.StatusNotAcceptable:
		return fmt.Sprintf("this Cinder is older than API version %s, which is needed (Queens, of 2018)", volumeVersion)
	case http.StatusRequestEntityTooLarge:
		if strings.Contains(strings.ToLower(said(code)), "quota") {
			return "remove volumes, or ask for a larger quota of volumes or gigabytes"
		}
		return "it grants fewer calls; it is tried again"
	case http.StatusTooManyRequests:
		return "it grants fewer calls; it is tried again"
	}
	if code.Actual >= 500 {
		return to.String() + " itself has failed; it is tried again"
	}
	return ""
}

func retryAfter(h http.Header) time.Duration {
	seconds, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// The keys of a volume's metadata.
const (
	keyCluster    = "flocker_cluster"
	keyDataset    = "flocker_dataset"
	keyMaker      = "flocker_maker" // the process that has made it
	keyReady      = "flocker_ready"
	keyAttached   = "flocker_attached_"   // and <server>_<token>; its value is the node
	keyAttachment = "flocker_attachment_" // and the attachment's id; its value is "<token> <node>"
	keyClient     = "flocker_client_"     // and <attachment>_<address in hex>; its value is "<token> <address> <image> <node>"
	keyCut        = "flocker_cut_"        // and <token>_<node>: the node gets the volume no more up to the token
)

// volume is a volume as Cinder shows it.
type volume struct {
	backends.Volume
	id, status string
	maker      string
	multi      bool
	ready      bool
	tokens     map[string]holder // by server: the youngest; or by attachment
	keys       []tokenKey
	clients    []client
	cuts       []tokenKey

	attachments json.RawMessage // of version 1, see on
}

// client is a client of the storage below Cinder, by which that is told to cut it off.
type client struct {
	holder

	key, attachment string
	address, image  string
}

func (c client) text() string { return fmt.Sprintf("%d %s %s %s", c.token, c.address, c.image, c.node) }

// parseClient makes sense of a key. Whatever it says, there is a client.
func parseClient(key, value string) client {
	c := client{key: key}
	c.attachment, _, _ = strings.Cut(strings.TrimPrefix(key, keyClient), "_")
	if parts := strings.SplitN(value, " ", 4); len(parts) == 4 {
		token, err := strconv.ParseInt(parts[0], 10, 64)
		if err == nil {
			c.token, c.address, c.image, c.node = token, parts[1], parts[2], parts[3]
		}
	}
	return c
}

// of returns the clients of an attachment.
func (v *volume) of(attachment string) (found []client) {
	for _, c := range v.clients {
		if c.attachment == attachment {
			found = append(found, c)
		}
	}
	return found
}

// cutOff is an error if a node was cut off from the volume under a token.
func (v *volume) cutOff(node string, token int64) error {
	for _, cut := range v.cuts {
		if cut.node == node && cut.token >= token {
			return fmt.Errorf("this host was cut off from volume %s under ownership token %d, and this one is %d: %w", v.id, cut.token, token, backends.ErrInUse)
		}
	}
	return nil
}

type holder struct {
	node  string
	token int64
}

// tokenKey is a key of metadata that has a token.
type tokenKey struct {
	key, of string // the server or the attachment
	holder
}

type volumeJSON struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Size     int64             `json:"size"`
	Status   string            `json:"status"`
	Multi    bool              `json:"multiattach"`
	Metadata map[string]string `json:"metadata"`

	NameV1      string          `json:"display_name"`
	Attachments json.RawMessage `json:"attachments"`
}

func (j volumeJSON) volume() *volume {
	v := &volume{id: j.ID, status: strings.ToLower(j.Status), maker: j.Metadata[keyMaker], multi: j.Multi, ready: j.Metadata[keyReady] != "", tokens: map[string]holder{}}
	v.Volume = backends.Volume{Ref: j.ID, ID: j.Metadata[keyDataset], Cluster: j.Metadata[keyCluster], Name: cmp.Or(j.Name, j.NameV1), Size: j.Size * gib}
	v.attachments = j.Attachments
	for key, value := range j.Metadata {
		t := tokenKey{key: key}
		var number string
		if rest, ok := strings.CutPrefix(key, keyAttached); ok {
			t.of, number, _ = strings.Cut(rest, "_")
			t.node = value
		} else if rest, ok := strings.CutPrefix(key, keyAttachment); ok {
			number, t.node, _ = strings.Cut(value, " ")
			t.of = rest
		} else if rest, ok := strings.CutPrefix(key, keyCut); ok {
			number, t.node, _ = strings.Cut(rest, "_")
		} else if strings.HasPrefix(key, keyClient) {
			v.clients = append(v.clients, parseClient(key, value))
			continue
		}
		var err error
		if t.token, err = strconv.ParseInt(number, 10, 64); err != nil {
			continue
		}
		if strings.HasPrefix(key, keyCut) {
			v.cuts = append(v.cuts, t)
			continue
		}
		v.keys = append(v.keys, t)
		if have, ok := v.tokens[t.of]; !ok || have.token < t.token {
			v.tokens[t.of] = t.holder
		}
	}
	return v
}

// gone says that a volume is there no more, although Cinder still shows it.
func (v *volume) gone() bool { return v.status == "deleting" }

// broken is an error if only an administrator can get the volume out of its state.
func (v *volume) broken() error {
	if !strings.HasPrefix(v.status, "error") && v.status != "maintenance" {
		return nil
	}
	return fmt.Errorf("volume %s is in Cinder's state %q, out of which an administrator has to get it (openstack volume set --state): %w",
		v.id, v.status, backends.ErrUnavailable)
}

// attachedError says who has the volume.
func (v *volume) attachedError(of string) *backends.AttachedError {
	h := v.tokens[of]
	return &backends.AttachedError{Volume: v.ID, Node: h.node, Token: h.token}
}

// attachment is one of Cinder's.
type attachment struct {
	ID       string         `json:"id"`
	Status   string         `json:"status"`
	Instance string         `json:"instance"`
	Info     map[string]any `json:"connection_info"`

	hidden bool // it is not said whose it is: see v1.go
}

// look returns a volume; nil if Cinder says that there is none.
func (b *cinder) look(ctx context.Context, id string) (*volume, error) {
	var got struct {
		Volume volumeJSON `json:"volume"`
	}
	err := b.get(ctx, volumes, "volumes/"+id, &got)
	if is(err, http.StatusNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if got.Volume.ID != id {
		return nil, fmt.Errorf("%s was asked for volume %s and answers with %q: %w", volumes, id, got.Volume.ID, backends.ErrUnavailable)
	}
	return got.Volume.volume(), nil
}

// find returns a volume of this cluster, by its reference.
func (b *cinder) find(ctx context.Context, ref string) (*volume, error) {
	if !uuidForm.MatchString(ref) {
		return nil, fmt.Errorf("%q is no reference to a Cinder volume: %w", ref, backends.ErrInvalid)
	}
	v, err := b.look(ctx, ref)
	if err != nil {
		return nil, err
	}
	if v == nil || v.gone() || v.Cluster != b.self.Cluster || v.ID == "" {
		return nil, fmt.Errorf("%s has no volume %s of this cluster; it was deleted, or is another project's: %w", volumes, ref, backends.ErrNotFound)
	}
	return v, nil
}

// attached returns what attachments a volume has, of any kind and in any state. Cinder
// shows those under way only here.
func (b *cinder) attached(ctx context.Context, id string) ([]attachment, error) {
	if b.cfg.rackspace() {
		return b.attachedV1(ctx, id)
	}
	var got struct {
		Attachments []attachment `json:"attachments"`
	}
	if err := b.get(ctx, volumes, "attachments?volume_id="+id, &got); err != nil {
		return nil, err
	}
	var atts []attachment
	for _, a := range got.Attachments {
		if a.Status != "detached" && a.Status != "deleted" {
			atts = append(atts, a)
		}
	}
	return atts, nil
}

// list returns all volumes that have this in their metadata, or an error.
func (b *cinder) list(ctx context.Context, key, value string) ([]*volume, error) {
	if b.cfg.rackspace() {
		return b.listV1(ctx, key, value)
	}
	for range 5 {
		all, err := b.pages(ctx, key, value)
		if !is(err, http.StatusNotFound) {
			return all, err
		}
		// The last volume of a page was deleted before the next was asked for.
	}
	return nil, fmt.Errorf("%s's list of volumes changes too fast to be read: %w", volumes, backends.ErrUnavailable)
}

func (b *cinder) pages(ctx context.Context, key, value string) ([]*volume, error) {
	var all []*volume
	query := url.Values{"limit": {"500"}, "sort": {"id:asc"}, "metadata": {fmt.Sprintf("{'%s':'%s'}", key, value)}}
	for {
		var got struct {
			Volumes []volumeJSON `json:"volumes"`
			Links   []struct {
				Rel string `json:"rel"`
			} `json:"volumes_links"`
		}
		if err := b.get(ctx, volumes, "volumes/detail?"+query.Encode(), &got); err != nil {
			return nil, err
		}
		for _, j := range got.Volumes {
			if j.Metadata[key] == value { // a Cinder may be told not to filter
				all = append(all, j.volume())
			}
		}
		more := false
		for _, l := range got.Links {
			more = more || l.Rel == "next"
		}
		if !more || len(got.Volumes) == 0 {
			return all, nil
		}
		last := got.Volumes[len(got.Volumes)-1].ID
		if last == query.Get("marker") {
			return nil, fmt.Errorf("%s lists the same page of volumes again and again: %w", volumes, backends.ErrUnavailable)
		}
		query.Set("marker", last)
	}
}

// note adds to a volume's metadata, and leaves the rest as it is.
func (b *cinder) note(ctx context.Context, id, key, value string) error {
	return b.insist(ctx, request{
		to: volumes, method: http.MethodPost, path: "volumes/" + id + "/metadata",
		body: map[string]any{"metadata": map[string]string{key: value}},
	})
}

// unnote removes a key of a volume's metadata.
func (b *cinder) unnote(ctx context.Context, id, key string) error {
	err := b.insist(ctx, request{to: volumes, method: http.MethodDelete, path: "volumes/" + id + "/metadata/" + url.PathEscape(key)})
	if is(err, http.StatusNotFound) {
		return nil
	}
	return err
}
