package mount_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

const testMiB = 1 << 20

var kinds = []struct {
	fs   string
	size int64
}{{"ext4", 64 * testMiB}, {"xfs", 320 * testMiB}, {"btrfs", 128 * testMiB}}

// eachFS runs a test for each filesystem, on a blank device.
func eachFS(t *testing.T, test func(r *rig)) {
	t.Helper()
	for _, k := range kinds {
		t.Run(k.fs, func(t *testing.T) {
			needRoot(t)
			needProgram(t, "mkfs."+k.fs)
			test(newRig(t, k.fs, k.size))
		})
	}
}

func needProgram(tb testing.TB, name string) {
	tb.Helper()
	_, err := exec.LookPath(name)
	need(tb, "root", err == nil, "needs "+name)
}

// rig is a formatted device and a place to mount it.
type rig struct {
	t                 *testing.T
	s                 *mount.System
	size              int64
	fs, id            string
	dev, file, target string
	guard             bool
	mkfs              string // options
}

func newRig(t *testing.T, fs string, size int64) *rig {
	t.Helper()
	r := &rig{t: t, s: &mount.System{}, size: size, fs: fs, id: uuid.NewString()}
	needRoot(t)
	r.file = newFile(t, size)
	r.dev = attach(t, r.file)
	t.Cleanup(func() { detach(t, r.dev, r.file) })
	r.target = newTarget(t)
	return r
}

// newTarget returns a path to mount on. Whatever is left there is cleared away at
// the end, so that one failure does not become many.
func newTarget(t *testing.T) string {
	t.Helper()
	target := filepath.Join(t.TempDir(), "v")
	t.Cleanup(func() {
		for unix.Unmount(target, unix.MNT_DETACH) == nil {
			t.Errorf("%s was still mounted", target)
		}
		if _, err := os.Lstat(target); err == nil {
			_ = exec.Command("chattr", "-i", target).Run()
		}
	})
	return target
}

func (r *rig) formatSpec() mount.FormatSpec {
	return mount.FormatSpec{
		Device: r.dev, FS: r.fs, UUID: r.id, Label: "a-name-that-is-too-long-for-most", Guard: r.guard, Options: r.mkfs,
	}
}

func (r *rig) spec() mount.Spec {
	return mount.Spec{Device: r.dev, FS: r.fs, UUID: r.id, Target: r.target}
}

