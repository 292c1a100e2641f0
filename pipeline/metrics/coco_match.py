"""COCO's greedy matching of all images, classes, sizes and overlaps at once, in numpy.

The rule is pycocotools' ``evaluateImg``: within an image and a class the detection with the best score goes first, and
takes the free true box with the highest overlap that reaches the threshold; a true box that counts is preferred to one
that does not. Boxes of different images or classes never compete. So the work is done in rounds: round r gives the r-th
best detection of every image and class its true box, for all sizes and thresholds together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.detection_rows import ImageDetections

MAX_DETECTIONS = 100
"""Detections of one class in an image that count, best scores first: COCO's number."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's least overlaps."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's ranges of box size, square pixels."""
_MAX_PAIRS = 2**18
"""Pairs of boxes whose overlaps are held together."""
_NUM_SETTINGS = len(AREAS) * len(THRESHOLDS)
"""Combinations of a size and a threshold; each is a matching of its own."""


@dataclass(frozen=True)
class CocoMatches:
    """The n detections that count, by class, within a class the best score first; T = 10 overlaps, A = 4 sizes."""

    label: np.ndarray
    """(n,) int64."""
    image: np.ndarray
    """(n,) int64 row of the image."""
    true_positive: np.ndarray
    """(n, A, T) bool: matched with a true box of that size, at that overlap."""
    counted: np.ndarray
    """(n, A, T) bool: neither absorbed by a crowd nor of another size."""
    num_true: np.ndarray
    """(N, K) int64 true boxes of each image and class, of any size, without crowds."""
    num_true_by_area: np.ndarray
    """(A, K) int64 true boxes of each size and class, without crowds."""


@dataclass(frozen=True)
class _GroundTruth:
    """The t true boxes of all images, by class and image."""

    boxes: np.ndarray
    """(t, 4) float64 xyxy."""
    key: np.ndarray
    """(t,) int64: class times N plus image, ascending."""
    crowd: np.ndarray
    """(t,) bool."""
    ignored: np.ndarray
    """(t, A) bool: a crowd, or of another size."""


def match_all(images: Sequence[ImageDetections], num_classes: int) -> CocoMatches:
    """Match the detections of all images.

    Args:
        images: N.
        num_classes: K.
    """
    truth = _ground_truth(images)
    num_images = len(images)
    # All detections as flat columns, by class, then image, then falling score; the weakest of too many are cut off.
    image = np.repeat(np.arange(num_images), [len(row.labels) for row in images])
    label = _concatenate([row.labels for row in images], np.int64)
    score = _concatenate([row.scores for row in images])
    boxes = _concatenate([row.boxes for row in images]).reshape(-1, 4)
    order = np.lexsort((-score, image, label))
    order = order[_rank_in_run(label[order] * num_images + image[order]) < MAX_DETECTIONS]
    label, image, score, boxes = label[order], image[order], score[order], boxes[order]
    # Only detections and true boxes of one key, the class and the image, can meet.
    key = label * num_images + image
    true_positive = np.zeros((len(order), _NUM_SETTINGS), bool)
    # A detection of another size does not count, unless it is matched with a true box that does.
    counted = np.repeat(_in_range(boxes), len(THRESHOLDS), axis=1)
    free = np.ones((len(truth.key), _NUM_SETTINGS), bool)
    for candidates in _candidate_pairs(boxes, key, truth):
        for round_pairs in _rounds(*candidates, key):
            _assign_round(true_positive, counted, free, truth, *round_pairs)
    # The figures rank all detections of a class together, whatever their image.
    by_score = np.lexsort((-score, label))
    shape = -1, len(AREAS), len(THRESHOLDS)
    num_true, num_true_by_area = _count_true(truth, num_images, num_classes)
    return CocoMatches(
        label=label[by_score],
        image=image[by_score],
        true_positive=true_positive[by_score].reshape(shape),
        counted=counted[by_score].reshape(shape),
        num_true=num_true,
        num_true_by_area=num_true_by_area,
    )


def _ground_truth(images: Sequence[ImageDetections]) -> _GroundTruth:
    """All true boxes as flat columns, sorted by class and image."""
    image = np.repeat(np.arange(len(images)), [len(row.true_labels) for row in images])
    label = _concatenate([row.true_labels for row in images], np.int64)
    key = label * len(images) + image
    order = np.argsort(key, kind="stable")
    boxes = _concatenate([row.true_boxes for row in images]).reshape(-1, 4)[order]
    crowd = _concatenate([row.crowd for row in images], bool)[order]
    return _GroundTruth(boxes, key[order], crowd, crowd[:, None] | ~_in_range(boxes))


