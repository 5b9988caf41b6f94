package driver

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/mount"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// createOptions are what a user may write after `docker volume create -o`, for
// any backend. Each backend adds its own (backends.Properties.Options).
type createOptions struct {
	Size    backends.Size     `option:"size" help:"size of the volume, such as 1G, 500MiB or 1.5T"`
	FS      string            `option:"fs" oneof:"ext4,xfs,btrfs" help:"filesystem"`
	Mkfs    string            `option:"mkfs" help:"extra words for mkfs"`
	Mount   string            `option:"mount" help:"mount options, separated by commas, such as noatime"`
	UID     int               `option:"uid" min:"0" help:"owner of the volume's directory"`
	GID     int               `option:"gid" min:"0" help:"group of the volume's directory"`
	Mode    os.FileMode       `option:"mode" help:"permission bits of the volume's directory, such as 0750"`
	Profile string            `option:"profile" help:"the backend's name for a kind of storage"`
	Backend string            `option:"backend" help:"where the volume is stored"`
	Split   string            `option:"on-partition" oneof:"keep,failover" help:"what becomes of a mounted volume whose host does not reach etcd: it keeps it"`
	Labels  map[string]string `option:"label." help:"a label, shown by docker volume inspect"`
}

// options lists what can be set on a volume of a backend, with this node's
// defaults.
func (d *Driver) options(backend backends.Backend) []backends.Option {
	options := backends.Options[createOptions]()
	for i, o := range options {
		switch o.Name {
		case "size":
			options[i].Default = d.cfg.DefaultSize.String()
		case "fs":
			options[i].Default = d.cfg.DefaultFS
		case "backend":
			options[i].Default = d.cfg.Backend
		case "mode":
			options[i].Default = "0755"
		}
	}
	return append(options, backend.Properties().Options...)
}

// parse makes a volume of what the user wrote, or says what is wrong with it.
func (d *Driver) parse(name string, values map[string]string) (ownership.Volume, error) {
	none := ownership.Volume{}
	backendName := values["backend"]
	if backendName == "" {
		backendName = d.cfg.Backend
	}
	backend, err := d.backend(backendName)
	if err != nil {
		return none, err
	}
	options := d.options(backend)
	if _, asked := values["help"]; asked {
		return none, errors.New("options of docker volume create -d flocker -o KEY=VALUE (no volume was made):\n" +
			backends.Help(options) + "\n" + d.helpBackends(backendName))
	}
	if err := ValidName(name); err != nil {
		return none, err
	}
	if err := backends.Validate(options, values); err != nil {
		return none, err
	}
	o, err := backends.Decode[createOptions](backends.Pick(backends.Options[createOptions](), values))
	if err != nil {
		return none, err
	}
	if o.Size == 0 {
		o.Size = d.cfg.DefaultSize
	}
	if o.FS == "" {
		o.FS = d.cfg.DefaultFS
	}
	size, err := fitSize(int64(o.Size), o.FS, backend.Properties())
	if err != nil {
		return none, err
	}
	if err := mount.CheckMkfs(o.FS, o.Mkfs); err != nil {
		return none, fmt.Errorf("option mkfs: %w", err)
	}
	if err := mount.CheckOptions(o.FS, o.Mount); err != nil {
		return none, fmt.Errorf("option mount: %w", err)
	}
	if o.Split == "failover" {
		return none, noFailover(backend)
	}
	return ownership.Volume{
		ID: uuid.NewString(), Name: name, Backend: backendName, Size: size, FS: o.FS,
		Mkfs: o.Mkfs, Mount: o.Mount, UID: o.UID, GID: o.GID, Mode: uint32(o.Mode.Perm()),
		Profile: o.Profile, Labels: o.Labels,
		Options: backends.Pick(backend.Properties().Options, values),
		Phase:   ownership.PhaseCreating, Created: time.Now().UTC().Truncate(time.Second),
	}, nil
}

// helpBackends lists the backends for people, a line for each, beside the options of
// one of them.
func (d *Driver) helpBackends(shown string) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BACKEND\tTYPE\tCLASS\tPROFILES\tOPTIONS OF ITS OWN")
	for _, name := range slices.Sorted(maps.Keys(d.cfg.Backends)) {
		p := d.properties(name)
		var options []string
		for _, o := range p.Options {
			options = append(options, o.Name)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", name, p.Type, p.Class, list(p.Profiles), list(options))
	}
	_ = w.Flush() // a strings.Builder takes everything
	if len(d.cfg.Backends) > 1 {
		fmt.Fprintf(&b, "the options above are those of backend %s; -o help -o backend=NAME shows another's\n", shown)
	}
	return b.String()
}

