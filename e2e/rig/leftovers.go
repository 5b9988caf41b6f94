package rig

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends/teststore"
)

// loop is an attached loop device.
type loop struct {
	device   string
	sequence string // the kernel gives it to a disk once
	name     string // lo_file_name: what its maker noted down; of the test storage, the file's name
	file     fileID
}

// fileID is a file whatever it is called.
type fileID struct{ device, inode uint64 }

// loops returns the attached loop devices of the machine, which are one set for
// all namespaces.
func loops() ([]loop, error) {
	attached, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	var all []loop
	for _, path := range attached {
		l := loop{device: "/dev/" + filepath.Base(filepath.Dir(path)), sequence: sequenceOf(filepath.Dir(path))}
		// Such a device may wait for its server when it is asked anything.
		if file, err := os.ReadFile(filepath.Join(path, "backing_file")); err == nil &&
			(strings.HasPrefix(filepath.Base(string(file)), "teststore.") || strings.HasPrefix(string(file), rbdDir)) {
			l.name = filepath.Base(string(file))
			all = append(all, l)
			continue
		}
		f, err := openSettled(l.device)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			return nil, err
		}
		info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
		_ = f.Close()
		if errors.Is(err, unix.ENXIO) {
			continue // detached since
		}
		if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) { // its server has ended
			all = append(all, l)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask %s: %w", l.device, err)
		}
		l.name, l.file = unix.ByteSliceToString(info.File_name[:]), fileID{info.Device, info.Inode}
		all = append(all, l)
	}
	return all, nil
}

// openSettled opens a loop device, which nobody can while its file is being taken away.
func openSettled(device string) (f *os.File, err error) {
	for range 1000 {
		if f, err = os.Open(device); !errors.Is(err, unix.ENXIO) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return f, err
}

// rbdDir is where the plugin on a host has what it has attached of Ceph RBD.
const rbdDir = "/run/flocker/rbd/"

// sequenceOf returns the number that the kernel has given the disk in a directory of
// sysfs; empty if that is gone.
func sequenceOf(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, "diskseq"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// Loops returns the loop devices that the rig's hosts have attached, or that are
// on files below the rig's directory.
func (r *Rig) Loops() ([]string, error) {
	mine, err := loopsBelow(r.Dir)
	if err != nil {
		return nil, err
	}
	attached, err := loops()
	if err != nil {
		return nil, err
	}
	var devices []string
	for _, l := range attached {
		if mine(l) {
			devices = append(devices, l.device)
		}
	}
	return devices, nil
}

// detachLoops detaches the loop devices of the hosts below dir: those they have
// attached themselves, and those whose files are there.
func detachLoops(ctx context.Context, dir string) error {
	if attached, err := loops(); err != nil || len(attached) == 0 {
		return err
	}
	mine, err := loopsBelow(dir)
	if err != nil {
		return err
	}
	return detach(ctx, mine)
}

// loopsBelow says which loop devices belong to the hosts below dir.
func loopsBelow(dir string) (func(loop) bool, error) {
	known, err := loopMarks(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	files := make(map[fileID]bool)
	for _, pattern := range []string{"shared", "*/lib/flocker"} {
		roots, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, root := range roots {
			err := filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
				switch {
				case errors.Is(err, fs.ErrNotExist):
					return nil // just removed
				case err != nil || !e.Type().IsRegular():
					return err
				}
				info, err := e.Info()
				if err != nil {
					return nil //nolint:nilerr // just removed
				}
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					files[fileID{st.Dev, st.Ino}] = true
				}
				return nil
			})
			if err != nil {
				return nil, fmt.Errorf("find the rig's loop devices: %w", err)
			}
		}
	}
	return func(l loop) bool { return files[l.file] || known.of(l) }, nil
}

// marks are what the loop devices of some hosts are known by.
type marks struct {
	names []string          // theirs begin with one of these
	noted map[string]string // the sequence number of a device that was written down
}

func (m marks) of(l loop) bool {
	return l.sequence != "" && m.noted[l.device] == l.sequence ||
		slices.ContainsFunc(m.names, func(prefix string) bool { return strings.HasPrefix(l.name, prefix) })
}

// loopMarks says how to know the loop devices that the hosts in the directories dirs, a
// pattern, have attached: loopback gives them the name of a hash of the node, the test
// storage one of the host, and rbd writes down which it has.
func loopMarks(dirs string) (marks, error) {
	all := marks{noted: map[string]string{}}
	hosts, _ := filepath.Glob(dirs)
	for _, host := range hosts {
		all.names = append(all.names, teststore.FilePrefix(initiatorName(host)))
	}
	notes, _ := filepath.Glob(filepath.Join(dirs, "run", "rbd", "*", "m-*", "device"))
	for _, note := range notes {
		text, err := os.ReadFile(note)
		if errors.Is(err, fs.ErrNotExist) {
			continue // just removed
		}
		if err != nil {
			return all, err
		}
		if device, sequence, ok := strings.Cut(string(text), " "); ok {
			all.noted[device] = sequence
		}
	}
	files, _ := filepath.Glob(filepath.Join(dirs, "lib", "flocker", "node.json"))
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return all, err
		}
		var node struct {
			ID string `json:"id"`
		}
		if json.Unmarshal(data, &node) != nil || node.ID == "" {
			continue // a test has damaged it
		}
		hash := sha256.Sum256([]byte(node.ID))
		all.names = append(all.names, fmt.Sprintf("fl/%x/", hash[:6]))
	}
	return all, nil
}

// detach detaches the loop devices chosen and waits until they are free: the
// kernel does it only when the last namespace that has one mounted is gone.
func detach(ctx context.Context, chosen func(loop) bool) error {
	for {
		attached, err := loops()
		if err != nil {
			return err
		}
		var left []string
		for _, l := range attached {
			if chosen(l) {
				left = append(left, l.device)
				l.clear()
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

// clear detaches a loop device, or has the kernel do it when the last one who has it
// open lets go.
func (l loop) clear() {
	f, err := os.Open(l.device)
	if err != nil {
		return
	}
	defer f.Close()
	// While it is open it does not become another's, which it may have before.
	if sequenceOf("/sys/block/"+filepath.Base(l.device)) == l.sequence {
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.LOOP_CLR_FD, 0)
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
