package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// TestMain is the command itself in the processes that tests, and Docker, start.
func TestMain(m *testing.M) {
	if os.Getenv("RUN_CLI") != "" {
		main()
	}
	os.Exit(m.Run())
}

// fake is a plugin that does what it is asked; what that was is in calls.
type fake struct {
	mu    sync.Mutex
	nodes []ownership.NodeStatus // nil: a, whose id is n1
	owned []string               // by a
	away  error                  // if nodes are asked for
	err   error                  // if anything else is
	calls []string
	death ownership.Death

	backends []driver.BackendStatus
	hosts    []driver.Host // one answer each; the last for good
	servers  []ownership.Server
	drained  []driver.Drained                // one answer each; the last for good
	got      func(name string) driver.Volume // if set, what Get returns
	volumes  []driver.Volume
	stale    bool
	live     error
}

// set changes what it answers, and forgets what it was asked.
func (f *fake) set(err error, owned ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.owned, f.calls, f.death = err, owned, nil, ownership.Death{}
}

func (f *fake) seen() (calls string, death ownership.Death) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.calls, ", "), f.death
}

func (f *fake) do(call string) error {
	f.calls = append(f.calls, call)
	return f.err
}

func (f *fake) Nodes(context.Context) ([]ownership.NodeStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.nodes == nil {
		return []ownership.NodeStatus{status("n1", "a", "")}, f.away
	}
	return f.nodes, f.away
}

func (f *fake) ConfirmDead(_ context.Context, host string, d ownership.Death) (ownership.Death, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.death = d
	d.Node, d.Host, d.Boot = "n1", "a", "9f3c1a2b-0000-4000-8000-000000000000"
	return d, f.do("confirm-dead " + host)
}

func (f *fake) Reinstate(_ context.Context, name, by string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.do("reinstate " + name + " by " + by)
}

func (f *fake) AcceptRestore(_ context.Context, by string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return 3, f.do("accept-restore by " + by)
}

func (f *fake) CreateVolume(_ context.Context, req driver.CreateRequest) (driver.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := driver.Volume{Name: req.Name, Definition: ownership.Volume{ID: req.ID}, Status: map[string]any{"state": "free"}}
	return v, f.do(fmt.Sprintf("create %s %v %v by %s", req.Name, req.Options, req.Labels, req.By))
}

func (f *fake) Remove(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.do("remove " + name)
}

func (f *fake) Move(_ context.Context, name, host, by string) (ownership.Placement, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return ownership.Placement{Node: "n2", Host: host}, f.do("move " + name + " to " + host + " by " + by)
}

func (f *fake) Cordon(_ context.Context, host, by string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.do(fmt.Sprintf("cordon %s by %s: %v", host, by, on))
}

func (f *fake) Drain(_ context.Context, host, by string) (driver.Drained, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var now driver.Drained
	if len(f.drained) > 0 {
		now = f.drained[0]
	}
	if len(f.drained) > 1 {
		f.drained = f.drained[1:]
	}
	return now, f.do("drain " + host + " by " + by)
}

func (f *fake) RemoveNode(_ context.Context, host, by string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.do("remove node " + host + " by " + by)
}

func (f *fake) List(context.Context) ([]ownership.View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var views []ownership.View
	for _, name := range f.owned {
		views = append(views, ownership.View{Volume: ownership.Volume{Name: name}, Owner: &ownership.Owner{Node: "n1"}})
	}
	return views, nil
}

func (f *fake) Backends(context.Context) []driver.BackendStatus { return f.backends }

func (f *fake) Host(context.Context) driver.Host {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.hosts) == 0 {
		return driver.Host{}
	}
	host := f.hosts[0]
	if len(f.hosts) > 1 {
		f.hosts = f.hosts[1:]
	}
	return host
}

func (f *fake) Servers(context.Context) []ownership.Server { return f.servers }

func (f *fake) Survey(context.Context) ([]driver.Volume, bool) { return f.volumes, f.stale }

func (f *fake) Get(_ context.Context, name string) (driver.Volume, error) {
	if f.got != nil {
		return f.got(name), nil
	}
	for _, v := range f.volumes {
		if v.Name == name {
			return v, nil
		}
	}
	return driver.Volume{}, ownership.ErrNotFound
}

func (f *fake) Node() ownership.Node { return ownership.Node{ID: "n1", Host: "alpha"} }

func (f *fake) Cluster() string { return "7c0e3f5a-2f0b-4d57-9a39-60c3bb8d1f11" }

func (f *fake) Live() error { return f.live }

