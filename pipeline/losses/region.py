"""Losses of overlap: plain functions ``(logits, target, ...) -> (sum, count of labelled images)``.

Shapes and void as in ``dense``; every loss takes both kinds of head. Computed in float32 whatever the logits are
(float64 stays). A batch with no labelled pixel gives sum 0 with zero gradient.

An image's loss is the mean over the classes that it shows, without those in ``skip`` (a background, say); an image
with none left adds 0 to the sum, but 1 to the count if it has a labelled pixel. ``per: batch`` takes the images of a
batch for one large image, and gives its loss times the count: it depends on which images met on this worker, so it
is exempt from the law that sharding changes nothing. Own code, since libraries' fail or count wrongly with void.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.losses.dense import (
    as_float32,
    binary_logit,
    categorical,
    check_number,
    check_per,
    labelled_images,
    one_hot,
    without_classes,
)
from pipeline.schema import VOID

_TINY = 1e-7


def dice(
    logits: Tensor, target: Tensor, *, smooth: float = 1.0, skip: Sequence[int] = (), per: str = "image"
) -> tuple[Tensor, Tensor]:
    """Sum over images of one minus the mean soft Dice of the classes present; count = labelled images.

    Per image and class, over labelled pixels: ``(2 Σ p g + smooth) / (Σ p + Σ g + smooth)`` (Milletari et al.
    2016, 1606.04797, without the squares). ``smooth`` is in pixels; ``skip`` and ``per`` as this module says.

    Raises:
        InputError: A setting out of its range.
    """
    check_number("dice", 0, smooth=smooth)
    overlap, predicted, area = _areas("dice", logits, target, per)
    misses = 1 - _ratio(2 * overlap + smooth, predicted + area + smooth)
    return _mean_over_classes(misses, without_classes("dice", area > 0, skip), target, per)


def tversky(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    smooth: float = 1.0,
    skip: Sequence[int] = (),
    per: str = "image",
) -> tuple[Tensor, Tensor]:
    """Sum over images of the mean ``(1 - T)^gamma`` of the classes present; count = labelled images.

    Per image and class, ``T = (Σ p g + smooth) / (Σ p g + alpha Σ p (1-g) + beta Σ (1-p) g + smooth)`` (Salehi et al.
    2017, 1706.05721, with their best alpha and beta: a miss costs more than a false alarm). alpha = beta = 1/2 is
    Dice of twice the ``smooth``, alpha = beta = 1 is Jaccard. ``gamma`` is the focal Tversky loss (Abraham & Khan
    2018, 1810.07842, who write 1/gamma: theirs of 4/3 is 0.75 here). ``skip`` and ``per`` as this module says.

    Raises:
        InputError: A setting out of its range.
    """
    check_number("tversky", 0, alpha=alpha, beta=beta, smooth=smooth, gamma=gamma)
    overlap, predicted, area = _areas("tversky", logits, target, per)
    wrong = alpha * (predicted - overlap) + beta * (area - overlap)
    misses = 1 - _ratio(overlap + smooth, overlap + wrong + smooth)
    if gamma != 1:
        # The floor keeps the power's gradient finite where nothing is missed.
        misses = misses.clamp(min=_TINY) ** gamma
    return _mean_over_classes(misses, without_classes("tversky", area > 0, skip), target, per)


def jaccard(
    logits: Tensor, target: Tensor, *, smooth: float = 1.0, skip: Sequence[int] = (), per: str = "image"
) -> tuple[Tensor, Tensor]:
    """Sum over images of one minus the mean soft Jaccard index of the classes present; count = labelled images.

    Per image and class, over labelled pixels: ``(Σ p g + smooth) / (Σ p + Σ g - Σ p g + smooth)`` (Rahman & Wang
    2016, "Optimizing Intersection-Over-Union in Deep Neural Networks"). ``smooth`` is in pixels; ``skip`` and
    ``per`` as this module says.

    Raises:
        InputError: A setting out of its range.
    """
    check_number("jaccard", 0, smooth=smooth)
    overlap, predicted, area = _areas("jaccard", logits, target, per)
    misses = 1 - _ratio(overlap + smooth, predicted + area - overlap + smooth)
    return _mean_over_classes(misses, without_classes("jaccard", area > 0, skip), target, per)


def lovasz(logits: Tensor, target: Tensor, *, skip: Sequence[int] = (), per: str = "image") -> tuple[Tensor, Tensor]:
    """Lovasz-Softmax (Berman et al. 2018, 1705.08790): sum over images; count = labelled images.

    Per image and class present, the Lovasz extension of the Jaccard loss ``1 - IoU``, at the errors ``|g - p|`` of the
    labelled pixels. ``skip`` and ``per`` as this module says.

    Raises:
        InputError: A setting out of its range.
    """
    check_per("lovasz", per)
    probabilities = as_float32(categorical(logits)).softmax(dim=1)
    truth = one_hot(target, probabilities.shape[1])
    errors = torch.where(truth, 1 - probabilities, probabilities)
    labelled = (target != VOID)[:, None]
    if per == "batch":
        errors, truth, labelled = (values.movedim(0, 1).flatten(1)[None] for values in (errors, truth, labelled))
    errors, truth, labelled = errors.flatten(2), truth.flatten(2), labelled.flatten(2)
    scored = without_classes("lovasz", truth.any(dim=2), skip)
    return _mean_over_classes(
        (errors * _lovasz_slopes(errors, truth, labelled, scored)).sum(dim=2), scored, target, per
    )


def lovasz_hinge(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Lovasz hinge (Yu & Blaschko 2015; Berman et al. 2018, 1705.08790): sum over images; count = labelled images.

    Per image, the Lovasz extension of the Jaccard loss of class 0 at the hinge errors ``max(0, 1 - s z)`` of the
    labelled pixels: ``z`` is the logit of class 0 against class 1, ``s`` is 1 for class 0, else -1. An image without
    class 0 gives its largest error.

    Raises:
        InputError: More than two classes.
    """
    z = binary_logit(as_float32(logits), "lovasz_hinge", "lovasz").flatten(1)[:, None]
    truth, labelled = (target == 0).flatten(1)[:, None], (target != VOID).flatten(1)[:, None]
    errors = 1 - torch.where(truth, z, -z)
    slopes = _lovasz_slopes(errors, truth, labelled, torch.ones_like(labelled[..., 0]))
    return (errors.relu() * slopes).sum(), labelled_images(target)