func (r *rig) format() {
	r.t.Helper()
	if err := r.s.Format(r.t.Context(), r.formatSpec()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) mount() (warnings []string) {
	r.t.Helper()
	warnings, err := r.s.Mount(r.t.Context(), r.spec(), mount.Owner{})
	if err != nil {
		r.t.Fatal(err)
	}
	return warnings
}

func (r *rig) unmount() {
	r.t.Helper()
	if err := r.s.Unmount(r.t.Context(), r.target); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) close() {
	r.t.Helper()
	if err := r.s.Close(r.t.Context(), r.dev); err != nil {
		r.t.Fatal(err)
	}
}

// notBusy makes a call until it is not refused because of somebody who is about to end.
func (r *rig) notBusy(call func() error) {
	r.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := call()
		if err == nil {
			return
		}
		if !errors.Is(err, mount.ErrBusy) || time.Now().After(end) {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) data(name string) string { return filepath.Join(r.target, mount.DataDir, name) }

func (r *rig) write(name, content string) {
	r.t.Helper()
	f, err := os.Create(r.data(name))
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(content); err != nil {
		r.t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wantContent(name, want string) {
	r.t.Helper()
	got, err := os.ReadFile(r.data(name))
	if err != nil || string(got) != want {
		r.t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
	}
}

// wantGone asserts that nothing of a mount is left.
func (r *rig) wantGone() {
	r.t.Helper()
	if got, err := r.s.Mounted(r.target); got != "" || err != nil {
		r.t.Errorf("mounted: got %q, %v, want nothing", got, err)
	}
	if _, err := os.Lstat(r.target); !errors.Is(err, os.ErrNotExist) {
		r.t.Errorf("the target is still there: %v", err)
	}
	if err := r.s.Close(r.t.Context(), r.dev); err != nil {
		r.t.Errorf("the device is not closed: %v", err)
	}
}

func wantErr(tb testing.TB, err, class error, text string) {
	tb.Helper()
	if !errors.Is(err, class) || !strings.Contains(fmt.Sprint(err), text) {
		tb.Errorf("got error %v, want one that is %q and says %q", err, class, text)
	}
}

func TestLife(t *testing.T) {
	eachFS(t, func(r *rig) {
		t, fs := r.t, r.fs
		r.format()
		owner := mount.Owner{UID: 12, GID: 34, Mode: 0o750 | os.ModeSetgid}
		for range 2 { // the second is a repeated call
			if warnings, err := r.s.Mount(t.Context(), r.spec(), owner); err != nil || len(warnings) > 0 {
				t.Fatalf("mount: %v, %v", warnings, err)
			}
		}
		if got, err := r.s.Mounted(r.target); got != r.dev || err != nil {
			t.Errorf("mounted: got %q, %v, want %q", got, err, r.dev)
		}
		infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.target))
		if err != nil || len(infos) != 1 || infos[0].FSType != fs {
			t.Fatalf("mount table: got %v, %v, want one %s", infos, err, fs)
		}
		wantDir := func() {
			t.Helper()
			var st unix.Stat_t
			if statErr := unix.Stat(r.data("."), &st); statErr != nil {
				t.Fatal(statErr)
			}
			if got, want := fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode&0o7777), "12:34 2750"; got != want {
				t.Errorf("data directory: got %s, want %s", got, want)
			}
			if entries, readErr := os.ReadDir(r.data(".")); readErr != nil || len(entries) > 1 {
				t.Errorf("data directory: got %v, %v", entries, readErr)
			}
		}
		wantDir()
		r.write("f", "kept")
		r.unmount()
		r.unmount() // nothing mounted
		r.close()
		r.wantGone()

		spec := r.spec()
		spec.Options = "noatime,nodev,discard"
		if _, err = r.s.Mount(t.Context(), spec, mount.Owner{UID: 99, Mode: 0o777}); err != nil {
			t.Fatal(err)
		}
		wantDir() // an existing one is never changed
		r.wantContent("f", "kept")
		infos, err = mountinfo.GetMounts(mountinfo.SingleEntryFilter(r.target))
		if err != nil || len(infos) != 1 {
			t.Fatal(infos, err)
		}
		all := infos[0].Options + "," + infos[0].VFSOptions
		for _, o := range []string{"noatime", "nodev", "discard"} {
			if !strings.Contains(all, o) {
				t.Errorf("options: got %s, want %s in it", all, o)
			}
		}
		r.unmount()
		r.wantGone()
	})
}

func TestManyVolumesAtATime(t *testing.T) {
	var all sync.WaitGroup
	for range 6 {
		r := newRig(t, "ext4", 16*testMiB)
		all.Go(func() {
			steps := []func() error{
				func() error { return r.s.Format(t.Context(), r.formatSpec()) },
				func() error { _, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{}); return err },
				func() error { return os.WriteFile(r.data("f"), []byte(r.id), 0o600) },
				func() error { return r.s.Unmount(t.Context(), r.target) },
				func() error { return r.s.Close(t.Context(), r.dev) },
			}
			for i, step := range append(steps, steps[1:]...) {
				if err := step(); err != nil {
					t.Errorf("step %d: %v", i, err)
					return
				}
			}
		})
	}
	all.Wait()
}

func TestMountRefusesAnotherFilesystem(t *testing.T) {
	eachFS(t, func(r *rig) {
		t, fs := r.t, r.fs
		_, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{})
		wantErr(t, err, mount.ErrIdentity, "mount "+r.dev+": not the expected filesystem: found none, expected "+fs+" with UUID "+r.id)
		r.wantGone()
		r.format()
		spec := r.spec()
		spec.UUID = uuidB
		_, err = r.s.Mount(t.Context(), spec, mount.Owner{})
		wantErr(t, err, mount.ErrIdentity, "found "+fs+" with UUID "+r.id+", expected "+fs+" with UUID "+uuidB)
		spec = r.spec()
		spec.FS = map[string]string{"ext4": "btrfs", "xfs": "ext4", "btrfs": "xfs"}[fs]
		_, err = r.s.Mount(t.Context(), spec, mount.Owner{})
		wantErr(t, err, mount.ErrIdentity, "found "+fs+" with UUID "+r.id+", expected "+spec.FS+" with UUID "+r.id)
		r.wantGone()
	})
}