func (f *fake) Silence(string) (time.Duration, bool) { return 34500 * time.Millisecond, true }

// serve answers on a socket as the plugin does, until the test ends.
func serve(t *testing.T, f *fake) (socket string) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(t.Output())
	return listen(t, control.New(f, f, "v0.1.0", logrus.NewEntry(log)))
}

func listen(t *testing.T, h http.Handler) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "control.sock")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return socket
}

// A result is what the user gets of a command.
type result struct {
	code        int
	out, errout string
}

// command runs one, with what is typed on a terminal; "" is none.
func command(t *testing.T, socket, typed string, args ...string) result {
	t.Helper()
	var out, errout bytes.Buffer
	c := &cli{
		in: strings.NewReader(typed), terminal: typed != "", out: &out, errout: &errout,
		by: "anna@b", name: "docker flocker", socket: socket,
	}
	code := c.run(t.Context(), args)
	return result{code, out.String(), errout.String()}
}

// commandOn runs one on a host that is like that.
func commandOn(t *testing.T, socket string, look func(context.Context) machine, args ...string) result {
	t.Helper()
	var out, errout bytes.Buffer
	c := &cli{out: &out, errout: &errout, by: "anna@b", name: "docker flocker", socket: socket, machine: look}
	code := c.run(t.Context(), args)
	return result{code, out.String(), errout.String()}
}

func want(t *testing.T, what string, got, want result) {
	t.Helper()
	if got.code != want.code {
		t.Errorf("%s: exit code %d, want %d", what, got.code, want.code)
	}
	if got.out != want.out {
		t.Errorf("%s: got\n%s\nwant\n%s", what, got.out, want.out)
	}
	if got.errout != want.errout {
		t.Errorf("%s: error output\n%s\nwant\n%s", what, got.errout, want.errout)
	}
}

func status(id, host, boot string) ownership.NodeStatus {
	return ownership.NodeStatus{Node: ownership.Node{ID: id, Host: host, Boot: boot}}
}

func TestNodeLs(t *testing.T) {
	a, b, c, d := status("n1", "a", "9f3c1a2b-0000-4000-8000-000000000000"), status("n2", "host-b", "b2"), status("n3", "c", ""), status("n4", "d", "b4")
	a.Live, a.Owned = true, 12
	c.Death = &ownership.Death{Host: "c"}
	d.Live, d.Death, d.State = true, &ownership.Death{Host: "d"}, "cordoned"
	socket := serve(t, &fake{nodes: []ownership.NodeStatus{a, b, c, d}})
	want(t, "node ls", command(t, socket, "", "node", "ls"), result{0, "" +
		"HOST     STATE                           VOLUMES   BOOT       ID\n" +
		"a        live                            12        9f3c1a2b   n1\n" +
		"host-b   silent 34s                      0         b2         n2\n" +
		"c        declared dead                   0                    n3\n" +
		"d        live, declared dead, cordoned   0         b4         n4\n", ""})
	want(t, "node ls of none", command(t, serve(t, &fake{nodes: []ownership.NodeStatus{}}), "", "node", "ls"), result{0, "HOST   STATE   VOLUMES   BOOT   ID\n", ""})
}

func TestBackendLs(t *testing.T) {
	socket := serve(t, &fake{backends: []driver.BackendStatus{
		{Properties: backends.Properties{Name: "gold", Type: "csi", Class: "F1", Profiles: []string{"fast", "slow"}}, Err: errors.New("the CSI driver's socket does not answer")},
		{Properties: backends.Properties{Name: "loopback", Type: "loopback", Class: "F0", Options: []backends.Option{{Name: "preallocate"}}}, Default: true},
	}})
	want(t, "backend ls", command(t, socket, "", "backend", "ls"), result{0, "" +
		"BACKEND             TYPE      CLASS  STATE            PROFILES    OPTIONS\n" +
		"gold                csi       F1     does not answer  fast, slow  -\n" +
		"loopback (default)  loopback  F0     answers          -           preallocate\n" +
		"gold: the CSI driver's socket does not answer\n", ""})
}

const dead = "host a (boot 9f3c1a2b) is recorded as dead. "

const ifNot = "\nIf host a is running after all, switch it off at once: until its plugin reaches etcd and closes what it has open, " +
	"it may write to volumes that another host has mounted.\n"

