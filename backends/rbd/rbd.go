// Package rbd stores volumes as images of Ceph RBD.
//
// A volume is the image flocker-<dataset>; the image's metadata says of which cluster and
// dataset it is. Beside it is an object of the pool, also named flocker-<dataset>, which
// says who has the image attached: it carries
//
//   - a lock of RADOS, which one at a time can have: the claim, with the node, the ownership
//     token and the address of the one client of Ceph that serves the device;
//   - keys that say which tokens of which node were cut off.
//
// A claim is made when its client runs, and before anybody can use its device. It is
// removed when its client has closed the image, or is on the cluster's blocklist; never
// otherwise. So whoever finds no claim knows that nothing can write any more.
package rbd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Config is what an operator sets.
type Config struct {
	// Conf is a ceph.conf; Monitors are the monitors' addresses. One of them is needed.
	Conf     string   `yaml:"conf"`
	Monitors []string `yaml:"monitors"`
	// User is the client's name without "client."; empty is flocker. KeyringFile has its
	// key; empty is what Conf says, or /etc/ceph/ceph.client.<user>.keyring.
	User        string `yaml:"user"`
	KeyringFile string `yaml:"keyring_file"`
	// Pool and Namespace are where volumes are; a namespace must exist.
	Pool      string `yaml:"pool"`
	Namespace string `yaml:"namespace"`
	// Default is what a volume is without a profile, Profiles what the names after
	// -o profile= mean.
	Default  Profile            `yaml:"default"`
	Profiles map[string]Profile `yaml:"profiles"`
	// Attach is how images become block devices: krbd, rbd-nbd or fuse; empty is the first
	// of them that the host can do.
	Attach string `yaml:"attach"`
	// RunDir is for sockets and the like of what is attached. It must survive the plugin,
	// and not the host; empty is /run/flocker/rbd.
	RunDir string `yaml:"run_dir"`
}

// Profile is a kind of volume.
type Profile struct {
	// Pool is another one than Config.Pool, DataPool one for the data alone, such as one
	// with erasure coding.
	Pool     string `yaml:"pool"`
	DataPool string `yaml:"data_pool"`
	// Features are those of the image; exclusive-lock must be one.
	Features []string `yaml:"features"`
	// ObjectSize is that of the objects an image is made of; 0 is Ceph's.
	ObjectSize backends.Size `yaml:"object_size"`
}

// Self is the node a Backend serves.
type Self struct {
	Node    string // its id in the cluster
	Cluster string // the cluster's UUID; volumes of others are not seen
	Name    string // the backend's name on this node; empty is rbd
}

// Backend is the backend of one node.
type Backend struct {
	cfg      Config
	self     Self
	ceph     rbdmap.Cluster
	attacher attacher
	dir      string // of this node's attachments

	calls chan struct{} // bounds how many images are asked about at once

	mu     sync.Mutex          // never held while anybody is asked
	metas  map[string]metadata // by an image's id; they do not change
	silent map[string]silence  // by a claim's id
}

// attacher makes devices of images on this host; an *rbdmap.Attacher, but for a test.
type attacher interface {
	Map(ctx context.Context, image rbdmap.Image, label string, allow func(rbdmap.Client) error) (rbdmap.Device, error)
	Devices() ([]rbdmap.Device, error)
	Begun() ([]rbdmap.Device, error)
	Unmap(ctx context.Context, label string) (clean bool, err error)
	Served(label string) (bool, error)
	Grow(ctx context.Context, label string, size int64) error
}

var (
	_ backends.Backend = (*Backend)(nil)
	_ backends.Fencer  = (*Backend)(nil)
	_ backends.Resizer = (*Backend)(nil)

	nameForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)
)

const unit = int64(1 << 20)

// exclusiveLock is the feature that keeps a second client from writing.
const exclusiveLock = "exclusive-lock"

// usualFeatures are Ceph's own, all of which depend on exclusive-lock but the first.
var usualFeatures = []string{"layering", exclusiveLock, "object-map", "fast-diff", "deep-flatten"}

// knownFeatures can be chosen.
var knownFeatures = append(slices.Clone(usualFeatures), "striping")

