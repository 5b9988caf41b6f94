package ownership_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// What somebody believes about a name saves a round trip if it is right, and
// changes nothing if it is wrong.
func TestLookupKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, faults, _ := start(t, ownership.NewMemory(), "a")
		create := func(name string) ownership.Volume {
			v, _, err := m.Create(t.Context(), ownership.Volume{ID: uuid.NewString(), Name: name})
			if err == nil {
				v, err = m.Ready(t.Context(), v)
			}
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		remove := func(v ownership.Volume) ownership.Volume {
			v, err := m.Delete(t.Context(), v, 0)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		other, removed := create("other"), create("db")
		tombstone := remove(removed)
		again, owned := create("db"), create("owned")
		if _, _, err := m.Claim(t.Context(), owned.ID); err != nil {
			t.Fatal(err)
		}
		gone := create("gone")
		remove(gone)
		for _, c := range []struct {
			name, believed, want string
			reads                int
		}{
			{"db", again.ID, again.ID, 1},
			{"owned", owned.ID, owned.ID, 2},
			{"db", "", again.ID, 2},
			{"db", tombstone.ID, again.ID, 3},
			{"db", other.ID, again.ID, 3},
			{"db", uuid.NewString(), again.ID, 3},
			{"gone", gone.ID, "", 2},
			{"none", other.ID, "", 2},
			{"", other.ID, "", 1},
		} {
			reads := 0
			faults.Inject(func(call string) ownership.Fault {
				if call == "read" {
					reads++
				}
				return ownership.Fault{}
			})
			view, err := m.LookupKnown(t.Context(), c.name, c.believed)
			faults.Inject(nil)
			if view.Volume.ID != c.want || errors.Is(err, ownership.ErrNotFound) != (c.want == "") || c.want != "" && err != nil {
				t.Errorf("%q, believed to be %q: got %q, %v, want %q", c.name, c.believed, view.Volume.ID, err, c.want)
			}
			if reads != c.reads {
				t.Errorf("%q, believed to be %q: got %d reads, want %d", c.name, c.believed, reads, c.reads)
			}
			if (view.Owner != nil) != (c.name == "owned") {
				t.Errorf("%q: got owner %v", c.name, view.Owner)
			}
		}
	})
}
