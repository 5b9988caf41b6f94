package ownership_test

import (
	"testing"

	"github.com/flocker-plugin/flocker/driver/ownership"
	"github.com/flocker-plugin/flocker/driver/ownership/ownershiptest"
)

func TestMemory(t *testing.T) {
	ownershiptest.Run(t, ownershiptest.Config{New: func(*testing.T) ownershiptest.Cluster {
		mem := ownership.NewMemory()
		return ownershiptest.Cluster{
			Prefix:  "/test",
			Connect: func() ownership.Store { return mem },
			Compact: mem.Compact,
		}
	}})
}
