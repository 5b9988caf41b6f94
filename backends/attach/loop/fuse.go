package loop

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FUSE is a mount of FUSE on this host.
type FUSE struct {
	// Connection is the number of the kernel's connection to the program.
	Connection uint32
}

// FUSEAt returns what is mounted at a path, without touching it; ok says that
// something of FUSE is.
func FUSEAt(path string) (mount FUSE, ok bool, err error) {
	_, err = mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if m.Mountpoint == path && strings.HasPrefix(m.FSType, "fuse") {
			mount, ok = FUSE{Connection: uint32(m.Minor)}, true // the last one is on top
		}
		return true, false
	})
	return mount, ok, err
}

// Abort makes every request of the connection fail, those too that wait for an answer,
// whatever the program does. What waited in the kernel, also in the state D, goes on.
func (m FUSE) Abort() error {
	err := m.set("abort", "1")
	if errors.Is(err, unix.ENOENT) {
		return nil // it has ended
	}
	return err
}

// OneByOne makes the kernel send the next request for data of a file, of a loop device's for
// example, when the one before has been answered. The connection must have answered something
// before, since its program may set this at first.
func (m FUSE) OneByOne() error { return m.set("max_background", "1") }

// set writes to one of the kernel's files of the connection.
func (m FUSE) set(name, value string) error {
	// They need no place to be mounted on.
	config, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(config)
	if err := unix.FsconfigCreate(config); err != nil {
		return os.NewSyscallError("fsconfig", err)
	}
	root, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fsmount", err)
	}
	defer unix.Close(root)
	file, err := unix.Openat(root, fmt.Sprintf("%d/%s", m.Connection, name), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	defer unix.Close(file)
	_, err = unix.Write(file, []byte(value))
	return os.NewSyscallError("write", err)
}

// Unmount takes a mount away from its path, if there is one. Whoever has its file open
// keeps it.
func Unmount(path string) {
	for range 8 { // one on top of another
		if unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) != nil {
			return
		}
	}
}
