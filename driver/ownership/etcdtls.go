package ownership

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
)

// etcdTLS is how connections to etcd have TLS. Each is made with the files as they
// are then. It keeps why the last one was not to be had: the client of etcd tells
// its callers no more than that their time is over.
type etcdTLS struct {
	credentials.TransportCredentials // says what protocol it is

	cfg EtcdConfig
	why *atomic.Pointer[error]
}

func newEtcdTLS(cfg EtcdConfig) (*etcdTLS, error) {
	t := &etcdTLS{TransportCredentials: credentials.NewTLS(nil), cfg: cfg, why: new(atomic.Pointer[error])}
	_, err := t.config()
	return t, err
}

// config reads the files.
func (t *etcdTLS) config() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.cfg.CAFile != "" {
		pem, err := os.ReadFile(t.cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read etcd CA file: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd CA file %s has no certificate in it", t.cfg.CAFile)
		}
	}
	if (t.cfg.CertFile == "") != (t.cfg.KeyFile == "") {
		return nil, errors.New("etcd needs both a certificate file and a key file, or neither")
	}
	if t.cfg.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(t.cfg.CertFile, t.cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read etcd client certificate: %w", err)
		}
		// Unlike Certificates, it is shown whatever authority etcd asks for.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config, nil
}

// Clone implements credentials.TransportCredentials.
func (t *etcdTLS) Clone() credentials.TransportCredentials { return t }

// ClientHandshake implements credentials.TransportCredentials.
func (t *etcdTLS) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, err := t.config()
	if err != nil {
		t.failed(err)
		return nil, nil, err
	}
	conn, info, err := credentials.NewTLS(config).ClientHandshake(ctx, authority, raw)
	if err != nil {
		if ctx.Err() == nil {
			t.failed(t.explain(raw.RemoteAddr().String(), err))
		}
		return nil, nil, err
	}
	return &etcdConn{Conn: conn, tls: t}, info, nil
}

func (t *etcdTLS) failed(err error) { t.why.Store(&err) }

// reason is why there is no connection, if it is known.
func (t *etcdTLS) reason() error {
	if t == nil {
		return nil
	}
	if why := t.why.Load(); why != nil {
		return *why
	}
	return nil
}

// etcdConn is a connection to etcd, whose first word tells whether it takes this
// node: that comes after this side of the handshake.
type etcdConn struct {
	net.Conn

	tls   *etcdTLS
	heard bool
}

// Read implements net.Conn.
func (c *etcdConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.heard {
		return n, err
	}
	c.heard = true
	if n > 0 {
		c.tls.why.Store(nil)
	} else if err != nil && isAlert(err) {
		c.tls.failed(c.tls.explain(c.RemoteAddr().String(), err))
	}
	return n, err
}

// isAlert says that the other side refuses, and not the network.
func isAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// explain says what to do about a handshake that failed.
func (t *etcdTLS) explain(where string, err error) error {
	if isAlert(err) {
		own := "this host's certificate"
		if t.cfg.CertFile != "" {
			own += " " + t.cfg.CertFile
		}
		says := func(text string) bool { return strings.HasSuffix(err.Error(), "tls: "+text) }
		switch {
		case t.cfg.CertFile == "" && (says("certificate required") || says("bad certificate")):
			return fmt.Errorf("%s wants a certificate of this host: put what docker flocker ca node makes for it into FLOCKER_CERTS, or set FLOCKER_ETCD_CERT and FLOCKER_ETCD_KEY (%w)", where, err)
		case says("unknown certificate authority"):
			return fmt.Errorf("%s does not know the authority of %s: take both sides' from one docker flocker ca (%w)", where, own, err)
		case says("expired certificate"):
			return fmt.Errorf("%s refuses %s as expired: make another with docker flocker ca node, or see to the clocks (%w)", where, own, err)
		case says("bad certificate"):
			return fmt.Errorf("%s refuses %s: it takes a host's, node.crt of docker flocker ca node, and no user's (%w)", where, own, err)
		}
		return fmt.Errorf("%s refuses %s: %w", where, own, err)
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return fmt.Errorf("%s has a certificate for other addresses: make it one with docker flocker ca node --ip, or use an address that it is for in FLOCKER_ETCD_ENDPOINTS (%w)", where, err)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		if t.cfg.CAFile == "" {
			return fmt.Errorf("%s has a certificate of an authority that this system does not know: set FLOCKER_ETCD_CACERT (%w)", where, err)
		}
		return fmt.Errorf("%s has a certificate of an authority that is not in %s: take both sides' from one docker flocker ca (%w)", where, t.cfg.CAFile, err)
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return fmt.Errorf("%s has a certificate that has expired: make it another with docker flocker ca node, or see to the clocks (%w)", where, err)
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return fmt.Errorf("%s speaks no TLS: give it certificates, or use http in FLOCKER_ETCD_ENDPOINTS (%w)", where, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}
