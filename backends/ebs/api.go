package ebs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	"golang.org/x/time/rate"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// conn is EC2 as this instance sees it.
type conn struct {
	ec2                    calls
	retryer                retryer
	batch                  batch
	region, zone, instance string
	// refused says that EC2 does not take the credentials, which are read anew then.
	refused *atomic.Bool
	// urgent is the same for a fence, which is not to wait for what others of this host call.
	urgent *conn
}

// connect finds out who and where this instance is, once as long as EC2 takes its
// credentials.
func (b *Backend) connect(ctx context.Context) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	b.mu.Lock()
	c := b.conn
	b.mu.Unlock()
	if c != nil && !c.refused.Load() {
		return c, nil
	}
	load := []func(*config.LoadOptions) error{config.WithRegion(b.cfg.Region), config.WithLogger(logging.Nop{})}
	if b.cfg.CredentialsFile != "" {
		load = append(load, config.WithSharedCredentialsFiles([]string{b.cfg.CredentialsFile}), config.WithSharedConfigFiles(nil),
			config.WithSharedConfigProfile(or(b.cfg.CredentialsProfile, "default")))
	} else if b.cfg.CredentialsProfile != "" {
		load = append(load, config.WithSharedConfigProfile(b.cfg.CredentialsProfile))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, fmt.Errorf("the AWS settings of this host cannot be read: %w", err))
	}
	c = &conn{region: or(b.cfg.Region, cfg.Region), zone: b.cfg.Zone, instance: b.cfg.InstanceID, refused: new(atomic.Bool)}
	if c.zone == "" || c.instance == "" || c.region == "" {
		if err := c.askInstance(ctx, cfg); err != nil {
			return nil, err
		}
	}
	cfg.Region = c.region
	c.urgent = &conn{region: c.region, zone: c.zone, instance: c.instance, refused: c.refused}
	limiter := rate.NewLimiter(rate.Limit(b.cfg.CallsPerSecond), int(8*b.cfg.CallsPerSecond))
	for _, to := range []*conn{c, c.urgent} {
		urgent := to == c.urgent
		to.batch.slots = make(chan struct{}, 2)
		to.retryer = retryer{AdaptiveMode: retry.NewAdaptiveMode(func(o *retry.AdaptiveModeOptions) {
			o.StandardOptions = append(o.StandardOptions, func(o *retry.StandardOptions) {
				o.MaxAttempts, o.RateLimiter, o.Backoff = mostThrottled, ratelimit.None, b.pace.backoff(urgent)
			})
		}), urgent: urgent}
		to.ec2 = callsOf(ec2.NewFromConfig(cfg, func(o *ec2.Options) {
			if b.cfg.Endpoint != "" {
				o.BaseEndpoint = &b.cfg.Endpoint
			}
			o.HTTPClient, o.Retryer = &limited{httpClient(b.pace.call), limiter, urgent}, to.retryer
		}))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil || b.conn.refused.Load() {
		b.conn = c
	}
	return b.conn, nil
}

// calls are what is used of EC2. If the SDK's client itself were kept in a struct, or
// given to its paginators, the linker would keep each of its hundreds of calls, which
// are as large as everything else together.
type calls struct {
	AttachVolume          call[ec2.AttachVolumeInput, ec2.AttachVolumeOutput]
	CreateTags            call[ec2.CreateTagsInput, ec2.CreateTagsOutput]
	CreateVolume          call[ec2.CreateVolumeInput, ec2.CreateVolumeOutput]
	DeleteTags            call[ec2.DeleteTagsInput, ec2.DeleteTagsOutput]
	DeleteVolume          call[ec2.DeleteVolumeInput, ec2.DeleteVolumeOutput]
	DescribeInstanceTypes call[ec2.DescribeInstanceTypesInput, ec2.DescribeInstanceTypesOutput]
	DescribeInstances     call[ec2.DescribeInstancesInput, ec2.DescribeInstancesOutput]
	DescribeVolumes       call[ec2.DescribeVolumesInput, ec2.DescribeVolumesOutput]
	DetachVolume          call[ec2.DetachVolumeInput, ec2.DetachVolumeOutput]
	StopInstances         call[ec2.StopInstancesInput, ec2.StopInstancesOutput]
}

