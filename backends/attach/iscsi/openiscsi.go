package iscsi

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// How iscsiadm ends.
const (
	noSession     = 2
	timedOut      = 8
	sessionExists = 15
	fatalLogin    = 19
	noDaemon      = 20
	noObjects     = 21
	refused       = 24
)

// failure is what iscsiadm has failed with.
type failure struct {
	code int
	text string
}

func (f *failure) Error() string { return f.text + ": " + backends.ErrUnavailable.Error() }

func (f *failure) Is(target error) bool { return target == backends.ErrUnavailable }

// iscsiadm runs the program of this name. What it has failed with is a *failure, without the secret of the
// unit.
func (k *Kernel) iscsiadm(ctx context.Context, lun LUN, args ...string) error {
	if err := ctx.Err(); err != nil {
		return unavailable(err)
	}
	bounded, cancel := context.WithTimeout(ctx, k.limits.program)
	defer cancel()
	cmd := exec.CommandContext(bounded, "iscsiadm", args...)
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt is for us
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("iscsiadm has not ended: %w", unavailable(ctx.Err()))
	case bounded.Err() != nil:
		return fmt.Errorf("iscsiadm has not ended within %s; is iscsid well on this host, and can it reach the target?: %w", k.limits.program, backends.ErrUnavailable)
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return fmt.Errorf("the program iscsiadm cannot be run: %w; install the package open-iscsi: %w", err, backends.ErrUnavailable)
	}
	text := reason(errs.String())
	if lun.Secret != "" {
		text = strings.ReplaceAll(text, lun.Secret, "…")
	}
	return &failure{exit.ExitCode(), k.meaning(lun, exit.ExitCode(), text)}
}

// reason is the one that iscsiadm has printed: what iscsid has told it, or its first line. Then it
// says what it has not done.
func reason(printed string) string {
	text, _, _ := strings.Cut(strings.TrimSpace(printed), "\n")
	for line := range strings.Lines(printed) {
		if strings.Contains(line, "reported error (") {
			text = line
		}
	}
	text = strings.TrimSpace(strings.TrimPrefix(text, "iscsiadm:"))
	if len(text) > 400 {
		text = strings.ToValidUTF8(text[:400], "") + "…"
	}
	return text
}

// meaning says what helps.
func (k *Kernel) meaning(lun LUN, code int, text string) string {
	what := fmt.Sprintf("iscsiadm: %s", cmp.Or(text, fmt.Sprintf("it ended with %d and said nothing", code)))
	if code == noDaemon {
		return what + "; iscsid does not run on this host: systemctl enable --now iscsid"
	}
	if lun.Target == "" {
		return what
	}
	switch code {
	case refused:
		return what + "; the target refuses this host: are the user and the secret of CHAP right, and may the initiator " + k.name() + " log in?"
	case fatalLogin, timedOut: // open-iscsi takes long to believe that there is no such target
		return what + "; is the target up, can this host reach it, has this portal a target of this name, and may the initiator " + k.name() + " log in?"
	case noObjects:
		return what + "; open-iscsi has its records neither in " + strings.Join(k.databases, " nor in ")
	}
	return what
}

// name is what a target knows this host by.
func (k *Kernel) name() string {
	if k.cfg.Name != "" {
		return k.cfg.Name
	}
	if name, err := Name(NameFile); err == nil {
		return name
	}
	return "of " + NameFile
}

