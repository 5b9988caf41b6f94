package mount_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/driver/mount"
)

const (
	uuidA = "4a3f1a40-7c0f-4d39-8a53-0f2d9e6c1b7a"
	uuidB = "b5c1dd0e-0a3e-4a51-9d2f-6a7c8e9f0b1c"
)

func TestFakeLife(t *testing.T) {
	ctx := t.Context()
	disks := mount.NewFakeDisks()
	kernel := mount.NewFakeKernel("a", disks, nil)
	f := mount.NewFake(kernel)
	spec := mount.Spec{Device: "/dev/x", FS: "ext4", UUID: uuidA, Target: "/t"}

	if _, err := f.Mount(ctx, spec, mount.Owner{}); !errors.Is(err, mount.ErrIdentity) {
		t.Errorf("mount of a blank disk: got %v, want ErrIdentity", err)
	}
	if err := f.Format(ctx, mount.FormatSpec{Device: "/dev/x", FS: "ext4", UUID: uuidA}); err != nil {
		t.Fatal(err)
	}
	if err := f.Format(ctx, mount.FormatSpec{Device: "/dev/x", FS: "ext4", UUID: uuidB}); !errors.Is(err, mount.ErrNotBlank) {
		t.Errorf("second format: got %v, want ErrNotBlank", err)
	}
	if _, err := f.Mount(ctx, spec, mount.Owner{UID: 7}); err != nil {
		t.Fatal(err)
	}
	if got, want := disks.DataOwner("/dev/x").UID, 7; got != want {
		t.Errorf("owner: got %d, want %d", got, want)
	}

	f = mount.NewFake(kernel) // a restart
	if got, _ := f.Mounted("/t"); got != "/dev/x" {
		t.Errorf("mounted after a restart: got %q, want /dev/x", got)
	}
	free := kernel.Busy("/t")
	if err := f.Unmount(ctx, "/t"); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("busy unmount: got %v, want ErrBusy", err)
	}
	free()
	release := kernel.Hold("/dev/x")
	if err := f.Unmount(ctx, "/t"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(ctx, "/dev/x"); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("close while held: got %v, want ErrBusy", err)
	}
	release()
	release()
	if err := f.Close(ctx, "/dev/x"); err != nil {
		t.Errorf("close: %v", err)
	}
	want := []mount.FakeCall{
		{mount.CallMounted, "/t"},
		{mount.CallUnmount, "/t"},
		{mount.CallUnmount, "/t"},
		{mount.CallClose, "/dev/x"},
		{mount.CallClose, "/dev/x"},
	}
	if got := f.Calls(); !slices.Equal(got, want) {
		t.Errorf("calls: got %v, want %v", got, want)
	}
	if got := disks.Violations(); len(got) != 0 {
		t.Errorf("violations: %v", got)
	}
}

func TestFakePluginDisable(t *testing.T) {
	disks := mount.NewFakeDisks()
	disks.SetFilesystem("v", "xfs", uuidA)
	kernel := mount.NewFakeKernel("a", disks, func(string) (string, bool) { return "v", true })
	f := mount.NewFake(kernel)
	spec := mount.Spec{Device: "/dev/x", FS: "xfs", UUID: uuidA, Target: "/t"}
	if _, err := f.Mount(t.Context(), spec, mount.Owner{}); err != nil {
		t.Fatal(err)
	}
	release := kernel.DisablePlugin()
	if got, _ := f.Mounted("/t"); got != "" {
		t.Errorf("mounted: got %q, want none", got)
	}
	if err := f.Close(t.Context(), "/dev/x"); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("close: got %v, want ErrBusy", err)
	}
	release()
	if err := f.Close(t.Context(), "/dev/x"); err != nil {
		t.Errorf("close: %v", err)
	}
	if kernel.InUse("/dev/x") {
		t.Error("still in use")
	}
}

