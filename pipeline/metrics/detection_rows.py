"""What is gathered of the images of detection, and which of their boxes are right, as flat columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.metrics.matching import Match, match

HIT_IOU = 0.5
"""Overlap from which a box is right."""
LOW_IOU = 0.1
"""The overlap that LaECE and LRP ask for, as Oksuz et al. 2023 (2307.00934) do: both judge the place themselves."""
ANY_IOU = 1e-9
"""Any overlap at all."""


class Image(NamedTuple):
    """One image: B boxes found, S of them said, T true ones."""

    id: str
    boxes: np.ndarray
    """(B, 4) float32 xyxy, pixels."""
    scores: np.ndarray
    """(B,) float32."""
    labels: np.ndarray
    """(B,) int32."""
    true_boxes: np.ndarray
    """(T, 4) float32."""
    true_labels: np.ndarray
    """(T,) int32."""
    crowd: np.ndarray
    """(T,) bool."""
    std: np.ndarray
    """(S, 4) float32 pixels, of said boxes; NaN: not known."""
    probabilities: np.ndarray
    """(S, K + 1) float32, of said boxes."""
    known: np.ndarray
    """(2,) bool: whether ``std`` and ``probabilities`` were given."""
    doubt: float
    size: np.ndarray
    """(2,) int32 height and width in pixels; 0: not known."""


@dataclass
class Said:
    """The boxes from the operating score on, of all images, n rows; crowds' boxes are left out."""

    image: np.ndarray
    """(n,) int64 row of the image."""
    label: np.ndarray
    """(n,) int64."""
    score: np.ndarray
    """(n,) float64."""
    overlap: np.ndarray
    """(3, n) float64: IoU with the true box that it is at ``HIT_IOU``, ``LOW_IOU``, ``ANY_IOU``; 0: none."""
    counted: np.ndarray
    """(3, n) bool: not absorbed by a crowd at that overlap."""


@dataclass
class Judged:
    """All boxes at ``HIT_IOU``, the said ones, and the true ones by image and class."""

    label: np.ndarray
    """(n,) int64, of boxes that no crowd absorbed."""
    score: np.ndarray
    """(n,) float64."""
    overlap: np.ndarray
    """(n,) float64; 0: wrong."""
    said: Said
    true: np.ndarray
    """(N, K) int64 true boxes without crowds."""
    images: np.ndarray
    """(N, 3) int64: true boxes, said ones, right ones among these, all without crowds."""
    confusion: np.ndarray
    """(K + 1, K + 1) int64 of said boxes, matched whatever their class; rows truth, the last: nothing."""
    error: np.ndarray
    """(m, 4) float32 pixels: edges of the said right boxes minus the true ones'."""
    std: np.ndarray
    """(m, 4) float32: theirs."""


def judge(images: Sequence[Image], num_classes: int, operating: float) -> Judged:
    """Match every image.

    Args:
        images: N.
        num_classes: K.
        operating: Score from which a box is said.
    """
    every: list[tuple[np.ndarray, ...]] = [(_NONE_INT, _NONE, _NONE)]
    said: list[tuple[np.ndarray, ...]] = [(_NONE_INT, _NONE_INT, _NONE, np.zeros((3, 0)), np.zeros((3, 0), bool))]
    right = [(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))]
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    counts, true = np.zeros((len(images), 3), np.int64), np.zeros((len(images), num_classes), np.int64)
    for row, image in enumerate(images):
        labels, scores, single = image.labels.astype(np.int64), image.scores.astype(np.float64), ~image.crowd
        true[row] = np.bincount(image.true_labels[single], minlength=num_classes)
        whole = _match(image, HIT_IOU)
        kept, loud = ~whole.ignored, image.scores >= operating
        every.append((labels[kept], scores[kept], whole.iou[kept]))
        # Which boxes come after them changes nothing for the first ones.
        made = [
            Match(whole.index[loud], whole.iou[loud], whole.ignored[loud]),
            *(_match(image, iou, loud) for iou in (LOW_IOU, ANY_IOU)),
        ]
        overlap, counted = np.stack([each.iou for each in made]), np.stack([~each.ignored for each in made])
        said.append((np.full(loud.sum(), row), labels[loud], scores[loud], overlap, counted))
        hit = made[0].index >= 0
        right.append((image.boxes[loud][hit] - image.true_boxes[made[0].index[hit]], image.std[hit]))
        counts[row] = single.sum(), counted[0].sum(), hit.sum()
        _confuse(confusion, image, loud)
    joined = [np.concatenate(column, -1) for column in zip(*said, strict=True)]
    error, std = (np.concatenate(column) for column in zip(*right, strict=True))
    label, score, overlap = (np.concatenate(column) for column in zip(*every, strict=True))
    return Judged(label, score, overlap, Said(*joined), true, counts, confusion, error, std)


def _match(image: Image, iou: float, which: np.ndarray | None = None) -> Match:
    at = slice(None) if which is None else which
    found = image.boxes[at], image.scores[at], image.labels[at]
    return match(*found, image.true_boxes, image.true_labels, image.crowd, iou)


def _confuse(confusion: np.ndarray, image: Image, loud: np.ndarray) -> None:
    """Count one image's said and true boxes by their classes."""
    nothing, labels, true = len(confusion) - 1, image.labels[loud], image.true_labels
    found = image.boxes[loud], image.scores[loud], np.zeros_like(labels)
    made = match(*found, image.true_boxes, np.zeros_like(true), image.crowd, HIT_IOU)
    hit, missed = made.index >= 0, ~image.crowd
    missed[made.index[hit]] = False
    wrong = labels[~hit & ~made.ignored]
    rows = np.concatenate([true[made.index[hit]], np.full(len(wrong), nothing), true[missed]])
    columns = np.concatenate([labels[hit], wrong, np.full(missed.sum(), nothing)])
    np.add.at(confusion, (rows, columns), 1)


_NONE, _NONE_INT = np.zeros(0), np.zeros(0, np.int64)
