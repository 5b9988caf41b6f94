// Package iscsi makes block devices of logical units of iSCSI targets on this host. It knows
// nothing of volumes and owners: whoever has a unit connected where, and under what, is its
// callers' affair. So is a lock, so that no two calls for one unit are under way.
//
//	lun, err := iscsi.Parse(info)           // of what Cinder says of a connection
//	device, err := initiator.Connect(ctx, lun)
//	devices, err := initiator.Devices(ctx)  // what is connected
//	clean, err := initiator.Disconnect(ctx, device)
package iscsi

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/flocker-plugin/flocker/backends"
)

// LUN is a logical unit of a target, and how to reach it. It is printed without its secret.
type LUN struct {
	// Portals are where the target is, as host:port, the best first.
	Portals []string
	// Target is its name: iqn.2010-10.org.openstack:volume-….
	Target string
	Number int
	// User and Secret are those of CHAP; empty is none.
	User   string
	Secret string `json:"-"`
}

// Device is a block device of a logical unit on this host, from the kernel's state.
type Device struct {
	// Path is /dev/sdc or /dev/loop3.
	Path   string
	Target string
	Number int
	// Life tells it from an earlier device of the same path.
	Life string
}

// Initiator makes block devices of logical units. It remembers nothing.
type Initiator interface {
	// Devices returns all that it has made on this host, by the state of the kernel. It
	// asks nothing of a target.
	Devices(ctx context.Context) ([]Device, error)
	// Connect makes a device, or returns the one there is of the target and number.
	Connect(ctx context.Context, lun LUN) (Device, error)
	// Served says whether a device can still do anything. One that cannot has to be
	// disconnected.
	Served(d Device) (bool, error)
	// Disconnect removes a device; nil if it is gone. ErrInUse, and it stays, while
	// somebody has it open or mounted. clean says that nothing sent through it can arrive
	// at the target later.
	Disconnect(ctx context.Context, d Device) (clean bool, err error)
}

// Is says whether a device is of a logical unit.
func (d Device) Is(lun LUN) bool { return d.Target == lun.Target && d.Number == lun.Number }

// String is what errors and logs have.
func (l LUN) String() string { return fmt.Sprintf("LUN %d of %s", l.Number, l.Target) }

// GoString keeps the secret out of %#v.
func (l LUN) GoString() string { return l.String() }

var nameForm = regexp.MustCompile(`^(iqn|eui|naa)\.[A-Za-z0-9._:-]{1,219}$`)

// Valid is an error if a logical unit is named in a way that no initiator can take. What is
// valid can be given to programs, and be part of a path.
func (l LUN) Valid() error {
	switch {
	case !nameForm.MatchString(l.Target):
		return fmt.Errorf("%q is no name of an iSCSI target: %w", l.Target, backends.ErrInvalid)
	case l.Number < 0 || l.Number > 1<<16-1:
		return fmt.Errorf("%d is no number of a logical unit of %s: %w", l.Number, l.Target, backends.ErrInvalid)
	case len(l.Portals) == 0:
		return fmt.Errorf("there is no portal by which to reach %s: %w", l.Target, backends.ErrInvalid)
	case (l.User == "") != (l.Secret == ""):
		return fmt.Errorf("CHAP for %s needs both a user and a secret: %w", l.Target, backends.ErrInvalid)
	case strings.ContainsAny(l.User+l.Secret, "\x00\n"):
		return fmt.Errorf("the user or the secret of CHAP for %s is of more than one line: %w", l.Target, backends.ErrInvalid)
	}
	for _, portal := range l.Portals {
		host, port, err := net.SplitHostPort(portal)
		number, bad := strconv.ParseUint(port, 10, 16)
		if err != nil || bad != nil || number == 0 || !hostForm.MatchString(host) {
			return fmt.Errorf("%q is no portal of %s; it is written like 192.0.2.1:3260 or [2001:db8::1]:3260: %w", portal, l.Target, backends.ErrInvalid)
		}
	}
	return nil
}

var hostForm = regexp.MustCompile(`^[A-Za-z0-9:][A-Za-z0-9.:-]*$`)

// Parse returns the logical unit that Cinder names in what it says of a connection.
func Parse(info map[string]any) (LUN, error) {
	l := LUN{Target: text(info["target_iqn"])}
	first, ok := number(info["target_lun"])
	if l.Target != "" && text(info["target_portal"]) != "" {
		l.Portals = []string{text(info["target_portal"])}
	}
	// Storages with several ways to a unit tell them as lists, with or without the above.
	targets, portals, numbers := list(info["target_iqns"]), list(info["target_portals"]), list(info["target_luns"])
	for i := range min(len(targets), len(portals), len(numbers)) {
		target, portal := text(targets[i]), text(portals[i])
		n, fine := number(numbers[i])
		if l.Target == "" {
			l.Target, first, ok = target, n, fine
		}
		if target == l.Target && fine && n == first && !slices.Contains(l.Portals, portal) {
			l.Portals = append(l.Portals, portal)
		}
	}
	switch method := text(info["auth_method"]); method {
	case "":
	case "CHAP":
		l.User, l.Secret = text(info["auth_username"]), text(info["auth_password"])
		if l.User == "" || l.Secret == "" {
			return LUN{}, fmt.Errorf("target %s is said to want CHAP, without a user and a secret: %w", l.Target, backends.ErrInvalid)
		}
	default:
		return LUN{}, fmt.Errorf("target %s wants authentication by %q, and only CHAP is known here: %w", l.Target, method, backends.ErrInvalid)
	}
	if l.Number = first; !ok {
		return LUN{}, fmt.Errorf("it is not said which logical unit of target %q it is: %w", l.Target, backends.ErrInvalid)
	}
	if err := l.Valid(); err != nil {
		return LUN{}, err
	}
	return l, nil
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

func list(v any) []any {
	l, _ := v.([]any)
	return l
}

// number reads what drivers send as a number or as a string.
func number(v any) (int, bool) {
	switch v := v.(type) {
	case float64:
		return int(v), v == float64(int(v))
	case json.Number:
		n, err := strconv.Atoi(v.String())
		return n, err == nil
	case string:
		n, err := strconv.Atoi(v)
		return n, err == nil
	}
	return 0, false
}

// NameFile is where the programs of open-iscsi have this host's name.
const NameFile = "/etc/iscsi/initiatorname.iscsi"

// Name returns the name of this host as an initiator, from a file like NameFile.
func Name(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("the name of this host as an iSCSI initiator: %w: %w", err, backends.ErrUnavailable)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, ok := strings.CutPrefix(strings.TrimSpace(lines.Text()), "InitiatorName=")
		if name = strings.TrimSpace(name); ok {
			return name, ValidName(name)
		}
	}
	return "", fmt.Errorf("%s has no line InitiatorName=iqn.…; make one (echo InitiatorName=$(iscsi-iname)): %w", file, backends.ErrUnavailable)
}

// ValidName is an error for what cannot be a name of an initiator.
func ValidName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("%q is no name of an iSCSI initiator; it is written like iqn.2026-11.org.example:host1: %w", name, backends.ErrInvalid)
	}
	return nil
}
