package iscsi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

const (
	someTarget = "iqn.2026-11.test.flocker:disks"
	someSecret = "only-the-target-knows"
)

// iscsiadm is in place of the program. It writes down its arguments, answers what it is told to in a
// file, and makes and ends sessions as the kernel shows them.
const iscsiadm = `#!/bin/sh
echo "$@" >>$HOST/calls
case "$*" in
*-o\ new)
	if [ -e $HOST/noiface ]; then exit 0; fi
	mkdir -p $HOST/etc/ifaces; echo 'iface.transport_name = tcp' >$HOST/etc/ifaces/$4;;
*--login)
	if [ -e $HOST/login ]; then . $HOST/login; fi
	cat $HOST/etc/nodes/$4/*/$8 >$HOST/record || exit 21
	address=${6%:*}; number=${6##*:}; [ "$number" = 3260 ] && n=3 || n=4
	$HOST/session $n $8 $4 $address $number LOGGED_IN;;
*--logout)
	if [ -e $HOST/logout ]; then . $HOST/logout; fi
	rm -r $HOST/sys/class/iscsi_session/session$4 $HOST/sys/devices/platform/host$4;;
esac
`

// sessionScript makes a session: number, interface, target, address, port, state.
const sessionScript = `#!/bin/sh
dir=$HOST/sys/devices/platform/host$1/session$1
mkdir -p $dir/iscsi_session/session$1 $dir/connection$1:0/iscsi_connection/connection$1:0
cd $dir/iscsi_session/session$1
echo $2 >ifacename; echo $3 >targetname; echo $6 >state; echo 1 >tpgt; echo 0 >target_id
ln -s ../../../session$1 device
cd $dir/connection$1:0/iscsi_connection/connection$1:0
echo $4 >persistent_address; echo $5 >persistent_port
ln -s ../../devices/platform/host$1/session$1/iscsi_session/session$1 $HOST/sys/class/iscsi_session/session$1
`

// host is directories in place of /sys, /dev and /etc/iscsi, and a kernel that does what is written there.
type host struct {
	*testing.T
	dir string
	*Kernel
	// shows is what the target shows to who asks for it: a number, and what that disk is.
	shows map[int]string
	// hangs, if it is there, is waited for by who removes a disk.
	hangs chan struct{}
	// made counts disks.
	made int
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{T: t, dir: t.TempDir(), shows: map[int]string{1: "naa.1"}}
	t.Setenv("HOST", h.dir)
	t.Setenv("PATH", h.dir+"/bin:"+os.Getenv("PATH"))
	for _, dir := range []string{"bin", "dev", "etc", "var", "sys/class/iscsi_session", "sys/class/iscsi_transport/tcp", "sys/class/scsi_host/host3", "sys/class/scsi_host/host4", "sys/block"} {
		h.must(os.MkdirAll(filepath.Join(h.dir, dir), 0o700))
	}
	h.put("bin/iscsiadm", iscsiadm)
	h.put("session", sessionScript)
	h.put("etc/iscsid.conf", "# defaults\nnode.session.scan = auto\nnode.session.cmds_max = 77\niscsid.startup = /bin/false\n")
	h.Kernel = NewKernel(KernelConfig{Dir: h.dir + "/run", Interface: "flocker", Outage: time.Second})
	h.disk = disk.Kernel{
		Sysfs: h.dir + "/sys", Dev: h.dir + "/dev", Claimed: func(string) error { return nil },
		Node: func(path string) (string, error) {
			if _, err := os.Stat(path); err != nil {
				return "", err
			}
			return "8:" + filepath.Base(path)[2:], nil
		},
		Opens: func(string) error { return nil },
	}
	h.databases, h.conf = []string{h.dir + "/var", h.dir + "/etc"}, h.dir+"/etc/iscsid.conf"
	h.flags = os.O_RDWR | syscall.O_EXCL // not every file system of a test has O_DIRECT
	h.limits = limits{program: 30 * time.Second, show: time.Second, grace: time.Second, settle: 500 * time.Millisecond}
	h.write = h.wrote
	return h
}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

