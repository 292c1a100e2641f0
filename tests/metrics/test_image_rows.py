"""Segmentation: rows of images and how they rank; odd input, parts, precision."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.metrics import SegmentationMetric
from pipeline.schema import VOID
from tests.support.metric_cases import BACKGROUND, CLASSES, Item, check_equal, pixels, segmentation


def test_rows_of_images_equal_the_metric_of_one_image():
    items = pixels(3)
    rows = segmentation(reversed(items)).images_table()
    assert rows["ids"].tolist() == [f"image-{n}" for n in range(5)]
    for n, item in enumerate(items):
        alone = segmentation([item]).compute()
        shown = [iou for iou in alone["iou"][:BACKGROUND] if iou is not None]
        assert rows["loss"][n] == pytest.approx(1 - np.mean(shown))
        assert rows["nll"][n] == pytest.approx(alone["nll"] * alone["pixels"])
        assert rows["brier"][n] == pytest.approx(alone["brier"] * alone["pixels"])
        assert rows["pixels"][n] == alone["pixels"]
        assert np.array_equal(rows["score"][n], np.float32(item[3]), equal_nan=True)


def test_the_loss_of_background_only_is_zero_and_of_nothing_labelled_unknown():
    target = torch.full((2, 3), BACKGROUND, dtype=torch.uint8)
    p = torch.zeros(CLASSES, 2, 3)
    p[BACKGROUND] = 1
    void = torch.full((2, 3), VOID, dtype=torch.uint8)
    metric = segmentation([(p, target, "a", 0.1), (p, void, "b", 0.2)])
    rows = metric.images_table()
    assert rows["loss"][0] == 0
    assert math.isnan(rows["loss"][1])
    got = metric.compute()
    assert got["risk_coverage"] == {"coverage": [1.0], "risk": [0.0]}
    assert (got["images"], got["pixels"], got["boundary_iou"]) == (2, 6, None)


def test_figures_of_images_equal_scipy_and_the_loop():
    items = pixels(4, 30)
    metric = segmentation(items)
    rows, got = metric.images_table(), metric.compute()
    known = ~np.isnan(rows["score"])
    scores, losses = rows["score"][known], rows["loss"][known]
    assert got["spearman_image"] == pytest.approx(stats.spearmanr(scores, 1 - losses).statistic)
    ranked = losses[np.argsort(scores)]
    risks = np.cumsum(ranked) / np.arange(1, 30)
    assert got["aurc_image"] == pytest.approx(risks.mean())
    best = np.cumsum(np.sort(losses)) / np.arange(1, 30)
    assert got["eaurc_image"] == pytest.approx(risks.mean() - best.mean())
    assert got["risk_coverage"]["coverage"] == pytest.approx(np.arange(1, 30) / 29)
    assert got["risk_coverage"]["risk"] == pytest.approx(risks)


def test_chunks_and_half_precision_change_nothing_that_matters(monkeypatch):
    items = pixels(5)
    whole = segmentation(items).compute()
    halves: list[Item] = [(p.half().float(), *rest) for p, *rest in items]  # type: ignore[misc]
    raw: list[Item] = [(p.half(), *rest) for p, *rest in items]  # type: ignore[misc]
    check_equal(segmentation(raw).compute(), segmentation(halves).compute())
    monkeypatch.setattr("pipeline.metrics.pixels._CHUNK", {"cpu": 7 * CLASSES})
    # Float32 sums over other parts differ in their last digits.
    check_equal(segmentation(items).compute(), whole, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_what_the_cpu_counts():
    items = pixels(6)
    there = [(p.cuda(), *rest) for p, *rest in items]
    check_equal(segmentation(there).compute(), segmentation(items).compute(), 1e-4)  # type: ignore[arg-type]


def test_a_probability_of_zero_costs_a_bounded_amount():
    p = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    metric = SegmentationMetric(2)
    metric.update(p, torch.ones(1, 1, dtype=torch.uint8))
    assert metric.compute()["nll"] == pytest.approx(87.3365, abs=1e-3)


def test_figures_that_are_not_numbers_are_null():
    p = torch.full((CLASSES, 3, 3), math.nan)
    got = segmentation([(p, torch.zeros(3, 3, dtype=torch.uint8), "a", math.nan)]).compute()
    assert got["nll"] is got["brier"] is got["ece"] is None
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((CLASSES, 1, 1), torch.full((1, 1), 4, dtype=torch.uint8), "neither below 4"),
        ((CLASSES, 2, 1), torch.zeros(1, 2, dtype=torch.uint8), "do not fit a mask"),
        ((3, 1, 1), torch.zeros(1, 1, dtype=torch.uint8), "wanted probabilities of 4 classes, found 3"),
    ],
)
def test_what_does_not_fit_is_refused(shape, target, message):
    with pytest.raises(ValueError, match=message):
        SegmentationMetric(CLASSES).update(torch.ones(shape) / 4, target)


def test_all_void_and_nothing_at_all_give_null():
    metric = SegmentationMetric(CLASSES)
    nothing = metric.compute()
    known = {name: value for name, value in nothing.items() if value is not None}
    assert known == {
        "iou": [None] * 4, "boundary_iou_per_class": [None] * 4, "confusion": [[0] * 4] * 4,
        "reliability": {"confidence": [None] * 15, "accuracy": [None] * 15, "count": [0] * 15},
        "images": 0, "pixels": 0,
    }  # fmt: skip
    metric.update(torch.ones(CLASSES, 2, 2) / 4, torch.full((2, 2), VOID, dtype=torch.uint8), "a", 0.5)
    assert metric.compute() == nothing | {"images": 1}
    assert SegmentationMetric(2).images_table()["inter"].shape == (0, 2)
