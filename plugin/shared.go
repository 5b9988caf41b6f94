package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/sirupsen/logrus"
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
