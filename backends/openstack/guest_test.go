package openstack_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// cloud is OpenStack and its servers' kernels.
type cloud struct {
	*openstacktest.Server
	dir    string
	secret string // the file
	cfg    func(*openstack.Config)

	nodesMu sync.Mutex
	servers map[string]string // by node

	mu     sync.Mutex
	disks  map[string]*disk // by volume
	plugs  map[string]*plug // by server and volume
	count  int
	holds  map[string]bool   // servers that let go of nothing
	hidden map[string]bool   // servers whose kernel shows nothing
	serial map[string]string // what another disk says it is
	bus    string            // vd, sd, nvme or xvd
	places map[string]string // what Nova calls a volume, by server and volume
	xen    xenGuest
}

type disk struct {
	size   int64
	blocks map[int64][]byte
}

// plug is a volume in a server.
type plug struct {
	*disk
	c    *cloud
	sys  string // its directory
	path string // that of a path to it, with multipath
	name string
	open int
	gone bool
}

func newCloud(t backendtest.T, cfg openstacktest.Config) *cloud {
	t.Helper()
	c := &cloud{
		dir: t.TempDir(), servers: map[string]string{}, disks: map[string]*disk{}, plugs: map[string]*plug{},
		holds: map[string]bool{}, hidden: map[string]bool{}, serial: map[string]string{}, bus: "vd",
		places: map[string]string{},
	}
	c.secret = filepath.Join(c.dir, "secret")
	if err := os.WriteFile(c.secret, []byte(openstacktest.Secret+"\n"), 0o600); err != nil {
		t.Fatalf("%v", err)
	}
	c.Server = openstacktest.New(cfg, c)
	t.Cleanup(c.Close)
	return c
}

// TestMain makes sure that no login of this machine is used.
func TestMain(m *testing.M) {
	for _, name := range os.Environ() {
		if name, _, _ := strings.Cut(name, "="); strings.HasPrefix(name, "OS_") {
			if err := os.Unsetenv(name); err != nil {
				panic(err)
			}
		}
	}
	os.Exit(m.Run())
}

func (c *cloud) server(node string) string {
	c.nodesMu.Lock()
	defer c.nodesMu.Unlock()
	if c.servers[node] == "" {
		c.servers[node] = c.AddServer("compute-of-" + node)
	}
	return c.servers[node]
}

// password is how a user logs in.
func (c *cloud) password(user string) openstack.Config {
	return openstack.Config{
		AuthURL: c.URL + "/v3", Username: user, UserDomain: "Default", PasswordFile: c.secret,
		ProjectName: "shop", ProjectDomain: "Sales", Region: openstacktest.Region, GrowAttached: true,
	}
}

func (c *cloud) node(cluster, node string) backends.Backend { return c.backend(cluster, node) }

func (c *cloud) backend(cluster, node string) *openstack.Nova {
	return c.with(cluster, node, c.cfg).(*openstack.Nova)
}

// with is a node with other settings.
func (c *cloud) with(cluster, node string, change func(*openstack.Config)) backends.Backend {
	server := c.server(node)
	cfg := c.password(openstacktest.User)
	cfg.ServerID = server
	if change != nil {
		change(&cfg)
	}
	b, err := openstack.New(cfg, openstack.Self{Node: node, Cluster: cluster})
	if err != nil {
		panic(err)
	}
	openstack.Fast(b)
	sysfs := filepath.Join(c.dir, server)
	if err := os.MkdirAll(filepath.Join(sysfs, "block"), 0o755); err != nil {
		panic(err)
	}
	openstack.Novas(b).Kernel(sysfs, func(path string) error { return c.claimed(server, path) })
	return b
}

