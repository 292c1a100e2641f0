"""COCO's average precision, also from ranked detections with a weight for each image.

Both give the numbers of pycocotools. Detections are matched once, so that drawing the images again costs a sum. A box's
size is its area. No torch collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.coco_match import AREAS, THRESHOLDS, CocoMatches, match_all
from pipeline.metrics.detection_rows import ImageDetections

RECALLS = np.linspace(0, 1, 101)
"""COCO's recalls."""
_MAX_WEIGHTS = 2**17
"""Weights held at a time: what stays in a processor's cache is summed up to 2.5 times as fast."""


def coco_precision(images: Sequence[ImageDetections], num_classes: int) -> np.ndarray:
    """(10 thresholds, 101 recalls, K, 4 areas) float64, as pycocotools has it; -1 where there is no true box."""
    matches = match_all(images, num_classes)
    result = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.0)
    for label, rows in enumerate(_class_slices(matches, num_classes)):
        true_positive = matches.true_positive[rows]
        counted = np.cumsum(matches.counted[rows], 0)
        for area, num_true in enumerate(matches.num_true_by_area[:, label]):
            if not num_true:
                continue
            # How many of the true boxes must be matched to reach each recall; the first answers for recall 0.
            needed = np.maximum(np.searchsorted(np.arange(1, num_true + 1) / num_true, RECALLS) + 1, 1)
            for threshold in range(len(THRESHOLDS)):
                # Precision at each true positive: how many there are so far, by how many detections count so far.
                hits = np.flatnonzero(true_positive[:, area, threshold])
                precision = np.arange(1, len(hits) + 1) / (counted[hits, area, threshold] + np.spacing(1))
                # COCO interpolates: the highest precision at this recall or a higher one.
                highest = np.maximum.accumulate(precision[::-1])[::-1]
                reached = needed <= len(hits)
                # Recalls that are never reached have precision 0.
                result[threshold, :, label, area] = 0
                result[threshold, reached, label, area] = highest[needed[reached] - 1]
    return result


def _class_slices(matches: CocoMatches, num_classes: int) -> list[slice]:
    """The rows of each class, which lie together."""
    ends = np.searchsorted(matches.label, np.arange(num_classes), "right")
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass
class RankedDetections:
    """The n detections of one class over N images, the best score first."""

    image: np.ndarray
    """(n,) int64 row of the image."""
    true_positive: np.ndarray
    """(10, n) bool: matched with a true box, by threshold."""
    counted: np.ndarray
    """(10, n) bool: not absorbed by a crowd, by threshold."""
    num_true: np.ndarray
    """(N,) float64 true boxes of each image, without crowds."""


def rank_detections(images: Sequence[ImageDetections], num_classes: int) -> list[RankedDetections]:
    """The detections of each class, matched at all ten thresholds."""
    matches = match_all(images, num_classes)
    return [
        RankedDetections(
            matches.image[rows],
            np.ascontiguousarray(matches.true_positive[rows, 0].T),
            np.ascontiguousarray(matches.counted[rows, 0].T),
            matches.num_true[:, label].astype(np.float64),
        )
        for label, rows in enumerate(_class_slices(matches, num_classes))
    ]


def average_precision(detections: RankedDetections, weights: np.ndarray) -> np.ndarray:
    """Average precision of a class, an image counting as often as its weight says.

    Args:
        detections: Of the class.
        weights: (D, N) float64 whole numbers.

    Returns:
        (10 thresholds, D) float64; NaN where no true box is left.
    """
    step = max(1, _MAX_WEIGHTS // max(1, len(detections.image)))
    chunks = [_weighted_precision(detections, weights[start : start + step]) for start in range(0, len(weights), step)]
    return np.concatenate(chunks, 1)


def _weighted_precision(detections: RankedDetections, weights: np.ndarray) -> np.ndarray:
    """``average_precision`` of a few rows of weights."""
    box_weight = weights[:, detections.image]
    num_true = weights @ detections.num_true
    result = np.full((len(THRESHOLDS), len(weights)), np.nan)
    has_true = num_true > 0
    num_counted, counted_before = np.zeros_like(box_weight), None
    for threshold, (true_positive, counted) in enumerate(
        zip(detections.true_positive, detections.counted, strict=True)
    ):
        # Mostly the same detections count at every threshold, and their sums need not be made again.
        if counted_before is None or not np.array_equal(counted, counted_before):
            num_counted, counted_before = np.cumsum(box_weight * counted, 1), counted
        hits = box_weight[:, true_positive].cumsum(1)
        precision = hits / np.maximum(num_counted[:, true_positive], 1)
        highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        recall = hits / np.maximum(num_true, 1)[:, None]
        # A true positive answers for the recalls that it is the first to reach.
        reached = np.searchsorted(RECALLS, recall, side="right")
        share = np.diff(reached, axis=1, prepend=0) / len(RECALLS)
        result[threshold, has_true] = (highest * share).sum(1)[has_true]
    return result
