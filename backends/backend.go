// Package backends is the contract between Flocker and a storage system.
//
// A backend creates block volumes and makes them appear on a node as a block
// device. It never formats, never mounts and never decides who may have a
// volume: ownership is settled before a backend is called, and policy (what to
// retry, when to give up, whether a repeated call is fine) is the driver's.
//
// The contract is executable: backendtest.Run is its long form, and every
// backend runs it.
package backends

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Class says what keeps a node that is no longer the owner from writing, and so
// what may be done when an owner is dead.
type Class string

// The classes, from docs/design.md.
const (
	// ClassExclusive (F1): the storage lets one node attach a volume at a time.
	ClassExclusive Class = "F1"
	// ClassFenced (F2): the storage can cut a named node off on demand.
	ClassFenced Class = "F2"
	// ClassNodeFence (F3): only switching a node off stops it.
	ClassNodeFence Class = "F3"
	// ClassNone (F0): nothing can stop a node; takeover needs an operator.
	ClassNone Class = "F0"
)

// Properties are the facts about a backend. They do not change while it runs.
type Properties struct {
	// Name is what users write after -o backend=.
	Name string
	// Type is the kind of storage system, such as csi; empty is Name.
	Type string
	// Class says what fences a former owner.
	Class Class
	// AllocationUnit is what volume sizes are rounded up to, in bytes.
	AllocationUnit int64
	// MinSize and MaxSize bound a volume's size in bytes; MaxSize 0 is no bound.
	MinSize, MaxSize int64
	// CheapAttach says that attaching costs about as much as mounting, so that an
	// idle volume is detached at once instead of lingering attached.
	CheapAttach bool
	// ExclusiveAttach says that Attach refuses a volume which another node has
	// attached. It does not make the backend a fence: see Class.
	ExclusiveAttach bool
	// LateCalls is how long after it was sent a call may still take effect at the
	// storage system although nobody waits for it any more, and cannot be told from
	// a newer one: for a system that names an attachment by volume and node alone. 0
	// where each attachment has an id of its own, or the calls are local.
	LateCalls time.Duration
	// FenceTime is how long a Fence may take, such as until a node is switched off; 0 is
	// half a minute.
	FenceTime time.Duration
	// Options are the backend's own create options, besides those every volume has.
	Options []Option
	// Profiles are what users may write after -o profile=, sorted.
	Profiles []string
}

// CreateRequest asks for a new volume.
type CreateRequest struct {
	// ID is the dataset's UUID and the idempotency key: two requests with one ID
	// make one volume.
	ID string
	// Name is the dataset's name, for people who look at the storage system.
	Name string
	// Cluster is the UUID of the Flocker cluster the volume is tagged with. A
	// backend never shows or touches volumes of another cluster.
	Cluster string
	// Size is in bytes, already within Properties' bounds.
	Size int64
	// Profile is what the user wrote after -o profile=; empty is the default.
	Profile string
	// Options holds the values for Properties.Options, validated.
	Options map[string]string
}

// Volume is a volume as the storage system has it.
type Volume struct {
	// Ref names the volume in the storage system. It is opaque, non-empty and
	// stable for the volume's life.
	Ref string
	// ID, Cluster and Name are the tags given at creation.
	ID, Cluster, Name string
	// Size is the usable size in bytes: the requested one, rounded up.
	Size int64
}

// Attachment is one volume made available to one node under one ownership token.
type Attachment struct {
	// ID is the storage system's own name for this attachment; it may be empty
	// where there is none.
	ID string `json:"id,omitempty"`
	// Ref names the volume.
	Ref string `json:"ref"`
	// Volume is the dataset's UUID.
	Volume string `json:"volume"`
	// Node is the node it is attached to.
	Node string `json:"node"`
	// Token is the ownership token it was made under.
	Token int64 `json:"token"`
	// Device is the block device on Node, an absolute path. It was found by asking
	// the kernel or the device, never by guessing a name, and may differ after the
	// next attach.
	Device string `json:"device"`
}

