"""Benchmarks that take longer: they run, and what they compare is equal."""

import json
from typing import Any

import pytest

from benchmarks.speed import evaluate, write_predictions

pytestmark = pytest.mark.long


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluate(capsys: pytest.CaptureFixture[str]):
    for package in ("pycocotools", "torchmetrics"):
        pytest.importorskip(package)
    evaluate.main("--images 20 --masks 2 --rounds 1 --classes 4".split())
    said = last(capsys)
    values = {name: side["value"] for name, side in said["figures"]["mAP"].items()}
    assert len(values) == 5
    assert max(values.values()) - min(values.values()) < 2e-3  # ours keeps boxes as float32
    iou = [side["value"] for side in said["figures"]["mIoU"].values()]
    assert iou[0] == pytest.approx(iou[1], abs=1e-6)
    assert all(ratio > 0 for ratio in said["ratios"].values())


def test_write(capsys: pytest.CaptureFixture[str]):
    write_predictions.main("--count 8 --size 64 --rounds 1".split())
    said = last(capsys)
    assert said["benchmark"] == "write"
    assert set(said["figures"]) == {"mask", "map", "writing"}
    assert "rows written / PNG files" in said["ratios"]
