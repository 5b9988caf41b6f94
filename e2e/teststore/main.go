// Command teststore is a network block storage for tests, which can really cut a
// host off from a volume.
//
// `teststore server` keeps volumes as sparse files. What a host may use is a grant;
// the data of each grant is served by an nbdkit process of its own. To cut a host off
// is to kill that process and to see it gone: nothing the host sent can be written
// after that.
//
// `teststore initiator` runs on each host, apart from the plugin, as iscsid would. It
// makes a block device of a grant: nbdfuse shows the data as a file, and a loop
// device is on that. Both go on without it. What devices there are it asks the kernel.
//
// Package backends/teststore has the interface of both.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends/teststore"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "teststore:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("what shall it be, server or initiator?")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	dir := flags.String("dir", "", "working `directory`")
	switch args[0] {
	case "server":
		listen := flags.String("listen", "127.0.0.1:0", "`address` to listen on, for calls; data has ports of its own")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", *listen)
		if err != nil {
			return err
		}
		s, err := newServer(*dir, l.Addr())
		if err != nil {
			return err
		}
		return serve(ctx, l, s.operations())
	case "initiator":
		name := flags.String("name", "", "its `name`, unlike any other's")
		socket := flags.String("socket", "/run/flocker-teststore.sock", "unix `socket` to listen on")
		server := flags.String("server", "", "`URL` of the server")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if err := os.Remove(*socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		l, err := (&net.ListenConfig{}).Listen(ctx, "unix", *socket)
		if err != nil {
			return err
		}
		i := newInitiator(*name, *dir, *server)
		go i.watch(ctx)
		return serve(ctx, l, i.operations())
	}
	return fmt.Errorf("there is no %q", args[0])
}

// operation does what a request asks.
type operation func(ctx context.Context, req teststore.Request) (teststore.Reply, error)

// serve answers requests until ctx is done.
func serve(ctx context.Context, l net.Listener, operations map[string]operation) error {
	mux := http.NewServeMux()
	for name, do := range operations {
		mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, r *http.Request) {
			var req teststore.Request
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			reply, err := do(r.Context(), req)
			switch {
			case errors.Is(err, errRefused):
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
			case errors.Is(err, errDropped):
				panic(http.ErrAbortHandler) // closes the connection
			case err != nil:
				teststore.WriteError(w, err)
			default:
				w.Header().Set("Content-Type", "application/json")
				_ = json.NewEncoder(w).Encode(reply) // the caller sees that it is cut short
			}
		})
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
