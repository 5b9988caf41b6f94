package robustness

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// size is the number of members.
const size = 3

// cluster is an etcd whose members can be reached through proxies only.
type cluster struct {
	members [size]*member
	ids     [size]string           // in etcd's spelling
	direct  [size]*clientv3.Client // to each member, over links without faults
	any     *clientv3.Client

	mu    sync.Mutex
	links map[[2]string]*link // between members: from which id, to which name
}

// startCluster runs a new etcd until the test ends.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{links: map[[2]string]*link{}}
	dir := t.TempDir()
	var urls []string
	for i := range c.members {
		name := fmt.Sprint("m", i)
		m := &member{name: name, dir: filepath.Join(dir, name)}
		if err := os.Mkdir(m.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		p := startProxy(t, filepath.Join(m.dir, peerSocket), func(begin *bufio.Reader) *link {
			return c.between(sender(begin), name)
		})
		m.config = memberConfig{Name: name, Data: filepath.Join(m.dir, "data"), Peer: "http://" + p.address()}
		urls = append(urls, name+"="+m.config.Peer)
		c.members[i] = m
	}
	t.Cleanup(func() {
		for _, m := range c.members {
			m.kill()
		}
		if t.Failed() {
			c.printLogs(t)
		}
	})
	for _, m := range c.members {
		m.config.Cluster = strings.Join(urls, ",")
		if err := m.start(); err != nil {
			t.Fatal(err)
		}
	}
	endpoints, _ := c.endpoints(t)
	c.any = connectRaw(t, endpoints...)
	for i, e := range endpoints {
		c.direct[i] = connectRaw(t, e)
	}
	if err := c.wait(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	return c
}

// connectRaw is for what is not the nodes' business.
func connectRaw(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// connect is how a node of the product reaches etcd.
func connect(t *testing.T, endpoints []string) *ownership.Etcd {
	t.Helper()
	store, err := ownership.NewEtcd(ownership.EtcdConfig{Endpoints: endpoints})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// endpoints are addresses of every member for one client, each over a link of its
// own.
func (c *cluster) endpoints(t *testing.T) (addresses []string, links []*link) {
	t.Helper()
	for _, m := range c.members {
		l := newLink()
		p := startProxy(t, filepath.Join(m.dir, clientSocket), func(*bufio.Reader) *link { return l })
		addresses, links = append(addresses, p.address()), append(links, l)
	}
	return addresses, links
}

// between is the link that one member reaches another over. Connections that do
// not say whom they are from share one.
func (c *cluster) between(id, name string) *link {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := [2]string{id, name}
	if c.links[key] == nil {
		c.links[key] = newLink()
	}
	return c.links[key]
}

// isolate is what happens between a member and the others, both ways.
func (c *cluster) isolate(i int, t traffic) {
	for j, other := range c.members {
		if i == j {
			continue
		}
		c.between(c.ids[i], other.name).set(t)
		c.between(c.ids[j], c.members[i].name).set(t)
		// Whom these are from is not known; they are begun again if they are another's.
		c.between("", other.name).set(t)
		c.between("", c.members[i].name).set(t)
	}
}

// wait is until every member answers, and has the others' answers.
func (c *cluster) wait(limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for i, client := range c.direct {
		for {
			try, stop := context.WithTimeout(ctx, 2*time.Second)
			_, err := client.Get(try, "/health")
			stop()
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return fmt.Errorf("etcd member %d is not ready after %v: %w", i, limit, err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	list, err := c.any.MemberList(ctx)
	if err != nil {
		return err
	}
	for _, m := range list.Members {
		for i := range c.members {
			if m.Name == c.members[i].name {
				c.ids[i] = strconv.FormatUint(m.ID, 16)
			}
		}
	}
	return nil
}

// leader is the member that leads, as far as is known; otherwise any.
func (c *cluster) leader(ctx context.Context) int {
	for i, client := range c.direct {
		try, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		status, err := client.Status(try, client.Endpoints()[0])
		cancel()
		if err != nil {
			continue
		}
		for j, id := range c.ids {
			if id == strconv.FormatUint(status.Leader, 16) {
				return j
			}
		}
		return i
	}
	return 0
}

// moveLeader makes another member the leader, if it can.
func (c *cluster) moveLeader(ctx context.Context, to int) error {
	id, err := strconv.ParseUint(c.ids[to], 16, 64)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err = c.direct[c.leader(ctx)].MoveLeader(ctx, id)
	return err
}

// alarm says that a member's disk is full, so that etcd refuses what needs space.
func (c *cluster) alarm(ctx context.Context, i int) error {
	id, err := strconv.ParseUint(c.ids[i], 16, 64)
	if err != nil {
		return err
	}
	_, err = etcdserverpb.NewMaintenanceClient(c.any.ActiveConnection()).Alarm(ctx, &etcdserverpb.AlarmRequest{
		Action: etcdserverpb.AlarmRequest_ACTIVATE, MemberID: id, Alarm: etcdserverpb.AlarmType_NOSPACE,
	})
	return err
}

// disarm ends all alarms.
func (c *cluster) disarm(ctx context.Context) error {
	_, err := c.any.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}

// heal undoes every fault of the members, and waits until etcd works.
func (c *cluster) heal() error {
	for i, m := range c.members {
		m.signal(syscall.SIGCONT)
		if err := m.start(); err != nil {
			return err
		}
		c.isolate(i, traffic{})
	}
	if err := c.wait(30 * time.Second); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return c.disarm(ctx)
}

// printLogs shows the end of what the members said.
func (c *cluster) printLogs(t *testing.T) {
	t.Helper()
	for _, m := range c.members {
		b, err := os.ReadFile(filepath.Join(m.dir, "log"))
		if err == nil {
			t.Logf("log of etcd member %s:\n%s", m.name, b[max(0, len(b)-3000):])
		}
	}
}
