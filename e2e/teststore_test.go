//go:build e2e

package e2e_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// TestTestStore proves what the tests of takeovers stand on: a storage that cuts a
// host off for real, whatever that host and its network do.
func TestTestStore(t *testing.T) {
	r := rig.New(t, rig.Config{Hosts: 2})
	if err := r.ImportImage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Etcd(t.Context()); err != nil {
		t.Fatal(err)
	}
	store, err := r.TestStore(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := storeTest{store, r.Hosts[0], r.Hosts[1]}
	for name, fenced := range map[string]bool{"exclusive": false, "fenced": true} {
		t.Run("fence "+name, func(t *testing.T) { s.testFence(t, fenced) })
	}
	t.Run("cut", s.testCut)
	t.Run("hang", s.testHang)
	t.Run("crashes", s.testCrashes)
	t.Run("power cut", s.testPowerCut)
	// Last, because the rig is closed with I/O under way.
	t.Run("close", func(t *testing.T) { s.testClose(t, r) })
}

type storeTest struct {
	*rig.TestStore
	a, b *rig.Host
}

// storeVolume is a volume of the test storage that a container writes to.
type storeVolume struct {
	backends.Volume
	t      *testing.T
	fenced bool
	token  int64
}

func (s storeTest) create(t *testing.T, fenced bool) *storeVolume {
	t.Helper()
	req := backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: uuid.NewString(), Size: 64 << 20}
	vol, err := s.a.StoreBackend(fenced).Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return &storeVolume{Volume: vol, t: t, fenced: fenced}
}

// attach attaches the volume on a host, under a token of its own, and mounts it.
func (v *storeVolume) attach(h *rig.Host) backends.Attachment {
	v.t.Helper()
	v.token++
	att, err := h.StoreBackend(v.fenced).Attach(v.t.Context(), backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: v.token})
	if err != nil {
		v.t.Fatal(err)
	}
	v.mount(h, att)
	return att
}

func (v *storeVolume) mount(h *rig.Host, att backends.Attachment) {
	v.t.Helper()
	format := ""
	if v.token == 1 {
		format = "blkid -p $0 || mkfs.ext4 -q $0; "
	}
	v.exec(h, format+"mkdir -p $1 && mount $0 $1", att.Device, v.dir())
}

func (v *storeVolume) dir() string { return "/run/volumes/" + v.ID }

func (v *storeVolume) exec(h *rig.Host, script string, args ...string) {
	v.t.Helper()
	if out, err := h.Exec(v.t.Context(), append([]string{"sh", "-ec", script}, args...)...); err != nil {
		v.t.Fatalf("%v %s", err, out)
	}
}

// unmount ends what uses the volume and detaches it.
func (v *storeVolume) detach(h *rig.Host, att backends.Attachment) {
	v.t.Helper()
	v.exec(h, "umount "+v.dir())
	if err := h.StoreBackend(v.fenced).Detach(v.t.Context(), att); err != nil {
		v.t.Fatal(err)
	}
}

