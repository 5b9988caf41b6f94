package openstack_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi/iscsitest"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/openstack"
	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// iscsiAttach is how devices are made here. It is fuse but in a virtual machine of e2e/vm, which has
// a kernel's initiator.
var iscsiAttach = cmp.Or(os.Getenv("ISCSI_ATTACH"), iscsi.ByProgram)

// byKernel is a kernel that is two hosts, with two initiators.
func byKernel() bool { return iscsiAttach == iscsi.ByKernel }

func initiatorOf(node string) string { return "iqn.2026-11.org.example:" + node }

// array is a Cinder without Keystone and Nova, whose volumes are units of a real iSCSI target
// on this machine. It makes a target for each attachment, for that host alone.
type array struct {
	*openstacktest.Server

	t       backendtest.T
	targets *iscsitest.Server
	dir     string // of volumes, and of what hosts have in /run
	// numbered makes targets be called by a number, which is given again, and not by their
	// volumes; they want no CHAP.
	numbered bool

	mu      sync.Mutex
	names   map[string]string // of targets, by attachment
	secrets []string
	nodes   []string
}

func newArray(t backendtest.T, delay time.Duration) *array {
	t.Helper()
	targets, err := iscsitest.Start()
	must(err)
	dir, err := os.MkdirTemp("/tmp", "flocker-iscsi-") // paths of sockets are short
	must(err)
	c := &array{t: t, targets: targets, dir: dir, names: map[string]string{}}
	c.Server = openstacktest.New(openstacktest.Config{NoAuth: true, Delay: delay}, c)
	t.Cleanup(func() {
		c.Close()
		var errs error
		for _, node := range c.nodes {
			errs = errors.Join(errs, c.reboot(node)) // what a test that failed has left
		}
		targets.Stop()
		if errs = errors.Join(errs, os.RemoveAll(dir)); errs != nil {
			t.Errorf("%v", errs)
		}
	})
	return c
}

func (c *array) file(volume string) string { return filepath.Join(c.dir, "volume-"+volume) }

// Stored implements openstacktest.Guest.
func (c *array) Stored(volume string, gib int) {
	if gib == 0 {
		must(os.Remove(c.file(volume)))
		return
	}
	f, err := os.OpenFile(c.file(volume), os.O_CREATE|os.O_RDWR, 0o600)
	must(err)
	must(f.Truncate(int64(gib) << 30))
	must(f.Close())
}

// Plug, Unplug and Holds implement openstacktest.Guest: there are no servers.
func (c *array) Plug(string, string, int)  {}
func (c *array) Unplug(string, string)     {}
func (c *array) Holds(string, string) bool { return false }

// Export implements openstacktest.Exporter.
func (c *array) Export(volume, attachment string, connector map[string]any) map[string]any {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := "iqn.2010-10.org.openstack:volume-" + volume
	for i := 1; c.numbered; i++ {
		name = fmt.Sprint("iqn.2026-11.org.example:unit-", i)
		free := true
		for _, taken := range c.names {
			free = free && taken != name
		}
		if free {
			break
		}
	}
	c.names[attachment] = name
	target := iscsitest.Target{Name: name, File: c.file(volume), Initiator: fmt.Sprint(connector["initiator"])}
	info := map[string]any{
		"driver_volume_type": "iscsi", "target_discovered": false, "target_portal": c.targets.Portal, "target_iqn": name,
		"target_lun": iscsitest.Number, "volume_id": volume, "access_mode": "rw", "encrypted": false, "attachment_id": attachment,
	}
	if !c.numbered {
		random := make([]byte, 14)
		_, _ = rand.Read(random) // never fails
		target.User, target.Secret = hex.EncodeToString(random[:8]), hex.EncodeToString(random[8:])
		info["auth_method"], info["auth_username"], info["auth_password"] = "CHAP", target.User, target.Secret
		c.secrets = append(c.secrets, target.Secret)
	}
	must(c.targets.Add(target))
	return info
}

