"""Which box found is which true one: COCO's greedy rule, for one image at a time, in numpy.

Boxes xyxy, continuous edges, pixels. Works on any number of boxes: the overlaps are held for some rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_CELLS = 2**20
"""Overlaps held at a time."""
_ALMOST_ONE = 1 - 1e-10
"""The highest overlap that is ever asked for, as COCO has it."""


@dataclass(frozen=True)
class Match:
    """What became of the B boxes of one image."""

    index: np.ndarray
    """(B,) int64: row of the true box that it is; -1: none."""
    iou: np.ndarray
    """(B,) float64: overlap with that one; 0 without."""
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
    """COCO's rule: the best score first, each takes the free true box of its own class with the highest IoU.

    A box that finds none is ignored where ``iou`` of its own area lies in a crowd box of its class, which is not
    used up. Of equal scores the earlier row goes first, of equal overlaps the later true row is taken, as
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
    found, truth = as_boxes(boxes), as_boxes(true_boxes)
    names, true_names = np.asarray(labels).reshape(-1), np.asarray(true_labels).reshape(-1)
    many = np.zeros(len(truth), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
    out = Match(np.full(len(found), -1), np.zeros(len(found)), np.zeros(len(found), bool))
    order = np.argsort(-np.asarray(scores, np.float64).reshape(-1), kind="stable")
    least = min(iou, _ALMOST_ONE)
    for label in np.intersect1d(names, true_names):
        rows, columns = order[names[order] == label], np.flatnonzero(true_names == label)
        single, crowds = columns[~many[columns]], columns[many[columns]]
        _take(out, rows, single, overlaps(found[rows], truth[single]), least)
        left = rows[out.index[rows] < 0]
        for at, shares in overlaps(found[left], truth[crowds], of_first=True):
            out.ignored[left[at]] = (shares >= least).any(1)
    return out


def _take(
    out: Match, rows: np.ndarray, columns: np.ndarray, parts: Iterator[tuple[slice, np.ndarray]], least: float
) -> None:
    """Give each of ``rows``, in order, the best of ``columns`` that is free."""
    free = np.ones(len(columns), bool)
    for at, each in parts:
        asked = np.flatnonzero((each >= least).any(1)).tolist()
        for row, overlap in zip(rows[at][asked], each[asked], strict=True):
            overlap = np.where(free, overlap, -1)
            best = len(columns) - 1 - int(overlap[::-1].argmax())
            if overlap[best] >= least:
                out.index[row], out.iou[row], free[best] = columns[best], overlap[best], False


def overlaps(first: np.ndarray, second: np.ndarray, of_first: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
    """IoU of all pairs, some rows at a time: (rows, (R, T) float64).

    Rounded as pycocotools does, from corner and size, so that a threshold is passed by the same boxes.

    Args:
        first: (B, 4).
        second: (T, 4).
        of_first: Divide by the area of the first alone: COCO's overlap with a crowd.

    Yields:
        Nothing where either side has no box.
    """
    one, other = first.astype(np.float64), second.astype(np.float64)
    size, other_size = one[:, 2:] - one[:, :2], other[:, 2:] - other[:, :2]
    end, other_end = one[:, :2] + size, other[:, :2] + other_size
    area, other_area = size.prod(1), other_size.prod(1)
    step = max(1, _CELLS // max(1, len(other)))
    for start in range(0, len(one) if len(other) else 0, step):
        at = slice(start, start + step)
        width, height = (
            np.minimum(end[at, None, k], other_end[:, k]) - np.maximum(one[at, None, k], other[:, k]) for k in (0, 1)
        )
        shared = np.where((width > 0) & (height > 0), width * height, 0)
        whole = area[at, None] if of_first else area[at, None] + other_area - shared
        yield at, np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def as_boxes(boxes: ArrayLike) -> np.ndarray:
    """(B, 4) float32."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)
