// Package csi makes a storage backend of any driver of the Container Storage
// Interface (CSI): it calls the driver's sockets as Kubernetes would.
//
// It wants raw block volumes. What CSI leaves to its caller is kept in three places:
// what a driver needs for every call about a volume is in the volume's reference; what
// the cluster has to remember is in the Catalog; and what this node has attached is
// seen in the directories the driver puts its devices into, and in the kernel.
package csi

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Config is what a user sets for one driver.
type Config struct {
	// Name is what users write after -o backend=; empty is csi.
	Name string `yaml:"name"`
	// Endpoint is the driver's socket, such as unix:///run/csi/csi.sock, for all its
	// services. Controller and Node are for drivers that have two.
	Endpoint   string `yaml:"endpoint"`
	Controller string `yaml:"controller"`
	Node       string `yaml:"node"`
	// Driver is the name the driver must say it has; empty: any.
	Driver string `yaml:"driver"`
	// Parameters are the driver's own, for volumes created without a profile.
	Parameters map[string]string `yaml:"parameters"`
	// Profiles are the parameters of the volumes created with -o profile=.
	Profiles map[string]map[string]string `yaml:"profiles"`
	// SecretFiles names the file of each secret the driver wants, for every call that
	// takes secrets; CallSecretFiles does for some calls (Calls), instead.
	SecretFiles     map[string]string            `yaml:"secret_files"`
	CallSecretFiles map[string]map[string]string `yaml:"call_secret_files"`
	// Mode is how a volume gets to a node: only block can be had.
	Mode string `yaml:"mode"`
	// Fences says that the driver cuts a node's access, also of what is open there,
	// when a volume is unpublished from it at the controller. Nothing in CSI tells.
	Fences bool `yaml:"fences"`
	// Exclusive says that the driver publishes a volume to one node at a time. Fences
	// means it.
	Exclusive bool `yaml:"exclusive"`
	// LateCalls is how long after it was sent a call may still take effect; 0 is
	// DefaultLateCalls.
	LateCalls time.Duration `yaml:"late_calls"`
	// CallTimeout is after which time a call is asked again; 0 is DefaultCallTimeout.
	CallTimeout time.Duration `yaml:"call_timeout"`
	// AllocationUnit, MinSize and MaxSize bound the sizes of volumes; 0 is 1 MiB, the
	// unit, and no bound.
	AllocationUnit backends.Size `yaml:"allocation_unit"`
	MinSize        backends.Size `yaml:"min_size"`
	MaxSize        backends.Size `yaml:"max_size"`
	// VolumePrefix begins the names of volumes at the storage; empty is flocker-.
	VolumePrefix string `yaml:"volume_prefix"`
}

// Calls are the calls that may have secrets of their own.
var Calls = []string{"create", "delete", "publish", "stage", "node_publish", "expand", "validate"}

// The defaults of Config. A call that a driver was not heard of about may go on there
// for as long as the storage takes: Kubernetes' drivers give most of their work up
// within one or two minutes.
const (
	DefaultCallTimeout = 30 * time.Second
	DefaultLateCalls   = 2 * time.Minute
)

// Self is the node and the cluster a backend is for.
type Self struct {
	// Node is the node's name in Flocker.
	Node string
	// Cluster is the UUID of the Flocker cluster. Volumes of another one are not seen.
	// Empty: every volume is.
	Cluster string
	// Dir is a directory of this node alone, below which the driver puts its devices.
	// It has the same path for the driver, and what the driver mounts below it is seen
	// here. It survives a restart.
	Dir string
	// Catalog is the cluster's.
	Catalog Catalog
}

// Backend is the backend of one node.
type Backend struct {
	cfg    Config
	self   Self
	client *client
	dir    string   // of this node's attachments
	told   sync.Map // by volume, the mark (entry.Late) that an Attach of this process has spoken of
	step   func(name string)
}

// New returns the backend of one node. It asks nobody yet.
func New(cfg Config, self Self) (backends.Backend, error) {
	b, err := newBackend(cfg, self)
	if err != nil {
		return nil, err
	}
	if cfg.Fences {
		return &fencer{b}, nil
	}
	return b, nil
}

func newBackend(cfg Config, self Self) (*Backend, error) {
	cfg.Name = cmp.Or(cfg.Name, "csi")
	cfg.Controller, cfg.Node = cmp.Or(cfg.Controller, cfg.Endpoint), cmp.Or(cfg.Node, cfg.Endpoint)
	cfg.CallTimeout = cmp.Or(cfg.CallTimeout, DefaultCallTimeout)
	cfg.LateCalls = cmp.Or(cfg.LateCalls, DefaultLateCalls)
	cfg.AllocationUnit = cmp.Or(cfg.AllocationUnit, backends.MiB)
	cfg.MinSize = max(cfg.MinSize, cfg.AllocationUnit)
	cfg.VolumePrefix = cmp.Or(cfg.VolumePrefix, "flocker-")
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("backend %s: %w", cfg.Name, backends.Classify(backends.ErrInvalid, err))
	}
	if self.Node == "" || self.Catalog == nil || !filepath.IsAbs(self.Dir) {
		return nil, fmt.Errorf("backend %s: a node, a catalog and a directory are needed: %w", cfg.Name, backends.ErrInvalid)
	}
	c, err := newClient(cfg)
	if err != nil {
		return nil, fmt.Errorf("backend %s: %w", cfg.Name, err)
	}
	return &Backend{cfg: cfg, self: self, client: c, dir: filepath.Join(self.Dir, cfg.Name), step: func(string) {}}, nil
}

