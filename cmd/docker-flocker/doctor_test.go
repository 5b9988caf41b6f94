package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

const (
	anID   = "0b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55"
	here   = "/var/lib/docker/plugins/" + plugID + "/propagated-mount/"
	plugID = "5c3a584f9db59b8e1f0d1c7e4a5b6c7d8e9f00112233445566778899aabbccdd"
)

// healthy is a host on which all is well.
func healthy() *facts {
	f := &facts{
		machine: machine{
			root: true, release: "6.1.0-40-amd64", loop: true, filesystems: []string{"ext4", "xfs", "btrfs"},
			sockets: []socket{{plugins + "/" + plugID + "/flocker.sock", nil}},
			mounts:  []mounted{{"/", "8:1"}, {here + anID, "7:3"}},
		},
		status:   api.Status{Host: "alpha", Version: "v0.1.0"},
		backends: []api.Backend{{Name: "loopback", Type: "loopback", Default: true}},
		host: api.Host{
			MountRoot: "/flocker/mnt", Filesystems: []string{"ext4", "xfs"},
			Mounts:  []api.Mount{{Path: "/flocker/mnt/" + anID, Number: "7:3", Volume: "db"}},
			Devices: []api.Device{{Backend: "loopback", Path: "/dev/loop3", ID: anID, Token: 4711, Owned: true}},
			Etcd:    []api.Server{{Endpoint: "https://10.0.0.1:2379", Version: "3.5.21"}, {Endpoint: "https://10.0.0.2:2379", Version: "3.6.0"}},
		},
	}
	f.again, f.before = f.host, f.mounts
	return f
}

