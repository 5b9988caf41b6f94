package rbdmap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// blocklisted is for how long a client is put on the blocklist: longer than any host sleeps
// and wakes up again with something to write. Ceph's own hour is not enough for that, and a
// year of it must be left.
const (
	year        = 365 * 24 * time.Hour
	blocklisted = 5 * year
)

// watchTimeout is a little more than what an OSD waits before it takes a client that is
// silent for gone (osd_client_watch_timeout, 30 s).
const watchTimeout = 35 * time.Second

// Cut puts a client on the cluster's blocklist. It returns when the blocklist shows it, and
// the image does not show it as a watcher any more; gone says that there is no such image.
func (i Image) Cut(ctx context.Context, address string) (gone bool, err error) {
	if address == "" {
		return false, fmt.Errorf("no client of %s is named that could be cut off: %w", i.Spec(), backends.ErrUnavailable)
	}
	_, err = i.Cluster.Run(ctx, "ceph", "osd", "blocklist", "add", address, strconv.Itoa(int(blocklisted.Seconds())))
	if err != nil {
		return false, err
	}
	// As text: what it prints as JSON is none in Ceph 16.
	list, err := i.Cluster.Run(ctx, "ceph", "osd", "blocklist", "ls")
	if err != nil {
		return false, err
	}
	until, ok := listed(string(list), address)
	switch {
	case !ok:
		return false, fmt.Errorf("the blocklist does not show client %s, which was added to it: %w", address, backends.ErrUnavailable)
	case time.Until(until) < year:
		// Ceph leaves an entry as it is that was there before.
		return false, fmt.Errorf("client %s is on the blocklist until %s only, put there by somebody else, such as who has made a snapshot; "+
			"it is tried again then, or at once after: ceph osd blocklist rm %[1]s: %[3]w", address, until.Format(time.RFC3339), backends.ErrUnavailable)
	}
	for started := time.Now(); ; {
		watchers, err := i.Watchers(ctx)
		if errors.Is(err, backends.ErrNotFound) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(watchers, func(w Watcher) bool { return w.Address == address }) {
			return false, nil
		}
		if time.Since(started) > watchTimeout {
			return false, fmt.Errorf("client %s is on the blocklist, and watches %s still: %w", address, i.Spec(), backends.ErrUnavailable)
		}
		if err := qsd.Sleep(ctx, 100*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// listed returns until when a client is on a blocklist, which has a line for each with the
// address and that time first.
func listed(list, address string) (until time.Time, ok bool) {
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == address {
			until, err := time.Parse("2006-01-02T15:04:05-0700", fields[1])
			return until, err == nil
		}
	}
	return time.Time{}, false
}

// Lock keeps other calls of this host, of another process too, from what name stands for.
func Lock(ctx context.Context, dir, name string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock-"+name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			_ = f.Close()
			return nil, backends.Classify(backends.ErrUnavailable, &os.PathError{Op: "lock", Path: f.Name(), Err: err})
		}
		if err := qsd.Sleep(ctx, pause); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("another call for the volume is under way on this host: %w", err)
		}
	}
}
