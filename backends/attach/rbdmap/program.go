package rbdmap

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
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
)

// The files of a mapping's directory, m-<random>. The label is the name of the client's
// ceph.conf, which stands in the program's command line, and of the file that FUSE shows.
const (
	imageFile  = "image"  // the image's name, for sweep
	outputFile = "output" // what the program has printed
	logFile    = "log"    // Ceph's own log of the client
	askSocket  = "ask"    // Ceph's admin socket of the client
	qmpSocket  = "qmp"    // the control socket of qemu-storage-daemon
	deviceFile = "device" // the loop device and its sequence number
	begunFile  = "begun"  // there until Map's caller has allowed it
)

const confSuffix = ".conf"

// mapProgram maps an image with a program that has a client of its own.
func (a *Attacher) mapProgram(ctx context.Context, method string, image Image, label string, allow func(Client) error) (d Device, err error) {
	d = Device{Label: label, Method: method, dir: filepath.Join(a.cfg.Dir, "m-"+random())}
	defer func() {
		if err != nil {
			// Whatever ctx says: nothing may stay.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			_, failed := a.drop(ctx, d)
			err = errors.Join(err, failed)
		}
	}()
	conf, err := a.prepare(image, d)
	if err != nil {
		return d, backends.Classify(backends.ErrUnavailable, err)
	}
	if method == NBD {
		d.Path, err = startNBD(ctx, image, conf)
	} else {
		err = startQSD(ctx, image, conf, d)
	}
	if err != nil {
		return d, err
	}
	client, err := identify(ctx, image, d.dir)
	if err == nil {
		err = quiet(ctx, d.dir)
	}
	if err == nil {
		err = allow(client)
	}
	if err != nil {
		return d, err
	}
	if err := os.Remove(filepath.Join(d.dir, begunFile)); err != nil {
		return d, backends.Classify(backends.ErrUnavailable, err)
	}
	if method == NBD {
		return d, nil
	}
	made, err := loop.Attach(ctx, d.shown())
	if err != nil {
		return d, err
	}
	d.Path = made.Path
	return d, d.note()
}

