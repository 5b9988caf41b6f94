package main

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// dates are what is different from day to day.
var dates = regexp.MustCompile(`until \d{4}-\d\d-\d\d`)

func TestCA(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, test := range []struct {
		args string
		want result
	}{
		{"ca node alpha", result{1, "", "there is no cluster.crt in .: type it where the authority is, or name its directory with --dir; docker flocker ca init makes one\n"}},
		{"ca init prod", result{0, "made cluster.crt and cluster.key, the authority of cluster prod\n" +
			"Whoever has cluster.key can make certificates that may do everything: keep it off the hosts.\n" +
			"Next, for each host: docker flocker ca node HOST --ip ADDRESS\n", ""}},
		{"ca init", result{1, "", "cluster.key is there already; a second authority is of no use to those who trust the first: to make one nevertheless, name another directory with --dir\n"}},
		{"ca node alpha --ip 10.0.0.1 --ip fd00::1 --name alpha.example.com", result{0, "made alpha, with cluster.crt, node.crt, node.key, control-service.crt and control-service.key\n" +
			"They are for alpha, alpha.example.com, localhost, 10.0.0.1, fd00::1, 127.0.0.1, ::1, until DATE.\n" +
			"Copy the directory to the host, as root's and for root alone, and remove it here.\n", ""}},
		{"ca node alpha", result{1, "", "alpha is there already; to make certificates for the host once more, move the old ones away\n"}},
		{"ca node ../beta", result{1, "", "\"../beta\" cannot be a name: it may have letters and digits, and between them '-', '_' and '.'\n"}},
		{"ca user anna --days 30", result{0, "made anna.crt and anna.key: user anna may do everything, until DATE\n" +
			"Give them to the user together with cluster.crt, and remove the key here.\n", ""}},
		{"ca user rita --read-only --dir .", result{0, "made rita.crt and rita.key: user rita may look and change nothing, until DATE\n" +
			"Give them to the user together with cluster.crt, and remove the key here.\n", ""}},
		{"ca user anna", result{1, "", "anna.key is there already; choose another name, or move the old one away\n"}},
		{"ca node beta --ip beta", result{2, "", "--ip takes an address, such as 10.0.0.1, and \"beta\" is none\nSee 'docker flocker ca node --help'.\n"}},
		{"ca user eve --days 0", result{2, "", "--days is from 1 to 7300, and 0 is not\nSee 'docker flocker ca user --help'.\n"}},
		{"ca user eve --days 7301", result{2, "", "--days is from 1 to 7300, and 7301 is not\nSee 'docker flocker ca user --help'.\n"}},
		{"ca user", result{2, "", "it takes one argument, NAME\nSee 'docker flocker ca user --help'.\n"}},
		{"ca init a b", result{2, "", "it takes one argument at most, CLUSTER\nSee 'docker flocker ca init --help'.\n"}},
	} {
		got := command(t, "/nonexistent", "", strings.Fields(test.args)...)
		got.out = dates.ReplaceAllString(got.out, "until DATE")
		want(t, test.args, got, test.want)
	}
	for holder, days := range map[string]int{"alpha/control-service": 3650, "alpha/node": 3650, "anna": 30, "rita": 3650} {
		pair, err := tls.LoadX509KeyPair(holder+".crt", holder+".key")
		if err != nil {
			t.Errorf("%s: %v", holder, err)
			continue
		}
		if left := time.Until(pair.Leaf.NotAfter).Hours() / 24; left < float64(days)-0.1 || left > float64(days) {
			t.Errorf("%s: good for %.2f days, want %d", holder, left, days)
		}
	}

	// Another directory; what is printed is the path from here.
	if err := os.Mkdir("other", 0o700); err != nil {
		t.Fatal(err)
	}
	want(t, "ca init elsewhere", command(t, "/nonexistent", "", "ca", "init", "--dir", "other"), result{0, "made other/cluster.crt and other/cluster.key, the authority of cluster flocker\n" +
		"Whoever has cluster.key can make certificates that may do everything: keep it off the hosts.\n" +
		"Next, for each host: docker flocker ca node HOST --ip ADDRESS\n", ""})
	elsewhere := command(t, "/nonexistent", "", "ca", "user", "anna", "--dir", "other")
	elsewhere.out = dates.ReplaceAllString(elsewhere.out, "until DATE")
	want(t, "ca user elsewhere", elsewhere, result{0, "made other/anna.crt and other/anna.key: user anna may do everything, until DATE\n" +
		"Give them to the user together with other/cluster.crt, and remove the key here.\n", ""})
	if _, err := os.Stat(filepath.Join("other", "anna.key")); err != nil {
		t.Error(err)
	}
}

// The examples of docs/cli.md print what stands there.
func TestCADocs(t *testing.T) {
	examples := documented(t, "docker flocker ca")
	t.Chdir(t.TempDir())
	for _, e := range examples {
		got := command(t, "/nonexistent", "", e.args...)
		got.out = dates.ReplaceAllString(got.out, "until DATE")
		want(t, strings.Join(e.args, " "), got, result{0, dates.ReplaceAllString(e.out, "until DATE"), ""})
	}
}
