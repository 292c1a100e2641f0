"""Pure box geometry: overlap, suppression, clipping, letterboxing and moving boxes by a matrix.

Boxes are ``(..., B, 4)`` as ``x1, y1, x2, y2`` with continuous edges (columns 0 to 9 are x1 = 0, x2 = 10).
Matrices are 3x3 and act on column vectors ``(x, y, 1)`` of the same continuous coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Placement(NamedTuple):
    """Where a resized image lies inside a canvas, all in whole pixels."""

    height: int
    width: int
    top: int
    left: int


def area(boxes: Tensor) -> Tensor:
    """Area in square pixels, ``(..., B, 4)`` -> ``(..., B)``; a turned-over box has none."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs.

    Args:
        a: ``(..., A, 4)`` boxes.
        b: ``(..., B, 4)`` boxes.

    Returns:
        ``(..., A, B)`` in 0..1; 0 where the union is empty.
    """
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1), 0)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of aligned pairs (Rezatofighi et al. 2019, arXiv 1902.09630).

    ``IoU - (hull - union) / hull``, where ``hull`` is the smallest box that holds both. Differentiable.

    Args:
        a: ``(..., 4)`` boxes.
        b: ``(..., 4)`` boxes of the same shape.

    Returns:
        ``(...)`` in -1..1; 0 for two boxes without area at the same point.
    """
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area(a) + area(b) - shared
    extent = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = extent.clamp(min=0).prod(-1)
    tiny = torch.finfo(a.dtype).eps
    return shared / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices ``(K,)`` that greedy non-maximum suppression keeps, best score first (torchvision)."""
    from torchvision.ops import nms as torchvision_nms

    return torchvision_nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """``nms`` within each group alone (label, image or both); up to 10 times as fast (torchvision)."""
    from torchvision.ops import batched_nms as torchvision_batched_nms

    return torchvision_batched_nms(boxes, scores, groups, iou_threshold)


def clip(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Clip to an image.

    Args:
        boxes: ``(..., B, 4)``.
        size: Height and width in pixels, or a tensor ``(..., 2)`` of them, one pair a group of B boxes.
    """
    if isinstance(size, Tensor):
        limit = size.to(boxes)[..., None, [1, 0, 1, 0]]
        return torch.minimum(boxes.clamp(min=0), limit)
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def letterbox_placement(size: tuple[int, int], target: tuple[int, int]) -> Placement:
    """The largest copy of an image of ``size`` (H, W) that fits ``target`` (H, W), centred.

    Rounded to whole pixels, so that the image resized to it and the matrix of ``letterbox`` agree exactly.
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


def letterbox(size: tuple[int, int], target: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Matrix from an image of ``size`` (H, W) to a letterboxed canvas ``target`` (H, W), and its inverse.

    The identity when the sizes are equal. Width and height are scaled by what the rounding to whole pixels
    made of them, so the two factors may differ a little.

    Returns:
        Two 3x3 float64 tensors.
    """
    matrix = placement_matrix(size, letterbox_placement(size, target))
    return matrix, invert_affine(matrix)


def invert_affine(matrix: Tensor) -> Tensor:
    """Inverse of affine ``(..., 3, 3)`` matrices in closed form.

    Unlike ``torch.linalg.inv`` it never makes the host wait for the device. A singular matrix gives inf.
    """
    a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 0, 2]
    d, e, f = matrix[..., 1, 0], matrix[..., 1, 1], matrix[..., 1, 2]
    scale = 1 / (a * e - b * d)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    first = [e * scale, -b * scale, (b * f - c * e) * scale]
    second = [-d * scale, a * scale, (c * d - a * f) * scale]
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
