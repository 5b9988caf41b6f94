package openstack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// luns makes block devices of the logical units of iSCSI targets that Cinder's volumes are.
//
// A unit does not say which volume it is; arrays give the number of one that was detached to
// another. So before a host logs in it notes which volume the unit is connected as, and a
// device counts only as what its note says. The note goes when the device was removed and nothing
// that was sent through it can arrive later.
type luns struct {
	dir       string // of notes and locks
	name      string // of this host as an initiator
	initiator iscsi.Initiator
}

func newISCSI(c *cinder) (*Connector, error) {
	name, err := c.cfg.ISCSIInitiator, error(nil)
	if name == "" {
		if name, err = iscsi.Name(iscsi.NameFile); err != nil {
			return nil, fmt.Errorf("%w; or set iscsi_initiator: %w", err, backends.ErrInvalid)
		}
	}
	sum := sha256.Sum256([]byte(c.self.Cluster + "/" + c.self.Node + "/" + c.self.Name))
	dir := filepath.Join(cmp.Or(c.cfg.RunDir, "/run/flocker/cinder"), hex.EncodeToString(sum[:6]))
	program, err := iscsi.NewProgram(iscsi.ProgramConfig{Dir: dir, Name: name})
	if err != nil {
		return nil, err
	}
	initiator, err := iscsi.NewHost(c.cfg.ISCSIAttach, iscsi.NewKernel(iscsi.KernelConfig{Name: c.cfg.ISCSIInitiator}), program)
	if err != nil {
		return nil, fmt.Errorf("iscsi_attach: %w", err)
	}
	return &Connector{cinder: c, storage: luns{dir, name, initiator}}, nil
}

// unitNote says as which volume a logical unit is connected.
type unitNote struct {
	Target     string `json:"target"`
	Number     int    `json:"lun"`
	Volume     string `json:"volume"`
	Attachment string `json:"attachment"`
	Dataset    string `json:"dataset"`
	Token      int64  `json:"token"`
	// Life is that of the device. It is empty until there is one.
	Life string `json:"life,omitempty"`
}

// lock implements storage.
func (l luns) lock(ctx context.Context, volume string) (unlock func(), err error) {
	return rbdmap.Lock(ctx, l.dir, volume)
}

// connector is what Cinder is told of this host besides.
func (l luns) connector() map[string]any { return map[string]any{"initiator": l.name} }

// file is where the note of a unit is.
func (l luns) file(target string, number int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", target, number))
	return filepath.Join(l.dir, "lun-"+hex.EncodeToString(sum[:12]))
}

// noted returns the note of a unit, if there is one.
func (l luns) noted(target string, number int) (n unitNote, ok bool, err error) {
	file := l.file(target, number)
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return n, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &n)
	}
	if err != nil || n.Target != target || n.Number != number || n.Volume == "" || n.Attachment == "" {
		return n, false, fmt.Errorf("the note %s does not say as which volume LUN %d of %s was connected; disconnect that, and remove the note: %w",
			file, number, target, backends.Classify(backends.ErrUnavailable, cmp.Or(err, errors.New("it is of something else"))))
	}
	return n, true, nil
}

// note writes the note of a unit that has none, or changes it.
func (l luns) note(n unitNote, change bool) error {
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(l.dir, "new-") // 0600
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	put := os.Link // not if somebody else has noted the unit meanwhile
	if change {
		put = os.Rename
	}
	if err := put(f.Name(), l.file(n.Target, n.Number)); err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	return nil
}

