package main

import (
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	logLines   = 1024        // kept while nobody reads
	logLineMax = 16 << 10    // dockerd stops reading at 64 KiB, its own part included
	logFlush   = time.Second // for what is left at the end
)

// An asyncWriter passes lines on without ever waiting for their reader: a dockerd
// that stalls stops reading our output, and must not stop our work with it. Lines
// that find the buffer full are dropped, and their number is written later.
type asyncWriter struct {
	out     io.Writer
	lines   chan []byte
	dropped atomic.Int64
	done    chan struct{}
	once    sync.Once // stop is closed once
	stop    chan struct{}
}

func newAsyncWriter(out io.Writer) *asyncWriter {
	w := &asyncWriter{out: out, lines: make(chan []byte, logLines), done: make(chan struct{}), stop: make(chan struct{})}
	go w.run()
	return w
}

// Write takes one line, or one message of several, and never fails.
func (w *asyncWriter) Write(p []byte) (int, error) {
	line := append(make([]byte, 0, min(len(p), logLineMax)), p[:min(len(p), logLineMax)]...)
	if len(line) < len(p) {
		line[len(line)-1] = '\n'
	}
	select {
	case w.lines <- line:
	default:
		w.dropped.Add(1)
	}
	return len(p), nil
}

func (w *asyncWriter) run() {
	defer close(w.done)
	for {
		select {
		case line := <-w.lines:
			w.pass(line)
		case <-w.stop:
			for {
				select {
				case line := <-w.lines:
					w.pass(line)
				default:
					return
				}
			}
		}
	}
}

func (w *asyncWriter) pass(line []byte) {
	w.out.Write(line) //nolint:errcheck // there is no other place to complain to
	if n := w.dropped.Swap(0); n > 0 {
		log := logrus.New()
		log.SetOutput(w.out)
		log.SetFormatter(logFormat)
		log.WithField("lines", n).Warn("log lines dropped: nobody read them in time")
	}
}

// flush writes what is left, for a second at most. Later lines are lost.
func (w *asyncWriter) flush() {
	w.once.Do(func() { close(w.stop) })
	select {
	case <-w.done:
	case <-time.After(logFlush):
	}
}

// logFormat is short: dockerd and journald add the time and quote the line.
var logFormat = &logrus.TextFormatter{DisableColors: true, DisableTimestamp: true}

func newLog(out io.Writer, level logrus.Level) *logrus.Entry {
	log := logrus.New()
	log.SetOutput(out)
	log.SetFormatter(logFormat)
	log.SetLevel(level)
	return logrus.NewEntry(log)
}

// A logWriter makes log lines of what net/http prints.
type logWriter struct{ log *logrus.Entry }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Warn(strings.TrimSpace(string(p)))
	return len(p), nil
}
