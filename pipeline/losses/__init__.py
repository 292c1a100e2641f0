"""The losses of segmentation and of detection by name, and the arithmetic that joins terms.

Every loss gives a sum and a count; the count comes from targets alone. Counts are summed over ranks and
accumulation steps before the first backward, and ``total`` divides by them, so the gradient does not
depend on how rows were sharded.

base: what a detection loss is
dense: what losses of dense labels share: counts, kinds of head, checks of settings
pixel: sums over pixels: cross entropies and focal losses
region: losses of overlap: Dice, Tversky, Jaccard, Lovasz
assign: which location of a detector answers for which object
detection: one-stage detectors with sigmoid heads
softmax: one-stage detectors with a background class
two_stage: detectors that sample proposals by their targets
yolo_v1: YOLO v1
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.losses import pixel, region
from pipeline.losses.base import BoxLoss, Term
from pipeline.losses.dense import binary_logit, categorical, labelled_images, valid_pixels
from pipeline.losses.detection import DetectionLoss, counts, detection
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.two_stage import TwoStageLoss
from pipeline.losses.yolo_v1 import YoloV1Loss

__all__ = [
    "DETECTION_LOSSES",
    "LOSSES",
    "BoxLoss",
    "DetectionLoss",
    "Loss",
    "Term",
    "categorical",
    "counts",
    "detection",
    "binary_logit",
    "total",
]


@dataclass(frozen=True)
class Loss:
    """A segmentation loss: called, it gives (sum, count); ``count(target)`` gives the count alone."""

    function: Callable[..., tuple[Tensor, Tensor]]
    count: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) or (N, 1, H, W) logits, (N, H, W) uint8 target -> (sum, count), both float32 scalars."""
        return self.function(logits, target, **settings)


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(pixel.cross_entropy, valid_pixels),
    "binary_cross_entropy": Loss(pixel.binary_cross_entropy, valid_pixels),
    "focal": Loss(pixel.focal, valid_pixels),
    "binary_focal": Loss(pixel.binary_focal, valid_pixels),
    "dice": Loss(region.dice, labelled_images),
    "tversky": Loss(region.tversky, labelled_images),
    "jaccard": Loss(region.jaccard, labelled_images),
    "lovasz": Loss(region.lovasz, labelled_images),
    "lovasz_hinge": Loss(region.lovasz_hinge, labelled_images),
}

DETECTION_LOSSES: dict[str, type[BoxLoss]] = {
    "aligned": DetectionLoss,
    "yolo_v1": YoloV1Loss,
    "softmax": SoftmaxLoss,
    "two_stage": TwoStageLoss,
}
"""What detectors are trained by; a model names those that fit it in ``losses``, its own first."""


def total(terms: Mapping[str, Term], counts: Mapping[str, Tensor], world_size: int = 1) -> Tensor:
    """The scalar to call ``backward`` on: ``world_size * Σ weight * sum / count``.

    Data-parallel training averages gradients over ranks; times ``world_size`` that average is the sum, and
    each sum over all ranks is divided by the count over all ranks.

    Args:
        terms: Name -> (weight, sum on this rank and micro-batch, its own count, unused here).
        counts: Name -> count summed over all ranks and all micro-batches of the step.
        world_size: Number of ranks whose gradients are averaged.

    Returns:
        A float32 scalar; a term whose count is 0 gives 0, with zero gradient.
    """
    parts: list[Tensor] = []
    for name, (weight, value, _) in terms.items():
        count = counts[name].to(value.device, torch.float32)
        scale = torch.where(count > 0, weight * world_size / count.clamp(min=1e-12), torch.zeros_like(count))
        parts.append(value.float() * scale)
    return torch.stack(parts).sum()
