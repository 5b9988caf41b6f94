package ebs_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/ebs"
)

// A real device is in use while somebody has it open, exclusively or not.
func TestClaimed(t *testing.T) {
	backendtest.NeedRoot(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	path := d.Path
	defer func() {
		if err := d.Detach(t.Context(), time.Second, func() {}); err != nil {
			t.Error(err)
		}
	}()
	unclaimed := func(when string) {
		t.Helper()
		var err error
		for range 100 { // somebody may look at it, as at all disks of this machine
			if err = ebs.Claimed(path); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("nobody has it open%s: %v", when, err)
	}
	unclaimed("")
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
	unclaimed(" any more")
	if err := ebs.Claimed("/dev/no-such-disk"); errors.Is(err, backends.ErrInUse) || err != nil {
		t.Errorf("a device that is gone: %v", err)
	}
}
