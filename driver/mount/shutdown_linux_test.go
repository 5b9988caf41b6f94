package mount_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// container is a process in a mount namespace of its own, which writes and syncs one
// small file after the other until that fails.
type container struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Closer
	out   *bufio.Scanner
	acked int // files it was told are on the disk
	sure  int // of these, those before what then stopped it
}

func newContainer(t *testing.T, dir string) *container {
	t.Helper()
	needProgram(t, "unshare")
	c := &container{t: t, cmd: exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", `
		cd "$1"
		exec 9> open
		dd if=/dev/zero of=unsynced bs=1M count=3 2> /dev/null
		i=0
		while echo "number $i" > f$i && sync f$i; do echo $i; i=$((i+1)); done 2>&1
		echo > late
		echo stopped
		read line`, "sh", dir)}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewScanner(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	return c
}

func (c *container) end() { _ = c.cmd.Process.Kill(); _ = c.cmd.Wait() }

// writes waits until n files more are on the disk.
func (c *container) writes(n int) {
	c.t.Helper()
	for range n {
		if !c.out.Scan() || c.out.Text() != fmt.Sprint(c.acked) {
			c.t.Fatalf("after %d files the container says %q (%v)", c.acked, c.out.Text(), c.out.Err())
		}
		c.acked++
	}
	c.sure = c.acked
}

// stopped returns what the writer said when it could not go on.
func (c *container) stopped() (said string) {
	limit := time.AfterFunc(time.Minute, func() { _ = c.cmd.Process.Kill() })
	defer limit.Stop()
	for c.out.Scan() && c.out.Text() != "stopped" {
		if c.out.Text() == fmt.Sprint(c.acked) {
			c.acked++
		} else {
			said += c.out.Text() + "\n"
		}
	}
	return said
}

// wantAcked asserts that what was synced is on the filesystem. An ext4 may lack the last one, if
// it was under way when the filesystem was shut down: the shutdown ends the transaction without
// writing it, and an fsync that comes to wait for it takes one that has ended for one that is
// written (jbd2_complete_transaction of Linux 6.18). It is so without this package, too.
func (r *rig) wantAcked(c *container) {
	r.t.Helper()
	for i := range c.acked {
		if r.fs == "ext4" && i >= c.sure && i == c.acked-1 {
			break
		}
		r.wantContent(fmt.Sprintf("f%d", i), fmt.Sprintf("number %d\n", i))
	}
}

func (r *rig) shutdown() {
	r.t.Helper()
	start := time.Now()
	if err := r.s.Shutdown(r.t.Context(), r.target); err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("shutdown took %v", time.Since(start))
}

// restart is another process that looks at the same kernel.
func (r *rig) restart() { r.s = &mount.System{} }

// eachWithShutdown is eachFS without btrfs.
func eachWithShutdown(t *testing.T, test func(r *rig)) {
	t.Helper()
	for _, k := range kinds[:2] {
		t.Run(k.fs, func(t *testing.T) {
			needRoot(t)
			needProgram(t, "mkfs."+k.fs)
			test(newRig(t, k.fs, k.size))
		})
	}
}

func TestShutdown(t *testing.T) {
	eachWithShutdown(t, func(r *rig) {
		t, ctx := r.t, r.t.Context()
		r.format()
		r.mount()
		if err := r.s.Health(r.target); err != nil {
			t.Errorf("health: %v", err)
		}
		c := newContainer(t, r.data("."))
		c.writes(20)
		r.shutdown()
		start := time.Now()
		if said := c.stopped(); !strings.Contains(said, "Input/output error") {
			t.Errorf("the container stopped with %q, want an I/O error", said)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("the container went on for %v", took)
		}
		for range 2 {
			r.shutdown() // again: nil
			r.restart()
		}
		wantStopped := func() {
			t.Helper()
			wantErr(t, r.s.Health(r.target), mount.ErrDamaged, r.fs+" on "+r.dev+": damaged: it was shut down")
			_, err := r.s.Mount(ctx, r.spec(), mount.Owner{})
			wantErr(t, err, mount.ErrBusy, "mount "+r.dev+": busy: it is mounted on "+r.target+" already, and was shut down or failed: stop the containers")
		}
		if r.fs == "xfs" || hasLinux(6, 15) { // which tell who did not do it
			wantStopped()
		}
		r.shutdown()
		wantStopped()

		r.unmount()
		r.shutdown() // nothing is mounted: nil
		if err := r.s.Health(r.target); err != nil {
			t.Errorf("health of nothing: %v", err)
		}
		wantErr(t, r.s.Close(ctx, r.dev), mount.ErrBusy, "busy")
		for range 2 {
			_, err := r.s.Mount(ctx, r.spec(), mount.Owner{})
			wantErr(t, err, mount.ErrBusy, "mount "+r.dev+": busy: its filesystem was shut down on this host, or failed, and a process still has it open: stop the containers")
			r.restart()
		}
		if got, _ := r.s.Mounted(r.target); got != "" {
			t.Errorf("mounted: got %q, want nothing", got)
		}
		c.end()
		r.notBusy(func() error { return r.s.Close(ctx, r.dev) })

		r.mount()
		r.wantAcked(c)
		if err := r.s.Health(r.target); err != nil {
			t.Errorf("health after the next mount: %v", err)
		}
		r.write("f", "works again")
		r.unmount()
		checkFS(t, r)
		r.wantGone()
	})
}

// hasLinux says whether the kernel is at least of that version.
func hasLinux(major, minor int) bool {
	var u unix.Utsname
	var a, b int
	_ = unix.Uname(&u)
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b)
	return a > major || a == major && b >= minor
}

// What is not known to have been shut down on purpose has lost something.
func TestUnmountAfterAnotherProcessShutItDown(t *testing.T) {
	r := newRig(t, "xfs", 320*testMiB)
	r.format()
	r.mount()
	r.shutdown()
	r.restart()
	wantErr(t, r.s.Unmount(t.Context(), r.target), mount.ErrUnwritten, "unmount "+r.target+": it is unmounted, but its last writes may be lost: open: input/output error")
	r.unmount()
	r.wantGone()
}

// What ext4 has in its journal and not yet in its place would reach the device later,
// when it may be another node's.
func TestNothingIsWrittenAfterShutdown(t *testing.T) {
	eachWithShutdown(t, func(r *rig) {
		r.format()
		r.mount()
		for i := range 50 {
			r.write(fmt.Sprint(i), "synced")
		}
		if err := os.WriteFile(r.data("unsynced"), []byte("unsynced"), 0o600); err != nil {
			r.t.Fatal(err)
		}
		r.shutdown()
		before := sum(r.t, r.file)
		r.unmount()
		r.close()
		if sum(r.t, r.file) != before {
			r.t.Error("the device was written to after Shutdown had returned")
		}
		r.mount()
		if b, _ := os.ReadFile(r.data("unsynced")); len(b) > 0 {
			r.t.Error("Shutdown wrote what nobody had asked to write")
		}
		r.wantContent("49", "synced")
		r.unmount()
	})
}

// Shutdown stops whole filesystems: it must never be that of the host, or of another
// volume.
func TestShutdownOfSomethingElse(t *testing.T) {
	r, other := newRig(t, "ext4", 8*testMiB), newRig(t, "ext4", 8*testMiB)
	r.format()
	other.format()
	other.mount()
	ctx := t.Context()

	if err := os.Mkdir(r.target, 0o700); err != nil {
		t.Fatal(err)
	}
	bind := func(source, fs string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, r.target, fs, flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(text string) {
		t.Helper()
		wantErr(t, r.s.Shutdown(ctx, r.target), mount.ErrIdentity, text)
		if err := unix.Unmount(r.target, 0); err != nil {
			t.Fatal(err)
		}
		other.write("f", "still works")
	}
	if err := r.s.Shutdown(ctx, r.target); err != nil { // the bare directory
		t.Error(err)
	}
	bind(other.data("."), "", unix.MS_BIND)
	refused("shut down the filesystem on " + r.target + ": not the expected filesystem: the directory /data of " + other.dev + " (ext4) is mounted there, not a volume")
	bind("none", "tmpfs", 0)
	refused("the directory / of none (tmpfs) is mounted there, not a volume")
	if err := unix.Mount(r.dev, r.target, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	r.s = mount.WithFault(func(step string) error {
		if step == "shutdown" { // somebody mounts over it at the last moment
			return unix.Mount(other.target, r.target, "", unix.MS_BIND, "")
		}
		return nil
	})
	refused(r.target + " is not the root of " + r.dev + " alone")
	if err := os.WriteFile(filepath.Join(r.target, "x"), nil, 0o600); err != nil {
		t.Errorf("what was below it: %v", err)
	}
	r.restart()
	r.unmount()
	// the filesystem that the directory itself is in
	outer := r.target
	r.target = other.data("v")
	if err := os.Mkdir(r.target, 0o700); err != nil {
		t.Fatal(err)
	}
	bind(other.target, "", unix.MS_BIND)
	refused(r.target + " is not the root of " + other.dev + " alone")
	r.target = outer
	other.unmount()
	r.wantGone()
	other.wantGone()
}

func TestShutdownOfBtrfs(t *testing.T) {
	r := newRig(t, "btrfs", 128*testMiB)
	needProgram(t, "mkfs.btrfs")
	r.format()
	r.mount()
	err := r.s.Shutdown(t.Context(), r.target)
	if err == nil {
		t.Skip("this kernel can")
	}
	wantErr(t, err, mount.ErrUnsupported, "shut down the filesystem on "+r.target+": not supported here: btrfs cannot be shut down")
	r.write("f", "still works")
	if err := r.s.Health(r.target); err != nil {
		t.Error(err)
	}
	r.unmount()
	r.wantGone()
}

// What a Shutdown excuses, it excuses for that filesystem only: a later one on a
// device of the same number is another.
func TestShutdownExcusesOneFilesystem(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.s = mount.WithFault(func(step string) error {
		if step == "flush" {
			return unix.EIO
		}
		return nil
	})
	lost := func() {
		t.Helper()
		wantErr(t, r.s.Close(t.Context(), r.dev), mount.ErrUnwritten, "close "+r.dev+": last writes may be lost: flush: input/output error")
	}
	stop := func() {
		t.Helper()
		r.mount()
		r.shutdown()
		r.unmount()
		r.close()
	}
	r.format()
	lost()
	stop()
	r.mount()
	r.unmount()
	lost()
	stop()
	blank(t, r.file)
	r.close()
	r.format()
	lost()
}

// What the kernel noted stays until the filesystem is checked, which Mount does.
func TestHealthOfErrors(t *testing.T) {
	r := newRig(t, "ext4", 64*testMiB)
	r.format()
	r.mount()
	r.write("f", "kept")
	if err := r.s.Health(r.target); err != nil {
		t.Errorf("health: %v", err)
	}
	before := time.Now()
	trigger := filepath.Join("/sys/fs/ext4", filepath.Base(r.dev), "trigger_fs_error")
	if err := os.WriteFile(trigger, []byte("made by a test"), 0o200); err != nil {
		t.Fatal(err)
	}
	err := r.s.Health(r.target)
	wantErr(t, err, mount.ErrDamaged, "ext4 on "+r.dev+": damaged: 1 error, the last at "+hour(err, before))
	wantErr(t, err, mount.ErrDamaged, "; the kernel's log has more; it has become read-only")
	wantErr(t, r.s.Unmount(t.Context(), r.target), mount.ErrUnwritten, "last writes may be lost: write back: ")
	r.close()
	r.mount()
	if err := r.s.Health(r.target); err != nil {
		t.Errorf("health after the repair: %v", err)
	}
	r.wantContent("f", "kept")
	// as a volume of ours is never mounted
	if err := unix.Mount("", r.target, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	wantErr(t, r.s.Health(r.target), mount.ErrDamaged, "ext4 on "+r.dev+": damaged: it has become read-only")
	r.unmount()
	r.wantGone()
}

// The storage system has cut this host off: nothing can be written back any more, and
// that must not keep the volume on the host for ever.
func TestDeviceThatIsCutOff(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.fs, func(t *testing.T) {
			r, disk := newNetRig(t, k.fs, k.size)
			needProgram(t, "mkfs."+k.fs)
			ctx := t.Context()
			r.format()
			r.mount()
			c := newContainer(t, r.data("."))
			c.writes(3)
			disk.cut()
			if said := c.stopped(); !strings.Contains(said, "Input/output error") {
				t.Errorf("the container stopped with %q, want an I/O error", said)
			}
			var noted error
			for end := time.Now().Add(time.Minute); noted == nil && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				if f, err := os.Create(r.data("more")); err == nil {
					_ = f.Sync()
					f.Close()
				}
				noted = r.s.Health(r.target)
			}
			wantErr(t, noted, mount.ErrDamaged, r.fs+" on "+r.dev+": damaged: ")
			t.Logf("noted: %v", noted)

			lost := "last writes may be lost"
			if k.fs == "btrfs" { // which cannot be shut down
				wantErr(t, r.s.Shutdown(ctx, r.target), mount.ErrUnsupported, "btrfs")
				c.end()
				wantErr(t, r.s.Unmount(ctx, r.target), mount.ErrUnwritten, "unmount "+r.target+": it is unmounted, but its "+lost)
				r.unmount()
			} else {
				r.shutdown()
				c.end()
				r.unmount()
				r.notBusy(func() error { return r.s.Close(ctx, r.dev) })
				for range 2 {
					r.close()
				}
				r.restart() // what was done on purpose is not known any more
			}
			for range 2 {
				wantErr(t, r.s.Close(ctx, r.dev), mount.ErrUnwritten, "close "+r.dev+": "+lost+": flush: sync "+r.dev+": input/output error")
			}
		})
	}
}

// The storage system does not answer: nobody waits for it without an end, and what
// was begun ends when it answers again.
func TestDeviceThatHangs(t *testing.T) {
	for _, k := range kinds[:2] {
		t.Run(k.fs, func(t *testing.T) {
			r, disk := newNetRig(t, k.fs, k.size)
			needProgram(t, "mkfs."+k.fs)
			short := func() context.Context {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				t.Cleanup(cancel)
				return ctx
			}
			r.format()
			r.mount()
			var resume func()
			var err error
			for range 20 { // the kernel may just have written what Shutdown would wait for
				r.write("f", "synced")
				if err := os.WriteFile(r.data("g"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				resume = disk.hang()
				if err := r.s.Health(r.target); err != nil {
					t.Errorf("health: %v", err)
				}
				if err = r.s.Shutdown(short(), r.target); err != nil {
					break
				}
				resume()
				r.unmount()
				r.close()
				r.mount()
			}
			wantErr(t, err, context.DeadlineExceeded, "shut down the filesystem on "+r.target+": the kernel does not answer")
			wantErr(t, r.s.Health(r.target), mount.ErrDamaged, "it was shut down") // all the same
			if err := os.WriteFile(r.data("h"), nil, 0o600); !errors.Is(err, unix.EIO) {
				t.Errorf("write: got %v, want EIO", err)
			}
			wantErr(t, r.s.Unmount(short(), r.target), mount.ErrBusy, "busy")
			resume()
			r.shutdown()
			r.notBusy(func() error { return r.s.Unmount(t.Context(), r.target) }) // the first Shutdown ends
			r.notBusy(func() error { return r.s.Close(t.Context(), r.dev) })
			r.wantGone()

			resume = disk.hang()
			wantErr(t, r.s.Close(short(), r.dev), context.DeadlineExceeded, "close "+r.dev+": the kernel does not answer")
			wantErr(t, r.s.Close(short(), r.dev), mount.ErrBusy, "busy")
			resume()
			r.notBusy(func() error { return r.s.Close(t.Context(), r.dev) }) // the first ones end
			r.mount()
			r.wantContent("f", "synced")
			r.unmount()
			r.wantGone()
		})
	}
}
