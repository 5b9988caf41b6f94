package moby

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// What no Docker sends. The answer is JSON with an Err, and the plugin goes on.
func TestWire(t *testing.T) {
	t.Parallel()
	h := one(t)
	huge := `{"Name":"` + strings.Repeat("x", 2<<20) + `"}`
	for name, test := range map[string]struct {
		method, path, proto, body string
		status                    int
		want                      string
	}{
		"EmptyBody":       {"POST", "/VolumeDriver.Create", "1.1", "", 400, "request body lost in Docker's retry"},
		"EmptyUnmount":    {"POST", "/VolumeDriver.Unmount", "1.1", "", 400, "request body lost in Docker's retry"},
		"Garbage":         {"POST", "/VolumeDriver.Mount", "1.1", "{]", 400, "not JSON"},
		"Array":           {"POST", "/VolumeDriver.Remove", "1.1", "[]", 400, "must be an object"},
		"Null":            {"POST", "/VolumeDriver.Remove", "1.1", "null", 400, "Name is missing"},
		"NumberAsName":    {"POST", "/VolumeDriver.Remove", "1.1", `{"Name":1}`, 400, "Name must be a string"},
		"Huge":            {"POST", "/VolumeDriver.Create", "1.1", huge, 413, "larger than 1 MiB"},
		"UnknownEndpoint": {"POST", "/VolumeDriver.Destroy", "1.1", "{}", 404, "no such endpoint"},
		"Get":             {"GET", "/VolumeDriver.List", "1.1", "", 405, "takes POST"},
		"HTTP10":          {"POST", "/VolumeDriver.Get", "1.0", `{"Name":"nothing"}`, 500, "no such volume: nothing"},
		"NoIDToMount":     {"POST", "/VolumeDriver.Mount", "1.1", `{"Name":"v1"}`, 400, "ID is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("unix", h.socket)
			noError(t, err)
			defer conn.Close()
			noError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			_, err = fmt.Fprintf(conn, "%s %s HTTP/%s\r\nHost: \r\nContent-Length: %d\r\n\r\n", test.method, test.path, test.proto, len(test.body))
			noError(t, err)
			go io.WriteString(conn, test.body) // the answer may come before it is read
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			noError(t, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			noError(t, err)
			equal(t, "status", resp.StatusCode, test.status)
			if !strings.HasPrefix(string(body), `{"Err":"`) || !strings.Contains(string(body), test.want) {
				t.Errorf("got %s, want an Err with %q", body, test.want)
			}
		})
	}
	_, err := h.docker.Create(t.Context(), "alive", "flocker")
	noError(t, err)
	noError(t, h.docker.Remove(t.Context(), "alive"))
}
