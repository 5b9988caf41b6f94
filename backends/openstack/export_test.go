package openstack

import (
	"context"
	"net"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// quick looks often, and has bounds that a machine which stands still for seconds keeps.
var quick = pace{
	Pace: poll.Pace{First: 2 * time.Millisecond, Most: 20 * time.Millisecond}, settle: 2 * time.Minute, orphan: 3 * time.Second,
	device: time.Minute, grace: time.Minute, stop: 2 * time.Minute,
}

// Fast makes a backend look again after milliseconds.
func Fast(b backends.Backend) {
	switch b := b.(type) {
	case *Nova:
		b.pace = quick
	case *Rackspace:
		Novas(b).pace = quick
	case *Connector:
		b.pace = quick
	}
}

// FirstLook is how long a backend waits in earnest before it looks again for the first time.
func FirstLook() time.Duration { return poll.Jitter(usual.First) }

// Novas is what of a backend is Nova's.
func Novas(b backends.Backend) *Nova {
	if r, ok := b.(*Rackspace); ok {
		b = r.Backend
	}
	return b.(*Nova)
}

// Grace is how long a server has to let go of a volume.
func (b *Nova) Grace(grace time.Duration) { b.pace.grace = grace }

// Shown is how long a device has to appear.
func (b *Nova) Shown(limit time.Duration) { b.pace.device = limit }

// Kernel makes a backend look for devices in other folders.
func (b *Nova) Kernel(sysfs string, claimed func(path string) error) {
	b.kernel = kernel{disk.Kernel{Sysfs: sysfs, Dev: "/dev", Claimed: claimed, Opens: func(string) error { return nil }}}
	b.kernel.Node = func(path string) (string, error) { return b.kernel.Attr(path[len("/dev/"):], "dev") }
}

// Addresses makes a backend have another host's addresses.
func (b *Nova) Addresses(ips ...string) {
	b.addresses = func() (all []net.IP, err error) {
		for _, ip := range ips {
			all = append(all, net.ParseIP(ip))
		}
		return all, nil
	}
}

// PlaceNamed and PlaceNumbered say where a disk of Xen is.
var PlaceNamed, PlaceNumbered = placeNamed, placeNumbered

// SetNode makes the number of every device node one of another device.
func (b *Nova) SetNode(number string) {
	b.kernel.Node = func(string) (string, error) { return number, nil }
}

// SetOpens is whether a device can be opened.
func (b *Nova) SetOpens(opens func(path string) error) { b.kernel.Opens = opens }

// Guest makes a backend ask others who it is.
func (b *Nova) Guest(metadata, dmi string, drive func(ctx context.Context) ([]byte, error)) {
	b.guest = guest{metadata, dmi, drive}
}

// Claimed is ErrInUse if a device of this machine is in use.
var Claimed = disk.Claimed

// Patient makes a backend wait as long as services on a small machine need.
func Patient(b backends.Backend) {
	p := usual
	p.First, p.Most, p.orphan, p.grace = 100*time.Millisecond, time.Second, 10*time.Second, 2*time.Minute
	p.settle = 10 * time.Minute
	switch b := b.(type) {
	case *Nova:
		b.pace = p
	case *Connector:
		b.pace = p
	case *CephConnector:
		b.pace = p
	}
}
