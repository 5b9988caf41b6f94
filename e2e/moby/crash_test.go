package moby

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/volume/service"
	"github.com/docker/docker/volume/service/opts"
)

// dockerd stops while a container runs on (live-restore), and starts again.
func TestDaemonRestart(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{30 * time.Second, 0} {
		t.Run(map[bool]string{true: "legacy", false: "managed"}[timeout == 0], func(t *testing.T) {
			t.Parallel()
			h := newSite(t).newHost(timeout)
			h.plug()
			h.boot()
			ctx := t.Context()
			options, labels := map[string]string{"size": "20M"}, map[string]string{"k": "v"}
			_, err := h.docker.Create(ctx, "abc", "flocker", opts.WithCreateOptions(options), opts.WithCreateLabels(labels))
			noError(t, err)
			c, err := h.docker.newContainer("c", "abc", "")
			noError(t, err)
			path, err := c.start()
			noError(t, err)
			noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))

			h.boot()
			h.wantCalls("abc", "GCGGM"+"G") // the last one is the start's
			if !h.docker.plugins.legacy {   // of those nobody counts
				equal(t, "references to the plugin", h.docker.plugins.references(), 1)
			}
			noError(t, c.resume(h.docker))
			wantRecord(t, h.docker, "abc", options, labels)
			wantError(t, h.docker.Remove(ctx, "abc"), "volume is in use - [c]")
			got, err := os.ReadFile(filepath.Join(path, "f"))
			equal(t, fmt.Sprintf("file (%v)", err), string(got), "data")

			// run -v abc:/foo, which says nothing of a driver
			again, err := h.docker.newContainer("again", "abc", "")
			noError(t, err)
			equal(t, "driver", again.Driver, h.docker.plugins.Name())
			noError(t, c.stop())
			noError(t, h.site.nothing())
			noError(t, c.rm())

			// Killed, dockerd sends no Unmount, and the next start repeats the id.
			_, err = again.start()
			noError(t, err)
			h.boot()
			noError(t, again.resume(h.docker))
			id := again.ID
			_, err = again.start()
			noError(t, err)
			equal(t, "id of the second mount", again.ID, id)
			noError(t, again.stop())
			if h.docker.plugins.legacy {
				// The greeting told the plugin that the first mount is over.
				noError(t, h.site.nothing())
			} else {
				noError(t, again.stop())
			}
			noError(t, again.rm())
			noError(t, h.docker.Remove(ctx, "abc"))
		})
	}
}

// wantRecord checks what Docker remembers of a volume.
func wantRecord(t *testing.T, d *daemon, name string, options, labels map[string]string) {
	t.Helper()
	got, err := d.Get(context.Background(), name)
	if err != nil {
		t.Errorf("get: %v", err)
		return
	}
	equal(t, "driver", got.Driver, d.plugins.Name())
	equal(t, "options", fmt.Sprint(got.Options), fmt.Sprint(options))
	equal(t, "labels", fmt.Sprint(got.Labels), fmt.Sprint(labels))
}

// A plugin that is away for less than Docker's retries, 15 seconds, is not noticed.
func TestPluginRestart(t *testing.T) {
	t.Parallel()
	h := one(t)
	d, ctx := h.docker, t.Context()
	for _, name := range []string{"known", "removed"} {
		_, err := d.Create(ctx, name, "flocker")
		noError(t, err)
	}
	c, err := d.newContainer("c", "known", "flocker")
	noError(t, err)
	path, err := c.start()
	noError(t, err)
	f, err := os.Create(filepath.Join(path, "f"))
	noError(t, err)
	defer f.Close()

	var calls sync.WaitGroup
	again, err := d.newContainer("c2", "known", "")
	noError(t, err)
	h.kill()
	for what, call := range map[string]func() error{
		"create": func() error { _, err := d.Create(ctx, "new", "flocker"); return err },
		"get":    func() error { _, err := d.Get(ctx, "known"); return err },
		"remove": func() error { return d.Remove(ctx, "removed") },
		"mount": func() error {
			second, err := again.start()
			if err == nil && second != path {
				err = fmt.Errorf("path %s, want %s", second, path)
			}
			return err
		},
	} {
		calls.Go(func() {
			if err := call(); err != nil {
				t.Errorf("%s while the plugin is away: %v", what, err)
			}
		})
	}
	start := time.Now()
	_, err = d.Create(ctx, "other", "local")
	noError(t, err)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("a local volume took %v while the plugin was away", took)
	}
	if _, err := f.WriteString("data"); err != nil {
		t.Errorf("write while the plugin is away: %v", err)
	}
	time.Sleep(2 * time.Second)
	h.start()
	calls.Wait()

	if _, err := f.WriteString("data"); err != nil {
		t.Errorf("write afterwards: %v", err)
	}
	noError(t, f.Close())
	noError(t, c.stop())
	equal(t, "mounts after the first unmount", len(mounts(h.dir)), 1)
	_, err = h.post(ctx, "VolumeDriver.Unmount", `{"Name":"known","ID":"unknown"}`)
	noError(t, err)
	equal(t, "mounts after an unmount of nobody", len(mounts(h.dir)), 1)
	noError(t, again.stop())
}

