package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// What a source of the bundle may take and give.
var (
	sourceTime = 30 * time.Second // more than the plugin takes for an answer
	sourceSize = 8 << 20
)

// logLines is how many lines of the plugin's log are kept.
const logLines = 5000

// A source is one file of the bundle.
type source struct {
	name string
	read func(ctx context.Context) ([]byte, error)
}

func (c *cli) supportBundle() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "support-bundle",
		Short: "Collect what others need to help with a problem, in one file",
		Long: "Collect what others need to help with a problem, in one file.\n\n" +
			"It is a tar.gz of what the plugin says of the cluster, what doctor has found, the\n" +
			"plugin's settings and last log lines, and this host's kernel, mounts, devices and\n" +
			"Docker. What cannot be had in half a minute is left out, and failed.txt says why.\n" +
			"Passwords, keys and the secrets of backends.yaml are not in it; names of hosts and\n" +
			"volumes, labels and addresses are.",
		Example: c.example("support-bundle", "support-bundle -o /tmp/flocker.tar.gz"),
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			now := time.Now()
			if file == "" {
				host, _ := os.Hostname()
				file = fmt.Sprintf("flocker-%s-%s.tar.gz", host, now.UTC().Format("20060102T150405Z"))
			}
			out, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if errors.Is(err, os.ErrExist) {
				err = fmt.Errorf("%s is there already: name another file with -o", file)
			}
			if err != nil {
				return &failure{err}
			}
			files, failed := c.collect(cmd.Context(), c.sources())
			err = pack(out, strings.TrimSuffix(filepath.Base(file), ".tar.gz"), now, files)
			if err = errors.Join(err, out.Close()); err != nil {
				_ = os.Remove(file)
				return &failure{fmt.Errorf("write %s: %w", file, err)}
			}
			fmt.Fprintf(c.out, "made %s, of %d files", file, len(files))
			if failed > 0 {
				fmt.Fprintf(c.out, "; %d could not be had, see failed.txt in it", failed)
			}
			fmt.Fprint(c.out, "\nHave a look before you give it away: names, labels and addresses are in it.\n")
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "output", "o", "", "the `file`; without it, one of the host's name and the time, here")
	return cmd
}

// sources are the files of the bundle.
func (c *cli) sources() []source {
	ids := managedPlugins()
	all := []source{
		{"version.json", asked(func(ctx context.Context) (any, error) {
			plugin, err := c.client().Version(ctx)
			return versions{version, plugin.Version, plugin.Host}, err
		})},
		{"status.json", asked(func(ctx context.Context) (any, error) { return c.client().Status(ctx) })},
		{"nodes.json", asked(func(ctx context.Context) (any, error) { return c.client().Nodes(ctx) })},
		{"volumes.json", asked(func(ctx context.Context) (any, error) { return c.client().Volumes(ctx) })},
		{"backends.json", asked(func(ctx context.Context) (any, error) { return c.client().Backends(ctx) })},
		{"host.json", asked(func(ctx context.Context) (any, error) { return c.client().Host(ctx) })},
		{"doctor.txt", func(ctx context.Context) ([]byte, error) {
			var b bytes.Buffer
			patient := *c
			patient.out = &b
			err := patient.printVerdicts(examine(c.facts(ctx)))
			return b.Bytes(), err
		}},
		{"settings.txt", func(ctx context.Context) ([]byte, error) { return settings(ctx, ids) }},
		{"log.txt", func(ctx context.Context) ([]byte, error) { return pluginLog(ctx, ids) }},
		{"kernel.txt", copied("/proc/version")},
		{"os-release.txt", copied("/etc/os-release")},
		{"uptime.txt", copied("/proc/uptime")},
		{"meminfo.txt", copied("/proc/meminfo")},
		{"mountinfo.txt", copied("/proc/self/mountinfo")},
		{"filesystems.txt", copied("/proc/filesystems")},
		{"modules.txt", copied("/proc/modules")},
	}
	for name, line := range map[string]string{
		"lsblk.txt":          "lsblk --output NAME,MAJ:MIN,SIZE,RO,TYPE,FSTYPE,UUID,MOUNTPOINT,MODEL,SERIAL",
		"losetup.txt":        "losetup --list",
		"df.txt":             "df -h -l",
		"docker-version.txt": "docker version",
		"docker-info.txt":    "docker info",
		"docker-plugins.txt": "docker plugin ls --no-trunc",
	} {
		all = append(all, source{name, printed(line)})
	}
	slices.SortFunc(all, func(a, b source) int { return strings.Compare(a.name, b.name) })
	return all
}

