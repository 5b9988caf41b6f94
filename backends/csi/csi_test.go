package csi_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/csi"
	"github.com/flocker-plugin/flocker/backends/csi/csitest"
)

const cluster = "0b7ce5cd-7ba1-4e48-9c11-7e6a3d29c1ad"

func TestConfig(t *testing.T) {
	for _, test := range []struct {
		cfg  csi.Config
		want string // nothing: it is fine
	}{
		{csi.Config{Endpoint: "unix:///run/csi.sock"}, ""},
		{csi.Config{Endpoint: "/run/csi.sock"}, ""},
		{csi.Config{Controller: "unix:///run/c.sock", Node: "unix:///run/n.sock", Mode: "block"}, ""},
		{csi.Config{}, "backend csi: endpoint is missing: the driver's socket, such as unix:///run/csi/csi.sock"},
		{csi.Config{Name: "pure", Controller: "unix:///run/c.sock"}, "backend pure: endpoint is missing: the driver's socket, such as unix:///run/csi/csi.sock"},
		{csi.Config{Endpoint: "tcp://10.0.0.1:80"}, `backend csi: endpoint "tcp://10.0.0.1:80": use unix:// and an absolute path`},
		{csi.Config{Endpoint: "/s", Mode: "mount"}, "backend csi: mode mount: a volume has to be a block device here; drivers that have filesystems only cannot be used yet"},
		{csi.Config{Endpoint: "/s", Mode: "file"}, `backend csi: mode "file": use block`},
		{csi.Config{Endpoint: "/s", Name: "My Storage"}, `backend My Storage: name "My Storage": use up to 20 small letters, digits and dashes`},
		{csi.Config{Endpoint: "/s", SecretFiles: map[string]string{"user": "admin"}}, "backend csi: secret_files: user is not the absolute path of a file"},
		{csi.Config{Endpoint: "/s", CallSecretFiles: map[string]map[string]string{"attach": nil}}, `backend csi: call_secret_files: there is no call "attach"; use create, delete, publish, stage, node_publish, expand, validate`},
		{csi.Config{Endpoint: "/s", MinSize: 2 * backends.GiB, MaxSize: backends.GiB}, "backend csi: max_size 1GiB is less than min_size 2GiB"},
		{csi.Config{Endpoint: "/s", LateCalls: -time.Second}, "backend csi: a time or size is negative"},
		{csi.Config{Endpoint: "/s", Profiles: map[string]map[string]string{"": nil}}, "backend csi: profiles: one has no name; use parameters for volumes without a profile"},
	} {
		_, err := csi.New(test.cfg, csi.Self{Node: "a", Cluster: cluster, Dir: "/nowhere", Catalog: &csitest.Catalog{}})
		if test.want == "" && err != nil || test.want != "" && (err == nil || err.Error() != test.want || !errors.Is(err, backends.ErrInvalid)) {
			t.Errorf("%+v:\ngot  %v\nwant %s", test.cfg, err, test.want)
		}
	}
	if _, err := csi.New(csi.Config{Endpoint: "/s"}, csi.Self{Node: "a", Cluster: cluster, Dir: "/nowhere"}); !errors.Is(err, backends.ErrInvalid) {
		t.Errorf("without a catalog: got %v, want ErrInvalid", err)
	}
}

func TestProperties(t *testing.T) {
	self := csi.Self{Node: "a", Cluster: cluster, Dir: "/nowhere", Catalog: &csitest.Catalog{}}
	b, err := csi.New(csi.Config{Name: "san", Endpoint: "/s", Fences: true}, self)
	if err != nil {
		t.Fatal(err)
	}
	if p := b.Properties(); p.Name != "san" || p.Class != backends.ClassExclusive || !p.ExclusiveAttach || p.LateCalls != 2*time.Minute {
		t.Errorf("with fences: %+v", p)
	}
	if b, err = csi.New(csi.Config{Endpoint: "/s"}, self); err != nil {
		t.Fatal(err)
	}
	if p := b.Properties(); p.Name != "csi" || p.Class != backends.ClassNone || p.ExclusiveAttach || p.LateCalls != 2*time.Minute || p.AllocationUnit != 1<<20 {
		t.Errorf("without: %+v", p)
	}
}

