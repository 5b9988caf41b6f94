// Command hosts starts Docker hosts of the test rig and keeps them until it is
// interrupted, to try things out by hand: `make hosts`.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

func main() {
	var cfg rig.Config
	flag.IntVar(&cfg.Hosts, "n", 3, "how many hosts")
	flag.StringVar((*string)(&cfg.Engine), "engine", string(rig.Debian), "Docker's version: 20.10 or 29")
	bare := flag.Bool("bare", false, "without the plugin, etcd and a Swarm")
	flag.Parse()
	cfg.Logf = func(format string, args ...any) { fmt.Printf("# "+format+"\n", args...) }
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, cfg, *bare); err != nil {
		fmt.Fprintln(os.Stderr, "hosts:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, cfg rig.Config, bare bool) error {
	starting, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	r, err := rig.Start(starting, cfg)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if closeErr := r.Close(closing); closeErr != nil {
			fmt.Fprintln(os.Stderr, "hosts:", closeErr)
		}
	}()
	if err := r.ImportImage(starting); err != nil {
		return err
	}
	if !bare {
		if err := fill(starting, r); err != nil {
			return fmt.Errorf("%w\n%s", err, r.Logs(20))
		}
	}
	for _, h := range r.Hosts {
		fmt.Printf("alias %s='%s docker'   # %s, logs and /var/lib in %s\n", h.Name, strings.Join(h.Env(), " "), h.Addr, h.Dir)
	}
	fmt.Println("# Ctrl-C ends them")
	<-ctx.Done()
	return nil
}

// fill makes the hosts a Swarm with the plugin on each.
func fill(ctx context.Context, r *rig.Rig) error {
	if err := r.Swarm(ctx); err != nil {
		return err
	}
	endpoints, err := r.Etcd(ctx)
	if err != nil {
		return err
	}
	return r.InstallPlugin(ctx, map[string]string{"FLOCKER_ETCD_ENDPOINTS": strings.Join(endpoints, ",")})
}
