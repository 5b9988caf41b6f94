package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/control/certs"
)

// settings is every setting there is. Parsing, the env section of config.json and
// the table in README.md follow from it. The defaults are those of the managed
// plugin: after an upgrade Docker does not pass on a variable that is new, so what
// is unset has to be right there. The systemd unit sets what differs.
type settings struct {
	Socket    string `option:"FLOCKER_SOCKET" default:"/run/docker/plugins/flocker.sock" help:"socket on which Docker finds the plugin"`
	StateDir  string `option:"FLOCKER_STATE_DIR" default:"/var/lib/flocker" help:"directory on the host for what has to survive the plugin"`
	MountRoot string `option:"FLOCKER_MOUNT_ROOT" default:"/flocker/mnt" help:"directory below which volumes are mounted"`
	Hostname  string `option:"FLOCKER_HOSTNAME" help:"name of this host in messages; empty: the system's"`
	Address   string `option:"FLOCKER_ADDRESS" help:"IP address by which users of the REST API know this host; empty: that of its default route"`
	LogLevel  string `option:"FLOCKER_LOG_LEVEL" default:"info" oneof:"debug,info,warn,error" help:"how much to log"`

	Certs string `option:"FLOCKER_CERTS" help:"directory with this host's certificates, as docker flocker ca node makes it; empty: /etc/flocker if cluster.crt is there, else certs in the state directory"`

	EtcdEndpoints    []string `option:"FLOCKER_ETCD_ENDPOINTS" help:"etcd servers, separated by commas; empty: one runs inside the plugin"`
	EtcdCACert       string   `option:"FLOCKER_ETCD_CACERT" help:"file with the certificate authority of the etcd servers; empty, and the next two: those of FLOCKER_CERTS, where an endpoint is https"`
	EtcdCert         string   `option:"FLOCKER_ETCD_CERT" help:"file with the client certificate for etcd"`
	EtcdKey          string   `option:"FLOCKER_ETCD_KEY" help:"file with the key of the client certificate"`
	EtcdUser         string   `option:"FLOCKER_ETCD_USER" help:"user at etcd"`
	EtcdPasswordFile string   `option:"FLOCKER_ETCD_PASSWORD_FILE" help:"file with the password of that user"`
	EtcdPrefix       string   `option:"FLOCKER_ETCD_PREFIX" default:"flocker" help:"what the keys of this cluster begin with"`
	EtcdListen       string   `option:"FLOCKER_ETCD_LISTEN" help:"address, such as 10.0.0.1:2379, on which the etcd inside the plugin serves other hosts, which it knows by their certificates; empty: none"`
	EtcdInsecure     bool     `option:"FLOCKER_ETCD_INSECURE" default:"false" help:"let the etcd inside the plugin serve whoever reaches it, without certificates"`
	EtcdDir          string   `option:"FLOCKER_ETCD_DIR" help:"directory of the etcd inside the plugin; empty: etcd in the state directory"`

	Backend             string `option:"FLOCKER_BACKEND" default:"loopback" help:"storage of volumes created without -o backend="`
	Backends            string `option:"FLOCKER_BACKENDS" help:"file that names further storage; empty: /etc/flocker/backends.yaml if it is there, else backends.yaml in the state directory"`
	LoopbackDir         string `option:"FLOCKER_LOOPBACK_DIR" help:"directory of loopback's files, which hosts may share; empty: loopback in the state directory"`
	LoopbackPreallocate bool   `option:"FLOCKER_LOOPBACK_PREALLOCATE" default:"false" help:"allocate the whole of loopback's files when they are made"`

	DefaultSize backends.Size `option:"FLOCKER_DEFAULT_SIZE" default:"10G" help:"size of volumes created without -o size="`
	DefaultFS   string        `option:"FLOCKER_DEFAULT_FS" default:"ext4" oneof:"ext4,xfs,btrfs" help:"filesystem of volumes created without -o fs="`

	NodeTTL       time.Duration `option:"FLOCKER_NODE_TTL" default:"10s" min:"1s" help:"time after which a host not heard from counts as dead"`
	NodeRenew     time.Duration `option:"FLOCKER_NODE_RENEW" default:"2.5s" min:"100ms" help:"time between two signs of life; less than a third of FLOCKER_NODE_TTL"`
	Linger        time.Duration `option:"FLOCKER_LINGER" default:"5s" help:"time for which an idle volume stays attached, unless another host wants it"`
	BusyWait      time.Duration `option:"FLOCKER_BUSY_WAIT" default:"30s" help:"time for which a mount waits for containers on another host to stop, at most 100s; 0s: not at all"`
	MountDeadline time.Duration `option:"FLOCKER_MOUNT_DEADLINE" default:"100s" min:"1s" help:"time after which a mount is given up, at most 110s; Docker gives up after 120s"`
	Hold          time.Duration `option:"FLOCKER_HOLD" default:"3s" min:"1s" help:"time for which a dead host must stay silent before its volumes are taken over, where the storage can cut it off"`
	Reconcile     time.Duration `option:"FLOCKER_RECONCILE" default:"30s" min:"1s" help:"time between two comparisons of what is with what should be"`

	APIListen string `option:"FLOCKER_API_LISTEN" default:":4523" help:"address on which the REST API is served, once there are certificates in FLOCKER_CERTS; off: nowhere"`

	DockerSocket string `option:"FLOCKER_DOCKER_SOCKET" default:"/host/run/docker.sock" help:"socket of the Docker Engine, which is asked what containers use a volume"`
}

