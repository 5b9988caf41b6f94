package ebs_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/ebs/ec2test"
)

// stored is a cloud with a volume and two nodes.
type stored struct {
	*cloud
	t       *testing.T
	cluster string
	a, b    *ebs.Backend
	vol     backends.Volume
	id      string
}

func newStored(t *testing.T, cfg ec2test.Config) *stored {
	t.Helper()
	s := &stored{cloud: newCloud(t, cfg), t: t, cluster: uuid.NewString()}
	s.a, s.b = s.backend(s.cluster, "node-a"), s.backend(s.cluster, "node-b")
	s.vol = s.create()
	s.id = strings.TrimPrefix(s.vol.Ref, region+"/")
	return s
}

func (s *stored) create() backends.Volume {
	s.t.Helper()
	vol, err := s.a.Create(s.t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: s.cluster, Size: 1 << 30})
	if err != nil {
		s.t.Fatal(err)
	}
	return vol
}

func (s *stored) attach(b *ebs.Backend, token int64) (backends.Attachment, error) {
	return b.Attach(s.t.Context(), backends.AttachRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Token: token})
}

func (s *stored) mustAttach(b *ebs.Backend, token int64) backends.Attachment {
	s.t.Helper()
	att, err := s.attach(b, token)
	if err != nil {
		s.t.Fatal(err)
	}
	return att
}

func (s *stored) fence(ctx context.Context, token int64) (string, error) {
	return s.b.Fence(ctx, backends.FenceRequest{Ref: s.vol.Ref, Volume: s.vol.ID, Node: "node-a", Identity: s.instance("node-a"), Token: token})
}

// want demands an error of a class that says what to do.
func want(t *testing.T, err, class error, texts ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("got %v, want %v", err, class)
	}
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want it to say %q", err, text)
		}
	}
}

func (s *stored) wantAttached(instance, state string) {
	s.t.Helper()
	if i, st := s.Attached(s.id); i != instance || st != state {
		s.t.Errorf("EC2 has it attached to %q (%s), want %q (%s)", i, st, instance, state)
	}
}

