package mount_test

import (
	"context"
	"errors"
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
