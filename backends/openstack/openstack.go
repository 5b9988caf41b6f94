// Package openstack stores volumes in OpenStack's Cinder. They are attached by Nova,
// to hosts that are its servers, or by Cinder alone (attach: connector), to any host.
//
// Cinder knows no idempotency key: which volume is a dataset's is settled by metadata,
// see create.go. Nova names an attachment by volume and server; the ownership token is
// metadata of the volume, flocker_attached_<server>_<token>, written before the volume
// is attached. Cinder's own attachments have ids, and the token is in
// flocker_attachment_<id>, written before the attachment can be used.
package openstack

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Config is what an operator sets. Secrets are in files, or in clouds.yaml.
type Config struct {
	// Attach is nova, the default, or connector.
	Attach string `yaml:"attach"`

	// Cloud is an entry of clouds.yaml, which is looked for where all OpenStack
	// clients look, or CloudsFile.
	Cloud      string `yaml:"cloud"`
	CloudsFile string `yaml:"clouds_file"`
	// Auth is keystone, the default, or rackspace: see rackspace.go.
	Auth string `yaml:"auth"`
	// Without Cloud: Keystone's URL, and a user with a password or an application
	// credential; or with a key of Rackspace's.
	AuthURL                         string `yaml:"auth_url"`
	Username                        string `yaml:"username"`
	APIKeyFile                      string `yaml:"api_key_file"`
	UserDomain                      string `yaml:"user_domain"`
	PasswordFile                    string `yaml:"password_file"`
	ProjectName                     string `yaml:"project_name"`
	ProjectDomain                   string `yaml:"project_domain"`
	ProjectID                       string `yaml:"project_id"`
	ApplicationCredentialID         string `yaml:"application_credential_id"`
	ApplicationCredentialSecretFile string `yaml:"application_credential_secret_file"`
	// CinderURL is that of a Cinder without Keystone, which believes everybody; with
	// ProjectID.
	CinderURL string `yaml:"cinder_url"`

	Region string `yaml:"region"`
	// Interface is which endpoints of the catalog are used: public, internal or admin.
	Interface string `yaml:"interface"`
	// CAFile has the certificates that the services' are signed with.
	CAFile string `yaml:"ca_file"`

	// VolumeType and Zone are what a volume is made with; empty is Cinder's default.
	VolumeType string `yaml:"volume_type"`
	Zone       string `yaml:"zone"`
	// Profiles are what the names after -o profile= mean.
	Profiles map[string]Profile `yaml:"profiles"`
	// GrowAttached says that the storage below Cinder can grow a volume which is
	// attached. Where it cannot, Cinder finds out too late.
	GrowAttached bool `yaml:"grow_attached"`

	// ServerID is the UUID of this host in Nova; found out without it.
	ServerID string `yaml:"server_id"`
	// XenDisks lets a disk of Xen be taken for the volume that Nova names it after: see xen.go.
	XenDisks bool `yaml:"xen_disks"`
	// KeepServers makes Fence fail rather than stop a server that does not let go of a
	// volume.
	KeepServers bool `yaml:"keep_servers"`
	// AllowAdminFence lets Fence take a volume in Cinder from a server whose compute
	// host is down, when an administrator has forced that host down in Nova.
	AllowAdminFence bool `yaml:"allow_admin_fence"`
	// LateCalls is how long after it was sent a call may take effect; 0 is a minute.
	LateCalls time.Duration `yaml:"late_calls"`

	// Shares says where on this host the NFS shares are mounted that Cinder names,
	// for attach: connector.
	Shares map[string]string `yaml:"shares"`

	// CephUser is as whom the images of Ceph are attached that Cinder's volumes are, for
	// attach: connector, without "client."; CephKeyringFile has its key. CephConf is a
	// ceph.conf, CephMonitors are the monitors' addresses; one of them is needed.
	CephUser        string   `yaml:"ceph_user"`
	CephKeyringFile string   `yaml:"ceph_keyring_file"`
	CephConf        string   `yaml:"ceph_conf"`
	CephMonitors    []string `yaml:"ceph_monitors"`
	// CephAttach is krbd, rbd-nbd or fuse; empty is the first that this host can do.
	CephAttach string `yaml:"ceph_attach"`
	// ISCSI says that Cinder's volumes are units of iSCSI targets, for attach: connector.
	ISCSI bool `yaml:"iscsi"`
	// ISCSIInitiator is the name of this host as an initiator; empty is that of open-iscsi.
	ISCSIInitiator string `yaml:"iscsi_initiator"`
	// ISCSIAttach is kernel or fuse; empty is the first of them that this host can do.
	ISCSIAttach string `yaml:"iscsi_attach"`
	// RunDir is for sockets, notes and the like of what is attached. It must survive the plugin,
	// and not the host; empty is /run/flocker/cinder.
	RunDir string `yaml:"run_dir"`
}

