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
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	write := func(dir, node string, long time.Duration) error {
		return intrude(ctx, long, path("img"), path(dir), path("writer"), "-volume", "db", "-node", node, "-witness", path("witness"), "-every", "20ms")
	}
	// An owner by the book leaves a clean filesystem and complete records.
	if err := write("first", "host1", 4*time.Second); err != nil {
		t.Fatal(err)
	}
	if text := damaged(ctx, "ext4", path("img")); text != "" {
		t.Fatal(text)
	}
	if verified, found := checkImage(t, path("img"), path("witness")); len(found) > 0 || verified == 0 {
		t.Fatalf("after one writer %d records are verified, and found is %v", verified, found)
	}

	errs := make(chan error, 2)
	go func() { errs <- write("first", "host2", 8*time.Second) }()
	go func() { errs <- write("second", "host3", 8*time.Second) }()
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

// A seed is a plan for each lane, and another seed others.
func TestPlan(t *testing.T) {
	names := map[string]bool{}
	steps := func(seed uint64) string {
		plans, err := newPlans(seed, nil, true)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, p := range plans {
			for range 300 {
				s := p.next()
				names[s.name] = true
				if s.hold < s.least || s.hold > s.most {
					t.Errorf("%s for %v", s.name, s.hold)
				}
				if s.lane() != p.lane {
					t.Errorf("%s is in lane %d", s.name, p.lane)
				}
				fmt.Fprintln(&b, s.name, s.pick, s.hold, s.rest)
			}
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
	if len(names) != len(faults) {
		t.Errorf("of %d faults there are %d", len(faults), len(names))
	}
	if _, err := newPlans(1, []string{"flood"}, false); err == nil || err.Error() != `there is no fault "flood"; -list shows them` {
		t.Errorf("a fault that does not exist gives %v", err)
	}
	if _, err := newPlans(1, []string{"storage slow"}, false); err == nil || err.Error() != "none of these faults is possible without the test storage" {
		t.Errorf("a fault of a storage that is not there gives %v", err)
	}
	if plans, err := newPlans(1, []string{"host killed"}, false); err != nil || len(plans) != 1 || plans[0].next().name != "host killed" {
		t.Errorf("a plan of one fault: %v, %v", plans, err)
	}
}

// TestAim checks whom a fault may hit beside those that last.
func TestAim(t *testing.T) {
	named := func(name string) *fault {
		n := slices.IndexFunc(faults, func(f *fault) bool { return f.name == name })
		if n < 0 {
			t.Fatalf("there is no fault %q", name)
		}
		return faults[n]
	}
	newRun := func(name string, age time.Duration) *run {
		r := &run{volumes: []*volume{{name: name}}}
		write := history.Incarnation{Volume: name, Node: "host1", Writes: []history.Write{{Seq: 1, At: history.Now() - age}}}
		r.witness = &witness{files: map[string]*witnessFile{"db": {Incarnation: write}}}
		if name == "new" {
			r.witness.files = nil
		}
		for _, name := range []string{"host1", "host2"} {
			r.hosts = append(r.hosts, &rig.Host{Name: name})
		}
		return r
	}
	for _, c := range []struct {
		volume        string
		broken, fault string
		want          string // empty: nobody
	}{
		{"db", "", "host killed", "host1"},
		{"new", "", "host killed", "host1"}, // whoever
		{"db", "plugin paused", "host killed", "host2"},
		{"db", "host killed", "host cut off from etcd", "host2"},
		{"db", "host killed", "plugin killed", "host2"},
		{"db", "host isolated", "plugin killed", "host1"},
		{"db", "host isolated", "plugin paused", "host2"},
		{"db", "host cut off from etcd", "container killed", "db on host1"},
		{"db", "host paused", "container killed", ""},
		{"new", "", "container killed", ""},
		{"old", "", "container killed", ""},
		{"old", "", "host killed", "host1"},
		{"db", "host paused", "service moved", "db on host1"},
		{"db", "service moved", "host paused", "host1"},
		{"new", "", "service moved", "new"},
		{"db", "host killed", "etcd gone", "all members"},
		{"db", "host killed", "storage slow", "all of it"},
	} {
		age := time.Millisecond
		if c.volume == "old" {
			age = time.Minute
		}
		r := newRun(c.volume, age)
		if c.broken != "" {
			r.broken = []*injected{{fault: named(c.broken), host: r.hosts[0]}}
		}
		got := ""
		if i := r.aim(step{fault: named(c.fault)}); i != nil {
			got = i.what
			if len(r.injected) != 1 || r.broken[len(r.broken)-1] != i {
				t.Errorf("%s is not noted", c.fault)
			}
		}
		if got != c.want {
			t.Errorf("volume %s, while there is %q: %s hits %q, want %q", c.volume, c.broken, c.fault, got, c.want)
		}
	}
}

// A host that nothing is written to any more is not worth a fault.
func TestAimWhereSomethingWrites(t *testing.T) {
	h1, h2 := &rig.Host{Name: "host1"}, &rig.Host{Name: "host2"}
	r := &run{hosts: []*rig.Host{h1, h2}, volumes: []*volume{{name: "old"}, {name: "new"}}, witness: &witness{files: map[string]*witnessFile{}}}
	for volume, i := range map[string]history.Incarnation{
		"old": {Node: "host1", Writes: []history.Write{{Seq: 1, At: history.Now() - time.Minute}}},
		"new": {Node: "host2", Writes: []history.Write{{Seq: 1, At: history.Now()}}},
	} {
		i.Volume = volume
		r.witness.files[volume] = &witnessFile{Incarnation: i}
	}
	s := step{fault: &fault{where: onHost, most: 1}} // the first volume is on host1
	if i := r.aim(s); i == nil || i.host != h2 {
		t.Errorf("it hits %+v, want host2", i)
	}
	if i := r.aim(s); i == nil || i.host != h1 {
		t.Errorf("while host2 is broken it hits %+v, want host1", i)
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
		{fault: &fault{name: "missed", where: onTask}, volume: "db", at: 300 * time.Second, repaired: 310 * time.Second, missed: true},
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
		got := attribute([]history.Outage{o}, faults, func(volume string) string { return "class of " + volume })
		if took := got[c.want]["class of "+c.volume]; len(took) != 1 || took[0] != c.took*time.Second {
			t.Errorf("%s: %v, want %s after %v s", c.name, got, c.want, int(c.took))
		}
	}
}

func TestTakeovers(t *testing.T) {
	const second = time.Second
	fault := func(host string, at time.Duration) *injected {
		return &injected{fault: &fault{name: "host killed", where: onHost}, host: &rig.Host{Name: host}, at: at * second}
	}
	missed := fault("host2", 111)
	missed.missed = true
	change := func(volume string, at time.Duration, node string) history.Change {
		return history.Change{Volume: volume, At: at * second, Node: node}
	}
	pending, again, forced := change("db", 114, "host1"), change("db", 115, "host3"), change("db", 116, "host3")
	pending.Pending, again.Pending, forced.Forced = true, true, true
	got := takeovers(
		[]history.Change{change("db", 1, "host1"), change("other", 2, "host2"), change("db", 50, "host2"), pending, again, forced, change("db", 130, "host1")},
		[]*injected{fault("host1", 20), fault("host2", 60), fault("host2", 100), fault("host1", 110), missed, fault("host2", 115)},
		[]mounted{
			{"host3", "db", 10 * second, 20 * second},
			{"host1", "db", 103 * second, 117 * second},
			{"host3", "other", 103 * second, 117 * second},
			{"host3", "db", 104 * second, 118 * second},
		})
	want := []takeover{{volume: "db", fault: 100 * second, recorded: 114 * second, committed: 116 * second, asked: 104 * second, answered: 118 * second}}
	if !slices.Equal(got, want) {
		t.Errorf("takeovers are %+v, want %+v", got, want)
	}
}

func TestMountsFrom(t *testing.T) {
	boot := time.Date(2026, 11, 22, 3, 29, 0, 0, time.UTC)
	got := mountsFrom("host1", `time="2026-11-22T03:29:12Z" level=info msg="level=info msg=done mount_id=8445a60885b9 op=mount took=915.50ms volume=synced1" plugin=578c
time="2026-11-22T03:29:13Z" level=info msg="level=info msg=done mount_id=8445a60885b9 op=unmount took=0.12ms volume=synced1" plugin=578c
time="2026-11-22T03:30:10Z" level=info msg="level=warning msg=failed err=\"volume mapped is owned by host host3\" mount_id=8018c8d1fa1e op=mount took=2074.20ms volume=mapped" plugin=578c
`, boot)
	want := []mounted{{"host1", "synced1", 11084500 * time.Microsecond, 13 * time.Second}}
	if !slices.Equal(got, want) {
		t.Errorf("mounts are %+v, want %+v", got, want)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{time.Hour: "1h", 10 * time.Minute: "10m", 90 * time.Second: "1m30s", 30 * time.Second: "30s", 90 * time.Minute: "1h30m"} {
		if got := short(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}

func TestLastLines(t *testing.T) {
	log := `time="1" level=info msg="level=info msg=one volume=db" plugin=578c
time="2" level=info msg="dockerd's own, of db"
time="3" level=info msg="level=debug msg=two volume=db" plugin=578c
time="4" level=info msg="level=info msg=three volume=web" plugin=578c
time="5" level=info msg="level=warning msg=four volume=db" plugin=578c
time="6" level=info msg="level=info msg=five volume=db" plugin=578c
`
	for _, c := range []struct {
		volume string
		want   string
	}{{"db", "56"}, {"web", "4"}, {"", "56"}} {
		var b strings.Builder
		for _, line := range lastLines(log, 2, []history.Violation{{Volume: c.volume}}) {
			b.WriteByte(line[len(`time="`)])
		}
		if got := b.String(); got != c.want {
			t.Errorf("of volume %q there are lines %s, want %s", c.volume, got, c.want)
		}
	}
	if got := lastLines(log, 9, nil); len(got) != 4 {
		t.Errorf("without a violation there are %q, want 4", got)
	}
}

func TestUptime(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	time.Sleep(50 * time.Millisecond)
	if up, err := uptime(cmd.Process.Pid); err != nil || up < 20*time.Millisecond || up > time.Minute {
		t.Errorf("a process that was just started runs for %v, %v", up, err)
	}
}

// Of few samples the 95th percentile is the longest, and not the shortest.
func TestCell(t *testing.T) {
	for want, n := range map[string]int{"": 0, "1: 1.0 / 1.0 / 1.0": 1, "2: 1.0 / 2.0 / 2.0": 2, "20: 10.0 / 19.0 / 20.0": 20, "100: 50.0 / 95.0 / 100.0": 100} {
		var took []time.Duration
		for range n {
			took = append([]time.Duration{time.Duration(len(took)+1) * time.Second}, took...)
		}
		if got := cell(took); got != want {
			t.Errorf("of 1 s to %d s: %q, want %q", n, got, want)
		}
	}
}
