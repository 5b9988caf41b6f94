package vm_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

const (
	targetName = "iqn.2026-11.test.flocker:disks"
	hostA      = "iqn.2026-11.test.flocker:a"
	hostB      = "iqn.2026-11.test.flocker:b"
	chapSecret = "only-the-target-knows"
	// outage is for how long I/O waits for a broken session.
	outage = 5 * time.Second
)

// targets is a shell's functions for the kernel's own iSCSI target. Its disks are files in
// memory; which number is which disk differs between the hosts.
const targets = `
core=/sys/kernel/config/target/core
iscsi=/sys/kernel/config/target/iscsi
disk() { # name
	truncate -s 64M /tmp/$1.img
	mkdir -p $core/fileio_0/$1
	echo fd_dev_name=/tmp/$1.img,fd_dev_size=67108864 >$core/fileio_0/$1/control
	echo serial-of-$1 >$core/fileio_0/$1/wwn/vpd_unit_serial
	echo 1 >$core/fileio_0/$1/enable
}
target() { # name
	mkdir -p $iscsi/$1/tpgt_1/np/127.0.0.1:3260
	echo 0 >$iscsi/$1/tpgt_1/attrib/authentication
	echo 1 >$iscsi/$1/tpgt_1/enable
}
unit() { # target number disk
	mkdir -p $iscsi/$1/tpgt_1/lun/lun_$2
	ln -s $core/fileio_0/$3 $iscsi/$1/tpgt_1/lun/lun_$2/is
}
shown() { # target initiator number, as the number
	acl=$iscsi/$1/tpgt_1/acls/$2
	mkdir -p $acl/lun_$4
	ln -s $iscsi/$1/tpgt_1/lun/lun_$3 $acl/lun_$4/is
	echo 0 >$acl/lun_$4/write_protect
}
hidden() { # target initiator number
	rm $iscsi/$1/tpgt_1/acls/$2/lun_$3/is
	rmdir $iscsi/$1/tpgt_1/acls/$2/lun_$3
}
`

// daemon starts open-iscsi's, with records of its own.
const daemon = `
mkdir -p /run/lock
mountpoint -q /etc/iscsi || { cp /etc/iscsi/iscsid.conf /run; mount -t tmpfs iscsi /etc/iscsi; }
grep -v ^iscsid.startup /run/iscsid.conf >/etc/iscsi/iscsid.conf
echo InitiatorName=` + hostA + ` >/etc/iscsi/initiatorname.iscsi
iscsid
`

// array is a machine that is a storage and two hosts of it.
type array struct {
	*testing.T
	*machine
}

// TestISCSI: the kernel's initiator, open-iscsi's programs, and the kernel's target.
func TestISCSI(t *testing.T) {
	backendtest.NeedRoot(t)
	a := &array{t, boot(t, config{
		modules: []string{"iscsi_tcp", "crc32c_generic", "sd_mod", "ext4", "target_core_mod", "target_core_file", "iscsi_target_mod"}, root: true,
	})}
	a.shell("mount -t configfs none /sys/kernel/config")
	a.shell(daemon)
	for _, disk := range []string{"one", "two", "three"} {
		a.shell("disk " + disk)
	}
	a.shell("target " + targetName)
	for number, disk := range []string{"one", "two", "three"} {
		a.shell(fmt.Sprintf("unit %s %d %s", targetName, number+1, disk))
	}
	// Both hosts have 1 and 2; they are other disks for b.
	a.shell(fmt.Sprintf("shown %[1]s %[2]s 1 1; shown %[1]s %[2]s 2 2; shown %[1]s %[3]s 3 1; shown %[1]s %[3]s 1 2", targetName, hostA, hostB))
	a.plugins()
	for _, test := range []struct {
		name string
		run  func(a *array)
	}{
		{"data", testData},
		{"units", testUnits},
		{"other host", testOtherHost},
		{"CHAP", testCHAP},
		{"refused", testRefused},
		{"restarted", testRestarted},
		{"number given to another unit", testReplaced},
		{"outage", testISCSIOutage},
	} {
		t.Run(test.name, func(t *testing.T) {
			usual := a.T
			a.T, a.t = t, t
			defer func() { a.T, a.t = usual, usual }()
			defer a.explain()
			test.run(a)
		})
	}
}

