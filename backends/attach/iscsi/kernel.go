package iscsi

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/disk"
	"github.com/flocker-plugin/flocker/backends/attach/loop"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Kernel makes devices with the kernel's initiator. Its sessions are made, and got back after
// an outage, by open-iscsi's iscsid, which has to run on the host, and which iscsiadm tells to.
//
// All sessions made here are of an interface of their own, as open-iscsi calls a set of
// settings, and by its name the kernel tells them from those of others, which are neither
// used nor ended. A session shows a unit only when it is asked for it.
//
// A session that is broken is waited for, and neither ended nor replaced by one with another
// portal. What was sent by it could still arrive after what is sent by another one. When the
// same session is back, the target has ended all that was left of it; a new one tells it nothing.
type Kernel struct {
	cfg  KernelConfig
	disk disk.Kernel
	// databases are where open-iscsi may have its records; conf has its defaults.
	databases []string
	conf      string
	sockets   string // what the kernel lists of them
	limits    limits
	// write writes to a file of sysfs; a test has a kernel of its own.
	write func(path, text string) error
	// flags are those with which a device is opened.
	flags int
}

// KernelConfig is how sessions are made.
type KernelConfig struct {
	// Dir is for locks, and the same for all with one Interface; empty is /run/flocker/iscsi.
	Dir string
	// Interface is the name by which the sessions are known as Flocker's; empty is flocker, and
	// one of its own with a Name: a target may show who comes under another name other units by
	// the same numbers.
	Interface string
	// Name is this host's as an initiator; empty is that of NameFile.
	Name string
	// Outage is for how long I/O waits for a session that is broken before it fails; 0 is 20 s.
	Outage time.Duration
}

var _ Initiator = (*Kernel)(nil)

// NewKernel makes an initiator.
func NewKernel(cfg KernelConfig) *Kernel {
	cfg.Dir = cmp.Or(cfg.Dir, "/run/flocker/iscsi")
	if cfg.Interface == "" {
		cfg.Interface = "flocker"
		if cfg.Name != "" {
			sum := sha256.Sum256([]byte(cfg.Name))
			cfg.Interface += "-" + hex.EncodeToString(sum[:6])
		}
	}
	cfg.Outage = cmp.Or(cfg.Outage, 20*time.Second)
	return &Kernel{
		cfg: cfg, disk: disk.Here(), databases: []string{"/var/lib/iscsi", "/etc/iscsi"}, conf: "/etc/iscsi/iscsid.conf",
		sockets: "/proc/net/unix",
		limits:  limits{program: 45 * time.Second, show: 30 * time.Second, grace: 10 * time.Second, settle: 5 * time.Second},
		write:   func(path, text string) error { return os.WriteFile(path, []byte(text), 0) },
		// Exclusively: fails while it is mounted, in whatever mount namespace.
		flags: os.O_RDWR | syscall.O_EXCL | syscall.O_DIRECT,
	}
}

// limits are for how long something is waited for.
type limits struct {
	// program bounds a call of iscsiadm. A login is tried for half a minute at most.
	program time.Duration
	// show is how long a target may take to show a unit, and the kernel to make a disk of it.
	show time.Duration
	// grace is how much longer than an outage a disk may not answer.
	grace time.Duration
	// settle is for how long a device may be open to somebody who merely looks at it, as programs do
	// that udev starts: they ask the target for what they look at.
	settle time.Duration
}

// session is one of ours.
type session struct {
	sid      string // 3
	target   string
	portal   string // as it was logged in to
	group    string // of portals, at the target
	loggedIn bool
	dir      string // of sysfs; its disks are below
}

// shown is what the kernel has of a logical unit in a session.
type shown struct {
	session
	number int
	name   string // sdb
	life   string
	wwid   string // what the disk says that it is; some do not
}

func (u shown) of(lun LUN) bool { return u.target == lun.Target && u.number == lun.Number }

