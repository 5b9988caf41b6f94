package main

import (
	"errors"
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
func startSession(dir, host, ref, grant string) (*session, error) {
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
	// Not this server's child, and not before the shell between them has ended: nbdkit
	// would end with its parent, asked for or not.
	const script, orphan = `PARENT=$$ sh -c "$0" "$@" &`, `
		while read -r _ _ _ parent _ </proc/$$/stat && [ "$parent" = "$PARENT" ]; do :; done
		echo $$
		export LISTEN_FDS=1 LISTEN_PID=$$
		exec "$0" "$@" >/dev/null`
	cmd := exec.Command("sh", "-c", script, orphan, //nolint:noctx // it outlives the call
		"nbdkit", "--foreground", "--filter=exportname", "file", filepath.Join(dir, ref, "data"), exportArg+grant, "exportname-strict=true")
	cmd.ExtraFiles = []*os.File{socket}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt does not reach it
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("start a data server: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return nil, fmt.Errorf("start a data server: %w", err)
	}
	se, err := openSession(pid, dir)
	if err == nil && (se == nil || se.grant != grant) {
		err = errors.New("it has ended; the server's log says why")
	}
	if err != nil {
		return nil, fmt.Errorf("start a data server: %w", err)
	}
	se.address = l.Addr().String()
	return se, nil
}

const exportArg = "exportname="

// findSessions returns the data servers of volumes below dir, from /proc.
func findSessions(dir string) ([]*session, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []*session
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if _, grant := sessionOf(pid, dir); grant == "" {
			continue
		}
		se, err := openSession(pid, dir)
		if err != nil {
			return nil, err
		}
		if se != nil {
			found = append(found, se)
		}
	}
	return found, nil
}

// openSession returns a process as a data server below dir; nil if it is none, or
// has ended.
func openSession(pid int, dir string) (*session, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil, nil //nolint:nilnil // it has just ended
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	// Now the number cannot become another process's.
	ref, grant := sessionOf(pid, dir)
	if grant == "" {
		return nil, unix.Close(pidfd)
	}
	return &session{ref: ref, grant: grant, pid: pid, pidfd: pidfd}, nil
}

// sessionOf reads from a process's arguments whether it is a data server below dir.
func sessionOf(pid int, dir string) (ref, grant string) {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
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
