package openstack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// CephConnector is the Connector of volumes that are images of Ceph RBD. Ceph can cut a
// client off, so it is class F2.
//
// Which client serves a device is noted before the device can be used, a key for each. The
// note is removed when the client was closed, or is seen on the blocklist; never otherwise.
// So whoever finds no note knows that nothing can write any more, whatever Cinder says of
// attachments.
type CephConnector struct{ *Connector }

var (
	_ backends.Backend = (*CephConnector)(nil)
	_ backends.Fencer  = (*CephConnector)(nil)
)

func newCeph(c *cinder) (*CephConnector, error) {
	sum := sha256.Sum256([]byte(c.self.Cluster + "/" + c.self.Node + "/" + c.self.Name))
	dir := filepath.Join(cmp.Or(c.cfg.RunDir, "/run/flocker/cinder"), hex.EncodeToString(sum[:6]))
	attacher, err := rbdmap.New(rbdmap.Config{Dir: dir, Method: c.cfg.CephAttach})
	if err != nil {
		return nil, err
	}
	return &CephConnector{&Connector{cinder: c, storage: images{dir: dir, attacher: attacher, ceph: rbdmap.Cluster{
		Conf: c.cfg.CephConf, Monitors: strings.Join(c.cfg.CephMonitors, ","), User: c.cfg.CephUser, Keyring: c.cfg.CephKeyringFile,
	}}}}, nil
}

// Properties implements backends.Backend.
func (b *CephConnector) Properties() backends.Properties {
	p := b.properties(backends.ClassFenced)
	p.FenceTime = 2 * time.Minute // Ceph may take a while to forget a watcher
	return p
}

// Fence implements backends.Fencer. It notes that the node is cut off, and then looks for
// its clients; Attach does it the other way round, so one of them sees the other. They are
// on the blocklist before Cinder lets anybody else have the volume.
func (b *CephConnector) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	evidence, err := b.fence(ctx, req)
	if err != nil {
		return "", fmt.Errorf("cut %s off from volume %s: %w", req.Node, req.Volume, err)
	}
	return evidence, nil
}

func (b *CephConnector) fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	v, err := b.find(ctx, req.Ref)
	if err != nil {
		return "", err
	}
	if v.ID != req.Volume || req.Node == "" || req.Token < 0 {
		return "", fmt.Errorf("%s is volume %s, and the request names node %q and token %d: %w", v.id, v.ID, req.Node, req.Token, backends.ErrInvalid)
	}
	if err := b.note(ctx, v.id, fmt.Sprintf("%s%d_%s", keyCut, req.Token, req.Node), b.self.Node); err != nil {
		return "", err
	}
	if v, err = b.find(ctx, req.Ref); err != nil {
		return "", err
	}
	evidence := fmt.Sprintf("no client of %s is noted for volume %s, and it gets none up to token %d", req.Node, v.id, req.Token)
	for _, c := range v.clients {
		switch {
		case c.node != req.Node:
			continue
		case c.token > req.Token:
			evidence = fmt.Sprintf("volume %s is attached to %s under the younger token %d only", v.id, req.Node, c.token)
			continue
		}
		if err := b.end(ctx, v.id, c, false); err != nil {
			return "", err
		}
		evidence = fmt.Sprintf("client %s of %s is on the blocklist, and no watcher of %s any more", c.address, c.node, c.image)
	}
	atts, err := b.attached(ctx, v.id)
	if err != nil {
		return "", err
	}
	for _, a := range atts {
		if h, ok := v.tokens[a.ID]; ok && h.node == req.Node && h.token <= req.Token {
			if err := b.release(ctx, v.id, a.ID); err != nil {
				return "", err
			}
		}
	}
	for _, older := range v.cuts {
		if older.node == req.Node && older.token < req.Token {
			if err := b.unnote(ctx, v.id, older.key); err != nil {
				return "", err
			}
		}
	}
	return evidence, nil
}

// images makes block devices of images of Ceph RBD.
type images struct {
	dir      string // of this node's devices
	attacher attacher
	ceph     rbdmap.Cluster
}