// AttachRequest asks for a volume to be attached to the node this backend
// instance was made for.
type AttachRequest struct {
	Ref    string
	Volume string // the dataset's UUID
	Token  int64
}

// A Backend stores volumes. One instance serves one node. Calls for different
// volumes may run at the same time, and so may calls for one volume from
// different nodes; every call is idempotent, because after a crash or a lost
// reply it is made again. A call returns when what it promises can be seen,
// not when it was accepted, and leaves nothing running behind.
//
// Errors match (errors.Is) one of the classes below where one fits, and name
// what is missing in words for the user.
type Backend interface {
	Properties() Properties

	// Create makes a volume, or returns the one that has this ID already. It MUST
	// return ErrExists if that one has another size. A cancelled or failed Create
	// leaves nothing, or something the next Create with the same ID takes over.
	Create(ctx context.Context, req CreateRequest) (Volume, error)

	// Delete destroys a volume and its data. ErrNotFound if there is none,
	// ErrInUse if it is attached anywhere the backend can see, unless it was cut
	// off there.
	Delete(ctx context.Context, ref string) error

	// Get returns one volume. ErrNotFound only if the storage system said so;
	// ErrUnavailable if it could not be asked.
	Get(ctx context.Context, ref string) (Volume, error)

	// List returns every volume of this cluster, in no order, never partially. What a Create
	// has left half made is among them, or nowhere; one that does not say yet whose it is has
	// no Cluster.
	List(ctx context.Context) ([]Volume, error)

	// Attach makes the volume a block device on this node. Attached here already
	// under the same token: the same Attachment. Under another token, or on
	// another node where Properties.ExclusiveAttach: *AttachedError. It MUST NOT
	// take a volume away from anybody. Under a token that was fenced: see Fencer.
	Attach(ctx context.Context, req AttachRequest) (Attachment, error)

	// Detach removes exactly that attachment; nil if it is gone already, and
	// another attachment of the same volume (other node, other token) MUST be left
	// alone. A device somebody still holds open or mounted is ErrInUse, and stays
	// attached. When Detach has returned nil, the device is gone.
	Detach(ctx context.Context, att Attachment) error

	// Attachments returns what is attached to this node now, from the kernel's own
	// state or that of a program on this node, never from memory or files of the
	// backend. It is called every few minutes as long as the process runs, so it
	// MUST NOT ask the storage system itself unless there is no other way. One whose
	// Attach is under way, or was killed half-way, may be among them, without a Device;
	// Detach undoes it.
	Attachments(ctx context.Context) ([]Attachment, error)
}

// A Resizer can grow a volume. Growing to the present size or less is a no-op
// that returns the present size.
type Resizer interface {
	Resize(ctx context.Context, ref string, size int64) (newSize int64, err error)
}

// FenceRequest names whom to cut off from which volume, as the record of the
// takeover has it. Nothing in it is looked up late: by then the volume may be
// attached to the node that takes over.
type FenceRequest struct {
	Ref    string
	Volume string // the dataset's UUID
	// Node is the node to be cut off, and Identity what its Identifier said when it
	// registered; empty if the backend is none.
	Node, Identity string
	// Token is the ownership token that was taken from Node. Its attachments under
	// this token and older ones are cut, younger ones MUST be left alone.
	Token int64
}

