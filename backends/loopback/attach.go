package loopback

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
)

// tag is an attachment's identity. The kernel keeps it as the loop device's file
// name (lo_file_name, 63 bytes), which it sets in the same system call as the
// file: there is no attachment without a tag. A node is there as a hash, since
// several hosts may run on one kernel, as containers do.
type tag struct {
	node   string // nodeHash
	token  int64
	volume string
}

func nodeHash(node string) string {
	sum := sha256.Sum256([]byte(node))
	return hex.EncodeToString(sum[:6])
}

func (t tag) String() string {
	return "fl/" + t.node + "/" + strconv.FormatInt(t.token, 36) + "/" + strings.ReplaceAll(t.volume, "-", "")
}

func parseTag(s string) (t tag, ok bool) {
	parts := strings.Split(s, "/")
	if len(parts) != 4 || parts[0] != "fl" {
		return tag{}, false
	}
	token, err := strconv.ParseInt(parts[2], 36, 64)
	id, err2 := uuid.Parse(parts[3])
	t = tag{node: parts[1], token: token, volume: id.String()}
	return t, err == nil && err2 == nil && t.String() == s
}

// device is a loop device that has one of our volumes.
type device struct {
	number   int
	path     string
	identity string // of the volume's directory
	tag      tag
	info     *unix.LoopInfo64
}

// has says whether f is the file behind the device.
func (d device) has(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && d.info.Device == st.Dev && d.info.Inode == st.Ino
}

func (l *Loopback) attachment(d device) backends.Attachment {
	return backends.Attachment{
		ID:     d.tag.String(),
		Ref:    d.identity + "/" + d.tag.volume,
		Volume: d.tag.volume,
		Node:   l.cfg.Node,
		Token:  d.tag.token,
		Device: d.path,
	}
}

// devices asks the kernel which loop devices have the volume, or any volume if
// id is empty, whoever attached it. Devices whose file has another name are not
// touched.
func devices(ctx context.Context, id string) ([]device, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, unavailable(fmt.Errorf("find loop devices: %w", err))
	}
	var found []device
	for _, entry := range entries {
		text, isLoop := strings.CutPrefix(entry.Name(), "loop")
		number, err := strconv.Atoi(text)
		if !isLoop || err != nil {
			continue
		}
		path, err := backing(number)
		if err != nil {
			return nil, unavailable(fmt.Errorf("find loop devices: %w", err))
		}
		if !uuids.MatchString(path) || !strings.Contains(path, id) {
			continue
		}
		d, ok, err := settled(ctx, number, path)
		if err != nil {
			return nil, unavailable(fmt.Errorf("find loop devices: %w", err))
		}
		if ok && (id == "" || d.tag.volume == id) {
			found = append(found, d)
		}
	}
	return found, nil
}

var uuids = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// backing returns the path of a loop device's file as the kernel sees it, which
// follows renames; empty if the device has none.
func backing(number int) (path string, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", number))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	return strings.TrimSuffix(string(text), "\n"), err
}

// settled is probe for a device that may just be losing its file: the kernel
// does not let it be opened then, but has not let go of the file either.
func settled(ctx context.Context, number int, path string) (device, bool, error) {
	for pause := newBackoff(); ; {
		d, ok, err := probe(number, path)
		if !errors.Is(err, unix.ENXIO) || pause.elapsed() > settle {
			return d, ok, err
		}
		if err := pause.wait(ctx); err != nil {
			return device{}, false, err
		}
		if path, err = backing(number); err != nil || path == "" {
			return device{}, false, err
		}
	}
}

// probe asks the kernel about one loop device; ok says that it has a volume. path
// is its file's.
func probe(number int, path string) (d device, ok bool, err error) {
	f, err := openLoop(number, os.O_RDONLY)
	if err != nil {
		return device{}, false, err
	}
	defer f.Close()
	d = device{number: number, path: f.Name(), identity: uuids.FindString(filepath.Base(path))}
	d.tag, d.info, err = status(f)
	if errors.Is(err, unix.ENXIO) {
		return device{}, false, nil // detached since
	}
	return d, d.tag != tag{}, err
}

