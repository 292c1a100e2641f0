"""Many nodes for real: a head and workers as separate Ray nodes, jobs sent to them, a node killed in the middle."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pytest
import yaml

from infra.local.cluster import LocalCluster, Node, _descendants, local_cluster
from infra.local.network import allowed
from infra.local.s3_server import binary
from pipeline import predictions, storage
from pipeline.models.bundle import open_bundle
from pipeline.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA = "s3://data/digits"
CONFIG = {
    "task": "segmentation",
    "data": DATA,
    "out": "s3://data/runs/1",
    "model": {"name": "unet", "width": 4, "depth": 2},
    "loss": {"cross_entropy": 1},
    "input": {"size": [32, 32]},
    "train": {"batch_size": 4, "steps": 240, "validate_every": 20, "threads": 1},
}
INGEST = ("ingest", "--format", "demo", "--out", DATA, "--set", "images=60", "--set", "hold_out.calibration=0")

pytestmark = pytest.mark.skipif(binary() is None, reason="no SeaweedFS binary for this platform")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and two workers, each worker with a network of its own where root allows."""
    with local_cluster(2, cpus=4, namespaces=allowed(), more={"OMP_NUM_THREADS": "1"}) as made:
        yield made


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's own folder: a config and nothing else; the nodes have dubito installed."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def ingested(cluster: LocalCluster, project: Path) -> tuple[int, str, str]:
    """The dataset at ``DATA``, made by a job: (its exit code, output, errors)."""
    return dubito(cluster, project, *INGEST, "--submit", cluster.dashboard, "--job", "ingest-1")


