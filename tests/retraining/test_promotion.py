"""The judge: what it promotes, what it refuses, and that nothing but the images' counts decides."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.errors import InputError
from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.segmentation import SegmentationMetric
from pipeline.retraining.promotion import (
    FrozenTestMetrics,
    JudgeSettings,
    NewestMetrics,
    decide_promotion,
    figures,
    paired_gain,
)
from tests.support.metric_cases import box_images, detection

STRICT = JudgeSettings.parse({"tolerance": 0.005}, "test")
IMAGES = 40


def scored(quality: float, confidence: float = 0.9, order: Any = None, images: int = IMAGES) -> SegmentationMetric:
    """A model that labels that share of pixels right, and says so with that probability."""
    metric = SegmentationMetric(3, background=2)
    for n in order if order is not None else range(images):
        rng = np.random.default_rng(n)
        target = torch.tensor(rng.integers(0, 3, (16, 16)), dtype=torch.uint8)
        right = torch.tensor(rng.random((16, 16)) < quality + 0.1 * np.sin(n))
        said = torch.where(right, target.long(), (target.long() + 1) % 3)
        probabilities = torch.full((3, 16, 16), (1 - confidence) / 2)
        probabilities.scatter_(0, said[None], confidence)
        metric.update(probabilities, target, f"image{n:03d}", float(rng.random()))
    return metric


def found(jitter: float, images: int = 30, missed: float = 0.1) -> DetectionMetric:
    """A detector whose boxes are off by so many pixels, with scores that are right."""
    metric = DetectionMetric(2, operating_score=0.3)
    for n in range(images):
        rng = np.random.default_rng(n)
        corners = rng.uniform(0, 60, (4, 2))
        true = np.concatenate([corners, corners + rng.uniform(10, 20, (4, 2))], 1)
        kept = rng.random(4) > missed
        boxes = (true + rng.normal(0, 1, true.shape) * jitter)[kept]
        labels = np.array([0, 1, 0, 1])
        metric.update(
            f"image{n:03d}",
            boxes,
            np.full(kept.sum(), 0.9),
            labels[kept],
            true,
            labels,
            uncertainty=rng.random(),
            size=(80, 80),
        )
    return metric


def names(record: dict[str, Any], holds: bool) -> set[str]:
    return {each["name"] for each in record["conditions"] if each["holds"] is holds}


def test_the_first_challenger_is_promoted_and_it_is_said_why():
    record = decide_promotion(STRICT, FrozenTestMetrics(scored(0.3), None), None)
    assert record["promote"]
    assert record["reasons"] == ["there is no champion to compare with: the first challenger is promoted"]
    assert record["figures"]["champion"] is None


def test_better_is_promoted_and_the_same_is_not():
    record = decide_promotion(STRICT, FrozenTestMetrics(scored(0.9), scored(0.8)), None)
    assert record["promote"], record["reasons"]
    assert record["gain"]["over_champion"]["lower"] > 0
    same = decide_promotion(STRICT, FrozenTestMetrics(scored(0.8), scored(0.8)), None)
    assert not same["promote"]
    assert names(same, False) == {"improvement"}
    assert "frozen test +0.0000, newest data (0 images): not defined" in same["reasons"][0]


def test_worse_is_refused_with_the_reason():
    record = decide_promotion(STRICT, FrozenTestMetrics(scored(0.6), scored(0.8)), None)
    assert not record["promote"]
    assert {"main figure against the champion", "improvement"} <= names(record, False)
    assert record["reasons"][0].startswith("refused: main figure against the champion: gain -0.")
    assert "wanted a lower limit (95%, one-sided) of the gain above -0.005" in record["reasons"][0]


def test_as_accurate_but_worse_calibrated_is_refused():
    """The same pixels are right; the challenger is a little better, and sure of everything."""
    own, other = scored(0.81, confidence=0.999), scored(0.8, confidence=0.82)
    record = decide_promotion(JudgeSettings(), FrozenTestMetrics(own, other), None)
    assert record["gain"]["over_champion"]["difference"] > 0
    assert not record["promote"]
    assert names(record, False) == {"NLL", "calibration error"}


def test_a_class_that_is_lost_is_refused():
    own, other = scored(0.85), scored(0.8)
    rng = np.random.default_rng(0)
    for metric, right in ((own, 0.05), (other, 0.9)):
        target = torch.full((64, 64), 1, dtype=torch.uint8)
        said = torch.where(torch.tensor(rng.random((64, 64)) < right), 1, 0)
        metric.update(torch.nn.functional.one_hot(said, 3).permute(2, 0, 1) * 0.7 + 0.1, target, "last", 0.5)
    record = decide_promotion(JudgeSettings.parse({"tolerance": 1.0}, "t"), FrozenTestMetrics(own, other), None)
    assert "recall of the worst class" in names(record, False)


def test_small_losses_cannot_add_up():
    """Each is within the tolerance of its forerunner, and better on the newest data; the best ever stops the series."""
    settings = JudgeSettings.parse({"tolerance": 0.05, "recall": 1.0, "nll": 9.0, "ece": 1.0, "aurc": 1.0}, "test")
    qualities = [0.9, 0.88, 0.86, 0.84, 0.82]
    metrics = [scored(quality) for quality in qualities]
    everything = frozenset(f"image{n:03d}" for n in range(IMAGES))
    promoted = []
    for before, after in zip(metrics, metrics[1:], strict=False):
        newest = NewestMetrics(scored(0.9), scored(0.5), everything)
        alone = decide_promotion(settings, FrozenTestMetrics(after, before), newest)
        beside_best = decide_promotion(settings, FrozenTestMetrics(after, before, metrics[0]), newest)
        assert alone["promote"], alone["reasons"]
        promoted.append(beside_best["promote"])
    assert promoted[0]
    assert promoted[-1] is False
    assert promoted == sorted(promoted, reverse=True)


def test_the_newest_images_alone_can_be_the_improvement():
    frozen = FrozenTestMetrics(scored(0.8), scored(0.8))
    few = frozenset(["image001", "image002", "nowhere"])
    record = decide_promotion(STRICT, frozen, NewestMetrics(scored(0.9), scored(0.7), few), drifted=True)
    assert record["promote"], record["reasons"]
    assert record["newest"]["images"] == 2
    assert record["newest"]["challenger"] > record["newest"]["champion"]
    assert "improvement (doubt drifted)" in names(record, True)
    rows = scored(0.9, order=[1, 2])
    assert record["newest"]["challenger"] == pytest.approx(figures(rows)["main"])
    assert not decide_promotion(STRICT, frozen, NewestMetrics(scored(0.7), scored(0.9), few), drifted=True)["promote"]


def test_the_order_of_images_changes_nothing():
    order = np.random.default_rng(1).permutation(IMAGES)
    one = decide_promotion(STRICT, FrozenTestMetrics(scored(0.82), scored(0.8)), None)
    other = decide_promotion(STRICT, FrozenTestMetrics(scored(0.82, order=order), scored(0.8, order=order[::-1])), None)
    assert one == other


def test_other_images_are_refused():
    with pytest.raises(InputError, match="wants both sides of the same images: found 40 and 39 images"):
        paired_gain(STRICT, scored(0.8), scored(0.8, images=39))


def test_the_limit_is_that_of_another_implementation():
    """Against scipy's paired percentile bootstrap of the same statistic."""
    own, other = scored(0.83), scored(0.8)
    ours = paired_gain(JudgeSettings.parse({"resamples": 4000}, "t"), own, other)["lower"]
    a, b = (metric.images_table() for metric in (own, other))

    def statistic(index: np.ndarray) -> float:
        index = index.astype(int)
        each = [rows["inter"][index].sum(0)[:2] / rows["union"][index].sum(0)[:2] for rows in (a, b)]
        return float(each[0].mean() - each[1].mean())

    theirs = stats.bootstrap(
        (np.arange(IMAGES),), statistic, vectorized=False, n_resamples=4000, method="percentile",
        confidence_level=0.9, rng=np.random.default_rng(5),
    )  # fmt: skip
    assert ours == pytest.approx(theirs.confidence_interval.low, abs=1.5e-3)


