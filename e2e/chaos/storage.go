package main

import (
	"fmt"
	"path/filepath"
)

// A storage is a backend to put volumes on.
type storage struct {
	class string

	// fences says that a dead host's volumes move by themselves. Otherwise it takes
	// an operator, or the host.
	fences bool
	// image is the pattern of the file with a volume's data, below the rig's
	// directory; %s is the volume's UUID.
	image string
}

// backends are those there are.
var backends = map[string]storage{
	"loopback":         {class: "F0", image: "shared/%s/*.img"},
	"teststore":        {class: "F1", fences: true, image: "switch/teststore/ts-%s/data"},
	"teststore-fenced": {class: "F2", fences: true, image: "switch/teststore/tf-%s/data"},
}

// bothBackends is the test storage, of either class, and loopback.
const bothBackends = "teststore,loopback,teststore-fenced"

func backendOf(v *volume) storage { return backends[v.backend] }

// imageOf is the file with a volume's data.
func (r *run) imageOf(v *volume, id string) (string, error) {
	return only(filepath.Join(r.rig.Dir, fmt.Sprintf(backendOf(v).image, id)))
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
