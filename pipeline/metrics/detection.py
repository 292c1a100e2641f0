"""Detection: precision of boxes, calibration of their scores, quality of their edges, and ranking of images."""

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from pipeline.metrics import detection_calibration, probabilistic
from pipeline.metrics.coco_match import AREAS
from pipeline.metrics.detection_precision import RECALLS, coco_precision
from pipeline.metrics.detection_rows import ImageDetections, MatchedDetections, match_images
from pipeline.metrics.matching import as_boxes
from pipeline.metrics.plain_json import plain_json
from pipeline.metrics.ranking import image_ranking
from pipeline.metrics.ratios import mean_or_nan, ratio

_LENGTH_COLUMNS = ("boxes", "true_boxes", "std")
"""Columns of an image whose lengths the state keeps: detections, true boxes, confident detections."""
_FLAT_COLUMNS = {
    "boxes": 0, "scores": 0, "labels": 0, "true_boxes": 1, "true_labels": 1, "crowd": 1, "std": 2, "probabilities": 2
}  # fmt: skip
"""Columns that the state keeps end to end, and the place in ``_LENGTH_COLUMNS`` of the one that is as long."""


class DetectionMetric:
    """Detections and true boxes, as flat columns; the figures are computed once, from all of them.

    Images are put in the order of their ids first, so equal scores rank alike however the rows were split.

    Args:
        num_classes: K.
        operating_score: Score from which a detection counts as confident.
    """

    def __init__(self, num_classes: int, operating_score: float = 0.3) -> None:
        self.num_classes = num_classes
        self.operating_score = operating_score
        self._rows: list[ImageDetections] = []

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
        uncertainty: float = math.nan,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Count one image, once. Boxes are xyxy in its own pixels; all is kept as float32.

        Args:
            image_id: Unique name.
            boxes: (B, 4) of the detections.
            scores: (B,) higher = surer.
            labels: (B,) below ``num_classes``.
            true_boxes: (T, 4).
            true_labels: (T,).
            crowd: (T,) bool; a detection on a crowd is neither a true nor a false positive. None: no crowds.
            std: (B, 4) standard deviations of x1, y1, x2, y2, pixels; NaN: not known, and counted as 0. None:
                figures that need them are null.
            probabilities: (B, K + 1), the last: none of these. None: figures that need them are null.
            uncertainty: How doubtful the image is; NaN: not known, and not ranked.
            size: Height and width in pixels, where PDQ's heat maps end; None: not known, and they end nowhere.

        Raises:
            ValueError: Columns that do not fit each other or the number of classes.
        """
        truth = as_boxes(true_boxes)
        truth_labels = np.asarray(true_labels, np.int32).reshape(-1)
        is_crowd = np.zeros(len(truth_labels), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
        detected = as_boxes(boxes)
        score = np.asarray(scores, np.float32).reshape(-1)
        label = np.asarray(labels, np.int32).reshape(-1)
        confident = score >= self.operating_score
        # Only confident detections have a use for these, and the others are many more.
        edge_std, class_vectors = (
            np.full((confident.sum(), width), np.nan, np.float32)
            if values is None
            else np.asarray(values, np.float32).reshape(len(detected), width)[confident]
            for values, width in ((std, 4), (probabilities, self.num_classes + 1))
        )
        if not len(detected) == len(score) == len(label) or not len(truth) == len(truth_labels) == len(is_crowd):
            raise ValueError(f"image '{image_id}': columns of boxes differ in length")
        if max(label.max(initial=-1), truth_labels.max(initial=-1)) >= self.num_classes:
            raise ValueError(f"image '{image_id}': wanted labels below {self.num_classes}")
        self._rows.append(
            ImageDetections(
                id=image_id,
                boxes=detected,
                scores=score,
                labels=label,
                true_boxes=truth,
                true_labels=truth_labels,
                crowd=is_crowd,
                std=edge_std,
                probabilities=class_vectors,
                provided=np.array([std is not None, probabilities is not None]),
                uncertainty=float(uncertainty),
                size=np.array(size or (0, 0), np.int32),
            )
        )

    def merge(self, other: "DetectionMetric") -> None:
        """Add the images that ``other`` has gathered, at the same operating score."""
        assert other.operating_score == self.operating_score, "which detections are confident depends on the score"
        self._rows += other._rows

    def state(self) -> dict[str, np.ndarray]:
        """Flat columns, and the number of rows of each image."""
        rows = self._rows
        # The empty image in front gives every column its type, also where there is no image.
        padded = (_empty_image(self.num_classes), *rows)
        flat = {name: np.concatenate([getattr(row, name) for row in padded]) for name in _FLAT_COLUMNS}
        lengths = [[len(getattr(row, name)) for name in _LENGTH_COLUMNS] for row in rows]
        return {
            "num_classes": np.array(self.num_classes),
            "operating": np.array(self.operating_score),
            "image_ids": np.array([row.id for row in rows], dtype=np.str_),
            "doubt": np.array([row.uncertainty for row in rows], np.float64),
            "known": np.array([row.provided for row in rows], bool).reshape(-1, 2),
            "size": np.array([row.size for row in rows], np.int32).reshape(-1, 2),
            "counts": np.array(lengths, np.int64).reshape(-1, 3),
            **flat,
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        metric = cls(int(state["num_classes"]), float(state["operating"]))
        counts = state["counts"]
        columns_by_image = {
            name: np.split(state[name], np.cumsum(counts[:, length])[:-1]) for name, length in _FLAT_COLUMNS.items()
        }
        for n, image_id in enumerate(state["image_ids"].tolist()):
            columns = {name: column[n] for name, column in columns_by_image.items()}
            metric._rows.append(
                ImageDetections(
                    id=image_id,
                    **columns,
                    provided=state["known"][n],
                    uncertainty=float(state["doubt"][n]),
                    size=state["size"][n],
                )
            )
        return metric

    def images(self) -> list[ImageDetections]:
        """What is kept of every image, in the order of ids."""
        return sorted(self._rows, key=lambda row: row.id)

    def matched(self) -> MatchedDetections:
        """The detections of all images, matched with their true boxes."""
        return match_images(self.images(), self.num_classes, self.operating_score)

    def images_table(self) -> dict[str, np.ndarray]:
        """What is known of every image, sorted by id.

        Returns:
            ``ids``; ``score`` float64: its uncertainty, NaN where unknown; ``loss``: 1 - F1 at IoU 0.5 of the confident
            detections, 0 where there is neither a true box nor a detection; ``true, found`` int64: true boxes and
            confident detections, without crowds.
        """
        return self._images_table(self.matched())

    def _images_table(self, matched: MatchedDetections) -> dict[str, np.ndarray]:
        rows = self.images()
        num_true, num_detected, num_hits = matched.image_counts.T
        return {
            "ids": np.array([row.id for row in rows], dtype=np.str_),
            "score": np.array([row.uncertainty for row in rows], np.float64),
            "loss": 1 - np.nan_to_num(ratio(2 * num_hits, num_true + num_detected), nan=1.0),
            "true": num_true,
            "found": num_detected,
        }

    def compute(self) -> dict[str, Any]:
        """The figures; null where they are not defined.

        Detections that a crowd absorbs count nowhere. Confident ones have a score of ``operating`` or more; the other
        figures are of all detections. Classes count alike in ``map``, ``laece``, ``lrp``; elsewhere boxes do.

        Returns:
            - COCO's, as pycocotools counts: ``map``: mean over classes and IoU thresholds .50:.05:.95 of the average
              precision at 101 recalls, at most 100 boxes of a class an image; ``map50``, ``map75`` at one threshold;
              ``map_small, map_medium, map_large``: of true boxes below 32², below 96², and from there on, square
              pixels; ``per_class``, ``per_class50``: of each class, null where it has no true box; ``pr_curves``:
              ``recall`` (101) and ``precision``, a list of as many by class, at IoU .5.
            - Confident detections, at IoU .5: ``precision, recall, f1``; ``confusion``: K + 1 rows (truth) of K + 1
              counts (prediction), the last: nothing, boxes matched whatever their class; ``d_ece, nll_score``.
            - Confident detections: ``laece`` (IoU .1), ``laece0`` (any overlap), ``lrp`` (IoU .1); ``olrp``: LRP at
              IoU .5 at each class's best score; ``detection_calibration`` has their formulas.
            - All detections, at IoU .5: ``auroc_tp, aupr_tp``: true against false positives by score;
              ``best_f1``: ``score, f1, precision, recall``; ``reliability``: ``confidence, accuracy, count`` of 15
              bins.
            - Confident detections with standard deviations: ``nll_box``, ``crps_box``; with probabilities too: ``pdq``,
              ``pdq_spatial``, ``pdq_label``; see ``probabilistic``.
            - Of images whose uncertainty is known: ``spearman_image`` of it and F1, negative where it ranks well;
              ``aurc_image, eaurc_image`` of ``images_table``'s loss; ``risk_coverage``: ``coverage, risk``.
            - ``operating``; ``images`` that are labelled, and ``boxes``: their true ones, without crowds.
        """
        images = self.images()
        matched = self.matched()
        num_true, num_detected, num_hits = matched.image_counts.sum(0).tolist()
        return plain_json(
            {
                **self._precision_figures(images, num_true),
                "precision": ratio(num_hits, num_detected),
                "recall": ratio(num_hits, num_true),
                "f1": ratio(2 * num_hits, num_true + num_detected),
                "confusion": matched.confusion,
                **detection_calibration.figures(matched),
                **probabilistic.edge_likelihood(images, matched),
                **probabilistic.pdq(images, self.operating_score),
                **image_ranking(self._images_table(matched)),
                "operating": self.operating_score,
                "images": len(images),
                "boxes": num_true,
            }
        )

    def _precision_figures(self, images: list[ImageDetections], num_true: int) -> dict[str, Any]:
        """COCO's means of average precision, and the curves behind them."""
        labels = range(self.num_classes)
        # Without a true box every precision is undefined, which COCO marks by -1.
        precision = np.full((10, len(RECALLS), self.num_classes, len(AREAS)), -1.0)
        if num_true:
            precision = coco_precision(images, self.num_classes)
        all_sizes = precision[..., 0]
        curves = [None if all_sizes[0, 0, label] < 0 else all_sizes[0, :, label] for label in labels]
        return {
            "map": _mean_defined(all_sizes),
            "map50": _mean_defined(all_sizes[0]),
            "map75": _mean_defined(all_sizes[5]),
            **{f"map_{name}": _mean_defined(precision[..., k]) for k, name in enumerate(AREAS) if k},
            "per_class": [_mean_defined(all_sizes[:, :, label]) for label in labels],
            "per_class50": [_mean_defined(all_sizes[0, :, label]) for label in labels],
            "pr_curves": {"recall": RECALLS, "precision": curves},
        }


def _empty_image(num_classes: int) -> ImageDetections:
    """An image without anything, for the types of its columns."""
    no_boxes = np.zeros((0, 4), np.float32)
    no_labels = np.zeros(0, np.int32)
    return ImageDetections(
        id="",
        boxes=no_boxes,
        scores=np.zeros(0, np.float32),
        labels=no_labels,
        true_boxes=no_boxes,
        true_labels=no_labels,
        crowd=np.zeros(0, bool),
        std=no_boxes,
        probabilities=np.zeros((0, num_classes + 1), np.float32),
        provided=np.zeros(2, bool),
        uncertainty=math.nan,
        size=np.zeros(2, np.int32),
    )


def _mean_defined(precision: np.ndarray) -> float:
    """Mean of the precisions that are not -1, as COCO's ``summarize``; NaN without one."""
    return mean_or_nan(precision[precision > -1])
