package vm_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/ebs"
	"github.com/flocker-plugin/flocker/backends/ebs/ec2test"
)

const (
	region, zone = "us-east-1", "us-east-1a"
	key          = "AKIAEXAMPLE"
	// ebsModel is what Amazon documents that its disks say they are.
	ebsModel = "Amazon Elastic Block Store"
)

// cloud is an imitation of EC2 with two instances. One is a machine, whose slots the disks of
// attached volumes are plugged into; the other, the next owner, is this host, and reads the
// files that the disks are made of.
type cloud struct {
	*testing.T
	*ec2test.Server
	*machine
	dir       string
	cluster   string
	instance  string
	elsewhere *ebs.Backend

	asked chan string // volumes that are to be plugged in

	mu    sync.Mutex
	disks map[string]*disk // that are plugged in, by volume
	pulls map[string]bool
}

// volume is one of a test.
type volume struct {
	backends.Volume
	id     string // EC2's
	serial string
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	for name, value := range credentials {
		t.Setenv(name, value)
	}
	c := &cloud{
		T: t, dir: t.TempDir(), cluster: uuid.NewString(), asked: make(chan string, 16), disks: map[string]*disk{}, pulls: map[string]bool{},
		machine: boot(t, config{modules: []string{"nvme"}, slots: 4}),
	}
	c.Server = ec2test.New(ec2test.Config{Key: key, Delay: 50 * time.Millisecond}, c)
	t.Cleanup(c.Close)
	c.instance = c.AddInstance(zone, 27)
	var err error
	c.elsewhere, err = ebs.New(ebs.Config{Region: region, Zone: zone, InstanceID: c.AddInstance(zone, 27), Endpoint: c.URL}, ebs.Self{Node: "b", Cluster: c.cluster})
	if err != nil {
		t.Fatal(err)
	}
	c.plugin()
	return c
}

var credentials = map[string]string{
	"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
	"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}

// plugin starts the backend in the machine, or starts it anew.
func (c *cloud) plugin() {
	c.Helper()
	_, err := ask[None](c.machine, "EBS", EBSOrder{
		Config: ebs.Config{
			Region: region, Zone: zone, InstanceID: c.instance,
			Endpoint: strings.Replace(c.URL, "127.0.0.1", "10.0.2.2", 1),
		},
		Self: ebs.Self{Node: "a", Cluster: c.cluster}, Env: credentials,
	})
	if err != nil {
		c.Fatal(err)
	}
}

// Plug implements ec2test.Guest: the test does it.
func (c *cloud) Plug(_, volume, _ string, _ int) { c.asked <- volume }

// Holds implements ec2test.Guest: the machine is asked to let go of the disk, and has it
// until it does.
func (c *cloud) Holds(_, volume string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disks[volume] == nil {
		return false
	}
	if !c.pulls[volume] {
		c.pulls[volume] = true
		if err := c.pull(volume); err != nil {
			c.Error(err)
		}
	}
	gone, err := c.pulled(volume)
	if err != nil {
		c.Error(err)
	}
	if gone {
		delete(c.disks, volume)
		delete(c.pulls, volume)
	}
	return !gone
}

// Unplug implements ec2test.Guest: it has let go.
func (c *cloud) Unplug(string, string) {}

// Obeys implements ec2test.Guest.
func (c *cloud) Obeys(string) bool { return true }

func (c *cloud) create() volume {
	c.Helper()
	vol, err := c.elsewhere.Create(c.Context(), backends.CreateRequest{ID: uuid.NewString(), Name: "db", Cluster: c.cluster, Size: 1 << 30})
	if err != nil {
		c.Fatal(err)
	}
	id := strings.TrimPrefix(vol.Ref, region+"/")
	if err := os.WriteFile(c.file(id), nil, 0o600); err != nil {
		c.Fatal(err)
	}
	if err := os.Truncate(c.file(id), vol.Size); err != nil {
		c.Fatal(err)
	}
	return volume{vol, id, strings.Replace(id, "-", "", 1)}
}

func (c *cloud) file(id string) string { return filepath.Join(c.dir, id) }

// insert plugs disks of volumes in, which EC2 has attached. change makes them others than
// EBS's own.
func (c *cloud) insert(change func(d *disk), vols ...volume) {
	c.Helper()
	var disks []disk
	c.mu.Lock()
	for _, v := range vols {
		d := &disk{id: v.id, file: c.file(v.id), serial: v.serial, model: ebsModel, slot: 1}
		for d.slot = 1; c.taken(d.slot); {
			d.slot++
		}
		if change != nil {
			change(d)
		}
		c.disks[v.id] = d
		disks = append(disks, *d)
	}
	c.mu.Unlock()
	if err := c.plug(disks...); err != nil {
		c.Fatal(err)
	}
}

// taken says whether a slot is. c.mu is held.
func (c *cloud) taken(slot int) bool {
	for _, d := range c.disks {
		if d.slot == slot {
			return true
		}
	}
	return false
}

// await returns when EC2 has attached volumes, in whatever order.
func (c *cloud) await(vols ...volume) {
	c.Helper()
	for range vols {
		select {
		case id := <-c.asked:
			if !slices.ContainsFunc(vols, func(v volume) bool { return v.id == id }) {
				c.Fatalf("EC2 has attached %s", id)
			}
		case <-time.After(callLimit):
			c.Fatal("nobody asks for the volume to be attached")
		}
	}
}

// attaching is an Attach in the machine that is under way.
type attaching struct {
	done chan struct{}
	att  backends.Attachment
	err  error
	took time.Duration
}

func (c *cloud) attach(v volume, token int64) *attaching {
	a := &attaching{done: make(chan struct{})}
	began := time.Now()
	go func() {
		defer close(a.done)
		a.att, a.err = ask[backends.Attachment](c.machine, "Attach", backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: token})
		a.took = time.Since(began)
	}()
	return a
}

