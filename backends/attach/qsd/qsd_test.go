package qsd_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/flocker-plugin/flocker/backends/attach/qsd"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// need skips a test without qemu-storage-daemon, or fails it where it is required for others.
func need(t *testing.T) {
	t.Helper()
	backendtest.NeedRoot(t)
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		if require := os.Getenv("REQUIRE"); strings.Contains(require, "ceph") || strings.Contains(require, "iscsi") {
			t.Fatal(err)
		}
		t.Skip("needs the program qemu-storage-daemon: make test-ceph")
	}
}

// TestParallel: many write at once, and what each has written is what is there. With several
// requests under way, QEMU mixes them up.
func TestParallel(t *testing.T) {
	need(t)
	const part, parts = 8 << 20, 8
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, part*parts))
	dir, err := os.MkdirTemp("/tmp", "flocker-q-unit-") //nolint:usetesting // paths of sockets are short
	must(t, err)
	d := qsd.New(dir, "disk")
	must(t, os.Mkdir(d.Dir, 0o700))
	must(t, os.WriteFile(d.File(), nil, 0o600))
	must(t, d.Start(t.Context(), "image", map[string]any{"driver": "file", "filename": image, "aio": "threads"}))
	path, err := d.Attach(t.Context())
	if err != nil {
		_, failed := qsd.End(t.Context(), d.Dir)
		t.Fatal(errors.Join(err, failed))
	}
	data := make([]byte, part*parts)
	_, _ = rand.Read(data) // never fails
	var all sync.WaitGroup
	for i := range parts {
		all.Go(func() {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt(data[i*part:(i+1)*part], int64(i*part))
				err = errors.Join(err, f.Sync(), f.Close())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	got, err := os.ReadFile(image)
	must(t, err)
	wrong := 0
	for at := 0; at < len(data); at += 4096 {
		if !bytes.Equal(got[at:at+4096], data[at:at+4096]) {
			wrong++
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d blocks are not what was written", wrong, len(data)/4096)
	}
	if clean, err := d.Detach(t.Context(), path); err != nil || !clean {
		t.Errorf("got %t, %v", clean, err)
	}
	must(t, os.Remove(dir))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
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
		err := qsd.QMP(t.Context(), socket, "block_resize", map[string]any{"size": 1})
		if (err == nil) != (want == "") || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", reply, err, want)
		}
		if first, second := <-said, <-said; first != "qmp_capabilities" || second != "block_resize" {
			t.Errorf("it was asked %q and %q", first, second)
		}
	}
}
