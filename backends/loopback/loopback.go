// Package loopback keeps volumes as files in a directory, and attaches them as
// loop devices. The directory may be shared between hosts.
//
// A volume is a directory of its own:
//
//	<Dir>/.flocker-loopback        the directory's identity, a UUID
//	<Dir>/<volume>/meta.json       name, cluster, block size
//	<Dir>/<volume>/<identity>.img  the data; its length is the volume's size
//	<Dir>/.new-<volume>/           one being made
//	<Dir>/.deleted-<volume>/       one being removed
//
// so that one rename makes it appear or disappear whole. Who builds, attaches or
// deletes it holds a lock (flock) on the data file. A loop device keeps the file
// open and so the lock, for exactly as long as it is attached: hosts that share
// the directory on a filesystem that shares locks cannot attach a volume twice.
// It is no fence: a host that has gone silent cannot be made to stop writing.
package loopback

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
)

// Config is what a Loopback is made from.
type Config struct {
	// Dir is where the volumes are. The first Create makes it, but not its parents.
	Dir string
	// Node is the identity of the host this instance attaches volumes to.
	Node string
	// Cluster is the UUID of the Flocker cluster. Volumes of another one are not
	// seen. Empty: every volume in Dir is.
	Cluster string
	// Preallocate is the default of the create option of that name.
	Preallocate bool
}

// Loopback is the backend of one node.
type Loopback struct {
	cfg     Config
	control string // path of loop-control; tests change it

	mu sync.Mutex
	// identity is Dir's, since it was first seen: a directory that changes under
	// us is not mounted, or is another one.
	identity string
	// claimed are the numbers of loop devices that calls in progress are about to
	// configure, so that they do not race for one.
	claimed map[int]bool
}

const (
	unit       = int64(1 << 20)
	markerName = ".flocker-loopback"
	metaName   = "meta.json"
	newPrefix  = ".new-"
	oldPrefix  = ".deleted-"
)

type createOptions struct {
	Preallocate bool `option:"preallocate" default:"false" help:"reserve all of the volume's space at once, instead of as data is written"`
}

type metadata struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Cluster string `json:"cluster"`
	// Block is the device's block size. It is settled once, since filesystems
	// depend on it.
	Block int `json:"block"`
	// Preallocate says that growth is reserved as well.
	Preallocate bool `json:"preallocate,omitempty"`
}

// New returns the backend of one node. It does no I/O.
func New(cfg Config) *Loopback {
	return &Loopback{cfg: cfg, control: "/dev/loop-control", claimed: map[int]bool{}}
}

// Properties implements backends.Backend.
func (l *Loopback) Properties() backends.Properties {
	options := backends.Options[createOptions]()
	options[0].Default = strconv.FormatBool(l.cfg.Preallocate)
	return backends.Properties{
		Name:            "loopback",
		Class:           backends.ClassNone,
		AllocationUnit:  unit,
		MinSize:         unit,
		CheapAttach:     true,
		ExclusiveAttach: true,
		Options:         options,
	}
}

// volume is where a volume's files are.
type volume struct {
	id, identity string
	dir          string
}

func (l *Loopback) volume(identity, id string) volume {
	return volume{id: id, identity: identity, dir: filepath.Join(l.cfg.Dir, id)}
}

func (v volume) data() string { return filepath.Join(v.dir, v.identity+".img") }
func (v volume) meta() string { return filepath.Join(v.dir, metaName) }
func (v volume) ref() string  { return v.identity + "/" + v.id }

// beside is the same volume while it is made or removed.
func (v volume) beside(prefix string) volume {
	v.dir = filepath.Join(filepath.Dir(v.dir), prefix+v.id)
	return v
}

