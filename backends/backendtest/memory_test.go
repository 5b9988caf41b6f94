package backendtest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/backendtest"
)

func storage(m *backendtest.Memory) backendtest.Storage {
	return backendtest.Storage{
		Node: m.NodeIn,
		Open: func(node, device string, _ bool) (backendtest.Device, error) { return m.Open(node, device) },
	}
}

func TestMemory(t *testing.T) {
	for name, props := range map[string]backends.Properties{
		"F1":           {},
		"F0":           {Class: backends.ClassNone, AllocationUnit: 1},
		"F0 exclusive": {Class: backends.ClassNone, ExclusiveAttach: true},
		"F2":           {Class: backends.ClassFenced},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, backendtest.Config{
				New: func(backendtest.T) backendtest.Storage { return storage(backendtest.NewMemory(props)) },
			})
		})
	}
}

func TestMemoryFaults(t *testing.T) {
	m := backendtest.NewMemory(backends.Properties{})
	b := m.Node("a")
	req := backends.CreateRequest{ID: "id", Size: 1}
	broken := errors.New("broken")
	m.SetFault(func(_ context.Context, call backendtest.Call) error {
		if call.Method == "Create" && call.Node == "a" && call.Volume == "id" && call.Done {
			return broken
		}
		return nil
	})
	if _, err := b.Create(t.Context(), req); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
	m.SetFault(nil)
	vols, err := b.List(t.Context())
	if err != nil || len(vols) != 1 {
		t.Errorf("got %v, %v; want the volume whose reply was lost", vols, err)
	}
	if got := m.Calls(); got["Create"] != 1 || got["List"] != 1 || got["Delete"] != 0 {
		t.Errorf("got %v", got)
	}
}

func TestMemoryReboot(t *testing.T) {
	for class, want := range map[backends.Class]int{backends.ClassNone: 0, backends.ClassExclusive: 1} {
		m := backendtest.NewMemory(backends.Properties{Class: class})
		b := m.Node("a")
		vol, err := b.Create(t.Context(), backends.CreateRequest{ID: "id", Size: 1})
		if err != nil {
			t.Fatal(err)
		}
		att, err := b.Attach(t.Context(), backends.AttachRequest{Ref: vol.Ref, Volume: "id", Token: 1})
		if err != nil {
			t.Fatal(err)
		}
		device, err := m.Open("a", att.Device)
		if err != nil {
			t.Fatal(err)
		}
		m.Reboot("a")
		if got := len(m.Attached("id")); got != want {
			t.Errorf("class %s: got %d attachments after a reboot, want %d", class, got, want)
		}
		if _, err := device.WriteAt([]byte("x"), 0); err == nil {
			t.Errorf("class %s: a write of before the reboot has come through", class)
		}
	}
}
