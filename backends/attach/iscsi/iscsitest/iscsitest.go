// Package iscsitest runs Debian's tgtd, an iSCSI target in user space, for tests: on the
// loopback interface, with a port and a control socket of its own.
package iscsitest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Need skips a test without what it takes, or fails it if the environment variable
// REQUIRE, a comma-separated list, has iscsi.
func Need(tb testing.TB) {
	tb.Helper()
	for _, program := range []string{"tgtd", "tgtadm", "qemu-storage-daemon"} {
		if _, err := exec.LookPath(program); err == nil {
			continue
		}
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "iscsi") {
			tb.Fatalf("needs the program %s, and REQUIRE says that it is there", program)
		}
		tb.Skipf("needs the program %s: make test-openstack", program)
	}
}

// Number is that of the unit of each target.
const Number = 1

// Target is one with a file as its unit.
type Target struct {
	Name, File string
	// User and Secret are those of CHAP; empty is none.
	User, Secret string
	// Initiator is who may log in; empty is everybody.
	Initiator string
}

// Server is a tgtd.
type Server struct {
	// Portal is where it listens.
	Portal string

	dir string

	mu      sync.Mutex
	cmd     *exec.Cmd
	ended   chan struct{}
	targets map[int]Target
}

// Start starts one; Stop ends it.
func Start() (*Server, error) {
	dir, err := os.MkdirTemp("", "tgtd-")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, targets: map[int]Target{}}
	for range 5 { // the port may be taken meanwhile
		if s.Portal, err = free(); err != nil {
			break
		}
		if err = s.run(); err == nil {
			return s, nil
		}
		s.Kill()
	}
	s.Stop()
	return nil, err
}

func free() (address string, err error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// run starts the program, and waits until it listens.
func (s *Server) run() error {
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.cmd = exec.Command("tgtd", "-f", "-t", "2", "--iscsi", "portal="+s.Portal) //nolint:noctx // Stop ends it
	s.cmd.Env = append(os.Environ(), s.socket())
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	s.ended = ended
	go func(cmd *exec.Cmd) {
		_ = cmd.Wait() // its log says more
		close(ended)
	}(s.cmd)
	for started := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if s.adm("--mode", "sys", "--op", "show") == nil {
			if conn, err := net.DialTimeout("tcp", s.Portal, time.Second); err == nil { //nolint:noctx // bounded
				return conn.Close()
			}
		}
		select {
		case <-ended:
			return fmt.Errorf("tgtd has ended: %s", s.Said())
		default:
		}
		if time.Since(started) > 30*time.Second {
			return fmt.Errorf("tgtd does not listen at %s: %s", s.Portal, s.Said())
		}
	}
}

func (s *Server) socket() string { return "TGT_IPC_SOCKET=" + filepath.Join(s.dir, "control") }

// Said is what it has said.
func (s *Server) Said() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "log")) // none, then
	return string(text)
}

func (s *Server) adm(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "tgtadm", append([]string{"--lld", "iscsi"}, args...)...)
	cmd.Env = append(os.Environ(), s.socket())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return nil
}

// Add makes a target.
func (s *Server) Add(t Target) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := 1
	for s.targets[id].Name != "" {
		id++
	}
	s.targets[id] = t
	return s.add(id, t)
}

func (s *Server) add(id int, t Target) error {
	tid := strconv.Itoa(id)
	who := []string{"--initiator-address", "ALL"}
	if t.Initiator != "" {
		who = []string{"--initiator-name", t.Initiator}
	}
	err := errors.Join(
		s.adm("--mode", "target", "--op", "new", "--tid", tid, "--targetname", t.Name),
		s.adm("--mode", "logicalunit", "--op", "new", "--tid", tid, "--lun", strconv.Itoa(Number), "--backing-store", t.File),
	)
	if t.User != "" {
		err = errors.Join(
			err,
			s.adm("--mode", "account", "--op", "new", "--user", t.User, "--password", t.Secret),
			s.adm("--mode", "account", "--op", "bind", "--tid", tid, "--user", t.User),
		)
	}
	return errors.Join(err, s.adm(append([]string{"--mode", "target", "--op", "bind", "--tid", tid}, who...)...))
}

// Remove removes a target, and ends its sessions; nil if there is none.
func (s *Server) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, t := range s.targets {
		if t.Name != name {
			continue
		}
		delete(s.targets, id)
		err := s.adm("--mode", "target", "--op", "delete", "--force", "--tid", strconv.Itoa(id))
		for started := time.Now(); err != nil && time.Since(started) < 30*time.Second; time.Sleep(50 * time.Millisecond) {
			// It is refused while somebody reads the unit, as the udev of a host does.
			err = s.adm("--mode", "target", "--op", "delete", "--force", "--tid", strconv.Itoa(id))
		}
		if t.User != "" {
			err = errors.Join(err, s.adm("--mode", "account", "--op", "delete", "--user", t.User))
		}
		return err
	}
	return nil
}

// Kill kills it.
func (s *Server) Kill() {
	if s.cmd != nil && s.cmd.Process != nil {
		_ = s.cmd.Process.Kill() // it may have ended
		<-s.ended
	}
}

// Again starts it again at the same port, with the targets it had.
func (s *Server) Again() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = os.Remove(filepath.Join(s.dir, "control.0")) // of the one that was killed
	err := s.run()
	for id, t := range s.targets {
		err = errors.Join(err, s.add(id, t))
	}
	return err
}

// Hang makes it answer nothing, or go on.
func (s *Server) Hang(hang bool) error {
	if hang {
		return s.cmd.Process.Signal(syscall.SIGSTOP)
	}
	return s.cmd.Process.Signal(syscall.SIGCONT)
}

// Stop ends it.
func (s *Server) Stop() {
	s.Kill()
	for _, file := range []string{"control.0", "control.0.lock", "log", ""} {
		_ = os.Remove(filepath.Join(s.dir, file)) // of no interest any more
	}
}