// wantText demands that a user is told this, and that the error is of a class.
func wantText(t *testing.T, err, class error, want string) {
	t.Helper()
	if err == nil || !errors.Is(err, class) || !strings.Contains(err.Error(), want) {
		t.Errorf("got  %v\nwant %q, %v", err, want, class)
	}
}

func TestNoDriver(t *testing.T) {
	b, err := csi.New(csi.Config{Endpoint: "unix:///nowhere/csi.sock"},
		csi.Self{Node: "a", Cluster: cluster, Dir: t.TempDir(), Catalog: &csitest.Catalog{}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Create(t.Context(), request(cluster))
	wantText(t, err, backends.ErrUnavailable, "create volume db: Probe: the CSI driver's socket unix:///nowhere/csi.sock does not answer: "+
		"dial unix /nowhere/csi.sock: connect: no such file or directory; is the driver running on this host?")
	if atts, err := b.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("attachments: got %v, %v", atts, err)
	}
}

func TestUnfit(t *testing.T) {
	for want, test := range map[string]struct {
		opts csitest.Options
		cfg  csi.Config
	}{
		"the CSI driver strict.csitest.flocker has no ControllerUnpublishVolume, so it cannot cut a host off; remove fences: true": {
			csitest.Options{Stage: true}, csi.Config{Fences: true},
		},
		"the CSI driver strict.csitest.flocker does not show to which hosts a volume is published (LIST_VOLUMES_PUBLISHED_NODES), so nobody could see that a host is cut off; remove fences: true": {
			csitest.Options{Publish: true, Cuts: true, GetVolume: true}, csi.Config{Fences: true},
		},
		`is "strict.csitest.flocker", not "ebs.csi.aws.com"; check the endpoints`: {csitest.Options{}, csi.Config{Driver: "ebs.csi.aws.com"}},
	} {
		s := newStorage(t, test.opts, test.cfg)
		_, err := s.node(cluster, "a").Create(t.Context(), request(cluster))
		wantText(t, err, backends.ErrInvalid, want)
	}
}

func TestTwoSockets(t *testing.T) {
	backendtest.NeedRoot(t)
	s := newStorage(t, kinds["exclusive"].opts, csi.Config{})
	controller, err := s.Node("controller")
	if err != nil {
		t.Fatal(err)
	}
	s.cfg = csi.Config{Controller: controller}
	b := s.node(cluster, "a")
	vol, err := b.Create(t.Context(), request(cluster))
	if err != nil {
		t.Fatal(err)
	}
	att := attach(t, b, vol, 1)
	if got := s.Published(vol.ID); !slices.Equal(got, []string{csitest.NodeID("a")}) {
		t.Errorf("published to %v", got)
	}
	down(t, b, vol, att)
}

func attach(t *testing.T, b backends.Backend, vol backends.Volume, token int64) backends.Attachment {
	t.Helper()
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return att
}

// down detaches and deletes a volume.
func down(t *testing.T, b backends.Backend, vol backends.Volume, atts ...backends.Attachment) {
	t.Helper()
	for _, att := range atts {
		if err := b.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Delete(t.Context(), vol.Ref); err != nil {
		t.Fatal(err)
	}
}

func TestProfiles(t *testing.T) {
	s := newStorage(t, csitest.Options{}, csi.Config{
		Parameters: map[string]string{"class": "silver"},
		Profiles:   map[string]map[string]string{"gold": {"class": "gold"}, "wrong": {"class": "lead"}},
	})
	b := s.node(cluster, "a")
	for profile, want := range map[string]string{
		"": "", "gold": "",
		"bronze": `create volume db: backend csi has no profile "bronze"; use one of gold, wrong`,
		"wrong":  `create volume db: CreateVolume: the CSI driver says "parameter class=lead is not known" (InvalidArgument); check the size, and the parameters of the profile, or it has no raw block volumes, which are needed here`,
	} {
		req := request(cluster)
		req.Profile = profile
		vol, err := b.Create(t.Context(), req)
		if want != "" {
			wantText(t, err, backends.ErrInvalid, want)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		down(t, b, vol)
	}
	// A refused Create leaves nothing.
	if vols, err := b.List(t.Context()); err != nil || len(vols) > 0 {
		t.Errorf("list: got %+v, %v", vols, err)
	}
}

func TestSecrets(t *testing.T) {
	backendtest.NeedRoot(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	opts := kinds["fences"].opts
	opts.Secrets = map[string]string{"user": "bob", "password": "hunter2"}
	cfg := csi.Config{Fences: true, SecretFiles: map[string]string{"user": file("user", "bob\n"), "password": file("password", "hunter2")}}
	s := newStorage(t, opts, cfg)
	b := s.node(cluster, "a")
	vol, err := b.Create(t.Context(), request(cluster))
	if err != nil {
		t.Fatal(err)
	}
	att := attach(t, b, vol, 1)
	if _, err := b.(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20); err != nil {
		t.Error(err)
	}
	down(t, b, vol, att)

	// A driver that repeats what it was given: not here.
	s.cfg.SecretFiles = map[string]string{"user": file("user2", "mallory"), "password": file("password2", "letmein")}
	_, err = s.node(cluster, "a").Create(t.Context(), request(cluster))
	wantText(t, err, backends.ErrUnavailable, "map[password:*** user:***]")
	wantText(t, err, backends.ErrUnavailable, "check the files of secret_files")
	s.cfg.SecretFiles = map[string]string{"user": filepath.Join(dir, "missing")}
	_, err = s.node(cluster, "a").Create(t.Context(), request(cluster))
	wantText(t, err, backends.ErrUnavailable, "secret user of the CSI driver: open "+filepath.Join(dir, "missing"))

	// Nothing of it is stored, nor in a reference.
	s.cfg = cfg
	if vol, err = s.node(cluster, "a").Create(t.Context(), request(cluster)); err != nil {
		t.Fatal(err)
	}
	ref, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(vol.Ref, "csi1-"))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := s.catalog(cluster).List(t.Context())
	if err != nil || len(stored) == 0 {
		t.Fatalf("%v, %v", stored, err)
	}
	for _, text := range append([]string{string(ref)}, values(stored)...) {
		if strings.Contains(text, "hunter2") {
			t.Errorf("%s has the secret", text)
		}
	}
	down(t, s.node(cluster, "a"), vol)
}

func values(all map[string][]byte) (texts []string) {
	for _, text := range all {
		texts = append(texts, string(text))
	}
	return texts
}

func TestTopology(t *testing.T) {
	backendtest.NeedRoot(t)
	opts := kinds["fences"].opts
	opts.Zones = map[string]string{"a": "east", "b": "west", "c": "east"}
	s := newStorage(t, opts, csi.Config{Fences: true})
	vol, err := s.node(cluster, "a").Create(t.Context(), request(cluster))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.node(cluster, "b").Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	wantText(t, err, backends.ErrInvalid, "attach volume: volume "+vol.ID+" can be reached from csitest.flocker/zone=east, and this host is in csitest.flocker/zone=west")
	down(t, s.node(cluster, "c"), vol, attach(t, s.node(cluster, "c"), vol, 2))
}

func TestTooManyVolumes(t *testing.T) {
	backendtest.NeedRoot(t)
	for _, untold := range []bool{false, true} {
		opts := kinds["fences"].opts
		opts.MaxVolumes, opts.Untold = 2, untold
		s := newStorage(t, opts, csi.Config{Fences: true})
		b := s.node(cluster, "a")
		var vols []backends.Volume
		var atts []backends.Attachment
		for i := range 3 {
			vol, err := b.Create(t.Context(), request(cluster))
			if err != nil {
				t.Fatal(err)
			}
			vols = append(vols, vol)
			if i < 2 {
				atts = append(atts, attach(t, b, vol, 1))
			}
		}
		want := "this host has 2 volumes of the CSI driver strict.csitest.flocker, which allows no more; stop containers that use some of them, or use another host"
		if untold {
			want = `ControllerPublishVolume: the CSI driver says "id-of-a has 2 volumes" (ResourceExhausted); free some room at the storage, or detach volumes of this host, and retry`
		}
		_, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vols[2].Ref, Volume: vols[2].ID, Token: 1})
		wantText(t, err, backends.ErrUnavailable, want)
		if got, err := b.Attachments(t.Context()); err != nil || len(got) != 2 {
			t.Errorf("attachments: got %+v, %v", got, err)
		}
		down(t, b, vols[0], atts[0])
		down(t, b, vols[2], attach(t, b, vols[2], 2))
		down(t, b, vols[1], atts[1])
	}
}

// A driver that has directories only.
func TestMountOnly(t *testing.T) {
	opts := csitest.Options{MountOnly: true}
	s, cluster, vol := newVolume(t, opts, csi.Config{})
	_, err := s.node(cluster, "a").Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	wantText(t, err, backends.ErrInvalid, "instead of a block device; it has filesystems only, which cannot be used yet")
	down(t, s.node(cluster, "a"), vol)
}

func TestResizeRefused(t *testing.T) {
	opts := kinds["exclusive"].opts
	opts.Offline = true
	s, cluster, vol := newVolume(t, opts, csi.Config{})
	b := s.node(cluster, "a")
	att := attach(t, b, vol, 1)
	_, err := b.(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20)
	wantText(t, err, backends.ErrInUse, "this driver grows volumes only while they are attached nowhere: stop its containers, and retry")
	if err := b.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if size, err := b.(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20); err != nil || size != 16<<20 {
		t.Errorf("resize: got %d, %v", size, err)
	}
	down(t, b, vol, attach(t, b, vol, 2))

	opts.NoExpand = true
	s, cluster, vol = newVolume(t, opts, csi.Config{})
	_, err = s.node(cluster, "a").(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20)
	wantText(t, err, backends.ErrInvalid, "the CSI driver strict.csitest.flocker cannot grow volumes")
	down(t, s.node(cluster, "a"), vol)
}

// A volume that grew while it was attached elsewhere, or whose Resize was interrupted,
// is large after the next attach.
func TestGrowsWithTheNextAttach(t *testing.T) {
	opts := kinds["fences"].opts
	opts.Lazy = true
	s, cluster, vol := newVolume(t, opts, csi.Config{Fences: true})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	att := attach(t, a, vol, 1)
	if size, err := b.(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20); err != nil || size != 16<<20 {
		t.Fatalf("resize: got %d, %v", size, err)
	}
	if size := deviceSize(t, att.Device); size != 8<<20 {
		t.Errorf("the other node's device has %d bytes already", size)
	}
	if size, err := a.(backends.Resizer).Resize(t.Context(), vol.Ref, 16<<20); err != nil || size != 16<<20 || deviceSize(t, att.Device) != size {
		t.Errorf("resize there: got %d, %v", size, err)
	}
	// And again, while it is attached there, which is not told.
	if size, err := b.(backends.Resizer).Resize(t.Context(), vol.Ref, 24<<20); err != nil || size != 24<<20 {
		t.Fatalf("resize: got %d, %v", size, err)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	att = attach(t, b, vol, 2)
	if size := deviceSize(t, att.Device); size != 24<<20 {
		t.Errorf("got %d bytes after the next attach", size)
	}
	down(t, b, vol, att)
}

func deviceSize(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// age makes what a node has of a volume be of an earlier boot.
func age(t *testing.T, s *storage, vol backends.Volume, token int) {
	t.Helper()
	record := filepath.Join(s.dirs["a"], "csi", strings.ReplaceAll(vol.ID, "-", "")+"."+strconv.Itoa(token), "record")
	text, err := os.ReadFile(record)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.Replace(string(text), strings.TrimSpace(string(boot)), "earlier", 1))
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A device node that an earlier boot has left is not believed: it may be any disk by now.
func TestEarlierBoot(t *testing.T) {
	for name, kind := range kinds {
		s, cluster, vol := newVolume(t, kind.opts, kind.cfg)
		att := attach(t, s.node(cluster, "a"), vol, 1)
		age(t, s, vol, 1)
		atts, err := s.node(cluster, "a").Attachments(t.Context())
		want := att
		want.Device = ""
		if err != nil || len(atts) != 1 || atts[0] != want {
			t.Errorf("%s: attachments: got %+v, %v; want %+v", name, atts, err, want)
		}
		s.Calls()
		attach(t, s.node(cluster, "a"), vol, 1)
		if calls := s.Calls(); calls["NodeUnpublishVolume"] != 1 || calls["NodePublishVolume"] != 1 {
			t.Errorf("%s: got %v", name, calls)
		}
		down(t, s.node(cluster, "a"), vol, att)
	}
}

// The number of a disk that is gone is given to the next one, which is not the volume's.
func TestAnotherDisk(t *testing.T) {
	for name, kind := range kinds {
		s, cluster, vol := newVolume(t, kind.opts, kind.cfg)
		b := s.node(cluster, "a")
		att := attach(t, b, vol, 1)
		another(t, s, vol, 1)
		atts, err := b.Attachments(t.Context())
		want := att
		if want.Device = ""; err != nil || !kind.cfg.Fences && !slices.Equal(atts, []backends.Attachment{want}) || kind.cfg.Fences && len(atts) > 0 {
			t.Errorf("%s: attachments: got %+v, %v", name, atts, err)
		}
		again := attach(t, b, vol, 1)
		if atts, err := b.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{again}) {
			t.Errorf("%s: attachments: got %+v, %v; want %+v", name, atts, err, again)
		}
		down(t, b, vol, again)
	}
}

// another makes the disk of an attachment another one than the kernel has at its number.
func another(t *testing.T, s *storage, vol backends.Volume, token int64) {
	t.Helper()
	record := filepath.Join(s.dirs["a"], "csi", strings.ReplaceAll(vol.ID, "-", "")+"."+strconv.FormatInt(token, 36), "record")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.Replace(string(text), `"sequence":`, `"sequence":1`, 1))
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// The next disk with that number may be mounted: nobody has the one that is gone, and its
// attachment can go.
func TestAnotherDiskMounted(t *testing.T) {
	for name, kind := range kinds {
		s, cluster, vol := newVolume(t, kind.opts, kind.cfg)
		b := s.node(cluster, "a")
		att := attach(t, b, vol, 1)
		if out, err := exec.Command("mkfs.ext4", "-q", att.Device).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		dir := t.TempDir()
		if err := unix.Mount(att.Device, dir, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := csi.Closed(t.Context(), att.Device, false); !errors.Is(err, backends.ErrInUse) {
			t.Errorf("%s: the disk: got %v, want ErrInUse", name, err)
		}
		if err := csi.Closed(t.Context(), att.Device, true); err != nil {
			t.Errorf("%s: the one before it: %v", name, err)
		}
		another(t, s, vol, 1)
		err := b.Detach(t.Context(), att)
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		down(t, b, vol, att)
	}
}

// What was begun is found while the driver is away, too.
func TestHalfIsFound(t *testing.T) {
	for name, kind := range kinds {
		s, cluster, vol := newVolume(t, kind.opts, kind.cfg)
		a := s.node(cluster, "a")
		if step := killAt(a, 2, func() {
			_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
		}); step == "" {
			t.Fatal("not killed")
		}
		if err := s.Down(true); err != nil {
			t.Fatal(err)
		}
		want := backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 1}
		if atts, err := a.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{want}) {
			t.Errorf("%s: attachments: got %+v, %v; want %+v", name, atts, err, want)
		}
		if err := s.Down(false); err != nil {
			t.Fatal(err)
		}
		if err := detach(t.Context(), a, want); err != nil { // the first call may go to the driver that ends
			t.Error(err)
		}
		down(t, a, vol)
	}
}

// The places of a driver that says OK, and makes no device.
func TestNoDevice(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["local"].opts, csi.Config{AllocationUnit: 3 * backends.MiB})
	b := s.node(cluster, "a")
	csi.SetStep(b, func(step string) {
		if step == "published" {
			if err := os.Remove(filepath.Join(s.dirs["a"], "csi", strings.ReplaceAll(vol.ID, "-", "")+".1", "device")); err != nil {
				t.Error(err)
			}
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := b.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	wantText(t, err, backends.ErrUnavailable, "and no device is seen there: no device (context deadline exceeded); if the driver runs in a container, what it mounts below")
	down(t, b, vol, backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "a", Token: 1})
}

// methods are the calls that change something.
var methods = []string{
	"CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ControllerUnpublishVolume", "ControllerExpandVolume",
	"NodeStageVolume", "NodeUnstageVolume", "NodePublishVolume", "NodeUnpublishVolume", "NodeExpandVolume",
}

// detach is a Detach, of which an earlier call may come late.
func detach(ctx context.Context, b backends.Backend, att backends.Attachment) error {
	err := b.Detach(ctx, att)
	if errors.Is(err, backends.ErrLate) {
		err = b.Detach(ctx, att)
	}
	return err
}

// life is a volume's from its making to its end, all of which must succeed.
func life(ctx context.Context, s *storage, cluster string) error {
	b := s.node(cluster, "a")
	vol, err := b.Create(ctx, request(cluster))
	if err != nil {
		return err
	}
	att, err := b.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	if err != nil {
		return err
	}
	if size, err := b.(backends.Resizer).Resize(ctx, vol.Ref, vol.Size+6<<20); err != nil || size != vol.Size+6<<20 {
		return fmt.Errorf("resize: got %d, %w", size, err)
	}
	if got, err := b.Get(ctx, vol.Ref); err != nil || got.Size != vol.Size+6<<20 {
		return fmt.Errorf("get: got %+v, %w", got, err)
	}
	if vols, err := b.List(ctx); err != nil || len(vols) != 1 {
		return fmt.Errorf("list: got %v, %w", vols, err)
	}
	if f, ok := b.(backends.Fencer); ok {
		if _, err := f.Fence(ctx, backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "b", Identity: csitest.NodeID("b"), Token: 1}); err != nil {
			return err
		}
	}
	if err := detach(ctx, b, att); err != nil {
		return err
	}
	return b.Delete(ctx, vol.Ref)
}

// Each call is unclear once or more often, in every way there is, and is asked again
// until it is clear.
func TestUnclearAnswers(t *testing.T) {
	backendtest.NeedRoot(t)
	faults := map[string]csitest.Fault{
		"unavailable":                {Before: codes.Unavailable},
		"aborted":                    {Before: codes.Aborted},
		"timed out":                  {Before: codes.DeadlineExceeded},
		"timed out, done":            {After: codes.DeadlineExceeded},
		"reply lost":                 {After: codes.Unavailable},
		"done later":                 {Late: 30 * time.Millisecond},
		"never answered":             {Hang: true},
		"never answered, done":       {HangAfter: true},
		"slow":                       {Delay: 20 * time.Millisecond},
		"cancelled by the driver":    {Before: codes.Canceled},
		"slow, and timed out, after": {Delay: 20 * time.Millisecond, After: codes.DeadlineExceeded},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, kind := range []string{"fences", "local"} {
				cfg := kinds[kind].cfg
				cfg.CallTimeout = time.Minute
				times := 2
				if fault.Hang || fault.HangAfter {
					cfg.CallTimeout, times = time.Second, 1
				}
				s := newStorage(t, kinds[kind].opts, cfg)
				if _, err := s.Node("b"); err != nil {
					t.Fatal(err)
				}
				var mu sync.Mutex
				left := map[string]int{}
				s.Inject(func(call csitest.Call) csitest.Fault {
					mu.Lock()
					defer mu.Unlock()
					if left[call.Method]++; left[call.Method] <= times {
						return fault
					}
					return csitest.Fault{}
				})
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				if err := life(ctx, s, cluster); err != nil {
					t.Errorf("%s: %v", kind, err)
				}
				cancel()
				for _, method := range methods {
					if strings.HasPrefix(method, "ControllerP") || strings.HasPrefix(method, "ControllerU") || strings.Contains(method, "tage") {
						if kind == "local" {
							continue
						}
					}
					if left[method] == 0 {
						t.Errorf("%s: %s was never called", kind, method)
					}
				}
			}
		})
	}
}

