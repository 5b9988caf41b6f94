package rbdmap_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// kernel makes a directory like /sys/bus/rbd/devices.
func kernel(t *testing.T, devices ...map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for i, attrs := range devices {
		device := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(device, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, value := range attrs {
			if err := os.WriteFile(filepath.Join(device, name), []byte(value+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	rbdmap.SetSysfs(t, dir)
	return dir
}

// attacher returns one with a directory of its own, whose path is short.
func attacher(t *testing.T) (a *rbdmap.Attacher, dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "flocker-rbdmap-unit-") //nolint:usetesting // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if a, err = rbdmap.New(rbdmap.Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	return a, dir
}

// TestKernelDevices: what krbd has mapped is ours if its client is one of ours.
func TestKernelDevices(t *testing.T) {
	a, dir := attacher(t)
	kernel(t,
		map[string]string{"client_id": "client41", "client_addr": "192.0.2.7:0/11", "pool": "p", "pool_ns": "", "name": "one", "current_snap": "-"},
		map[string]string{"client_id": "client42", "client_addr": "192.0.2.7:0/12", "pool": "p", "pool_ns": "n", "name": "two", "current_snap": "-"},
		map[string]string{"client_id": "client43", "client_addr": "192.0.2.7:0/13", "pool": "p", "pool_ns": "", "name": "three", "current_snap": "-"},
	)
	for client, note := range map[string]string{
		"client42": "second\np/n/two", "client43": "third\np/another", "client44": "fourth\np/four",
	} {
		if err := os.WriteFile(filepath.Join(dir, "k-"+client), []byte(note), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := a.Devices()
	if err != nil {
		t.Fatal(err)
	}
	want := []rbdmap.Device{{Label: "second", Path: "/dev/rbd1", Method: rbdmap.KRBD}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// seen demands what is mapped, and what was begun.
func seen(t *testing.T, a *rbdmap.Attacher, devices, begun []rbdmap.Device) {
	t.Helper()
	if got, err := a.Devices(); err != nil || !slices.Equal(got, devices) {
		t.Errorf("mapped: got %+v, %v; want %+v", got, err, devices)
	}
	if got, err := a.Begun(); err != nil || !slices.Equal(got, begun) {
		t.Errorf("begun: got %+v, %v; want %+v", got, err, begun)
	}
}

func run(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	// Under another name, and until it is killed.
	cmd := &exec.Cmd{Path: "/bin/sh", Args: append([]string{args[0], "-c", "read line"}, args[1:]...)}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	return cmd
}

// TestBegunProgram: the process is killed that maps an image with a program. What the
// program serves is no device; it is seen, and ended.
func TestBegunProgram(t *testing.T) {
	a, dir := attacher(t)
	label := "1,2,x/y"
	files := filepath.Join(dir, "m-00000001")
	program := run(t, "qemu-storage-daemon", "--monitor", files+"/qmp")
	for path, text := range map[string]string{
		files + "/image": "p/i", files + "/begun": "", files + "/" + rbdmap.Escape(label) + ".conf": "", files + "/" + rbdmap.Escape(label): "",
	} {
		if err := errors.Join(os.MkdirAll(files, 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	seen(t, a, nil, []rbdmap.Device{{Label: label}})
	if clean, err := a.Unmap(t.Context(), label); err != nil || !clean {
		t.Errorf("unmap: got %t, %v; want that its program has ended by itself", clean, err)
	}
	seen(t, a, nil, nil)
	if err := program.Wait(); err == nil {
		t.Error("the program was not ended")
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %s", left)
	}
}

// TestBegunKernel: the process is killed that maps an image with krbd.
func TestBegunKernel(t *testing.T) {
	image := map[string]string{"client_id": "client41", "client_addr": "192.0.2.7:0/11", "pool": "p", "pool_ns": "", "name": "i", "current_snap": "-"}
	for name, test := range map[string]struct {
		images  []map[string]string
		notes   map[string]string
		running bool
		want    []rbdmap.Device
		clean   bool
	}{
		"before it is mapped":    {nil, nil, false, nil, false},
		"while it is mapped":     {nil, nil, true, nil, false},
		"before it has a name":   {[]map[string]string{image}, nil, false, nil, true},
		"before it is allowed":   {[]map[string]string{image}, map[string]string{"k-client41": "label\np/i"}, false, nil, true},
		"and another is mapped":  {[]map[string]string{image}, map[string]string{"k-client41": "other\np/i"}, false, []rbdmap.Device{{Label: "other", Path: "/dev/rbd0", Method: rbdmap.KRBD}}, false},
		"and a snapshot is open": {[]map[string]string{{"client_id": "client41", "pool": "p", "name": "i", "current_snap": "s"}}, nil, false, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, dir := attacher(t)
			sysfs := kernel(t, test.images...)
			program(t, "rbd", "rm -r "+sysfs+"/0") // device unmap
			for note, text := range test.notes {
				if err := os.WriteFile(filepath.Join(dir, note), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "b-label"), []byte("p/i"), 0o600); err != nil {
				t.Fatal(err)
			}
			begun := []rbdmap.Device{{Label: "label", Method: rbdmap.KRBD}}
			seen(t, a, test.want, begun)
			if test.running {
				mapping := run(t, "rbd", "device", "map", "p/i")
				_, err := a.Unmap(t.Context(), "label")
				if want := "`rbd device map` of p/i is still running"; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q", err, want)
				}
				seen(t, a, nil, begun)
				_ = mapping.Process.Kill() // it runs
				_ = mapping.Wait()
			}
			if clean, err := a.Unmap(t.Context(), "label"); err != nil || clean != test.clean {
				t.Errorf("unmap: got %t, %v; want %t", clean, err, test.clean)
			}
			seen(t, a, test.want, nil)
			if left, _ := filepath.Glob(dir + "/*"); len(left) > len(test.want) {
				t.Errorf("left behind: %s", left)
			}
		})
	}
}

// TestMapKernel: an image is mapped when its client was allowed, and not before.
func TestMapKernel(t *testing.T) {
	a, dir := attacher(t)
	sysfs := kernel(t)
	program(t, "rbd", `case "$*" in
*"device map "*) mkdir `+sysfs+"/0 && cd "+sysfs+`/0 && echo client41 >client_id && echo 192.0.2.7:0/11 >client_addr && echo p >pool && echo i >name && echo /dev/rbd0;;
*"device unmap "*) rm -r `+sysfs+"/0;;\nesac")
	image, refused := rbdmap.Image{Pool: "p", Name: "i"}, errors.New("refused")
	for _, answer := range []error{refused, nil} {
		d, err := rbdmap.MapKernel(a, t.Context(), image, "label", func(c rbdmap.Client) error {
			if c.Address != "192.0.2.7:0/11" {
				t.Errorf("got client %+v", c)
			}
			seen(t, a, nil, []rbdmap.Device{{Label: "label", Method: rbdmap.KRBD}})
			return answer
		})
		if !errors.Is(err, answer) {
			t.Fatalf("got %v, want %v", err, answer)
		}
		if err == nil {
			seen(t, a, []rbdmap.Device{d}, nil)
			continue
		}
		seen(t, a, nil, nil)
		if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
			t.Errorf("left behind: %s", left)
		}
	}
}

func TestNew(t *testing.T) {
	for _, cfg := range []rbdmap.Config{
		{}, {Dir: "run"}, {Dir: "/run/../x"}, {Dir: "/" + strings.Repeat("x", 70)}, {Dir: "/run/x", Method: "iscsi"},
	} {
		if _, err := rbdmap.New(cfg); !errors.Is(err, backends.ErrInvalid) {
			t.Errorf("%+v: got %v, want ErrInvalid", cfg, err)
		}
	}
}

func TestLabels(t *testing.T) {
	for _, label := range []string{"a", "1,2,x/y", "a.conf", "50%2F", "%2F%2E%25", "ü ö", "a;b"} {
		name := rbdmap.Escape(label)
		if strings.ContainsAny(name, "/.,; ") || rbdmap.Unescape(name) != label {
			t.Errorf("%q becomes %q, and that %q", label, name, rbdmap.Unescape(name))
		}
	}
}

// TestSpeaks: a client is known by its own address in its own log, never by another's.
func TestSpeaks(t *testing.T) {
	log := `2026-11-22T09:30:00.000+0000 7f0 1 -- 192.0.2.7:0/1234567 --> [v2:192.0.2.1:3300/0,v1:192.0.2.1:6789/0] -- mon_subscribe
2026-11-22T09:30:00.000+0000 7f0 1 -- 192.0.2.7:0/1234567 <== osd.0 v2:192.0.2.2:6802/99 1 ==== notify of 192.0.2.8:0/77
`
	for address, want := range map[string]bool{
		"192.0.2.7:0/1234567": true, "192.0.2.7:0/123456": false, "192.0.2.7:0/234567": false,
		"192.0.2.8:0/77": false, "v2:192.0.2.2:6802/99": false, "192x0.2.7:0/1234567": false,
	} {
		if got := rbdmap.Speaks(log, address); got != want {
			t.Errorf("%s: got %t, want %t", address, got, want)
		}
	}
}

// serve answers one connection of a unix socket.
func serve(t *testing.T, answer func(conn net.Conn)) (socket string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		answer(conn)
	}()
	return dir + "/s"
}

func TestAdminSocket(t *testing.T) {
	socket := serve(t, func(conn net.Conn) {
		text, err := bufio.NewReader(conn).ReadBytes(0)
		if err != nil {
			return
		}
		answer := "you said " + string(text[:len(text)-1])
		_ = binary.Write(conn, binary.BigEndian, uint32(len(answer)))
		_, _ = io.WriteString(conn, answer)
	})
	got, err := rbdmap.AskAsok(t.Context(), socket, map[string]any{"prefix": "version"})
	if want := `you said {"prefix":"version"}`; err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}
