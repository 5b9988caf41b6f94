package rbdmap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/qsd"
)

// The files of a mapping's directory, m-<random>. The label is the name of the client's
// ceph.conf, which stands in the program's command line, and of the file that FUSE shows.
const (
	imageFile = "image" // the image's name, for sweep
	logFile   = "log"   // Ceph's own log of the client
	askSocket = "ask"   // Ceph's admin socket of the client
	begunFile = "begun" // there until Map's caller has allowed it
)

const confSuffix = ".conf"

// mapProgram maps an image with a program that has a client of its own.
func (a *Attacher) mapProgram(ctx context.Context, method string, image Image, label string, allow func(Client) error) (d Device, err error) {
	d = Device{Label: label, Method: method, dir: qsd.New(a.cfg.Dir, "").Dir}
	defer func() {
		if err != nil {
			// Whatever ctx says: nothing may stay.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			_, failed := a.drop(ctx, d)
			err = errors.Join(err, failed)
		}
	}()
	conf, err := a.prepare(image, d)
	if err != nil {
		return d, backends.Classify(backends.ErrUnavailable, err)
	}
	if method == NBD {
		d.Path, err = startNBD(ctx, image, conf)
	} else {
		err = startQSD(ctx, image, conf, d)
	}
	if err != nil {
		return d, err
	}
	client, err := identify(ctx, image, d.dir)
	if err == nil {
		err = quiet(ctx, d.dir)
	}
	if err == nil {
		err = allow(client)
	}
	if err != nil {
		return d, err
	}
	if err := os.Remove(filepath.Join(d.dir, begunFile)); err != nil {
		return d, backends.Classify(backends.ErrUnavailable, err)
	}
	if method == NBD {
		return d, nil
	}
	d.Path, err = d.disk().Attach(ctx)
	return d, err
}

// shown is the file that FUSE shows.
func (d Device) shown() string { return d.disk().File() }

func (d Device) disk() qsd.Disk { return qsd.Disk{Dir: d.dir, Name: escape(d.Label)} }

// prepare makes the directory of a mapping, and returns the path of the client's conf.
func (a *Attacher) prepare(image Image, d Device) (conf string, err error) {
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return "", err
	}
	text, err := image.Cluster.clientConf(d.dir)
	if err != nil {
		return "", err
	}
	conf = d.shown() + confSuffix
	for path, text := range map[string]string{
		filepath.Join(d.dir, imageFile): image.Spec(), filepath.Join(d.dir, begunFile): "", conf: text, d.shown(): "",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	return conf, nil
}

// clientConf is the ceph.conf of a client whose files are in dir: what the operator has
// said, and over it what makes the client tell who it is.
func (c Cluster) clientConf(dir string) (string, error) {
	var b strings.Builder
	if c.Conf != "" {
		text, err := os.ReadFile(c.Conf)
		if err != nil {
			return "", err
		}
		b.Write(text)
	}
	fmt.Fprintf(&b, "\n[client.%s]\n", c.User)
	if c.Monitors != "" {
		fmt.Fprintf(&b, "mon_host = %s\n", c.Monitors)
	}
	if c.Keyring != "" {
		fmt.Fprintf(&b, "keyring = %s\n", c.Keyring)
	}
	fmt.Fprintf(&b, "admin_socket = %s\nlog_file = %s\nlog_to_file = true\nlog_to_stderr = false\nerr_to_stderr = true\ndebug_ms = 1/1\n"+
		"rbd_cache = false\n", // it acknowledges what it has not written, also when its client is cut off
		filepath.Join(dir, askSocket), filepath.Join(dir, logFile))
	return b.String(), nil
}

// startQSD starts qemu-storage-daemon, and waits until it shows the file.
func startQSD(ctx context.Context, image Image, conf string, d Device) error {
	node := map[string]any{
		"driver": "rbd", "pool": image.Pool, "image": image.Name, "conf": conf, "user": image.Cluster.User, "discard": "unmap",
	}
	if image.Namespace != "" {
		node["namespace"] = image.Namespace
	}
	err := d.disk().Start(ctx, "image "+image.Spec(), node)
	if ended, ok := errors.AsType[*qsd.Ended](err); ok {
		return image.Cluster.failure("qemu-storage-daemon", 1, ended.Printed)
	}
	return err
}

// identify returns which of the image's watchers is the client whose files are in dir: the
// one whose address its own log has. Nothing else makes it known what a fence will have
// to name.
func identify(ctx context.Context, image Image, dir string) (Client, error) {
	var client Client
	what := "the client of image " + image.Spec() + " has not become one of its watchers"
	err := qsd.Wait(ctx, 20*time.Second, what, func() (bool, error) {
		watchers, err := image.Watchers(ctx)
		if err != nil {
			return false, err
		}
		log, err := os.ReadFile(filepath.Join(dir, logFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, backends.Classify(backends.ErrUnavailable, err)
		}
		own := map[string]bool{}
		for _, w := range watchers {
			if speaks(string(log), w.Address) {
				own[w.Address] = true
			}
		}
		for address := range own {
			client.Address = address
		}
		return len(own) == 1, nil
	})
	return client, err
}

// speaks says whether a client's log, at the level of messages, is that of the client
// with an address: its messages begin with its own.
func speaks(log, address string) bool {
	return regexp.MustCompile(`-- ` + regexp.QuoteMeta(address) + ` (-->|<==)`).MatchString(log)
}

// quiet ends the log of messages, which identify has needed.
func quiet(ctx context.Context, dir string) error {
	answer, err := askClient(ctx, filepath.Join(dir, askSocket), map[string]any{"prefix": "config set", "var": "debug_ms", "val": []string{"0/0"}})
	if err != nil {
		return fmt.Errorf("the client cannot be asked on its admin socket: %w", backends.Classify(backends.ErrUnavailable, err))
	}
	if !strings.Contains(answer, "success") {
		return fmt.Errorf("the client's admin socket has answered %q: %w", answer, backends.ErrUnavailable)
	}
	return os.Truncate(filepath.Join(dir, logFile), 0)
}

// fuseDevices returns the loop devices on files that qemu-storage-daemon shows.
func (a *Attacher) fuseDevices() ([]Device, error) {
	all, err := qsd.Devices(a.cfg.Dir, func(dir string) (string, error) {
		label, err := labelIn(dir)
		return escape(label), err
	})
	var found []Device
	for _, d := range all {
		if label := unescape(d.Name); escape(label) == d.Name {
			found = append(found, Device{Label: label, Path: d.Path, Method: FUSE, dir: d.Dir})
		}
	}
	return found, err
}

// labelIn returns the label of a mapping's directory.
func labelIn(dir string) (string, error) {
	confs, err := filepath.Glob(dir + "/*" + confSuffix)
	if err != nil || len(confs) != 1 {
		return "", errGone
	}
	return unescape(strings.TrimSuffix(filepath.Base(confs[0]), confSuffix)), nil
}

// drop undoes a Map that has failed.
func (a *Attacher) drop(ctx context.Context, d Device) (clean bool, err error) {
	if now, ok, err := a.find(d.Label); err == nil && ok && now.dir == d.dir {
		return a.Unmap(ctx, d.Label)
	}
	return qsd.End(ctx, d.dir)
}
