"""Detection's figures: against pycocotools and faster-coco-eval, the papers' formulas by hand, and laws."""

import contextlib
import io
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.metrics import DetectionMetric, detection_bootstrap, match
from pipeline.metrics.coco_match import AREAS
from pipeline.metrics.detection_bootstrap import paired
from pipeline.metrics.detection_precision import average_precision, coco_precision, rank_detections
from tests.support.metric_cases import box_images, check_equal, detection

NOTHING = {"boxes": [], "scores": [], "labels": [], "std": np.zeros((0, 4)), "probabilities": np.zeros((0, 4))}


def _pycocotools(images: list[dict], classes: int) -> tuple[np.ndarray, list[Any]]:
    """COCO's (10, 101, K, 4) precision, and what it says of each image and class at IoU .5 and all sizes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        x1, y1, x2, y2 = np.asarray(box, np.float64).tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    true: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for n, image in enumerate(images):
        for box, label, crowd in zip(image["true_boxes"], image["true_labels"], image["crowd"], strict=True):
            bbox = xywh(box)
            true.append({"id": len(true) + 1, "image_id": n, "category_id": int(label), "bbox": bbox,
                         "area": bbox[2] * bbox[3], "iscrowd": int(crowd)})  # fmt: skip
        for box, label, score in zip(image["boxes"], image["labels"], image["scores"], strict=True):
            found.append({"image_id": n, "category_id": int(label), "bbox": xywh(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {
            "info": {}, "images": [{"id": n} for n in range(len(images))],
            "categories": [{"id": k, "name": str(k)} for k in range(classes)], "annotations": true,
        }  # fmt: skip
        truth.createIndex()
        made: Any = truth.loadRes(found) if found else COCO()
        judge = COCOeval(truth, made, "bbox")
        judge.params.imgIds = list(range(len(images)))
        judge.params.areaRng = [list(area) for area in AREAS.values()]
        judge.evaluate()
        judge.accumulate()
    return judge.eval["precision"][..., -1], [each for each in judge.evalImgs if each and each["aRng"] == [0, 1e10]]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6), images=st.integers(1, 8), classes=st.integers(1, 4), grid=st.sampled_from([0.0, 8.0])
)
def test_all_three_average_precisions_agree(seed, images, classes, grid):
    pytest.importorskip("pycocotools")
    rows = box_images(seed, images, classes, grid=grid)
    for row in rows:
        row["boxes"][:1] = row["boxes"][:1, [2, 1, 0, 3]]  # turned over
    metric = detection(rows, classes)
    if not sum(len(row["boxes"]) for row in rows):
        return
    wanted, _ = _pycocotools(rows, classes)
    fast = coco_precision(metric.images(), classes)
    assert np.abs(fast - wanted).max() < 1e-9
    for label, own in enumerate(rank_detections(metric.images(), classes)):
        got = average_precision(own, np.ones((1, images)))[:, 0]
        each = wanted[:, :, label, 0]
        check = np.where((each > -1).all(1), each.mean(1), np.nan)
        np.testing.assert_allclose(got, check, atol=1e-9)
    figures = metric.compute()
    for k, name in enumerate(("map", "map_small", "map_medium", "map_large")):
        known = wanted[..., k][wanted[..., k] > -1]
        assert figures[name] == (pytest.approx(known.mean(), abs=1e-9) if len(known) else None)
    json.dumps(figures, allow_nan=False)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3), grid=st.sampled_from([0.0, 16.0]))
def test_boxes_are_matched_as_coco_matches_them(seed, classes, grid):
    pytest.importorskip("pycocotools")
    (row,) = box_images(seed, 1, classes, grid=grid, crowds=0.3)
    got = match(*(row[name] for name in ("boxes", "scores", "labels", "true_boxes", "true_labels", "crowd")))
    order = np.argsort(-row["scores"], kind="stable")
    for each in _pycocotools([row], classes)[1] if len(row["boxes"]) else []:
        mine = order[row["labels"][order] == each["category_id"]]
        crowd = np.append(row["crowd"], False)
        taken = each["dtMatches"][0].astype(int) - 1
        assert np.array_equal(got.index[mine], np.where(crowd[taken], -1, taken))
        assert np.array_equal(got.ignored[mine], each["dtIgnore"][0])
    assert ((got.iou >= 0.5) == (got.index >= 0)).all()


def test_match_takes_the_free_truth_of_its_class_with_the_highest_overlap():
    true = [[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 90, 90]]
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 10], [60, 60, 70, 70], [0, 0, 10, 10]]
    got = match(boxes, [0.5, 0.9, 0.4, 0.3, 0.8], [0, 0, 0, 0, 1], true, [0, 0, 0], [False, False, True])
    assert got.index.tolist() == [1, 0, -1, -1, -1]
    assert got.iou.tolist() == pytest.approx([80 / 90, 1, 0, 0, 0])
    assert got.ignored.tolist() == [False, False, False, True, False]


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
        true, labels = _scattered(rng, 12, 500)
        for metric in models:
            noise = rng.normal(0, 3, (100, 4))
            found = np.concatenate([true, _scattered(rng, 88, 500)[0]]) + noise
            metric.update(f"{n:03d}", found, rng.random(100), rng.integers(0, 3, 100), true, labels)
    start = time.process_time()
    paired(models[0], models[1:], 0)
    assert time.process_time() - start < 20


def _scattered(rng: np.random.Generator, number: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    corner = rng.uniform(0, spread, (number, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 60, (number, 2))], 1), rng.integers(0, 3, number)


def test_five_thousand_boxes_in_one_image_take_seconds():
    rng = np.random.default_rng(0)
    true, _ = _scattered(rng, 5000, 4000)
    metric = DetectionMetric(1)
    more = {"std": np.full((5000, 4), 2.0), "probabilities": np.tile([0.8, 0.2], (5000, 1))}
    columns = true + rng.normal(0, 2, true.shape), rng.uniform(0.3, 1, 5000), np.zeros(5000)
    metric.update("a", *columns, true, np.zeros(5000), **more)
    start = time.process_time()
    got = metric.compute()
    assert time.process_time() - start < 20
    assert got["f1"] > 0.9
    assert got["pdq"] > 0.3
