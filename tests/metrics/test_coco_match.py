"""Matching and average precision of detections: against pycocotools, and by hand."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import match
from pipeline.metrics.coco_match import AREAS
from pipeline.metrics.detection_precision import average_precision, coco_precision, rank_detections
from tests.support.metric_cases import box_images, detection


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
