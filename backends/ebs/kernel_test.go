package ebs_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/ebs"
)

// A real device is in use while somebody has it open, exclusively or not.
func TestClaimed(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	path := strings.TrimSpace(string(out))
	defer func() {
		if out, err := exec.Command("losetup", "-d", path).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}()
	if err := ebs.Claimed(path); err != nil {
		t.Errorf("nobody has it open: %v", err)
	}
	for _, flag := range []int{os.O_RDWR, os.O_RDWR | os.O_EXCL} {
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		want(t, ebs.Claimed(path), backends.ErrInUse, path)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := ebs.Claimed(path); err != nil {
		t.Errorf("nobody has it open any more: %v", err)
	}
	if err := ebs.Claimed("/dev/no-such-disk"); errors.Is(err, backends.ErrInUse) || err != nil {
		t.Errorf("a device that is gone: %v", err)
	}
}