func TestMountRefusesWhatIsNoUse(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.format()
	for _, c := range []struct {
		name   string
		change func(*mount.Spec)
		class  error
		text   string
	}{
		{"option", func(s *mount.Spec) { s.Options = "noatime,ro" }, mount.ErrInvalid, `invalid mount option "ro": valid for ext4 are acl, async, `},
		{"filesystem", func(s *mount.Spec) { s.FS = "zfs" }, mount.ErrInvalid, `invalid filesystem "zfs": use btrfs, ext4, xfs`},
		{"uuid", func(s *mount.Spec) { s.UUID = "x" }, mount.ErrInvalid, `invalid UUID "x"`},
		{"relative target", func(s *mount.Spec) { s.Target = "x" }, mount.ErrInvalid, `invalid target "x"`},
		{"no such device", func(s *mount.Spec) { s.Device = "/dev/none" }, os.ErrNotExist, "/dev/none"},
		{"a file", func(s *mount.Spec) { s.Device = r.file }, nil, "not a block device"},
		{"parent is gone", func(s *mount.Spec) { s.Target = "/no/such/dir" }, os.ErrNotExist, "find the directory of target /no/such/dir"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := r.spec()
			c.change(&spec)
			_, err := r.s.Mount(t.Context(), spec, mount.Owner{})
			if c.class == nil {
				c.class = err
			}
			if err == nil {
				t.Fatal("no error")
			}
			wantErr(t, err, c.class, c.text)
		})
	}
	r.wantGone()
}

