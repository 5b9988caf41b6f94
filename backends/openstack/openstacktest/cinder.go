package openstacktest

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

func (s *Server) cinder(c call) (any, int, *refusal) {
	what := strings.Join(c.path, "/")
	switch {
	case what == "volumes" && c.Method == http.MethodPost:
		return s.createVolume(c)
	case what == "volumes/detail" && c.Method == http.MethodGet:
		return s.listVolumes(c)
	case what == "messages" && c.Method == http.MethodGet:
		var all []map[string]string
		if text := s.messages[c.URL.Query().Get("resource_uuid")]; text != "" {
			all = append(all, map[string]string{"user_message": text})
		}
		return map[string]any{"messages": all}, http.StatusOK, nil
	case c.path[0] == "attachments":
		return s.attachment(c)
	case c.path[0] == "volumes" && len(c.path) >= 2:
		v := s.volumes[c.path[1]]
		if v == nil {
			return nil, 0, refuse(http.StatusNotFound, "Volume %s could not be found.", c.path[1])
		}
		return s.volume(c, v)
	}
	return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
}

func (s *Server) createVolume(c call) (any, int, *refusal) {
	var want struct {
		Name     string            `json:"name"`
		Size     int               `json:"size"`
		Type     string            `json:"volume_type"`
		Zone     string            `json:"availability_zone"`
		Metadata map[string]string `json:"metadata"`
	}
	if bad := c.object("volume", &want); bad != nil {
		return nil, 0, bad
	}
	for key, value := range want.Metadata {
		if key == "" || len(key) > 255 || len(value) > 255 {
			return nil, 0, refuse(http.StatusBadRequest, "Invalid input for field/attribute metadata.")
		}
	}
	switch {
	case want.Size < 1 || len([]rune(want.Name)) > 255:
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: size or name")
	case want.Type != "" && want.Type != Type:
		return nil, 0, refuse(http.StatusNotFound, "Volume type with name %s could not be found.", want.Type)
	case want.Zone != "" && want.Zone != Zone:
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: Availability zone '%s' is invalid.", want.Zone)
	case s.cfg.Quota > 0 && len(s.volumes) >= s.cfg.Quota:
		bad := refuse(http.StatusRequestEntityTooLarge, "VolumeLimitExceeded: Maximum number of volumes allowed (%d) exceeded for quota 'volumes'.", s.cfg.Quota)
		bad.retryAfter = 0
		return nil, 0, bad
	}
	v := &volume{id: s.id(), name: want.Name, status: "creating", gib: want.Size, kind: want.Type, zone: want.Zone, metadata: want.Metadata}
	if v.metadata == nil {
		v.metadata = map[string]string{}
	}
	s.volumes[v.id] = v
	answer := v.json()
	s.after(s.cfg.Delay, func() {
		if v.status != "creating" {
			return
		}
		if v.status = "available"; s.broken != "" {
			v.status, s.messages[v.id] = "error", s.broken
			return
		}
		if s.guest != nil {
			s.guest.Stored(v.id, v.gib)
		}
	})
	return map[string]any{"volume": answer}, http.StatusAccepted, nil
}

func (v *volume) json() map[string]any {
	return map[string]any{
		"id": v.id, "name": v.name, "status": v.status, "size": v.gib, "multiattach": v.multi, "metadata": v.metadata,
		"volume_type": v.kind, "availability_zone": v.zone, "attachments": []any{},
	}
}

func (s *Server) listVolumes(c call) (any, int, *refusal) {
	q := c.URL.Query()
	limit, err := strconv.Atoi(q.Get("limit"))
	if err != nil || limit < 1 || q.Get("sort") != "id:asc" {
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: limit or sort")
	}
	limit = min(limit, 1000)
	want := map[string]string{}
	// Python's own form of a dictionary.
	if json.Unmarshal([]byte(strings.ReplaceAll(q.Get("metadata"), "'", `"`)), &want) != nil {
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: metadata")
	}
	var found []*volume
	for _, v := range s.volumes {
		fits := true
		for key, value := range want {
			fits = fits && v.metadata[key] == value
		}
		if fits {
			found = append(found, v)
		}
	}
	slices.SortFunc(found, func(a, b *volume) int { return strings.Compare(a.id, b.id) })
	if marker := q.Get("marker"); marker != "" {
		if s.volumes[marker] == nil {
			return nil, 0, refuse(http.StatusNotFound, "Volume %s could not be found.", marker)
		}
		found = slices.DeleteFunc(found, func(v *volume) bool { return v.id <= marker })
	}
	out := map[string]any{}
	if len(found) > limit {
		found = found[:limit]
		out["volumes_links"] = []map[string]string{{"rel": "next", "href": s.URL}}
	}
	all := []any{}
	for _, v := range found {
		all = append(all, v.json())
	}
	out["volumes"] = all
	return out, http.StatusOK, nil
}

