// Package qsd makes a block device of a disk that qemu-storage-daemon can open: the program
// shows it as a file, through FUSE, and a loop device is made of that. It is for kernels that
// have no driver of their own for a storage.
//
//	disk := qsd.New("/run/flocker/cinder", "name")
//	err := disk.Start(ctx, "image p/i", map[string]any{"driver": "rbd", …})
//	path, err := disk.Attach(ctx)
//	devices, err := qsd.Devices("/run/flocker/cinder", name)
//	clean, err := disk.Detach(ctx, path)
//
// The program outlives this process. It is found again by the state of the kernel and by the
// command lines of programs, never by what was remembered.
package qsd

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
)

// Disk is what one program shows.
type Disk struct {
	// Dir is a directory of its own, for the file, and for sockets and notes. It is in
	// every command line that is of the disk.
	Dir string
	// Name is that of the file.
	Name string
	// Env is for the program, besides what this process has.
	Env []string
}

// Files of a disk's directory.
const (
	outputFile = "output" // what the program has printed
	qmpSocket  = "qmp"    // its control socket
	deviceFile = "device" // the loop device and its sequence number
)

// New names a disk, whose directory is to be made in another.
func New(parent, name string) Disk {
	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails
	return Disk{Dir: filepath.Join(parent, "m-"+hex.EncodeToString(b)), Name: name}
}

// Dirs returns the directories of all disks in one, also of those that were begun only.
func Dirs(parent string) ([]string, error) { return filepath.Glob(parent + "/m-*") }

// File is the file that FUSE shows. Something empty has to be there before.
func (d Disk) File() string { return filepath.Join(d.Dir, d.Name) }

// Ended is the error of a program that has ended rather than shown a file.
type Ended struct {
	// Printed is what it has said.
	Printed string
}

func (e *Ended) Error() string {
	lines := strings.Split(strings.TrimSpace(e.Printed), "\n")
	return "qemu-storage-daemon: " + cmp.Or(lines[len(lines)-1], "it has ended and said nothing")
}

