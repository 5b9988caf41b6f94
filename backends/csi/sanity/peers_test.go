package sanity

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
)

// start builds and runs a driver that others wrote, and returns its socket.
func start(t *testing.T, name string, env ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "csi")
	if err != nil {
		t.Fatal(err)
	}
	program, socket := filepath.Join(dir, name), filepath.Join(dir, "s")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = filepath.Join("peers", name)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, socket)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), append(env, "CSI_ENDPOINT=unix://"+socket)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		if text, err := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s: %s %v", name, text, err)
		}
		for _, path := range []string{program, socket, log.Name(), dir} {
			_ = os.Remove(path)
		}
	})
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close()
			return socket
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not start", name)
	return ""
}

type peer struct {
	*testing.T
	backends.Backend
	cluster string
}

func newPeer(t *testing.T, cfg csi.Config) peer {
	p := peer{T: t, cluster: uuid.NewString()}
	var err error
	p.Backend, err = csi.New(cfg, csi.Self{Node: "a", Cluster: p.cluster, Dir: t.TempDir(), Catalog: &csitest.Catalog{}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p peer) create(size int64) (backends.Volume, error) {
	id := uuid.NewString()
	return p.Create(p.Context(), backends.CreateRequest{ID: id, Name: "db", Cluster: p.cluster, Size: size})
}

func (p peer) wantText(err, class error, want string) {
	p.Helper()
	if err == nil || !errors.Is(err, class) || !strings.Contains(err.Error(), want) {
		p.Errorf("got  %v\nwant %q, %v", err, want, class)
	}
}

// A mock of CSI 1.2 that says yes to all, and makes no devices.
func TestGocsi(t *testing.T) {
	p := newPeer(t, csi.Config{Endpoint: start(t, "gocsi")})
	vol, err := p.create(1 << 30)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Get(t.Context(), vol.Ref); err != nil || got != vol {
		t.Errorf("get: got %+v, %v; want %+v", got, err, vol)
	}
	if vols, err := p.List(t.Context()); err != nil || len(vols) != 1 || vols[0] != vol { // it has three of its own
		t.Errorf("list: got %+v, %v; want %+v", vols, err, vol)
	}
	if size, err := p.Backend.(backends.Resizer).Resize(t.Context(), vol.Ref, 2<<30); err != nil || size != 2<<30 {
		t.Errorf("resize: got %d, %v", size, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = p.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	p.wantText(err, backends.ErrUnavailable, "the CSI driver says that volume "+vol.ID+" is at ")
	p.wantText(err, backends.ErrUnavailable, "and no device is seen there: no device")
	half := backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 1}
	if atts, err := p.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != half {
		t.Errorf("attachments: got %+v, %v; want %+v", atts, err, half)
	}
	if err := p.Detach(t.Context(), half); err != nil {
		t.Error(err)
	}
	if atts, err := p.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("attachments: got %+v, %v", atts, err)
	}
	if err := p.Delete(t.Context(), vol.Ref); err != nil {
		t.Error(err)
	}
	// It confirms what any volume can do, whether it is there or not.
	if got, err := p.Get(t.Context(), vol.Ref); !errors.Is(err, backends.ErrNotFound) {
		t.Errorf("get: got %+v, %v; want ErrNotFound", got, err)
	}
}

// A driver of CSI 1.0 that has directories only.
func TestHostpath(t *testing.T) {
	p := newPeer(t, csi.Config{Endpoint: start(t, "hostpath")})
	_, err := p.create(1 << 20)
	p.wantText(err, backends.ErrInvalid, `create volume db: CreateVolume: the CSI driver says "Block Volume not supported" (Unimplemented); `+
		"this driver cannot do it, or it has no raw block volumes, which are needed here")
	if vols, err := p.List(t.Context()); err != nil || len(vols) > 0 {
		t.Errorf("list: got %+v, %v", vols, err)
	}
}
