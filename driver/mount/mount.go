// Package mount formats, checks, mounts and closes filesystems on block devices.
// It is the only place of the program, with backends that must talk to the
// kernel, that makes such system calls.
package mount

import (
	"context"
	"errors"
	"os"
)

// Spec says which filesystem to mount where.
type Spec struct {
	// Device is the block device.
	Device string
	// FS is ext4, xfs or btrfs.
	FS string
	// UUID is what the filesystem's UUID must be: the dataset's id.
	UUID string
	// Options are extra mount options as the user wrote them, comma separated.
	Options string
	// Target is the directory to mount on. It is made, root-owned, mode 0000 and
	// immutable where the filesystem below allows, so that nothing can be written
	// to it while nothing is mounted.
	Target string
}

// FormatSpec says how to make a filesystem.
type FormatSpec struct {
	Device, FS, UUID string
	// Label is shortened to what the filesystem allows.
	Label string
	// Options are extra words for mkfs as the user wrote them, split on blanks.
	Options string
	// Guard makes an ext4 refuse to be mounted while another host has it mounted:
	// multi-mount protection, with an update interval of one second. Other
	// filesystems have none, and -O ^mmp in Options turns it off.
	Guard bool
}

// Owner is what the served directory of a new filesystem gets.
type Owner struct {
	UID, GID int
	Mode     os.FileMode // permission bits, 0 for the default 0755
}

// The error classes. Compare with errors.Is.
var (
	// ErrBusy: somebody has the filesystem mounted or the device open.
	ErrBusy = errors.New("busy")
	// ErrIdentity: the device does not carry the expected filesystem.
	ErrIdentity = errors.New("not the expected filesystem")
	// ErrNotBlank: a device that should be blank is not, and is not formatted.
	ErrNotBlank = errors.New("not blank")
	// ErrUnsupported: the machine cannot do it, such as a missing mkfs.
	ErrUnsupported = errors.New("not supported here")
	// ErrInvalid: what the user asked for can never work, such as an unknown mount
	// option. CheckFS, CheckOptions, CheckMkfs and MinSize tell without a device.
	ErrInvalid = errors.New("invalid")
	// ErrDamaged: the filesystem has errors that are not repaired without a person's
	// decision. It is not mounted.
	ErrDamaged = errors.New("damaged")
	// ErrMultiMount: the filesystem's guard says that another host has it mounted, or
	// checks it.
	ErrMultiMount = errors.New("in use by another host")
	// ErrUnwritten: it is done, and nobody has the filesystem or the device any
	// more, but the device did not take what was written last.
	ErrUnwritten = errors.New("last writes may be lost")
)

// DataDir is the sub-directory of each filesystem that containers get. A
// filesystem's root has lost+found in it, which stops Docker's copy-up and the
// initialisation of most databases.
const DataDir = "data"

// A Mounter does what the driver needs of the kernel. System is the real one,
// Fake the one for tests.
type Mounter interface {
	// Format makes a filesystem with the given UUID. The caller knows by record
	// that the device was never formatted; Format only ever vetoes: it reads the
	// first and the last MiB and returns ErrNotBlank unless they are zeros or an
	// interrupted Format of the same UUID, which it then repeats. A whole filesystem
	// of that kind and UUID is left as it is, and nil is returned: an earlier Format
	// ended and was not recorded.
	Format(ctx context.Context, spec FormatSpec) error

	// Mount checks that the device carries the filesystem UUID (ErrIdentity if
	// not), runs the filesystem's check where its superblock asks for one, mounts
	// it on spec.Target, grows it to the device's size, and makes spec.Target's
	// DataDir with owner if there is none yet. Mounted there already from the same
	// device: nil. A failed Mount leaves nothing mounted, and none comes later. warnings
	// are for the log: what was left undone without harm, such as a growth the kernel
	// refused. ErrBusy if the filesystem was shut down and is still mounted somewhere on
	// this host.
	//
	// A guarded ext4 that was not unmounted by its last host takes 22 s, and twice that
	// if it has to be checked. ErrMultiMount comes after 11 s. A context that ends
	// earlier ends the wait.
	Mount(ctx context.Context, spec Spec, owner Owner) (warnings []string, err error)

	// Health returns ErrDamaged with what the kernel noted about the filesystem that
	// is mounted on target: errors found in it, that it was forced to be read-only, or
	// that it was shut down. nil if all is well, and if nothing is mounted there. It
	// does not ask the device, so it never waits for one, and does not see a failure
	// that nobody has run into yet.
	Health(target string) error

	// Mounted returns the device mounted on target in this process's mount
	// namespace, or "" if nothing is. It trusts /proc/self/mountinfo only.
	Mounted(target string) (device string, err error)

	// Unmount writes everything back and unmounts target, never lazily and never
	// by force: ErrBusy if somebody in this mount namespace uses it. nil if nothing
	// is mounted there. The bare directory is removed when it was the last mount. If
	// writing back fails (the device is gone), it unmounts all the same and returns
	// ErrUnwritten once: the next call returns nil. What was shut down is unmounted
	// without an error.
	Unmount(ctx context.Context, target string) error

	// Shutdown stops the filesystem mounted on target, in every mount namespace and
	// whoever has files open: every later call of theirs gets EIO, and what they wrote
	// and did not sync is lost. What they did sync is there after the next Mount. When
	// it has returned nil, nothing but the guard's mark that it was left reaches the
	// device any more. If ctx ends first, the device does not answer; the filesystem is
	// stopped all the same, and the next call tells.
	//
	// It does not unmount. nil if it was stopped already, or if nothing is mounted on
	// target: a namespace that alone kept the filesystem goes on, as Close shows.
	// ErrUnsupported if the filesystem has no such call, as btrfs.
	Shutdown(ctx context.Context, target string) error

	// Close proves that nobody has the device open or mounted, in any mount
	// namespace: it opens it exclusively (O_EXCL), checks that it has no holders,
	// flushes it, and lets go. ErrBusy if not so within a short wait for mount
	// namespaces of ended processes to go. `umount` returning 0 proves nothing.
	// ErrUnwritten if all that is so and the device does not take the flush: what it
	// did not take is dropped, and the device can be given away, but not as one with all
	// that was written. nil even then if this Mounter shut the filesystem down, which
	// gave that up.
	Close(ctx context.Context, device string) error

	// Lacks returns which programs for a kind of filesystem are not there, each with
	// the package that has it.
	Lacks(fs string) []string

	// Below returns what is mounted below root in this process's mount namespace.
	Below(root string) ([]Point, error)
}

// A Point is one line of the mount table.
type Point struct {
	Target string
	// Number is the filesystem's as every mount namespace shows it, such as 7:3.
	Number string
}
