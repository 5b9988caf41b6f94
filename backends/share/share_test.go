package share_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/share"
)

func TestContract(t *testing.T) {
	backendtest.NeedRoot(t)
	backendtest.Run(t, backendtest.Config{New: func(t backendtest.T) backendtest.Storage {
		s := newShared(t)
		return backendtest.Storage{
			Node: s.node,
			Down: func(down bool) { // as if it were not mounted
				from, to := s.mark, s.mark+".away"
				if !down {
					from, to = to, from
				}
				_ = os.Rename(from, to) // it may be as is wanted
			},
		}
	}})
}

// shared is a shared directory with a volume.
type shared struct {
	t         backendtest.T
	dir, mark string
	cluster   string
	a, b      backends.Backend
	vol       backends.Volume
}

func newShared(t backendtest.T) *shared {
	t.Helper()
	dir := t.TempDir()
	s := &shared{t: t, dir: dir, mark: filepath.Join(dir, ".flocker-share"), cluster: uuid.NewString()}
	if err := os.Symlink(uuid.NewString(), s.mark); err != nil {
		t.Fatalf("%v", err)
	}
	s.a, s.b = s.node(s.cluster, "a"), s.node(s.cluster, "b")
	return s
}

func (s *shared) node(cluster, node string) backends.Backend {
	b, err := share.New(share.Config{Dir: s.dir}, node, cluster)
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	return b
}

func newVolume(t *testing.T) *shared {
	t.Helper()
	backendtest.NeedRoot(t)
	s := newShared(t)
	var err error
	s.vol, err = s.a.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: s.cluster, Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // of a test that has failed
		for _, device := range s.devices(t) {
			_ = exec.Command("losetup", "-d", device).Run()
		}
	})
	return s
}

// devices are the loop devices of the volume.
func (s *shared) devices(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("losetup", "--noheadings", "--raw", "--output", "NAME,BACK-FILE").Output()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.SplitSeq(string(out), "\n") {
		if name, file, ok := strings.Cut(line, " "); ok && filepath.Base(file) == filepath.Base(s.file(".img")) {
			found = append(found, name)
		}
	}
	return found
}

func (s *shared) file(ending string) string {
	return filepath.Join(s.dir, s.cluster+"."+s.vol.ID+ending)
}

func (s *shared) attach(t *testing.T, b backends.Backend, token int64) backends.Attachment {
	t.Helper()
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return att
}

func (s *shared) wantAttached(t *testing.T, b backends.Backend, want ...backends.Attachment) {
	t.Helper()
	got, err := b.Attachments(t.Context())
	if err != nil || len(got) != len(want) || len(want) > 0 && got[0] != want[0] {
		t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
}

func wantText(t *testing.T, err, class error, want string) {
	t.Helper()
	if err == nil || !errors.Is(err, class) || !strings.Contains(err.Error(), want) {
		t.Errorf("got  %v\nwant %s, %v", err, want, class)
	}
}

func TestNotMounted(t *testing.T) {
	s := newVolume(t)
	mark, err := os.Readlink(s.mark)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.mark); err != nil {
		t.Fatal(err)
	}
	_, err = s.a.Get(t.Context(), s.vol.Ref)
	wantText(t, err, backends.ErrUnavailable, "get volume: is "+s.dir+" mounted? If it is a new one, type: ln -s $(uuidgen) "+s.mark)
	if err := os.Symlink("another", s.mark); err != nil {
		t.Fatal(err)
	}
	_, err = s.a.Get(t.Context(), s.vol.Ref)
	wantText(t, err, backends.ErrUnavailable, s.vol.ID+" is in the shared directory "+mark+", and "+s.dir+" is another")
	if _, err := share.New(share.Config{Dir: "relative"}, "a", "c"); err == nil || !strings.Contains(err.Error(), "dir is missing: the absolute path") {
		t.Errorf("got %v", err)
	}
}

// A call that died had made the note and no device. The node itself finds it; no other
// takes the volume before.
func TestHalfAttached(t *testing.T) {
	s := newVolume(t)
	half := backends.Attachment{Ref: s.vol.Ref, Volume: s.vol.ID, Node: "a", Token: 7}
	text, err := json.Marshal(half)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(string(text), s.file(".held")); err != nil {
		t.Fatal(err)
	}
	s.wantAttached(t, s.a, half)
	s.wantAttached(t, s.b)
	_, err = s.b.Attach(t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: 8})
	wantText(t, err, backends.ErrInUse, "attach volume: volume "+s.vol.ID+" is attached to a")
	if err := s.b.Detach(t.Context(), half); err == nil || !strings.Contains(err.Error(), "it can be done on a alone") {
		t.Errorf("got %v", err)
	}
	if err := s.a.Detach(t.Context(), half); err != nil {
		t.Fatal(err)
	}
	att := s.attach(t, s.b, 8)
	if err := s.b.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
}

