package ebs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/flocker-plugin/flocker/backends"
	"github.com/flocker-plugin/flocker/backends/internal/poll"
)

// Fence implements backends.Fencer. What it goes by is that EC2 shows the volume
// detached after a detach that was not forced: the instance has let go of it, or is
// switched off. An instance that does not let go is stopped. A forced detach is
// never asked for: it takes the volume from EC2's books, and proves nothing of what
// the instance has still under way.
func (b *Backend) Fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	evidence, err := b.fence(ctx, req)
	if err != nil {
		return "", fmt.Errorf("cut %s off from volume %s: %w", req.Node, req.Volume, err)
	}
	return evidence, nil
}

func (b *Backend) fence(ctx context.Context, req backends.FenceRequest) (string, error) {
	c, err := b.connect(ctx)
	if err != nil {
		return "", err
	}
	c = c.urgent
	id, err := c.id(req.Ref)
	if err != nil {
		return "", err
	}
	if !instanceForm.MatchString(req.Identity) {
		return "", fmt.Errorf("%q is no EC2 instance: %w", req.Identity, backends.ErrInvalid)
	}
	v, err := b.find(ctx, c, id)
	if err != nil {
		return "", err
	}
	if v.ID != req.Volume {
		return "", fmt.Errorf("%s is volume %s: %w", id, v.ID, backends.ErrInvalid)
	}
	_, on := v.on(req.Identity)
	for started := time.Now(); on && time.Since(started) < b.pace.lag; _, on = v.on(req.Identity) {
		if _, ok := v.tokens[req.Identity]; ok {
			break
		}
		// Its tag may be shown later than the attachment, and be of a younger token.
		if err := poll.Sleep(ctx, b.pace.First); err != nil {
			return "", err
		}
		if v, err = b.find(ctx, c, id); err != nil {
			return "", err
		}
	}
	switch token := v.tokens[req.Identity].token; {
	case !on:
		return fmt.Sprintf("%s is not attached to %s", id, req.Identity), nil
	case token > req.Token:
		return fmt.Sprintf("%s is attached to %s under the younger token %d only", id, req.Identity, token), nil
	}
	return b.cut(ctx, c, id, req.Identity)
}

// cut takes a volume away from an instance, whatever that takes.
func (b *Backend) cut(ctx context.Context, c *conn, id, instance string) (string, error) {
	state, err := b.instanceState(ctx, c, instance)
	if err != nil {
		return "", err
	}
	if state == types.InstanceStateNameRunning || state == types.InstanceStateNamePending {
		err := b.pull(ctx, c, id, instance, b.pace.grace)
		if err == nil {
			return fmt.Sprintf("%s has let go of %s, which EC2 shows detached", instance, id), nil
		}
		slow, ok := errors.AsType[*stuck](err)
		switch {
		case !ok, ctx.Err() != nil:
			return "", err
		case instance == c.instance:
			return "", fmt.Errorf("this host itself does not let go of it: %w", slow)
		case b.cfg.KeepInstances:
			return "", fmt.Errorf("%w; it may still write, and keep_instances is set: stop instance %s by hand", slow, instance)
		}
		if err := b.stop(ctx, c, instance, false); err != nil {
			return "", err
		}
	}
	if state, err = b.awaitStop(ctx, c, instance); err != nil {
		return "", err
	}
	if err := b.pull(ctx, c, id, instance, b.pace.settle); err != nil {
		return "", err
	}
	return fmt.Sprintf("instance %s is %s, and EC2 shows %s detached from it", instance, state, id), nil
}

// instanceState is terminated for an instance that EC2 has forgotten.
func (b *Backend) instanceState(ctx context.Context, c *conn, instance string) (types.InstanceStateName, error) {
	out, err := c.ec2.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{instance}})
	if is(err, "InvalidInstanceID.NotFound") {
		return types.InstanceStateNameTerminated, nil
	}
	if err != nil {
		return "", c.explain(ctx, err, "DescribeInstances")
	}
	for _, r := range out.Reservations {
		for _, i := range r.Instances {
			if aws.ToString(i.InstanceId) == instance && i.State != nil {
				return i.State.Name, nil
			}
		}
	}
	return "", fmt.Errorf("EC2 says nothing of instance %s: %w", instance, backends.ErrUnavailable)
}

