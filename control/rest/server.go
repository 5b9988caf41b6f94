package rest

import (
	"context"
	"crypto/tls"
	"errors"
	stdlog "log"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"

	"github.com/flocker-plugin/flocker/control/certs"
)

// These are smaller in tests.
var (
	// maxConnections is how many clients are served at a time. More wait.
	maxConnections = 1000
	// certificateRound is how often the certificates of those who are connected are looked
	// at.
	certificateRound = 10 * time.Second
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
	var clients clients
	srv.ConnState = clients.note
	ended := make(chan struct{})
	defer close(ended)
	round := time.NewTicker(certificateRound)
	defer round.Stop()
	go func() {
		for {
			select {
			case <-round.C:
				clients.part(creds, log)
			case <-ended:
				return
			}
		}
	}()
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

// clients are the connections of those who were let in.
type clients struct {
	mu  sync.Mutex
	all map[*tls.Conn]bool
}

func (c *clients) note(conn net.Conn, state http.ConnState) {
	secure, ok := conn.(*tls.Conn)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateActive, http.StateIdle: // the handshake is over
		if c.all == nil {
			c.all = map[*tls.Conn]bool{}
		}
		c.all[secure] = true
	case http.StateClosed:
		delete(c.all, secure)
	case http.StateNew, http.StateHijacked:
	}
}

// part closes the connections of those who would not be let in any more, whatever they are
// being answered.
func (c *clients) part(creds *certs.Credentials, log *logrus.Entry) {
	c.mu.Lock()
	all := slices.Collect(maps.Keys(c.all))
	c.mu.Unlock()
	for _, conn := range all {
		if err := creds.Stays(conn.ConnectionState().PeerCertificates); err != nil {
			log.WithFields(logrus.Fields{"part": "REST API", "from": conn.RemoteAddr().String(), "err": err}).Info("a connection ends: its certificate is not good any more")
			_ = conn.NetConn().Close() // without a word: the client may not read
		}
	}
}

// errorLog takes net/http's lines: most are of clients that were refused.
type errorLog struct{ log *logrus.Entry }

func (e errorLog) Write(line []byte) (int, error) {
	e.log.WithField("part", "REST API").Info(strings.TrimSpace(string(line)))
	return len(line), nil
}
