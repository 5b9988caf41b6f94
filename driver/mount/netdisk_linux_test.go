package mount_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// netDisk is a disk behind a network, which can go away under a filesystem: a loop
// device on the file that nbdfuse shows of an nbdkit.
type netDisk struct {
	t      *testing.T
	server *exec.Cmd
}

// newNetRig is a rig on a network disk.
func newNetRig(t *testing.T, fs string, size int64) (*rig, *netDisk) {
	t.Helper()
	needRoot(t)
	needProgram(t, "nbdkit")
	needProgram(t, "nbdfuse")
	dir := t.TempDir()
	socket, shown := filepath.Join(dir, "socket"), filepath.Join(dir, "shown")
	if err := os.Mkdir(shown, 0o700); err != nil {
		t.Fatal(err)
	}
	image := newFile(t, size)
	d := &netDisk{t: t, server: exec.Command("nbdkit", "-f", "-U", socket, "file", image)}
	d.start(d.server, socket)
	file := filepath.Join(shown, "disk")
	client := exec.Command("nbdfuse", file, "nbd+unix:///?socket="+socket)
	d.start(client, file)
	t.Cleanup(func() { _ = unix.Unmount(shown, unix.MNT_DETACH) })

	r := &rig{t: t, s: &mount.System{}, size: size, fs: fs, id: uuid.NewString(), file: file}
	r.dev = attach(t, file)
	t.Cleanup(func() { detach(t, r.dev, file) })
	r.target = newTarget(t)
	return r, d
}

// start starts a program and waits for the path that it makes.
func (d *netDisk) start(cmd *exec.Cmd, path string) {
	d.t.Helper()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 6000 {
		if _, err := os.Lstat(path); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	d.t.Fatalf("%s does not show %s", cmd.Path, path)
}

// cut ends the server: all I/O fails from then on.
func (d *netDisk) cut() {
	d.t.Helper()
	if err := d.server.Process.Kill(); err != nil {
		d.t.Fatal(err)
	}
	_ = d.server.Wait()
}

// hang makes the server not answer until resume is called, or for a minute: should
// this process be killed meanwhile, the machine must not keep what waits for the disk.
func (d *netDisk) hang() (resume func()) {
	d.t.Helper()
	pid := strconv.Itoa(d.server.Process.Pid)
	late := exec.Command("sh", "-c", "kill -STOP $1; echo; sleep 60; kill -CONT $1", "sh", pid)
	late.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := late.StdoutPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	if err := late.Start(); err != nil {
		d.t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		d.t.Fatal(err)
	}
	d.awaitStopped(pid)
	resume = sync.OnceFunc(func() {
		if err := d.server.Process.Signal(syscall.SIGCONT); err != nil {
			d.t.Error(err)
		}
		_ = unix.Kill(-late.Process.Pid, unix.SIGKILL)
		_ = late.Wait()
	})
	d.t.Cleanup(resume)
	return resume
}

// awaitStopped waits until each thread of a process has stopped: the signal has only been
// sent, and one that is running may answer a request yet.
func (d *netDisk) awaitStopped(pid string) {
	d.t.Helper()
	running := func() bool {
		states, err := filepath.Glob("/proc/" + pid + "/task/*/stat")
		if err != nil || len(states) == 0 {
			d.t.Fatalf("the server has no threads: %v", err)
		}
		for _, file := range states {
			text, err := os.ReadFile(file)
			if err != nil {
				continue // it has ended
			}
			if _, state, _ := strings.Cut(string(text), ") "); !strings.HasPrefix(state, "T") {
				return true
			}
		}
		return false
	}
	for started := time.Now(); running(); time.Sleep(time.Millisecond) {
		if time.Since(started) > 30*time.Second {
			d.t.Fatal("the server does not stop")
		}
	}
}