func TestConfirmDead(t *testing.T) {
	f := &fake{owned: []string{"db", "www"}}
	socket := serve(t, f)
	want(t, "confirm-dead", command(t, socket, "", "node", "confirm-dead", "a", "--because", "burnt & gone"),
		result{0, dead + "Its volumes can be mounted on other hosts now: db, www." + ifNot, ""})
	if _, death := f.seen(); death.Evidence != "burnt & gone" || death.By != "anna@b" || death.Forced {
		t.Errorf("recorded %+v", death)
	}
	f.set(nil)
	want(t, "confirm-dead of a host without volumes", command(t, socket, "", "node", "confirm-dead", "a"),
		result{0, dead + "It owns no volumes." + ifNot, ""})

	f.set(nil, "db")
	want(t, "confirm-dead by force", command(t, socket, "", "node", "confirm-dead", "a", "--force", "--confirm", "a"), result{
		0, dead + "Its volumes can be mounted on other hosts when it has given them up, or in half a minute if it does not say so: db." + ifNot, "",
	})

	f.set(&ownership.LiveError{Host: "a"})
	want(t, "confirm-dead of a live host", command(t, socket, "", "node", "confirm-dead", "a"), result{
		1, "",
		"host a answers (its lease in etcd is valid), so it is not dead: stop the containers there, and other hosts can mount their volumes; " +
			"to force it nevertheless: docker flocker node confirm-dead a --force\n",
	})
}

func TestForce(t *testing.T) {
	const question = "Host a will be recorded as dead even if it is running. If it is, its containers lose\n" +
		"their volumes. If it hangs and does not hear of that, other hosts mount them after half\n" +
		"a minute; what it writes then destroys them.\nType the host's name to go on: "
	const usage = "See 'docker flocker node confirm-dead --help'.\n"
	done := result{0, dead + "It owns no volumes." + ifNot, ""}
	f := &fake{}
	socket := serve(t, f)
	for _, test := range []struct {
		typed, flags string
		want         result
		forced       bool
	}{
		{"a\n", "--force", result{0, done.out, question}, true},
		{"", "--force --confirm a", done, true},
		{"b\n", "--force --confirm a", done, true}, // it is not asked
		{"A\n", "--force", result{1, "", question + "\"A\" is not \"a\": nothing was changed\n"}, false},
		{"\n", "--force", result{1, "", question + "\"\" is not \"a\": nothing was changed\n"}, false},
		{"b", "--force", result{1, "", question + "\n\"b\" is not \"a\": nothing was changed\n"}, false},
		{"", "--force", result{2, "", "there is no terminal to ask on: add --confirm a\n" + usage}, false},
		{"", "--confirm a", result{2, "", "--confirm goes together with --force\n" + usage}, false},
		{"", "--force --confirm b", result{1, "", "to force it, the host's name has to be typed a second time, and \"b\" is not \"a\": " +
			"docker flocker node confirm-dead a --force --confirm a\n"}, false},
	} {
		f.set(nil)
		what := fmt.Sprintf("%s and %q", test.flags, test.typed)
		want(t, what, command(t, socket, test.typed, append([]string{"node", "confirm-dead", "a"}, strings.Fields(test.flags)...)...), test.want)
		if calls, death := f.seen(); death.Forced != test.forced || (calls != "") != test.forced {
			t.Errorf("%s: driver saw %q, forced %v, want %v", what, calls, death.Forced, test.forced)
		}
	}
}

