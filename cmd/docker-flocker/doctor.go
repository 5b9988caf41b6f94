package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/control/certs"
)

// facts are all that the checks go by.
type facts struct {
	machine

	// absent is why the plugin does not answer; without it there is the rest.
	absent   error
	status   api.Status
	backends []api.Backend
	unknown  error // why the plugin did not say what is below
	host     api.Host
	// again is the same a moment later, and before the host's mounts a moment earlier.
	again  api.Host
	before []mounted
}

// A finding is something that is not as it should be, and what to do about it.
type finding struct{ text, remedy string }

// checks are what doctor looks at.
var checks = []struct {
	name   string
	asks   bool // the plugin has to answer
	inside bool // and to say what it sees of its host
	look   func(*facts) []finding
}{
	{"kernel", false, false, checkKernel},
	{"clock", false, false, checkClock},
	{"plugin", false, false, checkPlugin},
	{"tools", true, true, checkTools},
	{"certificates", true, true, checkCertificates},
	{"etcd", true, false, checkEtcd},
	{"storage", true, false, checkStorage},
	{"mounts", true, true, checkMounts},
	{"leaks", true, true, checkLeaks},
}

// A verdict is a line of what doctor says: a check that found nothing, or one thing
// that a check has found.
type verdict struct {
	Check  string `json:"check"`
	State  string `json:"state"`
	Text   string `json:"text,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// The states of a verdict.
const (
	well       = "well"
	wrong      = "wrong"
	notChecked = "not checked"
)

func examine(f *facts) (verdicts []verdict) {
	for _, c := range checks {
		if c.asks && f.absent != nil || c.inside && f.unknown != nil {
			verdicts = append(verdicts, verdict{Check: c.name, State: notChecked})
			continue
		}
		found := c.look(f)
		if len(found) == 0 {
			verdicts = append(verdicts, verdict{Check: c.name, State: well})
		}
		for _, one := range found {
			verdicts = append(verdicts, verdict{c.name, wrong, one.text, one.remedy})
		}
	}
	return verdicts
}

func (c *cli) doctor() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong on this host, and say what to do",
		Long: "Look for what is wrong on this host, and say what to do.\n\n" +
			"It looks at the kernel, the clock, the plugin, its programs and certificates, etcd,\n" +
			"the storage, and at what is mounted and attached. It changes nothing. It ends\n" +
			"with 1 if it has found something. What needs attention elsewhere in the cluster is\n" +
			"in status.",
		Example: c.example("doctor", "doctor --format json"),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tmpl, err := o.template()
			if err != nil {
				return err
			}
			verdicts := examine(c.facts(cmd.Context()))
			if tmpl != nil {
				err = listing[verdict]{}.print(c.out, o, tmpl, verdicts)
			} else {
				err = c.printVerdicts(verdicts)
			}
			if err == nil && slices.ContainsFunc(verdicts, func(v verdict) bool { return v.State == wrong }) {
				err = &attention{1}
			}
			return err
		},
	}
	o.formatFlag(cmd)
	return cmd
}

func (c *cli) printVerdicts(verdicts []verdict) error {
	var lines []string
	for i, v := range verdicts {
		if i > 0 && verdicts[i-1].Check == v.Check {
			continue
		}
		lines = append(lines, v.Check+"\t"+v.State)
	}
	if err := table(c.out, lines, true); err != nil {
		return err
	}
	for _, v := range verdicts {
		if v.State == wrong {
			fmt.Fprintf(c.out, "\n* %s\n  remedy: ", wrap(v.Check+": "+v.Text, "  "))
			const indent = "          "
			for i, line := range strings.Split(v.Remedy, "\n") { // what is typed is not cut in two
				if i > 0 {
					fmt.Fprint(c.out, indent)
				}
				fmt.Fprintln(c.out, wrap(line, indent))
			}
		}
	}
	return nil
}

// pause is how long what seems to belong to nobody may be on its way.
var pause = 3 * time.Second

func (c *cli) facts(ctx context.Context) *facts {
	look := c.machine
	if look == nil {
		look = thisMachine
	}
	f := &facts{machine: look(ctx)}
	f.before = f.mounts
	if f.status, f.absent = c.client().Status(ctx); f.absent != nil {
		return f
	}
	if f.backends, f.absent = c.client().Backends(ctx); f.absent != nil {
		return f
	}
	if f.host, f.unknown = c.client().Host(ctx); f.unknown != nil {
		return f
	}
	f.again = f.host
	if len(checkMounts(f))+len(checkLeaks(f)) == 0 {
		return f
	}
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
	f.mounts = look(ctx).mounts
	f.again, f.unknown = c.client().Host(ctx)
	return f
}

// uses says that a backend of one of these types is used here. The loopback that
// there always is is not, unless it is the default.
func (f *facts) uses(kinds ...string) bool {
	if f.absent != nil {
		return slices.Contains(kinds, "loopback")
	}
	return slices.ContainsFunc(f.backends, func(b api.Backend) bool {
		return slices.Contains(kinds, b.Type) && (b.Default || b.Name != "loopback")
	})
}

func checkKernel(f *facts) (found []finding) {
	for _, needs := range []struct {
		kinds        []string
		major, minor int
	}{{[]string{"loopback", "share"}, 5, 8}, {[]string{"csi"}, 5, 15}} {
		if f.uses(needs.kinds...) && f.older(needs.major, needs.minor) {
			found = append(found, finding{
				fmt.Sprintf("this host runs Linux %s, and the storage %s needs %d.%d", f.release, strings.Join(needs.kinds, " or "), needs.major, needs.minor),
				"install a newer kernel, and restart the host",
			})
		}
	}
	if f.uses("loopback", "share") && !f.loop {
		found = append(found, finding{
			"there is no /dev/loop-control, so the kernel makes no loop devices",
			"modprobe loop, and echo loop >/etc/modules-load.d/loop.conf",
		})
	}
	kinds := f.host.Filesystems
	if len(kinds) == 0 {
		kinds = []string{"ext4"}
	}
	for _, fs := range kinds {
		if !slices.Contains(f.filesystems, fs) {
			found = append(found, finding{
				fmt.Sprintf("the kernel cannot mount %s, which volumes here are made with, and has no module for it", fs),
				"install the rest of this kernel's modules, or use another filesystem",
			})
		}
	}
	return found
}

// restart is what to type; containers that run go on meanwhile.
const restart = "docker plugin disable -f flocker\ndocker plugin enable --timeout 0 flocker"

func checkTools(f *facts) (found []finding) {
	for _, program := range f.host.Lacks {
		found = append(found, finding{
			"the plugin does not find " + program,
			"install the package; a managed plugin has its own: make install anew",
		})
	}
	return found
}

func checkClock(f *facts) []finding {
	if f.adrift {
		return []finding{{
			"the kernel says that nothing keeps this host's clock right; certificates and logs go by it, who may write a volume does not",
			"start an NTP client: timedatectl set-ntp true, or install chrony",
		}}
	}
	return nil
}

func checkPlugin(f *facts) (found []finding) {
	switch {
	case !f.root:
		return []finding{{"only root may ask the plugin", "type it again with sudo"}}
	case f.absent != nil:
		found = append(found, finding{
			f.absent.Error(),
			"docker plugin enable --timeout 0 flocker\nwhy it ended: journalctl -u docker",
		})
	case f.unknown != nil:
		found = append(found, finding{f.unknown.Error(), "see the plugin's log; is it older than this command?"})
	case f.status.Version != version && version != "development" && f.status.Version != "development":
		found = append(found, finding{
			fmt.Sprintf("this command is of version %s, and the plugin of %s", version, f.status.Version), "install both from one source",
		})
	}
	if f.absent == nil && len(f.sockets) == 0 {
		found = append(found, finding{
			"Docker cannot find the plugin: there is no flocker.sock in /run/docker/plugins, nor in a directory of it",
			"set FLOCKER_SOCKET to a file there, and restart the plugin",
		})
	}
	for _, s := range f.sockets {
		if s.err != nil {
			found = append(found, finding{
				fmt.Sprintf("the socket on which Docker asks the plugin, %s, does not answer: %v", s.path, s.err),
				restart,
			})
		}
	}
	if f.host.Docker != "" {
		found = append(found, finding{
			"the plugin cannot ask Docker which containers use a volume: " + f.host.Docker,
			"set FLOCKER_DOCKER_SOCKET, or the source of the mount run, to it",
		})
	}
	return found
}

func checkCertificates(f *facts) (found []finding) {
	for _, c := range f.host.Certificates {
		if text := (certs.Expiry{File: c.File, At: c.Expires}).Warning(time.Now()); text != "" {
			found = append(found, finding{text, certs.Renewal})
		}
	}
	return found
}

func checkEtcd(f *facts) (found []finding) {
	if f.status.Etcd != "" {
		found = append(found, finding{
			"this host cannot use etcd, so nothing can be mounted anew here: " + f.status.Etcd,
			"bring most of the etcd servers back; what is mounted works on",
		})
	}
	for _, s := range f.host.Etcd {
		switch {
		case s.Error != "":
			found = append(found, finding{
				fmt.Sprintf("the etcd server %s does not answer: %s", s.Endpoint, s.Error),
				"start it; if it runs: FLOCKER_ETCD_ENDPOINTS, certificates, firewalls",
			})
			continue
		case s.Leaderless:
			found = append(found, finding{
				fmt.Sprintf("the etcd server %s has lost the others: without most of them it answers nothing", s.Endpoint),
				"bring most of the etcd servers back, and the network between them",
			})
		case tooOld(s.Version):
			found = append(found, finding{
				fmt.Sprintf("the etcd server %s is of version %s, older than 3.4", s.Endpoint, s.Version),
				"upgrade etcd, one server after the other",
			})
		}
		for _, alarm := range s.Alarms {
			found = append(found, finding{
				fmt.Sprintf("the etcd server %s says of itself: %s", s.Endpoint, alarm),
				"for NOSPACE: etcdctl compact, etcdctl defrag, etcdctl alarm disarm",
			})
		}
	}
	return found
}

func tooOld(version string) bool {
	var major, minor int
	n, err := fmt.Sscanf(version, "%d.%d", &major, &minor)
	return err == nil && n == 2 && (major < 3 || major == 3 && minor < 4)
}

func checkStorage(f *facts) (found []finding) {
	for _, b := range f.backends {
		if b.Error != "" {
			found = append(found, finding{
				fmt.Sprintf("backend %s does not answer: %s", b.Name, b.Error),
				fmt.Sprintf("docs/backends/%s.md says what it needs on the host and the storage", b.Type),
			})
		}
	}
	for _, s := range f.host.Silent {
		found = append(found, finding{
			fmt.Sprintf("backend %s does not say what is attached here: %s", s.Backend, s.Error),
			"nothing of it can be mounted here until it does: see to what it names",
		})
	}
	for _, p := range f.host.Permissions {
		page := "docs/backends of Flocker"
		if i := slices.IndexFunc(f.backends, func(b api.Backend) bool { return b.Name == p.Backend }); i >= 0 {
			page = fmt.Sprintf("docs/backends/%s.md", f.backends[i].Type)
		}
		if p.Error != "" {
			found = append(found, finding{
				fmt.Sprintf("backend %s does not say what it is allowed to do: %s", p.Backend, p.Error),
				"see to what it names, and type it again",
			})
		}
		for _, call := range p.Forbidden {
			found = append(found, finding{
				fmt.Sprintf("backend %s is not allowed to call %s: it will fail when it needs to", p.Backend, call),
				fmt.Sprintf("allow %s to the role of this host\nsee Permissions in %s", call, page),
			})
		}
	}
	return found
}

// checkMounts compares what the plugin has mounted with what it should have, and with
// what the host sees of it, and containers with the host.
func checkMounts(f *facts) (found []finding) {
	if f.again.MountError != "" {
		found = append(found, finding{"the plugin cannot say what is mounted: " + f.again.MountError, "see the plugin's log"})
	}
	for _, name := range both(f.host.Unmounted, f.again.Unmounted) {
		found = append(found, finding{
			fmt.Sprintf("volume %s ought to be mounted, and somebody has unmounted it", name),
			"stop its containers, and start them again",
		})
	}
	for _, m := range both(f.host.Mounts, f.again.Mounts) {
		if m.Volume != "" && !slices.ContainsFunc(f.mounts, func(seen mounted) bool { return seen.number == m.Number }) {
			found = append(found, finding{
				fmt.Sprintf("volume %s is mounted in the plugin, and this host does not see it: a container that is started now gets an empty directory", m.Volume),
				restart,
			})
		}
	}
	return found
}

// checkLeaks finds what is mounted or attached and belongs to no volume of this host.
func checkLeaks(f *facts) (found []finding) {
	for _, m := range both(f.host.Mounts, f.again.Mounts) {
		if m.Volume == "" {
			found = append(found, finding{
				fmt.Sprintf("%s is mounted in the plugin, and no volume accounts for it", m.Path),
				"if it stays for minutes, and no container uses it: restart the plugin",
			})
		}
	}
	for _, d := range both(f.host.Devices, f.again.Devices) {
		if !d.Owned {
			found = append(found, finding{
				fmt.Sprintf("%s of backend %s is attached for volume %s under token %d, which this host does not have", d.Path, d.Backend, d.ID, d.Token),
				"the plugin detaches it once nothing has it open: lsof " + d.Path,
			})
		}
	}
	for _, m := range both(f.before, f.mounts) {
		if f.ours(m.path) && !slices.ContainsFunc(f.again.Mounts, func(has api.Mount) bool { return has.Number == m.number }) {
			found = append(found, finding{
				m.path + " is mounted, and the plugin does not see it: it is left from an earlier one",
				"when no container uses it: umount " + m.path,
			})
		}
	}
	return found
}

// both are those that were there twice.
func both[T comparable](first, second []T) (twice []T) {
	for _, v := range first {
		if slices.Contains(second, v) {
			twice = append(twice, v)
		}
	}
	return twice
}
