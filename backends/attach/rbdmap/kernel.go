package rbdmap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// sysfs is where the kernel's driver shows its devices; a test has its own.
var sysfs = "/sys/bus/rbd/devices"

// kernelImage is an image that krbd has mapped.
type kernelImage struct {
	number   string
	spec     string // pool/namespace/name
	client   string // client4123
	address  string
	snapshot string
	path     string
}

// kernelImages returns what krbd has mapped, by whomever.
func kernelImages() ([]kernelImage, error) {
	entries, err := os.ReadDir(sysfs)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []kernelImage
	for _, entry := range entries {
		attr := func(name string) string {
			text, readErr := os.ReadFile(filepath.Join(sysfs, entry.Name(), name))
			if readErr != nil && !errors.Is(readErr, fs.ErrNotExist) {
				err = errors.Join(err, readErr)
			}
			return strings.TrimSpace(string(text))
		}
		i := kernelImage{
			number: entry.Name(), client: attr("client_id"), address: attr("client_addr"),
			snapshot: attr("current_snap"), path: "/dev/rbd" + entry.Name(),
		}
		i.spec = Image{Pool: attr("pool"), Namespace: attr("pool_ns"), Name: attr("name")}.Spec()
		if i.client != "" { // it may just be going
			found = append(found, i)
		}
	}
	return found, err
}

// labelFile is where the label of a mapping of krbd is. A client's number is never given twice
// by a cluster, so what a note says of one stays true.
func (a *Attacher) labelFile(client string) string { return filepath.Join(a.cfg.Dir, "k-"+client) }

// begunFileOf has the image of a mapping of krbd from before it is begun until its caller
// has allowed it.
func (a *Attacher) begunFileOf(label string) string {
	return filepath.Join(a.cfg.Dir, "b-"+escape(label))
}

// begunOf returns the image of a mapping that was begun; empty if none was.
func (a *Attacher) begunOf(label string) string {
	spec, _ := os.ReadFile(a.begunFileOf(label)) // none, then
	return string(spec)
}

// kernelDevices returns the devices of krbd that were mapped from here. The kernel says
// what there is; the notes only add the labels.
func (a *Attacher) kernelDevices() ([]Device, error) {
	notes, err := filepath.Glob(a.cfg.Dir + "/b-*")
	if err != nil {
		return nil, err
	}
	begun := map[string]Device{} // by their images
	for _, note := range notes {
		d := Device{Label: unescape(strings.TrimPrefix(filepath.Base(note), "b-")), Method: KRBD, begun: true}
		begun[a.begunOf(d.Label)] = d
	}
	images, err := kernelImages()
	if err != nil {
		return nil, err
	}
	var found []Device
	for _, i := range images {
		text, err := os.ReadFile(a.labelFile(i.client))
		label, spec, _ := strings.Cut(string(text), "\n")
		d, ok := begun[i.spec]
		switch {
		case err == nil && spec == i.spec && (!ok || d.Label != label):
			found = append(found, Device{Label: label, Path: i.path, Method: KRBD})
		case ok && (err == nil && spec == i.spec || errors.Is(err, fs.ErrNotExist) && i.whole()):
			d.Path = i.path
			begun[i.spec] = d
		}
	}
	return slices.AppendSeq(found, maps.Values(begun)), nil
}

// whole says that it is the image itself, and not a snapshot of it.
func (i kernelImage) whole() bool { return i.snapshot == "" || i.snapshot == "-" }

