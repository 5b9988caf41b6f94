package rbd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/rbd"
)

// fakeCeph is a Ceph cluster in memory, as far as the backend sees it: what its programs
// print and end with is what those of Ceph 16.2 do. It is strict where Ceph is: a lock is
// had by one, a client on the blocklist neither writes nor watches.
type fakeCeph struct {
	t         backendtest.T
	dir       string // of the hosts
	mu        sync.Mutex
	images    map[string]*fakeImage
	objects   map[string]*fakeObject
	blocklist map[string]bool
	briefly   map[string]bool // which of them somebody else has put there, for an hour
	hosts     map[string]*fakeHost
	clients   map[string]*fakeDevice // all there were, by address
	number    int
	down      bool
	// fault, if set, says what becomes of a call.
	fault func(program string, args []string) fault
	// late is how much later a call is carried out that dawdles; 0 is up to 20 ms.
	late time.Duration
	// pace is how long a call takes.
	pace time.Duration
	// beforeClaim, if set, is what happens right before a claim reaches its object.
	beforeClaim func()
	// before, if set, is called with each call of a program, outside of all locks.
	before func(program string, args []string)
}

// fault is what becomes of a call: of a program of Ceph, or of what a host does to have a
// device (start, show) and to have none (unmap).
type fault int

const (
	heard       fault = iota
	lost              // it is not carried out, and not answered
	unheard           // it is carried out, and not answered
	half              // it is carried out, and its program dies while it prints the answer
	refused           // it is not carried out, and the answer says so
	dawdles           // it is carried out some time after the caller gave up
	slow              // it takes its time
	faultEnds         // how many there are that a process survives, and soon
	silent            // as lost, and the program waits for as long as its caller does
	killed            // its process is killed before it
	killedAfter       // its process is killed when it has been carried out
)

type fakeImage struct {
	id       string
	size     int64
	meta     map[string]string
	data     []byte
	watchers map[string]bool
}

type fakeObject struct {
	cookie, locker string // of the lock
	keys           map[string]bool
}

// fakeHost is what the kernel of a host has.
type fakeHost struct {
	ceph    *fakeCeph
	mu      sync.Mutex
	devices map[string]*fakeDevice // begun ones, too
}

type fakeDevice struct {
	host         *fakeHost
	label, path  string
	image        *fakeImage
	client       string
	size         int64
	open         int
	exclusive    bool
	gone, killed bool
	begun        bool
	shown, heard bool // somebody could use it; the cluster has heard its client's end
}

// newFake returns a cluster. A claim that is removed while its client may write is an error.
func newFake(t backendtest.T) *fakeCeph {
	dir, err := os.MkdirTemp("/tmp", "flocker-rbd-unit-")
	if err != nil {
		panic(err)
	}
	dirs.Lock()
	defer dirs.Unlock()
	dirs.all = append(dirs.all, dir)
	return &fakeCeph{
		t: t, dir: dir, images: map[string]*fakeImage{}, objects: map[string]*fakeObject{}, blocklist: map[string]bool{}, hosts: map[string]*fakeHost{},
		clients: map[string]*fakeDevice{},
	}
}

const fakeFSID = "a7f64266-0894-4f1e-a635-d0aeaca0e993"

