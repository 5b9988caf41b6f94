package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// volumeSize is the size of every volume and file.
const volumeSize = 1 << 30

// bare is a volume made by hand: the system calls of one Flocker makes, with
// nothing around them.
type bare struct {
	file, target string
	id           string
	device       string
}

func (a *area) bare(name string) *bare {
	return &bare{file: filepath.Join(a.bareDir, name+".img"), target: filepath.Join(a.bareDir, name), id: uuid.NewString()}
}

// create makes the sparse file.
func (b *bare) create() error {
	fd, err := unix.Open(b.file, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", b.file, err)
	}
	return errors.Join(unix.Ftruncate(fd, volumeSize), unix.Close(fd), unix.Mkdir(b.target, 0o700))
}

func (b *bare) remove() error {
	return errors.Join(unix.Rmdir(b.target), unix.Unlink(b.file))
}

// attach makes the file a loop device, as the loopback backend does: direct I/O,
// blocks of 512 bytes.
func (b *bare) attach() error {
	file, err := unix.Open(b.file, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", b.file, err)
	}
	defer unix.Close(file)
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := unix.LoopConfig{Fd: uint32(file), Size: 512, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO}}
	for range 200 {
		number, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("get a free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", number)
		loop, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.IoctlLoopConfigure(loop, &config)
			unix.Close(loop)
		}
		if err == nil {
			b.device = device
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("configure %s: %w", device, err)
		}
		// Another caller was faster.
	}
	return errors.New("other programs take every loop device")
}

func (b *bare) detach() error {
	loop, err := unix.Open(b.device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", b.device, err)
	}
	return errors.Join(unix.IoctlSetInt(loop, unix.LOOP_CLR_FD, 0), unix.Close(loop))
}

// mkfs runs the program with the words that driver/mount gives it.
func (b *bare) mkfs(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-t", "ext4", "-e", "remount-ro", "-U", b.id,
		"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-L", filepath.Base(b.target), b.device).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (b *bare) mount() error {
	if err := unix.Mount(b.device, b.target, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", b.device, err)
	}
	return nil
}

func (b *bare) unmount() error {
	if err := unix.Unmount(b.target, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", b.target, err)
	}
	return nil
}

// first is what a first Mount has to do, up what a later one, and down what the
// last Unmount sets off.
func (b *bare) first(ctx context.Context) error {
	return all(b.attach, func() error { return b.mkfs(ctx) }, b.mount)
}

func (b *bare) up() error   { return all(b.attach, b.mount) }
func (b *bare) down() error { return all(b.unmount, b.detach) }

// all calls one after the other until one fails.
func all(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
