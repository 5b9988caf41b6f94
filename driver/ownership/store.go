package ownership

import (
	"context"
	"errors"
	"time"
)

// A Store is the part of etcd that the map is made of: transactions, leases and
// watches, with etcd's meaning to the letter. Etcd is the real one, Memory the
// one for tests. It decides nothing; every rule about ownership is in Map.
//
// An error from Txn leaves open whether the transaction was applied, was not, or
// will be later.
type Store interface {
	// Txn runs one transaction. Without puts and deletes on either branch it is a
	// linearizable read. One without any operation is refused: etcd would answer it
	// from whatever state the member that is asked has. ErrLease if a put names a lease that is gone; nothing of
	// the transaction is applied then.
	Txn(ctx context.Context, txn Txn) (TxnResult, error)

	// Grant makes a lease. The server may lengthen ttl; the one in force is
	// returned.
	Grant(ctx context.Context, ttl time.Duration) (lease int64, granted time.Duration, err error)

	// KeepAliveOnce renews a lease for the time returned. ErrLease if it is gone.
	// revision is the one the member that was asked has got to: not later than the
	// store's, and earlier if it lags behind.
	KeepAliveOnce(ctx context.Context, lease int64) (ttl time.Duration, revision int64, err error)

	// Revoke ends a lease and deletes the keys on it. ErrLease if it is gone.
	Revoke(ctx context.Context, lease int64) error

	// Watch reports every change of the key, or of all keys with that prefix, from
	// revision from on (included). 0 is from now on; a WatchResult without events
	// says then that it has begun, and this is the quicker way: etcd lets a watch
	// that has something to catch up with wait for up to 100 ms. The channel is closed when ctx is done, or after
	// a WatchResult with Err. A reader that does not read delays nobody else.
	Watch(ctx context.Context, key string, prefix bool, from int64) <-chan WatchResult

	// Close lets go of connections. Calls made after it fail.
	Close() error
}

// A Txn is one transaction: if all of If hold, Then is done, and Else otherwise.
// All compares, also those of nested transactions, see the state before it.
type Txn struct {
	If   []Cmp
	Then []Op
	Else []Op
}

// A Cmp is one compare. An absent key has create revision, mod revision and
// lease 0.
type Cmp struct {
	Key    string
	Target Target
	// Not turns "equals" into "does not equal".
	Not   bool
	Value int64
	// Prefix compares every key with that prefix; with none of them it is as if
	// one absent key were compared.
	Prefix bool
}

// Target is what a Cmp looks at.
type Target int

// The targets of a Cmp.
const (
	CreateRevision Target = iota
	ModRevision
	LeaseID
)

// An Op is one operation of a transaction.
type Op struct {
	Kind  OpKind
	Key   string
	Value []byte // of a put
	Lease int64  // of a put; 0 is none
	// Prefix makes a get one of every key with that prefix, sorted by key.
	Prefix bool
	// Revision makes a get one of the state at that revision; 0 is the latest.
	// Only in transactions that write nothing.
	Revision int64
	// Limit makes a get with Prefix one of the first Limit keys that were changed last
	// after revision After, in the order of these changes; that of keys which were
	// changed together is not defined.
	After int64
	Limit int
	// Txn is the nested transaction.
	Txn *Txn
}

// OpKind says what an Op does.
type OpKind int

// The kinds of an Op.
const (
	OpGet OpKind = iota
	OpPut
	OpDelete
	OpTxn
)

// A TxnResult is what a transaction did.
type TxnResult struct {
	// Succeeded says that Then was done.
	Succeeded bool
	// Revision is the store's revision after it: the mod revision of its puts.
	Revision int64
	// Results has one entry for each Op of the branch that was done.
	Results []OpResult
}

// An OpResult is what one Op returned.
type OpResult struct {
	KVs     []KV       // of a get
	Deleted int64      // of a delete: 0 or 1
	Txn     *TxnResult // of a nested transaction
}

// A KV is a key with its value and revisions.
type KV struct {
	Key            string
	Value          []byte
	CreateRevision int64
	ModRevision    int64
	Version        int64
	Lease          int64
}

// A WatchResult is one report of a watch.
type WatchResult struct {
	// Revision is the revision up to which everything was reported.
	Revision int64
	Events   []KeyEvent
	// Err ends the watch; ErrCompacted if what it asked for is no longer kept.
	Err error
}

// A KeyEvent is one change of one key. Of a deletion, KV has the key and, as mod
// revision, the deletion's revision.
type KeyEvent struct {
	Deleted bool
	KV      KV
}

// The errors that a Store tells apart. Compare with errors.Is.
var (
	// ErrLease: the lease is gone.
	ErrLease = errors.New("lease is gone")
	// ErrNoLeader: nothing was done, because the member of etcd that was asked has lost
	// the others. Another one may answer, or this one soon.
	ErrNoLeader = errors.New("etcd has no leader")
	// ErrCompacted: the revision asked for is no longer kept.
	ErrCompacted = errors.New("revision is compacted")
)

func has(key string) Cmp                 { return Cmp{Key: key, Target: CreateRevision, Not: true} }
func none(key string) Cmp                { return Cmp{Key: key, Target: CreateRevision} }
func nonePrefix(prefix string) Cmp       { return Cmp{Key: prefix, Target: CreateRevision, Prefix: true} }
func mod(key string, revision int64) Cmp { return Cmp{Key: key, Target: ModRevision, Value: revision} }
func onLease(key string, id int64) Cmp   { return Cmp{Key: key, Target: LeaseID, Value: id} }

func get(key string) Op          { return Op{Kind: OpGet, Key: key} }
func getPrefix(prefix string) Op { return Op{Kind: OpGet, Key: prefix, Prefix: true} }
func del(key string) Op          { return Op{Kind: OpDelete, Key: key} }
func nest(txn Txn) Op            { return Op{Kind: OpTxn, Txn: &txn} }

func put(key string, value []byte) Op { return Op{Kind: OpPut, Key: key, Value: value} }

func putOn(lease int64, key string, value []byte) Op {
	return Op{Kind: OpPut, Key: key, Value: value, Lease: lease}
}

// errNoOps refuses a transaction that does nothing.
var errNoOps = errors.New("a transaction without operations may be answered from an old state")

// kv is the one key a get of the i-th operation returned, or nil.
func (r TxnResult) kv(i int) *KV {
	if i >= len(r.Results) || len(r.Results[i].KVs) == 0 {
		return nil
	}
	return &r.Results[i].KVs[0]
}

// writes says whether either branch changes anything.
func (t Txn) writes() bool {
	for _, ops := range [][]Op{t.Then, t.Else} {
		for _, op := range ops {
			if op.Kind == OpPut || op.Kind == OpDelete || op.Kind == OpTxn && op.Txn.writes() {
				return true
			}
		}
	}
	return false
}