func TestWrongCredentials(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	path := filepath.Join(t.TempDir(), "credentials")
	write := func(key string) {
		if err := os.WriteFile(path, []byte("[default]\naws_access_key_id = "+key+"\naws_secret_access_key = x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.cfg = func(cfg *ebs.Config) { cfg.CredentialsFile = path }
	write("AKIAWRONG")
	a := s.backend(s.cluster, "node-a")
	_, err := a.List(t.Context())
	want(t, err, backends.ErrUnavailable, "list volumes", "AuthFailure", "check credentials_file, or the role of this instance")
	write(key) // and no new process
	if vols, err := a.List(t.Context()); err != nil || len(vols) != 1 {
		t.Errorf("with the right key: got %v, %v", vols, err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	s.cfg = nil
	_, err = s.backend(s.cluster, "node-a").List(t.Context())
	want(t, err, backends.ErrUnavailable, "no AWS credentials", "give the instance a role, or set credentials_file")
}

func TestExpiredTokenMidFlight(t *testing.T) {
	s := newStored(t, ec2test.Config{Delay: 5 * time.Millisecond})
	s.SetFaults(ec2test.Fault{Action: "AttachVolume", Times: 1, Code: "RequestExpired"})
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrUnavailable, "RequestExpired", "credentials have expired, or this host's clock is wrong")
	s.wantAttached("", "")
	s.mustAttach(s.a, 10)
	s.wantAttached(s.instance("node-a"), "attached")
}

func TestQuota(t *testing.T) {
	s := newStored(t, ec2test.Config{Quota: 1})
	req := backends.CreateRequest{ID: uuid.NewString(), Name: "more", Cluster: s.cluster, Size: 1 << 30}
	_, err := s.a.Create(t.Context(), req)
	want(t, err, backends.ErrUnavailable, "create volume more", "VolumeLimitExceeded", "quota of EBS volumes", "ask AWS for more")
	if err := s.a.Delete(t.Context(), s.vol.Ref); err != nil {
		t.Fatal(err)
	}
	if _, err := s.a.Create(t.Context(), req); err != nil {
		t.Error(err)
	}
}

func TestAttachLimit(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.nodesMu.Lock()
	s.instances["full"] = s.AddInstance(zone, 1)
	s.nodesMu.Unlock()
	full := s.backend(s.cluster, "full")
	first := s.create()
	att, err := full.Attach(t.Context(), backends.AttachRequest{Ref: first.Ref, Volume: first.ID, Token: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.attach(full, 10)
	want(t, err, backends.ErrUnavailable, "(m5.large) has as many volumes as its type can, which are", "network interfaces included", "use a larger instance type")
	s.wantAttached("", "")
	if err := full.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	s.mustAttach(full, 10)
}

func TestWrongZone(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.cfg = func(cfg *ebs.Config) { cfg.Zone = "us-east-1b" }
	_, err := s.attach(s.backend(s.cluster, "node-b"), 10)
	want(t, err, backends.ErrInvalid, "is in zone us-east-1a and this host in us-east-1b", "run the container on a host in us-east-1a")
	// EC2 itself knows better where an instance is.
	s.nodesMu.Lock()
	s.instances["far"] = s.AddInstance("us-east-1b", 27)
	s.nodesMu.Unlock()
	s.cfg = nil
	_, err = s.attach(s.backend(s.cluster, "far"), 11)
	want(t, err, backends.ErrInvalid, "InvalidVolume.ZoneMismatch", "only be attached in its own zone")
	s.wantAttached("", "")
	s.cfg = func(cfg *ebs.Config) { cfg.Region, cfg.Zone = "eu-west-1", "eu-west-1a" }
	_, err = s.backend(s.cluster, "node-b").Get(t.Context(), s.vol.Ref)
	want(t, err, backends.ErrInvalid, "is in region us-east-1, and this host in eu-west-1")
}

func TestVolumeDeletedBehindOurBack(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	if err := s.Change("DeleteVolume", map[string]string{"VolumeId": s.id}); err != nil {
		t.Fatal(err)
	}
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrNotFound, "EC2 has no volume "+s.id+" in us-east-1")
	// Its client token is used up, and the next Create makes another volume.
	again, err := s.a.Create(t.Context(), backends.CreateRequest{ID: s.vol.ID, Name: "db", Cluster: s.cluster, Size: 1 << 30})
	if err != nil || again.Ref == s.vol.Ref || again.ID != s.vol.ID {
		t.Errorf("got %+v, %v; want another volume than %s", again, err, s.vol.Ref)
	}
}

func TestDeviceNeverAppears(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.mu.Lock()
	s.hidden[s.instance("node-a")] = true
	s.mu.Unlock()
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrUnavailable, "EC2 says that "+s.id+" is attached to this instance", "the kernel has shown no device")
	s.wantAttached(s.instance("node-a"), "attached")
	// This process and a new one see it, without a device.
	var atts []backends.Attachment
	for _, b := range []*ebs.Backend{s.backend(s.cluster, "node-a"), s.a, s.a} {
		if atts, err = b.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0].Token != 10 || atts[0].Device != "" {
			t.Fatalf("got %+v, %v", atts, err)
		}
	}
	if err := s.a.Detach(t.Context(), atts[0]); err != nil {
		t.Fatal(err)
	}
	s.wantAttached("", "")
	s.mu.Lock()
	s.hidden = map[string]bool{}
	s.mu.Unlock()
	s.mustAttach(s.a, 11)
}

// The kernel shows a disk a moment before it can be opened.
func TestDeviceOpensLate(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	var opens atomic.Int32
	s.a.SetOpens(func(path string) error {
		if opens.Add(1) < 4 {
			return &os.PathError{Op: "open", Path: path, Err: syscall.ENXIO}
		}
		return nil
	})
	s.mustAttach(s.a, 10)
	if n := opens.Load(); n != 4 {
		t.Errorf("it was opened %d times, want 4", n)
	}
}

func TestDeviceWithWrongSerial(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.mu.Lock()
	s.serial[s.instance("node-a")] = "vol0123456789abcdef0"
	s.mu.Unlock()
	_, err := s.attach(s.a, 10)
	want(t, err, backends.ErrUnavailable, "the kernel has shown no device that says it is "+s.id)
	if err := s.a.Detach(t.Context(), backends.Attachment{Ref: s.vol.Ref, Volume: s.vol.ID, Node: "node-a", Token: 10}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.serial = map[string]string{}
	s.mu.Unlock()
	// The node in /dev is another device's.
	s.a.SetNode("8:0")
	_, err = s.attach(s.a, 11)
	want(t, err, backends.ErrUnavailable, "is device 8:0, and the kernel's nvme", "are not this kernel's")
}

func TestRegionUnreachable(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	att := s.mustAttach(s.a, 10)
	if _, err := s.a.Attachments(t.Context()); err != nil { // a process asks once
		t.Fatal(err)
	}
	s.SetFaults(ec2test.Fault{Hang: true})
	bounded, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := s.fence(bounded, 10)
	want(t, err, backends.ErrUnavailable, "cut node-a off from volume", "EC2 in us-east-1 has not answered DescribeVolumes in time")
	// What is attached is known without EC2.
	if atts, err := s.a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("got %v, %v", atts, err)
	}
	s.cfg = func(cfg *ebs.Config) { cfg.Endpoint = "http://127.0.0.1:1" }
	short, cancel2 := context.WithTimeout(t.Context(), time.Second)
	defer cancel2()
	_, err = s.backend(s.cluster, "node-b").Get(short, s.vol.Ref)
	want(t, err, backends.ErrUnavailable, "get volume: EC2 in us-east-1")
	s.SetFaults()
	s.wantAttached(s.instance("node-a"), "attached")
}

// A lost answer of DetachVolume is no success, although EC2 has done it: the same call
// may come once more.
func TestDetachUnanswered(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	att := s.mustAttach(s.a, 10)
	s.SetFaults(ec2test.Fault{Action: "DetachVolume", Drop: true})
	err := s.a.Detach(t.Context(), att)
	want(t, err, backends.ErrUnavailable, "EC2 in us-east-1 does not answer DetachVolume")
	if calls, _ := s.Calls(); calls["DetachVolume"] != 1 {
		t.Errorf("DetachVolume was sent %d times, want 1", calls["DetachVolume"])
	}
	s.SetFaults()
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}

// An AttachVolume that is carried out after it was sent again, and after the volume was
// detached, is an attachment of this host which this host sees, and drops.
func TestAttachCarriedOutLate(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	const patience, late = 200 * time.Millisecond, 3 * time.Second
	s.a.Impatient(patience)
	s.SetFaults(ec2test.Fault{Action: "AttachVolume", Times: 1, Late: late})
	started := time.Now()
	att := s.mustAttach(s.a, 10)
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Fatal(err)
	}
	if time.Since(started) > late {
		t.Skip("this machine is too slow to see it")
	}
	for time.Since(started) < time.Minute {
		if i, _ := s.Attached(s.id); i != "" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.wantAttached(s.instance("node-a"), "attached")
	_, err := s.attach(s.b, 11)
	attached, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || attached.Node != "node-a" || attached.Token != 10 {
		t.Errorf("attach elsewhere: got %v", err)
	}
	atts, err := s.a.Attachments(t.Context())
	if err != nil || len(atts) != 1 || atts[0].Token != 10 || atts[0].Node != "node-a" {
		t.Fatalf("got %+v, %v", atts, err)
	}
	if err := s.a.Detach(t.Context(), atts[0]); err != nil {
		t.Fatal(err)
	}
	s.mustAttach(s.b, 11)
}

func TestAttachUnanswered(t *testing.T) {
	for _, action := range []string{"AttachVolume", "CreateTags", "DescribeVolumes"} {
		s := newStored(t, ec2test.Config{})
		s.SetFaults(ec2test.Fault{Action: action, Times: 1, Drop: true})
		att := s.mustAttach(s.a, 10)
		if again := s.mustAttach(s.a, 10); again != att {
			t.Errorf("got %+v, then %+v", att, again)
		}
	}
}

// An instance that has the volume mounted does not let go of it, and is stopped; by
// force if it does not stop.
func TestFenceStopsTheInstance(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		s := newStored(t, ec2test.Config{Delay: 2 * time.Millisecond})
		s.mustAttach(s.a, 10)
		instance := s.instance("node-a")
		s.mu.Lock()
		s.holds[instance], s.deaf[instance] = true, deaf
		s.mu.Unlock()
		evidence, err := s.fence(t.Context(), 10)
		if err != nil || evidence != fmt.Sprintf("instance %s is stopped, and EC2 shows %s detached from it", instance, s.id) {
			t.Errorf("got %q, %v", evidence, err)
		}
		calls, _ := s.Calls()
		if want := map[bool]int{false: 1, true: 2}[deaf]; calls["StopInstances"] != want {
			t.Errorf("it was stopped %d times, want %d", calls["StopInstances"], want)
		}
		if state := s.State(instance); state != "stopped" {
			t.Errorf("the instance is %s", state)
		}
		s.mustAttach(s.b, 11)
	}
}

// An instance that lets go is not stopped because EC2 lets this host wait, for the detach or
// for what has come of it.
func TestFenceIsThrottled(t *testing.T) {
	for name, c := range map[string]struct {
		grace, delay time.Duration
		fault        ec2test.Fault
	}{
		"throttled":   {10 * time.Millisecond, 0, ec2test.Fault{Action: "DetachVolume", Times: 6, Code: "RequestLimitExceeded", Status: 503}},
		"slow":        {time.Second, 0, ec2test.Fault{Action: "DetachVolume", Slow: 2 * time.Second}},
		"a slow look": {time.Second, 500 * time.Millisecond, ec2test.Fault{Action: "DescribeVolumes", After: 2, Times: 1, Slow: 2 * time.Second}},
	} {
		s := newStored(t, ec2test.Config{Delay: c.delay})
		s.mustAttach(s.a, 10)
		s.b.Grace(c.grace)
		s.SetFaults(c.fault)
		instance := s.instance("node-a")
		evidence, err := s.fence(t.Context(), 10)
		if want := fmt.Sprintf("%s has let go of %s, which EC2 shows detached", instance, s.id); err != nil || evidence != want {
			t.Errorf("%s: got %q, %v; want %q", name, evidence, err, want)
		}
		if state := s.State(instance); state != "running" {
			t.Errorf("%s: the instance is %s", name, state)
		}
	}
}

func TestFenceOfAStoppedInstance(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.mustAttach(s.a, 10)
	if err := s.Change("StopInstances", map[string]string{"InstanceId.1": s.instance("node-a")}); err != nil {
		t.Fatal(err)
	}
	evidence, err := s.fence(t.Context(), 10)
	if err != nil || !strings.Contains(evidence, "is stopped, and EC2 shows "+s.id+" detached") {
		t.Errorf("got %q, %v", evidence, err)
	}
	s.mustAttach(s.b, 11)
}

func TestFenceKeepsInstances(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.mustAttach(s.a, 10)
	instance := s.instance("node-a")
	s.mu.Lock()
	s.holds[instance] = true
	s.mu.Unlock()
	s.cfg = func(cfg *ebs.Config) { cfg.KeepInstances = true }
	s.b = s.backend(s.cluster, "node-b")
	for range 2 {
		_, err := s.fence(t.Context(), 10)
		want(t, err, backends.ErrUnavailable, "has not let go of it yet", "it may still write", "stop instance "+instance+" by hand")
	}
	if state := s.State(instance); state != "running" {
		t.Errorf("the instance is %s", state)
	}
	_, err := s.attach(s.b, 11)
	attached, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || attached.Node != "node-a" || attached.Token != 10 {
		t.Errorf("got %v", err)
	}
}

func TestFenceMayNotStop(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	s.mustAttach(s.a, 10)
	s.mu.Lock()
	s.holds[s.instance("node-a")] = true
	s.mu.Unlock()
	s.SetFaults(ec2test.Fault{Action: "StopInstances", Code: "UnauthorizedOperation", Status: 403})
	_, err := s.fence(t.Context(), 10)
	want(t, err, backends.ErrUnavailable, "UnauthorizedOperation", "allow ec2:StopInstances to the role or user of this host")
	// Stopped with no answer: the next call goes on.
	s.SetFaults(ec2test.Fault{Action: "StopInstances", Times: 1, Drop: true})
	_, err = s.fence(t.Context(), 10)
	want(t, err, backends.ErrUnavailable, "does not answer StopInstances")
	if _, err := s.fence(t.Context(), 10); err != nil {
		t.Error(err)
	}
}

// crowd is hosts of one cluster that attach a hundred volumes at once, and another one
// which is to be cut off from its volume meanwhile.
type crowd struct {
	*cloud
	hosts     []*ebs.Backend
	vols      []backends.Volume
	errs      []error
	fence     backends.FenceRequest
	calls     map[string]int // before
	throttled int
	attached  atomic.Int32 // how many volumes are
	meanwhile int32        // how many became so until the fence was done
}

const crowded = 100

func newCrowd(t *testing.T, hosts int, delay time.Duration) *crowd {
	t.Helper()
	c, cluster := &crowd{cloud: newCloud(t, ec2test.Config{Burst: 100, Rate: 10, Delay: delay})}, uuid.NewString()
	c.SetRate(0)
	dead := c.backend(cluster, "dead")
	var work sync.WaitGroup
	c.vols, c.errs = make([]backends.Volume, crowded+1), make([]error, crowded+1)
	for i := range c.vols {
		work.Go(func() {
			c.vols[i], c.errs[i] = dead.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "v", Cluster: cluster, Size: 1 << 30})
		})
	}
	work.Wait()
	last := c.vols[crowded]
	_, err := dead.Attach(t.Context(), backends.AttachRequest{Ref: last.Ref, Volume: last.ID, Token: 1})
	if err := errors.Join(append(c.errs, err)...); err != nil {
		t.Fatal(err)
	}
	c.fence = backends.FenceRequest{Ref: last.Ref, Volume: last.ID, Node: "dead", Identity: c.instance("dead"), Token: 1}
	c.cfg = func(cfg *ebs.Config) { cfg.CallsPerSecond = 0 }
	for i := range hosts {
		node := fmt.Sprint("node-", i)
		c.nodesMu.Lock()
		c.instances[node] = c.AddInstance(zone, 200)
		c.nodesMu.Unlock()
		c.hosts = append(c.hosts, c.backend(cluster, node))
		c.hosts[i].Usual()
	}
	c.calls, c.throttled = c.Calls()
	c.SetRate(10)
	return c
}

