// Package rbdmap makes block devices of images of Ceph RBD on this host. It knows nothing
// of volumes and owners: whoever has an image mapped where is its callers' affair.
//
//	attacher, err := rbdmap.New(rbdmap.Config{Dir: "/run/flocker/cinder"})
//	device, err := attacher.Map(ctx, image, label, func(c rbdmap.Client) error { return nil })
//	devices, err := attacher.Devices()    // what is mapped, by the labels given to Map
//	begun, err := attacher.Begun()        // what a Map has left that was killed
//	clean, err := attacher.Unmap(ctx, label)
//	err = attacher.Grow(ctx, label, size) // after the image has grown
//
// Each image has a client of Ceph of its own, so that one can be cut off (`ceph osd
// blocklist`) without the others. There are three ways:
//
//   - krbd, the kernel's driver. It goes on without this process.
//   - nbd: the program rbd-nbd and the kernel's nbd.
//   - fuse: the program qemu-storage-daemon shows the image as a file, of which a loop
//     device is made. For kernels that have neither of the two.
//
// The programs of the last two outlive this process. They are found again by the state
// of the kernel and the command lines of the programs, never by what was remembered.
package rbdmap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// Image names an image, and the cluster that has it.
type Image struct {
	Cluster Cluster
	Pool    string
	// Namespace is one within the pool; empty is the pool itself.
	Namespace string
	Name      string
}

// Spec is how Ceph's programs write it: pool/namespace/name.
func (i Image) Spec() string {
	if i.Namespace != "" {
		return i.Pool + "/" + i.Namespace + "/" + i.Name
	}
	return i.Pool + "/" + i.Name
}

// Client is one instance of a client of Ceph: it is never the same again after the image
// was unmapped.
type Client struct {
	// Address is what `ceph osd blocklist` takes: 192.0.2.7:0/123456789.
	Address string
}

// Device is a mapped image.
type Device struct {
	// Label is what Map was told.
	Label string
	// Path is the block device. It is empty for what Begun returns.
	Path string
	// Method is one of Methods.
	Method string
	// pid is that of the program; 0 is none, as with krbd.
	pid int
	// dir has the sockets and files of the program.
	dir string
	// begun says that the Map of it has not come to its end.
	begun bool
}

// The ways to map an image.
const (
	KRBD = "krbd"
	NBD  = "rbd-nbd"
	FUSE = "fuse"
)

// Methods are the ways to map an image, the best first.
var Methods = []string{KRBD, NBD, FUSE}

// Config is what an Attacher is made from.
type Config struct {
	// Dir is where sockets and notes are. It has to survive this process, but not the
	// host's next boot: below /run. What is mapped from another Dir is not seen.
	Dir string
	// Method is one of Methods; empty is the first that this host can do.
	Method string
}

// Attacher maps images on this host. It remembers nothing.
type Attacher struct{ cfg Config }

// mostDir keeps paths of sockets below the kernel's limit.
const mostDir = 70

// New returns an Attacher. It does nothing yet.
func New(cfg Config) (*Attacher, error) {
	switch {
	case !filepath.IsAbs(cfg.Dir) || filepath.Clean(cfg.Dir) != cfg.Dir || len(cfg.Dir) > mostDir:
		return nil, fmt.Errorf("directory %q must be an absolute path of at most %d characters: %w", cfg.Dir, mostDir, backends.ErrInvalid)
	case cfg.Method != "" && cfg.Method != KRBD && cfg.Method != NBD && cfg.Method != FUSE:
		return nil, fmt.Errorf("attach: %q is no way to attach an image: use %s, %s or %s, or leave it out: %w", cfg.Method, KRBD, NBD, FUSE, backends.ErrInvalid)
	}
	return &Attacher{cfg}, nil
}

