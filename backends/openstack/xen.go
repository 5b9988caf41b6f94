package openstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/flocker-plugin/flocker/backends"
)

// Xen's disks have no serial numbers. They have a place: Nova chooses a free one for a volume,
// names it as /dev/xvdb, and tells the hypervisor, which tells the guest's kernel, as a number.
// So the disk in that place is the volume, if the hypervisor does what it is told. That cannot be
// asked of the disk, and so everything else has to fit as well: Nova's server is this host,
// by its addresses; the place was empty before the volume was attached; the disk has exactly
// the volume's size; nobody uses it. That it was so is noted for later processes, until
// the host restarts. Without such a note a disk is never given to anybody who may format it.

var (
	xenForm = regexp.MustCompile(`^xvd[a-z]+$`)
	// xenName is how Nova names a place.
	xenName = regexp.MustCompile(`^/dev/xvd([a-z]{1,2})$`)
	// xenNode is how the guest's kernel names it.
	xenNode = regexp.MustCompile(`^device/vbd/([0-9]{1,9})$`)
)

// placeNamed returns the place that Nova names: 0 is /dev/xvda.
func placeNamed(device string) (place int, ok bool) {
	m := xenName.FindStringSubmatch(device)
	if m == nil {
		return 0, false
	}
	for _, letter := range m[1] {
		place = place*26 + int(letter-'a') + 1
	}
	return place - 1, true
}

// placeNumbered returns the place that a hypervisor's number of a disk means. The kernel's
// name for the disk may be another one.
func placeNumbered(number int) (place int, ok bool) {
	const xen, ide, secondIDE = 202, 3, 22
	switch major, minor := number>>8, number&0xff; {
	case number>>28 == 1:
		return number >> 8 & 0xfffff, minor == 0
	case major == xen:
		return minor / 16, minor%16 == 0
	case major == ide: // as which the first four are shown to a guest that is not only Xen's
		return minor / 64, minor%64 == 0 && minor < 128
	case major == secondIDE:
		return 2 + minor/64, minor%64 == 0 && minor < 128
	}
	return 0, false
}

// xenDisks returns Xen's disks, by their places.
func (k kernel) xenDisks() ([]device, error) {
	disks, err := os.ReadDir(filepath.Join(k.Sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []device
	for _, entry := range disks {
		d := device{name: entry.Name(), xen: true}
		if !xenForm.MatchString(d.name) {
			continue
		}
		node, err := k.Attr(d.name, "device/nodename")
		if err == nil {
			d.life, err = k.Life(d.name)
		}
		if err != nil {
			return nil, fmt.Errorf("list block devices: %w", err)
		}
		m := xenNode.FindStringSubmatch(node)
		if m == nil || d.life == "" {
			continue // of another kind, or gone
		}
		number, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", node, d.name, err)
		}
		var ok bool
		if d.place, ok = placeNumbered(number); ok {
			found = append(found, d)
		}
	}
	return found, nil
}

// xenSize is how many bytes a disk has; 0 if it has gone meanwhile.
func (k kernel) xenSize(d device) (int64, error) {
	text, err := k.Attr(d.name, "size")
	if err != nil || text == "" {
		return 0, err
	}
	sectors, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", d.name, err)
	}
	return sectors * 512, nil
}

// at returns the disk in a place. Two may say that they are in one; then neither is.
func at(devices []device, place int) (found device, ok bool) {
	for _, d := range devices {
		if d.xen && d.place == place {
			if ok {
				return device{}, false
			}
			found, ok = d, true
		}
	}
	return found, ok
}

// xenVolume remembers that a disk is a volume.
func (b *Nova) xenVolume(id string, d device) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lives == nil {
		b.lives = map[string]string{}
	}
	b.lives[id] = d.life
}

// xenLife returns the life of the disk that is remembered to be a volume.
func (b *Nova) xenLife(id string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lives[id]
}

// novaAttachment is a volume that a server has.
type novaAttachment struct {
	Volume string `json:"volumeId"`
	Device string `json:"device"`
}

