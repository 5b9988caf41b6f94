// Package backendtest is the contract of package backends, executable: Run checks
// a backend against it. Memory is a storage system for tests that need one and
// no kernel.
package backendtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Memory is a storage system in memory, shared by any number of nodes. It keeps
// the contract to the letter; SetFault and Inject make it misbehave.
//
// Its class is that of the Properties it is made with, and each class promises no
// more than the contract asks of it:
//
//   - F0 (and F3) has nothing that cuts a node off. Its calls are local.
//   - F1 lets one node attach a volume at a time, and knows who. Fence and a Detach
//     from another node take the attachment away: what has the device open there
//     gets I/O errors. An Attach of the cut node that arrives later succeeds if
//     nobody has attached the volume since.
//   - F1 with LateCalls has no ids for attachments: Detach and Fence look at the
//     token when they are sent, but what is sent names a volume and a node alone,
//     and takes whatever attachment of that node it finds when it arrives.
//   - F2 lets any number of nodes attach a volume. Fence puts the identity of the
//     node on the volume's blocklist, up to a token: its devices stay, and fail,
//     until it detaches them, and it attaches the volume no more under such a token.
//
// Backends of the classes F1 and F2 are a backends.Fencer and a backends.Identifier,
// others are neither.
type Memory struct {
	props backends.Properties

	mu         sync.Mutex
	volumes    map[string]*memoryVolume // by ref
	calls      map[string]int
	fault      func(context.Context, Call) error
	inject     func(Call) Fault
	hosts      Hosts
	violations []string
	attaches   int64 // so far

	access sync.Map // memoryPath to struct{}: where I/O is possible
}

type memoryVolume struct {
	backends.Volume
	data     map[int64][]byte // by block of memoryBlock bytes; absent is zeros
	attached map[string]*memoryAttachment
	fenced   map[string]int64 // class F2: by identity, the youngest token that was cut off
}

// memoryAttachment is one attachment from its Attach to its end, so that a later
// one of the same node and token is another.
type memoryAttachment struct {
	backends.Attachment
	open  int
	boots int  // of the node, since; what was opened before them is dead
	cut   bool // no I/O any more
}

type memoryPath struct{ node, device string }

const memoryBlock = 4096

// Call is one call of a Backend's method, as SetFault's and Inject's functions see it.
type Call struct {
	// Method is the method's name, such as "Attach".
	Method string
	// Node is the node whose backend was called.
	Node string
	// Target is the node that a Detach or Fence is aimed at.
	Target string
	// Ref names the volume; empty for Create, List, Attachments and Identity.
	Ref string
	// Volume is the dataset's UUID, where the call gives one.
	Volume string
	// Done says that the call has taken effect, and only its reply can get lost.
	Done bool
}

// Fault is what happens to one call on its way to the storage system and back. The
// zero value is nothing.
type Fault struct {
	// Latency passes before the call is sent: if its context ends meanwhile, it
	// never is.
	Latency time.Duration
	// Refused: the storage system is down. The call has no effect and fails at once
	// with ErrUnavailable.
	Refused bool
	// Hang: the call has no effect, and fails when its context ends.
	Hang bool
	// DropReply: the call has its effect, and fails with ErrUnavailable.
	DropReply bool
	// Late passes between the sending of the call and its effect, which comes even
	// if the caller's context has ended by then, and the caller with it.
	Late time.Duration
	// Again, if not 0, is how long after its effect the call has it once more, as
	// a duplicate that got stuck.
	Again time.Duration
}

// Hosts is what a test that has hosts of its own tells a Memory about them, and is
// told. Each function may be nil. They are called while the Memory is locked, and
// must not call it, except for Accessible.
type Hosts struct {
	// InUse says whether a node has a device open or mounted. What Open has opened
	// is known without.
	InUse func(node, device string) bool
	// Rightful says whether the attachment's node and token are those of the
	// volume's owner at this moment: to take the device away from it while it is in
	// use is a violation.
	Rightful func(att backends.Attachment) bool
	// Attached hears of each device that begins to work.
	Attached func(att backends.Attachment)
	// Pulled hears of each device that works no more, unless its own node has
	// detached it when it was not in use: nothing written to it arrives any more.
	Pulled func(att backends.Attachment)
}

