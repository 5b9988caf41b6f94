package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends/teststore"
)

// session is the data server of one grant, an nbdkit process on a port of its own.
// The grant is the export's name, which a client must give: the port may have been
// another session's before.
type session struct {
	ref, grant string
	initiator  string
	address    string // empty if a former server has started it
	sequence   int64  // likewise 0

	pid   int
	pidfd int // the process, and never another with its number
	// unstall ends what makes it slow; nil if nothing does.
	unstall func()
}

// startSession starts a data server. It is told its socket, which listens already,
// as service managers do: then it need not be waited for.
func startSession(data, host, ref, grant string) (*session, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(host)})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	se := &session{ref: ref, grant: grant, address: l.Addr().String()}
	// It outlives this server, and a terminal's interrupt.
	cmd := exec.Command("sh", "-c", `export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"`, "sh", //nolint:noctx // it outlives the call
		"nbdkit", "--foreground", "--filter=exportname", "file", data, exportArg+grant, "exportname-strict=true")
	cmd.ExtraFiles = []*os.File{socket}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, PidFD: &se.pidfd}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	se.pid = cmd.Process.Pid
	go func() { _ = cmd.Wait() }() // it is killed, or says what is wrong itself
	return se, nil
}

const exportArg = "exportname="

// findSessions returns the data servers of volumes below dir, from /proc.
func findSessions(dir string) ([]*session, error) {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []*session
	for _, path := range processes {
		ref, grant := sessionOf(path, dir)
		if grant == "" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(path))
		if err != nil {
			return nil, err
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has just ended
		}
		// Again, now that the number cannot become another process's.
		if r, g := sessionOf(path, dir); r != ref || g != grant {
			_ = unix.Close(pidfd)
			continue
		}
		found = append(found, &session{ref: ref, grant: grant, pid: pid, pidfd: pidfd})
	}
	return found, nil
}

// sessionOf reads from a process's arguments whether it is a data server below dir.
func sessionOf(process, dir string) (ref, grant string) {
	args, err := os.ReadFile(process + "/cmdline")
	if err != nil {
		return "", ""
	}
	for arg := range strings.SplitSeq(string(args), "\x00") {
		if data, ok := strings.CutPrefix(arg, dir+"/"); ok {
			ref = filepath.Dir(data)
		}
		if ref != "" && strings.HasPrefix(arg, exportArg) {
			return ref, strings.TrimPrefix(arg, exportArg)
		}
	}
	return "", ""
}

// endLimit is how long a killed process may take to end: as long as one write.
const endLimit = 5 * time.Second

// end kills the process and returns when it has ended: no system call of it is under
// way, and its connections are gone. It may be called again if it fails, and not
// otherwise.
func (se *session) end() error {
	se.steady()
	// ESRCH: it has ended by itself.
	if err := unix.PidfdSendSignal(se.pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill the data server of grant %s: %w", se.grant, err)
	}
	deadline := time.Now().Add(endLimit)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(se.pidfd), Events: unix.POLLIN}}, int(max(0, time.Until(deadline)).Milliseconds()))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait for the data server of grant %s: %w", se.grant, err)
		case n == 0:
			return fmt.Errorf("the data server of grant %s, process %d, was killed and has not ended", se.grant, se.pid)
		default:
			return unix.Close(se.pidfd)
		}
	}
}

// signal is for a process that may have ended.
func (se *session) signal(sig unix.Signal) { _ = unix.PidfdSendSignal(se.pidfd, sig, nil, 0) }

// steady ends what makes the session slow.
func (se *session) steady() {
	if se.unstall != nil {
		se.unstall()
		se.unstall = nil
	}
}

// dataFaults are what goes wrong with data.
type dataFaults struct {
	mu     sync.Mutex
	faults []teststore.DataFault
}

func (d *dataFaults) set(faults []teststore.DataFault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = faults
}

// apply makes a session suffer what fits it. The volume's lock is held.
func (d *dataFaults) apply(se *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	se.steady()
	for _, f := range d.faults {
		if (f.Initiator != "" && f.Initiator != se.initiator) || (f.Ref != "" && f.Ref != se.ref) {
			continue
		}
		switch {
		case f.Break:
			se.signal(unix.SIGKILL)
		case f.Hang:
			se.signal(unix.SIGSTOP)
			se.unstall = func() { se.signal(unix.SIGCONT) }
		case f.Slow > 0:
			se.stall(f.Slow)
		}
		return
	}
}

// stall stops the process for a while again and again.
func (se *session) stall(pause time.Duration) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer se.signal(unix.SIGCONT)
		for {
			se.signal(unix.SIGSTOP)
			select {
			case <-stop:
				return
			case <-time.After(pause):
			}
			se.signal(unix.SIGCONT)
			time.Sleep(2 * time.Millisecond)
		}
	}()
	se.unstall = func() {
		close(stop)
		<-done
	}
}
