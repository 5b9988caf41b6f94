package ebs

import (
	"reflect"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Fast makes a backend wait for milliseconds, and look for devices in other folders.
func (b *Backend) Fast(sysfs, dev string, claimed func(path string) error, lag time.Duration) {
	b.pace = pace{
		Pace: poll.Pace{First: 2 * time.Millisecond, Most: 20 * time.Millisecond}, lag: lag, window: 500 * time.Microsecond,
		settle: 10 * time.Second, device: time.Second, grace: 2 * time.Second, force: 100 * time.Millisecond,
		call: usual.call,
	}
	usual := kernel{disk.Here()}
	b.kernel = kernel{disk.Kernel{Sysfs: sysfs, Dev: dev, Claimed: claimed, Node: usual.Node, Opens: func(string) error { return nil }}}
	if claimed == nil {
		b.kernel.Claimed = usual.Claimed
		return
	}
	b.kernel.Node = func(path string) (string, error) { return b.kernel.Attr(path[len(dev)+1:], "dev") }
}

// Impatient makes a backend wait for an answer no longer than that.
func (b *Backend) Impatient(limit time.Duration) { b.pace.call = limit }

// Grace is how long an instance has to let go of a volume.
func (b *Backend) Grace(grace time.Duration) { b.pace.grace = grace }

// FirstLook is how long a backend waits in earnest before it looks again for the first time.
func FirstLook() time.Duration { return poll.Jitter(usual.First) }

// Usual makes a backend wait as long as it does in earnest.
func (b *Backend) Usual() { b.pace = usual }

// SetNode makes the number of every device node one of another device.
func (b *Backend) SetNode(number string) {
	b.kernel.Node = func(string) (string, error) { return number, nil }
}

// SetOpens is whether a device can be opened.
func (b *Backend) SetOpens(opens func(path string) error) { b.kernel.Opens = opens }

// Claimed is ErrInUse if a device of this machine is in use.
var Claimed = disk.Claimed

// Kind is what a volume of so many GiB is with a profile and options.
func (c Config) Kind(profile string, options map[string]string, gib int64) (Profile, error) {
	p, err := c.kind(profile, options)
	if err != nil {
		return p, err
	}
	return p.fit(gib)
}

// Calls are the names of what is called of EC2, sorted.
func Calls() (names []string) {
	for f := range reflect.TypeFor[calls]().Fields() {
		names = append(names, f.Name)
	}
	slices.Sort(names)
	return names
}
