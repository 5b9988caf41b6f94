package moby

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// site is the hosts of one test: they share the directory of the volumes' files,
// and the first one's etcd.
type site struct {
	t     *testing.T
	dir   string
	etcd  string // its address
	hosts []*host
}

// host is a plugin process with its state, and the Docker that uses it.
type host struct {
	t      *testing.T
	site   *site
	name   string
	dir    string
	socket string
	// environ are settings besides the usual ones.
	environ []string
	// timeout is that of `docker plugin enable`, 0 for a legacy plugin.
	timeout time.Duration
	docker  *daemon

	process *exec.Cmd
	ended   chan struct{} // closed when the process is gone
	out     output
}

// newSite prepares for a test that needs root. At its end nothing may be mounted
// and no loop device be left.
func newSite(t *testing.T) *site {
	t.Helper()
	if os.Geteuid() != 0 {
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
			t.Fatal("REQUIRE has root: needs root")
		}
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp(base, strings.ReplaceAll(t.Name(), "/", "-")+"-")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, dir: dir, etcd: freeAddress(t)}
	t.Cleanup(s.end)
	return s
}

func (s *site) end() {
	if !s.t.Failed() {
		if err := s.nothing(); err != nil {
			s.t.Error(err) // and the rest has to be done all the same
		}
	}
	for _, h := range s.hosts {
		h.kill()
	}
	for _, target := range slices.Backward(mounts(s.dir)) {
		_ = unix.Unmount(target, unix.MNT_DETACH)
	}
	for _, device := range loops(s.dir) {
		detach(device, s.dir)
	}
	for _, h := range s.hosts {
		if s.t.Failed() {
			s.t.Logf("log of %s:\n%s", h.name, capabilitiesLines.ReplaceAllString(h.out.String(), ""))
		} else if i := strings.Index(h.out.String(), "panic"); i >= 0 {
			s.t.Errorf("panic on %s:\n%s", h.name, h.out.String()[i:])
		}
	}
}

// nothing waits until nothing is mounted and no loop device is attached.
func (s *site) nothing() error {
	const limit = time.Minute // on a busy machine
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		mounted, attached := mounts(s.dir), loops(s.dir)
		if len(mounted)+len(attached) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left after %v: mounted %q, attached %q; want nothing", limit, mounted, attached)
		}
	}
}

// newHost makes a host. It is started by plug and boot.
func (s *site) newHost(timeout time.Duration, environ ...string) *host {
	name := fmt.Sprintf("host%d", len(s.hosts)+1)
	h := &host{t: s.t, site: s, name: name, dir: filepath.Join(s.dir, name), timeout: timeout}
	h.socket = filepath.Join(h.dir, "flocker.sock")
	h.environ = []string{
		"FLOCKER_SOCKET=" + h.socket, "FLOCKER_STATE_DIR=" + filepath.Join(h.dir, "state"),
		"FLOCKER_MOUNT_ROOT=" + filepath.Join(h.dir, "mnt"), "FLOCKER_DOCKER_SOCKET=" + filepath.Join(h.dir, "docker.sock"),
		"FLOCKER_LOOPBACK_DIR=" + filepath.Join(s.dir, "shared"), "FLOCKER_HOSTNAME=" + name,
		"FLOCKER_DEFAULT_SIZE=32M", "FLOCKER_LOG_LEVEL=debug",
		"PATH=" + filepath.Join(h.dir, "bin") + ":/usr/sbin:/usr/bin:/sbin:/bin",
	}
	if len(s.hosts) == 0 {
		h.environ = append(h.environ, "FLOCKER_ETCD_LISTEN="+s.etcd)
	} else {
		h.environ = append(h.environ, "FLOCKER_ETCD_ENDPOINTS="+s.etcd)
	}
	h.environ = append(h.environ, environ...) // the last one counts
	for _, d := range []string{filepath.Join(h.dir, "mnt"), filepath.Join(h.dir, "bin")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			s.t.Fatal(err)
		}
	}
	s.hosts = append(s.hosts, h)
	return h
}

// one starts a single host with a managed plugin, enabled with Docker's default.
func one(t *testing.T) *host {
	t.Helper()
	h := newSite(t).newHost(30 * time.Second)
	h.plug()
	h.boot()
	return h
}

// plug starts the plugin and waits until it and its etcd answer.
func (h *host) plug() {
	h.t.Helper()
	h.start()
	eventually(h.t, 2*time.Minute, func() error {
		// Of what is not known, only a look at etcd tells that it is not there.
		ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Second)
		defer cancel()
		got, err := h.post(ctx, "VolumeDriver.Get", `{"Name":"nothing"}`)
		if err == nil && !strings.Contains(got, "no such volume") {
			err = fmt.Errorf("get: %s", got)
		}
		return err
	})
}

// start starts the plugin's process.
func (h *host) start() {
	h.t.Helper()
	h.process = exec.Command(filepath.Join(base, "flocker-plugin"))
	h.process.Env = h.environ
	h.process.Stdout, h.process.Stderr = &h.out, &h.out
	// Whatever a killed test run started dies with it.
	h.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	h.ended = make(chan struct{})
	go func(process *exec.Cmd, ended chan struct{}) {
		defer close(ended)
		runtime.LockOSThread() // the thread that starts a process must live as long
		err := process.Start()
		started <- err
		if err == nil {
			_ = process.Wait()
		}
	}(h.process, h.ended)
	if err := <-started; err != nil {
		h.t.Fatal(err)
	}
}

