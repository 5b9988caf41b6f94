package ebs_test

import (
	"testing"
	"time"

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
			many := 520 // more than a page
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