// etcFlocker is where an administrator of the original Flocker expects certificates; a
// managed plugin has no /etc of the host's.
var etcFlocker = "/etc/flocker"

const (
	maxBusyWait      = 100 * time.Second
	maxMountDeadline = 110 * time.Second
)

// settingsFrom reads settings from environment variables, NAME=value each. An
// empty one is one that is not set. A FLOCKER_ variable that is none of ours may
// be of an older or newer version, and is only worth a warning.
func settingsFrom(environ []string) (s settings, warnings []string, err error) {
	declared := backends.Options[settings]()
	values := map[string]string{}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, "FLOCKER_") || value == "" {
			continue
		}
		if !slices.ContainsFunc(declared, func(o backends.Option) bool { return o.Name == name }) {
			warning := fmt.Sprintf("unknown setting %s is ignored", name)
			if near := backends.Nearest(declared, name); near != "" {
				warning += fmt.Sprintf("; did you mean %s?", near)
			}
			warnings = append(warnings, warning)
			continue
		}
		values[name] = value
	}
	slices.Sort(warnings)
	if s, err = backends.DecodeAs[settings]("setting", values); err != nil {
		return s, warnings, err
	}
	if s.Hostname == "" {
		if s.Hostname, err = os.Hostname(); err != nil {
			return s, warnings, fmt.Errorf("setting FLOCKER_HOSTNAME: %w; set it", err)
		}
	}
	if s.EtcdDir == "" {
		s.EtcdDir = filepath.Join(s.StateDir, "etcd")
	}
	if s.LoopbackDir == "" {
		s.LoopbackDir = filepath.Join(s.StateDir, "loopback")
	}
	if s.Certs == "" {
		file, err := oneOf("FLOCKER_CERTS", filepath.Join(etcFlocker, certs.CAFile), filepath.Join(s.StateDir, "certs", certs.CAFile))
		if err != nil {
			return s, warnings, fmt.Errorf("setting FLOCKER_CERTS: %w", err)
		}
		if file != "" {
			s.Certs = filepath.Dir(file)
		}
	} else if file := filepath.Join(s.Certs, certs.CAFile); filepath.IsAbs(file) {
		if _, err := os.Stat(file); err != nil {
			return s, warnings, fmt.Errorf("setting FLOCKER_CERTS: %w; docker flocker ca node makes a directory with it%s", err, outside(file))
		}
	}
	if s.Certs != "" && s.EtcdCACert+s.EtcdCert+s.EtcdKey == "" && slices.ContainsFunc(s.EtcdEndpoints, isHTTPS) {
		in := func(file string) string { return filepath.Join(s.Certs, file) }
		s.EtcdCACert, s.EtcdCert, s.EtcdKey = in(certs.CAFile), in(certs.NodeFile), in(certs.NodeKey)
	}
	return s, warnings, s.check()
}

