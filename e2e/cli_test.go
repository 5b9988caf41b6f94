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
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, map[string]string{"FLOCKER_NODE_TTL": "4s", "FLOCKER_NODE_RENEW": "1s"})
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
		for h, want := range map[*rig.Host]string{first: "db mounted host1 [holder]", second: "db owned host1 []"} {
			eventually(t, "docker flocker ls on "+h.Name+" says "+want, func() bool {
				return h.Run(t, "flocker", "ls", "--format", "{{.Name}} {{.State}} {{.Host}} {{.Containers}}") == want
			})
		}
		if got := second.Run(t, "flocker", "status", "--format", "{{.Hosts}} {{.Volumes}} {{.Attention}}"); got != "map[live:2] map[owned:1] []" {
			t.Errorf("status: %s", got)
		}

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

		// A host is switched off, and nobody but an operator can tell.
		first.Run(t, "exec", "holder", "sh", "-c", "echo survives | dd of=/data/note conv=fsync 2>/dev/null")
		if err := first.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		states := func(host, want string) func() bool {
			return func() bool { return strings.HasPrefix(strings.Join(ls(second)[host], " "), want) }
		}
		eventually(t, "host1 is silent", states("host1", "silent "))
		if got, err := second.Docker(t.Context(), "flocker", "status"); err == nil || !strings.Contains(got, "\n* host host1 is silent: ") {
			t.Errorf("status says nothing of the silent host: %v\n%s", err, got)
		}
		boot := ids["host1"][2]
		if got, want := second.Run(t, "flocker", "node", "confirm-dead", "host1", "--because", "the test has switched it off"),
			"host host1 (boot "+boot+") is recorded as dead. Its volumes can be mounted on other hosts now: db.\n"; !strings.HasPrefix(got, want) {
			t.Errorf("confirm-dead says %q, want %q", got, want)
		}
		if !states("host1", "declared dead 1 ")() {
			t.Errorf("host1 is not declared dead:\n%s", second.Run(t, "flocker", "node", "ls"))
		}
		if got := sh(t, second, "db", "cat /data/note"); got != "survives" {
			t.Errorf("host2 reads %q, want %q", got, "survives")
		}
		if err := first.Boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "host1 is an ordinary host again", states("host1", "live 0 "))

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
		c.wantClean(t)
		first.Run(t, "plugin", "disable", "--force", "flocker")
		refused(t, first, "no Flocker plugin answers on ", "flocker", "node", "ls")
	})
}
