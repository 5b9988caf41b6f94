package backendtest

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/flocker-plugin/flocker/backends"
)

// Cases returns the contract's cases. Names with underscores are those of the 27
// driver cases of the original Flocker (make_iblockdeviceapi_tests), whose
// meaning is kept where our contract allows; the others are ours.
func Cases() []Case {
	return []Case{
		{"interface", properties},
		{"compute_instance_id_unicode", attachmentNamesTheNode},
		{"compute_instance_id_nonempty", attachmentNamesTheNode},
		{"list_volume_empty", listEmpty},
		{"created_is_listed", createdIsListed},
		{"listed_volume_attributes", createdIsListed},
		{"created_volume_attributes", createdVolumeAttributes},
		{"attach_unknown_volume", attachUnknown},
		{"device_size", deviceSize},
		{"attach_attached_volume", attachAttached},
		{"attach_elsewhere_attached_volume", attachElsewhere},
		{"attach_unattached_volume", attachmentNamesTheNode},
		{"attached_volume_listed", attachedVolumeListed},
		{"list_attached_and_unattached", listAttachedAndUnattached},
		{"multiple_volumes_attached_to_host", neverSwapped},
		{"get_device_path_unknown_volume", unknownIsNotAttached},
		{"get_device_path_unattached_volume", unattachedIsNotAttached},
		{"get_device_path_device", deviceIsABlockDevice},
		{"get_device_path_device_repeatable_results", attachAttached},
		{"destroy_unknown_volume", deleteUnknown},
		{"destroy_volume", deleteVolume},
		{"destroy_destroyed_volume", deleteUnknown},
		{"detach_unknown_volume", detachGone},
		{"detach_detached_volume", detachGone},
		{"detach_volume", detachVolume},
		{"reattach_detached_volume", reattach},
		{"attach_destroyed_volume", attachUnknown},

		{"create twice is one volume", createTwice},
		{"create with another size", createWithAnotherSize},
		{"create rounds up", createRoundsUp},
		{"create with odd names", createWithOddNames},
		{"create at once on two nodes", createAtOnce},
		{"create cancelled and repeated", createCancelled},
		{"another cluster is invisible", anotherCluster},
		{"get", get},
		{"delete attached", deleteAttached},
		{"delete races attach", deleteRacesAttach},
		{"attach another volume's ref", attachOtherRef},
		{"attach with another token", attachWithAnotherToken},
		{"attach at once with one token", attachAtOnce},
		{"attach at once on many nodes", attachOnManyNodes},
		{"detach names another node", detachNamesAnotherNode},
		{"detach names another token", detachNamesAnotherToken},
		{"detach takes away from a dead node", detachFromDeadNode},
		{"detach while open", detachWhileOpen},
		{"move keeps data", moveKeepsData},
		{"restart forgets nothing", restart},
		{"many volumes", manyVolumes},
		{"cancelled calls", cancelledCalls},
		{"resize", resize},

		{"class and fencer agree", classOfFencer},
		{"identity", identityIsTheNodes},
		{"fence cuts a node off", fenceCutsOff},
		{"fence lets the cut node detach", fencedNodeDetaches},
		{"fence lets the taker delete", fencedVolumeIsDeleted},
		{"fence again", fenceAgain},
		{"fence spares a younger token", fenceSparesTheYounger},
		{"fence spares other nodes and volumes", fenceSparesOthers},
		{"fence comes before a late attach", fencePreventsAttach},
		{"fence does nothing later", fenceNothingLater},
		{"fence unknown volume", fenceUnknown},
		{"fence another cluster's volume", fenceAnotherCluster},
		{"fence cancelled and repeated", fenceCancelled},
		{"fence races the taker", fenceRacesTheTaker},
		{"fence races attach", fenceRacesAttach},
		{"fence races detach", fenceRacesDetach},
		{"storage system is down", storageDown},
		{"every request fails", everyRequestFails},
	}
}

