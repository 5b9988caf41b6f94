package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// A storage is a backend to put volumes on.
type storage struct {
	// settings are what the plugin needs for it.
	settings map[string]string
	// fences says that a dead host's volumes move by themselves. Otherwise it takes
	// an operator, or the host.
	fences bool
	// start starts what there is to start; nil: nothing.
	start func(ctx context.Context, r *rig.Rig) error
	// image is the file with a volume's data, and nothing but a detached volume's.
	image func(r *rig.Rig, volumeID string) (string, error)
}

// storages are the backends there are.
var storages = map[string]*storage{
	"loopback": {
		image: func(r *rig.Rig, id string) (string, error) {
			return only(filepath.Join(r.Shared, id, "*.img"))
		},
	},
}

// only is the one file that matches.
func only(pattern string) (string, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(files) != 1 {
		return "", fmt.Errorf("%d files match %s, want one", len(files), pattern)
	}
	return files[0], nil
}
