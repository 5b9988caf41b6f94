package driver

import "testing"

// DecodeRecord decodes a journal record and asserts that what is accepted can be
// used.
func DecodeRecord(t *testing.T, data []byte) {
	const vid = "00000000-0000-4000-8000-000000000001"
	r, err := decodeRecord(data, vid)
	if err != nil {
		return
	}
	if r.ID != vid || r.Token < 0 || r.Token == 0 && !r.Late && !r.Detaching || r.Refs.total() < 0 {
		t.Errorf("accepted %+v", r)
	}
}
