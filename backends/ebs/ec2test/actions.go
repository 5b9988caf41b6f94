package ec2test

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var deviceForm = regexp.MustCompile(`^/dev/(sd[b-z]|xvd[a-d][a-z])$`)

func (s *Server) attachVolume(p map[string]string) (any, *refusal) {
	i, bad := s.instance(p["InstanceId"])
	if bad != nil {
		return nil, bad
	}
	v, bad := s.volume(p["VolumeId"])
	if bad != nil {
		return nil, bad
	}
	attached := 0
	for _, other := range s.volumes {
		if other.attachment == nil || other.attachment.instance != i.id {
			continue
		}
		if attached++; other.attachment.device == p["Device"] && other != v {
			return nil, refuse("InvalidParameterValue", "Invalid value '%s' for unixDevice. Attachment point %[1]s is already in use", p["Device"])
		}
	}
	switch {
	case v.attachment != nil:
		return nil, refuse("VolumeInUse", "%s is already attached to an instance", v.id)
	case v.state != "available":
		return nil, refuse("IncorrectState", "The volume '%s' is '%s'.", v.id, v.state)
	case v.zone != i.zone:
		return nil, refuse("InvalidVolume.ZoneMismatch", "The volume '%s' is not in the same availability zone as instance '%s'", v.id, i.id)
	case i.state != "running" && i.state != "stopped":
		return nil, refuse("IncorrectInstanceState", "Instance '%s' is not 'running'.", i.id)
	case !deviceForm.MatchString(p["Device"]):
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter device is invalid.", p["Device"])
	case attached >= i.limit:
		return nil, refuse("AttachmentLimitExceeded", "Attachment limit exceeded for instance %s", i.id)
	}
	a := &attachment{i.id, p["Device"], "attaching"}
	v.state, v.attachment = "in-use", a
	s.noted(v)
	answer := a.xml(v.id)
	s.after(s.cfg.Delay, func() {
		if v.attachment != a || a.state != "attaching" {
			return
		}
		a.state = "attached"
		if s.guest != nil && i.state == "running" {
			s.guest.Plug(i.id, v.id, a.device, v.gib)
		}
		s.noted(v)
	})
	return answer, nil
}

func (s *Server) detachVolume(p map[string]string) (any, *refusal) {
	v, bad := s.volume(p["VolumeId"])
	switch {
	case bad != nil:
		return nil, bad
	case v.attachment == nil:
		return nil, refuse("IncorrectState", "Volume '%s' is in the 'available' state.", v.id)
	case p["InstanceId"] != "" && p["InstanceId"] != v.attachment.instance:
		return nil, refuse("InvalidAttachment.NotFound", "The volume '%s' is not attached to instance '%s'", v.id, p["InstanceId"])
	case v.attachment.state == "detaching" || v.attachment.state == "busy":
		return nil, refuse("IncorrectState", "Volume '%s' is '%s'.", v.id, v.attachment.state)
	}
	a := v.attachment
	a.state = "detaching"
	s.noted(v)
	answer := a.xml(v.id)
	s.after(s.cfg.Delay, func() { s.letGo(v, a, p["Force"] == "true") })
	return answer, nil
}

// letGo ends an attachment, unless its instance runs and does not let go.
func (s *Server) letGo(v *volume, a *attachment, force bool) {
	if v.attachment != a || a.state == "attached" {
		return
	}
	i := s.instances[a.instance]
	if i.state == "running" && s.guest != nil && !force && s.guest.Holds(a.instance, v.id) {
		if a.state != "busy" {
			a.state = "busy"
			s.noted(v)
		}
		// It happens whenever it can, as with the real one.
		s.after(max(s.cfg.Delay, 1e6), func() { s.letGo(v, a, false) })
		return
	}
	if s.guest != nil {
		s.guest.Unplug(a.instance, v.id)
	}
	v.state, v.attachment = "available", nil
	s.noted(v)
}

const mostTags = 50

