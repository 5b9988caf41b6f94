package sanity

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
)

// lacks are the cases of the contract that csi-driver-host-path cannot pass.
var lacks = map[string]string{
	"attach_elsewhere_attached_volume": "it stages a volume once, and all nodes are one to it",
	"detach_volume":                    "it makes a volume's loop device when it makes the volume, and keeps it",
	"resize":                           "it does not tell the loop device that its file has grown",
}

// TestHostpathPlugin runs the contract against csi-driver-host-path, which is no Go
// module one could depend on: HOSTPATHPLUGIN is its program, built with -ldflags
// "-X main.version=1". It is of one node, so that our nodes are one to it.
func TestHostpathPlugin(t *testing.T) {
	program := os.Getenv("HOSTPATHPLUGIN")
	if program == "" {
		t.Skip("HOSTPATHPLUGIN is not set")
	}
	backendtest.NeedRoot(t)
	dir, err := os.MkdirTemp("/tmp", "csi")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(program, "--endpoint=unix://"+socket, "--nodeid=node", "--statedir="+filepath.Join(dir, "data"), "--drivername=hostpath.csi.k8s.io")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = exec.Command("rm", "-r", "--one-file-system", dir).Run()
	})
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	var mu sync.Mutex
	catalogs, dirs := map[string]*csitest.Catalog{}, map[string]string{}
	storage := backendtest.Storage{Node: func(cluster, node string) backends.Backend {
		mu.Lock()
		defer mu.Unlock()
		if catalogs[cluster] == nil {
			catalogs[cluster] = &csitest.Catalog{}
		}
		if dirs[node] == "" {
			dirs[node] = filepath.Join(dir, fmt.Sprint("n", len(dirs)))
		}
		b, err := csi.New(csi.Config{Endpoint: socket}, csi.Self{Node: node, Cluster: cluster, Dir: dirs[node], Catalog: catalogs[cluster]})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}}
	for _, c := range backendtest.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			if why := lacks[c.Name]; why != "" {
				t.Skip(why)
			}
			c.Run(t, backendtest.Config{Many: 20, Timeout: 10 * time.Second, New: func(backendtest.T) backendtest.Storage { return storage }})
		})
	}
}
