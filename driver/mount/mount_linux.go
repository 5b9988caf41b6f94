package mount

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount mounts a device. See Mounter.
//
// The filesystem is mounted nowhere at first, by fsopen(2) and fsmount(2), and
// comes to its target only when everything about it is right. Until then closing
// the file descriptor undoes it, also when this process is killed, and no container
// can see it half made.
func (s *System) Mount(ctx context.Context, spec Spec, owner Owner) (warnings []string, err error) {
	warnings, err = s.mount(ctx, spec, owner)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", spec.Device, err)
	}
	return warnings, nil
}

func (s *System) mount(ctx context.Context, spec Spec, owner Owner) (warnings []string, err error) {
	id, err := uuid.Parse(spec.UUID)
	if err != nil {
		return nil, fmt.Errorf("%w UUID %q: %w", ErrInvalid, spec.UUID, err)
	}
	opts, err := parseOptions(spec.FS, spec.Options)
	if err != nil {
		return nil, err
	}
	// The device stays open for all of it: the last close of a block device drops
	// what has been read of it.
	dev, err := openDevice(spec.Device, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	sb, err := identify(dev, spec.FS, id)
	if err != nil {
		return nil, err
	}
	target, err := realTarget(spec.Target)
	if err != nil {
		return nil, err
	}
	mounted, err := isMountRoot(target)
	if err != nil {
		return nil, err
	}
	if mounted {
		return nil, s.sameDevice(target, dev)
	}
	if sb, warnings, err = s.repair(ctx, spec, dev, sb, id); err != nil {
		return nil, err
	}
	if err = context.Cause(ctx); err != nil {
		return nil, err
	}
	dir, protectWarnings, err := protect(target)
	if err != nil {
		return nil, err
	}
	warnings = append(warnings, protectWarnings...)
	defer dir.Close()
	more, err := s.mountOn(ctx, dir, target, spec, opts, dev, sb, owner)
	if err != nil {
		return nil, errors.Join(err, removeBare(target))
	}
	s.setCut(dev.rdev, false)
	return append(warnings, more...), nil
}

// identify reads the superblock and compares it.
func identify(dev *blockDevice, kind string, id uuid.UUID) (*superblock, error) {
	sb, err := dev.superblock(kind)
	switch {
	case err != nil:
		return nil, err
	case sb == nil:
		return nil, fmt.Errorf("%w: found none, expected %s with UUID %s", ErrIdentity, kind, id)
	case sb.fs != kind || sb.uuid != id:
		return nil, fmt.Errorf("%w: found %s, expected %s with UUID %s", ErrIdentity, sb, kind, id)
	case sb.unfinished:
		return nil, fmt.Errorf("%w: found %s whose mkfs has not ended", ErrIdentity, sb)
	}
	return sb, nil
}

// repair does what has to be done to a filesystem before it is mounted. Nothing is
// done to one that is mounted in another namespace.
func (s *System) repair(ctx context.Context, spec Spec, dev *blockDevice, sb *superblock, id uuid.UUID) (*superblock, []string, error) {
	if sb.fs != ext4 {
		return sb, nil, nil
	}
	room := sb.room(dev.size)
	grow := room > sb.size && !hasResource()
	if !sb.damaged && !grow {
		return sb, nil, nil
	}
	probe, err := openDevice(spec.Device, os.O_RDWR|unix.O_EXCL)
	if errors.Is(err, ErrBusy) {
		return sb, []string{fmt.Sprintf("%s is mounted elsewhere on this host: its check or growth has to wait", spec.Device)}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if err = probe.release(ctx); err != nil {
		return nil, nil, err
	}
	if err = s.at("check"); err != nil {
		return nil, nil, err
	}
	if sb.damaged {
		if err = dev.check(ctx, sb, false); err != nil {
			return nil, nil, err
		}
	}
	var warnings []string
	if grow {
		if err = s.growUnmounted(ctx, dev, sb); err != nil {
			if errors.Is(err, ErrDamaged) || errors.Is(err, ErrMultiMount) || context.Cause(ctx) != nil {
				return nil, nil, err
			}
			warnings = append(warnings, fmt.Sprintf("ext4 stays at %d bytes on a device of %d: %v", sb.size, dev.size, err))
		}
	}
	sb, err = identify(dev, spec.FS, id)
	return sb, warnings, err
}

// mountOn mounts dev on the directory dir, which is target.
func (s *System) mountOn(ctx context.Context, dir *os.File, target string, spec Spec, opts parsedOptions, dev *blockDevice, sb *superblock, owner Owner) (warnings []string, err error) {
	if err = s.at("mount"); err != nil {
		return nil, err
	}
	shared := isLive(sb, dev)
	detached, err := open(ctx, spec.FS, spec.Device, opts)
	if err != nil {
		return nil, dev.multiMount(ctx, sb, err)
	}
	defer detached.Close()
	rootFD, err := unix.Openat(int(detached.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EIO) && sb.fs == xfs {
		return nil, errStopped
	}
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	if shared && isStopped(rootFD) {
		unix.Close(rootFD)
		return nil, errStopped
	}
	root := os.NewFile(uintptr(rootFD), "root of "+spec.Device)
	defer root.Close()
	if err = isOn(root, sb, dev); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err = unix.Fstatfs(rootFD, &st); err != nil {
		return nil, fmt.Errorf("statfs: %w", err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return nil, errors.New("the kernel mounted it read-only: is the device read-only?")
	}
	if room := sb.room(dev.size); room > sb.size && (sb.fs != ext4 || hasResource()) {
		if err = growMounted(root, sb, room); err != nil {
			warnings = append(warnings, fmt.Sprintf("%s stays at %d bytes on a device of %d: grow: %v", sb.fs, sb.size, dev.size, err))
		}
	}
	if err = s.at("data directory"); err != nil {
		return nil, err
	}
	if err = makeData(root, owner); err != nil {
		return nil, fmt.Errorf("make %s directory: %w", DataDir, err)
	}
	if err = s.at("move"); err != nil {
		return nil, err
	}
	err = unix.MoveMount(int(detached.Fd()), "", int(dir.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("move mount to %s: %w", target, err)
	}
	err = s.at("moved")
	if err == nil {
		err = seenAt(target, root)
	}
	if err != nil {
		root.Close()
		detached.Close()
		undo := retryBusy(context.WithoutCancel(ctx), unmountLimit, func() error { return unmountOnce(target) })
		return nil, errors.Join(err, undo)
	}
	return warnings, nil
}

// errStopped is a filesystem that another mount namespace keeps in the state that a
// Shutdown or a failure left it in.
var errStopped = fmt.Errorf("%w: its filesystem was shut down on this host, or failed, and a process still has it open: "+
	"stop the containers that use it, then try again", ErrBusy)

// isLive says whether this host has an ext4 mounted already.
func isLive(sb *superblock, dev *blockDevice) bool {
	_, err := os.Stat(ext4Info(dev.rdev))
	return sb.fs == ext4 && err == nil
}

// isStopped says whether an ext4 takes no more changes, by one without a meaning.
func isStopped(root int) bool {
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}
	err := unix.UtimesNanoAt(root, ".", now, 0)
	return errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS)
}

// open makes a superblock and a mount that is nowhere yet.
func open(ctx context.Context, kind, device string, opts parsedOptions) (detached *os.File, err error) {
	fsfd, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENOSYS):
		return nil, fmt.Errorf("%w: the kernel has no fsopen, which came with Linux 5.2", ErrUnsupported)
	case errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("%w: the kernel has no %s (try modprobe %[2]s)", ErrUnsupported, kind)
	case err != nil:
		return nil, fmt.Errorf("fsopen %s: %w", kind, err)
	}
	defer unix.Close(fsfd)
	if err = unix.FsconfigSetString(fsfd, "source", device); err != nil {
		return nil, refused(fsfd, "set source", err)
	}
	for _, o := range opts.fs {
		if o.hasValue {
			err = unix.FsconfigSetString(fsfd, o.name, o.value)
		} else {
			err = unix.FsconfigSetFlag(fsfd, o.name)
		}
		if err != nil {
			return nil, refused(fsfd, "mount option "+o.name, err)
		}
	}
	err = interruptible(ctx, func() error { return unix.FsconfigCreate(fsfd) })
	if cause := context.Cause(ctx); cause != nil { // what comes too late goes with fsfd
		return nil, cmp.Or(err, cause)
	}
	if err != nil {
		return nil, refused(fsfd, "mount", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, int(opts.attrs))
	if err != nil {
		return nil, refused(fsfd, "fsmount", err)
	}
	return os.NewFile(uintptr(fd), "mount of "+device), nil
}

// refused is an error with what the kernel says about it.
func refused(fsfd int, what string, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG):
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		err = fmt.Errorf("the device is read-only: %w", err)
	}
	var said []string
	b := make([]byte, 1024)
	for range 16 {
		n, readErr := unix.Read(fsfd, b)
		if readErr != nil || n <= 0 {
			break
		}
		said = append(said, strings.TrimSpace(strings.TrimPrefix(string(b[:n]), "e ")))
	}
	if len(said) == 0 {
		return fmt.Errorf("%s: %w (the kernel's log may say more)", what, err)
	}
	return fmt.Errorf("%s: %w: %s", what, err, strings.Join(said, "; "))
}

