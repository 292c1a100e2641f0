"""Pure box geometry: overlap, suppression, clipping, letterboxing and moving boxes by a matrix.

Boxes are ``(..., B, 4)`` as ``x1, y1, x2, y2`` with continuous edges (columns 0 to 9 are x1 = 0, x2 = 10).
Matrices are 3x3 and act on column vectors ``(x, y, 1)`` of the same continuous coordinates.
"""

import torch
from torch import Tensor


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