// explain says, of a test that has failed, what the machine waits for.
func (a *array) explain() {
	if !a.Failed() {
		return
	}
	said, err := ask[string](a.machine, "Shell", `
grep . /sys/class/iscsi_session/*/state /sys/block/sd*/device/state || true
for task in /proc/[0-9]*; do grep -q '^State:.D' $task/status && { cat $task/comm $task/stack || true; }; done
dmesg | tail -30`)
	a.Logf("%s %v", said, err)
}

// shell has the machine run a script.
func (a *array) shell(script string) string {
	a.Helper()
	said, err := ask[string](a.machine, "Shell", targets+script)
	if err != nil {
		a.Fatalf("%s: %v", script, err)
	}
	return said
}

// plugins starts the initiators of both hosts, or starts them anew.
func (a *array) plugins() {
	a.Helper()
	for name, host := range map[string]string{"a": "", "b": hostB} { // a has the machine's name
		must[None](a.machine, "Initiate", iscsi.KernelConfig{Interface: name, Name: host, Outage: outage})
	}
}

func unit(number int) iscsi.LUN {
	return iscsi.LUN{Portals: []string{"127.0.0.1:3260"}, Target: targetName, Number: number}
}

func (a *array) connect(host string, lun iscsi.LUN) iscsi.Device {
	a.Helper()
	began := time.Now()
	d, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: host, LUN: lun})
	if err != nil {
		a.Fatal(err)
	}
	if !d.Is(lun) {
		a.Errorf("%+v is said to be %s", d, lun)
	}
	a.Logf("%s of %s was connected in %s", d.Path, host, time.Since(began).Round(time.Millisecond))
	return d
}

// disconnect demands that nothing of a device is left, and says whether it was clean.
func (a *array) disconnect(host string, d iscsi.Device) (clean bool) {
	a.Helper()
	clean, err := ask[bool](a.machine, "Disconnect", Initiator{Name: host, Device: d})
	if err != nil {
		a.Fatal(err)
	}
	if slices.Contains(a.devices(host), d) {
		a.Errorf("%+v is left", d)
	}
	return clean
}

func (a *array) devices(host string) []iscsi.Device {
	a.Helper()
	return must[[]iscsi.Device](a.machine, "Devices", Initiator{Name: host})
}

// nothingLeft demands that there are no disks, no sessions and no records.
func (a *array) nothingLeft() {
	a.Helper()
	if left := a.shell("ls /sys/class/iscsi_session; ls /sys/block | grep ^sd || true; find /etc/iscsi/nodes -mindepth 1; find /etc/iscsi -name '.*'"); left != "" {
		a.Errorf("left: %s", left)
	}
}

