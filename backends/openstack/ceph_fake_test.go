package openstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// FakeCeph is a Ceph cluster and the hosts that have its images, in memory. A client on the
// blocklist neither writes nor watches.
type FakeCeph struct {
	dir string // for the hosts' locks

	mu      sync.Mutex
	images  map[string]*fakeImage
	clients map[string]*fakeClient // by address
	listed  []string               // the blocklist
	fails   string                 // calls that have this in them fail
	hides   bool                   // the blocklist does not show what was added
	made    int                    // how many devices
	// before and after, if set, are what happens when a client runs: before it is allowed
	// to have a device, and before it has one.
	before, after func()
}

type fakeImage struct {
	size   int64
	blocks map[int64][]byte
}

type fakeClient struct {
	*fakeImage
	c             *FakeCeph
	spec, address string
	node          string
	device        rbdmap.Device
	open          int
	gone, died    bool
}

// NewFakeCeph returns an empty cluster.
func NewFakeCeph(dir string) *FakeCeph {
	return &FakeCeph{dir: dir, images: map[string]*fakeImage{}, clients: map[string]*fakeClient{}}
}

// Node returns the backend of a node.
func (c *FakeCeph) Node(cfg Config, self Self) *CephConnector {
	made, err := New(cfg, self)
	if err != nil {
		panic(err)
	}
	b := made.(*CephConnector)
	b.pace = quick
	b.storage = images{
		dir: filepath.Join(c.dir, self.Node), attacher: fakeAttacher{c, self.Node},
		ceph: rbdmap.Cluster{Exec: c.exec},
	}
	return b
}

// Fail makes the calls of Ceph's programs fail that have a text in them; empty is none.
func (c *FakeCeph) Fail(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fails = text
}

// Meanwhile makes something happen while images are mapped: before a client is allowed to
// have a device, or after.
func (c *FakeCeph) Meanwhile(before, after func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.before, c.after = before, after
}

// Made returns how many devices there have been.
func (c *FakeCeph) Made() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.made
}

// Hide makes the blocklist not show what is added to it.
func (c *FakeCeph) Hide(hides bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hides = hides
}

// Blocklist returns the clients on it.
func (c *FakeCeph) Blocklist() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.listed)
}

// Reboot ends all clients of a node, or their programs alone.
func (c *FakeCeph) Reboot(node string, programs bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, is := range c.clients {
		if is.node == node {
			is.gone, is.died = is.gone || !programs, true
		}
	}
}

func (c *FakeCeph) exec(_ context.Context, program string, args []string) (out, errs string, code int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := program + " " + strings.Join(args, " ")
	switch {
	case c.fails != "" && strings.Contains(call, c.fails):
		return "", program + ": error: (110) Connection timed out", 110
	case strings.HasPrefix(call, "ceph osd blocklist add "):
		if !c.hides {
			c.listed = append(c.listed, args[3])
		}
	case call == "ceph osd blocklist ls":
		for _, address := range c.listed {
			out += address + " " + time.Now().AddDate(5, 0, 0).Format("2006-01-02T15:04:05.000000-0700") + "\n"
		}
	case strings.HasPrefix(call, "rbd status "):
		if c.images[args[1]] == nil {
			return "", "rbd: error opening image " + args[1] + ": (2) No such file or directory", 2
		}
		watchers := []rbdmap.Watcher{}
		for address, is := range c.clients {
			if is.spec == args[1] && is.works() {
				watchers = append(watchers, rbdmap.Watcher{Address: address})
			}
		}
		text, _ := json.Marshal(map[string]any{"watchers": watchers}) // never fails
		out = string(text)
	default:
		panic(call)
	}
	return out, "", 0
}

func (f *fakeClient) works() bool {
	return !f.gone && !f.died && !slices.Contains(f.c.listed, f.address)
}

// Stored implements openstacktest.Guest.
func (c *FakeCeph) Stored(volume string, gib int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gib == 0 {
		delete(c.images, "volumes/volume-"+volume)
		return
	}
	c.images["volumes/volume-"+volume] = &fakeImage{int64(gib) << 30, map[int64][]byte{}}
}