// New returns the backend of one node. It asks nobody yet.
func New(cfg Config, self Self) (*Backend, error) {
	invalid := func(format string, args ...any) (*Backend, error) {
		return nil, fmt.Errorf("rbd: %s: %w", fmt.Sprintf(format, args...), backends.ErrInvalid)
	}
	self.Name = cmp.Or(self.Name, "rbd")
	cfg.User, cfg.RunDir = cmp.Or(cfg.User, "flocker"), cmp.Or(cfg.RunDir, "/run/flocker/rbd")
	switch {
	case self.Node == "" || self.Cluster == "":
		return invalid("the node and the cluster must be named")
	case cfg.Conf == "" && len(cfg.Monitors) == 0:
		return invalid("conf or monitors is needed: the path of a ceph.conf, or the monitors' addresses")
	case cfg.Conf != "" && !filepath.IsAbs(cfg.Conf):
		return invalid("conf %q must be an absolute path", cfg.Conf)
	case cfg.KeyringFile != "" && !filepath.IsAbs(cfg.KeyringFile):
		return invalid("keyring_file %q must be the absolute path of a file with the key", cfg.KeyringFile)
	case strings.HasPrefix(cfg.User, "client.") || !nameForm.MatchString(cfg.User):
		return invalid("user %q: write the client's name without \"client.\", such as flocker", cfg.User)
	case cfg.Pool == "":
		return invalid("pool is missing: the name of the pool for volumes")
	case cfg.Namespace != "" && !nameForm.MatchString(cfg.Namespace):
		return invalid("namespace %q is none", cfg.Namespace)
	}
	for _, m := range cfg.Monitors {
		if m == "" || strings.ContainsAny(m, " \t\n") {
			return invalid("monitors: %q is no address", m)
		}
	}
	kinds := map[string]Profile{"default": cfg.Default}
	for name, p := range cfg.Profiles {
		if name == "" {
			return invalid("profiles: one has no name; use default for volumes without a profile")
		}
		kinds["profile "+name] = p
	}
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		if err := kinds[name].check(cfg.Pool, cfg.Namespace); err != nil {
			return nil, fmt.Errorf("rbd: %s: %w", name, err)
		}
	}
	dir := filepath.Join(cfg.RunDir, hash(self.Cluster + "/" + self.Node + "/" + self.Name)[:12])
	attacher, err := rbdmap.New(rbdmap.Config{Dir: dir, Method: cfg.Attach})
	if err != nil {
		return nil, fmt.Errorf("rbd: %w", err)
	}
	return &Backend{
		cfg: cfg, self: self, attacher: attacher, dir: dir, calls: make(chan struct{}, 8),
		metas: map[string]metadata{}, silent: map[string]silence{},
		ceph: rbdmap.Cluster{Conf: cfg.Conf, Monitors: strings.Join(cfg.Monitors, ","), User: cfg.User, Keyring: cfg.KeyringFile},
	}, nil
}

func (p Profile) check(pool, namespace string) error {
	for what, name := range map[string]string{"pool": cmp.Or(p.Pool, pool), "data_pool": p.DataPool} {
		if name != "" && !nameForm.MatchString(name) {
			return fmt.Errorf("%s %q is none: %w", what, name, backends.ErrInvalid)
		}
	}
	if len(cmp.Or(p.Pool, pool))+len(namespace) > 60 {
		return fmt.Errorf("the names of pool and namespace have more than 60 characters: %w", backends.ErrInvalid)
	}
	for _, f := range p.Features {
		if !slices.Contains(knownFeatures, f) {
			return fmt.Errorf("features: %q cannot be chosen; use some of %s: %w", f, strings.Join(knownFeatures, ", "), backends.ErrInvalid)
		}
	}
	if len(p.Features) > 0 && !slices.Contains(p.Features, exclusiveLock) {
		return fmt.Errorf("features: %s is missing, without which two hosts could write: %w", exclusiveLock, backends.ErrInvalid)
	}
	if s := p.ObjectSize; s != 0 && (s < 4*backends.KiB || s > 32*backends.MiB || s&(s-1) != 0) {
		return fmt.Errorf("object_size %s: use a power of two from 4KiB to 32MiB: %w", s, backends.ErrInvalid)
	}
	return nil
}

