package backends

// Option describes one key a user may set: where it is listed, what it defaults
// to and what it is for.
type Option struct {
	Name, Default, Help string
	// Secret values are never shown or logged.
	Secret bool
}
