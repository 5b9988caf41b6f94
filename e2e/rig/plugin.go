package rig

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// PluginName is what the plugin is called in Docker.
const PluginName = "flocker"

// pluginDir is the directory that the plugin is created from, prepared once.
type pluginDir struct {
	once sync.Once
	path string
	err  error
}

// InstallPlugin creates the plugin on the host, makes the settings (environment
// variables, or NAME.source for the source of a mount) and enables it.
func (h *Host) InstallPlugin(ctx context.Context, settings map[string]string) error {
	p := &h.r.plugin
	p.once.Do(func() {
		var from string
		if from, p.err = h.r.pluginSource(); p.err != nil {
			return
		}
		if p.err = h.r.commandLine(filepath.Dir(from)); p.err != nil {
			return
		}
		p.path = filepath.Join(h.r.Dir, "plugin")
		var dropped []string
		dropped, p.err = PreparePlugin(ctx, from, p.path)
		if len(dropped) > 0 {
			h.r.cfg.Logf("the plugin does without %s, which root lacks here", strings.Join(dropped, ", "))
		}
	})
	if p.err != nil {
		return p.err
	}
	return InstallPlugin(ctx, p.path, settings, h.Docker)
}

// pluginSource is the directory of the plugin as it was built.
func (r *Rig) pluginSource() (string, error) {
	if from := cmp.Or(r.cfg.Plugin, os.Getenv("RIG_PLUGIN")); from != "" {
		return from, nil
	}
	root, err := sourceRoot()
	return filepath.Join(root, "build", "plugin"), err
}

// commandLine makes docker flocker known, which was built in a directory.
func (r *Rig) commandLine(dir string) error {
	return os.Symlink(filepath.Join(dir, "docker-flocker"), filepath.Join(r.Dir, "cli", "cli-plugins", "docker-flocker"))
}

// RunPlugin runs the plugin on the host as flocker.service does: without Docker, in the
// host's own namespaces. It is started again with the host, and when it was killed. The
// settings are environment variables.
func (h *Host) RunPlugin(ctx context.Context, settings map[string]string) error {
	root, err := sourceRoot()
	if err != nil {
		return err
	}
	p := &h.r.plugin
	p.once.Do(func() {
		p.path = filepath.Join(root, "build", "flocker-plugin")
		if _, p.err = os.Stat(p.path); p.err != nil {
			p.err = fmt.Errorf("%w; `make build` makes it", p.err)
			return
		}
		p.err = h.r.commandLine(filepath.Dir(p.path))
	})
	if p.err != nil {
		return p.err
	}
	h.service = []string{"FLOCKER_MOUNT_ROOT=/var/lib/flocker/mnt", "FLOCKER_DOCKER_SOCKET=/run/docker.sock"}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		h.service = append(h.service, name+"="+settings[name])
	}
	return h.startPlugin(ctx)
}

