package iscsi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
)

// TestParse has what drivers of Cinder say of a connection.
func TestParse(t *testing.T) {
	for name, test := range map[string]struct {
		info string
		want iscsi.LUN
		err  string
	}{
		"LVM": {
			info: `{"driver_volume_type": "iscsi", "target_discovered": false, "target_portal": "192.0.2.7:3260",
				"target_iqn": "iqn.2010-10.org.openstack:volume-1fae06f2-8dcc-4b5b-8d8b-000000000001", "target_lun": 0,
				"auth_method": "CHAP", "auth_username": "u", "auth_password": "secret words"}`,
			want: iscsi.LUN{
				Portals: []string{"192.0.2.7:3260"}, Target: "iqn.2010-10.org.openstack:volume-1fae06f2-8dcc-4b5b-8d8b-000000000001",
				User: "u", Secret: "secret words",
			},
		},
		"several ways": {
			info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:a", "target_lun": 3,
				"target_portals": ["192.0.2.7:3260", "192.0.2.8:3260", "[2001:db8::1]:3260", "192.0.2.9:3260"],
				"target_iqns": ["iqn.2026-11.test:a", "iqn.2026-11.test:a", "iqn.2026-11.test:a", "iqn.2026-11.test:b"], "target_luns": [3, 3, 3, 3]}`,
			want: iscsi.LUN{Portals: []string{"192.0.2.7:3260", "192.0.2.8:3260", "[2001:db8::1]:3260"}, Target: "iqn.2026-11.test:a", Number: 3},
		},
		"only lists": {
			info: `{"target_portals": ["192.0.2.7:3260", "192.0.2.8:3260"], "target_iqns": ["iqn.2026-11.test:a", "iqn.2026-11.test:b"], "target_luns": ["1", "1"]}`,
			want: iscsi.LUN{Portals: []string{"192.0.2.7:3260"}, Target: "iqn.2026-11.test:a", Number: 1},
		},
		"another unit by another way": {
			info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:a", "target_lun": 3,
				"target_portals": ["192.0.2.8:3260"], "target_iqns": ["iqn.2026-11.test:a"], "target_luns": [4]}`,
			want: iscsi.LUN{Portals: []string{"192.0.2.7:3260"}, Target: "iqn.2026-11.test:a", Number: 3},
		},
		"no number":   {info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:a"}`, err: `it is not said which logical unit of target "iqn.2026-11.test:a" it is`},
		"half a unit": {info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:a", "target_lun": 1.5}`, err: "it is not said which logical unit"},
		"below zero":  {info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:a", "target_lun": -1}`, err: "-1 is no number of a logical unit"},
		"no target":   {info: `{"target_portal": "192.0.2.7:3260", "target_lun": 1}`, err: `"" is no name of an iSCSI target`},
		"a path":      {info: `{"target_portal": "192.0.2.7:3260", "target_iqn": "iqn.2026-11.test:../../etc", "target_lun": 1}`, err: "is no name of an iSCSI target"},
		"no portal":   {info: `{"target_iqn": "iqn.2026-11.test:a", "target_lun": 1}`, err: "there is no portal by which to reach iqn.2026-11.test:a"},
		"no port":     {info: `{"target_portal": "192.0.2.7", "target_iqn": "iqn.2026-11.test:a", "target_lun": 1}`, err: `"192.0.2.7" is no portal`},
		"an option":   {info: `{"target_portal": "-p:1", "target_iqn": "iqn.2026-11.test:a", "target_lun": 1}`, err: `"-p:1" is no portal`},
		"half CHAP":   {info: `{"target_portal": "192.0.2.7:1", "target_iqn": "iqn.2026-11.test:a", "target_lun": 1, "auth_method": "CHAP", "auth_username": "u"}`, err: "is said to want CHAP, without a user and a secret"},
		"not CHAP":    {info: `{"target_portal": "192.0.2.7:1", "target_iqn": "iqn.2026-11.test:a", "target_lun": 1, "auth_method": "SRP"}`, err: `wants authentication by "SRP"`},
	} {
		t.Run(name, func(t *testing.T) {
			var info map[string]any
			if err := json.Unmarshal([]byte(test.info), &info); err != nil {
				t.Fatal(err)
			}
			got, err := iscsi.Parse(info)
			if test.err != "" {
				if !errors.Is(err, backends.ErrInvalid) || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v (portals %q, user %q), %v; want %v (portals %q)", got, got.Portals, got.User, err, test.want, test.want.Portals)
			}
		})
	}
}

// TestSecret: however a unit is printed, its secret is not.
func TestSecret(t *testing.T) {
	lun := iscsi.LUN{Portals: []string{"192.0.2.7:3260"}, Target: "iqn.2026-11.test:a", Number: 1, User: "u", Secret: "sesame"}
	text, err := json.Marshal(lun)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	all.Write(text)
	for _, form := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		fmt.Fprintf(&all, form+form+form, lun, []iscsi.LUN{lun}, &lun)
	}
	lun.User = ""
	fmt.Fprint(&all, lun.Valid())
	if strings.Contains(all.String(), "sesame") {
		t.Errorf("the secret is printed: %s", all.String())
	}
}

func TestName(t *testing.T) {
	for text, want := range map[string]string{
		"## a comment\n\nInitiatorName=iqn.1993-08.org.debian:01:1a2b\n": "iqn.1993-08.org.debian:01:1a2b",
		"InitiatorName= iqn.1993-08.org.debian:01:1a2b ":                 "iqn.1993-08.org.debian:01:1a2b",
		"#InitiatorName=iqn.1993-08.org.debian:01:1a2b\n":                "",
		"InitiatorName=host 1\n":                                         "",
	} {
		file := filepath.Join(t.TempDir(), "name")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := iscsi.Name(file)
		if (err == nil) != (want != "") || want != "" && got != want {
			t.Errorf("%q: got %q, %v; want %q", text, got, err, want)
		}
	}
}