// attached demands that it comes to a device of the volume.
func (c *cloud) attached(a *attaching, v volume, token int64) backends.Attachment {
	c.Helper()
	if <-a.done; a.err != nil {
		c.Fatal(a.err)
	}
	want := backends.Attachment{Ref: v.Ref, Volume: v.ID, Node: "a", Token: token, Device: a.att.Device}
	if a.att != want {
		c.Errorf("got %+v, want %+v", a.att, want)
	}
	serial, err := ask[string](c.machine, "File", "/sys/block/"+filepath.Base(a.att.Device)+"/device/serial")
	if err != nil || serial != v.serial {
		c.Fatalf("%s has the serial number %q, %v; want %s", a.att.Device, serial, err, v.serial)
	}
	return a.att
}

func (c *cloud) mustAttach(v volume, token int64) backends.Attachment {
	c.Helper()
	a := c.attach(v, token)
	c.await(v)
	c.insert(nil, v)
	return c.attached(a, v, token)
}

// mustDetach demands that nothing is left.
func (c *cloud) mustDetach(att backends.Attachment, v volume) {
	c.Helper()
	if err := c.detach(att); err != nil {
		c.Fatal(err)
	}
	if on, state := c.Attached(v.id); on != "" {
		c.Errorf("EC2 has it attached to %s (%s)", on, state)
	}
	c.attachments()
	if names, err := ask[[]string](c.machine, "List", "/dev"); err != nil || slices.Contains(names, filepath.Base(att.Device)) {
		c.Errorf("%s is there still: %v", att.Device, err)
	}
}

func TestEBS(t *testing.T) {
	needVM(t)
	c := newCloud(t)
	for name, test := range map[string]func(c *cloud){
		"found":         testFound,
		"late":          testLate,
		"not found":     testNotFound,
		"open":          testOpen,
		"two":           testTwo,
		"behind":        testBehindOurBack,
		"fenced writer": testFencedWriter,
	} {
		t.Run(name, func(t *testing.T) {
			usual := c.T
			c.T, c.machine.t = t, t
			defer func() { c.T, c.machine.t = usual, usual }()
			test(c)
			if len(c.disks) > 0 || len(c.asked) > 0 {
				t.Errorf("%d disks are left, and %d are asked for", len(c.disks), len(c.asked))
			}
		})
	}
}

