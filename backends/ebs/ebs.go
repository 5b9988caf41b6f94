// Package ebs stores volumes in Amazon's Elastic Block Store.
//
// EBS lets one instance attach a volume at a time, and names an attachment by volume
// and instance alone. The ownership token of an attachment is a tag of the volume,
// flocker:attached:<instance>:<token>, written before the volume is attached: a key
// for each token, so that a write that arrives late changes none of another token.
// The youngest token of an instance is that of its attachment.
package ebs

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Config is what an operator sets. What is left out is asked of the instance's
// metadata service, or is the AWS SDK's default.
type Config struct {
	Region     string `yaml:"region"`
	Zone       string `yaml:"zone"`
	InstanceID string `yaml:"instance_id"`
	// Endpoint is the URL of EC2's API, where it is not Amazon's public one.
	Endpoint string `yaml:"endpoint"`
	// CredentialsFile is a file in the form of ~/.aws/credentials, and
	// CredentialsProfile a section of it. Without them it is the SDK's default chain,
	// which ends with the instance's role.
	CredentialsFile    string `yaml:"credentials_file"`
	CredentialsProfile string `yaml:"credentials_profile"`
	// Encrypted encrypts new volumes, with KMSKeyID or the account's default key.
	Encrypted bool   `yaml:"encrypted"`
	KMSKeyID  string `yaml:"kms_key_id"`
	// Default is what a volume is without a profile, Profiles what the names after
	// -o profile= mean, besides gold, silver and bronze.
	Default  Profile            `yaml:"default"`
	Profiles map[string]Profile `yaml:"profiles"`
	// KeepInstances makes Fence fail rather than stop an instance which does not let
	// go of a volume.
	KeepInstances bool `yaml:"keep_instances"`
	// LateCalls is how long after it was sent a call may take effect; 0 is a minute.
	LateCalls time.Duration `yaml:"late_calls"`
	// CallsPerSecond bounds this host's calls, after a burst of eight times as many; 0
	// is 10.
	CallsPerSecond float64 `yaml:"calls_per_second"`
}

// Self is the node a Backend serves.
type Self struct {
	Node    string // its id in the cluster
	Cluster string // the cluster's UUID; volumes of others are not seen
}

// Backend is the backend of one node.
type Backend struct {
	cfg    Config
	self   Self
	kernel kernel
	pace   pace

	mu    sync.Mutex // never held while anybody is asked
	conn  *conn
	lives map[string]known     // by a device's life
	calls int64                // how many calls may have changed what is attached here
	asked int64                // up to which of them EC2 was asked; -1 is never
	names map[string]bool      // device names of attaches under way
	stops map[string]time.Time // since when an instance was seen stopping
}

// pace is how long to wait; a test is faster.
type pace struct {
	poll.Pace // of looks at EC2

	lag    time.Duration // what EC2 may take to show what it has done
	window time.Duration // in which looks at volumes become one call
	settle time.Duration // for a volume to get into a state
	device time.Duration // for a device to appear
	grace  time.Duration // for a running instance to let go of a volume
	force  time.Duration // for an instance to stop by itself
	call   time.Duration // for one try of one call
}

var usual = pace{
	Pace: poll.Pace{First: 250 * time.Millisecond, Most: 5 * time.Second}, lag: 3 * time.Second, window: 10 * time.Millisecond,
	settle: time.Minute, device: 30 * time.Second, grace: 8 * time.Second, force: time.Minute,
	call: 10 * time.Second,
}

