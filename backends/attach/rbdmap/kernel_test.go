package rbdmap_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// TestHoldClosed: a device is in use if somebody has it open, but for the program that
// serves it.
func TestHoldClosed(t *testing.T) {
	backendtest.NeedRoot(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.Background(), 10*time.Second, func() {}); err != nil {
			t.Error(err)
		}
	})
	device, err := os.Open(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	program := exec.CommandContext(t.Context(), "sleep", "300")
	program.Stdin = device
	if err := errors.Join(program.Start(), device.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = program.Process.Kill() // it is of no more use
		_ = program.Wait()
	})
	inUse := func(err error) {
		t.Helper()
		if !errors.Is(err, backends.ErrInUse) || !strings.Contains(err.Error(), d.Path+" is open or mounted") {
			t.Errorf("got %v, want it to be in use", err)
		}
	}
	_, err = rbdmap.HoldClosed(t.Context(), d.Path, nil)
	inUse(err)
	release, err := rbdmap.HoldClosed(t.Context(), d.Path, []int{program.Process.Pid})
	if err != nil {
		t.Fatal(err)
	}
	_, err = rbdmap.HoldClosed(t.Context(), d.Path, []int{program.Process.Pid})
	inUse(err)
	release()
	if release, err = rbdmap.HoldClosed(t.Context(), d.Path, []int{program.Process.Pid}); err != nil {
		t.Fatal(err)
	}
	release()
}
