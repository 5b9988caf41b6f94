package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// An etcd of several members serves hosts, and nobody else, with the certificates of
// docker flocker ca, set up as docs/cli.md says.
func TestEtcdWithCertificates(t *testing.T) {
	dir, other := authority(t), authority(t)
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
		pair := pairOf(t, holder)
		for _, address := range []string{clients["alpha"], peers["alpha"]} {
			if err := greet(t, address, pair); err == nil || !strings.HasPrefix(err.Error(), "remote error: tls: ") {
				t.Errorf("%s at %s: %v, want to be refused", who, address, err)
			}
		}
	}
	if err := greet(t, clients["alpha"], pairOf(t, filepath.Join(dir, "beta", "node"))); err != nil {
		t.Errorf("a host: %v", err)
	}
}

// The etcd inside the plugin takes hosts alone, and new certificates without a restart.
func TestEtcdInsideWithCertificates(t *testing.T) {
	defer func(before time.Duration) { refusals = before }(refusals)
	refusals = 0
	dir, other, out := authority(t), authority(t), &lockedBuffer{}
	log := logrus.New()
	log.SetOutput(out)
	mine := filepath.Join(dir, "alpha")
	endpoint, stop, err := startEtcd(t.Context(), etcdConfig{Dir: t.TempDir(), Listen: freeAddress(t), Certs: mine, Log: logrus.NewEntry(log)})
	if err != nil {
		t.Fatal(err)
	}
	address, ok := strings.CutPrefix(endpoint, "https://")
	if !ok {
		t.Errorf("endpoint %s", endpoint)
	}
	for _, host := range []string{"alpha", "beta"} {
		if err := writeTo(t, endpoint, filepath.Join(dir, host)); err != nil {
			t.Errorf("host %s: %v", host, err)
		}
	}
	// logged waits for the one line that what was done since has to leave.
	logged := func(before int, want string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			got := out.String()[before:]
			if strings.Contains(got, want) && strings.Count(got, "\n") == 1 {
				return
			}
			if time.Now().After(end) {
				t.Errorf("logged %s, want one line with %s", got, want)
				return
			}
		}
	}
	for who, test := range map[string]struct{ holder, told, logged string }{
		"a user":                      {filepath.Join(dir, "anna"), "bad certificate", "user-anna may not connect here: it is a certificate of the role user"},
		"a reader":                    {filepath.Join(dir, "rita"), "bad certificate", "reader-rita may not connect here: it is a certificate of the role reader"},
		"a server":                    {filepath.Join(mine, "control-service"), "bad certificate", "certificate specifies an incompatible key usage"},
		"nobody":                      {"", "certificate required", "client didn't provide a certificate"},
		"a host whose time is over":   {filepath.Join(dir, "late", "node"), "expired certificate", "certificate has expired or is not yet valid"},
		"a host of another cluster":   {filepath.Join(other, "beta", "node"), "unknown certificate authority", "certificate signed by unknown authority"},
		"a stranger of the same name": {filepath.Join(other, "alpha", "node"), "unknown certificate authority", "certificate signed by unknown authority"},
	} {
		before := len(out.String())
		if err := greet(t, address, pairOf(t, test.holder)); err == nil || err.Error() != "remote error: tls: "+test.told {
			t.Errorf("%s: %v, want the word %q", who, err, test.told)
		}
		logged(before, `level=warning msg="etcd does not let somebody in" err="`)
		logged(before, test.logged)
	}
	before := len(out.String())
	plain, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(plain, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") // what a client of gRPC begins with
	_ = plain.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, plain); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("who has no TLS is not sent away")
	}
	_ = plain.Close()
	logged(before, `hint="if it is a host, its FLOCKER_ETCD_ENDPOINTS have to begin with https://"`)

	// A new authority: first both are trusted, then the new one alone.
	replace(t, mine, certs.CAFile, read(t, dir, certs.CAFile)+read(t, other, certs.CAFile))
	for _, dir := range []string{dir, other} {
		if err := greet(t, address, pairOf(t, filepath.Join(dir, "beta", "node"))); err != nil {
			t.Errorf("with two authorities: %v", err)
		}
	}
	before = len(out.String())
	replace(t, mine, certs.NodeFile, read(t, other, "alpha", certs.NodeFile))
	if err := writeTo(t, endpoint, filepath.Join(dir, "beta")); err != nil {
		t.Errorf("with half of a new pair: %v", err)
	}
	logged(before, mine+"/node.crt and "+mine+"/node.key do not belong together")
	replace(t, mine, certs.NodeKey, read(t, other, "alpha", certs.NodeKey))
	replace(t, mine, certs.CAFile, read(t, other, certs.CAFile))
	if err := writeTo(t, endpoint, filepath.Join(other, "beta")); err != nil {
		t.Errorf("a host of the new authority: %v", err)
	}
	if err := greet(t, address, pairOf(t, filepath.Join(dir, "beta", "node"))); err == nil || err.Error() != "remote error: tls: unknown certificate authority" {
		t.Errorf("a host of the former authority: %v", err)
	}

	// Who only looks whether something listens is no news.
	before = len(out.String())
	for range 3 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
	}
	if err := writeTo(t, endpoint, filepath.Join(other, "beta")); err != nil {
		t.Error(err)
	}
	stop()
	if got := out.String()[before:]; got != "" {
		t.Errorf("logged %s", got)
	}
	if text := out.String(); strings.Contains(text, "PRIVATE KEY") || strings.Contains(text, strings.Split(read(t, mine, certs.NodeKey), "\n")[1]) {
		t.Errorf("a key is in the log: %s", text)
	}
}

