package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

const (
	// markAt is how far from the start and from the end of a device Format leaves a
	// mark while mkfs runs. No mkfs touches both before it has written a superblock
	// with the UUID: mkfs.xfs clears 128 KiB at each end, mkfs.ext4 the first 4 KiB
	// and the last 64, mkfs.btrfs clears 2 MiB at each end, after which the device
	// is blank again.
	markAt  = 512 << 10
	markLen = 512 // a sector: written whole or not at all
)

// mark is what Format writes.
func mark(id uuid.UUID) []byte {
	b := make([]byte, markLen)
	copy(b, "flocker: the mkfs for "+id.String()+" has not ended\n")
	return b
}

// Format makes a filesystem. See Mounter.
//
// A mkfs that was interrupted leaves nearly anything, so Format marks the device
// first and takes the mark away last. What may be formatted is then a blank device,
// a device with our mark, or one with a superblock of ours that says it is
// unfinished. Everything else is somebody's data.
func (s *System) Format(ctx context.Context, spec FormatSpec) error {
	if err := s.format(ctx, spec); err != nil {
		return fmt.Errorf("format %s as %s: %w", spec.Device, spec.FS, err)
	}
	return nil
}

func (s *System) format(ctx context.Context, spec FormatSpec) error {
	id, err := uuid.Parse(spec.UUID)
	if err != nil {
		return fmt.Errorf("%w UUID %q: %w", ErrInvalid, spec.UUID, err)
	}
	args, err := mkfsArgs(spec)
	if err != nil {
		return err
	}
	tool := mkfsTools[spec.FS]
	if _, err = findProgram(tool.program); err != nil { // before anything is written
		return fmt.Errorf("%w: %s is not installed (Debian package %s)", ErrUnsupported, tool.program, tool.pkg)
	}
	ready, err := s.prepare(ctx, spec, id)
	if ready || err != nil {
		return err
	}
	if err := s.at("mkfs"); err != nil {
		return err
	}
	mkfs := program{pkg: tool.pkg, name: tool.program, args: args, device: spec.Device, dies: true}
	if _, err := mkfs.run(ctx); err != nil {
		return err
	}
	if err := s.at("verify"); err != nil {
		return err
	}
	return finish(ctx, spec, id)
}

// prepare decides whether a device may be formatted and marks it. ready says that
// it carries the finished filesystem already.
func (s *System) prepare(ctx context.Context, spec FormatSpec, id uuid.UUID) (ready bool, err error) {
	dev, err := openExclusive(ctx, spec.Device)
	if err != nil {
		return false, err
	}
	defer dev.Close()
	s.setCut(dev.rdev, false) // another volume may have had a device of this number
	if err = checkSize(spec.FS, dev.size); err != nil {
		return false, err
	}
	sb, err := dev.superblock(spec.FS)
	if err != nil {
		return false, err
	}
	if sb != nil && (sb.uuid != id || sb.fs != spec.FS) {
		return false, fmt.Errorf("%w: there is %s on it, and no data is ever formatted over", ErrNotBlank, sb)
	}
	ours := mark(id)
	marked, data, err := dev.ends(ours)
	if err != nil {
		return false, err
	}
	switch {
	case marked, sb != nil && sb.unfinished: // ours, interrupted
	case sb != nil:
		return true, errors.Join(dev.Sync(), dev.release(ctx))
	case data >= 0:
		return false, fmt.Errorf("%w: there is unknown data at byte %d, and no data is ever formatted over", ErrNotBlank, data)
	}
	for _, at := range []int64{markAt, dev.size - markAt} {
		if _, err := dev.WriteAt(ours, at); err != nil {
			return false, fmt.Errorf("mark: %w", err)
		}
	}
	if err := dev.push(); err != nil {
		return false, fmt.Errorf("mark: %w", err)
	}
	return false, dev.release(ctx) // for mkfs
}

