"""The files that start clusters say what Ray, AWS, Google Cloud and KubeRay take, and what a study needs of a cluster.

Not checked, since it takes an account: that images, machine types, disk types and roles exist in a region, and Google's rules of
which go together.
"""

import copy
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster_files.reading import CLUSTER_FILES, ROOT, check_ray_versions, filled, placeholders, ray_command_error

CLOUDS = ["cluster.yaml", "clusters/gcp.yaml"]
RAY_FILES = [*CLOUDS, "clusters/local.yaml"]
RAYJOB = "clusters/kuberay-rayjob.yaml"
HERE = Path(__file__).parent
MARKED = {
    "cluster.yaml": {"REGION", "BUCKET", "PROFILE"},
    "clusters/gcp.yaml": {"REGION", "ZONE", "PROJECT", "BUCKET"},
    "clusters/local.yaml": {"HEAD", "WORKER", "USER", "KEY"},
    RAYJOB: {"REGISTRY"},
}
"""What only a user knows, by file."""
RUN = {"CPU": 1.0, "GPU": 1.0}
"""What a run asks for where there are GPUs."""


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(filled((ROOT / name).read_text()))
    return loaded


def node_types(name: str) -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = load(name)["available_node_types"]
    return kinds


def check_ray_schema(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration as ``ray up`` completes it; raises where it would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def run_instances_errors(node_config: dict[str, Any]) -> str:
    """Return what boto3's model of EC2's RunInstances says against a ``node_config``."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    asked = {**node_config, "MinCount": 1, "MaxCount": 1}  # which Ray adds
    return str(ParamValidator().validate(asked, shape).generate_report() + "".join(enum_errors(shape, asked)))


def enum_errors(shape: Any, value: Any) -> Iterator[str]:
    """Yield the values that are none of those that their shape lists; boto3 leaves that to the service."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in shape.members:
                yield from enum_errors(shape.members[key], inner)
    elif isinstance(value, list):
        for inner in value:
            yield from enum_errors(shape.member, inner)
    elif (listed := getattr(shape, "enum", None)) and value not in listed:
        yield f"{value} is none of {shape.name}"


def strict(schema: Any) -> Any:
    """Return a schema of Kubernetes' kind, in which objects with listed fields have no others."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) and "type" in schema else {}
    return {key: strict(part) for key, part in schema.items()} | closed


def check_rayjob(job: dict[str, Any]) -> None:
    jsonschema.validate(job, strict(yaml.safe_load((HERE / "kuberay_rayjob.yaml").read_text())))


def check_instance(node_config: dict[str, Any]) -> None:
    jsonschema.validate(node_config, json.loads((HERE / "compute_instance.json").read_text()))


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_takes_the_file(name: str) -> None:
    check_ray_schema(load(name))


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: Any) -> None:
        for step in path[:-1]:
            config = config[step]
        config[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("idle_timeout", to=5),
        _set("max_workers", to="8"),
        _set("docker", "gpus", to="all"),
        _set("head_node_type", to="boss"),
        _set("available_node_types", "gpu", "min_workers", to=9),
        _set("available_node_types", "gpu", "resources", to={"GPU": "one"}),
    ],
    ids=["wrong key", "wrong type", "wrong key within", "no such type", "min > max", "wrong type within"],
)
def test_ray_refuses_a_wrong_file(change: Callable[[dict[str, Any]], None]) -> None:
    config = load("clusters/gcp.yaml")
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_ray_schema(config)


@pytest.mark.parametrize("kind", ["head", "gpu", "gpu-spot"])
def test_ec2_takes_every_node_config(kind: str) -> None:
    assert run_instances_errors(node_types("cluster.yaml")[kind]["node_config"]) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("InstanceTyp", to="g5.xlarge"), "Unknown parameter"),
        (_set("BlockDeviceMappings", 0, "Ebs", "VolumeSize", to="200"), "Invalid type"),
        (_set("IamInstanceProfile", to="dfkt"), "Invalid type"),
        (_set("InstanceMarketOptions", "MarketType", to="cheap"), "none of MarketType"),
    ],
    ids=["wrong key", "wrong type within", "wrong type", "no such value"],
)
def test_ec2_refuses_a_wrong_node_config(change: Callable[[dict[str, Any]], None], said: str) -> None:
    node_config = copy.deepcopy(node_types("cluster.yaml")["gpu-spot"]["node_config"])
    change(node_config)
    assert said in run_instances_errors(node_config)


@pytest.mark.parametrize("kind", ["head", "gpu", "gpu-spot"])
def test_compute_engine_takes_every_node_config(kind: str) -> None:
    check_instance(node_types("clusters/gcp.yaml")[kind]["node_config"])


@pytest.mark.parametrize(
    "change",
    [
        _set("machine", to="g2-standard-8"),
        _set("disks", 0, "initializeParams", "diskSize", to=200),
        _set("scheduling", to=[{"preemptible": True}]),
        _set("scheduling", "provisioningModel", to="CHEAP"),
    ],
    ids=["wrong key", "wrong key within", "wrong type", "no such value"],
)
def test_compute_engine_refuses_a_wrong_node_config(change: Callable[[dict[str, Any]], None]) -> None:
    node_config = copy.deepcopy(node_types("clusters/gcp.yaml")["gpu-spot"]["node_config"])
    check_instance(node_config)
    change(node_config)
    with pytest.raises(jsonschema.ValidationError):
        check_instance(node_config)


def test_kuberay_takes_the_job() -> None:
    check_rayjob(load(RAYJOB))


GROUP = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")


@pytest.mark.parametrize(
    "change",
    [
        _set("spec", "shutdownAfterJob", to=True),
        _set("spec", "rayClusterSpec", "autoscalerOptions", "version", to="v3"),
        _set("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus", to=0),
        _set(*GROUP, "maxReplicas", to="8"),
        _set(*POD, "containers", 0, "resources", "limits", "memory", to="14 GB"),
        _set(*POD, "containers", 0, "image_name", to="dfkt"),
        _set(*POD, "tolerations", 0, "effect", to="NoSchedul"),
    ],
    ids=[
        "wrong key",
        "no such version",
        "number for text",
        "wrong type",
        "no quantity",
        "wrong key within",
        "no value",
    ],
)
def test_kuberay_refuses_a_wrong_job(change: Callable[[dict[str, Any]], None]) -> None:
    job = load(RAYJOB)
    change(job)
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(job)


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_what_only_a_user_knows_is_marked(name: str) -> None:
    """And nothing else is, so a file without marks is ready."""
    assert placeholders((ROOT / name).read_text()) == MARKED[name]
    assert "CHANGE-ME" not in yaml.safe_dump(load(name))


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_a_value_filled_in_for_the_user_is_found(name: str) -> None:
    for mark in MARKED[name]:
        text = (ROOT / name).read_text().replace(f"CHANGE-ME-{mark}", "ours")
        assert placeholders(text) == MARKED[name] - {mark}


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_the_ray_of_a_file_is_one_that_the_package_takes(name: str) -> None:
    assert check_ray_versions((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTER_FILES)
@pytest.mark.parametrize("other", ["2.59.0", "2.61.0"])
def test_another_ray_is_found(name: str, other: str) -> None:
    with pytest.raises(AssertionError, match=other):
        check_ray_versions((ROOT / name).read_text().replace("2.60.0", other))


@pytest.mark.parametrize("name", [name for name in CLUSTER_FILES if name != RAYJOB])
def test_no_command_replaces_the_images_ray_and_every_machine_gets_one_torch(name: str) -> None:
    config = load(name)
    commands = (
        config["setup_commands"] + config.get("head_setup_commands", []) + config.get("worker_setup_commands", [])
    )
    words = [word for command in commands for word in shlex.split(command, comments=True)]
    assert not {"-U", "--upgrade", "--force-reinstall", "-I", "--ignore-installed"} & set(words)
    assert [word for word in words if word.startswith(("torch==", "torchvision=="))]
    if name in CLOUDS:
        assert not [word for word in words if word.startswith("ray")]


@pytest.mark.parametrize("name", [name for name in CLUSTER_FILES if name != RAYJOB])
def test_every_command_is_one_of_the_shell_and_of_ray(name: str) -> None:
    config = load(name)
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert len(commands) >= 5
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True).stderr == ""
        if "ray start" in command or "ray stop" in command:
            words = shlex.split(command)
            ray = next(k for k, word in enumerate(words) if word.split("/")[-1] == "ray")
            assert ray_command_error(words[ray + 1 :]) == ""


def test_an_option_that_ray_does_not_have_is_found() -> None:
    assert "--head-only" in ray_command_error(["start", "--head-only"])
    assert "strat" in ray_command_error(["strat"])


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_takes_no_runs_and_shows_its_dashboard_to_itself_alone(name: str) -> None:
    config = load(name)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1"} <= set(shlex.split(start))


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_by_demand_and_go_when_idle(name: str) -> None:
    prepared = check_ray_schema(load(name))
    workers = {kind: told for kind, told in prepared["available_node_types"].items() if kind != "head"}
    assert {told["min_workers"] for told in workers.values()} == {0}
    assert {told["max_workers"] for told in workers.values()} == {prepared["max_workers"]}
    assert prepared["idle_timeout_minutes"] <= 10


def test_every_machine_has_an_image_a_disk_of_200_gb_and_the_role_that_opens_the_bucket() -> None:
    for told in node_types("cluster.yaml").values():
        node = told["node_config"]
        assert node["ImageId"].startswith(("ami-", "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-"))
        assert node["IamInstanceProfile"] == {"Name": "changed-profile"}
        assert [disk["Ebs"]["VolumeSize"] for disk in node["BlockDeviceMappings"]] == [200]
    for kind, told in node_types("clusters/gcp.yaml").items():
        node = told["node_config"]
        assert [disk["initializeParams"]["diskSizeGb"] for disk in node["disks"]] == [200]
        assert ("serviceAccounts" in node) == (kind != "head")  # Ray gives the head its own


@pytest.mark.parametrize("name", CLOUDS)
def test_containers_see_gpus_and_have_shared_memory_for_the_object_store(name: str) -> None:
    docker = load(name)["docker"]
    options = " ".join(docker["run_options"]).split()
    assert docker["worker_run_options"] == ["--gpus=all"]
    assert "--shm-size=8gb" in options
    assert [option for option in options if option.startswith(("--env=DFKT_RESULTS=s3://", "--env=DFKT_RESULTS=gs://"))]


def launches(name: str, runs: int, spot_available: float = 1.0) -> dict[str, int]:
    """Return how many machines of which kind Ray's autoscaler starts for as many runs that wait."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    config = load(name)
    for told in config["available_node_types"].values():
        told["resources"] = told["resources"] or {"CPU": 4, "GPU": 1}  # which Ray asks AWS for
    told = AutoscalingConfig(check_ray_schema(config), skip_content_hash=True)
    wait = [GangResourceRequest(requests=[ResourceRequestUtil.make(RUN)]) for _ in range(runs)]
    request = SchedulingRequest(
        node_type_configs=told.get_node_type_configs(),
        max_num_nodes=config["max_workers"],
        gang_resource_requests=wait,
        recoverable_resource_availabilities={"gpu-spot": spot_available},
        disable_launch_config_check=True,
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_autoscaler_takes_spot_machines_and_falls_back_when_there_are_none(name: str) -> None:
    assert launches(name, 0) == {}
    assert launches(name, 3) == {"gpu-spot": 3}
    assert launches(name, 3, spot_available=0) == {"gpu": 3}
    assert launches(name, 20) == {"gpu-spot": 8}


def test_the_autoscaler_of_the_job_brings_gpu_pods_by_demand_and_none_for_the_head() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = load(RAYJOB)["spec"]
    cluster = {"metadata": {"name": "dfkt", "namespace": "default"}, "spec": spec["rayClusterSpec"]}
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 8)
    assert {"CPU": 4, "GPU": 1}.items() <= kinds["gpu"]["resources"].items()
    assert spec["shutdownAfterJobFinishes"]
    assert spec["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


def test_the_jobs_command_gets_the_bucket_on_the_head_and_asks_for_as_many_runs_as_pods_may_come() -> None:
    """The submitter's shell, which knows no bucket, hands its words to ``ray job submit``, which quotes them for the head's."""
    spec = load(RAYJOB)["spec"]
    submitted = shlex.join(shlex.split(spec["entrypoint"])).replace("python ", "echo ")
    env = {"DFKT_RESULTS": "s3://ours/dfkt", "PATH": os.environ["PATH"]}
    said = subprocess.run(submitted, shell=True, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert said[said.index("--results") + 1] == "s3://ours/dfkt"
    assert said[said.index("--gpus-per-worker") + 1] == "1"
    most = spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert said[said.index("--at-once") + 1] == str(most)


@contextmanager
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for EC2 and IAM in this process, and its EC2 client."""
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with mock_aws():
        boto3.client("iam", "us-west-2").create_instance_profile(InstanceProfileName="changed-profile")
        yield boto3.client("ec2", "us-west-2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rays_own_code_for_aws_starts_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key pair, subnets and a security group that it makes itself; against moto, which knows AWS's machine types."""
    from ray.autoscaler._private.aws import node_provider

    config = check_ray_schema(load("cluster.yaml"))
    config["provider"]["region"] = "us-west-2"
    kinds = sorted({told["node_config"]["InstanceType"] for told in config["available_node_types"].values()})
    with aws(monkeypatch) as ec2:
        described = ec2.describe_instance_types(InstanceTypes=kinds)["InstanceTypes"]
        monkeypatch.setattr(node_provider, "list_ec2_instances", lambda *_: described)  # else all 900 of the region
        provider_class = node_provider.AWSNodeProvider
        config = provider_class.bootstrap_config(provider_class.fillout_available_node_types_resources(config))
        provider = provider_class(config["provider"], "dfkt")
        for kind, told in config["available_node_types"].items():
            provider.create_node(told["node_config"], {"ray-user-node-type": kind}, 1)
        started = [one for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]]
        disks = ec2.describe_volumes()["Volumes"]

    found = {
        next(tag["Value"] for tag in one["Tags"] if tag["Key"] == "ray-user-node-type"): one.get("InstanceLifecycle")
        for one in started
    }
    assert found == {"head": None, "gpu": None, "gpu-spot": "spot"}
    assert {one["IamInstanceProfile"]["Arn"].rpartition("/")[2] for one in started} == {"changed-profile"}
    assert {disk["Size"] for disk in disks} == {200}
    assert {"CPU": 4, "GPU": 1}.items() <= config["available_node_types"]["gpu"]["resources"].items()
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
