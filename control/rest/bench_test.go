package rest_test

import (
	"bytes"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// The state of 10,000 datasets, over TLS. Each time something has changed, as it has on a
// cluster with much to do, and nothing has, as it is most of the time.
func BenchmarkState(b *testing.B) {
	for _, busy := range []bool{true, false} {
		b.Run(map[bool]string{true: "changed", false: "unchanged"}[busy], func(b *testing.B) {
			s := serve(b)
			s.change("", "", "", func(s *ownership.State) { s.Views = many(10_000) })
			client := s.client("anna", true)
			fetch(b, client, s.url(statePath))
			var took []time.Duration
			for b.Loop() {
				if busy {
					b.StopTimer()
					s.change("", "", "", func(*ownership.State) {})
					b.StartTimer()
				}
				begin := time.Now()
				fetch(b, client, s.url(statePath))
				took = append(took, time.Since(begin))
			}
			report(b, took)
		})
	}
}

// One dataset among 10,000, client and server on one core together.
func BenchmarkVolume(b *testing.B) {
	s := serve(b)
	s.change("", "", "", func(s *ownership.State) { s.Views = many(10_000) })
	client := s.client("anna", true)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	fetch(b, client, s.url("/v2/volumes/volume-005000"))
	begin, n := time.Now(), 0
	for b.Loop() {
		fetch(b, client, s.url("/v2/volumes/volume-005000"))
		n++
	}
	b.ReportMetric(float64(n)/time.Since(begin).Seconds(), "requests/s")
}

// From a change until a client of the stream has it, while 10,000 datasets are watched.
func BenchmarkEvent(b *testing.B) {
	s := serve(b)
	s.change("", "", "", func(s *ownership.State) { s.Views = many(10_000) })
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, s.url("/v2/events"), nil)
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	resp, err := s.client("anna").Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	buffer := make([]byte, 64<<10)
	if _, err := resp.Body.Read(buffer); err != nil { // the greeting
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		s.change("mount", "volume-005000", "", func(*ownership.State) {})
		for got := []byte(nil); !bytes.Contains(got, []byte("event: mount")) || !bytes.HasSuffix(got, []byte("\n\n")); {
			n, err := resp.Body.Read(buffer)
			if err != nil {
				b.Fatal(err)
			}
			got = append(got, buffer[:n]...)
		}
		took = append(took, time.Since(begin))
	}
	report(b, took)
}

func fetch(b *testing.B, client *http.Client, url string) {
	b.Helper()
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, url, nil)
	if err != nil {
		b.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if err != nil || resp.StatusCode != 200 || n < 100 || strings.HasSuffix(url, statePath) && n < 1_000_000 {
		b.Fatalf("%d, %d bytes, %v", resp.StatusCode, n, err)
	}
}

// report adds percentiles to the mean.
func report(b *testing.B, took []time.Duration) {
	b.Helper()
	slices.Sort(took)
	for name, at := range map[string]int{"p50-ms": 50, "p95-ms": 95, "p99-ms": 99} {
		b.ReportMetric(float64(took[len(took)*at/100].Microseconds())/1000, name)
	}
}
