package rbd

import "context"

// Attacher makes devices of images.
type Attacher = attacher

// Pretend gives a backend programs and devices of a test.
func (b *Backend) Pretend(exec func(ctx context.Context, program string, args []string) (string, string, int), a Attacher) {
	b.ceph.Exec, b.attacher = exec, a
}
