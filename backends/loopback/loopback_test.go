package loopback_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/loopback"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
		t.Fatal("needs root, and REQUIRE says that it is there")
	}
	t.Skip("needs root")
}

func TestContract(t *testing.T) {
	needRoot(t)
	for name, preallocate := range map[string]bool{"sparse": false, "preallocated": true} {
		t.Run(name, func(t *testing.T) {
			cfg := backendtest.Config{New: func(t backendtest.T) backendtest.Storage {
				dir := t.TempDir()
				return backendtest.Storage{Node: func(cluster, node string) backends.Backend {
					return loopback.New(loopback.Config{Dir: dir, Cluster: cluster, Node: node, Preallocate: preallocate})
				}}
			}}
			if preallocate {
				cfg.Size, cfg.Many = 4<<20, 10
			}
			backendtest.Run(t, cfg)
		})
	}
}
