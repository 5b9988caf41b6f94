package moby

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/volume/service"
	"github.com/docker/docker/volume/service/opts"
)

// The life of one volume, and exactly which calls Docker makes for it.
func TestVolume(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{30 * time.Second, 0} {
		t.Run(map[bool]string{true: "legacy", false: "managed"}[timeout == 0], func(t *testing.T) {
			t.Parallel()
			h := newSite(t).newHost(timeout)
			h.plug()
			h.boot()
			d, ctx := h.docker, t.Context()

			made, err := d.Create(ctx, "v1", "flocker", opts.WithCreateOptions(map[string]string{"size": "20M", "label.a": "b"}),
				opts.WithCreateLabels(map[string]string{"team": "x"}))
			noError(t, err)
			equal(t, "driver", made.Driver, d.plugins.Name())
			h.wantCalls("v1", "GC")
			equal(t, "references to the plugin", d.plugins.references(), 1)

			got, err := d.Get(ctx, "v1", opts.WithGetResolveStatus)
			noError(t, err)
			equal(t, "name", got.Name, "v1")
			equal(t, "scope", got.Scope, "global")
			equal(t, "mountpoint", got.Mountpoint, "")
			equal(t, "size", fmt.Sprint(got.Status["size"]), "20MiB")
			equal(t, "state", fmt.Sprint(got.Status["state"]), "free")
			if at, err := time.Parse(time.RFC3339, got.CreatedAt); err != nil || time.Since(at).Abs() > time.Minute {
				t.Errorf("created at: got %q, %v, want now", got.CreatedAt, err)
			}
			if want := map[string]string{"team": "x"}; !maps.Equal(got.Labels, want) {
				t.Errorf("labels: got %v, want %v", got.Labels, want)
			}

			lines, warnings := d.ls(t)
			equal(t, "ls", strings.Join(lines, "; "), "flocker v1")
			equal(t, "warnings of ls", len(warnings), 0)
			h.wantCalls("", "L")

			path, err := d.Mount(ctx, got, "id1")
			noError(t, err)
			noError(t, os.WriteFile(filepath.Join(path, "f"), []byte("data"), 0o600))
			got, err = d.Get(ctx, "v1", opts.WithGetResolveStatus)
			noError(t, err)
			equal(t, "mountpoint when mounted", got.Mountpoint, path)
			equal(t, "state when mounted", fmt.Sprint(got.Status["state"]), "mounted")
			noError(t, d.Unmount(ctx, got, "id1"))
			noError(t, h.site.nothing())
			h.wantCalls("v1", "GCGGMGGU")
			if !strings.Contains(h.out.String(), "mount_id=id1") {
				t.Error("the mount came without its id")
			}

			path, err = d.Mount(ctx, got, "id2")
			noError(t, err)
			data, err := os.ReadFile(filepath.Join(path, "f"))
			equal(t, fmt.Sprintf("file of the first mount (%v)", err), string(data), "data")
			noError(t, d.Unmount(ctx, got, "id2"))
			noError(t, d.Remove(ctx, "v1"))
			h.wantCalls("v1", "GCGGMGGUGMGUGGR")
			equal(t, "events", d.events.String(), "create v1, destroy v1")
			if !d.plugins.legacy { // of those nobody counts
				equal(t, "references to the plugin at the end", d.plugins.references(), 0)
			}
			if _, err := d.Get(ctx, "v1"); !service.IsNotExist(err) {
				t.Errorf("get after remove: got %v, want no such volume", err)
			}
			lines, _ = d.ls(t)
			equal(t, "ls after remove", len(lines), 0)
		})
	}
}

// Docker's own cases for an external volume driver, and what else users do.
func TestUse(t *testing.T) {
	t.Parallel()
	h := one(t)
	d := h.docker
	for name, test := range map[string]func(*testing.T, context.Context, *host, *daemon){
		"SameNameOtherOptions": testSameNameOtherOptions, "SameNameOtherDriver": testSameNameOtherDriver,
		"RemoveInUse": testRemoveInUse, "TwoContainers": testTwoContainers, "Cp": testCp, "Anonymous": testAnonymous,
		"Unknown": testUnknown, "RemovedElsewhere": testRemovedElsewhere, "MountFails": testMountFails,
		"BadRequests": testBadRequests, "Filters": testFilters, "Prune": testPrune,
	} {
		t.Run(name, func(t *testing.T) { test(t, t.Context(), h, d) })
	}
}

func testSameNameOtherOptions(t *testing.T, ctx context.Context, h *host, d *daemon) {
	_, err := d.Create(ctx, "same", "flocker", opts.WithCreateOptions(map[string]string{"size": "20M"}))
	noError(t, err)
	// Docker does not tell the plugin of the second time.
	_, err = d.Create(ctx, "same", "flocker", opts.WithCreateOptions(map[string]string{"size": "30M"}))
	noError(t, err)
	h.wantCalls("same", "GCG")
	got, err := d.Get(ctx, "same", opts.WithGetResolveStatus)
	noError(t, err)
	equal(t, "size", fmt.Sprint(got.Status["size"]), "20MiB")
	noError(t, d.Remove(ctx, "same"))
}

