package ownership

import (
	"context"
	"sync"
	"time"
)

// A Server is one of the etcd servers that this node was told of.
type Server struct {
	Endpoint string
	Version  string
	// Alarms are what the server itself says is wrong with it.
	Alarms []string
	// Leaderless says that it has lost the others.
	Leaderless bool
	// Err is why it does not answer.
	Err error
}

// serverLimit bounds how long a server may take to say how it is.
const serverLimit = 3 * time.Second

// Servers asks each etcd server how it is; nil if the store is none of etcd's.
func (m *Map) Servers(ctx context.Context) []Server {
	if asker, ok := m.store.(interface {
		Servers(ctx context.Context) []Server
	}); ok {
		return asker.Servers(ctx)
	}
	return nil
}

// Servers asks each server how it is.
func (e *Etcd) Servers(ctx context.Context) []Server {
	ctx, cancel := context.WithTimeout(ctx, serverLimit)
	defer cancel()
	servers := make([]Server, len(e.config.Endpoints))
	client, err := e.connect(ctx)
	var asked sync.WaitGroup
	for i, endpoint := range e.config.Endpoints {
		servers[i] = Server{Endpoint: endpoint, Err: err}
		if err != nil {
			continue
		}
		asked.Go(func() {
			status, err := client.Status(ctx, endpoint)
			if err != nil {
				servers[i].Err = err
				return
			}
			servers[i].Version, servers[i].Alarms, servers[i].Leaderless = status.Version, status.Errors, status.Leader == 0
		})
	}
	asked.Wait()
	return servers
}
