package iscsi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// ProgramConfig is what a Program is made from.
type ProgramConfig struct {
	// Dir is where sockets and notes are. It has to survive this process, but not the
	// host's next boot: below /run. What is connected from another Dir is not seen.
	Dir string
	// Name is that of this host as an initiator.
	Name string
}

// Program is an Initiator for kernels without one: for each unit there is the program
// qemu-storage-daemon, with a session of its own, whose file is made a loop device.
//
// A session that is lost is not made again under the device: libiscsi would log in as somebody
// new, to whom the target may answer before it gets the rest of what was sent in the old
// session, and so would write old data over new. What is read and written waits then, until
// Devices or another call here sees it and kills the program; from then on it fails.
type Program struct{ cfg ProgramConfig }

var _ Initiator = (*Program)(nil)

// mostDir keeps paths of sockets below the kernel's limit.
const mostDir = 70

// NewProgram returns a Program. It does nothing yet.
func NewProgram(cfg ProgramConfig) (*Program, error) {
	if !filepath.IsAbs(cfg.Dir) || filepath.Clean(cfg.Dir) != cfg.Dir || len(cfg.Dir) > mostDir {
		return nil, fmt.Errorf("directory %q must be an absolute path of at most %d characters: %w", cfg.Dir, mostDir, backends.ErrInvalid)
	}
	if err := ValidName(cfg.Name); err != nil {
		return nil, err
	}
	return &Program{cfg}, nil
}

// The files of a unit's directory.
const (
	unitFile   = "unit"   // the LUN, without its secret
	secretFile = "secret" // that of CHAP, until the program has read it
	begunFile  = "begun"  // there until the device is
)

// unit is what there is of a connected LUN.
type unit struct {
	qsd.Device

	lun   LUN
	life  string
	begun bool // its Connect has not come to its end
}

func (u unit) device() Device {
	return Device{Path: u.Path, Target: u.lun.Target, Number: u.lun.Number, Life: u.life}
}

// units returns all that there is, after it has ended the programs that have lost their sessions.
// One without a path has no device.
func (p *Program) units() ([]unit, error) {
	devices, err := qsd.Devices(p.cfg.Dir, func(dir string) (string, error) {
		lun, err := lunIn(dir)
		return fileName(lun), err
	})
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	dirs, err := qsd.Dirs(p.cfg.Dir)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	var all []unit
	for _, dir := range dirs {
		u := unit{Device: qsd.Device{Disk: qsd.Disk{Dir: dir}}, begun: true}
		for _, d := range devices {
			if d.Dir != dir {
				continue
			}
			sequence, err := qsd.Sequence(d.Path)
			if err != nil {
				continue // it has gone
			}
			_, err = os.Stat(filepath.Join(dir, begunFile))
			u = unit{Device: d, life: d.Path + " " + sequence, begun: !errors.Is(err, fs.ErrNotExist)}
		}
		if lost(dir) {
			qsd.Kill(dir)
		}
		if u.lun, err = lunIn(dir); err != nil {
			u.begun = true // made, or removed, just now
		}
		all = append(all, u)
	}
	return all, nil
}

func lunIn(dir string) (lun LUN, err error) {
	text, err := os.ReadFile(filepath.Join(dir, unitFile))
	if err == nil {
		err = json.Unmarshal(text, &lun)
	}
	return lun, err
}

// fileName is that of the file that the program shows.
func fileName(lun LUN) string { return lun.Target + "-lun-" + strconv.Itoa(lun.Number) }

// Devices implements Initiator.
func (p *Program) Devices(ctx context.Context) ([]Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	all, err := p.units()
	var found []Device
	for _, u := range all {
		if !u.begun {
			found = append(found, u.device())
		}
	}
	return found, err
}

// Connect implements Initiator.
func (p *Program) Connect(ctx context.Context, lun LUN) (Device, error) {
	if err := lun.Valid(); err != nil {
		return Device{}, err
	}
	if lacks := qsd.Lacks(ctx); len(lacks) > 0 {
		return Device{}, fmt.Errorf("this host cannot connect an iSCSI unit through FUSE, as it lacks %s: %w", strings.Join(lacks, ", "), backends.ErrUnavailable)
	}
	all, err := p.units()
	if err != nil {
		return Device{}, err
	}
	for _, u := range all {
		switch {
		case !u.begun && u.device().Is(lun):
			return u.device(), nil
		case u.begun && p.left(u, lun):
			if _, err := p.end(ctx, u); err != nil {
				return Device{}, err
			}
		}
	}
	for _, portal := range lun.Portals { // all of them, as it may have come by any
		if err := acknowledged(ctx, portal); err != nil {
			return Device{}, fmt.Errorf("connect %s: %w", lun, err)
		}
	}
	class := backends.ErrNotFound // if all say so
	var failed []string
	for _, portal := range lun.Portals {
		d, err := p.connect(ctx, lun, portal)
		if err == nil || ctx.Err() != nil || errors.Is(err, backends.ErrInUse) {
			return d, err
		}
		if !errors.Is(err, backends.ErrNotFound) {
			class = backends.ErrUnavailable
		}
		failed = append(failed, fmt.Sprintf("portal %s: %s", portal, err))
	}
	return Device{}, fmt.Errorf("connect %s: %w", lun, backends.Classify(class, errors.New(strings.Join(failed, "; "))))
}

// left says whether what was begun is of a LUN, or so early and long ago that nothing tells.
func (p *Program) left(u unit, lun LUN) bool {
	if u.lun.Target != "" {
		return u.device().Is(lun)
	}
	info, err := os.Stat(u.Dir)
	return err == nil && time.Since(info.ModTime()) > time.Minute
}

