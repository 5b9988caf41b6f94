package rbdmap

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// Cluster says how to reach a Ceph cluster.
type Cluster struct {
	// Conf is a ceph.conf; empty is none.
	Conf string
	// Monitors are their addresses, separated by commas; empty are those of Conf.
	Monitors string
	// User is the client's name, without "client.".
	User string
	// Keyring is the file with the client's key; empty is what Conf says, or Ceph's own
	// places.
	Keyring string
	// Timeout bounds every call of Ceph's programs; 0 is 30 s.
	Timeout time.Duration
	// Exec runs a program and returns what it prints, and with what it ends; nil runs it on
	// this host. A test has programs of its own.
	Exec func(ctx context.Context, program string, args []string) (out, errs string, code int)
}

// opTimeout is how long Ceph's programs wait for an answer of a monitor or an OSD. By
// themselves they wait for ever.
const opTimeout = 10

// args are what each of Ceph's programs is told.
func (c Cluster) args(program string) []string {
	args := []string{"--conf", cmp.Or(c.Conf, "/dev/null"), "--id", c.User}
	if c.Monitors != "" {
		args = append(args, "--mon-host", c.Monitors)
	}
	if c.Keyring != "" {
		args = append(args, "--keyring", c.Keyring)
	}
	if program == "ceph" {
		return append(args, "--connect-timeout", strconv.Itoa(opTimeout))
	}
	if program == "rados" {
		args = append(args, "--no-mon-config") // it has nothing to do with objects, and takes time
	}
	seconds := strconv.Itoa(opTimeout)
	if program == "rbd-nbd" { // it stays, and serves a device: an outage is no error for that
		return append(args, "--client-mount-timeout", seconds)
	}
	return append(args, "--client-mount-timeout", seconds, "--rados-mon-op-timeout", seconds, "--rados-osd-op-timeout", seconds)
}

// Failure is what a program of Ceph has failed with.
type Failure struct {
	Program string
	// Code is the system's error number, as Ceph's programs print or return it; 0 if
	// they do not say.
	Code syscall.Errno
	// Text is what it has printed last.
	Text string
	// Advice is what helps, where that is known.
	Advice string
	class  error
}

func (f *Failure) Error() string {
	text := f.Program + ": " + f.Text
	if f.Advice != "" {
		text += "; " + f.Advice
	}
	return text
}

// Is makes a failure one of a class of errors, if it tells.
func (f *Failure) Is(target error) bool { return f.class != nil && target == f.class }

// Run runs one of Ceph's programs, and returns what it has printed. Its error is a
// *Failure, unless the program could not be run or has not ended in time.
func (c Cluster) Run(ctx context.Context, program string, args ...string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	limit := cmp.Or(c.Timeout, 30*time.Second)
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if c.Exec != nil {
		out, errs, code := c.Exec(bounded, program, args)
		switch {
		case ctx.Err() != nil:
			return nil, backends.Classify(backends.ErrUnavailable, ctx.Err())
		case code != 0:
			return nil, c.failure(program, code, errs)
		}
		return []byte(out), nil
	}
	cmd := exec.CommandContext(bounded, program, append(c.args(program), args...)...)
	cmd.WaitDelay = time.Second
	// A terminal's interrupt is for us; and no settings that nobody has asked for.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(os.Environ(), "CEPH_ARGS=", "LC_ALL=C.UTF-8")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	what := program + " " + strings.Join(args[:min(len(args), 2)], " ")
	switch {
	case err == nil:
		return out.Bytes(), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: Ceph has not answered: %w", what, backends.Classify(backends.ErrUnavailable, ctx.Err()))
	case bounded.Err() != nil:
		return nil, fmt.Errorf("%s: Ceph has not answered within %s; is the cluster up, and can this host reach it?: %w", what, limit, backends.ErrUnavailable)
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return nil, fmt.Errorf("the program %s cannot be run: %w; install Debian's package ceph-common: %w", program, err, backends.ErrUnavailable)
	}
	return nil, c.failure(program, exit.ExitCode(), errs.String())
}

