// Package robustness proves the map from datasets to owners on a real etcd that
// is treated badly: three members in processes of their own are killed, paused,
// cut off, compacted and restored, while several nodes fight for a few volumes.
// What the nodes asked for and were told goes to a linearizability checker, with
// a model that knows owners and tokens only.
//
// It needs no root. -robustness.seed repeats the choices of a run, as far as real
// time allows; -robustness.time makes it longer.
package robustness

import (
	"flag"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

var (
	flagSeed = flag.Uint64("robustness.seed", 0, "repeat the choices of the run that printed this seed")
	flagTime = flag.Duration("robustness.time", 5*time.Second, "how long to go on with each kind of fault")
)

func TestMain(m *testing.M) {
	if config := os.Getenv(memberEnv); config != "" {
		runMember(config)
	}
	os.Exit(m.Run())
}

// chosenSeed is the one to repeat, or a new one.
func chosenSeed(t *testing.T) uint64 {
	t.Helper()
	seed := *flagSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("repeat with -robustness.seed %d", seed)
	return seed
}
