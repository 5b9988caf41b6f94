package backends_test

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

type common struct {
	Size backends.Size `option:"size" default:"10G" help:"size of the volume"`
	FS   string        `option:"fs" default:"ext4" oneof:"ext4,xfs,btrfs" help:"filesystem"`
}

type example struct {
	common
	UID      int               `option:"uid" min:"0" help:"owner of the data"`
	Count    int64             `option:"count" default:"3"`
	Sparse   bool              `option:"sparse" default:"true"`
	Wait     time.Duration     `option:"wait" default:"30s"`
	Mode     os.FileMode       `option:"mode" default:"0755"`
	Hosts    []string          `option:"hosts"`
	Address  netip.Addr        `option:"address"`
	Password string            `option:"password" secret:"true" default:"swordfish" help:"of the array"`
	Pin      int               `option:"pin" secret:"true"`
	Labels   map[string]string `option:"label." help:"a label"`
	Other    string            // no option
}

func TestDecode(t *testing.T) {
	got, err := backends.Decode[example](map[string]string{
		"size": "1.5T", "fs": "xfs", "uid": "999", "sparse": "false", "wait": "2m", "mode": "700",
		"hosts": "a, b,,c", "address": "::1", "label.team": "db", "label.a.b": "",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := example{
		common: common{Size: 3 * backends.TiB / 2, FS: "xfs"},
		UID:    999, Count: 3, Wait: 2 * time.Minute, Mode: 0o700,
		Hosts: []string{"a", "b", "c"}, Address: netip.IPv6Loopback(), Password: "swordfish",
		Labels: map[string]string{"team": "db", "a.b": ""},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestDecodeDefaults(t *testing.T) {
	got, err := backends.Decode[example](nil)
	if err != nil {
		t.Fatal(err)
	}
	want := example{
		common: common{Size: 10 * backends.GiB, FS: "ext4"},
		Count:  3, Sparse: true, Wait: 30 * time.Second, Mode: 0o755, Password: "swordfish", Labels: map[string]string{},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

const validOptions = "valid options: address, count, fs, hosts, label.KEY, mode, password, pin, size, sparse, uid, wait"

func TestDecodeRefuses(t *testing.T) {
	for key, tt := range map[string]struct{ value, want string }{
		"sise":       {"1G", "unknown option sise; did you mean size? " + validOptions},
		"SIZE":       {"1G", "unknown option SIZE; did you mean size? " + validOptions},
		"fss":        {"ext4", "unknown option fss; did you mean fs? " + validOptions},
		"pasword":    {"x", "unknown option pasword; did you mean password? " + validOptions},
		"label":      {"x", "unknown option label; did you mean label.KEY? " + validOptions},
		"labels.x":   {"x", "unknown option labels.x; did you mean label.KEY? " + validOptions},
		"label.":     {"x", "unknown option label.; did you mean label.KEY? " + validOptions},
		"iops":       {"100", "unknown option iops; " + validOptions},
		"":           {"", `unknown option ""; ` + validOptions},
		"a b\x00":    {"", `unknown option "a b\x00"; ` + validOptions},
		"size":       {"5", `option size: "5" has no unit; 5 means 5 bytes; write 5G`},
		"fs":         {"ntfs", `option fs: "ntfs" is not valid; use ext4, xfs or btrfs`},
		"uid":        {"-1", `option uid: "-1" is too small; use 0 or more`},
		"count":      {"many", `option count: "many" is not valid; use a whole number`},
		"sparse":     {"perhaps", `option sparse: "perhaps" is not valid; use true or false`},
		"wait":       {"10", `option wait: "10" is not valid; use a time such as 500ms, 10s or 5m`},
		"mode":       {"0855", `option mode: "0855" is not valid; use permission bits in octal, such as 0755`},
		"address":    {"here", `option address: "here" is not valid; ParseAddr("here"): unable to parse IP`},
		"pin":        {"geheim", `option pin: its value is not valid; use a whole number`},
		"label.size": {"", ""},
	} {
		_, err := backends.Decode[example](map[string]string{key: tt.value})
		if tt.want == "" {
			if err != nil {
				t.Errorf("%q=%q: got %v, want no error", key, tt.value, err)
			}
			continue
		}
		if err == nil || err.Error() != tt.want {
			t.Errorf("%q=%q:\n got %v\nwant %s", key, tt.value, err, tt.want)
		}
		if !errors.Is(err, backends.ErrInvalid) {
			t.Errorf("%q=%q: %v does not match ErrInvalid", key, tt.value, err)
		}
	}
}

func TestDecodeTellsEverythingThatIsWrong(t *testing.T) {
	_, err := backends.DecodeAs[common]("setting", map[string]string{"size": "", "colour": "red", "shape": "round"})
	want := `unknown setting colour; unknown setting shape; setting size: is empty; ` +
		`use a number and a unit, such as 500MiB, 1G or 1.5T; valid settings: fs, size`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	_, err = backends.Decode[struct{}](map[string]string{"size": "1G"})
	if want := "unknown option size; there are no options here"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestValidateAndPick(t *testing.T) {
	type special struct {
		Thick bool `option:"thick"`
	}
	all := append(backends.Options[common](), backends.Options[special]()...)
	values := map[string]string{"size": "1G", "thick": "true"}
	if err := backends.Validate(all, values); err != nil {
		t.Error(err)
	}
	if got, want := backends.Pick(backends.Options[special](), values), map[string]string{"thick": "true"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	values["thick"] = "yes"
	want := `option thick: "yes" is not valid; use true or false`
	if err := backends.Validate(all, values); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestHelp(t *testing.T) {
	type some struct {
		common
		Password string            `option:"password" secret:"true" default:"swordfish" help:"of the array"`
		Labels   map[string]string `option:"label." help:"a label"`
	}
	want := `
OPTION     DEFAULT   MEANING
size       10G       size of the volume
fs         ext4      filesystem: ext4, xfs or btrfs
password   (secret)  of the array
label.KEY  -         a label
`
	if got := "\n" + backends.Help(backends.Options[some]()); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestOptionsPanicsOnAWrongDeclaration(t *testing.T) {
	for name, f := range map[string]func(){
		"type": func() {
			backends.Options[struct {
				F float64 `option:"f"`
			}]()
		},
		"default": func() {
			backends.Options[struct {
				S backends.Size `option:"s" default:"big"`
			}]()
		},
		"prefix": func() {
			backends.Options[struct {
				M map[string]string `option:"m"`
			}]()
		},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: did not panic", name)
				}
			}()
			f()
		}()
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]string{
		"1G": "1GiB", "1g": "1GiB", "1GB": "1GiB", "1GiB": "1GiB", "1 GiB": "1GiB", "500MiB": "500MiB",
		"1.5T": "1536GiB", ".5g": "512MiB", "1024m": "1GiB", "10737418240": "10GiB", "1000b": "1000B", "1048576": "1MiB",
		"0.0000001k": "", "7P": "7PiB", "8191P": "8191PiB", "1.": "", "9007199254740993": "9007199254740993B",
		"": "", "G": "", "-1G": "", "0": "", "0G": "", "8192P": "", "99999999999999999999G": "", "1e5": "", "0x10G": "",
		"1..5G": "", "1GiBs": "", "1 000G": "", "1,5G": "", "infG": "", "nan": "", "5": "", "1048575": "", " 5G": "", "5G ": "",
	} {
		var s backends.Size
		err := s.UnmarshalText([]byte(text))
		if want == "" {
			if err == nil || !errors.Is(err, backends.ErrInvalid) {
				t.Errorf("%q: got %v, %v; want an ErrInvalid", text, s, err)
			}
			continue
		}
		if err != nil || s.String() != want {
			t.Errorf("%q: got %v, %v; want %s", text, s, err, want)
		}
	}
}

func TestSizeErrors(t *testing.T) {
	const advice = "; use a number and a unit, such as 500MiB, 1G or 1.5T"
	for text, want := range map[string]string{
		"5":     "size 5 has no unit; 5 means 5 bytes; write 5G",
		"-1G":   "size -1G is negative" + advice,
		"0G":    "size 0G is zero" + advice,
		"9000P": "size 9000P is more than any storage has" + advice,
		"a lot": `size "a lot" is not a size` + advice,
	} {
		var s backends.Size
		if err := s.UnmarshalText([]byte(text)); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

func FuzzSize(f *testing.F) {
	for _, text := range []string{"1G", "1.5T", "5", "-1", "0x1p3", "1e400", "9223372036854775807", "1 kib", "٣G"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s, again backends.Size
		if err := s.UnmarshalText([]byte(text)); err != nil {
			return
		}
		if s <= 0 {
			t.Fatalf("%q is %d bytes", text, s)
		}
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Fatalf("%q: %v read back is %v, %v", text, s, again, err)
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add("size", "1G", "fs", "xfs")
	f.Add("label.x", "\xff", "pin", "x")
	f.Add("", "", "mode", "07777")
	f.Fuzz(func(t *testing.T, key, value, key2, value2 string) {
		values := map[string]string{key: value, key2: value2}
		got, err := backends.Decode[example](values)
		if valid := backends.Validate(backends.Options[example](), values); (valid == nil) != (err == nil) {
			t.Fatalf("Decode: %v, Validate: %v", err, valid)
		}
		if err == nil {
			if got.Size <= 0 || got.UID < 0 || got.Mode > 0o777 {
				t.Fatalf("%v: %+v", values, got)
			}
			return
		}
		if !errors.Is(err, backends.ErrInvalid) || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Fatalf("%v: %q", values, err)
		}
	})
}
