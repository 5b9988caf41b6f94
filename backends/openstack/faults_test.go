package openstack_test

import (
	"os"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// Every call to Nova and Cinder fails in every way. Half a minute, after which an answer comes,
// is shorter here, and so is the patience of who waits for it.
func TestFaults(t *testing.T) {
	t.Parallel()
	faults := map[string]openstacktest.Fault{
		"429":               {Status: 429, Text: "This request was rate-limited."},
		"500":               {Status: 500, Text: "Unexpected API Error."},
		"503":               {Status: 503, Text: "The server is currently unavailable."},
		"no answer":         {Hang: true},
		"answer lost":       {Drop: true},
		"half an answer":    {Half: true},
		"answer after 30 s": {Slow: 3 * time.Second},
	}
	type system struct {
		backendtest.Storage
		*openstacktest.Server
	}
	for system, start := range map[string]func(t backendtest.T) system{
		"nova": func(t backendtest.T) system {
			c := newCloud(t, openstacktest.Config{})
			c.cfg = func(cfg *openstack.Config) { cfg.LateCalls = 100 * time.Millisecond }
			return system{backendtest.Storage{Node: c.node, Open: c.open}, c.Server}
		},
		"connector on Ceph": func(t backendtest.T) system {
			c := newOnCeph(t, 0)
			return system{backendtest.Storage{
				Node: func(cluster, node string) backends.Backend { return c.node(cluster, node) },
				Open: func(node, path string, _ bool) (backendtest.Device, error) { return c.ceph.Open(node, path) },
			}, c.Server}
		},
		"connector on NFS": func(t backendtest.T) system {
			c := newBare(t, 0) // as root
			return system{backendtest.Storage{Node: c.node}, c.Server}
		},
	} {
		t.Run(system, func(t *testing.T) {
			for name, fault := range faults {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					if quick := system == "nova" && !fault.Hang && fault.Slow == 0; !quick && os.Getenv("OPENSTACK") != "real" {
						t.Skip("waits for minutes: make test-openstack")
					}
					backendtest.RunCase(t, "every request fails", backendtest.Config{Timeout: 20 * time.Second, New: func(t backendtest.T) backendtest.Storage {
						s := start(t)
						s.Faults = map[string]func(n int) func() bool{name: func(n int) func() bool {
							f := fault
							f.After, f.Times = n, 1
							s.SetFaults(f)
							return func() bool {
								hit := s.Struck()
								s.SetFaults()
								return hit
							}
						}}
						return s.Storage
					}})
				})
			}
		})
	}
}

// What has been asked for is looked at soon.
func TestFirstLook(t *testing.T) {
	for range 1000 {
		if wait := openstack.FirstLook(); wait <= 0 || wait > 250*time.Millisecond {
			t.Fatalf("the first look at what has been asked for comes after %s, want 250ms at most", wait)
		}
	}
}
