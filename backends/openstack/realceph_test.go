package openstack_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

// TestRealCeph is on a real Cinder whose volumes are on a real Ceph.
func TestRealCeph(t *testing.T) {
	s := newStack(t)
	backendtest.NeedRoot(t)
	cephtest.NeedCeph(t)
	cephtest.Sweep()
	ceph, err := cephtest.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ceph.Stop)
	s.startCinderAlone(fmt.Sprintf(`volume_driver = cinder.volume.drivers.rbd.RBDDriver
rbd_pool = %s
rbd_user = flocker
rbd_ceph_conf = %s
`, cephtest.Pool, s.file("ceph.conf", readFile(ceph.Conf)+"keyring = "+ceph.Keyring+"\n", 0o644)))
	node := func(cluster, node string) backends.Backend {
		b, err := openstack.New(openstack.Config{
			Attach: "connector", CinderURL: s.cinder, ProjectID: openstacktest.Project,
			CephUser: "flocker", CephKeyringFile: ceph.Keyring, CephMonitors: []string{ceph.Monitors}, CephAttach: "fuse", RunDir: ceph.Dir + "/r",
		}, openstack.Self{Node: node, Cluster: cluster})
		must(err)
		openstack.Patient(b)
		return b
	}
	cluster := uuid.NewString()
	a, b := node(cluster, "node-a"), node(cluster, "node-b")
	var vol backends.Volume
	s.await("the first volume", 5*time.Minute, func() bool {
		var err error
		if vol, err = a.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30}); err != nil {
			t.Log(err)
		}
		return err == nil
	})

	// The host that is cut off writes without pause: its writes fail, what was acknowledged
	// is there for the next owner, and nothing comes after it.
	t.Run("fence of a writer", func(t *testing.T) {
		for round := range uint64(3) {
			token := int64(10 + 10*round)
			att, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
			if err != nil {
				t.Fatal(err)
			}
			acknowledged, failed := make(chan uint64, 1<<20), make(chan error, 1)
			go func() { failed <- writeUntil(att.Device, round, acknowledged) }()
			for range 20 {
				<-acknowledged
			}
			if _, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token + 1}); !errors.Is(err, backends.ErrInUse) {
				t.Errorf("attached twice: %v", err)
			}
			evidence, err := b.(backends.Fencer).Fence(t.Context(), backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "node-a", Token: token})
			t.Log(evidence)
			if err != nil || !strings.Contains(evidence, "is on the blocklist, and no watcher of "+cephtest.Pool+"/volume-"+vol.Ref) {
				t.Fatalf("got %q, %v", evidence, err)
			}
			list, err := ceph.Run(t.Context(), "ceph", "osd", "blocklist", "ls")
			if err != nil || !strings.Contains(list, strings.Fields(evidence)[1]) {
				t.Errorf("the blocklist is %q, %v", list, err)
			}
			taken, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token + 1})
			if err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-failed:
				if !errors.Is(err, syscall.EIO) {
					t.Errorf("the cut writer got %v, want an I/O error", err)
				}
			case <-time.After(time.Minute):
				t.Fatal("the cut writer goes on, or hangs")
			}
			close(acknowledged)
			last := uint64(20)
			for n := range acknowledged {
				last = n
			}
			for n := uint64(1); n < last+20; n++ {
				switch got := readNumber(t, taken.Device, n); {
				case n <= last && got != round<<32|n:
					t.Errorf("record %d of %d: got %d", n, last, got)
				case n > last+1 && got == round<<32|n:
					t.Errorf("record %d is there, and %d was the last", n, last)
				}
			}
			for b, att := range map[backends.Backend]backends.Attachment{a: att, b: taken} {
				if err := b.Detach(t.Context(), att); err != nil {
					t.Error(err)
				}
			}
		}
	})

	t.Run("contract", func(t *testing.T) {
		backendtest.Run(t, backendtest.Config{
			New:  func(backendtest.T) backendtest.Storage { return backendtest.Storage{Node: node} },
			Many: 10, Timeout: 5 * time.Minute,
		})
	})
}

const numbered = 4096

// writeUntil writes numbered records, each synced before it counts, until one fails.
func writeUntil(device string, round uint64, acknowledged chan<- uint64) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for n := uint64(1); ; n++ {
		buf := make([]byte, numbered)
		binary.LittleEndian.PutUint64(buf, round<<32|n)
		if _, err := f.WriteAt(buf, int64(n)*numbered); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		acknowledged <- n
	}
}

func readNumber(t *testing.T, device string, n uint64) uint64 {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 8)
	if _, err := f.ReadAt(buf, int64(n)*numbered); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(buf)
}
