package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

// between is the time between two looks at something that is waited for.
var between = time.Second

// waiting is how the end of long work is waited for.
type waiting struct {
	wait    bool
	timeout time.Duration
}

func (w *waiting) flags(cmd *cobra.Command, until string) {
	cmd.Flags().BoolVar(&w.wait, "wait", false, "wait until "+until)
	cmd.Flags().DurationVar(&w.timeout, "timeout", 2*time.Minute, "how long to wait at most")
}

func (w *waiting) check(cmd *cobra.Command) error {
	switch {
	case cmd.Flags().Changed("timeout") && !w.wait:
		return errors.New("--timeout goes together with --wait")
	case w.timeout <= 0:
		return fmt.Errorf("--timeout is a time such as 30s, and %v is none", w.timeout)
	}
	return nil
}

// until looks again and again, until that is done. Whoever sits at a terminal sees what
// has changed; how is empty where nothing can be said.
func (c *cli) until(ctx context.Context, w waiting, look func(context.Context) (done bool, how string, err error)) (done bool, last string, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	for {
		done, how, err := look(ctx)
		if ctx.Err() != nil && !done {
			return false, last, nil
		}
		if refused, ok := errors.AsType[*api.Error](err); ok && refused.Status == http.StatusServiceUnavailable {
			how, err = refused.Text, nil // etcd comes back
		}
		if err != nil || done {
			return done, how, err
		}
		if how != last && how != "" && c.watched {
			fmt.Fprintln(c.errout, how)
		}
		last = how
		select {
		case <-time.After(between):
		case <-ctx.Done():
		}
	}
}

// pairs reads KEY=VALUE.
func pairs(flag string, texts []string) (map[string]string, error) {
	var read map[string]string
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if _, twice := read[key]; !ok || key == "" || twice {
			return nil, fmt.Errorf("%s takes KEY=VALUE, each key once, and %q is not that", flag, text)
		}
		if read == nil {
			read = map[string]string{}
		}
		read[key] = value
	}
	return read, nil
}

func (c *cli) create() *cobra.Command {
	var (
		options, labels []string
		host            string
	)
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a volume",
		Long: "Make a volume.\n\n" +
			"It does what docker volume create does, and can say on which host the volume is to\n" +
			"be. With -o help it is refused with a list of the options. It prints the name.",
		Example: c.example("create db -o size=20G --label team=blue", "create db --to alpha"),
		Args:    one("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			body := api.Creation{Name: args[0], By: c.by}
			var err error
			if body.Options, err = pairs("--opt", expand(options)); err != nil {
				return err
			}
			if body.Labels, err = pairs("--label", labels); err != nil {
				return err
			}
			made, err := c.client().Create(cmd.Context(), body)
			if err == nil && host != "" {
				if _, err = c.client().Move(cmd.Context(), made.Name, api.Movement{Host: &host, By: c.by}); err != nil {
					err = fmt.Errorf("volume %s is made, and is on no host yet: %w", made.Name, err)
				}
			}
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintln(c.out, made.Name)
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&options, "opt", "o", nil, "an option, `KEY=VALUE`; may be repeated")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "a label, `KEY=VALUE`; may be repeated")
	cmd.Flags().StringVar(&host, "to", "", "the `HOST` on which it is to be")
	_ = cmd.RegisterFlagCompletionFunc("to", complete(0, c.hostNames(func(n api.Node) bool { return n.Live }))) // it has the flag
	return cmd
}

// expand makes a pair of -o help.
func expand(options []string) []string {
	var all []string
	for _, option := range options {
		if option == "help" {
			option = "help="
		}
		all = append(all, option)
	}
	return all
}

func (c *cli) rm() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove volumes and what is on them",
		Long: "Remove volumes and what is on them.\n\n" +
			"A volume that is in use is refused. There is no way back. It prints the names.",
		Example: c.example("rm scratch"),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("it takes at least one argument, NAME")
			}
			return nil
		},
		ValidArgsFunction: complete(0, c.volumeNames(nil)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var failed []error
			for _, name := range args {
				if err := c.client().Remove(cmd.Context(), name, api.By{By: c.by}); err != nil {
					failed = append(failed, err)
					continue
				}
				fmt.Fprintln(c.out, name)
			}
			if len(failed) > 0 {
				return &failure{errors.Join(failed...)}
			}
			return nil
		},
	}
}

