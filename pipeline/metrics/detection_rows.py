"""What is kept of the images of detection, and which detections match a true box, as flat columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.metrics.matching import Match, match

HIT_IOU = 0.5
"""Overlap with a true box from which a detection is a true positive."""
LOW_IOU = 0.1
"""Least overlap of LaECE and LRP (Oksuz et al. 2023, 2307.00934): low, because both weigh the overlap themselves."""
ANY_IOU = 1e-9
"""Least overlap of ``laece0``: any overlap at all."""

_NO_FLOATS = np.zeros(0)
_NO_INTS = np.zeros(0, np.int64)


class ImageDetections(NamedTuple):
    """One image: its B detections, the S of them from the operating score on, and its T true boxes."""

    id: str
    boxes: np.ndarray
    """(B, 4) float32 xyxy of the detections, pixels."""
    scores: np.ndarray
    """(B,) float32 of the detections."""
    labels: np.ndarray
    """(B,) int32 classes of the detections."""
    true_boxes: np.ndarray
    """(T, 4) float32 xyxy, pixels."""
    true_labels: np.ndarray
    """(T,) int32."""
    crowd: np.ndarray
    """(T,) bool: the true box stands for a crowd of objects."""
    std: np.ndarray
    """(S, 4) float32 standard deviations of the confident detections' edges, pixels; NaN: not known."""
    probabilities: np.ndarray
    """(S, K + 1) float32 class vectors of the confident detections, the last entry "none of these"."""
    provided: np.ndarray
    """(2,) bool: whether the caller gave ``std``, and whether it gave ``probabilities``."""
    uncertainty: float
    """How doubtful the whole image is; NaN: not known."""
    size: np.ndarray
    """(2,) int32 height and width in pixels; 0: not known."""


@dataclass
class ConfidentDetections:
    """The n detections of all images from the operating score on; those absorbed by a crowd are left out."""

    image: np.ndarray
    """(n,) int64 row of the image."""
    label: np.ndarray
    """(n,) int64."""
    score: np.ndarray
    """(n,) float64."""
    overlap: np.ndarray
    """(3, n) float64: IoU with the true box matched at ``HIT_IOU``, ``LOW_IOU``, ``ANY_IOU``; 0: no match."""
    counted: np.ndarray
    """(3, n) bool: not absorbed by a crowd at that overlap."""


@dataclass
class MatchedDetections:
    """All detections matched at ``HIT_IOU``, the confident ones apart, and counts of the true boxes."""

    label: np.ndarray
    """(n,) int64 classes of the detections that no crowd absorbed."""
    score: np.ndarray
    """(n,) float64 scores of the same detections."""
    overlap: np.ndarray
    """(n,) float64 IoU of the same detections with their true box; 0: a false positive."""
    confident: ConfidentDetections
    num_true: np.ndarray
    """(N, K) int64 true boxes of each image and class, without crowds."""
    image_counts: np.ndarray
    """(N, 3) int64 of each image: true boxes, confident detections, true positives among these; without crowds."""
    confusion: np.ndarray
    """(K + 1, K + 1) int64 of confident detections, matched whatever their class; rows truth, the last: nothing."""
    edge_error: np.ndarray
    """(m, 4) float32 pixels: edges of the confident true positives minus those of their true boxes."""
    edge_std: np.ndarray
    """(m, 4) float32 pixels: standard deviations of the edges in ``edge_error``."""


def match_images(images: Sequence[ImageDetections], num_classes: int, operating_score: float) -> MatchedDetections:
    """Match the detections of every image.

    Args:
        images: N.
        num_classes: K.
        operating_score: Score from which a detection counts as confident.
    """
    # Each list begins with empty columns, so that no image at all still gives arrays of the right types.
    detections: list[tuple[np.ndarray, ...]] = [(_NO_INTS, _NO_FLOATS, _NO_FLOATS)]
    confident_rows: list[tuple[np.ndarray, ...]] = [
        (_NO_INTS, _NO_INTS, _NO_FLOATS, np.zeros((3, 0)), np.zeros((3, 0), bool))
    ]
    true_positives = [(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))]
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    image_counts = np.zeros((len(images), 3), np.int64)
    num_true = np.zeros((len(images), num_classes), np.int64)
    for row, image in enumerate(images):
        labels = image.labels.astype(np.int64)
        scores = image.scores.astype(np.float64)
        single = ~image.crowd
        num_true[row] = np.bincount(image.true_labels[single], minlength=num_classes)
        # All detections at HIT_IOU: for the curves over all scores.
        all_matches = _match_image(image, HIT_IOU)
        kept = ~all_matches.ignored
        detections.append((labels[kept], scores[kept], all_matches.iou[kept]))
        # The confident ones at all three overlaps. Matching goes by falling score, so leaving out the low scores
        # changes nothing for the high ones: at HIT_IOU the matches are those above.
        confident = image.scores >= operating_score
        matches = [
            Match(all_matches.index[confident], all_matches.iou[confident], all_matches.ignored[confident]),
            *(_match_image(image, iou, confident) for iou in (LOW_IOU, ANY_IOU)),
        ]
        overlap = np.stack([match_at.iou for match_at in matches])
        counted = np.stack([~match_at.ignored for match_at in matches])
        confident_rows.append((np.full(confident.sum(), row), labels[confident], scores[confident], overlap, counted))
        # Errors of edges are defined for true positives alone.
        hit = matches[0].index >= 0
        error = image.boxes[confident][hit] - image.true_boxes[matches[0].index[hit]]
        true_positives.append((error, image.std[hit]))
        image_counts[row] = single.sum(), counted[0].sum(), hit.sum()
        _count_confusion(confusion, image, confident)
    confident_columns = [np.concatenate(column, -1) for column in zip(*confident_rows, strict=True)]
    edge_error, edge_std = (np.concatenate(column) for column in zip(*true_positives, strict=True))
    label, score, overlap = (np.concatenate(column) for column in zip(*detections, strict=True))
    return MatchedDetections(
        label, score, overlap, ConfidentDetections(*confident_columns), num_true, image_counts, confusion,
        edge_error, edge_std,
    )  # fmt: skip


def _match_image(image: ImageDetections, iou: float, selected: np.ndarray | None = None) -> Match:
    """Match the ``selected`` detections of one image, (B,) bool; None: all of them."""
    rows = slice(None) if selected is None else selected
    detections = image.boxes[rows], image.scores[rows], image.labels[rows]
    return match(*detections, image.true_boxes, image.true_labels, image.crowd, iou)


def _count_confusion(confusion: np.ndarray, image: ImageDetections, confident: np.ndarray) -> None:
    """Add one image's confident detections and true boxes to the table of classes, in place."""
    none_class = len(confusion) - 1
    labels = image.labels[confident]
    true_labels = image.true_labels
    # With one class for all, a detection is matched by its place alone; then its class can be compared.
    detections = image.boxes[confident], image.scores[confident], np.zeros_like(labels)
    matches = match(*detections, image.true_boxes, np.zeros_like(true_labels), image.crowd, HIT_IOU)
    hit = matches.index >= 0
    missed = ~image.crowd
    missed[matches.index[hit]] = False
    false_positives = labels[~hit & ~matches.ignored]
    # Three kinds of cells: (true class, predicted class), (nothing, predicted class), (true class, nothing).
    rows = np.concatenate(
        [true_labels[matches.index[hit]], np.full(len(false_positives), none_class), true_labels[missed]]
    )
    columns = np.concatenate([labels[hit], false_positives, np.full(missed.sum(), none_class)])
    np.add.at(confusion, (rows, columns), 1)
