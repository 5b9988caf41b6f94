package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/e2e/apart"
)

// TestMain is the plugin itself in the processes that tests start.
func TestMain(m *testing.M) {
	if os.Getenv("RUN_PLUGIN") != "" {
		main()
		return
	}
	os.Exit(apart.Main(m))
}

// process is the plugin running with a state directory of its own.
type process struct {
	*exec.Cmd
	socket      string
	out, errout lockedBuffer
	ended       chan error
}

func plugin(ctx context.Context, dir string, environ ...string) *process {
	p := &process{socket: filepath.Join(dir, "run", "flocker.sock"), ended: make(chan error, 1)}
	p.Cmd = exec.CommandContext(ctx, os.Args[0])
	p.Env = append([]string{
		"RUN_PLUGIN=1", "PATH=" + os.Getenv("PATH"),
		"FLOCKER_SOCKET=" + p.socket, "FLOCKER_STATE_DIR=" + dir, "FLOCKER_MOUNT_ROOT=" + filepath.Join(dir, "mnt"),
		"FLOCKER_DOCKER_SOCKET=" + filepath.Join(dir, "docker.sock"),
	}, environ...)
	p.Stdout, p.Stderr = &p.out, &p.errout
	return p
}

// begin starts the process; it is killed at the end of the test.
func (p *process) begin(t testing.TB) *process {
	t.Helper()
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { p.ended <- p.Wait(); close(done) }()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("stdout:\n%s\nstderr:\n%s", p.out.String(), p.errout.String())
		}
	})
	return p
}

// post is one call on a connection of its own.
func (p *process) post(ctx context.Context, path, body string) (string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", p.socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://x"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(got)), err
}

