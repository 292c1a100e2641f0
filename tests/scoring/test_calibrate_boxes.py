"""What a detector's doubt is worth: precision, spread, operating point and threshold; ensembles of unlike members."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import predictions
from pipeline.errors import InputError
from pipeline.models import bundle as bundles
from pipeline.models import bundle_join
from pipeline.models.bundle import Bundle
from pipeline.scoring import calibrate, job
from pipeline.scoring.evaluate import evaluate
from pipeline.scoring.predictor import Predictor
from pipeline.uncertainty.calibration.settings import CalibrateSettings
from tests.support.tiny import CLASSES, DETECTOR, UNET, make_bundle, make_squares, png, table

SPLITS = {"train": range(2), "val": range(2, 8), "calibration": range(8, 20), "test": range(20, 26)}
YOLO = {"name": "yolo_v1", "stride": 8, "width": 4}
PREDICT = {"score_threshold": 0.0, "uncertainty": "expected_error"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    return make_squares(tmp_path_factory.mktemp("data"), SPLITS)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("detector"), DETECTOR, seeds=(3, 4), predict=PREDICT)


def settings(**values: object) -> CalibrateSettings:
    return CalibrateSettings.parse(values, "test")


def predicted(bundle: Bundle, data: str, out: Path, split: str = "test") -> list[dict[str, object]]:
    job.score(bundle, data, out=str(out), split=split)
    return predictions.read(str(out)).to_pylist()


def test_a_detector_is_calibrated_and_keeps_its_promise_in_writing(tmp_path: Path, data: str, detector: str):
    before = bundles.open_bundle(detector)
    made = calibrate.calibrate(before, data, settings(risk=0.999, delta=0.5))
    fitted, threshold = made.manifest["calibration"], made.manifest["threshold"]
    assert (fitted["kind"], fitted["n"]) == ("isotonic", 12)
    assert set(fitted["parameters"]) == {"pool", "spread"}
    assert (threshold["n"], threshold["score"], threshold["risk"]) == (12, "expected_error", 0.999)
    assert threshold["fitted_on"]["split"] == "calibration"
    assert "score to precision" in calibrate.describe_calibration(made)
    rows, old = predicted(made, data, tmp_path / "new"), predicted(before, data, tmp_path / "old")
    knots = fitted["parameters"]["pool"]
    for row, was in zip(rows, old, strict=True):
        scores, raw = ([box["score"] for box in each["boxes"]] for each in (row, was))  # type: ignore[attr-defined]
        assert scores == pytest.approx(np.interp(raw, knots["x"], knots["y"]), abs=1e-5)
        assert row["entropy_sum"] == was["entropy_sum"]
        limit = threshold["value"]
        wanted = "accept" if limit is not None and row["uncertainty"] <= limit else "review"
        assert row["decision"] == wanted
    uncalibrated = bundles.write_bundle(str(tmp_path / "b"), made.manifest, bundles.member_uris(before))
    metrics, _ = evaluate(str(uncalibrated.uri),
                          data, "test")  # fmt: skip
    wanted_keys = "map map50 map75 per_class pdq laece lrp auroc_tp members gain shift_auroc decisions uncalibrated"
    assert set(wanted_keys.split()) <= set(metrics)
    assert len(metrics["members"]) == 2
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_the_score_threshold_is_that_of_the_best_f1_on_the_validation_split(data: str, detector: str):
    made = calibrate.calibrate(bundles.open_bundle(detector), data, settings(kind="none"))
    assert made.manifest["calibration"] is None
    found = job.score(made, data, split="val", measure="metrics")["metrics"]
    assert made.manifest["score_threshold"] == pytest.approx(found["best_f1"]["score"])
    assert found["f1"] == pytest.approx(found["best_f1"]["f1"], abs=1e-9)


def test_unlike_detectors_become_one_ensemble(tmp_path: Path, data: str, detector: str):
    other = make_bundle(tmp_path / "yolo", YOLO, seeds=(7,), predict=PREDICT)
    manifest, weights = bundle_join.join_bundles([bundles.open_bundle(uri) for uri in (detector, other)])
    staged = bundles.stage(str(tmp_path / "joined"), manifest, weights)
    assert (staged.members, staged.same_model) == (3, False)
    assert [staged.model_settings(k).__class__.__name__ for k in range(3)] == ["AnchorFree", "AnchorFree", "YoloV1"]
    made = bundles.commit(calibrate.calibrate(staged, data, settings()))
    assert len(made.manifest["calibration"]["parameters"]["members"]) == 3
    rows = predicted(bundles.open_bundle(made.uri), data, tmp_path / "p")
    boxes = [box for row in rows for box in row["boxes"]]  # type: ignore[attr-defined]
    assert {row["members"] for row in rows} == {3}
    assert {box["votes"] for box in boxes} <= {1, 2, 3}
    assert all(box["std_x1"] is not None for box in boxes), "one vote alone has the spread that was fitted"
    metrics, _ = evaluate(made.uri, data, "test")
    assert metrics["gain"]["chosen_member"] is None, "losses of unlike models cannot be compared"


def test_copies_joined_are_an_ordinary_ensemble(tmp_path: Path, detector: str):
    opened = bundles.open_bundle(detector)
    manifest, weights = bundle_join.join_bundles([opened, opened])
    made = bundles.write_bundle(str(tmp_path / "twice"), manifest, weights)
    assert made.same_model
    assert made.members == 4
    assert Predictor(made, "cpu", threads=1).task.same_model


def test_members_may_be_normalised_each_in_its_own_way(tmp_path: Path, detector: str):
    dark = {"size": [32, 32], "fit": "letterbox", "mean": [0.2, 0.3, 0.4], "std": [0.5, 0.4, 0.3]}
    other = make_bundle(tmp_path / "dark", DETECTOR, seeds=(8,), predict=PREDICT, input=dark)
    manifest, weights = bundle_join.join_bundles([bundles.open_bundle(uri) for uri in (detector, other)])
    made = bundles.write_bundle(str(tmp_path / "joined"), manifest, weights)
    assert [each["mean"][0] for each in made.manifest["normalise"]] == [0.5, 0.5, 0.2]
    joined, alone = Predictor(made, "cpu", threads=1), Predictor(other, "cpu", threads=1)
    batch, _ = joined.task.collate(table([png(32, 32, 0)]), train=False, seed=0)
    wanted = alone._normalise(batch).images
    shown = joined._normalise(batch).images
    assert (joined.forward.renormalise(2, shown) - wanted).abs().max() < 1e-5
    assert (joined.forward.renormalise(0, shown) - shown).abs().max() < 1e-5


def test_what_cannot_be_joined(tmp_path: Path, detector: str):
    opened = bundles.open_bundle(detector)
    with pytest.raises(InputError, match="wanted two bundles or more to join, found 1"):
        bundle_join.join_bundles([opened])
    unet = bundles.open_bundle(make_bundle(tmp_path / "unet", UNET))
    with pytest.raises(InputError, match="bundles differ in task"):
        bundle_join.join_bundles([opened, unet])
    named = bundles.open_bundle(make_bundle(tmp_path / "named", DETECTOR, classes=["dog", CLASSES[1]]))
    with pytest.raises(InputError, match="bundles differ in classes"):
        bundle_join.join_bundles([opened, named])