// Each call fails for good once. What was under way is found, and the next try succeeds.
func TestDefiniteFailures(t *testing.T) {
	backendtest.NeedRoot(t)
	for _, fault := range []csitest.Fault{{Before: codes.Internal}, {After: codes.Internal}, {Before: codes.Unknown}} {
		for _, method := range methods {
			s := newStorage(t, kinds["fences"].opts, csi.Config{Fences: true})
			if _, err := s.Node("b"); err != nil {
				t.Fatal(err)
			}
			var once sync.Once
			s.Inject(func(call csitest.Call) (f csitest.Fault) {
				if call.Method == method {
					once.Do(func() { f = fault })
				}
				return f
			})
			err := life(t.Context(), s, cluster)
			wantText(t, err, backends.ErrUnavailable, method+": the CSI driver says")
			wantText(t, err, backends.ErrUnavailable, "the driver's log says more")
			cleanUp(t, s, cluster)
		}
	}
}

// cleanUp takes down what is found of a cluster, as the driver does after a crash.
func cleanUp(t *testing.T, s *storage, cluster string) {
	t.Helper()
	b := s.node(cluster, "a")
	atts, err := b.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, att := range atts {
		if err := b.Detach(t.Context(), att); err != nil {
			t.Errorf("clean up: %v", err)
		}
	}
	vols, err := b.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, vol := range vols {
		if err := b.Delete(t.Context(), vol.Ref); err != nil && !errors.Is(err, backends.ErrNotFound) {
			t.Errorf("clean up: %v", err)
		}
	}
	if vols, err = b.List(t.Context()); err != nil || len(vols) > 0 {
		t.Errorf("left: %+v, %v", vols, err)
	}
	if atts, err = b.Attachments(t.Context()); err != nil || len(atts) > 0 {
		t.Errorf("left: %+v, %v", atts, err)
	}
}

