package openstack_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/openstack"
)

// xenGuest is a guest of Xen, and what may be wrong with it. The zero value has nothing.
type xenGuest struct {
	shift int   // how much further the kernel's name is
	wrong int   // how much further than Nova said the hypervisor has put the disk
	more  int64 // sectors, besides the volume's
	open  int   // how many have a disk open that has just come
}

// disk is what the kernel says of a disk which Nova calls device.
func (x xenGuest) disk(device string) (name, attr, text string) {
	place := -1
	for _, letter := range device[len("/dev/xvd"):] {
		place = (place+1)*26 + int(letter-'a')
	}
	place += x.wrong
	number := 202<<8 | place<<4
	if place >= 16 {
		number = 1<<28 | place<<8
	}
	letters := string(rune('a' + (place+x.shift)%26))
	if place+x.shift >= 26 {
		letters = string(rune('a'+(place+x.shift)/26-1)) + letters
	}
	return "xvd" + letters, "device/nodename", fmt.Sprintf("device/vbd/%d", number)
}

// Place implements openstacktest.Xen.
func (c *cloud) Place(server, volume, device string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.places[server+volume] = device
}

// built makes a disk that is no volume, as the server's own.
func (c *cloud) built(server, device string, bytes int64) {
	name, attr, text := xenGuest{}.disk(device)
	made := filepath.Join(c.dir, server, "block", name)
	must(os.MkdirAll(filepath.Join(made, "device"), 0o755))
	for name, text := range map[string]string{"dev": "202:" + name, attr: text, "size": fmt.Sprint(bytes / 512)} {
		must(os.WriteFile(filepath.Join(made, name), []byte(text+"\n"), 0o644))
	}
}

func xenDisks(cfg *openstack.Config) { cfg.XenDisks = true }

func newXen(t *testing.T, cfg config) *rented {
	t.Helper()
	r := newRented(t, cfg)
	r.bus = "xvd"
	for _, node := range []string{"node-a", "node-b"} {
		r.built(r.server(node), "/dev/xvda", 40<<30)
		r.built(r.server(node), "/dev/xvdc", 2<<30)
	}
	r.a, r.b = r.rackspace(r.cluster, "node-a", xenDisks), r.rackspace(r.cluster, "node-b", xenDisks)
	return r
}

func (r *rented) attach(b backends.Backend, token int64) (backends.Attachment, error) {
	return b.Attach(r.t.Context(), backends.AttachRequest{Ref: r.vol.Ref, Volume: r.vol.ID, Token: token})
}

func TestXenPlaces(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]int{
		"/dev/xvda": 0, "/dev/xvdb": 1, "/dev/xvdz": 25, "/dev/xvdaa": 26, "/dev/xvdba": 52,
		"/dev/vdb": -1, "/dev/xvd": -1, "/dev/xvdb1": -1, "xvdb": -1, "": -1, "/dev/xvdaaa": -1, "/dev/xvdB": -1,
	} {
		if got, ok := openstack.PlaceNamed(name); ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: got %d, %v; want %d", name, got, ok, want)
		}
	}
	for number, want := range map[int]int{
		51712: 0, 51728: 1, 51952: 15, 1<<28 | 16<<8: 16, 1<<28 | 26<<8: 26, // Xen's
		768: 0, 832: 1, 5632: 2, 5696: 3, // as IDE
		51713: -1, 1<<28 | 16<<8 | 1: -1, 769: -1, 896: -1, 2048: -1, 0: -1, // a partition, and no such disks
	} {
		if got, ok := openstack.PlaceNumbered(number); ok != (want >= 0) || ok && got != want {
			t.Errorf("%d: got %d, %v; want %d", number, got, ok, want)
		}
	}
}