def test_detectors_are_judged_by_map():
    record = decide_promotion(STRICT, FrozenTestMetrics(found(0.5), found(2.0)), None)
    own, other = found(0.5).compute(), found(2.0).compute()
    assert record["figures"]["challenger"]["main"] == pytest.approx(own["map"], abs=1e-9)
    assert record["gain"]["over_champion"]["difference"] == pytest.approx(own["map"] - other["map"], abs=1e-9)
    assert record["promote"], record["reasons"]
    assert not decide_promotion(STRICT, FrozenTestMetrics(found(2.0), found(0.5)), None)["promote"]
    assert record["figures"]["challenger"]["recall"] == pytest.approx(
        min(np.diagonal(own["confusion"])[:2] / np.sum(own["confusion"], 1)[:2])
    )


def test_the_log_score_of_boxes_by_hand():
    metric = DetectionMetric(2, operating_score=0.2)
    true = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    boxes = [[0, 0, 10, 10], [60, 0, 70, 10], [40, 0, 50, 10], [20, 0, 30, 10]]
    metric.update("a", boxes, [0.9, 0.25, 0.5, 0.1], [0, 0, 1, 0], true, [0, 0, 1])
    wanted = -np.log([0.9, 0.75, 0.5]).mean()
    assert metric.compute()["nll_score"] == pytest.approx(wanted, rel=1e-6)
    assert figures(metric)["nll"] == metric.compute()["nll_score"]
    assert DetectionMetric(2).compute()["nll_score"] is None


def test_detectors_of_one_member_differ_by_less_than_a_tolerance_where_they_are_equally_good():
    """Without spreads the likelihood of edges differs by more than a nat, and would refuse every second one."""

    def model(seed: int) -> DetectionMetric:
        rng, rows = np.random.default_rng(seed), box_images(3, 200, 2)
        for row in rows:
            row["boxes"] = row["boxes"] + rng.normal(0, 1, row["boxes"].shape).astype(np.float32)
            row["std"] = np.full_like(row["boxes"], np.nan)
        return detection(rows, 2)

    figures_of = [model(seed).compute() for seed in range(6)]
    assert np.std([each["nll_box"] for each in figures_of]) > 0.2
    assert np.std([each["nll_score"] for each in figures_of]) < 0.02


def test_without_labels_nobody_is_promoted():
    record = decide_promotion(STRICT, FrozenTestMetrics(SegmentationMetric(3, background=2), None), None)
    assert not record["promote"]
    assert record["reasons"] == ["refused: the frozen test has no labels to judge by"]
