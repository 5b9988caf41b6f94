package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

// A takeover is one that was committed, and where its time went.
type takeover struct {
	volume string
	// fault is when the former owner was hit last before, recorded when the takeover
	// began, by which the former owner had been silent for long enough, and committed
	// when it was over.
	fault, recorded, committed time.Duration
	// asked is when the Mount that waited for it came from Docker, and answered when
	// it was. The log has them to a second.
	asked, answered time.Duration
}

// takeovers finds them. Of one whose fault or Mount is not known those are 0.
func takeovers(changes []history.Change, faults []*injected, mounts []mounted) (all []takeover) {
	owner, recorded := map[string]string{}, map[string]time.Duration{}
	for _, c := range changes {
		if c.Pending {
			if recorded[c.Volume] == 0 {
				recorded[c.Volume] = c.At
			}
			continue
		}
		if c.Forced && c.At != 0 {
			t := takeover{volume: c.Volume, recorded: recorded[c.Volume], committed: c.At}
			for _, f := range slices.Backward(faults) {
				if f.where == onHost && f.host.Name == owner[c.Volume] && f.at <= t.recorded && !f.missed {
					t.fault = f.at
					break
				}
			}
			for _, m := range mounts {
				if m.volume == c.Volume && m.host == c.Node && m.asked <= c.At && m.answered >= c.At {
					t.asked, t.answered = m.asked, m.answered
					break
				}
			}
			all = append(all, t)
		}
		owner[c.Volume], recorded[c.Volume] = c.Node, 0
	}
	return all
}

// A mounted is a Mount that a plugin has answered.
type mounted struct {
	host, volume    string
	asked, answered time.Duration
}

var mountLine = regexp.MustCompile(`^time="([^"]+)" .* msg=done .*op=mount took=([0-9.]+)ms volume=([^ "\\]+)`)

// mountsFrom finds the Mounts in the log of a host's dockerd.
func mountsFrom(host, log string, bootTime time.Time) (found []mounted) {
	for line := range strings.Lines(log) {
		fields := mountLine.FindStringSubmatch(line)
		if fields == nil {
			continue
		}
		at, err1 := time.Parse(time.RFC3339, fields[1])
		took, err2 := time.ParseDuration(fields[2] + "ms")
		if err1 == nil && err2 == nil {
			// Of the second in which it was logged, the end.
			answered := at.Sub(bootTime) + time.Second
			found = append(found, mounted{host, fields[3], answered - took - time.Second, answered})
		}
	}
	return found
}

// mounts are those of all hosts.
func (r *run) mounts(bootTime time.Time) (all []mounted, err error) {
	for _, h := range r.hosts {
		log, failed := os.ReadFile(filepath.Join(h.Dir, "dockerd.log"))
		err = errors.Join(err, failed)
		all = append(all, mountsFrom(h.Name, string(log), bootTime)...)
	}
	return all, err
}
