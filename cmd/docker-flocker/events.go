package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"text/template"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

func (c *cli) events() *cobra.Command {
	var o output
	var follow bool
	var since string
	var q api.EventQuery
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what was done to volumes and hosts, by whom",
		Long: "Show what was done to volumes and hosts, by whom.\n\n" +
			"It shows the last 24 hours, or what came --since a time ago (90m, 7d) or after a\n" +
			"revision. With --follow it shows what comes, until you interrupt it; and what came\n" +
			"before with --since. A line has the time by the clock of the host that did it,\n" +
			"etcd's revision, that host, and what it did. Events are kept for 7 days.",
		Example: c.example("events --since 2h", "events -f --volume db", "events --since 7d --format json"),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			if follow && strings.HasPrefix(o.format, "table") {
				return errors.New("--follow shows no table: its columns would not be known")
			}
			if err := ask(&q, since, follow); err != nil {
				return err
			}
			if follow {
				return c.follow(cmd, q, tmpl)
			}
			var all []api.Event
			for more := true; more; {
				some, err := c.client().Events(cmd.Context(), q)
				if err != nil {
					return &failure{err}
				}
				all, more = append(all, some.Events...), some.More
				q.After, q.Since = &some.Next, ""
			}
			if tmpl != nil {
				return listing[api.Event]{}.print(c.out, o, tmpl, all)
			}
			for _, e := range all {
				if _, err := fmt.Fprintln(c.out, eventLine(e)); err != nil {
					return &failure{fmt.Errorf("print the events: %w", err)}
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "show what comes, too, until it is interrupted")
	cmd.Flags().StringVar(&since, "since", "", "a `time` ago, such as 90m, 24h or 7d; or a revision, which is not shown itself")
	cmd.Flags().StringVar(&q.Volume, "volume", "", "only what is about the volume of this `name` or id")
	for flag, what := range map[string]completion{"since": words("1h", "24h", "7d"), "volume": complete(0, c.volumeNames(nil))} {
		_ = cmd.RegisterFlagCompletionFunc(flag, what) // it has the flag
	}
	o.formatFlag(cmd)
	return cmd
}

// ask reads --since.
func ask(q *api.EventQuery, since string, follow bool) error {
	if since == "" {
		if !follow {
			q.Since = "24h"
		}
		return nil
	}
	if revision, err := strconv.ParseInt(since, 10, 64); err == nil && revision >= 0 {
		q.After = &revision
		return nil
	}
	ago, err := time.ParseDuration(since)
	if days, found := strings.CutSuffix(since, "d"); found {
		var n float64
		n, err = strconv.ParseFloat(days, 64)
		ago = time.Duration(n * float64(24*time.Hour))
	}
	if err != nil || ago < 0 || ago == math.MaxInt64 {
		return fmt.Errorf("--since is a time such as 90m, 24h or 7d, or a revision, and %q is neither", since)
	}
	q.Since = ago.String()
	return nil
}

func (c *cli) follow(cmd *cobra.Command, q api.EventQuery, tmpl *template.Template) error {
	var wrong error // in what was typed
	next, err := c.client().Follow(cmd.Context(), q, func(e api.Event) (err error) {
		line := eventLine(e)
		if tmpl != nil {
			if line, wrong = execute(tmpl, e); wrong != nil {
				return wrong
			}
		}
		if _, err := fmt.Fprintln(c.out, line); err != nil {
			return fmt.Errorf("print the events: %w", err)
		}
		return nil
	})
	switch {
	case wrong != nil:
		return wrong
	case next > 0:
		more := ""
		if q.Volume != "" {
			more = " --volume " + q.Volume
		}
		err = fmt.Errorf("%w; to go on: %s events -f --since %d%s", err, c.name, next, more)
	}
	return &failure{err}
}

// eventLine is an event in a line.
func eventLine(e api.Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %d %s: %s", e.At.UTC().Format(time.RFC3339), e.Revision, e.Host, e.What)
	if e.Volume != "" {
		b.WriteString(" " + e.Volume)
	} else if e.ID != "" {
		b.WriteString(" " + e.ID)
	}
	if e.From != "" {
		b.WriteString(" from " + e.From)
	}
	if e.To != "" {
		b.WriteString(" to " + e.To)
	}
	var more []string
	if e.Token != 0 {
		more = append(more, fmt.Sprintf("token %d", e.Token))
	}
	if e.Detail != "" {
		more = append(more, e.Detail)
	}
	if e.By != "" {
		more = append(more, "by "+e.By)
	}
	if len(more) > 0 {
		b.WriteString(" (" + strings.Join(more, "; ") + ")")
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) { // in what another program has said
			return ' '
		}
		return r
	}, b.String())
}