func (h *host) put(name, text string) {
	h.Helper()
	h.must(os.MkdirAll(filepath.Dir(filepath.Join(h.dir, name)), 0o700))
	h.must(os.WriteFile(filepath.Join(h.dir, name), []byte(text), 0o700))
}

func (h *host) get(name string) string {
	h.Helper()
	text, err := os.ReadFile(filepath.Join(h.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.Fatal(err)
	}
	return string(text)
}

// wrote is what the kernel does.
func (h *host) wrote(path, text string) error {
	switch filepath.Base(path) {
	case "scan":
		var number int
		if _, err := fmt.Sscanf(text, "0 0 %d", &number); err != nil {
			return err
		}
		if is, ok := h.shows[number]; ok {
			h.appear(strings.TrimPrefix(filepath.Base(filepath.Dir(path)), "host"), number, is)
		}
	case "rescan":
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return err
		}
		_, number, _ := strings.Cut(filepath.Base(dir), ":0:0:")
		for n, is := range h.shows {
			if fmt.Sprint(n) == number {
				return os.WriteFile(dir+"/wwid", []byte(is+"\n"), 0o600)
			}
		}
	case "delete":
		if h.hangs != nil {
			<-h.hangs
		}
		names, err := os.ReadDir(filepath.Dir(path) + "/block")
		if err != nil {
			return err
		}
		return errors.Join(os.Remove(h.dir+"/sys/block/"+names[0].Name()), os.Remove(h.dir+"/dev/"+names[0].Name()), removeAll(filepath.Dir(path)))
	}
	return nil
}

func removeAll(dir string) error { return os.RemoveAll(dir) }

// appear makes a disk, unless it is there.
func (h *host) appear(sid string, number int, is string) (name string) {
	h.Helper()
	dir := fmt.Sprintf("sys/devices/platform/host%[1]s/session%[1]s/target%[1]s:0:0/%[1]s:0:0:%[2]d", sid, number)
	if _, err := os.Stat(filepath.Join(h.dir, dir)); err == nil {
		return ""
	}
	h.made++
	name = fmt.Sprintf("sd%c", 'a'+h.made)
	h.put(dir+"/wwid", is+"\n")
	h.put(dir+"/state", "running\n")
	h.put(dir+"/block/"+name+"/size", "131072\n")
	h.put(dir+"/block/"+name+"/dev", "8:"+name[2:]+"\n")
	h.must(os.Symlink(filepath.Join(h.dir, dir), filepath.Join(h.dir, dir, "block", name, "device")))
	h.put("dev/"+name, strings.Repeat("x", 8192))
	h.must(os.Symlink(filepath.Join(h.dir, dir, "block", name), h.dir+"/sys/block/"+name))
	return name
}

func someUnit() LUN {
	return LUN{Portals: []string{"192.0.2.1:3260"}, Target: someTarget, Number: 1}
}

func (h *host) connect(lun LUN) Device {
	h.Helper()
	d, err := h.Connect(h.Context(), lun)
	h.must(err)
	return d
}

func (h *host) disconnect(d Device, want bool) {
	h.Helper()
	clean, err := h.Disconnect(h.Context(), d)
	if err != nil || clean != want {
		h.Errorf("got %t, %v; want %t", clean, err, want)
	}
}

// has demands that these are the devices there are.
func (h *host) has(want ...Device) {
	h.Helper()
	got, err := h.Devices(h.Context())
	if err != nil || !slices.Equal(got, want) {
		h.Errorf("got %+v, %v; want %+v", got, err, want)
	}
}

// gone demands that there is no session, and no record.
func (h *host) gone() {
	h.Helper()
	for _, pattern := range []string{"sys/class/iscsi_session/*", "etc/nodes/*", "etc/.*", "var/*"} {
		if left, err := filepath.Glob(filepath.Join(h.dir, pattern)); err != nil || len(left) > 0 {
			h.Errorf("left: %s %v", left, err)
		}
	}
}

