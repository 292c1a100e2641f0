"""Scoring on Ray: every image exactly once, whatever stops the job; and the metrics of the same pass."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline import predictions, storage
from pipeline.datasets import ingest, shard_reader
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.models.bundle import open_bundle
from pipeline.runtime.progress import SilentSink
from pipeline.scoring import actor_pool, job
from pipeline.scoring import plan as plan_module
from pipeline.scoring.evaluate import evaluate
from pipeline.scoring.predictor import Predictor
from pipeline.storage import checksum
from tests.support.tiny import DETECTOR, UNET, encode, make_bundle, png

ROWS = 22
SCORER = job.Scorer


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 4 images, so that a few images are many units. Plans are made in this process alone."""
    monkeypatch.setattr(plan_module, "UNIT_ROWS", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """A dataset with masks and boxes: 22 images, some in each of two splits."""
    root = tmp_path_factory.mktemp("data")
    for n in range(ROWS):
        ids = np.zeros((24, 32), np.uint8)
        ids[4:12, 6 : 14 + n % 5] = 1
        for folder, pixels in (("images", 255 * (ids[..., None] > 0) * np.ones(3)), ("labels", ids)):
            path = root / folder / f"image{n:02d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(pixels.astype(np.uint8)))
    names = [f"image{n:02d}" for n in range(ROWS)]
    (root / "splits.json").write_text(json.dumps({"train": names[:5], "test": names[5:]}))
    ingest.ingest(
        "instances", str(root / "images"), str(root / "labels"), str(root / "dataset"),
        classes=["cell"], splits=str(root / "splits.json"),
    )  # fmt: skip
    return str(root / "dataset")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("unet"), UNET)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("detector"), DETECTOR)


def folder_of(root: Path, count: int) -> str:
    for n in range(count):
        path = root / f"part{n % 2}" / f"image{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(20 + n, 30, n))
    return str(root)


def scorer(log: Path, allowed: int = 10**6) -> type[job.Scorer]:
    """Notes every unit that it begins, and loses power after some. Local, so that it travels by value."""

    class Logged(SCORER):
        begun = 0

        def __call__(self, batch: pa.Table) -> pa.Table:
            with log.open("a") as file:
                file.write(f"{batch['unit'][0].as_py()}\n")
            self.begun += 1
            if self.begun > allowed:
                raise OSError("power cut")
            return super().__call__(batch)

    return Logged


def begun(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split())


def test_every_image_of_a_dataset_once(tmp_path: Path, data: str, unet: str):
    told: list[tuple[str, int, int]] = []

    class Sink:
        def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
            told.append((stage, done, total))

    out = str(tmp_path / "p")
    made = job.predict(unet, data, out, sink=Sink(), actors=2)
    table = predictions.read(out)
    assert made["rows"] == table.num_rows == len(set(table["image_id"].to_pylist())) == ROWS
    assert (made["statuses"], made["already"], made["members"]) == ({"ok": ROWS}, False, 2)
    assert made["uncertainty_mean"] == pytest.approx(np.mean(table["uncertainty"].to_pylist()), rel=1e-6)
    assert told[0] == ("predict", 0, ROWS)
    assert told[-1] == ("predict", ROWS, ROWS)
    files = predictions.iter_files(out, json.loads((tmp_path / "p/_MANIFEST.json").read_text()))
    assert [entry["rows"] for entry in files] == [4, 1, 4, 4, 4, 4, 1]