// Stored implements openstacktest.Guest.
func (c *cloud) Stored(volume string, gib int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gib == 0 {
		delete(c.disks, volume)
		return
	}
	if c.disks[volume] == nil {
		c.disks[volume] = &disk{blocks: map[int64][]byte{}}
	}
	c.disks[volume].size = int64(gib) << 30
	for id, p := range c.plugs {
		if strings.HasSuffix(id, volume) && p.sys != "" {
			must(os.WriteFile(filepath.Join(p.sys, "size"), fmt.Appendf(nil, "%d\n", p.size/512), 0o644))
		}
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// Plug implements openstacktest.Guest.
func (c *cloud) Plug(server, volume string, gib int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disks[volume] == nil {
		c.disks[volume] = &disk{int64(gib) << 30, map[int64][]byte{}}
	}
	c.count++
	letter := string(rune('a'+c.count/26%26)) + string(rune('a'+c.count%26))
	name, file, serial := "vd"+letter+string(rune('a'+c.count/676%26)), "serial", volume[:20]
	switch c.bus {
	case "sd":
		name, file, serial = "sd"+name[2:], "device/vpd_pg80", "\x00\x80\x00\x24"+volume
	case "nvme":
		name, file = fmt.Sprintf("nvme%dn1", c.count), "device/serial"
	case "xvd":
		name, file, serial = c.xen.disk(c.places[server+volume])
	}
	p := &plug{disk: c.disks[volume], c: c, name: name, open: c.xen.open}
	c.plugs[server+volume] = p
	if c.hidden[server] {
		return
	}
	if other := c.serial[server]; other != "" {
		serial = other
	}
	made := filepath.Join(c.dir, server, p.name) // appears at once, with all it has
	must(os.MkdirAll(filepath.Join(made, "device"), 0o755))
	for name, text := range map[string]string{
		"dev": fmt.Sprintf("252:%d\n", c.count), file: serial + "\n", "size": fmt.Sprintf("%d\n", p.size/512+c.xen.more),
	} {
		must(os.WriteFile(filepath.Join(made, name), []byte(text), 0o644))
	}
	p.sys = filepath.Join(c.dir, server, "block", p.name)
	if c.bus == "nvme" { // with multipath, its path is shown first
		p.path = filepath.Join(c.dir, server, "block", strings.Replace(p.name, "n1", "c0n1", 1))
		must(os.CopyFS(p.path, os.DirFS(made)))
		must(os.Remove(filepath.Join(p.path, "dev")))
	}
	must(os.Rename(made, p.sys))
}

// Unplug implements openstacktest.Guest.
func (c *cloud) Unplug(server, volume string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.plugs[server+volume]
	if p == nil {
		return
	}
	p.gone = true
	delete(c.plugs, server+volume)
	if p.sys != "" {
		must(os.RemoveAll(p.path))
		gone := filepath.Join(c.dir, server, p.name)
		must(os.Rename(p.sys, gone)) // goes at once, with all it has
		must(os.RemoveAll(gone))
	}
}

// Holds implements openstacktest.Guest.
func (c *cloud) Holds(server, volume string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holds[server] && c.plugs[server+volume] != nil
}

func (c *cloud) find(server, path string) *plug {
	for id, p := range c.plugs {
		if strings.HasPrefix(id, server) && "/dev/"+p.name == path {
			return p
		}
	}
	return nil
}

func (c *cloud) claimed(server, path string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.find(server, path); p != nil && p.open > 0 {
		return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
	}
	return nil
}

func (c *cloud) open(node, path string, _ bool) (backendtest.Device, error) {
	server := c.server(node)
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.find(server, path)
	if p == nil {
		return nil, os.ErrNotExist
	}
	p.open++
	return &handle{plug: p}, nil
}

type handle struct {
	*plug
	closed bool
}

var errIO = errors.New("input/output error")

const block = 4096

func (h *handle) do(p []byte, off int64, f func(data, part []byte)) (int, error) {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	if h.gone || h.closed {
		return 0, errIO
	}
	if off+int64(len(p)) > h.size {
		return 0, io.EOF
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		if h.blocks[at/block] == nil {
			h.blocks[at/block] = make([]byte, block)
		}
		part := p[n:min(len(p), n+block-int(at%block))]
		f(h.blocks[at/block][at%block:], part)
		n += len(part)
	}
	return len(p), nil
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	return h.do(p, off, func(data, part []byte) { copy(part, data) })
}

func (h *handle) WriteAt(p []byte, off int64) (int, error) {
	return h.do(p, off, func(data, part []byte) { copy(data, part) })
}

func (h *handle) Sync() error { _, err := h.do(nil, 0, nil); return err }

func (h *handle) Size() (int64, error) {
	h.c.mu.Lock()
	size := h.size
	h.c.mu.Unlock()
	return size, h.Sync()
}

func (h *handle) Close() error {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	h.closed = true
	h.open--
	return nil
}
