//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestPolicy mounts a volume in each situation it can be in, and demands what the
// policy says of it: the text the user reads, and whose writes arrive. Storage that
// can cut a host off is the test storage, of both classes; storage that cannot is
// loopback.
//
// When many hosts fall silent at once is TestPolicyManySilentHosts: that takes more
// than three of them.
func TestPolicy(t *testing.T) {
	plugin, err := rig.TestStorePlugin()
	if err != nil {
		t.Fatal(err)
	}
	p := &policy{cluster: newCluster(t, rig.Config{Hosts: 3, Plugin: plugin}, map[string]string{
		"FLOCKER_BACKEND":        "teststore",
		"FLOCKER_BUSY_WAIT":      busyWait.String(),
		"FLOCKER_LINGER":         "10s",
		"FLOCKER_MOUNT_DEADLINE": mountDeadline.String(),
		"FLOCKER_RECONCILE":      "2s",
	})}
	step := stopwatch(t)
	t.Run("alive", func(t *testing.T) {
		t.Run("owner stuck", func(t *testing.T) {
			t.Parallel() // they mostly wait
			p.testStuck(t)
		})
		t.Run("others", func(t *testing.T) {
			t.Parallel()
			t.Run("quarantined", p.testQuarantined)
			t.Run("free and mounted here", p.testHere)
			t.Run("owner idle", p.testIdle)
			t.Run("owner busy", p.testBusy)
		})
	})
	step("owners that are alive")
	t.Run("storage down", p.testStorageDown)
	step("no storage")
	t.Run("silent", func(t *testing.T) {
		t.Run("owner cut off from etcd", func(t *testing.T) {
			t.Parallel()
			p.testNoEtcd(t, p.Hosts[0], "cut", "teststore-fenced")
		})
		t.Run("owner paused", func(t *testing.T) {
			t.Parallel()
			p.testPaused(t, p.Hosts[1], "paused", "teststore")
		})
	})
	step("owners that are silent and go on")
	t.Run("owner dead", p.testDead)
	step("a dead owner")
	t.Run("owner rebooted", p.testRebooted)
	step("a rebooted owner")
	t.Run("etcd down", p.testEtcdDown)
	step("no etcd")
	p.wantClean(t)
	p.wantIdle(t)
	step("all is clean")
}

// TestPolicyManySilentHosts cuts four of five hosts off from etcd. Their containers go
// on, and nothing is taken over from them, until an operator says that one is dead.
func TestPolicyManySilentHosts(t *testing.T) {
	plugin, err := rig.TestStorePlugin()
	if err != nil {
		t.Fatal(err)
	}
	p := &policy{cluster: newCluster(t, rig.Config{Hosts: 5, Plugin: plugin}, map[string]string{"FLOCKER_BACKEND": "teststore"})}
	owner, last := p.Hosts[0], p.Hosts[4]
	id := p.create(t, owner, "held", "teststore")
	was := startRival(t, owner, "holder", "held")
	for _, h := range p.Hosts[:4] {
		if err := h.Cut(t.Context(), "etcd"); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, last, "4 of 5 hosts were no longer heard from within one minute, which is more likely the fault of etcd or of the network, "+
		"so nothing is taken over from them: check both; if hosts are really off, type for each: docker flocker node confirm-dead HOST",
		volumeRun("", "held", "--rm")...)
	was.wantWriting(t)
	last.Run(t, "flocker", "node", "confirm-dead", owner.Name, "--because", "the test says so")
	is := takesOver(t, last, "heir", "held")
	for _, h := range p.Hosts[:4] {
		if err := h.Heal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	was.wantStopped(t, id)
	is.wantWriting(t)
	wantHistory(t, last, "held", was, is)
	removeRivals(t, was, is)
}

// mountDeadline is more than a takeover takes, and less than a test should.
const mountDeadline = 25 * time.Second

type policy struct {
	*cluster

	mu     sync.Mutex
	faults map[string]teststore.Fault // by reference
}

// create creates a volume, and returns its id.
func (p *policy) create(t *testing.T, h *rig.Host, volume, backend string) string {
	t.Helper()
	args := []string{"volume", "create", "-d", "flocker", "-o", "backend=" + backend}
	if backend == "loopback" {
		// An ext4 would be guarded there, which makes a takeover take 22 s.
		args = append(args, "-o", "fs=xfs", "-o", "size=320M")
	}
	h.Run(t, append(args, volume)...)
	return status(t, h, volume)["id"].(string)
}

// fault makes calls about a volume of the test storage fail; a zero one ends that.
func (p *policy) fault(t *testing.T, id string, f teststore.Fault) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.faults == nil {
		p.faults = map[string]teststore.Fault{}
	}
	f.Ref = "ts-" + id
	p.faults[f.Ref] = f
	if f == (teststore.Fault{Ref: f.Ref}) {
		delete(p.faults, f.Ref)
	}
	var all []teststore.Fault
	for _, f := range p.faults {
		all = append(all, f)
	}
	if _, err := p.store.SetFaults(t.Context(), all, nil); err != nil {
		t.Fatal(err)
	}
}

