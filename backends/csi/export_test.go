package csi

import (
	"context"
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

// Closed says whether nobody has the disk that is at a path, or the earlier one of its
// number if that is wanted.
func Closed(ctx context.Context, path string, earlier bool) error {
	d, err := diskAt(path)
	if err != nil {
		return err
	}
	if earlier {
		d.Sequence--
	}
	return d.closed(ctx)
}