// Properties implements backends.Backend.
func (b *Backend) Properties() backends.Properties {
	return backends.Properties{
		Name: b.self.Name, Type: "rbd", Class: backends.ClassFenced, ExclusiveAttach: true,
		AllocationUnit: unit, MinSize: unit, MaxSize: 1 << 50,
		// The blocklist and the watchers of an image may take the cluster a while each.
		FenceTime: 2 * time.Minute, Profiles: slices.Sorted(maps.Keys(b.cfg.Profiles)),
	}
}

// profile returns what a name means.
func (b *Backend) profile(name string) (Profile, error) {
	p := b.cfg.Default
	if name != "" {
		var ok bool
		if p, ok = b.cfg.Profiles[name]; !ok {
			known := "there are none"
			if len(b.cfg.Profiles) > 0 {
				known = "use " + strings.Join(slices.Sorted(maps.Keys(b.cfg.Profiles)), ", ")
			}
			return p, fmt.Errorf("there is no profile %q; %s: %w", name, known, backends.ErrInvalid)
		}
	}
	p.Pool = cmp.Or(p.Pool, b.cfg.Pool)
	if len(p.Features) == 0 {
		p.Features = usualFeatures
	}
	return p, nil
}

// pools are those that may have volumes.
func (b *Backend) pools() []string {
	pools := []string{b.cfg.Pool}
	for _, p := range append(slices.Collect(maps.Values(b.cfg.Profiles)), b.cfg.Default) {
		if p.Pool != "" && !slices.Contains(pools, p.Pool) {
			pools = append(pools, p.Pool)
		}
	}
	return pools
}

// metadata is what an image says of its volume, under the key metaKey.
type metadata struct {
	Cluster string `json:"cluster"`
	Dataset string `json:"dataset"`
	Name    string `json:"name"`
}

const (
	metaKey     = "flocker"
	imagePrefix = "flocker-"
)

// volume is one that the storage system has.
type volume struct {
	backends.Volume
	image rbdmap.Image
	id    string // the image's, which no other has had
}

func (b *Backend) image(pool, name string) rbdmap.Image {
	return rbdmap.Image{Cluster: b.ceph, Pool: pool, Namespace: b.cfg.Namespace, Name: name}
}

// ref is <fsid>/<pool>/[<namespace>/]<image>. In another cluster "not found" would prove
// nothing.
func ref(fsid string, image rbdmap.Image) string { return fsid + "/" + image.Spec() }

// datasetOf returns the dataset of a reference; empty if it is none of this backend.
func datasetOf(ref string) string {
	id, ok := strings.CutPrefix(ref[strings.LastIndex(ref, "/")+1:], imagePrefix)
	if parsed, err := uuid.Parse(id); !ok || err != nil || parsed.String() != id {
		return ""
	}
	return id
}

// named returns the image of a reference.
func (b *Backend) named(ctx context.Context, r string) (rbdmap.Image, error) {
	none := rbdmap.Image{}
	parts := strings.Split(r, "/")
	if datasetOf(r) == "" || len(parts) < 3 || len(parts) > 4 {
		return none, fmt.Errorf("%q is no reference to an RBD volume: %w", r, backends.ErrInvalid)
	}
	fsid, err := b.ceph.FSID(ctx)
	if err != nil {
		return none, err
	}
	image := b.image(parts[1], parts[len(parts)-1])
	switch {
	case parts[0] != fsid:
		return none, fmt.Errorf("the volume is in the Ceph cluster %s, and this host is set to %s: %w", parts[0], fsid, backends.ErrInvalid)
	case ref(fsid, image) != r:
		return none, fmt.Errorf("the volume is %s, and this host is set to the namespace %q: %w", strings.Join(parts[1:], "/"), b.cfg.Namespace, backends.ErrInvalid)
	}
	return image, nil
}

// find returns the volume of a reference, if it is of this cluster.
func (b *Backend) find(ctx context.Context, r string) (*volume, error) {
	v, err := b.findHalf(ctx, r)
	if err == nil && v.Cluster == "" {
		return nil, b.notOurs(v.image)
	}
	return v, err
}

