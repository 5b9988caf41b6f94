package openstack

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/backends"
)

// guest is where a server of Nova's finds out which it is.
type guest struct {
	metadata string // URL of the metadata service
	dmi      string // what the firmware says
	// drive returns meta_data.json of the config drive; empty if there is none.
	drive func(ctx context.Context) ([]byte, error)
}

var thisGuest = guest{
	metadata: "http://169.254.169.254/openstack/latest/meta_data.json", dmi: "/sys/class/dmi/id", drive: configDrive,
}

// serverID returns the UUID of this host in Nova. The firmware is asked first, as it is
// always there and nobody between can answer for it; a hypervisor that does not tell it
// is known by not calling itself OpenStack.
func (g guest) serverID(ctx context.Context) (string, error) {
	product, _ := os.ReadFile(filepath.Join(g.dmi, "product_name"))
	if strings.HasPrefix(string(product), "OpenStack") {
		id, err := os.ReadFile(filepath.Join(g.dmi, "product_uuid"))
		if id := strings.ToLower(strings.TrimSpace(string(id))); err == nil && uuidForm.MatchString(id) {
			return id, nil
		}
	}
	doc, err := g.service(ctx)
	if err != nil {
		var driveErr error
		if doc, driveErr = g.drive(ctx); driveErr != nil {
			return "", backends.Classify(backends.ErrUnavailable, fmt.Errorf("this host does not know which server of Nova's it is: "+
				"its firmware does not say so, the metadata service says: %w, and the config drive: %w; set server_id", err, driveErr))
		}
	}
	var meta struct {
		UUID string `json:"uuid"`
	}
	if err := json.Unmarshal(doc, &meta); err != nil || !uuidForm.MatchString(meta.UUID) {
		return "", fmt.Errorf("this host's metadata has no UUID; set server_id: %w", backends.ErrUnavailable)
	}
	return meta.UUID, nil
}

func (g guest) service(ctx context.Context) ([]byte, error) {
	bounded, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(bounded, http.MethodGet, g.metadata, nil)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and no proxy
	resp, err := client.Do(req)
	if err != nil {
		return nil, bare(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s", resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}

// configDrive reads the disk that Nova may give a server instead of the service.
func configDrive(ctx context.Context) ([]byte, error) {
	found, err := exec.CommandContext(ctx, "blkid", "-t", "LABEL=config-2", "-o", "device").Output()
	path := strings.TrimSpace(string(found))
	if err != nil || path == "" {
		return nil, fmt.Errorf("there is none")
	}
	dir, err := os.MkdirTemp("", "config-2-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	if out, err := exec.CommandContext(ctx, "mount", "-o", "ro", path, dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mount %s: %w (%s)", path, err, strings.TrimSpace(string(out)))
	}
	defer func() { _ = exec.CommandContext(context.WithoutCancel(ctx), "umount", dir).Run() }()
	return os.ReadFile(filepath.Join(dir, "openstack", "latest", "meta_data.json"))
}