// The plugin starts anew while etcd is away and the cache of definitions is not on
// disk yet, and a container stops. In the moment when etcd is back the volume may
// not be free for others before it is closed here. Four at once, since it is a
// matter of what happens first.
func TestStopAtPluginRestart(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	watcher := s.newHost(30 * time.Second)
	watcher.plug()
	etcd := newProxy(t, s.etcd)
	containers := map[*host]*container{}
	for range 4 {
		h := s.newHost(30*time.Second, "FLOCKER_ETCD_ENDPOINTS="+etcd.address(), "FLOCKER_LINGER=0s")
		h.plug()
		h.boot()
		c, err := h.docker.newContainer("c", "volume-of-"+h.name, "flocker")
		noError(t, err)
		path, err := c.start()
		noError(t, err)
		noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))
		containers[h] = c
		h.kill()
		if err := os.Remove(filepath.Join(h.dir, "state", "known.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	etcd.set("cut")
	for h := range containers {
		h.start()
	}
	time.Sleep(12 * time.Second) // the tries to reach etcd are seconds apart by now
	var stops sync.WaitGroup
	for _, c := range containers {
		stops.Go(func() {
			if err := c.stop(); err != nil {
				t.Errorf("stop: %v", err)
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	etcd.set("")
	for h, c := range containers {
		stops.Go(func() {
			for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				got, err := watcher.post(t.Context(), "VolumeDriver.Get", `{"Name":"`+c.Name+`"}`)
				if err == nil && strings.Contains(got, `"state":"free"`) {
					if left := mounts(h.dir); len(left) > 0 {
						t.Errorf("%s is free for every host, and %s still has it mounted on %s", c.Name, h.name, left)
					}
					return
				}
				if time.Now().After(end) {
					t.Errorf("%s is never freed: %s, %v", c.Name, got, err)
					return
				}
			}
		})
	}
	stops.Wait()
}

// A plugin that is away for longer: Docker keeps its records.
func TestDaemonRestartWithoutPlugin(t *testing.T) {
	t.Parallel()
	h := one(t)
	options, labels := map[string]string{"size": "20M"}, map[string]string{"k": "v"}
	_, err := h.docker.Create(t.Context(), "v1", "flocker", opts.WithCreateOptions(options), opts.WithCreateLabels(labels))
	noError(t, err)
	h.kill()
	h.boot() // after all of Docker's retries
	h.plug()
	wantRecord(t, h.docker, "v1", options, labels)
	noError(t, h.docker.Remove(t.Context(), "v1"))
}

// kill -9 in the middle of a Mount. Docker sends the call again without its body.
func TestKilledInMount(t *testing.T) {
	t.Parallel()
	h := one(t)
	running, quick := h.slowMkfs(20 * time.Second)
	c, err := h.docker.newContainer("c", "v1", "flocker")
	noError(t, err)
	failed := make(chan error, 1)
	go func() {
		_, err := c.start()
		failed <- err
	}()
	exists(t, running)
	mkfs, err := os.ReadFile(running)
	noError(t, err)
	quick()
	h.kill()
	// It would format whatever has the device's name when it gets there.
	eventually(t, 10*time.Second, func() error { // before its time is over
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(mkfs)) + "/stat")
		if err == nil && !strings.Contains(string(stat), ") Z ") {
			return fmt.Errorf("mkfs goes on without the plugin: %s", stat)
		}
		return nil
	})
	h.start()
	wantError(t, <-failed, "request body lost in Docker's retry (moby#39331); please retry the command")
	startSoon(t, c)
	equal(t, "mounts", len(mounts(h.dir)), 1)
	equal(t, "loop devices", len(loops(h.site.dir)), 1)
	noError(t, c.stop())
	noError(t, c.rm())
	noError(t, h.docker.Remove(t.Context(), "v1"))
}

// startSoon starts a container as a user does who was told to retry.
func startSoon(t *testing.T, c *container) (path string) {
	t.Helper()
	eventually(t, time.Minute, func() (err error) {
		path, err = c.start()
		return err
	})
	return path
}

// kill -9 in the middle of a Create, whose transaction may or may not have arrived.
func TestKilledInCreate(t *testing.T) {
	t.Parallel()
	h, etcd := withProxy(t, 30*time.Second)
	etcd.set("stall")
	failed := make(chan error, 1)
	go func() {
		// Docker's Get would be held for as long as etcd is away.
		_, err := h.docker.plugins.create("v1")
		failed <- err
	}()
	time.Sleep(500 * time.Millisecond)
	h.kill()
	etcd.set("")
	h.plug()
	wantError(t, <-failed, "request body lost in Docker's retry (moby#39331); please retry the command")
	_, err := h.docker.Create(t.Context(), "v1", "flocker")
	noError(t, err)
	lines, _ := h.docker.ls(t)
	equal(t, "ls", strings.Join(lines, "; "), "flocker v1")
	noError(t, h.docker.Remove(t.Context(), "v1"))
	h.wantNoFiles()
}

// create is the client's part of `docker volume create`.
func (s *pluginStore) create(name string) (reply struct{ Err string }, err error) {
	err = s.client.Call("VolumeDriver.Create", map[string]any{"Name": name, "Opts": nil}, &reply)
	return reply, err
}

// wantNoFiles checks that no volume's file is left.
func (h *host) wantNoFiles() {
	h.t.Helper()
	eventually(h.t, 30*time.Second, func() error {
		left, err := filepath.Glob(filepath.Join(h.site.dir, "shared", "*", "*.img"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("files left: %s", left)
		}
		return err
	})
}

// Docker gives a Mount up before it is done, and never sends the Unmount.
func TestMountTimeout(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h, other := s.newHost(time.Second), s.newHost(30*time.Second)
	h.plug()
	h.boot()
	other.plug()
	other.boot()
	running, quick := h.slowMkfs(20 * time.Second)
	c, err := h.docker.newContainer("c", "v1", "flocker")
	noError(t, err)
	_, err = c.start()
	wantError(t, err, "request body lost in Docker's retry") // what a timeout of the client looks like
	exists(t, running)
	noError(t, s.nothing())
	// It does not belong to the first host any more.
	elsewhere, err := other.docker.newContainer("e", "v1", "flocker")
	noError(t, err)
	path, err := elsewhere.start()
	noError(t, err)
	noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))
	noError(t, elsewhere.stop())
	quick()
	path, err = c.start()
	noError(t, err)
	got, err := os.ReadFile(filepath.Join(path, "f"))
	equal(t, fmt.Sprintf("file (%v)", err), string(got), "data")
	noError(t, c.stop())
	noError(t, s.nothing())
}

// Docker gives up at any moment of a Mount.
func TestMountTimeoutAnywhere(t *testing.T) {
	t.Parallel()
	h := one(t)
	ctx := t.Context()
	v, err := h.docker.Create(ctx, "v1", "flocker")
	noError(t, err)
	path, err := h.docker.Mount(ctx, v, "first")
	noError(t, err)
	noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))
	noError(t, h.docker.Unmount(ctx, v, "first"))
	took := make([]time.Duration, 5) // how long a mount takes on this machine
	for i := range took {
		began := time.Now()
		_, err := h.docker.Mount(ctx, v, "measured")
		noError(t, err)
		took[i] = time.Since(began)
		noError(t, h.docker.Unmount(ctx, v, "measured"))
	}
	typical := slices.Min(took)
	gone := 0
	for i := range 60 {
		hasty, cancel := context.WithTimeout(ctx, typical/8+rand.N(2*typical))
		id := fmt.Sprintf("m%d", i)
		_, err := h.post(hasty, "VolumeDriver.Mount", `{"Name":"v1","ID":"`+id+`"}`)
		cancel()
		// Until the plugin is through with it, unless it never came there.
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if strings.Contains(h.out.String(), "mount_id="+id+" op=mount") {
				break
			}
		}
		if err == nil || strings.Contains(h.out.String(), "msg=done mount_id="+id+" op=mount") {
			// Delivered, as far as the plugin can know.
			noError(t, h.docker.Unmount(ctx, v, id))
		} else {
			gone++
		}
		if err := h.site.nothing(); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
	t.Logf("%d of 60 mounts were given up; one takes %v", gone, typical)
	if gone < 5 {
		t.Errorf("only %d of 60 mounts were given up, though a mount takes %v", gone, typical)
	}
	path, err = h.docker.Mount(ctx, v, "last")
	noError(t, err)
	got, err := os.ReadFile(filepath.Join(path, "f"))
	equal(t, fmt.Sprintf("file (%v)", err), string(got), "data")
	noError(t, h.docker.Unmount(ctx, v, "last"))
}