// sessions returns ours, by the state of the kernel.
func (k *Kernel) sessions() ([]session, error) {
	class := filepath.Join(k.disk.Sysfs, "class/iscsi_session")
	entries, err := os.ReadDir(class)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the kernel's initiator is not loaded
	}
	if err != nil {
		return nil, unavailable(err)
	}
	var found []session
	for _, entry := range entries {
		attrs := map[string]string{}
		for _, name := range []string{"targetname", "ifacename", "state", "tpgt"} {
			if attrs[name], err = attr(filepath.Join(class, entry.Name(), name)); err != nil {
				return nil, unavailable(err)
			}
		}
		if attrs["ifacename"] != k.cfg.Interface {
			continue
		}
		dir, err := filepath.EvalSymlinks(filepath.Join(class, entry.Name(), "device"))
		if disk.Gone(err) {
			continue
		}
		if err != nil {
			return nil, unavailable(err)
		}
		s := session{
			sid: strings.TrimPrefix(entry.Name(), "session"), target: attrs["targetname"], group: attrs["tpgt"],
			loggedIn: attrs["state"] == "LOGGED_IN", dir: dir,
		}
		connections, err := filepath.Glob(dir + "/connection*/iscsi_connection/connection*")
		if err != nil {
			return nil, unavailable(err)
		}
		for _, connection := range connections {
			host, err1 := attr(connection + "/persistent_address")
			port, err2 := attr(connection + "/persistent_port")
			if err := errors.Join(err1, err2); err != nil {
				return nil, unavailable(err)
			}
			s.portal = portal(net.JoinHostPort(host, port))
		}
		found = append(found, s)
	}
	return found, nil
}

// knows says that there is a session with a target, or that it is not known.
func (k *Kernel) knows(target string) bool {
	sessions, err := k.sessions()
	return err != nil || slices.ContainsFunc(sessions, func(s session) bool { return s.target == target })
}

// portal writes an address in the one way that is compared.
func portal(address string) string {
	if is, err := netip.ParseAddrPort(address); err == nil {
		return is.String()
	}
	return strings.ToLower(address)
}

// attr reads an attribute in sysfs; empty if it has gone, or has no value.
func attr(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil && !disk.Gone(err) && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTCONN) {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

var address = regexp.MustCompile(`^[0-9]+:[0-9]+:[0-9]+:([0-9]+)$`)

// units returns what the kernel has of a session, also what is no disk, or not yet.
func (k *Kernel) units(s session) ([]shown, error) {
	dirs, err := filepath.Glob(s.dir + "/target*/*:*:*:*")
	if err != nil {
		return nil, unavailable(err)
	}
	var found []shown
	for _, dir := range dirs {
		m := address.FindStringSubmatch(filepath.Base(dir))
		if m == nil {
			continue
		}
		u := shown{session: s}
		if u.number, err = strconv.Atoi(m[1]); err != nil {
			return nil, unavailable(err)
		}
		names, err := os.ReadDir(dir + "/block")
		if err != nil && !disk.Gone(err) {
			return nil, unavailable(err)
		}
		if len(names) > 0 {
			if u, err = k.named(u, names[0].Name()); err != nil {
				return nil, err
			}
		}
		found = append(found, u)
	}
	return found, nil
}

// named fills in what a disk is known by. It says what it is only once in its life, when the
// kernel finds it; Connect has the kernel ask it again.
func (k *Kernel) named(u shown, name string) (shown, error) {
	life, err := k.disk.Life(name)
	if err != nil {
		return u, unavailable(err)
	}
	if u.wwid, err = attr(filepath.Join(k.disk.Sysfs, "block", name, "device/wwid")); err != nil {
		return u, unavailable(err)
	}
	if life != "" {
		u.name, u.life = name, strings.Join([]string{life, u.sid, u.wwid}, ":")
	}
	return u, nil
}

// all returns what the kernel has of all sessions.
func (k *Kernel) all() ([]shown, error) {
	sessions, err := k.sessions()
	if err != nil {
		return nil, err
	}
	var found []shown
	for _, s := range sessions {
		units, err := k.units(s)
		if err != nil {
			return nil, err
		}
		found = append(found, units...)
	}
	return found, nil
}

// now returns a unit as it is by now; its name is empty if its disk has gone.
func (k *Kernel) now(life string) (shown, error) {
	all, err := k.all()
	if err != nil {
		return shown{}, err
	}
	for _, u := range all {
		if life != "" && u.life == life {
			return u, nil
		}
	}
	return shown{}, nil
}

// device is a unit's, after having made sure that its node is of its disk.
func (k *Kernel) device(u shown) (Device, error) {
	path, err := k.disk.Path(u.name)
	if err != nil {
		return Device{}, unavailable(err)
	}
	return Device{Path: path, Target: u.target, Number: u.number, Life: u.life}, nil
}

// Devices implements Initiator.
func (k *Kernel) Devices(ctx context.Context) ([]Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, unavailable(err)
	}
	all, err := k.all()
	if err != nil {
		return nil, fmt.Errorf("iSCSI disks: %w", err)
	}
	var found []Device
	for _, u := range all {
		if u.name == "" {
			continue
		}
		d, err := k.device(u)
		if err != nil {
			if still, err := k.now(u.life); err == nil && still.name == "" {
				continue // it has just gone
			}
			return nil, fmt.Errorf("iSCSI disks: %w", err)
		}
		found = append(found, d)
	}
	return found, nil
}