// attach returns how often each action was called, and how many calls were throttled. The
// fence is asked for when the first burst of calls is over.
func (c *crowd) attach(t *testing.T) (calls map[string]int, throttled int) {
	t.Helper()
	var work sync.WaitGroup
	started := time.Now()
	for i, vol := range c.vols[:crowded] {
		work.Go(func() {
			_, c.errs[i] = c.hosts[i%len(c.hosts)].Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
			c.attached.Add(1)
		})
	}
	work.Go(func() {
		for made := 0; made < 80 && time.Since(started) < time.Minute; time.Sleep(10 * time.Millisecond) {
			calls, _ := c.Calls()
			made = count(calls) - count(c.calls)
		}
		before := c.attached.Load()
		var evidence string
		evidence, c.errs[crowded] = c.hosts[0].Fence(t.Context(), c.fence)
		if want := c.fence.Identity + " has let go of "; c.errs[crowded] == nil && !strings.HasPrefix(evidence, want) {
			t.Errorf("the fence: got %q, want %q", evidence, want)
		}
		c.meanwhile = c.attached.Load() - before
	})
	work.Wait()
	if err := errors.Join(c.errs...); err != nil {
		t.Fatal(err)
	}
	calls, throttled = c.Calls()
	for action, n := range c.calls {
		calls[action] -= n
	}
	throttled -= c.throttled
	t.Logf("%d attaches at once on %d hosts took %s; of the calls %v %d were throttled; %d were attached during the fence",
		crowded, len(c.hosts), time.Since(started).Round(time.Second), calls, throttled, c.meanwhile)
	return calls, throttled
}

