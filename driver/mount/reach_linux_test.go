package mount_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// TestIsCutOff shares a directory between two mounts, as Docker and a managed plugin
// do, and takes one of them away.
func TestIsCutOff(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	do := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	do("make all private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	top := t.TempDir()
	docker, plugin := filepath.Join(top, "docker"), filepath.Join(top, "plugin")
	do("make directory", os.Mkdir(docker, 0o755))
	do("make directory", os.Mkdir(plugin, 0o755))
	want := func(cut bool, when string) {
		t.Helper()
		for range 2 {
			if got, err := mount.IsCutOff(plugin); got != cut || err != nil {
				t.Errorf("%s: got %v, %v, want %v", when, got, err, cut)
			}
		}
		for _, dir := range []string{docker, plugin} {
			if left, err := os.ReadDir(dir); len(left) != 0 || err != nil {
				t.Errorf("%s: left in %s: %v, %v", when, dir, left, err)
			}
		}
	}
	want(false, "a directory")
	do("mount", unix.Mount(docker, docker, "", unix.MS_BIND, ""))
	do("mount", unix.Mount(docker, plugin, "", unix.MS_BIND, ""))
	want(false, "never shared")
	do("unmount", unix.Unmount(plugin, unix.MNT_DETACH))
	do("share", unix.Mount("", docker, "", unix.MS_SHARED, ""))
	do("mount", unix.Mount(docker, plugin, "", unix.MS_BIND, ""))
	want(false, "shared")

	probe := filepath.Join(plugin, ".probe") // of a process that was killed
	do("make directory", os.Mkdir(probe, 0))
	do("mount", unix.Mount("probe", probe, "tmpfs", 0, ""))
	want(false, "with a probe left")

	do("unmount", unix.Unmount(docker, unix.MNT_DETACH))
	want(true, "unmounted by Docker")
	do("unmount", unix.Unmount(plugin, unix.MNT_DETACH))
	want(false, "unmounted")
}
