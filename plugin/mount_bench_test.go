package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// BenchmarkMount measures what Mount adds to what the storage takes: with the plugin's
// process and socket, an etcd, real devices and filesystems, and a CSI driver that takes no
// longer than it needs. It is reported as added-ms (the median), added-min-ms and added-p95-ms; ns/op
// has an Unmount in it.
func BenchmarkMount(b *testing.B) {
	if os.Geteuid() != 0 {
		skip(b, "root", "needs root")
	}
	driver, socket := san(b, nil)
	if err := driver.Down(false); err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "backends.yaml"), fmt.Appendf(nil, "san: {type: csi, endpoint: %q, fences: true}\n", socket), 0o600); err != nil {
		b.Fatal(err)
	}
	p := plugin(b.Context(), dir, "FLOCKER_ETCD_LISTEN="+freeAddress(b), "FLOCKER_LINGER=0s").begin(b)
	p.says(b, 3*starting, "/VolumeDriver.Create", `{"Name":"db","Opts":{"size":"20M","backend":"san"}}`, "{}")
	p.mounts(b, starting, "db") // it is formatted
	detached := func() {
		for end := time.Now().Add(starting); ; time.Sleep(10 * time.Millisecond) {
			if _, used := driver.Volumes(); used == 0 {
				return
			}
			if time.Now().After(end) {
				b.Fatal("the volume stays attached")
			}
		}
	}
	var added []time.Duration
	for b.Loop() {
		detached()
		driver.Spent()
		started := time.Now()
		p.says(b, 0, "/VolumeDriver.Mount", `{"Name":"db","ID":"x"}`, `{"Mountpoint":"`)
		added = append(added, time.Since(started)-driver.Spent())
		p.says(b, 0, "/VolumeDriver.Unmount", `{"Name":"db","ID":"x"}`, "{}")
	}
	slices.Sort(added)
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	b.ReportMetric(ms(added[0]), "added-min-ms")
	b.ReportMetric(ms(added[len(added)/2]), "added-ms")
	b.ReportMetric(ms(added[len(added)*95/100]), "added-p95-ms")
	p.await(b, starting, "/VolumeDriver.Remove", `{"Name":"db"}`, "{}")
	for end := time.Now().Add(starting); ; time.Sleep(10 * time.Millisecond) {
		if all, _ := driver.Volumes(); all == 0 || time.Now().After(end) {
			break
		}
	}
	p.stop(b)
}