type call[Q, R any] func(ctx context.Context, in *Q, options ...func(*ec2.Options)) (*R, error)

func callsOf(c *ec2.Client) calls {
	return calls{
		AttachVolume:          c.AttachVolume,
		CreateTags:            c.CreateTags,
		CreateVolume:          c.CreateVolume,
		DeleteTags:            c.DeleteTags,
		DeleteVolume:          c.DeleteVolume,
		DescribeInstanceTypes: c.DescribeInstanceTypes,
		DescribeInstances:     c.DescribeInstances,
		DescribeVolumes:       c.DescribeVolumes,
		DetachVolume:          c.DetachVolume,
		StopInstances:         c.StopInstances,
	}
}

// askInstance asks the instance's metadata service, by its second version only.
func (c *conn) askInstance(ctx context.Context, cfg aws.Config) error {
	bounded, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	doc, err := imds.NewFromConfig(cfg, func(o *imds.Options) { o.EnableFallback = aws.FalseTernary }).
		GetInstanceIdentityDocument(bounded, &imds.GetInstanceIdentityDocumentInput{})
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("the instance's metadata service does not say who this host is: %w; "+
			"on a host that is no EC2 instance set region, zone and instance_id", err))
	}
	c.region, c.zone, c.instance = or(c.region, doc.Region), or(c.zone, doc.AvailabilityZone), or(c.instance, doc.InstanceID)
	return nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// httpClient leaves nothing behind in this host's kernel: what was not sent when a
// call is given up never is.
func httpClient(limit time.Duration) aws.HTTPClient {
	return awshttp.NewBuildableClient().WithTimeout(limit).WithTransportOptions(func(tr *http.Transport) {
		dial := tr.DialContext
		tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dial(ctx, network, addr)
			if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
				err = tcp.SetLinger(0)
			}
			return conn, err
		}
	})
}

// limited keeps this host's calls within what EC2 grants, as being throttled costs
// the whole account.
type limited struct {
	aws.HTTPClient
	limiter *rate.Limiter
	urgent  bool
}

func (l *limited) Do(r *http.Request) (*http.Response, error) {
	if l.urgent {
		l.limiter.Reserve() // those that come later wait longer
	} else if err := l.limiter.Wait(r.Context()); err != nil {
		if r.Context().Err() != nil {
			return nil, context.Cause(r.Context())
		}
		return nil, fmt.Errorf("too many calls of this host are waiting (calls_per_second): %w", err)
	}
	return l.HTTPClient.Do(r)
}

// How often a call is sent that fails, and one that EC2 throttles: its bucket is one for all
// hosts, and each of a crowd finds it empty many times, although it calls less often then.
const mostFailed, mostThrottled = 8, 40

// retryer is the SDK's, which calls less often when EC2 throttles, and slowly more often again.
type retryer struct {
	*retry.AdaptiveMode
	urgent, once bool
}

func (r retryer) GetAttemptToken(ctx context.Context) (func(error) error, error) {
	if r.urgent {
		return func(error) error { return nil }, nil
	}
	return r.AdaptiveMode.GetAttemptToken(ctx)
}

func (r retryer) IsErrorRetryable(err error) bool {
	return r.AdaptiveMode.IsErrorRetryable(err) && (!r.once || throttled(err))
}

func (r retryer) RetryDelay(attempt int, err error) (time.Duration, error) {
	if attempt >= mostFailed && !throttled(err) {
		return 0, err
	}
	return r.AdaptiveMode.RetryDelay(attempt, err)
}

// once is for calls that must not be repeated while an earlier one may still be on
// its way: only what EC2 has refused for the rate of calls is sent again.
func (c *conn) once(o *ec2.Options) {
	r := c.retryer
	r.once = true
	o.Retryer = r
}

