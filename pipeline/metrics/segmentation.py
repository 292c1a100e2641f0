"""Segmentation: confusion matrix, log likelihood, Brier score and calibration error, as sums over pixels."""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.schema import VOID

BINS = 15
"""Of the confidence, ``(k / 15, (k + 1) / 15]``, for the expected calibration error."""


class SegmentationMetric:
    """Sums over all labelled pixels of all images, none sampled.

    Counts are int64 and sums float64, kept on the device of what was counted last.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        self.num_classes = num_classes
        self._sums = {
            "confusion": zeros(num_classes, num_classes, dtype=torch.int64),
            "bin_count": zeros(BINS, dtype=torch.int64),
            "bin_correct": zeros(BINS, dtype=torch.int64),
            "bin_confidence": zeros(BINS, dtype=torch.float64),
            "nll": zeros(dtype=torch.float64),
            "brier": zeros(dtype=torch.float64),
            "images": zeros(dtype=torch.int64),
        }

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Count one image.

        Args:
            probabilities: (C, H, W) summing to 1 over C.
            target: (H, W) uint8 class ids; VOID is counted by nothing.

        Raises:
            ValueError: A target value is neither a class nor VOID.
        """
        classes = self.num_classes
        target = target.to(probabilities.device).long()
        valid = target != VOID
        confidence, predicted = probabilities.max(0)
        cells = (target * classes + predicted).flatten()
        confusion = torch.bincount(cells, minlength=256 * classes).reshape(256, classes)
        if confusion[classes:VOID].any():
            raise ValueError(f"a mask value is neither below {classes} (the classes) nor {VOID} (void)")
        truth = probabilities.gather(0, torch.where(valid, target, 0)[None])[0]
        # The floor bounds a pixel's share at 87.3; softmax in float32 reaches 0 at a margin of 104.
        nll = -truth.clamp(min=torch.finfo(torch.float32).tiny).log()
        # Σ_c (p_c - [c = t])² = Σ p² - 2 p_t + 1
        brier = probabilities.square().sum(0) - 2 * truth + 1
        # Wrong and right pixels in two halves; void ones in a third, which is dropped.
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        bins = torch.where(valid, bins + BINS * (predicted == target), 2 * BINS).flatten()
        counts = torch.bincount(bins, minlength=3 * BINS).reshape(3, BINS)
        sums = torch.bincount(bins, confidence.double().flatten(), minlength=3 * BINS).reshape(3, BINS)
        self._add("confusion", confusion[:classes])
        self._add("bin_count", counts[:2].sum(0))
        self._add("bin_correct", counts[1])
        self._add("bin_confidence", sums[:2].sum(0))
        self._add("nll", torch.where(valid, nll, 0).sum(dtype=torch.float64))
        self._add("brier", torch.where(valid, brier, 0).sum(dtype=torch.float64))
        self._add("images", torch.ones((), dtype=torch.int64, device=target.device))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name].to(value.device) + value

    def merge(self, other: "SegmentationMetric") -> None:
        """Add what ``other`` has counted."""
        for name, value in other._sums.items():
            self._add(name, value)

    def state(self) -> dict[str, np.ndarray]:
        """The sums by name."""
        return {name: value.cpu().numpy() for name, value in self._sums.items()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        out = cls(len(state["confusion"]))
        out._sums = {name: torch.from_numpy(np.array(state[name])) for name in out._sums}
        return out

    def compute(self) -> dict[str, Any]:
        """The figures; null where no pixel was counted.

        Returns:
            - ``iou``: per class TP / (TP + FP + FN) over the dataset, null where neither truth nor prediction
              shows the class; ``miou`` their mean; ``dice`` the mean of 2TP / (2TP + FP + FN); ``accuracy``.
            - ``nll``: mean of -ln p_truth, in nats. ``brier``: mean of Σ_c (p_c - [c = truth])², 0 to 2.
            - ``ece``: Σ_bins share of pixels |accuracy - mean confidence| over 15 equal bins of max_c p_c
              (Guo et al. 2017, 1706.04599).
            - ``images`` that have a mask, and labelled ``pixels``.
        """
        sums = self.state()
        confusion = sums["confusion"].astype(np.float64)
        pixels = int(sums["confusion"].sum())
        hits = np.diag(confusion)
        both = confusion.sum(0) + confusion.sum(1)
        shown = both > 0
        iou = hits[shown] / (both - hits)[shown]
        dice = 2 * hits[shown] / both[shown]
        per_class: list[float | None] = [None] * self.num_classes
        for label, value in zip(np.flatnonzero(shown), iou, strict=True):
            per_class[label] = float(value)
        gaps = np.abs(sums["bin_correct"] - sums["bin_confidence"])
        known = pixels > 0
        return {
            "iou": per_class,
            "miou": float(iou.mean()) if known else None,
            "dice": float(dice.mean()) if known else None,
            "accuracy": float(hits.sum() / pixels) if known else None,
            "nll": float(sums["nll"] / pixels) if known else None,
            "brier": float(sums["brier"] / pixels) if known else None,
            "ece": float(gaps.sum() / pixels) if known else None,
            "images": int(sums["images"]),
            "pixels": pixels,
        }
