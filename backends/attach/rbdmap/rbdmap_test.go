package rbdmap_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
)

// kernel makes a directory like /sys/bus/rbd/devices.
func kernel(t *testing.T, devices ...map[string]string) {
	t.Helper()
	dir := t.TempDir()
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
}

// TestKernelDevices: what krbd has mapped is ours if its client is one of ours.
func TestKernelDevices(t *testing.T) {
	dir := filepath.Join("/tmp", filepath.Base(t.TempDir())+"-rbdmap")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a, err := rbdmap.New(rbdmap.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
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

func TestQMP(t *testing.T) {
	for reply, want := range map[string]string{
		`{"event": "STOP"} {"return": {}}`:                                "",
		`{"error": {"class": "GenericError", "desc": "it is read-only"}}`: "qemu-storage-daemon: it is read-only",
	} {
		said := make(chan string, 2)
		socket := serve(t, func(conn net.Conn) {
			_, _ = io.WriteString(conn, `{"QMP": {"version": {}}}`)
			in := json.NewDecoder(conn)
			for _, answer := range []string{`{"return": {}}`, reply} {
				var request struct {
					Execute string `json:"execute"`
				}
				if in.Decode(&request) != nil {
					return
				}
				said <- request.Execute
				_, _ = io.WriteString(conn, answer)
			}
		})
		err := rbdmap.QMP(t.Context(), socket, "block_resize", map[string]any{"size": 1})
		if (err == nil) != (want == "") || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", reply, err, want)
		}
		if first, second := <-said, <-said; first != "qmp_capabilities" || second != "block_resize" {
			t.Errorf("it was asked %q and %q", first, second)
		}
	}
}
