package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
)

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "docker-flocker",
		Short: "Volumes that follow containers: hosts and repairs",
		Long: "Volumes that follow containers: hosts and repairs.\n\n" +
			"It asks the Flocker plugin of this host, as root. Volumes themselves are\n" +
			"made and removed with docker volume.",
		Example:           c.example("status", "ls", "node ls"),
		Version:           version,
		Annotations:       map[string]string{cobra.CommandDisplayNameAnnotation: c.name},
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&c.socket, "socket", c.control(), "the plugin's control `socket`; FLOCKER_CONTROL in the environment is the same")
	root.AddCommand(
		c.ls(), c.inspect(), c.create(), c.rm(), c.move(), c.status(), c.events(), c.doctor(), c.supportBundle(), c.versionOf(),
		c.group("node", "The hosts of the cluster", c.nodeLs(), c.cordon(), c.uncordon(), c.drain(), c.confirmDead(), c.removeNode()),
		c.group("backend", "The storage backends of this host", c.backendLs()),
		c.group("volume", "Repairs of volumes", c.reinstate()),
		c.group("cluster", "Repairs of the cluster as a whole", c.acceptRestore()),
		c.group("ca", "Certificates of the cluster's hosts and users", c.caInit(), c.caNode(), c.caUser()),
		c.completionOf(root),
	)
	return c.prepare(root)
}

// control is the socket that is asked if no other is named.
func (c *cli) control() string { return cmp.Or(c.socket, api.Socket) }

// prepare does what is the same for all commands.
func (c *cli) prepare(root *cobra.Command) *cobra.Command {
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.errout)
	completions(root)
	return root
}

// group is a command that only has others.
func (c *cli) group(name, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: name, Short: short, DisableFlagsInUseLine: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(commands...)
	return cmd
}

func (c *cli) example(commands ...string) string {
	for i, command := range commands {
		commands[i] = "  " + c.name + " " + command
	}
	return strings.Join(commands, "\n")
}

// none and one are the arguments a command takes.
func none(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("it takes no argument, and %q is one", args[0])
	}
	return nil
}

func one(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return fmt.Errorf("it takes one argument, %s", what)
		}
		return nil
	}
}

func (c *cli) confirmDead() *cobra.Command {
	var body api.Confirmation
	cmd := &cobra.Command{
		Use:   "confirm-dead HOST",
		Short: "Say that a host is dead, so that others can mount its volumes",
		Long: "Say that a host is dead, so that others can mount its volumes.\n\n" +
			"Switch the host off first, or make sure that it is off. If it runs on and its\n" +
			"storage cannot cut it off, two hosts write one volume, which destroys it. HOST is\n" +
			"a name or an id that the command node ls shows. When the host comes back it first\n" +
			"gives up what others may have, and then is an ordinary host again.\n\n" +
			"A host that answers is not declared dead without --force, and that asks for its\n" +
			"name a second time; where there is no terminal, with --confirm. A live host that is\n" +
			"declared dead gives up its volumes under the containers that use them. Others mount\n" +
			"them when it has; or after half a minute, if it says nothing.",
		Example: c.example(
			`node confirm-dead host-a --because "power supply burnt, unplugged"`,
			"node confirm-dead host-a --force --confirm host-a"),
		Args:              one("HOST"),
		ValidArgsFunction: complete(1, c.hostNames(func(n api.Node) bool { return n.Death == nil })),
		RunE: func(cmd *cobra.Command, args []string) error {
			host := args[0]
			switch {
			case !body.Force && body.Typed != "":
				return errors.New("--confirm goes together with --force")
			case body.Force && body.Typed == "":
				var err error
				body.Typed, err = c.typed("Host "+host+" will be recorded as dead even if it is running. If it is, its containers lose\n"+
					"their volumes. If it hangs and does not hear of that, other hosts mount them after half\n"+
					"a minute; what it writes then destroys them.", "the host's name", host)
				if err != nil {
					return err
				}
			}
			body.By = c.by
			done, err := c.client().ConfirmDead(cmd.Context(), host, body)
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintln(c.out, consequences(done))
			return nil
		},
	}
	cmd.Flags().StringVar(&body.Because, "because", "", "how you know: it is kept as evidence, with your name")
	cmd.Flags().BoolVar(&body.Force, "force", false, "even if the host answers")
	cmd.Flags().StringVar(&body.Typed, "confirm", "", "`HOST` a second time, for --force in a script")
	return cmd
}

