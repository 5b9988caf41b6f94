package cephtest_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/rbd"
	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

const record = 4096

// writeUntil writes numbered records, each synced before it counts, until one fails, and
// sends how many were acknowledged.
func writeUntil(device string, round uint64, acknowledged chan<- int, failed chan<- error) {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		failed <- err
		return
	}
	defer f.Close()
	for n := 1; ; n++ {
		buf := make([]byte, record)
		binary.LittleEndian.PutUint64(buf, round<<32|uint64(n))
		if _, err = f.WriteAt(buf, int64(n%8192)*record); err == nil {
			err = f.Sync()
		}
		if err != nil {
			failed <- err
			return
		}
		acknowledged <- n
	}
}

func readRecord(t *testing.T, device string, n int) uint64 {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 8)
	if _, err := f.ReadAt(buf, int64(n%8192)*record); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(buf)
}

// TestFencedWriter cuts a host off that writes without pause: its next write fails, all
// that was acknowledged is there for the next owner, and nothing comes after it.
func TestFencedWriter(t *testing.T) {
	w := newWorld(t)
	for round := range uint64(3) {
		token := int64(10 + 10*round)
		att := w.attach(w.a, token)
		acknowledged, failed := make(chan int, 1<<20), make(chan error, 1)
		go writeUntil(att.Device, round, acknowledged, failed)
		for range 20 {
			<-acknowledged
		}
		evidence := w.fence(w.b, "a", token)
		if !strings.Contains(evidence, "is on the blocklist, and no watcher of") {
			t.Errorf("evidence %q", evidence)
		}
		cut := time.Now()
		taken := w.attach(w.b, token+1)
		select {
		case err := <-failed:
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("the cut writer got %v, want an I/O error", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("the cut writer goes on, or hangs")
		}
		close(acknowledged)
		last := 20
		for n := range acknowledged {
			last = n
		}
		t.Logf("the last write that was acknowledged is number %d; the taker had the volume %s after the fence", last, time.Since(cut))
		for n := max(1, last-100); n <= last; n++ {
			if got := readRecord(t, taken.Device, n); got != round<<32|uint64(n) {
				t.Errorf("record %d of %d: got %d", n, last, got)
			}
		}
		if err := w.a.Detach(t.Context(), att); err != nil {
			t.Error(err)
		}
		for n := last + 2; n < last+20; n++ {
			if got := readRecord(t, taken.Device, n); got == round<<32|uint64(n) {
				t.Errorf("record %d is there, and %d was the last", n, last)
			}
		}
		if err := w.b.Detach(t.Context(), taken); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBlocklistOutlivesAnHour: Ceph's own hour is not enough for a host that is paused.
func TestBlocklistOutlivesAnHour(t *testing.T) {
	w := newWorld(t)
	att := w.attach(w.a, 10)
	evidence := w.fence(w.b, "a", 10)
	address := strings.Fields(evidence)[1]
	list, err := w.ceph.Run(t.Context(), "ceph", "osd", "blocklist", "ls")
	if err != nil {
		t.Fatal(err)
	}
	if want := address + " " + strconv.Itoa(time.Now().Year()+4); !strings.Contains(list, want) && !strings.Contains(list, address+" "+strconv.Itoa(time.Now().Year()+5)) {
		t.Errorf("the blocklist is\n%s, want %s", list, want)
	}
	if err := w.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// TestBlocklistedBefore: somebody has put the client on the blocklist for Ceph's own hour.
// Ceph does not make that longer, so the host is not cut off for good yet.
func TestBlocklistedBefore(t *testing.T) {
	w := newWorld(t)
	att := w.attach(w.a, 10)
	var status struct {
		Watchers []struct {
			Address string `json:"address"`
		} `json:"watchers"`
	}
	out, err := w.ceph.Run(t.Context(), "rbd", "status", "volumes/flocker-"+w.vol.ID, "--format", "json")
	if err := errors.Join(err, json.Unmarshal([]byte(out), &status)); err != nil || len(status.Watchers) != 1 {
		t.Fatalf("%q: %v", out, err)
	}
	address := status.Watchers[0].Address
	if _, err := w.ceph.Run(t.Context(), "ceph", "osd", "blocklist", "add", address); err != nil {
		t.Fatal(err)
	}
	_, err = w.b.Fence(t.Context(), backends.FenceRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Node: "a", Token: 10})
	wantError(t, err, backends.ErrUnavailable, "ceph osd blocklist rm "+address)
	_, err = w.b.Attach(t.Context(), backends.AttachRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Token: 11})
	wantError(t, err, backends.ErrInUse, "is attached to a")
	if _, err := w.ceph.Run(t.Context(), "ceph", "osd", "blocklist", "rm", address); err != nil {
		t.Fatal(err)
	}
	if evidence := w.fence(w.b, "a", 10); !strings.Contains(evidence, address) {
		t.Errorf("evidence %q, want it to name %s", evidence, address)
	}
	if err := w.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// daemons are the processes of qemu-storage-daemon of one attachment.
func daemons(t *testing.T, id string) []int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(line), "/"+id+"%2C") && strings.HasPrefix(string(line), "qemu-storage-daemon") {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			found = append(found, pid)
		}
	}
	return found
}