func (s *Server) tagged(p map[string]string, change func(v *volume, key, value string) *refusal) (any, *refusal) {
	for _, id := range indexed(p, "ResourceId") {
		v, bad := s.volume(id)
		if bad != nil {
			return nil, bad
		}
		for n := 1; ; n++ {
			key, ok := p[fmt.Sprintf("Tag.%d.Key", n)]
			if !ok {
				break
			}
			if bad := change(v, key, p[fmt.Sprintf("Tag.%d.Value", n)]); bad != nil {
				return nil, bad
			}
		}
		s.noted(v)
	}
	return done{true}, nil
}

func (s *Server) createTags(p map[string]string) (any, *refusal) {
	return s.tagged(p, func(v *volume, key, value string) *refusal {
		if len(key) > 128 || len(value) > 1024 || strings.HasPrefix(key, "aws:") {
			return refuse("InvalidParameterValue", "Tag key or value is invalid: %s", key)
		}
		if _, ok := v.tags[key]; !ok && len(v.tags) >= mostTags {
			return refuse("TagLimitExceeded", "You've reached the limit of %d tags for %s", mostTags, v.id)
		}
		v.tags[key] = value
		return nil
	})
}

func (s *Server) deleteTags(p map[string]string) (any, *refusal) {
	return s.tagged(p, func(v *volume, key, _ string) *refusal {
		delete(v.tags, key)
		return nil
	})
}

// filters returns the filters of a call.
func filters(p map[string]string) (names []string, values [][]string) {
	for n := 1; ; n++ {
		name, ok := p[fmt.Sprintf("Filter.%d.Name", n)]
		if !ok {
			return names, values
		}
		names = append(names, name)
		values = append(values, indexed(p, fmt.Sprintf("Filter.%d.Value", n)))
	}
}

func (v *volume) fits(filter string, values []string) (bool, *refusal) {
	if len(values) > 200 {
		return false, refuse("FilterLimitExceeded", "The maximum number of filter values specified on a single call is 200")
	}
	if key, ok := strings.CutPrefix(filter, "tag:"); ok {
		value, has := v.tags[key]
		return has && slices.Contains(values, value), nil
	}
	switch filter {
	case "volume-id":
		return slices.Contains(values, v.id), nil
	case "status":
		return slices.Contains(values, v.state), nil
	case "attachment.instance-id":
		return v.attachment != nil && slices.Contains(values, v.attachment.instance), nil
	}
	return false, refuse("InvalidParameterValue", "The filter '%s' is invalid", filter)
}

func (s *Server) describeVolumes(p map[string]string) (any, *refusal) {
	ids := indexed(p, "VolumeId")
	most := number(p, "MaxResults")
	switch {
	case len(ids) > 0 && most > 0:
		return nil, refuse("InvalidParameterCombination", "The parameter volumeSet cannot be used with the parameter maxResults")
	case p["MaxResults"] != "" && (most < 5 || most > 500):
		return nil, refuse("InvalidParameterValue", "Value ( %s ) for parameter maxResults is invalid. Expecting a value between 5 and 500.", p["MaxResults"])
	}
	all := maps.Clone(s.volumes)
	maps.Copy(all, s.gone)
	names, values := filters(p)
	var found []*volume
	for _, v := range all {
		is := s.shown(v)
		if is == nil || len(ids) > 0 && !slices.Contains(ids, is.id) {
			continue
		}
		fits := true
		for i, name := range names {
			ok, bad := is.fits(name, values[i])
			if bad != nil {
				return nil, bad
			}
			fits = fits && ok
		}
		if fits {
			found = append(found, is)
		}
	}
	slices.SortFunc(found, func(a, b *volume) int { return strings.Compare(a.id, b.id) })
	for _, id := range ids {
		if !slices.ContainsFunc(found, func(v *volume) bool { return v.id == id }) && len(names) == 0 {
			return nil, refuse("InvalidVolume.NotFound", "The volume '%s' does not exist.", id)
		}
	}
	out := volumesXML{}
	if after := p["NextToken"]; after != "" {
		if !strings.HasPrefix(after, "after-") {
			return nil, refuse("InvalidParameterValue", "Invalid value '%s' for NextToken", after)
		}
		found = slices.DeleteFunc(found, func(v *volume) bool { return v.id <= strings.TrimPrefix(after, "after-") })
	}
	if most > 0 && len(found) > most {
		found = found[:most]
		out.Next = "after-" + found[most-1].id
	}
	for _, v := range found {
		out.Volumes.Items = append(out.Volumes.Items, volumeXML(v))
	}
	return out, nil
}

