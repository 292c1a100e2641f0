"""What was written before the modules moved opens after it: tests/data/before_the_move/README.md says what that is."""

import json
import tarfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import torch
from PIL import Image

from pipeline import predictions, schema, storage
from pipeline.datasets import image_fetch, ingest
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.datasets.shard_reader import read_row_group
from pipeline.models import bundle
from pipeline.retraining import registry
from pipeline.retraining.stored_metrics import metrics_on_split
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.training import checkpoint, ensemble
from pipeline.training.run_state import RunState
from pipeline.training.train_config import TrainConfig
from pipeline.training.worker import build_worker
from pipeline.verify import verify

ARCHIVE = Path(__file__).parent / "data/before_the_move/files.tar.xz"
BUCKET = "s3://before-the-move"
"""Where the files were written, and where the tests on Ray put them again: absolute URIs inside them name it."""
TOLERANCE = 1e-5
"""Of what is computed anew: another processor adds in another order."""
DATASETS = ("packed", "referenced")
BUNDLES = ("bundle-segmentation", "bundle-detection", "bundle-calibrated")
PREDICTIONS = {
    "predictions-segmentation": ("bundle-segmentation", "packed"),
    "predictions-detection": ("bundle-detection", "referenced"),
}
"""Name: (bundle, dataset)."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive: folders ``bucket`` and ``expected``."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[str, Any]:
    """What the code of before read from the bucket."""
    return json.loads((files / "expected/values.json").read_text())


@pytest.fixture(scope="module")
def bucket(files: Path, s3: str) -> str:
    """The same files in a bucket of the name that they were written under; its URI."""
    filesystem, _ = storage.generic(BUCKET)
    filesystem.mkdir(BUCKET.removeprefix("s3://"))
    for path in sorted((files / "bucket").rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{BUCKET}/{path.relative_to(files / 'bucket')}", path.read_bytes())
    return BUCKET


def dataset_rows(uri: str, split: str) -> pa.Table:
    """All rows of a split."""
    return pa.concat_tables(read_row_group(group) for group in row_groups(open_dataset(uri), split))


def all_tensors(outputs: Any) -> list[torch.Tensor]:
    """Every tensor of what a network returns, in the order of its fields."""
    if isinstance(outputs, torch.Tensor):
        return [outputs.detach().float().flatten()]
    if is_dataclass(outputs):
        outputs = [getattr(outputs, field.name) for field in fields(outputs)]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [t for item in outputs for t in all_tensors(item)] if isinstance(outputs, (list, tuple)) else []


def assert_close(actual: Any, wanted: Any, where: str = "") -> None:
    """Nested values of JSON or Arrow are equal, numbers up to the tolerance."""
    if isinstance(wanted, dict):
        assert list(actual) == list(wanted), where
        for key, value in wanted.items():
            assert_close(actual[key], value, f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(actual) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_close(actual[index], value, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert actual == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), where
    else:
        assert actual == wanted, where


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_opens_with_the_fingerprint_and_the_rows_that_it_had(files: Path, expected, name: str):
    info = open_dataset(str(files / "bucket" / name))
    assert info.fingerprint == expected["datasets"][name]["fingerprint"]
    assert info.counts == expected["datasets"][name]["counts"]
    assert list(info.classes) == expected["datasets"][name]["classes"]
    assert info.referenced == (name == "referenced")
    ids = []
    for split in info.counts:
        for row in dataset_rows(info.uri, split).to_pylist():
            image = (files / f"bucket/images/{row['image_id']}").read_bytes()
            objects = np.asarray(Image.open(files / f"bucket/labels/{row['image_id']}"))
            classes = np.frombuffer(schema.unpack_map(row["mask"], row["height"], row["width"]), np.uint8)
            (y, x), (box,) = np.nonzero(objects), row["boxes"]
            assert row["image"] == (None if info.referenced else image)
            assert (classes == 1 - objects.ravel()).all(), "class 0 is the cell, 1 the background"
            assert (box["x1"], box["y1"], box["x2"], box["y2"]) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            ids.append(row["image_id"])
    assert sorted(ids) == [f"image{number:02d}.png" for number in range(14)]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_opens_and_is_written_again_byte_for_byte(files: Path, tmp_path: Path, expected, name: str):
    opened = bundle.open_bundle(str(files / "bucket" / name))
    assert (opened.id, opened.members) == (expected["bundles"][name]["id"], expected["bundles"][name]["members"])
    again = bundle.write_bundle(str(tmp_path / name), opened.manifest, bundle.member_uris(opened))
    assert again.id == opened.id
    for path in (files / "bucket" / name).rglob("*.*"):
        assert (tmp_path / name / path.relative_to(files / "bucket" / name)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["bundle-segmentation", "bundle-detection"])
def test_the_members_of_a_bundle_compute_what_they_did(files: Path, name: str):
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    opened = bundle.open_bundle(str(files / "bucket" / name))
    with np.load(files / "expected/member_outputs.npz") as outputs, torch.no_grad():
        for k in range(opened.members):
            actual = torch.cat(all_tensors(opened.load_member(k)(image))).numpy()
            np.testing.assert_allclose(actual, outputs[f"{name}-{k}"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_read_as_they_did(files: Path, name: str):
    table = predictions.read(str(files / "bucket" / name))
    assert table.equals(pyarrow.feather.read_table(files / f"expected/{name}.arrow", memory_map=False))


@pytest.mark.parametrize("name", BUNDLES)
def test_stored_metrics_are_found_and_come_to_the_same(files: Path, expected, name: str):
    # Nothing is scored: there is no Ray in this test.
    root = str(files / "bucket")
    metrics = metrics_on_split(f"{root}/metrics", f"{root}/{name}", f"{root}/packed", "test").compute()
    assert_close(json.loads(json.dumps(metrics)), expected["metrics"][name])


def test_the_registry_has_its_champions_and_its_decision(files: Path, expected):
    root = str(files / "bucket/registry")
    champion = registry.champion(root, "cells")
    assert champion is not None
    assert {key: getattr(champion, key) for key in expected["champion"]} == expected["champion"]
    assert [entry.kind for entry in registry.entries(root, "cells")] == ["manual", "manual", "rollback"]
    (decision,) = registry.decisions(root, "cells")
    assert (decision["decision"], decision["reasons"]) == ("reject", ["no gain"])


def test_the_settings_of_a_run_resolve_as_they_did(files: Path):
    settings = json.loads((files / "expected/run.json").read_text())
    resolved = json.loads(json.dumps(TrainConfig.parse(settings, "test").resolved()))
    saved = json.loads((files / "bucket/run/config.json").read_text())["config"]
    assert {key: resolved[key] for key in saved} == saved


def test_a_checkpoint_restores(files: Path, expected):
    newest = checkpoint.latest(str(files / "bucket/run/members/0"))
    assert newest is not None
    settings = json.loads((files / "expected/run.json").read_text())
    info = open_dataset(str(files / "bucket/packed"))
    worker = build_worker(TrainConfig.parse(settings, "test"), info, torch.device("cpu"))
    progress = checkpoint.load(Path(newest), 0, model=worker.module, average=worker.average, optimizer=worker.optimizer)
    state = RunState.from_dict(progress)
    assert state.step == expected["run"]["step"]
    assert state.history[-1]["val_loss"] > 0
    used = state.step * settings["train"]["batch_size"]
    assert checkpoint.read_ledger(newest).contains(np.arange(used + 4)).tolist() == [True] * used + [False] * 4
    saved = torch.load(Path(newest) / checkpoint.STATE, weights_only=True)
    for name, weight in worker.module.state_dict().items():
        assert torch.equal(weight, saved["model"][name])
    assert len(worker.optimizer.state_dict()["state"]) == len(saved["optimizer"]["state"]) > 0


def test_the_same_inputs_are_ingested_to_the_same_bytes(ray_local, bucket: str, files: Path, expected):
    for name in DATASETS:
        more = {"classes": ["cell"], "splits": f"{bucket}/splits.json", "options": {"referenced": name == "referenced"}}
        sources = ("instances", f"{bucket}/images", f"{bucket}/labels")
        assert ingest.ingest(*sources, f"{bucket}/{name}", **more)["already"]
        summary = ingest.ingest(*sources, f"{bucket}/again/{name}", **more)
        assert summary["fingerprint"] == expected["datasets"][name]["fingerprint"]
        if pa.__version__ == expected["pyarrow"]:  # which writes its version into each file
            for path in (files / "bucket" / name).rglob("*.*"):
                written = storage.read_bytes(f"{bucket}/again/{name}/{path.relative_to(files / 'bucket' / name)}")
                assert written == path.read_bytes(), path.name


def test_everything_committed_verifies(ray_local, bucket: str):
    for name in (*DATASETS, *BUNDLES, *PREDICTIONS):
        assert verify(f"{bucket}/{name}")["damage"] == [], name
    rows = image_fetch.with_images(dataset_rows(f"{bucket}/referenced", "test"))
    assert set(rows["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_job_is_the_same_job(ray_local, bucket: str, files: Path, name: str):
    bundle_name, data = PREDICTIONS[name]
    job = (f"{bucket}/{bundle_name}", f"{bucket}/{data}")
    assert predict(*job, f"{bucket}/{name}", split="test")["already"]

    # The attempt of before, had it ended before its commit: today's job adopts its unit.
    manifest = "_MANIFEST.json"
    for path in (files / "bucket" / name).rglob("attempt-*/*"):
        storage.write_bytes(f"{bucket}/unfinished/{name}/{path.parent.name}/{path.name}", path.read_bytes())
    summary = predict(*job, f"{bucket}/unfinished/{name}", split="test")
    assert (summary["adopted"], summary["scored"]) == (1, 0)

    # And the whole job anew.
    predict(*job, f"{bucket}/again/{name}", split="test")
    before, after = (
        json.loads(storage.read_bytes(f"{bucket}/{folder}/{manifest}")) for folder in (name, f"again/{name}")
    )
    for content in (before, after):
        del content["lists"], content["digest"]  # they name files, whose names are drawn at random
    assert_close(after, before)
    wanted = pyarrow.feather.read_table(files / f"expected/{name}.arrow", memory_map=False)
    assert_close(predictions.read(f"{bucket}/again/{name}").to_pydict(), wanted.to_pydict())


def test_a_run_begun_before_resumes(ray_local, bucket: str, files: Path, expected):
    config = TrainConfig.parse(json.loads((files / "expected/run.json").read_text()), "test")
    made_before = storage.read_bytes(f"{bucket}/run/config.json")
    trained = ensemble.train_ensemble(config, 1, resume=True, sink=SilentSink())
    assert trained.members == 1
    assert storage.read_bytes(f"{bucket}/run/config.json") == made_before
    newest = checkpoint.latest(f"{bucket}/run/members/0")
    assert newest is not None
    progress = json.loads(storage.read_bytes(f"{newest}/progress.json"))
    assert progress["step"] == expected["run"]["steps"]
    assert [row["step"] for row in progress["history"] if "val_loss" in row] == [20, 40, 60]
