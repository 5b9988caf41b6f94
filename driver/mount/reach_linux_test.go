package mount_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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

func TestBelow(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	top := t.TempDir()
	for _, dir := range []string{"root/a", "rooted"} {
		dir = filepath.Join(top, dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unmount(dir, 0) }()
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(top, "root/a"), &st); err != nil {
		t.Fatal(err)
	}
	want := mount.Point{Target: filepath.Join(top, "root/a"), Number: fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))}
	got, err := new(mount.System).Below(filepath.Join(top, "root"))
	if err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestLacks(t *testing.T) {
	t.Setenv("PATH", "")
	s := new(mount.System)
	for fs, want := range map[string][]string{
		"ext4":  {"mkfs.ext4 (package e2fsprogs)", "e2fsck (package e2fsprogs)", "resize2fs (package e2fsprogs)", "tune2fs (package e2fsprogs)"},
		"btrfs": {"mkfs.btrfs (package btrfs-progs)"},
	} {
		if got := s.Lacks(fs); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", fs, got, want)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mkfs.btrfs"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got := s.Lacks("btrfs"); got != nil {
		t.Errorf("all is there: %q", got)
	}
}
