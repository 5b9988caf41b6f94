package ownership

import (
	"context"
	"time"
)

// WatchVolume wakes up whoever waits for a volume: when its owner changes, and
// when this node's request for it is answered. Wake-ups coalesce, and may come
// without a change; none is missed for a change made after WatchVolume returned,
// also when etcd was away meanwhile. It ends with ctx; the channel is never
// closed.
func (m *Map) WatchVolume(ctx context.Context, vid string) <-chan struct{} {
	wake := make(chan struct{}, 1)
	go m.follow(ctx, m.own(vid), false, wake)
	go m.follow(ctx, m.rep(m.me.ID, vid), false, wake)
	return wake
}

// WatchRequests wakes up when nodes ask this one for volumes, or stop asking, in
// the same manner as WatchVolume.
func (m *Map) WatchRequests(ctx context.Context) <-chan struct{} {
	wake := make(chan struct{}, 1)
	go m.follow(ctx, m.key("req", m.me.ID, ""), true, wake)
	return wake
}

// follow wakes up at each change of a key, and each time when it begins to watch:
// what happened before is not known then.
func (m *Map) follow(ctx context.Context, key string, prefix bool, wake chan<- struct{}) {
	m.followEach(ctx, key, prefix, func(bool, []KeyEvent) {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
}

// followEach tells what happens to a key, in order, until ctx ends. begins is true each
// time when it begins to watch.
func (m *Map) followEach(ctx context.Context, key string, prefix bool, tell func(begins bool, events []KeyEvent)) {
	wait := backoff{first: 50 * time.Millisecond, most: m.cfg.Timeout}
	for {
		if m.watch(ctx, key, prefix, tell) {
			wait.next = 0
		}
		if !wait.sleep(ctx) {
			return
		}
	}
}

// watch follows one watch to its end. True if it reported any change.
func (m *Map) watch(ctx context.Context, key string, prefix bool, tell func(begins bool, events []KeyEvent)) (reported bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	late := time.AfterFunc(m.cfg.Timeout, cancel)
	defer late.Stop()
	begins := true
	for res := range m.store.Watch(ctx, key, prefix, 0) {
		late.Stop()
		if res.Err != nil {
			m.log.WithError(res.Err).WithField("key", key).Debug("watch ended")
			break
		}
		reported = reported || len(res.Events) > 0
		tell(begins, res.Events)
		begins = false
	}
	return reported
}