// testData: what is written is there after the disk was taken away and comes back.
func testData(a *array) {
	d := a.connect("a", unit(1))
	a.shell("mkfs.ext4 -q " + d.Path + "; mkdir -p /tmp/mnt; mount " + d.Path + " /tmp/mnt; echo 'what was written' >/tmp/mnt/file")
	_, err := ask[bool](a.machine, "Disconnect", Initiator{Name: "a", Device: d})
	wantSaid(a.T, err, "disconnect LUN 1 of "+targetName+": "+d.Path+" is open or mounted, by somebody: in use")
	a.shell("umount /tmp/mnt")
	if !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
	d = a.connect("a", unit(1))
	if got := a.shell("mount " + d.Path + " /tmp/mnt; cat /tmp/mnt/file; umount /tmp/mnt"); strings.TrimSpace(got) != "what was written" {
		a.Errorf("the file has %q", got)
	}
	if !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testUnits: a unit appears when it is asked for, and only to who has asked.
func testUnits(a *array) {
	one := a.connect("a", unit(1))
	if disks := a.shell("ls /sys/block | grep ^sd"); strings.TrimSpace(disks) != one.Path[len("/dev/"):] {
		a.Errorf("the machine has the disks %q, and was asked for %s", disks, one.Path)
	}
	if again := a.connect("a", unit(1)); again != one {
		a.Errorf("got %+v, and then %+v", one, again)
	}
	two := a.connect("a", unit(2))
	if got := a.devices("a"); len(got) != 2 || !slices.Contains(got, one) || !slices.Contains(got, two) {
		a.Errorf("devices are %+v", got)
	}
	if got := a.devices("b"); len(got) > 0 {
		a.Errorf("the other host has %+v", got)
	}
	if sessions := a.shell("ls /sys/class/iscsi_session"); len(strings.Fields(sessions)) != 1 {
		a.Errorf("for two units of one target there are the sessions %q", sessions)
	}
	if !a.disconnect("a", one) {
		a.Error("not clean")
	}
	if got := a.devices("a"); !slices.Equal(got, []iscsi.Device{two}) {
		a.Errorf("devices are %+v", got)
	}
	if clean, err := ask[bool](a.machine, "Disconnect", Initiator{Name: "a", Device: one}); clean || err != nil {
		a.Errorf("a device that is gone: %t, %v", clean, err)
	}
	must[None](a.machine, "Write", Data{two.Path, 0, []byte("still served")})
	// Somebody looks at it, as udev does, and is slow.
	file := must[int](a.machine, "Open", Opening{two.Path, false})
	looked := make(chan error, 1)
	time.AfterFunc(2*time.Second, func() {
		_, err := ask[None](a.machine, "Close", file)
		looked <- err
	})
	defer func() {
		if err := <-looked; err != nil {
			a.Error(err)
		}
	}()
	if !a.disconnect("a", two) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testOtherHost: two hosts have sessions of their own with one target, and see other units.
func testOtherHost(a *array) {
	first, other := a.connect("a", unit(1)), a.connect("b", unit(1))
	must[None](a.machine, "Write", Data{first.Path, 4096, []byte("of disk one")})
	must[None](a.machine, "Write", Data{other.Path, 4096, []byte("of disk three")})
	if got := a.shell("grep -c 'of disk one' /tmp/one.img; grep -c 'of disk three' /tmp/three.img"); got != "1\n1\n" {
		a.Errorf("the files have %q", got)
	}
	// Its 2 is disk one, too; on this machine, it is seen to be in use.
	file := must[int](a.machine, "Open", Opening{first.Path, true})
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "b", LUN: unit(2)})
	wantSaid(a.T, err, "connect LUN 2 of "+targetName+": this host has the disk as "+first.Path+" too, by a session that is not Flocker's, and uses it there: ", "in use")
	must[None](a.machine, "Close", file)
	if got := a.devices("b"); !slices.Equal(got, []iscsi.Device{other}) {
		a.Errorf("devices are %+v", got)
	}
	if !a.disconnect("a", first) {
		a.Error("not clean")
	}
	if got := a.devices("b"); !slices.Equal(got, []iscsi.Device{other}) {
		a.Errorf("devices are %+v", got)
	}
	if !a.disconnect("b", other) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testCHAP: a secret is used, and is nowhere but in a record that root alone can read.
func testCHAP(a *array) {
	lun := unit(7)
	lun.Target = "iqn.2026-11.test.flocker:chap"
	acl := "/sys/kernel/config/target/iscsi/" + lun.Target + "/tpgt_1/acls/" + hostA
	a.shell("target " + lun.Target + "; unit " + lun.Target + " 7 two; shown " + lun.Target + " " + hostA + " 7 7; " +
		"echo 1 >/sys/kernel/config/target/iscsi/" + lun.Target + "/tpgt_1/attrib/authentication; printf flocker >" + acl + "/auth/userid; printf %s " + chapSecret + " >" + acl + "/auth/password")
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "(24 - iSCSI login failed due to authorization failure); the target refuses this host: are the user and the secret of CHAP right, and may the initiator "+hostA+" log in?")
	a.nothingLeft()
	lun.User, lun.Secret = "flocker", chapSecret+"?"
	_, err = ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "(24 - iSCSI login failed due to authorization failure); the target refuses this host: ")
	if err != nil && strings.Contains(err.Error(), chapSecret) {
		a.Errorf("the secret is in %v", err)
	}
	a.nothingLeft()
	lun.Secret = chapSecret
	d := a.connect("a", lun)
	if got := a.shell("cd /etc/iscsi; grep -rl " + chapSecret + " . | xargs stat -c '%a %n'"); got != "600 ./nodes/"+lun.Target+"/127.0.0.1,3260,1/a\n" {
		a.Errorf("the secret is in %q", got)
	}
	if !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testRefused: what is not there, and a portal that is not.