func properties(e *env) {
	p := e.props
	if p.Name == "" || strings.ToLower(p.Name) != p.Name || strings.ContainsAny(p.Name, " ,=") {
		e.Errorf("name %q is nothing to write after -o backend=", p.Name)
	}
	if !slices.Contains([]backends.Class{
		backends.ClassExclusive, backends.ClassFenced, backends.ClassNodeFence, backends.ClassNone,
	}, p.Class) {
		e.Errorf("there is no class %q", p.Class)
	}
	if p.Class == backends.ClassExclusive && !p.ExclusiveAttach {
		e.Errorf("class %s means ExclusiveAttach", p.Class)
	}
	if p.AllocationUnit <= 0 || p.MinSize <= 0 || (p.MaxSize != 0 && p.MaxSize < p.MinSize) {
		e.Errorf("unit %d, sizes %d to %d make no sense", p.AllocationUnit, p.MinSize, p.MaxSize)
	}
	seen := map[string]bool{}
	for _, o := range p.Options {
		if o.Name == "" || o.Help == "" || seen[o.Name] {
			e.Errorf("option %q has no name, no help, or is there twice", o.Name)
		}
		seen[o.Name] = true
	}
	defaults := map[string]string{}
	for _, o := range p.Options {
		if o.Default != "" {
			defaults[o.Name] = o.Default
		}
	}
	if err := backends.Validate(p.Options, defaults); err != nil {
		e.Errorf("defaults: %v", err)
	}
}

func attachmentNamesTheNode(e *env) {
	a := e.node("a")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	if att.Node != e.nodeName("a") || att.Volume != vol.ID || att.Ref != vol.Ref || att.Token != 10 {
		e.Errorf("got %+v, want volume %s (%s) on %s with token 10", att, vol.ID, vol.Ref, e.nodeName("a"))
	}
	if !strings.HasPrefix(att.Device, "/") {
		e.Errorf("device %q is no absolute path", att.Device)
	}
}

func listEmpty(e *env) {
	e.wantList(e.node("a"))
	e.wantAttached(e.node("a"))
}

func createdIsListed(e *env) {
	vol, other := e.create(e.node("a")), e.create(e.node("b"))
	e.wantList(e.node("a"), vol, other)
	e.wantList(e.node("b"), vol, other)
}

func createdVolumeAttributes(e *env) {
	req := e.request()
	vol, err := e.node("a").Create(e.ctx(), req)
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	if vol.ID != req.ID || vol.Name != req.Name || vol.Cluster != req.Cluster || vol.Size != e.round(req.Size) || vol.Ref == "" {
		e.Errorf("got %+v for %+v", vol, req)
	}
}

// unknown returns a volume that existed once, whose ref is in the right form.
func (e *env) unknown() backends.Volume {
	e.Helper()
	a := e.node("a")
	vol := e.create(a)
	e.remove(a, vol)
	return vol
}

func attachUnknown(e *env) {
	a, vol := e.node("a"), e.unknown()
	att, err := a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
	if !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("attach: got %+v, %v; want ErrNotFound", att, err)
	}
	e.wantAttached(a)
}

func deviceSize(e *env) {
	a := e.node("a")
	vol := e.create(a)
	if got := e.deviceSize(e.attach(a, vol, 10)); got != vol.Size || got < e.size {
		e.Errorf("the device has %d bytes, the volume %d, asked for were %d", got, vol.Size, e.size)
	}
}

func attachAttached(e *env) {
	a := e.node("a")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	for range 3 {
		if again := e.attach(a, vol, 10); again != att {
			e.Errorf("got %+v the next time, %+v the first", again, att)
		}
	}
	if again := e.attach(e.node("a"), vol, 10); again != att {
		e.Errorf("got %+v after a restart, %+v before", again, att)
	}
	e.wantAttached(a, att)
	e.verify(att, vol)
}

