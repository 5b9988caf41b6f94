package openstack

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// Fence implements backends.Fencer. What it goes by is that Cinder and Nova show the
// volume detached after an ordinary detach: they do when the hypervisor has taken the
// disk away, from a server that runs or one that is off. A server that does not let go
// is stopped.
func (b *Nova) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	evidence, err := b.fence(ctx, req)
	if err != nil {
		return "", fmt.Errorf("cut %s off from volume %s: %w", req.Node, req.Volume, err)
	}
	return evidence, nil
}

func (b *Nova) fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	if !uuidForm.MatchString(req.Identity) {
		return "", fmt.Errorf("%q is no server of Nova's: %w", req.Identity, backends.ErrInvalid)
	}
	v, err := b.find(ctx, req.Ref)
	if err != nil {
		return "", err
	}
	if v.ID != req.Volume {
		return "", fmt.Errorf("%s is volume %s: %w", v.id, v.ID, backends.ErrInvalid)
	}
	on, err := b.on(ctx, v.id, req.Identity)
	if err != nil {
		return "", err
	}
	switch token := v.tokens[req.Identity].token; {
	case !on:
		return fmt.Sprintf("volume %s is not attached to server %s", v.id, req.Identity), nil
	case token > req.Token:
		return fmt.Sprintf("volume %s is attached to server %s under the younger token %d only", v.id, req.Identity, token), nil
	}
	return b.cut(ctx, v.id, req.Identity)
}

// on says that Cinder has a volume attached to a server.
func (b *Nova) on(ctx context.Context, id, server string) (bool, error) {
	atts, err := b.attached(ctx, id)
	if err == nil && len(atts) == 1 && atts[0].hidden {
		err = hiddenError(id, atts[0])
	}
	return slices.ContainsFunc(atts, func(a attachment) bool { return a.Instance == server }), err
}

// cut takes a volume away from a server, whatever that takes.
func (b *Nova) cut(ctx context.Context, id, server string) (string, error) {
	s, err := b.state(ctx, server)
	if err != nil {
		return "", err
	}
	if !s.off() {
		err := b.pull(ctx, id, server, b.pace.grace)
		if err == nil {
			return fmt.Sprintf("server %s has let go of volume %s, which Cinder and Nova show detached", server, id), nil
		}
		if err = b.stop(ctx, server, err); err != nil {
			return b.outOfReach(ctx, id, server, err)
		}
		if s, err = b.awaitOff(ctx, server); err != nil {
			return b.outOfReach(ctx, id, server, err)
		}
	}
	if err := b.pull(ctx, id, server, b.pace.settle); err != nil {
		return b.outOfReach(ctx, id, server, err)
	}
	return fmt.Sprintf("server %s is %s, power state %d, and Cinder and Nova show volume %s detached from it", server, s.Status, s.Power, id), nil
}

// server is a server as Nova shows it.
type server struct {
	Status string `json:"status"`
	Task   string `json:"OS-EXT-STS:task_state"`
	Power  int    `json:"OS-EXT-STS:power_state"`
	Host   string `json:"OS-EXT-SRV-ATTR:host"` // shown to administrators
}

// off says that nothing of a server runs.
func (s server) off() bool {
	const shutdown = 4
	return s.Task == "" && s.Status == "SHUTOFF" && s.Power == shutdown
}

// state returns what Nova says of a server.
func (b *Nova) state(ctx context.Context, id string) (server, error) {
	var got struct {
		Server server `json:"server"`
	}
	err := b.get(ctx, compute, "servers/"+id, &got)
	if is(err, http.StatusNotFound) { // which says nothing of its compute host
		err = fmt.Errorf("%s knows no server %s any more, and Cinder has the volume attached to it; make sure that its compute host does not run it, "+
			"then have an administrator get the volume free (openstack volume set --detached --state available): %w", compute, id, backends.ErrUnavailable)
	}
	return got.Server, err
}

