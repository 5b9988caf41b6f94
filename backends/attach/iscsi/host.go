package iscsi

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/flocker-plugin/flocker/backends"
)

// The ways to make devices.
const (
	ByKernel  = "kernel"
	ByProgram = "fuse"
)

// Host makes devices in one of the ways, and knows those of both.
type Host struct {
	method  string // empty is the kernel's, where this host has that
	kernel  *Kernel
	program *Program
}

var _ Initiator = (*Host)(nil)

// NewHost makes an initiator of a kernel's and a program.
func NewHost(method string, kernel *Kernel, program *Program) (*Host, error) {
	if method != "" && method != ByKernel && method != ByProgram {
		return nil, fmt.Errorf("%q is no way to attach an iSCSI unit: use %s or %s, or leave it out: %w", method, ByKernel, ByProgram, backends.ErrInvalid)
	}
	return &Host{method, kernel, program}, nil
}

// Devices implements Initiator.
func (h *Host) Devices(ctx context.Context) ([]Device, error) {
	disks, err := h.kernel.Devices(ctx)
	if err != nil {
		return nil, err
	}
	loops, err := h.program.Devices(ctx)
	return append(disks, loops...), err
}

// Connect implements Initiator.
func (h *Host) Connect(ctx context.Context, lun LUN) (Device, error) {
	all, err := h.Devices(ctx)
	if err != nil {
		return Device{}, err
	}
	if i := slices.IndexFunc(all, func(d Device) bool { return d.Is(lun) }); i >= 0 {
		return h.of(all[i]).Connect(ctx, lun)
	}
	return h.chosen(ctx, lun).Connect(ctx, lun)
}

// chosen is what makes a new device. Where the kernel has a session with the target, it is the kernel: what
// was sent by a session that is broken could arrive after what a program sends, of whose sessions it knows
// nothing.
func (h *Host) chosen(ctx context.Context, lun LUN) Initiator {
	if h.method == ByKernel || h.method == "" && h.kernel.can(ctx) || h.kernel.knows(lun.Target) {
		return h.kernel
	}
	return h.program
}

// of returns who has made a device.
func (h *Host) of(d Device) Initiator {
	if strings.HasPrefix(d.Path, "/dev/loop") {
		return h.program
	}
	return h.kernel
}

// Served implements Initiator.
func (h *Host) Served(d Device) (bool, error) { return h.of(d).Served(d) }

// Disconnect implements Initiator.
func (h *Host) Disconnect(ctx context.Context, d Device) (clean bool, err error) {
	return h.of(d).Disconnect(ctx, d)
}
