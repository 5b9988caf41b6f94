package openstack

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"

	"github.com/flocker-plugin/flocker/backends"
)

// callTimeout bounds one call. Nova answers an attach only after it has asked the
// compute host, and Cinder a connector after it has asked its storage.
const callTimeout = 15 * time.Second

// volumeVersion is the version of Cinder's API that is asked for, of Queens (2018): the
// first that completes an attachment; it grows attached volumes as well.
const volumeVersion = "3.44"

// keystone is what logs in are made at.
func (c Config) keystone() string {
	if c.rackspace() {
		return "Rackspace's identity service"
	}
	return "Keystone"
}

// conn is OpenStack after logging in.
type conn struct {
	volume, compute *gophercloud.ServiceClient
}

// connect logs in, once. gophercloud logs in again when a token has expired.
func (b *cinder) connect(ctx context.Context) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	b.mu.Lock()
	c := b.conn
	b.mu.Unlock()
	if c != nil {
		return c, nil
	}
	c, err := b.login(ctx)
	if err != nil {
		return nil, &loginFailed{err}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		b.conn = c
	}
	return b.conn, nil
}

// forget makes the next call log in anew, with what the files say by then.
func (b *cinder) forget(c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == c {
		b.conn = nil
	}
}

func (b *cinder) login(ctx context.Context) (*conn, error) {
	if b.cfg.rackspace() {
		return b.cfg.loginRackspace(ctx)
	}
	auth, endpoints, tlsConfig, err := b.cfg.credentials()
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	client, err := httpClient(tlsConfig, b.cfg.CAFile)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	if b.cfg.CinderURL != "" {
		provider := &gophercloud.ProviderClient{TokenID: "admin:" + b.cfg.ProjectID, HTTPClient: client}
		provider.UseTokenLock()
		base := strings.TrimSuffix(b.cfg.CinderURL, "/") + "/" + b.cfg.ProjectID + "/"
		return &conn{volume: &gophercloud.ServiceClient{ProviderClient: provider, Endpoint: base, Type: "block-storage", Microversion: volumeVersion}}, nil
	}
	provider, err := openstack.NewClient(auth.IdentityEndpoint)
	if err != nil {
		return nil, fmt.Errorf("auth_url %q: %w; %w", auth.IdentityEndpoint, err, backends.ErrUnavailable)
	}
	provider.HTTPClient = client
	auth.AllowReauth = true
	if err := openstack.Authenticate(ctx, provider, auth); err != nil {
		return nil, b.cfg.loginError(ctx, auth.IdentityEndpoint, err, auth.Password, auth.ApplicationCredentialSecret, auth.Passcode, auth.TokenID)
	}
	c := &conn{}
	missing := func(what string, err error) (*conn, error) {
		return nil, fmt.Errorf("%s's catalog has no %s with interface %s in region %q; check region and interface (%w): %w", b.cfg.keystone(),
			what, cmp.Or(string(endpoints.Availability), "public"), endpoints.Region, err, backends.ErrUnavailable)
	}
	if c.volume, err = openstack.NewBlockStorageV3(provider, endpoints); err != nil {
		return missing("block storage of version 3 (Cinder)", err)
	}
	c.volume.Microversion = volumeVersion
	if b.cfg.Attach != "connector" {
		if c.compute, err = openstack.NewComputeV2(provider, endpoints); err != nil {
			return missing("compute service (Nova)", err)
		}
	}
	return c, nil
}

// loginFailed is an error of before anything was asked for. It is not tried again at
// once, as Keystone may lock a user out who does that.
type loginFailed struct{ error }

func (e *loginFailed) Unwrap() error { return e.error }

// loginError says what Keystone's answer means, without the secrets that were sent: who
// checks a request may repeat it.
func (c Config) loginError(ctx context.Context, url string, err error, secrets ...string) error {
	if ctx.Err() != nil {
		return backends.Classify(backends.ErrUnavailable, fmt.Errorf("%s at %s has not answered in time: %w", c.keystone(), url, context.Cause(ctx)))
	}
	check := "check the user, its domain, the project and the file with the secret"
	if c.rackspace() {
		check = "check username and the file with the key"
	}
	code, ok := errors.AsType[gophercloud.ErrUnexpectedResponseCode](err)
	switch {
	case !ok:
		err = fmt.Errorf("%s at %s does not answer: %w", c.keystone(), url, err)
	case code.Actual == http.StatusUnauthorized:
		err = fmt.Errorf("%s at %s refuses the credentials (%s): %s", c.keystone(), url, said(code, secrets...), check)
	case code.Actual == http.StatusNotFound:
		err = fmt.Errorf("%s at %s says %s: check auth_url", c.keystone(), url, said(code, secrets...))
	default:
		err = fmt.Errorf("%s at %s says %s", c.keystone(), url, said(code, secrets...))
	}
	return backends.Classify(backends.ErrUnavailable, err)
}

// credentials returns how to log in, which the files say.
func (c Config) credentials() (gophercloud.AuthOptions, gophercloud.EndpointOpts, *tls.Config, error) {
	endpoints := gophercloud.EndpointOpts{Region: c.Region, Availability: gophercloud.Availability(c.Interface)}
	auth := gophercloud.AuthOptions{IdentityEndpoint: c.AuthURL}
	var err error
	switch {
	case c.Cloud != "":
		opts := []clouds.ParseOption{clouds.WithCloudName(c.Cloud)}
		if c.CloudsFile != "" {
			opts = append(opts, clouds.WithLocations(c.CloudsFile))
		}
		if c.Region != "" {
			opts = append(opts, clouds.WithRegion(c.Region))
		}
		if c.Interface != "" {
			opts = append(opts, clouds.WithEndpointType(c.Interface))
		}
		auth, endpoints, tlsConfig, err := clouds.Parse(opts...)
		if err != nil {
			err = fmt.Errorf("clouds.yaml cannot be used: %w", err)
		}
		return auth, endpoints, tlsConfig, err
	case c.ApplicationCredentialID != "":
		auth.ApplicationCredentialID = c.ApplicationCredentialID
		auth.ApplicationCredentialSecret, err = secret(c.ApplicationCredentialSecretFile)
	case c.Username != "":
		auth.Username, auth.DomainName = c.Username, c.UserDomain
		auth.Scope = &gophercloud.AuthScope{ProjectID: c.ProjectID}
		if c.ProjectID == "" {
			auth.Scope = &gophercloud.AuthScope{ProjectName: c.ProjectName, DomainName: c.ProjectDomain}
		}
		auth.Password, err = secret(c.PasswordFile)
	}
	return auth, endpoints, nil, err
}

func secret(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read the secret: %w", err)
	}
	s := strings.TrimRight(string(text), "\r\n")
	if s == "" {
		return "", fmt.Errorf("%s is empty; it is to have the secret", path)
	}
	return s, nil
}

// httpClient leaves nothing behind in this host's kernel: what was not sent when a
// call is given up never is.
func httpClient(tlsConfig *tls.Config, caFile string) (http.Client, error) {
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return http.Client{}, fmt.Errorf("ca_file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return http.Client{}, fmt.Errorf("ca_file: %s has no certificate", caFile)
		}
		tlsConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: tlsConfig, TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: 4, MaxConnsPerHost: 16, IdleConnTimeout: 30 * time.Second,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
				err = tcp.SetLinger(0)
			}
			return conn, err
		},
	}
	return http.Client{Transport: transport, Timeout: callTimeout}, nil
}
