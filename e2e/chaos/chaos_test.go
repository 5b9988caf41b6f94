package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestDoubleMount does what the plugin has to prevent: a filesystem is mounted
// twice, as by two hosts, and written to at the same time. Every check must find it.
func TestDoubleMount(t *testing.T) {
	rig.Require(t, "root")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"witness", "first", "second", "old"} {
		if err := os.Mkdir(path(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := buildWriter(t.Context(), path("writer")); err != nil {
		t.Fatal(err)
	}
	command := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
	}
	// What a writer makes in the course of time.
	for n := range history.Leaves {
		if err := os.WriteFile(path(fmt.Sprintf("old/leaf%d", n)), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command("truncate", "-s", "64M", path("img"))
	command("mkfs.ext4", "-q", "-d", path("old"), path("img"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	write := func(dir, node string) error {
		return intrude(ctx, 4*time.Second, path("img"), path(dir), path("writer"), "-volume", "db", "-node", node, "-witness", path("witness"), "-every", "20ms")
	}
	// An owner by the book leaves a clean filesystem and complete records.
	if err := write("first", "host1"); err != nil {
		t.Fatal(err)
	}
	if text := damaged(ctx, "ext4", path("img")); text != "" {
		t.Fatal(text)
	}
	if verified, found := checkImage(t, path("img"), path("witness")); len(found) > 0 || verified == 0 {
		t.Fatalf("after one writer %d records are verified, and found is %v", verified, found)
	}

	errs := make(chan error, 2)
	go func() { errs <- write("first", "host2") }()
	go func() { errs <- write("second", "host3") }()
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if text := damaged(ctx, "ext4", path("img")); text == "" {
		t.Error("e2fsck finds nothing")
	} else {
		t.Log(text)
	}
	_, found := checkImage(t, path("img"), path("witness"))
	for _, check := range []string{"intervals", "ownership", "data"} {
		if !slices.ContainsFunc(found, func(v history.Violation) bool { return v.Check == check }) {
			t.Errorf("the check %q finds nothing", check)
		}
	}
	for _, v := range found {
		t.Log(v)
	}
}

// checkImage reads the log from the image of volume db and runs the checks; host1 owns
// it all the time.
func checkImage(t *testing.T, image, witnessDir string) (verified int, found []history.Violation) {
	t.Helper()
	w := witness{dir: witnessDir, files: map[string]*witnessFile{}}
	all, err := w.incarnations()
	if err != nil {
		t.Fatal(err)
	}
	var log history.Log
	// That it cannot be read is no better than that nothing is there.
	copied := filepath.Join(t.TempDir(), "log")
	_ = exec.Command("debugfs", "-R", "dump /log "+copied, image).Run()
	if f, err := os.Open(copied); err == nil {
		log, _ = history.ScanLog("db", f)
		_ = f.Close()
	}
	verified, found = history.Data("db", log, all)
	owner := []history.Change{{Volume: "db", Token: 1, Node: "host1"}}
	return verified, slices.Concat(history.Overlaps(all, owner), history.Unowned(all, owner), found)
}

// A seed is a plan, and another seed another one.
func TestPlan(t *testing.T) {
	steps := func(seed uint64) string {
		p, err := newPlan(seed, nil, true)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		names := map[string]bool{}
		for range 1000 {
			s := p.next()
			names[s.name] = true
			if s.hold < s.least || s.hold > s.most {
				t.Errorf("%s for %v", s.name, s.hold)
			}
			fmt.Fprintln(&b, s.name, s.pick, s.hold, s.overlaps, s.settles, s.rest)
		}
		if len(names) != len(faults) {
			t.Errorf("of %d faults 1000 steps have %d", len(faults), len(names))
		}
		return b.String()
	}
	first := steps(1)
	if again := steps(1); again != first {
		t.Error("one seed gives two plans")
	}
	if steps(2) == first {
		t.Error("two seeds give one plan")
	}
	if _, err := newPlan(1, []string{"flood"}, false); err == nil || err.Error() != `there is no fault "flood"; -list shows them` {
		t.Errorf("a fault that does not exist gives %v", err)
	}
	if p, err := newPlan(1, []string{"host killed"}, false); err != nil || p.next().name != "host killed" {
		t.Errorf("a plan of one fault: %v, %v", p, err)
	}
}

func TestChangesFrom(t *testing.T) {
	boot := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	put := func(revision int64, key, value string) event {
		var e event
		e.KV.Key, e.KV.Value, e.KV.ModRevision = []byte(prefix+key), []byte(value), revision
		return e
	}
	got, err := changesFrom([]event{
		put(2, "vol/v1", `{"name":"db"}`),
		put(3, "own/v1", `{"host":"host1"}`),
		put(3, "ev/1/n/1", `{"at":"2026-01-02T03:00:05Z","what":"claim"}`),
		put(4, "live/n", `{"host":"host1"}`),
		put(5, "own/v1", `{"host":"host2","pending":{"node":"n"}}`),
		put(6, "own/v1", `{"host":"host2"}`),
		put(6, "ev/1/n/2", `{"at":"2026-01-02T03:00:09Z"}`),
		put(7, "own/v1", ``),
		put(7, "ev/1/n/3", `{"at":"2026-01-02T03:00:10Z"}`),
		put(8, "own/v1", `{"host":"host1"}`),
		put(9, "own/v2", `{"host":"host3"}`),
	}, boot)
	if err != nil {
		t.Fatal(err)
	}
	want := []history.Change{
		{Volume: "db", Token: 3, At: 5 * time.Second, Node: "host1"},
		{Volume: "db", Token: 5, At: 5 * time.Second, Node: "host2", Pending: true}, // not before
		{Volume: "db", Token: 6, At: 9 * time.Second, Node: "host2", Forced: true},
		{Volume: "db", Token: 7, At: 10 * time.Second},
		{Volume: "db", Token: 8, Node: "host1"},
		{Volume: "v2", Token: 9, Node: "host3"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("changes are\n%+v, want\n%+v", got, want)
	}
}

func TestAttribute(t *testing.T) {
	host1, host2 := &rig.Host{Name: "host1"}, &rig.Host{Name: "host2"}
	at := func(name string, where place, host *rig.Host, volume string, from, to time.Duration) *injected {
		return &injected{fault: &fault{name: name, where: where}, at: from * time.Second, repaired: to * time.Second, host: host, volume: volume}
	}
	faults := []*injected{
		at("killed", onHost, host1, "", 10, 30),
		at("moved", onService, host1, "db", 100, 100),
		at("paused", onHost, host2, "", 101, 110),
		at("etcd", onEtcd, nil, "", 300, 310),
	}
	for _, c := range []struct {
		name       string
		volume     string
		node       string
		begin, end time.Duration
		want       string
		took       time.Duration
	}{
		{"its host", "db", "host1", 10, 25, "killed", 15},
		{"noticed late", "db", "host1", 28, 50, "killed", 22},
		{"too late", "db", "host1", 80, 90, "no fault", 10},
		{"its volume, and not the later fault elsewhere", "db", "host1", 102, 108, "moved", 6},
		{"the later fault's host", "other", "host2", 102, 108, "paused", 6},
		{"neither's, so the last one's", "other", "host1", 102, 108, "paused", 6},
		{"whatever is hit by etcd", "db", "host1", 305, 310, "etcd", 5},
	} {
		o := history.Outage{Volume: c.volume, Node: c.node, Begin: c.begin * time.Second, End: c.end * time.Second}
		got := attribute([]history.Outage{o}, faults)
		if len(got[c.want]) != 1 || got[c.want][0] != c.took*time.Second {
			t.Errorf("%s: %v, want %s after %v s", c.name, got, c.want, int(c.took))
		}
	}
}

func TestTakeovers(t *testing.T) {
	fault := func(host string, at time.Duration) *injected {
		return &injected{fault: &fault{name: "host killed", where: onHost}, host: &rig.Host{Name: host}, at: at * time.Second}
	}
	change := func(volume string, at time.Duration, node string) history.Change {
		return history.Change{Volume: volume, At: at * time.Second, Node: node}
	}
	pending, forced := change("db", 114, "host3"), change("db", 116, "host3")
	pending.Pending, forced.Forced = true, true
	all, fences := takeovers(
		[]history.Change{change("db", 1, "host1"), change("other", 2, "host2"), change("db", 50, "host2"), pending, forced, change("db", 130, "host1")},
		[]*injected{fault("host1", 20), fault("host2", 60), fault("host2", 100), fault("host1", 110), fault("host2", 115)})
	if want := []time.Duration{16 * time.Second}; !slices.Equal(all, want) {
		t.Errorf("takeovers took %v, want %v", all, want)
	}
	if want := []time.Duration{2 * time.Second}; !slices.Equal(fences, want) {
		t.Errorf("fences took %v, want %v", fences, want)
	}
}