func testSameNameOtherDriver(t *testing.T, ctx context.Context, h *host, d *daemon) {
	_, err := d.Create(ctx, "tt", "local")
	noError(t, err)
	_, err = d.Create(ctx, "tt", "flocker")
	wantError(t, err, "volume name must be unique")
	_, err = d.Create(ctx, "tt", "local")
	noError(t, err)
	h.wantCalls("tt", "")
	noError(t, d.Remove(ctx, "tt"))

	_, err = d.Create(ctx, "u", "flocker")
	noError(t, err)
	_, err = d.Create(ctx, "u", "local")
	wantError(t, err, "volume name must be unique")
	noError(t, d.Remove(ctx, "u"))
}

func testRemoveInUse(t *testing.T, ctx context.Context, _ *host, d *daemon) {
	c, err := d.newContainer("c1", "used", "flocker")
	noError(t, err)
	for range 2 {
		wantError(t, d.Remove(ctx, "used"), "volume is in use - [c1]")
		wantError(t, d.Remove(ctx, "used", opts.WithPurgeOnError(true)), "volume is in use - [c1]")
	}
	// Docker may have forgotten its containers, and this is for us to refuse.
	_, err = c.start()
	noError(t, err)
	noError(t, c.rm())
	wantError(t, d.Remove(ctx, "used"), "volume used is in use on host host1")
	wantError(t, d.Remove(ctx, "used", opts.WithPurgeOnError(true)), "volume used is in use on host host1")
	// That purged Docker's record, but not the volume.
	lines, _ := d.ls(t)
	equal(t, "ls", strings.Join(lines, "; "), "flocker used")
	noError(t, c.stop())
	noError(t, d.Remove(ctx, "used"))
	noError(t, d.Remove(ctx, "nonexistent", opts.WithPurgeOnError(true)))
}

func testTwoContainers(t *testing.T, ctx context.Context, h *host, d *daemon) {
	a, err := d.newContainer("a", "shared", "flocker")
	noError(t, err)
	b, err := d.newContainer("b", "shared", "") // as with --volumes-from
	noError(t, err)
	equal(t, "driver of the second", b.Driver, a.Driver)
	pathA, err := a.start()
	noError(t, err)
	pathB, err := b.start()
	noError(t, err)
	equal(t, "path of the second", pathB, pathA)
	noError(t, a.stop())
	noError(t, os.WriteFile(filepath.Join(pathB, "f"), nil, 0o600))
	equal(t, "mounts with one left", len(mounts(h.dir)), 1)
	noError(t, b.stop())
	noError(t, h.site.nothing())
	noError(t, a.rm())
	noError(t, b.rm())
	noError(t, d.Remove(ctx, "shared"))
	h.wantCalls("shared", "GCGGMGMGUGUGGR")
}

func testCp(t *testing.T, ctx context.Context, h *host, d *daemon) {
	c, err := d.newContainer("cp", "cp", "flocker")
	noError(t, err)
	path, err := c.start()
	noError(t, err)
	f, err := os.Create(filepath.Join(path, "f"))
	noError(t, err)
	defer f.Close()
	for range 2 {
		_, err = c.start() // with the id of the running container
		noError(t, err)
		noError(t, c.stop())
	}
	if _, err := f.WriteString("still there"); err != nil {
		t.Errorf("write after cp: %v", err)
	}
	equal(t, "mounts after cp", len(mounts(h.dir)), 1)
	noError(t, f.Close())
	noError(t, c.stop())
	noError(t, h.site.nothing())
	h.wantCalls("cp", "GC"+"GM"+"GMGU"+"GMGU"+"GU")
	noError(t, c.rm())
	noError(t, d.Remove(ctx, "cp"))
}

func testAnonymous(t *testing.T, ctx context.Context, h *host, d *daemon) {
	c, err := d.newContainer("anon", "", "flocker")
	noError(t, err)
	equal(t, "length of the name", len(c.Name), 64)
	_, err = c.start()
	noError(t, err)
	noError(t, c.stop())
	noError(t, c.rm())
	noError(t, d.Remove(ctx, c.Name))
	h.wantCalls(c.Name, "GCGMGUGGR")
}

func testUnknown(t *testing.T, ctx context.Context, h *host, d *daemon) {
	_, err := d.Get(ctx, "dummy")
	wantError(t, err, "get dummy: no such volume")
	if !service.IsNotExist(err) {
		t.Errorf("get: got %v, want what the API makes a 404 of", err)
	}
	if err := d.Remove(ctx, "dummy"); !service.IsNotExist(err) {
		t.Errorf("remove: got %v, want no such volume", err)
	}
	h.wantCalls("dummy", "GG")
}