// Served implements Initiator. A disk whose session is broken may be served again; the kernel
// calls it off-line once it has given up.
func (k *Kernel) Served(d Device) (bool, error) {
	u, err := k.now(d.Life)
	if err != nil || u.name == "" {
		return false, err
	}
	alive, err := k.alive(u)
	return alive, unavailable(err)
}

// alive says whether a disk can do I/O, or may again.
func (k *Kernel) alive(u shown) (bool, error) {
	state, err1 := k.disk.Attr(u.name, "device/state")
	size, err2 := k.disk.Attr(u.name, "size")
	return (state == "running" || state == "blocked" || state == "quiesce") && size != "0" && size != "", errors.Join(err1, err2)
}

// Connect implements Initiator.
func (k *Kernel) Connect(ctx context.Context, lun LUN) (Device, error) {
	d, err := k.connect(ctx, lun)
	if err != nil {
		return Device{}, fmt.Errorf("connect %s: %w", lun, err)
	}
	return d, nil
}

func (k *Kernel) connect(ctx context.Context, lun LUN) (Device, error) {
	if err := lun.Valid(); err != nil {
		return Device{}, err
	}
	if strings.TrimSpace(lun.User) != lun.User || strings.TrimSpace(lun.Secret) != lun.Secret || max(len(lun.User), len(lun.Secret)) > 255 {
		return Device{}, fmt.Errorf("open-iscsi takes no user and no secret that begins or ends with a space, or is longer than 255 characters: %w", backends.ErrInvalid)
	}
	if err := k.lacking(ctx); err != nil {
		return Device{}, err
	}
	// Nobody ends a session of the target meanwhile.
	unlock, err := k.lock(ctx, lun.Target, syscall.LOCK_SH)
	if err != nil {
		return Device{}, err
	}
	d, err := k.show(ctx, lun)
	unlock()
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), k.limits.program)
		defer cancel()
		k.leave(ctx, lun.Target)
	}
	return d, err
}

