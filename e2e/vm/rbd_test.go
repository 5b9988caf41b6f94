package vm_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/rbd"
	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

// The network of the machine, this host and Ceph.
const (
	tap                = "tap0"
	cephHost, cephPeer = "192.0.2.1", "192.0.2.2"
)

// TestRBD runs again, in a network namespace of its own.
func TestRBD(t *testing.T) {
	needVM(t)
	backendtest.NeedRoot(t)
	cephtest.NeedCeph(t)
	if os.Getenv("VM_NETWORK") != "" {
		testRBD(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel takes the death of this thread for that of the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(t.Context(), self, "-test.run="+cmp.Or(flag.Lookup("test.run").Value.String(), "^TestRBD$"), "-test.v", "-test.timeout=20m")
	cmd.Env = append(os.Environ(), "VM_NETWORK="+tap)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}

// pair is a machine and this host, which both have the same Ceph cluster.
type pair struct {
	*testing.T
	*machine
	ceph    *cephtest.Cluster
	cluster string
	method  string
	host    *rbd.Backend
}

func testRBD(t *testing.T) {
	for _, args := range []string{
		"link set lo up", "tuntap add " + tap + " mode tap", "addr add " + cephHost + "/24 dev " + tap, "link set " + tap + " up",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	cephtest.Sweep()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	ceph, err := cephtest.StartAt(ctx, cephtest.Place{Addr: cephHost})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ceph.Stop)
	modules := map[string]string{"krbd": "rbd", "rbd-nbd": "nbd"}
	for _, method := range []string{"krbd", "rbd-nbd"} {
		t.Run(method, func(t *testing.T) {
			p := &pair{T: t, ceph: ceph, cluster: uuid.NewString(), method: method}
			p.machine = boot(t, config{modules: []string{modules[method]}, tap: tap, host: cephHost, guest: cephPeer, root: true})
			p.host, err = rbd.New(rbd.Config{
				Monitors: []string{ceph.Monitors}, KeyringFile: ceph.Keyring, Pool: cephtest.Pool, Attach: "fuse", RunDir: ceph.Dir + "/r",
			}, rbd.Self{Node: "b", Cluster: p.cluster})
			if err != nil {
				t.Fatal(err)
			}
			p.plugin()
			for _, test := range []struct {
				name string
				run  func(p *pair)
			}{
				{"moved", testMoved},
				{"outage", testOutage},
				{"fenced writer", testCutOff},
				{"power cut", testPowerCut}, // the last: it ends the machine
			} {
				t.Run(test.name, func(t *testing.T) {
					usual := p.T
					p.T, p.t = t, t
					defer func() { p.T, p.t = usual, usual }()
					test.run(p)
				})
			}
		})
	}
}

// plugin starts the backend in the machine, or starts it anew.
func (p *pair) plugin() {
	p.Helper()
	key, err := os.ReadFile(p.ceph.Keyring)
	if err != nil {
		p.Fatal(err)
	}
	must[None](p.machine, "RBD", RBDOrder{
		Config: rbd.Config{Monitors: []string{p.ceph.Monitors}, KeyringFile: "/run/keyring", Pool: cephtest.Pool, Attach: p.method},
		Self:   rbd.Self{Node: "a", Cluster: p.cluster}, Keyring: string(key),
	})
}

func (p *pair) create() backends.Volume {
	p.Helper()
	vol, err := p.host.Create(p.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: p.cluster, Size: 64 << 20})
	if err != nil {
		p.Fatal(err)
	}
	return vol
}

// attach attaches a volume in the machine.
func (p *pair) attach(v backends.Volume, token int64) backends.Attachment {
	p.Helper()
	began := time.Now()
	att, err := p.tryAttach(v, token)
	if err != nil {
		p.Fatal(err)
	}
	p.Logf("%s was attached in %s", att.Device, time.Since(began).Round(time.Millisecond))
	return att
}

// tryAttach asks again, as the driver does, if Ceph's programs were not given the time to
// answer: emulated, they may take longer than the backend waits for them.
func (p *pair) tryAttach(v backends.Volume, token int64) (att backends.Attachment, err error) {
	p.Helper()
	p.until(v.Ref+" is attached, or refused", func() bool {
		att, err = ask[backends.Attachment](p.machine, "Attach", backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: token})
		return err == nil || !strings.Contains(err.Error(), "Ceph has not answered within")
	})
	return att, err
}