// Profile is a kind of volume.
type Profile struct {
	VolumeType string `yaml:"volume_type"`
	Zone       string `yaml:"zone"`
}

// options are the create options besides those every volume has.
type options struct {
	Type string `option:"volume_type" help:"Cinder volume type; goes before the profile's"`
}

// Self is the node a backend serves.
type Self struct {
	Node    string // its id in the cluster
	Cluster string // the cluster's UUID; volumes of others are not seen
	Name    string // of the backend, if not openstack
}

// cinder is what both ways of attaching have in common.
type cinder struct {
	cfg   Config
	self  Self
	pace  pace
	maker string // this process
	seen  seen
	locks keyed // by volume, and by dataset that is made

	mu   sync.Mutex // never held while anybody is asked
	conn *conn
	idle map[string]time.Time // since when something is seen that somebody ought to complete
}

// pace is how long to wait; a test is faster.
type pace struct {
	poll.Pace // of looks

	settle time.Duration // for a volume to get into a state
	orphan time.Duration // after which what nobody completes was left behind
	device time.Duration // for a device to appear, or to go
	grace  time.Duration // for a running server to let go of a volume
	stop   time.Duration // for a server to stop
}

var usual = pace{
	Pace: poll.Pace{First: 250 * time.Millisecond, Most: 5 * time.Second}, settle: 2 * time.Minute, orphan: time.Minute,
	device: 30 * time.Second, grace: 12 * time.Second, stop: 10 * time.Minute,
}

// uuidForm is how OpenStack writes the id of a volume or a server.
var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// New returns the backend of one node. It asks nobody yet.
func New(cfg Config, self Self) (backends.Backend, error) {
	if err := cfg.check(self); err != nil {
		return nil, fmt.Errorf("openstack: %w: %w", err, backends.ErrInvalid)
	}
	cfg.LateCalls = cmp.Or(cfg.LateCalls, time.Minute)
	c := &cinder{cfg: cfg, self: self, pace: usual, maker: uuid.NewString(), idle: map[string]time.Time{}, seen: seen{asked: -1, lives: map[string]known{}}}
	if cfg.CephUser != "" {
		b, err := newCeph(c)
		if err != nil {
			return nil, fmt.Errorf("openstack: %w", err)
		}
		return b, nil
	}
	if cfg.ISCSI {
		b, err := newISCSI(c)
		if err != nil {
			return nil, fmt.Errorf("openstack: %w", err)
		}
		return b, nil
	}
	if cfg.Attach == "connector" {
		return &Connector{cinder: c, storage: loops{shares: cfg.Shares}}, nil
	}
	nova := &Nova{
		cinder: c, kernel: kernel{disk.Here()}, guest: thisGuest, addresses: addresses,
	}
	if cfg.rackspace() {
		return &Rackspace{nova, nova, nova}, nil
	}
	return nova, nil
}

