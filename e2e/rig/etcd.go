package rig

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flocker-plugin/flocker/control/certs"
)

// etcdMembers is how many the rig's etcd cluster has.
const etcdMembers = 3

// Etcd starts an etcd cluster of three members on the rig's network and returns
// its endpoints, for the hosts. This process reaches them through Dial.
func (r *Rig) Etcd(ctx context.Context) (endpoints []string, err error) {
	// The version that this module's go.mod names.
	if r.etcdProgram, err = buildProgram(ctx, "etcd"); err != nil {
		return nil, err
	}
	r.etcd = make([]*process, etcdMembers)
	errs := make([]error, etcdMembers)
	var wg sync.WaitGroup
	for i := range etcdMembers {
		endpoints = append(endpoints, r.etcdURL(i, 2379))
		wg.Go(func() {
			addr := etcdAddr(i) + "/24"
			if _, errs[i] = r.sw.exec(ctx, "ip", "addr", "add", addr, "dev", "br0"); errs[i] == nil {
				errs[i] = r.StartEtcd(ctx, i)
			}
		})
	}
	wg.Wait()
	return endpoints, errors.Join(errs...)
}

func etcdAddr(i int) string { return fmt.Sprintf(hostNet, etcdFirst+i) }

func etcdName(i int) string { return fmt.Sprintf("etcd%d", i+1) }

func (r *Rig) etcdURL(i, port int) string {
	scheme := "http"
	if r.cfg.Secure {
		scheme = "https"
	}
	return fmt.Sprintf("%s://%s:%d", scheme, etcdAddr(i), port)
}

// buildProgram builds a program of the rig, from e2e/<name>. Go leaves it alone
// where it is up to date.
func buildProgram(ctx context.Context, name string) (program string, err error) {
	root, err := sourceRoot()
	if err != nil {
		return "", err
	}
	program = filepath.Join(root, "build", "rig-"+name)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", program, "./e2e/"+name)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	_, err = output(cmd, "build "+name)
	return program, err
}

// StartEtcd starts member i (0 is the first) with the data it had, and waits
// until it answers. Alone it does not before a second one is up.
func (r *Rig) StartEtcd(ctx context.Context, i int) error {
	var cluster []string
	for m := range etcdMembers {
		cluster = append(cluster, etcdName(m)+"="+r.etcdURL(m, 2380))
	}
	name := etcdName(i)
	args := []string{r.etcdProgram, "-name", name, "-dir", filepath.Join(r.Dir, "switch", name), "-addr", etcdAddr(i), "-cluster", strings.Join(cluster, ",")}
	if r.cfg.Secure {
		args = append(args, "-certs", filepath.Join(r.Certs, name))
	}
	p, err := r.sw.start(ctx, name, nil, args...)
	if err != nil {
		return err
	}
	r.etcd[i] = p
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if err = r.etcdHealth(ctx, i); err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("start %s: it ended: %w\n%s", name, p.err, tail(p.log, 20))
		case <-ctx.Done():
			return fmt.Errorf("start %s: %w\n%s", name, err, tail(p.log, 20))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (r *Rig) etcdHealth(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	secure, err := r.EtcdTLS()
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DialContext: r.Dial, DisableKeepAlives: true, TLSClientConfig: secure}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.etcdURL(i, 2379)+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd answers %s", resp.Status)
	}
	return nil
}

// EtcdTLS is how etcd is reached, with the certificate of its first member; nil if it has
// no TLS.
func (r *Rig) EtcdTLS() (*tls.Config, error) {
	if !r.cfg.Secure {
		return nil, nil
	}
	in := func(file string) string { return filepath.Join(r.Certs, etcdName(0), file) }
	cert, err := tls.LoadX509KeyPair(in(certs.NodeFile), in(certs.NodeKey))
	if err != nil {
		return nil, err
	}
	authority, err := os.ReadFile(in(certs.CAFile))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots}, nil
}

// KillEtcd kills member i as a crash does.
func (r *Rig) KillEtcd(ctx context.Context, i int) error { return r.etcd[i].stop(ctx, syscall.SIGKILL) }

// PauseEtcd stops member i where it is; ResumeEtcd lets it go on.
func (r *Rig) PauseEtcd(i int) error { return syscall.Kill(r.etcd[i].pid, syscall.SIGSTOP) }

// ResumeEtcd lets a paused member go on.
func (r *Rig) ResumeEtcd(i int) error { return syscall.Kill(r.etcd[i].pid, syscall.SIGCONT) }
