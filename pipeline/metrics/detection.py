"""Detection: precision of boxes, calibration of their scores, quality of their edges, and ranking of images."""

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from pipeline.metrics import detection_calibration, probabilistic
from pipeline.metrics.coco_match import AREAS
from pipeline.metrics.detection_precision import RECALLS, coco_precision
from pipeline.metrics.detection_rows import Image, Judged, judge
from pipeline.metrics.matching import as_boxes
from pipeline.metrics.overlap import iou
from pipeline.metrics.segmentation import _images, _plain


class DetectionMetric:
    """Boxes found and true, as flat columns; the figures are computed once, from all of them.

    Images are put in the order of their ids first, so equal scores rank alike however the rows were split.

    Args:
        num_classes: K.
        operating: Score from which a box counts as said.
    """

    def __init__(self, num_classes: int, operating: float = 0.3) -> None:
        self.num_classes, self.operating = num_classes, operating
        self._rows: list[Image] = []

    def update(
        self,
        image_id: str,
        boxes: ArrayLike,
        scores: ArrayLike,
        labels: ArrayLike,
        true_boxes: ArrayLike,
        true_labels: ArrayLike,
        crowd: ArrayLike | None = None,
        *,
        std: ArrayLike | None = None,
        probabilities: ArrayLike | None = None,
        doubt: float = math.nan,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Count one image, once. Kept as float32: boxes xyxy in its own pixels.

        Args:
            image_id: Unique name.
            boxes: (B, 4) found.
            scores: (B,) higher = surer.
            labels: (B,) below ``num_classes``.
            true_boxes: (T, 4).
            true_labels: (T,).
            crowd: (T,) bool; a crowd box is neither right nor wrong to find. None: no crowds.
            std: (B, 4) standard deviations of x1, y1, x2, y2, pixels; NaN: not known, and counted as 0. None:
                figures that need them are null.
            probabilities: (B, K + 1), the last: none of these. None: likewise.
            doubt: How doubtful the image is; NaN: not known, and not ranked.
            size: Height and width in pixels, where PDQ's heat maps end; None: not known, and they end nowhere.

        Raises:
            ValueError: Columns that do not fit each other or the number of classes.
        """
        truth, names = as_boxes(true_boxes), np.asarray(true_labels, np.int32).reshape(-1)
        many = np.zeros(len(names), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
        found, score = as_boxes(boxes), np.asarray(scores, np.float32).reshape(-1)
        label, loud = np.asarray(labels, np.int32).reshape(-1), score >= self.operating
        # Only what is said has a use for these, and there are many more boxes than those.
        spread, vectors = (
            np.full((loud.sum(), width), np.nan, np.float32)
            if each is None
            else np.asarray(each, np.float32).reshape(len(found), width)[loud]
            for each, width in ((std, 4), (probabilities, self.num_classes + 1))
        )
        if not len(found) == len(score) == len(label) or not len(truth) == len(names) == len(many):
            raise ValueError(f"image '{image_id}': columns of boxes differ in length")
        if max(label.max(initial=-1), names.max(initial=-1)) >= self.num_classes:
            raise ValueError(f"image '{image_id}': wanted labels below {self.num_classes}")
        known = np.array([std is not None, probabilities is not None])
        whole = np.array(size or (0, 0), np.int32)
        columns = found, score, label, truth, names, many, spread, vectors, known
        self._rows.append(Image(image_id, *columns, doubt=float(doubt), size=whole))

    def merge(self, other: "DetectionMetric") -> None:
        """Add the rows that ``other`` has gathered, at the same operating score."""
        assert other.operating == self.operating, "what is said depends on the operating score"
        self._rows += other._rows

    def state(self) -> dict[str, np.ndarray]:
        """Flat columns, and the number of rows of each image."""
        rows, empty = self._rows, _none(self.num_classes)
        flat = {name: np.concatenate([getattr(row, name) for row in (empty, *rows)]) for name in _FLAT}
        return {
            "num_classes": np.array(self.num_classes),
            "operating": np.array(self.operating),
            "image_ids": np.array([row.id for row in rows], dtype=np.str_),
            "doubt": np.array([row.doubt for row in rows], np.float64),
            "known": np.array([row.known for row in rows], bool).reshape(-1, 2),
            "size": np.array([row.size for row in rows], np.int32).reshape(-1, 2),
            "counts": np.array([[len(getattr(row, name)) for name in _LENGTHS] for row in rows], np.int64).reshape(
                -1, 3
            ),
            **flat,
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        out = cls(int(state["num_classes"]), float(state["operating"]))
        ids, counts = state["image_ids"].tolist(), state["counts"]
        parts = {name: np.split(state[name], np.cumsum(counts[:, _FLAT[name]])[:-1]) for name in _FLAT}
        for n, name in enumerate(ids):
            own = {column: part[n] for column, part in parts.items()}
            row = {"known": state["known"][n], "doubt": float(state["doubt"][n]), "size": state["size"][n]}
            out._rows.append(Image(id=name, **own, **row))
        return out

    def images(self) -> list[Image]:
        """What is kept, in the order of ids."""
        return sorted(self._rows, key=lambda row: row.id)

    def judged(self) -> Judged:
        """Which boxes are right."""
        return judge(self.images(), self.num_classes, self.operating)

    def images_table(self) -> dict[str, np.ndarray]:
        """What is known of every image, sorted by id.

        Returns:
            ``ids``; ``score`` float64: its doubt, NaN where unknown; ``loss``: 1 - F1 at IoU 0.5 of what is said, 0
            where nothing is there and nothing is said; ``true, found`` int64: boxes there and said, without crowds.
        """
        return self._table(self.judged())

    def _table(self, judged: Judged) -> dict[str, np.ndarray]:
        rows, (true, said, right) = self.images(), judged.images.T
        return {
            "ids": np.array([row.id for row in rows], dtype=np.str_),
            "score": np.array([row.doubt for row in rows], np.float64),
            "loss": 1 - np.nan_to_num(iou(2 * right, true + said), nan=1.0),
            "true": true,
            "found": said,
        }

    def compute(self) -> dict[str, Any]:
        """The figures; null where they are not defined.

        Boxes that a crowd absorbs count nowhere. "Said" are boxes from ``operating`` on; the other figures are of all
        that were given. Classes count alike in ``map``, ``laece``, ``lrp``; elsewhere boxes do.

        Returns:
            - COCO's, as pycocotools counts: ``map``: mean over classes and IoU thresholds .50:.05:.95 of the average
              precision at 101 recalls, at most 100 boxes of a class an image; ``map50``, ``map75`` at one threshold;
              ``map_small, map_medium, map_large``: of true boxes below 32², below 96², and from there on, square
              pixels; ``per_class``, ``per_class50``: of each class, null where it has no true box; ``pr_curves``:
              ``recall`` (101) and ``precision``, a list of as many by class, at IoU .5.
            - Said boxes, at IoU .5: ``precision, recall, f1``; ``confusion``: K + 1 rows (truth) of K + 1 counts
              (prediction), the last: nothing, boxes matched whatever their class; ``d_ece, nll_score``.
            - Said boxes: ``laece`` (IoU .1), ``laece0`` (any overlap), ``lrp`` (IoU .1); ``olrp``: LRP at IoU .5 at
              each class's best score; ``detection_calibration`` has their formulas.
            - All boxes, at IoU .5: ``auroc_tp, aupr_tp``: right against wrong by score; ``best_f1``: ``score, f1,
              precision, recall``; ``reliability``: ``confidence, accuracy, count`` of 15 bins.
            - Said boxes with standard deviations: ``nll_box``, ``crps_box``; with probabilities too: ``pdq``,
              ``pdq_spatial``, ``pdq_label``; see ``probabilistic``.
            - Of images that have a doubt: ``spearman_image`` of it and F1, negative where doubt is right;
              ``aurc_image, eaurc_image`` of ``images_table``'s loss; ``risk_coverage``: ``coverage, risk``.
            - ``operating``; ``images`` that are labelled, and ``boxes``: their true ones, without crowds.
        """
        images, judged = self.images(), self.judged()
        true, said, right = judged.images.sum(0).tolist()
        return _plain(
            {
                **self._precision(images, true),
                "precision": iou(right, said),
                "recall": iou(right, true),
                "f1": iou(2 * right, true + said),
                "confusion": judged.confusion,
                **detection_calibration.figures(judged),
                **probabilistic.edges(images, judged),
                **probabilistic.pdq(images, self.operating),
                **_images(self._table(judged)),
                "operating": self.operating,
                "images": len(images),
                "boxes": true,
            }
        )

    def _precision(self, images: list[Image], true: int) -> dict[str, Any]:
        each = range(self.num_classes)
        precision = np.full((10, len(RECALLS), self.num_classes, len(AREAS)), -1.0)
        if true:
            precision = coco_precision(images, self.num_classes)
        whole = precision[..., 0]
        curves = [None if whole[0, 0, label] < 0 else whole[0, :, label] for label in each]
        return {
            "map": _mean(whole),
            "map50": _mean(whole[0]),
            "map75": _mean(whole[5]),
            **{f"map_{name}": _mean(precision[..., k]) for k, name in enumerate(AREAS) if k},
            "per_class": [_mean(whole[:, :, label]) for label in each],
            "per_class50": [_mean(whole[0, :, label]) for label in each],
            "pr_curves": {"recall": RECALLS, "precision": curves},
        }


_LENGTHS = ("boxes", "true_boxes", "std")
_FLAT = {
    "boxes": 0, "scores": 0, "labels": 0, "true_boxes": 1, "true_labels": 1, "crowd": 1, "std": 2, "probabilities": 2
}  # fmt: skip
"""Columns, and which of the lengths is theirs."""


def _none(num_classes: int) -> Image:
    """An image without anything, for the types of its columns."""
    box, name, number = np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    probabilities = np.zeros((0, num_classes + 1), np.float32)
    known, size = np.zeros(2, bool), np.zeros(2, np.int32)
    return Image("", box, number, name, box, name, np.zeros(0, bool), box, probabilities, known, math.nan, size)


def _mean(precision: np.ndarray) -> float | None:
    """Mean of what is defined, as COCO's ``summarize``."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