// startPlugin starts the plugin as a service, and waits until it listens.
func (h *Host) startPlugin(ctx context.Context) (err error) {
	h.plugin, err = h.m.start(ctx, "flocker-plugin", h.service, h.r.plugin.path)
	if err != nil {
		return err
	}
	return h.wait(ctx, h.plugin, func() error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/docker/plugins/flocker.sock", h.m.pid))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// InstallPlugin does the same on every host at once.
func (r *Rig) InstallPlugin(ctx context.Context, settings map[string]string) error {
	return r.each(func(h *Host) error { return h.InstallPlugin(ctx, settings) })
}

// InstallPlugin creates, sets and enables the plugin in the directory dir on the
// Docker that the function docker commands.
func InstallPlugin(ctx context.Context, dir string, settings map[string]string, docker func(ctx context.Context, args ...string) (string, error)) error {
	if _, err := docker(ctx, "plugin", "create", PluginName, dir); err != nil {
		return err
	}
	if len(settings) > 0 {
		args := []string{"plugin", "set", PluginName}
		for _, name := range slices.Sorted(maps.Keys(settings)) {
			args = append(args, name+"="+settings[name])
		}
		if _, err := docker(ctx, args...); err != nil {
			return err
		}
	}
	// Timeout 0 is none: otherwise Docker would give up on every call to the plugin
	// after 30 s, less than waiting for a busy volume may take.
	_, err := docker(ctx, "plugin", "enable", "--timeout", "0", PluginName)
	return err
}

// PreparePlugin copies the plugin in from (config.json and rootfs) to the new
// directory to, without the capabilities that root lacks on this machine: Docker
// refuses to enable a plugin that asks for one. It returns those it dropped.
func PreparePlugin(ctx context.Context, from, to string) (dropped []string, err error) {
	data, err := os.ReadFile(filepath.Join(from, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("%w; `make plugin` makes it", err)
	}
	data, dropped, err = dropCapabilities(data)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return nil, err
	}
	// Links, not copies, where possible: Docker only reads it.
	if _, err := output(exec.CommandContext(ctx, "cp", "-al", filepath.Join(from, "rootfs"), to), "cp"); err != nil {
		if _, err := output(exec.CommandContext(ctx, "cp", "-a", filepath.Join(from, "rootfs"), to), "cp"); err != nil {
			return nil, err
		}
	}
	return dropped, os.WriteFile(filepath.Join(to, "config.json"), data, 0o644)
}

// capabilityNumbers are those the plugin may ask for, from capabilities(7).
var capabilityNumbers = map[string]uint{
	"CAP_LINUX_IMMUTABLE": 9,
	"CAP_SYS_ADMIN":       21,
	"CAP_SYS_RESOURCE":    24,
}

// dropCapabilities removes from a plugin's config the capabilities that this
// process's bounding set lacks.
func dropCapabilities(config []byte) (changed []byte, dropped []string, err error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, nil, err
	}
	_, after, _ := strings.Cut(string(status), "CapBnd:")
	hex, _, _ := strings.Cut(strings.TrimSpace(after), "\n")
	bounding, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		return nil, nil, fmt.Errorf("read capabilities: %w", err)
	}
	var fields map[string]any
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, nil, fmt.Errorf("read config.json: %w", err)
	}
	linux, _ := fields["linux"].(map[string]any)
	asked, _ := linux["capabilities"].([]any)
	kept := []any{}
	for _, c := range asked {
		name, _ := c.(string)
		if number, ok := capabilityNumbers[name]; ok && bounding&(1<<number) == 0 {
			dropped = append(dropped, name)
			continue
		}
		kept = append(kept, c)
	}
	if len(dropped) == 0 {
		return config, nil, nil
	}
	linux["capabilities"] = kept
	changed, err = json.MarshalIndent(fields, "", "  ")
	return changed, dropped, err
}

// PluginPID returns the number of the plugin's process, as seen from outside.
func (h *Host) PluginPID() (int, error) {
	if h.service != nil {
		return h.plugin.pid, nil
	}
	for _, pid := range h.m.pids() {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it has just ended
		}
		if program, _, _ := strings.Cut(string(cmdline), "\x00"); program == "/usr/bin/flocker-plugin" {
			return pid, nil
		}
	}
	return 0, errors.New("the plugin does not run on " + h.Name)
}

// KillPlugin kills the plugin's process as a crash does, and waits until it has
// ended. Docker starts another at once; the service is started here.
func (h *Host) KillPlugin(ctx context.Context) error {
	if h.service != nil {
		if err := h.plugin.stop(ctx, syscall.SIGKILL); err != nil {
			return err
		}
		return h.startPlugin(ctx)
	}
	pid, err := h.PluginPID()
	if err != nil {
		return err
	}
	started := startTime(pid)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the plugin: %w", err)
	}
	for startTime(pid) == started {
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill the plugin: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// sourceRoot is the directory of this module's go.mod, found from the working
// directory.
func sourceRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod in the working directory or above it")
		}
		dir = parent
	}
}