func testRemovedElsewhere(t *testing.T, ctx context.Context, h *host, d *daemon) {
	remove := func() {
		got, err := h.post(ctx, "VolumeDriver.Remove", `{"Name":"gone"}`)
		noError(t, err)
		equal(t, "remove by somebody else", got, "{}")
	}
	_, err := d.Create(ctx, "gone", "flocker", opts.WithCreateOptions(map[string]string{"size": "20M"}))
	noError(t, err)
	remove()
	if _, err := d.Get(ctx, "gone"); !service.IsNotExist(err) {
		t.Errorf("get: got %v, want no such volume", err)
	}
	_, err = d.Create(ctx, "gone", "flocker", opts.WithCreateOptions(map[string]string{"size": "30M"}))
	noError(t, err)
	got, err := d.Get(ctx, "gone", opts.WithGetResolveStatus)
	noError(t, err)
	equal(t, "size", fmt.Sprint(got.Status["size"]), "30MiB")
	equal(t, "option on record", got.Options["size"], "30M")
	remove()
	_, err = d.Create(ctx, "gone", "local")
	noError(t, err)
	noError(t, d.Remove(ctx, "gone"))
}

func testMountFails(t *testing.T, ctx context.Context, h *host, d *daemon) {
	script := filepath.Join(h.dir, "bin", "mkfs.ext4")
	noError(t, os.WriteFile(script, []byte("#!/bin/sh\necho no luck >&2\nexit 1\n"), 0o700))
	c, err := d.newContainer("f", "fails", "flocker")
	noError(t, err)
	_, err = c.start()
	wantError(t, err, "no luck")
	noError(t, h.site.nothing())
	h.wantCalls("fails", "GCGM")
	noError(t, os.Remove(script))
	_, err = c.start()
	noError(t, err)
	noError(t, c.stop())
	noError(t, c.rm())
	noError(t, d.Remove(ctx, "fails"))
}

// Docker itself checks neither names nor options.
func testBadRequests(t *testing.T, ctx context.Context, h *host, d *daemon) {
	before := d.plugins.references()
	for _, name := range []string{"a/b", "..", "../../etc", " ", "-v", "ü", strings.Repeat("x", 300)} {
		_, err := d.Create(ctx, name, "flocker")
		wantError(t, err, "is not valid: use 1 to 128 letters")
		if _, err := d.Get(ctx, name); !service.IsNotExist(err) {
			t.Errorf("get %q: got %v, want no such volume", name, err)
		}
	}
	for option, want := range map[string]string{
		"sizes": "did you mean size?", "size": "is not a size; use a number and a unit", "fs": "ext4, xfs", "help": "size of the volume, such as 1G",
	} {
		_, err := d.Create(ctx, "bad", "flocker", opts.WithCreateOptions(map[string]string{option: "?"}))
		wantError(t, err, want)
		if _, err := d.Get(ctx, "bad"); !service.IsNotExist(err) {
			t.Errorf("get after -o %s=?: got %v, want no such volume", option, err)
		}
	}
	equal(t, "references to the plugin", d.plugins.references(), before)
	lines, _ := d.ls(t)
	equal(t, "ls", len(lines), 0)
}

func testFilters(t *testing.T, ctx context.Context, _ *host, d *daemon) {
	_, err := d.Create(ctx, "ours", "flocker", opts.WithCreateLabels(map[string]string{"k": "v"}))
	noError(t, err)
	c, err := d.newContainer("c", "busy", "flocker")
	noError(t, err)
	_, err = d.Create(ctx, "theirs", "local")
	noError(t, err)
	for filter, want := range map[filters.KeyValuePair]string{
		filters.Arg("driver", d.plugins.Name()): "flocker busy; flocker ours",
		filters.Arg("driver", "local"):          "local theirs",
		filters.Arg("dangling", "true"):         "flocker ours; local theirs",
		filters.Arg("label", "k=v"):             "flocker ours",
		filters.Arg("name", "bus"):              "flocker busy",
	} {
		lines, _ := d.ls(t, filter)
		slices.Sort(lines)
		equal(t, fmt.Sprintf("ls %v", filter), strings.Join(lines, "; "), want)
	}
	noError(t, c.rm())
	for _, name := range []string{"ours", "busy", "theirs"} {
		noError(t, d.Remove(ctx, name))
	}
}

func testPrune(t *testing.T, ctx context.Context, h *host, d *daemon) {
	_, err := d.Create(ctx, "kept", "flocker")
	noError(t, err)
	_, err = d.Create(ctx, "", "flocker") // anonymous ones are what it is for
	noError(t, err)
	_, err = d.Create(ctx, "pruned", "local")
	noError(t, err)
	report, err := d.Prune(ctx, filters.NewArgs(filters.Arg("all", "true")))
	noError(t, err)
	equal(t, "pruned", strings.Join(report.VolumesDeleted, " "), "pruned")
	lines, _ := d.ls(t)
	equal(t, "volumes left", len(lines), 2)
	for _, line := range lines {
		noError(t, d.Remove(ctx, strings.TrimPrefix(line, "flocker ")))
	}
	h.wantCalls("kept", "GCGGR")
}