// node returns a new instance of the backend of a node.
func (c *fakeCeph) node(cluster, node string) backends.Backend {
	b, err := rbd.New(rbd.Config{Monitors: []string{"192.0.2.1"}, Pool: "volumes", RunDir: c.dir}, rbd.Self{Node: node, Cluster: cluster})
	if err != nil {
		panic(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.hosts[cluster+node]
	if h == nil {
		h = &fakeHost{ceph: c, devices: map[string]*fakeDevice{}}
		c.hosts[cluster+node] = h
	}
	p := &process{fakeHost: h}
	b.Pretend(p.exec, p)
	return b
}

// process is that of the plugin on a host. One that was killed does nothing any more.
type process struct {
	*fakeHost
	killed atomic.Bool
}

// suffers says what becomes of a call, and waits for as long as it takes.
func (p *process) suffers(ctx context.Context, program string, args []string) fault {
	c := p.ceph
	time.Sleep(c.pace)
	if p.killed.Load() {
		return lost
	}
	c.mu.Lock()
	f := heard
	if c.fault != nil {
		f = c.fault(program, args)
	}
	if onHost := program == "show" || program == "unmap"; c.down && !onHost {
		f = silent
	}
	c.mu.Unlock()
	switch f {
	case silent:
		<-ctx.Done()
		return lost
	case slow:
		time.Sleep(rand.N(5 * time.Millisecond))
		return heard
	case killed:
		p.killed.Store(true)
		return lost
	case killedAfter:
		p.killed.Store(true)
		return unheard
	default:
		return f
	}
}

// exec is a call of a program.
func (p *process) exec(ctx context.Context, program string, args []string) (out, errs string, code int) {
	c := p.ceph
	if c.before != nil {
		c.before(program, args)
	}
	switch p.suffers(ctx, program, args) {
	case heard:
		if ctx.Err() != nil {
			return "", "", 1
		}
		return c.do(program, args)
	case refused:
		return "", program + ": error: (1) Operation not permitted", 1
	case half:
		out, _, _ = c.do(program, args)
		return out[:len(out)/2], "", -1
	case unheard:
		_, _, _ = c.do(program, args)
	case dawdles:
		late := c.late
		if late == 0 {
			late = rand.N(20 * time.Millisecond)
		}
		time.AfterFunc(late, func() { _, _, _ = c.do(program, args) })
	default:
	}
	return "", program + ": error: (110) Connection timed out", 110
}

func fails(number syscall.Errno, text string) (string, string, int) {
	words := map[syscall.Errno]string{
		syscall.ENOENT: "No such file or directory", syscall.EEXIST: "File exists", syscall.EBUSY: "Device or resource busy",
	}
	return "", fmt.Sprintf("%s: (%d) %s\n", text, int(number), words[number]), int(number)
}

func encoded(v any) (string, string, int) {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(text) + "\n", "", 0
}

// do carries a call out.
func (c *fakeCeph) do(program string, args []string) (out, errs string, code int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(args); n > 2 && args[n-2] == "--format" {
		args = args[:n-2]
	}
	switch program {
	case "ceph":
		return c.doCeph(args)
	case "rbd":
		return c.doRBD(args)
	case "rados":
		return c.doRados(args)
	}
	panic("there is no program " + program)
}

func (c *fakeCeph) doCeph(args []string) (out, errs string, code int) {
	switch {
	case args[0] == "fsid" || len(args) == 1:
		return encoded(map[string]string{"fsid": fakeFSID})
	case args[2] == "add":
		c.blocklist[args[3]] = true
		for _, i := range c.images {
			delete(i.watchers, args[3])
		}
		return "", "blocklisting " + args[3] + " until …", 0
	}
	for address := range c.blocklist {
		until := time.Now().AddDate(5, 0, 0)
		if c.briefly[address] {
			until = time.Now().Add(time.Hour)
		}
		out += address + " " + until.UTC().Format("2006-01-02T15:04:05.000000-0700") + "\n"
	}
	return out, fmt.Sprintf("listed %d entries\n", len(c.blocklist)), 0
}

func (c *fakeCeph) doRBD(args []string) (out, errs string, code int) {
	spec := ""
	for _, a := range args {
		if strings.HasPrefix(a, "volumes") && spec == "" {
			spec = a
		}
	}
	i := c.images[spec]
	if i == nil && args[0] != "create" && args[0] != "ls" {
		return fails(syscall.ENOENT, "rbd: error opening image "+spec)
	}
	switch args[0] {
	case "create":
		if i != nil {
			return fails(syscall.EEXIST, "rbd: create error")
		}
		mib, _ := strconv.ParseInt(strings.TrimSuffix(args[slices.Index(args, "--size")+1], "M"), 10, 64)
		c.number++
		c.images[spec] = &fakeImage{
			id: fmt.Sprint("id", c.number), size: mib << 20, meta: map[string]string{}, data: make([]byte, mib<<20), watchers: map[string]bool{},
		}
	case "info":
		return encoded(map[string]any{"name": spec, "id": i.id, "size": i.size})
	case "image-meta":
		key := args[3]
		if args[1] == "set" {
			i.meta[key] = args[4]
			break
		}
		if _, ok := i.meta[key]; !ok {
			return fails(syscall.ENOENT, "failed to get metadata "+key+" of image")
		}
		return i.meta[key] + "\n", "", 0
	case "ls":
		type listed struct {
			Image string `json:"image"`
			ID    string `json:"id"`
			Size  int64  `json:"size"`
		}
		all := []listed{{"other", "x", 1}}
		for spec, i := range c.images {
			all = append(all, listed{strings.TrimPrefix(spec, "volumes/"), i.id, i.size})
		}
		return encoded(all)
	case "rm":
		if len(i.watchers) > 0 {
			return fails(syscall.EBUSY, "rbd: error: image still has watchers")
		}
		delete(c.images, spec)
	case "resize":
		mib, _ := strconv.ParseInt(strings.TrimSuffix(args[slices.Index(args, "--size")+1], "M"), 10, 64)
		i.size = mib << 20
		i.data = append(i.data, make([]byte, i.size-int64(len(i.data)))...)
	case "status":
		watchers := []rbdmap.Watcher{}
		for address := range i.watchers {
			watchers = append(watchers, rbdmap.Watcher{Address: address})
		}
		return encoded(map[string]any{"watchers": watchers})
	default:
		panic(fmt.Sprint("rbd ", args))
	}
	return "", "", 0
}

func (c *fakeCeph) doRados(args []string) (out, errs string, code int) {
	args = args[4:] // the pool and its namespace
	if args[0] == "lock" && args[1] == "get" && c.beforeClaim != nil {
		c.beforeClaim()
	}
	name := args[1]
	if args[0] == "lock" {
		name = args[2]
	}
	o := c.objects[name]
	if o == nil {
		o = &fakeObject{keys: map[string]bool{}}
		if args[0] != "setomapval" && (args[0] != "lock" || args[1] != "get") {
			_, errs, _ := fails(syscall.ENOENT, "error on "+name)
			return "", errs, 1
		}
		c.objects[name] = o
	}
	cookie := ""
	if i := slices.Index(args, "--lock-cookie"); i > 0 {
		cookie = args[i+1]
	}
	switch strings.Join(args[:min(2, len(args))], " ") {
	case "lock get":
		if o.locker != "" {
			_, errs, _ := fails(syscall.EBUSY, "ERROR: failed locking")
			return "", errs, 1
		}
		c.number++
		o.cookie, o.locker = cookie, fmt.Sprint("client.", c.number)
		return "", "", 0
	case "lock info":
		lockers := []map[string]string{}
		if o.locker != "" {
			lockers = append(lockers, map[string]string{"name": o.locker, "cookie": o.cookie})
		}
		return encoded(map[string]any{"name": "flocker", "lockers": lockers})
	case "lock break":
		if o.locker != args[4] || o.cookie != cookie || o.locker == "" {
			_, errs, _ := fails(syscall.ENOENT, "ERROR: failed breaking lock")
			return "", errs, 1
		}
		client := strings.Fields(cookie)[3]
		if d := c.clients[client]; d != nil && d.shown && !d.heard && !c.blocklist[client] {
			c.t.Errorf("the claim %q is removed, and its client may write", cookie)
		}
		o.cookie, o.locker = "", ""
		return "", "", 0
	}
	switch args[0] {
	case "rm":
		delete(c.objects, name)
	case "setomapval":
		o.keys[args[2]] = true
	case "rmomapkey":
		delete(o.keys, args[2])
	case "listomapkeys":
		for key := range o.keys {
			out += key + "\n"
		}
	default:
		panic(fmt.Sprint("rados ", args))
	}
	return out, "", 0
}

// step is something that a process does on its host; well says that all has gone well.
func (p *process) step(ctx context.Context, what string, do func(well bool)) error {
	f := p.suffers(ctx, what, nil)
	switch f {
	case heard, half:
		do(f == heard)
		return nil
	case unheard:
		do(false)
	default:
	}
	return fmt.Errorf("%s: it was not seen to be done: %w", what, backends.ErrUnavailable)
}

// Map implements rbd.Attacher.
func (p *process) Map(ctx context.Context, image rbdmap.Image, label string, allow func(rbdmap.Client) error) (rbdmap.Device, error) {
	d, err := p.start(ctx, image, label)
	if err == nil {
		err = allow(rbdmap.Client{Address: d.client})
	}
	if err == nil {
		err = p.step(ctx, "show", func(bool) {
			p.change(func() { d.begun = false })
			p.ceph.mu.Lock()
			defer p.ceph.mu.Unlock()
			d.shown = true
		})
	}
	if err == nil {
		return rbdmap.Device{Label: label, Path: d.path, Method: rbdmap.FUSE}, nil
	}
	if d != nil && !p.killed.Load() {
		p.change(func() { delete(p.devices, label) })
		d.close(true)
	}
	return rbdmap.Device{}, err
}

// start starts a client, which opens the image.
func (p *process) start(ctx context.Context, image rbdmap.Image, label string) (d *fakeDevice, err error) {
	c, missing := p.ceph, false
	err = p.step(ctx, "start", func(bool) {
		c.mu.Lock()
		i := c.images[image.Spec()]
		if missing = i == nil; !missing {
			c.number++
			d = &fakeDevice{
				host: p.fakeHost, label: label, path: fmt.Sprint("/dev/fake", c.number), image: i, size: i.size,
				client: fmt.Sprintf("192.0.2.9:0/%d", c.number), begun: true,
			}
			i.watchers[d.client], c.clients[d.client] = true, d
		}
		c.mu.Unlock()
		if !missing {
			p.change(func() { p.devices[label] = d })
		}
	})
	if err == nil && missing {
		err = fmt.Errorf("qemu-storage-daemon: error reading header from %s: %w", image.Name, backends.ErrNotFound)
	}
	return d, err
}

// change changes the host's devices.
func (h *fakeHost) change(do func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	do()
}

// close ends the client, and says whether the cluster has heard of it, which it can.
func (d *fakeDevice) close(can bool) bool {
	c := d.host.ceph
	c.mu.Lock()
	defer c.mu.Unlock()
	d.gone = true
	delete(d.image.watchers, d.client)
	d.heard = can && !c.blocklist[d.client] && !c.down && !d.killed
	return d.heard
}

// Devices implements rbd.Attacher.
func (h *fakeHost) Devices() ([]rbdmap.Device, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []rbdmap.Device
	for _, d := range h.devices {
		if !d.begun {
			all = append(all, rbdmap.Device{Label: d.label, Path: d.path, Method: rbdmap.FUSE})
		}
	}
	return all, nil
}

// Begun implements rbd.Attacher.
func (h *fakeHost) Begun() ([]rbdmap.Device, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []rbdmap.Device
	for _, d := range h.devices {
		if d.begun {
			all = append(all, rbdmap.Device{Label: d.label})
		}
	}
	return all, nil
}

// Unmap implements rbd.Attacher.
func (p *process) Unmap(ctx context.Context, label string) (clean bool, err error) {
	var d *fakeDevice
	p.change(func() {
		if d = p.devices[label]; d != nil && d.open > 0 {
			err = fmt.Errorf("%s is open or mounted: %w", d.path, backends.ErrInUse)
		}
	})
	if d == nil || err != nil {
		return false, err
	}
	err = p.step(ctx, "unmap", func(well bool) {
		p.change(func() { delete(p.devices, label) })
		clean = d.close(well)
	})
	return clean, err
}

// Served implements rbd.Attacher.
func (h *fakeHost) Served(label string) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[label]
	return d != nil && !d.killed, nil
}

// Grow implements rbd.Attacher.
func (h *fakeHost) Grow(_ context.Context, label string, size int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.devices[label]; d != nil {
		d.size = size
	}
	return nil
}

// open opens a device of a node.
func (c *fakeCeph) open(node, path string, exclusive bool) (backendtest.Device, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, h := range c.hosts {
		if !strings.HasSuffix(name, node) {
			continue
		}
		h.mu.Lock()
		for _, d := range h.devices {
			if d.path != path {
				continue
			}
			defer h.mu.Unlock()
			if exclusive && d.exclusive {
				return nil, syscall.EBUSY
			}
			d.open++
			d.exclusive = d.exclusive || exclusive
			return &fakeOpen{d: d, exclusive: exclusive}, nil
		}
		h.mu.Unlock()
	}
	return nil, syscall.ENXIO
}

type fakeOpen struct {
	d                 *fakeDevice
	exclusive, closed bool
}

func (f *fakeOpen) io(do func()) error {
	c := f.d.host.ceph
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocklist[f.d.client] || f.d.gone || f.closed {
		return syscall.EIO
	}
	do()
	return nil
}

func (f *fakeOpen) ReadAt(b []byte, at int64) (n int, err error) {
	err = f.io(func() { n = copy(b, f.d.image.data[at:]) })
	return n, err
}

func (f *fakeOpen) WriteAt(b []byte, at int64) (n int, err error) {
	err = f.io(func() { n = copy(f.d.image.data[at:], b) })
	return n, err
}

func (f *fakeOpen) Sync() error { return f.io(func() {}) }

func (f *fakeOpen) Size() (int64, error) {
	f.d.host.mu.Lock()
	defer f.d.host.mu.Unlock()
	return f.d.size, nil
}

func (f *fakeOpen) Close() error {
	f.d.host.mu.Lock()
	defer f.d.host.mu.Unlock()
	if f.closed {
		return errors.New("closed already")
	}
	f.closed = true
	f.d.open--
	if f.exclusive {
		f.d.exclusive = false
	}
	return nil
}

// dirs are what the tests have made. Their paths must be short.
var dirs struct {
	sync.Mutex
	all []string
}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, dir := range dirs.all {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

func TestContract(t *testing.T) {
	for name, random := range map[string]bool{"at once": false, "slow": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backendtest.Run(t, backendtest.Config{
				New: func(t backendtest.T) backendtest.Storage {
					c := newFake(t)
					s := c.storage()
					s.Faults = c.faults()
					if random {
						s.Faults = nil
						c.fault = func(string, []string) fault {
							if rand.N(8) == 0 {
								return slow
							}
							return heard
						}
					}
					return s
				},
				Size: 2 << 20, Many: 100, Timeout: 20 * time.Second,
			})
		})
	}
}

func (c *fakeCeph) storage() backendtest.Storage {
	return backendtest.Storage{Node: c.node, Open: c.open, Down: func(down bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.down = down
	}}
}

// faults are what happens to the contract's requests, each of which is a call.
func (c *fakeCeph) faults() map[string]func(n int) func() bool {
	return map[string]func(n int) func() bool{
		"refused": c.nth(refused), "lost": c.nth(lost), "answer lost": c.nth(unheard), "half an answer": c.nth(half),
	}
}

// nth makes the next call but n suffer a fault.
func (c *fakeCeph) nth(f fault) func(n int) func() bool {
	set := func(fault func(string, []string) fault) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.fault = fault
	}
	return func(n int) func() bool {
		var calls atomic.Int64
		set(func(string, []string) fault {
			if calls.Add(1) == int64(n)+1 {
				return f
			}
			return heard
		})
		return func() bool {
			set(nil)
			return calls.Load() > int64(n)
		}
	}
}