// remove removes the volume's files. Whoever calls it holds its lock.
func (v volume) remove() error {
	for _, path := range []string{v.meta(), v.data(), v.dir} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// read returns the volume and its metadata; backends.ErrNotFound if there is none.
func (l *Loopback) read(v volume) (backends.Volume, metadata, error) {
	none := fmt.Errorf("volume %s: %w", v.id, backends.ErrNotFound)
	text, err := os.ReadFile(v.meta())
	if errors.Is(err, fs.ErrNotExist) {
		if !exists(v.dir) {
			return backends.Volume{}, metadata{}, none
		}
		text, err = os.ReadFile(v.meta()) // it may have appeared in between
	}
	if err != nil {
		return backends.Volume{}, metadata{}, unavailable(fmt.Errorf("read volume %s: %w", v.id, err))
	}
	var m metadata
	if err = json.Unmarshal(text, &m); err == nil && m.ID != v.id {
		err = fmt.Errorf("it is about volume %q", m.ID)
	}
	if err != nil {
		return backends.Volume{}, metadata{}, unavailable(fmt.Errorf("metadata %s of volume %s is damaged: %w", v.meta(), v.id, err))
	}
	info, err := os.Stat(v.data())
	if errors.Is(err, fs.ErrNotExist) {
		// Deleted since, or damaged.
		if _, err := os.Stat(v.meta()); errors.Is(err, fs.ErrNotExist) {
			return backends.Volume{}, metadata{}, none
		}
	}
	if err != nil {
		return backends.Volume{}, metadata{}, unavailable(fmt.Errorf("read volume %s: %w", v.id, err))
	}
	return backends.Volume{Ref: v.ref(), ID: m.ID, Cluster: m.Cluster, Name: m.Name, Size: info.Size()}, m, nil
}

// find returns the volume with a ref, if it is of this directory and cluster.
func (l *Loopback) find(ref string) (volume, backends.Volume, metadata, error) {
	identity, id, ok := splitRef(ref)
	if !ok {
		return volume{}, backends.Volume{}, metadata{}, fmt.Errorf("volume reference %q is not of the loopback backend: %w", ref, backends.ErrInvalid)
	}
	mine, err := l.identify(false)
	if err != nil {
		return volume{}, backends.Volume{}, metadata{}, err
	}
	if identity != mine {
		if mine == "" {
			mine = "a directory without volumes"
		}
		return volume{}, backends.Volume{}, metadata{}, unavailable(fmt.Errorf(
			"volume %s lives in another loopback directory (%s) than %s on this host (%s); "+
				"share the directory between hosts or use the host it was made on", id, identity, l.cfg.Dir, mine))
	}
	v := l.volume(identity, id)
	vol, m, err := l.read(v)
	if err == nil && l.cfg.Cluster != "" && m.Cluster != l.cfg.Cluster {
		err = fmt.Errorf("volume %s: %w", id, backends.ErrNotFound)
	}
	return v, vol, m, err
}

func splitRef(ref string) (identity, id string, ok bool) {
	identity, id, _ = strings.Cut(ref, "/")
	return identity, id, isUUID(identity) && isUUID(id)
}

// isUUID accepts the canonical form alone: it becomes a file's name.
func isUUID(s string) bool {
	u, err := uuid.Parse(s)
	return err == nil && u.String() == s
}

// identify returns the identity of the directory, and gives it one if create is
// set. It is empty where nothing was ever made.
func (l *Loopback) identify(create bool) (string, error) {
	l.mu.Lock()
	known := l.identity
	l.mu.Unlock()
	path := filepath.Join(l.cfg.Dir, markerName)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if known != "" {
			return "", unavailable(fmt.Errorf("loopback directory %s has vanished: its volumes (%s) are not there; is its disk mounted?", l.cfg.Dir, known))
		}
		if !create {
			if _, err := os.Stat(l.cfg.Dir); err != nil {
				return "", unavailable(fmt.Errorf("loopback directory: %w", err))
			}
			return "", nil
		}
		if err := l.mark(path); err != nil {
			return "", l.explain(fmt.Errorf("make loopback directory %s: %w", l.cfg.Dir, err))
		}
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return "", unavailable(fmt.Errorf("loopback directory: %w", err))
	}
	identity := strings.TrimSpace(string(text))
	switch {
	case !isUUID(identity):
		return "", unavailable(fmt.Errorf("loopback directory %s: %s is damaged: %q is no UUID", l.cfg.Dir, markerName, identity))
	case known != "" && known != identity:
		return "", unavailable(fmt.Errorf("loopback directory %s is not the one it was (%s, now %s); is the right disk mounted?", l.cfg.Dir, known, identity))
	}
	l.mu.Lock()
	l.identity = identity
	l.mu.Unlock()
	return identity, nil
}