func (s *Server) describeInstances(p map[string]string) (any, *refusal) {
	var out instancesXML
	for _, id := range indexed(p, "InstanceId") {
		i, bad := s.instance(id)
		if bad != nil {
			return nil, bad
		}
		out.Reservations.Items = append(out.Reservations.Items, i.reservation())
	}
	if len(out.Reservations.Items) == 0 {
		for _, id := range slices.Sorted(maps.Keys(s.instances)) {
			out.Reservations.Items = append(out.Reservations.Items, s.instances[id].reservation())
		}
	}
	return out, nil
}

func (s *Server) describeInstanceTypes(p map[string]string) (any, *refusal) {
	var out typesXML
	for _, kind := range indexed(p, "InstanceType") {
		t := typeXML{Type: kind}
		t.EBS.Most, t.EBS.Limit = 27, "shared"
		for _, i := range s.instances {
			if i.kind == kind {
				t.EBS.Most = i.limit
			}
		}
		out.Types.Items = append(out.Types.Items, t)
	}
	return out, nil
}

// turn changes the state of instances.
func (s *Server) turn(p map[string]string, change func(i *instance) *refusal) (any, *refusal) {
	var out changesXML
	for _, id := range indexed(p, "InstanceId") {
		i, bad := s.instance(id)
		if bad != nil {
			return nil, bad
		}
		before := i.state
		if bad := change(i); bad != nil {
			return nil, bad
		}
		out.Instances.Items = append(out.Instances.Items, changeXML{id, stateOf(i.state), stateOf(before)})
	}
	return out, nil
}

func (s *Server) stopInstances(p map[string]string) (any, *refusal) {
	force := p["Force"] == "true"
	return s.turn(p, func(i *instance) *refusal {
		switch {
		case i.state == "stopped" || i.state == "stopping" && !force:
			return nil
		case i.state != "running" && i.state != "stopping":
			return refuse("IncorrectInstanceState", "This instance '%s' is not in a state from which it can be stopped.", i.id)
		}
		i.state = "stopping"
		if force || s.guest == nil || s.guest.Obeys(i.id) {
			s.after(s.cfg.Delay, func() { s.off(i, "stopped") })
		}
		return nil
	})
}

func (s *Server) terminateInstances(p map[string]string) (any, *refusal) {
	return s.turn(p, func(i *instance) *refusal {
		if i.state != "terminated" {
			i.state = "shutting-down"
			s.after(s.cfg.Delay, func() { s.off(i, "terminated") })
		}
		return nil
	})
}

// off switches an instance off. Its volumes stay attached if it was stopped, but no
// more than that: what is being detached is let go of.
func (s *Server) off(i *instance, state string) {
	i.state = state
	for _, v := range s.volumes {
		if v.attachment == nil || v.attachment.instance != i.id {
			continue
		}
		if s.guest != nil {
			s.guest.Unplug(i.id, v.id)
		}
		if state == "terminated" {
			v.state, v.attachment = "available", nil
			s.noted(v)
		}
	}
}

func (s *Server) startInstances(p map[string]string) (any, *refusal) {
	return s.turn(p, func(i *instance) *refusal {
		if i.state == "running" {
			return nil
		}
		if i.state != "stopped" {
			return refuse("IncorrectInstanceState", "The instance '%s' is not in a state from which it can be started.", i.id)
		}
		i.state = "pending"
		s.after(s.cfg.Delay, func() {
			i.state = "running"
			for _, v := range s.volumes {
				if a := v.attachment; a != nil && a.instance == i.id && a.state == "attached" && s.guest != nil {
					s.guest.Plug(i.id, v.id, a.device, v.gib)
				}
			}
		})
		return nil
	})
}

func itoa(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}
