package mount

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		fs, options string
		attrs       uint64
		want        string // of the filesystem's own
		err         string
	}{
		{fs: "ext4"},
		{fs: "ext4", options: "defaults, rw,,", want: ""},
		{fs: "ext4", options: "noatime,nodiratime,nodev,nosuid,noexec", attrs: 0x10 | 0x80 | 4 | 2 | 8},
		{fs: "ext4", options: "noatime,strictatime", attrs: 0x20},
		{fs: "ext4", options: "strictatime,noatime", attrs: 0x10},
		{fs: "ext4", options: "noatime,relatime"},
		{fs: "ext4", options: "nodev,nosuid,noexec,nodiratime,dev,suid,exec,diratime"},
		{fs: "ext4", options: "sync,discard,commit=30,data=journal", want: "sync discard commit=30 data=journal"},
		{fs: "ext4", options: "sync,async,dirsync", want: "dirsync"},
		{fs: "xfs", options: "allocsize=1m,prjquota", want: "allocsize=1m prjquota"},
		{fs: "btrfs", options: "compress=zstd:3,discard=async,discard", want: "compress=zstd:3 discard=async discard"},

		{fs: "", err: `invalid filesystem "": use btrfs, ext4, xfs`},
		{fs: "ext4", options: "noatime,bogus=1", err: `invalid mount option "bogus=1": valid for ext4 are acl, async, auto_da_alloc, commit, `},
		{fs: "ext4", options: "noatime=1", err: `invalid mount option "noatime=1": noatime takes no value`},
		{fs: "ext4", options: "commit", err: `invalid mount option "commit": commit needs a value`},
		{fs: "ext4", options: "commit=", err: `invalid mount option "commit=": the value may have letters, digits and . _ : + - only`},
		{fs: "ext4", options: "errors=panic", err: `invalid mount option "errors=panic": errors may be remount-ro`},
		{fs: "xfs", options: "allocsize=/dev/sda", err: "the value may have letters"},
		{fs: "xfs", options: "logbufs=-1", err: "the value may have letters"},
		{fs: "xfs", options: "compress", err: `invalid mount option "compress": valid for xfs are allocsize, async, `},
	} {
		got, err := parseOptions(c.fs, c.options)
		if c.err != "" {
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s %q: got error %v, want %q", c.fs, c.options, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s %q: %v", c.fs, c.options, err)
		}
		var words []string
		for _, o := range got.fs {
			words = append(words, strings.TrimSuffix(o.name+"="+o.value, "="))
		}
		if s := strings.Join(words, " "); got.attrs != c.attrs || s != c.want {
			t.Errorf("%s %q: got %#x %q, want %#x %q", c.fs, c.options, got.attrs, s, c.attrs, c.want)
		}
	}
}

// What would redirect a mount, or break a promise, is never allowed.
func TestOptionsNeverAllowed(t *testing.T) {
	for _, fs := range []string{ext4, xfs, btrfs} {
		for word := range strings.FieldsSeq("ro bind rbind remount move loop loop=/x offset=4 sizelimit=4 private shared slave unbindable " +
			"noload norecovery nouuid nobarrier barrier=0 journal_dev=8 journal_path=/x sb=1 logdev=/x rtdev=/x device=/x " +
			"subvol=x subvolid=5 degraded rescue=all usebackuproot errors=panic errors=continue source=/x abort x-mount.mkdir _netdev user") {
			if CheckOptions(fs, word) == nil {
				t.Errorf("%s: %s is allowed", fs, word)
			}
		}
	}
}

