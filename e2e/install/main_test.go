package main

import (
	"os"
	"path/filepath"
	"testing"
)

// The original's command is never replaced, and ours is found again.
func TestLink(t *testing.T) {
	flockerctl = filepath.Join(t.TempDir(), "flockerctl")
	for range 2 {
		if err := link(); err != nil || !linked() {
			t.Fatalf("linked: %v, %v", linked(), err)
		}
	}
	if err := os.Remove(flockerctl); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(flockerctl, []byte("the original"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := link(); err != nil || linked() {
		t.Errorf("linked: %v, %v", linked(), err)
	}
	if text, err := os.ReadFile(flockerctl); err != nil || string(text) != "the original" {
		t.Errorf("it is %q, %v", text, err)
	}
}