func TestMountOnATakenTarget(t *testing.T) {
	r, other := newRig(t, "ext4", 8*testMiB), newRig(t, "ext4", 8*testMiB)
	r.format()
	other.format()
	r.mount()
	spec := other.spec()
	spec.Target = r.target
	_, err := r.s.Mount(t.Context(), spec, mount.Owner{})
	wantErr(t, err, mount.ErrBusy, r.dev+" (ext4, its directory /) is mounted on "+r.target+" already")
	if got, _ := r.s.Mounted(r.target); got != r.dev {
		t.Errorf("mounted: got %q, want %q", got, r.dev)
	}
	// stacked, as a crash between two processes could leave it
	for _, dev := range []string{other.dev, r.dev} {
		if err := unix.Mount(dev, r.target, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	r.unmount()
	r.wantGone()
	other.wantGone()
}

func TestUndoAtEachStep(t *testing.T) {
	eachFS(t, func(r *rig) {
		t := r.t
		r.format()
		for _, step := range []string{"mount", "data directory", "move", "moved"} {
			t.Run(step, func(t *testing.T) {
				reached := false
				s := mount.WithFault(func(at string) error {
					if at == step {
						reached = true
						return errors.New("fault")
					}
					return nil
				})
				_, err := s.Mount(t.Context(), r.spec(), mount.Owner{})
				if err == nil || err.Error() != "mount "+r.dev+": fault" || !reached {
					t.Errorf("got %v, want the fault alone", err)
				}
				r.wantGone()
			})
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("client has gone"))
		if _, err := r.s.Mount(ctx, r.spec(), mount.Owner{}); err == nil || !strings.Contains(err.Error(), "client has gone") {
			t.Errorf("got %v, want the context's cause", err)
		}
		r.wantGone()
		r.mount()
		r.unmount()
		r.wantGone()
	})
}

func TestBareTargetTakesNoFiles(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.format()
	r.mount()
	if err := unix.Unmount(r.target, 0); err != nil { // somebody else, by hand
		t.Fatal(err)
	}
	err := os.WriteFile(filepath.Join(r.target, "x"), nil, 0o600)
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the bare target as root: got %v, want EPERM", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(r.target, &st); err != nil || st.Mode&0o7777 != 0 || st.Uid != 0 {
		t.Errorf("bare target: got mode %o of uid %d, %v, want 0 of root", st.Mode&0o7777, st.Uid, err)
	}
	r.mount() // on what is there
	r.write("f", "x")
	r.unmount()
	r.wantGone()
}

func TestTargetWithFilesOfItsOwn(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.format()
	if err := os.Mkdir(r.target, 0o777); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(r.target, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(r.mount(), "\n"); !strings.Contains(got, "has files of its own (precious, …)") {
		t.Errorf("warnings: got %q", got)
	}
	r.unmount()
	if _, err := os.ReadFile(file); err != nil {
		t.Errorf("what was below the mount is gone: %v", err)
	}
	if out, err := exec.Command("chattr", "-i", r.target).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestTargetThatIsALink(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.format()
	if err := os.Symlink(t.TempDir(), r.target); err != nil {
		t.Fatal(err)
	}
	if _, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{}); err == nil || !strings.Contains(err.Error(), "open target") {
		t.Errorf("got %v, want a refusal to follow", err)
	}
	if err := os.Remove(r.target); err != nil {
		t.Errorf("the link: %v", err)
	}
	r.wantGone()
	// A link above it is followed, and found again.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(r.target), link); err != nil {
		t.Fatal(err)
	}
	plain := r.target
	r.target = filepath.Join(link, "v")
	r.mount()
	for _, path := range []string{r.target, plain} {
		if got, err := r.s.Mounted(path); got != r.dev || err != nil {
			t.Errorf("mounted on %s: got %q, %v, want %q", path, got, err, r.dev)
		}
	}
	r.mount()
	r.unmount()
	r.wantGone()
}

func TestBusyUnmount(t *testing.T) {
	eachFS(t, func(r *rig) {
		t := r.t
		r.format()
		r.mount()
		f, err := os.Create(r.data("f"))
		if err != nil {
			t.Fatal(err)
		}
		err = r.s.Unmount(t.Context(), r.target)
		wantErr(t, err, mount.ErrBusy, "unmount "+r.target+": busy: a process on this host has files open in it")
		if got, _ := r.s.Mounted(r.target); got != r.dev {
			t.Errorf("mounted: got %q, want %q", got, r.dev)
		}
		wantErr(t, r.s.Close(t.Context(), r.dev), mount.ErrBusy, "close "+r.dev+": busy: "+r.dev+" is mounted or open elsewhere on this host")
		wantErr(t, r.s.Format(t.Context(), r.formatSpec()), mount.ErrBusy, "busy")
		time.AfterFunc(10*time.Millisecond, func() { f.Close() }) // within the retries
		r.unmount()
		r.wantGone()
	})
}

// A container's mount namespace keeps the filesystem when the plugin's has let go
// of it: umount returns 0, and the device must not be taken away.
func TestCloseSeesOtherNamespaces(t *testing.T) {
	needProgram(t, "unshare")
	eachFS(t, func(r *rig) {
		t := r.t
		r.format()
		r.mount()
		child := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c",
			`cd "$1" && echo ready && read line; echo "$line" > late && sync late && echo written && read line`, "sh", r.data("."))
		in, err := child.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = child.Process.Kill(); _ = child.Wait() })
		said := func(want string) {
			t.Helper()
			b := make([]byte, len(want))
			if _, err := io.ReadFull(out, b); err != nil || string(b) != want {
				t.Fatalf("child: got %q, %v, want %q", b, err, want)
			}
		}
		said("ready\n")
		r.unmount()
		wantErr(t, r.s.Close(t.Context(), r.dev), mount.ErrBusy, "busy")
		fmt.Fprintln(in, "still writing")
		said("written\n")
		wantErr(t, r.s.Close(t.Context(), r.dev), mount.ErrBusy, "busy")

		// A container here may have it again meanwhile: it is the same filesystem.
		r.mount()
		r.wantContent("late", "still writing\n")
		r.unmount()

		_ = child.Process.Kill()
		// Close waits for the namespace to go, if not as long as a busy machine may take.
		r.notBusy(func() error { return r.s.Close(t.Context(), r.dev) })
		_ = child.Wait()
		r.wantGone()
	})
}