// attachHost attaches a volume to this host.
func (p *pair) attachHost(v backends.Volume, token int64) backends.Attachment {
	p.Helper()
	att, err := p.host.Attach(p.Context(), backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: token})
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = p.host.Detach(context.Background(), att) }) // it mostly is
	return att
}

func (p *pair) detachHost(att backends.Attachment) {
	p.Helper()
	if err := p.host.Detach(p.Context(), att); err != nil {
		p.Error(err)
	}
}

// mustDetach demands that nothing is left. It tries again, as the driver does, while udev looks
// at a device that was just closed.
func (p *pair) mustDetach(att backends.Attachment, v backends.Volume) {
	p.Helper()
	p.until(att.Device+" is detached", func() bool {
		err := p.detach(att)
		if err != nil && !strings.HasSuffix(err.Error(), " is open or mounted: in use") {
			p.Fatal(err)
		}
		return err == nil
	})
	p.nothingLeft(v)
}

// nothingLeft demands that nothing of a volume is left in the machine, and nobody watches it.
func (p *pair) nothingLeft(v backends.Volume) {
	p.Helper()
	p.attachments()
	if p.method == "krbd" {
		if devices := must[[]string](p.machine, "List", "/sys/bus/rbd/devices"); len(devices) > 0 {
			p.Errorf("the kernel has the images %s", devices)
		}
	}
	for _, dir := range must[[]string](p.machine, "List", "/run/flocker/rbd") {
		for _, file := range must[[]string](p.machine, "List", "/run/flocker/rbd/"+dir) {
			if !strings.HasPrefix(file, "lock-") {
				p.Errorf("%s is left", file)
			}
		}
	}
	if watchers := p.watchers(v); strings.Contains(watchers, cephPeer) {
		p.Errorf("the machine watches the image still: %s", watchers)
	}
}

func (p *pair) watchers(v backends.Volume) string {
	p.Helper()
	text, err := p.ceph.Run(p.Context(), "rbd", "status", cephtest.Pool+"/"+filepath.Base(v.Ref))
	if err != nil {
		p.Fatal(err)
	}
	return text
}

// testMoved: what one writes is what the other reads, and only one has it at a time.
func testMoved(p *pair) {
	v := p.create()
	att := p.attach(v, 10)
	p.write(att.Device, v)
	if watchers := p.watchers(v); !strings.Contains(watchers, cephPeer) {
		p.Errorf("the machine does not watch the image: %s", watchers)
	}
	p.plugin()
	p.attachments(att)
	_, err := p.host.Attach(p.Context(), backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: 11})
	if elsewhere, ok := errors.AsType[*backends.AttachedError](err); !ok || elsewhere.Node != "a" || elsewhere.Token != 10 {
		p.Errorf("got %v, want that it is attached to a", err)
	}
	file := must[int](p.machine, "Open", Opening{att.Device, true})
	wantSaid(p.T, p.detach(att), "detach volume "+v.ID+": "+att.Device+" is open or mounted: in use")
	p.attachments(att)
	must[None](p.machine, "Close", file)
	p.mustDetach(att, v)
	there := p.attachHost(v, 11)
	inFile(p.T, there.Device, v)
	p.detachHost(there)
	att = p.attach(v, 12)
	p.reads(att.Device, v)
	p.mustDetach(att, v)
}