// findHalf does so too if it is half made: then it does not say of which cluster it is.
func (b *Backend) findHalf(ctx context.Context, r string) (*volume, error) {
	image, err := b.named(ctx, r)
	if err != nil {
		return nil, err
	}
	v, err := b.look(ctx, image)
	if err != nil {
		return nil, err
	}
	if v.Cluster != b.self.Cluster && v.Cluster != "" {
		return nil, b.notOurs(image)
	}
	return v, nil
}

func (b *Backend) notOurs(image rbdmap.Image) error {
	return fmt.Errorf("the Ceph cluster has no volume %s of this Flocker cluster: %w", image.Spec(), backends.ErrNotFound)
}

// errNoImage: there is none, of this cluster or another.
var errNoImage = fmt.Errorf("it was deleted, or never made: %w", backends.ErrNotFound)

// look returns an image, whoever's it is. One whose Create was not finished has no ID.
func (b *Backend) look(ctx context.Context, image rbdmap.Image) (*volume, error) {
	fsid, err := b.ceph.FSID(ctx)
	if err != nil {
		return nil, err
	}
	var info struct {
		ID   string `json:"id"`
		Size int64  `json:"size"`
	}
	if err := b.ceph.Ask(ctx, &info, "rbd", "info", image.Spec()); err != nil {
		if errors.Is(err, backends.ErrNotFound) {
			return nil, fmt.Errorf("the Ceph cluster has no image %s; %w", image.Spec(), errNoImage)
		}
		return nil, err
	}
	meta, err := b.meta(ctx, image, info.ID)
	if err != nil {
		return nil, err
	}
	return &volume{
		Volume: backends.Volume{Ref: ref(fsid, image), ID: meta.Dataset, Cluster: meta.Cluster, Name: meta.Name, Size: info.Size},
		image:  image, id: info.ID,
	}, nil
}

