package rbd_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/rbd"
)

func TestConfig(t *testing.T) {
	t.Parallel()
	self := rbd.Self{Node: "a", Cluster: "c"}
	good := rbd.Config{Conf: "/etc/ceph/ceph.conf", Pool: "volumes"}
	if _, err := rbd.New(good, self); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*rbd.Config){
		"conf or monitors is needed":                        func(c *rbd.Config) { c.Conf = "" },
		`conf "ceph.conf" must be an absolute path`:         func(c *rbd.Config) { c.Conf = "ceph.conf" },
		"keyring_file \"key\" must be the absolute path":    func(c *rbd.Config) { c.KeyringFile = "key" },
		`without "client."`:                                 func(c *rbd.Config) { c.User = "client.flocker" },
		"pool is missing":                                   func(c *rbd.Config) { c.Pool = "" },
		`default: pool "a b" is none`:                       func(c *rbd.Config) { c.Pool = "a b" },
		`namespace "a/b" is none`:                           func(c *rbd.Config) { c.Namespace = "a/b" },
		`monitors: "a b" is no address`:                     func(c *rbd.Config) { c.Monitors = []string{"a b"} },
		"profile fast: features: exclusive-lock is missing": func(c *rbd.Config) { c.Profiles = map[string]rbd.Profile{"fast": {Features: []string{"layering"}}} },
		`features: "journaling" cannot be chosen; use some of layering, exclusive-lock, object-map, fast-diff, deep-flatten, striping`: func(c *rbd.Config) {
			c.Default.Features = []string{"exclusive-lock", "journaling"}
		},
		"object_size 5000B: use a power of two":                           func(c *rbd.Config) { c.Default.ObjectSize = 5000 },
		"profiles: one has no name":                                       func(c *rbd.Config) { c.Profiles = map[string]rbd.Profile{"": {}} },
		`attach: "iscsi" is no way to attach an image: use krbd, rbd-nbd`: func(c *rbd.Config) { c.Attach = "iscsi" },
		"must be an absolute path of at most 70 characters":               func(c *rbd.Config) { c.RunDir = "/" + strings.Repeat("x", 80) },
		"the names of pool and namespace have more than 60 characters":    func(c *rbd.Config) { c.Pool = strings.Repeat("x", 61) },
		`profile fast: data_pool "a/b" is none`:                           func(c *rbd.Config) { c.Profiles = map[string]rbd.Profile{"fast": {DataPool: "a/b"}} },
	} {
		cfg := good
		change(&cfg)
		_, err := rbd.New(cfg, self)
		if !errors.Is(err, backends.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, err := rbd.New(good, rbd.Self{}); !errors.Is(err, backends.ErrInvalid) {
		t.Errorf("without a node: got %v", err)
	}
}

func TestUnknownProfile(t *testing.T) {
	t.Parallel()
	b, err := rbd.New(rbd.Config{Conf: "/etc/ceph/ceph.conf", Pool: "volumes", Profiles: map[string]rbd.Profile{"gold": {}, "silver": {}}}, rbd.Self{Node: "a", Cluster: "c"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Create(t.Context(), backends.CreateRequest{ID: "6e6a7a0c-63ad-4a66-a7f1-3c5a2a9c1f10", Cluster: "c", Size: 1, Profile: "bronze"})
	if want := `there is no profile "bronze"; use gold, silver`; !errors.Is(err, backends.ErrInvalid) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}
