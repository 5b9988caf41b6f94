package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// The journal is what a node cannot find out again by looking: who it is, which
// Mount calls it has answered, and which detach it was about to make. What is
// mounted and attached is always asked of the kernel and the backend.
//
// Layout below the state directory:
//
//	node.json          the node's identity, made once
//	epoch              how often the process was started or activated
//	volumes/<vid>.json one record for each volume this node owns, or has called the
//	                   storage for with an effect that may come late
//	seen.json          which cluster this node belongs to, and how far it has followed
//	                   it: an etcd put back to an older state is refused
//	known.json         the last seen definition of every volume, to answer Docker
//	                   when etcd is away
type journal struct {
	dir  string
	lock *os.File

	mu   sync.Mutex // serialises all files but the records, which have their dataset's lock
	seen ownership.Seen
}

// record is one volume's entry. A record of another boot says nothing about
// mounts and attachments.
type record struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	// Backend is "" in the record of an older version.
	Backend string `json:"backend,omitempty"`
	Boot    string `json:"boot"`
	Token   int64  `json:"token"`
	// Attachment is the one being used, or being detached.
	Attachment *backends.Attachment `json:"attachment,omitempty"`
	// Written says that its device had taken all that was written when it was closed.
	Written bool `json:"written,omitempty"`
	// Detaching is the intent, written and synced before the backend is called: a
	// process that finds it finishes that detach before it attaches again.
	Detaching bool `json:"detaching,omitempty"`
	// Late says that another call may still end an attachment of this node's or of
	// another one, whatever its token. It outlives the ownership: then Token is 0.
	Late bool `json:"late,omitempty"`
	Refs refs `json:"refs,omitempty"`
}

const recordVersion = 1

func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(filepath.Join(dir, "volumes"), 0o700); err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	// Two processes with one identity would each take the other's volumes for its
	// own. The kernel frees the lock however a process ends.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("another Flocker process on this host uses the state directory %s: stop it, or set FLOCKER_STATE_DIR to another one: %w", dir, err)
	}
	return &journal{dir: dir, lock: lock}, nil
}

func (j *journal) close() { _ = j.lock.Close() }

func (j *journal) path(vid string) string {
	return filepath.Join(j.dir, "volumes", vid+".json")
}

// save writes a record. Records are about this boot only, so the page cache is
// durable enough for them, except for an intent: that must be on disk before the
// storage is told.
func (j *journal) save(r record) error {
	r.Version = recordVersion
	if err := writeJSON(j.path(r.ID), r, r.Detaching || r.Late); err != nil {
		return fmt.Errorf("write journal of volume %s: %w", r.Name, err)
	}
	return nil
}

func (j *journal) remove(vid string) error {
	if err := os.Remove(j.path(vid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove journal record: %w", err)
	}
	return nil
}

// load returns all records. One that cannot be read is set aside under
// <vid>.json.broken, reported, and left out: the kernel and etcd still know.
func (j *journal) load() (records []record, broken []error) {
	files, err := filepath.Glob(filepath.Join(j.dir, "volumes", "*.json"))
	if err != nil {
		return nil, []error{err}
	}
	for _, file := range files {
		r, err := readRecord(file)
		if err != nil {
			broken = append(broken, fmt.Errorf("read journal record %s: %w (set aside)", filepath.Base(file), err))
			if err := os.Rename(file, file+".broken"); err != nil {
				broken = append(broken, err)
			}
			continue
		}
		records = append(records, r)
	}
	return records, broken
}

func readRecord(file string) (record, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return record{}, err
	}
	return decodeRecord(data, strings.TrimSuffix(filepath.Base(file), ".json"))
}

// decodeRecord refuses what it does not understand rather than guess.
func decodeRecord(data []byte, vid string) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	switch {
	case r.Version != recordVersion:
		return record{}, fmt.Errorf("version %d, want %d", r.Version, recordVersion)
	case r.ID != vid || uuid.Validate(r.ID) != nil:
		return record{}, fmt.Errorf("id %q does not fit the file's name", r.ID)
	case r.Token < 0, r.Token == 0 && !r.Late && !r.Detaching:
		return record{}, fmt.Errorf("token %d", r.Token)
	}
	for id, ref := range r.Refs {
		if ref.Count <= 0 {
			return record{}, fmt.Errorf("mount id %.12s has count %d", id, ref.Count)
		}
	}
	return r, nil
}

