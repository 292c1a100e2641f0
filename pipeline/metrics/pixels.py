"""What is counted of one image's pixels, on the device of its probabilities: sums that add over images."""

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.schema import VOID
from pipeline.uncertainty import measures

BINS = 15
"""Bins of a probability for calibration errors: ``(k / 15, (k + 1) / 15]``."""

ENTROPY_BINS = 4096
"""Bins of an entropy v relative to ln C: 64 to each octave, of v below 1/2 down to 2^-41, and of 1 - v down to 2^-25.

Fine at both ends: sure pixels differ by powers of ten, and of two classes the entropy is flat at its top.
"""

_LOW_BINS, _HIGH_BINS = 2560, 1536
"""``ENTROPY_BINS`` at and below 1/2, and above it."""

BOUNDARY = 0.02
"""Width of the boundary band as a share of the image's diagonal (Cheng et al. 2021, 2103.16562)."""

_CHUNK = {"cpu": 2**19, "cuda": 2**25}
"""Probabilities taken at a time: what stays in a processor's cache; bounds the memory on a GPU."""


def shapes_and_dtypes(num_classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what ``count_pixels`` gives: sums over labelled pixels.

    ``confusion`` (truth, prediction). ``boundary``: pixels by class in both bands, and in either.
    ``confidence``: by bin of max_c p_c all pixels, and the right ones; ``confidence_sum``. ``classwise``: by
    class and bin of p_c all pixels, and those of the class; ``classwise_sum`` of p_c. ``doubt``: right and
    wrong pixels by bin of the entropy. ``nll`` in nats, ``brier``: sums.
    """
    integer, real = torch.int64, torch.float64
    c = num_classes
    return {
        "confusion": ((c, c), integer),
        "boundary": ((2, c), integer),
        "confidence": ((2, BINS), integer),
        "confidence_sum": ((BINS,), real),
        "classwise": ((2, c, BINS), integer),
        "classwise_sum": ((c, BINS), real),
        "doubt": ((2, ENTROPY_BINS), integer),
        "nll": ((), real),
        "brier": ((), real),
    }


def count_pixels(probabilities: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """Count one image; memory beyond the arguments is a few bytes a pixel.

    Args:
        probabilities: (C, H, W) floating, summing to 1 over C.
        target: (H, W) uint8 class ids; VOID is counted by nothing.

    Returns:
        As ``shapes_and_dtypes`` says.

    Raises:
        ValueError: A target value is neither a class nor VOID, or the sizes differ.
    """
    classes = probabilities.shape[0]
    device = probabilities.device
    if probabilities.shape[1:] != target.shape:
        raise ValueError(f"probabilities of {tuple(probabilities.shape)} do not fit a mask of {tuple(target.shape)}")
    target = target.to(device)
    valid = target != VOID
    if ((target >= classes) & valid).any():
        raise ValueError(f"a mask value is neither below {classes} (the classes) nor {VOID} (void)")
    confidence, predicted = probabilities.max(0)
    predicted = predicted.to(torch.uint8)
    # Bands need neighbours, so they are found before the void pixels are taken out.
    truth_band, predicted_band = boundary_bands(torch.stack([target, predicted]), valid).flatten(1).to(torch.uint8)
    # Which of the two bands a pixel is in: 3 = both.
    band = 2 * truth_band + predicted_band
    columns = [column.flatten() for column in (target, confidence, predicted, band)]
    # Most images have no void pixel, and need no gathering.
    keep = None if valid.all() else valid.flatten().nonzero()[:, 0]
    if keep is not None:
        columns = [column[keep] for column in columns]
    counts = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes_and_dtypes(classes).items()
    }
    _add_labels(counts, *columns)
    # What needs all C probabilities goes by chunks of pixels: its temporaries are as large as they are.
    truth = columns[0].long()
    wrong = columns[0] != columns[2]
    flat = probabilities.flatten(1)
    step = max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // classes)
    for start in range(0, len(truth), step):
        chunk = slice(start, start + step)
        _add_probabilities(counts, flat[:, chunk if keep is None else keep[chunk]], truth[chunk], wrong[chunk])
    return {name: value.cpu().numpy() for name, value in counts.items()}


def boundary_bands(labels: Tensor, valid: Tensor) -> Tensor:
    """Which pixels are near the boundary of their own class, for all classes at once.

    Those from which another class, or the image's edge, is at most d rows and columns away, ``d =
    max(1, round(0.02 diagonal))``: what d erosions of each class's mask by 3x3 with a border of 0 remove.
    A void pixel is no class: it has no boundary and makes none.

    Args:
        labels: (N, H, W) uint8 class ids below 255 where ``valid``.
        valid: (H, W) bool, for all of them.

    Returns:
        (N, H, W) bool; what it says of void pixels means nothing.
    """
    height, width = valid.shape
    distance = max(1, round(BOUNDARY * math.hypot(height, width)))
    in_band = ~measures.interior(labels, valid.expand_as(labels), distance)
    # The image's edge is a boundary too, which ``interior`` does not count.
    far_edge = slice(-distance, None)
    in_band[:, :distance] = True
    in_band[:, far_edge] = True
    in_band[:, :, :distance] = True
    in_band[:, :, far_edge] = True
    return in_band


def _add_labels(counts: dict[str, Tensor], target: Tensor, confidence: Tensor, predicted: Tensor, band: Tensor) -> None:
    """Counts of n labelled pixels that need no more than labels and the highest probability; (n,) each."""
    classes = len(counts["confusion"])
    # One confusion matrix for each of the four bands gives both the whole one and the areas of the bands.
    cells = (band.int() * classes + target) * classes + predicted
    by_band = torch.bincount(cells, minlength=4 * classes * classes).reshape(4, classes, classes)
    counts["confusion"] += by_band.sum(0)
    in_both = by_band[3].diagonal()
    in_truth_band = by_band[2:].sum((0, 2))
    in_predicted_band = by_band[1::2].sum((0, 1))
    counts["boundary"] += torch.stack([in_both, in_truth_band + in_predicted_band - in_both])
    confidence = confidence.float()
    # Wrong pixels in the first half of the bins, right ones in the second.
    bins = _probability_bins(confidence).int() + BINS * (predicted == target)
    bin_counts = torch.bincount(bins, minlength=2 * BINS).reshape(2, BINS)
    counts["confidence"] += torch.stack([bin_counts.sum(0), bin_counts[1]])
    confidence_sums = torch.bincount(bins, confidence.double(), minlength=2 * BINS).reshape(2, BINS)
    counts["confidence_sum"] += confidence_sums.sum(0)


def _add_probabilities(counts: dict[str, Tensor], probabilities: Tensor, truth: Tensor, wrong: Tensor) -> None:
    """Counts of n labelled pixels that need all of their (C, n) probabilities; ``truth``, ``wrong`` (n,)."""
    p = probabilities.float()
    truth_row = truth[None]
    classes = len(p)
    # The floor bounds a pixel's share at 87.3; softmax in float32 reaches 0 at a margin of 104.
    log = p.clamp(min=torch.finfo(torch.float32).tiny).log()
    counts["nll"] -= log.gather(0, truth_row).sum(dtype=torch.float64)
    # Σ_c (p_c - [c = t])² = Σ p² - 2 p_t + 1
    counts["brier"] += (p.square().sum(0) - 2 * p.gather(0, truth_row)[0] + 1).sum(dtype=torch.float64)
    # Entropy in units of ln C, the same logarithms used again; right and wrong pixels have bins of their own.
    entropy = (p * log).sum(0) / -math.log(max(2, classes))
    error_bins = entropy_bins(entropy) + ENTROPY_BINS * wrong
    counts["doubt"] += torch.bincount(error_bins, minlength=2 * ENTROPY_BINS).reshape(2, ENTROPY_BINS)
    # Bins of class c are BINS * c and following: exact in float32, and turned into integers once.
    class_bins = _probability_bins(p) + BINS * torch.arange(classes, device=p.device)[:, None]
    class_bins = class_bins.int()
    shape, num_bins = (classes, BINS), classes * BINS
    of_all = torch.bincount(class_bins.flatten(), minlength=num_bins).reshape(shape)
    of_class = torch.bincount(class_bins.gather(0, truth_row)[0], minlength=num_bins).reshape(shape)
    counts["classwise"] += torch.stack([of_all, of_class])
    sums = torch.bincount(class_bins.flatten(), p.double().flatten(), minlength=num_bins)
    counts["classwise_sum"] += sums.reshape(shape)


def _probability_bins(values: Tensor) -> Tensor:
    """0..14 as floats, for values 0..1; 0, and what is not a number, is in the first."""
    return (values * BINS).ceil_().sub_(1).nan_to_num_(0).clamp_(0, BINS - 1)


def entropy_bins(values: Tensor) -> Tensor:
    """Bins of ``ENTROPY_BINS``, rising with float32 ``values`` in 0..1, int32.

    From the exponent and 6 bits of the mantissa: sorting a dataset's pixels is not needed to rank them.
    """
    low = values <= 0.5
    near = torch.where(low, values, 1 - values)
    # 0x1F80 is where 1/2 begins; rounding to below 0 or above 1 sets the sign, which the clamp removes.
    step = (near.view(torch.int32) >> 17).sub_(0x1F80)
    below = (step + (_LOW_BINS - 1)).clamp_(0, _LOW_BINS - 1)
    above = (ENTROPY_BINS - 1) - step.add_(_HIGH_BINS - 1).clamp_(0, _HIGH_BINS - 1)
    return torch.where(low, below, above)
