"""Segmentation: overlap, likelihood, calibration and error detection, from counts over all pixels of all images."""

import math
from typing import Any, Self

import numpy as np
from torch import Tensor

from pipeline.metrics import ranking
from pipeline.metrics.pixels import count_pixels, shapes_and_dtypes
from pipeline.metrics.plain_json import plain_json
from pipeline.metrics.ratios import mean_iou, ratio

_SUM_NAMES = ("confusion", "boundary", "confidence", "confidence_sum", "classwise", "classwise_sum", "doubt")


class SegmentationMetric:
    """Sums over all labelled pixels of all images, none sampled, and one short row an image.

    Args:
        num_classes: C.
        background: Class id that means over classes leave out where they say so, if there is one.
    """

    def __init__(self, num_classes: int, background: int | None = None) -> None:
        self.num_classes = num_classes
        self.background = background
        self._sums: dict[str, np.ndarray] = {}
        for name in _SUM_NAMES:
            shape, dtype = shapes_and_dtypes(num_classes)[name]
            self._sums[name] = np.zeros(shape, np.float64 if dtype.is_floating_point else np.int64)
        self._ids: list[str] = []
        self._scores: list[float] = []
        self._counts: list[np.ndarray] = []
        """(2 C + 1) of each image: intersections, unions, labelled pixels."""
        self._losses: list[np.ndarray] = []
        """(2) of each image: sums of the NLL and of the Brier score over its pixels."""

    def update(self, probabilities: Tensor, target: Tensor, image_id: str = "", score: float | None = None) -> None:
        """Count one image, once.

        Args:
            probabilities: (C, H, W) summing to 1 over C.
            target: (H, W) uint8 class ids; VOID is counted by nothing.
            image_id: Unique name.
            score: How doubtful the image is; None or NaN: not known, and not ranked.

        Raises:
            ValueError: A target value is neither a class nor VOID, or shapes that do not fit.
        """
        if len(probabilities) != self.num_classes:
            raise ValueError(f"wanted probabilities of {self.num_classes} classes, found {len(probabilities)}")
        counts = count_pixels(probabilities, target)
        for name in _SUM_NAMES:
            self._sums[name] += counts[name]
        inter, union = _intersection_and_union(counts["confusion"])
        self._ids.append(image_id)
        self._scores.append(math.nan if score is None else score)
        # int32 is enough: no image has 2^31 pixels.
        self._counts.append(np.concatenate([inter, union, [counts["confusion"].sum()]]).astype(np.int32))
        self._losses.append(np.array([counts["nll"], counts["brier"]]))

    def merge(self, other: "SegmentationMetric") -> None:
        """Add what ``other`` has counted."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums[name] + value
        self._ids += other._ids
        self._scores += other._scores
        self._counts += other._counts
        self._losses += other._losses

    def state(self) -> dict[str, np.ndarray]:
        """The sums by name, and the images' rows as columns; ``background`` is -1 where there is none."""
        width = 2 * self.num_classes + 1
        return {
            **self._sums,
            "background": np.array(-1 if self.background is None else self.background),
            "image_ids": np.array(self._ids, dtype=np.str_),
            "scores": np.array(self._scores, np.float32),
            "counts": np.array(self._counts, np.int32).reshape(-1, width),
            "losses": np.array(self._losses, np.float64).reshape(-1, 2),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        background = int(state["background"])
        metric = cls(len(state["confusion"]), None if background < 0 else background)
        metric._sums = {name: np.array(state[name]) for name in _SUM_NAMES}
        metric._ids = state["image_ids"].tolist()
        metric._scores = state["scores"].tolist()
        metric._counts = list(state["counts"])
        metric._losses = list(state["losses"])
        return metric

    def images_table(self) -> dict[str, np.ndarray]:
        """What is kept of every image, sorted by id.

        Returns:
            ``ids``; ``score`` float32, NaN where unknown; ``loss``: 1 - mean IoU over the classes, without the
            background, that truth or prediction shows in the image, 0 where neither shows one, and NaN where
            no pixel is labelled; ``inter, union`` (n, C) and ``pixels`` int64; ``nll, brier``: sums over pixels.
        """
        state = self.state()
        classes = self.num_classes
        counts = state["counts"].astype(np.int64)
        inter, union, pixels = counts[:, :classes], counts[:, classes : 2 * classes], counts[:, 2 * classes]
        image_iou = mean_iou(inter, union, self.background)
        columns = {
            "ids": state["image_ids"],
            "score": state["scores"],
            "loss": np.where(pixels > 0, 1 - np.where(np.isnan(image_iou), 1, image_iou), np.nan),
            "inter": inter,
            "union": union,
            "pixels": pixels,
            "nll": state["losses"][:, 0],
            "brier": state["losses"][:, 1],
        }
        # By id, and by score and loss where ids are equal, so that the order in which images came does not show.
        order = np.lexsort((columns["loss"], columns["score"], columns["ids"]))
        return {name: value[order] for name, value in columns.items()}

    def compute(self) -> dict[str, Any]:
        """The figures; null where they are not defined.

        Returns:
            - ``iou``: per class TP / (TP + FP + FN) over the dataset, null where neither truth nor prediction
              shows the class; ``miou`` their mean; ``dice`` the mean of 2TP / (2TP + FP + FN); ``accuracy``;
              ``confusion``: C rows (truth) of C counts (prediction).
            - ``boundary_iou``: IoU of the bands along the classes' boundaries (Cheng et al. 2021, 2103.16562),
              summed over the dataset; mean over classes without the background; ``boundary_iou_per_class``.
            - ``nll``: mean of -ln p_truth, in nats. ``brier``: mean of Σ_c (p_c - [c = truth])², 0 to 2.
            - ``ece``: Σ_bins share of pixels |accuracy - mean confidence| over 15 equal bins of max_c p_c
              (Guo et al. 2017, 1706.04599); ``reliability``: ``confidence, accuracy, count`` of these bins;
              ``ece_classwise``: mean over classes of Σ_bins share |frequency of c - mean p_c| (Kull et al. 2019).
            - Wrong pixels found by entropy: ``auroc_error, aupr_error`` (wrong = positive), ``aurc, eaurc``
              (area under risk-coverage, and its excess over an oracle's), from 4096 bins.
            - Of images that have a score: ``spearman_image`` of score and IoU, negative where the score ranks well;
              ``aurc_image, eaurc_image`` of ``images_table``'s loss; ``risk_coverage``: ``coverage, risk``.
            - ``images`` that have a mask, and labelled ``pixels``.
        """
        rows = self.images_table()
        pixels = int(rows["pixels"].sum())
        return plain_json(
            {
                **self._overlap_figures(pixels),
                "nll": ratio(rows["nll"].sum(), pixels),
                "brier": ratio(rows["brier"].sum(), pixels),
                **self._calibration_figures(pixels),
                **self._error_detection_figures(),
                **ranking.image_ranking(rows),
                "images": len(rows["ids"]),
                "pixels": pixels,
            }
        )

    def _overlap_figures(self, pixels: int) -> dict[str, Any]:
        """Figures of the predicted labels alone."""
        confusion = self._sums["confusion"]
        inter, union = _intersection_and_union(confusion)
        boundary_inter, boundary_union = self._sums["boundary"]
        return {
            "iou": ratio(inter, union),
            "miou": mean_iou(inter, union, None),
            # Dice is 2 |A and B| / (|A| + |B|), and |A| + |B| is intersection plus union.
            "dice": mean_iou(2 * inter, inter + union, None),
            "accuracy": ratio(inter.sum(), pixels),
            "boundary_iou": mean_iou(boundary_inter, boundary_union, self.background),
            "boundary_iou_per_class": ratio(boundary_inter, boundary_union),
            "confusion": confusion,
        }

    def _calibration_figures(self, pixels: int) -> dict[str, Any]:
        """How well probabilities agree with frequencies, from sums by bin."""
        count, correct = self._sums["confidence"]
        confidence = self._sums["confidence_sum"]
        # A bin's share of the pixels times |frequency - mean p| is |pixels of the class - sum of p| / all pixels:
        # the number of pixels in the bin cancels.
        _, of_class = self._sums["classwise"]
        gaps = np.abs(of_class - self._sums["classwise_sum"]).sum(1)
        return {
            "ece": ratio(np.abs(correct - confidence).sum(), pixels),
            "ece_classwise": ratio(gaps.mean(), pixels),
            "reliability": {
                "confidence": ratio(confidence, count),
                "accuracy": ratio(correct, count),
                "count": count,
            },
        }

    def _error_detection_figures(self) -> dict[str, Any]:
        """How well a pixel's entropy tells wrong pixels from right ones."""
        right, wrong = self._sums["doubt"]
        number = right + wrong
        # The oracle accepts all right pixels first: two groups of equal losses, 0 and 1.
        oracle = [[right.sum(), wrong.sum()], [0, wrong.sum()]]
        return {
            "auroc_error": ranking.auroc_of_counts(right, wrong),
            "aupr_error": ranking.average_precision_of_counts(right, wrong),
            "aurc": ranking.aurc(number, wrong),
            "eaurc": ranking.excess_aurc(number, wrong, oracle),
        }


def _intersection_and_union(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intersection, union) in pixels, (C,) each."""
    inter = np.diagonal(confusion)
    return inter, confusion.sum(0) + confusion.sum(1) - inter