func TestCloseOfNoDevice(t *testing.T) {
	needRoot(t)
	err := (&mount.System{}).Close(t.Context(), "/dev/none")
	wantErr(t, err, os.ErrNotExist, "close /dev/none: open /dev/none: no such file or directory")
}

// A crash leaves the journal to be replayed; what was synced is there.
func TestDirtyJournal(t *testing.T) {
	eachFS(t, func(r *rig) {
		t := r.t
		r.format()
		r.mount()
		r.write("f", "synced")
		crashed := filepath.Join(t.TempDir(), "crashed") // the disk as a power cut would leave it
		mustRun(t, "cp", "--sparse=always", r.file, crashed)
		r.unmount()
		r.wantGone()
		detach(t, r.dev, r.file)
		mustRun(t, "cp", "--sparse=always", crashed, r.file)
		r.dev = attach(t, r.file)
		r.mount()
		r.wantContent("f", "synced")
		r.unmount()
		r.wantGone()
	})
}

func TestMountRepairs(t *testing.T) {
	needProgram(t, "tune2fs")
	r := newRig(t, "ext4", 64*testMiB)
	r.format()
	r.mount()
	r.write("f", "kept")
	r.unmount()
	mustRun(t, "tune2fs", "-E", "force_fsck", r.dev)
	r.mount()
	r.wantContent("f", "kept")
	r.unmount()
	if got := mustRun(t, "dumpe2fs", "-h", r.dev); !strings.Contains(got, "Filesystem state:         clean\n") {
		t.Errorf("not checked: %s", got)
	}

	// errors that a person has to look at: the root directory is gone
	mustRun(t, "debugfs", "-w", "-R", "clri <2>", r.dev)
	mustRun(t, "tune2fs", "-E", "force_fsck", r.dev)
	_, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{})
	wantErr(t, err, mount.ErrDamaged, "its errors are not safe to repair unattended; make a copy of "+r.dev+", then run e2fsck on it")
	r.wantGone()

	t.Setenv("PATH", "")
	_, err = r.s.Mount(t.Context(), r.spec(), mount.Owner{})
	wantErr(t, err, mount.ErrUnsupported, "run e2fsck: not supported here: the program is not installed (Debian package e2fsprogs)")
}

func mustRun(tb testing.TB, program string, args ...string) string {
	tb.Helper()
	needProgram(tb, program)
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s: %v: %s", program, err, out)
	}
	return string(out)
}

func TestMountOfAReadOnlyDevice(t *testing.T) {
	eachFS(t, func(r *rig) {
		t := r.t
		r.format()
		mustRun(t, "blockdev", "--setro", r.dev)
		t.Cleanup(func() { mustRun(t, "blockdev", "--setrw", r.dev) }) // it would stick to the loop device
		if _, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{}); err == nil || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("got %v, want an error that says read-only", err)
		}
		mustRun(t, "blockdev", "--setrw", r.dev)
		r.wantGone()
	})
}

func TestGrow(t *testing.T) {
	eachFS(t, func(r *rig) {
		t, size := r.t, r.size
		needProgram(t, "resize2fs")
		r.format()
		r.mount()
		r.write("f", "kept")
		blocks := func() int64 {
			var st unix.Statfs_t
			if err := unix.Statfs(r.target, &st); err != nil {
				t.Fatal(err)
			}
			return int64(st.Blocks) * st.Bsize
		}
		before := blocks()
		r.unmount()
		r.close()
		// an odd tail, which no filesystem can use, must not be tried for ever
		for _, n := range []int64{4*size + 700<<10, 4*size + 700<<10 + 512} {
			grow(t, r.dev, r.file, n)
			if warnings := r.mount(); len(warnings) > 0 {
				t.Errorf("warnings: %q", warnings)
			}
			if got, least := blocks(), 3*before; got < least {
				t.Errorf("size after growing the device fourfold: got %d, want at least %d", got, least)
			}
			r.wantContent("f", "kept")
			r.unmount()
		}
		s := mount.WithFault(func(step string) error {
			if step == "check" {
				return errors.New("tried to grow what is as large as it can be")
			}
			return nil
		})
		if _, err := s.Mount(t.Context(), r.spec(), mount.Owner{}); err != nil {
			t.Error(err)
		}
		r.unmount()
		r.wantGone()
	})
}

