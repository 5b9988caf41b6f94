package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/control/certs"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

func (a *Admin) about(context.Context, *http.Request) (any, error) {
	return api.Version{Version: a.version, Host: a.owners.Node().Host}, nil
}

func (a *Admin) volumes(ctx context.Context, _ *http.Request) (any, error) {
	all, stale := a.driver.Survey(ctx)
	answer := api.Volumes{Volumes: make([]api.Volume, len(all)), Stale: stale}
	for i, v := range all {
		answer.Volumes[i] = volume(v)
	}
	return answer, nil
}

func (a *Admin) volume(ctx context.Context, r *http.Request) (any, error) {
	// While etcd is away, a name that is not known would be waited for.
	ctx, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	name := r.PathValue("name")
	v, err := a.driver.Get(ctx, name)
	if errors.Is(err, ownership.ErrNotFound) {
		return nil, &refusal{http.StatusNotFound, fmt.Sprintf("there is no volume %q: docker flocker ls shows those there are", name)}
	}
	return volume(v), err
}

func volume(v driver.Volume) api.Volume {
	d := v.Definition
	shown := api.Volume{
		Name: v.Name, ID: d.ID, Mountpoint: v.Mountpoint, Bytes: d.Size, Filesystem: d.FS, Backend: d.Backend,
		Profile: d.Profile, Options: maps.Clone(d.Options), Labels: d.Labels, Created: v.CreatedAt,
	}
	for key, value := range map[string]string{"mkfs": d.Mkfs, "mount": d.Mount} {
		if value != "" {
			if shown.Options == nil {
				shown.Options = map[string]string{}
			}
			shown.Options[key] = value
		}
	}
	shown.State, _ = v.Status["state"].(string)
	shown.Detail, _ = v.Status["detail"].(string)
	shown.Host, _ = v.Status["owner"].(string)
	shown.Token, _ = v.Status["token"].(int64)
	shown.Mounts, _ = v.Status["mounts"].(int)
	shown.Containers, _ = v.Status["containers"].([]string)
	shown.Waiting, _ = v.Status["waiting"].([]string)
	shown.Placement, _ = v.Status["placement"].(string)
	shown.PlacementError, _ = v.Status["placement_error"].(string)
	shown.Stale, _ = v.Status["stale"].(bool)
	return shown
}

func (a *Admin) status(ctx context.Context, _ *http.Request) (any, error) {
	me := a.owners.Node()
	answer := api.Status{
		Host: me.Host, Node: me.ID, Version: a.version, Cluster: a.owners.Cluster(),
		Volumes: map[string]int{}, Attention: []string{},
	}
	look := func(format string, args ...any) {
		answer.Attention = append(answer.Attention, fmt.Sprintf(format, args...))
	}
	bounded, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	nodes, err := a.driver.Nodes(bounded)
	if err != nil {
		nodes = nil
	}
	if failed := a.owners.Live(); failed != nil {
		err = failed // it says more
	}
	if err != nil {
		answer.Etcd = err.Error()
		look("this host cannot use etcd, so nothing can be mounted anew here: %v", err)
	}
	if nodes != nil {
		answer.Hosts = map[string]int{}
	}
	for _, n := range nodes {
		state := "live"
		switch {
		case n.State == "removed":
			state = n.State
		case n.Death != nil && n.Live:
			state = "giving up"
			look("host %s was declared dead and answers: it is giving up its volumes", n.Host)
		case n.Death != nil:
			state = "declared dead"
		case n.ID == me.ID && err != nil:
			state = "silent" // which has been said
		case !n.Live:
			state = "silent"
			look("host %s is silent: docker flocker node ls shows since when; if it is switched off, and its volumes are wanted, type: docker flocker node confirm-dead %s", n.Host, n.Host)
		}
		answer.Hosts[state]++
	}
	for _, e := range a.certificates() {
		if text := e.Warning(time.Now()); text != "" {
			look("%s: %s", text, certs.Renewal)
		}
	}
	volumes, _ := a.driver.Survey(ctx)
	for _, v := range volumes {
		shown := volume(v)
		answer.Volumes[shown.State]++
		switch shown.State {
		case string(ownership.PhaseQuarantined):
			look("volume %s is quarantined: %s; when it is seen to, type: docker flocker volume reinstate %s", v.Name, shown.Detail, v.Name)
		case "lost", ownership.StateTaken:
			look("volume %s is %s: %s", v.Name, shown.State, shown.Detail)
		case string(ownership.PhaseCreating):
			if time.Since(v.CreatedAt) > unfinished {
				look("volume %s is being made since %s: if the host that makes it was stopped, the next mount finishes it, or type: docker flocker rm %s", v.Name, v.CreatedAt.UTC().Format(time.RFC3339), v.Name)
			}
		}
	}
	if more := len(answer.Attention) - maxAttention; more > 0 {
		answer.Attention = append(slices.Clip(answer.Attention[:maxAttention]), fmt.Sprintf("and %d more", more))
	}
	return answer, nil
}

// unfinished is for how long nothing is amiss with a volume that is being made.
const unfinished = 5 * time.Minute

// maxAttention is how much of what needs attention is told at once.
const maxAttention = 20

// host is what the plugin sees of its host; the questions go out at once.
func (a *Admin) host(ctx context.Context, _ *http.Request) (any, error) {
	var (
		servers []ownership.Server
		asked   sync.WaitGroup
	)
	asked.Go(func() { servers = a.owners.Servers(ctx) })
	h := a.driver.Host(ctx)
	asked.Wait()
	answer := api.Host{
		MountRoot: h.MountRoot, Filesystems: h.Filesystems, Lacks: h.Lacks, Docker: sentence(h.Docker), MountError: sentence(h.Err),
		Unmounted: h.Unmounted, Mounts: []api.Mount{}, Devices: []api.Device{}, Etcd: []api.Server{},
	}
	for _, m := range h.Mounts {
		answer.Mounts = append(answer.Mounts, api.Mount{Path: m.Path, Number: m.Number, Volume: m.Volume})
	}
	for _, d := range h.Devices {
		answer.Devices = append(answer.Devices, api.Device{Backend: d.Backend, Path: d.Path, ID: d.ID, Token: d.Token, Owned: d.Owned})
	}
	for _, name := range slices.Sorted(maps.Keys(h.Silent)) {
		answer.Silent = append(answer.Silent, api.Silent{Backend: name, Error: sentence(h.Silent[name])})
	}
	for _, name := range slices.Sorted(maps.Keys(h.Forbidden)) {
		answer.Permissions = append(answer.Permissions, api.Permissions{Backend: name, Forbidden: h.Forbidden[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(h.Unjudged)) {
		answer.Permissions = append(answer.Permissions, api.Permissions{Backend: name, Error: sentence(h.Unjudged[name])})
	}
	for _, e := range a.certificates() {
		answer.Certificates = append(answer.Certificates, api.Certificate{File: e.File, Expires: e.At})
	}
	for _, s := range servers {
		answer.Etcd = append(answer.Etcd, api.Server{Endpoint: s.Endpoint, Version: s.Version, Alarms: s.Alarms, Leaderless: s.Leaderless, Error: sentence(s.Err)})
	}
	return answer, nil
}

// sentence is an error's text, empty for none.
func sentence(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
