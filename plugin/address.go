package main

import (
	"context"
	"net"
	"time"
)

// hostAddress is the address from which this host reaches others: that of the interface
// of the default route, else the first one that is not for this host alone; "" if there
// is none.
func hostAddress(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	// Nothing is sent to these, which are nobody's: the kernel only looks for the way.
	for _, far := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		conn, err := new(net.Dialer).DialContext(ctx, "udp", far)
		if err != nil {
			continue
		}
		from, ok := conn.LocalAddr().(*net.UDPAddr)
		_ = conn.Close()
		if ok && from.IP.IsGlobalUnicast() {
			return from.IP.String()
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return ""
	}
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return ""
}