// backoff is how long a call waits before it is sent again. An urgent one takes the first
// token of the bucket that it gets.
func (p pace) backoff(urgent bool) retry.BackoffDelayerFunc {
	return func(attempt int, _ error) (time.Duration, error) {
		if urgent {
			attempt = 1
		}
		return poll.Jitter(min(p.First<<min(attempt+1, 20), p.Most)), nil
	}
}

// volume is a volume as EC2 shows it.
type volume struct {
	backends.Volume
	id, zone string
	state    types.VolumeState
	multi    bool
	attached []attached
	tokens   map[string]holder // by instance: the youngest
	tags     []attachTag
}

type attached struct {
	instance, device string
	state            types.VolumeAttachmentState
}

type holder struct {
	node  string
	token int64
}

type attachTag struct {
	key, instance string
	holder
}

func (c *conn) volume(v types.Volume) *volume {
	is := &volume{id: aws.ToString(v.VolumeId), zone: aws.ToString(v.AvailabilityZone), state: v.State, tokens: map[string]holder{}}
	is.Ref, is.Size, is.multi = c.region+"/"+is.id, int64(aws.ToInt32(v.Size))*gib, aws.ToBool(v.MultiAttachEnabled)
	for _, t := range v.Tags {
		value := aws.ToString(t.Value)
		switch key := aws.ToString(t.Key); key {
		case tagCluster:
			is.Cluster = value
		case tagDataset:
			is.ID = value
		case tagName:
			is.Name = value
		default:
			rest, ok := strings.CutPrefix(key, tagAttached)
			instance, number, _ := strings.Cut(rest, ":")
			token, err := strconv.ParseInt(number, 10, 64)
			if !ok || err != nil {
				continue
			}
			is.tags = append(is.tags, attachTag{key, instance, holder{value, token}})
			if have, ok := is.tokens[instance]; !ok || have.token < token {
				is.tokens[instance] = holder{value, token}
			}
		}
	}
	for _, a := range v.Attachments {
		if a.State != types.VolumeAttachmentStateDetached {
			is.attached = append(is.attached, attached{aws.ToString(a.InstanceId), aws.ToString(a.Device), a.State})
		}
	}
	return is
}

// gone says that a volume is there no more, although EC2 still shows it.
func (v *volume) gone() bool {
	return v.state == types.VolumeStateDeleting || v.state == types.VolumeStateDeleted
}

// on returns the attachment to an instance.
func (v *volume) on(instance string) (attached, bool) {
	for _, a := range v.attached {
		if a.instance == instance {
			return a, true
		}
	}
	return attached{}, false
}

// attachedError says who has the volume.
func (v *volume) attachedError(instance string) *backends.AttachedError {
	h := v.tokens[instance]
	return &backends.AttachedError{Volume: v.ID, Node: h.node, Token: h.token}
}

func tag(key, value string) types.Tag { return types.Tag{Key: &key, Value: &value} }

func filter(name string, values ...string) types.Filter {
	return types.Filter{Name: &name, Values: values}
}

// list returns all volumes that fit, or an error.
func (b *Backend) list(ctx context.Context, c *conn, filters ...types.Filter) ([]*volume, error) {
	var all []*volume
	for in := (&ec2.DescribeVolumesInput{Filters: filters, MaxResults: aws.Int32(500)}); ; {
		page, err := c.ec2.DescribeVolumes(ctx, in)
		if err != nil {
			return nil, c.explain(ctx, err, "DescribeVolumes")
		}
		for _, v := range page.Volumes {
			all = append(all, c.volume(v))
		}
		if in.NextToken = page.NextToken; aws.ToString(in.NextToken) == "" {
			return all, nil
		}
	}
}

// batch makes one call of the looks at volumes that come at the same time.
type batch struct {
	mu    sync.Mutex
	next  *looks
	slots chan struct{} // for calls: while they are taken, looks gather
}