// show returns the disk there is, or makes one.
func (k *Kernel) show(ctx context.Context, lun LUN) (Device, error) {
	u, err := k.present(ctx, lun)
	if err != nil {
		return Device{}, err
	}
	made := u.name == ""
	if made {
		s, err := k.session(ctx, lun)
		if err != nil {
			return Device{}, err
		}
		if u, err = k.scan(ctx, s, lun); err != nil {
			return Device{}, err
		}
	}
	err = k.ours(ctx, u)
	if err == nil {
		var d Device
		if d, err = k.device(u); err == nil {
			return d, nil
		}
	}
	if made {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), k.limits.program)
		defer cancel()
		_, _ = k.remove(ctx, u) // it stays if somebody has it open
	}
	return Device{}, err
}

// present returns the disk that there is of a unit, if it is that unit's still. One that is
// left from before is removed.
func (k *Kernel) present(ctx context.Context, lun LUN) (shown, error) {
	for started := time.Now(); ; {
		all, err := k.all()
		if err != nil {
			return shown{}, err
		}
		all = slices.DeleteFunc(all, func(u shown) bool { return !u.of(lun) || u.name == "" })
		if len(all) == 0 {
			return shown{}, nil
		}
		u := all[0]
		if u.loggedIn {
			if u, err = k.again(ctx, u); err != nil {
				return shown{}, err
			}
			alive, err := k.alive(u)
			if err != nil || alive && k.answers(ctx, u) {
				return u, unavailable(err)
			}
			if _, err := k.remove(ctx, u); err != nil {
				return shown{}, err
			}
			continue
		}
		if time.Since(started) > k.patience() {
			return shown{}, fmt.Errorf("/dev/%s: %w", u.name, broken(u.session))
		}
		if err := poll.Sleep(ctx, 100*time.Millisecond); err != nil {
			return shown{}, err
		}
	}
}

// answers says whether a disk can be read: the storage may have taken it away.
func (k *Kernel) answers(ctx context.Context, u shown) bool {
	path := filepath.Join(k.disk.Dev, u.name)
	return loop.Bounded(ctx, k.patience(), path, func() error {
		f, err := os.OpenFile(path, k.flags&^(os.O_RDWR|syscall.O_EXCL), 0)
		if err != nil {
			return err
		}
		return errors.Join(readFirst(f), f.Close())
	}) == nil
}

// again has the kernel ask a disk once more what it is: its number may have been given to
// another unit meanwhile, which the kernel does not look at. The unit that is returned is not
// alive then.
func (k *Kernel) again(ctx context.Context, u shown) (shown, error) {
	err := loop.Bounded(ctx, k.limits.show, u.name, func() error {
		return k.write(filepath.Join(k.disk.Sysfs, "block", u.name, "device/rescan"), "1")
	})
	if err != nil && !disk.Gone(err) {
		return u, unavailable(fmt.Errorf("look again at %s: %w", u.name, err))
	}
	is, err := k.named(shown{session: u.session, number: u.number}, u.name)
	if err != nil || is.wwid == u.wwid {
		return is, err
	}
	if _, err := k.remove(ctx, is); err != nil {
		return is, fmt.Errorf("/dev/%s was disk %s, and is %s by now: %w", u.name, u.wwid, is.wwid, err)
	}
	return is, nil
}

// ours is an error if a disk is held by another driver, or is in use by another path.
func (k *Kernel) ours(ctx context.Context, u shown) error {
	if err := k.held(u.name); err != nil || u.wwid == "" {
		return err
	}
	paths, err := filepath.Glob(filepath.Join(k.disk.Sysfs, "block/sd*"))
	if err != nil {
		return unavailable(err)
	}
	for _, path := range paths {
		name := filepath.Base(path)
		wwid, err := attr(path + "/device/wwid")
		if err != nil {
			return unavailable(err)
		}
		if name == u.name || wwid != u.wwid {
			continue
		}
		if same, err := k.same(u, path); err != nil || !same {
			if err != nil {
				return unavailable(err)
			}
			continue
		}
		err = errors.Join(k.held(name), loop.Bounded(ctx, k.patience(), name, func() error { return k.disk.Claimed(filepath.Join(k.disk.Dev, name)) }))
		if errors.Is(err, backends.ErrInUse) {
			return fmt.Errorf("this host has the disk as /dev/%s too, by a session that is not Flocker's, and uses it there: %w", name, err)
		}
		if err != nil {
			return unavailable(err)
		}
	}
	return nil
}