func (c *cli) move() *cobra.Command {
	var (
		host    string
		nowhere bool
		w       waiting
	)
	cmd := &cobra.Command{
		Use:   "move NAME --to HOST",
		Short: "Say on which host a volume is to be",
		Long: "Say on which host a volume is to be.\n\n" +
			"It moves there as soon as nothing uses it where it is, and is kept mounted there,\n" +
			"ready for a container. A container elsewhere gets it nevertheless, and the wish\n" +
			"follows it. With --nowhere the wish is forgotten. It does not wait, but for --wait,\n" +
			"and then ends with 1 if the volume is not there in time; it moves later all the same.",
		Example:           c.example("move db --to beta", "move db --to beta --wait --timeout 5m", "move db --nowhere"),
		Args:              one("NAME"),
		ValidArgsFunction: complete(1, c.volumeNames(nil)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (host == "") != nowhere {
				return errors.New("it takes either --to HOST or --nowhere")
			}
			if err := w.check(cmd); err != nil {
				return err
			}
			moved, err := c.client().Move(cmd.Context(), args[0], api.Movement{Host: &host, By: c.by})
			if err != nil {
				return &failure{err}
			}
			to, way := "on host "+moved.Host, "it moves there when nothing uses it elsewhere"
			if nowhere {
				to, way = "on no host", "it is let go when nothing uses it"
			}
			if !w.wait {
				fmt.Fprintf(c.out, "volume %s is to be %s: %s\n", moved.Volume, to, way)
				return nil
			}
			me, err := c.client().Version(cmd.Context())
			if err != nil {
				return &failure{err}
			}
			done, last, err := c.until(cmd.Context(), w, func(ctx context.Context) (bool, string, error) {
				v, err := c.client().Volume(ctx, moved.Volume)
				return arrived(v, moved.Host, me.Host), whereabouts(v), err
			})
			if err == nil && !done {
				err = fmt.Errorf("volume %s is not %s after %v: %s; %s, and docker flocker inspect %s shows it", moved.Volume, to, w.timeout, last, way, moved.Volume)
			}
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "volume %s is %s\n", moved.Volume, to)
			return nil
		},
	}
	cmd.Flags().StringVar(&host, "to", "", "the `HOST`, by its name or id")
	cmd.Flags().BoolVar(&nowhere, "nowhere", false, "it need not be anywhere")
	w.flags(cmd, "it is there")
	_ = cmd.RegisterFlagCompletionFunc("to", complete(0, c.hostNames(func(n api.Node) bool { return n.Live }))) // it has the flag
	return cmd
}

// arrived says that a volume is on a host, as far as this host can tell: it knows of its
// own volumes alone that they are mounted.
func arrived(v api.Volume, host, here string) bool {
	if v.Host != host {
		return false
	}
	return host == "" || v.State == "mounted" || v.State == "owned" && host != here
}

// whereabouts is what there is to say of a volume that is waited for.
func whereabouts(v api.Volume) string {
	how := "it is " + v.State
	if v.Host != "" {
		how += ", host " + v.Host
	}
	if len(v.Containers) > 0 {
		how += ", in use by " + strings.Join(v.Containers, ", ")
	}
	switch {
	case v.PlacementError != "":
		how += ": " + v.PlacementError
	case v.Detail != "":
		how += ": " + v.Detail
	}
	return how
}

func (c *cli) cordon() *cobra.Command {
	return c.node("cordon", "Give a host no more volumes",
		"What it has goes on. New mounts there are refused, until node uncordon.",
		func(n api.Node) bool { return n.State == "" },
		"host %s gets no more volumes\n", (*api.Client).Cordon)
}

func (c *cli) uncordon() *cobra.Command {
	return c.node("uncordon", "Let a host get volumes again",
		"It ends what node cordon and node drain have begun.",
		func(n api.Node) bool { return n.State == "cordoned" },
		"host %s can get volumes again\n", (*api.Client).Uncordon)
}