type looks struct {
	ids  map[string]bool
	done chan struct{}
	got  map[string]*volume
	err  error

	waiting int // guarded by batch.mu
	cancel  context.CancelFunc
}

// mostValues is how many EC2 takes in a filter.
const mostValues = 200

// look returns a volume, or nil if EC2 does not show it.
func (b *Backend) look(ctx context.Context, c *conn, id string) (*volume, error) {
	batch := &c.batch
	batch.mu.Lock()
	l := batch.next
	if l == nil || len(l.ids) == mostValues {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		l = &looks{ids: map[string]bool{}, done: make(chan struct{}), cancel: cancel}
		batch.next = l
		go b.ask(bounded, c, l)
	}
	l.ids[id] = true
	l.waiting++
	batch.mu.Unlock()
	defer func() {
		batch.mu.Lock()
		defer batch.mu.Unlock()
		if l.waiting--; l.waiting == 0 {
			if batch.next == l {
				batch.next = nil
			}
			l.cancel()
		}
	}()
	select {
	case <-l.done:
		return l.got[id], l.err
	case <-ctx.Done():
		return nil, c.explain(ctx, context.Cause(ctx), "DescribeVolumes")
	}
}

func (b *Backend) ask(ctx context.Context, c *conn, l *looks) {
	batch := &c.batch
	defer close(l.done)
	if l.err = poll.Sleep(ctx, b.pace.window); l.err != nil {
		return
	}
	select {
	case batch.slots <- struct{}{}:
		defer func() { <-batch.slots }()
	case <-ctx.Done():
		l.err = backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
		return
	}
	batch.mu.Lock()
	if batch.next == l {
		batch.next = nil
	}
	var ids []string
	for id := range l.ids {
		ids = append(ids, id)
	}
	batch.mu.Unlock()
	vols, err := b.list(ctx, c, filter("volume-id", ids...))
	l.got, l.err = map[string]*volume{}, err
	for _, v := range vols {
		l.got[v.id] = v
	}
}

// code returns EC2's code of an error; empty if it is none of EC2's.
func code(err error) string {
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		return api.ErrorCode()
	}
	return ""
}

func is(err error, codes ...string) bool { return err != nil && slices.Contains(codes, code(err)) }

func throttled(err error) bool {
	_, ok := retry.DefaultThrottleErrorCodes[code(err)]
	return ok
}

// unanswered says that a call may have been carried out, or may be yet: EC2 has not
// said no.
func unanswered(err error) bool {
	if err == nil || throttled(err) {
		return false
	}
	resp, ok := errors.AsType[*awshttp.ResponseError](err)
	return !ok || resp.HTTPStatusCode() >= 500 || code(err) == ""
}