// collect reads all sources at once. What cannot be had becomes a line of failed.txt.
func (c *cli) collect(ctx context.Context, sources []source) (files map[string][]byte, failed int) {
	scrub := scrubber(secrets(filepath.Join(filepath.Dir(c.socket), "backends.yaml"), "/etc/flocker/backends.yaml"))
	texts, errs := make([][]byte, len(sources)), make([]error, len(sources))
	var reading sync.WaitGroup
	for i, s := range sources {
		reading.Go(func() {
			ctx, cancel := context.WithTimeoutCause(ctx, sourceTime, fmt.Errorf("not done within %v", sourceTime))
			defer cancel()
			texts[i], errs[i] = s.read(ctx)
		})
	}
	reading.Wait()
	files = map[string][]byte{}
	var lines []string
	for i, s := range sources {
		if len(texts[i]) > sourceSize {
			texts[i], errs[i] = texts[i][:sourceSize], errors.Join(errs[i], fmt.Errorf("only its first %d bytes are here", sourceSize))
		}
		if len(texts[i]) > 0 {
			files[s.name] = scrub(texts[i])
		}
		if errs[i] != nil {
			lines = append(lines, s.name+": "+strings.ReplaceAll(errs[i].Error(), "\n", "; ")+"\n")
		}
	}
	if len(lines) > 0 {
		files["failed.txt"] = scrub([]byte(strings.Join(lines, "")))
	}
	return files, len(lines)
}

// pack writes files, below one directory.
func pack(w io.Writer, dir string, at time.Time, files map[string][]byte) error {
	zipped := gzip.NewWriter(w)
	archive := tar.NewWriter(zipped)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		header := tar.Header{Name: dir + "/" + name, Mode: 0o600, Size: int64(len(files[name])), ModTime: at, Format: tar.FormatPAX}
		if err := archive.WriteHeader(&header); err != nil {
			return err
		}
		if _, err := archive.Write(files[name]); err != nil {
			return err
		}
	}
	return errors.Join(archive.Close(), zipped.Close())
}

// asked is what the plugin answers, as JSON for people.
func asked(ask func(ctx context.Context) (any, error)) func(context.Context) ([]byte, error) {
	return func(ctx context.Context) ([]byte, error) {
		answer, err := ask(ctx)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		err = (&cli{out: &b}).printJSON(answer)
		return b.Bytes(), err
	}
}

// copied is a file of the host.
func copied(file string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(io.LimitReader(f, int64(sourceSize)+1))
	}
}

// printed is what a program prints.
func printed(line string) func(context.Context) ([]byte, error) {
	words := strings.Fields(line)
	return func(ctx context.Context) ([]byte, error) { return program(ctx, words...) }
}

// program runs one to its end, or until ctx ends.
func program(ctx context.Context, words ...string) ([]byte, error) {
	var out, errout bounded
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errout
	cmd.WaitDelay = time.Second // what it has started may hold the pipe
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// Docker would think that it is its plugin again.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(pair string) bool { return strings.HasPrefix(pair, callerVariable+"=") })
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if said := strings.TrimSpace(errout.String()); err != nil && said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(words, " "), err)
	}
	return out.Bytes(), err
}

// bounded keeps the beginning of what is written to it, and takes the rest.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	_, _ = b.Buffer.Write(p[:max(0, min(len(p), sourceSize+1-b.Len()))])
	return len(p), nil
}

// managedPlugins are the ids of the Flocker plugins that Docker runs here.
func managedPlugins() (ids []string) {
	found, _ := filepath.Glob(filepath.Join(plugins, "*", "flocker.sock"))
	for _, path := range found {
		ids = append(ids, filepath.Base(filepath.Dir(path)))
	}
	return ids
}

