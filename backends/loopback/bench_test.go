package loopback_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
	"github.com/flocker-plugin/flocker/backends/loopback"
)

// BenchmarkLoopback reports p50 and p99 of each call, for 1 and 16 callers.
func BenchmarkLoopback(b *testing.B) {
	backendtest.NeedRoot(b)
	for _, callers := range []int{1, 16} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			l := loopback.New(loopback.Config{Dir: b.TempDir(), Node: b.Name()})
			var mu sync.Mutex
			times := map[string][]time.Duration{}
			measure := func(what string, f func() error) error {
				start := time.Now()
				err := f()
				took := time.Since(start)
				mu.Lock()
				defer mu.Unlock()
				times[what] = append(times[what], took)
				return err
			}
			cycle := func() (err error) {
				var vol backends.Volume
				var att backends.Attachment
				ctx := b.Context()
				id := uuid.NewString()
				return errors.Join(
					measure("create", func() (err error) {
						vol, err = l.Create(ctx, backends.CreateRequest{ID: id, Name: "bench", Size: 64 << 20})
						return err
					}),
					measure("attach", func() (err error) {
						att, err = l.Attach(ctx, backends.AttachRequest{Ref: vol.Ref, Volume: id, Token: 1})
						return err
					}),
					measure("detach", func() error { return l.Detach(ctx, att) }),
					measure("delete", func() error { return l.Delete(ctx, vol.Ref) }),
				)
			}
			work := make(chan struct{})
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for range work {
						if err := cycle(); err != nil {
							b.Error(err)
						}
					}
				})
			}
			start := time.Now()
			for b.Loop() {
				work <- struct{}{}
			}
			close(work)
			wg.Wait()
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "cycles/s")
			for what, all := range times {
				slices.Sort(all)
				b.ReportMetric(float64(all[len(all)/2].Microseconds()), what+"-p50-µs")
				b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), what+"-p99-µs")
			}
		})
	}
}
