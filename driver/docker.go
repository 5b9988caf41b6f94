package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/client"
)

// dockerLimit bounds one question to the Engine, negotiation included. An Engine
// that is starting does not answer before we do.
const dockerLimit = 2 * time.Second

// Engine asks the Docker Engine of this host through its unix socket.
//
// It keeps no connection and no API version between two questions, because the
// Engine may be restarted, upgraded or absent at any of them.
type Engine struct{ socket string }

var _ Docker = (*Engine)(nil)

// NewEngine returns the Engine that listens on socket, an absolute path. Nothing
// need be there yet.
func NewEngine(socket string) *Engine { return &Engine{socket: socket} }

// killLimit bounds the killing of one container. The Engine answers when it has
// ended, for which the kernel may have to wait for its disk.
const killLimit = 15 * time.Second

// Kill kills the containers that are running, paused or restarting and have a
// volume of this name, all at once. One that has it from a directory without vid in
// its path has another volume of that name. After a kill Docker does not restart a
// container by its policy; Swarm makes a new task.
func (e *Engine) Kill(ctx context.Context, volume, vid string) (killed []string, err error) {
	using, err := e.Using(ctx, volume)
	if err != nil {
		return nil, err
	}
	using = slices.DeleteFunc(using, func(c Container) bool { return c.Source != "" && !strings.Contains(c.Source, vid) })
	if len(using) == 0 {
		return nil, nil
	}
	api, err := e.dial()
	if err != nil {
		return nil, err
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	failed := make([]error, len(using))
	var work sync.WaitGroup
	for i, c := range using {
		work.Go(func() {
			if err := api.ContainerKill(ctx, c.ID, "SIGKILL"); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsConflict(err) {
				failed[i] = fmt.Errorf("kill container %s: %w", c.Name, err)
			}
		})
	}
	work.Wait()
	for i, c := range using {
		if failed[i] == nil {
			killed = append(killed, c.Name)
		}
	}
	return killed, errors.Join(failed...)
}

// Root returns the directory in which the Engine keeps its data, as the host knows it.
func (e *Engine) Root(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	api, err := e.dial()
	if err != nil {
		return "", err
	}
	defer api.Close()
	info, err := api.Info(ctx)
	if err != nil {
		return "", fmt.Errorf("ask Docker on %s for its directory: %w", e.socket, err)
	}
	return info.DockerRootDir, nil
}

// dial makes a client. Never of a fixed version: engines refuse those they have
// retired.
func (e *Engine) dial() (*client.Client, error) {
	api, err := client.NewClientWithOpts(client.WithHost("unix://"+e.socket), client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, fmt.Errorf("ask Docker on %s: %w", e.socket, err)
	}
	return api, nil
}

// Using returns the containers that are running, paused or restarting and have a
// volume of this name. The error says which socket did not answer.
func (e *Engine) Using(ctx context.Context, volume string) ([]Container, error) {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	api, err := e.dial()
	if err != nil {
		return nil, err
	}
	defer api.Close()

	found, err := api.ContainerList(ctx, container.ListOptions{Filters: filters.NewArgs(
		filters.Arg("volume", volume),
		filters.Arg("status", container.StateRunning),
		filters.Arg("status", container.StatePaused),
		filters.Arg("status", container.StateRestarting),
	)})
	if err != nil {
		return nil, fmt.Errorf("ask Docker on %s which containers use volume %s: %w", e.socket, volume, err)
	}
	using := make([]Container, 0, len(found))
	for _, c := range found {
		one := Container{ID: c.ID, Name: c.ID[:min(12, len(c.ID))], State: c.State}
		for _, m := range c.Mounts {
			if m.Name == volume {
				one.Source = m.Source
			}
		}
		for _, name := range c.Names {
			// "/web" is the container's own name; "/other/db" is what a link calls it.
			if name = strings.TrimPrefix(name, "/"); name != "" && !strings.Contains(name, "/") {
				one.Name = name
				break
			}
		}
		using = append(using, one)
	}
	return using, nil
}
