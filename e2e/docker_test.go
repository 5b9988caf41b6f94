//go:build e2e

package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestDocker does with the docker command, on two hosts, what its users do. The
// first scenarios are those of Docker's own tests of volume plugins. All share one
// cluster, and at the end nothing of them may be left.
func TestDocker(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		// A busy owner is what makes a Mount slow here.
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, map[string]string{"FLOCKER_BUSY_WAIT": "60s"})
		slow := slowMount(t, c) // takes 30 s, meanwhile
		for _, scenario := range []struct {
			name string
			test func(*testing.T, *cluster)
		}{
			{"a name belongs to one driver", testNameOfAnotherDriver},
			{"a volume is made by run and removed", testRun},
			{"an unnamed volume goes with its container", testUnnamed},
			{"volumes-from", testVolumesFrom},
			{"inspect and ls", testInspect},
			{"a volume removed on another host is made anew", testRemovedElsewhere},
			{"the device is missing", testDeviceMissing},
			{"the device is another one", testDeviceReplaced},
			{"docker cp from a running container", testCopyFromRunning},
			{"in use", testInUse},
			{"filters and prune", testFiltersAndPrune},
			{"two containers", testTwoContainers},
			{"what the image has is copied into a fresh volume", testCopyUp},
			{"bad names and options", testBadNamesAndOptions},
			{"bad requests on the socket", testSocket},
			{"one name created and removed at once", testRaces},
			{"compose", testCompose},
			{"a mount slower than the time-out of plugin enable", slow},
			{"plugin set", testPluginSet},
			{"Docker is restarted", testRestart},
		} {
			t.Run(scenario.name, func(t *testing.T) {
				began := time.Now()
				scenario.test(t, c)
				t.Logf("%.1f s", time.Since(began).Seconds())
			})
		}
		t.Run("nothing is left", c.wantClean)
	})
}

func testNameOfAnotherDriver(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	a.Run(t, "volume", "create", "taken")
	refused(t, a, "must be unique", "volume", "create", "-d", "flocker", "taken")
	a.Run(t, "volume", "create", "-d", "local", "taken")
	a.Run(t, "volume", "rm", "taken")
	a.Run(t, "volume", "create", "-d", "flocker", "taken")
	refused(t, a, "must be unique", "volume", "create", "-d", "local", "taken")
	a.Run(t, "volume", "rm", "taken")
}

func testRun(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	calls := callsOf(t, a)
	a.Run(t, "run", "--rm", "-v", "runs:/x", "--volume-driver", "flocker", "busybox", "sh", "-c", "echo hello >/x/f")
	if got := a.Run(t, "run", "--rm", "-v", "runs:/x", "--volume-driver", "flocker", "busybox", "cat", "/x/f"); got != "hello" {
		t.Errorf("the second container read %q, want %q", got, "hello")
	}
	file := filepath.Join(c.Shared, status(t, a, "runs")["id"].(string))
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	a.Run(t, "volume", "rm", "runs")
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("after volume rm: %s is still there (%v)", file, err)
	}
	made := calls.want(t, "runs", "create mount unmount mount unmount remove")
	first, second := made[1].MountID, made[3].MountID
	if len(first) != 12 || first == second || made[2].MountID != first || made[4].MountID != second {
		t.Errorf("mount ids of %+v, want two of twelve digits, each twice", made)
	}
}

func testUnnamed(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	calls := callsOf(t, a)
	a.Run(t, "run", "--rm", "-v", "/x", "--volume-driver", "flocker", "busybox", "touch", "/x/f")
	a.Run(t, "run", "--name", "unnamed", "-v", "/foo", "--volume-driver", "flocker", "busybox", "true")
	volume := a.Run(t, "inspect", "--format", "{{(index .Mounts 0).Name}}", "unnamed")
	if got := volumes(t, a, "driver=flocker:latest", "name="+volume); len(volume) != 64 || len(got) != 1 {
		t.Errorf("the container has volume %q, Docker lists %q", volume, got)
	}
	a.Run(t, "rm", "-fv", "unnamed")
	if got := volumes(t, a, "name="+volume); len(got) != 0 {
		t.Errorf("left after its container: %q", got)
	}
	count := map[string]int{}
	for _, call := range calls.all(t) {
		if len(call.Volume) == 64 && call.Op != "get" {
			count[call.Op]++
		}
	}
	if got, want := fmt.Sprint(count), "map[create:2 mount:2 remove:2 unmount:2]"; got != want {
		t.Errorf("calls: %s, want %s", got, want)
	}
}

