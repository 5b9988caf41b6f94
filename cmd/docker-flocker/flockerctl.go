package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
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
	root.AddCommand(c.listDatasets(), c.listNodes(), c.createDataset(), c.destroyDataset(), c.moveDataset(), c.originalVersion(), c.completionOf(root))
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
					lines = append(lines, shown(n.ID, long)+"\t"+address(n))
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

// address is how the original knew a node.
func address(n api.Node) string { return cmp.Or(n.Address, n.Host) }

func server(v api.Volume, nodes []api.Node, long bool) string {
	for _, n := range nodes {
		if v.Host != "" && n.Host == v.Host {
			return shown(n.ID, long) + " (" + address(n) + ")"
		}
	}
	return "<missing>"
}

func (c *cli) createDataset() *cobra.Command {
	var node, meta, size string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a dataset", Args: none,
		Long: "Make a dataset.\n\n" +
			"The word name of its metadata becomes the volume's name; without one it is called by\n" +
			"its id. The word clusterhq:flocker:profile becomes its profile, the others its labels.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if node == "" {
				return errors.New("--node is missing")
			}
			body := api.Creation{ID: newID(), By: c.by, Options: map[string]string{}}
			if meta != "" {
				var err error
				if body.Labels, err = pairs("--metadata", strings.Split(meta, ",")); err != nil {
					return err
				}
			}
			body.Name = cmp.Or(body.Labels["name"], body.ID)
			for option, value := range map[string]string{"profile": body.Labels["clusterhq:flocker:profile"], "size": size} {
				if value != "" {
					body.Options[option] = value
				}
			}
			delete(body.Labels, "name")
			delete(body.Labels, "clusterhq:flocker:profile")
			on, err := c.findNode(cmd.Context(), node)
			if err != nil {
				return &failure{err}
			}
			made, err := c.client().Create(cmd.Context(), body)
			if err != nil {
				return &failure{err}
			}
			if _, err := c.client().Move(cmd.Context(), made.Name, api.Movement{Host: &on.ID, By: c.by}); err != nil {
				return &failure{fmt.Errorf("dataset %s is made, and is on no node yet: %w", shown(made.ID, false), err)}
			}
			fmt.Fprintf(c.out, "made dataset %s, to be on %s; flockerctl list shows when it is\n", shown(made.ID, false), on.Host)
			return nil
		},
	}
	cmd.Flags().StringVarP(&node, "node", "n", "", "the node, by the beginning of its `id`")
	cmd.Flags().StringVarP(&meta, "metadata", "m", "", "`words` such as name=db,team=blue")
	cmd.Flags().StringVarP(&size, "size", "s", "", "`size`, such as 50G")
	_ = cmd.RegisterFlagCompletionFunc("node", complete(0, c.nodeIDs)) // it has the flag
	return cmd
}

func (c *cli) destroyDataset() *cobra.Command {
	var dataset string
	cmd := &cobra.Command{
		Use: "destroy", Short: "Remove a dataset and what is on it, unless it is in use", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dataset == "" {
				return errors.New("--dataset is missing")
			}
			v, err := c.findDataset(cmd.Context(), dataset)
			if err == nil {
				err = c.client().Remove(cmd.Context(), v.Name, api.By{By: c.by})
			}
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "removed dataset %s, name=%s\n", shown(v.ID, false), v.Name)
			return nil
		},
	}
	c.datasetFlag(cmd, &dataset)
	return cmd
}

func (c *cli) moveDataset() *cobra.Command {
	var dataset, destination string
	cmd := &cobra.Command{
		Use: "move", Short: "Say on which node a dataset is to be", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dataset == "" || destination == "" {
				return errors.New("both --dataset and --destination are needed")
			}
			v, err := c.findDataset(cmd.Context(), dataset)
			if err != nil {
				return &failure{err}
			}
			to, err := c.findNode(cmd.Context(), destination)
			if err == nil {
				_, err = c.client().Move(cmd.Context(), v.Name, api.Movement{Host: &to.ID, By: c.by})
			}
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "dataset %s is to be on %s: it moves when nothing uses it; flockerctl list shows when it has\n", shown(v.ID, false), to.Host)
			return nil
		},
	}
	c.datasetFlag(cmd, &dataset)
	cmd.Flags().StringVarP(&destination, "destination", "t", "", "the node, by the beginning of its `id`")
	_ = cmd.RegisterFlagCompletionFunc("destination", complete(0, c.nodeIDs)) // it has the flag
	return cmd
}

func (c *cli) datasetFlag(cmd *cobra.Command, dataset *string) {
	cmd.Flags().StringVarP(dataset, "dataset", "d", "", "the dataset, by the beginning of its `id`")
	_ = cmd.RegisterFlagCompletionFunc("dataset", complete(0, func(ctx context.Context) (ids []string, err error) {
		all, err := c.client().Volumes(ctx)
		for _, v := range all.Volumes {
			ids = append(ids, shown(v.ID, false)+"\t"+v.Name)
		}
		return ids, err
	})) // it has the flag
}

func (c *cli) nodeIDs(ctx context.Context) (ids []string, err error) {
	all, err := c.client().Nodes(ctx)
	for _, n := range all {
		ids = append(ids, shown(n.ID, false)+"\t"+n.Host)
	}
	return ids, err
}

func (c *cli) findNode(ctx context.Context, prefix string) (api.Node, error) {
	all, err := c.client().Nodes(ctx)
	if err != nil {
		return api.Node{}, err
	}
	return only(all, "node", prefix, func(n api.Node) string { return n.ID })
}

func (c *cli) findDataset(ctx context.Context, prefix string) (api.Volume, error) {
	all, err := c.client().Volumes(ctx)
	if err != nil {
		return api.Volume{}, err
	}
	return only(all.Volumes, "dataset", prefix, func(v api.Volume) string { return v.ID })
}

// only is the one whose id begins with that.
func only[T any](all []T, what, prefix string, id func(T) string) (found T, err error) {
	n := 0
	for _, one := range all {
		if strings.HasPrefix(id(one), strings.ToLower(prefix)) {
			found, n = one, n+1
		}
	}
	switch n {
	case 0:
		return found, fmt.Errorf("no %s uuids matching %s", what, prefix)
	case 1:
		return found, nil
	}
	return found, fmt.Errorf("%s is ambiguous %s", prefix, what)
}

// newID is a random UUID.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
