package main

import (
	"fmt"
	"path/filepath"
)

// A storage is a backend to put volumes on.
type storage struct {
	// fences says that a dead host's volumes move by themselves. Otherwise it takes
	// an operator, or the host.
	fences bool
	// image is the pattern of the file with a volume's data, below the rig's
	// directory; %s is the volume's UUID.
	image string
}

// storages are the backends there are.
var storages = map[string]storage{
	"loopback":         {image: "shared/%s/*.img"},
	"teststore":        {fences: true, image: "switch/teststore/ts-%s/data"},
	"teststore-fenced": {fences: true, image: "switch/teststore/tf-%s/data"},
}

// imageOf is the file with a volume's data.
func (r *run) imageOf(v *volume, id string) (string, error) {
	return only(filepath.Join(r.rig.Dir, fmt.Sprintf(storages[v.backend].image, id)))
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
