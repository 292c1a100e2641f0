"""Framing where the pixels are: images that a GPU decoded into one canvas, without a way back to the host."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.images.affine import Placement
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import Layout

CHUNK_PIXELS = 8_000_000
"""Source pixels resized at a time: 100 MB of float32."""


def frame_on_device(
    images: Sequence[Tensor | np.ndarray],
    layout: Layout,
    input: InputSettings,
    device: torch.device,
) -> Tensor:
    """What ``host_frames.paste_images`` does, on a device; nothing of it waits for that device.

    Resizing is bilinear with antialiasing, as on the host, but in float32 where that one uses integer weights: a value
    may differ by 1.

    Args:
        images: N arrays (H, W, 3) uint8 on the host, or tensors (3, H, W) uint8.
        layout: Where each image goes, and in what canvas.
        input: Whose mean colour lies outside the images.
        device: Of the result.

    Returns:
        (N, 3, H, W) of the canvas, uint8 on ``device``, channels last in memory.
    """
    frames = torch.empty(len(images), *layout.canvas, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    for channel, value in enumerate(input.mean):
        frames[:, channel].fill_(round(255 * value))
    rows_by_size: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
    planes = [_planes(image, device) for image in images]
    for n, (image, place) in enumerate(zip(planes, layout.places, strict=True)):
        rows_by_size.setdefault(((image.shape[1], image.shape[2]), (place.height, place.width)), []).append(n)
    for (size, target), rows in rows_by_size.items():
        step = max(1, CHUNK_PIXELS // (size[0] * size[1]))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            resized = [planes[n] for n in chunk] if size == target else _resize([planes[n] for n in chunk], target)
            for n, image in zip(chunk, resized, strict=True):
                _paste(frames[n], image, layout.places[n])
    return frames


def _planes(image: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """(3, H, W) on the device."""
    if isinstance(image, Tensor):
        return image
    host = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _resize(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    """(n, 3, *size) uint8."""
    stacked = torch.stack(images).float()
    resized = interpolate(stacked, size, mode="bilinear", antialias=True, align_corners=False)
    return resized.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _paste(canvas: Tensor, image: Tensor, place: Placement) -> None:
    """Write an image (3, h, w) into a canvas (3, H, W), cut at the edges."""
    rows = slice(max(place.top, 0), min(place.top + place.height, canvas.shape[1]))
    columns = slice(max(place.left, 0), min(place.left + place.width, canvas.shape[2]))
    canvas[:, rows, columns] = image[
        :, rows.start - place.top : rows.stop - place.top, columns.start - place.left : columns.stop - place.left
    ]