func TestXenDisks(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		guest  xenGuest
		device string
	}{
		{xenGuest{}, "/dev/xvdb"},
		{xenGuest{shift: 4}, "/dev/xvdf"}, // some kernels do
	} {
		r := newXen(t, config{Delay: time.Millisecond})
		r.xen = x.guest
		att, err := r.attach(r.a, 10)
		if err != nil || att.Device != x.device {
			t.Fatalf("got %+v, %v; want %s", att, err, x.device)
		}
		for range 2 {
			a := r.rackspace(r.cluster, "node-a", xenDisks) // a new process
			if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
				t.Errorf("got %+v, %v; want %+v", atts, err, att)
			}
			before := fmt.Sprint(r.Calls())
			if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || fmt.Sprint(r.Calls()) != before {
				t.Errorf("got %+v, %v, and calls %v, before %v", atts, err, r.Calls(), before)
			}
			if again, err := r.attach(r.rackspace(r.cluster, "node-a", xenDisks), 10); err != nil || again != att {
				t.Errorf("got %+v, %v; want %+v", again, err, att)
			}
		}
		device, err := r.open("node-a", att.Device, true)
		must(err)
		a := r.rackspace(r.cluster, "node-a", xenDisks) // which has asked nothing yet
		want(t, a.Detach(t.Context(), att), backends.ErrInUse, att.Device+" is mounted or open")
		r.wantAttached("in-use", r.server("node-a"))
		must(device.Close())
		if err := a.Detach(t.Context(), att); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(r.dir, r.server("node-a"), "block", filepath.Base(att.Device))); !os.IsNotExist(err) {
			t.Errorf("the device is there: %v", err)
		}
		r.wantAttached("available")
	}
}

// Whatever does not fit, no disk is taken for the volume, which can be detached.
func TestXenDoubts(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]struct {
		guest  xenGuest
		doubt  func(r *rented, node string)
		says   []string
		before bool // it is not even attached
	}{
		"not set": {
			doubt: func(r *rented, _ string) { r.a = r.rackspace(r.cluster, "node-a", nil) },
			says:  []string{"no disk that says it is this one", "this server runs on Xen, whose disks do not say which volume they are, and xen_disks is not set"},
		},
		"another server": {
			doubt: func(r *rented, _ string) {
				openstack.Novas(r.a).Addresses("127.0.0.1", "fe80::1", r.Address(r.server("node-b")))
			},
			says:   []string{"and this host has none of them, so it is another one: check server_id"},
			before: true,
		},
		"a disk was there": {
			doubt: func(r *rented, node string) {
				r.built(node, "/dev/xvdb", 75<<30)
				r.mu.Lock()
				r.hidden[node] = true
				r.mu.Unlock()
			},
			says: []string{"is /dev/xvdb, and there was a disk before it was attached, so xvdb may be another's; nothing was written to it"},
		},
		"another size": {
			guest: xenGuest{more: 8},
			says:  []string{"xvdb, in the place of /dev/xvdb, has 80530640896 bytes, and the volume 80530636800"},
		},
		"in another place": {
			guest: xenGuest{wrong: 2, shift: -2}, // as xvdb, and not the second disk
			says:  []string{"no disk, or more than one, is in the place of /dev/xvdb"},
		},
		"somebody has it": {
			guest: xenGuest{open: 1},
			says:  []string{"seems to be xvdb, as Nova names it /dev/xvdb: /dev/xvdb is mounted or open"},
		},
		"not on Xen": {
			doubt: func(r *rented, _ string) {
				r.bus = "vd"
				r.Do(func(s *server) { s.KVM() })
				r.serial[r.server("node-a")] = "no volume's"
			},
			says: []string{`Nova names it "/dev/vdb", which is no disk of Xen`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newXen(t, config{})
			r.xen = d.guest
			node := r.server("node-a")
			if d.doubt != nil {
				d.doubt(r, node)
			}
			openstack.Novas(r.a).Shown(50 * time.Millisecond)
			att, err := r.attach(r.a, 10)
			class := backends.ErrUnavailable
			if d.guest.open > 0 {
				class = backends.ErrInUse
			}
			want(t, err, class, append(d.says, "attach volume: ")...)
			if att.Device != "" {
				t.Errorf("got %+v", att)
			}
			if d.before {
				r.wantAttached("available")
				return
			}
			r.mu.Lock()
			for _, p := range r.plugs {
				p.open = 0
			}
			r.mu.Unlock()
			atts, err := r.a.Attachments(t.Context())
			if err != nil || len(atts) != 1 || atts[0].Token != 10 || atts[0].Device != "" {
				t.Fatalf("got %+v, %v", atts, err)
			}
			if err := r.a.Detach(t.Context(), atts[0]); err != nil && name != "a disk was there" {
				t.Fatal(err)
			}
			r.wantAttached("available")
		})
	}
}