// testFound: a disk with the right serial number is the volume; a new process knows it.
func testFound(c *cloud) {
	v := c.create()
	att := c.mustAttach(v, 10)
	for file, want := range map[string]string{"device/model": ebsModel, "size": fmt.Sprint(v.Size / 512)} {
		if got, err := ask[string](c.machine, "File", "/sys/block/"+filepath.Base(att.Device)+"/"+file); err != nil || got != want {
			c.Errorf("%s is %q, %v; want %q", file, got, err, want)
		}
	}
	c.write(att.Device, v.Volume)
	inFile(c.T, c.file(v.id), v.Volume)
	c.plugin()
	c.attachments(att)
	again, err := ask[backends.Attachment](c.machine, "Attach", backends.AttachRequest{Ref: v.Ref, Volume: v.ID, Token: 10})
	if err != nil || again != att {
		c.Errorf("attached again: %+v, %v; want %+v", again, err, att)
	}
	c.mustDetach(att, v)
	inFile(c.T, c.file(v.id), v.Volume)
	// Another volume gets the device's name, and none of its data.
	other := c.create()
	att = c.mustAttach(other, 11)
	c.attachments(att)
	c.write(att.Device, other.Volume)
	c.mustDetach(att, other)
	inFile(c.T, c.file(v.id), v.Volume)
	inFile(c.T, c.file(other.id), other.Volume)
	att = c.mustAttach(v, 12)
	c.reads(att.Device, v.Volume)
	c.mustDetach(att, v)
}

// testLate: EC2 says attached, and the disk comes later.
func testLate(c *cloud) {
	v := c.create()
	a := c.attach(v, 10)
	c.await(v)
	time.Sleep(8 * time.Second)
	select {
	case <-a.done:
		c.Fatalf("without a disk: %+v, %v", a.att, a.err)
	default:
	}
	c.insert(nil, v)
	began := time.Now()
	att := c.attached(a, v, 10)
	c.Logf("the disk was found %s after it was plugged in", time.Since(began).Round(time.Millisecond))
	c.mustDetach(att, v)
}

// testNotFound: disks that are not the volume are not taken for it, and left alone.
func testNotFound(c *cloud) {
	cases := map[string]func(d *disk){
		"no disk":                             nil,
		"the serial number of another one":    func(d *disk) { d.serial = "vol0123456789abcdef0" },
		"a serial number that is none of EBS": func(d *disk) { d.serial = "AWS6AAE1F2D3C4B5A697" },
		// Such as an instance store, or a disk of another kind of virtual machine.
		"another model": func(d *disk) { d.model = qemuModel },
	}
	vols, under := map[string]volume{}, map[string]*attaching{}
	for name, change := range cases {
		v := c.create()
		vols[name], under[name] = v, c.attach(v, 10)
		if c.await(v); change != nil {
			c.insert(change, v)
		}
	}
	for name, a := range under {
		v := vols[name]
		<-a.done
		wantSaid(c.T, a.err, "attach volume: EC2 says that "+v.id+" is attached to this instance as /dev/xvd",
			"but within 30s the kernel has shown no device that says it is "+v.id+"; look at `lsblk -o NAME,SERIAL` and the kernel's log: unavailable")
		if a.took > time.Minute {
			c.Errorf("%s: it took %s", name, a.took)
		}
		if err := c.detach(backends.Attachment{Ref: v.Ref, Volume: v.ID, Node: "a", Token: 10}); err != nil {
			c.Errorf("%s: %v", name, err)
		}
		if on, state := c.Attached(v.id); on != "" {
			c.Errorf("%s: EC2 has it attached to %s (%s)", name, on, state)
		}
		var stat syscall.Stat_t
		if err := syscall.Stat(c.file(v.id), &stat); err != nil || stat.Blocks != 0 {
			c.Errorf("%s: something was written to the disk, %d blocks: %v", name, stat.Blocks, err)
		}
	}
	for _, v := range vols {
		att := c.mustAttach(v, 11)
		c.mustDetach(att, v)
	}
}

