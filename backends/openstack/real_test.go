package openstack_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/openstack/openstacktest"
)

// stack is OpenStack itself, from Debian's packages: processes of this machine, on
// addresses and in directories of their own.
type stack struct {
	t      *testing.T
	dir    string
	rabbit string // URL
	sql    int    // port
	cinder string // URL, without the project
}

// newStack is for tests that `make test-openstack` runs.
func newStack(t *testing.T) *stack {
	t.Helper()
	if os.Getenv("OPENSTACK") != "real" {
		t.Skip("needs OpenStack's services; make test-openstack installs and starts them")
	}
	s := &stack{t: t, dir: t.TempDir()}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.startDatabases()
	s.startRabbit()
	return s
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (s *stack) path(name string) string { return filepath.Join(s.dir, name) }

// mkdir makes a directory of the stack's.
func (s *stack) mkdir(name string) string {
	s.t.Helper()
	if err := os.MkdirAll(s.path(name), 0o755); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

// file writes a file of the stack's.
func (s *stack) file(name, text string, mode os.FileMode) string {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), mode); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

func (s *stack) command(env []string, name string, args ...string) *exec.Cmd {
	cmd := exec.Command("nice", append([]string{"-n", "5", name}, args...)...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + s.dir, "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1"}, env...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// run runs a command to its end.
func (s *stack) run(env []string, name string, args ...string) {
	s.t.Helper()
	cmd := s.command(env, name, args...)
	timer := time.AfterFunc(10*time.Minute, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer timer.Stop()
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, tail(out))
	}
}

func tail(text []byte) []byte { return text[max(0, len(text)-4000):] }

// failures are the first lines of a log that say what failed; Python's traces are long.
func failures(text []byte) string {
	var found []string
	for line := range strings.Lines(string(text)) {
		if len(found) < 20 && (strings.Contains(line, " ERROR ") && !strings.Contains(line, "  File ") || strings.Contains(line, " CRITICAL ")) {
			found = append(found, line[:min(len(line), 500)])
		}
	}
	return strings.Join(found, "")
}

// daemon is a process of the stack's, with its group.
type daemon struct {
	pid  int
	stop func()
}

// pause stops the process for a while, or lets it go on.
func (d daemon) pause(paused bool) {
	signal := syscall.SIGCONT
	if paused {
		signal = syscall.SIGSTOP
	}
	_ = syscall.Kill(-d.pid, signal) // it may have ended, which shows soon
}

// daemon starts a process that is ended with the test. Its log is shown if that failed.
func (s *stack) daemon(log string, env []string, name string, args ...string) daemon {
	s.t.Helper()
	out, err := os.Create(s.path(log + ".log"))
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := s.command(env, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGCONT)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		_ = out.Close()
	}
	s.t.Cleanup(func() {
		stop()
		if s.t.Failed() {
			if text, err := os.ReadFile(out.Name()); err == nil {
				s.t.Logf("%s:\n%s\n%s", log, failures(text), tail(text))
			}
		}
	})
	return daemon{cmd.Process.Pid, stop}
}

