package vm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/rbd"
)

// order is what a guest is told when it starts.
type order struct {
	// Modules of the kernel are to be loaded in this order.
	Modules []string
	// Host is where the test listens for it, at Port; Guest is its own address.
	Host, Guest string
	Port        int
	// Root says that it is shown the host's files.
	Root bool
}

const orderFile = "/order"

// A program that a machine is given comes as the first, and then is where it stays.
const broughtFile, programFile = "/program", "/tmp/program"

// beGuest is what this program does as the first process of a machine.
func beGuest() {
	if err := serveTest(); err != nil {
		fmt.Println("guest:", err)
	}
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1)
}

func serveTest() error {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/sys": "sysfs", "/tmp": "tmpfs"} {
		if err := syscall.Mount(kind, dir, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	text, err := os.ReadFile(orderFile)
	if err != nil {
		return err
	}
	var o order
	if err := json.Unmarshal(text, &o); err != nil {
		return err
	}
	for _, module := range o.Modules {
		if err := load(module); err != nil {
			return err
		}
	}
	for name, address := range map[string]string{"lo": "127.0.0.1", "eth0": o.Guest} {
		if err := up(name, address); err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
	}
	if program, err := os.ReadFile(broughtFile); err == nil {
		if err := errors.Join(os.WriteFile(programFile, program, 0o755), os.Remove(broughtFile)); err != nil {
			return err
		}
	}
	if o.Root {
		if err := enterRoot(); err != nil {
			return fmt.Errorf("the host's files: %w", err)
		}
	}
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", o.Host, o.Port), time.Minute)
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.Register(&Guest{files: map[int]*os.File{}, initiators: map[string]*iscsi.Kernel{}}); err != nil {
		return err
	}
	server.ServeConn(conn)
	return nil
}

// enterRoot makes the host's files those of the machine, but for what has to be its own.
func enterRoot() error {
	const root = "/host"
	if err := syscall.Mount("root", root, "9p", syscall.MS_RDONLY, "trans=virtio,version=9p2000.L,msize=262144,cache=loose"); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/tmp"} {
		if err := syscall.Mount(dir, root+dir, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	if err := syscall.Mount("run", root+"/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := errors.Join(syscall.Chroot(root), os.Chdir("/"), os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")); err != nil {
		return err
	}
	// Ceph's programs wait for udev's word of a new device.
	if out, err := exec.Command("/lib/systemd/systemd-udevd", "--daemon").CombinedOutput(); err != nil {
		return fmt.Errorf("systemd-udevd: %w: %s", err, out)
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		return fmt.Errorf("module %s: %w", module, err)
	}
	return nil
}

// up gives an interface an address in a network of 256, and starts it.
func up(name, address string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, is := range []struct {
		call    uint
		address []byte
	}{{unix.SIOCSIFADDR, net.ParseIP(address).To4()}, {unix.SIOCSIFNETMASK, []byte{255, 255, 255, 0}}, {unix.SIOCSIFFLAGS, nil}} {
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if is.address == nil {
			req.SetUint16(unix.IFF_UP)
		} else if err := req.SetInet4Addr(is.address); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, is.call, req); err != nil {
			return err
		}
	}
	return nil
}

// Guest is what the test can ask a machine to do.
type Guest struct {
	backend backends.Backend

	mu         sync.Mutex
	files      map[int]*os.File
	initiators map[string]*iscsi.Kernel

	acknowledged atomic.Int64
}

// None is nothing to say.
type None struct{ No bool }

// EBSOrder is what a backend is made from.
type EBSOrder struct {
	Config ebs.Config
	Self   ebs.Self
	Env    map[string]string
}

// EBS starts the plugin's part that is tested, or starts it anew.
func (g *Guest) EBS(o EBSOrder, _ *None) (err error) {
	for name, value := range o.Env {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	g.backend, err = ebs.New(o.Config, o.Self)
	return err
}

// RBDOrder is what a backend is made from.
type RBDOrder struct {
	Config rbd.Config
	Self   rbd.Self
	// Keyring is what is in Config's keyring file.
	Keyring string
}

// RBD starts the plugin's part that is tested, or starts it anew.
func (g *Guest) RBD(o RBDOrder, _ *None) (err error) {
	if err := os.WriteFile(o.Config.KeyringFile, []byte(o.Keyring), 0o600); err != nil {
		return err
	}
	g.backend, err = rbd.New(o.Config, o.Self)
	return err
}

// Initiate makes an initiator, or makes it anew: its interface is its name.
func (g *Guest) Initiate(cfg iscsi.KernelConfig, _ *None) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.initiators[cfg.Interface] = iscsi.NewKernel(cfg)
	return nil
}

