package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Event is something that was done to a volume or a host. It is recorded in etcd together
// with the change itself.
type Event struct {
	// Revision is etcd's, of the change. It is the fencing token of a tenure that began
	// with it, by a claim, hand over, take over or retake.
	Revision int64 `json:"revision"`
	// At is by the clock of Host, which did it.
	At   time.Time `json:"at"`
	Host string    `json:"host"`
	What string    `json:"what"`
	// Volume is its name, if it is about one and the name is still known; ID its id.
	Volume string `json:"volume,omitempty"`
	ID     string `json:"id,omitempty"`
	// From and To are hosts: whose it was or is, whose it becomes.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	// Token is the fencing token under which it was done, or which ended with it.
	Token  int64  `json:"token,omitempty"`
	Detail string `json:"detail,omitempty"`
	// By is who wanted it, if somebody did.
	By string `json:"by,omitempty"`
	// Node is Host's id.
	Node string `json:"node"`
}

// Events answers GET /v1/events, the oldest first.
type Events struct {
	Events []Event `json:"events"`
	// Next is what to ask for with after, to go on; More says that there is more already.
	Next int64 `json:"next"`
	More bool  `json:"more,omitempty"`
}

// EventLine is one line of the answer to GET /v1/events?follow=true. Every 15 s at least
// there is one, if need be without an event.
type EventLine struct {
	Event *Event `json:"event,omitempty"`
	// Next is what to ask for with after, to go on.
	Next int64 `json:"next"`
	// Error ends the stream.
	Error string `json:"error,omitempty"`
}

// EventQuery says which events are meant.
type EventQuery struct {
	// After is a revision: those that came later. Since is a time or a duration such as
	// 2h: those of that time or later. With neither of them it is all that is kept, or, of a
	// stream, what comes.
	After *int64
	Since string
	// Volume is a name or an id; empty for all, and for those about no volume.
	Volume string
	// Limit is how many are returned at most, if it is not 0; not of a stream.
	Limit int
}

func (q EventQuery) path(follow bool) string {
	v := url.Values{}
	set := func(key, value string, is bool) {
		if is {
			v.Set(key, value)
		}
	}
	if q.After != nil {
		set("after", strconv.FormatInt(*q.After, 10), true)
	}
	set("since", q.Since, q.Since != "")
	set("volume", q.Volume, q.Volume != "")
	set("limit", strconv.Itoa(q.Limit), q.Limit != 0)
	set("follow", "true", follow)
	return "/v1/events?" + v.Encode()
}

// Events returns what has happened. An Error with status 410 says that events which were
// asked for are no longer kept.
func (c *Client) Events(ctx context.Context, q EventQuery) (Events, error) {
	var answer Events
	err := c.do(ctx, http.MethodGet, q.path(false), nil, &answer)
	return answer, err
}

// Follow gives each event to f as it comes, until f returns an error, which it returns, ctx
// ends, or the plugin breaks off. next is what to ask for with After, to go on; 0 if
// nothing has come.
func (c *Client) Follow(ctx context.Context, q EventQuery, f func(Event) error) (next int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := time.AfterFunc(Patience, func() { cancel(errSilent) })
	defer patience.Stop()
	resp, err := c.send(ctx, http.MethodGet, q.path(true), nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	for lines := bufio.NewReader(resp.Body); ; {
		data, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			err = errors.New("it has ended")
		}
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return next, fmt.Errorf("the Flocker plugin on %s broke off: %w", c.Socket, err)
		}
		patience.Reset(Patience)
		var line EventLine
		if err := json.Unmarshal(data, &line); err != nil {
			return next, c.strange(err)
		}
		next = max(next, line.Next)
		switch {
		case line.Error != "":
			return next, &Error{Status: http.StatusOK, Text: line.Error}
		case line.Event != nil:
			if err := f(*line.Event); err != nil {
				return next, err
			}
		}
	}
}