// wantAttachedError demands that err says who has the volume.
func (e *env) wantAttachedError(err error, vol backends.Volume, node string, token int64) {
	e.Helper()
	attached, ok := errors.AsType[*backends.AttachedError](err)
	if !ok || !errors.Is(err, backends.ErrInUse) {
		e.Fatalf("got %v, want an *AttachedError", err)
	}
	if attached.Volume != vol.ID || (attached.Node != "" && (attached.Node != node || attached.Token != token)) {
		e.Errorf("got %+v, want volume %s on node %s with token %d", attached, vol.ID, node, token)
	}
}

func attachElsewhere(e *env) {
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	other, err := b.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11})
	if e.props.ExclusiveAttach {
		e.wantAttachedError(err, vol, e.nodeName("a"), 10)
		e.wantAttached(b)
	} else {
		if err != nil {
			e.Fatalf("attach: %v", err)
		}
		e.wantAttached(b, other)
	}
	e.wantAttached(a, att)
	e.verify(att, vol)
}

func attachedVolumeListed(e *env) {
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.wantAttached(a, att)
	e.wantAttached(b)
}

func listAttachedAndUnattached(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	att := e.attach(a, vol, 10)
	e.wantList(a, vol, other)
	e.wantAttached(a, att)
}

func neverSwapped(e *env) {
	const count = 6
	nodes := []backends.Backend{e.node("a"), e.node("b")}
	vols := make([]backends.Volume, count)
	for i := range vols {
		vols[i] = e.create(nodes[0])
	}
	for round := range 3 {
		here := nodes[round%2]
		atts := make([]backends.Attachment, count)
		errs := make([]error, count)
		order := rand.Perm(count)
		parallel(count, func(i int) {
			i = order[i]
			atts[i], errs[i] = here.Attach(e.ctx(), backends.AttachRequest{Ref: vols[i].Ref, Volume: vols[i].ID, Token: int64(10 + round)})
		})
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("attach: %v", err)
		}
		e.wantAttached(here, atts...)
		for i, vol := range vols {
			if round == 0 {
				e.write(atts[i], vol)
			}
		}
		for i, vol := range vols {
			e.verify(atts[i], vol)
		}
		parallel(count, func(i int) { errs[i] = here.Detach(e.ctx(), atts[order[i]]) })
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("detach: %v", err)
		}
		e.wantAttached(here)
	}
}

func unknownIsNotAttached(e *env) {
	e.unknown()
	e.wantAttached(e.node("a"))
}

func unattachedIsNotAttached(e *env) {
	a := e.node("a")
	e.create(a)
	e.wantAttached(a)
}

func deviceIsABlockDevice(e *env) {
	a := e.node("a")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.isBlockDevice(att)
	e.write(att, vol)
	e.verify(att, vol)
}

func deleteUnknown(e *env) {
	a, vol := e.node("a"), e.unknown()
	for range 2 {
		if err := a.Delete(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrNotFound) {
			e.Errorf("delete: got %v, want ErrNotFound", err)
		}
	}
}

func deleteVolume(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	e.remove(a, vol)
	e.wantList(a, other)
	if got, err := a.Get(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("get: got %+v, %v; want ErrNotFound", got, err)
	}
}

func detachGone(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	kept := e.attach(a, other, 11)
	att := e.attach(a, vol, 10)
	for range 3 {
		e.detach(a, att)
	}
	e.remove(a, vol)
	e.detach(a, att)
	e.wantAttached(a, kept)
}

func detachVolume(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	att, kept := e.attach(a, vol, 10), e.attach(a, other, 11)
	e.write(att, vol)
	e.write(kept, other)
	e.detach(a, att)
	e.wantAttached(a, kept)
	e.verify(kept, other)
	e.wantNoData(att, vol)
}

func reattach(e *env) {
	a := e.node("a")
	vol := e.create(a)
	for token := int64(10); token < 15; token++ {
		att := e.attach(a, vol, token)
		if token == 10 {
			e.write(att, vol)
		}
		e.verify(att, vol)
		e.detach(a, att)
	}
	// The same token again: a crash, and nothing else has happened.
	att := e.attach(a, vol, 14)
	e.verify(att, vol)
}