// newData is the data directory until it has its owner: a crash in between must not
// leave one with the wrong owner that is then never changed.
const newData = "." + DataDir + ".new"

// makeData makes the data directory unless there is one.
func makeData(root *os.File, owner Owner) error {
	fd := int(root.Fd())
	var st unix.Stat_t
	err := unix.Fstatat(fd, DataDir, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	mode := uint32(owner.Mode)&0o7777 | special(owner.Mode)
	if mode == 0 {
		mode = 0o755
	}
	if err := unix.Mkdirat(fd, newData, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := unix.Fchownat(fd, newData, owner.UID, owner.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown %d:%d: %w", owner.UID, owner.GID, err)
	}
	if err := unix.Fchmodat(fd, newData, mode, 0); err != nil {
		return fmt.Errorf("chmod %o: %w", mode, err)
	}
	// No fsync: whoever syncs a file below it makes the directory durable too, and
	// before that the next Mount makes the same one again.
	return unix.Renameat(fd, newData, fd, DataDir)
}

// special translates the bits that Go keeps elsewhere than chmod(2) does.
func special(mode os.FileMode) (bits uint32) {
	for flag, bit := range map[os.FileMode]uint32{
		os.ModeSetuid: unix.S_ISUID, os.ModeSetgid: unix.S_ISGID, os.ModeSticky: unix.S_ISVTX,
	} {
		if mode&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

// seenAt says whether path leads to root now.
func seenAt(path string, root *os.File) error {
	var want, got unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &want); err != nil {
		return fmt.Errorf("stat root: %w", err)
	}
	if err := unix.Lstat(path, &got); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if got.Dev != want.Dev || got.Ino != want.Ino {
		return fmt.Errorf("%w: %s does not lead to what was mounted on it", ErrIdentity, path)
	}
	return nil
}

// realTarget resolves the directory a target is in, as the kernel's mount table
// shows it. The target itself is never followed.
func realTarget(target string) (string, error) {
	if !filepath.IsAbs(target) || filepath.Clean(target) == "/" {
		return "", fmt.Errorf("%w target %q: an absolute path of a directory is needed", ErrInvalid, target)
	}
	dir, name := filepath.Split(filepath.Clean(target))
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", fmt.Errorf("find the directory of target %s: %w", target, err)
	}
	return filepath.Join(dir, name), nil
}

// isMountRoot says whether something is mounted on target, in one system call.
func isMountRoot(target string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, 0, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	// Before Linux 5.8, or a root that cannot be asked any more.
	info, err := topMount(target)
	return info != nil, err
}

// topMount returns the uppermost mount on target, nil if there is none.
func topMount(target string) (*mountinfo.Info, error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != target, false })
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	if len(infos) == 0 {
		return nil, nil
	}
	return infos[len(infos)-1], nil
}