// kill is kill -9 of the plugin.
func (h *host) kill() {
	if h.process == nil {
		return
	}
	_ = h.process.Process.Kill()
	<-h.ended
	h.process = nil
}

// boot starts Docker, or stops it and starts it anew.
func (h *host) boot() {
	h.t.Helper()
	if h.docker != nil {
		if err := h.docker.Shutdown(); err != nil {
			h.t.Fatal(err)
		}
	}
	h.docker = startDocker(h.t, filepath.Join(h.dir, "docker"), newPluginStore(h.t, h.socket, h.timeout))
}

// post is a call that is not Docker's.
func (h *host) post(ctx context.Context, method, body string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/"+method, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := h.client().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(got)), err
}

func (h *host) client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.socket)
		},
	}}
}

// slowMkfs makes the mkfs of this host take its time, until the function it
// returns is called. The file `running` is there as soon as one has begun, and has
// its process id.
func (h *host) slowMkfs(delay time.Duration) (running string, quick func()) {
	h.t.Helper()
	running = filepath.Join(h.dir, "running")
	script := filepath.Join(h.dir, "bin", "mkfs.ext4")
	// When the plugin is dead, the device's number may be another volume's. A real mkfs
	// has no children that could outlive it with the device open, which is descriptor 3.
	text := fmt.Sprintf("#!/bin/sh\necho $$ >%[1]s.new && mv %[1]s.new %[1]s\nsleep %v >/dev/null 2>&1 3>&-\n"+
		"kill -0 $PPID 2>/dev/null && exec /sbin/mkfs.ext4 \"$@\"\n", running, delay.Seconds())
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		h.t.Fatal(err)
	}
	return running, func() {
		if err := os.Remove(script); err != nil {
			h.t.Fatal(err)
		}
	}
}

// wantCalls checks which calls for a volume the plugin has answered so far, a letter
// each: Create, Get, Mount, Unmount, Remove, Path. List has no volume and is L.
func (h *host) wantCalls(volume, want string) {
	h.t.Helper()
	// A call is logged after its answer, which the next call may overtake.
	sorted := func(calls string) string {
		letters := []byte(calls)
		slices.Sort(letters)
		return string(letters)
	}
	got := ""
	for end := time.Now().Add(30 * time.Second); sorted(got) != sorted(want) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		got = h.calls(volume)
	}
	if sorted(got) != sorted(want) {
		h.t.Errorf("calls for volume %q: got %s, want %s", volume, got, want)
	}
}

// calls is a letter for each call in the log.
func (h *host) calls(volume string) string {
	var b strings.Builder
	for line := range strings.Lines(h.out.String()) {
		op, of := opField.FindStringSubmatch(line), volumeField.FindStringSubmatch(line)
		switch {
		case op == nil, len(of) > 0 && of[1] != volume, len(of) == 0 && volume != "":
		default:
			b.WriteString(letters[op[1]])
		}
	}
	return b.String()
}

var (
	opField     = regexp.MustCompile(` op=(\w+)`)
	volumeField = regexp.MustCompile(` volume=(\S+)`)
	// capabilitiesLines are as many as all others together.
	capabilitiesLines = regexp.MustCompile(`(?m)^.* op=capabilities .*\n`)
	letters           = map[string]string{"create": "C", "get": "G", "mount": "M", "unmount": "U", "remove": "R", "path": "P", "list": "L"}
)

// output collects what a process prints.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// proxy is the network between a host and etcd.
type proxy struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	mode  string // "", "cut": connections break, "stall": nothing gets through
	open  map[net.Conn]bool
	moved *sync.Cond
}

// newProxy starts a proxy for an address.
func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, to: to, open: map[net.Conn]bool{}}
	p.moved = sync.NewCond(&p.mu)
	go p.serve()
	t.Cleanup(func() {
		p.set("cut")
		_ = l.Close()
	})
	return p
}

func (p *proxy) address() string { return p.listener.Addr().String() }

// set changes what happens to the connections.
func (p *proxy) set(mode string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = mode
	p.moved.Broadcast()
	if mode == "cut" {
		for c := range p.open {
			_ = c.Close()
		}
		clear(p.open)
	}
}

// pass waits while nothing gets through, and says whether the connections live.
func (p *proxy) pass() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.mode == "stall" {
		p.moved.Wait()
	}
	return p.mode == ""
}

func (p *proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == "cut" {
		_ = c.Close()
		return false
	}
	p.open[c] = true
	return true
}

func (p *proxy) serve() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if !p.keep(c) || !p.pass() {
				return
			}
			up, err := net.Dial("tcp", p.to)
			if err != nil {
				return
			}
			defer up.Close()
			if !p.keep(up) {
				return
			}
			done := make(chan struct{}, 2)
			for _, pair := range [][2]net.Conn{{c, up}, {up, c}} {
				go func() {
					p.copy(pair[0], pair[1])
					done <- struct{}{}
				}()
			}
			<-done
		}()
	}
}

func (p *proxy) copy(from, to net.Conn) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if err != nil || !p.pass() {
			return
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// eventually calls try until it returns nil, for limit at most.
func eventually(t *testing.T, limit time.Duration, try func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// exists waits for a file.
func exists(t *testing.T, path string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		_, err := os.Stat(path)
		return err
	})
}

// wantError checks what the user reads.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("got no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got error %q, want one with %q", err, part)
		}
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}
