package openstack_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// share is an NFS share that every node has mounted somewhere else: a directory of this
// machine, whose loop devices are the kernel's own.
type share struct {
	t   backendtest.T
	dir string

	mu     sync.Mutex
	mounts map[string]string // by node
}

const export = "10.0.0.5:/exports/cinder"

func newShare(t backendtest.T, dir string) *share {
	t.Helper()
	s := &share{t: t, dir: dir, mounts: map[string]string{}}
	t.Cleanup(func() {
		for node, dir := range s.mounts {
			if err := s.reboot(node); err != nil { // what a test that failed has left
				t.Errorf("%v", err)
			}
			if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
				t.Errorf("umount %s: %v: %s", dir, err, out)
			}
		}
	})
	return s
}

// mount returns where a node has the share.
func (s *share) mount(node string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if dir := s.mounts[node]; dir != "" {
		return dir
	}
	dir := filepath.Join(filepath.Dir(s.dir), node)
	must(os.MkdirAll(dir, 0o755))
	if out, err := exec.Command("mount", "--bind", s.dir, dir).CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v: %s", err, out))
	}
	s.mounts[node] = dir
	return dir
}

// Stored implements openstacktest.Guest.
func (s *share) Stored(volume string, gib int) {
	path := filepath.Join(s.dir, "volume-"+volume)
	if gib == 0 {
		must(os.Remove(path))
		return
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	must(err)
	must(f.Truncate(int64(gib) << 30))
	must(f.Close())
}

// Plug, Unplug and Holds implement openstacktest.Guest: there are no servers.
func (s *share) Plug(string, string, int)  {}
func (s *share) Unplug(string, string)     {}
func (s *share) Holds(string, string) bool { return false }

// reboot takes a node's loop devices away.
func (s *share) reboot(node string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	devices, err := loop.In(ctx, s.mount(node))
	for _, d := range devices {
		err = errors.Join(err, d.Detach(ctx, time.Minute, func() {}))
	}
	return err
}

// file is where a node has a volume's.
func (s *share) file(node string, vol backends.Volume) string {
	return filepath.Join(s.mount(node), "volume-"+vol.Ref)
}

// bare is a Cinder without Keystone and Nova.
type bare struct {
	*openstacktest.Server
	*share
}

func newBare(t backendtest.T, delay time.Duration) *bare {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "export")
	must(os.MkdirAll(dir, 0o755))
	c := &bare{share: newShare(t, dir)}
	c.Server = openstacktest.New(openstacktest.Config{NoAuth: true, Share: export, Delay: delay}, c.share)
	t.Cleanup(c.Close)
	return c
}

func (c *bare) node(cluster, node string) backends.Backend {
	return c.nodeWith(cluster, node, map[string]string{export: c.mount(node)})
}

func (c *bare) nodeWith(cluster, node string, shares map[string]string) backends.Backend {
	b, err := openstack.New(openstack.Config{
		Attach: "connector", CinderURL: c.CinderURL(), ProjectID: openstacktest.Project, Shares: shares,
	}, openstack.Self{Node: node, Cluster: cluster})
	must(err)
	openstack.Fast(b)
	return b
}

func TestConnectorContract(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	backendtest.Run(t, backendtest.Config{
		New: func(t backendtest.T) backendtest.Storage {
			c := newBare(t, time.Millisecond)
			return backendtest.Storage{Node: c.node, Down: func(down bool) {
				if c.SetFaults(); down {
					c.SetFaults(openstacktest.Fault{Status: 503, Text: "The server is currently unavailable."})
				}
			}}
		},
		Many: 60, Timeout: 2 * time.Minute,
	})
}

// attached is a volume that node a has attached.
func attached(t *testing.T, c *bare) (a, b backends.Backend, vol backends.Volume, att backends.Attachment) {
	t.Helper()
	cluster := uuid.NewString()
	a, b = c.node(cluster, "node-a"), c.node(cluster, "node-b")
	vol, err := a.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	att, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
	if err != nil {
		t.Fatal(err)
	}
	return a, b, vol, att
}

// wantNothingNoted demands that a volume's metadata has no attachment.
func wantNothingNoted(t *testing.T, c *bare, vol backends.Volume) {
	t.Helper()
	for key := range c.Metadata(vol.Ref) {
		if strings.HasPrefix(key, "flocker_attachment") {
			t.Errorf("%s is left", key)
		}
	}
}

