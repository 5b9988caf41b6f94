package ebs_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/ebs/ec2test"
)

const (
	region = "us-east-1"
	zone   = "us-east-1a"
	key    = "AKIAEXAMPLE"
)

// cloud is EC2 and its instances' kernels.
type cloud struct {
	*ec2test.Server
	dir string
	lag time.Duration
	cfg func(*ebs.Config)

	nodesMu   sync.Mutex
	instances map[string]string // by node

	mu     sync.Mutex
	disks  map[string]*disk // by volume
	plugs  map[string]*plug // by instance and volume
	count  int
	holds  map[string]bool // instances that let go of nothing
	deaf   map[string]bool // instances that do not stop
	hidden map[string]bool // instances whose kernel shows nothing
	serial map[string]string
}

type disk struct {
	size   int64
	blocks map[int64][]byte
}

// plug is a volume in an instance.
type plug struct {
	*disk
	c    *cloud
	name string
	open int
	gone bool
}

func newCloud(t backendtest.T, cfg ec2test.Config) *cloud {
	t.Helper()
	c := &cloud{
		dir: t.TempDir(), lag: max(10*time.Millisecond, 4*cfg.Lag), instances: map[string]string{}, disks: map[string]*disk{}, plugs: map[string]*plug{},
		holds: map[string]bool{}, deaf: map[string]bool{}, hidden: map[string]bool{}, serial: map[string]string{},
	}
	cfg.Key = key
	c.Server = ec2test.New(cfg, c)
	t.Cleanup(c.Close)
	return c
}

// TestMain makes credentials that the SDK finds, and nothing else that it would.
func TestMain(m *testing.M) {
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
	} {
		if err := os.Setenv(name, value); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func (c *cloud) instance(node string) string {
	c.nodesMu.Lock()
	defer c.nodesMu.Unlock()
	if c.instances[node] == "" {
		c.instances[node] = c.AddInstance(zone, 27)
	}
	return c.instances[node]
}

// stopped returns the instances that do not run.
func (c *cloud) stopped() (found []string) {
	c.nodesMu.Lock()
	defer c.nodesMu.Unlock()
	for _, instance := range c.instances {
		if c.State(instance) != "running" {
			found = append(found, instance)
		}
	}
	return found
}

func (c *cloud) node(cluster, node string) backends.Backend { return c.backend(cluster, node) }

func (c *cloud) backend(cluster, node string) *ebs.Backend {
	instance := c.instance(node)
	cfg := ebs.Config{Region: region, Zone: zone, InstanceID: instance, Endpoint: c.URL, CallsPerSecond: 1e6}
	if c.cfg != nil {
		c.cfg(&cfg)
	}
	b, err := ebs.New(cfg, ebs.Self{Node: node, Cluster: cluster})
	if err != nil {
		panic(err)
	}
	sysfs := filepath.Join(c.dir, instance)
	if err := os.MkdirAll(filepath.Join(sysfs, "block"), 0o755); err != nil {
		panic(err)
	}
	b.Fast(sysfs, "/dev", func(path string) error { return c.claimed(instance, path) }, c.lag)
	return b
}

func (c *cloud) Plug(instance, volume, _ string, gib int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disks[volume] == nil {
		c.disks[volume] = &disk{int64(gib) << 30, map[int64][]byte{}}
	}
	c.count++
	p := &plug{disk: c.disks[volume], c: c, name: fmt.Sprintf("nvme%dn1", c.count)}
	c.plugs[instance+volume] = p
	if c.hidden[instance] {
		return
	}
	serial := strings.Replace(volume, "-", "", 1)
	if s := c.serial[instance]; s != "" {
		serial = s
	}
	made := filepath.Join(c.dir, instance, p.name) // appears at once, with all it has
	if err := os.MkdirAll(filepath.Join(made, "device"), 0o755); err != nil {
		panic(err)
	}
	for name, text := range map[string]string{
		"dev": fmt.Sprintf("259:%d\n", c.count), "device/model": "Amazon Elastic Block Store              \n", "device/serial": serial + "\n",
	} {
		if err := os.WriteFile(filepath.Join(made, name), []byte(text), 0o644); err != nil {
			panic(err)
		}
	}
	block := filepath.Join(c.dir, instance, "block")
	err := os.CopyFS(filepath.Join(block, p.path()), os.DirFS(made))
	if err == nil {
		err = os.Remove(filepath.Join(block, p.path(), "dev"))
	}
	if err = errors.Join(err, os.Rename(made, filepath.Join(block, p.name))); err != nil {
		panic(err)
	}
}

// path is what the kernel shows, before the disk itself, for a path to it with multipath.
func (p *plug) path() string { return strings.Replace(p.name, "n1", "c0n1", 1) }

func (c *cloud) Unplug(instance, volume string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.plugs[instance+volume]
	if p == nil {
		return
	}
	p.gone = true
	delete(c.plugs, instance+volume)
	for _, name := range []string{p.path(), p.name} {
		if err := os.RemoveAll(filepath.Join(c.dir, instance, "block", name)); err != nil {
			panic(err)
		}
	}
}

func (c *cloud) Holds(instance, volume string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holds[instance] && c.plugs[instance+volume] != nil
}

func (c *cloud) Obeys(instance string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.deaf[instance]
}

func (c *cloud) find(instance, path string) *plug {
	for id, p := range c.plugs {
		if strings.HasPrefix(id, instance) && "/dev/"+p.name == path {
			return p
		}
	}
	return nil
}

func (c *cloud) claimed(instance, path string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.find(instance, path); p != nil && p.open > 0 {
		return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
	}
	return nil
}

func (c *cloud) open(node, path string, _ bool) (backendtest.Device, error) {
	instance := c.instance(node)
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.find(instance, path)
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

func (h *handle) Size() (int64, error) { return h.size, h.Sync() }

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