// Full storage makes no volume, and leaves none to look for.
func TestNoRoom(t *testing.T) {
	s := newStorage(t, csitest.Options{}, csi.Config{})
	s.Inject(func(call csitest.Call) csitest.Fault {
		if call.Method == "CreateVolume" {
			return csitest.Fault{Before: codes.ResourceExhausted}
		}
		return csitest.Fault{}
	})
	b := s.node(cluster, "a")
	_, err := b.Create(t.Context(), request(cluster))
	wantText(t, err, backends.ErrUnavailable, "(ResourceExhausted); free some room at the storage, or detach volumes of this host, and retry")
	if vols, err := b.List(t.Context()); err != nil || len(vols) > 0 {
		t.Errorf("list: got %+v, %v", vols, err)
	}
}

// A volume whose making was cut short is found by the call that was made then, whatever
// the settings are now.
func TestProfileChanges(t *testing.T) {
	s := newStorage(t, csitest.Options{}, csi.Config{Parameters: map[string]string{"class": "gold"}})
	b := s.node(cluster, "a")
	if step := killAt(b, 2, func() { _, _ = b.Create(t.Context(), request(cluster)) }); step != "made" {
		t.Fatalf("killed after %q", step)
	}
	s.cfg.Parameters = map[string]string{"class": "silver"}
	if all, _ := s.Volumes(); all != 1 {
		t.Fatalf("there are %d volumes", all)
	}
	cleanUp(t, s, cluster)
}