// stop asks Nova to stop a server which does not let go of a volume, as why says.
func (b *Nova) stop(ctx context.Context, id string, why error) error {
	slow, ok := errors.AsType[*stuck](why)
	self, err := b.Identity(ctx)
	switch {
	case !ok:
		return why
	case err != nil:
		return err
	case ctx.Err() != nil:
		return why
	case id == self:
		return fmt.Errorf("this host itself does not let go of it: %w", slow)
	case b.cfg.KeepServers:
		return fmt.Errorf("%w; it may still write, and keep_servers is set: stop server %s by hand (openstack server stop)", slow, id)
	}
	err = b.cinder.send(ctx, request{
		to: compute, method: http.MethodPost, path: "servers/" + id + "/action", body: map[string]any{"os-stop": nil},
	})
	switch {
	case is(err, http.StatusConflict) && says(err, "service is unavailable"):
		return &hostDown{id, err}
	case is(err, http.StatusConflict) && says(err, "locked"):
		return fmt.Errorf("%w; unlock it, or stop it by hand: %w", err, backends.ErrUnavailable)
	case is(err, http.StatusConflict):
		s, stateErr := b.state(ctx, id)
		if stateErr != nil || s.off() || s.Task == "powering-off" {
			return stateErr
		}
		return fmt.Errorf("%w; it is %s: stop server %s by hand: %w", err, s.Status, id, backends.ErrUnavailable)
	}
	return err
}

// awaitOff waits until a server is off.
func (b *Nova) awaitOff(ctx context.Context, id string) (off server, err error) {
	stopping := false
	asked := time.Now()
	err = b.pace.Until(ctx, b.pace.stop, "server "+id+" is being stopped", func() (bool, error) {
		s, err := b.state(ctx, id)
		if err != nil {
			return false, err
		}
		off = s
		switch {
		case s.off():
			return true, nil
		case s.Task != "":
			stopping = true
		case s.Status == "ACTIVE" && (stopping || time.Since(asked) > b.pace.grace):
			return false, fmt.Errorf("server %s was asked to stop, and is %s: %w", id, s.Status, backends.ErrUnavailable)
		}
		return false, nil
	})
	return off, err
}

// outOfReach goes on where Nova does not reach the compute host of a server, if err says
// that, and if it may.
func (b *Nova) outOfReach(ctx context.Context, id, server string, err error) (string, error) {
	down, ok := errors.AsType[*hostDown](err)
	if !ok {
		return "", err
	}
	if b.cfg.rackspace() {
		return "", fmt.Errorf("%w; ask Rackspace's support to make sure that the server does not run, and delete it then", down)
	}
	if !b.cfg.AllowAdminFence {
		return "", fmt.Errorf("%w; make sure that this host is off, then have an administrator evacuate or delete the server; "+
			"or set allow_admin_fence, with an administrator's credentials", down)
	}
	s, err := b.state(ctx, server)
	if err != nil {
		return "", err
	}
	if s.Host == "" {
		return "", fmt.Errorf("%w, nor does Nova say which one that is: allow_admin_fence needs an administrator's credentials", down)
	}
	if err := b.forcedDown(ctx, s.Host); err != nil {
		return "", err
	}
	if on, err := b.on(ctx, id, server); err != nil || !on {
		return fmt.Sprintf("volume %s is not attached to server %s any more", id, server), err
	}
	err = b.cinder.send(ctx, request{
		to: volumes, method: http.MethodPost, path: "volumes/" + id + "/action",
		body: map[string]any{"os-reset_status": map[string]any{"status": "available", "attach_status": "detached"}},
	})
	if err != nil {
		return "", err
	}
	err = b.pace.Until(ctx, b.pace.settle, "Cinder was told that volume "+id+" is detached", func() (bool, error) {
		on, err := b.on(ctx, id, server)
		return err == nil && !on, err
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("an administrator has forced compute host %s down in Nova, so Cinder was told that volume %s is detached from server %s", s.Host, id, server), nil
}

// forcedDown is nil if an administrator has told Nova that a compute host is down, which
// is to be done after it was switched off.
func (b *Nova) forcedDown(ctx context.Context, host string) error {
	var got struct {
		Services []struct {
			Host   string `json:"host"`
			State  string `json:"state"`
			Forced bool   `json:"forced_down"`
		} `json:"services"`
	}
	query := url.Values{"host": {host}, "binary": {"nova-compute"}}
	err := b.cinder.send(ctx, request{
		to: compute, method: http.MethodGet, path: "os-services?" + query.Encode(), into: &got,
		newer: "2.11", // the first that says so
	})
	if err != nil {
		return err
	}
	var seen []string
	for _, s := range got.Services {
		if s.Host != host {
			continue
		}
		if s.Forced && s.State == "down" {
			return nil
		}
		seen = append(seen, s.State)
	}
	return fmt.Errorf("compute host %s is %s for Nova, but was not forced down: make sure that it is off, then type: "+
		"openstack compute service set --down %[1]s nova-compute: %[3]w", host, strings.Join(seen, ", "), backends.ErrUnavailable)
}