// A filesystem that another namespace keeps is mounted as it is, with a warning.
func TestGrowHasToWait(t *testing.T) {
	r := newRig(t, "ext4", 64*testMiB)
	if hasResource(t) {
		t.Skip("this process grows a mounted ext4")
	}
	r.format()
	r.mount()
	other := newTarget(t)
	grow(t, r.dev, r.file, 256*testMiB)
	spec := r.spec()
	spec.Target = other
	warnings, err := r.s.Mount(t.Context(), spec, mount.Owner{})
	if want := r.dev + " is mounted elsewhere on this host: its check or growth has to wait"; err != nil || len(warnings) != 1 || warnings[0] != want {
		t.Errorf("got %q, %v, want %q", warnings, err, want)
	}
	if err := r.s.Unmount(t.Context(), other); err != nil {
		t.Error(err)
	}
	r.unmount()
	r.wantGone()
}

// Growing is a nicety: without it the volume is mounted as it is.
func TestGrowThatFails(t *testing.T) {
	r := newRig(t, "ext4", 64*testMiB)
	if hasResource(t) {
		t.Skip("this process grows a mounted ext4")
	}
	r.format()
	grow(t, r.dev, r.file, 256*testMiB)
	s := mount.WithFault(func(step string) error {
		if step == "grow" {
			return errors.New("fault")
		}
		return nil
	})
	warnings, err := s.Mount(t.Context(), r.spec(), mount.Owner{})
	if want := "ext4 stays at 67108864 bytes on a device of 268435456: fault"; err != nil || len(warnings) != 1 || warnings[0] != want {
		t.Errorf("got %q, %v, want %q", warnings, err, want)
	}
	r.unmount()
	r.wantGone()
}

// A device that is gone cannot be written to: that is said once, and does not keep
// the volume mounted for ever.
func TestUnmountThatLosesWrites(t *testing.T) {
	r := newRig(t, "ext4", 8*testMiB)
	r.format()
	r.mount()
	s := mount.WithFault(func(step string) error {
		if step == "syncfs" {
			return unix.EIO
		}
		return nil
	})
	err := s.Unmount(t.Context(), r.target)
	wantErr(t, err, unix.EIO, "unmount "+r.target+": it is unmounted, but its last writes may be lost: write back: input/output error")
	if err := s.Unmount(t.Context(), r.target); err != nil {
		t.Errorf("again: %v", err)
	}
	r.wantGone()
}