// testOutage: while the cluster answers nobody, a writer waits, and goes on afterwards.
func testOutage(p *pair) {
	v := p.create()
	att := p.attach(v, 10)
	failed := p.hammer(att.Device)
	p.ceph.Pause(true)
	time.Sleep(time.Second)
	before := p.acknowledged()
	time.Sleep(25 * time.Second) // longer than Ceph's programs wait
	if now := p.acknowledged(); now != before {
		p.Errorf("%d records were acknowledged by nobody", now-before)
	}
	p.ceph.Pause(false)
	p.until("the writer goes on", func() bool {
		if len(failed) > 0 {
			p.Fatal(<-failed)
		}
		return p.acknowledged() > before+20
	})
	p.fence(v, 10)
	<-failed
	p.mustDetach(att, v)
}

func (p *pair) fence(v backends.Volume, token int64) {
	p.Helper()
	evidence, err := p.host.Fence(p.Context(), backends.FenceRequest{Ref: v.Ref, Volume: v.ID, Node: "a", Token: token})
	if err != nil {
		p.Fatal(err)
	}
	if !strings.HasPrefix(evidence, "client "+cephPeer+":0/") || !strings.Contains(evidence, " of a is on the blocklist, and no watcher of ") {
		p.Errorf("evidence %q", evidence)
	}
}

// testCutOff: the machine is cut off from a volume that it writes to. Its next write fails, the
// next owner reads all that was acknowledged, and nothing comes after it.
func testCutOff(p *pair) {
	v := p.create()
	att := p.attach(v, 10)
	failed := p.hammer(att.Device)
	p.fence(v, 10)
	taken := p.attachHost(v, 11)
	data := readAt(p.T, taken.Device, 0, records*record)
	select {
	case text := <-failed:
		if !strings.HasSuffix(text, " "+att.Device+": input/output error") {
			p.Errorf("the writer was told %q", text)
		}
	case <-time.After(callLimit):
		p.Fatal("the writer goes on, or hangs")
	}
	last := p.acknowledged()
	p.Logf("%d records were acknowledged", last)
	kept(p.T, data, last)
	_, err := ask[None](p.machine, "Write", Data{att.Device, v.Size / 2, pattern(v)})
	wantSaid(p.T, err, att.Device+": input/output error")
	p.mustDetach(att, v)
	p.detachHost(taken)
	taken = p.attachHost(v, 12)
	if later := readAt(p.T, taken.Device, 0, records*record); !bytes.Equal(data, later) {
		p.Error("something was written after the fence")
	}
	if got := readAt(p.T, taken.Device, v.Size/2, len(pattern(v))); bytes.Equal(got, pattern(v)) {
		p.Error("a write after the fence has reached the cluster")
	}
	p.detachHost(taken)
	_, err = p.tryAttach(v, 10)
	wantSaid(p.T, err, "attach volume: this host was cut off from "+cephtest.Pool+"/", "under ownership token 10, and this one is 10: in use")
	p.nothingLeft(v)
	att = p.attach(v, 13)
	p.write(att.Device, v)
	p.mustDetach(att, v)
	taken = p.attachHost(v, 14)
	inFile(p.T, taken.Device, v)
	p.detachHost(taken)
}

// testPowerCut: the machine ends in the middle of a write. Nobody takes its volume before it
// is cut off, and nothing that was acknowledged is lost.
func testPowerCut(p *pair) {
	v := p.create()
	p.hammer(p.attach(v, 10).Device)
	last := p.acknowledged()
	if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil {
		p.Fatal(err)
	}
	_, err := p.host.Attach(p.Context(), backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: 11})
	if elsewhere, ok := errors.AsType[*backends.AttachedError](err); !ok || elsewhere.Node != "a" {
		p.Errorf("got %v, want that it is attached to a", err)
	}
	p.fence(v, 10)
	taken := p.attachHost(v, 11)
	data := readAt(p.T, taken.Device, 0, records*record)
	// A few more may have been than were heard of, and begun to replace the first.
	first := max(1, last-records/2)
	for n := first; n <= last; n++ {
		at := n % records * record
		if got := data[at : at+record]; !bytes.Equal(got, numbered(n)) && !slices.Equal(got, numbered(n+records)) {
			p.Errorf("record %d of %d is missing", n, last)
		}
	}
	p.detachHost(taken)
}
