package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/certs"
)

// maxDays of a certificate's life; longer than its authority's it is not.
const maxDays = int(certs.Lifetime / (24 * time.Hour))

// made is what is common to the commands that make certificates.
type made struct {
	dir  string
	days int
}

func (m *made) flags(cmd *cobra.Command) {
	m.dirFlag(cmd)
	cmd.Flags().IntVar(&m.days, "days", maxDays/2, "for how many days it is good")
}

func (m *made) dirFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.dir, "dir", ".", "the authority's `directory`")
}

func (m *made) lifetime() (time.Duration, error) {
	if m.days < 1 || m.days > maxDays {
		return 0, fmt.Errorf("--days is from 1 to %d, and %d is not", maxDays, m.days)
	}
	return time.Duration(m.days) * 24 * time.Hour, nil
}

// in is how a file of the authority's directory is written.
func (m *made) in(file string) string { return filepath.Join(m.dir, file) }

func (c *cli) caInit() *cobra.Command {
	var m made
	cmd := &cobra.Command{
		Use:   "init [CLUSTER]",
		Short: "Make a cluster's certificate authority",
		Long: "Make a cluster's certificate authority.\n\n" +
			"It makes cluster.crt and cluster.key in the directory where it is typed, and never\n" +
			"replaces them. Whoever has cluster.key can make certificates that may do everything:\n" +
			"keep it, and a copy, off the hosts of the cluster. The plugin is not needed for it.",
		Example: c.example("ca init prod"),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return errors.New("it takes one argument at most, CLUSTER")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			name := "flocker"
			if len(args) > 0 {
				name = args[0]
			}
			if err := certs.Init(m.dir, name, certs.Lifetime); err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "made %s and %s, the authority of cluster %s\n"+
				"Whoever has %s can make certificates that may do everything: keep it off the hosts.\n"+
				"Next, for each host: %s ca node HOST --ip ADDRESS\n",
				m.in(certs.CAFile), m.in(certs.CAKey), name, certs.CAKey, c.name)
			return nil
		},
	}
	m.dirFlag(cmd)
	return cmd
}

func (c *cli) caNode() *cobra.Command {
	var (
		m    made
		host certs.Host
		ips  []string
	)
	cmd := &cobra.Command{
		Use:   "node HOST",
		Short: "Make a host's certificates",
		Long: "Make a host's certificates.\n\n" +
			"It makes a directory with the host's name: cluster.crt, node.crt and node.key, by\n" +
			"which the host shows others that it is one of the cluster, and control-service.crt\n" +
			"and control-service.key, by which it answers users. They are for the host's name,\n" +
			"for localhost, and for what is given with --ip and --name. An address by which\n" +
			"somebody connects to the host has to be among them.",
		Example: c.example("ca node alpha --ip 10.0.0.1", "ca node alpha --ip 10.0.0.1 --ip fd00::1 --name alpha.example.com"),
		Args:    one("HOST"),
		RunE: func(_ *cobra.Command, args []string) error {
			lifetime, err := m.lifetime()
			if err != nil {
				return err
			}
			host.Name = args[0]
			for _, text := range ips {
				ip := net.ParseIP(text)
				if ip == nil {
					return fmt.Errorf("--ip takes an address, such as 10.0.0.1, and %q is none", text)
				}
				host.IPs = append(host.IPs, ip)
			}
			authority, err := certs.Open(m.dir)
			if err != nil {
				return &failure{err}
			}
			names, until, err := authority.Node(host, lifetime)
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "made %s, with %s, %s, %s, %s and %s\n"+
				"They are for %s, until %s.\n"+
				"Copy the directory to the host, as root's and for root alone, and remove it here.\n",
				m.in(host.Name), certs.CAFile, certs.NodeFile, certs.NodeKey, certs.ServerFile, certs.ServerKey,
				strings.Join(names, ", "), until.UTC().Format(time.DateOnly))
			return nil
		},
	}
	m.flags(cmd)
	cmd.Flags().StringArrayVar(&ips, "ip", nil, "an `address` of the host; may be repeated")
	cmd.Flags().StringArrayVar(&host.Names, "name", nil, "another `name` of the host; may be repeated")
	return cmd
}

func (c *cli) caUser() *cobra.Command {
	var (
		m        made
		readOnly bool
	)
	cmd := &cobra.Command{
		Use:   "user NAME",
		Short: "Make a user's certificate",
		Long: "Make a user's certificate.\n\n" +
			"It makes NAME.crt and NAME.key. The user needs these and cluster.crt. He may do\n" +
			"everything over the API of the cluster; with --read-only, look at everything and\n" +
			"change nothing. A certificate cannot be taken back before its time is over, other\n" +
			"than by a new authority: choose --days accordingly.",
		Example: c.example("ca user anna", "ca user grafana --read-only"),
		Args:    one("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			lifetime, err := m.lifetime()
			if err != nil {
				return err
			}
			name, role, may := args[0], certs.User, "do everything"
			if readOnly {
				role, may = certs.Reader, "look and change nothing"
			}
			authority, err := certs.Open(m.dir)
			if err != nil {
				return &failure{err}
			}
			until, err := authority.User(name, role, lifetime)
			if err != nil {
				return &failure{err}
			}
			fmt.Fprintf(c.out, "made %s and %s: user %s may %s, until %s\n"+
				"Give them to the user together with %s, and remove the key here.\n",
				m.in(name+".crt"), m.in(name+".key"), name, may, until.UTC().Format(time.DateOnly), m.in(certs.CAFile))
			return nil
		},
	}
	m.flags(cmd)
	cmd.Flags().BoolVar(&readOnly, "read-only", false, "the user may look and change nothing")
	return cmd
}
