package openstack_test

import (
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

func TestContract(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]openstacktest.Config{
		"at once":            {},
		"states take a time": {Delay: 3 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backendtest.Run(t, backendtest.Config{
				New: func(t backendtest.T) backendtest.Storage {
					c := newCloud(t, cfg)
					return backendtest.Storage{Node: c.node, Open: c.open, Down: func(down bool) {
						if c.SetFaults(); down {
							c.SetFaults(openstacktest.Fault{Status: 503, Text: "The server is currently unavailable."})
						}
					}}
				},
				Many: 60, Timeout: 2 * time.Minute, // and see TestPages
			})
		})
	}
}
