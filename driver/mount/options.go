package mount

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// mountOption is one option a user may give. The list leaves out whatever would
// mount something else or somewhere else (bind, subvol, device, sb), skip the
// journal (norecovery), give up what an fsync promises (nobarrier), let the user
// stop the machine (errors=panic) or serve a volume read-only.
type mountOption struct {
	attr  uint64   // a flag of the mount itself, with what it replaces in clear
	fs    bool     // passed on to the filesystem
	arg   arg      // whether it has a value
	oneOf []string // the values it may have; nil is any word
}

type arg int

const (
	argNone arg = iota
	argOptional
	argNeeded
)

// The MOUNT_ATTR_ flags of fsmount(2); written out because the package's tables are
// tested on every system.
const (
	attrNosuid      = 0x2
	attrNodev       = 0x4
	attrNoexec      = 0x8
	attrNoatime     = 0x10
	attrStrictatime = 0x20
	attrNodiratime  = 0x80
	attrNosymfollow = 0x200000
)

var generalOptions = map[string]mountOption{
	"defaults": {}, "rw": {}, "suid": {}, "dev": {}, "exec": {}, "relatime": {}, "async": {}, "diratime": {},
	"nosuid": {attr: attrNosuid}, "nodev": {attr: attrNodev}, "noexec": {attr: attrNoexec},
	"noatime": {attr: attrNoatime}, "strictatime": {attr: attrStrictatime},
	"nodiratime": {attr: attrNodiratime}, "nosymfollow": {attr: attrNosymfollow},
	"sync": {fs: true}, "dirsync": {fs: true}, "lazytime": {fs: true},
}

var fsOptions = map[string]map[string]mountOption{
	ext4: merge(plain("discard nodiscard acl noacl user_xattr nouser_xattr delalloc nodelalloc "+
		"auto_da_alloc noauto_da_alloc journal_checksum noinit_itable dioread_lock dioread_nolock "+
		"i_version quota usrquota grpquota prjquota noquota"),
		valued("commit stripe inode_readahead_blks max_batch_time min_batch_time max_dir_size_kb"),
		map[string]mountOption{
			"data":        {fs: true, arg: argNeeded, oneOf: []string{"journal", "ordered", "writeback"}},
			"errors":      {fs: true, arg: argNeeded, oneOf: []string{"remount-ro"}},
			"init_itable": {fs: true, arg: argOptional},
		}),
	xfs: merge(plain("discard nodiscard inode32 inode64 largeio nolargeio noalign swalloc filestreams "+
		"quota noquota uquota usrquota gquota grpquota pquota prjquota"),
		valued("allocsize logbufs logbsize sunit swidth")),
	btrfs: merge(plain("acl noacl autodefrag noautodefrag datacow nodatacow datasum nodatasum nodiscard "+
		"ssd nossd ssd_spread nossd_spread flushoncommit noflushoncommit enospc_debug noenospc_debug"),
		valued("commit thread_pool max_inline metadata_ratio compress-force"),
		map[string]mountOption{
			"compress":    {fs: true, arg: argOptional},
			"discard":     {fs: true, arg: argOptional, oneOf: []string{"async", "sync"}},
			"space_cache": {fs: true, arg: argNeeded, oneOf: []string{"v2"}},
		}),
}

func plain(names string) map[string]mountOption { return options(names, mountOption{fs: true}) }
func valued(names string) map[string]mountOption {
	return options(names, mountOption{fs: true, arg: argNeeded})
}

func options(names string, o mountOption) map[string]mountOption {
	m := map[string]mountOption{}
	for n := range strings.FieldsSeq(names) {
		m[n] = o
	}
	return m
}

func merge(ms ...map[string]mountOption) map[string]mountOption {
	all := map[string]mountOption{}
	for _, m := range ms {
		maps.Copy(all, m)
	}
	return all
}

// parsedOptions are mount options as the kernel wants them.
type parsedOptions struct {
	attrs uint64 // MOUNT_ATTR_ flags for fsmount
	fs    []fsOption
}

type fsOption struct {
	name, value string
	hasValue    bool
}

// CheckFS returns an ErrInvalid that lists the filesystems unless fs is one.
func CheckFS(fs string) error {
	if _, ok := fsOptions[fs]; !ok {
		return fmt.Errorf("%w filesystem %q: use %s", ErrInvalid, fs, strings.Join(slices.Sorted(maps.Keys(fsOptions)), ", "))
	}
	return nil
}

// CheckOptions returns an ErrInvalid that lists what is valid unless options, comma
// separated, may be used to mount fs.
func CheckOptions(fs, options string) error {
	_, err := parseOptions(fs, options)
	return err
}

