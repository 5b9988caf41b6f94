//go:build e2e

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// A reader types what the README prints for a cluster of three hosts. What has another
// name on the rig is replaced:
//
//   - alpha, beta and gamma with their addresses 10.0.0.1 to 3 are the rig's hosts;
//   - ssh and scp enter a host without a network;
//   - the file server is a directory of this machine;
//   - make does not build the plugin once more on each host, and what it puts into
//     /usr/local is each host's own.
type reader struct {
	*rig.Rig

	hosts map[string]*rig.Host // by the README's names
	own   string               // his directory, on no host
	enter []string             // the rig's network, where he is
	names *strings.Replacer    // from the README's to the rig's
	back  *strings.Replacer    // and back
}

// TestReadmeCluster follows the README from nothing to three hosts with TLS, between
// which a volume moves.
func TestReadmeCluster(t *testing.T) {
	step := stopwatch(t)
	r := newReader(t)
	cluster := readme(t, "## Use it on a cluster")
	if len(cluster) < 2 {
		t.Fatalf("the README has %d blocks", len(cluster))
	}
	certificates, install := cluster[0], cluster[1]

	out := r.types(t, certificates)
	for _, want := range []string{"made cluster.crt and cluster.key, the authority of cluster prod\n", "made gamma, with cluster.crt, node.crt, "} {
		if !strings.Contains(out, want) {
			t.Errorf("it prints\n%s\nwant %q in it", out, want)
		}
	}
	for name, h := range r.hosts {
		if got, err := h.Exec(t.Context(), "stat", "-c", "%a %U", "/var/lib/flocker/certs", "/var/lib/flocker/certs/node.key"); err != nil || got != "700 root\n600 root" {
			t.Errorf("on %s the certificates are %q, %v", name, got, err)
		}
		if exists(filepath.Join(r.own, h.Name)) {
			t.Errorf("the keys of %s are still where they were made", name)
		}
	}
	step("certificates made")

	for line := range strings.SplitSeq(install, "\n") {
		line, where, _ := strings.Cut(line, " # on ")
		for _, name := range []string{"alpha", "beta", "gamma"} {
			if where == name || where == "all" || where == "the others" && name != "alpha" {
				r.at(t, name, strings.TrimSpace(line))
				step(name + ": " + strings.Join(strings.Fields(line)[:2], " "))
			}
		}
	}

	tour := readme(t, "### A volume moves, and a host is emptied")
	if len(tour) < 2 {
		t.Fatalf("the README has %d blocks", len(tour))
	}
	steps, events := prompts(tour[0]), prompts(tour[1])[0]
	within(t, time.Minute, "docker flocker node ls shows all three", func() error {
		return r.shows(steps[0], r.typed(t, steps[0]))
	})
	if _, err := r.hosts[events.host].Exec(t.Context(), "sh", "-c", events.line+" >/run/events 2>&1 & echo $! >/run/events.pid"); err != nil {
		t.Fatal(err)
	}
	for _, p := range steps {
		if err := r.shows(p, r.typed(t, p)); err != nil {
			t.Error(err)
		}
		step(p.host + ": " + p.line)
	}
	within(t, 30*time.Second, "the events are those of the README", func() error {
		out, err := r.hosts[events.host].Exec(t.Context(), "cat", "/run/events")
		if err != nil {
			return err
		}
		return r.shows(events, out)
	})
	if _, err := r.hosts[events.host].Exec(t.Context(), "sh", "-c", "kill $(cat /run/events.pid)"); err != nil {
		t.Error(err)
	}
	step("events")

	r.testAPI(t)
	step("the API")
	r.at(t, "alpha", "docker flocker rm db")
	r.at(t, "gamma", "make uninstall")
	step("removed")
}

func newReader(t *testing.T) *reader {
	t.Helper()
	r := &reader{Rig: rig.New(t, rig.Config{Hosts: 3}), hosts: map[string]*rig.Host{}}
	if err := r.ImportImage(t.Context()); err != nil {
		t.Fatal(err)
	}
	var err error
	if _, r.enter, err = r.Serve(t.Context()); err != nil {
		t.Fatal(err)
	}
	var there, back []string
	etcHosts := []string{"127.0.0.1 localhost"}
	for i, name := range []string{"alpha", "beta", "gamma"} {
		h, addr := r.Hosts[i], "10.0.0."+string(rune('1'+i))
		r.hosts[name] = h
		there, back = append(there, name, h.Name, addr, h.Addr), append(back, h.Name, name, h.Addr, addr)
		etcHosts = append(etcHosts, h.Addr+" "+h.Name)
		if _, err := h.Exec(t.Context(), "sh", "-ec", `mkdir /run/local /run/local.work
			mount -t overlay overlay -o lowerdir=/usr/local,upperdir=/run/local,workdir=/run/local.work /usr/local`); err != nil {
			t.Fatal(err)
		}
	}
	there = append(there, "mount files:/flocker ", "mount --bind "+r.Shared+" ", "make install ", "make -o plugin install ")
	r.names, r.back = strings.NewReplacer(there...), strings.NewReplacer(back...)

	r.own = filepath.Join(r.Dir, "reader")
	for name, text := range map[string]string{
		"etc.hosts": strings.Join(etcHosts, "\n"),
		"bin/ssh": `#!/bin/sh -e
			host=${1#root@}; shift
			read -r pid _ <` + r.Dir + `/$host/init
			cd / && exec nsenter -t $pid -m -u -i -n -p -- sh -c "$*"`,
		"bin/scp": `#!/bin/sh -e
			[ "$1" = -rp ] && host=${3%%:*}
			read -r pid _ <` + r.Dir + `/${host#root@}/init
			exec cp -r --preserve=mode,timestamps "$2" "/proc/$pid/root${3#*:}"`,
	} {
		file := filepath.Join(r.own, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	plugins := filepath.Join(r.own, "docker", "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(root, "build", "docker-flocker"), filepath.Join(plugins, "docker-flocker")); err != nil {
		t.Fatal(err)
	}
	return r
}

// types runs what the README prints on no host in particular, and returns what that prints.
func (r *reader) types(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	args := append(r.enter[1:], "unshare", "--mount", "--", "sh", "-ec", `mount --bind "$1/etc.hosts" /etc/hosts; cd "$1"; eval "$2"`, "sh", r.own, r.names.Replace(script))
	cmd := exec.CommandContext(ctx, r.enter[0], args...)
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(r.own, "bin")+":"+os.Getenv("PATH"), "DOCKER_CONFIG="+filepath.Join(r.own, "docker"), "DOCKER_HOST=unix:///none.sock")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v: %s", script, err, out)
	}
	return r.back.Replace(string(out))
}

