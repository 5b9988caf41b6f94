package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/e2e/chaos/history"
	"github.com/flocker-plugin/flocker/e2e/rig"
)

// A fault is one way to break things.
type fault struct {
	name, help string
	// weight is how often it is chosen, beside the others of its lane.
	weight int
	where  place
	// whom is what it hits, if that is not what its place says.
	whom string
	// away is set for what takes a host away from the others, and deaf if its Docker
	// does not answer then.
	away, deaf bool
	// planned is set for what an operator does every day: a move, and not a fault.
	planned bool
	// storage is set for what only the test storage can do.
	storage bool
	// least and most are how long it lasts; 0 for what is over at once.
	least, most time.Duration
	// inject does it, and sets what repairs it as soon as there is something to
	// repair.
	inject func(ctx context.Context, r *run, s step, i *injected) error
}

// place is what kind of thing a fault hits.
type place int

const (
	onTask    place = iota // a volume's container
	onService              // a volume's service, whatever its host does
	onHost                 // a host, and with preference one that writes
	onEtcd                 // a member of etcd
	onStorage              // the test storage
)

func (f *fault) lane() lane {
	switch {
	case f.away:
		return hosts
	case f.where == onEtcd:
		return etcds
	case f.where == onStorage:
		return storages
	}
	return parts
}

// faults is every fault there is.
var faults = []*fault{
	{
		name: "host killed", help: "power cut: what the kernel has not written out is lost", weight: 6, where: onHost, away: true, deaf: true,
		least: 3 * time.Second, most: 30 * time.Second, inject: killHost,
	},
	{
		name: "host isolated", help: "no packets from and to etcd and the other hosts: it is taken for dead, and writes on", weight: 4, where: onHost, away: true,
		least: 12 * time.Second, most: 28 * time.Second, inject: isolateHost,
	},
	{
		name: "host partitioned", help: "the network cable is out", weight: 3, where: onHost, away: true,
		least: time.Second, most: 28 * time.Second, inject: partitionHost,
	},
	{
		name: "host paused", help: "SIGSTOP for everything on a host", weight: 2, where: onHost, away: true, deaf: true,
		least: time.Second, most: 24 * time.Second, inject: pauseHost,
	},
	{
		name: "dockerd killed", help: "SIGKILL for dockerd; it is started again", weight: 2, where: onHost, away: true, deaf: true,
		least: 0, most: 8 * time.Second, inject: killDockerd,
	},
	{
		name: "dockerd paused", help: "SIGSTOP for dockerd", weight: 1, where: onHost, away: true, deaf: true,
		least: time.Second, most: 12 * time.Second, inject: pauseDockerd,
	},
	{
		name: "node drained", help: "Swarm moves everything away from a host", weight: 1, where: onHost, away: true, planned: true,
		least: 2 * time.Second, most: 8 * time.Second, inject: drainNode,
	},
	{name: "container killed", help: "SIGKILL for a service's container", weight: 4, where: onTask, inject: killContainer},
	{name: "filesystem full", help: "all space of a volume is taken for 8 s", weight: 1, where: onTask, inject: fillVolume},
	{name: "plugin killed", help: "SIGKILL for the plugin; Docker starts it again", weight: 4, where: onHost, inject: killPlugin},
	{
		name: "plugin paused", help: "SIGSTOP for the plugin", weight: 3, where: onHost,
		least: time.Second, most: 12 * time.Second, inject: pausePlugin,
	},
	{
		name: "host cut off from etcd", help: "packets to etcd are dropped, all else works", weight: 2, where: onHost,
		least: time.Second, most: 18 * time.Second, inject: cutOff("etcd"),
	},
	{
		name: "etcd's replies lost", help: "a host's requests reach etcd, and no answer reaches the host", weight: 3, where: onHost,
		least: time.Second, most: 8 * time.Second, inject: loseReplies,
	},
	{
		name: "host cut off from storage", help: "packets to the test storage are dropped, all else works", weight: 2, where: onHost, storage: true,
		least: time.Second, most: 12 * time.Second, inject: cutOff("storage"),
	},
	{
		name: "initiator killed", help: "SIGKILL for what makes a host's devices of the test storage", weight: 2, where: onHost, storage: true,
		least: 0, most: 5 * time.Second, inject: killInitiator,
	},
	{name: "service moved", help: "an update that bars a service's present host", weight: 4, where: onService, planned: true, inject: moveService},
	{
		name: "etcd member killed", help: "SIGKILL for one of three", weight: 3, where: onEtcd,
		least: time.Second, most: 8 * time.Second, inject: killEtcd,
	},
	{
		name: "etcd member paused", help: "SIGSTOP for one of three", weight: 3, where: onEtcd,
		least: time.Second, most: 8 * time.Second, inject: pauseEtcd,
	},
	{
		name: "etcd gone", help: "SIGSTOP for all three", weight: 1, where: onEtcd, whom: "all members",
		least: time.Second, most: 12 * time.Second, inject: pauseAllEtcd,
	},
	{
		name: "storage server killed", help: "nothing can be attached, detached or fenced; data is served on", weight: 2, where: onStorage, storage: true,
		least: time.Second, most: 8 * time.Second, inject: killStorage,
	},
	{
		name: "storage slow", help: "each read and write takes 0.1 s longer", weight: 1, where: onStorage, storage: true,
		least: time.Second, most: 8 * time.Second, inject: slowStorage,
	},
	{
		name: "storage hangs", help: "reads and writes of a volume are not answered", weight: 2, where: onStorage, whom: "one volume", storage: true,
		least: time.Second, most: 8 * time.Second, inject: hangStorage,
	},
	{
		name: "storage calls late", help: "every other call takes effect up to 6 s after its caller has gone, or loses its reply, while a service moves", weight: 2, where: onStorage, storage: true,
		least: 5 * time.Second, most: 12 * time.Second, inject: lateStorage,
	},
}

