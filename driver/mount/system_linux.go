package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System is the Mounter that asks the kernel. Its zero value is ready. Calls for
// different devices and targets may run at the same time; the caller keeps two
// calls for one volume apart.
type System struct {
	// fault lets a test fail a step.
	fault func(step string) error

	mu  sync.Mutex
	cut map[uint64]bool // by device: its filesystem was shut down, and not mounted anew since
}

var _ Mounter = (*System)(nil)

// at is called before each step that a test makes fail.
func (s *System) at(step string) error {
	if s.fault == nil {
		return nil
	}
	return s.fault(step)
}

// blockDevice is an open block device.
type blockDevice struct {
	*os.File
	rdev uint64
	size int64
}

// openDevice opens a block device; flags are O_RDONLY or O_RDWR, and O_EXCL for a
// device nobody else may have mounted or opened in this way.
func openDevice(path string, flags int) (*blockDevice, error) {
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%w: %s is mounted or open elsewhere on this host", ErrBusy, path)
		}
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		f.Close()
		return nil, fmt.Errorf("open %s: not a block device", path)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	return &blockDevice{File: f, rdev: uint64(st.Rdev), size: size}, nil
}

// openExclusive opens a device for reading and writing as its only user, and waits
// a little for the last one to let go: the mount namespace of a process that has
// ended goes a moment after it.
func openExclusive(ctx context.Context, path string) (dev *blockDevice, err error) {
	err = retryBusy(ctx, 300*time.Millisecond, func() error {
		dev, err = openDevice(path, os.O_RDWR|unix.O_EXCL)
		return err
	})
	return dev, err
}

// release closes a device that was open exclusively, and returns when another
// program can open it so: a process that another goroutine is just starting has a
// copy of the descriptor until it executes its program. ErrBusy if somebody else
// has the device.
func (d *blockDevice) release(ctx context.Context) error {
	if err := d.Close(); err != nil {
		return err
	}
	return retryBusy(ctx, 300*time.Millisecond, func() error {
		syscall.ForkLock.RLock() // no copies of this one
		defer syscall.ForkLock.RUnlock()
		probe, err := openDevice(d.Name(), os.O_RDWR|unix.O_EXCL)
		if err != nil {
			return err
		}
		return probe.Close()
	})
}

// superblock reads what filesystem is on the device; nil if it knows none. Of the
// three it looks for expected first, with one small read: Mount's fast path.
func (d *blockDevice) superblock(expected string) (*superblock, error) {
	b := make([]byte, superblocksLen)
	at := int64(0)
	if expected == btrfs {
		at = btrfsSuper
	}
	_ = unix.Fadvise(int(d.Fd()), 0, 0, unix.FADV_RANDOM) // no read ahead
	for _, r := range [][2]int64{{at, at + 4096}, {0, superblocksLen}} {
		end := min(r[1], d.size)
		if r[0] >= end {
			continue
		}
		if _, err := d.ReadAt(b[r[0]:end], r[0]); err != nil {
			return nil, fmt.Errorf("read superblock: %w", err)
		}
		if sb := parseSuperblock(b); sb != nil && sb.fs == expected {
			return sb, nil
		}
	}
	return parseSuperblock(b), nil
}

// sys returns the device's directory in sysfs.
func (d *blockDevice) sys() string {
	return fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(d.rdev), unix.Minor(d.rdev))
}

// retryBusy runs try until it returns anything but ErrBusy, limit is over or ctx
// ends; the last error is returned.
func retryBusy(ctx context.Context, limit time.Duration, try func() error) error {
	deadline := time.Now().Add(limit)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := try()
		left := time.Until(deadline)
		if !errors.Is(err, ErrBusy) || left <= 0 {
			return err
		}
		select {
		case <-time.After(min(left, wait/2+rand.N(wait))):
		case <-ctx.Done():
			return err
		}
	}
}

// program is one run of a program on a device.
type program struct {
	pkg, name string // the Debian package, and what is run
	args      []string
	device    string
	// dies says that the program ends with this process, however that ends. Half a
	// mkfs is made again; half a repair or a growth may be worse than none.
	dies bool
}

// run runs a program to its end. Its last line of error output is in the error, and
// code is its exit status. A program that is not installed is ErrUnsupported, and
// what it refuses because of the filesystem's guard ErrMultiMount.
//
// The program has the device open from its first moment, so that the kernel keeps
// the device as it is: if this process is killed, the next must not be able to give
// a loop device of that name to another volume before the program opens it.
func (p program) run(ctx context.Context) (code int, err error) {
	path, err := findProgram(p.name)
	if err != nil {
		return -1, fmt.Errorf("run %s: %w: the program is not installed (Debian package %s)", p.name, ErrUnsupported, p.pkg)
	}
	held, err := openDevice(p.device, os.O_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("run %s: %w", p.name, err)
	}
	defer held.Close()
	cmd := exec.CommandContext(ctx, path, p.args...)
	var out, stderr bytes.Buffer
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	cmd.ExtraFiles = []*os.File{held.File}
	cmd.WaitDelay = 5 * time.Second
	if p.dies {
		// The signal comes at the end of the thread that starts the program.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	err = cmd.Run()
	if err == nil {
		return 0, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return -1, fmt.Errorf("run %s: %w", p.name, cause)
	}
	// The library that e2fsck and resize2fs share says it in the first line of many.
	if _, said, found := strings.Cut(stderr.String(), p.name+": MMP: "); found {
		said, _, _ = strings.Cut(said, "\n")
		return cmd.ProcessState.ExitCode(), fmt.Errorf("run %s: %w: %s", p.name, ErrMultiMount, said)
	}
	last := lastLine(stderr.String())
	if last == "" {
		last = lastLine(out.String())
	}
	return cmd.ProcessState.ExitCode(), fmt.Errorf("run %s: %w: %s", p.name, err, last)
}

// findProgram also looks where a daemon's PATH often does not reach. An empty PATH
// stays one that nothing is found in.
func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil && os.Getenv("PATH") != "" {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	return path, err
}

// Lacks implements Mounter.
func (*System) Lacks(fs string) (lacks []string) {
	tool := mkfsTools[fs]
	for _, name := range append([]string{tool.program}, laterTools[fs]...) {
		if _, err := findProgram(name); err != nil {
			lacks = append(lacks, name+" (package "+tool.pkg+")")
		}
	}
	return lacks
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// ioctl passes a pointer to the kernel.
func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
