package rbd

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/rbdmap"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// claim says who has a volume. It is the cookie of the lock, which RADOS compares when
// it is to be removed: nobody can remove another one by mistake.
type claim struct {
	deletes bool
	// id names this attachment, or this try to delete the volume, for ever.
	id      string
	node    string
	token   int64
	address string // of the client of Ceph that serves the device
}

func newID() string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:16])
}

func (c claim) cookie() string {
	verb := "attach"
	if c.deletes {
		verb = "delete"
	}
	return strings.Join([]string{verb, c.id, strconv.FormatInt(c.token, 10), c.address, url.QueryEscape(c.node)}, " ")
}

func parseClaim(cookie string) (claim, error) {
	parts := strings.Split(cookie, " ")
	if len(parts) == 5 {
		token, err := strconv.ParseInt(parts[2], 10, 64)
		node, err2 := url.QueryUnescape(parts[4])
		c := claim{parts[0] == "delete", parts[1], node, token, parts[3]}
		if err == nil && err2 == nil && c.cookie() == cookie {
			return c, nil
		}
	}
	return claim{}, fmt.Errorf("the lock has the cookie %q, which Flocker does not write: %w", cookie, backends.ErrUnavailable)
}

// holder is the claim that is there.
type holder struct {
	claim
	locker string // client.4123, which has made the claim
}

// lockName is the name of the lock on a volume's object.
const lockName = "flocker"

// errClaimed: somebody else has the claim.
var errClaimed = errors.New("claimed")

// rados runs the program rados on a volume's object.
func (b *Backend) rados(ctx context.Context, image rbdmap.Image, args ...string) ([]byte, error) {
	return b.ceph.Run(ctx, "rados", append(where(image), args...)...)
}

func where(image rbdmap.Image) []string {
	return []string{"--pool", image.Pool, "--namespace", image.Namespace}
}

// claim takes the claim; errClaimed if there is one.
func (b *Backend) claim(ctx context.Context, image rbdmap.Image, c claim) error {
	_, err := b.rados(ctx, image, "lock", "get", image.Name, lockName, "--lock-type", "exclusive", "--lock-cookie", c.cookie())
	if errors.Is(err, backends.ErrInUse) {
		return errClaimed
	}
	// Without an answer it may be there nevertheless: then whoever comes next finds a client
	// that is gone.
	return err
}

// holder returns the claim that is there, if any.
func (b *Backend) holder(ctx context.Context, image rbdmap.Image) (h holder, ok bool, err error) {
	var lock struct {
		Lockers []struct {
			Name   string `json:"name"`
			Cookie string `json:"cookie"`
		} `json:"lockers"`
	}
	err = b.ceph.Ask(ctx, &lock, "rados", append(where(image), "lock", "info", image.Name, lockName)...)
	if errors.Is(err, backends.ErrNotFound) || (err == nil && len(lock.Lockers) == 0) {
		return holder{}, false, nil
	}
	if err != nil {
		return holder{}, false, err
	}
	h.locker = lock.Lockers[0].Name
	h.claim, err = parseClaim(lock.Lockers[0].Cookie)
	return h, err == nil, err
}

// drop removes this very claim, and no other.
func (b *Backend) drop(ctx context.Context, image rbdmap.Image, h holder) error {
	_, err := b.rados(ctx, image, "lock", "break", image.Name, lockName, h.locker, "--lock-cookie", h.cookie())
	if errors.Is(err, backends.ErrNotFound) {
		return nil
	}
	return err
}

// release removes a claim of ours.
func (b *Backend) release(ctx context.Context, image rbdmap.Image, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	h, ok, err := b.holder(ctx, image)
	if err != nil || !ok || h.id != id {
		return err
	}
	return b.drop(ctx, image, h)
}

// forget removes a volume's object, when the image is gone.
func (b *Backend) forget(ctx context.Context, image rbdmap.Image) error {
	_, err := b.rados(ctx, image, "rm", image.Name)
	if errors.Is(err, backends.ErrNotFound) {
		return nil
	}
	return err
}

// watchTimeout is a little more than what an OSD waits before it takes a client that is
// silent for gone (osd_client_watch_timeout, 30 s).
const watchTimeout = 35 * time.Second