func isHTTPS(endpoint string) bool { return strings.HasPrefix(endpoint, "https://") }

// check finds what no setting shows by itself, all of it at once.
func (s *settings) check() error {
	var problems []error
	wrong := func(name, format string, args ...any) {
		problems = append(problems, fmt.Errorf("setting "+name+": "+format, args...))
	}
	for _, p := range []struct {
		name string
		path *string
	}{
		{"FLOCKER_SOCKET", &s.Socket},
		{"FLOCKER_STATE_DIR", &s.StateDir},
		{"FLOCKER_MOUNT_ROOT", &s.MountRoot},
		{"FLOCKER_ETCD_DIR", &s.EtcdDir},
		{"FLOCKER_LOOPBACK_DIR", &s.LoopbackDir},
		{"FLOCKER_DOCKER_SOCKET", &s.DockerSocket},
		{"FLOCKER_BACKENDS", &s.Backends},
		{"FLOCKER_CERTS", &s.Certs},
	} {
		if *p.path == "" { // and may be
			continue
		}
		if !filepath.IsAbs(*p.path) {
			wrong(p.name, "%q is not an absolute path", *p.path)
		} else if *p.path = filepath.Clean(*p.path); *p.path == "/" {
			wrong(p.name, "it cannot be /")
		}
	}
	for _, f := range []struct {
		name, path string
		secret     bool
	}{
		{"FLOCKER_ETCD_CACERT", s.EtcdCACert, false},
		{"FLOCKER_ETCD_CERT", s.EtcdCert, false},
		{"FLOCKER_ETCD_KEY", s.EtcdKey, true},
		{"FLOCKER_ETCD_PASSWORD_FILE", s.EtcdPasswordFile, true},
	} {
		if f.path == "" {
			continue
		}
		if _, err := os.ReadFile(f.path); err != nil {
			wrong(f.name, "%w", err)
		} else if err := certs.Private(f.path); f.secret && err != nil {
			wrong(f.name, "%w", err)
		}
	}
	if s.Address != "" && net.ParseIP(s.Address) == nil {
		wrong("FLOCKER_ADDRESS", "%q is not an IP address", s.Address)
	}
	together := func(a, b, valueA, valueB string) {
		if (valueA == "") != (valueB == "") {
			wrong(a, "it goes together with %s; set both or none", b)
		}
	}
	together("FLOCKER_ETCD_CERT", "FLOCKER_ETCD_KEY", s.EtcdCert, s.EtcdKey)
	together("FLOCKER_ETCD_USER", "FLOCKER_ETCD_PASSWORD_FILE", s.EtcdUser, s.EtcdPasswordFile)
	for _, endpoint := range s.EtcdEndpoints {
		if err := checkEndpoint(endpoint, s.EtcdCACert != "" || s.EtcdCert != ""); err != nil {
			wrong("FLOCKER_ETCD_ENDPOINTS", "%w", err)
		}
	}
	if s.EtcdPrefix = strings.Trim(s.EtcdPrefix, "/"); s.EtcdPrefix == "" || strings.ContainsAny(s.EtcdPrefix, " \t\n\x00") {
		wrong("FLOCKER_ETCD_PREFIX", "use a word such as flocker, or several with / between")
	}
	if s.EtcdListen != "" {
		if len(s.EtcdEndpoints) > 0 {
			wrong("FLOCKER_ETCD_LISTEN", "there is no etcd inside the plugin when FLOCKER_ETCD_ENDPOINTS is set; unset one")
		}
		if host, port, err := net.SplitHostPort(s.EtcdListen); err != nil || port == "" {
			wrong("FLOCKER_ETCD_LISTEN", "%q is not an address with a port, such as 10.0.0.1:2379", s.EtcdListen)
		} else if len(s.EtcdEndpoints) == 0 && s.Certs == "" && !s.EtcdInsecure && !isLoopback(host) {
			wrong("FLOCKER_ETCD_LISTEN", "without certificates, whoever reaches %s could change who has which volume: make them with docker flocker ca, "+
				"and put this host's into %s; or set FLOCKER_ETCD_INSECURE=true, if nobody else is on that network",
				s.EtcdListen, filepath.Join(s.StateDir, "certs"))
		}
	}
	if s.APIListen != apiOff {
		if _, port, err := net.SplitHostPort(s.APIListen); err != nil || port == "" {
			wrong("FLOCKER_API_LISTEN", "%q is not an address with a port, such as :4523 or 10.0.0.1:4523, nor %s", s.APIListen, apiOff)
		}
	}
	if s.NodeRenew >= s.NodeTTL/3 {
		wrong("FLOCKER_NODE_RENEW", "%v is not less than a third of FLOCKER_NODE_TTL, %v", s.NodeRenew, s.NodeTTL)
	}
	if s.BusyWait > maxBusyWait {
		wrong("FLOCKER_BUSY_WAIT", "%v is too much; use 0s to %v", s.BusyWait, maxBusyWait)
	}
	if s.MountDeadline > maxMountDeadline {
		wrong("FLOCKER_MOUNT_DEADLINE", "%v is too much; use 1s to %v, for Docker gives up after 120s", s.MountDeadline, maxMountDeadline)
	}
	if s.BusyWait > s.MountDeadline {
		wrong("FLOCKER_BUSY_WAIT", "%v is more than FLOCKER_MOUNT_DEADLINE, %v", s.BusyWait, s.MountDeadline)
	}
	return oneLine(problems)
}