// lacking is an error if the host cannot do without something.
func (k *Kernel) lacking(ctx context.Context) error {
	if _, err := exec.LookPath("iscsiadm"); err != nil {
		return fmt.Errorf("this host has no program iscsiadm: install the package open-iscsi, and let iscsid run: %w", backends.ErrUnavailable)
	}
	class := filepath.Join(k.disk.Sysfs, "class/iscsi_transport/tcp")
	if _, err := os.Stat(class); err == nil {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_ = exec.CommandContext(bounded, "modprobe", "iscsi_tcp").Run() // it may be part of the kernel
	if _, err := os.Stat(class); err != nil {
		return fmt.Errorf("this host's kernel has no iSCSI initiator: the module iscsi_tcp is missing: %w", backends.ErrUnavailable)
	}
	return nil
}

// can says whether this host has the kernel's initiator, and iscsid, which listens where this process
// can reach it.
func (k *Kernel) can(ctx context.Context) bool {
	sockets, err := os.ReadFile(k.sockets)
	return err == nil && bytes.Contains(sockets, []byte(" @ISCSIADM_ABSTRACT_NAMESPACE\n")) && k.lacking(ctx) == nil
}

// database returns the directory in which open-iscsi has its records, which differs between
// distributions: it has our interface there.
func (k *Kernel) database(ctx context.Context) (string, error) {
	find := func() string {
		for _, dir := range k.databases {
			if _, err := os.Stat(filepath.Join(dir, "ifaces", k.cfg.Interface)); err == nil {
				return dir
			}
		}
		return ""
	}
	dir := find()
	if dir == "" {
		if err := k.iscsiadm(ctx, LUN{}, "-m", "iface", "-I", k.cfg.Interface, "-o", "new"); err != nil {
			return "", err
		}
		if dir = find(); dir == "" {
			return "", fmt.Errorf("iscsiadm has made an interface %s, and it is neither in %s: %w",
				k.cfg.Interface, strings.Join(k.databases, " nor in "), backends.ErrUnavailable)
		}
	}
	return dir, nil
}

// own are the lines of a record that make it ours.
func (k *Kernel) own() []string {
	lines := []string{"iface.iscsi_ifacename = " + k.cfg.Interface, "iface.transport_name = tcp"}
	if k.cfg.Name != "" {
		lines = append(lines, "iface.initiatorname = "+k.cfg.Name)
	}
	return lines
}

// record writes how to log in to a portal, and returns where. It is written here and not by
// iscsiadm: nobody else sees the secret, and the records of others stay as they are.
func (k *Kernel) record(ctx context.Context, lun LUN, to string) (path string, err error) {
	dir, err := k.database(ctx)
	if err != nil {
		return "", err
	}
	k.forget(lun.Target, to)
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		return "", fmt.Errorf("portal %s: %w", to, backends.Classify(backends.ErrInvalid, err))
	}
	defaults, err := os.ReadFile(k.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", unavailable(err)
	}
	lines := []string{"# BEGIN RECORD"}
	for line := range strings.Lines(string(defaults)) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "node.") {
			lines = append(lines, line)
		}
	}
	// What is last counts.
	lines = append(lines,
		"node.name = "+lun.Target, "node.conn[0].address = "+host, "node.conn[0].port = "+port,
		"node.startup = manual", "node.conn[0].startup = manual", "node.leading_login = No",
		"node.session.scan = manual", "node.session.nr_sessions = 1",
		fmt.Sprintf("node.session.timeo.replacement_timeout = %d", max(1, int(k.cfg.Outage.Seconds()))),
		"node.conn[0].timeo.noop_out_interval = 5", "node.conn[0].timeo.noop_out_timeout = 5",
		"node.conn[0].timeo.login_timeout = 10", "node.session.initial_login_retry_max = 2",
	)
	if lun.User != "" {
		lines = append(lines, "node.session.auth.authmethod = CHAP",
			"node.session.auth.username = "+lun.User, "node.session.auth.password = "+lun.Secret)
	}
	lines = append(append(lines, k.own()...), "# END RECORD")
	if err := writeFile(filepath.Join(dir, "ifaces", k.cfg.Interface), k.own()); err != nil {
		return "", err
	}
	// The number of the portal's group, which is known only later, is 0 in the file's name, and
	// not in the file: no other is refused.
	path = filepath.Join(dir, "nodes", lun.Target, host+","+port+",0", k.cfg.Interface)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", unavailable(err)
	}
	return path, writeFile(path, lines)
}

// begunRecord is what the names of files begin with that are not written yet.
const begunRecord = ".flocker-"

// writeFile writes a file as a whole, unless it says that already.
func writeFile(path string, lines []string) error {
	text := []byte(strings.Join(lines, "\n") + "\n")
	if is, err := os.ReadFile(path); err == nil && bytes.Equal(is, text) {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(filepath.Dir(path)), begunRecord) // as 0600, and where iscsiadm does not read it
	if err != nil {
		return unavailable(err)
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // it may be there
	}
	return unavailable(err)
}

// keep puts a record where an iscsid that is started anew looks for that of the session: with
// other settings it would wait longer in an outage.
func (k *Kernel) keep(record string, s session) error {
	place, dir := filepath.Dir(record), ""
	if i := strings.LastIndexByte(place, ','); s.group != "" {
		dir = place[:i+1] + s.group
	}
	if dir == "" || dir == place {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return unavailable(err)
	}
	if err := os.Rename(record, filepath.Join(dir, filepath.Base(record))); err != nil {
		return unavailable(err)
	}
	_ = os.Remove(place) // others may have a record in it
	return nil
}

// forget removes our records of a portal.
func (k *Kernel) forget(target, to string) {
	for _, dir := range k.databases {
		at := filepath.Join(dir, "nodes", target)
		records, err1 := filepath.Glob(filepath.Join(at, "*", k.cfg.Interface))
		begun, err2 := filepath.Glob(filepath.Join(at, begunRecord+"*"))
		if errors.Join(err1, err2) != nil {
			return
		}
		for _, path := range begun {
			_ = os.Remove(path) // of a process that was killed
		}
		for _, record := range records {
			place := strings.Split(filepath.Base(filepath.Dir(record)), ",")
			if len(place) < 2 || portal(net.JoinHostPort(place[0], place[1])) != portal(to) {
				continue
			}
			_ = os.Remove(record)
			_ = os.Remove(filepath.Dir(record)) // it stays if others have something in it
		}
		_ = os.Remove(at) // and so does this
	}
}