// brief bounds what takes a moment on a host that is not broken.
const brief = 30 * time.Second

// container is the container of a service on a host.
func container(ctx context.Context, i *injected) (string, error) {
	out, err := i.host.Docker(ctx, "ps", "-q", "--filter", "label=com.docker.swarm.service.name="+i.volume)
	if err == nil && out == "" {
		err = fmt.Errorf("no container of %s runs on %s any more", i.volume, i.host.Name)
	}
	id, _, _ := strings.Cut(out, "\n")
	return id, err
}

func signalContainer(ctx context.Context, i *injected, signal string) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	id, err := container(ctx, i)
	if err != nil {
		return err
	}
	_, err = i.host.Docker(ctx, "kill", "--signal", signal, id)
	return err
}

func killContainer(ctx context.Context, _ *run, _ step, i *injected) error {
	return signalContainer(ctx, i, "KILL")
}

func fillVolume(ctx context.Context, _ *run, _ step, i *injected) error {
	return signalContainer(ctx, i, "USR1")
}

func moveService(ctx context.Context, r *run, _ step, i *injected) error {
	if i.host == nil {
		return errors.New("it is on no host yet")
	}
	return r.move(ctx, i.volume, i.host)
}

// move bars the host a service is on, and no other.
func (r *run) move(ctx context.Context, service string, from *rig.Host) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	out, err := r.manage(ctx, "service", "inspect", "--format", "{{json .Spec.TaskTemplate.Placement}}", service)
	if err != nil {
		return err
	}
	var placement struct{ Constraints []string }
	if err := json.Unmarshal([]byte(out), &placement); err != nil {
		return fmt.Errorf("read the placement of service %s: %w", service, err)
	}
	bar := "node.hostname!=" + from.Name
	args := []string{"service", "update", "--detach", "--quiet"}
	for _, c := range placement.Constraints {
		if c == bar {
			return errors.New("it is being moved already")
		}
		args = append(args, "--constraint-rm", c)
	}
	_, err = r.manage(ctx, append(args, "--constraint-add", bar, service)...)
	return err
}

func drainNode(ctx context.Context, r *run, _ step, i *injected) error {
	set := func(ctx context.Context, availability string) error {
		_, err := r.manage(ctx, "node", "update", "--availability", availability, i.host.Name)
		return err
	}
	i.undo = func(ctx context.Context) error { return set(ctx, "active") }
	return set(ctx, "drain")
}

// killPlugin kills a plugin that has run for a while: Docker disables one for good that
// ends while it is being started.
func killPlugin(ctx context.Context, _ *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	pid, err := i.host.PluginPID()
	if err != nil {
		return err
	}
	if up, err := uptime(pid); err != nil || up < 5*time.Second {
		return cmp.Or(err, errors.New("the plugin has only just been started"))
	}
	return i.host.KillPlugin(ctx)
}

// uptime is how long a process has been running.
func uptime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in brackets, may hold anything.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("read the start of process %d: %q", pid, data)
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	const tick = 10 * time.Millisecond // the kernel's, for programs
	return history.Now() - time.Duration(ticks)*tick, err
}