// is says that a device is the volume, or in the place that Nova names.
func (on novaAttachment) is(d device) bool {
	place, ok := placeNamed(on.Device)
	return d.of(on.Volume) || ok && d.xen && d.place == place
}

// novaDevice asks Nova what it calls the device that a volume is on a server; empty if the
// server does not have it.
func (b *Nova) novaDevice(ctx context.Context, server, id string) (string, error) {
	var got struct {
		Attachment novaAttachment `json:"volumeAttachment"`
	}
	err := b.get(ctx, compute, "servers/"+server+"/os-volume_attachments/"+id, &got)
	switch {
	case is(err, http.StatusNotFound):
		return "", nil
	case err != nil:
		return "", err
	case got.Attachment.Volume != id:
		return "", fmt.Errorf("%s was asked for volume %s and answers with %q: %w", compute, id, got.Attachment.Volume, backends.ErrUnavailable)
	}
	return got.Attachment.Device, nil
}

// isHere is an error unless Nova's server is this host: unless this host has one of its addresses.
func (b *Nova) isHere(ctx context.Context, server string) error {
	var got struct {
		Server struct {
			Addresses map[string][]struct {
				Addr string `json:"addr"`
			} `json:"addresses"`
		} `json:"server"`
	}
	if err := b.get(ctx, compute, "servers/"+server, &got); err != nil {
		if is(err, http.StatusNotFound) {
			err = fmt.Errorf("%s has no server %s in this account; check server_id and region: %w", compute, server, backends.ErrUnavailable)
		}
		return err
	}
	mine, err := b.addresses()
	if err != nil {
		return fmt.Errorf("this host's addresses: %w", err)
	}
	var its []string
	for _, network := range got.Server.Addresses {
		for _, a := range network {
			ip := net.ParseIP(a.Addr)
			if ip == nil || !ip.IsGlobalUnicast() {
				continue
			}
			if slices.ContainsFunc(mine, ip.Equal) {
				return nil
			}
			its = append(its, a.Addr)
		}
	}
	slices.Sort(its)
	return fmt.Errorf("server %s has the addresses %q, and this host has none of them, so it is another one: check server_id: %w",
		server, strings.Join(its, ", "), backends.ErrUnavailable)
}

// addresses are this host's.
func addresses() ([]net.IP, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var ips []net.IP
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok {
			ips = append(ips, n.IP)
		}
	}
	return ips, nil
}

// xen returns the disk that the volume is, as far as that can be proven. why says what has
// kept it from being that so far.
func (a *attaching) xen(ctx context.Context) (d device, ok bool, why string, err error) {
	if a.named == "" {
		if a.named, err = a.b.novaDevice(ctx, a.server, a.req.Ref); err != nil {
			return d, false, "", err
		}
		if a.named == "" {
			return d, false, "", fmt.Errorf("%s does not say which device volume %s is on server %s: %w", compute, a.req.Ref, a.server, backends.ErrUnavailable)
		}
	}
	place, ok := placeNamed(a.named)
	if !ok {
		return d, false, fmt.Sprintf("Nova names it %q, which is no disk of Xen", a.named), nil
	}
	devices, err := a.b.kernel.xenDisks()
	if err != nil {
		return d, false, "", err
	}
	d, ok = at(devices, place)
	if !ok {
		return d, false, fmt.Sprintf("no disk, or more than one, is in the place of %s", a.named), nil
	}
	if slices.ContainsFunc(a.before, func(was device) bool { return was.place == place }) {
		return d, false, "", fmt.Errorf("Nova says that volume %s is %s, and there was a disk before it was attached, so %s may be another's; "+
			"nothing was written to it: %w", a.req.Ref, a.named, d.name, backends.ErrUnavailable)
	}
	size, err := a.b.kernel.xenSize(d)
	if err != nil {
		return d, false, "", err
	}
	if size != a.size {
		return d, false, fmt.Sprintf("%s, in the place of %s, has %d bytes, and the volume %d", d.name, a.named, size, a.size), nil
	}
	if a.changed {
		err = glanced(ctx, a.b.kernel.Claimed, filepath.Join(a.b.kernel.Dev, d.name))
		if err == nil {
			err = a.b.noteXen(a.req.Ref, d)
		}
	} else if !a.b.notedXen(a.req.Ref, d) {
		err = fmt.Errorf("nobody has noted that it was not there before; detach it: %w", backends.ErrUnavailable)
	}
	if err != nil {
		return d, false, "", fmt.Errorf("volume %s seems to be %s, as Nova names it %s: %w", a.req.Ref, d.name, a.named, err)
	}
	a.b.xenVolume(a.req.Ref, d)
	return d, true, "", nil
}