// advice is what to do about EC2's errors, and their class.
var advice = map[string]struct {
	class error
	text  string
}{
	"AuthFailure":                          {backends.ErrUnavailable, "EC2 does not know these credentials: check credentials_file, or the role of this instance"},
	"InvalidClientTokenId":                 {backends.ErrUnavailable, "EC2 does not know these credentials: check credentials_file, or the role of this instance"},
	"UnrecognizedClientException":          {backends.ErrUnavailable, "EC2 does not know these credentials: check credentials_file, or the role of this instance"},
	"SignatureDoesNotMatch":                {backends.ErrUnavailable, "the secret key is wrong, or this host's clock is"},
	"RequestExpired":                       {backends.ErrUnavailable, "the credentials have expired, or this host's clock is wrong; credentials of the instance's role are renewed by themselves"},
	"ExpiredToken":                         {backends.ErrUnavailable, "the session token has expired: renew credentials_file, or use the role of the instance, which renews itself"},
	"OptInRequired":                        {backends.ErrUnavailable, "the account is not enabled for this region"},
	"VolumeLimitExceeded":                  {backends.ErrUnavailable, "the account's quota of EBS volumes or of their size is used up: remove volumes, or ask AWS for more (Service Quotas, Amazon EBS)"},
	"MaxIOPSLimitExceeded":                 {backends.ErrUnavailable, "the account's quota of provisioned IOPS is used up: use another profile, or ask AWS for more (Service Quotas, Amazon EBS)"},
	"InsufficientVolumeCapacity":           {backends.ErrUnavailable, "the zone has no room for this type of volume: retry later, or use another volume_type"},
	"VolumeTypeNotAvailableInZone":         {backends.ErrInvalid, "the zone does not have this volume_type: use another"},
	"UnknownVolumeType":                    {backends.ErrInvalid, "use another volume_type"},
	"InvalidParameterCombination":          {backends.ErrInvalid, "check volume_type, iops and throughput"},
	"InvalidParameterValue":                {backends.ErrInvalid, "check volume_type, iops, throughput and the settings"},
	"InvalidZone.NotFound":                 {backends.ErrInvalid, "check the settings zone and region"},
	"InvalidVolume.ZoneMismatch":           {backends.ErrInvalid, "an EBS volume can only be attached in its own zone"},
	"TagLimitExceeded":                     {backends.ErrUnavailable, "the volume has 50 tags: remove some"},
	"RequestLimitExceeded":                 {backends.ErrUnavailable, "the account makes more calls than EC2 grants; it is retried"},
	"Throttling":                           {backends.ErrUnavailable, "the account makes more calls than EC2 grants; it is retried"},
	"Client.InvalidKmsKey.InvalidState":    {backends.ErrUnavailable, "enable the KMS key"},
	"InvalidInstanceID.NotFound":           {backends.ErrUnavailable, "this host's instance_id is not in this region: check the settings"},
	"InvalidVolume.NotFound":               {backends.ErrNotFound, "the volume was deleted"},
	"OperationNotPermitted":                {backends.ErrUnavailable, "EC2 does not allow it for this instance; see its protection settings"},
	"IncorrectInstanceState":               {backends.ErrUnavailable, "the instance is not running"},
	"ConcurrentTagAccess":                  {backends.ErrUnavailable, "retry"},
	"AttachmentLimitExceeded":              {backends.ErrUnavailable, "this instance has as many volumes as it can: stop containers here, or use a larger instance"},
	"UnsupportedOperation":                 {backends.ErrInvalid, "EC2 cannot do that with this volume or instance"},
	"InvalidVolume.NotEncryptedKmsMissing": {backends.ErrInvalid, "check kms_key_id"},
}

// credentialCodes are EC2's words for credentials that it does not take.
var credentialCodes = []string{"AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "ExpiredToken"}

// explain says in words what EC2's answer, or its silence, means.
func (c *conn) explain(ctx context.Context, err error, call string) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil { // in one of many wordings
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("EC2 in %s has not answered %s in time: %w", c.region, call, context.Cause(ctx)))
	}
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		text := "EC2 in %s does not answer %s: %w"
		if strings.Contains(err.Error(), "credentials") {
			text = "no AWS credentials for EC2 in %s (%s): give the instance a role, or set credentials_file: %w"
		}
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf(text, c.region, call, err))
	}
	if slices.Contains(credentialCodes, api.ErrorCode()) {
		c.refused.Store(true)
	}
	a, known := advice[api.ErrorCode()]
	switch {
	case api.ErrorCode() == notAllowed:
		a.class, a.text = backends.ErrUnavailable, "allow ec2:"+call+" to the role or user of this host"
	case !known:
		a.class = backends.ErrUnavailable
		a.text = "see the EC2 documentation of " + call
		if resp, ok := errors.AsType[*awshttp.ResponseError](err); ok && resp.HTTPStatusCode() >= 500 {
			a.text = "EC2 itself has failed; retry"
		}
	}
	return backends.Classify(a.class, fmt.Errorf("%s: EC2 in %s says %s (%s); %s", call, c.region, api.ErrorCode(), strings.TrimSuffix(api.ErrorMessage(), "."), a.text))
}