// status returns a loop device's tag, which is zero if it is not ours. ENXIO: it
// has no file.
func status(f *os.File) (tag, *unix.LoopInfo64, error) {
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return tag{}, nil, &os.PathError{Op: "ask", Path: f.Name(), Err: err}
	}
	t, ok := parseTag(unix.ByteSliceToString(info.File_name[:]))
	if !ok {
		t = tag{}
	}
	return t, info, nil
}

// openLoop opens /dev/loop<number>, which it makes where nothing else does: the
// /dev of a container does not follow the kernel.
func openLoop(number, flags int) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", number)
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		text, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/dev", number))
		if err != nil {
			return nil, err
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
			return nil, fmt.Errorf("read number of %s: %w", path, err)
		}
		err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, &os.PathError{Op: "mknod", Path: path, Err: err}
		}
		return os.OpenFile(path, flags, 0)
	}
	return f, err
}

// Attach implements backends.Backend.
func (l *Loopback) Attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	att, err := l.attach(ctx, req)
	if err != nil {
		return backends.Attachment{}, fmt.Errorf("attach volume: %w", err)
	}
	return att, nil
}

func (l *Loopback) attach(ctx context.Context, req backends.AttachRequest) (backends.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return backends.Attachment{}, err
	}
	v, _, meta, err := l.find(req.Ref)
	if err != nil {
		return backends.Attachment{}, err
	}
	if v.id != req.Volume || req.Token < 0 {
		return backends.Attachment{}, fmt.Errorf("%s is not volume %s, or token %d is negative: %w", req.Ref, req.Volume, req.Token, backends.ErrInvalid)
	}
	f, err := os.OpenFile(v.data(), os.O_RDWR, 0)
	if err != nil {
		return backends.Attachment{}, l.missing(v, err)
	}
	// The loop device has the file open by then, and with it the lock.
	defer f.Close()
	want := tag{node: nodeHash(l.cfg.Node), token: req.Token, volume: v.id}

	for pause := newBackoff(); ; {
		err := lock(f, v.data())
		if err == nil {
			break
		}
		if !errors.Is(err, errRaced) {
			return backends.Attachment{}, err
		}
		if !sameFile(f, v.data()) {
			return backends.Attachment{}, fmt.Errorf("volume %s: %w", v.id, backends.ErrNotFound)
		}
		err = l.attached(ctx, v, f)
		other, _ := errors.AsType[*attachedHere](err)
		switch {
		case other == nil && err != nil && !errors.Is(err, backends.ErrInUse):
			return backends.Attachment{}, err
		case other != nil && other.device.tag == want:
			if d, err := keep(other.device); err == nil {
				return l.attachment(d), nil
			}
			// It went away in between.
		case other != nil:
			return backends.Attachment{}, err
		case pause.elapsed() > settle:
			return backends.Attachment{}, err
		}
		if err := pause.wait(ctx); err != nil {
			return backends.Attachment{}, err
		}
	}
	d, err := l.configure(ctx, f, want, meta.Block)
	if err != nil {
		return backends.Attachment{}, err
	}
	d.identity = v.identity
	return l.attachment(d), nil
}

// attachedHere is an AttachedError about a device of this kernel.
type attachedHere struct {
	*backends.AttachedError
	device device
}

func (e *attachedHere) Unwrap() error { return e.AttachedError }

// attached says who has a volume attached whose lock is taken: a
// *backends.AttachedError, unless the kernel could not be asked.
func (l *Loopback) attached(ctx context.Context, v volume, f *os.File) error {
	found, err := devices(ctx, v.id)
	if err != nil {
		return err
	}
	for _, d := range found {
		if !d.has(f) {
			continue
		}
		e := &backends.AttachedError{Volume: v.id, Token: d.tag.token}
		if d.tag.node == nodeHash(l.cfg.Node) {
			e.Node = l.cfg.Node
		}
		return &attachedHere{e, d}
	}
	return &backends.AttachedError{Volume: v.id}
}