// Each check is provoked by what it looks for, and by nothing else.
func TestChecks(t *testing.T) {
	const fix = "docker plugin disable -f flocker\ndocker plugin enable --timeout 0 flocker"
	for _, test := range []struct {
		what string
		do   func(*facts)
		want []string // "check: text | remedy"
	}{
		{"all is well", func(*facts) {}, nil},

		{"an old kernel", func(f *facts) { f.release = "5.4.0-200-generic" }, []string{
			"kernel: this host runs Linux 5.4.0-200-generic, and the storage loopback or share needs 5.8 | install a newer kernel, and restart the host",
		}},
		{"an old kernel for CSI", func(f *facts) {
			f.release, f.backends = "5.14.2", []api.Backend{{Name: "loopback", Type: "loopback"}, {Name: "san", Type: "csi", Default: true}}
		}, []string{
			"kernel: this host runs Linux 5.14.2, and the storage csi needs 5.15 | install a newer kernel, and restart the host",
		}},
		{"an old kernel, and storage that does not mind", func(f *facts) {
			f.release, f.loop, f.backends = "5.4.0", false, []api.Backend{{Name: "loopback", Type: "loopback"}, {Name: "ebs", Type: "ebs", Default: true}}
		}, nil},
		{"a kernel that cannot be told", func(f *facts) { f.release = "" }, nil},
		{"no loop devices", func(f *facts) { f.loop = false }, []string{
			"kernel: there is no /dev/loop-control, so the kernel makes no loop devices | modprobe loop, and echo loop >/etc/modules-load.d/loop.conf",
		}},
		{"a filesystem that volumes have", func(f *facts) { f.filesystems = []string{"ext4", "btrfs"} }, []string{
			"kernel: the kernel cannot mount xfs, which volumes here are made with, and has no module for it | install the rest of this kernel's modules, or use another filesystem",
		}},
		{"a filesystem that none has", func(f *facts) { f.filesystems = []string{"ext4", "xfs"} }, nil},

		{"a clock that nobody keeps", func(f *facts) { f.adrift = true }, []string{
			"clock: the kernel says that nothing keeps this host's clock right; certificates and logs go by it, who may write a volume does not | start an NTP client: timedatectl set-ntp true, or install chrony",
		}},

		{"another user", func(f *facts) { f.root, f.absent = false, errors.New("only root may use it") }, []string{
			"plugin: only root may ask the plugin | type it again with sudo",
		}},
		{"no plugin", func(f *facts) {
			f.absent, f.sockets = errors.New("no Flocker plugin answers on x: is it enabled on this host? (docker plugin ls)"), nil
		}, []string{
			"plugin: no Flocker plugin answers on x: is it enabled on this host? (docker plugin ls) | docker plugin enable --timeout 0 flocker\nwhy it ended: journalctl -u docker",
		}},
		{"an older plugin", func(f *facts) { f.unknown = errors.New("there is no request GET /v1/host") }, []string{
			"plugin: there is no request GET /v1/host | see the plugin's log; is it older than this command?",
		}},
		{"another version", func(f *facts) { f.status.Version = "v0.0.9" }, []string{
			"plugin: this command is of version v0.1.0, and the plugin of v0.0.9 | install both from one source",
		}},
		{"no socket for Docker", func(f *facts) { f.sockets, f.mounts = nil, slices.Clone(f.mounts) }, []string{
			"plugin: Docker cannot find the plugin: there is no flocker.sock in /run/docker/plugins, nor in a directory of it | set FLOCKER_SOCKET to a file there, and restart the plugin",
		}},
		{"a dead socket", func(f *facts) {
			f.sockets = append(f.sockets, socket{plugins + "/flocker.sock", errors.New("connection refused")})
		}, []string{
			"plugin: the socket on which Docker asks the plugin, /run/docker/plugins/flocker.sock, does not answer: connection refused | " + fix,
		}},
		{"no Docker", func(f *facts) { f.host.Docker = "ask Docker on /host/run/docker.sock: no such file" }, []string{
			"plugin: the plugin cannot ask Docker which containers use a volume: ask Docker on /host/run/docker.sock: no such file | set FLOCKER_DOCKER_SOCKET, or the source of the mount run, to it",
		}},

		{"a program", func(f *facts) { f.host.Lacks = []string{"mkfs.xfs (package xfsprogs)"} }, []string{
			"tools: the plugin does not find mkfs.xfs (package xfsprogs) | install the package; a managed plugin has its own: make install anew",
		}},

		{"certificates that end", func(f *facts) {
			f.host.Certificates = []api.Certificate{
				{File: "/certs/cluster.crt", Expires: time.Now().Add(certs.Soon + time.Hour)},
				{File: "/certs/node.crt", Expires: time.Now().Add(-24 * time.Hour)},
			}
		}, []string{
			"certificates: the certificate /certs/node.crt has expired on " + time.Now().Add(-24*time.Hour).UTC().Format(time.DateOnly) +
				" | make another with docker flocker ca: docs/cli.md, New certificates",
		}},

		{"no etcd", func(f *facts) {
			f.status.Etcd = "ownership cannot be checked: etcd is away"
			f.host.Etcd[1] = api.Server{Endpoint: "https://10.0.0.2:2379", Error: "context deadline exceeded"}
		}, []string{
			"etcd: this host cannot use etcd, so nothing can be mounted anew here: ownership cannot be checked: etcd is away | bring most of the etcd servers back; what is mounted works on",
			"etcd: the etcd server https://10.0.0.2:2379 does not answer: context deadline exceeded | start it; if it runs: FLOCKER_ETCD_ENDPOINTS, certificates, firewalls",
		}},
		{"an etcd server that is old, alone or full", func(f *facts) {
			f.host.Etcd = []api.Server{{Endpoint: "a", Version: "3.3.27"}, {Endpoint: "b", Version: "3.6.0", Leaderless: true}, {Endpoint: "c", Version: "4.0.0", Alarms: []string{"etcdserver: mvcc: database space exceeded"}}}
		}, []string{
			"etcd: the etcd server a is of version 3.3.27, older than 3.4 | upgrade etcd, one server after the other",
			"etcd: the etcd server b has lost the others: without most of them it answers nothing | bring most of the etcd servers back, and the network between them",
			"etcd: the etcd server c says of itself: etcdserver: mvcc: database space exceeded | for NOSPACE: etcdctl compact, etcdctl defrag, etcdctl alarm disarm",
		}},

		{"no storage", func(f *facts) {
			f.backends = append(f.backends, api.Backend{Name: "gold", Type: "rbd", Error: "the user may not list images"})
			f.host.Silent = []api.Silent{{Backend: "gold", Error: "the program rbd is missing"}}
		}, []string{
			"storage: backend gold does not answer: the user may not list images | docs/backends/rbd.md says what it needs on the host and the storage",
			"storage: backend gold does not say what is attached here: the program rbd is missing | nothing of it can be mounted here until it does: see to what it names",
		}},

		{"storage that does not allow everything", func(f *facts) {
			f.backends = append(f.backends, api.Backend{Name: "aws", Type: "ebs"}, api.Backend{Name: "slow", Type: "ebs"})
			f.host.Permissions = []api.Permissions{{Backend: "aws", Forbidden: []string{"ec2:DetachVolume", "ec2:StopInstances"}}, {Backend: "slow", Error: "EC2 has not answered"}}
		}, []string{
			"storage: backend aws is not allowed to call ec2:DetachVolume: it will fail when it needs to | allow ec2:DetachVolume to the role of this host\nsee Permissions in docs/backends/ebs.md",
			"storage: backend aws is not allowed to call ec2:StopInstances: it will fail when it needs to | allow ec2:StopInstances to the role of this host\nsee Permissions in docs/backends/ebs.md",
			"storage: backend slow does not say what it is allowed to do: EC2 has not answered | see to what it names, and type it again",
		}},

		{"a volume that was unmounted", func(f *facts) {
			f.host.Mounts, f.host.Unmounted, f.mounts = nil, []string{"db"}, f.mounts[:1]
			f.again = f.host
		}, []string{
			"mounts: volume db ought to be mounted, and somebody has unmounted it | stop its containers, and start them again",
		}},
		{"a mount that the host does not see", func(f *facts) { f.mounts = f.mounts[:1] }, []string{
			"mounts: volume db is mounted in the plugin, and this host does not see it: a container that is started now gets an empty directory | " + fix,
		}},
		{"no mount table", func(f *facts) { f.again.MountError = "what is mounted here: no" }, []string{
			"mounts: the plugin cannot say what is mounted: what is mounted here: no | see the plugin's log",
		}},

		{"a mount of nobody's", func(f *facts) {
			f.host.Mounts[0].Volume = ""
			f.again = f.host
		}, []string{
			"leaks: /flocker/mnt/" + anID + " is mounted in the plugin, and no volume accounts for it | if it stays for minutes, and no container uses it: restart the plugin",
		}},
		{"a device of nobody's", func(f *facts) {
			f.host.Devices[0].Owned = false
			f.again = f.host
		}, []string{
			"leaks: /dev/loop3 of backend loopback is attached for volume " + anID + " under token 4711, which this host does not have | the plugin detaches it once nothing has it open: lsof /dev/loop3",
		}},
		{"what is on its way", func(f *facts) {
			f.again.Mounts, f.again.Devices = slices.Clone(f.host.Mounts), slices.Clone(f.host.Devices)
			f.host.Mounts[0].Volume, f.host.Devices[0].Owned, f.host.Unmounted = "", false, []string{"db"}
		}, nil},
		{"a mount of an earlier plugin", func(f *facts) {
			f.mounts = append(slices.Clone(f.mounts), mounted{here + "1" + anID[1:], "7:9"}, mounted{"/flocker/mnt/2" + anID[1:], "7:10"},
				mounted{"/var/lib/docker/plugins/" + strings.Repeat("ab", 32) + "/propagated-mount/" + anID, "7:11"}, mounted{"/mnt/" + anID, "7:12"})
			f.before = f.mounts
		}, []string{
			"leaks: " + here + "1" + anID[1:] + " is mounted, and the plugin does not see it: it is left from an earlier one | when no container uses it: umount " + here + "1" + anID[1:],
			"leaks: /flocker/mnt/2" + anID[1:] + " is mounted, and the plugin does not see it: it is left from an earlier one | when no container uses it: umount /flocker/mnt/2" + anID[1:],
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			version = "v0.1.0"
			defer func() { version = "development" }()
			f := healthy()
			test.do(f)
			var got []string
			for _, v := range examine(f) {
				if v.State != wrong {
					continue
				}
				got = append(got, v.Check+": "+v.Text+" | "+v.Remedy)
				for line := range strings.Lines(v.Remedy) {
					if n := utf8.RuneCountInString("  remedy: " + line); n > columns && !strings.Contains(line, anID[1:]) {
						t.Errorf("a remedy is no line: %d columns: %s", n, line)
					}
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(test.want, "\n"))
			}
		})
	}
}

