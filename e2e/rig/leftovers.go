package rig

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// loop is an attached loop device.
type loop struct {
	device string
	file   fileID
}

// fileID is a file whatever it is called.
type fileID struct{ device, inode string }

func loops(ctx context.Context) ([]loop, error) {
	out, err := output(exec.CommandContext(ctx, "losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-MAJ:MIN,BACK-INO"), "losetup")
	if err != nil {
		return nil, err
	}
	var all []loop
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 {
			all = append(all, loop{f[0], fileID{f[1], f[2]}})
		}
	}
	return all, nil
}

// detachLoops detaches the loop devices whose files are below dir.
func detachLoops(ctx context.Context, dir string) error {
	attached, err := loops(ctx)
	if err != nil || len(attached) == 0 {
		return err
	}
	ours := make(map[fileID]bool)
	for _, pattern := range []string{"shared", "*/lib/flocker"} {
		roots, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, root := range roots {
			err := filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() {
					return err
				}
				info, err := e.Info()
				if err != nil {
					return err
				}
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					major, minor := st.Dev>>8&0xfff, st.Dev&0xff|st.Dev>>12&0xfff00
					ours[fileID{fmt.Sprintf("%d:%d", major, minor), fmt.Sprint(st.Ino)}] = true
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("find the rig's loop devices: %w", err)
			}
		}
	}
	return detach(ctx, func(l loop) bool { return ours[l.file] })
}

// detach detaches the loop devices chosen and waits until they are free: the
// kernel does it only when the last namespace that has one mounted is gone.
func detach(ctx context.Context, chosen func(loop) bool) error {
	for {
		attached, err := loops(ctx)
		if err != nil {
			return err
		}
		var left []string
		for _, l := range attached {
			if chosen(l) {
				left = append(left, l.device)
				_ = exec.CommandContext(ctx, "losetup", "--detach", l.device).Run()
			}
		}
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("detach %s: %w", strings.Join(left, ", "), context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// removeCgroups removes the control groups that the Docker hosts below dir have
// made. They are named after containers and plugins.
func removeCgroups(dir string) error {
	ids := make(map[string]bool)
	for _, pattern := range []string{"*/lib/docker/containers/*", "*/lib/docker/plugins/*"} {
		paths, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range paths {
			if id := filepath.Base(path); len(id) == 64 {
				ids[id] = true
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	var groups []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // somebody else's, just gone
		case err != nil:
			return err
		case e.IsDir() && ids[e.Name()]:
			groups = append(groups, path)
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("find the rig's control groups: %w", err)
	}
	for _, group := range groups {
		if err := removeCgroup(group); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroup removes a control group and those in it. The files in one are the
// kernel's and go with it.
func removeCgroup(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return syscall.Rmdir(path)
}