// isLoopback says that only this host is reached by that name.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// etcdCerts are those by which the etcd inside the plugin serves; empty: it has no TLS.
func (s *settings) etcdCerts() string {
	if s.EtcdListen == "" || s.EtcdInsecure {
		return ""
	}
	return s.Certs
}

// checkEndpoint accepts http://host:port, https://host:port and host:port.
func checkEndpoint(endpoint string, tls bool) error {
	hostport := endpoint
	if strings.Contains(endpoint, "://") {
		u, err := url.Parse(endpoint)
		if err != nil || u.User != nil || (u.Scheme != "http" && u.Scheme != "https") || strings.Trim(u.Path, "/")+u.RawQuery+u.Fragment != "" {
			return fmt.Errorf("%q is not an address such as https://etcd1:2379", endpoint)
		}
		if u.Scheme == "http" && tls {
			return fmt.Errorf("%s would be used without TLS in spite of FLOCKER_ETCD_CACERT or FLOCKER_ETCD_CERT; use https", endpoint)
		}
		hostport = u.Host
	}
	if host, port, err := net.SplitHostPort(hostport); err != nil || host == "" || port == "" {
		return fmt.Errorf("%q has no host and port; use an address such as https://etcd1:2379", endpoint)
	}
	return nil
}

// oneLine is errors.Join for a single line.
func oneLine(problems []error) error {
	texts := make([]string, len(problems))
	for i, p := range problems {
		texts[i] = p.Error()
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

// level is the log level; "warn" and the others are all logrus knows by name.
func (s *settings) level() logrus.Level {
	level, err := logrus.ParseLevel(s.LogLevel)
	if err != nil {
		return logrus.InfoLevel
	}
	return level
}

// settingsTable is the table for README.md.
func settingsTable() string {
	var b strings.Builder
	b.WriteString("| setting | default | meaning |\n| --- | --- | --- |\n")
	for _, o := range backends.Options[settings]() {
		fallback := ""
		if o.Default != "" {
			fallback = "`" + o.Default + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", o.Name, fallback, description(o))
	}
	return b.String()
}

// description is a setting's help with the values it can have.
func description(o backends.Option) string {
	if len(o.Values) == 0 {
		return o.Help
	}
	last := len(o.Values) - 1
	return o.Help + ": " + strings.Join(o.Values[:last], ", ") + " or " + o.Values[last]
}
