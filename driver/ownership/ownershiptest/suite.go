// Package ownershiptest is the contract of package ownership in executable form:
// it runs every transaction of the map, and the races between them, over a store.
package ownershiptest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Config is what the suite needs of a store.
type Config struct {
	// New returns a cluster with nothing in it under its prefix.
	New func(t *testing.T) Cluster
}

// Cluster is an empty cluster.
type Cluster struct {
	// Prefix is what the keys are to begin with.
	Prefix string
	// Connect makes one node's connection; the suite closes it.
	Connect func() ownership.Store
	// Compact forgets the history before a revision.
	Compact func(revision int64)
}

// ttl is the shortest that etcd can be made to accept.
const ttl = time.Second

// slow is how long a call may take on a busy machine.
const slow = 10 * time.Second

// Run runs the suite.
func Run(t *testing.T, cfg Config) {
	cases := []struct {
		name string
		run  func(*rig)
	}{
		{"Register", register},
		{"RegisterRestarted", registerRestarted},
		{"RegisterCopy", registerCopy},
		{"RegisterRemoved", registerRemoved},
		{"RegisterLeaseRevoked", registerLeaseRevoked},
		{"RegisterAmbiguous", registerAmbiguous},
		{"RegisterMeanwhile", registerMeanwhile},
		{"RegisterOtherCluster", registerOtherCluster},
		{"Unhealthy", unhealthy},
		{"Create", create},
		{"CreateTwentyNodes", createTwentyNodes},
		{"CreateAmbiguous", createAmbiguous},
		{"Ready", ready},
		{"Update", update},
		{"Claim", claim},
		{"ClaimPhases", claimPhases},
		{"ClaimRace", claimRace},
		{"ClaimAmbiguous", claimAmbiguous},
		{"ClaimLate", claimLate},
		{"ClaimWithoutLease", claimWithoutLease},
		{"TokenFixed", tokenFixed},
		{"Release", release},
		{"ReleaseAfterLeaseLoss", releaseAfterLeaseLoss},
		{"Retake", retake},
		{"Request", request},
		{"RequestOrder", requestOrder},
		{"RequestLeaseEnds", requestLeaseEnds},
		{"HandOver", handOver},
		{"HandOverWithdrawn", handOverWithdrawn},
		{"HandOverAmbiguous", handOverAmbiguous},
		{"HandOverLate", handOverLate},
		{"HandOverWithdrawRace", handOverWithdrawRace},
		{"Followed", followed},
		{"Formatted", formatted},
		{"Delete", deletes},
		{"DeleteOwned", deleteOwned},
		{"DeleteAmbiguous", deleteAmbiguous},
		{"DeleteClaimRace", deleteClaimRace},
		{"DeleteClaimedMeanwhile", deleteClaimedMeanwhile},
		{"DeleteSnapshots", deleteSnapshots},
		{"Views", views},
		{"Broken", broken},
		{"NoToken", noToken},
		{"Outage", outage},
		{"OwnerDies", ownerDies},
		{"Watch", watch},
		{"Audit", audit},
		{"Seize", seize},
		{"SeizeAmbiguous", seizeAmbiguous},
		{"SeizeLate", seizeLate},
		{"SeizeRace", seizeRace},
		{"SeizeMeanwhile", seizeMeanwhile},
		{"SeizeIdentities", seizeIdentities},
		{"Identified", identified},
		{"Joins", joins},
		{"SeizeRebooted", seizeRebooted},
		{"SeizeConfirmed", seizeConfirmed},
		{"SeizePending", seizePending},
		{"SeizeNotSettled", seizeNotSettled},
		{"SeizeWithoutLease", seizeWithoutLease},
		{"Quarantine", quarantine},
		{"DeclareDead", declareDead},
		{"DeclareDeadAmbiguous", declareDeadAmbiguous},
		{"DeclareDeadMeanwhile", declareDeadMeanwhile},
		{"CondemnedBack", condemnedBack},
		{"CondemnedNobody", condemnedNobody},
		{"CondemnedMeanwhile", condemnedMeanwhile},
		{"CondemnedLive", condemnedLive},
		{"Registrations", registrations},
		{"Silence", silence},
		{"Unsafe", unsafe},
		{"UnsafeBeforehand", unsafeBeforehand},
		{"AcceptRestore", acceptRestore},
		{"AcceptRestoreRefused", acceptRestoreRefused},
		{"Catalog", catalog},
		{"CatalogAmbiguous", catalogAmbiguous},
		{"CatalogBroken", catalogBroken},
		{"Place", place},
		{"PlaceRefused", placeRefused},
		{"PlaceAmbiguous", placeAmbiguous},
		{"PlaceTogether", placeTogether},
		{"PlaceHere", placeHere},
		{"PlaceWatched", placeWatched},
		{"Present", present},
		{"Lease", lease},
		{"LeaseEnds", leaseEnds},
		{"LeaseAmbiguous", leaseAmbiguous},
		{"Cordon", cordon},
		{"RemoveNode", removeNode},
		{"DeletePlaced", deletePlaced},
		{"Observe", observe},
		{"ObserveFaults", observeFaults},
		{"Events", events},
		{"SilentNodes", silentNodes},
		{"By", by},
		{"ChangedAfter", changedAfter},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cluster := cfg.New(t)
			store := cluster.Connect()
			t.Cleanup(func() { _ = store.Close() })
			c.run(&rig{T: t, cluster: cluster, store: store})
		})
	}
}