// refuses demands that a unit is not connected, and what is said.
func (h *host) refuses(lun LUN, class error, texts ...string) {
	h.Helper()
	_, err := h.Connect(h.Context(), lun)
	if !errors.Is(err, class) {
		h.Errorf("got %v, want it to be %q", err, class)
	}
	for _, text := range append(texts, "connect "+lun.String()+": ") {
		if err == nil || !strings.Contains(err.Error(), text) {
			h.Errorf("got %v, want it to say %q", err, text)
		}
	}
}

func TestKernel(t *testing.T) {
	h := newHost(t)
	h.has()
	lun := someUnit()
	lun.User, lun.Secret = "flocker", someSecret
	d := h.connect(lun)
	if d.Path != h.dir+"/dev/sdb" || !d.Is(lun) || !strings.Contains(d.Life, "naa.1") {
		t.Errorf("got %+v", d)
	}
	if again := h.connect(lun); again != d {
		t.Errorf("got %+v, and then %+v", d, again)
	}
	h.has(d)
	if served, err := h.Served(d); !served || err != nil {
		t.Errorf("served: %t, %v", served, err)
	}
	// Of a setting that is there twice, the last one counts.
	record := strings.Split(h.get("record"), "\n")
	for _, line := range []string{
		"node.name = " + someTarget, "node.conn[0].address = 192.0.2.1", "node.conn[0].port = 3260", "node.startup = manual", "node.session.scan = manual",
		"node.session.cmds_max = 77", "node.session.timeo.replacement_timeout = 1", "iface.iscsi_ifacename = flocker",
		"node.session.auth.authmethod = CHAP", "node.session.auth.username = flocker", "node.session.auth.password = " + someSecret,
	} {
		name, _, _ := strings.Cut(line, "=")
		last := ""
		for _, is := range record {
			if strings.HasPrefix(is, name) {
				last = is
			}
		}
		if last != line {
			t.Errorf("the record has %q, want %q", last, line)
		}
	}
	// iscsid, started anew, looks for it by the number of the portal's group.
	info, err := os.Stat(h.dir + "/etc/nodes/" + someTarget + "/192.0.2.1,3260,1/flocker")
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the record: %v %v", info, err)
	}
	h.disconnect(d, true)
	h.gone()
	h.disconnect(d, false) // it is not known what became of it
	if want := "-m iface -I flocker -o new\n-m node -T " + someTarget + " -p 192.0.2.1:3260 -I flocker --login\n-m session -r 3 --logout\n"; h.get("calls") != want {
		t.Errorf("iscsiadm was called with %q, want %q", h.get("calls"), want)
	}
}

func TestKernelNeeds(t *testing.T) {
	h := newHost(t)
	h.must(os.Remove(h.dir + "/sys/class/iscsi_transport/tcp"))
	h.put("bin/modprobe", "#!/bin/sh\necho modprobe $@ >>$HOST/calls\n")
	h.refuses(someUnit(), backends.ErrUnavailable, "this host's kernel has no iSCSI initiator: the module iscsi_tcp is missing")
	if h.get("calls") != "modprobe iscsi_tcp\n" {
		t.Errorf("called: %q", h.get("calls"))
	}
	t.Setenv("PATH", h.dir)
	h.refuses(someUnit(), backends.ErrUnavailable, "this host has no program iscsiadm: install the package open-iscsi, and let iscsid run")
	bad := someUnit()
	bad.User, bad.Secret = "u", "s "
	h.refuses(bad, backends.ErrInvalid, "open-iscsi takes no user and no secret that begins or ends with a space")
	bad.Secret = strings.Repeat("s", 256)
	h.refuses(bad, backends.ErrInvalid, "or is longer than 255 characters")
	h.refuses(LUN{Target: someTarget}, backends.ErrInvalid, "there is no portal")
}

