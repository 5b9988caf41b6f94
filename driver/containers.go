package driver

import (
	"context"
	"time"
)

// inUse says whether containers use a volume, and their names if Docker tells.
// It is asked in the background only: Docker may be waiting for us otherwise. A
// false answer means "try to close it": the exclusive open decides. Then told says
// whether Docker was asked, or the references are merely old.
func (d *Driver) inUse(ctx context.Context, ds *dataset) (busy, told bool, containers []string) {
	if ds.refs.total() == 0 {
		return false, true, nil
	}
	names, told := d.askDocker(ctx, ds)
	switch {
	case len(names) > 0:
		return true, told, names
	case told:
		return time.Since(ds.refs.youngest()) < settle, told, nil // else the Unmounts were lost
	default:
		return !d.doubtful(ds), told, ds.snapshot.Load().containers // as of late
	}
}

// doubtful says that every reference is of an earlier epoch and old: its Unmount
// may have been lost with the process that was to hear of it.
func (d *Driver) doubtful(ds *dataset) bool {
	return !ds.refs.current(d.epoch.Load()) && time.Since(ds.refs.youngest()) >= settle
}

// askDocker returns the names of the containers that use a volume; known is false
// if Docker could not be asked.
func (d *Driver) askDocker(ctx context.Context, ds *dataset) (names []string, known bool) {
	name := ds.snapshot.Load().vol.Name
	if d.cfg.Docker == nil || name == "" {
		return nil, false
	}
	containers, err := d.cfg.Docker.Using(ctx, name)
	if err != nil {
		return nil, false
	}
	names = containerNames(containers)
	ds.setContainers(names)
	return names, true
}

// learnLooks is how often Docker is asked after a Mount, two seconds apart: it
// starts the container after our reply, and lists it later still.
const learnLooks = 5

// learnSoon has Docker asked, in a while, which containers use a volume.
func (d *Driver) learnSoon(ds *dataset) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unlearned[ds.id] = learnLooks
}

// learn asks Docker which containers use the volumes that were mounted of late:
// for the people who read `docker volume inspect` and the errors of other hosts.
func (d *Driver) learn(ctx context.Context) {
	for sleep(ctx, jitter(2*time.Second)) {
		d.mu.Lock()
		vids := d.unlearned
		d.unlearned = map[string]int{}
		d.mu.Unlock()
		for vid, looks := range vids {
			ds, done := d.hold(vid)
			mounts := ds.snapshot.Load().mounts
			var names []string
			known := true
			if mounts > 0 {
				names, known = d.askDocker(ctx, ds)
			}
			done()
			if !known {
				break // Docker does not answer; the next Mount reminds us
			}
			if len(names) >= mounts || looks == 1 {
				continue
			}
			d.mu.Lock()
			d.unlearned[vid] = max(d.unlearned[vid], looks-1)
			d.mu.Unlock()
		}
	}
}
