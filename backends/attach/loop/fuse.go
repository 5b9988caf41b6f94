package loop

import (
	"errors"
	"fmt"
	"os"
	"strings"

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
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return FUSE{}, false, err
	}
	for line := range strings.Lines(string(text)) {
		before, after, found := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if !found || len(fields) < 5 || !strings.HasPrefix(after, "fuse") || unescape(fields[4]) != path {
			continue
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(fields[2], "%d:%d", &major, &minor); err != nil {
			return FUSE{}, false, fmt.Errorf("mountinfo: %w", err)
		}
		mount, ok = FUSE{Connection: minor}, true // the last one is on top
	}
	return mount, ok, nil
}

// unescape undoes what mountinfo does to spaces and the like.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Abort makes every request of the connection fail, those too that wait for an answer,
// whatever the program does. What waited in the kernel, also in the state D, goes on.
func (m FUSE) Abort() error {
	// The kernel's files for that need no place to be mounted on.
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
	file, err := unix.Openat(root, fmt.Sprintf("%d/abort", m.Connection), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // it has ended
	}
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	defer unix.Close(file)
	_, err = unix.Write(file, []byte("1"))
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