// meta returns an image's metadata; none if its Create was not finished.
func (b *Backend) meta(ctx context.Context, image rbdmap.Image, id string) (metadata, error) {
	b.mu.Lock()
	meta, ok := b.metas[id]
	b.mu.Unlock()
	if ok && id != "" {
		return meta, nil
	}
	out, err := b.ceph.Run(ctx, "rbd", "image-meta", "get", image.Spec(), metaKey)
	if errors.Is(err, backends.ErrNotFound) {
		return metadata{}, nil
	}
	if err != nil {
		return metadata{}, err
	}
	if err := json.Unmarshal(out, &meta); err != nil || meta.Dataset != strings.TrimPrefix(image.Name, imagePrefix) {
		return metadata{}, fmt.Errorf("the metadata %q of image %s is damaged: %w", metaKey, image.Spec(), backends.ErrUnavailable)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.metas[id] = meta
	return meta, nil
}

// Create implements backends.Backend.
func (b *Backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	v, err := b.create(ctx, req)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	return v.Volume, nil
}

// halfMade is how long an image may be half made by somebody else before it is one that
// was left: longer than any call of Ceph's programs.
const halfMade = 35 * time.Second

func (b *Backend) create(ctx context.Context, req backends.CreateRequest) (*volume, error) {
	if datasetOf(imagePrefix+req.ID) == "" || req.Size <= 0 || req.Size > 1<<50 || req.Cluster != b.self.Cluster {
		return nil, fmt.Errorf("an id, a size and this cluster are needed: %w", backends.ErrInvalid)
	}
	size := (req.Size + unit - 1) / unit * unit
	p, err := b.profile(req.Profile)
	if err != nil {
		return nil, err
	}
	image := b.image(p.Pool, imagePrefix+req.ID)
	meta, err := json.Marshal(metadata{req.Cluster, req.ID, req.Name})
	if err != nil {
		return nil, err
	}
	args := []string{"create", image.Spec(), "--size", strconv.FormatInt(size/unit, 10) + "M"}
	for _, f := range p.Features {
		args = append(args, "--image-feature", f)
	}
	if p.DataPool != "" {
		args = append(args, "--data-pool", p.DataPool)
	}
	if p.ObjectSize != 0 {
		args = append(args, "--object-size", strconv.FormatInt(int64(p.ObjectSize), 10)+"B")
	}
	for started, pause := time.Now(), 50*time.Millisecond; ; pause = min(2*pause, time.Second) {
		_, err := b.ceph.Run(ctx, "rbd", args...)
		unfinished := err == nil
		var v *volume
		if errors.Is(err, backends.ErrExists) {
			v, err = b.look(ctx, image)
			unfinished = err == nil && v.ID == ""
		}
		switch {
		case unfinished:
			// Whoever made it, and did not get to the end, would write the same.
			if _, err := b.ceph.Run(ctx, "rbd", "image-meta", "set", image.Spec(), metaKey, string(meta)); err != nil {
				return nil, err
			}
			if v, err = b.look(ctx, image); err != nil {
				return nil, err
			}
		case errors.Is(err, backends.ErrNotFound) && time.Since(started) > halfMade:
			// It has a name, and nothing else.
			if err := b.remove(ctx, image); err != nil {
				return nil, err
			}
			continue
		case errors.Is(err, backends.ErrNotFound):
			if err := poll.Sleep(ctx, pause); err != nil {
				return nil, err
			}
			continue
		case err != nil:
			return nil, err
		}
		switch {
		case v.Size != size:
			return nil, fmt.Errorf("there is one with %s, image %s: %w", backends.Size(v.Size), image.Spec(), backends.ErrExists)
		case v.Cluster != req.Cluster:
			return nil, fmt.Errorf("there is one of another cluster, image %s: %w", image.Spec(), backends.ErrExists)
		}
		return v, nil
	}
}

// remove removes an image, which takes a while if it is large.
func (b *Backend) remove(ctx context.Context, image rbdmap.Image) error {
	ceph := b.ceph
	ceph.Timeout = 10 * time.Minute
	_, err := ceph.Run(ctx, "rbd", "rm", "--no-progress", image.Spec())
	if errors.Is(err, backends.ErrNotFound) {
		return nil
	}
	if f, ok := errors.AsType[*rbdmap.Failure](err); ok && f.Code == syscall.ENOTEMPTY {
		return fmt.Errorf("image %s has snapshots, which Flocker has not made; remove them with `rbd snap purge`: %w", image.Spec(), backends.ErrInUse)
	}
	return err
}

// Delete implements backends.Backend.
func (b *Backend) Delete(ctx context.Context, ref string) error {
	if err := b.delete(ctx, ref); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	return nil
}

func (b *Backend) delete(ctx context.Context, ref string) error {
	v, err := b.findHalf(ctx, ref)
	if errors.Is(err, errNoImage) {
		return cmp.Or(b.finishDelete(ctx, ref), err)
	}
	if err != nil {
		return err
	}
	if err := b.clear(ctx, v); err != nil {
		return err
	}
	mine, err := b.claimDelete(ctx, v)
	if err != nil {
		return err
	}
	// Who is attaching it sees the claim, and closes the image again; a client that has died
	// is a watcher for a while. Some of the caller's time is kept for saying who it is.
	patience := watchTimeout
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end)-10*time.Second)
	}
	for started := time.Now(); ; {
		err := b.remove(ctx, v.image)
		if err == nil {
			break
		}
		if f, ok := errors.AsType[*rbdmap.Failure](err); !ok || f.Code != syscall.EBUSY || time.Since(started) > patience {
			if errors.Is(err, backends.ErrInUse) {
				err = b.watched(ctx, v, err)
			}
			return errors.Join(err, b.release(context.WithoutCancel(ctx), v.image, mine))
		}
		if err := poll.Sleep(ctx, 500*time.Millisecond); err != nil {
			return errors.Join(err, b.release(context.WithoutCancel(ctx), v.image, mine))
		}
	}
	return b.forget(ctx, v.image)
}