func count(calls map[string]int) (n int) {
	for _, made := range calls {
		n += made
	}
	return n
}

// A hundred mounts at once stay within what EC2 grants, and an idle host asks nothing.
func TestCalls(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as EC2's bucket does")
	}
	t.Parallel()
	c := newCrowd(t, 1, 5*time.Millisecond)
	calls, throttled := c.attach(t)
	if throttled != 0 {
		t.Errorf("%d calls were throttled", throttled)
	}
	if n := calls["DescribeVolumes"]; n > 60 {
		t.Errorf("%d looks for %d attaches", n, crowded)
	}
	if c.meanwhile > crowded*2/3 { // nearly all, if it waits for its turn
		t.Errorf("%d volumes were attached before a host was cut off", c.meanwhile)
	}
	b := c.hosts[0]
	if _, err := b.Attachments(t.Context()); err != nil { // a process asks once
		t.Fatal(err)
	}
	after, _ := c.Calls()
	for range 10 {
		if atts, err := b.Attachments(t.Context()); err != nil || len(atts) != crowded {
			t.Fatalf("got %d, %v", len(atts), err)
		}
	}
	idle, _ := c.Calls()
	if n := idle["DescribeVolumes"] - after["DescribeVolumes"]; n != 0 {
		t.Errorf("ten looks at what is attached made %d calls", n)
	}
}

