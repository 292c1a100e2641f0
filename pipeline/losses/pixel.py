"""Losses that are a sum over pixels: plain functions ``(logits, target, ...) -> (sum, count of labelled pixels)``.

Shapes and void as in ``dense``; every loss takes both kinds of head. Computed in float32 whatever the logits are
(float64 stays). A batch with no labelled pixel gives sum 0 with zero gradient. Own code, since libraries' divide by
what they found in this batch, and give NaN where that is nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.dense import as_float32, binary_logit, categorical, check_number, class_weights, valid_pixels
from pipeline.schema import VOID

MAX_WIDTH = 20.0
"""Largest ``boundary_width``: the distance map takes 3 passes over the labels for each pixel of it."""


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    boundary: float = 0.0,
    boundary_width: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-Σ_c w_c q_c ln p_c``; count = labelled pixels.

    ``q`` is one-hot, mixed with ``smoothing`` of the uniform distribution (Szegedy et al. 2016, 1512.00567);
    ``w_c`` is 1, or the entry of ``weights`` (one a class). The count is of pixels with or without weights, so they
    scale the loss rather than make a weighted mean. ``boundary``: see ``boundary_weights``.

    Raises:
        InputError: A setting out of its range.
    """
    check_number("cross_entropy", 0, 1, smoothing=smoothing)
    scores = as_float32(categorical(logits))
    weight = class_weights("cross_entropy", weights, scores)
    pixel_loss = F.cross_entropy(
        scores, target.long(), weight, ignore_index=VOID, reduction="none", label_smoothing=smoothing
    )
    return _weighted_at_boundary("cross_entropy", pixel_loss, target, boundary, boundary_width).sum(), valid_pixels(
        target
    )


def binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    positive_weight: float = 1.0,
    smoothing: float = 0.0,
    boundary: float = 0.0,
    boundary_width: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-(w t ln σ(z) + (1 - t) ln σ(-z))``; count = labelled pixels.

    ``z`` is the logit of class 0, the positive one, against class 1; ``t`` is 1 for class 0, else 0, mixed with
    ``smoothing`` of 1/2; ``w`` is ``positive_weight``. As ``cross_entropy`` with ``weights = (w, 1)``.
    ``boundary``: see ``boundary_weights``.

    Raises:
        InputError: More than two classes, or a setting out of its range.
    """
    name = "binary_cross_entropy"
    check_number(name, 0, positive_weight=positive_weight)
    check_number(name, 0, 1, smoothing=smoothing)
    z = binary_logit(as_float32(logits), name, "cross_entropy")
    truth = (target == 0).to(z.dtype) * (1 - smoothing) + smoothing / 2
    pixel_loss = -(positive_weight * truth * F.logsigmoid(z) + (1 - truth) * F.logsigmoid(-z))
    pixel_loss = pixel_loss.masked_fill(target == VOID, 0)
    return _weighted_at_boundary(name, pixel_loss, target, boundary, boundary_width).sum(), valid_pixels(target)


def focal(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-w_y (1 - p_y)^gamma ln p_y`` (Lin et al. 2017, 1708.02002, with softmax).

    Count = labelled pixels. ``w_y`` is 1, or the entry of ``weights`` (one a class) for the pixel's class. gamma = 0
    is the cross entropy.

    Raises:
        InputError: A setting out of its range.
    """
    check_number("focal", 0, gamma=gamma)
    scores = as_float32(categorical(logits))
    weight = class_weights("focal", weights, scores)
    pixel_loss = _focal_loss(-F.cross_entropy(scores, target.long(), ignore_index=VOID, reduction="none"), gamma)
    if weight is not None:
        pixel_loss = pixel_loss * weight[target.masked_fill(target == VOID, 0).long()]
    return pixel_loss.sum(), valid_pixels(target)