// A Delete that died has left data, which nobody sees, and the next one removes.
func TestHalfDeleted(t *testing.T) {
	s := newVolume(t)
	if err := s.a.Detach(t.Context(), s.attach(t, s.a, 1)); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(backends.Attachment{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(string(text), s.file(".held")), os.Remove(s.file(".volume"))); err != nil {
		t.Fatal(err)
	}
	_, err = s.b.Attach(t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: 2})
	wantText(t, err, backends.ErrNotFound, "attach volume")
	wantText(t, s.b.Delete(t.Context(), s.vol.Ref), backends.ErrNotFound, "delete volume")
	left, err := os.ReadDir(s.dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v; want .flocker-share", left, err)
	}
}

// Somebody has removed the note of a host that has the volume: what this host has cached
// of it must not come back when it attaches the volume again.
func TestNoteRemoved(t *testing.T) {
	s := newVolume(t)
	att := s.attach(t, s.a, 1)
	f, err := os.Open(att.Device)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.file(".held")); err != nil {
		t.Fatal(err)
	}
	_, err = s.a.Attach(t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: 2})
	wantText(t, err, backends.ErrInUse, "is open or mounted")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	sequence := func() string {
		text, err := os.ReadFile("/sys/block/" + filepath.Base(att.Device) + "/diskseq")
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	before := sequence()
	again := s.attach(t, s.a, 2)
	if again.Device == att.Device && sequence() == before {
		t.Errorf("%s is as it was", att.Device)
	}
	if devices := s.devices(t); len(devices) != 1 {
		t.Errorf("the volume has the devices %q", devices)
	}
	if err := s.a.Detach(t.Context(), again); err != nil {
		t.Fatal(err)
	}
}

// The kernel forgets a part of the path of a file that was opened in a mount namespace
// which has ended, as that of a container has when it starts anew.
func TestContainerRestarted(t *testing.T) {
	s := newVolume(t)
	att := s.attach(t, s.a, 1)
	if out, err := exec.Command("losetup", "-d", att.Device).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for end := time.Now().Add(30 * time.Second); len(s.devices(t)) > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // somebody who looks at all devices has it open
	}
	out, err := exec.Command("unshare", "-m", "sh", "-e", "-c", `mount --bind "$1" "$1"; losetup --find --show "$1/$2"`, "sh", s.dir, filepath.Base(s.file(".img"))).Output()
	if err != nil {
		t.Fatal(err)
	}
	att.Device = strings.TrimSpace(string(out))
	s.wantAttached(t, s.a, att)
	copied := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", s.dir, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	other, err := share.New(share.Config{Dir: copied}, "a", s.cluster)
	if err != nil {
		t.Fatal(err)
	}
	there := att
	there.Device = ""
	s.wantAttached(t, other, there)
	if again := s.attach(t, s.a, 1); again != att {
		t.Errorf("got %+v, want %+v", again, att)
	}
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if devices := s.devices(t); len(devices) > 0 {
		t.Errorf("the volume still has the devices %q", devices)
	}
}

// The path in the settings may be a symbolic link.
func TestLinkedDir(t *testing.T) {
	s := newVolume(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(s.dir, link); err != nil {
		t.Fatal(err)
	}
	b, err := share.New(share.Config{Dir: link}, "a", s.cluster)
	if err != nil {
		t.Fatal(err)
	}
	att := s.attach(t, b, 1)
	s.wantAttached(t, b, att)
	if again := s.attach(t, b, 1); again != att {
		t.Errorf("got %+v, then %+v", att, again)
	}
	if err := b.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if devices := s.devices(t); len(devices) > 0 {
		t.Errorf("the volume still has the devices %q", devices)
	}
}

// docs/backends/writing-one.md walks through this backend, and so stays true.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/backends/writing-one.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("share.go")
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(string(code), "\n"); lines >= 200 {
		t.Errorf("share.go has %d lines, and the documentation says that it has fewer than 200", lines)
	}
	var shown strings.Builder
	for i, block := range strings.Split(string(text), "```go\n") {
		if i == 0 {
			continue
		}
		part, _, ended := strings.Cut(block, "```\n")
		if !ended {
			t.Fatal("a block of code does not end")
		}
		if shown.Len() > 0 {
			shown.WriteString("\n")
		}
		shown.WriteString(part)
	}
	want, got := strings.Split(string(code), "\n"), strings.Split(shown.String(), "\n")
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			t.Fatalf("line %d of share.go is\n%s\nand the documentation has\n%s", i+1, want[i], got[i])
		}
	}
	if len(want) != len(got) {
		t.Errorf("share.go has %d lines, and the documentation shows %d", len(want), len(got))
	}
}