// NewMemory returns an empty storage system of the class props.Class, as described
// at Memory. What props leaves out is filled in: the name "memory", class F1, an
// allocation unit of 1 MiB, and ExclusiveAttach where the class means it.
func NewMemory(props backends.Properties) *Memory {
	if props.Name == "" {
		props.Name = "memory"
	}
	if props.Class == "" {
		props.Class = backends.ClassExclusive
	}
	if props.Class == backends.ClassExclusive {
		props.ExclusiveAttach = true
	}
	if props.AllocationUnit == 0 {
		props.AllocationUnit = 1 << 20
	}
	if props.MinSize == 0 {
		props.MinSize = props.AllocationUnit
	}
	return &Memory{props: props, volumes: map[string]*memoryVolume{}, calls: map[string]int{}}
}

// Node returns the backend of one node. It serves the volumes of every cluster.
func (m *Memory) Node(node string) backends.Backend { return m.NodeIn("", node) }

// NodeIn returns the backend of one node in one cluster.
func (m *Memory) NodeIn(cluster, node string) backends.Backend {
	n := &memoryNode{m: m, cluster: cluster, node: node}
	if m.fences() {
		return &memoryFencer{n}
	}
	return n
}

func (m *Memory) fences() bool {
	return m.props.Class == backends.ClassExclusive || m.props.Class == backends.ClassFenced
}

// local says that calls are done by the node's own kernel, which forgets them when
// it restarts.
func (m *Memory) local() bool {
	return m.props.Class == backends.ClassNone || m.props.Class == backends.ClassNodeFence
}

// SetFault makes every call ask f before it does anything and, if it succeeded,
// again before it returns (Call.Done). What f returns is what the call returns. f
// may wait, until ctx ends.
func (m *Memory) SetFault(f func(ctx context.Context, call Call) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault = f
}

// Inject makes every call ask f what is to happen to it. Nothing but f decides by
// chance, so that a seeded f makes the same faults each time it sees the same calls.
// Time passes by timers alone, as a synctest bubble wants it. Calls of a class
// without a storage system of its own (F0, F3) are never late: Late adds to Latency,
// and Again is ignored. With Properties.LateCalls nothing takes effect later than
// that after it was sent.
func (m *Memory) Inject(f func(call Call) Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inject = f
}

// SetHosts makes the Memory ask, and tell, the test's hosts.
func (m *Memory) SetHosts(h Hosts) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hosts = h
}

// Violations lists what must never happen: a device that was taken away from the
// rightful owner while in use. See Hosts.
func (m *Memory) Violations() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.violations)
}

// Accessible says whether a node can read and write a device at this moment. It
// takes no lock, so that a pretended kernel may ask at any time.
func (m *Memory) Accessible(node, device string) bool {
	_, ok := m.access.Load(memoryPath{node, device})
	return ok
}

// Calls returns how often each method was called.
func (m *Memory) Calls() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.calls)
}

// Attached returns every attachment of the volume with this dataset UUID, on
// whatever node, that has not been cut off.
func (m *Memory) Attached(volume string) []backends.Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []backends.Attachment
	for _, v := range m.volumes {
		for _, att := range v.attached {
			if v.ID == volume && !att.cut {
				all = append(all, att.Attachment)
			}
		}
	}
	return all
}

// Reboot is a restart of a node's kernel: everything it had open is closed, and
// its attachments are gone, unless the storage system keeps them (class F1).
func (m *Memory) Reboot(node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, v := range m.volumes {
		att := v.attached[node]
		if att == nil {
			continue
		}
		att.open = 0
		att.boots++
		if m.props.Class != backends.ClassExclusive {
			m.end(att)
			delete(v.attached, node)
		}
	}
}

// end ends the I/O of an attachment; m.mu is held.
func (m *Memory) end(att *memoryAttachment) {
	att.cut = true
	m.access.Delete(memoryPath{att.Node, att.Device})
}

// inUse needs m.mu.
func (m *Memory) inUse(att *memoryAttachment) bool {
	return att.open > 0 || (m.hosts.InUse != nil && m.hosts.InUse(att.Node, att.Device))
}

