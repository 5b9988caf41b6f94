package moby

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	volumetypes "github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
	volumemounts "github.com/docker/docker/volume/mounts"
	"github.com/docker/docker/volume/service"
	"github.com/docker/docker/volume/service/opts"
)

// daemon is Docker's volume service on its state directory.
type daemon struct {
	*service.VolumesService
	dir     string
	plugins *pluginStore
	events  *eventLog
}

// startDocker opens the state directory as dockerd does when it starts: it asks
// the plugin for every volume it remembers before it returns.
func startDocker(t *testing.T, dir string, store *pluginStore) *daemon {
	t.Helper()
	_ = log.SetLevel("panic") // its retries are the tests' subject
	d := &daemon{dir: dir, plugins: store, events: &eventLog{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	d.VolumesService, err = service.NewVolumeService(dir, store, idtools.Identity{UID: os.Getuid(), GID: os.Getgid()}, d.events)
	if err != nil {
		t.Fatalf("start Docker: %v", err)
	}
	t.Cleanup(func() { _ = d.Shutdown() }) // a second time does nothing
	return d
}

// eventLog is what `docker events` shows.
type eventLog struct {
	mu   sync.Mutex
	list []string
}

func (l *eventLog) LogVolumeEvent(name string, action events.Action, _ map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, string(action)+" "+name)
}

func (l *eventLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.list, ", ")
}

// pluginStore is a daemon's list of plugins with one in it, which is enabled.
// A legacy plugin is greeted before its first use in the daemon's life, a managed
// one never.
type pluginStore struct {
	legacy bool
	client *plugins.Client

	mu      sync.Mutex
	greeted bool
	refs    int // while there are any, `docker plugin disable` says "in use"
}

// newPluginStore has the plugin on this socket enabled. timeout is the one of
// `docker plugin enable --timeout`; legacy plugins have none.
func newPluginStore(t *testing.T, socket string, timeout time.Duration) *pluginStore {
	t.Helper()
	client, err := plugins.NewClientWithTimeout("unix://"+socket, nil, timeout)
	if err != nil {
		t.Fatal(err)
	}
	return &pluginStore{legacy: timeout == 0, client: client}
}

func (s *pluginStore) Name() string {
	if s.legacy {
		return "flocker"
	}
	return "flocker:latest"
}

func (s *pluginStore) IsV1() bool                                   { return s.legacy }
func (s *pluginStore) ScopedPath(p string) string                   { return p }
func (s *pluginStore) Client() *plugins.Client                      { return s.client }
func (s *pluginStore) Handle(string, func(string, *plugins.Client)) {}

func (s *pluginStore) greet() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.legacy || s.greeted {
		return nil
	}
	var manifest plugins.Manifest
	if err := s.client.Call("Plugin.Activate", nil, &manifest); err != nil {
		return err
	}
	if len(manifest.Implements) != 1 || manifest.Implements[0] != "VolumeDriver" {
		return fmt.Errorf("plugin implements %q", manifest.Implements)
	}
	s.greeted = true
	return nil
}

func (s *pluginStore) Get(name, capability string, mode int) (plugingetter.CompatPlugin, error) {
	if strings.TrimSuffix(name, ":latest") != "flocker" || capability != "VolumeDriver" {
		return nil, fmt.Errorf("plugin %q not found", name)
	}
	if err := s.greet(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs += mode
	return s, nil
}

func (s *pluginStore) GetAllByCap(capability string) ([]plugingetter.CompatPlugin, error) {
	if capability != "VolumeDriver" || s.greet() != nil {
		return nil, nil
	}
	return []plugingetter.CompatPlugin{s}, nil
}

func (s *pluginStore) GetAllManagedPluginsByCap(capability string) []plugingetter.CompatPlugin {
	if s.legacy {
		return nil
	}
	all, _ := s.GetAllByCap(capability)
	return all
}

func (s *pluginStore) references() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refs
}

// container is what dockerd keeps of a container for one of its volumes.
type container struct {
	volumemounts.MountPoint
	id string
	d  *daemon
}

// newContainer is `docker create -v name:/data`, with --volume-driver unless driver
// is "".
func (d *daemon) newContainer(id, name, driver string) (*container, error) {
	v, err := d.Create(context.Background(), name, driver, opts.WithCreateReference(id))
	if err != nil {
		return nil, err
	}
	return &container{
		id: id, d: d,
		MountPoint: volumemounts.MountPoint{
			Type: "volume", Name: v.Name, Driver: v.Driver, Source: v.Mountpoint, Destination: "/data", RW: true,
			Volume: &mounted{d, v},
		},
	}, nil
}

// start is `docker start`, and the first half of `docker cp`. It returns the path
// that is bind-mounted into the container.
func (c *container) start() (path string, err error) {
	path, done, err := c.Setup(context.Background(), "", idtools.Identity{}, nil)
	if err != nil {
		return "", err
	}
	return path, done(context.Background())
}

// stop is the end of a container, and the second half of `docker cp`.
func (c *container) stop() error { return c.Cleanup(context.Background()) }

// rm is `docker rm`.
func (c *container) rm() error { return c.d.Release(context.Background(), c.Name, c.id) }

// resume is what a live-restored daemon makes of a container that kept running.
func (c *container) resume(d *daemon) error {
	v, err := d.Get(context.Background(), c.Name, opts.WithGetDriver(c.Driver), opts.WithGetReference(c.id))
	if err != nil {
		return err
	}
	c.d, c.Volume = d, &mounted{d, v}
	return nil
}

// mounted is a volume as a MountPoint wants it.
type mounted struct {
	d *daemon
	v *volumetypes.Volume
}

func (m *mounted) Name() string       { return m.v.Name }
func (m *mounted) DriverName() string { return m.v.Driver }
func (m *mounted) Path() string       { return m.v.Mountpoint }
func (m *mounted) Mount(id string) (string, error) {
	return m.d.Mount(context.Background(), m.v, id)
}

func (m *mounted) Unmount(id string) error {
	return m.d.Unmount(context.Background(), m.v, id)
}
func (m *mounted) CreatedAt() (time.Time, error) { return time.Time{}, errors.ErrUnsupported }
func (m *mounted) Status() map[string]any        { return m.v.Status }

// ls is `docker volume ls --filter …`: the volumes as "driver name", and warnings.
func (d *daemon) ls(t *testing.T, filter ...filters.KeyValuePair) (lines, warnings []string) {
	t.Helper()
	volumes, warnings, err := d.List(t.Context(), filters.NewArgs(filter...))
	if err != nil {
		t.Fatalf("ls: %v", err)
	}
	for _, v := range volumes {
		lines = append(lines, strings.TrimSuffix(v.Driver, ":latest")+" "+v.Name)
	}
	return lines, warnings
}

// localVolumes returns the names of the volumes that are directories on the host.
func (d *daemon) localVolumes(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(d.dir, "volumes", "*", "_data"))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, p := range paths {
		names = append(names, filepath.Base(filepath.Dir(p)))
	}
	return names
}