// await calls until the socket answers, for limit at most.
func (p *process) await(t testing.TB, limit time.Duration, path, body, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	for {
		got, err := p.post(ctx, path, body)
		if err == nil {
			if got != want {
				t.Fatalf("%s %s: got %s, want %s", path, body, got, want)
			}
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s %s: no answer after %v: %v", path, body, time.Since(start), err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// stop sends SIGTERM and checks how the process ends.
func (p *process) stop(t testing.TB) {
	t.Helper()
	start := time.Now()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-p.ended:
		if err != nil {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(9 * time.Second):
		t.Fatal("still there nine seconds after SIGTERM")
	}
	t.Logf("stopped after %v", time.Since(start).Round(time.Millisecond))
	if _, err := os.Stat(p.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket after the end: got %v, want none", err)
	}
	if got := p.errout.String(); got != "" {
		t.Errorf("stderr: %s", got)
	}
}

// awaitLive asks on the control socket until this host is there and live.
func awaitLive(t *testing.T, socket, boot string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), starting)
	defer cancel()
	client := api.Client{Socket: socket}
	for {
		nodes, err := client.Nodes(ctx)
		if err == nil && len(nodes) == 1 && nodes[0].Live && nodes[0].Boot == boot {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("nodes: got %+v, %v", nodes, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// happened waits for these events of a volume, or of all, and demands that they are listed too.
func happened(t *testing.T, socket, volume string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), starting)
	defer cancel()
	client := api.Client{Socket: socket}
	words := func(e api.Event) string { return strings.TrimSpace(e.What + " " + e.Volume) }
	var followed, listed []string
	enough := errors.New("enough")
	_, err := client.Follow(ctx, api.EventQuery{Volume: volume, Since: "1h"}, func(e api.Event) error {
		if followed = append(followed, words(e)); len(followed) == len(want) {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !slices.Equal(followed, want) {
		t.Errorf("events that were followed: %q, %v, want %q", followed, err, want)
	}
	all, err := client.Events(ctx, api.EventQuery{Volume: volume})
	for _, e := range all.Events {
		listed = append(listed, words(e))
	}
	if err != nil || !slices.Equal(listed, want) {
		t.Errorf("events: %q, %v, want %q", listed, err, want)
	}
}

const starting = time.Minute // for the etcd inside, on a busy machine

func TestProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "root", "needs root")
	}
	dir, etcd := t.TempDir(), "FLOCKER_ETCD_LISTEN="+freeAddress(t)
	p := plugin(t.Context(), dir, etcd).begin(t)
	p.await(t, starting, "/Plugin.Activate", "", `{"Implements":["VolumeDriver"]}`)
	p.await(t, starting, "/VolumeDriver.Capabilities", "{}\n", `{"Capabilities":{"Scope":"global"}}`)
	// The first call waits for etcd, and is not refused.
	p.await(t, starting, "/VolumeDriver.Create", `{"Name":"v0","Opts":{"size":"20M"}}`, `{}`)
	p.await(t, starting, "/VolumeDriver.Remove", `{"Name":"v0"}`, `{}`)
	p.await(t, starting, "/VolumeDriver.List", "{}\n", `{"Volumes":[]}`)
	p.await(t, starting, "/VolumeDriver.Get", `{"Name":"v1"}`, `{"Err":"no such volume: v1"}`)
	create, remove := `{"Name":"v1","Opts":{"size":"20M"}}`, `{"Name":"v1"}`
	p.await(t, starting, "/VolumeDriver.Create", create, `{}`)
	p.await(t, starting, "/VolumeDriver.Create", create, `{}`)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	control := filepath.Join(dir, "control.sock")
	awaitLive(t, control, strings.TrimSpace(string(boot)))
	happened(t, control, "v1", "create v1", "ready v1")

	// kill -9 leaves the socket file, and Docker starts the plugin at once.
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	for _, socket := range []string{p.socket, control} {
		if _, err := os.Stat(socket); err != nil {
			t.Fatalf("no stale socket to begin with: %v", err)
		}
	}
	p = plugin(t.Context(), dir, etcd).begin(t)
	p.await(t, starting, "/VolumeDriver.Capabilities", "{}\n", `{"Capabilities":{"Scope":"global"}}`)
	got, err := p.post(t.Context(), "/VolumeDriver.Get", `{"Name":"v1"}`)
	if err != nil || !strings.HasPrefix(got, `{"Volume":{"Name":"v1",`) {
		t.Errorf("after kill -9: got %s, %v, want the volume", got, err)
	}
	awaitLive(t, control, strings.TrimSpace(string(boot)))
	happened(t, control, "", "register", "create v0", "ready v0", "delete v0", "purge v0", "create v1", "ready v1", "register")
	p.stop(t)
	if _, err := os.Stat(control); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("control socket after the end: got %v, want none", err)
	}

	// What is known is known without etcd, and at once.
	broken := filepath.Join(t.TempDir(), "file")
	if err = os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p = plugin(t.Context(), dir, etcd, "FLOCKER_ETCD_DIR="+broken).begin(t)
	p.await(t, starting, "/VolumeDriver.Capabilities", "{}\n", `{"Capabilities":{"Scope":"global"}}`)
	got, err = p.post(t.Context(), "/VolumeDriver.Get", `{"Name":"v1"}`)
	if err != nil || !strings.HasPrefix(got, `{"Volume":{"Name":"v1",`) {
		t.Errorf("without etcd: got %s, %v, want the volume", got, err)
	}
	p.stop(t)
	if want := "make its directory: mkdir " + broken + ": not a directory"; !strings.Contains(p.out.String(), want) {
		t.Errorf("log: got %s, want %s in it", p.out.String(), want)
	}

	p = plugin(t.Context(), dir, etcd).begin(t)
	p.await(t, 3*starting, "/VolumeDriver.Remove", remove, `{}`)
	p.stop(t)
}

// A second process must not take the socket, nor anything else, from the first.
func TestProcessTwice(t *testing.T) {
	dir := t.TempDir()
	first := plugin(t.Context(), dir, "FLOCKER_ETCD_ENDPOINTS=127.0.0.1:1").begin(t)
	first.await(t, starting, "/VolumeDriver.Capabilities", "{}\n", `{"Capabilities":{"Scope":"global"}}`)
	second := plugin(t.Context(), dir, "FLOCKER_ETCD_ENDPOINTS=127.0.0.1:1").begin(t)
	want := "flocker-plugin: another process listens on " + first.socket + ": only one Flocker may run on a host\n"
	if err := <-second.ended; err == nil || err.Error() != "exit status 1" || second.errout.String() != want {
		t.Errorf("second process: got %v and %s, want exit status 1 and %s", err, second.errout.String(), want)
	}
	first.await(t, starting, "/VolumeDriver.Capabilities", "{}\n", `{"Capabilities":{"Scope":"global"}}`)
	first.stop(t)
}

// Without etcd the process stays, answers what it can, and holds what it cannot.
func TestProcessWithoutEtcd(t *testing.T) {
	p := plugin(t.Context(), t.TempDir(), "FLOCKER_ETCD_ENDPOINTS=127.0.0.1:1").begin(t)
	p.await(t, starting, "/Plugin.Activate", "", `{"Implements":["VolumeDriver"]}`)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if got, err := p.post(ctx, "/VolumeDriver.Get", `{"Name":"v1"}`); err == nil {
		t.Errorf("Get: got %s, want no answer", got)
	}
	got, err := p.post(t.Context(), "/VolumeDriver.Create", `{"Name":"v1"}`)
	if err != nil || !strings.Contains(got, "ownership cannot be checked") {
		t.Errorf("Create: got %s, %v", got, err)
	}
	p.stop(t)
}

func TestProcessRefusesConfiguration(t *testing.T) {
	for environ, want := range map[string]string{
		"FLOCKER_LINGER=5":    `setting FLOCKER_LINGER: "5" is not valid; use a time such as 500ms, 10s or 5m`,
		"FLOCKER_BACKEND=ebs": `setting FLOCKER_BACKEND: unknown backend "ebs"; valid: loopback; a file /etc/flocker/backends.yaml can name more`,
	} {
		p := plugin(t.Context(), t.TempDir(), environ).begin(t)
		err := <-p.ended
		if want = "flocker-plugin: " + want + "\n"; err == nil || err.Error() != "exit status 1" || p.errout.String() != want {
			t.Errorf("%s: got %v and %s, want exit status 1 and %s", environ, err, p.errout.String(), want)
		}
	}
}

func TestCommands(t *testing.T) {
	for command, want := range map[string]string{
		"version":  version + "\n",
		"settings": settingsTable(),
		"frob x":   `flocker-plugin: unknown command "frob x"; valid: version, settings, backends, or none to run` + "\n",
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], strings.Fields(command)...)
		cmd.Env = []string{"RUN_PLUGIN=1"}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		if got, failed := out.String(), command == "frob x"; got != want || (err != nil) != failed {
			t.Errorf("%s: got %s, %v, want %s", command, got, err, want)
		}
	}
}

// skip skips a test that needs what the machine has not, unless REQUIRE names it.
func skip(t testing.TB, need, why string) {
	t.Helper()
	for word := range strings.SplitSeq(os.Getenv("REQUIRE"), ",") {
		if word == need {
			t.Fatalf("REQUIRE has %s: %s", need, why)
		}
	}
	t.Skip(why)
}
