"""Whole jobs on S3, killed in the middle: what is left is gone on from, and every image comes once."""

import os
import random
import time
from pathlib import Path

import pytest
from tiny import UNET, make_bundle, png

from benchmarks.fault_jobs import NOBODY, Job, run
from pipeline import predictions, storage

IMAGES = 400


@pytest.fixture(scope="module")
def images(s3: str) -> str:
    folder = storage.join(s3, "kills/images")
    data = [png(64, 64, seed) for seed in range(8)]
    for number in range(IMAGES):
        storage.write_bytes(storage.join(folder, f"part{number % 3}/image{number:04d}.png"), data[number % 8])
    return folder


@pytest.mark.parametrize("target", ["driver", pytest.param("actor", marks=pytest.mark.long)])
def test_a_killed_prediction_goes_on_with_what_was_finished(images: str, s3: str, target: str, tmp_path: Path):
    model = make_bundle(tmp_path / "model", UNET, input={"size": [256, 256], "fit": "stretch"})
    out = storage.join(s3, f"kills/predictions-{target}")
    args = ["predict", "--bundle", model, "--data", images, "--out", out]
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = Job(tmp_path, env, *args)
    deadline = time.monotonic() + 120
    while not finished(out):
        assert job.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.kill(target, random.Random(0)) != NOBODY
    ended = job.wait()
    before = finished(out)
    if target == "driver":
        assert ended.code == -9
        assert not storage.exists(storage.join(out, "_MANIFEST.json"))
        ended = run(tmp_path, env, *args)
    assert ended.code == 0, ended.said
    assert not ended.crashed
    rows = predictions.read(out)
    assert rows["image_id"].to_pylist() == sorted(f"part{n % 3}/image{n:04d}.png" for n in range(IMAGES))
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert before <= finished(out) or target == "actor", "finished work was done again"


def finished(out: str) -> set[str]:
    """Unit files, whoever wrote them."""
    found = storage.list_files(out, (".parquet",)) if storage.exists(out) else []
    return {item.path for item in found if "/unit-" in item.path}