// TestKernelLogin: what iscsiadm fails with is explained, and leaves nothing.
func TestKernelLogin(t *testing.T) {
	for name, test := range map[string]struct{ answer, want string }{
		"refused": {
			"echo 'iscsiadm: Could not login to [all].' >&2; echo 'iscsiadm: initiator reported error (24 - iSCSI login failed due to authorization failure)' >&2; exit 24",
			"192.0.2.1:3260: iscsiadm: initiator reported error (24 - iSCSI login failed due to authorization failure); the target refuses this host: " +
				"are the user and the secret of CHAP right, and may the initiator iqn.2026-11.test.flocker:me log in?: unavailable",
		},
		"no target":  {"echo 'iscsiadm: initiator reported error (19 - x)' >&2; exit 19", "reported error (19 - x); is the target up, can this host reach it, has this portal a target of this name, and may the initiator iqn.2026-11.test.flocker:me log in?"},
		"no portal":  {"echo 'iscsiadm: initiator reported error (8 - x)' >&2; exit 8", "reported error (8 - x); is the target up, can this host reach it, has this portal"},
		"no iscsid":  {"echo 'iscsiadm: can not connect to iSCSI daemon (111)!' >&2; exit 20", "iscsiadm: can not connect to iSCSI daemon (111)!; iscsid does not run on this host: systemctl enable --now iscsid"},
		"no record":  {"rm -r $HOST/etc/nodes; exit 21", "open-iscsi has its records neither in "},
		"silent":     {"exit 9", "iscsiadm: it ended with 9 and said nothing"},
		"a secret":   {"echo iscsiadm: $(grep password $HOST/etc/nodes/*/*/flocker) >&2; exit 7", "node.session.auth.password = …"},
		"no session": {"exit 0", "iscsid says that it has logged in, and the kernel shows no session of interface flocker"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.cfg.Name = "iqn.2026-11.test.flocker:me"
			h.put("login", test.answer)
			lun := someUnit()
			lun.User, lun.Secret = "flocker", someSecret
			h.refuses(lun, backends.ErrUnavailable, test.want)
			_, err := h.Connect(t.Context(), lun)
			if err == nil || strings.Contains(err.Error(), someSecret) {
				t.Errorf("got %v", err)
			}
			h.gone()
			h.must(os.Remove(h.dir + "/login"))
			h.disconnect(h.connect(lun), true)
			h.gone()
		})
	}
}

// TestKernelProgramHangs: a program that does not end is not waited for.
func TestKernelProgramHangs(t *testing.T) {
	h := newHost(t)
	h.limits.program = 500 * time.Millisecond
	h.put("login", "exec sleep 100")
	h.refuses(someUnit(), backends.ErrUnavailable, "iscsiadm has not ended within 500ms; is iscsid well on this host, and can it reach the target?")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := h.Connect(ctx, someUnit())
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	h.gone()
}

// TestKernelPortals: the first portal that lets this host in is used.
func TestKernelPortals(t *testing.T) {
	h := newHost(t)
	h.cfg.Name = "iqn.2026-11.test.flocker:me"
	h.put("login", "case $6 in 192.0.2.1:*) echo iscsiadm: unreachable >&2; exit 8;; esac")
	lun := someUnit()
	lun.Portals = append(lun.Portals, "192.0.2.2:3261")
	d := h.connect(lun)
	h.has(d)
	if record, err := filepath.Glob(h.dir + "/etc/nodes/*/*/*"); err != nil || len(record) != 1 || !strings.HasSuffix(record[0], "/192.0.2.2,3261,1/flocker") {
		t.Errorf("records: %s %v", record, err)
	}
	h.disconnect(d, true)
	h.put("login", "echo iscsiadm: unreachable >&2; exit 8")
	h.refuses(lun, backends.ErrUnavailable, "no portal lets this host in: 192.0.2.1:3260: iscsiadm: unreachable; is the target up, can this host reach it, has this portal a target of this name, and may the initiator iqn.2026-11.test.flocker:me log in?; 192.0.2.2:3261: iscsiadm: unreachable; ")
	h.gone()
}

// TestKernelSessionExists: somebody else's call for the target was faster.
func TestKernelSessionExists(t *testing.T) {
	h := newHost(t)
	h.put("login", "$HOST/session 3 $8 $4 192.0.2.1 3260 LOGGED_IN; exit 15")
	d := h.connect(someUnit())
	h.disconnect(d, true)
	h.gone()
}