func (c *cli) removeNode() *cobra.Command {
	return c.node("rm", "Forget a host that does not come back",
		"It must not answer any more, and own no volumes.",
		func(n api.Node) bool { return !n.Live },
		"host %s is removed\n", (*api.Client).RemoveNode)
}

// node is a command that does one thing to a host.
func (c *cli) node(name, short, long string, offered func(api.Node) bool, done string, do func(*api.Client, context.Context, string, api.By) error) *cobra.Command {
	return &cobra.Command{
		Use: name + " HOST", Short: short, Long: short + ".\n\n" + long,
		Example:           c.example("node " + name + " alpha"),
		Args:              one("HOST"),
		ValidArgsFunction: complete(1, c.hostNames(offered)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := do(c.client(), cmd.Context(), args[0], api.By{By: c.by}); err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, done, args[0])
			return nil
		},
	}
}

func (c *cli) drain() *cobra.Command {
	var (
		o output
		w waiting
	)
	cmd := &cobra.Command{
		Use:   "drain HOST",
		Short: "Empty a host, and say what is busy there",
		Long: "Empty a host, and say what is busy there.\n\n" +
			"The host gets no more volumes, and lets go of all that nothing uses. What containers\n" +
			"use stays, and is listed: stop them, or let Docker start them elsewhere. It ends\n" +
			"with 3 if anything is left. With --wait it goes on until nothing is. The host gets\n" +
			"volumes again with node uncordon.",
		Example:           c.example("node drain alpha", "node drain alpha --wait --timeout 10m"),
		Args:              one("HOST"),
		ValidArgsFunction: complete(1, c.hostNames(func(n api.Node) bool { return n.Live })),
		RunE: func(cmd *cobra.Command, args []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			if err := w.check(cmd); err != nil {
				return err
			}
			ask := func(ctx context.Context) (api.Drained, error) {
				return c.client().Drain(ctx, args[0], api.By{By: c.by})
			}
			all, err := ask(cmd.Context())
			if err == nil && w.wait && left(all) > 0 {
				_, _, err = c.until(cmd.Context(), w, func(ctx context.Context) (bool, string, error) {
					now, err := ask(ctx)
					if err == nil {
						now.Released = union(all.Released, now.Released)
						all = now
					}
					return left(all) == 0, stillBusy(all), err
				})
			}
			if err != nil {
				return &failure{err}
			}
			if tmpl != nil {
				err = listing[api.Drained]{}.print(c.out, o, tmpl, []api.Drained{all})
			} else {
				c.printDrained(args[0], all)
			}
			if err == nil && left(all) > 0 {
				err = &attention{3}
			}
			return err
		},
	}
	o.formatFlag(cmd)
	w.flags(cmd, "the host is empty")
	return cmd
}

func left(d api.Drained) int { return len(d.Moving) + len(d.Busy) }

func union(a, b []string) []string {
	for _, name := range b {
		if len(both([]string{name}, a)) == 0 {
			a = append(a, name)
		}
	}
	return a
}

func stillBusy(d api.Drained) string {
	names := append([]string{}, d.Moving...)
	for _, b := range d.Busy {
		names = append(names, b.Volume)
	}
	return fmt.Sprintf("%d left: %s", len(names), strings.Join(names, ", "))
}

func (c *cli) printDrained(host string, d api.Drained) {
	lines := []string{"host " + host + " gets no more volumes, until " + c.name + " node uncordon " + host}
	if len(d.Released) > 0 {
		lines = append(lines, "let go: "+strings.Join(d.Released, ", "))
	}
	if len(d.Moving) > 0 {
		lines = append(lines, "being let go: "+strings.Join(d.Moving, ", "))
	}
	for _, b := range d.Busy {
		line := "busy: " + b.Volume
		if len(b.Containers) > 0 {
			line += ", by " + strings.Join(b.Containers, ", ")
		}
		if b.Detail != "" {
			line += " (" + b.Detail + ")"
		}
		lines = append(lines, line)
	}
	if left(d) == 0 {
		lines = append(lines, "nothing is left there")
	}
	for _, line := range lines {
		fmt.Fprintln(c.out, wrap(line, "  "))
	}
}
