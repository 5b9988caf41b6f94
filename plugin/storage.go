package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/loopback"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/rbd"
	"github.com/flocker-plugin/flocker/backends/share"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// kinds are the types of storage that backends.yaml may name.
var kinds = map[string]kind{
	"csi": kindOf(
		func(name string, cfg csi.Config, h host) (backends.Backend, error) {
			cfg.Name = name
			return csi.New(cfg, csi.Self{
				Node: h.node, Cluster: h.cluster, Dir: filepath.Join(h.stateDir, "csi"), Catalog: h.owners.Catalog(name),
			})
		},
		func(cfg csi.Config) map[string]string {
			files := map[string]string{}
			for key, file := range cfg.SecretFiles {
				files["secret_files."+key] = file
			}
			for call, of := range cfg.CallSecretFiles {
				for key, file := range of {
					files["call_secret_files."+call+"."+key] = file
				}
			}
			return files
		},
	),
	"ebs": kindOf(
		func(_ string, cfg ebs.Config, h host) (backends.Backend, error) {
			return ebs.New(cfg, ebs.Self{Node: h.node, Cluster: h.cluster})
		},
		func(cfg ebs.Config) map[string]string {
			return map[string]string{"credentials_file": cfg.CredentialsFile}
		},
	),
	"loopback": kindOf(
		func(_ string, cfg directory, h host) (backends.Backend, error) {
			if !filepath.IsAbs(cfg.Dir) {
				return nil, errors.New("dir is missing: the absolute path of the directory of its files")
			}
			return loopback.New(loopback.Config{Dir: cfg.Dir, Node: h.node, Preallocate: cfg.Preallocate}), nil
		},
		func(directory) map[string]string { return nil },
	),
	"openstack": kindOf(
		func(name string, cfg openstack.Config, h host) (backends.Backend, error) {
			return openstack.New(cfg, openstack.Self{Node: h.node, Cluster: h.cluster, Name: name})
		},
		func(cfg openstack.Config) map[string]string {
			return map[string]string{
				"api_key_file": cfg.APIKeyFile, "application_credential_secret_file": cfg.ApplicationCredentialSecretFile,
				"ceph_keyring_file": cfg.CephKeyringFile, "clouds_file": cfg.CloudsFile, "password_file": cfg.PasswordFile,
			}
		},
	),
	"rbd": kindOf(
		func(name string, cfg rbd.Config, h host) (backends.Backend, error) {
			return rbd.New(cfg, rbd.Self{Node: h.node, Cluster: h.cluster, Name: name})
		},
		func(cfg rbd.Config) map[string]string {
			return map[string]string{"keyring_file": cfg.KeyringFile}
		},
	),
	"share": kindOf(
		func(_ string, cfg share.Config, h host) (backends.Backend, error) {
			return share.New(cfg, h.node, h.cluster)
		},
		func(share.Config) map[string]string { return nil },
	),
}

// directory is the Config of a loopback in backends.yaml.
type directory struct {
	Dir         string `yaml:"dir"`
	Preallocate bool   `yaml:"preallocate"`
}

// host is the host and the cluster a backend is for.
type host struct {
	node, cluster, stateDir string
	owners                  *ownership.Map
}

// A kind is a type of storage.
type kind struct {
	// config returns a pointer to an empty Config.
	config func() any
	// open makes the backend of a name and a Config. It asks nobody.
	open func(name string, config any, h host) (backends.Backend, error)
	// secrets returns the files with secrets that a Config names, by their keys.
	secrets func(config any) map[string]string
}

func kindOf[C any](open func(name string, cfg C, h host) (backends.Backend, error), secrets func(cfg C) map[string]string) kind {
	return kind{
		config:  func() any { return new(C) },
		open:    func(name string, config any, h host) (backends.Backend, error) { return open(name, *config.(*C), h) },
		secrets: func(config any) map[string]string { return secrets(*config.(*C)) },
	}
}

// A configured backend is one of backends.yaml.
type configured struct {
	name, kind string
	file       string
	line       int
	config     any
}