// Below implements Mounter.
func (*System) Below(root string) ([]Point, error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, root+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	points := make([]Point, len(infos))
	for i, m := range infos {
		points[i] = Point{m.Mountpoint, fmt.Sprintf("%d:%d", m.Major, m.Minor)}
	}
	return points, nil
}

// sameDevice is nil if dev's filesystem is what is mounted on target, and in use.
func (s *System) sameDevice(target string, dev *blockDevice) error {
	info, err := topMount(target)
	if err != nil {
		return err
	}
	if info == nil {
		return fmt.Errorf("%s is a mount that the mount table does not show", target)
	}
	if rdev := mountedDevice(info); rdev != dev.rdev || info.Root != "/" {
		return fmt.Errorf("%w: %s (%s, its directory %s) is mounted on %s already", ErrBusy, info.Source, info.FSType, info.Root, target)
	}
	if s.isShutDown(info) {
		return fmt.Errorf("%w: it is mounted on %s already, and was shut down or failed: stop the containers that use it, then try again", ErrBusy, target)
	}
	return nil
}

// mountedDevice returns the number of the device of a mount; 0 if it has none.
// btrfs shows a number of its own in the table, and its device in the source only.
func mountedDevice(info *mountinfo.Info) uint64 {
	if info.Major != 0 {
		return unix.Mkdev(uint32(info.Major), uint32(info.Minor))
	}
	rdev, err := deviceNumber(info.Source)
	if err != nil {
		return 0
	}
	return rdev
}

// deviceName returns what the kernel calls a device.
func deviceName(rdev uint64) (string, error) {
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	return filepath.Base(link), err
}