// rig is one case's cluster.
type rig struct {
	*testing.T
	cluster Cluster
	store   ownership.Store // for looking at keys
}

// node is one node of it.
type node struct {
	*ownership.Map
	r     *rig
	bad   *ownership.Faults
	store ownership.Store
	stop  func() // ends Run, and waits for it
}

func identity(id string) ownership.Node {
	return ownership.Node{ID: id, Host: "host-" + id, Boot: "boot-" + id, Address: "192.0.2.7"}
}

// join starts a node without waiting for it.
func (r *rig) join(id ownership.Node, cfg ownership.Config) *node {
	r.Helper()
	n := &node{r: r, store: r.cluster.Connect()}
	n.bad = ownership.NewFaults(n.store)
	log := logrus.New()
	log.SetOutput(r.Output())
	log.SetLevel(logrus.DebugLevel)
	cfg.Prefix, cfg.Log = r.cluster.Prefix, log.WithField("node", id.ID)
	if cfg.TTL == 0 {
		cfg.TTL = ttl
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = slow
	}
	n.Map = ownership.New(n.bad, id, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := n.Run(ctx); !errors.Is(err, context.Canceled) {
			r.Errorf("Run of node %s ended with %v", id.ID, err)
		}
	}()
	n.stop = func() {
		cancel()
		<-done
	}
	r.Cleanup(func() {
		n.stop()
		_ = n.store.Close()
	})
	return n
}

// node starts a node and waits until it is registered. Its lease is long, so
// that a slow machine does not end it.
func (r *rig) node(id string) *node { return r.nodeTTL(id, 30*time.Second) }

func (r *rig) nodeTTL(id string, ttl time.Duration) *node {
	r.Helper()
	n := r.join(identity(id), ownership.Config{TTL: ttl, Renew: min(ttl/4, 2500*time.Millisecond)})
	n.registered()
	return n
}

func (n *node) registered() {
	n.r.Helper()
	ctx, cancel := context.WithTimeout(n.r.Context(), time.Minute)
	defer cancel()
	if err := n.Registered(ctx); err != nil {
		n.r.Fatalf("node %s: %v", n.Node().ID, err)
	}
}

func (r *rig) key(parts ...string) string {
	return r.cluster.Prefix + "/v1/" + strings.Join(parts, "/")
}

// keys returns what there is under a prefix.
func (r *rig) keys(parts ...string) []ownership.KV {
	r.Helper()
	res := r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: r.key(parts...), Prefix: true}}})
	return res.Results[0].KVs
}

func (r *rig) put(value string, parts ...string) {
	r.Helper()
	r.txn(ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: r.key(parts...), Value: []byte(value)}}})
}

func (r *rig) txn(txn ownership.Txn) ownership.TxnResult {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
	defer cancel()
	res, err := r.store.Txn(ctx, txn)
	r.ok(err)
	return res
}

func (r *rig) ok(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) is(got, want error) {
	r.Helper()
	if !errors.Is(got, want) {
		r.Fatalf("got error %v, want %v", got, want)
	}
}