func createTwice(e *env) {
	req := e.request()
	var first backends.Volume
	for i, b := range []backends.Backend{e.node("a"), e.node("a"), e.node("b")} {
		vol, err := b.Create(e.ctx(), req)
		if err != nil {
			e.Fatalf("create: %v", err)
		}
		if i == 0 {
			first = vol
			continue
		}
		if vol != first {
			e.Errorf("got %+v the next time, %+v the first", vol, first)
		}
	}
	e.wantList(e.node("a"), first)
	// Repeated while in use, with its data untouched.
	a := e.node("a")
	att := e.attach(a, first, 10)
	e.write(att, first)
	if _, err := a.Create(e.ctx(), req); err != nil {
		e.Errorf("create: %v", err)
	}
	e.verify(att, first)
}

func createWithAnotherSize(e *env) {
	req := e.request()
	first, err := e.node("a").Create(e.ctx(), req)
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	req.Size = first.Size + e.round(1)
	if vol, err := e.node("b").Create(e.ctx(), req); !errors.Is(err, backends.ErrExists) {
		e.Errorf("create: got %+v, %v; want ErrExists", vol, err)
	}
	e.wantList(e.node("a"), first)
}

func createRoundsUp(e *env) {
	if e.round(1) == 1 {
		e.Skipf("every size is possible")
	}
	a, req := e.node("a"), e.request()
	req.Size++
	vol, err := a.Create(e.ctx(), req)
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	if want := e.size + e.round(1); vol.Size != want {
		e.Errorf("asked for %d bytes: got %d, want %d", req.Size, vol.Size, want)
	}
	again, err := a.Create(e.ctx(), req)
	if err != nil || again != vol {
		e.Errorf("create: got %+v, %v the next time; %+v the first", again, err, vol)
	}
	if got := e.deviceSize(e.attach(a, vol, 10)); got != vol.Size {
		e.Errorf("the device has %d bytes, want %d", got, vol.Size)
	}
}

func createWithOddNames(e *env) {
	a := e.node("a")
	for _, name := range []string{"x", "größe-Ω-数据", strings.Repeat("n", 255), `a"b'c\d$(e)`, "same", "same"} {
		req := e.request()
		req.Name = name
		vol, err := a.Create(e.ctx(), req)
		if err != nil {
			e.Fatalf("create %q: %v", name, err)
		}
		if got, err := a.Get(e.ctx(), vol.Ref); err != nil || got != vol || got.ID != req.ID {
			e.Errorf("%q: got %+v, %v; want %+v", name, got, err, vol)
		}
	}
}

func createAtOnce(e *env) {
	const count = 8
	nodes := []backends.Backend{e.node("a"), e.node("b")}
	for range 5 {
		req := e.request()
		vols, errs := make([]backends.Volume, count), make([]error, count)
		parallel(count, func(i int) { vols[i], errs[i] = nodes[i%2].Create(e.ctx(), req) })
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("create: %v", err)
		}
		for _, vol := range vols {
			if vol != vols[0] {
				e.Errorf("one call made %+v, another %+v", vols[0], vol)
			}
		}
		e.wantList(nodes[0], vols[0])
		e.remove(nodes[1], vols[0])
	}
}

func createCancelled(e *env) {
	a, b := e.node("a"), e.node("b")
	for range 10 {
		req := e.request()
		ctx, cancel := context.WithTimeout(e.ctx(), rand.N(2*time.Millisecond))
		_, _ = a.Create(ctx, req)
		cancel()
		vol, err := b.Create(e.ctx(), req)
		if err != nil {
			e.Fatalf("create: %v", err)
		}
		e.wantList(a, vol)
		e.remove(a, vol)
	}
	e.wantList(a)
}

