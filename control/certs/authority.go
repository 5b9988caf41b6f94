// Package certs is who may talk to whom: one certificate authority a cluster, and
// certificates whose common name says what their holder may do. It makes them, as
// files; and it loads them for a server or a client, again whenever they change.
//
// It needs nothing but the authority's directory: no plugin, no etcd, no network.
package certs

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The names of the files, which are the original Flocker's; a user's have the user's
// name. Copied to a host, or to a user, they need not be renamed.
const (
	CAFile     = "cluster.crt"
	CAKey      = "cluster.key"
	ServerFile = "control-service.crt"
	ServerKey  = "control-service.key"
	NodeFile   = "node.crt"
	NodeKey    = "node.key"
)

// The names that certificates have beside those of their host.
const (
	// ServerName is what a client expects of every host, whatever its address is.
	ServerName = "control-service"
	// NodeName is by what a server that only looks at names, such as etcd, can tell a
	// host's certificate from a user's.
	NodeName = "flocker-node"
)

const (
	// Lifetime of an authority, and the longest of a certificate.
	Lifetime = 20 * 365 * 24 * time.Hour
	// early is for hosts whose clocks are behind.
	early = time.Hour
	// maxCommonName is X.509's.
	maxCommonName = 64
)

// An Authority makes the certificates of one cluster.
type Authority struct {
	dir     string
	cert    *x509.Certificate
	certPEM []byte
	key     crypto.Signer
}

// Name is the cluster's.
func (a *Authority) Name() string { return a.cert.Subject.CommonName }

// Init makes an authority for the cluster of this name, CAFile and CAKey in dir. It
// never replaces one.
func Init(dir, name string, lifetime time.Duration) error {
	if err := validName(name, ""); err != nil {
		return err
	}
	for _, file := range []string{CAKey, CAFile} {
		if err := absent(filepath.Join(dir, file)); err != nil {
			return fmt.Errorf("%w; a second authority is of no use to those who trust the first: to make one nevertheless, name another directory with --dir", err)
		}
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name, OrganizationalUnit: []string{uuid.NewString()}},
		NotBefore:             now.Add(-early),
		NotAfter:              now.Add(lifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	certPEM, keyPEM, err := issue(template, nil)
	if err != nil {
		return err
	}
	return writePair(dir, CAFile, certPEM, CAKey, keyPEM)
}

// Open reads the authority in dir.
func Open(dir string) (*Authority, error) {
	certPEM, err := readPart(dir, CAFile)
	if err != nil {
		return nil, err
	}
	keyPEM, err := readPart(dir, CAKey)
	if err != nil {
		return nil, err
	}
	keyPath := filepath.Join(dir, CAKey)
	if info, err := os.Stat(keyPath); err == nil && info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others than its owner (mode %04o), who could make certificates that may do everything: if nobody has, type: chmod 0600 %s",
			keyPath, info.Mode().Perm(), keyPath)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s and %s do not belong together: %w; restore both from where the authority is kept", filepath.Join(dir, CAFile), keyPath, err)
	}
	cert, key := pair.Leaf, pair.PrivateKey.(crypto.Signer)
	if !cert.IsCA {
		return nil, fmt.Errorf("%s is not the certificate of an authority: it is %s's", filepath.Join(dir, CAFile), cert.Subject.CommonName)
	}
	if now := time.Now(); now.After(cert.NotAfter) {
		return nil, fmt.Errorf("the authority in %s expired on %s, and every certificate with it: make a new one in another directory, with docker flocker ca init --dir",
			dir, day(cert.NotAfter))
	}
	return &Authority{dir: dir, cert: cert, certPEM: certPEM, key: key}, nil
}

// readPart reads one of an authority's two files.
func readPart(dir, file string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(dir, file))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("there is no %s in %s: type it where the authority is, or name its directory with --dir; docker flocker ca init makes one", file, dir)
	case err != nil:
		return nil, fmt.Errorf("read the authority: %w", err)
	}
	return data, nil
}

// A Host is what the certificates of one are made for.
type Host struct {
	// Name is its host name, or its IPv4 address.
	Name string
	// Names and IPs are by what clients reach it besides. It is localhost, too.
	Names []string
	IPs   []net.IP
}

