package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/control/rest"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// start makes the driver, gives it to the server, and runs it until ctx is done. end
// ends the process.
func start(ctx context.Context, s settings, more []configured, srv *server, end func(), log *logrus.Entry) {
	shared := &sharedDriver{end: end, log: log, isCutOff: func() (bool, error) { return mount.IsCutOff(s.MountRoot) }}
	engine := driver.NewEngine(s.DockerSocket)
	var hostPath func(string) string
	if managed() {
		root := &sharedRoot{inside: s.MountRoot, log: log}
		hostPath = root.path
		var watching sync.WaitGroup
		defer watching.Wait()
		watching.Go(func() {
			shared.watch(ctx, func(ctx context.Context) bool { return probe(ctx, s.DockerSocket) == nil })
		})
		watching.Go(func() { root.find(ctx, engine.Root) })
	}
	node, err := persist(ctx, log, "node identity", func() (ownership.Node, error) {
		return driver.LoadNode(s.StateDir, s.Hostname)
	})
	if err != nil {
		return
	}
	if node.Address = s.Address; node.Address == "" {
		node.Address = hostAddress(ctx)
	}
	endpoints := s.EtcdEndpoints
	var dial func(context.Context) (*clientv3.Client, error)
	if len(endpoints) == 0 {
		endpoint, failed := etcdEndpoint(s.EtcdListen, s.etcdCerts() != "")
		if failed != nil {
			log.WithField("err", failed).Error("no etcd inside the plugin")
			return
		}
		endpoints = []string{endpoint}
		// The driver does not wait for it: what is mounted is served without etcd.
		inside := &inside{client: make(chan *clientv3.Client, 1)}
		defer inside.run(ctx, s, log)()
		dial = inside.dial
	}
	store, err := persist(ctx, log, "etcd client", func() (*ownership.Etcd, error) {
		return ownership.NewEtcd(ownership.EtcdConfig{
			Endpoints: endpoints, CAFile: s.EtcdCACert, CertFile: s.EtcdCert, KeyFile: s.EtcdKey,
			User: s.EtcdUser, PasswordFile: s.EtcdPasswordFile, Dial: dial,
		})
	})
	if err != nil {
		return
	}
	defer func() { _ = store.Close() }()
	seen, err := persist(ctx, log, "memory of the cluster", func() (ownership.Seen, error) {
		return driver.LoadSeen(s.StateDir)
	})
	if err != nil {
		return
	}
	var d *driver.Driver // there before owners runs
	owners := ownership.New(store, node, ownership.Config{
		Prefix: s.EtcdPrefix, TTL: s.NodeTTL, Renew: s.NodeRenew, Seen: seen, Log: log,
		Condemned: func(ctx context.Context, death ownership.Death) error { return d.GiveUp(ctx, death) },
		Healthy:   func() error { return d.Healthy() },
		Keep: func(seen ownership.Seen) {
			if d != nil {
				d.KeepSeen(seen)
			}
		},
	})
	storage, ready, err := openBackends(ctx, s, more, node, owners, log)
	if err != nil {
		return
	}
	d, err = persist(ctx, log, "driver", func() (*driver.Driver, error) { //nolint:contextcheck // the driver's work ends with Run
		return driver.New(driver.Config{
			Node: node, Map: owners, Backends: storage, Backend: s.Backend, Ready: ready,
			Mounter: &mount.System{}, Docker: engine, Log: log,
			StateDir: s.StateDir, MountRoot: s.MountRoot, HostPath: hostPath,
			DefaultSize: s.DefaultSize, DefaultFS: s.DefaultFS,
			Linger: s.Linger, BusyWait: s.BusyWait, Hold: s.Hold, Reconcile: s.Reconcile,
		})
	})
	if err != nil {
		return
	}
	var work sync.WaitGroup
	defer work.Wait()
	if managed() {
		shared.verbs = d
		srv.use(shared)
	} else {
		srv.use(d)
	}
	log.WithFields(logrus.Fields{"node": node.ID, "etcd": strings.Join(endpoints, ",")}).Info("ready")
	observer := ownership.NewObserver(owners)
	for name, loop := range map[string]func(context.Context) error{"ownership": owners.Run, "driver": d.Run, "observer": observer.Run} {
		work.Go(func() {
			if err := loop(ctx); ctx.Err() == nil {
				log.WithFields(logrus.Fields{"part": name, "err": err}).Error("stopped by itself")
			}
		})
	}
	work.Go(func() {
		serveAPI(ctx, s, rest.New(rest.Config{Driver: d, Leases: owners, Cluster: observer, Version: version, Log: log}), log)
	})
	work.Go(func() {
		serveControl(ctx, filepath.Join(s.StateDir, "control.sock"), control.New(d, owners, version, log).Observe(observer).Certificates(func() []certs.Expiry { return certificates(s) }), log)
	})
	work.Go(func() { warnOfExpiry(ctx, s, log) })
}

