package ebs

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/flocker-plugin/flocker/backends"
)

// Forbidden implements backends.Permitted: EC2 says of a call with DryRun whether it would be
// allowed. What is allowed for volumes can be asked of a volume alone, as the policy
// goes by its tags: without one there is nothing to say of them.
func (b *Backend) Forbidden(ctx context.Context) ([]string, error) {
	calls, err := b.forbidden(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask for permissions: %w", err)
	}
	return calls, nil
}

func (b *Backend) forbidden(ctx context.Context) (calls []string, err error) {
	c, err := b.connect(ctx)
	if err != nil {
		return nil, err
	}
	kind, err := b.cfg.kind("", nil)
	if err == nil {
		kind, err = kind.fit(1024) // of a size that every type has
	}
	if err != nil {
		return nil, err
	}
	yes, here := aws.Bool(true), []string{c.instance}
	// The first one is harmless, wherever DryRun is not heeded: the others would do something.
	err = ask(ctx, c.ec2.DescribeInstances, &ec2.DescribeInstancesInput{InstanceIds: here, DryRun: yes})
	switch {
	case err == nil:
		return nil, fmt.Errorf("what answers in place of EC2 does not heed DryRun: %w", backends.ErrUnavailable)
	case is(err, notAllowed):
		calls = append(calls, "ec2:DescribeInstances")
	case !is(err, "DryRunOperation"):
		return nil, c.explain(ctx, err, "DescribeInstances")
	}
	page, err := c.ec2.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{
		Filters: []types.Filter{filter("tag:"+tagCluster, b.self.Cluster)}, MaxResults: aws.Int32(5),
	})
	if err != nil {
		return nil, c.explain(ctx, err, "DescribeVolumes")
	}
	create := b.createInput(c, backends.CreateRequest{ID: "dry-run", Cluster: b.self.Cluster, Name: "dry-run"}, kind, 1024, 1)
	create.DryRun = yes
	asked := map[string]func() error{
		"CreateVolume": func() error { return ask(ctx, c.ec2.CreateVolume, create) },
		"DescribeInstanceTypes": func() error {
			return ask(ctx, c.ec2.DescribeInstanceTypes, &ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{types.InstanceTypeM5Large}, DryRun: yes})
		},
	}
	if !b.cfg.KeepInstances {
		// This one stands for the others, which have the same tag.
		asked["StopInstances"] = func() error {
			return ask(ctx, c.ec2.StopInstances, &ec2.StopInstancesInput{InstanceIds: here, DryRun: yes})
		}
	}
	// DeleteVolume is not asked about: nothing but the flag would stand between it and data.
	if len(page.Volumes) > 0 {
		id := page.Volumes[0].VolumeId
		tags := []types.Tag{tag(tagAttached+c.instance+":0", b.self.Node)}
		asked["AttachVolume"] = func() error {
			return ask(ctx, c.ec2.AttachVolume, &ec2.AttachVolumeInput{VolumeId: id, InstanceId: &c.instance, Device: aws.String("/dev/xvdba"), DryRun: yes})
		}
		asked["CreateTags"] = func() error {
			return ask(ctx, c.ec2.CreateTags, &ec2.CreateTagsInput{Resources: []string{*id}, Tags: tags, DryRun: yes})
		}
		asked["DeleteTags"] = func() error {
			return ask(ctx, c.ec2.DeleteTags, &ec2.DeleteTagsInput{Resources: []string{*id}, Tags: tags, DryRun: yes})
		}
		asked["DetachVolume"] = func() error {
			return ask(ctx, c.ec2.DetachVolume, &ec2.DetachVolumeInput{VolumeId: id, InstanceId: &c.instance, DryRun: yes})
		}
	}
	var (
		work sync.WaitGroup
		mu   sync.Mutex
		bad  error
	)
	for action, question := range asked {
		work.Go(func() {
			wrong := question()
			mu.Lock()
			defer mu.Unlock()
			switch {
			case is(wrong, notAllowed):
				calls = append(calls, "ec2:"+action)
			case unanswered(wrong) || throttled(wrong):
				bad = c.explain(ctx, wrong, action)
			}
		})
	}
	work.Wait()
	if bad != nil {
		return nil, bad
	}
	slices.Sort(calls)
	return calls, nil
}

// notAllowed is EC2's word for what the policy does not allow.
const notAllowed = "UnauthorizedOperation"

func ask[Q, R any](ctx context.Context, do call[Q, R], in *Q) error {
	_, err := do(ctx, in)
	return err
}
