"""Whole jobs on S3, killed in the middle: what is left is gone on from, and every image comes once."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.faults.jobs import NOBODY, Job, run
from pipeline import predictions, storage
from pipeline.images.decode import decode
from pipeline.scoring import crash_guard
from pipeline.scoring.job import predict
from pipeline.scoring.scorer import Scorer
from tests.support.tiny import UNET, encode, make_bundle, png

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


def test_an_image_that_ends_its_process_costs_itself_alone(ray_local: None, tmp_path: Path):
    for number in range(9):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(
            encode(np.full((24, 24, 3), 0 if number == 5 else 99, np.uint8))
        )
    model, out = make_bundle(tmp_path / "model", UNET), str(tmp_path / "out")

    class DyingScorer(Scorer):
        """Breaks as a library breaks that is given what it was not made for."""

        def predict(self, table: pa.Table) -> Any:
            if any(image and decode(image).max() == 0 for image in table["image"].to_pylist()):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().predict(table)

    summary = predict(model, str(tmp_path / "images"), out, unit_rows=4, scorer_class=DyingScorer)
    assert summary["statuses"] == {"ok": 8, "error": 1}
    rows = predictions.read(out).to_pylist()
    assert [row["image_id"] for row in rows] == [f"{number}.png" for number in range(9)]
    assert [row["error"] for row in rows if row["status"] == "error"] == [crash_guard.SKIPPED_IMAGE]


def test_starts_and_deaths_are_counted():
    starts = crash_guard.StartCounter()
    assert [starts.unit_started(7)[0] for _ in range(3)] == [1, 2, 3]
    starts.image_started(7, 1)
    starts.image_started(7, 2)
    assert starts.unit_started(7) == (4, []), "one death may be chance"
    starts.image_started(7, 2)
    assert starts.unit_started(7) == (5, [2])
    assert starts.unit_started(8) == (1, [])
    assert [starts.process_started(), starts.process_started()] == [1, 2]
    starts.unit_done(7)
    assert starts.unit_started(7) == (1, [])
    assert starts.process_started() == 1