// pull ends the I/O of an attachment whether it is in use or not, on behalf of call;
// m.mu is held.
func (m *Memory) pull(att *memoryAttachment, call Call) {
	if att.cut {
		return
	}
	m.end(att) // first, so that no host begins to use it after it was asked
	used := m.inUse(att)
	if used && m.hosts.Rightful != nil && m.hosts.Rightful(att.Attachment) {
		m.violations = append(m.violations, fmt.Sprintf("volume %s was taken away from its owner %s (token %d) while in use, by a %s of %s",
			att.Volume, att.Node, att.Token, call.Method, call.Node))
	}
	if m.hosts.Pulled != nil && (used || call.Node != att.Node) {
		m.hosts.Pulled(att.Attachment)
	}
}

// DevicePrefix begins the path of every device of a Memory.
const DevicePrefix = "/dev/memory/"

// Open opens a device on a node, as if it were the path of a block device: it is
// in use until it is closed. I/O fails once the node is cut off from the volume.
func (m *Memory) Open(node, device string) (Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.volumes[strings.TrimPrefix(device, DevicePrefix)]
	if v == nil || v.attached[node] == nil || v.attached[node].Device != device {
		return nil, fmt.Errorf("open %s on %s: no such device", device, node)
	}
	att := v.attached[node]
	att.open++
	return &memoryDevice{m: m, v: v, att: att, boots: att.boots}, nil
}

type memoryNode struct {
	m             *Memory
	cluster, node string
}

func (n *memoryNode) Properties() backends.Properties { return n.m.props }

// do runs one call. look, which may be nil, is what the node itself sees when it
// sends the call: whether there is anything to send. run is what the storage system
// does when it arrives. Both are called with m.mu held, and in one go unless the
// call is late.
func do[R any](ctx context.Context, n *memoryNode, call Call, look func() (send bool, err error), run func() (R, error)) (R, error) {
	m, none := n.m, *new(R)
	call.Node = n.node
	m.mu.Lock()
	m.calls[call.Method]++
	ask, inject := m.fault, m.inject
	m.mu.Unlock()
	if ask == nil {
		ask = func(context.Context, Call) error { return nil }
	}
	if err := ask(ctx, call); err != nil {
		return none, err
	}
	var fault Fault
	if inject != nil {
		fault = m.bound(inject(call))
	}
	if fault.Latency > 0 {
		select {
		case <-time.After(fault.Latency):
		case <-ctx.Done():
		}
	}
	if fault.Hang {
		<-ctx.Done()
	}
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", strings.ToLower(call.Method), err)
	}
	if fault.Refused {
		return none, fmt.Errorf("%s: the storage system is down: %w", strings.ToLower(call.Method), backends.ErrUnavailable)
	}
	got, err := deliver(ctx, m, fault, look, run)
	if err != nil {
		return none, err
	}
	if fault.DropReply {
		return none, fmt.Errorf("%s: the storage system's answer was lost: %w", strings.ToLower(call.Method), backends.ErrUnavailable)
	}
	call.Done = true
	if err := ask(ctx, call); err != nil {
		return none, err
	}
	return got, nil
}

// bound keeps a fault to what can happen with this class.
func (m *Memory) bound(f Fault) Fault {
	if m.local() {
		return Fault{Latency: f.Latency + f.Late, Refused: f.Refused, Hang: f.Hang, DropReply: f.DropReply}
	}
	if limit := m.props.LateCalls; limit > 0 {
		f.Late = min(f.Late, limit)
		f.Again = min(f.Again, limit-f.Late)
	}
	return f
}

// deliver sends a call, and waits for its answer until ctx ends.
func deliver[R any](ctx context.Context, m *Memory, fault Fault, look func() (bool, error), run func() (R, error)) (got R, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if look != nil {
		if send, err := look(); !send || err != nil {
			return got, err
		}
	}
	arrive := func() (R, error) {
		got, err := run()
		if fault.Again > 0 {
			time.AfterFunc(fault.Again, func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				_, _ = run() // the first answer was the answer
			})
		}
		return got, err
	}
	if fault.Late <= 0 {
		return arrive()
	}
	type answer struct {
		got R
		err error
	}
	answered := make(chan answer, 1)
	time.AfterFunc(fault.Late, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		got, err := arrive()
		answered <- answer{got, err}
	})
	m.mu.Unlock()
	defer m.mu.Lock()
	select {
	case a := <-answered:
		return a.got, a.err
	case <-ctx.Done():
		return got, fmt.Errorf("no answer: %w", ctx.Err())
	}
}

