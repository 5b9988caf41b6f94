package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
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
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/flocker-plugin/flocker/control/certs"
)

// etcdAlone is the endpoint of an etcd that serves the plugin alone, for error texts: it
// listens nowhere, since whoever reached it could change who has which volume.
const etcdAlone = "this host"

// etcdReady is how long the etcd inside the plugin may take to start: it reads
// its whole log, on a disk that may be busy at boot.
const etcdReady = 60 * time.Second

// etcdConfig sets up the etcd inside the plugin.
type etcdConfig struct {
	// Dir holds its data. It is made if it is not there.
	Dir string
	// Listen is the host:port to serve other hosts on; empty is this process only.
	Listen string
	// Certs is the directory with this host's certificates: with them it has TLS, and
	// takes the cluster's hosts alone. Empty: it has none, and takes everybody.
	Certs string
	// Ready, if set, gets a client that needs no socket.
	Ready func(*clientv3.Client)
	// Log gets its errors.
	Log *logrus.Entry
}

// startEtcd runs an etcd of one member in this process until stop is called, and
// returns the endpoint to reach it at. It blocks until etcd is ready; after an
// error it may be called again.
func startEtcd(ctx context.Context, cfg etcdConfig) (endpoint string, stop func(), err error) {
	endpoint, err = etcdEndpoint(cfg.Listen, cfg.Certs != "")
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}

	if reason, ok := etcdGivenUp.Load(cfg.Dir); ok {
		return "", nil, fmt.Errorf("start etcd in %s: %v", cfg.Dir, reason)
	}
	creds, err := cfg.admission()
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}
	unlock, err := lockEtcdDir(cfg.Dir)
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}
	var listener net.Listener
	if cfg.Listen != "" {
		if listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Listen); err != nil {
			unlock()
			return "", nil, fmt.Errorf("start etcd: cannot listen on %s; free it, or set FLOCKER_ETCD_LISTEN to another address: %w", cfg.Listen, err)
		}
		defer func() {
			if err != nil {
				_ = listener.Close()
			}
		}()
	}

	log := &etcdLog{log: cfg.Log, given: make(chan string, 1)}
	config := embedConfig(cfg.Dir, endpoint, log)
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
		end := func() {
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
			if listener == nil {
				return endpoint, end, nil
			}
			server := serveEtcd(e.Server, listener, creds)
			return endpoint, func() { server.Stop(); end() }, nil
		case reason := <-log.given:
			return "", nil, giveUp(cfg.Dir, reason)
		case err = <-e.Err():
		case <-ctx.Done():
			err = ctx.Err()
		}
		end()
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
func etcdEndpoint(listen string, secure bool) (string, error) {
	if listen == "" {
		return etcdAlone, nil
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", fmt.Errorf("address %q is not of the form host:port", listen)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	scheme := "http"
	if secure {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port), nil
}

// Who has no certificate can keep a connection for that long, and so many of them.
const (
	etcdHandshake   = 10 * time.Second
	etcdConnections = 1000
)

// serveEtcd answers clients. etcd could do that by itself, but it would know no
// authority other than the one there was when it started.
func serveEtcd(etcd *etcdserver.EtcdServer, listener net.Listener, creds credentials.TransportCredentials) *grpc.Server {
	server := v3rpc.Server(etcd, nil, nil, grpc.Creds(creds), grpc.ConnectionTimeout(etcdHandshake),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: embed.DefaultGRPCKeepAliveMinTime}))
	go func() { _ = server.Serve(netutil.LimitListener(listener, etcdConnections)) }() // until it is stopped
	return server
}

// admission is who gets in.
func (cfg etcdConfig) admission() (credentials.TransportCredentials, error) {
	if cfg.Certs == "" {
		return insecure.NewCredentials(), nil
	}
	in := func(file string) string { return filepath.Join(cfg.Certs, file) }
	files := certs.Files{CA: in(certs.CAFile), Cert: in(certs.NodeFile), Key: in(certs.NodeKey)}
	own, err := certs.Load(files, func(err error) { cfg.Log.WithField("err", err).Error("etcd serves other hosts as before") })
	if err != nil {
		return nil, err
	}
	return &admission{TransportCredentials: credentials.NewTLS(own.Server(certs.Node)), log: cfg.Log}, nil
}

// An admission lets hosts of the cluster in, and says in the log who stays outside.
type admission struct {
	credentials.TransportCredentials

	log *logrus.Entry

	mu     sync.Mutex
	last   time.Time // when it said so
	others int       // who stayed outside since
}

// ServerHandshake implements credentials.TransportCredentials.
func (a *admission) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := a.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		a.refused(raw.RemoteAddr(), err)
	}
	return conn, info, err
}

// refusals is how long the log is spared after one: whoever reaches the port can cause
// them at any rate.
var refusals = 10 * time.Second

func (a *admission) refused(who net.Addr, err error) {
	if _, cut := errors.AsType[net.Error](err); errors.Is(err, io.EOF) || cut && !strings.Contains(err.Error(), "tls: ") {
		return // who only looks whether something listens
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.last) < refusals {
		a.others++
		return
	}
	fields := logrus.Fields{"from": who.String(), "err": err}
	if a.others > 0 {
		fields["others"] = a.others
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		fields["hint"] = "if it is a host, its FLOCKER_ETCD_ENDPOINTS have to begin with https://"
	}
	a.log.WithFields(fields).Warn("etcd does not let somebody in")
	a.last, a.others = time.Now(), 0
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

func embedConfig(dir, endpoint string, log *etcdLog) *embed.Config {
	c := embed.NewConfig()
	c.Name = "flocker"
	c.Dir = filepath.Join(dir, "member-data")
	// Clients are served by serveEtcd. What is advertised is only a name.
	c.ListenClientUrls, c.AdvertiseClientUrls = nil, []url.URL{{Scheme: "http", Host: "127.0.0.1:24379"}}
	if scheme, host, ok := strings.Cut(endpoint, "://"); ok {
		c.AdvertiseClientUrls = []url.URL{{Scheme: scheme, Host: host}}
	}
	// There are no peers, and nothing listens for any. The URL is only a name, too.
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
