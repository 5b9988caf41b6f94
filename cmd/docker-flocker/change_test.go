package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

func TestChanges(t *testing.T) {
	f := &fake{}
	socket := serve(t, f)
	for _, test := range []struct {
		args, calls string
		want        result
	}{
		{"create db", "create db map[] map[] by anna@b", result{0, "db\n", ""}},
		{
			"create db -o size=20G --opt fs=xfs --label team=blue --label a=b=c --to beta",
			"create db map[fs:xfs size:20G] map[a:b=c team:blue] by anna@b, move db to beta by anna@b",
			result{0, "db\n", ""},
		},
		{"create db -o help", "create db map[help:] map[] by anna@b", result{0, "db\n", ""}},
		{"rm db logs", "remove db, remove logs", result{0, "db\nlogs\n", ""}},
		{"move db --to beta", "move db to beta by anna@b", result{0, "volume db is to be on host beta: it moves there when nothing uses it elsewhere\n", ""}},
		{"move db --nowhere", "move db to  by anna@b", result{0, "volume db is to be on no host: it is let go when nothing uses it\n", ""}},
		{"node cordon a", "cordon a by anna@b: true", result{0, "host a gets no more volumes\n", ""}},
		{"node uncordon a", "cordon a by anna@b: false", result{0, "host a can get volumes again\n", ""}},
		{"node drain a", "drain a by anna@b", result{0, "host a gets no more volumes, until docker flocker node uncordon a\nnothing is left there\n", ""}},
		{"node drain a --format json", "drain a by anna@b", result{0, `{"released":[],"moving":[],"busy":[]}` + "\n", ""}},
		{"node rm a", "remove node a by anna@b", result{0, "host a is removed\n", ""}},

		{"create", "", result{2, "", "it takes one argument, NAME\nSee 'docker flocker create --help'.\n"}},
		{"create db -o size", "", result{2, "", "--opt takes KEY=VALUE, each key once, and \"size\" is not that\nSee 'docker flocker create --help'.\n"}},
		{"create db --label a=b --label a=c", "", result{2, "", "--label takes KEY=VALUE, each key once, and \"a=c\" is not that\nSee 'docker flocker create --help'.\n"}},
		{"rm", "", result{2, "", "it takes at least one argument, NAME\nSee 'docker flocker rm --help'.\n"}},
		{"move db", "", result{2, "", "it takes either --to HOST or --nowhere\nSee 'docker flocker move --help'.\n"}},
		{"move db --to a --nowhere", "", result{2, "", "it takes either --to HOST or --nowhere\nSee 'docker flocker move --help'.\n"}},
		{"move db --to a --timeout 5s", "", result{2, "", "--timeout goes together with --wait\nSee 'docker flocker move --help'.\n"}},
		{"move db --to a --wait --timeout 0s", "", result{2, "", "--timeout is a time such as 30s, and 0s is none\nSee 'docker flocker move --help'.\n"}},
	} {
		f.set(nil)
		want(t, test.args, command(t, socket, "", strings.Fields(test.args)...), test.want)
		if calls, _ := f.seen(); calls != test.calls {
			t.Errorf("%s: asked to %s, want %s", test.args, calls, test.calls)
		}
	}
	f.set(&ownership.BusyError{Volume: "db", Reply: ownership.Reply{Host: "a", Containers: []string{"web"}}})
	for _, args := range []string{"create db", "rm db", "move db --to a", "node cordon a", "node uncordon a", "node drain a", "node drain a --wait", "node rm a"} {
		want(t, args, command(t, socket, "", strings.Fields(args)...), result{1, "", "volume db is in use on host a by container web\n"})
	}
	want(t, "rm of two", command(t, socket, "", "rm", "db", "www"), result{1, "", strings.Repeat("volume db is in use on host a by container web\n", 2)})
}

// seen is a command on a terminal, of which somebody reads what is printed meanwhile.
func seen(t *testing.T, socket string, args ...string) result {
	t.Helper()
	var out, errout bytes.Buffer
	c := &cli{out: &out, errout: &errout, by: "anna@b", name: "docker flocker", socket: socket, watched: true}
	return result{c.run(t.Context(), args), out.String(), errout.String()}
}

