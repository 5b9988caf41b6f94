// Command install puts the plugin in build/plugin on this machine's Docker, and
// build/docker-flocker where Docker's command line finds it, or takes both off:
// `make install` and `make uninstall`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// stateDir has to exist when the plugin is enabled, because config.json mounts it.
const stateDir = "/var/lib/flocker"

// cli is among the directories where the docker command looks for its plugins, from
// 20.10 on, whoever types it.
const cli = "/usr/local/lib/docker/cli-plugins/docker-flocker"

// flockerctl is the same command by the name of the original Flocker's.
var flockerctl = "/usr/local/bin/flockerctl"

func main() {
	uninstalls := flag.Bool("uninstall", false, "take the plugin off")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	what, do := "install", install
	if *uninstalls {
		what, do = "uninstall", uninstall
	}
	if err := do(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		cancel()
		stop()
		os.Exit(1)
	}
}

func install(ctx context.Context) (err error) {
	settings := make(map[string]string)
	for _, v := range os.Environ() {
		// FLOCKER_CONTROL is docker flocker's.
		if name, value, _ := strings.Cut(v, "="); strings.HasPrefix(name, "FLOCKER_") && name != "FLOCKER_CONTROL" {
			settings[name] = value
		}
	}
	if _, err := docker(ctx, "plugin", "inspect", rig.PluginName); err == nil {
		return errors.New("the plugin is installed already; `make uninstall` removes it and keeps the volumes")
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return err
	}
	dir := filepath.Join("build", "install")
	if err := clean(ctx, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, clean(ctx, dir)) }()
	dropped, err := rig.PreparePlugin(ctx, filepath.Join("build", "plugin"), dir)
	if err != nil {
		return err
	}
	if len(dropped) > 0 {
		fmt.Printf("note: root lacks %s on this machine, and so does the plugin", strings.Join(dropped, ", "))
		fmt.Println("; without CAP_SYS_RESOURCE, ext4 grows at the next mount instead of at once")
	}
	if err := rig.InstallPlugin(ctx, dir, settings, docker); err != nil {
		_, _ = docker(context.WithoutCancel(ctx), "plugin", "rm", rig.PluginName)
		return fmt.Errorf("%w (what the plugin itself said is in Docker's log: journalctl -u docker)", err)
	}
	if err := installCLI(); err != nil {
		return fmt.Errorf("the plugin is enabled, but not docker flocker: %w", err)
	}
	fmt.Println("the plugin is enabled: docker volume create -d flocker NAME")
	fmt.Println("the hosts of its cluster: docker flocker node ls")
	return nil
}

// installCLI takes the place of an older one, even while that runs.
func installCLI() error {
	program, err := os.ReadFile(filepath.Join("build", "docker-flocker"))
	if err != nil {
		return fmt.Errorf("%w; `make build` makes it", err)
	}
	if err := os.MkdirAll(filepath.Dir(cli), 0o755); err != nil {
		return err
	}
	// Docker does not take a name with a dot for a plugin's.
	if err := os.WriteFile(cli+".new", program, 0o755); err != nil { //nolint:gosec // it is a program
		return err
	}
	if err := os.Rename(cli+".new", cli); err != nil {
		return err
	}
	return link()
}

// link makes flockerctl, unless there is another one.
func link() error {
	switch err := os.Symlink(cli, flockerctl); {
	case err == nil, linked():
	case errors.Is(err, fs.ErrExist):
		fmt.Println("note: there is another " + flockerctl + ", which is left as it is")
	default:
		return err
	}
	return nil
}

// linked says that flockerctl is ours.
func linked() bool {
	to, err := os.Readlink(flockerctl)
	return err == nil && to == cli
}

func uninstall(ctx context.Context) error {
	volumes, err := docker(ctx, "volume", "ls", "-q", "--filter", "driver="+rig.PluginName+":latest")
	if err != nil {
		return err
	}
	for volume := range strings.FieldsSeq(volumes) {
		containers, err := docker(ctx, "ps", "--filter", "volume="+volume, "--format", "{{.Names}}")
		if err != nil {
			return err
		}
		if containers != "" {
			return fmt.Errorf("volume %s is in use by %s; stop it first", volume, strings.Join(strings.Fields(containers), ", "))
		}
	}
	// Forced: without that, Docker refuses while it remembers a volume, used or not.
	if _, err := docker(ctx, "plugin", "disable", "--force", rig.PluginName); err != nil && !strings.Contains(err.Error(), "already disabled") {
		return err
	}
	if _, err := docker(ctx, "plugin", "rm", "--force", rig.PluginName); err != nil {
		return err
	}
	if err := os.Remove(cli); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the plugin is removed, but not docker flocker: %w", err)
	}
	if linked() {
		if err := os.Remove(flockerctl); err != nil {
			return fmt.Errorf("the plugin is removed, but not flockerctl: %w", err)
		}
	}
	fmt.Println("the plugin is removed; volumes and state are still in " + stateDir)
	return nil
}

func docker(ctx context.Context, args ...string) (string, error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), err
}

// clean removes the copy of the plugin; nothing was ever mounted in it.
func clean(ctx context.Context, dir string) error {
	return exec.CommandContext(context.WithoutCancel(ctx), "rm", "-rf", dir).Run()
}
