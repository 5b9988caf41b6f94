package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// happened is an Observer of events; those that are followed end with an error.
type happened struct {
	events []ownership.Event
	since  time.Duration // what was asked for
	err    error
}

func (h *happened) Wait(context.Context, int64) (*ownership.State, error) {
	return &ownership.State{Revision: 4731}, nil
}

func (h *happened) Since(_ context.Context, t time.Time) (int64, error) {
	h.since = time.Since(t).Truncate(time.Hour)
	return 1, nil
}

func (h *happened) Events(_ context.Context, after int64, _ int) (events []ownership.Event, next int64, err error) {
	for _, e := range h.events {
		if e.Revision > after {
			return []ownership.Event{e}, e.Revision, h.err
		}
	}
	return nil, max(after, 4752), h.err
}

func (h *happened) Follow(context.Context, int64) <-chan ownership.Followed {
	out := make(chan ownership.Followed, len(h.events)+1)
	for _, e := range h.events {
		out <- ownership.Followed{Event: e}
	}
	out <- ownership.Followed{Err: &ownership.SlowError{After: 4752}}
	return out
}

// documentedEvents are those of docs/cli.md's example, as of the present.
func documentedEvents(t *testing.T) (h *happened, at func(out string) string) {
	t.Helper()
	// The hour in which they happened is not too long ago, whenever it is now.
	shift := time.Since(time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)).Truncate(time.Second) // which is what is printed
	event := func(clock string, revision int64, host, what string, more ownership.Event) ownership.Event {
		t.Helper()
		day, err := time.Parse(time.RFC3339, "2026-11-20T"+clock+"Z")
		if err != nil {
			t.Fatal(err)
		}
		more.At, more.Revision, more.Host, more.What, more.Volume, more.Name = day.Add(shift), revision, host, what, "0b9e6a1c", "db"
		return more
	}
	const errors = "the kernel has noted errors in its filesystem"
	h = &happened{events: []ownership.Event{
		event("09:30:00", 4702, "alpha", "create", ownership.Event{By: "docker"}),
		event("09:30:01", 4703, "alpha", "ready", ownership.Event{By: "docker"}),
		event("09:30:01", 4704, "alpha", "claim", ownership.Event{By: "docker"}),
		event("09:41:20", 4709, "beta", "request", ownership.Event{FromHost: "alpha", Token: 4704, Detail: "to mount", By: "docker"}),
		event("09:41:20", 4710, "alpha", "refuse", ownership.Event{ToHost: "beta", Detail: "in use by container postgres"}),
		event("09:41:24", 4711, "alpha", "hand over", ownership.Event{ToHost: "beta", Token: 4704}),
		event("10:02:47", 4730, "gamma", "take over", ownership.Event{FromHost: "beta", Token: 4711, Detail: "silent: host beta", By: "docker"}),
		event("10:02:49", 4731, "gamma", "fenced", ownership.Event{FromHost: "beta", Token: 4730, Detail: "detached from beta", By: "docker"}),
		event("10:15:03", 4740, "gamma", "quarantine", ownership.Event{Token: 4731, Detail: errors}),
		event("11:00:12", 4752, "alpha", "reinstate", ownership.Event{Detail: "was quarantined: " + errors, By: "ann@ops"}),
	}}
	return h, func(out string) string {
		var b strings.Builder
		for line := range strings.Lines(out) {
			if at, rest, ok := strings.Cut(line, " "); ok {
				if then, err := time.Parse(time.RFC3339, at); err == nil {
					line = then.Add(-shift).Format(time.RFC3339) + " " + rest
				}
			}
			b.WriteString(line)
		}
		return b.String()
	}
}

func serveEvents(t *testing.T, h *happened) (socket string) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	f := documentedCluster()
	return listen(t, control.New(f, f, "v0.1.0", logrus.NewEntry(log)).Observe(h))
}

func TestEventsDocs(t *testing.T) {
	h, at := documentedEvents(t)
	other := h.events[0]
	other.Revision, other.Name, other.Volume = 4701, "other", "another"
	h.events = append([]ownership.Event{other}, h.events...)
	socket := serveEvents(t, h)
	for _, e := range documented(t, "docker flocker events") {
		got := command(t, socket, "", e.args...)
		got.out = at(got.out)
		want(t, strings.Join(e.args, " "), got, result{0, e.out, ""})
	}
	if h.since != 24*time.Hour {
		t.Errorf("asked for %v", h.since)
	}
}