def _areas(loss: str, logits: Tensor, target: Tensor, per: str) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ p g``, ``Σ p``, ``Σ g`` over labelled pixels: (N, C) each, or (1, C) per batch."""
    check_per(loss, per)
    probabilities = as_float32(categorical(logits)).softmax(dim=1)
    truth = one_hot(target, probabilities.shape[1])
    dims = (0, 2, 3) if per == "batch" else (2, 3)
    overlap = (probabilities * truth).sum(dim=dims)
    predicted = (probabilities * (target != VOID)[:, None]).sum(dim=dims)
    area = truth.sum(dim=dims).to(overlap.dtype)
    num_classes = probabilities.shape[1]
    return overlap.view(-1, num_classes), predicted.view(-1, num_classes), area.view(-1, num_classes)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient; the floor keeps it and its gradient finite for classes that are neither there nor predicted."""
    return part / whole.clamp(min=_TINY)


def _mean_over_classes(misses: Tensor, scored: Tensor, target: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """(sum, count) from (R, C) losses, averaged over the classes of each row that ``scored`` (R, C) names."""
    image_loss = torch.where(scored, misses, 0).sum(dim=1) / scored.sum(dim=1).clamp(min=1)
    count = labelled_images(target)
    return (image_loss.sum() * count if per == "batch" else image_loss.sum()), count


@torch.no_grad()
def _lovasz_slopes(errors: Tensor, truth: Tensor, labelled: Tensor, needed: Tensor) -> Tensor:
    """Slopes of the Lovasz extension: what ``1 - IoU`` gains as pixels turn wrong, the largest error first.

    Algorithm 1 of Berman et al. 2018, but each slope in closed form rather than as a difference of two numbers near
    1, which float32 can not tell apart in a large image. With G the pixels of the class, F of them and B others
    already wrong: 1 / (G + B) for one of the class, (G - F) / ((G + B) (G + B + 1)) for another.

    Args:
        errors: (R, C, P).
        truth: (R, C, P) bool, True where the pixel is of the class.
        labelled: (R, 1, P) bool, False where void.
        needed: (R, C) bool, rows that are needed.

    Returns:
        (R, C, P); 0 where void.
    """
    slopes = torch.zeros_like(errors)
    ranks = torch.arange(errors.shape[2], device=errors.device, dtype=torch.int32)
    # One image at a time: the order alone takes 8 bytes an entry.
    for row in range(len(errors)):
        # To ask which rows are needed is free on the CPU, and a wait elsewhere.
        class_rows = needed[row].nonzero().squeeze(1) if errors.device.type == "cpu" else slice(None)
        ordered, order = (
            errors[row].masked_fill(~labelled[row], -torch.inf)[class_rows].sort(dim=1, descending=True, stable=True)
        )
        hit = truth[row][class_rows].gather(1, order)
        hits_before = hit.cumsum(dim=1, dtype=torch.int32) - hit.int()
        area = hit.sum(dim=1, keepdim=True, dtype=torch.int32)
        union = (area + ranks - hits_before).to(errors.dtype)
        miss_gain = (area - hits_before) / (union * (union + 1)).clamp(min=1)
        # Without a pixel of the class the first that is wrong costs everything, and the rest nothing.
        gain = torch.where(union == 0, 1, torch.where(hit, 1 / union.clamp(min=1), miss_gain))
        gain = torch.where(ordered == -torch.inf, 0, gain).to(errors.dtype)
        slopes[row, class_rows] = torch.zeros_like(gain).scatter_(1, order, gain)
    return slopes
