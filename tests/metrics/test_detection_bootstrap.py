"""Intervals of the differences of detectors: against metrics of the drawn images, and what cannot be compared."""

import time
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.metrics import DetectionMetric, detection_bootstrap
from pipeline.metrics.detection_bootstrap import paired
from tests.support.metric_cases import box_images, detection, scattered_boxes


@pytest.mark.parametrize("figure", detection_bootstrap.FIGURES)
def test_a_weighted_figure_is_that_of_the_images_drawn(figure):
    rows = box_images(11, 12, 3)
    for k, row in enumerate(rows):
        # Ties between images would be ranked by id, which copies change.
        row["scores"] = np.random.default_rng(k).permutation(np.arange(len(row["scores"])) * 13 + k + 1) / 200
    metric = detection(rows, 3)
    weights = np.random.default_rng(1).integers(0, 4, (4, 12)).astype(float)
    got = detection_bootstrap.figures(metric, weights)[figure]
    for weight, value in zip(weights, got, strict=True):
        drawn = [row | {"image_id": f"{row['image_id']}-{copy}"} for row, number in zip(rows, weight, strict=True)
                 for copy in range(int(number))]  # fmt: skip
        assert value == pytest.approx(detection(drawn, 3).compute()[figure], abs=1e-9)


def test_the_gain_is_the_difference_of_the_figures_with_an_interval_around_it():
    rows = box_images(2, 40, 2)
    pool = detection(rows, 2)
    noise = [np.random.default_rng(k) for k in range(2)]
    worse = [detection([row | {"boxes": row["boxes"] + rng.normal(0, 4)} for row in rows], 2) for rng in noise]
    got: Any = paired(pool, worse, 1, draws=200)
    own, each = pool.compute(), [metric.compute() for metric in worse]
    for figure in detection_bootstrap.FIGURES:
        mean = got["over_mean_member"][figure]
        assert mean["difference"] == pytest.approx(own[figure] - (each[0][figure] + each[1][figure]) / 2)
        chosen = got["over_chosen_member"][figure]
        assert chosen["difference"] == pytest.approx(own[figure] - each[1][figure])
        for interval in (mean, chosen):
            assert interval["low"] < interval["difference"] < interval["high"]
    assert got["over_mean_member"]["map"]["low"] > 0
    assert paired(pool, worse, 1, draws=200) == got
    same = {"difference": 0, "low": 0, "high": 0}
    assert paired(pool, [pool, pool], None, 20) == {
        "over_mean_member": dict.fromkeys(detection_bootstrap.FIGURES, same), "over_chosen_member": {},
    }  # fmt: skip


def test_what_cannot_be_compared_is_refused_or_null():
    one = detection(box_images(1, 3, 2), 2)
    with pytest.raises(InputError, match="the same images of all: found 3 and 2 images"):
        paired(one, [detection(box_images(1, 2, 2), 2)], 0)
    empty = paired(DetectionMetric(2), [DetectionMetric(2)], 0, draws=3)
    assert empty["over_chosen_member"]["map"] == {"difference": None, "low": None, "high": None}


def test_a_hundred_images_of_six_models_are_compared_in_seconds():
    rng = np.random.default_rng(0)
    models = [DetectionMetric(3) for _ in range(6)]
    for n in range(100):
        true, labels = scattered_boxes(rng, 12, 500)
        for metric in models:
            noise = rng.normal(0, 3, (100, 4))
            found = np.concatenate([true, scattered_boxes(rng, 88, 500)[0]]) + noise
            metric.update(f"{n:03d}", found, rng.random(100), rng.integers(0, 3, 100), true, labels)
    start = time.process_time()
    paired(models[0], models[1:], 0)
    assert time.process_time() - start < 20