// says demands an error with that text in it.
func (r *rig) says(err error, want string) {
	r.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		r.Fatalf("got error %q, want it to say %q", err, want)
	}
}

// held demands a HeldError about that owner.
func (r *rig) held(err error, by string, live bool) {
	r.Helper()
	held, ok := errors.AsType[*ownership.HeldError](err)
	if !ok || held.Owner.Node != by || held.Live != live {
		r.Fatalf("got error %v, want a HeldError with owner %s, live %v", err, by, live)
	}
}

// eventually waits for something that takes time, such as the end of a lease.
func (r *rig) eventually(what string, f func() bool) {
	r.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
		if time.Now().After(end) {
			r.Fatalf("%s did not come about in time", what)
		}
	}
}

// volume makes a ready volume of that name.
func (n *node) volume(name string) ownership.Volume {
	n.r.Helper()
	v, created, err := n.Create(n.r.Context(), ownership.Volume{ID: uuid.NewString(), Name: name, Backend: "memory", Size: 1 << 30, FS: "ext4"})
	n.r.ok(err)
	if !created {
		n.r.Fatalf("volume %s was there already", name)
	}
	v.Ref = "ref-" + v.ID
	v, err = n.Ready(n.r.Context(), v)
	n.r.ok(err)
	return v
}

func (n *node) claim(vid string) ownership.Owner {
	n.r.Helper()
	o, _, err := n.Claim(n.r.Context(), vid)
	n.r.ok(err)
	return o
}

// ask requests a volume and returns the request as the owner sees it.
func (n *node) ask(o ownership.Owner, from *node) ownership.Request {
	n.r.Helper()
	n.r.ok(n.Request(n.r.Context(), o, "mount"))
	waiting, err := from.Waiting(n.r.Context())
	n.r.ok(err)
	for _, w := range waiting {
		if w.Volume == o.Volume && w.Node == n.Node().ID {
			return w
		}
	}
	n.r.Fatalf("request of %s is not among %v", n.Node().ID, waiting)
	return ownership.Request{}
}

// once injects a fault into the next transaction only.
func (n *node) once(fault ownership.Fault) {
	var mu sync.Mutex
	done := false
	n.bad.Inject(func(name string) ownership.Fault {
		mu.Lock()
		defer mu.Unlock()
		if done || name != "txn" {
			return ownership.Fault{}
		}
		done = true
		return fault
	})
}

// followed has the next transaction take effect without an answer, and then f happen
// before it is sent again.
func (n *node) followed(f func()) {
	var txns atomic.Int32
	n.bad.Inject(func(call string) ownership.Fault {
		if call == "txn" {
			switch txns.Add(1) {
			case 1:
				return ownership.Fault{DropReply: true}
			case 2:
				f()
			}
		}
		return ownership.Fault{}
	})
}

// ambiguous are the ways in which a write's outcome is not what its answer says.
var ambiguous = map[string]ownership.Fault{
	"reply dropped":     {DropReply: true},
	"delivered twice":   {Twice: true},
	"not delivered":     {Refused: true},
	"twice and dropped": {Twice: true, DropReply: true},
}

// owner is who owns a volume, by the key itself.
func (r *rig) owner(vid string) *ownership.Owner {
	r.Helper()
	view, err := ownership.New(r.store, identity("nobody"), ownership.Config{Prefix: r.cluster.Prefix, Timeout: slow}).View(r.Context(), vid)
	r.ok(err)
	return view.Owner
}

func (r *rig) ownedBy(vid, node string, token int64) {
	r.Helper()
	switch o := r.owner(vid); {
	case o == nil && node == "":
	case o == nil || o.Node != node || token != 0 && o.Token != token:
		r.Fatalf("owner is %+v, want %q with token %d", o, node, token)
	}
}

// together runs f once for each node, at the same time.
func together(nodes []*node, f func(i int, n *node)) {
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			<-start
			f(i, n)
		})
	}
	close(start)
	wg.Wait()
}

func (r *rig) nodes(count int) []*node {
	r.Helper()
	nodes := make([]*node, count)
	for i := range nodes {
		nodes[i] = r.join(identity(fmt.Sprintf("n%d", i)), ownership.Config{TTL: 30 * time.Second, Renew: 2500 * time.Millisecond})
	}
	for _, n := range nodes {
		n.registered()
	}
	return nodes
}
