package cephtest_test

import (
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

func TestContract(t *testing.T) {
	c := cluster(t)
	backendtest.Run(t, backendtest.Config{
		New: func(backendtest.T) backendtest.Storage {
			return backendtest.Storage{
				Node: func(clusterID, node string) backends.Backend { return host(t, config(c), clusterID, node) },
				Down: c.Pause,
			}
		},
		Many: 40, Timeout: 2 * time.Minute,
	})
}