func pausePlugin(_ context.Context, _ *run, _ step, i *injected) error {
	pid, err := i.host.PluginPID()
	if err != nil {
		return err
	}
	i.undo = func(context.Context) error { return ignoreGone(syscall.Kill(pid, syscall.SIGCONT)) }
	return syscall.Kill(pid, syscall.SIGSTOP)
}

func ignoreGone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

func killDockerd(ctx context.Context, _ *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	i.undo = func(ctx context.Context) error {
		// One that a former try has started, and that did not get ready.
		if err := i.host.KillDockerd(ctx); err != nil {
			return err
		}
		return i.host.StartDockerd(ctx)
	}
	return i.host.KillDockerd(ctx)
}

// wakeEnters lets the nsenter processes of a directory of the rig go on: one whose
// child was stopped has stopped as well, and would not notice the child's end. Those
// of others are left alone: they wake their children.
func wakeEnters(dir string) error {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, process := range processes {
		args, err := os.ReadFile(process + "/cmdline")
		// An argument may be the directory itself, or a file in it.
		of := strings.Contains(string(args), dir+"/") || strings.Contains(string(args), dir+"\x00")
		if err != nil || !strings.HasPrefix(string(args), "nsenter\x00") || !of {
			continue // it may have ended
		}
		pid, err := strconv.Atoi(filepath.Base(process))
		if err != nil {
			return err
		}
		if err := ignoreGone(syscall.Kill(pid, syscall.SIGCONT)); err != nil {
			return err
		}
	}
	return nil
}

func pauseDockerd(ctx context.Context, _ *run, _ step, i *injected) error {
	signal := func(ctx context.Context, signal string) error {
		ctx, cancel := context.WithTimeout(ctx, brief)
		defer cancel()
		_, err := i.host.Exec(ctx, "sh", "-c", "kill -"+signal+" $(cat /run/docker.pid)")
		return err
	}
	i.undo = func(ctx context.Context) error { return errors.Join(signal(ctx, "CONT"), wakeEnters(i.host.Dir)) }
	return signal(ctx, "STOP")
}

// killHost cuts a host's power. Every third time an operator sees that it is off, where
// it takes one, and what the host wrote must be written elsewhere before it is back.
func killHost(ctx context.Context, r *run, s step, i *injected) error {
	var left []*volume
	for _, v := range r.volumes {
		if r.hostOf(v) == i.host {
			left = append(left, v)
		}
	}
	if err := cutPower(ctx, r, i); err != nil || s.pick>>32%3 != 0 {
		return err
	}
	if slices.ContainsFunc(r.volumes, func(v *volume) bool { return !backendOf(v).fences }) {
		if err := declareDead(ctx, r, i.host); err != nil {
			return err
		}
	}
	return r.elsewhere(ctx, left, i)
}

