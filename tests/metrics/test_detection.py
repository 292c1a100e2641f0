"""Detection's figures: the papers' formulas by hand, figures that are not defined, and laws."""

import io
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import DetectionMetric, match
from tests.support.metric_cases import box_images, check_equal, detection, scattered_boxes

NOTHING = {"boxes": [], "scores": [], "labels": [], "std": np.zeros((0, 4)), "probabilities": np.zeros((0, 4))}


def _one(found: list, true: list, operating: float = 0.3, classes: int = 1, **more: Any) -> dict[str, Any]:
    """Figures of one image from (x1, y1, x2, y2, label[, score])."""
    boxes, truth = np.array(found, float).reshape(-1, 6), np.array(true, float).reshape(-1, 5)
    metric = DetectionMetric(classes, operating)
    columns = boxes[:, :4], boxes[:, 5], boxes[:, 4].astype(int), truth[:, :4], truth[:, 4].astype(int)
    metric.update("a", *columns, **more)
    return metric.compute()


def test_laece_and_lrp_by_hand():
    # Overlaps 1, .8, .25, and none; the third is right at .1 alone, the last bin holds the first two.
    found = [[0, 0, 10, 10, 0, 0.99], [100, 0, 110, 8, 0, 0.97], [200, 0, 205, 5, 0, 0.5], [300, 0, 310, 10, 0, 0.5],
             [400, 0, 410, 10, 0, 0.2]]  # fmt: skip
    true = [[0, 0, 10, 10, 0], [100, 0, 110, 10, 0], [200, 0, 210, 10, 0], [400, 0, 410, 10, 0]]
    got = _one(found, true)
    assert got["laece"] == pytest.approx(2 / 4 * abs(0.98 - 0.9) + 2 / 4 * abs(0.5 - 0.125), abs=1e-7)
    # Right 3, losing (0 + .2 + .75) / .9; wrong 1; missed 1, which is found but not said.
    assert got["lrp"] == pytest.approx((0.95 / 0.9 + 1 + 1) / 5)
    # At .5, the best score is the lowest: right 3 with .4, wrong 2, missed 1; from .97 on: .4 and 2 missed of 4.
    assert got["olrp"] == pytest.approx(min((0.4 + 2 + 1) / 6, (0.4 + 2) / 4))
    assert got["d_ece"] == pytest.approx(2 / 4 * 0.02 + 2 / 4 * 0.5, abs=1e-7)
    assert (got["precision"], got["recall"], got["f1"]) == pytest.approx((0.5, 0.5, 0.5))
    assert got["best_f1"] == pytest.approx({"score": 0.97, "f1": 4 / 6, "precision": 1, "recall": 0.5}, abs=1e-7)
    assert got["auroc_tp"] == pytest.approx(4 / 6)
    assert got["reliability"]["count"][14] == 2
    assert sum(got["reliability"]["count"]) == 5


def test_classes_count_alike_in_laece_and_lrp():
    # Class 0: one box, 0.9 for an overlap of 1. Class 1: two said of nothing. Class 2: one missed. Class 3: nowhere.
    found = [[0, 0, 10, 10, 0, 0.9], [50, 0, 60, 10, 1, 0.6], [80, 0, 90, 10, 1, 0.6]]
    got = _one(found, [[0, 0, 10, 10, 0], [200, 0, 210, 10, 2]], classes=4)
    assert got["laece"] == pytest.approx((0.1 + 0.6) / 2)
    assert got["lrp"] == pytest.approx((0 + 1 + 1) / 3)
    assert got["olrp"] == pytest.approx((0 + 1) / 2)


def test_laece0_counts_any_overlap():
    found = [[0, 0, 10, 10, 0, 0.9], [100, 0, 110, 1, 0, 0.5]]
    true = [[0, 0, 10, 10, 0], [100, 0, 110, 20, 0]]
    got = _one(found, true)
    assert got["laece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.5)
    assert got["laece0"] == pytest.approx(0.5 * 0.1 + 0.5 * (0.5 - 0.05))


def test_confusion_matches_whatever_the_class():
    found = [[0, 0, 10, 10, 1, 0.9], [50, 0, 60, 10, 0, 0.8], [90, 0, 99, 10, 1, 0.7], [0, 0, 10, 10, 0, 0.1]]
    true = [[0, 0, 10, 10, 0], [50, 0, 60, 10, 0], [200, 0, 210, 10, 1]]
    assert _one(found, true, classes=2)["confusion"] == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]


def test_calibrated_scores_have_little_error_and_shifted_ones_theirs():
    rng = np.random.default_rng(0)
    score = rng.uniform(0.3, 1, (40, 100))
    right = rng.random(score.shape) < score
    at = np.arange(100) * 20.0
    boxes = np.stack([at, 0 * at, at + 10, 0 * at + 10], 1)
    for shift in (0.0, 0.25):
        metric, said = DetectionMetric(1), np.minimum(score + shift, 1)
        for n in range(40):
            metric.update(f"{n}", boxes, said[n], 0 * at, boxes[right[n]], np.zeros(right[n].sum()))
        got = metric.compute()
        gap = said.mean() - score.mean()
        assert got["d_ece"] == pytest.approx(gap, abs=0.02)
        assert got["laece"] == pytest.approx(gap, abs=0.03)


