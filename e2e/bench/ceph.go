package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/rbd"
	"github.com/flocker-plugin/flocker/backends/rbd/cephtest"
)

// onCeph measures how much later a volume in a real Ceph is mounted than the storage alone
// would have it mounted. Three volumes are mounted by turns: by hand, with the backend
// alone, and by the plugin.
type onCeph struct {
	area    *area
	ceph    *cephtest.Cluster
	machine string
	times   samples
	loads   []float64
	marker  string
	rest    time.Duration // of the last Mount
}

// What is measured.
const (
	byHand    = "by hand: `qemu-storage-daemon` opens the image, loop device, mount"
	byBackend = "the backend's Attach, mount"
	byPlugin  = "the plugin's Mount"
	attaches  = "of that, the backend's Attach"
	theRest   = "of that, before and after it"
	mountHand = "of what was done by hand, mount(2)"
	adds      = "**Flocker adds**: before and after Attach, less mount(2)"
	oneCall   = "one call of `rbd info`"
)

// measureCeph mounts each volume that many times.
func measureCeph(ctx context.Context, o options, rounds int) (_ *onCeph, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("root is needed to mount")
	}
	c := &onCeph{}
	clean := func(f func(context.Context) error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		err = errors.Join(err, f(ctx))
	}
	if c.area, err = newArea(ctx, o.dir); err != nil {
		return nil, err
	}
	cephtest.Sweep() //nolint:contextcheck // it waits for a second at most
	progress("Ceph is started")
	if c.ceph, err = cephtest.Start(ctx); err != nil {
		clean(c.area.remove)
		return nil, err
	}
	defer c.ceph.Stop() //nolint:contextcheck // whatever ctx says, and after what is mounted is not any more
	defer clean(c.area.remove)
	c.machine = machine(c.area.dir)
	if o.plugin == "" {
		if o.plugin, err = buildPlugin(ctx, c.area.dir); err != nil {
			return nil, err
		}
	}
	return c, c.measure(ctx, o.plugin, rounds)
}

func (c *onCeph) measure(ctx context.Context, plugin string, rounds int) error {
	settings := filepath.Join(c.area.dir, "backends.yaml")
	run := c.ceph.Dir + "/r"
	text := fmt.Sprintf("ceph: {type: rbd, monitors: ['%s'], keyring_file: %s, pool: %s, attach: fuse, run_dir: %s}\n", c.ceph.Monitors, c.ceph.Keyring, cephtest.Pool, run)
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		return err
	}
	path, err := c.mark()
	if err != nil {
		return err
	}
	h, err := c.area.start(ctx, plugin, "ceph", "PATH="+path, "FLOCKER_BACKENDS="+settings, "FLOCKER_BACKEND=ceph", "FLOCKER_LINGER=0s")
	if err != nil {
		return err
	}
	ours := &volume{host: h, name: "ours", id: mountID()}
	backend, err := c.newBackend(ctx, run)
	if err != nil {
		return err
	}
	hand, err := c.newHand(ctx)
	if err != nil {
		return err
	}
	err = each(ctx, func(ctx context.Context) error { return h.create(ctx, ours.name) }, ours.mount, ours.unmount, ours.free)
	if err != nil {
		return err
	}
	progress(fmt.Sprintf("everything is mounted %d times", rounds))
	for round := range rounds {
		c.loads = append(c.loads, load())
		ways := []struct {
			what     string
			up, down func(context.Context) error
		}{
			{byHand, hand.up, hand.down},
			{byBackend, backend.up, backend.down},
			{byPlugin, func(ctx context.Context) error { return c.mount(ctx, ours, run) }, func(ctx context.Context) error { return each(ctx, ours.unmount, ours.free) }},
			{oneCall, func(ctx context.Context) error {
				_, err := c.ceph.Run(ctx, "rbd", "info", cephtest.Pool+"/byhand")
				return err
			}, func(context.Context) error { return nil }},
		}
		for i := range ways {
			way := ways[(round+i)%len(ways)]
			if err := c.times.took(way.what, func() error { return way.up(ctx) }); err != nil {
				return fmt.Errorf("%s: %w", way.what, err)
			}
			time.Sleep(settling)
			if err := way.down(ctx); err != nil {
				return fmt.Errorf("after %s: %w", way.what, err)
			}
		}
		c.times.add(mountHand, hand.mounted)
		c.times.add(adds, c.rest-hand.mounted)
	}
	return nil
}

