package backendtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"

	"golang.org/x/sys/unix"

	"github.com/flocker-plugin/flocker/backends"
)

// blockDevice is a block device of this machine.
type blockDevice struct{ *os.File }

func (d blockDevice) Size() (int64, error) { return d.Seek(0, io.SeekEnd) }

func openBlockDevice(path string, exclusive bool) (Device, error) {
	flags := os.O_RDWR
	if exclusive {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	return blockDevice{f}, nil
}

// open opens an attachment's device.
func (e *env) open(att backends.Attachment, exclusive bool) Device {
	e.Helper()
	device, err := e.tryOpen(att, exclusive)
	if err != nil {
		e.Fatalf("open %s: %v", att.Device, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.opened = append(e.opened, device)
	return device
}

func (e *env) tryOpen(att backends.Attachment, exclusive bool) (Device, error) {
	if e.storage.Open != nil {
		return e.storage.Open(att.Node, att.Device, exclusive)
	}
	return openBlockDevice(att.Device, exclusive)
}

// isBlockDevice demands that the device is one, where devices are real.
func (e *env) isBlockDevice(att backends.Attachment) {
	e.Helper()
	if e.storage.Open != nil {
		return
	}
	info, err := os.Stat(att.Device)
	if err != nil {
		e.Fatalf("device: %v", err)
	}
	if info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0 {
		e.Errorf("%s is no block device: %s", att.Device, info.Mode())
	}
}

// pattern is the data of a volume, which no other has. Some is at its beginning,
// some in the middle and some at its very end.
func (e *env) pattern(vol backends.Volume) map[int64][]byte {
	const length = 64 << 10
	seed := sha256.Sum256([]byte(vol.ID))
	random := rand.NewChaCha8(seed)
	parts := map[int64][]byte{}
	for _, offset := range []int64{0, vol.Size / 2 / 4096 * 4096, vol.Size - length} {
		data := make([]byte, length)
		_, _ = random.Read(data) // never fails
		parts[offset] = data
	}
	return parts
}

// write writes the volume's pattern to the attachment's device.
func (e *env) write(att backends.Attachment, vol backends.Volume) {
	e.Helper()
	device := e.open(att, false)
	for offset, data := range e.pattern(vol) {
		if _, err := device.WriteAt(data, offset); err != nil {
			e.Fatalf("write %s: %v", att.Device, err)
		}
	}
	if err := device.Sync(); err != nil {
		e.Fatalf("sync %s: %v", att.Device, err)
	}
	if err := device.Close(); err != nil {
		e.Fatalf("close %s: %v", att.Device, err)
	}
}

// verify demands that the attachment's device has the volume's pattern.
func (e *env) verify(att backends.Attachment, vol backends.Volume) {
	e.Helper()
	device := e.open(att, false)
	for offset, want := range e.pattern(vol) {
		got := make([]byte, len(want))
		if _, err := device.ReadAt(got, offset); err != nil {
			e.Fatalf("read %s: %v", att.Device, err)
		}
		if !bytes.Equal(got, want) {
			e.Errorf("%s at %d: got data with checksum %s, want %s", att.Device, offset, checksum(got), checksum(want))
		}
	}
	if err := device.Close(); err != nil {
		e.Fatalf("close %s: %v", att.Device, err)
	}
}

// wantNoData demands that the device of an attachment that is gone does not have the
// volume's pattern. The path may be there, and be another device by now.
func (e *env) wantNoData(att backends.Attachment, vol backends.Volume) {
	e.Helper()
	device, err := e.tryOpen(att, false)
	if err != nil {
		return
	}
	for offset, data := range e.pattern(vol) {
		got := make([]byte, len(data))
		if n, err := device.ReadAt(got, offset); err == nil && bytes.Equal(got[:n], data) {
			e.Errorf("%s still has the volume's data after detach", att.Device)
		}
	}
	_ = device.Close()
}

func checksum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:4])
}

// deviceSize returns the size of the attachment's device in bytes.
func (e *env) deviceSize(att backends.Attachment) int64 {
	e.Helper()
	device := e.open(att, false)
	defer device.Close()
	size, err := device.Size()
	if err != nil {
		e.Fatalf("size of %s: %v", att.Device, err)
	}
	return size
}
