// Package vm_test runs backends in virtual machines, where they meet a real kernel with real
// devices that come and go. A machine is qemu with Debian's kernel; its only program is the
// test's own, which does what the test asks it to (guest_test.go).
package vm_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

func TestMain(m *testing.M) {
	if _, err := os.Stat(orderFile); err == nil && os.Getpid() == 1 {
		beGuest()
	}
	os.Exit(m.Run())
}

// config is what a machine has.
type config struct {
	// modules of the kernel, besides those that every machine needs.
	modules []string
	// slots for disks.
	slots int
	// tap is the interface of this host that the machine is connected to, instead of a network
	// of its own.
	tap string
	// host and guest are their addresses.
	host, guest string
	// root shows the machine this host's files, which it cannot change.
	root bool
	// program is a file of this host that the machine has as programFile.
	program string
}

// machine is a virtual machine that runs.
type machine struct {
	t       *testing.T
	pid     int
	monitor *monitor
	guest   *rpc.Client
}

const (
	memory = 1 << 30
	// Emulated, a machine takes some seconds for what a real one does at once, and more if
	// others use the processors.
	bootLimit, callLimit, qmpLimit = 5 * time.Minute, 5 * time.Minute, time.Minute
)

// needVM skips a test where there is no kernel for a machine, or fails it if REQUIRE has vm.
func needVM(t *testing.T) (kernel string) {
	t.Helper()
	kernel = os.Getenv("VM_KERNEL")
	_, err := exec.LookPath("qemu-system-x86_64")
	if kernel != "" && err == nil {
		return kernel
	}
	if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "vm") {
		t.Fatal("needs qemu-system-x86_64 and, in VM_KERNEL, an unpacked kernel, and REQUIRE says that they are there")
	}
	t.Skip("needs a kernel for virtual machines: make test-vm")
	return ""
}

// boot starts a machine, which ends with the test at the latest, whatever hangs in it.
func boot(t *testing.T, cfg config) *machine {
	t.Helper()
	kernel := needVM(t)
	dir := t.TempDir()
	if cfg.tap == "" {
		cfg.host, cfg.guest = "10.0.2.2", "10.0.2.15" // qemu's own network
	}
	listener, err := net.Listen("tcp", map[bool]string{true: "127.0.0.1", false: cfg.host}[cfg.tap == ""]+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	o := order{Host: cfg.host, Guest: cfg.guest, Port: listener.Addr().(*net.TCPAddr).Port, Root: cfg.root}
	if cfg.root {
		cfg.modules = append(cfg.modules, "9p", "9pnet_virtio")
	}
	if err := writeInitramfs(dir+"/initramfs", kernel, cfg, o); err != nil {
		t.Fatal(err)
	}
	images, err := filepath.Glob(kernel + "/boot/vmlinuz-*")
	if err != nil || len(images) != 1 {
		t.Fatalf("VM_KERNEL has the kernels %s: %v", images, err)
	}
	for _, accelerator := range accelerators() {
		m, err := start(t, accelerator, dir, images[0], cfg, listener.(*net.TCPListener))
		if err == nil {
			return m
		}
		console, _ := os.ReadFile(dir + "/console")
		t.Logf("no machine with %s: %v; its console ends with\n%s", accelerator, err, console[max(0, len(console)-4000):])
	}
	t.Fatal("no machine has started")
	return nil
}

// accelerators are what may run a machine, the best first. A /dev/kvm that cannot run one is
// found out: it hangs in the firmware.
func accelerators() []string {
	cpu, _ := os.ReadFile("/proc/cpuinfo") // nothing, then
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
	}
	if err != nil || !bytes.Contains(cpu, []byte(" vmx ")) && !bytes.Contains(cpu, []byte(" svm ")) {
		return []string{"tcg,thread=multi"}
	}
	return []string{"kvm", "tcg,thread=multi"}
}