func TestMkfsArgs(t *testing.T) {
	const id = "4a3f1a40-7c0f-4d39-8a53-0f2d9e6c1b7a"
	for _, c := range []struct {
		fs, label, options, want, err string
		guard                         bool
	}{
		{
			fs: "ext4", guard: true, options: "-O ^mmp -E mmp_update_interval=9",
			want: "-q -F -t ext4 -e remount-ro -U " + id + " -E nodiscard,lazy_itable_init=1,lazy_journal_init=1,mmp_update_interval=1,mmp_update_interval=9 -O mmp -O ^mmp /dev/x",
		},
		{fs: "xfs", guard: true, want: "-q -f -K -m uuid=" + id + " /dev/x"},
		{fs: "btrfs", guard: true, want: "-q -f -K -U " + id + " /dev/x"},
		{
			fs: "ext4", label: "db",
			want: "-q -F -t ext4 -e remount-ro -U " + id + " -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 -L db /dev/x",
		},
		{
			fs: "ext4", label: "0123456789abcdefX", options: "-m 0 -E stride=4,stripe_width=8 -b4096",
			want: "-q -F -t ext4 -e remount-ro -U " + id + " -E nodiscard,lazy_itable_init=1,lazy_journal_init=1,stride=4,stripe_width=8 -L 0123456789abcdef -m 0 -b 4096 /dev/x",
		},
		{fs: "xfs", label: "12345678901é", options: "-m reflink=0", want: "-q -f -K -m uuid=" + id + " -L 12345678901 -m reflink=0 /dev/x"},
		{fs: "btrfs", options: "-M --nodesize=4096 --csum xxhash", want: "-q -f -K -U " + id + " -M --nodesize 4096 --csum xxhash /dev/x"},

		{fs: "ext4", options: "-U random", err: `invalid mkfs option "-U": valid for ext4 are -C, -E, -G, -I, -J, -N, -O, -T, -b, -g, -i, -m`},
		{fs: "ext4", options: "-E discard", err: "invalid mkfs option -E discard: valid are stride=, "},
		{fs: "ext4", options: "-E offset=4096", err: "invalid mkfs option -E offset=4096"},
		{fs: "ext4", options: "-E stride", err: "invalid mkfs option -E stride:"},
		{fs: "ext4", options: "-J device=UUID=x", err: "invalid mkfs option -J device=UUID=x: valid are size="},
		{fs: "ext4", options: "-O journal_dev", err: "it would make a journal"},
		{fs: "ext4", options: "-T /dev/sda", err: `"-T": -T needs a value that is no option and no path`},
		{fs: "ext4", options: "-m", err: `"-m": -m needs a value`},
		{fs: "ext4", options: "-b -F", err: "needs a value that is no option"},
		{fs: "ext4", options: "/dev/sda", err: `invalid mkfs option "/dev/sda"`},
		{fs: "ext4", options: "-n", err: `invalid mkfs option "-n"`},
		{fs: "xfs", options: "-d file=1", err: "invalid mkfs option -d file=1"},
		{fs: "xfs", options: "-m uuid=x", err: "invalid mkfs option -m uuid=x"},
		{fs: "xfs", options: "-l logdev=x", err: "invalid mkfs option -l logdev=x"},
		{fs: "btrfs", options: "-M=1", err: "-M takes no value"},
		{fs: "btrfs", options: "--rootdir /etc", err: `invalid mkfs option "--rootdir"`},
	} {
		got, err := mkfsArgs(FormatSpec{Device: "/dev/x", FS: c.fs, UUID: id, Label: c.label, Options: c.options, Guard: c.guard})
		switch {
		case c.err != "":
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s %q: got error %v, want %q", c.fs, c.options, err, c.err)
			}
		case err != nil || strings.Join(got, " ") != c.want:
			t.Errorf("%s %q: got %q, %v, want %q", c.fs, c.options, strings.Join(got, " "), err, c.want)
		}
	}
}

func TestCheckSize(t *testing.T) {
	if err := checkSize(ext4, 4*mib); err != nil {
		t.Error(err)
	}
	got := fmt.Sprint(checkSize(ext4, 4*mib-512))
	if want := "invalid size: ext4 needs at least 4 MiB, the device has 4193792 bytes"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("ext4", "noatime,commit=5,errors=remount-ro")
	f.Add("btrfs", "compress=zstd:3,,discard=async")
	f.Add("xfs", "=,a=b=c, ro")
	f.Fuzz(func(t *testing.T, fs, options string) {
		p, err := parseOptions(fs, options)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v is no ErrInvalid", err)
			}
			return
		}
		for _, o := range p.fs {
			known, ok := fsOptions[fs][o.name]
			if !ok {
				known, ok = generalOptions[o.name]
			}
			if !ok || !known.fs || strings.ContainsAny(o.name+o.value, ",/\x00= \n") || o.hasValue != (o.value != "") {
				t.Fatalf("%q got through as %+v", options, o)
			}
		}
	})
}

func FuzzParseMkfs(f *testing.F) {
	f.Add("ext4", "-m 0 -E stride=4 -b4096")
	f.Add("xfs", "-m crc=1,finobt=1 -d agcount=4")
	f.Add("btrfs", "--csum=xxhash -M")
	f.Fuzz(func(t *testing.T, fs, options string) {
		args, err := mkfsArgs(FormatSpec{Device: "/dev/x", FS: fs, UUID: "u", Options: options})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v is no ErrInvalid", err)
			}
			return
		}
		for i, a := range args[:len(args)-1] {
			if strings.Contains(a, "/") || a == "" || i > 8 && slices.Contains([]string{"-U", "-L", "-n", "-S", "--uuid", "--label"}, a) {
				t.Fatalf("%q got through as %q", options, args)
			}
		}
	})
}
