package mount_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// newGuarded is a rig with a guarded ext4 whose blocks have no checksums, so that a
// test can change them.
func newGuarded(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, "ext4", 64*testMiB)
	r.guard, r.mkfs = true, "-O ^metadata_csum"
	r.format()
	return r
}

// secondHost attaches the same disk once more, as another host would: this one's
// kernel does not know that the two are one.
func (r *rig) secondHost() *rig {
	r.t.Helper()
	dev := attach(r.t, r.file)
	r.t.Cleanup(func() { detach(r.t, dev, r.file) })
	return &rig{t: r.t, s: &mount.System{}, size: r.size, fs: r.fs, id: r.id, file: r.file, dev: dev, target: newTarget(r.t)}
}

// unclean leaves the disk as a host that ended with it mounted.
func (r *rig) unclean() {
	r.t.Helper()
	r.mount()
	r.write("f", "synced")
	crashed := filepath.Join(r.t.TempDir(), "crashed")
	mustRun(r.t, "cp", "--sparse=always", r.file, crashed)
	r.unmount()
	r.close()
	detach(r.t, r.dev, r.file)
	mustRun(r.t, "cp", "--sparse=always", crashed, r.file)
	r.dev = attach(r.t, r.file)
}

// atOnce is longer than what the kernel does not wait in takes on a busy machine. Its waits
// take 11 s or 22.
const atOnce = 10 * time.Second

// took is how long f takes.
func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start).Round(time.Millisecond)
}

