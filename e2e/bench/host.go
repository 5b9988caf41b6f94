package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// host is one plugin process with a state directory, a socket and a mount root of
// its own.
type host struct {
	name   string
	cmd    *exec.Cmd
	log    string
	client http.Client
	ended  chan struct{}
}

// buildPlugin builds the binary as `make build` does.
func buildPlugin(ctx context.Context, dir string) (string, error) {
	path := filepath.Join(dir, "flocker-plugin")
	return path, build(ctx, path, "plugin")
}

// build builds a program of this module without libraries.
func build(ctx context.Context, path, program string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/flocker-plugin/flocker/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// start starts a plugin and waits until it serves.
func (a *area) start(ctx context.Context, binary, name string, settings ...string) (*host, error) {
	dir := filepath.Join(a.dir, name)
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Join(dir, "mnt"), 0o700)); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "flocker.sock")
	h := &host{name: name, log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	h.client.Transport = &http.Transport{
		MaxIdleConnsPerHost: callers,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	log, err := os.Create(h.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	h.cmd = exec.Command(binary) //nolint:noctx // it outlives an interrupt, to be stopped in order
	h.cmd.Stdout, h.cmd.Stderr = log, log
	h.cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "FLOCKER_HOSTNAME=" + name,
		"FLOCKER_SOCKET=" + socket, "FLOCKER_STATE_DIR=" + filepath.Join(dir, "state"),
		"FLOCKER_MOUNT_ROOT=" + filepath.Join(dir, "mnt"), "FLOCKER_LOOPBACK_DIR=" + a.shared,
		"FLOCKER_DOCKER_SOCKET=" + filepath.Join(dir, "docker.sock"),
	}, settings...)
	// Not interrupted from the terminal with us, and killed if we are killed.
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start plugin: %w", err)
	}
	a.hosts = append(a.hosts, h)
	go func() { _ = h.cmd.Wait(); close(h.ended) }()

	for {
		err := h.list(ctx)
		if err == nil {
			break
		}
		select {
		case <-h.ended:
			return nil, fmt.Errorf("the plugin has ended: %w%s", err, h.lastWords())
		default:
		}
		if !wait(ctx) {
			return nil, fmt.Errorf("the plugin does not serve: %w%s", err, h.lastWords())
		}
	}
	// It serves; a change has to wait for its registration, too.
	first := volume{host: h, name: "first" + name, id: mountID()}
	for {
		err := each(ctx, func(ctx context.Context) error { return h.create(ctx, first.name) }, first.mount)
		if err == nil {
			break
		}
		if !strings.Contains(err.Error(), "cannot be checked") || !wait(ctx) {
			return nil, fmt.Errorf("first volume: %w%s", err, h.lastWords())
		}
	}
	return h, each(ctx, first.unmount, first.free, first.remove)
}

// stop ends the plugin in order if it can.
func (h *host) stop(ctx context.Context) {
	_ = h.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-h.ended:
	case <-time.After(10 * time.Second):
		_ = h.cmd.Process.Kill()
		<-h.ended
	case <-ctx.Done():
		_ = h.cmd.Process.Kill()
		<-h.ended
	}
}

// lastWords is the end of the plugin's log, for an error.
func (h *host) lastWords() string {
	text, err := os.ReadFile(h.log)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return fmt.Sprintf("\nthe log of plugin %s ends:\n%s", h.name, strings.Join(lines[max(0, len(lines)-8):], "\n"))
}

// The protocol.

type request struct {
	Name string            `json:",omitempty"`
	ID   string            `json:",omitempty"`
	Opts map[string]string `json:",omitempty"`
}

type reply struct {
	Err        string
	Mountpoint string
	Volume     struct{ Status map[string]any }
}

// post is one call.
func (h *host) post(ctx context.Context, verb string, req request, rep *reply) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	call, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/VolumeDriver."+verb, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := h.client.Do(call)
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, req.Name, err)
	}
	answer, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return fmt.Errorf("%s %s: %w", verb, req.Name, err)
	}
	if resp.StatusCode == http.StatusOK && rep == nil {
		return nil
	}
	if rep == nil {
		rep = &reply{}
	}
	if err := json.Unmarshal(answer, rep); err != nil {
		return fmt.Errorf("%s %s: %w", verb, req.Name, err)
	}
	if rep.Err != "" || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", verb, req.Name, resp.Status, rep.Err)
	}
	return nil
}

func (h *host) create(ctx context.Context, name string) error {
	return h.post(ctx, "Create", request{Name: name, Opts: map[string]string{"size": "1G"}}, nil)
}

// list does not decode the answer: that costs the caller.
func (h *host) list(ctx context.Context) error { return h.post(ctx, "List", request{}, nil) }

// volume is one of Flocker's on one host.
type volume struct {
	*host

	name, id   string
	mountpoint string
}

// each calls one after the other until one fails.
func each(ctx context.Context, steps ...func(context.Context) error) error {
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func mountID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func (v *volume) mount(ctx context.Context) error {
	var rep reply
	err := v.post(ctx, "Mount", request{Name: v.name, ID: v.id}, &rep)
	v.mountpoint = rep.Mountpoint
	return err
}

func (v *volume) unmount(ctx context.Context) error {
	return v.post(ctx, "Unmount", request{Name: v.name, ID: v.id}, nil)
}

func (v *volume) get(ctx context.Context) error {
	return v.post(ctx, "Get", request{Name: v.name}, nil)
}

func (v *volume) path(ctx context.Context) error {
	return v.post(ctx, "Path", request{Name: v.name}, nil)
}

func (v *volume) remove(ctx context.Context) error {
	return v.post(ctx, "Remove", request{Name: v.name}, nil)
}

// free waits until the volume is detached and released, which is done after the
// reply to Unmount.
func (v *volume) free(ctx context.Context) error {
	for {
		var rep reply
		if err := v.post(ctx, "Get", request{Name: v.name}, &rep); err != nil {
			return err
		}
		if rep.Volume.Status["state"] == "free" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("volume %s is not free: %v: %w", v.name, rep.Volume.Status, context.Cause(ctx))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// freeAddress returns a local address that nobody listens on.
func freeAddress(ctx context.Context) (string, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
