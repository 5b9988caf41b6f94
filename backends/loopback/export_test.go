package loopback

// SetControl makes l use another path than /dev/loop-control.
func SetControl(l *Loopback, path string) { l.control = path }

const Settle = settle
