"""Segmentation: overlap, likelihood, calibration and error detection, from counts over all pixels of all images."""

import math
from typing import Any, Self

import numpy as np
from torch import Tensor

from pipeline.metrics import ranking
from pipeline.metrics.overlap import iou, mean_iou
from pipeline.metrics.pixels import count, counts_of

_SUMS = ("confusion", "boundary", "confidence", "confidence_sum", "classwise", "classwise_sum", "doubt")


class SegmentationMetric:
    """Sums over all labelled pixels of all images, none sampled, and one short row an image.

    Args:
        num_classes: C.
        background: Class id that means over classes leave out where they say so, if there is one.
    """

    def __init__(self, num_classes: int, background: int | None = None) -> None:
        self.num_classes, self.background = num_classes, background
        kinds = counts_of(num_classes)
        self._sums = {name: np.zeros(kinds[name][0], _numpy(kinds[name][1].is_floating_point)) for name in _SUMS}
        self._ids: list[str] = []
        self._scores: list[float] = []
        # Of an image: (2 C + 1) intersections, unions, labelled pixels; (2) NLL and Brier sums.
        self._counts: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

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
        found = count(probabilities, target)
        for name in _SUMS:
            self._sums[name] += found[name]
        inter, union = _overlap(found["confusion"])
        self._ids.append(image_id)
        self._scores.append(math.nan if score is None else score)
        # No image has 2^31 pixels.
        self._counts.append(np.concatenate([inter, union, [found["confusion"].sum()]]).astype(np.int32))
        self._losses.append(np.array([found["nll"], found["brier"]]))

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
        out = cls(len(state["confusion"]), None if background < 0 else background)
        out._sums = {name: np.array(state[name]) for name in _SUMS}
        out._ids, out._scores = state["image_ids"].tolist(), state["scores"].tolist()
        out._counts, out._losses = list(state["counts"]), list(state["losses"])
        return out

    def images_table(self) -> dict[str, np.ndarray]:
        """What is kept of every image, sorted by id.

        Returns:
            ``ids``; ``score`` float32, NaN where unknown; ``loss``: 1 - mean IoU over the classes, without the
            background, that truth or prediction shows in the image, 0 where neither shows one, and NaN where
            no pixel is labelled; ``inter, union`` (n, C) and ``pixels`` int64; ``nll, brier``: sums over pixels.
        """
        state, c = self.state(), self.num_classes
        counts = state["counts"].astype(np.int64)
        inter, union, pixels = counts[:, :c], counts[:, c : 2 * c], counts[:, 2 * c]
        found = mean_iou(inter, union, self.background)
        columns = {
            "ids": state["image_ids"],
            "score": state["scores"],
            "loss": np.where(pixels > 0, 1 - np.where(np.isnan(found), 1, found), np.nan),
            "inter": inter,
            "union": union,
            "pixels": pixels,
            "nll": state["losses"][:, 0],
            "brier": state["losses"][:, 1],
        }
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
            - Of images that have a score: ``spearman_image`` of score and IoU, negative where doubt is right;
              ``aurc_image, eaurc_image`` of ``images_table``'s loss; ``risk_coverage``: ``coverage, risk``.
            - ``images`` that have a mask, and labelled ``pixels``.
        """
        rows = self.images_table()
        pixels = int(rows["pixels"].sum())
        return _plain(
            {
                **self._labels(pixels),
                "nll": _share(rows["nll"].sum(), pixels),
                "brier": _share(rows["brier"].sum(), pixels),
                **self._calibration(pixels),
                **self._errors(),
                **_images(rows),
                "images": len(rows["ids"]),
                "pixels": pixels,
            }
        )

    def _labels(self, pixels: int) -> dict[str, Any]:
        confusion = self._sums["confusion"]
        inter, union = _overlap(confusion)
        each, bands = iou(inter, union), self._sums["boundary"]
        return {
            "iou": each,
            "miou": mean_iou(inter, union, None),
            "dice": mean_iou(2 * inter, inter + union, None),
            "accuracy": _share(inter.sum(), pixels),
            "boundary_iou": mean_iou(bands[0], bands[1], self.background),
            "boundary_iou_per_class": iou(bands[0], bands[1]),
            "confusion": confusion,
        }

    def _calibration(self, pixels: int) -> dict[str, Any]:
        (number, right), total = self._sums["confidence"], self._sums["confidence_sum"]
        in_bin, of_class = self._sums["classwise"]
        gaps = np.abs(of_class - self._sums["classwise_sum"]).sum(1)
        return {
            "ece": _share(np.abs(right - total).sum(), pixels),
            "ece_classwise": _share(gaps.mean(), pixels),
            "reliability": {"confidence": iou(total, number), "accuracy": iou(right, number), "count": number},
        }

    def _errors(self) -> dict[str, Any]:
        right, wrong = self._sums["doubt"]
        number = right + wrong
        oracle = [[right.sum(), wrong.sum()], [0, wrong.sum()]]
        return {
            "auroc_error": ranking.auroc_of_counts(right, wrong),
            "aupr_error": ranking.average_precision_of_counts(right, wrong),
            "aurc": ranking.aurc(number, wrong),
            "eaurc": ranking.excess_aurc(number, wrong, oracle),
        }


def _images(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """How the images' scores rank their losses."""
    known = np.isfinite(rows["score"]) & np.isfinite(rows["loss"])
    scores, losses = rows["score"][known], rows["loss"][known]
    counts, lost = ranking.tied(scores, losses)
    coverage, risk = ranking.risk_coverage(scores, losses)
    return {
        "spearman_image": ranking.spearman(scores, 1 - losses),
        "aurc_image": ranking.aurc(counts, lost),
        "eaurc_image": ranking.excess_aurc(counts, lost, [np.ones(len(losses)), losses]),
        "risk_coverage": {"coverage": coverage, "risk": risk} if known.any() else None,
    }


def _overlap(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intersection, union) in pixels, (C,) each."""
    inter = np.diagonal(confusion)
    return inter, confusion.sum(0) + confusion.sum(1) - inter


def _share(total: Any, pixels: int) -> float:
    return float(total) / pixels if pixels else math.nan


def _plain(value: Any) -> Any:
    """Plain JSON types; what is not finite is None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numpy(floating: bool) -> type:
    return np.float64 if floating else np.int64
