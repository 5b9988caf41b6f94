package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

// attention is the end of a command that found something somebody should look into,
// and has printed it.
type attention struct{ code int }

func (*attention) Error() string { return "something needs attention" }

// lists makes a command that lists what get returns.
func lists[T any](c *cli, what string, cmd *cobra.Command, l listing[T], get func(cmd *cobra.Command) ([]T, error), after func([]T) string) *cobra.Command {
	var o output
	cmd.Args = none
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		tmpl, err := o.template()
		if err != nil {
			return err
		}
		rows, err := get(cmd)
		if err != nil {
			return &failure{err}
		}
		if err := l.print(c.out, o, tmpl, rows); err != nil {
			return err
		}
		if after != nil && tmpl == nil && !o.quiet {
			fmt.Fprint(c.out, after(rows))
		}
		return nil
	}
	o.flags(cmd, what)
	return cmd
}

func (c *cli) ls() *cobra.Command {
	return lists(c, "name", &cobra.Command{
		Use:   "ls",
		Short: "List the volumes of the cluster",
		Long: "List the volumes of the cluster.\n\n" +
			"STATE is as this host knows it: mounted and attached are only said of volumes on\n" +
			"this host, and owned of those that another one has. HOST is the owner. While etcd is\n" +
			"away the volumes are those this host remembers, and the state of the others is\n" +
			"unknown.",
		Example: c.example("ls", "ls --format '{{.Name}} {{.Bytes}}'"),
	}, listing[api.Volume]{
		header: "NAME\tSTATE\tHOST\tSIZE\tBACKEND",
		row: func(v api.Volume) string {
			return strings.Join([]string{v.Name, v.State, dash(v.Host), size(v.Bytes), v.Backend}, "\t")
		},
		name: func(v api.Volume) string { return v.Name },
	}, func(cmd *cobra.Command) ([]api.Volume, error) {
		all, err := c.client().Volumes(cmd.Context())
		if all.Stale {
			fmt.Fprintln(c.errout, "etcd does not answer: these are the volumes that this host remembers")
		}
		return all.Volumes, err
	}, nil)
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func (c *cli) inspect() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "inspect NAME...",
		Short: "Show all there is to know of volumes",
		Long: "Show all there is to know of volumes.\n\n" +
			"It prints JSON, or what --format makes of each volume. What is mounted is only known\n" +
			"on the host that has it mounted, and so are the containers.",
		Example:           c.example("inspect db", "inspect --format '{{.State}}' db"),
		ValidArgsFunction: complete(0, c.volumeNames(nil)),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("it takes at least one argument, NAME")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			found := []api.Volume{}
			var missing []string
			for _, name := range args {
				v, err := c.client().Volume(cmd.Context(), name)
				if err != nil {
					missing = append(missing, err.Error())
					continue
				}
				found = append(found, v)
			}
			if tmpl == nil {
				err = c.printJSON(found)
			} else {
				err = listing[api.Volume]{}.print(c.out, o, tmpl, found)
			}
			if err == nil && len(missing) > 0 {
				err = &failure{errors.New(strings.Join(missing, "\n"))}
			}
			return err
		},
	}
	o.formatFlag(cmd)
	return cmd
}

// printJSON prints as docker inspect does.
func (c *cli) printJSON(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "    ")
	if err := enc.Encode(v); err != nil {
		return &failure{fmt.Errorf("encode the answer: %w", err)}
	}
	if _, err := c.out.Write(b.Bytes()); err != nil {
		return &failure{fmt.Errorf("print the answer: %w", err)}
	}
	return nil
}

func (c *cli) status() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the cluster is, and what needs attention",
		Long: "Show how the cluster is, and what needs attention.\n\n" +
			"It ends with 3 if something does: a host that does not answer, a volume that cannot\n" +
			"be used, an etcd that does not answer. The storage is not asked; see backend ls.",
		Example: c.example("status"),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			s, err := c.client().Status(cmd.Context())
			if err != nil {
				return &failure{err}
			}
			if tmpl != nil {
				err = listing[api.Status]{}.print(c.out, o, tmpl, []api.Status{s})
			} else {
				err = c.printStatus(s)
			}
			if err == nil && len(s.Attention) > 0 {
				err = &attention{3}
			}
			return err
		},
	}
	o.formatFlag(cmd)
	return cmd
}