func anotherCluster(e *env) {
	other := uuid.NewString()
	e.clusters = append(e.clusters, other)
	mine, theirs := e.node("a"), e.storage.Node(other, e.nodeName("b"))
	req := e.request()
	req.Cluster = other
	vol, err := theirs.Create(e.ctx(), req)
	if err != nil {
		e.Fatalf("create: %v", err)
	}
	att := e.attach(theirs, vol, 10)
	e.write(att, vol)
	e.detach(theirs, att)
	e.wantList(mine)
	if got, err := mine.Get(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("get: got %+v, %v; want ErrNotFound", got, err)
	}
	if err := mine.Delete(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("delete: got %v, want ErrNotFound", err)
	}
	if got, err := mine.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 11}); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("attach: got %+v, %v; want ErrNotFound", got, err)
	}
	e.wantAttached(mine)
	e.wantList(theirs, vol)
	e.verify(e.attach(theirs, vol, 12), vol)
}

func get(e *env) {
	vol, other := e.create(e.node("a")), e.create(e.node("a"))
	for _, want := range []backends.Volume{vol, other} {
		if got, err := e.node("b").Get(e.ctx(), want.Ref); err != nil || got != want {
			e.Errorf("get: got %+v, %v; want %+v", got, err, want)
		}
	}
	gone := e.unknown()
	if got, err := e.node("b").Get(e.ctx(), gone.Ref); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("get: got %+v, %v; want ErrNotFound", got, err)
	}
}

func deleteAttached(e *env) {
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	if err := a.Delete(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrInUse) {
		e.Errorf("delete: got %v, want ErrInUse", err)
	}
	if e.props.ExclusiveAttach {
		if err := b.Delete(e.ctx(), vol.Ref); !errors.Is(err, backends.ErrInUse) {
			e.Errorf("delete on another node: got %v, want ErrInUse", err)
		}
	}
	e.wantList(a, vol)
	e.wantAttached(a, att)
	e.verify(att, vol)
	e.detach(a, att)
	e.remove(a, vol)
	e.wantList(a)
}

func deleteRacesAttach(e *env) {
	if !e.props.ExclusiveAttach {
		e.Skipf("a node cannot see what others have attached")
	}
	a, b := e.node("a"), e.node("b")
	for range 20 {
		vol := e.create(a)
		var att backends.Attachment
		var attaching, deleting error
		parallel(2, func(i int) {
			if i == 0 {
				att, attaching = a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 10})
				return
			}
			deleting = b.Delete(e.ctx(), vol.Ref)
		})
		switch {
		case attaching == nil && errors.Is(deleting, backends.ErrInUse):
			e.write(att, vol)
			e.detach(a, att)
			e.remove(b, vol)
		case deleting == nil && errors.Is(attaching, backends.ErrNotFound):
			e.wantList(a)
		default:
			e.Fatalf("attach: %v, delete: %v; want one to succeed", attaching, deleting)
		}
		e.wantAttached(a)
	}
}

func attachOtherRef(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	att, err := a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: other.ID, Token: 10})
	if !errors.Is(err, backends.ErrInvalid) {
		e.Errorf("attach %s as volume %s: got %+v, %v; want ErrInvalid", vol.Ref, other.ID, att, err)
	}
	e.wantAttached(a)
}

func attachWithAnotherToken(e *env) {
	a := e.node("a")
	vol := e.create(a)
	att := e.attach(a, vol, 20)
	e.write(att, vol)
	for _, token := range []int64{19, 21} {
		_, err := a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
		e.wantAttachedError(err, vol, e.nodeName("a"), 20)
	}
	// Another instance of the same node: a restart does not make it the owner.
	_, err := e.node("a").Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: 21})
	e.wantAttachedError(err, vol, e.nodeName("a"), 20)
	e.wantAttached(a, att)
	e.verify(att, vol)
}