// find needs m.mu.
func (n *memoryNode) find(ref string) (*memoryVolume, error) {
	v := n.m.volumes[ref]
	if v == nil || (n.cluster != "" && v.Cluster != n.cluster) {
		return nil, fmt.Errorf("volume %s: %w", ref, backends.ErrNotFound)
	}
	return v, nil
}

// findAs is find, for a caller that knows what it should find.
func (n *memoryNode) findAs(ref, volume string) (*memoryVolume, error) {
	v, err := n.find(ref)
	if err == nil && v.ID != volume {
		return nil, fmt.Errorf("volume %s: %s is volume %s: %w", volume, ref, v.ID, backends.ErrInvalid)
	}
	return v, err
}

func (n *memoryNode) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	return do(ctx, n, Call{Method: "Create", Volume: req.ID}, nil, func() (backends.Volume, error) {
		unit := n.m.props.AllocationUnit
		size := (req.Size + unit - 1) / unit * unit
		switch {
		case req.ID == "" || req.Size <= 0:
			return backends.Volume{}, fmt.Errorf("create volume: an id and a size are needed: %w", backends.ErrInvalid)
		case n.cluster != "" && req.Cluster != n.cluster:
			return backends.Volume{}, fmt.Errorf("create volume %s: cluster %s is not this one: %w", req.ID, req.Cluster, backends.ErrInvalid)
		}
		ref := "m-" + req.ID
		if v := n.m.volumes[ref]; v != nil {
			if v.Size != size || v.Cluster != req.Cluster {
				return backends.Volume{}, fmt.Errorf("create volume %s: there is one with %s: %w", req.ID, backends.Size(v.Size), backends.ErrExists)
			}
			return v.Volume, nil
		}
		vol := backends.Volume{Ref: ref, ID: req.ID, Cluster: req.Cluster, Name: req.Name, Size: size}
		n.m.volumes[ref] = &memoryVolume{
			Volume: vol, data: map[int64][]byte{},
			attached: map[string]*memoryAttachment{}, fenced: map[string]int64{},
		}
		return vol, nil
	})
}

// Delete takes no notice of devices that are cut off, and they are gone with it.
func (n *memoryNode) Delete(ctx context.Context, ref string) error {
	_, err := do(ctx, n, Call{Method: "Delete", Ref: ref}, nil, func() (struct{}, error) {
		v, err := n.find(ref)
		if err != nil {
			return struct{}{}, err
		}
		for node, att := range v.attached {
			if !att.cut {
				return struct{}{}, fmt.Errorf("delete volume: %w", &backends.AttachedError{Volume: v.ID, Node: node, Token: att.Token})
			}
		}
		delete(n.m.volumes, ref)
		return struct{}{}, nil
	})
	return err
}

func (n *memoryNode) Get(ctx context.Context, ref string) (backends.Volume, error) {
	return do(ctx, n, Call{Method: "Get", Ref: ref}, nil, func() (backends.Volume, error) {
		v, err := n.find(ref)
		if err != nil {
			return backends.Volume{}, err
		}
		return v.Volume, nil
	})
}

func (n *memoryNode) List(ctx context.Context) ([]backends.Volume, error) {
	return do(ctx, n, Call{Method: "List"}, nil, func() (vols []backends.Volume, err error) {
		for _, v := range n.m.volumes {
			if n.cluster == "" || v.Cluster == n.cluster {
				vols = append(vols, v.Volume)
			}
		}
		return vols, nil
	})
}