// The log is spared by whoever knocks again and again.
func TestEtcdRefusalsAreFew(t *testing.T) {
	out := &lockedBuffer{}
	log := logrus.New()
	log.SetOutput(out)
	a := &admission{log: logrus.NewEntry(log)}
	for range 100 {
		a.refused(&net.TCPAddr{}, errors.New("tls: no"))
	}
	a.last = time.Now().Add(-time.Minute)
	a.refused(&net.TCPAddr{}, errors.New("tls: no"))
	if got := out.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "others=99") {
		t.Errorf("logged %s", got)
	}
}

// An etcd that would serve everybody, or nobody, is not started, and why is said.
func TestEtcdInsideRefusesCertificates(t *testing.T) {
	dir, other := authority(t), authority(t)
	host := func(change func(dir string)) string {
		copied := t.TempDir()
		for _, file := range []string{certs.CAFile, certs.NodeFile, certs.NodeKey} {
			replace(t, copied, file, read(t, dir, "alpha", file))
		}
		change(copied)
		return copied
	}
	for _, test := range []struct{ certs, want string }{
		{
			host(func(dir string) { _ = os.Chmod(filepath.Join(dir, certs.NodeKey), 0o640) }),
			"DIR/node.key can be read by others than its owner (mode 0640): if nobody has, type: chmod 0600 DIR/node.key",
		},
		{
			host(func(dir string) { _ = os.Remove(filepath.Join(dir, certs.NodeKey)) }),
			"read a certificate: open DIR/node.key: no such file or directory; docker flocker ca makes them",
		},
		{
			host(func(dir string) { replace(t, dir, certs.CAFile, read(t, other, certs.CAFile)) }),
			"DIR/node.crt is not of the authority in DIR/cluster.crt: x509: certificate signed by unknown authority",
		},
		{filepath.Join(dir, "late"), "DIR/node.crt expired on "},
	} {
		_, stop, err := startEtcd(t.Context(), etcdConfig{Dir: t.TempDir(), Listen: freeAddress(t), Certs: test.certs, Log: testLog(t)})
		if err == nil {
			stop()
			t.Errorf("it started, want %s", test.want)
		} else if want := "start etcd: " + strings.ReplaceAll(test.want, "DIR", test.certs); !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// Hosts find their certificates by themselves, and say what is wrong with them.
func TestProcessWithCertificates(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "root", "needs root")
	}
	authority, shared, etcd := authority(t), t.TempDir(), freeAddress(t)
	host := func(name, holder, setting string) *process {
		t.Helper()
		state := filepath.Join(t.TempDir(), name)
		certificates := filepath.Join(state, "certs")
		if err := os.MkdirAll(certificates, 0o700); err != nil {
			t.Fatal(err)
		}
		replace(t, certificates, certs.CAFile, read(t, authority, certs.CAFile))
		replace(t, certificates, certs.NodeFile, read(t, authority, holder+".crt"))
		replace(t, certificates, certs.NodeKey, read(t, authority, holder+".key"))
		return plugin(t.Context(), state, "FLOCKER_HOSTNAME="+name, "FLOCKER_LOOPBACK_DIR="+shared, "FLOCKER_LOG_LEVEL=debug", setting)
	}
	// says asks until the answer is the right one.
	says := func(p *process, verb, body, want string) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
			got, err := p.post(t.Context(), "/VolumeDriver."+verb, body)
			if err == nil && strings.Contains(got, want) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s %s: got %s, %v, want %s", verb, body, got, err, want)
			}
		}
	}
	const create = `{"Name":"v1","Opts":{"size":"20M"}}`
	alpha := host("alpha", "alpha/node", "FLOCKER_ETCD_LISTEN="+etcd)
	key := filepath.Join(filepath.Dir(filepath.Dir(alpha.socket)), "certs", certs.NodeKey)
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	alpha.begin(t)
	says(alpha, "Create", create, key+" can be read by others than its owner (mode 0644): if nobody has, type: chmod 0600 "+key)
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	says(alpha, "List", "{}", `{"Volumes":[]}`)
	beta := host("beta", "beta/node", "FLOCKER_ETCD_ENDPOINTS=https://"+etcd).begin(t)
	says(beta, "Create", create, `{}`)
	says(alpha, "Get", `{"Name":"v1"}`, `{"Volume":{"Name":"v1",`)
	anna := host("gamma", "anna", "FLOCKER_ETCD_ENDPOINTS=https://"+etcd).begin(t)
	says(anna, "Create", create, "it takes a host's, node.crt of docker flocker ca node, and no user's")
	for _, p := range []*process{anna, beta, alpha} {
		p.stop(t)
		for _, holder := range []string{"alpha/node", "beta/node", "anna"} {
			if secret := strings.Split(read(t, authority, holder+".key"), "\n")[1]; strings.Contains(p.out.String()+p.errout.String(), secret) {
				t.Errorf("the key of %s is in a log", holder)
			}
		}
	}
}