func list(words []string) string {
	if len(words) == 0 {
		return "-"
	}
	return strings.Join(words, ", ")
}

// noFailover says why a host that does not reach etcd does not stop its containers
// so that another may start them, on a clock alone. It would need an upper bound
// for the life of a write that was already sent, and a host that cannot be paused
// past its watchdog; no storage here has that bound.
func noFailover(backend backends.Backend) error {
	name := backend.Properties().Name
	if canFence(backend) {
		return fmt.Errorf("option on-partition: failover is not needed on backend %s: it cuts a silent host off from the volume by itself, and another takes over", name)
	}
	return fmt.Errorf("option on-partition: failover is refused on backend %s: nothing bounds how late a write of the silent host may still arrive there, "+
		"so no waiting time keeps two hosts from writing; use keep, and a storage that can cut hosts off", name)
}

// fitSize rounds a size up to what the backend can make, and refuses what it or
// the filesystem cannot.
func fitSize(size int64, fs string, p backends.Properties) (int64, error) {
	least := max(p.MinSize, mount.MinSize(fs))
	unit := max(p.AllocationUnit, 1)
	switch {
	case size < least:
		return 0, fmt.Errorf("size %s is too small for %s on backend %s; the least is %s",
			backends.Size(size), fs, p.Name, backends.Size(least))
	case p.MaxSize > 0 && size > p.MaxSize:
		return 0, fmt.Errorf("size %s is too large for backend %s; the most is %s",
			backends.Size(size), p.Name, backends.Size(p.MaxSize))
	}
	return (size + unit - 1) / unit * unit, nil
}

// sameOptions refuses to pass an existing volume off as one with other options.
// What the user did not write may be anything.
func (d *Driver) sameOptions(have, want ownership.Volume, given map[string]string) error {
	var differ []string
	compare := func(key, has, wants string) {
		if _, ok := given[key]; ok && has != wants {
			differ = append(differ, fmt.Sprintf("%s is %s, not %s", key, orNone(has), orNone(wants)))
		}
	}
	if backend, err := d.backend(have.Backend); err == nil {
		// A size that rounds up to the present one is the same size.
		unit := max(backend.Properties().AllocationUnit, 1)
		if have.Size != (want.Size+unit-1)/unit*unit {
			compare("size", backends.Size(have.Size).String(), backends.Size(want.Size).String())
		}
	}
	compare("fs", have.FS, want.FS)
	compare("mkfs", have.Mkfs, want.Mkfs)
	compare("mount", have.Mount, want.Mount)
	compare("uid", fmt.Sprint(have.UID), fmt.Sprint(want.UID))
	compare("gid", fmt.Sprint(have.GID), fmt.Sprint(want.GID))
	compare("mode", fmt.Sprintf("%04o", have.Mode), fmt.Sprintf("%04o", want.Mode))
	compare("profile", have.Profile, want.Profile)
	compare("backend", have.Backend, want.Backend)
	for key, value := range want.Options {
		compare(key, have.Options[key], value)
	}
	for key, value := range want.Labels {
		compare("label."+key, have.Labels[key], value)
	}
	if len(differ) == 0 {
		return nil
	}
	slices.Sort(differ)
	return fmt.Errorf("volume %s exists with other options: %s; remove it first, or leave these options out",
		have.Name, strings.Join(differ, ", "))
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}

// nameForm is what Docker itself allows for the names of local volumes, with a
// length. Docker checks nothing of names for other drivers.
var nameForm = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// ValidName is an error for a name that no volume can have.
func ValidName(name string) error {
	if nameForm.MatchString(name) {
		return nil
	}
	shown := name
	if len(shown) > 40 {
		shown = strings.ToValidUTF8(shown[:40], "") + "…"
	}
	return fmt.Errorf("volume name %q is not valid: use 1 to 128 letters, digits, _ . and -, beginning with a letter or digit", shown)
}

func fileMode(bits uint32) os.FileMode { return os.FileMode(bits).Perm() }
