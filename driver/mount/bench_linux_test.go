package mount_test

import (
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// BenchmarkExt4 compares each call with the bare system calls that do the same, by
// turns, and reports the median of each in milliseconds.
func BenchmarkExt4(b *testing.B) {
	needRoot(b)
	times := map[string][]time.Duration{}
	took := func(name string, f func() error) {
		b.Helper()
		start := time.Now()
		if err := f(); err != nil {
			b.Fatalf("%s: %v", name, err)
		}
		times[name] = append(times[name], time.Since(start))
	}
	s := &mount.System{}
	dir := b.TempDir()
	const size = 1 << 30
	for b.Loop() {
		id := uuid.NewString()
		target := filepath.Join(dir, id)
		ours, bare := newFile(b, size), newFile(b, size)
		var dev string

		dev = attach(b, bare)
		took("bare-mkfs", func() error { return exec.Command("mkfs.ext4", "-q", "-F", dev).Run() })
		if err := unix.Mkdir(target, 0o755); err != nil {
			b.Fatal(err)
		}
		for _, n := range []string{"bare-mount1", "bare-mount"} {
			took(n, func() error { return unix.Mount(dev, target, "ext4", 0, "") })
			time.Sleep(5 * time.Millisecond)
			took("bare-un"+n[5:], func() error { return unix.Unmount(target, 0) })
			if err := clearLoop(dev); err != nil {
				b.Fatal(err)
			}
			took("bare-attach", func() error { dev = attach(b, bare); return nil })
		}
		if err := clearLoop(dev); err != nil {
			b.Fatal(err)
		}
		if err := unix.Rmdir(target); err != nil {
			b.Fatal(err)
		}

		dev = attach(b, ours)
		took("format", func() error {
			return s.Format(b.Context(), mount.FormatSpec{Device: dev, FS: "ext4", UUID: id, Label: "bench"})
		})
		for _, n := range []string{"mount1", "mount"} {
			took(n, func() error {
				_, err := s.Mount(b.Context(), mount.Spec{Device: dev, FS: "ext4", UUID: id, Target: target}, mount.Owner{})
				return err
			})
			time.Sleep(5 * time.Millisecond)
			took("un"+n, func() error { return s.Unmount(b.Context(), target) })
			took("close-"+n, func() error { return s.Close(b.Context(), dev) })
			if err := clearLoop(dev); err != nil {
				b.Fatal(err)
			}
			dev = attach(b, ours)
		}
		if err := clearLoop(dev); err != nil {
			b.Fatal(err)
		}
	}
	for name, ds := range times {
		slices.Sort(ds)
		b.ReportMetric(float64(ds[len(ds)/2].Microseconds())/1000, name+"-ms")
	}
}
