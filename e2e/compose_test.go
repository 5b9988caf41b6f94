//go:build e2e

package e2e_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// composers are the commands that are Docker Compose.
var composers = []struct {
	name    string
	command []string
}{
	{"v5", []string{"docker", "compose"}},
	{"1.29", []string{"docker-compose"}},
}

// A project is a directory with a compose file.
type project struct {
	h       *rig.Host
	command []string
	dir     string
}

// newProject makes one of that name.
func newProject(t *testing.T, h *rig.Host, command []string, name, file string) project {
	t.Helper()
	p := project{h, command, filepath.Join(t.TempDir(), name)}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "docker-compose.yml"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

// try runs compose and returns all it printed.
func (p project) try(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	all := append(append([]string{}, p.command...), args...)
	cmd := p.h.Command(ctx, all[0], all[1:]...)
	var out bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

func (p project) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.try(t, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", strings.Join(p.command, " "), strings.Join(args, " "), err, out)
	}
	return out
}

const composeFile = `
services:
  app:
    image: busybox
    command: sh -c 'echo start >>/data/log; sleep 1000'
    stop_grace_period: 0s
    network_mode: none
    volumes: ["data:/data"]
volumes:
  data:
    driver: flocker:latest
    driver_opts: {size: 70M}
`

const externalFile = `
services:
  app:
    image: busybox
    command: sleep 1000
    stop_grace_period: 0s
    network_mode: none
    volumes: ["data:/data"]
volumes:
  data:
    external: true
    name: outside
`

func testCompose(t *testing.T, c *cluster) {
	for _, composer := range composers {
		t.Run(composer.name, func(t *testing.T) {
			began := time.Now()
			t.Run("up and down", func(t *testing.T) { testComposeUpDown(t, c, composer.command) })
			t.Run("external", func(t *testing.T) { testComposeExternal(t, c, composer.command) })
			t.Logf("%.1f s", time.Since(began).Seconds())
		})
	}
}

func testComposeUpDown(t *testing.T, c *cluster, command []string) {
	a, b := c.Hosts[0], c.Hosts[1]
	wantLog := func(p project, want string) {
		t.Helper()
		eventually(t, "the service has written "+want, func() bool {
			out, err := p.try(t, "exec", "-T", "app", "cat", "/data/log")
			return err == nil && strings.ReplaceAll(out, "\n", " ") == want
		})
	}
	shop := newProject(t, a, command, "shop", composeFile)
	shop.run(t, "up", "-d")
	if got, want := a.Run(t, "volume", "inspect", "--format", "{{.Driver}} {{.Status.size}} {{index .Labels \"com.docker.compose.project\"}}", "shop_data"),
		"flocker:latest 70MiB shop"; got != want {
		t.Errorf("the volume is %q, want %q", got, want)
	}
	wantLog(shop, "start")
	shop.run(t, "up", "-d") // changes nothing
	wantLog(shop, "start")

	// Another project has a volume of its own.
	till := newProject(t, a, command, "till", composeFile)
	till.run(t, "up", "-d")
	wantLog(till, "start")
	shop.run(t, "down")
	till.run(t, "down", "-v")
	if got := volumes(t, a, "name=_data"); len(got) != 1 || got[0] != "shop_data" {
		t.Errorf("after down and down -v: %q, want only shop_data", got)
	}
	// It follows the project to another host. Docker there knows no options of a
	// volume it has not created, and the old Compose insists on them: it wants a file
	// without.
	shop.h = b
	if out, err := shop.try(t, "up", "-d"); err != nil {
		if !strings.Contains(out, `uses a different "size" driver_opt (None)`) {
			t.Fatalf("up on the other host: %v\n%s", err, out)
		}
		shop = newProject(t, b, command, "shop", strings.Replace(composeFile, "driver_opts: {size: 70M}", "", 1))
		shop.run(t, "up", "-d")
	}
	wantLog(shop, "start start")
	shop.run(t, "down", "-v")
	if got := volumes(t, a, "name=_data"); len(got) != 0 {
		t.Errorf("after down -v: %q", got)
	}
}

func testComposeExternal(t *testing.T, c *cluster, command []string) {
	a := c.Hosts[0]
	p := newProject(t, a, command, "branch", externalFile)
	out, err := p.try(t, "up", "-d")
	if err == nil || !strings.Contains(out, "outside") || !strings.Contains(out, "could not be found") && !strings.Contains(out, "not found") {
		t.Errorf("without the volume: %v\n%s", err, out)
	}
	a.Run(t, "volume", "create", "-d", "flocker", "outside")
	p.run(t, "up", "-d")
	p.run(t, "exec", "-T", "app", "touch", "/data/f")
	p.run(t, "down", "-v")
	if got := sh(t, a, "outside", "ls /data"); got != "f" {
		t.Errorf("after down -v the external volume has %q, want %q", got, "f")
	}
	a.Run(t, "volume", "rm", "outside")
}
