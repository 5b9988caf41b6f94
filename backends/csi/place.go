package csi

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// place is where a driver puts a volume's device on this node, under one token:
//
//	<dir>/<volume>.<token>/device   what NodePublishVolume makes
//	<dir>/<volume>.<token>/stage    a directory for NodeStageVolume
//	<dir>/<volume>.<token>/record   record, below
//
// It is there before the driver hears of the attachment, and until the driver has
// undone it, so whatever was begun is found again after a crash. Whether the volume is
// attached is not read from the record but seen in the kernel: the record says which
// disk, of which boot, the driver had made, so that no other is taken for it.
type place struct {
	dir    string
	volume string
	token  int64
	record record
	boot   string // the present one
}

type record struct {
	Ref   string `json:"ref"`
	Boot  string `json:"boot"`
	Disk  *disk  `json:"disk,omitempty"`  // once it was there
	Going bool   `json:"going,omitempty"` // a detach has begun
}

func (p place) device() string { return filepath.Join(p.dir, "device") }
func (p place) stage() string  { return filepath.Join(p.dir, "stage") }

// whole says that an attach has come to its end, in this boot, and no detach has begun.
func (p place) whole() bool {
	return p.record.Disk != nil && !p.record.Going && p.record.Boot == p.boot
}

// live says that the kernel has the disk, at the driver's path, and that it works.
func (p place) live() bool {
	if !p.whole() || p.record.Disk.size() == 0 {
		return false
	}
	is, err := diskAt(p.device())
	return err == nil && is == *p.record.Disk
}

// used says that somebody may still have the disk that was here, although it was cut
// off or taken away.
func (p place) used(ctx context.Context) bool {
	if p.record.Disk == nil || p.record.Boot != p.boot {
		return false
	}
	if !p.record.Disk.there() {
		return p.record.Disk.mounted()
	}
	return errors.Is(p.record.Disk.closed(ctx), backends.ErrInUse)
}

func (b *Backend) placeOf(volume string, token int64) place {
	name := strings.ReplaceAll(volume, "-", "") + "." + strconv.FormatInt(token, 36)
	return place{dir: filepath.Join(b.dir, name), volume: volume, token: token}
}

// places returns the places of a volume, or of all if volume is empty.
func (b *Backend) places(volume string) ([]place, error) {
	found, err := b.readPlaces(volume)
	if err != nil {
		err = sentence(backends.ErrUnavailable, "find attachments: %w", err)
	}
	return found, err
}

func (b *Backend) readPlaces(volume string) ([]place, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(b.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []place
	for _, entry := range entries {
		p, ok := b.parsePlace(entry.Name())
		if !ok || (volume != "" && p.volume != volume) {
			continue
		}
		p.boot = boot
		err := p.read()
		if errors.Is(err, fs.ErrNotExist) {
			// Its making, or its end, was interrupted: the driver knows nothing of it.
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, p)
	}
	return found, nil
}

func (b *Backend) parsePlace(name string) (place, bool) {
	id, token, ok := strings.Cut(name, ".")
	raw, err := hex.DecodeString(id)
	if !ok || err != nil {
		return place{}, false
	}
	volume, err := uuid.FromBytes(raw)
	n, err2 := strconv.ParseInt(token, 36, 64)
	p := b.placeOf(volume.String(), n)
	return p, err == nil && err2 == nil && filepath.Base(p.dir) == name
}

func (p *place) read() error {
	text, err := os.ReadFile(filepath.Join(p.dir, "record"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &p.record); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(p.dir, "record"), err)
	}
	return nil
}

// make makes the place, which may be there in part.
func (p place) make() error {
	for _, dir := range []string{filepath.Dir(filepath.Dir(p.dir)), filepath.Dir(p.dir), p.dir, p.stage()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if err := p.save(); err != nil {
		return err
	}
	return errors.Join(syncFile(filepath.Join(p.dir, "record")), syncFile(p.dir), syncFile(filepath.Dir(p.dir)))
}

// save writes the record as a whole or not at all. Only its first version has to outlive
// a power cut: the next boot believes no more of it than that it is there.
func (p place) save() error {
	text, err := json.Marshal(p.record)
	if err != nil {
		return err
	}
	path := filepath.Join(p.dir, "record")
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// remove removes a place that the driver has left. Only what is empty goes: whatever is
// mounted is never emptied. The record goes last but one, so that what is left is found.
func (p place) remove() error {
	for _, path := range []string{p.device(), p.stage(), filepath.Join(p.dir, "record.new"), filepath.Join(p.dir, "record"), p.dir} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return sentence(backends.ErrUnavailable, "remove what the CSI driver has left: %w", err)
		}
	}
	return nil
}

func syncFile(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return f.Sync()
}

// locks has a lock for each volume of each node of this process: CSI wants one call at a
// time about a volume.
var locks sync.Map // string to chan struct{}

func (b *Backend) held(volume string) chan struct{} {
	value, _ := locks.LoadOrStore(b.dir+" "+volume, make(chan struct{}, 1))
	return value.(chan struct{})
}

func (b *Backend) lock(ctx context.Context, volume string) (unlock func(), err error) {
	held := b.held(volume)
	select {
	case held <- struct{}{}:
		return func() { <-held }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another call about volume %s is under way: %w", volume, ctx.Err())
	}
}

// tryLock is lock for what need not be done now.
func (b *Backend) tryLock(volume string) (unlock func(), ok bool) {
	held := b.held(volume)
	select {
	case held <- struct{}{}:
		return func() { <-held }, true
	default:
		return nil, false
	}
}
