package csi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
)

// disk is a block device as the kernel knows it. The kernel gives device numbers to the
// next disk, so one that was looked at before is the same only if its sequence number
// is, which is never given twice until the next boot.
type disk struct {
	Major    uint32 `json:"major"`
	Minor    uint32 `json:"minor"`
	Sequence uint64 `json:"sequence"`
}

func (d disk) sys() string { return fmt.Sprintf("/sys/dev/block/%d:%d", d.Major, d.Minor) }

// errNoDevice: there is nothing at a target path.
var errNoDevice = errors.New("no device")

// diskAt returns the disk whose device node is at a path, also through a link.
func diskAt(path string) (disk, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return disk{}, errNoDevice
	case err != nil:
		return disk{}, &os.PathError{Op: "stat", Path: path, Err: err}
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return disk{}, sentence(backends.ErrInvalid, "the CSI driver has put a directory at %s instead of a block device; "+
			"it has filesystems only, which cannot be used yet", path)
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0:
		return disk{}, errNoDevice // where a bind mount was, or is about to be
	case st.Mode&unix.S_IFMT != unix.S_IFBLK:
		return disk{}, sentence(backends.ErrInvalid, "the CSI driver has put something else than a block device at %s", path)
	}
	d := disk{Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}
	d.Sequence, err = d.sequence()
	return d, err
}

// sequence asks the kernel for the sequence number of the disk that has this device
// number now. errNoDevice if none has.
func (d disk) sequence() (uint64, error) {
	text, err := os.ReadFile(d.sys() + "/diskseq")
	if errors.Is(err, fs.ErrNotExist) {
		if text, err = os.ReadFile(d.sys() + "/../diskseq"); errors.Is(err, fs.ErrNotExist) { // a partition
			if _, err := os.Stat(d.sys()); err != nil {
				return 0, errNoDevice
			}
			return 0, sentence(backends.ErrUnavailable, "the kernel has no sequence numbers of disks; Linux 5.15 is needed")
		}
	}
	if errors.Is(err, unix.ENODEV) {
		return 0, errNoDevice
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

// there says that the kernel still has this very disk.
func (d disk) there() bool {
	now, err := d.sequence()
	return err == nil && now == d.Sequence
}

// replaced says that the kernel has given the number to another disk, which it does only
// when nobody has this one open or mounted any more.
func (d disk) replaced() bool {
	now, err := d.sequence()
	return err == nil && now != d.Sequence
}

// size is in bytes; 0 for a disk that has lost its medium, or is gone.
func (d disk) size() int64 {
	text, err := os.ReadFile(d.sys() + "/size")
	if err != nil {
		return 0
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0
	}
	return sectors * 512
}

func (d disk) readOnly() bool {
	text, err := os.ReadFile(d.sys() + "/ro")
	return err == nil && strings.TrimSpace(string(text)) != "0"
}

// path is the kernel's own name of the device below /dev, which outlives what the
// driver has put anywhere.
func (d disk) path() (string, error) {
	text, err := os.ReadFile(d.sys() + "/uevent")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME=")
		if !ok {
			continue
		}
		path := filepath.Join("/dev", name)
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if errors.Is(err, unix.ENOENT) { // the /dev of a container does not follow the kernel
			if err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(d.Major, d.Minor))); err == nil || errors.Is(err, unix.EEXIST) {
				err = unix.Stat(path, &st)
			}
		}
		switch {
		case err != nil:
			return "", &os.PathError{Op: "stat", Path: path, Err: err}
		case unix.Major(st.Rdev) != d.Major || unix.Minor(st.Rdev) != d.Minor:
			return "", fmt.Errorf("%s is another device than the kernel's %d:%d", path, d.Major, d.Minor)
		}
		return path, nil
	}
	return "", fmt.Errorf("the kernel has no name for the device %d:%d", d.Major, d.Minor)
}

// openBound is how long a look at a device may take that does not answer.
const openBound = 10 * time.Second

// settle is how long a device may be open to somebody who merely looks at it, as udev
// does.
const settle = 300 * time.Millisecond

// closed is an error, backends.ErrInUse, while somebody has the disk open or mounted. It
// drops what the disk's buffers still hold.
func (d disk) closed(ctx context.Context) error {
	path, err := d.path()
	if err != nil {
		if !d.there() {
			return nil
		}
		return sentence(backends.ErrUnavailable, "%w", err)
	}
	for started, pause := time.Now(), newPause(); !d.replaced(); {
		err := bounded(ctx, path, func() error { return d.probe(path) })
		if errors.Is(err, backends.ErrInUse) && d.replaced() {
			break // it is the next one that is in use
		}
		if !errors.Is(err, backends.ErrInUse) || time.Since(started) > settle {
			return err
		}
		if ended := pause.wait(ctx); ended != nil {
			return errors.Join(err, ended)
		}
	}
	return nil
}

// bounded waits for a look at a device, but not for ever: nothing ends an open that a
// dead device keeps waiting.
func bounded(ctx context.Context, path string, look func() error) error {
	answer := make(chan error, 1)
	go func() { answer <- look() }()
	ctx, cancel := context.WithTimeout(ctx, openBound)
	defer cancel()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return sentence(backends.ErrUnavailable, "%s does not answer: %w", path, ctx.Err())
	}
}

func (d disk) probe(path string) error {
	// Exclusively: fails while it is mounted, in whatever mount namespace.
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s is open or mounted: %w", path, backends.ErrInUse)
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOMEDIUM), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EIO):
		return nil // nobody can open it
	case err != nil:
		return sentence(backends.ErrUnavailable, "%w", err)
	}
	// Whoever mounted it has seen to what must not be lost; these are buffers of those
	// who wrote to the device itself. One that was cut off takes nothing.
	_ = f.Sync()
	_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	if err := f.Close(); err != nil {
		return sentence(backends.ErrUnavailable, "%w", err)
	}
	if d.opened() {
		return fmt.Errorf("%s is open: %w", path, backends.ErrInUse)
	}
	return nil
}

// opened says whether a process that can be seen from here has the disk open, which an
// exclusive open does not notice if that one is not exclusive.
func (d disk) opened() bool {
	rdev := unix.Mkdev(d.Major, d.Minor)
	for _, process := range processes() {
		if process[0] < '0' || process[0] > '9' {
			continue
		}
		dir := "/proc/" + process + "/fd"
		for _, fd := range names(dir) {
			// Only what may be one is looked at: files of a server that is gone make a look
			// wait for ever.
			link, err := os.Readlink(dir + "/" + fd)
			if err != nil || link == os.DevNull || (!strings.HasPrefix(link, "/dev/") && filepath.Base(link) != "device") {
				continue
			}
			var st unix.Stat_t
			if unix.Stat(dir+"/"+fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == rdev {
				return true
			}
		}
	}
	return false
}

// processes returns what may be processes below /proc.
var processes = func() []string { return names("/proc") }

// names lists a directory that may be gone.
func names(dir string) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	all, err := f.Readdirnames(-1)
	if err != nil {
		return nil
	}
	return all
}

// mounted says whether the disk, which may be gone, is mounted in this mount namespace.
func (d disk) mounted() bool {
	if d.replaced() {
		return false
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return false
	}
	number := fmt.Sprintf("%d:%d", d.Major, d.Minor)
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == number {
			return true
		}
	}
	return false
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}