func testRefused(a *array) {
	lun := unit(9)
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "connect LUN 9 of "+targetName+": this host is logged in to 127.0.0.1:3260, and within 30s there was no disk with this number. "+
		"Has the storage mapped it to this host, whose name is in /etc/iscsi/initiatorname.iscsi?")
	a.nothingLeft()
	lun.Target += "-not"
	_, err = ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "has this portal a target of this name, and may the initiator "+hostA+" log in?: unavailable")
	a.nothingLeft()
	lun = unit(1)
	lun.Portals = []string{"127.0.0.1:3999"}
	_, err = ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "127.0.0.1:3999: iscsiadm: ", "is the target up, can this host reach it, has this portal ")
	a.nothingLeft()
	lun.Portals = append(lun.Portals, "127.0.0.1:3260")
	if d := a.connect("a", lun); !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testRestarted: the plugin and iscsid are started anew, and what there was goes on.
func testRestarted(a *array) {
	d := a.connect("a", unit(1))
	file := must[int](a.machine, "Open", Opening{d.Path, true})
	a.plugins()
	if got := a.devices("a"); !slices.Equal(got, []iscsi.Device{d}) {
		a.Errorf("devices are %+v", got)
	}
	a.shell("kill $(cat /run/iscsid.pid); while [ -e /proc/$(cat /run/iscsid.pid)/exe ]; do sleep 0.1; done; rm /run/iscsid.pid")
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "b", LUN: unit(1)})
	wantSaid(a.T, err, "iscsid does not run on this host: systemctl enable --now iscsid: unavailable")
	a.shell(daemon)
	a.until("iscsid has the session again", func() bool {
		return strings.Contains(a.shell("cat /sys/class/iscsi_session/*/state"), "LOGGED_IN")
	})
	if got := a.shell("sleep 2; cat /sys/class/iscsi_session/*/recovery_tmo"); strings.TrimSpace(got) != "5" {
		a.Errorf("I/O waits %q s for a broken session, with an iscsid that was started anew", got)
	}
	if got := a.connect("a", unit(1)); got != d {
		a.Errorf("got %+v, and had %+v", got, d)
	}
	must[None](a.machine, "Write", Data{d.Path, 0, []byte("written after that")})
	must[None](a.machine, "Close", file)
	if !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
}