// EC2's bucket is one for all hosts, none of which knows what the others call. Most of what
// is throttled are the calls that each has under way when the bucket is empty for the first time.
func TestClusterCalls(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as EC2's bucket does")
	}
	t.Parallel()
	for hosts, delay := range map[int]time.Duration{10: time.Second, crowded: 5 * time.Millisecond} {
		t.Run(fmt.Sprint(hosts, " hosts"), func(t *testing.T) {
			t.Parallel()
			calls, throttled := newCrowd(t, hosts, delay).attach(t)
			made := count(calls) - throttled
			if throttled > made*hosts/10 { // a host slows down to a call in two seconds
				t.Errorf("%d calls were throttled, and only %d not", throttled, made)
			}
		})
	}
}

func TestFirstLook(t *testing.T) {
	for range 1000 {
		if wait := ebs.FirstLook(); wait <= 0 || wait > 250*time.Millisecond {
			t.Fatalf("the first look at what has been asked for comes after %s, want 250ms at most", wait)
		}
	}
}

// Ten hosts with 300 volumes on which nothing happens ask EC2 nothing: what the driver asks
// of a backend then, again and again, is what is attached (driver: TestIdleNodesAreQuiet).
func TestIdle(t *testing.T) {
	c, cluster := newCloud(t, ec2test.Config{}), uuid.NewString()
	const nodes, volumes, attached = 10, 300, 200
	hosts := make([]*ebs.Backend, nodes)
	for i := range hosts {
		hosts[i] = c.backend(cluster, fmt.Sprint("node-", i))
	}
	errs := make([]error, nodes)
	var work sync.WaitGroup
	for i, host := range hosts {
		work.Go(func() {
			for n := i; n < volumes; n += nodes {
				vol, err := host.Create(t.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "v", Cluster: cluster, Size: 1 << 30})
				if err == nil && n < attached {
					_, err = host.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 1})
				}
				errs[i] = errors.Join(errs[i], err)
			}
			_, err := host.Attachments(t.Context()) // a process asks once
			errs[i] = errors.Join(errs[i], err)
		})
	}
	work.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	before, _ := c.Calls()
	for range 20 {
		for _, host := range hosts {
			if atts, err := host.Attachments(t.Context()); err != nil || len(atts) != attached/nodes {
				t.Fatalf("got %d, %v", len(atts), err)
			}
		}
	}
	if after, _ := c.Calls(); !maps.Equal(before, after) {
		t.Errorf("calls went from %v to %v", before, after)
	}
}

