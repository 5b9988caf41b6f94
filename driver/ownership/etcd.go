package ownership

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// EtcdConfig says how to reach etcd.
type EtcdConfig struct {
	// Endpoints are host:port or URLs.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files. Any of them, and any https
	// endpoint, makes the connection TLS; they are read anew for each connection.
	CAFile, CertFile, KeyFile string
	// User and PasswordFile authenticate this node.
	User, PasswordFile string
	// Dial, if set, is how to reach an etcd in this process instead, without a
	// socket in between; Endpoints are then for error texts. It waits for etcd until
	// ctx ends, and is not called again after it has returned a client, which the
	// Etcd closes.
	Dial func(ctx context.Context) (*clientv3.Client, error)
}

// Etcd is the Store on an etcd cluster. A member that has lost the others refuses
// at once, so that the next try goes to another one: it would let every call wait
// until its deadline, and one such member of three is enough to keep a node, which
// makes its calls in the same order each time, from ever registering.
type Etcd struct {
	config clientv3.Config
	dial   func(ctx context.Context) (*clientv3.Client, error)
	where  string
	secure *etcdTLS // nil: it has no TLS

	mu     chan struct{} // held while it has an element; authentication takes time
	client *clientv3.Client
	closed bool
}

var _ Store = (*Etcd)(nil)

// NewEtcd checks the configuration and reads its files; it connects with the
// first call, so that etcd may come later.
func NewEtcd(cfg EtcdConfig) (*Etcd, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("no etcd endpoints are set")
	}
	config := clientv3.Config{
		Endpoints: cfg.Endpoints,
		// Only the first authentication waits this long.
		DialTimeout:          2 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		Logger:               zap.NewNop(),
		// By default connecting is tried again only every two minutes in the end.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		})},
	}
	var secure *etcdTLS
	https := false
	for _, e := range cfg.Endpoints {
		https = https || strings.HasPrefix(e, "https://")
	}
	if https || cfg.CAFile != "" || cfg.CertFile != "" || cfg.KeyFile != "" {
		var err error
		if secure, err = newEtcdTLS(cfg); err != nil {
			return nil, err
		}
		config.DialOptions = append(config.DialOptions, grpc.WithTransportCredentials(secure))
	}
	if cfg.PasswordFile != "" {
		b, err := os.ReadFile(cfg.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("read etcd password: %w", err)
		}
		config.Password = strings.TrimRight(string(b), "\r\n")
	}
	if config.Username = cfg.User; (config.Username == "") != (config.Password == "") {
		return nil, errors.New("etcd needs both a user and a password file, or neither")
	}
	e := &Etcd{config: config, dial: cfg.Dial, secure: secure, where: strings.Join(cfg.Endpoints, ", "), mu: make(chan struct{}, 1)}
	if e.dial == nil {
		e.dial = func(context.Context) (*clientv3.Client, error) { return clientv3.New(e.config) }
	}
	return e, nil
}

// connect returns the client. With a user, making it asks etcd for a token, and
// so fails while etcd is away.
func (e *Etcd) connect(ctx context.Context) (*clientv3.Client, error) {
	select {
	case e.mu <- struct{}{}:
		defer func() { <-e.mu }()
	case <-ctx.Done():
		return nil, e.wrap(ctx.Err())
	}
	if e.closed {
		return nil, errors.New("connection to etcd is closed")
	}
	if e.client == nil {
		client, err := e.dial(ctx)
		if err != nil {
			return nil, e.wrap(err)
		}
		e.client = client
	}
	return e.client, nil
}

// wrap names the endpoints, and maps the errors that Store tells apart.
func (e *Etcd) wrap(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		err = ErrLease
	case errors.Is(err, rpctypes.ErrNoLeader):
		err = ErrNoLeader
	case errors.Is(err, rpctypes.ErrCompacted):
		err = ErrCompacted
	case errors.Is(err, context.DeadlineExceeded):
		if why := e.secure.reason(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		return fmt.Errorf("etcd at %s does not answer: %w", e.where, err)
	case status.Code(err) == codes.Unavailable:
		if why := e.secure.reason(); why != nil {
			err = why
		}
	}
	return fmt.Errorf("etcd at %s: %w", e.where, err)
}

// Close closes the connection.
func (e *Etcd) Close() error {
	e.mu <- struct{}{}
	defer func() { <-e.mu }()
	e.closed = true
	if e.client == nil {
		return nil
	}
	return e.client.Close()
}

// Txn is Store's.
func (e *Etcd) Txn(ctx context.Context, txn Txn) (TxnResult, error) {
	if len(txn.Then)+len(txn.Else) == 0 {
		return TxnResult{}, errNoOps
	}
	client, err := e.connect(ctx)
	if err != nil {
		return TxnResult{}, err
	}
	res, err := client.Txn(clientv3.WithRequireLeader(ctx)).If(etcdCmps(txn.If)...).Then(etcdOps(txn.Then)...).Else(etcdOps(txn.Else)...).Commit()
	if err != nil {
		return TxnResult{}, e.wrap(err)
	}
	return fromEtcd(res), nil
}

func etcdCmps(cmps []Cmp) []clientv3.Cmp {
	out := make([]clientv3.Cmp, len(cmps))
	for i, c := range cmps {
		sign := "="
		if c.Not {
			sign = "!="
		}
		switch c.Target {
		case CreateRevision:
			out[i] = clientv3.Compare(clientv3.CreateRevision(c.Key), sign, c.Value)
		case ModRevision:
			out[i] = clientv3.Compare(clientv3.ModRevision(c.Key), sign, c.Value)
		case LeaseID:
			out[i] = clientv3.Compare(clientv3.LeaseValue(c.Key), sign, c.Value)
		}
		if c.Prefix {
			out[i] = out[i].WithPrefix()
		}
	}
	return out
}

