// Package ownership keeps the map from datasets to the nodes that own them.
//
// Authority and liveness are different keys. own/<vid> is authority: it is on no
// lease, is written only when authority changes, and its mod revision is the
// fencing token. live/<nid> is liveness: it is on its node's lease, and its
// absence means "not heard from", never "has stopped writing".
//
// A volume whose owner is not live is taken over in two steps: Seize records who
// takes it and whom to fence, and Settle that the fence was seen. fence/<nid>/<boot>
// stands for the fence where an operator vouches that a node is dead.
//
// Every decision is a transaction's compare, never a read. Every write carries an
// operation id; after an error or a failed compare the key is read again, and if
// it carries our operation id the write has happened (the etcd client may send a
// write twice).
package ownership

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Node is one host's identity.
type Node struct {
	// ID is a UUID made once and kept on the host's disk.
	ID string `json:"id"`
	// Host is the name people know it by.
	Host string `json:"host"`
	// Boot is the kernel's boot id: everything mounted is gone when it changes.
	Boot string `json:"boot"`
	// Session is random for each start of the process.
	Session string `json:"session,omitempty"`
	// State is empty for a node in service; cordoned, lost or removed otherwise.
	State string `json:"state,omitempty"`
	// Address is the IP address by which clients of the original's REST API know it.
	Address string `json:"address,omitempty"`
	// Identities are the names by which storage systems know the node, by backend: a
	// fence needs them when the node cannot be asked any more.
	Identities map[string]string `json:"identities,omitempty"`
}

// Phase is where a volume is in its life.
type Phase string

// The phases of a volume.
const (
	PhaseCreating    Phase = "creating"
	PhaseReady       Phase = "ready"
	PhaseDeleting    Phase = "deleting"
	PhaseQuarantined Phase = "quarantined"
)

// Volume is what the cluster wants of a dataset: the value of vol/<vid>.
type Volume struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Backend   string            `json:"backend"`
	Ref       string            `json:"ref,omitempty"` // set when ready
	Size      int64             `json:"size"`
	FS        string            `json:"fs"`
	Mkfs      string            `json:"mkfs,omitempty"`
	Mount     string            `json:"mount,omitempty"`
	UID       int               `json:"uid"`
	GID       int               `json:"gid"`
	Mode      uint32            `json:"mode,omitempty"`
	Profile   string            `json:"profile,omitempty"`
	Options   map[string]string `json:"options,omitempty"` // the backend's own
	Labels    map[string]string `json:"labels,omitempty"`
	Phase     Phase             `json:"phase"`
	Reason    string            `json:"reason,omitempty"` // of a quarantine
	Formatted bool              `json:"formatted"`
	Created   time.Time         `json:"created"`
	Op        string            `json:"op,omitempty"`

	// Revision is the key's mod revision; the compare of the next write.
	Revision int64 `json:"-"`
}

// Owner is who has authority over a volume: the value of own/<vid>.
type Owner struct {
	Volume string `json:"volume"`
	Node   string `json:"node"`
	Host   string `json:"host"`
	Boot   string `json:"boot"`
	Op     string `json:"op"`
	// From is the node that handed over, and Clean that it proved the filesystem
	// closed before.
	From  string `json:"from,omitempty"`
	Clean bool   `json:"clean,omitempty"`
	// Unclean says that a former owner was cut off with the filesystem open.
	Unclean bool `json:"unclean,omitempty"`
	// Pending is set while a takeover's fence is not yet verified: the volume MUST
	// NOT be attached, handed over, released or deleted then. Settle ends it.
	Pending *Pending `json:"pending,omitempty"`

	// Token is the fencing token: the key's mod revision, fixed for the tenure.
	Token int64 `json:"-"`
}

// Pending is whom a takeover has to fence, captured when it was recorded: nothing
// in it may be looked up later. If a taker dies before it has settled, the next
// one gets the same Pending; so it may name the node that takes over itself.
type Pending struct {
	Node string `json:"node"`
	Host string `json:"host"`
	Boot string `json:"boot"`
	// Token is what Node owned the volume under: its attachments of this token and
	// of older ones are to be cut.
	Token int64 `json:"token"`
	// Identities are Node's, as it registered last.
	Identities map[string]string `json:"identities,omitempty"`
	Grounds    Grounds           `json:"grounds"`
}

// Grounds are why a volume may be taken from its owner.
type Grounds string

