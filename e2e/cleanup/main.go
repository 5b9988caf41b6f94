// Command cleanup removes what test rigs of dead processes have left on this
// machine. Every start of a rig does so too.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := rig.Sweep(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cleanup:", err)
		cancel()
		os.Exit(1)
	}
}