// Initiator is what an initiator is to do something with.
type Initiator struct {
	Name   string
	LUN    iscsi.LUN
	Device iscsi.Device
}

// with has an initiator do something, within a time that is longer than any of its own bounds.
func (g *Guest) with(of Initiator, do func(ctx context.Context, k *iscsi.Kernel) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	g.mu.Lock()
	k := g.initiators[of.Name]
	g.mu.Unlock()
	return do(ctx, k)
}

// Connect is the initiator's.
func (g *Guest) Connect(of Initiator, d *iscsi.Device) error {
	return g.with(of, func(ctx context.Context, k *iscsi.Kernel) (err error) {
		*d, err = k.Connect(ctx, of.LUN)
		return err
	})
}

// Disconnect is the initiator's.
func (g *Guest) Disconnect(of Initiator, clean *bool) error {
	return g.with(of, func(ctx context.Context, k *iscsi.Kernel) (err error) {
		*clean, err = k.Disconnect(ctx, of.Device)
		return err
	})
}

// Served is the initiator's.
func (g *Guest) Served(of Initiator, served *bool) error {
	return g.with(of, func(_ context.Context, k *iscsi.Kernel) (err error) {
		*served, err = k.Served(of.Device)
		return err
	})
}

// Devices is the initiator's.
func (g *Guest) Devices(of Initiator, found *[]iscsi.Device) error {
	return g.with(of, func(ctx context.Context, k *iscsi.Kernel) (err error) {
		*found, err = k.Devices(ctx)
		return err
	})
}

// Shell runs a script, up to its first command that fails.
func (g *Guest) Shell(script string, said *string) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/bin/sh", "-euc", script).CombinedOutput()
	*said = string(out)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Attach is the backend's.
func (g *Guest) Attach(req backends.AttachRequest, att *backends.Attachment) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	*att, err = g.backend.Attach(ctx, req)
	return err
}

// Detach is the backend's.
func (g *Guest) Detach(att backends.Attachment, _ *None) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	return g.backend.Detach(ctx, att)
}

// Attachments is the backend's.
func (g *Guest) Attachments(_ None, atts *[]backends.Attachment) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	*atts, err = g.backend.Attachments(ctx)
	return err
}

// Opening is how to open a device; Mounted as the kernel does for a mount.
type Opening struct {
	Path    string
	Mounted bool
}

// Open opens a device, and keeps it open.
func (g *Guest) Open(o Opening, file *int) error {
	flags := os.O_RDWR
	if o.Mounted {
		flags |= syscall.O_EXCL
	}
	f, err := os.OpenFile(o.Path, flags, 0)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	*file = int(f.Fd())
	g.files[*file] = f
	return nil
}

// Close closes what Open has opened.
func (g *Guest) Close(file int, _ *None) error {
	g.mu.Lock()
	f := g.files[file]
	delete(g.files, file)
	g.mu.Unlock()
	return f.Close()
}

// Data is a part of a device.
type Data struct {
	Path   string
	Offset int64
	Bytes  []byte
}

// Write writes to a device, and syncs.
func (g *Guest) Write(d Data, _ *None) error {
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(d.Bytes, d.Offset); err != nil {
		return err
	}
	return f.Sync()
}

// Read reads as many bytes of a device as it is given.
func (g *Guest) Read(d Data, data *[]byte) error {
	f, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	*data = make([]byte, len(d.Bytes))
	_, err = f.ReadAt(*data, d.Offset)
	return err
}

// List lists a directory.
func (g *Guest) List(dir string, names *[]string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		*names = append(*names, e.Name())
	}
	return err
}

// File returns what is in a file.
func (g *Guest) File(path string, text *string) error {
	b, err := os.ReadFile(path)
	*text = string(bytes.TrimSpace(b))
	return err
}

// record is the size of what Hammer writes.
const record = 4096

// Records is how many Hammer writes before it begins again with the first.
const records = 1024

// Hammer writes numbered records to a device, one after the other, each synced before it
// counts, until one fails.
func (g *Guest) Hammer(path string, failed *string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for n := int64(1); ; n++ {
		if _, err = f.WriteAt(numbered(n), n%records*record); err == nil {
			err = f.Sync()
		}
		if err != nil {
			*failed = err.Error()
			return nil
		}
		g.acknowledged.Store(n)
	}
}

// Acknowledged is the number of Hammer's last record that was.
func (g *Guest) Acknowledged(_ None, n *int64) error {
	*n = g.acknowledged.Load()
	return nil
}

// Forget makes that number 0.
func (g *Guest) Forget(None, *None) error {
	g.acknowledged.Store(0)
	return nil
}

func numbered(n int64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(n)), record/8)
}