func TestEvents(t *testing.T) {
	h, at := documentedEvents(t)
	h.events = h.events[8:]
	h.events[0].Name = "" // nobody knows it any more
	h.events[0].Detail = "two\nlines"
	socket := serveEvents(t, h)
	const first, second = "2026-11-20T10:15:03Z 4740 gamma: quarantine 0b9e6a1c (token 4731; two lines)\n",
		"2026-11-20T11:00:12Z 4752 alpha: reinstate db (was quarantined: the kernel has noted errors in its filesystem; by ann@ops)\n"
	slow := "these events were not read as fast as they came: go on after revision 4752; to go on: docker flocker events -f --since 4752"
	const usage = "See 'docker flocker events --help'.\n"
	for _, c := range []struct {
		args  string
		want  result
		since time.Duration
	}{
		{"events", result{0, first + second, ""}, 24 * time.Hour},
		{"events --since 7d", result{0, first + second, ""}, 7 * 24 * time.Hour},
		{"events --since 90m", result{0, second, ""}, time.Hour},
		{"events --since 4740", result{0, second, ""}, 0},
		{"events --volume 0b9e6a1c", result{0, first + second, ""}, 24 * time.Hour},
		{"events --volume none", result{0, "", ""}, 24 * time.Hour},
		{"events --format {{.Revision}}:{{.What}}", result{0, "4740:quarantine\n4752:reinstate\n", ""}, 24 * time.Hour},
		{"events --since 0 --format table|{{.Revision}}|{{.Volume}}", result{0, "|REVISION|VOLUME\n|4740|\n|4752|db\n", ""}, 0},
		{"events -f", result{1, first + second, slow + "\n"}, 0},
		{"events -f --volume db --format {{.Revision}}", result{1, "4752\n", slow + " --volume db\n"}, 0},
		{"events -f --since 4700", result{1, first + second, slow + "\n"}, 0},
		{"events -f --since 48h", result{1, first + second, slow + "\n"}, 48 * time.Hour},

		{"events now", result{2, "", "it takes no argument, and \"now\" is one\n" + usage}, 0},
		{"events --since tomorrow", result{2, "", "--since is a time such as 90m, 24h or 7d, or a revision, and \"tomorrow\" is neither\n" + usage}, 0},
		{"events --since -1h", result{2, "", "--since is a time such as 90m, 24h or 7d, or a revision, and \"-1h\" is neither\n" + usage}, 0},
		{"events --since xd", result{2, "", "--since is a time such as 90m, 24h or 7d, or a revision, and \"xd\" is neither\n" + usage}, 0},
		{"events -f --format table", result{2, "", "--follow shows no table: its columns would not be known\n" + usage}, 0},
	} {
		h.since = 0
		got := command(t, socket, "", strings.Fields(c.args)...)
		got.out = at(got.out)
		want(t, c.args, got, c.want)
		if h.since != c.since {
			t.Errorf("%s asked for %v", c.args, h.since)
		}
	}
	got := command(t, socket, "", "events", "-f", "--format", "{{.Nam}}")
	if got.code != 2 || !strings.Contains(got.errout, "there are .Revision, .At, .Host, .What, .Volume, .ID, .From, .To, .Token, .Detail, .By, .Node\n") {
		t.Errorf("a field that there is not: %+v", got)
	}
	h.err = &ownership.GoneError{Before: 4740}
	for _, args := range []string{"events --since 3", "events -f --since 3"} {
		want(t, args, command(t, socket, "", strings.Fields(args)...), result{1, "", "events before revision 4740 are gone: they are kept for 7 days\n"})
	}
	h.err = fmt.Errorf("%w: etcd is away", ownership.ErrUnavailable)
	want(t, "without etcd", command(t, socket, "", "events"), result{1, "", "ownership cannot be checked: etcd is away\n"})
	want(t, "without a plugin", command(t, "/nonexistent", "", "events", "-f"), result{1, "", "no Flocker plugin answers on /nonexistent: is it enabled on this host? (docker plugin ls)\n"})
	want(t, "an older plugin", command(t, serve(t, documentedCluster()), "", "events"), result{1, "", "there is no request GET /v1/events: is docker-flocker newer than the plugin?\n"})
	if got := command(t, socket, "", "__complete", "events", "--volume", "d"); !strings.HasPrefix(got.out, "db\tmounted\n") {
		t.Errorf("completed to %q", got.out)
	}
}