// finishDelete removes what a Delete has left that has come no further than to remove the image.
func (b *Backend) finishDelete(ctx context.Context, ref string) error {
	image, err := b.named(ctx, ref)
	if err != nil {
		return err
	}
	h, held, err := b.holder(ctx, image)
	if err != nil || held && !h.deletes { // the image has perhaps another name now, and its client writes
		return err
	}
	return b.forget(ctx, image)
}

// watched says who has an image open that nobody of Flocker has.
func (b *Backend) watched(ctx context.Context, v *volume, busy error) error {
	watchers, err := v.image.Watchers(ctx)
	if err != nil || len(watchers) == 0 {
		return busy
	}
	var who []string
	for _, w := range watchers {
		who = append(who, w.Address)
	}
	return fmt.Errorf("image %s is open on %s, by none of Flocker's hosts: %w", v.image.Spec(), strings.Join(who, ", "), backends.ErrInUse)
}

// Get implements backends.Backend.
func (b *Backend) Get(ctx context.Context, ref string) (backends.Volume, error) {
	v, err := b.find(ctx, ref)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("get volume: %w", err)
	}
	return v.Volume, nil
}

// List implements backends.Backend.
func (b *Backend) List(ctx context.Context) ([]backends.Volume, error) {
	vols, err := b.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	return vols, nil
}

func (b *Backend) list(ctx context.Context) ([]backends.Volume, error) {
	fsid, err := b.ceph.FSID(ctx)
	if err != nil {
		return nil, err
	}
	var vols []backends.Volume
	for _, pool := range b.pools() {
		images, err := b.images(ctx, pool)
		if err != nil {
			return nil, err
		}
		metas, errs := make([]metadata, len(images)), make([]error, len(images))
		var all sync.WaitGroup
		for i, listed := range images {
			all.Go(func() {
				b.calls <- struct{}{}
				defer func() { <-b.calls }()
				metas[i], errs[i] = b.meta(ctx, b.image(pool, listed.Image), listed.ID)
			})
		}
		all.Wait()
		if err := errors.Join(errs...); err != nil {
			return nil, err
		}
		for i, listed := range images {
			if m := metas[i]; m.Cluster == b.self.Cluster || m.Cluster == "" { // half made, by whomever
				vols = append(vols, backends.Volume{
					Ref: ref(fsid, b.image(pool, listed.Image)), ID: datasetOf(listed.Image), Cluster: m.Cluster, Name: m.Name, Size: listed.Size,
				})
			}
		}
	}
	return vols, nil
}

// found is an image of a pool.
type found struct {
	Image    string `json:"image"`
	ID       string `json:"id"`
	Size     int64  `json:"size"`
	Snapshot string `json:"snapshot"`
}

// images returns a pool's images that are volumes of Flocker by their names.
func (b *Backend) images(ctx context.Context, pool string) ([]found, error) {
	ceph := b.ceph
	ceph.Timeout = 5 * time.Minute
	where := pool
	if b.cfg.Namespace != "" {
		where += "/" + b.cfg.Namespace
	}
	var all []found
	if err := ceph.Ask(ctx, &all, "rbd", "ls", "--long", where); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(i found) bool { return i.Snapshot != "" || datasetOf(i.Image) == "" }), nil
}

// Resize implements backends.Resizer. A device on another host sees it after its next
// attach.
func (b *Backend) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	now, err := b.resize(ctx, ref, size)
	if err != nil {
		return 0, fmt.Errorf("resize volume: %w", err)
	}
	return now, nil
}

func (b *Backend) resize(ctx context.Context, ref string, size int64) (int64, error) {
	v, err := b.find(ctx, ref)
	if err != nil {
		return 0, err
	}
	if size < 0 || size > 1<<50 {
		return 0, fmt.Errorf("no volume can have %d bytes: %w", size, backends.ErrInvalid)
	}
	size = max((size+unit-1)/unit*unit, v.Size)
	if size > v.Size {
		if _, err := b.ceph.Run(ctx, "rbd", "resize", "--no-progress", "--size", strconv.FormatInt(size/unit, 10)+"M", v.image.Spec()); err != nil {
			return 0, err
		}
	}
	d, ok, err := b.local(ref)
	if err != nil || !ok {
		return size, err
	}
	return size, b.attacher.Grow(ctx, d.device.Label, size)
}
