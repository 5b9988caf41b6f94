package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	flocker "github.com/clusterhq/flocker-go"
	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/certs"
)

// patient is what nothing takes, on a machine that has very much else to do.
const patient = 60 * time.Second

// apiCertificates makes an authority with the user anna, and certificates of a host below
// each of these state directories.
func apiCertificates(t *testing.T, stateDirs ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := certs.Init(dir, "prod", certs.Lifetime); err != nil {
		t.Fatal(err)
	}
	authority, err := certs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := authority.User("anna", certs.User, time.Hour); err != nil {
		t.Fatal(err)
	}
	for i, stateDir := range stateDirs {
		host := "host" + strconv.Itoa(i)
		if _, _, err := authority.Node(certs.Host{Name: host}, time.Hour); err != nil {
			t.Fatal(err)
		}
		// All at once, as whoever watches may look at any moment.
		if err := os.Rename(filepath.Join(dir, host), filepath.Join(stateDir, "certs")); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func anna(dir string) certs.Files {
	return certs.Files{CA: filepath.Join(dir, certs.CAFile), Cert: filepath.Join(dir, "anna.crt"), Key: filepath.Join(dir, "anna.key")}
}

// ask sends a request to the REST API as anna.
func askAPI(t *testing.T, dir, method, url, body string) (status int, answer string, err error) {
	t.Helper()
	creds, err := certs.Load(anna(dir), func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: patient, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: creds.Client()}}
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(data)), err
}

// The API begins when there are certificates, without a restart, and says where it looks
// for them.
func TestAPIBegins(t *testing.T) {
	etc, round := etcFlocker, certificateRound
	etcFlocker, certificateRound = filepath.Join(t.TempDir(), "none"), 20*time.Millisecond
	t.Cleanup(func() { etcFlocker, certificateRound = etc, round })
	stateDir, address := t.TempDir(), freeAddress(t)
	var out lockedBuffer
	log := logrus.New()
	log.SetOutput(&out)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serveAPI(ctx, settings{StateDir: stateDir, APIListen: address}, http.NotFoundHandler(), logrus.NewEntry(log))
	}()
	want := "there is no REST API: it begins when there is " + stateDir + "/certs/control-service.crt, which docker flocker ca node makes, " +
		"with control-service.key and cluster.crt beside it; FLOCKER_API_LISTEN=off is without"
	for end := time.Now().Add(patient); !strings.Contains(out.String(), want); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the log has not\n%s\nbut\n%s", want, out.String())
		}
	}
	dir := apiCertificates(t, stateDir)
	for end := time.Now().Add(patient); ; time.Sleep(10 * time.Millisecond) {
		status, _, err := askAPI(t, dir, http.MethodGet, "https://"+address+"/", "")
		if status == http.StatusNotFound {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d, %v", status, err)
		}
	}
	if n := strings.Count(out.String(), "there is no REST API"); n != 1 {
		t.Errorf("it is said %d times that there is none", n)
	}
	cancel()
	select {
	case <-done:
	case <-time.After(patient):
		t.Fatal("it does not end")
	}
	if conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address); err == nil {
		_ = conn.Close()
		t.Error("it still listens")
	}
	serveAPI(t.Context(), settings{StateDir: stateDir, APIListen: apiOff}, http.NotFoundHandler(), logrus.NewEntry(log)) // which returns
}

