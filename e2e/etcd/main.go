// Command etcd is one member of the etcd cluster of the test rig: the version in
// go.mod, with the defaults except where it listens.
package main

import (
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg := embed.NewConfig()
	var addr string
	flag.StringVar(&cfg.Name, "name", "", "the member's `name`")
	flag.StringVar(&cfg.Dir, "dir", "", "data `directory`")
	flag.StringVar(&addr, "addr", "", "IP `address` to listen on")
	flag.StringVar(&cfg.InitialCluster, "cluster", "", "all `members`: name=peer URL, comma separated")
	flag.Parse()

	client := url.URL{Scheme: "http", Host: addr + ":2379"}
	peer := url.URL{Scheme: "http", Host: addr + ":2380"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.LogLevel = "warn"

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	defer server.Close()
	select {
	case err := <-server.Err():
		return err
	case <-signals:
		return nil
	}
}
