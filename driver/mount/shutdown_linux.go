package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	fsShutdown = 0x8004587d // EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h: _IOR('X', 125, __u32)
	// noLogFlush: what is in memory stays there. The other ways write it first, to a
	// device that may be another node's by now, or wait for one that is gone.
	noLogFlush = 2
)

// Shutdown stops a filesystem. See Mounter.
func (s *System) Shutdown(ctx context.Context, target string) error {
	if err := s.shutdown(ctx, target); err != nil {
		return fmt.Errorf("shut down the filesystem on %s: %w", target, err)
	}
	return nil
}

func (s *System) shutdown(ctx context.Context, target string) error {
	info, err := mountOf(target)
	if info == nil || err != nil {
		return err
	}
	// The call stops a whole filesystem, so it must not be the host's own.
	if CheckFS(info.FSType) != nil || info.Root != "/" {
		return fmt.Errorf("%w: the directory %s of %s (%s) is mounted there, not a volume", ErrIdentity, info.Root, info.Source, info.FSType)
	}
	if err = s.at("shutdown"); err != nil {
		return err
	}
	root, err := os.OpenFile(info.Mountpoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EIO) { // an XFS that was shut down
		s.setCut(mountedDevice(info), true)
		return nil
	}
	if err != nil {
		return err
	}
	if err = isVolume(root, info); err != nil {
		root.Close()
		return err
	}
	// It takes effect at once and aborts the journal, which may wait for a device that
	// does not answer.
	rdev := mountedDevice(info)
	s.setCut(rdev, true)
	err = bounded(ctx, func() error {
		defer root.Close()
		how := uint32(noLogFlush)
		if err := ioctl(root, fsShutdown, unsafe.Pointer(&how)); err != nil {
			return err
		}
		drain(rdev)
		return nil
	})
	switch {
	case err == nil, errors.Is(err, context.Cause(ctx)):
		return err
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("%w: %s cannot be shut down: %w", ErrUnsupported, info.FSType, err)
	}
	s.setCut(rdev, false)
	return err
}

// drain writes what an ext4 that was shut down has committed to its journal and not
// yet put in its place. The kernel would write it within the next half minute, when
// the device may be another node's. What the device does not take is given up.
func drain(rdev uint64) {
	name, err := deviceName(rdev)
	if err != nil {
		return
	}
	dev, err := openDevice("/dev/"+name, os.O_RDONLY)
	if err != nil {
		return
	}
	defer dev.Close()
	if dev.rdev == rdev {
		_ = dev.Sync()
	}
}

// bounded runs f, and leaves it behind if it does not end before ctx: a system call
// that waits for a device cannot be ended.
func bounded(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the kernel does not answer: %w", context.Cause(ctx))
	}
}

// mountOf returns what is mounted on target, nil if nothing is.
func mountOf(target string) (*mountinfo.Info, error) {
	target, err := realTarget(target)
	if isNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return topMount(target)
}

// isVolume says whether root is that mount, and of another filesystem than the
// directory it is in.
func isVolume(root *os.File, info *mountinfo.Info) error {
	const what = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	var st, parent unix.Statx_t
	if err := unix.Statx(int(root.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, what, &st); err != nil {
		return fmt.Errorf("stat root: %w", err)
	}
	dir := filepath.Dir(info.Mountpoint)
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC, what, &parent); err != nil {
		return fmt.Errorf("stat %s: %w", dir, err)
	}
	sameMount := st.Mnt_id == uint64(info.ID)
	if st.Mask&unix.STATX_MNT_ID == 0 { // before Linux 5.8; btrfs shows another number in the table
		sameMount = info.FSType == btrfs || int(st.Dev_major) == info.Major && int(st.Dev_minor) == info.Minor
	}
	if !sameMount || st.Dev_major == parent.Dev_major && st.Dev_minor == parent.Dev_minor {
		return fmt.Errorf("%w: %s is not the root of %s alone", ErrIdentity, info.Mountpoint, info.Source)
	}
	return nil
}

// setCut remembers that the filesystem of a device was shut down, or forgets it.
func (s *System) setCut(rdev uint64, cut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !cut:
		delete(s.cut, rdev)
	case s.cut == nil:
		s.cut = map[uint64]bool{rdev: true}
	default:
		s.cut[rdev] = true
	}
}

func (s *System) hasCut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.cut) > 0
}

func (s *System) isCut(rdev uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut[rdev]
}

// Health says what the kernel noted about a filesystem. See Mounter.
func (s *System) Health(target string) error {
	info, err := mountOf(target)
	if err != nil {
		return fmt.Errorf("health of %s: %w", target, err)
	}
	if info == nil {
		return nil
	}
	var bad []string
	if noted := errorsNoted(info); noted != "" {
		bad = append(bad, noted)
	}
	if s.isShutDown(info) {
		bad = append(bad, "it was shut down")
	} else if opts := strings.Split(info.VFSOptions, ","); slices.Contains(opts, "ro") || slices.Contains(opts, "emergency_ro") {
		bad = append(bad, "it has become read-only")
	}
	if len(bad) == 0 {
		return nil
	}
	return fmt.Errorf("%s on %s: %w: %s", info.FSType, info.Source, ErrDamaged, strings.Join(bad, "; "))
}

// isShutDown asks the kernel where it tells: ext4 does so since Linux 6.15, of an XFS
// that was shut down nothing can be asked.
func (s *System) isShutDown(info *mountinfo.Info) bool {
	if s.isCut(mountedDevice(info)) || slices.Contains(strings.Split(info.VFSOptions, ","), "shutdown") {
		return true
	}
	var st unix.Stat_t
	return info.FSType == xfs && errors.Is(unix.Lstat(info.Mountpoint, &st), unix.EIO)
}

// errorsNoted returns what the superblock of a mounted ext4 has about errors, "" for
// none.
func errorsNoted(info *mountinfo.Info) string {
	if info.FSType != ext4 {
		return ""
	}
	dir := ext4Info(unix.Mkdev(uint32(info.Major), uint32(info.Minor)))
	read := func(name string) string {
		b, _ := os.ReadFile(filepath.Join(dir, name))
		return strings.TrimSpace(string(b))
	}
	count := read("errors_count")
	if count == "" || count == "0" {
		return ""
	}
	noted := count + " errors"
	if count == "1" {
		noted = "1 error"
	}
	var seconds int64
	if _, err := fmt.Sscan(read("last_error_time"), &seconds); err == nil && seconds > 0 {
		noted += ", the last at " + time.Unix(seconds, 0).UTC().Format(time.RFC3339)
	}
	if where := read("last_error_func"); where != "" {
		noted += " in " + where
	}
	return noted + "; the kernel's log has more"
}

// ext4Info returns the directory with what the kernel says about a mounted ext4, ""
// if it cannot be found.
func ext4Info(rdev uint64) string {
	name, err := deviceName(rdev)
	if err != nil {
		return ""
	}
	return filepath.Join("/sys/fs/ext4", name)
}
