// Package api is the admin API as a client sees it: what goes over the plugin's
// control socket, and a Client for it. It imports nothing of the project, so that
// the command line stays small.
package api

import "time"

// Node is one node of the cluster.
type Node struct {
	ID   string `json:"id"`
	Host string `json:"host"`
	// Address is the IP address by which users of the REST API know it, if it has said one.
	Address string `json:"address,omitempty"`
	// Boot is the kernel's boot id, of the boot in which the node last registered.
	Boot string `json:"boot"`
	// State is empty for a node in service; cordoned, lost or removed otherwise.
	State string `json:"state,omitempty"`
	// Live says that its lease in etcd is valid.
	Live bool `json:"live"`
	// Silent is for how many seconds the host that answers has itself seen the node
	// not being live; nil if it is live, or if that host does not know.
	Silent *float64 `json:"silent_seconds,omitempty"`
	// Volumes is how many volumes the node owns.
	Volumes int `json:"volumes"`
	// Death is set if this boot of the node was declared dead.
	Death *Death `json:"death,omitempty"`
}

// Nodes answers GET /v1/nodes.
type Nodes struct {
	Nodes []Node `json:"nodes"`
}

// Volume is one volume of the cluster, as the host that answers knows it.
type Volume struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	// State is free, owned, attached, mounted, or what is wrong; Detail says more.
	// What is attached or mounted is known of the host that answers alone.
	State  string `json:"state"`
	Detail string `json:"detail,omitempty"`
	// Host is the owner, and Token the fencing token of its tenure.
	Host  string `json:"host,omitempty"`
	Token int64  `json:"token,omitempty"`
	// Mountpoint, Mounts and Containers are of the host that answers.
	Mountpoint string   `json:"mountpoint,omitempty"`
	Mounts     int      `json:"mounts,omitempty"`
	Containers []string `json:"containers,omitempty"`
	// Waiting are the hosts that want it.
	Waiting []string `json:"waiting,omitempty"`
	// Placement is the host on which it is kept, and PlacementError why it is not there
	// yet, which only that host knows.
	Placement      string            `json:"placement,omitempty"`
	PlacementError string            `json:"placement_error,omitempty"`
	Bytes          int64             `json:"bytes"`
	Filesystem     string            `json:"filesystem"`
	Backend        string            `json:"backend"`
	Profile        string            `json:"profile,omitempty"`
	Options        map[string]string `json:"options,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Created        time.Time         `json:"created"`
	// Stale says that etcd did not answer, and this is what the host remembers.
	Stale bool `json:"stale,omitempty"`
}

// Volumes answers GET /v1/volumes, by name. They are Stale if etcd did not answer.
type Volumes struct {
	Volumes []Volume `json:"volumes"`
	Stale   bool     `json:"stale,omitempty"`
}

// Status answers GET /v1/status.
type Status struct {
	// Host is the one that answers, Node its id, and Version its plugin's.
	Host    string `json:"host"`
	Node    string `json:"node"`
	Version string `json:"version"`
	// Cluster is the cluster's id, if the host knows it.
	Cluster string `json:"cluster,omitempty"`
	// Etcd is why the host cannot use etcd now; empty if it can.
	Etcd string `json:"etcd_error,omitempty"`
	// Hosts and Volumes are how many there are in which state. Hosts is null if etcd
	// did not answer.
	Hosts   map[string]int `json:"hosts"`
	Volumes map[string]int `json:"volumes"`
	// Attention are sentences on what somebody should look into.
	Attention []string `json:"attention"`
}

// Version answers GET /v1/version.
type Version struct {
	Version string `json:"version"`
	Host    string `json:"host"`
}

// Backend is a storage backend of the host that answers.
type Backend struct {
	// Name is what follows -o backend=, and Type the kind of storage system.
	Name string `json:"name"`
	Type string `json:"type"`
	// Class is F0 to F3: what stops a host that is silent.
	Class string `json:"class"`
	// Default is set for the backend of volumes that name none.
	Default bool `json:"default,omitempty"`
	// Profiles are what follows -o profile=, and Options the names of its own options.
	Profiles []string `json:"profiles,omitempty"`
	Options  []string `json:"options,omitempty"`
	// Error is why it cannot be used now; empty if it answers.
	Error string `json:"error,omitempty"`
}

// Backends answers GET /v1/backends.
type Backends struct {
	Backends []Backend `json:"backends"`
}

// Host answers GET /v1/host: what the plugin sees of its own host, from where it runs.
type Host struct {
	// MountRoot is the directory below which it mounts volumes.
	MountRoot string `json:"mount_root"`
	// Filesystems are those of the cluster's volumes and of new ones, and Lacks the
	// programs for them that it does not find.
	Filesystems []string `json:"filesystems"`
	Lacks       []string `json:"lacks,omitempty"`
	// Docker is why the Engine does not tell it who uses a volume.
	Docker string `json:"docker_error,omitempty"`
	// Mounts are those below MountRoot; Unmounted are the names of volumes that ought to be
	// mounted and are not.
	Mounts     []Mount  `json:"mounts"`
	MountError string   `json:"mount_error,omitempty"`
	Unmounted  []string `json:"unmounted,omitempty"`
	// Devices are what its backends have attached; those that did not say are Silent.
	Devices []Device `json:"devices"`
	Silent  []Silent `json:"silent,omitempty"`
	// Permissions are what the storage does not let a backend do.
	Permissions []Permissions `json:"permissions,omitempty"`
	// Etcd are the servers it was told of.
	Etcd []Server `json:"etcd"`
	// Certificates are those that it uses, and the authorities'.
	Certificates []Certificate `json:"certificates,omitempty"`
}

// Certificate is the file of one, and until when it is good.
type Certificate struct {
	File    string    `json:"file"`
	Expires time.Time `json:"expires"`
}

// Mount is something mounted below the mount root of a host.
type Mount struct {
	Path string `json:"path"`
	// Number is the filesystem's in the mount table, such as 7:3.
	Number string `json:"number"`
	// Volume is the volume's name; empty if it is none that the plugin has mounted.
	Volume string `json:"volume,omitempty"`
}

// Device is a device attached to a host.
type Device struct {
	Backend string `json:"backend"`
	Path    string `json:"path"`
	// ID is the volume's, and Token the one it was attached under. Owned says that the
	// host has the volume under it now.
	ID    string `json:"id"`
	Token int64  `json:"token"`
	Owned bool   `json:"owned"`
}

// Permissions are the calls that a backend's storage does not allow it, or why it did not say.
type Permissions struct {
	Backend   string   `json:"backend"`
	Forbidden []string `json:"forbidden,omitempty"`
	Error     string   `json:"error,omitempty"`
}

// Silent is a backend that did not say what is attached.
type Silent struct {
	Backend string `json:"backend"`
	Error   string `json:"error"`
}

// Server is an etcd server.
type Server struct {
	Endpoint string `json:"endpoint"`
	Version  string `json:"version,omitempty"`
	// Alarms are what the server says is wrong with it; Leaderless, that it has lost the others.
	Alarms     []string `json:"alarms,omitempty"`
	Leaderless bool     `json:"leaderless,omitempty"`
	// Error is why it does not answer.
	Error string `json:"error,omitempty"`
}

// Death is the record that one boot of a node is dead.
type Death struct {
	Node    string    `json:"node"`
	Host    string    `json:"host"`
	Boot    string    `json:"boot"`
	Because string    `json:"because"`
	By      string    `json:"by"`
	At      time.Time `json:"at"`
	// Forced says that it was recorded whether the node was live or not.
	Forced bool `json:"forced"`
}

// Confirmation is the body of POST /v1/nodes/{host}/confirm-dead. The host is a
// host name or a node's id.
type Confirmation struct {
	// Because is how the operator knows; it may be empty.
	Because string `json:"because,omitempty"`
	// By is who says so: user@host.
	By string `json:"by"`
	// Force declares a node dead although it is live.
	Force bool `json:"force,omitempty"`
	// Typed has to be {host} once more if Force is set.
	Typed string `json:"typed,omitempty"`
}

// Confirmed answers a Confirmation.
type Confirmed struct {
	Death Death `json:"death"`
	// Volumes are the names of the volumes that the node owned. It is null if they
	// could not be listed; the death is recorded nevertheless.
	Volumes []string `json:"volumes"`
}

// Reinstatement is the body of POST /v1/volumes/{name}/reinstate.
type Reinstatement struct {
	// By is who says so: user@host.
	By string `json:"by"`
}

// Reinstated answers a Reinstatement.
type Reinstated struct {
	Volume string `json:"volume"`
}

// Restored is the word that an Acceptance must have.
const Restored = "restored"

// Acceptance is the body of POST /v1/cluster/accept-restore.
type Acceptance struct {
	// By is who says so: user@host.
	By string `json:"by"`
	// Typed has to be Restored.
	Typed string `json:"typed"`
}

// Accepted answers an Acceptance.
type Accepted struct {
	// Generation is the cluster's from now on, higher than any before.
	Generation int64 `json:"generation"`
}

// Creation is the body of POST /v1/volumes, which is answered with a Volume.
type Creation struct {
	Name string `json:"name"`
	// ID is a UUID that no volume has had; the plugin makes one if it is empty.
	ID string `json:"id,omitempty"`
	// Options are those of docker volume create -o.
	Options map[string]string `json:"options,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	// By is who says so: user@host.
	By string `json:"by"`
}