// A rival is a container that writes lines to its volume, its name and a number
// from 1 on, and says so of each that is durable. A write that fails does not end
// it, nor does being asked to stop.
type rival struct {
	h            *rig.Host
	name, volume string
	wrote        int // how many lines were durable, as far as it was asked
}

const rivalScript = `trap '' TERM
	while :; do
		n=$((n + 1))
		if echo $0 $n | dd of=/data/log oflag=append conv=notrunc,fsync 2>/tmp/said; then
			echo wrote $n
		else
			grep dd: /tmp/said
		fi
		sleep 0.1
	done`

// rivalRun is the docker run of one.
func rivalRun(name, volume string) []string {
	return volumeRun(name, volume, "-d", "busybox", "sh", "-c", rivalScript, name)
}

func startRival(t *testing.T, h *rig.Host, name, volume string) *rival {
	t.Helper()
	h.Run(t, rivalRun(name, volume)...)
	r := &rival{h: h, name: name, volume: volume}
	r.wantWriting(t)
	return r
}

// said is what it has said.
func (r *rival) said(t *testing.T) string {
	t.Helper()
	said := r.h.Run(t, "logs", r.name)
	for line := range strings.Lines(said) {
		_, _ = fmt.Sscanf(line, "wrote %d", &r.wrote)
	}
	return said
}

// wantWriting waits until it has written some more lines.
func (r *rival) wantWriting(t *testing.T) {
	t.Helper()
	r.said(t)
	first := r.wrote
	within(t, 30*time.Second, r.name+" writes", func() error {
		if said := r.said(t); r.wrote < first+3 {
			return fmt.Errorf("it says\n%s", said)
		}
		return nil
	})
}

// wantStopped waits until the former owner has seen that its volume is lost: it was
// killed, if not before its next write failed, and nothing of the volume is left
// there. That nothing it wrote arrived is for wantHistory.
func (r *rival) wantStopped(t *testing.T, id string) {
	t.Helper()
	const killed = "exited 137" // it ignores every other signal
	within(t, 30*time.Second, r.name+" is killed", func() error {
		if got := r.h.Run(t, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", r.name); got != killed {
			return fmt.Errorf("it is %q, want %q", got, killed)
		}
		return nil
	})
	within(t, 30*time.Second, "nothing of "+r.volume+" is mounted on "+r.h.Name, func() error {
		mounts, err := r.h.Exec(t.Context(), "sh", "-c", `cat /proc/[0-9]*/mountinfo 2>/dev/null | grep -F "$0" || true`, id)
		if err == nil && mounts != "" {
			err = fmt.Errorf("mounted:\n%s", mounts)
		}
		return err
	})
	wantLogged(t, r.h, r.volume, "this host no longer owns it; what has it open here is stopped")
	wantLogged(t, r.h, r.volume, "no longer the owner; unmounted and detached")
	if said := r.said(t); !strings.Contains(said, "nput/output error") {
		t.Logf("%s was killed before it wrote again:\n%s", r.name, said)
	}
}

// wantLogged waits until the plugin has logged something about a volume.
func wantLogged(t *testing.T, h *rig.Host, volume, text string) {
	t.Helper()
	within(t, 30*time.Second, h.Name+" logs "+text+" about "+volume, func() error {
		log, err := os.ReadFile(logFile(h))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(log)) {
			of := "volume=" + volume // dockerd puts what it is told in quotes
			if strings.Contains(line, text) && (strings.Contains(line, of+`"`) || strings.HasSuffix(line, of+"\n")) {
				return nil
			}
		}
		return errors.New("there is no such line")
	})
}