def test_rows_on_ray_are_those_of_the_predictor(tmp_path: Path, data: str, detector: str):
    job.predict(detector, data, str(tmp_path / "p"), split="test", actors=1)
    info = open_dataset(data)
    source = pa.concat_tables(shard_reader.read_row_group(group) for group in row_groups(info, "test"))
    wanted = Predictor(detector, "cpu", threads=1)(source).to_pylist()
    found = predictions.read(str(tmp_path / "p")).to_pylist()
    assert [row["image_id"] for row in found] == [row["image_id"] for row in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert mine["uncertainty"] == pytest.approx(other["uncertainty"], rel=1e-5)
        assert len(mine["boxes"]) == len(other["boxes"])


def test_a_folder_of_images_with_some_that_are_none(tmp_path: Path, unet: str, ray_local: None):
    images = folder_of(tmp_path / "images", 9)
    (tmp_path / "images/part0/bad.JPG").write_bytes(b"not an image")
    (tmp_path / "images/empty.png").touch()
    (tmp_path / "images/notes.txt").write_text("no image")
    made = job.predict(unet, images, str(tmp_path / "p"), actors=1)
    assert made["statuses"] == {"ok": 9, "corrupt": 2}
    rows = {row["image_id"]: row for row in predictions.read(str(tmp_path / "p")).to_pylist()}
    assert rows["part0/bad.JPG"]["status"] == "corrupt"
    assert rows["part0/bad.JPG"]["mask"] is None
    good = rows["part1/image03.png"]
    assert (good["status"], good["height"], good["width"], len(good["sha256"])) == ("ok", 23, 30, 64)
    assert good["uri"] == f"{images}/part1/image03.png"


def test_what_stops_midway_is_continued_without_redoing(
    tmp_path: Path, data: str, unet: str, monkeypatch: pytest.MonkeyPatch
):
    out = str(tmp_path / "p")
    monkeypatch.setattr(job, "Scorer", scorer(tmp_path / "first", allowed=4))
    with pytest.raises(Exception, match="power cut"):
        job.predict(unet, data, out, actors=1)
    assert not (tmp_path / "p/_MANIFEST.json").exists()
    finished = {int(path.name.split("-")[1]): path for path in (tmp_path / "p/attempt-0").glob("unit-*.parquet")}
    assert len(finished) == 4
    damaged, *kept = finished
    finished[damaged].write_bytes(finished[damaged].read_bytes()[:-40])

    monkeypatch.setattr(job, "Scorer", scorer(tmp_path / "second"))
    made = job.predict(unet, data, out, actors=2)
    assert (made["attempt"], made["adopted"], made["scored"]) == (1, 3, 4)
    assert begun(tmp_path / "second") == sorted({*range(7)} - {*kept})
    # What a lost process of the first attempt writes, much later.
    (tmp_path / "p/attempt-0/unit-000005-aaaaaaaa.parquet").write_bytes(finished[kept[0]].read_bytes())
    names = predictions.read(out)["image_id"].to_pylist()
    assert len(names) == len(set(names)) == ROWS

    again = job.predict(unet, data, out, actors=2)
    assert (again["already"], again["scored"], again["statuses"]) == (True, 0, {"ok": ROWS})


def test_an_output_of_other_inputs_is_refused(tmp_path: Path, data: str, unet: str, detector: str):
    out = str(tmp_path / "p")
    job.predict(unet, data, out, split="train", actors=1)
    before = sorted(os.listdir(out))
    with pytest.raises(InputError, match="committed by other inputs: bundle_id was"):
        job.predict(detector, data, out, split="train")
    with pytest.raises(InputError, match=r"committed by other inputs: splits was \['train'\], now \['test'\]"):
        job.predict(unet, data, out, split="test")
    assert sorted(os.listdir(out)) == before


def test_predictions_and_metrics_in_one_pass_and_across_attempts(
    tmp_path: Path, data: str, unet: str, monkeypatch: pytest.MonkeyPatch
):
    alone, _ = evaluate(unet, data, "test", actors=1)
    with monkeypatch.context() as patch:
        patch.setattr(job, "Scorer", scorer(tmp_path / "log", allowed=2))
        with pytest.raises(Exception, match="power cut"):
            job.score(unet, data, split="test", measure="metrics", out=str(tmp_path / "p"), actors=1)
    made = job.score(unet, data, split="test", measure="metrics", out=str(tmp_path / "p"), actors=2)
    assert made["adopted"] == 2
    assert made["metrics"]["miou"] == pytest.approx(alone["miou"], rel=1e-9)
    assert made["metrics"]["members"][1]["nll"] == pytest.approx(alone["members"][1]["nll"], rel=1e-6)
    assert job.score(unet, data, split="test", measure="metrics", out=str(tmp_path / "p"))["metrics"] == made["metrics"]
    # The rows are those of a run without metrics.
    assert job.predict(unet, data, str(tmp_path / "p"), split="test")["already"]


@pytest.mark.parametrize("name", ["unet", "detector"])
def test_evaluate_says_what_the_predictor_measures(data: str, name: str, request: pytest.FixtureRequest):
    uri = request.getfixturevalue(name)
    found, _ = evaluate(uri, data, "test", actors=1)
    info = open_dataset(data)
    source = pa.concat_tables(shard_reader.read_row_group(group) for group in row_groups(info, "test"))
    wanted = Predictor(uri, "cpu", threads=1).measure(source)[1].compute()
    keys = ["miou", "dice", "accuracy", "nll", "brier", "ece"] if name == "unet" else ["map", "map50", "map75"]
    for mine, other in [(found, wanted), *zip(found["members"], wanted["members"], strict=True)]:
        assert {key: mine[key] for key in keys} == pytest.approx(
            {key: other[key] for key in keys}, rel=1e-5, nan_ok=True
        )
    assert (found["images"], found["split"], found["statuses"]) == (17, "test", {"ok": 17})
    assert found["bundle_id"] == open_bundle(uri).id
    assert found["data"]["fingerprint"] == info.fingerprint
    json.dumps(found, allow_nan=False)


def refusals(tmp_path: Path, data: str) -> dict[str, tuple[Callable[[], Any], str]]:
    others = make_bundle(tmp_path / "a", UNET, seeds=(0,), classes=["nucleus", "background"])
    more = make_bundle(tmp_path / "b", UNET, seeds=(0,), classes=["cell", "background", "dirt"])
    fine = make_bundle(tmp_path / "c", UNET, seeds=(0,))
    detects = make_bundle(tmp_path / "d", DETECTOR, seeds=(0,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "boxless").mkdir()
    meta = json.loads(storage.read_bytes(f"{data}/dataset.json"))
    (tmp_path / "boxless/dataset.json").write_text(
        json.dumps(checksum.with_checksum({**meta, "tasks": ["segmentation"]}))
    )
    images, out = folder_of(tmp_path / "images", 1), str(tmp_path / "p")
    return {
        "class": (lambda: evaluate(others, data, "test"), "label 0 is 'nucleus' in bundle .* and 'cell' in"),
        "more": (lambda: evaluate(more, data, "test"), "label 2 is 'dirt' in bundle .* and absent in"),
        "task": (lambda: evaluate(detects, str(tmp_path / "boxless"), "test"), "bundle of another task"),
        "split": (lambda: evaluate(fine, data, "val"), r"no rows in split 'val'; .* train \(5\)"),
        "truth": (lambda: evaluate(fine, images, "test"), "metrics need labels"),
        "folder split": (lambda: job.predict(fine, images, out, split="test"), "without splits"),
        "empty": (lambda: job.predict(fine, str(tmp_path / "empty"), out), "no images in"),
        "missing": (lambda: job.predict(fine, str(tmp_path / "none"), out), "folder .*none' not found"),
        "bundle": (lambda: job.predict(images, images, out), "bundle manifest .* not found"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", ["class", "more", "task", "split", "truth", "folder split", "empty", "missing", "bundle"]
)
def test_bad_input_is_one_sentence(tmp_path: Path, data: str, case: str):
    call, words = refusals(tmp_path, data)[case]
    with pytest.raises(InputError, match=words):
        call()
    assert not (tmp_path / "p").exists()


def test_damaged_weights_stop_the_job_with_their_sentence(tmp_path: Path, data: str):
    uri = make_bundle(tmp_path, UNET, seeds=(0,))
    path = Path(uri) / "members/0/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"is not what was written \(sha256 differs.* write the bundle again"):
        job.predict(uri, data, str(tmp_path / "p"), actors=1)


def test_a_shard_that_is_gone_stops_the_job_with_its_sentence(tmp_path: Path, data: str, unet: str):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/dataset.json").write_bytes(storage.read_bytes(f"{data}/dataset.json"))
    with pytest.raises(InputError, match="shard .* cannot be read, the dataset is damaged"):
        job.predict(unet, str(tmp_path / "copy"), str(tmp_path / "p"), actors=1)
    assert not (tmp_path / "p/_MANIFEST.json").exists()


def test_the_plan_depends_on_its_inputs_alone(tmp_path: Path, data: str, unet: str, detector: str):
    bundle = open_bundle(unet)
    plan = plan_module.plan_scoring(bundle, data, None, measure=False)
    assert plan.digest == plan_module.plan_scoring(bundle, data, None, measure=False).digest
    assert plan.rows == ROWS
    assert sorted(plan.expected) == list(range(len(plan.units)))
    others = [
        plan_module.plan_scoring(bundle, data, "test", measure=False),
        plan_module.plan_scoring(bundle, data, None, measure=True),
        plan_module.plan_scoring(open_bundle(detector), data, None, measure=False),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 4


def test_pages_are_bounded_in_images_and_bytes(tmp_path: Path, unet: str, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "images"
    root.mkdir()
    for n in range(11):
        (root / f"{n:02d}.png").write_bytes(bytes(10 if n else 200))
    monkeypatch.setattr(plan_module, "UNIT_BYTES", 100)
    plan = plan_module.plan_scoring(open_bundle(unet), str(root), None, measure=False)
    assert [unit.rows for unit in plan.units] == [1, 4, 4, 2]
    paths = [path for unit in plan.units for path in unit.source["paths"]]
    assert paths == sorted(paths)
    changed = plan_module.plan_scoring(open_bundle(unet), str(root), None, measure=False)
    assert changed.inputs == plan.inputs
    (root / "05.png").write_bytes(bytes(11))
    changed = plan_module.plan_scoring(open_bundle(unet), str(root), None, measure=False)
    assert changed.inputs != plan.inputs


def test_everything_on_s3(s3: str, ray_local: None, unet: str, tmp_path: Path):
    images = storage.join(s3, "score/images")
    for n in range(5):
        storage.write_bytes(storage.join(images, f"sub/{n}.png"), png(16, 16, n))
    bundle = storage.join(s3, "score/bundle")
    for listed in storage.list_files(unet):
        storage.write_bytes(storage.join(bundle, listed.path), storage.read_bytes(storage.join(unet, listed.path)))
    out = storage.join(s3, "score/predictions")
    assert job.predict(bundle, images, out, actors=1)["statuses"] == {"ok": 5}
    assert predictions.read(out)["image_id"].to_pylist() == [f"sub/{n}.png" for n in range(5)]
    assert job.predict(bundle, images, out)["already"]


def test_one_actor_an_image_where_there_is_little_to_do(ray_local: None):
    assert int(ray.cluster_resources()["CPU"]) == 8
    assert actor_pool.plan_actor_pool(1, None, None, 8).size == 1
    assert actor_pool.plan_actor_pool(100, None, None, 8).size == 3
    assert actor_pool.plan_actor_pool(100, 2, 5, 8) == actor_pool.ActorPool(2, 2, 0, threads=1, calls=5)
    assert actor_pool.plan_actor_pool(3, 2, 5, 8) == actor_pool.ActorPool(2, 2, 0, threads=5, calls=1)


def test_a_pool_leaves_a_cpu_to_the_readers_whatever_others_hold(ray_local: None):
    for free in (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.5, 8.0):
        pool = actor_pool.plan_actor_pool(100, 4, None, free)
        assert pool.size == 1 or pool.size * pool.cpus + 1 <= free, free


def processes(name: str) -> set[str]:
    """Folders in /proc of Ray's processes of that name."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.add(folder.name)
    return found


def test_no_process_of_a_job_outlives_it(tmp_path: Path, unet: str, ray_local: None):
    before, seen = processes("Starts"), set()

    class Looks(SilentSink):
        def update(self, *args: Any, **kwargs: Any) -> None:
            seen.update(processes("Starts") - before)

    job.score(unet, folder_of(tmp_path / "images", 5), sink=Looks())
    assert seen, "the test looks for a name that no process has"
    deadline = time.monotonic() + 20
    while processes("Starts") & seen and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes("Starts") & seen


def test_a_failed_run_gives_its_cpus_back_even_while_its_error_is_kept(
    tmp_path: Path, data: str, unet: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "Scorer", scorer(tmp_path / "log", allowed=0))
    with pytest.raises(Exception, match="power cut") as kept:
        job.predict(unet, data, str(tmp_path / "p"), actors=1)
    assert actor_pool.free_cpus() == ray.cluster_resources()["CPU"]
    assert "power cut" in str(kept.value)
