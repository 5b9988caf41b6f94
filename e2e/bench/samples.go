package main

import (
	"slices"
	"sync"
	"time"
)

// samples are how long things took, by name.
type samples struct {
	mu  sync.Mutex
	all map[string][]time.Duration
}

// took calls f and notes down how long it took, unless it failed.
func (s *samples) took(what string, f func() error) error {
	start := time.Now()
	if err := f(); err != nil {
		return err
	}
	s.add(what, time.Since(start))
	return nil
}

func (s *samples) add(what string, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[string][]time.Duration{}
	}
	s.all[what] = append(s.all[what], took)
}

// p returns a percentile of what was noted down, 0 if nothing was.
func (s *samples) p(what string, percent int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return percentile(s.all[what], percent)
}

// percentile returns the least value that percent of all do not exceed.
func percentile[T ~int64 | ~float64](all []T, percent int) T {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[max(0, (len(sorted)*percent+99)/100-1)]
}

// together has callers call f, which is told a number from 0 to n-1, and returns
// how often a second it was called. The first error ends it.
func together(callers, n int, f func(i int) error) (perSecond float64, err error) {
	work := make(chan int, n)
	for i := range n {
		work <- i
	}
	close(work)
	var failed sync.Once
	var all sync.WaitGroup
	start := time.Now()
	for range callers {
		all.Go(func() {
			for i := range work {
				if e := f(i); e != nil {
					failed.Do(func() { err = e })
					return
				}
			}
		})
	}
	all.Wait()
	return float64(n) / time.Since(start).Seconds(), err
}