func testVolumesFrom(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	calls := callsOf(t, a)
	a.Run(t, "run", "--name", "origin", "-v", "/foo", "--volume-driver", "flocker", "busybox", "touch", "/foo/seen")
	volume := a.Run(t, "inspect", "--format", "{{(index .Mounts 0).Name}}", "origin")
	if got := a.Run(t, "run", "--rm", "--volumes-from", "origin", "busybox", "ls", "/foo"); got != "seen" {
		t.Errorf("ls printed %q, want %q", got, "seen")
	}
	a.Run(t, "rm", "-fv", "origin")
	calls.want(t, volume, "create mount unmount mount unmount remove")
}

func testInspect(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	calls := callsOf(t, a)
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "fs=btrfs", "-o", "size=120M", "-o", "label.team=blue", "foo")
	a.Run(t, "run", "-d", "--name", "user", "-v", "foo:/bar", "busybox", "sleep", "1000")
	if got, want := a.Run(t, "inspect", "--format", "{{with index .Mounts 0}}{{.Name}} {{.Driver}} {{.Destination}}{{end}}", "user"), "foo flocker:latest /bar"; got != want {
		t.Errorf("the container's mount is %q, want %q", got, want)
	}
	before := callsOf(t, a)
	got := a.Run(t, "volume", "ls", "--format", "{{.Driver}} {{.Name}} {{.Scope}}", "--filter", "name=foo")
	if want := "flocker:latest foo global"; got != want {
		t.Errorf("volume ls: %q, want %q", got, want)
	}
	lists := slices.DeleteFunc(before.all(t), func(c pluginCall) bool { return c.Op != "list" })
	if len(lists) != 1 {
		t.Errorf("volume ls made %d List calls, want 1", len(lists))
	}
	// Who uses it is learned in the background.
	eventually(t, "inspect names the container", func() bool { return fmt.Sprint(status(t, a, "foo")["containers"]) == "[user]" })
	got = a.Run(t, "volume", "inspect", "--format", `{{.Driver}} {{.Scope}} {{with .Status}}{{.backend}} {{.filesystem}} {{.size}} {{.state}} {{.owner}} {{.mounts}} {{.labels}}{{end}}`, "foo")
	if want := "flocker:latest global loopback btrfs 120MiB mounted host1 1 map[team:blue]"; got != want {
		t.Errorf("volume inspect: %q, want %q", got, want)
	}
	if s := status(t, b, "foo"); s["state"] != "owned" || s["owner"] != "host1" || s["token"] != status(t, a, "foo")["token"] {
		t.Errorf("volume inspect on the other host: %v", s)
	}
	created, err := time.Parse(time.RFC3339, a.Run(t, "volume", "inspect", "--format", "{{.CreatedAt}}", "foo"))
	if age := time.Since(created); err != nil || age < -time.Minute || age > time.Minute {
		t.Errorf("created %v ago (%v)", age, err)
	}
	a.Run(t, "rm", "-f", "user")
	refused(t, a, "no such volume", "volume", "inspect", "dummy")
	a.Run(t, "volume", "rm", "foo")
	refused(t, a, "no such volume", "volume", "inspect", "foo")
	calls.want(t, "foo", "create mount unmount remove") // and no path
	a.Run(t, "version")
}

func testRemovedElsewhere(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "size=70M", "again")
	sh(t, a, "again", "echo old >/data/f")
	b.Run(t, "volume", "rm", "again")
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "size=80M", "again")
	got := a.Run(t, "volume", "inspect", "--format", "{{.Options.size}} {{.Status.size}}", "again")
	if want := "80M 80MiB"; got != want {
		t.Errorf("made anew: %q, want %q", got, want)
	}
	if got := sh(t, b, "again", "ls /data"); got != "" {
		t.Errorf("the new volume has %q in it", got)
	}
	b.Run(t, "volume", "rm", "again")
	a.Run(t, "volume", "create", "-d", "local", "again")
	a.Run(t, "volume", "rm", "again")
}

