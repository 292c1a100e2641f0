"""COCO's greedy matching of all images, classes, sizes and overlaps at once, in numpy.

The rule is pycocotools' ``evaluateImg``: within an image and a class the best score goes first, and takes the free true
box with the highest overlap that reaches the threshold; one that counts before one that does not. Boxes that cannot
meet, for want of overlap, class or image, never look at each other, so a round gives the next box of every image and
class its partner, at all sizes and thresholds together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.detection_rows import Image

MAX_DETECTIONS = 100
"""Boxes of one class in an image that count, best scores first: COCO's number."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's least overlaps."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's sizes of true boxes, square pixels."""
_PAIRS = 2**18
"""Pairs of boxes that are looked at together."""
_WAYS = len(AREAS) * len(THRESHOLDS)


@dataclass(frozen=True)
class Matched:
    """The n boxes that count, by class, within a class the best score first; T = 10 overlaps, A = 4 sizes."""

    label: np.ndarray
    """(n,) int64."""
    image: np.ndarray
    """(n,) int64 row of the image."""
    found: np.ndarray
    """(n, A, T) bool: is a true box of that size."""
    counted: np.ndarray
    """(n, A, T) bool: neither absorbed by a crowd nor of another size."""
    true: np.ndarray
    """(N, K) int64 true boxes of any size without crowds."""
    true_by_area: np.ndarray
    """(A, K) int64."""


@dataclass(frozen=True)
class _Truth:
    """The t true boxes, by class and image."""

    boxes: np.ndarray
    key: np.ndarray
    """(t,) int64: class times N plus image, ascending."""
    crowd: np.ndarray
    ignored: np.ndarray
    """(t, A) bool: a crowd, or of another size."""


def match_all(images: Sequence[Image], num_classes: int) -> Matched:
    """Match every box of every image.

    Args:
        images: N.
        num_classes: K.
    """
    truth = _truth(images)
    count = len(images)
    image = np.repeat(np.arange(count), [len(each.labels) for each in images])
    label = _joined([each.labels for each in images], np.int64)
    score, boxes = _joined([each.scores for each in images]), _joined([each.boxes for each in images]).reshape(-1, 4)
    order = np.lexsort((-score, image, label))
    order = order[_place(label[order] * count + image[order]) < MAX_DETECTIONS]
    label, image, score, boxes = label[order], image[order], score[order], boxes[order]
    found = np.zeros((len(order), _WAYS), bool)
    counted = np.repeat(_in_range(boxes), len(THRESHOLDS), axis=1)
    free = np.ones((len(truth.key), _WAYS), bool)
    for pairs in _candidates(boxes, label * count + image, truth):
        for one_round in _rounds(*pairs, label * count + image):
            _take(found, counted, free, truth, *one_round)
    best = np.lexsort((-score, label))
    shape = -1, len(AREAS), len(THRESHOLDS)
    cell = truth.key % count * num_classes + truth.key // count if count else truth.key
    cells = np.bincount(cell[~truth.crowd], minlength=count * num_classes).reshape(count, num_classes)
    areas = np.stack(
        [np.bincount(truth.key[~ignored] // max(1, count), minlength=num_classes) for ignored in truth.ignored.T]
    )
    return Matched(
        label[best], image[best], found[best].reshape(shape), counted[best].reshape(shape), cells, areas
    )  # fmt: skip


def _truth(images: Sequence[Image]) -> _Truth:
    image = np.repeat(np.arange(len(images)), [len(each.true_labels) for each in images])
    label = _joined([each.true_labels for each in images], np.int64)
    key = label * len(images) + image
    order = np.argsort(key, kind="stable")
    boxes = _joined([each.true_boxes for each in images]).reshape(-1, 4)[order]
    crowd = _joined([each.crowd for each in images], bool)[order]
    return _Truth(boxes, key[order], crowd, crowd[:, None] | ~_in_range(boxes))


def _in_range(boxes: np.ndarray) -> np.ndarray:
    """(n, A) bool; a box turned over once is in no range."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]
    low, high = np.array(list(AREAS.values())).T
    return (area >= low) & (area <= high)


def _place(key: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each run of equal keys."""
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    return np.arange(len(key)) - np.repeat(starts, np.diff(starts, append=len(key)))


def _candidates(
    boxes: np.ndarray, key: np.ndarray, truth: _Truth
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(box, true box, overlap) of pairs that may match, an image and class never cut in two."""
    first, last = np.searchsorted(truth.key, key, "left"), np.searchsorted(truth.key, key, "right")
    total = np.cumsum(last - first)
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    ends = np.append(starts, len(key))
    at = 0
    while at < len(key):
        # Up to the last image and class that still fits; at least one.
        fits = np.searchsorted(total, (total[at - 1] if at else 0) + _PAIRS, "right")
        end = int(max(ends[np.searchsorted(ends, fits, "right") - 1], ends[np.searchsorted(ends, at, "right")]))
        count = (last - first)[at:end]
        box = np.repeat(np.arange(at, end), count)
        true = np.arange(len(box)) - np.repeat(np.cumsum(count) - count - first[at:end], count)
        overlap = _overlap(boxes[box], truth.boxes[true], truth.crowd[true])
        near = overlap >= THRESHOLDS[0]
        yield box[near], true[near], overlap[near]
        at = end


def _overlap(one: np.ndarray, other: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of pairs, with a crowd the share of the first alone; rounded as pycocotools does, from corner and size."""
    size, other_size = one[:, 2:] - one[:, :2], other[:, 2:] - other[:, :2]
    end, other_end = one[:, :2] + size, other[:, :2] + other_size
    sides = np.minimum(end, other_end) - np.maximum(one[:, :2], other[:, :2])
    shared = np.where((sides > 0).all(1), sides.prod(1), 0)
    area = size.prod(1)
    whole = np.where(crowd, area, area + other_size.prod(1) - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def _rounds(
    box: np.ndarray, true: np.ndarray, overlap: np.ndarray, key: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of the first box of each image and class, of the second, and so on; the better partner later."""
    order = np.lexsort((true, overlap, box))
    box, true, overlap = box[order], true[order], overlap[order]
    some = np.unique(box)
    turn = _place(key[some])[np.searchsorted(some, box)]
    order = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn)) if len(turn) else []
    for part in np.split(order, ends)[:-1]:
        yield box[part], true[part], overlap[part]


def _take(
    found: np.ndarray,
    counted: np.ndarray,
    free: np.ndarray,
    truth: _Truth,
    box: np.ndarray,
    true: np.ndarray,
    overlap: np.ndarray,
) -> None:
    """Give each box of a round its partner, in all ways."""
    count, each = len(box), np.arange(1, len(box) + 1)[:, None]
    least = np.tile(THRESHOLDS, len(AREAS))
    valid = free[true] & (overlap[:, None] >= least)
    rank = each + count * np.repeat(~truth.ignored[true], len(THRESHOLDS), axis=1)
    starts = np.flatnonzero(np.diff(box, prepend=-1))
    best = np.maximum.reduceat(np.where(valid, rank, 0), starts, axis=0)
    some, good, boxes = best > 0, best > count, box[starts]
    partner = true[(best - 1) % count]
    found[boxes] = good
    counted[boxes] = np.where(some, good, counted[boxes])
    row, way = np.nonzero(some & ~truth.crowd[partner])
    free[partner[row, way], way] = False


def _joined(arrays: Sequence[np.ndarray], kind: type = np.float64) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(array, kind).reshape(-1) for array in arrays)])