// Twenty daemons, which do not know of each other, on two hosts.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := s.newHost(30*time.Second), s.newHost(30*time.Second)
	a.plug()
	b.plug()
	const n = 20
	daemons := make([]*daemon, n)
	for i := range daemons {
		h := s.hosts[i%2]
		daemons[i] = startDocker(t, filepath.Join(h.dir, fmt.Sprint("docker", i)), newPluginStore(t, h.socket, h.timeout))
	}
	all := func(what string, do func(i int, d *daemon) error) {
		t.Helper()
		var work sync.WaitGroup
		for i, d := range daemons {
			work.Go(func() {
				if err := do(i, d); err != nil {
					t.Errorf("%s %d: %v", what, i, err)
				}
			})
		}
		work.Wait()
	}
	ctx := t.Context()
	for range 3 {
		all("create", func(_ int, d *daemon) error {
			_, err := d.Create(ctx, "one", "flocker", opts.WithCreateOptions(map[string]string{"size": "20M"}))
			return err
		})
		files, err := filepath.Glob(filepath.Join(s.dir, "shared", "*", "*.img"))
		equal(t, fmt.Sprintf("volumes (%v)", err), len(files), 1)
		all("remove", func(_ int, d *daemon) error {
			if err := d.Remove(ctx, "one"); !service.IsNotExist(err) {
				return err
			}
			return nil
		})
		a.wantNoFiles()
	}

	// Everybody on one host mounts it, and in the end it is closed.
	_, err := daemons[0].Create(ctx, "one", "flocker")
	noError(t, err)
	all("mount and unmount", func(i int, d *daemon) error {
		if i%2 == 1 {
			return nil
		}
		c, err := d.newContainer(fmt.Sprint("c", i), "one", "flocker")
		if err != nil {
			return err
		}
		for range 3 {
			path, err := c.start()
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(path, fmt.Sprint(i)), nil, 0o600); err != nil {
				return err
			}
			if err := c.stop(); err != nil {
				return err
			}
		}
		return c.rm()
	})
	noError(t, s.nothing())

	// Create, use and remove race for one name: each call does it or says why not.
	all("race", func(i int, d *daemon) error {
		for range 3 {
			c, err := d.newContainer(fmt.Sprint("c", i), "race", "flocker")
			if err != nil {
				return err
			}
			if _, err := c.start(); err == nil {
				if err := c.stop(); err != nil {
					return err
				}
			} else if !sensible(err) {
				return err
			}
			if err := c.rm(); err != nil {
				return err
			}
			if err := d.Remove(ctx, "race"); err != nil && !sensible(err) {
				return err
			}
		}
		return nil
	})
	noError(t, s.nothing())
	for _, name := range []string{"one", "race"} {
		for i := range 2 {
			if err := daemons[i].Remove(ctx, name); err != nil && !service.IsNotExist(err) {
				t.Errorf("remove %s: %v", name, err)
			}
		}
	}
	a.wantNoFiles()
}

