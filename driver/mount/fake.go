package mount

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// The calls of a Fake, as FakeCall.Name and the first argument of its hook.
const (
	CallFormat   = "format"
	CallMount    = "mount"
	CallHealth   = "health"
	CallMounted  = "mounted"
	CallUnmount  = "unmount"
	CallShutdown = "shutdown"
	CallClose    = "close"
)

// FakeCall is one call of a Fake. Arg is the device of a Format or Close, the
// target of the others.
type FakeCall struct{ Name, Arg string }

func (c FakeCall) String() string { return c.Name + " " + c.Arg }

// FakeDisks is what is on the disks of a pretended storage system: it survives
// everything. One FakeDisks is shared by the kernels of all hosts of a test, and
// sees when two of them use one disk at a time.
type FakeDisks struct {
	mu         sync.Mutex
	disks      map[string]*fakeDisk
	violations []string
	refusals   []string
}

type fakeDisk struct {
	fs, uuid string
	foreign  bool
	formats  int
	mounted  bool  // ever
	owner    Owner // of the data directory, from the first mount
	guard    bool
	users    map[*FakeKernel]int
	stopped  map[*FakeKernel]bool // its filesystem there was shut down
	cut      map[string]bool      // hosts the storage system keeps away
}

// writers are the kernels that can still write to the disk.
func (d *fakeDisk) writers() (hosts []string) {
	for k := range d.users {
		if !d.stopped[k] && !d.cut[k.host] {
			hosts = append(hosts, k.host)
		}
	}
	slices.Sort(hosts)
	return hosts
}

// NewFakeDisks returns disks that are all blank.
func NewFakeDisks() *FakeDisks { return &FakeDisks{disks: map[string]*fakeDisk{}} }

// get needs mu.
func (d *FakeDisks) get(name string) *fakeDisk {
	disk := d.disks[name]
	if disk == nil {
		disk = &fakeDisk{users: map[*FakeKernel]int{}, stopped: map[*FakeKernel]bool{}, cut: map[string]bool{}}
		d.disks[name] = disk
	}
	return disk
}

// SetFilesystem puts a filesystem on a disk; an empty fs makes it blank, "foreign"
// data that is no filesystem.
func (d *FakeDisks) SetFilesystem(disk, fs, uuid string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.get(disk)
	f.fs, f.uuid, f.foreign, f.mounted = fs, uuid, fs == "foreign", false
}

// Filesystem returns what is on a disk, "" if it is blank.
func (d *FakeDisks) Filesystem(disk string) (fs, uuid string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.get(disk)
	return f.fs, f.uuid
}

// Formats counts the filesystems made on a disk.
func (d *FakeDisks) Formats(disk string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.get(disk).formats
}

// DataOwner returns the owner its first Mount gave to the disk's data directory.
func (d *FakeDisks) DataOwner(disk string) Owner {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.get(disk).owner
}

// Violations lists what must never happen: two kernels that used one disk at a
// time, and could both write to it. A test ends by asserting that there is none.
func (d *FakeDisks) Violations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.violations)
}

// Refusals lists the Mounts that failed with ErrMultiMount. Without the disk's guard
// each would be a violation, so that a test which does not provoke them asserts that
// there is none either.
func (d *FakeDisks) Refusals() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.refusals)
}

// SetCut keeps a host away from a disk, as a fence of the storage system does, or
// lets it back. What the host has mounted stays mounted and fails.
func (d *FakeDisks) SetCut(disk, host string, cut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.get(disk)
	f.cut[host] = cut
	d.check(disk, f)
}

// check needs mu.
func (d *FakeDisks) check(name string, disk *fakeDisk) {
	if hosts := disk.writers(); len(hosts) > 1 {
		d.violations = append(d.violations, fmt.Sprintf("disk %s is used by hosts %v at the same time", name, hosts))
	}
}

// FakeKernel is one host's kernel: mounts and open devices. It survives the end
// of the processes (the Fakes) that use it.
type FakeKernel struct {
	host   string
	disks  *FakeDisks
	diskOf func(device string) (disk string, ok bool)

	mu     sync.Mutex
	mounts map[string]fakeMount // by target
	holds  map[string]int       // by disk: other namespaces that keep the filesystem
	busy   map[string]int       // by target: users in the plugin's own namespace
	noted  map[string]string    // by disk: what Health finds
}

type fakeMount struct{ device, disk string }

