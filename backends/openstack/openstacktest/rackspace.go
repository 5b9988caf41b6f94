package openstacktest

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

// Rackspace's first cloud, as far as its documentation and the clients of its time tell:
// logging in with a key, and Cinder's API of version 1. No Rackspace has judged it.

// RackspaceRegion is where its services are, and at RackspaceElsewhere.
const (
	RackspaceRegion    = "DFW"
	RackspaceElsewhere = "ORD"
)

// LimitV1 is how many volumes are listed at most.
const LimitV1 = 1000

func (s *Server) rackspace(w http.ResponseWriter, c call, path []string) {
	if c.Method != http.MethodPost || strings.Join(path, "/") != "v2.0/tokens" {
		s.fail(w, refuse(http.StatusNotFound, "Resource Not Found"))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls["POST tokens"]++
	if f := s.fault("POST tokens"); f.Status != 0 {
		s.fail(w, refuse(f.Status, "%s", f.Text))
		return
	}
	var auth map[string]struct{ Username, APIKey string }
	d := json.NewDecoder(strings.NewReader(string(c.body["auth"])))
	d.DisallowUnknownFields()
	if d.Decode(&auth) != nil || len(auth) != 1 || c.Header.Get("X-Auth-Token") != "" {
		s.fail(w, refuse(http.StatusBadRequest, "Invalid request body"))
		return
	}
	if with := auth["RAX-KSKEY:apiKeyCredentials"]; with.Username != User || with.APIKey != Secret {
		s.fail(w, refuse(http.StatusUnauthorized, "Unable to authenticate user with credentials provided."))
		return
	}
	token := strings.ReplaceAll(s.id(), "-", "")
	s.tokens[token] = User
	type endpoint map[string]string
	in := func(region, path string) endpoint {
		return endpoint{"region": region, "tenantId": Project, "publicURL": s.URL + path + "/" + Project}
	}
	s.reply(w, http.StatusOK, map[string]any{"access": map[string]any{
		"token": map[string]any{
			"id": token, "expires": time.Now().Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000Z"),
			"tenant": map[string]string{"id": Project, "name": Project}, "RAX-AUTH:authenticatedBy": []string{"APIKEY"},
		},
		"serviceCatalog": []any{
			// The cloud before: as OpenStack it has the same type, and no region.
			map[string]any{"name": "cloudServers", "type": "compute", "endpoints": []endpoint{{"publicURL": s.URL + "/before/v1.0"}}},
			map[string]any{"name": "cloudBlockStorage", "type": "volume", "endpoints": []endpoint{
				in(RackspaceElsewhere, "/elsewhere"), in(RackspaceRegion, "/volume/v1"),
			}},
			map[string]any{"name": "cloudServersOpenStack", "type": "compute", "endpoints": []endpoint{
				in(RackspaceElsewhere, "/elsewhere"), in(RackspaceRegion, "/compute/v2"),
			}},
		},
		"user": map[string]any{"name": User, "RAX-AUTH:defaultRegion": RackspaceElsewhere},
	}}, false)
}

// cinderV1 is Cinder's API of version 1: no attachments, messages, actions and pages.
func (s *Server) cinderV1(c call) (any, int, *refusal) {
	switch what := strings.Join(c.path, "/"); {
	case what == "volumes" && c.Method == http.MethodPost:
		return s.createVolumeV1(c)
	case what == "volumes/detail" && c.Method == http.MethodGet:
		return s.listVolumesV1(), http.StatusOK, nil
	case c.path[0] == "volumes" && len(c.path) >= 2:
		v := s.volumes[c.path[1]]
		switch rest := c.path[2:]; {
		case v == nil:
			return nil, 0, refuse(http.StatusNotFound, "Volume %s could not be found.", c.path[1])
		case len(rest) == 0 && c.Method == http.MethodGet:
			v.shown = v.status
			return map[string]any{"volume": s.jsonV1(v)}, http.StatusOK, nil
		case len(rest) == 0 || rest[0] == "metadata" && !s.fixed:
			return s.volume(c, v)
		}
	}
	return nil, 0, refuse(http.StatusNotFound, "The resource could not be found.")
}

func (s *Server) createVolumeV1(c call) (any, int, *refusal) {
	var want struct {
		Name        string            `json:"display_name"`
		Description string            `json:"display_description"`
		Size        int               `json:"size"`
		Type        string            `json:"volume_type,omitempty"`
		Zone        string            `json:"availability_zone,omitempty"`
		Metadata    map[string]string `json:"metadata"`
	}
	if bad := c.object("volume", &want); bad != nil {
		return nil, 0, bad
	}
	if want.Size < 75 || want.Size > 1024 {
		return nil, 0, refuse(http.StatusBadRequest, "Invalid input received: 'size' parameter must be between 75 and 1024")
	}
	as := map[string]any{"name": want.Name, "size": want.Size, "metadata": want.Metadata}
	if want.Type != "" {
		as["volume_type"] = want.Type
	}
	if want.Zone != "" {
		as["availability_zone"] = want.Zone
	}
	body, err := json.Marshal(as)
	if err != nil {
		panic(err)
	}
	c.body["volume"] = body
	answer, _, bad := s.createVolume(c)
	if bad != nil {
		return nil, 0, bad
	}
	made, _ := answer.(map[string]any)["volume"].(map[string]any)
	return map[string]any{"volume": s.jsonV1(s.volumes[made["id"].(string)])}, http.StatusOK, nil
}

// listVolumesV1 lists those that are oldest by chance, all the account's.
func (s *Server) listVolumesV1() any {
	all := []any{}
	for _, v := range s.volumes {
		if len(all) < LimitV1 {
			all = append(all, s.jsonV1(v))
		}
	}
	return map[string]any{"volumes": all}
}

// jsonV1 is a volume as version 1 shows it: with the servers that have it, not with those
// that are getting it.
func (s *Server) jsonV1(v *volume) map[string]any {
	on := []any{}
	for _, a := range s.attachments(v.id) {
		if a.status == "attached" {
			on = append(on, map[string]any{
				"id": v.id, "volume_id": v.id, "server_id": a.instance, "host_name": nil, "device": s.device(s.servers[a.instance], v.id),
			})
		}
	}
	return map[string]any{
		"id": v.id, "display_name": v.name, "display_description": "", "status": v.status, "size": v.gib, "metadata": v.metadata,
		"volume_type": v.kind, "availability_zone": v.zone, "attachments": on, "snapshot_id": nil, "source_volid": nil, "bootable": "false",
	}
}

// Fix makes metadata what it was when the volume was made, from now on.
func (s *Server) Fix() { s.fixed = true }

// KVM makes Nova name disks as on KVM, from now on.
func (s *Server) KVM() { s.noXen = true }

// Hide gives a volume's attachments and the volume a status; in-use is attached.
func (s *Server) Hide(volume, status string) {
	s.volumes[volume].status = status
	for _, a := range s.attachments(volume) {
		if a.status = status; status == "in-use" {
			a.status = "attached"
		}
	}
}
