package ebs_test

import (
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/ebs/ec2test"
)

func TestContract(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]ec2test.Config{
		"at once":        {},
		"states and lag": {Delay: 5 * time.Millisecond, Lag: 5 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			many := 1200 // three pages
			if cfg.Delay > 0 {
				many = 60
			}
			backendtest.Run(t, backendtest.Config{
				New: func(t backendtest.T) backendtest.Storage {
					c := newCloud(t, cfg)
					return backendtest.Storage{Node: c.node, Open: c.open, Down: func(down bool) {
						if c.SetFaults(); down {
							c.SetFaults(ec2test.Fault{Code: "Unavailable", Status: 503})
						}
					}}
				},
				Many: many,
			})
		})
	}
}

// Every call to EC2 fails in every way. Half a minute, after which an answer comes, is shorter
// here, and so is the backend's patience. What is carried out late has tests of its own.
func TestFaults(t *testing.T) {
	t.Parallel()
	const patience, minute = 500 * time.Millisecond, time.Second
	faults := map[string]ec2test.Fault{
		"429":                 {Code: "RequestLimitExceeded", Status: 429},
		"500":                 {Code: "InternalError", Status: 500},
		"503":                 {Code: "Unavailable", Status: 503},
		"no answer":           {Hang: true},
		"answer lost":         {Drop: true},
		"half an answer":      {Half: true},
		"answer after 30 s":   {Slow: minute},
		"request has expired": {Code: "RequestExpired", Status: 400},
		"credentials renewed": {Code: "ExpiredToken", Status: 400},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backendtest.RunCase(t, "every request fails", backendtest.Config{New: func(t backendtest.T) backendtest.Storage {
				c := newCloud(t, ec2test.Config{})
				s := backendtest.Storage{Node: func(cluster, node string) backends.Backend {
					b := c.backend(cluster, node)
					b.Impatient(patience)
					return b
				}, Open: c.open}
				s.Faults = map[string]func(n int) func() bool{name: func(n int) func() bool {
					f := fault
					f.After, f.Times = n, 1
					c.SetFaults(f)
					return func() bool {
						hit := c.Struck()
						c.SetFaults()
						if off := c.stopped(); len(off) > 0 {
							t.Errorf("%s was stopped for a call that failed", off)
						}
						return hit
					}
				}}
				return s
			}})
		})
	}
}