// saveKnown replaces the definitions kept for the time when etcd is away.
func (j *journal) saveKnown(volumes []ownership.Volume) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := writeJSON(filepath.Join(j.dir, "known.json"), volumes, true); err != nil {
		return fmt.Errorf("write known volumes: %w", err)
	}
	return nil
}

func (j *journal) loadKnown() ([]ownership.Volume, error) {
	data, err := os.ReadFile(filepath.Join(j.dir, "known.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read known volumes: %w", err)
	}
	var volumes []ownership.Volume
	if err := json.Unmarshal(data, &volumes); err != nil {
		return nil, fmt.Errorf("read known volumes: %w", err)
	}
	return volumes, nil
}

func (j *journal) saveSeen(seen ownership.Seen) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	was := j.seen
	if seen.At-was.At < 600 {
		was.At = seen.At // an idle cluster is no reason to write
	}
	if seen == was {
		return nil
	}
	sync := seen.Cluster != was.Cluster || seen.Gen != was.Gen || seen.Older != was.Older
	if err := writeJSON(filepath.Join(j.dir, seenFile), seen, sync); err != nil {
		return fmt.Errorf("write what was seen of the cluster: %w", err)
	}
	j.seen = seen
	return nil
}

const seenFile = "seen.json"

// LoadSeen returns how far this host has followed which cluster, for
// ownership.Config; the zero value if it never belonged to one. Whoever means to
// give a host to another cluster removes seen.json, with no volume mounted.
func LoadSeen(stateDir string) (ownership.Seen, error) {
	var seen ownership.Seen
	data, err := os.ReadFile(filepath.Join(stateDir, seenFile))
	if errors.Is(err, fs.ErrNotExist) {
		return seen, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &seen)
	}
	if err != nil {
		return ownership.Seen{}, fmt.Errorf("read what was seen of the cluster: %w", err)
	}
	return seen, nil
}

// nextEpoch counts the starts of this process and the activations by Docker. A
// reference of an older epoch may be left over from a crash.
func (j *journal) nextEpoch() (int64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	file := filepath.Join(j.dir, "epoch")
	var epoch int64
	if data, err := os.ReadFile(file); err == nil {
		// A damaged counter starts again from the clock, which is past any count.
		if json.Unmarshal(data, &epoch) != nil {
			epoch = time.Now().Unix()
		}
	}
	epoch++
	if err := writeJSON(file, epoch, false); err != nil {
		return 0, fmt.Errorf("write epoch: %w", err)
	}
	return epoch, nil
}

// LoadNode returns this host's identity: the UUID kept in stateDir, made at the
// first start, with the kernel's boot id and a new session.
func LoadNode(stateDir, host string) (ownership.Node, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return ownership.Node{}, fmt.Errorf("open state directory: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ownership.Node{}, fmt.Errorf("read boot id: %w", err)
	}
	file := filepath.Join(stateDir, "node.json")
	var kept struct {
		ID string `json:"id"`
	}
	data, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kept.ID = uuid.NewString()
		if err := writeJSON(file, kept, true); err != nil {
			return ownership.Node{}, fmt.Errorf("write node identity: %w", err)
		}
	case err != nil:
		return ownership.Node{}, fmt.Errorf("read node identity: %w", err)
	default:
		if err := json.Unmarshal(data, &kept); err != nil || uuid.Validate(kept.ID) != nil {
			return ownership.Node{}, fmt.Errorf("node identity %s is damaged: restore it from a backup; "+
				"removing it makes this host a new node, which cannot free the volumes it owned before", file)
		}
	}
	return ownership.Node{
		ID:      kept.ID,
		Host:    host,
		Boot:    strings.TrimSpace(string(boot)),
		Session: uuid.NewString(),
	}, nil
}

// writeJSON replaces a file atomically: after a crash there is the old or the new
// content. With durable it is on disk when writeJSON returns.
func writeJSON(file string, value any, durable bool) (err error) {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".tmp-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	if _, err := tmp.Write(append(data, '\n')); err != nil {
		_ = tmp.Close()
		return err
	}
	if durable {
		if err := tmp.Sync(); err != nil {
			_ = tmp.Close()
			return err
		}
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return err
	}
	if !durable {
		return nil
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return dir.Sync()
}