func TestConnectorUnanswered(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	for _, f := range []openstacktest.Fault{{Drop: true}, {Half: true}, {Status: 503}} {
		for _, call := range []string{"POST attachments", "PUT attachments", "GET attachments", "POST attachments/*/action", "POST volumes/*/metadata"} {
			c := newBare(t, time.Millisecond)
			a, _, vol, att := attached(t, c)
			if err := a.Detach(t.Context(), att); err != nil {
				t.Fatal(err)
			}
			f.Call, f.Times = call, 1
			c.SetFaults(f)
			var err error
			for range 10 { // as the driver does
				if att, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11}); err == nil {
					break
				}
			}
			if err != nil {
				t.Errorf("%s: %v", call, err)
				continue
			}
			if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
				t.Errorf("%s: got %v, %v; want %v", call, atts, err, att)
			}
			if _, on := c.Attached(vol.Ref); len(on) != 1 {
				t.Errorf("%s: it has %d attachments", call, len(on))
			}
			if err := a.Detach(t.Context(), att); err != nil {
				t.Error(err)
			}
		}
	}
}

// The kernel forgets a part of the path of a file that was opened in a mount namespace
// which has ended, as that of a managed plugin has when it starts anew. Other shares have a
// file of the same name, as where one is a copy of another.
func TestConnectorRestarted(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	_, _, vol, att := attached(t, c)
	must(c.reboot("node-a"))
	out, err := exec.Command("unshare", "-m", "sh", "-e", "-c", `mount --bind "$1" "$1"; losetup --find --show "$1/$2"`,
		"sh", c.mount("node-a"), "volume-"+vol.Ref).Output()
	if err != nil {
		t.Fatal(err)
	}
	att.Device = strings.TrimSpace(string(out))
	if shown := readFile("/sys/block/" + filepath.Base(att.Device) + "/loop/backing_file"); strings.HasPrefix(shown, c.mount("node-a")) {
		t.Fatalf("the kernel still shows the whole path, %s", shown)
	}
	shares := map[string]string{export: c.mount("node-a"), "10.0.0.6:/not/mounted": filepath.Join(t.TempDir(), "none")}
	for i := range 20 {
		dir := t.TempDir()
		must(os.WriteFile(filepath.Join(dir, "volume-"+vol.Ref), make([]byte, 1<<20), 0o600))
		shares[fmt.Sprint("10.0.0.6:/copies/", i)] = dir
	}
	a := c.nodeWith(vol.Cluster, "node-a", shares)
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("got %v, %v; want %v", atts, err, att)
	}
	again, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
	if err != nil || again != att {
		t.Errorf("got %v, %v; want %v", again, err, att)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 0 {
		t.Errorf("got %v, %v", atts, err)
	}
}

// A device that somebody has open stays, now and when it is closed, also where no process
// is seen to have it open.
func TestConnectorOpen(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, _, _, att := attached(t, c)
	f, err := os.OpenFile(att.Device, os.O_RDWR, 0)
	must(err)
	memory, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	must(err)
	must(f.Close())
	want(t, a.Detach(t.Context(), att), backends.ErrInUse, att.Device+" is open or mounted")
	must(unix.Munmap(memory))
	for range 20 {
		if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
			t.Fatalf("got %v, %v; want %v", atts, err, att)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// A volume's file was replaced, as by one from a backup. What is written to a device of the old
// one would be lost with it.
func TestConnectorFileReplaced(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, _, vol, att := attached(t, c)
	file := c.file("node-a", vol)
	must(os.Remove(file))
	c.Stored(vol.Ref, 1)
	_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
	want(t, err, backends.ErrInUse, att.Device+" has "+file+" (deleted), and Cinder says "+file)
	// It is shown, so that it can be given up.
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("got %v, %v; want %v", atts, err, att)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if att, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11}); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// An attachment that somebody has reserved and not used is in nobody's way for ever.
func TestConnectorLeftReserved(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, b, vol, att := attached(t, c)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	c.Do(func(s *openstacktest.Server) { s.Reserve(vol.Ref) })
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	wantNothingNoted(t, c, vol)
}

// A host that cannot say in time that an attachment is its own gives it back by itself, before
// another one takes it for left behind.
func TestConnectorNoteIsSlow(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, _, vol, att := attached(t, c)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	before := c.Calls()["DELETE attachments/*"]
	c.SetFaults(openstacktest.Fault{Call: "POST volumes/*/metadata", Times: 1, Hang: true})
	att, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
	if err != nil {
		t.Fatal(err)
	}
	if freed := c.Calls()["DELETE attachments/*"] - before; freed == 0 {
		t.Error("it has used the attachment that it could not note in time")
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	wantNothingNoted(t, c, vol)
}

// A host notes in time that an attachment is its own, and another that was held up for longer
// goes by what it has seen before.
func TestConnectorHeldUp(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, b, vol, att := attached(t, c)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	id := ""
	c.Do(func(s *openstacktest.Server) { id = s.Reserve(vol.Ref) })
	asked := c.Calls()["GET attachments"]
	c.SetFaults(openstacktest.Fault{Call: "GET attachments", After: 1, Times: 1, Slow: 5 * time.Second})
	go func() {
		for c.Calls()["GET attachments"] < asked+2 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		c.Do(func(s *openstacktest.Server) { s.Note(vol.Ref, "flocker_attachment_"+id, "11 node-a") })
	}()
	_, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 12})
	holder, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || holder.Node != "node-a" || holder.Token != 11 {
		t.Errorf("got %v, want it to be attached to node-a under token 11", err)
	}
	if _, on := c.Attached(vol.Ref); len(on) != 1 {
		t.Errorf("it has %d attachments", len(on))
	}
	if err := b.Detach(t.Context(), backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "node-b", Token: 12}); err != nil {
		t.Error(err)
	}
}