func attachAtOnce(e *env) {
	const count = 8
	a := e.node("a")
	vol := e.create(a)
	for token := int64(10); token < 13; token++ {
		atts, errs := make([]backends.Attachment, count), make([]error, count)
		parallel(count, func(i int) {
			atts[i], errs[i] = a.Attach(e.ctx(), backends.AttachRequest{Ref: vol.Ref, Volume: vol.ID, Token: token})
		})
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("attach: %v", err)
		}
		for _, att := range atts {
			if att != atts[0] {
				e.Errorf("one call got %+v, another %+v", atts[0], att)
			}
		}
		e.wantAttached(a, atts[0])
		parallel(count, func(i int) { errs[i] = a.Detach(e.ctx(), atts[i]) })
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("detach: %v", err)
		}
		e.wantAttached(a)
	}
}

func attachOnManyNodes(e *env) {
	if !e.props.ExclusiveAttach {
		e.Skipf("any number of nodes may attach a volume")
	}
	const count = 6
	names := []string{"a", "b", "c", "d", "e", "f"}
	vol := e.create(e.node("a"))
	for round := range 5 {
		atts, errs := make([]backends.Attachment, count), make([]error, count)
		parallel(count, func(i int) {
			atts[i], errs[i] = e.node(names[i]).Attach(e.ctx(), backends.AttachRequest{
				Ref: vol.Ref, Volume: vol.ID, Token: int64(10*round + i),
			})
		})
		winners := 0
		for i, name := range names {
			if errs[i] == nil {
				winners++
				e.wantAttached(e.node(name), atts[i])
				e.write(atts[i], vol)
				e.detach(e.node(name), atts[i])
				continue
			}
			if _, ok := errors.AsType[*backends.AttachedError](errs[i]); !ok {
				e.Errorf("attach: got %v, want an *AttachedError", errs[i])
			}
		}
		if winners != 1 {
			e.Fatalf("%d nodes have attached the volume at once", winners)
		}
	}
}

func detachNamesAnotherNode(e *env) {
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	wrong := att
	wrong.ID, wrong.Node = "", e.nodeName("b")
	e.detach(b, wrong)
	// Of another node's devices a backend may know nothing.
	_ = a.Detach(e.ctx(), wrong)
	e.wantAttached(a, att)
	e.verify(att, vol)
}

func detachNamesAnotherToken(e *env) {
	a := e.node("a")
	vol := e.create(a)
	old := e.attach(a, vol, 10)
	e.detach(a, old)
	att := e.attach(a, vol, 20)
	e.write(att, vol)
	e.detach(a, old)
	younger := att
	younger.ID, younger.Token = "", 30
	e.detach(a, younger)
	e.wantAttached(a, att)
	e.verify(att, vol)
}

func detachFromDeadNode(e *env) {
	if e.props.Class != backends.ClassExclusive {
		e.Skipf("class %s cannot", e.props.Class)
	}
	a, b := e.node("a"), e.node("b")
	vol := e.create(a)
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	e.detach(b, att)
	e.wantAttached(a)
	e.verify(e.attach(b, vol, 11), vol)
}

func detachWhileOpen(e *env) {
	a := e.node("a")
	vol := e.create(a)
	for _, exclusive := range []bool{true, false} {
		att := e.attach(a, vol, 10)
		device := e.open(att, exclusive)
		if err := a.Detach(e.ctx(), att); !errors.Is(err, backends.ErrInUse) {
			e.Errorf("detach while open (exclusively: %t): got %v, want ErrInUse", exclusive, err)
		}
		e.wantAttached(a, att)
		if _, err := device.WriteAt(make([]byte, 4096), 4096); err != nil {
			e.Errorf("write after the refused detach: %v", err)
		}
		if err := device.Close(); err != nil {
			e.Fatalf("close: %v", err)
		}
		// The refused detach does not happen later either.
		e.wantAttached(a, att)
		e.write(att, vol)
		e.verify(att, vol)
		e.detach(a, att)
		e.wantAttached(a)
	}
}

func moveKeepsData(e *env) {
	nodes := []string{"a", "b", "c"}
	vol := e.create(e.node("a"))
	for token := range int64(7) {
		here := e.node(nodes[token%3])
		att := e.attach(here, vol, 10+token)
		if token == 0 {
			e.write(att, vol)
		}
		e.verify(att, vol)
		e.detach(here, att)
	}
}