func TestIdentity(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	metadata := httptest.NewServer(s.Metadata(s.instance("node-a"), region))
	defer metadata.Close()
	t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.URL)
	s.cfg = func(cfg *ebs.Config) { cfg.Region, cfg.Zone, cfg.InstanceID = "", "", "" }
	b := s.backend(s.cluster, "node-a")
	if id, err := b.Identity(t.Context()); err != nil || id != s.instance("node-a") {
		t.Errorf("got %q, %v", id, err)
	}
	s.mustAttach(b, 10)
	metadata.Close()
	_, err := s.backend(s.cluster, "node-a").Identity(t.Context())
	want(t, err, backends.ErrUnavailable, "the instance's metadata service does not say who this host is", "set region, zone and instance_id")
}

func TestSettings(t *testing.T) {
	self := ebs.Self{Node: "n", Cluster: "c"}
	for text, cfg := range map[string]ebs.Config{
		`region "Frankfurt" is none`:                    {Region: "Frankfurt"},
		`zone "us-east-1a" is not in region eu-west-1`:  {Region: "eu-west-1", Zone: "us-east-1a"},
		`instance_id "web-1" is none`:                   {InstanceID: "web-1"},
		"kms_key_id without encrypted":                  {KMSKeyID: "k"},
		`EBS has no volume type "gp9"`:                  {Default: ebs.Profile{Type: "gp9"}},
		"profile fast: a volume of type io2 needs iops": {Profiles: map[string]ebs.Profile{"fast": {Type: "io2"}}},
		"calls_per_second":                              {CallsPerSecond: -1},
	} {
		_, err := ebs.New(cfg, self)
		want(t, err, backends.ErrInvalid, "ebs: ", text)
	}
	if _, err := ebs.New(ebs.Config{}, ebs.Self{}); err == nil {
		t.Error("a backend of no node")
	}
}