// Start starts qemu-storage-daemon with a node of its kind of disk, and waits until it shows the
// file. what is what is to be opened. An *Ended says why it could not be.
func (d Disk) Start(ctx context.Context, what string, node map[string]any, options ...string) error {
	node["node-name"] = "image"
	node["cache"] = map[string]any{"direct": true}
	export := map[string]any{
		"type": "fuse", "id": "export", "node-name": "image", "mountpoint": d.File(), "writable": true,
	}
	args := append(options,
		"--chardev", "socket,id=qmp,path="+filepath.Join(d.Dir, qmpSocket)+",server=on,wait=off",
		"--monitor", "chardev=qmp",
	)
	for _, object := range []struct {
		option string
		value  map[string]any
	}{{"--blockdev", node}, {"--export", export}} {
		text, err := json.Marshal(object.value)
		if err != nil {
			return err
		}
		args = append(args, object.option, string(text))
	}
	output, err := os.OpenFile(filepath.Join(d.Dir, outputFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	defer output.Close()
	cmd := exec.Command("qemu-storage-daemon", args...) //nolint:noctx // it outlives the call, and this process
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Dir, cmd.Env = "/", append(os.Environ(), d.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the program qemu-storage-daemon cannot be run: %w; install Debian's packages qemu-system-common and qemu-block-extra: %w", err, backends.ErrUnavailable)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // what it prints says more
		close(ended)
	}()
	return Wait(ctx, 30*time.Second, "qemu-storage-daemon has not opened "+what, func() (bool, error) {
		select {
		case <-ended:
			return false, &Ended{Output(d.Dir)}
		default:
		}
		_, ok, err := loop.FUSEAt(d.File())
		return ok, err
	})
}

// Attach makes the loop device of a disk whose program shows its file.
//
// Before version 10.1, QEMU reads the next request into the buffer of a write that is under
// way, and so writes data to the place of other data. One request at a time does not.
func (d Disk) Attach(ctx context.Context) (path string, err error) {
	err = loop.Bounded(ctx, 30*time.Second, d.File(), func() error {
		if _, err := os.Stat(d.File()); err != nil { // it has answered something
			return err
		}
		mount, ok, err := loop.FUSEAt(d.File())
		if err != nil || !ok {
			return cmp.Or(err, errors.New("it is gone"))
		}
		return mount.OneByOne()
	})
	if err != nil {
		return "", fmt.Errorf("file %s of qemu-storage-daemon: %w", d.File(), backends.Classify(backends.ErrUnavailable, err))
	}
	made, err := loop.Attach(ctx, d.File())
	if err != nil {
		return "", err
	}
	return made.Path, d.note(made.Path)
}

// note writes down which loop device has the file. The path of the file, which the kernel
// has too, is lost when the program goes and takes its mount along.
func (d Disk) note(path string) error {
	sequence, err := Sequence(path)
	if err == nil {
		err = os.WriteFile(filepath.Join(d.Dir, deviceFile), []byte(path+" "+sequence), 0o600)
	}
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	return nil
}

// Sequence is the number that the kernel gives a disk once: another one of the same name has
// another.
func Sequence(path string) (string, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/diskseq")
	return strings.TrimSpace(string(text)), err
}

// Device is a loop device of a disk.
type Device struct {
	Disk

	Path string
}

// Devices returns the loop devices of the disks whose directories are in one. name says
// which file the disk of a directory shows.
func Devices(parent string, name func(dir string) (string, error)) ([]Device, error) {
	loops, err := loop.Devices(parent)
	if err != nil {
		return nil, err
	}
	var found []Device
	seen := map[string]bool{}
	for _, l := range loops {
		d := Device{Disk{Dir: filepath.Dir(l.File), Name: filepath.Base(l.File)}, l.Path}
		if filepath.Dir(d.Dir) == parent {
			found, seen[d.Dir] = append(found, d), true
		}
	}
	notes, err := filepath.Glob(parent + "/m-*/" + deviceFile)
	if err != nil {
		return nil, err
	}
	for _, note := range notes {
		dir := filepath.Dir(note)
		text, err := os.ReadFile(note)
		if err != nil || seen[dir] {
			continue
		}
		path, sequence, _ := strings.Cut(string(text), " ")
		now, err := Sequence(path)
		if err != nil || now != sequence {
			continue
		}
		if name, err := name(dir); err == nil {
			found = append(found, Device{Disk{Dir: dir, Name: name}, path})
		}
	}
	return found, nil
}

// Hang is how long what a device still holds may take to get to its storage, when nobody
// has it open any more; then its program is killed.
const Hang = 10 * time.Second

// Detach removes the loop device of a disk, and ends its program. ErrInUse, and all stays,
// while somebody has the device open or mounted. clean says that the program has closed
// what it had open, by itself.
func (d Disk) Detach(ctx context.Context, path string) (clean bool, err error) {
	file := d.File()
	if l, ok := fileOf(path); ok {
		file = l
	}
	killed := make(chan struct{}, 1)
	err = loop.Device{Path: path, File: file}.Detach(ctx, Hang, func() {
		killed <- struct{}{}
		Kill(d.Dir)
	})
	if err != nil {
		return false, err
	}
	clean, err = End(ctx, d.Dir)
	select {
	case <-killed:
		clean = false
	default:
	}
	return clean, err
}

// fileOf returns the file of a device as the kernel names it now, which is not what it was
// if the mount of it is gone.
func fileOf(path string) (string, bool) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/loop/backing_file")
	return strings.TrimSuffix(string(text), "\n"), err == nil
}

// Grow tells the program of the new size of its disk, and then the loop device.
func (d Disk) Grow(ctx context.Context, path string, size int64) error {
	err := qmp(ctx, filepath.Join(d.Dir, qmpSocket), "block_resize", map[string]any{"node-name": "image", "size": size})
	if err != nil {
		return fmt.Errorf("grow %s: %w", path, err)
	}
	return loop.Device{Path: path, File: d.File()}.Grow(ctx, size)
}

// programs have a disk's directory in their command lines. rbd-nbd shows none through FUSE, and
// is ended in the same way.
var programs = []string{"qemu-storage-daemon", "rbd-nbd"}

// Output is what the program of a disk's directory has printed.
func Output(dir string) string {
	text, _ := os.ReadFile(filepath.Join(dir, outputFile)) // nothing, then
	return string(text)
}

// Processes returns the programs of a disk's directory that run, by their command lines.
func Processes(dir string) []int {
	return Running(func(words []string) bool {
		return slices.Contains(programs, filepath.Base(words[0])) && strings.Contains(strings.Join(words, " "), dir+"/")
	})
}

// Running returns the processes with certain command lines. One that has ended, and was
// not waited for, has none.
func Running(is func(words []string) bool) []int {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil
	}
	var found []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		line, err := os.ReadFile("/proc/" + name + "/cmdline")
		if err == nil && is(strings.Split(string(line), "\x00")) {
			found = append(found, pid)
		}
	}
	return found
}