func restart(e *env) {
	a := e.node("a")
	vol, other := e.create(a), e.create(a)
	att, att2 := e.attach(a, vol, 10), e.attach(a, other, 11)
	e.write(att, vol)
	a = e.node("a")
	e.wantAttached(a, att, att2)
	e.wantList(a, vol, other)
	e.verify(att, vol)
	e.detach(a, att)
	e.wantAttached(e.node("a"), att2)
}

func manyVolumes(e *env) {
	count, workers := e.cfg.Many, 8
	if count == 0 {
		count = 1200
	}
	a, b := e.node("a"), e.node("b")
	vols, errs := make([]backends.Volume, count), make([]error, count)
	each := func(f func(i int)) {
		var next atomic.Int64
		parallel(workers, func(int) {
			for i := next.Add(1) - 1; i < int64(count); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
		if err := errors.Join(errs...); err != nil {
			e.Fatalf("%v", err)
		}
	}
	each(func(i int) { vols[i], errs[i] = a.Create(e.ctx(), e.request()) })
	e.wantList(b, slices.Clone(vols)...)
	each(func(i int) { errs[i] = b.Delete(e.ctx(), vols[i].Ref) })
	e.wantList(a)
}

func cancelledCalls(e *env) {
	a := e.node("a")
	vol, free := e.create(a), e.create(a)
	att := e.attach(a, vol, 10)
	cancelled, cancel := context.WithCancel(e.ctx())
	cancel()
	calls := map[string]func() error{
		"create":      func() error { _, err := a.Create(cancelled, e.request()); return err },
		"delete":      func() error { return a.Delete(cancelled, free.Ref) },
		"get":         func() error { _, err := a.Get(cancelled, vol.Ref); return err },
		"list":        func() error { _, err := a.List(cancelled); return err },
		"detach":      func() error { return a.Detach(cancelled, att) },
		"attachments": func() error { _, err := a.Attachments(cancelled); return err },
		"attach": func() error {
			_, err := a.Attach(cancelled, backends.AttachRequest{Ref: free.Ref, Volume: free.ID, Token: 11})
			return err
		},
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, context.Canceled) {
			e.Errorf("%s with a cancelled context: got %v, want context.Canceled", name, err)
		}
	}
	e.wantList(a, vol, free)
	e.wantAttached(a, att)
}

func resize(e *env) {
	a := e.node("a")
	resizer, ok := backends.As[backends.Resizer](a)
	if !ok {
		e.Skipf("the backend cannot resize")
	}
	vol := e.create(a)
	grow := func(size, want int64) {
		e.Helper()
		if got, err := resizer.Resize(e.ctx(), vol.Ref, size); err != nil || got != want {
			e.Fatalf("resize to %d: got %d, %v; want %d", size, got, err, want)
		}
		if got, err := a.Get(e.ctx(), vol.Ref); err != nil || got.Size != want {
			e.Errorf("get: got %+v, %v; want %d bytes", got, err, want)
		}
	}
	att := e.attach(a, vol, 10)
	e.write(att, vol)
	before := vol
	grow(e.size, e.size)
	grow(e.size-e.round(1), e.size)
	larger := e.size + e.round(1)
	grow(larger-e.round(1)+1, larger)
	if got := e.deviceSize(att); got != larger {
		e.Errorf("the attached device has %d bytes, want %d", got, larger)
	}
	e.verify(att, before)
	e.detach(a, att)
	grow(larger+e.round(1), larger+e.round(1))
	att = e.attach(a, vol, 11)
	if got := e.deviceSize(att); got != larger+e.round(1) {
		e.Errorf("the device has %d bytes after the next attach, want %d", got, larger+e.round(1))
	}
	e.verify(att, before)
	gone := e.unknown()
	if _, err := resizer.Resize(e.ctx(), gone.Ref, e.size); !errors.Is(err, backends.ErrNotFound) {
		e.Errorf("resize: got %v, want ErrNotFound", err)
	}
}