// What ends soon is said in the log, of all that is in use and of nothing else.
func TestWarnOfExpiry(t *testing.T) {
	round := expiryRound
	expiryRound = 10 * time.Millisecond
	t.Cleanup(func() { expiryRound = round })
	stateDir := t.TempDir()
	apiCertificates(t, stateDir) // which are good for an hour, and the authority for years
	dir := filepath.Join(stateDir, "certs")
	in := func(file string) string { return filepath.Join(dir, file) }
	for _, c := range []struct {
		what string
		s    settings
		uses []string
	}{
		{"the REST API", settings{StateDir: stateDir, Certs: dir}, []string{in(certs.CAFile), in(certs.ServerFile)}},
		{"the etcd inside", settings{Certs: dir, APIListen: apiOff, EtcdListen: "10.0.0.1:2379"}, []string{in(certs.CAFile), in(certs.NodeFile)}},
		{"an etcd, and the REST API", settings{
			Certs: dir, EtcdEndpoints: []string{"https://etcd:2379"}, EtcdListen: "10.0.0.1:2379",
			EtcdCACert: in(certs.CAFile), EtcdCert: in(certs.NodeFile), EtcdKey: in(certs.NodeKey),
		}, []string{in(certs.CAFile), in(certs.ServerFile), in(certs.NodeFile)}},
		{"neither", settings{Certs: dir, APIListen: apiOff}, nil},
	} {
		var uses []string
		for _, e := range certificates(c.s) {
			uses = append(uses, e.File)
		}
		if !slices.Equal(uses, c.uses) {
			t.Errorf("%s uses %q, want %q", c.what, uses, c.uses)
		}
	}

	var out lockedBuffer
	log := logrus.New()
	log.SetOutput(&out)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		warnOfExpiry(ctx, settings{Certs: dir}, logrus.NewEntry(log))
	}()
	want := "the certificate " + in(certs.ServerFile) + " expires at "
	for end := time.Now().Add(patient); strings.Count(out.String(), want) < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("logged %s", out.String())
		}
	}
	cancel()
	<-done
	if text := out.String(); strings.Contains(text, certs.CAFile) || !strings.Contains(text, "make another with docker flocker ca: docs/cli.md, New certificates") {
		t.Errorf("logged %s", text)
	}
}