// Without the plugin, what it would have to say is not called well.
func TestNotChecked(t *testing.T) {
	f := healthy()
	f.absent = errors.New("gone")
	states := map[string]string{}
	for _, v := range examine(f) {
		states[v.Check] = v.State
	}
	for check, want := range map[string]string{"kernel": well, "clock": well, "plugin": wrong, "tools": notChecked, "etcd": notChecked, "storage": notChecked, "mounts": notChecked, "leaks": notChecked} {
		if states[check] != want {
			t.Errorf("%s is %s, want %s", check, states[check], want)
		}
	}
	f.absent, f.unknown = nil, errors.New("older")
	for _, v := range examine(f) {
		if want := slices.Contains([]string{"tools", "certificates", "mounts", "leaks"}, v.Check); want != (v.State == notChecked) {
			t.Errorf("an older plugin: %s is %s", v.Check, v.State)
		}
	}
}

// doctored is docs/cli.md's host: a volume that is being mounted is not told of, a
// device that stays is.
func doctored() (*fake, func(context.Context) machine) {
	f := documentedCluster()
	at := []driver.HostMount{{Path: "/flocker/mnt/" + anID, Number: "7:3", Volume: "db"}}
	left := driver.HostDevice{Backend: "loopback", Path: "/dev/loop7", ID: "1" + anID[1:], Token: 3907}
	first := driver.Host{
		MountRoot: "/flocker/mnt", Filesystems: []string{"ext4", "xfs"}, Mounts: at,
		Devices: []driver.HostDevice{{Backend: "loopback", Path: "/dev/loop3", ID: anID, Token: 4711}, left},
	}
	second := first
	second.Devices = []driver.HostDevice{{Backend: "loopback", Path: "/dev/loop3", ID: anID, Token: 4711, Owned: true}, left}
	f.hosts = []driver.Host{first, second}
	f.backends = f.backends[:1]
	f.servers = []ownership.Server{{Endpoint: "https://10.0.0.1:2379", Version: "3.5.21"}, {Endpoint: "https://10.0.0.2:2379", Err: errors.New("context deadline exceeded")}}
	return f, func(context.Context) machine { return healthy().machine }
}