func (c Config) validate() error {
	var errs []error
	complain := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if strings.ToLower(c.Name) != c.Name || strings.ContainsAny(c.Name, " ,=/") || len(c.Name) > 20 {
		complain("name %q: use up to 20 small letters, digits and dashes", c.Name)
	}
	if c.Controller == "" || c.Node == "" {
		complain("endpoint is missing: the driver's socket, such as unix:///run/csi/csi.sock")
	}
	for _, endpoint := range slices.Compact([]string{c.Controller, c.Node}) {
		if endpoint != "" && socket(endpoint) == "" {
			complain("endpoint %q: use unix:// and an absolute path", endpoint)
		}
	}
	switch c.Mode {
	case "", "block":
	case "mount":
		complain("mode mount: a volume has to be a block device here; drivers that have filesystems only cannot be used yet")
	default:
		complain("mode %q: use block", c.Mode)
	}
	for call, files := range c.CallSecretFiles {
		if !slices.Contains(Calls, call) {
			complain("call_secret_files: there is no call %q; use %s", call, strings.Join(Calls, ", "))
		}
		errs = append(errs, absolute("call_secret_files."+call, files))
	}
	errs = append(errs, absolute("secret_files", c.SecretFiles))
	if c.CallTimeout < 0 || c.LateCalls < 0 || c.AllocationUnit < 0 || c.MinSize < 0 || c.MaxSize < 0 {
		complain("a time or size is negative")
	}
	if c.MaxSize != 0 && c.MaxSize < c.MinSize {
		complain("max_size %s is less than min_size %s", c.MaxSize, c.MinSize)
	}
	if len(c.VolumePrefix) > 64 {
		complain("volume_prefix has more than 64 characters")
	}
	if _, ok := c.Profiles[""]; ok {
		complain("profiles: one has no name; use parameters for volumes without a profile")
	}
	return errors.Join(errs...)
}

func absolute(what string, files map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(files)) {
		if !filepath.IsAbs(files[key]) {
			return fmt.Errorf("%s: %s is not the absolute path of a file", what, key)
		}
	}
	return nil
}

// ours says whether a volume of this cluster is to be seen.
func (b *Backend) ours(cluster string) bool { return b.self.Cluster == "" || b.self.Cluster == cluster }

// Properties implements backends.Backend.
func (b *Backend) Properties() backends.Properties {
	p := backends.Properties{
		Name: b.cfg.Name, Class: backends.ClassNone, ExclusiveAttach: b.cfg.Exclusive,
		AllocationUnit: int64(b.cfg.AllocationUnit), MinSize: int64(b.cfg.MinSize), MaxSize: int64(b.cfg.MaxSize),
		Type: "csi", Profiles: slices.Sorted(maps.Keys(b.cfg.Profiles)),
		// Without Fences, too: an unpublish that comes late takes the next attachment's device
		// away under who writes to it.
		LateCalls: b.cfg.LateCalls,
	}
	if b.cfg.Fences {
		p.Class, p.ExclusiveAttach = backends.ClassExclusive, true
		p.FenceTime = 4 * b.cfg.CallTimeout // a call that was not answered is made again
	}
	return p
}

// Close hangs up. Nothing at the storage changes.
func (b *Backend) Close() error { return b.client.close() }

func (b *Backend) roundUp(size int64) int64 {
	unit := int64(b.cfg.AllocationUnit)
	return max((size+unit-1)/unit*unit, int64(b.cfg.MinSize))
}

// parameters returns those of a profile.
func (b *Backend) parameters(profile string) (map[string]string, error) {
	if profile == "" {
		return b.cfg.Parameters, nil
	}
	p, ok := b.cfg.Profiles[profile]
	if !ok {
		known := "there are none"
		if len(b.cfg.Profiles) > 0 {
			known = "use one of " + strings.Join(slices.Sorted(maps.Keys(b.cfg.Profiles)), ", ")
		}
		return nil, fmt.Errorf("backend %s has no profile %q; %s: %w", b.cfg.Name, profile, known, backends.ErrInvalid)
	}
	return p, nil
}

// wrap says what was tried, if it failed.
func wrap(what string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", what, err)
	}
	return err
}

// sentence is an error whose text is a whole one, of a class.
func sentence(class error, format string, args ...any) error {
	return backends.Classify(class, fmt.Errorf(format, args...))
}