func (s *Server) volume(c call, v *volume) (any, int, *refusal) {
	switch what := strings.Join(c.path[2:], "/"); {
	case what == "" && c.Method == http.MethodGet:
		v.shown = v.status
		return map[string]any{"volume": v.json()}, http.StatusOK, nil
	case what == "" && c.Method == http.MethodDelete:
		return s.deleteVolume(v)
	case what == "metadata" && c.Method == http.MethodPost:
		var more map[string]string
		if bad := c.object("metadata", &more); bad != nil {
			return nil, 0, bad
		}
		for key, value := range more {
			if len(key) > 255 || len(value) > 255 {
				return nil, 0, refuse(http.StatusBadRequest, "Invalid metadata")
			}
		}
		all := maps.Clone(v.metadata)
		maps.Copy(all, more)
		v.metadata = all
		return map[string]any{"metadata": all}, http.StatusOK, nil
	case len(c.path) == 4 && c.path[2] == "metadata" && c.Method == http.MethodDelete:
		if _, ok := v.metadata[c.path[3]]; !ok {
			return nil, 0, refuse(http.StatusNotFound, "Volume %s has no metadata with key %s.", v.id, c.path[3])
		}
		all := maps.Clone(v.metadata)
		delete(all, c.path[3])
		v.metadata = all
		return nil, http.StatusOK, nil
	case what == "action" && c.Method == http.MethodPost:
		return s.volumeAction(c, v)
	}
	return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
}

func (s *Server) deleteVolume(v *volume) (any, int, *refusal) {
	if v.status != "available" && v.status != "error" || len(s.attachments(v.id)) > 0 || v.snapshots > 0 {
		return nil, 0, refuse(http.StatusBadRequest, "Invalid volume: Volume status must be available or error or error_restoring or error_extending "+
			"or error_managing and must not be migrating, attached, belong to a group, have snapshots or be disassociated from snapshots after volume transfer.")
	}
	v.status = "deleting"
	s.after(s.cfg.Delay, func() {
		delete(s.volumes, v.id)
		if s.guest != nil {
			s.guest.Stored(v.id, 0)
		}
	})
	return nil, http.StatusAccepted, nil
}

func (s *Server) volumeAction(c call, v *volume) (any, int, *refusal) {
	if _, ok := c.body["os-extend"]; ok {
		var to struct {
			Size int `json:"new_size"`
		}
		if bad := c.object("os-extend", &to); bad != nil {
			return nil, 0, bad
		}
		before := v.status
		if before != "available" && before != "in-use" {
			return nil, 0, refuse(http.StatusBadRequest, "Invalid volume: Volume %s status must be '('available', 'in-use')' to extend, currently %s.", v.id, v.status)
		}
		if to.Size <= v.gib {
			return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: New size for extend must be greater than current size.")
		}
		v.status = "extending"
		s.after(s.cfg.Delay, func() {
			v.status, v.gib = before, to.Size
			if s.guest != nil {
				s.guest.Stored(v.id, v.gib)
			}
		})
		return nil, http.StatusAccepted, nil
	}
	if _, ok := c.body["os-reset_status"]; ok {
		var to struct {
			Status   string `json:"status"`
			Attached string `json:"attach_status"`
		}
		switch bad := c.object("os-reset_status", &to); {
		case bad != nil:
			return nil, 0, bad
		case !c.admin:
			return nil, 0, refuse(http.StatusForbidden, "Policy doesn't allow volume_extension:volume_admin_actions:reset_status to be performed.")
		}
		if v.status = to.Status; to.Attached == "detached" {
			for _, a := range s.attachments(v.id) {
				delete(s.atts, a.id)
			}
		}
		return nil, http.StatusAccepted, nil
	}
	return nil, 0, refuse(http.StatusBadRequest, "There is no such action.")
}

