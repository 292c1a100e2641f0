"""Ops without a matrix: blur, noise and erasing, after the warp, each image by its own key.

They move nothing, so masks and boxes stay as they are. Images are (N, 3, H, W) float32, normalised.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.settings import AugmentSettings


def _chosen(amount: np.ndarray, device: torch.device) -> Tensor:
    """Indices of the images that an op touches; known on the host, so the device is not waited for."""
    return torch.from_numpy(np.flatnonzero(amount)).to(device, non_blocking=True)


def blur(images: Tensor, sigma: np.ndarray, settings: AugmentSettings, calls: Counter[str]) -> Tensor:
    """Gaussian blur in place by Kornia; ``sigma`` (N,) in pixels, 0 = none."""
    if not sigma.any():
        return images
    from kornia.filters import gaussian_blur2d

    index = _chosen(sigma, images.device)
    # One kernel size for all, or the result of one image would depend on the others' sigmas.
    widest = min(int(np.ceil(3 * settings.blur_sigma[1])), min(images.shape[-2:]) - 1)
    sigmas = torch.from_numpy(sigma[sigma > 0]).to(images.device, images.dtype, non_blocking=True)
    size = (2 * widest + 1, 2 * widest + 1)
    blurred = gaussian_blur2d(images[index], size, sigmas[:, None].expand(-1, 2), "reflect")
    calls["gaussian_blur2d"] += 1
    return images.index_copy_(0, index, blurred)


def _hash(words: Tensor) -> Tensor:
    """Wellons' "lowbias32" integer hash (public domain) on int32, whose products wrap around."""
    words = words ^ ((words >> 16) & 0xFFFF)
    words = words * 0x7FEB352D
    words = words ^ ((words >> 15) & 0x1FFFF)
    words = words * (0x846CA68B - 2**32)
    return words ^ ((words >> 16) & 0xFFFF)


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers that depend on their key and place alone.

    Counter-based: a hash of (key, place) gives two 16-bit uniforms, and Box and Muller's transform (1958)
    makes two normals of them, so values reach 4.9 standard deviations.

    Args:
        keys: (N,) int32.
        count: How many numbers a key.

    Returns:
        (N, count) float32 on the device of ``keys``.
    """
    half = (count + 1) // 2
    places = torch.arange(half, device=keys.device, dtype=torch.int32)
    words = _hash(_hash(places)[None] ^ keys[:, None])
    radius = (((words >> 16) & 0xFFFF).float() + 0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFF).float().mul_(2 * torch.pi * 2.0**-16)
    return torch.cat([radius * angle.cos(), radius * angle.sin_()], 1)[:, :count]


def noise(images: Tensor, std: np.ndarray, keys: np.ndarray, scale: Tensor) -> Tensor:
    """Add Gaussian noise in place.

    Args:
        images: (N, 3, H, W).
        std: (N,) standard deviation on the 0..1 scale, 0 = none.
        keys: (N,) 32-bit keys of the noise.
        scale: (3,) standard deviations of the normalisation.
    """
    if not std.any():
        return images
    index = _chosen(std, images.device)
    device = images.device
    words = torch.from_numpy(keys[std > 0].astype(np.uint32).view(np.int32)).to(device, non_blocking=True)
    values = normal(words, images[0].numel()).view(-1, *images.shape[1:])
    amount = torch.from_numpy(std[std > 0]).to(device, torch.float32, non_blocking=True)[:, None] / scale
    return images.index_add_(0, index, values * amount[..., None, None])


def erase(images: Tensor, rectangles: np.ndarray) -> Tensor:
    """Fill a rectangle an image with the mean colour (0 once normalised), in place.

    Args:
        images: (N, 3, H, W).
        rectangles: (N, 4) x1, y1, x2, y2 as fractions of width and height, all 0 = none.
    """
    height, width = images.shape[-2:]
    for n in np.flatnonzero(rectangles.any(-1)):
        x1, y1, x2, y2 = np.rint(rectangles[n] * [width, height, width, height]).astype(int)
        images[n, :, y1:y2, x1:x2] = 0
    return images