// elsewhere waits until volumes are written to on other hosts than one that is dead.
// That they are not is a violation, and not an error: whatever else breaks meanwhile is
// repaired within seconds.
func (r *run) elsewhere(ctx context.Context, volumes []*volume, dead *injected) error {
	limit, mend := time.Now().Add(r.settle), time.Now().Add(patience)
	for len(volumes) > 0 {
		if time.Now().After(mend) {
			if err := r.mendDocker(ctx); err != nil {
				return err
			}
			mend = time.Now().Add(patience)
		}
		volumes = slices.DeleteFunc(volumes, func(v *volume) bool {
			at, node := r.witness.last(v.name)
			return at > dead.at && node != dead.host.Name
		})
		if len(volumes) > 0 && time.Now().After(limit) {
			for _, v := range volumes {
				r.violate("availability", v.name, "%s is dead, and nothing is written elsewhere %v later; the tasks of its service:\n%s", dead.host.Name, r.settle, r.tasks(ctx, v.name))
			}
			return nil
		}
		if err := sleep(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// declareDead is the operator. A host is not to be declared dead before its lease has
// run out.
func declareDead(ctx context.Context, r *run, dead *rig.Host) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		var err error
		for _, h := range r.hosts {
			if r.isAway(h) {
				continue
			}
			trying, cancel := context.WithTimeout(ctx, 10*time.Second)
			_, err = h.Docker(trying, "flocker", "node", "confirm-dead", dead.Name, "--because", "chaos has switched it off")
			cancel()
			if err == nil {
				r.say("the operator declares %s dead", dead.Name)
				r.declared++
				return nil
			}
		}
		if sleep(ctx, time.Second) != nil {
			return fmt.Errorf("declare %s dead: %w", dead.Name, err)
		}
	}
}

func cutPower(ctx context.Context, r *run, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	i.undo = func(ctx context.Context) error {
		if err := i.host.Kill(ctx); err != nil { // a former try may have got half way
			return err
		}
		return i.host.Boot(ctx)
	}
	// The kernel of all hosts is one, and would write out what the dead one's has in
	// its cache. Stopped, nobody on the host sees that its filesystems are shut down.
	if err := i.host.Pause(); err != nil {
		return err
	}
	r.cuts = append(r.cuts, history.PowerCut{Node: i.host.Name, At: history.Now()})
	if err := loseCaches(i.host); err != nil {
		r.note("%s keeps what its kernel has not written out: %v", i.host.Name, err)
	}
	return i.host.Kill(ctx)
}

// loseCaches has the kernel forget what it has not written to the volumes mounted on
// a host: from now on nothing reaches them. Those of the test storage need no help,
// because what takes their data to the server dies with the host; stopped as it is,
// they would only hang.
func loseCaches(h *rig.Host) error {
	pid, err := h.PluginPID()
	if err != nil {
		return err
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(mounts)) {
		mount, device, _ := strings.Cut(line, " - ")
		fields, source := strings.Fields(mount), strings.Fields(device)
		if len(fields) < 5 || len(source) < 2 || !strings.HasPrefix(fields[4], "/flocker/mnt/") {
			continue
		}
		file, err := os.ReadFile("/sys/block/" + filepath.Base(source[1]) + "/loop/backing_file")
		if err == nil && strings.HasSuffix(strings.TrimSpace(string(file)), ".img") {
			err = shutdown(fmt.Sprintf("/proc/%d/root%s", pid, fields[4]))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// shutdown is FS_IOC_SHUTDOWN without a flush of the log.
func shutdown(dir string) error {
	f, err := os.Open(dir)
	if errors.Is(err, unix.EIO) {
		return nil // it is shut down: xfs, mounted twice
	}
	if err != nil {
		return err
	}
	defer f.Close()
	const request = 0x8004587d // _IOR('X', 125, __u32)
	flags := uint32(2)         // no log flush
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return fmt.Errorf("shut %s down: %w", dir, errno)
	}
	return nil
}

func pauseHost(_ context.Context, _ *run, _ step, i *injected) error {
	i.undo = func(context.Context) error { return i.host.Resume() }
	return i.host.Pause()
}

func partitionHost(ctx context.Context, _ *run, _ step, i *injected) error {
	i.undo = i.host.Heal
	return i.host.Partition(ctx)
}

// isolateHost leaves a host nothing but its storage.
func isolateHost(ctx context.Context, r *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	i.undo = i.host.Heal
	if err := i.host.Cut(ctx, "etcd"); err != nil {
		return err
	}
	for _, other := range r.rig.Hosts {
		if other == i.host {
			continue
		}
		for _, direction := range []string{"-s", "-d"} {
			// Heal empties the chain that Cut has made.
			if _, err := i.host.Exec(ctx, "iptables", "-w", "-A", "cut", direction, other.Addr, "-j", "DROP"); err != nil {
				return err
			}
		}
	}
	return nil
}

func cutOff(from string) func(ctx context.Context, r *run, s step, i *injected) error {
	return func(ctx context.Context, _ *run, _ step, i *injected) error {
		i.undo = i.host.Heal
		return i.host.Cut(ctx, from)
	}
}

// loseReplies lets what a host asks through to etcd, and loses what etcd says.
func loseReplies(ctx context.Context, r *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	var addrs []string
	for _, endpoint := range r.endpoints {
		u, err := url.Parse(endpoint)
		if err != nil {
			return err
		}
		addrs = append(addrs, u.Hostname())
	}
	i.undo = i.host.Heal
	// The chain is the one that Cut makes and Heal empties.
	_, err := i.host.Exec(ctx, append([]string{"sh", "-ec", `
		if iptables -w -N cut 2>/dev/null; then
			iptables -w -I INPUT -j cut
			iptables -w -I OUTPUT -j cut
		fi
		for addr; do
			iptables -w -A cut -s $addr -j DROP
		done`, "sh"}, addrs...)...)
	return err
}

func killEtcd(ctx context.Context, r *run, s step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	member := int(s.pick % 3)
	i.undo = func(ctx context.Context) error {
		if err := r.rig.KillEtcd(ctx, member); err != nil {
			return err
		}
		return r.rig.StartEtcd(ctx, member)
	}
	return r.rig.KillEtcd(ctx, member)
}

func pauseEtcd(_ context.Context, r *run, s step, i *injected) error {
	member := int(s.pick % 3)
	i.undo = func(context.Context) error {
		return errors.Join(r.rig.ResumeEtcd(member), wakeEnters(r.etcdDir(member)))
	}
	return r.rig.PauseEtcd(member)
}

func pauseAllEtcd(_ context.Context, r *run, _ step, i *injected) error {
	each := func(f func(int) error) error {
		var errs []error
		for member := range len(r.endpoints) {
			errs = append(errs, f(member))
		}
		return errors.Join(errs...)
	}
	i.undo = func(context.Context) error {
		return each(func(member int) error {
			return errors.Join(r.rig.ResumeEtcd(member), wakeEnters(r.etcdDir(member)))
		})
	}
	return each(r.rig.PauseEtcd)
}

// etcdDir is a member's directory.
func (r *run) etcdDir(member int) string {
	return filepath.Join(r.rig.Dir, "switch", fmt.Sprintf("etcd%d", member+1))
}

func killInitiator(ctx context.Context, _ *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	i.undo = func(ctx context.Context) error {
		if err := i.host.KillInitiator(ctx); err != nil { // a former try's
			return err
		}
		return i.host.StartInitiator(ctx)
	}
	return i.host.KillInitiator(ctx)
}

func killStorage(ctx context.Context, r *run, _ step, i *injected) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	i.undo = func(ctx context.Context) error {
		if err := r.store.KillServer(ctx); err != nil { // a former try's
			return err
		}
		return r.store.StartServer(ctx)
	}
	return r.store.KillServer(ctx)
}

// storageFaults sets what goes wrong in the test storage until it is repaired.
func storageFaults(ctx context.Context, r *run, i *injected, calls []teststore.Fault, data []teststore.DataFault) error {
	set := func(ctx context.Context, calls []teststore.Fault, data []teststore.DataFault) (suffered []int, err error) {
		ctx, cancel := context.WithTimeout(ctx, brief)
		defer cancel()
		return r.store.SetFaults(ctx, calls, data)
	}
	i.undo = func(ctx context.Context) error {
		suffered, err := set(ctx, nil, nil)
		if err != nil || len(calls) == 0 {
			return err
		}
		i.missed = true
		for n, f := range calls {
			if n < len(suffered) && suffered[n] > 0 && (f.Before > 0 || f.HangUp || f.Drop) {
				i.missed = false
			}
		}
		return nil
	}
	_, err := set(ctx, calls, data)
	return err
}

func slowStorage(ctx context.Context, r *run, _ step, i *injected) error {
	return storageFaults(ctx, r, i, nil, []teststore.DataFault{{Slow: 100 * time.Millisecond}})
}

func hangStorage(ctx context.Context, r *run, s step, i *injected) error {
	grants, err := r.store.Server().Call(ctx, teststore.OpGrants, teststore.Request{})
	if err != nil {
		return err
	}
	if len(grants.Grants) == 0 {
		return errors.New("no volume is attached")
	}
	ref := grants.Grants[s.pick%uint64(len(grants.Grants))].Ref
	return storageFaults(ctx, r, i, nil, []teststore.DataFault{{Ref: ref, Hang: true}})
}

func lateStorage(ctx context.Context, r *run, s step, i *injected) error {
	var calls []teststore.Fault
	random := rand.New(rand.NewPCG(s.pick, 0))
	for _, op := range []string{teststore.OpAttach, teststore.OpDetach, teststore.OpFence} {
		for range 30 {
			f := teststore.Fault{Op: op, Times: 1, Before: time.Duration(random.Int64N(int64(6 * time.Second)))}
			switch random.IntN(5) {
			case 0:
				f.HangUp = true
			case 1:
				f.Drop = true
			case 2: // only late
			default:
				f.Before = 0
			}
			calls = append(calls, f)
		}
	}
	if err := storageFaults(ctx, r, i, calls, nil); err != nil {
		return err
	}
	// Something has to ask for a call.
	var of []*volume
	for _, v := range r.volumes {
		if backendOf(v).fences {
			of = append(of, v)
		}
	}
	v := of[s.pick%uint64(len(of))]
	if h := r.hostOf(v); h != nil {
		if err := r.move(ctx, v.name, h); err != nil {
			r.say("%s: move %s: %v", s.name, v.name, err)
		}
	}
	return nil
}
