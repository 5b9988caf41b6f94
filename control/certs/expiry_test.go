package certs_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/control/certs"
)

func TestExpiries(t *testing.T) {
	dir, next := cluster(t), cluster(t)
	a := open(t, dir)
	if _, _, err := a.Node(certs.Host{Name: "beta"}, 20*24*time.Hour); err != nil {
		t.Fatal(err)
	}
	ca, beta, alpha := filepath.Join(dir, certs.CAFile), filepath.Join(dir, "beta", certs.NodeFile), filepath.Join(dir, "alpha", certs.NodeFile)
	all := certs.Expiries(ca, filepath.Join(dir, "none"), "", beta, alpha, filepath.Join(dir, "anna.key"))
	var of []string
	for _, e := range all {
		of = append(of, e.File)
		if want := certificate(t, e.File).NotAfter; !e.At.Equal(want) {
			t.Errorf("%s ends at %v, want %v", e.File, e.At, want)
		}
	}
	if !slices.Equal(of, []string{ca, beta, alpha}) {
		t.Errorf("found %q", of)
	}
	for i, soon := range []bool{false, true, false} {
		if text := all[i].Warning(time.Now()); (text != "") != soon {
			t.Errorf("%s: %q", all[i].File, text)
		}
	}

	// Of two authorities, the one to come counts; of a certificate and what follows it, the
	// first.
	join := func(name string, files ...string) string {
		path := filepath.Join(t.TempDir(), name)
		var data []byte
		for _, file := range files {
			some, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			data = append(data, some...)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	short := t.TempDir()
	if err := certs.Init(short, "old", 48*time.Hour); err != nil {
		t.Fatal(err)
	}
	old, replaced := filepath.Join(short, certs.CAFile), filepath.Join(next, certs.CAFile)
	for _, file := range []string{join("both", old, replaced), join("the other way", replaced, old)} {
		if got := certs.Expiries(file); len(got) != 1 || !got[0].At.Equal(certificate(t, replaced).NotAfter) {
			t.Errorf("%s: %v", file, got)
		}
	}
	if got := certs.Expiries(join("chain", beta, ca)); len(got) != 1 || !got[0].At.Equal(certificate(t, beta).NotAfter) {
		t.Errorf("a chain: %v", got)
	}
}

func TestWarning(t *testing.T) {
	at := time.Date(2026, 12, 1, 12, 0, 0, 0, time.UTC)
	for before, want := range map[time.Duration]string{
		31 * 24 * time.Hour:  "",
		30 * 24 * time.Hour:  "",
		30*24*time.Hour - 1:  "the certificate node.crt expires on 2026-12-01, in 29 days",
		9*24*time.Hour + 100: "the certificate node.crt expires on 2026-12-01, in 9 days",
		48 * time.Hour:       "the certificate node.crt expires on 2026-12-01, in 2 days",
		47 * time.Hour:       "the certificate node.crt expires at 2026-12-01T12:00:00Z",
		time.Hour:            "the certificate node.crt expires at 2026-12-01T12:00:00Z",
		0:                    "the certificate node.crt has expired on 2026-12-01",
		-time.Hour:           "the certificate node.crt has expired on 2026-12-01",
	} {
		if got := (certs.Expiry{File: "node.crt", At: at}).Warning(at.Add(-before)); got != want {
			t.Errorf("%v before: %q, want %q", before, got, want)
		}
	}
}
