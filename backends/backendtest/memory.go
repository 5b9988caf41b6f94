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

	"github.com/flocker-plugin/flocker/backends"
)

// Memory is a storage system in memory, shared by any number of nodes. It keeps
// the contract to the letter; SetFault makes it misbehave.
type Memory struct {
	props backends.Properties

	mu      sync.Mutex
	volumes map[string]*memoryVolume // by ref
	calls   map[string]int
	fault   func(context.Context, Call) error
}

type memoryVolume struct {
	backends.Volume
	data     map[int64][]byte // by block of memoryBlock bytes; absent is zeros
	attached map[string]backends.Attachment
	open     map[string]int // by node
}

const memoryBlock = 4096

// Call is one call of a Backend's method, as SetFault's function sees it.
type Call struct {
	// Method is the method's name, such as "Attach".
	Method string
	// Node is the node whose backend was called.
	Node string
	// Ref names the volume; empty for Create, List and Attachments.
	Ref string
	// Volume is the dataset's UUID, where the call gives one.
	Volume string
	// Done says that the call has taken effect, and only its reply can get lost.
	Done bool
}

// NewMemory returns an empty storage system. What props leaves out is filled in:
// the name "memory", class F1 with ExclusiveAttach, an allocation unit of 1 MiB.
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
	return &memoryNode{m: m, cluster: cluster, node: node}
}

// SetFault makes every call ask f before it does anything and, if it succeeded,
// again before it returns (Call.Done). What f returns is what the call returns. f
// may wait, until ctx ends.
func (m *Memory) SetFault(f func(ctx context.Context, call Call) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault = f
}

// Calls returns how often each method was called.
func (m *Memory) Calls() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.calls)
}

// Attached returns every attachment of the volume with this dataset UUID, on
// whatever node.
func (m *Memory) Attached(volume string) []backends.Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []backends.Attachment
	for _, v := range m.volumes {
		if v.ID == volume {
			all = slices.AppendSeq(all, maps.Values(v.attached))
		}
	}
	return all
}

// Reboot is a restart of a node's kernel: everything it had open is closed, and
// where no storage system knows of attachments (class F0) they are gone.
func (m *Memory) Reboot(node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, v := range m.volumes {
		delete(v.open, node)
		if m.props.Class == backends.ClassNone {
			delete(v.attached, node)
		}
	}
}

// DevicePrefix begins the path of every device of a Memory.
const DevicePrefix = "/dev/memory/"

// Open opens a device on a node, as if it were the path of a block device: it is
// in use until it is closed. I/O fails once the volume is detached by force.
func (m *Memory) Open(node, device string) (Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.volumes[strings.TrimPrefix(device, DevicePrefix)]
	if v == nil || v.attached[node].Device != device {
		return nil, fmt.Errorf("open %s on %s: no such device", device, node)
	}
	v.open[node]++
	return &memoryDevice{m: m, v: v, node: node, token: v.attached[node].Token}, nil
}

type memoryNode struct {
	m             *Memory
	cluster, node string
}

func (n *memoryNode) Properties() backends.Properties { return n.m.props }

// do runs one call between the two questions to the fault function.
func (n *memoryNode) do(ctx context.Context, call Call, f func() error) error {
	call.Node = n.node
	n.m.mu.Lock()
	n.m.calls[call.Method]++
	fault := n.m.fault
	n.m.mu.Unlock()
	ask := func() error {
		if fault != nil {
			if err := fault(ctx, call); err != nil {
				return err
			}
		}
		return nil
	}
	if err := ask(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", strings.ToLower(call.Method), err)
	}
	n.m.mu.Lock()
	err := f()
	n.m.mu.Unlock()
	if err != nil {
		return err
	}
	call.Done = true
	return ask()
}

func (n *memoryNode) find(ref string) (*memoryVolume, error) {
	v := n.m.volumes[ref]
	if v == nil || (n.cluster != "" && v.Cluster != n.cluster) {
		return nil, fmt.Errorf("volume %s: %w", ref, backends.ErrNotFound)
	}
	return v, nil
}

func (n *memoryNode) Create(ctx context.Context, req backends.CreateRequest) (vol backends.Volume, err error) {
	err = n.do(ctx, Call{Method: "Create", Volume: req.ID}, func() error {
		unit := n.m.props.AllocationUnit
		size := (req.Size + unit - 1) / unit * unit
		switch {
		case req.ID == "" || req.Size <= 0:
			return fmt.Errorf("create volume: an id and a size are needed: %w", backends.ErrInvalid)
		case n.cluster != "" && req.Cluster != n.cluster:
			return fmt.Errorf("create volume %s: cluster %s is not this one: %w", req.ID, req.Cluster, backends.ErrInvalid)
		}
		ref := "m-" + req.ID
		if v := n.m.volumes[ref]; v != nil {
			if v.Size != size || v.Cluster != req.Cluster {
				return fmt.Errorf("create volume %s: there is one with %s: %w", req.ID, backends.Size(v.Size), backends.ErrExists)
			}
			vol = v.Volume
			return nil
		}
		vol = backends.Volume{Ref: ref, ID: req.ID, Cluster: req.Cluster, Name: req.Name, Size: size}
		n.m.volumes[ref] = &memoryVolume{
			Volume: vol, data: map[int64][]byte{},
			attached: map[string]backends.Attachment{}, open: map[string]int{},
		}
		return nil
	})
	return vol, err
}

