"""Ray Train around the loop: rows over two workers, Kornia on the worker's device, kill and resume, S3 end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import predictions, storage
from pipeline.datasets import ingest
from pipeline.datasets.dataset import open_dataset
from pipeline.errors import DoneError, InputError
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.training import checkpoint, ensemble
from pipeline.training.train_config import TrainConfig
from tests.support.event_files import require_increasing, scalars

ROOT = Path(__file__).resolve().parents[2]


def tree(data: str, out: str, **loop) -> dict:
    return {
        "task": "segmentation",
        "data": data,
        "out": out,
        "model": {"name": "unet", "width": 4, "depth": 2, "stem": True},
        "loss": {"cross_entropy": 1, "dice": 1},
        "input": {"size": [96, 96]},
        "augment": {"hflip": 0.5, "rotate": 10, "brightness": 0.1},
        "train": {"batch_size": 4, "threads": 1, **loop},
    }


@pytest.fixture(scope="module")
def demo_on_s3(ray_local, s3) -> str:
    uri = f"{s3}/demo"
    ingest.ingest("demo", None, None, uri, options={"images": 60}, sink=SilentSink())
    return uri


def test_s3_end_to_end_with_two_workers_and_an_ensemble(demo_on_s3, s3):
    rows = open_dataset(demo_on_s3).counts["train"]["images"]
    config = TrainConfig.parse(tree(demo_on_s3, f"{s3}/one", workers=2, epochs=2), "test")
    one = ensemble.train_ensemble(config, 1, resume=False, sink=SilentSink())
    run = f"{s3}/one/members/0"
    newest = checkpoint.latest(run)
    assert newest is not None
    ledgers = [f.path for f in storage.list_files(newest) if f.path.startswith("ledger-")]
    each = [
        checkpoint.Ledger.from_bytes(storage.read_bytes(storage.join(newest, name))).contains(np.arange(4 * rows))
        for name in sorted(ledgers)
    ]
    assert len(each) == 2
    assert each[0].sum() == each[1].sum() > 0
    assert not (each[0] & each[1]).any(), "both workers trained on the same row"
    padded = -(-2 * rows // 8) * 8
    assert (each[0] | each[1]).tolist() == [p < padded for p in range(4 * rows)]
    metrics = one.manifest["metrics"][0]
    assert metrics["val_images"] == open_dataset(demo_on_s3).counts["val"]["images"]
    assert metrics["augment"]["device"] == "cpu"
    assert sum(metrics["augment"]["ops"].values()) > 0, "Kornia did not run in the worker"

    weights = f"{s3}/one/bundle/members/0/model.safetensors"
    curves = scalars(f"{s3}/one/tensorboard/0")
    require_increasing(curves)
    assert [step for step, _ in curves["loss/validation"]][-1] == -(-2 * rows // 8)

    more = {"transfer": {"init": "frozen", "weights": weights}, "calibrate": {"risk": 0.99, "delta": 0.5}}
    config = TrainConfig.parse({**tree(demo_on_s3, f"{s3}/two", steps=3), **more}, "test")
    two = ensemble.train_ensemble(config, 2, resume=False, sink=SilentSink())
    assert two.members == 2
    said = two.manifest["transfer"]
    assert (said["source"], said["tensors"]) == (weights, said["total"])
    start, after = one.load_member(0).state_dict(), two.load_member(1).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    assert moved
    # Batch norm's step counters are not taken over, and nothing depends on them.
    strayed = [name for name in moved if name.startswith(("stem.", "encoder.")) and "num_batches" not in name]
    assert not strayed, "the backbone was to stay as it is"
    splits = open_dataset(demo_on_s3).counts
    assert two.manifest["calibration"]["n"] == splits["calibration"]["images"] == two.manifest["threshold"]["n"]
    with pytest.raises(DoneError, match="done already"):
        ensemble.train_ensemble(config, 2, resume=False, sink=SilentSink())
    with pytest.raises(InputError, match=r"other inputs \(members was 2, now 3\)"):
        ensemble.train_ensemble(config, 3, resume=False, sink=SilentSink())

    predict(two.uri, demo_on_s3, f"{s3}/predictions", sink=SilentSink())
    table = predictions.read(f"{s3}/predictions")
    assert table.num_rows == 60 == len(set(table["image_id"].to_pylist()))
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(table["members"].to_pylist()) == {2}
    assert set(table["decision"].to_pylist()) <= {"accept", "review"}


def _dubito(*args: str, cwd: Path, **kwargs) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *args], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, "PYTHONPATH": str(ROOT)}, **kwargs,
    )  # fmt: skip


def test_a_killed_run_resumes_and_trains_on_each_image_once_an_epoch(ray_local, tmp_path):
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    ingest.ingest("demo", None, None, data, options={"images": 60}, sink=SilentSink())
    rows = open_dataset(data).counts["train"]["images"]
    settings = tree(data, out, epochs=15, validate_every=15)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    run = f"{out}/members/0"
    first = _dubito("train", str(config), cwd=tmp_path)
    deadline = time.monotonic() + 150
    while checkpoint.latest(run) is None:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline, "no checkpoint within 150 s"
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    killed_at = json.loads(storage.read_bytes(f"{checkpoint.latest(run)}/progress.json"))["step"]
    steps = -(-15 * rows // 4)
    assert 0 < killed_at < steps
    with pytest.raises(InputError, match="unfinished run of the same inputs; add --resume"):
        ensemble.train_ensemble(TrainConfig.parse(settings, "test"), 1, resume=False, sink=SilentSink())
    resumed = _dubito("train", str(config), "--resume", cwd=tmp_path)
    said, error = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, error
    assert "bundle" in said
    newest = checkpoint.latest(run)
    assert newest is not None
    progress = json.loads(storage.read_bytes(f"{newest}/progress.json"))
    assert progress["step"] == steps
    used = checkpoint.read_ledger(newest)
    assert used.contains(np.arange(steps * 4 + 50)).tolist() == [p < steps * 4 for p in range(steps * 4 + 50)]
    logged = [row["step"] for row in progress["history"] if "val_loss" in row]
    assert logged == sorted(set(logged)), "a validation was repeated or lost"
    assert logged[0] == 15
    curves = scalars(f"{out}/tensorboard/0")
    require_increasing(curves)
    assert [step for step, _ in curves["loss/validation"]] == logged
    assert [step for step, _ in curves["loss/train"]] == [row["step"] for row in progress["history"] if "loss" in row]
