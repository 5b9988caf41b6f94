package mount

import (
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
)

const goldenID = "4a3f1a40-7c0f-4d39-8a53-0f2d9e6c1b7a"

// made returns the start of a filesystem as its own mkfs makes it.
func made(tb testing.TB, size int64, program string, args ...string) []byte {
	tb.Helper()
	if _, err := exec.LookPath(program); err != nil {
		if slices.Contains(strings.Split(os.Getenv("REQUIRE"), ","), "root") {
			tb.Fatalf("REQUIRE=root: needs %s", program)
		}
		tb.Skipf("needs %s", program)
	}
	path := filepath.Join(tb.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		tb.Fatal(err)
	}
	if out, err := exec.Command(program, append(args, path)...).CombinedOutput(); err != nil {
		tb.Fatalf("%v: %s", err, out)
	}
	b := make([]byte, superblocksLen)
	if _, err := io.ReadFull(f, b); err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestParseSuperblock(t *testing.T) {
	for _, c := range []struct {
		name, fs string
		size     int64
		args     []string
		slack    int64 // what mkfs may leave over
	}{
		{"ext4", "ext4", 64 * mib, []string{"mkfs.ext4", "-q", "-U", goldenID}, 0},
		{"ext4 of an odd size", "ext4", 129*mib + 5*1024, []string{"mkfs.ext4", "-q", "-b", "4096", "-U", goldenID}, 8 * mib},
		{"ext4 without 64bit", "ext4", 64 * mib, []string{"mkfs.ext4", "-q", "-O", "^64bit", "-U", goldenID}, 0},
		{"ext2", "ext4", 64 * mib, []string{"mkfs.ext2", "-q", "-U", goldenID}, 0},
		{"xfs", "xfs", 320 * mib, []string{"mkfs.xfs", "-q", "-m", "uuid=" + goldenID}, 0},
		{"xfs without checksums", "xfs", 320 * mib, []string{"mkfs.xfs", "-q", "-m", "crc=0,uuid=" + goldenID}, 0},
		{"btrfs", "btrfs", 128 * mib, []string{"mkfs.btrfs", "-q", "-U", goldenID}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := parseSuperblock(made(t, c.size, c.args[0], c.args[1:]...))
			if s == nil {
				t.Fatal("not recognised")
			}
			if got, want := s.String(), c.fs+" with UUID "+goldenID; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if s.unfinished || s.damaged {
				t.Errorf("got unfinished %v, damaged %v", s.unfinished, s.damaged)
			}
			if s.size > c.size || s.size < c.size-c.slack {
				t.Errorf("size: got %d, want %d", s.size, c.size)
			}
			if got := s.room(c.size); got > s.size {
				t.Errorf("room on its own device: got %d, want at most its size %d", got, s.size)
			}
			if got, least := s.room(2*c.size), 2*c.size-8*mib; got < least || got > 2*c.size {
				t.Errorf("room on twice the device: got %d, want at least %d", got, least)
			}
		})
	}
}

// generated returns a device's start with the fields of one filesystem.
func generated(fs string) []byte {
	b := make([]byte, superblocksLen)
	id := uuid.MustParse(goldenID)
	le, be := binary.LittleEndian, binary.BigEndian
	switch fs {
	case ext4:
		s := b[1024:]
		le.PutUint16(s[0x38:], 0xef53)
		le.PutUint32(s[0x18:], 2)         // 4 KiB
		le.PutUint32(s[0x20:], 32768)     // blocks a group
		le.PutUint32(s[0x28:], 8192)      // inodes a group
		le.PutUint16(s[0x58:], 256)       // bytes an inode
		le.PutUint32(s[0x60:], 0x80|0x40) // 64bit, extents
		le.PutUint16(s[0xfe:], 64)
		le.PutUint32(s[4:], 1)
		le.PutUint32(s[0x150:], 1) // 2^32 + 1 blocks
		le.PutUint16(s[0x3a:], 3)  // with errors
		copy(s[0x68:], id[:])
	case xfs:
		copy(b, "XFSB")
		be.PutUint32(b[4:], 4096)
		be.PutUint64(b[8:], 1000)
		be.PutUint32(b[84:], 250)
		copy(b[32:], id[:])
		b[126] = 1
		b[127] = 25
	case btrfs:
		s := b[btrfsSuper:]
		copy(s[0x40:], "!BHRfS_M")
		copy(s[0x20:], id[:])
		le.PutUint64(s[0x30:], btrfsSuper)
		le.PutUint32(s[0x90:], 4096)
		le.PutUint64(s[0xc9+8:], 128*mib)
	}
	return b
}

func TestParseSuperblockFields(t *testing.T) {
	s := parseSuperblock(generated(ext4))
	if s == nil || !s.damaged || s.unfinished || s.size != (1<<32+1)*4096 {
		t.Errorf("ext4: got %+v", s)
	}
	s = parseSuperblock(generated(xfs))
	if s == nil || !s.unfinished || s.maxPct != 25 || s.size != 4096000 {
		t.Fatalf("xfs: got %+v", s)
	}
	for device, want := range map[int64]int64{1000 * 4096: 1000, 1063 * 4096: 1000, 1064 * 4096: 1064, 1250*4096 + 4095: 1250} {
		if got := s.room(device) / 4096; got != want {
			t.Errorf("xfs: room on %d blocks: got %d, want %d", device/4096, got, want)
		}
	}
	s = parseSuperblock(generated(btrfs))
	if s == nil || !s.unfinished || s.size != 128*mib || s.room(128*mib+4095) != 128*mib {
		t.Errorf("btrfs: got %+v", s)
	}
	b := generated(ext4)
	binary.LittleEndian.PutUint32(b[1024+0x60:], 0x8)
	for name, b := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, superblocksLen), "an external journal": b, "short": generated(ext4)[:1100],
		"btrfs elsewhere": generated(btrfs)[:superblocksLen-1],
	} {
		if s := parseSuperblock(b); s != nil {
			t.Errorf("%s: got %s", name, s)
		}
	}
}

func FuzzParseSuperblock(f *testing.F) {
	for _, fs := range []string{ext4, xfs, btrfs} {
		f.Add(generated(fs)[:2048], generated(fs)[btrfsSuper:][:256], int64(1<<30))
	}
	f.Fuzz(func(t *testing.T, start, second []byte, device int64) {
		b := make([]byte, superblocksLen)
		copy(b, start)
		copy(b[btrfsSuper:], second)
		s := parseSuperblock(b)
		if s == nil || device < 0 {
			return
		}
		if s.size < 0 {
			t.Errorf("size %d", s.size)
		}
		if got := s.room(device); got < 0 || got > device {
			t.Errorf("room on %d bytes: %d", device, got)
		}
		_ = s.String()
	})
}
