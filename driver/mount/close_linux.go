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
	defer dev.Close()
	// A device-mapper or RAID device on top claims it as we did, and is seen above
	// on most kernels; its name is worth telling.
	holders, err := os.ReadDir(dev.sys() + "/holders")
	if err != nil && !isNotExist(err) { // a partition has none
		return fmt.Errorf("list holders: %w", err)
	}
	if len(holders) > 0 {
		return fmt.Errorf("%w: %s is on top of it", ErrBusy, holders[0].Name())
	}
	if err = s.at("flush"); err != nil {
		return err
	}
	if err = dev.Sync(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	if err = unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("drop buffers: %w", err)
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
	return errors.Join(err, dev.File.Close())
}
