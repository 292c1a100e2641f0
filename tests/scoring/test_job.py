"""Scoring on Ray: every image exactly once, whatever stops the job; and the metrics of the same pass."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import predictions, storage
from pipeline.datasets import shard_reader
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.models.bundle import open_bundle
from pipeline.scoring.predictor import Predictor
from tests.support.scoring_cases import ROWS, begun_units, evaluate, folder_of, logging_scorer, predict, score
from tests.support.tiny import png


def test_every_image_of_a_dataset_once(tmp_path: Path, data: str, unet: str):
    told: list[tuple[str, int, int]] = []

    class Sink:
        def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
            told.append((stage, done, total))

    out = str(tmp_path / "p")
    made = predict(unet, data, out, sink=Sink(), actors=2)
    table = predictions.read(out)
    assert made["rows"] == table.num_rows == len(set(table["image_id"].to_pylist())) == ROWS
    assert (made["statuses"], made["already"], made["members"]) == ({"ok": ROWS}, False, 2)
    assert made["uncertainty_mean"] == pytest.approx(np.mean(table["uncertainty"].to_pylist()), rel=1e-6)
    assert told[0] == ("predict", 0, ROWS)
    assert told[-1] == ("predict", ROWS, ROWS)
    files = predictions.iter_files(out, json.loads((tmp_path / "p/_MANIFEST.json").read_text()))
    assert [entry["rows"] for entry in files] == [4, 1, 4, 4, 4, 4, 1]


def test_rows_on_ray_are_those_of_the_predictor(tmp_path: Path, data: str, detector: str):
    predict(detector, data, str(tmp_path / "p"), split="test", actors=1)
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
    made = predict(unet, images, str(tmp_path / "p"), actors=1)
    assert made["statuses"] == {"ok": 9, "corrupt": 2}
    rows = {row["image_id"]: row for row in predictions.read(str(tmp_path / "p")).to_pylist()}
    assert rows["part0/bad.JPG"]["status"] == "corrupt"
    assert rows["part0/bad.JPG"]["mask"] is None
    good = rows["part1/image03.png"]
    assert (good["status"], good["height"], good["width"], len(good["sha256"])) == ("ok", 23, 30, 64)
    assert good["uri"] == f"{images}/part1/image03.png"


def test_what_stops_midway_is_continued_without_redoing(tmp_path: Path, data: str, unet: str):
    out = str(tmp_path / "p")
    with pytest.raises(Exception, match="power cut"):
        predict(unet, data, out, actors=1, scorer_class=logging_scorer(tmp_path / "first", allowed=4))
    assert not (tmp_path / "p/_MANIFEST.json").exists()
    finished = {int(path.name.split("-")[1]): path for path in (tmp_path / "p/attempt-0").glob("unit-*.parquet")}
    assert len(finished) == 4
    damaged, *kept = finished
    finished[damaged].write_bytes(finished[damaged].read_bytes()[:-40])

    made = predict(unet, data, out, actors=2, scorer_class=logging_scorer(tmp_path / "second"))
    assert (made["attempt"], made["adopted"], made["scored"]) == (1, 3, 4)
    assert begun_units(tmp_path / "second") == sorted({*range(7)} - {*kept})
    # What a lost process of the first attempt writes, much later.
    (tmp_path / "p/attempt-0/unit-000005-aaaaaaaa.parquet").write_bytes(finished[kept[0]].read_bytes())
    names = predictions.read(out)["image_id"].to_pylist()
    assert len(names) == len(set(names)) == ROWS

    again = predict(unet, data, out, actors=2)
    assert (again["already"], again["scored"], again["statuses"]) == (True, 0, {"ok": ROWS})


def test_predictions_and_metrics_in_one_pass_and_across_attempts(tmp_path: Path, data: str, unet: str):
    alone, _ = evaluate(unet, data, "test", actors=1)
    measured = partial(score, unet, data, split="test", measure="metrics", out=str(tmp_path / "p"))
    with pytest.raises(Exception, match="power cut"):
        measured(actors=1, scorer_class=logging_scorer(tmp_path / "log", allowed=2))
    made = measured(actors=2)
    assert made["adopted"] == 2
    assert made["metrics"]["miou"] == pytest.approx(alone["miou"], rel=1e-9)
    assert made["metrics"]["members"][1]["nll"] == pytest.approx(alone["members"][1]["nll"], rel=1e-6)
    assert measured()["metrics"] == made["metrics"]
    # The rows are those of a run without metrics.
    assert predict(unet, data, str(tmp_path / "p"), split="test")["already"]


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


def test_everything_on_s3(s3: str, ray_local: None, unet: str, tmp_path: Path):
    images = storage.join(s3, "score/images")
    for n in range(5):
        storage.write_bytes(storage.join(images, f"sub/{n}.png"), png(16, 16, n))
    bundle = storage.join(s3, "score/bundle")
    for listed in storage.list_files(unet):
        storage.write_bytes(storage.join(bundle, listed.path), storage.read_bytes(storage.join(unet, listed.path)))
    out = storage.join(s3, "score/predictions")
    assert predict(bundle, images, out, actors=1)["statuses"] == {"ok": 5}
    assert predictions.read(out)["image_id"].to_pylist() == [f"sub/{n}.png" for n in range(5)]
    assert predict(bundle, images, out)["already"]
