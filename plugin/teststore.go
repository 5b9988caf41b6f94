//go:build teststore

package main

import (
	"os"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// testBackends are the test storage, as exclusive and as fenced one. Its initiator's
// socket is at one of two places: seen from inside a managed plugin, and from outside.
var testBackends = map[string]opener{
	"teststore":        openTeststore(false),
	"teststore-fenced": openTeststore(true),
}

func openTeststore(fenced bool) opener {
	return func(_ settings, node ownership.Node) backends.Backend {
		socket := "/run/flocker-teststore.sock"
		if _, err := os.Stat("/host/run"); err == nil {
			socket = "/host" + socket
		}
		return teststore.New(teststore.Config{Fenced: fenced, Socket: socket, Node: node.ID})
	}
}