// start runs qemu, and waits until the guest calls.
func start(t *testing.T, accelerator, dir, kernel string, cfg config, listener *net.TCPListener) (*machine, error) {
	t.Helper()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	defer theirs.Close()
	args := []string{
		"-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(memory >> 20), "-M", "q35", "-nodefaults", "-no-reboot",
		"-display", "none", "-serial", "file:" + dir + "/console", "-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		"-kernel", kernel, "-initrd", dir + "/initramfs", "-append", "console=ttyS0 quiet panic=-1",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
	}
	if cfg.tap != "" {
		args[slices.Index(args, "user,id=net")] = "tap,id=net,script=no,downscript=no,ifname=" + cfg.tap
	}
	if cfg.root {
		args = append(args, "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
			"-device", "virtio-9p-pci,fsdev=root,mount_tag=root")
	}
	for i := range cfg.slots {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=slot%d,chassis=%[1]d,slot=%[1]d", i+1))
	}
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.ExtraFiles = []*os.File{theirs}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	// Not even a test that is killed leaves one behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// The kernel takes the death of this thread for that of the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		if started <- err; err == nil {
			_ = cmd.Wait() // it is killed
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	kill := func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		_ = ours.Close()
	}
	limit := bootLimit
	if accelerator == "kvm" {
		limit = 30 * time.Second
	}
	began := time.Now()
	if err := listener.SetDeadline(began.Add(limit)); err != nil {
		kill()
		return nil, err
	}
	go func() {
		<-ended
		_ = listener.SetDeadline(time.Now()) // it is not waited for any more
	}()
	conn, err := listener.Accept()
	if err != nil {
		kill()
		return nil, fmt.Errorf("%w %s", err, errs.String())
	}
	m := &machine{t: t, pid: cmd.Process.Pid, guest: rpc.NewClient(conn)}
	t.Cleanup(func() {
		_ = m.guest.Close()
		kill()
		if t.Failed() {
			console, _ := os.ReadFile(dir + "/console")
			t.Logf("the console ends with\n%s", console[max(0, len(console)-4000):])
		}
	})
	if m.monitor, err = newMonitor(ours); err != nil {
		return nil, err
	}
	t.Logf("a machine with %s has started in %s", accelerator, time.Since(began).Round(100*time.Millisecond))
	return m, nil
}

// ask has the guest do something, and returns what it says.
func ask[R any](m *machine, method string, args any) (R, error) {
	reply := new(R)
	select {
	case call := <-m.guest.Go("Guest."+method, args, reply, make(chan *rpc.Call, 1)).Done:
		return *reply, call.Error
	case <-time.After(callLimit):
		return *new(R), fmt.Errorf("the machine has not answered %s within %s", method, callLimit)
	}
}

// must is ask where the machine has to do it.
func must[R any](m *machine, method string, args any) R {
	m.t.Helper()
	reply, err := ask[R](m, method, args)
	if err != nil {
		m.t.Fatal(err)
	}
	return reply
}

func (m *machine) detach(att backends.Attachment) error {
	_, err := ask[None](m, "Detach", att)
	return err
}

// attachments demands that they are what the machine has.
func (m *machine) attachments(want ...backends.Attachment) {
	m.t.Helper()
	atts := must[[]backends.Attachment](m, "Attachments", None{})
	byVolume := func(a, b backends.Attachment) int { return strings.Compare(a.Volume, b.Volume) }
	slices.SortFunc(atts, byVolume)
	slices.SortFunc(want, byVolume)
	if !slices.Equal(atts, want) {
		m.t.Errorf("attachments are %+v; want %+v", atts, want)
	}
}

// write writes what only this volume has.
func (m *machine) write(device string, v backends.Volume) {
	m.t.Helper()
	for _, at := range parts(v) {
		must[None](m, "Write", Data{device, at, pattern(v)})
	}
}

// reads demands that it is there.
func (m *machine) reads(device string, v backends.Volume) {
	m.t.Helper()
	for _, at := range parts(v) {
		if got := must[[]byte](m, "Read", Data{device, at, pattern(v)}); !bytes.Equal(got, pattern(v)) {
			m.t.Errorf("%s at %d: other data than was written", device, at)
		}
	}
}

// inFile demands that it is in a file or device of this host.
func inFile(t *testing.T, path string, v backends.Volume) {
	t.Helper()
	for _, at := range parts(v) {
		if !bytes.Equal(readAt(t, path, at, len(pattern(v))), pattern(v)) {
			t.Errorf("%s at %d: other data than was written", path, at)
		}
	}
}

func readAt(t *testing.T, path string, at int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, n)
	if _, err := f.ReadAt(data, at); err != nil {
		t.Fatal(err)
	}
	return data
}

func pattern(v backends.Volume) []byte {
	return bytes.Repeat([]byte(v.ID+"\n...........................\n"), 1024)
}

func parts(v backends.Volume) []int64 {
	return []int64{0, v.Size/2 + 512, v.Size - int64(len(pattern(v)))}
}

