package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/teststore"
)

// initiator makes and removes the devices of one host.
type initiator struct {
	name   string
	dir    string // for mountpoints
	url    string
	server teststore.Peer
	busy   sync.Map // by grant: a *sync.Mutex, held while its device is made or removed
}

func newInitiator(name, dir, server string) *initiator {
	return &initiator{name: name, dir: dir, url: server, server: teststore.Server(server, nil)}
}

func (i *initiator) operations() map[string]operation {
	return map[string]operation{
		teststore.OpIdentity: func(context.Context, teststore.Request) (teststore.Reply, error) {
			return teststore.Reply{Identity: i.name, Server: i.url}, nil
		},
		teststore.OpConnect:    i.connect,
		teststore.OpDisconnect: i.disconnect,
		teststore.OpDevices: func(ctx context.Context, _ teststore.Request) (teststore.Reply, error) {
			if err := i.compare(ctx, true); err != nil {
				fmt.Fprintln(os.Stderr, "teststore:", err)
			}
			return i.reply()
		},
	}
}

func (i *initiator) reply() (reply teststore.Reply, err error) {
	found, err := devices(i.name)
	for _, d := range found {
		reply.Devices = append(reply.Devices, d.Device)
	}
	return reply, err
}

func (i *initiator) lock(grant string) *sync.Mutex {
	mu, _ := i.busy.LoadOrStore(grant, new(sync.Mutex))
	return mu.(*sync.Mutex) //nolint:forcetypeassert // nothing else is in it
}

// watchEvery is how often an initiator looks whether its host has been cut off, so
// that I/O that waits for a lost answer fails.
const watchEvery = time.Second

// wait sleeps, at most until ctx is done.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// watch looks until ctx is done.
func (i *initiator) watch(ctx context.Context) {
	for {
		wait(ctx, watchEvery)
		if ctx.Err() != nil {
			return
		}
		_ = i.compare(ctx, false) // the server is away; the devices stay
	}
}

// compare makes the devices what the server grants, as far as it can: without the
// server they stay as they are, and so does one that somebody else works on for long.
func (i *initiator) compare(ctx context.Context, login bool) error {
	// First the devices: the grant of one that is here already cannot come later.
	found, err := devices(i.name)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	reply, err := i.server.Call(bounded, teststore.OpGrants, teststore.Request{Initiator: i.name})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(found)+len(reply.Grants))
	try := func(n int, grant string, do func() error) {
		wg.Go(func() {
			mu := i.lock(grant)
			for begin := time.Now(); !mu.TryLock(); wait(ctx, 5*time.Millisecond) {
				if time.Since(begin) > settle || ctx.Err() != nil {
					return
				}
			}
			defer mu.Unlock()
			errs[n] = do()
		})
	}
	for n, d := range found {
		g := slices.IndexFunc(reply.Grants, func(g teststore.Grant) bool { return g.ID == d.Grant })
		switch {
		case g < 0:
			try(n, d.Grant, func() error { return d.cut(ctx, i.name) })
		case d.size < reply.Grants[g].Size:
			try(n, d.Grant, func() error { return d.grow(reply.Grants[g].Size) })
		}
	}
	for n, g := range reply.Grants {
		has := func(d device) bool { return d.Grant == g.ID }
		if login && !slices.ContainsFunc(found, has) {
			try(len(found)+n, g.ID, func() error {
				_, err := i.login(ctx, g)
				if errors.Is(err, backends.ErrNotFound) {
					return nil // given back meanwhile
				}
				return err
			})
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (i *initiator) connect(ctx context.Context, req teststore.Request) (teststore.Reply, error) {
	if len(req.Grants) != 1 {
		return teststore.Reply{}, fmt.Errorf("one grant is connected at a time: %w", backends.ErrInvalid)
	}
	g := req.Grants[0]
	mu := i.lock(g.ID)
	mu.Lock()
	defer mu.Unlock()
	d, err := i.login(ctx, g)
	if err != nil {
		return teststore.Reply{}, err
	}
	return teststore.Reply{Devices: []teststore.Device{d.Device}}, nil
}

// login makes a device for a grant, or returns the one there is. The grant's lock is
// held.
func (i *initiator) login(ctx context.Context, g teststore.Grant) (device, error) {
	if err := ctx.Err(); err != nil {
		return device{}, err // nobody waits any more
	}
	if d, ok, err := find(i.name, g.ID); err != nil || ok {
		if ok {
			err = d.keep()
		}
		return d, err
	}
	reply, err := i.server.Call(ctx, teststore.OpLogin, teststore.Request{Ref: g.Ref, Grant: g.ID, Sequence: time.Now().UnixNano()})
	if err != nil {
		return device{}, err
	}
	d, err := connect(ctx, i.dir, i.name, g, reply.Address)
	if err != nil {
		err = backends.Classify(backends.ErrUnavailable, fmt.Errorf("make a device of volume %s: %w", g.Ref, err))
	}
	return d, err
}

func (i *initiator) disconnect(ctx context.Context, req teststore.Request) (teststore.Reply, error) {
	found, err := devices(i.name)
	if err != nil {
		return teststore.Reply{}, err
	}
	for _, d := range found {
		if d.Ref == req.Ref && d.Token == req.Token && (req.Grant == "" || d.Grant == req.Grant) {
			if err := i.logout(ctx, d); err != nil {
				return teststore.Reply{}, err
			}
		}
	}
	req.Caller = i.name
	return i.server.Call(ctx, teststore.OpDetach, req)
}

func (i *initiator) logout(ctx context.Context, d device) error {
	mu := i.lock(d.Grant)
	mu.Lock()
	defer mu.Unlock()
	d, ok, err := find(i.name, d.Grant)
	if err != nil || !ok {
		return err
	}
	return d.disconnect(ctx, i.name)
}