// keep takes back a detach of the device that waits for its last user, such as a
// Detach that died has left.
func keep(d device) (device, error) {
	if d.info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
		return d, nil
	}
	f, err := openLoop(d.number, os.O_RDWR)
	if err != nil {
		return d, err
	}
	defer f.Close()
	t, info, err := status(f)
	if err != nil {
		return d, err
	}
	if t != d.tag {
		return d, unix.ENXIO
	}
	return d, unclear(f, info)
}

// unclear takes back LOOP_CLR_FD while somebody, such as we, has the device open.
func unclear(f *os.File, info *unix.LoopInfo64) error {
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	return os.NewSyscallError("LOOP_SET_STATUS64", unix.IoctlLoopSetStatus64(int(f.Fd()), info))
}

// attempts bounds how often configure tries another device: other programs take
// free ones as well.
const attempts = 50

// configure gives a free loop device the file f, whose lock the caller has.
func (l *Loopback) configure(ctx context.Context, f *os.File, t tag, block int) (device, error) {
	config := unix.LoopConfig{
		Fd:   uint32(f.Fd()),
		Size: uint32(max(block, 512)),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO},
	}
	copy(config.Info.File_name[:], t.String())
	control, err := os.OpenFile(l.control, os.O_RDWR, 0)
	if err != nil {
		return device{}, unavailable(fmt.Errorf("this host has no usable loop devices; "+
			"load the loop module (modprobe loop) and let this process use /dev/loop*: %w", err))
	}
	defer control.Close()
	for try, pause := 0, newBackoff(); ; try++ {
		d, err := l.tryFree(control, f, &config, t)
		if err == nil {
			return d, nil
		}
		if !taken(err) || try >= attempts {
			return device{}, unavailable(fmt.Errorf("set up a loop device: %w", err))
		}
		if err := pause.wait(ctx); err != nil {
			return device{}, err
		}
	}
}

// taken says that another program has taken the device, or removed it.
func taken(err error) bool {
	return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT)
}

func (l *Loopback) tryFree(control, f *os.File, config *unix.LoopConfig, t tag) (d device, err error) {
	number, err := l.claim(control)
	if err != nil {
		return device{}, err
	}
	defer l.disclaim(number)
	dev, err := openLoop(number, os.O_RDWR)
	if err != nil {
		return device{}, err
	}
	defer dev.Close()
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), config); err != nil {
		return device{}, &os.PathError{Op: "LOOP_CONFIGURE", Path: dev.Name(), Err: err}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.NewSyscallError("LOOP_CLR_FD", unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)))
		}
	}()
	d = device{number: number, path: dev.Name()}
	if d.tag, d.info, err = status(dev); err != nil {
		return device{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return device{}, err
	}
	size, err := dev.Seek(0, io.SeekEnd)
	if err != nil {
		return device{}, err
	}
	if d.tag != t || !d.has(f) || size != info.Size() {
		return device{}, fmt.Errorf("%s has %d bytes of %q, not %d of %q", dev.Name(), size, d.tag, info.Size(), t)
	}
	// "Read-only" outlives the file in a loop device; a former user may have left
	// it.
	if err := unix.IoctlSetPointerInt(int(dev.Fd()), unix.BLKROSET, 0); err != nil {
		return device{}, os.NewSyscallError("BLKROSET", err)
	}
	return d, nil
}

// claim returns the number of a loop device that is free, and that no other call
// of this process is about to take.
func (l *Loopback) claim(control *os.File) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return 0, os.NewSyscallError("LOOP_CTL_GET_FREE", err)
	}
	for ; ; number++ {
		if l.claimed[number] {
			continue
		}
		if err := unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_ADD, number); err != nil && !errors.Is(err, unix.EEXIST) {
			return 0, os.NewSyscallError("LOOP_CTL_ADD", err)
		}
		path, err := backing(number)
		if err != nil {
			return 0, err
		}
		if path == "" {
			l.claimed[number] = true
			return number, nil
		}
	}
}

