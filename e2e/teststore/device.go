package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/teststore"
)

// device is a loop device on the file that nbdfuse shows of a grant.
//
// What it is of is in the file's name, which the kernel tells without asking the
// file system, so also when that does not answer. The loop device shows as much of
// the file as the volume is large.
type device struct {
	teststore.Device
	size int64
}

// fileName names the file. The volume is in it without dashes: loopback takes files
// with a UUID in their names for its own at first sight.
func fileName(initiator string, d teststore.Device) string {
	return fmt.Sprintf("%s%s.%d.%s", teststore.FilePrefix(initiator), strings.ReplaceAll(d.Ref, "-", ""), d.Token, d.Grant)
}

func parseFileName(initiator, name string) (teststore.Device, bool) {
	rest, ok := strings.CutPrefix(name, teststore.FilePrefix(initiator))
	parts := strings.Split(rest, ".")
	if !ok || len(parts) != 3 || len(parts[0]) < 2 {
		return teststore.Device{}, false
	}
	id, err := uuid.Parse(parts[0][2:])
	token, err2 := strconv.ParseInt(parts[1], 10, 64)
	return teststore.Device{Ref: parts[0][:2] + "-" + id.String(), Token: token, Grant: parts[2]}, err == nil && err2 == nil
}

// devices asks the kernel which devices an initiator has made.
func devices(initiator string) ([]device, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []device
	for _, file := range files {
		dir := filepath.Dir(filepath.Dir(file))
		path, err := sysfs(file)
		d, ok := parseFileName(initiator, filepath.Base(path))
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		d.Path = "/dev/" + filepath.Base(dir)
		text, err := sysfs(filepath.Join(dir, "size"))
		if err != nil {
			return nil, err
		}
		sectors, _ := strconv.ParseInt(text, 10, 64) // empty: it is going away
		found = append(found, device{d, sectors * 512})
	}
	return found, nil
}

// sysfs reads what the kernel says of a device; empty if that is going away.
func sysfs(path string) (string, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	return strings.TrimSpace(string(text)), err
}

// open opens the device. ENXIO: it has been removed. As long as it is open, it
// stays what it is.
func (d device) open(flags int) (*os.File, error) {
	f, err := openDevice(d.Path, flags)
	if err != nil {
		return nil, err
	}
	path, err := sysfs(filepath.Join("/sys/block", filepath.Base(d.Path), "loop/backing_file"))
	if name := filepath.Base(path); err == nil && (!strings.HasPrefix(name, "teststore.") || !strings.HasSuffix(name, "."+d.Grant)) {
		err = unix.ENXIO
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// find returns the device of a grant.
func find(initiator, grant string) (device, bool, error) {
	found, err := devices(initiator)
	for _, d := range found {
		if d.Grant == grant {
			return d, true, err
		}
	}
	return device{}, false, err
}

// connect makes a device for a grant whose data is served at an address.
func connect(ctx context.Context, dir, initiator string, g teststore.Grant, address string) (d device, err error) {
	d.Device = teststore.Device{Grant: g.ID, Ref: g.Ref, Token: g.Token}
	d.size = g.Size
	mountpoint := filepath.Join(dir, g.ID)
	// An initiator that was killed may have left it.
	unmount(mountpoint)
	if err := os.MkdirAll(mountpoint, 0o700); err != nil {
		return d, err
	}
	file := filepath.Join(mountpoint, fileName(initiator, d.Device))
	fuse, err := startFuse(ctx, file, "nbd://"+address+"/"+g.ID)
	// The loop device keeps the file and so its file system, without a place; when
	// it lets go, nbdfuse ends.
	defer func() {
		unmount(mountpoint)
		if err != nil && fuse != nil {
			_ = fuse.Kill() // it may have ended
		}
		err = errors.Join(err, os.Remove(mountpoint))
	}()
	if err != nil {
		return d, err
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return d, err
	}
	defer f.Close()
	d.Path, err = configure(f, filepath.Base(file), g.Size)
	return d, err
}

// unmount takes a mount away from its place, if there is one.
func unmount(path string) { _ = unix.Unmount(path, unix.MNT_DETACH) }

// startFuse starts nbdfuse and waits until it shows the file.
func startFuse(ctx context.Context, file, url string) (*os.Process, error) {
	// What the file's attributes are the kernel need not ask again: who looks at the
	// loop device would have to wait for it if the server hangs.
	const forever = "315360000"
	// It outlives this initiator, and a terminal's interrupt.
	cmd := exec.Command("nbdfuse", "-o", "attr_timeout="+forever+",entry_timeout="+forever, file, url) //nolint:noctx // it outlives the call
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it says itself what is wrong
		close(ended)
	}()
	for {
		if _, err := os.Stat(file); err == nil {
			return cmd.Process, nil
		}
		select {
		case <-ended:
			return nil, errors.New("nbdfuse has ended; the initiator's log says why")
		case <-ctx.Done():
			return cmd.Process, fmt.Errorf("nbdfuse: %w", context.Cause(ctx))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// configure makes a loop device on a file.
func configure(f *os.File, name string, size int64) (path string, err error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Sizelimit: uint64(size)}}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], name)
	for range 50 { // others take free devices as well
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		path = "/dev/loop" + strconv.Itoa(number)
		dev, err := openDevice(path, os.O_RDWR)
		if err == nil {
			if err = unix.IoctlLoopConfigure(int(dev.Fd()), &config); err == nil {
				// "Read-only" outlives the file of a former user.
				err = os.NewSyscallError("BLKROSET", unix.IoctlSetPointerInt(int(dev.Fd()), unix.BLKROSET, 0))
				return path, errors.Join(err, dev.Close())
			}
			_ = dev.Close()
			err = os.NewSyscallError("LOOP_CONFIGURE", err)
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", errors.New("others take every free loop device")
}

// openDevice opens /dev/loopN, which it makes where nothing else does.
func openDevice(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	number, err := strconv.Atoi(strings.TrimPrefix(path, "/dev/loop"))
	if err != nil {
		return nil, err
	}
	const loopMajor = 7
	err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(number))))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return os.OpenFile(path, flags, 0)
}