// claimDelete takes the claim for a volume that is to be deleted, and returns its id.
func (b *Backend) claimDelete(ctx context.Context, v *volume) (id string, err error) {
	c := claim{deletes: true, id: newID(), node: b.self.Node}
	for {
		if err := b.claim(ctx, v.image, c); !errors.Is(err, errClaimed) {
			return c.id, err
		}
		h, ok, err := b.holder(ctx, v.image)
		if err != nil {
			return "", err
		}
		if !ok {
			continue
		}
		if h.deletes {
			return h.id, nil // by another call, or one that did not get to its end
		}
		// Under a token that was cut off: it came late, or that Fence has come no further.
		most, err := b.cutUpTo(ctx, v.image, h.node)
		if err != nil {
			return "", err
		}
		if h.token <= most {
			if _, err := b.cut(ctx, v.image, h); err != nil {
				return "", err
			}
			continue
		}
		watchers, err := v.image.Watchers(ctx)
		if err != nil {
			return "", err
		}
		attached := &backends.AttachedError{Volume: v.ID, Node: h.node, Token: h.token}
		if slices.ContainsFunc(watchers, func(w rbdmap.Watcher) bool { return w.Address == h.address }) {
			b.heard(h)
			return "", attached
		}
		// A client that has just lost its connection watches again soon; one that has
		// died, with its host, does not.
		dead, err := b.dead(ctx, v, h)
		if err != nil {
			return "", err
		}
		wait := watchTimeout - b.unheard(h)
		switch end, ok := ctx.Deadline(); {
		case dead || wait <= 0:
			if _, err := b.cut(ctx, v.image, h); err != nil {
				return "", err
			}
			b.heard(h)
		case ok && time.Until(end) < wait:
			return "", fmt.Errorf("client %s, which has it under ownership token %d, is no watcher of %s any more; if it is none in %s either, "+
				"the next try after that cuts it off and goes on: %w", h.address, h.token, v.image.Spec(), max(wait.Round(time.Second), time.Second), attached)
		default:
			if err := poll.Sleep(ctx, time.Second); err != nil {
				return "", errors.Join(attached, err)
			}
		}
	}
}

// silence is when a client was first found not to watch its image, and when last.
type silence struct{ first, last time.Time }

// unheard returns for how long the client of a claim has been found not to watch the image,
// by this call and those before it.
func (b *Backend) unheard(h holder) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	// What was seen a long time ago says nothing of the time since.
	maps.DeleteFunc(b.silent, func(_ string, s silence) bool { return now.Sub(s.last) > 10*time.Minute })
	s, ok := b.silent[h.id]
	if !ok {
		s.first = now
	}
	s.last = now
	b.silent[h.id] = s
	return now.Sub(s.first)
}

// heard forgets that a client was silent.
func (b *Backend) heard(h holder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.silent, h.id)
}

// cutKey is the key that says that a node was cut off up to a token.
func cutKey(node string, token int64) string { return fmt.Sprintf("%s%019d", cutPrefix(node), token) }

func cutPrefix(node string) string { return "cut." + hash(node)[:16] + "." }

// cutUpTo returns up to which token a node was cut off; -1 if it was not.
func (b *Backend) cutUpTo(ctx context.Context, image rbdmap.Image, node string) (int64, error) {
	out, err := b.rados(ctx, image, "listomapkeys", image.Name)
	if errors.Is(err, backends.ErrNotFound) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	most, keys := int64(-1), []string{}
	for key := range strings.Lines(string(out)) {
		text, ok := strings.CutPrefix(strings.TrimSpace(key), cutPrefix(node))
		if !ok {
			continue
		}
		token, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return -1, fmt.Errorf("object %s has the key %q, which Flocker does not write: %w", image.Name, key, backends.ErrUnavailable)
		}
		keys, most = append(keys, strings.TrimSpace(key)), max(most, token)
	}
	// The greatest says all.
	if len(keys) > 8 {
		slices.Sort(keys)
		_, _ = b.rados(ctx, image, "rmomapkey", image.Name, keys[0]) // the next time, then
	}
	return most, nil
}
