package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var probing sync.Mutex // one probe at a time, for they have one name

// IsCutOff says that dir is a shared mount which is shared with nobody any more: what
// is mounted below it is seen in this mount namespace only. false if dir is anything
// else, such as a directory of the namespace that others look into.
//
// It mounts something small below dir. The kernel puts a copy of that below each mount
// that dir is shared with, and a mount that has copies becomes the slave of one when it
// is made a slave, while one that has none becomes private.
func IsCutOff(dir string) (bool, error) {
	cut, err := isCutOff(dir)
	if err != nil {
		return false, fmt.Errorf("look who sees %s: %w", dir, err)
	}
	return cut, nil
}

// Source returns the directory that is mounted on dir, by its name in its filesystem; "" if
// none is.
func Source(dir string) (string, error) {
	info, err := topMount(dir)
	if err != nil || info == nil {
		return "", err
	}
	return info.Root, nil
}

func isCutOff(dir string) (cut bool, err error) {
	info, err := topMount(dir)
	if err != nil || info == nil || !strings.Contains(info.Optional, "shared:") {
		return false, err
	}
	probing.Lock()
	defer probing.Unlock()
	probe := filepath.Join(dir, ".probe")
	_ = unix.Unmount(probe, unix.UMOUNT_NOFOLLOW) // of a process that was killed here
	if err := os.Mkdir(probe, 0); err != nil && !errors.Is(err, os.ErrExist) {
		return false, err
	}
	defer func() { err = errors.Join(err, os.Remove(probe)) }()
	if err := unix.Mount("probe", probe, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=4k,mode=0"); err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, unix.Unmount(probe, unix.UMOUNT_NOFOLLOW)) }() // the copies, too
	if err := unix.Mount("", probe, "", unix.MS_SLAVE, ""); err != nil {
		return false, err
	}
	info, err = topMount(probe)
	if err != nil || info == nil {
		return false, err
	}
	return !strings.Contains(info.Optional, "master:"), nil
}