func (n *memoryNode) Delete(ctx context.Context, ref string) error {
	return n.do(ctx, Call{Method: "Delete", Ref: ref}, func() error {
		v, err := n.find(ref)
		if err != nil {
			return err
		}
		for node, att := range v.attached {
			return fmt.Errorf("delete volume: %w", &backends.AttachedError{Volume: v.ID, Node: node, Token: att.Token})
		}
		delete(n.m.volumes, ref)
		return nil
	})
}

func (n *memoryNode) Get(ctx context.Context, ref string) (vol backends.Volume, err error) {
	err = n.do(ctx, Call{Method: "Get", Ref: ref}, func() error {
		v, err := n.find(ref)
		if err == nil {
			vol = v.Volume
		}
		return err
	})
	return vol, err
}

func (n *memoryNode) List(ctx context.Context) (vols []backends.Volume, err error) {
	err = n.do(ctx, Call{Method: "List"}, func() error {
		for _, v := range n.m.volumes {
			if n.cluster == "" || v.Cluster == n.cluster {
				vols = append(vols, v.Volume)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return vols, nil
}

func (n *memoryNode) Attach(ctx context.Context, req backends.AttachRequest) (att backends.Attachment, err error) {
	err = n.do(ctx, Call{Method: "Attach", Ref: req.Ref, Volume: req.Volume}, func() error {
		v, err := n.find(req.Ref)
		if err != nil {
			return err
		}
		if v.ID != req.Volume {
			return fmt.Errorf("attach volume %s: %s is volume %s: %w", req.Volume, req.Ref, v.ID, backends.ErrInvalid)
		}
		for node, other := range v.attached {
			if node == n.node && other.Token == req.Token {
				att = other
				return nil
			}
			if node == n.node || n.m.props.ExclusiveAttach {
				return &backends.AttachedError{Volume: v.ID, Node: node, Token: other.Token}
			}
		}
		att = backends.Attachment{
			ID: fmt.Sprintf("%s@%s#%d", req.Ref, n.node, req.Token), Ref: req.Ref, Volume: v.ID,
			Node: n.node, Token: req.Token, Device: DevicePrefix + req.Ref,
		}
		v.attached[n.node] = att
		return nil
	})
	return att, err
}

// Detach takes an attachment away from another node, as storage systems of class
// F1 do when an owner is dead; what has the device open there sees I/O errors.
func (n *memoryNode) Detach(ctx context.Context, att backends.Attachment) error {
	return n.do(ctx, Call{Method: "Detach", Ref: att.Ref, Volume: att.Volume}, func() error {
		v := n.m.volumes[att.Ref]
		if v == nil {
			return nil
		}
		is, ok := v.attached[att.Node]
		if !ok || is.Token != att.Token {
			return nil
		}
		if att.Node != n.node && n.m.props.Class == backends.ClassNone {
			return fmt.Errorf("detach volume %s: it can only be detached on %s: %w", v.ID, att.Node, backends.ErrInvalid)
		}
		if att.Node == n.node && v.open[n.node] > 0 {
			return fmt.Errorf("detach volume %s: %s is open: %w", v.ID, is.Device, backends.ErrInUse)
		}
		delete(v.attached, att.Node)
		delete(v.open, att.Node)
		return nil
	})
}

func (n *memoryNode) Attachments(ctx context.Context) (atts []backends.Attachment, err error) {
	err = n.do(ctx, Call{Method: "Attachments"}, func() error {
		for _, v := range n.m.volumes {
			if att, ok := v.attached[n.node]; ok {
				atts = append(atts, att)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return atts, nil
}

// Resize makes a Memory's backends a backends.Resizer.
func (n *memoryNode) Resize(ctx context.Context, ref string, size int64) (newSize int64, err error) {
	err = n.do(ctx, Call{Method: "Resize", Ref: ref}, func() error {
		v, err := n.find(ref)
		if err != nil {
			return err
		}
		unit := n.m.props.AllocationUnit
		v.Size = max(v.Size, (size+unit-1)/unit*unit)
		newSize = v.Size
		return nil
	})
	return newSize, err
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
	node   string
	token  int64
	closed bool
}

var errGone = errors.New("input/output error")

// usable says whether I/O can be done; m.mu is held.
func (d *memoryDevice) usable() error {
	if att, ok := d.v.attached[d.node]; d.closed || !ok || att.Token != d.token || d.v.open[d.node] == 0 {
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
	if att, ok := d.v.attached[d.node]; ok && att.Token == d.token && d.v.open[d.node] > 0 {
		d.v.open[d.node]--
	}
	return nil
}