def test_images_are_ranked_by_their_doubt():
    rows = box_images(1, 30, 2)
    metric = detection(rows, 2)
    table = metric.images_table()
    for row, loss, true, found in zip(rows, table["loss"], table["true"], table["found"], strict=True):
        single = ~row["crowd"]
        said = row["scores"] >= np.float32(0.3)
        found_ones = (row[name][said] for name in ("boxes", "scores", "labels"))
        made = match(*found_ones, *(row[name] for name in ("true_boxes", "true_labels", "crowd")))
        assert (true, found) == (single.sum(), (~made.ignored).sum())
        either = true + found
        assert loss == pytest.approx(1 - 2 * (made.index >= 0).sum() / either if either else 0)
    assert table["ids"].tolist() == [row["image_id"] for row in rows]
    assert np.isnan(table["score"][0])
    oracle = [row | {"uncertainty": float(loss)} for row, loss in zip(rows, table["loss"], strict=True)]
    got = detection(oracle, 2).compute()
    assert got["spearman_image"] == pytest.approx(-1)
    assert got["eaurc_image"] == pytest.approx(0, abs=1e-12)
    assert got["risk_coverage"]["risk"][-1] == pytest.approx(table["loss"].mean())
    assert got["aurc_image"] < metric.compute()["aurc_image"]


UNDEFINED = {
    "no image": [],
    "an empty image": [NOTHING | {"image_id": "a", "true_boxes": [], "true_labels": []}],
    "only a crowd": [NOTHING | {"image_id": "a", "true_boxes": [[0, 0, 9, 9]], "true_labels": [1], "crowd": [True]}],
    "a crowd that absorbs all": [
        {"image_id": "a", "boxes": [[0, 0, 4, 4]] * 3, "scores": [0.9, 0.8, 0.1], "labels": [1] * 3,
         "true_boxes": [[0, 0, 9, 9]], "true_labels": [1], "crowd": [True]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", UNDEFINED)
def test_without_anything_that_counts_figures_are_null(name):
    got = detection(UNDEFINED[name], 3).compute()
    json.dumps(got, allow_nan=False)
    given = {"images": len(UNDEFINED[name]), "boxes": 0, "operating": 0.3, "confusion": np.zeros((4, 4), int).tolist()}
    assert {key: got[key] for key in given} == given
    assert got["per_class"] == got["per_class50"] == got["pr_curves"]["precision"] == [None] * 3
    assert sum(got["reliability"]["count"]) == 0
    others = set(got) - set(given) - {"per_class", "per_class50", "pr_curves", "reliability", "risk_coverage"}
    assert {key for key in others if got[key] is not None} == set()
    assert detection(UNDEFINED[name], 3).images_table()["loss"].tolist() == [0] * len(UNDEFINED[name])


def test_nothing_found_and_nothing_true_are_the_worst():
    missed = detection([row | NOTHING for row in box_images(3, 5, 3, crowds=0)], 3).compute()
    zeros = ("map", "map50", "recall", "f1", "pdq")
    assert [missed[name] for name in zeros] == [0] * 5
    assert (missed["lrp"], missed["olrp"]) == (1, 1)
    assert missed["precision"] is missed["laece"] is missed["best_f1"] is missed["auroc_tp"] is None
    wrong = [row | {"true_boxes": [], "true_labels": [], "crowd": []} for row in box_images(3, 5, 3)]
    got = detection(wrong, 3).compute()
    assert got["map"] is got["recall"] is got["best_f1"] is got["olrp"] is got["nll_box"] is None
    assert (got["precision"], got["f1"], got["lrp"], got["pdq"], got["boxes"]) == (0, 0, 1, 0, 0)


@settings(max_examples=5)
@given(parts=st.lists(st.integers(0, 2), min_size=9, max_size=9), order=st.permutations(range(3)))
def test_no_split_of_the_images_changes_anything(parts, order):
    rows = box_images(7, 9, 3)
    rows[4] |= {"std": None}
    rows[5] |= {"size": (150, 140)}
    whole = detection(rows, 3, 0.4)
    total = DetectionMetric(3, 0.4)
    for k in order:
        buffer = io.BytesIO()
        piece = detection([row for row, part in zip(rows, parts, strict=True) if part == k], 3, 0.4)
        np.savez(buffer, allow_pickle=False, **piece.state())
        buffer.seek(0)
        with np.load(buffer, allow_pickle=False) as state:
            total.merge(DetectionMetric.from_state(dict(state)))
    assert total.operating_score == 0.4
    check_equal(total.compute(), whole.compute())
    for name, column in whole.images_table().items():
        np.testing.assert_array_equal(total.images_table()[name], column)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        DetectionMetric(2).update("a", np.zeros((2, 4)), [0.5], [0], [], [])
    with pytest.raises(ValueError, match="labels below 2"):
        DetectionMetric(2).update("a", np.zeros((1, 4)), [0.5], [2], [], [])
    with pytest.raises(ValueError, match="reshape"):
        DetectionMetric(2).update("a", np.zeros((1, 4)), [0.5], [1], [], [], probabilities=[[0.5, 0.5]])


def test_five_thousand_boxes_in_one_image_take_seconds():
    rng = np.random.default_rng(0)
    true, _ = scattered_boxes(rng, 5000, 4000)
    metric = DetectionMetric(1)
    more = {"std": np.full((5000, 4), 2.0), "probabilities": np.tile([0.8, 0.2], (5000, 1))}
    columns = true + rng.normal(0, 2, true.shape), rng.uniform(0.3, 1, 5000), np.zeros(5000)
    metric.update("a", *columns, true, np.zeros(5000), **more)
    start = time.process_time()
    got = metric.compute()
    assert time.process_time() - start < 20
    assert got["f1"] > 0.9
    assert got["pdq"] > 0.3