// mark gives the directory an identity unless another host has just done so.
func (l *Loopback) mark(path string) error {
	if err := os.Mkdir(l.cfg.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	identity := uuid.NewString()
	temp := path + "." + identity
	if err := writeFile(temp, []byte(identity+"\n")); err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	err := os.Link(temp, path)
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	return errors.Join(err, removeIfThere(temp), syncDir(l.cfg.Dir))
}

// Create implements backends.Backend.
func (l *Loopback) Create(ctx context.Context, req backends.CreateRequest) (backends.Volume, error) {
	if err := ctx.Err(); err != nil {
		return backends.Volume{}, fmt.Errorf("create volume: %w", err)
	}
	switch {
	case !isUUID(req.ID):
		return backends.Volume{}, fmt.Errorf("create volume: %q is no UUID: %w", req.ID, backends.ErrInvalid)
	case req.Size <= 0 || req.Size > math.MaxInt64-unit:
		return backends.Volume{}, fmt.Errorf("create volume %s: no volume can have %d bytes: %w", req.Name, req.Size, backends.ErrInvalid)
	case l.cfg.Cluster != "" && req.Cluster != l.cfg.Cluster:
		return backends.Volume{}, fmt.Errorf("create volume %s: cluster %s is not this one: %w", req.Name, req.Cluster, backends.ErrInvalid)
	}
	options, err := backends.Decode[createOptions](req.Options)
	if err != nil {
		return backends.Volume{}, err
	}
	if _, given := req.Options["preallocate"]; !given {
		options.Preallocate = l.cfg.Preallocate
	}
	identity, err := l.identify(true)
	if err != nil {
		return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	v := l.volume(identity, req.ID)
	size := roundUp(req.Size)
	meta := metadata{ID: req.ID, Name: req.Name, Cluster: req.Cluster, Preallocate: options.Preallocate}
	for pause := newBackoff(); ; {
		vol, _, err := l.read(v)
		if err == nil {
			if vol.Size != size || vol.Cluster != req.Cluster {
				return backends.Volume{}, fmt.Errorf("create volume %s: there is one with this id, %s large, of cluster %s: %w",
					req.Name, backends.Size(vol.Size), vol.Cluster, backends.ErrExists)
			}
			// Whoever made it may have died before this.
			return vol, syncDir(l.cfg.Dir)
		}
		if !errors.Is(err, backends.ErrNotFound) {
			return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
		}
		err = l.build(ctx, v, meta, size)
		if err == nil {
			return backends.Volume{Ref: v.ref(), ID: meta.ID, Cluster: meta.Cluster, Name: meta.Name, Size: size}, nil
		}
		if !errors.Is(err, errRaced) {
			return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, l.explain(err))
		}
		if err := pause.wait(ctx); err != nil {
			return backends.Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
		}
	}
}

// errRaced: another call for the same volume was there first; look again.
var errRaced = errors.New("another call is working on the volume")

// build makes a volume beside its place and moves it there. What a build that
// died has left is taken over.
func (l *Loopback) build(ctx context.Context, v volume, meta metadata, size int64) (err error) {
	temp := v.beside(newPrefix)
	if err := os.Mkdir(temp.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := os.OpenFile(temp.data(), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return errRaced
	}
	if err != nil {
		return errors.Join(err, removeIfThere(temp.dir))
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := lock(f, temp.data()); err != nil {
		return err
	}
	if _, err := os.Stat(v.dir); err == nil {
		return errors.Join(errRaced, temp.remove())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, temp.remove())
		}
	}()
	if err := f.Truncate(0); err != nil {
		return err
	}
	if err := grow(ctx, f, 0, size, meta.Preallocate); err != nil {
		return err
	}
	meta.Block = blockSize(f)
	text, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	if err := writeFile(temp.meta(), append(text, '\n')); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Not os.Rename, which looks first and so may fail differently.
	if err := unix.Rename(temp.dir, v.dir); err != nil {
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return errRaced
		}
		return &os.LinkError{Op: "rename", Old: temp.dir, New: v.dir, Err: err}
	}
	return syncDir(l.cfg.Dir)
}

// grow makes a data file larger, or leaves it as it is. Reserving space goes in
// steps, between which it can be cancelled.
func grow(ctx context.Context, f *os.File, from, to int64, preallocate bool) error {
	const step = 1 << 30
	for at := from; preallocate && at < to; {
		err := ctx.Err()
		if err == nil {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, at, min(step, to-at))
		}
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return errors.Join(fmt.Errorf("reserve %s: %w", backends.Size(to-from), err), f.Truncate(from))
		default:
			at += step
		}
	}
	return f.Truncate(to)
}

// blockSize returns the block size a volume's device needs for direct I/O: what
// the disk below has, 512 if the filesystem does not tell.
func blockSize(f *os.File) int {
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align > 512 && st.Dio_offset_align <= 4096 {
		return int(st.Dio_offset_align)
	}
	return 512
}

// Delete implements backends.Backend.
func (l *Loopback) Delete(ctx context.Context, ref string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	v, vol, _, err := l.find(ref)
	if errors.Is(err, backends.ErrNotFound) && v.id != "" {
		// A Delete that died has left this; nobody can have it attached.
		if old := v.beside(oldPrefix); exists(old.dir) {
			return l.explain(old.remove())
		}
	}
	if err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	f, err := os.OpenFile(v.data(), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", vol.Name, l.missing(v, err))
	}
	defer f.Close()
	for pause := newBackoff(); ; {
		err := lock(f, v.data())
		if err == nil {
			break
		}
		if errors.Is(err, errRaced) {
			if !sameFile(f, v.data()) {
				return fmt.Errorf("delete volume %s: %w", v.id, backends.ErrNotFound)
			}
			err = l.attached(ctx, v, f)
			// A lock without a device may be that of a call about to end.
			_, here := errors.AsType[*attachedHere](err)
			if errors.Is(err, backends.ErrInUse) && !here && pause.elapsed() < settle {
				if err := pause.wait(ctx); err != nil {
					return fmt.Errorf("delete volume %s: %w", vol.Name, err)
				}
				continue
			}
		}
		return fmt.Errorf("delete volume %s: %w", vol.Name, err)
	}
	old := v.beside(oldPrefix)
	if err := old.remove(); err != nil {
		return fmt.Errorf("delete volume %s: %w", vol.Name, l.explain(err))
	}
	if err := unix.Rename(v.dir, old.dir); err != nil {
		return fmt.Errorf("delete volume %s: %w", vol.Name, l.explain(&os.LinkError{Op: "rename", Old: v.dir, New: old.dir, Err: err}))
	}
	if err := errors.Join(syncDir(l.cfg.Dir), old.remove()); err != nil {
		return fmt.Errorf("delete volume %s: %w", vol.Name, l.explain(err))
	}
	return nil
}

