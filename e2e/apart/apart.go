// Package apart keeps the tests of a package away from those of others that run at the
// same time.
//
// Whoever makes a mount namespace, as a container does, gets a copy of every mount that
// is there, and holds it: what another test unmounts then is still mounted, its device is
// in use, and what it has written is not all in its place. So tests that mount anything
// have a mount namespace of their own.
package apart

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// mark is set in the process that runs the tests.
const mark = "FLOCKER_TESTS_APART"

// Main is m.Run in another process, which has a mount namespace of its own. Without root
// there is nothing to mount, and it is m.Run.
func Main(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	if os.Getenv(mark) != "" {
		_ = os.Unsetenv(mark)
		if err := release(); err != nil {
			fmt.Fprintln(os.Stderr, "apart:", err)
			return 1
		}
		return m.Run()
	}
	code, err := contain()
	if err != nil {
		fmt.Fprintln(os.Stderr, "apart:", err)
		return 1
	}
	return code
}

// contain runs this program again.
func contain() (code int, err error) {
	runtime.LockOSThread() // the death of this thread is the child's
	//nolint:noctx // it ends with this process
	tests := exec.Command("/proc/self/exe", os.Args[1:]...)
	tests.Args[0] = os.Args[0]
	tests.Env = append(os.Environ(), mark+"=1")
	tests.Stdin, tests.Stdout, tests.Stderr = os.Stdin, os.Stdout, os.Stderr
	tests.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := tests.Start(); err != nil {
		return 0, fmt.Errorf("run the tests in a mount namespace of their own: %w", err)
	}
	go func() {
		for s := range signals {
			_ = tests.Process.Signal(s)
		}
	}()
	err = tests.Wait()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		return 0, fmt.Errorf("run the tests: %w", err)
	}
	if code = tests.ProcessState.ExitCode(); code < 0 {
		return 0, fmt.Errorf("the tests ended with %v", tests.ProcessState)
	}
	return code, nil
}

// release lets go of what others have mounted of loop devices: this namespace would keep
// it until the end of the tests. What they stand on stays.
func release() error {
	table, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer table.Close()
	here, err := os.Getwd()
	if err != nil {
		return err
	}
	targets, err := loops(table, here, os.TempDir())
	if err != nil {
		return err
	}
	for i := range targets {
		err := unix.Unmount(targets[len(targets)-1-i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // it went with one above it
			return fmt.Errorf("let go of %s: %w", targets[len(targets)-1-i], err)
		}
	}
	return nil
}

// loops returns where a mount table has loop devices, but for what the directories in use
// are on.
func loops(table io.Reader, used ...string) (targets []string, err error) {
	mounts, err := mountinfo.GetMountsFromReader(table, func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Source, "/dev/loop") || slices.ContainsFunc(used, func(dir string) bool {
			return strings.HasPrefix(dir+"/", strings.TrimSuffix(m.Mountpoint, "/")+"/")
		}), false
	})
	for _, m := range mounts {
		targets = append(targets, m.Mountpoint)
	}
	return targets, err
}
