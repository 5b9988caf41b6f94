package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends/teststore"
	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

// finish ends the services, reads what is on the volumes, and checks their
// filesystems when they are detached. What goes wrong there is a violation.
func (r *run) finish(ctx context.Context) error {
	if err := r.mendDocker(ctx); err != nil {
		return err
	}
	r.say("the services end")
	for _, v := range r.volumes {
		if _, err := r.manage(ctx, "service", "rm", v.name); err != nil {
			return err
		}
	}
	for _, h := range r.hosts {
		// Such as one whose docker run has just been ended, before it was started. One
		// that is being removed already is waited for below.
		ids, err := h.Docker(ctx, "ps", "-aq", "--filter", "label="+otherLabel)
		if err != nil {
			return err
		}
		if ids != "" {
			_, _ = h.Docker(ctx, append([]string{"rm", "-f"}, strings.Fields(ids)...)...)
		}
	}
	if err := r.noContainers(ctx); err != nil {
		return err
	}
	if err := r.others.removeAll(ctx, r.hosts); err != nil {
		if ctx.Err() != nil {
			return err
		}
		r.violate("availability", "", "a volume that nobody uses cannot be removed: %v", err)
	}
	if err := r.allFree(ctx); err != nil {
		return err
	}
	r.say("the volumes are read")
	for n, v := range r.volumes {
		h := r.hosts[n%len(r.hosts)]
		reading, cancel := context.WithTimeout(ctx, 3*time.Minute)
		_, err := h.Docker(reading, append([]string{"run", "--rm"}, append(r.lookArgs(v.name, "/final/"+v.name), "-kind", string(v.kind))...)...)
		cancel()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			r.violate("data", v.name, "it cannot be read: %v", err)
		}
	}
	if err := r.allFree(ctx); err != nil {
		return err
	}
	return r.checkFilesystems(ctx)
}

