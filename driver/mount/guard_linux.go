package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The guard of an ext4 is a block that the host which has it mounted writes at each
// interval (multi-mount protection). The kernel watches the block before it mounts:
// not at all if the last user unmounted, for 22 seconds if it just ended, and for 11
// until it refuses if the block still changes.

// guard is what the block says: struct mmp_struct of the kernel's fs/ext4/ext4.h.
type guard struct {
	seq          uint32
	host, device string
	seen         time.Time // by the clock of that host
}

const (
	guardMagic   = 0x004d4d50
	guardClean   = 0xff4d4d50 // seq: nobody has it
	guardChecked = 0xe24d4d50 // seq: e2fsck has it
)

// guard reads the block from the device itself.
func (d *blockDevice) guard(sb *superblock) (g guard, err error) {
	direct, err := os.OpenFile(d.Name(), os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return g, err
	}
	defer direct.Close()
	b := aligned(int(sb.block))
	if _, err = direct.ReadAt(b, sb.guardAt); err != nil {
		return g, fmt.Errorf("read the multi-mount protection: %w", err)
	}
	le := binary.LittleEndian
	if le.Uint32(b) != guardMagic {
		return g, fmt.Errorf("%w: the block of the multi-mount protection is overwritten", ErrDamaged)
	}
	word := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(bytes.ToValidUTF8(b, nil))
	}
	return guard{
		seq: le.Uint32(b[4:]), seen: time.Unix(int64(le.Uint64(b[8:])), 0).UTC(),
		host: word(b[16:80]), device: word(b[80:112]),
	}, nil
}

// refusal is an ErrMultiMount with who the guard names.
func (d *blockDevice) refusal(sb *superblock) error {
	g, err := d.guard(sb)
	switch {
	case err != nil:
		return fmt.Errorf("%w: which one cannot be told: %w", ErrMultiMount, err)
	case g.seq == guardChecked:
		return fmt.Errorf("%w: e2fsck began a check of it on host %s at %s and has not ended; if it does not run any more, type: tune2fs -f -E clear_mmp %s",
			ErrMultiMount, g.host, g.seen.Format(time.RFC3339), d.Name())
	}
	return fmt.Errorf("%w: host %s has it mounted, as its device %s, and was last heard of at %s; unmount it there first",
		ErrMultiMount, g.host, g.device, g.seen.Format(time.RFC3339))
}

// multiMount tells the refusal of the guard from other reasons why the kernel did not
// mount: it says EBUSY for a user on this host as well, and before Linux 6.5 EINVAL
// for everything. A guard that changes while nobody here has the device is proof.
func (d *blockDevice) multiMount(ctx context.Context, sb *superblock, err error) error {
	if sb.guardAt == 0 {
		return err
	}
	if context.Cause(ctx) != nil {
		return fmt.Errorf("the time was over; after an unclean end the kernel needs 22 s or more, to see whether another host has it mounted: %w", err)
	}
	if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	probe, probeErr := openDevice(d.Name(), os.O_RDWR|unix.O_EXCL)
	if probeErr != nil {
		return err
	}
	probe.Close()
	before, readErr := d.guard(sb)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if before.seq == guardChecked {
		return d.refusal(sb)
	}
	for end := time.Now().Add(sb.guardEvery + time.Second); time.Now().Before(end); {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
		if now, readErr := d.guard(sb); readErr != nil || now.seq != before.seq {
			return d.refusal(sb)
		}
	}
	return err
}

// clearCheck takes away what a killed e2fsck leaves in the guard: nobody could mount
// the filesystem any more.
func (d *blockDevice) clearCheck(ctx context.Context, sb *superblock) error {
	if g, err := d.guard(sb); err != nil || g.seq != guardChecked {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_, err := program{pkg: "e2fsprogs", name: "tune2fs", args: []string{"-f", "-E", "clear_mmp", d.Name()}, device: d.Name()}.run(ctx)
	return err
}

// interruptible runs a system call, and ends it when ctx does: with a signal, since
// the kernel listens for one while it watches a guard. No other signal, such as that
// of a child process that ends, gets through. A call that waits for a device cannot
// be ended, and is left behind.
func interruptible(ctx context.Context, call func() error) error {
	const signal = unix.SIGWINCH // Go's runtime handles it, and nobody asks for it
	thread, done := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var others, old unix.Sigset_t
		for i := range others.Val {
			others.Val[i] = ^others.Val[i]
		}
		others.Val[0] &^= 1 << (signal - 1)
		err := unix.PthreadSigmask(unix.SIG_SETMASK, &others, &old)
		thread <- unix.Gettid()
		if err == nil {
			err = call()
			err = errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil))
		}
		done <- err
	}()
	id := <-thread
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	for range 200 { // the first may come before the call
		_ = unix.Tgkill(os.Getpid(), id, signal)
		select {
		case <-done:
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return fmt.Errorf("the kernel does not answer: %w", context.Cause(ctx))
}