// method returns how images are mapped here.
func (a *Attacher) method(ctx context.Context) (string, error) {
	var missing []string
	for _, method := range Methods {
		if a.cfg.Method != "" && a.cfg.Method != method {
			continue
		}
		lacks := lacking(ctx, method)
		if lacks == "" {
			return method, nil
		}
		missing = append(missing, method+" needs "+lacks)
	}
	return "", fmt.Errorf("this host cannot attach an RBD image: %s: %w", strings.Join(missing, "; "), backends.ErrUnavailable)
}

// Label bounds: it becomes the name of a file.
const mostLabel = 240

// escape makes a label one part of a path; Ceph takes some more characters for the end of
// a path.
func escape(label string) string {
	return strings.NewReplacer("%", "%25", "/", "%2F", ".", "%2E", ",", "%2C", ";", "%3B", " ", "%20").Replace(label)
}

func unescape(name string) string {
	return strings.NewReplacer("%20", " ", "%3B", ";", "%2C", ",", "%2E", ".", "%2F", "/", "%25", "%").Replace(name)
}

// Map makes a block device of an image. label names the mapping from now on; it is unique
// here, and its caller has made sure that nobody maps or unmaps the same image
// meanwhile. When the client is known, and before anybody can have used the device, allow is
// called; what it returns undoes the mapping. A mapping that was left by a Map that was
// killed is undone first.
func (a *Attacher) Map(ctx context.Context, image Image, label string, allow func(Client) error) (Device, error) {
	if label == "" || len(escape(label)) > mostLabel || strings.ContainsAny(label, "\x00\n\"\\") {
		return Device{}, fmt.Errorf("label %q cannot be the name of a mapping: %w", label, backends.ErrInvalid)
	}
	method, err := a.method(ctx)
	if err != nil {
		return Device{}, err
	}
	if err := os.MkdirAll(a.cfg.Dir, 0o700); err != nil {
		return Device{}, backends.Classify(backends.ErrUnavailable, err)
	}
	if err := a.sweep(ctx, image); err != nil {
		return Device{}, err
	}
	if method == KRBD {
		return a.mapKernel(ctx, image, label, allow)
	}
	return a.mapProgram(ctx, method, image, label, allow)
}

// Devices returns what is mapped now from Dir, by the kernel and the programs. It asks
// nothing of Ceph, and waits for nobody.
func (a *Attacher) Devices() ([]Device, error) {
	all, err := a.mappings()
	return slices.DeleteFunc(all, func(d Device) bool { return d.begun }), err
}

// Begun returns the mappings whose Map has not come to its end: it is under way, or its
// process was killed. Its client may be a watcher of the image; nobody was given a device,
// whatever the kernel shows. Unmap undoes one that is not under way.
func (a *Attacher) Begun() ([]Device, error) {
	all, err := a.mappings()
	var begun []Device
	for _, d := range all {
		if d.begun && d.Label != "" {
			begun = append(begun, Device{Label: d.Label, Method: d.Method})
		}
	}
	return begun, err
}

// mappings returns what there is of mappings. One that was begun has a Path if the kernel
// has a device of it.
func (a *Attacher) mappings() ([]Device, error) {
	var all []Device
	for _, list := range []func() ([]Device, error){a.kernelDevices, a.nbdDevices, a.fuseDevices} {
		found, err := list()
		if err != nil {
			return nil, backends.Classify(backends.ErrUnavailable, err)
		}
		all = append(all, found...)
	}
	seen := map[string]bool{}
	for i, d := range all {
		if d.dir != "" {
			_, err := os.Stat(filepath.Join(d.dir, begunFile))
			all[i].begun, seen[d.dir] = err == nil, true
		}
	}
	dirs, err := qsd.Dirs(a.cfg.Dir)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	for _, dir := range dirs {
		if !seen[dir] {
			label, _ := labelIn(dir) // none, if it was killed very early
			all = append(all, Device{Label: label, dir: dir, begun: true})
		}
	}
	return all, nil
}

// find returns the mapping with a label.
func (a *Attacher) find(label string) (Device, bool, error) {
	all, err := a.mappings()
	for _, d := range all {
		if d.Label == label {
			return d, true, nil
		}
	}
	return Device{}, false, err
}

