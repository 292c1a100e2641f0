"""Ops without a matrix: blur, noise and erasing, after the warp, each image by its own key.

They move nothing, so masks and boxes stay as they are. Images are (N, 3, H, W) float32, normalised.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.pixels import BatchFunctions
from pipeline.augment.settings import AugmentSettings


def device_arguments(
    settings: AugmentSettings, drawn: dict[str, np.ndarray], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """What the device needs to know for images of ``size`` (H, W): which rows, how much, and where.

    Returns:
        Of all N rows: ``noise_std`` (N,) on the 0..1 scale, ``noise_key`` (N, 2) as two 16-bit halves, since
        float32 holds no 32-bit number, and ``erase`` (N, 4) x1, y1, x2, y2 in whole pixels. ``noise_rows`` and
        ``blur_rows`` (K,): those that are touched; ``blur_kernel`` (K, taps) of the latter.
    """
    sides = [size[1], size[0], size[1], size[0]]
    keys = drawn["noise_key"]
    return {
        "noise_std": drawn["noise"],
        "noise_key": np.stack([keys >> 16, keys & 0xFFFF], -1),
        "erase": np.rint(drawn["erase"] * sides),
        "noise_rows": np.flatnonzero(drawn["noise"]),
        "blur_rows": np.flatnonzero(drawn["blur"]),
        "blur_kernel": blur_kernels(settings, drawn["blur"][drawn["blur"] > 0], size),
    }


def apply(
    images: Tensor,
    arguments: dict[str, np.ndarray],
    on_device: dict[str, Tensor],
    settings: AugmentSettings,
    std: Tensor,
    calls: Counter[str],
    functions: BatchFunctions,
) -> Tensor:
    """All effects, in place where that is possible.

    Args:
        images: (N, 3, H, W).
        arguments: Of ``device_arguments``, to know on the host what there is to do.
        on_device: The same on the device.
        settings: What may happen.
        std: (3,) of the normalisation.
        calls: Kornia's functions by name, counted.
        functions: What runs functions of whole batches.
    """
    # Blur first: noise that was blurred would be no noise, and an erased rectangle has sharp edges.
    if len(arguments["blur_rows"]):
        images = blur(images, on_device["blur_rows"].long(), on_device["blur_kernel"].float(), calls)
    if functions.wants_whole_batch(images):
        # All rows, touched or not, so that shapes never change: it is one kernel.
        if settings.noise or settings.erase:
            images = functions(
                noise_and_erase, images, on_device["noise_std"], on_device["noise_key"], on_device["erase"], std=std
            )
        return images
    # On a CPU only rows that are touched, one at a time: its planes stay in the cache.
    for row in arguments["noise_rows"]:
        one_row = slice(row, row + 1)
        images[one_row] += noise(on_device["noise_std"][one_row], on_device["noise_key"][one_row], std, images.shape)
    for row in np.flatnonzero(arguments["erase"].any(-1)):
        x1, y1, x2, y2 = arguments["erase"][row].astype(int)
        images[row, :, y1:y2, x1:x2] = 0
    return images


def blur_kernels(settings: AugmentSettings, sigma: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Kornia's (K, taps) for K images of ``size`` (H, W), from ``sigma`` (K,) in pixels.

    Made here and not by Kornia's ``gaussian_blur2d``, which asks the device whether all sigmas are positive.
    """
    # One kernel size for all, or the result of one image would depend on the others' sigmas.
    widest = min(int(np.ceil(3 * settings.blur_sigma[1])), min(size) - 1)
    if not len(sigma):
        return np.zeros((0, 2 * widest + 1))
    from kornia.filters import get_gaussian_kernel1d  # here, since it is slow to import

    return get_gaussian_kernel1d(2 * widest + 1, torch.from_numpy(sigma)[:, None]).numpy()


def blur(images: Tensor, rows: Tensor, kernels: Tensor, calls: Counter[str]) -> Tensor:
    """Gaussian blur of some rows in place by Kornia.

    Args:
        images: (N, 3, H, W).
        rows: (K,) int64.
        kernels: (K, taps).
        calls: Counts Kornia's function.
    """
    from kornia.filters import filter2d_separable

    calls["filter2d_separable"] += 1
    blurred = filter2d_separable(images.index_select(0, rows), kernels, kernels, "reflect")
    return images.index_copy_(0, rows, blurred)


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


def noise(amount: Tensor, keys: Tensor, std: Tensor, shape: torch.Size) -> Tensor:
    """Gaussian noise (N, C, H, W) to be added to normalised images.

    Args:
        amount: (N,) standard deviation on the 0..1 scale.
        keys: (N, 2) the two halves of each key.
        std: (C,) of the normalisation.
        shape: Whose last three numbers are C, H and W.
    """
    high, low = keys.to(torch.int32).unbind(-1)
    values = normal((high << 16) | low, shape[1:].numel()).view(-1, *shape[1:])
    return values * (amount.float()[:, None] / std)[..., None, None]


def erase(images: Tensor, rectangles: Tensor) -> Tensor:
    """Rectangles of the mean colour, which is 0 once normalised.

    Args:
        images: (N, C, H, W).
        rectangles: (N, 4) x1, y1, x2, y2 in whole pixels, all 0 = none.
    """
    x, y = (torch.arange(length, device=images.device) for length in (images.shape[-1], images.shape[-2]))
    x1, y1, x2, y2 = rectangles[..., None].unbind(1)
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None]
    return torch.where(inside[:, None], 0, images)


def noise_and_erase(images: Tensor, amount: Tensor, keys: Tensor, rectangles: Tensor, std: Tensor) -> Tensor:
    """Both for all rows, by whole tensors alone, for a GPU: (N, 3, H, W), see ``noise`` and ``erase``."""
    return erase(images + noise(amount, keys, std, images.shape), rectangles)