// wantState waits until docker volume inspect shows a state on a host.
func wantState(t *testing.T, h *rig.Host, volume, state string) (all map[string]any) {
	t.Helper()
	within(t, 30*time.Second, "volume "+volume+" is "+state+", says "+h.Name, func() error {
		if all = status(t, h, volume); all["state"] != state {
			return fmt.Errorf("status %v", all)
		}
		return nil
	})
	return all
}

// wantHistory demands that the volume, as a host has it, was written by these
// rivals one after the other, without a gap, and has every line that was durable.
func wantHistory(t *testing.T, h *rig.Host, volume string, rivals ...*rival) {
	t.Helper()
	log := sh(t, h, volume, "cat /data/log")
	i, n := 0, 0
	for line := range strings.Lines(log + "\n") {
		want := fmt.Sprintf("%s %d\n", rivals[i].name, n+1)
		if line != want && i+1 < len(rivals) && n >= rivals[i].wrote {
			i, n = i+1, 0
			want = fmt.Sprintf("%s 1\n", rivals[i].name)
		}
		if n++; line != want {
			t.Errorf("volume %s has %q where %q was to be", volume, line, want)
			return
		}
	}
	if i != len(rivals)-1 || n < rivals[i].wrote {
		t.Errorf("volume %s ends with line %d of %s, want line %d of %s", volume, n, rivals[i].name,
			rivals[len(rivals)-1].wrote, rivals[len(rivals)-1].name)
	}
}

// removeRivals removes the rivals, and their volume.
func removeRivals(t *testing.T, rivals ...*rival) {
	t.Helper()
	for _, r := range rivals {
		r.h.Run(t, "rm", "-f", r.name)
	}
	last := rivals[len(rivals)-1]
	last.h.Run(t, "volume", "rm", last.volume)
}

// takesOver starts a rival on another host, and says how long that took.
func takesOver(t *testing.T, h *rig.Host, name, volume string) *rival {
	t.Helper()
	began := time.Now()
	r := startRival(t, h, name, volume)
	t.Logf("volume %s: written to on %s after %s", volume, h.Name, time.Since(began).Round(100*time.Millisecond))
	return r
}

// testHere is a volume that is free, and then mounted on the same host.
func (p *policy) testHere(t *testing.T) {
	one := p.Hosts[0]
	p.create(t, one, "here", "teststore")
	if got := status(t, one, "here"); got["state"] != "free" || got["owner"] != nil {
		t.Errorf("status of what was created: %v, want it free", got)
	}
	r := startRival(t, one, "first", "here")
	began := time.Now()
	if got := sh(t, one, "here", "head -n 1 /data/log"); got != "first 1" {
		t.Errorf("the second container reads %q", got)
	}
	t.Logf("the second container took %s", time.Since(began).Round(100*time.Millisecond))
	if got := status(t, one, "here"); got["state"] != "mounted" || got["owner"] != "host1" {
		t.Errorf("status: %v, want it mounted by host1", got)
	}
	r.wantWriting(t)
	wantHistory(t, one, "here", r)
	removeRivals(t, r)
}

// testIdle is a volume that lingers on another host.
func (p *policy) testIdle(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	p.create(t, one, "idle", "teststore")
	sh(t, one, "idle", "echo kept >/data/note")
	if got := sh(t, two, "idle", "cat /data/note"); got != "kept" {
		t.Errorf("host2 reads %q", got)
	}
	wantLogged(t, one, "idle", "handed over to host host2")
	two.Run(t, "volume", "rm", "idle")
}

// testBusy is a volume that a container on another host uses.
func (p *policy) testBusy(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	p.create(t, one, "busy", "teststore")
	r := startRival(t, one, "web", "busy")
	text := refused(t, two, "volume busy is in use on host host1 by container web; waited ", volumeRun("", "busy", "--rm")...)
	if want := regexp.MustCompile(`waited [5-9]s for it to stop; stop what uses it there and retry`); !want.MatchString(text) {
		t.Errorf("a mount on host2 says %q, want a match of %s", text, want)
	}
	r.wantWriting(t)
	wantHistory(t, one, "busy", r)
	removeRivals(t, r)
}