func (n *memoryNode) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	return do(ctx, n, Call{Method: "Attach", Ref: req.Ref, Volume: req.Volume}, nil, func() (backends.Attachment, error) {
		v, err := n.findAs(req.Ref, req.Volume)
		if err != nil {
			return backends.Attachment{}, err
		}
		if fenced, ok := v.fenced[identity(n.node)]; ok && req.Token <= fenced {
			return backends.Attachment{}, fmt.Errorf("attach volume %s: it was taken from %s, which is cut off from it up to token %d: %w",
				v.ID, n.node, fenced, backends.ErrInUse)
		}
		for node, other := range v.attached {
			if node == n.node && other.Token == req.Token {
				return other.Attachment, nil
			}
			if node == n.node || (n.m.props.ExclusiveAttach && !other.cut) {
				return backends.Attachment{}, &backends.AttachedError{Volume: v.ID, Node: node, Token: other.Token}
			}
		}
		att := backends.Attachment{
			Ref: req.Ref, Volume: v.ID, Node: n.node, Token: req.Token, Device: DevicePrefix + req.Ref,
		}
		if n.m.attaches++; n.m.props.LateCalls == 0 {
			att.ID = fmt.Sprintf("%s@%s#%d", req.Ref, n.node, n.m.attaches)
		}
		v.attached[n.node] = &memoryAttachment{Attachment: att}
		n.m.access.Store(memoryPath{n.node, att.Device}, struct{}{})
		if n.m.hosts.Attached != nil {
			n.m.hosts.Attached(att)
		}
		return att, nil
	})
}

// Detach takes an attachment away from another node, as storage systems of class
// F1 do when an owner is dead; what has the device open there sees I/O errors.
func (n *memoryNode) Detach(ctx context.Context, att backends.Attachment) error {
	call := Call{Method: "Detach", Target: att.Node, Ref: att.Ref, Volume: att.Volume}
	var meant *memoryAttachment
	look := func() (bool, error) {
		v := n.m.volumes[att.Ref]
		if v == nil {
			return false, nil
		}
		meant = v.attached[att.Node]
		if meant == nil || meant.Token != att.Token || (att.ID != "" && att.ID != meant.ID) {
			return false, nil
		}
		if att.Node != n.node && n.m.props.Class != backends.ClassExclusive {
			return false, fmt.Errorf("detach volume %s: it can only be detached on %s: %w", v.ID, att.Node, backends.ErrInvalid)
		}
		if att.Node == n.node && n.m.inUse(meant) {
			return false, fmt.Errorf("detach volume %s: %s is open: %w", v.ID, meant.Device, backends.ErrInUse)
		}
		return true, nil
	}
	_, err := do(ctx, n, call, look, func() (struct{}, error) {
		n.take(att.Ref, att.Node, call, func(is *memoryAttachment) bool { return is == meant })
		return struct{}{}, nil
	})
	return err
}

// take ends the attachment of a node if it is the one that is meant or, where
// attachments have no ids, whichever it is. m.mu is held.
func (n *memoryNode) take(ref, node string, call Call, meant func(*memoryAttachment) bool) {
	v := n.m.volumes[ref]
	if v == nil {
		return
	}
	is := v.attached[node]
	if is == nil || (n.m.props.LateCalls == 0 && !meant(is)) {
		return
	}
	call.Node = n.node
	n.m.pull(is, call)
	delete(v.attached, node)
}

func (n *memoryNode) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	return do(ctx, n, Call{Method: "Attachments"}, nil, func() (atts []backends.Attachment, err error) {
		for _, v := range n.m.volumes {
			if att, ok := v.attached[n.node]; ok {
				atts = append(atts, att.Attachment)
			}
		}
		return atts, nil
	})
}

// Resize makes a Memory's backends a backends.Resizer.
func (n *memoryNode) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	return do(ctx, n, Call{Method: "Resize", Ref: ref}, nil, func() (int64, error) {
		v, err := n.find(ref)
		if err != nil {
			return 0, err
		}
		unit := n.m.props.AllocationUnit
		v.Size = max(v.Size, (size+unit-1)/unit*unit)
		return v.Size, nil
	})
}

// memoryFencer is a node's backend in the classes F1 and F2.
type memoryFencer struct{ *memoryNode }

var (
	_ backends.Fencer     = (*memoryFencer)(nil)
	_ backends.Identifier = (*memoryFencer)(nil)
)

// identity is the name by which the storage system knows a node.
func identity(node string) string { return "host-" + node }

