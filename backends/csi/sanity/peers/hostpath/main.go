// Command hostpath runs the host-path driver of kubernetes-csi/drivers 1.0.2: CSI 1.0,
// directories only. Its argument is its socket.
package main

import (
	"os"

	"github.com/kubernetes-csi/drivers/pkg/hostpath"
)

func main() { hostpath.GetHostPathDriver().Run("csi-hostpath", "node", "unix://"+os.Args[1]) }
