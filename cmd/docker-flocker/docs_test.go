package main

import (
	"os"
	"strings"
	"testing"
)

// An example is a command of docs/cli.md and what it prints there.
type example struct {
	args []string
	out  string
}

// documented are the examples below one heading.
func documented(t *testing.T, heading string) []example {
	t.Helper()
	text, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("docs/cli.md has no %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var examples []example
	shown := false
	for line := range strings.Lines(section) {
		args, typed := strings.CutPrefix(line, "$ docker flocker ")
		if !typed {
			args, typed = strings.CutPrefix(line, "$ flockerctl ")
		}
		switch {
		case typed:
			examples, shown = append(examples, example{args: strings.Fields(args)}), true
		case strings.HasPrefix(line, "```"):
			shown = false
		case shown:
			examples[len(examples)-1].out += line
		}
	}
	if len(examples) == 0 {
		t.Fatalf("docs/cli.md has no example of %q", heading)
	}
	return examples
}
