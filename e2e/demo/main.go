// Command demo shows a volume that follows its container: it starts two real
// Docker hosts on this machine, with the managed plugin on each, moves a volume
// from one to the other and back, and cleans everything up.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := demo(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func demo(ctx context.Context) (err error) {
	started := time.Now()
	say("starting two Docker hosts, each with an etcd-backed Flocker plugin")
	r, err := rig.Start(ctx, rig.Config{Hosts: 2})
	if err != nil {
		return fmt.Errorf("start the hosts: %w", err)
	}
	defer func() {
		if err != nil {
			fmt.Fprintln(os.Stderr, r.Logs(30))
		}
		say("cleaning up")
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, r.Close(closing))
	}()
	endpoints, err := r.Etcd(ctx)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	if err := r.ImportImage(ctx); err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	for _, h := range r.Hosts {
		if err := h.InstallPlugin(ctx, map[string]string{"FLOCKER_ETCD_ENDPOINTS": strings.Join(endpoints, ",")}); err != nil {
			return fmt.Errorf("install the plugin: %w", err)
		}
	}
	fmt.Printf("    (%.0f s)\n", time.Since(started).Seconds())

	one, two := r.Hosts[0], r.Hosts[1]
	for _, h := range r.Hosts {
		if _, err := bare(ctx, h); err != nil { // the first container of a host is slow
			return err
		}
	}
	say("a volume is made on the first host, and a container there writes to it")
	if _, err := docker(ctx, one, "volume", "create", "-d", "flocker", "-o", "size=256M", "db"); err != nil {
		return err
	}
	wrote, err := run(ctx, one, "echo written on $(hostname) > /data/log; cat /data/log")
	if err != nil {
		return err
	}

	say("a container on the second host reads it, and writes too")
	read, err := move(ctx, r, one, two, "echo then on $(hostname) >> /data/log; cat /data/log")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(read, wrote) || read == wrote {
		return fmt.Errorf("%s read %q after %q was written", two.Name, read, wrote)
	}

	say("it moves back")
	back, err := move(ctx, r, two, one, "cat /data/log")
	if err != nil {
		return err
	}
	if back != read {
		return fmt.Errorf("%s read %q, want %q", one.Name, back, read)
	}

	say("every host says who has it")
	if _, err := docker(ctx, one, "run", "-d", "--name", "web", "--mount", mount, "busybox", "sleep", "100"); err != nil {
		return err
	}
	for _, h := range r.Hosts {
		if _, err := docker(ctx, h, "volume", "inspect", "--format",
			`{{.Name}} on {{.Status.owner}}: {{.Status.state}}, {{.Status.size}} {{.Status.filesystem}}, token {{.Status.token}}, {{.Status.backend}}`, "db"); err != nil {
			return err
		}
	}
	if _, err := docker(ctx, one, "rm", "-f", "web"); err != nil {
		return err
	}
	if _, err := docker(ctx, two, "volume", "rm", "db"); err != nil {
		return err
	}
	fmt.Printf("\nDone in %.0f s: the data followed its container both ways.\n", time.Since(started).Seconds())
	return nil
}

const mount = "type=volume,volume-driver=flocker,src=db,dst=/data"

// run runs a shell command in a container that has the volume.
func run(ctx context.Context, h *rig.Host, script string) (string, error) {
	return docker(ctx, h, "run", "--rm", "--hostname", h.Name, "--mount", mount, "busybox", "sh", "-c", script)
}

// move is run on the host to, and says how long it took beside a container
// without a volume.
func move(ctx context.Context, r *rig.Rig, from, to *rig.Host, script string) (string, error) {
	start := time.Now()
	out, err := run(ctx, to, script)
	all := time.Since(start)
	if err != nil {
		return "", err
	}
	plain, err := bare(ctx, to)
	if err != nil {
		return "", err
	}
	fmt.Printf("    moved %s → %s: docker run took %d ms (without a volume: %d ms); the plugin's Mount took %s of it\n",
		from.Name, to.Name, all.Milliseconds(), plain.Milliseconds(), mountTook(r, to))
	return out, nil
}

var took = regexp.MustCompile(`op=mount took=([0-9.]+[mµ]?s)`)

// mountTook is what the plugin on a host logged of its last Mount.
func mountTook(r *rig.Rig, h *rig.Host) string {
	log, err := os.ReadFile(filepath.Join(r.Dir, h.Name, "dockerd.log"))
	if err != nil {
		return "?"
	}
	found := took.FindAllSubmatch(log, -1)
	if len(found) == 0 {
		return "?"
	}
	return string(found[len(found)-1][1])
}

func bare(ctx context.Context, h *rig.Host) (time.Duration, error) {
	start := time.Now()
	_, err := h.Docker(ctx, "run", "--rm", "busybox", "true")
	return time.Since(start), err
}

func say(what string) { fmt.Printf("\n==> %s\n", what) }

// docker runs and shows a docker command.
func docker(ctx context.Context, h *rig.Host, args ...string) (string, error) {
	shown := make([]string, len(args))
	for i, a := range args {
		if shown[i] = a; strings.ContainsAny(a, " {$>") {
			shown[i] = "'" + a + "'"
		}
	}
	fmt.Printf("%s$ docker %s\n", h.Name, strings.Join(shown, " "))
	out, err := h.Docker(ctx, args...)
	if out != "" {
		fmt.Println("    " + strings.ReplaceAll(out, "\n", "\n    "))
	}
	return out, err
}
