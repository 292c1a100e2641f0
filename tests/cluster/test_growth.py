"""A cluster that sleeps without workers: a job asks for what it wants, waits for it, and plans with it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

ROOT = Path(__file__).resolve().parents[2]

JOB = """
import json, sys, time, ray
from pipeline.runtime import resources
from pipeline.scoring import actor_pool
from pipeline.errors import InputError

deadline = time.monotonic() + 60
while True:
    try:
        ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
        break
    except ConnectionError:
        assert time.monotonic() < deadline
        time.sleep(0.5)

def count():
    return [ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")]

said = {"asleep": count()}
resources.require_cpus(1, "an actor")
said["cpus"] = count()
resources.wait_for_cluster(gpus=8)
said["woken"] = count()
said["gpu"] = resources.claim_gpus(2)
said["pool"] = actor_pool.plan_actor_pool(100, None, None, actor_pool.free_cpus()).gpus
start = time.monotonic()
for name, refused in {
    "too many": lambda: resources.require_cpus(4, "4 workers"),
    "too many gpus": lambda: resources.claim_gpus(3),
}.items():
    try:
        refused()
    except InputError as error:
        said[name] = str(error)
said["seconds"] = time.monotonic() - start
print(json.dumps(said))
"""


def _config(address: str) -> dict[str, Any]:
    """Ray's own autoscaler, whose machines are processes here; a GPU is a number."""
    node = {"node_config": {}, "min_workers": 0, "max_workers": 1}
    small = {"object_store_memory": 80 * 2**20}
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "growth",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {**node, "resources": {"CPU": 3, **small}},
            "gpu": {**node, "resources": {"CPU": 1, "GPU": 2, **small}},
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in commands},
    }


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head without CPUs and its autoscaler, in processes of their own: address, and environment of drivers."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    # In Ray's usual folder the head would leave its address, which every later ray.init() on this machine would follow;
    # pytest's own folders are too deep for sockets.
    folder = Path(tempfile.mkdtemp(prefix="dubito-growth-", dir="/tmp"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(_config(address)))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0", f"--port={port}",
        f"--autoscaling-config={config}", "--object-store-memory=80000000", "--include-dashboard=false",
        f"--temp-dir={folder}/ray",
    ]  # fmt: skip
    outside = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    outside |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "DUBITO_GROWS": "CPU=4,GPU=2"}
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    log = (tmp_path / "head.log").open("w")
    with log, subprocess.Popen(command, env=outside | own, start_new_session=True, stdout=log, stderr=log) as head:
        try:
            yield address, outside
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # all that it started, and nothing else
            head.wait()
            shutil.rmtree(folder, ignore_errors=True)


def test_a_job_wakes_a_cluster_that_sleeps(asleep: tuple[str, dict[str, str]], tmp_path: Path):
    address, environment = asleep
    done = subprocess.run(
        [sys.executable, "-c", JOB, address], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["asleep"] == [0, 0]
    assert said["cpus"] == [3, 0]
    assert said["woken"] == [4, 2]
    assert said["gpu"] is True
    assert said["pool"] == 1
    assert said["too many"] == (
        "4 workers and 1 CPU for reading want 5 CPUs, the cluster has 4; ask for fewer, or add nodes"
    )
    assert said["too many gpus"].startswith("train.workers = 3 want a GPU each, the cluster has 2")
    assert said["seconds"] < 5