// Two hosts with real devices, and flocker-go over TLS: a dataset is made, is mounted
// where it is to be, and moves with what was written to it.
func TestAPI(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "root", "needs root")
	}
	dirs := []string{t.TempDir(), t.TempDir()}
	dir := apiCertificates(t, dirs...)
	shared, etcd := t.TempDir(), freeAddress(t)
	var hosts []*process
	var clients []*flocker.Client
	var urls []string
	for i, stateDir := range dirs {
		address, ip := freeAddress(t), "127.0.0."+strconv.Itoa(i+2)
		environ := []string{
			"FLOCKER_HOSTNAME=host" + strconv.Itoa(i), "FLOCKER_ADDRESS=" + ip, "FLOCKER_API_LISTEN=" + address,
			"FLOCKER_LOOPBACK_DIR=" + shared, "FLOCKER_LINGER=0s",
		}
		if i == 0 {
			environ = append(environ, "FLOCKER_ETCD_LISTEN="+etcd)
		} else {
			environ = append(environ, "FLOCKER_ETCD_ENDPOINTS=https://"+etcd)
		}
		hosts = append(hosts, plugin(t.Context(), stateDir, environ...).begin(t))
		host, port, _ := net.SplitHostPort(address)
		number, err := strconv.Atoi(port)
		if err != nil {
			t.Fatal(err)
		}
		f := anna(dir)
		client, err := flocker.NewClient(host, number, ip, f.CA, f.Key, f.Cert)
		if err != nil {
			t.Fatal(err)
		}
		clients, urls = append(clients, client), append(urls, "https://"+address)
	}
	ids := make([]string, len(clients))
	for i, c := range clients {
		for end := time.Now().Add(patient); ; time.Sleep(50 * time.Millisecond) {
			// Each host sees itself, and the other.
			nodes, err := c.ListNodes()
			if err == nil && len(nodes) == 2 {
				if ids[i], err = c.GetPrimaryUUID(); err == nil {
					break
				}
			}
			if time.Now().After(end) {
				t.Fatalf("host%d: %v, %v", i, nodes, err)
			}
		}
	}
	// mounted waits until host i has the dataset.
	mounted := func(i int, id string) (path string) {
		t.Helper()
		for end := time.Now().Add(patient); ; time.Sleep(50 * time.Millisecond) {
			state, err := clients[i].GetDatasetState(id)
			if err == nil && state.Primary == ids[i] {
				return state.Path
			}
			if time.Now().After(end) {
				t.Fatalf("not on host%d: %+v, %v", i, state, err)
			}
		}
	}

	began := time.Now()
	made, err := clients[0].CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Metadata: map[string]string{"name": "db", "team": "a b"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("made after %v", time.Since(began))
	path := mounted(0, made.DatasetID)
	if want := filepath.Join(dirs[0], "mnt", made.DatasetID, "data"); path != want {
		t.Errorf("it is at %s, want %s", path, want)
	}
	if err := os.WriteFile(filepath.Join(path, "greeting"), []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := clients[1].CreateDataset(&flocker.CreateDatasetOptions{MaximumSize: 64 << 20, Metadata: map[string]string{"name": "db"}}); err == nil || err.Error() != "The volume already exists" {
		t.Errorf("one more of that name: %v", err)
	}

	// As Kubernetes did on the other host.
	id, err := clients[1].GetDatasetID("db")
	if err != nil || id != made.DatasetID {
		t.Fatalf("%s, %v", id, err)
	}
	if state, err := clients[1].GetDatasetState(id); err != nil || state.Primary != ids[0] || state.MaximumSize != "67108864" {
		t.Errorf("%+v, %v", state, err)
	}
	began = time.Now()
	if _, err := clients[1].UpdatePrimaryForDataset(ids[1], id); err != nil {
		t.Fatal(err)
	}
	path = mounted(1, id)
	t.Logf("moved after %v", time.Since(began))
	if got, err := os.ReadFile(filepath.Join(path, "greeting")); string(got) != "hello" || err != nil {
		t.Errorf("what was written is %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(dirs[0], "mnt", id, "data", "greeting")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is on the first host still: %v", err)
	}

	// While somebody has it, it stays, and is not deleted.
	file, err := os.Open(filepath.Join(path, "greeting"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := clients[0].UpdatePrimaryForDataset(ids[0], id); err != nil {
		t.Error(err)
	}
	status, text, err := askAPI(t, dir, http.MethodGet, urls[0]+"/v2/volumes/db/wait?state=mounted&host=host0&timeout=2s", "")
	if status != http.StatusGatewayTimeout || err != nil {
		t.Errorf("in use, and moved all the same: %d %s, %v", status, text, err)
	}
	if err := clients[0].DeleteDataset(id); err == nil {
		t.Error("in use, and deleted all the same")
	}
	if got, err := os.ReadFile(filepath.Join(path, "greeting")); string(got) != "hello" || err != nil {
		t.Errorf("afterwards: %q, %v", got, err)
	}
	_ = file.Close()
	if status, text, err = askAPI(t, dir, http.MethodPost, urls[1]+"/v2/volumes/db/move", `{"host":"host0"}`); status != http.StatusOK || err != nil {
		t.Errorf("%d %s, %v", status, text, err)
	}
	path = mounted(0, id)
	if got, err := os.ReadFile(filepath.Join(path, "greeting")); string(got) != "hello" || err != nil {
		t.Errorf("back on the first host: %q, %v", got, err)
	}

	// Who did it is in the events, which every host has.
	status, text, err = askAPI(t, dir, http.MethodGet, urls[1]+"/v2/events?limit=1000", "")
	var page struct {
		Events []struct{ What, Volume, By string }
	}
	if failed := json.NewDecoder(bytes.NewReader([]byte(text))).Decode(&page); status != 200 || err != nil || failed != nil {
		t.Errorf("%d %s, %v, %v", status, text, err, failed)
	}
	placed := 0
	for _, e := range page.Events {
		if e.What == "place" && e.Volume == "db" && e.By == "user-anna" {
			placed++
		}
	}
	if placed < 3 {
		t.Errorf("the events have %d placements: %s", placed, text)
	}

	if err := clients[1].DeleteDataset(id); err != nil {
		t.Error(err)
	}
	for i, c := range clients {
		for end := time.Now().Add(patient); ; time.Sleep(50 * time.Millisecond) {
			if _, err := c.GetDatasetID("db"); err != nil && err.Error() == "Configuration not found by Name" {
				break
			}
			if time.Now().After(end) {
				t.Errorf("host%d has it still", i)
				break
			}
		}
	}
	hosts[1].stop(t)
	hosts[0].stop(t)
}
