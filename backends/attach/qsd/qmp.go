package qsd

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// qmp sends a command to qemu-storage-daemon, and waits until it is done.
func qmp(ctx context.Context, socket, command string, arguments map[string]any) error {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("qemu-storage-daemon: %w", backends.Classify(backends.ErrUnavailable, err))
	}
	defer conn.Close()
	deadline := time.Now().Add(30 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	talk, write := json.NewDecoder(conn), json.NewEncoder(conn)
	var greeting struct{ QMP any }
	if err := talk.Decode(&greeting); err != nil {
		return fmt.Errorf("qemu-storage-daemon: %w", backends.Classify(backends.ErrUnavailable, err))
	}
	for _, request := range []map[string]any{
		{"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments},
	} {
		if err := write.Encode(request); err != nil {
			return fmt.Errorf("qemu-storage-daemon: %w", backends.Classify(backends.ErrUnavailable, err))
		}
		for answered := false; !answered; {
			var answer struct {
				Return *json.RawMessage `json:"return"`
				Error  *struct {
					Desc string `json:"desc"`
				} `json:"error"`
			}
			if err := talk.Decode(&answer); err != nil {
				return fmt.Errorf("qemu-storage-daemon: %w", backends.Classify(backends.ErrUnavailable, err))
			}
			if answer.Error != nil {
				return fmt.Errorf("qemu-storage-daemon: %s: %w", answer.Error.Desc, backends.ErrUnavailable)
			}
			answered = answer.Return != nil // and no event
		}
	}
	return nil
}