// wantRefusedMount sees the container of a volume not start, the Mount not
// followed by an Unmount, and nothing of the container on the host's own disk.
func wantRefusedMount(t *testing.T, c *cluster, h *rig.Host, volume, state, want string) {
	t.Helper()
	calls := callsOf(t, h)
	text := refused(t, h, want, "run", "--rm", "-w", "/data", "--mount", on(volume), "busybox", "touch", "/data/on-the-bare-directory")
	t.Logf("the user reads: %s", text)
	calls.want(t, volume, "mount!")
	found, err := h.Exec(t.Context(), "sh", "-c", "find /var/lib/docker/plugins/*/propagated-mount /var/lib/docker/volumes -name on-the-bare-directory")
	if err != nil || found != "" {
		t.Errorf("the container wrote %q on the host (%v)", found, err)
	}
	if s := status(t, h, volume); s["state"] != state {
		t.Errorf("after the failed Mount: %v, want it %s", s, state)
	}
	if loops, err := c.Loops(); err != nil || len(loops) != loopsInUse(t, c) {
		t.Errorf("loop devices %q with %d volumes in use (%v)", loops, loopsInUse(t, c), err)
	}
}

// loopsInUse is how many volumes have an owner: all of them are mounted here.
func loopsInUse(t *testing.T, c *cluster) int {
	t.Helper()
	return len(c.etcdKeys(t, "own/"))
}

func testDeviceMissing(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "create", "-d", "flocker", "missing")
	sh(t, a, "missing", "echo precious >/data/f")
	dir := filepath.Join(c.Shared, status(t, a, "missing")["id"].(string))
	away := filepath.Join(c.Dir, "away")
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	for _, h := range c.Hosts {
		wantRefusedMount(t, c, h, "missing", "free", "attach volume missing: ")
	}
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, b, "missing", "cat /data/f"); got != "precious" {
		t.Errorf("when the file is back: %q, want %q", got, "precious")
	}
	b.Run(t, "volume", "rm", "missing")
}

func testDeviceReplaced(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "create", "-d", "flocker", "replaced")
	sh(t, a, "replaced", "echo precious >/data/f")
	files, err := filepath.Glob(filepath.Join(c.Shared, status(t, a, "replaced")["id"].(string), "*.img"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files of the volume: %q, %v", files, err)
	}
	info, err := os.Stat(files[0])
	if err != nil {
		t.Fatal(err)
	}
	away := filepath.Join(c.Dir, "away.img")
	if err := os.Rename(files[0], away); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(files[0], info.Size()); err != nil {
		t.Fatal(err)
	}
	for _, h := range c.Hosts {
		wantRefusedMount(t, c, h, "replaced", "quarantined", "volume replaced is quarantined: mount volume replaced: ")
	}
	empty, err := os.ReadFile(files[0])
	if err != nil || len(strings.Trim(string(empty), "\x00")) > 0 {
		t.Errorf("the empty file was written to (%v)", err)
	}
	if err := os.Rename(away, files[0]); err != nil {
		t.Fatal(err)
	}
	b.Run(t, "flocker", "volume", "reinstate", "replaced")
	if got := sh(t, b, "replaced", "cat /data/f"); got != "precious" {
		t.Errorf("when the file is back: %q, want %q", got, "precious")
	}
	b.Run(t, "volume", "rm", "replaced")
}

func testCopyFromRunning(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "create", "-d", "flocker", "copied")
	calls := callsOf(t, a)
	a.Run(t, "run", "-d", "--name", "copier", "--mount", on("copied"), "busybox", "sh", "-c", "echo data >/data/f; sleep 1000")
	to := filepath.Join(t.TempDir(), "f")
	eventually(t, "the file is there", func() bool {
		_, err := a.Docker(t.Context(), "exec", "copier", "test", "-s", "/data/f")
		return err == nil
	})
	a.Run(t, "cp", "copier:/data/f", to)
	if got, err := os.ReadFile(to); err != nil || string(got) != "data\n" {
		t.Errorf("copied %q, %v", got, err)
	}
	made := calls.want(t, "copied", "mount mount unmount")
	if made[0].MountID != made[1].MountID || made[0].MountID != made[2].MountID {
		t.Logf("this engine gives docker cp an id of its own: %+v", made)
	}
	if got := a.Run(t, "exec", "copier", "sh", "-c", "echo more >>/data/f; cat /data/f"); got != "data\nmore" {
		t.Errorf("after docker cp the container reads %q", got)
	}
	a.Run(t, "kill", "copier")
	calls.want(t, "copied", "mount mount unmount unmount")
	a.Run(t, "cp", "copier:/data/f", to) // also from a stopped one
	if got := sh(t, b, "copied", "cat /data/f"); got != "data\nmore" {
		t.Errorf("on the other host: %q", got)
	}
	a.Run(t, "rm", "copier")
	a.Run(t, "volume", "rm", "copied")
}