// Mounted looks target up in the mount table. See Mounter.
func (s *System) Mounted(target string) (device string, err error) {
	resolved, err := realTarget(target)
	if isNotExist(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	info, err := topMount(resolved)
	if info == nil || err != nil {
		return "", err
	}
	rdev := mountedDevice(info)
	if rdev == 0 {
		return info.Source, nil
	}
	// The name in the table is what somebody mounted it by, and may be another
	// device's by now.
	if named, statErr := deviceNumber(info.Source); statErr == nil && named == rdev {
		return info.Source, nil
	}
	name, err := deviceName(rdev)
	if err != nil {
		return info.Source, nil //nolint:nilerr // the device has gone from under the mount: its old name is all there is
	}
	return "/dev/" + name, nil
}

// Unmount unmounts target. See Mounter.
func (s *System) Unmount(ctx context.Context, target string) error {
	if err := s.unmount(ctx, target); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

func (s *System) unmount(ctx context.Context, target string) error {
	target, err := realTarget(target)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var lost error
	for range 64 { // stacked mounts; each turn takes one away
		mounted, err := isMountRoot(target)
		if err != nil {
			return err
		}
		if !mounted {
			// A directory that stays is untidy, and protected; a volume that could not
			// leave its host because of one would be worse.
			_ = removeBare(target)
			return lost
		}
		if err = s.at("sync"); err != nil {
			return err
		}
		syncErr := s.writeBack(target)
		err = retryBusy(ctx, unmountLimit, func() error { return unmountOnce(target) })
		if err != nil {
			return errors.Join(err, syncErr)
		}
		if syncErr != nil {
			lost = fmt.Errorf("it is unmounted, but its %w: %w", ErrUnwritten, syncErr)
		}
	}
	return fmt.Errorf("%w: other mounts keep appearing on it", ErrBusy)
}

// writeBack asks for everything to be written and says what could not be: umount
// writes as well, and tells nobody how it went. What was shut down has nothing more
// to write.
func (s *System) writeBack(target string) error {
	if s.hasCut() { // else nobody need read the mount table
		if info, err := topMount(target); err == nil && info != nil && s.isCut(mountedDevice(info)) {
			return nil
		}
	}
	fd, err := unix.Open(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	if err = s.at("syncfs"); err == nil {
		err = unix.Syncfs(fd)
	}
	if err != nil {
		return fmt.Errorf("write back: %w", err)
	}
	return nil
}

// unmountLimit is how long an unmount waits for files that are just being closed: a
// program that this process starts has copies of all of them until it executes.
const unmountLimit = 500 * time.Millisecond

func unmountOnce(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: a process on this host has files open in it, or something is mounted below it", ErrBusy)
	}
	return err
}

// protect makes the directory to mount on and keeps everybody from writing to it:
// what a container writes while nothing is mounted would end on the host's disk.
func protect(target string) (dir *os.File, warnings []string, err error) {
	err = os.Mkdir(target, 0)
	made := err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, nil, fmt.Errorf("make target: %w", err)
	}
	dir, err = os.OpenFile(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open target: %w", err)
	}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	flags, err := getFlags(dir)
	if err == nil && flags&immutable != 0 {
		return dir, nil, nil // left by an earlier process
	}
	if !made {
		if modeErr := errors.Join(dir.Chown(0, 0), dir.Chmod(0)); modeErr != nil {
			return dir, nil, fmt.Errorf("protect target: %w", modeErr)
		}
		if names, _ := dir.Readdirnames(1); len(names) > 0 {
			warnings = append(warnings, fmt.Sprintf("%s has files of its own (%s, …), which the mount hides", target, names[0]))
		}
	}
	if err == nil {
		err = setFlags(dir, flags|immutable)
	}
	switch {
	case errors.Is(err, unix.EPERM):
		warnings = append(warnings, fmt.Sprintf("%s is not immutable, CAP_LINUX_IMMUTABLE is missing: while it is unmounted, "+
			"what root writes there goes to the host's disk", target))
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL): // a filesystem without flags
	case err != nil:
		return dir, nil, fmt.Errorf("make target immutable: %w", err)
	}
	return dir, warnings, nil
}

// removeBare removes the directory to mount on, and nothing but an empty one. What
// is not empty, or is still a mount, stays.
func removeBare(target string) error {
	dir, err := os.OpenFile(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open target: %w", err)
	}
	defer dir.Close()
	mounted, err := isMountRoot(target)
	if mounted || err != nil {
		return err
	}
	flags, err := getFlags(dir)
	if err == nil && flags&immutable != 0 {
		if err = setFlags(dir, flags&^immutable); err != nil {
			return fmt.Errorf("make target removable: %w", err)
		}
	}
	err = unix.Rmdir(target)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EBUSY):
		if flags&immutable != 0 {
			return setFlags(dir, flags)
		}
		return nil
	}
	return fmt.Errorf("remove target: %w", err)
}

const immutable = 0x10 // FS_IMMUTABLE_FL, include/uapi/linux/fs.h

func getFlags(f *os.File) (flags int32, err error) {
	err = ioctl(f, unix.FS_IOC_GETFLAGS, unsafe.Pointer(&flags))
	return flags, err
}

func setFlags(f *os.File, flags int32) error {
	return ioctl(f, unix.FS_IOC_SETFLAGS, unsafe.Pointer(&flags))
}
