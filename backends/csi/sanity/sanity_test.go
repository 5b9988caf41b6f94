// Package sanity has others judge the two sides of the CSI backend: csi-sanity, which
// the makers of drivers use, the driver of its tests; and drivers that others wrote, the
// backend. It is a module of its own for what they need.
package sanity

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"

	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
)

// TestSanity has csi-sanity judge the strict driver, in the shapes the backend's tests
// use it in. Ginkgo runs one suite in a process, so each shape is a container of it.
func TestSanity(t *testing.T) {
	backendtest.NeedRoot(t)
	for name, opts := range map[string]csitest.Options{
		"fences":   {Publish: true, Cuts: true, Stage: true, Shown: true, GetVolume: true, ListVolumes: true, MaxVolumes: 20},
		"unstaged": {Publish: true, Shown: true, ListVolumes: true, Mknod: true, Offline: true},
		"local":    {GetVolume: true, NoExpand: true},
	} {
		dir, err := os.MkdirTemp("/tmp", "csi")
		if err != nil {
			t.Fatal(err)
		}
		d := csitest.New(dir, opts)
		t.Cleanup(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			for _, violation := range d.Violations() {
				t.Logf("%s: %s", name, violation) // csi-sanity tries what is forbidden, too
			}
			_ = os.Remove(dir)
		})
		endpoint, err := d.Node("a")
		if err != nil {
			t.Fatal(err)
		}
		ginkgo.Describe(name, func() {
			cfg := sanity.NewTestConfig()
			cfg.Address = endpoint
			cfg.TestVolumeAccessType = "block"
			cfg.TestVolumeSize, cfg.TestVolumeExpandSize = 8<<20, 16<<20 // without, 10 GiB
			cfg.TargetPath, cfg.StagingPath = filepath.Join(dir, "target"), filepath.Join(dir, "staging")
			cfg.TestNodeVolumeAttachLimit = opts.MaxVolumes > 0
			cfg.TestInvalidListVolumesStartingToken = "no-token"
			sanity.GinkgoTest(&cfg)
		})
	}
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.Timeout = 5 * time.Minute
	reporter.NoColor = true
	if !ginkgo.RunSpecs(t, "csi-sanity", suite, reporter) {
		t.Error("csi-sanity is not content")
	}
}
