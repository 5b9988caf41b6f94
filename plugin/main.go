// Command flocker-plugin is Flocker on one host: a Docker volume driver on a unix
// socket. It runs as a managed plugin or under systemd, and is the same in both.
package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/loopback"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// version is set by the linker.
var version = "development"

// opener makes the backend of this node.
type opener func(settings, ownership.Node) backends.Backend

// registry is every storage backend that is there without backends.yaml (storage.go),
// but for testBackends.
var registry = map[string]opener{
	"loopback": func(s settings, node ownership.Node) backends.Backend {
		return loopback.New(loopback.Config{Dir: s.LoopbackDir, Node: node.ID, Preallocate: s.LoopbackPreallocate})
	},
}

func main() {
	switch command := strings.Join(os.Args[1:], " "); command {
	case "":
		os.Exit(run())
	case "version":
		fmt.Println(version)
	case "settings":
		fmt.Print(settingsTable())
	case "backends":
		os.Exit(listBackends())
	default:
		fmt.Fprintf(os.Stderr, "flocker-plugin: unknown command %q; valid: version, settings, backends, or none to run\n", command)
		os.Exit(2)
	}
}

// configuration is what the environment and backends.yaml say.
func configuration() (s settings, warnings []string, more []configured, err error) {
	maps.Copy(registry, testBackends)
	if s, warnings, err = settingsFrom(os.Environ()); err == nil {
		more, err = loadBackends(s)
	}
	return s, warnings, more, err
}

// listBackends says what the process would have if it were started now, and whether
// something is wrong with that.
func listBackends() (code int) {
	_, _, more, err := configuration()
	if err != nil {
		fmt.Fprintln(os.Stderr, "flocker-plugin:", err)
		return 1
	}
	for _, name := range slices.Sorted(maps.Keys(registry)) {
		fmt.Println(name)
	}
	for _, c := range more {
		fmt.Printf("%s (%s)\n", c.name, c.kind)
		if err := c.secrets(); err != nil {
			fmt.Fprintln(os.Stderr, "flocker-plugin:", err)
			code = 1
		}
	}
	return code
}

// managed says that Docker runs this process as a plugin: it is the first one of its
// namespace.
func managed() bool { return os.Getpid() == 1 }

// run is the life of the process. It ends with 1 for a configuration that is
// wrong; whatever may get right again by itself is tried until it does.
func run() int {
	s, warnings, more, err := configuration()
	if err != nil {
		fmt.Fprintln(os.Stderr, "flocker-plugin:", err)
		return 1
	}
	stdout, stderr := newAsyncWriter(os.Stdout), newAsyncWriter(os.Stderr)
	defer stdout.flush()
	defer stderr.flush()
	log := newLog(stdout, s.level())

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Docker gives a managed plugin 9.5 s from its start to listen.
	l, err := listen(ctx, s.Socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "flocker-plugin:", err)
		return 1
	}
	for _, w := range warnings {
		log.Warn(w)
	}
	log.WithFields(logrus.Fields{"version": version, "host": s.Hostname}).Info("listening")
	context.AfterFunc(ctx, func() {
		time.AfterFunc(exitLimit, func() { os.Exit(0) }) // before Docker kills us
	})

	// The background goes on while the calls in flight end.
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var work sync.WaitGroup
	srv := newServer(s.MountDeadline, log, stderr)
	work.Go(func() { start(background, s, more, srv, stop, log) })
	err = srv.serve(ctx, l)
	end()
	work.Wait()
	if err != nil {
		log.WithField("err", err).Error("ended")
		return 1
	}
	log.Info("ended; what is mounted stays mounted")
	return 0
}

// exitLimit is the time from SIGTERM to the end, whatever hangs.
const exitLimit = drainLimit + 800*time.Millisecond
