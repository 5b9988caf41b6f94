package main

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// An etcd of several members serves hosts, and nobody else, with the certificates of
// docker flocker ca, set up as docs/cli.md says.
func TestEtcdWithCertificates(t *testing.T) {
	const year = 365 * 24 * time.Hour
	dir, other := t.TempDir(), t.TempDir()
	for _, dir := range []string{dir, other} {
		if err := certs.Init(dir, "prod", year); err != nil {
			t.Fatal(err)
		}
		authority, err := certs.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range []string{"alpha", "beta"} {
			if _, _, err := authority.Node(certs.Host{Name: host}, year); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := authority.User("anna", certs.User, year); err != nil {
			t.Fatal(err)
		}
	}

	peers, clients := map[string]string{}, map[string]string{}
	var cluster []string
	for _, host := range []string{"alpha", "beta"} {
		peers[host], clients[host] = freeAddress(t), freeAddress(t)
		cluster = append(cluster, host+"=https://"+peers[host])
	}
	started := make(chan *embed.Etcd, 2)
	for _, host := range []string{"alpha", "beta"} {
		c := embed.NewConfig()
		c.Name, c.Dir, c.InitialCluster = host, t.TempDir(), strings.Join(cluster, ",")
		c.ListenPeerUrls, c.ListenClientUrls = []url.URL{{Scheme: "https", Host: peers[host]}}, []url.URL{{Scheme: "https", Host: clients[host]}}
		c.AdvertisePeerUrls, c.AdvertiseClientUrls = c.ListenPeerUrls, c.ListenClientUrls
		secure := &c.ClientTLSInfo
		secure.TrustedCAFile, secure.ClientCertAuth, secure.AllowedHostnames = filepath.Join(dir, host, certs.CAFile), true, []string{certs.NodeName}
		secure.CertFile, secure.KeyFile = filepath.Join(dir, host, certs.NodeFile), filepath.Join(dir, host, certs.NodeKey)
		c.PeerTLSInfo = *secure
		c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
		go func() {
			etcd, err := embed.StartEtcd(c)
			if err != nil {
				t.Error(err)
			}
			started <- etcd
		}()
	}
	for range 2 {
		etcd := <-started
		if etcd == nil {
			continue
		}
		defer etcd.Close()
		select {
		case <-etcd.Server.ReadyNotify():
		case err := <-etcd.Err():
			t.Error(err)
		case <-time.After(time.Minute):
			t.Error("the members do not find each other")
		}
	}
	if t.Failed() {
		return
	}
	for _, host := range []string{"alpha", "beta"} {
		if err := writeTo(t, "https://"+clients[host], filepath.Join(dir, host)); err != nil {
			t.Errorf("host %s: %v", host, err)
		}
	}
	for who, holder := range map[string]string{
		"a user": filepath.Join(dir, "anna"), "a server": filepath.Join(dir, "alpha", "control-service"), "a host of another cluster": filepath.Join(other, "alpha", "node"),
	} {
		pair, err := tls.LoadX509KeyPair(holder+".crt", holder+".key")
		if err != nil {
			t.Fatal(err)
		}
		for _, address := range []string{clients["alpha"], peers["alpha"]} {
			if err := greet(t, address, pair); err == nil || !strings.HasPrefix(err.Error(), "remote error: tls: ") {
				t.Errorf("%s at %s: %v, want to be refused", who, address, err)
			}
		}
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "beta", certs.NodeFile), filepath.Join(dir, "beta", certs.NodeKey))
	if err != nil {
		t.Fatal(err)
	}
	if err := greet(t, clients["alpha"], pair); err != nil {
		t.Errorf("a host: %v", err)
	}
}

// writeTo writes to etcd as the host does whose certificates are in dir.
func writeTo(t *testing.T, endpoint, dir string) error {
	t.Helper()
	store, err := ownership.NewEtcd(ownership.EtcdConfig{
		Endpoints: []string{endpoint},
		CAFile:    filepath.Join(dir, certs.CAFile), CertFile: filepath.Join(dir, certs.NodeFile), KeyFile: filepath.Join(dir, certs.NodeKey),
	})
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = store.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: "x", Value: []byte("1")}}})
	return err
}

// greet connects with a certificate, whoever answers, and waits for the first word.
func greet(t *testing.T, address string, pair tls.Certificate) error {
	t.Helper()
	raw, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = raw.Close() }()
	_ = raw.SetDeadline(time.Now().Add(30 * time.Second))
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	})
	if _, err := conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, len("HTTP/")))
	return err
}