var (
	_ backends.Backend    = (*Backend)(nil)
	_ backends.Fencer     = (*Backend)(nil)
	_ backends.Identifier = (*Backend)(nil)
	_ backends.Permitted  = (*Backend)(nil)

	regionForm   = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]+$`)
	instanceForm = regexp.MustCompile(`^i-[0-9a-f]{8,17}$`)
	volumeForm   = regexp.MustCompile(`^vol-[0-9a-f]{8,17}$`)
)

// New returns the backend of one node. It asks nobody yet.
func New(cfg Config, self Self) (*Backend, error) {
	invalid := func(format string, args ...any) (*Backend, error) {
		return nil, fmt.Errorf("ebs: %s: %w", fmt.Sprintf(format, args...), backends.ErrInvalid)
	}
	switch {
	case self.Node == "" || self.Cluster == "":
		return invalid("the node and the cluster must be named")
	case cfg.Region != "" && !regionForm.MatchString(cfg.Region):
		return invalid("region %q is none; write it like eu-central-1", cfg.Region)
	case cfg.Zone != "" && cfg.Region != "" && !strings.HasPrefix(cfg.Zone, cfg.Region):
		return invalid("zone %q is not in region %s", cfg.Zone, cfg.Region)
	case cfg.InstanceID != "" && !instanceForm.MatchString(cfg.InstanceID):
		return invalid("instance_id %q is none; write it like i-0123456789abcdef0, or leave it out", cfg.InstanceID)
	case cfg.KMSKeyID != "" && !cfg.Encrypted:
		return invalid("kms_key_id without encrypted: true")
	case cfg.LateCalls < 0 || cfg.CallsPerSecond < 0 || cfg.CallsPerSecond > 0 && cfg.CallsPerSecond < 1:
		return invalid("late_calls must not be negative, and calls_per_second not below 1")
	}
	kinds := map[string]Profile{"default": cfg.Default}
	for name, p := range cfg.Profiles {
		kinds["profile "+name] = p
	}
	for name, p := range kinds {
		p.Type = cmp.Or(p.Type, "gp3")
		if _, err := p.fit(1024); err != nil { // of a size that every type has
			return nil, fmt.Errorf("ebs: %s: %w", name, err)
		}
	}
	cfg.LateCalls = cmp.Or(cfg.LateCalls, time.Minute)
	cfg.CallsPerSecond = cmp.Or(cfg.CallsPerSecond, 10)
	return &Backend{
		cfg: cfg, self: self, kernel: kernel{disk.Here()}, pace: usual, asked: -1,
		lives: map[string]known{}, names: map[string]bool{}, stops: map[string]time.Time{},
	}, nil
}

const gib = int64(1) << 30

// Properties implements backends.Backend.
func (b *Backend) Properties() backends.Properties {
	return backends.Properties{
		Name: "ebs", Class: backends.ClassExclusive, ExclusiveAttach: true,
		AllocationUnit: gib, MinSize: gib, MaxSize: 65536 * gib,
		LateCalls: b.cfg.LateCalls, FenceTime: 5 * time.Minute, // an instance that stops by force may take as long
		Options: backends.Options[options](), Profiles: b.cfg.names(),
	}
}

// Identity implements backends.Identifier: the id of this instance.
func (b *Backend) Identity(ctx context.Context) (string, error) {
	c, err := b.connect(ctx)
	if err != nil {
		return "", err
	}
	return c.instance, nil
}

// The tags of a volume.
const (
	tagCluster  = "flocker:cluster"
	tagDataset  = "flocker:dataset"
	tagName     = "Name"
	tagAttached = "flocker:attached:" // and <instance>:<token>; its value is the node
)

// id returns the EC2 id in a reference, which is <region>/<id>: in another region
// the same id would not be found, which proves nothing.
func (c *conn) id(ref string) (string, error) {
	region, id, ok := strings.Cut(ref, "/")
	switch {
	case !ok || !volumeForm.MatchString(id):
		return "", fmt.Errorf("%q is no reference to an EBS volume: %w", ref, backends.ErrInvalid)
	case region != c.region:
		return "", fmt.Errorf("volume %s is in region %s, and this host in %s: %w", id, region, c.region, backends.ErrInvalid)
	}
	return id, nil
}

// find returns a volume of this cluster. One that EC2 does not show is looked for
// again, as it may be new.
func (b *Backend) find(ctx context.Context, c *conn, id string) (*volume, error) {
	for started, wait := time.Now(), b.pace.First; ; wait *= 2 {
		v, err := b.look(ctx, c, id)
		if err != nil {
			return nil, err
		}
		switch {
		case v != nil && (v.gone() || v.Cluster != b.self.Cluster):
			return nil, fmt.Errorf("EC2 has no volume %s of this cluster in %s: %w", id, c.region, backends.ErrNotFound)
		case v != nil:
			return v, nil
		case time.Since(started) > b.pace.lag:
			return nil, fmt.Errorf("EC2 has no volume %s in %s; it was deleted, or is another account's: %w", id, c.region, backends.ErrNotFound)
		}
		if err := poll.Sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// Create implements backends.Backend.
func (b *Backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	v, err := b.create(ctx, req)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	return v.Volume, nil
}

func (b *Backend) create(ctx context.Context, req backends.CreateRequest) (*volume, error) {
	if req.ID == "" || req.Size <= 0 || req.Cluster != b.self.Cluster {
		return nil, fmt.Errorf("an id, a size and this cluster are needed: %w", backends.ErrInvalid)
	}
	size := (req.Size + gib - 1) / gib
	kind, err := b.cfg.kind(req.Profile, req.Options)
	if err != nil {
		return nil, err
	}
	if kind, err = kind.fit(size); err != nil {
		return nil, err
	}
	c, err := b.connect(ctx)
	if err != nil {
		return nil, err
	}
	mismatch := time.Time{}
	for attempt := 1; attempt <= 100; {
		// EC2 forgets its tokens after a time; the tags stay.
		have, err := b.list(ctx, c, filter("tag:"+tagCluster, b.self.Cluster), filter("tag:"+tagDataset, req.ID))
		if err != nil {
			return nil, err
		}
		var v *volume
		for _, h := range have {
			if !h.gone() && h.state != types.VolumeStateError && (v == nil || h.id < v.id) {
				v = h
			}
		}
		if v == nil {
			out, err := c.ec2.CreateVolume(ctx, b.createInput(c, req, kind, size, attempt))
			if is(err, "IdempotentParameterMismatch") {
				// Somebody asked for the same with another size: it appears, or it was
				// deleted and the next token is free.
				if mismatch.IsZero() {
					mismatch = time.Now()
				}
				if time.Since(mismatch) > 2*b.pace.lag {
					attempt, mismatch = attempt+1, time.Time{}
				} else if err := poll.Sleep(ctx, b.pace.First); err != nil {
					return nil, err
				}
				continue
			}
			if err != nil {
				return nil, c.explain(ctx, err, "CreateVolume")
			}
			v = &volume{id: aws.ToString(out.VolumeId), Volume: backends.Volume{Size: size * gib}}
		}
		if v.Size != size*gib {
			return nil, fmt.Errorf("there is one with %s, %s: %w", backends.Size(v.Size), v.id, backends.ErrExists)
		}
		made, err := b.appear(ctx, c, v.id)
		if err != nil || made != nil {
			return made, err
		}
		attempt++ // the token's volume was deleted
	}
	return nil, fmt.Errorf("EC2 answers with volumes that were deleted: %w", backends.ErrUnavailable)
}

// appear waits until a new volume can be used; nil if it was deleted.
func (b *Backend) appear(ctx context.Context, c *conn, id string) (made *volume, err error) {
	started, seen := time.Now(), false
	err = b.pace.Until(ctx, b.pace.settle, "volume "+id+" is being created", func() (bool, error) {
		v, err := b.look(ctx, c, id)
		switch {
		case err != nil:
			return false, err
		case v == nil && !seen:
			return time.Since(started) > 5*b.pace.lag, nil
		case v == nil && b.cfg.Encrypted:
			return false, fmt.Errorf("EC2 has given volume %s up; that is what it does if it may not use the KMS key %q: %w", id, b.cfg.KMSKeyID, backends.ErrUnavailable)
		case v == nil || v.gone():
			return true, nil
		case v.state == types.VolumeStateError:
			_, _ = c.ec2.DeleteVolume(ctx, &ec2.DeleteVolumeInput{VolumeId: &id})
			return false, fmt.Errorf("EC2 could not make volume %s, and says no more than %q: %w", id, v.state, backends.ErrUnavailable)
		}
		seen = true
		if v.state == types.VolumeStateCreating || v.ID == "" {
			return false, nil
		}
		made = v
		return true, nil
	})
	return made, err
}

func (b *Backend) createInput(c *conn, req backends.CreateRequest, kind Profile, size int64, attempt int) *ec2.CreateVolumeInput {
	token := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", req.Cluster, req.ID, attempt))
	in := &ec2.CreateVolumeInput{
		AvailabilityZone: &c.zone, ClientToken: aws.String(hex.EncodeToString(token[:])),
		Size: aws.Int32(int32(size)), VolumeType: types.VolumeType(kind.Type),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: []types.Tag{
			tag(tagCluster, req.Cluster), tag(tagDataset, req.ID), tag(tagName, req.Name),
		}}},
	}
	if kind.IOPS != 0 {
		in.Iops = aws.Int32(int32(kind.IOPS))
	}
	if kind.Throughput != 0 {
		in.Throughput = aws.Int32(int32(kind.Throughput))
	}
	if b.cfg.Encrypted {
		in.Encrypted = aws.Bool(true)
		if b.cfg.KMSKeyID != "" {
			in.KmsKeyId = &b.cfg.KMSKeyID
		}
	}
	return in
}

// Delete implements backends.Backend.
func (b *Backend) Delete(ctx context.Context, ref string) error {
	if err := b.delete(ctx, ref); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	return nil
}

func (b *Backend) delete(ctx context.Context, ref string) error {
	c, err := b.connect(ctx)
	if err != nil {
		return err
	}
	id, err := c.id(ref)
	if err != nil {
		return err
	}
	sent := false
	return b.pace.Until(ctx, b.pace.settle, "volume "+id+" is being deleted", func() (bool, error) {
		if sent {
			v, err := b.look(ctx, c, id)
			return err == nil && (v == nil || v.gone()), err
		}
		v, err := b.find(ctx, c, id)
		if err != nil {
			return false, err
		}
		if len(v.attached) > 0 {
			return false, v.attachedError(v.attached[0].instance)
		}
		_, err = c.ec2.DeleteVolume(ctx, &ec2.DeleteVolumeInput{VolumeId: &id})
		if is(err, "VolumeInUse", "IncorrectState", "InvalidVolume.NotFound") {
			return false, nil // read it again
		}
		sent = err == nil
		return false, c.explain(ctx, err, "DeleteVolume")
	})
}

// Get implements backends.Backend.
func (b *Backend) Get(ctx context.Context, ref string) (backends.Volume, error) {
	v, err := b.get(ctx, ref)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("get volume: %w", err)
	}
	return v.Volume, nil
}

func (b *Backend) get(ctx context.Context, ref string) (*volume, error) {
	c, err := b.connect(ctx)
	if err != nil {
		return nil, err
	}
	id, err := c.id(ref)
	if err != nil {
		return nil, err
	}
	return b.find(ctx, c, id)
}

// List implements backends.Backend.
func (b *Backend) List(ctx context.Context) ([]backends.Volume, error) {
	c, err := b.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	all, err := b.list(ctx, c, filter("tag:"+tagCluster, b.self.Cluster))
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var vols []backends.Volume
	for _, v := range all {
		if !v.gone() && v.ID != "" {
			vols = append(vols, v.Volume)
		}
	}
	return vols, nil
}