// at runs what the README prints for a host.
func (r *reader) at(t *testing.T, host, line string) {
	t.Helper()
	if out, err := r.try(t, host, line); err != nil {
		t.Fatalf("%s: %s\n%v: %s", host, line, err, out)
	}
}

func (r *reader) try(t *testing.T, host, line string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	return r.hosts[host].Exec(ctx, "sh", "-c", `cd "$0" && eval "$1" 2>&1`, root, r.names.Replace(line))
}

// A prompt is a command in the README, with the host on which it is typed, and what it
// prints there.
type prompt struct{ host, line, out string }

var promptLine = regexp.MustCompile(`^(\w+)\$ (.*)$`)

func prompts(block string) (all []prompt) {
	for line := range strings.SplitSeq(block, "\n") {
		if m := promptLine.FindStringSubmatch(line); m != nil {
			all = append(all, prompt{host: m[1], line: m[2]})
		} else if len(all) > 0 {
			all[len(all)-1].out += line + "\n"
		}
	}
	return all
}

// typed runs a command of the README, and returns what it prints. It may fail as docker
// flocker node drain does that has left something.
func (r *reader) typed(t *testing.T, p prompt) string {
	t.Helper()
	out, err := r.try(t, p.host, p.line)
	if err != nil && (!strings.Contains(p.out, "busy: ") || !strings.Contains(err.Error(), "exit status 3")) {
		t.Errorf("%s: %s\n%v: %s", p.host, p.line, err, out)
	}
	return out
}

// shows is an error if what was printed has not the shape of what the README shows. One
// who drains may be told what was let go, or the host was faster. Events are each there,
// and not always in the same order where two hosts are at work; see faster.
func (r *reader) shows(p prompt, out string) error {
	got, want := shape(r.back.Replace(out)), shape(p.out)
	same := slices.Equal(got, want)
	switch {
	case strings.Contains(p.line, " drain "):
		same = slices.Equal(slices.DeleteFunc(got, func(line string) bool { return line == "let go: db" }), want)
	case strings.Contains(p.line, " events "):
		for _, f := range faster {
			if contains(got, f.instead) {
				want = slices.DeleteFunc(want, func(line string) bool { return slices.Contains(f.usual, line) })
			}
		}
		same = contains(got, want)
	}
	if !same {
		return fmt.Errorf("%s$ %s\nprints\n%s\nin the README it is\n%s", p.host, p.line, r.back.Replace(out), p.out)
	}
	return nil
}

// faster are events in whose place others may be, by who is the first of two that are both
// told to act: a host that is to let go of a volume need not wait until it is asked for it;
// and the host of a placement mounts the volume, or a container there does.
var faster = []struct{ usual, instead []string }{{
	usual:   []string{"# # beta: request db from alpha (token #; to placement; by root@alpha)", "# # alpha: hand over db to beta (token #)"},
	instead: []string{"# # alpha: release db (token #)", "# # beta: claim db (by root@alpha)"},
}, {
	usual:   []string{"# # alpha: claim db (by root@alpha)", "# # alpha: formatted db (token #; by root@alpha)"},
	instead: []string{"# # alpha: claim db (by docker)", "# # alpha: formatted db (token #; by docker)"},
}}

// contains says whether each of the lines is in the text.
func contains(text, lines []string) bool {
	return !slices.ContainsFunc(lines, func(line string) bool { return !slices.Contains(text, line) })
}

var variable = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}|[0-9a-f]{64}|\b[0-9a-f]{8}\b|\b\d+\b`)

// shape is what is the same each time: no times, numbers and ids, and no widths of columns.
func shape(text string) (lines []string) {
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		lines = append(lines, variable.ReplaceAllString(strings.Join(strings.Fields(line), " "), "#"))
	}
	return lines
}

// testAPI asks the REST API as the README does, and then without a certificate; etcd takes
// nobody without one, either.
func (r *reader) testAPI(t *testing.T) {
	t.Helper()
	out := r.types(t, readme(t, "### REST API")[0])
	for _, want := range []string{"made anna.crt and anna.key: user anna may do everything", `"name":"db"`} {
		if !strings.Contains(out, want) {
			t.Errorf("it prints\n%s\nwant %q in it", out, want)
		}
	}
	for _, url := range []string{"https://alpha:4523/v2/volumes", "https://alpha:2379/version"} {
		out := r.types(t, "curl -sSk --max-time 60 "+url+" || echo exit $?")
		// The codes are of a name or port that there is not, and of no answer in time.
		if m := exitCode.FindStringSubmatch(out); m == nil || slices.Contains([]string{"6", "7", "28"}, m[1]) {
			t.Errorf("%s without a certificate: %s", url, out)
		}
	}
}

var exitCode = regexp.MustCompile(`exit (\d+)\n$`)
