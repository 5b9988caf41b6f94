package rbdmap

import "testing"

// SetSysfs makes the kernel's driver one of a test.
func SetSysfs(tb testing.TB, dir string) {
	tb.Helper()
	usual := sysfs
	sysfs = dir
	tb.Cleanup(func() { sysfs = usual })
}

// Fail makes sense of what a program has printed.
func (c Cluster) Fail(program string, code int, printed string) error {
	return c.failure(program, code, printed)
}

// The internals that have tests of their own.
var (
	HoldClosed = holdClosed
	MapKernel  = (*Attacher).mapKernel
	Escape     = escape
	Unescape   = unescape
	Speaks     = speaks
	AskAsok    = askClient
)