// sensible says that an error is about the others.
func sensible(err error) bool {
	for _, reason := range []string{"no such volume", "is in use on host", "is owned by host", "is being removed", "being deleted"} {
		if strings.Contains(err.Error(), reason) {
			return true
		}
	}
	return false
}

// A volume goes back and forth between two hosts.
func TestMove(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	hosts := []*host{s.newHost(30*time.Second, "FLOCKER_BUSY_WAIT=0s"), s.newHost(30*time.Second, "FLOCKER_BUSY_WAIT=0s")}
	containers := make([]*container, 2)
	for i, h := range hosts {
		h.plug()
		h.boot()
		var err error
		containers[i], err = h.docker.newContainer(fmt.Sprint("c", i), "v1", "flocker")
		noError(t, err)
	}
	hosts[1].wantCalls("v1", "G") // and no Create
	want := ""
	for i := range 10 {
		here, there := containers[i%2], containers[(i+1)%2]
		path, err := here.start()
		noError(t, err)
		got, err := os.ReadFile(filepath.Join(path, "f"))
		if string(got) != want || (err != nil && i > 0) {
			t.Fatalf("file after move %d: got %q, %v, want %q", i, got, err, want)
		}
		want += fmt.Sprint("line ", i, "\n")
		noError(t, os.WriteFile(filepath.Join(path, "f"), []byte(want), 0o600))
		_, err = there.start()
		wantError(t, err, "volume v1 is in use on host "+hosts[i%2].name)
		wantError(t, there.d.Remove(t.Context(), "v1", opts.WithPurgeOnError(false)), "volume is in use - [c")
		noError(t, here.stop())
	}
	noError(t, s.nothing())
	for _, c := range containers {
		noError(t, c.rm())
	}
	noError(t, hosts[0].docker.Remove(t.Context(), "v1"))
	if _, err := hosts[1].docker.Get(t.Context(), "v1"); !service.IsNotExist(err) {
		t.Errorf("get on the other host: got %v, want no such volume", err)
	}
}
