//go:build e2e

package e2e_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestPropagation takes away the directory that Docker shares with the plugin, as a
// dockerd does that cleans up late after a crash. The plugin gets it back by itself,
// and what runs goes on.
func TestPropagation(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		t.Parallel() // they mostly wait
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, contested)
		one := c.Hosts[0]
		w := work(t, one, "kept", "kept")

		t.Run("and a container starts", func(t *testing.T) {
			before := c.cutOff(t, one)
			within(t, 30*time.Second, "a container gets a volume", func() error {
				out, err := one.Docker(t.Context(), volumeRun("", "new", "--rm", "busybox", "sh", "-c", "echo seen >/data/f; cat /data/f")...)
				if err == nil && out != "seen" {
					t.Errorf("the container reads %q", out)
				}
				if err != nil && strings.Contains(err.Error(), "no such file or directory") {
					t.Fatalf("not what the plugin should say: %v", err)
				}
				return err
			})
			if now, err := one.PluginPID(); err != nil || now == before {
				t.Errorf("the plugin was process %d and is %d, %v, when Docker had unmounted its directory", before, now, err)
			}
			w.wantWriting(t)
		})
		t.Run("and nobody asks", func(t *testing.T) {
			before := c.cutOff(t, one)
			within(t, time.Minute, "the plugin starts again", func() error {
				now, err := one.PluginPID()
				if err == nil && now == before {
					err = fmt.Errorf("it is process %d still", now)
				}
				return err
			})
			if got := sh(t, one, "new", "cat /data/f"); got != "seen" {
				t.Errorf("the container reads %q", got)
			}
			w.wantWriting(t)
		})
		w.wantInUse(t, c.Hosts[1])
		one.Run(t, "stop", w.name)
		c.wantMoves(t, w, c.Hosts[1], 0)
		w.remove(t)
		one.Run(t, "volume", "rm", "new")
		c.wantClean(t)
		c.wantIdle(t)
	})
}

// cutOff does what Docker's clean-up does between two steps of the start of a plugin:
// the volumes are unmounted everywhere but in containers, and the plugin's process,
// whose number it returns, has a directory that is shared with nobody.
func (c *cluster) cutOff(t *testing.T, h *rig.Host) (pid int) {
	t.Helper()
	pid, err := h.PluginPID()
	if err != nil {
		t.Fatal(err)
	}
	const unmount = "cd /var/lib/docker/plugins/*/ && cut -d' ' -f5 /proc/self/mountinfo | grep $PWD/propagated-mount/ | sort -u | xargs -r umount -l"
	if _, err := h.Exec(t.Context(), "sh", "-ec", unmount); err != nil {
		t.Fatal(err)
	}
	const alone = "mount --make-private /flocker/mnt && mount --make-shared /flocker/mnt"
	if out, err := exec.CommandContext(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-m", "sh", "-ec", alone).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := h.Exec(t.Context(), "sh", "-c", "umount -l /var/lib/docker/plugins/*/propagated-mount"); err != nil {
		t.Fatal(err)
	}
	return pid
}
