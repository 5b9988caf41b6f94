package openstack

import (
	"maps"
	"sync"

	"github.com/flocker-plugin/flocker/backends"
)

// seen remembers whose the devices of this host are. OpenStack, which knows their
// tokens, is asked about a device once in its life, and after calls of this process
// whose outcome is not known; so never when nothing happens.
type seen struct {
	mu    sync.Mutex
	lives map[string]known // by a device's life
	calls int64            // how many calls may have changed what is attached here
	asked int64            // up to which of them OpenStack was asked; -1 is never
}

// known is what OpenStack has said of a device, which does not change during its life.
type known struct {
	ours bool
	att  backends.Attachment
}

// doubt says that a call may have changed what is attached here.
func (s *seen) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
}

// add is for a device that was just attached.
func (s *seen) add(life string, att backends.Attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lives[life] = known{true, att}
}

// attachments returns the attachments of the devices that the kernel shows, and those
// of OpenStack that it does not show. ask completes what is known of the devices; what it
// has learned when it fails is kept.
func (s *seen) attachments(devices []string, ask func(lives map[string]known) (bare []backends.Attachment, pending bool, err error)) ([]backends.Attachment, error) {
	s.mu.Lock()
	calls, asks := s.calls, s.asked < s.calls
	lives := map[string]known{}
	for _, d := range devices {
		k, ok := s.lives[d]
		if asks = asks || !ok; ok {
			lives[d] = k
		}
	}
	s.mu.Unlock()
	var atts []backends.Attachment
	pending := false
	if asks {
		var err error
		if atts, pending, err = ask(lives); err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			maps.Copy(s.lives, lives)
			return nil, err
		}
	}
	for _, d := range devices {
		if k := lives[d]; k.ours {
			atts = append(atts, k.att)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lives = lives // devices that have gone are forgotten
	if asks && !pending {
		s.asked = max(s.asked, calls)
	}
	return atts, nil
}
