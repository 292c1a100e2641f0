"""Matrices that place an image in its frame, and boxes moved by them."""

from typing import NamedTuple

import torch
from torch import Tensor


def sampling_theta(inverse: Tensor, source: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """(N, 2, 3) for ``affine_grid(align_corners=False)``, whose -1..1 runs from edge to edge as ours does.

    Args:
        inverse: (N, 3, 3) output -> source in continuous edges.
        source: Height and width of what is sampled.
        output: Height and width of what is made.
    """
    (height, width), (out_height, out_width) = source, output
    x_scale, y_scale = inverse[:, 0] * (2 / width), inverse[:, 1] * (2 / height)
    rows = torch.stack([x_scale, y_scale], 1)
    linear_x, linear_y, offset = rows[..., 0] * (out_width / 2), rows[..., 1] * (out_height / 2), rows[..., 2]
    return torch.stack([linear_x, linear_y, offset + linear_x + linear_y - 1], -1)


class Placement(NamedTuple):
    """Where a resized image lies inside a canvas, all in whole pixels."""

    height: int
    width: int
    top: int
    left: int


def letterbox_placement(size: tuple[int, int], target: tuple[int, int]) -> Placement:
    """The largest copy of an image of ``size`` (H, W) that fits ``target`` (H, W), centred.

    Rounded to whole pixels, so that the image resized to it and ``placement_matrix`` agree exactly.
    """
    scale = min(target[0] / size[0], target[1] / size[1])
    height = min(target[0], max(1, round(size[0] * scale)))
    width = min(target[1], max(1, round(size[1] * scale)))
    return Placement(height, width, (target[0] - height) // 2, (target[1] - width) // 2)


def placement_matrix(size: tuple[int, int], placement: Placement) -> Tensor:
    """3x3 float64: pixels of an image of ``size`` (H, W) -> pixels of the canvas it was resized into."""
    scale_x, scale_y = placement.width / size[1], placement.height / size[0]
    rows = [[scale_x, 0.0, placement.left], [0.0, scale_y, placement.top], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64)


def invert_affine(matrix: Tensor) -> Tensor:
    """Inverse of affine ``(..., 3, 3)`` matrices in closed form.

    Unlike ``torch.linalg.inv`` it never makes the host wait for the device. A singular matrix gives inf.
    """
    a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 0, 2]
    d, e, f = matrix[..., 1, 0], matrix[..., 1, 1], matrix[..., 1, 2]
    inverse_determinant = 1 / (a * e - b * d)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    first = [e * inverse_determinant, -b * inverse_determinant, (b * f - c * e) * inverse_determinant]
    second = [-d * inverse_determinant, a * inverse_determinant, (c * d - a * f) * inverse_determinant]
    return torch.stack([*first, *second, zero, zero, one], -1).unflatten(-1, (3, 3))


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Axis-aligned hull of the four moved corners of each box, exact for the identity.

    Args:
        boxes: ``(..., B, 4)``.
        matrix: Affine ``(..., 3, 3)``, source -> output, one a group of B boxes; cast to the boxes' type.

    Returns:
        ``(..., B, 4)``. The hull of a turned box is larger than what the box held: a label drawn anew
        would be tighter.
    """
    matrix = matrix.to(boxes)[..., None, :, :]
    # The corners are all pairs of (x1 or x2, y1 or y2) and an affine coordinate is a sum of one term of
    # each: so its extreme values are sums of the extremes of the terms.
    terms_x = matrix[..., :2, 0, None] * boxes[..., None, 0::2]
    terms_y = matrix[..., :2, 1, None] * boxes[..., None, 1::2]
    offset = matrix[..., :2, 2]
    low = terms_x.amin(-1) + terms_y.amin(-1) + offset
    high = terms_x.amax(-1) + terms_y.amax(-1) + offset
    return torch.cat([low, high], -1)
