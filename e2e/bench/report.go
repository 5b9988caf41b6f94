package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report is what a run found out.
type report struct {
	machine string
	notes   []string
	lines   []line
}

// line is one line of the table. An empty cell is one that does not apply.
type line struct {
	what, measured, floor, ratio, target string
	met                                  bool // target has a text
}

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *report) missed() int {
	n := 0
	for _, l := range r.lines {
		if l.target != "" && !l.met {
			n++
		}
	}
	return n
}

func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", r.machine)
	b.WriteString("| what | p50 / p95 / p99 | floor, p50 | ratio | target | met |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, l := range r.lines {
		met := ""
		if l.target != "" {
			met = yes(l.met)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", l.what, l.measured, l.floor, l.ratio, l.target, met)
	}
	for _, n := range r.notes {
		fmt.Fprintf(&b, "\n%s\n", n)
	}
	return b.String()
}

func yes(met bool) string { return map[bool]string{true: "yes", false: "**no**"}[met] }

// ms prints a time in milliseconds.
func ms(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d.Microseconds())/1000) }

// allowed is what a time is compared with: times × floor and something on top.
type allowed struct {
	times float64
	plus  time.Duration
	text  string
}

// latency adds a line about what was measured under that name, beside its floor
// if it has one.
func (r *run) latency(what, name string, target *allowed) {
	p50 := r.times.p(name, 50)
	if p50 == 0 {
		return
	}
	l := line{what: what, measured: fmt.Sprintf("%s / %s / %s ms", ms(p50), ms(r.times.p(name, 95)), ms(r.times.p(name, 99)))}
	floor := r.times.p("bare "+name, 50)
	if floor > 0 {
		l.floor, l.ratio = ms(floor)+" ms", fmt.Sprintf("%.2f", float64(p50)/float64(floor))
	}
	if target != nil {
		limit := time.Duration(target.times*float64(floor)) + target.plus
		l.target, l.met = target.text, p50 <= limit
		if target.times > 0 {
			l.target += " = " + ms(limit) + " ms"
		}
	}
	r.report.lines = append(r.report.lines, l)
}

// rate adds a line about how much of something there was a second. least is the
// target, compared with the floor if share is set.
func (r *run) rate(what, name, unit string, least float64, share bool) {
	got, floor := percentile(r.rates[name], 50), percentile(r.rates["bare "+name], 50)
	if got == 0 {
		return
	}
	l := line{what: what, measured: fmt.Sprintf("%.0f %s", got, unit)}
	if floor > 0 {
		l.floor, l.ratio = fmt.Sprintf("%.0f %s", floor, unit), fmt.Sprintf("%.2f", got/floor)
	}
	switch {
	case share:
		l.target, l.met = fmt.Sprintf("≥ %.2f × floor", least), got >= least*floor
		l.ratio = fmt.Sprintf("%.3f", got/floor)
	case least > 0:
		l.target, l.met = fmt.Sprintf("≥ %.0f %s", least, unit), got >= least
	}
	r.report.lines = append(r.report.lines, l)
}

// tabulate makes the table, with the targets.
func (r *run) tabulate() {
	commit := r.times.p("commit", 50)
	most := func(d time.Duration) *allowed { return &allowed{plus: d, text: "≤ " + fmt.Sprint(d)} }
	times := func(t float64, plus time.Duration, text string) *allowed { return &allowed{t, plus, text} }

	r.latency("one etcd commit", "commit", nil)
	r.latency("Create", "create", most(5*time.Millisecond))
	r.latency("first Mount, with mkfs", "first mount", times(1.3, 0, "≤ 1.3 × floor"))
	r.latency("Mount", "mount", times(1.3, commit, "≤ 1.3 × floor + commit"))
	r.latency("Mount of what is mounted here", "mount, mounted", nil)
	r.latency("Unmount", "unmount", times(1.3, 0, "≤ 1.3 × floor"))
	r.latency("Unmount of what is used further", "unmount, still used", nil)
	r.latency("Remove", "remove", nil)
	r.latency("Get, free volume", "get", most(500*time.Microsecond))
	r.latency("Get, mounted volume", "get, mounted", most(500*time.Microsecond))
	r.latency("Path", "path", nil)
	r.latency(fmt.Sprintf("List of %d volumes", r.volumes), "list", most(10*time.Millisecond))
	r.latency("planned move to another host", "move", times(1.5, 10*time.Millisecond, "≤ 1.5 × floor + 10 ms"))
	for _, verb := range []string{"create", "first mount", "mount", "unmount", "remove", "get", "path", "list"} {
		title := strings.ToUpper(verb[:1]) + verb[1:]
		least := map[string]float64{"create": 300, "mount": 150}[verb]
		r.latency(fmt.Sprintf("%s, %d callers", title, callers), verb+" ×16", nil)
		r.rate(fmt.Sprintf("%s, %d callers", title, callers), verb+" ×16", "a second", least, false)
	}
	for _, p := range patterns {
		r.rate(p.name, p.name, "MiB/s", 0.98, true)
	}
	rss := percentile(r.rates["VmRSS"], 50)
	r.report.lines = append(r.report.lines, line{
		what:     fmt.Sprintf("resident memory, %d volumes, etcd elsewhere", r.volumes),
		measured: fmt.Sprintf("%.0f MiB, at most %.0f MiB", rss, percentile(r.rates["VmHWM"], 50)),
		target:   "≤ 64 MiB", met: rss <= 64,
	})
	for _, step := range []string{"create", "mount", "unmount", "remove"} {
		r.latency("Docker's local driver, "+step, "local "+step, nil)
	}
	r.report.note("The floor is the bare system calls, and mkfs with the same arguments but for the guard (multi-mount protection), by turns with ours. " +
		"Docker's local driver is its code alone, called in its process, on a device that is attached already; " +
		"ours goes through the socket, etcd and the loop device. Ratios and targets compare medians.")
}

// machine describes where it was measured.
func machine(dir string) string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	var fs unix.Statfs_t
	_ = unix.Statfs(dir, &fs)
	kind := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	}[fs.Type]
	model := ""
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = " (" + strings.TrimSpace(value) + ")"
				break
			}
		}
	}
	return fmt.Sprintf("Linux %s, %d cores%s, files on %s; %s.", unix.ByteSliceToString(uts.Release[:]), runtime.NumCPU(), model,
		cmp.Or(kind, "another filesystem"), time.Now().UTC().Format(time.DateOnly))
}

// replace puts text between the marks of that name in a Markdown file.
func replace(path, name, text string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	begin, end := "<!-- "+name+" -->\n", "<!-- end of "+name+" -->"
	before, rest, found := bytes.Cut(old, []byte(begin))
	_, after, ended := bytes.Cut(rest, []byte(end))
	if !found || !ended {
		return errors.New(path + " has no lines " + strings.TrimSpace(begin) + " and " + end)
	}
	return os.WriteFile(path, bytes.Join([][]byte{before, []byte(begin), []byte(text), []byte(end), after}, nil), 0o644)
}
