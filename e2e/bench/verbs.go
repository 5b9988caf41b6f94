package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

const (
	callers = 16 // where there are many
	// settling is the time between a mount and its unmount: filesystems begin
	// something in the background.
	settling = 5 * time.Millisecond
)

// commit writes one key to etcd, which makes it durable.
func (r *run) commit(ctx context.Context) error {
	_, err := r.store.Txn(ctx, ownership.Txn{Then: []ownership.Op{
		{Kind: ownership.OpPut, Key: "/bench", Value: bytes.Repeat([]byte("x"), 300)},
	}})
	return err
}

// one measures each verb with one caller, beside its floor.
func (r *run) one(ctx context.Context, h *host) error {
	return r.turns(ctx, 60, 45*time.Second, func(turn int) error {
		v, b := &volume{host: h, name: r.next(), id: mountID()}, r.area.bare(r.next())
		both := func(what string, ours func(context.Context) error, bare func() error, after ...func(context.Context) error) error {
			return byTurns(turn, func() error {
				return errors.Join(r.times.took(what, func() error { return ours(ctx) }), each(ctx, after...))
			}, func() error {
				return r.times.took("bare "+what, bare)
			})
		}
		mine := func(what string, f func(context.Context) error) error {
			return r.times.took(what, func() error { return f(ctx) })
		}
		down := func() error {
			time.Sleep(settling)
			// What Unmount leaves to the background must not disturb the other.
			return both("unmount", v.unmount, b.down, v.free)
		}
		err := all(
			func() error { return mine("commit", r.commit) },
			func() error {
				return both("create", func(ctx context.Context) error { return h.create(ctx, v.name) }, b.create)
			},
			func() error { return both("first mount", v.mount, func() error { return b.first(ctx) }) },
			down,
		)
		for range 3 {
			if err != nil {
				return err
			}
			err = all(
				func() error { return mine("commit", r.commit) },
				func() error { return both("mount", v.mount, b.up) },
				down,
			)
		}
		return errors.Join(err, all(
			func() error { return v.mount(ctx) },
			func() error { return mine("get, mounted", v.get) },
			func() error { return mine("path", v.path) },
			func() error { return mine("mount, mounted", v.mount) },
			func() error { return mine("unmount, still used", v.unmount) },
			func() error { return each(ctx, v.unmount, v.free) },
			func() error { return r.withLocal(b) },
			func() error { return both("remove", v.remove, b.remove) },
		))
	})
}

// withLocal does with Docker's local driver what b has just done by hand.
func (r *run) withLocal(b *bare) error {
	if r.local == nil {
		return nil
	}
	if err := b.attach(); err != nil {
		return err
	}
	name := r.next()
	for _, step := range []string{"create", "mount", "unmount", "remove"} {
		if step == "unmount" {
			time.Sleep(settling)
		}
		took, err := r.local.do(step, name, b.device)
		if err != nil {
			return err
		}
		r.times.add("local "+step, took)
	}
	return b.detach()
}

// rates are how often a second something was done, by name.
type rates map[string][]float64

// crowd has many callers call f and notes down how long each call took and how
// many there were a second.
func (r *run) crowd(what string, n int, f func(i int) error) error {
	what += " ×16"
	rate, err := together(callers, n, func(i int) error {
		return r.times.took(what, func() error { return f(i) })
	})
	r.rates[what] = append(r.rates[what], rate)
	return err
}

