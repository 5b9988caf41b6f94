package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/certs"
)

// year is long enough for any test.
const year = 365 * 24 * time.Hour

// cluster makes an authority with one host, alpha, and the users anna and, who only
// reads, rita.
func cluster(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := certs.Init(dir, "prod", certs.Lifetime); err != nil {
		t.Fatal(err)
	}
	a := open(t, dir)
	if _, _, err := a.Node(certs.Host{Name: "alpha", Names: []string{"alpha.example"}, IPs: []net.IP{net.IPv4(10, 0, 0, 1)}}, year); err != nil {
		t.Fatal(err)
	}
	for name, role := range map[string]certs.Role{"anna": certs.User, "rita": certs.Reader} {
		if _, err := a.User(name, role, year); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func open(t *testing.T, dir string) *certs.Authority {
	t.Helper()
	a, err := certs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// files are those of a holder: "alpha/node", "anna".
func files(dir, holder string) certs.Files {
	path := filepath.Join(dir, holder)
	return certs.Files{CA: filepath.Join(dir, certs.CAFile), Cert: path + ".crt", Key: path + ".key"}
}

func load(t *testing.T, f certs.Files) *certs.Credentials {
	t.Helper()
	c, err := certs.Load(f, func(err error) { t.Errorf("warned of %v", err) })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func certificate(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(data)
	if block == nil || len(rest) > 0 {
		t.Fatalf("%s is not one PEM block", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// shake makes one TLS connection and sends one byte over it. It returns what each
// side says about that.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	deadline := time.Now().Add(30 * time.Second)
	done := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer raw.Close()
		_ = raw.SetDeadline(deadline)
		conn := tls.Server(raw, server)
		if err = conn.HandshakeContext(t.Context()); err == nil {
			_, err = conn.Write([]byte("x"))
		}
		done <- err
	}()
	raw, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(deadline)
	// In TLS 1.3 a client hears only afterwards that it was refused.
	_, clientErr = io.ReadFull(tls.Client(raw, client), make([]byte, 1))
	if clientErr != nil {
		raw.Close()
	}
	return <-done, clientErr
}

func TestFiles(t *testing.T) {
	dir := cluster(t)
	modes := map[string]string{}
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		name, _ := filepath.Rel(dir, path)
		modes[name] = info.Mode().String()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"alpha": "drwx------"}
	for _, name := range []string{
		"cluster.crt", "cluster.key", "anna.crt", "anna.key", "rita.crt", "rita.key",
		"alpha/cluster.crt", "alpha/control-service.crt", "alpha/control-service.key", "alpha/node.crt", "alpha/node.key",
	} {
		want[name] = "-rw-------"
	}
	if !maps.Equal(modes, want) {
		t.Errorf("got %v, want %v", modes, want)
	}

	ca := certificate(t, filepath.Join(dir, "cluster.crt"))
	for name, want := range map[string]struct {
		commonName string
		dns        []string
		ips        string
		uses       []x509.ExtKeyUsage
	}{
		"alpha/control-service": {"control-service", []string{"control-service", "alpha", "alpha.example", "localhost"}, "[10.0.0.1 127.0.0.1 ::1]", []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}},
		"alpha/node":            {"node-alpha", []string{"flocker-node", "alpha", "alpha.example", "localhost"}, "[10.0.0.1 127.0.0.1 ::1]", []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}},
		"anna":                  {"user-anna", nil, "[]", []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
		"rita":                  {"reader-rita", nil, "[]", []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
	} {
		cert := certificate(t, filepath.Join(dir, name+".crt"))
		if cert.Subject.CommonName != want.commonName || !slices.Equal(cert.DNSNames, want.dns) || fmt.Sprint(cert.IPAddresses) != want.ips || !slices.Equal(cert.ExtKeyUsage, want.uses) {
			t.Errorf("%s is of %s, for %v %v, uses %v", name, cert.Subject.CommonName, cert.DNSNames, cert.IPAddresses, cert.ExtKeyUsage)
		}
		if cert.IsCA || !slices.Equal(cert.Subject.OrganizationalUnit, ca.Subject.OrganizationalUnit) {
			t.Errorf("%s: authority %v, of cluster %v, want %v", name, cert.IsCA, cert.Subject.OrganizationalUnit, ca.Subject.OrganizationalUnit)
		}
		if err := cert.CheckSignatureFrom(ca); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if open(t, dir).Name() != "prod" || len(ca.Subject.OrganizationalUnit) != 1 || len(ca.Subject.OrganizationalUnit[0]) != 36 {
		t.Errorf("the authority is %v", ca.Subject)
	}

	a := open(t, dir)
	_, _, err := a.Node(certs.Host{Name: "10.0.0.2"}, year)
	if cert := certificate(t, filepath.Join(dir, "10.0.0.2", "node.crt")); err != nil || cert.VerifyHostname("10.0.0.2") != nil {
		t.Errorf("a host that is an address: %v, for %v %v", err, cert.DNSNames, cert.IPAddresses)
	}
	// No certificate outlives what it depends on.
	until, err := a.User("long", certs.User, 2*certs.Lifetime)
	if err != nil || !until.Equal(ca.NotAfter) {
		t.Errorf("good until %v, %v; the authority until %v", until, err, ca.NotAfter)
	}
}

func TestRefusals(t *testing.T) {
	dir := cluster(t)
	a := open(t, dir)
	node := func(name string, more ...string) func() error {
		return func() error {
			_, _, err := a.Node(certs.Host{Name: name, Names: more}, year)
			return err
		}
	}
	user := func(name string) func() error {
		return func() error {
			_, err := a.User(name, certs.User, year)
			return err
		}
	}
	const rule = " cannot be a name: it may have letters and digits, and between them '-', '_' and '.'"
	const reserved = " cannot be a host's name: every certificate of its kind has that name"
	empty, expired, elsewhere, loose, mixed, leaf := t.TempDir(), t.TempDir(), filepath.Join(dir, "none"), t.TempDir(), t.TempDir(), t.TempDir()
	if err := certs.Init(expired, "old", -time.Minute); err != nil {
		t.Fatal(err)
	}
	copyFile := func(from, to string, mode os.FileMode) {
		t.Helper()
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, data, mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	copyFile(filepath.Join(dir, "cluster.crt"), filepath.Join(loose, "cluster.crt"), 0o644)
	copyFile(filepath.Join(dir, "cluster.key"), filepath.Join(loose, "cluster.key"), 0o640)
	copyFile(filepath.Join(dir, "cluster.crt"), filepath.Join(mixed, "cluster.crt"), 0o600)
	copyFile(filepath.Join(dir, "anna.key"), filepath.Join(mixed, "cluster.key"), 0o600)
	copyFile(filepath.Join(dir, "anna.crt"), filepath.Join(leaf, "cluster.crt"), 0o600)
	copyFile(filepath.Join(dir, "anna.key"), filepath.Join(leaf, "cluster.key"), 0o600)
	opening := func(dir string) func() error {
		return func() error { _, err := certs.Open(dir); return err }
	}
	for _, test := range []struct {
		do   func() error
		want string
	}{
		{node("../x"), `"../x"` + rule},
		{node("a/b"), `"a/b"` + rule},
		{node(".."), `".."` + rule},
		{node(".hidden"), `".hidden"` + rule},
		{node("-rf"), `"-rf"` + rule},
		{node(""), `""` + rule},
		{node("a..b"), `"a..b"` + rule},
		{node("a\nb"), `"a\nb"` + rule},
		{node("a\x00"), `"a\x00"` + rule},
		{node("*.example"), `"*.example"` + rule},
		{node("fe80::1"), `"fe80::1"` + rule},
		{node("gamma", "../x"), `"../x"` + rule},
		{node("Control-Service"), `"Control-Service"` + reserved},
		{node("gamma", "control-service"), `"control-service"` + reserved},
		{node("flocker-node"), `"flocker-node"` + reserved},
		{node(strings.Repeat("a", 60)), `"` + strings.Repeat("a", 60) + `" cannot be a name: it is longer than 59 characters`},
		{node("alpha"), dir + "/alpha is there already; to make certificates for the host once more, move the old ones away"},
		{user("../anna"), `"../anna"` + rule},
		{user("an na"), `"an na"` + rule},
		{user("anna"), dir + "/anna.key is there already; choose another name, or move the old one away"},
		{user("cluster"), dir + "/cluster.key is there already; choose another name, or move the old one away"},
		{func() error { _, err := a.User("x", certs.Node, year); return err }, "node is no role of a user"},
		{func() error { return certs.Init(dir, "prod", year) }, dir + "/cluster.key is there already; a second authority is of no use to those who trust the first: to make one nevertheless, name another directory with --dir"},
		{func() error { return certs.Init(elsewhere, "prod", year) }, "write " + elsewhere + "/cluster.key: "},
		{func() error { return certs.Init(empty, "a/b", year) }, `"a/b"` + rule},
		{opening(empty), "there is no cluster.crt in " + empty + ": type it where the authority is, or name its directory with --dir; docker flocker ca init makes one"},
		{opening(expired), "the authority in " + expired + " expired on " + time.Now().Add(-time.Minute).UTC().Format(time.DateOnly) + ", and every certificate with it: make a new one in another directory, with docker flocker ca init --dir"},
		{opening(loose), loose + "/cluster.key can be read by others than its owner (mode 0640), who could make certificates that may do everything: if nobody has, type: chmod 0600 " + loose + "/cluster.key"},
		{opening(mixed), mixed + "/cluster.crt and " + mixed + "/cluster.key do not belong together: tls: private key does not match public key; restore both from where the authority is kept"},
		{opening(leaf), leaf + "/cluster.crt is not the certificate of an authority: it is user-anna's"},
	} {
		before := listing(t, dir)
		err := test.do()
		if err == nil || !strings.HasPrefix(err.Error(), test.want) || !strings.HasSuffix(test.want, ": ") && err.Error() != test.want {
			t.Errorf("got  %v\nwant %s", err, test.want)
		}
		if after := listing(t, dir); after != before {
			t.Errorf("%s: it left\n%s\nwhere there was\n%s", test.want, after, before)
		}
	}
	if got := listing(t, empty); got != "" {
		t.Errorf("it left %s", got)
	}
}

// listing is every file below dir with what is in it.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %d bytes %x\n", path, len(data), data[len(data)/2:len(data)/2+8])
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Of many who make the same at once, one does.
func TestNothingIsReplaced(t *testing.T) {
	dir := t.TempDir()
	race := func(what string, do func() error) {
		t.Helper()
		var all sync.WaitGroup
		results := make([]error, 8)
		for i := range results {
			all.Go(func() { results[i] = do() })
		}
		all.Wait()
		made := 0
		for _, err := range results {
			if err == nil {
				made++
			}
		}
		if made != 1 {
			t.Errorf("%s: %d were made: %v", what, made, results)
		}
	}
	race("authority", func() error { return certs.Init(dir, "prod", year) })
	a := open(t, dir) // key and certificate of the same one
	race("user", func() error { _, err := a.User("anna", certs.User, year); return err })
	load(t, files(dir, "anna"))
	race("host", func() error { _, _, err := a.Node(certs.Host{Name: "alpha"}, year); return err })
	load(t, files(dir, "alpha/node"))
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 5 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// Who may connect to whom.
func TestRoles(t *testing.T) {
	dir, other := cluster(t), cluster(t)
	a := open(t, dir)
	for _, holder := range []string{"alpha/control-service", "alpha/node"} { // as copied to the host
		load(t, certs.Files{CA: filepath.Join(dir, "alpha", certs.CAFile), Cert: filepath.Join(dir, holder+".crt"), Key: filepath.Join(dir, holder+".key")})
	}
	if _, err := a.User("late", certs.User, -time.Minute); err != nil {
		t.Fatal(err)
	}
	bare := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
	with := func(dir, holder string) *tls.Config { // who does not care whom he talks to
		f := files(dir, holder)
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			t.Fatal(err)
		}
		c := bare.Clone()
		c.Certificates = []tls.Certificate{pair}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		return c
	}
	server := load(t, files(dir, "alpha/control-service"))
	api := server.Server(certs.User, certs.Reader)
	for _, test := range []struct {
		who    string
		client *tls.Config
		server *tls.Config
		want   string // what the server says
	}{
		{"a user", load(t, files(dir, "anna")).Client(), api, ""},
		{"a reader", load(t, files(dir, "rita")).Client(), api, ""},
		{"a reader where only users may", load(t, files(dir, "rita")).Client(), server.Server(certs.User), "reader-rita may not connect here: it is a certificate of the role reader"},
		{"a host", load(t, files(dir, "alpha/node")).Client(), api, "node-alpha may not connect here: it is a certificate of the role node"},
		{"a host where hosts may", load(t, files(dir, "alpha/node")).Client(), server.Server(certs.Node), ""},
		{"a user where hosts may", load(t, files(dir, "anna")).Client(), server.Server(certs.Node), "user-anna may not connect here: it is a certificate of the role user"},
		{"a server", with(dir, "alpha/control-service"), api, "tls: failed to verify certificate: x509: certificate specifies an incompatible key usage"},
		{"the authority itself", with(dir, "cluster"), api, `the certificate of "prod" is of no role: it was not made with docker flocker ca`},
		{"another cluster's user", with(other, "anna"), api, `tls: failed to verify certificate: x509: certificate signed by unknown authority`},
		{"a user whose time is over", with(dir, "late"), api, "tls: failed to verify certificate: x509: certificate has expired or is not yet valid"},
		{"nobody", bare, api, "tls: client didn't provide a certificate"},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			client := test.client.Clone()
			client.MinVersion, client.MaxVersion = version, version
			serverErr, clientErr := shake(t, test.server, client)
			what := test.who + ", " + tls.VersionName(version)
			switch {
			case test.want == "" && (serverErr != nil || clientErr != nil):
				t.Errorf("%s: server %v, client %v", what, serverErr, clientErr)
			case test.want != "" && (serverErr == nil || clientErr == nil || !strings.HasPrefix(serverErr.Error(), test.want)):
				t.Errorf("%s: server %v, client %v, want %s", what, serverErr, clientErr, test.want)
			}
		}
	}

	// And whom a client takes for the cluster.
	anna := load(t, files(dir, "anna")).Client()
	if _, _, err := a.Node(certs.Host{Name: "late-host"}, -time.Minute); err != nil {
		t.Fatal(err)
	}
	for who, test := range map[string]struct {
		server *tls.Config
		want   string
	}{
		"another cluster":       {with(other, "alpha/control-service"), "x509: certificate signed by unknown authority"},
		"a host, as the server": {with(dir, "alpha/node"), "x509: certificate is valid for flocker-node, alpha, alpha.example, localhost, not control-service"},
		"a user, as the server": {with(dir, "anna"), "x509: "},
		"time is over":          {with(dir, "late-host/control-service"), "x509: certificate has expired or is not yet valid"},
	} {
		if _, err := shake(t, test.server, anna); err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %s", who, err, test.want)
		}
	}

	// A client that knows nothing of roles, and verifies the host it has dialled.
	pool := x509.NewCertPool()
	pool.AddCert(certificate(t, filepath.Join(dir, "cluster.crt")))
	plain := with(dir, "anna")
	plain.InsecureSkipVerify, plain.RootCAs = false, pool
	for name, want := range map[string]bool{"alpha": true, "alpha.example": true, "10.0.0.1": true, "localhost": true, "127.0.0.1": true, "::1": true, "control-service": true, "beta": false, "10.0.0.2": false} {
		plain.ServerName = name
		if _, err := shake(t, api, plain); (err == nil) != want {
			t.Errorf("as %s: %v", name, err)
		}
	}
}

func TestPeerOf(t *testing.T) {
	for name, want := range map[string]certs.Peer{
		"control-service": {Role: certs.Server}, "node-a-b": {Role: certs.Node, Name: "a-b"}, "user-node-a": {Role: certs.User, Name: "node-a"}, "reader-x": {Role: certs.Reader, Name: "x"},
		"user-": {}, "user": {}, "admin-x": {}, "": {}, "control-service-x": {}, "User-x": {}, "-x": {},
	} {
		cert := &x509.Certificate{}
		cert.Subject.CommonName = name
		if got, err := certs.PeerOf(cert); got != want || (err == nil) != (want.Role != "") {
			t.Errorf("%q: %+v, %v", name, got, err)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	dir, other := cluster(t), cluster(t)
	a := open(t, dir)
	if _, err := a.User("late", certs.User, -time.Minute); err != nil {
		t.Fatal(err)
	}
	anna, bad := files(dir, "anna"), filepath.Join(dir, "bad.crt")
	if err := os.WriteFile(bad, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	loose := filepath.Join(dir, "rita.key")
	if err := os.Chmod(loose, 0o640); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		files certs.Files
		want  string
	}{
		{files(dir, "rita"), loose + " can be read by others than its owner (mode 0640): if nobody has, type: chmod 0600 " + loose},
		{files(dir, "none"), "read a certificate: open " + dir + "/none.crt: no such file or directory; docker flocker ca makes them"},
		{certs.Files{CA: bad, Cert: anna.Cert, Key: anna.Key}, bad + " has no certificate in it"},
		{certs.Files{CA: anna.CA, Cert: anna.Cert, Key: filepath.Join(dir, "alpha", "node.key")}, anna.Cert + " and " + dir + "/alpha/node.key do not belong together: tls: private key does not match public key"},
		{certs.Files{CA: filepath.Join(other, "cluster.crt"), Cert: anna.Cert, Key: anna.Key}, anna.Cert + " is not of the authority in " + other + "/cluster.crt: x509: certificate signed by unknown authority"},
		{files(dir, "late"), dir + "/late.crt expired on " + time.Now().Add(-time.Minute).UTC().Format(time.DateOnly) + ": make another with docker flocker ca"},
		{files(dir, "cluster"), `the certificate of "prod" is of no role: it was not made with docker flocker ca`},
	} {
		_, err := certs.Load(test.files, nil)
		if err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("got  %v\nwant %s", err, test.want)
		}
	}
}

// A server and a client that run see new certificates, and wrong ones do no harm.
func TestReload(t *testing.T) {
	dir := cluster(t)
	var mu sync.Mutex
	var warned []string
	warnings := func() []string {
		mu.Lock()
		defer mu.Unlock()
		all := warned
		warned = nil
		return all
	}
	start := func(holder string) *certs.Credentials {
		c, err := certs.Load(files(dir, holder), func(err error) {
			mu.Lock()
			defer mu.Unlock()
			warned = append(warned, err.Error())
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		TLSConfig: start("alpha/control-service").Server(certs.User), ReadHeaderTimeout: time.Minute, ErrorLog: nil,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			peer, err := certs.PeerOf(r.TLS.PeerCertificates[0])
			fmt.Fprint(w, peer.Role, " ", peer.Name, " ", r.Proto, " ", err)
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	anna := start("anna")
	// ask makes a new connection and returns the serial numbers of both sides.
	ask := func() (server string, err error) {
		transport := &http.Transport{TLSClientConfig: anna.Client(), ForceAttemptHTTP2: true, DisableKeepAlives: true}
		defer transport.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.Addr().String(), nil)
		if err != nil {
			return "", err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if want := "user anna HTTP/2.0 <nil>"; string(body) != want {
			t.Errorf("answer %s, %v, want %s", body, err, want)
		}
		return resp.TLS.PeerCertificates[0].SerialNumber.String(), err
	}
	// replace puts a file in the place of another, as an operator would, and makes
	// that a while ago: what was changed just now is read again anyway.
	age := -time.Hour
	replace := func(name string, data []byte) {
		t.Helper()
		age += time.Minute
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		then := time.Now().Add(age)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
	}
	read := func(dir, name string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, name := range []string{"cluster.crt", "anna.crt", "anna.key", "alpha/control-service.crt", "alpha/control-service.key"} {
		replace(name, read(dir, name))
	}
	first, err := ask()
	if err != nil {
		t.Fatal(err)
	}

	// Another certificate of the same authority; its files come one by one.
	old := map[string][]byte{"alpha/control-service.crt": read(dir, "alpha/control-service.crt"), "alpha/control-service.key": read(dir, "alpha/control-service.key")}
	if err := os.Rename(filepath.Join(dir, "alpha"), filepath.Join(dir, "alpha.old")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := open(t, dir).Node(certs.Host{Name: "alpha"}, year); err != nil {
		t.Fatal(err)
	}
	renewed := map[string][]byte{"alpha/control-service.crt": read(dir, "alpha/control-service.crt"), "alpha/control-service.key": read(dir, "alpha/control-service.key")}
	replace("alpha/control-service.crt", renewed["alpha/control-service.crt"])
	if err := os.WriteFile(filepath.Join(dir, "alpha/control-service.key"), old["alpha/control-service.key"], 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 { // the files are read each time, as they are so new
		if got, err := ask(); err != nil || got != first {
			t.Errorf("with half of a new pair: certificate %s, %v, want %s", got, err, first)
		}
	}
	path := filepath.Join(dir, "alpha", "control-service")
	if got, want := warnings(), "the certificates were changed and cannot be used, those of before are: "+path+".crt and "+path+".key do not belong together: tls: private key does not match public key"; len(got) != 1 || got[0] != want {
		t.Errorf("warned %q, want once %q", got, want)
	}
	// A change of who can read a key is one, too.
	replace("alpha/control-service.key", renewed["alpha/control-service.key"])
	if err := os.Chmod(path+".key", 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(); err != nil || got != first {
		t.Errorf("with a key that everybody can read: certificate %s, %v, want %s", got, err, first)
	}
	if got := warnings(); len(got) != 1 || !strings.HasSuffix(got[0], "(mode 0644): if nobody has, type: chmod 0600 "+path+".key") {
		t.Errorf("warned %q", got)
	}
	if err := os.Chmod(path+".key", 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := ask()
	if err != nil || second == first {
		t.Errorf("with a new pair: certificate %s, %v, want another than %s", second, err, first)
	}
	if err := os.Remove(path + ".key"); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(); err != nil || got != second {
		t.Errorf("without a key: certificate %s, %v, want %s", got, err, second)
	}
	if got := warnings(); len(got) != 1 || !strings.Contains(got[0], "no such file") {
		t.Errorf("warned %q", got)
	}
	replace("alpha/control-service.key", renewed["alpha/control-service.key"])

	// Another authority: who is not of it stays outside, until he is.
	formerly, err := tls.LoadX509KeyPair(filepath.Join(dir, "anna.crt"), filepath.Join(dir, "anna.key"))
	if err != nil {
		t.Fatal(err)
	}
	next := cluster(t)
	replace("cluster.crt", slices.Concat(read(dir, "cluster.crt"), read(next, "cluster.crt")))
	if got, err := ask(); err != nil || got != second {
		t.Errorf("with two authorities: certificate %s, %v, want %s", got, err, second)
	}
	for _, name := range []string{"anna.crt", "anna.key", "alpha/control-service.crt", "alpha/control-service.key"} {
		replace(name, read(next, name))
	}
	third, err := ask()
	if err != nil || third == second {
		t.Errorf("of another authority: certificate %s, %v, want another than %s", third, err, second)
	}
	// Nobody goes on with a session of the authority that is not trusted any more.
	former := &tls.Config{
		MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, ServerName: "alpha", ClientSessionCache: tls.NewLRUClientSessionCache(1),
		Certificates: []tls.Certificate{formerly},
		VerifyConnection: func(s tls.ConnectionState) error {
			if s.DidResume {
				t.Error("it went on with a session of before")
			}
			return nil
		},
	}
	for range 2 {
		if _, err := shake(t, srv.TLSConfig, former); err != nil {
			t.Errorf("with two authorities, a certificate of the first: %v", err)
		}
	}
	replace("cluster.crt", read(next, "cluster.crt"))
	if _, err := shake(t, srv.TLSConfig, former); err == nil {
		t.Error("a certificate of the authority that is not trusted any more was taken")
	}
	if got, err := ask(); err != nil || got != third {
		t.Errorf("with only the other authority: certificate %s, %v, want %s", got, err, third)
	}
	for name, data := range old {
		replace(name, data)
	}
	if got, err := ask(); err != nil || got != third {
		t.Errorf("with a pair of the old authority: certificate %s, %v, want %s", got, err, third)
	}
	if got := warnings(); len(got) != 1 || !strings.Contains(got[0], " is not of the authority in ") {
		t.Errorf("warned %q", got)
	}
}
