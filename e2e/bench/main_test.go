//go:build !e2e

package main

import (
	"os"
	"testing"

	"github.com/flocker-plugin/flocker/e2e/apart"
)

// With hosts, whose mounts are not those of this process, no other tests run at the same time.
func TestMain(m *testing.M) { os.Exit(apart.Main(m)) }