// keep takes back a removal that waits for the last one who has the device open.
func (d device) keep() error {
	return d.change(func(info *unix.LoopInfo64) bool {
		if info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
			return false
		}
		info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
		return true
	})
}

// grow makes the device as large as its volume has become.
func (d device) grow(size int64) error {
	return d.change(func(info *unix.LoopInfo64) bool {
		info.Sizelimit = uint64(size)
		return true
	})
}

func (d device) change(how func(*unix.LoopInfo64) bool) error {
	f, err := d.open(os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err == nil && how(info) {
		err = unix.IoctlLoopSetStatus64(int(f.Fd()), info)
	}
	if err != nil {
		return fmt.Errorf("change %s: %w", d.Path, err)
	}
	return nil
}

// cut makes all I/O fail, also what waits for an answer already, and removes the
// device unless somebody has it open.
func (d device) cut(ctx context.Context, initiator string) error {
	f, err := d.open(os.O_RDONLY)
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err == nil {
		err = loop.FUSE{Connection: unix.Minor(info.Device)}.Abort()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cut %s: %w", d.Path, err)
	}
	if err = d.remove(ctx, initiator, settle/5, false); errors.Is(err, backends.ErrInUse) {
		return nil
	}
	return err
}

// disconnect removes the device when what was written is at the server.
func (d device) disconnect(ctx context.Context, initiator string) error {
	return d.remove(ctx, initiator, settle, true)
}

// settle is how long somebody may have the device exclusively, and a sixth of how long
// open, who only looks at it.
const settle = 500 * time.Millisecond

// errMounted and errOpen: somebody has the device exclusively, or otherwise.
var errMounted, errOpen = errors.New("mounted"), errors.New("open")

// remove removes the device: ErrInUse, and it stays, if somebody has it for longer than
// the patience.
func (d device) remove(ctx context.Context, initiator string, patience time.Duration, flush bool) error {
	for begin := time.Now(); ; {
		err := d.tryRemove(ctx, flush)
		if err == nil {
			break
		}
		limit := patience
		switch {
		case errors.Is(err, errOpen):
			limit = 6 * patience
		case !errors.Is(err, errMounted):
			return err
		}
		if time.Since(begin) > limit {
			return fmt.Errorf("%s is open or mounted: %w", d.Path, backends.ErrInUse)
		}
		wait(ctx, 10*time.Millisecond)
	}
	for begin := time.Now(); ; {
		switch _, ok, err := find(initiator, d.Grant); {
		case err != nil || !ok:
			return err
		case time.Since(begin) > 10*settle:
			return fmt.Errorf("the kernel does not let go of %s: %w", d.Path, backends.ErrInUse)
		}
		wait(ctx, 5*time.Millisecond)
	}
}

// tryRemove asks the kernel to let go of the file if nobody else has the device: errMounted
// or errOpen.
func (d device) tryRemove(ctx context.Context, flush bool) error {
	// Exclusively: fails while it is mounted, in whatever mount namespace.
	f, err := d.open(os.O_RDWR | unix.O_EXCL)
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return errMounted
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if flush {
		// If it fails now it always will. What has to be durable was synced before,
		// as by an unmount.
		_ = f.Sync()
	}
	if err := ctx.Err(); err != nil {
		return err // it may have waited for the server, and nobody waits for it
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		return os.NewSyscallError("LOOP_CLR_FD", err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return nil // it is gone when f is closed
	}
	if err != nil {
		return err
	}
	// Somebody has it open, and the kernel would remove it under whoever opens it
	// next. Take that back.
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(int(f.Fd()), info); err != nil {
		return os.NewSyscallError("LOOP_SET_STATUS64", err)
	}
	return errOpen
}