// finish checks what mkfs made and takes the marks away.
func finish(ctx context.Context, spec FormatSpec, id uuid.UUID) error {
	dev, err := openExclusive(ctx, spec.Device)
	if err != nil {
		return err
	}
	defer dev.Close()
	sb, err := dev.superblock(spec.FS)
	if err != nil {
		return err
	}
	if sb == nil || sb.fs != spec.FS || sb.uuid != id || sb.unfinished {
		return fmt.Errorf("%w: %s ended well and left %v", ErrIdentity, mkfsTools[spec.FS].program, sb)
	}
	ours := mark(id)
	b := make([]byte, markLen)
	for _, at := range []int64{markAt, dev.size - markAt} {
		if _, err := dev.ReadAt(b, at); err != nil {
			return fmt.Errorf("read mark: %w", err)
		}
		if !bytes.Equal(b, ours) { // the filesystem's own by now
			continue
		}
		if _, err := dev.WriteAt(make([]byte, markLen), at); err != nil {
			return fmt.Errorf("remove mark: %w", err)
		}
	}
	// mkfs has flushed the device. This write needs no flush of its own: the first
	// fsync of what will be mounted there makes it durable too.
	if err := dev.push(); err != nil {
		return fmt.Errorf("remove mark: %w", err)
	}
	return dev.release(ctx) // for the mount
}

// push writes to the device what was written to its buffers, without the flush that
// makes it survive a power cut: it would cost as much as half a mkfs. A cut during
// mkfs can lose the mark; the device, which never held data, is then refused as not
// blank until its volume is deleted.
func (d *blockDevice) push() error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	return unix.SyncFileRange(int(d.Fd()), 0, 0, all)
}

// ends reads the first and the last MiB. marked says that mark is in one of them, and
// data is where the first other byte is that is not zero, or -1. The device has at
// least two MiB.
func (d *blockDevice) ends(mark []byte) (marked bool, data int64, err error) {
	if d.size < 2*mib {
		return false, -1, fmt.Errorf("%w size: a device of %d bytes is too small for a filesystem", ErrInvalid, d.size)
	}
	// Around the page cache, so that an error of the device is seen; in pieces, since
	// the kernel takes longer to provide the memory than to read.
	direct, err := os.OpenFile(d.Name(), os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, -1, err
	}
	defer direct.Close()
	const piece = markAt / 2 // a mark is not cut
	b := aligned(piece)
	data = -1
	for at := int64(0); at < d.size; at += piece {
		if at == mib {
			at = d.size - mib
		}
		if _, err := direct.ReadAt(b, at); err != nil {
			return false, -1, fmt.Errorf("read first and last MiB: %w", err)
		}
		if at == markAt || at == d.size-markAt {
			if bytes.Equal(b[:markLen], mark) {
				marked = true
				clear(b[:markLen])
			}
		}
		if i := firstNonZero(b); i >= 0 && data < 0 {
			data = at + int64(i)
		}
	}
	return marked, data, nil
}

// aligned returns n bytes that a direct read may be made into.
func aligned(n int) []byte {
	const unit = 4096
	b := make([]byte, n+unit)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) % unit)
	return b[skip:][:n:n]
}

// firstNonZero returns -1 if all of b is zeros.
func firstNonZero(b []byte) int {
	zeros := make([]byte, 4096)
	for at := 0; at < len(b); at += len(zeros) {
		chunk := b[at:min(at+len(zeros), len(b))]
		if bytes.Equal(chunk, zeros[:len(chunk)]) {
			continue
		}
		return at + slices.IndexFunc(chunk, func(c byte) bool { return c != 0 })
	}
	return -1
}

// check repairs what is safe to repair on an ext4 filesystem that nobody uses. full
// does it even where the superblock asks for none.
func (d *blockDevice) check(ctx context.Context, sb *superblock, full bool) error {
	if sb.guardAt != 0 {
		if g, err := d.guard(sb); err != nil {
			return err
		} else if g.seq == guardChecked {
			return d.refusal(sb)
		}
	}
	args := []string{"-p", d.Name()}
	if full {
		args = slices.Insert(args, 0, "-f")
	}
	code, err := program{pkg: "e2fsprogs", name: "e2fsck", args: args, device: d.Name()}.run(ctx)
	switch {
	case err == nil, code == 1, code == 2:
		return nil
	case errors.Is(err, ErrMultiMount):
		return d.refusal(sb)
	case code < 0 && sb.guardAt != 0: // killed: the mark of a check is its own
		return errors.Join(err, d.clearCheck(ctx, sb))
	case code > 0 && code&4 != 0:
		return fmt.Errorf("%w: its errors are not safe to repair unattended; make a copy of %s, then run e2fsck on it: %w", ErrDamaged, d.Name(), err)
	}
	return err
}

// hasResource says whether this process may grow a mounted ext4.
func hasResource() bool {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3, Pid: int32(os.Getpid())}
	err := unix.Capget(&hdr, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
