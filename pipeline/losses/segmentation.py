"""Losses of dense labels: plain functions ``(logits, target, ...) -> (sum, count)``.

Shapes: logits (N, C, H, W) raw, any floating type (computed in float32); target (N, H, W) uint8 class ids,
VOID = 255 counted by nothing. A batch with no labelled pixel gives sum 0 with zero gradient and count 0.
Counts depend on targets alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.schema import VOID


def valid_pixels(target: Tensor) -> Tensor:
    """Labelled pixels of (N, H, W) uint8: a float32 scalar."""
    return (target != VOID).sum().float()


def labelled_images(target: Tensor) -> Tensor:
    """Images of (N, H, W) uint8 with at least one labelled pixel: a float32 scalar."""
    return (target != VOID).flatten(1).any(dim=1).sum().float()


def cross_entropy(
    logits: Tensor, target: Tensor, *, weights: Sequence[float] | None = None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-w_y Σ_c q_c ln p_c``; count = labelled pixels.

    ``q`` is one-hot, mixed with ``smoothing`` of the uniform distribution (Szegedy et al. 2016, 1512.00567);
    ``w_y`` is 1, or the entry of ``weights`` (one a class) for the pixel's class. The count is of pixels with
    or without weights, so they scale the loss rather than make a weighted mean.
    """
    weight = None if weights is None else torch.tensor(list(weights), device=logits.device)
    total = F.cross_entropy(
        logits.float(), target.long(), weight, ignore_index=VOID, reduction="sum", label_smoothing=smoothing
    )
    return total, valid_pixels(target)


def focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-(1 - p_t)^gamma ln p_t`` (Lin et al. 2017, 1708.02002, with softmax).

    Count = labelled pixels. gamma = 0 is the cross entropy.
    """
    log_p = -F.cross_entropy(logits.float(), target.long(), ignore_index=VOID, reduction="none")
    # Void pixels have log_p = 0, so they add 0; the floor keeps the power's gradient finite at p = 1.
    miss = (-torch.expm1(log_p)).clamp(min=1e-7)
    return -(miss**gamma * log_p).sum(), valid_pixels(target)


def dice(logits: Tensor, target: Tensor, *, smooth: float = 1.0, skip: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Sum over images of one minus the mean soft Dice of the classes present; count = labelled images.

    Per image and class, over labelled pixels: ``(2 Σ p g + smooth) / (Σ p + Σ g + smooth)`` (Milletari et al.
    2016, 1606.04797, without the squares). Classes absent from the image do not enter its mean, nor do those
    in ``skip`` (a background, say); an image with none left adds 0 to the sum, but 1 to the count if it has
    a labelled pixel. ``smooth`` is in pixels.
    """
    num_classes = logits.shape[1]
    valid = (target != VOID).unsqueeze(1)
    truth = F.one_hot(target.masked_fill(target == VOID, 0).long(), num_classes).movedim(-1, 1)
    truth = (truth * valid).float()
    probabilities = logits.float().softmax(dim=1) * valid
    overlap = (probabilities * truth).sum(dim=(2, 3))
    area = truth.sum(dim=(2, 3))
    scores = (2 * overlap + smooth) / (probabilities.sum(dim=(2, 3)) + area + smooth)
    enters = area > 0
    if skip:
        enters[:, list(skip)] = False
    misses = ((1 - scores) * enters).sum(dim=1) / enters.sum(dim=1).clamp(min=1)
    return misses.sum(), labelled_images(target)