func TestMoveWaits(t *testing.T) {
	between = time.Millisecond
	defer func() { between = time.Second }()
	states := func(all ...map[string]any) func(string) driver.Volume {
		return func(name string) driver.Volume {
			now := all[0]
			if len(all) > 1 {
				all = all[1:]
			}
			return driver.Volume{Name: name, Status: now}
		}
	}
	busy := map[string]any{"state": "mounted", "owner": "alpha", "containers": []string{"web", "db"}}
	idle := map[string]any{"state": "mounted", "owner": "alpha"}
	free := map[string]any{"state": "free"}
	f := &fake{}
	socket := serve(t, f)

	f.got = states(busy, busy, idle, free, map[string]any{"state": "owned", "owner": "beta"})
	want(t, "to another host", seen(t, socket, "move", "db", "--to", "beta", "--wait"), result{
		0, "volume db is on host beta\n",
		"it is mounted, host alpha, in use by web, db\nit is mounted, host alpha\nit is free\n",
	})
	f.got = states(free, map[string]any{"state": "owned", "owner": "alpha"}, map[string]any{"state": "attached", "owner": "alpha", "placement_error": "the disk is slow"}, idle)
	want(t, "to this host", seen(t, socket, "move", "db", "--to", "alpha", "--wait"), result{
		0, "volume db is on host alpha\n",
		"it is free\nit is owned, host alpha\nit is attached, host alpha: the disk is slow\n",
	})
	f.got = states(idle, free)
	want(t, "to nowhere", command(t, socket, "", "move", "db", "--nowhere", "--wait"), result{0, "volume db is on no host\n", ""})
	f.got = states(busy)
	want(t, "in use for too long", command(t, socket, "", "move", "db", "--to", "beta", "--wait", "--timeout", "300ms"), result{
		1, "",
		"volume db is not on host beta after 300ms: it is mounted, host alpha, in use by web, db; it moves there when nothing uses it elsewhere, and docker flocker inspect db shows it\n",
	})
}

func TestDrain(t *testing.T) {
	between = time.Millisecond
	defer func() { between = time.Second }()
	busy := driver.Drained{Released: []string{"a"}, Moving: []string{"b"}, Busy: []driver.BusyVolume{{Name: "c", Containers: []string{"web"}}, {Name: "d", Detail: "a lease keeps it"}}}
	f := &fake{drained: []driver.Drained{busy}}
	socket := serve(t, f)
	const head = "host alpha gets no more volumes, until docker flocker node uncordon alpha\n"
	const left = head + "let go: a\nbeing let go: b\nbusy: c, by web\nbusy: d (a lease keeps it)\n"
	want(t, "drain", command(t, socket, "", "node", "drain", "alpha"), result{3, left, ""})
	want(t, "drain for too long", seen(t, socket, "node", "drain", "alpha", "--wait", "--timeout", "300ms"), result{3, left, "3 left: b, c, d\n"})
	// Another plugin: a request of before may still be on its way.
	f = &fake{drained: []driver.Drained{busy, {Released: []string{"b"}, Busy: busy.Busy[:1]}, {Released: []string{"c"}}}}
	want(t, "drain to the end", seen(t, serve(t, f), "node", "drain", "alpha", "--wait"), result{0, head + "let go: a, b, c\nnothing is left there\n", "1 left: c\n"})
}

// An etcd that is away for a moment ends no waiting; anything else does.
func TestWaitingGoesOn(t *testing.T) {
	between = time.Millisecond
	defer func() { between = time.Second }()
	f := &fake{drained: []driver.Drained{{Moving: []string{"b"}}}}
	socket := serve(t, f)
	go func() {
		for calls := ""; !strings.Contains(calls, ", "); calls, _ = f.seen() {
			time.Sleep(time.Millisecond)
		}
		f.set(fmt.Errorf("%w: etcd is away", ownership.ErrUnavailable))
		time.Sleep(50 * time.Millisecond)
		f.set(errors.New("no such thing"))
	}()
	got := seen(t, socket, "node", "drain", "alpha", "--wait", "--timeout", "1m")
	want(t, "drain", got, result{1, "", "1 left: b\nownership cannot be checked: etcd is away\nno such thing\n"})
}

