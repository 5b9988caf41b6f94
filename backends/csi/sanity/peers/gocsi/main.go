// Command gocsi runs the mock driver of rexray/gocsi: CSI 1.2, volumes in memory, no
// devices. CSI_ENDPOINT is its socket.
package main

import (
	"context"

	"github.com/rexray/gocsi"
	"github.com/rexray/gocsi/mock/provider"
	"github.com/rexray/gocsi/mock/service"
)

func main() { gocsi.Run(context.Background(), service.Name, "mock", "", provider.New()) }