// A driver that makes a volume each time it is asked: none is deleted on a guess.
func TestTwoVolumesOfOneName(t *testing.T) {
	s := newStorage(t, csitest.Options{Forgetful: true}, csi.Config{})
	a, b, req := s.node(cluster, "a"), s.node(cluster, "b"), request(cluster)
	var vol backends.Volume
	csi.SetStep(a, func(step string) {
		if step == "made" {
			var err error
			if vol, err = b.Create(t.Context(), req); err != nil {
				t.Error(err)
			}
		}
	})
	_, err := a.Create(t.Context(), req)
	wantText(t, err, backends.ErrUnavailable, "the CSI driver has made two volumes by the name flocker-"+req.ID+": vol-")
	if again, err := a.Create(t.Context(), req); err != nil || again != vol {
		t.Errorf("got %+v, %v; want %+v", again, err, vol)
	}
	if all, _ := s.Volumes(); all != 2 {
		t.Errorf("there are %d volumes", all)
	}
	down(t, a, vol)
	s.Forget()
}

// What is published under an older token, of which nothing is known here any more, is not
// adopted.
func TestNotAdopted(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true, CallTimeout: time.Second})
	a := s.node(cluster, "a")
	step := killAt(a, 3, func() {
		_, _ = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
	})
	if step != "published at the controller" {
		t.Fatalf("killed after %q", step)
	}
	forgetPlace(t, s, vol, 1)
	s.Calls()
	s.Inject(unheardOnce("ControllerUnpublishVolume"))
	a = s.node(cluster, "a")
	_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
	wantText(t, err, backends.ErrUnavailable, "attach volume: "+unheard)
	wantText(t, err, backends.ErrLate, "")
	att := attach(t, a, vol, 2)
	if calls := s.Calls(); calls["ControllerUnpublishVolume"] != 3 {
		t.Errorf("got %v", calls)
	}
	down(t, a, vol, att)
}

