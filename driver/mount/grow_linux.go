package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers of the filesystems' own ioctls, from the kernel's uapi headers.
const (
	ext4ResizeFS   = 0x40086610 // EXT4_IOC_RESIZE_FS, include/uapi/linux/ext4.h
	xfsGrowFSData  = 0x4010586e // XFS_IOC_FSGROWFSDATA, fs/xfs/libxfs/xfs_fs.h
	btrfsResize    = 0x50009403 // BTRFS_IOC_RESIZE, include/uapi/linux/btrfs.h
	btrfsDevInfo   = 0xd000941e // BTRFS_IOC_DEV_INFO
	btrfsFSInfo    = 0x8400941f // BTRFS_IOC_FS_INFO
	btrfsArgLen    = 4096
	btrfsDevPathAt = btrfsArgLen - 1024
)

// growUnmounted grows an ext4 that nobody uses to the size of its device: for a
// process without CAP_SYS_RESOURCE, which may not grow a mounted one.
//
// The check before it gets half of the time there is: a volume too large for that
// is mounted as it is. The growing is not ended with ctx, because half of it could
// be worse than none; it has a generous time of its own.
func (s *System) growUnmounted(ctx context.Context, dev *blockDevice, sb *superblock) error {
	limit := time.Minute
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end)/2)
	}
	limited, cancel := context.WithTimeoutCause(ctx, limit, errors.New("the check takes too long"))
	defer cancel()
	err := s.at("grow")
	if err == nil {
		err = dev.check(limited, sb, true)
	}
	if err != nil {
		return err
	}
	own, cancelOwn := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Minute)
	defer cancelOwn()
	_, err = program{pkg: "e2fsprogs", name: "resize2fs", args: []string{dev.Name()}, device: dev.Name()}.run(own)
	if errors.Is(err, ErrMultiMount) {
		return dev.refusal(sb)
	}
	return err
}

// growMounted grows the filesystem that root is in to room bytes.
func growMounted(root *os.File, sb *superblock, room int64) error {
	switch sb.fs {
	case ext4:
		blocks := uint64(room / sb.block)
		return ioctl(root, ext4ResizeFS, unsafe.Pointer(&blocks))
	case xfs:
		data := struct {
			blocks uint64
			maxPct uint32
			_      uint32
		}{blocks: uint64(room / sb.block), maxPct: sb.maxPct}
		return ioctl(root, xfsGrowFSData, unsafe.Pointer(&data))
	case btrfs:
		var args struct {
			_    int64
			name [btrfsArgLen - 8]byte
		}
		copy(args.name[:], "1:max")
		return ioctl(root, btrfsResize, unsafe.Pointer(&args))
	}
	return unix.ENOTTY
}

// isOn says whether the mounted filesystem that root is in is the one on dev, and
// on dev alone.
func isOn(root *os.File, sb *superblock, dev *blockDevice) error {
	if sb.fs != btrfs {
		var st unix.Stat_t
		if err := unix.Fstat(int(root.Fd()), &st); err != nil {
			return err
		}
		if uint64(st.Dev) != dev.rdev {
			return fmt.Errorf("%w: the kernel mounted device %d:%d", ErrIdentity, unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
		}
		return nil
	}
	var info struct {
		maxID, devices uint64
		fsid           [16]byte
		_              [992]byte
	}
	if err := ioctl(root, btrfsFSInfo, unsafe.Pointer(&info)); err != nil {
		return fmt.Errorf("ask btrfs: %w", err)
	}
	if info.devices != 1 || info.fsid != sb.uuid {
		return fmt.Errorf("%w: the kernel mounted a btrfs with UUID %x on %d devices", ErrIdentity, info.fsid, info.devices)
	}
	var arg [btrfsArgLen]byte
	*(*uint64)(unsafe.Pointer(&arg[0])) = info.maxID
	if err := ioctl(root, btrfsDevInfo, unsafe.Pointer(&arg[0])); err != nil {
		return fmt.Errorf("ask btrfs for its device: %w", err)
	}
	path := unix.ByteSliceToString(arg[btrfsDevPathAt:])
	if rdev, err := deviceNumber(path); err != nil || rdev != dev.rdev {
		return fmt.Errorf("%w: the kernel mounted %s", ErrIdentity, path)
	}
	return nil
}

// deviceNumber returns which block device a path stands for.
func deviceNumber(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("stat %s: not a block device", path)
	}
	return uint64(st.Rdev), nil
}
