package rest

import (
	"context"
	"errors"
	stdlog "log"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"

	"github.com/flocker-plugin/flocker/control/certs"
)

// maxConnections is how many clients are served at a time. More wait.
var maxConnections = 1000

const (
	// idle is how long a connection is kept for the next request.
	idle = 2 * time.Minute
	// grace is for the answers that are being sent when the process ends.
	grace = time.Second
)

// Serve answers on l until ctx is done. Whoever connects needs a certificate of the
// cluster, and has ten seconds for it.
func Serve(ctx context.Context, l net.Listener, creds *certs.Credentials, h http.Handler, log *logrus.Entry) error {
	srv := &http.Server{
		Handler: h,
		// A host is let in, to be told in a sentence why it may not use the API.
		TLSConfig:         creds.Server(certs.User, certs.Reader, certs.Node),
		ReadHeaderTimeout: ioLimit,
		IdleTimeout:       idle,
		MaxHeaderBytes:    32 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 100, SendPingTimeout: idle, PingTimeout: ioLimit, WriteByteTimeout: writeLimit},
		ErrorLog:          stdlog.New(errorLog{log}, "", 0),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if srv.Shutdown(end) != nil {
			_ = srv.Close() // there is nobody to tell
		}
	})
	err := srv.ServeTLS(netutil.LimitListener(l, maxConnections), "", "")
	if !stop() {
		<-closed
		return nil
	}
	return errors.Join(err, srv.Close())
}

// errorLog takes net/http's lines: most are of clients that were refused.
type errorLog struct{ log *logrus.Entry }

func (e errorLog) Write(line []byte) (int, error) {
	e.log.WithField("part", "REST API").Info(strings.TrimSpace(string(line)))
	return len(line), nil
}
