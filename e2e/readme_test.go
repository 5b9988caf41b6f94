//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestReadme types what the README prints for one host, where an etcd runs inside
// the plugin, and then takes the plugin off and puts it on again.
func TestReadme(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		r := rig.New(t, rig.Config{Engine: engine})
		h := r.Hosts[0]
		if err := r.ImportImage(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := h.InstallPlugin(t.Context(), nil); err != nil {
			t.Fatal(err)
		}

		lines := readmeLines(t, "## Use it on one host")
		if len(lines) != 2 {
			t.Fatalf("the README has the lines %q, want two", lines)
		}
		create, run := lines[0], lines[1]
		if got := typed(t, h, create); got != "db" {
			t.Errorf("%s\nprints %q, want %q", create, got, "db")
		}
		for n := 1; n <= 2; n++ {
			if got := typed(t, h, run); len(strings.Split(got, "\n")) != n {
				t.Errorf("time %d: %s\nprints %q, want %d lines", n, run, got, n)
			}
		}
		if s := status(t, h, "db"); s["size"] != "1GiB" || s["state"] != "free" {
			t.Errorf("volume inspect: %v, want a free one of 1GiB", s)
		}

		t.Run("Docker is restarted", func(t *testing.T) {
			if err := h.StopDockerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := h.StartDockerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := typed(t, h, run); len(strings.Split(got, "\n")) != 3 {
				t.Errorf("%q, want 3 lines", got)
			}
		})
		t.Run("the plugin is removed and installed", func(t *testing.T) {
			id := status(t, h, "db")["id"]
			refused(t, h, "is in use", "plugin", "disable", "flocker")
			h.Run(t, "plugin", "disable", "-f", "flocker")
			h.Run(t, "plugin", "rm", "-f", "flocker") // or else it is in use by its volumes
			if err := h.InstallPlugin(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			if got := status(t, h, "db")["id"]; got != id {
				t.Errorf("the volume is %v now, it was %v", got, id)
			}
			if got := typed(t, h, run); len(strings.Split(got, "\n")) != 4 {
				t.Errorf("%q, want 4 lines", got)
			}
		})
		for _, composer := range composers {
			t.Run("compose "+composer.name, func(t *testing.T) { testReadmeCompose(t, h, composer.command) })
		}
		t.Run("an unused plugin can be disabled", func(t *testing.T) {
			h.Run(t, "volume", "rm", "db")
			h.Run(t, "plugin", "disable", "flocker")
			h.Run(t, "plugin", "rm", "flocker")
		})
		t.Run("mounts of the plugin in any order", func(t *testing.T) { testMountOrder(t, r) })
		if loops, err := r.Loops(); err != nil || len(loops) > 0 {
			t.Errorf("loop devices left: %q, %v", loops, err)
		}
	})
}

// readme returns the code blocks of a section of the README.
func readme(t *testing.T, section string) []string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(text), "\n"+section+"\n")
	if !found {
		t.Fatalf("the README has no %q", section)
	}
	after, _, _ = strings.Cut(after, "\n## ")
	var blocks []string
	for i, block := range strings.Split(after, "\n```") {
		if i%2 == 1 {
			_, code, _ := strings.Cut(block, "\n") // after the language
			blocks = append(blocks, code)
		}
	}
	return blocks
}

// readmeLines returns the docker commands of a section's first block.
func readmeLines(t *testing.T, section string) []string {
	t.Helper()
	return slices.DeleteFunc(strings.Split(readme(t, section)[0], "\n"), func(l string) bool { return !strings.HasPrefix(l, "docker ") })
}

// typed runs a line in a shell and returns what it printed.
func typed(t *testing.T, h *rig.Host, line string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := h.Command(ctx, "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v: %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// testReadmeCompose uses the README's compose file, with an image of that name
// that does as little as is needed.
func testReadmeCompose(t *testing.T, h *rig.Host, command []string) {
	file := readme(t, "### Compose")[0]
	if !strings.Contains(file, "image: postgres\n") || !strings.Contains(file, `"data:/var/lib/postgresql/data"`) {
		t.Fatalf("the README's compose file is another one:\n%s", file)
	}
	h.Run(t, "run", "--name", "maker", "busybox", "mkdir", "-p", "/var/lib/postgresql/data")
	h.Run(t, "commit", "--change", `CMD ["sh", "-c", "echo up >>/var/lib/postgresql/data/log; trap exit TERM; sleep 1000 & wait"]`, "maker", "postgres")
	h.Run(t, "rm", "maker")
	p := newProject(t, h, command, "app", file)
	wantLog := func(want string) {
		t.Helper()
		eventually(t, "the service has written "+want, func() bool {
			out, err := p.try(t, "exec", "-T", "db", "cat", "/var/lib/postgresql/data/log")
			return err == nil && strings.ReplaceAll(out, "\n", " ") == want
		})
	}
	p.run(t, "up", "-d")
	p.run(t, "up", "-d")
	wantLog("up")
	p.run(t, "down")
	p.run(t, "up", "-d")
	wantLog("up up")
	if s := status(t, h, "app_data"); s["size"] != "5GiB" {
		t.Errorf("volume inspect: %v, want the size of the README", s)
	}
	p.run(t, "down", "-v")
	if got := volumes(t, h); !slices.Equal(got, []string{"db"}) {
		t.Errorf("after down -v: %q, want only db", got)
	}
	h.Run(t, "rmi", "postgres")
}

// testMountOrder enables the plugin with the mounts of its config.json in other
// orders: Docker once mounted one over the other.
func testMountOrder(t *testing.T, r *rig.Rig) {
	h := r.Hosts[0]
	from := filepath.Join(r.Dir, "plugin") // where the rig has prepared it
	data, err := os.ReadFile(filepath.Join(from, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	for turn := 1; turn <= 2; turn++ {
		var config map[string]any
		if err := json.Unmarshal(data, &config); err != nil {
			t.Fatal(err)
		}
		mounts := config["mounts"].([]any)
		slices.Reverse(mounts[turn-1:])
		changed, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("turned%d", turn)
		dir := filepath.Join(r.Dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "-al", filepath.Join(from, "rootfs"), dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := os.WriteFile(filepath.Join(dir, "config.json"), changed, 0o644); err != nil {
			t.Fatal(err)
		}
		h.Run(t, "plugin", "create", name, dir)
		h.Run(t, "plugin", "enable", name)
		got := h.Run(t, "run", "--rm", "--mount", "type=volume,volume-driver="+name+",src=turned,dst=/data,volume-opt=size=16M", "busybox", "sh", "-c", "echo works >/data/f; cat /data/f")
		if got != "works" {
			t.Errorf("with the mounts %v: %q", mounts, got)
		}
		h.Run(t, "volume", "rm", "turned")
		h.Run(t, "plugin", "disable", name)
		h.Run(t, "plugin", "rm", name)
	}
}
