package control

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Observer is what is asked what happens; *ownership.Observer is one.
type Observer interface {
	Wait(ctx context.Context, after int64) (*ownership.State, error)
	Since(ctx context.Context, t time.Time) (after int64, err error)
	Events(ctx context.Context, after int64, limit int) (events []ownership.Event, next int64, err error)
	Follow(ctx context.Context, after int64) <-chan ownership.Followed
}

const (
	// streams is how many may follow what happens at the same time.
	streams = 16
	// beat is the longest time without a line.
	beat       = 15 * time.Second
	mostEvents = 5000 // of one answer
)

// Observe has it answer what happens, too.
func (a *Admin) Observe(o Observer) *Admin {
	e := &events{o: o, following: make(chan struct{}, streams)}
	a.mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("follow") != "true" {
			a.answer(w, r, e.list)
			return
		}
		q, leave, err := e.begin(r)
		if err != nil {
			a.answer(w, r, func(context.Context, *http.Request) (any, error) { return nil, err })
			return
		}
		defer leave()
		e.follow(w, r, q)
	})
	return a
}

type events struct {
	o         Observer
	following chan struct{}
}

// An eventQuery is what is asked for.
type eventQuery struct {
	after  int64
	since  time.Time
	volume string
	limit  int
}

func (q eventQuery) wants(e ownership.Event) bool {
	return !e.At.Before(q.since) && (q.volume == "" || q.volume == e.Name || q.volume == e.Volume)
}

// query reads what is asked for. What it does not know is refused, as in a body.
func (e *events) query(ctx context.Context, values url.Values) (q eventQuery, err error) {
	for key := range values {
		if !slices.Contains([]string{"after", "since", "volume", "limit", "follow"}, key) {
			return q, badRequest("the request's %q is not known: there are after, since, volume, limit and follow", key)
		}
	}
	follow, after, since := values.Get("follow"), values.Get("after"), values.Get("since")
	q.volume, q.limit = values.Get("volume"), mostEvents
	if limit := values.Get("limit"); limit != "" {
		if q.limit, err = strconv.Atoi(limit); err != nil || q.limit < 1 || q.limit > mostEvents || follow == "true" {
			return q, badRequest("limit is a number from 1 to %d, and not for what is followed", mostEvents)
		}
	}
	switch {
	case follow != "" && follow != "true" && follow != "false":
		return q, badRequest("follow is true or false")
	case after != "" && since != "":
		return q, badRequest("after and since do not go together")
	case after != "":
		if q.after, err = strconv.ParseInt(after, 10, 64); err != nil || q.after < 0 {
			return q, badRequest("after is a revision of etcd, and %q is none", after)
		}
	case since != "":
		if q.since, err = when(since); err != nil {
			return q, err
		}
		q.after, err = e.o.Since(ctx, q.since)
	case follow == "true":
		var s *ownership.State
		if s, err = e.o.Wait(ctx, 0); err == nil {
			q.after = s.Revision
		}
	}
	return q, err
}

// when understands a time, and how long ago it was.
func when(since string) (time.Time, error) {
	if ago, err := time.ParseDuration(since); err == nil && ago >= 0 {
		return time.Now().Add(-ago), nil
	}
	t, err := time.Parse(time.RFC3339, since)
	if err != nil {
		return t, badRequest("since is a duration such as 90m or 24h, or a time such as 2026-11-20T09:30:00Z, and %q is neither", since)
	}
	return t, nil
}

func (e *events) list(ctx context.Context, r *http.Request) (any, error) {
	q, err := e.query(ctx, r.URL.Query())
	if err != nil {
		return nil, err
	}
	answer := api.Events{Events: []api.Event{}, Next: q.after}
	last := int64(0)
	for {
		some, next, err := e.o.Events(ctx, answer.Next, mostEvents)
		if err != nil {
			return nil, err
		}
		for _, ev := range some {
			if q.wants(ev) {
				// What happened together stays together.
				if len(answer.Events) >= q.limit && ev.Revision != last {
					answer.More = true
					return answer, nil
				}
				answer.Events, last = append(answer.Events, event(ev)), ev.Revision
			}
			answer.Next = ev.Revision
		}
		if answer.Next = next; len(some) == 0 {
			return answer, nil
		}
	}
}

// begin finds out where a stream begins, and whether it can.
func (e *events) begin(r *http.Request) (q eventQuery, leave func(), err error) {
	select {
	case e.following <- struct{}{}:
		leave = func() { <-e.following }
	default:
		return q, nil, &refusal{http.StatusTooManyRequests, fmt.Sprintf("%d others follow what happens on this host already: end one of them first", streams)}
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), deadline, fmt.Errorf("not done within %v", deadline))
	defer cancel()
	if q, err = e.query(ctx, r.URL.Query()); err == nil {
		_, _, err = e.o.Events(ctx, q.after, 1)
	}
	if err != nil {
		leave()
	}
	return q, leave, err
}

// follow writes lines until the client goes away, or does not read them.
func (e *events) follow(w http.ResponseWriter, r *http.Request, q eventQuery) {
	rc := http.NewResponseController(w)
	line := func(l api.EventLine) error {
		_ = rc.SetWriteDeadline(time.Now().Add(ioLimit))
		_, err := w.Write(Encode(l))
		return cmp.Or(err, rc.Flush())
	}
	_ = rc.SetReadDeadline(time.Time{}) // nothing more is expected
	w.Header().Set("Content-Type", "application/x-ndjson")
	next := q.after
	if line(api.EventLine{Next: next}) != nil {
		return
	}
	followed := e.o.Follow(r.Context(), q.after)
	quiet := time.NewTicker(beat)
	defer quiet.Stop()
	for {
		var err error
		select {
		case f, ok := <-followed:
			switch {
			case !ok:
				_ = line(api.EventLine{Next: next, Error: "the plugin ends"}) // or there is nobody left
				return
			case f.Err != nil:
				_ = line(api.EventLine{Next: next, Error: f.Err.Error()})
				return
			}
			next = f.Revision
			if !q.wants(f.Event) {
				continue
			}
			ev := event(f.Event)
			err = line(api.EventLine{Event: &ev, Next: next})
			quiet.Reset(beat)
		case <-quiet.C:
			err = line(api.EventLine{Next: next})
		}
		if err != nil {
			return
		}
	}
}

func event(e ownership.Event) api.Event {
	return api.Event{
		Revision: e.Revision, At: e.At, Host: cmp.Or(e.Host, e.Node), What: e.What, Volume: e.Name, ID: e.Volume,
		From: cmp.Or(e.FromHost, e.From), To: cmp.Or(e.ToHost, e.To), Token: e.Token, Detail: e.Detail, By: e.By, Node: e.Node,
	}
}
