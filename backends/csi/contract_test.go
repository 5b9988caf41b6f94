package csi_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
	"github.com/flocker-plugin/flocker/e2e/apart"
)

func TestMain(m *testing.M) {
	csi.SetProcesses(false) // a machine may have very many
	os.Exit(apart.Main(m))
}

// storage is a driver, and what a cluster of nodes that use it has.
type storage struct {
	*csitest.Driver
	t   backendtest.T
	cfg csi.Config
	dir string

	once sync.Once // end

	mu       sync.Mutex
	catalogs map[string]*csitest.Catalog // by cluster; "" is one for all
	one      bool                        // all clusters share a catalog
	dirs     map[string]string           // by node
	made     []backends.Backend
}

// newStorage starts a driver. At the end of the test it must have no volume, no device
// and nothing to complain about.
func newStorage(t backendtest.T, opts csitest.Options, cfg csi.Config) *storage {
	t.Helper()
	// Short: the path of a unix socket may have 107 bytes. In memory, if there is room:
	// each attach waits for the disk a few times.
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "csi")
	if err != nil {
		t.Fatalf("%v", err)
	}
	s := &storage{
		Driver: csitest.New(dir, opts), t: t, cfg: cfg, dir: dir,
		catalogs: map[string]*csitest.Catalog{}, dirs: map[string]string{},
	}
	t.Cleanup(s.finish)
	return s
}

// finish ends the storage, at the end of the test or before.
func (s *storage) finish() { s.once.Do(s.end) }

func (s *storage) end() {
	for _, b := range s.made {
		if c, ok := backends.As[io.Closer](b); ok {
			_ = c.Close()
		}
	}
	s.Inject(nil)
	if all, used := s.Volumes(); all > 0 {
		s.t.Errorf("left behind: %d volumes, %d in use", all, used)
	}
	for _, violation := range s.Violations() {
		s.t.Errorf("against the CSI specification: %s", violation)
	}
	if err := s.Close(); err != nil {
		s.t.Errorf("left behind: %v", err)
	}
	for _, dir := range s.dirs {
		left, _ := filepath.Glob(filepath.Join(dir, "*", "*"))
		if len(left) > 0 {
			s.t.Errorf("left behind: %q", left)
		}
	}
	if err := exec.Command("rm", "-r", "--one-file-system", s.dir).Run(); err != nil {
		s.t.Errorf("left behind: %v", err)
	}
}

func (s *storage) catalog(cluster string) *csitest.Catalog {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.one {
		cluster = ""
	}
	if s.catalogs[cluster] == nil {
		s.catalogs[cluster] = &csitest.Catalog{}
	}
	return s.catalogs[cluster]
}

// node returns a new instance of a node's backend.
func (s *storage) node(cluster, node string) backends.Backend {
	catalog := s.catalog(cluster)
	endpoint, err := s.Driver.Node(node)
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dirs[node] == "" {
		s.dirs[node] = filepath.Join(s.dir, fmt.Sprint("n", len(s.dirs)))
	}
	cfg := s.cfg
	cfg.Endpoint = endpoint
	b, err := csi.New(cfg, csi.Self{Node: node, Cluster: cluster, Dir: s.dirs[node], Catalog: catalog})
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	s.made = append(s.made, b)
	return b
}

// kinds are the kinds of drivers there are, and how they are configured.
var kinds = map[string]struct {
	opts csitest.Options
	cfg  csi.Config
}{
	"fences": {
		csitest.Options{Publish: true, Cuts: true, Stage: true, Shown: true, GetVolume: true, ListVolumes: true},
		csi.Config{Fences: true},
	},
	"fences without staging": {
		csitest.Options{Publish: true, Cuts: true, Shown: true, ListVolumes: true, Mknod: true, Page: 7},
		csi.Config{Fences: true},
	},
	"exclusive": {
		csitest.Options{Publish: true, Stage: true, Shown: true, GetVolume: true},
		csi.Config{Exclusive: true},
	},
	"local": {
		csitest.Options{Mknod: true, Unit: 3 << 20},
		csi.Config{AllocationUnit: 3 * backends.MiB},
	},
}

func TestContract(t *testing.T) {
	backendtest.NeedRoot(t)
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			many := 1200
			if kind.opts.ListVolumes && !kind.opts.GetVolume {
				many = 60 // each look at one goes through the whole list
			}
			backendtest.Run(t, backendtest.Config{
				Many: many,
				New: func(t backendtest.T) backendtest.Storage {
					s := newStorage(t, kind.opts, kind.cfg)
					s.one = name == "local"
					return backendtest.Storage{
						Node: s.node,
						Down: func(down bool) {
							if err := s.Down(down); err != nil {
								t.Errorf("%v", err)
							}
						},
					}
				},
			})
		})
	}
}

var errWanted = errors.New("by wish of the test")

// newVolume returns a storage with a volume.
func newVolume(t *testing.T, opts csitest.Options, cfg csi.Config) (*storage, string, backends.Volume) {
	t.Helper()
	backendtest.NeedRoot(t)
	s, cluster := newStorage(t, opts, cfg), uuid.NewString()
	vol, err := s.node(cluster, "a").Create(t.Context(), request(cluster))
	if err != nil {
		t.Fatal(err)
	}
	return s, cluster, vol
}

func request(cluster string) backends.CreateRequest {
	id := uuid.NewString()
	return backends.CreateRequest{ID: id, Name: "db", Cluster: cluster, Size: 8 << 20}
}

// Every call to the driver fails in every way. Half a minute is shorter here, and so is the
// backend's patience.
func TestFaults(t *testing.T) {
	backendtest.NeedRoot(t)
	const patience, minute = 300 * time.Millisecond, 600 * time.Millisecond
	for name, fault := range map[string]csitest.Fault{
		"429":                 {Before: codes.ResourceExhausted},
		"500":                 {Before: codes.Internal},
		"no answer":           {Hang: true},
		"answer lost":         {HangAfter: true},
		"half an answer":      {Half: true},
		"carried out in 30 s": {Late: minute},
		"failed, and done":    {After: codes.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			kind := kinds["fences"]
			kind.cfg.CallTimeout = patience
			backendtest.RunCase(t, "every request fails", backendtest.Config{New: func(t backendtest.T) backendtest.Storage {
				s := newStorage(t, kind.opts, kind.cfg)
				return backendtest.Storage{Node: s.node, Late: 2 * fault.Late, Faults: map[string]func(n int) func() bool{name: func(n int) func() bool {
					var calls atomic.Int64
					s.Inject(func(csitest.Call) csitest.Fault {
						if calls.Add(1) == int64(n)+1 {
							return fault
						}
						return csitest.Fault{}
					})
					return func() bool {
						s.Inject(nil)
						return calls.Load() > int64(n)
					}
				}}}
			}})
		})
	}
}