// A host whose name at the driver has changed is cut off by both.
func TestFenceByBothNames(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true})
	a, b := s.node(cluster, "a"), s.node(cluster, "b")
	att := attach(t, a, vol, 1)
	evidence, err := b.(backends.Fencer).Fence(t.Context(), backends.FenceRequest{Ref: vol.Ref, Volume: vol.ID, Node: "a", Identity: "new-name", Token: 1})
	want := "the CSI driver strict.csitest.flocker unpublished volume " + vol.ID + " from new-name and id-of-a; it shows it published to no host"
	if err != nil || evidence != want {
		t.Errorf("got %q, %v; want %q", evidence, err, want)
	}
	if published := s.Published(vol.ID); len(published) > 0 {
		t.Errorf("published to %v", published)
	}
	down(t, b, vol, attach(t, b, vol, 2))
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// A backend that is not told its cluster sees every volume.
func TestNoCluster(t *testing.T) {
	s, _, vol := newVolume(t, kinds["fences"].opts, csi.Config{Fences: true})
	s.catalogs[""] = s.catalog(vol.Cluster)
	b := s.node("", "a")
	if vols, err := b.List(t.Context()); err != nil || !slices.Equal(vols, []backends.Volume{vol}) {
		t.Errorf("list: got %+v, %v; want %+v", vols, err, vol)
	}
	att := attach(t, b, vol, 1)
	if atts, err := b.Attachments(t.Context()); err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
		t.Errorf("attachments: got %+v, %v; want %+v", atts, err, att)
	}
	down(t, b, vol, att)
}