// A disk that was not seen to come is nobody's, unless it is in use; then it cannot be formatted.
func TestXenNotes(t *testing.T) {
	t.Parallel()
	r := newXen(t, config{})
	att, err := r.attach(r.a, 10)
	must(err)
	note := filepath.Join(r.dir, "run", "node-a", "xen", r.vol.Ref)
	text, err := os.ReadFile(note)
	must(err)
	bare := att
	bare.Device = ""
	for _, lost := range []string{"", "another boot " + string(text), string(text[:len(text)-2])} {
		must(os.WriteFile(note, []byte(lost), 0o600))
		a := r.rackspace(r.cluster, "node-a", xenDisks)
		_, err = r.attach(a, 10)
		want(t, err, backends.ErrUnavailable, "seems to be xvdb, as Nova names it /dev/xvdb: nobody has noted that it was not there before; detach it")
		if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != bare {
			t.Errorf("got %+v, %v; want %+v", atts, err, bare)
		}
	}
	device, err := r.open("node-a", att.Device, true)
	must(err)
	a := r.rackspace(r.cluster, "node-a", xenDisks)
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0] != att {
		t.Errorf("got %+v, %v; want %+v", atts, err, att)
	}
	want(t, a.Detach(t.Context(), att), backends.ErrInUse, "/dev/xvdb is mounted or open")
	must(device.Close())
	if err := a.Detach(t.Context(), bare); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(note); !os.IsNotExist(err) {
		t.Errorf("the note is there: %v", err)
	}
	if again, err := r.attach(a, 11); err != nil || again.Device != att.Device {
		t.Errorf("got %+v, %v", again, err)
	}
}

// A note of an earlier time is worth nothing once the volume is attached anew.
func TestXenNoteOfBefore(t *testing.T) {
	t.Parallel()
	r := newXen(t, config{})
	att, err := r.attach(r.a, 10)
	must(err)
	note := filepath.Join(r.dir, "run", "node-a", "xen", r.vol.Ref)
	text, err := os.ReadFile(note)
	must(err)
	must(r.a.Detach(t.Context(), att))
	must(os.WriteFile(note, text, 0o600)) // as when another host has detached it
	r.mu.Lock()
	r.hidden[r.server("node-a")] = true
	r.mu.Unlock()
	openstack.Novas(r.a).Shown(50 * time.Millisecond)
	_, err = r.attach(r.a, 11)
	want(t, err, backends.ErrUnavailable, "is in the place of /dev/xvdb")
	if _, err := os.Stat(note); !os.IsNotExist(err) {
		t.Errorf("the note is there: %v", err)
	}
	// Nor is one made where it cannot be.
	must(os.WriteFile(filepath.Dir(note)+"-", nil, 0o600))
	b := r.rackspace(r.cluster, "node-a", func(cfg *openstack.Config) { cfg.XenDisks, cfg.RunDir = true, filepath.Dir(note)+"-" })
	att.Token = 11
	must(b.Detach(t.Context(), att))
	r.mu.Lock()
	delete(r.hidden, r.server("node-a"))
	r.mu.Unlock()
	_, err = r.attach(b, 12)
	want(t, err, backends.ErrUnavailable, "note whose disk it is")
}

// A disk that goes while it is looked at is no error.
func TestXenDiskGoes(t *testing.T) {
	t.Parallel()
	r := newXen(t, config{})
	att, err := r.attach(r.a, 10)
	must(err)
	must(os.Remove(filepath.Join(r.dir, r.server("node-a"), "block", "xvdb", "size"))) // as one sees it of such a disk
	a := r.rackspace(r.cluster, "node-a", xenDisks)
	if atts, err := a.Attachments(t.Context()); err != nil || len(atts) != 1 || atts[0].Device != "" {
		t.Errorf("got %+v, %v", atts, err)
	}
	if err := a.Detach(t.Context(), att); err != nil {
		t.Error(err)
	}
	r.wantAttached("available")
}
