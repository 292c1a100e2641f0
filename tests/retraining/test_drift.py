"""Drift of doubt between two folders of predictions; what is new between two datasets."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import predictions
from pipeline.datasets import diff
from pipeline.datasets.dataset import open_dataset
from pipeline.errors import InputError
from pipeline.retraining import drift
from tests.support import tiny


def test_the_index_is_the_formula():
    """By hand, with half a row more in each bin: p = (20.5, 80.5) / 101, q = (50.5, 50.5) / 101."""
    p, q = 20.5 / 101, 50.5 / 101
    golden = (p - q) * math.log(p / q) + (q - p) * math.log((1 - p) / q)
    assert drift.psi(np.array([50, 50]), np.array([20, 80])) == pytest.approx(golden)
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 90, 10), rng.integers(0, 90, 10)
    assert drift.psi(one, other) == pytest.approx(drift.psi(other, one))
    assert drift.psi(one, one) == 0
    assert np.isfinite(drift.psi(np.array([10, 0]), np.array([0, 10])))


def folder(where: Path, doubt: np.ndarray, classes: dict[int, np.ndarray], task: str = "segmentation") -> str:
    """A committed folder of predictions as readers see it: uncertainty, and each class's entropy in every image."""
    rows = len(doubt)
    nested = [
        [{"label": label, "area_fraction": 0.5, "entropy": float(values[n])} for label, values in classes.items()]
        for n in range(rows)
    ]
    name = "classes" if task == "segmentation" else "boxes"
    kind = pa.struct([("label", pa.int16()), ("area_fraction", pa.float32()), ("entropy", pa.float32())])
    table = pa.table({"uncertainty": pa.array(doubt, pa.float32()), name: pa.array(nested, pa.list_(kind))})
    where.mkdir()
    pa.parquet.write_table(table.slice(0, rows // 2), where / "0.parquet")
    pa.parquet.write_table(table.slice(rows // 2), where / "1.parquet")
    (where / "task.json").write_text(json.dumps({"task": task}))
    return str(where)


@pytest.fixture(autouse=True)
def plain_folders(monkeypatch: pytest.MonkeyPatch):
    """Numbers decide here, so folders are two plain files; ``test_real_predictions...`` reads committed ones."""
    committed, each = predictions.committed_manifest, predictions.iter_tables

    def task_of(uri: str, *inputs: Any) -> Any:
        file = Path(uri) / "task.json"
        return json.loads(file.read_text()) if file.exists() else committed(uri, *inputs)

    def tables(uri: str, columns: list[str]) -> Any:
        if not (Path(uri) / "task.json").exists():
            return each(uri, columns)
        return (pa.parquet.ParquetFile(Path(uri) / f"{n}.parquet").read(columns) for n in range(2))

    monkeypatch.setattr(predictions, "committed_manifest", task_of)
    monkeypatch.setattr(predictions, "iter_tables", tables)


def settings(reference: str, recent: str, **more: Any) -> drift.DriftSettings:
    return drift.DriftSettings.parse({"reference": reference, "recent": recent, **more}, "test")


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_class_that_drifts_is_found_though_the_whole_does_not(tmp_path: Path, task: str):
    rng = np.random.default_rng(0)
    doubt = rng.gamma(2, size=2000)
    same, more = rng.gamma(2, size=2000), rng.gamma(2, size=2000)
    one = folder(tmp_path / "1", doubt[:1000], {0: same[:1000], 1: more[:1000]}, task)
    two = folder(tmp_path / "2", doubt[1000:], {0: same[1000:], 1: more[1000:] + 1}, task)
    found = drift.measure_drift(settings(one, two))
    assert found["drifted"]
    assert {name: each["psi"] > 0.2 for name, each in found["groups"].items()} == {
        "all": False, "class 0": False, "class 1": True,
    }  # fmt: skip
    assert drift.describe_drift(found).startswith("doubt drifted: the largest stability index is 1.4")
    assert "(class 1), the threshold 0.2" in drift.describe_drift(found)
    assert not drift.measure_drift(settings(one, one))["drifted"]
    assert drift.measure_drift(settings(one, one))["groups"]["all"]["psi"] == 0


def test_the_scale_of_the_score_does_not_matter(tmp_path: Path):
    rng = np.random.default_rng(1)
    a, b = rng.gamma(2, size=500), rng.gamma(3, size=700)
    plain = drift.measure_drift(settings(folder(tmp_path / "1", a, {}), folder(tmp_path / "2", b, {})))
    logs = drift.measure_drift(settings(folder(tmp_path / "3", np.log(a), {}), folder(tmp_path / "4", np.log(b), {})))
    assert plain["groups"]["all"]["psi"] == pytest.approx(logs["groups"]["all"]["psi"])


def test_few_rows_are_no_drift_and_said_so(tmp_path: Path):
    one = folder(tmp_path / "1", np.zeros(50) + np.arange(50), {})
    two = folder(tmp_path / "2", np.zeros(50) + 1000, {})
    found = drift.measure_drift(settings(one, two))
    assert not found["drifted"]
    assert found["groups"]["all"] | {"limit": 0} == {"psi": None, "limit": 0, "reference": 50, "recent": 50}
    assert drift.describe_drift(found) == "doubt: too few predictions to compare"
    assert drift.measure_drift(settings(one, two, least=50))["drifted"]


def test_chance_alone_is_seldom_called_drift(tmp_path: Path):
    above, called = 0, 0
    for seed in range(60):
        one, two = np.random.default_rng(seed).gamma(2, size=(2, 100))
        sides = (folder(tmp_path / f"{seed}-{n}", each, {}) for n, each in enumerate((one, two)))
        found = drift.measure_drift(settings(*sides))
        above, called = above + (found["groups"]["all"]["psi"] > 0.2), called + found["drifted"]
    assert above > 10, "the threshold alone would call it drift"
    assert called <= 3
    few = {"psi": 0.3, "limit": 0.43, "reference": 100, "recent": 100}
    said = drift.describe_drift({"drifted": False, "threshold": 0.2, "groups": {"all": few}})
    assert said == "doubt did not drift: the largest stability index is 0.300 (all), of so few rows the limit 0.43"


@pytest.mark.parametrize("now", [3.0, 7.0])
def test_a_score_that_was_always_the_same_is_told_from_what_lies_below_and_above(tmp_path: Path, now: float):
    before = folder(tmp_path / "1", np.full(500, 5.0), {})
    assert drift.measure_drift(settings(before, folder(tmp_path / "2", np.full(500, now), {})))["drifted"]
    assert not drift.measure_drift(settings(before, folder(tmp_path / "3", np.full(400, 5.0), {})))["drifted"]


def test_predictions_of_two_bundles_are_refused(tmp_path: Path):
    uris = [folder(tmp_path / name, np.arange(200.0), {}) for name in ("one", "two")]
    for uri in uris:
        content = {"task": "segmentation", "inputs": {"bundle_id": f"bundle-{Path(uri).name}"}}
        (Path(uri) / "task.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"'.*one' is of bundle-one, '.*two' of bundle-two; predict both with one"):
        drift.measure_drift(settings(*uris))


def test_bins_of_many_rows_come_from_an_even_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    one, two = (folder(tmp_path / str(n), rng.normal(size=20_000), {}) for n in range(2))
    exact = drift.measure_drift(settings(one, two))["groups"]["all"]
    monkeypatch.setattr(drift, "MAX_SAMPLE", 2000)
    thinned = drift.measure_drift(settings(one, two))["groups"]["all"]
    assert thinned["reference"] == exact["reference"] == 20_000
    assert thinned["psi"] == pytest.approx(exact["psi"], abs=3e-3)


@pytest.mark.parametrize("model", [tiny.UNET, tiny.DETECTOR], ids=["segmentation", "detection"])
def test_real_predictions_are_read(ray_local: None, tmp_path: Path, model: dict[str, Any]):
    from pipeline.scoring.job import predict

    for n in range(6):
        path = tmp_path / "images" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiny.png(32, 40, n))
    bundle = tiny.make_bundle(tmp_path / "bundle", model)
    predict(bundle, str(tmp_path / "images"), str(tmp_path / "out"))
    found = drift.measure_drift(settings(str(tmp_path / "out"), str(tmp_path / "out"), least=2))
    assert found["groups"]["all"] | {"limit": 0} == {"psi": 0.0, "limit": 0, "reference": 6, "recent": 6}
    assert "class 0" in found["groups"] or model is tiny.DETECTOR
    with pytest.raises(InputError, match="no committed predictions at"):
        drift.measure_drift(settings(str(tmp_path / "images"), str(tmp_path / "out")))


def digests(rows: dict[str, tuple[str, str | None]]) -> pa.Table:
    names = list(rows)
    return pa.table(
        {
            "image_id": names,
            "sha256": [rows[name][0] for name in names],
            "label_sha256": pa.array([rows[name][1] for name in names], pa.string()),
        }
    )


def test_new_changed_and_removed_are_counted():
    before = digests({"a": ("1", "x"), "b": ("2", "x"), "c": ("3", None), "d": ("4", "x"), "gone": ("5", "x")})
    after = digests({"new": ("9", "x"), "a": ("1", "x"), "b": ("7", "x"), "c": ("3", "x"), "d": ("4", "y")})
    found = diff.diff_digests(before, after)
    assert found.counts() == {"new": 1, "changed": 3, "removed": 1, "fresh": 4}
    assert found.unseen == {"new", "b"}, "b is another image now"
    assert found.describe() == ("1 new, 3 changed and 1 removed images since the champion's data, 4 to learn from")
    assert diff.diff_digests(after, after).counts() == {"new": 0, "changed": 0, "removed": 0, "fresh": 0}


def test_images_that_were_moved_or_have_no_labels_are_nothing_to_learn_from():
    before = digests({"a": ("1", "x"), "b": ("2", "x"), "c": ("3", "x")})
    after = digests({"else/a": ("1", "x"), "else/b": ("2", "x"), "c": ("3", None), "bare": ("9", None)})
    found = diff.diff_digests(before, after)
    assert found.counts() == {"new": 3, "changed": 1, "removed": 2, "fresh": 0}
    assert found.unseen == {"bare"}
    assert diff.diff_digests(before.slice(0, 0), after).fresh == 2
    assert diff.diff_digests(before, after.slice(0, 0)).unseen == frozenset()


def test_a_million_rows_are_compared_in_seconds():
    names = [f"images/{n:09d}.jpg" for n in range(1_000_000)]
    hashes = [f"{n:064x}" for n in range(1_000_000)]
    before = pa.table({"image_id": names, "sha256": hashes, "label_sha256": hashes})
    began = time.monotonic()
    found = diff.diff_digests(before.slice(0, 900_000), before.slice(100_000))
    assert found.counts() == {"new": 100_000, "changed": 0, "removed": 100_000, "fresh": 100_000}
    assert time.monotonic() - began < 20


def test_images_of_the_frozen_test_are_not_trained_on(ray_local: None, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = open_dataset(tiny.make_squares(tmp_path / "a", {"train": range(4), "test": range(4, 8)}))
    two = open_dataset(tiny.make_squares(tmp_path / "b", {"train": range(4), "val": range(4, 6)}))
    diff.require_disjoint(one, "test", one, ("train", "val"))
    with pytest.raises(InputError, match=r"2 images of split 'val' of '.*b/dataset' are in the frozen test .*image04"):
        diff.require_disjoint(one, "test", two, ("train", "val"))
    with pytest.raises(InputError, match=r"digests.parquet' is not there; was the dataset removed"):
        diff.digests(str(tmp_path / "nowhere"))
