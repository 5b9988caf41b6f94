package ebs_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/ebs/ec2test"
)

// What the role lacks is known without anything being done, each call by itself.
func TestForbidden(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	is := func(b *ebs.Backend, want ...string) {
		t.Helper()
		before, _ := s.Calls()
		got, err := b.Forbidden(t.Context())
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
		after, _ := s.Calls()
		for _, call := range ebs.Calls() {
			if n := after[call] - before[call]; n > 1 || call == "DeleteVolume" && n > 0 {
				t.Errorf("%s was asked %d times", call, n)
			}
		}
		if vols := s.Volumes(); len(vols) != 1 || vols[0] != s.id || s.State(s.instance("node-a")) != "running" {
			t.Errorf("volumes %q, an instance that is %s", vols, s.State(s.instance("node-a")))
		}
		s.wantAttached("", "")
	}
	is(s.a)
	var all []string
	for _, call := range ebs.Calls() {
		if call == "DescribeVolumes" || call == "DeleteVolume" {
			continue // without the first nothing works, and everything says so; the other one is not asked about
		}
		s.Forbid(call)
		is(s.a, "ec2:"+call)
		all = append(all, call)
	}
	s.Forbid(all...)
	want := make([]string, len(all))
	for i, call := range all {
		want[i] = "ec2:" + call
	}
	is(s.a, want...)
	// Who never stops an instance need not be allowed to.
	s.Forbid("StopInstances")
	s.cfg = func(cfg *ebs.Config) { cfg.KeepInstances = true }
	is(s.backend(s.cluster, "node-a"))
	s.cfg = nil
	// Of a cluster without volumes less is known.
	s.Forbid("StopInstances", "DetachVolume")
	is(s.backend(uuid.NewString(), "node-a"), "ec2:StopInstances")
}

func TestForbiddenIsNotKnown(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.Forbid("DescribeVolumes")
	_, err := s.a.Forbidden(t.Context())
	want(t, err, backends.ErrUnavailable, "ask for permissions: DescribeVolumes", "allow ec2:DescribeVolumes to the role or user of this host")
	s.Forbid()
	s.SetFaults(ec2test.Fault{Action: "StopInstances", Code: "InternalError", Status: 500})
	_, err = s.a.Forbidden(t.Context())
	want(t, err, backends.ErrUnavailable, "ask for permissions: StopInstances", "EC2 itself has failed")
	s.SetFaults()
	// Where DryRun means nothing, nothing that has an effect is asked for.
	s.IgnoreDryRun()
	before, _ := s.Calls()
	_, err = s.a.Forbidden(t.Context())
	want(t, err, backends.ErrUnavailable, "does not heed DryRun")
	after, _ := s.Calls()
	for call, n := range after {
		if !strings.HasPrefix(call, "Describe") && n != before[call] {
			t.Errorf("%s was called", call)
		}
	}
}
