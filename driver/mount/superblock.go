package mount

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// The filesystems.
const (
	ext4  = "ext4"
	xfs   = "xfs"
	btrfs = "btrfs"
)

const (
	mib = 1 << 20
	// btrfsSuper is where a btrfs superblock starts, the furthest of the three.
	btrfsSuper = 64 << 10
	// superblocksLen is how much of a device's start parseSuperblock wants.
	superblocksLen = btrfsSuper + 4096
)

// superblock is what the start of a device says about a filesystem on it.
type superblock struct {
	fs   string
	uuid uuid.UUID
	// unfinished: mkfs wrote this and has not ended.
	unfinished bool
	// damaged: the kernel found errors, and the filesystem asks to be checked.
	damaged bool
	// block is the unit of its size, maxPct what xfs wants back when it grows.
	block  int64
	maxPct uint32
	// guardAt is the byte where an ext4 has its multi-mount protection, 0 if it has
	// none, and guardEvery how often the host that has it mounted writes there.
	guardAt    int64
	guardEvery time.Duration
	// size is the filesystem's, in bytes.
	size int64
	// room returns the size the filesystem would have, grown to a device of n bytes.
	room func(n int64) int64
}

func (s *superblock) String() string {
	return fmt.Sprintf("%s with UUID %s", s.fs, s.uuid)
}

// parseSuperblock returns what filesystem of the three is on a device, given the
// first superblocksLen bytes or what there is of them, and nil if none of the three
// is. It recognises, it does not check: that is for the kernel at mount time.
func parseSuperblock(b []byte) *superblock {
	for _, parse := range []func([]byte) *superblock{parseXFS, parseExt4, parseBtrfs} {
		if s := parse(b); s != nil {
			return s
		}
	}
	return nil
}

// parseExt4 follows the layout of struct ext4_super_block, Documentation of the
// kernel, filesystems/ext4/super.rst.
func parseExt4(b []byte) *superblock {
	if len(b) < 2048 {
		return nil
	}
	b = b[1024:2048]
	le := binary.LittleEndian
	const (
		incompatJournalDev = 0x8
		incompat64bit      = 0x80
		incompatMMP        = 0x100
	)
	incompat := le.Uint32(b[0x60:])
	if le.Uint16(b[0x38:]) != 0xef53 || incompat&incompatJournalDev != 0 {
		return nil
	}
	logBlock := le.Uint32(b[0x18:])
	perGroup := int64(le.Uint32(b[0x20:]))
	if logBlock > 6 || perGroup == 0 {
		return nil
	}
	block := int64(1024) << logBlock
	first := int64(le.Uint32(b[0x14:]))
	blocks := uint64(le.Uint32(b[4:]))
	descSize := int64(32)
	if incompat&incompat64bit != 0 {
		blocks |= uint64(le.Uint32(b[0x150:])) << 32
		descSize = max(descSize, int64(le.Uint16(b[0xfe:])))
	}
	if blocks > 1<<46 {
		return nil
	}
	s := &superblock{
		fs:      ext4,
		uuid:    uuid.UUID(b[0x68:0x78]),
		damaged: le.Uint16(b[0x3a:])&2 != 0,
		block:   block,
		size:    int64(blocks) * block,
	}
	if at := le.Uint64(b[0x168:]); incompat&incompatMMP != 0 && at < blocks {
		s.guardAt = int64(at) * block
		s.guardEvery = time.Duration(le.Uint16(b[0x166:])) * time.Second
	}
	inodes := int64(le.Uint32(b[0x28:])) * int64(le.Uint16(b[0x58:]))
	reserved := int64(le.Uint16(b[0xce:]))
	s.room = func(n int64) int64 {
		// The tools round to pages, and leave the last group out when it would hold
		// little more than its own tables: without the same rule here, such a tail
		// would be found ungrown at every mount.
		total := n / max(block, 4096) * max(block, 4096) / block
		groups := (total - first) / perGroup
		rest := (total - first) % perGroup
		descs := (groups*descSize + block - 1) / block
		overhead := 2 + (inodes+block-1)/block + 1 + descs + reserved + 50
		if groups > 0 && rest < overhead {
			total -= rest
		}
		return total * block
	}
	return s
}

// parseXFS follows struct xfs_dsb of the kernel's fs/xfs/libxfs/xfs_format.h.
func parseXFS(b []byte) *superblock {
	if len(b) < 512 || string(b[:4]) != "XFSB" {
		return nil
	}
	be := binary.BigEndian
	block := int64(be.Uint32(b[4:]))
	blocks := be.Uint64(b[8:])
	agBlocks := int64(be.Uint32(b[84:]))
	if block < 512 || block > 1<<16 || blocks > 1<<46 || agBlocks == 0 {
		return nil
	}
	return &superblock{
		fs:         xfs,
		uuid:       uuid.UUID(b[32:48]),
		unfinished: b[126] != 0,
		block:      block,
		maxPct:     uint32(b[127]),
		size:       int64(blocks) * block,
		room: func(n int64) int64 {
			const minAG = 64 // blocks; the kernel leaves a smaller last group out
			total := n / block
			if rest := total % agBlocks; rest < minAG {
				total -= rest
			}
			return total * block
		},
	}
}

// parseBtrfs follows struct btrfs_super_block of the kernel's
// include/uapi/linux/btrfs_tree.h. The size is that of the one device.
func parseBtrfs(b []byte) *superblock {
	if len(b) < superblocksLen {
		return nil
	}
	b = b[btrfsSuper:superblocksLen]
	le := binary.LittleEndian
	magic := b[0x40:0x48]
	// mkfs.btrfs writes its last superblock with the one magic, all before with the other.
	unfinished := bytes.Equal(magic, []byte("!BHRfS_M"))
	if !unfinished && !bytes.Equal(magic, []byte("_BHRfS_M")) {
		return nil
	}
	sector := int64(le.Uint32(b[0x90:]))
	size := le.Uint64(b[0xc9+8:])
	if le.Uint64(b[0x30:]) != btrfsSuper || sector < 512 || sector > 1<<16 || size > 1<<62 {
		return nil
	}
	return &superblock{
		fs:         btrfs,
		uuid:       uuid.UUID(b[0x20:0x30]),
		unfinished: unfinished,
		block:      sector,
		size:       int64(size),
		room:       func(n int64) int64 { return n / sector * sector },
	}
}
