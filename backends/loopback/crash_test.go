package loopback_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/loopback"
	"github.com/flocker-plugin/flocker/e2e/apart"
)

// The test binary runs itself for what has to be killed or needs a /dev of its
// own.
func TestMain(m *testing.M) {
	if f := children[os.Getenv("LOOPBACK_CHILD")]; f != nil {
		if err := f(os.Getenv("LOOPBACK_DIR"), os.Getenv("LOOPBACK_NODE")); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(apart.Main(m))
}

var children = map[string]func(dir, node string) error{
	"cycle":      childCycle,
	"bare /dev":  childBareDev,
	"half clear": childHalfClear,
}

func child(f fixture, what string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LOOPBACK_CHILD="+what, "LOOPBACK_DIR="+f.dir, "LOOPBACK_NODE=a"+f.dir)
	cmd.Stderr = os.Stderr
	return cmd
}

// childCycle makes, attaches, detaches and deletes volumes until it is killed. It
// says first which.
func childCycle(dir, node string) error {
	l := loopback.New(loopback.Config{Dir: dir, Node: node, Preallocate: true})
	ctx := context.Background()
	for {
		id := uuid.NewString()
		fmt.Println(id)
		vol, err := l.Create(ctx, backends.CreateRequest{ID: id, Name: "db", Size: 2 << 20})
		if err != nil {
			return err
		}
		att, err := l.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: id, Token: 1})
		if err != nil {
			return err
		}
		if err := errors.Join(l.Detach(ctx, att), l.Delete(ctx, vol.Ref)); err != nil {
			return err
		}
	}
}

// TestKill kills a process at moments of which some are between any two steps,
// and demands that the next one can do everything.
func TestKill(t *testing.T) {
	f := newFixture(t)
	if err := f.Delete(t.Context(), f.vol.Ref); err != nil {
		t.Fatal(err)
	}
	moments := map[string]int{}
	for range 40 {
		cmd := child(f, "cycle")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		lines.Scan()
		time.Sleep(rand.N(8 * time.Millisecond))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		id := lines.Text()
		for lines.Scan() {
			id = lines.Text()
		}
		_ = cmd.Wait() // it was killed
		if strings.HasPrefix(id, "error") {
			t.Fatal(id)
		}

		l := f.node("a")
		atts, err := l.Attachments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		names := f.files(t)
		moments[fmt.Sprintf("%d attached, files %s", len(atts), strings.ReplaceAll(strings.Join(names, " "), id, "<id>"))]++
		for _, att := range atts {
			if err := l.Detach(t.Context(), att); err != nil {
				t.Error(err)
			}
		}
		// A delete that had begun is finished by the next one.
		if slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, ".deleted-") }) {
			marker, err := os.ReadFile(filepath.Join(f.dir, ".flocker-loopback"))
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Delete(t.Context(), strings.TrimSpace(string(marker))+"/"+id); err != nil {
				t.Error(err)
			}
		}
		vol, err := l.Create(t.Context(), backends.CreateRequest{ID: id, Name: "db", Size: 2 << 20})
		if err != nil {
			t.Fatal(err)
		}
		att, err := l.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: id, Token: 2})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.Detach(t.Context(), att), l.Delete(t.Context(), vol.Ref)); err != nil {
			t.Fatal(err)
		}
		if names := f.files(t); len(names) > 0 {
			t.Errorf("%q has been left", names)
		}
	}
	t.Logf("killed with: %v", moments)
}

// childHalfClear asks the kernel to detach the device, and dies before it can see
// that another process has it open.
func childHalfClear(dir, node string) error {
	atts, err := loopback.New(loopback.Config{Dir: dir, Node: node}).Attachments(context.Background())
	if err != nil || len(atts) != 1 {
		return fmt.Errorf("got %v, %w", atts, err)
	}
	device, err := os.OpenFile(atts[0].Device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
}

func TestKilledInDetach(t *testing.T) {
	f := newFixture(t)
	att := f.attach(t, 1)
	device, err := os.OpenFile(att.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := child(f, "half clear").Output(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := sysfs(t, att, "loop/autoclear"); got != "1" {
		t.Fatalf("autoclear is %s: the test does not do what it should", got)
	}
	if again := f.attach(t, 1); again != att {
		t.Errorf("got %v, want %v", again, att)
	}
	if err := device.Close(); err != nil {
		t.Fatal(err)
	}
	// The volume that Attach has returned does not go away with its last user.
	if atts, err := f.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
		t.Errorf("got %v, %v; want %v", atts, err, att)
	}
	f.detach(t, att)
}

// childBareDev attaches and detaches with a /dev that has nothing in it but
// loop-control, as a container may have.
func childBareDev(dir, node string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	var control unix.Stat_t
	if err := unix.Stat("/dev/loop-control", &control); err != nil {
		return err
	}
	if err := unix.Mount("flocker-test", "/dev", "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := unix.Mknod("/dev/loop-control", unix.S_IFCHR|0o600, int(control.Rdev)); err != nil {
		return err
	}
	l := loopback.New(loopback.Config{Dir: dir, Node: node})
	ctx := context.Background()
	vols, err := l.List(ctx)
	if err != nil || len(vols) != 1 {
		return fmt.Errorf("got %v, %w", vols, err)
	}
	att, err := l.Attach(ctx, backends.AttachRequest{Ref: vols[0].Ref, Volume: vols[0].ID, Token: 1})
	if err != nil {
		return err
	}
	fmt.Print(att.Device)
	return l.Detach(ctx, att)
}

func TestBareDev(t *testing.T) {
	f := newFixture(t)
	cmd := child(f, "bare /dev")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.Output()
	if err != nil || !strings.HasPrefix(string(out), "/dev/loop") {
		t.Errorf("got %s, %v", out, err)
	}
}
