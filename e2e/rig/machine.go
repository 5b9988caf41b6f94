package rig

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// bootScript makes the inside of a machine and then becomes its init. Its
// arguments are the machine's name, its directory and the shared directory.
//
// /run and /etc are the machine's own and last until it is switched off; /var/lib
// is its disk. What is in /run/flocker can be seen from outside, in run/, until the machine
// is switched on again. Nothing is mounted outside of the machine's mount namespace.
const bootScript = `
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/etc /run/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work /etc
mkdir -p /etc/docker
echo "$1" >/etc/hostname
echo "127.0.0.1 localhost $1" >/etc/hosts
rm -rf "$2/run"
mkdir -p "$2/lib/docker" "$2/lib/containerd" "$2/lib/flocker/loopback" "$2/run" /run/flocker
mount --bind "$2/run" /run/flocker
mount --bind "$2/lib" /var/lib
mount --bind "$3" /var/lib/flocker/loopback
ip link set lo up
echo ready
exec tini -- sleep infinity
`

// A machine is a set of namespaces (mount, network, process, host name, IPC) with
// an init in it. Killing the init switches the machine off as a whole: the kernel
// kills every process in it, containers included, and unmounts everything.
type machine struct {
	name   string
	dir    string // on the outside: its disk is lib/, its logs are *.log
	shared string

	mu      sync.Mutex
	unshare *exec.Cmd
	ended   chan struct{} // closed when unshare, and so every process inside, has ended
	pid     int           // of the init, as seen from outside; 0 while switched off
	procs   []*process
}

// A process is one that the rig started in a machine.
type process struct {
	name string
	log  string
	pid  int // as seen from outside
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of cmd.Wait, once done is closed
}

// forks runs functions on one thread that lives as long as this process. The
// kernel sends a child's death signal (Pdeathsig) when the thread that forked it
// ends, and Go ends threads as it likes.
var forks = sync.OnceValue(func() chan<- func() {
	ch := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range ch {
			f()
		}
	}()
	return ch
})

// startBound starts cmd so that it is killed when this process ends, however it
// ends, and so that a terminal's interrupt does not reach it.
func startBound(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	errs := make(chan error)
	forks() <- func() { errs <- cmd.Start() }
	return <-errs
}

// boot switches the machine on.
func (m *machine) boot(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pid != 0 {
		return fmt.Errorf("boot %s: it is switched on", m.name)
	}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return fmt.Errorf("boot %s: %w", m.name, err)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "unshare", "--fork", "--kill-child=SIGKILL", "--pid", "--mount-proc", "--mount", "--uts", "--net", "--ipc",
		"--propagation", "private", "--", "/bin/sh", "-euc", bootScript, "sh", m.name, m.dir, m.shared)
	cmd.Dir = "/"
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("boot %s: %w", m.name, err)
	}
	if err := startBound(cmd); err != nil {
		return fmt.Errorf("boot %s: %w", m.name, err)
	}
	m.unshare, m.ended, m.procs = cmd, make(chan struct{}), nil
	ready := make(chan bool, 1)
	go func() {
		line, _ := bufio.NewReader(stdout).ReadString('\n')
		ready <- line == "ready\n"
	}()
	ended := m.ended
	wait := func() {
		_ = cmd.Wait()
		close(ended)
	}
	select {
	case ok := <-ready:
		go wait()
		if !ok {
			<-ended
			return fmt.Errorf("boot %s: %s", m.name, strings.TrimSpace(stderr.String()))
		}
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		go wait()
		return fmt.Errorf("boot %s: %w", m.name, context.Cause(ctx))
	}
	children := childrenOf(cmd.Process.Pid)
	if len(children) != 1 {
		_ = cmd.Process.Kill()
		return fmt.Errorf("boot %s: its init ended", m.name)
	}
	m.pid = children[0]
	// For a later run, should this one be killed before it has cleaned up.
	mark := fmt.Sprintf("%d %s\n", m.pid, startTime(m.pid))
	return os.WriteFile(filepath.Join(m.dir, "init"), []byte(mark), 0o644)
}

// off switches the machine off, as a power cut does. It returns when nothing in
// it runs any more.
func (m *machine) off(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pid == 0 {
		return nil
	}
	_ = syscall.Kill(m.pid, syscall.SIGKILL)
	m.wakeEnters()
	select {
	case <-m.ended:
	case <-ctx.Done():
		return fmt.Errorf("switch %s off: some of its processes do not end: %w", m.name, context.Cause(ctx))
	}
	for _, p := range m.procs {
		<-p.done
	}
	m.pid = 0
	return nil
}

// wakeEnters lets the nsenter processes go on, which stop themselves when their
// child is stopped. A stopped one would not collect its child, and without that the
// process namespace does not end.
func (m *machine) wakeEnters() {
	for _, p := range m.procs {
		_ = p.cmd.Process.Signal(syscall.SIGCONT)
	}
}