// noteXen notes that a disk has come when a volume was attached.
func (b *Nova) noteXen(id string, d device) error {
	file, text, err := b.xenNote(id, d)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(file), 0o700)
	}
	if err == nil {
		err = os.WriteFile(file, []byte(text), 0o600)
	}
	if err != nil {
		return fmt.Errorf("note whose disk it is: %w; %w", err, backends.ErrUnavailable)
	}
	return nil
}

// unnoteXen removes the note about a volume.
func (b *Nova) unnoteXen(id string) error {
	file, _, err := b.xenNote(id, device{})
	if err == nil {
		err = os.Remove(file)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("note whose disk it is: %w; %w", err, backends.ErrUnavailable)
	}
	return nil
}

// foresee looks which disks there are before the volume is attached. What was noted of an
// earlier time is over.
func (a *attaching) foresee() (err error) {
	if !a.b.cfg.XenDisks || a.changed {
		return nil
	}
	if err := a.b.unnoteXen(a.req.Ref); err != nil {
		return err
	}
	a.before, err = a.b.kernel.xenDisks()
	return err
}

// notedXen says that somebody has noted it.
func (b *Nova) notedXen(id string, d device) bool {
	file, want, err := b.xenNote(id, d)
	if err != nil {
		return false
	}
	text, err := os.ReadFile(file)
	return err == nil && string(text) == want
}

// xenNote is what is noted, and where: a disk's life is its own until the host restarts.
func (b *Nova) xenNote(id string, d device) (file, text string, err error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	dir := cmp.Or(b.cfg.RunDir, "/run/flocker/cinder")
	return filepath.Join(dir, "xen", id), fmt.Sprintf("%s %s\n", strings.TrimSpace(string(boot)), d.life), nil
}

// xenHere finds out which disk a volume is that this server has, so that nobody loses it who
// uses it, and that it is seen to go.
func (b *Nova) xenHere(ctx context.Context, server string, v *volume) error {
	name, err := b.novaDevice(ctx, server, v.id)
	if err != nil {
		return err
	}
	devices, err := b.kernel.xenDisks()
	if err != nil {
		return err
	}
	d, ok, err := b.xenOf(devices, name, v)
	if ok {
		b.xenVolume(v.id, d)
	}
	return err
}

// xenKnown says that a disk is the volume's in whose place it is, if that has been noted. One that is
// in use without a note, as by containers of a plugin whose notes are lost, is as well: nobody formats it.
func (b *Nova) xenKnown(id string, d device) (bool, error) {
	if b.notedXen(id, d) {
		return true, nil
	}
	err := b.kernel.Claimed(filepath.Join(b.kernel.Dev, d.name))
	if errors.Is(err, backends.ErrInUse) {
		return true, nil
	}
	return false, err
}

// xenOf returns the disk in the place that Nova names, if it has the volume's size.
func (b *Nova) xenOf(devices []device, name string, v *volume) (device, bool, error) {
	place, ok := placeNamed(name)
	if !ok {
		return device{}, false, nil
	}
	d, ok := at(devices, place)
	if !ok {
		return d, false, nil
	}
	size, err := b.kernel.xenSize(d)
	return d, err == nil && size == v.Size, err
}