// The grounds. Each of them holds only as long as the owner is not live; with
// GroundsConfirmed it may be, if the declaration was forced.
const (
	// GroundsSilent: the owner is not heard from. It may be writing all the same, so
	// the storage has to cut it off.
	GroundsSilent Grounds = "silent"
	// GroundsConfirmed: the owner was declared dead, see DeclareDead.
	GroundsConfirmed Grounds = "confirmed"
	// GroundsRebooted: the owner has registered under another boot id since, so what
	// it had mounted is gone. For this to be true, a node that finds an ownership of
	// its own with another boot id MUST Retake it before it uses the volume.
	GroundsRebooted Grounds = "rebooted"
)

// Request is a node's wish for a volume another one owns: req/<owner>/<vid>/<nid>.
type Request struct {
	Volume string    `json:"volume"`
	Owner  string    `json:"owner"`
	Node   string    `json:"node"`
	Host   string    `json:"host"`
	Boot   string    `json:"boot"`
	Since  time.Time `json:"since"`
	Op     string    `json:"op"`
	// Purpose is "mount" or "remove", for the owner's log and the error texts.
	Purpose string `json:"purpose"`

	// Revision is the key's create revision: the oldest is served first.
	Revision int64 `json:"-"`
	// Lease is the requester's: the reply goes on it too, and so ends with it.
	Lease int64 `json:"-"`
}

// Reply is what the owner last said to a request: rep/<requester>/<vid>.
type Reply struct {
	Volume string `json:"volume"`
	Node   string `json:"node"` // the owner
	Host   string `json:"host"`
	// Busy means that containers use the volume; Containers are their names, as
	// far as Docker told.
	Busy       bool     `json:"busy"`
	Containers []string `json:"containers,omitempty"`
	// Detail is one sentence where there is more to say, such as a detach that
	// fails.
	Detail string `json:"detail,omitempty"`
}

// users says what uses the volume, as far as that is known.
func (r Reply) users() string {
	var b strings.Builder
	switch len(r.Containers) {
	case 0:
	case 1:
		fmt.Fprintf(&b, " by container %s", r.Containers[0])
	default:
		fmt.Fprintf(&b, " by containers %s", strings.Join(r.Containers, ", "))
	}
	if r.Detail != "" {
		fmt.Fprintf(&b, " (%s)", r.Detail)
	}
	return b.String()
}

// View is everything the map says about one volume at one revision.
type View struct {
	Volume Volume
	// Owner is nil when the volume is free.
	Owner *Owner
	// OwnerLive says that the owner's liveness key is there.
	OwnerLive bool
	// Waiting are the requests to the owner, oldest first.
	Waiting []Request
	// Placement is nil when nobody has said where the volume is to be, Presence while it
	// is not mounted there, and Lease while nobody has one.
	Placement *Placement
	Presence  *Presence
	Lease     *Lease
}

// The states of a volume, as far as the map knows them; a phase other than ready is one, too.
const (
	StateFree   = "free"
	StateOwned  = "owned"
	StateSilent = "owner not responding"
	StateTaken  = "being taken over"
)

// State is how the volume is, in words for users, with more about it where there is more
// to say.
func (v *View) State() (state, detail string) {
	switch {
	case v.Volume.Phase == PhaseCreating:
		return string(PhaseCreating), "if the host that makes it was stopped, the next mount finishes it, and it can be removed"
	case v.Volume.Phase != PhaseReady:
		return string(v.Volume.Phase), v.Volume.Reason
	case v.Owner == nil:
		return StateFree, ""
	case v.Owner.Pending != nil:
		return StateTaken, "from host " + v.Owner.Pending.Host
	case !v.OwnerLive:
		return StateSilent, "host " + v.Owner.Host + " has not been heard from"
	}
	return StateOwned, ""
}

// The error classes. Compare with errors.Is.
var (
	// ErrNotFound: there is no such volume.
	ErrNotFound = errors.New("no such volume")
	// ErrUnavailable: etcd could not be asked, or this node's lease is not valid;
	// nothing is known and nothing was decided.
	ErrUnavailable = errors.New("ownership cannot be checked")
	// ErrConflict: the compare failed; somebody else changed the key. Read again.
	ErrConflict = errors.New("changed by another node")
	// ErrLost: the token is no longer the volume's; this node is not its owner.
	ErrLost = errors.New("no longer the owner")
)

// RefusedError says why nothing was changed. It matches ErrConflict.
type RefusedError struct {
	Text string
}