func TestRepairs(t *testing.T) {
	const question = "Every container that uses a volume of Flocker has to be stopped, on every host.\n" +
		"If one is not, two hosts may write one volume, which destroys it.\nType the word restored to go on: "
	accepted := "the restored etcd is accepted: the cluster is at generation 3 now. Hosts that have refused it register by themselves; see docker flocker node ls\n"
	f := &fake{}
	socket := serve(t, f)
	for _, test := range []struct {
		typed, args string
		want        result
		calls       string
	}{
		{"", "volume reinstate db", result{0, "volume db is out of quarantine and can be mounted again\n", ""}, "reinstate db by anna@b"},
		{"restored\n", "cluster accept-restore", result{0, accepted, question}, "accept-restore by anna@b"},
		{"", "cluster accept-restore --confirm restored", result{0, accepted, ""}, "accept-restore by anna@b"},
		{"y\n", "cluster accept-restore", result{1, "", question + "\"y\" is not \"restored\": nothing was changed\n"}, ""},
		{"", "cluster accept-restore --confirm yes", result{1, "", "to accept what was restored, the word \"restored\" has to be typed, and \"yes\" is not it: " +
			"docker flocker cluster accept-restore --confirm restored\n"}, ""},
		{"", "cluster accept-restore", result{2, "", "there is no terminal to ask on: add --confirm restored\nSee 'docker flocker cluster accept-restore --help'.\n"}, ""},
	} {
		f.set(nil)
		want(t, test.args, command(t, socket, test.typed, strings.Fields(test.args)...), test.want)
		if got, _ := f.seen(); got != test.calls {
			t.Errorf("%s and %q: driver saw %q, want %q", test.args, test.typed, got, test.calls)
		}
	}
	f.set(fmt.Errorf("volume db: %w", ownership.ErrNotFound))
	want(t, "reinstate of none", command(t, socket, "", "volume", "reinstate", "db"), result{1, "", "volume db: no such volume\n"})
	// A name is one part of the path, whatever is in it.
	f.set(nil)
	command(t, socket, "", "volume", "reinstate", "../x y?z/%2F")
	if got, _ := f.seen(); got != "reinstate ../x y?z/%2F by anna@b" {
		t.Errorf("driver saw %q", got)
	}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"nodes", "unknown command \"nodes\" for \"docker flocker\"\n\nDid you mean this?\n\tnode\n\nSee 'docker flocker --help'.\n"},
		{"node frob", "unknown command \"frob\" for \"docker flocker node\"\nSee 'docker flocker node --help'.\n"},
		{"node ls x", "it takes no argument, and \"x\" is one\nSee 'docker flocker node ls --help'.\n"},
		{"node confirm-dead", "it takes one argument, HOST\nSee 'docker flocker node confirm-dead --help'.\n"},
		{"node confirm-dead a b", "it takes one argument, HOST\nSee 'docker flocker node confirm-dead --help'.\n"},
		{"volume reinstate", "it takes one argument, NAME\nSee 'docker flocker volume reinstate --help'.\n"},
		{"cluster accept-restore --frob", "unknown flag: --frob\nSee 'docker flocker cluster accept-restore --help'.\n"},
	} {
		want(t, test.args, command(t, "/nonexistent", "", strings.Fields(test.args)...), result{2, "", test.want})
	}
}

// Every command says what it is for, how it is typed, and gives an example.
func TestHelp(t *testing.T) {
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
		if cmd.HasSubCommands() || cmd.Name() == "help" {
			return
		}
		path := strings.TrimPrefix(cmd.CommandPath(), "docker flocker ")
		got := command(t, "/nonexistent", "", append(strings.Fields(path), "--help")...)
		if want := "Examples:\n  docker flocker " + path; got.code != 0 || got.errout != "" || !strings.Contains(got.out, want) || !strings.Contains(got.out, `(default "/nonexistent")`) {
			t.Errorf("%s --help: %d\n%s%s", path, got.code, got.out, got.errout)
		}
		if cmd.Short == "" || !strings.HasPrefix(cmd.Long, cmd.Short+".\n\n") {
			t.Errorf("%s: %q does not begin with %q", path, cmd.Long, cmd.Short)
		}
		for line := range strings.Lines(cmd.Long) {
			if len(line) > 85 {
				t.Errorf("%s --help: line is too long: %s", path, line)
			}
		}
	}
	visit((&cli{name: "docker flocker"}).root())
}

// A plugin that is not there, is not ours, or breaks off.
func TestNoPlugin(t *testing.T) {
	dir := t.TempDir()
	absent := filepath.Join(dir, "absent.sock")
	want(t, "absent", command(t, absent, "", "node", "ls"), result{1, "", "no Flocker plugin answers on " + absent + ": is it enabled on this host? (docker plugin ls)\n"})

	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	// The flag has the last word.
	want(t, "stale", command(t, absent, "", "--socket", stale, "node", "ls"), result{1, "", "no Flocker plugin answers on " + stale + ": is it enabled on this host? (docker plugin ls)\n"})

	other := listen(t, http.NotFoundHandler())
	want(t, "another server", command(t, other, "", "node", "ls"), result{1, "", other + " answers 404 Not Found, which is not what a Flocker plugin says\n"})

	broken := listen(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	want(t, "broken off", command(t, broken, "", "volume", "reinstate", "db"), result{
		1, "",
		"the Flocker plugin on " + broken + " broke off: EOF; whether anything was done is not known, but it can be asked again\n",
	})

	down := serve(t, &fake{away: fmt.Errorf("%w: etcd is away", ownership.ErrUnavailable)})
	want(t, "etcd away", command(t, down, "", "node", "ls"), result{1, "", "ownership cannot be checked: etcd is away\n"})
}

func TestOwn(t *testing.T) {
	for typed, want := range map[string]string{
		"flocker node ls": "node ls",
		"-D --context flocker --log-level=debug flocker node confirm-dead flocker": "node confirm-dead flocker",
		"-H unix:///x flocker":                   "",
		"help flocker node":                      "help node",
		"--help flocker node":                    "--help node",
		"__complete flocker node co":             "__complete node co",
		"docker-cli-plugin-metadata":             "docker-cli-plugin-metadata",
		"-D docker-cli-plugin-metadata":          "docker-cli-plugin-metadata",
		"flocker --socket docker.sock volume ls": "--socket docker.sock volume ls",
	} {
		if got := own(strings.Fields(typed)); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%s: got %q, want %q", typed, got, want)
		}
	}
}