// testStuck is an owner that wants to let go, and whose storage does not let it.
func (p *policy) testStuck(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	id := p.create(t, one, "slow", "teststore")
	sh(t, one, "slow", "echo kept >/data/note")
	p.fault(t, id, teststore.Fault{Op: teststore.OpDetach, Times: 1, Before: mountDeadline + 5*time.Second})
	began := time.Now()
	refused(t, two, "volume slow is still moving here from host host1; retry", volumeRun("", "slow", "--rm")...)
	if took := time.Since(began); took < mountDeadline {
		t.Errorf("refused after %v, want to be after %v", took, mountDeadline)
	}
	p.fault(t, id, teststore.Fault{Op: teststore.OpDetach, Refuse: true})
	sh(t, one, "slow", "cat /data/note")
	text := refused(t, two, "volume slow is in use on host host1 (detach volume slow: ", volumeRun("", "slow", "--rm")...)
	if want := "does not answer: 503 Service Unavailable"; !strings.Contains(text, want) {
		t.Errorf("a mount on host2 says %q, want something with %q", text, want)
	}
	p.fault(t, id, teststore.Fault{})
	within(t, 30*time.Second, "the volume moves when its storage lets it", func() error {
		got, err := two.Docker(t.Context(), volumeRun("", "slow", "--rm", "busybox", "cat", "/data/note")...)
		if err == nil && got != "kept" {
			t.Fatalf("host2 reads %q", got)
		}
		return err
	})
	two.Run(t, "volume", "rm", "slow")
}

// testQuarantined is a volume on whose storage there is another filesystem.
func (p *policy) testQuarantined(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	id := p.create(t, one, "odd", "teststore")
	sh(t, one, "odd", "echo kept >/data/note")
	p.assertFree(t, 30*time.Second, "odd")
	setUUID := func(uuid string) {
		t.Helper()
		// tune2fs wants it to have been checked.
		out, err := one.Exec(t.Context(), "sh", "-ec", `e2fsck -fp "$0"; tune2fs -U "$1" "$0"`,
			filepath.Join(p.Dir, "switch", "teststore", "ts-"+id, "data"), uuid)
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	other := uuid.NewString()
	setUUID(other)
	want := "not the expected filesystem: found ext4 with UUID " + other + ", expected ext4 with UUID " + id
	for _, h := range []*rig.Host{one, two} {
		text := refused(t, h, "volume odd is quarantined: ", volumeRun("", "odd", "--rm")...)
		for _, want := range []string{want, "; when it is seen to, type: docker flocker volume reinstate odd"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: a mount says %q, want something with %q", h.Name, text, want)
			}
		}
		if got := wantState(t, h, "odd", "quarantined"); !strings.Contains(fmt.Sprint(got["detail"]), want) {
			t.Errorf("%s: status %v, want the detail %q", h.Name, got, want)
		}
	}
	p.assertOwnerless(t, "odd")
	setUUID(id)
	refused(t, two, "volume odd is quarantined: ", volumeRun("", "odd", "--rm")...)
	if got, want := two.Run(t, "flocker", "volume", "reinstate", "odd"), "volume odd is out of quarantine and can be mounted again"; got != want {
		t.Errorf("reinstate says %q, want %q", got, want)
	}
	if got := sh(t, two, "odd", "cat /data/note"); got != "kept" {
		t.Errorf("host2 reads %q", got)
	}
	two.Run(t, "volume", "rm", "odd")
}

// assertOwnerless waits until no host owns the volume, whatever its state.
func (p *policy) assertOwnerless(t *testing.T, volume string) {
	t.Helper()
	within(t, 30*time.Second, "nobody owns volume "+volume, func() error {
		if got := status(t, p.Hosts[2], volume); got["owner"] != nil {
			return fmt.Errorf("status %v", got)
		}
		return nil
	})
}

// testStorageDown is a storage that does not answer.
func (p *policy) testStorageDown(t *testing.T) {
	one, two := p.Hosts[0], p.Hosts[1]
	p.create(t, one, "wanted", "teststore")
	p.create(t, one, "used", "teststore")
	r := startRival(t, one, "user", "used")
	if err := p.store.KillServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	text := refused(t, two, "attach volume wanted: ", volumeRun("", "wanted", "--rm")...)
	if want := "does not answer"; !strings.Contains(text, want) {
		t.Errorf("a mount says %q, want something with %q", text, want)
	}
	r.wantWriting(t)
	if err := p.store.StartServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	sh(t, two, "wanted", "true")
	r.wantWriting(t)
	wantHistory(t, one, "used", r)
	removeRivals(t, r)
	two.Run(t, "volume", "rm", "wanted")
}