// nobodys is what a disk says that it is that is named by no registered vendor. tgtd, of which each host
// of Cinder's may have one, so numbers its targets: those of two hosts have the same.
const nobodys = "naa.6000000"

var inSession = regexp.MustCompile(`/(session[0-9]+)/target[^/]+/[0-9]+:[0-9]+:[0-9]+:([0-9]+)$`)

// same says whether a disk that says it is what a unit is can be that unit.
func (k *Kernel) same(u shown, path string) (bool, error) {
	if !strings.HasPrefix(u.wwid, nobodys) {
		return true, nil
	}
	dir, err := filepath.EvalSymlinks(path + "/device")
	if disk.Gone(err) {
		return false, nil
	}
	m := inSession.FindStringSubmatch(dir)
	if err != nil || m == nil {
		return true, err
	}
	target, err := attr(filepath.Join(k.disk.Sysfs, "class/iscsi_session", m[1], "targetname"))
	return target == u.target && m[2] == strconv.Itoa(u.number), err
}

// held is ErrInUse if another driver has a disk, as for multipath.
func (k *Kernel) held(name string) error {
	holders, err := os.ReadDir(filepath.Join(k.disk.Sysfs, "block", name, "holders"))
	if err != nil && !disk.Gone(err) {
		return unavailable(err)
	}
	if len(holders) > 0 {
		return fmt.Errorf("/dev/%s is held by %s, as by multipath or LVM, and Flocker uses one path and the whole disk: "+
			"exclude it in /etc/multipath.conf (blacklist) or lvm.conf (global_filter): %w", name, holders[0].Name(), backends.ErrInUse)
	}
	return nil
}

// session returns one by which a unit can be reached.
func (k *Kernel) session(ctx context.Context, lun LUN) (session, error) {
	unlock, err := k.lock(ctx, "login-"+lun.Target, syscall.LOCK_EX)
	if err != nil {
		return session{}, err
	}
	defer unlock()
	known, err := k.back(ctx, lun.Target)
	if err != nil {
		return session{}, err
	}
	for _, s := range known {
		if slices.ContainsFunc(lun.Portals, func(p string) bool { return portal(p) == s.portal }) {
			return s, nil
		}
	}
	var failed []error
	for _, to := range lun.Portals {
		s, err := k.login(ctx, lun, to)
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			return session{}, unavailable(err)
		}
		failed = append(failed, fmt.Errorf("%s: %w", to, err))
	}
	if len(failed) == 1 {
		return session{}, failed[0]
	}
	texts := make([]string, len(failed))
	for i, err := range failed {
		texts[i] = strings.TrimSuffix(err.Error(), ": "+backends.ErrUnavailable.Error())
	}
	return session{}, fmt.Errorf("no portal lets this host in: %s: %w", strings.Join(texts, "; "), backends.ErrUnavailable)
}

