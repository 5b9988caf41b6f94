package poll_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

var pace = poll.Pace{First: 250 * time.Millisecond, Most: 2 * time.Second}

func TestUntil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks []time.Duration
		began := time.Now()
		err := pace.Until(t.Context(), time.Minute, "it is being made", func() (bool, error) {
			looks = append(looks, time.Since(began))
			return len(looks) == 20, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if looks[0] != 0 || looks[1] < pace.First/2 || looks[1] > pace.First {
			t.Errorf("the first looks are after %v", looks[:2])
		}
		for i := 10; i < len(looks); i++ { // they come as seldom as they may
			if wait := looks[i] - looks[i-1]; wait < pace.Most/2 || wait > pace.Most {
				t.Errorf("look %d comes %v after the one before", i, wait)
			}
		}
	})
}

func TestUntilTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		never := func() (bool, error) { return false, nil }
		err := pace.Until(t.Context(), 10*time.Second, "it is being made", never)
		if !errors.Is(err, backends.ErrUnavailable) || err.Error() != "it is being made: not within 10s: unavailable" {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("nobody waits"))
		defer cancel()
		err = pace.Until(ctx, 10*time.Second, "it is being made", never)
		if !errors.Is(err, backends.ErrUnavailable) || err.Error() != "it is being made: nobody waits" {
			t.Errorf("got %v", err)
		}
		failed := errors.New("it failed")
		if err := pace.Until(t.Context(), time.Minute, "it is being made", func() (bool, error) { return false, failed }); !errors.Is(err, failed) {
			t.Errorf("got %v", err)
		}
	})
}
