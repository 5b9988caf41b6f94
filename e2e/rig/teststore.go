package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends/teststore"
)

// TestStore is the rig's network block storage, see e2e/teststore. It serves its
// data from the switch, so that a host which is cut off from the network is cut off
// from its data, too; the server can also cut off a host itself. On each host runs
// an initiator, which makes the devices.
//
// The plugin needs to be the one of `make plugin-teststore` (TestStorePlugin), and
// has the storage as the backends "teststore" and "teststore-fenced".
type TestStore struct {
	r       *Rig
	program string
	server  *process
}

const storeURL = "http://" + storeAddr + ":8200"

// TestStore starts the storage, once for a rig, and an initiator on each host, now
// and whenever it boots.
func (r *Rig) TestStore(ctx context.Context) (*TestStore, error) {
	for _, name := range []string{"nbdkit", "nbdfuse"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, fmt.Errorf("start the test storage: %w; `make deps` installs it", err)
		}
	}
	program, err := buildProgram(ctx, "teststore")
	if err != nil {
		return nil, err
	}
	if _, err := r.sw.exec(ctx, "ip", "addr", "add", storeAddr+"/24", "dev", "br0"); err != nil {
		return nil, fmt.Errorf("start the test storage: %w", err)
	}
	s := &TestStore{r: r, program: program}
	if err := s.StartServer(ctx); err != nil {
		return nil, err
	}
	r.store = s
	return s, r.each(func(h *Host) error { return h.StartInitiator(ctx) })
}

// TestStorePlugin is the directory of the plugin that knows the test storage.
func TestStorePlugin() (string, error) {
	root, err := sourceRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "build", "plugin-teststore")
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%w; `make plugin-teststore` makes it", err)
	}
	return dir, nil
}

// Server is the storage's control interface. It is not a host's: no Cut or
// Partition is in the way.
func (s *TestStore) Server() teststore.Peer { return teststore.Server(storeURL, s.r.Dial) }

// SetFaults replaces what goes wrong, until the server is started again, and says
// how many calls have suffered each of the faults before.
func (s *TestStore) SetFaults(ctx context.Context, calls []teststore.Fault, data []teststore.DataFault) (suffered []int, err error) {
	reply, err := s.Server().Call(ctx, teststore.OpFaults, teststore.Request{Faults: calls, DataFaults: data})
	return reply.Suffered, err
}

// StartServer starts the server with the volumes it had, and waits until it answers.
func (s *TestStore) StartServer(ctx context.Context) (err error) {
	s.server, err = s.r.sw.start(ctx, "teststore", nil,
		s.program, "server", "-dir", filepath.Join(s.r.Dir, "switch", "teststore"), "-listen", storeAddr+":8200")
	if err != nil {
		return err
	}
	return s.wait(ctx, s.server, func(ctx context.Context) error {
		_, err := s.Server().Call(ctx, teststore.OpList, teststore.Request{})
		return err
	})
}

// KillServer kills the server as a crash does. Data is served on; nobody can attach,
// detach or fence anything.
func (s *TestStore) KillServer(ctx context.Context) error { return s.server.stop(ctx, syscall.SIGKILL) }

func (s *TestStore) wait(ctx context.Context, p *process, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("start %s: it ended: %w\n%s", p.name, p.err, tail(p.log, 20))
		case <-ctx.Done():
			return fmt.Errorf("start %s: %w\n%s", p.name, err, tail(p.log, 20))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// initiatorName is the name of the initiator on the host of a directory. Two rigs
// on one kernel have different ones.
func initiatorName(hostDir string) string {
	return filepath.Base(filepath.Dir(hostDir)) + "/" + filepath.Base(hostDir)
}

// Initiator is the name by which the test storage knows the host: what a Fence is
// about.
func (h *Host) Initiator() string { return initiatorName(h.Dir) }

const initiatorSocket = "/run/flocker-teststore.sock"

// socket is the initiator's, as seen from outside.
func (h *Host) initiatorSocket() string {
	return fmt.Sprintf("/proc/%d/root%s", h.m.pid, initiatorSocket)
}

// StartInitiator starts the test storage's initiator, and waits until it answers.
func (h *Host) StartInitiator(ctx context.Context) (err error) {
	h.initiator, err = h.m.start(ctx, "initiator", nil, h.r.store.program, "initiator",
		"-name", h.Initiator(), "-dir", "/run/flocker-teststore", "-socket", initiatorSocket, "-server", storeURL)
	if err != nil {
		return err
	}
	return h.r.store.wait(ctx, h.initiator, func(ctx context.Context) error {
		_, err := teststore.Initiator(h.initiatorSocket()).Call(ctx, teststore.OpIdentity, teststore.Request{})
		return err
	})
}

// KillInitiator kills the initiator as a crash does. Devices stay and work.
func (h *Host) KillInitiator(ctx context.Context) error {
	if h.initiator == nil {
		return errors.New("no test storage was started")
	}
	return h.initiator.stop(ctx, syscall.SIGKILL)
}

// StoreBackend is the test storage as a plugin on the host has it, of class F2 if
// fenced is set. Its calls to the server do not go through the host's network.
func (h *Host) StoreBackend(fenced bool) *teststore.Store {
	return teststore.New(teststore.Config{Fenced: fenced, Socket: h.initiatorSocket(), Node: h.Name, Dial: h.r.Dial})
}
