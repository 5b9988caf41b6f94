package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A whole run, with few volumes: it measures everything and leaves nothing behind.
func TestBench(t *testing.T) {
	if os.Geteuid() != 0 {
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
			t.Fatal("REQUIRE has root: needs root")
		}
		t.Skip("needs root")
	}
	dir := t.TempDir()
	r, err := bench(t.Context(), options{dir: dir, share: 50, limit: fullLimit, volumes: 100})
	if err != nil {
		t.Fatal(err)
	}
	text := r.markdown()
	for _, what := range []string{
		"Linux ", "| one etcd commit |", "| Create |", "| first Mount, with mkfs |", "| Mount |", "| Unmount |", "| Remove |",
		"| Get, free volume |", "| Path |", "| List of 100 volumes |", "| planned move to another host |", "| Mount, 16 callers |",
		"| write, sequential, O_DIRECT |", "| write, random 4k, fsync |", "| resident memory, 100 volumes, etcd elsewhere |",
		"| Docker's local driver, mount",
	} {
		if !strings.Contains(text, what) {
			t.Errorf("there is no %q in\n%s", what, text)
		}
	}
	for _, l := range r.lines {
		if strings.HasPrefix(l.measured, "0.00 /") || strings.HasPrefix(l.measured, "0 ") {
			t.Errorf("%s: measured %s", l.what, l.measured)
		}
	}
	if left, err := filepath.Glob("/sys/block/loop*/loop/backing_file"); err != nil {
		t.Error(err)
	} else {
		for _, path := range left {
			if file, _ := os.ReadFile(path); strings.HasPrefix(string(file), dir) {
				t.Errorf("still attached: %s", file)
			}
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Errorf("something is left: %v", err)
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(100 - i)
	}
	for _, c := range []struct {
		all     []time.Duration
		percent int
		want    time.Duration
	}{
		{nil, 50, 0},
		{[]time.Duration{7}, 99, 7},
		{[]time.Duration{3, 1, 2}, 50, 2},
		{hundred, 50, 50},
		{hundred, 95, 95},
		{hundred, 99, 99},
	} {
		if got := percentile(c.all, c.percent); got != c.want {
			t.Errorf("p%d of %d: got %d, want %d", c.percent, len(c.all), got, c.want)
		}
	}
}

func TestTargets(t *testing.T) {
	r := &run{rates: rates{"fast": {301}, "slow": {299}, "w": {97}, "bare w": {100}}}
	for name, took := range map[string]time.Duration{"commit": time.Millisecond, "x": 4 * time.Millisecond, "bare x": 2 * time.Millisecond} {
		r.times.add(name, took)
	}
	r.latency("met", "x", &allowed{times: 1.5, plus: time.Millisecond, text: "≤ 1.5 × floor + commit"})
	r.latency("missed", "x", &allowed{times: 1.5, text: "≤ 1.5 × floor"})
	r.latency("not measured", "y", &allowed{plus: time.Second})
	r.rate("met", "fast", "a second", 300, false)
	r.rate("missed", "slow", "a second", 300, false)
	r.rate("missed", "w", "MiB/s", 0.98, true)
	r.latency("no target", "commit", nil)
	want := `

| what | p50 / p95 / p99 | floor, p50 | ratio | target | met |
| --- | --- | --- | --- | --- | --- |
| met | 4.00 / 4.00 / 4.00 ms | 2.00 ms | 2.00 | ≤ 1.5 × floor + commit = 4.00 ms | yes |
| missed | 4.00 / 4.00 / 4.00 ms | 2.00 ms | 2.00 | ≤ 1.5 × floor = 3.00 ms | **no** |
| met | 301 a second |  |  | ≥ 300 a second | yes |
| missed | 299 a second |  |  | ≥ 300 a second | **no** |
| missed | 97 MiB/s | 100 MiB/s | 0.970 | ≥ 0.98 × floor | **no** |
| no target | 1.00 / 1.00 / 1.00 ms |  |  |  |  |
`
	if got := r.report.markdown(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := r.report.missed(); got != 3 {
		t.Errorf("got %d missed, want 3", got)
	}
}

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "README.md")
	for _, c := range []struct{ old, want, err string }{
		{"a\n<!-- bench -->\nold\n<!-- end of bench -->\nb\n", "a\n<!-- bench -->\nnew\n<!-- end of bench -->\nb\n", ""},
		{"a\n<!-- bench -->\nb\n", "a\n<!-- bench -->\nb\n", path + " has no lines <!-- bench --> and <!-- end of bench -->"},
	} {
		if err := os.WriteFile(path, []byte(c.old), 0o600); err != nil {
			t.Fatal(err)
		}
		text := ""
		if err := replace(path, "bench", "new\n"); err != nil {
			text = err.Error()
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != c.want || text != c.err {
			t.Errorf("got %q, %q, %v, want %q, %q", got, text, err, c.want, c.err)
		}
	}
}