def binary_focal(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over labelled pixels of ``-a (1 - p)^gamma ln p`` (Lin et al. 2017, 1708.02002); count = labelled pixels.

    ``p`` is the sigmoid's probability of the pixel's class; ``a`` is ``alpha`` for class 0, the positive one, and
    ``1 - alpha`` for class 1; without ``alpha`` it is 1 for both, which is ``focal``.

    Raises:
        InputError: More than two classes, or a setting out of its range.
    """
    check_number("binary_focal", 0, gamma=gamma)
    z = binary_logit(as_float32(logits), "binary_focal", "focal")
    positive = target == 0
    pixel_loss = _focal_loss(F.logsigmoid(torch.where(positive, z, -z)), gamma)
    if alpha is not None:
        check_number("binary_focal", 0, 1, alpha=alpha)
        pixel_loss = torch.where(positive, alpha * pixel_loss, (1 - alpha) * pixel_loss)
    return pixel_loss.masked_fill(target == VOID, 0).sum(), valid_pixels(target)


def _focal_loss(log_p: Tensor, gamma: float) -> Tensor:
    """``-(1 - p)^gamma ln p``."""
    # The floor keeps the power's gradient finite at p = 1.
    miss = (-torch.expm1(log_p)).clamp(min=1e-7)
    return -(miss**gamma) * log_p


def _weighted_at_boundary(loss: str, pixel_loss: Tensor, target: Tensor, boundary: float, width: float) -> Tensor:
    check_number(loss, 0, boundary=boundary)
    # Below a fifth of a pixel the nearest neighbours get nothing.
    check_number(loss, 0.2, MAX_WIDTH, boundary_width=width)
    return pixel_loss * boundary_weights(target, boundary, width).to(pixel_loss.dtype) if boundary else pixel_loss


def boundary_weights(target: Tensor, boundary: float, width: float) -> Tensor:
    """``1 + boundary * exp(-d² / (2 width²))``, d = pixels to the nearest pixel of another class; (N, H, W) float32.

    The border term of U-Net (Ronneberger et al. 2015, 1505.04597, formula 2) with the one nearest class in place of
    the two nearest cells, and 1 in place of the class balance (that is ``weights``). Cut off at 3 widths, where the
    term is below 0.012 ``boundary``. Void is no class and makes no boundary; nor does the image's edge.
    """
    reach = math.ceil(3 * width)
    distance = class_distance(target, reach)
    near = torch.exp(distance.float().square() / (-2 * width**2)) * (distance <= reach)
    return 1 + boundary * near


@torch.no_grad()
def class_distance(target: Tensor, reach: int) -> Tensor:
    """Distance from each pixel to the nearest of another class, as (N, H, W) uint8; ``reach`` + 1 = further.

    Octagonal distance (Rosenfeld & Pfaltz 1968, "Distance functions on digital pictures"): squares and crosses of
    3 pixels in turn, grown ``reach`` times, so the time is bounded and nothing waits for the device. Within a pixel
    of the Euclidean distance up to 8 pixels, and at most 13 % below it further away. A grown window holds another
    class iff its least label or its greatest differs from the pixel's.
    """
    flipped = (VOID - 1 - target).masked_fill_(target == VOID, VOID)
    labels = torch.stack([target, flipped])
    # VOID is the greatest byte, so it is never the least of a window that holds a label.
    least = labels
    distance = torch.ones_like(target)
    for step in range(reach):
        if step % 2:
            least = torch.minimum(_least_of_three(least, -1), _least_of_three(least, -2))
        else:
            least = _least_of_three(_least_of_three(least, -1), -2)
        distance += (least >= labels).all(dim=0)
    return distance


def _least_of_three(values: Tensor, dim: int) -> Tensor:
    """Each value's minimum with its two neighbours along ``dim``."""
    # Shifted views of bytes are far quicker than max_pool2d, which takes floats only.
    out, length = values.clone(), values.shape[dim]
    ahead, behind = values.narrow(dim, 1, length - 1), values.narrow(dim, 0, length - 1)
    first, last = out.narrow(dim, 0, length - 1), out.narrow(dim, 1, length - 1)
    torch.minimum(first, ahead, out=first)
    torch.minimum(last, behind, out=last)
    return out