func (l *Loopback) disclaim(number int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.claimed, number)
}

// Detach implements backends.Backend.
func (l *Loopback) Detach(ctx context.Context, att backends.Attachment) error {
	if err := l.detach(ctx, att); err != nil {
		return fmt.Errorf("detach volume %s: %w", att.Volume, err)
	}
	return nil
}

func (l *Loopback) detach(ctx context.Context, att backends.Attachment) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	identity, id, ok := splitRef(att.Ref)
	switch {
	case !ok || id != att.Volume:
		return fmt.Errorf("%q is not its reference: %w", att.Ref, backends.ErrInvalid)
	case att.Node != l.cfg.Node:
		return fmt.Errorf("loop devices of %s can only be detached there: %w", att.Node, backends.ErrInvalid)
	}
	want := tag{node: nodeHash(att.Node), token: att.Token, volume: id}
	for pause := newBackoff(); ; {
		d, ok, err := locate(ctx, want, att.Device)
		if err != nil || !ok {
			return err
		}
		err = l.clear(ctx, d, l.volume(identity, id))
		patience := settle
		switch {
		case errors.Is(err, errOpen):
			patience = look
		case !errors.Is(err, errRaced):
			return err
		}
		if pause.elapsed() > patience {
			return fmt.Errorf("%s is open or mounted: %w", d.path, backends.ErrInUse)
		}
		if err := pause.wait(ctx); err != nil {
			return err
		}
	}
}

// locate finds the device with a tag, looking first where it was.
func locate(ctx context.Context, want tag, hint string) (device, bool, error) {
	if text, ok := strings.CutPrefix(hint, "/dev/loop"); ok {
		if number, err := strconv.Atoi(text); err == nil {
			path, errPath := backing(number)
			d, ok, err := probe(number, path)
			if errPath == nil && err == nil && ok && d.tag == want {
				return d, true, nil
			}
		}
	}
	found, err := devices(ctx, want.volume)
	if err != nil {
		return device{}, false, err
	}
	for _, d := range found {
		if d.tag == want {
			return d, true, nil
		}
	}
	return device{}, false, nil
}

// errOpen: somebody has the device open, not exclusively as who mounts it.
var errOpen = errors.New("the device is open")

// clear takes the file from a loop device and sees it gone. It is errRaced while
// somebody has the device mounted, or errOpen, and the device keeps its file.
func (l *Loopback) clear(ctx context.Context, d device, v volume) (err error) {
	// The file, to see that it is the device's and, in the end, its lock free. It
	// may have been removed; the tag says whose the device is.
	file, err := os.OpenFile(v.data(), os.O_RDWR, 0)
	if err == nil {
		defer file.Close()
		if !d.has(file) {
			return unavailable(fmt.Errorf("%s is not attached to %s; somebody has replaced the file", v.data(), d.path))
		}
	}
	// Exclusively: fails while it is mounted, in whatever mount namespace, and
	// keeps others from mounting it now.
	dev, err := openLoop(d.number, os.O_RDWR|unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) {
		return errRaced
	}
	if err != nil {
		return unavailable(err)
	}
	if err := errors.Join(release(dev, d.tag), dev.Close()); err != nil {
		return err
	}
	return l.gone(ctx, d, v, file)
}

// release asks the kernel to let go of the file when dev is closed, if nobody
// else has the device open.
func release(dev *os.File, t tag) error {
	is, info, err := status(dev)
	if err != nil || is != t {
		return errRaced // changed since it was found
	}
	if err := dev.Sync(); err != nil {
		return unavailable(err)
	}
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return unavailable(os.NewSyscallError("BLKFLSBUF", err))
	}
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		return unavailable(os.NewSyscallError("LOOP_CLR_FD", err))
	}
	// With another opener the kernel only takes a note to do it after the last
	// one has gone, whenever that is. Take it back: a volume that is in use stays
	// attached.
	switch _, _, err = status(dev); {
	case errors.Is(err, unix.ENXIO):
		return nil
	case err != nil:
		return unavailable(err)
	}
	if err := unclear(dev, info); err != nil {
		return unavailable(fmt.Errorf("%s is open, and the kernel will detach it when it is closed: %w", dev.Name(), err))
	}
	return errOpen
}

