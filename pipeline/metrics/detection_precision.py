"""COCO's average precision: by faster-coco-eval, and from ranked rows with a weight for each image.

The second gives the same numbers, and those of pycocotools, where all weights are 1; boxes are matched once, so that
drawing images again costs a sum. An area is that of the box. Never by torch collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.metrics.detection_rows import Image
from pipeline.metrics.matching import overlaps

MAX_DETECTIONS = 100
"""Boxes of one class in an image that count, best scores first: COCO's number."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's least overlaps."""
RECALLS = np.linspace(0, 1, 101)
"""COCO's recalls."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's sizes of true boxes, square pixels."""
_CELLS = 2**21
"""Weights held at a time, in numbers."""


def coco_precision(images: Sequence[Image], num_classes: int) -> np.ndarray:
    """(10 thresholds, 101 recalls, K, 4 areas) float64 by faster-coco-eval; -1 where there is no true box."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(
        {
            "info": {},
            "images": [{"id": row} for row in range(len(images))],
            "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
            "annotations": _truth_rows(images),
        },
        print_function=_silent,
    )
    judge = COCOeval_faster(truth, truth.loadRes(_found_rows(images)), "bbox", print_function=_silent)
    judge.params.maxDets = [MAX_DETECTIONS]
    judge.params.areaRng, judge.params.areaRngLbl = [list(area) for area in AREAS.values()], list(AREAS)
    judge.evaluate()
    judge.accumulate()
    return np.asarray(judge.eval["precision"])[..., 0]


def _truth_rows(images: Sequence[Image]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row, image in enumerate(images):
        columns = _xywh(image.true_boxes), image.true_labels.tolist(), image.crowd.tolist()
        for box, label, many in zip(*columns, strict=True):
            rows.append(
                {"id": len(rows) + 1, "image_id": row, "category_id": label, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(many)}
            )  # fmt: skip
    return rows


def _found_rows(images: Sequence[Image]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row, image in enumerate(images):
        for box, score, label in zip(_xywh(image.boxes), image.scores.tolist(), image.labels.tolist(), strict=True):
            rows.append({"image_id": row, "category_id": label, "bbox": box, "score": score})
    return rows


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    wide = boxes.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()


def _silent(*_: Any) -> None:
    """The evaluator's progress is nobody's business."""


@dataclass
class Ranked:
    """The n boxes of one class over N images, the best score first."""

    image: np.ndarray
    """(n,) int64 row of the image."""
    found: np.ndarray
    """(10, n) bool: is a true box, by threshold."""
    counted: np.ndarray
    """(10, n) bool: not absorbed by a crowd."""
    true: np.ndarray
    """(N,) float64 true boxes without crowds."""


def ranked(images: Sequence[Image], num_classes: int) -> list[Ranked]:
    """The boxes of each class, matched at all ten thresholds by COCO's rule (see ``matching.match``)."""
    out = []
    for label in range(num_classes):
        parts = [_one(image, label) for image in images]
        scores = np.concatenate([np.zeros(0, np.float32), *(part[0] for part in parts)])
        order = np.argsort(-scores, kind="stable")
        empty = np.zeros((10, 0), bool)
        found, counted = (np.concatenate([empty, *(part[k] for part in parts)], 1)[:, order] for k in (1, 2))
        rows = np.repeat(np.arange(len(images)), [len(part[0]) for part in parts])
        true = np.array([((each.true_labels == label) & ~each.crowd).sum() for each in images], np.float64)
        out.append(Ranked(rows[order], found, counted, true))
    return out


def _one(image: Image, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores (n,), found (10, n), counted (10, n)) of one class in one image, the best score first."""
    rows = np.flatnonzero(image.labels == label)
    rows = rows[np.argsort(-image.scores[rows], kind="stable")][:MAX_DETECTIONS]
    found, counted = np.zeros((10, len(rows)), bool), np.ones((10, len(rows)), bool)
    # COCO ignores a box turned over once: its area is in no range.
    sides = image.boxes[rows, 2:].astype(np.float64) - image.boxes[rows, :2]
    upright = sides.prod(1) >= 0
    mine = image.true_labels == label
    single, crowds = image.true_boxes[mine & ~image.crowd], image.true_boxes[mine & image.crowd]
    free, each = np.ones((10, len(single)), bool), np.arange(10)
    for at, part in overlaps(image.boxes[rows], single):
        for row in np.flatnonzero((part >= THRESHOLDS[0]).any(1)):
            overlap = np.where(free, part[row], -1)
            best = len(single) - 1 - overlap[:, ::-1].argmax(1)
            hit = overlap[each, best] >= THRESHOLDS
            found[:, at.start + row] = hit
            free[each[hit], best[hit]] = False
    for at, part in overlaps(image.boxes[rows], crowds, of_first=True):
        counted[:, at] = part.max(1) < THRESHOLDS[:, None]
    return image.scores[rows], found, found | counted & upright


def average_precision(rows: Ranked, weights: np.ndarray) -> np.ndarray:
    """Average precision of a class, an image counting as often as its weight says.

    Args:
        rows: Of the class.
        weights: (D, N) float64 whole numbers.

    Returns:
        (10 thresholds, D) float64; NaN where no true box is left.
    """
    step = max(1, _CELLS // max(1, len(rows.image)))
    parts = [_average_precision(rows, weights[start : start + step]) for start in range(0, len(weights), step)]
    return np.concatenate(parts, 1)


def _average_precision(rows: Ranked, weights: np.ndarray) -> np.ndarray:
    each, true = weights[:, rows.image], weights @ rows.true
    out = np.full((len(THRESHOLDS), len(weights)), np.nan)
    some = true > 0
    number, before = np.zeros_like(each), None
    for row, (found, counted) in enumerate(zip(rows.found, rows.counted, strict=True)):
        if before is None or not np.array_equal(counted, before):
            number, before = np.cumsum(each * counted, 1), counted
        right = each[:, found].cumsum(1)
        precision = right / np.maximum(number[:, found], 1)
        highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        recall = right / np.maximum(true, 1)[:, None]
        # A row answers for the recalls that it is the first to reach.
        reached = np.searchsorted(RECALLS, recall, side="right")
        share = np.diff(reached, axis=1, prepend=0) / len(RECALLS)
        out[row, some] = (highest * share).sum(1)[some]
    return out