// open makes the backend.
func (c configured) open(h host) (*backend, error) {
	inner, err := kinds[c.kind].open(c.name, c.config, h)
	if err != nil {
		return nil, err
	}
	return c.of(inner, h), nil
}

// of puts the backend's name and so on around what it is.
func (c configured) of(inner backends.Backend, h host) *backend {
	return &backend{Backend: inner, configured: c, identified: func(ctx context.Context, identity string) error {
		return h.owners.Identified(ctx, c.name, identity)
	}}
}

// check finds what is wrong with it that can be told without asking anybody.
func (c configured) check() error {
	b, err := c.open(host{node: "this", cluster: "any", stateDir: "/"})
	if err != nil {
		return fmt.Errorf("%s, line %d: %s", c.file, c.line, sentenceOf(c.name, err))
	}
	if closer, ok := b.Backend.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}

// sentenceOf is what a backend's constructor says, on one line and with its name.
func sentenceOf(name string, err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	text = strings.TrimSuffix(text, ": "+backends.ErrInvalid.Error())
	for _, before := range []string{"backend " + name + ": ", "ebs: ", "rbd: ", "openstack: "} {
		text = strings.TrimPrefix(text, before)
	}
	return "backend " + name + ": " + text
}

// secrets is an error for a file with a secret that cannot be read here, or can be by
// everybody. It is looked at again whenever the backend is used.
func (c configured) secrets() error {
	if c.config == nil { // it is there without backends.yaml
		return nil
	}
	files := kinds[c.kind].secrets(c.config)
	for _, key := range slices.Sorted(maps.Keys(files)) {
		file := files[key]
		if file == "" {
			continue
		}
		info, err := os.Stat(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = fmt.Errorf("there is no file %s: make it, readable for root alone%s", file, outside(file))
		case err != nil:
		case !info.Mode().IsRegular():
			err = fmt.Errorf("%s is no file", file)
		case info.Mode().Perm()&0o007 != 0:
			err = fmt.Errorf("%s can be used by every user of this host (its mode is %04o): type: chmod 600 %[1]s", file, info.Mode().Perm())
		}
		if err != nil {
			return backends.Classify(backends.ErrUnavailable, fmt.Errorf("backend %s: %s of %s: %w", c.name, key, c.file, err))
		}
	}
	return nil
}

// outside says what a managed plugin does not see.
func outside(file string) string {
	if managed() && !strings.HasPrefix(file, "/var/lib/flocker/") && !strings.HasPrefix(file, "/host/run/") {
		return "; a managed plugin sees files below /var/lib/flocker alone"
	}
	return ""
}

// A backend is one of this host: under the name it has here, and such that no other has
// to wait for it.
type backend struct {
	backends.Backend
	configured

	// identified records the storage's name for this host for those who may have to
	// fence it.
	identified func(ctx context.Context, identity string) error
	known      atomic.Bool // it is recorded

	mu      sync.Mutex
	refused time.Time // when it last did not say what is attached here
	why     error
}

// Unwrap lets backends.As see what it can.
func (b *backend) Unwrap() backends.Backend { return b.Backend }

// Properties implements backends.Backend.
func (b *backend) Properties() backends.Properties {
	p := b.Backend.Properties()
	p.Name, p.Type = b.name, b.kind
	return p
}

// Create implements backends.Backend.
func (b *backend) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	if err := b.secrets(); err != nil {
		return backends.Volume{}, err
	}
	return b.Backend.Create(ctx, req)
}

// List implements backends.Backend.
func (b *backend) List(ctx context.Context) ([]backends.Volume, error) {
	if err := b.secrets(); err != nil {
		return nil, err
	}
	return b.Backend.List(ctx)
}

// Attach implements backends.Backend.
func (b *backend) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	if err := b.ready(ctx); err != nil {
		return backends.Attachment{}, err
	}
	return b.Backend.Attach(ctx, req)
}

// identityLimit bounds how long a storage may take to say who this host is.
const identityLimit = 10 * time.Second