// mark puts a program into the plugin's PATH that takes a note of the first call of rbd,
// which is how Attach begins.
func (c *onCeph) mark() (path string, err error) {
	rbd, err := exec.LookPath("rbd")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(c.area.dir, "bin")
	c.marker = filepath.Join(c.area.dir, "attaching")
	script := fmt.Sprintf("#!/bin/sh\n[ -e %[1]s ] || : >%[1]s\nexec %[2]s \"$@\"\n", c.marker, rbd)
	err = errors.Join(os.Mkdir(bin, 0o700), os.WriteFile(filepath.Join(bin, "rbd"), []byte(script), 0o700))
	return bin + ":" + os.Getenv("PATH"), err
}

// mount has the plugin mount a volume, and tells what of that is Attach: it begins with the
// marker, and ends with the note of which device it is, the only one there.
func (c *onCeph) mount(ctx context.Context, v *volume, run string) error {
	if err := os.Remove(c.marker); err != nil {
		return err
	}
	began := time.Now()
	if err := v.mount(ctx); err != nil {
		return err
	}
	all := time.Since(began)
	notes, err := filepath.Glob(run + "/*/m-*/device")
	if err != nil || len(notes) != 1 {
		return fmt.Errorf("attached are %s, want one: %w", notes, err)
	}
	first, err := os.Stat(c.marker)
	if err != nil {
		return err
	}
	last, err := os.Stat(notes[0])
	if err != nil {
		return err
	}
	attach := last.ModTime().Sub(first.ModTime())
	c.rest = all - attach
	c.times.add(attaches, attach)
	c.times.add(theRest, c.rest)
	return nil
}

// alone is a volume of the backend that no plugin has.
type alone struct {
	*bare

	backend *rbd.Backend
	vol     backends.Volume
	att     backends.Attachment
	token   int64
}

func (c *onCeph) newBackend(ctx context.Context, run string) (*alone, error) {
	v := &alone{bare: c.area.bare("alone")}
	cluster := uuid.NewString()
	var err error
	v.backend, err = rbd.New(rbd.Config{
		Monitors: []string{c.ceph.Monitors}, KeyringFile: c.ceph.Keyring, Pool: cephtest.Pool, Attach: "fuse", RunDir: run,
	}, rbd.Self{Node: "bench", Cluster: cluster})
	if err != nil {
		return nil, err
	}
	v.vol, err = v.backend.Create(ctx, backends.CreateRequest{ID: v.id, Name: "alone", Cluster: cluster, Size: volumeSize})
	if err != nil {
		return nil, err
	}
	return v, errors.Join(os.Mkdir(v.target, 0o700), each(ctx, v.attach, v.mkfs, v.detach))
}

func (v *alone) attach(ctx context.Context) (err error) {
	v.token++
	v.att, err = v.backend.Attach(ctx, backends.AttachRequest{Ref: v.vol.Ref, Volume: v.vol.ID, Token: v.token})
	v.device = v.att.Device
	return err
}

func (v *alone) detach(ctx context.Context) error { return v.backend.Detach(ctx, v.att) }

func (v *alone) up(ctx context.Context) error {
	return each(ctx, v.attach, func(context.Context) error { return v.mount() })
}

func (v *alone) down(ctx context.Context) error {
	return each(ctx, func(context.Context) error { return v.unmount() }, v.detach)
}