// openBackends makes this host's backends, and the question whether it may own volumes
// of one.
func openBackends(ctx context.Context, s settings, more []configured, node ownership.Node, owners *ownership.Map, log *logrus.Entry) (
	storage map[string]backends.Backend, ready func(ctx context.Context, name string) error, err error,
) {
	storage = map[string]backends.Backend{}
	guards := map[string]*backend{}
	add := func(b *backend) { storage[b.name], guards[b.name] = b, b }
	h := host{node: node.ID, stateDir: s.StateDir, owners: owners}
	for name, open := range registry {
		add(configured{name: name, kind: name}.of(open(s, node), h))
	}
	if len(more) > 0 {
		// Asked for once in the life of a host: from then on it knows its cluster.
		if h.cluster, err = persist(ctx, log, "cluster", func() (string, error) { return owners.Join(ctx) }); err != nil {
			return nil, nil, err
		}
	}
	for _, c := range more {
		b, err := persist(ctx, log, "backend "+c.name, func() (*backend, error) { return c.open(h) })
		if err != nil {
			return nil, nil, err
		}
		if err := c.secrets(); err != nil {
			log.WithField("err", err).Error("a backend cannot be used")
		}
		add(b)
	}
	return storage, func(ctx context.Context, name string) error { return guards[name].ready(ctx) }, nil
}

// inside is the etcd inside the plugin, for its one client.
type inside struct {
	client chan *clientv3.Client
	why    atomic.Pointer[error] // it does not start
}

// run runs it until stop is called, which is after those who use it have ended.
func (i *inside) run(ctx context.Context, s settings, log *logrus.Entry) (stop func()) {
	if s.EtcdInsecure && s.EtcdListen != "" {
		log.WithField("address", s.EtcdListen).Warn("etcd serves whoever reaches it, without certificates")
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		stopEtcd, err := persist(ctx, log, "etcd", func() (func(), error) {
			_, stopEtcd, err := startEtcd(ctx, etcdConfig{
				Dir: s.EtcdDir, Listen: s.EtcdListen, Certs: s.etcdCerts(), Log: log, Ready: func(c *clientv3.Client) { i.client <- c },
			})
			i.why.Store(&err)
			return stopEtcd, err
		})
		if err != nil {
			return
		}
		<-end
		stopEtcd()
	}()
	return func() {
		close(end)
		<-ended
	}
}

// dial waits until it has started.
func (i *inside) dial(ctx context.Context) (*clientv3.Client, error) {
	select {
	case client := <-i.client:
		return client, nil
	case <-ctx.Done():
		if why := i.why.Load(); why != nil && *why != nil {
			return nil, fmt.Errorf("%w (%w)", *why, ctx.Err())
		}
		return nil, ctx.Err()
	}
}

// persist tries until it works or ctx is done. It waits longer from try to try,
// up to some seconds.
func persist[T any](ctx context.Context, log *logrus.Entry, what string, try func() (T, error)) (T, error) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		got, err := try()
		if err == nil || ctx.Err() != nil {
			return got, err
		}
		log.WithFields(logrus.Fields{"part": what, "err": err}).Error("does not start; trying again")
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
			return got, context.Cause(ctx)
		}
	}
}