func pairOf(t *testing.T, holder string) (pair tls.Certificate) {
	t.Helper()
	if holder == "" {
		return pair
	}
	pair, err := tls.LoadX509KeyPair(holder+".crt", holder+".key")
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func replace(t *testing.T, dir, file, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// authority makes one with two hosts, one whose time is over, a user and a reader.
func authority(t *testing.T) (dir string) {
	t.Helper()
	const year = 365 * 24 * time.Hour
	dir = t.TempDir()
	if err := certs.Init(dir, "prod", year); err != nil {
		t.Fatal(err)
	}
	a, err := certs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for host, lifetime := range map[string]time.Duration{"alpha": year, "beta": year, "late": -time.Minute} {
		if _, _, err := a.Node(certs.Host{Name: host}, lifetime); err != nil {
			t.Fatal(err)
		}
	}
	for user, role := range map[string]certs.Role{"anna": certs.User, "rita": certs.Reader} {
		if _, err := a.User(user, role, year); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Who is not let in is told what to do; and a client that runs takes new files.
func TestEtcdClientWithCertificates(t *testing.T) {
	dir, other, mine, data, address := authority(t), authority(t), t.TempDir(), t.TempDir(), freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	serve := func(certs string) (stop func()) {
		t.Helper()
		_, stop, err := startEtcd(t.Context(), etcdConfig{Dir: data, Listen: ":" + port, Certs: certs, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		return stop
	}
	connect := func(host, authority, holder string) *ownership.Etcd {
		t.Helper()
		cfg := ownership.EtcdConfig{Endpoints: []string{"https://" + net.JoinHostPort(host, port)}}
		if authority != "" {
			cfg.CAFile = filepath.Join(authority, certs.CAFile)
		}
		if holder != "" {
			cfg.CertFile, cfg.KeyFile = holder+".crt", holder+".key"
		}
		store, err := ownership.NewEtcd(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return store
	}
	// told waits until a transaction ends as it should.
	told := func(t *testing.T, store *ownership.Etcd, want string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := store.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpPut, Key: "x"}}})
			cancel()
			got := ""
			if err != nil {
				// Its time may be over before the connection is.
				_, got, _ = strings.Cut(strings.Replace(err.Error(), " does not answer: context deadline exceeded", "", 1), port+": ")
				got = cmp.Or(got, err.Error())
			}
			if got == want {
				return
			}
			if time.Now().After(end) {
				t.Errorf("got  %v\nwant %s", err, want)
				return
			}
		}
	}
	stop := serve(filepath.Join(dir, "alpha"))
	for who, test := range map[string]struct{ host, authority, holder, want string }{
		"a user": {"127.0.0.1", dir, dir + "/anna", "ADDRESS refuses this host's certificate HOLDER.crt: " +
			"it takes a host's, node.crt of docker flocker ca node, and no user's (remote error: tls: bad certificate)"},
		"a host whose time is over": {"127.0.0.1", dir, dir + "/late/node", "ADDRESS refuses this host's certificate HOLDER.crt as expired: " +
			"make another with docker flocker ca node, or see to the clocks (remote error: tls: expired certificate)"},
		"nobody": {"127.0.0.1", dir, "", "ADDRESS wants a certificate of this host: " +
			"put what docker flocker ca node makes for it into FLOCKER_CERTS, or set FLOCKER_ETCD_CERT and FLOCKER_ETCD_KEY (remote error: tls: certificate required)"},
		"of another cluster": {"127.0.0.1", dir, other + "/beta/node", "ADDRESS does not know the authority of this host's certificate HOLDER.crt: " +
			"take both sides' from one docker flocker ca (remote error: tls: unknown certificate authority)"},
		"in another cluster": {"127.0.0.1", other, other + "/beta/node", "ADDRESS has a certificate of an authority that is not in " + other + "/cluster.crt: " +
			"take both sides' from one docker flocker ca (tls: failed to verify certificate: x509: certificate signed by unknown authority)"},
		"without an authority": {"127.0.0.1", "", dir + "/beta/node", "ADDRESS has a certificate of an authority that this system does not know: " +
			"set FLOCKER_ETCD_CACERT (tls: failed to verify certificate: x509: certificate signed by unknown authority)"},
		"by another address": {"127.0.0.2", dir, dir + "/beta/node", "ADDRESS has a certificate for other addresses: " +
			"make it one with docker flocker ca node --ip, or use an address that it is for in FLOCKER_ETCD_ENDPOINTS (tls: failed to verify certificate: x509: certificate is valid for 127.0.0.1, ::1, not 127.0.0.2)"},
	} {
		t.Run(who, func(t *testing.T) {
			store := connect(test.host, test.authority, test.holder)
			defer func() { _ = store.Close() }()
			told(t, store, strings.NewReplacer("ADDRESS", net.JoinHostPort(test.host, port), "HOLDER", test.holder).Replace(test.want))
		})
	}

	// The other authority's come one by one, while both sides run.
	for _, file := range []string{certs.CAFile, certs.NodeFile, certs.NodeKey} {
		replace(t, mine, file, read(t, dir, "beta", file))
	}
	store := connect("127.0.0.1", mine, mine+"/node")
	defer func() { _ = store.Close() }()
	told(t, store, "")
	stop()
	stop = serve(filepath.Join(other, "alpha"))
	told(t, store, address+" has a certificate of an authority that is not in "+mine+"/cluster.crt: "+
		"take both sides' from one docker flocker ca (tls: failed to verify certificate: x509: certificate signed by unknown authority)")
	replace(t, mine, certs.CAFile, read(t, other, certs.CAFile))
	told(t, store, address+" does not know the authority of this host's certificate "+mine+"/node.crt: "+
		"take both sides' from one docker flocker ca (remote error: tls: unknown certificate authority)")
	replace(t, mine, certs.NodeFile, read(t, other, "beta", certs.NodeFile))
	told(t, store, "read etcd client certificate: tls: private key does not match public key")
	replace(t, mine, certs.NodeKey, read(t, other, "beta", certs.NodeKey))
	told(t, store, "")
	stop()
	stop = serve("")
	defer stop()
	told(t, store, address+" speaks no TLS: give it certificates, or use http in FLOCKER_ETCD_ENDPOINTS (tls: first record does not look like a TLS handshake)")
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