// Get implements backends.Backend.
func (l *Loopback) Get(ctx context.Context, ref string) (backends.Volume, error) {
	if err := ctx.Err(); err != nil {
		return backends.Volume{}, fmt.Errorf("get volume: %w", err)
	}
	_, vol, _, err := l.find(ref)
	if err != nil {
		return backends.Volume{}, err
	}
	return vol, nil
}

// List implements backends.Backend.
func (l *Loopback) List(ctx context.Context) ([]backends.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	identity, err := l.identify(false)
	if err != nil || identity == "" {
		return nil, err
	}
	entries, err := os.ReadDir(l.cfg.Dir)
	if err != nil {
		return nil, unavailable(fmt.Errorf("list volumes: %w", err))
	}
	var vols []backends.Volume
	for _, entry := range entries {
		if !isUUID(entry.Name()) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("list volumes: %w", err)
		}
		vol, m, err := l.read(l.volume(identity, entry.Name()))
		switch {
		case errors.Is(err, backends.ErrNotFound):
			// Deleted in the meantime.
		case err != nil:
			return nil, fmt.Errorf("list volumes: %w", err)
		case l.cfg.Cluster == "" || m.Cluster == l.cfg.Cluster:
			vols = append(vols, vol)
		}
	}
	return vols, nil
}

// unavailable makes err an ErrUnavailable; its text says all.
func unavailable(err error) error { return backends.Classify(backends.ErrUnavailable, err) }

// explain gives an error of the filesystem its class, and where it is full says
// so.
func (l *Loopback) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		free := ""
		var st unix.Statfs_t
		if unix.Statfs(l.cfg.Dir, &st) == nil {
			free = fmt.Sprintf("; %s are free", backends.Size(int64(st.Bavail)*st.Bsize/int64(unit)*int64(unit)))
		}
		return unavailable(fmt.Errorf("no space left in loopback directory %s%s: %w", l.cfg.Dir, free, err))
	case errors.Is(err, unix.EFBIG):
		return backends.Classify(backends.ErrInvalid, fmt.Errorf("the filesystem of loopback directory %s allows no file as large: %w", l.cfg.Dir, err))
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, backends.ErrUnavailable), errors.Is(err, backends.ErrInUse):
		return err
	}
	return unavailable(err)
}

// missing is the error for a data file that could not be opened.
func (l *Loopback) missing(v volume, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s: %w", v.id, backends.ErrNotFound)
	}
	return l.explain(err)
}

// lock takes the lock on a data file, and makes sure that it is still the file
// with that path. It is errRaced if somebody else has it.
func lock(f *os.File, path string) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return errRaced
		case err != nil:
			return unavailable(fmt.Errorf("the filesystem of %s cannot lock files; mount it with locking: %w", path, err))
		case !sameFile(f, path):
			return errRaced
		default:
			return nil
		}
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// writeFile writes a whole small file durably.
func writeFile(path string, text []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return f.Sync()
}

func roundUp(size int64) int64 { return (size + unit - 1) / unit * unit }

// settle is how long a lock or a device is given to become free that is held by
// a call about to end, or by somebody who merely looks at it.
const settle = 300 * time.Millisecond

// look is how long a device may be open that is not mounted: whoever looks at all devices
// of a host, as udev and mkfs.btrfs do, may have to wait for a processor meanwhile.
const look = 3 * time.Second

// backoff waits a little longer each time, with jitter.
type backoff struct {
	start time.Time
	next  time.Duration
}

func newBackoff() *backoff { return &backoff{start: time.Now(), next: time.Millisecond} }

func (b *backoff) elapsed() time.Duration { return time.Since(b.start) }

func (b *backoff) wait(ctx context.Context) error {
	timer := time.NewTimer(b.next/2 + rand.N(b.next))
	defer timer.Stop()
	b.next = min(2*b.next, 50*time.Millisecond)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