// Identity implements backends.Identifier.
func (n *memoryFencer) Identity(ctx context.Context) (string, error) {
	return do(ctx, n.memoryNode, Call{Method: "Identity"}, nil, func() (string, error) { return identity(n.node), nil })
}

// Fence implements backends.Fencer. In class F2 it goes by the identity alone.
func (n *memoryFencer) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	call := Call{Method: "Fence", Target: req.Node, Ref: req.Ref, Volume: req.Volume}
	if n.m.props.Class == backends.ClassFenced {
		return do(ctx, n.memoryNode, call, nil, func() (string, error) { return n.block(req, call) })
	}
	look := func() (bool, error) {
		v, err := n.findAs(req.Ref, req.Volume)
		if err != nil {
			return false, err
		}
		is := v.attached[req.Node]
		return is != nil && is.Token <= req.Token, nil
	}
	evidence, err := do(ctx, n.memoryNode, call, look, func() (string, error) {
		n.take(req.Ref, req.Node, call, func(is *memoryAttachment) bool { return is.Token <= req.Token })
		return fmt.Sprintf("%s was detached from %s", req.Ref, req.Node), nil
	})
	if evidence == "" && err == nil {
		evidence = fmt.Sprintf("%s was not attached to %s", req.Ref, req.Node)
	}
	return evidence, err
}

// block puts an identity on a volume's blocklist; m.mu is held.
func (n *memoryFencer) block(req backends.FenceRequest, call Call) (string, error) {
	v, err := n.findAs(req.Ref, req.Volume)
	if err != nil {
		return "", err
	}
	if req.Identity == "" {
		return "", fmt.Errorf("fence volume %s: the storage system's name of %s is not known: %w", v.ID, req.Node, backends.ErrInvalid)
	}
	v.fenced[req.Identity] = max(v.fenced[req.Identity], req.Token)
	call.Node = n.node
	for node, att := range v.attached {
		if identity(node) == req.Identity && att.Token <= req.Token {
			n.m.pull(att, call)
		}
	}
	return fmt.Sprintf("%s is on the blocklist of %s up to token %d", req.Identity, req.Ref, v.fenced[req.Identity]), nil
}

// Device is an open block device. Closing it twice is an error.
type Device interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Sync makes what was written durable.
	Sync() error
	// Size is in bytes.
	Size() (int64, error)
}

type memoryDevice struct {
	m      *Memory
	v      *memoryVolume
	att    *memoryAttachment
	boots  int
	closed bool
}

var errGone = errors.New("input/output error")

// usable says whether I/O can be done; m.mu is held.
func (d *memoryDevice) usable() error {
	if d.closed || d.att.cut || d.boots != d.att.boots {
		return errGone
	}
	return nil
}

func (d *memoryDevice) ReadAt(p []byte, off int64) (int, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if err := d.usable(); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		if off+int64(n) >= d.v.Size {
			return n, io.EOF
		}
		block, skip := (off+int64(n))/memoryBlock, (off+int64(n))%memoryBlock
		part := p[n:min(len(p), n+int(memoryBlock-skip))]
		clear(part)
		if data := d.v.data[block]; data != nil {
			copy(part, data[skip:])
		}
		n += len(part)
	}
	return n, nil
}

func (d *memoryDevice) WriteAt(p []byte, off int64) (int, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if err := d.usable(); err != nil {
		return 0, err
	}
	if off+int64(len(p)) > d.v.Size {
		return 0, errors.New("no space left on device")
	}
	for n := 0; n < len(p); {
		block, skip := (off+int64(n))/memoryBlock, (off+int64(n))%memoryBlock
		if d.v.data[block] == nil {
			d.v.data[block] = make([]byte, memoryBlock)
		}
		n += copy(d.v.data[block][skip:], p[n:])
	}
	return len(p), nil
}

func (d *memoryDevice) Sync() error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.usable()
}

func (d *memoryDevice) Size() (int64, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.v.Size, d.usable()
}

func (d *memoryDevice) Close() error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if d.closed {
		return errors.New("already closed")
	}
	d.closed = true
	if d.boots == d.att.boots {
		d.att.open--
	}
	return nil
}