// NewFakeKernel returns a kernel with nothing mounted. diskOf says which disk a
// device path stands for at the moment, and !ok that there is no such device; nil
// means that each path is a disk of that name.
func NewFakeKernel(host string, disks *FakeDisks, diskOf func(device string) (disk string, ok bool)) *FakeKernel {
	if diskOf == nil {
		diskOf = func(device string) (string, bool) { return device, device != "" }
	}
	return &FakeKernel{
		host: host, disks: disks, diskOf: diskOf,
		mounts: map[string]fakeMount{}, holds: map[string]int{}, busy: map[string]int{}, noted: map[string]string{},
	}
}

// use changes how often k uses disk; needs k.mu.
func (k *FakeKernel) use(disk string, n int) {
	d := k.disks
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.get(disk)
	f.users[k] += n
	if f.users[k] <= 0 {
		delete(f.users, k)
		delete(f.stopped, k)
		delete(k.noted, disk)
	}
	if n > 0 {
		d.check(disk, f)
	}
}

// Write is a container that writes and syncs a file on the filesystem of device: nil
// says that the data is on the disk.
func (k *FakeKernel) Write(device string) error {
	disk, ok := k.diskOf(device)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disks.mu.Lock()
	defer k.disks.mu.Unlock()
	d := k.disks.get(disk)
	switch {
	case !ok || d.users[k] == 0:
		return fmt.Errorf("write to %s: not mounted", device)
	case d.stopped[k] || d.cut[k.host]:
		return fmt.Errorf("write to %s: %w", device, errIO)
	}
	return nil
}

// SetNoted makes Health return ErrDamaged with a text for the filesystem of device,
// for as long as it is mounted; "" takes it back.
func (k *FakeKernel) SetNoted(device, noted string) {
	disk, _ := k.diskOf(device)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noted[disk] = noted
}

// Hold is a container that has the filesystem of device in its own mount
// namespace: Unmount succeeds and Close returns ErrBusy until release is called.
func (k *FakeKernel) Hold(device string) (release func()) {
	disk, _ := k.diskOf(device)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.holds[disk]++
	k.use(disk, 1)
	return k.release(disk)
}

// release returns a function that takes one hold away, once.
func (k *FakeKernel) release(disk string) func() {
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.holds[disk] > 0 { // else it went with a Reboot
			k.holds[disk]--
			k.use(disk, -1)
		}
	})
}

// Busy is a process in the plugin's own mount namespace that uses what is mounted
// on target: Unmount returns ErrBusy until release is called.
func (k *FakeKernel) Busy(target string) (release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.busy[target]++
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.busy[target]--
	})
}

// DisablePlugin is what `docker plugin disable -f` does: the plugin's mount
// namespace goes, and so does every mount in the table, while the containers'
// namespaces keep their filesystems until release is called.
func (k *FakeKernel) DisablePlugin() (release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var releases []func()
	for _, m := range k.mounts { // the mount's use becomes the hold's
		k.holds[m.disk]++
		releases = append(releases, k.release(m.disk))
	}
	clear(k.mounts)
	return func() {
		for _, r := range releases {
			r()
		}
	}
}

// Reboot ends every mount, hold and use.
func (k *FakeKernel) Reboot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.mounts)
	clear(k.holds)
	clear(k.busy)
	clear(k.noted)
	k.disks.mu.Lock()
	defer k.disks.mu.Unlock()
	for _, disk := range k.disks.disks {
		delete(disk.users, k)
		delete(disk.stopped, k)
	}
}

// Mounts returns the mount table: target to device.
func (k *FakeKernel) Mounts() map[string]string {
	k.mu.Lock()
	defer k.mu.Unlock()
	table := map[string]string{}
	for target, m := range k.mounts {
		table[target] = m.device
	}
	return table
}

// InUse says whether anybody on this host has the filesystem of device mounted:
// a backend's fake asks before it detaches.
func (k *FakeKernel) InUse(device string) bool {
	disk, _ := k.diskOf(device)
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.inUse(disk)
}

// inUse needs mu.
func (k *FakeKernel) inUse(disk string) bool {
	if k.holds[disk] > 0 {
		return true
	}
	for m := range maps.Values(k.mounts) {
		if m.disk == disk {
			return true
		}
	}
	return false
}

// Fake is a Mounter for tests: one process on a FakeKernel. A second Fake on the
// same kernel is the process after a restart.
type Fake struct {
	kernel *FakeKernel

	mu    sync.Mutex
	calls []FakeCall
	hook  func(call, arg string) error
	after func(call, arg string) error
	delay func(call, arg string) time.Duration

	shut map[string]bool // by disk, with kernel.mu: this process has shut it down
}

var _ Mounter = (*Fake)(nil)