// attacher makes devices of images on this host; an *rbdmap.Attacher, but for a test.
type attacher interface {
	Map(ctx context.Context, image rbdmap.Image, label string, allow func(rbdmap.Client) error) (rbdmap.Device, error)
	Devices() ([]rbdmap.Device, error)
	Unmap(ctx context.Context, label string) (clean bool, err error)
	Served(label string) (bool, error)
}

func (i images) lock(ctx context.Context, volume string) (unlock func(), err error) {
	return rbdmap.Lock(ctx, i.dir, volume)
}

// labelForm is the name of a device at this host: attachment, token, volume, dataset.
var labelForm = regexp.MustCompile(`^([0-9a-f-]{36}) ([0-9]+) ([0-9a-f-]{36}) (\S+)$`)

func (b block) label() string {
	return fmt.Sprintf("%s %d %s %s", b.attachment, b.token, b.volume, b.dataset)
}

func (i images) devices(context.Context) ([]block, error) {
	all, err := i.attacher.Devices()
	if err != nil {
		return nil, err
	}
	var found []block
	for _, d := range all {
		m := labelForm.FindStringSubmatch(d.Label)
		if m == nil {
			continue
		}
		token, err := strconv.ParseInt(m[2], 10, 64)
		if err == nil {
			found = append(found, block{path: d.Path, life: d.Label + " " + d.Path, attachment: m[1], token: token, volume: m[3], dataset: m[4]})
		}
	}
	return found, nil
}

func (i images) connect(ctx context.Context, to connection) (block, error) {
	image, err := i.named(to.volume, to.info)
	if err != nil {
		return block{}, err
	}
	all, err := i.devices(ctx)
	if err != nil {
		return block{}, err
	}
	for _, b := range all {
		if b.attachment == to.attachment {
			return b, nil
		}
	}
	b := block{volume: to.volume, attachment: to.attachment, dataset: to.dataset, token: to.token}
	d, err := i.attacher.Map(ctx, image, b.label(), func(c rbdmap.Client) error { return to.allow(c.Address, image.Spec()) })
	if err != nil {
		return block{}, err
	}
	b.path, b.life = d.Path, d.Label+" "+d.Path
	return b, nil
}

func (i images) served(b block) (bool, error) { return i.attacher.Served(b.label()) }

func (i images) disconnect(ctx context.Context, b block, _ pace) (clean bool, err error) {
	return i.attacher.Unmap(ctx, b.label())
}

// named returns the image that Cinder names.
func (i images) named(volume string, info map[string]any) (rbdmap.Image, error) {
	if err := of(volume, info, "rbd"); err != nil {
		return rbdmap.Image{}, err
	}
	image, ok := i.image(text(info, "name"))
	if !ok || idInName.FindString(image.Name) != volume {
		return image, fmt.Errorf("volume %s is image %q, which is not made of its id (Cinder's volume_name_template): %w", volume, text(info, "name"), backends.ErrInvalid)
	}
	return image, nil
}

var imageForm = regexp.MustCompile(`^([^/@\s]+)/([^/@\s]+)$`)

// image returns the image that is written as pool/name.
func (i images) image(spec string) (rbdmap.Image, bool) {
	m := imageForm.FindStringSubmatch(spec)
	if m == nil {
		return rbdmap.Image{}, false
	}
	return rbdmap.Image{Cluster: i.ceph, Pool: m[1], Name: m[2]}, true
}

// cut implements cutter.
func (i images) cut(ctx context.Context, c client) error {
	image, ok := i.image(c.image)
	if !ok {
		return fmt.Errorf("the note %s does not say what Flocker writes; find out which client of Ceph has the volume, cut it off "+
			"(ceph osd blocklist add), and remove the note (openstack volume unset --property %[1]s): %w", c.key, backends.ErrUnavailable)
	}
	gone, err := image.Cut(ctx, c.address)
	if err == nil && gone {
		err = fmt.Errorf("this Ceph cluster has no image %s, so it may be another one than that of the client: %w", c.image, backends.ErrUnavailable)
	}
	return err
}
