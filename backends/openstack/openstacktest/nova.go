package openstacktest

import (
	"net/http"
	"strings"
	"time"
)

func (s *Server) nova(c call) (any, int, *refusal) {
	if c.path[0] == "os-services" {
		return s.services(c)
	}
	if c.path[0] != "servers" || len(c.path) < 2 {
		return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
	}
	i := s.servers[c.path[1]]
	if i == nil {
		return nil, 0, refuse(http.StatusNotFound, "Instance %s could not be found.", c.path[1])
	}
	switch what := strings.Join(c.path[2:], "/"); {
	case what == "" && c.Method == http.MethodGet:
		out := map[string]any{"id": i.id, "status": i.status, "OS-EXT-STS:power_state": i.power, "OS-EXT-STS:task_state": nil}
		out["addresses"] = map[string]any{"private": []any{
			map[string]any{"version": 4, "addr": i.address}, map[string]any{"version": 6, "addr": "fe80::1"},
		}}
		if i.task != "" {
			out["OS-EXT-STS:task_state"] = i.task
		}
		if c.admin {
			out["OS-EXT-SRV-ATTR:host"] = i.host
		}
		return map[string]any{"server": out}, http.StatusOK, nil
	case what == "action" && c.Method == http.MethodPost:
		return s.serverAction(c, i)
	case what == "os-volume_attachments" && c.Method == http.MethodGet:
		all := []any{}
		for volume := range i.disks {
			all = append(all, map[string]string{"id": volume, "volumeId": volume, "serverId": i.id, "device": s.device(i, volume)})
		}
		return map[string]any{"volumeAttachments": all}, http.StatusOK, nil
	case what == "os-volume_attachments" && c.Method == http.MethodPost:
		return s.plug(c, i)
	case len(c.path) == 4 && c.path[2] == "os-volume_attachments" && !i.disks[c.path[3]]:
		return nil, 0, refuse(http.StatusNotFound, "volume_id not found: %s", c.path[3])
	case len(c.path) == 4 && c.Method == http.MethodGet:
		return map[string]any{"volumeAttachment": map[string]string{"volumeId": c.path[3], "device": s.device(i, c.path[3])}}, http.StatusOK, nil
	case len(c.path) == 4 && c.Method == http.MethodDelete:
		return s.unplug(i, s.volumes[c.path[3]])
	}
	return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
}

func (s *Server) services(c call) (any, int, *refusal) {
	host := c.URL.Query().Get("host")
	if !c.admin {
		return nil, 0, refuse(http.StatusForbidden, "Policy doesn't allow os_compute_api:os-services:list to be performed.")
	}
	one := map[string]any{"host": host, "binary": "nova-compute", "state": "up", "status": "enabled"}
	if s.down[host] {
		one["state"] = "down"
	}
	if c.Header.Get("X-OpenStack-Nova-API-Version") == "2.11" {
		one["forced_down"] = s.forced[host]
	}
	return map[string]any{"services": []any{one}}, http.StatusOK, nil
}

// unreachable is what Nova says of a server whose compute host is down.
func (s *Server) unreachable(i *server) *refusal {
	if s.down[i.host] {
		return refuse(http.StatusConflict, "Service is unavailable at this time.")
	}
	return nil
}

