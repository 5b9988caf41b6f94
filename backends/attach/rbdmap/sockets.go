package rbdmap

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"time"
)

// socketTimeout bounds a talk with a program of this host.
const socketTimeout = 5 * time.Second

// askClient sends a command to the admin socket of a client of Ceph: a line of JSON that
// ends in a zero byte; the answer has its length in front.
func askClient(ctx context.Context, socket string, command map[string]any) (string, error) {
	conn, err := (&net.Dialer{Timeout: socketTimeout}).DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(socketTimeout)); err != nil {
		return "", err
	}
	text, err := json.Marshal(command)
	if err != nil {
		return "", err
	}
	if _, err := conn.Write(append(text, 0)); err != nil {
		return "", err
	}
	var length uint32
	if err := binary.Read(conn, binary.BigEndian, &length); err != nil {
		return "", err
	}
	answer := make([]byte, min(length, 1<<20))
	_, err = io.ReadFull(conn, answer)
	return string(answer), err
}
