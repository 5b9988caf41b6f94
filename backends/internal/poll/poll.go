// Package poll waits for what a storage system does in its own time.
package poll

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Pace is how often to look.
type Pace struct {
	First time.Duration // until the second look at the latest
	Most  time.Duration // between two looks at the most
}

// Until makes look at once and again, later each time, until it says that it is done, which
// what names. It is backends.ErrUnavailable if that takes longer than limit, or than ctx.
func (p Pace) Until(ctx context.Context, limit time.Duration, what string, look func() (done bool, err error)) error {
	deadline := time.Now().Add(limit)
	for wait := p.First; ; wait = min(wait*3/2, p.Most) {
		if done, err := look(); done || err != nil {
			return err
		}
		if time.Now().Add(wait).After(deadline) {
			return fmt.Errorf("%s: not within %s: %w", what, limit, backends.ErrUnavailable)
		}
		if err := Sleep(ctx, Jitter(wait)); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// Jitter is a time from half of wait to all of it.
func Jitter(wait time.Duration) time.Duration { return wait/2 + rand.N(wait/2) }

// Sleep waits. It is backends.ErrUnavailable if ctx ends first.
func Sleep(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return backends.Classify(backends.ErrUnavailable, context.Cause(ctx))
	}
}
