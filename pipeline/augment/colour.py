"""Linear colour: brightness, contrast, saturation, hue and normalisation as one 3x3 matrix and one offset.

Of Kornia's several definitions these are the linear ones, so they compose: ``adjust_brightness`` (adds),
``adjust_contrast`` (multiplies), ``adjust_saturation_with_gray_subtraction`` (blends with BT.601 luma; its
``adjust_saturation`` works on HSV and is not linear). Kornia clips to 0..1 after each; here it is done once,
at the end. Kornia's ``adjust_hue`` works on HSV and changes the luma, so hue is our own rotation.
"""

import functools
from typing import Final

import torch
from torch import Tensor

# ITU-R BT.601 luma, and the colour differences U = 0.492 (B - Y), V = 0.877 (R - Y) of the same standard.
LUMA: Final = (0.299, 0.587, 0.114)
_U, _V = 0.492, 0.877


@functools.cache
def _chroma_bases(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The (3, 3) matrices of a hue rotation by t: M = luma + cos(t) same + sin(t) crossed."""
    red, green, blue = LUMA
    forward = [
        [red, green, blue],
        [-_U * red, -_U * green, _U * (1 - blue)],
        [_V * (1 - red), -_V * green, -_V * blue],
    ]
    to_yuv = torch.tensor(forward, dtype=torch.float64)
    to_rgb = torch.linalg.inv(to_yuv)
    keep_luma = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    same = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    crossed = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    bases = torch.stack([to_rgb @ part @ to_yuv for part in (keep_luma, same, crossed)])
    luma, cosine, sine = bases.to(dtype).to(device, non_blocking=True)
    return luma, cosine, sine


def hue_matrix(turns: Tensor) -> Tensor:
    """Rotation of the (U, V) plane of BT.601; greys and the luma of every colour stay as they are.

    Args:
        turns: (N,) fraction of the full circle.

    Returns:
        (N, 3, 3), acting on RGB column vectors.
    """
    luma, same, crossed = _chroma_bases(turns.dtype, turns.device)
    angle = (2 * torch.pi * turns)[:, None, None]
    return luma + torch.cos(angle) * same + torch.sin(angle) * crossed


def colour_matrix(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Brightness, then contrast, saturation and hue, as ``matrix @ rgb + offset`` on the 0..1 scale.

    Args:
        values: The draw as floating tensors of N rows.

    Returns:
        (N, 3, 3) and (N, 3).
    """
    brightness, contrast, saturation = values["brightness"], values["contrast"], values["saturation"]
    identity = torch.eye(3, device=contrast.device, dtype=contrast.dtype)
    luma = torch.zeros_like(identity)
    for channel, weight in enumerate(LUMA):
        luma[:, channel] = weight
    factor = saturation[:, None, None]
    saturate = factor * identity + (1 - factor) * luma
    matrix = hue_matrix(values["hue"]) @ saturate * contrast[:, None, None]
    # Saturation and hue leave greys alone, and the added brightness is grey.
    return matrix, (contrast * brightness)[:, None].expand(-1, 3)


def apply_colour(images: Tensor, matrix: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``matrix @ rgb + offset`` for every pixel, cut off at ``low`` and ``high``.

    Args:
        images: (N, 3, H, W) float32.
        matrix: (N, 3, 3).
        offset: (N, 3).
        low: (3,) smallest value of each channel.
        high: (3,) largest.
    """
    if not images.is_cpu or torch.compiler.is_compiling():
        return by_planes(images, matrix, offset, low, high)
    # Not baddbmm: it first writes the offset out to the size of the images.
    out = torch.bmm(matrix, images.flatten(2)).add_(offset[..., None]).view(images.shape)
    for channel, bounds in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        out[:, channel].clamp_(*bounds)  # by numbers: by tensors it takes ten times as long
    return out


def by_planes(images: Tensor, matrix: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``apply_colour`` without a matrix product: compiled it is part of one kernel, and no TF32 rounds it."""
    red, green, blue = images.unbind(1)
    coefficients, planes = matrix[..., None, None], []
    for channel in range(3):
        plane = (
            red * coefficients[:, channel, 0]
            + green * coefficients[:, channel, 1]
            + blue * coefficients[:, channel, 2]
            + offset[:, channel, None, None]
        )
        planes.append(plane.clamp(low[channel], high[channel]))
    return torch.stack(planes, 1)
