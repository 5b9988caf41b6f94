package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// A sharedDriver is the driver in a managed plugin. Containers get its volumes from a
// directory that Docker shares with the plugin: what is mounted below it here is
// mounted on the host, too.
//
// Docker may take that directory away. A dockerd that was killed stops, when it starts
// again, the plugin it finds running, and starts it again as soon as its process has
// ended, while another of its goroutines unmounts everything below the plugin's
// directory (HandleExitEvent in moby's plugin manager). If that one is late, no
// container sees what the new process mounts. Docker shares the directory anew with the
// next process, which it starts whenever one ends, and containers keep what they have.
type sharedDriver struct {
	verbs

	isCutOff func() (bool, error)
	end      func() // this process, in good order
	log      *logrus.Entry
}

//nolint:staticcheck // Docker is a name
var errCutOff = errors.New("Docker has unmounted the directory that it shares with this plugin, so containers would not see the volume; " +
	"the plugin starts again to get it back: try again in a few seconds")

// Mount does not answer with a directory that nobody sees.
func (d *sharedDriver) Mount(ctx context.Context, name, id string) (string, error) {
	if d.cutOff() {
		d.end()
		return "", errCutOff
	}
	return d.verbs.Mount(ctx, name, id)
}

// watch ends the process when it is of no use any more, better before a container needs
// it: the first time before Docker, half a second after it has started the process, looks
// whether that listens, and so before it starts containers by their restart policy. Not
// while Docker is away: nobody would start the next one, and this one is heard from in etcd.
func (d *sharedDriver) watch(ctx context.Context, dockerRuns func(context.Context) bool) {
	for wait := 250 * time.Millisecond; ; wait = min(2*wait, 30*time.Second) {
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
			return
		}
		if d.cutOff() && dockerRuns(ctx) {
			d.log.Warn("Docker has unmounted the directory that it shares with this plugin; starting again to get it back")
			d.end()
			return
		}
	}
}

func (d *sharedDriver) cutOff() bool {
	cut, err := d.isCutOff()
	if err != nil {
		d.log.WithField("err", err).Warn("not known whether containers see what is mounted")
	}
	return cut && err == nil
}

// A sharedRoot is the host's name of the directory that Docker shares with this plugin.
// Users of the REST API are told where the host has a volume, and not this process.
type sharedRoot struct {
	inside string // its name here
	log    *logrus.Entry

	outside atomic.Pointer[string] // nil until it is known
}

// path is where the host has what is at a path here; "" as long as that is not known.
func (r *sharedRoot) path(inside string) string {
	outside := r.outside.Load()
	if outside == nil {
		return ""
	}
	return filepath.Join(*outside, strings.TrimPrefix(inside, r.inside))
}

// dockerPatience is how long a Docker that starts, or starts this process, may take to
// answer.
const dockerPatience = time.Minute

// find asks Docker, which may be starting, for the directory of its plugins.
func (r *sharedRoot) find(ctx context.Context, dockerRoot func(context.Context) (string, error)) {
	source, err := mount.Source(r.inside)
	if err != nil || source == "" { // then it is a setting that is wrong, and no volume can be used
		r.log.WithField("err", err).Warn("not known which directory Docker shares with this plugin")
		source = r.inside
	}
	for begin, wait := time.Now(), 100*time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		root, err := dockerRoot(ctx)
		if err == nil {
			outside := hostName(source, root)
			r.outside.Store(&outside)
			return
		}
		if r.outside.Load() == nil && time.Since(begin) > dockerPatience {
			r.log.WithField("err", err).Warnf("users of the REST API are told that volumes are below %s, which is right if Docker's directory is on the root filesystem", source)
			r.outside.Store(&source)
		}
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
			return
		}
	}
}

// hostName is the whole name of a directory below Docker's own of which only the name in
// its filesystem is known: …/plugins/ID/propagated-mount.
func hostName(source, dockerRoot string) string {
	parts := strings.Split(source, "/")
	if at := len(parts) - 3; at >= 0 && parts[at] == "plugins" {
		return filepath.Join(dockerRoot, filepath.Join(parts[at:]...))
	}
	return source
}