// What docs/cli.md shows of commands that change something is what is printed.
func TestChangeDocs(t *testing.T) {
	for heading, code := range map[string]int{
		"docker flocker create": 0, "docker flocker rm": 0, "docker flocker move": 0,
		"docker flocker node cordon, drain, uncordon": 3, "docker flocker node rm": 0,
	} {
		for _, e := range documented(t, heading) {
			f := documentedCluster()
			f.drained = []driver.Drained{{Released: []string{"logs", "scratch"}, Busy: []driver.BusyVolume{{Name: "db", Containers: []string{"postgres"}}}}}
			if e.args[1] != "drain" {
				code = 0
			}
			want(t, strings.Join(e.args, " "), command(t, serve(t, f), "", e.args...), result{code, e.out, ""})
			for line := range strings.Lines(e.out) {
				if n := utf8.RuneCountInString(line); n > columns+1 {
					t.Errorf("%s: %d columns: %s", e.args, n, line)
				}
			}
		}
	}
}

func TestFlockerctlChanges(t *testing.T) {
	f := documentedCluster()
	f.nodes[1].ID = "1a8ffff0-0000-4000-8000-000000000000"
	socket := serve(t, f)
	for _, test := range []struct {
		args, calls string
		want        result
	}{
		{
			"create -n 1a8a -m name=new,team=blue,clusterhq:flocker:profile=gold -s 50Gb",
			"create new map[profile:gold size:50Gb] map[team:blue] by anna@b, move new to 1a8a6d0e-6a53-4f5c-b0a1-0f2f7f0f6f3e by anna@b",
			result{0, "made dataset ID, to be on alpha; flockerctl list shows when it is\n", ""},
		},
		{"destroy -d 64C1", "remove logs", result{0, "removed dataset 64c1f9d2, name=logs\n", ""}},
		{"move -d 0b9e -t 1a8f", "move db to 1a8ffff0-0000-4000-8000-000000000000 by anna@b", result{0, "dataset 0b9e6a1c is to be on beta: it moves when nothing uses it; flockerctl list shows when it has\n", ""}},
		{"move -d 0b9e -t 1a8", "", result{1, "", "1a8 is ambiguous node\n"}},
		{"move -d 9 -t 1a8a", "", result{1, "", "no dataset uuids matching 9\n"}},
		{"create -n 77", "", result{1, "", "no node uuids matching 77\n"}},
		{"create", "", result{2, "", "--node is missing\nSee 'flockerctl create --help'.\n"}},
		{"create -n 1 -m name", "", result{2, "", "--metadata takes KEY=VALUE, each key once, and \"name\" is not that\nSee 'flockerctl create --help'.\n"}},
		{"destroy", "", result{2, "", "--dataset is missing\nSee 'flockerctl destroy --help'.\n"}},
		{"move -d 0b9e", "", result{2, "", "both --dataset and --destination are needed\nSee 'flockerctl move --help'.\n"}},
	} {
		f.set(nil)
		got := ctl(t, socket, strings.Fields(test.args)...)
		if id, ok := strings.CutPrefix(got.out, "made dataset "); ok {
			got.out = "made dataset ID" + id[8:]
		}
		want(t, test.args, got, test.want)
		if calls, _ := f.seen(); calls != test.calls {
			t.Errorf("%s: asked to %s, want %s", test.args, calls, test.calls)
		}
	}
	f.set(nil)
	ctl(t, socket, "create", "-n", "1a8a")
	if calls, _ := f.seen(); !uuid.MatchString("/"+strings.Fields(calls)[1]) || strings.Fields(calls)[1][14] != '4' {
		t.Errorf("without a name it is called by its id: %s", calls)
	}
	f.set(errors.New("in use"))
	want(t, "destroy", ctl(t, socket, "destroy", "-d", "0b"), result{1, "", "in use\n"})
}