// hammer has the machine write to a device until it fails, and says with what.
func (m *machine) hammer(device string) (failed chan string) {
	m.t.Helper()
	failed = make(chan string, 1)
	must[None](m, "Forget", None{})
	go func() {
		call := <-m.guest.Go("Guest.Hammer", device, new(string), make(chan *rpc.Call, 1)).Done
		if text := *call.Reply.(*string); call.Error == nil {
			failed <- text
		} else {
			failed <- "no writer: " + call.Error.Error()
		}
	}()
	m.until("20 records are acknowledged", func() bool {
		if len(failed) > 0 {
			m.t.Fatal(<-failed)
		}
		return m.acknowledged() >= 20
	})
	return failed
}

func (m *machine) acknowledged() int64 {
	m.t.Helper()
	return must[int64](m, "Acknowledged", None{})
}

// kept demands all records that were acknowledged of what hammer has written.
func kept(t *testing.T, data []byte, last int64) {
	t.Helper()
	for n := max(1, last-records+2); n <= last; n++ {
		if at := n % records * record; !bytes.Equal(data[at:at+record], numbered(n)) {
			t.Errorf("record %d of %d is missing", n, last)
		}
	}
}

func (m *machine) until(what string, so func() bool) {
	m.t.Helper()
	for began := time.Now(); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > callLimit {
			m.t.Fatalf("not within %s: %s", callLimit, what)
		}
	}
}

// wantSaid demands an error that says what to do.
func wantSaid(t *testing.T, err error, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want it to say %q", err, text)
		}
	}
}

// writeInitramfs makes the first file system of a machine: this program, another one, and modules.
func writeInitramfs(path, kernel string, cfg config, o order) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := elf.Open(self)
	if err != nil {
		return err
	}
	defer program.Close()
	if libs, err := program.ImportedLibraries(); err != nil || len(libs) > 0 {
		return fmt.Errorf("this program needs the libraries %s, which a machine has not: set CGO_ENABLED=0 (%w)", libs, err)
	}
	versions, err := filepath.Glob(kernel + "/lib/modules/*")
	if err != nil || len(versions) != 1 {
		return fmt.Errorf("VM_KERNEL has modules of the kernels %s: %w", versions, err)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	archive := &cpio{Writer: f}
	for _, name := range append([]string{"virtio_pci", "virtio_net", "af_packet"}, cfg.modules...) {
		out, err := exec.Command("modprobe", "-d", kernel, "-S", filepath.Base(versions[0]), "--show-depends", name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("module %s: %w: %s", name, err, out)
		}
		for line := range strings.Lines(string(out)) {
			file, ok := strings.CutPrefix(strings.TrimSpace(line), "insmod ")
			module := "/" + filepath.Base(file)
			if !ok || slices.Contains(o.Modules, module) {
				continue
			}
			o.Modules = append(o.Modules, module)
			archive.add(module, file, 0o100600)
		}
	}
	told, err := json.Marshal(o)
	if err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/tmp", "/host"} {
		archive.entry(dir, 0o040755, nil)
	}
	archive.entry(orderFile, 0o100600, told)
	archive.add("/init", self, 0o100755)
	if cfg.program != "" {
		archive.add(broughtFile, cfg.program, 0o100755)
	}
	archive.entry("/TRAILER!!!", 0, nil)
	return errors.Join(archive.err, f.Close())
}

// cpio writes an archive in the form that the kernel unpacks.
type cpio struct {
	io.Writer
	n   int
	err error
}

func (c *cpio) add(name, file string, mode int) {
	data, err := os.ReadFile(file)
	c.err = errors.Join(c.err, err)
	c.entry(name, mode, data)
}

func (c *cpio) entry(name string, mode int, data []byte) {
	name = strings.TrimPrefix(name, "/")
	c.n++
	var b bytes.Buffer
	b.WriteString("070701")
	for _, field := range []int{c.n, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0} {
		fmt.Fprintf(&b, "%08x", field)
	}
	pad := func() { b.Write(make([]byte, (4-b.Len()%4)%4)) }
	b.WriteString(name + "\x00")
	pad()
	b.Write(data)
	pad()
	_, err := c.Write(b.Bytes())
	c.err = errors.Join(c.err, err)
}

// monitor is what qemu is controlled by, in its protocol QMP.
type monitor struct {
	mu      sync.Mutex // one command at a time, as qemu has it
	conn    *os.File
	replies chan qmpMessage

	goneMu sync.Mutex
	gone   map[string]bool // devices that the guest has let go of
}

