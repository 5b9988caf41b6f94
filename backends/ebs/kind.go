package ebs

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/flocker-plugin/flocker/backends"
)

// Profile is a kind of volume: what -o profile=NAME means, or the default.
type Profile struct {
	// Type is one of EBS's volume types; empty is gp3.
	Type string `yaml:"volume_type"`
	// IOPS and Throughput (MiB/s) are what is paid for beyond the type's own; 0 is
	// the type's own.
	IOPS       int `yaml:"iops"`
	Throughput int `yaml:"throughput"`
	// IOPSPerGiB sets IOPS by the volume's size, with IOPS as the most.
	IOPSPerGiB int `yaml:"iops_per_gib"`
}

// options are the create options besides those every volume has.
type options struct {
	Type       string `option:"volume_type" oneof:"gp3,gp2,io1,io2,st1,sc1,standard" help:"EBS volume type; gp3 if neither this nor a profile says otherwise"`
	IOPS       int    `option:"iops" min:"100" help:"provisioned operations a second, of gp3, io1 and io2"`
	Throughput int    `option:"throughput" min:"125" help:"provisioned MiB a second, of gp3"`
}

// builtin are the profiles that the original Flocker had.
var builtin = map[string]Profile{
	"gold":   {Type: "io1", IOPSPerGiB: 30, IOPS: 20000},
	"silver": {Type: "gp2"},
	"bronze": {Type: "standard"},
}

// limits are what EBS documents for a volume type. Regions and accounts may allow
// less, which EC2 says.
type limits struct {
	minGiB, maxGiB                int64
	minIOPS, maxIOPS              int // 0: none can be chosen
	iopsPerGiB                    int
	minThroughput, maxThroughput  int // 0: none can be chosen
	iopsPerThroughput, iopsNeeded int
}

var volumeTypes = map[string]limits{
	"gp3":      {minGiB: 1, maxGiB: 65536, minIOPS: 3000, maxIOPS: 80000, iopsPerGiB: 500, minThroughput: 125, maxThroughput: 2000, iopsPerThroughput: 4},
	"gp2":      {minGiB: 1, maxGiB: 16384},
	"io1":      {minGiB: 4, maxGiB: 16384, minIOPS: 100, maxIOPS: 64000, iopsPerGiB: 50, iopsNeeded: 100},
	"io2":      {minGiB: 4, maxGiB: 65536, minIOPS: 100, maxIOPS: 256000, iopsPerGiB: 1000, iopsNeeded: 100},
	"st1":      {minGiB: 125, maxGiB: 16384},
	"sc1":      {minGiB: 125, maxGiB: 16384},
	"standard": {minGiB: 1, maxGiB: 1024},
}

// profile returns what a name means: a setting, or one of the original's.
func (c Config) profile(name string) (Profile, error) {
	if name == "" {
		return c.Default, nil
	}
	if p, ok := c.Profiles[name]; ok {
		return p, nil
	}
	if p, ok := builtin[name]; ok {
		return p, nil
	}
	return Profile{}, fmt.Errorf("there is no profile %q; use %s: %w", name, strings.Join(c.names(), ", "), backends.ErrInvalid)
}

// names are those that profile takes.
func (c Config) names() []string {
	known := maps.Clone(builtin)
	maps.Copy(known, c.Profiles)
	return slices.Sorted(maps.Keys(known))
}

// kind returns what a volume is to be: its profile, and over it the options.
func (c Config) kind(name string, values map[string]string) (Profile, error) {
	p, err := c.profile(name)
	if err != nil {
		return p, err
	}
	o, err := backends.Decode[options](values)
	if err != nil {
		return p, err
	}
	if p.Type == "" {
		p.Type = "gp3"
	}
	if o.Type != "" && o.Type != p.Type {
		p = Profile{Type: o.Type} // numbers of another type mean nothing
	}
	if o.IOPS != 0 {
		p.IOPS, p.IOPSPerGiB = o.IOPS, 0
	}
	if o.Throughput != 0 {
		p.Throughput = o.Throughput
	}
	return p, nil
}

// fit completes a kind for a size, or says what is wrong with it.
func (p Profile) fit(gib int64) (Profile, error) {
	l, ok := volumeTypes[p.Type]
	wrong := func(format string, args ...any) (Profile, error) {
		return p, fmt.Errorf("%s; %w", fmt.Sprintf(format, args...), backends.ErrInvalid)
	}
	switch {
	case !ok:
		return wrong("EBS has no volume type %q: use %s", p.Type, strings.Join(slices.Sorted(maps.Keys(volumeTypes)), ", "))
	case gib < l.minGiB:
		return wrong("a volume of type %s has at least %d GiB, not %d: ask for more, or for another volume_type or profile", p.Type, l.minGiB, gib)
	case gib > l.maxGiB:
		return wrong("a volume of type %s has at most %d GiB, not %d: ask for less, or for another volume_type or profile", p.Type, l.maxGiB, gib)
	}
	if p.IOPSPerGiB != 0 {
		most := p.IOPS
		p.IOPS = int(min(int64(p.IOPSPerGiB)*gib, int64(l.maxIOPS)))
		if most != 0 {
			p.IOPS = min(p.IOPS, most)
		}
		p.IOPS, p.IOPSPerGiB = max(p.IOPS, l.minIOPS), 0
	}
	switch {
	case p.IOPS == 0 && l.iopsNeeded != 0:
		return wrong("a volume of type %s needs iops, from %d to %d", p.Type, l.minIOPS, l.maxIOPS)
	case p.IOPS != 0 && l.maxIOPS == 0:
		return wrong("iops cannot be chosen for volume type %s: use gp3, io1 or io2", p.Type)
	case p.IOPS != 0 && (p.IOPS < l.minIOPS || p.IOPS > l.maxIOPS):
		return wrong("iops of volume type %s are from %d to %d, not %d", p.Type, l.minIOPS, l.maxIOPS, p.IOPS)
	case int64(p.IOPS) > max(int64(l.iopsPerGiB)*gib, int64(l.minIOPS)):
		return wrong("volume type %s has at most %d iops for each GiB, which is %d for %d GiB, not %d", p.Type, l.iopsPerGiB, int64(l.iopsPerGiB)*gib, gib, p.IOPS)
	case p.Throughput != 0 && l.maxThroughput == 0:
		return wrong("throughput cannot be chosen for volume type %s: use gp3", p.Type)
	case p.Throughput != 0 && (p.Throughput < l.minThroughput || p.Throughput > l.maxThroughput):
		return wrong("throughput of volume type %s is from %d to %d MiB/s, not %d", p.Type, l.minThroughput, l.maxThroughput, p.Throughput)
	case p.Throughput != 0 && p.Throughput*l.iopsPerThroughput > max(p.IOPS, l.minIOPS):
		return wrong("a throughput of %d MiB/s needs at least %d iops", p.Throughput, p.Throughput*l.iopsPerThroughput)
	}
	return p, nil
}