// sixteen measures each verb with many callers and a thousand volumes.
func (r *run) sixteen(ctx context.Context, h *host) error {
	const batches = 10
	batch := r.volumes / batches
	var volumes []*volume
	for turn := range batches {
		if err := byTurns(turn, func() error {
			made := make([]*volume, batch)
			for i := range made {
				made[i] = &volume{host: h, name: r.next(), id: mountID()}
			}
			volumes = append(volumes, made...)
			return r.crowd("create", batch, func(i int) error { return h.create(ctx, made[i].name) })
		}, func() error {
			made := make([]*bare, batch)
			for i := range made {
				made[i] = r.area.bare(r.next())
			}
			err := r.crowd("bare create", batch, func(i int) error { return made[i].create() })
			for _, b := range made {
				err = errors.Join(err, b.remove())
			}
			return err
		}); err != nil {
			return err
		}
	}
	if err := r.turns(ctx, 100, 10*time.Second, func(turn int) error {
		v := volumes[turn*7%len(volumes)]
		list := func() error { return h.list(ctx) }
		return all(
			func() error { return r.times.took("get", func() error { return v.get(ctx) }) },
			func() error { return r.times.took("get", func() error { return v.get(ctx) }) },
			func() error { return r.times.took("list", list) },
		)
	}); err != nil {
		return err
	}
	if err := all(
		func() error {
			return r.crowd("get", r.part(len(volumes)), func(i int) error { return volumes[i].get(ctx) })
		},
		func() error {
			return r.crowd("path", r.part(len(volumes)), func(i int) error { return volumes[i].path(ctx) })
		},
		func() error { return r.crowd("list", r.part(8*callers), func(int) error { return h.list(ctx) }) },
	); err != nil {
		return err
	}
	some := min(r.part(3*callers), len(volumes)/5)
	if err := r.turns(ctx, 5, 40*time.Second, func(turn int) error {
		return byTurns(turn, func() error {
			return r.mounts(ctx, volumes[turn*some:][:some])
		}, func() error {
			return r.bareMounts(ctx, some)
		})
	}); err != nil {
		return err
	}
	removed := volumes[:2*some]
	return r.crowd("remove", len(removed), func(i int) error { return removed[i].remove(ctx) })
}

// mounts mounts and unmounts volumes twice, with many callers.
func (r *run) mounts(ctx context.Context, volumes []*volume) error {
	for _, what := range []string{"first mount", "mount"} {
		err := r.crowd(what, len(volumes), func(i int) error { return volumes[i].mount(ctx) })
		time.Sleep(settling)
		if err == nil {
			err = r.crowd("unmount", len(volumes), func(i int) error { return volumes[i].unmount(ctx) })
		}
		for _, v := range volumes {
			if err == nil {
				err = v.free(ctx)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *run) bareMounts(ctx context.Context, n int) error {
	files := make([]*bare, n)
	for i := range files {
		files[i] = r.area.bare(r.next())
		if err := files[i].create(); err != nil {
			return err
		}
	}
	for _, up := range []struct {
		what string
		do   func(*bare) error
	}{
		{"bare first mount", func(b *bare) error { return b.first(ctx) }},
		{"bare mount", (*bare).up},
	} {
		err := r.crowd(up.what, n, func(i int) error { return up.do(files[i]) })
		time.Sleep(settling)
		if err == nil {
			err = r.crowd("bare unmount", n, func(i int) error { return files[i].down() })
		}
		if err != nil {
			return err
		}
	}
	for _, b := range files {
		if err := b.remove(); err != nil {
			return err
		}
	}
	return nil
}

// memory looks at how much of it a plugin uses that has its etcd elsewhere, after
// many calls about many volumes.
func (r *run) memory(ctx context.Context, b *host) error {
	if err := r.turns(ctx, 6*callers, 10*time.Second, func(int) error { return b.list(ctx) }); err != nil {
		return err
	}
	if _, err := together(callers, r.part(6*callers), func(int) error { return b.list(ctx) }); err != nil {
		return err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.cmd.Process.Pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		name, rest, _ := strings.Cut(line, ":")
		if kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64); err == nil {
			r.rates[name] = append(r.rates[name], kib/1024)
		}
	}
	return nil
}

// move measures from the reply to Unmount on one host to the reply to Mount on the
// other.
func (r *run) move(ctx context.Context, a, b *host) error {
	from, to := &volume{host: a, name: r.next(), id: mountID()}, &volume{host: b, id: mountID()}
	to.name = from.name
	hand := r.area.bare(r.next())
	if err := all(
		func() error { return a.create(ctx, from.name) },
		func() error { return from.mount(ctx) },
		hand.create,
		func() error { return hand.first(ctx) },
	); err != nil {
		return err
	}
	if err := r.turns(ctx, 60, 20*time.Second, func(turn int) error {
		time.Sleep(settling)
		err := byTurns(turn, func() error {
			if err := from.unmount(ctx); err != nil {
				return err
			}
			return r.times.took("move", func() error { return to.mount(ctx) })
		}, func() error {
			return r.times.took("bare move", func() error { return errors.Join(hand.down(), hand.up()) })
		})
		from, to = to, from
		return err
	}); err != nil {
		return err
	}
	return errors.Join(each(ctx, from.unmount, from.free), hand.down(), hand.remove())
}