// ready is an error as long as this host could not be fenced if it had a volume.
func (b *backend) ready(ctx context.Context) error {
	if err := b.secrets(); err != nil {
		return err
	}
	identifier, ok := backends.As[backends.Identifier](b.Backend)
	if !ok || b.known.Load() {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, identityLimit)
	identity, err := identifier.Identity(bounded)
	cancel()
	if err != nil {
		return fmt.Errorf("by what name backend %s knows this host: %w", b.name, err)
	}
	if err := b.identified(ctx, identity); err != nil {
		return err
	}
	b.known.Store(true)
	return nil
}

// A process that starts asks for the attachments of each volume it had. A backend that
// takes its time over an error is not asked again at once.
const (
	attachmentsLimit = 10 * time.Second
	attachmentsSlow  = time.Second
	attachmentsPause = 5 * time.Second
)

// Attachments implements backends.Backend.
func (b *backend) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	b.mu.Lock()
	why := b.why
	if time.Since(b.refused) > attachmentsPause {
		why = nil
	}
	b.mu.Unlock()
	if why != nil {
		return nil, why
	}
	bounded, cancel := context.WithTimeout(ctx, attachmentsLimit)
	defer cancel()
	started := time.Now()
	attached, err := b.Backend.Attachments(bounded)
	if err != nil && ctx.Err() == nil && time.Since(started) > attachmentsSlow {
		if bounded.Err() != nil {
			err = backends.Classify(backends.ErrUnavailable, fmt.Errorf("backend %s has not said within %s what is attached here: %w", b.name, attachmentsLimit, err))
		}
		b.mu.Lock()
		b.refused, b.why = time.Now(), err
		b.mu.Unlock()
	}
	return attached, err
}

// etcBackends is where an administrator expects the file; a managed plugin has no /etc
// of the host's.
var etcBackends = "/etc/flocker/backends.yaml"

// backendsFile returns which file names the backends: "" if there is none.
func (s *settings) backendsFile() (string, error) {
	if s.Backends != "" {
		return s.Backends, nil
	}
	return oneOf("FLOCKER_BACKENDS", etcBackends, filepath.Join(s.StateDir, "backends.yaml"))
}

// oneOf returns which of the files is there: "" if none is.
func oneOf(setting string, files ...string) (string, error) {
	var there []string
	for _, file := range slices.Compact(files) {
		_, err := os.Stat(file)
		switch {
		case err == nil:
			there = append(there, file)
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
	}
	if len(there) == 2 {
		return "", fmt.Errorf("there are both %s and %s: remove one, or name one with %s", there[0], there[1], setting)
	}
	return strings.Join(there, ""), nil
}

// loadBackends reads backends.yaml, if there is one, and checks all of it.
func loadBackends(s settings) ([]configured, error) {
	file, err := s.backendsFile()
	if err != nil {
		return nil, err
	}
	var all []configured
	if file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("setting FLOCKER_BACKENDS: %w", err)
		}
		if all, err = parseBackends(file, text); err != nil {
			return nil, err
		}
	}
	dirs := map[string]string{s.LoopbackDir: "loopback"}
	known := slices.Collect(maps.Keys(registry))
	for _, c := range all {
		if _, taken := registry[c.name]; taken {
			return nil, fmt.Errorf("%s, line %d: backend %s is there without it, with settings of its own (FLOCKER_…): use another name", file, c.line, c.name)
		}
		if err := c.check(); err != nil {
			return nil, err
		}
		dir := ""
		switch config := c.config.(type) {
		case *directory:
			dir = filepath.Clean(config.Dir)
		case *share.Config:
			dir = filepath.Clean(config.Dir)
		}
		if dir != "" {
			if other, taken := dirs[dir]; taken {
				return nil, fmt.Errorf("%s, line %d: backend %s: dir %s is that of backend %s", file, c.line, c.name, dir, other)
			}
			dirs[dir] = c.name
		}
		known = append(known, c.name)
	}
	if !slices.Contains(known, s.Backend) {
		slices.Sort(known)
		return nil, fmt.Errorf("setting FLOCKER_BACKEND: unknown backend %q; valid: %s; %s can name more", s.Backend,
			strings.Join(known, ", "), cmp.Or(file, "a file "+etcBackends))
	}
	return all, nil
}
