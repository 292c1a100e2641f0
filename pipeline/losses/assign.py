"""Which location of a detector answers for which object: fully batched, from detached predictions.

Task-aligned assignment (Feng et al. 2021, TOOD, https://arxiv.org/abs/2108.07755): an object takes the
``topk`` locations inside it with the highest ``score^alpha * IoU^beta``; a location wanted by several
objects goes to the one it overlaps most.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-9


class Assignment(NamedTuple):
    """For each image and location; N images, L locations, B boxes."""

    positive: Tensor
    """(N, L) bool: answers for an object."""
    box: Tensor
    """(N, L) int64: which box; 0 where not positive."""
    share: Tensor
    """(N, L) float32: weight within the object; the shares of an object that has any location sum to 1."""
    target: Tensor
    """(N, L) float32 class target in 0..1: the alignment, scaled so that an object's best is its best IoU."""


@torch.no_grad()
def assign(
    logits: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    real: Tensor,
    *,
    topk: int,
    alpha: float,
    beta: float,
) -> Assignment:
    """Assign locations to objects.

    Args:
        logits: (N, L, K) class logits.
        predicted: (N, L, 4) boxes, xyxy pixels.
        centres: (L, 2) locations, x, y pixels.
        strides: (L,) pixels.
        boxes: (N, B, 4) objects, xyxy pixels, B >= 1.
        labels: (N, B) int64.
        real: (N, B) bool: False for padding and crowds, which get nothing.
        topk: Locations an object may take.
        alpha: Exponent of the class score.
        beta: Exponent of the IoU.
    """
    num_boxes, num_locations = boxes.shape[1], centres.shape[0]
    inside = candidates(centres, strides, boxes) & real[..., None]
    overlap = iou_matrix(boxes, predicted.float()) * inside
    scores = _scores_of(logits, labels)
    # The floor keeps an order among candidates where nothing overlaps yet.
    alignment = (scores.pow(alpha) * overlap.pow(beta) + _EPS) * inside
    best = alignment.topk(min(topk, num_locations), dim=-1).indices
    claimed = torch.zeros_like(inside).scatter_(-1, best, True) & inside
    # Ties at the same location: the object it overlaps most; then the smallest, as FCOS does.
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0)
    claim_strength = torch.where(claimed, overlap + _EPS / (1 + area[..., None]), -torch.ones_like(overlap))
    index = claim_strength.argmax(dim=1)
    positive = claimed.any(dim=1)
    boxes_axis = torch.arange(num_boxes, device=boxes.device)[None, :, None]
    won = (boxes_axis == index[:, None, :]) & positive[:, None, :]
    share = won.float() / won.sum(dim=-1, keepdim=True).clamp(min=1)
    alignment, overlap = alignment * won, overlap * won
    scale = overlap.amax(dim=-1, keepdim=True) / alignment.amax(dim=-1, keepdim=True).clamp(min=_EPS)
    return Assignment(
        positive=positive,
        box=torch.where(positive, index, torch.zeros_like(index)),
        share=share.sum(dim=1),
        target=(alignment * scale).sum(dim=1).clamp(max=1.0),
    )


def candidates(centres: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """(N, B, L) bool: the location lies inside the box, or is among the nearest ones of a small box.

    A box that is narrower than the grid may hold no location: it is offered those within one stride of its
    centre (both axes) on every level, so that no object goes untaught.
    """
    x, y = centres[:, 0], centres[:, 1]
    x1, y1, x2, y2 = boxes.float().unsqueeze(-1).unbind(dim=2)
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    near = ((x - (x1 + x2) / 2).abs() <= strides) & ((y - (y1 + y2) / 2).abs() <= strides)
    return torch.where(inside.any(dim=-1, keepdim=True), inside, near)


def iou_matrix(boxes: Tensor, predicted: Tensor) -> Tensor:
    """(N, B, 4) and (N, L, 4) xyxy -> IoU (N, B, L) float32; 0 where both are empty."""
    a, b = boxes.float()[:, :, None, :], predicted.float()[:, None, :, :]
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = size[..., 0] * size[..., 1]
    area_a = ((a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])).clamp(min=0)
    area_b = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])).clamp(min=0)
    return overlap / (area_a + area_b - overlap).clamp(min=_EPS)


def _scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid score of each object's class at each location: (N, L, K), (N, B) -> (N, B, L) float32."""
    columns = labels.clamp(min=0)[:, :, None].expand(-1, -1, logits.shape[1])
    return logits.float().transpose(1, 2).gather(1, columns).sigmoid()