// testNoEtcd is an owner that goes on, and cannot reach etcd.
func (p *policy) testNoEtcd(t *testing.T, owner *rig.Host, volume, backend string) {
	taker := p.Hosts[2]
	id := p.create(t, owner, volume, backend)
	was := startRival(t, owner, "islander", volume)
	if err := owner.Cut(t.Context(), "etcd"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = owner.Heal(t.Context()) }() // the next tests need it, whatever fails here
	was.wantWriting(t)
	is := takesOver(t, taker, "mainlander", volume)
	wantLogged(t, taker, volume, "taken over from host "+owner.Name)
	within(t, 30*time.Second, "the former owner's writes fail", func() error {
		if said := was.said(t); !strings.Contains(said, "nput/output error") {
			return fmt.Errorf("it says\n%s", said)
		}
		return nil
	})
	is.wantWriting(t)
	if err := owner.Heal(t.Context()); err != nil {
		t.Fatal(err)
	}
	was.wantStopped(t, id)
	if got := wantState(t, owner, volume, "owned"); got["owner"] != taker.Name {
		t.Errorf("status: %v, want it owned by %s", got, taker.Name)
	}
	is.wantWriting(t)
	wantHistory(t, taker, volume, was, is)
	removeRivals(t, was, is)
}

// testPaused is an owner that does nothing for a while, and then goes on where it
// was.
func (p *policy) testPaused(t *testing.T, owner *rig.Host, volume, backend string) {
	taker := p.Hosts[2]
	id := p.create(t, owner, volume, backend)
	was := startRival(t, owner, "sleeper", volume)
	if err := owner.Pause(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = owner.Resume() }() // the next tests need it, whatever fails here
	is := takesOver(t, taker, "waker", volume)
	wantLogged(t, taker, volume, "taken over from host "+owner.Name)
	if err := owner.Resume(); err != nil {
		t.Fatal(err)
	}
	is.wantWriting(t)
	was.wantStopped(t, id)
	is.wantWriting(t)
	wantHistory(t, taker, volume, was, is)
	removeRivals(t, was, is)
}

// testDead is an owner whose power is cut.
func (p *policy) testDead(t *testing.T) {
	ctx := t.Context()
	one, two, three := p.Hosts[0], p.Hosts[1], p.Hosts[2]
	p.create(t, one, "exclusive", "teststore")
	p.create(t, one, "fenced", "teststore-fenced")
	p.create(t, one, "shared", "loopback")
	unsure := p.create(t, one, "unsure", "teststore")
	p.fault(t, unsure, teststore.Fault{Op: teststore.OpFence, Refuse: true})
	rivals := map[string]*rival{}
	for _, volume := range []string{"exclusive", "fenced", "shared", "unsure"} {
		rivals[volume] = startRival(t, one, "old-"+volume, volume)
	}
	refused(t, two, "host host1 answers (its lease in etcd is valid), so it is not dead", "flocker", "node", "confirm-dead", "host1")
	for _, r := range rivals {
		r.wantWriting(t)
	}
	if err := one.Kill(ctx); err != nil {
		t.Fatal(err)
	}

	// Storage that can cut it off.
	began := time.Now()
	takers := map[string]*rig.Host{"exclusive": two, "fenced": three}
	errs := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for volume, h := range takers {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			_, err := h.Docker(ctx, rivalRun("new-"+volume, volume)...)
			t.Logf("volume %s is taken over %s after the power cut", volume, time.Since(began).Round(100*time.Millisecond))
			mu.Lock()
			defer mu.Unlock()
			errs[volume] = err
		})
	}
	wg.Wait()
	for volume, h := range takers {
		if errs[volume] != nil {
			t.Fatal(errs[volume])
		}
		is := &rival{h: h, name: "new-" + volume, volume: volume}
		is.wantWriting(t)
		wantLogged(t, h, volume, "taken over from host host1")
		wantHistory(t, h, volume, rivals[volume], is)
		removeRivals(t, is)
	}

	t.Run("cannot be fenced", func(t *testing.T) {
		text := refused(t, two, "volume shared is owned by host host1, which has not been heard from for ", volumeRun("", "shared", "--rm")...)
		if want := "s; loopback cannot cut it off, so nothing was changed: make sure host host1 is switched off, " +
			"then type: docker flocker node confirm-dead host1"; !strings.Contains(text, want) {
			t.Errorf("a mount says %q, want something with %q", text, want)
		}
		wantState(t, two, "shared", "owner not responding")
	})
	t.Run("fence fails", func(t *testing.T) {
		const want = "volume unsure: host host1, which owned it, could not be cut off from it: "
		text := refused(t, two, want, volumeRun("", "unsure", "--rm")...)
		if end := "; it is tried again"; !strings.Contains(text, "503 Service Unavailable") || !strings.Contains(text, end) {
			t.Errorf("a mount says %q, want something with the storage's error and %q", text, end)
		}
		for _, h := range []*rig.Host{two, three} {
			got := wantState(t, h, "unsure", "being taken over")
			if got["owner"] != "host2" || !strings.Contains(fmt.Sprint(got["detail"]), "host host1") {
				t.Errorf("status on %s: %v, want it owned by host2, from host1", h.Name, got)
			}
		}
		p.fault(t, unsure, teststore.Fault{})
		wantLogged(t, two, "unsure", "taken over from host host1")
		wantHistory(t, three, "unsure", rivals["unsure"])
		three.Run(t, "volume", "rm", "unsure")
	})
	t.Run("confirmed", func(t *testing.T) {
		two.Run(t, "flocker", "node", "confirm-dead", "host1", "--because", "the test has switched it off")
		wantHistory(t, two, "shared", rivals["shared"])
		wantLogged(t, two, "shared", "an operator declared host host1 dead")
		two.Run(t, "volume", "rm", "shared")
	})

	if err := one.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	for _, r := range rivals {
		one.Run(t, "rm", "-f", r.name)
	}
}

