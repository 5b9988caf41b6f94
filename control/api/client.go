package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"
)

// Socket is where the plugin of a host listens, unless FLOCKER_STATE_DIR, or the
// source of the plugin's mount "state", is another directory.
const Socket = "/var/lib/flocker/control.sock"

// Patience is how long a Client waits for an answer. The plugin gives up before.
const Patience = 30 * time.Second

const maxAnswer = 128 << 20 // a hundred thousand volumes, and more

// Error is what the plugin answers when it refuses, or fails.
type Error struct {
	Status int // HTTP's
	Text   string
}

func (e *Error) Error() string { return e.Text }

// Client asks the plugin of this host.
type Client struct {
	// Socket is the plugin's control socket.
	Socket string
}

// Nodes lists the cluster's nodes.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	var answer Nodes
	err := c.do(ctx, http.MethodGet, "/v1/nodes", nil, &answer)
	return answer.Nodes, err
}

// Volumes lists the cluster's volumes.
func (c *Client) Volumes(ctx context.Context) (Volumes, error) {
	var answer Volumes
	err := c.do(ctx, http.MethodGet, "/v1/volumes", nil, &answer)
	return answer, err
}

// Volume is one volume. An Error with status 404 says that there is none.
func (c *Client) Volume(ctx context.Context, name string) (Volume, error) {
	var answer Volume
	err := c.do(ctx, http.MethodGet, "/v1/volumes/"+url.PathEscape(name), nil, &answer)
	return answer, err
}

// Status is how the cluster is, as the plugin's host sees it.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var answer Status
	err := c.do(ctx, http.MethodGet, "/v1/status", nil, &answer)
	return answer, err
}

// Version is the plugin's.
func (c *Client) Version(ctx context.Context) (Version, error) {
	var answer Version
	err := c.do(ctx, http.MethodGet, "/v1/version", nil, &answer)
	return answer, err
}

// Backends lists the backends of the plugin's host.
func (c *Client) Backends(ctx context.Context) ([]Backend, error) {
	var answer Backends
	err := c.do(ctx, http.MethodGet, "/v1/backends", nil, &answer)
	return answer.Backends, err
}

// Host is what the plugin sees of its own host.
func (c *Client) Host(ctx context.Context) (Host, error) {
	var answer Host
	err := c.do(ctx, http.MethodGet, "/v1/host", nil, &answer)
	return answer, err
}

// ConfirmDead declares a host, given by its name or its node's id, dead. An Error
// with status 409 says that it is live.
func (c *Client) ConfirmDead(ctx context.Context, host string, body Confirmation) (Confirmed, error) {
	var answer Confirmed
	err := c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(host)+"/confirm-dead", body, &answer)
	return answer, err
}

// Reinstate takes a volume out of quarantine.
func (c *Client) Reinstate(ctx context.Context, volume string, body Reinstatement) (Reinstated, error) {
	var answer Reinstated
	err := c.do(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/reinstate", body, &answer)
	return answer, err
}

// AcceptRestore makes the cluster go on with an etcd that was restored.
func (c *Client) AcceptRestore(ctx context.Context, body Acceptance) (Accepted, error) {
	var answer Accepted
	err := c.do(ctx, http.MethodPost, "/v1/cluster/accept-restore", body, &answer)
	return answer, err
}

// Create makes a volume. An Error with status 400 says what is wrong with it.
func (c *Client) Create(ctx context.Context, body Creation) (Volume, error) {
	var answer Volume
	err := c.do(ctx, http.MethodPost, "/v1/volumes", body, &answer)
	return answer, err
}

// Remove destroys a volume and its data. An Error with status 409 says who uses it.
func (c *Client) Remove(ctx context.Context, volume string, body By) error {
	return c.do(ctx, http.MethodDelete, "/v1/volumes/"+url.PathEscape(volume), body, &Done{})
}

// Move says on which host a volume is to be.
func (c *Client) Move(ctx context.Context, volume string, body Movement) (Moved, error) {
	var answer Moved
	err := c.do(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/move", body, &answer)
	return answer, err
}

// Cordon has a host, given by its name or its node's id, get no more volumes.
func (c *Client) Cordon(ctx context.Context, host string, body By) error {
	return c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(host)+"/cordon", body, &Done{})
}

// Uncordon ends that.
func (c *Client) Uncordon(ctx context.Context, host string, body By) error {
	return c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(host)+"/uncordon", body, &Done{})
}

// Drain cordons a host and has it let go of what nothing uses.
func (c *Client) Drain(ctx context.Context, host string, body By) (Drained, error) {
	var answer Drained
	err := c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(host)+"/drain", body, &answer)
	return answer, err
}

// RemoveNode marks a host that does not come back. An Error with status 409 says why not.
func (c *Client) RemoveNode(ctx context.Context, host string, body By) error {
	return c.do(ctx, http.MethodDelete, "/v1/nodes/"+url.PathEscape(host), body, &Done{})
}

func (c *Client) do(ctx context.Context, method, path string, body, answer any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patience, errSilent)
	defer cancel()
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return c.explain(ctx, err)
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return c.strange(err)
	}
	return nil
}

var errSilent = fmt.Errorf("no answer within %v", Patience)

func (c *Client) strange(err error) error {
	return fmt.Errorf("%s does not answer as a Flocker plugin: %w", c.Socket, err)
}

// send returns the answer if it is good.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var sent io.Reader = http.NoBody
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		sent = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://flocker"+path, sent)
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	client := http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", c.Socket)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	var failure Failure
	if json.Unmarshal(data, &failure) != nil || failure.Error == "" {
		failure.Error = fmt.Sprintf("%s answers %s, which is not what a Flocker plugin says", c.Socket, resp.Status)
	}
	return nil, &Error{Status: resp.StatusCode, Text: failure.Error}
}

// explain says what to do about a plugin that gives no answer.
func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no Flocker plugin answers on %s: is it enabled on this host? (docker plugin ls)", c.Socket)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("only root may use %s: type it again with sudo", c.Socket)
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	default:
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err
		}
	}
	return fmt.Errorf("the Flocker plugin on %s broke off: %w; whether anything was done is not known, but it can be asked again", c.Socket, err)
}
