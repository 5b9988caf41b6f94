//go:build e2e

package e2e_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestDoctor types docker flocker doctor on a host with the managed plugin: it sees what
// the plugin has mounted where the host sees it, and what is left over there.
func TestDoctor(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		c := newCluster(t, rig.Config{Hosts: 1, Engine: engine}, nil)
		h := c.Hosts[0]
		h.Run(t, "run", "-d", "--name", "holder", "--mount", on("db"), "busybox", "sleep", "600")
		command, err := filepath.Abs("../build/docker-flocker")
		if err != nil {
			t.Fatal(err)
		}
		doctor := func() string {
			t.Helper()
			// It ends with 1 where this machine's clock is kept by nobody.
			out, _ := h.Exec(t.Context(), "sh", "-c", command+" doctor || :")
			return out
		}
		eventually(t, "doctor finds nothing but the clock", func() bool {
			out := doctor()
			return regexp.MustCompile(`^kernel +well\nclock +\w+\nplugin +well\ntools +well\ncertificates +well\netcd +well\nstorage +well\nmounts +well\nleaks +well`).MatchString(out)
		})
		t.Log(doctor())

		file := filepath.Join(t.TempDir(), "b.tar.gz")
		if out, err := h.Exec(t.Context(), command, "support-bundle", "-o", file); err != nil || !strings.HasPrefix(out, "made "+file+", of ") {
			t.Errorf("support-bundle: %s %v", out, err)
		}
		if info, err := os.Stat(file); err != nil || info.Size() < 1000 {
			t.Errorf("support-bundle: %v %v", info, err)
		}
		settings, err := h.Exec(t.Context(), "sh", "-c", "tar -xzOf "+file+" b/settings.txt b/failed.txt || :")
		if err != nil || !strings.Contains(settings, "FLOCKER_DEFAULT_SIZE=64M\n") {
			t.Errorf("settings: %s %v", settings, err)
		}

		// Something is mounted below the plugin's directory that is no volume.
		at, err := h.Exec(t.Context(), "sh", "-c", `d=$(echo /var/lib/docker/plugins/*/propagated-mount); mkdir $d/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55 && mount -t tmpfs none $d/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55 && echo $d/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55`)
		if err != nil {
			t.Fatal(err)
		}
		at = strings.TrimSpace(at)
		eventually(t, "doctor finds a mount of nobody's", func() bool {
			return strings.Contains(strings.Join(strings.Fields(doctor()), " "), "* leaks: /flocker/mnt/0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55 is mounted in the plugin, and no volume accounts for it")
		})
		if _, err := h.Exec(t.Context(), "sh", "-c", "umount "+at+" && rmdir "+at); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		h.Run(t, "rm", "-f", "holder")
		h.Run(t, "volume", "rm", "db")
	})
}