// NewFake returns a Mounter on kernel.
func NewFake(kernel *FakeKernel) *Fake { return &Fake{kernel: kernel, shut: map[string]bool{}} }

// SetHook makes f ask hook before each call; an error is returned by the call,
// which then has no effect. The hook may block. nil removes it.
func (f *Fake) SetHook(hook func(call, arg string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

// SetAfter makes f ask after when a call has had its effect; an error is returned
// in place of the call's success, such as for a process that ends before it learns
// of it. nil removes it.
func (f *Fake) SetAfter(after func(call, arg string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after = after
}

// SetDelay makes each call take a time. It ends early, with the context's error
// and without effect, when the call's context does. nil removes it.
func (f *Fake) SetDelay(delay func(call, arg string) time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay = delay
}

// Calls returns the calls so far, in order, failed ones too.
func (f *Fake) Calls() []FakeCall {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// ResetCalls forgets the calls so far.
func (f *Fake) ResetCalls() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = nil
}

// do records a call, lets the test interfere, and runs effect.
func (f *Fake) do(ctx context.Context, call, arg string, effect func(k *FakeKernel) error) error {
	f.mu.Lock()
	f.calls = append(f.calls, FakeCall{call, arg})
	hook, after, delay := f.hook, f.after, f.delay
	f.mu.Unlock()
	if delay != nil {
		if d := delay(call, arg); d > 0 {
			select {
			case <-time.After(d):
			case <-ctx.Done():
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("%s %s: %w", call, arg, err)
	}
	if hook != nil {
		if err := hook(call, arg); err != nil {
			return err
		}
	}
	f.kernel.mu.Lock()
	err := effect(f.kernel)
	f.kernel.mu.Unlock()
	if err == nil && after != nil {
		err = after(call, arg)
	}
	return err
}

var (
	errNoDevice = errors.New("no such device")
	errIO       = errors.New("input/output error")
)

// Format makes a filesystem on a blank disk.
func (f *Fake) Format(ctx context.Context, spec FormatSpec) error {
	return f.do(ctx, CallFormat, spec.Device, func(k *FakeKernel) error {
		disk, ok := k.diskOf(spec.Device)
		if !ok {
			return fmt.Errorf("format %s: %w", spec.Device, errNoDevice)
		}
		if k.inUse(disk) {
			return fmt.Errorf("format %s: %w", spec.Device, ErrBusy)
		}
		k.disks.mu.Lock()
		defer k.disks.mu.Unlock()
		d := k.disks.get(disk)
		switch {
		case d.fs == spec.FS && d.uuid == spec.UUID:
			return nil
		case d.fs != "":
			return fmt.Errorf("format %s: %w: there is %s with UUID %s on it", spec.Device, ErrNotBlank, d.fs, d.uuid)
		}
		d.fs, d.uuid, d.guard = spec.FS, spec.UUID, spec.Guard && spec.FS == ext4
		d.formats++
		delete(f.shut, disk)
		return nil
	})
}

// Mount mounts a disk that has the right filesystem.
func (f *Fake) Mount(ctx context.Context, spec Spec, owner Owner) (warnings []string, err error) {
	err = f.do(ctx, CallMount, spec.Target, func(k *FakeKernel) error {
		disk, ok := k.diskOf(spec.Device)
		if !ok {
			return fmt.Errorf("mount %s: %w", spec.Device, errNoDevice)
		}
		k.disks.mu.Lock()
		d := k.disks.get(disk)
		err := mountable(k, d, spec, disk)
		if errors.Is(err, ErrMultiMount) {
			k.disks.refusals = append(k.disks.refusals, fmt.Sprintf("disk %s was refused to host %s: hosts %v use it", disk, k.host, d.writers()))
		}
		_, mounted := k.mounts[spec.Target]
		if err == nil && !d.mounted {
			d.mounted, d.owner = true, owner
		}
		k.disks.mu.Unlock()
		if err != nil || mounted {
			return err
		}
		delete(f.shut, disk)
		k.mounts[spec.Target] = fakeMount{spec.Device, disk}
		k.use(disk, 1)
		return nil
	})
	return nil, err
}

// mountable needs k.mu and the disks' mu.
func mountable(k *FakeKernel, d *fakeDisk, spec Spec, disk string) error {
	m, mounted := k.mounts[spec.Target]
	switch {
	case mounted && m.disk != disk:
		return fmt.Errorf("mount %s on %s: %s is mounted there: %w", spec.Device, spec.Target, m.device, ErrBusy)
	case mounted && d.stopped[k]:
		return fmt.Errorf("mount %s on %s: %w: it is mounted there, and was shut down", spec.Device, spec.Target, ErrBusy)
	case mounted:
		return nil
	case d.cut[k.host]:
		return fmt.Errorf("mount %s: read superblock: %w", spec.Device, errIO)
	case d.fs != spec.FS || d.uuid != spec.UUID:
		return fmt.Errorf("mount %s: %w: found %q with UUID %q, expected %s with UUID %s",
			spec.Device, ErrIdentity, d.fs, d.uuid, spec.FS, spec.UUID)
	case d.stopped[k]:
		return fmt.Errorf("mount %s: %w: it was shut down, and a process on this host still has it open", spec.Device, ErrBusy)
	}
	others := slices.DeleteFunc(d.writers(), func(host string) bool { return host == k.host })
	if d.guard && len(others) > 0 {
		return fmt.Errorf("mount %s: %w: %s", spec.Device, ErrMultiMount, others[0])
	}
	return nil
}

// Health returns what SetNoted put there, and whether it was shut down.
func (f *Fake) Health(target string) error {
	return f.do(context.Background(), CallHealth, target, func(k *FakeKernel) error {
		m, ok := k.mounts[target]
		if !ok {
			return nil
		}
		k.disks.mu.Lock()
		defer k.disks.mu.Unlock()
		switch {
		case k.disks.get(m.disk).stopped[k]:
			return fmt.Errorf("health of %s: %w: it was shut down", target, ErrDamaged)
		case k.noted[m.disk] != "":
			return fmt.Errorf("health of %s: %w: %s", target, ErrDamaged, k.noted[m.disk])
		}
		return nil
	})
}

// Mounted looks target up in the kernel's table.
func (f *Fake) Mounted(target string) (device string, err error) {
	err = f.do(context.Background(), CallMounted, target, func(k *FakeKernel) error {
		device = k.mounts[target].device
		return nil
	})
	if err != nil {
		return "", err
	}
	return device, nil
}

// Lacks is Mounter's: nothing.
func (f *Fake) Lacks(string) []string { return nil }

// Below lists the kernel's table.
func (f *Fake) Below(root string) (points []Point, err error) {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	for target := range f.kernel.mounts {
		if strings.HasPrefix(target, root+"/") {
			points = append(points, Point{Target: target, Number: "0:1"})
		}
	}
	return points, nil
}

// Unmount takes target out of the kernel's table.
func (f *Fake) Unmount(ctx context.Context, target string) error {
	return f.do(ctx, CallUnmount, target, func(k *FakeKernel) error {
		m, ok := k.mounts[target]
		if !ok {
			return nil
		}
		if k.busy[target] > 0 {
			return fmt.Errorf("unmount %s: %w", target, ErrBusy)
		}
		delete(k.mounts, target)
		lost := f.unwritten(m.disk)
		k.use(m.disk, -1)
		if lost != nil {
			return fmt.Errorf("unmount %s: %w", target, lost)
		}
		return nil
	})
}

// unwritten is what a disk that is cut off answers to a flush; needs kernel.mu.
func (f *Fake) unwritten(disk string) error {
	d := f.kernel.disks
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.get(disk).cut[f.kernel.host] && !f.shut[disk] {
		return fmt.Errorf("%w: %w", ErrUnwritten, errIO)
	}
	return nil
}

// Shutdown stops a filesystem on this host: every Write fails from then on.
func (f *Fake) Shutdown(ctx context.Context, target string) error {
	return f.do(ctx, CallShutdown, target, func(k *FakeKernel) error {
		m, ok := k.mounts[target]
		if !ok {
			return nil
		}
		k.disks.mu.Lock()
		defer k.disks.mu.Unlock()
		d := k.disks.get(m.disk)
		if d.fs == btrfs {
			return fmt.Errorf("shut down the filesystem on %s: %w: btrfs cannot be shut down", target, ErrUnsupported)
		}
		d.stopped[k], f.shut[m.disk] = true, true
		return nil
	})
}

// Close returns ErrBusy while the disk is mounted or held.
func (f *Fake) Close(ctx context.Context, device string) error {
	return f.do(ctx, CallClose, device, func(k *FakeKernel) error {
		disk, ok := k.diskOf(device)
		if !ok {
			return fmt.Errorf("close %s: %w", device, errNoDevice)
		}
		if k.inUse(disk) {
			return fmt.Errorf("close %s: %w", device, ErrBusy)
		}
		if lost := f.unwritten(disk); lost != nil {
			return fmt.Errorf("close %s: %w", device, lost)
		}
		return nil
	})
}