func (r *rig) wantFeature(name string, want bool) {
	r.t.Helper()
	said := mustRun(r.t, "dumpe2fs", "-h", r.dev)
	_, features, _ := strings.Cut(said, "Filesystem features:")
	features, _, _ = strings.Cut(features, "\n")
	if got := slices.Contains(strings.Fields(features), name); got != want {
		r.t.Errorf("features: got %s, want %s in it: %v", features, name, want)
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	r.wantFeature("mmp", true)
	r.wantFeature("metadata_csum", false)
	if said := mustRun(t, "dumpe2fs", "-h", r.dev); !strings.Contains(said, "MMP update interval:      1\n") {
		t.Errorf("not updated each second: %s", said)
	}
	// What was unmounted, or shut down and unmounted, is mounted at once.
	var times []time.Duration
	for range 5 {
		times = append(times, took(func() { r.mount() }))
		r.write("f", "x")
		r.unmount()
		r.close()
	}
	r.mount()
	r.shutdown()
	r.unmount()
	r.close()
	times = append(times, took(func() { r.mount() }))
	r.unmount()
	if slices.Max(times) > atOnce {
		t.Errorf("mounts took %v", times)
	}
	t.Logf("mounts took %v", times)
	r.wantGone()

	for _, c := range []struct{ fs, options string }{{"ext4", "-O ^mmp"}, {"ext4", "-O none"}} {
		r := newRig(t, c.fs, 64*testMiB)
		r.guard, r.mkfs = true, c.options
		r.format()
		r.wantFeature("mmp", false)
	}
}

func TestGuardRefusesASecondHost(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	a := newGuarded(t)
	b := a.secondHost()
	a.mount()
	a.write("f", "of a")

	var err error
	before := time.Now()
	t.Logf("the refusal took %v", took(func() { _, err = b.s.Mount(ctx, b.spec(), mount.Owner{}) }))
	name, _ := os.Hostname()
	wantErr(t, err, mount.ErrMultiMount, fmt.Sprintf("mount %s: in use by another host: host %s has it mounted, as its device %s, and was last heard of at %s",
		b.dev, name, filepath.Base(a.dev), hour(err, before)))
	if errors.Is(err, mount.ErrBusy) {
		t.Error("it is ErrBusy as well: nobody on this host can end it")
	}
	b.wantGone()

	// so does the check, which is asked for before the mount
	setState(t, b, 2)
	_, err = b.s.Mount(ctx, b.spec(), mount.Owner{})
	wantErr(t, err, mount.ErrMultiMount, "in use by another host: host "+name+" has it mounted, as its device "+filepath.Base(a.dev))
	b.wantGone()

	a.write("g", "still of a")
	if err := a.s.Health(a.target); err != nil {
		t.Errorf("health: %v", err)
	}
	a.unmount()
	a.close()
	b.mount()
	b.wantContent("g", "still of a")
	b.unmount()
	b.wantGone()
}

// hour is the beginning of a time, not before one and not after now, as it is in an error.
func hour(err error, notBefore time.Time) string {
	const format = "2006-01-02T15:"
	if early := notBefore.UTC().Format(format); strings.Contains(fmt.Sprint(err), early) {
		return early
	}
	return time.Now().UTC().Format(format)
}

// setState writes the state to the superblock on the disk: 1 is in order, 2 asks for a
// check.
func setState(t *testing.T, r *rig, state byte) {
	t.Helper()
	f := openRW(t, r.dev)
	defer f.Close()
	if _, err := f.WriteAt([]byte{state, 0}, 1024+0x3a); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// EBUSY because of somebody on this host is not the guard's.
func TestGuardAndAUserOnThisHost(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	f, err := os.OpenFile(r.dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.s.Mount(t.Context(), r.spec(), mount.Owner{})
	wantErr(t, err, mount.ErrBusy, "busy")
	if errors.Is(err, mount.ErrMultiMount) {
		t.Errorf("got %v: there is no other host", err)
	}
	f.Close()
	r.mount()
	r.unmount()
	r.wantGone()
}

func TestGuardAfterAnUncleanEnd(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	r.unclean()
	t.Logf("the mount took %v", took(func() { r.mount() }))
	r.wantContent("f", "synced")
	r.unmount()
	r.close()
	if again := took(func() { r.mount() }); again > atOnce {
		t.Errorf("the next mount took %v", again)
	}
	r.unmount()
	r.wantGone()
}

// The kernel's wait ends at any signal: at the one that is meant to end it, and at no
// other, such as that of a child process that ends.
func TestInterruptible(t *testing.T) {
	sleep := func(d time.Duration) func() error {
		return func() error {
			thread := unix.Gettid()
			others, stop := context.WithTimeout(t.Context(), d)
			defer stop()
			go func() {
				for others.Err() == nil {
					for _, s := range []unix.Signal{unix.SIGCHLD, unix.SIGURG, unix.SIGIO} {
						_ = unix.Tgkill(os.Getpid(), thread, s)
					}
					time.Sleep(10 * time.Millisecond)
				}
			}()
			length := unix.NsecToTimespec(d.Nanoseconds())
			return unix.Nanosleep(&length, nil)
		}
	}
	if err := mount.Interruptible(t.Context(), sleep(200*time.Millisecond)); err != nil {
		t.Errorf("got %v, want no interruption", err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("no time"))
	defer cancel()
	var err error
	long := took(func() { err = mount.Interruptible(ctx, sleep(time.Minute)) })
	if fmt.Sprint(err) != "no time" || long > 30*time.Second {
		t.Errorf("got %v after %v, want the context's cause at once", err, long)
	}
	err = mount.Interruptible(t.Context(), func() error { return unix.EBUSY })
	wantErr(t, err, unix.EBUSY, "")
}

// Who has no time for the kernel's wait gets an answer in time, and no mount later.
func TestGuardAndADeadline(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	r.unclean()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		var err error
		long := took(func() { _, err = r.s.Mount(ctx, r.spec(), mount.Owner{}) })
		cancel()
		wantErr(t, err, context.DeadlineExceeded, "mount "+r.dev+": the time was over; after an unclean end the kernel needs 22 s or more, to see whether another host has it mounted: context deadline exceeded")
		if long > atOnce {
			t.Errorf("it took %v", long)
		}
		r.wantGone() // and closed: no mount is under way
	}
}

// The check has a mark of its own in the guard. Without the next step it would keep
// everybody from the volume for ever.
func TestGuardOfAnInterruptedCheck(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	setChecked(t, r.dev)
	_, err := r.s.Mount(t.Context(), r.spec(), mount.Owner{})
	wantErr(t, err, mount.ErrMultiMount, "mount "+r.dev+": in use by another host: e2fsck began a check of it on host ")
	_, command, _ := strings.Cut(fmt.Sprint(err), "if it does not run any more, type: ")
	words := strings.Fields(command)
	if len(words) != 5 {
		t.Fatalf("got %q, want a command", command)
	}
	mustRun(t, words[0], words[1:]...)
	r.mount()
	r.unmount()
	r.wantGone()
}

// setChecked writes what e2fsck does while it runs.
func setChecked(t *testing.T, dev string) {
	t.Helper()
	f := openRW(t, dev)
	defer f.Close()
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		t.Fatal(err)
	}
	at := int64(binary.LittleEndian.Uint64(sb[0x168:])) * int64(1024<<binary.LittleEndian.Uint32(sb[0x18:]))
	if _, err := f.WriteAt(binary.LittleEndian.AppendUint32(nil, 0xe24d4d50), at+4); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// A check that a deadline ends leaves nothing in the guard.
func TestGuardOfACheckThatIsEnded(t *testing.T) {
	r := newGuarded(t)
	setState(t, r, 2)
	dir := t.TempDir()
	script := "#!/bin/sh\nprintf '\\120\\115\\115\\342' | dd of=\"$2\" bs=1 seek=\"$(cat " + dir + "/at)\" conv=notrunc,fsync 2> /dev/null\n: > " + dir + "/began\nexec sleep 60\n"
	if err := os.WriteFile(filepath.Join(dir, "e2fsck"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	at := mustRun(t, "sh", "-c", `dumpe2fs -h "$1" 2> /dev/null | sed -n 's/^MMP block number: *//p'`, "sh", r.dev)
	var block int
	if _, err := fmt.Sscan(at, &block); err != nil {
		t.Fatalf("%q: %v", at, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "at"), fmt.Append(nil, block*1024+4), 0o600); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", dir+":"+path)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	began := make(chan bool, 1)
	go func() {
		defer cancel(context.DeadlineExceeded)
		for range 3000 {
			if _, err := os.Stat(filepath.Join(dir, "began")); err == nil {
				began <- true
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		began <- false
	}()
	_, err := r.s.Mount(ctx, r.spec(), mount.Owner{})
	wantErr(t, err, context.DeadlineExceeded, "run e2fsck: context deadline exceeded")
	if !<-began {
		t.Fatal("nothing was tested")
	}
	r.wantGone()
	if said := mustRun(t, "dumpe2fs", "-h", r.dev); !strings.Contains(said, "mmp_sequence: 0xff4d4d50\n") {
		t.Errorf("the guard is not clean: %s", said)
	}
	t.Setenv("PATH", path)
	setState(t, r, 1) // it needs no check any more, which would take its time
	if long := took(func() { r.mount() }); long > atOnce {
		t.Errorf("the mount took %v", long)
	}
	r.unmount()
	r.wantGone()
}

func TestGuardedGrows(t *testing.T) {
	t.Parallel()
	r := newGuarded(t)
	r.mount()
	r.write("f", "kept")
	r.unmount()
	r.close()
	grow(t, r.dev, r.file, 4*r.size)
	var warnings []string
	t.Logf("growth and mount took %v", took(func() { warnings = r.mount() }))
	if len(warnings) > 0 {
		t.Errorf("warnings: %q", warnings)
	}
	r.wantContent("f", "kept")
	var st unix.Statfs_t
	if err := unix.Statfs(r.target, &st); err != nil || int64(st.Blocks)*st.Bsize < 3*r.size {
		t.Errorf("size: got %d, %v", int64(st.Blocks)*st.Bsize, err)
	}
	r.unmount()
	r.wantGone()
}
