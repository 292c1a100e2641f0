"""What a bundle's doubt is worth: calibration and threshold from their own split, obeyed by every job."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import predictions
from pipeline.datasets import ingest
from pipeline.errors import InputError
from pipeline.models import bundle as bundles
from pipeline.scoring import calibrate, job
from pipeline.scoring.evaluate import evaluate, segmentation_gain, shift_detection
from pipeline.uncertainty.calibration.settings import CalibrateSettings
from tests.support.tiny import DETECTOR, UNET, encode, make_bundle, make_squares

SPLITS = {"train": range(4), "calibration": range(4, 16), "test": range(16, 24)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """Squares on noise, masks of them, and a split for calibration."""
    return make_squares(tmp_path_factory.mktemp("data"), SPLITS)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("unet"), {**UNET, "dropout": 0.3}, seeds=(3, 4))


@pytest.fixture(scope="module")
def calibrated(data: str, unet: str) -> bundles.Bundle:
    """With a temperature, and a threshold that is easily kept."""
    return calibrate.calibrate(bundles.open_bundle(unet), data, settings(risk=0.999, delta=0.5))


def settings(**values: object) -> CalibrateSettings:
    return CalibrateSettings.parse(values, "test")


def predicted(bundle: bundles.Bundle, data: str, out: Path, split: str = "test") -> list[dict[str, object]]:
    job.score(bundle, data, out=str(out), split=split)
    return predictions.read(str(out)).to_pylist()


def test_a_temperature_lowers_the_loss_and_changes_no_mask(
    tmp_path: Path, data: str, unet: str, calibrated: bundles.Bundle
):
    before, made = bundles.open_bundle(unet), calibrated
    fitted = made.manifest["calibration"]
    assert (fitted["kind"], fitted["n"], fitted["pixels"]) == ("temperature", 12, 12 * 32 * 32)
    assert fitted["fitted_on"]["split"] == "calibration"
    assert made.id != before.id
    where = {"split": "calibration", "measure": "metrics"}
    metrics = job.score(made, data, out=str(tmp_path / "new"), **where)["metrics"]
    raw = job.score(before, data, out=str(tmp_path / "old"), **where)["metrics"]
    assert metrics["nll"] < raw["nll"]
    assert metrics["uncalibrated"]["nll"] == pytest.approx(raw["nll"], rel=1e-6)
    assert metrics["members"] == raw["members"]
    assert metrics["iou"] == raw["iou"]
    rows, old = (predictions.read(str(tmp_path / name)).to_pylist() for name in ("new", "old"))
    assert len(rows) == 12
    assert [row["mask"] for row in rows] == [row["mask"] for row in old]
    for name in ("mutual_information_mean", "expected_entropy_mean", "member_dice"):
        assert [row[name] for row in rows] == [row[name] for row in old], "members are not calibrated"
    assert all(row["entropy_mean"] != was["entropy_mean"] for row, was in zip(rows, old, strict=True))


def test_the_threshold_is_obeyed_and_written(tmp_path: Path, data: str, unet: str, calibrated: bundles.Bundle):
    threshold = calibrated.manifest["threshold"]
    assert (threshold["risk"], threshold["delta"], threshold["n"]) == (0.999, 0.5, 12)
    assert threshold["score"] == "entropy_mean"
    assert threshold["value"] is not None
    rows = predicted(calibrated, data, tmp_path / "loose", "calibration")
    accepted = [row["uncertainty"] <= threshold["value"] for row in rows]
    assert [row["decision"] == "accept" for row in rows] == accepted
    assert np.mean(accepted) == pytest.approx(threshold["accepted"])
    strict = calibrate.calibrate(bundles.open_bundle(unet), data, settings(kind="none", risk=0.001))
    assert strict.manifest["calibration"] is None
    assert strict.manifest["threshold"]["value"] is None
    assert {row["decision"] for row in predicted(strict, data, tmp_path / "strict")} == {"review"}
    assert "review" in calibrate.describe_calibration(strict)


def test_the_score_that_the_threshold_acts_on_can_be_chosen(tmp_path: Path, data: str, unet: str):
    source = bundles.open_bundle(unet)
    changed = bundles.with_changes(source, predict={"uncertainty": "member_dice", "tta": {"flips": True}})
    made = calibrate.calibrate(changed, data, settings(risk=0.999, delta=0.5))
    assert made.manifest["threshold"]["score"] == "member_dice"
    written = bundles.write_bundle(str(tmp_path / "b"), made.manifest, bundles.member_uris(source))
    assert written.id == made.id
    rows = predicted(written, data, tmp_path / "p")
    assert {row["members"] for row in rows} == {8}
    assert [row["uncertainty"] for row in rows] == pytest.approx([1 - row["member_dice"] for row in rows], abs=1e-6)


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, data: str, unet: str, ray_local: None):
    detector = bundles.open_bundle(make_bundle(tmp_path, DETECTOR))
    for bundle, kind in ((detector, "vector"), (bundles.open_bundle(unet), "isotonic")):
        with pytest.raises(InputError, match=f"'{kind}' is not for {bundle.task}; choose auto"):
            calibrate.calibrate(bundle, data, settings(kind=kind))
    root = Path(data).parent
    names = {"train": ["image00"], "test": ["image01"]}
    (tmp_path / "splits.json").write_text(json.dumps(names))
    ingest.ingest(
        "instances", str(root / "images"), str(root / "labels"), str(tmp_path / "without"),
        classes=["cell"], splits=str(tmp_path / "splits.json"),
    )  # fmt: skip
    with pytest.raises(InputError, match="calibration"):
        calibrate.calibrate(bundles.open_bundle(unet), str(tmp_path / "without"), settings())
    with pytest.raises(InputError, match="'risk' = 1.5"):
        settings(risk=1.5)


def test_evaluate_tells_a_shifted_folder_apart(tmp_path: Path, data: str, unet: str):
    for n in range(5):
        path = tmp_path / "other" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(np.full((32, 32, 3), 40 * n, np.uint8)))
    metrics, scalars = evaluate(unet, data, "test", shift_data=str(tmp_path / "other"))
    wanted = "iou miou dice accuracy boundary_iou nll brier ece auroc_error aurc spearman_image shift_auroc members"
    assert set(wanted.split()) <= set(metrics)
    assert all(set(wanted.split()) - {"shift_auroc", "members"} <= set(member) for member in metrics["members"])
    assert metrics["shift_auroc"] == metrics["shift"]["auroc"]["uncertainty"]
    assert metrics["shift"]["images"] == 5
    assert set(metrics["shift"]["fpr95"]) >= {"member_dice", "entropy_patch_max"}
    assert scalars.num_rows == 8
    assert metrics["decisions"] is None
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["spearman_by_measure"]["uncertainty"] == pytest.approx(metrics["spearman_image"], abs=1e-9)
    assert set(metrics["spearman_by_measure"]) == set(metrics["shift"]["auroc"])
    assert set(metrics["gain"]["over_mean_member"]) == {"iou", "nll", "brier"}
    assert metrics["gain"]["over_mean_member"]["nll"]["difference"] <= 0, "Jensen"


def test_every_number_of_an_image_may_tell_the_shift():
    here = pa.table(
        {"uncertainty": [0.1, 0.2, 0.3, None], "member_dice": [0.9, 0.8, 0.95, None], "image_id": list("abcd")}
    )
    there = pa.table({"uncertainty": [0.25, 0.4], "member_dice": [0.5, 0.4], "image_id": list("xy")})
    found = shift_detection(here, there, "there")
    assert found["images"] == 2
    assert found["auroc"] == {"uncertainty": pytest.approx(5 / 6), "member_dice": 1.0}
    assert found["fpr95"] == {"uncertainty": pytest.approx(1 / 3), "member_dice": 0.0}


def test_the_gain_over_the_chosen_member_needs_validation_losses(data: str, unet: str):
    meters = job.score(unet, data, split="test", measure="metrics")["meters"]
    chosen = segmentation_gain(meters, [{"val_loss": 2.0}, {"val_loss": 1.0}])
    assert chosen is not None
    assert chosen["chosen_member"] == 1
    for figure, value in chosen["over_chosen_member"].items():
        assert value["low"] <= value["difference"] <= value["high"], figure
    unknown = segmentation_gain(meters, {})
    assert unknown is not None
    assert (unknown["chosen_member"], unknown["over_chosen_member"]) == (None, {})


def test_shift_data_without_a_readable_image(tmp_path: Path, data: str, unet: str):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes(b"no image")
    here = job.score(unet, data, split="test", scalars=True)["scalars"]
    there = job.score(unet, str(tmp_path / "other"), scalars=True)["scalars"]
    with pytest.raises(InputError, match="no image of it could be predicted"):
        shift_detection(here, there, "other")
