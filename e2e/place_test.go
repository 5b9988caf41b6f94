//go:build e2e

package e2e_test

import (
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// request sends one to the control socket of a host, and returns the answer.
func request(t *testing.T, h *rig.Host, method, path, body string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "curl", "-sS", "--unix-socket", "/var/lib/flocker/control.sock",
		"-X", method, "-d", body, "http://flocker/v1"+path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// TestPlacement has a volume where an operator wants it, with and without containers.
func TestPlacement(t *testing.T) {
	onEachEngine(t, func(t *testing.T, engine rig.Engine) {
		c := newCluster(t, rig.Config{Hosts: 2, Engine: engine}, map[string]string{
			"FLOCKER_NODE_TTL": "4s", "FLOCKER_NODE_RENEW": "1s", "FLOCKER_BUSY_WAIT": "2s",
		})
		first, second := c.Hosts[0], c.Hosts[1]
		const by = `"by":"eve@ops"`
		move := func(from *rig.Host, host string) {
			t.Helper()
			if got := request(t, from, "POST", "/volumes/db/move", `{"host":"`+host+`",`+by+`}`); !strings.HasPrefix(got, `{"volume":"db","host":"`+host+`"`) {
				t.Fatalf("move to %s: %s", host, got)
			}
		}
		placed := func(h *rig.Host) {
			t.Helper()
			eventually(t, "db is kept mounted on "+h.Name, func() bool {
				s := status(t, h, "db")
				return s["state"] == "mounted" && s["placement"] == h.Name && s["mounts"] == 0.0 && s["placement_error"] == nil
			})
		}
		if got := request(t, first, "POST", "/volumes", `{"name":"db","options":{"size":"64M"},`+by+`}`); !strings.Contains(got, `"name":"db"`) {
			t.Fatalf("create: %s", got)
		}
		move(first, "host2")
		placed(second)
		if got := status(t, first, "db")["state"]; got != "owned" {
			t.Errorf("on host1 it is %v", got)
		}

		// A container elsewhere takes it along, and leaves it there.
		sh(t, first, "db", "echo one > /data/note && sync")
		placed(first)

		// A container that runs keeps it, until it ends.
		first.Run(t, "run", "-d", "--name", "holder", "--mount", on("db"), "busybox", "sleep", "600")
		move(second, "host2")
		eventually(t, "host2 says why it has not got it", func() bool {
			why, _ := status(t, second, "db")["placement_error"].(string)
			return why == "volume db is in use on host host1 by container holder; it comes here when that ends"
		})
		first.Run(t, "exec", "holder", "sh", "-c", "echo two >> /data/note && sync")
		first.Run(t, "rm", "-f", "holder")
		placed(second)

		// The plugin is killed, and the host is restarted.
		if err := second.KillPlugin(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the plugin answers again", func() bool {
			_, err := second.Docker(t.Context(), "flocker", "node", "ls")
			return err == nil
		})
		placed(second)
		if err := second.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := second.Boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "host2 has it again", func() bool {
			got, err := second.Docker(t.Context(), "volume", "inspect", "--format", "{{.Status.state}} {{.Status.placement}}", "db")
			return err == nil && strings.TrimSpace(got) == "mounted host2"
		})
		second.Run(t, "run", "-d", "--name", "reader", "--mount", on("db"), "busybox", "sleep", "600")
		if got := second.Run(t, "exec", "reader", "cat", "/data/note"); got != "one\ntwo" {
			t.Errorf("host2 reads %q", got)
		}

		// The host is drained.
		if got, want := request(t, first, "POST", "/nodes/host2/drain", "{"+by+"}"), `{"released":[],"moving":[],"busy":[{"volume":"db","containers":["reader"]}]}`; got != want {
			t.Errorf("drained: %s, want %s", got, want)
		}
		second.Run(t, "rm", "-f", "reader")
		eventually(t, "nothing is left on host2", func() bool {
			return request(t, first, "POST", "/nodes/host2/drain", "{"+by+"}") == `{"released":[],"moving":[],"busy":[]}`
		})
		refused(t, second, "volume db: host host2 is cordoned: docker flocker node uncordon host2, or start the container on another host",
			"run", "--rm", "--mount", on("db"), "busybox", "true")
		request(t, first, "POST", "/nodes/host2/uncordon", "{"+by+"}")
		move(first, "host2")
		placed(second)
		first.Run(t, "volume", "rm", "db")
		c.wantClean(t)
	})
}