@pytest.fixture
def as_client(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds the object store."""
    monkeypatch.setattr(os, "environ", os.environ | cluster.variables)


def start(cluster: LocalCluster, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=folder, env={**kept, "PYTHONPATH": str(ROOT), **cluster.variables, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def dubito(cluster: LocalCluster, folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run one command to its end: (exit code, output, errors)."""
    return finish(start(cluster, folder, *arguments, **variables))


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    """Wait for a command: (exit code, output, errors); one that does not end is ended, and what it said is told."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end within {seconds} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def trains_on(cluster: LocalCluster) -> Node | None:
    """A node that holds a training worker."""
    for node in cluster.workers:
        if node.process.poll() is not None:
            continue
        for pid in _descendants(node.process.pid):
            line = Path(f"/proc/{pid}/cmdline")
            if line.exists() and b"RayTrainWorker" in line.read_bytes():
                return node
    return None


def wait_for_checkpoint(out: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if storage.exists(f"{out}/members/0") and checkpoint.latest(f"{out}/members/0") is not None:
            return
        time.sleep(0.3)
    raise AssertionError(f"no checkpoint below {out} within {seconds} s")


def test_a_wrong_token_is_refused(cluster: LocalCluster, project: Path):
    command = ("ingest", "--format", "demo", "--out", DATA, "--submit", cluster.dashboard)
    code, _, err = dubito(cluster, project, *command, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="0" * 64)
    assert code == 2
    assert "refused the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in err


def test_a_submitted_ingest_is_followed_and_the_same_job_runs_once(
    cluster: LocalCluster, project: Path, ingested: tuple[int, str, str]
):
    code, out, err = ingested
    assert code == 0, err
    assert "job ingest-1 sent to" in out
    assert f"dataset {DATA}: 60 images" in out
    assert "INFO" not in out, "Ray's own lines are in the log"
    again = (*INGEST, "--submit", cluster.dashboard, "--job", "ingest-1")
    code, out, _ = dubito(cluster, project, *again)
    assert code == 0
    assert "job ingest-1 is there already: SUCCEEDED" in out
    code, _, err = dubito(cluster, project, *again, "--set", "images=61")
    assert code == 2
    assert "job ingest-1 is there already, of another command" in err
    code, out, _ = dubito(cluster, project, "jobs", "list", "--address", cluster.dashboard)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["ingest-1", "SUCCEEDED"]]


def test_wrong_input_on_the_cluster_is_one_sentence_here(cluster: LocalCluster, project: Path):
    code, out, err = dubito(
        cluster, project, "train", "config.yaml", "--set", "data=s3://data/nowhere", "--submit", cluster.dashboard
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "dubito train: " in err
    assert "nowhere" in err


@pytest.mark.usefixtures("ingested")
def test_a_detached_job_is_stopped(cluster: LocalCluster, project: Path):
    command = ("train", "config.yaml", "--set", "out=s3://data/runs/stopped", "--set", "train.steps=100000")
    code, out, err = dubito(cluster, project, *command, "--submit", cluster.dashboard, "--job", "long", "--detach")
    assert code == 0, err
    assert f"dubito jobs follow long --address {cluster.dashboard}" in out
    code, out, err = dubito(cluster, project, "jobs", "stop", "long", "--address", cluster.dashboard)
    assert code == 0, err
    assert "job long: stopping" in out
    code, _, err = dubito(cluster, project, "jobs", "follow", "long", "--address", cluster.dashboard)
    assert code == 130
    assert "job long was stopped" in err
    code, _, err = dubito(cluster, project, "jobs", "stop", "longer", "--address", cluster.dashboard)
    assert code == 2
    assert "no job 'longer'" in err


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("as_client", "ingested")
def test_a_node_dies_in_the_middle_and_another_joins(cluster: LocalCluster, project: Path, tmp_path: Path):
    process = start(
        cluster, project, "ensemble", "config.yaml", "--members", "2", "--submit", cluster.dashboard, "--job", "five"
    )
    wait_for_checkpoint(CONFIG["out"])
    node = trains_on(cluster)
    assert node is not None, "both members ended before a node could be killed"
    node.kill()
    cluster.add_worker()
    code, out, err = finish(process)
    assert code == 0, f"{out}\n{err}"
    bundle = open_bundle(f"{CONFIG['out']}/bundle")
    assert bundle.members == 2
    assert bundle.manifest["failed"] == []
    for k in range(2):
        last = checkpoint.latest(f"{CONFIG['out']}/members/{k}")
        assert last is not None
        ledger = checkpoint.read_ledger(last)
        assert ledger.count(0, 240 * 4) == 240 * 4, "every position of the run was used"
    code, out, err = dubito(
        cluster, project, "predict", "--bundle", bundle.uri, "--data", DATA, "--out", "s3://data/found",
        "--submit", cluster.dashboard,
    )  # fmt: skip
    assert code == 0, err
    assert "60 rows (ok 60)" in out
    code, _, err = dubito(cluster, project, "predict", "--bundle", bundle.uri, "--data", DATA, "--out", f"{tmp_path}/p")
    assert code == 0, err
    there, here = (predictions.read(uri).sort_by("image_id") for uri in ("s3://data/found", f"{tmp_path}/p"))
    assert there["image_id"].equals(here["image_id"])
    assert pc.max(pc.abs(pc.subtract(there["uncertainty"], here["uncertainty"]))).as_py() < 1e-5


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("as_client", "ingested")
def test_training_goes_on_with_fewer_workers_and_with_more_again(cluster: LocalCluster, project: Path):
    """Two workers that want a node each; one node dies, one worker goes on, and another node joins."""
    while sum(node.process.poll() is None for node in cluster.workers) > 2:
        next(node for node in cluster.workers if node.process.poll() is None).kill()
    cluster.wait(3)
    out, steps = "s3://data/runs/elastic", 900
    sets = (f"out={out}", f"train.steps={steps}", "train.workers=2", "train.min_workers=1", "train.max_failures=5")
    process = start(
        cluster, project, "train", "config.yaml", *(f"--set={each}" for each in sets), "--submit", cluster.dashboard
    )
    wait_for_checkpoint(out)
    node = trains_on(cluster)
    assert node is not None
    node.kill()
    time.sleep(20)
    cluster.add_worker()
    code, said, err = finish(process, 600)
    assert code == 0, f"{said}\n{err}"
    end = steps * 4 * 2
    last = checkpoint.latest(f"{out}/members/0")
    assert last is not None
    assert checkpoint.read_ledger(last).count(0, end) == end, "every position of the run was used"
    lines = storage.read_text(f"{out}/members/0/metrics.jsonl", "metrics").splitlines()
    rates = [row for row in map(json.loads, lines) if "lr" in row]
    assert rates[-1]["step"] >= steps, "steps of one worker accumulate twice as many batches: as many images each"