func TestDoctorDocs(t *testing.T) {
	version, pause = "v0.1.0", time.Millisecond
	defer func() { version, pause = "development", 3*time.Second }()
	for _, e := range documented(t, "docker flocker doctor") {
		f, look := doctored()
		want(t, strings.Join(e.args, " "), commandOn(t, serve(t, f), look, e.args...), result{1, e.out, ""})
		for line := range strings.Lines(e.out) {
			if n := utf8.RuneCountInString(line); n > columns+1 {
				t.Errorf("%d columns: %s", n, line)
			}
		}
	}
}

func TestDoctor(t *testing.T) {
	version, pause = "v0.1.0", time.Millisecond
	defer func() { version, pause = "development", 3*time.Second }()
	f, look := doctored()
	want(t, "doctor as JSON", commandOn(t, serve(t, f), look, "doctor", "--format", "json"), result{1, "" +
		`{"check":"kernel","state":"well"}` + "\n" + `{"check":"clock","state":"well"}` + "\n" + `{"check":"plugin","state":"well"}` + "\n" + `{"check":"tools","state":"well"}` + "\n" + `{"check":"certificates","state":"well"}` + "\n" +
		`{"check":"etcd","state":"wrong","text":"the etcd server https://10.0.0.2:2379 does not answer: context deadline exceeded","remedy":"start it; if it runs: FLOCKER_ETCD_ENDPOINTS, certificates, firewalls"}` + "\n" +
		`{"check":"storage","state":"well"}` + "\n" + `{"check":"mounts","state":"well"}` + "\n" +
		`{"check":"leaks","state":"wrong","text":"/dev/loop7 of backend loopback is attached for volume 1b9e6a1c-52d7-4c2e-8f39-7d6d1a0c4e55 under token 3907, which this host does not have","remedy":"the plugin detaches it once nothing has it open: lsof /dev/loop7"}` + "\n", ""})
	f, look = doctored()
	f.hosts, f.servers = []driver.Host{{}}, nil
	bare := func(ctx context.Context) machine {
		m := look(ctx)
		m.mounts = nil
		return m
	}
	got := commandOn(t, serve(t, f), bare, "doctor")
	want(t, "doctor", got, result{0, "kernel         well\nclock          well\nplugin         well\ntools          well\ncertificates   well\netcd           well\nstorage        well\nmounts         well\nleaks          well\n", ""})
	// Each line can be typed as it is printed.
	if got := commandOn(t, "/nonexistent", look, "doctor"); !strings.Contains(got.out, "\n  remedy: docker plugin enable --timeout 0 flocker\n          why it ended: journalctl -u docker\n") {
		t.Errorf("without a plugin: %s", got.out)
	}
	want(t, "an argument", commandOn(t, "/nonexistent", look, "doctor", "x"), result{2, "", "it takes no argument, and \"x\" is one\nSee 'docker flocker doctor --help'.\n"})
}