// Unexport implements openstacktest.Exporter.
func (c *array) Unexport(_, attachment string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if name := c.names[attachment]; name != "" {
		must(c.targets.Remove(name))
		delete(c.names, attachment)
	}
}

// home is what a node has in /run.
func (c *array) home(node string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.nodes, node)
	if i < 0 {
		i = len(c.nodes)
		c.nodes = append(c.nodes, node)
	}
	return filepath.Join(c.dir, strconv.Itoa(i))
}

func (c *array) config(node string) openstack.Config {
	return openstack.Config{
		Attach: "connector", CinderURL: c.CinderURL(), ProjectID: openstacktest.Project,
		ISCSI: true, ISCSIAttach: iscsiAttach, ISCSIInitiator: initiatorOf(node), RunDir: c.home(node),
	}
}

func (c *array) node(cluster, node string) backends.Backend {
	b, err := openstack.New(c.config(node), openstack.Self{Node: node, Cluster: cluster})
	must(err)
	openstack.Fast(b)
	return b
}

// programs returns the programs of a node.
func (c *array) programs(node string) []int { return qsd.Processes(c.home(node)) }

// kernel is the initiator of a node.
func (c *array) kernel(node string) *iscsi.Kernel {
	return iscsi.NewKernel(iscsi.KernelConfig{Name: initiatorOf(node)})
}

// connected is how many devices a node has that can do something.
func (c *array) connected(node string) int {
	if !byKernel() {
		return len(c.programs(node))
	}
	devices, err := c.kernel(node).Devices(context.Background())
	must(err)
	return len(devices)
}

// crash kills the programs of a node, or ends its kernel's sessions.
func (c *array) crash(node string) {
	if byKernel() {
		sessions, err := filepath.Glob("/sys/class/iscsi_session/session*")
		must(err)
		for _, session := range sessions {
			if strings.TrimSpace(readFile(session+"/initiatorname")) == initiatorOf(node) {
				must(exec.Command("iscsiadm", "-m", "session", "-r", strings.TrimPrefix(filepath.Base(session), "session"), "--logout").Run())
			}
		}
	}
	for _, pid := range c.programs(node) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
	}
	for started := time.Now(); c.connected(node) > 0; time.Sleep(time.Millisecond) {
		if time.Since(started) > time.Minute {
			panic("a program that was killed does not end")
		}
	}
}

// reboot takes a node's devices away, and its notes.
func (c *array) reboot(node string) error {
	c.crash(node)
	dirs, err := filepath.Glob(c.home(node) + "/*")
	for _, dir := range dirs {
		p, failed := iscsi.NewProgram(iscsi.ProgramConfig{Dir: dir, Name: initiatorOf(node)})
		if failed != nil {
			return failed
		}
		devices, failed := p.Devices(context.Background())
		err = errors.Join(err, failed)
		for _, d := range devices {
			_, failed := p.Disconnect(context.Background(), d)
			err = errors.Join(err, failed)
		}
	}
	return errors.Join(err, os.RemoveAll(c.home(node)))
}

// notes returns the notes of a node.
func (c *array) notes(node string) []string {
	notes, err := filepath.Glob(c.home(node) + "/*/lun-*")
	must(err)
	return notes
}

func needISCSI(t *testing.T) {
	t.Helper()
	backendtest.NeedRoot(t)
	iscsitest.Need(t)
}

func TestISCSIContract(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	backendtest.Run(t, backendtest.Config{
		New: func(t backendtest.T) backendtest.Storage {
			c := newArray(t, time.Millisecond)
			return backendtest.Storage{Node: c.node, Down: func(down bool) {
				if c.SetFaults(); down {
					c.SetFaults(openstacktest.Fault{Status: 503, Text: "The server is currently unavailable."})
				}
			}}
		},
		Many: 60, Timeout: 5 * time.Minute,
	})
}

