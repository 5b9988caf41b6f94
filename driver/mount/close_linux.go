package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Close proves that a device is closed. See Mounter.
func (s *System) Close(ctx context.Context, device string) error {
	if err := s.close(ctx, device); err != nil {
		return fmt.Errorf("close %s: %w", device, err)
	}
	return nil
}

func (s *System) close(ctx context.Context, device string) error {
	dev, err := openExclusive(ctx, device)
	if err != nil {
		return err
	}
	// If the device does not answer, nobody else can open it until it does.
	return bounded(ctx, func() error {
		defer dev.Close()
		return s.prove(ctx, dev)
	})
}

// prove is Close with the device open.
func (s *System) prove(ctx context.Context, dev *blockDevice) error {
	// A device-mapper or RAID device on top claims it as we did, and is seen above
	// on most kernels; its name is worth telling.
	holders, err := os.ReadDir(dev.sys() + "/holders")
	if err != nil && !isNotExist(err) { // a partition has none
		return fmt.Errorf("list holders: %w", err)
	}
	if len(holders) > 0 {
		return fmt.Errorf("%w: %s is on top of it", ErrBusy, holders[0].Name())
	}
	lost := s.flush(dev)
	if s.isCut(dev.rdev) {
		lost = nil
	}
	err = retryBusy(ctx, 300*time.Millisecond, func() error {
		b, readErr := os.ReadFile(dev.sys() + "/inflight")
		if readErr != nil {
			return fmt.Errorf("read requests in flight: %w", readErr)
		}
		if n := strings.Fields(string(b)); len(n) != 2 || n[0] != "0" || n[1] != "0" {
			return fmt.Errorf("%w: requests in flight (reads and writes): %s", ErrBusy, strings.Join(n, " "))
		}
		return nil
	})
	if err != nil {
		return err // and not ErrUnwritten, which says that it is closed
	}
	return errors.Join(lost, dev.File.Close())
}

// flush writes what the device's own buffers hold and drops them. What the device
// does not take is dropped as well, so that nothing of it can come later.
func (s *System) flush(dev *blockDevice) error {
	err := s.at("flush")
	if err == nil {
		err = dev.Sync()
	}
	if err != nil {
		err = fmt.Errorf("%w: flush: %w", ErrUnwritten, err)
	}
	if dropErr := unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0); dropErr != nil {
		err = errors.Join(err, fmt.Errorf("%w: drop buffers: %w", ErrUnwritten, dropErr))
	}
	return err
}
