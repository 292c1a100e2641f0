"""The loss of one-stage detectors: quality focal loss, GIoU and predicted IoU, as sums over objects."""

from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.assign import Assignment, assign
from pipeline.losses.base import BoxLoss, Term, objects


class Locations(Protocol):
    """What a one-stage detector gives, before any threshold; see ``pipeline.models.DetectionOutput``."""

    @property
    def logits(self) -> Tensor:
        """(N, L, K) class logits."""
        ...

    @property
    def boxes(self) -> Tensor:
        """(N, L, 4) float32 xyxy pixels."""
        ...

    @property
    def quality(self) -> Tensor | None:
        """(N, L) logits of the IoU; None: the head says none."""
        ...

    @property
    def centres(self) -> Tensor:
        """(L, 2) x, y pixels."""
        ...

    @property
    def strides(self) -> Tensor:
        """(L,) pixels."""
        ...


class DetectionLoss(BoxLoss):
    """Task-aligned one-stage loss; see ``detection``."""

    terms: ClassVar[tuple[str, ...]] = ("box", "cls", "quality")

    cls_weight: float = Field(default=1.0, ge=0)
    box_weight: float = Field(default=2.0, ge=0)
    quality_weight: float = Field(default=0.5, ge=0)
    target: Literal["hard", "aligned"] = "aligned"
    """Class target of a positive location: 1, or its alignment (TOOD), which is the IoU at the best one."""
    gamma: float = Field(default=1.5, ge=0)
    """Focusing exponent: ``|target - p|^gamma``."""
    balance: float = Field(default=0.25, gt=0, lt=1)
    """Share of positives in a hard target's focal loss (alpha of Lin et al.); negatives get the rest."""
    topk: int = Field(default=4, ge=1)
    """Locations an object may take; few make classes learn sooner (demo data, one run of 400 steps each:
    9 gave mAP@.5 0.82, 5 gave 0.87)."""
    alpha: float = Field(default=0.5, ge=0)
    """Exponent of the class score in the alignment."""
    beta: float = Field(default=4.0, ge=0)
    """Exponent of the IoU in the alignment."""

    def counts(self, labels: Tensor, crowd: Tensor | None) -> dict[str, Tensor]:
        """Objects."""
        return counts(labels, crowd)

    def __call__(self, output: Any, boxes: Tensor, labels: Tensor, crowd: Tensor | None) -> dict[str, Term]:
        """See ``detection``."""
        return detection(output, boxes, labels, crowd, self)


def counts(labels: Tensor, crowd: Tensor | None = None) -> dict[str, Tensor]:
    """What each term is divided by: the number of objects of (N, B) labels, a float32 scalar each.

    Three tensors, not one three times: whoever all-reduces them in place would count threefold.
    """
    number = objects(labels, crowd).sum().float()
    return {name: number.clone() for name in ("cls", "box", "quality")}


def detection(
    output: Locations,
    boxes: Tensor,
    labels: Tensor,
    crowd: Tensor | None = None,
    settings: DetectionLoss | None = None,
) -> dict[str, Term]:
    """Terms ``cls``, ``box``, ``quality``, each (weight, sum, count of objects).

    - cls: Σ over locations and classes of the focal loss ``|t - p|^gamma BCE(p, t)`` (Li et al. 2020,
      2006.04388; with hard targets weighted by ``balance`` as in Lin et al. 2017). Locations inside a crowd
      box are ignored for its class, unless they answer for an object.
    - box: Σ over objects of the mean of ``1 - GIoU`` (Rezatofighi et al. 2019, 1902.09630) over its
      locations.
    - quality: Σ over objects of the mean BCE of the quality logit against the IoU (detached); 0 where the
      output has no quality.

    A batch without objects gives finite sums with gradient (cls still pushes every location down) and
    count 0; ``losses.total`` then counts the term as zero.

    Args:
        output: Raw outputs; float16 and bfloat16 are computed in float32.
        boxes: (N, B, 4) xyxy pixels, padded; B may be 0.
        labels: (N, B) int64; -1 = padding.
        crowd: (N, B) bool, or None for no crowds.
        settings: Weights and exponents; None = defaults.
    """
    settings = settings or DetectionLoss()
    object_counts = counts(labels, crowd)
    if boxes.shape[1] == 0:
        # One padding box, so that reductions over boxes are defined.
        boxes = boxes.new_zeros((boxes.shape[0], 1, 4))
        labels = labels.new_full((labels.shape[0], 1), -1)
        crowd = None
    real = objects(labels, crowd)
    assigned = assign(
        output.logits,
        output.boxes,
        output.centres,
        output.strides,
        boxes,
        labels,
        real,
        topk=settings.topk,
        alpha=settings.alpha,
        beta=settings.beta,
    )
    matched = boxes.float().gather(1, assigned.box[..., None].expand(-1, -1, 4))
    # Elsewhere than at positives any well-formed pair does: the share there is 0.
    predicted = output.boxes.float()
    iou, giou = _giou(predicted, torch.where(assigned.positive[..., None], matched, predicted.detach()))
    box = ((1 - giou) * assigned.share).sum()
    quality = torch.zeros_like(box)
    if output.quality is not None:
        target_iou = iou.detach().clamp(0, 1)
        quality_loss = F.binary_cross_entropy_with_logits(output.quality.float(), target_iou, reduction="none")
        quality = (quality_loss * assigned.share).sum()
    cls = _class_loss(output, boxes, labels, crowd, assigned, settings)
    return {
        "cls": (settings.cls_weight, cls, object_counts["cls"]),
        "box": (settings.box_weight, box, object_counts["box"]),
        "quality": (settings.quality_weight, quality, object_counts["quality"]),
    }


def _class_loss(
    output: Locations,
    boxes: Tensor,
    labels: Tensor,
    crowd: Tensor | None,
    assigned: Assignment,
    settings: DetectionLoss,
) -> Tensor:
    """Sum of the focal loss over locations and classes."""
    logits = output.logits.float()
    columns = labels.clamp(min=0).gather(1, assigned.box)[..., None]
    value = assigned.positive.float() if settings.target == "hard" else assigned.target
    target = torch.zeros_like(logits).scatter_(2, columns, (value * assigned.positive)[..., None])
    focus = (target - logits.sigmoid()).abs().pow(settings.gamma)
    loss = focus * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if settings.target == "hard":
        loss = loss * torch.where(target > 0, settings.balance, 1 - settings.balance)
    if crowd is not None:
        loss = loss.masked_fill(_in_crowd_of_class(output, boxes, labels, crowd, assigned.positive), 0.0)
    return loss.sum()


def _in_crowd_of_class(output: Locations, boxes: Tensor, labels: Tensor, crowd: Tensor, positive: Tensor) -> Tensor:
    """(N, L, K) bool: locations inside a crowd box of that class that answer for no object."""
    x, y = output.centres[:, 0], output.centres[:, 1]
    x1, y1, x2, y2 = boxes.float().unsqueeze(-1).unbind(dim=2)
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    regions = (inside & (crowd & (labels >= 0))[..., None]).float()
    kinds = F.one_hot(labels.clamp(min=0), output.logits.shape[2]).float()
    covered = torch.einsum("nbl,nbk->nlk", regions, kinds) > 0
    return covered & ~positive[..., None]


def _giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of aligned xyxy boxes (..., 4) float32; finite for empty boxes too."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = size[..., 0] * size[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = (area_a + area_b - overlap).clamp(min=1e-6)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    around = (hull[..., 0] * hull[..., 1]).clamp(min=1e-6)
    iou = overlap / union
    return iou, iou - (around - union) / around