// Node makes a host's certificates: a directory with the host's name, which has all
// the files the host needs under the names it needs them by. It returns what names
// and addresses they are for, and until when.
func (a *Authority) Node(h Host, lifetime time.Duration) (names []string, until time.Time, err error) {
	for _, name := range append([]string{h.Name}, h.Names...) {
		if err := validName(name, "node-"); err != nil {
			return nil, until, err
		}
		if slices.ContainsFunc([]string{ServerName, NodeName}, func(reserved string) bool { return strings.EqualFold(name, reserved) }) {
			return nil, until, fmt.Errorf("%q cannot be a host's name: every certificate of its kind has that name", name)
		}
	}
	dns, ips := []string{}, slices.Clone(h.IPs)
	for _, name := range append([]string{h.Name}, h.Names...) {
		if ip := net.ParseIP(name); ip != nil {
			ips = append([]net.IP{ip}, ips...)
		} else {
			dns = append(dns, name)
		}
	}
	dns = append(dns, "localhost")
	ips = append(ips, net.IPv4(127, 0, 0, 1), net.IPv6loopback)
	names = dns
	for _, ip := range ips {
		names = append(names, ip.String())
	}

	target := filepath.Join(a.dir, h.Name)
	if err := absent(target); err != nil {
		return nil, until, fmt.Errorf("%w; to make certificates for the host once more, move the old ones away", err)
	}
	server := a.template(string(Server), lifetime, x509.ExtKeyUsageServerAuth)
	server.DNSNames, server.IPAddresses = append([]string{ServerName}, dns...), ips
	// etcd's members want one certificate for both directions.
	node := a.template(string(Node)+"-"+h.Name, lifetime, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth)
	node.DNSNames, node.IPAddresses = append([]string{NodeName}, dns...), ips

	files := []file{{CAFile, a.certPEM}}
	for _, made := range []struct {
		template  *x509.Certificate
		cert, key string
	}{{server, ServerFile, ServerKey}, {node, NodeFile, NodeKey}} {
		certPEM, keyPEM, err := issue(made.template, a)
		if err != nil {
			return nil, until, err
		}
		files = append(files, file{made.cert, certPEM}, file{made.key, keyPEM})
	}
	return names, node.NotAfter, writeDir(target, files)
}

// User makes a user's certificate and key, NAME.crt and NAME.key beside the
// authority, and returns until when it is good. A reader may look and change
// nothing.
func (a *Authority) User(name string, role Role, lifetime time.Duration) (until time.Time, err error) {
	if role != User && role != Reader {
		return until, fmt.Errorf("%s is no role of a user", role)
	}
	prefix := string(role) + "-"
	if err := validName(name, prefix); err != nil {
		return until, err
	}
	for _, file := range []string{name + ".key", name + ".crt"} {
		if err := absent(filepath.Join(a.dir, file)); err != nil {
			return until, fmt.Errorf("%w; choose another name, or move the old one away", err)
		}
	}
	template := a.template(prefix+name, lifetime, x509.ExtKeyUsageClientAuth)
	certPEM, keyPEM, err := issue(template, a)
	if err != nil {
		return until, err
	}
	return template.NotAfter, writePair(a.dir, name+".crt", certPEM, name+".key", keyPEM)
}

// template is what all certificates have in common. None outlives its authority.
func (a *Authority) template(commonName string, lifetime time.Duration, uses ...x509.ExtKeyUsage) *x509.Certificate {
	now := time.Now()
	until := now.Add(lifetime)
	if until.After(a.cert.NotAfter) {
		until = a.cert.NotAfter
	}
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: commonName, OrganizationalUnit: a.cert.Subject.OrganizationalUnit},
		NotBefore:             now.Add(-early),
		NotAfter:              until,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           uses,
	}
}

// issue makes a key and the certificate of it, signed by an authority or, without
// one, by the key itself.
func issue(template *x509.Certificate, by *Authority) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	parent, signer := template, crypto.Signer(key)
	if by != nil {
		parent, signer = by.cert, by.key
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, fmt.Errorf("sign a certificate: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// A name is part of a file's name, and a host's is one of DNS.
var nameRule = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*$`)

func validName(name, prefix string) error {
	if !nameRule.MatchString(name) {
		return fmt.Errorf("%q cannot be a name: it may have letters and digits, and between them '-', '_' and '.'", name)
	}
	if longest := maxCommonName - len(prefix); len(name) > longest {
		return fmt.Errorf("%q cannot be a name: it is longer than %d characters", name, longest)
	}
	return nil
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// absent says that a file is there already.
func absent(path string) error {
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return fmt.Errorf("%s is there already", path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("look for %s: %w", path, err)
}

type file struct {
	name string
	data []byte
}

// writePair writes a certificate and its key, or nothing.
func writePair(dir, cert string, certPEM []byte, key string, keyPEM []byte) error {
	if err := writeNew(dir, file{key, keyPEM}); err != nil {
		return err
	}
	if err := writeNew(dir, file{cert, certPEM}); err != nil {
		_ = os.Remove(filepath.Join(dir, key))
		return err
	}
	return syncDir(dir)
}

// writeNew writes a whole file under a name that is free.
func writeNew(dir string, f file) error {
	path := filepath.Join(dir, f.name)
	tmp, err := os.CreateTemp(dir, "."+f.name+".")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	if err := fill(tmp, f.data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	// Unlike a rename, a link replaces nothing.
	if err := os.Link(tmp.Name(), path); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already", path)
	} else if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// writeDir writes a directory with all its files, or nothing.
func writeDir(target string, files []file) (err error) {
	dir, name := filepath.Split(target)
	dir = cmp.Or(dir, ".")
	tmp, err := os.MkdirTemp(dir, "."+name+".")
	if err != nil {
		return fmt.Errorf("write %s: %w", target, err)
	}
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = os.Remove(filepath.Join(tmp, f.name))
			}
			_ = os.Remove(tmp)
		}
	}()
	for _, f := range files {
		w, err := os.OpenFile(filepath.Join(tmp, f.name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			err = fill(w, f.data)
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", filepath.Join(target, f.name), err)
		}
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	// It fails if somebody has put anything there meanwhile.
	if err := os.Rename(tmp, target); err != nil {
		return fmt.Errorf("write %s: %w", target, err)
	}
	return syncDir(dir)
}

func fill(f *os.File, data []byte) error {
	_, err := f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