// Plug, Unplug and Holds implement openstacktest.Guest: there are no servers.
func (c *FakeCeph) Plug(string, string, int)  {}
func (c *FakeCeph) Unplug(string, string)     {}
func (c *FakeCeph) Holds(string, string) bool { return false }

type fakeAttacher struct {
	c    *FakeCeph
	node string
}

func (a fakeAttacher) Map(_ context.Context, image rbdmap.Image, label string, allow func(rbdmap.Client) error) (rbdmap.Device, error) {
	a.c.mu.Lock()
	found := a.c.images[image.Spec()]
	if found == nil {
		a.c.mu.Unlock()
		return rbdmap.Device{}, fmt.Errorf("qemu-storage-daemon: error reading header from %s: %w", image.Name, backends.ErrNotFound)
	}
	n := len(a.c.clients)
	is := &fakeClient{
		fakeImage: found, c: a.c, spec: image.Spec(), address: fmt.Sprintf("192.0.2.7:0/%d", n), node: a.node, gone: true,
		device: rbdmap.Device{Label: label, Path: fmt.Sprintf("/dev/rbd%d", n), Method: rbdmap.KRBD},
	}
	a.c.clients[is.address] = is
	before, after := a.c.before, a.c.after
	a.c.mu.Unlock()
	if before != nil {
		before()
	}
	if err := allow(rbdmap.Client{Address: is.address}); err != nil {
		return rbdmap.Device{}, err
	}
	if after != nil {
		after()
	}
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	is.gone = false
	a.c.made++
	return is.device, nil
}

func (a fakeAttacher) find(label string) *fakeClient {
	for _, is := range a.c.clients {
		if is.node == a.node && !is.gone && (is.device.Label == label || is.device.Path == label) {
			return is
		}
	}
	return nil
}

func (a fakeAttacher) Devices() (found []rbdmap.Device, err error) {
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	for _, is := range a.c.clients {
		if is.node == a.node && !is.gone {
			found = append(found, is.device)
		}
	}
	return found, nil
}

func (a fakeAttacher) Served(label string) (bool, error) {
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	is := a.find(label)
	return is != nil && !is.died, nil
}

func (a fakeAttacher) Unmap(_ context.Context, label string) (clean bool, err error) {
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	is := a.find(label)
	if is == nil {
		return false, nil
	}
	if is.open > 0 {
		return false, fmt.Errorf("%s is open: %w", is.device.Path, backends.ErrInUse)
	}
	clean = is.works()
	is.gone = true
	return clean, nil
}

// Open opens a device of a node.
func (c *FakeCeph) Open(node, path string) (*FakeDevice, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	is := fakeAttacher{c, node}.find(path)
	if is == nil {
		return nil, os.ErrNotExist
	}
	is.open++
	return &FakeDevice{fakeClient: is}, nil
}

// FakeDevice is an open device.
type FakeDevice struct {
	*fakeClient

	closed bool
}

func (d *FakeDevice) do(p []byte, off int64, f func(data, part []byte)) (int, error) {
	const size = 4096
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if !d.works() || d.closed {
		return 0, errors.New("input/output error")
	}
	if off+int64(len(p)) > d.size {
		return 0, io.EOF
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		if d.blocks[at/size] == nil {
			d.blocks[at/size] = make([]byte, size)
		}
		part := p[n:min(len(p), n+size-int(at%size))]
		f(d.blocks[at/size][at%size:], part)
		n += len(part)
	}
	return len(p), nil
}

// ReadAt implements backendtest.Device.
func (d *FakeDevice) ReadAt(p []byte, off int64) (int, error) {
	return d.do(p, off, func(data, part []byte) { copy(part, data) })
}

// WriteAt implements backendtest.Device.
func (d *FakeDevice) WriteAt(p []byte, off int64) (int, error) {
	return d.do(p, off, func(data, part []byte) { copy(data, part) })
}

// Sync implements backendtest.Device.
func (d *FakeDevice) Sync() error { _, err := d.do(nil, 0, nil); return err }

// Size implements backendtest.Device.
func (d *FakeDevice) Size() (int64, error) { return d.size, d.Sync() }

// Close implements backendtest.Device.
func (d *FakeDevice) Close() error {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	d.closed = true
	d.open--
	return nil
}
