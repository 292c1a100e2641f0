"""COCO's average precision, also from ranked rows with a weight for each image.

Both give the numbers of pycocotools; boxes are matched once, so that drawing images again costs a sum. An area is that
of the box. Never by torch collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.coco_match import AREAS, THRESHOLDS, Matched, match_all
from pipeline.metrics.detection_rows import Image

RECALLS = np.linspace(0, 1, 101)
"""COCO's recalls."""
_CELLS = 2**17
"""Weights held at a time, in numbers: what stays in a processor's cache is summed up to 2.5 times as fast."""


def coco_precision(images: Sequence[Image], num_classes: int) -> np.ndarray:
    """(10 thresholds, 101 recalls, K, 4 areas) float64, as pycocotools has it; -1 where there is no true box."""
    matched = match_all(images, num_classes)
    out = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.0)
    for label, part in enumerate(_by_class(matched, num_classes)):
        found, counted = matched.found[part], np.cumsum(matched.counted[part], 0)
        for area, true in enumerate(matched.true_by_area[:, label]):
            if not true:
                continue
            # How many of the true boxes must be found to reach each recall; the first answers for recall 0.
            needed = np.maximum(np.searchsorted(np.arange(1, true + 1) / true, RECALLS) + 1, 1)
            for row in range(len(THRESHOLDS)):
                at = np.flatnonzero(found[:, area, row])
                precision = np.arange(1, len(at) + 1) / (counted[at, area, row] + np.spacing(1))
                highest = np.maximum.accumulate(precision[::-1])[::-1]
                reached = needed <= len(at)
                out[row, :, label, area] = 0
                out[row, reached, label, area] = highest[needed[reached] - 1]
    return out


def _by_class(matched: Matched, num_classes: int) -> list[slice]:
    ends = np.searchsorted(matched.label, np.arange(num_classes), "right")
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


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
    """The boxes of each class, matched at all ten thresholds."""
    matched = match_all(images, num_classes)
    return [
        Ranked(
            matched.image[part],
            np.ascontiguousarray(matched.found[part, 0].T),
            np.ascontiguousarray(matched.counted[part, 0].T),
            matched.true[:, label].astype(np.float64),
        )
        for label, part in enumerate(_by_class(matched, num_classes))
    ]


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
