package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// unpack returns the files of a bundle, which all are in one directory.
func unpack(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v %v", file, info.Mode(), err)
	}
	zipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for archive := tar.NewReader(zipped); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		dir, name, _ := strings.Cut(header.Name, "/")
		if dir != strings.TrimSuffix(filepath.Base(file), ".tar.gz") {
			t.Errorf("%s is in %s", name, dir)
		}
		files[name] = string(text)
	}
}

// programs puts shell scripts where the bundle finds programs, and no others.
func programs(t *testing.T, scripts map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSupportBundle(t *testing.T) {
	f, look := doctored()
	socket := serve(t, f)
	programs(t, map[string]string{
		"docker": `case "$*" in
			version) echo "Server: 29.1"; [ -z "$` + callerVariable + `" ] || echo called as a plugin;;
			info) echo "Volume: local"; echo "no daemon" >&2; exit 1;;
		esac`,
		"journalctl": `echo "$*" >&2; echo "docker: flocker is ready"; echo "docker: another plugin's secret"`,
		"lsblk":      "echo sda",
		"losetup":    "echo none",
	})
	t.Setenv(callerVariable, "docker")
	file := filepath.Join(t.TempDir(), "b.tar.gz")
	got := commandOn(t, socket, look, "support-bundle", "-o", file)
	files := unpack(t, file)
	want(t, "support-bundle", got, result{0, fmt.Sprintf("made %s, of %d files; %d could not be had, see failed.txt in it\n"+
		"Have a look before you give it away: names, labels and addresses are in it.\n", file, len(files), strings.Count(files["failed.txt"], "\n")), ""})
	for name, has := range map[string]string{
		"version.json": `"plugin": "v0.1.0"`, "status.json": `"host": "alpha"`, "nodes.json": `"host": "beta"`, "volumes.json": `"name": "scratch"`,
		"backends.json": `"name": "loopback"`, "host.json": `"endpoint": "https://10.0.0.2:2379"`, "doctor.txt": "\n* etcd: the etcd server https://10.0.0.2:2379 does not answer",
		"log.txt": "docker: flocker is ready\n", "kernel.txt": "Linux version", "mountinfo.txt": " / / ", "lsblk.txt": "sda\n", "losetup.txt": "none\n",
		"docker-version.txt": "Server: 29.1\n", "docker-info.txt": "Volume: local\n", "failed.txt": "docker-info.txt: docker info: exit status 1: no daemon\n",
	} {
		if !strings.Contains(files[name], has) {
			t.Errorf("%s: got %q, want %q in it", name, files[name], has)
		}
	}
	if files["log.txt"] != "docker: flocker is ready\n" || files["docker-version.txt"] != "Server: 29.1\n" || !strings.Contains(files["failed.txt"], `df.txt: df -h -l: exec: "df": executable file not found in $PATH`+"\n") {
		t.Errorf("got %q, %q, %q", files["log.txt"], files["docker-version.txt"], files["failed.txt"])
	}

	want(t, "once more", commandOn(t, socket, look, "support-bundle", "-o", file), result{1, "", file + " is there already: name another file with -o\n"})
	t.Chdir(t.TempDir())
	if got := commandOn(t, "/nonexistent", look, "support-bundle"); got.code != 0 {
		t.Errorf("without a plugin: %+v", got)
	}
	made, err := filepath.Glob("flocker-*Z.tar.gz")
	if err != nil || len(made) != 1 {
		t.Fatalf("made %q, %v", made, err)
	}
	files = unpack(t, made[0])
	const gone = "no Flocker plugin answers on /nonexistent: is it enabled on this host? (docker plugin ls)\n"
	if !strings.Contains(files["failed.txt"], "volumes.json: "+gone) || files["volumes.json"] != "" || !strings.Contains(files["doctor.txt"], "plugin         wrong") {
		t.Errorf("without a plugin: %q", files)
	}
}

// What secrets look like, and where they stand in the files of a host, is in no file.
func TestBundleHasNoSecrets(t *testing.T) {
	state := t.TempDir()
	kept := map[string]string{
		"password": "Zieg-elstein7", "keyring": "[client.flocker]\n\tkey = AQDx0r9nAAAAABAAhz1kXqk3Vd+Mw4u0w==\n", "aws": "aws_secret_access_key=wJalrXUtnFEMIK7MDENGbPxRfiCY\n",
	}
	for name, text := range kept {
		write(t, filepath.Join(state, name), text)
	}
	write(t, filepath.Join(state, "backends.yaml"), `
backends:
  gold:
    type: rbd
    pool: volumes
    keyring_file: `+filepath.Join(state, "keyring")+`
  silver:
    type: csi
    secret_files:
      "user.password": `+filepath.Join(state, "password")+`
  bronze:
    type: ebs
    credentials_file: `+filepath.Join(state, "aws")+`
    secret: 'in-the-wrong-place'
`)
	leaks := map[string]string{
		"Zieg-elstein7": "dial: user root with Zieg-elstein7 refused", "AQDx0r9nAAAAABAAhz1kXqk3Vd+Mw4u0w==": "key AQDx0r9nAAAAABAAhz1kXqk3Vd+Mw4u0w== is wrong",
		"wJalrXUtnFEMIK7MDENGbPxRfiCY": "signed with wJalrXUtnFEMIK7MDENGbPxRfiCY", "in-the-wrong-place": "in-the-wrong-place",
		"hunter2": "etcd=https://root:hunter2@10.0.0.1:2379", "MIIEvAIBADAN": "-----BEGIN PRIVATE KEY-----\nMIIEvAIBADAN\n-----END PRIVATE KEY-----",
		"eyJhbGciOi": "Authorization: Bearer eyJhbGciOi", "gAAAAABk": "X-Auth-Token: gAAAAABk", "open-sesame": "FLOCKER_ETCD_PASSWORD=open-sesame",
		"s3cr3t-1": `level=debug body="{\"password\": \"s3cr3t-1\"}" plugin=flocker`, "s3cr3t-2": `mount -o username=x,password=s3cr3t-2,ro`, "s3cr3t-3": `{"client_secret": "s3cr3t-3"}`,
	}
	var script strings.Builder
	for _, line := range leaks {
		script.WriteString("cat <<'EOF'\nflocker: " + line + "\nEOF\n")
	}
	script.WriteString("echo 'flocker: FLOCKER_ETCD_KEY=/var/lib/flocker/certs/node.key'; cat <<'EOF' >&2\n" + leaks["hunter2"] + "\nEOF\nexit 1")
	cat, err := os.ReadFile("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, name := range []string{"docker", "journalctl", "lsblk", "losetup", "df"} {
		all[name] = script.String()
	}
	programs(t, all)
	if err := os.WriteFile(filepath.Join(os.Getenv("PATH"), "cat"), cat, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "b.tar.gz")
	if got := commandOn(t, filepath.Join(state, "control.sock"), func(context.Context) machine { return healthy().machine }, "support-bundle", "-o", file); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	files := unpack(t, file)
	for name, text := range files {
		for word := range leaks {
			if strings.Contains(text, word) {
				t.Errorf("%s has %s: %s", name, word, text)
			}
		}
	}
	for _, name := range []string{"log.txt", "lsblk.txt", "docker-info.txt"} {
		if n := strings.Count(files[name], removed); n < len(leaks) || !strings.Contains(files[name], "FLOCKER_ETCD_KEY=/var/lib/flocker/certs/node.key") {
			t.Errorf("%s: %d removed of %d: %s", name, n, len(leaks), files[name])
		}
	}
}

// A source that hangs, or never ends, holds up nothing.
func TestBundleIsBounded(t *testing.T) {
	time0, size0 := sourceTime, sourceSize
	sourceTime, sourceSize = time.Second, 1000
	defer func() { sourceTime, sourceSize = time0, size0 }()
	sleep, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	programs(t, map[string]string{
		"hangs": "echo before; sleep 1000 & sleep 1000",
		"loud":  "while :; do echo noise; done",
		"long":  "i=0; while [ $i -lt 500 ]; do echo noise; i=$((i+1)); done",
	})
	if err := os.WriteFile(filepath.Join(os.Getenv("PATH"), "sleep"), sleep, 0o700); err != nil {
		t.Fatal(err)
	}
	c := &cli{socket: "/nonexistent"}
	start := time.Now()
	files, failed := c.collect(t.Context(), []source{{"hangs", printed("hangs")}, {"loud", printed("loud")}, {"long", printed("long")}})
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	want := "hangs: hangs: not done within 1s\nlong: only its first 1000 bytes are here\nloud: loud: not done within 1s; only its first 1000 bytes are here\n"
	lines := slices.Sorted(strings.Lines(string(files["failed.txt"])))
	if got := strings.Join(lines, ""); got != want || failed != 3 {
		t.Errorf("%d failed:\n%s\nwant\n%s", failed, got, want)
	}
	if string(files["hangs"]) != "before\n" || len(files["long"]) != 1000 || len(files["loud"]) != 1000 {
		t.Errorf("got %q and %d, %d bytes", files["hangs"], len(files["long"]), len(files["loud"]))
	}
}

// What docs/cli.md shows is what is printed where everything can be had.
func TestBundleDocs(t *testing.T) {
	scripts := map[string]string{}
	for _, name := range []string{"docker", "journalctl", "lsblk", "losetup", "df"} {
		scripts[name] = "echo flocker"
	}
	programs(t, scripts)
	for _, e := range documented(t, "docker flocker support-bundle") {
		f, look := doctored()
		socket := serve(t, f)
		c := &cli{socket: socket, machine: look}
		t.Chdir(t.TempDir())
		got := commandOn(t, socket, look, e.args...)
		files := unpack(t, e.args[len(e.args)-1])
		// Not every machine has a setting of a daemon, or modules.
		all := len(c.sources())
		if missing := strings.Count(files["failed.txt"], "\n"); missing > 0 {
			got.out = strings.Replace(got.out, fmt.Sprintf("of %d files; %d could not be had, see failed.txt in it", len(files), missing), fmt.Sprintf("of %d files", all), 1)
			for line := range strings.Lines(files["failed.txt"]) {
				if !strings.HasPrefix(line, "settings.txt: ") && !strings.HasPrefix(line, "modules.txt: ") {
					t.Errorf("could not be had: %s", line)
				}
			}
		}
		want(t, strings.Join(e.args, " "), got, result{0, e.out, ""})
	}
}
