"""Large images through overlapping windows, blended with a Gaussian."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from pipeline.uncertainty.tta import InferenceSettings

WINDOWS_AT_ONCE = {"cpu": 4, "cuda": 32}
"""Windows that go through the network together, by kind of device."""


def needs_sliding_window(settings: InferenceSettings, canvas: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether a frame of ``canvas`` is seen through windows."""
    if settings.windows == "never" or (canvas[0] <= window[0] and canvas[1] <= window[1]):
        return False
    return settings.windows == "always" or canvas[0] * canvas[1] > settings.whole_pixels


def sliding_window_logits(
    model: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], overlap: float = 0.5
) -> Tensor:
    """Logits (N, C, H, W) blended from overlapping windows, each weighted by a Gaussian around its centre.

    As nnU-Net does (Isensee et al. 2021, 10.1038/s41592-020-01008-z): sigma an eighth of the side, logits
    averaged. Memory is that of the result and of a few windows, whatever the image's size.

    Args:
        model: (n, 3, h, w) -> logits (n, C, h, w).
        images: (N, 3, H, W).
        window: h, w; cut to the image where that is smaller.
        overlap: Share of a window's side that the next one covers again.
    """
    height, width = min(window[0], images.shape[-2]), min(window[1], images.shape[-1])
    rows, columns = _window_starts(images.shape[-2], height, overlap), _window_starts(images.shape[-1], width, overlap)
    weight = gaussian((height, width)).to(images.device)
    windows = [(n, row, column) for n in range(len(images)) for row in rows for column in columns]
    step = WINDOWS_AT_ONCE.get(images.device.type, WINDOWS_AT_ONCE["cpu"])
    total = images.new_zeros(0)
    mass = images.new_zeros(images.shape[-2:])
    for row, column in product(rows, columns):
        mass[row : row + height, column : column + width] += weight
    for start in range(0, len(windows), step):
        chunk = windows[start : start + step]
        crops = torch.stack([images[n, :, y : y + height, x : x + width] for n, y, x in chunk])
        logits = model(crops.contiguous(memory_format=torch.channels_last)).float() * weight
        if not len(total):
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
        for (n, y, x), window_logits in zip(chunk, logits, strict=True):
            total[n, :, y : y + height, x : x + width] += window_logits
    return total.div_(mass)


def gaussian(size: tuple[int, int], sigma: float = 1 / 8) -> Tensor:
    """(h, w) weights, 1 at the centre; ``sigma`` in sides. Floored at 1e-3, so that no pixel's mass vanishes."""
    axes = [torch.exp(-((((torch.arange(side) + 0.5) / side - 0.5) / sigma) ** 2) / 2) for side in size]
    return (axes[0][:, None] * axes[1]).clamp(min=1e-3)


def _window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover ``length``, spread evenly, at least ``overlap`` of each shared."""
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [round(k * (length - window) / (count - 1)) for k in range(count)]