// hand is an image that is mounted by hand: nobody knows who has it, and nobody could be
// cut off from it.
type hand struct {
	*bare

	conf, shown string
	qsd         *exec.Cmd
	loop        loop.Device
	mounted     time.Duration // what mount(2) took
}

func (c *onCeph) newHand(ctx context.Context) (*hand, error) {
	v := &hand{bare: c.area.bare("byhand"), conf: c.ceph.Dir + "/byhand.conf", shown: c.ceph.Dir + "/byhand"}
	conf := fmt.Sprintf("[client.flocker]\nmon_host = %s\nkeyring = %s\nlog_file = /dev/null\nrbd_cache = false\n", c.ceph.Monitors, c.ceph.Keyring)
	if err := errors.Join(os.WriteFile(v.conf, []byte(conf), 0o600), os.WriteFile(v.shown, nil, 0o600), os.Mkdir(v.target, 0o700)); err != nil {
		return nil, err
	}
	if _, err := c.ceph.Run(ctx, "rbd", "create", cephtest.Pool+"/byhand", "--size", "1G"); err != nil {
		return nil, err
	}
	return v, each(ctx, v.attach, v.mkfs, v.detach)
}

func (v *hand) attach(ctx context.Context) (err error) {
	v.qsd = exec.Command("qemu-storage-daemon", //nolint:noctx // it is stopped in order
		"--blockdev", "driver=rbd,node-name=image,pool="+cephtest.Pool+",image=byhand,user=flocker,conf="+v.conf+",discard=unmap,cache.direct=on",
		"--export", "type=fuse,id=export,node-name=image,mountpoint="+v.shown+",writable=on")
	v.qsd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := v.qsd.Start(); err != nil {
		return err
	}
	var mount loop.FUSE
	for shown := false; !shown; {
		if mount, shown, err = loop.FUSEAt(v.shown); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Millisecond):
		}
	}
	if _, err := os.Stat(v.shown); err != nil {
		return err
	}
	if err := mount.OneByOne(); err != nil { // as Flocker does, for QEMU's sake
		return err
	}
	v.loop, err = loop.Attach(ctx, v.shown)
	v.device = v.loop.Path
	return err
}

func (v *hand) detach(ctx context.Context) error {
	if err := v.loop.Detach(ctx, cleanupLimit, func() {}); err != nil {
		return err
	}
	if err := v.qsd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return v.qsd.Wait()
}

func (v *hand) up(ctx context.Context) error {
	if err := v.attach(ctx); err != nil {
		return err
	}
	began := time.Now()
	err := v.mount()
	v.mounted = time.Since(began)
	return err
}

func (v *hand) down(ctx context.Context) error {
	return each(ctx, func(context.Context) error { return v.unmount() }, v.detach)
}

// addsLimit is what Flocker may add to what the storage takes.
const addsLimit = 50 * time.Millisecond

func (c *onCeph) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s Load, p50 / max: %.1f / %.1f. Ceph 16.2, a monitor and an OSD, on the same machine; volumes of 1 GiB, ext4; %d rounds.\n\n",
		c.machine, percentile(c.loads, 50), percentile(c.loads, 100), len(c.loads))
	b.WriteString("| what | least / p50 / p95, ms | target, p50 | met |\n| --- | --- | --- | --- |\n")
	for _, what := range []string{byHand, mountHand, byBackend, byPlugin, attaches, theRest, adds, oneCall} {
		target, met := "", ""
		if what == adds {
			target, met = "≤ "+fmt.Sprint(addsLimit), yes(c.missed() == 0)
		}
		fmt.Fprintf(&b, "| %s | %s / %s / %s | %s | %s |\n", what, ms(c.times.p(what, 0)), ms(c.times.p(what, 50)), ms(c.times.p(what, 95)), target, met)
	}
	b.WriteString("\nEach round does all of it, in another order. What Flocker adds is a difference within one round.\n")
	return b.String()
}

func (c *onCeph) missed() int {
	if c.times.p(adds, 50) > addsLimit {
		return 1
	}
	return 0
}
