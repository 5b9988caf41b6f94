package links_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/share/links"
)

type note struct{ By string }

// Of many who make a note at once one succeeds, and the others see whole what it says.
func TestMakeAtOnce(t *testing.T) {
	d := &links.Dir{Path: t.TempDir()}
	for round := range 50 {
		name := fmt.Sprint("n", round)
		is, errs := make([]note, 8), make([]error, 8)
		var all sync.WaitGroup
		for i := range is {
			all.Go(func() { is[i], errs[i] = links.Make(d, name, note{fmt.Sprint(i)}) })
		}
		all.Wait()
		winners := 0
		for i := range is {
			if is[i] != is[0] {
				t.Errorf("one sees %+v, another %+v", is[0], is[i])
			}
			if is[i].By == fmt.Sprint(i) {
				winners++
			}
		}
		if err := errors.Join(errs...); err != nil || winners != 1 {
			t.Fatalf("%d have made the note, %v", winners, err)
		}
	}
	found, err := links.Find[note](d, "n4", "9")
	if err != nil || len(found) != 1 {
		t.Errorf("got %v, %v; want n49 alone", found, err)
	}
}

func TestDamaged(t *testing.T) {
	d := &links.Dir{Path: t.TempDir()}
	path := filepath.Join(d.Path, "n")
	if err := os.Symlink("{", path); err != nil {
		t.Fatal(err)
	}
	_, err := links.Read[note](d, "n")
	if !errors.Is(err, backends.ErrUnavailable) || err.Error() != path+" is damaged: unexpected end of JSON input" {
		t.Errorf("got %v", err)
	}
	if _, err := links.Make(d, "n", note{"me"}); !errors.Is(err, backends.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

// A call about one subject waits for the one before; one about another does not, and
// whoever has given up is not served any more.
func TestOneAtATime(t *testing.T) {
	d := &links.Dir{Path: t.TempDir()}
	if err := os.Symlink("here", filepath.Join(d.Path, links.Mark)); err != nil {
		t.Fatal(err)
	}
	begun, end := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		_, err := links.Do(t.Context(), d, "first", "/x", func(ref string) (string, error) {
			close(begun)
			<-end
			return ref, nil
		})
		first <- err
	}()
	<-begun
	if ref, err := links.Do(t.Context(), d, "other", "here/y", func(ref string) (string, error) { return ref, nil }); ref != "here/y" || err != nil {
		t.Errorf("got %q, %v", ref, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := links.Do(short, d, "second", "/x", func(string) (string, error) {
		t.Error("it was served although nobody waited any more")
		return "", nil
	})
	if !errors.Is(err, backends.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(end)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := links.Do(t.Context(), d, "third", "/x", func(string) (string, error) { return "", nil }); err != nil {
		t.Error(err)
	}
}