// command is a command inside the machine; its output is not yet set.
func (m *machine) command(ctx context.Context, args ...string) *exec.Cmd {
	enter := []string{"-t", strconv.Itoa(m.pid), "-m", "-u", "-i", "-n", "-p", "--"}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	return cmd
}

// exec runs a command inside the machine and returns what it printed.
func (m *machine) exec(ctx context.Context, args ...string) (string, error) {
	return output(m.command(ctx, args...), strings.Join(args, " "))
}

// inNet runs a command in the machine's network namespace only.
func (m *machine) inNet(ctx context.Context, args ...string) error {
	enter := []string{"-t", strconv.Itoa(m.pid), "-n", "--"}
	_, err := output(exec.CommandContext(ctx, "nsenter", append(enter, args...)...), strings.Join(args, " "))
	return err
}

// start starts a daemon inside the machine. What it prints is appended to
// name.log in the machine's directory.
func (m *machine) start(ctx context.Context, name string, env []string, args ...string) (*process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pid == 0 {
		return nil, fmt.Errorf("start %s: %s is switched off", name, m.name)
	}
	p := &process{name: name, log: filepath.Join(m.dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	p.cmd = m.command(context.WithoutCancel(ctx), args...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := startBound(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	m.procs = append(m.procs, p)
	for {
		// nsenter forks into the process namespace; its child is the daemon.
		if children := childrenOf(p.cmd.Process.Pid); len(children) == 1 {
			p.pid = children[0]
			return p, nil
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("start %s on %s: %w\n%s", name, m.name, p.err, tail(p.log, 20))
		case <-ctx.Done():
			return nil, fmt.Errorf("start %s on %s: %w", name, m.name, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// stop sends a signal to the process and waits until it has ended.
func (p *process) stop(ctx context.Context, sig syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := syscall.Kill(p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop %s: %w", p.name, context.Cause(ctx))
	}
}

// signalAll sends sig to every process of the machine.
func (m *machine) signalAll(sig syscall.Signal) error {
	if sig == syscall.SIGCONT {
		defer m.wakeEnters()
	}
	// Twice: a process may have forked while the first pass was under way.
	for range 2 {
		for _, pid := range m.pids() {
			if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("signal process %d of %s: %w", pid, m.name, err)
			}
		}
	}
	return nil
}

// pids returns the machine's processes, as numbered outside, except its init.
func (m *machine) pids() []int {
	m.mu.Lock()
	roots := []int{m.pid}
	for _, p := range m.procs {
		roots = append(roots, p.pid)
	}
	m.mu.Unlock()
	parents := make(map[int][]int)
	for pid, parent := range processes() {
		parents[parent] = append(parents[parent], pid)
	}
	var all []int
	for i := 0; i < len(roots); i++ {
		if roots[i] != m.pid && alive(roots[i]) {
			all = append(all, roots[i])
		}
		roots = append(roots, parents[roots[i]]...)
	}
	return all
}

func alive(pid int) bool { return pid != 0 && syscall.Kill(pid, 0) == nil }

// processes returns every process and its parent.
func processes() map[int]int {
	found := make(map[int]int)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return found
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if fields := stat(pid); len(fields) > 1 {
			found[pid], _ = strconv.Atoi(fields[1])
		}
	}
	return found
}

func childrenOf(pid int) []int {
	var children []int
	for child, parent := range processes() {
		if parent == pid {
			children = append(children, child)
		}
	}
	return children
}

// stat returns the fields of /proc/PID/stat from the state on (number 3 in
// proc(5)), or nil if there is no such process.
func stat(pid int) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The name before it is in brackets and may hold anything.
	return strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
}

// startTime tells one process from a later one with the same number.
func startTime(pid int) string {
	if fields := stat(pid); len(fields) > 19 {
		return fields[19]
	}
	return ""
}

// output runs cmd and returns its standard output without surrounding blanks. The
// error quotes the standard error.
func output(cmd *exec.Cmd, what string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), err
}

// tail returns the last n lines of a file, leaving out those that contain one of
// the words in without. Lines that repeat the one before are counted, not shown.
func tail(path string, n int, without ...string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var lines []string
	last, again := "", 0
	repeated := func() {
		if again > 0 {
			lines = append(lines, fmt.Sprintf("(%d more like it)\n", again))
		}
		again = 0
	}
	for line := range strings.Lines(string(data)) {
		if slices.ContainsFunc(without, func(word string) bool { return strings.Contains(line, word) }) {
			continue
		}
		text := timestamp.ReplaceAllString(line, "")
		if text == last {
			again++
			continue
		}
		repeated()
		last, lines = text, append(lines, line)
	}
	repeated()
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

var timestamp = regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)`)