// noContainers waits until no containers are left, and then helps.
func (r *run) noContainers(ctx context.Context) error {
	for try := 0; ; try++ {
		var left []string
		for _, h := range r.hosts {
			out, err := h.Docker(ctx, "ps", "-aq")
			if err != nil {
				left = append(left, err.Error())
			}
			for id := range strings.FieldsSeq(out) {
				left = append(left, id+" on "+h.Name)
				if try > 60 {
					if _, err := h.Docker(ctx, "rm", "-f", id); err != nil {
						r.note("remove container %s of %s: %v", id, h.Name, err)
					}
				}
			}
		}
		switch {
		case len(left) == 0:
			return nil
		case try == 60:
			r.note("a minute after the services were removed there are containers still, which are now killed: %s", strings.Join(left, ", "))
		case try == 90:
			return fmt.Errorf("containers cannot be removed: %s", strings.Join(left, ", "))
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

// freeWithin is how long a host may have what nothing uses: the plugin looks at
// everything every five minutes.
const freeWithin = 6 * time.Minute

// allFree waits until no host has any volume. That takes a minute where an Unmount
// was lost, and half a minute to notice.
func (r *run) allFree(ctx context.Context) error {
	limit := time.Now().Add(freeWithin)
	for {
		owned, err := r.keys(ctx, "own/")
		if err != nil {
			return err
		}
		loops, err := r.rig.Loops()
		if err != nil {
			return err
		}
		if len(owned) == 0 && len(loops) == 0 {
			return nil
		}
		if time.Now().After(limit) {
			var held []string
			for id, owner := range owned {
				held = append(held, id+": "+string(owner))
			}
			for _, loop := range loops {
				held = append(held, describeLoop(loop))
			}
			if r.store != nil {
				grants, err := r.store.Server().Call(ctx, teststore.OpGrants, teststore.Request{})
				held = append(held, fmt.Sprintf("the test storage grants %+v %v", grants.Grants, err))
			}
			r.violate("leak", "", "nothing uses a volume, and %v later there are %d owners and %d loop devices:\n%s", freeWithin, len(owned), len(loops), strings.Join(held, "\n"))
			return nil
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

// describeLoop says whose a loop device is.
func describeLoop(path string) string {
	file, _ := os.ReadFile("/sys/block/" + filepath.Base(path) + "/loop/backing_file")
	text := fmt.Sprintf("%s: file %s", path, strings.TrimSpace(string(file)))
	f, err := os.Open(path)
	if err != nil {
		return text + ": " + err.Error()
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return text + ": " + err.Error()
	}
	return fmt.Sprintf("%s, name %s, flags %#x", text, unix.ByteSliceToString(info.File_name[:]), info.Flags)
}

// checkFilesystems runs each filesystem's checker, which changes nothing.
func (r *run) checkFilesystems(ctx context.Context) error {
	ids, err := r.volumeIDs(ctx)
	if err != nil {
		return err
	}
	for _, v := range r.volumes {
		file, err := r.imageOf(v, ids[v.name])
		if err != nil {
			r.violate("data", v.name, "its storage is not to be found: %v", err)
			continue
		}
		if text := damaged(ctx, v.fs, file); text != "" {
			r.violate("data", v.name, "%s", text)
			continue
		}
		r.clean++
	}
	return ctx.Err()
}

// damaged says what a filesystem's checker finds; empty if nothing.
func damaged(ctx context.Context, fs, file string) string {
	checkers := map[string][]string{
		"ext4": {"e2fsck", "-f", "-n", file},
		"xfs":  {"xfs_repair", "-n", "-f", file},
	}
	args := checkers[fs]
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err == nil {
		return ""
	}
	return fmt.Sprintf("%s: %v\n%s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
}

// doubleMount does what must never happen: it mounts a volume that a host has
// mounted, past everything that would refuse it, and writes to it.
func (r *run) doubleMount(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := r.writing(ctx, time.Minute); err != nil {
		return err
	}
	v := r.volumes[0]
	ids, err := r.volumeIDs(ctx)
	if err != nil {
		return err
	}
	file, err := r.imageOf(v, ids[v.name])
	if err != nil {
		return err
	}
	r.note("sabotage: %s is mounted a second time and written to", v.name)
	dir := filepath.Join(r.rig.Dir, "intruder")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return intrude(ctx, 8*time.Second, file, dir, r.writer, "-volume", v.name, "-node", "intruder", "-witness", r.witness.dir, "-every", r.every.String())
}

// intrude mounts an ext4 filesystem from its file and has a writer write to it for
// some time, whoever else has it mounted.
func intrude(ctx context.Context, long time.Duration, file, dir, writer string, args ...string) (err error) {
	command := func(ctx context.Context, args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out)), err
	}
	device, err := command(ctx, "losetup", "--show", "-f", file)
	if err != nil {
		return err
	}
	cleanup := func(args ...string) {
		cleaning, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		_, undone := command(cleaning, args...)
		err = errors.Join(err, undone)
	}
	defer cleanup("losetup", "-d", device)
	// Multi-mount protection would refuse it.
	_, _ = command(ctx, "tune2fs", "-f", "-E", "clear_mmp", device)
	for try := 0; ; try++ {
		// What looks at every device of the machine may have it open.
		_, err := command(ctx, "mount", "-t", "ext4", device, dir)
		if err == nil {
			break
		}
		if try == 150 {
			return err
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	defer cleanup("umount", dir)
	writing, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	data := filepath.Join(dir, "data")
	if _, err := os.Stat(data); err != nil {
		data = dir
	}
	cmd := exec.CommandContext(writing, writer, append(args, "-dir", data)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	// That its I/O fails is what a filesystem mounted twice may come to.
	_ = cmd.Run()
	return nil
}

// readFinal reads what was copied from a volume of a Synced or Unsynced writer.
func (r *run) readFinal(v *volume) (history.Log, error) {
	f, err := os.Open(r.final(v.name))
	if err != nil {
		return history.Log{}, err
	}
	defer f.Close()
	return history.ScanLog(v.name, f)
}