// plug attaches a volume. As in Nova, whether the server has it already is looked at
// before the volume is reserved, and a second request in between makes a mess.
func (s *Server) plug(c call, i *server) (any, int, *refusal) {
	var want struct {
		Volume string `json:"volumeId"`
	}
	if bad := c.object("volumeAttachment", &want); bad != nil {
		return nil, 0, bad
	}
	if bad := s.unreachable(i); bad != nil {
		return nil, 0, bad
	}
	if i.disks[want.Volume] {
		return nil, 0, refuse(http.StatusBadRequest, "Invalid volume: Volume %s is already attached to instance %s", want.Volume, i.id)
	}
	if s.cfg.Delay > 0 {
		s.mu.Unlock()
		time.Sleep(s.cfg.Delay / 2)
		s.mu.Lock()
	}
	v := s.volumes[want.Volume]
	switch {
	case v == nil:
		return nil, 0, refuse(http.StatusNotFound, "Volume %s could not be found.", want.Volume)
	case s.cfg.Disks > 0 && len(i.disks) >= s.cfg.Disks:
		return nil, 0, refuse(http.StatusForbidden, "The maximum allowed number of disk devices (%d) to attach to a single instance has been exceeded.", s.cfg.Disks)
	case v.status != "available":
		for _, a := range s.attachments(v.id) {
			if a.instance == i.id && v.status == "reserved" {
				second := &attachment{id: s.id(), volume: v.id, instance: i.id, status: "attaching"}
				s.atts[second.id], v.status = second, "attaching"
				return map[string]any{"volumeAttachment": map[string]string{"volumeId": v.id}}, http.StatusOK, nil
			}
		}
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: Invalid volume: Volume %s status must be available or downloading to reserve, but the current status is %s. (HTTP 400)", v.id, v.status)
	}
	a := &attachment{id: s.id(), volume: v.id, instance: i.id, status: "reserved"}
	delete(s.names[i.id], v.id) // it may get another name than the last time
	device := s.device(i, v.id)
	s.atts[a.id], v.status, i.disks[v.id] = a, "reserved", true
	s.after(s.cfg.Delay, func() {
		if s.atts[a.id] == nil || v.status != "reserved" {
			return
		}
		a.status, v.status = "attaching", "attaching"
		s.after(s.cfg.Delay, func() {
			if s.atts[a.id] == nil || v.status != "attaching" || len(s.attachments(v.id)) > 1 {
				return
			}
			a.status, v.status = "attached", "in-use"
			if xen, ok := s.guest.(Xen); ok {
				xen.Place(i.id, v.id, device)
			}
			if s.guest != nil && i.power == 1 {
				s.guest.Plug(i.id, v.id, v.gib)
			}
		})
	})
	return map[string]any{"volumeAttachment": map[string]string{"volumeId": v.id, "device": device}}, http.StatusOK, nil
}

// unplug detaches a volume. A server that runs and does not let go keeps it, when Nova
// has given up.
func (s *Server) unplug(i *server, v *volume) (any, int, *refusal) {
	if bad := s.unreachable(i); bad != nil {
		return nil, 0, bad
	}
	if v == nil || v.status != "in-use" {
		status := "deleted"
		if v != nil {
			status = v.status
		}
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: Invalid volume: Invalid volume: Volume status must be 'in-use' to detach. Currently: %s (HTTP 400)", status)
	}
	v.status = "detaching"
	s.after(s.cfg.Delay, func() { s.letGo(i, v, 5) })
	return nil, http.StatusAccepted, nil
}

// letGo gives up no sooner than somebody has seen that it tries.
func (s *Server) letGo(i *server, v *volume, tries int) {
	const off = 4
	if s.guest != nil && i.power != off && s.guest.Holds(i.id, v.id) {
		if tries <= 0 && v.shown == v.status {
			v.status = "in-use"
			return
		}
		s.after(max(s.cfg.Delay, time.Millisecond), func() { s.letGo(i, v, tries-1) })
		return
	}
	if s.guest != nil {
		s.guest.Unplug(i.id, v.id)
	}
	for _, a := range s.attachments(v.id) {
		if a.instance == i.id {
			delete(s.atts, a.id)
		}
	}
	v.status = "available"
	s.after(s.cfg.Delay, func() { delete(i.disks, v.id) })
}

func (s *Server) serverAction(c call, i *server) (any, int, *refusal) {
	if _, ok := c.body["os-stop"]; !ok {
		return nil, 0, refuse(http.StatusBadRequest, "There is no such action: %v", c.body)
	}
	switch bad := s.unreachable(i); {
	case bad != nil:
		return nil, 0, bad
	case i.locked:
		return nil, 0, refuse(http.StatusConflict, "Instance %s is locked", i.id)
	case i.status != "ACTIVE" || i.task != "":
		return nil, 0, refuse(http.StatusConflict, "Cannot 'stop' instance %s while it is in vm_state %s", i.id, strings.ToLower(i.status))
	}
	i.task = "powering-off"
	s.after(s.cfg.Delay, func() {
		i.status, i.task, i.power = "SHUTOFF", "", 4
		for volume := range i.disks {
			if s.guest != nil {
				s.guest.Unplug(i.id, volume)
			}
		}
	})
	return nil, http.StatusAccepted, nil
}