// consequences says what is so now that a host is declared dead.
func consequences(done api.Confirmed) string {
	var b strings.Builder
	fmt.Fprintf(&b, "host %s (boot %s) is recorded as dead. ", done.Death.Host, short(done.Death.Boot))
	when := "now"
	if done.Death.Forced {
		when = "when it has given them up, or in half a minute if it does not say so"
	}
	switch {
	case done.Volumes == nil:
		b.WriteString("Its volumes can be mounted on other hosts " + when + ".")
	case len(done.Volumes) == 0:
		b.WriteString("It owns no volumes.")
	default:
		b.WriteString("Its volumes can be mounted on other hosts " + when + ": " + strings.Join(done.Volumes, ", ") + ".")
	}
	fmt.Fprintf(&b, "\nIf host %s is running after all, switch it off at once: until its plugin reaches etcd "+
		"and closes what it has open, it may write to volumes that another host has mounted.", done.Death.Host)
	return b.String()
}

func (c *cli) reinstate() *cobra.Command {
	return &cobra.Command{
		Use:   "reinstate NAME",
		Short: "Let a volume in quarantine be mounted again",
		Long: "Let a volume in quarantine be mounted again.\n\n" +
			"A volume is put there when using it might damage it further; docker volume inspect\n" +
			"says why (Status.detail). Look into that first: nothing is repaired by this.",
		Example:           c.example("volume reinstate db"),
		Args:              one("NAME"),
		ValidArgsFunction: complete(1, c.volumeNames(func(v api.Volume) bool { return v.State == "quarantined" })),
		RunE: func(cmd *cobra.Command, args []string) error {
			done, err := c.client().Reinstate(cmd.Context(), args[0], api.Reinstatement{By: c.by})
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "volume %s is out of quarantine and can be mounted again\n", done.Volume)
			return nil
		},
	}
}

func (c *cli) acceptRestore() *cobra.Command {
	var body api.Acceptance
	cmd := &cobra.Command{
		Use:   "accept-restore",
		Short: "Go on with an etcd that was restored from a backup",
		Long: "Go on with an etcd that was restored from a backup.\n\n" +
			"The hosts refuse an etcd that knows less than they have seen: it may give a volume\n" +
			"to one host that another one has mounted since. Before this, stop every container\n" +
			"that uses a volume of Flocker, on every host. It asks for the word " + api.Restored + ";\n" +
			"where there is no terminal, with --confirm.",
		Example: c.example("cluster accept-restore", "cluster accept-restore --confirm "+api.Restored),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if body.Typed == "" {
				var err error
				body.Typed, err = c.typed("Every container that uses a volume of Flocker has to be stopped, on every host.\n"+
					"If one is not, two hosts may write one volume, which destroys it.", "the word "+api.Restored, api.Restored)
				if err != nil {
					return err
				}
			}
			body.By = c.by
			done, err := c.client().AcceptRestore(cmd.Context(), body)
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "the restored etcd is accepted: the cluster is at generation %d now. "+
				"Hosts that have refused it register by themselves; see %s node ls\n", done.Generation, c.name)
			return nil
		},
	}
	cmd.Flags().StringVar(&body.Typed, "confirm", "", "the `word` "+api.Restored+", for scripts")
	_ = cmd.RegisterFlagCompletionFunc("confirm", words(api.Restored)) // it has the flag
	return cmd
}
