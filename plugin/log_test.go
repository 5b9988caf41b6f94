package main

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
)

// stalled is a reader that reads only once it is let.
type stalled struct {
	lockedBuffer
	let chan struct{}
}

func (s *stalled) Write(p []byte) (int, error) {
	<-s.let
	return s.lockedBuffer.Write(p)
}

// A dockerd that stalls must not stall us, and what is lost must be known.
func TestLogOfStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &stalled{let: make(chan struct{})}
		w := newAsyncWriter(out)
		log := newLog(w, logrus.InfoLevel)
		start := time.Now()
		for i := range logLines + 101 { // the writer holds one
			log.WithField("i", i).Info("line")
			synctest.Wait()
		}
		if took := time.Since(start); took > 0 {
			t.Errorf("logging took %v", took)
		}
		close(out.let)
		w.flush()
		got := out.String()
		if n := strings.Count(got, "\n"); n != logLines+2 {
			t.Errorf("got %d lines, want %d", n, logLines+2)
		}
		if want := fmt.Sprintf("level=info msg=line i=%d\n", logLines); !strings.HasSuffix(got, want) {
			t.Errorf("last line is not %q", want)
		}
		if want := `level=warning msg="log lines dropped: nobody read them in time" lines=100` + "\n"; strings.Count(got, want) != 1 {
			t.Errorf("got %.300s…, want %s once in it", got, want)
		}
	})
}

func TestLogFlushIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &stalled{let: make(chan struct{})}
		w := newAsyncWriter(out)
		newLog(w, logrus.InfoLevel).Info("line")
		start := time.Now()
		w.flush()
		if took := time.Since(start); took != logFlush {
			t.Errorf("flush took %v, want %v", took, logFlush)
		}
		close(out.let)
	})
}

// dockerd stops reading at a line of 64 KiB.
func TestLogLongLine(t *testing.T) {
	out := &lockedBuffer{}
	w := newAsyncWriter(out)
	log := newLog(w, logrus.InfoLevel)
	log.Info(strings.Repeat("x", 1<<20))
	log.Info("next")
	w.flush()
	if got := out.String(); len(got) > logLineMax+100 || !strings.HasSuffix(got, "x\nlevel=info msg=next\n") {
		t.Errorf("got %d bytes, %.20q…%.40q", len(got), got, got[len(got)-40:])
	}
}
