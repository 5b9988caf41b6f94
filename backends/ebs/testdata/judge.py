# Drives the imitation of EC2 with Amazon's own client, which knows the API's model and
# refuses what does not fit it. Prints what it has seen, one fact a line.
import sys
import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

url, key, first, second = sys.argv[1:]
ec2 = boto3.client("ec2", region_name="us-east-1", endpoint_url=url, aws_access_key_id=key,
                   aws_secret_access_key="secret", config=Config(retries={"max_attempts": 0}))


def refused(call, **args):
    try:
        call(**args)
    except ClientError as e:
        return e.response["Error"]["Code"]
    return "accepted"


def create(token, size=1):
    return ec2.create_volume(AvailabilityZone="us-east-1a", Size=size, VolumeType="gp3", Iops=3000, Throughput=125, ClientToken=token,
                             TagSpecifications=[{"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": "größe <&>"}]}])


vol = create("t-0")
print("create", vol["State"], vol["Size"], vol["VolumeType"], vol["Iops"], vol["Throughput"], vol["CreateTime"].year > 2000)
print("again", create("t-0")["VolumeId"] == vol["VolumeId"])
print("other size", refused(create, token="t-0", size=2))
ec2.get_waiter("volume_available").wait(VolumeIds=[vol["VolumeId"]], WaiterConfig={"Delay": 0})
for i in range(1, 12):
    create("t-%d" % i)
pages = list(ec2.get_paginator("describe_volumes").paginate(PaginationConfig={"PageSize": 5}))
ids = [v["VolumeId"] for p in pages for v in p["Volumes"]]
print("pages", [len(p["Volumes"]) for p in pages], len(set(ids)))
print("ids and pages", refused(ec2.describe_volumes, VolumeIds=[vol["VolumeId"]], MaxResults=5))
ec2.create_tags(Resources=[vol["VolumeId"]], Tags=[{"Key": "flocker:attached:i-1:2", "Value": "node"}])
shown = ec2.describe_volumes(Filters=[{"Name": "tag:flocker:attached:i-1:2", "Values": ["node"]}])["Volumes"]
print("tags", [sorted((t["Key"], t["Value"]) for t in v["Tags"]) for v in shown])
ec2.delete_tags(Resources=[vol["VolumeId"]], Tags=[{"Key": "flocker:attached:i-1:2"}])
print("untagged", len(ec2.describe_volumes(VolumeIds=[vol["VolumeId"]])["Volumes"][0]["Tags"]))
att = ec2.attach_volume(VolumeId=vol["VolumeId"], InstanceId=first, Device="/dev/xvdba")
print("attach", att["State"], att["InstanceId"] == first, att["Device"])
print("elsewhere", refused(ec2.attach_volume, VolumeId=vol["VolumeId"], InstanceId=second, Device="/dev/xvdba"))
print("delete", refused(ec2.delete_volume, VolumeId=vol["VolumeId"]))
ec2.get_waiter("volume_in_use").wait(VolumeIds=[vol["VolumeId"]], WaiterConfig={"Delay": 0})
got = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [first]}])["Volumes"]
print("attached", [(v["State"], v["Attachments"][0]["Device"]) for v in got])
print("wrong instance", refused(ec2.detach_volume, VolumeId=vol["VolumeId"], InstanceId=second))
print("dry run", refused(ec2.stop_instances, InstanceIds=[first], DryRun=True), refused(ec2.delete_volume, VolumeId=vol["VolumeId"], DryRun=True),
      ec2.describe_instances(InstanceIds=[first])["Reservations"][0]["Instances"][0]["State"]["Name"])
print("dry run of nothing", refused(ec2.delete_volume, VolumeId="vol-00000000000000bad", DryRun=True))
print("not allowed", refused(ec2.terminate_instances, InstanceIds=[first], DryRun=True), refused(ec2.terminate_instances, InstanceIds=[first]))
stop = ec2.stop_instances(InstanceIds=[first])["StoppingInstances"][0]
print("stop", stop["PreviousState"]["Name"], stop["CurrentState"]["Name"])
ec2.get_waiter("instance_stopped").wait(InstanceIds=[first], WaiterConfig={"Delay": 0})
print("detach", ec2.detach_volume(VolumeId=vol["VolumeId"], InstanceId=first)["State"])
ec2.get_waiter("volume_available").wait(VolumeIds=[vol["VolumeId"]], WaiterConfig={"Delay": 0})
print("detach again", refused(ec2.detach_volume, VolumeId=vol["VolumeId"], InstanceId=first))
kind = ec2.describe_instances(InstanceIds=[first])["Reservations"][0]["Instances"][0]["InstanceType"]
info = ec2.describe_instance_types(InstanceTypes=[kind])["InstanceTypes"][0]["EbsInfo"]
print("limit", kind, info["MaximumEbsAttachments"], info["AttachmentLimitType"])
ec2.delete_volume(VolumeId=vol["VolumeId"])
ec2.get_waiter("volume_deleted").wait(VolumeIds=[vol["VolumeId"]], WaiterConfig={"Delay": 0})
print("gone", refused(ec2.describe_volumes, VolumeIds=[vol["VolumeId"]]))
print("unknown", refused(ec2.attach_volume, VolumeId="vol-0123456789abcdef0", InstanceId=second, Device="/dev/xvdba"))
