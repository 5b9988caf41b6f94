package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// ctl runs flockerctl.
func ctl(t *testing.T, socket string, args ...string) result {
	t.Helper()
	var out, errout bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &out, errout: &errout, by: "anna@b", name: original, socket: socket}
	code := c.run(t.Context(), args)
	return result{code, out.String(), errout.String()}
}

func TestFlockerctlDocs(t *testing.T) {
	socket := serve(t, documentedCluster())
	for _, e := range documented(t, "flockerctl") {
		want(t, strings.Join(e.args, " "), ctl(t, socket, e.args...), result{0, e.out, ""})
		for line := range strings.Lines(e.out) {
			if n := cells(line); n > columns+1 {
				t.Errorf("%s: %d columns: %s", e.args, n, line)
			}
		}
	}
}

func TestFlockerctl(t *testing.T) {
	version = "v0.1.0"
	defer func() { version = "development" }()
	f := documentedCluster()
	f.volumes[1].Status["state"], f.volumes[2].Status["state"] = "creating", "deleting"
	socket := serve(t, f)
	const usage = "See 'flockerctl list --help'.\n"
	for _, test := range []struct {
		args string
		want result
	}{
		{"version", result{0, "flockerctl version v0.1.0\n", ""}},
		{"status -l", result{0, "SERVER                                 ADDRESS\n1a8a6d0e-6a53-4f5c-b0a1-0f2f7f0f6f3e   10.0.0.1\n", ""}},
		{"ls", result{0, "" +
			"DATASET    SIZE          METADATA            STATUS        SERVER\n" +
			"0b9e6a1c   10737418240   name=db,team=blue   attached ✅   1a8a6d0e (10.0.0.1)\n" +
			"64c1f9d2   524288000     name=logs           pending ⌛    5b0c3a52 (10.0.0.2)\n" +
			"a07e33d9   1610612736    name=scratch        deleting      <missing>\n" +
			"d9b4c6e8   2147483648    name=www            quarantined   1a8a6d0e (10.0.0.1)\n", ""}},
		{"list -dlh --control-service 10.0.0.1 --user anna", result{
			0, "" +
				"DATASET                                SIZE     METADATA            STATUS        SERVER\n" +
				"0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55   10.00G   name=db,team=blue   attached ✅   1a8a6d0e-6a53-4f5c-b0a1-0f2f7f0f6f3e (10.0.0.1)\n" +
				"64c1f9d2-0d1b-4b0e-9a3f-0b6d2f1c7a11   0.49G    name=logs           pending ⌛    5b0c3a52-12c7-4a6f-8a43-9a1f5b7e2c11 (10.0.0.2)\n" +
				"a07e33d9-5f7c-4f0b-8c52-9a1d5e3b2f42   1.50G    name=scratch        deleting      <missing>\n" +
				"d9b4c6e8-7a21-4d55-b1f3-2c8e6a0f9b73   2.00G    name=www            quarantined   1a8a6d0e-6a53-4f5c-b0a1-0f2f7f0f6f3e (10.0.0.1)\n",
			"--user is of no use: the plugin of this host is asked\n--control-service is of no use: the plugin of this host is asked\n",
		}},
		{"list x", result{2, "", "it takes no argument, and \"x\" is one\n" + usage}},
		{"frob", result{2, "", "unknown command \"frob\" for \"flockerctl\"\nSee 'flockerctl --help'.\n"}},
	} {
		want(t, test.args, ctl(t, socket, strings.Fields(test.args)...), test.want)
	}
	if got := ctl(t, socket, "list", "--help"); got.code != 0 || !strings.Contains(got.out, "-h, --human") {
		t.Errorf("help: %+v", got)
	}
	gone := result{1, "", "no Flocker plugin answers on /nonexistent: is it enabled on this host? (docker plugin ls)\n"}
	want(t, "list", ctl(t, "/nonexistent", "list"), gone)
	want(t, "list-nodes", ctl(t, "/nonexistent", "list-nodes"), gone)
	away := &fake{away: ownership.ErrUnavailable}
	want(t, "etcd away", ctl(t, serve(t, away), "list"), result{1, "", "ownership cannot be checked\n"})

	// By that name, it is that command.
	link := filepath.Join(t.TempDir(), "flockerctl")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), link, "list-nodes")
	cmd.Env = []string{"RUN_CLI=1", "GORACE=atexit_sleep_ms=0", "FLOCKER_CONTROL=" + socket}
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "SERVER     ADDRESS\n1a8a6d0e   10.0.0.1\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if got := ctl(t, socket, "completion", "bash"); got.code != 0 || !strings.Contains(got.out, "__start_flockerctl flockerctl") {
		t.Errorf("completion: %d %s", got.code, got.errout)
	}
}