func hasResource(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var caps uint64
		if n, _ := fmt.Sscanf(line, "CapEff:\t%x", &caps); n == 1 {
			return caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("no CapEff")
	return false
}

func TestFormatNeverTakesForeignData(t *testing.T) {
	eachFS(t, func(r *rig) {
		t, fs, size := r.t, r.fs, r.size
		for _, c := range []struct {
			name, text string
			put        func(r *rig)
		}{
			{"first byte", "not blank: there is unknown data at byte 0,", putAt(0)},
			{"end of the first MiB", fmt.Sprintf("unknown data at byte %d,", testMiB-1), putAt(testMiB - 1)},
			{"start of the last MiB", fmt.Sprintf("unknown data at byte %d,", size-testMiB), putAt(size - testMiB)},
			{"last byte", fmt.Sprintf("unknown data at byte %d,", size-1), putAt(size - 1)},
			{"a mark of another volume", "unknown data at byte 524288,", func(r *rig) {
				f := openRW(r.t, r.dev)
				fmt.Fprintf(io.NewOffsetWriter(f, 512<<10), "flocker: the mkfs for %s has not ended\n", uuidB)
			}},
			{"ext4", "there is ext4 with UUID " + uuidB + " on it", func(r *rig) {
				mustRun(r.t, "mkfs.ext4", "-q", "-F", "-U", uuidB, r.dev)
			}},
			{"xfs", "there is xfs with UUID " + uuidB + " on it", func(r *rig) {
				if size < 300*testMiB {
					r.t.Skip("too small")
				}
				mustRun(r.t, "mkfs.xfs", "-q", "-f", "-m", "uuid="+uuidB, r.dev)
			}},
			{"btrfs", "there is btrfs with UUID " + uuidB + " on it", func(r *rig) {
				mustRun(r.t, "mkfs.btrfs", "-q", "-f", "-M", "-U", uuidB, r.dev)
			}},
			{"ext2", "there is ext4 with UUID " + uuidB + " on it", func(r *rig) {
				mustRun(r.t, "mkfs.ext2", "-q", "-F", "-U", uuidB, r.dev)
			}},
			{"swap", "unknown data at byte 1024,", func(r *rig) { mustRun(r.t, "mkswap", r.dev) }},
		} {
			t.Run(c.name, func(t *testing.T) {
				r := newRig(t, fs, size)
				c.put(r)
				r.close()
				before := sum(t, r.file)
				wantErr(t, r.s.Format(t.Context(), r.formatSpec()), mount.ErrNotBlank, c.text)
				r.close()
				if got := sum(t, r.file); got != before {
					t.Error("the refused Format wrote to the device")
				}
			})
		}
	})
}

func openRW(t *testing.T, dev string) *os.File {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func putAt(at int64) func(r *rig) {
	return func(r *rig) {
		f := openRW(r.t, r.dev)
		if _, err := f.WriteAt([]byte{1}, at); err != nil {
			r.t.Fatal(err)
		}
		f.Close()
	}
}

// sum is a checksum of the parts of a sparse file that are there.
func sum(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	for end := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return fmt.Sprintf("%x", h.Sum(nil))
		}
		if err != nil {
			t.Fatal(err)
		}
		if end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(h, start, end)
		if _, err := io.Copy(h, io.NewSectionReader(f, start, end-start)); err != nil {
			t.Fatal(err)
		}
	}
}

// A finished filesystem of the volume's own is not made again, whatever the record
// says: the record may be from a backup.
func TestFormatKeepsWhatIsFinished(t *testing.T) {
	eachFS(t, func(r *rig) {
		r.format()
		r.mount()
		r.write("f", "kept")
		r.unmount()
		r.format()
		r.mount()
		r.wantContent("f", "kept")
		r.unmount()
		r.wantGone()
	})
}

// Whenever mkfs is stopped, the next Format ends well.
func TestInterruptedFormat(t *testing.T) {
	eachFS(t, func(r *rig) {
		t, fs, size := r.t, r.fs, r.size
		sizes := []int64{size, 4 * size}
		if fs == "ext4" {
			sizes = []int64{4 * testMiB, 9*testMiB + 512, size, 1 << 30, 3 << 30}
		}
		killed := 0
		for i, size := range sizes {
			r := newRig(t, fs, size)
			r.guard = i%2 > 0
			for _, step := range []string{"mkfs", "verify"} {
				s := mount.WithFault(func(at string) error {
					if at == step {
						return errors.New("fault")
					}
					return nil
				})
				if err := s.Format(t.Context(), r.formatSpec()); err == nil || !strings.HasSuffix(err.Error(), "fault") {
					t.Errorf("%s: got %v, want the fault", step, err)
				}
				if _, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{}); step == "mkfs" && !errors.Is(err, mount.ErrIdentity) {
					t.Errorf("mount of it: got %v, want ErrIdentity", err)
				} else if err == nil {
					r.unmount()
				}
			}
			for range 15 {
				blank(t, r.file)
				r.close()
				for range 3 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(25000))*time.Microsecond)
					err := r.s.Format(ctx, r.formatSpec())
					cancel()
					if errors.Is(err, mount.ErrNotBlank) {
						t.Fatalf("size %d: %v", size, err)
					}
					if err != nil {
						killed++
					}
				}
				r.format()
				r.mount()
				r.unmount()
				r.close()
			}
			checkFS(t, r)
		}
		if killed == 0 {
			t.Error("no mkfs was stopped: nothing was tested")
		}
		t.Logf("%d times stopped", killed)
	})
}