// lost says whether the program of a unit has lost its session.
func lost(dir string) bool { return strings.Contains(qsd.Output(dir), "reconnect initiated") }

// confine keeps the program of a unit from making another session: it gets no more sockets.
func confine(dir string) error {
	pids := qsd.Processes(dir)
	if len(pids) == 0 {
		return errors.New("its program has ended")
	}
	for _, pid := range pids {
		free := 0
		for {
			if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, free)); errors.Is(err, fs.ErrNotExist) {
				break
			} else if err != nil {
				return err
			}
			free++
		}
		// No number of a file below this is free.
		limit := unix.Rlimit{Cur: uint64(free), Max: uint64(free)}
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
			return os.NewSyscallError("prlimit", err)
		}
	}
	return nil
}

// connect makes a device by one portal.
func (p *Program) connect(ctx context.Context, lun LUN, portal string) (_ Device, err error) {
	u := unit{Device: qsd.Device{Disk: qsd.New(p.cfg.Dir, fileName(lun))}, lun: lun}
	defer func() {
		if err != nil {
			// Whatever ctx says: nothing may stay.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			_, failed := p.end(ctx, u)
			err = errors.Join(err, failed)
		}
	}()
	u.Env = []string{"LIBISCSI_DEBUG=2"} // for lost
	if err := p.prepare(u); err != nil {
		return Device{}, backends.Classify(backends.ErrUnavailable, err)
	}
	node := map[string]any{
		"driver": "iscsi", "transport": "tcp", "portal": portal, "target": lun.Target, "lun": lun.Number,
		"initiator-name": p.cfg.Name, "discard": "unmap",
	}
	var options []string
	if lun.User != "" {
		options = []string{"--object", "secret,id=chap,file=" + filepath.Join(u.Dir, secretFile)}
		node["user"], node["password-secret"] = lun.User, "chap"
	}
	err = u.Start(ctx, lun.String(), node, options...)
	if ended, ok := errors.AsType[*qsd.Ended](err); ok {
		err = meaning(ended)
	}
	if err != nil {
		return Device{}, err
	}
	if err := confine(u.Dir); err != nil {
		return Device{}, backends.Classify(backends.ErrUnavailable, err)
	}
	if u.Path, err = u.Attach(ctx); err != nil {
		return Device{}, err
	}
	sequence, err := qsd.Sequence(u.Path)
	u.life = u.Path + " " + sequence
	for _, file := range []string{secretFile, begunFile} {
		err = errors.Join(err, os.Remove(filepath.Join(u.Dir, file)))
	}
	if err != nil {
		return Device{}, backends.Classify(backends.ErrUnavailable, err)
	}
	return u.device(), nil
}

// prepare makes the directory of a unit.
func (p *Program) prepare(u unit) error {
	if err := os.MkdirAll(p.cfg.Dir, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(u.Dir, 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(u.lun) // without the secret
	if err != nil {
		return err
	}
	for path, text := range map[string]string{
		filepath.Join(u.Dir, begunFile): "", filepath.Join(u.Dir, secretFile): u.lun.Secret, filepath.Join(u.Dir, unitFile): string(text), u.File(): "",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

var said = regexp.MustCompile(`iSCSI: (Failed to connect to LUN : )?(.*)`)

// meaning is what a program has failed with that could not open a unit.
func meaning(ended *qsd.Ended) error {
	m := said.FindStringSubmatch(ended.Printed)
	if m == nil {
		if strings.Contains(ended.Printed, "Unknown driver 'iscsi'") {
			return fmt.Errorf("qemu-storage-daemon knows no iSCSI; install Debian's package qemu-block-extra: %w", backends.ErrUnavailable)
		}
		return backends.Classify(backends.ErrUnavailable, ended)
	}
	class, advice := backends.ErrUnavailable, ""
	switch {
	case strings.Contains(m[2], "Authentication failure"):
		advice = "; the target wants another user or secret of CHAP than this host was told"
	case strings.Contains(m[2], "Authorization failure"):
		advice = "; the target does not let this host in, by its name as an initiator"
	case strings.Contains(m[2], "Target not found"), strings.Contains(m[2], "LOGICAL_UNIT_NOT_SUPPORTED"):
		class, advice = backends.ErrNotFound, "; there is no such unit for this host"
	case strings.Contains(m[2], "iscsi_service failed"):
		advice = "; is the target up, and can this host reach it?"
	}
	return fmt.Errorf("%s%s: %w", strings.TrimSpace(m[2]), advice, class)
}

// Served implements Initiator.
func (p *Program) Served(d Device) (bool, error) {
	u, ok, err := p.find(d)
	return ok && !lost(u.Dir) && len(qsd.Processes(u.Dir)) > 0, err
}

// Disconnect implements Initiator.
func (p *Program) Disconnect(ctx context.Context, d Device) (clean bool, err error) {
	u, ok, err := p.find(d)
	if err != nil || !ok {
		return false, err
	}
	return p.end(ctx, u)
}

// find returns what there is of a device.
func (p *Program) find(d Device) (unit, bool, error) {
	all, err := p.units()
	for _, u := range all {
		if !u.begun && u.device() == d {
			return u, true, nil
		}
	}
	return unit{}, false, err
}

// end removes what there is of a unit. clean says that the program has closed its session with
// nothing under way.
func (p *Program) end(ctx context.Context, u unit) (clean bool, err error) {
	if u.Path == "" {
		qsd.Kill(u.Dir) // nobody has written anything, and it may be waiting for its target
		return qsd.End(ctx, u.Dir)
	}
	return u.Detach(ctx, u.Path)
}
