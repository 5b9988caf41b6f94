package mount

// WithFault returns a System whose steps fail as fault says.
func WithFault(fault func(step string) error) *System { return &System{fault: fault} }

// Interruptible is what the kernel's mount runs in.
var Interruptible = interruptible