// What is just being deleted is not attached, and not made again.
func TestDeleting(t *testing.T) {
	for name, kind := range kinds {
		s, cluster, vol := newVolume(t, kind.opts, kind.cfg)
		a := s.node(cluster, "a")
		csi.SetStep(a, func(step string) {
			if step != "deleting" {
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := s.node(cluster, "b").Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 2})
			wantText(t, err, backends.ErrUnavailable, "volume "+vol.ID+": it is just being deleted")
			_, err = s.node(cluster, "b").Create(t.Context(), backends.CreateRequest{ID: vol.ID, Name: vol.Name, Cluster: cluster, Size: vol.Size})
			wantText(t, err, backends.ErrUnavailable, "create volume db: the volume is just being deleted")
		})
		if err := a.Delete(t.Context(), vol.Ref); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Another process has the device open, not exclusively.
func TestOpenInAnotherProcess(t *testing.T) {
	csi.SetProcesses(true)
	defer csi.SetProcesses(false)
	s, cluster, vol := newVolume(t, kinds["exclusive"].opts, csi.Config{})
	b := s.node(cluster, "a")
	att := attach(t, b, vol, 1)
	cmd := exec.Command("sh", "-c", "exec sleep 60 <"+att.Device)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3000 { // until it has it
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", cmd.Process.Pid)); err == nil && link == att.Device {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	err := b.Detach(t.Context(), att)
	wantText(t, err, backends.ErrInUse, "detach volume "+vol.ID+": "+att.Device+" is open: in use")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	down(t, b, vol, att)
}

// Ten hosts with 300 volumes on which nothing happens call no driver: what is attached they
// see in the kernel (and no more is asked of them: driver: TestIdleNodesAreQuiet).
func TestIdle(t *testing.T) {
	s, cluster, vol := newVolume(t, kinds["fences"].opts, kinds["fences"].cfg)
	const nodes, volumes, attached = 10, 300, 20
	hosts := make([]backends.Backend, nodes)
	for i := range hosts {
		hosts[i] = s.node(cluster, fmt.Sprint("n", i))
	}
	vols, atts := []backends.Volume{vol}, []backends.Attachment{}
	for len(vols) < volumes {
		vol, err := hosts[0].Create(t.Context(), request(cluster))
		if err != nil {
			t.Fatal(err)
		}
		vols = append(vols, vol)
	}
	for i := range attached {
		atts = append(atts, attach(t, hosts[i%nodes], vols[i], 1))
	}
	s.Calls()
	for range 20 {
		for i, host := range hosts {
			if got, err := host.Attachments(t.Context()); err != nil || len(got) != attached/nodes {
				t.Fatalf("n%d: got %+v, %v", i, got, err)
			}
		}
	}
	if calls := s.Calls(); len(calls) > 0 {
		t.Errorf("the driver was called: %v", calls)
	}
	for i, att := range atts {
		if err := hosts[i%nodes].Detach(t.Context(), att); err != nil {
			t.Error(err)
		}
	}
	for _, vol := range vols {
		if err := hosts[0].Delete(t.Context(), vol.Ref); err != nil {
			t.Error(err)
		}
	}
}
