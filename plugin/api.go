package main

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/control/rest"
)

// apiOff is FLOCKER_API_LISTEN where there is to be no REST API.
const apiOff = "off"

// certificateRound is the time between two looks for certificates.
var certificateRound = 30 * time.Second

// serveAPI answers users' requests over TLS until ctx is done, as soon as there are
// certificates. Without it volumes are served all the same: a failure is logged and tried
// again.
func serveAPI(ctx context.Context, s settings, h http.Handler, log *logrus.Entry) {
	if s.APIListen == apiOff {
		return
	}
	files, err := awaitCertificates(ctx, s, log)
	if err != nil {
		return
	}
	// An error is ctx's end.
	_, _ = persist(ctx, log, "REST API", func() (struct{}, error) {
		creds, err := certs.Load(files, func(err error) { log.Warn(err) })
		if err != nil {
			return struct{}{}, err
		}
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.APIListen)
		if err != nil {
			return struct{}{}, fmt.Errorf("listen for the REST API: %w", err)
		}
		log.WithFields(logrus.Fields{"address": l.Addr().String(), "certificate": files.Cert}).Info("the REST API is served")
		return struct{}{}, rest.Serve(ctx, l, creds, h, log)
	})
}

// apiDirs are where certificates for the REST API may be.
func apiDirs(s settings) []string {
	if s.Certs != "" {
		return []string{s.Certs}
	}
	return []string{etcFlocker, filepath.Join(s.StateDir, "certs")}
}

// apiFiles are those of the REST API, if there are any.
func apiFiles(s settings) (files certs.Files, ok bool) {
	for _, dir := range apiDirs(s) {
		files = certs.Files{CA: filepath.Join(dir, certs.CAFile), Cert: filepath.Join(dir, certs.ServerFile), Key: filepath.Join(dir, certs.ServerKey)}
		if _, err := os.Stat(files.Cert); err == nil {
			return files, true
		}
	}
	return files, false
}

// certificates are those that this host uses, and until when they are good.
func certificates(s settings) []certs.Expiry {
	files := []string{s.EtcdCACert, s.EtcdCert}
	if dir := s.etcdCerts(); dir != "" && len(s.EtcdEndpoints) == 0 {
		files = append(files, filepath.Join(dir, certs.CAFile), filepath.Join(dir, certs.NodeFile))
	}
	if api, ok := apiFiles(s); ok && s.APIListen != apiOff {
		files = append(files, api.CA, api.Cert)
	}
	slices.Sort(files)
	return certs.Expiries(slices.Compact(files)...)
}

// expiryRound is how often the log warns of a certificate.
var expiryRound = 24 * time.Hour

// warnOfExpiry says in the log which certificates end soon, until ctx is done.
func warnOfExpiry(ctx context.Context, s settings, log *logrus.Entry) {
	for {
		for _, e := range certificates(s) {
			if text := e.Warning(time.Now()); text != "" {
				log.Warnf("%s: %s", text, certs.Renewal)
			}
		}
		select {
		case <-time.After(expiryRound):
		case <-ctx.Done():
			return
		}
	}
}

// awaitCertificates waits until there is a server's certificate, so that whoever makes
// one need not start the plugin again.
func awaitCertificates(ctx context.Context, s settings, log *logrus.Entry) (certs.Files, error) {
	for told := false; ; told = true {
		if files, ok := apiFiles(s); ok {
			return files, nil
		}
		if !told {
			dirs := apiDirs(s)
			log.Infof("there is no REST API: it begins when there is %s, which docker flocker ca node makes, with %s and %s beside it; FLOCKER_API_LISTEN=%s is without",
				filepath.Join(dirs[len(dirs)-1], certs.ServerFile), certs.ServerKey, certs.CAFile, apiOff)
		}
		select {
		case <-time.After(certificateRound):
		case <-ctx.Done():
			return certs.Files{}, cmp.Or(context.Cause(ctx), ctx.Err())
		}
	}
}