// The real Docker CLIs of this machine run it as their plugin.
func TestDockerCLI(t *testing.T) {
	clients := []string{"/usr/bin/docker", "/usr/local/bin/docker"}
	clients = slices.DeleteFunc(clients, func(path string) bool { _, err := os.Stat(path); return err != nil })
	if len(clients) == 0 {
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "docker") {
			t.Fatal("REQUIRE has docker: there is no docker command here")
		}
		t.Skip("there is no docker command here")
	}
	a := status("n1", "a", "b1")
	a.Live = true
	f := &fake{nodes: []ownership.NodeStatus{a}}
	socket := serve(t, f)
	config := t.TempDir()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(config, "cli-plugins"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(config, "cli-plugins", "docker-flocker")); err != nil {
		t.Fatal(err)
	}
	for _, client := range clients {
		docker := func(args ...string) result {
			var out, errout bytes.Buffer
			cmd := exec.CommandContext(t.Context(), client, args...)
			// The race detector would wait a second at each end.
			cmd.Env = []string{"RUN_CLI=1", "GORACE=atexit_sleep_ms=0", "DOCKER_CONFIG=" + config, "FLOCKER_CONTROL=" + socket, "SUDO_USER=anna", "HOME=" + config, "PATH=" + os.Getenv("PATH")}
			cmd.Stdout, cmd.Stderr = &out, &errout
			err := cmd.Run()
			if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
				t.Fatal(err)
			}
			return result{cmd.ProcessState.ExitCode(), out.String(), errout.String()}
		}
		table := "HOST   STATE   VOLUMES   BOOT   ID\na      live    0         b1     n1\n"
		want(t, client, docker("flocker", "node", "ls"), result{0, table, ""})
		want(t, client+" with options", docker("--log-level", "error", "-c", "default", "flocker", "node", "ls"), result{0, table, ""})
		want(t, client+" usage", docker("flocker", "frob"), result{2, "", "unknown command \"frob\" for \"docker flocker\"\nSee 'docker flocker --help'.\n"})
		f.set(&ownership.LiveError{Host: "a"})
		if got := docker("flocker", "node", "confirm-dead", "a"); got.code != 1 || !strings.HasPrefix(got.errout, "host a answers ") {
			t.Errorf("%s: confirm-dead of a live host: %+v", client, got)
		}
		f.set(nil)
		docker("flocker", "node", "confirm-dead", "a")
		if _, death := f.seen(); death.By != "anna@"+host {
			t.Errorf("%s: by %q, want anna@%s", client, death.By, host)
		}
		for _, args := range [][]string{{"flocker", "node", "ls", "--help"}, {"help", "flocker", "node", "ls"}} {
			if got := docker(args...); got.code != 0 || !strings.Contains(got.out, "Usage:\n  docker flocker node ls") {
				t.Errorf("%s %q: %+v", client, args, got)
			}
		}
		if major, _, _ := strings.Cut(docker("version", "--format", "{{.Client.Version}}").out, "."); len(major) == 2 && major >= "23" {
			if got := docker("__complete", "flocker", "node", "confirm-dead", ""); got.out != "a\tlive\n:4\n" {
				t.Errorf("%s: completes %+v", client, got)
			}
		}
		if got := docker("--help"); !strings.Contains(got.out, "flocker*") || !strings.Contains(got.out, "Volumes that follow containers: hosts and repairs") {
			t.Errorf("%s --help does not list it:\n%s%s", client, got.out, got.errout)
		}
	}
}

// Without Docker's CLI it is a command of its own.
func TestStandalone(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "node")
	cmd.Env = []string{"RUN_CLI=1"}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Usage:\n  docker-flocker node\n") || !strings.Contains(string(out), `(default "/var/lib/flocker/control.sock")`) {
		t.Errorf("got %v\n%s", err, out)
	}
}
