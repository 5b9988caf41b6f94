// Package api is the admin API as a client sees it: what goes over the plugin's
// control socket, and a Client for it. It imports nothing of the project, so that
// the command line stays small.
package api

import "time"

// Node is one node of the cluster.
type Node struct {
	ID   string `json:"id"`
	Host string `json:"host"`
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

// Failure is the body of every answer that is not 200.
type Failure struct {
	Error string `json:"error"` // a whole sentence, for people
}