// await waits until something is so.
func (s *stack) await(what string, limit time.Duration, is func() bool) {
	s.t.Helper()
	for started := time.Now(); !is(); time.Sleep(200 * time.Millisecond) {
		if time.Since(started) > limit {
			s.t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

func (s *stack) listens(port int) func() bool {
	return func() bool {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}
}

// startDatabases starts what OpenStack's services keep their books in. SQLite would do for
// Cinder alone, but for its "database is locked".
func (s *stack) startDatabases() {
	s.t.Helper()
	s.sql = freePort(s.t)
	s.run(nil, "mariadb-install-db", "--no-defaults", "--user=root", "--datadir="+s.path("mysql"), "--skip-test-db", "--auth-root-authentication-method=normal")
	s.daemon("mariadb", nil, "mariadbd", "--no-defaults", "--user=root", "--datadir="+s.path("mysql"), "--socket="+s.path("mysql.sock"),
		"--pid-file="+s.path("mysql.pid"), "--bind-address=127.0.0.1", fmt.Sprintf("--port=%d", s.sql), "--max-connections=400",
		"--innodb-flush-log-at-trx-commit=0", "--skip-log-bin", "--tmpdir="+s.dir)
	s.await("MariaDB", 10*time.Minute, s.listens(s.sql))
	s.query("create user 'os'@'127.0.0.1' identified by 'os'; grant all on *.* to 'os'@'127.0.0.1'; create user 'os'@'localhost' identified by 'os'; grant all on *.* to 'os'@'localhost'")
}

func (s *stack) query(sql string) {
	s.t.Helper()
	s.run(nil, "mariadb", "--no-defaults", "-S", s.path("mysql.sock"), "-e", sql)
}

// database makes a database, and returns its URL.
func (s *stack) database(name string) string {
	s.t.Helper()
	s.query("create database " + name)
	return fmt.Sprintf("mysql+pymysql://os:os@127.0.0.1:%d/%s", s.sql, name)
}

// startRabbit starts what OpenStack's services speak to each other through.
func (s *stack) startRabbit() {
	s.t.Helper()
	port, dist, names := freePort(s.t), freePort(s.t), freePort(s.t)
	home := s.mkdir("rabbit")
	env := []string{
		"HOME=" + home, fmt.Sprintf("ERL_EPMD_PORT=%d", names), "ERL_EPMD_ADDRESS=127.0.0.1", "RABBITMQ_NODENAME=flocker@localhost",
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1", fmt.Sprintf("RABBITMQ_NODE_PORT=%d", port), fmt.Sprintf("RABBITMQ_DIST_PORT=%d", dist),
		"RABBITMQ_BASE=" + home, "RABBITMQ_MNESIA_BASE=" + home, "RABBITMQ_LOG_BASE=" + home, "RABBITMQ_LOGS=-", "RABBITMQ_PID_FILE=" + home + "/pid",
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + s.file("plugins", "[].\n", 0o644), "RABBITMQ_CONFIG_FILE=" + home + "/rabbit",
		"RABBITMQ_CONF_ENV_FILE=/dev/null", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +S 2:2",
	}
	s.daemon("epmd", env, "epmd", "-address", "127.0.0.1", "-port", fmt.Sprint(names))
	s.await("epmd", 2*time.Minute, s.listens(names))
	s.daemon("rabbit", env, "/usr/lib/rabbitmq/bin/rabbitmq-server")
	s.await("RabbitMQ", 10*time.Minute, s.listens(port))
	s.rabbit = fmt.Sprintf("rabbit://guest:guest@127.0.0.1:%d/", port)
}

// onNFS is Cinder's settings for volumes that are files of a directory. It believes to
// have them on NFS: mount.nfs is a bind mount in its own name space.
func (s *stack) onNFS(export string) string {
	s.t.Helper()
	return fmt.Sprintf(`volume_driver = cinder.volume.drivers.nfs.NfsDriver
nfs_shares_config = %s
nfs_mount_point_base = %s/mnt
nas_secure_file_operations = false
nas_secure_file_permissions = false
nfs_snapshot_support = true
nfs_sparsed_volumes = true
`, s.file("shares", "127.0.0.1:"+export+"\n", 0o644), s.mkdir("cinder"))
}

// startCinderAlone starts Cinder with a storage of these settings, without Keystone.
func (s *stack) startCinderAlone(storage string) {
	s.t.Helper()
	s.startCinder(storage, "auth_strategy = noauth_include_project_id\n[database]\nconnection = "+s.database("cinder"))
	s.awaitCinder("admin:"+openstacktest.Project, openstacktest.Project)
}

// startCinder starts Cinder, with a storage and further settings.
func (s *stack) startCinder(storage, settings string) {
	s.t.Helper()
	port := freePort(s.t)
	state := s.mkdir("cinder")
	sbin := s.mkdir("sbin")
	s.run(nil, "cp", "-a", "/usr/sbin/.", sbin)
	s.file("sbin/mount.nfs", "#!/bin/sh\nexec mount --bind \"${1#*:}\" \"$2\"\n", 0o755)
	conf := s.file("cinder.conf", fmt.Sprintf(`[DEFAULT]
my_ip = 127.0.0.1
host = node1
osapi_volume_listen = 127.0.0.1
osapi_volume_listen_port = %d
osapi_volume_workers = 1
state_path = %s
rootwrap_config = /etc/cinder/rootwrap.conf
api_paste_config = /etc/cinder/api-paste.ini
resource_query_filters_file = /etc/cinder/resource_filters.json
transport_url = %s
enabled_backends = storage1
quota_volumes = 1000
quota_gigabytes = 100000
periodic_interval = 5
%s
[storage1]
volume_backend_name = storage1
max_over_subscription_ratio = 1000
%s
[oslo_concurrency]
lock_path = %s/lock
[coordination]
backend_url = file://%s/coordination
`, port, state, s.rabbit, settings, storage, state, state), 0o644)
	s.run(nil, "cinder-manage", "--config-file", conf, "db", "sync")
	s.daemon("cinder-api", nil, "cinder-api", "--config-file", conf)
	s.daemon("cinder-scheduler", nil, "cinder-scheduler", "--config-file", conf)
	s.daemon("cinder-volume", []string{"SBIN=" + sbin}, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount --bind "$SBIN" /usr/sbin && exec cinder-volume --config-file `+conf)
	s.await("Cinder", 10*time.Minute, s.listens(port))
	s.cinder = fmt.Sprintf("http://127.0.0.1:%d/v3", port)
}

// call makes a call of OpenStack's APIs, and returns what it says.
func (s *stack) call(token, method, url string, body, into any) (status int, header http.Header, text string) {
	s.t.Helper()
	var sent []byte
	if body != nil {
		var err error
		if sent, err = json.Marshal(body); err != nil {
			s.t.Fatal(err)
		}
	}
	req, err := http.NewRequest(method, url, bytes.NewReader(sent))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Auth-Token", token)
	req.Header.Set("OpenStack-API-Version", "volume 3.44")
	req.Header.Set("X-OpenStack-Nova-API-Version", "2.53")
	resp, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	if into != nil && resp.StatusCode < 300 {
		if err := json.Unmarshal(answer, into); err != nil {
			s.t.Fatalf("%s %s: %v: %s", method, url, err, answer)
		}
	}
	return resp.StatusCode, resp.Header, string(answer)
}

// must makes a call that has to succeed.
func (s *stack) must(token, method, url string, body, into any) {
	s.t.Helper()
	if status, _, text := s.call(token, method, url, body, into); status < 200 || status > 299 {
		s.t.Fatalf("%s %s: %d: %s", method, url, status, text)
	}
}

// awaitCinder waits until Cinder's services know each other.
func (s *stack) awaitCinder(token, project string) {
	s.t.Helper()
	s.await("Cinder's services", 10*time.Minute, func() bool {
		var got struct {
			Services []struct{ Binary, State string }
		}
		up := 0
		s.call(token, http.MethodGet, s.cinder+"/"+project+"/os-services", nil, &got)
		for _, service := range got.Services {
			if service.State == "up" {
				up++
			}
		}
		return up == 2
	})
}