func testInUse(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "volume", "rm", "-f", "never-made")
	a.Run(t, "volume", "create", "-d", "flocker", "used")
	a.Run(t, "create", "--name", "holder", "--mount", on("used"), "busybox", "sleep", "1000")
	for range 2 {
		refused(t, a, "volume is in use", "volume", "rm", "-f", "used")
	}
	// Docker on the other host knows nothing of the container: the plugin refuses.
	a.Run(t, "start", "holder")
	refused(t, b, "volume used is in use on host host1", "volume", "rm", "used")
	refused(t, b, "volume used is in use on host host1", "volume", "rm", "-f", "used")
	if got := volumes(t, b, "name=used"); len(got) != 1 {
		t.Errorf("after the refused rm -f the other host lists %q", got)
	}
	a.Run(t, "exec", "holder", "touch", "/data/still-there")
	a.Run(t, "rm", "-f", "holder")
	a.Run(t, "volume", "rm", "-f", "used")
	if got := volumes(t, b, "name=used"); len(got) != 0 {
		t.Errorf("after rm the other host lists %q", got)
	}
}

func testFiltersAndPrune(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	a.Run(t, "volume", "create", "-d", "flocker", "--label", "tier=db", "idle")
	a.Run(t, "volume", "create", "-d", "flocker", "busy")
	a.Run(t, "volume", "create", "locals")
	a.Run(t, "run", "-d", "--name", "filtered", "--mount", on("busy"), "busybox", "sleep", "1000")
	// The cluster's other volumes are listed, too.
	for _, tc := range []struct {
		filter   string
		has, not []string
	}{
		{"driver=flocker:latest", []string{"idle", "busy"}, []string{"locals"}},
		{"driver=local", []string{"locals"}, []string{"idle", "busy"}},
		{"dangling=true", []string{"idle"}, []string{"busy"}},
		{"dangling=false", []string{"busy"}, []string{"idle"}},
		{"label=tier=db", []string{"idle"}, []string{"busy", "locals"}},
	} {
		got := volumes(t, a, tc.filter)
		for _, name := range tc.has {
			if !slices.Contains(got, name) {
				t.Errorf("volume ls --filter %s: %q, want %s in it", tc.filter, got, name)
			}
		}
		for _, name := range tc.not {
			if slices.Contains(got, name) {
				t.Errorf("volume ls --filter %s: %q, want no %s in it", tc.filter, got, name)
			}
		}
	}
	prune := []string{"volume", "prune", "-f"}
	if !strings.HasPrefix(a.Run(t, "version", "--format", "{{.Server.Version}}"), "20.") {
		prune = append(prune, "-a") // what the older one does anyway
	}
	if got := a.Run(t, prune...); !strings.Contains(got, "locals") || strings.Contains(got, "idle") {
		t.Errorf("volume prune: %q", got)
	}
	a.Run(t, "rm", "-f", "filtered")
	a.Run(t, "system", "prune", "-f", "--volumes")
	for _, name := range []string{"idle", "busy"} {
		a.Run(t, "volume", "inspect", name)
		a.Run(t, "volume", "rm", name)
	}
}