// Unmap removes the device with a label, or what a Map has left of it that was killed, and
// ends its client; nil if there is none.
// ErrInUse, and it stays, while somebody has it open or mounted. clean says that the
// client has closed the image and been heard by the cluster: if it was not, something
// that it has sent may still arrive, until it is on the blocklist.
func (a *Attacher) Unmap(ctx context.Context, label string) (clean bool, err error) {
	d, ok, err := a.find(label)
	if err != nil || !ok {
		return false, err
	}
	return a.unmap(ctx, d)
}

func (a *Attacher) unmap(ctx context.Context, d Device) (clean bool, err error) {
	switch {
	case d.Method == KRBD:
		return a.unmapKernel(ctx, d)
	case d.Path == "":
		return qsd.End(ctx, d.dir)
	case d.Method == NBD:
		return a.unmapNBD(ctx, d)
	}
	return d.disk().Detach(ctx, d.Path)
}

// Served says whether the program of the device with a label still runs; if it does not,
// the device gives nothing but I/O errors, and has to be unmapped.
func (a *Attacher) Served(label string) (bool, error) {
	d, ok, err := a.find(label)
	if err != nil || !ok || d.begun {
		return false, err
	}
	return d.Method == KRBD || len(qsd.Processes(d.dir)) > 0, nil
}

// Grow makes the device with a label as large as its image has become.
func (a *Attacher) Grow(ctx context.Context, label string, size int64) error {
	d, ok, err := a.find(label)
	if err != nil || !ok || d.begun {
		return err
	}
	if d.Method == FUSE {
		return d.disk().Grow(ctx, d.Path, size)
	}
	// The kernel's drivers see it by themselves, as watchers of the image.
	return qsd.Wait(ctx, 15*time.Second, fmt.Sprintf("%s has not got its new size", d.Path), func() (bool, error) {
		now, err := loop.Device{Path: d.Path}.Size()
		return err == nil && now >= size, err
	})
}

// sweep ends what a Map of the image has left that was killed.
func (a *Attacher) sweep(ctx context.Context, image Image) error {
	all, err := a.mappings()
	if err != nil {
		return err
	}
	for _, d := range all {
		if d.begun && a.isOf(d, image) {
			if _, err := a.unmap(ctx, d); err != nil {
				return err
			}
		}
	}
	return a.sweepKernel(ctx, image)
}

// isOf says whether what was begun is of an image, or so early that nothing tells.
func (a *Attacher) isOf(d Device, image Image) bool {
	if d.dir == "" {
		return a.begunOf(d.Label) == image.Spec()
	}
	spec, err := os.ReadFile(filepath.Join(d.dir, imageFile))
	if err == nil {
		return string(spec) == image.Spec()
	}
	info, err := os.Stat(d.dir)
	return err == nil && time.Since(info.ModTime()) > time.Minute // else it is being made for another image
}

// lacking says what this host lacks for a way; empty if nothing.
func lacking(ctx context.Context, method string) string {
	var lacks []string
	program := func(name, source string) {
		if !qsd.Installed(name) {
			lacks = append(lacks, fmt.Sprintf("the program %s (%s)", name, source))
		}
	}
	path := func(path, what string) {
		if _, err := os.Stat(path); err != nil {
			lacks = append(lacks, what)
		}
	}
	program("rbd", "package ceph-common")
	switch method {
	case KRBD:
		qsd.LoadModule(ctx, "rbd", "/sys/bus/rbd")
		path("/sys/bus/rbd", "the kernel module rbd")
	case NBD:
		qsd.LoadModule(ctx, "nbd", "/sys/block/nbd0")
		path("/sys/block/nbd0", "the kernel module nbd")
		program("rbd-nbd", "package rbd-nbd")
	case FUSE:
		lacks = append(lacks, qsd.Lacks(ctx)...)
	}
	return strings.Join(lacks, ", ")
}

// errGone: a device or process that was there is not any more.
var errGone = errors.New("gone")
