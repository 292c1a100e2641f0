"""Measures of doubt: pure tensor functions, member axis first, and running means over members.

Let ``p_m`` be what member m of M says about one pixel or box, and ``p = 1/M Σ_m p_m`` the pool
(Lakshminarayanan et al. 2017, 1612.01474). Total entropy ``H[p]`` = expected entropy ``1/M Σ_m H[p_m]`` +
mutual information ``1/M Σ_m KL(p_m || p)`` (Depeweg et al. 2018, 1710.07283). All entropies are in nats.

Maps are (N, H, W); ``valid`` (N, H, W) bool marks the pixels of the image in a padded frame.
"""

import numpy as np
import torch
from torch import Tensor

_MAX_FLOATS = 2**23
"""Floats held at once while members are compared with one another."""


def entropy(probabilities: Tensor, dim: int) -> Tensor:
    """``-Σ_c p_c ln p_c`` over ``dim``, which is dropped; 0 ln 0 = 0."""
    if probabilities.is_cuda:
        return torch.special.entr(probabilities).sum(dim)
    # On a CPU entr has no vector instructions and takes twice as long; 0 times a finite logarithm is 0 too.
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_()
    return logs.mul_(probabilities).sum(dim).neg_()


def most_probable(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of (N, C, ...) probabilities, and its class (the first of equals) as uint8; both (N, ...).

    Five times as fast as ``max(1)`` on a CPU, which goes through the classes of one pixel after another.
    """
    largest = probabilities.amax(1)
    count = probabilities.shape[1]
    # The earlier a class, the larger its mark, so the largest mark is that of the first. NaN gives the last class.
    marks = torch.full_like(largest, 256 - count, dtype=torch.uint8)
    for label in range(count - 1):
        marks = torch.maximum(marks, (probabilities[:, label] == largest).to(torch.uint8) * (255 - label))
    return largest, 255 - marks


def expected_entropy(members: Tensor, dim: int) -> Tensor:
    """``1/M Σ_m H[p_m]`` of (M, ...) probabilities; ``dim`` is the class axis, counted with the members'."""
    return entropy(members, dim).mean(0)


def mutual_information(total: Tensor, expected: Tensor) -> Tensor:
    """``H[p] - 1/M Σ_m H[p_m]``, never negative by Jensen's inequality; rounding below 0 is cut off."""
    return (total - expected).clamp(min=0)


class RunningMean:
    """Mean over members, one at a time: memory does not grow with their number.

    ``mean += (x - mean) / m``: the mean of equal members is exactly that member, which Σx / M is not.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in one member's values, of the same shape each time; they are not changed."""
        self.count += 1
        if self._mean is None:
            self._mean = values.clone()
        else:
            self._mean.lerp_(values, 1 / self.count)

    @property
    def mean(self) -> Tensor:
        """Mean of all that was added."""
        if self._mean is None:
            raise ValueError("the mean of no members; add at least one")
        return self._mean


class RunningSpread:
    """Weighted mean and standard deviation over members (West 1979, 10.1145/359146.359153).

    ``mean = Σ w x / Σ w`` and ``std = sqrt(Σ w (x - mean)² / Σ w)``: that of the mixture of the members, 0
    for one member and for equal members.
    """

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())
        self._weight: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Take in one member's ``values`` (..., D) with positive ``weights`` (...)."""
        weights = weights[..., None]
        if self._weight is None:
            self.mean, self._squares = values.clone(), torch.zeros_like(values)
            self._weight = weights.clone()
            return
        self._weight = self._weight + weights
        before = values - self.mean
        self.mean = self.mean + before * (weights / self._weight)
        self._squares = self._squares + weights * before * (values - self.mean)

    @property
    def std(self) -> Tensor:
        """(..., D), in the unit of the values."""
        if self._weight is None:
            raise ValueError("the spread of no members; add at least one")
        return (self._squares / self._weight).clamp(min=0).sqrt()


