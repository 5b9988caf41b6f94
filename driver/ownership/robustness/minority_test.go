package robustness

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// withoutFirst cuts the first member off from the others until the test ends.
// Nodes still reach it.
func (c *cluster) withoutFirst(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); c.leader(t.Context()) != 1; {
		if time.Now().After(end) {
			t.Fatal("the leader does not move")
		}
		_ = c.moveLeader(t.Context(), 1)
	}
	c.isolate(0, traffic{cut: true})
	t.Cleanup(func() {
		if err := c.heal(); err != nil {
			t.Error(err)
		}
	})
}

// testMinority has a node that reaches the cut-off member only: it must not be told
// anything, because nothing that is known there need be true any more.
func testMinority(t *testing.T, c *cluster) {
	alone, _ := c.endpoints(t)
	rest, _ := c.endpoints(t)
	rest = rest[1:]
	w := newWorld(t, 0, "/minority", 2, connect(t, rest), connect(t, alone[:1]), connect(t, rest))
	a, b := w.agents[0].now(), w.agents[1].now()
	ctx := t.Context()
	owner, v, err := a.Claim(ctx, "v0")
	if err != nil {
		t.Fatal(err)
	}
	c.withoutFirst(t)
	if _, err := b.DeclareDead(ctx, "a", ownership.Death{Forced: true}); err != nil {
		t.Fatal(err)
	}
	taken, _, err := b.Seize(ctx, owner, ownership.GroundsConfirmed)
	if err != nil {
		t.Fatal(err)
	}
	demand := func(what string, call func(context.Context) error) {
		t.Helper()
		if err := call(ctx); !errors.Is(err, ownership.ErrUnavailable) {
			t.Errorf("%s, of a volume that is another node's since token %d: got error %v", what, taken.Token, err)
		}
	}
	// The member does not know yet that it is alone.
	check := func(ctx context.Context) error { return a.Check(ctx, "v0", owner.Token) }
	demand("check at once", check)
	hold(ctx, 2*time.Second)
	demand("check", check)
	demand("release", func(ctx context.Context) error { return a.Release(ctx, "v0", owner.Token) })
	demand("retake", func(ctx context.Context) error { return errorOf(a.Retake(ctx, owner)) })
	demand("claim", func(ctx context.Context) error { return errorOf(a.Claim(ctx, "v1")) })
	demand("view", func(ctx context.Context) error { _, err := a.View(ctx, "v0"); return err })
	demand("lookup", func(ctx context.Context) error { _, err := a.LookupKnown(ctx, v.Name, v.ID); return err })
	demand("owned", func(ctx context.Context) error { _, err := a.Owned(ctx); return err })
	demand("list", func(ctx context.Context) error { _, err := a.List(ctx); return err })
	demand("waiting", func(ctx context.Context) error { _, err := a.Waiting(ctx); return err })
	demand("replied", func(ctx context.Context) error { _, _, err := a.Replied(ctx, "v0"); return err })
	demand("nodes", func(ctx context.Context) error { _, err := a.Nodes(ctx); return err })
	demand("died", func(ctx context.Context) error { _, err := a.Died(ctx, "a", "boot1"); return err })
}

// testRegister has nodes that reach all members begin their life.
func testRegister(t *testing.T, c *cluster) {
	c.withoutFirst(t)
	hold(t.Context(), 2*time.Second)
	rest, _ := c.endpoints(t)
	var stores []ownership.Store
	for range 3 {
		all, _ := c.endpoints(t)
		stores = append(stores, connect(t, all))
	}
	newWorld(t, 0, "/register", 1, connect(t, rest[1:]), stores...)
}