// Movement is the body of POST /v1/volumes/{name}/move.
type Movement struct {
	// Host is a host name or a node's id. "" is nowhere, and null is a mistake.
	Host *string `json:"host"`
	// By is who says so: user@host.
	By string `json:"by"`
}

// Moved answers a Movement. It is recorded; that it has come about is seen in the Volume.
type Moved struct {
	Volume string `json:"volume"`
	Host   string `json:"host"`
	Node   string `json:"node"`
}

// By is the body of DELETE /v1/volumes/{name}, of DELETE /v1/nodes/{host}, and of POST
// /v1/nodes/{host}/cordon, uncordon and drain.
type By struct {
	// By is who says so: user@host.
	By string `json:"by"`
}

// Done answers what has no more to say.
type Done struct{}

// Drained answers POST /v1/nodes/{host}/drain, with names of volumes.
type Drained struct {
	// Released are not the host's any more; Moving are, and will not be in a moment.
	Released []string `json:"released"`
	Moving   []string `json:"moving"`
	Busy     []Busy   `json:"busy"`
}

// Busy is a volume that its host does not let go, and why.
type Busy struct {
	Volume     string   `json:"volume"`
	Containers []string `json:"containers,omitempty"`
	Detail     string   `json:"detail,omitempty"`
}

// Failure is the body of every answer that is not 200.
type Failure struct {
	Error string `json:"error"` // a whole sentence, for people
}
