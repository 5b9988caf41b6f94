package openstack

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/flocker-plugin/flocker/backends"
)

// Cinder's API of version 1 has no attachments of their own: a volume shows the servers that have
// it, when that is complete, and Nova alone knows what is under way. It lists no more
// than a number of volumes, and not which are left out.

// leastV1 is the size of Rackspace's smallest volume.
const leastV1 = 75 * gib

// mostV1 is how many volumes are listed at most.
const mostV1 = 1000

// onServer says that a server has a volume.
type onServer struct {
	Server string `json:"server_id"`
}

// on returns the servers that version 1 shows to have the volume.
func (v *volume) on() ([]onServer, error) {
	var all []onServer
	if len(v.attachments) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(v.attachments, &all); err != nil {
		return nil, fmt.Errorf("%s's attachments of volume %s make no sense: %w: %w", volumes, v.id, err, backends.ErrUnavailable)
	}
	return all, nil
}

// attachedV1 is attached. Of a volume whose state changes Nova is asked: about the servers
// that have noted a token in it. If none of them has it, the one attachment is hidden.
func (b *cinder) attachedV1(ctx context.Context, id string) ([]attachment, error) {
	v, err := b.look(ctx, id)
	if err != nil || v == nil {
		return nil, err
	}
	shown, err := v.on()
	if err != nil {
		return nil, err
	}
	var atts []attachment
	for _, on := range shown {
		a := attachment{Instance: on.Server, Status: v.status}
		if v.status == "in-use" {
			a.Status = "attached"
		}
		atts = append(atts, a)
	}
	if len(atts) > 0 || v.status != "attaching" && v.status != "detaching" && v.status != "reserved" && v.status != "in-use" {
		return atts, nil
	}
	for _, server := range slices.Sorted(maps.Keys(v.tokens)) {
		err := b.get(ctx, compute, "servers/"+server+"/os-volume_attachments/"+id, nil)
		if err == nil {
			atts = append(atts, attachment{Instance: server, Status: v.status})
		} else if !is(err, http.StatusNotFound) {
			return nil, err
		}
	}
	if len(atts) == 0 {
		atts = append(atts, attachment{Status: v.status, hidden: true})
	}
	return atts, nil
}

// hiddenError says that a volume's state changes, and nobody says for whom.
func hiddenError(id string, a attachment) error {
	return fmt.Errorf("%s says that volume %s is %s, and not of which server; it is asked again: %w", volumes, id, a.Status, backends.ErrUnavailable)
}

// listV1 is pages. All volumes of the account are listed, as not all of these services can
// choose by metadata.
func (b *cinder) listV1(ctx context.Context, key, value string) ([]*volume, error) {
	var got struct {
		Volumes []volumeJSON `json:"volumes"`
	}
	if err := b.get(ctx, volumes, fmt.Sprintf("volumes/detail?limit=%d", mostV1), &got); err != nil {
		return nil, err
	}
	if len(got.Volumes) >= mostV1 {
		return nil, fmt.Errorf("%s lists %d volumes, which is as many as its old API ever lists, so that others may be missing: "+
			"delete some of this account's in this region, or use another account or region: %w", volumes, len(got.Volumes), backends.ErrUnavailable)
	}
	var all []*volume
	for _, j := range got.Volumes {
		if j.Metadata[key] == value {
			all = append(all, j.volume())
		}
	}
	return all, nil
}

// fixed is an error if a volume is there and yet its metadata is not: then the service lets
// nobody change it.
func (b *cinder) fixed(ctx context.Context, id string) error {
	v, err := b.look(ctx, id)
	if err != nil || v == nil {
		return err
	}
	if err := b.drop(ctx, id); err != nil {
		return err
	}
	return fmt.Errorf("%s does not let anybody add to the metadata of a volume (POST volumes/ID/metadata), so that nobody could note who has it: "+
		"it cannot be used with this service: %w", volumes, backends.ErrUnavailable)
}
