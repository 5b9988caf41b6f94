//go:build e2e

package e2e_test

import (
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestCLI types docker flocker where an operator does.
func TestCLI(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, nil)
		first, second := c.Hosts[0], c.Hosts[1]
		ls := func(h *rig.Host) map[string][]string {
			t.Helper()
			rows := map[string][]string{}
			for i, line := range strings.Split(h.Run(t, "flocker", "node", "ls"), "\n") {
				fields := strings.Fields(line)
				if header := strings.Join(fields, " "); i == 0 && header != "HOST STATE VOLUMES BOOT ID" {
					t.Errorf("%s: node ls begins with %q", h.Name, header)
				} else if i > 0 {
					rows[fields[0]] = fields[1:]
				}
			}
			return rows
		}
		first.Run(t, "run", "-d", "--name", "holder", "--mount", on("db"), "busybox", "sleep", "600")
		for _, h := range c.Hosts {
			var rows map[string][]string
			eventually(t, "docker flocker node ls on "+h.Name+" shows both hosts", func() bool {
				rows = ls(h)
				return len(rows) == 2 && len(rows["host1"]) == 4 && len(rows["host2"]) == 4
			})
			if got := strings.Join(rows["host1"][:2], " "); got != "live 1" {
				t.Errorf("%s: host1 is %q, want live with one volume", h.Name, got)
			}
			if got := strings.Join(rows["host2"][:2], " "); got != "live 0" {
				t.Errorf("%s: host2 is %q, want live without volumes", h.Name, got)
			}
		}
		ids := ls(first)

		// By name and by id, and from a host's own prompt.
		for _, host := range []string{"host1", ids["host1"][3]} {
			refused(t, second, "host host1 answers (its lease in etcd is valid), so it is not dead: "+
				"stop the containers there, and other hosts can mount their volumes; "+
				"to force it nevertheless: docker flocker node confirm-dead "+host+" --force",
				"flocker", "node", "confirm-dead", host)
		}
		refused(t, second, `there is no host "host9": docker flocker node ls shows those there are`, "flocker", "node", "confirm-dead", "host9")
		refused(t, second, `"host2" is not "host1"`, "flocker", "node", "confirm-dead", "host1", "--force", "--confirm", "host2")
		refused(t, second, "not quarantined", "flocker", "volume", "reinstate", "db")
		refused(t, second, "no such volume", "flocker", "volume", "reinstate", "nonesuch")

		// Nothing of that was done.
		if got := strings.Join(ls(second)["host1"][:2], " "); got != "live 1" {
			t.Errorf("host1 is %q after all was refused", got)
		}

		// The socket is root's, and goes and comes with the plugin.
		socket := "/var/lib/flocker/control.sock"
		if got, err := first.Exec(t.Context(), "stat", "-c", "%a %U %F", socket); err != nil || got != "600 root socket" {
			t.Errorf("%s: %q, %v", socket, got, err)
		}
		if err := first.KillPlugin(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the plugin answers again after it was killed", func() bool {
			_, err := first.Docker(t.Context(), "flocker", "node", "ls")
			return err == nil
		})
		first.Run(t, "rm", "-f", "holder")
		first.Run(t, "volume", "rm", "db")
		first.Run(t, "plugin", "disable", "--force", "flocker")
		refused(t, first, "no Flocker plugin answers on ", "flocker", "node", "ls")
	})
}
