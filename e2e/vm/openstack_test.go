package vm_test

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends/backendtest"
)

// TestISCSIOfCinder runs the iSCSI tests of the openstack backend, the contract of backends among them, in
// a machine, with its kernel's initiator in place of programs. The machine is two hosts: each has a name,
// and so sessions, of its own. The target is Debian's tgtd.
func TestISCSIOfCinder(t *testing.T) {
	backendtest.NeedRoot(t)
	needVM(t)
	const limit = 40 * time.Minute
	program := t.TempDir() + "/openstack.test"
	build := exec.Command("go", "test", "-c", "-ldflags=-s -w", "-o", program, "../../backends/openstack")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the tests: %v: %s", err, out)
	}
	m := boot(t, config{modules: []string{"iscsi_tcp", "crc32c_generic", "sd_mod"}, root: true, program: program})
	shell := func(script string) string { return must[string](m, "Shell", script) }
	shell(daemon)
	// One at a time: all call their hosts the same.
	shell(`cd /tmp; export ISCSI_ATTACH=kernel REQUIRE=root,iscsi
(code=0; ` + programFile + ` -test.v -test.run ^TestISCSI -test.parallel 1 -test.timeout ` + limit.String() + ` || code=$?; echo $code >ended) </dev/null >log 2>&1 &`)
	ended := ""
	for began := time.Now(); ended == ""; time.Sleep(3 * time.Second) {
		if time.Since(began) > limit+time.Minute {
			t.Fatalf("the tests do not end: %s", shell("tail -c 10000 /tmp/log"))
		}
		ended = strings.TrimSpace(shell("cat /tmp/ended 2>/dev/null || true"))
	}
	log := shell("cat /tmp/log")
	t.Logf("%s", strings.Join(regexp.MustCompile(`(?m)^ *--- .*$`).FindAllString(log, -1), "\n"))
	for _, test := range []string{"TestISCSIContract", "TestISCSIContract/move_keeps_data", "TestISCSIHangs"} {
		if !strings.Contains(log, "--- PASS: "+test+" (") {
			t.Errorf("%s has not passed", test)
		}
	}
	if ended != "0" {
		t.Errorf("the tests have ended with %s: %s\n%s", ended, log, shell("dmesg | tail -30"))
	}
}
