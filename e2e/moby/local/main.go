// Command local does with Docker's built-in local volume driver what it is told to,
// one line of a step, a volume's name and its device at a time, and answers with the
// nanoseconds it took or an error. It is a part of e2e/bench, in this module because
// it needs more of Docker than the product.
package main

import (
	"bufio"
	"fmt"
	"os"
	"time"

	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/volume/local"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: local DIRECTORY")
		os.Exit(2)
	}
	root, err := local.New(os.Args[1], idtools.Identity{})
	if err != nil {
		fmt.Fprintln(os.Stderr, "local:", err)
		os.Exit(1)
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var step, name, device string
		if _, err := fmt.Sscan(lines.Text(), &step, &name, &device); err != nil {
			fmt.Println("error:", err)
			continue
		}
		took, err := do(root, step, name, device)
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		fmt.Println(took.Nanoseconds())
	}
}

func do(root *local.Root, step, name, device string) (time.Duration, error) {
	start := time.Now()
	if step == "create" {
		_, err := root.Create(name, map[string]string{"type": "ext4", "device": device})
		return time.Since(start), err
	}
	v, err := root.Get(name)
	if err != nil {
		return 0, err
	}
	switch step {
	case "mount":
		_, err = v.Mount("bench")
	case "unmount":
		err = v.Unmount("bench")
	case "remove":
		err = root.Remove(v)
	default:
		err = fmt.Errorf("unknown step %q", step)
	}
	return time.Since(start), err
}