func parseOptions(fs, options string) (parsedOptions, error) {
	var p parsedOptions
	if err := CheckFS(fs); err != nil {
		return p, err
	}
	for word := range strings.SplitSeq(options, ",") {
		word = strings.TrimSpace(word)
		if word == "" {
			continue
		}
		name, value, hasValue := strings.Cut(word, "=")
		o, ok := generalOptions[name]
		if !ok {
			o, ok = fsOptions[fs][name]
		}
		if !ok {
			valid := slices.Sorted(maps.Keys(merge(generalOptions, fsOptions[fs])))
			return p, fmt.Errorf("%w mount option %q: valid for %s are %s", ErrInvalid, word, fs, strings.Join(valid, ", "))
		}
		switch {
		case o.arg == argNone && hasValue:
			return p, fmt.Errorf("%w mount option %q: %s takes no value", ErrInvalid, word, name)
		case o.arg == argNeeded && !hasValue:
			return p, fmt.Errorf("%w mount option %q: %s needs a value", ErrInvalid, word, name)
		case hasValue && o.oneOf != nil && !slices.Contains(o.oneOf, value):
			return p, fmt.Errorf("%w mount option %q: %s may be %s", ErrInvalid, word, name, strings.Join(o.oneOf, ", "))
		case hasValue && !isWord(value):
			return p, fmt.Errorf("%w mount option %q: the value may have letters, digits and . _ : + - only", ErrInvalid, word)
		}
		switch name {
		case "noatime":
			p.attrs &^= attrStrictatime
		case "strictatime":
			p.attrs &^= attrNoatime
		case "relatime", "defaults":
			p.attrs &^= attrNoatime | attrStrictatime
		case "suid":
			p.attrs &^= attrNosuid
		case "dev":
			p.attrs &^= attrNodev
		case "exec":
			p.attrs &^= attrNoexec
		case "diratime":
			p.attrs &^= attrNodiratime
		case "async":
			p.fs = slices.DeleteFunc(p.fs, func(o fsOption) bool { return o.name == "sync" })
		}
		p.attrs |= o.attr
		if o.fs {
			p.fs = append(p.fs, fsOption{name, value, hasValue})
		}
	}
	return p, nil
}

func isWord(s string) bool {
	return s != "" && s[0] != '-' && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._:+-", r)
	}) < 0
}

// mkfsOption is one option of a mkfs that a user may give. The list leaves out what
// would change the UUID, label or size, name a device or a file, throw away what
// another step needs (discard), or make no filesystem.
type mkfsOption struct {
	flag bool // has no value
	// subs are the key[=value] words a comma separated value may have; nil is a
	// value without any such rule. An entry ending in = must have a value.
	subs []string
}

var mkfsOptions = map[string]map[string]mkfsOption{
	ext4: {
		"-b": {}, "-C": {}, "-g": {}, "-G": {}, "-i": {}, "-I": {}, "-m": {}, "-N": {}, "-T": {}, "-O": {},
		"-E": {subs: strings.Fields("stride= stripe_width= stripe-width= resize= lazy_itable_init lazy_journal_init " +
			"packed_meta_blocks num_backup_sb= mmp_update_interval= quotatype= orphan_file_size= nodiscard")},
		"-J": {subs: strings.Fields("size= fast_commit_size= location=")},
	},
	xfs: {
		"-b": {subs: strings.Fields("size= log=")},
		"-d": {subs: strings.Fields("agcount= agsize= su= sw= sunit= swidth= noalign cowextsize= extszinherit= concurrency=")},
		"-i": {subs: strings.Fields("size= log= perblock= maxpct= align attr= projid32bit sparse nrext64")},
		"-l": {subs: strings.Fields("size= version= su= sunit= lazy-count concurrency= internal sectsize=")},
		"-m": {subs: strings.Fields("crc= finobt= reflink= bigtime= inobtcount= rmapbt= autofsck=")},
		"-n": {subs: strings.Fields("size= log= version= ftype=")},
		"-s": {subs: strings.Fields("size= log=")},
	},
	btrfs: {
		"-n": {}, "--nodesize": {}, "-s": {}, "--sectorsize": {}, "-m": {}, "--metadata": {}, "-d": {}, "--data": {},
		"-O": {}, "--features": {}, "-R": {}, "--runtime-features": {}, "--csum": {}, "--checksum": {},
		"-M": {flag: true}, "--mixed": {flag: true},
	},
}

// CheckMkfs returns an ErrInvalid that lists what is valid unless options, split on
// blanks, may be used to make a filesystem of kind fs.
func CheckMkfs(fs, options string) error {
	_, err := parseMkfs(fs, options)
	return err
}