func testTwoContainers(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	a.Run(t, "volume", "create", "-d", "flocker", "shared")
	in := loopsInUse(t, c)
	for _, name := range []string{"one", "two"} {
		a.Run(t, "run", "-d", "--name", name, "--mount", on("shared"), "busybox", "sleep", "1000")
	}
	a.Run(t, "exec", "one", "sh", "-c", "echo from one >/data/f")
	if s := status(t, a, "shared"); s["mounts"] != 2.0 {
		t.Errorf("%v, want 2 mounts", s)
	}
	a.Run(t, "stop", "-t", "0", "one")
	if got := a.Run(t, "exec", "two", "sh", "-c", "echo from two >>/data/f; cat /data/f"); got != "from one\nfrom two" {
		t.Errorf("the other container reads %q", got)
	}
	if s := status(t, a, "shared"); s["mounts"] != 1.0 || s["state"] != "mounted" {
		t.Errorf("%v, want 1 mount", s)
	}
	a.Run(t, "stop", "-t", "0", "two")
	eventually(t, "the volume is detached and free", func() bool {
		loops, err := c.Loops()
		return err == nil && len(loops) == in && status(t, a, "shared")["state"] == "free"
	})
	a.Run(t, "rm", "one", "two")
	a.Run(t, "volume", "rm", "shared")
}

func testCopyUp(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	a.Run(t, "run", "--name", "seeder", "busybox", "sh", "-c",
		"mkdir /data && echo seed >/data/f && mkdir /data/sub && chown -R 1000:1000 /data && chmod 0750 /data")
	a.Run(t, "commit", "seeder", "seeded")
	a.Run(t, "rm", "seeder")
	a.Run(t, "volume", "create", "-d", "flocker", "fresh")
	look := []string{"seeded", "sh", "-c", "stat -c '%n %u:%g %a' /data && ls /data && cat /data/f"}
	if got, want := a.Run(t, append([]string{"run", "--rm", "--mount", on("fresh")}, look...)...), "/data 1000:1000 750\nf\nsub\nseed"; got != want {
		t.Errorf("a fresh volume: %q, want %q", got, want)
	}
	// It is copied once only.
	sh(t, a, "fresh", "echo changed >/data/f")
	if got, want := a.Run(t, append([]string{"run", "--rm", "--mount", on("fresh")}, look...)...), "/data 1000:1000 750\nf\nsub\nchanged"; got != want {
		t.Errorf("a volume with data: %q, want %q", got, want)
	}
	if got := sh(t, b, "fresh", "cat /data/f"); got != "changed" {
		t.Errorf("on the other host: %q", got)
	}
	a.Run(t, "volume", "create", "-d", "flocker", "-o", "uid=7", "-o", "gid=8", "-o", "mode=0700", "plain")
	if got := a.Run(t, "run", "--rm", "--mount", on("plain")+",volume-nocopy", "seeded", "sh", "-c", "stat -c '%u:%g %a' /data; ls -A /data"); got != "7:8 700" {
		t.Errorf("with nocopy: %q, want an empty directory with the volume's own mode", got)
	}
	a.Run(t, "volume", "rm", "fresh", "plain")
	a.Run(t, "rmi", "seeded")
}

func testBadNamesAndOptions(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	before := volumes(t, a)
	const rule = "is not valid: use 1 to 128 letters, digits, _ . and -, beginning with a letter or digit"
	long := strings.Repeat("x", 300)
	for name, quoted := range map[string]string{
		"a/b": `"a/b"`, "..": `".."`, ".": `"."`, "../../etc": `"../../etc"`, "-v": `"-v"`, ".hidden": `".hidden"`, "a b": `"a b"`,
		"größe": `"größe"`, "😀": `"😀"`, long: `"` + long[:40] + `…"`, "a\nb": `"a\nb"`, "a:b": `"a:b"`,
	} {
		refused(t, a, "volume name "+quoted+" "+rule, "volume", "create", "-d", "flocker", "--", name)
	}
	refused(t, a, rule, "run", "--rm", "--mount", on("a b"), "busybox", "true")
	refused(t, a, rule, "run", "--rm", "--mount", on("sub/dir"), "busybox", "true")

	for _, tc := range []struct{ option, want string }{
		{"sise=1G", "unknown option sise; did you mean size? valid options: backend, fs, gid, label.KEY, mkfs, mode, mount, on-partition, preallocate, profile, size, uid"},
		{"size=big", "size"},
		{"size=-1G", "size"},
		{"size=1K", "too small"},
		{"fs=ntfs", "ext4"},
		{"fs=xfs", "the least is 300MiB"}, // with the default size
		{"mode=9", "mode"},
		{"uid=root", "uid"},
		{"mount=rw,bogus", "mount"},
		{"mkfs=/dev/sda", "mkfs"},
		{"backend=cloud", "loopback"},
		{"help=", "options of docker volume create -d flocker -o KEY=VALUE (no volume was made)"},
	} {
		t.Logf("-o %s: %s", tc.option, refused(t, a, tc.want, "volume", "create", "-d", "flocker", "-o", tc.option, "badoption"))
	}
	if after := volumes(t, a); !slices.Equal(after, before) {
		t.Errorf("volumes %q before, %q after", before, after)
	}
}