func (b *Backend) stop(ctx context.Context, c *conn, instance string, force bool) error {
	in := &ec2.StopInstancesInput{InstanceIds: []string{instance}}
	if force {
		in.Force = aws.Bool(true)
	}
	_, err := c.ec2.StopInstances(ctx, in, c.once)
	if is(err, "IncorrectInstanceState") { // it is stopping, or gone
		return nil
	}
	if is(err, "UnsupportedOperation") {
		return fmt.Errorf("instance %s cannot be stopped (%s): terminate it by hand: %w", instance, code(err), backends.ErrUnavailable)
	}
	return c.explain(ctx, err, "StopInstances")
}

// awaitStop waits until an instance is off, and presses harder if it does not stop.
func (b *Backend) awaitStop(ctx context.Context, c *conn, instance string) (off types.InstanceStateName, err error) {
	err = b.pace.Until(ctx, 10*time.Minute, "instance "+instance+" is being stopped", func() (bool, error) {
		state, err := b.instanceState(ctx, c, instance)
		if err != nil {
			return false, err
		}
		b.mu.Lock()
		since, stopping := b.stops[instance]
		switch {
		case state != types.InstanceStateNameStopping:
			delete(b.stops, instance)
		case !stopping:
			b.stops[instance] = time.Now()
		case time.Since(since) > b.pace.force:
			b.stops[instance] = time.Now()
		}
		b.mu.Unlock()
		switch {
		case state == types.InstanceStateNameStopped || state == types.InstanceStateNameTerminated:
			off = state
			return true, nil
		case state == types.InstanceStateNameStopping && stopping && time.Since(since) > b.pace.force:
			return false, b.stop(ctx, c, instance, true)
		case state == types.InstanceStateNameRunning && stopping:
			return false, fmt.Errorf("instance %s has been started again: %w", instance, backends.ErrUnavailable)
		}
		return false, nil
	})
	return off, err
}

// stuck says that an instance does not let go of a volume.
type stuck struct {
	volume, instance string
	state            types.VolumeAttachmentState
}

func (s *stuck) Error() string {
	return fmt.Sprintf("EC2 was asked to detach %s, and instance %s has not let go of it yet (%s)", s.volume, s.instance, s.state)
}

func (s *stuck) Is(target error) bool { return target == backends.ErrUnavailable }

// pull detaches a volume from an instance, not by force, and returns when EC2 shows
// it detached. limit is how long the instance has for that, from when EC2 has taken the call:
// that EC2 throttles this host says nothing of the instance.
func (b *Backend) pull(ctx context.Context, c *conn, id, instance string, limit time.Duration) error {
	var asked time.Time
	for sent, wait := false, b.pace.First; ; wait = min(wait*3/2, b.pace.Most) {
		late := !asked.IsZero() && time.Since(asked) > limit // before the look, which may be slow
		v, err := b.look(ctx, c, id)
		if err != nil {
			return err
		}
		if v == nil {
			return nil // deleted
		}
		on, ok := v.on(instance)
		if !ok {
			return nil
		}
		if late {
			return &stuck{id, instance, on.state}
		}
		detaching := on.state == types.VolumeAttachmentStateDetaching || on.state == types.VolumeAttachmentStateBusy
		if !sent && !detaching {
			_, err := c.ec2.DetachVolume(ctx, &ec2.DetachVolumeInput{VolumeId: &id, InstanceId: &instance}, c.once)
			switch {
			case unanswered(err):
				// It may be carried out yet, and would hit a newer attachment then: so
				// this is no success, even if the volume is detached by now.
				return c.explain(ctx, err, "DetachVolume")
			case err == nil:
				sent, asked = true, time.Now()
			case !is(err, "IncorrectState", "InvalidAttachment.NotFound", "InvalidVolume.NotFound"):
				return c.explain(ctx, err, "DetachVolume")
			}
		}
		if asked.IsZero() {
			asked = time.Now()
		}
		if err := poll.Sleep(ctx, wait); err != nil {
			return fmt.Errorf("%w: %w", &stuck{id, instance, on.state}, err)
		}
	}
}
