"""Which detection is which true box: COCO's greedy rule, for one image at a time, in numpy.

Boxes xyxy, continuous edges, pixels. Works on any number of boxes: the overlaps are held for some rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_MAX_PAIRS = 2**20
"""Overlaps held at a time."""
_ALMOST_ONE = 1 - 1e-10
"""The highest overlap that a match can need, as COCO has it: equal boxes may fall short of 1 by rounding."""


@dataclass(frozen=True)
class Match:
    """What became of the B detections of one image."""

    index: np.ndarray
    """(B,) int64: row of the true box; -1: none, a false positive unless ignored."""
    iou: np.ndarray
    """(B,) float64: overlap with that true box; 0 without."""
    ignored: np.ndarray
    """(B,) bool: absorbed by a crowd, so neither right nor wrong."""


def match(
    boxes: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike,
    true_boxes: ArrayLike,
    true_labels: ArrayLike,
    crowd: ArrayLike | None = None,
    iou: float = 0.5,
) -> Match:
    """COCO's rule: by falling score, each detection takes the free true box of its own class with the highest IoU.

    A detection without a match is ignored where a share ``iou`` of its own area lies in a crowd box of its class, which
    is not used up. Of equal scores the earlier row goes first, of equal overlaps the later true row is taken, as
    in pycocotools; no number of boxes is cut off here.

    Args:
        boxes: (B, 4).
        scores: (B,).
        labels: (B,).
        true_boxes: (T, 4).
        true_labels: (T,).
        crowd: (T,) bool; None: no crowds.
        iou: Least overlap, above 0.
    """
    detected, truth = as_boxes(boxes), as_boxes(true_boxes)
    predicted_labels = np.asarray(labels).reshape(-1)
    target_labels = np.asarray(true_labels).reshape(-1)
    is_crowd = np.zeros(len(truth), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
    matches = Match(np.full(len(detected), -1), np.zeros(len(detected)), np.zeros(len(detected), bool))
    order = np.argsort(-np.asarray(scores, np.float64).reshape(-1), kind="stable")
    min_iou = min(iou, _ALMOST_ONE)
    # Classes do not compete, so each is matched alone.
    for label in np.intersect1d(predicted_labels, target_labels):
        rows = order[predicted_labels[order] == label]
        columns = np.flatnonzero(target_labels == label)
        single, crowds = columns[~is_crowd[columns]], columns[is_crowd[columns]]
        _assign_greedily(matches, rows, single, pairwise_iou(detected[rows], truth[single]), min_iou)
        # Crowds come last: they take only what no single object has.
        unmatched = rows[matches.index[rows] < 0]
        for chunk, shares in pairwise_iou(detected[unmatched], truth[crowds], of_first=True):
            matches.ignored[unmatched[chunk]] = (shares >= min_iou).any(1)
    return matches


def _assign_greedily(
    matches: Match,
    rows: np.ndarray,
    columns: np.ndarray,
    overlap_chunks: Iterator[tuple[slice, np.ndarray]],
    min_iou: float,
) -> None:
    """Give each detection of ``rows``, in order, the best true box of ``columns`` that is free; fills ``matches``."""
    free = np.ones(len(columns), bool)
    for chunk, overlaps in overlap_chunks:
        # Most detections reach no true box at all, and need no step of the loop.
        reaching = np.flatnonzero((overlaps >= min_iou).any(1)).tolist()
        for row, overlap in zip(rows[chunk][reaching], overlaps[reaching], strict=True):
            free_overlap = np.where(free, overlap, -1)
            # argmax gives the first of equals; reversed, the last.
            best = len(columns) - 1 - int(free_overlap[::-1].argmax())
            if free_overlap[best] >= min_iou:
                matches.index[row] = columns[best]
                matches.iou[row] = free_overlap[best]
                free[best] = False


def pairwise_iou(first: np.ndarray, second: np.ndarray, of_first: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
    """IoU of all pairs, some rows at a time: (rows, (R, T) float64).

    Rounded as pycocotools does, from corner and size, so that the same pairs pass a threshold.

    Args:
        first: (B, 4).
        second: (T, 4).
        of_first: Divide by the area of the first alone: COCO's overlap with a crowd.

    Yields:
        Nothing where either side has no box.
    """
    boxes, true_boxes = first.astype(np.float64), second.astype(np.float64)
    size, true_size = boxes[:, 2:] - boxes[:, :2], true_boxes[:, 2:] - true_boxes[:, :2]
    end, true_end = boxes[:, :2] + size, true_boxes[:, :2] + true_size
    area, true_area = size.prod(1), true_size.prod(1)
    step = max(1, _MAX_PAIRS // max(1, len(true_boxes)))
    for start in range(0, len(boxes) if len(true_boxes) else 0, step):
        rows = slice(start, start + step)
        width, height = (
            np.minimum(end[rows, None, axis], true_end[:, axis])
            - np.maximum(boxes[rows, None, axis], true_boxes[:, axis])
            for axis in (0, 1)
        )
        shared = np.where((width > 0) & (height > 0), width * height, 0)
        whole = area[rows, None] if of_first else area[rows, None] + true_area - shared
        yield rows, np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def as_boxes(boxes: ArrayLike) -> np.ndarray:
    """(B, 4) float32."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)
