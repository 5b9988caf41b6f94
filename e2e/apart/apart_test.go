package apart

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

func TestLoops(t *testing.T) {
	const table = `22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 7:1 / /tmp/a rw,relatime - ext4 /dev/loop1 rw
31 22 7:2 / /tmp/with\040space rw,relatime shared:3 - xfs /dev/loop2 rw
32 22 0:5 /loop3 /tmp/device rw - devtmpfs dev rw
33 22 7:4 / /tmp rw - ext4 /dev/loop4 rw
34 22 7:5 / /home/src rw - ext4 /dev/loop5 rw
35 22 7:6 / /home/src2 rw - ext4 /dev/loop6 rw
`
	got, err := loops(strings.NewReader(table), "/home/src/project", "/tmp")
	if want := []string{"/tmp/a", "/tmp/with space", "/home/src2"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if got, err := loops(strings.NewReader("1 0 7:0 / / rw - ext4 /dev/loop0 rw\n"), "/tmp"); err != nil || len(got) > 0 {
		t.Errorf("got %q, %v, want nothing", got, err)
	}
}

// What is mounted here nobody else sees, and so nobody else holds.
func TestNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
			t.Fatal("REQUIRE has root: needs root")
		}
		t.Skip("needs root")
	}
	if os.Getenv(mark) != "" {
		t.Errorf("%s is set for what the tests start", mark)
	}
	dir := t.TempDir()
	if err := unix.Mount("apart", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	outside, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", os.Getppid()))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(outside), dir) {
		t.Error("the process that has started this one sees the mount")
	}
	inside, err := exec.Command("cat", "/proc/self/mountinfo").Output()
	if err != nil || !strings.Contains(string(inside), dir) {
		t.Errorf("a process that this one has started does not see the mount: %v", err)
	}
}
