// Command docker-flocker is what an operator types beside Docker's own commands:
// `docker flocker …` where it is one of the Docker CLI's plugins, docker-flocker …
// elsewhere. It asks the Flocker plugin of this host, on its control socket.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"github.com/flocker-plugin/flocker/control/api"
)

// version is set by the linker.
var version = "development"

// The Docker CLI's side of its plugins: it asks each with one word what it is, and
// says who calls in the environment.
const (
	metadataCommand = "docker-cli-plugin-metadata"
	callerVariable  = "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND"
)

func main() {
	c := &cli{
		in: os.Stdin, out: os.Stdout, errout: os.Stderr,
		// /dev/null passes for a terminal; nothing is ever typed on it.
		terminal: isTerminal(os.Stdin),
		watched:  isTerminal(os.Stderr),
		by:       by(),
		name:     "docker-flocker",
		socket:   os.Getenv("FLOCKER_CONTROL"),
	}
	args := os.Args[1:]
	if filepath.Base(os.Args[0]) == original {
		c.name = original
	}
	if os.Getenv(callerVariable) != "" || completedByDocker(args) {
		c.name, args = "docker flocker", own(args)
	}
	os.Exit(c.run(context.Background(), args))
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// A cli runs one command.
type cli struct {
	in          io.Reader
	out, errout io.Writer
	terminal    bool   // somebody is there to ask
	watched     bool   // somebody sees errout while it is written
	by          string // who that is
	name        string // what was typed to get here
	socket      string
	machine     func(context.Context) machine // nil: this one
}

// A failure is the end of a command that was typed correctly.
type failure struct{ error }

// run returns the exit code: 1 if it was refused or failed, or doctor has found
// something, 2 for what cannot be understood, 3 if status tells of something.
func (c *cli) run(ctx context.Context, args []string) int {
	if slices.Equal(args, []string{metadataCommand}) {
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		if enc.Encode(pluginMetadata{"0.1.0", "The Flocker authors", version, "Volumes that follow containers: hosts and repairs", "https://github.com/flocker-plugin/flocker"}) != nil {
			return 1
		}
		return 0
	}
	root := c.root() //nolint:contextcheck // the commands get ctx with ExecuteContextC
	if c.name == original {
		root = c.flockerctl() //nolint:contextcheck // the same
	}
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if found, ok := errors.AsType[*attention](err); ok {
		return found.code // it has been printed
	}
	fmt.Fprintln(c.errout, err)
	if _, ok := errors.AsType[*failure](err); ok {
		return 1
	}
	fmt.Fprintf(c.errout, "See '%s --help'.\n", cmd.CommandPath())
	return 2
}

// pluginMetadata is what the Docker CLI wants to know.
type pluginMetadata struct {
	SchemaVersion, Vendor, Version, ShortDescription, URL string
}

// completedByDocker says that the shell completes a line that begins with docker
// flocker. Docker's script for it calls its plugins with that line, and no sign in the
// environment.
func completedByDocker(args []string) bool {
	if len(args) == 0 || !strings.HasPrefix(args[0], "__complete") {
		return false
	}
	for i, arg := range args[1:] {
		switch {
		case slices.Contains(withValue, args[i]):
		case arg == "flocker":
			return true
		case !strings.HasPrefix(arg, "-"):
			return false
		}
	}
	return false
}

// withValue are the flags of the Docker CLI that take one.
var withValue = []string{"-c", "--context", "--config", "-H", "--host", "-l", "--log-level", "--tlscacert", "--tlscert", "--tlskey"}

// own is the part of the arguments that is for us. The Docker CLI passes all of
// its own, too: docker --debug flocker node ls.
func own(args []string) []string {
	var kept []string
	for i, arg := range args {
		switch {
		case arg == metadataCommand:
			return args[i:]
		case i > 0 && slices.Contains(withValue, args[i-1]):
		case arg == "flocker":
			return append(kept, args[i+1:]...)
		case arg == "help", arg == "--help", strings.HasPrefix(arg, "__complete"):
			kept = append(kept, arg)
		}
	}
	return kept
}

// by is who types, as far as this host knows: user@host.
func by() string {
	name := os.Getenv("SUDO_USER")
	if name == "" {
		name = "unknown"
		if u, err := user.Current(); err == nil {
			name = u.Username
		}
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host
}

// typed asks for a word on the terminal. Without one to ask on, it has to be an
// argument.
func (c *cli) typed(warning, what, word string) (string, error) {
	if !c.terminal {
		return "", fmt.Errorf("there is no terminal to ask on: add --confirm %s", word)
	}
	fmt.Fprintf(c.errout, "%s\nType %s to go on: ", warning, what)
	line, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil {
		fmt.Fprintln(c.errout)
	}
	if got := strings.TrimSpace(line); got != word {
		return "", &failure{fmt.Errorf("%q is not %q: nothing was changed", got, word)}
	}
	return word, nil
}

func (c *cli) client() *api.Client { return &api.Client{Socket: c.socket} }
