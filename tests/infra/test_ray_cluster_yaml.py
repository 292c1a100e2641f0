"""``ray_cluster.yaml``: Ray's own check, sizes of one place, the token, and spot with on demand to fall back on."""

import copy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra import nodes

pytest.importorskip("boto3", reason="boto3 is not installed (extra 'aws')")
from botocore.stub import Stubber  # noqa: E402
from ray.autoscaler.node_launch_exception import NodeLaunchException  # noqa: E402

from infra.aws import MARKET, SpotFirst  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    """Ray's own check of a cluster file, as ``ray up`` does it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    return prepared


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text("utf-8"))


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]):
    prepared = validate(cluster)
    assert prepared["available_node_types"].keys() == {"head", "gpu", "cpu"}
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert prepared["idle_timeout_minutes"] * 60 == nodes.IDLE_S


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cluster: cluster.update(max_worker=3),
        lambda cluster: cluster["available_node_types"]["gpu"].update(gpus=1),
        lambda cluster: cluster["available_node_types"]["gpu"]["docker"].update(worker_run_option=[]),
        lambda cluster: cluster["available_node_types"]["cpu"]["resources"].update(CPU="many"),
        lambda cluster: cluster["docker"].update(images="x"),
        lambda cluster: cluster["provider"].pop("type"),
    ],
    ids=["top", "node", "node's docker", "resources", "docker", "provider"],
)
def test_ray_refuses_a_misspelt_cluster_file(cluster: dict[str, Any], spoil: Callable[[dict[str, Any]], object]):
    spoil(cluster)
    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate(cluster)


def test_sizes_and_counts_are_those_of_the_one_place(cluster: dict[str, Any]):
    types = cluster["available_node_types"]
    assert types["head"]["node_config"]["InstanceType"] == nodes.HEAD.instance
    for group in nodes.WORKERS:
        node = types[group.name]
        wanted = {"CPU": group.cpus, **({"GPU": group.gpus} if group.gpus else {})}
        assert node["resources"] == wanted
        assert node["node_config"]["InstanceType"] == group.instance
        assert (node["min_workers"], node["max_workers"]) == (0, group.most)
    assert cluster["max_workers"] == sum(group.most for group in nodes.WORKERS)
    assert cluster["docker"]["image"] == nodes.image()


def test_workers_are_spot_and_the_head_never_is(cluster: dict[str, Any]):
    spot = {name for name, node in cluster["available_node_types"].items() if MARKET in node["node_config"]}
    assert spot == {group.name for group in nodes.WORKERS}


def test_every_node_gets_the_token_and_asks_for_it(cluster: dict[str, Any]):
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    options = shlex.split(" ".join(cluster["docker"]["run_options"]))
    assert "RAY_AUTH_MODE=token" in options
    assert f"DUBITO_GROWS={nodes.grows(pods=False)}" in options
    started = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in started


def test_ray_mounts_the_token_where_the_images_ray_looks_for_it(cluster: dict[str, Any]):
    from ray.autoscaler._private.docker import docker_start_cmds

    dockerfile = (ROOT / "infra" / "Dockerfile").read_text("utf-8")
    (home,) = [line.removeprefix("ENV HOME=") for line in dockerfile.splitlines() if line.startswith("ENV HOME=")]
    command = docker_start_cmds(
        "ubuntu", "image", cluster["file_mounts"], "dubito", cluster["docker"]["run_options"], "dubito", home, "docker"
    )
    words = shlex.split(command)
    mounts = [words[index + 1].split(":")[1] for index, word in enumerate(words) if word == "-v"]
    assert mounts == [f"{home}/.ray/auth_token"]
    assert f"install -d -o ray -g ray -m 700 {home}/.ray" in dockerfile


def test_ray_up_finds_the_provider_by_the_files_name_for_it(cluster: dict[str, Any]):
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    prepared = validate(cluster)
    assert _NODE_PROVIDERS[prepared["provider"]["type"]](prepared["provider"]) is SpotFirst


def test_the_file_says_all_that_ray_would_fill_in_for_its_own_provider(cluster: dict[str, Any]):
    own = copy.deepcopy(cluster)
    own["provider"].pop("module")
    own["provider"]["type"] = "aws"
    filled, ours = validate(own), validate(cluster)
    assert {**filled, "provider": None} == {**ours, "provider": None}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> SpotFirst:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")  # nothing is sent
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return SpotFirst({"region": "us-west-2", "cache_stopped_nodes": False}, "dubito")


def _answers(provider: SpotFirst, errors: list[str], *, then: bool) -> tuple[Stubber, list[dict[str, Any]]]:
    """Play EC2: every error in turn, then a machine; and the requests as they come."""
    client = provider.ec2_fail_fast.meta.client
    stub, asked = Stubber(client), []
    client.meta.events.register("provide-client-params.ec2.RunInstances", lambda params, **_: asked.append(params))
    for code in errors:
        stub.add_client_error("run_instances", code, "no")
    if then:
        machine = {"InstanceId": "i-1", "State": {"Name": "pending"}, "StateReason": {"Message": "pending"}}
        stub.add_response("run_instances", {"Instances": [machine]})
    return stub, asked


def _node(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    return {**cluster["available_node_types"][name]["node_config"], "SubnetIds": ["subnet-a", "subnet-b"]}


TRIES = 5
"""Ray asks so often, in the zones in turn."""


def test_a_spot_machine_is_asked_for_first(cluster: dict[str, Any], provider: SpotFirst):
    stub, asked = _answers(provider, [], then=True)
    with stub:
        assert list(provider.create_node(_node(cluster, "gpu"), {}, 1)) == ["i-1"]
    assert [each[MARKET] for each in asked] == [{"MarketType": "spot"}]


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "MaxSpotInstanceCountExceeded"])
def test_where_no_zone_has_spot_the_machine_is_had_on_demand(cluster: dict[str, Any], provider: SpotFirst, code: str):
    stub, asked = _answers(provider, [code] * TRIES, then=True)
    node = _node(cluster, "gpu")
    with stub:
        assert list(provider.create_node(node, {}, 1)) == ["i-1"]
    assert [MARKET in each for each in asked] == [True] * TRIES + [False]
    assert {each["SubnetId"] for each in asked[:TRIES]} == {"subnet-a", "subnet-b"}
    assert {each["InstanceType"] for each in asked} == {nodes.GPU.instance}
    assert MARKET in node  # the next launch asks for spot again


@pytest.mark.parametrize(("name", "code"), [("gpu", "UnauthorizedOperation"), ("head", "InsufficientInstanceCapacity")])
def test_what_on_demand_would_not_mend_is_an_error_at_once(
    cluster: dict[str, Any], provider: SpotFirst, name: str, code: str
):
    stub, asked = _answers(provider, [code] * TRIES, then=False)
    with stub, pytest.raises(NodeLaunchException, match=code):
        provider.create_node(_node(cluster, name), {}, 1)
    assert len(asked) == TRIES


def test_ray_alone_would_ask_for_the_refused_type_again():
    """Why ``infra/aws.py`` is there. Should this fail after an update of Ray, two node types may do instead."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    refused = InstanceUpdateEvent(instance_type="gpu-spot", new_instance_status=Instance.ALLOCATION_FAILED)
    monitor.notify([refused])
    assert monitor.get_recoverable_resource_availabilities() == {}
    never_joined = InstanceUpdateEvent(instance_type="gpu-spot", new_instance_status=Instance.ALLOCATION_TIMEOUT)
    monitor.notify([never_joined])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu-spot": 0.0}