// End ends the program of a disk whose device is gone, gently at first, and removes the
// directory. clean says that it has closed what it had open.
func End(ctx context.Context, dir string) (clean bool, err error) {
	pids := Processes(dir)
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGTERM) // it may have ended
	}
	if clean = len(pids) > 0; clean {
		clean = Wait(ctx, Hang, "the program has not ended", func() (bool, error) { return len(Processes(dir)) == 0, nil }) == nil
	}
	if !clean {
		Kill(dir)
		// Whatever ctx says: it is about to end.
		err = Wait(context.WithoutCancel(ctx), 5*time.Second, "the client in "+dir+" has been killed, and has not ended", func() (bool, error) { return len(Processes(dir)) == 0, nil })
		if err != nil {
			return false, err
		}
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return clean, nil
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		loop.Unmount(path)
		err = errors.Join(err, os.Remove(path))
	}
	if err = cmp.Or(err, os.Remove(dir)); err != nil {
		return clean, backends.Classify(backends.ErrUnavailable, err)
	}
	return clean, nil
}

// Kill is the hard way out: all I/O of the disk fails from now on, that too which waits for a
// storage that does not answer.
func Kill(dir string) {
	for _, pid := range Processes(dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if mount, ok, err := loop.FUSEAt(filepath.Join(dir, entry.Name())); err == nil && ok {
			_ = mount.Abort() // it may have ended
		}
	}
}

// Wait looks again and again until something is so, and says what is not after a time.
func Wait(ctx context.Context, limit time.Duration, what string, look func() (bool, error)) error {
	for started, pause := time.Now(), 2*time.Millisecond; ; pause = min(pause*3/2, 250*time.Millisecond) {
		done, err := look()
		if done || err != nil {
			return err
		}
		if time.Since(started) > limit {
			return fmt.Errorf("%s within %s: %w", what, limit, backends.ErrUnavailable)
		}
		if err := Sleep(ctx, pause); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// Sleep waits, or until ctx ends.
func Sleep(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return backends.Classify(backends.ErrUnavailable, cmp.Or(context.Cause(ctx), ctx.Err()))
	}
}

// Lacks says what this host lacks for such devices.
func Lacks(ctx context.Context) []string {
	LoadModule(ctx, "fuse", "/dev/fuse")
	LoadModule(ctx, "loop", "/dev/loop-control")
	var lacks []string
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			lacks = append(lacks, path)
		}
	}
	if !Installed("qemu-storage-daemon") {
		lacks = append(lacks, "the program qemu-storage-daemon (packages qemu-system-common and qemu-block-extra)")
	}
	return lacks
}

// Installed says whether there is a program.
func Installed(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

// LoadModule asks for a kernel module, if what it brings is not there.
func LoadModule(ctx context.Context, module, brings string) {
	if _, err := os.Stat(brings); err == nil || !Installed("modprobe") {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_ = exec.CommandContext(ctx, "modprobe", module).Run() // it is looked for afterwards
}
