//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// A cluster is a rig whose hosts have the plugin, the image busybox and one etcd.
type cluster struct {
	*rig.Rig

	endpoints []string
	store     *rig.TestStore // nil unless the plugin is the one that knows it
}

// onEachEngine runs a test with each Docker Engine there is.
func onEachEngine(t *testing.T, test func(t *testing.T, engine rig.Engine)) {
	t.Helper()
	for _, engine := range []rig.Engine{rig.Debian, rig.Current} {
		t.Run(string(engine), func(t *testing.T) { test(t, engine) })
	}
}

// newCluster starts one. The plugin logs every call, makes small volumes and has
// the settings given. A plugin other than the usual one is that of the test storage,
// which is started for it.
func newCluster(t *testing.T, cfg rig.Config, settings map[string]string) *cluster {
	t.Helper()
	step := stopwatch(t)
	c := &cluster{Rig: rig.New(t, cfg)}
	var image error
	var wg sync.WaitGroup
	wg.Go(func() { image = c.ImportImage(t.Context()) })
	endpoints, err := c.Etcd(t.Context())
	if wg.Wait(); err != nil || image != nil {
		t.Fatal(err, image)
	}
	c.endpoints = endpoints
	if cfg.Plugin != "" {
		if c.store, err = c.TestStore(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	all := map[string]string{
		"FLOCKER_ETCD_ENDPOINTS": strings.Join(endpoints, ","),
		"FLOCKER_LOG_LEVEL":      "debug",
		"FLOCKER_DEFAULT_SIZE":   "64M",
	}
	maps.Copy(all, settings)
	errs := make([]error, len(c.Hosts))
	for i, h := range c.Hosts {
		wg.Go(func() { errs[i] = h.InstallPlugin(t.Context(), all) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	step("the cluster is up")
	return c
}

// on is the argument of --mount for a volume of Flocker, at /data.
func on(volume string) string {
	return "type=volume,volume-driver=flocker,src=" + volume + ",dst=/data"
}

// sh runs a shell command in a container that has the volume, and returns what it
// printed.
func sh(t *testing.T, h *rig.Host, volume, script string) string {
	t.Helper()
	return h.Run(t, "run", "--rm", "--mount", on(volume), "busybox", "sh", "-c", script)
}

// refused runs a docker command that must fail, and returns what the user reads,
// which must contain want.
func refused(t *testing.T, h *rig.Host, want string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := h.Docker(ctx, args...)
	if err == nil {
		t.Fatalf("%s: docker %s worked and printed %q, want an error with %q", h.Name, strings.Join(args, " "), out, want)
	}
	text := said(err)
	if !strings.Contains(text, want) {
		t.Errorf("%s: docker %s says %q, want something with %q", h.Name, strings.Join(args, " "), text, want)
	}
	return text
}

// said is what a failed command printed, without the command itself.
func said(err error) string {
	_, text, found := strings.Cut(err.Error(), ": exit status ")
	if !found {
		return err.Error()
	}
	return text
}

// status is what `docker volume inspect` shows as Status.
func status(t *testing.T, h *rig.Host, volume string) map[string]any {
	t.Helper()
	var s map[string]any
	if err := json.Unmarshal([]byte(h.Run(t, "volume", "inspect", "--format", "{{json .Status}}", volume)), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// volumes lists the volumes a host shows.
func volumes(t *testing.T, h *rig.Host, filters ...string) []string {
	t.Helper()
	args := []string{"volume", "ls", "-q"}
	for _, f := range filters {
		args = append(args, "--filter", f)
	}
	return strings.Fields(h.Run(t, args...))
}

// A callLog is what Docker asks the plugin of a host from some moment on.
type callLog struct {
	h    *rig.Host
	from int64
}

type pluginCall struct {
	Op, Volume, MountID string
	Failed              bool
}

// logFile is where the plugin's output is: in dockerd's, unless it is a service.
func logFile(h *rig.Host) string {
	if own := filepath.Join(h.Dir, "flocker-plugin.log"); exists(own) {
		return own
	}
	return filepath.Join(h.Dir, "dockerd.log")
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// callsOf begins a call log.
func callsOf(t *testing.T, h *rig.Host) callLog {
	t.Helper()
	// What was asked before is not to be taken for what comes.
	_, end := callLog{h, 0}.untilNow(t)
	return callLog{h, end}
}

var callLine = regexp.MustCompile(`msg=(done|failed) .*?(?:mount_id=(\w+) )?op=(\w+) took=\S+?(?: volume=(\S+))?" plugin=`)

// all returns the calls so far.
func (l callLog) all(t *testing.T) []pluginCall {
	t.Helper()
	calls, _ := l.untilNow(t)
	return calls
}

// untilNow returns the calls so far, and where they end in the log. Docker reads
// the plugin's output when it likes, so a question that only this function asks is
// sent after them and waited for.
func (l callLog) untilNow(t *testing.T) (calls []pluginCall, end int64) {
	t.Helper()
	marker := fmt.Sprintf("marker-%d", time.Now().UnixNano())
	_, _ = l.h.Docker(t.Context(), "volume", "inspect", marker)
	eventually(t, "the plugin's log gets to "+marker, func() bool {
		data, err := os.ReadFile(logFile(l.h))
		if err != nil {
			t.Fatal(err)
		}
		calls, end = nil, l.from
		for line := range strings.Lines(string(data[min(l.from, int64(len(data))):])) {
			end += int64(len(line))
			m := callLine.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			if m[4] == marker {
				return true
			}
			calls = append(calls, pluginCall{Op: m[3], Volume: m[4], MountID: m[2], Failed: m[1] == "failed"})
		}
		return false
	})
	return calls, end
}

// of returns the calls about one volume, except Get, which Docker sends before
// nearly everything.
func (l callLog) of(t *testing.T, volume string) []pluginCall {
	t.Helper()
	return slices.DeleteFunc(l.all(t), func(c pluginCall) bool { return c.Volume != volume || c.Op == "get" })
}

// want waits until the calls about a volume, Get apart, are these and in this
// order. A failed one has a ! behind it.
func (l callLog) want(t *testing.T, volume, want string) []pluginCall {
	t.Helper()
	var got string
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		calls := l.of(t, volume)
		ops := make([]string, len(calls))
		for i, c := range calls {
			if ops[i] = c.Op; c.Failed {
				ops[i] += "!"
			}
		}
		if got = strings.Join(ops, " "); got == want {
			return calls
		}
		if time.Now().After(deadline) {
			t.Fatalf("the plugin on %s was asked about volume %s: %q, want %q", l.h.Name, volume, got, want)
		}
	}
}

// etcdKeys returns the keys of Flocker below a folder: "own/", "req/", ….
func (c *cluster) etcdKeys(t *testing.T, folder string) []string {
	t.Helper()
	secure, err := c.EtcdTLS()
	if err != nil {
		t.Fatal(err)
	}
	etcd, err := clientv3.New(clientv3.Config{Endpoints: c.endpoints, TLS: secure, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return c.Dial(ctx, "tcp", addr) }),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	const prefix = "/flocker/v1/"
	found, err := etcd.Get(ctx, prefix+folder, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	keys := make([]string, len(found.Kvs))
	for i, kv := range found.Kvs {
		keys[i] = strings.TrimPrefix(string(kv.Key), prefix)
	}
	return keys
}

// leftovers lists what there is of volumes and containers: none when every test
// has cleaned up after itself and the product after it.
func (c *cluster) leftovers(t *testing.T) []string {
	t.Helper()
	var left []string
	add := func(what string, found ...string) {
		for _, f := range found {
			left = append(left, what+" "+f)
		}
	}
	for _, h := range c.Hosts {
		add("container on "+h.Name+":", strings.Fields(h.Run(t, "ps", "-aq"))...)
		add("volume on "+h.Name+":", volumes(t, h)...)
		mounts, err := h.Exec(t.Context(), "sh", "-c", `cut -d' ' -f5 /proc/self/mountinfo | grep -e '/propagated-mount/' -e '^/var/lib/flocker/mnt/' || true`)
		if err != nil {
			t.Fatal(err)
		}
		add("mount on "+h.Name+":", strings.Fields(mounts)...)
		bare, err := h.Exec(t.Context(), "sh", "-c", `for root in /var/lib/docker/plugins/*/propagated-mount /var/lib/flocker/mnt; do [ ! -d $root ] || find $root -mindepth 1; done`)
		if err != nil {
			t.Fatal(err)
		}
		add("mountpoint on "+h.Name+":", strings.Fields(bare)...)
		if pid, err := h.PluginPID(); err == nil {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(data)) {
				if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], "/flocker/mnt/") {
					add("mount in the plugin on "+h.Name+":", f[4])
				}
			}
		}
	}
	loops, err := c.Loops()
	if err != nil {
		t.Fatal(err)
	}
	add("loop device", loops...)
	for _, folder := range []string{"own/", "req/", "vol/", "name/"} {
		add("etcd key", c.etcdKeys(t, folder)...)
	}
	files, err := os.ReadDir(c.Shared)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != ".flocker-loopback" {
			add("file in the shared directory:", f.Name())
		}
	}
	return left
}

// wantClean waits until there are no leftovers.
func (c *cluster) wantClean(t *testing.T) {
	t.Helper()
	within(t, 30*time.Second, "nothing is left over", func() error {
		if left := c.leftovers(t); len(left) > 0 {
			return fmt.Errorf("left over:\n%s", strings.Join(left, "\n"))
		}
		return nil
	})
}
