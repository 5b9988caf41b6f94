package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/e2e/chaos/history"
)

// prefix is what Flocker's keys begin with; what follows marker begins with it, too,
// but is not Flocker's.
const (
	prefix = "/flocker/v1/"
	marker = "/flocker-chaos"
)

// event is a change of a key, as etcd's JSON gateway has it.
type event struct {
	Type string
	KV   struct {
		Key, Value  []byte
		ModRevision int64 `json:"mod_revision,string"`
	}
}

// post sends a request to etcd's JSON gateway, whichever member answers.
func (r *run) post(ctx context.Context, path string, body any) (*http.Response, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, endpoint := range r.endpoints {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint+path, bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		client := http.Client{Transport: &http.Transport{DialContext: r.rig.Dial, DisableKeepAlives: true}}
		resp, err := client.Do(req)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s answers %s", endpoint, resp.Status)
			_ = resp.Body.Close()
		}
		if err == nil {
			return resp, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// keys returns the keys of Flocker below a folder, with their values.
func (r *run) keys(ctx context.Context, folder string) (map[string][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := r.post(ctx, "/v3/kv/range", map[string]any{"key": []byte(prefix + folder), "range_end": after(prefix + folder)})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var found struct {
		KVs []struct{ Key, Value []byte }
	}
	if err := json.NewDecoder(resp.Body).Decode(&found); err != nil {
		return nil, err
	}
	keys := map[string][]byte{}
	for _, kv := range found.KVs {
		keys[strings.TrimPrefix(string(kv.Key), prefix+folder)] = kv.Value
	}
	return keys, nil
}

// after is the end of the range of keys that begin with a string.
func after(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// volumeIDs are the volumes by name.
func (r *run) volumeIDs(ctx context.Context) (map[string]string, error) {
	names, err := r.keys(ctx, "name/")
	if err != nil {
		return nil, err
	}
	ids := map[string]string{}
	for name, value := range names {
		var v struct{ Volume string }
		if err := json.Unmarshal(value, &v); err != nil {
			return nil, fmt.Errorf("read the key of volume %s: %w", name, err)
		}
		ids[name] = v.Volume
	}
	return ids, nil
}

// events are all changes of all of Flocker's keys, since etcd began.
func (r *run) events(ctx context.Context) ([]event, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	resp, err := r.post(ctx, "/v3/kv/put", map[string]any{"key": []byte(marker), "value": []byte("end")})
	if err != nil {
		return nil, err
	}
	_ = resp.Body.Close()
	resp, err = r.post(ctx, "/v3/watch", map[string]any{"create_request": map[string]any{
		"key": []byte("/flocker"), "range_end": after("/flocker"), "start_revision": 1,
	}})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var all []event
	for lines := json.NewDecoder(resp.Body); ; {
		var line struct {
			Result struct {
				Events   []event
				Canceled bool
				Reason   string `json:"cancel_reason"`
			}
		}
		if err := lines.Decode(&line); err != nil {
			return nil, fmt.Errorf("read the history of etcd: %w", err)
		}
		if line.Result.Canceled {
			return nil, fmt.Errorf("read the history of etcd: %s", line.Result.Reason)
		}
		for _, e := range line.Result.Events {
			if string(e.KV.Key) == marker {
				return all, nil
			}
			all = append(all, e)
		}
	}
}

// changesFrom finds the changes of owners in the history of etcd, sorted by token.
// bootTime is when the machine's boot clock was at zero: the audit lines in etcd have
// the time of day.
func changesFrom(events []event, bootTime time.Time) ([]history.Change, error) {
	names := map[string]string{}
	times := map[int64]time.Duration{}
	var changes []history.Change
	pending := map[string]bool{}
	for _, e := range events {
		key := strings.TrimPrefix(string(e.KV.Key), prefix)
		folder, id, _ := strings.Cut(key, "/")
		var value struct {
			Name    string // of vol/
			Host    string // of own/
			Pending *struct{}
			At      time.Time // of ev/
		}
		if len(e.KV.Value) > 0 {
			if err := json.Unmarshal(e.KV.Value, &value); err != nil && (folder == "vol" || folder == "own" || folder == "ev") {
				return nil, fmt.Errorf("read key %s: %w", key, err)
			}
		}
		switch {
		case folder == "vol" && value.Name != "":
			names[id] = value.Name
		case folder == "ev" && !value.At.IsZero():
			times[e.KV.ModRevision] = value.At.Sub(bootTime)
		case folder == "own":
			c := history.Change{Volume: id, Token: e.KV.ModRevision, Node: value.Host, Pending: value.Pending != nil}
			c.Forced = pending[id] && !c.Pending && c.Node != ""
			pending[id] = c.Pending
			changes = append(changes, c)
		}
	}
	slices.SortStableFunc(changes, func(a, b history.Change) int { return cmp.Compare(a.Token, b.Token) })
	var latest time.Duration
	for n := range changes {
		c := &changes[n]
		c.Volume = cmp.Or(names[c.Volume], c.Volume)
		c.At = times[c.Token]
		if latest = max(latest, c.At); c.Pending {
			c.At = latest // a fence is no earlier
		}
	}
	return changes, nil
}
