package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// A dataset is one volume as this node has it. Everything but the snapshot is
// guarded by its lock, which is held across I/O; there is no lock above it.
type dataset struct {
	id   string
	lock chan struct{} // capacity 1: a mutex that can be given up waiting for

	vol ownership.Volume
	// token is the ownership token; 0 means that this node does not own it.
	token int64
	// verified is the term of registration (ownership.Map.Term) in which etcd last
	// confirmed the token; 0 if it has not in this process's life.
	verified int64
	// doubt says that a release under the token may still be on its way to etcd: an
	// attempt whose outcome is unknown, or one of an earlier process. What is attached
	// under it is given up, and the token renewed, before anything is mounted.
	doubt bool
	// pending is whom a takeover still has to cut off: until then the volume is
	// neither used nor given away.
	pending *ownership.Pending
	// fault is why the takeover is not finished yet, for people.
	fault string
	// lingers is until when it stays although nothing refers to it, unless another
	// node wants it.
	lingers time.Time
	// late is until when an earlier call to the storage may still take effect; zero
	// if nothing of that is on disk.
	late time.Time
	// oldBoot says that the token is from before the host was started anew: an
	// attachment of that time is dropped, and the token renewed.
	oldBoot bool
	// att is the attachment made under token; nil means not attached here.
	att *backends.Attachment
	// unseen says that what is attached and mounted here is not known, because the
	// storage could not be asked: nothing may be concluded from att being nil.
	unseen bool
	// mounted says that the filesystem was mounted below the mount root; the mount
	// table is asked before anybody is told so.
	mounted bool
	// stray is the device that is mounted here without being attached any more, such
	// as one the storage took away.
	stray string
	// lost is why a volume this node has mounted or attached is no longer its own.
	lost string
	refs refs
	// closed says that att's device was proven closed and not mounted since.
	closed bool
	// written is the attachment whose device was proven closed and had taken all that
	// was written, if none was mounted since.
	written *backends.Attachment
	// detaching says that a detach of att was begun and its outcome is unknown: it
	// may still happen, so att must not be used before that is settled.
	detaching bool
	// attempts counts the failed tries to let go, and failed is when the last one
	// was, for the back-off.
	attempts int
	failed   time.Time
	// present is when this node has said that it has the volume mounted, if it has.
	present presence

	users int         // calls that hold the dataset; guarded by Driver.mu
	timer *time.Timer // the next try to let go; guarded by Driver.mu

	snapshot atomic.Pointer[snapshot]
}

// snapshot is what Get, List and Path read without the lock.
type snapshot struct {
	vol        ownership.Volume
	token      int64
	attached   bool
	mounted    bool
	lost       string
	pending    string // the host a takeover has to cut off
	fault      string
	late       time.Time
	mounts     int
	present    presence
	containers []string
}

func (s *snapshot) idle() bool { return s.token == 0 && !s.attached && !s.mounted }

func newDataset(id string) *dataset {
	ds := &dataset{id: id, lock: make(chan struct{}, 1), refs: refs{}}
	ds.snapshot.Store(&snapshot{})
	return ds
}

// acquire takes the dataset's lock, or gives up with the context.
func (ds *dataset) acquire(ctx context.Context) error {
	select {
	case ds.lock <- struct{}{}:
		return nil
	default:
	}
	select {
	case ds.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another operation on the volume: %w", context.Cause(ctx))
	}
}

// unlock publishes the state and frees the lock.
func (ds *dataset) unlock() {
	ds.publish()
	<-ds.lock
}

func (ds *dataset) publish() {
	old := ds.snapshot.Load()
	s := &snapshot{
		vol: ds.vol, token: ds.token, attached: ds.att != nil || ds.stray != "", mounted: ds.mounted,
		lost: ds.lost, fault: ds.fault, late: ds.late, mounts: ds.refs.total(), present: ds.present,
	}
	if ds.pending != nil {
		s.pending = ds.pending.Host
	}
	if s.mounts > 0 {
		s.containers = old.containers
	}
	ds.snapshot.Store(s)
}

// setContainers records what Docker said, as a hint for people.
func (ds *dataset) setContainers(names []string) {
	for {
		old := ds.snapshot.Load()
		s := *old
		s.containers = names
		if ds.snapshot.CompareAndSwap(old, &s) {
			return
		}
	}
}

// idle says that nothing of the volume is on this node.
func (ds *dataset) idle() bool {
	return ds.token == 0 && ds.att == nil && !ds.mounted && ds.stray == ""
}

func (ds *dataset) record(boot string) record {
	return record{
		ID: ds.id, Name: ds.vol.Name, Backend: ds.vol.Backend, Boot: boot, Token: ds.token,
		Attachment: ds.att, Written: ds.allWritten(), Detaching: ds.detaching, Late: time.Now().Before(ds.late), Refs: maps.Clone(ds.refs),
	}
}

// allWritten says that nothing is left to write to the device attached.
func (ds *dataset) allWritten() bool {
	return ds.att != nil && ds.written != nil && *ds.written == *ds.att
}

// refs are the Mount calls that Docker has not undone yet, by mount ID. They are
// hints: IDs repeat (`docker cp` uses the running container's), Unmounts get lost
// (a killed dockerd) and come twice. The exclusive open decides what is closed.
type refs map[string]ref

type ref struct {
	Count int       `json:"count"`
	Epoch int64     `json:"epoch"`
	Since time.Time `json:"since"`
}

// add counts a Mount. An ID of an older epoch is a container that is started
// again after a crash: its old Mounts are forgotten.
func (r refs) add(id string, epoch int64, now time.Time) {
	old := r[id]
	if old.Epoch != epoch {
		old.Count = 0
	}
	r[id] = ref{Count: old.Count + 1, Epoch: epoch, Since: now}
}

// drop counts an Unmount. An unknown ID is fine.
func (r refs) drop(id string) {
	old, ok := r[id]
	if !ok {
		return
	}
	if old.Count--; old.Count <= 0 {
		delete(r, id)
		return
	}
	r[id] = old
}

func (r refs) total() int {
	n := 0
	for _, ref := range r {
		n += ref.Count
	}
	return n
}

// youngest returns when the last Mount was answered.
func (r refs) youngest() time.Time {
	var t time.Time
	for _, ref := range r {
		if ref.Since.After(t) {
			t = ref.Since
		}
	}
	return t
}

// current says that there is a reference of this epoch.
func (r refs) current(epoch int64) bool {
	for _, ref := range r {
		if ref.Epoch == epoch {
			return true
		}
	}
	return false
}

// containerNames returns the names, sorted.
func containerNames(containers []Container) []string {
	names := make([]string, 0, len(containers))
	for _, c := range containers {
		names = append(names, c.Name)
	}
	slices.Sort(names)
	return names
}