// TestKernelUnitMissing: the target does not show the unit, or shows it late.
func TestKernelUnitMissing(t *testing.T) {
	h := newHost(t)
	delete(h.shows, 1)
	h.refuses(someUnit(), backends.ErrNotFound, "this host is logged in to 192.0.2.1:3260, and within 1s there was no disk with this number. "+
		"Has the storage mapped it to this host, whose name is in "+NameFile+"? See `iscsiadm -m session -P 3`")
	h.gone()
	h.limits.show = time.Minute
	scans := 0
	h.write = func(path, text string) error {
		if scans++; scans == 3 {
			h.shows[1] = "naa.1"
		}
		return h.wrote(path, text)
	}
	h.has(h.connect(someUnit()))
}

// TestKernelOpensLate: the kernel shows a disk a moment before it can be opened.
func TestKernelOpensLate(t *testing.T) {
	h := newHost(t)
	opens := 0
	h.disk.Opens = func(path string) error {
		if opens++; opens < 4 {
			return &os.PathError{Op: "open", Path: path, Err: syscall.ENXIO}
		}
		return nil
	}
	h.has(h.connect(someUnit()))
	if opens != 4 {
		t.Errorf("it was opened %d times, want 4", opens)
	}
}

// TestKernelLeftOver: a disk that can do nothing any more is not taken for the unit's.
func TestKernelLeftOver(t *testing.T) {
	for _, state := range []string{"offline", "transport-offline", "no size", "no answer"} {
		t.Run(state, func(t *testing.T) {
			h := newHost(t)
			old := h.connect(someUnit())
			switch state {
			case "no answer":
				h.must(os.Truncate(old.Path, 0))
			case "no size":
				h.put("sys/block/sdb/size", "0\n")
			default:
				h.put("sys/block/sdb/device/state", state+"\n")
			}
			if served, err := h.Served(old); served != (state == "no answer") || err != nil { // it looks at no disk
				t.Errorf("served: %t, %v", served, err)
			}
			h.has(old)
			d := h.connect(someUnit())
			if d.Life == old.Life || d.Path != h.dir+"/dev/sdc" {
				t.Errorf("got %+v, had %+v", d, old)
			}
			h.has(d)
			if served, err := h.Served(old); served || err != nil {
				t.Errorf("served: %t, %v", served, err)
			}
			h.disconnect(old, false)
			h.has(d)
		})
	}
}

