package iscsi_test

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/attach/iscsi"
)

// TestHost: a host whose kernel has no initiator uses a program, unless it is told otherwise.
func TestHost(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	if _, err := os.Stat("/sys/class/iscsi_transport/tcp"); err == nil {
		t.Skip("this kernel has an initiator")
	}
	as := func(method string) *iscsi.Host {
		h, err := iscsi.NewHost(method, iscsi.NewKernel(iscsi.KernelConfig{Dir: t.TempDir(), Name: host}), r.Program)
		must(t, err)
		return h
	}
	if _, err := as(iscsi.ByKernel).Connect(t.Context(), r.lun); !errors.Is(err, backends.ErrUnavailable) || !strings.Contains(err.Error(), "this host") {
		t.Errorf("got %v", err)
	}
	r.wants()
	for _, method := range []string{"", iscsi.ByProgram} {
		h := as(method)
		d, err := h.Connect(t.Context(), r.lun)
		must(t, err)
		r.wants(d)
		// Also one that was made before the setting was changed.
		other := as(iscsi.ByKernel)
		if again, err := other.Connect(t.Context(), r.lun); err != nil || again != d {
			t.Errorf("got %v, %v; want %v", again, err, d)
		}
		if all, err := other.Devices(t.Context()); err != nil || !slices.Equal(all, []iscsi.Device{d}) {
			t.Errorf("got %v, %v; want %v", all, err, d)
		}
		if served, err := other.Served(d); err != nil || !served {
			t.Errorf("got %t, %v", served, err)
		}
		if clean, err := other.Disconnect(t.Context(), d); err != nil || !clean {
			t.Errorf("got %t, %v", clean, err)
		}
		r.wants()
	}
	if _, err := iscsi.NewHost("nbd", nil, nil); !errors.Is(err, backends.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}