// onArray is a volume that node a has attached.
func onArray(t *testing.T, c *array) (a, b backends.Backend, vol backends.Volume, att backends.Attachment) {
	t.Helper()
	cluster := uuid.NewString()
	a, b = c.node(cluster, "node-a"), c.node(cluster, "node-b")
	vol = made(t, a, cluster)
	return a, b, vol, attachedTo(t, a, vol, 10)
}

func made(t *testing.T, b backends.Backend, cluster string) backends.Volume {
	t.Helper()
	vol, err := b.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: cluster, Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	return vol
}

func attachedTo(t *testing.T, b backends.Backend, vol backends.Volume, token int64) backends.Attachment {
	t.Helper()
	att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return att
}

// put writes to a device, and syncs it.
func put(t *testing.T, device string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	must(err)
	_, err = f.WriteAt(data, 1<<20)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// has demands that a device has what was written.
func has(t *testing.T, device string, data []byte) {
	t.Helper()
	f, err := os.Open(device)
	must(err)
	got := make([]byte, len(data))
	_, err = f.ReadAt(got, 1<<20)
	if err = errors.Join(err, f.Close()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the device does not have what was written: %v", err)
	}
}

// A process that serves a device dies. The next Attach makes another device, of the same
// attachment.
func TestISCSIProgramDies(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	a, b, vol, att := onArray(t, c)
	put(t, att.Device, []byte("kept"))
	c.crash("node-a")
	left := att
	if byKernel() {
		left.Device = "" // a disk goes with its session
	}
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != left {
		t.Errorf("got %v, %v; want %v", atts, err, left)
	}
	again := attachedTo(t, a, vol, 10)
	has(t, again.Device, []byte("kept"))
	if again.ID != att.ID || c.connected("node-a") != 1 {
		t.Errorf("got %v after %v, and %d devices", again, att, c.connected("node-a"))
	}
	// And once more, so that Detach finds it dead.
	c.crash("node-a")
	if err := a.Detach(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if left := c.notes("node-a"); len(left) > 0 || c.connected("node-a") > 0 {
		t.Errorf("left behind: %s", left)
	}
	now := attachedTo(t, b, vol, 11)
	has(t, now.Device, []byte("kept"))
	if err := b.Detach(t.Context(), now); err != nil {
		t.Error(err)
	}
	for _, file := range [][]string{c.notes("node-a"), c.notes("node-b")} {
		if len(file) > 0 {
			t.Errorf("left behind: %s", file)
		}
	}
}

// The target does not answer, with something on its way to it. The volume is given to nobody
// before that has arrived, or is lost for good.
func TestISCSIHangs(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	a, b, vol, att := onArray(t, c)
	put(t, att.Device, []byte("before"))
	must(c.targets.Hang(true))
	hangs := true
	t.Cleanup(func() {
		if hangs {
			must(c.targets.Hang(false))
		}
	})
	f, err := os.OpenFile(att.Device, os.O_RDWR|syscall.O_DSYNC, 0)
	must(err)
	ended := make(chan error, 1)
	go func() {
		_, err := f.WriteAt([]byte("after!"), 1<<20)
		ended <- errors.Join(err, f.Close())
	}()
	time.Sleep(time.Second) // it is on its way
	if !byKernel() {        // it gives up by itself
		c.crash("node-a")
	}
	if err := <-ended; err == nil {
		t.Error("what the target has not answered was acknowledged")
	}
	for range 2 { // with the device, and when that has gone
		began := time.Now()
		want(t, a.Detach(t.Context(), att), backends.ErrUnavailable, "something that this host has sent to LUN 1 of iqn.2010-10.org.openstack:volume-"+vol.Ref+" may still arrive there")
		if took := time.Since(began); took > 3*time.Minute {
			t.Errorf("that took %s", took)
		}
	}
	if _, err = b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11}); !errors.Is(err, backends.ErrInUse) {
		t.Errorf("got %v", err)
	}
	// A new process of the host knows it, too.
	atts, err := c.node(vol.Cluster, "node-a").Attachments(t.Context())
	if err != nil || len(atts) != 1 || atts[0].ID != att.ID || atts[0].Device != "" {
		t.Errorf("got %v, %v", atts, err)
	}
	must(c.targets.Hang(false))
	hangs = false
	a = c.node(vol.Cluster, "node-a")
	for began := time.Now(); ; time.Sleep(time.Second) { // iscsid gets its session back when it looks again
		if err = a.Detach(t.Context(), att); err == nil {
			break
		}
		if !byKernel() || time.Since(began) > 4*time.Minute {
			t.Fatal(err)
		}
	}
	now := attachedTo(t, b, vol, 11)
	put(t, now.Device, []byte("newest"))
	time.Sleep(2 * time.Second)
	has(t, now.Device, []byte("newest"))
	if err := b.Detach(t.Context(), now); err != nil {
		t.Error(err)
	}
	has(t, c.file(vol.Ref), []byte("newest"))
}