func etcdOps(ops []Op) []clientv3.Op {
	out := make([]clientv3.Op, len(ops))
	for i, op := range ops {
		switch op.Kind {
		case OpGet:
			var opts []clientv3.OpOption
			if op.Prefix {
				opts = append(opts, clientv3.WithPrefix())
			}
			if op.Revision > 0 {
				opts = append(opts, clientv3.WithRev(op.Revision))
			}
			if op.Limit > 0 {
				opts = append(opts, clientv3.WithMinModRev(op.After+1), clientv3.WithLimit(int64(op.Limit)),
					clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortAscend))
			}
			out[i] = clientv3.OpGet(op.Key, opts...)
		case OpPut:
			out[i] = clientv3.OpPut(op.Key, string(op.Value), clientv3.WithLease(clientv3.LeaseID(op.Lease)))
		case OpDelete:
			out[i] = clientv3.OpDelete(op.Key)
		case OpTxn:
			out[i] = clientv3.OpTxn(etcdCmps(op.Txn.If), etcdOps(op.Txn.Then), etcdOps(op.Txn.Else))
		}
	}
	return out
}

func fromEtcd(res *clientv3.TxnResponse) TxnResult {
	out := TxnResult{Succeeded: res.Succeeded, Revision: res.Header.GetRevision(), Results: make([]OpResult, len(res.Responses))}
	for i, r := range res.Responses {
		if get := r.GetResponseRange(); get != nil {
			for _, kv := range get.Kvs {
				out.Results[i].KVs = append(out.Results[i].KVs, KV{
					Key: string(kv.Key), Value: kv.Value, Lease: kv.Lease, Version: kv.Version,
					CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision,
				})
			}
		}
		if del := r.GetResponseDeleteRange(); del != nil {
			out.Results[i].Deleted = del.Deleted
		}
		if txn := r.GetResponseTxn(); txn != nil {
			nested := fromEtcd((*clientv3.TxnResponse)(txn))
			out.Results[i].Txn = &nested
		}
	}
	return out
}

// Grant is Store's.
func (e *Etcd) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	client, err := e.connect(ctx)
	if err != nil {
		return 0, 0, err
	}
	res, err := client.Grant(clientv3.WithRequireLeader(ctx), int64(math.Ceil(ttl.Seconds())))
	if err != nil {
		return 0, 0, e.wrap(err)
	}
	return int64(res.ID), time.Duration(res.TTL) * time.Second, nil
}

// KeepAliveOnce is Store's.
func (e *Etcd) KeepAliveOnce(ctx context.Context, lease int64) (time.Duration, int64, error) {
	client, err := e.connect(ctx)
	if err != nil {
		return 0, 0, err
	}
	res, err := client.KeepAliveOnce(clientv3.WithRequireLeader(ctx), clientv3.LeaseID(lease))
	if err != nil {
		return 0, 0, e.wrap(err)
	}
	return time.Duration(res.TTL) * time.Second, res.GetRevision(), nil
}

// Revoke is Store's.
func (e *Etcd) Revoke(ctx context.Context, lease int64) error {
	client, err := e.connect(ctx)
	if err != nil {
		return err
	}
	if _, err := client.Revoke(clientv3.WithRequireLeader(ctx), clientv3.LeaseID(lease)); err != nil {
		return e.wrap(err)
	}
	return nil
}

// Watch is Store's. It ends when its etcd member has lost the leader, to be
// started again on another one.
func (e *Etcd) Watch(ctx context.Context, key string, prefix bool, from int64) <-chan WatchResult {
	out := make(chan WatchResult)
	go func() {
		defer close(out)
		send := func(r WatchResult) bool {
			select {
			case out <- r:
				return true
			case <-ctx.Done():
				return false
			}
		}
		client, err := e.connect(ctx)
		if err != nil {
			send(WatchResult{Err: err})
			return
		}
		ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
		defer cancel()
		opts := []clientv3.OpOption{clientv3.WithRev(from), clientv3.WithProgressNotify()}
		if from == 0 {
			opts = append(opts, clientv3.WithCreatedNotify())
		}
		if prefix {
			opts = append(opts, clientv3.WithPrefix())
		}
		for res := range client.Watch(ctx, key, opts...) {
			if err := res.Err(); err != nil {
				send(WatchResult{Err: e.wrap(err)})
				return
			}
			if !send(watched(res)) {
				return
			}
		}
		send(WatchResult{Err: e.wrap(cmp.Or(ctx.Err(), errors.New("watch ended")))})
	}()
	return out
}

func watched(res clientv3.WatchResponse) WatchResult {
	out := WatchResult{Revision: res.Header.GetRevision()}
	for _, ev := range res.Events {
		kv := KV{
			Key: string(ev.Kv.Key), Value: ev.Kv.Value, Lease: ev.Kv.Lease, Version: ev.Kv.Version,
			CreateRevision: ev.Kv.CreateRevision, ModRevision: ev.Kv.ModRevision,
		}
		out.Events = append(out.Events, KeyEvent{Deleted: ev.Type == clientv3.EventTypeDelete, KV: kv})
	}
	return out
}
