package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// The pieces of a takeover, from a plugin's log as dockerd writes it.
func TestSplit(t *testing.T) {
	killed := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(seconds float64) time.Time { return killed.Add(time.Duration(seconds * float64(time.Second))) }
	for _, c := range []struct {
		name        string
		lines       map[float64]string
		ours, fence time.Duration
		failed      int
	}{
		{
			name: "Mount comes late",
			lines: map[float64]string{
				18.1: `taking`, 18.15: `taken`, 18.5: `done 500.00ms`,
			},
			ours: 500 * time.Millisecond, fence: 50 * time.Millisecond,
		},
		{
			name: "Mount waits",
			lines: map[float64]string{
				13.1: `taking`, 13.2: `taken`, 13.3: `done 12800.00ms`,
			},
			ours: 300 * time.Millisecond, fence: 100 * time.Millisecond,
		},
		{
			name: "Mount is repeated",
			lines: map[float64]string{
				14: `failed 1000.00ms`, 19.1: `taking`, 19.2: `taken`, 19.5: `done 500.00ms`, 30: `done 1.00ms`,
			},
			ours: 6500 * time.Millisecond, fence: 100 * time.Millisecond, failed: 1,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := split{killed: killed, leaseEnd: at(10)}
			for _, second := range slices.Sorted(maps.Keys(c.lines)) {
				what, took, _ := strings.Cut(c.lines[second], " ")
				for _, volume := range []string{"other", "db"} {
					s.read(logLine{at(second), fmt.Sprintf(map[string]string{
						"taking": `time="2026-11-22T04:06:40Z" level=warning msg="level=warning msg=\"taking it over from host host2 (silent)\" volume=%[1]s" plugin=56c4`,
						"taken":  `time="2026-11-22T04:06:40Z" level=warning msg="level=warning msg=\"taken over from host host2 (token 7), which was cut off: no process serves it\" volume=%[1]s" plugin=56c4`,
						"done":   `time="2026-11-22T04:06:40Z" level=info msg="level=info msg=done mount_id=733a op=mount took=%[2]s volume=%[1]s" plugin=56c4`,
						"failed": `time="2026-11-22T04:06:40Z" level=warning msg="level=warning msg=failed err=\"volume db is gone\" mount_id=733a op=mount took=%[2]s volume=%[1]s" plugin=56c4`,
					}[what]+"\n", volume, took)}, "db")
				}
			}
			if got := s.ours(); got != c.ours {
				t.Errorf("ours is %v, want %v", got, c.ours)
			}
			if got := s.settled.Sub(s.seized); got != c.fence {
				t.Errorf("the fence took %v, want %v", got, c.fence)
			}
			if s.failed != c.failed {
				t.Errorf("%d Mounts failed, want %d", s.failed, c.failed)
			}
		})
	}
}

func TestTakeoverTable(t *testing.T) {
	run := &takeovers{machine: "A machine.", loads: []float64{1}, failed: 2, writers: []*writer{{title: "met"}, {title: "missed"}}}
	for title, took := range map[string]time.Duration{"met": 2 * time.Second, "missed": 2001 * time.Millisecond} {
		run.times.add(title+ours, took)
		run.times.add(title+writesAgain, 20*time.Second)
	}
	run.times.add("met"+mountComes, 18*time.Second)
	for _, want := range []string{
		"A machine. Load at the kills, p50 / p95 / max: 1.0 / 1.0 / 1.0.\n\n1 kills; seconds, p50 / p95 / max:\n\n| what | met | missed | target, p95 | met |\n",
		"| " + writesAgain + " | 20.00 / 20.00 / 20.00 | 20.00 / 20.00 / 20.00 | ≤ 20s | yes |\n",
		"| " + mountComes + " | 18.00 / 18.00 / 18.00 |  |  |  |\n",
		"| " + ours + " | 2.00 / 2.00 / 2.00 | 2.00 / 2.00 / 2.00 | ≤ 2s | **no** |\n",
		"\nMounts that failed and were repeated: 2. ",
	} {
		if got := run.markdown(); !strings.Contains(got, want) {
			t.Errorf("there is no %q in\n%s", want, got)
		}
	}
	if got := run.missed(); got != 1 {
		t.Errorf("got %d missed, want 1", got)
	}
}
