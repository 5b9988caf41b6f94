package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/teststore"
)

// volume is a directory with the data, a sparse file of the greatest size, and the
// record, which makes it a volume. What the volume's size is the initiators see to.
type volume struct {
	dir string

	mu       sync.Mutex
	record   *record             // nil: there is no such volume
	sessions map[string]*session // by grant
}

// record is what must survive the server.
type record struct {
	teststore.Volume
	Grants []teststore.Grant
	Fences []fence
}

// fence says who is refused from now on: an initiator, with tokens up to this one.
type fence struct {
	Initiator string
	Token     int64
}

func (f fence) stops(g teststore.Grant) bool {
	return g.Initiator == f.Initiator && g.Token <= f.Token
}

func (v *volume) dataPath() string   { return filepath.Join(v.dir, "data") }
func (v *volume) recordPath() string { return filepath.Join(v.dir, "record.json") }

func (v *volume) load() error {
	data, err := os.ReadFile(v.recordPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil // half made or half removed
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(data, &v.record)
}

// save makes r the volume's record, durably.
func (v *volume) save(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := v.recordPath() + ".new"
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := errors.Join(os.Rename(tmp, v.recordPath()), syncDir(v.dir)); err != nil {
		return err
	}
	v.record = &r
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// with returns a copy of the record that can be changed and saved.
func (v *volume) with() record {
	r := *v.record
	r.Grants, r.Fences = slices.Clone(r.Grants), slices.Clone(r.Fences)
	return r
}

func (v *volume) make(as teststore.Volume) error {
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(v.dataPath(), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(teststore.MaxSize), f.Close(), syncDir(filepath.Dir(v.dir))); err != nil {
		return err
	}
	return v.save(record{Volume: as})
}

func (v *volume) remove(teststore.Request) (teststore.Reply, error) {
	for _, g := range v.record.Grants {
		return teststore.Reply{}, v.attachedTo(g)
	}
	if err := errors.Join(os.Remove(v.recordPath()), syncDir(v.dir)); err != nil {
		return teststore.Reply{}, err
	}
	v.record = nil
	return teststore.Reply{}, errors.Join(os.Remove(v.dataPath()), os.Remove(v.dir))
}

func (v *volume) attachedTo(g teststore.Grant) error {
	return &backends.AttachedError{Volume: v.record.ID, Node: g.Node, Token: g.Token}
}

func (v *volume) get(teststore.Request) (teststore.Reply, error) {
	return teststore.Reply{Volumes: []teststore.Volume{v.record.Volume}}, nil
}

func (v *volume) resize(req teststore.Request) (teststore.Reply, error) {
	if size := roundUp(req.Size); size > v.record.Size {
		r := v.with()
		r.Size = size
		if err := v.save(r); err != nil {
			return teststore.Reply{}, err
		}
	}
	return v.get(req)
}

// grant is g as it is told.
func (v *volume) grant(g teststore.Grant) teststore.Grant {
	g.Size = v.record.Size
	return g
}

func (v *volume) attach(req teststore.Request) (teststore.Reply, error) {
	g := teststore.Grant{ID: newID(), Ref: v.record.Ref, Node: req.Node, Initiator: req.Initiator, Token: req.Token}
	for _, f := range v.record.Fences {
		if f.stops(g) {
			return teststore.Reply{}, fmt.Errorf("%s was cut off from volume %s under token %d, so token %d is over: %w",
				g.Initiator, v.record.ID, f.Token, g.Token, backends.ErrInUse)
		}
	}
	for _, other := range v.record.Grants {
		switch {
		case other.Node == g.Node && other.Initiator == g.Initiator && other.Token == g.Token:
			return teststore.Reply{Grants: []teststore.Grant{v.grant(other)}}, nil
		case other.Node == g.Node || v.record.Exclusive:
			return teststore.Reply{}, v.attachedTo(other)
		}
	}
	r := v.with()
	r.Grants = append(r.Grants, g)
	return teststore.Reply{Grants: []teststore.Grant{v.grant(g)}}, v.save(r)
}

func (v *volume) detach(req teststore.Request) (teststore.Reply, error) {
	_, err := v.revoke(func(g teststore.Grant) bool {
		return g.Node == req.Node && g.Token == req.Token && (req.Grant == "" || req.Grant == g.ID)
	})
	return teststore.Reply{}, err
}

// fence first refuses, so that nothing new begins while it ends what there is.
func (v *volume) fence(req teststore.Request) (teststore.Reply, error) {
	if req.Initiator == "" {
		return teststore.Reply{}, fmt.Errorf("whom to cut off from volume %s is not known: an initiator has to be named: %w", v.record.ID, backends.ErrInvalid)
	}
	f := fence{Initiator: req.Initiator, Token: req.Token}
	r := v.with()
	if i := slices.IndexFunc(r.Fences, func(other fence) bool { return other.Initiator == f.Initiator }); i >= 0 {
		r.Fences[i].Token = max(r.Fences[i].Token, f.Token)
	} else {
		r.Fences = append(r.Fences, f)
	}
	if err := v.save(r); err != nil {
		return teststore.Reply{}, err
	}
	ended, err := v.revoke(f.stops)
	if err != nil {
		return teststore.Reply{}, err
	}
	return teststore.Reply{Evidence: fmt.Sprintf("%d data servers were killed and have ended; %s is refused up to token %d", ended, f.Initiator, f.Token)}, nil
}

// revoke takes grants away: it ends their data servers, which it sees gone, and
// then forgets the grants. It returns how many data servers it has ended.
func (v *volume) revoke(which func(teststore.Grant) bool) (ended int, err error) {
	r := v.with()
	for _, g := range v.record.Grants {
		if se := v.sessions[g.ID]; se != nil && which(g) {
			if err := se.end(); err != nil {
				return ended, backends.Classify(backends.ErrUnavailable, err)
			}
			delete(v.sessions, g.ID)
			ended++
		}
	}
	if r.Grants = slices.DeleteFunc(r.Grants, which); len(r.Grants) == len(v.record.Grants) {
		return ended, nil
	}
	return ended, v.save(r)
}

// login starts a data server for a grant.
func (v *volume) login(req teststore.Request, host string) (*session, error) {
	i := slices.IndexFunc(v.record.Grants, func(g teststore.Grant) bool { return g.ID == req.Grant })
	if i < 0 {
		return nil, fmt.Errorf("grant %s of volume %s: %w", req.Grant, v.record.ID, backends.ErrNotFound)
	}
	if slices.ContainsFunc(v.record.Fences, func(f fence) bool { return f.stops(v.record.Grants[i]) }) {
		return nil, fmt.Errorf("grant %s of volume %s was taken away: %w", req.Grant, v.record.ID, backends.ErrInvalid)
	}
	if old := v.sessions[req.Grant]; old != nil {
		if old.sequence >= req.Sequence {
			return nil, fmt.Errorf("grant %s of volume %s has a later login: %w", req.Grant, v.record.ID, backends.ErrInvalid)
		}
		if err := old.end(); err != nil {
			return nil, backends.Classify(backends.ErrUnavailable, err)
		}
		delete(v.sessions, req.Grant)
	}
	se, err := startSession(filepath.Dir(v.dir), host, v.record.Ref, req.Grant)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	se.initiator, se.sequence = v.record.Grants[i].Initiator, req.Sequence
	v.sessions[req.Grant] = se
	return se, nil
}
