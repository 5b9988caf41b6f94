package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

// completionTime bounds how long somebody waits who has pressed the tabulator.
const completionTime = 3 * time.Second

// Completions of an argument: word and, behind a tabulator, what it is.
type completion = func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective)

func (c *cli) completionOf(root *cobra.Command) *cobra.Command {
	write := map[string]func() error{
		"bash": func() error { return root.GenBashCompletionV2(c.out, true) },
		"fish": func() error { return root.GenFishCompletion(c.out, true) },
		"zsh":  func() error { return root.GenZshCompletion(c.out) },
	}
	shells := []string{"bash", "fish", "zsh"}
	return &cobra.Command{
		Use:   "completion bash|fish|zsh",
		Short: "Print what makes a shell complete this command",
		Long: "Print what makes a shell complete this command.\n\n" +
			"It is for " + root.Name() + " as a command of its own. For docker flocker Docker's\n" +
			"own completion does it, from Docker 23 on: see docker completion --help. Names of\n" +
			"volumes and hosts are only completed for root.",
		Example:   c.example("completion bash >/etc/bash_completion.d/" + root.Name()),
		ValidArgs: shells,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || write[args[0]] == nil {
				return fmt.Errorf("it takes the name of a shell: %s", strings.Join(shells, ", "))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := write[args[0]](); err != nil {
				return &failure{fmt.Errorf("print it: %w", err)}
			}
			return nil
		},
	}
}

// complete offers the names that all has, but those which are there already.
func complete(most int, all func(ctx context.Context) ([]string, error)) completion {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
		defer cancel()
		words, err := all(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp // there is no place for a text
		}
		return slices.DeleteFunc(words, func(word string) bool {
			name, _, _ := strings.Cut(word, "\t")
			return !strings.HasPrefix(name, begun) || slices.Contains(args, name)
		}), cobra.ShellCompDirectiveNoFileComp
	}
}

// volumeNames are those of the volumes that are as wished.
func (c *cli) volumeNames(which func(api.Volume) bool) func(context.Context) ([]string, error) {
	return func(ctx context.Context) (names []string, err error) {
		all, err := c.client().Volumes(ctx)
		for _, v := range all.Volumes {
			if which == nil || which(v) {
				names = append(names, v.Name+"\t"+v.State)
			}
		}
		return names, err
	}
}

// hostNames are those of the hosts that are as wished.
func (c *cli) hostNames(which func(api.Node) bool) func(context.Context) ([]string, error) {
	return func(ctx context.Context) (names []string, err error) {
		all, err := c.client().Nodes(ctx)
		for _, n := range all {
			if which == nil || which(n) {
				names = append(names, n.Host+"\t"+state(n))
			}
		}
		return names, err
	}
}

// words are always the same.
func words(of ...string) completion {
	return complete(0, func(context.Context) ([]string, error) { return slices.Clone(of), nil })
}

// completions says of each flag, and of each argument nothing was said of, what it is.
// It is not the name of a file, if that is not said here.
func completions(cmd *cobra.Command) {
	if cmd.ValidArgsFunction == nil && cmd.ValidArgs == nil {
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	}
	for name, what := range map[string]completion{
		"socket": cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault), "output": cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
		"dir":      cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs),
		"format":   words("json\tall there is, an object a line", "table\tfollowed by a template: with headings"),
		"metadata": cobra.NoFileCompletions, "size": cobra.NoFileCompletions, "timeout": cobra.NoFileCompletions, "opt": cobra.NoFileCompletions, "label": cobra.NoFileCompletions, "because": cobra.NoFileCompletions, "confirm": cobra.NoFileCompletions,
		"days": cobra.NoFileCompletions, "ip": cobra.NoFileCompletions, "name": cobra.NoFileCompletions,
	} {
		if cmd.LocalFlags().Lookup(name) == nil {
			continue
		}
		if _, ok := cmd.GetFlagCompletionFunc(name); !ok {
			_ = cmd.RegisterFlagCompletionFunc(name, what) // it has the flag
		}
	}
	for _, sub := range cmd.Commands() {
		completions(sub)
	}
}