// testRebooted is an owner that was switched off and on again: what it had is its
// own still, if nobody has taken it meanwhile.
func (p *policy) testRebooted(t *testing.T) {
	h := p.Hosts[1]
	var rivals []*rival
	for _, backend := range []string{"teststore", "loopback"} {
		p.create(t, h, "back-"+backend, backend)
		rivals = append(rivals, startRival(t, h, "before-"+backend, "back-"+backend))
	}
	for _, r := range rivals {
		r.wantWriting(t)
	}
	if err := h.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, was := range rivals {
		is := takesOver(t, h, "after-"+was.volume, was.volume)
		wantHistory(t, h, was.volume, was, is)
		removeRivals(t, was, is)
	}
}

// testEtcdDown is an etcd without its majority.
func (p *policy) testEtcdDown(t *testing.T) {
	ctx := t.Context()
	one, two := p.Hosts[0], p.Hosts[1]
	p.create(t, one, "written", "teststore")
	p.create(t, one, "unused", "teststore")
	r := startRival(t, one, "clerk", "written")
	for _, member := range []int{1, 2} {
		if err := p.KillEtcd(ctx, member); err != nil {
			t.Fatal(err)
		}
	}
	if got := sh(t, one, "written", "head -n 1 /data/log"); got != "clerk 1" {
		t.Errorf("a second container reads %q", got)
	}
	wanted := []string{"unused", "written", "unused"} // by host
	for i, err := range p.each(t, func(i int) []string { return volumeRun("", wanted[i], "--rm") }) {
		want := "volume " + wanted[i] + ": ownership cannot be checked"
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a mount on host%d: %v, want something with %q", i+1, err, want)
		} else if want := "what is mounted keeps working, retry when etcd answers"; !strings.Contains(err.Error(), want) {
			t.Errorf("a mount on host%d: %v, want something with %q", i+1, err, want)
		}
	}
	r.wantWriting(t)
	for _, member := range []int{1, 2} {
		if err := p.StartEtcd(ctx, member); err != nil {
			t.Fatal(err)
		}
	}
	within(t, 30*time.Second, "a new mount works", func() error {
		_, err := two.Docker(ctx, volumeRun("", "unused", "--rm", "busybox", "true")...)
		return err
	})
	r.wantWriting(t)
	wantHistory(t, one, "written", r)
	removeRivals(t, r)
	two.Run(t, "volume", "rm", "unused")
}