var (
	errorNumber = regexp.MustCompile(`\(([0-9]+)\) [A-Z]|\[errno ([0-9]+)\]|Error (E[A-Z]+):`)
	connecting  = regexp.MustCompile(`(?im)^timed out$|^cluster connection aborted|couldn't connect to|error connecting to|failed to fetch mon config|authenticate timed out|unable to find a keyring`)
	noKey       = regexp.MustCompile(`(?i)unable to find a keyring|no keyring found`)
	opening     = regexp.MustCompile(`(?i)error opening (default )?pool|pool .* (does not|doesn't) exist|namespace .* (does not|doesn't) exist`)
	option      = regexp.MustCompile(` --[a-z]+ \{.*\}:`)
	logLine     = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.+-]+ [0-9a-f]+ +-?[0-9]+ `)
)

// failure makes sense of what a program has printed: lines of its own, which say what
// has failed, between those of Ceph's log.
func (c Cluster) failure(program string, code int, printed string) *Failure {
	f := &Failure{Program: program}
	if code > 1 && code < 133 { // rbd ends with the error's number, others with 1
		f.Code = syscall.Errno(code)
	}
	var own, logged []string
	for line := range strings.Lines(printed) {
		text := strings.TrimSpace(logLine.ReplaceAllString(line, ""))
		if text != strings.TrimSpace(line) {
			logged = append(logged, text)
			continue
		}
		if text == "" {
			continue
		}
		own = append(own, strings.TrimPrefix(option.ReplaceAllString(text, ""), program+": "))
		m := errorNumber.FindStringSubmatch(text)
		switch {
		case m == nil:
			for number, words := range words {
				if strings.HasSuffix(text, ": "+words) {
					f.Code = number
				}
			}
		case m[3] != "":
			f.Code = names[m[3]]
		default:
			n, _ := strconv.Atoi(m[1] + m[2]) // the expression has seen to it
			f.Code = syscall.Errno(n)
		}
	}
	if len(own) == 0 {
		own = logged
	}
	f.Text = strings.Join(own[max(0, len(own)-2):], "; ")
	if len(f.Text) > 400 {
		f.Text = strings.ToValidUTF8(f.Text[:400], "") + "…"
	}
	f.Text = cmp.Or(f.Text, fmt.Sprintf("it ended with %d and said nothing", code))
	f.Advice, f.class = c.meaning(f.Code, printed)
	return f
}

// meaning is what helps against an error number, and its class.
func (c Cluster) meaning(code syscall.Errno, printed string) (advice string, class error) {
	who := "client." + c.User
	if connecting.MatchString(printed) {
		switch {
		case noKey.MatchString(printed):
			return "there is no key of " + who + ": check user, conf and keyring_file", backends.ErrUnavailable
		case code == syscall.EACCES || code == syscall.EPERM || code == syscall.EINVAL || code == syscall.EOPNOTSUPP:
			return "the cluster does not accept the key of " + who + ": check user and keyring_file, and `ceph auth get " + who + "`", backends.ErrUnavailable
		}
		return "no monitor has answered: is the cluster up, and can this host reach it? check conf and monitors", backends.ErrUnavailable
	}
	switch code {
	case syscall.EPERM, syscall.EACCES:
		return who + " may not do this: give it mon 'profile rbd' and osd 'profile rbd pool=…'", backends.ErrUnavailable
	case syscall.ENOENT:
		if opening.MatchString(printed) {
			return "the cluster has no such pool or namespace: create it, or check pool and namespace", backends.ErrUnavailable
		}
		return "", backends.ErrNotFound
	case syscall.EEXIST:
		return "", backends.ErrExists
	case syscall.EBUSY:
		return "", backends.ErrInUse
	case syscall.EINVAL:
		return "", backends.ErrInvalid
	case syscall.ETIMEDOUT:
		return "is the cluster healthy, and can this host reach its OSDs? see `ceph health detail`", backends.ErrUnavailable
	default:
		return "", backends.ErrUnavailable
	}
}

// names are the error numbers that the program ceph writes by name.
var names = map[string]syscall.Errno{
	"EACCES": syscall.EACCES, "EPERM": syscall.EPERM, "ENOENT": syscall.ENOENT, "EINVAL": syscall.EINVAL,
	"EBUSY": syscall.EBUSY, "EEXIST": syscall.EEXIST, "ETIMEDOUT": syscall.ETIMEDOUT,
}

// words are the errors that qemu-storage-daemon writes without their numbers.
var words = map[syscall.Errno]string{
	syscall.ENOENT: "No such file or directory", syscall.EPERM: "Operation not permitted", syscall.EACCES: "Permission denied",
	syscall.ETIMEDOUT: "Connection timed out",
}

// Ask runs a program with --format json, and decodes what it prints.
func (c Cluster) Ask(ctx context.Context, answer any, program string, args ...string) error {
	out, err := c.Run(ctx, program, append(args, "--format", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, answer); err != nil {
		return fmt.Errorf("%s %s has printed something else than JSON: %w", program, strings.Join(args[:min(len(args), 2)], " "),
			backends.Classify(backends.ErrUnavailable, err))
	}
	return nil
}

// fsids are the ids of the clusters that this process has asked, by how they are reached.
var fsids sync.Map

// FSID returns the cluster's id. It is asked for once: the program for it takes longer than
// all others.
func (c Cluster) FSID(ctx context.Context) (string, error) {
	reached := strings.Join([]string{c.Conf, c.Monitors, c.User, c.Keyring}, "\n")
	if id, ok := fsids.Load(reached); ok && c.Exec == nil {
		return id.(string), ctx.Err()
	}
	var answer struct {
		FSID string `json:"fsid"`
	}
	if err := c.Ask(ctx, &answer, "ceph", "fsid"); err != nil {
		return "", err
	}
	if _, err := uuid.Parse(answer.FSID); err != nil {
		return "", fmt.Errorf("ceph fsid has answered %q: %w", answer.FSID, backends.ErrUnavailable)
	}
	if c.Exec == nil {
		fsids.Store(reached, answer.FSID)
	}
	return answer.FSID, nil
}

// Watcher is a client that has an image open for writing.
type Watcher struct {
	Address string `json:"address"`
	Client  uint64 `json:"client"`
}

// Watchers returns the clients that have an image open.
func (i Image) Watchers(ctx context.Context) ([]Watcher, error) {
	var status struct {
		Watchers []Watcher `json:"watchers"`
	}
	if err := i.Cluster.Ask(ctx, &status, "rbd", "status", i.Spec()); err != nil {
		return nil, err
	}
	return status.Watchers, nil
}
