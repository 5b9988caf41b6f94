// Package moby runs Docker's own volume service, of Docker Engine 28, against the
// plugin's binary over its socket: its client with its timeouts and its retries,
// its locks, its metadata.db, and what it does when the daemon starts again. There
// are no images, no containers and no dockerd; what a container does with a volume
// is done by the test.
//
// It is a module of its own, so that the product does not depend on Docker's
// daemon. From Engine 29 on these packages are no longer a library.
package moby

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// base is the directory of this run, given to the process that runs the tests.
var base = os.Getenv("MOBY_BASE")

const baseName = "flocker-moby-"

// TestMain runs the tests in a mount namespace of their own, in another process,
// and cleans up after it, however it ends.
func TestMain(m *testing.M) {
	if base != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	flag.Parse()
	if f := flag.Lookup("test.list"); f != nil && f.Value.String() != "" {
		os.Exit(m.Run())
	}
	code, err := contain()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e/moby:", err)
		code = 1
	}
	os.Exit(code)
}

// contain builds the plugin, runs this program again, and removes what it left.
func contain() (code int, err error) {
	runtime.LockOSThread() // the death of this thread is the child's
	for _, old := range leftovers() {
		if err := remove(old); err != nil {
			fmt.Fprintf(os.Stderr, "e2e/moby: %s is left from an earlier run: %v\n", old, err)
		}
	}
	dir, err := os.MkdirTemp("", baseName)
	if err != nil {
		return 0, err
	}
	lock, err := lockBase(dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	defer func() { err = errors.Join(err, remove(dir)) }()

	build := exec.Command("go", "build", "-o", filepath.Join(dir, "flocker-plugin"), "./plugin")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build the plugin: %w\n%s", err, out)
	}

	// Nearly all the time is spent waiting, most of it for Docker's next retry. What
	// the command line says comes later and wins.
	tests := exec.Command("/proc/self/exe", append([]string{"-test.parallel=8"}, os.Args[1:]...)...)
	tests.Env = append(os.Environ(), "MOBY_BASE="+dir)
	tests.Stdin, tests.Stdout, tests.Stderr = os.Stdin, os.Stdout, os.Stderr
	tests.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := tests.Start(); err != nil {
		return 0, fmt.Errorf("start the tests: %w", err)
	}
	go func() {
		for s := range signals {
			_ = tests.Process.Signal(s)
		}
	}()
	if err := tests.Wait(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			return 0, fmt.Errorf("run the tests: %w", err)
		}
		return max(1, tests.ProcessState.ExitCode()), nil
	}
	return 0, nil
}

// lockBase marks a directory as one in use.
func lockBase(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// leftovers returns the directories of runs that were killed as a whole.
func leftovers() []string {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), baseName+"*"))
	return slices.DeleteFunc(dirs, func(dir string) bool {
		lock, err := lockBase(dir)
		if err != nil {
			return true
		}
		lock.Close()
		return false
	})
}

// remove removes a run's directory and detaches its loop devices. It is called
// outside the mount namespace of the tests, where nothing was ever mounted, and
// after their processes, on whose death the namespace went.
func remove(dir string) error {
	deadline := time.Now().Add(time.Minute)
	for {
		left := loops(dir)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("still attached: %s", strings.Join(left, ", "))
		}
		for _, device := range left {
			detach(device, dir)
		}
		time.Sleep(20 * time.Millisecond)
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return mutable(path)
	})
	return errors.Join(err, os.RemoveAll(dir))
}

// mutable takes away the flag that keeps a bare mountpoint from being written to.
func mutable(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	const immutable = 0x10 // FS_IMMUTABLE_FL
	if err != nil || flags&immutable == 0 {
		return nil // a filesystem without flags, or nothing to do
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags&^immutable))
}

// loops returns the loop devices whose files are below dir.
func loops(dir string) []string {
	var devices []string
	paths, _ := filepath.Glob("/sys/block/loop*/loop")
	for _, path := range paths {
		if device := "/dev/" + filepath.Base(filepath.Dir(path)); backed(device, dir) {
			devices = append(devices, device)
		}
	}
	return devices
}

// backed says whether a loop device's file is below dir.
func backed(device, dir string) bool {
	file, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
	return err == nil && strings.HasPrefix(string(file), dir+"/")
}

// detach detaches a loop device, or has the kernel do it with its last close. The
// number may be another's by now; while it is open here it does not change hands.
func detach(device, dir string) {
	f, err := os.Open(device)
	if err != nil {
		return
	}
	defer f.Close()
	if backed(device, dir) {
		_ = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
	}
}

// mounts returns what is mounted below dir.
func mounts(dir string) []string {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err) // there is no Linux without it
	}
	var targets []string
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			targets = append(targets, fields[4])
		}
	}
	return targets
}
