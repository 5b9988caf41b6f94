package robustness

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// traffic is what happens to the bytes on a link. The zero value passes them on.
type traffic struct {
	// cut: connections end, and new ones do at once.
	cut bool
	// stall: nothing passes. It does, late, when this ends.
	stall bool
	// mute: requests are delivered, answers are not. The connections end with it,
	// since their answers cannot be made up for.
	mute bool
	// delay passes before each piece.
	delay time.Duration
}

// link is the way from somebody to a member, or back.
type link struct {
	mu      sync.Mutex
	now     traffic
	changed chan struct{} // closed when now changes
	conns   map[net.Conn]bool
}

func newLink() *link { return &link{changed: make(chan struct{}), conns: map[net.Conn]bool{}} }

// set changes what happens from now on.
func (l *link) set(next traffic) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ended := next.cut || l.now.mute && !next.mute
	l.now = next
	close(l.changed)
	l.changed = make(chan struct{})
	if ended {
		for c := range l.conns {
			_ = c.Close()
		}
	}
}

// add says whether a connection may begin.
func (l *link) add(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		l.conns[c] = true
	}
	return !l.now.cut
}

func (l *link) remove(conns ...net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
		delete(l.conns, c)
	}
}

// pass waits until something may pass, and says whether it may.
func (l *link) pass(answer bool) bool {
	delayed := false
	for {
		l.mu.Lock()
		now, changed := l.now, l.changed
		l.mu.Unlock()
		switch {
		case now.stall && !now.cut:
			<-changed
		case now.delay > 0 && !delayed:
			delayed = true
			time.Sleep(now.delay)
		default:
			return !now.cut && (!answer || !now.mute)
		}
	}
}

// copy passes on what comes from src until either end closes.
func (l *link) copy(dst io.WriteCloser, src io.Reader, answer bool) {
	defer func() { _ = dst.Close() }()
	buf := make([]byte, 1<<16)
	for {
		n, err := src.Read(buf)
		if n > 0 && l.pass(answer) {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// proxy is an address that leads to a member.
type proxy struct {
	listener net.Listener
	socket   string
	// via tells a connection's link, from what it begins with.
	via func(*bufio.Reader) *link
}

func startProxy(t *testing.T, socket string, via func(*bufio.Reader) *link) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, socket: socket, via: via}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
	return p
}

func (p *proxy) address() string { return p.listener.Addr().String() }

func (p *proxy) serve(from net.Conn) {
	defer func() { _ = from.Close() }()
	begin := bufio.NewReaderSize(from, 1<<14)
	link := p.via(begin)
	to, err := net.Dial("unix", p.socket)
	if err != nil {
		return
	}
	defer link.remove(from, to)
	if !link.add(from, to) {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		link.copy(to, begin, false)
	}()
	link.copy(from, to, true)
	<-done
}

// sender is the member that a connection between members comes from, in etcd's
// spelling; empty if it does not say.
func sender(begin *bufio.Reader) string {
	for {
		if _, err := begin.Peek(begin.Buffered() + 1); err != nil {
			return ""
		}
		head, _ := begin.Peek(begin.Buffered())
		if !bytes.Contains(head, []byte("\r\n\r\n")) {
			continue
		}
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
		if err != nil {
			return ""
		}
		return req.Header.Get("X-Server-From")
	}
}