// TestKernelOtherDisk: the unit's number was given to another one since.
func TestKernelOtherDisk(t *testing.T) {
	h := newHost(t)
	old := h.connect(someUnit())
	h.shows[1] = "naa.2"
	d := h.connect(someUnit())
	if d.Life == old.Life || !strings.Contains(d.Life, "naa.2") || d.Path != h.dir+"/dev/sdc" {
		t.Errorf("got %+v, had %+v", d, old)
	}
	h.has(d)
	h.disconnect(old, false)
	h.has(d)
	// One of the same name is not the former.
	h.disconnect(d, true)
	h.made = 1
	h.shows[1] = "naa.3"
	if again := h.connect(someUnit()); again.Path != d.Path || again.Life == d.Life {
		t.Errorf("got %+v, had %+v", again, d)
	}
	h.disconnect(d, false)
	if got, err := h.Devices(t.Context()); len(got) != 1 || err != nil {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestKernelBroken: a session that is broken is waited for. It is not ended, and no other portal
// is tried: only when it is back the target has ended what was sent by it.
func TestKernelBroken(t *testing.T) {
	h := newHost(t)
	lun := someUnit()
	lun.Portals = append(lun.Portals, "192.0.2.2:3261")
	d := h.connect(lun)
	state := "sys/class/iscsi_session/session3/state"
	h.put(state, "FAILED\n")
	h.put("sys/block/sdb/device/state", "blocked\n")
	if served, err := h.Served(d); !served || err != nil {
		t.Errorf("served: %t, %v", served, err)
	}
	const want = "the session with 192.0.2.1:3260 is broken, and iscsid tries to get it back. Is the target up, and can this host reach it? " +
		"If it will never come back: iscsiadm -m session -r 3 --logout: unavailable"
	h.refuses(lun, backends.ErrUnavailable, "/dev/sdb: "+want)
	two := lun
	two.Number, h.shows[2] = 2, "naa.2"
	h.refuses(two, backends.ErrUnavailable, want)
	h.has(d)
	h.must(os.Truncate(d.Path, 0)) // nothing can be read
	h.disconnect(d, false)
	h.has()
	h.refuses(lun, backends.ErrUnavailable, want)
	go func() {
		time.Sleep(200 * time.Millisecond)
		_ = os.WriteFile(filepath.Join(h.dir, state), []byte("LOGGED_IN\n"), 0o600)
	}()
	h.disconnect(h.connect(lun), true)
	h.gone()
	if n := strings.Count(h.get("calls"), "--login"); n != 1 {
		t.Errorf("%d logins, want that the session was used again", n)
	}
	// What an operator has ended is not waited for.
	d = h.connect(lun)
	h.put(state, "FAILED\n")
	h.must(os.Truncate(d.Path, 0))
	h.disconnect(d, false)
	h.must(os.Remove(h.dir + "/sys/class/iscsi_session/session3"))
	h.must(removeAll(h.dir + "/sys/devices/platform/host3"))
	h.disconnect(h.connect(lun), true)
	h.gone()
}

// TestKernelOthers: sessions of others are neither shown, used nor ended.
func TestKernelOthers(t *testing.T) {
	h := newHost(t)
	h.run("session", "4", "default", someTarget, "192.0.2.1", "3260", "LOGGED_IN")
	name := h.appear("4", 1, "naa.1")
	h.has()
	d := h.connect(someUnit())
	h.has(d)
	h.disconnect(d, true)
	h.has()
	if _, err := os.Stat(h.dir + "/sys/class/iscsi_session/session4"); err != nil {
		t.Error(err)
	}
	h.disk.Claimed = func(path string) error {
		if path == h.dir+"/dev/"+name {
			return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
		}
		return nil
	}
	h.refuses(someUnit(), backends.ErrInUse, "this host has the disk as /dev/"+name+" too, by a session that is not Flocker's, and uses it there: "+h.dir+"/dev/"+name+" is mounted or open: in use")
	h.has()
	h.disk.Claimed = func(string) error { return nil }
	h.shows[1] = "naa.5" // another disk
	h.has(h.connect(someUnit()))
}

// TestKernelIsChosen: the kernel's initiator makes a host's disks where there is one, and an iscsid.
func TestKernelIsChosen(t *testing.T) {
	h := newHost(t)
	h.sockets = h.dir + "/unix"
	program, err := NewProgram(ProgramConfig{Dir: t.TempDir(), Name: "iqn.2026-11.test.flocker:a"})
	h.must(err)
	uses := func(method string, want Initiator) {
		t.Helper()
		host, err := NewHost(method, h.Kernel, program)
		h.must(err)
		if got := host.chosen(t.Context(), someUnit()); got != want {
			t.Errorf("%q: it is %T, not %T", method, got, want)
		}
	}
	uses("", program)
	uses(ByKernel, h.Kernel)
	h.put("unix", "Num RefCount Protocol Flags Type St Inode Path\n0: 00000002 00000000 00010000 0001 01 2 @ISCSIADM_ABSTRACT_NAMESPACE_2\n")
	uses("", program)
	h.put("unix", "Num RefCount Protocol Flags Type St Inode Path\n0: 00000002 00000000 00010000 0001 01 1 @ISCSIADM_ABSTRACT_NAMESPACE\n")
	uses("", h.Kernel)
	uses(ByProgram, program)
	// As where it listens for another kernel's disks.
	h.must(os.Remove(h.dir + "/sys/class/iscsi_transport/tcp"))
	uses("", program)
	// What this session has sent may still be on its way.
	h.run("session", "3", "flocker", someTarget, "192.0.2.1", "3260", "FAILED")
	uses("", h.Kernel)
	uses(ByProgram, h.Kernel)
}

// TestOpenedBy: who has a disk open is named, but for udev, which looks at it.
func TestOpenedBy(t *testing.T) {
	backendtest.NeedRoot(t)
	t.Parallel()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(dir+"/disk", make([]byte, 1<<20), 0o600))
	device, err := loop.Attach(t.Context(), dir+"/disk")
	must(err)
	t.Cleanup(func() {
		if err := device.Detach(context.Background(), time.Minute, func() {}); err != nil {
			t.Error(err)
		}
	})
	sleep, err := os.ReadFile("/bin/sleep")
	must(err)
	for name, want := range map[string]string{"database": "process %d (database)", "(udev-worker)": ""} {
		must(os.WriteFile(filepath.Join(dir, name), sleep, 0o700))
		f, err := os.Open(device.Path)
		must(err)
		cmd := exec.Command(filepath.Join(dir, name), "1000")
		cmd.ExtraFiles = []*os.File{f}
		must(cmd.Start())
		must(f.Close())
		if want != "" {
			want = fmt.Sprintf(want, cmd.Process.Pid)
		}
		got, err := "", error(nil)
		for started := time.Now(); time.Since(started) < 30*time.Second; time.Sleep(10 * time.Millisecond) {
			// Before it is called so, it is this program.
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid)); string(comm) == name+"\n" {
				break
			}
		}
		for range 3000 { // this host's udev may look, too
			if got, err = openedBy(device.Path, nil); got == want || err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil || got != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
		must(cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
	}
}

// TestKernelNumbered: units that are numbered, and not named, are not taken for the same because of
// that, but where it is the target and number that were asked for.
func TestKernelNumbered(t *testing.T) {
	const is = "naa.60000000000000000e00000000010001"
	h := newHost(t)
	h.shows[1] = is
	inUse := ""
	h.disk.Claimed = func(path string) error {
		if path == h.dir+"/dev/"+inUse {
			return fmt.Errorf("%s is mounted or open: %w", path, backends.ErrInUse)
		}
		return nil
	}
	h.run("session", "4", "default", someTarget+"-of-another-host", "192.0.2.2", "3260", "LOGGED_IN")
	inUse = h.appear("4", 1, is)
	d := h.connect(someUnit())
	h.has(d)
	h.disconnect(d, true)
	h.run("session", "5", "default", someTarget, "192.0.2.1", "3260", "LOGGED_IN")
	inUse = h.appear("5", 2, is)
	d = h.connect(someUnit())
	h.has(d)
	h.disconnect(d, true)
	inUse = h.appear("5", 1, is)
	h.refuses(someUnit(), backends.ErrInUse, "this host has the disk as /dev/"+inUse+" too, by a session that is not Flocker's, and uses it there")
}

// TestKernelNames: sessions under another name of the host are not used: they may have other units by the
// same numbers.
func TestKernelNames(t *testing.T) {
	t.Parallel()
	names := map[string]bool{}
	for _, name := range []string{"", "iqn.2026-11.test.flocker:a", "iqn.2026-11.test.flocker:b"} {
		names[NewKernel(KernelConfig{Name: name}).cfg.Interface] = true
	}
	if len(names) != 3 || !names["flocker"] {
		t.Errorf("the interfaces are %v", names)
	}
}

func (h *host) run(program string, args ...string) {
	h.Helper()
	attr := &os.ProcAttr{Files: []*os.File{nil, os.Stderr, os.Stderr}}
	p, err := os.StartProcess(h.dir+"/"+program, append([]string{program}, args...), attr)
	h.must(err)
	if state, err := p.Wait(); err != nil || !state.Success() {
		h.Fatal(state, err)
	}
}

// TestKernelHeld: a disk that multipath has is not used, and stays.
func TestKernelHeld(t *testing.T) {
	h := newHost(t)
	h.write = func(path, text string) error {
		err := h.wrote(path, text)
		if filepath.Base(path) == "scan" {
			h.put("sys/block/sdb/holders/dm-7/name", "")
		}
		return err
	}
	h.refuses(someUnit(), backends.ErrInUse, "/dev/sdb is held by dm-7, as by multipath or LVM, and Flocker uses one path and the whole disk: "+
		"exclude it in /etc/multipath.conf (blacklist) or lvm.conf (global_filter): in use")
	got, err := h.Devices(t.Context())
	if len(got) != 1 || err != nil {
		t.Fatalf("got %+v, %v", got, err)
	}
	_, err = h.Disconnect(t.Context(), got[0])
	if want := "disconnect LUN 1 of " + someTarget + ": /dev/sdb is held by dm-7"; !errors.Is(err, backends.ErrInUse) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	h.has(got[0])
}

// TestKernelSession: a session lasts as long as it has disks.
func TestKernelSession(t *testing.T) {
	h := newHost(t)
	h.shows[2] = "naa.2"
	two := someUnit()
	two.Number = 2
	first, second := h.connect(someUnit()), h.connect(two)
	h.has(first, second)
	h.disconnect(first, true)
	h.has(second)
	h.disconnect(second, true)
	h.gone()
	if n := strings.Count(h.get("calls"), "--login"); n != 1 {
		t.Errorf("%d logins for two units of a target", n)
	}
	// A logout that fails is tried again with the next call for the target.
	h.put("logout", "echo iscsiadm: no >&2; exit 9")
	h.disconnect(h.connect(someUnit()), true)
	h.has()
	h.must(os.Remove(h.dir + "/logout"))
	h.disconnect(first, false)
	h.gone()
}

// TestKernelNotClean: a disk that does not answer is removed, and who asks is told so. The
// session stays until it has answered.
func TestKernelNotClean(t *testing.T) {
	h := newHost(t)
	d := h.connect(someUnit())
	h.must(os.Truncate(d.Path, 0)) // nothing can be read
	h.disconnect(d, false)
	h.has()
	h.disconnect(h.connect(someUnit()), true)
	h.gone()
	if n := strings.Count(h.get("calls"), "--login"); n != 1 {
		t.Errorf("%d logins, want that the session was used again", n)
	}
}

// TestKernelHangs: what waits for a disk in the kernel is not waited for.
func TestKernelHangs(t *testing.T) {
	h := newHost(t)
	d := h.connect(someUnit())
	h.hangs = make(chan struct{})
	began := time.Now()
	clean, err := h.Disconnect(t.Context(), d)
	if clean || !errors.Is(err, backends.ErrUnavailable) || !strings.HasPrefix(err.Error(), "disconnect LUN 1 of "+someTarget+": remove "+d.Path+": "+d.Path+" does not answer: ") {
		t.Errorf("got %t, %v", clean, err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it was waited for for %s", took)
	}
	h.has(d)
	close(h.hangs)
	for range 1000 {
		if left, err := filepath.Glob(h.dir + "/sys/devices/platform/host3/session3/target*/*"); err == nil && len(left) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.disconnect(d, false)
	h.gone()
}

// TestKernelDatabase: open-iscsi's records are where its programs of this distribution look.
func TestKernelDatabase(t *testing.T) {
	h := newHost(t)
	h.put("bin/iscsiadm", strings.ReplaceAll(iscsiadm, "$HOST/etc/", "$HOST/var/"))
	h.connect(someUnit())
	if records, err := filepath.Glob(h.dir + "/var/nodes/*/192.0.2.1,3260,1/flocker"); err != nil || len(records) != 1 {
		t.Errorf("records: %s %v", records, err)
	}
	h = newHost(t)
	h.put("noiface", "")
	h.refuses(someUnit(), backends.ErrUnavailable, "iscsiadm has made an interface flocker, and it is neither in "+h.dir+"/var nor in "+h.dir+"/etc")
}

// TestKernelWaitsForAnother: two calls for a target are not in each other's way.
func TestKernelWaitsForAnother(t *testing.T) {
	h := newHost(t)
	unlock, err := h.lock(t.Context(), someTarget, syscall.LOCK_EX)
	h.must(err)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = h.Connect(ctx, someUnit())
	if want := "another call for the target is under way on this host: "; !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	unlock()
	h.shows[2] = "naa.2"
	done := make(chan error, 2)
	for n := range 2 {
		go func() {
			lun := someUnit()
			lun.Number = n + 1
			d, err := h.Connect(t.Context(), lun)
			if err == nil {
				_, err = h.Disconnect(t.Context(), d)
			}
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	h.gone()
}