func (e *RefusedError) Error() string { return e.Text }

// Is makes it an ErrConflict.
func (e *RefusedError) Is(target error) bool { return target == ErrConflict }

func refused(format string, args ...any) error { return &RefusedError{fmt.Sprintf(format, args...)} }

// TakenError says that a new volume cannot have its name or its id. It matches
// ErrConflict.
type TakenError struct {
	Name, ID string
	// By is the id of the volume that has the name; "" if it is the id that belongs to
	// another volume, or did.
	By string
}

func (e *TakenError) Error() string {
	switch e.By {
	case "":
		return fmt.Sprintf("create volume %s: id %s belongs to another volume, or did", e.Name, e.ID)
	case e.ID:
		return fmt.Sprintf("volume %s, of the id %s, has been made already", e.Name, e.ID)
	}
	return fmt.Sprintf("the name %s is in use by another volume (id %s): choose another name, or remove that one first", e.Name, e.By)
}

// Is makes it an ErrConflict.
func (e *TakenError) Is(target error) bool { return target == ErrConflict }

// NoHostError says that no node has a host name or an id.
type NoHostError struct {
	Host string
	// Known are the names of the hosts that there are.
	Known []string
}

func (e *NoHostError) Error() string {
	return fmt.Sprintf("no host %q is known; there are: %s", e.Host, strings.Join(e.Known, ", "))
}

// AmbiguousError says that several nodes have a host name. It matches ErrConflict.
type AmbiguousError struct {
	Host string
	IDs  []string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%d nodes have the host name %s; say which one by its id: %s", len(e.IDs), e.Host, strings.Join(e.IDs, ", "))
}

// Is makes it an ErrConflict.
func (e *AmbiguousError) Is(target error) bool { return target == ErrConflict }

// NodeStateError says that a node gets nothing more, or has gone. It matches ErrConflict.
type NodeStateError struct {
	Node Node
}

func (e *NodeStateError) Error() string {
	host := e.Node.Host
	if e.Node.State == Cordoned {
		return fmt.Sprintf("host %s is cordoned: choose another host, or type: docker flocker node uncordon %s", host, host)
	}
	return fmt.Sprintf("host %s is marked %s in the cluster: choose another host", host, e.Node.State)
}

// Is makes it an ErrConflict.
func (e *NodeStateError) Is(target error) bool { return target == ErrConflict }

// PhaseError says that a volume is not ready to be used. For one that is being
// deleted it matches ErrNotFound.
type PhaseError struct {
	Volume Volume
}

func (e *PhaseError) Error() string {
	switch e.Volume.Phase {
	case PhaseCreating:
		return fmt.Sprintf("volume %s is still being created", e.Volume.Name)
	case PhaseDeleting:
		return fmt.Sprintf("volume %s is being deleted", e.Volume.Name)
	case PhaseQuarantined:
		return fmt.Sprintf("volume %s is quarantined: %s", e.Volume.Name, e.Volume.Reason)
	case PhaseReady:
	}
	return fmt.Sprintf("volume %s is not ready (%s)", e.Volume.Name, e.Volume.Phase)
}

// Is makes a volume that is being deleted an ErrNotFound.
func (e *PhaseError) Is(target error) bool {
	return target == ErrNotFound && e.Volume.Phase == PhaseDeleting
}

// BrokenError says that a key's value cannot be understood: it was damaged, or
// written by a newer version. Nothing is decided about its volume then.
type BrokenError struct {
	Key string
	Err error
}

func (e *BrokenError) Error() string {
	return fmt.Sprintf("value of etcd key %s is broken: %v", e.Key, e.Err)
}

func (e *BrokenError) Unwrap() error { return e.Err }

// HeldError says who owns a volume that could not be claimed or deleted.
type HeldError struct {
	Volume Volume
	Owner  Owner
	// Live says that the owner's liveness key is there.
	Live bool
}

func (e *HeldError) Error() string {
	if !e.Live {
		return fmt.Sprintf("volume %s is owned by host %s, which has not been heard from", e.Volume.Name, e.Owner.Host)
	}
	return fmt.Sprintf("volume %s is owned by host %s", e.Volume.Name, e.Owner.Host)
}

// BusyError says that the owner refused to hand over within the time allowed.
type BusyError struct {
	Volume string
	Reply  Reply
	Waited time.Duration
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("volume %s is in use on host %s%s", e.Volume, e.Reply.Host, e.Reply.users())
}