func random() string {
	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// shown is the file that FUSE shows.
func (d Device) shown() string { return filepath.Join(d.dir, escape(d.Label)) }

// prepare makes the directory of a mapping, and returns the path of the client's conf.
func (a *Attacher) prepare(image Image, d Device) (conf string, err error) {
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return "", err
	}
	text, err := image.Cluster.clientConf(d.dir)
	if err != nil {
		return "", err
	}
	conf = d.shown() + confSuffix
	for path, text := range map[string]string{
		filepath.Join(d.dir, imageFile): image.Spec(), filepath.Join(d.dir, begunFile): "", conf: text, d.shown(): "",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	return conf, nil
}

// clientConf is the ceph.conf of a client whose files are in dir: what the operator has
// said, and over it what makes the client tell who it is.
func (c Cluster) clientConf(dir string) (string, error) {
	var b strings.Builder
	if c.Conf != "" {
		text, err := os.ReadFile(c.Conf)
		if err != nil {
			return "", err
		}
		b.Write(text)
	}
	fmt.Fprintf(&b, "\n[client.%s]\n", c.User)
	if c.Monitors != "" {
		fmt.Fprintf(&b, "mon_host = %s\n", c.Monitors)
	}
	if c.Keyring != "" {
		fmt.Fprintf(&b, "keyring = %s\n", c.Keyring)
	}
	fmt.Fprintf(&b, "admin_socket = %s\nlog_file = %s\nlog_to_file = true\nlog_to_stderr = false\nerr_to_stderr = true\ndebug_ms = 1/1\n"+
		"rbd_cache = false\n", // it acknowledges what it has not written, also when its client is cut off
		filepath.Join(dir, askSocket), filepath.Join(dir, logFile))
	return b.String(), nil
}

// startQSD starts qemu-storage-daemon, and waits until it shows the file.
func startQSD(ctx context.Context, image Image, conf string, d Device) error {
	disk := map[string]any{
		"driver": "rbd", "node-name": "image", "pool": image.Pool, "image": image.Name,
		"conf": conf, "user": image.Cluster.User, "discard": "unmap",
		"cache": map[string]any{"direct": true},
	}
	if image.Namespace != "" {
		disk["namespace"] = image.Namespace
	}
	export := map[string]any{
		"type": "fuse", "id": "export", "node-name": "image", "mountpoint": d.shown(), "writable": true,
	}
	args := []string{
		"--chardev", "socket,id=qmp,path=" + filepath.Join(d.dir, qmpSocket) + ",server=on,wait=off",
		"--monitor", "chardev=qmp",
	}
	for _, object := range []struct {
		option string
		value  map[string]any
	}{{"--blockdev", disk}, {"--export", export}} {
		text, err := json.Marshal(object.value)
		if err != nil {
			return err
		}
		args = append(args, object.option, string(text))
	}
	output, err := os.OpenFile(filepath.Join(d.dir, outputFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	defer output.Close()
	cmd := exec.Command("qemu-storage-daemon", args...) //nolint:noctx // it outlives the call, and this process
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the program qemu-storage-daemon cannot be run: %w; install Debian's packages qemu-system-common and qemu-block-extra: %w", err, backends.ErrUnavailable)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // what it prints says more
		close(ended)
	}()
	return waitFor(ctx, 30*time.Second, "qemu-storage-daemon has not opened image "+image.Spec(), func() (bool, error) {
		select {
		case <-ended:
			printed, err := os.ReadFile(filepath.Join(d.dir, outputFile))
			if err != nil {
				return false, backends.Classify(backends.ErrUnavailable, err)
			}
			return false, image.Cluster.failure("qemu-storage-daemon", 1, string(printed))
		default:
		}
		_, ok, err := loop.FUSEAt(d.shown())
		return ok, err
	})
}

// identify returns which of the image's watchers is the client whose files are in dir: the
// one whose address its own log has. Nothing else makes it known what a fence will have
// to name.
func identify(ctx context.Context, image Image, dir string) (Client, error) {
	var client Client
	what := "the client of image " + image.Spec() + " has not become one of its watchers"
	err := waitFor(ctx, 20*time.Second, what, func() (bool, error) {
		watchers, err := image.Watchers(ctx)
		if err != nil {
			return false, err
		}
		log, err := os.ReadFile(filepath.Join(dir, logFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, backends.Classify(backends.ErrUnavailable, err)
		}
		own := map[string]bool{}
		for _, w := range watchers {
			if speaks(string(log), w.Address) {
				own[w.Address] = true
			}
		}
		for address := range own {
			client.Address = address
		}
		return len(own) == 1, nil
	})
	return client, err
}

// speaks says whether a client's log, at the level of messages, is that of the client
// with an address: its messages begin with its own.
func speaks(log, address string) bool {
	return regexp.MustCompile(`-- ` + regexp.QuoteMeta(address) + ` (-->|<==)`).MatchString(log)
}

// quiet ends the log of messages, which identify has needed.
func quiet(ctx context.Context, dir string) error {
	answer, err := askClient(ctx, filepath.Join(dir, askSocket), map[string]any{"prefix": "config set", "var": "debug_ms", "val": []string{"0/0"}})
	if err != nil {
		return fmt.Errorf("the client cannot be asked on its admin socket: %w", backends.Classify(backends.ErrUnavailable, err))
	}
	if !strings.Contains(answer, "success") {
		return fmt.Errorf("the client's admin socket has answered %q: %w", answer, backends.ErrUnavailable)
	}
	return os.Truncate(filepath.Join(dir, logFile), 0)
}

// note writes down which loop device has the file. The path of the file, which the kernel
// has too, is lost when the program goes and takes its mount along.
func (d Device) note() error {
	sequence, err := sequenceOf(d.Path)
	if err == nil {
		err = os.WriteFile(filepath.Join(d.dir, deviceFile), []byte(d.Path+" "+sequence), 0o600)
	}
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	return nil
}

// sequenceOf is the number that the kernel gives a disk once: another one of the same name
// has another.
func sequenceOf(path string) (string, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/diskseq")
	return strings.TrimSpace(string(text)), err
}

// fuseDevices returns the loop devices on files that qemu-storage-daemon shows.
func (a *Attacher) fuseDevices() ([]Device, error) {
	loops, err := loop.Devices(a.cfg.Dir)
	if err != nil {
		return nil, err
	}
	var found []Device
	seen := map[string]bool{}
	for _, l := range loops {
		d := Device{Label: unescape(filepath.Base(l.File)), Path: l.Path, Method: FUSE, dir: filepath.Dir(l.File)}
		if d.shown() == l.File {
			found, seen[d.dir] = append(found, d), true
		}
	}
	notes, err := filepath.Glob(a.cfg.Dir + "/m-*/" + deviceFile)
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
		now, err := sequenceOf(path)
		if err != nil || now != sequence {
			continue
		}
		if label, err := labelIn(dir); err == nil {
			found = append(found, Device{Label: label, Path: path, Method: FUSE, dir: dir})
		}
	}
	return found, nil
}

// labelIn returns the label of a mapping's directory.
func labelIn(dir string) (string, error) {
	confs, err := filepath.Glob(dir + "/*" + confSuffix)
	if err != nil || len(confs) != 1 {
		return "", errGone
	}
	return unescape(strings.TrimSuffix(filepath.Base(confs[0]), confSuffix)), nil
}

// hang is how long what a device still holds may take to get to the cluster, when nobody
// has it open any more; then its client is killed.
const hang = 10 * time.Second

func (a *Attacher) unmapFUSE(ctx context.Context, d Device) (clean bool, err error) {
	file := d.shown()
	if l, ok := loopOf(d); ok {
		file = l
	}
	killed := make(chan struct{}, 1)
	err = loop.Device{Path: d.Path, File: file}.Detach(ctx, hang, func() {
		killed <- struct{}{}
		killProgram(d.dir)
	})
	if err != nil {
		return false, err
	}
	clean, err = endProgram(ctx, d.dir)
	select {
	case <-killed:
		clean = false
	default:
	}
	return clean, err
}

// loopOf returns the file of a device as the kernel names it now, which is not what it was
// if the mount of it is gone.
func loopOf(d Device) (string, bool) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path) + "/loop/backing_file")
	return strings.TrimSuffix(string(text), "\n"), err == nil
}