// parseMkfs returns options as name and value pairs.
func parseMkfs(fs, options string) ([][2]string, error) {
	if err := CheckFS(fs); err != nil {
		return nil, err
	}
	known := mkfsOptions[fs]
	var parsed [][2]string
	words := strings.Fields(options)
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		name, value, hasValue := word, "", false
		if strings.HasPrefix(word, "--") {
			name, value, hasValue = strings.Cut(word, "=")
		} else if len(word) > 2 && word[0] == '-' {
			name, value, hasValue = word[:2], word[2:], true
		}
		o, ok := known[name]
		if !ok {
			return nil, fmt.Errorf("%w mkfs option %q: valid for %s are %s",
				ErrInvalid, word, fs, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		switch {
		case o.flag && hasValue:
			return nil, fmt.Errorf("%w mkfs option %q: %s takes no value", ErrInvalid, word, name)
		case !o.flag && !hasValue && len(words) > 0:
			value, words = words[0], words[1:]
		}
		if !o.flag && (value == "" || value[0] == '-' || strings.Contains(value, "/")) {
			return nil, fmt.Errorf("%w mkfs option %q: %s needs a value that is no option and no path", ErrInvalid, word, name)
		}
		if fs == ext4 && name == "-O" && slices.Contains(strings.Split(value, ","), "journal_dev") {
			return nil, fmt.Errorf("%w mkfs option %q: it would make a journal, not a filesystem", ErrInvalid, word)
		}
		if o.subs != nil {
			for sub := range strings.SplitSeq(value, ",") {
				key, _, hasValue := strings.Cut(sub, "=")
				if !slices.Contains(o.subs, key+"=") && !slices.Contains(o.subs, key) || !hasValue && slices.Contains(o.subs, key+"=") {
					return nil, fmt.Errorf("%w mkfs option %s %s: valid are %s", ErrInvalid, name, sub, strings.Join(o.subs, ", "))
				}
			}
		}
		parsed = append(parsed, [2]string{name, value})
	}
	return parsed, nil
}

// mkfsTools are the programs and what Debian calls the packages they are in.
var mkfsTools = map[string]struct{ program, pkg string }{
	ext4:  {"mkfs.ext4", "e2fsprogs"},
	xfs:   {"mkfs.xfs", "xfsprogs"},
	btrfs: {"mkfs.btrfs", "btrfs-progs"},
}

// laterTools are the further programs that a filesystem needs in its life.
var laterTools = map[string][]string{ext4: {"e2fsck", "resize2fs", "tune2fs"}}

var maxLabel = map[string]int{ext4: 16, xfs: 12, btrfs: 255} // bytes

// mkfsArgs returns the words for mkfs, without the program.
//
// Nothing is discarded: the device is blank by record, and the marks that let an
// interrupted Format be told from somebody's data have to survive mkfs.
func mkfsArgs(spec FormatSpec) ([]string, error) {
	opts, err := parseMkfs(spec.FS, spec.Options)
	if err != nil {
		return nil, err
	}
	var args []string
	switch spec.FS {
	case ext4:
		extended := []string{"nodiscard", "lazy_itable_init=1", "lazy_journal_init=1"}
		if spec.Guard {
			extended = append(extended, "mmp_update_interval=1")
		}
		opts = slices.DeleteFunc(opts, func(o [2]string) bool { // mkfs.ext4 obeys the last -E only
			if o[0] == "-E" {
				extended = append(extended, o[1])
			}
			return o[0] == "-E"
		})
		args = []string{"-q", "-F", "-t", "ext4", "-e", "remount-ro", "-U", spec.UUID, "-E", strings.Join(extended, ",")}
		if spec.Guard { // before the user's own -O
			args = append(args, "-O", "mmp")
		}
	case xfs:
		args = []string{"-q", "-f", "-K", "-m", "uuid=" + spec.UUID}
	case btrfs:
		args = []string{"-q", "-f", "-K", "-U", spec.UUID}
	}
	if label := shorten(spec.Label, maxLabel[spec.FS]); label != "" {
		args = append(args, "-L", label)
	}
	for _, o := range opts {
		args = append(args, o[0])
		if o[1] != "" {
			args = append(args, o[1])
		}
	}
	return append(args, spec.Device), nil
}

// shorten cuts s to n bytes without cutting a character.
func shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// MinSize is the smallest device, in bytes, a filesystem can be made on: mkfs.xfs
// and mkfs.btrfs refuse smaller ones.
func MinSize(fs string) int64 {
	switch fs {
	case ext4:
		return 4 * mib
	case xfs:
		return 300 * mib
	case btrfs:
		return 109 * mib
	}
	return 0
}

func checkSize(fs string, size int64) error {
	if least := MinSize(fs); size < least {
		have := fmt.Sprintf("%d bytes", size)
		if size%mib == 0 {
			have = fmt.Sprintf("%d MiB", size/mib)
		}
		return fmt.Errorf("%w size: %s needs at least %d MiB, the device has %s", ErrInvalid, fs, least/mib, have)
	}
	return nil
}
