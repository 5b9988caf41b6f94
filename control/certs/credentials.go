package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// A Role is what the holder of a certificate may do. The common name says it:
// "control-service", or "ROLE-NAME".
type Role string

// The roles.
const (
	// Server answers the API, on every host.
	Server Role = ServerName
	// Node is a host of the cluster.
	Node Role = "node"
	// User may do everything over the API.
	User Role = "user"
	// Reader may look at everything over the API, and change nothing.
	Reader Role = "reader"
)

// Peer is who a certificate was made for.
type Peer struct {
	Role Role
	Name string // of the host or user; a Server has none
}

// PeerOf reads a certificate that has been verified: before, it means nothing.
func PeerOf(cert *x509.Certificate) (Peer, error) {
	name := cert.Subject.CommonName
	if name == ServerName {
		return Peer{Role: Server}, nil
	}
	role, holder, _ := strings.Cut(name, "-")
	if known := []Role{Node, User, Reader}; holder == "" || !slices.Contains(known, Role(role)) {
		return Peer{}, fmt.Errorf("the certificate of %q is of no role: it was not made with docker flocker ca", name)
	}
	return Peer{Role(role), holder}, nil
}

// Files are one process's certificate and key, and its cluster's authority.
type Files struct{ CA, Cert, Key string }

func (f Files) all() [3]string { return [3]string{f.CA, f.Cert, f.Key} }

// Credentials are what Files say. They are read again before a connection is made
// if they have changed; as long as they are wrong then, the last good ones go on.
type Credentials struct {
	files  Files
	warn   func(error)
	loaded atomic.Pointer[loaded]
}

type loaded struct {
	pair  tls.Certificate
	roots *x509.CertPool
	// What the files were when they were read, and why they could not be used then.
	stamp stamp
	err   error
	// settled says that they were not being written at that time: a second change
	// could have the same stamp.
	settled bool
}

// A stamp tells a file from what it was before.
type stamp [3]struct {
	size    int64
	changed int64 // in nanoseconds; 0 if there is no file
	mode    fs.FileMode
}

// settling is longer than the ticks of a filesystem's clock.
const settling = 2 * time.Second

// Load reads them. warn is told, once, why a change of them cannot be used.
func Load(files Files, warn func(error)) (*Credentials, error) {
	c := &Credentials{files: files, warn: warn}
	first := c.read()
	if first.err != nil {
		return nil, first.err
	}
	c.loaded.Store(first)
	return c, nil
}

// Private is an error for a key, or another secret, that others than its owner can read.
func Private(file string) error {
	if info, err := os.Stat(file); err == nil && info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s can be read by others than its owner (mode %04o): if nobody has, type: chmod 0600 %[1]s", file, info.Mode().Perm())
	}
	return nil
}

// current are the credentials now.
func (c *Credentials) current() *loaded {
	old := c.loaded.Load()
	if old.settled && c.stamp() == old.stamp {
		return old
	}
	next := c.read()
	if next.err != nil {
		next.pair, next.roots = old.pair, old.roots
	}
	if !c.loaded.CompareAndSwap(old, next) {
		return c.loaded.Load() // somebody else was faster
	}
	if next.err != nil && (old.err == nil || old.err.Error() != next.err.Error()) {
		c.warn(fmt.Errorf("the certificates were changed and cannot be used, those of before are: %w", next.err))
	}
	return next
}

func (c *Credentials) stamp() (s stamp) {
	for i, path := range c.files.all() {
		if info, err := os.Stat(path); err == nil {
			s[i].size, s[i].changed, s[i].mode = info.Size(), info.ModTime().UnixNano(), info.Mode()
		}
	}
	return s
}

func (c *Credentials) read() *loaded {
	l := &loaded{stamp: c.stamp(), settled: true}
	for _, f := range l.stamp {
		if time.Since(time.Unix(0, f.changed)) < settling {
			l.settled = false
		}
	}
	var contents [3][]byte
	for i, path := range c.files.all() {
		data, err := os.ReadFile(path)
		if err != nil {
			l.err = fmt.Errorf("read a certificate: %w; docker flocker ca makes them", err)
			return l
		}
		contents[i] = data
	}
	if l.err = Private(c.files.Key); l.err != nil {
		return l
	}
	l.roots = x509.NewCertPool()
	if !l.roots.AppendCertsFromPEM(contents[0]) {
		l.err = fmt.Errorf("%s has no certificate in it", c.files.CA)
		return l
	}
	if l.pair, l.err = tls.X509KeyPair(contents[1], contents[2]); l.err != nil {
		l.err = fmt.Errorf("%s and %s do not belong together: %w", c.files.Cert, c.files.Key, l.err)
		return l
	}
	l.err = c.usable(l)
	return l
}

// usable refuses at once what everybody else would refuse later, and with less to
// say about it.
func (c *Credentials) usable(l *loaded) error {
	cert, now := l.pair.Leaf, time.Now()
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("%s expired on %s: make another with docker flocker ca", c.files.Cert, day(cert.NotAfter))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%s is good from %s on: is the clock of this host right?", c.files.Cert, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	if err := verify(l.pair.Certificate, l.roots, "", x509.ExtKeyUsageAny); err != nil {
		return fmt.Errorf("%s is not of the authority in %s: %w; take both from the same docker flocker ca", c.files.Cert, c.files.CA, err)
	}
	_, err := PeerOf(cert)
	return err
}

// Server is how a server takes connections: only from those who have a certificate
// of the cluster, in one of these roles.
func (c *Credentials) Server(roles ...Role) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			now := c.current()
			return &tls.Config{
				MinVersion:   tls.VersionTLS12,
				Certificates: []tls.Certificate{now.pair},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    now.roots,
				NextProtos:   []string{"h2", "http/1.1"},
				// Nobody goes on with what an authority of before has said.
				SessionTicketsDisabled: true,
				VerifyConnection:       func(s tls.ConnectionState) error { return admit(s, roles) },
			}, nil
		},
	}
}

// Stays is an error if a peer that was let in by Server would not be now: its certificate
// has expired, or is of an authority that is no longer in the file.
func (c *Credentials) Stays(peer []*x509.Certificate) error {
	chain := make([][]byte, len(peer))
	for i, cert := range peer {
		chain[i] = cert.Raw
	}
	return verify(chain, c.current().roots, "", x509.ExtKeyUsageClientAuth)
}

// Client is how a client connects: to a server of the cluster, by whatever address.
func (c *Credentials) Client() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: ServerName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &c.current().pair, nil
		},
		// RootCAs would be what they are now for ever. VerifyConnection verifies.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			chain := make([][]byte, len(s.PeerCertificates))
			for i, cert := range s.PeerCertificates {
				chain[i] = cert.Raw
			}
			return verify(chain, c.current().roots, ServerName, x509.ExtKeyUsageServerAuth)
		},
	}
}

// verify a chain, its leaf first.
func verify(chain [][]byte, roots *x509.CertPool, name string, use x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return errors.New("there is no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return err
	}
	between := x509.NewCertPool()
	for _, der := range chain[1:] {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(cert)
	}
	_, err = leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{use}})
	return err
}

// admit refuses a peer, already verified, that is in none of these roles.
func admit(s tls.ConnectionState, roles []Role) error {
	if len(s.PeerCertificates) == 0 {
		return errors.New("there is no certificate")
	}
	peer, err := PeerOf(s.PeerCertificates[0])
	if err != nil {
		return err
	}
	if !slices.Contains(roles, peer.Role) {
		return fmt.Errorf("%s may not connect here: it is a certificate of the role %s", s.PeerCertificates[0].Subject.CommonName, peer.Role)
	}
	return nil
}
