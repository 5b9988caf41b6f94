package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

func TestCompletion(t *testing.T) {
	socket := serve(t, documentedCluster())
	for typed, want := range map[string]string{
		"inspect ":                          "db\tmounted\nlogs\towner not responding\nscratch\tfree\nwww\tquarantined\n:4\n",
		"inspect s":                         "scratch\tfree\n:4\n",
		"inspect db www ":                   "logs\towner not responding\nscratch\tfree\n:4\n",
		"volume reinstate ":                 "www\tquarantined\n:4\n",
		"volume reinstate www ":             ":4\n",
		"node confirm-dead ":                "alpha\tlive\nbeta\tsilent 34s\n:4\n",
		"rm db ":                            "logs\towner not responding\nscratch\tfree\nwww\tquarantined\n:4\n",
		"move db --to ":                     "alpha\tlive\n:4\n",
		"node rm ":                          "beta\tsilent 34s\ngamma\tdeclared dead\n:4\n",
		"node uncordon ":                    ":4\n",
		"ls ":                               ":4\n",
		"ls --format ":                      "json\tall there is, an object a line\ntable\tfollowed by a template: with headings\n:4\n",
		"ls --no":                           "--no-trunc\tshorten nothing, however wide the table is\n:4\n",
		"cluster accept-restore --confirm ": "restored\n:4\n",
		"ca user --dir ":                    ":16\n",
		"ca node ":                          ":4\n",
		"--socket ":                         ":0\n",
		"support-bundle -o ":                ":0\n",
		"completion ":                       "bash\nfish\nzsh\n:4\n",
		"node co":                           "confirm-dead\tSay that a host is dead, so that others can mount its volumes\ncordon\tGive a host no more volumes\n:4\n",
	} {
		args := append([]string{"__complete"}, strings.Split(typed, " ")...)
		if got := command(t, socket, "", args...); got.code != 0 || got.out != want {
			t.Errorf("%s: %d, got\n%s\nwant\n%s", typed, got.code, got.out, want)
		}
	}
	if got := command(t, socket, "", "__completeNoDesc", "inspect", "w"); got.out != "www\n:4\n" {
		t.Errorf("without descriptions: %q", got.out)
	}
	// No plugin: no names, and no error in the shell's line.
	if got := command(t, "/nonexistent", "", "__complete", "inspect", ""); got.code != 0 || got.out != ":4\n" {
		t.Errorf("without a plugin: %+v", got)
	}
	f := documentedCluster()
	f.away = ownership.ErrUnavailable
	if got := command(t, serve(t, f), "", "__complete", "node", "confirm-dead", ""); got.code != 0 || got.out != ":4\n" {
		t.Errorf("without etcd: %+v", got)
	}
}

// The scripts are for a shell, and say what they complete.
func TestCompletionScripts(t *testing.T) {
	for shell, has := range map[string]string{"bash": "complete -o default -F __start_docker-flocker docker-flocker", "zsh": "#compdef docker-flocker", "fish": "complete -c docker-flocker"} {
		got := command(t, "/nonexistent", "", "completion", shell)
		if got.code != 0 || !strings.Contains(got.out, has) {
			t.Errorf("%s: %d %s", shell, got.code, got.errout)
		}
		if path, err := exec.LookPath(shell); err == nil {
			check := exec.CommandContext(t.Context(), path, "-n")
			check.Stdin = strings.NewReader(got.out)
			if said, err := check.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", shell, err, said)
			}
		}
	}
	for _, args := range [][]string{{"completion"}, {"completion", "tcsh"}, {"completion", "bash", "zsh"}} {
		want(t, strings.Join(args, " "), command(t, "/nonexistent", "", args...), result{2, "", "it takes the name of a shell: bash, fish, zsh\nSee 'docker flocker completion --help'.\n"})
	}
}

// Docker's own script calls a plugin with the whole line, and nothing in the environment.
func TestCompletedByDocker(t *testing.T) {
	for line, want := range map[string]bool{
		"__completeNoDesc flocker ls ": true, "__complete --debug -H flocker flocker ls": true, "__complete flocker inspect flocker": true,
		"__complete inspect flocker ": false, "__complete -H flocker inspect x": false, "flocker ls": false, "": false, "__complete ": false,
	} {
		if got := completedByDocker(strings.Split(line, " ")); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "__completeNoDesc", "--debug", "flocker", "inspect", "s")
	cmd.Env = []string{"RUN_CLI=1", "GORACE=atexit_sleep_ms=0", "FLOCKER_CONTROL=" + serve(t, documentedCluster())}
	if out, err := cmd.Output(); err != nil || string(out) != "scratch\n:4\n" {
		t.Errorf("got %q, %v", out, err)
	}
}
