package main

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
)

const cutOffText = `Docker has unmounted the directory that it shares with this plugin, so containers would not see the volume; ` +
	`the plugin starts again to get it back: try again in a few seconds`

// A Mount that no container would see is refused with the reason, the driver is not
// asked, and the process ends.
func TestMountThatNobodySees(t *testing.T) {
	f := &fakeVerbs{}
	r := newRig(t, nil)
	var cut bool
	var failure error
	var ended int
	r.use(&sharedDriver{
		verbs: f, log: r.log, end: func() { ended++ },
		isCutOff: func() (bool, error) { return cut, failure },
	})
	mount := func(want, seen string, ends int) {
		t.Helper()
		if _, got := r.post(t, "/VolumeDriver.Mount", `{"Name":"v1","ID":"1"}`); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if got := f.seen(); got != seen || ended != ends {
			t.Errorf("the driver saw %q and the process was ended %d times, want %q and %d", got, ended, seen, ends)
		}
	}
	mount(`{"Mountpoint":"/flocker/mnt/v1"}`, "Mount v1 1", 0)
	failure = errors.New("no such mount")
	mount(`{"Mountpoint":"/flocker/mnt/v1"}`, "Mount v1 1, Mount v1 1", 0) // nothing is known
	cut, failure = true, nil
	mount(`{"Err":"`+cutOffText+`"}`, "Mount v1 1, Mount v1 1", 1)
}

// The process ends by itself when it is cut off, but not while nobody would start it
// again.
func TestWatchOfTheSharedDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cut, up atomic.Bool
		var ended atomic.Int32
		d := &sharedDriver{
			log: newLog(&lockedBuffer{}, logrus.DebugLevel), end: func() { ended.Add(1) },
			isCutOff: func() (bool, error) { return cut.Load(), nil },
		}
		go d.watch(t.Context(), func(context.Context) bool { return up.Load() })
		for _, step := range []struct {
			what    string
			cut, up bool
			want    int32
		}{
			{"all is well", false, true, 0},
			{"Docker is away", true, false, 0},
			{"Docker is back", true, true, 1},
			{"it has ended", true, true, 1},
		} {
			cut.Store(step.cut)
			up.Store(step.up)
			time.Sleep(time.Minute)
			if got := ended.Load(); got != step.want {
				t.Errorf("%s: ended %d times, want %d", step.what, got, step.want)
			}
		}
	})
}

func TestListens(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "docker.sock")
	if probe(t.Context(), socket) == nil {
		t.Error("nobody listens, and there is no socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if probe(t.Context(), socket) != nil {
		t.Error("somebody listens")
	}
	l.Close()
	if probe(t.Context(), socket) == nil {
		t.Error("nobody listens any more")
	}
}

// The host's name of the shared directory is that below Docker's directory, however much
// of it the mount table knows; it is not known before Docker answers, or has not for long.
func TestNameOfTheSharedDirectory(t *testing.T) {
	for source, want := range map[string]string{
		"/var/lib/docker/plugins/4d1e/propagated-mount": "/srv/docker/plugins/4d1e/propagated-mount",
		"/plugins/4d1e/propagated-mount":                "/srv/docker/plugins/4d1e/propagated-mount",
		"/flocker/mnt":                                  "/flocker/mnt",
	} {
		if got := hostName(source, "/srv/docker"); got != want {
			t.Errorf("%s is %s, want %s", source, got, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		inside := filepath.Join(t.TempDir(), "plugins", "4d1e", "propagated-mount") // not mounted
		var out lockedBuffer
		r := &sharedRoot{inside: inside, log: newLog(&out, logrus.DebugLevel)}
		var up atomic.Bool
		go r.find(t.Context(), func(context.Context) (string, error) {
			if !up.Load() {
				return "", errors.New("Docker does not answer")
			}
			return "/srv/docker", nil
		})
		want := func(after time.Duration, want string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			if got := r.path(filepath.Join(inside, "v1", "data")); got != want {
				t.Errorf("it is %q, want %q", got, want)
			}
		}
		want(dockerPatience/2, "")
		want(dockerPatience, filepath.Join(inside, "v1", "data"))
		if n := strings.Count(out.String(), "users of the REST API are told that volumes are below "+inside); n != 1 {
			t.Errorf("it is said %d times:\n%s", n, out.String())
		}
		up.Store(true)
		want(10*time.Second, "/srv/docker/plugins/4d1e/propagated-mount/v1/data")
	})
}