// settings are those of the plugin: of a managed one Docker has them, of a daemon its
// file.
func settings(ctx context.Context, ids []string) ([]byte, error) {
	var (
		text []byte
		err  error
	)
	if len(ids) > 0 {
		text, err = program(ctx, append([]string{"docker", "plugin", "inspect", "--format", "{{range .Settings.Env}}{{println .}}{{end}}"}, ids...)...)
	} else if text, err = os.ReadFile("/etc/flocker/flocker.env"); errors.Is(err, os.ErrNotExist) {
		return nil, errors.New("there is no managed plugin, and no /etc/flocker/flocker.env")
	}
	var kept bytes.Buffer
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "FLOCKER_") {
			kept.WriteString(line)
		}
	}
	return kept.Bytes(), err
}

// pluginLog is the end of what the plugin has logged; that of a managed one is among
// dockerd's own lines.
func pluginLog(ctx context.Context, ids []string) ([]byte, error) {
	text, err := program(ctx, "journalctl", "--no-pager", "--quiet", "--output", "short-iso-precise", "--lines", "20000", "--unit", "docker", "--unit", "flocker")
	var kept []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "flocker") || slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(line, id) }) {
			kept = append(kept, line)
		}
	}
	return []byte(strings.Join(kept[max(0, len(kept)-logLines):], "")), err
}

// secret are keys whose values are nobody's business, if they are not the name of a
// file.
var secret = regexp.MustCompile(`(?i)pass|secret|token|credential|(^|_)key`)

// secrets are what stands in the files that a backends.yaml names, and under its keys
// that sound like one.
func secrets(files ...string) (found []string) {
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it is not there, or not ours to read
		}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			value = strings.Trim(strings.TrimSpace(value), `"'`)
			key = strings.Trim(strings.TrimSpace(key), `"'- `)
			switch {
			case filepath.IsAbs(value):
				if info, err := os.Stat(value); err == nil && info.Mode().IsRegular() && info.Size() < 64<<10 && info.Mode().Perm()&0o004 == 0 {
					text, _ := os.ReadFile(value)
					found = append(found, strings.TrimSpace(string(text)))
					for _, word := range strings.FieldsFunc(string(text), func(r rune) bool { return strings.ContainsRune(" \t\r\n\"',", r) }) {
						_, after, _ := strings.Cut(word, "=")
						found = append(found, word, after)
					}
				}
			case secret.MatchString(key):
				found = append(found, value)
			}
		}
	}
	// The longest first; what is very short is no secret, and is everywhere.
	found = slices.DeleteFunc(found, func(s string) bool { return len(s) < 5 })
	slices.SortFunc(found, func(a, b string) int { return len(b) - len(a) })
	return slices.Compact(found)
}

const removed = "(removed)"

// forms are what secrets look like wherever they stand.
var forms = []struct {
	is     *regexp.Regexp
	become string
}{
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|[A-Za-z0-9+/=\s\\]*)`), removed},
	{regexp.MustCompile(`(://)[^/\s"'@]+@`), "${1}" + removed + "@"},
	{regexp.MustCompile(`(?i)((?:authorization|x-[a-z-]*token)["']?\s*[:=]\s*["']?)(?:(?:bearer|basic)\s+)?[^\s"']+`), "${1}" + removed},
	{regexp.MustCompile(`(?i)([a-z0-9_.-]*(?:passw(?:or)?d|passphrase|secret|credential|token|[_-]key|apikey)["']?\s*=\s*["']?)([^/\s"',}][^\s"',}]*)`), "${1}" + removed},
	{regexp.MustCompile(`(?i)("[a-z0-9_.-]*(?:passw(?:or)?d|passphrase|secret|credential|[_-]key|apikey)\\?"\s*:\s*\\?")[^/"\\][^"\\]*`), "${1}" + removed},
}

func scrubber(literal []string) func([]byte) []byte {
	return func(text []byte) []byte {
		for _, word := range literal {
			text = bytes.ReplaceAll(text, []byte(word), []byte(removed))
		}
		for _, f := range forms {
			text = f.is.ReplaceAll(text, []byte(f.become))
		}
		return text
	}
}