// drop undoes a Map that has failed.
func (a *Attacher) drop(ctx context.Context, d Device) (clean bool, err error) {
	if now, ok, err := a.find(d.Label); err == nil && ok && now.dir == d.dir {
		return a.Unmap(ctx, d.Label)
	}
	return endProgram(ctx, d.dir)
}

// growFUSE tells qemu-storage-daemon of the new size, and then the loop device.
func (a *Attacher) growFUSE(ctx context.Context, d Device, size int64) error {
	err := qmp(ctx, filepath.Join(d.dir, qmpSocket), "block_resize", map[string]any{"node-name": "image", "size": size})
	if err != nil {
		return fmt.Errorf("grow %s: %w", d.Path, err)
	}
	return loop.Device{Path: d.Path, File: d.shown()}.Grow(ctx, size)
}

// processes returns the programs of a mapping that run, by their command lines.
func processes(dir string) []int {
	return running(func(words []string) bool {
		program := filepath.Base(words[0])
		return (program == "qemu-storage-daemon" || program == "rbd-nbd") && strings.Contains(strings.Join(words, " "), dir+"/")
	})
}

// running returns the processes with certain command lines. One that has ended, and was
// not waited for, has none.
func running(is func(words []string) bool) []int {
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

// endProgram ends the program of a mapping whose device is gone, gently at first, and
// removes what it leaves. clean says that it has closed its image.
func endProgram(ctx context.Context, dir string) (clean bool, err error) {
	pids := processes(dir)
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGTERM) // it may have ended
	}
	if clean = len(pids) > 0; clean {
		clean = waitFor(ctx, hang, "the program has not ended", func() (bool, error) { return len(processes(dir)) == 0, nil }) == nil
	}
	if !clean {
		killProgram(dir)
		// Whatever ctx says: it is about to end.
		err = waitFor(context.WithoutCancel(ctx), 5*time.Second, "the client in "+dir+" has been killed, and has not ended", func() (bool, error) { return len(processes(dir)) == 0, nil })
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

// killProgram is the hard way out: all I/O of the mapping fails from now on, that too which
// waits for a cluster that does not answer.
func killProgram(dir string) {
	for _, pid := range processes(dir) {
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