def _count_true(truth: _GroundTruth, num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """True boxes without crowds: (N, K) by image and class, and (A, K) by size and class."""
    image_and_class = truth.key
    if num_images:
        image_and_class = truth.key % num_images * num_classes + truth.key // num_images
    counts = np.bincount(image_and_class[~truth.crowd], minlength=num_images * num_classes)
    by_area = [
        np.bincount(truth.key[~ignored] // max(1, num_images), minlength=num_classes) for ignored in truth.ignored.T
    ]
    return counts.reshape(num_images, num_classes), np.stack(by_area)


def _in_range(boxes: np.ndarray) -> np.ndarray:
    """(n, A) bool: whether the area lies in each of ``AREAS``; a box with x2 < x1 or y2 < y1 alone is in none."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]
    low, high = np.array(list(AREAS.values())).T
    return (area >= low) & (area <= high)


def _rank_in_run(key: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each run of equal keys."""
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    return np.arange(len(key)) - np.repeat(starts, np.diff(starts, append=len(key)))


def _candidate_pairs(
    boxes: np.ndarray, key: np.ndarray, truth: _GroundTruth
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(detection, true box, overlap) of pairs that may match, in chunks; an image and class is never cut in two."""
    # Both sides are sorted by key, so the true boxes of a detection are one slice: first to last.
    first, last = np.searchsorted(truth.key, key, "left"), np.searchsorted(truth.key, key, "right")
    pairs_up_to = np.cumsum(last - first)
    run_starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    run_ends = np.append(run_starts, len(key))
    start = 0
    while start < len(key):
        # Up to the last image and class that still fits; at least one.
        fits = np.searchsorted(pairs_up_to, (pairs_up_to[start - 1] if start else 0) + _MAX_PAIRS, "right")
        last_fitting = run_ends[np.searchsorted(run_ends, fits, "right") - 1]
        end = int(max(last_fitting, run_ends[np.searchsorted(run_ends, start, "right")]))
        # Every detection of the chunk beside each true box of its slice.
        count = (last - first)[start:end]
        box = np.repeat(np.arange(start, end), count)
        true = np.arange(len(box)) - np.repeat(np.cumsum(count) - count - first[start:end], count)
        overlap = _pair_iou(boxes[box], truth.boxes[true], truth.crowd[true])
        # What is below the lowest threshold matches in no setting.
        near = overlap >= THRESHOLDS[0]
        yield box[near], true[near], overlap[near]
        start = end


def _pair_iou(boxes: np.ndarray, true_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(P,) IoU of P pairs of boxes; with a crowd the share of the detection's own area.

    Rounded as pycocotools does, from corner and size, so that the same pairs pass a threshold.
    """
    size, true_size = boxes[:, 2:] - boxes[:, :2], true_boxes[:, 2:] - true_boxes[:, :2]
    end, true_end = boxes[:, :2] + size, true_boxes[:, :2] + true_size
    sides = np.minimum(end, true_end) - np.maximum(boxes[:, :2], true_boxes[:, :2])
    shared = np.where((sides > 0).all(1), sides.prod(1), 0)
    area = size.prod(1)
    whole = np.where(crowd, area, area + true_size.prod(1) - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def _rounds(
    box: np.ndarray, true: np.ndarray, overlap: np.ndarray, key: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of the best detection of each image and class, then of the second best, and so on.

    Within a detection the pair that is preferred comes last: the higher overlap, and of equals the later true box.
    """
    order = np.lexsort((true, overlap, box))
    box, true, overlap = box[order], true[order], overlap[order]
    # Detections are numbered by falling score within a key, so their rank among those with a pair is their turn.
    with_pair = np.unique(box)
    turn = _rank_in_run(key[with_pair])[np.searchsorted(with_pair, box)]
    order = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn)) if len(turn) else []
    for rows in np.split(order, ends)[:-1]:
        yield box[rows], true[rows], overlap[rows]


def _assign_round(
    true_positive: np.ndarray,
    counted: np.ndarray,
    free: np.ndarray,
    truth: _GroundTruth,
    box: np.ndarray,
    true: np.ndarray,
    overlap: np.ndarray,
) -> None:
    """Give each detection of a round its true box, in all settings; changes the first three arguments.

    Args:
        true_positive: (n, A T) of all detections.
        counted: (n, A T) of all detections.
        free: (t, A T) whether a true box is not taken yet.
        truth: The true boxes.
        box: (P,) detection of each pair, ascending; as ``_rounds`` orders the pairs.
        true: (P,) true box of each pair.
        overlap: (P,).
    """
    num_pairs = len(box)
    place = np.arange(1, num_pairs + 1)[:, None]
    min_overlap = np.tile(THRESHOLDS, len(AREAS))
    valid = free[true] & (overlap[:, None] >= min_overlap)
    # One number orders the pairs of a detection: their place, plus a head start where the true box counts.
    rank = place + num_pairs * np.repeat(~truth.ignored[true], len(THRESHOLDS), axis=1)
    starts = np.flatnonzero(np.diff(box, prepend=-1))
    best = np.maximum.reduceat(np.where(valid, rank, 0), starts, axis=0)
    # 0: no valid pair; above num_pairs: one with a true box that counts. Without the head start, the pair's place.
    has_partner = best > 0
    partner_counts = best > num_pairs
    partner = true[(best - 1) % num_pairs]
    boxes = box[starts]
    true_positive[boxes] = partner_counts
    counted[boxes] = np.where(has_partner, partner_counts, counted[boxes])
    # A crowd takes any number of detections; every other true box is used up, whether it counts or not.
    row, setting = np.nonzero(has_partner & ~truth.crowd[partner])
    free[partner[row, setting], setting] = False


def _concatenate(arrays: Sequence[np.ndarray], dtype: type = np.float64) -> np.ndarray:
    """All values of the arrays end to end, (n,) ``dtype``; of no array, none."""
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(array, dtype).reshape(-1) for array in arrays)])
