package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// local is a process that does what it is told with Docker's local volume driver, as
// dockerd does within its own process.
type local struct {
	in  io.Writer
	out *bufio.Reader
}

// startLocal builds and starts it. It is in a module of its own.
func startLocal(ctx context.Context, a *area) (*local, error) {
	root, err := exec.CommandContext(ctx, "go", "list", "-f", "{{.Module.Dir}}", "github.com/flocker-plugin/flocker/plugin").Output()
	if err != nil {
		return nil, fmt.Errorf("find the source: %w", err)
	}
	binary := filepath.Join(a.dir, "local-driver")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "./local")
	build.Dir = filepath.Join(strings.TrimSpace(string(root)), "e2e", "moby")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build it: %w: %s", err, strings.TrimSpace(string(out)))
	}
	dir := filepath.Join(a.dir, "local")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, dir) //nolint:noctx // it is ended by the area
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	a.helpers = append(a.helpers, cmd)
	return &local{in: in, out: bufio.NewReader(out)}, nil
}

// do has one step done and returns how long it took.
func (l *local) do(step, name, device string) (time.Duration, error) {
	if _, err := fmt.Fprintln(l.in, step, name, device); err != nil {
		return 0, fmt.Errorf("local driver: %w", err)
	}
	answer, err := l.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("local driver: %w", err)
	}
	answer = strings.TrimSpace(answer)
	ns, err := strconv.ParseInt(answer, 10, 64)
	if err != nil {
		return 0, errors.New("local driver: " + step + ": " + answer)
	}
	return time.Duration(ns), nil
}