// On this machine, whatever it is: nothing is called well that could not be looked at.
func TestDoctorHere(t *testing.T) {
	m := thisMachine(t.Context())
	if m.release == "" || !slices.Contains(m.filesystems, "tmpfs") || !slices.ContainsFunc(m.mounts, func(at mounted) bool { return at.path == "/" && strings.Contains(at.number, ":") }) {
		t.Errorf("this machine: %+v", m)
	}
	if m.older(2, 6) || !m.older(1000, 0) {
		t.Errorf("its kernel is %s", m.release)
	}
	got := command(t, "/nonexistent", "", "doctor")
	if got.code != 1 || got.errout != "" || !strings.Contains(got.out, "\nplugin         wrong\ntools          not checked\ncertificates   not checked\netcd           not checked\n") {
		t.Errorf("without a plugin: %+v", got)
	}
}

func TestMachine(t *testing.T) {
	modules := t.TempDir()
	if err := os.WriteFile(filepath.Join(modules, "modules.dep"), []byte("kernel/fs/xfs/xfs.ko.xz: kernel/lib/crc.ko.xz\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := filesystems([]byte("nodev\ttmpfs\n\text4\n"), modules); !slices.Equal(got, []string{"tmpfs", "ext4", "xfs"}) {
		t.Errorf("filesystems: %q", got)
	}
	table := mountTable([]byte("36 35 7:3 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/loop3 rw\nnonsense\n"))
	if !slices.Equal(table, []mounted{{"/mnt/a b", "7:3"}}) {
		t.Errorf("mounts: %+v", table)
	}

	socket := filepath.Join(t.TempDir(), "s")
	if err := answers(t.Context(), socket); err == nil || strings.Contains(err.Error(), "http:") {
		t.Errorf("a socket that is not there: %v", err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/VolumeDriver.Capabilities" {
			w.WriteHeader(http.StatusTeapot)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	if err := answers(t.Context(), socket); err != nil {
		t.Errorf("a plugin that answers: %v", err)
	}
}
