package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// machine is what can be seen of this host without the plugin.
type machine struct {
	root        bool
	release     string // of the kernel
	loop        bool   // it makes loop devices
	filesystems []string
	adrift      bool // nothing keeps the clock right
	sockets     []socket
	mounts      []mounted
}

// A socket is one on which Docker asks the plugin.
type socket struct {
	path string
	err  error // why it does not answer
}

// A mounted is a line of the host's mount table; its number is the filesystem's.
type mounted struct{ path, number string }

// plugins is where Docker looks for sockets, those of managed plugins each in a
// directory with the plugin's id.
const plugins = "/run/docker/plugins"

// thisMachine looks. What it may not see it leaves out.
func thisMachine(ctx context.Context) machine {
	m := machine{root: os.Geteuid() == 0, adrift: adrift()}
	m.release = line("/proc/sys/kernel/osrelease")
	_, err := os.Stat("/dev/loop-control")
	m.loop = err == nil
	table, _ := os.ReadFile("/proc/filesystems")
	m.filesystems = filesystems(table, filepath.Join("/lib/modules", m.release))
	if table, err = os.ReadFile("/proc/self/mountinfo"); err == nil {
		m.mounts = mountTable(table)
	}
	for _, pattern := range []string{"flocker.sock", "*/flocker.sock"} {
		found, _ := filepath.Glob(filepath.Join(plugins, pattern))
		for _, path := range found {
			m.sockets = append(m.sockets, socket{path, answers(ctx, path)})
		}
	}
	return m
}

// line is a file of one line.
func line(file string) string {
	text, _ := os.ReadFile(file)
	return strings.TrimSpace(string(text))
}

// filesystems are those that the kernel knows, and those it has modules for.
func filesystems(table []byte, modules string) (known []string) {
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 0 {
			known = append(known, fields[len(fields)-1])
		}
	}
	for _, index := range []string{"modules.dep", "modules.builtin"} {
		text, _ := os.ReadFile(filepath.Join(modules, index))
		for _, fs := range []string{"ext4", "xfs", "btrfs"} {
			if !slices.Contains(known, fs) && bytes.Contains(text, []byte("/"+fs+".ko")) {
				known = append(known, fs)
			}
		}
	}
	return known
}

// older says that the kernel is older than that; false if its version cannot be told.
func (m *machine) older(major, minor int) bool {
	var a, b int
	n, err := fmt.Sscanf(m.release, "%d.%d", &a, &b)
	return err == nil && n == 2 && (a < major || a == major && b < minor)
}

func mountTable(text []byte) (table []mounted) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			table = append(table, mounted{unescape(fields[4]), fields[2]})
		}
	}
	return table
}

// unescape undoes what the kernel does to blanks in a path.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

var (
	propagated = regexp.MustCompile(`/plugins/([0-9a-f]{64})/propagated-mount/`)
	uuid       = regexp.MustCompile(`/[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
)

// ours says that a path of the host is where the plugin mounts a volume.
func (f *facts) ours(path string) bool {
	if !uuid.MatchString(path) {
		return false
	}
	if id := propagated.FindStringSubmatch(path); id != nil {
		return slices.ContainsFunc(f.sockets, func(s socket) bool { return s.path == filepath.Join(plugins, id[1], "flocker.sock") })
	}
	return f.host.MountRoot != "" && filepath.Dir(path) == f.host.MountRoot
}

// answers asks for something that changes nothing. An Activate would: to the plugin it
// means that Docker was restarted.
func answers(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("no answer within 5s"))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://flocker/VolumeDriver.Capabilities", strings.NewReader("{}"))
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return errors.Unwrap(err) // without the URL, which is made up
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers %s", resp.Status)
	}
	return nil
}