// Nobody but an operator can free what a dead host has attached.
func TestConnectorDeadHost(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, b, vol, att := attached(t, c)
	_, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
	holder, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || holder.Node != "node-a" || holder.Token != 10 {
		t.Errorf("got %v", err)
	}
	want(t, err, backends.ErrInUse, "attached to node-a; if that host is off for good, type: cinder attachment-delete "+att.ID)
	want(t, b.Detach(t.Context(), att), backends.ErrInvalid, "only its host can detach it", "cinder attachment-delete "+att.ID)
	// The host was started anew: its kernel has no device, and Cinder an attachment.
	must(c.reboot("node-a"))
	atts, err := c.node(vol.Cluster, "node-a").Attachments(t.Context())
	if err != nil || len(atts) != 1 || atts[0].ID != att.ID || atts[0].Device != "" || atts[0].Token != 10 {
		t.Errorf("got %v, %v", atts, err)
	}
	if att, err = a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 12}); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

func TestConnectorRefuses(t *testing.T) {
	t.Parallel()
	backendtest.NeedRoot(t)
	c := newBare(t, 0)
	a, _, vol, att := attached(t, c)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	other, err := openstack.New(openstack.Config{
		Attach: "connector", CinderURL: c.CinderURL(), ProjectID: openstacktest.Project, Shares: map[string]string{"10.0.0.6:/other": "/mnt"},
	}, openstack.Self{Node: "node-c", Cluster: vol.Cluster})
	must(err)
	openstack.Fast(other)
	req := backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11}
	_, err = other.Attach(t.Context(), req)
	want(t, err, backends.ErrInvalid, `is on share "10.0.0.5:/exports/cinder", and the setting shares does not say where that is mounted here`)
	if err := other.Detach(t.Context(), backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "node-c", Token: 11}); err != nil {
		t.Fatal(err)
	}
	for text, info := range map[string]map[string]any{
		"storage of kind \"iscsi\", and this host is set up to attach nfs": {"driver_volume_type": "iscsi"},
		"only \"ro\"": {"driver_volume_type": "nfs", "export": export, "name": "volume-" + vol.Ref, "access_mode": "ro"},
		"is of an encrypted type, which only Nova can attach":         {"driver_volume_type": "nfs", "export": export, "name": "volume-" + vol.Ref, "encrypted": true},
		"a file of format qcow2, as after a snapshot":                 {"driver_volume_type": "nfs", "export": export, "name": "volume-" + vol.Ref, "format": "qcow2"},
		"which is not made of its id (Cinder's volume_name_template)": {"driver_volume_type": "nfs", "export": export, "name": "../volume-" + vol.Ref, "format": "raw"},
	} {
		c.Do(func(s *openstacktest.Server) { s.Info(info) })
		_, err = a.Attach(t.Context(), req)
		want(t, err, backends.ErrInvalid, text)
		if err := a.Detach(t.Context(), backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "node-a", Token: 11}); err != nil {
			t.Fatal(err)
		}
	}
	if status, _ := c.Attached(vol.Ref); status != "available" {
		t.Errorf("it is %s", status)
	}
}