def add_background_class(scores: Tensor) -> Tensor:
    """Independent sigmoid scores (..., K) -> one distribution (..., K + 1), the last "none of these".

    Existence ``e = max_c s_c``; ``p_c = e s_c / Σ s``; the rest is ``1 - e``.
    """
    existence = scores.amax(-1, keepdim=True)
    tiny = torch.finfo(scores.dtype).tiny
    return torch.cat([existence * (scores / scores.sum(-1, keepdim=True).clamp(min=tiny)), 1 - existence], -1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) mean of (N, H, W) ``values`` where ``mask``; NaN where there is no pixel."""
    total = torch.where(mask, values, 0).sum((1, 2), dtype=torch.float64)
    return (total / mask.sum((1, 2))).to(values.dtype)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """(N,) the smallest of the masked values that a share ``q`` of them does not exceed; NaN of none."""
    counts = mask.sum((1, 2)).tolist()
    # 1e-9 keeps 0.95 * 20 at 19.
    ranks = [max(1, -int(-(q * count - 1e-9) // 1)) for count in counts]
    quantiles = values.new_full((len(counts),), torch.nan)
    if values.is_cpu:
        # NumPy's selection has vector instructions: nine times as fast as kthvalue.
        for image, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
            if count:
                kept = values[image].flatten() if count == values[image].numel() else values[image][mask[image]]
                quantiles[image] = float(np.partition(kept.numpy(), rank - 1)[rank - 1])
        return quantiles
    flat = torch.where(mask, values, -torch.inf).flatten(1)
    # Pixels outside sort first. Rows of one rank, as all frames of one size have, are one call.
    places = [flat.shape[1] - count + rank if count else 0 for count, rank in zip(counts, ranks, strict=True)]
    for place in {*places} - {0}:
        rows = torch.tensor([image for image, of_image in enumerate(places) if of_image == place], device=values.device)
        quantiles[rows] = flat[rows].kthvalue(place, 1).values
    return quantiles


def max_patch_mean(values: Tensor, valid: Tensor, size: int) -> Tensor:
    """(N,) largest mean over any ``size`` x ``size`` window wholly inside the image.

    Kahl et al. 2024 (2401.08501), "patch level". The mean over the image where it is smaller than one window.
    """
    if min(values.shape[-2:]) < size:
        return masked_mean(values, valid)
    # One pixel outside makes the mean of its windows -inf.
    best = _window_sum(torch.where(valid, values, -torch.inf), size).flatten(1).amax(1) / size**2
    return torch.where(best.isfinite(), best, masked_mean(values, valid))


def _window_sum(values: Tensor, size: int) -> Tensor:
    """Sums of (N, H, W) over all windows of ``size`` x ``size``, from those of 1, 2, 4... pixels: log2(size) passes."""
    for dim in (1, 2):
        num_windows = values.shape[dim] - size + 1
        # The window is put together from pieces of 1, 2, 4... pixels, one for each bit of its size; ``values`` holds
        # the sums over pieces of ``width``, and ``offset`` says how much of the window the pieces so far cover.
        total = None
        offset, width, remaining = 0, 1, size
        while remaining:
            if remaining & 1:
                part = values.narrow(dim, offset, num_windows)
                total = part if total is None else total + part
                offset += width
            remaining >>= 1
            if remaining:
                length = values.shape[dim] - width
                values = values.narrow(dim, 0, length) + values.narrow(dim, width, length)
                width *= 2
        assert total is not None
        values = total
    return values


def interior(labels: Tensor, valid: Tensor, radius: int) -> Tensor:
    """(N, H, W) bool: pixels of the image with one label only within ``radius`` rows and columns.

    Boundaries between classes are doubtful in any image; without them what is left tells images apart.
    """
    values = labels.to(torch.uint8)
    largest = _window_max(torch.where(valid, values, 0), radius)
    # 255 is no label, so a pixel outside the image is neither the largest nor the smallest.
    smallest = 255 - _window_max(torch.where(valid, 255 - values, 0), radius)
    return valid & (largest == smallest)


def _window_max(values: Tensor, radius: int) -> Tensor:
    """Maximum of (N, H, W) unsigned values within ``radius`` rows and columns.

    Windows of 1, 2, 4... pixels, each the larger of two halves, then two that overlap: about 2 log2(radius)
    passes, each at the speed of memory on uint8; pooling is many times slower.
    """
    for dim in (1, 2):
        length = values.shape[dim]
        reach = min(radius, length - 1)
        if reach < 1:
            continue
        shape = list(values.shape)
        shape[dim] = reach
        # 0 is the smallest unsigned value, so beyond the edge nothing counts.
        edge = values.new_zeros(shape)
        windows = torch.cat([edge, values, edge], dim)
        width, wanted_width = 1, 2 * reach + 1
        while width < wanted_width:
            shift = min(width, wanted_width - width)
            length_left = windows.shape[dim] - shift
            windows = torch.maximum(windows.narrow(dim, 0, length_left), windows.narrow(dim, shift, length_left))
            width += shift
        values = windows
    return values


def interior_mean(values: Tensor, labels: Tensor, valid: Tensor, radius: int) -> Tensor:
    """(N,) mean over the pixels of ``interior``; over the whole image where every pixel is near a boundary."""
    inside = interior(labels, valid, radius)
    means = masked_mean(values, inside)
    return torch.where(means.isnan(), masked_mean(values, valid), means)


def pairwise_dice(maps: list[Tensor], valid: Tensor, num_classes: int, background: int | None = None) -> Tensor:
    """(N,) mean Dice between the masks of all pairs of members (Zenk et al. 2025, 2406.03323).

    For one pair: the mean over classes that either shows, without the background, of
    ``2 |A∩B| / (|A| + |B|)``; 1 where neither shows any. One member agrees with itself: 1.

    Args:
        maps: M maps (N, H, W) uint8 of class ids.
        valid: (N, H, W) bool, the pixels that count.
        num_classes: C.
        background: Class id left out, if there is one.
    """
    images, count = valid.shape[0], len(maps)
    if count < 2:
        return torch.ones(images, dtype=torch.float64, device=valid.device)
    total = torch.zeros(images, count, count, dtype=torch.float64, device=valid.device)
    shown = torch.zeros_like(total)
    for label in range(num_classes):
        if label == background and num_classes > 1:
            continue
        shared = _shared_areas(maps, valid, label)
        areas = shared.diagonal(dim1=1, dim2=2)
        either = areas[:, :, None] + areas[:, None, :]
        total += 2 * shared / either.clamp(min=1)
        shown += either > 0
    # The mean over ordered pairs of different members: each pair twice, the diagonal left out.
    dice = torch.where(shown > 0, total / shown.clamp(min=1), 1.0)
    return (dice.sum((1, 2)) - dice.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))


def _shared_areas(maps: list[Tensor], valid: Tensor, label: int) -> Tensor:
    """(N, M, M) float64: pixels where both members say ``label``; by one product for all pairs."""
    flat = valid.flatten(1)
    shared = torch.zeros(len(valid), len(maps), len(maps), dtype=torch.float64, device=valid.device)
    # float32 counts exactly up to 2**24; the step also bounds what is held as floats.
    step = max(1, _MAX_FLOATS // (len(maps) * len(valid)))
    for start in range(0, flat.shape[1], step):
        chunk = slice(start, start + step)
        has_label = torch.stack(
            [((labels.flatten(1)[:, chunk] == label) & flat[:, chunk]).float() for labels in maps], 1
        )
        shared += has_label @ has_label.transpose(1, 2)
    return shared


def class_sums(labels: Tensor, mask: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """(N, C) float64: pixels of each class where ``mask``, or the sums of ``weights`` (N, H, W) over them."""
    return class_table(labels, mask, num_classes, *([] if weights is None else [weights]))[-1]


def class_table(labels: Tensor, mask: Tensor, num_classes: int, *weights: Tensor) -> Tensor:
    """(1 + K, N, C) float64: pixels of each class where ``mask``, and the sums of each of ``weights`` over them.

    Args:
        labels: (N, H, W) class ids below ``num_classes`` wherever ``mask`` is true.
        mask: (N, H, W) bool.
        num_classes: C.
        weights: K maps (N, H, W) of what to sum.
    """
    images = labels.shape[0]
    # Every image has bins of its own, the last one for pixels outside the mask; int32 holds 8 million images.
    first_bin = torch.arange(images, device=labels.device, dtype=torch.int32)[:, None, None] * (num_classes + 1)
    bins = (first_bin + torch.where(mask, labels.int(), num_classes)).flatten()
    length = images * (num_classes + 1)
    sums = [torch.bincount(bins, minlength=length).double()]
    sums += [torch.bincount(bins, values.double().flatten(), minlength=length) for values in weights]
    return torch.stack(sums).reshape(-1, images, num_classes + 1)[..., :num_classes]