func (v *storeVolume) fence(h *rig.Host) string {
	v.t.Helper()
	// Any host can do it.
	evidence, err := h.StoreBackend(v.fenced).Fence(v.t.Context(), backends.FenceRequest{
		Ref: v.Ref, Volume: v.ID, Identity: h.Initiator(), Node: h.Name, Token: v.token,
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return evidence
}

// storeWriter is a container that writes numbers to a volume, and prints each when
// it is durable.
type storeWriter struct {
	t *testing.T
	h *rig.Host
	v *storeVolume
}

func (v *storeVolume) write(h *rig.Host) storeWriter {
	v.t.Helper()
	const script = `>>log; n=$(wc -l <log)
		while echo $n | dd of=log oflag=append conv=notrunc,fsync status=none; do echo $n; n=$((n + 1)); done`
	h.Run(v.t, "run", "-d", "--name", v.ID, "-v", v.dir()+":/data", "-w", "/data", "busybox", "sh", "-c", script)
	return storeWriter{v.t, h, v}
}

// durable returns how many numbers were said to be durable.
func (w storeWriter) durable() int {
	w.t.Helper()
	out, err := w.h.Docker(w.t.Context(), "logs", "--tail", "3", w.v.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(out) {
		if _, err := fmt.Sscan(line, &n); err == nil {
			n++
		}
	}
	return n
}

// more waits until it has written more.
func (w storeWriter) more() {
	w.t.Helper()
	before := w.durable()
	eventually(w.t, "the container on "+w.h.Name+" writes on", func() bool { return w.durable() > before+3 })
}

// ended waits until the writer has been told that it cannot write any more, and
// returns how much was durable then.
func (w storeWriter) ended() int {
	w.t.Helper()
	began := time.Now()
	eventually(w.t, "the container's writes fail", func() bool {
		return w.h.Run(w.t, "inspect", "--format", "{{.State.Running}}", w.v.ID) == "false"
	})
	w.t.Logf("the writer failed %s later", time.Since(began).Round(10*time.Millisecond))
	said, err := w.h.Command(w.t.Context(), "docker", "logs", "--tail", "3", w.v.ID).CombinedOutput()
	if err != nil {
		w.t.Fatal(err)
	}
	if !strings.Contains(string(said), "nput/output error") && !strings.Contains(string(said), "Read-only") {
		w.t.Errorf("the writer says %q, want an I/O error", said)
	}
	return w.durable()
}

func (w storeWriter) remove() {
	w.t.Helper()
	w.h.Run(w.t, "rm", "-f", w.v.ID)
}

// wantWritten demands that the volume, mounted on a host, has everything that was
// durable: all numbers and none twice.
func (v *storeVolume) wantWritten(h *rig.Host, durable int) {
	v.t.Helper()
	v.exec(h, `i=0; while read n; do [ "$n" = $i ] || { echo "$n follows $((i - 1))"; exit 1; }; i=$((i + 1)); done <$1/log
		[ $i -ge $0 ] || { echo "$i numbers are there, $0 were durable"; exit 1; }`, fmt.Sprint(durable), v.dir())
	if durable == 0 {
		v.t.Error("nothing was written: nothing is proven")
	}
}

// wantDetachable demands that a host that was cut off gets rid of the device.
func (v *storeVolume) wantDetachable(h *rig.Host, att backends.Attachment) {
	v.t.Helper()
	backend := h.StoreBackend(v.fenced)
	if err := backend.Detach(v.t.Context(), att); !errors.Is(err, backends.ErrInUse) {
		v.t.Errorf("detach while mounted: got %v, want ErrInUse", err)
	}
	v.detach(h, att)
	if atts, err := backend.Attachments(v.t.Context()); err != nil || len(atts) > 0 {
		v.t.Errorf("attached on %s: %+v, %v; want nothing", h.Name, atts, err)
	}
}

func (v *storeVolume) remove(h *rig.Host) {
	v.t.Helper()
	if err := h.StoreBackend(v.fenced).Delete(v.t.Context(), v.Ref); err != nil {
		v.t.Error(err)
	}
}

func (s storeTest) testFence(t *testing.T, fenced bool) {
	v := s.create(t, fenced)
	att := v.attach(s.a)
	w := v.write(s.a)
	w.more()
	t.Log(v.fence(s.a))
	durable := w.ended()
	taken := v.attach(s.b)
	v.wantWritten(s.b, durable)
	w2 := v.write(s.b)
	w2.more()
	w.remove()
	v.wantDetachable(s.a, att)
	w2.more()
	w2.h.Run(t, "stop", "-t", "0", v.ID)
	v.wantWritten(s.b, w2.durable())
	w2.remove()
	v.detach(s.b, taken)
	v.remove(s.b)
}

// reaches says whether a host gets an answer from etcd or the storage.
func reaches(t *testing.T, h *rig.Host, url string) bool {
	_, err := h.Exec(t.Context(), "busybox", "timeout", "2", "busybox", "wget", "-q", "-O", "-", "--post-data", "{}", url)
	return err == nil
}

const (
	etcdAPI    = "http://198.18.0.11:2379/v3/maintenance/status"
	storageAPI = "http://198.18.0.21:8200/" + teststore.OpList
)

// testCut is a host that the server cannot tell that it is cut off.
func (s storeTest) testCut(t *testing.T) {
	wantReach := func(etcd, storage bool) {
		t.Helper()
		if e, st := reaches(t, s.a, etcdAPI), reaches(t, s.a, storageAPI); e != etcd || st != storage {
			t.Errorf("the host reaches etcd: %t, storage: %t; want %t, %t", e, st, etcd, storage)
		}
		if !reaches(t, s.b, etcdAPI) || !reaches(t, s.b, storageAPI) {
			t.Error("the other host does not reach both")
		}
	}
	cut := func(from string) {
		t.Helper()
		if err := s.a.Cut(t.Context(), from); err != nil {
			t.Fatal(err)
		}
	}
	heal := func() {
		t.Helper()
		if err := s.a.Heal(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantReach(true, true)
	}
	v := s.create(t, true)
	att := v.attach(s.a)
	w := v.write(s.a)
	w.more()
	wantReach(true, true)
	cut("etcd")
	wantReach(false, true)
	w.more()
	heal()

	cut("storage")
	wantReach(true, false)
	before := w.durable()
	time.Sleep(time.Second)
	if now := w.durable(); now > before+1 {
		t.Errorf("%d numbers became durable while the storage was cut off", now-before)
	}
	heal()
	w.more()

	cut("storage")
	cut("etcd")
	wantReach(false, false)
	v.fence(s.a)
	taken := v.attach(s.b)
	w2 := v.write(s.b)
	w2.more()
	heal()
	v.wantWritten(s.b, w.ended())
	w.remove()
	v.wantDetachable(s.a, att)
	w2.more()
	w2.h.Run(t, "stop", "-t", "0", v.ID)
	v.wantWritten(s.b, w2.durable())
	w2.remove()
	v.detach(s.b, taken)
	v.remove(s.b)
	if err := s.a.Cut(t.Context(), "sleep"); err == nil {
		t.Error("a host was cut from sleep")
	}
}

// testHang is a data server that does not answer any more.
func (s storeTest) testHang(t *testing.T) {
	v := s.create(t, false)
	att := v.attach(s.a)
	w := v.write(s.a)
	w.more()
	fault := func(data ...teststore.DataFault) {
		t.Helper()
		if _, err := s.SetFaults(t.Context(), nil, data); err != nil {
			t.Fatal(err)
		}
	}
	fault(teststore.DataFault{Slow: 50 * time.Millisecond})
	w.more()
	fault(teststore.DataFault{Ref: v.Ref, Hang: true})
	before := w.durable()
	time.Sleep(time.Second)
	if now := w.durable(); now > before+1 {
		t.Errorf("%d numbers became durable while the data server hung", now-before)
	}
	fault()
	w.more()
	fault(teststore.DataFault{Hang: true})
	v.fence(s.a)
	fault()
	durable := w.ended()
	w.remove()
	v.wantDetachable(s.a, att)
	taken := v.attach(s.b)
	v.wantWritten(s.b, durable)
	v.detach(s.b, taken)
	v.remove(s.b)
}

// testCrashes kills what the data does not need.
func (s storeTest) testCrashes(t *testing.T) {
	v := s.create(t, false)
	att := v.attach(s.a)
	w := v.write(s.a)
	w.more()
	if err := errors.Join(s.a.KillInitiator(t.Context()), s.KillServer(t.Context())); err != nil {
		t.Fatal(err)
	}
	w.more()
	if _, err := s.b.StoreBackend(false).Fence(t.Context(), backends.FenceRequest{Ref: v.Ref, Volume: v.ID, Identity: s.a.Initiator(), Token: 1}); !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("fence without the server: got %v, want ErrUnavailable", err)
	}
	w.more()
	if err := errors.Join(s.StartServer(t.Context()), s.a.StartInitiator(t.Context())); err != nil {
		t.Fatal(err)
	}
	atts, err := s.a.StoreBackend(false).Attachments(t.Context())
	if err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("attached: %+v, %v; want %+v", atts, err, att)
	}
	w.more()
	// The new server knows the data server that the old one has started.
	v.fence(s.a)
	durable := w.ended()
	w.remove()
	v.wantDetachable(s.a, att)
	taken := v.attach(s.b)
	v.wantWritten(s.b, durable)
	v.detach(s.b, taken)
	v.remove(s.b)
}

// testPowerCut switches a host off under a container that writes.
func (s storeTest) testPowerCut(t *testing.T) {
	v := s.create(t, false)
	v.attach(s.a)
	w := v.write(s.a)
	w.more()
	durable := w.durable()
	if err := s.a.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNoDevices(t, s.a.Initiator())
	if err := s.a.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The storage knows nothing of it: what the host was granted it has again.
	atts, err := s.a.StoreBackend(false).Attachments(t.Context())
	if err != nil || len(atts) != 1 || atts[0].Token != v.token {
		t.Fatalf("attached: %+v, %v; want what it was", atts, err)
	}
	w.remove()
	v.mount(s.a, atts[0])
	v.wantWritten(s.a, durable)
	v.detach(s.a, atts[0])
	v.remove(s.a)
}

// wantNoDevices demands that an initiator has no loop devices.
func wantNoDevices(t *testing.T, initiator string) {
	t.Helper()
	if found := storeDevices(t, initiator); len(found) > 0 {
		t.Errorf("%s still has %s", initiator, found)
	}
}

func storeDevices(t *testing.T, initiator string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && strings.Contains(string(data), teststore.FilePrefix(initiator)) {
			found = append(found, strings.Split(file, "/")[3])
		}
	}
	return found
}

// testClose closes the rig while writes wait for a data server that does not answer.
func (s storeTest) testClose(t *testing.T, r *rig.Rig) {
	v := s.create(t, false)
	v.attach(s.a)
	w := v.write(s.a)
	w.more()
	if _, err := s.SetFaults(t.Context(), nil, []teststore.DataFault{{Hang: true}}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	began := time.Now()
	if err := r.Close(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("closed after %s", time.Since(began).Round(10*time.Millisecond))
	wantNoDevices(t, s.a.Initiator())
	if left := storeProcesses(t, r.Dir); len(left) > 0 {
		t.Errorf("still there: %q", left)
	}
}

// storeProcesses returns the processes that have a rig's directory, or its name, in
// their arguments.
func storeProcesses(t *testing.T, dir string) (found []string) {
	t.Helper()
	for _, process := range machineState(t) {
		if strings.HasPrefix(process, "process ") && strings.Contains(process, dir) {
			found = append(found, process)
		}
	}
	return found
}

// TestTestStoreKilled kills a process that runs a rig while a container writes to
// the test storage.
func TestTestStoreKilled(t *testing.T) {
	if os.Getenv("RIG_CHILD") != "" {
		r := rig.New(t, rig.Config{Logf: func(string, ...any) {}})
		store, err := r.TestStore(t.Context())
		if err = errors.Join(err, r.ImportImage(t.Context())); err != nil {
			t.Fatal(err)
		}
		v := storeTest{TestStore: store, a: r.Hosts[0]}.create(t, false)
		v.attach(r.Hosts[0])
		v.write(r.Hosts[0]).more()
		fmt.Println(r.Dir)
		time.Sleep(time.Minute)
		return
	}
	rig.Require(t, "root", "docker")
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTestStoreKilled$")
	child.Env = append(os.Environ(), "RIG_CHILD=1")
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	dir, err := bufio.NewReader(out).ReadString('\n')
	dir = strings.TrimSpace(dir)
	initiator := filepath.Base(dir) + "/host1"
	if len(storeDevices(t, initiator)) != 1 || len(storeProcesses(t, dir)) == 0 {
		t.Errorf("the child says %q, %v; no device or no process of it is seen", dir, err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	eventually(t, "the rig's processes end with the one that started it", func() bool {
		return len(storeProcesses(t, dir)) == 0
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := rig.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	wantNoDevices(t, initiator)
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the rig's directory %s is still there", dir)
	}
}

// TestTestStorePlugin uses the test storage through the plugin, as the tests of
// takeovers do.
func TestTestStorePlugin(t *testing.T) {
	dir, err := rig.TestStorePlugin()
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, rig.Config{Hosts: 2, Plugin: dir}, map[string]string{"FLOCKER_BACKEND": "teststore", "FLOCKER_LINGER": "1s"})
	store, a, b := c.store, c.Hosts[0], c.Hosts[1]
	for _, backend := range []string{"teststore", "teststore-fenced"} {
		t.Run(backend, func(t *testing.T) {
			a.Run(t, "volume", "create", "-d", "flocker", "-o", "backend="+backend, backend)
			sh(t, a, backend, "echo one >/data/file")
			if got := sh(t, b, backend, "cat /data/file"); got != "one" {
				t.Errorf("the other host reads %q, want %q", got, "one")
			}
			// The disk is not the plugin's.
			b.Run(t, "run", "-d", "--name", backend, "--mount", on(backend), "busybox", "sleep", "1000")
			if err := errors.Join(b.KillPlugin(t.Context()), b.KillInitiator(t.Context()), store.KillServer(t.Context())); err != nil {
				t.Fatal(err)
			}
			b.Run(t, "exec", backend, "sh", "-c", "echo two >/data/file; sync")
			if err := errors.Join(store.StartServer(t.Context()), b.StartInitiator(t.Context())); err != nil {
				t.Fatal(err)
			}
			b.Run(t, "exec", backend, "sh", "-c", "echo three >>/data/file; sync")
			b.Run(t, "rm", "-f", backend)
			if got := sh(t, a, backend, "cat /data/file"); got != "two\nthree" {
				t.Errorf("the first host reads %q, want %q", got, "two\nthree")
			}
			a.Run(t, "volume", "rm", backend)
		})
	}
	c.wantClean(t)
	eventually(t, "the server has neither volumes nor grants", func() bool {
		vols, err := store.Server().Call(t.Context(), teststore.OpList, teststore.Request{})
		grants, err2 := store.Server().Call(t.Context(), teststore.OpGrants, teststore.Request{})
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		return len(vols.Volumes) == 0 && len(grants.Grants) == 0
	})
}