// gone waits until the device has no file and the file no lock. Its bound is far
// above what the kernel takes.
func (l *Loopback) gone(ctx context.Context, d device, v volume, file *os.File) error {
	for pause := newBackoff(); ; {
		path, err := backing(d.number)
		if err == nil && path == "" {
			break
		}
		now, ok, err := probe(d.number, path)
		if err == nil && (!ok || now.tag != d.tag) {
			break // the next volume has the device already
		}
		if pause.elapsed() > 5*time.Second {
			return fmt.Errorf("the kernel does not let go of %s: %w", d.path, errors.Join(backends.ErrInUse, err))
		}
		if err := pause.wait(ctx); err != nil {
			return err
		}
	}
	if file != nil {
		unlocked(ctx, v, file)
	}
	return nil
}

// unlocked waits until a file that is attached no more has no lock, which the
// next node's Attach should not find taken. A lock that stays is somebody else's
// by now.
func unlocked(ctx context.Context, v volume, file *os.File) {
	for pause := newBackoff(); pause.elapsed() < settle; {
		if !errors.Is(lock(file, v.data()), errRaced) {
			return
		}
		found, err := devices(ctx, v.id)
		if err != nil || len(found) > 0 || pause.wait(ctx) != nil {
			return
		}
	}
}

// Attachments implements backends.Backend. Those made from another directory are
// left out while this one can be told apart from it.
func (l *Loopback) Attachments(ctx context.Context) ([]backends.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	found, err := devices(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	identity, err := l.identify(false)
	if err != nil {
		identity = "" // the kernel's word is enough
	}
	var atts []backends.Attachment
	for _, d := range found {
		if d.identity == "" {
			d.identity = identity // somebody has renamed the file
		}
		if d.tag.node == nodeHash(l.cfg.Node) && (identity == "" || d.identity == identity) {
			atts = append(atts, l.attachment(d))
		}
	}
	return atts, nil
}

// Resize implements backends.Resizer. A device on another host sees the new size
// after its next attach.
func (l *Loopback) Resize(ctx context.Context, ref string, size int64) (int64, error) {
	now, err := l.resize(ctx, ref, size)
	if err != nil {
		return 0, fmt.Errorf("resize volume: %w", err)
	}
	return now, nil
}

func (l *Loopback) resize(ctx context.Context, ref string, size int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	v, vol, meta, err := l.find(ref)
	if err != nil {
		return 0, err
	}
	if size > (1<<62) || size < 0 {
		return 0, fmt.Errorf("no volume can have %d bytes: %w", size, backends.ErrInvalid)
	}
	f, err := os.OpenFile(v.data(), os.O_RDWR, 0)
	if err != nil {
		return 0, l.missing(v, err)
	}
	defer f.Close()
	if size = roundUp(size); size > vol.Size {
		if err = grow(ctx, f, vol.Size, size, meta.Preallocate); err == nil {
			err = f.Sync()
		}
		if err != nil {
			return 0, l.explain(err)
		}
	}
	size = max(size, vol.Size)
	found, err := devices(ctx, v.id)
	if err != nil {
		return 0, err
	}
	for _, d := range found {
		if !d.has(f) {
			continue
		}
		if err := capacity(d); err != nil {
			return 0, unavailable(err)
		}
	}
	return size, nil
}

// capacity makes a device as large as its file.
func capacity(d device) error {
	dev, err := openLoop(d.number, os.O_RDWR)
	if err != nil {
		return err
	}
	defer dev.Close()
	if is, _, err := status(dev); err != nil || is != d.tag {
		return err
	}
	return os.NewSyscallError("LOOP_SET_CAPACITY", unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0))
}