// TestDaemonDies: what serves a device is killed, in either way. The device is still
// known, can be detached, and the volume attached anew, here and elsewhere.
func TestDaemonDies(t *testing.T) {
	w := newWorld(t)
	for i, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			token := int64(10 + 10*i)
			att := w.attach(w.a, token)
			pids := daemons(t, att.ID)
			if len(pids) != 1 {
				t.Fatalf("daemons %d", pids)
			}
			if err := syscall.Kill(pids[0], signal); err != nil {
				t.Fatal(err)
			}
			for len(daemons(t, att.ID)) > 0 {
				time.Sleep(10 * time.Millisecond)
			}
			atts, err := w.a.Attachments(t.Context())
			if err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
				t.Errorf("got %+v, %v; want %+v", atts, err, att)
			}
			f, err := os.OpenFile(att.Device, os.O_RDWR, 0)
			if err == nil {
				if _, err = f.WriteAt(make([]byte, 4096), 0); err == nil {
					err = f.Sync()
				}
				_ = f.Close()
			}
			if err == nil {
				t.Error("a write without the daemon has succeeded")
			}
			if err := w.a.Detach(t.Context(), att); err != nil {
				t.Error(err)
			}
			again := w.attach(w.a, token+1)
			if err := w.a.Detach(t.Context(), again); err != nil {
				t.Error(err)
			}
			other := w.attach(w.b, token+2)
			if err := w.b.Detach(t.Context(), other); err != nil {
				t.Error(err)
			}
		})
	}
}

// child is a process of the plugin: it attaches a volume, and lives until it is killed.
func child() int {
	var order struct {
		Cluster *cephtest.Cluster
		Self    rbd.Self
		Request backends.AttachRequest
	}
	if err := json.Unmarshal([]byte(os.Getenv("FLOCKER_CEPH_CHILD")), &order); err != nil {
		fmt.Println(err)
		return 1
	}
	b, err := rbd.New(config(order.Cluster), order.Self)
	if err == nil {
		var att backends.Attachment
		if att, err = b.Attach(context.Background(), order.Request); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(att)
		}
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	time.Sleep(time.Minute)
	return 0
}

// plugin starts a process of host a that attaches the volume.
func (w *world) plugin(token int64, env ...string) (*exec.Cmd, io.Reader) {
	w.Helper()
	order, err := json.Marshal(map[string]any{
		"Cluster": w.ceph, "Self": rbd.Self{Node: "a", Cluster: w.cluster},
		"Request": backends.AttachRequest{Ref: w.vol.Ref, Volume: w.vol.ID, Token: token},
	})
	if err != nil {
		w.Fatal(err)
	}
	cmd := exec.CommandContext(w.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), append(env, "FLOCKER_CEPH_CHILD="+string(order))...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		w.Fatal(err)
	}
	return cmd, out
}

// TestPluginIsKilledInAttach: the process is killed in the middle of an Attach, and its client
// of Ceph goes on. It is seen, and is in nobody's way.
func TestPluginIsKilledInAttach(t *testing.T) {
	rados, err := exec.LookPath("rados")
	if err != nil {
		t.Fatal(err)
	}
	for name, script := range map[string]string{
		"before the claim": "kill -9 $PPID",
		"after the claim":  rados + ` "$@"; kill -9 $PPID`,
	} {
		for _, deleted := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, deleted: %t", name, deleted), func(t *testing.T) {
				w := newWorld(t)
				dir := t.TempDir()
				text := "#!/bin/sh\ncase \"$*\" in *'lock get'*) " + script + ";; *) exec " + rados + " \"$@\";; esac\n"
				if err := os.WriteFile(filepath.Join(dir, "rados"), []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
				cmd, out := w.plugin(10, "PATH="+dir+":"+os.Getenv("PATH"))
				printed, _ := io.ReadAll(out) // until it is killed
				if err := cmd.Wait(); err == nil || len(printed) > 0 {
					t.Fatalf("it was not killed: %s", printed)
				}
				atts, err := w.a.Attachments(t.Context())
				if err != nil || len(atts) != 1 || atts[0].Device != "" || atts[0].Token != 10 || len(daemons(t, atts[0].ID)) != 1 {
					t.Fatalf("got %+v, %v; want one without a device, and its daemon", atts, err)
				}
				if deleted {
					ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // the driver's
					defer cancel()
					if err := w.a.Delete(ctx, w.vol.Ref); err != nil {
						t.Error(err)
					}
				} else {
					if err := w.a.Detach(t.Context(), atts[0]); err != nil {
						t.Error(err)
					}
					att := w.attach(w.b, 11)
					if err := w.b.Detach(t.Context(), att); err != nil {
						t.Error(err)
					}
				}
				if pids := daemons(t, atts[0].ID); len(pids) > 0 {
					t.Errorf("daemons %d are left", pids)
				}
			})
		}
	}
}

// TestPluginIsKilled: the process that has attached a volume is killed, with its process
// group. The device goes on, another process finds it, and detaches it.
func TestPluginIsKilled(t *testing.T) {
	w := newWorld(t)
	cmd, out := w.plugin(10)
	line, err := bufio.NewReader(out).ReadString('\n')
	var att backends.Attachment
	if err := errors.Join(err, json.Unmarshal([]byte(line), &att)); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	acknowledged, failed := make(chan int, 1<<20), make(chan error, 1)
	go writeUntil(att.Device, 1, acknowledged, failed)
	<-acknowledged
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	for range 20 {
		<-acknowledged
	}
	atts, err := w.a.Attachments(t.Context())
	if err != nil || !slices.Equal(atts, []backends.Attachment{att}) {
		t.Errorf("got %+v, %v; want %+v", atts, err, att)
	}
	wantError(t, w.a.Detach(t.Context(), att), backends.ErrInUse, "is open or mounted")
	w.fence(w.b, "a", 10) // ends the writer
	<-failed
	if err := w.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	if pids := daemons(t, att.ID); len(pids) > 0 {
		t.Errorf("daemons %d are left", pids)
	}
}
