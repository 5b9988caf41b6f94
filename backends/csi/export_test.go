package csi

import (
	"os"
	"strconv"

	"github.com/flocker-plugin/flocker/backends"
)

// SetProcesses makes the search for whoever has a device open look at every process, or
// at this one alone.
func SetProcesses(all bool) {
	processes = func() []string {
		if all {
			return names("/proc")
		}
		return []string{strconv.Itoa(os.Getpid())}
	}
}

// SetStep makes a backend call f before each of its steps.
func SetStep(b backends.Backend, f func(name string)) {
	switch b := b.(type) {
	case *fencer:
		b.step = f
	case *Backend:
		b.step = f
	}
}
