package rest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/control"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

const eventPage = 100

// These are shorter in tests.
var (
	// ping is the longest silence of a stream: whatever is between the two ends is not to
	// take it for dead.
	ping = 15 * time.Second
	// reader is how long a client may take for what it was sent.
	reader = 30 * time.Second
)

type event struct {
	Revision int64     `json:"revision"`
	At       time.Time `json:"at"`
	What     string    `json:"what"`
	Volume   string    `json:"volume,omitempty"` // its name
	ID       string    `json:"id,omitempty"`     // the volume's
	Node     string    `json:"node"`
	Host     string    `json:"host,omitempty"`
	From     string    `json:"from,omitempty"` // nodes
	FromHost string    `json:"from_host,omitempty"`
	To       string    `json:"to,omitempty"`
	ToHost   string    `json:"to_host,omitempty"`
	Token    int64     `json:"token,omitempty"`
	Detail   string    `json:"detail,omitempty"`
	By       string    `json:"by,omitempty"`
}

type events struct {
	Events []event `json:"events"`
	// Next is for after=, to go on.
	Next int64 `json:"next"`
}

func eventOf(e ownership.Event) event {
	return event{e.Revision, e.At, e.What, e.Name, e.Volume, e.Node, e.Host, e.From, e.FromHost, e.To, e.ToHost, e.Token, e.Detail, e.By}
}

// v2Events are those after a revision: a page of them, or for whoever accepts it a stream
// that goes on with those to come. Without a revision the page begins with the oldest, and
// the stream with the next.
func (a *API) v2Events(r *http.Request) (answer, error) {
	q, err := query(r, "after", "limit")
	if err != nil {
		return answer{}, err
	}
	limit, err := number(q, "limit", eventPage, 1, maxPage)
	if err != nil {
		return answer{}, err
	}
	s, header, err := a.state(r.Context())
	if err != nil {
		return answer{}, err
	}
	streaming := strings.Contains(r.Header.Get("Accept"), "text/event-stream")
	from, name := q.Get("after"), "after"
	if last := r.Header.Get("Last-Event-ID"); last != "" && streaming {
		from, name = last, "Last-Event-ID" // the client has come back, and the address is that of its first time
	}
	after := int64(0)
	if from != "" {
		if after, err = strconv.ParseInt(from, 10, 64); err != nil || after < 0 {
			return answer{}, badRequest("%s=%s is not a revision, as the events have.", name, from)
		}
	} else if streaming {
		after = s.Revision
	}
	if streaming {
		// What is gone is said before the stream begins: afterwards a browser would not
		// hear it.
		if _, _, err := a.events(r.Context(), after, 1); err != nil {
			return answer{}, goneEvents(err)
		}
		select {
		case a.streams <- struct{}{}:
		default:
			return answer{}, &refusal{status: http.StatusServiceUnavailable, text: fmt.Sprintf("%d clients are following the events of this host already: try again later, or at another host.", maxStreams)}
		}
		return answer{stream: func(w http.ResponseWriter, r *http.Request) error {
			defer func() { <-a.streams }()
			return a.follow(r.Context(), w, after)
		}}, nil
	}
	got, next, err := a.events(r.Context(), after, limit)
	if err != nil {
		return answer{}, goneEvents(err)
	}
	page := events{Events: make([]event, len(got)), Next: next}
	for i, e := range got {
		page.Events[i] = eventOf(e)
	}
	return answer{status: http.StatusOK, body: page, header: header}, nil
}

// events does not wait longer for etcd than a client for events it has missed.
func (a *API) events(ctx context.Context, after int64, limit int) ([]ownership.Event, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, ioLimit)
	defer cancel()
	return a.Cluster.Events(ctx, after, limit)
}

func goneEvents(err error) error {
	if e, ok := errors.AsType[*ownership.GoneError](err); ok {
		return &refusal{status: http.StatusGone, body: e.Before - 1, text: sentence(err.Error())}
	}
	return err
}

// follow sends events as they come, until the client goes away, does not read, or the
// process ends.
func (a *API) follow(ctx context.Context, w http.ResponseWriter, after int64) error {
	rc := http.NewResponseController(w)
	send := func(data []byte) error {
		_ = rc.SetWriteDeadline(time.Now().Add(reader))
		if _, err := w.Write(data); err != nil {
			return err
		}
		return rc.Flush()
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	if err := send([]byte(": the events after revision " + strconv.FormatInt(after, 10) + "\n\n")); err != nil {
		return err
	}
	quiet := time.Now()
	for seen := after; ; {
		bounded, stop := context.WithTimeout(ctx, time.Until(quiet.Add(ping)))
		got, next, err := a.Cluster.Events(bounded, after, maxPage)
		if err == nil && len(got) == 0 {
			var s *ownership.State
			if s, err = a.Cluster.Wait(bounded, seen); err == nil {
				seen = s.Revision
			}
		}
		late := bounded.Err() != nil
		stop()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case is[*ownership.GoneError](err):
			var b bytes.Buffer
			writeEvent(&b, "", "lagging", problemOf(explain(goneEvents(err))))
			return send(b.Bytes())
		case err != nil && !late:
			return err // it comes back with Last-Event-ID
		}
		after = max(after, next)
		if len(got) == 0 {
			if late {
				if err := send([]byte(": \n\n")); err != nil {
					return err
				}
				quiet = time.Now()
			}
			continue
		}
		var b bytes.Buffer
		for i, e := range got {
			id := strconv.FormatInt(e.Revision, 10)
			if i+1 < len(got) && got[i+1].Revision == e.Revision {
				id = "" // whoever breaks off here has to get both again
			}
			writeEvent(&b, id, e.What, eventOf(e))
		}
		if err := send(b.Bytes()); err != nil {
			return err
		}
		quiet = time.Now()
	}
}

func writeEvent(b *bytes.Buffer, id, what string, data any) {
	if id != "" {
		b.WriteString("id: " + id + "\n")
	}
	b.WriteString("event: " + what + "\ndata: ")
	b.Write(control.Encode(data)) // which ends the line
	b.WriteByte('\n')
}