func (c *cli) printStatus(s api.Status) error {
	etcd := "answers"
	hosts := counts(s.Hosts)
	if s.Hosts == nil {
		hosts = "not known"
	}
	if s.Etcd != "" {
		etcd = "cannot be used"
	}
	if err := table(c.out, []string{
		"host\t" + s.Host, "plugin\t" + s.Version, "cluster\t" + dash(s.Cluster), "etcd\t" + etcd,
		"hosts\t" + hosts, "volumes\t" + counts(s.Volumes),
	}, true); err != nil {
		return err
	}
	for i, text := range s.Attention {
		if i == 0 {
			fmt.Fprintln(c.out, "\nneeds attention:")
		}
		fmt.Fprintln(c.out, "* "+wrap(text, "  "))
	}
	return nil
}

// versions are those of both sides.
type versions struct {
	Client string `json:"client"`
	Plugin string `json:"plugin,omitempty"`
	Host   string `json:"host,omitempty"`
}

func (c *cli) versionOf() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this command and of the plugin",
		Long:    "Show the version of this command and of the plugin.\n\nIt ends with 1 if the plugin does not answer.",
		Example: c.example("version", "version --format '{{.Plugin}}'"),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			plugin, failed := c.client().Version(cmd.Context())
			v := versions{version, plugin.Version, plugin.Host}
			if tmpl != nil {
				err = listing[versions]{}.print(c.out, o, tmpl, []versions{v})
			} else {
				lines := []string{"docker flocker\t" + v.Client}
				if failed == nil {
					lines = append(lines, "plugin\t"+v.Plugin+", on host "+v.Host)
				}
				err = table(c.out, lines, true)
			}
			if err == nil && failed != nil {
				err = &failure{failed}
			}
			return err
		},
	}
	o.formatFlag(cmd)
	return cmd
}

func (c *cli) nodeLs() *cobra.Command {
	return lists(c, "host name", &cobra.Command{
		Use:   "ls",
		Short: "List the hosts and whether they answer",
		Long: "List the hosts and whether they answer.\n\n" +
			"STATE is live, silent (for as long as this host itself has seen it) or declared\n" +
			"dead, and says whether the host is cordoned or removed. VOLUMES is how many volumes\n" +
			"it owns.",
		Example: c.example("node ls"),
	}, listing[api.Node]{
		header: "HOST\tSTATE\tVOLUMES\tBOOT\tID",
		row: func(n api.Node) string {
			return fmt.Sprintf("%s\t%s\t%d\t%s\t%s", n.Host, state(n), n.Volumes, short(n.Boot), n.ID)
		},
		name: func(n api.Node) string { return n.Host },
	}, func(cmd *cobra.Command) ([]api.Node, error) { return c.client().Nodes(cmd.Context()) }, nil)
}

func (c *cli) backendLs() *cobra.Command {
	return lists(c, "name", &cobra.Command{
		Use:   "ls",
		Short: "List this host's storage backends and whether they answer",
		Long: "List this host's storage backends and whether they answer.\n\n" +
			"CLASS says what stops a host that is silent: F1 and F2, the storage by itself;\n" +
			"F3 and F0, nothing but an operator. PROFILES and OPTIONS are what docker volume\n" +
			"create takes for volumes there. What is wrong with a backend that does not\n" +
			"answer stands below.",
		Example: c.example("backend ls"),
	}, listing[api.Backend]{
		header: "BACKEND\tTYPE\tCLASS\tSTATE\tPROFILES\tOPTIONS",
		row: func(b api.Backend) string {
			name, state := b.Name, "answers"
			if b.Default {
				name += " (default)"
			}
			if b.Error != "" {
				state = "does not answer"
			}
			return strings.Join([]string{name, b.Type, b.Class, state, dash(strings.Join(b.Profiles, ", ")), dash(strings.Join(b.Options, ", "))}, "\t")
		},
		name: func(b api.Backend) string { return b.Name },
	}, func(cmd *cobra.Command) ([]api.Backend, error) { return c.client().Backends(cmd.Context()) }, func(all []api.Backend) string {
		var wrong strings.Builder
		for _, b := range all {
			if b.Error != "" {
				fmt.Fprintf(&wrong, "%s: %s\n", b.Name, b.Error)
			}
		}
		return wrong.String()
	})
}

func state(n api.Node) string {
	var words []string
	switch {
	case n.Live:
		words = append(words, "live")
	case n.Death != nil:
	case n.Silent != nil:
		silent := time.Duration(*n.Silent * float64(time.Second)).Truncate(time.Second)
		words = append(words, "silent "+silent.String())
	default:
		words = append(words, "silent")
	}
	if n.Death != nil {
		words = append(words, "declared dead")
	}
	if n.State != "" {
		words = append(words, n.State)
	}
	return strings.Join(words, ", ")
}

// short is enough of a boot id to tell it from another.
func short(boot string) string { return boot[:min(8, len(boot))] }