func (l luns) forget(target string, number int) error {
	if err := os.Remove(l.file(target, number)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	return nil
}

// devices implements storage. A device without a note that says whose it is is nobody's.
func (l luns) devices(ctx context.Context) ([]block, error) {
	all, err := l.initiator.Devices(ctx)
	var found []block
	for _, d := range all {
		if n, ok, err := l.noted(d.Target, d.Number); err == nil && ok && n.Life == d.Life {
			found = append(found, n.block(d))
		}
	}
	return found, err
}

func (n unitNote) block(d iscsi.Device) block {
	return block{path: d.Path, volume: n.Volume, life: d.Life, attachment: n.Attachment, dataset: n.Dataset, token: n.Token}
}

// of returns the device of a unit, if there is one.
func (l luns) of(ctx context.Context, lun iscsi.LUN) (iscsi.Device, bool, error) {
	all, err := l.initiator.Devices(ctx)
	i := slices.IndexFunc(all, func(d iscsi.Device) bool { return d.Is(lun) })
	if err != nil || i < 0 {
		return iscsi.Device{}, false, err
	}
	return all[i], true, nil
}

// nameInTarget is the end of what Cinder calls the target of a volume for which it makes one.
var nameInTarget = regexp.MustCompile(`volume-(` + idInName.String() + `)$`)

// unit returns the logical unit that Cinder names.
func (l luns) unit(volume string, info map[string]any) (iscsi.LUN, error) {
	if err := of(volume, info, "iscsi"); err != nil {
		return iscsi.LUN{}, err
	}
	lun, err := iscsi.Parse(info)
	if err != nil {
		return lun, fmt.Errorf("volume %s: %w", volume, err)
	}
	if m := nameInTarget.FindStringSubmatch(lun.Target); m != nil && m[1] != volume {
		return lun, fmt.Errorf("volume %s is said to be %s, which has the id of another volume in its name, as after a migration: %w", volume, lun, backends.ErrInvalid)
	}
	return lun, nil
}

// connect implements storage.
func (l luns) connect(ctx context.Context, to connection) (block, error) {
	lun, err := l.unit(to.volume, to.info)
	if err != nil {
		return block{}, err
	}
	n, noted, err := l.noted(lun.Target, lun.Number)
	if err != nil {
		return block{}, err
	}
	d, here, err := l.of(ctx, lun)
	switch {
	case err != nil:
		return block{}, err
	case here && !noted:
		return block{}, fmt.Errorf("%s is %s, which Cinder says is volume %s, and this host has no note as which volume it was connected: %w",
			d.Path, lun, to.volume, backends.ErrInUse)
	case here && n.Life == d.Life && (n.Volume != to.volume || n.Attachment != to.attachment):
		return block{}, fmt.Errorf("%s is %s, which Cinder says is volume %s now, and it was connected as volume %s for attachment %s; detach that first: %w",
			d.Path, lun, to.volume, n.Volume, n.Attachment, backends.ErrInUse)
	case here && n.Life == d.Life:
		return n.block(d), nil
	case noted && n.Volume != to.volume:
		// Nobody ends it but under that volume's lock.
		waiting, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		unlock, err := l.lock(waiting, n.Volume)
		if err != nil {
			return block{}, fmt.Errorf("%s is being connected as volume %s: %w", lun, n.Volume, err)
		}
		defer unlock()
	}
	if noted {
		if err := l.end(ctx, lun); err != nil {
			return block{}, err
		}
	}
	n = unitNote{Target: lun.Target, Number: lun.Number, Volume: to.volume, Attachment: to.attachment, Dataset: to.dataset, Token: to.token}
	if err := l.note(n, false); err != nil {
		return block{}, err
	}
	if d, err = l.initiator.Connect(ctx, lun); err != nil {
		if _, here, failed := l.of(ctx, lun); failed == nil && !here {
			err = errors.Join(err, l.forget(lun.Target, lun.Number)) // nobody has had a device
		}
		return block{}, err
	}
	if !d.Is(lun) {
		return block{}, fmt.Errorf("%s is LUN %d of %s, and was to be %s: %w", d.Path, d.Number, d.Target, lun, backends.ErrUnavailable)
	}
	n.Life = d.Life
	if err := l.note(n, true); err != nil {
		return block{}, err
	}
	return n.block(d), nil
}

// end clears away what a note is left of: a connection that has not come to its end, whose device
// nobody was given, or one that was not closed cleanly.
func (l luns) end(ctx context.Context, lun iscsi.LUN) error {
	d, here, err := l.of(ctx, lun)
	if err == nil && here {
		_, err = l.initiator.Disconnect(ctx, d)
	}
	if err == nil {
		err = l.drain(ctx, lun)
	}
	if err != nil {
		return err
	}
	return l.forget(lun.Target, lun.Number)
}

// drain returns when nothing can arrive any more that was sent to a unit by a device that has
// gone: when the target has let this host in again, and out.
func (l luns) drain(ctx context.Context, lun iscsi.LUN) error {
	d, err := l.initiator.Connect(ctx, lun)
	if errors.Is(err, backends.ErrNotFound) {
		return nil // the target lets this host have it no more
	}
	clean := false
	if err == nil {
		clean, err = l.initiator.Disconnect(ctx, d)
	}
	if err == nil && !clean {
		err = errors.New("it does not answer")
	}
	if err != nil {
		return fmt.Errorf("something that this host has sent to %s may still arrive there, until that has answered: %w", lun, backends.Classify(backends.ErrUnavailable, err))
	}
	return nil
}

// served implements storage.
func (l luns) served(b block) (bool, error) {
	d, err := l.find(context.Background(), b)
	if err != nil || d.Path == "" {
		return false, err
	}
	return l.initiator.Served(d)
}

// find returns the device of a block; none if it is gone.
func (l luns) find(ctx context.Context, b block) (iscsi.Device, error) {
	all, err := l.initiator.Devices(ctx)
	i := slices.IndexFunc(all, func(d iscsi.Device) bool { return d.Path == b.path && d.Life == b.life })
	if err != nil || i < 0 {
		return iscsi.Device{}, err
	}
	return all[i], nil
}

// disconnect implements storage.
func (l luns) disconnect(ctx context.Context, b block, _ pace) (clean bool, err error) {
	d, err := l.find(ctx, b)
	if err != nil || d.Path == "" {
		return false, err
	}
	if clean, err = l.initiator.Disconnect(ctx, d); err != nil || !clean {
		return false, err // its note stays
	}
	return true, l.forget(d.Target, d.Number)
}

// settle implements settler.
func (l luns) settle(ctx context.Context, to connection) error {
	if text(to.info, "driver_volume_type") == "" { // nobody was told where it is
		return nil
	}
	lun, err := l.unit(to.volume, to.info)
	if err != nil {
		return nil //nolint:nilerr // it was not connected by this
	}
	n, noted, err := l.noted(lun.Target, lun.Number)
	if err != nil {
		return err
	}
	d, here, err := l.of(ctx, lun)
	switch {
	case err != nil:
		return err
	case noted && n.Volume != to.volume, !noted && !here:
		return nil
	case here && noted && n.Life == d.Life:
		return fmt.Errorf("%s is still %s: %w", d.Path, lun, backends.ErrInUse)
	}
	return l.end(ctx, lun)
}
