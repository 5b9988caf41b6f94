package csi

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// reference is what a volume's Ref holds: all that CSI wants to be told about the
// volume in each call, and cannot be asked for again. Nothing in it changes during the
// volume's life.
type reference struct {
	Volume  string              `json:"volume"` // the dataset's UUID
	Cluster string              `json:"cluster"`
	Name    string              `json:"name"`
	Driver  string              `json:"driver,omitempty"`
	ID      string              `json:"id,omitempty"`      // the driver's volume_id; empty: not known yet
	Context map[string]string   `json:"context,omitempty"` // the driver's volume_context
	Where   []map[string]string `json:"where,omitempty"`   // its accessible_topology: any of these
	Size    int64               `json:"size,omitempty"`    // when it was made
}

// refPrefix also says in which version the rest is written.
const refPrefix = "csi1-"

func (r reference) String() string {
	text, err := json.Marshal(r) // with sorted keys: the same volume, the same text
	if err != nil {
		panic(err) // strings and numbers
	}
	return refPrefix + base64.RawURLEncoding.EncodeToString(text)
}

func (b *Backend) reference(ref string) (reference, error) {
	var r reference
	text, ok := strings.CutPrefix(ref, refPrefix)
	decoded, err := base64.RawURLEncoding.DecodeString(text)
	if err == nil {
		err = json.Unmarshal(decoded, &r)
	}
	if parsed, bad := uuid.Parse(r.Volume); !ok || err != nil || bad != nil || parsed.String() != r.Volume {
		return reference{}, fmt.Errorf("volume reference %.40q is not of a CSI driver: %w", ref, backends.ErrInvalid)
	}
	return r, nil
}

// find is reference, for a volume of this cluster.
func (b *Backend) find(ref string) (reference, error) {
	r, err := b.reference(ref)
	if err == nil && !b.ours(r.Cluster) {
		err = fmt.Errorf("volume %s: there is none in this cluster: %w", r.Volume, backends.ErrNotFound)
	}
	return r, err
}

// findAs is find, for a caller that knows what it should find.
func (b *Backend) findAs(ref, volume string, token int64) (reference, error) {
	r, err := b.reference(ref)
	switch {
	case err != nil:
		return r, err
	case r.Volume != volume:
		return r, fmt.Errorf("volume %s: this is the reference of volume %s: %w", volume, r.Volume, backends.ErrInvalid)
	case token < 0:
		return r, fmt.Errorf("volume %s: token %d is negative: %w", volume, token, backends.ErrInvalid)
	}
	return b.find(ref)
}

func (r reference) volume(ref string, size int64) backends.Volume {
	return backends.Volume{Ref: ref, ID: r.Volume, Cluster: r.Cluster, Name: r.Name, Size: size}
}

// reachable says whether a node with these topology segments reaches the volume.
func (r reference) reachable(node map[string]string) bool {
	if len(r.Where) == 0 {
		return true
	}
	return slices.ContainsFunc(r.Where, func(where map[string]string) bool {
		for key, value := range where {
			if node[key] != value {
				return false
			}
		}
		return true
	})
}

func segments(topologies []*csi.Topology) []map[string]string {
	var all []map[string]string
	for _, t := range topologies {
		if len(t.GetSegments()) > 0 {
			all = append(all, t.GetSegments())
		}
	}
	slices.SortFunc(all, func(a, b map[string]string) int { return strings.Compare(label(a), label(b)) })
	return all
}

// label is topology segments as people write them.
func label(s map[string]string) string {
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(s)) {
		parts = append(parts, key+"="+s[key])
	}
	return strings.Join(parts, ",")
}

func labels(all []map[string]string) string {
	var parts []string
	for _, s := range all {
		parts = append(parts, label(s))
	}
	return strings.Join(parts, " or ")
}
