//go:build !linux

package ownership

import "time"

var started = time.Now()

// bootTime is as good as there is without CLOCK_BOOTTIME: it stops in suspend.
func bootTime() time.Duration { return time.Since(started) }