// back returns the sessions with a target, when none is broken.
func (k *Kernel) back(ctx context.Context, target string) ([]session, error) {
	for started := time.Now(); ; {
		sessions, err := k.sessions()
		if err != nil {
			return nil, err
		}
		sessions = slices.DeleteFunc(sessions, func(s session) bool { return s.target != target })
		i := slices.IndexFunc(sessions, func(s session) bool { return !s.loggedIn })
		if i < 0 {
			return sessions, nil
		}
		if time.Since(started) > k.patience() {
			return nil, broken(sessions[i])
		}
		if err := poll.Sleep(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// broken says what helps.
func broken(s session) error {
	return fmt.Errorf("the session with %s is broken, and iscsid tries to get it back. Is the target up, and can this host reach it? "+
		"If it will never come back: iscsiadm -m session -r %s --logout: %w", s.portal, s.sid, backends.ErrUnavailable)
}

// login makes a session with a portal.
func (k *Kernel) login(ctx context.Context, lun LUN, to string) (session, error) {
	record, err := k.record(ctx, lun, to)
	if err != nil {
		return session{}, err
	}
	err = k.iscsiadm(ctx, lun, "-m", "node", "-T", lun.Target, "-p", to, "-I", k.cfg.Interface, "--login")
	if failure, ok := errors.AsType[*failure](err); ok && failure.code == sessionExists {
		err = nil
	}
	var s session
	if err == nil {
		s, err = k.made(ctx, lun, to)
	}
	if err != nil {
		k.forget(lun.Target, to)
		return session{}, err
	}
	return s, k.keep(record, s)
}

// made waits until the kernel shows a session.
func (k *Kernel) made(ctx context.Context, lun LUN, to string) (session, error) {
	for started := time.Now(); ; {
		sessions, err := k.sessions()
		if err != nil {
			return session{}, err
		}
		for _, s := range sessions {
			if s.target == lun.Target && s.portal == portal(to) && s.loggedIn {
				return s, nil
			}
		}
		if time.Since(started) > k.limits.show {
			return session{}, fmt.Errorf("iscsid says that it has logged in, and the kernel shows no session of interface %s: %w", k.cfg.Interface, backends.ErrUnavailable)
		}
		if err := poll.Sleep(ctx, 50*time.Millisecond); err != nil {
			return session{}, err
		}
	}
}

// scan asks the target for a unit, and waits for its disk.
func (k *Kernel) scan(ctx context.Context, s session, lun LUN) (shown, error) {
	host := filepath.Base(filepath.Dir(s.dir))
	id, err := attr(filepath.Join(k.disk.Sysfs, "class/iscsi_session/session"+s.sid, "target_id"))
	if err != nil {
		return shown{}, unavailable(err)
	}
	for started, pause := time.Now(), 10*time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := loop.Bounded(ctx, k.limits.show, s.portal, func() error {
			return k.write(filepath.Join(k.disk.Sysfs, "class/scsi_host", host, "scan"), fmt.Sprintf("0 %s %d", cmp.Or(id, "0"), lun.Number))
		})
		if err != nil {
			return shown{}, unavailable(fmt.Errorf("ask the target for its units: %w", err))
		}
		units, err := k.units(s)
		if err != nil {
			return shown{}, err
		}
		for _, u := range units {
			if !u.of(lun) || u.name == "" {
				continue
			}
			alive, err := k.alive(u)
			if err != nil {
				return shown{}, unavailable(err)
			}
			path := filepath.Join(k.disk.Dev, u.name)
			_, missing := k.disk.Node(path)
			if !alive || errors.Is(missing, fs.ErrNotExist) {
				continue
			}
			if closed := loop.Bounded(ctx, k.limits.show, path, func() error { return k.disk.Opens(path) }); !disk.Gone(closed) {
				return u, nil
			}
		}
		if time.Since(started) > k.limits.show {
			return shown{}, fmt.Errorf("this host is logged in to %s, and within %s there was no disk with this number. Has the storage mapped it to this host, "+
				"whose name is in %s? See `iscsiadm -m session -P 3`: %w", s.portal, k.limits.show, NameFile, backends.ErrNotFound)
		}
		if err := poll.Sleep(ctx, pause); err != nil {
			return shown{}, err
		}
	}
}

// Disconnect implements Initiator. It is clean if the disk answers at the end. All commands that were
// given up before have ended then: either the target has said so, or their connection was given up with
// them, and a target ends what is left of a session's old connection before it takes a new one.
func (k *Kernel) Disconnect(ctx context.Context, d Device) (clean bool, err error) {
	u, err := k.now(d.Life)
	there := u.name != ""
	if err == nil && there {
		clean, err = k.remove(ctx, u)
	}
	if err != nil {
		return false, fmt.Errorf("disconnect LUN %d of %s: %w", d.Number, d.Target, err)
	}
	if clean || !there { // else the session is needed to make sure of it
		k.leave(ctx, d.Target)
	}
	return clean, nil
}

// remove removes a disk that nobody has open. clean says that it has acknowledged what it still
// held, and has answered in the end.
func (k *Kernel) remove(ctx context.Context, u shown) (clean bool, err error) {
	scsi, err := filepath.EvalSymlinks(filepath.Join(k.disk.Sysfs, "block", u.name, "device"))
	if err == nil {
		var still shown
		if still, err = k.now(u.life); err == nil && still.name == "" {
			return false, nil // another one has its name
		}
	}
	if disk.Gone(err) {
		return false, nil
	}
	if err != nil {
		return false, unavailable(err)
	}
	if err := k.held(u.name); err != nil {
		return false, err
	}
	path, err := k.disk.Path(u.name)
	if err != nil {
		return false, unavailable(err)
	}
	held, err := k.hold(ctx, path)
	if err != nil {
		return false, err
	}
	if held != nil {
		clean = loop.Bounded(ctx, k.patience(), path, func() error { return settled(held) }) == nil
		defer func() { go held.Close() }() // which may wait, too
	}
	err = loop.Bounded(ctx, k.patience(), path, func() error { return k.write(filepath.Join(scsi, "delete"), "1") })
	if err != nil && !disk.Gone(err) {
		return false, unavailable(fmt.Errorf("remove %s: %w", path, err))
	}
	for started := time.Now(); ; {
		still, err := k.now(u.life)
		if err != nil || still.name == "" {
			return clean && err == nil, err
		}
		if time.Since(started) > k.patience() {
			return false, fmt.Errorf("the kernel does not let go of %s: %w", path, backends.ErrUnavailable)
		}
		if err := poll.Sleep(ctx, 10*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// patience is for how long a disk may not answer: it fails when the kernel gives its session up.
func (k *Kernel) patience() time.Duration { return k.cfg.Outage + k.limits.grace }

// settled writes what a disk still holds, and reads from the disk itself: where it has no cache
// of its own to be flushed, or nothing is to be written, a sync asks the target nothing.
func settled(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return readFirst(f)
}

// readFirst reads the beginning of a disk into memory that is aligned for it.
func readFirst(f *os.File) error {
	const sector = 4096 // or less
	buffer, err := unix.Mmap(-1, 0, sector, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	_, err = f.ReadAt(buffer, 0)
	return errors.Join(err, unix.Munmap(buffer))
}

// hold opens a device so that nobody can mount it; ErrInUse if somebody has it open. It is
// nil if the device lets nobody open it, as the disk of a session that is lost.
func (k *Kernel) hold(ctx context.Context, path string) (*os.File, error) {
	held, err := k.unused(ctx, path)
	if err != nil && held != nil {
		_ = held.Close() // nothing was written to it
		held = nil
	}
	return held, err
}

// unused is hold, but for what it has opened when it fails. It opens a device once: each time that is
// closed again, udev looks at it anew.
func (k *Kernel) unused(ctx context.Context, path string) (held *os.File, err error) {
	for started, pause := time.Now(), 20*time.Millisecond; ; pause = min(2*pause, 320*time.Millisecond) {
		if held == nil {
			held, err = k.open(ctx, path)
		}
		user := ""
		switch {
		case errors.Is(err, syscall.EBUSY):
			user, err = "somebody", nil
		case err == nil, disk.Gone(err):
			user, err = openedBy(path, held)
		}
		switch {
		case err != nil:
			return held, unavailable(err)
		case user == "":
			return held, nil
		case time.Since(started) > k.limits.settle:
			return held, fmt.Errorf("%s is open or mounted, by %s: %w", path, user, backends.ErrInUse)
		}
		if err := poll.Sleep(ctx, pause); err != nil {
			return held, err
		}
	}
}

// open opens a device exclusively.
func (k *Kernel) open(ctx context.Context, path string) (*os.File, error) {
	opened := make(chan *os.File, 1)
	err := loop.Bounded(ctx, k.patience(), path, func() error {
		f, err := os.OpenFile(path, k.flags, 0)
		opened <- f
		return err
	})
	if err == nil {
		return <-opened, nil
	}
	go func() {
		if f := <-opened; f != nil { // after all
			_ = f.Close()
		}
	}()
	return nil, err
}

// lookers are what udev's processes are called: they read the beginning and the end of each disk that
// appears or was written to, and on a host with much to do this takes them long.
var lookers = []string{"(udev-worker)", "systemd-udevd", "udevd"}

// openedBy names a process that can be seen from here and has a device open, besides held. Those that
// merely look at it are nobody.
func openedBy(path string, held *os.File) (user string, err error) {
	number := func(path string) (uint32, uint32, bool) {
		var is unix.Statx_t // asks no file server
		err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &is)
		return is.Rdev_major, is.Rdev_minor, err == nil && is.Mode&unix.S_IFMT == unix.S_IFBLK
	}
	major, minor, ok := number(path)
	if !ok {
		return "", nil
	}
	open, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return "", err
	}
	own := ""
	if held != nil {
		own = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), held.Fd())
	}
	for _, fd := range open {
		a, b, ok := number(fd)
		if !ok || a != major || b != minor || fd == own {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm") // none, if it has just ended
		if what := strings.TrimSpace(string(name)); !slices.Contains(lookers, what) {
			return fmt.Sprintf("process %s (%s)", pid, what), nil
		}
	}
	return "", nil
}

// leave ends the sessions of a target that have no disks, unless they are broken. If it fails, the next
// call for the target does it: a session without disks can do nothing.
func (k *Kernel) leave(ctx context.Context, target string) {
	waiting, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	unlock, err := k.lock(waiting, target, syscall.LOCK_EX)
	if err != nil {
		return // somebody is about to use one
	}
	defer unlock()
	sessions, err := k.sessions()
	if err != nil {
		return
	}
	for _, s := range sessions {
		if units, err := k.units(s); err == nil && len(units) == 0 && s.target == target && s.loggedIn {
			_ = k.logout(ctx, s)
		}
	}
}

// logout ends a session, and removes its record.
func (k *Kernel) logout(ctx context.Context, s session) error {
	err := k.iscsiadm(ctx, LUN{}, "-m", "session", "-r", s.sid, "--logout")
	if failure, ok := errors.AsType[*failure](err); err != nil && (!ok || failure.code != noSession && failure.code != noObjects) {
		return err
	}
	k.forget(s.target, s.portal)
	return nil
}

// lock keeps other calls of this host, of another process too, from what name stands for.
func (k *Kernel) lock(ctx context.Context, name string, how int) (unlock func(), err error) {
	if err := os.MkdirAll(k.cfg.Dir, 0o700); err != nil {
		return nil, unavailable(err)
	}
	f, err := os.OpenFile(filepath.Join(k.cfg.Dir, name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, unavailable(err)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if err == syscall.EWOULDBLOCK { //nolint:errorlint // it is no error to be wrapped
			err = poll.Sleep(ctx, pause)
			if err == nil {
				continue
			}
			err = fmt.Errorf("another call for the target is under way on this host: %w", err)
		}
		_ = f.Close()
		return nil, unavailable(err)
	}
}

func unavailable(err error) error {
	if err == nil || errors.Is(err, backends.ErrInUse) || errors.Is(err, backends.ErrUnavailable) || errors.Is(err, backends.ErrInvalid) {
		return err
	}
	return backends.Classify(backends.ErrUnavailable, err)
}