func (a *Attacher) mapKernel(ctx context.Context, image Image, label string, allow func(Client) error) (Device, error) {
	d := Device{Label: label, Method: KRBD}
	if err := os.WriteFile(a.begunFileOf(label), []byte(image.Spec()), 0o600); err != nil {
		return Device{}, backends.Classify(backends.ErrUnavailable, err)
	}
	err := a.mapBegun(ctx, image, &d, allow)
	if err == nil {
		if err = os.Remove(a.begunFileOf(label)); err == nil {
			return d, nil
		}
		err = backends.Classify(backends.ErrUnavailable, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	_, failed := a.Unmap(ctx, label)
	return Device{}, errors.Join(err, failed)
}

func (a *Attacher) mapBegun(ctx context.Context, image Image, d *Device, allow func(Client) error) error {
	// A client of its own, which is cut off without the others; and nobody is let write
	// beside it.
	out, err := image.Cluster.Run(ctx, "rbd", "device", "map", "--options", "noshare,exclusive", image.Spec())
	if err != nil {
		return err
	}
	d.Path = strings.TrimSpace(string(out))
	images, err := kernelImages()
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	for _, i := range images {
		if i.path != d.Path || i.spec != image.Spec() {
			continue
		}
		if i.address == "" {
			return fmt.Errorf("this kernel does not tell the address of its Ceph client, which a fence needs: Linux 4.16 or another way to attach is needed: %w", backends.ErrUnavailable)
		}
		if err := os.WriteFile(a.labelFile(i.client), []byte(d.Label+"\n"+i.spec), 0o600); err != nil {
			return backends.Classify(backends.ErrUnavailable, err)
		}
		return allow(Client{Address: i.address})
	}
	return fmt.Errorf("rbd says that %s is %s, and the kernel shows no such device: %w", image.Spec(), d.Path, backends.ErrUnavailable)
}

// unmapKernel unmaps a device of krbd, which the kernel refuses while it is open.
func (a *Attacher) unmapKernel(ctx context.Context, d Device) (clean bool, err error) {
	if clean, err = a.removeKernel(ctx, d); err != nil || !d.begun {
		return clean, err
	}
	// The program goes on for a while when its caller was killed.
	spec := a.begunOf(d.Label)
	mapping := func(words []string) bool {
		return filepath.Base(words[0]) == "rbd" && slices.Contains(words, "map") && slices.Contains(words, spec)
	}
	if d.Path == "" && len(qsd.Running(mapping)) > 0 {
		return false, fmt.Errorf("`rbd device map` of %s is still running, for a process of Flocker that is not: %w", spec, backends.ErrUnavailable)
	}
	if err := os.Remove(a.begunFileOf(d.Label)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return clean, backends.Classify(backends.ErrUnavailable, err)
	}
	return clean, nil
}

func (a *Attacher) removeKernel(ctx context.Context, d Device) (clean bool, err error) {
	images, err := kernelImages()
	if err != nil {
		return false, backends.Classify(backends.ErrUnavailable, err)
	}
	for _, i := range images {
		if i.path != d.Path {
			continue
		}
		started := time.Now()
		for {
			_, err := Cluster{User: "admin"}.Run(ctx, "rbd", "device", "unmap", d.Path)
			busy := errors.Is(err, backends.ErrInUse)
			if err == nil {
				break
			}
			if !busy || time.Since(started) > settle {
				if busy {
					err = fmt.Errorf("%s is open or mounted: %w", d.Path, backends.ErrInUse)
				}
				return false, err
			}
			if err := qsd.Sleep(ctx, 20*time.Millisecond); err != nil {
				return false, err
			}
		}
		if err := os.Remove(a.labelFile(i.client)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return true, backends.Classify(backends.ErrUnavailable, err)
		}
		return true, nil
	}
	return false, nil
}

// settle is how long a device may be open to somebody who merely looks at it, as udev
// does.
const settle = 500 * time.Millisecond

// sweepKernel unmaps what a Map of the image has left that was killed before it could
// leave a note. What others have mapped is not touched: it is not one of ours if it is open.
func (a *Attacher) sweepKernel(ctx context.Context, image Image) error {
	images, err := kernelImages()
	if err != nil {
		return backends.Classify(backends.ErrUnavailable, err)
	}
	for _, i := range images {
		if i.spec != image.Spec() || !i.whole() {
			continue
		}
		if _, err := os.Stat(a.labelFile(i.client)); err == nil {
			continue
		}
		if _, err := a.unmapKernel(ctx, Device{Path: i.path}); err != nil {
			return fmt.Errorf("%s is on this host as %s already, and not Flocker's: %w", image.Spec(), i.path, err)
		}
	}
	return nil
}

// nbdDevices returns the devices of rbd-nbd that were mapped from here: the kernel tells
// the program of each device, and its command line the label.
func (a *Attacher) nbdDevices() ([]Device, error) {
	paths, err := filepath.Glob("/sys/block/nbd*/pid")
	if err != nil {
		return nil, err
	}
	var found []Device
	for _, path := range paths {
		text, err := os.ReadFile(path)
		pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || err2 != nil {
			continue // not connected
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		for word := range strings.SplitSeq(string(line), "\x00") {
			if strings.HasPrefix(word, a.cfg.Dir+"/m-") && strings.HasSuffix(word, confSuffix) {
				label := unescape(strings.TrimSuffix(filepath.Base(word), confSuffix))
				name := filepath.Base(filepath.Dir(path))
				found = append(found, Device{Label: label, Path: "/dev/" + name, Method: NBD, pid: pid, dir: filepath.Dir(word)})
			}
		}
	}
	return found, nil
}

// startNBD maps an image with rbd-nbd, which goes on in the background.
func startNBD(ctx context.Context, image Image, conf string) (path string, err error) {
	client := Cluster{Conf: conf, User: image.Cluster.User, Timeout: image.Cluster.Timeout}
	out, err := client.Run(ctx, "rbd-nbd", "map", "--exclusive", image.Spec())
	if err != nil {
		return "", err
	}
	path = strings.TrimSpace(string(out))
	if !strings.HasPrefix(path, "/dev/nbd") {
		return "", fmt.Errorf("rbd-nbd has made %q, which is no device: %w", path, backends.ErrUnavailable)
	}
	return path, nil
}

// unmapNBD ends rbd-nbd, once nobody has its device open: it would go anyway.
func (a *Attacher) unmapNBD(ctx context.Context, d Device) (clean bool, err error) {
	// The program itself has it open all the time.
	closed, err := holdClosed(ctx, d.Path, qsd.Processes(d.dir))
	if err != nil {
		return false, err
	}
	defer closed()
	return qsd.End(ctx, d.dir)
}

// holdClosed opens a device exclusively, so that nobody can use it until the returned
// function is called; ErrInUse if somebody but its program has it open. What the device
// still holds is written: with a program that has it open, nobody is the last to close it.
func holdClosed(ctx context.Context, path string, program []int) (release func(), err error) {
	var held *os.File // and not closed while others look: that makes udev look again
	for started := time.Now(); ; {
		if held == nil {
			var f *os.File
			err = loop.Bounded(ctx, qsd.Hang, path, func() (err error) {
				// Exclusively: fails while it is mounted, in whatever mount namespace.
				f, err = os.OpenFile(path, os.O_RDWR|syscall.O_EXCL, 0)
				return err
			})
			switch {
			case err == nil:
				held = f
			case errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENODEV), errors.Is(err, fs.ErrNotExist):
				return func() {}, nil // nobody can open it
			case !errors.Is(err, syscall.EBUSY):
				return nil, backends.Classify(backends.ErrUnavailable, err)
			}
		}
		if held != nil && !openElsewhere(path, program) {
			_ = loop.Bounded(ctx, qsd.Hang, path, held.Sync) // it fails if the client was cut off
			return func() { _ = held.Close() }, nil
		}
		err = qsd.Sleep(ctx, 20*time.Millisecond)
		if err == nil && time.Since(started) > settle {
			err = fmt.Errorf("%s is open or mounted: %w", path, backends.ErrInUse)
		}
		if err != nil {
			if held != nil {
				_ = held.Close() // nothing was written to it
			}
			return nil, err
		}
	}
}

// openElsewhere says whether a process that can be seen from here has a device open, other
// than this one and the program of the device.
func openElsewhere(path string, program []int) bool {
	open, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return false
	}
	for _, fd := range open {
		pid, _ := strconv.Atoi(strings.Split(fd, "/")[2]) // the pattern has seen to it
		if pid == os.Getpid() || slices.Contains(program, pid) {
			continue
		}
		if link, err := os.Readlink(fd); err == nil && link == path {
			return true
		}
	}
	return false
}