func TestFakeSeesTwoWriters(t *testing.T) {
	disks := mount.NewFakeDisks()
	disks.SetFilesystem("v", "ext4", uuidA)
	spec := mount.Spec{Device: "v", FS: "ext4", UUID: uuidA, Target: "/t"}
	ka, kb := mount.NewFakeKernel("a", disks, nil), mount.NewFakeKernel("b", disks, nil)
	for _, k := range []*mount.FakeKernel{ka, kb} {
		if _, err := mount.NewFake(k).Mount(t.Context(), spec, mount.Owner{}); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"disk v is used by hosts [a b] at the same time"}
	if got := disks.Violations(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	ka.Reboot()
	if ka.InUse("v") || !kb.InUse("v") {
		t.Error("a reboot of a must end a's use only")
	}
}

func TestFakeInterference(t *testing.T) {
	disks := mount.NewFakeDisks()
	disks.SetFilesystem("v", "ext4", uuidA)
	f := mount.NewFake(mount.NewFakeKernel("a", disks, nil))
	spec := mount.Spec{Device: "v", FS: "ext4", UUID: uuidA, Target: "/t"}
	boom := errors.New("boom")

	f.SetHook(func(call, arg string) error {
		if call == mount.CallMount && arg == "/t" {
			return boom
		}
		return nil
	})
	if _, err := f.Mount(t.Context(), spec, mount.Owner{}); !errors.Is(err, boom) {
		t.Errorf("got %v, want boom", err)
	}
	f.SetHook(nil)
	if got, _ := f.Mounted("/t"); got != "" {
		t.Errorf("a failed mount had an effect: %q", got)
	}
	f.SetAfter(func(string, string) error { return boom })
	if _, err := f.Mount(t.Context(), spec, mount.Owner{}); !errors.Is(err, boom) {
		t.Errorf("got %v, want boom", err)
	}
	f.SetAfter(nil)
	if got, _ := f.Mounted("/t"); got != "v" {
		t.Errorf("a mount whose answer was lost had no effect: %q", got)
	}
	synctest.Test(t, func(t *testing.T) {
		f.SetDelay(func(string, string) time.Duration { return time.Hour })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := f.Unmount(ctx, "/t"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

// fakeHosts is two hosts with one ext4 disk.
func fakeHosts(guard bool) (disks *mount.FakeDisks, kernels []*mount.FakeKernel, fakes []*mount.Fake, spec mount.Spec) {
	disks = mount.NewFakeDisks()
	for _, host := range []string{"a", "b"} {
		kernels = append(kernels, mount.NewFakeKernel(host, disks, nil))
		fakes = append(fakes, mount.NewFake(kernels[len(kernels)-1]))
	}
	spec = mount.Spec{Device: "v", FS: "ext4", UUID: uuidA, Target: "/t"}
	err := fakes[0].Format(context.Background(), mount.FormatSpec{Device: "v", FS: "ext4", UUID: uuidA, Guard: guard})
	if err != nil {
		panic(err)
	}
	return disks, kernels, fakes, spec
}

func fakeMount(t *testing.T, f *mount.Fake, spec mount.Spec) {
	t.Helper()
	if _, err := f.Mount(t.Context(), spec, mount.Owner{}); err != nil {
		t.Fatal(err)
	}
}

func TestFakeShutdown(t *testing.T) {
	ctx := t.Context()
	disks, kernels, fakes, spec := fakeHosts(false)
	k, f := kernels[0], fakes[0]
	if err := f.Shutdown(ctx, "/t"); err != nil {
		t.Errorf("nothing mounted: %v", err)
	}
	fakeMount(t, f, spec)
	if err := errors.Join(k.Write("v"), f.Health("/t")); err != nil {
		t.Error(err)
	}
	release := k.Hold("v")
	for range 2 {
		if err := f.Shutdown(ctx, "/t"); err != nil {
			t.Error(err)
		}
	}
	if err := k.Write("v"); err == nil {
		t.Error("a write after the shutdown succeeded")
	}
	wantFakeErr(t, f.Health("/t"), mount.ErrDamaged)
	_, err := f.Mount(ctx, spec, mount.Owner{})
	wantFakeErr(t, err, mount.ErrBusy)

	fakeMount(t, fakes[1], spec) // it can take nothing from whoever has it now
	if err := errors.Join(kernels[1].Write("v"), fakes[1].Unmount(ctx, "/t"), f.Unmount(ctx, "/t")); err != nil {
		t.Error(err)
	}
	wantFakeErr(t, f.Close(ctx, "v"), mount.ErrBusy)
	_, err = f.Mount(ctx, spec, mount.Owner{})
	wantFakeErr(t, err, mount.ErrBusy)
	release()
	if err := f.Close(ctx, "v"); err != nil {
		t.Error(err)
	}
	fakeMount(t, f, spec)
	if err := errors.Join(k.Write("v"), f.Health("/t")); err != nil {
		t.Errorf("after the next mount: %v", err)
	}
	if got := disks.Violations(); len(got) > 0 {
		t.Errorf("violations: %v", got)
	}
}

func wantFakeErr(t *testing.T, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("got error %v, want one that is %q", err, class)
	}
}

func TestFakeShutdownOfBtrfs(t *testing.T) {
	disks := mount.NewFakeDisks()
	disks.SetFilesystem("v", "btrfs", uuidA)
	f := mount.NewFake(mount.NewFakeKernel("a", disks, nil))
	fakeMount(t, f, mount.Spec{Device: "v", FS: "btrfs", UUID: uuidA, Target: "/t"})
	wantFakeErr(t, f.Shutdown(t.Context(), "/t"), mount.ErrUnsupported)
}

func TestFakeCut(t *testing.T) {
	ctx := t.Context()
	disks, kernels, fakes, spec := fakeHosts(true)
	a, b := fakes[0], fakes[1]
	fakeMount(t, a, spec)
	disks.SetCut("v", "a", true)
	fakeMount(t, b, spec) // not refused, and no violation
	if err := kernels[0].Write("v"); err == nil {
		t.Error("a writes to what it was cut off from")
	}
	if err := kernels[1].Write("v"); err != nil {
		t.Error(err)
	}
	wantFakeErr(t, a.Unmount(ctx, "/t"), mount.ErrUnwritten)
	if err := a.Unmount(ctx, "/t"); err != nil {
		t.Error(err)
	}
	wantFakeErr(t, a.Close(ctx, "v"), mount.ErrUnwritten)
	if _, err := a.Mount(ctx, spec, mount.Owner{}); err == nil {
		t.Error("a mounts what it was cut off from")
	}
	if got := disks.Violations(); len(got) > 0 {
		t.Errorf("violations: %v", got)
	}

	disks.SetCut("v", "a", false)
	if err := errors.Join(a.Close(ctx, "v"), b.Unmount(ctx, "/t")); err != nil {
		t.Error(err)
	}
	fakeMount(t, a, spec)
	disks.SetCut("v", "a", true)
	if err := errors.Join(a.Shutdown(ctx, "/t"), a.Unmount(ctx, "/t"), a.Close(ctx, "v"), a.Close(ctx, "v")); err != nil {
		t.Errorf("after a shutdown: %v", err)
	}
	wantFakeErr(t, mount.NewFake(kernels[0]).Close(ctx, "v"), mount.ErrUnwritten) // a restart forgets it

	disks.SetCut("v", "a", false)
	fakeMount(t, a, spec)
	disks.SetCut("v", "a", true)
	fakeMount(t, b, spec)
	disks.SetCut("v", "a", false) // the fence was given up too early
	if got, want := disks.Violations(), []string{"disk v is used by hosts [a b] at the same time"}; !slices.Equal(got, want) {
		t.Errorf("violations: got %q, want %q", got, want)
	}
}

func TestFakeGuard(t *testing.T) {
	disks, kernels, fakes, spec := fakeHosts(true)
	fakeMount(t, fakes[0], spec)
	_, err := fakes[1].Mount(t.Context(), spec, mount.Owner{})
	wantFakeErr(t, err, mount.ErrMultiMount)
	if m := kernels[1].Mounts(); len(m) > 0 {
		t.Errorf("mounted all the same: %v", m)
	}
	if got, want := disks.Refusals(), []string{"disk v was refused to host b: hosts [a] use it"}; !slices.Equal(got, want) {
		t.Errorf("refusals: got %q, want %q", got, want)
	}
	if got := disks.Violations(); len(got) > 0 {
		t.Errorf("violations: %v", got)
	}
	spec.Target = "/u" // a second mount on one host is one user
	fakeMount(t, fakes[0], spec)
	kernels[0].Reboot() // it ended uncleanly, and is not there
	fakeMount(t, fakes[1], spec)
}

func TestFakeNoted(t *testing.T) {
	_, kernels, fakes, spec := fakeHosts(false)
	fakeMount(t, fakes[0], spec)
	kernels[0].SetNoted("v", "3 errors")
	err := fakes[0].Health("/t")
	wantFakeErr(t, err, mount.ErrDamaged)
	if got, want := fmt.Sprint(err), "health of /t: damaged: 3 errors"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := fakes[0].Unmount(t.Context(), "/t"); err != nil {
		t.Error(err)
	}
	fakeMount(t, fakes[0], spec) // checks it
	if err := fakes[0].Health("/t"); err != nil {
		t.Error(err)
	}
}
