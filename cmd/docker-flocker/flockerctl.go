package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

// original is the name under which this is the original Flocker's command line, for
// scripts that have it.
const original = "flockerctl"

// flockerctl has the original's commands and columns.
func (c *cli) flockerctl() *cobra.Command {
	root := &cobra.Command{
		Use:   original,
		Short: "Flocker's volumes, as the original's command line shows them",
		Long: "Flocker's volumes, as the original's command line shows them.\n\n" +
			"It is for scripts that were written for the original; docker flocker does more. It\n" +
			"asks the plugin of this host, as root, and needs no certificate.",
		Example:           c.example("list", "list-nodes"),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRun:  c.noteUnused,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q for %q", args[0], original)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	flags := root.PersistentFlags()
	flags.StringVar(&c.socket, "socket", c.control(), "the plugin's control `socket`; FLOCKER_CONTROL in the environment is the same")
	for _, name := range unused {
		flags.String(name, "", "")
		_ = flags.MarkHidden(name) // it is there
	}
	root.AddCommand(c.listDatasets(), c.listNodes(), c.originalVersion(), c.completionOf(root))
	return c.prepare(root)
}

// unused are the flags by which the original finds a control service.
var unused = []string{"cluster-yml", "certs-path", "user", "cluster-crt", "control-service", "control-port"}

func (c *cli) noteUnused(cmd *cobra.Command, _ []string) {
	for _, name := range unused {
		if cmd.Flags().Changed(name) {
			fmt.Fprintf(c.errout, "--%s is of no use: the plugin of this host is asked\n", name)
		}
	}
}

func (c *cli) originalVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version", Args: none,
		RunE: func(*cobra.Command, []string) error {
			fmt.Fprintf(c.out, "%s version %s\n", original, version)
			return nil
		},
	}
}

func (c *cli) listNodes() *cobra.Command {
	var long bool
	cmd := &cobra.Command{
		Use: "list-nodes", Aliases: []string{"status"}, Short: "List the nodes that answer", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nodes, err := c.client().Nodes(cmd.Context())
			if err != nil {
				return &failure{err}
			}
			lines := []string{"SERVER\tADDRESS"}
			for _, n := range nodes {
				if n.Live {
					lines = append(lines, shown(n.ID, long)+"\t"+n.Host)
				}
			}
			return table(c.out, lines, long)
		},
	}
	cmd.Flags().BoolVarP(&long, "long", "l", false, "whole ids")
	return cmd
}

func (c *cli) listDatasets() *cobra.Command {
	var deleted, long, human bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the datasets", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.client().Volumes(cmd.Context())
			if err != nil {
				return &failure{err}
			}
			nodes, err := c.client().Nodes(cmd.Context())
			if err != nil {
				return &failure{err}
			}
			lines := []string{"DATASET\tSIZE\tMETADATA\tSTATUS\tSERVER"}
			for _, v := range all.Volumes {
				size := fmt.Sprint(v.Bytes)
				if human {
					size = fmt.Sprintf("%.2fG", float64(v.Bytes)/(1<<30))
				}
				lines = append(lines, strings.Join([]string{shown(v.ID, long), size, metadata(v), datasetStatus(v), server(v, nodes, long)}, "\t"))
			}
			return table(c.out, lines, long)
		},
	}
	flags := cmd.Flags()
	flags.Bool("help", false, "help for list") // -h is taken
	flags.BoolVarP(&deleted, "deleted", "d", false, "deleted ones as well; nothing is kept of them, so there are none")
	flags.BoolVarP(&long, "long", "l", false, "whole ids, and nothing shortened")
	flags.BoolVarP(&human, "human", "h", false, "sizes in GiB instead of bytes")
	return cmd
}

// shown is an id as the original shows it.
func shown(id string, long bool) string {
	if long {
		return id
	}
	return id[:min(8, len(id))]
}

// metadata is what the original would have been told of a volume.
func metadata(v api.Volume) string {
	words := []string{"name=" + v.Name}
	for _, key := range slices.Sorted(maps.Keys(v.Labels)) {
		words = append(words, key+"="+v.Labels[key])
	}
	return strings.Join(words, ",")
}

// datasetStatus is one of the original's words, or ours where it had none.
func datasetStatus(v api.Volume) string {
	switch v.State {
	case "mounted", "attached", "owned":
		return "attached ✅"
	case "free":
		return "detached"
	case "creating":
		return "pending ⌛"
	}
	return v.State // deleting is the original's, too
}

func server(v api.Volume, nodes []api.Node, long bool) string {
	for _, n := range nodes {
		if v.Host != "" && n.Host == v.Host {
			return shown(n.ID, long) + " (" + n.Host + ")"
		}
	}
	return "<missing>"
}
