package main

import (
	"net"
	"slices"
	"testing"
)

// It is an address that this host has, and that others may reach; none if there is none.
func TestHostAddress(t *testing.T) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{}
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			want = append(want, n.IP.String())
		}
	}
	if got := hostAddress(t.Context()); !slices.Contains(want, got) && (got != "" || len(want) > 0) {
		t.Errorf("address is %q, want one of %q", got, want)
	}
}