func TestKinds(t *testing.T) {
	cfg := ebs.Config{Profiles: map[string]ebs.Profile{"fast": {Type: "gp3", IOPS: 6000}}}
	for _, c := range []struct {
		profile string
		options map[string]string
		gib     int64
		want    ebs.Profile
		err     string
	}{
		{gib: 1, want: ebs.Profile{Type: "gp3"}},
		{profile: "gold", gib: 10, want: ebs.Profile{Type: "io1", IOPS: 300}},
		{profile: "gold", gib: 4, want: ebs.Profile{Type: "io1", IOPS: 120}},
		{profile: "gold", gib: 2000, want: ebs.Profile{Type: "io1", IOPS: 20000}},
		{profile: "gold", gib: 1, err: "at least 4 GiB, not 1"},
		{profile: "silver", gib: 5, want: ebs.Profile{Type: "gp2"}},
		{profile: "bronze", gib: 5, want: ebs.Profile{Type: "standard"}},
		{profile: "bronze", gib: 2000, err: "at most 1024 GiB"},
		{profile: "platinum", gib: 5, err: "use bronze, fast, gold, silver"},
		{profile: "fast", gib: 20, want: ebs.Profile{Type: "gp3", IOPS: 6000}},
		{profile: "gold", options: map[string]string{"volume_type": "gp3", "throughput": "250"}, gib: 5, want: ebs.Profile{Type: "gp3", Throughput: 250}},
		{options: map[string]string{"iops": "4000", "volume_type": "st1"}, gib: 200, err: "iops cannot be chosen for volume type st1"},
		{options: map[string]string{"throughput": "1000"}, gib: 5, err: "1000 MiB/s needs at least 4000 iops"},
		{options: map[string]string{"iops": "50000"}, gib: 5, err: "at most 500 iops for each GiB"},
		{options: map[string]string{"volume_type": "io2"}, gib: 5, err: "needs iops"},
		{options: map[string]string{"volume_type": "floppy"}, gib: 5, err: "use gp3, gp2, io1, io2, st1, sc1 or standard"},
	} {
		got, err := cfg.Kind(c.profile, c.options, c.gib)
		if c.err != "" {
			want(t, err, backends.ErrInvalid, c.err)
		} else if err != nil || got != c.want {
			t.Errorf("%+v: got %+v, %v", c, got, err)
		}
	}
}

// Settings were copied to another host with its instance_id in them. What is attached to
// that instance is none of the other host's, which would pull it from its user.
func TestInstanceIDOfAnotherHost(t *testing.T) {
	s := newStored(t, ec2test.Config{})
	att := s.mustAttach(s.a, 5)
	s.cfg = func(cfg *ebs.Config) { cfg.InstanceID = s.instance("node-a") }
	twin := s.backend(s.cluster, "node-b")
	for range 2 {
		atts, err := twin.Attachments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range atts { // as the driver does with what it does not know
			t.Errorf("node-b shows %+v as attached to it", other)
			if err := twin.Detach(t.Context(), other); err != nil {
				t.Log(err)
			}
		}
	}
	s.wantAttached(s.instance("node-a"), "attached")
	if err := s.a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
}