func blank(t *testing.T, file string) {
	t.Helper()
	f := openRW(t, file)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, st.Size()); err != nil {
		t.Fatal(err)
	}
}

// checkFS runs the filesystem's own full check, and looks for marks left over.
func checkFS(t *testing.T, r *rig) {
	t.Helper()
	switch r.fs {
	case "ext4":
		mustRun(t, "e2fsck", "-f", "-n", r.dev)
	case "xfs":
		mustRun(t, "xfs_repair", "-n", r.dev)
	case "btrfs":
		mustRun(t, "btrfs", "check", r.dev)
	}
	r.close()
	b := make([]byte, 512)
	f := openRW(t, r.file)
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{512 << 10, st.Size() - 512<<10} {
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("flocker")) {
			t.Errorf("there is a mark at %d", at)
		}
	}
}

func TestFormatErrors(t *testing.T) {
	r := newRig(t, "xfs", 299*testMiB)
	wantErr(t, r.s.Format(t.Context(), r.formatSpec()), mount.ErrInvalid, "format "+r.dev+" as xfs: invalid size: xfs needs at least 300 MiB, the device has 299 MiB")
	for _, c := range []struct {
		name   string
		change func(*mount.FormatSpec)
		class  error
		text   string
	}{
		{"option", func(s *mount.FormatSpec) { s.Options = "-L x" }, mount.ErrInvalid, `invalid mkfs option "-L": valid for ext4 are -C, -E,`},
		{"filesystem", func(s *mount.FormatSpec) { s.FS = "vfat" }, mount.ErrInvalid, `invalid filesystem "vfat": use btrfs, ext4, xfs`},
		{"uuid", func(s *mount.FormatSpec) { s.UUID = "x" }, mount.ErrInvalid, `invalid UUID "x"`},
		{"no device", func(s *mount.FormatSpec) { s.Device = "/dev/none" }, os.ErrNotExist, "/dev/none"},
		{"mkfs refuses", func(s *mount.FormatSpec) { s.Options = "-b 1000" }, nil, "run mkfs.ext4: exit status 1: mkfs.ext4: invalid block size - 1000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := r.formatSpec()
			spec.FS = "ext4"
			c.change(&spec)
			err := r.s.Format(t.Context(), spec)
			if err == nil {
				t.Fatal("no error")
			}
			if c.class == nil {
				c.class = err
			}
			wantErr(t, err, c.class, c.text)
		})
	}
	spec := r.formatSpec()
	spec.FS = "ext4"
	t.Run("no mkfs", func(t *testing.T) {
		t.Setenv("PATH", "")
		wantErr(t, r.s.Format(t.Context(), spec), mount.ErrUnsupported, "not supported here: mkfs.ext4 is not installed (Debian package e2fsprogs)")
	})
	// and none of it keeps the next from working
	spec.Options = "-m 0 -E stride=2 -O ^metadata_csum"
	if err := r.s.Format(t.Context(), spec); err != nil {
		t.Error(err)
	}
	if got := mustRun(t, "dumpe2fs", "-h", r.dev); !strings.Contains(got, "Reserved block count:     0\n") || !strings.Contains(got, "a-name-that-is-t\n") {
		t.Errorf("options or label were not obeyed: %s", got)
	}
}

// A process that is being started has a copy of every descriptor for a moment, also
// of a device that Format has open exclusively.
func TestFormatWhileProcessesStart(t *testing.T) {
	needRoot(t)
	ctx, stop := context.WithCancel(t.Context())
	var others sync.WaitGroup
	for range 8 {
		others.Go(func() {
			for ctx.Err() == nil {
				_ = exec.CommandContext(ctx, "true").Run()
			}
		})
	}
	defer others.Wait()
	defer stop()
	for range 25 {
		r := newRig(t, "ext4", 64*testMiB)
		r.format()
		r.mount()
		r.unmount()
		r.close()
	}
}