// testSocket sends the plugin what Docker does not, past Docker.
func testSocket(t *testing.T, c *cluster) {
	h := c.Hosts[0]
	pid, err := h.PluginPID()
	if err != nil {
		t.Fatal(err)
	}
	socket := fmt.Sprintf("/proc/%d/root/run/docker/plugins/flocker.sock", pid)
	post := func(version, path, body string) string {
		return fmt.Sprintf("POST %s HTTP/%s\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", path, version, len(body), body)
	}
	for _, tc := range []struct {
		name, request string
		status        int
		want          string
	}{
		{"empty body", post("1.1", "/VolumeDriver.Create", ""), 400, "request body lost in Docker's retry (moby#39331); please retry the command"},
		{"huge body", post("1.1", "/VolumeDriver.Create", strings.Repeat(" ", 2<<20)), 413, "request body is larger than 1 MiB"},
		{"unknown endpoint", post("1.1", "/VolumeDriver.Explode", "{}"), 404, `no such endpoint: "/VolumeDriver.Explode"`},
		{"GET", "GET /VolumeDriver.List HTTP/1.1\r\nHost: x\r\n\r\n", 405, `/VolumeDriver.List takes POST, not "GET"`},
		{"HTTP/1.0", post("1.0", "/VolumeDriver.List", "{}"), 200, ""},
		{"HTTP/1.0 of a bad call", post("1.0", "/VolumeDriver.Mount", "{}"), 400, "request body: Name is missing"},
		{"garbage", post("1.1", "/VolumeDriver.Get", "\x00\xffnonsense"), 400, "request body is not JSON"},
		{"half of it", post("1.1", "/VolumeDriver.Mount", `{"Name":"x","ID":`), 400, "request body is not JSON"},
		{"another type", post("1.1", "/VolumeDriver.Create", `{"Name":7}`), 400, "request body: Name must be a string, not number"},
		{"an array", post("1.1", "/VolumeDriver.Unmount", `[]`), 400, "request body: must be an object, not array"},
		{"null", post("1.1", "/VolumeDriver.Remove", `null`), 400, "request body: Name is missing"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = io.WriteString(conn, tc.request) }() // it need not be read to its end
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var body struct{ Err string }
			if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tc.status || !strings.HasPrefix(body.Err, tc.want) || tc.want == "" && body.Err != "" {
				t.Errorf("%s %q, want %d %q", resp.Status, body.Err, tc.status, tc.want)
			}
		})
	}
	// No HTTP at all, and a caller who goes away in the middle.
	for _, text := range []string{"\x16\x03\x01\x02", "POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"Na"} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, text); err != nil {
			t.Error(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	if got, err := h.PluginPID(); err != nil || got != pid {
		t.Errorf("the plugin is process %d now (%v), it was %d", got, err, pid)
	}
	h.Run(t, "volume", "ls")
}

// testRaces has everybody create and remove one name at the same time.
func testRaces(t *testing.T, c *cluster) {
	a, b := c.Hosts[0], c.Hosts[1]
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 8 {
		h := c.Hosts[i%2]
		wg.Go(func() {
			for range 3 {
				if _, err := h.Docker(ctx, "volume", "create", "-d", "flocker", "-o", "size=16M", "race"); err != nil {
					t.Error(err)
				}
				if _, err := h.Docker(ctx, "volume", "rm", "race"); err != nil && !strings.Contains(said(err), "no such volume") {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, h := range c.Hosts {
		h.Run(t, "volume", "rm", "-f", "race")
	}
	for _, h := range c.Hosts {
		if got := volumes(t, h, "name=race"); len(got) != 0 {
			t.Errorf("%s still lists %q", h.Name, got)
		}
	}
	if got := sh(t, b, "race", "echo works >/data/f; cat /data/f"); got != "works" {
		t.Errorf("afterwards: %q", got)
	}
	a.Run(t, "volume", "rm", "race")
}

// slowMount begins a Mount that takes longer than the 30 s Docker gives a plugin
// that was enabled with its default time-out, and returns the rest of the test.
func slowMount(t *testing.T, c *cluster) func(*testing.T, *cluster) {
	t.Helper()
	a, b := c.Hosts[0], c.Hosts[1]
	b.Run(t, "plugin", "disable", "flocker") // no volume keeps it yet
	b.Run(t, "plugin", "enable", "flocker")
	a.Run(t, "volume", "create", "-d", "flocker", "slow")
	a.Run(t, "run", "-d", "--name", "slowowner", "--mount", on("slow"), "busybox", "sh", "-c", "echo kept >/data/f; sleep 1000")
	calls := callsOf(t, b)
	type result struct {
		err  error
		took time.Duration
	}
	done := make(chan result, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	go func() {
		began := time.Now()
		_, err := b.Docker(ctx, "run", "--rm", "--name", "slowcomer", "--mount", on("slow"), "busybox", "cat", "/data/f")
		done <- result{err, time.Since(began)}
	}()
	eventually(t, "the owner sees who waits", func() bool { return fmt.Sprint(status(t, a, "slow")["waiting"]) == "[host2]" })
	return func(t *testing.T, c *cluster) {
		r := <-done
		if r.err == nil {
			t.Fatal("the volume was mounted on two hosts")
		}
		t.Logf("after %.0f s the user reads: %s", r.took.Seconds(), said(r.err))
		// The two engines have their own words for it.
		timedOut := strings.Contains(said(r.err), "Client.Timeout exceeded") || strings.Contains(said(r.err), "context deadline exceeded")
		if r.took < 29*time.Second || r.took > 50*time.Second || !strings.Contains(said(r.err), "VolumeDriver.Mount") || !timedOut {
			t.Errorf("after %s: %v, want Docker's time-out after 30 s", r.took, r.err)
		}
		calls.want(t, "slow", "mount!")
		eventually(t, "nobody waits any more", func() bool { return len(c.etcdKeys(t, "req/")) == 0 && status(t, a, "slow")["waiting"] == nil })
		for _, h := range c.Hosts {
			if s := status(t, h, "slow"); s["owner"] != "host1" {
				t.Errorf("on %s: %v, want owner host1", h.Name, s)
			}
		}
		if left := b.Run(t, "ps", "-a", "--format", "{{.Names}}"); left != "" {
			t.Errorf("containers on host2: %q", left)
		}
		if got := a.Run(t, "exec", "slowowner", "cat", "/data/f"); got != "kept" {
			t.Errorf("the owner's container reads %q", got)
		}
		a.Run(t, "rm", "-f", "slowowner")
		if got := sh(t, b, "slow", "cat /data/f"); got != "kept" {
			t.Errorf("the retry reads %q", got)
		}
		calls.want(t, "slow", "mount! mount unmount")
		a.Run(t, "volume", "rm", "slow")
	}
}

func testPluginSet(t *testing.T, c *cluster) {
	b := c.Hosts[1]
	// Docker remembers volumes that another host has removed, and the plugin is in
	// use by them: hence the -f.
	refused(t, b, "disable plugin before setting", "plugin", "set", "flocker", "FLOCKER_DEFAULT_SIZE=72M")
	b.Run(t, "plugin", "disable", "-f", "flocker")
	refused(t, b, "found but disabled", "volume", "create", "-d", "flocker", "set")
	b.Run(t, "plugin", "set", "flocker", "FLOCKER_DEFAULT_SIZE=72M", "run.source=/run", "state.source=/var/lib/flocker")
	refused(t, b, "is not settable", "plugin", "set", "flocker", "dev.source=/tmp")
	refused(t, b, "is not settable", "plugin", "set", "flocker", "args=version")
	refused(t, b, "setting \"FLOCKER_NOTHING\" not found", "plugin", "set", "flocker", "FLOCKER_NOTHING=1")
	b.Run(t, "plugin", "enable", "flocker")
	b.Run(t, "volume", "create", "-d", "flocker", "set")
	if s := status(t, b, "set"); s["size"] != "72MiB" {
		t.Errorf("%v, want the size that was set", s)
	}
	b.Run(t, "volume", "rm", "set")

	// A setting that is wrong: the plugin does not start, and its log says why.
	b.Run(t, "plugin", "disable", "-f", "flocker")
	b.Run(t, "plugin", "set", "flocker", "FLOCKER_DEFAULT_SIZE=huge")
	before, err := os.Stat(logFile(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("with a wrong setting, plugin enable says: %s", refused(t, b, "", "plugin", "enable", "flocker"))
	log, err := os.ReadFile(logFile(b))
	if err != nil {
		t.Fatal(err)
	}
	from := before.Size()
	if !strings.Contains(string(log[from:]), "setting FLOCKER_DEFAULT_SIZE") {
		t.Errorf("the log does not say what is wrong with the setting:\n%s", log[from:])
	}
	b.Run(t, "plugin", "set", "flocker", "FLOCKER_DEFAULT_SIZE=64M")
	// After a plugin that ended at once, Docker may refuse for ten seconds and more,
	// until its own clean-up of the process is through, or even start it by itself.
	within(t, time.Minute, "the plugin is enabled", func() error {
		_, err := b.Docker(t.Context(), "plugin", "enable", "--timeout", "0", "flocker")
		if err != nil && strings.Contains(said(err), "is enabled") {
			return nil
		}
		return err
	})
	b.Run(t, "volume", "ls")
}

func testRestart(t *testing.T, c *cluster) {
	a := c.Hosts[0]
	step := stopwatch(t)
	restart := func() {
		t.Helper()
		if err := a.StopDockerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		step("Docker stopped")
		if err := a.StartDockerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		step("Docker started")
	}
	wantPlugin := func(enabled string) {
		t.Helper()
		if got, want := a.Run(t, "plugin", "ls", "--format", "{{.Name}} {{.Enabled}}"), "flocker:latest "+enabled; got != want {
			t.Errorf("plugin ls: %q, want %q", got, want)
		}
	}
	a.Run(t, "volume", "create", "-d", "flocker", "--label", "tier=db", "-o", "size=66M", "abc")
	sh(t, a, "abc", "echo kept >/data/f")
	a.Run(t, "run", "-d", "--name", "always", "--restart", "always", "--stop-signal", "KILL", "--mount", on("abc"), "busybox", "sleep", "1000")
	restart()
	wantPlugin("true")
	if got, want := a.Run(t, "volume", "inspect", "--format", "{{.Driver}} {{.Labels.tier}} {{.Options.size}}", "abc"), "flocker:latest db 66M"; got != want {
		t.Errorf("after the restart: %q, want %q", got, want)
	}
	if got := volumes(t, a, "label=tier=db"); !slices.Equal(got, []string{"abc"}) {
		t.Errorf("volume ls --filter label=tier=db: %q", got)
	}
	// No driver is given, and still it is not a new local volume.
	a.Run(t, "run", "--name", "after", "-v", "abc:/foo", "busybox", "cat", "/foo/f")
	if got, want := a.Run(t, "inspect", "--format", "{{(index .Mounts 0).Driver}}", "after"), "flocker:latest"; got != want {
		t.Errorf("the driver is %q, want %q", got, want)
	}
	eventually(t, "the container with a restart policy runs again", func() bool {
		out, err := a.Docker(t.Context(), "exec", "always", "cat", "/data/f")
		return err == nil && out == "kept"
	})
	a.Run(t, "rm", "-f", "after", "always")

	refused(t, a, "is in use", "plugin", "disable", "flocker")
	a.Run(t, "plugin", "disable", "-f", "flocker")
	restart()
	wantPlugin("false")
	// Without the driver Docker, started like this, would make a local volume.
	refused(t, a, "found but disabled", "run", "--rm", "--mount", on("abc"), "busybox", "cat", "/data/f")
	a.Run(t, "plugin", "enable", "--timeout", "0", "flocker")
	wantPlugin("true")
	if got := sh(t, a, "abc", "cat /data/f"); got != "kept" {
		t.Errorf("with the plugin enabled again: %q", got)
	}
	a.Run(t, "volume", "rm", "abc")
}