// A Fencer cuts a node off from a volume at the storage system, whether or not the
// node answers. Backends of the classes F1 and F2 MUST be one, and no others may.
//
// What the node may do afterwards: a Detach of what was cut off returns nil, once
// nothing there has the device open, and leaves no device. An Attach under the
// token that was cut off, or an older one, MUST NOT get the volume beside another
// node. Class F2 refuses it for good, with ErrInUse, also if the node had nothing
// attached when it was cut off. Class F1 need not, for a storage system that knows
// no tokens: an Attach which was on its way may get the volume after the fence as
// long as nobody else has it. Then the Attach of the node that takes over says so
// with *AttachedError, and that node calls Fence again. A younger token is as good
// as ever, in both.
//
// Class F2, where the backend itself has to note who has a volume, may leave that note if the
// end of an attachment was not heard: the node has nothing any more, and nobody can prove it.
// Then the next node's Attach names it with *AttachedError, and that node calls Fence.
type Fencer interface {
	// Fence returns when it was seen that the node cannot read or write the volume
	// any more under the token or an older one, and that neither I/O it sent before
	// nor this call can take effect later; evidence is what was seen, in a few words
	// for the audit. Every read and write there fails from then on, and does not
	// hang; what the node has synced before is kept. Cut off already, or nothing
	// attached: nil. It works from any node. Other nodes and other volumes MUST NOT
	// notice.
	//
	// ErrUnavailable if that could not be seen: the node may or may not be cut off
	// then, and Fence is called again; so it is when ctx has ended. ErrNotFound if
	// there is no such volume, which proves nothing: the question may have gone to
	// the wrong storage system. ErrInvalid if Ref is another volume, or Identity is
	// missing where the storage system goes by it.
	Fence(ctx context.Context, req FenceRequest) (evidence string, err error)
}

// An Identifier knows the name by which the storage system knows this node, such
// as an instance id, an initiator name or an address. A fence needs it when the
// node itself cannot be asked any more. No two nodes have the same, and a restart
// of the process does not change it.
type Identifier interface {
	Identity(ctx context.Context) (string, error)
}

// A Permitted knows what its storage system does not let this node do, so that it is told
// before it is needed: most of all what a fence calls.
type Permitted interface {
	// Forbidden returns the names of those calls, sorted, and asks for nothing that has an
	// effect. It is called only when somebody looks for what is wrong. What cannot be
	// known yet is not among them.
	Forbidden(ctx context.Context) (calls []string, err error)
}

// The error classes. Compare with errors.Is.
var (
	// ErrNotFound: the storage system says there is no such volume.
	ErrNotFound = errors.New("not found")
	// ErrExists: there is one with the same ID, and it is different.
	ErrExists = errors.New("already exists")
	// ErrInvalid: the request can never succeed as it is.
	ErrInvalid = errors.New("invalid")
	// ErrInUse: somebody has it open or attached.
	ErrInUse = errors.New("in use")
	// ErrUnavailable: the storage system could not be asked, or is out of space or
	// devices; the same request may succeed later.
	ErrUnavailable = errors.New("unavailable")
	// ErrLate, besides one of the others, where Properties.LateCalls is not 0: a call that
	// ends an attachment got no answer, and may still take effect. An Attach MUST say so of
	// what it has ended itself; of a Detach or Fence that failed it is taken for granted.
	ErrLate = errors.New("may still take effect")
)

// Classify returns err with its text as it is, matching class as well. It is for
// errors whose text is already a whole sentence for the user.
func Classify(class, err error) error { return &classified{class, err} }

type classified struct{ class, err error }

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.err, e.class} }

// AttachedError says where, and under which token, a volume is attached. It
// matches ErrInUse.
type AttachedError struct {
	Volume string
	Node   string // empty if the backend cannot tell
	Token  int64
}

func (e *AttachedError) Error() string {
	node := e.Node
	if node == "" {
		node = "another node"
	}
	return fmt.Sprintf("volume %s is attached to %s", e.Volume, node)
}

// Is makes an AttachedError an ErrInUse.
func (e *AttachedError) Is(target error) bool { return target == ErrInUse }

// As returns b, or the first backend below its wrappers, as a T. A wrapper has
// a method Unwrap() Backend.
func As[T any](b Backend) (T, bool) {
	for b != nil {
		if t, ok := b.(T); ok {
			return t, true
		}
		w, ok := b.(interface{ Unwrap() Backend })
		if !ok {
			break
		}
		b = w.Unwrap()
	}
	var none T
	return none, false
}
