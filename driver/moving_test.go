package driver_test

import (
	"slices"
	"testing"

	"github.com/flocker-plugin/flocker/driver/mount"
)

// A container whose Mount is no longer counted is named all the same: docker cp,
// after the plugin was killed, unmounts in the container's name.
func TestRefusalNamesAContainerThatIsNotCounted(t *testing.T) {
	inCluster(t, twoNodes, nil, func(t *testing.T, c *cluster) {
		a, b := c.nodes["a"], c.nodes["b"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.docker.set("db", "web")
		release := a.kernel.Hold(c.device("db"))
		a.restart()
		a.mount("db", "id1")
		a.unmount("db", "id1")
		_, err := b.Mount(t.Context(), "db", "id2")
		wantError(t, err, "volume db is in use on host a by container web; waited 30s")
		a.docker.set("db")
		release()
		b.mount("db", "id2")
	})
}

// The directory of a mount that Docker took away is removed at the next start.
func TestBareMountpointIsRemovedAtStart(t *testing.T) {
	inCluster(t, twoNodes, nil, func(_ *testing.T, c *cluster) {
		a := c.nodes["a"]
		a.create("db", nil)
		a.mount("db", "id1")
		a.kill()
		release := a.kernel.DisablePlugin()
		a.start()
		if calls := a.mounter.Calls(); !slices.ContainsFunc(calls, func(c mount.FakeCall) bool { return c.Name == mount.CallUnmount }) {
			c.t.Errorf("calls at the start: %v, want an unmount", calls)
		}
		release()
	})
}