func (c Config) check(self Self) error {
	ways := 0
	for _, set := range []string{c.Cloud, c.Username, c.ApplicationCredentialID, c.CinderURL} {
		if set != "" {
			ways++
		}
	}
	storages := 0
	for _, set := range []bool{len(c.Shares) > 0, c.CephUser != "", c.ISCSI} {
		if set {
			storages++
		}
	}
	wrong := fmt.Errorf
	switch {
	case self.Node == "" || self.Cluster == "":
		return wrong("the node and the cluster must be named")
	case c.Attach != "" && c.Attach != "nova" && c.Attach != "connector":
		return wrong("attach is %q; use nova or connector", c.Attach)
	case c.Auth != "" && c.Auth != "keystone" && !c.rackspace():
		return wrong("auth is %q; use keystone or rackspace", c.Auth)
	case c.Interface != "" && !slices.Contains([]string{"public", "internal", "admin"}, c.Interface):
		return wrong("interface is %q; use public, internal or admin", c.Interface)
	case c.ServerID != "" && !uuidForm.MatchString(c.ServerID):
		return wrong("server_id %q is no UUID; write it as Nova does, or leave it out", c.ServerID)
	case c.LateCalls < 0:
		return wrong("late_calls must not be negative")
	case c.rackspace():
		return c.checkRackspace()
	case c.APIKeyFile != "" || c.XenDisks:
		return wrong("api_key_file and xen_disks are for auth: rackspace")
	case ways != 1:
		return wrong("set one of cloud, username, application_credential_id and cinder_url, which say how to log in")
	case c.CloudsFile != "" && c.Cloud == "":
		return wrong("clouds_file without cloud, which names an entry of it")
	case c.Username != "" && (c.PasswordFile == "" || c.UserDomain == ""):
		return wrong("username needs password_file and user_domain")
	case c.Username != "" && c.ProjectID == "" && (c.ProjectName == "" || c.ProjectDomain == ""):
		return wrong("username needs project_id, or project_name and project_domain")
	case c.ApplicationCredentialID != "" && c.ApplicationCredentialSecretFile == "":
		return wrong("application_credential_id needs application_credential_secret_file")
	case (c.Username != "" || c.ApplicationCredentialID != "") && !isURL(c.AuthURL):
		return wrong("auth_url %q is no URL; write it like https://keystone.example:5000/v3", c.AuthURL)
	case c.CinderURL != "" && (!isURL(c.CinderURL) || c.ProjectID == ""):
		return wrong("cinder_url needs a URL like http://cinder.example:8776/v3, and project_id")
	case c.CinderURL != "" && c.Attach != "connector":
		return wrong("cinder_url is for a Cinder without Keystone and Nova, and needs attach: connector")
	case c.Attach == "connector" && (c.ServerID != "" || c.KeepServers || c.AllowAdminFence || c.GrowAttached):
		return wrong("server_id, keep_servers, allow_admin_fence and grow_attached are for attach: nova")
	case c.Attach == "connector" && storages != 1:
		return wrong("attach: connector needs one of shares, which say where the NFS shares of Cinder are mounted here, ceph_user and iscsi: true")
	case c.Attach != "connector" && storages > 0:
		return wrong("shares, ceph_user and iscsi are for attach: connector")
	case c.CephUser == "" && (c.CephKeyringFile != "" || c.CephConf != "" || len(c.CephMonitors) > 0 || c.CephAttach != ""):
		return wrong("ceph_keyring_file, ceph_conf, ceph_monitors and ceph_attach need ceph_user")
	case !c.ISCSI && (c.ISCSIInitiator != "" || c.ISCSIAttach != ""):
		return wrong("iscsi_initiator and iscsi_attach need iscsi: true")
	case !c.ISCSI && c.CephUser == "" && c.RunDir != "":
		return wrong("run_dir needs ceph_user or iscsi")
	case c.CephUser != "" && c.CephConf == "" && len(c.CephMonitors) == 0:
		return wrong("ceph_user needs ceph_conf or ceph_monitors: the path of a ceph.conf, or the monitors' addresses")
	case strings.HasPrefix(c.CephUser, "client."):
		return wrong("ceph_user %q: write the client's name without \"client.\"", c.CephUser)
	}
	for key, path := range map[string]string{"ceph_conf": c.CephConf, "ceph_keyring_file": c.CephKeyringFile} {
		if path != "" && !filepath.IsAbs(path) {
			return wrong("%s %q must be an absolute path", key, path)
		}
	}
	for share, dir := range c.Shares {
		if !filepath.IsAbs(dir) {
			return wrong("shares: %s is to be at %q, which is no absolute path", share, dir)
		}
	}
	return nil
}

func isURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

const gib = int64(1) << 30

func (b *cinder) properties(class backends.Class) backends.Properties {
	least := gib
	if b.cfg.rackspace() {
		least = leastV1
	}
	return backends.Properties{
		Name: cmp.Or(b.self.Name, "openstack"), Type: "openstack", Class: class, ExclusiveAttach: true, AllocationUnit: gib, MinSize: least,
		Options: backends.Options[options](), Profiles: slices.Sorted(maps.Keys(b.cfg.Profiles)),
	}
}

// kind returns the type and the zone of a new volume.
func (c Config) kind(profile string, values map[string]string) (Profile, error) {
	p := Profile{}
	if profile != "" {
		var ok bool
		if p, ok = c.Profiles[profile]; !ok {
			known := strings.Join(slices.Sorted(maps.Keys(c.Profiles)), ", ")
			return p, fmt.Errorf("there is no profile %q; the setting profiles has: %s: %w", profile, cmp.Or(known, "none"), backends.ErrInvalid)
		}
	}
	o, err := backends.Decode[options](values)
	if err != nil {
		return p, err
	}
	return Profile{cmp.Or(o.Type, p.VolumeType, c.VolumeType), cmp.Or(p.Zone, c.Zone)}, nil
}

// keyed is a lock for each key.
type keyed struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// lock waits for a key's lock, and returns what gives it back.
func (k *keyed) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		held, ok := k.held[key]
		if !ok {
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			k.held[key] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				defer k.mu.Unlock()
				delete(k.held, key)
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
		}
	}
}