// What a device is of is only known from its note. One without, and one that says something else, is
// not used.
func TestISCSINotes(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	a, _, vol, att := onArray(t, c)
	file := c.notes("node-a")
	if len(file) != 1 {
		t.Fatalf("there are the notes %s", file)
	}
	if info, err := os.Stat(file[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("it has mode %s, %v", info.Mode(), err)
	}
	note := readFile(file[0])
	other := uuid.NewString()
	for name, test := range map[string]struct{ note, want string }{
		"of another volume":     {strings.ReplaceAll(note, `"volume":"`+vol.Ref, `"volume":"`+other), "and it was connected as volume " + other + " for attachment " + att.ID},
		"of another attachment": {strings.ReplaceAll(note, att.ID, other), "and it was connected as volume " + vol.Ref + " for attachment " + other},
		"broken":                {note[:len(note)/2], "does not say as which volume LUN 1 of "},
		"of another unit":       {strings.ReplaceAll(note, `"lun":1`, `"lun":2`), "does not say as which volume LUN 1 of "},
		"none":                  {"", "and this host has no note as which volume it was connected"},
	} {
		must(os.Remove(file[0]))
		if test.note != "" {
			must(os.WriteFile(file[0], []byte(test.note), 0o600))
		}
		_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
		if err == nil || !strings.Contains(err.Error(), test.want) && !strings.Contains(err.Error(), "was cut off") {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
		if got := c.connected("node-a"); got != 1 {
			t.Errorf("%s: there are %d devices", name, got)
		}
		must(os.WriteFile(file[0], []byte(note), 0o600))
	}
	// With the note it is what it was; and without it can be given up, at least.
	if again := attachedTo(t, a, vol, 10); again != att {
		t.Errorf("got %v, want %v", again, att)
	}
	must(os.Remove(file[0]))
	f, err := os.Open(att.Device)
	must(err)
	want(t, a.Detach(t.Context(), att), backends.ErrInUse, att.Device+" is open or mounted")
	must(f.Close())
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if c.connected("node-a") > 0 {
		t.Error("the device is still there")
	}
}

// An attach was killed when the unit was noted, or connected, and nobody had the device.
func TestISCSIKilled(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	a, _, vol, att := onArray(t, c)
	file := c.notes("node-a")[0]
	note := readFile(file)
	must(os.WriteFile(file, []byte(note[:strings.Index(note, `,"life"`)]+"}"), 0o600))
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0].Device != "" {
		t.Errorf("got %v, %v; want it without a device", atts, err)
	}
	again := attachedTo(t, a, vol, 10)
	if c.connected("node-a") != 1 || readFile(file) == note {
		t.Errorf("got %v after %v, and %d devices", again, att, c.connected("node-a"))
	}
	if err := a.Detach(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	must(os.WriteFile(file, []byte(note), 0o600)) // and no device
	now := attachedTo(t, a, vol, 11)
	if err := a.Detach(t.Context(), now); err != nil {
		t.Error(err)
	}
	if left := c.notes("node-a"); len(left) > 0 {
		t.Errorf("left behind: %s", left)
	}
}

// An array gives the unit of a volume to another one, while a host still has its device.
func TestISCSIUnitGivenAgain(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	c.numbered = true
	a, b, vol, att := onArray(t, c)
	next := made(t, a, vol.Cluster)
	// As `cinder attachment-delete` does.
	c.Do(func(s *openstacktest.Server) { s.Detach(vol.Ref) })
	_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: next.Ref, Volume: next.ID, Token: 20})
	want(t, err, backends.ErrInUse, att.Device+" is LUN 1 of iqn.2026-11.org.example:unit-1, which Cinder says is volume "+next.Ref+" now, and it was connected as volume "+vol.Ref)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	now := attachedTo(t, a, next, 20)
	put(t, now.Device, []byte("next"))
	if err := a.Detach(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	if att = attachedTo(t, b, vol, 21); len(c.notes("node-a")) > 0 {
		t.Error("there are notes left")
	}
	has(t, att.Device, make([]byte, 4))
	if err := b.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// What cannot be attached is refused with the reason, without a secret, and given back.
func TestISCSIRefuses(t *testing.T) {
	t.Parallel()
	needISCSI(t)
	c := newArray(t, 0)
	a, _, vol, att := onArray(t, c)
	if err := a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	const secret = "open-sesame-1"
	target := "iqn.2010-10.org.openstack:volume-" + vol.Ref
	must(c.targets.Add(iscsitest.Target{Name: target, File: c.file(vol.Ref), User: "u", Secret: "open-sesame-2"}))
	unit := func(name string, more ...string) map[string]any {
		info := map[string]any{"driver_volume_type": "iscsi", "target_portal": c.targets.Portal, "target_iqn": name, "target_lun": 1}
		for i := 0; i < len(more); i += 2 {
			info[more[i]] = more[i+1]
		}
		return info
	}
	other := uuid.NewString()
	said := func(program, kernel string) string {
		if byKernel() {
			return kernel
		}
		return program
	}
	for text, test := range map[string]struct {
		info  map[string]any
		class error
	}{
		`on a storage of kind "fibre_channel", and this host is set up to attach iscsi`: {map[string]any{"driver_volume_type": "fibre_channel"}, backends.ErrInvalid},
		"there is no portal by which to reach":                                          {unit(target, "target_portal", ""), backends.ErrInvalid},
		"which has the id of another volume in its name":                                {unit("iqn.2010-10.org.openstack:volume-" + other), backends.ErrInvalid},
		said("the target wants another user or secret of CHAP than this host was told", "the target refuses this host: are the user and the secret of CHAP right"): {unit(target, "auth_method", "CHAP", "auth_username", "u", "auth_password", secret), backends.ErrUnavailable},
		`wants authentication by "KRB5", and only CHAP is known here`: {unit(target, "auth_method", "KRB5"), backends.ErrInvalid},
		said("Target not found(515); there is no such unit for this host", "has this portal a target of this name, and may the initiator "+initiatorOf("node-a")+" log in?"): {unit("iqn.2026-11.org.example:none"), backends.ErrUnavailable},
		said("portal 127.0.0.1:1: iscsi_service failed", "127.0.0.1:1: iscsiadm: initiator reported error (8 - connection timed out); is the target up, "):                   {unit(target, "target_portal", "127.0.0.1:1"), backends.ErrUnavailable},
	} {
		c.Do(func(s *openstacktest.Server) { s.Info(test.info) })
		_, err := a.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
		want(t, err, test.class, text)
		if strings.Contains(fmt.Sprint(err), secret) {
			t.Errorf("the secret is in %v", err)
		}
		if err := a.Detach(t.Context(), backends.Attachment{Ref: vol.Ref, Volume: vol.ID, Node: "node-a", Token: 11}); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if left := c.notes("node-a"); len(left) > 0 {
			t.Errorf("%s: left behind: %s", text, left)
		}
	}
	if status, _ := c.Attached(vol.Ref); status != "available" {
		t.Errorf("it is %s", status)
	}
}
