package csitest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ready looks a volume up for its node service: it has to be published to the node.
func (s *service) ready(id string, c *csi.VolumeCapability, volumeContext, publishContext, secrets map[string]string) (*volume, error) {
	d := s.d
	if id == "" {
		return nil, invalid("the volume id is missing")
	}
	if err := d.checkCapability(c); err != nil {
		return nil, err
	}
	if err := d.checkSecrets(secrets); err != nil {
		return nil, err
	}
	v, err := d.findWith(id, volumeContext)
	if err != nil {
		return nil, err
	}
	if !d.opts.Publish {
		if len(publishContext) > 0 {
			return nil, invalid("there is no publish context")
		}
		return v, nil
	}
	context, ok := v.published[NodeID(s.node)]
	switch {
	case !ok:
		// With Cuts the controller may be quicker than a call on its way.
		if !d.opts.Cuts {
			d.violation("volume %s is used on %s, and not published to it", v.name, s.node)
		}
		return nil, status.Error(codes.FailedPrecondition, "the volume is not published to this node")
	case !maps.Equal(context, publishContext):
		return nil, invalid("the publish context is another one")
	}
	return v, nil
}

func (s *service) NodeStageVolume(_ context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.opts.Stage {
		return nil, status.Error(codes.Unimplemented, "there is no staging")
	}
	if req.GetStagingTargetPath() == "" {
		return nil, invalid("the staging path is missing")
	}
	v, err := s.ready(req.GetVolumeId(), req.GetVolumeCapability(), req.GetVolumeContext(), req.GetPublishContext(), req.GetSecrets())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(d.path(s.node, req.GetStagingTargetPath())); err != nil || !info.IsDir() {
		return nil, invalid("the staging path is no directory")
	}
	if st := v.staged[s.node]; st != nil {
		if st.path != req.GetStagingTargetPath() {
			d.violation("volume %s is staged on %s at two paths", v.name, s.node)
			return nil, status.Error(codes.AlreadyExists, "the volume is staged elsewhere")
		}
		return &csi.NodeStageVolumeResponse{}, nil
	}
	l, err := d.attach(v)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	v.staged[s.node] = &staged{path: req.GetStagingTargetPath(), loop: l, targets: map[string]bool{}}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (s *service) NodeUnstageVolume(_ context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetVolumeId() == "" || req.GetStagingTargetPath() == "" {
		return nil, invalid("the volume id or the staging path is missing")
	}
	v, err := d.find(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	st := v.staged[s.node]
	if st == nil || st.path != req.GetStagingTargetPath() {
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	if len(st.targets) > 0 {
		d.violation("volume %s was unstaged on %s before it was unpublished", v.name, s.node)
		return nil, status.Error(codes.FailedPrecondition, "the volume is published on this node")
	}
	if err := st.loop.clear(); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	delete(v.staged, s.node)
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func (s *service) NodePublishVolume(_ context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetTargetPath() == "" {
		return nil, invalid("the target path is missing")
	}
	v, err := s.ready(req.GetVolumeId(), req.GetVolumeCapability(), req.GetVolumeContext(), req.GetPublishContext(), req.GetSecrets())
	if err != nil {
		return nil, err
	}
	st := v.staged[s.node]
	switch {
	case d.opts.Stage && req.GetStagingTargetPath() == "":
		return nil, status.Error(codes.FailedPrecondition, "the staging path is missing")
	case d.opts.Stage && (st == nil || st.path != req.GetStagingTargetPath()):
		d.violation("volume %s was published on %s before it was staged", v.name, s.node)
		return nil, status.Error(codes.FailedPrecondition, "the volume is not staged there")
	case st == nil:
		l, err := d.attach(v)
		if err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		st = &staged{loop: l, targets: map[string]bool{}}
		v.staged[s.node] = st
	}
	if st.targets[req.GetTargetPath()] {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if len(st.targets) > 0 {
		d.violation("volume %s was published on %s at two paths", v.name, s.node)
		return nil, status.Error(codes.FailedPrecondition, "the volume is published at another path")
	}
	if err := d.place(s.node, st.loop, req.GetTargetPath()); err != nil {
		if !d.opts.Stage {
			err = errors.Join(err, st.loop.clear())
			delete(v.staged, s.node)
		}
		return nil, status.Error(codes.Internal, err.Error())
	}
	st.targets[req.GetTargetPath()] = true
	return &csi.NodePublishVolumeResponse{}, nil
}

func (s *service) NodeUnpublishVolume(_ context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetVolumeId() == "" || req.GetTargetPath() == "" {
		return nil, invalid("the volume id or the target path is missing")
	}
	v, err := d.find(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	st := v.staged[s.node]
	if st == nil || !st.targets[req.GetTargetPath()] {
		return &csi.NodeUnpublishVolumeResponse{}, nil
	}
	if err := d.unplace(s.node, req.GetTargetPath()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	delete(st.targets, req.GetTargetPath())
	if !d.opts.Stage {
		if err := st.loop.clear(); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		delete(v.staged, s.node)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (s *service) NodeExpandVolume(_ context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.GetVolumePath() == "" {
		return nil, invalid("the volume path is missing")
	}
	v, err := d.find(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	st := v.staged[s.node]
	if st == nil || !st.targets[req.GetVolumePath()] {
		return nil, status.Error(codes.NotFound, "the volume is not published there")
	}
	v.shown = v.size
	if err := st.loop.grow(); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.size}, nil
}

// path is where a path of a node is to be found here.
func (d *Driver) path(node, path string) string {
	if e, ok := d.opts.Elsewhere[node]; ok {
		return e.Path(path)
	}
	return path
}

// place puts a device at a target path.
func (d *Driver) place(node string, l *loop, inside string) error {
	target := d.path(node, inside)
	if d.opts.MountOnly {
		return os.MkdirAll(target, 0o700)
	}
	if d.opts.Mknod {
		err := unix.Mknod(target, unix.S_IFBLK|0o600, int(l.rdev()))
		if err != nil {
			err = &os.PathError{Op: "mknod", Path: target, Err: err}
		}
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if e, ok := d.opts.Elsewhere[node]; ok {
		return e.Run("mount", "--bind", l.path, inside)
	}
	return os.NewSyscallError("mount", unix.Mount(l.path, target, "", unix.MS_BIND, ""))
}

// unplace removes what is at a target path.
func (d *Driver) unplace(node, inside string) error {
	target := d.path(node, inside)
	if e, ok := d.opts.Elsewhere[node]; ok && !d.opts.Mknod {
		if err := e.Run("umount", inside); err != nil {
			return err
		}
	} else if err := unix.Unmount(target, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return os.NewSyscallError("umount", err)
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// loop is a loop device that has a volume.
type loop struct {
	number int
	path   string
	file   unix.Stat_t
}

func (l *loop) rdev() uint64 {
	var st unix.Stat_t
	if err := unix.Stat(l.path, &st); err != nil {
		return 0
	}
	return st.Rdev
}

func (d *Driver) attach(v *volume) (*loop, error) {
	if d.opts.Lazy {
		return attach(d.file(v.id), v.shown)
	}
	return attach(d.file(v.id), 0)
}

// attach gives a free loop device a file, up to a limit that is not 0. Other programs take free ones as well.
func attach(path string, limit int64) (*loop, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var info unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &info); err != nil {
		return nil, os.NewSyscallError("stat", err)
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 100 {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		l := &loop{number: number, path: fmt.Sprintf("/dev/loop%d", number), file: info}
		dev, err := os.OpenFile(l.path, os.O_RDWR, 0)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{
			Fd: uint32(f.Fd()), Size: 512, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO, Sizelimit: uint64(limit)},
		})
		if err == nil {
			err = os.NewSyscallError("BLKROSET", unix.IoctlSetPointerInt(int(dev.Fd()), unix.BLKROSET, 0))
			return l, errors.Join(err, dev.Close())
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) {
			return nil, os.NewSyscallError("LOOP_CONFIGURE", err)
		}
	}
	return nil, errors.New("there is no free loop device")
}

// open opens the device, if it still has the volume's file; nil if it has not.
func (l *loop) open() (*os.File, *unix.LoopInfo64, error) {
	dev, err := os.OpenFile(l.path, os.O_RDWR, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
	if err == nil && info.Device == l.file.Dev && info.Inode == l.file.Ino {
		return dev, info, nil
	}
	_ = dev.Close()
	if err == nil || errors.Is(err, unix.ENXIO) {
		return nil, nil, nil
	}
	return nil, nil, os.NewSyscallError("LOOP_GET_STATUS64", err)
}

// cut ends the I/O of the device whether it is open or not: it moves the device's
// beginning behind the end of the file. What was written before is kept, what has not
// arrived fails.
func (l *loop) cut() error {
	dev, info, err := l.open()
	if err != nil || dev == nil {
		return err
	}
	defer dev.Close()
	info.Offset = 1 << 50
	return os.NewSyscallError("LOOP_SET_STATUS64", unix.IoctlLoopSetStatus64(int(dev.Fd()), info))
}

// grow makes the device as large as the file.
func (l *loop) grow() error {
	dev, info, err := l.open()
	if err != nil || dev == nil {
		return err
	}
	defer dev.Close()
	if info.Sizelimit > 0 {
		info.Sizelimit = 0
		return os.NewSyscallError("LOOP_SET_STATUS64", unix.IoctlLoopSetStatus64(int(dev.Fd()), info))
	}
	return os.NewSyscallError("LOOP_SET_CAPACITY", unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0))
}

// clear takes the file from the device. The kernel does so when the last user of the
// device has closed it, such as somebody who looks at all devices; one that was cut may
// stay open for long.
func (l *loop) clear() error {
	dev, info, err := l.open()
	if err != nil || dev == nil {
		return err
	}
	err = os.NewSyscallError("LOOP_CLR_FD", unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0))
	if err = errors.Join(err, dev.Close()); err != nil || info.Offset > 0 {
		return err
	}
	for range 400 {
		if dev, _, err = l.open(); err != nil || dev == nil {
			return err
		}
		_ = dev.Close()
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}