// testReplaced: the storage has given a disk's number to another one, and the kernel does not
// look. The disk is not taken for the one that is asked for.
func testReplaced(a *array) {
	d := a.connect("a", unit(2))
	must[None](a.machine, "Write", Data{d.Path, 1 << 20, []byte("of disk two")})
	a.shell("hidden " + targetName + " " + hostA + " 2; shown " + targetName + " " + hostA + " 3 2")
	file := must[int](a.machine, "Open", Opening{d.Path, true})
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: unit(2)})
	wantSaid(a.T, err, "connect LUN 2 of "+targetName+": "+d.Path+" was disk naa.", ", and is naa.", " is open or mounted, by ", ": in use")
	must[None](a.machine, "Close", file)
	is := a.connect("a", unit(2))
	if is.Life == d.Life {
		a.Errorf("the life of another disk is %s still", is.Life)
	}
	must[None](a.machine, "Write", Data{is.Path, 1 << 20, []byte("of disk 3")})
	if got := a.shell("grep -c 'of disk two' /tmp/two.img; grep -c 'of disk 3' /tmp/three.img"); got != "1\n1\n" {
		a.Errorf("the files have %q", got)
	}
	if clean, err := ask[bool](a.machine, "Disconnect", Initiator{Name: "a", Device: d}); clean || err != nil {
		a.Errorf("the former device: %t, %v", clean, err)
	}
	if got := a.devices("a"); !slices.Equal(got, []iscsi.Device{is}) {
		a.Errorf("devices are %+v", got)
	}
	if !a.disconnect("a", is) {
		a.Error("not clean")
	}
	a.shell("hidden " + targetName + " " + hostA + " 2; shown " + targetName + " " + hostA + " 2 2")
	a.nothingLeft()
	// One that the storage has taken away is not found to be there.
	a.connect("a", unit(2))
	a.shell("hidden " + targetName + " " + hostA + " 2")
	_, err = ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: unit(2)})
	wantSaid(a.T, err, "connect LUN 2 of "+targetName+": this host is logged in to 127.0.0.1:3260, and within 30s there was no disk with this number. ")
	a.shell("shown " + targetName + " " + hostA + " 2 2")
	a.nothingLeft()
}

// testISCSIOutage: a writer goes on after a short outage. In a long one it fails, and nobody is told
// that all it has sent has arrived.
func testISCSIOutage(a *array) {
	lun := unit(1)
	d := a.connect("a", lun)
	failed := a.hammer(d.Path)
	serve := func(yes int) { a.shell(fmt.Sprintf("echo %d >$iscsi/%s/tpgt_1/enable", yes, targetName)) }
	serve(0)
	before := a.acknowledged()
	serve(1)
	a.until("the writer goes on", func() bool {
		if len(failed) > 0 {
			a.Fatal(<-failed)
		}
		return a.acknowledged() > before+20
	})
	serve(0)
	select {
	case text := <-failed:
		if !strings.HasSuffix(text, " "+d.Path+": input/output error") {
			a.Errorf("the writer was told %q", text)
		}
	case <-time.After(callLimit):
		a.Fatal("the writer hangs")
	}
	if served, err := ask[bool](a.machine, "Served", Initiator{Name: "a", Device: d}); served || err != nil {
		a.Errorf("served: %t, %v", served, err)
	}
	_, err := ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	const broken = "the session with 127.0.0.1:3260 is broken, and iscsid tries to get it back. Is the target up, and can this host reach it? "
	wantSaid(a.T, err, "connect LUN 1 of "+targetName+": "+d.Path+": "+broken)
	if a.disconnect("a", d) {
		a.Error("it is said that nothing can arrive later")
	}
	if left := a.devices("a"); len(left) > 0 {
		a.Errorf("devices are %+v", left)
	}
	// The session is kept: with another one, the target would not end what was left of this.
	_, err = ask[iscsi.Device](a.machine, "Connect", Initiator{Name: "a", LUN: lun})
	wantSaid(a.T, err, "connect LUN 1 of "+targetName+": "+broken)
	session := a.shell("ls /sys/class/iscsi_session")
	last := a.acknowledged()
	serve(1)
	a.until("iscsid has the session again", func() bool {
		return strings.Contains(a.shell("cat /sys/class/iscsi_session/*/state"), "LOGGED_IN")
	})
	d = a.connect("a", lun)
	if now := a.shell("ls /sys/class/iscsi_session"); now != session {
		a.Errorf("the session is %q, and was %q", now, session)
	}
	kept(a.T, must[[]byte](a.machine, "Read", Data{d.Path, 0, make([]byte, records*record)}), last)
	if !a.disconnect("a", d) {
		a.Error("not clean")
	}
	a.nothingLeft()
}
