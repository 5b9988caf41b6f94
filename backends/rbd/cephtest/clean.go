package cephtest

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends/attach/loop"
)

// Clean ends whatever has to do with a cluster's directory, also what was left by a test
// that was killed, and removes the directory.
func Clean(dir string) {
	for range 50 {
		if !killAll(dir) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	text, _ := os.ReadFile("/proc/self/mountinfo") // none, then
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			if mount, ok, err := loop.FUSEAt(fields[4]); err == nil && ok {
				_ = mount.Abort() // it may have ended
			}
		}
	}
	loops, _ := loop.Devices(dir) // none, then
	for _, d := range loops {
		_ = d.Detach(context.Background(), time.Second, func() {}) // what is open stays
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			loop.Unmount(fields[4])
		}
	}
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return fs.SkipDir
		case d.IsDir():
			dirs = append(dirs, path)
		default:
			_ = os.Remove(path)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		_ = os.Remove(dir)
	}
}

// killAll kills the processes that have a directory in their command lines, and says
// whether there were any.
func killAll(dir string) bool {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return false
	}
	found := false
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, err := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		if err == nil && strings.Contains(string(line), dir+"/") {
			found = true
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
	return found
}

// Sweep removes what tests have left that were killed.
func Sweep() {
	dirs, _ := filepath.Glob(Prefix + "*") // the pattern is right
	for _, dir := range dirs {
		owner, err := os.ReadFile(dir + "/owner")
		pid, err2 := strconv.Atoi(string(owner))
		// One that ended, and hangs because what it waits for is among this, has none.
		line, _ := os.ReadFile("/proc/" + string(owner) + "/cmdline")
		if err == nil && err2 == nil && pid > 0 && len(line) > 0 {
			continue
		}
		if info, err := os.Stat(dir); err == nil && pid <= 0 && time.Since(info.ModTime()) < time.Minute {
			continue // it is just being started, and its owner is not written yet
		}
		Clean(dir)
	}
}
