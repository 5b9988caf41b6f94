// Command etcd is one member of the etcd cluster of the test rig: the version in
// go.mod, with the defaults except where it listens; and, with certificates of docker
// flocker ca, set up as docs/cli.md says.
package main

import (
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/flocker-plugin/flocker/control/certs"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg := embed.NewConfig()
	var addr, dir string
	flag.StringVar(&cfg.Name, "name", "", "the member's `name`")
	flag.StringVar(&cfg.Dir, "dir", "", "data `directory`")
	flag.StringVar(&addr, "addr", "", "IP `address` to listen on")
	flag.StringVar(&cfg.InitialCluster, "cluster", "", "all `members`: name=peer URL, comma separated")
	flag.StringVar(&dir, "certs", "", "`directory` with its certificates; empty: without TLS")
	flag.Parse()

	scheme := "http"
	if dir != "" {
		scheme = "https"
		secure := &cfg.ClientTLSInfo
		secure.CertFile, secure.KeyFile = filepath.Join(dir, certs.NodeFile), filepath.Join(dir, certs.NodeKey)
		secure.TrustedCAFile, secure.ClientCertAuth = filepath.Join(dir, certs.CAFile), true
		secure.AllowedHostnames = []string{certs.NodeName}
		cfg.PeerTLSInfo = *secure
	}
	client := url.URL{Scheme: scheme, Host: addr + ":2379"}
	peer := url.URL{Scheme: scheme, Host: addr + ":2380"}
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