// testOpen: what somebody has open is not detached, and nobody is asked to.
func testOpen(c *cloud) {
	v := c.create()
	att := c.mustAttach(v, 10)
	for mounted, says := range map[bool]string{
		false: "process 1 has " + att.Device + " open: in use", true: att.Device + " is mounted or open: in use",
	} {
		file := must[int](c.machine, "Open", Opening{att.Device, mounted})
		wantSaid(c.T, c.detach(att), "detach volume "+v.ID+": "+says)
		if on, state := c.Attached(v.id); on != c.instance || state != "attached" {
			c.Errorf("EC2 has it attached to %q (%s)", on, state)
		}
		must[None](c.machine, "Close", file)
	}
	c.attachments(att)
	c.write(att.Device, v.Volume)
	c.mustDetach(att, v)
	inFile(c.T, c.file(v.id), v.Volume)
}

// testTwo: two disks come at the same moment, in the other order than they were asked for.
func testTwo(c *cloud) {
	v, w := c.create(), c.create()
	a := c.attach(v, 10)
	c.await(v)
	b := c.attach(w, 20)
	c.await(w)
	c.insert(nil, w, v)
	av, aw := c.attached(a, v, 10), c.attached(b, w, 20)
	c.attachments(av, aw)
	c.write(av.Device, v.Volume)
	c.write(aw.Device, w.Volume)
	inFile(c.T, c.file(v.id), v.Volume)
	inFile(c.T, c.file(w.id), w.Volume)
	if err := c.detach(av); err != nil {
		c.Error(err)
	}
	c.attachments(aw)
	c.reads(aw.Device, w.Volume)
	c.mustDetach(aw, w)
}

// testBehindOurBack: an administrator takes the disk away, while nobody has it open, and
// while somebody has.
func testBehindOurBack(c *cloud) {
	v := c.create()
	for i, open := range []bool{false, true} {
		token := int64(10 + 10*i)
		att := c.mustAttach(v, token)
		c.write(att.Device, v.Volume)
		if open {
			must[int](c.machine, "Open", Opening{Path: att.Device})
		}
		if err := c.Change("DetachVolume", map[string]string{"VolumeId": v.id}); err != nil {
			c.Fatal(err)
		}
		c.until("the volume is detached", func() bool { on, _ := c.Attached(v.id); return on == "" })
		c.attachments()
		if err := c.detach(att); err != nil {
			c.Errorf("what is gone is detached: %v", err)
		}
		att = c.mustAttach(v, token+1)
		c.reads(att.Device, v.Volume)
		c.mustDetach(att, v)
	}
}

// testFencedWriter: the machine is cut off from a volume that it writes to. Its writes fail, and
// whoever has the volume next finds all that was acknowledged, and nothing that comes later.
func testFencedWriter(c *cloud) {
	v := c.create()
	att := c.mustAttach(v, 10)
	failed := c.hammer(att.Device)
	evidence, err := c.elsewhere.Fence(c.Context(), backends.FenceRequest{Ref: v.Ref, Volume: v.ID, Node: "a", Identity: c.instance, Token: 10})
	if want := c.instance + " has let go of " + v.id + ", which EC2 shows detached"; err != nil || evidence != want {
		c.Fatalf("got %q, %v; want %q", evidence, err, want)
	}
	taken := readAt(c.T, c.file(v.id), 0, records*record)
	select {
	case text := <-failed:
		// A device that is gone has no size, which the kernel may notice first.
		if text != "write "+att.Device+": no space left on device" && !strings.HasSuffix(text, " "+att.Device+": input/output error") {
			c.Errorf("the writer was told %q", text)
		}
	case <-time.After(callLimit):
		c.Fatal("the writer goes on, or hangs")
	}
	last := c.acknowledged()
	c.Logf("%d records were acknowledged", last)
	kept(c.T, taken, last)
	if later := readAt(c.T, c.file(v.id), 0, records*record); !bytes.Equal(taken, later) {
		c.Error("something was written after the fence")
	}
	c.attachments()
	att = c.mustAttach(v, 11)
	c.mustDetach(att, v)
}