type qmpMessage struct {
	Return json.RawMessage
	Error  *struct{ Desc string }
	Event  string
	Data   struct{ Device string }
}

func newMonitor(conn *os.File) (*monitor, error) {
	m := &monitor{conn: conn, replies: make(chan qmpMessage, 1), gone: map[string]bool{}}
	go func() {
		defer close(m.replies)
		for decoder := json.NewDecoder(conn); ; {
			var msg qmpMessage
			if decoder.Decode(&msg) != nil {
				return // it has ended
			}
			switch {
			case msg.Event == "DEVICE_DELETED" && msg.Data.Device != "":
				m.goneMu.Lock()
				m.gone[msg.Data.Device] = true
				m.goneMu.Unlock()
			case msg.Return != nil || msg.Error != nil:
				m.replies <- msg
			}
		}
	}()
	return m, m.do("qmp_capabilities", nil)
}

func (m *monitor) do(command string, args map[string]any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	order := map[string]any{"execute": command}
	if args != nil {
		order["arguments"] = args
	}
	if err := json.NewEncoder(m.conn).Encode(order); err != nil {
		return err
	}
	select {
	case msg, ok := <-m.replies:
		switch {
		case !ok:
			return fmt.Errorf("%s: qemu has ended", command)
		case msg.Error != nil:
			return fmt.Errorf("%s: %s", command, msg.Error.Desc)
		}
		return nil
	case <-time.After(qmpLimit):
		return fmt.Errorf("%s: qemu has not answered within %s", command, qmpLimit)
	}
}

// disk is an NVMe disk to plug into a machine.
type disk struct {
	id, file, serial, model string
	slot                    int
}

// qemuModel is what a disk says it is, unless qemu's memory is changed.
const qemuModel = "QEMU NVMe Ctrl"

// plug plugs disks in, in their order. The guest runs again when all are there.
func (m *machine) plug(disks ...disk) (err error) {
	if err := m.monitor.do("stop", nil); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.monitor.do("cont", nil)) }()
	for _, d := range disks {
		if err := m.monitor.do("blockdev-add", map[string]any{
			"node-name": d.id, "driver": "raw", "file": map[string]any{"driver": "file", "filename": d.file},
		}); err != nil {
			return err
		}
		if err := m.monitor.do("device_add", map[string]any{
			"driver": "nvme", "id": d.id, "bus": fmt.Sprintf("slot%d", d.slot), "drive": d.id, "serial": d.serial,
		}); err != nil {
			return err
		}
		if d.model != qemuModel {
			if err := m.setModel(d.serial, d.model); err != nil {
				return err
			}
		}
	}
	return nil
}

// pull asks the guest to let go of a disk.
func (m *machine) pull(id string) error { return m.monitor.do("device_del", map[string]any{"id": id}) }

// pulled says whether the guest has, and makes its slot free.
func (m *machine) pulled(id string) (bool, error) {
	m.monitor.goneMu.Lock()
	gone := m.monitor.gone[id]
	delete(m.monitor.gone, id)
	m.monitor.goneMu.Unlock()
	if !gone {
		return false, nil
	}
	return true, m.monitor.do("blockdev-del", map[string]any{"node-name": id})
}

// setModel gives a disk that was just plugged in another model. qemu has no setting for
// it. What the disk tells the guest is in qemu's memory: serial number and model, next to each
// other, each filled up with spaces.
func (m *machine) setModel(serial, model string) error {
	identity := func(model string) []byte { return fmt.Appendf(nil, "%-20s%-40s", serial, model) }
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", m.pid))
	if err != nil {
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", m.pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	changed := 0
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var access string
		// The guest's own memory is as large as that.
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &access); err != nil || access[:2] != "rw" || to-from >= memory {
			continue
		}
		data := make([]byte, to-from)
		if _, err := mem.ReadAt(data, from); err != nil {
			continue // some cannot be read
		}
		for at := 0; ; {
			found := bytes.Index(data[at:], identity(qemuModel))
			if found < 0 {
				break
			}
			at += found
			if _, err := mem.WriteAt(identity(model), from+int64(at)); err != nil {
				return err
			}
			changed++
			at++
		}
	}
	if changed != 1 {
		return fmt.Errorf("qemu has the identity of disk %s in %d places of its memory, not in one: is this another qemu?", serial, changed)
	}
	return nil
}
