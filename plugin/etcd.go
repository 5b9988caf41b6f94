package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// etcdAddress is where the etcd inside the plugin listens for the plugin alone.
const etcdAddress = "127.0.0.1:24379"

// etcdReady is how long the etcd inside the plugin may take to start: it reads
// its whole log, on a disk that may be busy at boot.
const etcdReady = 60 * time.Second

// etcdConfig sets up the etcd inside the plugin.
type etcdConfig struct {
	// Dir holds its data. It is made if it is not there.
	Dir string
	// Listen is the host:port to serve other hosts on, without TLS; empty is this
	// host only.
	Listen string
	// Ready, if set, gets a client that needs no socket.
	Ready func(*clientv3.Client)
	// Log gets its errors.
	Log *logrus.Entry
}

// startEtcd runs an etcd of one member in this process until stop is called, and
// returns the endpoint to reach it at. It blocks until etcd is ready; after an
// error it may be called again.
func startEtcd(ctx context.Context, cfg etcdConfig) (endpoint string, stop func(), err error) {
	listen := cmp.Or(cfg.Listen, etcdAddress)
	endpoint, err = etcdEndpoint(cfg.Listen)
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}

	if reason, ok := etcdGivenUp.Load(cfg.Dir); ok {
		return "", nil, fmt.Errorf("start etcd in %s: %v", cfg.Dir, reason)
	}
	unlock, err := lockEtcdDir(cfg.Dir)
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}
	// etcd's own message about this is not for people.
	probe, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		unlock()
		return "", nil, fmt.Errorf("start etcd: cannot listen on %s; free it, or set FLOCKER_ETCD_LISTEN to another address: %w", listen, err)
	}
	bind := probe.Addr().String() // etcd wants an IP address
	_ = probe.Close()

	log := &etcdLog{log: cfg.Log, given: make(chan string, 1)}
	config := embedConfig(cfg.Dir, bind, endpoint, log)
	started := make(chan embedded, 1)
	go func() {
		server, err := embed.StartEtcd(config)
		started <- embedded{server, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, etcdReady)
	defer cancel()
	select {
	case e := <-started:
		if e.err != nil {
			unlock()
			return "", nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, e.err)
		}
		stop = func() {
			log.closing.Store(true)
			e.Close()
			unlock()
		}
		select {
		case <-e.Server.ReadyNotify():
			log.ready.Store(true)
			if cfg.Ready != nil {
				cfg.Ready(v3client.New(e.Server))
			}
			return endpoint, stop, nil
		case reason := <-log.given:
			return "", nil, giveUp(cfg.Dir, reason)
		case err = <-e.Err():
		case <-ctx.Done():
			err = ctx.Err()
		}
		stop()
		return "", nil, fmt.Errorf("start etcd in %s: it is not ready: %w", cfg.Dir, err)
	case reason := <-log.given:
		return "", nil, giveUp(cfg.Dir, reason)
	case <-ctx.Done():
		go func() {
			// The directory stays locked until etcd has let go of it.
			if e := <-started; e.err == nil {
				log.closing.Store(true)
				e.Close()
			}
			unlock()
		}()
		return "", nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, ctx.Err())
	}
}

// embedded is what came of starting one.
type embedded struct {
	*embed.Etcd

	err error
}

// etcdGivenUp has, by directory, why an etcd ended the process, or would have:
// what is left of it cannot be stopped and holds the directory.
var etcdGivenUp sync.Map

func giveUp(dir, reason string) error {
	reason += "; repair or restore its data, then start the plugin again"
	etcdGivenUp.Store(dir, reason)
	return fmt.Errorf("start etcd in %s: %s", dir, reason)
}

// etcdEndpoint is what startEtcd will return for that address to listen on, so
// that clients can be made before there is a server.
func etcdEndpoint(listen string) (string, error) {
	listen = cmp.Or(listen, etcdAddress)
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", fmt.Errorf("address %q is not of the form host:port", listen)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, port), nil
}

// lockEtcdDir makes the directory, and keeps other processes from running an
// etcd on it: etcd would wait for them without end.
func lockEtcdDir(dir string) (unlock func(), err error) {
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make its directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock its directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errors.New("another process uses it")
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock its directory %s: %w", dir, err)
	}
	return func() { _ = f.Close() }, nil
}

func embedConfig(dir, bind, endpoint string, log *etcdLog) *embed.Config {
	c := embed.NewConfig()
	c.Name = "flocker"
	c.Dir = filepath.Join(dir, "member-data")
	c.ListenClientUrls = []url.URL{{Scheme: "http", Host: bind}}
	c.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: strings.TrimPrefix(endpoint, "http://")}}
	// There are no peers, and nothing listens for any. The URL is only a name.
	c.ListenPeerUrls = nil
	c.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:24380"}}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.EnableGRPCGateway = false
	// Watches go on over an hour's outage of their node.
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	c.QuotaBackendBytes = 1 << 30
	// The log between snapshots is kept in memory.
	c.SnapshotCount, c.SnapshotCatchUpEntries = 2000, 500
	c.MaxSnapFiles, c.MaxWalFiles = 2, 2

	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(log, zap.WithPanicHook(log), zap.WithFatalHook(log)))
	return c
}

// etcdLog passes etcd's errors on to the plugin's log, and nothing else.
type etcdLog struct {
	log     *logrus.Entry
	ready   atomic.Bool
	closing atomic.Bool
	given   chan string // why etcd gave up before it was ready
}

var (
	_ zapcore.Core           = (*etcdLog)(nil)
	_ zapcore.CheckWriteHook = (*etcdLog)(nil)
)

// Enabled is zapcore.Core's.
func (l *etcdLog) Enabled(level zapcore.Level) bool {
	return level >= zapcore.ErrorLevel && !l.closing.Load()
}

// With is zapcore.Core's. The fields are etcd's own, such as its member id.
func (l *etcdLog) With([]zapcore.Field) zapcore.Core { return l }

// Check is zapcore.Core's.
func (l *etcdLog) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if l.Enabled(e.Level) {
		return ce.AddCore(e, l)
	}
	return ce
}

// Write is zapcore.Core's.
func (l *etcdLog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	l.log.WithFields(logrusFields(fields)).Error("etcd: " + e.Message)
	return nil
}

// Sync is zapcore.Core's.
func (l *etcdLog) Sync() error { return nil }

// OnWrite is called when etcd wants to end the process. While it starts, only
// its own goroutine ends, and startEtcd tells why: the plugin goes on to serve
// what it can. Later the process does end, since etcd's state is unknown then,
// and is started again by whoever started it.
func (l *etcdLog) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	reason := e.Message
	if err, ok := logrusFields(fields)["error"]; ok {
		reason = fmt.Sprintf("%s: %v", reason, err)
	}
	if l.ready.Load() && !l.closing.Load() {
		panic("etcd: " + reason)
	}
	select {
	case l.given <- reason:
	default:
	}
	runtime.Goexit()
}

func logrusFields(fields []zapcore.Field) logrus.Fields {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	return enc.Fields
}