func (a *attachment) json() map[string]any {
	var instance any
	if a.instance != "" {
		instance = a.instance
	}
	info := a.info
	if info == nil {
		info = map[string]any{"format": "raw"} // as Cinder has it on NFS
	}
	return map[string]any{"id": a.id, "status": a.status, "instance": instance, "volume_id": a.volume, "connection_info": info}
}

// attachment is Cinder's own attachments, for hosts that are no servers.
func (s *Server) attachment(c call) (any, int, *refusal) {
	if len(c.path) == 1 {
		if c.Method == http.MethodPost {
			return s.createAttachment(c)
		}
		all := []any{}
		for _, a := range s.attachments(c.URL.Query().Get("volume_id")) {
			brief := a.json()
			delete(brief, "connection_info")
			all = append(all, brief)
		}
		return map[string]any{"attachments": all}, http.StatusOK, nil
	}
	a := s.atts[c.path[1]]
	if a == nil {
		return nil, 0, refuse(http.StatusNotFound, "Volume attachment could not be found with filter: attachment_id = %s.", c.path[1])
	}
	v := s.volumes[a.volume]
	switch {
	case len(c.path) == 3 && c.path[2] == "action":
		a.status, v.status = "attached", "in-use"
		return nil, http.StatusNoContent, nil
	case c.Method == http.MethodGet:
		return map[string]any{"attachment": a.json()}, http.StatusOK, nil
	case c.Method == http.MethodPut:
		var want struct {
			Connector map[string]any `json:"connector"`
		}
		if bad := c.object("attachment", &want); bad != nil {
			return nil, 0, bad
		}
		if host, _ := want.Connector["host"].(string); host == "" {
			return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: Connector has no host")
		}
		a.info = map[string]any{"driver_volume_type": "nfs", "export": s.cfg.Share, "name": "volume-" + v.id, "format": "raw", "options": nil, "attachment_id": a.id}
		if s.cfg.RBD != "" {
			a.info = map[string]any{"driver_volume_type": "rbd", "name": s.cfg.RBD + "/volume-" + v.id, "access_mode": "rw", "attachment_id": a.id}
		}
		e, exports := s.guest.(Exporter)
		switch {
		case s.info != nil:
			a.info = s.info
		case exports && a.status == "reserved":
			a.info = e.Export(v.id, a.id, want.Connector)
		}
		answer := a.json() // it says the status of before
		a.status, v.status = "attaching", "attaching"
		return map[string]any{"attachment": answer}, http.StatusOK, nil
	case c.Method == http.MethodDelete && a.instance != "":
		return nil, 0, refuse(http.StatusConflict, "Detach volume from instance %s using the Compute API", a.instance)
	case c.Method == http.MethodDelete:
		s.drop(a)
		v.status = "detaching"
		s.after(s.cfg.Delay, func() {
			if v.status == "detaching" {
				v.status = "available"
			}
		})
		return map[string]any{"attachments": []any{}}, http.StatusOK, nil
	}
	return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
}

func (s *Server) createAttachment(c call) (any, int, *refusal) {
	var want struct {
		Volume   string  `json:"volume_uuid"`
		Instance *string `json:"instance_uuid"`
	}
	if bad := c.object("attachment", &want); bad != nil {
		return nil, 0, bad
	}
	v := s.volumes[want.Volume]
	switch {
	case want.Instance != nil: // not by anybody but Nova
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input for field/attribute instance_uuid. Value: %s. '%[1]s' is not a 'uuid'", *want.Instance)
	case v == nil:
		return nil, 0, refuse(http.StatusNotFound, "Volume %s could not be found.", want.Volume)
	case v.status != "available":
		return nil, 0, refuse(http.StatusBadRequest, "Invalid volume: Volume %s status must be available or downloading to reserve, but the current status is %s.", v.id, v.status)
	}
	a := &attachment{id: s.id(), volume: v.id, status: "reserved"}
	s.atts[a.id], v.status = a, "reserved"
	return map[string]any{"attachment": a.json()}, http.StatusOK, nil
}
